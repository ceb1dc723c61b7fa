"""The WebUI's prompt syntax: weights, BREAK, prompt editing, alternation and AND.

``(word)`` and ``(word:1.2)`` strengthen, ``[word]`` weakens, a backslash takes a bracket's meaning
away, ``BREAK`` starts a new window of CLIP's 77 tokens. ``[from:to:when]`` and ``[a|b]`` are other
texts at other steps, ``AND`` composes several prompts. The grammar is that of AUTOMATIC1111's
``modules/prompt_parser.py``, since that is what records and people write.

Everything here takes time in proportion to the length of the prompt (times the number of steps
with a text of their own): prompts come from strangers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

#: A part of a prompt and its weight.
Fragment = tuple[str, float]

_STEP = 1.1  # what one pair of brackets does in the WebUI
_TOKEN = re.compile(
    r"\\[()\[\]\\]|[(\[]|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[)\]]"
    r"|\s*\bBREAK\b\s*|[^\\()\[\]:B]+|."
    , re.DOTALL,
)  # fmt: skip


# --- weights and BREAK ------------------------------------------------------------------------


def parse(prompt: str) -> list[list[Fragment]]:
    """The windows of a prompt (one more than it has ``BREAK``), as weighted fragments.

    A bracket that is never closed reaches to the end; one that was never opened is text.
    """
    pieces: list[str | None] = []  # None: BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}
    spans: dict[str, list[tuple[int, int, float]]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        spans[kind].append((opened[kind].pop(), len(pieces), factor))

    for match in _TOKEN.finditer(prompt):
        token = match.group()
        if token in opened:
            opened[token].append(len(pieces))
        elif match["weight"] and opened["("]:
            close("(", float(match["weight"]))
        elif token == ")" and opened["("]:
            close("(", _STEP)
        elif token == "]" and opened["["]:
            close("[", 1 / _STEP)
        elif token.strip() == "BREAK":
            pieces.append(None)
        else:
            pieces.append(token[1:] if len(token) == 2 and token[0] == "\\" else token)
    for kind, factor in (("(", _STEP), ("[", 1 / _STEP)):
        while opened[kind]:
            close(kind, factor)
    weights = zip(
        _products(spans["("], len(pieces)), _products(spans["["], len(pieces)), strict=True
    )
    return _windows(pieces, [round_ * square for round_, square in weights])


def _products(spans: Sequence[tuple[int, int, float]], length: int) -> list[float]:
    """The product of the factors of all spans over each place.

    Args:
        spans: (start, end, factor); of any two, one lies within the other or they do not overlap.
        length: number of places.
    """
    products: list[float] = []
    open_spans: list[tuple[int, float]] = [(length, 1.0)]  # (end, product up to here)
    for start, end, factor in sorted(spans, key=lambda span: (span[0], -span[1])):
        _fill(products, open_spans, start)
        open_spans.append((end, open_spans[-1][1] * factor))
    _fill(products, open_spans, length)
    return products


def _fill(products: list[float], open_spans: list[tuple[int, float]], until: int) -> None:
    while True:
        end, product = open_spans[-1]
        products.extend([product] * (min(end, until) - len(products)))
        if end > until or len(open_spans) == 1:
            return
        open_spans.pop()


def _windows(pieces: Sequence[str | None], weights: Sequence[float]) -> list[list[Fragment]]:
    """Split at the breaks, join neighbours of one weight, leave out what is only space."""
    windows: list[list[tuple[list[str], float]]] = [[]]
    for piece, weight in zip(pieces, weights, strict=True):
        window = windows[-1]
        if piece is None:
            windows.append([])
        elif window and window[-1][1] == weight:
            window[-1][0].append(piece)
        else:
            window.append(([piece], weight))
    joined = [[("".join(parts), weight) for parts, weight in window] for window in windows]
    return [[part for part in window if part[0].strip()] or [("", 1.0)] for window in joined]


# --- AND --------------------------------------------------------------------------------------

_AND = re.compile(r"\bAND\b")
_PART_WEIGHT = re.compile(r":\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*$")


def compose(prompt: str) -> list[Fragment]:
    """The parts of a prompt between ``AND``, each with the weight behind its last colon.

    A prompt without ``AND`` is one part of weight 1, whatever it ends in. (The WebUI takes
    "a house at 12:30" for "a house at 12" with thirty times the guidance.)
    """
    parts = _AND.split(prompt)
    if len(parts) == 1:
        return [(prompt, 1.0)]
    composed = []
    for part in parts:
        start = part.rfind(":")
        match = _PART_WEIGHT.match(part, start) if start >= 0 else None
        text, weight = (part[:start], float(match[1])) if match else (part, 1.0)
        composed.append((text.rstrip() if match else text, weight))
    return composed


# --- prompt editing and alternation -----------------------------------------------------------


@dataclass
class _Edited:
    """``[before:after:when]``; an alternation of its options where ``when`` is None.

    One option is a bracket that stays: copied into its parent's items, a nest of them would take
    quadratic time.
    """

    options: list[list[_Item]]
    when: int | None = None

    def at(self, step: int) -> list[_Item]:
        """The items that stand here at a step, counted from 1."""
        if self.when is None:
            return self.options[(step - 1) % len(self.options)]
        return self.options[0] if step <= self.when else self.options[1]


_Item = str | _Edited
_TEXT = re.compile(r"(?:[^\\\[\]():|]|\\.)+|[\[\]():|]|\\")
_WHEN = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*")
_CLOSES = {")": "(", "]": "["}


@dataclass
class _Group:
    """A bracket that is not closed yet, with its content cut at colons and bars."""

    opening: str = ""
    parts: list[list[_Item]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def literal(self, closing: str = "") -> list[_Item]:
        """Return the content as text, with its brackets and separators."""
        items: list[_Item] = [self.opening] if self.opening else []
        for i, part in enumerate(self.parts):
            items += part
            items += self.separators[i : i + 1]
        return [*items, closing] if closing else items


class _NotScheduledError(ValueError):
    """The WebUI's grammar does not take the prompt, which is drawn as it stands."""


