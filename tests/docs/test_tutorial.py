"""Every command of the tutorial after the installation works, in its order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_the_tutorial_ends_in_a_contact_sheet(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial" / "first-picture.md").read_text(encoding="utf-8")
    _, _, after_installation = text.partition("## 2.")
    blocks = re.findall(r"```sh\n(.*?)```", after_installation, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) >= 5
    for name in ("configs", "diffagent"):  # named by relative paths
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, f"{command}\n{run.stderr}"
    assert len((tmp_path / "calls.jsonl").read_text().splitlines()) == 3
    assert "a red star at night" in (tmp_path / "pictures" / "index.html").read_text()
