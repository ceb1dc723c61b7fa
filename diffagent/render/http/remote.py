"""HTTP to a server that draws: patient, within a budget, silent about its credentials.

What may pass (no connection, a cut transfer, 429 and 502 to 504) is tried again until the budget is
spent, and ends the run then: it is nothing about the picture. What the program behind the address
says of one picture (500) is tried three times. Redirects are not followed: credentials go to the
address that was given and nowhere else.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase

from diffagent.civitai.address import is_loopback, origin_of
from diffagent.errors import ConfigError, DiffAgentError, RenderError, RenderServerError
from diffagent.retries import Patience, Retries

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffagent.render.renderer import ModelRef

log = logging.getLogger(__name__)
T = TypeVar("T")

AUTH_VARIABLE = "DIFFAGENT_RENDER_AUTH"
#: A picture of 4096 x 4096 pixels, in base64, fits.
MAX_BODY = 256 << 20

_BUSY = frozenset({408, 429, 502, 503, 504})
_FAULTS = frozenset({"server-error", "bad-picture"})  # may be another the next time
_TRIES = 3
_FOREIGN = re.compile(r"<\w+:[^>]+>|\bembedding:", re.I)

#: One picture's time comes on top of the budget.
PATIENCE = Patience(first=1.0, longest=30.0, budget=600.0)
LOOPBACK_PATIENCE = Patience(first=0.05, longest=2.0, budget=120.0)


class _Credentials(AuthBase):
    """``user:password`` or ``Bearer TOKEN``. Being there at all keeps ~/.netrc out."""

    def __init__(self, secret: str) -> None:
        scheme, _, token = secret.partition(" ")
        if secret and scheme != "Bearer":
            scheme, token = "Basic", base64.b64encode(secret.encode()).decode()
        self._header = f"{scheme} {token}" if secret else ""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._header:
            request.headers["Authorization"] = self._header
        return request


class Remote:
    """A session with one server.

    Args:
        url: its address, with a path where a proxy puts it behind one.
        patience: how long and how often a call is tried; by default less to a loopback address.
        seconds_per_picture: that the server may take, with that default.
        secret: ``user:password`` or ``Bearer TOKEN``; None takes it from the environment.

    Raises:
        ConfigError: no http(s) address, or one with credentials in it.
    """

    def __init__(
        self,
        url: str,
        *,
        patience: Patience | None = None,
        seconds_per_picture: float = 900.0,
        secret: str | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"the rendering server's address {url!r} is no http(s) address")
        if parts.username or parts.password:
            raise ConfigError(
                f"the rendering server's address names credentials, which would be written to "
                f"files; put USER:PASSWORD into the environment variable {AUTH_VARIABLE}"
            )
        self.url = f"{origin_of(url)}{parts.path.rstrip('/')}"
        usual = LOOPBACK_PATIENCE if is_loopback(url) else PATIENCE
        self.patience = patience or replace(
            usual, read_timeout=seconds_per_picture, budget=usual.budget + seconds_per_picture
        )
        self.requests = 0
        self._retries = Retries(self.patience)
        self._session = requests.Session()
        self._session.trust_env = not is_loopback(url)  # else a proxy may get the credentials
        self._session.auth = _Credentials(
            os.environ.get(AUTH_VARIABLE, "") if secret is None else secret
        )

    def close(self) -> None:
        """Close the connection; a call that waits gives up."""
        self._retries.stop()
        self._session.close()

    def get(self, path: str, **params: Any) -> Any:
        """JSON of a GET, tried until the budget is spent."""
        return self.patiently(lambda: parse(self.send("GET", path, params=params), path))

    def get_if_there(self, path: str, **params: Any) -> Any:
        """As `get`; None where the server has no such path."""
        try:
            return self.get(path, **params)
        except RenderError as error:
            if error.reason != "no-endpoint":
                raise
            return None

    def send(
        self, method: str, path: str, *, params: Mapping[str, Any] | None = None, body: Any = None
    ) -> bytes:
        """The body of the answer, tried once.

        Raises:
            RenderServerError: it may work later.
            RenderError: 'server-error', 'out-of-memory', 'nan', 'server-refused', 'no-endpoint'.
            ConfigError: credentials are needed, or the address is another's.
        """
        self.requests += 1
        try:
            with self._session.request(
                method,
                self.url + path,
                params=params,
                json=body,
                timeout=(self.patience.connect_timeout, self.patience.read_timeout),
                stream=True,
                allow_redirects=False,
            ) as response:
                data = _body(response)
        except requests.RequestException as error:
            raise RenderServerError(f"{self.url}{path}: {type(error).__name__}") from None
        if response.status_code != 200:
            raise self._failure(path, response, data)
        return data

    def patiently(self, call: Callable[[], T], abandon: Callable[[], None] = lambda: None) -> T:
        """Call until it succeeds, fails for good, or the budget is spent.

        Args:
            call: raises RenderServerError for what may pass.
            abandon: what to do before each new try: the server may still be at the last one.
        """
        deadline = time.monotonic() + self.patience.budget
        faults = 0

        def can_retry(error: DiffAgentError) -> bool:
            nonlocal faults
            if not isinstance(error, RenderError):
                return False
            if not isinstance(error, RenderServerError):
                faults += 1
                if error.reason not in _FAULTS or faults == _TRIES:
                    return False
            abandon()
            return True

        return self._retries.run(
            call,
            seconds_left=lambda: deadline - time.monotonic(),
            can_retry=can_retry,
            give_up=lambda failure: RenderServerError(
                f"gave up after {failure.failures} tries in {self.patience.budget:.0f} s: "
                f"{failure.error}; run it again when the server is well, and it goes on from here"
            ),
            on_failure=lambda failure: log.debug(
                "try %d failed (%s); again in %.2f s",
                *(failure.failures, failure.error, failure.pause),
            ),
        )

    def _failure(self, path: str, response: requests.Response, data: bytes) -> Exception:
        status = response.status_code
        said = _said(data)
        message = f"{self.url}{path}: {status} {said}"
        if status in _BUSY:
            after = response.headers.get("Retry-After", "")
            return RenderServerError(message, retry_after=float(after) if after.isdigit() else None)
        if status >= 500:
            return RenderError(message, reason=_fault(said))
        if status in (401, 403):
            return ConfigError(
                f"{self.url}{path}: {status}; put USER:PASSWORD, or Bearer and a token, into the "
                f"environment variable {AUTH_VARIABLE}"
            )
        if 300 <= status < 400:
            return ConfigError(
                f"{self.url}{path} leads elsewhere ({status}), which is not followed; give the "
                "server's own address"
            )
        if status in (404, 405):
            return RenderError(
                f"{message}; is it the right server, started with its API?", reason="no-endpoint"
            )
        return RenderError(message, reason="server-refused")


def _body(response: requests.Response) -> bytes:
    data = bytearray()
    for block in response.iter_content(1 << 20):
        data += block
        if len(data) > MAX_BODY:
            raise requests.RequestException(f"more than {MAX_BODY} bytes")
    return bytes(data)


def _said(data: bytes) -> str:
    """What an error body says, shortly: A1111's and ComfyUI's are JSON, a proxy's is HTML."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return repr(data[:100].decode("utf-8", "replace"))
    if not isinstance(body, dict):
        return repr(str(body)[:200])
    parts = [body.get(name) for name in ("error", "errors", "detail", "message")]
    errors = body.get("node_errors")
    if isinstance(errors, dict):
        parts += [node.get("errors") for node in errors.values() if isinstance(node, dict)]
    return repr("; ".join(str(part) for part in parts if part)[:500])


