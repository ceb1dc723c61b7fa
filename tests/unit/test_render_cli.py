"""``diffagent render`` and ``diffagent score``: from files to contact sheets."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

from diffagent import cli
from diffagent.agent.selector import Choice
from diffagent.agent.verify import Verdict
from diffagent.dabench.catalogue import Catalogue
from diffagent.errors import ConfigError
from diffagent.render import cli as render_cli
from diffagent.render import stage as render_stage
from diffagent.render.pnginfo import read_png
from diffagent.render.prompts_file import find_entry, folder_entries
from schemas.api import T2IAPI, parse_api
from tests.unit.test_render_recipe import CATALOGUE, api
from tests.unit.test_render_stage import Painter

HOSTILE = '"><script>alert(1)</script><img src=http://evil/x onerror=alert(2)> & {{ 7 * 7 }}'
PROMPTS = f"a red circle\n\n  a blue square <lora:ink:0.5>  \n{HOSTILE}\n"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the WebUI has it; pictures are painted."""
    monkeypatch.setattr(render_stage, "open_renderer", Painter)
    folder = tmp_path / "models"
    names = ("Stable-diffusion/dream_v8", "Stable-diffusion/anime/Toon XL", "Lora/ink", "VAE/some")
    for number, name in enumerate(names):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"weight": np.full(2, number, np.float32)}, path)
    (folder / "Stable-diffusion" / "old.ckpt").write_bytes(b"\x80\x04pickle")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A configuration with the sandbox's scorers."""
    scorers = [{"name": name, "model": "sandbox"} for name in ("clip", "image_reward", "hps_v2")]
    rewards = {"scorers": scorers, "unify": "zscore", "reference": "sandbox"}
    path = tmp_path / "run.yaml"
    runtime = {"store": str(tmp_path / "store"), "device": "cpu"}
    path.write_text(yaml.safe_dump({"rewards": rewards, "runtime": runtime}))
    return path


def invoke(*arguments: Any, code: int = 0, stdin: str | None = None) -> str:
    result = CliRunner().invoke(
        cli.app, [str(a) for a in arguments], catch_exceptions=False, input=stdin
    )
    assert result.exit_code == code, result.output
    return result.output


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


