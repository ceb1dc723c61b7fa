"""Seconds an answer of SmolLM2-135M takes, constrained, from a warm process and from a cold start.

One JSON line a figure. ``--agent DIR`` takes an agent. Without it the released weights, which
know nothing of the task, stand in, and what they would answer is of no use, so each choice is
replaced by that of a real call of ``--dabench`` (test split; else of a small made-up world): the
passes and their lengths are those of an agent that answers like one user (``--led`` does that to
an agent). ``usual calls`` are those that a checkpoint mostly has in training, which is what a
trained agent tends to, being greedy: what it needs lies between the two. ``untrained`` is what
the released weights do on their own: they stack LoRAs.

On a busy machine read the CPU seconds: with two threads, twice what a calm machine takes.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffagent.agent.lm.format import response_text
from diffagent.agent.lm.key_values import KeyValues
from diffagent.agent.lm.llm import Agent, AgentInfo, load_agent, save_agent
from diffagent.agent.prompts import Pair, read_split
from diffagent.schemas.api import parse_api


class Led(torch.nn.Module):
    """A model whose choices are those of a given text; it computes what it would without."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.ids: list[int] = []
        if hasattr(model, "make_cache"):
            self.make_cache = model.make_cache

    def forward(self, input_ids: Any, position_ids: Any, logits_to_keep: Any, **inputs: Any) -> Any:
        output = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            **inputs,
        )
        for i, column in enumerate(logits_to_keep.tolist()):
            following = int(position_ids[0, column]) + 1
            if following < len(self.ids):
                output.logits[0, i, self.ids[following]] += 1e4
        return output


def show(**figures: object) -> None:
    print(json.dumps({"benchmark": "latency", **figures}), flush=True)


def make_agent(directory: Path, dabench: Path) -> None:
    """An agent's directory with the released weights."""
    from diffagent.agent.lm.smollm2 import SMOLLM2, load_smollm2

    model, tokenizer = load_smollm2()
    info = AgentInfo(base_model=SMOLLM2, trained_by=(), max_length=512)
    save_agent(directory, model, tokenizer, info, dabench)


def measure(
    name: str, agent: Agent, pairs: list[Pair], *, draft_tokens: int, budget: int, led: bool
) -> None:
    """One prompt after the other."""
    plain, wall, cpu, counts = agent.model, [], [], []
    leader = Led(plain)
    agree = 0
    for pair in pairs:
        (ids,) = agent.encode([pair.prompt], budget)
        text = response_text(pair.api)
        leader.ids = ids + agent.tokenizer(text, add_special_tokens=False)["input_ids"]
        agent.model = leader if led else plain
        decoder = agent.decoder(max_new_tokens=budget, draft_tokens=draft_tokens)
        started, used = time.perf_counter(), time.process_time()
        [[row]] = decoder.rank([ids], 1, 1)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
        counts.append([decoder.counts.passes, decoder.counts.chosen, decoder.counts.forced])
        agree += row.text == text
    agent.model = plain
    passes, chosen, forced = np.mean(counts, 0).round(1).tolist()
    show(
        figure=name,
        prompts=len(pairs),
        p50=round(float(np.median(wall)), 2),
        p95=round(float(np.percentile(wall, 95)), 2),
        cpu_seconds_p50=round(float(np.median(cpu)), 2),
        passes=passes,
        chosen=chosen,
        forced=forced,
        **({"led_to_the_whole_call": agree} if led else {}),
    )


def usual(agent: Agent, pair: Pair) -> Pair:
    """The pair with the call that its checkpoint mostly has in training, if it has one."""
    entry = agent.catalogue.checkpoint(pair.api.model, pair.api.version)
    text = agent.calls.usual(entry) if agent.calls and entry else None
    return replace(pair, api=parse_api(text)) if text else pair