def _fault(said: str) -> str:
    """The reason in what a program says of its failure."""
    if re.search(r"out of memory|OutOfMemory", said, re.I):
        return "out-of-memory"
    return "nan" if re.search(r"\bNaN", said) else "server-error"


def failure(path: str, said: str) -> RenderError:
    """The error of a picture that the server could not draw."""
    return RenderError(f"{path}: {said[:500]}", reason=_fault(said))


def parse(data: bytes, where: str) -> Any:
    """JSON of an answer.

    Raises:
        RenderServerError: it is none, or was cut.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RenderServerError(f"{where}: {len(data)} bytes that are no JSON ({error})") from None


def decode_picture(data: bytes, width: int, height: int) -> tuple[Image, dict[str, str]]:
    """The RGB picture in ``data``, whole and of the size that was asked for, and its texts.

    Raises:
        RenderError: 'bad-picture' where trying again may help, 'wrong-answer' for another size,
            'black'.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != (width, height):  # before anything is unpacked
                raise RenderError(
                    f"the server drew {image.width}x{image.height} instead of {width}x{height}",
                    reason="wrong-answer",
                )
            picture = image.convert("RGB")
            texts = {name: str(text) for name, text in image.text.items()}  # type: ignore[attr-defined]
    except (OSError, SyntaxError, ValueError) as error:  # Pillow has all three for damaged files
        raise RenderError(f"the server's PNG is damaged: {error}", reason="bad-picture") from None
    if not picture.getbbox():
        raise RenderError("the picture is black all over", reason="black")
    return picture, texts


def refuse_foreign(text: str, allowed: Iterable[str] = ()) -> None:
    """Refuse a prompt that would load networks that its recipe does not name.

    Raises:
        RenderError: reason 'prompt-network'.
    """
    found = _FOREIGN.search(text)
    if found:
        raise RenderError(
            f"the prompt holds {found.group()!r}, which the server takes for an order to load a "
            "network; name networks in the API call, or take it out",
            reason="prompt-network",
        )


def stem(name: object) -> str:
    """A file's name without folders (of either system) and ending, folded for comparison."""
    path = PurePosixPath(str(name).replace("\\", "/"))
    return (path.stem if path.suffix.lower() in _ENDINGS else path.name).casefold()


_ENDINGS = (".safetensors", ".ckpt", ".pt", ".sft", ".bin", ".gguf")


def stems(ref: ModelRef, names: Mapping[str, str]) -> set[str]:
    """The stems under which a server may list a model.

    Args:
        ref: the model.
        names: SHA256 -> the server's name, where a person has said so; then nothing else counts.
    """
    if ref.sha256 in names:
        return {stem(names[ref.sha256])}
    return {stem(name) for name in (ref.file_name, ref.path.name if ref.path else "") if name}


def metadata_of(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says about it."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return file.metadata() or {}
