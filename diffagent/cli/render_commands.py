"""``diffagent render`` and ``diffagent score``: a file of prompts, or of pictures, in one command.

Both run the stages of the same names on artefacts made from what the command line says, so that
what was drawn or scored once is not again; without a file they are the stages of a run.
"""

from __future__ import annotations

import codecs
import logging
import sys
from copy import deepcopy
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffagent.cli.options import Overrides, Reconcile, Refresh, Verbose, parse_overrides
from diffagent.device import keep_freed_memory

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from diffagent.agent.selector import Selector
    from diffagent.schemas.config import PipelineConfig
    from diffagent.schemas.tables import CandidateRow
    from diffagent.store.artifacts import Artifact
    from diffagent.t2i.catalogue import Entry

#: The released reward models, as in configs/paper.yaml.
_REWARDS = {
    "scorers": [
        {"name": "clip", "model": "ViT-L-14-quickgelu", "weights": "openai"},
        {"name": "image_reward", "model": "v1.0", "weights": "THUDM/ImageReward"},
        {"name": "hps_v2", "model": "v2", "weights": "xswu/HPSv2"},
    ],
    "unify": "chatgen",
}
_MAX_PIXELS = 2048 * 2048


class Backend(StrEnum):
    """What draws."""

    diffusers = "diffusers"
    a1111 = "a1111"
    comfyui = "comfyui"


Prompts = Annotated[
    Path | None,
    typer.Argument(
        metavar="[PROMPTS]",
        help="Prompts, one a line, or API calls as JSON lines; '-': stdin. Without it: the stage "
        "'render' of the run that -c describes.",
    ),
]
Folders = Annotated[
    list[Path] | None,
    typer.Option(
        "--models",
        "--folder",
        metavar="DIR",
        help="Folder of checkpoints and LoRAs, or an installation (repeatable).",
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", metavar="NAME", help="Checkpoint (repeatable)."),
]
LoRAs = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="NAME:WEIGHT", help="For all prompts (repeatable)."),
]
Side = Annotated[int | None, typer.Option(help="Pixels; default: the base model's.")]
Seeds = Annotated[
    list[int] | None, typer.Option(help="A picture for each (repeatable); default 0.")
]
Calls = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="API calls for PROMPTS, line by line; '-': stdin."),
]
Agent = Annotated[
    Path | None, typer.Option(metavar="DIR", help="An agent chooses for each prompt; see select.")
]
DABench = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A DABench: what calls name, or what is learned from."),
]
AsInSelect = Annotated[str, typer.Option(help="With --dabench, as in select.")]
Choices = Annotated[
    int, typer.Option("-n", "--n", min=1, max=32, help="With --agent or --dabench: calls.")
]
Download = Annotated[
    bool,
    typer.Option("--download", help="Fetch models that are not in --models DIR from the site."),
]
BaseModel = Annotated[str | None, typer.Option(help="Of files that do not tell, e.g. 'SD 1.5'.")]
Pictures = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[PICTURE...]",
        help="Pictures that tell their prompts, or folders of them. Without them: the stage "
        "'score' of the run that -c describes.",
    ),
]
Prompt = Annotated[str | None, typer.Option(help="Of pictures that do not tell theirs.")]
Safety = Annotated[bool, typer.Option("--safety", help="Check the pictures (extra 'safety').")]
URL = Annotated[str | None, typer.Option(help="Of the A1111 or ComfyUI server.")]
OptionalConfig = Annotated[
    Path | None,
    typer.Option("--config", "-c", metavar="FILE", help="YAML file of a run, for its settings."),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Gets index.html and the pictures.")]
Store = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Keeps what was drawn and scored; default runtime.store."),
]
Device = Annotated[str | None, typer.Option(help="'auto', 'cpu', 'cuda', 'mps'")]

_SHARED = frozenset({"prompts", "pictures", "config", "settings", "verbose"})
_OF_STAGES = frozenset({"refresh", "reconcile"})


