"""``diffagent config``, and the JSON Schemas that are made from the same types."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from diffagent.cli import main
from diffagent.cli.render_commands import RELEASED_REWARDS
from diffagent.errors import ConfigError
from diffagent.run_config import configure, load_config
from tests.conftest import ROOT
from tools.write_schemas import DIRECTORY, TYPES, schema_text

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def printed(*arguments: Any) -> str:
    words = ["config", *map(str, arguments)]
    result = CliRunner().invoke(main.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_printed_defaults_are_a_configuration_with_these_values(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(printed())
    assert load_config(path) == configure({"rewards": RELEASED_REWARDS}, None, "defaults")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_printed_values_of_a_file_are_that_configuration(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(printed("-c", config, "--set", "sampling.seed=7"))
    assert load_config(path) == load_config(config, {"sampling.seed": 7})


def test_every_setting_has_a_comment_with_its_limits() -> None:
    lines = printed().splitlines()
    for above, line in itertools.pairwise(lines):
        if line and not line.lstrip().startswith(("#", "- ")):
            assert above.lstrip().startswith("#"), line
    assert "nsfw_level" in printed("filters")
    assert "(whole number, at least 1, at most 64)" in printed("runtime.site")
    changed = printed("runtime.site", "--set", "runtime.site.threads=9")
    assert "  threads: 9" in changed and "default 4)" in " ".join(changed.replace("#", "").split())


def test_a_section_is_printed_in_its_place() -> None:
    assert set(yaml.safe_load(printed("crawl"))) == {"crawl"}
    site = yaml.safe_load(printed("runtime.site"))
    assert list(site) == ["runtime"] and list(site["runtime"]) == ["site"]
    for name in ("nothing", "crawl.site", "runtime.nothing"):
        with pytest.raises(ConfigError, match=f"no section '{name}' in a run; choose one of: "):
            printed(name)


@pytest.mark.parametrize("name", TYPES)
def test_the_written_schemas_are_current(name: str) -> None:
    written = (DIRECTORY / f"{name}.schema.json").read_text(encoding="utf-8")
    assert written == schema_text(TYPES[name]), "run: python -m tools.write_schemas"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_fit_their_schema(config: Path) -> None:
    first, *_ = (text := config.read_text()).splitlines()
    path = (config.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve()
    assert path == DIRECTORY / "run_config.schema.json"
    schema = yaml.safe_load(path.read_text())
    jsonschema.validate(data := yaml.safe_load(text), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**data, "crawl": {"sit": "x"}}, schema)
