"""The authors' DABench release, or another in its form: instruction-API pairs as JSON.

Known facts of that release (DiffAgent, arXiv 2404.01342, and the README of its repository): it is
one archive on Google Drive with 50,482 "Instruction-API pairs" and "mapping dictionaries to
facilitate subsequent model downloads or API information reconstruction"; a third party names the
keys of an API: Model, Type, Base Model, Params, Description. The names of its files, of the keys
inside Params and of those of the dictionaries are unknown. So this module reads the layout that
``diffagent dabench export --format instruction-api`` writes, which has those five keys: JSON arrays
of pairs, and ``mapping/models.json``.

A release with other names is read with a file ``names.json`` in its directory, which states the
release's name for each of the ``NAMES``. Nothing is guessed: a key that is missing, unknown or of
another type raises an error with the file, the record and the expected type.

Pairs become pictures' records that name their models by version ids, and the dictionary becomes the
models, so that all stages after the crawl run as for any site. Facts that a release lacks, such as
the results of scans, are left out; set ``filters.require_scans=false``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson

from diffagent.errors import ConfigError, SchemaError
from diffagent.localcivitai.sources import SourceRecords, synthetic_id

Row = dict[str, Any]
_TEXT, _NUMBER, _WHOLE, _MAP, _LIST = (str,), (int, float), (int,), (dict,), (list,)
_MAYBE = type(None)

#: Field -> its key, unless ``names.json`` states another.
NAMES: Mapping[str, str] = MappingProxyType(
    {
        **{"pairs": "*.json", "mapping": "mapping/models.json"},
        **{"id": "id", "instruction": "instruction", "API": "API"},
        **{"Model": "Model", "Type": "Type", "Base Model": "Base Model", "Params": "Params"},
        **{"Description": "Description", "Version": "Version", "AIR": "AIR", "LoRAs": "LoRAs"},
        "Negative Prompt": "Negative Prompt",
        **{"sampler": "sampler", "steps": "steps", "cfg_scale": "cfg_scale", "width": "width"},
        **{"height": "height", "clip_skip": "clip_skip", "seed": "seed"},
    }
)
_PAIR = {"instruction": _TEXT, "API": _MAP}
_PAIR_MAYBE = {"id": _WHOLE}
_API = {"Model": _TEXT, "Type": _TEXT, "Base Model": _TEXT, "Params": _MAP}
_API_MAYBE: dict[str, tuple[type, ...]] = {
    "Description": (str, _MAYBE),
    "Version": _TEXT,
    "AIR": (str, _MAYBE),
}
_API_MAYBE |= {"LoRAs": _LIST, "Negative Prompt": _TEXT}
_PARAMS = {"sampler": _TEXT, "steps": _WHOLE, "cfg_scale": _NUMBER, "width": _WHOLE}
_PARAMS |= {"height": _WHOLE}
_PARAMS_MAYBE = {"clip_skip": _WHOLE, "seed": (int, _MAYBE)}
_LORA = {"model": _TEXT, "version": _TEXT, "weight": _NUMBER}
_MODEL = {"model_id": _WHOLE, "type": _TEXT, "versions": _MAP}
_VERSION: dict[str, tuple[type, ...]] = {
    "version_id": _WHOLE,
    "base_model": _TEXT,
    "file_name": _TEXT,
    "sha256": (str, _MAYBE),
}
_VERSION |= {"download_path": _TEXT}
_VERSION_MAYBE: dict[str, tuple[type, ...]] = {
    "air": (str, _MAYBE),
    "size_bytes": (int, _MAYBE),
    "trained_words": _LIST,
}
_NO_PAIRS = ("names.json", "manifest.json", "distributions.json")
Fields = Mapping[str, tuple[type, ...]]


def open_release(directory: Path, cache: Path | None = None) -> SourceRecords:
    """Read a release.

    Raises:
        ConfigError: a file is missing, or ``names.json`` has an unknown field.
        SchemaError: later, while records are read: a record is not as documented.
    """
    release = Release(directory)
    return SourceRecords(release.models(), release.images())


class Release:
    """A directory with pairs and their mapping dictionary."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.names = directory, _names(directory)
        self.mapping_file = directory / self.names["mapping"]
        mapping = _read_json(self.mapping_file)
        self.mapping = self._object(mapping, str(self.mapping_file), "a dictionary of models")
        for model, entry in self.mapping.items():
            where = f"{self.mapping_file}: model {model!r}"
            self._check(entry, where, _MODEL, {}, named=False)
            for version, facts in entry["versions"].items():
                place = f"{where}, version {version!r}"
                self._check(facts, place, _VERSION, _VERSION_MAYBE, named=False)
        files = directory.glob(self.names["pairs"])
        self.pairs = sorted(path for path in files if path.name not in _NO_PAIRS)
        if not self.pairs:
            raise ConfigError(f"{str(directory)!r} holds no pairs ({self.names['pairs']}); {_HELP}")

    def models(self) -> Iterator[Row]:
        """Yield the dictionary as models of the API."""
        for name, entry in self.mapping.items():
            yield {
                "id": entry["model_id"],
                "name": name,
                "type": entry["type"],
                "nsfw": False,
                "modelVersions": [_version(v, facts) for v, facts in entry["versions"].items()],
            }

    def images(self) -> Iterator[Row]:
        """Yield the pairs as pictures of the API."""
        for path in self.pairs:
            pairs = _read_json(path)
            if not isinstance(pairs, list):
                raise SchemaError(
                    f"{path}: {_kind(pairs)} where an array of pairs should be; {_HELP}"
                )
            for number, pair in enumerate(pairs, 1):
                yield self._image(pair, f"{path}: record {number}")

    def _image(self, pair: Any, where: str) -> Row:
        fields = self._check(pair, where, _PAIR, _PAIR_MAYBE)
        api = self._check(fields["API"], f"{where}, API", _API, _API_MAYBE)
        params = self._check(api["Params"], f"{where}, Params", _PARAMS, _PARAMS_MAYBE)
        version = self._resolve(api["Model"], api.get("Version"), where)
        if version["base_model"] != api["Base Model"]:
            raise SchemaError(
                f"{where}: base model {api['Base Model']!r}, but {self.mapping_file} states "
                f"{version['base_model']!r} of that model; {_HELP}"
            )
        resources: list[Row] = [{"type": "checkpoint", "modelVersionId": version["version_id"]}]
        for place, lora in enumerate(api.get("LoRAs", ()), 1):
            self._check(lora, f"{where}, LoRA {place}", _LORA, {}, named=False)
            used = self._resolve(lora["model"], lora["version"], f"{where}, LoRA {place}")
            resources.append({"type": "lora", "modelVersionId": used["version_id"]})
            resources[-1]["weight"] = lora["weight"]
        meta = {
            "prompt": fields["instruction"],
            "negativePrompt": api.get("Negative Prompt", ""),
            "sampler": params["sampler"],
            "steps": params["steps"],
            "cfgScale": params["cfg_scale"],
            "Size": f"{params['width']}x{params['height']}",
            "clipSkip": params.get("clip_skip", 1),
            "civitaiResources": resources,
        }
        if params.get("seed") is not None:
            meta["seed"] = params["seed"]
        digest = hashlib.sha256(orjson.dumps(meta, option=orjson.OPT_SORT_KEYS)).hexdigest()
        return {
            "id": fields.get("id", synthetic_id(digest)),
            "type": "image",
            "url": None,
            "nsfwLevel": "None",  # a release has passed its makers' NSFW filter
            "width": params["width"],
            "height": params["height"],
            "baseModel": version["base_model"],
            "modelVersionIds": [resource["modelVersionId"] for resource in resources],
            "meta": meta,
        }

    def _resolve(self, model: str, version: str | None, where: str) -> Row:
        """Return the dictionary's facts of a version; of the only one when none is named."""
        versions = self.mapping.get(model, {}).get("versions", {})
        if version is None and len(versions) == 1:
            (version,) = versions
        if version not in versions:
            raise SchemaError(
                f"{where}: {self.mapping_file} has no version {version!r} of model {model!r}"
                f"{f', but {sorted(versions)}' if versions else ''}; {_HELP}"
            )
        facts: Row = versions[version]
        return facts

    def _check(
        self, value: Any, where: str, fields: Fields, maybe: Fields, *, named: bool = True
    ) -> Row:
        """Return an object with all of ``fields`` and some of ``maybe``, by our names.

        Raises:
            SchemaError: it is no object, or a key is missing, unknown or of another type.
        """
        record = self._object(value, where, "an object")
        types = {**fields, **maybe}
        keys = {self.names[field] if named else field: field for field in types}
        if unknown := sorted(record.keys() - keys.keys()):
            raise SchemaError(
                f"{where}: unknown key {unknown[0]!r}; known are {sorted(keys)}; {_HELP}",
                field=unknown[0],
            )
        for key, field in keys.items():
            if key not in record and field in fields:
                raise SchemaError(f"{where}: no key {key!r}; {_HELP}", field=key)
            if key in record and type(record[key]) not in types[field]:
                kinds = " or ".join(kind.__name__ for kind in types[field])
                raise SchemaError(
                    f"{where}: {key!r} is {_kind(record[key])} {str(record[key])[:60]!r}, expected "
                    f"{kinds}; {_HELP}",
                    field=key,
                )
        return {field: record[key] for key, field in keys.items() if key in record}

    @staticmethod
    def _object(value: Any, where: str, expected: str) -> Row:
        if not isinstance(value, dict):
            raise SchemaError(f"{where}: {_kind(value)} where {expected} should be; {_HELP}")
        return value


