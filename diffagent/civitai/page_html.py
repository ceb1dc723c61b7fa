"""Read the recommended settings from the HTML page of a model."""

from __future__ import annotations

from typing import Any

import orjson

from diffagent.errors import SchemaError

_MODEL_KEYS = ("checkpointType", "uploadType", "publishedAt", "updatedAt", "status")
_VERSION_KEYS = (
    "name",
    "clipSkip",
    "steps",
    "epochs",
    "settings",
    "recommendedResources",
    "canGenerate",
    "canDownload",
)


def page_settings(page: str) -> dict[str, Any]:
    """Read the settings of a model from its page (see ``settings_of``).

    Raises:
        SchemaError: the page has no ``__NEXT_DATA__`` with a model in a known form.
    """
    from bs4 import BeautifulSoup  # slow to import, and a build reads no pages

    script = BeautifulSoup(page, "html.parser").find("script", id="__NEXT_DATA__")
    try:
        state = orjson.loads(script.get_text() if script else "")
    except orjson.JSONDecodeError as error:
        raise SchemaError(f"the page has no readable __NEXT_DATA__ ({error})") from None
    model = _find_model(state)
    if model is None:
        raise SchemaError("__NEXT_DATA__ holds no query model.getById", field="trpcState")
    return settings_of(model)


def settings_of(model: dict[str, Any]) -> dict[str, Any]:
    """Select what only a model's page states: checkpoint type, recommended settings per version.

    Returns:
        {'id', 'checkpointType', ..., 'versions': [{'id', 'settings', 'clipSkip', ...}]}, each key
        only where the model has it.
    """
    versions = model.get("modelVersions")
    return {
        "id": model["id"],
        **{key: model[key] for key in _MODEL_KEYS if model.get(key) is not None},
        "versions": [
            {"id": v["id"], **{key: v[key] for key in _VERSION_KEYS if v.get(key) is not None}}
            for v in (versions if isinstance(versions, list) else [])
            if isinstance(v, dict) and isinstance(v.get("id"), int)
        ],
    }


def _find_model(state: Any) -> dict[str, Any] | None:
    """Find the data of the query ["model", "getById"], wherever the state keeps its queries."""
    waiting = [state]  # no recursion: the depth of a page is not bounded
    while waiting:
        match waiting.pop():
            case {"queryKey": [["model", "getById"], *_], "state": {"data": dict(data)}}:
                if isinstance(data.get("id"), int):
                    return data
            case dict(part):
                waiting += reversed(part.values())
            case list(parts):
                waiting += reversed(parts)
    return None
