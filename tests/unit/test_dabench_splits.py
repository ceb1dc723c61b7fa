"""No near-duplicate straddles a split, whatever the prompts; the split of a group is stable."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.dabench.splits import (
    PromptSets,
    find_leaks,
    group_prompts,
    join_posts,
    split_of,
    words,
)
from schemas.config import DABenchConfig

WORDS = ("red", "blue", "green", "square", "circle", "star", "on", "in", "sand", "sea")
PROMPTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join), max_size=14)


def test_words_ignore_case_weights_and_punctuation() -> None:
    assert words("(Red square:1.2), [Sand]") == ["red", "square", "sand"]


def test_jaccard_of_word_pairs() -> None:
    sets = PromptSets(["a b c d", "a b c e", "a", ""])
    assert sets.jaccard(0, 1) == 2 / 4
    assert sets.jaccard(0, 2) == 0
    assert sets.jaccard(3, 3) == 0


@settings(max_examples=300, deadline=None)
@given(PROMPTS, st.sampled_from([0.3, 0.5, 0.6, 0.8, 1.0]))
def test_groups_are_the_components_of_all_similar_pairs(
    prompts: list[str], threshold: float
) -> None:
    sets = PromptSets(prompts)
    label = list(range(len(prompts)))
    for one, other in combinations(range(len(prompts)), 2):
        if sets.jaccard(one, other) >= threshold - 1e-9:
            old, new = label[other], label[one]
            label = [min(old, new) if value in (old, new) else value for value in label]
    assert group_prompts(prompts, threshold).labels() == label


@settings(deadline=None)
@given(PROMPTS)
def test_no_leaks(prompts: list[str]) -> None:
    config = DABenchConfig(validation_fraction=0.4, test_fraction=0.4)
    labels = group_prompts(prompts, config.near_duplicate_jaccard).labels()
    splits = [split_of(label, config) for label in labels]
    assert find_leaks(prompts, splits, config.near_duplicate_jaccard) == []


def test_find_leaks_finds_one() -> None:
    prompts = ["a red square on the sand", "a blue star", "a red square on the beach"]
    leaks = find_leaks(prompts, ["train", "train", "test"], 0.6)
    assert [leak[:2] for leak in leaks] == [(0, 2)]


def test_posts_are_one_group() -> None:
    groups = group_prompts(["one thing", "another matter", "a third one"], 0.6)
    join_posts(groups, [7, None, 7])
    assert groups.labels() == [0, 1, 0]


def test_split_is_stable_and_has_its_share() -> None:
    config = DABenchConfig()
    splits = [split_of(group, config) for group in range(20_000)]
    assert splits == [split_of(group, config) for group in range(20_000)]
    assert abs(splits.count("test") / 20_000 - 0.1) < 0.01
    assert abs(splits.count("validation") / 20_000 - 0.1) < 0.01
    assert splits != [split_of(group, DABenchConfig(seed=1)) for group in range(20_000)]
