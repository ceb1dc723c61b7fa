"""Python snippets of README and docs run as they stand; commands of diffagent parse."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path
from typing import Any

import pytest
import typer

from diffagent import compat
from diffagent.cli.main import app
from diffagent.run_config import RunConfig
from tests.conftest import ROOT, AgentRun

compat.install()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]


def _blocks(language: str) -> Iterator[tuple[Path, int, str]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)):
            yield page, number, code


def _commands() -> Iterator[tuple[Path, list[str]]]:
    """Yields each ``diffagent ...`` command of a shell block as words, without redirections."""
    for page, _, code in [*_blocks("sh"), *_blocks("bash")]:
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for part in _split(words, {"|", "&&", ";"}):
                program, *rest = [*dropwhile(re.compile(r"[A-Z_]+=").match, part), ""]
                if program.rpartition("/")[2] == "diffagent":
                    yield page, list(_without_redirections(rest[:-1]))


def _split(words: list[str], separators: set[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word in separators:
            yield part
            part = []
        else:
            part.append(word)
    yield part


def _without_redirections(words: list[str]) -> Iterator[str]:
    rest = iter(words)
    for word in rest:
        if word in ("<", ">", ">>", "2>"):
            next(rest, None)
        elif word != "&":
            yield word


def _is_setting(key: str) -> bool:
    """Whether a dotted key names a setting of a run."""
    model: Any = RunConfig
    for name in key.split("."):
        if name not in getattr(model, "model_fields", {}):
            return False
        model = model.model_fields[name].annotation
    return True


COMMANDS = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}") for page, words in _commands()
]
#: Pages whose snippets need nothing but an agent's directory; others name files of the reader.
COMPLETE = ("decoding", "rewards")
SNIPPETS = [
    pytest.param(page.stem, code, id=f"{page.stem}-{number}")
    for page, number, code in _blocks("python")
]


def test_there_are_snippets_and_commands() -> None:
    assert len(SNIPPETS) >= 4
    assert len(COMMANDS) >= 40


@pytest.mark.parametrize(("page", "code"), SNIPPETS)
def test_a_python_snippet_parses_and_its_imports_exist(page: str, code: str) -> None:
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            exec(ast.unparse(statement), {})


@pytest.mark.parametrize(("page", "code"), [s for s in SNIPPETS if s.values[0] in COMPLETE])
def test_a_complete_python_snippet_runs(
    page: str,
    code: str,
    agent_run: AgentRun,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    exec(code.replace('"DIR"', repr(str(agent_run.agent.path))), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_parses(words: list[str]) -> None:
    """The command exists, and takes the options and the number of arguments given."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while children := getattr(command, "commands", None):
        if not rest or rest[0].startswith("-"):
            break
        assert rest[0] in children, f"no command {rest[0]!r}; there are {', '.join(children)}"
        command = children[rest.pop(0)]
    options = {name: p for p in command.params for name in getattr(p, "opts", [])}
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    passed_on = (command.context_settings or {}).get("ignore_unknown_options")
    positional = 0
    while rest:
        word, _, value = rest.pop(0).partition("=")
        if not word.startswith("-") or word == "-":
            positional += 1
        elif word not in ("-h", "--help", "--install-completion", "--show-completion"):
            assert word in options or passed_on, f"no option {word}; there are {', '.join(options)}"
            option = options.get(word)
            if option and not (value or option.is_flag or getattr(option, "count", False)):
                assert rest, f"{word} needs a value"
                value = rest.pop(0)
            if word == "--set":
                assert _is_setting(value.partition("=")[0]), f"no setting {value!r}"
    unlimited = any(argument.nargs == -1 for argument in arguments)
    assert unlimited or passed_on or positional <= len(arguments)
