"""From a file of prompts, or of API calls, to what the stage ``render`` draws.

Prompts are lines of text; with models and parameters they become API calls. Calls are lines of
JSON as ``diffagent select`` prints them, with the prompt among their keys or in a file of prompts
beside them. Models are those of a folder, named as people name them: by the file's name, a part of
it, or the beginning of its hash.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from diffagent.agent.candidates import Row, write_candidates
from diffagent.agent.selector import Selector
from diffagent.errors import ConfigError
from diffagent.localcivitai.sources import synthetic_id
from diffagent.localcivitai.sources.architecture import UNKNOWN
from diffagent.localcivitai.sources.local import LocalFile, record_of
from diffagent.render.files.folders import ModelFolders
from diffagent.render.recipe import UNKNOWN_BASE_MODEL
from diffagent.schemas.api import T2IAPI, ApiError, Embedding, LoRA, Params, parse_api
from diffagent.store import StageContext, StageResult, stage
from diffagent.t2i.catalogue import (
    CHECKPOINT,
    EMBEDDING,
    LORA_TYPES,
    SYNTHETIC,
    Catalogue,
    Entry,
    make_entry,
    unique_names,
)
from diffagent.t2i.metadata.prompt_tags import split_prompt

log = logging.getLogger(__name__)

#: Side of a picture in pixels that an architecture was trained for.
_SIDES = {"sd1": 512, "sd2": 768, "sdxl": 1024}
#: Version of the files of a folder, which have none.
LOCAL_VERSION = "local"
_SHORTEST_HASH = 6


@dataclass(frozen=True)
class Parameters:
    """How prompts are drawn; a size that is None is the architecture's own."""

    sampler: str = "DPM++ 2M Karras"
    steps: int = 25
    cfg_scale: float = 7.0
    width: int | None = None
    height: int | None = None
    clip_skip: int = 1
    negative_prompt: str = ""
    loras: tuple[str, ...] = ()


class PromptsConfig(BaseModel):
    """What the stage ``prompts`` takes: rows of CANDIDATES and the models that they name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidates: tuple[dict[str, Any], ...]
    models: tuple[dict[str, Any], ...]


@stage("prompts", version=1, config=PromptsConfig)
def prompts(config: PromptsConfig, context: StageContext) -> StageResult:
    """Write candidates.parquet and catalogue.parquet: both inputs of the stage ``render``."""
    write_candidates(config.candidates, context.out)
    entries = (_entry(model) for model in config.models)
    pq.write_table(Catalogue(entries).to_table(), context.out / "catalogue.parquet")
    return StageResult(rows={"candidates.parquet": len(config.candidates)})


def _entry(model: Mapping[str, Any]) -> Entry:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}
    return Entry(**values)


def prompts_config(rows: Sequence[Row], entries: Iterable[Entry]) -> PromptsConfig:
    """The stage's configuration, with those models alone that the rows name."""
    named = set()
    for row in rows:
        if row["api"]:
            api = parse_api(row["api"])
            named |= {(use.model, use.version) for use in (*api.loras, *api.embeddings)}
            named.add((api.model, api.version))
    used = [asdict(entry) for entry in entries if (entry.model, entry.version) in named]
    return PromptsConfig(candidates=tuple(rows), models=tuple(used))


# --- models -----------------------------------------------------------------------------------


def folder_entries(
    folders: Iterable[Path],
    hashes: Path,
    base_model: str | None = None,
    catalogued: Collection[str | None] = (),
) -> list[Entry]:
    """The model files of folders as rows of a catalogue, by their headers and sidecars.

    Args:
        folders: of model files at any depth, or installations of A1111 or ComfyUI.
        hashes: file that keeps their hashes for the next time.
        base_model: of files whose tensors, notes and sidecars do not state it.
        catalogued: SHA256 of files whose base model a catalogue states.

    Raises:
        ConfigError: there is no usable model file.
    """
    folders = tuple(folders)
    entries: dict[tuple[str, str], Entry] = {}
    refused, baseless = [], []
    for file in ModelFolders(folders, hashes).files():
        model, version = record_of(file)
        kinds = [model["type"]]
        if file.refused:
            refused.append(file)
            # A row that names it fails with the reason, whatever the file was meant to be.
            is_unknown = kinds == [UNKNOWN.type] and file.path.suffix.lower() == ".safetensors"
            kinds = [CHECKPOINT, "LORA"] if is_unknown else kinds
        is_stated = version.get("baseModel") or base_model or file.sha256 in catalogued
        if kinds[0] == CHECKPOINT and not (file.refused or is_stated):
            baseless.append(file.path)
        base = version.get("baseModel") or base_model or UNKNOWN_BASE_MODEL
        for kind in kinds:
            if kind in (CHECKPOINT, EMBEDDING, *LORA_TYPES) and not _is_pickle(file):
                entry = _local_entry(file, {**model, "type": kind}, version, base)
                entries.setdefault((file.sha256, kind), entry)
    if refused:
        log.warning(
            "%d of the files cannot be drawn with, such as %r: %s; `diffagent models scan` lists "
            "them",
            len(refused), str(refused[0].path), refused[0].refused,
        )  # fmt: skip
    if baseless:
        log.warning(
            "%d checkpoints do not state their base model, such as %r; --base-model gives it",
            len(baseless), str(baseless[0]),
        )  # fmt: skip
    if not any(entry.is_checkpoint for entry in entries.values()):
        raise ConfigError(
            f"{', '.join(map(str, folders))}: no checkpoint in safetensors at any depth; "
            "`diffagent models scan DIR` lists what is there"
        )
    names = unique_names({entry.version_id: entry.model for entry in entries.values()})
    return [replace(entry, model=names[entry.version_id]) for entry in entries.values()]


