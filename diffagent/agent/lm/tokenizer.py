"""A saved tokenizer, without transformers: of its interface what answers need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tokenizers

from diffagent.errors import ArtifactError

_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Tokenizer:
    """Called as a fast tokenizer of transformers is; the ids are those of the model's config."""

    backend_tokenizer: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_id: int

    @classmethod
    def load(cls, directory: Path, bos_token_id: int | None, eos_token_id: int) -> Tokenizer:
        """That of an agent's directory.

        Raises:
            ArtifactError: there is none, or it cannot be read.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(directory / _FILE))
        except Exception as error:  # the library raises Exception itself
            raise ArtifactError(
                f"no tokenizer in {str(directory / _FILE)!r}: {error}; train the agent again"
            ) from None
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, bos_token_id, eos_token_id)

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> dict[str, list[int]]:
        """``input_ids`` of a text."""
        self.backend_tokenizer.encode_special_tokens = split_special_tokens
        encoded = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return {"input_ids": encoded.ids}