class Page(html.parser.HTMLParser):
    """Tags with attributes, texts by tag, and the text of all of it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.open = [""]
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.open.append("")

    def handle_data(self, data: str) -> None:
        self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def render(tmp_path: Path, models: Path, *arguments: Any, text: str = PROMPTS, **kw: Any) -> Path:
    """Run the command without scores; returns its folder."""
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    store = ("--store", tmp_path / "store", "--base-model", "SD 1.5", "--no-score")
    invoke("render", tmp_path / "prompts.txt", "--models", models, "--out", out, *store,
           *arguments, **kw)  # fmt: skip
    return out


def test_prompts_are_rendered_scored_and_shown(tmp_path: Path, models: Path, run: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    out = tmp_path / "out"
    arguments = (
        *("render", tmp_path / "prompts.txt", "--models", models, "--out", out, "-c", run),
        *("-m", "dream_v8", "-m", "toon", "--base-model", "SD 1.5", "--steps", 9, "--seed", 5),
        *("--seed", 6, "--negative-prompt", "blurry", "--width", 64, "--height", 128),
    )
    said = invoke(*arguments)
    assert f"12 of 12 pictures scored: {out / 'index.html'}" in said
    rows = results(out)
    assert [row["number"] for row in rows[:5]] == [
        "0001-0-5", "0001-0-6", "0001-1-5", "0001-1-6", "0002-0-5",
    ]  # fmt: skip
    assert {row["api"]["model"] for row in rows} == {"dream_v8", "Toon XL"}
    assert rows[4]["prompt"] == "a blue square"
    assert rows[4]["api"]["loras"] == [{"model": "ink", "version": "local", "weight": 0.5}]
    assert rows[-1]["prompt"] == HOSTILE
    for row in rows:
        assert set(row["scores"]) == {"unified", "clip", "image_reward", "hps_v2"}
        recipe, text = read_png(out / row["picture"])
        assert (recipe.steps, recipe.width, recipe.height) == (9, 64, 128)
        assert f"Model: {row['api']['model']}" in text
    page = Page(out / "index.html")
    assert len(page.all("article")) == 12
    shown = [float(card["data-unified"] or "nan") for card in page.all("article")]
    assert shown == [row["scores"]["unified"] for row in rows]
    assert str(tmp_path) not in (out / "index.html").read_text()
    again = invoke(*arguments)  # nothing is drawn or scored twice
    assert again == said
    assert len(list((tmp_path / "store" / "score").glob("*/manifest.json"))) == 1


def test_the_page_needs_nothing_else_and_runs_no_other_script(tmp_path: Path, models: Path) -> None:
    page = Page(render(tmp_path, models, "-m", "dream") / "index.html")
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "base", "object", "embed"} == set()
    assert len(page.all("script")) == 1
    addresses = [a.get("src") for _, a in page.tags if a.get("src")]
    assert len(addresses) == 3
    assert all(str(address).startswith("data:image/") for address in addresses)
    links = [str(a["href"]) for a in page.all("a")]
    assert links == ["0001-0-0.png", "0002-0-0.png", "0003-0-0.png"]
    assert not [name for _, a in page.tags for name in a if name.startswith("on")]
    assert page.texts["p"].count(HOSTILE) == 1  # as text
    (policy,) = [str(m["content"]) for m in page.all("meta") if m.get("http-equiv")]
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.texts[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert all(len(a["alt"] or "") > 10 for a in page.all("img"))


def test_a_note_is_on_the_sheet(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Painter, "name", "diffusers")
    text = "a __colour__ cat\na dog\n"
    out = render(tmp_path, models, "-m", "dream", "--lora", "ink:0,6", text=text)
    rows = results(out)
    note = "wildcards like __colour__ are drawn as text"
    assert [row["note"] for row in rows] == [note, None]
    assert Page(out / "index.html").texts["p"].count(f"Note: {note}") == 1
    assert {row["api"]["loras"][0]["weight"] for row in rows} == {0.6}


def test_calls_are_lines_of_json(tmp_path: Path, models: Path) -> None:
    call = json.loads(api("dream_v8").to_json())  # version 8 of some catalogue
    lines = [
        {"prompt": "a cat", **call},
        {"prompt": "a cat", "api": {**call, "model": "toon xl"}},
        {"prompt": "a dog", "api": json.dumps(call)},
        {"prompt": "a bird", "error": "the agent has no valid API"},
        {"prompt": "a fish", **{**call, "model": "nobody"}},
    ]
    out = render(tmp_path, models, text="\n".join(map(json.dumps, lines)), code=1)
    rows = results(out)
    assert [row["number"] for row in rows] == [
        *("0001-0-0", "0001-1-0", "0002-0-0", "0003-0-0", "0004-0-0"),
    ]
    assert [row["api"] and row["api"]["model"] for row in rows] == [
        *("dream_v8", "Toon XL", "dream_v8", None, "nobody"),
    ]
    assert [row["problem"] for row in rows] == [
        *(None, None, None, "no-answer", "no such checkpoint in the catalogue"),
    ]
    page = Page(out / "index.html")
    assert len(page.all("article")) == 5
    assert len(page.all("img")) == 3
    assert page.texts["b"].count("No picture") == 2


def test_calls_may_stand_beside_their_prompts(tmp_path: Path, models: Path) -> None:
    call = api("dream_v8").to_json()
    out = render(tmp_path, models, "--calls", "-", text="a cat\na dog\n", stdin=f"{call}\n{call}\n")
    assert [row["prompt"] for row in results(out)] == ["a cat", "a dog"]
    with pytest.raises(ConfigError, match="1 calls for 2 prompts"):
        render(tmp_path, models, "--calls", "-", text="a cat\na dog\n", stdin=f"{call}\n")


def test_an_agent_chooses_for_each_prompt(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it names comes from its catalogue, and the files from the folder, by hash."""
    (found,) = (e for e in folder_entries([models], tmp_path / "h", "SD 1.5") if "dr" in e.model)
    entry = CATALOGUE.checkpoints[0].__class__(
        **{**_fields(CATALOGUE.checkpoints[0]), "sha256": found.sha256}
    )
    agent = tmp_path / "agent"
    agent.mkdir()
    import pyarrow.parquet as pq

    pq.write_table(Catalogue([entry]).to_table(), agent / "catalogue.parquet")

    class Chooser:
        def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
            good = Choice("text", Verdict(_api(entry.model), "valid", None, ""), logprob=-0.5)
            bad = Choice("<b>what</b>", Verdict(None, "invalid", "unknown-model", ""))
            return [[good, bad][:n] for _ in prompts]

    asked: list[Any] = []

    def opens(*arguments: Any, **options: Any) -> Chooser:
        asked.append((arguments, options))
        return Chooser()

    monkeypatch.setattr("diffagent.agent.opening.open_selector", opens)
    rows = results(render(tmp_path, models, "--agent", agent, "-n", 2, code=1))
    assert [(row["source"], row["problem"]) for row in rows[:2]] == [
        ("agent", None),
        ("agent", "no such checkpoint in the catalogue"),
    ]
    assert len(rows) == 6
    assert asked[0][0][0] == agent


