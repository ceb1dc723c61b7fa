"""A synthetic site: made-up models and pictures in the API's shapes, served over a real socket."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from diffagent.localcivitai.faults import Faults, Profile
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.server import serve
from diffagent.localcivitai.site import read_source
from diffagent.localcivitai.sources.dump import write_dump

MODELS = 230
IMAGES = 620
BIG_VERSION = 1_000 + MODELS  # the version whose gallery has more than one page
MODEL_FILE = bytes(range(256)) * 1200
FILE_SHA256 = hashlib.sha256(MODEL_FILE).hexdigest()

Site = Callable[..., AbstractContextManager[str]]


def synthetic_model(number: int) -> dict[str, Any]:
    """Model ``number`` (1, 2, ...) with version 1000 + number; quirks by number."""
    version_id = 1000 + number
    digest = FILE_SHA256 if number == 1 else hashlib.sha256(str(number).encode()).hexdigest()
    link = f"https://civitai.com/api/download/models/{version_id}"
    preview = {"url": None, "nsfwLevel": 1, "type": "image", "meta": {"prompt": "synthetic"}}
    version: dict[str, Any] = {
        "id": version_id,
        "name": "v1",
        "baseModel": "SDXL 1.0" if number % 3 == 0 else "SD 1.5",
        "publishedAt": f"2024-01-01T00:{number % 60:02d}:00.000Z",
        "trainedWords": [],
        "stats": {"downloadCount": number},
        "files": [
            {
                "id": 5000 + number,
                "name": f"synthetic_{number}.safetensors",
                "type": "Model",
                "sizeKB": len(MODEL_FILE) / 1024,
                "metadata": {"format": "SafeTensor"},
                "pickleScanResult": "Success",
                "virusScanResult": "Success",
                "hashes": {"SHA256": digest.upper(), "AutoV2": digest[:10].upper()},
                "downloadUrl": link,
                "primary": True,
            }
        ],
        "images": [{**preview, "id": 900_000 + number * 100 + i} for i in range(25)],
        "downloadUrl": link,
        "clipSkip": 2,
        "settings": {"strength": 0.8},
    }
    if number == 5:
        version["availability"], version["earlyAccessEndsAt"] = "EarlyAccess", "2030-01-01"
    if number == 6:
        version["usageControl"] = "Generation"
    if number == 8:  # the same file as number 9, published later
        version["files"][0]["hashes"]["AutoV1"] = "ABCDEF12"
        version["publishedAt"] = "2024-06-01T00:00:00.000Z"
    if number == 9:
        version["files"][0]["hashes"]["AutoV1"] = "abcdef12"
    model: dict[str, Any] = {
        "id": number,
        "name": f"Synthetic <Model> {number}",
        "description": f"<p>Made up, number {number}.</p>",
        "type": "LORA" if number % 4 == 0 else "Checkpoint",
        "nsfw": number % 20 == 0,
        "nsfwLevel": 31 if number % 20 == 0 else 3,
        "allowCommercialUse": ("Sell", ["Image", "Rent"], "{Image,Rent}")[number % 3],
        "stats": {"downloadCount": 1000 - number, "thumbsUpCount": number % 7, "commentCount": 1},
        "creator": {"username": f"maker{number % 3}"},
        "tags": ["synthetic", "even" if number % 2 == 0 else "odd"],
        "checkpointType": "Trained",
        "modelVersions": [version],
        "_note": "an annotation",
    }
    if number == 7:
        model["mode"] = "Archived"
    return model


def synthetic_image(number: int) -> dict[str, Any]:
    """Image ``number``: two of three in the big gallery; every tenth above PG, some never shown."""
    version_id = BIG_VERSION if number % 3 else 1000 + number % MODELS + 1
    image: dict[str, Any] = {
        "id": 10_000 + number,
        "url": f"https://image.civitai.com/synthetic/{number}.jpeg",
        "width": 512,
        "height": 512,
        "nsfw": number % 10 == 0,
        "nsfwLevel": "Mature" if number % 10 == 0 else "None",
        "stats": {"likeCount": number % 50, "commentCount": number % 5},
        "meta": {"prompt": f"synthetic picture {number}", "seed": 2**53 + number, "steps": 20},
        "_context": {"modelVersionId": version_id, "modelId": version_id - 1000},
        "_resolved_checkpoint": None,
    }
    if number == 3:
        image["type"] = "video"
    if number == 4:
        image["meta"] = None
    if number == 6:
        image["minor"] = True
    if number == 7:
        image["meta"]["civitaiResources"] = [{"type": "lora", "modelVersionId": 1004}]
    return image


@pytest.fixture(scope="session")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic site as a dump directory, with one model file."""
    directory = tmp_path_factory.mktemp("dump")
    write_dump(
        directory,
        (synthetic_model(n) for n in range(1, MODELS + 1)),
        (synthetic_image(n) for n in range(IMAGES)),
    )
    (directory / "files").mkdir()
    (directory / "files" / FILE_SHA256).write_bytes(MODEL_FILE)
    return directory


@pytest.fixture(scope="session")
def replay(dump: Path) -> Replay:
    """The dump, indexed."""
    return read_source(f"dump:{dump}")


@pytest.fixture(scope="session")
def site(replay: Replay) -> Iterator[str]:
    """Address of the synthetic site without faults."""
    with serve(replay, Faults()) as url:
        yield url


@pytest.fixture
def faulty(replay: Replay) -> Site:
    """Serves the synthetic site with given faults: ``with faulty(too_many=0.5) as url``."""

    def start(faults: Faults | None = None, **rates: float) -> AbstractContextManager[str]:
        return serve(replay, faults or Faults(Profile(rates)))

    return start


class Recorder:
    """A server of one answer that remembers what it was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.headers = {"Content-Type": "application/json"}
        self.body = b"{}"
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.url = ""


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """A foreign host."""
    record = Recorder()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            record.asked.append((self.path, dict(self.headers)))
            self.send_response_only(record.status)
            for name, value in record.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(record.body)))
            self.end_headers()
            self.wfile.write(record.body)

        def log_message(self, *_: Any) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    record.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield record
    server.shutdown()
    server.server_close()
