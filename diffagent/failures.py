"""Exceptions as one line with a remedy, and as JSON between processes.

``as_error`` is the only place that words the message for an exception that is not a
``DiffAgentError``: stages (``explained``), their child processes (``pack``, ``unpack``) and the
command line use it. The exception stays the error's cause, so -v shows its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffagent import errors
from diffagent.errors import (
    ArtifactError,
    ConfigError,
    DiffAgentError,
    SchemaError,
    UnexpectedError,
)
from diffagent.schemas.api import ApiError
from diffagent.schemas.printable import printable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
#: Messages of libraries in Rust and C++, whose exceptions carry no error number.
_FULL_TEXT = re.compile(
    r"no space left on device|file too large|disk quota exceeded|os error (?:27|28|122)\b"
    r"|PytorchStreamWriter failed writing|file write failed|inline_container.*unexpected pos",
    re.IGNORECASE,
)
_MEMORY_TEXT = re.compile(
    r"out of memory|cannot allocate memory|DefaultCPUAllocator", re.IGNORECASE
)
#: Most characters of another library's message, and of a line on a terminal.
_LINE, _LONG = 400, 1200


def is_failure(error: BaseException) -> bool:
    """Whether ``error`` is a failure and not, for example, an exit or an interruption.

    A panic of a library in Rust (polars, tokenizers) is a failure, although not an ``Exception``.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def as_error(error: BaseException, action: str, store: Path | None = None) -> DiffAgentError:
    """Return the error that states ``error`` in one line: the failure, its place and the remedy.

    Args:
        error: any exception; a ``DiffAgentError`` is returned as it is.
        action: names the stage or the command, for example ``"stage 'sft'"``.
        store: directory that is being written, where a full disk names no file.
    """
    if isinstance(error, DiffAgentError):
        return error
    return (
        _input_error(error, action)
        or _disk_error(error, action, store)
        or _other_error(error, action)
    )


def _input_error(error: BaseException, action: str) -> DiffAgentError | None:
    """Return the error for a value or a text that the user can change."""
    if isinstance(error, ValidationError):
        faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return ConfigError(f"{action}: {printable('; '.join(faults)):.{_LINE}}")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return ConfigError(f"{action}: a path holds a NUL character; leave it out")
    if isinstance(error, UnicodeError):
        return SchemaError(f"{action}: text in another encoding: {_reason(error)}; use UTF-8")
    if isinstance(error, ApiError):
        return SchemaError(f"{action}: not an API call: {_reason(error)}", field=error.field)
    return None


def _disk_error(error: BaseException, action: str, store: Path | None) -> ArtifactError | None:
    """Return the error for a disk or path that is full, closed or unusable."""
    if (cause := _full_disk(error)) is not None:
        place = getattr(cause, "filename", None) or store or "the disk"
        return ArtifactError(
            f"{action}: cannot write {str(place)!r}: {_reason(cause)}; nothing half-written is "
            "visible. Make room, or move the store (runtime.store), then run the same command "
            "again: it goes on from what was written"
        )
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return ArtifactError(
            f"{action}: no access to {_place(error, store)}: {_reason(error)}; change its "
            "permissions, or name another place (runtime.store, --store, --out, $HOME)"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return ArtifactError(
            f"{action}: cannot use {_place(error, store)}: {_reason(error)}; check that path, "
            "or name another place (runtime.store, --store, --out); -v shows the traceback"
        )
    return None


def _other_error(error: BaseException, action: str) -> DiffAgentError:
    if _is_memory(error):
        return UnexpectedError(
            f"{action}: out of memory: {_reason(error)}; use smaller batches or a smaller model, "
            "or a machine with more memory, then run the same command again"
        )
    if isinstance(error, ImportError):
        return ConfigError(
            f"{action}: {_reason(error)}; install the missing package (docs and pyproject.toml "
            "name the extras), or run 'make install' again"
        )
    kind = type(error).__name__
    if isinstance(error, RecursionError):
        return UnexpectedError(
            f"{action}: {kind}: the input nests too deeply; make it flatter (-v shows the "
            "traceback)"
        )
    failure = UnexpectedError(
        f"{action}: unexpected {kind}: {_reason(error)}; run it again with -v for the traceback, "
        "and report it if the input is correct"
    )
    failure.retryable = bool(getattr(error, "retryable", False))
    return failure


@contextlib.contextmanager
def explained(action: str, store: Path | None = None) -> Iterator[None]:
    """Turn every exception of the block into a ``DiffAgentError`` (see ``as_error``)."""
    try:
        yield
    except DiffAgentError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise as_error(error, action, store) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any exception of the block, which reads ``path``, into one that names the file."""
    try:
        yield
    except DiffAgentError:
        raise
    except BaseException as error:
        if not is_failure(error) or isinstance(error, MemoryError):
            raise
        raise ArtifactError(
            f"cannot read {str(path)!r}: {_reason(error)}; the file is damaged: 'diffagent "
            "artifact verify' lists the damage; copy it again, or run the stage that wrote it again"
        ) from error


def pack(error: DiffAgentError) -> dict[str, Any]:
    """Return an error as JSON: its class, message and attributes (``retry_after``, ``reason`` ...).

    An attribute that JSON cannot hold is left out.
    """
    return {
        "module": type(error).__module__,
        "error": type(error).__name__,
        "message": str(error),
        "fields": {name: value for name, value in vars(error).items() if _is_json(value)},
    }


def unpack(packed: dict[str, Any]) -> DiffAgentError:
    """Return the error that was packed, perhaps in another process."""
    module = importlib.import_module(packed["module"])
    kind = getattr(module, packed["error"], errors.UnexpectedError)
    failure: DiffAgentError = kind.__new__(kind, packed["message"])
    failure.args = (packed["message"],)
    vars(failure).update(packed["fields"])
    return failure


def _is_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def shown(error: DiffAgentError) -> str:
    """Return the message of an error for a terminal: printable, in lines of bounded length."""
    lines = printable(error, lines=True).split("\n")
    return "\n".join(
        s if len(s) <= _LONG else f"{s[: _LONG // 2]} ... {s[-_LONG // 2 :]}" for s in lines
    )


def _reason(error: BaseException) -> str:
    """Return the start of an exception's own text on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{' '.join(printable(text).split()):.{_LINE}}" or "no message"


def _place(error: OSError, store: Path | None) -> str:
    return f"{str(error.filename or store or 'a file')!r:.300}"


def _full_disk(error: BaseException) -> BaseException | None:
    """Return the exception among ``error`` and its causes that stems from a full disk."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno in _FULL:
            return current
        if not isinstance(current, DiffAgentError) and _FULL_TEXT.search(str(current)):
            return current
        current = current.__cause__ or current.__context__
    return None


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and bool(_MEMORY_TEXT.search(str(error)))
    )
