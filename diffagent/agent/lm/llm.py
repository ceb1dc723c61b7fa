"""A trained agent: a causal language model that writes APIs.

An agent directory is a Hugging Face model (safetensors) and tokenizer with ``agent.json``, the
catalogue and the sampler mapping beside it: all that is needed to answer and to judge answers.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from diffagent.agent.decoding.call_counts import Calls
from diffagent.agent.decoding.constrained import Decoder, Row
from diffagent.agent.decoding.grammar import Grammar, NegativePrompts
from diffagent.agent.decoding.strategies import Decoding, Greedy
from diffagent.agent.lm.format import (
    IGNORED,
    PROMPT_TEMPLATE,
    encode_prompt,
    encode_text,
    pad,
    prompt_room,
    response_text,
)
from diffagent.agent.lm.int8 import to_int8
from diffagent.agent.lm.likelihood import sequence_logps
from diffagent.agent.lm.llama import Llama, LlamaConfig
from diffagent.agent.lm.tokenizer import Tokenizer
from diffagent.device import resolve_device
from diffagent.errors import ArtifactError, ConfigError, TrainingError
from diffagent.pretrained import load_model, load_tokenizer
from diffagent.store import describe_directory
from diffagent.t2i.catalogue import Catalogue

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
AGENT_FILE = "agent.json"
#: What an agent takes over from the dataset that it was trained on.
DATASET_FILES = ("catalogue.parquet", "mapping/samplers.json")


class AgentInfo(BaseModel):
    """Contents of agent.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    base_model: str = Field(description="what the weights started from")
    trained_by: tuple[str, ...] = Field(description="stages of training, in order")
    prompt_template: str = PROMPT_TEMPLATE
    max_length: int = Field(description="tokens of prompt + response in training")


@dataclass(frozen=True)
class Completion:
    """One answer; ``ended`` says whether the agent stopped by itself."""

    text: str
    ended: bool


