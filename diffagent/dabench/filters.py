"""The four filters of the source, and the stage that applies them and the record-level ones.

The paper's figure 2 shows the source by model type, base model architecture, NSFW content and
file availability: these are the filters, in this order. Each is a function of (model, version,
config) that returns its reason, or None to let pass. A model is kept when one of its versions
is; else it is dropped for the reason of the version that came furthest.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import orjson

from diffagent.artifacts import StageContext, StageResult, stage
from diffagent.dabench.catalogue import (
    CHECKPOINT,
    Catalogue,
    Entry,
    choose_file,
    describe,
    make_entry,
    rename,
)
from diffagent.dabench.funnel import FunnelCounter
from diffagent.dabench.records import RECORD_FILTERS, Dropped, PairBuilder
from diffagent.dabench.resolve import Lookup, Resolver
from diffagent.dabench.snapshot import read_gone, read_items
from diffagent.dabench.splits import shingles
from diffagent.dabench.tables import table_writer, write_table
from diffagent.errors import ArtifactError
from schemas.config import FilterConfig
from schemas.dabench import PRINTS, RECORDS

log = logging.getLogger(__name__)

GONE = "gone from the site"
_FORMS = {"inpaint": "Inpainting", "pix2pix": "Pix2Pix"}

Payload = Mapping[str, Any]
ModelFilter = Callable[[Payload, Payload, FilterConfig], str | None]


def model_type(model: Payload, version: Payload, config: FilterConfig) -> str | None:
    """Checkpoints, and what is laid over them."""
    kind = model.get("type")
    return None if kind in config.model_types else _label(kind)


def base_model(model: Payload, version: Payload, config: FilterConfig) -> str | None:
    """Architectures that are wanted, in their text-to-image form."""
    name = version.get("baseModel")
    if name not in config.base_models:
        return _label(name)
    form = version.get("baseModelType")
    if form in (None, "Standard"):
        form = _form_by_name(model, version)
    return f"{name} {_label(form)}" if form else None


def _form_by_name(model: Payload, version: Payload) -> str | None:
    """A checkpoint for inpainting says so in its names; "Standard" is only the site's default."""
    if model.get("type") != CHECKPOINT:
        return None
    files = [f.get("name") for f in _items(version.get("files")) if isinstance(f, dict)]
    names = " ".join(str(name) for name in [version.get("name"), *files])
    found = re.search(r"inpaint|pix2pix", names, re.IGNORECASE)
    return _FORMS[found.group().lower()] if found else None


def nsfw(model: Payload, version: Payload, config: FilterConfig) -> str | None:
    """The model's own flags. Its nsfwLevel is the union over its pictures, so no evidence."""
    if _true(model.get("minor")):
        return "minor"
    if _true(model.get("poi")) and not config.allow_real_persons:
        return "real person"
    return "nsfw" if _true(model.get("nsfw")) and not config.allow_nsfw else None


def file_availability(model: Payload, version: Payload, config: FilterConfig) -> str | None:
    """A scanned safetensors file that anyone may download."""
    mode = model.get("mode")
    if mode:
        return {"Archived": "archived", "TakenDown": "taken down"}.get(str(mode), "other mode")
    for payload in (model, version):
        if payload.get("availability") not in (None, "Public"):
            return f"availability {_label(payload['availability'])}"
    if version.get("status") not in (None, "Published"):
        return "not published"
    if version.get("usageControl") not in (None, "Download"):
        return "download not allowed"
    file, reason = choose_file(_items(version.get("files")), require_scans=config.require_scans)
    if file is None:
        return reason
    return None if file.get("downloadUrl") or version.get("downloadUrl") else "no download address"


MODEL_FILTERS: tuple[tuple[str, ModelFilter], ...] = (
    ("model_type", model_type),
    ("base_model", base_model),
    ("nsfw", nsfw),
    ("file_availability", file_availability),
)
_FILTER_NAMES = ("record", *(name for name, _ in MODEL_FILTERS))


def first_reason(model: Payload, version: Payload, config: FilterConfig) -> tuple[int, str] | None:
    """(position of the filter, reason) of the first filter that drops a version, or None."""
    for position, (_, check) in enumerate(MODEL_FILTERS):
        if reason := check(model, version, config):
            return position, reason
    return None


def _without_versions(model: Payload, config: FilterConfig) -> tuple[int, str] | None:
    checks = ((i, check) for i, (_, check) in enumerate(MODEL_FILTERS) if check is not base_model)
    return next(((i, reason) for i, check in checks if (reason := check(model, {}, config))), None)


def _label(value: object) -> str:
    """A value of the site's open enumerations as a reason of bounded length."""
    return str(value)[:40] if value not in (None, "") else "not stated"


def _true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.lower() == "true")


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