def _is_pickle(file: LocalFile) -> bool:
    return file.path.suffix.lower() != ".safetensors"


def _local_entry(
    file: LocalFile, model: Mapping[str, Any], version: Mapping[str, Any], base_model: str
) -> Entry:
    """A file under its own name, with what its record states."""
    ident = synthetic_id(file.sha256)
    is_guess = bool(file.refused) and model["type"] != file.architecture.type
    known = make_entry(model, {**version, "baseModel": base_model}, version["files"][0])
    return replace(
        known,
        model=file.path.stem[:270],
        version=f"{LOCAL_VERSION} {model['type']}" if is_guess else LOCAL_VERSION,
        model_id=ident,
        version_id=ident,
        air=known.air if known.version_id < SYNTHETIC else "",
        file_name=file.path.name,
        size_bytes=file.path.stat().st_size,
        sha256=file.sha256,
        download_path="",
        page=known.page if known.version_id < SYNTHETIC else "",
    )


def find_entry(entries: Iterable[Entry], name: str, kinds: Iterable[str]) -> Entry:
    """The one model that people mean by ``name``.

    Args:
        entries: of a catalogue.
        name: the model's, its file's with or without ending, the beginning of its SHA256 (six
            digits or more), or a part of its name that no other has.
        kinds: types that it may have.

    Raises:
        ConfigError: none, or more than one; the message names near ones.
    """
    wanted, kinds = name.casefold(), frozenset(kinds)
    able = [entry for entry in entries if entry.type in kinds]
    exact = [entry for entry in able if wanted in _spellings(entry)]
    hashed = [
        entry
        for entry in able
        if len(wanted) >= _SHORTEST_HASH and (entry.sha256 or "").startswith(wanted)
    ]
    partial = [entry for entry in able if wanted in entry.model.casefold()]
    for found in (exact, hashed, partial):
        if len(found) == 1:
            return found[0]
        if found:
            told = ", ".join(repr(entry.model) for entry in found[:5])
            raise ConfigError(f"{name!r} may be {told}; give one of these names")
    names = [entry.model for entry in able]
    near = difflib.get_close_matches(name, names, 5, 0.4) or sorted(names)[:5]
    told = ", ".join(map(repr, near)) or "there is none"
    raise ConfigError(f"no {' or '.join(sorted(kinds))} is called {name!r}; near: {told}")


def _spellings(entry: Entry) -> set[str]:
    file = entry.file_name.casefold()
    return {entry.model.casefold(), file, file.rpartition(".")[0]} - {""}


# --- rows -------------------------------------------------------------------------------------


def read_lines(text: str, name: str) -> list[str]:
    """The lines that are not blank; LF, CR LF or CR ends one (U+2028 is part of a prompt).

    Raises:
        ConfigError: there are none.
    """
    lines = [line.strip() for line in re.split(r"\r\n?|\n", text) if line.strip()]
    if not lines:
        raise ConfigError(f"{name} holds no line; write a prompt a line")
    return lines


def holds_calls(lines: Sequence[str], name: str) -> bool:
    """Whether lines are API calls as JSON, not prompts such as '{red|blue} star'.

    Args:
        lines: of a file.
        name: of the file; one that ends in '.jsonl' holds JSON whatever its lines are. Else the
            first line is a JSON object, or all lines begin like one.
    """
    if name.lower().endswith((".jsonl", ".ndjson")):
        return True
    if not _JSON_KEY.match(lines[0]):
        return False
    return _is_object(lines[0]) or all(map(_JSON_KEY.match, lines))


def _is_object(line: str) -> bool:
    try:
        return bool(_object(line, ""))
    except ConfigError:
        return False


#: How a JSON object with a key begins, or an empty one.
_JSON_KEY = re.compile(r'\{\s*(?:"[^"]*"\s*:|\}$)')


