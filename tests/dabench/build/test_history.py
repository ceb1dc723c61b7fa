"""A decided record keeps its split: whatever grows, resolves, changes, goes and comes back."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from diffagent.cli.main import app
from diffagent.dabench.build import card
from diffagent.dabench.build.history import SPLITS_FILE, read_decisions, write_decisions
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.shard_stage import KNOWN_APART, NEW_APART, build_dabench, read_split
from diffagent.dabench.build.splits import ENOUGH_GROUPS, NO_SPLIT, SPLITS, Decisions, Prints
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.dabench.parquet_tables import write_table
from diffagent.dabench.tools.dataset_checks import verify_dabench
from diffagent.errors import ArtifactError
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.tables import DECISIONS
from diffagent.store import MANIFEST, PREVIOUS, Artifact, open_artifact
from diffagent.store.inventory import read_inventory, superseded
from diffagent.store.lineage import ancestors, lineage_lines
from tests.dabench.build.test_splits import CONFIG, ROW, Row, row, tied, write_prints
from tests.dabench.dabench_records import image, model, snapshot
from tests.dabench.dabench_sets import sign

#: Growth: after each crawl what is there. A record that comes again may have changed altogether.
CRAWLS = st.lists(
    st.dictionaries(st.integers(0, 40), ROW, min_size=1, max_size=12), min_size=2, max_size=4
)


def decide(rows: list[Row], before: Decisions) -> tuple[dict[int, int], Decisions]:
    """The split of each row, and what is decided then, written to a file and read again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_prints(path / "prints.parquet", rows)
        with closing(Prints(path / "prints.parquet", CONFIG, path / "scratch")) as prints:
            made = prints.splits(before)
            write_decisions(path / SPLITS_FILE, before, prints, made)
        handle = Artifact(stage="shard", identity="0", content_digest="0", path=path)
        splits = dict(zip([r["id"] for r in rows], made.split.tolist(), strict=True))
        return splits, read_decisions([handle])


def by_id(rows: Mapping[int, Row]) -> list[Row]:
    return [{**rows[ident], "id": ident} for ident in sorted(rows)]


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CRAWLS, st.sampled_from([2, ENOUGH_GROUPS]), st.data())
def test_no_record_ever_moves_and_nothing_straddles(
    crawls: list[dict[int, Row]], enough: int, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "diffagent.dabench.build.splits.ENOUGH_GROUPS", enough
        )  # with cut points of their own, and giants
        grow(crawls, data)


def grow(crawls: list[dict[int, Row]], data: st.DataObject) -> None:
    before, decided, there = Decisions(), dict[int, int](), dict[int, Row]()
    for crawl in crawls:
        gone = data.draw(st.sets(st.sampled_from(sorted(there)))) if there else set()
        there = {ident: r for ident, r in {**there, **crawl}.items() if ident not in gone}
        rows = by_id(there)
        if not rows:
            continue
        splits, after = decide(rows, before)
        assert decide(rows, before)[0] == splits
        inside = {ident: split for ident, split in splits.items() if split != NO_SPLIT}
        assert {i: s for i, s in inside.items() if i in decided} == {
            i: decided[i] for i in inside.keys() & decided.keys()
        }
        for one, other in combinations([r for r in rows if r["id"] in inside], 2):
            assert inside[one["id"]] == inside[other["id"]] or not tied(one, other)
        decided |= inside
        assert dict(zip(after.ids.tolist(), after.split.tolist(), strict=True)) == decided
        groups: dict[int, set[int]] = {}
        for name, split in zip(after.group.tolist(), after.split.tolist(), strict=True):
            groups.setdefault(name, set()).add(split)
        assert all(len(found) == 1 for found in groups.values())
        before = after


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.integers(0, 60), ROW, min_size=1, max_size=16))
def test_decided_crawl_by_crawl_is_decided_at_once(rows: dict[int, Row]) -> None:
    """A clone that begins with today's snapshot decides what its refreshes would have."""
    whole = decide(by_id(rows), Decisions())
    before = Decisions()
    for generation in (0, 1, 2):
        part = {i: r for i, r in rows.items() if r["generation"] <= generation}
        if part:
            splits, before = decide(by_id(part), before)
    assert splits == whole[0]
    assert all(
        np.array_equal(getattr(before, n), getattr(whole[1], n)) for n in ("ids", "group", "age")
    )
    assert before.cuts == whole[1].cuts


