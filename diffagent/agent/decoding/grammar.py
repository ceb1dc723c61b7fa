"""The language of valid answers over a catalogue, as an automaton over tokens.

An answer is the compact JSON of `diffagent.schemas.api`. It is cut into segments, each of which
ends with a letter or digit and is followed by punctuation::

    {"model":"M","version":"V","type":"Checkpoint | ","base_model":"SD 1.5","loras |
    ":[],"params":{"sampler":"Euler a","steps | ":20 | ,"cfg_scale":7 | .5 | ,"width":512 | ...

and each segment is chosen from a `TokenTrie` of its alternatives in the tokenizer's own
encoding. BPE does not merge a letter or digit with the punctuation after it, so the tokens of
the segments are the tokens of the whole: the agent is only ever asked for what it was trained to
write. (A tokenizer that has whole keys for tokens is cut before the key. Where one merges at a
seam all the same, answers are as valid, in a spelling that it saw less.)

A `State` is the set of places in tries where the tokens so far may have led: several where one
value begins another ("2", "20") or where a list may end or go on.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from diffagent.agent.decoding.call_counts import Calls
from diffagent.agent.decoding.trie import TokenTrie, encode_texts
from diffagent.agent.decoding.vocabulary import DEAD, END, TEXT, Ints, Vocabulary
from diffagent.errors import ArtifactError
from diffagent.t2i.catalogue import Catalogue, Entry

NegativePrompts = Literal["known", "free"]
Trie = TokenTrie[Any]

MAX_NETWORKS = 8
#: Keys with the quote that ends the value before them; where they are cut depends on the tokenizer.
_LORAS, _STEPS, _WEIGHT = '","loras":[', '","steps":', '","weight":'
_PARAMS, _EMBEDDINGS = '"params":{"sampler":"', '"embeddings":['
_NEGATIVE = '},"negative_prompt":'
#: What a segment follows, as far as its tokens are concerned.
_CONTEXT = "1"
#: Fractions of at most 4 digits in their shortest form.
_FRACTIONS = tuple(
    f".{number:0{digits}}" for digits in range(1, 5) for number in range(10**digits) if number % 10
)


@dataclass(frozen=True, slots=True)
class Written:
    """What the finished segments say.

    Attributes:
        text: of the answer so far.
        entry: the checkpoint, once it is decided.
        rows: the segments, as rows of tries.
        networks: how many the list that is being written has.
        is_lora: whether that is the list of LoRAs.
    """

    text: str = ""
    entry: Entry | None = None
    rows: tuple[tuple[Trie, int], ...] = ()
    networks: int = 0
    is_lora: bool = True

    def add(self, trie: Trie, row: int) -> Written:
        """With one more segment."""
        return replace(self, text=self.text + trie.texts[row], rows=(*self.rows, (trie, row)))


Then = Callable[[Written, Any], "tuple[Thread | FreeText, ...]"]


@dataclass(frozen=True, slots=True)
class Thread:
    """A place in a trie: rows that agree with the tokens of this segment so far."""

    written: Written
    trie: Trie
    then: Then
    low: int
    high: int
    depth: int = 0

    def tokens(self) -> Ints:
        """What may come next, ascending."""
        return self.trie.children(self.low, self.high, self.depth).astype(np.int64)

    def step(self, token: int) -> Thread | None:
        """After ``token``; None if it may not come."""
        low, high = self.trie.narrow(self.low, self.high, self.depth, token)
        return replace(self, low=low, high=high, depth=self.depth + 1) if low < high else None

    def finish(self, row: int) -> tuple[Thread | FreeText, ...] | Written:
        """What follows when this segment is ``row``: threads, or the whole answer."""
        written = self.written.add(self.trie, row)
        return self.then(written, self.trie.values[row]) or written


@dataclass(frozen=True, slots=True)
class FreeText:
    """Inside the negative prompt, or at ``offset`` in the key before it while that is >= 0."""

    written: Written
    grammar: Grammar
    left: int
    offset: int = 0
    state: int = TEXT
    content: bytes = b""
    clean: int = 0

    def tokens(self) -> Ints:
        """What may come next, ascending."""
        if self.offset >= 0:
            return np.array(sorted(self.grammar.opening[self.offset]), np.int64)
        step = self.grammar.vocabulary.step(self.state)
        if self.state != TEXT:  # what is begun must be ended
            return step.tokens
        return step.tokens[step.characters <= max(self.left, 0)]

    def step(self, token: int) -> FreeText | None:
        """After ``token``; None if it may not come."""
        spelt = self.grammar.vocabulary.bytes[token]
        if self.offset >= 0:
            if token not in self.grammar.opening[self.offset]:
                return None
            end = self.offset + len(spelt)
            missing = len(self.grammar.literal) - end
            if missing > 0:
                return replace(self, offset=end)
            spelt = spelt[len(spelt) + missing :]
        state = self.grammar.vocabulary.run(self.state, spelt)
        left = self.left - sum(byte & 0xC0 != 0x80 for byte in spelt)
        content = self.content + spelt
        clean = len(content) if state == TEXT else self.clean
        return replace(self, offset=-1, state=state, content=content, clean=clean, left=left)

    def closed(self) -> Written:
        """The whole answer, the text closed where its last character is complete."""
        content = self.content if self.state == END else self.content[: self.clean] + b'"}'
        text = self.written.text + (self.grammar.literal + content).decode()
        return replace(self.written, text=text)


@dataclass(frozen=True, slots=True)
class State:
    """Where an answer stands: threads, or once it is complete what is ``written``."""

    threads: tuple[Thread | FreeText, ...]
    written: Written | None = None

    @property
    def answer(self) -> str | None:
        """The text of a complete answer, else None."""
        return self.written.text if self.written else None

    @property
    def entry(self) -> Entry | None:
        """The checkpoint, once it is decided."""
        return (self.written or self.threads[0].written).entry

    def tokens(self) -> Ints:
        """What may come next, ascending; at least one token unless there is an ``answer``."""
        if len(self.threads) == 1:
            return self.threads[0].tokens()
        return np.unique(np.concatenate([thread.tokens() for thread in self.threads]))

    def step(self, token: int) -> State | None:
        """After ``token``; None if it may not come."""
        stepped = [thread.step(token) for thread in self.threads]
        return _settled(thread for thread in stepped if thread) if any(stepped) else None

    def forced(self) -> tuple[list[int], State]:
        """The tokens that come next whatever the model says, and the state after them."""
        tokens: list[int] = []
        state = self
        while state.written is None:
            thread = state.threads[0]
            if (
                len(state.threads) == 1
                and isinstance(thread, Thread)
                and thread.low + 1 == thread.high
            ):
                tokens += thread.trie.rest(thread.low, thread.depth)
                end = replace(thread, depth=thread.trie.length(thread.low))
                state = _settled([end])
                continue
            allowed = state.tokens()
            if len(allowed) > 1:
                break
            tokens.append(int(allowed[0]))
            state = _sure(state.step(tokens[-1]))
        return tokens, state

    def towards(self, rows: Mapping[int, Sequence[int]]) -> int | None:
        """The next token on the way to one of ``rows`` (by id of their trie), or None."""
        for thread in self.threads:
            if isinstance(thread, Thread):
                for row in rows.get(id(thread.trie), ()):
                    if thread.low <= row < thread.high:
                        return thread.trie.token(row, thread.depth)
        return None

    def finish(self) -> str:
        """A valid answer that begins like this, decided without a model: lists end."""
        state = self
        while state.written is None:
            thread = state.threads[-1]
            if isinstance(thread, FreeText):
                return thread.closed().text
            follow = thread.finish(thread.low)
            state = State((), follow) if isinstance(follow, Written) else _settled(follow)
        return state.written.text


def _settled(threads: Iterable[Thread | FreeText]) -> State:
    """The state of these threads: where a row of a trie ends, what follows it begins."""
    found: list[Thread | FreeText] = []
    pending = list(threads)[::-1]
    while pending:
        thread = pending.pop()
        if isinstance(thread, FreeText):
            if thread.state == END:
                return State((), thread.closed())
            found.append(thread)
        elif thread.trie.length(thread.low) > thread.depth:
            found.append(thread)
        else:
            follow = thread.finish(thread.low)
            if isinstance(follow, Written):
                return State((), follow)
            pending += follow[::-1]
            if thread.low + 1 < thread.high:
                pending.append(replace(thread, low=thread.low + 1))
    return State(tuple(found))


def _sure(state: State | None) -> State:
    assert state is not None, "a token that the state itself gave"
    return state


class Grammar:
    """Valid answers over ``catalogue`` in the tokens of ``tokenizer``.

    Args:
        catalogue: what may be named.
        tokenizer: a fast tokenizer of transformers.
        calls: how checkpoints were called in training; needed for 'known'.
        negative_prompts: 'known': one that was seen with the version or is common with its base
            model, or none; 'free': any text. Without ``calls`` it is free.
        max_characters: of a free negative prompt.

    Raises:
        ArtifactError: the catalogue has no checkpoint or no sampler.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tokenizer: Any,
        calls: Calls | None = None,
        negative_prompts: NegativePrompts = "known",
        max_characters: int = 1000,
    ) -> None:
        self._tokenizer = tokenizer
        self._samplers = sorted(catalogue.samplers)
        checkpoints = [entry for entry in catalogue.checkpoints if _nameable(entry)]
        if not checkpoints or not self._samplers:
            raise ArtifactError(
                f"the catalogue has {len(checkpoints)} checkpoints and {len(self._samplers)} "
                "samplers, so there is no valid answer; build the dataset again"
            )
        self._networks: dict[tuple[bool, str], list[Entry]] = defaultdict(list)
        for is_lora, entries in ((True, catalogue.loras), (False, catalogue.embeddings)):
            for entry in filter(_nameable, entries):
                self._networks[is_lora, entry.ecosystem].append(entry)
        self._calls = calls
        self._known = calls if negative_prompts == "known" else None
        self._max_characters = max_characters
        self._tries: dict[tuple[object, ...], Trie] = {}
        self._usual: dict[str, dict[int, tuple[int, ...]]] = {}
        texts = [name_text(entry.model, entry.version) for entry in checkpoints]
        self._head: Trie = TokenTrie(encode_texts(tokenizer, texts), texts, checkpoints)
        self._loras = self._cut(_LORAS, ('],"params', '{"model'))
        self._steps = self._cut(_STEPS, ("1", "20"))
        self._weight = self._cut(_WEIGHT, ("1", "0.5", "-1"))
        self._start = _settled(self._all(Written(), self._head, self._after_head))

    def start(self) -> State:
        """Before the first token."""
        return self._start

    def parse(self, tokens: Iterable[int]) -> State | None:
        """The state after ``tokens``; None as soon as one of them may not come."""
        state: State | None = self._start
        for token in tokens:
            if state is None or state.written:
                return None
            state = state.step(token)
        return state

    def usual(self, entry: Entry) -> Mapping[int, Sequence[int]]:
        """The segments of the call that the entry mostly has in training, by id of their trie."""
        text = self._calls.usual(entry) if self._calls else None
        if text is None:
            return {}
        if text not in self._usual:
            self._usual[text] = self._rows(text)
        return self._usual[text]

    def _rows(self, text: str) -> dict[int, tuple[int, ...]]:
        rows: dict[int, tuple[int, ...]] = {}
        state = self.parse(encode_texts(self._tokenizer, [text])[0])
        if state is not None and state.written:
            for trie, row in state.written.rows:
                rows[id(trie)] = (*rows.get(id(trie), ()), row)
        return rows

    # Tries, each built when it is first needed.

    def _trie(
        self,
        key: tuple[object, ...],
        make: Callable[[], Sequence[tuple[str, Any]]],
        context: str = "",
    ) -> Trie:
        key = (*key, context)
        if key not in self._tries:
            pairs = make()
            texts = [text for text, _ in pairs]
            sequences = encode_texts(self._tokenizer, texts, context or _CONTEXT)
            self._tries[key] = TokenTrie(sequences, texts, [value for _, value in pairs])
        return self._tries[key]

    def _choice(self, opening: str, options: Iterable[object], context: str = "") -> Trie:
        """``options`` after ``opening``, which is theirs alone."""
        return self._trie(
            (opening,), lambda: [(f"{opening}{option}", str(option)) for option in options], context
        )

    def _network_trie(
        self, opening: str, is_lora: bool, ecosystem: str, context: str
    ) -> Trie | None:
        entries = self._networks.get((is_lora, ecosystem))
        if not entries:
            return None
        return self._trie(
            (opening, is_lora, ecosystem),
            lambda: [
                (f"{opening}{_named(entry.model, entry.version)[:-1]}{self._weight[0]}", entry)
                for entry in entries
            ],
            context,
        )

    def _cut(self, key: str, values: Sequence[str]) -> tuple[str, str]:
        """``key`` in two where no token reaches across: after it, after its name, or before it."""

        def holds(seam: int) -> bool:
            left = f'{{"model":"v1{key[:seam]}'
            head, *whole = encode_texts(
                self._tokenizer, [left, *(left + key[seam:] + value for value in values)]
            )
            return all(ids[: len(head)] == head for ids in whole)

        seam = next((s for s in (len(key), key.rindex('"')) if holds(s)), 0)
        return key[:seam], key[seam:]

    @staticmethod
    def _all(written: Written, trie: Trie | None, then: Then) -> tuple[Thread, ...]:
        return (Thread(written, trie, then, 0, len(trie)),) if trie else ()

    # What follows what. In each answer the thread that leads to the end comes last.

    def _after_head(self, written: Written, entry: Entry) -> tuple[Thread | FreeText, ...]:
        base_model = _quoted(entry.base_model)[1:-1]
        trie = self._choice(f'","base_model":"{base_model}{self._loras[0]}', [""])
        return self._all(replace(written, entry=entry), trie, self._after_base_model)

    def _after_base_model(self, written: Written, _: object) -> tuple[Thread | FreeText, ...]:
        return (
            *self._network(written, self._loras[1], True, self._loras[0]),
            *self._after_loras(written, f"{self._loras[1]}],", self._loras[0]),
        )

    def _after_loras(
        self, written: Written, end: str, context: str = ""
    ) -> tuple[Thread | FreeText, ...]:
        written = replace(written, networks=0)
        return (
            *self._network(written, end + _EMBEDDINGS, False, context),
            *self._params(written, end, context),
        )

    def _network(
        self, written: Written, opening: str, is_lora: bool, context: str = ""
    ) -> tuple[Thread, ...]:
        assert written.entry is not None
        if written.networks == MAX_NETWORKS:
            return ()
        trie = self._network_trie(opening, is_lora, written.entry.ecosystem, context)
        more = replace(written, networks=written.networks + 1, is_lora=is_lora)
        return self._all(more, trie, self._after_name)

    def _after_name(self, written: Written, _: object) -> tuple[Thread | FreeText, ...]:
        whole = [f"{sign}{number}" for sign in ("", "-") for number in range(5)]
        trie = self._choice(self._weight[1], whole, self._weight[0])
        return self._all(written, trie, self._after_weight)

    def _after_weight(self, written: Written, whole: str) -> tuple[Thread | FreeText, ...]:
        end = () if whole == "-0" else self._after_network(written, whole)
        if whole.endswith("4"):
            return end
        fraction = self._choice("", _FRACTIONS)
        return (*self._all(written, fraction, self._after_network), *end)

    def _after_network(self, written: Written, _: object) -> tuple[Thread | FreeText, ...]:
        if written.is_lora:
            return (
                *self._network(written, "},", True),
                *self._after_loras(written, "}],"),
            )
        trie = self._choice(',"negative":', ("true", "false"))
        return self._all(written, trie, self._after_embedding)

    def _after_embedding(self, written: Written, _: object) -> tuple[Thread | FreeText, ...]:
        return (*self._network(written, "},", False), *self._params(written, "}],"))

    def _params(self, written: Written, end: str, context: str = "") -> tuple[Thread, ...]:
        samplers = [f"{_quoted(sampler)[1:-1]}{self._steps[0]}" for sampler in self._samplers]
        trie = self._choice(end + _PARAMS, samplers, context)
        return self._all(written, trie, self._after_sampler)

    def _after_sampler(self, written: Written, _: object) -> tuple[Thread | FreeText, ...]:
        return self._all(
            written, self._choice(self._steps[1], range(1, 151), self._steps[0]), self._after_steps
        )

    def _after_steps(self, written: Written, _: object) -> tuple[Thread | FreeText, ...]:
        return self._all(written, self._choice(',"cfg_scale":', range(31)), self._after_cfg_scale)

    def _after_cfg_scale(self, written: Written, whole: str) -> tuple[Thread | FreeText, ...]:
        end = self._width(written, whole)
        if whole == "30":
            return end
        return (*self._all(written, self._choice("", _FRACTIONS), self._width), *end)

    def _width(self, written: Written, _: object) -> tuple[Thread | FreeText, ...]:
        return self._all(written, self._choice(',"width":', range(64, 4097, 8)), self._after_width)

    def _after_width(self, written: Written, _: object) -> tuple[Thread | FreeText, ...]:
        trie = self._choice(',"height":', range(64, 4097, 8))
        return self._all(written, trie, self._after_height)

    def _after_height(self, written: Written, _: object) -> tuple[Thread | FreeText, ...]:
        trie = self._choice(',"clip_skip":', range(1, 13))
        return self._all(written, trie, self._after_clip_skip)

    def _after_clip_skip(self, written: Written, _: object) -> tuple[Thread | FreeText, ...]:
        if self._known is None:
            return (FreeText(written, self, self._max_characters),)
        assert written.entry is not None
        calls, entry = self._known, written.entry
        own = self._negatives(("own", entry.model, entry.version), lambda: calls.of_version(entry))
        common = self._negatives(
            ("common", entry.base_model), lambda: calls.of_base_model(entry.base_model)
        )
        return (*self._all(written, own, _end), *self._all(written, common, _end))

    def _negatives(self, key: tuple[str, ...], texts: Callable[[], Sequence[str]]) -> Trie:
        return self._trie(key, lambda: [(f"{_NEGATIVE}{_quoted(t)}}}", t) for t in texts()])

    # Free text.

    @cached_property
    def literal(self) -> bytes:
        """What stands before a free negative prompt."""
        return f'{_NEGATIVE}"'.encode()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer's, as bytes."""
        return Vocabulary(self._tokenizer)

    @cached_property
    def opening(self) -> Mapping[int, frozenset[int]]:
        """Tokens at each offset of the literal: those of its own encoding before any text.

        Besides them, every token that reaches from such an offset into the text.
        """
        texts = ['"}', '\\"', " a", "é", *map(chr, range(0x20, 0x7F))]
        found: dict[int, set[int]] = defaultdict(set)
        literal, spelt = self.literal, self.vocabulary.bytes
        for ids in encode_texts(self._tokenizer, [literal.decode() + t for t in texts], _CONTEXT):
            ends = itertools.accumulate((len(spelt[token]) for token in ids), initial=0)
            for token, offset in zip(ids, ends, strict=False):
                if offset < len(literal):
                    found[offset].add(token)
        for offset, tokens in found.items():
            tokens.update(i for i, b in enumerate(spelt) if b.startswith(literal[offset:]))
        return {o: frozenset(t for t in ts if self._fits(o, t)) for o, ts in found.items()}

    def _fits(self, offset: int, token: int) -> bool:
        rest, spelt = self.literal[offset:], self.vocabulary.bytes[token]
        if len(spelt) < len(rest):
            return bool(spelt) and rest.startswith(spelt)
        state = self.vocabulary.run(TEXT, spelt[len(rest) :])
        return spelt.startswith(rest) and state != DEAD


def _end(written: Written, _: object) -> tuple[Thread | FreeText, ...]:
    return ()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def name_text(model: str, version: str) -> str:
    """How an answer begins that names this checkpoint, up to where its tokens may be cut."""
    return f'{_named(model, version)},"type":"Checkpoint'


def _named(model: str, version: str) -> str:
    return f'{{"model":{_quoted(model)},"version":{_quoted(version)}'


def _nameable(entry: Entry) -> bool:
    """Whether the API record takes the names: 1 to 300 characters."""
    return 1 <= len(entry.model) <= 300 and 1 <= len(entry.version) <= 300
