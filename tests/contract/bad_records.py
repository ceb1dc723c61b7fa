"""Records that no site should send and some do, and a site that sends them.

``POISONS`` are JSON texts (not values: half of them no JSON writer would write), ``places`` the
places of a record where one of them may stand.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.contract.conftest import FILE_SHA256, synthetic_image

_MARK = "the poison goes here"

POISONS: dict[str, str] = {
    "arrays 90 deep": "[" * 90 + "]" * 90,
    "arrays 250 deep": "[" * 250 + "]" * 250,
    "objects 255 deep": '{"a":' * 255 + "1" + "}" * 255,
    "arrays 1100 deep": "[" * 1_100 + "]" * 1_100,
    "mixed 5000 deep": '[{"a":' * 2_500 + "1" + "}]" * 2_500,
    "arrays 100000 deep": "[" * 100_000 + "]" * 100_000,
    "1e999": "1e999",
    "-1e999": "-1e999",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
    "2^63": str(2**63),
    "2^64": str(2**64),
    "-2^63 - 1": str(-(2**63) - 1),
    "5000 digits": "9" * 5_000,
    "negative": "-5",
    "float": "1.5",
    "true": "true",
    "null": "null",
    "text": '"x"',
    "digits": '"77"',
    "digits beyond 2^63": f'"{2**63}"',
    "superscript": '"\u00b2"',
    "lone surrogate": '"a\\ud800b"',
    "NUL and controls": '"a\\u0000b\\u001b[31m"',
    "bare control": '"a\x01b"',
    "long text": '"' + "x" * 200_000 + '"',
    "too long text": '"' + "x" * (9 << 20) + '"',
    "list": '[1, null, "x", {"id": 1}]',
    "null in a list": "[null]",
    "object": '{"id": {"id": []}, "x": 1e400}',
    "empty": "{}",
}


def places(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a record where a value stands."""
    items = record.items() if isinstance(record, dict) else enumerate(record)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def poisoned(record: dict[str, Any], place: tuple[Any, ...], poison: str) -> str:
    """The record as JSON, with the text ``poison`` at a place."""
    copy = json.loads(json.dumps(record))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = _MARK
    return json.dumps(copy).replace(f'"{_MARK}"', poison)


def full_image(number: int) -> dict[str, Any]:
    """A picture of version 1001 with all that its metadata may say."""
    digest = FILE_SHA256[:10]
    meta = {
        "prompt": f"a cat {number} on a mat",
        "negativePrompt": "bad",
        "sampler": "Euler a",
        "steps": 20,
        "cfgScale": 7,
        "seed": number,
        "Size": "512x512",
        "clipSkip": 2,
        "Model": "x",
        "Model hash": digest,
        "hashes": {"model": digest, "lora:y": "abcdef123456"},
        "resources": [
            {"type": "model", "name": "x", "hash": digest},
            {"type": "lora", "name": "y", "weight": 0.5, "hash": "abcdef123456"},
        ],
        "civitaiResources": [
            {"type": "checkpoint", "modelVersionId": 1001},
            {"type": "lora", "modelVersionId": 1004, "weight": 0.5},
        ],
    }
    return {
        **{key: value for key, value in synthetic_image(8).items() if key[0] != "_"},
        **{"id": 20_000 + number, "modelVersionIds": [1001], "nsfw": False, "browsingLevel": 1},
        **{"nsfwLevel": "None", "postId": 5, "meta": meta},
    }


@contextmanager
def site_of(models: list[str], images: list[str]) -> Iterator[str]:
    """A site whose listings are these JSON texts, two pages each and in one order only.

    A model is also given by its id when its text begins with that.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            kind = parts.path.rpartition("/")[2]
            items = {"models": models, "images": images}.get(kind)
            single = [text for text in models if text.startswith(f'{{"id": {kind},')]
            if items is not None:
                half = len(items) // 2
                second = "cursor" in parse_qs(parts.query)
                page = ",".join(items[half:] if second else items[:half])
                cursor = "" if second else '"nextCursor": "2"'
                body = f'{{"items": [{page}], "metadata": {{{cursor}}}}}'.encode()
            elif single and "/models/" in parts.path:
                body = single[0].encode()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
