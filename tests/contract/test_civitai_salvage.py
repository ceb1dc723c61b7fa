"""A damaged snapshot is set aside, and nothing that can be had is lost with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffagent.crawl import snapshot as snapshots
from diffagent.schemas.payloads import content
from diffagent.store import Artifact, verify_artifact
from tests.contract.conftest import synthetic_image, synthetic_model
from tests.contract.test_civitai_crawl import rows
from tests.contract.test_civitai_refresh import World, generations, run, tombstones

Damage = Callable[[Path], None]


def cut(name: str) -> Damage:
    def damage(snapshot: Path) -> None:
        data = (snapshot / name).read_bytes()
        (snapshot / name).write_bytes(data[: len(data) * 2 // 3])

    return damage


def flip(name: str) -> Damage:
    def damage(snapshot: Path) -> None:
        data = bytearray((snapshot / name).read_bytes())
        data[len(data) // 2] ^= 255
        (snapshot / name).write_bytes(data)

    return damage


def remove(name: str) -> Damage:
    return lambda snapshot: (snapshot / name).unlink()


MODELS, IMAGES = "models/part-00000.jsonl.gz", "images/part-00000.jsonl.gz"
GONE, GENERATIONS = "gone/part-00000.jsonl.gz", "generations.jsonl"
DAMAGES = {
    f"{damage.__name__} {name.partition('/')[0]}": damage(name)
    for damage in (cut, flip, remove)
    for name in (MODELS, IMAGES, GONE, GENERATIONS)
} | {"manifest": remove("manifest.json"), "changes": flip("changes.json")}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    """A site whose snapshot has tombstones and two generations, in small gzip members."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "_MEMBER_BYTES", 20_000)
        world, store = World(models=60, images=300), tmp_path_factory.mktemp("grown")
        run(world, store)
        del world.models[3], world.images[10_100]
        world.models[61], world.images[10_900] = synthetic_model(61), synthetic_image(900)
        run(world, store, reconcile=True)
    return world, store


def snapshot_in(store: Path) -> Path:
    """The one that is neither older nor damaged."""
    return next(
        p.parent for p in store.glob("crawl/[0-9a-f]*/manifest.json") if "." not in p.parent.name
    )


@pytest.mark.parametrize("alone", [False, True], ids=["with an older one", "alone"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_tombstones_generations_and_good_records_outlive_damage(
    grown: tuple[World, Path], tmp_path: Path, damage: Damage, alone: bool
) -> None:
    world, kept = grown
    store = tmp_path / "store"
    shutil.copytree(kept, store)
    whole = Artifact(stage="crawl", identity="", content_digest="", path=snapshot_in(kept))
    damaged = snapshot_in(store)
    if alone:
        for path in damaged.parent.glob(f"{damaged.name}.*"):
            if path.is_dir():
                shutil.rmtree(path)
    damage(damaged)
    left = {p.relative_to(damaged): p.read_bytes() for p in damaged.rglob("*") if p.is_file()}

    made = run(world, store)
    aside = damaged.with_name(f"{damaged.name}.damaged-1")
    assert {p.relative_to(aside): p.read_bytes() for p in aside.rglob("*") if p.is_file()} == left
    report = made.manifest.metrics["salvaged"]
    assert report["from"] == aside.name and report["damaged_files"]

    def contents(snapshot: Artifact, kind: str) -> dict[int, object]:
        return {item["id"]: content(item) for item in rows(snapshot, kind)}

    for kind in ("models", "images"):
        old, new = contents(whole, kind), contents(made, kind)
        lost = old.keys() - new.keys()
        # Alone, what the site has no more can be lost with the part that held it.
        assert lost <= ({3, 10_100} if alone else set())
        assert all(new[i] == item for i, item in old.items() if i not in lost)
        assert new.keys() <= old.keys()
    assert tombstones(made) == tombstones(whole) == {("models", 3), ("images", 10_100)}
    before = generations(whole)
    for kind, items in generations(made).items():
        assert items == {i: before[kind][i] for i in items}
    assert not list(made.glob("salvaged*")) and not list(store.glob("crawl/.*partial"))

    again = run(world, store)
    assert again == made, "nothing new"


def test_what_is_lost_is_counted_and_told(
    grown: tuple[World, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world, kept = grown
    shutil.copytree(kept, tmp_path / "store")
    damaged = snapshot_in(tmp_path / "store")
    shutil.rmtree(next(p for p in damaged.parent.glob(f"{damaged.name}.*") if p.is_dir()))
    flip(IMAGES)(damaged)
    made = run(world, tmp_path / "store")
    report = made.manifest.metrics["salvaged"]
    assert 0 < report["lost"]["images"] < 100, "the members around the damage are kept"
    assert report["kept"]["images"] + report["lost"]["images"] == 299
    assert report["lost"]["models"] == report["lost"]["versions"] == 0
    assert report["damaged_files"] == {IMAGES: "not as it was written"}
    assert "set aside as" in caplog.text and "walk through all listings" in caplog.text


def test_damage_is_set_aside_again_and_again(tmp_path: Path) -> None:
    world = World(models=20, images=20)
    first = run(world, tmp_path)
    for number in (1, 2, 3):
        flip(MODELS)(first.path)
        made = run(world, tmp_path)
        assert made.content_digest == first.content_digest
        assert made.manifest.metrics["salvaged"]["from"].endswith(f".damaged-{number}")
    assert len(list(tmp_path.glob("crawl/*.damaged-*"))) == 3


def test_a_remote_store_is_asked_first(tmp_path: Path) -> None:
    world, store = World(models=20, images=20), (tmp_path / "store").as_uri()
    first = run(world, store, cache=str(tmp_path / "cache"))
    flip(IMAGES)(first.path)
    again = run(world, store, cache=str(tmp_path / "cache"))
    assert again == first, "nothing new, nothing lost"
    assert not list(first.path.parent.glob("*.damaged-*")), "the store has it whole"
    verify_artifact(first)
