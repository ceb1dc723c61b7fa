"""Every Python snippet of the documentation of agents and rewards runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffagent import compat
from tests.conftest import AgentRun

compat.install()
ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("docs/agent*.md"), ROOT / "docs" / "rewards.md"])
SNIPPETS = [
    pytest.param(code, id=f"{doc.stem}-{number}")
    for doc in DOCS
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", doc.read_text(), re.DOTALL))
]


def test_there_are_snippets() -> None:
    assert len(DOCS) == 4
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs(
    code: str,
    agent_run: AgentRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    exec(code.replace('"DIR"', repr(str(agent_run.agent.path))), {})
    assert capsys.readouterr().out.strip()
