"""DABench of real records: its counts agree with a second, plain count over the same dump."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.shard_stage import build_dabench, read_split
from diffagent.dabench.build.splits import SPLITS
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.dabench.tools.dataset_checks import verify_dabench
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact
from diffagent.t2i.samplers import SAMPLERS, normalise
from tests.conftest import SHARED_DATA
from tests.dabench.dabench_records import snapshot

DUMP = SHARED_DATA / "civitai"
EVERY = 10  # of the records; all models are read

pytestmark = pytest.mark.skipif(
    not (DUMP / "images.jsonl.gz").exists(), reason="the records of ../shared are not here"
)


def dump(kind: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DUMP / f"{kind}.jsonl.gz") as lines:
        yield from map(orjson.loads, lines)


def as_api(item: dict[str, Any]) -> dict[str, Any]:
    """Without the dump's own annotations."""
    return {key: value for key, value in item.items() if not key.startswith("_")}


@pytest.fixture(scope="module")
def models() -> list[dict[str, Any]]:
    """Every model once, by id, without its pictures, which no filter reads."""
    items = {item["id"]: as_api(item) for item in dump("models")}
    for item in items.values():
        for version in item["modelVersions"]:
            version["images"] = []
    return [items[ident] for ident in sorted(items)]


@pytest.fixture(scope="module")
def images() -> list[dict[str, Any]]:
    items = {item["id"]: item for item in islice(dump("images"), 0, None, EVERY)}
    return [items[ident] for ident in sorted(items)]


