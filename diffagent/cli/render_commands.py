"""``diffagent render`` and ``diffagent score``: prompts or pictures in, a contact sheet out.

Both run the stages of the same names on artifacts made from the command line. Pictures and scores
are kept in the store and not computed again.
"""

from __future__ import annotations

import codecs
import logging
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from diffagent.cli.options import Overrides, Verbose, parse_overrides, refuse_options
from diffagent.device import keep_freed_memory

log = logging.getLogger(__name__)

T = TypeVar("T")

if TYPE_CHECKING:
    from diffagent.agent.selector import Selector
    from diffagent.run_config import RunConfig
    from diffagent.schemas.tables import CandidateRow
    from diffagent.store import Artifact
    from diffagent.t2i.catalogue import Entry

#: Reward models as released, equal to those of configs/paper.yaml.
RELEASED_REWARDS = {
    "scorers": [
        {"name": "clip", "model": "ViT-L-14-quickgelu", "weights": "openai"},
        {"name": "image_reward", "model": "v1.0", "weights": "THUDM/ImageReward"},
        {"name": "hps_v2", "model": "v2", "weights": "xswu/HPSv2"},
    ],
    "unify": "chatgen",
}
_MAX_PIXELS = 2048 * 2048


_MODELS = "Model files"
_CALLS = "One model and its parameters for all prompts"
_CHOICE = "A choice for each prompt"
_OUTPUT = "Output"

Prompts = Annotated[
    Path | None,
    typer.Argument(
        metavar="PROMPTS", help="Prompts, one a line, or API calls as JSON lines; '-' reads stdin."
    ),
]
Folders = Annotated[
    list[Path] | None,
    typer.Option(
        "--models",
        "--folder",
        metavar="DIR",
        help="Folder of checkpoints and LoRAs, or installation of A1111 or ComfyUI (repeatable).",
        rich_help_panel=_MODELS,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        help="Base model to assume for files that do not state theirs, e.g. 'SD 1.5'.",
        rich_help_panel=_MODELS,
    ),
]
Download = Annotated[
    bool,
    typer.Option(
        "--download",
        help="Download models that the folders of --models lack.",
        rich_help_panel=_MODELS,
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", "-m", metavar="NAME", help="Checkpoint (repeatable).", rich_help_panel=_CALLS
    ),
]
LoRAs = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME:WEIGHT",
        help="LoRA to apply (repeatable).",
        rich_help_panel=_CALLS,
    ),
]
Parameter = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        "-p",
        metavar="NAME=VALUE",
        help="Parameter (repeatable): negative_prompt, sampler (A1111 name), steps, cfg_scale, "
        "width, height (pixels), clip_skip.",
        rich_help_panel=_CALLS,
    ),
]
Agent = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Let this agent choose models and parameters; see 'diffagent select'.",
        rich_help_panel=_CHOICE,
    ),
]
DABench = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Let a selector fitted on this DABench choose; with calls or --model: the catalogue "
        "of their names.",
        rich_help_panel=_CHOICE,
    ),
]
Choices = Annotated[
    int,
    typer.Option(
        "-n",
        "--n",
        min=1,
        max=32,
        help="Number of API calls to choose per prompt.",
        rich_help_panel=_CHOICE,
    ),
]
Calls = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="API calls for PROMPTS, line by line; '-' reads stdin.",
        rich_help_panel=_CHOICE,
    ),
]
Seeds = Annotated[
    list[int] | None,
    typer.Option(
        help="Seed; one picture for each (repeatable). [default: 0]", rich_help_panel=_OUTPUT
    ),
]
Score = Annotated[bool, typer.Option(help="Score the pictures.", rich_help_panel=_OUTPUT)]
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Folder for index.html and the pictures.", rich_help_panel=_OUTPUT
    ),
]
Pictures = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="PICTURE...", help="Pictures with their prompts inside, or folders of them."
    ),
]
Prompt = Annotated[str | None, typer.Option(help="Prompt of pictures that do not state theirs.")]
OptionalConfig = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        help="YAML file of a run: settings of the sections render, rewards and runtime.",
    ),
]


