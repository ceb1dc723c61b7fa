"""``python -m diffagent.store.child_main RUN.json``: one stage in a child process.

``diffagent.store.child.run_in_child`` writes RUN.json: entry, config, inputs (handles), runtime,
site_url, the file to write the handle of the finished artifact to (or the error), and the id of the
process to end with (optional).
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from pathlib import Path

from diffagent.device import keep_freed_memory
from diffagent.errors import DiffAgentError
from diffagent.failures import explained, pack
from diffagent.parent_process import end_with
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store.artifact import Artifact
from diffagent.store.child import EXPECTED_FAILURE, PROGRESS_MARK
from diffagent.store.stage import Stage

log = logging.getLogger("diffagent.store.child_main")
_PROGRESS_SECONDS = 0.5


def main(request: str) -> int:
    """Run the stage that the JSON file ``request`` describes, and return the exit code."""
    run = json.loads(Path(request).read_text(encoding="utf-8"))
    if run.get("parent"):
        end_with(run["parent"])
    module, _, attribute = run["entry"].partition(":")
    answer = Path(run["answer"])
    try:
        with explained(f"stage {attribute!r}"):
            stage: Stage = getattr(importlib.import_module(module), attribute)  # type: ignore[type-arg]
            artifact = stage.run(
                stage.config_type.model_validate(run["config"]),
                {
                    name: [Artifact.model_validate(handle) for handle in handles]
                    for name, handles in run["inputs"].items()
                },
                RuntimeConfig.model_validate(run["runtime"]),
                site_url=run["site_url"],
                progress=_ProgressLines(),
            )
    except DiffAgentError as error:
        log.info("the traceback of this error", exc_info=True)
        answer.write_text(json.dumps(pack(error)), encoding="utf-8")
        return EXPECTED_FAILURE
    answer.write_text(artifact.model_dump_json(), encoding="utf-8")
    return 0


class _ProgressLines:
    """Callback that prints progress for the parent, as often as a person can follow."""

    def __init__(self) -> None:
        self._last = -_PROGRESS_SECONDS

    def __call__(self, fraction: float | None, text: str) -> None:
        if time.monotonic() - self._last >= _PROGRESS_SECONDS or fraction == 1:
            self._last = time.monotonic()
            sys.stdout.write(f"{PROGRESS_MARK}{json.dumps([fraction, text])}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    # The messages of other packages at this level would bury those of the stage.
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("diffagent").setLevel(logging.INFO)
    keep_freed_memory()
    sys.exit(main(sys.argv[1]))
