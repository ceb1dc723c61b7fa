"""Progress on a terminal, and none in a pipe: a real command on a real pseudo-terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

_SCRIPT = """
import sys, time, logging
from diffagent import pipeline
from diffagent.cli import main
from diffagent.store import StageResult
from diffagent.store import stage
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.cli import main as cli
import contextlib

@stage("crawl", version=1, config=CrawlConfig)
def crawl(config, context):
    context.progress(0.25, "3 of 12 pages")
    logging.getLogger("diffagent.toy").info("reading the models")
    logging.getLogger("diffagent.toy").warning("a model has no name")
    logging.getLogger("diffagent.civitai.recall").info("nothing was missed")
    (context.out / "page").write_text("x")
    return StageResult()

pipeline.load_stage = lambda node: crawl
main.main()
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    rewards = {"scorers": [{"name": "clip", "model": "tiny"}], "unify": "chatgen"}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"rewards": rewards, "runtime": {"store": str(tmp_path)}}))
    (tmp_path / "script.py").write_text(_SCRIPT)
    return [
        sys.executable,
        str(tmp_path / "script.py"),
        "run",
        "--only",
        "crawl",
        "-c",
        str(config),
    ]


def on_terminal(command: list[str]) -> tuple[str, str]:
    """Standard output (a pipe), and what a terminal on standard error gets."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0, shown
    return out.decode(), shown.decode()


def test_a_terminal_shows_stage_time_and_how_far_it_is(command: list[str]) -> None:
    out, shown = on_terminal(command)
    assert out.startswith("crawl            built ") and "\x1b" not in out
    drawn = [line for line in shown.split("\r\x1b[2K") if line]
    assert drawn[0] == "crawl  0:00  "
    assert "crawl  0:00  25%  3 of 12 pages" in drawn
    assert any("reading the models" in line for line in drawn)
    assert "\r\x1b[2KWARNING diffagent.toy: a model has no name" in shown, "above the line"
    assert shown.endswith("\r\x1b[2K"), "nothing of it stays"
    assert "\r\x1b[2KINFO diffagent.civitai.recall: nothing was missed" in shown
    assert "INFO diffagent.pipeline" not in shown and "INFO diffagent.toy" not in shown


def test_a_pipe_stays_clean_and_quiet_is_quiet(command: list[str]) -> None:
    piped = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stdout + piped.stderr and "\r" not in piped.stderr
    assert "crawl: running" in piped.stderr and "3 of 12" not in piped.stderr
    quiet = subprocess.run(
        [*command, "--set", "crawl.max_models=3", "-q"], capture_output=True, text=True, check=True
    )
    assert quiet.stderr == "" and "built" in quiet.stdout
    _, shown = on_terminal([*command, "--set", "crawl.max_models=4", "-q"])
    assert shown == ""