def test_cut_points_stay_when_old_pictures_resolve_later() -> None:
    """The groups of a generation become more; those that were there are not cut anew."""
    rows = {n: row(n, f"w{n} x{n} y{n}") for n in range(0, 240, 2)}
    splits, before = decide(by_id(rows), Decisions())
    assert before.cuts
    late = {n: row(n, f"w{n} x{n} y{n}") for n in range(1, 2000, 2)}
    after, later = decide(by_id(rows | late), before)
    assert {n: after[n] for n in rows} == splits and later.cuts == before.cuts
    assert len(set(after.values())) == 3


def test_of_two_that_became_alike_the_held_out_one_is_left_out() -> None:
    rows = {n: row(n, f"w{n} x{n} y{n}") for n in range(30)}
    splits, before = decide(by_id(rows), Decisions())
    train, test = ([n for n, s in splits.items() if s == code] for code in (0, 2))
    a, b, c = train[0], test[0], test[1]
    both = {n: {**rows[n], "prompt": "one and the same"} for n in (a, b)}
    changed, later = decide(by_id(rows | both), before)
    assert changed == splits | {b: NO_SPLIT}
    assert decide(by_id(rows), later)[0] == splits, "it comes back when it is itself again"
    now = {c: {**rows[c], "prompt": rows[a]["prompt"]}}
    assert decide(by_id(rows | now), before)[0] == splits | {c: NO_SPLIT}


# The stages: snapshots of one site, one after the other, in one store.

DABENCH = DABenchConfig(validation_fraction=0.3, test_fraction=0.3, rows_per_shard=10)
THINGS = ("red square", "blue star", "green circle", "tall ship")


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "_plot", lambda path, title, distribution: None)


class Site:
    """A site that changes, and a store with the datasets that were made of it."""

    def __init__(self, directory: Path, store: str = "") -> None:
        self.directory = directory
        self.runtime = RuntimeConfig(store=store or str(directory / "store"))
        self.models = {1: model(1)}
        self.images: dict[int, dict[str, Any]] = {}
        self._crawls = 0

    def post(self, ident: int, prompt: str, model_id: int = 1, **changes: Any) -> None:
        made = image(ident, model_id * 100, prompt=prompt, steps=10 + ident % 40)
        self.images[ident] = {**made, **changes}

    def crawl(self) -> Artifact:
        self._crawls += 1
        return snapshot(
            self.directory / f"snapshot-{self._crawls}",
            [self.models[ident] for ident in sorted(self.models)],
            [self.images[ident] for ident in sorted(self.images)],
        )

    def build(
        self, source: Artifact | None = None, config: DABenchConfig = DABENCH, **filters: Any
    ) -> Artifact:
        source = source or self.crawl()
        filtered = filter_records.run(FilterConfig(**filters), {"snapshot": [source]}, self.runtime)
        return build_dabench.run(config, {"filtered": [filtered]}, self.runtime)