def _fields(entry: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(entry)


def _api(model: str) -> T2IAPI:
    return api(model)


def test_pictures_are_scored_from_what_they_tell(tmp_path: Path, models: Path, run: Path) -> None:
    drawn = render(tmp_path, models, "-m", "dream", "--lora", "ink:0.8", text="a cat\na dog\n")
    out = tmp_path / "scores"
    invoke("score", drawn, "-c", run, "--out", out)
    rows = results(out)
    assert [row["prompt"] for row in rows] == ["a cat", "a dog"]
    assert rows[0]["api"]["model"] == "dream_v8"
    assert rows[0]["api"]["loras"][0]["weight"] == 0.8
    assert set(rows[0]["scores"]) == {"unified", "clip", "image_reward", "hps_v2"}
    plain = tmp_path / "plain.jpg"
    Image.new("RGB", (32, 32), "red").save(plain)
    with pytest.raises(ConfigError, match="--prompt"):
        invoke("score", plain, "-c", run)
    broken = tmp_path / "broken.png"
    broken.write_bytes((drawn / "0001-0-0.png").read_bytes()[:-60])
    said = invoke("score", plain, broken, "--prompt", "red", "-c", run, "--out", out, code=1)
    assert "1 of 2 pictures" in said
    assert [row["problem"] for row in results(out)] == [None, "the picture is damaged"]


def test_names_of_models(models: Path, tmp_path: Path) -> None:
    entries = folder_entries([models], tmp_path / "hashes", "SD 1.5")
    assert sorted(entry.model for entry in entries) == ["Toon XL", "dream_v8", "ink"]
    toon = find_entry(entries, "Toon XL", ("Checkpoint",))
    for name in ("toon xl", "TOON XL.safetensors", "toon", (toon.sha256 or "")[:8]):
        assert find_entry(entries, name, ("Checkpoint",)) == toon
    with pytest.raises(ConfigError, match="'n' may be"):
        find_entry(entries, "n", ("Checkpoint", "LORA"))
    for name, said in (("ink", "near: 'Toon XL', 'dream_v8'"), ("dreem", "near: 'dream_v8'")):
        with pytest.raises(ConfigError, match=said):
            find_entry(entries, name, ("Checkpoint",))


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        ((), PROMPTS, "there are 2 checkpoints; choose with --model"),
        (("-m", "nobody"), PROMPTS, "is called 'nobody'"),
        (("-m", "dream", "--lora", "pencil:1"), PROMPTS, "is called 'pencil'"),
        (("-m", "dream", "--lora", "ink:9"), PROMPTS, "LoRA 'ink:9'"),
        (("-m", "dream"), "a <lora:unknown:1>", "is called 'unknown'"),
        (("-m", "dream", "--steps", 500), PROMPTS, "steps: Input should be less"),
        (("-m", "dream"), "\n \n", "holds no line"),
        ((), '{"prompt": 1}', "line 1 has no prompt"),
        ((), '{"prompt": "a"}', "line 1 is no API call: model"),
        ((), '{"prompt": "a"', "line 1 is not JSON"),
        (("-m", "dream", "--backend", "a1111"), PROMPTS, "runtime.render_url"),
    ],
)
def test_what_is_wrong_is_said(  # noqa: PLR0917
    tmp_path: Path,
    models: Path,
    arguments: tuple[Any, ...],
    text: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "--backend" in arguments:
        monkeypatch.undo()
    with pytest.raises(ConfigError, match=re.escape(said)):
        render(tmp_path, models, *arguments, text=text)


def test_without_a_file_they_are_the_stages(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="render needs a file"):
        invoke("render")
    with pytest.raises(ConfigError, match="score needs a file"):
        invoke("score")
    asked: list[Any] = []
    monkeypatch.setattr("diffagent.pipeline.run", lambda *a, **k: asked.append(a[1]) or {})
    invoke("render", "-c", run)
    invoke("score", "-c", run, "--set", "render.seeds=[1]")
    assert asked == ["render", "score"]
    with pytest.raises(ConfigError, match="--negative-prompt, --steps: only for a file"):
        invoke("render", "-c", run, "--steps", 30, "--negative-prompt", "x")
    with pytest.raises(ConfigError, match="--refresh: only for the stage"):
        invoke("score", run, "-c", run, "--refresh")
    assert asked == ["render", "score"]


def test_the_released_rewards_are_those_of_the_paper() -> None:
    paper = yaml.safe_load((Path(__file__).parents[2] / "configs" / "paper.yaml").read_text())
    run = render_cli._config(None, ["rewards.batch_size=3"], {})
    assert run.rewards.model_dump()["unify"] == paper["rewards"]["unify"]
    named = [(s.name, s.model, s.weights) for s in run.rewards.scorers]
    assert named == [(s["name"], s["model"], s["weights"]) for s in paper["rewards"]["scorers"]]
    assert render_cli._config(None, None, {}).rewards.batch_size != 3
    assert parse_api(api().to_json())  # the helper of these tests makes calls
