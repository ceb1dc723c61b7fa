"""Errors that DiffAgent raises on purpose.

    DiffAgentError
    ├── ConfigError          a run configuration is wrong
    │   └── MissingExtra        a feature needs packages that are not installed
    ├── SchemaError          a record does not have its stated form (names the field)
    ├── ArtifactError        an artifact is missing or of another version, or its store fails
    │   └── DamagedArtifact     its files are not those of its manifest
    ├── CivitaiError         the site answered with something other than data
    │   ├── RateLimited      429 of the edge           (retryable)
    │   ├── ServerError      5xx, 524, broken transfer (retryable)
    │   ├── NotFound         404
    │   ├── Forbidden        401, 403
    │   │   ├── EarlyAccess         for sale before it is free
    │   │   └── DownloadsDisabled   its creator allows no downloads
    │   ├── BadCursor        400: the cursor is malformed or stale
    │   └── PageCap          429 that means "page * limit > 1000": never succeeds
    ├── RenderError          a picture could not be made
    │   └── RenderServerError   the rendering server is down or busy   (retryable)
    ├── ScoreError           a reward could not be computed
    ├── TrainingError        training cannot start or has diverged
    └── UnexpectedError      any other exception, of a stage or of a command

A message states the problem, its place and the remedy. The orchestration's retry condition reads
``retryable``: true only where the same call may succeed later.
"""

from __future__ import annotations


class DiffAgentError(Exception):
    """Base class of all errors raised on purpose."""

    retryable = False


class ConfigError(DiffAgentError):
    """A run configuration is wrong."""


class MissingExtra(ConfigError, ImportError):  # noqa: N818  the state, as in NotFound
    """A feature needs packages that are not installed; see `diffagent.extras`."""


class SchemaError(DiffAgentError):
    """A record does not have its stated form; ``field`` names the place in it."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ArtifactError(DiffAgentError):
    """An artifact is missing or of another version, or its store fails."""


class DamagedArtifact(ArtifactError):  # noqa: N818  the state, as in NotFound
    """The files of an artifact are not those of its manifest."""


class CivitaiError(DiffAgentError):
    """The site answered with something other than data."""


class RateLimited(CivitaiError):  # noqa: N818  the name of the condition, as in HTTP
    """429 of the edge; ``retry_after`` in seconds where the site states it."""

    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ServerError(CivitaiError):
    """5xx, 524 or a broken transfer; ``retry_after`` in seconds where the site states it."""

    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotFound(CivitaiError):  # noqa: N818
    """404: may be transient on this site; never a reason to delete a record."""


class Forbidden(CivitaiError):  # noqa: N818
    """401 or 403: a token is missing or the item is not open to it."""


class EarlyAccess(Forbidden):
    """403: a version that is for sale before it is free; a token that has bought it opens it."""


class DownloadsDisabled(Forbidden):
    """401: the creator allows use on the site but no downloads; no token helps."""


class BadCursor(CivitaiError):  # noqa: N818
    """400: the cursor is malformed or stale; restart the listing."""


class PageCap(CivitaiError):  # noqa: N818
    """429 with page * limit > 1000: use cursors; the same call never succeeds."""


class RenderError(DiffAgentError):
    """A picture could not be made; ``reason`` is the short code that goes into the row."""

    def __init__(self, message: str, *, reason: str = "error") -> None:
        super().__init__(message)
        self.reason = reason


class RenderServerError(RenderError):
    """The rendering server is down, busy or broke off; ``retry_after`` in seconds if it states it.

    The picture is not at fault: the run ends, and resumes when it is started again.
    """

    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message, reason="server-away")
        self.retry_after = retry_after


class ScoreError(DiffAgentError):
    """A reward could not be computed."""


class TrainingError(DiffAgentError):
    """Training cannot start or has diverged."""


class UnexpectedError(DiffAgentError):
    """Any exception that is not one of these (``diffagent.failures.as_error``)."""