def render(
    context: typer.Context,
    prompts: Prompts = None,
    *,
    models: Folders = None,
    model: Models = None,
    lora: LoRAs = None,
    negative_prompt: Annotated[str, typer.Option(help="For all prompts.")] = "",
    sampler: Annotated[str, typer.Option(help="As the WebUI calls it.")] = "DPM++ 2M Karras",
    steps: int = 25,
    cfg_scale: float = 7.0,
    width: Side = None,
    height: Side = None,
    clip_skip: int = 1,
    seed: Seeds = None,
    calls: Calls = None,
    agent: Agent = None,
    dabench: DABench = None,
    selector: AsInSelect = "combined",
    encoder: AsInSelect = "",
    n: Choices = 1,
    base_model: BaseModel = None,
    download: Download = False,
    out: Out = Path("pictures"),
    store: Store = None,
    score: Annotated[bool, typer.Option(help="Score the pictures.")] = True,
    safety: Safety = False,
    backend: Annotated[Backend | None, typer.Option(help="What draws.")] = None,
    url: URL = None,
    device: Device = None,
    config: OptionalConfig = None,
    settings: Overrides = None,
    refresh: Refresh = False,
    reconcile: Reconcile = False,
    verbose: Verbose = 0,
) -> None:
    """Render a file of prompts, score the pictures, and write a contact sheet.

    diffagent render prompts.txt --models ~/models --model dreamshaper
    """
    if _is_stage(context, prompts):
        return
    from diffagent.sheet.contact_sheet import check_output
    from diffagent.sheet.prompts_file import holds_calls, selected_rows

    keep_freed_memory()
    changes: dict[str, Any] = {
        "render.seeds": seed,
        "render.safety": "flag" if safety else None,
        "render.backend": backend and backend.value,
        "runtime.render_url": url,
        "runtime.device": device,
        "runtime.store": store,
        "runtime.model_folders": [str(folder) for folder in models] if models else None,
    }
    run = _config(config, settings, changes)
    check_output(out)
    assert prompts is not None
    lines, called = _read(prompts), _read(calls) if calls else None
    named = _models(agent or dabench, run, base_model, only_here=bool(models) and not download)
    entries = named.entries
    if called is not None or holds_calls(lines, prompts.name):
        rows, entries = _called(prompts, lines, calls, called, entries)
    elif agent or (dabench and not model):
        chooser = _open_selector(run, named.usable, agent, dabench, selector, encoder)
        rows = selected_rows(lines, chooser, _source(agent, dabench, selector), n)
    else:
        given = {name: context.params[name] for name in _PARAMETERS}
        rows = _named(lines, model, {**given, "loras": tuple(lora or ())}, entries)
    _make(rows, entries, run, out, prompts.name, score=score)


_PARAMETERS = (
    *("sampler", "steps", "cfg_scale", "width", "height", "clip_skip", "negative_prompt"),
)


def score(
    context: typer.Context,
    pictures: Pictures = None,
    *,
    prompt: Prompt = None,
    out: Out = Path("scores"),
    store: Store = None,
    device: Device = None,
    config: OptionalConfig = None,
    settings: Overrides = None,
    refresh: Refresh = False,
    reconcile: Reconcile = False,
    verbose: Verbose = 0,
) -> None:
    """Score pictures against their prompts, and write a contact sheet."""
    if _is_stage(context, pictures):
        return
    from diffagent.sheet.contact_sheet import check_output

    keep_freed_memory()
    check_output(out)
    changes = {"runtime.device": device, "runtime.store": store}
    _score_files(pictures or [], prompt, _config(config, settings, changes), out)


def _is_stage(context: typer.Context, files: object) -> bool:
    """Run the stage of a run when there is no file; returns whether it was one.

    Raises:
        ConfigError: neither a file nor a run, or options of the one with the other.
    """
    from diffagent.errors import ConfigError

    name = str(context.info_name)
    given = {
        option
        for option in context.params
        if getattr(context.get_parameter_source(option), "name", "") == "COMMANDLINE"
    }
    if not files and "config" not in given:
        raise ConfigError(f"{name} needs a file, or -c FILE for the stage of a run; see --help")
    wrong = given & _OF_STAGES if files else given - _SHARED - _OF_STAGES
    if wrong:
        told = ", ".join(f"--{option.replace('_', '-')}" for option in sorted(wrong))
        what = "the stage of a run, without a file" if files else "a file, which is not given"
        raise ConfigError(f"{told}: only for {what}")
    if files:
        return False
    from diffagent.cli.main import run_stage

    values = context.params
    run_stage(values["config"], values["settings"], name, values["refresh"], values["reconcile"])
    return True


