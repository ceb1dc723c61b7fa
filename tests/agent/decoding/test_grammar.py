"""The grammar accepts every valid answer as it is trained on, and nothing else."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.hostile import ugly_catalogue
from diffagent.agent.decoding.call_counts import Calls
from diffagent.agent.decoding.grammar import FreeText, Grammar, State
from diffagent.agent.decoding.trie import TokenTrie
from diffagent.agent.decoding.vocabulary import DEAD, END, TEXT, Vocabulary, token_bytes
from diffagent.agent.lm.format import encode_text as encode
from diffagent.agent.lm.format import response_text
from diffagent.agent.verify import verify
from diffagent.errors import ArtifactError
from diffagent.schemas.api import T2IAPI, Embedding, LoRA, Params
from diffagent.t2i.catalogue import Catalogue, Entry
from diffagent.train.tiny_llama import build_tokenizer
from tests.agent.agent_world import entry, make_rows

CATALOGUE = ugly_catalogue(120, networks=40)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("sandbox", "gpt2", "llama3", "llama2")


def texts() -> list[str]:
    calls = [json.loads(str(row["api"])) for row in make_rows(60, 1)]
    named = [f'{{"model":"{e.model}","version":"{e.version}"' for e in CATALOGUE.entries]
    return [json.dumps(call, separators=(",", ":")) for call in calls] + named


@cache
def tokenizer_of(kind: str) -> Any:
    """Tokenizers as the common families of models have them, trained on a few answers."""
    if kind == "sandbox":
        return build_tokenizer(texts(), 600)
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "llama2", unk_token=None))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>"]
    if kind == "llama2":
        # Merges stay within letters, digits or punctuation, but nothing splits a text.
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|\p{N}|▁"), "isolated")
        alphabet, special = [], [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
        tokenizer.pre_tokenizer = (
            level if kind == "gpt2" else pre_tokenizers.Sequence([split, level])
        )
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([t for t in texts() if t.isascii()], trainer)
    if kind == "llama2":
        data = json.loads(tokenizer.to_str())
        data["pre_tokenizer"] = None
        data["added_tokens"] = data["added_tokens"][:2]  # bytes are ordinary tokens
        tokenizer = Tokenizer.from_str(json.dumps(data))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@cache
def grammar_of(kind: str) -> Grammar:
    return Grammar(CATALOGUE, tokenizer_of(kind), negative_prompts="free", max_characters=200)


NUMBERS = st.one_of(st.integers(0, 30), st.integers(0, 300_000).map(lambda n: n / 10_000))
TEXT_ = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@st.composite
def apis(draw: st.DrawFn) -> T2IAPI:
    """Valid calls of the ugly catalogue, in all that the grammar knows of them."""
    checkpoint = draw(st.sampled_from(CATALOGUE.checkpoints))

    def laid_over(entries: tuple[Entry, ...]) -> list[Entry]:
        fitting = [e for e in entries if e.ecosystem == checkpoint.ecosystem]
        return draw(st.lists(st.sampled_from(fitting), max_size=8)) if fitting else []

    weight = st.integers(-40_000, 40_000).map(lambda n: n / 10_000)
    sides = st.integers(8, 512).map(lambda n: 8 * n)
    return T2IAPI(
        model=checkpoint.model,
        version=checkpoint.version,
        base_model=checkpoint.base_model,
        loras=tuple(
            LoRA(model=e.model, version=e.version, weight=draw(weight))
            for e in laid_over(CATALOGUE.loras)
        ),
        embeddings=tuple(
            Embedding(model=e.model, version=e.version, weight=draw(weight), negative=n % 2 == 0)
            for n, e in enumerate(laid_over(CATALOGUE.embeddings))
        ),
        params=Params(
            sampler=draw(st.sampled_from(sorted(CATALOGUE.samplers))),
            steps=draw(st.integers(1, 150)),
            cfg_scale=draw(NUMBERS),
            width=draw(sides),
            height=draw(sides),
            clip_skip=draw(st.integers(1, 12)),
        ),
        negative_prompt=draw(TEXT_),
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(api=apis())
def test_every_valid_answer_is_accepted_in_its_own_tokens(kind: str, api: T2IAPI) -> None:
    text = response_text(api)
    assert verify(text, CATALOGUE).status == "valid"
    state = grammar_of(kind).parse(encode(tokenizer_of(kind), text))
    assert state is not None
    assert state.answer == text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_is_accepted_is_valid(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    state: State = grammar_of(kind).start()
    given_up = rng.randrange(5, 400)
    for _ in range(given_up):
        if state.answer is not None:
            break
        allowed = state.tokens()
        assert len(allowed) == len(set(allowed.tolist())) > 0
        if (after := state.step(int(rng.choice(allowed)))) is None:
            raise AssertionError("a token that is allowed may not come")
        state = after
    text = state.answer or state.finish()
    verdict = verify(text, CATALOGUE)
    assert verdict.api is not None, verdict
    assert verdict.api.response().to_json() == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_not_allowed_may_not_come(kind: str) -> None:
    rng = random.Random(1)
    state, tokenizer = grammar_of(kind).start(), tokenizer_of(kind)
    while state.answer is None:
        allowed = set(state.tokens().tolist())
        for token in rng.sample(range(len(tokenizer)), 20):
            if not isinstance(state.threads[0], FreeText):
                assert (state.step(token) is not None) == (token in allowed)
        state = state.step(rng.choice(sorted(allowed))) or state


def test_forced_runs_end_where_there_is_a_choice() -> None:
    grammar = grammar_of("gpt2")
    tokens, state = grammar.start().forced()
    assert tokenizer_of("gpt2").decode(tokens).startswith('{"model')
    assert len(state.tokens()) > 1
    alone = Grammar(Catalogue([CATALOGUE.checkpoints[0]], ["Euler a"]), tokenizer_of("gpt2"))
    tokens, state = alone.start().forced()
    written = tokenizer_of("gpt2").decode(tokens)
    assert '"loras":[],"params":{"sampler":"Euler a","steps' in written
    assert len(state.tokens()) > 1


def test_negative_prompts_are_those_of_the_training() -> None:
    first, second, third = CATALOGUE.checkpoints[:3]
    calls = Calls.count(
        response_text(
            T2IAPI(
                model=e.model,
                version=e.version,
                base_model=e.base_model,
                params=Params(sampler="DDIM", steps=20, cfg_scale=7.5, width=512, height=512),
                negative_prompt=negative,
            )
        )
        for e, negative in ((first, "blurry"), (first, 'the "worst"'), (second, "blurry, low"))
    )
    grammar, rng = Grammar(CATALOGUE, tokenizer_of("gpt2"), calls), random.Random(0)
    allowed = {first: {"", "blurry", 'the "worst"'}, second: {"", "blurry, low"}, third: {""}}
    for checkpoint, expected in allowed.items():
        known = set(calls.of_version(checkpoint)) | set(calls.of_base_model(checkpoint.base_model))
        assert expected <= known
        for negative in sorted(known):
            api = T2IAPI(
                model=checkpoint.model,
                version=checkpoint.version,
                base_model=checkpoint.base_model,
                params=Params(sampler="DDIM", steps=rng.randrange(1, 151), cfg_scale=7, width=64,
                              height=64),
                negative_prompt=negative,
            )  # fmt: skip
            text = response_text(api)
            state = grammar.parse(encode(tokenizer_of("gpt2"), text))
            assert state is not None and state.answer == text
            unknown = text.replace('"negative_prompt":"', '"negative_prompt":"no ')
            assert grammar.parse(encode(tokenizer_of("gpt2"), unknown)) is None
    assert grammar.usual(first) and not grammar.usual(third)


def test_a_free_text_ends_in_time_and_whole() -> None:
    grammar = Grammar(CATALOGUE, tokenizer_of("llama2"), max_characters=10)
    rng, lengths = random.Random(2), []
    for _ in range(30):
        state = grammar.start()
        while state.answer is None:
            state = state.step(int(rng.choice(state.tokens()))) or state
        lengths.append(len(json.loads(state.answer)["negative_prompt"]))
    assert 0 < max(lengths) <= 10


def test_what_cannot_be_answered_is_refused() -> None:
    with pytest.raises(ArtifactError, match="0 checkpoints and 1 samplers"):
        Grammar(Catalogue([entry(1, "a", "b", "LORA")], ["DDIM"]), tokenizer_of("gpt2"))


def test_a_trie_gives_children_and_rests() -> None:
    trie = TokenTrie([[1, 2, 300], [1, 2], [5], [1, 2]], ["c", "a", "d", "b"], [3, 1, 4, 2])
    assert trie.values == [1, 3, 4]  # the second of equal sequences is never told from the first
    assert trie.children(0, 3, 0).tolist() == [1, 5]
    assert trie.narrow(0, 3, 0, 1) == (0, 2)
    assert trie.narrow(0, 3, 0, 2) == (2, 2)
    assert trie.rest(1, 1) == [2, 300]
    assert (trie.row("d"), trie.row("b"), trie.length(0)) == (2, None, 2)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_automaton_reads_json_strings(text: str) -> None:
    vocabulary = grammar_of("gpt2").vocabulary
    written = json.dumps(text, ensure_ascii=False)
    assert vocabulary.run(TEXT, f"{written[1:]}}}".encode()) == END
    assert vocabulary.run(TEXT, written[1:-1].encode()) == TEXT
    assert vocabulary.run(TEXT, f"{written}}}".encode()) != END


@pytest.mark.parametrize("wrong", [b"\n", b"\\/", b"\\u0041", b"\\u000a", b"\xff", b"\xc0\x80",
                                   b"\xed\xa0\x80", b'"x', b"\\u00zz"])  # fmt: skip
def test_other_spellings_are_refused(wrong: bytes) -> None:
    assert Vocabulary(tokenizer_of("gpt2")).run(TEXT, wrong) == DEAD


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_spell_their_bytes(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    spelt = token_bytes(tokenizer)
    for text in ('{"model":"Dream 夢 🌸\\n"}', " a  b\t", "é</s>"):
        joined = b"".join(spelt[token] for token in encode(tokenizer, text))
        assert joined.decode().removeprefix(" " if kind == "llama2" else "") == text
    assert spelt[tokenizer.eos_token_id] == b""
