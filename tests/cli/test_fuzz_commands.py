"""Hostile configurations, arguments and artefacts: exit code 0, 1 or 2, and one line, always.

Seeds are fixed, so a failure repeats. Commands run in this process through ``cli.main``, which is
all that the console command calls.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from diffagent.cli import main
from tests.agent.agent_world import make_world
from tests.conftest import reseal

Run = Callable[..., tuple[int, str]]

#: Texts given as paths, names and numbers.
HOSTILE = (
    *("", ".", "/", "-", "--", "-1", "9" * 30, "{}", "[", "a\nb", "a\x00b", "\x1b[31mred"),
    *("\udc80x", "x" * 5000, "~nobody/x", "/dev/null", "/proc/self/mem", "s3://", "://"),
    *("file:///nonexistent/a/b", "file:///", "a=b", "latest", "rm -rf $(id)", "\u202ecod\u0000"),
)
_SPARED = {"civitai", "fetch", "import"}  # they serve, ask a site, or walk whole disks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DABench of a few rows, in a store."""
    return make_world(Path(tmp_path_factory.mktemp("world")), train=24, test=6, validation=6).path


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Run]:
    """Run a command in an empty directory, hold it to the rule, and return code and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFAGENT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a red circle\n")

    def run_command(*arguments: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["diffagent", *map(str, arguments)])
        code: Any = 0
        try:
            main.main()
        except SystemExit as stopped:
            code = stopped.code or 0
        text = capsys.readouterr().err
        described = f"{[f'{a!r:.60}' for a in map(str, arguments)]}: {code}: {text[-900:]}"
        assert code in {0, 1, 2}, described
        assert "Traceback" not in text and "\x1b" not in text and "\x00" not in text, described
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if code == 1 and arguments[0] != "models" and arguments[:2] != ("dabench", "verify"):
            assert len(errors) == 1, described
            what = errors[0].removeprefix("error: ")  # and what to do
            remedy = any(mark in what for mark in ("; ", ": ", ", ")) or arguments[0] == "score"
            assert remedy and len(what) < 1500, described
            assert not re.search(r": unexpected [A-Z]", what), described
        return code, text

    yield run_command
    logging.disable(logging.NOTSET)


def commands(node: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands with their parameters."""
    node = node or typer.main.get_command(main.app)
    for name, child in getattr(node, "commands", {}).items():
        if name not in _SPARED:
            yield from commands(child, (*path, name))
    if not hasattr(node, "commands"):
        yield path, node


@pytest.mark.parametrize("path, command", commands(), ids=lambda value: str(value)[:40])
def test_hostile_arguments(path: tuple[str, ...], command: Any, run: Run, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "crawl: {site: 'dump:/nonexistent'}\n"
        "rewards: {scorers: [{name: clip, model: tiny-clip}], unify: chatgen}\n"
        f"runtime: {{store: '{tmp_path / 'store'}', site: {{budget_seconds: 1}}}}\n"
    )
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [
        max(p.opts, key=len)
        for p in command.params
        if p.param_type_name == "option" and not getattr(p, "is_flag", False)
    ]
    options = [name for name in options if name not in {"--verbose", "--help"}]
    given = ["-c", config] if "--config" in options else []
    if path == ("run",):
        given += ["--until", "crawl"]
    for hostile in HOSTILE if arguments else ():
        if path != ("models", "scan") or hostile not in ("/", "file:///"):  # not the whole disk
            run(*path, *[hostile] * len(arguments))
    rng = random.Random(" ".join(path))
    for name in options:
        for hostile in rng.sample(HOSTILE, 4):
            run(*path, *["prompts.txt"] * len(arguments), *given, name, hostile)


SECTIONS = ("crawl", "filters", "dabench", "sft", "sampling", "render", "rewards", "rrhf")
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1e308, float("nan"), float("inf"), "", "x" * 10_000, "a\nb"),
    *("\x1b[2J", [], [[]], {}, {"a": {"b": [None]}}, [None, {"name": None}], "../../etc/passwd"),
)


