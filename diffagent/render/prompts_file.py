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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from diffagent.agent.candidates import Row, write_candidates
from diffagent.agent.selector import Selector
from diffagent.artifacts import StageContext, StageResult, stage
from diffagent.civitai.sources import synthetic_id
from diffagent.civitai.sources.local import Hashes, look, model_files
from diffagent.dabench.catalogue import (
    CHECKPOINT,
    EMBEDDING,
    LORA_TYPES,
    Catalogue,
    Entry,
    unique_names,
)
from diffagent.dabench.metadata.prompts import split_prompt
from diffagent.errors import ConfigError
from schemas.api import T2IAPI, ApiError, LoRA, Params, parse_api

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
    folders: Iterable[Path], hashes: Path, base_model: str | None = None
) -> list[Entry]:
    """The model files of folders as rows of a catalogue; those that are refused are told.

    Args:
        folders: of model files at any depth, or installations of A1111 or ComfyUI.
        hashes: file that keeps their hashes for the next time.
        base_model: of files whose tensors and notes do not tell.

    Raises:
        ConfigError: there is no usable model file.
    """
    known = Hashes(hashes)
    found: dict[str, Entry] = {}
    for folder in folders:
        for path in model_files(folder):
            file = look(path, known)
            kind = file.architecture.type
            if file.refused:
                log.warning("%s is left out: %s", path, file.refused)
            if file.refused or kind not in (CHECKPOINT, EMBEDDING, *LORA_TYPES):
                continue
            base = file.architecture.base_model or base_model
            if base is None:
                log.warning("%s: nobody knows its base model; say --base-model", path)
            found.setdefault(file.sha256, _local_entry(path, file.sha256, kind, base or "Other"))
    known.save()
    if not any(entry.is_checkpoint for entry in found.values()):
        raise ConfigError(
            f"{', '.join(map(str, folders))}: no checkpoint in safetensors at any depth; see "
            "-v for the files that were left out"
        )
    names = unique_names({entry.version_id: entry.model for entry in found.values()})
    return [replace(entry, model=names[entry.version_id]) for entry in found.values()]


def _local_entry(path: Path, sha256: str, kind: str, base_model: str) -> Entry:
    ident = synthetic_id(sha256)
    return Entry(
        model=path.stem[:270],
        version=LOCAL_VERSION,
        type=kind,
        base_model=base_model,
        model_id=ident,
        version_id=ident,
        air="",
        file_name=path.name,
        file_id=None,
        size_bytes=path.stat().st_size,
        sha256=sha256,
        download_path="",
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
    """The lines that are not blank.

    Raises:
        ConfigError: there are none.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"{name} holds no line")
    return lines


def prompt_rows(
    lines: Sequence[str], models: Sequence[str], parameters: Parameters, entries: Sequence[Entry]
) -> list[Row]:
    """Every prompt with every model.

    Args:
        lines: prompts; ``<lora:NAME:WEIGHT>`` in one lays that LoRA over.
        models: names of checkpoints, see `find_entry`.
        parameters: how they are drawn.
        entries: what the names mean.

    Raises:
        ConfigError: a model is not there, or a parameter is out of range.
    """
    checkpoints = [find_entry(entries, name, (CHECKPOINT,)) for name in models]
    rows = []
    for number, line in enumerate(lines, 1):
        split = split_prompt(line)
        tags = [f"{use.name}:{use.weight}" for use in split.loras]
        text = split.text if tags else line
        loras = tuple(_lora(tag, entries) for tag in (*parameters.loras, *tags))
        for candidate, entry in enumerate(checkpoints):
            api = _api(entry, loras, parameters)
            rows.append(_row(number, text, candidate, "prompts", api))
    return rows


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
) -> list[Row]:
    """API calls as they are printed by ``diffagent select``.

    Args:
        lines: JSON: an API, with ``prompt`` among its keys where ``given`` has none; or ``prompt``
            and ``api``; or ``error``, an answer that was none.
        name: of the file, for messages.
        given: the prompts that the lines answer, one by one.
        entries: what names mean that are not those of a catalogue: of files in a folder.

    Raises:
        ConfigError: a line is none of this, or the prompts are not as many.
    """
    if given is not None and len(given) != len(lines):
        raise ConfigError(
            f"{name} has {len(lines)} calls for {len(given)} prompts; give one call a prompt, or "
            "lines with the prompt in them"
        )
    numbers: dict[str, int] = {}
    counts: dict[int, int] = {}
    rows = []
    for i, line in enumerate(lines):
        where = f"{name}, line {i + 1}"
        found = _object(line, where)
        prompt = found.pop("prompt", None) if given is None else given[i]
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"{where} has no prompt; give the file of prompts as well")
        number = numbers.setdefault(prompt, len(numbers) + 1) if given is None else i + 1
        candidate = counts[number] = counts.get(number, -1) + 1
        if "error" in found:
            rows.append(_row(number, prompt, candidate, "calls", None, line))
            continue
        api = found.get("api", found)
        text = api if isinstance(api, str) else json.dumps(api, ensure_ascii=False)
        try:
            call = _known(parse_api(text), entries)
        except ApiError as error:
            raise ConfigError(f"{where} is no API call: {error}") from None
        rows.append(_row(number, prompt, candidate, "calls", call, line))
    return rows


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where} is no JSON object")
    return found


def _known(api: T2IAPI, entries: Sequence[Entry]) -> T2IAPI:
    """The call with the names of a folder's files, where no catalogue has its own.

    What nobody knows stays: its picture fails with that reason.
    """
    names = {(entry.model, entry.version) for entry in entries}

    def rename(name: str, version: str, kinds: Iterable[str]) -> dict[str, str]:
        if (name, version) in names:
            return {}
        try:
            entry = find_entry(entries, name, kinds)
        except ConfigError as error:
            log.warning("%s", error)
            return {}
        return {"model": entry.model, "version": entry.version}

    loras = (use.model_copy(update=rename(use.model, use.version, LORA_TYPES)) for use in api.loras)
    embeddings = (
        use.model_copy(update=rename(use.model, use.version, (EMBEDDING,)))
        for use in api.embeddings
    )
    update = rename(api.model, api.version, (CHECKPOINT,))
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


def pictures_in(paths: Iterable[Path]) -> Iterator[Path]:
    """Picture files, and those directly in folders, sorted."""
    for path in paths:
        if path.is_dir():
            yield from (p for p in sorted(path.iterdir()) if p.suffix.lower() in _PICTURES)
        elif path.is_file():
            yield path
        else:
            raise ConfigError(f"{str(path)!r} is not there")


_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
