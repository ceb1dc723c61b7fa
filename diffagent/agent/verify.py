"""Is an answer an API that exists? The verdict on one text against the catalogue.

An answer that names what is not in the catalogue, or does not parse, is a hallucination; the
kinds below are what the evaluation counts. As in Gorilla, a wrong but existing model is no
hallucination. The first kind that applies is reported, in the order of ``KINDS``.

An answer that was cut before its end is ``TRUNCATED``: invalid, but not a hallucination.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffagent.schemas.api import T2IAPI, ApiError, parse_api
from diffagent.schemas.tables import TRUNCATED

if TYPE_CHECKING:
    from diffagent.t2i.catalogue import Catalogue, Entry

#: Kind of hallucination -> what it means.
KINDS = {
    "unparsable": "the text is not JSON",
    "schema": "a field is missing, unknown or of the wrong type",
    "param_out_of_range": "a number is outside the bounds of the API record",
    "wrong_type": "the model is not a checkpoint, or a LoRA or embedding is something else",
    "unknown_model": "no model of this name in the catalogue",
    "unknown_version": "the model has no version of this name",
    "wrong_base_model": "the version belongs to another base model",
    "unknown_lora": "no LoRA of this name and version in the catalogue",
    "incompatible_lora": "the LoRA was made for another base model",
    "unknown_embedding": "no embedding of this name and version in the catalogue",
    "incompatible_embedding": "the embedding was made for another base model",
    "unknown_sampler": "the sampler is not in the mapping dictionary",
    "wrong_air": "the stated AIR is not that of the model and version",
}

#: A suffix that may follow an AIR's version.
_FILE_OF_AIR = re.compile(r"(?:\+[0-9]+|:[a-z0-9_-]+|\.[a-z0-9_-]+)*")


@dataclass(frozen=True)
class Verdict:
    """What an answer turned out to be.

    Attributes:
        api: when valid, the full record: air and description come from the catalogue.
        status: 'valid' or 'invalid'.
        reason: when invalid, a key of ``KINDS``, or ``TRUNCATED``.
        detail: when invalid, the sentence for people, naming field and value.
    """

    api: T2IAPI | None
    status: Literal["valid", "invalid"]
    reason: str | None = None
    detail: str = ""


def verify(text: str, catalogue: Catalogue, *, ended: bool = True) -> Verdict:
    """Judge one answer. Never raises: every text has a verdict.

    Args:
        text: the answer.
        catalogue: what exists.
        ended: False when generation was stopped before the answer's end.
    """
    try:
        api = parse_api(text)
    except ApiError as error:
        if error.code == "json" and not ended and is_json_beginning(text):
            return _invalid(TRUNCATED, f"the answer was cut after {len(text)} characters")
        return _invalid(_kind_of(error), str(error))
    entry = catalogue.checkpoint(api.model, api.version)
    if entry is None:
        return _missing_checkpoint(api, catalogue)
    if api.base_model != entry.base_model:
        return _invalid(
            "wrong_base_model",
            f"base_model: {api.model!r} {api.version!r} is {entry.base_model!r}, "
            f"not {api.base_model!r}",
        )
    if (fault := _check_networks(api, entry, catalogue)) is not None:
        return fault
    if api.params.sampler not in catalogue.samplers:
        return _invalid("unknown_sampler", f"params.sampler: {api.params.sampler!r} is not known")
    if api.air is not None and not _same_air(api.air, entry.air):
        return _invalid("wrong_air", f"air: {api.air!r} is not {entry.air!r}")
    full = {"air": entry.air, "description": entry.description[:500] or None}
    return Verdict(api.model_copy(update=full), "valid")


def is_json_beginning(text: str) -> bool:
    """Whether ``text`` could go on to a JSON object: it is sound up to its end."""
    if not text.lstrip().startswith("{"):
        return not text.strip()
    try:
        json.loads(text)
    except RecursionError:
        return True
    except json.JSONDecodeError as error:
        # The parser stops at the end, at a string without an end, or at the last token: a number
        # ("1e"), a literal ("tru") or an escape ("\u26") of which a part is missing.
        open_string = error.msg.startswith("Unterminated string")
        return open_string or (error.msg != "Extra data" and error.pos >= len(text) - 6)
    except ValueError:  # an integer of more digits than Python converts
        return False
    return False


def _same_air(stated: str, air: str) -> bool:
    """Equal but for case and for what names the file: ``+FILE_ID``, ``:LAYER``, ``.FORMAT``."""
    stated, air = stated.lower(), air.lower()
    return stated.startswith(air) and _FILE_OF_AIR.fullmatch(stated, len(air)) is not None


def _kind_of(error: ApiError) -> str:
    if error.code == "json":
        return "unparsable"
    if error.code in {"greater_than", "greater_than_equal", "less_than", "less_than_equal"} or (
        error.code == "multiple_of"
    ):
        return "param_out_of_range"
    return "wrong_type" if error.field == "type" and error.code == "literal_error" else "schema"


def _missing_checkpoint(api: T2IAPI, catalogue: Catalogue) -> Verdict:
    if (entry := catalogue.entry(api.model, api.version)) is not None:
        return _invalid("wrong_type", f"model: {api.model!r} is a {entry.type}, not a Checkpoint")
    if catalogue.has_model(api.model):
        return _invalid(
            "unknown_version", f"version: {api.model!r} has no checkpoint {api.version!r}"
        )
    return _invalid("unknown_model", f"model: {api.model!r} is not in the catalogue")


def _check_networks(api: T2IAPI, checkpoint: Entry, catalogue: Catalogue) -> Verdict | None:
    for kind, networks, find in (
        ("lora", api.loras, catalogue.lora),
        ("embedding", api.embeddings, catalogue.embedding),
    ):
        for position, network in enumerate(networks):
            where = f"{kind}s.{position}: {network.model!r} {network.version!r}"
            found = find(network.model, network.version)
            if found is None:
                other = catalogue.entry(network.model, network.version)
                if other is not None:
                    return _invalid("wrong_type", f"{where} is a {other.type}, which is no {kind}")
                return _invalid(f"unknown_{kind}", f"{where} is not in the catalogue")
            if found.ecosystem != checkpoint.ecosystem:
                return _invalid(
                    f"incompatible_{kind}",
                    f"{where} is for {found.base_model!r}, not {checkpoint.base_model!r}",
                )
    return None


def _invalid(reason: str, detail: str) -> Verdict:
    return Verdict(None, "invalid", reason, detail)
