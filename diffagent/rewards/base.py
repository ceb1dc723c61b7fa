"""The `Scorer` protocol, and what all scorers share: digests, batches, text caches."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from diffagent.errors import ConfigError, ScoreError

if TYPE_CHECKING:
    import torch
    from PIL import Image

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreBatch:
    """What a scorer says about a batch.

    Attributes:
        scores: (B,) float32 on the scorer's own scale. Not a number where the model's output
            was not; see `failures`.
        truncated: (B,) bool, whether the scorer has read only the beginning of the prompt.
    """

    scores: npt.NDArray[np.float32]
    truncated: npt.NDArray[np.bool_]

    def failures(self) -> dict[int, str]:
        """Positions without a usable score, with the reason."""
        bad = np.flatnonzero(~np.isfinite(self.scores))
        return {int(i): f"score is {self.scores[i]}" for i in bad}


class Scorer(Protocol):
    """A reward model, loaded once."""

    name: str
    """Name of the metric: ``clip``, ``image_reward`` or ``hps_v2``."""
    version: str
    """Which weights, for people. Scores of different versions are not comparable."""
    digest: str
    """sha256 of the weights and the preprocessing. Only scores of one digest may be mixed."""

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> ScoreBatch:
        """Scores picture i against prompt i.

        Raises:
            ScoreError: there are not as many prompts as pictures.
        """
        ...


def content_digest(module: torch.nn.Module, settings: Mapping[str, Any]) -> str:
    """sha256 over the values of a module's state and the settings that change its scores.

    The file that the weights came from plays no part: the same weights from a ``.pt`` and from
    a safetensors file have one digest. Call it before the module is cast.
    """
    import torch

    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        sha.update(raw.numpy().data)
    return sha.hexdigest()


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name.

    Raises:
        ConfigError: it is not one that scorers run in.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ConfigError(f"scorers cannot run in {name!r}; choose one of {sorted(dtypes)}")
    return dtypes[name]


def check_lengths(name: str, prompts: Sequence[str], images: Sequence[Image.Image]) -> None:
    """Refuses a batch in which prompts and pictures do not pair up.

    Raises:
        ScoreError: they differ in number.
    """
    if len(prompts) != len(images):
        raise ScoreError(
            f"{name} got {len(prompts)} prompts and {len(images)} pictures; "
            "give one prompt for each picture"
        )


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of at most `size` items, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class PromptCache(Generic[T]):
    """What a scorer computed from a prompt alone; the least recently used goes first."""

    def __init__(self, compute: Callable[[Sequence[str]], Sequence[T]], size: int = 8192) -> None:
        """Keeps at most `size` values of `compute`, which maps prompts to one value each."""
        self._compute = compute
        self._size = size
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, prompts: Sequence[str]) -> list[T]:
        """One value for each prompt; every distinct one is computed at most once."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._values]
        if missing:
            self._values.update(zip(missing, self._compute(missing), strict=True))
        values = [self._values[prompt] for prompt in prompts]
        for prompt in dict.fromkeys(prompts):
            self._values.move_to_end(prompt)
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        return values


def hub_or_local(weights: str | Path, filename: str) -> Path:
    """A weights file: a local path as it is, or `filename` out of a Hugging Face repository.

    Raises:
        ConfigError: it is neither.
    """
    path = Path(weights)
    if path.is_file():
        return path
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(weights), filename))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"scorer weights {str(weights)!r} are neither a file here nor a repository with "
            f"{filename!r} that the hub gives out ({type(error).__name__}); download the file "
            "and give its path"
        ) from error
