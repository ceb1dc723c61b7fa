"""Prompts in the WebUI's syntax (`diffagent.render.prompt_syntax`), encoded by compel.

The arithmetic of weights is compel's (weights above 1 move away from the empty prompt's embedding,
weights below 1 towards that of the prompt without the words), so weighted prompts look alike in
both, not equal. Longer prompts take several windows of CLIP's 77 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from diffagent.errors import RenderError
from diffagent.render.prompt_syntax import Fragment, compose, parse, schedule

if TYPE_CHECKING:
    import torch

_KEPT = 256  # encoded prompts: up to 0.6 MB each
#: Characters of a prompt; real ones have up to 6,000.
MAX_CHARACTERS = 10_000
_MAX_WINDOWS = 64
_MAX_PARTS = 16  # between ANDs: each is another row of every pass
#: Characters that are encoded for one prompt: its texts at all steps, each once more for every
#: fragment that is weakened.
_MAX_WORK = 500_000


class Guide(Protocol):
    """A prompt as the U-Net is given it: one or several conditionings, at each evaluation."""

    def parts(self, evaluation: int) -> Sequence[tuple[Conditioning, float]]:
        """Conditionings with their weights, always as many and of one length."""
        ...


@dataclass(frozen=True)
class Conditioning:
    """What a prompt says to the U-Net: context (1, 77 k, D), pooled (1, P) for SDXL."""

    context: torch.Tensor
    pooled: torch.Tensor | None = None

    def parts(self, evaluation: int) -> Sequence[tuple[Conditioning, float]]:
        """Itself, at every evaluation."""
        return ((self, 1.0),)


@dataclass(frozen=True)
class Composed:
    """A prompt of several parts, or of parts that change.

    ``timelines``: of each part its weight, and its conditionings with the last step of each. Steps
    are counted as in the WebUI: the evaluations of the U-Net, from 0.
    """

    timelines: tuple[tuple[float, tuple[tuple[int, Conditioning], ...]], ...]

    def parts(self, evaluation: int) -> Sequence[tuple[Conditioning, float]]:
        """See the protocol."""
        return [
            (next((item for end, item in spans if evaluation <= end), spans[-1][1]), weight)
            for weight, spans in self.timelines
        ]


#: The texts of each part of a prompt with the last step of each, and the part's weight.
_Timelines = list[tuple[float, list[tuple[int, str]]]]


def check_prompt(prompt: str, evaluations: int, *, negative: bool = False) -> None:
    """Refuse a prompt that would take too long.

    Raises:
        RenderError: reason 'prompt-too-long'.
    """
    if len(prompt) > MAX_CHARACTERS:
        raise _too_long(f"{len(prompt)} characters, more than {MAX_CHARACTERS}")
    timelines = _timelines(prompt, evaluations, negative=negative)
    if len(timelines) > _MAX_PARTS:
        raise _too_long(f"{len(timelines)} parts between AND, more than {_MAX_PARTS}")
    texts = {text for _, spans in timelines for _, text in spans}
    if sum(map(len, texts)) > _MAX_WORK or sum(map(_work, texts)) > _MAX_WORK:
        raise _too_long("so many texts and weakened words that encoding it would take minutes")


def _timelines(prompt: str, evaluations: int, *, negative: bool = False) -> _Timelines:
    parts = [(prompt, 1.0)] if negative else compose(prompt)  # AND is a word in a negative prompt
    return [(weight, schedule(text, evaluations)) for text, weight in parts]


def _work(text: str) -> int:
    """Characters that compel encodes: it weakens a fragment by encoding the rest without it."""
    weakened = sum(weight < 1 for window in parse(text) for _, weight in window)
    return len(text) * (1 + weakened)


def _too_long(why: str) -> RenderError:
    return RenderError(f"the prompt has {why}; shorten it", reason="prompt-too-long")


def _guide(timelines: _Timelines, encoded: Mapping[str, Conditioning]) -> Conditioning | Composed:
    (weight, spans), *others = timelines
    if not others and len(spans) == 1 and weight == 1:
        return encoded[spans[0][1]]
    return Composed(
        tuple(
            (weight, tuple((end, encoded[text]) for end, text in spans))
            for weight, spans in timelines
        )
    )


class PromptEncoder:
    """Encodes prompts with a pipeline's text encoders as they are now.

    ``family`` decides which layer is read: of SD 1.x the one that ``clip_skip`` names, normalised;
    of SD 2.x the last that was kept (the penultimate of CLIP), and of SDXL the penultimate as it
    comes, whatever ``clip_skip`` says, as the WebUI does it.
    """

    def __init__(self, pipeline: Any, family: str) -> None:
        self._family = family
        encoders = [(pipeline.tokenizer, pipeline.text_encoder)]
        if family == "sdxl":
            encoders.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
        self._encoders = encoders
        self._known: dict[tuple[str, int], Conditioning] = {}

    def forget(self) -> None:
        """Call it when the text encoders or their vocabulary have changed."""
        self._known.clear()

    def encode(self, prompt: str, clip_skip: int) -> Conditioning:
        """The conditioning of a prompt; the last ones are kept (most share a negative prompt).

        Raises:
            RenderError: reason 'clip-skip', the text encoder has fewer layers.
        """
        key = (prompt, clip_skip)
        if key not in self._known:
            if len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            self._known[key] = self._encode(prompt, clip_skip)
        return self._known[key]

    def _encode(self, prompt: str, clip_skip: int) -> Conditioning:
        import torch

        windows = parse(prompt)
        number = sum(map(self._windows_of, windows))
        if number > _MAX_WINDOWS:
            raise _too_long(f"{number} windows of tokens, more than {_MAX_WINDOWS}")
        contexts = [
            torch.cat([self._window(*encoder, window, clip_skip) for window in windows], dim=1)
            for encoder in self._encoders
        ]
        length = max(context.shape[1] for context in contexts)
        contexts = [
            self._padded(number, context, length, clip_skip)
            for number, context in enumerate(contexts)
        ]
        pooled = self._pooled(windows[0]) if self._family == "sdxl" else None
        return Conditioning(torch.cat(contexts, dim=-1), pooled)

    def pair(
        self, prompt: str, negative_prompt: str, clip_skip: int, evaluations: int = 1
    ) -> tuple[Conditioning | Composed, Conditioning | Composed]:
        """Both guides of a recipe, all of equal length: the shorter get empty windows.

        An empty negative prompt of SDXL is zeros, as it was trained and as the WebUI does it.

        Args:
            prompt: with ``AND`` of several parts, each with its own edits and alternations.
            negative_prompt: of one part.
            clip_skip: see `encode`.
            evaluations: of the U-Net, which edits and alternations count.

        Raises:
            RenderError: reasons 'clip-skip', 'prompt-too-long'.
        """
        import torch

        both = (
            _timelines(prompt, evaluations),
            _timelines(negative_prompt, evaluations, negative=True),
        )
        texts = {text for timelines in both for _, spans in timelines for _, text in spans}
        encoded = {text: self.encode(text, clip_skip) for text in sorted(texts)}
        length = max(item.context.shape[1] for item in encoded.values())
        for text, item in encoded.items():
            if item.context.shape[1] < length:
                context = self._lengthened(item.context, length, clip_skip)
                encoded[text] = Conditioning(context, item.pooled)
        positive, negative = (_guide(timelines, encoded) for timelines in both)
        if self._family == "sdxl" and not negative_prompt.strip():
            empty = encoded[negative_prompt]
            assert empty.pooled is not None
            zeros = torch.zeros_like
            negative = Conditioning(zeros(empty.context), zeros(empty.pooled))
        return positive, negative

    def _windows_of(self, fragments: Sequence[Fragment]) -> int:
        """Count the windows that fragments take at least."""
        tokenizer, _ = self._encoders[0]
        text = "".join(text for text, _ in fragments)
        tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
        room: int = tokenizer.model_max_length - 2
        return max(1, math.ceil(tokens / room))

    def _window(
        self, tokenizer: Any, encoder: Any, window: Sequence[Fragment], clip_skip: int
    ) -> torch.Tensor:
        provider = self._provider(tokenizer, encoder, clip_skip)
        texts, weights = zip(*window, strict=True)
        embeddings: torch.Tensor = provider.get_embeddings_for_weighted_prompt_fragments(
            [list(texts)], [list(weights)], device=encoder.device
        )
        return embeddings

    def _provider(self, tokenizer: Any, encoder: Any, clip_skip: int) -> Any:
        from compel import EmbeddingsProvider, SplitLongTextMode

        return EmbeddingsProvider(
            tokenizer,
            _Layer(encoder, self._family, clip_skip),
            textual_inversion_manager=_Inversions(tokenizer),
            truncate=False,
            split_long_text_mode=SplitLongTextMode.PHRASES,
            device=encoder.device,
        )

    def _padded(
        self, number: int, context: torch.Tensor, length: int, clip_skip: int
    ) -> torch.Tensor:
        """One encoder's context with windows of the empty prompt behind it."""
        import torch

        tokenizer, encoder = self._encoders[number]
        missing = (length - context.shape[1]) // tokenizer.model_max_length
        if not missing:
            return context
        empty = self._window(tokenizer, encoder, [("", 1.0)], clip_skip)
        return torch.cat([context, *[empty] * missing], dim=1)

    def _lengthened(self, context: torch.Tensor, length: int, clip_skip: int) -> torch.Tensor:
        """The context of all encoders with windows of the empty prompt behind it."""
        import torch

        widths = [encoder.config.hidden_size for _, encoder in self._encoders]
        parts = torch.split(context, widths, dim=-1)
        return torch.cat(
            [self._padded(n, part, length, clip_skip) for n, part in enumerate(parts)], dim=-1
        )

    def _pooled(self, window: Sequence[Fragment]) -> torch.Tensor:
        """(1, P) projection of the first window's end, of SDXL's second encoder; no weights."""
        import torch

        tokenizer, encoder = self._encoders[1]
        provider = self._provider(tokenizer, encoder, 1)
        text = "".join(text for text, _ in window)
        tokens = provider.get_token_ids([text], padding="max_length", truncation_override=True)
        pooled: torch.Tensor = encoder(torch.tensor(tokens, device=encoder.device)).text_embeds
        return pooled


