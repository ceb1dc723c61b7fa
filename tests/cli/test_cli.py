"""The command line: what it imports, what it prints, how it fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import typer
import yaml
from typer.testing import CliRunner

from diffagent import pipeline
from diffagent.agent.selector import Choice, call_line
from diffagent.agent.verify import Verdict
from diffagent.cli import main
from diffagent.cli.options import parse_overrides
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.errors import ArtifactError, ConfigError, SchemaError
from diffagent.run_config import RunConfig
from diffagent.schemas.api import T2IAPI, Params
from diffagent.schemas.manifest import Funnel, FunnelStep
from diffagent.store import StageContext, StageResult, stage
from diffagent.t2i.catalogue import Catalogue

runner = CliRunner()
API = T2IAPI(
    model="A",
    version="v1",
    base_model="SD 1.5",
    params=Params(sampler="Euler a", steps=20, cfg_scale=7, width=64, height=64),
)


def invoke(*arguments: Any) -> str:
    result = runner.invoke(main.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@stage("crawl", version=1, config=CrawlConfig)
def crawl(config: CrawlConfig, context: StageContext) -> StageResult:
    (context.out / "page").write_text("whole pages" if context.runtime.site.reconcile else "a page")
    return StageResult(rows={"models": 1234})


@stage("filter", version=1, config=FilterConfig)
def filter_records(config: FilterConfig, context: StageContext) -> StageResult:
    if config.allow_nsfw:
        raise ArtifactError("the snapshot is damaged; delete it")
    (context.out / "kept").write_text(context.one("snapshot").file("page").read_text())
    step = FunnelStep(filter="type", reason="not a checkpoint", dropped=3)
    return StageResult(funnels=(Funnel(unit="models", seen=10, kept=7, steps=(step,)),))


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration, with the stages ``crawl`` and ``filter`` of this file."""
    stages = {"crawl": crawl, "filter": filter_records}
    monkeypatch.setattr(pipeline, "load_stage", lambda node: stages[node.key])
    rewards = {"scorers": [{"name": "clip", "model": "tiny"}], "unify": "chatgen"}
    path = tmp_path / "run.yaml"
    runtime = {"store": str(tmp_path / "store")}
    path.write_text(yaml.safe_dump({"rewards": rewards, "runtime": runtime}))
    return path


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from diffagent.cli import main\n"
        "try: main.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'prefect', 'polars', 'pyarrow', 'pydantic', 'yaml'}\n"
        "print('loaded', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Commands:" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_a_former_stage_command_names_the_new_form() -> None:
    config = RunConfig.model_validate(
        {
            "rewards": {"scorers": [{"name": "clip", "model": "tiny"}], "unify": "chatgen"},
            "judges": {"judges": [{"name": "pick_score", "model": "tiny"}]},
            "evaluation": {"num_shards": 2},
        }
    )
    for key in pipeline.plan(config):
        for name in {key, key.split("-")[0]} - {"select", "render", "score"}:
            form = re.escape(f"diffagent run -c FILE --until {name}")
            with pytest.raises(ConfigError, match=f"{form}$"):
                invoke(name, "-c", "run.yaml")


def test_completion_can_be_shown() -> None:
    shown = runner.invoke(
        main.app,
        ["--show-completion"],
        env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "SHELL": "bash"},
    )
    assert "_DIFFAGENT_COMPLETE" in shown.output or shown.exit_code == 1, shown.output
    env = {
        **os.environ,
        "_DIFFAGENT_COMPLETE": "complete_bash",
        "COMP_WORDS": "diffagent run --o",
        "COMP_CWORD": "2",
    }
    code = "from diffagent.cli.main import app; app(prog_name='diffagent')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["--only"]


def test_a_stage_is_built_then_cached(config_file: Path) -> None:
    lines = [
        line.split() for line in invoke("run", "--until", "filter", "-c", config_file).splitlines()
    ]
    assert [line[:2] for line in lines] == [["crawl", "built"], ["filter", "built"]]
    assert Path(lines[1][2], "kept").read_text() == "a page"
    again = [
        line.split() for line in invoke("run", "--until", "filter", "-c", config_file).splitlines()
    ]
    assert again == [[key, "cached", path] for key, _, path in lines]


def test_a_refresh_that_finds_nothing_new_says_so(config_file: Path) -> None:
    invoke("run", "--until", "filter", "-c", config_file)
    first, second = invoke("run", "--until", "filter", "-c", config_file, "--refresh").splitlines()
    assert "nothing new" in first
    assert "cached" in second


def test_reconcile_is_a_refresh_that_walks_everything(config_file: Path) -> None:
    invoke("run", "--until", "crawl", "-c", config_file)
    (line,) = invoke("run", "--until", "crawl", "-c", config_file, "--reconcile").splitlines()
    assert "built" in line
    assert Path(line.split()[2], "page").read_text() == "whole pages"