@dataclass(frozen=True)
class SequenceLogprob:
    """Natural log-probability of a response with its eos, and how many tokens that is."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        """Length-normalised: equation (1) of RRHF."""
        return self.total / self.tokens


@dataclass
class Agent:
    """Model, tokenizer and catalogue, ready to answer.

    ``calls`` are those of its training; an agent of before they were kept has none.
    """

    model: Any
    tokenizer: Any
    info: AgentInfo
    catalogue: Catalogue
    device: torch.device
    calls: Calls | None = None
    _grammars: dict[NegativePrompts, Grammar] = field(default_factory=dict, repr=False)

    def only(self, names: Collection[tuple[str, str]]) -> Agent:
        """The agent restricted to some (model, version): answers name no other.

        Raises:
            ConfigError: there is no checkpoint among them.
        """
        return replace(self, catalogue=self.catalogue.only(names), _grammars={})

    def grammar(self, negative_prompts: NegativePrompts = "known") -> Grammar:
        """The valid answers over its catalogue; built once."""
        if negative_prompts not in self._grammars:
            self._grammars[negative_prompts] = Grammar(
                self.catalogue, self.tokenizer, self.calls, negative_prompts
            )
        return self._grammars[negative_prompts]

    def decoder(
        self,
        *,
        max_new_tokens: int | None = None,
        negative_prompts: NegativePrompts = "known",
        draft_tokens: int = 16,
    ) -> Decoder:
        """What writes valid answers; see `Decoder` and `Grammar` for the options."""
        return Decoder(
            self.model,
            self.grammar(negative_prompts),
            self.device,
            max_new_tokens,
            draft_tokens,
            max_length=self.max_length,
        )

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together, as in training."""
        return min(self.info.max_length, self._max_positions)

    def encode(self, prompts: Sequence[str], max_new_tokens: int | None = None) -> list[list[int]]:
        """Tokens of prompts in their template.

        A prompt is cut where training cuts it (`prompt_room`), or sooner where the model has too
        few positions for ``max_new_tokens`` after it.
        """
        room = min(prompt_room(self.max_length), self._max_positions - (max_new_tokens or 0))
        return [
            encode_prompt(self.tokenizer, prompt, room, self.info.prompt_template)[0]
            for prompt in prompts
        ]

    def rank(
        self,
        prompts: Sequence[str],
        n: int = 1,
        *,
        beams: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        negative_prompts: NegativePrompts = "known",
        batch_size: int = 16,
    ) -> list[list[Row]]:
        """The ``n`` likeliest checkpoints a prompt with a valid call of each: `Decoder.rank`."""
        ranked: list[list[Row]] = []
        for start in range(0, len(prompts), batch_size):
            ids = self.encode(prompts[start : start + batch_size], max_new_tokens)
            decoder = self.decoder(max_new_tokens=max_new_tokens, negative_prompts=negative_prompts)
            ranked += decoder.rank(ids, n, max(n, beams), temperature)
        return ranked

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        decoding: Decoding | None = None,
        batch_size: int = 16,
        constrained: bool = False,
    ) -> list[list[Completion]]:
        """Answers to each prompt, in the order of ``prompts``.

        Args:
            prompts: users' prompts; one that is too long loses its end.
            max_new_tokens: an answer is cut there (and then not ``ended``); a constrained one
                is finished without the model. None: the room that ``max_length`` leaves after
                the prompt.
            decoding: how tokens are chosen; greedy by default.
            batch_size: prompts a forward pass; rows are this times candidates.
            constrained: choose among what keeps the answer valid. `Grammar` says how; a step of
                ``decoding`` is then a choice, not a token.

        Returns:
            ``decoding.num_candidates`` completions a prompt, duplicates included.
        """
        answers: list[list[Completion]] = []
        write = self._write_valid if constrained else self._generate_batch
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            answers += write(batch, max_new_tokens, decoding or Greedy())
        return answers

    def rooms(self, ids: Sequence[Sequence[int]], max_new_tokens: int | None) -> list[int]:
        """Tokens that an answer may have after each of the encoded prompts."""
        return [max_new_tokens or self.max_length - len(row) for row in ids]

    def _write_valid(
        self, prompts: Sequence[str], max_new_tokens: int | None, decoding: Decoding
    ) -> Iterator[list[Completion]]:
        k, eos = decoding.num_candidates, self.tokenizer.eos_token_id
        ids, decoder = (
            self.encode(prompts, max_new_tokens),
            self.decoder(max_new_tokens=max_new_tokens),
        )
        longest = max(self.rooms(ids, max_new_tokens))
        processor = decoding.processor(prompts, 0, longest, eos)
        if processor is None:
            texts = [row.text for (row,) in decoder.rank(ids, 1, 1)]
        else:
            texts = decoder.choose(ids, processor, eos, k)
        completions = [Completion(text, True) for text in texts]
        return (completions[start : start + k] for start in range(0, len(completions), k))

    def logprobs(
        self, prompts: Sequence[str], responses: Sequence[str], *, batch_size: int = 32
    ) -> list[SequenceLogprob | None]:
        """Log-probability of each response given its prompt.

        Returns:
            None for a response that is longer than what the agent can read.
        """
        questions = dict(zip(prompts, self.encode(prompts), strict=True))
        rows = []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            question = questions[prompt]
            answer = [*encode_text(self.tokenizer, response), self.tokenizer.eos_token_id]
            if len(question) + len(answer) <= self._max_positions:
                rows.append((i, question + answer, [IGNORED] * len(question) + answer))
        result: list[SequenceLogprob | None] = [None] * len(responses)
        # Rows of similar length share a batch: less padding, and the order does not matter.
        rows.sort(key=lambda row: len(row[1]))
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            ids = pad([ids for _, ids, _ in batch], self.tokenizer.pad_token_id)
            mask = pad([[1] * len(ids) for _, ids, _ in batch], 0)
            labels = pad([labels for _, _, labels in batch], IGNORED)
            with torch.inference_mode():
                logits = self.model(
                    input_ids=self._tensor(ids), attention_mask=self._tensor(mask), use_cache=False
                ).logits
                totals, lengths = sequence_logps(logits.float(), self._tensor(labels))
            pairs = zip(totals.tolist(), lengths.tolist(), strict=True)
            for (i, _, _), (total, tokens) in zip(batch, pairs, strict=True):
                result[i] = SequenceLogprob(total, int(tokens))
        return result

    def _generate_batch(
        self, prompts: Sequence[str], max_new_tokens: int | None, decoding: Decoding
    ) -> Iterator[list[Completion]]:
        from transformers import GenerationConfig, LogitsProcessorList

        k, tokenizer = decoding.num_candidates, self.tokenizer
        rows = [row for row in self.encode(prompts, max_new_tokens) for _ in range(k)]
        rooms = self.rooms(rows, max_new_tokens)
        ids = self._tensor(pad(rows, tokenizer.pad_token_id, left=True))
        mask = self._tensor(pad([[1] * len(row) for row in rows], 0, left=True))
        eos, width = tokenizer.eos_token_id, ids.shape[1]
        processor = decoding.processor(prompts, width, max(rooms), eos)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=self._read_once(ids[::k, :-1], mask[::k, :-1], k),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(rooms),
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=eos,
                    pad_token_id=tokenizer.pad_token_id,
                ),
                logits_processor=LogitsProcessorList([processor] if processor else []),
            )
        written = output[:, width:].tolist()
        completions = [
            self.completion(row[:room]) for row, room in zip(written, rooms, strict=True)
        ]
        return (completions[start : start + k] for start in range(0, len(completions), k))

    def _read_once(self, ids: Tensor, mask: Tensor, k: int) -> Any:
        """Keys and values of prompts (P, T) as rows of k candidates each would have them."""
        from transformers import DynamicCache

        if k == 1 or not ids.shape[1] or not self.model._supports_default_dynamic_cache():
            return None
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
        )
        cache.batch_repeat_interleave(k)
        return cache

    def completion(self, ids: list[int]) -> Completion:
        """The answer that the tokens ``ids`` are."""
        eos = self.tokenizer.eos_token_id
        ended = eos in ids
        text = self.tokenizer.decode(
            ids[: ids.index(eos)] if ended else ids, clean_up_tokenization_spaces=False
        )
        return Completion(text, ended)

    @property
    def _max_positions(self) -> int:
        return getattr(self.model.config, "max_position_embeddings", None) or self.info.max_length

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self.device)