def render(
    context: typer.Context,
    prompts: Prompts = None,
    *,
    models: Folders = None,
    base_model: BaseModel = None,
    download: Download = False,
    model: Models = None,
    lora: LoRAs = None,
    param: Parameter = None,
    agent: Agent = None,
    dabench: DABench = None,
    n: Choices = 1,
    calls: Calls = None,
    seed: Seeds = None,
    out: Out = Path("pictures"),
    score: Score = True,
    config: OptionalConfig = None,
    settings: Overrides = None,
    verbose: Verbose = 0,
) -> None:
    """Render a file of prompts, score the pictures, and write a contact sheet.

    diffagent render prompts.txt --models ~/models --model dreamshaper -p steps=30
    """
    from diffagent.sheet.contact_sheet import check_output
    from diffagent.sheet.prompts_file import holds_calls, selected_rows

    path = _needed(prompts, "render")
    keep_freed_memory()
    changes: dict[str, Any] = {
        "render.seeds": seed,
        "runtime.models.folders": [str(folder) for folder in models] if models else None,
    }
    run = _config(config, settings, changes)
    check_output(out)
    lines, lines_of_calls = _read(path), _read(calls) if calls else None
    has_calls = lines_of_calls is not None or holds_calls(lines, path.name)
    chooses = not has_calls and bool(agent or (dabench and not model))
    _refuse_unused(context, run, has_calls=has_calls, chooses=chooses)
    only_local = bool(models) and not download
    named = _named_models(agent or dabench, run, base_model, only_local=only_local)
    entries = named.entries
    if has_calls:
        rows, entries = _rows_of_calls(path, lines, calls, lines_of_calls, entries)
    elif chooses:
        chooser = _open_selector(run, named.usable, agent, dabench)
        rows = selected_rows(lines, chooser, _source(agent, dabench), n)
    else:
        rows = _rows_of_prompts(
            lines, model, {**_parameters(param), "loras": tuple(lora or ())}, entries
        )
    _render_and_score(rows, entries, run, out, path.name, score=score)


def score(
    pictures: Pictures = None,
    *,
    prompt: Prompt = None,
    out: Out = Path("scores"),
    config: OptionalConfig = None,
    settings: Overrides = None,
    verbose: Verbose = 0,
) -> None:
    """Score pictures against their prompts, and write a contact sheet.

    diffagent score pictures/ photo.jpg --prompt "a red car"
    """
    from diffagent.sheet.contact_sheet import check_output

    paths = _needed(pictures, "score")
    keep_freed_memory()
    check_output(out)
    _score_files(paths, prompt, _config(config, settings, {}), out)


def _needed(files: T | None, name: str) -> T:
    """Return the files of the command ``name``.

    Raises:
        ConfigError: the command line has none.
    """
    if not files:
        from diffagent.errors import ConfigError

        kind = "of prompts or API calls" if name == "render" else "that is a picture, or a folder"
        raise ConfigError(
            f"{name} needs a file {kind}; the stage {name!r} of a run is built by: "
            f"diffagent run -c FILE --until {name}"
        )
    return files


def _refuse_unused(
    context: typer.Context, run: RunConfig, *, has_calls: bool, chooses: bool
) -> None:
    """Refuse options that the kind of input does not use.

    Raises:
        ConfigError: the command line has such an option.
    """
    parameters = ("model", "lora", "param")
    if has_calls:
        reason = "not for API calls, which state their models and parameters; leave it out"
        refuse_options(context, (*parameters, "n"), reason)
    elif chooses:
        reason = "not together with --agent or --dabench, which choose; leave one of them out"
        refuse_options(context, parameters, reason)
    else:
        refuse_options(context, ("n",), "needs --agent DIR or --dabench DIR, which choose")
    refuse_options(context, () if context.params["models"] else ("download",), "needs --models DIR")
    folders = run.runtime.models.folders
    refuse_options(context, () if folders else ("base_model",), "needs --models DIR")


def _parameters(texts: list[str] | None) -> dict[str, Any]:
    """Parse the texts NAME=VALUE of --param.

    Raises:
        ConfigError: a text is not of that form, has no such name, or a value of another type.
    """
    from diffagent.errors import ConfigError
    from diffagent.sheet.prompts_file import Parameters

    types: dict[str, Callable[[str], Any]] = {
        field.name: type(field.default) if field.default is not None else int
        for field in fields(Parameters)
        if field.name != "loras"
    }
    values: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in types:
            raise ConfigError(
                f"--param needs NAME=VALUE with a NAME of {', '.join(types)}; got {text!r:.100}"
            )
        try:
            values[name] = types[name](value)
        except ValueError:
            kind = "a whole number" if types[name] is int else "a number"
            raise ConfigError(f"--param {name}: needs {kind}, got {value!r:.100}") from None
    return values


