"""Prompts as the WebUI writes them, encoded by compel.

``(word)`` and ``(word:1.2)`` strengthen, ``[word]`` weakens, a backslash takes a bracket's meaning
away, ``BREAK`` starts a new window of CLIP's 77 tokens, and longer prompts take several windows.
The syntax is AUTOMATIC1111's, since that is what records and people write. The arithmetic is
compel's (weights above 1 move away from the empty prompt's embedding, weights below 1 towards
that of the prompt without the words), so weighted prompts look alike in both, not equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from diffagent.errors import RenderError

if TYPE_CHECKING:
    import torch

#: A part of a prompt and its weight.
Fragment = tuple[str, float]

_KEPT = 256  # encoded prompts: up to 0.6 MB each
_STEP = 1.1  # what one pair of brackets does in the WebUI
_TOKEN = re.compile(
    r"\\[()\[\]\\]|[(\[]|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[)\]]"
    r"|\s*\bBREAK\b\s*|[^\\()\[\]:B]+|."
    , re.DOTALL,
)  # fmt: skip


def parse(prompt: str) -> list[list[Fragment]]:
    """The windows of a prompt (one more than it has ``BREAK``), as weighted fragments.

    A bracket that is never closed reaches to the end; one that was never opened is text.
    """
    pieces: list[tuple[str, float] | None] = []  # None: BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        start = opened[kind].pop()
        pieces[start:] = [piece and (piece[0], piece[1] * factor) for piece in pieces[start:]]

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
            pieces.append((token[1:] if len(token) == 2 and token[0] == "\\" else token, 1.0))
    for kind, factor in (("(", _STEP), ("[", 1 / _STEP)):
        while opened[kind]:
            close(kind, factor)
    return _windows(pieces)


def _windows(pieces: Sequence[Fragment | None]) -> list[list[Fragment]]:
    """Split at the breaks, join neighbours of one weight, leave out what is only space."""
    windows: list[list[Fragment]] = [[]]
    for piece in pieces:
        window = windows[-1]
        if piece is None:
            windows.append([])
        elif window and window[-1][1] == piece[1]:
            window[-1] = (window[-1][0] + piece[0], piece[1])
        else:
            window.append(piece)
    return [[part for part in window if part[0].strip()] or [("", 1.0)] for window in windows]


@dataclass(frozen=True)
class Conditioning:
    """What a prompt says to the U-Net: context (1, 77 k, D), pooled (1, P) for SDXL."""

    context: torch.Tensor
    pooled: torch.Tensor | None = None


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
        self, prompt: str, negative_prompt: str, clip_skip: int
    ) -> tuple[Conditioning, Conditioning]:
        """Both conditionings of a recipe, of equal length: the shorter gets empty windows.

        An empty negative prompt of SDXL is zeros, as it was trained and as the WebUI does it.
        """
        import torch

        positive, negative = self.encode(prompt, clip_skip), self.encode(negative_prompt, clip_skip)
        length = max(positive.context.shape[1], negative.context.shape[1])
        positive, negative = (
            Conditioning(self._lengthened(item.context, length, clip_skip), item.pooled)
            for item in (positive, negative)
        )
        if negative.pooled is not None and not negative_prompt.strip():
            zeros = torch.zeros_like
            negative = Conditioning(zeros(negative.context), zeros(negative.pooled))
        return positive, negative

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