def hide_progress_bars() -> None:
    """A log file needs no bars for reading and writing weights."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def align_special_tokens(model: Any, tokenizer: Any) -> None:
    """Make model and tokenizer agree on where an answer ends and what padding is.

    * SmolLM2's GGUF says that '<|im_start|>' is bos and eos at once, with which generation never
      stops: when a ChatML tokenizer says that, eos becomes '<|im_end|>'.
    * Without a pad token eos is used; padding is masked by length, never by its id.
    * The generation config starts anew: sampling settings of a release are none of ours, and
      some make ``save_pretrained`` fail.

    Raises:
        TrainingError: the tokenizer has no end-of-sequence token.
    """
    from transformers import GenerationConfig

    if tokenizer.eos_token == tokenizer.bos_token and "<|im_end|>" in tokenizer.get_vocab():
        tokenizer.eos_token = "<|im_end|>"
    if tokenizer.eos_token_id is None:
        raise TrainingError(
            "the tokenizer has no eos token, so an answer would never end; set one with "
            "tokenizer.eos_token = ... and save it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)


def save_agent(directory: Path, model: Any, tokenizer: Any, info: AgentInfo, dataset: Path) -> None:
    """Write an agent directory; ``dataset`` is a DABench, whose DATASET_FILES are copied."""
    from diffagent.agent.prompts import read_split  # with polars, which answers do without

    hide_progress_bars()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for name in DATASET_FILES:
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(dataset / name, target)
    Calls.count(response_text(pair.api) for pair in read_split(dataset, "train")).write(directory)
    text = json.dumps(info.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (directory / AGENT_FILE).write_text(text + "\n", encoding="utf-8")


def read_info(directory: Path) -> AgentInfo:
    """The agent.json of a directory.

    Raises:
        ArtifactError: there is none, or it has another format version.
    """
    path = directory / AGENT_FILE
    try:
        info = AgentInfo.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"no agent in {str(directory)!r}: {describe_directory(directory)}; the stages sft and "
            "rrhf make agents"
        ) from None
    except ValidationError as error:
        raise ArtifactError(
            f"{str(path)!r} is not an agent's description: {error.errors()[0]['msg']}"
        ) from None
    if info.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{str(path)!r} has format {info.format_version}, this version reads "
            f"{FORMAT_VERSION}; train the agent again"
        )
    return info


Quantization = Literal["none", "int8"]


def load_agent(
    directory: str | Path,
    device: str = "auto",
    quantization: Quantization = "none",
    *,
    generates: bool = True,
) -> Agent:
    """Load an agent directory for answering; bfloat16 on CUDA, float32 elsewhere.

    Args:
        directory: as `save_agent` wrote it.
        device: see `resolve_device`.
        quantization: 'int8', on a CPU: see `Int8Linear`.
        generates: False where `Agent.rank` and `Agent.decoder` are all that is wanted. On a CPU a
            Llama then does without transformers: see `diffagent.agent.lm.llama`.

    Raises:
        ArtifactError: the directory does not hold an agent.
        ConfigError: there is no such device, or it is none for 'int8'.
    """
    path, target = Path(directory), resolve_device(device)
    info, int8 = read_info(path), quantization == "int8"
    model: Any
    tokenizer: Any
    if int8 and target.type != "cpu":
        raise ConfigError(f"quantization 'int8' is for device 'cpu', not {str(target)!r}")
    llama = None if generates or target.type != "cpu" else LlamaConfig.read(path)
    if llama:
        model = Llama.load(path, llama, int8=int8)
        tokenizer = Tokenizer.load(path, llama.bos_token_id, llama.eos_token_id)
    else:
        model, tokenizer = _load_with_transformers(path, target)
        if int8:
            to_int8(model)
    return Agent(model, tokenizer, info, Catalogue.load(path), target, Calls.load(path))


def _load_with_transformers(path: Path, device: torch.device) -> tuple[Any, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_causal_lm(path, dtype)
    return model.to(device).eval(), tokenizer


def load_causal_lm(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer of an agent's directory, as transformers has them.

    Raises:
        ArtifactError: transformers cannot read them.
        ConfigError: they need code of their own, which is not run.
    """
    from transformers import AutoModelForCausalLM

    hide_progress_bars()
    try:
        tokenizer = load_tokenizer(path, local_files_only=True)
        return load_model(AutoModelForCausalLM, path, dtype=dtype, local_files_only=True), tokenizer
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"the agent in {str(path)!r} cannot be loaded ({error}); it needs config.json, "
            "model.safetensors and tokenizer.json of a causal language model"
        ) from error
