"""Files of the Hugging Face hub: from this machine's cache, or downloaded after one quick check.

``hf_hub_download`` retries for half a minute a file before it gives up, and asks the hub even
for what is cached. Here the cache comes first, and a hub that does not answer is an error at once.
"""

from __future__ import annotations

import logging
from pathlib import Path

from diffagent.errors import ConfigError

log = logging.getLogger(__name__)


def hub_file(repository: str, *names: str, revision: str | None = None) -> Path:
    """Return the first of some files that a repository has.

    Args:
        repository: 'OWNER/NAME'.
        names: files, the preferred one first.
        revision: branch, tag or commit; None: the newest on the main branch.

    Raises:
        ConfigError: the hub does not answer, refuses, or has no such file; with the remedy.
    """
    from httpx2 import HTTPError  # which huggingface_hub 2 speaks through
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
