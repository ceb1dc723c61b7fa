"""Files of weights: on this disk, or from the Hugging Face hub; their hashes and tensors.

``hf_hub_download`` retries for half a minute per file before it gives up, and sends requests even
for cached files. Here the cache comes first, and a hub that does not answer is an error at once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffagent.errors import ConfigError, ScoreError
from diffagent.pretrained import split_revision
from diffagent.store import sha256_file

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def hub_or_local(weights: str | Path, filename: str) -> Path:
    """Returns a local file as it is, or `filename` of a repository of the hub.

    Args:
        weights: a path, or the repository's name, perhaps with a revision: NAME@REVISION.
        filename: of the file in the repository.

    Raises:
        ConfigError: it is neither; see `hub_file`.
    """
    path = Path(weights)
    if path.is_file():
        return path
    repository, revision = split_revision(weights)
    return hub_file(repository, filename, revision=revision)


def hub_file(repository: str, *names: str, revision: str | None = None) -> Path:
    """Returns the first of several files that a repository of the hub has.

    Args:
        repository: 'OWNER/NAME'.
        names: files, the preferred one first.
        revision: branch, tag or commit; None: the newest on the main branch.

    Raises:
        ConfigError: the hub does not answer, refuses, or has no such file; with the remedy.
    """
    from httpx2 import HTTPError  # raised by huggingface_hub 2
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    reason = "it has no such file"
    for name in names:
        try:
            cached = try_to_load_from_cache(repository, name, revision=revision)
            if isinstance(cached, str):
                return Path(cached)
            size = get_hf_file_metadata(hf_hub_url(repository, name, revision=revision)).size
            log.warning("downloading %s of %s: %.1f GB", name, repository, (size or 0) / 1e9)
            return Path(hf_hub_download(repository, name, revision=revision))
        except EntryNotFoundError:
            continue
        except (HTTPError, HFValidationError, OSError) as error:  # no connection, refused, disk
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            break
    raise ConfigError(
        f"cannot download {' or '.join(names)} of {repository!r} from the Hugging Face hub: "
        f"{reason}. Download it on a machine that reaches the hub and set the path as `weights`, "
        "choose other scorers (-c FILE), or leave scores out (--no-score)"
    )


def check_sha256(file: Path, expected: str | None) -> None:
    """Refuses a file of weights with another hash than the configured one.

    Raises:
        ConfigError: its SHA256 is another.
    """
    if expected and (actual := sha256_file(file)) != expected.lower():
        raise ConfigError(
            f"scorer weights {str(file)!r} have SHA256 {actual}, expected is {expected}; "
            "download the file anew, or correct sha256 in the configuration"
        )


def read_state(file: Path, sha256: str | None = None) -> Mapping[str, torch.Tensor]:
    """Returns the tensors of a safetensors file or of a ``.pt`` checkpoint, by name.

    A ``.pt`` is read with ``weights_only=True``, which refuses a file with code.

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
    import pickle  # noqa: TID251  only the exception that torch.load raises

    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ScoreError(
            f"{str(file)!r} is no checkpoint that weights_only=True reads: {error}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ScoreError(f"{str(file)!r} holds other values than tensors by name")
    return dict(state)
