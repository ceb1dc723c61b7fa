"""'tiny-llama': a tiny Llama with random weights and a tokenizer of its own.

It learns only from its training texts: trained on the sandbox's dataset it answers in seconds on
one core, and it has no other knowledge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: What becomes one token at most: a JSON key with the punctuation around it, a digit, a word
#: with the space before it, punctuation. Keys as single tokens make an answer half as long.
_PIECES = r"""(?:[\]}"]*,|\{)?"[a-z_]+":["\[{]*|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}"]+|"|\s+(?!\S)|\s"""

MAX_POSITIONS = 4096


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on ``texts``: every text is lossless, digits are single.

    Args:
        texts: prompts and responses of the train split; their order does not matter.
        vocab_size: at least 300 (256 bytes and three special tokens); fewer tokens result when
            the texts have fewer pieces.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any, *, hidden_size: int, num_hidden_layers: int, seed: int) -> Any:
    """A LlamaForCausalLM with random weights, the same for the same seed; float32 on the CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=max(1, hidden_size // 32),
        num_key_value_heads=max(1, hidden_size // 32),
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