def test_settings_change_the_run(config_file: Path, tmp_path: Path) -> None:
    out = invoke(
        *(
            "run",
            "--only",
            "crawl",
            "-c",
            config_file,
            "--set",
            f"runtime.store={tmp_path / 'other'}",
        ),
        *("--set", "crawl.model_types=[LORA]"),
    )
    assert str(tmp_path / "other") in out
    (manifest,) = (tmp_path / "other").glob("crawl/[0-9a-f]*/manifest.json")
    assert '"LORA"' in manifest.read_text() and '"Checkpoint"' not in manifest.read_text()


def test_only_one_stage_is_built_and_only_from_inputs_in_the_store(config_file: Path) -> None:
    missing = r"no artifact of 'crawl'.*diffagent run -c FILE --until crawl"
    with pytest.raises(ArtifactError, match=missing):
        invoke("run", "--only", "filter", "-c", config_file)
    invoke("run", "--only", "crawl", "-c", config_file)
    lines = [
        line.split() for line in invoke("run", "--only", "filter", "-c", config_file).splitlines()
    ]
    assert [line[:2] for line in lines] == [["filter", "built"]]
    for options, reason in (
        (("--only", "filter", "--refresh"), "leaves the crawl out"),
        (("--only", "filter", "--reconcile"), "leaves the crawl out"),
        (("--only", "crawl", "--until", "filter"), "exclude each other"),
        (("--only", "flter"), "no stage 'flter'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            invoke("run", *options, "-c", config_file)


@pytest.mark.parametrize("text", ["crawl.site", "=1", "a.b=[1"])
def test_wrong_settings_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_overrides([text])


def test_settings_are_yaml() -> None:
    found = parse_overrides(["a.b=3", "a.c=[x, y]", "d.e=null", "f.g=http://h:1/?q=2"])
    assert found == {"a.b": 3, "a.c": ["x", "y"], "d.e": None, "f.g": "http://h:1/?q=2"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["filter", "--set", "filters.allow_nsfw=true"], "error: the snapshot is damaged"),
        (["crawl", "--set", "crawl.max_models=0"], "crawl.max_models: Input should be greater"),
        (["crawl", "--set", "crawl.site.x=1"], "cannot set 'crawl.site.x'"),
        (["crawl", "--set", "nonsense"], "--set needs SECTION.KEY=VALUE"),
    ],
)
def test_errors_are_a_line_on_stderr_and_exit_code_1(
    config_file: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "crawl.site.x=1" in arguments:
        config_file.write_text(config_file.read_text() + "crawl: {site: dump:records}\n")
    command, *rest = arguments
    words = ["diffagent", "run", "--until", command, "-c", str(config_file), *rest]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ") or "\nerror: " in error
    assert "Traceback" not in error


def test_an_unexpected_error_is_a_line_too_and_v_shows_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main, "app", fail)
    monkeypatch.setattr(sys, "argv", ["diffagent", "run"])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1
    assert "error: diffagent run: unexpected ZeroDivisionError" in error and "-v" in error
    caplog.set_level("INFO", "diffagent.cli.main")
    with pytest.raises(SystemExit):
        main.main()
    assert "Traceback" in caplog.text and "ZeroDivisionError" in caplog.text


def test_artifact_show_and_verify(config_file: Path) -> None:
    path = Path(invoke("run", "--until", "filter", "-c", config_file).splitlines()[-1].split()[-1])
    shown = invoke("artifact", "show", path)
    assert "models: 7 of 10 kept" in shown and "type: not a checkpoint" in shown
    assert "  snapshot: crawl " in shown
    (snapshot,) = path.parent.parent.glob("crawl/[0-9a-f]*/")
    assert ["rows", "models", "1,234"] in [
        line.split() for line in invoke("artifact", "show", snapshot).splitlines()
    ]
    assert "all 1 files" in invoke("artifact", "verify", path)
    (path / "kept").write_text("b page")  # the same size
    with pytest.raises(ArtifactError, match="damaged"):
        invoke("artifact", "verify", path)


class Chooses:
    """An LLM that has one answer, and none to 'nothing'."""

    made: ClassVar[list[tuple[Any, ...]]] = []
    catalogue = Catalogue([])

    def __init__(self, agent: Any, **options: Any) -> None:
        self.made.append((agent, options))

    def select(self, prompts: list[str], n: int) -> list[list[Choice]]:
        bad = Verdict(None, "invalid", "unparsable", "not JSON")
        good = Verdict(API, "valid")
        return [[Choice("", bad if p == "nothing" else good)] * n for p in prompts]


@pytest.fixture
def chooses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    monkeypatch.setattr("diffagent.agent.lm.llm.load_agent", lambda *what, **_: what)
    monkeypatch.setattr("diffagent.agent.llm_selector.LLM", Chooses)
    Chooses.made.clear()
    return Chooses.made


