"""Constrained decoding: nothing invalid from a model that wanders; speed changes no answer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LogitsProcessorList

from benchmarks.hostile import hostile_prompts, ugly_catalogue, wandering_llm
from diffagent.agent.decoding.call_counts import Calls
from diffagent.agent.decoding.constrained import Decoder
from diffagent.agent.decoding.grammar import Grammar, State
from diffagent.agent.decoding.strategies import DiverseBeams, TopP
from diffagent.agent.llm_selector import LLM
from diffagent.agent.lm.format import response_text
from diffagent.agent.lm.key_values import KeyValues
from diffagent.agent.lm.llm import Agent, AgentInfo, load_agent
from diffagent.agent.selector import Choice
from diffagent.agent.verify import verify
from diffagent.schemas.api import T2IAPI, Params
from diffagent.t2i.catalogue import Catalogue
from tests.conftest import AgentRun

CPU = torch.device("cpu")
PROMPTS = ["a red star", "", "夢の絵, masterpiece", "x" * 3000]


def make_agent(catalogue: Catalogue, seed: int = 0, calls: Calls | None = None) -> Agent:
    model, tokenizer = wandering_llm(catalogue, seed=seed)
    info = AgentInfo(base_model="random", trained_by=(), max_length=400)
    return Agent(model, tokenizer, info, catalogue, CPU, calls)


def some_calls(catalogue: Catalogue) -> Calls:
    """Each checkpoint called once, with parameters of its own."""
    return Calls.count(
        response_text(
            T2IAPI(
                model=e.model,
                version=e.version,
                base_model=e.base_model,
                params=Params(
                    sampler=sorted(catalogue.samplers)[i % 3],
                    steps=10 + i % 40,
                    cfg_scale=4 + i % 7 / 2,
                    width=512,
                    height=512 + 8 * (i % 9),
                ),
                negative_prompt="blurry, bad"[: i % 12],
            )
        )
        for i, e in enumerate(catalogue.checkpoints)
    )


@pytest.fixture(scope="module")
def agent() -> Agent:
    catalogue = ugly_catalogue(60)
    return make_agent(catalogue, calls=some_calls(catalogue))


class OneByOne:
    """The plain way: a mask at each step, every token in a forward pass of its own."""

    def __init__(self, grammar: Grammar, length: int, eos: int) -> None:
        self.grammar, self.length, self.eos = grammar, length, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(scores, -math.inf)
        for row, tokens in enumerate(input_ids[:, self.length :].tolist()):
            state = self.grammar.parse(t for t in tokens if t != self.eos)
            ids = state.tokens() if state and state.answer is None else [self.eos]
            masked[row, ids] = scores[row, ids]
        return masked


def one_by_one(agent: Agent, prompt: str, grammar: Grammar) -> str:
    (ids,) = agent.encode([prompt], 256)
    eos = agent.tokenizer.eos_token_id
    processor = OneByOne(grammar, len(ids), eos)
    output = agent.model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=400, eos_token_id=eos, pad_token_id=eos
        ),
        logits_processor=LogitsProcessorList([processor]),
    )
    tokens = [token for token in output[0, len(ids) :].tolist() if token != eos]
    state: State | None = grammar.parse(tokens)
    assert state is not None
    return state.answer or state.finish()


@pytest.fixture(scope="module")
def expected(agent: Agent) -> list[str]:
    return [one_by_one(agent, prompt, agent.grammar()) for prompt in PROMPTS]


@pytest.mark.parametrize("draft_tokens", [0, 3, 16, 64])
def test_runs_and_drafts_change_no_answer(
    agent: Agent, expected: list[str], draft_tokens: int
) -> None:
    ids = agent.encode(PROMPTS, 256)
    decoder = agent.decoder(draft_tokens=draft_tokens, max_new_tokens=400)
    answers = [row.text for (row,) in decoder.rank(ids, 1, 1)]
    assert answers == expected
    assert decoder.counts.forced > 4 * 20
    assert (decoder.counts.drafted > 0) == (draft_tokens > 0)
    alone = [agent.decoder(max_new_tokens=400).rank([row], 1, 1)[0][0].text for row in ids]
    assert alone == answers


def test_a_draft_that_is_right_saves_passes() -> None:
    """A model that would write the usual call itself reads it in few passes."""
    catalogue = ugly_catalogue(1)
    plain = make_agent(catalogue)
    (answer,) = plain.generate(["a star"], constrained=True)[0]
    usual = verify(answer.text, catalogue).api
    assert usual is not None
    agent = make_agent(catalogue, calls=Calls.count([response_text(usual)]))
    passes = {}
    for draft_tokens in (0, 64):
        decoder = agent.decoder(draft_tokens=draft_tokens)
        decoder.rank(agent.encode(["a star"], 256), 1, 1)
        passes[draft_tokens] = decoder.counts.passes
    assert decoder.counts.accepted > 0
    assert passes[64] < passes[0]


@pytest.mark.parametrize("size", [1, 10, 1000])
def test_hostile_prompts_get_valid_answers(size: int) -> None:
    catalogue = ugly_catalogue(size, seed=size)
    agent = make_agent(catalogue, seed=size)
    prompts = hostile_prompts(100, seed=size)
    rows = agent.rank(prompts, 1, max_new_tokens=96, batch_size=50)
    verdicts = [verify(found[0].text, catalogue) for found in rows]
    assert [v.detail for v in verdicts if v.api is None] == []
    assert size == 1 or len({v.api.model for v in verdicts if v.api}) > 1


def test_learned_positions_are_enough() -> None:
    """GPT-2 has one vector a position: an answer never goes beyond the last."""
    catalogue = ugly_catalogue(40)
    agent = make_agent(catalogue)
    config = GPT2Config(
        vocab_size=len(agent.tokenizer), n_positions=128, n_embd=16, n_layer=1, n_head=2
    )
    torch.manual_seed(0)
    agent.model = GPT2LMHeadModel(config).eval()
    rows = agent.rank(hostile_prompts(32), 2, max_new_tokens=100)
    assert all(verify(row.text, catalogue).api for found in rows for row in found)


def test_sampled_and_diverse_answers_are_valid(agent: Agent) -> None:
    for decoding in (TopP(4, temperature=1.5, seed=3), DiverseBeams(4)):
        found = agent.generate(PROMPTS, decoding=decoding, constrained=True)
        assert [len(completions) for completions in found] == [4] * len(PROMPTS)
        texts = [completion.text for completions in found for completion in completions]
        assert all(verify(text, agent.catalogue).api for text in texts)
        assert len(set(texts)) > len(PROMPTS)
        again = agent.generate(PROMPTS[1:2], decoding=decoding, constrained=True)
        assert again == found[1:2]


def exact(agent: Agent, prompt: str) -> dict[tuple[str, str], float]:
    """Log-probability of each name, up to the first decision after it, without any trie."""
    (ids,) = agent.encode([prompt], 256)
    shared = len(agent.grammar().start().forced()[0])
    found = {}
    for entry in agent.catalogue.checkpoints:
        state, tokens = agent.grammar().start(), []
        text = T2IAPI(
            model=entry.model,
            version=entry.version,
            base_model=entry.base_model,
            params=Params(sampler="DDIM", steps=1, cfg_scale=1, width=64, height=64),
        ).to_json()
        for token in agent.tokenizer(text, add_special_tokens=False)["input_ids"]:
            if state.entry is not None and len(state.tokens()) > 1:
                break
            tokens.append(token)
            state = state.step(token) or state
        with torch.no_grad():
            logits = agent.model(torch.tensor([ids + tokens])).logits[0].double()
        steps = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])
        found[entry.model, entry.version] = float(steps[shared:].sum())
    return found


def test_probabilities_are_shares_of_the_catalogue() -> None:
    catalogue = ugly_catalogue(25, seed=4)
    agent = make_agent(catalogue)
    for parameter in agent.model.parameters():
        parameter.data.mul_(0.3)  # so that no name has all
    prompt = "a red star"
    logprobs = exact(agent, prompt)
    total = torch.tensor(list(logprobs.values())).logsumexp(0).item()
    shares = {name: math.exp(logprob - total) for name, logprob in logprobs.items()}
    assert by_name(LLM(agent, beams=25).select([prompt], 25)[0]) == pytest.approx(shares, rel=1e-3)
    # With fewer beams what was not followed counts too: never more than the share.
    few = by_name(LLM(agent, beams=4).select([prompt], 4)[0])
    assert len(few) == 4
    assert all(0 < probability <= shares[name] * 1.001 for name, probability in few.items())


def by_name(choices: list[Choice]) -> dict[tuple[str, str], float]:
    apis = [choice.verdict.api for choice in choices]
    probabilities = [choice.probability or 0 for choice in choices]
    assert probabilities == sorted(probabilities, reverse=True)
    names = [(api.model, api.version) for api in apis if api]
    return dict(zip(names, probabilities, strict=True))


def test_a_temperature_flattens_the_probabilities(agent: Agent) -> None:
    sharp, flat = (
        [choice.probability or 0 for choice in LLM(agent, temperature=t).select(["x"], 5)[0]]
        for t in (1.0, 4.0)
    )
    assert sharp == sorted(sharp, reverse=True)
    assert sum(flat) <= 1
    assert flat[0] / flat[-1] < sharp[0] / sharp[-1]


@pytest.mark.parametrize("temperature", [0.5, 2.0, 5.0])
def test_a_temperature_is_of_names_and_not_of_tokens(temperature: float) -> None:
    """With every name scored the probabilities are the softmax over names."""
    catalogue = ugly_catalogue(25, seed=4)
    agent = make_agent(catalogue)
    for parameter in agent.model.parameters():
        parameter.data.mul_(0.3)
    tempered = {name: p / temperature for name, p in exact(agent, "a red star").items()}
    total = torch.tensor(list(tempered.values())).logsumexp(0).item()
    shares = {name: math.exp(p - total) for name, p in tempered.items()}
    every = LLM(agent, beams=25, temperature=temperature).select(["a red star"], 25)[0]
    assert by_name(every) == pytest.approx(shares, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_few_beams_state_nearly_the_exact_probability(
    agent_run: AgentRun, temperature: float
) -> None:
    """Of an agent that writes names of its catalogue, tempered or not."""
    agent = load_agent(agent_run.agent.path, "cpu")
    for prompt in ("a red star on white, flat design", "a moon", "a blue ring, pencil sketch"):
        tempered = {name: p / temperature for name, p in exact(agent, prompt).items()}
        total = torch.tensor(list(tempered.values())).logsumexp(0).item()
        few = by_name(LLM(agent, beams=4, temperature=temperature).select([prompt], 4)[0])
        for name, probability in few.items():
            assert probability == pytest.approx(math.exp(tempered[name] - total), abs=0.05)


def test_choices_are_different_checkpoints(agent: Agent) -> None:
    for choices in LLM(agent).select(PROMPTS, 5):
        apis = [choice.verdict.api for choice in choices]
        assert len({(api.model, api.version) for api in apis if api}) == 5
    few = make_agent(ugly_catalogue(3))
    assert [len(found) for found in LLM(few).select(PROMPTS, 5)] == [3] * len(PROMPTS)


def test_unconstrained_answers_stay_available(agent: Agent) -> None:
    [[choice]] = LLM(agent, 32, constrained=False).select(["a star"])
    assert choice.verdict.status == "invalid"
    assert choice.logprob is not None


@pytest.mark.parametrize("cut", [0, 2])
def test_rows_of_different_lengths_read_like_whole_ones(agent: Agent, cut: int) -> None:
    """Padding and what was forgotten leave no trace."""
    keys = KeyValues(agent.model, CPU)
    first, second = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]]
    keys.feed(first, [[2], [0]])
    keys.feed([[*second[0], *[3] * cut], second[1]], [[0], [0]])
    keys.forget([cut, 0])
    keys.select([1, 0, 1])
    found = keys.feed([[20], [], [21, 22]], [[0], [], [0, 1]])
    for row, tokens in enumerate(([8, *second[1], 20], None, [8, *second[1], 21, 22])):
        if tokens:
            with torch.no_grad():
                whole = agent.model(torch.tensor([tokens])).logits[0, -1]
            assert torch.allclose(found[row][-1], whole, atol=1e-4)
    (after,) = keys.feed([[], [15], []], [[], [0], []])[1:2]
    with torch.no_grad():
        whole = agent.model(torch.tensor([[5, 6, 7, 9, 10, 15]])).logits[0, -1]
    assert torch.allclose(after[0], whole, atol=1e-4)


def test_the_budget_ends_every_answer(agent: Agent) -> None:
    class Counting(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.longest = model, 0

        def forward(self, **inputs: Any) -> Any:
            self.longest = max(self.longest, int(inputs["attention_mask"].sum(1).max()))
            return self.model(**inputs)

    for budget in (1, 20, 60):
        counting = Counting(agent.model)
        decoder = Decoder(counting, agent.grammar("free"), CPU, budget)
        ids = [[1, 2, 3]]
        for rows in (decoder.rank(ids, 3, 3), decoder.rank(ids, 1, 1)):
            assert all(verify(row.text, agent.catalogue).api for row in rows[0])
        assert counting.longest <= len(ids[0]) + budget