def _config(
    file: Path | None, settings: list[str] | None, changes: dict[str, Any]
) -> PipelineConfig:
    """The settings of a run's file or the released scorers, and what the command line says."""
    from diffagent.schemas.config import configure, load_config

    overrides = {key: value for key, value in changes.items() if value is not None}
    overrides |= parse_overrides(settings)
    overrides.setdefault("render.max_failed_fraction", 1.0)  # a sheet of the others is worth it
    if file:
        return load_config(file, overrides)
    data = {"rewards": deepcopy(_REWARDS), "render": {"max_pixels": _MAX_PIXELS}}
    return configure(data, overrides, "the command line")


def _read(path: Path) -> list[str]:
    from diffagent.errors import ConfigError
    from diffagent.sheet.prompts_file import read_lines

    stdin = str(path) == "-"
    name = "standard input" if stdin else repr(str(path))
    try:
        data = sys.stdin.buffer.read() if stdin else path.read_bytes()
        wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as PowerShell writes text
        return read_lines(data.decode("utf-16" if wide else "utf-8-sig"), name)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {name:.200} as UTF-8 text: {why}") from None


@dataclass(frozen=True)
class _Models:
    """The models that names may mean.

    Attributes:
        entries: of a catalogue, then the folders' files that it does not have.
        here: SHA256 of the folders' files; None: a model that is not there is fetched.
    """

    entries: list[Entry]
    here: frozenset[str | None] | None

    @property
    def usable(self) -> frozenset[tuple[str, str]] | None:
        """(model, version) of what may be chosen; None: anything."""
        if self.here is None:
            return None
        return frozenset((e.model, e.version) for e in self.entries if e.sha256 in self.here)


def _models(
    source: Path | None, run: PipelineConfig, base_model: str | None, *, only_here: bool
) -> _Models:
    """Collect the models that names may mean in a command.

    Args:
        source: directory of an agent or a DABench, whose catalogue counts first.
        run: names the folders.
        base_model: of files that do not state theirs.
        only_here: entries of the catalogue whose file is in no folder lose their address on the
            site, so that nothing is fetched.
    """
    from diffagent.errors import ConfigError
    from diffagent.sheet.prompts_file import folder_entries
    from diffagent.t2i.catalogue import Catalogue

    entries = list(Catalogue.load(source).entries) if source else []
    folders = [Path(folder) for folder in run.runtime.model_folders]
    if not entries and not folders:
        raise ConfigError("render needs --models DIR, or --agent DIR or --dabench DIR")
    if not folders:
        return _Models(entries, None)
    index = run.runtime.models_directory / "folders.json"
    hashes = {entry.sha256 for entry in entries}
    files = folder_entries(folders, index, base_model, hashes)
    here = frozenset(entry.sha256 for entry in files)
    if only_here:
        entries = [e if e.sha256 in here else replace(e, download_path="") for e in entries]
    entries += [entry for entry in files if entry.sha256 not in hashes]
    return _Models(entries, here if only_here else None)


def _called(
    prompts: Path,
    lines: list[str],
    calls: Path | None,
    called: list[str] | None,
    entries: list[Entry],
) -> tuple[list[CandidateRow], list[Entry]]:
    from diffagent.sheet.prompts_file import call_rows

    if called is None:
        return call_rows(lines, str(prompts), None, entries)
    return call_rows(called, str(calls), lines, entries)


def _open_selector(  # noqa: PLR0917
    run: PipelineConfig,
    usable: frozenset[tuple[str, str]] | None,
    agent: Path | None,
    dabench: Path | None,
    selector: str,
    encoder: str,
) -> Selector:
    from diffagent.agent.opening import open_selector

    return open_selector(
        agent,
        dabench,
        selector,
        encoder=encoder,
        store=run.runtime.store,
        device=run.runtime.device,
        usable=usable,
    )


def _source(agent: Path | None, dabench: Path | None, selector: str) -> str:
    """The name under which the choices are listed."""
    return "reranked" if agent and dabench else "agent" if agent else selector


