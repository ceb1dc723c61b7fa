"""Batches of pictures for scorers: decoded once, and resized once for all equal preparations.

Threads decode and resize ahead of the networks; Pillow does both outside of Python's lock. They
call no torch operator, whose own threads would multiply with these.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from diffagent.rewards.scorer import batches

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

log = logging.getLogger(__name__)

Pixels = npt.NDArray[Any]
Mode = Literal["shortest", "longest", "squash", "hps"]

AHEAD = 2
"""Batches that are decoded while another batch is scored."""


@dataclass(frozen=True)
class Preparation:
    """Resizing of a picture to a network's size; the network's scorer normalises.

    Attributes:
        size: (height, width) in pixels.
        mode: ``shortest`` (then crop), ``longest`` (then pad) and ``squash`` are open_clip's and
            round to 8 bits; ``hps`` is hpsv2's, which pads and does not round.
        interpolation: of open_clip's modes.
        fill: grey value of open_clip's padding.
    """

    size: tuple[int, int]
    mode: Mode
    interpolation: str = "bicubic"
    fill: int = 0

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any], mode: Mode | None = None) -> Self:
        """Returns the preparation of an open_clip network's ``preprocess_cfg``.

        Args:
            config: the ``preprocess_cfg``.
            mode: replaces the configured mode.
        """
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else size
        return cls(
            (height, width),
            mode or config["resize_mode"],
            config["interpolation"],
            config["fill_color"],
        )

    @property
    def dtype(self) -> type[np.generic]:
        """uint8 in 0 to 255, or float32 in 0 to 1."""
        return np.float32 if self.mode == "hps" else np.uint8

    def __call__(self, image: Image) -> Pixels:
        """Returns pixels (3, height, width) of a picture; an alpha channel is dropped."""
        image = image.convert("RGB")
        if self.mode == "hps":
            return _resize_and_pad(image, self.size[0])
        return np.asarray(self._resize(image)).transpose(2, 0, 1)

    @functools.cached_property
    def _resize(self) -> Callable[[Image], Image]:
        from diffagent import compat

        compat.install()
        from open_clip.transform import image_transform
        from torchvision.transforms import Compose

        transform = image_transform(
            self.size,
            is_train=False,
            interpolation=self.interpolation,
            resize_mode=self.mode,
            fill_color=self.fill,
        )
        resize: Callable[[Image], Image] = Compose(transform.transforms[:-2])
        return resize  # without ToTensor and Normalize


def _resize_and_pad(image: Image, side: int) -> Pixels:
    """Resizes like hpsv2 1.2.0's ``ResizeMaxSize`` on a tensor: real numbers, padded with black."""
    from PIL.Image import Resampling

    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    top, left = (side - height) // 2, (side - width) // 2
    pixels = np.zeros((3, side, side), np.float32)
    for band, values in zip(image.split(), pixels, strict=True):
        resized = band.convert("F").resize((width, height), Resampling.BICUBIC)
        values[top : top + height, left : left + width] = np.asarray(resized)
    pixels /= 255
    return pixels


@dataclass(frozen=True)
class PictureBatch:
    """Prepared pictures.

    Attributes:
        numbers: indices of the B sources.
        pixels: preparation -> (B, 3, height, width), black for a picture that could not be read.
        failures: index of a source -> reason why it could not be read.
    """

    numbers: range
    pixels: Mapping[Preparation, torch.Tensor]
    failures: Mapping[int, str]


def load_pictures(
    sources: Sequence[Path | Image],
    preparations: Sequence[Preparation],
    *,
    batch_size: int,
    threads: int,
    pin: bool = False,
) -> Iterator[PictureBatch]:
    """Decodes and resizes pictures in threads, ahead of the reader of the batches.

    Args:
        sources: files of any format that Pillow reads, or pictures.
        preparations: applied to each picture; equal ones are applied once.
        batch_size: pictures per batch.
        threads: number of threads that decode.
        pin: put the batches into page-locked memory, from which copies to a GPU do not block.

    Yields:
        The pictures in order.
    """
    distinct = tuple(dict.fromkeys(preparations))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
    waiting: deque[_Pending] = deque()
    try:
        for numbers in batches(range(len(sources)), batch_size):
            waiting.append(_start(pool, sources, numbers, distinct, pin))
            if len(waiting) > AHEAD:
                yield _finish(waiting.popleft())
        while waiting:
            yield _finish(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Pending:
    numbers: range
    pixels: dict[Preparation, torch.Tensor]
    futures: list[Future[str]]


def _start(
    pool: ThreadPoolExecutor,
    sources: Sequence[Path | Image],
    numbers: Any,
    preparations: tuple[Preparation, ...],
    pin: bool,
) -> _Pending:
    import torch

    pixels = {
        preparation: torch.empty(
            (len(numbers), 3, *preparation.size),
            dtype=torch.float32 if preparation.dtype is np.float32 else torch.uint8,
            pin_memory=pin,
        )
        for preparation in preparations
    }
    rows = {preparation: tensor.numpy() for preparation, tensor in pixels.items()}
    futures = [
        pool.submit(_fill, sources[number], {p: values[row] for p, values in rows.items()})
        for row, number in enumerate(numbers)
    ]
    return _Pending(numbers, pixels, futures)


def _finish(pending: _Pending) -> PictureBatch:
    reasons = zip(pending.numbers, (future.result() for future in pending.futures), strict=True)
    failures = {number: reason for number, reason in reasons if reason}
    return PictureBatch(pending.numbers, pending.pixels, failures)


def _fill(source: Path | Image, rows: Mapping[Preparation, Pixels]) -> str:
    """Writes a picture's pixels to its rows; returns the reason of a failure, or an empty text."""
    from PIL import Image

    try:
        if isinstance(source, Path):
            with Image.open(source) as opened:
                image = opened.convert("RGB")
        else:
            image = source
        for preparation, row in rows.items():
            row[...] = preparation(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        for row in rows.values():
            row[...] = 0
        return f"unreadable-picture: {type(error).__name__}: {error}"
    return ""
