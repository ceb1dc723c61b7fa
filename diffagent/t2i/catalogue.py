"""The catalogue: every model version that an API may name, under names that are unique.

Civitai's model names are not unique and its version names are unique within a model only most
of the time. `unique_names` mends both by appending ids to whatever collides, so that
(model, version) is a key that a language model can write and that means one file.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.errors import ArtifactError, ConfigError
from diffagent.failures import reading
from diffagent.schemas.payloads import commercial_use, generation_of
from diffagent.schemas.tables import CATALOGUE
from diffagent.store import describe_directory
from diffagent.t2i.base_models import NON_COMMERCIAL, base_model_of, ecosystem
from diffagent.t2i.samplers import SAMPLERS, SamplerSpec

CommercialUse = Literal["yes", "no", "unknown"]

#: Ids of models that the site does not have are 52 bits of a SHA256 above this. The site's own are
#: 32-bit numbers, and numbers up to 2^53 are exact wherever JSON is read.
SYNTHETIC = 2**52

CHECKPOINT = "Checkpoint"
#: Types that are laid over a checkpoint, with the name of the type in an AIR.
LORA_TYPES: Mapping[str, str] = {"LORA": "lora", "LoCon": "lycoris", "DoRA": "dora"}
#: What stands in a prompt.
EMBEDDING = "TextualInversion"
#: Types that a catalogue can hold, with the name of the type in an AIR.
AIR_TYPES = {CHECKPOINT: "checkpoint", **LORA_TYPES, EMBEDDING: "embedding"}
#: Files of a version that hold the weights of the model itself.
WEIGHT_TYPES = ("Model", "Pruned Model", "UNet", "Diffusion Model")

_QUERY = "%&=+,;:@/?!$'()*~"  # what has a meaning in a query, or is encoded already
_MAX_DESCRIPTION = 300
_MAX_HTML = 10_000  # descriptions of megabytes exist; the first sentences are at the beginning


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the catalogue: a model version and the file that stands for it.

    The fields are the columns of ``diffagent.schemas.tables.CATALOGUE``.
    """

    model: str
    version: str
    type: str
    base_model: str
    model_id: int
    version_id: int
    air: str
    file_name: str
    file_id: int | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    download_path: str = ""
    description: str = ""
    tags: tuple[str, ...] = ()
    trained_words: tuple[str, ...] = ()
    downloads: int = 0
    creator: str | None = None
    allow_commercial_use: tuple[str, ...] | None = None
    allow_derivatives: bool | None = None
    allow_no_credit: bool | None = None
    base_model_licence: str | None = None
    commercial_use: CommercialUse = "unknown"
    commercial_use_source: str | None = None
    nsfw: bool = False
    nsfw_levels: int | None = None
    page: str = ""
    generation: int = 0
    first_seen: str | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether an API may name it as its model (else it is laid over one)."""
        return self.type == CHECKPOINT

    @property
    def ecosystem(self) -> str:
        """Root ecosystem; a LoRA fits the checkpoints of its own."""
        return ecosystem(self.base_model)


_COLUMNS = tuple(field.name for field in fields(Entry))


def renderable_samplers() -> dict[str, SamplerSpec]:
    """The samplers that an API may name: those that diffusers can run."""
    return {name: spec for name, spec in SAMPLERS.items() if spec.renderable}


class Catalogue:
    """Entries by (model, version). Order of entries: by version id."""

    def __init__(self, entries: Iterable[Entry], samplers: Iterable[str] | None = None) -> None:
        self.entries: tuple[Entry, ...] = tuple(sorted(entries, key=lambda e: e.version_id))
        self.samplers = frozenset(renderable_samplers() if samplers is None else samplers)
        self._by_name = {(entry.model, entry.version): entry for entry in self.entries}
        if len(self._by_name) != len(self.entries):
            raise ArtifactError(
                f"{len(self.entries) - len(self._by_name)} entries of the catalogue share their "
                "(model, version) with another; build the catalogue again"
            )

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read ``catalogue.parquet``, and ``mapping/samplers.json`` where it is there.

        Raises:
            ArtifactError: there is no catalogue, or its columns are not ``CATALOGUE``.
        """
        path = Path(directory, "catalogue.parquet")
        try:
            table = pq.ParquetFile(path).read()  # read_table would import pandas
        except FileNotFoundError:
            raise ArtifactError(
                f"no catalogue in {str(directory)!r}: {describe_directory(Path(directory))}"
            ) from None
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"cannot read the catalogue {str(path)!r}: {error}; the file is damaged: copy it "
                "again, or build the dataset again"
            ) from None
        if table.schema.names != CATALOGUE.names:
            raise ArtifactError(
                f"{str(path)!r} has columns {table.schema.names}, not those of this version; "
                "build the dataset again"
            )
        mapping = Path(directory, "mapping", "samplers.json")
        with reading(mapping):
            samplers = orjson.loads(mapping.read_bytes()) if mapping.exists() else None
        with reading(path):
            return cls(_from_table(table), samplers)

    @cached_property
    def checkpoints(self) -> tuple[Entry, ...]:
        """Entries that an API may name as its model."""
        return tuple(entry for entry in self.entries if entry.is_checkpoint)

    @cached_property
    def loras(self) -> tuple[Entry, ...]:
        """Entries that an API may lay over its model."""
        return tuple(entry for entry in self.entries if entry.type in LORA_TYPES)

    @cached_property
    def embeddings(self) -> tuple[Entry, ...]:
        """Entries that a prompt of an API may begin with."""
        return tuple(entry for entry in self.entries if entry.type == EMBEDDING)

    @cached_property
    def _models(self) -> frozenset[str]:
        return frozenset(entry.model for entry in self.entries)

    def has_model(self, model: str) -> bool:
        """Whether any version of a model has this name."""
        return model in self._models

    def entry(self, model: str, version: str) -> Entry | None:
        """Whatever has that name, or None."""
        return self._by_name.get((model, version))

    def checkpoint(self, model: str, version: str) -> Entry | None:
        """The checkpoint of that name, or None."""
        entry = self._by_name.get((model, version))
        return entry if entry and entry.is_checkpoint else None

    def lora(self, model: str, version: str) -> Entry | None:
        """The LoRA (or LoCon, DoRA) of that name, or None."""
        entry = self._by_name.get((model, version))
        return entry if entry and entry.type in LORA_TYPES else None

    def embedding(self, model: str, version: str) -> Entry | None:
        """The textual inversion of that name, or None."""
        entry = self._by_name.get((model, version))
        return entry if entry and entry.type == EMBEDDING else None

    def only(self, names: Collection[tuple[str, str]]) -> Self:
        """The catalogue with the entries of these (model, version) alone, and all samplers.

        Raises:
            ConfigError: none of them is a checkpoint.
        """
        catalogue = type(self)(
            (e for e in self.entries if (e.model, e.version) in names), self.samplers
        )
        if not catalogue.checkpoints:
            raise ConfigError(
                f"none of the {len(self.checkpoints):,} checkpoints to choose from is in the "
                "folder; --download fetches what is chosen, or name a checkpoint with --model"
            )
        return catalogue

    def to_table(self) -> pa.Table:
        """The table ``diffagent.schemas.tables.CATALOGUE``."""
        columns = {
            name: [_plain(getattr(entry, name)) for entry in self.entries] for name in _COLUMNS
        }
        return pa.table(columns, schema=CATALOGUE)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _from_table(table: pa.Table) -> Iterator[Entry]:
    columns: list[Sequence[Any]] = []
    for name in _COLUMNS:  # column by column: a few times faster than rows as dictionaries
        values = table[name].to_pylist()
        if pa.types.is_list(table[name].type):
            values = [value if value is None else tuple(value) for value in values]
        columns.append(values)
    return itertools.starmap(Entry, zip(*columns, strict=True))


