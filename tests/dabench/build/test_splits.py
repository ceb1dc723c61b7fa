"""No near-duplicate, post or series straddles a split, and no record ever moves to another."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.dabench.build import neighbours, splits
from diffagent.dabench.build.leaks import chunk, find_leaks
from diffagent.dabench.build.neighbours import Groups
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.build.splits import (
    NO_SPLIT,
    SPLITS,
    TEST,
    TRAIN,
    Prints,
    random_splits,
    shingles,
    words,
)
from diffagent.dabench.parquet_tables import table_writer
from diffagent.errors import ArtifactError
from diffagent.schemas.tables import PRINTS

WORDS = ("red", "blue", "green", "square", "circle", "star", "on", "in", "sand", "sea")
PROMPT = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
CONFIG = DABenchConfig(validation_fraction=0.3, test_fraction=0.3)
ROW = st.fixed_dictionaries(
    {
        "prompt": PROMPT,
        "post_id": st.none() | st.integers(0, 5),
        "creator": st.none() | st.sampled_from(["ann", "bob"]),
        "base_model": st.sampled_from(["SD 1.5", "SDXL 1.0"]),
        "generation": st.sampled_from([0, 0, 1, 2]),
        "kept": st.booleans(),
    }
)
#: Ids in any order: a later generation may have smaller ones.
ROWS = st.dictionaries(st.integers(0, 60), ROW, max_size=16).map(
    lambda rows: [{"id": ident, **row} for ident, row in sorted(rows.items())]
)

Row = dict[str, Any]


def row(ident: int, prompt: str, **changes: Any) -> Row:
    made = {"post_id": None, "creator": None, "base_model": "SD 1.5", "generation": 0, "kept": True}
    return {"id": ident, "prompt": prompt, **made, **changes}


def write_prints(path: Path, rows: Iterable[Row]) -> None:
    with table_writer(path, PRINTS) as writer:
        for item in rows:
            found = {name: item[name] for name in PRINTS.names if name in item}
            writer.append(found | {"shingles": shingles(item["prompt"])})


def assign(rows: list[Row], config: DABenchConfig = CONFIG) -> tuple[list[int], list[int]]:
    """Split and group of each row."""
    with tempfile.TemporaryDirectory() as folder:
        write_prints(Path(folder, "prints.parquet"), rows)
        with closing(Prints(Path(folder, "prints.parquet"), config, Path(folder, "x"))) as prints:
            made = prints.splits()
            return made.split.tolist(), made.group.tolist()


def exposed(rows: list[Row], codes: list[int], config: DABenchConfig = CONFIG) -> list[bool]:
    with tempfile.TemporaryDirectory() as folder:
        write_prints(Path(folder, "prints.parquet"), rows)
        with closing(Prints(Path(folder, "prints.parquet"), config, Path(folder, "x"))) as prints:
            found: list[bool] = prints.exposed(np.array(codes, np.int8)).tolist()
            return found


def pairs(prompt: str) -> set[Any]:
    found = words(prompt)
    return set(pairwise(found)) or set(found)


def jaccard(one: str, other: str) -> float:
    a, b = pairs(one), pairs(other)
    return len(a & b) / max(len(a | b), 1)


def tied(one: Row, other: Row, config: DABenchConfig = CONFIG) -> bool:
    alike = jaccard(one["prompt"], other["prompt"])
    same_post = one["post_id"] is not None and one["post_id"] == other["post_id"]
    series = one["creator"] is not None and one["creator"] == other["creator"]
    return (
        alike >= config.near_duplicate_jaccard - 1e-9
        or same_post
        or (series and alike >= config.series_jaccard - 1e-9)
    )


def plainly(rows: list[Row], config: DABenchConfig = CONFIG) -> tuple[list[bool], list[int]]:
    """The rule again, by comparing all rows with all: which are left out, and all groups.

    The split of a group is that of the row that names it, which is never left out.
    """
    split = dict(zip((r["id"] for r in rows), assign(rows, config)[0], strict=True))
    group_of: dict[int, int] = {}
    left_out: set[int] = set()
    age: list[int] = []  # the groups, oldest first
    for generation in sorted({r["generation"] for r in rows}):
        new = [r for r in rows if r["generation"] == generation]
        label = {r["id"]: r["id"] for r in new}
        for one, other in combinations(new, 2):
            if tied(one, other, config):
                low, high = sorted((label[one["id"]], label[other["id"]]))
                label = {k: low if v == high else v for k, v in label.items()}
        older = [r for r in rows if r["id"] in group_of.keys() - left_out]
        touches = {r["id"]: {group_of[o["id"]] for o in older if tied(r, o, config)} for r in new}
        for name in sorted(set(label.values())):
            members = [ident for ident, value in label.items() if value == name]
            found = set().union(*(touches[ident] for ident in members))
            group = min(found, key=age.index) if found else name
            if not found:
                age.append(group)
            for ident in members:
                group_of[ident] = group
                if {split[other] for other in touches[ident]} - {split[group]}:
                    left_out.add(ident)
    return [r["id"] in left_out for r in rows], [group_of[r["id"]] for r in rows]


def test_words_ignore_case_weights_and_punctuation() -> None:
    assert words("(Red square:1.2), [Sand]") == ["red", "square", "sand"]


@given(PROMPT, PROMPT)
def test_shingles_are_the_set_of_word_pairs(one: str, other: str) -> None:
    a, b = shingles(one), shingles(other)
    assert a.dtype == np.int64 and (a >= 0).all() and (np.diff(a) > 0).all()
    assert len(a) == len(pairs(one))
    assert len(np.intersect1d(a, b)) == len(pairs(one) & pairs(other))


def test_shingles_of_little_text() -> None:
    assert len(shingles("")) == len(shingles("...")) == 0
    assert len(shingles("one")) == 1 and shingles("one") == shingles("ONE!")
    assert len(shingles("a\ud800 b")) > 0
    assert shingles("red square on sand").tolist() == sorted(shingles("Red Square, on sand"))


@settings(max_examples=150, deadline=None)
@given(
    ROWS, st.sampled_from([0.3, 0.5, 0.6, 0.8, 1.0]), st.sampled_from([0.2, 0.4, 1.0]), st.data()
)
def test_splits_are_those_of_comparing_all_rows(
    rows: list[Row], threshold: float, series: float, data: st.DataObject
) -> None:
    config = CONFIG.model_copy(
        update={"near_duplicate_jaccard": threshold, "series_jaccard": series}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_SHORT", data.draw(st.sampled_from([0, 2, 48])))
        patch.setattr(neighbours, "_PAIRS", data.draw(st.sampled_from([1, 3, 1000])))
        patch.setattr(neighbours, "_PARTITION", data.draw(st.sampled_from([8, 1 << 21])))
        codes, groups = assign(rows, config)
    left_out, named = plainly(rows, config)
    assert groups == named
    assert [code == NO_SPLIT for code in codes] == left_out
    split = {r["id"]: code for r, code in zip(rows, codes, strict=True)}
    assert all(code in (NO_SPLIT, split[g]) for code, g in zip(codes, groups, strict=True))


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_nothing_straddles(rows: list[Row]) -> None:
    codes, _ = assign(rows)
    for (one, a), (other, b) in combinations(zip(rows, codes, strict=True), 2):
        assert a == b or NO_SPLIT in (a, b) or not tied(one, other)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.randoms(use_true_random=False), st.integers(0, 3))
def test_no_record_ever_moves(rows: list[Row], random: Any, upto: int) -> None:
    """Whatever later generations bring, whichever filters keep it, in whichever order it lies."""
    after = dict(zip([r["id"] for r in rows], assign(rows)[0], strict=True))
    before = [r | {"kept": random.random() < 0.5} for r in rows if r["generation"] < upto]
    random.shuffle(before)
    assert {r["id"]: c for r, c in zip(before, assign(before)[0], strict=True)} == {
        r["id"]: after[r["id"]] for r in before
    }


@settings(max_examples=100, deadline=None)
@given(ROWS, st.data())
def test_exposed_rows_are_those_with_a_mate_in_train(rows: list[Row], data: st.DataObject) -> None:
    codes = data.draw(
        st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=len(rows), max_size=len(rows))
    )
    train = [r for r, code in zip(rows, codes, strict=True) if code == TRAIN]
    wanted = [
        code == TEST and any(tied(r, other) for other in train)
        for r, code in zip(rows, codes, strict=True)
    ]
    assert exposed(rows, codes) == wanted
    split = assign(rows)[0]
    assert not any(exposed(rows, split))


def test_a_bridge_between_two_splits_is_left_out() -> None:
    a, b = "red square on the wide sand", "seven green stars over a cold sea"
    for number in range(100):  # two groups of different splits
        old = [row(10 + number, a), row(500 + number, b)]
        if len(set(assign(old)[0])) == 2:
            break
    bridge = row(1, f"{a} {b}", generation=1, post_id=4)
    loose = CONFIG.model_copy(update={"near_duplicate_jaccard": 0.4, "series_jaccard": 1.0})
    friend = row(2, "quite another matter", generation=1, post_id=4)
    codes, groups = assign([bridge, friend, *old], loose)
    assert codes[0] == NO_SPLIT and codes[2:] == assign(old, loose)[0]
    assert (codes[1], groups[1]) == (codes[2], old[0]["id"])  # the older one of the two


def test_posts_and_series_are_one_group() -> None:
    rows = [
        row(3, "one thing", post_id=7),
        row(4, "another matter", post_id=8),
        row(5, "a third one", post_id=7),
        row(6, "tall old ship on a sea of glass", creator="ann"),
        row(7, "tall old ship on a plain of salt", creator="ann"),
        row(8, "tall old ship on a bed of rock", creator="bob"),
    ]
    assert assign(rows)[1] == [3, 4, 3, 6, 6, 8]
    assert assign(rows, CONFIG.model_copy(update={"series_jaccard": 0.6}))[1][4] == 7


def test_prompts_without_words_are_not_alike() -> None:
    assert assign([row(1, ""), row(2, "..."), row(3, "a"), row(4, "a")])[1] == [1, 2, 3, 3]


def test_each_base_model_has_its_share() -> None:
    rows = []
    for number in range(4000):
        name = "rare" if number % 20 == 0 else "common"
        size = 1 + number % 7
        text = " ".join(f"w{number}x{k}" for k in range(4))
        rows += [row(10 * number + k, text, base_model=name) for k in range(size)]
    giant = [row(50_000 + k, "the same again", base_model="common") for k in range(2000)]
    codes, _ = assign([*rows, *giant], DABenchConfig())
    assert set(codes[-2000:]) == {TRAIN}
    for name, tolerance in (("rare", 0.004), ("common", 0.001)):
        found = np.array(
            [c for r, c in zip([*rows, *giant], codes, strict=True) if r["base_model"] == name]
        )
        for code in range(1, len(SPLITS)):
            assert abs((found == code).mean() - 0.1) < tolerance


def test_few_groups_are_split_at_the_fractions() -> None:
    rows = [row(n, f"w{n} x{n} y{n}") for n in range(splits.ENOUGH_GROUPS - 1)]
    assert assign(rows)[0] != assign(rows, CONFIG.model_copy(update={"seed": 1}))[0]
    assert set(assign(rows)[0]) == {0, 1, 2}


def test_random_splits_have_their_shares() -> None:
    codes = random_splits(np.arange(20_000), DABenchConfig())
    assert abs((codes == TEST).mean() - 0.1) < 0.01
    assert (codes[:9] == random_splits(np.arange(9), DABenchConfig())).all()
    assert (codes != random_splits(np.arange(20_000), DABenchConfig(seed=1))).any()


@pytest.mark.parametrize("generations", [1, 2])
def test_twenty_thousand_nearly_equal_prompts_take_seconds(generations: int) -> None:
    text = "masterpiece best quality a knight in silver armour stands before the gate of a city"
    rows = [
        row(n, f"{text} number {n} of many", generation=n % generations, creator=f"c{n % 50}")
        for n in range(20_000)
    ]
    rows += [row(30_000 + n, f"{text[: 20 + n]} {n} else") for n in range(40)]
    started = time.process_time()
    codes, groups = assign(rows)
    assert time.process_time() - started < 20
    assert set(groups[:20_000]) == {0} and len(set(codes[:20_000])) == 1
    assert sum(exposed(rows, [TEST if n % 2 else TRAIN for n in range(len(rows))])) >= 10_000


def test_groups_of_any_unions() -> None:
    groups = Groups(6)
    groups.union(np.array([1, 2, 3], np.int32), np.array([5, 5, 2], np.int32))
    groups.union(np.array([4], np.int32), np.array([0], np.int32))
    assert groups.find(np.arange(6, dtype=np.int32)).tolist() == [0, 1, 1, 1, 0, 1]


def test_damaged_prints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "prints.parquet"
    write_prints(path, [row(1, "a b")])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"prints.parquet'.*run the stage 'filter' again"):
        Prints(path, CONFIG, tmp_path / "scratch")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(PROMPT, st.sampled_from([0, 1, 2]), st.sampled_from([None, "ann", "bob"]))),
    st.sampled_from([0.3, 0.6, 1.0]),
    st.booleans(),
)
def test_find_leaks_is_a_comparison_of_all_pairs(
    rows: list[tuple[str, int, str | None]], threshold: float, by_creator: bool
) -> None:
    wanted = {
        (i, j)
        for i, j in combinations(range(len(rows)), 2)
        if rows[i][1] != rows[j][1]
        and pairs(rows[i][0])
        and jaccard(rows[i][0], rows[j][0]) >= threshold - 1e-9
        and (not by_creator or rows[i][2] == rows[j][2] is not None)
    }
    parts = [
        chunk(
            np.array([code for _, code, _ in part], np.int8),
            [text for text, _, _ in part],
            [creator for _, _, creator in part] if by_creator else None,
        )
        for part in (rows[:5], rows[5:])
    ]
    found = find_leaks(lambda wanted: parts, threshold, block=3)
    assert {(leak.one, leak.other) for leak in found} == wanted and len(found) == len(wanted)
    for leak in found:
        assert leak.similarity == pytest.approx(jaccard(rows[leak.one][0], rows[leak.other][0]))
    assert len(find_leaks(lambda wanted: parts, threshold, limit=1)) == min(1, len(wanted))
