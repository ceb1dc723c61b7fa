"""The forward pass of a Llama on a CPU, without transformers.

Importing transformers takes longer than the first answer of a small model, and a pass over a few
tokens is mostly what surrounds its products. Here a layer has four products (queries, keys and
values are one, gate and up another), and keys and values have room to grow. That is all that
constrained decoding needs (`KeyValues`); training and free generation stay with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

from diffagent.agent.lm.int8 import Int8Linear
from diffagent.errors import ArtifactError

Linear = Callable[[Tensor], Tensor]
_WEIGHTS = "model.safetensors"


class _Rotary(BaseModel):
    rope_theta: float
    rope_type: Literal["default"] = "default"


class LlamaConfig(BaseModel):
    """What of a config.json matters here; what it does not admit is left to transformers."""

    model_type: Literal["llama"]
    hidden_act: Literal["silu"]
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: _Rotary
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_id: int
    quantization_config: None = None

    @classmethod
    def read(cls, directory: Path) -> LlamaConfig | None:
        """That of a directory, or None if it holds another architecture or several files."""
        if not (directory / _WEIGHTS).is_file():
            return None
        try:
            return cls.model_validate_json((directory / "config.json").read_bytes())
        except (OSError, ValidationError):
            return None


class Cache:
    """Keys and values (layers, 2, rows, heads, columns, head size), with room for more columns."""

    def __init__(self) -> None:
        self.columns = 0
        self._room = torch.zeros(0)

    def grow(self, layers: int, rows: int, heads: int, columns: int, size: int) -> Tensor:
        """A view with ``columns`` more, still to be written."""
        past, self.columns = self.columns, self.columns + columns
        if not past or self.columns > self._room.shape[4]:
            room = torch.empty(layers, 2, rows, heads, 2 * self.columns, size)
            if past:
                room[..., :past, :] = self._room[..., :past, :]
            self._room = room
        return self._room[..., : self.columns, :]

    def batch_select_indices(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self._room = self._room.index_select(2, rows)


@dataclass(frozen=True)
class Output:
    """What `Llama` computes: ``logits`` (rows, positions, vocabulary) in float32."""

    logits: Tensor


@dataclass(frozen=True)
class _Layer:
    before_attention: Tensor
    queries_keys_values: Linear
    attended: Linear
    before_mlp: Tensor
    gate_up: Linear
    down: Linear

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], product: Callable[..., Linear]) -> _Layer:
        return cls(
            weights["input_layernorm"].float(),
            product(*(weights[f"self_attn.{name}_proj"] for name in "qkv")),
            product(weights["self_attn.o_proj"]),
            weights["post_attention_layernorm"].float(),
            product(weights["mlp.gate_proj"], weights["mlp.up_proj"]),
            product(weights["mlp.down_proj"]),
        )


class Llama:
    """A Llama (arXiv 2307.09288) that reads; called as transformers' ``LlamaForCausalLM`` is.

    Args:
        config: of the model.
        weights: by the names of transformers' checkpoints.
        int8: products by `Int8Linear`.
    """

    def __init__(self, config: LlamaConfig, weights: dict[str, Tensor], *, int8: bool) -> None:
        self.config = config
        product: Callable[..., Linear] = Int8Linear if int8 else _Float
        self._embeddings = weights["model.embed_tokens.weight"].float()
        self._norm = weights["model.norm.weight"].float()
        theta, size = config.rope_parameters.rope_theta, config.head_dim
        self._frequencies = theta ** -(torch.arange(0, size, 2).float() / size)
        names = [f"model.layers.{layer}." for layer in range(config.num_hidden_layers)]
        owned = [
            {
                name.removeprefix(own).removesuffix(".weight"): tensor
                for name, tensor in weights.items()
                if name.startswith(own)
            }
            for own in names
        ]
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        made = _at_once(
            [
                partial(product, weights[f"{head}.weight"]),
                *(partial(_Layer.of, own, product) for own in owned),
            ]
        )
        self._head, self._layers = made[0], made[1:]

    @classmethod
    def load(cls, directory: Path, config: LlamaConfig, *, int8: bool) -> Llama:
        """That of a directory whose `LlamaConfig.read` gave ``config``.

        Raises:
            ArtifactError: the weights are damaged, or not those of the config.
        """
        path = directory / _WEIGHTS
        try:
            return cls(config, load_file(path), int8=int8)
        except (OSError, SafetensorError, KeyError) as error:
            raise ArtifactError(
                f"cannot read {str(path)!r} ({type(error).__name__}: {error}); train again"
            ) from None

    @staticmethod
    def make_cache() -> Cache:
        """To be given as ``past_key_values``."""
        return Cache()

    def forward(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
        logits_to_keep: Tensor,
        use_cache: bool = True,
    ) -> Output:
        """Read more columns (B, T) of every row.

        Args:
            input_ids: (B, T).
            attention_mask: (B, columns so far + T), 0 for what nobody attends to.
            position_ids: (B, T).
            past_key_values: of the columns so far; these are added.
            logits_to_keep: columns of ``input_ids`` after which logits are wanted.
            use_cache: always.
        """
        del use_cache
        config, (rows, columns) = self.config, input_ids.shape
        heads, size, shared = (
            config.num_attention_heads,
            config.head_dim,
            config.num_key_value_heads,
        )
        past, groups = past_key_values.columns, heads // shared
        memory = past_key_values.grow(len(self._layers), rows, shared, columns, size)
        angles = (position_ids[..., None] * self._frequencies)[:, None]
        cos, sin = angles.cos(), angles.sin()
        # Heads that share keys are further queries of the same column.
        causal = torch.arange(past + columns) <= past + torch.arange(columns)[:, None]
        seen = (attention_mask[:, None].bool() & causal).repeat(1, groups, 1)[:, None]
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        hidden = self._embeddings[input_ids]
        for layer, (keys, values) in zip(self._layers, memory, strict=True):
            mixed = layer.queries_keys_values(self._normal(hidden, layer.before_attention))
            mixed = mixed.view(rows, columns, heads + 2 * shared, size).transpose(1, 2)
            turned = _rotated(mixed[:, : heads + shared], cos, sin)
            keys[:, :, past:] = turned[:, heads:]
            values[:, :, past:] = mixed[:, heads + shared :]
            queries = turned[:, :heads].reshape(rows, shared, groups * columns, size)
            found = scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
            found = found.view(rows, heads, columns, size).transpose(1, 2).flatten(2)
            hidden = hidden + layer.attended(found)
            gate, up = layer.gate_up(self._normal(hidden, layer.before_mlp)).chunk(2, -1)
            hidden = hidden + layer.down(silu(gate) * up)
        wanted = self._normal(hidden[:, logits_to_keep], self._norm)
        return Output(self._head(wanted))

    __call__ = forward

    def _normal(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(hidden, weight.shape, weight, self.config.rms_norm_eps)


def _at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the calls give; a thread a core, each without helpers of its own."""
    number = torch.get_num_threads()
    alone = partial(torch.set_num_threads, 1)
    try:
        with ThreadPoolExecutor(number, initializer=alone) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]
    finally:
        torch.set_num_threads(number)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864), pairs half a head apart."""
    first, second = heads.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class _Float:
    """x W^T, of weights one below the other."""

    def __init__(self, *weights: Tensor) -> None:
        self._weight = torch.cat([weight.float() for weight in weights])

    def __call__(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self._weight)