def splits_of(dabench: Artifact) -> dict[int, str]:
    return {row["id"]: split for split in SPLITS for row in read_split(dabench, split)}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    for number in range(40):
        made.post(number, f"{THINGS[number % 4]} number {number // 8} of shape {number}")
    return made


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_growth_of_models_pictures_resolutions_and_deletions(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made, decided = Site(Path(folder)), dict[int, str]()
        for step in range(3):
            for ident in data.draw(st.sets(st.integers(0, 30), max_size=15)):
                thing = data.draw(st.sampled_from(THINGS))
                words = data.draw(st.integers(0, 6))
                made.post(
                    ident,
                    f"{thing} number {words} of many {thing} {words} shapes",
                    data.draw(st.integers(1, 3)),
                    postId=data.draw(st.none() | st.integers(0, 9)),
                    _generation=min(step, made.images.get(ident, {}).get("_generation", step)),
                )
            for ident in data.draw(st.sets(st.integers(0, 30), max_size=5)):
                made.images.pop(ident, None)
            there = data.draw(st.sets(st.integers(2, 3)))
            made.models = {n: model(n, _generation=step) for n in {1} | there}
            try:
                dabench = made.build(min_steps=data.draw(st.sampled_from([1, 20])))
            except ArtifactError as error:
                assert "holds no pairs" in str(error)
                continue
            now = splits_of(dabench)
            assert {i: s for i, s in now.items() if i in decided} == {
                i: decided[i] for i in now.keys() & decided.keys()
            }
            verdict = verify_dabench(dabench.path)
            assert verdict.problems == []
            compared = any("against those of" in text for text in verdict.checked)
            assert compared == bool(dabench.manifest.inputs[PREVIOUS])
            decided |= now


def test_a_model_that_resolves_old_pictures_moves_nothing(site: Site) -> None:
    """The fault that was found: keep the pictures, grow the models."""
    for number in range(1000, 1300):
        site.post(number, f"w{number} x{number} y{number} z{number}", 1 + number % 3)
    first = site.build()
    site.models = {n: model(n, _generation=n - 1) for n in (1, 2)}
    second = site.build()
    site.models[3] = model(3, _generation=2)
    third = site.build()
    a, b, c = (splits_of(dabench) for dabench in (first, second, third))
    assert len(a) < len(b) < len(c) == 340
    assert {i: b[i] for i in a} == a and {i: c[i] for i in b} == b
    assert third.manifest.inputs[PREVIOUS][0].content_digest == second.content_digest


def test_filters_do_not_matter(site: Site, tmp_path: Path) -> None:
    source = site.crawl()
    few = site.build(source, min_steps=30)
    every = site.build(source)
    fresh = Site(tmp_path / "fresh").build(source)
    assert len(splits_of(few)) < len(splits_of(every))
    assert splits_of(few).items() <= splits_of(every).items()
    assert every.content_digest == fresh.content_digest, "as if it had been the first"
    assert site.build(source, min_steps=30) == few, "a request that was answered is cached"
    none_left = site.build(min_steps=45)
    assert splits_of(none_left).items() <= splits_of(every).items()


def test_a_record_that_was_away_comes_back_to_its_split(site: Site) -> None:
    first = splits_of(site.build())
    away = [ident for ident, split in first.items() if split != "train"]
    images = {ident: site.images.pop(ident) for ident in away}
    assert splits_of(site.build()).keys() == first.keys() - set(away)
    site.images |= images
    assert splits_of(site.build()) == first


def test_what_links_two_splits_is_left_out_and_counted(site: Site) -> None:
    site.post(900, "an old castle on a hill by the sea", postId=1)
    first = splits_of(site.build())
    old = next(ident for ident, split in first.items() if split != first[900])
    prompt = site.images[old]["meta"]["prompt"]
    site.post(901, prompt, postId=1, _generation=1)
    dabench = site.build()
    assert splits_of(dabench) == first
    (step,) = dabench.manifest.funnels[-1].steps
    assert (step.filter, step.reason, step.dropped) == ("splits", NEW_APART, 1)
    held_out = next(ident for ident, split in first.items() if split == "test")
    train = next(ident for ident, split in first.items() if split == "train" and ident != 900)
    site.images.pop(901)
    site.post(held_out, site.images[train]["meta"]["prompt"])
    dabench = site.build()
    left = {ident: split for ident, split in first.items() if ident != held_out}
    assert splits_of(dabench) == left
    (step,) = dabench.manifest.funnels[-1].steps
    assert (step.filter, step.reason, step.dropped) == ("splits", KNOWN_APART, 1)


def test_a_memory_that_contradicts_the_shards_stops_the_stage(site: Site) -> None:
    first = site.build()
    path = first.path / SPLITS_FILE
    table = pq.read_table(path)
    place = table["split"].to_pylist().index("test")
    splits = table["split"].to_pylist()
    splits[place] = "train"
    ident = table["id"][place].as_py()
    changed = table.set_column(1, DECISIONS.field("split"), pa.array(splits))
    write_table(path, changed.replace_schema_metadata(pq.read_schema(path).metadata))
    sign(first.path)
    assert verify_dabench(first.path).totals == {"decided otherwise": 1}
    site.post(2000, "something new")
    with pytest.raises(ArtifactError) as error:
        site.build()
    assert "1 records would move to another split" in str(error.value)
    assert f"{ident} (test -> train)" in str(error.value)
    assert str(first.path) in str(error.value) and "delete its directory" in str(error.value)


def test_verify_names_what_moved(site: Site, tmp_path: Path) -> None:
    first = site.build()
    copy = Path(shutil.copytree(first.path, tmp_path / "copy"))
    (shard,) = (path for path in sorted((copy / "data").glob("test-*")) if "00000-of" in path.name)
    row_of = pq.read_table(shard).slice(0, 1)
    train = sorted((copy / "data").glob("train-*"))[0]
    both = pa.concat_tables([pq.read_table(train), row_of.cast(pq.read_schema(train))])
    write_table(train, both)
    write_table(shard, pq.read_table(shard).slice(1))
    (copy / SPLITS_FILE).unlink()
    sign(copy)
    ident = str(row_of["id"][0].as_py())
    result = CliRunner().invoke(
        app, ["dabench", "verify", str(copy), "--no-leaks", "--before", str(first.path)]
    )
    assert result.exit_code == 1
    assert "moved since the version before: 1" in result.output
    assert f"'{ident}': test in" in result.output and "train here" in result.output
    assert "to undo it, delete this version" in result.output


def test_a_damaged_memory_is_named(site: Site, tmp_path: Path) -> None:
    first = site.build()
    copy = Path(shutil.copytree(first.path, tmp_path / "copy"))
    for directory in (copy, first.path):
        (directory / SPLITS_FILE).write_bytes(
            b"PAR1" + bytes((first.path / SPLITS_FILE).stat().st_size - 4)
        )
    assert set(verify_dabench(copy).totals) == {"file digest", "file unreadable"}
    site.post(2000, "something new")
    with pytest.raises(ArtifactError, match=r"splits.parquet' is damaged"):
        site.build()


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / MANIFEST).read_bytes())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def as_before_there_was_a_history(dabench: Artifact) -> Artifact:
    """The artefact as the version of the stage before wrote it."""
    (dabench.path / SPLITS_FILE).unlink()
    sign(dabench.path)

    def forget(manifest: dict[str, Any]) -> None:
        manifest["stage_version"] = 2
        manifest["identity"] = "f" * 64
        manifest["inputs"].pop(PREVIOUS)
        manifest["metrics"].pop("history")

    edit_manifest(dabench.path, forget)
    return open_artifact(dabench.path.rename(dabench.path.with_name("f" * 16)))


