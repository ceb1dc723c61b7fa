"""Constrained decoding: forced runs and drafts against one token a pass, and against no constraint.

One JSON line a figure. Ratios are of one run, in CPU seconds, so that a busy machine changes
little. The model is a random Llama that wanders (a trained one chooses more like the drafts, and
is measured by bench_latency.py); names are ugly. ``--prompts 10000`` asks as many hostile prompts
over catalogues of 1, 10, 1,000 and 75,000 names and counts the answers that are invalid.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hostile import hostile_prompts, ugly_catalogue, wandering_llm
from transformers import GenerationConfig, LogitsProcessorList

from diffagent.agent.decoding.call_counts import Calls
from diffagent.agent.decoding.grammar import Grammar
from diffagent.agent.lm.format import response_text
from diffagent.agent.lm.llm import Agent, AgentInfo
from diffagent.agent.verify import verify
from diffagent.schemas.api import T2IAPI
from diffagent.t2i.catalogue import Catalogue

SIZES = (1, 10, 1_000, 75_000)
BUDGET = 160


class OneByOne:
    """The plain way: a mask at each step, and every token in a forward pass of its own."""

    def __init__(self, grammar: Grammar, length: int, eos: int) -> None:
        self.states = None
        self.grammar, self.length, self.eos = grammar, length, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            self.states = [self.grammar.start()] * len(input_ids)
        else:
            last = input_ids[:, -1].tolist()
            self.states = [
                s.step(t) if s.answer is None else s for s, t in zip(self.states, last, strict=True)
            ]
        masked = torch.full_like(scores, -math.inf)
        for row, state in enumerate(self.states):
            ids = torch.as_tensor([self.eos] if state.answer else state.tokens())
            masked[row, ids] = scores[row, ids]
        return masked

    def answers(self) -> list[str]:
        return [state.answer or state.finish() for state in self.states]


def make_agent(catalogue: Catalogue, seed: int = 0, calls: Calls | None = None) -> Agent:
    model, tokenizer = wandering_llm(catalogue, seed=seed)
    info = AgentInfo(base_model="random", trained_by=(), max_length=128)
    return Agent(model, tokenizer, info, catalogue, torch.device("cpu"), calls)


def one_by_one(agent: Agent, prompts: Sequence[str]) -> list[str]:
    answers = []
    for prompt in prompts:
        (ids,) = agent.encode([prompt], BUDGET)
        eos = agent.tokenizer.eos_token_id
        processor = OneByOne(agent.grammar(), len(ids), eos)
        agent.model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=BUDGET * 4, eos_token_id=eos, pad_token_id=eos
            ),
            logits_processor=LogitsProcessorList([processor]),
        )
        answers.append(processor.answers()[0])
    return answers


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def show(**figures: object) -> None:
    print(json.dumps({"benchmark": "decoding", **figures}), flush=True)


def ratios(count: int) -> None:
    """The same answers in runs, in runs with drafts, token by token; and free ones."""
    catalogue = ugly_catalogue(1000)
    plain = make_agent(catalogue)
    prompts = [f"a red star, number {i}" for i in range(count)]
    [[first], *_] = plain.rank(prompts[:1], max_new_tokens=4 * BUDGET)
    usual: T2IAPI = verify(first.text, catalogue).api  # drafts that are sometimes right
    calls = Calls.count(
        response_text(
            usual.model_copy(
                update={
                    "model": e.model,
                    "version": e.version,
                    "base_model": e.base_model,
                    "loras": (),
                    "embeddings": (),
                }
            )
        )
        for e in catalogue.checkpoints
    )
    agent = make_agent(catalogue, calls=calls)
    agent.grammar()
    found: dict[str, Any] = {}
    took: dict[str, float] = {}
    passes: dict[str, float] = {}
    one_by_one(agent, prompts[:1])  # builds the tries
    for name, draft in (("runs", 0), ("runs and drafts", 16)):
        decoders = [agent.decoder(max_new_tokens=4 * BUDGET, draft_tokens=draft) for _ in prompts]
        ids = agent.encode(prompts, BUDGET)
        took[name], found[name] = seconds(
            lambda decoders=decoders, ids=ids: [
                decoder.rank([row], 1, 1)[0][0].text
                for decoder, row in zip(decoders, ids, strict=True)
            ]
        )
        passes[name] = sum(decoder.counts.passes for decoder in decoders) / count
        counts = decoders[0].counts
    took["one by one"], found["one by one"] = seconds(lambda: one_by_one(agent, prompts))
    took["unconstrained"], _ = seconds(
        lambda: [agent.generate([prompt], max_new_tokens=BUDGET) for prompt in prompts]
    )
    show(
        figure="ratios",
        prompts=count,
        same_answers=len({tuple(texts) for texts in found.values()}) == 1,
        cpu_seconds_an_answer={name: round(value / count, 3) for name, value in took.items()},
        times_faster_than_one_by_one={
            name: round(took["one by one"] / value, 2) for name, value in took.items()
        },
        passes_an_answer={name: round(value, 1) for name, value in passes.items()},
        forced_and_chosen_of_the_last=[counts.forced, counts.chosen],
    )


def build(size: int) -> None:
    """Seconds from a catalogue to its grammar, all of it checkpoints."""
    catalogue = ugly_catalogue(size, networks=0)
    _, tokenizer = wandering_llm(catalogue)
    wall = time.perf_counter()
    took, grammar = seconds(lambda: Grammar(catalogue, tokenizer))
    wall = time.perf_counter() - wall
    first, _ = seconds(lambda: grammar.start().forced())
    show(
        figure="build",
        names=size,
        cpu_seconds=round(took, 2),
        wall_seconds=round(wall, 2),
        first_state_ms=round(1000 * first, 2),
    )


def hostile(count: int) -> None:
    """Invalid answers to hostile prompts, by size of the catalogue."""
    for size in SIZES:
        catalogue = ugly_catalogue(size, seed=size, networks=40)
        invalid = 0
        answers: set[str] = set()
        for part in range(4):  # models of other preferences
            agent = make_agent(catalogue, seed=part)
            prompts = hostile_prompts(count // len(SIZES) // 4, seed=part)
            mode = ("known", "free")[part % 2]
            rows = agent.rank(
                prompts, max_new_tokens=64 + 32 * part, negative_prompts=mode, batch_size=64
            )
            texts = [found[0].text for found in rows]
            invalid += sum(verify(text, catalogue).api is None for text in texts)
            answers.update(texts)
        show(figure="hostile", names=size, prompts=4 * len(prompts), invalid=invalid,
             distinct_answers=len(answers))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=640, help="hostile ones, over all sizes")
    parser.add_argument("--answers", type=int, default=8, help="for the ratios")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    build(75_000)
    ratios(arguments.answers)
    hostile(arguments.prompts)


if __name__ == "__main__":
    main()
