"""Writes schemas/*.schema.json from the library's types: ``python -m tools.write_schemas``."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from diffagent.run_config import RunConfig
from diffagent.schemas.api import T2IAPI
from diffagent.schemas.manifest import Manifest

DIRECTORY = Path(__file__).parents[1] / "schemas"
#: Name of the file -> the type that it describes.
TYPES: dict[str, type[BaseModel]] = {
    "run_config": RunConfig,
    "api_call": T2IAPI,
    "manifest": Manifest,
}


def schema_text(kind: type[BaseModel]) -> str:
    """Return the JSON Schema of a type as the text of its file."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps({**dialect, **kind.model_json_schema()}, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all schemas."""
    for name, kind in TYPES.items():
        path = DIRECTORY / f"{name}.schema.json"
        path.write_text(schema_text(kind), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
