"""Files of a hub that does not answer, or lacks them: one clear error, at once."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

CODE = """
import sys
from diffagent.rewards.score_config import RewardsConfig
from diffagent.errors import DiffAgentError
from diffagent.rewards.load import load_scorers
scorer = dict(zip(("name", "model", "weights"), sys.argv[1:]))
try:
    load_scorers(RewardsConfig(scorers=[scorer], unify="chatgen"))
except DiffAgentError as error:
    print(type(error).__name__, error)
"""
RELEASES = [
    ("clip", "ViT-L-14-quickgelu", "openai"),
    ("image_reward", "v1.0", "THUDM/ImageReward"),
    ("hps_v2", "v2", "xswu/HPSv2"),
]


class Hub(http.server.BaseHTTPRequestHandler):
    """Has no file; records requests."""

    requested: list[str]

    def do_HEAD(self) -> None:
        self.requested.append(self.path)
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815  http.server's name

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Hub,), {"requested": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler.requested
        server.shutdown()


def load(release: tuple[str, str, str], endpoint: str, home: Path) -> tuple[str, str]:
    """Output (stdout, stderr) of loading one released scorer."""
    import os

    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", CODE, *release],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release[0])
def test_a_hub_that_does_not_answer_is_requested_once(
    release: tuple[str, str, str], tmp_path: Path
) -> None:
    answer, log = load(release, "http://127.0.0.1:9", tmp_path)
    assert answer.startswith("ConfigError cannot download")
    assert "does not fit" not in answer
    assert "Connection refused" in answer
    assert "--no-score" in answer and "`weights`" in answer
    assert "Retry" not in log


def test_a_hub_without_the_file_names_it(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, requested = hub
    answer, _ = load(RELEASES[0], endpoint, tmp_path)
    assert "open_clip_model.safetensors or open_clip_pytorch_model.bin" in answer
    assert "it has no such file" in answer
    assert [path.rpartition("/")[2] for path in requested] == [
        *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ]
