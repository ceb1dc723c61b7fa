"""How tokens are chosen: nucleus sampling and diverse beams, on logits written by hand."""

from __future__ import annotations

import pytest
import torch

from diffagent.agent.decoding.strategies import DiverseBeams, TopP
from diffagent.agent.sample_config import SamplingConfig

EOS = 9


def chosen(scores: torch.Tensor) -> list[int]:
    """The one token of each row that is left."""
    assert (scores > -torch.inf).sum(1).eq(1).all()
    return scores.argmax(1).tolist()


def flat(rows: list[list[int]]) -> list[int]:
    return [token for row in rows for token in row]


def draw(decoding: TopP, probs: list[float], steps: int, prompt: str = "a star") -> list[list[int]]:
    """Tokens (candidates, steps) when every step has the same distribution."""
    processor = decoding.processor([prompt], 3, steps, EOS)
    ids = torch.zeros(decoding.num_candidates, 3, dtype=torch.int64)
    scores = torch.tensor(probs).log().expand(decoding.num_candidates, -1)
    for _ in range(steps):
        token = torch.tensor(chosen(processor(ids, scores)))[:, None]
        ids = torch.cat([ids, token], 1)
    drawn: list[list[int]] = ids[:, 3:].tolist()
    return drawn


def test_sampling_follows_the_distribution() -> None:
    tokens = flat(draw(TopP(20, seed=1), [0.5, 0.2, 0.3], 200))
    shares = [tokens.count(token) / len(tokens) for token in range(3)]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.03)


def test_the_nucleus_is_the_shortest_prefix_with_the_mass() -> None:
    tokens = flat(draw(TopP(20, top_p=0.6, seed=1), [0.5, 0.2, 0.3], 200))
    shares = [tokens.count(token) / len(tokens) for token in range(3)]
    assert shares == pytest.approx([0.5 / 0.8, 0, 0.3 / 0.8], abs=0.03)
    assert set(flat(draw(TopP(4, top_p=0.4), [0.5, 0.2, 0.3], 50))) == {0}


def test_a_low_temperature_is_greedy() -> None:
    assert set(flat(draw(TopP(4, temperature=0.01), [0.4, 0.35, 0.25], 50))) == {0}


def test_draws_depend_on_seed_prompt_and_candidate_alone() -> None:
    probs = [0.1] * 10
    alone = draw(TopP(3, seed=5), probs, 20)
    assert draw(TopP(3, seed=5), probs, 20) == alone
    assert draw(TopP(2, seed=5), probs, 20) == alone[:2]
    assert draw(TopP(3, seed=6), probs, 20) != alone
    assert draw(TopP(3, seed=5), probs, 20, "a moon") != alone
    assert len({tuple(row) for row in alone}) == 3
    both = TopP(3, seed=5).processor(["a moon", "a star"], 3, 20, EOS)
    scores = torch.tensor(probs).log().expand(6, -1)
    first = chosen(both(torch.zeros(6, 3, dtype=torch.int64), scores))[3:]
    assert first == [row[0] for row in alone]


def beams(logps: list[float], penalty: float, ids: torch.Tensor, groups: int) -> list[int]:
    processor = DiverseBeams(groups, penalty).processor(["x"], 1, 9, EOS)
    return chosen(processor(ids, torch.tensor(logps).expand(groups, -1)))


def test_diverse_beams_pay_for_what_earlier_groups_chose() -> None:
    start = torch.zeros(4, 1, dtype=torch.int64)
    logps = [0.0, -0.5, -1.2, -9.0]
    assert beams(logps, 0.0, start, 4) == [0, 0, 0, 0]
    # 0 -> 0; then 0 costs 1: 1; then both cost 1: 0 (-1 against -1.5 and -1.2); then 0 costs 2: 2.
    assert beams(logps, 1.0, start, 4) == [0, 1, 0, 2]
    assert beams(logps, 100.0, start, 4) == [0, 1, 2, 3]


def test_ended_groups_penalise_nobody() -> None:
    ids = torch.tensor([[0, EOS], [0, 1]])
    assert beams([0.0, -0.5, -1.2], 5.0, ids, 2) == [0, 0]


def test_a_group_has_one_beam() -> None:
    assert SamplingConfig(num_beam_groups=4, num_candidates=4).num_beam_groups == 4
    with pytest.raises(ValueError, match="num_beam_groups must be 0"):
        SamplingConfig(num_beam_groups=2, num_candidates=4)
