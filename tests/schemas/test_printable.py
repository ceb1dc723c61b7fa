"""Strangers' text reaches no terminal with what a terminal would obey."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from diffagent.cli.main import app
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.model_filters import base_model
from diffagent.render.files.model_cache import ModelCache
from diffagent.schemas.payloads import SchemaDrift
from diffagent.schemas.printable import PrintableFormatter, printable, printable_json

EVIL = "a\x1b[2J\x1b]0;title\x07\r\nerror: \u202egnp.exe\u2066\x9b31m\u2028\x7f\ud800"


def harmless(text: str) -> bool:
    return all(char.isprintable() or char in "\n\u200c\u200d" for char in text)


def test_controls_are_seen_and_letters_stay() -> None:
    assert harmless(printable(EVIL)) and "\n" not in printable(EVIL)
    assert printable("\x1b[1m\n") == r"\x1b[1m\n"
    assert printable("\u202e") == r"\u202e"
    assert printable("a\nb\r", lines=True) == "a\nb\\r"
    for text in (
        "na\u00efve \u6771\u4eac",
        "\U0001f469\u200d\U0001f680",
        "\u0645\u06cc\u200c\u062e",
    ):
        assert printable(text) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_json_keeps_its_value(text: str) -> None:
    for ascii_only in (True, False):
        shown = printable_json(json.dumps({text: [text]}, ensure_ascii=ascii_only))
        assert json.loads(shown) == {text: [text]}
        assert harmless(shown) and "\n" not in shown


def test_log_lines_are_one_line_each() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(PrintableFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    logger.warning("model %s", EVIL)
    try:
        raise ValueError(EVIL)
    except ValueError:
        logger.exception("it broke")
    lines = stream.getvalue().splitlines()
    assert harmless(stream.getvalue())
    assert lines[0].startswith(r"WARNING model a\x1b[2J") and lines[1] == "ERROR it broke"
    assert lines[2].startswith("Traceback") and len(lines) > 4


def test_models_list_shows_names_of_strangers_harmlessly(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    cache.path("0" * 64).parent.mkdir()
    cache.path("0" * 64).write_bytes(b"x")
    cache.use("0" * 64, size=1, model=EVIL.replace("\ud800", ""), air="urn:air:x")
    cache.release("0" * 64)
    for command in (["list"], ["pin", "000"], ["unpin", "000"], ["evict", "000"]):
        result = CliRunner().invoke(app, ["models", *command, "--models", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert r"a\x1b[2J" in result.output and harmless(result.output)


def test_labels_of_funnels_and_drift_are_harmless() -> None:
    drift = SchemaDrift()
    drift.model({"id": 1, EVIL: 1, "type": EVIL})
    assert all(map(harmless, drift.report()))
    reason = base_model({}, {"baseModel": EVIL}, FilterConfig())
    assert reason and harmless(reason) and "\n" not in reason


def test_errors_of_commands_are_harmless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffagent.cli import main

    config = tmp_path / "run.yaml"
    config.write_text('crawl: {"site": "x\\e[2J\\u202e"}\n')
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("sys.argv", ["diffagent", "run", "--only", "crawl", "--config", str(config)])
        main.main()
    assert harmless(capsys.readouterr().err)