def schedule(prompt: str, steps: int) -> list[tuple[int, str]]:
    """The texts of a prompt with the last step of each, as the WebUI's.

    Args:
        prompt: ``[from:to:when]``, ``[to:when]``, ``[from::when]`` and ``[a|b]`` in it may nest.
            ``when`` with a point is a share of the steps, without one a step.
        steps: evaluations of the model.

    Returns:
        (last step, text) in order, the last one's step is ``steps``. A prompt with a bar outside
        of an alternation, or a lone backslash, is not scheduled, as in the WebUI.
    """
    if "[" not in prompt:
        return [(steps, prompt)]
    try:
        items, ends = _read(prompt, steps)
    except _NotScheduledError:
        return [(steps, prompt)]
    return [(end, "".join(_flat(items, end))) for end in sorted(ends | {steps})]


def _read(prompt: str, steps: int) -> tuple[list[_Item], set[int]]:
    """The prompt's items, and the steps at which a text of its own ends."""
    ends: set[int] = set()
    groups = [_Group()]

    def give_up() -> None:
        """Take all open brackets for text: what lies in a group has to be whole."""
        for group in groups[1:]:
            groups[0].parts[-1] += group.literal()
            if "|" in group.separators:
                raise _NotScheduledError
        del groups[1:]

    for match in _TEXT.finditer(prompt):
        token = match.group()
        if token in "([":
            groups.append(_Group(token))
        elif token in ":|":
            groups[-1].parts.append([])
            groups[-1].separators.append(token)
        elif token not in _CLOSES:
            if token == "\\":
                raise _NotScheduledError
            groups[-1].parts[-1].append(token)
        elif groups[-1].opening != _CLOSES[token]:
            give_up()
            groups[0].parts[-1].append(token)
        else:
            group = groups.pop()
            whole = _close(group, steps, ends)
            if whole is None:
                groups.append(group)
                give_up()
                groups[0].parts[-1].append(token)
            else:
                groups[-1].parts[-1] += whole
    give_up()
    if "|" in groups[0].separators:
        raise _NotScheduledError
    return groups[0].literal(), ends


def _close(group: _Group, steps: int, ends: set[int]) -> list[_Item] | None:
    """The items of a whole group; None where the grammar has no such group."""
    colons, bars = group.separators.count(":"), group.separators.count("|")
    if group.opening == "(":
        return [_Edited([group.literal(")")])] if not bars and colons <= 1 else None
    if bars and not colons:
        ends.update(range(1, steps + 1))
        return [_Edited(group.parts)]
    if not group.separators:
        return [_Edited([group.literal("]")])]
    last = group.parts[-1]
    when = _WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
    if bars or colons > 2 or when is None:
        return None
    end = _step(when[1], steps)
    if end >= 1:
        ends.add(end)
    before, after = group.parts[:2] if colons == 2 else ([], group.parts[0])
    return [_Edited([before, after], end)]


def _step(when: str, steps: int) -> int:
    """With a point a share of the steps, without one a step."""
    value = float(when) * (steps if "." in when else 1)
    return int(max(min(value, steps), -1))


def _flat(items: list[_Item], step: int) -> Iterator[str]:
    """The texts of items at a step; without recursion, for brackets nest as deep as one likes."""
    stack = [iter(items)]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
        elif isinstance(item, str):
            yield item
        else:
            stack.append(iter(item.at(step)))


# --- what is drawn as text --------------------------------------------------------------------

_AS_TEXT = {
    "wildcards like __{}__": re.compile(r"__([\w/*-]{1,80}?)__"),
    "choices like {{{}}}": re.compile(r"\{([^{}|]{0,40}\|[^{}]{0,40})\}"),
    "ComfyUI's embeddings like embedding:{}": re.compile(r"\bembedding:\s?([\w./\\-]{1,80})"),
    "networks like <{}>": re.compile(r"<((?:lora|lyco|hypernet|lora-[\w-]{1,20}):[^<>]{1,80})>"),
}


def drawn_as_text(prompt: str) -> Iterator[str]:
    """Name the parts of a prompt that extensions of the WebUI would replace, by kind."""
    for kind, pattern in _AS_TEXT.items():
        if (match := pattern.search(prompt)) is not None:
            yield f"{kind.format(match[1])} are drawn as text"