def unique_names(names: Mapping[int, str]) -> dict[int, str]:
    """Make the names of ``{id: name}`` unique: every one that collides gets `` #ID``.

    Names that differ only in case or spacing collide. All of them are marked, not all but one,
    so that no name depends on which other was seen first.
    """
    result = {ident: " ".join(name.split()) or f"#{ident}" for ident, name in names.items()}
    while True:
        owners: dict[str, list[int]] = {}
        for ident, name in result.items():
            owners.setdefault(name.casefold(), []).append(ident)
        collided = [ident for group in owners.values() if len(group) > 1 for ident in group]
        if not collided:
            return result
        for ident in collided:
            result[ident] = f"{result[ident]} #{ident}"


def choose_file(
    files: Sequence[Any], *, require_scans: bool, types: Collection[str] | None = WEIGHT_TYPES
) -> tuple[dict[str, Any] | None, str]:
    """The file of a version to download, and why there is none: ``(file, "")`` or ``(None, why)``.

    Only safetensors of these ``types`` (the model's own weights; None: any), that passed both scans
    and have a SHA256, are eligible. Whole numbers (fp16, bf16, fp32, or nothing stated) come before
    float8, and float8 before 4-bit and other packings, which cannot be drawn with; then the site's
    own score decides (pruned +10, fp16 +1), then its primary flag, then the lowest id.
    """
    weights = [
        f for f in files if isinstance(f, dict) and (types is None or f.get("type") in types)
    ]
    if not weights:
        return None, "no model file" if files else "no files"
    safe = [f for f in weights if _is_safetensors(f)]
    if not safe:
        return None, "no safetensors file"
    scanned = [f for f in safe if not require_scans or _scans_passed(f)]
    if not scanned:
        return None, "scan not passed"
    hashed = [f for f in scanned if _sha256(f)]
    if not hashed:
        return None, "no SHA256"  # what is downloaded could not be verified
    return max(hashed, key=_file_score), ""


