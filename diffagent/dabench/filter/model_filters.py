"""The filters of model versions: each gives its reason, or None to let pass.

The paper's figure 2 shows the source by model type, base model architecture, NSFW content and
file availability: these four are the default, in this order. ``filters.models`` says which apply.
A model is kept when one of its versions is; else it is dropped for the reason of the version that
came furthest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

from diffagent.dabench.filter.filter_config import FilterConfig, ModelFilter
from diffagent.dabench.filter.funnel import FunnelCounter
from diffagent.dabench.filter.resolve import Resolver
from diffagent.schemas.payloads import commercial_use, generation_of, paid_access
from diffagent.schemas.printable import printable
from diffagent.t2i.base_models import base_model_of, wanted
from diffagent.t2i.catalogue import (
    CHECKPOINT,
    Entry,
    choose_file,
    commercial_state,
    describe,
    make_entry,
    stated_downloads,
)

GONE = "gone from the site"
#: A day after every end of an early access: what is still closed then is for sale for good.
_FOREVER = "9999"
_FORMS = {"inpaint": "Inpainting", "pix2pix": "Pix2Pix"}

Payload = Mapping[str, Any]
#: (model, version, config) -> why it is dropped
Check = Callable[[Payload, Payload, FilterConfig], str | None]


def model_type(model: Payload, version: Payload, config: FilterConfig) -> str | None:
    """Checkpoints, and what is laid over them."""
    kind = model.get("type")
    return None if kind in config.model_types else _label(kind)


def base_model(model: Payload, version: Payload, config: FilterConfig) -> str | None:
    """Architectures that are wanted, in their text-to-image form."""
    name = version.get("baseModel")
    if not isinstance(name, str) or not wanted(name, config.base_models):
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
    if paid_access(version, _FOREVER):
        return "paid access"
    file, reason = choose_file(_items(version.get("files")), require_scans=config.require_scans)
    if file is None:
        return reason
    return None if file.get("downloadUrl") or version.get("downloadUrl") else "no download address"


def licence(model: Payload, version: Payload, config: FilterConfig) -> str | None:
    """Models whose pictures may be sold, or whatever ``filters.commercial_use`` lists."""
    known = base_model_of(str(version.get("baseModel") or "")).licence
    state, source = commercial_state(commercial_use(model.get("allowCommercialUse")), known)
    if state in config.commercial_use:
        return None
    return f"commercial use {state}" + (f" ({known})" if source == "base_model" else "")


def popularity(model: Payload, version: Payload, config: FilterConfig) -> str | None:
    """Versions that were downloaded often enough; a number that is hidden is not a small one."""
    number = stated_downloads(version)
    if number is None:
        return "downloads not stated" if config.min_downloads else None
    return None if number >= config.min_downloads else "too few downloads"


MODEL_FILTERS: Mapping[ModelFilter, Check] = {
    "model_type": model_type,
    "base_model": base_model,
    "nsfw": nsfw,
    "file_availability": file_availability,
    "licence": licence,
    "downloads": popularity,
}
#: Filters that look at the version alone; a model without versions cannot be dropped by them.
_OF_VERSIONS = ("base_model", "licence", "downloads")


def _label(value: object) -> str:
    """A value of the site's open enumerations as a reason of bounded length."""
    return printable(str(value)[:40]) if value not in (None, "") else "not stated"


def _true(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.lower() == "true")


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


class ModelSift:
    """Applies the model filters to one model after the other and collects what they leave.

    Args:
        config: which filters, and their limits.
        resolver: gets every version, with the reason why it was dropped.
        gone: tombstones, see `diffagent.dabench.filter.snapshot_rows.read_gone`.
        dates: the day of each generation, see
        `diffagent.dabench.filter.snapshot_rows.read_generations`.
    """

    def __init__(
        self,
        config: FilterConfig,
        resolver: Resolver,
        gone: Collection[tuple[str, int]] = (),
        dates: Mapping[int, str] | None = None,
    ) -> None:
        self._config, self._resolver, self._gone = config, resolver, gone
        self._dates = dates or {}
        self._day = max(self._dates.values(), default="")
        self._checks = [(name, MODEL_FILTERS[name]) for name in config.models]
        names = ("record", *config.models)
        self.models = FunnelCounter("models", names)
        self.versions = FunnelCounter("versions", names)
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
        furthest = None if versions else self._without_versions(model)
        kept = []
        for version in versions:
            found = self._first_reason(model, version)
            name = self._checks[found[0]][0] if found else ""
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
            self.models.drop(self._checks[furthest[0]][0], furthest[1])

    def _first_reason(self, model: Payload, version: Payload) -> tuple[int, str] | None:
        """(position of the filter, reason) of the first filter that drops a version."""
        for position, (name, check) in enumerate(self._checks):
            reason = check(model, version, self._config)
            if reason is None and name == "file_availability":
                reason = self._unusable(model, version)
            if reason:
                return position, reason
        self._version_ids.add(version["id"])
        return None

    def _unusable(self, model: Payload, version: Payload) -> str | None:
        ident = version.get("id")
        if reason := self._closed(model, version):
            return reason
        if type(ident) is not int or not 0 <= ident < 2**63:
            return "version without id"
        return "version listed twice" if ident in self._version_ids else None

    def _closed(self, model: Payload, version: Payload) -> str | None:
        """Why nobody can download a version now, as far as its own record cannot tell."""
        if self._is_gone(model, version):
            return GONE
        return paid_access(version, self._day) or None

    def _without_versions(self, model: Payload) -> tuple[int, str] | None:
        for position, (name, check) in enumerate(self._checks):
            if name not in _OF_VERSIONS and (reason := check(model, {}, self._config)):
                return position, reason
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
                date = self._dates.get(generation_of(version))
                self.entries.append(make_entry(model, version, file, description, date))

    def _describe(self, model: Payload, versions: list[dict[str, Any]]) -> None:
        """Count the source, whatever the filters are set to."""
        counts = self.distributions
        counts["model_type"][_label(model.get("type"))] += 1
        counts["nsfw"][nsfw(model, {}, _STRICT) or "none of these"] += 1
        for version in versions:
            counts["base_model"][_label(version.get("baseModel"))] += 1
            reason = file_availability(model, version, _STRICT)
            reason = reason or self._closed(model, version)
            counts["file_availability"][reason or "available"] += 1


_STRICT = FilterConfig()