def test_the_splits_of_an_existing_store_are_kept(site: Site) -> None:
    for number in range(1000, 1100):
        site.post(number, f"w{number} x{number} y{number} z{number}", 1 + number % 2)
    old = as_before_there_was_a_history(site.build())
    first = splits_of(old)
    site.models[2] = model(2, _generation=1)
    dabench = site.build()
    assert first.items() <= splits_of(dabench).items()
    assert dabench.manifest.inputs[PREVIOUS][0].content_digest == old.content_digest
    assert verify_dabench(dabench.path).problems == []


def test_an_answer_of_older_code_is_the_version_before(site: Site) -> None:
    source = site.crawl()
    old = site.build(source)
    edit_manifest(old.path, lambda m: m.update(stage_version=2, identity="f" * 64))
    renamed = open_artifact(old.path.rename(old.path.with_name("f" * 16)))
    again = site.build(source)
    assert again.path != renamed.path and splits_of(again) == splits_of(renamed)
    assert again.manifest.inputs[PREVIOUS][0].identity == "f" * 64


def test_an_old_store_is_compared_with_the_version_before(site: Site) -> None:
    first = site.build()
    old = as_before_there_was_a_history(first)
    site.models[2] = model(2)
    second = site.build()
    edit_manifest(second.path, lambda m: (m["inputs"].pop(PREVIOUS), m["metrics"].pop("history")))
    verdict = verify_dabench(second.path)
    assert f"splits against those of {old.path}" in verdict.checked


