"""Models and tokenizers of strangers: their weights and words are read, their code never runs.

A directory or a repository of a hub can name Python files of its own (``auto_map`` in config.json
or tokenizer_config.json). Left alone, transformers asks on standard input whether to run them, and
a first prompt of "y" is a yes. Here the answer is always no, and weights are safetensors: a pickle
can hold code too. Every ``from_pretrained`` of the library goes through this module.

A name on a hub may pin a revision (branch, tag or commit): ``NAME@REVISION``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffagent import compat
from diffagent.errors import ConfigError, DiffAgentError


def split_revision(name: str | Path) -> tuple[str, str | None]:
    """A name on a hub and its revision; a path that exists is taken as it is."""
    text = str(name)
    if "@" not in text or Path(text).exists():
        return text, None
    repository, _, revision = text.rpartition("@")
    if not repository or not revision:
        raise ConfigError(f"{text!r} is neither a path nor NAME@REVISION; correct the name")
    return repository, revision


def load_model(kind: Any, name: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained`` of a model: safetensors only, no code of strangers.

    Args:
        kind: a class of transformers, such as ``AutoModelForCausalLM``.
        name: a directory, or a name on a hub, perhaps with a revision.
        options: of ``from_pretrained``.

    Raises:
        ConfigError: it needs code of its own.
        OSError: there is no such model, or it has no safetensors.
        ValueError: transformers does not have its architecture, or a file is damaged.
    """
    return _load(kind, name, use_safetensors=True, **options)


def load_tokenizer(name: str | Path, **options: Any) -> Any:
    """``AutoTokenizer.from_pretrained``, no code of strangers; raises as `load_model`."""
    compat.install()
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, name, **options)


def _load(kind: Any, name: str | Path, **options: Any) -> Any:
    source, revision = split_revision(name)
    options |= {"revision": revision or "main", "trust_remote_code": False}
    with no_remote_code(name):
        try:
            return kind.from_pretrained(source, **options)
        except (OSError, ValueError, DiffAgentError):
            raise
        except Exception as error:  # whatever a stranger's file brings about in a library
            raise ValueError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def no_remote_code(name: str | Path) -> Iterator[None]:
    """Within it transformers runs no code of a model, whoever calls it with whatever arguments.

    open_clip hands a configuration's ``tokenizer_kwargs`` to transformers, ``trust_remote_code``
    among them.

    Raises:
        ConfigError: ``name`` needs code of its own.
    """
    from transformers import dynamic_module_utils

    refusal = ConfigError(
        f"{str(name)!r} names Python code of its own (auto_map), which is never run; use a model "
        "of an architecture that transformers has, or convert it where you trust it"
    )

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise refusal

    lent = {"TIME_OUT_REMOTE_CODE": 0, "get_class_in_module": refuse}  # 0: it does not ask
    own = {attribute: getattr(dynamic_module_utils, attribute) for attribute in lent}
    try:
        for attribute, value in lent.items():
            setattr(dynamic_module_utils, attribute, value)
        yield
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise refusal from error
        raise
    finally:
        for attribute, value in own.items():
            setattr(dynamic_module_utils, attribute, value)