class ModelSift:
    """Applies the model filters to one model after the other and collects what they leave."""

    def __init__(
        self,
        config: FilterConfig,
        resolver: Resolver,
        gone: Collection[tuple[str, int]] = (),
    ) -> None:
        self._config = config
        self._resolver = resolver
        self._gone = gone  # tombstones: see diffagent.dabench.snapshot.read_gone
        self.models = FunnelCounter("models", _FILTER_NAMES)
        self.versions = FunnelCounter("versions", _FILTER_NAMES)
        self.entries: list[Entry] = []
        self._version_ids: set[int] = set()
        self.distributions: dict[str, Counter[str]] = {
            name: Counter() for name in ("model_type", "base_model", "nsfw", "file_availability")
        }

    def add(self, model: Payload | None) -> None:
        """Filter all versions of a model; None is a line that was no model."""
        if model is None:
            self.models.drop("record", "not an object with an id")
            return
        versions = [v for v in _items(model.get("modelVersions")) if isinstance(v, dict)]
        self._describe(model, versions)
        furthest = None if versions else _without_versions(model, self._config)
        kept = []
        for version in versions:
            found = self._first_reason(model, version)
            name = MODEL_FILTERS[found[0]][0] if found else ""
            self._resolver.add(model, version, f"{name}: {found[1]}" if found else "")
            if found is None:
                self.versions.keep()
                kept.append(version)
                continue
            self.versions.drop(name, found[1])
            if furthest is None or found[0] > furthest[0]:
                furthest = found
        if kept:
            self.models.keep()
            self._keep(model, kept)
        elif furthest:
            self.models.drop(MODEL_FILTERS[furthest[0]][0], furthest[1])

    def _first_reason(self, model: Payload, version: Payload) -> tuple[int, str] | None:
        if found := first_reason(model, version, self._config):
            return found
        ident = version.get("id")
        if self._is_gone(model, version):
            return len(MODEL_FILTERS) - 1, GONE
        if type(ident) is not int or not 0 <= ident < 2**63:
            return len(MODEL_FILTERS) - 1, "version without id"
        if ident in self._version_ids:
            return len(MODEL_FILTERS) - 1, "version listed twice"
        self._version_ids.add(ident)
        return None

    def _is_gone(self, model: Payload, version: Payload) -> bool:
        places = (("models", model.get("id")), ("versions", version.get("id")))
        return any(type(ident) is int and (kind, ident) in self._gone for kind, ident in places)

    def _keep(self, model: Payload, versions: list[dict[str, Any]]) -> None:
        description = describe(model)
        for version in versions:
            file, _ = choose_file(
                _items(version.get("files")), require_scans=self._config.require_scans
            )
            if file is not None:
                self.entries.append(make_entry(model, version, file, description))

    def _describe(self, model: Payload, versions: list[dict[str, Any]]) -> None:
        """Count the source, whatever the filters are set to."""
        counts = self.distributions
        counts["model_type"][_label(model.get("type"))] += 1
        counts["nsfw"][nsfw(model, {}, _STRICT) or "none of these"] += 1
        for version in versions:
            counts["base_model"][_label(version.get("baseModel"))] += 1
            reason = file_availability(model, version, _STRICT)
            reason = reason or (GONE if self._is_gone(model, version) else None)
            counts["file_availability"][reason or "available"] += 1


_STRICT = FilterConfig()
_UNITS = {"model_type": "models", "nsfw": "models"}


@stage("filter", version=2, config=FilterConfig)
def filter_records(config: FilterConfig, context: StageContext) -> StageResult:
    """Turn a snapshot into the catalogue and the (prompt, API) pairs that pass all filters.

    Writes ``catalogue.parquet`` (CATALOGUE), ``records-00000.parquet`` (RECORDS, in the order of
    the snapshot), ``distributions.json`` (the source, before any filter) and, when the site is
    asked for unknown hashes, ``by-hash.jsonl`` with its answers.

    Raises:
        ArtifactError: the snapshot is damaged, or no model passes the filters.
    """
    snapshot = context.one("snapshot")
    resolver = Resolver(_site_lookup(config, context))
    sift = ModelSift(config, resolver, read_gone(snapshot))
    for model in read_items(snapshot, "models"):
        sift.add(model)
    if not sift.entries:
        raise ArtifactError(
            f"none of {sift.models.result().seen} models passes the filters; "
            "check filters.model_types and filters.base_models"
        )
    catalogue = Catalogue(rename(sift.entries))
    resolver.use(catalogue)
    write_table(context.out / "catalogue.parquet", catalogue.to_table())
    _write_distributions(context.out / "distributions.json", sift.distributions)
    log.info("filter: %d model versions in the catalogue", len(catalogue.entries))

    pairs = PairBuilder(config, resolver)
    records = FunnelCounter("records", RECORD_FILTERS)
    with (
        table_writer(context.out / "records-00000.parquet", RECORDS) as writer,
        table_writer(context.out / "prints.parquet", PRINTS) as prints,
    ):
        for item in read_items(snapshot, "images"):
            row = pairs.build(item)
            if isinstance(row, Dropped):
                records.drop(row.filter, row.reason)
            else:
                records.keep()
                writer.append(row)
                columns = {name: row[name] for name in PRINTS.names if name in row}
                made = {"generation": 0, "kept": True, "shingles": shingles(row["prompt"])}
                prints.append(columns | made)
    return StageResult(
        rows={"catalogue": len(catalogue.entries), "records": writer.rows},
        funnels=(sift.models.result(), sift.versions.result(), records.result()),
        metrics={"loras": dict(sorted(pairs.loras.items()))},
    )


def _site_lookup(config: FilterConfig, context: StageContext) -> Lookup | None:
    if not config.max_hash_lookups:
        return None
    from diffagent.civitai.client import client_for
    from diffagent.dabench.lookup import SiteLookup

    client = client_for(context.site_url, context.runtime.requests_per_second)
    return SiteLookup(context.out / "by-hash.jsonl", client, config.max_hash_lookups)


def _write_distributions(path: Path, distributions: Mapping[str, Counter[str]]) -> None:
    data = {
        name: {
            "unit": _UNITS.get(name, "versions"),
            "counts": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        }
        for name, counts in distributions.items()
    }
    path.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2))