class _Layer:
    """A text encoder as compel calls it, whose last hidden state is the layer that is wanted."""

    def __init__(self, encoder: Any, family: str, clip_skip: int) -> None:
        layers = encoder.config.num_hidden_layers
        if family == "sd1" and clip_skip > layers:
            raise RenderError(
                f"clip_skip {clip_skip}: the text encoder has {layers} layers", reason="clip-skip"
            )
        self._encoder = encoder
        self._depth = {"sd1": clip_skip, "sd2": 1, "sdxl": 2}[family]
        self._normalise = family != "sdxl"
        self.device, self.dtype = encoder.device, encoder.dtype

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor | None = None, **_: Any) -> Any:
        # A mask of ones would only take attention off its fast path.
        mask = None if mask is None or bool(mask.all()) else mask.to(self.device)
        output = self._encoder(tokens.to(self.device), mask, output_hidden_states=True)
        hidden = output.hidden_states[-self._depth]
        if self._normalise:  # transformers 5 has no `text_model` level in some classes
            hidden = getattr(self._encoder, "text_model", self._encoder).final_layer_norm(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


class _Inversions:
    """compel's view of embeddings of several vectors: TOKEN stands for TOKEN, TOKEN_1, ..."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.get_added_vocab()
        self._ids: dict[int, list[int]] = {}
        for token, number in added.items():
            ids, rest = [number], 1
            while (following := added.get(f"{token}_{rest}")) is not None:
                ids.append(following)
                rest += 1
            self._ids[number] = ids

    def expand_textual_inversion_token_ids_if_necessary(self, token_ids: list[int]) -> list[int]:
        """Every token's ids in place of the first."""
        return [part for token in token_ids for part in self._ids.get(token, [token])]