def test_select_prints_the_api(chooses: list[tuple[Any, ...]]) -> None:
    line = call_line("a ring", API, Catalogue([])) + "\n"
    assert json.loads(line) == {"prompt": "a ring", **json.loads(API.to_json()), "hashes": {}}
    assert invoke("select", "a ring", "--agent", "here") == line
    assert invoke("select", "a ring", "--agent", "here", "-n", 2) == 2 * line
    ((where, device, quantization), options), *_ = chooses
    assert (str(where), device, quantization) == ("here", "auto", "none")
    assert options == {"constrained": True, "negative_prompts": "known"}
    invoke("select", "x", "--agent", "here", "--unconstrained", "--int8")
    ((*_, quantization), options) = chooses[-1]
    assert quantization == "int8"
    assert options == {"constrained": False, "negative_prompts": "known"}
    invoke("select", "x", "--agent", "here", "--free-negative-prompt")
    assert chooses[-1][1] == {"constrained": True, "negative_prompts": "free"}
    with pytest.raises(SchemaError, match="unparsable: not JSON"):
        invoke("select", "nothing", "--agent", "here")


def test_select_answers_line_by_line(chooses: list[tuple[Any, ...]]) -> None:
    result = runner.invoke(main.app, ["select", "-", "--agent", "x"], b"a\nnothing\r\n\xff\n\n")
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert [(line["prompt"], "model" in line) for line in lines] == [  # the blank one is skipped
        *(("a", True), ("nothing", False), ("\ufffd", True)),
    ]
    assert "no valid API for 'nothing'" in lines[1]["error"]
    assert len(chooses) == 1


def test_select_fits_on_a_dabench_once(tmp_path: Path) -> None:
    from tests.agent.agent_world import make_world

    dabench = make_world(tmp_path, train=40, test=4)
    options = ("--dabench", dabench.path, "--store", tmp_path, "--selector", "neighbours", "--n", 3)
    lines = invoke("select", "a red star, line art", *options).splitlines()
    assert len({json.loads(line)["model"] for line in lines}) == 3
    assert all(len(json.loads(line)["hashes"]["model"]) == 64 for line in lines)
    with pytest.raises(ConfigError, match="is none of neighbours"):
        invoke("select", "a red star", "--dabench", dabench.path, "--selector", "llm")
    with pytest.raises(ConfigError, match="--agent DIR, or --dabench DIR"):
        invoke("select", "a red star")


def test_select_needs_an_agent(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="agent"):
        invoke("select", "a red circle", "--agent", tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--agent", "x", "--selector", "bm25", "--store", "s"), "--selector, --store: need --dab"),
        (("--dabench", "x", "--int8", "--unconstrained"), "--int8, --unconstrained: need --agent"),
        (
            ("--agent", "x", "--unconstrained", "--free-negative-prompt"),
            "--free-negative-prompt: has no effect",
        ),
    ],
)
def test_select_refuses_options_that_it_would_not_use(
    options: tuple[str, ...], reason: str, chooses: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    options = tuple(str(tmp_path) if option == "x" else option for option in options)
    with pytest.raises(ConfigError, match=reason):
        invoke("select", "a star", *options)
    assert chooses == [], "nothing is loaded"


def test_every_command_has_the_short_help_and_v_and_q() -> None:
    def walk(node: Any, path: tuple[str, ...]) -> None:
        children = getattr(node, "commands", {})
        for name, child in children.items():
            walk(child, (*path, name))
        shown = invoke(*path, "-h")
        assert shown == invoke(*path, "--help")
        assert children or ("--verbose" in shown and "--quiet" in shown), path
        options = [p for p in node.params if p.param_type_name == "option" and not p.hidden]
        assert len(options) <= 18, path  # with -v, -q and -h

    walk(typer.main.get_command(main.app), ())


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_an_empty_prompt_is_an_error(prompt: str, chooses: list[tuple[Any, ...]]) -> None:
    with pytest.raises(ConfigError, match="the prompt is empty"):
        invoke("select", prompt, "--agent", "here")
    assert chooses == [], "nothing is loaded"


def test_a_directory_of_another_kind_is_called_what_it_is(tmp_path: Path) -> None:
    from tests.agent.agent_world import make_world

    dabench = make_world(tmp_path, train=12, test=4).path
    with pytest.raises(ArtifactError, match="it is an artifact of the stage 'shard'"):
        invoke("select", "a star", "--agent", dabench)
    with pytest.raises(ArtifactError, match=f"did you mean '{dabench.parent}/latest'"):
        invoke("select", "a star", "--agent", dabench.parent)
    with pytest.raises(ArtifactError, match=f"did you mean '{dabench.parent}/latest'"):
        invoke("select", "a star", "--dabench", dabench.parent)
    with pytest.raises(ArtifactError, match="no such directory"):
        invoke("select", "a star", "--agent", tmp_path / "nothing")
