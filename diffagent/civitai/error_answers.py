"""Errors that the site's answers mean, by their status and body."""

from __future__ import annotations

import email.utils
import math
import re
from collections.abc import Mapping

import orjson

from diffagent.errors import (
    BadCursor,
    CivitaiError,
    DownloadsDisabled,
    EarlyAccess,
    Forbidden,
    NotFound,
    PageCap,
    RateLimited,
    ServerError,
)

TOKEN_VARIABLE = "CIVITAI_TOKEN"
_MAX_TEXT = 200  # characters of the site's message in ours


def error_of(
    status: int,
    path: str,
    body: bytes,
    *,
    has_cursor: bool = False,
    reason: str = "",
    retry_after: float | None = None,
) -> CivitaiError:
    """Return the error that an answer means.

    Args:
        status: HTTP status.
        path: path of the request, for the message.
        body: beginning of the answer's body.
        has_cursor: whether the request had a cursor.
        reason: the status line's text, for a body without a message.
        retry_after: seconds that the site requests to wait.
    """
    text = _error_text(body) or reason
    message = f"{path}: {status} {text!r}"
    if status == 429 and "cursor" in text.lower():
        return PageCap(f"{message}; walk with cursors instead of pages")
    if status == 429:
        return RateLimited(message, retry_after=retry_after)
    if status >= 500 or status in (408, 499):
        return ServerError(message, retry_after=retry_after)
    if status == 400 and (has_cursor or "cursor" in text.lower()):
        return BadCursor(f"{message}; start the listing again")
    if status in (404, 410) or (status == 400 and _is_out_of_range(path)):
        return NotFound(message)
    if status in (401, 403) and re.search("early access|paid access", text, re.IGNORECASE):
        return EarlyAccess(f"{message}; a token in {TOKEN_VARIABLE} that has bought it opens it")
    if status in (401, 403) and "disabled downloads" in text.lower():
        return DownloadsDisabled(message)
    if status in (401, 403):
        return Forbidden(f"{message}; the item needs a token in {TOKEN_VARIABLE}, or is closed")
    return CivitaiError(f"{message}: not an answer that this client knows")


def _is_out_of_range(path: str) -> bool:
    """Whether a path names an id above the site's 32 bits, which it answers with 400, not 404."""
    ident = re.fullmatch(r"/api/v1/model(?:s|-versions)/([0-9]{1,30})", path)
    return ident is not None and int(ident[1]) >= 2**31


def _error_text(body: bytes) -> str:
    """Return the message of an error body in any of the site's forms; '' without one."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    error = value.get("error", value) if isinstance(value, dict) else None
    if isinstance(error, str):
        details = (value.get("message"), value.get("deadline"))
        parts = [error, *(text for text in details if isinstance(text, str))]
        return ": ".join(parts)[:_MAX_TEXT]
    issues = error.get("issues") if isinstance(error, dict) else None
    if isinstance(issues, list) and issues and isinstance(issues[0], dict):
        path, message = issues[0].get("path"), issues[0].get("message")
        names = path if isinstance(path, list) else ()
        field = ".".join(str(name) for name in names if isinstance(name, str | int))
        return f"{field}: {message if isinstance(message, str) else ''}"[:_MAX_TEXT]
    message = value.get("message") if isinstance(value, dict) else None
    if isinstance(message, str):
        return message[:_MAX_TEXT]
    return body[:_MAX_TEXT].decode("utf-8", "replace")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of Retry-After; a date in it is compared with the site's own clock."""
    text = headers.get("Retry-After", "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        now, then = (
            email.utils.parsedate_to_datetime(date).timestamp()
            for date in (headers.get("Date", ""), text)
        )
    except (ValueError, TypeError, OverflowError):  # also for years that no clock has
        return None
    return max(0.0, then - now)
