"""moto's S3 over a real socket, with the faults of a store on the network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

#: Credentials of the tests' clients; the server accepts any.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "an-access-key-id",
    "AWS_SECRET_ACCESS_KEY": "a-secret-never-to-be-written",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "3",
    "AWS_EC2_METADATA_DISABLED": "true",
}

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass
class S3Server:
    """A running server that records its ``requests``; ``fault`` may answer in its place.

    ``fault(method, path)`` returns None, 'error' (500), 'cut' (half of the body), or 'hold' (no
    answer before ``release`` is set; ``held`` is set while a client waits).
    """

    url: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    fault: Callable[[str, str], str | None] = lambda method, path: None
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def wrap(self, application: Application) -> Application:
        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            method = environ["REQUEST_METHOD"]
            path = environ["PATH_INFO"] + "?" * bool(environ["QUERY_STRING"])
            path += environ["QUERY_STRING"]
            self.requests.append((method, path))
            fault = self.fault(method, path)
            if fault == "hold":
                self.held.set()
                self.release.wait(60)
            if fault in ("error", "hold"):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("500 Internal Server Error", [("Content-Length", "0")])
                return [b""]
            body = application(environ, start_response)
            if fault == "cut":
                data = b"".join(body)
                return [data[: len(data) // 2]]
            return body

        return answer

    def asked(self, method: str, part: str = "") -> list[str]:
        """Paths of the requests of a method."""
        return [path for m, path in self.requests if m == method and part in path]

    def objects(self) -> dict[str, bytes]:
        """Everything in the bucket."""
        import fsspec

        files = fsspec.filesystem("s3", use_listings_cache=False)
        return {name: files.cat_file(name) for name in files.find("bucket")}


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Serve an empty bucket of the name 'bucket'; the environment has to name its ``url``."""
    pytest.importorskip("s3fs", reason="needs the extra s3: pip install 'diffagent[s3]'")
    pytest.importorskip("moto.server", reason="needs moto, of the extra dev")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *args: Any) -> None:
            pass

    server = S3Server()
    application = DomainDispatcherApplication(create_backend_app)
    http = make_server(
        "127.0.0.1", 0, server.wrap(application), threaded=True, request_handler=Quiet
    )
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        server.release.set()
        http.shutdown()
        thread.join(10)
