"""An epoch of SFT: packed rows and batches by length against batches drawn at random and padded.

Random tokens whose lengths are those of real pairs (log-normal, median 200, eight tenths within 100
to 400, at most 512; three tenths are prompt), a Llama with random weights, forward and backward
without an optimizer step, so that all three have one loss. One JSON line: real tokens a second of
processor time (a busy machine changes it little), ratios to ``random``, and the mean loss of a
response token over the epoch.

    OMP_NUM_THREADS=1 python benchmarks/bench_sft.py
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from diffagent.agent.lm.format import IGNORED, Example
from diffagent.train.sft import build_trainer
from diffagent.train.sft_config import SFTConfig
from diffagent.train.tiny_llama import build_tokenizer

EXAMPLES, VOCABULARY, MAX_LENGTH, ROUNDS = 96, 8192, 512, 2
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}


def examples() -> list[Example]:
    rng = random.Random(0)
    found = []
    for _ in range(EXAMPLES):
        length = min(MAX_LENGTH, max(20, round(rng.lognormvariate(math.log(200), 0.56))))
        ids = [rng.randrange(3, VOCABULARY) for _ in range(length)]
        prompt = round(0.3 * length)
        found.append(Example(ids, [IGNORED] * prompt + ids[prompt:]))
    return found


def epoch(trainer: Any) -> tuple[float, float]:
    """Processor seconds of an epoch, and its mean loss."""
    loss, count, seconds = 0.0, 0, 0.0
    for batch in trainer.get_train_dataloader():
        targets = int((batch["labels"][:, 1:] != IGNORED).sum())
        started = time.process_time()
        trainer.model.zero_grad()
        part = trainer.compute_loss(trainer.model, batch)
        part.backward()
        seconds += time.process_time() - started
        loss, count = loss + part.item() * targets, count + targets
    return seconds, loss / count


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # after diffagent.compat

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=4, **SIZES)
    model, pairs = LlamaForCausalLM(config), examples()
    tokenizer, tokens = build_tokenizer(["a b c"], 300), sum(len(e.input_ids) for e in pairs)
    results: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(ROUNDS):  # in turns, so that a busy machine slows all
            for batching, rows in (("random", 8), ("by_length", 8), ("packed", 4)):
                settings = SFTConfig(
                    batching=batching, per_device_train_batch_size=rows, max_length=MAX_LENGTH
                )
                trainer = build_trainer(
                    settings,
                    model,
                    tokenizer,
                    pairs,
                    out=Path(directory),
                    device=torch.device("cpu"),
                )
                results[batching] = min(epoch(trainer), results.get(batching, (math.inf, 0.0)))
    line: dict[str, Any] = {"benchmark": "sft", "examples": EXAMPLES, "tokens": tokens}
    for batching, (seconds, loss) in results.items():
        line[f"{batching}_tokens_per_second"] = round(tokens / seconds)
        line[f"{batching}_ratio"] = round(results["random"][0] / seconds, 2)
        line[f"{batching}_loss"] = round(loss, 6)
    print(json.dumps({**line, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