_HELP = (
    "see docs/explanation/crawling.md for the layout; where only names differ, state them in a "
    "file names.json in the directory of the pairs"
)


def _version(name: str, facts: Row) -> Row:
    file = {
        "id": facts["version_id"],
        "name": facts["file_name"],
        "type": "Model",
        "metadata": {"format": "SafeTensor"} if facts["file_name"].endswith(".safetensors") else {},
        "hashes": {"SHA256": facts["sha256"].upper()} if facts["sha256"] else {},
        "downloadUrl": facts["download_path"],
        "primary": True,
    }
    if facts.get("size_bytes") is not None:
        file["sizeKB"] = facts["size_bytes"] / 1024
    return {
        "id": facts["version_id"],
        "name": name,
        "baseModel": facts["base_model"],
        "trainedWords": facts.get("trained_words", []),
        "files": [file],
        "images": [],
        "downloadUrl": facts["download_path"],
    }


def _names(directory: Path) -> dict[str, str]:
    """Return ``NAMES`` with the changes of ``names.json``."""
    path = directory / "names.json"
    if not path.exists():
        return dict(NAMES)
    names = _read_json(path)
    is_texts = isinstance(names, dict) and all(isinstance(value, str) for value in names.values())
    if not is_texts or (unknown := sorted(names.keys() - NAMES.keys())):
        problem = f"unknown field {unknown[0]!r}" if is_texts else "it is no object of texts"
        raise ConfigError(f"{path}: {problem}; it states the release's names of {sorted(NAMES)}")
    return {**NAMES, **names}


def _read_json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}; {_HELP}") from None
    except orjson.JSONDecodeError as error:
        raise SchemaError(
            f"{path} is no JSON: {error}; unpack the archive again, or leave this file out"
        ) from None


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "an array", str: "a text"}
    return kinds.get(type(value), type(value).__name__)