def prompt_rows(
    lines: Sequence[str], models: Sequence[str], parameters: Parameters, entries: Sequence[Entry]
) -> list[Row]:
    """Every prompt with every model.

    Args:
        lines: prompts; ``<lora:NAME:WEIGHT>`` in one lays that LoRA over.
        models: names of checkpoints, see `find_entry`.
        parameters: how they are drawn.
        entries: what the names mean.

    Returns:
        The rows; those of a prompt whose own tags mean no LoRA are invalid and state why.

    Raises:
        ConfigError: a model or a LoRA for all prompts is not there, a parameter is out of range,
            or no prompt can be drawn.
    """
    checkpoints = [find_entry(entries, name, (CHECKPOINT,)) for name in models]
    shared = tuple(_lora(tag, entries) for tag in parameters.loras)
    rows = []
    for number, line in enumerate(lines, 1):
        split = split_prompt(line)
        tags = [f"{use.name}:{use.weight}" for use in split.loras]
        text = split.text if tags else line
        for candidate, entry in enumerate(checkpoints):
            row = _row(number, text, candidate, "prompts", _api(entry, shared, parameters))
            try:
                if not split.weights_known:
                    raise ConfigError("the weight of a LoRA in the prompt is no number")
                loras = (*shared, *(_lora(tag, entries) for tag in tags))
                row = _row(number, text, candidate, "prompts", _api(entry, loras, parameters))
            except ConfigError as error:
                row = _refused(row, f"prompt {number}: {error}")
            rows.append(row)
    return _some(rows)


def _lora(tag: str, entries: Sequence[Entry]) -> LoRA:
    """``NAME`` or ``NAME:WEIGHT``"""
    name, colon, weight = tag.rpartition(":")
    try:
        strength = float(weight.replace(",", ".")) if colon else 1.0  # 0,6 is 0.6
    except ValueError:
        name, strength = tag, 1.0
    entry = find_entry(entries, name if colon else tag, LORA_TYPES)
    try:
        return LoRA(model=entry.model, version=entry.version, weight=strength)
    except ValidationError as error:
        raise ConfigError(f"LoRA {tag!r}: {error.errors()[0]['msg']}") from None