@pytest.fixture(scope="module")
def filtered(
    models: list[dict[str, Any]],
    images: list[dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Artifact:
    folder = tmp_path_factory.mktemp("real")
    source = snapshot(folder / "snapshot", models, [as_api(item) for item in images], parts=3)
    runtime = RuntimeConfig(store=str(folder / "store"))
    return filter_records.run(FilterConfig(), {"snapshot": [source]}, runtime)


def kept_versions(models: list[dict[str, Any]]) -> set[int]:
    """The model filters once more, as one expression over every version."""
    return {
        version["id"]
        for model in models
        for version in model["modelVersions"]
        if model["type"] in ("Checkpoint", "LORA", "LoCon", "DoRA", "TextualInversion")
        and version["baseModel"] in ("SD 1.5", "SDXL 1.0")
        and version.get("baseModelType") in (None, "Standard")
        and not (model["type"] == "Checkpoint" and "inpaint" in all_names(version))
        and not (model["type"] == "Checkpoint" and "pix2pix" in all_names(version))
        and not (model["nsfw"] or model["poi"] or model.get("minor") or model.get("mode"))
        and {model.get("availability"), version.get("availability")} <= {None, "Public"}
        and any(map(usable, version["files"]))
    }


def all_names(version: dict[str, Any]) -> str:
    return " ".join([version["name"], *(file["name"] for file in version["files"])]).lower()


def usable(file: dict[str, Any]) -> bool:
    return (
        file["type"] in ("Model", "Pruned Model")
        and file["metadata"].get("format") == "SafeTensor"
        and file["pickleScanResult"] == file["virusScanResult"] == "Success"
        and "SHA256" in file["hashes"]
    )


def test_models_agree_with_a_plain_count(models: list[dict[str, Any]], filtered: Artifact) -> None:
    wanted = kept_versions(models)
    catalogue = pq.read_table(filtered.file("catalogue.parquet"))
    assert set(catalogue["version_id"].to_pylist()) == wanted
    funnel_models, funnel_versions, _ = filtered.manifest.funnels
    assert funnel_models.seen == len(models)
    assert funnel_models.kept == sum(
        any(version["id"] in wanted for version in model["modelVersions"]) for model in models
    )
    assert funnel_versions.seen == sum(len(model["modelVersions"]) for model in models)
    pairs = set(zip(catalogue["model"].to_pylist(), catalogue["version"].to_pylist(), strict=True))
    assert len(pairs) == len(wanted)


def checkpoints_by_hash(models: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Hash -> the version that was there first."""
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        if model["type"] == "Checkpoint":
            for version in model["modelVersions"]:
                made = version.get("publishedAt") or version.get("createdAt")
                for file in version["files"]:
                    if file["type"] in ("Model", "Pruned Model"):
                        for digest in file["hashes"].values():
                            row = {"id": version["id"], "made": made, "model": model["id"]}
                            found[digest] = min(
                                found.get(digest, row), row, key=lambda r: (r["made"], r["id"])
                            )
    return found


def plain_fate(item: dict[str, Any], by_hash: dict[str, dict[str, Any]], wanted: set[int]) -> str:
    """What becomes of a record before duplicates are looked for."""
    level = item.get("nsfwLevel") or item.get("nsfw")
    if level != "None":
        return "image_level"
    meta = {**left_in_prompts(item["meta"]), **item["meta"]}
    found = resolved(meta, by_hash)
    if found is None:
        return "checkpoint_resolved"
    if found["id"] not in wanted:
        return "checkpoint_kept"
    text = re.split(r"\s*Negative prompt:|\s*Steps: \d+, ", str(meta.get("prompt")))[0]
    tags = r"(?i)<(lora|lyco|lycoris|locon|dora|hypernet):[^<>:]+(:[^<>]*)?>"
    clean = re.sub(r"( ?,)+", ",", " ".join(re.sub(tags, " ", str(text or "")).split())).strip(" ,")
    if not clean or len(clean) > 4000:
        return "prompt"
    sampler = normalise(meta["sampler"]) if meta.get("sampler") else None
    renderable = sampler is not None and SAMPLERS[sampler].renderable
    return "kept" if renderable else "parameters_parsed"


def left_in_prompts(meta: dict[str, Any]) -> dict[str, Any]:
    """Settings that the site's parser missed, and left in a prompt as they were written."""
    texts = (str(meta.get(key)).replace("\\n", "\n") for key in ("prompt", "negativePrompt"))
    lines = (line for text in texts for line in text.splitlines())
    line = next((line for line in lines if re.search(r"\bSteps: \d+, ?Sampler: ", line)), "")
    fields = dict(re.findall(r"([A-Z][a-z ]+): ([^,]+)", line))
    return {"sampler": fields.get("Sampler"), "Model hash": fields.get("Model hash")}


def resolved(meta: dict[str, Any], by_hash: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    hashes = meta.get("hashes")
    resources = meta.get("resources") or []
    given = [
        meta.get("Model hash"),
        hashes.get("model") if isinstance(hashes, dict) else None,
        *(r.get("hash") for r in resources if isinstance(r, dict) and r.get("type") == "model"),
    ]
    found = (by_hash.get(str(digest).upper()) for digest in given if digest)
    return next((row for row in found if row), None)


def test_records_agree_with_a_plain_count(
    models: list[dict[str, Any]], images: list[dict[str, Any]], filtered: Artifact
) -> None:
    funnel = filtered.manifest.funnels[2]
    assert funnel.seen == len(images)
    dropped: Counter[str] = Counter()
    for step in funnel.steps:
        dropped[step.filter] += step.dropped
    by_hash, wanted = checkpoints_by_hash(models), kept_versions(models)
    fates = Counter(plain_fate(item, by_hash, wanted) for item in images)
    assert dropped["image_level"] == fates["image_level"]
    # The plain count does not read steps, scale and size, which few records lack or overdo.
    missing = ("no steps", "no cfg_scale", "no size")
    unread = dropped["parameters_in_range"] + sum(
        step.dropped for step in funnel.steps if step.reason in missing
    )
    read = dropped["parameters_parsed"] + dropped["parameters_in_range"] - unread
    assert fates["parameters_parsed"] <= read <= 1.3 * fates["parameters_parsed"]
    assert unread < 0.03 * funnel.seen
    # It knows no names, and takes the first of the versions that share a hash.
    doubtful = sum(
        step.dropped
        for step in funnel.steps
        if step.reason.endswith(("of several versions", "below the limit"))
    )
    dropped["kept"] = funnel.kept + dropped["duplicate"]
    unresolved = dropped["checkpoint_resolved"] - doubtful
    assert 0.8 * fates["checkpoint_resolved"] - unread <= unresolved
    assert unresolved <= fates["checkpoint_resolved"]
    for fate in ("kept", "checkpoint_kept"):
        assert fates[fate] - unread - doubtful <= dropped[fate] <= 1.3 * fates[fate]


def test_checkpoints_agree_with_the_annotation_and_the_showcase(
    models: list[dict[str, Any]], images: list[dict[str, Any]], filtered: Artifact
) -> None:
    rows = pq.read_table(filtered.file("records-00000.parquet")).to_pylist()
    truth = {item["id"]: item for item in images}
    here = {version["id"] for model in models for version in model["modelVersions"]}
    same, showcase, right = [], 0, 0
    for row in rows:
        item = truth[row["id"]]
        annotated = (item["_resolved_checkpoint"] or {}).get("modelVersionId")
        if annotated in here:
            same.append(annotated == row["version_id"])
        context = item["_context"]
        if context and context["modelType"] == "Checkpoint":
            showcase += 1
            right += context["modelId"] == row["model_id"]
    by_hash = sum(row["resolved_via"].startswith("hash") for row in rows)
    assert len(same) > 0.95 * by_hash > 0.85 * len(rows)
    assert sum(same) > 0.98 * len(same)
    assert right > 0.98 * showcase
    assert min(row["confidence"] for row in rows) >= FilterConfig().min_confidence


def test_the_dataset_holds_every_pair_once_without_leaks(filtered: Artifact) -> None:
    runtime = RuntimeConfig(store=str(filtered.path.parents[1]))
    made = build_dabench.run(DABenchConfig(), {"filtered": [filtered]}, runtime)
    rows = [(split, row) for split in SPLITS for row in read_split(made, split)]
    assert len({row["id"] for _, row in rows}) == len(rows) == filtered.manifest.rows["records"]
    assert verify_dabench(made.path).problems == []
    splits = [split for split, _ in rows]
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(splits.count(split) / len(rows) - share) < 0.05


def test_models_that_resolve_old_pictures_move_no_record(
    models: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The pictures stay, the models grow, as behind refreshes; filters change in between."""
    pictures = [as_api(item) for item in islice(dump("images"), 0, None, 3)]
    pictures = list({item["id"]: item for item in pictures}.values())
    pictures.sort(key=lambda item: int(item["id"]))
    grown = list(models)
    Random(7).shuffle(grown)
    runtime = RuntimeConfig(store=str(tmp_path / "store"))
    decided: dict[int, str] = {}
    for crawl, (count, level) in enumerate(((400, 1), (800, 31))):
        known = [
            {**model, "_generation": int(place >= 400)} for place, model in enumerate(grown[:count])
        ]
        for model in known:
            model["modelVersions"] = [
                {**version, "_generation": model["_generation"]}
                for version in model["modelVersions"]
            ]
        known.sort(key=lambda item: int(item["id"]))
        source = snapshot(tmp_path / f"snapshot-{crawl}", known, pictures)
        config = FilterConfig(max_image_nsfw_level=level)
        filtered = filter_records.run(config, {"snapshot": [source]}, runtime)
        made = build_dabench.run(DABenchConfig(), {"filtered": [filtered]}, runtime)
        now = {row["id"]: split for split in SPLITS for row in read_split(made, split)}
        assert {ident: now[ident] for ident in now.keys() & decided.keys()} == {
            ident: decided[ident] for ident in now.keys() & decided.keys()
        }
        decided |= now
    assert verify_dabench(made.path).problems == []