def _named(
    lines: list[str], model: list[str] | None, parameters: dict[str, Any], entries: list[Entry]
) -> list[CandidateRow]:
    from diffagent.errors import ConfigError
    from diffagent.sheet.prompts_file import Parameters, prompt_rows

    names = [entry.model for entry in entries if entry.is_checkpoint]
    if not model and len(names) != 1:
        told = ", ".join(map(repr, sorted(names)[:10]))
        raise ConfigError(f"there are {len(names)} checkpoints; choose with --model: {told}")
    return prompt_rows(lines, model or names, Parameters(**parameters), entries)


def _make(
    rows: list[CandidateRow],
    entries: list[Entry],
    run: PipelineConfig,
    out: Path,
    title: str,
    *,
    score: bool,
) -> None:
    """Draw the rows, write the sheet, score, and write it again; exit code 1 if one failed."""
    from diffagent.errors import CivitaiError
    from diffagent.rewards import score_stage

    try:
        renders = _draw(rows, entries, run)
    except CivitaiError as error:
        if not error.retryable:
            raise
        # Pictures that need no download are drawn; the same command fetches the rest later.
        log.warning("%s; the pictures of models that are not here yet fail", error)
        renders = _draw(rows, [replace(entry, download_path="") for entry in entries], run)
    apis = {(row.prompt_id, row.source, row.candidate): row.api for row in rows if row.api}
    missing = _sheet(out, title, renders, apis)
    total = renders.manifest.rows["renders.parquet"]
    if score and missing < total:
        scores = score_stage.score.run(run.rewards, {"renders": [renders]}, run.runtime)
        missing = _sheet(out, title, renders, apis, scores)
    _end(missing, total, out)


def _end(missing: int, total: int, out: Path) -> None:
    """Exit with code 1, and say where the reasons are, when pictures are missing."""
    if missing:
        typer.echo(
            f"error: {missing} of {total} pictures failed; {out / 'index.html'} shows why, and "
            "results.jsonl beside it",
            err=True,
        )
        raise typer.Exit(1)


def _draw(rows: list[CandidateRow], entries: list[Entry], run: PipelineConfig) -> Artifact:
    """The pictures of rows, with the models that ``entries`` says where to find."""
    from diffagent.pipeline import open_site
    from diffagent.render import render_stage
    from diffagent.sheet import prompts_file

    source = prompts_file.prompts.run(prompts_file.prompts_config(rows, entries), {}, run.runtime)
    with open_site(run) as site_url:
        return render_stage.render.run(
            run.render,
            {"candidates": [source], "dabench": [source]},
            run.runtime,
            site_url=site_url,
        )


def _sheet(
    out: Path,
    title: str,
    renders: Artifact,
    apis: dict[tuple[int, str, int], str],
    scores: Artifact | None = None,
) -> int:
    """Write OUT; returns how many rows have no picture."""
    from diffagent.sheet.contact_sheet import write_contact_sheet, write_results
    from diffagent.sheet.sheet_rows import copy_pictures, sheet_cards, sheet_facts

    cards = sheet_cards(renders, apis, scores)
    out.mkdir(parents=True, exist_ok=True)
    copy_pictures(cards, out)
    write_contact_sheet(out / "index.html", title, cards, sheet_facts(renders, scores))
    write_results(out / "results.jsonl", cards)
    failed = sum(card.picture is None for card in cards)
    told = "scored" if scores else "drawn"
    typer.echo(f"{len(cards) - failed} of {len(cards)} pictures {told}: {out / 'index.html'}")
    return failed


def _score_files(pictures: list[Path], prompt: str | None, run: PipelineConfig, out: Path) -> None:
    from diffagent.errors import ConfigError
    from diffagent.rewards import score_stage
    from diffagent.schemas.tables import RENDER_TABLE
    from diffagent.sheet import sheet_rows
    from diffagent.sheet.prompts_file import pictures_in

    paths = list(pictures_in(pictures))
    if any(path.resolve().parent == out.resolve() for path in paths):
        raise ConfigError(f"--out {str(out)!r} holds the pictures themselves; give another folder")
    config, apis = sheet_rows.pictures_config(paths, prompt)
    renders = sheet_rows.pictures.run(config, {}, run.runtime)
    statuses = [row.status for row in RENDER_TABLE.read(renders.file("renders.parquet"))]
    scores = None
    if "ok" in statuses:  # else there is nothing to load a scorer for
        scores = score_stage.score.run(run.rewards, {"renders": [renders]}, run.runtime)
    _end(_sheet(out, "Scores", renders, apis, scores), len(statuses), out)
