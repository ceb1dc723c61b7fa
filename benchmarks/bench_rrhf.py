"""A step of RRHF: candidates that share one pass over their prompt, against one padded row each.

Random weights in SmolLM2-135M's architecture and vocabulary (``--model DIR`` loads any other),
float32, full training: forward and backward of one prompt of 80 tokens with 6 responses of 60.
Compared are ``padded``, ``packed``, and ``default``: packed, and a share of the layers
checkpointed, as RRHFConfig has it.
One JSON line: seconds a step (the fastest) on the clock and of all processors together, peak memory
above what the loaded process has, and ratios to ``padded``. Each runs in processes of its own, in
turns, so that a busy machine slows all; memory is the high-water mark of the resident set (VmHWM,
reset once the model is loaded; Linux only), which covers activations, logits, gradients and what
malloc cannot give back.

    OMP_NUM_THREADS=2 python benchmarks/bench_rrhf.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from diffagent.agent.lm.format import IGNORED, Example
from diffagent.pretrained import load_model
from diffagent.store import peak_memory_bytes
from diffagent.train.collate import RankedPrompt, RRHFCollator
from diffagent.train.fit import enable_checkpointing
from diffagent.train.passes import response_logps
from diffagent.train.rrhf import batch_loss
from diffagent.train.rrhf_config import RRHFConfig

SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def load(name: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name != "smollm2":
        return load_model(AutoModelForCausalLM, name, dtype=torch.float32)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2))


def ranked(vocabulary: int, prompts: int, k: int, asked: int, answered: int) -> list[RankedPrompt]:
    """Random tokens and random rewards."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    result = []
    for _ in range(prompts):
        prompt = tokens(asked)
        answers = [tokens(answered) for _ in range(k)]
        rewards = tuple(torch.rand(k, generator=generator).tolist())
        examples = (Example(prompt + a, [IGNORED] * asked + a) for a in answers)
        result.append(RankedPrompt(tuple(examples), rewards))
    return result


def measure(formulation: str, options: argparse.Namespace) -> dict[str, float]:
    """Steps of one formulation in this process."""
    model, config = load(options.model), RRHFConfig()
    if formulation == "default":
        enable_checkpointing(model, config.gradient_checkpointing)
    model.train()
    size = (options.prompts, options.candidates, options.prompt_tokens, options.response_tokens)
    prompts = ranked(model.config.vocab_size, *size)
    batch = RRHFCollator(0, packed=formulation != "padded")(prompts)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from the current VmRSS
    before, loss = peak_memory_bytes(), torch.zeros(())
    seconds, cpu_seconds = [], []
    for _ in range(options.steps):
        model.zero_grad(set_to_none=True)
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = batch_loss(*response_logps(model, batch), batch, config).total
        loss.backward()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    return {
        "seconds": min(seconds),
        "cpu_seconds": min(cpu_seconds),
        "peak_mb": (peak_memory_bytes() - before) / 1e6,
        "loss": loss.item(),
        "gradient_norm": norm.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=80)
    parser.add_argument("--response-tokens", type=int, default=60)
    parser.add_argument("--steps", type=int, default=4, help="of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each formulation")
    parser.add_argument("--formulation", help="used for the processes of the benchmark")
    options = parser.parse_args()
    if options.formulation:
        print(json.dumps(measure(options.formulation, options)))
        return
    runs: dict[str, list[dict[str, float]]] = {"padded": [], "packed": [], "default": []}
    for _ in range(options.rounds):
        for formulation, results in runs.items():
            command = [sys.executable, *sys.argv, "--formulation", formulation]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(output.splitlines()[-1]))
    best = {
        name: {key: min(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }
    figures: dict[str, float] = {}
    for name, ours in best.items():
        figures |= {
            f"{name}_seconds": round(ours["seconds"], 3),
            f"{name}_cpu_seconds": round(ours["cpu_seconds"], 3),
            f"{name}_peak_mb": round(ours["peak_mb"]),
        }
        if name != "padded":
            theirs = best["padded"]
            figures |= {
                f"{name}_speedup": round(theirs["seconds"] / ours["seconds"], 2),
                f"{name}_cpu_speedup": round(theirs["cpu_seconds"] / ours["cpu_seconds"], 2),
                f"{name}_memory": round(ours["peak_mb"] / theirs["peak_mb"], 2),
            } | {
                f"{name}_{key}_difference": abs(theirs[key] - ours[key]) / abs(theirs[key])
                for key in ("loss", "gradient_norm")
            }
    asked = {k: v for k, v in vars(options).items() if k != "formulation"}
    threads = torch.get_num_threads()
    print(json.dumps({"benchmark": "rrhf", **asked, "threads": threads, **figures}))


if __name__ == "__main__":
    main()
