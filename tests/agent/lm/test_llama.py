"""The forward pass without transformers computes what transformers does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers import LlamaConfig as Reference

from diffagent.agent.llm_selector import LLM
from diffagent.agent.lm.int8 import Int8Linear, to_int8
from diffagent.agent.lm.key_values import KeyValues
from diffagent.agent.lm.llama import Llama, LlamaConfig
from diffagent.agent.lm.llm import load_agent
from diffagent.agent.lm.tokenizer import Tokenizer
from diffagent.errors import ArtifactError, ConfigError
from tests.conftest import AgentRun

CPU = torch.device("cpu")


def make(directory: Path, **options: Any) -> LlamaForCausalLM:
    """A random Llama, saved; its weights are large enough for outputs to differ."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        **{"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3},
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.2},
        **{"bos_token_id": None, "eos_token_id": 0},
    }
    model = LlamaForCausalLM(Reference(**{**sizes, **options})).eval()
    model.save_pretrained(directory)
    return model


def loaded(directory: Path, *, int8: bool = False) -> Llama:
    config = LlamaConfig.read(directory)
    assert config is not None
    return Llama.load(directory, config, int8=int8)


def logits(model: Any) -> Tensor:
    """After reading, forgetting and choosing rows of different lengths."""
    keys = KeyValues(model, CPU)
    draw = torch.Generator().manual_seed(1)

    def tokens(*lengths: int) -> list[list[int]]:
        return [torch.randint(300, (n,), generator=draw).tolist() for n in lengths]

    def read(chunks: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> None:
        found.extend(keys.feed(chunks, wanted))

    found: list[Tensor] = []
    read(tokens(9, 4, 12), [[8], [0, 3], [11]])
    keys.select([0, 2, 2, 1, 0])
    read(tokens(3, 1, 0, 2, 5), [[0, 2], [0], [], [1], [1, 4]])
    keys.forget([2, 0, 0, 1, 3])
    read(tokens(1, 40, 3, 2, 1), [[0], [39], [0, 1, 2], [1], [0]])
    keys.select([1])
    read(tokens(1), [[0]])
    return torch.cat(found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 6, "head_dim": 16},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}},
    ],
)
def test_logits_are_those_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    expected = logits(make(tmp_path, **options))
    torch.testing.assert_close(logits(loaded(tmp_path)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
    ],
)
def test_other_architectures_are_left_to_transformers(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    make(tmp_path, **options)
    assert LlamaConfig.read(tmp_path) is None


def test_weights_in_several_files_are_left_to_transformers(tmp_path: Path) -> None:
    make(tmp_path).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert LlamaConfig.read(tmp_path / "parts") is None
    assert LlamaConfig.read(tmp_path / "nothing") is None


# --- 8 bits ---


def test_int8_rounds_weights_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(200, 300)
    scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    rounded = (layer.weight.detach() / scales).round() * scales
    small = Int8Linear(layer.weight, bias=layer.bias)
    # Rows of very different sizes, as a language model's first token and the others.
    inputs = torch.randn(3, 5, 200) * torch.tensor([1e4, 1.0, 1e-4, 0.0, 1.0])[:, None]
    expected = nn.functional.linear(inputs, rounded, layer.bias)
    error = (small(inputs) - expected).abs().amax(-1)
    assert (error <= 2e-4 * inputs.abs().amax(-1) * scales.max() * 127 * 200**0.5 + 1e-6).all()
    parts = Int8Linear(layer.weight[:100], layer.weight[100:], bias=layer.bias)
    assert torch.equal(parts(inputs), small(inputs))
    assert torch.equal(small(inputs[1, 2]), small(inputs)[1, 2]), "whatever else is in the batch"
    zero = Int8Linear(torch.zeros(2, 4))
    assert torch.equal(zero(torch.ones(1, 4)), torch.zeros(1, 2))


def test_int8_changes_little(tmp_path: Path) -> None:
    reference = make(tmp_path)
    expected = logits(reference)
    found = logits(loaded(tmp_path, int8=True))
    to_int8(reference)
    torch.testing.assert_close(logits(reference), found, rtol=1e-2, atol=1e-2)
    divergence = nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert 0 < divergence < 0.02


# --- agents ---


def test_an_agent_that_only_chooses_answers_the_same(agent_run: AgentRun) -> None:
    whole, light = (
        load_agent(agent_run.agent.path, "cpu", generates=generates) for generates in (True, False)
    )
    assert isinstance(light.model, Llama) and isinstance(light.tokenizer, Tokenizer)
    prompts = ["a red star", '</s> \ud800 {"model":', "", "ein Würfel\n" * 500, "📷 画像"]
    assert light.encode(prompts, 100) == whole.encode(prompts, 100)
    for options in ({}, {"negative_prompts": "free", "max_new_tokens": 120}):
        expected = LLM(whole, **options).select(prompts, 3)
        found = LLM(light, **options).select(prompts, 3)
        assert [[c.text for c in row] for row in found] == [[c.text for c in r] for r in expected]
        for row, others in zip(found, expected, strict=True):
            expected_probabilities = [c.probability for c in others]
            assert [c.probability for c in row] == pytest.approx(expected_probabilities, rel=1e-5)


def test_an_agent_without_its_tokenizer_is_none(agent_run: AgentRun, tmp_path: Path) -> None:
    copy = shutil.copytree(agent_run.agent.path, tmp_path / "agent")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"no tokenizer in .*tokenizer.json"):
        load_agent(copy, "cpu", generates=False)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"no tokenizer in .*tokenizer.json"):
        load_agent(copy, "cpu", generates=False)


def test_damaged_weights_are_an_error(tmp_path: Path) -> None:
    make(tmp_path)
    path, config = tmp_path / "model.safetensors", LlamaConfig.read(tmp_path)
    assert config is not None
    weights = load_file(path)
    save_file({name: w for name, w in weights.items() if "layers.1.mlp.up" not in name}, path)
    with pytest.raises(ArtifactError, match=r"model.safetensors.*KeyError: 'mlp.up_proj'"):
        Llama.load(tmp_path, config, int8=False)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model.safetensors.*SafetensorError"):
        Llama.load(tmp_path, config, int8=False)


def test_the_tokenizer_is_that_of_transformers(agent_run: AgentRun) -> None:
    light = load_agent(agent_run.agent.path, "cpu", generates=False).tokenizer
    whole = AutoTokenizer.from_pretrained(agent_run.agent.path)
    assert (light.bos_token_id, light.eos_token_id) == (whole.bos_token_id, whole.eos_token_id)
    for text in ("a </s> b", "x" * 50, ""):
        for split in (True, False):
            options = {"add_special_tokens": False, "split_special_tokens": split}
            assert light(text, **options)["input_ids"] == whole(text, **options)["input_ids"]


def test_int8_is_for_a_cpu(agent_run: AgentRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffagent.agent.lm.llm.resolve_device", torch.device)
    for generates in (True, False):
        with pytest.raises(ConfigError, match="is for device 'cpu'"):
            load_agent(agent_run.agent.path, "cuda", "int8", generates=generates)