def _config(file: Path | None, settings: list[str] | None, changes: dict[str, Any]) -> RunConfig:
    """Return the settings of a run's file, or the defaults, changed by the command line."""
    from diffagent.run_config import configure, load_config

    overrides = {key: value for key, value in changes.items() if value is not None}
    overrides |= parse_overrides(settings)
    overrides.setdefault("render.max_failed_fraction", 1.0)  # the sheet shows the others
    if file:
        return load_config(file, overrides)
    data = {"rewards": deepcopy(RELEASED_REWARDS), "render": {"max_pixels": _MAX_PIXELS}}
    return configure(data, overrides, "the command line")


def _read(path: Path) -> list[str]:
    """Read the lines of a file, or of standard input for '-', in UTF-8 or UTF-16.

    Raises:
        ConfigError: the file cannot be read.
    """
    from diffagent.errors import ConfigError
    from diffagent.sheet.prompts_file import read_lines

    stdin = str(path) == "-"
    name = "standard input" if stdin else repr(str(path))
    try:
        data = sys.stdin.buffer.read() if stdin else path.read_bytes()
        wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as PowerShell writes text
        return read_lines(data.decode("utf-16" if wide else "utf-8-sig"), name)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {name:.200} as UTF-8 text: {reason}") from None


@dataclass(frozen=True)
class _NamedModels:
    """Models that the names in prompts, calls and options may refer to.

    Attributes:
        entries: entries of a catalogue, then files of the folders that the catalogue lacks.
        local: SHA256 of the files of the folders; None: other models are downloaded.
    """

    entries: list[Entry]
    local: frozenset[str | None] | None

    @property
    def usable(self) -> frozenset[tuple[str, str]] | None:
        """(model, version) of the entries that may be chosen; None: all."""
        if self.local is None:
            return None
        return frozenset((e.model, e.version) for e in self.entries if e.sha256 in self.local)


def _named_models(
    source: Path | None, run: RunConfig, base_model: str | None, *, only_local: bool
) -> _NamedModels:
    """Collect the models that names may refer to.

    Args:
        source: directory of an agent or a DABench, whose catalogue takes precedence.
        run: settings with the folders.
        base_model: base model of files that do not state theirs.
        only_local: remove the download address of entries whose file is in no folder, so that
            nothing is downloaded.

    Raises:
        ConfigError: there is neither a catalogue nor a folder.
    """
    from diffagent.errors import ConfigError
    from diffagent.sheet.prompts_file import folder_entries
    from diffagent.t2i.catalogue import Catalogue

    entries = list(Catalogue.load(source).entries) if source else []
    folders = [Path(folder) for folder in run.runtime.models.folders]
    if not entries and not folders:
        raise ConfigError("render needs --models DIR, --agent DIR or --dabench DIR")
    if not folders:
        return _NamedModels(entries, None)
    index = run.runtime.models_directory / "folders.json"
    hashes = {entry.sha256 for entry in entries}
    files = folder_entries(folders, index, base_model, hashes)
    local = frozenset(entry.sha256 for entry in files)
    if only_local:
        entries = [e if e.sha256 in local else replace(e, download_path="") for e in entries]
    entries += [entry for entry in files if entry.sha256 not in hashes]
    return _NamedModels(entries, local if only_local else None)


def _rows_of_calls(
    prompts: Path,
    lines: list[str],
    calls: Path | None,
    lines_of_calls: list[str] | None,
    entries: list[Entry],
) -> tuple[list[CandidateRow], list[Entry]]:
    """Return the rows of API calls, which are the lines of PROMPTS or of --calls."""
    from diffagent.sheet.prompts_file import call_rows

    if lines_of_calls is None:
        return call_rows(lines, str(prompts), None, entries)
    return call_rows(lines_of_calls, str(calls), lines, entries)


def _open_selector(
    run: RunConfig,
    usable: frozenset[tuple[str, str]] | None,
    agent: Path | None,
    dabench: Path | None,
) -> Selector:
    from diffagent.agent.opening import open_selector

    return open_selector(
        agent,
        dabench,
        "combined",
        encoder="",
        store=run.runtime.store,
        device=run.runtime.device,
        usable=usable,
    )


def _source(agent: Path | None, dabench: Path | None) -> str:
    """Return the name under which the contact sheet lists the choices."""
    return "reranked" if agent and dabench else "agent" if agent else "combined"


