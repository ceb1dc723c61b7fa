"""RRHF's equations against a naive loop, closed forms and numerical gradients."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.agent.lm.likelihood import sequence_logps
from diffagent.train.losses import INVALID_REWARD, group_advantages, ranking_loss

torch.set_num_threads(1)


def naive_prompt(
    logits: list[list[list[float]]], labels: list[list[int]], rewards: list[float]
) -> tuple[float, float]:
    """Equations (2) and (3) of one prompt, word for word, in Python floats."""
    sums, means = [], []
    for row, targets in zip(logits, labels, strict=True):
        total, count = 0.0, 0
        for t, target in enumerate(targets):
            if target == -100:
                continue
            scores = row[t - 1]
            top = max(scores)
            total += scores[target] - top - math.log(sum(math.exp(s - top) for s in scores))
            count += 1
        sums.append(total)
        means.append(total / count)
    rank = 0.0
    for i, j in itertools.product(range(len(rewards)), repeat=2):
        if rewards[i] < rewards[j]:
            rank += max(0.0, means[i] - means[j])
    best = rewards.index(max(rewards))
    return rank, -sums[best] if rewards[best] > INVALID_REWARD else 0.0


def random_labels(count: int, generator: torch.Generator) -> torch.Tensor:
    """(count, 9) labels: 1 to 3 prompt tokens, 1 to 4 response tokens, padding."""
    labels = torch.full((count, 9), -100)
    for row in labels:
        start = int(torch.randint(1, 4, (), generator=generator))
        end = start + int(torch.randint(1, 5, (), generator=generator))
        row[start:end] = torch.randint(0, 7, (end - start,), generator=generator)
    return labels


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), data=st.data())
def test_the_loss_equals_the_naive_loop(seed: int, data: st.DataObject) -> None:
    reward = st.sampled_from([INVALID_REWARD, -1.0, 0.0, 0.5, 2.0])  # ties are likely
    groups = data.draw(st.lists(st.lists(reward, min_size=1, max_size=5), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(seed)
    count = sum(map(len, groups))
    logits = torch.randn(count, 9, 7, generator=generator, dtype=torch.float64) * 3
    labels = random_labels(count, generator)
    expected = []
    start = 0
    for rewards in groups:
        rows = slice(start, start + len(rewards))
        expected.append(naive_prompt(logits[rows].tolist(), labels[rows].tolist(), rewards))
        start += len(rewards)

    width = max(map(len, groups))
    mask = torch.tensor([[i < len(g) for i in range(width)] for g in groups])
    table = torch.tensor([[*g, *[9.0] * (width - len(g))] for g in groups], dtype=torch.float64)
    sums, counts = sequence_logps(logits, labels)
    grid = torch.full(mask.shape, 77.0, dtype=torch.float64).masked_scatter(mask, sums)
    lengths = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, counts)
    loss = ranking_loss(grid, lengths, table, mask)

    rank = sum(r for r, _ in expected) / len(groups)
    sft = sum(s for _, s in expected) / len(groups)
    assert loss.rank.item() == pytest.approx(rank, abs=1e-9)
    assert loss.sft.item() == pytest.approx(sft, abs=1e-9)
    assert loss.total.item() == pytest.approx(rank + sft, abs=1e-9)


def two(
    p: tuple[float, float], rewards: tuple[float, float], **options: float
) -> tuple[float, ...]:
    """(rank, sft) of one prompt with responses of 4 and 2 tokens and mean log-probs ``p``."""
    lengths = torch.tensor([[4, 2]])
    logps = torch.tensor([p], dtype=torch.float64) * lengths
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = ranking_loss(logps, lengths, torch.tensor([rewards]), mask, **options)
    return loss.rank.item(), loss.sft.item()


def test_closed_forms() -> None:
    assert two((-1.0, -3.0), (0.0, 1.0)) == pytest.approx((2.0, 6.0))  # worse one is likelier
    assert two((-3.0, -1.0), (0.0, 1.0)) == pytest.approx((0.0, 2.0))  # order is right
    assert two((-3.0, -1.0), (0.0, 1.0), margin=2.5) == pytest.approx((0.5, 2.0))
    assert two((-1.0, -3.0), (0.5, 0.5)) == pytest.approx((0.0, 4.0))  # tie: no pair, first is b
    unnormalised = two((-1.0, -3.0), (0.0, 1.0), length_normalization=False)
    assert unnormalised == pytest.approx((2.0, 6.0))  # -4 against -6
    assert two((-1.0, -3.0), (INVALID_REWARD, -9.0)) == pytest.approx((2.0, 6.0))
    assert two((-1.0, -3.0), (INVALID_REWARD, INVALID_REWARD)) == (0.0, 0.0)


def test_weights_and_the_mean_over_pairs() -> None:
    logps = torch.tensor([[-1.0, -2.0, -3.0]])
    ones = torch.ones(1, 3, dtype=torch.int64)
    rewards, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    loss = ranking_loss(logps, ones, rewards, mask, rank_weight=10, sft_weight=0.5)
    assert (loss.rank.item(), loss.sft.item(), loss.total.item()) == (4.0, 3.0, 41.5)
    mean = ranking_loss(logps, ones, rewards, mask, pairs="mean")
    assert mean.rank.item() == pytest.approx(4 / 3)


def test_only_the_order_of_rewards_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(3, 4, generator=generator) * 9
    lengths = torch.randint(1, 9, (3, 4), generator=generator)
    rewards, mask = torch.randn(3, 4, generator=generator), torch.ones(3, 4, dtype=torch.bool)
    loss = ranking_loss(logps, lengths, rewards, mask)
    assert torch.equal(loss.total, ranking_loss(logps, lengths, rewards.exp() * 5, mask).total)


def test_gradients_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 9, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = random_labels(5, generator)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards = torch.tensor([[0.3, -1.0, 0.3], [INVALID_REWARD, 2.0, 0.0]])

    def total(x: torch.Tensor) -> torch.Tensor:
        sums, counts = sequence_logps(x, labels)
        grid = sums.new_zeros(mask.shape).masked_scatter(mask, sums)
        lengths = counts.new_zeros(mask.shape).masked_scatter(mask, counts)
        return ranking_loss(grid, lengths, rewards, mask, margin=0.05).total

    assert torch.autograd.gradcheck(total, (logits,))


def test_padding_and_company_change_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 9, 7, generator=generator)
    labels = random_labels(2, generator)
    wider = torch.cat([logits, torch.randn(2, 5, 7, generator=generator)], 1)
    padded = torch.cat([labels, torch.full((2, 5), -100)], 1)
    for ours, theirs in zip(
        sequence_logps(logits, labels), sequence_logps(wider, padded), strict=True
    ):
        assert torch.allclose(ours, theirs)

    logps, lengths = -torch.rand(4, 3, generator=generator) * 9, torch.full((4, 3), 3)
    rewards, mask = (
        torch.randn(4, 3, generator=generator),
        torch.rand(4, 3, generator=generator) < 0.8,
    )
    mask[:, 0] = True
    together = ranking_loss(logps, lengths, rewards, mask).total
    alone = [
        ranking_loss(logps[i, None], lengths[i, None], rewards[i, None], mask[i, None]).total
        for i in range(4)
    ]
    assert torch.allclose(together, torch.stack(alone).mean())


def two_rows() -> tuple[torch.Tensor, ...]:
    """Two prompts with a better and a worse response each: logps, lengths, rewards, mask, ref."""
    logps = torch.tensor([[-4.0, -9.0], [-7.0, -6.0]], dtype=torch.float64)
    lengths = torch.tensor([[4, 6], [5, 3]])
    rewards, mask = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.ones(2, 2, dtype=torch.bool)
    return logps, lengths, rewards, mask, torch.tensor([[-5.0, -8.5], [-6.0, -6.5]]).double()


def test_simpo_is_that_of_trl() -> None:
    from trl.experimental.cpo import CPOTrainer

    logps, lengths, rewards, mask, _ = two_rows()
    settings = {"alpha": 0.0, "loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}
    stub = SimpleNamespace(
        **settings, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu")
    )
    means = logps / lengths
    expected, _, _ = CPOTrainer.cpo_loss(stub, means[:, 0], means[:, 1])
    ours = ranking_loss(logps, lengths, rewards, mask, loss="simpo", beta=2.0, margin=0.5)
    assert ours.rank.item() == pytest.approx(expected.mean().item(), rel=1e-9)


def test_dpo_in_closed_form() -> None:
    logps, lengths, rewards, mask, reference = two_rows()
    ours = ranking_loss(
        logps, lengths, rewards, mask, loss="dpo", reference_logps=reference, beta=0.3
    )
    # Margins over the reference: (1 - -0.5), (-1 - 0.5).
    expected = [math.log1p(math.exp(-0.3 * 1.5)), math.log1p(math.exp(0.3 * 1.5))]
    assert ours.rank.item() == pytest.approx(sum(expected) / 2, rel=1e-9)
    with pytest.raises(ValueError, match="reference_logps"):
        ranking_loss(logps, lengths, rewards, mask, loss="dpo")


def test_gspo_in_closed_form() -> None:
    logps, lengths, rewards, mask, reference = two_rows()
    ours = ranking_loss(
        logps, lengths, rewards, mask, loss="gspo", reference_logps=reference, clip=0.2
    )
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)  # of two rewards that differ by 1
    ratios = [[math.exp(1 / 4), math.exp(-0.5 / 6)], [math.exp(-1 / 5), math.exp(0.5 / 3)]]
    gain = [min(r[0], 1.2) * advantage - max(r[1], 0.8) * advantage for r in ratios]
    assert ours.rank.item() == pytest.approx(-sum(gain) / 4, rel=1e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_an_invalid_answer_stands_out_at_any_scale_of_rewards(scale: float) -> None:
    rewards = torch.tensor([[0.5, -0.5, 1.0, INVALID_REWARD]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    expected = group_advantages(rewards, mask)
    ours = group_advantages(rewards * scale + 40 * scale, mask)
    assert ours[0].tolist() == pytest.approx(expected[0].tolist(), rel=0.02)
    # The worst valid answer is midway between the best and the invalid one.
    best, worst, invalid = ours[0, 2], ours[0, 1], ours[0, 3]
    assert (worst - invalid).item() == pytest.approx((best - worst).item())


def test_advantages_of_ties_and_of_invalid_answers() -> None:
    rewards = torch.tensor(
        [[2.0, 2.0, 9.0], [1.0, INVALID_REWARD, 9.0], [INVALID_REWARD, INVALID_REWARD, 9.0]]
    )
    mask = torch.tensor([[True, True, False]] * 3)
    found = group_advantages(rewards, mask)
    assert found[0].tolist() == found[2].tolist() == [0.0, 0.0, 0.0]
    assert found[1].tolist() == pytest.approx([0.7070, -0.7070, 0.0], abs=1e-4)