@pytest.mark.parametrize("seed", range(8))
def test_hostile_configurations(seed: int, run: Run, tmp_path: Path) -> None:
    rng = random.Random(seed)
    text = (Path(__file__).parents[2] / "configs" / "sandbox.yaml").read_text()
    store = f"\nruntime: {{store: '{tmp_path / 'store'}'}}\n"
    path = tmp_path / "run.yaml"
    for _ in range(6):
        data = bytearray((text + store).encode())
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data + b"\ncrawl: {site: 'dump:/nonexistent'}")  # given twice at least
        assert run("run", "--only", "crawl", "-c", path)[0] == 1
    for _ in range(12):
        section, value = rng.choice(SECTIONS), rng.choice(VALUES)
        whole = {
            "crawl": {"site": "dump:/nonexistent"},
            "rewards": {"scorers": [{"name": "clip", "model": "tiny-clip"}], "unify": "chatgen"},
            "runtime": {"store": str(tmp_path / "store")},
        }
        if rng.random() < 0.5:
            whole[section] = value
        else:
            key = rng.choice(["site", "seed", "model", "scorers", "base_models", "x\x1by", ""])
            whole[section] = {**whole.get(section, {}), key: value}
        path.write_text(json.dumps(whole))
        run("run", "--only", "crawl", "-c", path, "--set", "crawl.site=dump:/nonexistent")
        setting = f"{section}.{rng.choice(['seed', 'site', ''])}={json.dumps(value)}"
        run(
            "run",
            "--only",
            "crawl",
            "-c",
            path,
            "--set",
            setting,
            "--set",
            "crawl.site=dump:/nonexistent",
        )


def damage(directory: Path, rng: random.Random) -> None:
    """Damage one file of an artefact in one of many ways."""
    path = rng.choice([p for p in sorted(directory.rglob("*")) if p.is_file()])
    data = bytearray(path.read_bytes())
    kind = rng.randrange(8)
    if kind < 3:
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data if kind else data[: rng.randrange(len(data))])
    elif kind == 3:
        path.write_bytes(rng.randbytes(rng.randrange(2000)))
    elif kind == 4:
        nested, number = b"[" * 100_000, b"9" * 10_000
        texts = (nested, number, b'{"a":1e999}', b"null", b"[]", b"{}", b"\xff\xfe", b"")
        path.write_bytes(rng.choice(texts))
    elif kind == 5 and path.suffix == ".json" and isinstance(value := json.loads(data), dict):
        names = sorted(value)
        value[rng.choice(names)] = rng.choice([*VALUES, "\ud800"])
        path.write_text(json.dumps(value))
    else:
        path.unlink()
        if kind == 6:
            path.mkdir()
        elif kind == 7:
            path.symlink_to(path.name)


@pytest.mark.parametrize("seed", range(12))
def test_hostile_artefacts(seed: int, run: Run, world: Path, tmp_path: Path) -> None:
    rng = random.Random(seed)
    for number in range(5):
        directory = tmp_path / f"d{number}"
        shutil.copytree(world, directory)
        damage(directory, rng)
        if rng.random() < 0.6:  # a stranger's manifest fits its files
            reseal_if_possible(directory)
        fitted = ("--selector", rng.choice(["bm25", "neighbours"]), "--store", tmp_path / "s")
        for arguments in (
            ("artifact", "show", directory),
            ("artifact", "verify", directory),
            ("dabench", "inspect", directory),
            ("dabench", "verify", directory),
            ("dabench", "diff", world, directory),
            ("dabench", "export", directory, tmp_path / "out", "--force"),
            ("select", "a red circle", "--dabench", directory, *fitted),
            ("select", "a red circle", "--agent", directory),
            ("artifact", "list", tmp_path),
        ):
            run(*arguments)


def reseal_if_possible(directory: Path) -> None:
    """Let the manifest list the files as they are, unless it is damaged itself."""
    from diffagent.store import Artifact

    artifact = Artifact(stage="", identity="", content_digest="", path=directory)
    try:
        reseal(artifact)
    except Exception:  # a damaged manifest, or a file that is gone: also a case to run
        return
