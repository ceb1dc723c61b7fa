"""RRHF's loss, all candidates of a batch at once, against a loop over prompts and pairs.

One JSON line: milliseconds of forward and backward of each (median), and their ratio.
Random log-probabilities; the work is the loss alone, without a model.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from diffagent.train.losses import rrhf_loss

PROMPTS, CANDIDATES, REPEATS = 32, 6, 30


def loop(p: torch.Tensor, logps: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Equations (2) to (4) of arXiv 2304.05302 as they are written."""
    losses = []
    for i in range(len(p)):
        rank = sum(
            torch.clamp(p[i, a] - p[i, b], min=0)
            for a in range(CANDIDATES)
            for b in range(CANDIDATES)
            if rewards[i, a] < rewards[i, b]
        )
        losses.append(rank - logps[i, rewards[i].argmax()])
    return torch.stack(losses).mean()


def milliseconds(loss: Callable[[], torch.Tensor]) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        loss().backward()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shape = (PROMPTS, CANDIDATES)
    logps = (-50 * torch.rand(shape, generator=generator)).requires_grad_()
    lengths = torch.randint(20, 80, shape, generator=generator)
    rewards = torch.randn(shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.bool)
    batched = milliseconds(lambda: rrhf_loss(logps, lengths, rewards, mask).total)
    looped = milliseconds(lambda: loop(logps / lengths, logps, rewards))
    difference = rrhf_loss(logps, lengths, rewards, mask).total - loop(
        logps / lengths, logps, rewards
    )
    print(
        json.dumps(
            {
                "benchmark": "rrhf_loss",
                "prompts": PROMPTS,
                "candidates": CANDIDATES,
                "batched_ms": round(batched, 3),
                "loop_ms": round(looped, 3),
                "speedup": round(looped / batched, 1),
                "difference": abs(difference.item()),
            }
        )
    )


if __name__ == "__main__":
    main()