def _metadata(file: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata = file.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _is_safetensors(file: Mapping[str, Any]) -> bool:
    stated = _metadata(file).get("format")
    if stated:
        return bool(stated == "SafeTensor")
    return str(file.get("name", "")).lower().endswith(".safetensors")


def _sha256(file: Mapping[str, Any]) -> str | None:
    hashes = file.get("hashes")
    value = hashes.get("SHA256") if isinstance(hashes, dict) else None
    return value.lower() if isinstance(value, str) and len(value) == 64 else None


def _scans_passed(file: Mapping[str, Any]) -> bool:
    return file.get("pickleScanResult") == file.get("virusScanResult") == "Success"


def _file_score(file: Mapping[str, Any]) -> tuple[int, int, bool, int]:
    metadata = _metadata(file)
    score = 10 * (metadata.get("size") == "pruned") + (metadata.get("fp") == "fp16")
    ident = file.get("id")
    primary = file.get("primary") is True
    return -_packing(file), score, primary, -ident if isinstance(ident, int) else 0


def _packing(file: Mapping[str, Any]) -> int:
    """How far a file is from whole numbers: 0 float16 and wider, 1 float8, 2 anything smaller.

    The name counts too: the site's ``fp`` and ``quantType`` are often empty or wrong.
    """
    metadata = _metadata(file)
    stated = " ".join(str(metadata.get(key) or "") for key in ("fp", "quantType"))
    text = f"{stated} {str(file.get('name') or '')[:300]}".lower()
    if _PACKED.search(text):
        return 2
    return 1 if _FLOAT8.search(text) else 0


#: Marks of weights in four bits, in integers, or in packings of llama.cpp, Nunchaku and others.
_PACKED = re.compile(
    r"(?<![a-z0-9])(?:nf4|fp4|nvfp4|mxfp4|mxfp8|int[48]|w[48]a(?:4|8|16)|i?q[2-8](?:_\w+)?|gguf"
    r"|svdq\w*|nunchaku|gptq|awq|bnb|4bit|8bit)(?![a-z0-9])"
)
_FLOAT8 = re.compile(r"(?<![a-z0-9])(?:fp8|f8|float8|e4m3\w*|e5m2\w*)(?![a-z0-9])")


def describe(model: Mapping[str, Any]) -> str:
    """The first sentences of a model's description, without HTML; '' when it has none."""
    from diffagent.t2i.text import plain_text

    html = model.get("description")
    if not isinstance(html, str):
        return ""
    return first_sentences(plain_text(html[:_MAX_HTML], enough=_MAX_DESCRIPTION))


def air_of(root: str, kind: str, model_id: int, version_id: int) -> str:
    """The AIR of a version; its source is ``local`` when the file is of no site (by its id).

    Args:
        root: ecosystem of the base model.
        kind: the site's type, as ``LORA``.
        model_id, version_id: ids.
    """
    source = "civitai" if model_id < SYNTHETIC else "local"
    return f"urn:air:{root}:{AIR_TYPES.get(kind, kind.lower())}:{source}:{model_id}@{version_id}"


def make_entry(
    model: Mapping[str, Any],
    version: Mapping[str, Any],
    file: Mapping[str, Any],
    description: str = "",
    first_seen: str | None = None,
) -> Entry:
    """An entry under the site's own names (see `rename`), from payloads that passed the filters.

    Args:
        model: the payload of the model.
        version: one of its versions.
        file: the file of that version which is downloaded.
        description: in one line, without HTML.
        first_seen: day of the crawl that first had the version, YYYY-MM-DD.
    """
    kind, base_model = str(model["type"]), str(version["baseModel"])
    model_id, version_id = int(model["id"]), int(version["id"])
    creator = model.get("creator")
    username = creator.get("username") if isinstance(creator, dict) else None
    known = base_model_of(base_model)
    uses = commercial_use(model.get("allowCommercialUse"))
    state, source = commercial_state(uses, known.licence)
    return Entry(
        model=_name(model.get("name")),
        version=_name(version.get("name")),
        type=kind,
        base_model=base_model,
        model_id=model_id,
        version_id=version_id,
        air=air_of(known.ecosystem, kind, model_id, version_id),
        file_name=str(file.get("name") or ""),
        file_id=int64(file.get("id")),
        size_bytes=_size_bytes(file.get("sizeKB")),
        sha256=_sha256(file),
        download_path=_download_path(version_id, file),
        description=description,
        tags=_texts(model.get("tags")),
        trained_words=_texts(version.get("trainedWords")),
        downloads=stated_downloads(version) or 0,
        creator=username if isinstance(username, str) else None,
        allow_commercial_use=uses,
        allow_derivatives=_flag(model.get("allowDerivatives")),
        allow_no_credit=_flag(model.get("allowNoCredit")),
        base_model_licence=known.licence,
        commercial_use=state,
        commercial_use_source=source,
        nsfw=model.get("nsfw") is True,
        nsfw_levels=int64(version.get("nsfwLevel", model.get("nsfwLevel"))),
        page=f"/models/{model_id}?modelVersionId={version_id}",
        generation=generation_of(version),
        first_seen=first_seen,
    )


def commercial_state(
    uses: tuple[str, ...] | None, licence: str | None
) -> tuple[CommercialUse, str | None]:
    """Whether pictures may be sold, and which evidence says so: ('yes', 'model').

    The creator's own settings decide ('model'), unless the licence of the base model forbids
    commercial use ('base_model'); they cannot give what they do not have.
    """
    if licence in NON_COMMERCIAL:
        return "no", "base_model"
    if uses is None:
        return "unknown", None
    return ("yes" if "Image" in uses else "no"), "model"


def _size_bytes(kilobytes: object) -> int | None:
    if not isinstance(kilobytes, int | float) or not 0 < kilobytes < 2**40:
        return None
    return round(kilobytes * 1024)


def int64(value: object) -> int | None:
    """An integer that a table can hold, or None."""
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def stated_downloads(version: Mapping[str, Any]) -> int | None:
    """How often a version was downloaded; None when its creator hides that."""
    stats = version.get("stats")
    return int64(stats.get("downloadCount")) if isinstance(stats, dict) else None


def _name(value: object) -> str:
    # An API's name has 300 characters at most; ' #ID' must still fit.
    return " ".join(str(value or "").split())[:270]


def _texts(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list) else []
    texts = (item.get("name") if isinstance(item, dict) else item for item in items)
    return tuple(text for text in texts if isinstance(text, str))


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _download_path(version_id: int, file: Mapping[str, Any]) -> str:
    """Path without host; a file that is not the primary one is asked for by its id.

    The site also offers ``?type=&format=...``, which can be 404 where ``fileId`` works.
    """
    path = f"/api/download/models/{version_id}"
    if file.get("primary") is True:
        return path
    file_id = int64(file.get("id"))
    if file_id is not None:
        return f"{path}?fileId={file_id}"
    # The record's text, whatever it is: no parser refuses it, and no odd character is sent.
    query = str(file.get("downloadUrl") or "").partition("?")[2].partition("#")[0]
    return f"{path}?{quote(query, safe=_QUERY)}" if query else path


def first_sentences(text: str, limit: int = _MAX_DESCRIPTION) -> str:
    """The beginning of a text in one line, cut after a sentence where there is one."""
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    head = text[:limit]
    ends = [match.end() for match in re.finditer(r"[.!?。！？](?=\s|$)", head)]
    if ends and ends[-1] >= limit // 3:
        return head[: ends[-1]]
    return head[: head.rfind(" ")] if " " in head else head


def rename(entries: Iterable[Entry]) -> list[Entry]:
    """Give entries the names that are unique over all of them."""
    entries = list(entries)
    models = unique_names({entry.model_id: entry.model for entry in entries})
    by_model: dict[int, dict[int, str]] = {}
    for entry in entries:
        by_model.setdefault(entry.model_id, {})[entry.version_id] = entry.version
    versions = {model_id: unique_names(names) for model_id, names in by_model.items()}
    return [
        replace(
            entry,
            model=models[entry.model_id],
            version=versions[entry.model_id][entry.version_id],
        )
        for entry in entries
    ]
