"""``python -m diffagent.run_stage RUN.json``: one stage in a process of its own.

RUN.json is what ``diffagent.artifacts.run_in_child`` writes: entry, config, inputs (handles),
runtime, site_url, the file that gets the handle of the finished artefact, and the process to
end with (absent by hand).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from diffagent.artifacts import EXPECTED_FAILURE, Artifact, Stage, open_artifact
from diffagent.device import keep_freed_memory
from diffagent.errors import DiffAgentError
from schemas.config import RuntimeConfig


def main(request: str) -> int:
    """Run the stage that the JSON file ``request`` describes; returns the exit code."""
    run = json.loads(Path(request).read_text(encoding="utf-8"))
    if run.get("parent"):
        threading.Thread(target=_end_with, args=(run["parent"],), daemon=True).start()
    module, _, attribute = run["entry"].partition(":")
    stage: Stage = getattr(importlib.import_module(module), attribute)  # type: ignore[type-arg]
    answer = Path(run["answer"])
    try:
        artifact = stage.run(
            stage.config_type.model_validate(run["config"]),
            {
                name: [_open(handle) for handle in handles]
                for name, handles in run["inputs"].items()
            },
            RuntimeConfig.model_validate(run["runtime"]),
            site_url=run["site_url"],
        )
    except DiffAgentError as error:
        said = {"error": type(error).__name__, "message": str(error), "retryable": error.retryable}
        answer.write_text(json.dumps(said), encoding="utf-8")
        return EXPECTED_FAILURE
    answer.write_text(artifact.model_dump_json(), encoding="utf-8")
    return 0


def _open(handle: dict[str, Any]) -> Artifact:
    """The input that a handle stands for; what is on this disk is checked by size."""
    artifact = Artifact.model_validate(handle)
    return artifact if artifact.remote else open_artifact(artifact.path)


def _end_with(parent: int) -> None:
    """End this process when the one that wants its answer is gone (killed, cancelled)."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    # What other packages tell would hide what the stage says.
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("diffagent").setLevel(logging.INFO)
    keep_freed_memory()
    sys.exit(main(sys.argv[1]))