def test_two_branches_are_one_history_again(site: Site, tmp_path: Path) -> None:
    first = site.build()
    elsewhere = Site(tmp_path / "elsewhere")
    elsewhere.images = {5000 + n: image(5000 + n, prompt=f"v{n} u{n} t{n}") for n in range(30)}
    other = elsewhere.build()
    target = Path(site.runtime.store) / "shard" / other.path.name
    shutil.copytree(other.path, target)
    site.images |= elsewhere.images
    both = site.build()
    assert len(both.manifest.inputs[PREVIOUS]) == 2
    assert splits_of(first).items() <= splits_of(both).items()
    assert splits_of(other).items() <= splits_of(both).items()
    site.post(2000, "something new")
    assert [r.content_digest for r in site.build().manifest.inputs[PREVIOUS]] == [
        both.content_digest
    ]


def test_other_splits_and_other_sites_have_histories_of_their_own(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    first = site.build()
    assert "decided anew" not in caplog.text
    other = site.build(config=DABENCH.model_copy(update={"seed": 1}))
    assert "none of the 1 datasets" in caplog.text
    caplog.clear()
    assert other.manifest.inputs[PREVIOUS] == () and splits_of(other) != splits_of(first)
    same = site.build(config=DABENCH.model_copy(update={"rows_per_shard": 7}))
    assert same.manifest.inputs[PREVIOUS][0].content_digest == first.content_digest
    assert "decided anew" not in caplog.text
    elsewhere = site.crawl()
    edit_manifest(elsewhere.path, lambda m: m.update(identity="1" * 64))
    assert site.build(open_artifact(elsewhere.path)).manifest.inputs[PREVIOUS] == ()


def test_the_site_decides_whatever_the_crawl(site: Site) -> None:
    """Two crawls of one site, with other settings: the records are the same."""
    made = []
    for number, limit in ((1, 10), (2, 20)):
        source = site.crawl()
        edit_manifest(
            source.path,
            lambda m, n=number, limit=limit: m.update(
                identity=str(n) * 64, config={"site": "https://x.example", "max_models": limit}
            ),
        )
        folder = Path(site.runtime.store) / "crawl" / (str(number) * 16)
        folder.parent.mkdir(parents=True, exist_ok=True)
        source.path.rename(folder)
        made.append(site.build(open_artifact(folder)))
        site.post(2000, "something new")
    assert made[1].manifest.inputs[PREVIOUS][0].content_digest == made[0].content_digest


def test_history_is_named_in_the_lineage_and_not_opened_up(site: Site) -> None:
    made = [site.build()]
    for number in (2000, 2001):
        site.post(number, f"something new {number}")
        made.append(site.build())
    lines = lineage_lines(made[-1])
    assert [line.split()[0] for line in lines] == ["shard", "filtered:", "snapshot:", "previous:"]
    assert [a.stage for a in ancestors(made[-1])] == ["shard", "filter"]
    shutil.rmtree(made[1].path)
    lines = lineage_lines(made[-1])
    assert lines[-1].endswith("(not in this store)")
    assert verify_dabench(made[-1].path).problems == []


def test_older_versions_may_be_deleted(site: Site) -> None:
    first = site.build()
    decided = splits_of(first)
    held_out = next(ident for ident, split in decided.items() if split == "test")
    picture = site.images.pop(held_out)
    second = site.build()
    shutil.rmtree(first.path)
    assert site.build() == second, "cached"
    site.images[held_out] = picture
    assert splits_of(site.build()) == decided, "the newest one remembers"


def test_prune_keeps_the_version_that_knows_all_decisions(site: Site) -> None:
    source = site.crawl()
    first = site.build(source, min_steps=30)
    site.post(2000, "something new")
    newest = site.build()
    assert site.build(source, min_steps=30) == first, "cached: the pointers lead to it"
    store = str(site.runtime.local_store)
    names = {e.name for e in superseded(read_inventory(store), other_configs=True)}
    assert first.path.name not in names and newest.path.name not in names
    site.post(2001, "newer still")
    last = site.build(min_steps=30)
    names = {e.name for e in superseded(read_inventory(store), other_configs=True)}
    assert {first.path.name, newest.path.name} <= names and last.path.name not in names


def test_a_damaged_version_before_is_not_made_again_by_the_same_command(site: Site) -> None:
    newest = site.build()
    site.post(2000, "something new")
    with (newest.path / SPLITS_FILE).open("ab") as stream:
        stream.write(b"x")
    source = site.crawl()
    for _ in range(2):  # the first sets it aside
        with pytest.raises(ArtifactError, match=r"put the right file back.* or delete it") as error:
            site.build(source)
        assert "same command" not in str(error.value)
    (aside,) = newest.path.parent.glob("*.damaged-1")
    (aside / SPLITS_FILE).write_bytes((aside / SPLITS_FILE).read_bytes()[:-1])
    aside.rename(newest.path)
    assert splits_of(newest).items() <= splits_of(site.build(source)).items()


def test_a_damaged_newest_version_is_not_passed_over(site: Site) -> None:
    """An older version does not know its decisions, so nothing is decided anew in silence."""
    site.build()
    site.post(2000, "something new")
    source = site.crawl()
    newest = site.build(source)
    shard = next(newest.path.glob("data/train-*"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert site.build(source).content_digest == newest.content_digest, "what made it makes it again"
    shutil.rmtree(newest.path)  # only the damaged copy is left
    site.post(2001, "newer still")
    with pytest.raises(ArtifactError, match=r"set aside as .*\.damaged-1.* or delete it"):
        site.build()
    (aside,) = newest.path.parent.glob("*.damaged-1")
    shutil.rmtree(aside)
    assert site.build().path.exists(), "a person has said that it may"


def test_a_killed_build_is_resumed_with_the_same_history(site: Site) -> None:
    site.build()
    site.post(2000, "something new")
    source = site.crawl()
    whole = site.build(source)
    partial = whole.path.with_name(f".{whole.path.name}.partial")
    whole.path.rename(partial)
    (partial / SPLITS_FILE).write_bytes(b"PAR1 half a file")
    assert site.build(source) == whole


def test_history_in_a_remote_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second machine, which has only the store, goes on from what the first one decided."""
    made = []
    for machine in ("one", "two"):
        monkeypatch.setenv("DIFFAGENT_CACHE", str(tmp_path / machine / "cache"))
        site = Site(tmp_path / machine, f"file://{tmp_path}/remote")
        for number in range(40 if machine == "one" else 60):
            site.post(number, f"w{number} x{number} y{number}")
        made.append(site.build())
    first, second = (splits_of(dabench) for dabench in made)
    assert first.items() < second.items()
    assert made[1].manifest.inputs[PREVIOUS][0].content_digest == made[0].content_digest
    assert json.loads((made[1].path / MANIFEST).read_bytes())["metrics"]["history"]
