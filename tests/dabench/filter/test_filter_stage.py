"""Every item is kept or dropped for one reason; each filter drops what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.dabench.filter.model_filters import ModelSift
from diffagent.dabench.filter.records import Dropped, PairBuilder
from diffagent.dabench.filter.resolve import Resolver
from diffagent.errors import ArtifactError
from diffagent.schemas.api import parse_api
from diffagent.schemas.manifest import Funnel
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.tables import CATALOGUE, PRINTS, RECORDS
from diffagent.store import Artifact
from diffagent.t2i.catalogue import Catalogue, rename
from diffagent.t2i.metadata import PARSER_VERSION
from tests.conftest import reseal
from tests.dabench.dabench_records import hashes, image, model, snapshot, version
from tests.t2i.metadata.test_comfy import graph, node

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def patched(base: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """``base`` with any of its keys replaced by any JSON, or removed."""
    return st.dictionaries(st.sampled_from(sorted(base)), JSON, max_size=3).map(
        lambda changes: {**base, **changes}
    )


#: A graph whose negative prompt comes from a node that nobody knows.
UNKNOWN_NEGATIVE = {
    "prompt": graph(
        **{
            "7": node("CLIPTextEncode", text=["20", 0], clip=["4", 1]),
            "20": node("Random Negative", text="noise", seed=1),
        }
    )
}
FILES = patched(version(1)["files"][0])
VERSIONS = st.lists(
    patched(version(1)) | FILES.map(lambda file: version(1, files=[file])), max_size=3
)
MODELS = VERSIONS.map(lambda versions: model(1, modelVersions=versions))


def sift(*models: Any, config: FilterConfig | None = None) -> tuple[ModelSift, Resolver]:
    resolver = Resolver()
    made = ModelSift(config or FilterConfig(), resolver)
    for item in models:
        made.add(item)
    return made, resolver


def builder(
    *models: Any, config: FilterConfig | None = None, dates: dict[int, str] | None = None
) -> PairBuilder:
    made, resolver = sift(*models, config=config)
    resolver.use(Catalogue(rename(made.entries)))
    return PairBuilder(config or FilterConfig(), resolver, dates)


def reasons(funnel: Funnel) -> list[tuple[str, str]]:
    funnel.check()
    return [(step.filter, step.reason) for step in funnel.steps]


@pytest.mark.parametrize(
    ("changes", "filter_name", "reason"),
    [
        ({"type": "Poses"}, "model_type", "Poses"),
        ({"modelVersions": [version(1, baseModel="SD 2.1")]}, "base_model", "SD 2.1"),
        (
            {"modelVersions": [version(1, baseModelType="Inpainting")]},
            "base_model",
            "SD 1.5 Inpainting",
        ),
        ({"modelVersions": [version(1, name="v1-inpainting")]}, "base_model", "SD 1.5 Inpainting"),
        ({"nsfw": True}, "nsfw", "nsfw"),
        ({"poi": True}, "nsfw", "real person"),
        ({"minor": True}, "nsfw", "minor"),
        ({"mode": "Archived"}, "file_availability", "archived"),
        ({"mode": "TakenDown"}, "file_availability", "taken down"),
        ({"availability": "Private"}, "file_availability", "availability Private"),
        ({"modelVersions": []}, "file_availability", "no files"),
        ({"modelVersions": [version(1, files=[])]}, "file_availability", "no files"),
        (
            {"modelVersions": [version(1, usageControl="Generation")]},
            "file_availability",
            "download not allowed",
        ),
    ],
)
def test_each_filter(changes: dict[str, Any], filter_name: str, reason: str) -> None:
    made, _ = sift(model(1, **changes))
    assert reasons(made.models.result()) == [(filter_name, reason)]
    assert made.entries == []


def test_what_is_gone_from_the_site_is_not_available() -> None:
    two = model(3, modelVersions=[version(300), version(301)])
    made = ModelSift(FilterConfig(), Resolver(), {("models", 1), ("versions", 300)})
    for item in (model(1), model(2), two):
        made.add(item)
    assert [entry.version_id for entry in made.entries] == [200, 301]
    assert reasons(made.models.result()) == [("file_availability", "gone from the site")]
    assert made.distributions["file_availability"]["gone from the site"] == 2


def test_a_model_is_dropped_for_the_reason_of_its_furthest_version() -> None:
    versions = [version(1, baseModel="SD 2.1"), version(2, files=[]), version(3, baseModel="Pony")]
    made, _ = sift(model(1, modelVersions=versions))
    assert reasons(made.models.result()) == [("file_availability", "no files")]
    assert made.versions.result().seen == 3


def test_one_good_version_keeps_the_model() -> None:
    made, _ = sift(model(1, modelVersions=[version(1, baseModel="SD 2.1"), version(2)]))
    assert made.models.result().kept == 1
    assert made.versions.result().kept == 1
    assert made.distributions["base_model"] == {"SD 2.1": 1, "SD 1.5": 1}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.none() | patched(model(1)) | MODELS, max_size=4))
def test_model_funnels_add_up_for_any_json(models: list[dict[str, Any] | None]) -> None:
    # The snapshot's reader hands out integer ids, each once.
    items = [item and {**item, "id": number} for number, item in enumerate(models)]
    made, _ = sift(*items)
    funnel = made.models.result()
    funnel.check()
    made.versions.result().check()
    assert funnel.seen == len(models)
    Catalogue(rename(made.entries)).to_table()


def dropped(found: object) -> tuple[str, str]:
    assert isinstance(found, Dropped), found
    return found.filter, found.reason


@pytest.mark.parametrize(
    ("item", "filter_name", "reason"),
    [
        (None, "record", "not an object with an id"),
        ({**image(1), "type": "video"}, "media_type", "video"),
        ({**image(1), "nsfwLevel": "Soft"}, "image_level", "level above the limit"),
        ({**image(1), "nsfwLevel": 4}, "image_level", "level above the limit"),
        ({**image(1), "browsingLevel": 2}, "image_level", "level above the limit"),
        ({**image(1), "nsfwLevel": None}, "image_level", "level unknown"),
        ({**image(1), "minor": True}, "image_level", "minor"),
        ({**image(1), "meta": None}, "checkpoint_resolved", "no metadata"),
        (image(1, prompt="<lora:x:1>"), "prompt", "no prompt"),
        (image(1, sampler=None), "parameters_parsed", "no sampler"),
        (image(1, sampler="Shapes 9000"), "parameters_parsed", "unknown sampler"),
        (
            image(1, sampler="DPM adaptive"),
            "parameters_parsed",
            "sampler without a diffusers scheduler",
        ),
        (image(1, steps="many"), "parameters_parsed", "no steps"),
        (image(1, cfgScale=None), "parameters_parsed", "no cfg_scale"),
        (
            image(1, prompt="a blue star on sand <lora:x:0.0.8>"),
            "parameters_parsed",
            "loras not known",
        ),
        (
            image(1, comfy=UNKNOWN_NEGATIVE, negativePrompt="noise"),
            "parameters_parsed",
            "negative_prompt not known",
        ),
        (image(1, steps=0), "parameters_in_range", "steps"),
        (image(1, cfgScale=99), "parameters_in_range", "cfg_scale"),
        (image(1, Size="8x512"), "parameters_in_range", "width"),
        (image(1, 999), "checkpoint_resolved", "hash not in the snapshot"),
        (image(1, **{"Model hash": None}), "checkpoint_resolved", "nothing names a model"),
        (image(1, 200), "checkpoint_kept", "base_model: SD 2.1"),
    ],
)
def test_each_record_filter(item: Any, filter_name: str, reason: str) -> None:
    other = model(2, modelVersions=[version(200, baseModel="SD 2.1")])
    assert dropped(builder(model(1), other).build(item).row) == (filter_name, reason)


def test_a_pair_names_the_catalogue_and_round_trips() -> None:
    made = builder(model(1)).build(image(7)).row
    assert isinstance(made, dict)
    api = parse_api(made["api"])
    assert api.to_json() == made["api"]
    assert (api.model, api.version) == ("Synthetic 1", "v100")
    assert api.air == "urn:air:sd1:checkpoint:civitai:1@100"
    assert api.params.seed == 7
    assert api.description == "Synthetic model 1."
    assert (made["resolved_via"], made["reactions"], made["nsfw_level"]) == ("hash", 3, 1)


def test_evidence_is_kept() -> None:
    item = image(7, prompt="a shape <lora:none:1>, (fog:1.2)", **{"Denoising strength": "0.5"})
    item |= {"createdAt": "2024-01-02T00:00:00Z", "username": "nobody", "_generation": 2}
    made = builder(model(1), dates={0: "2026-01-01", 2: "2026-03-01"}).build(item).row
    assert isinstance(made, dict)
    assert made["negative_prompt_raw"] == "blurry"
    assert (made["from_image"], made["size_from_image"]) == (True, False)
    assert (made["nsfw_level"], made["nsfw_source"]) == (1, "nsfwLevel")
    assert made["reaction_counts"] == {"like": 2, "heart": 1, "laugh": 0, "cry": 0}
    assert (made["generation"], made["first_seen"]) == (2, "2026-03-01")
    assert (made["created_at"], made["creator"]) == ("2024-01-02T00:00:00Z", "nobody")
    assert (made["form"], made["parser"]) == ("a1111", PARSER_VERSION)


def test_a_record_is_as_young_as_its_checkpoint() -> None:
    late = model(1, modelVersions=[version(100, _generation=3)])
    found = builder(late).build({**image(1), "_generation": 1})
    assert isinstance(found.row, dict) and found.fingerprint
    assert found.row["generation"] == found.fingerprint["generation"] == 3


def test_what_filters_drop_has_a_fingerprint_when_its_checkpoint_is_known() -> None:
    pairs = builder(model(1), model(2, modelVersions=[version(200, baseModel="SD 2.1")]))
    for item, base in ((image(1, 200), "SD 2.1"), ({**image(1), "nsfwLevel": "X"}, "SD 1.5")):
        found = pairs.build(item)
        assert isinstance(found.row, Dropped) and found.fingerprint
        assert (found.fingerprint["kept"], found.fingerprint["base_model"]) == (False, base)
    assert pairs.build(image(1, 999)).fingerprint is None
    assert pairs.build(image(1, prompt="")).fingerprint is None


def test_same_prompt_and_api_is_a_duplicate_whatever_the_seed(tmp_path: Path) -> None:
    images = [image(1, prompt="A shape"), image(2, prompt="a  shape"), image(3, prompt="a shape")]
    images[2]["meta"]["steps"] = 21
    made = run(tmp_path, [model(1)], images)
    assert reasons(made.manifest.funnels[2]) == [("duplicate", "same prompt and API")]
    prints = pq.read_table(made.file("prints.parquet"))
    assert prints.schema.equals(PRINTS)
    assert prints["kept"].to_pylist() == [True, False, True]
    every = tuple(name for name in FilterConfig().records if name != "duplicate")
    made = run(tmp_path, [model(1)], images, config=FilterConfig(records=every))
    assert made.manifest.rows["records"] == 3


@pytest.mark.parametrize(
    ("name", "item", "reason"),
    [
        ("text_to_image", image(1, **{"Denoising strength": 0.4}), "began with a picture"),
        ("size_stated", image(1, Size=None), "size of the picture only"),
        ("networks_complete", image(1, prompt="x <lora:a:1>"), "a LoRA that the catalogue lacks"),
        ("reactions", {**image(1), "stats": None}, "too few reactions"),
    ],
)
def test_filters_that_can_be_added(name: Any, item: Any, reason: str) -> None:
    config = FilterConfig(records=(name, *FilterConfig().records))
    assert dropped(builder(model(1), config=config).build(item).row) == (name, reason)
    assert isinstance(builder(model(1)).build(item).row, dict)
    assert isinstance(builder(model(1), config=config).build(image(1)).row, dict)


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({"allowCommercialUse": []}, {}, "commercial use no"),
        ({"allowCommercialUse": None}, {}, "commercial use unknown"),
        ({"allowCommercialUse": None}, {"commercial_use": ("yes", "unknown")}, None),
        ({"modelVersions": [version(1, stats=None)]}, {}, "downloads not stated"),
        ({"modelVersions": [version(1, stats={"downloadCount": 0})]}, {}, "too few downloads"),
        ({"modelVersions": [version(1, stats={})]}, {"min_downloads": 0}, None),
        (
            {"modelVersions": [version(1, baseModel="Flux.1 D")]},
            {"base_models": ("all",)},
            "commercial use no (FLUX.1 [dev] Non-Commercial License)",
        ),
    ],
)
def test_model_filters_that_can_be_added(
    changes: dict[str, Any], options: dict[str, Any], reason: str | None
) -> None:
    config = FilterConfig(models=(*FilterConfig().models, "licence", "downloads"), **options)
    made, _ = sift(model(1, **changes), config=config)
    assert [found for _, found in reasons(made.models.result())] == ([reason] if reason else [])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"models": ("model_type",)}, "lacks nsfw, file_availability"),
        ({"records": ("media_type",)}, "lacks image_level, checkpoint_resolved"),
        ({"records": ("duplicate", *FilterConfig().records[:-1])}, "must be the last"),
        ({"records": ("prompt", *FilterConfig().records)}, "has prompt twice"),
        ({"records": ("shape",)}, "media_type"),  # lists what there is
    ],
)
def test_a_choice_of_filters_that_cannot_work_is_refused(options: Any, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        FilterConfig(**options)


def test_the_first_filter_of_the_config_has_the_first_say() -> None:
    item = {**image(1, 999), "type": "video"}
    media, level, resolved, *rest = FilterConfig().records
    turned = FilterConfig(records=(resolved, level, media, *rest))
    assert dropped(builder(model(1)).build(item).row)[0] == "media_type"
    assert dropped(builder(model(1), config=turned).build(item).row)[0] == "checkpoint_resolved"


def test_a_shared_hash_is_no_guess() -> None:
    late = version(100, publishedAt="2023-06-01")
    early = version(200, publishedAt="2023-01-01")
    early["files"][0]["hashes"] = hashes(100)
    models = (model(1, modelVersions=[late]), model(2, modelVersions=[early]))
    assert dropped(builder(*models).build(image(1)).row) == (
        "checkpoint_resolved",
        "hash of several versions",
    )
    made = builder(*models, config=FilterConfig(min_confidence=0.4)).build(image(1)).row
    assert isinstance(made, dict)
    assert [candidate["version_id"] for candidate in made["candidates"]] == [200, 100]
    assert made["confidence"] == made["candidates"][1]["confidence"] < 0.5


def test_ids_win_over_hashes_and_by_hash_comes_last() -> None:
    asked = []

    def lookup(digest: str) -> int | None:
        asked.append(digest)
        return 100

    resolver = Resolver(lookup)
    made = ModelSift(FilterConfig(), resolver)
    made.add(model(1))
    resolver.use(Catalogue(rename(made.entries)))
    pairs = PairBuilder(FilterConfig(), resolver)
    resource = [{"type": "checkpoint", "modelVersionId": 100}]
    found = pairs.build(image(1, 999, civitaiResources=resource)).row
    assert isinstance(found, dict)
    assert (found["resolved_via"], asked) == ("civitaiResources", [])
    found = pairs.build(image(2, 999)).row
    assert isinstance(found, dict)
    assert (found["resolved_via"], asked) == ("by-hash", [hashes(999)["AutoV2"]])


def test_loras_move_from_the_prompt_into_the_api() -> None:
    ink = model(3, type="LORA", name="Ink", modelVersions=[version(300)])
    other = model(4, type="LORA", modelVersions=[version(400, baseModel="SDXL 1.0")])
    pairs = builder(model(1), ink, other)
    tags = "<lora:file300:0.6> <lora:file400:1> <lora:nobody:1> <lora:File300.safetensors:1>"
    found = pairs.build(image(1, prompt=f"a shape {tags}"))
    made = found.row
    assert isinstance(made, dict)
    assert made["prompt"] == "a shape"
    assert [(x.model, x.weight) for x in parse_api(made["api"]).loras] == [("Ink", 0.6)]
    assert made["loras_dropped"] == 3
    assert sorted(found.loras) == [
        "file name unknown",
        "kept by file name",
        "made for another base model",
        "named twice",
    ]


def test_embeddings_move_into_the_api() -> None:
    fog = model(3, type="TextualInversion", name="Fog", modelVersions=[version(300)])
    pairs = builder(model(1), fog)
    hashes = {"embed:file300": "0123456789ab", "embed:nobody": "ba9876543210"}
    made = pairs.build(image(1, negativePrompt="blurry, file300, nobody", hashes=hashes)).row
    assert isinstance(made, dict)
    api = parse_api(made["api"])
    assert [(x.model, x.negative) for x in api.embeddings] == [("Fog", True)]
    assert api.negative_prompt == "blurry"
    assert made["negative_prompt_raw"] == "blurry, file300, nobody"
    assert made["embeddings_dropped"] == 1
    assert [x["name"] for x in made["embeddings_raw"]] == ["file300", "nobody"]


@settings(max_examples=100, deadline=None)
@given(patched(image(1)), patched(image(1)["meta"]))
def test_building_never_raises_and_rows_fit_the_schema(item: Any, meta: Any) -> None:
    for record in (item, {**image(2), "meta": meta}):
        found = builder(model(1)).build({**record, "id": 3}).row
        if not isinstance(found, Dropped):
            pa.RecordBatch.from_pylist([found], schema=RECORDS).validate(full=True)


def run(
    directory: Path,
    models: list[Any],
    images: list[Any],
    *,
    config: FilterConfig | None = None,
    **options: Any,
) -> Artifact:
    source = snapshot(
        directory / f"snapshot{len(list(directory.glob('*')))}", models, images, **options
    )
    runtime = RuntimeConfig(store=str(directory / "store"))
    return filter_records.run(config or FilterConfig(), {"snapshot": [source]}, runtime)


def test_stage_accounts_for_every_line(tmp_path: Path) -> None:
    images = [image(1), image(1), b"{broken\n", b"7\n", image(2, 999), image(3)]
    made = run(tmp_path, [model(1), b"[]\n", model(2, nsfw=True)], images)
    models, versions, records = made.manifest.funnels
    assert (models.seen, models.kept, versions.seen) == (3, 1, 2)
    assert (records.seen, records.kept) == (5, 2)  # the repeated item is no record of its own
    assert pq.read_schema(made.file("catalogue.parquet")).equals(CATALOGUE)
    table = pq.read_table(made.file("records-00000.parquet"))
    assert table.schema.equals(RECORDS)
    assert table["id"].to_pylist() == [1, 3]
    distributions = orjson.loads(made.file("distributions.json").read_bytes())
    assert distributions["nsfw"]["counts"] == {"none of these": 1, "nsfw": 1}


def test_files_do_not_depend_on_how_the_snapshot_is_cut(tmp_path: Path) -> None:
    models, images = [model(1), model(2)], [image(n) for n in range(9)]
    one = run(tmp_path / "one", models, images)
    other = run(tmp_path / "other", models, images, parts=2)
    assert one.content_digest == other.content_digest


def test_a_snapshot_of_nothing_usable_gives_empty_tables(tmp_path: Path) -> None:
    made = run(tmp_path, [model(1)], [image(1, 999), image(2, prompt="")])
    for name, schema in (("records-00000", RECORDS), ("prints", PRINTS)):
        table = pq.read_table(made.file(f"{name}.parquet"))
        assert (table.num_rows, table.schema.equals(schema)) == (0, True)


def test_files_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [image(n // 2, prompt=f"a shape of {n % 700}") for n in range(5000)]
    one = run(tmp_path / "one", [model(1)], images)
    monkeypatch.setattr("diffagent.dabench.filter.filter_stage._SMALL", 0)
    other = run(tmp_path / "other", [model(1)], images)
    assert one.content_digest == other.content_digest
    assert one.manifest.funnels == other.manifest.funnels
    assert one.manifest.funnels[2].seen == 2500
    with pytest.raises(ArtifactError, match="sorted by id"):
        run(tmp_path / "bad", [model(1)], [*images, image(1)])


def test_disorder_and_damage_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="sorted by id"):
        run(tmp_path / "a", [model(2), model(1)], [])
    source = snapshot(tmp_path / "b", [model(1)], [image(1)])
    path = source.path / "images" / "00000.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-12] + bytes(12))
    reseal(source)
    with pytest.raises(ArtifactError, match="crawl again"):
        filter_records.run(
            FilterConfig(), {"snapshot": [source]}, RuntimeConfig(store=str(tmp_path / "store"))
        )


def test_nothing_kept_is_an_error_that_names_the_settings(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"filters\.base_models"):
        run(tmp_path, [model(1, type="Other")], [])