def closeness(agent: Agent, others: dict[str, Agent], pairs: list[Pair]) -> None:
    """How far next-token distributions over prompts and their calls are from those in float32."""
    said: dict[str, list[torch.Tensor]] = {name: [] for name in ("float32", *others)}
    for pair in pairs:
        (ids,) = agent.encode([pair.prompt], 256)
        ids += agent.tokenizer(response_text(pair.api), add_special_tokens=False)["input_ids"]
        for name, other in {"float32": agent, **others}.items():
            (logits,) = KeyValues(other.model, agent.device).feed([ids], [range(len(ids))])
            said[name].append(logits.log_softmax(-1))
    expected = torch.cat(said.pop("float32"))
    for name, rows in said.items():
        found = torch.cat(rows)
        show(
            figure=f"{name} against float32",
            tokens=len(found),
            kl_divergence=round(float((expected.exp() * (expected - found)).sum(1).mean()), 4),
            same_token=round(float((found.argmax(1) == expected.argmax(1)).float().mean()), 3),
        )


def torch_int8(directory: Path) -> Agent:
    """8 bits as torch has them: one range for all inputs of a product."""
    agent = load_agent(directory, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        quantize: Any = torch.ao.quantization.quantize_dynamic
        agent.model = quantize(agent.model, {torch.nn.Linear}, dtype=torch.qint8)
    return agent


def cold_start(directory: Path, prompt: str, int8: bool) -> None:
    """Of the command ``diffagent select``: its first answer, a second one, and what is between."""
    command = [sys.executable, "-m", "diffagent.cli.main", "select", "-", "--agent", str(directory)]
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, *(["--int8"] if int8 else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        marks: list[float] = []
        for _ in range(2):
            process.stdin.write(prompt.replace("\n", " ") + "\n")
            process.stdin.flush()
            process.stdout.readline()
            marks.append(time.perf_counter() - started)
        process.stdin.close()
    first, second = marks[0], marks[1] - marks[0]
    figures = {"first": first, "second": second, "start": first - second}
    show(figure="command", int8=int8, **{name: round(value, 2) for name, value in figures.items()})


def loaded(load: Callable[[], Agent], name: str) -> Agent:
    started, used = time.perf_counter(), time.process_time()
    agent = load()
    agent.grammar()
    show(
        figure=f"load {name}",
        seconds=round(time.perf_counter() - started, 2),
        cpu_seconds=round(time.process_time() - used, 2),
        names=len(agent.catalogue.checkpoints),
    )
    return agent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dabench", type=Path, help="a DABench directory with a test split")
    parser.add_argument("--agent", type=Path, help="a trained agent")
    parser.add_argument("--led", action="store_true", help="choices of real calls")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        dabench = arguments.dabench
        if dabench is None:
            from tests.agent.agent_world import make_world

            dabench = make_world(Path(folder), train=200, test=20).path
        directory = arguments.agent or Path(folder, "agent")
        if arguments.agent is None:
            directory.mkdir()
            make_agent(directory, dabench)
        pairs = read_split(dabench, "test")
        random.Random(0).shuffle(pairs)
        first, pairs = pairs[0], pairs[1 : arguments.prompts + 1]
        led = arguments.led or arguments.agent is None

        def answers(name: str, agent: Agent, pairs: list[Pair], **options: Any) -> None:
            options = {"draft_tokens": 16, "led": led, "budget": arguments.budget} | options
            measure(name, agent, pairs, **options)

        small = loaded(lambda: load_agent(directory, "cpu", "int8", generates=False), "int8")
        answers("warm-up", small, [first])
        answers("int8, runs and drafts", small, pairs)
        if led:
            most = [usual(small, pair) for pair in pairs]
            answers("int8, runs and drafts, usual calls", small, most)
            answers("int8, untrained", small, pairs[:3], led=False)
        answers("int8, runs", small, pairs, draft_tokens=0)
        plain = loaded(lambda: load_agent(directory, "cpu", generates=False), "float32")
        answers("float32, runs and drafts", plain, pairs[:5])
        whole = loaded(lambda: load_agent(directory, "cpu"), "transformers, float32")
        answers("transformers, float32, runs and drafts", whole, pairs[:5])
        closeness(plain, {"int8": small, "torch's int8": torch_int8(directory)}, pairs[:10])
        for int8 in (True, False):
            cold_start(directory, first.prompt, int8)


if __name__ == "__main__":
    main()
