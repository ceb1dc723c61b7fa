"""Base class of all reward models, and the helpers that they share: batches, digests, caches."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from diffagent.errors import ConfigError, ScoreError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from diffagent.rewards.image_batches import Preparation

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreBatch:
    """Scores of a batch.

    Attributes:
        scores: (B,) float32 on the scorer's own scale; NaN where the model's output was NaN.
        truncated: (B,) bool, whether the scorer has read only the beginning of the prompt.
    """

    scores: npt.NDArray[np.float32]
    truncated: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Runtime:
    """Where and how a scorer computes; no setting here changes which scorer it is.

    Attributes:
        device: any torch device.
        dtype: of the matrix products (autocast); weights stay float32.
        batch_size: pictures, or prompts, per forward pass.
        compiled: compile the image encoder with torch.compile; the first batch becomes slow.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 32
    compiled: bool = False


class Scorer(ABC):
    """Reward model, loaded once. Subclasses define ``name`` and `_rewards`.

    Attributes:
        name: of the metric: ``clip``, ``image_reward``, ``hps_v2``, or the name of a judge.
        version: which weights, for people. Scores of different versions are not comparable.
        digest: sha256 of weights and preprocessing. Only scores of one digest may be mixed.
        device: torch device that it computes on.
        preparation: how a picture becomes its input; scorers with equal preparations share pixels.
    """

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
        """Wraps a loaded network; each scorer's ``load`` is the usual way.

        Args:
            model: a float32 module, which is moved to the device.
            preparation: resizing that the network expects.
            mean: of each colour, subtracted from pixels in 0 to 1.
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
        """Returns the same as `score_pixels`, for normalised pixels on the device."""

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> ScoreBatch:
        """Scores picture i against prompt i.

        Raises:
            ScoreError: the numbers of prompts and pictures differ.
        """
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
        """Scores pictures in the form of `preparation`, without waiting for the device.

        Args:
            prompts: one for each picture.
            pixels: (B, 3, H, W), uint8 or float32, on any device.

        Returns:
            Scores (B,) float32 on the scorer's device, and `ScoreBatch.truncated`.
        """
        import torch

        check_lengths(self.name, prompts, pixels)
        count, missing = len(prompts), self.batch_size - len(prompts)
        if self.compiled and missing > 0:  # one shape is compiled: repeat the last picture
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
        """Returns the network's input, (B, 3, H, W) float32, for prepared pixels."""
        import torch

        pixels = pixels.to(self.device, non_blocking=True)
        values = pixels if pixels.dtype is torch.float32 else pixels.float() / 255
        return (values - self._mean) / self._std


def _lay_out_attention(model: torch.nn.Module) -> None:
    """Passes inputs to torch's attention in the memory layout that it transposes them to.

    Otherwise its first product copies the weights for every picture, which in 16 bits on a CPU
    takes many times as long as all the rest. Values stay the same to the bit.
    """
    import torch

    def transpose_layout(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        query, *others = inputs
        if not all(other is query for other in others):
            return inputs
        return (query.transpose(0, 1).contiguous().transpose(0, 1),) * len(inputs)

    for module in model.modules():
        if isinstance(module, torch.nn.MultiheadAttention) and module.batch_first:
            module.register_forward_pre_hook(transpose_layout)


def content_digest(module: torch.nn.Module, settings: Mapping[str, Any]) -> str:
    """Returns the sha256 over a module's state and the settings that change its scores.

    The file of the weights plays no part: the same weights from a ``.pt`` and from a safetensors
    file have one digest. Call it before the module is cast.
    """
    import torch

    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        sha.update(raw.numpy().data)
    return sha.hexdigest()


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype of a name.

    Raises:
        ConfigError: scorers do not run in it.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ConfigError(f"scorers cannot run in {name!r}; choose one of {sorted(dtypes)}")
    return dtypes[name]


def check_lengths(name: str, prompts: Sequence[str], images: Sized) -> None:
    """Refuses a batch with different numbers of prompts and pictures.

    Raises:
        ScoreError: the numbers differ.
    """
    if len(prompts) != len(images):
        raise ScoreError(
            f"{name} got {len(prompts)} prompts and {len(images)} pictures; "
            "give one prompt for each picture"
        )


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yields slices of at most `size` items, in order."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class PromptCache(Generic[T]):
    """Cache of values that a scorer computes from prompts only; evicts the least recently used."""

    def __init__(self, compute: Callable[[Sequence[str]], Sequence[T]], size: int = 8192) -> None:
        """Keeps at most `size` values of `compute`, which maps prompts to one value each."""
        self._compute = compute
        self._size = size
        self._values: OrderedDict[str, T] = OrderedDict()

    def get(self, prompts: Sequence[str]) -> list[T]:
        """Returns one value for each prompt; computes every distinct one at most once."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._values]
        if missing:
            self._values.update(zip(missing, self._compute(missing), strict=True))
        values = [self._values[prompt] for prompt in prompts]
        for prompt in dict.fromkeys(prompts):
            self._values.move_to_end(prompt)
        while len(self._values) > self._size:
            self._values.popitem(last=False)
        return values
