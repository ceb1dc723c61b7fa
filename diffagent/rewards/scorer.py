"""The `Scorer` protocol, and what all scorers share: digests, weights, text caches."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from diffagent.errors import ConfigError, ScoreError
from diffagent.pretrained import split_revision
from diffagent.store import sha256_file

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffagent.rewards.image_batches import Preparation

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreBatch:
    """What a scorer says about a batch.

    Attributes:
        scores: (B,) float32 on the scorer's own scale. Not a number where the model's output
            was not.
        truncated: (B,) bool, whether the scorer has read only the beginning of the prompt.
    """

    scores: npt.NDArray[np.float32]
    truncated: npt.NDArray[np.bool_]


class Scorer(Protocol):
    """A reward model, loaded once."""

    name: str
    """Name of the metric: ``clip``, ``image_reward``, ``hps_v2``, or that of a judge."""
    version: str
    """Which weights, for people. Scores of different versions are not comparable."""
    digest: str
    """sha256 of the weights and the preprocessing. Only scores of one digest may be mixed."""
    device: str
    """Where it computes."""
    preparation: Preparation
    """What it wants to be made of a picture; scorers that want the same share it."""

    def score_pixels(
        self, prompts: Sequence[str], pixels: torch.Tensor
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """Scores pictures that `preparation` has made, without waiting for the device.

        Args:
            prompts: one for each picture.
            pixels: (B, 3, H, W), uint8 or float32, on any device.

        Returns:
            Scores (B,) float32 on the scorer's device, and as in `ScoreBatch.truncated`.
        """
        ...

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> ScoreBatch:
        """Scores picture i against prompt i.

        Raises:
            ScoreError: there are not as many prompts as pictures.
        """
        ...


@dataclass(frozen=True)
class Runtime:
    """Where and how a scorer computes; nothing here changes which scorer it is.

    Attributes:
        device: any torch device.
        dtype: of the matrix products (autocast); weights stay float32.
        batch_size: pictures, or prompts, a forward pass.
        compiled: the image encoder goes through torch.compile, at the price of a slow first batch.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 32
    compiled: bool = False


class PixelScorer(ABC):
    """What all scorers have in common; a `Scorer` when ``name`` and `_rewards` are given."""

    name: str

    def __init__(
        self,
        model: Any,
        preparation: Preparation,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        version: str,
        digest: str,
        runtime: Runtime,
    ) -> None:
        """Takes a loaded network; each scorer's ``load`` is the usual way.

        Args:
            model: a float32 module, which is moved to the device.
            preparation: what the network wants of a picture.
            mean: of each colour, which is subtracted from pixels in 0 to 1.
            std: of each colour.
            version: which weights, for people.
            digest: sha256 of weights and preprocessing.
            runtime: where and how to compute.
        """
        import torch

        self.version = version
        self.digest = digest
        self.preparation = preparation
        self.device = runtime.device
        self.dtype = torch_dtype(runtime.dtype)
        self.batch_size = runtime.batch_size
        self.compiled = runtime.compiled
        self.model = model.to(self.device).eval().requires_grad_(False)
        _lay_out_attention(self.model)
        self._mean = torch.tensor(mean, device=self.device).view(3, 1, 1)
        self._std = torch.tensor(std, device=self.device).view(3, 1, 1)

    @abstractmethod
    def _rewards(
        self, prompts: Sequence[str], pixels: torch.Tensor
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """As `score_pixels`, of normalised pixels on the device."""

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> ScoreBatch:
        """Scores picture i against prompt i; see `Scorer`."""
        import torch

        check_lengths(self.name, prompts, images)
        scores, truncated = [torch.zeros(0)], [np.zeros(0, np.bool_)]
        for part in batches(range(len(prompts)), self.batch_size):
            pixels = torch.from_numpy(np.stack([self.preparation(images[i]) for i in part]))
            rewards, cut = self.score_pixels([prompts[i] for i in part], pixels)
            scores.append(rewards.cpu())
            truncated.append(cut)
        return ScoreBatch(torch.cat(scores).numpy(), np.concatenate(truncated))

    def score_pixels(
        self, prompts: Sequence[str], pixels: torch.Tensor
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """Scores pictures that `preparation` has made; see `Scorer`."""
        import torch

        check_lengths(self.name, prompts, pixels)
        count, missing = len(prompts), self.batch_size - len(prompts)
        if self.compiled and missing > 0:  # one shape is compiled: the last picture fills it up
            prompts = [*prompts, *[prompts[-1]] * missing]
            pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        with (
            torch.inference_mode(),
            torch.autocast(
                torch.device(self.device).type, self.dtype, enabled=self.dtype != torch.float32
            ),
        ):
            rewards, truncated = self._rewards(prompts, self.normalise(pixels))
        return rewards[:count].float(), truncated[:count]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """The network's input, (B, 3, H, W) float32, of prepared pixels."""
        import torch

        pixels = pixels.to(self.device, non_blocking=True)
        values = pixels if pixels.dtype is torch.float32 else pixels.float() / 255
        return (values - self._mean) / self._std


def _lay_out_attention(model: torch.nn.Module) -> None:
    """Give torch's attention its inputs as they lie in memory after it has transposed them.

    Else its first product is one with a copy of the weights for every picture, which in 16 bits on
    a CPU takes many times as long as all the rest. Values stay the same to the bit.
    """
    import torch

    def laid_out(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        query, *others = inputs
        if not all(other is query for other in others):
            return inputs
        return (query.transpose(0, 1).contiguous().transpose(0, 1),) * len(inputs)

    for module in model.modules():
        if isinstance(module, torch.nn.MultiheadAttention) and module.batch_first:
            module.register_forward_pre_hook(laid_out)


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


def check_sha256(file: Path, expected: str | None) -> None:
    """Refuses a file of weights that is not the one that was meant.

    Raises:
        ConfigError: its SHA256 is another.
    """
    if expected and (found := sha256_file(file)) != expected.lower():
        raise ConfigError(
            f"scorer weights {str(file)!r} have SHA256 {found}, expected is {expected}; "
            "download the file anew, or correct sha256 in the configuration"
        )


def read_state(file: Path, sha256: str | None = None) -> Mapping[str, torch.Tensor]:
    """The tensors of a safetensors file or of a ``.pt`` checkpoint, by name.

    A ``.pt`` is read with ``weights_only=True``: one that wants to run code is refused.

    Raises:
        ConfigError: there is no such file, or it has another hash than ``sha256``.
        ScoreError: it is not a file of tensors.
    """
    if not file.is_file():
        raise ConfigError(f"scorer weights {str(file)!r} do not exist; give another path")
    check_sha256(file, sha256)
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: Mapping[str, torch.Tensor] = load_file(file)
        return tensors
    import pickle  # noqa: TID251  only for the class of torch.load's refusal

    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ScoreError(
            f"{str(file)!r} is no checkpoint that weights_only=True reads: {error}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ScoreError(f"{str(file)!r} holds other things than tensors by name")
    return dict(state)


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


def check_lengths(name: str, prompts: Sequence[str], images: Sized) -> None:
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

    Args:
        weights: a path, or the repository's name, perhaps with a revision: NAME@REVISION.
        filename: of the file in the repository.

    Raises:
        ConfigError: it is neither; see `diffagent.rewards.hub.hub_file`.
    """
    path = Path(weights)
    if path.is_file():
        return path
    from diffagent.rewards.hub import hub_file

    repository, revision = split_revision(weights)
    return hub_file(repository, filename, revision=revision)
