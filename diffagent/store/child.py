"""Stages in a child process, which gives a real timeout and frees their memory afterwards.

``run_in_child`` starts ``python -m diffagent.store.child_main`` and passes on its log (warnings as
warnings) and its progress. An error crosses with all its attributes (``diffagent.failures.pack``).
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from pydantic import BaseModel

from diffagent.errors import ArtifactError
from diffagent.failures import unpack
from diffagent.schemas.printable import printable
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store.artifact import Artifact
from diffagent.store.digests import canonical_json
from diffagent.store.stage import Inputs, Progress

log = logging.getLogger(__name__)

#: Exit code of a child whose stage failed with an error, which is in its answer file.
EXPECTED_FAILURE = 3
#: Prefix of the lines of a child that report progress; a JSON array follows.
PROGRESS_MARK = "\x1ediffagent-progress "
_WARNING = re.compile(r"(WARNING|ERROR|CRITICAL) (diffagent[\w.]*: .*)", re.DOTALL)


def run_in_child(
    entry: str,
    config: BaseModel,
    inputs: Inputs,
    runtime: RuntimeConfig,
    *,
    site_url: str = "",
    progress: Progress = lambda fraction, text: None,
) -> Artifact:
    """Run the stage ``entry`` ('package.module:attribute') in a child process.

    Raises:
        DiffAgentError: the error that the stage raised.
        ArtifactError: the child was killed (its last line is in the message) or timed out.
    """
    name = entry.rpartition(":")[2]
    with tempfile.TemporaryDirectory(prefix="diffagent-") as folder:
        request, answer = Path(folder, "run.json"), Path(folder, "artifact.json")
        fields = {
            "entry": entry,
            "config": config.model_dump(mode="json"),
            "inputs": {
                name: [artifact.model_dump(mode="json") for artifact in artifacts]
                for name, artifacts in inputs.items()
            },
            "runtime": runtime.model_dump(mode="json"),
            "site_url": site_url,
            "answer": str(answer),
            "parent": os.getpid(),
        }
        request.write_bytes(canonical_json(fields))
        code, last_line = _run_logged(
            [sys.executable, "-m", "diffagent.store.child_main", str(request)],
            name=name,
            timeout=runtime.tasks.timeout_seconds,
            progress=progress,
        )
        if code == 0:
            return Artifact.model_validate_json(answer.read_bytes())
        if code == EXPECTED_FAILURE:
            raise unpack(json.loads(answer.read_bytes()))
    raise _crash(name, code, last_line)


def _crash(name: str, code: int, last_line: str) -> ArtifactError:
    """Return the error of a child that ended without an answer; a killed one is worth a retry."""
    signal_name = f" ({signal.Signals(-code).name})" if -code in list(signal.Signals) else ""
    remedy = (
        "it was killed from outside, or the machine ran out of memory; run the same command "
        "again: it goes on from what was written"
        if code < 0
        else "-v shows its whole log"
    )
    error = ArtifactError(f"{name} ended with code {code}{signal_name}: {last_line}; {remedy}")
    error.retryable = code < 0  # the next try resumes
    return error


def _run_logged(
    command: list[str], *, name: str, timeout: float, progress: Progress
) -> tuple[int, str]:
    """Run a command and pass its lines on as it prints them; return exit code and last line."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    expired = threading.Event()

    def stop() -> None:
        expired.set()
        process.kill()

    timer = threading.Timer(timeout, stop)
    timer.start()
    last = "it printed nothing"
    try:
        for line in process.stdout or ():
            if line.startswith(PROGRESS_MARK):
                fraction, text = json.loads(line.removeprefix(PROGRESS_MARK))
                progress(fraction, text)
            elif line.strip():
                last = f"{printable(line.strip()):.300}"
                _log_line(name, line.rstrip())
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    if expired.is_set():
        raise ArtifactError(
            f"{name} took longer than {timeout:.0f} s and was stopped; raise "
            "runtime.tasks.timeout_seconds, or run the same command again to resume"
        )
    return code, last


def _log_line(name: str, line: str) -> None:
    """Log a line of the child: warnings of the library as such, all other lines as information."""
    if warning := _WARNING.match(line):
        log.log(logging.getLevelNamesMapping()[warning[1]], "%s | %s", name, warning[2])
    else:
        log.info("%s | %s", name, line)