def _rows_of_prompts(
    lines: list[str], model: list[str] | None, parameters: dict[str, Any], entries: list[Entry]
) -> list[CandidateRow]:
    """Return the rows of prompts with every named model and the same parameters.

    Raises:
        ConfigError: the command names no model, and there is not exactly one.
    """
    from diffagent.errors import ConfigError
    from diffagent.sheet.prompts_file import Parameters, prompt_rows

    names = [entry.model for entry in entries if entry.is_checkpoint]
    if not model and len(names) != 1:
        examples = ", ".join(map(repr, sorted(names)[:10]))
        raise ConfigError(f"there are {len(names)} checkpoints; choose with --model: {examples}")
    return prompt_rows(lines, model or names, Parameters(**parameters), entries)


def _render_and_score(
    rows: list[CandidateRow],
    entries: list[Entry],
    run: RunConfig,
    out: Path,
    title: str,
    *,
    score: bool,
) -> None:
    """Render rows, write the sheet, score, and write it again; exit with 1 if a picture failed."""
    from diffagent.errors import CivitaiError
    from diffagent.rewards import score_stage

    try:
        renders = _render(rows, entries, run)
    except CivitaiError as error:
        if not error.retryable:
            raise
        # Render the pictures that need no download; the same command fetches the others later.
        log.warning("%s; pictures of models that are not downloaded yet fail", error)
        renders = _render(rows, [replace(entry, download_path="") for entry in entries], run)
    apis = {(row.prompt_id, row.source, row.candidate): row.api for row in rows if row.api}
    missing = _sheet(out, title, renders, apis)
    total = renders.manifest.rows["renders.parquet"]
    if score and missing < total:
        scores = score_stage.score.run(run.rewards, {"renders": [renders]}, run.runtime)
        missing = _sheet(out, title, renders, apis, scores)
    _end(missing, total, out)


def _end(missing: int, total: int, out: Path) -> None:
    """Exit with 1 if pictures are missing; print where the reasons are."""
    if missing:
        typer.echo(
            f"error: {missing} of {total} pictures failed; see {out / 'index.html'} or "
            "results.jsonl next to it for the reasons",
            err=True,
        )
        raise typer.Exit(1)


def _render(rows: list[CandidateRow], entries: list[Entry], run: RunConfig) -> Artifact:
    """Render rows with the models of ``entries``."""
    from diffagent.render import render_stage
    from diffagent.sheet import prompts_file

    source = prompts_file.prompts.run(prompts_file.prompts_config(rows, entries), {}, run.runtime)
    return render_stage.render.run(
        run.render,
        {"candidates": [source], "dabench": [source]},
        run.runtime,
        site_url=run.crawl.site,
    )


def _sheet(
    out: Path,
    title: str,
    renders: Artifact,
    apis: dict[tuple[int, str, int], str],
    scores: Artifact | None = None,
) -> int:
    """Write the folder OUT; return the number of rows without a picture."""
    from diffagent.sheet.contact_sheet import write_contact_sheet, write_results
    from diffagent.sheet.sheet_rows import copy_pictures, sheet_cards, sheet_facts

    cards = sheet_cards(renders, apis, scores)
    out.mkdir(parents=True, exist_ok=True)
    copy_pictures(cards, out)
    write_contact_sheet(out / "index.html", title, cards, sheet_facts(renders, scores))
    write_results(out / "results.jsonl", cards)
    failed = sum(card.picture is None for card in cards)
    action = "scored" if scores else "drawn"
    typer.echo(f"{len(cards) - failed} of {len(cards)} pictures {action}: {out / 'index.html'}")
    return failed


def _score_files(pictures: list[Path], prompt: str | None, run: RunConfig, out: Path) -> None:
    """Score picture files and write the sheet.

    Raises:
        ConfigError: ``out`` is the folder of the pictures.
    """
    from diffagent.errors import ConfigError
    from diffagent.rewards import score_stage
    from diffagent.schemas.tables import RENDER_TABLE
    from diffagent.sheet import sheet_rows
    from diffagent.sheet.prompts_file import pictures_in

    paths = list(pictures_in(pictures))
    if any(path.resolve().parent == out.resolve() for path in paths):
        raise ConfigError(f"--out {str(out)!r} is the folder of the pictures; give another folder")
    config, apis = sheet_rows.pictures_config(paths, prompt)
    renders = sheet_rows.pictures.run(config, {}, run.runtime)
    statuses = [row.status for row in RENDER_TABLE.read(renders.file("renders.parquet"))]
    scores = None
    if "ok" in statuses:  # else no scorer has to be loaded
        scores = score_stage.score.run(run.rewards, {"renders": [renders]}, run.runtime)
    _end(_sheet(out, "Scores", renders, apis, scores), len(statuses), out)