def _api(entry: Entry, loras: tuple[LoRA, ...], parameters: Parameters) -> T2IAPI:
    side = _SIDES.get(entry.ecosystem, 512)
    try:
        return T2IAPI(
            model=entry.model,
            version=entry.version,
            base_model=entry.base_model,
            loras=loras,
            params=Params(
                sampler=parameters.sampler,
                steps=parameters.steps,
                cfg_scale=parameters.cfg_scale,
                width=parameters.width or side,
                height=parameters.height or side,
                clip_skip=parameters.clip_skip,
            ),
            negative_prompt=parameters.negative_prompt,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {first['msg']} (got {first['input']!r:.80})") from None


def call_rows(
    lines: Sequence[str], name: str, given: Sequence[str] | None, entries: Sequence[Entry]
) -> tuple[list[Row], list[Entry]]:
    """API calls as they are printed by ``diffagent select``.

    Args:
        lines: JSON: an API, with ``prompt`` among its keys where ``given`` has none, and
            ``hashes`` (see `call_line`) where it is known; or ``prompt`` and ``api``; or
            ``error``, an answer that was none.
        name: of the file, for messages.
        given: the prompts that the lines answer, one by one.
        entries: what names mean: of a catalogue, or of files in a folder.

    Returns:
        The rows, and ``entries`` with the base model of calls where a file states none.

        A line that is no API call, or has no prompt, is an invalid row that states why.

    Raises:
        ConfigError: no line is an API call with a prompt, or the prompts are not as many.
    """
    if given is not None and len(given) != len(lines):
        raise ConfigError(
            f"{name} has {len(lines)} calls for {len(given)} prompts; give one call a prompt, or "
            "lines with the prompt in them"
        )
    numbers: dict[str, int] = {}
    counts: dict[int, int] = {}
    rows = []
    catalogue = list(entries)
    for i, line in enumerate(lines):
        where, call, problem = f"{name}, line {i + 1}", {}, ""
        try:
            call = _object(line, where)
        except ConfigError as error:
            problem = str(error)
        stated, hashes = call.pop("prompt", None), call.pop("hashes", None)
        prompt = stated if given is None else given[i]
        if not isinstance(prompt, str) or not prompt:
            problem = problem or f"{where} has no prompt; give the file of prompts as well"
            prompt = line
        number = numbers.setdefault(prompt, len(numbers) + 1) if given is None else i + 1
        candidate = counts[number] = counts.get(number, -1) + 1
        row = _row(number, prompt, candidate, "calls", None, line)
        if problem:
            row = _refused(row, problem)
        elif "error" not in call:
            api = call.get("api", call)
            text = api if isinstance(api, str) else json.dumps(api, ensure_ascii=False)
            try:
                named = _named_here(parse_api(text), catalogue, hashes)
                row = _row(number, prompt, candidate, "calls", named, line)
            except ApiError as error:
                row = _refused(row, f"{where} is no API call: {error}")
        rows.append(row)
    return _some(rows), catalogue


def _object(line: str, where: str) -> dict[str, Any]:
    """The JSON object of a line. U+FFFD stands for lone surrogates, which no file can hold."""
    try:
        found = json.loads(line)
        text = json.dumps(found, ensure_ascii=False)
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        found = json.loads(whole)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is no JSON object")
    return found


def _named_here(api: T2IAPI, entries: list[Entry], hashes: Any) -> T2IAPI:
    """The call with the names that ``entries`` have for its models.

    A file is known by its hash where the line has one, then by the catalogue's name, then as
    people name files. What is not known stays: its picture fails with that reason.

    Args:
        api: as it was read.
        entries: of a catalogue, or of a folder's files; one that a hash names and that states no
            base model gets the call's.
        hashes: 'model', 'lora:NAME', 'embed:NAME' -> SHA256, as `call_line` writes them; anything
            else is ignored.
    """
    names = {(entry.model, entry.version) for entry in entries}
    places = {entry.sha256: place for place, entry in enumerate(entries) if entry.sha256}
    digests = hashes if isinstance(hashes, dict) else {}

    def rename(key: str, use: T2IAPI | LoRA | Embedding, kinds: Iterable[str]) -> dict[str, str]:
        entry = None
        if (place := places.get(str(digests.get(key)).lower())) is not None:
            entry = entries[place]
            if entry.base_model == UNKNOWN_BASE_MODEL:
                entries[place] = replace(entry, base_model=api.base_model)
        elif (use.model, use.version) not in names:
            try:
                entry = find_entry(entries, use.model, kinds)
            except ConfigError as error:
                log.warning("%s", error)
        return {"model": entry.model, "version": entry.version} if entry else {}

    loras = (
        use.model_copy(update=rename(f"lora:{use.model}", use, LORA_TYPES)) for use in api.loras
    )
    embeddings = (
        use.model_copy(update=rename(f"embed:{use.model}", use, (EMBEDDING,)))
        for use in api.embeddings
    )
    update = rename("model", api, (CHECKPOINT,))
    return api.model_copy(update={**update, "loras": tuple(loras), "embeddings": tuple(embeddings)})


def selected_rows(lines: Sequence[str], selector: Selector, source: str, n: int) -> list[Row]:
    """The answers of an agent, or of what was fitted on a DABench, to every prompt."""
    return [
        {
            **_row(number, line, candidate, source, choice.verdict.api, choice.text),
            "reason": choice.verdict.reason,
            "logprob": choice.logprob,
        }
        for number, (line, choices) in enumerate(
            zip(lines, selector.select(lines, n), strict=True), 1
        )
        for candidate, choice in enumerate(choices)
    ]


def _row(  # noqa: PLR0917  the columns in their order
    number: int, prompt: str, candidate: int, source: str, api: T2IAPI | None, text: str = ""
) -> Row:
    written = api.to_json() if api else None
    return {
        "prompt_id": number,
        "prompt": prompt,
        "candidate": candidate,
        "source": source,
        "text": text or written or "",
        "api": written,
        "status": "valid" if api else "invalid",
        "reason": None if api else "no-answer",
        "logprob": None,
    }


def _refused(row: Row, problem: str) -> Row:
    """A row that cannot be drawn, with the reason in one line."""
    problem = f"{' '.join(problem.split()):.500}"
    log.warning("%s", problem)
    return {**row, "api": None, "status": "invalid", "reason": problem}


def _some(rows: list[Row]) -> list[Row]:
    """The rows, if any of them can be drawn or is an answer that was none.

    Raises:
        ConfigError: the reason of the first, where all are refused.
    """
    if all(row["reason"] not in (None, "no-answer") for row in rows):
        raise ConfigError(str(rows[0]["reason"]))
    return rows


def pictures_in(paths: Iterable[Path]) -> Iterator[Path]:
    """Picture files, and those directly in folders, sorted.

    A name in a folder that is no file that can be opened is left out with a warning.
    """
    for path in paths:
        if path.is_dir():
            for item in sorted(path.iterdir()):
                if item.suffix.lower() in _PICTURES and _opens(item):
                    yield item
        elif path.is_file():
            yield path
        else:
            raise ConfigError(f"{str(path)!r} is not there")


def _opens(path: Path) -> bool:
    try:
        with path.open("rb"):
            return True
    except OSError as error:  # a link to nothing, a directory, no permission
        log.warning("%r is left out: %s", str(path), error.strerror)
        return False


_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif"})
