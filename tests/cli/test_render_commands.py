"""``diffagent render`` and ``diffagent score``: from files to contact sheets."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

from diffagent.agent.selector import Choice, call_line
from diffagent.agent.verify import Verdict
from diffagent.cli import main
from diffagent.cli import render_commands as render_cli
from diffagent.errors import ConfigError, NotFound, ServerError
from diffagent.render import render_stage
from diffagent.render.pnginfo import read_png
from diffagent.sandbox.files import SCORERS
from diffagent.schemas.api import T2IAPI, parse_api
from diffagent.sheet.prompts_file import find_entry, folder_entries
from diffagent.t2i.catalogue import Catalogue
from tests.render.test_recipe import CATALOGUE, api
from tests.render.test_render_stage import Painter

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
    names = ("clip", "image_reward", "hps_v2")
    scorers = [{"name": name, "model": str(SCORERS / name)} for name in names]
    reference = str(SCORERS / "reference.json")
    rewards = {"scorers": scorers, "unify": "zscore", "reference": reference}
    path = tmp_path / "run.yaml"
    runtime = {"store": str(tmp_path / "store"), "device": "cpu"}
    path.write_text(yaml.safe_dump({"rewards": rewards, "runtime": runtime}))
    return path


def invoke(*arguments: Any, code: int = 0, stdin: str | None = None) -> str:
    result = CliRunner().invoke(
        main.app, [str(a) for a in arguments], catch_exceptions=False, input=stdin
    )
    assert result.exit_code == code, result.output
    return result.output


def results(out: Path) -> list[dict[str, Any]]:
    text = (out / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


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
    store = ("--set", f"runtime.store={tmp_path / 'store'}", "--base-model", "SD 1.5", "--no-score")
    invoke("render", tmp_path / "prompts.txt", "--models", models, "--out", out, *store,
           *arguments, **kw)  # fmt: skip
    return out


def test_prompts_are_rendered_scored_and_shown(tmp_path: Path, models: Path, run: Path) -> None:
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    out = tmp_path / "out"
    arguments = (
        *("render", tmp_path / "prompts.txt", "--models", models, "--out", out, "-c", run),
        *("-m", "dream_v8", "-m", "toon", "--base-model", "SD 1.5", "-p", "steps=9", "--seed", 5),
        *("--seed", 6, "-p", "negative_prompt=blurry", "-p", "width=64", "-p", "height=128"),
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
    text = (out / "index.html").read_text()
    assert str(tmp_path) not in text
    assert "<dt>Drawn with</dt><dd>painter 1</dd>" in text
    again = invoke(*arguments)  # nothing is drawn or scored twice
    assert again == said
    assert len(list((tmp_path / "store" / "score").glob("[0-9a-f]*/manifest.json"))) == 1


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
        *(None, None, None, "no-answer", "the catalogue has no checkpoint 'nobody', '8'"),
    ]
    page = Page(out / "index.html")
    assert len(page.all("article")) == 5
    assert len(page.all("img")) == 3
    assert page.texts["b"].count("No picture") == 2


def test_a_prompt_that_names_no_lora_fails_alone(tmp_path: Path, models: Path) -> None:
    tags = ("", "<lora:ink:0.5>", "<lora:nope:0.5>", "<lora:ink:9>", "<lora:ink:0.0.8>")
    out = render(
        tmp_path, models, "-m", "dream", text="".join(f"a {tag}\n" for tag in tags), code=1
    )
    problems = [row["problem"] for row in results(out)]
    assert problems[:2] == [None, None]
    assert "is called 'nope'; near: 'ink'" in problems[2]
    assert "LoRA 'ink:9.0'" in problems[3]
    assert "is no number" in problems[4]


def test_a_line_that_is_no_call_fails_alone(tmp_path: Path, models: Path) -> None:
    call = json.loads(api("dream_v8").to_json())
    many = {**call, "params": {**call["params"], "steps": 500}}
    lines = [json.dumps({"prompt": "a", **given}) for given in (call, many)]
    out = render(tmp_path, models, text="\n".join([*lines, lines[0][:-9], '{"x": 1}']), code=1)
    problems = [row["problem"] for row in results(out)]
    assert problems[0] is None
    assert "line 2 is no API call: params.steps: Input should be less" in problems[1]
    assert "line 3 is not JSON" in problems[2]
    assert "line 4 has no prompt" in problems[3]


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
    invoke("score", drawn, plain, "-c", run, "--out", out, code=1)
    assert [row["problem"] for row in results(out)] == [
        *(None, None, "the picture states no prompt; --prompt gives one"),
    ]
    broken = tmp_path / "broken.png"
    broken.write_bytes((drawn / "0001-0-0.png").read_bytes()[:-60])
    said = invoke("score", plain, broken, "--prompt", "red", "-c", run, "--out", out, code=1)
    assert "1 of 2 pictures" in said
    problems = [row["problem"] for row in results(out)]
    assert problems[0] is None
    assert problems[1].startswith(f"{str(broken)!r} cannot be read: ")


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
        (("-m", "dream", "-p", "steps=500"), PROMPTS, "steps: Input should be less"),
        (
            ("-m", "dream", "-p", "step=5"),
            PROMPTS,
            "--param needs NAME=VALUE with a NAME of sampler",
        ),
        (("-m", "dream", "-p", "steps"), PROMPTS, "--param needs NAME=VALUE"),
        (("-m", "dream", "-p", "steps=5.5"), PROMPTS, "--param steps: needs a whole number"),
        (("-m", "dream", "-p", "cfg-scale=x"), PROMPTS, "--param cfg_scale: needs a number"),
        (("-m", "dream", "-n", 3), PROMPTS, "--n: needs --agent DIR or --dabench DIR"),
        (("-m", "dream"), "\n \n", "holds no line"),
        ((), '{"prompt": 1}', "line 1 has no prompt"),
        ((), '{"prompt": "a"}', "line 1 is no API call: model"),
        ((), '{"prompt": "a"', "line 1 is not JSON"),
        ((), '{"prompt": "a", "x": ' + 2000 * "[", "line 1 is not JSON"),
        (("-m", "dream", "--set", "render.backend=a1111"), PROMPTS, "runtime.render_server.url"),
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
    if "render.backend=a1111" in arguments:
        monkeypatch.undo()
    with pytest.raises(ConfigError, match=re.escape(said)):
        render(tmp_path, models, *arguments, text=text)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("{red|blue} star\n", ["{red|blue} star"]),
        ('{"quoted"|plain} star\n', ['{"quoted"|plain} star']),
        ("{}\n".replace("{}", "{a}"), ["{a}"]),
        ('{"a red": star\na dog\n', ['{"a red": star', "a dog"]),
        ("one\u2028still\u2029and\u0085so\x0bon.\n", ["one\u2028still\u2029and\u0085so\x0bon."]),
        ("\ufeffa cat\r\n\r\n \t\r\na dog", ["a cat", "a dog"]),
    ],
)  # fmt: skip
def test_a_line_feed_ends_a_prompt_and_a_brace_begins_one(
    tmp_path: Path, models: Path, text: str, prompts: list[str]
) -> None:
    rows = results(render(tmp_path, models, "-m", "dream", text=text))
    assert [row["prompt"] for row in rows] == prompts


def test_prompts_may_be_utf_16(tmp_path: Path, models: Path) -> None:
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "p.txt").write_bytes("\ufeffä cat\r\na dog\r\n".encode(encoding))
        named = ("--models", models, "-m", "dream", "--base-model", "SD 1.5", "--no-score")
        places = ("--out", tmp_path / "out", "--set", f"runtime.store={tmp_path / 'store'}")
        invoke("render", tmp_path / "p.txt", *named, *places)
        assert [row["prompt"] for row in results(tmp_path / "out")] == ["ä cat", "a dog"]


def test_a_call_s_text_may_hold_line_separators_and_lone_surrogates(
    tmp_path: Path, models: Path
) -> None:
    call = {"prompt": "a\ud800b", **json.loads(api("dream_v8").to_json())}
    call["negative_prompt"] = "x\udc00"
    other = {**call, "prompt": "one\u2028still one", "negative_prompt": ""}
    text = json.dumps(call) + "\n" + json.dumps(other, ensure_ascii=False)
    rows = results(render(tmp_path, models, text=text))
    assert [row["prompt"] for row in rows] == ["a\ufffdb", "one\u2028still one"]
    assert rows[0]["api"]["negative_prompt"] == "x\ufffd"


def _dabench(tmp_path: Path, models: Path) -> tuple[Path, Any, Any]:
    """A catalogue of two checkpoints, of which the folder has one file under another name."""
    import pyarrow.parquet as pq

    (file,) = (e for e in folder_entries([models], tmp_path / "h", "SD 1.5") if "dr" in e.model)
    here, away = (e for e in CATALOGUE.checkpoints if e.ecosystem == "sd1")
    here = here.__class__(**{**_fields(here), "sha256": file.sha256})
    away = away.__class__(**{**_fields(away), "sha256": "ab" * 32, "download_path": "/api/x"})
    directory = tmp_path / "dabench"
    directory.mkdir()
    pq.write_table(Catalogue([here, away]).to_table(), directory / "catalogue.parquet")
    return directory, here, away


class _NoNetwork:
    """A site that must not be asked."""

    def __enter__(self) -> _NoNetwork:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def download(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a folder means that folder")


def test_a_folder_means_that_folder(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of the catalogue that is not there is one failed row, and no site is asked."""
    monkeypatch.setattr(render_stage, "open_site", lambda *_: _NoNetwork())
    dabench, here, away = _dabench(tmp_path, models)
    usable: list[Any] = []

    class Chooser:
        catalogue = CATALOGUE

        def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
            return [[_choice(here), _choice(away)][:n] for _ in prompts]

    def opens(*_: Any, **options: Any) -> Chooser:
        usable.append(options["usable"])
        return Chooser()

    monkeypatch.setattr("diffagent.agent.opening.open_selector", opens)
    rows = results(render(tmp_path, models, "--dabench", dabench, "-n", 2, text="a cat", code=1))
    assert rows[0]["problem"] is None
    assert "is in none of the model folders" in rows[1]["problem"]
    assert (here.model, here.version) in usable[0]
    assert (away.model, away.version) not in usable[0]
    assert ("ink", "local") in usable[0]  # files that the catalogue does not have count as well


def _choice(entry: Any) -> Choice:
    call = _api(entry.model).model_copy(
        update={"version": entry.version, "base_model": entry.base_model}
    )
    return Choice(call.to_json(), Verdict(call, "valid", None, ""))


def test_a_site_that_is_away_costs_its_own_pictures_alone(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --download and no network the others are drawn; nothing is taken for final."""

    class Away(_NoNetwork):
        def download(self, *_: Any, **__: Any) -> None:
            raise ServerError("no answer")

    monkeypatch.setattr(render_stage, "open_site", lambda *_: Away())
    dabench, here, away = _dabench(tmp_path, models)
    lines = [{"prompt": "a cat", **json.loads(_choice(e).text)} for e in (away, here)]
    arguments = ("--dabench", dabench, "--download")
    text = "\n".join(map(json.dumps, lines))
    rows = results(render(tmp_path, models, *arguments, text=text, code=1))
    assert [row["picture"] for row in rows] == [None, "0001-1-0.png"]

    class Back(_NoNetwork):
        def download(self, url: str, path: Path, *, sha256: str, **_: Any) -> None:
            asked.append(sha256)
            raise NotFound("gone")

    asked: list[str] = []
    monkeypatch.setattr(render_stage, "open_site", lambda *_: Back())
    render(tmp_path, models, *arguments, text=text, code=1)
    assert asked == [away.sha256]  # the first answer was not kept as the last word


def test_selected_calls_are_drawn_from_a_folder_by_hash(tmp_path: Path, models: Path) -> None:
    """The lines of `select` name a catalogue's models; the folder has the files by other names."""
    dabench, here, _ = _dabench(tmp_path, models)
    catalogue = Catalogue.load(dabench)
    call = _choice(here).verdict.api
    assert call is not None
    line = call_line("a cat", call, catalogue)
    assert json.loads(line)["hashes"] == {"model": here.sha256}
    (row,) = results(render(tmp_path, models, text=line))
    assert (row["prompt"], row["api"]["model"], row["problem"]) == ("a cat", "dream_v8", None)


def test_a_base_model_that_a_catalogue_states_is_not_asked_for(
    tmp_path: Path, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = folder_entries([models], tmp_path / "hashes")
    assert "2 checkpoints do not state their base model" in caplog.text
    caplog.clear()
    folder_entries([models], tmp_path / "hashes", catalogued={entry.sha256 for entry in entries})
    assert "do not state" not in caplog.text


def test_a_stranger_s_files_are_not_overwritten(tmp_path: Path, models: Path, run: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("<h1>My home page</h1>")
    with pytest.raises(ConfigError, match=r"no contact sheet wrote; .* another folder with --out"):
        render(tmp_path, models, "-m", "dream")
    with pytest.raises(ConfigError, match="no contact sheet wrote"):
        invoke("score", models, "-c", run, "--out", out)
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [
        ("index.html", "<h1>My home page</h1>")
    ]
    (out / "index.html").unlink()
    (out / "0001-0-0.png").write_text("my picture")
    with pytest.raises(ConfigError, match=r"'0001-0-0.png', which no contact sheet wrote"):
        render(tmp_path, models, "-m", "dream")
    (out / "0001-0-0.png").unlink()
    render(tmp_path, models, "-m", "dream")
    render(tmp_path, models, "-m", "dream")  # its own is
    with pytest.raises(ConfigError, match="is the folder of the pictures"):
        invoke("score", out, "-c", run, "--out", out)
    with pytest.raises(ConfigError, match="is a file"):
        invoke("score", models, "-c", run, "--out", out / "index.html")


def test_pictures_are_scored_upright(tmp_path: Path, run: Path, models: Path) -> None:
    """A photo stored sideways with its orientation is the same picture as one stored upright."""
    half = Image.new("RGB", (64, 48), "blue")
    half.paste("red", (0, 0, 64, 24))
    half.save(tmp_path / "upright.png")
    turned = half.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways: turn it clockwise to look at it
    turned.save(tmp_path / "turned.png", exif=exif)
    out = tmp_path / "scores"
    pictures = (tmp_path / "upright.png", tmp_path / "turned.png")
    invoke("score", *pictures, "--prompt", "red and blue", "-c", run, "--out", out)
    first, second = results(out)
    assert first["scores"] == second["scores"]
    with Image.open(out / second["picture"]) as shown:
        assert shown.size == (64, 48)
        assert shown.getpixel((32, 6)) == (255, 0, 0)


def test_pictures_of_16_bits_are_scored_as_they_look(tmp_path: Path, run: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    grey = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    Image.fromarray(grey).save(folder / "a.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "b.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "c.tif")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "d.tiff")
    (folder / "e.png").symlink_to(tmp_path / "nothing.png")
    (folder / "f.png").mkdir()
    (folder / "g.png").write_text("<html>log in</html>")
    out = tmp_path / "scores"
    invoke("score", folder, "--prompt", "a grey square", "-c", run, "--out", out, code=1)
    rows = results(out)
    assert len(rows[0]["scores"]) == 4
    for row in rows[1:3]:
        assert row["scores"] == pytest.approx(rows[0]["scores"], abs=1e-4)
    problems = [row["problem"] for row in rows[3:]]
    assert "32 bits a pixel" in problems[0]
    assert "g.png' cannot be read: cannot identify image file" in problems[1]
    assert len(problems) == 2


def test_a_picture_too_large_to_read_is_one_failed_row(tmp_path: Path, run: Path) -> None:
    """A flat PNG of 200 million pixels, and one that only claims 60,000 x 60,000."""
    header = b"\x89PNG\r\n\x1a\n"

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    for name, width, height in (("large", 20_000, 10_000), ("claim", 60_000, 60_000)):
        size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        rows = zlib.compress(bytes(height * (width // 8 + 1))) if name == "large" else b""
        data = chunk(b"IHDR", size + b"\x01\0\0\0\0") + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
        (tmp_path / f"{name}.png").write_bytes(header + data)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "good.png")
    pictures = [tmp_path / f"{name}.png" for name in ("claim", "good", "large")]
    out = tmp_path / "scores"
    invoke("score", *pictures, "--prompt", "red", "-c", run, "--out", out, code=1)
    problems = [row["problem"] for row in results(out)]
    assert problems == [
        *("the picture is too large to be read", None, "the picture is too large to be read"),
    ]


def test_nothing_to_score_loads_no_scorer(
    tmp_path: Path, models: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any, **__: Any) -> Any:
        raise AssertionError("there is nothing to score")

    monkeypatch.setattr("diffagent.rewards.score_stage.load_scorers", loads)
    (tmp_path / "prompts.txt").write_text("darkness")
    arguments = ("--models", models, "-m", "dream", "--base-model", "SD 1.5", "-c", run)
    out = tmp_path / "out"
    said = invoke("render", tmp_path / "prompts.txt", *arguments, "--out", out, code=1)
    assert "0 of 1 pictures drawn" in said
    (tmp_path / "bad.png").write_bytes(b"no picture")
    invoke("score", tmp_path / "bad.png", "--prompt", "x", "-c", run, "--out", out, code=1)


def test_without_a_file_they_name_the_command_of_the_stage(run: Path) -> None:
    for name in ("render", "score"):
        with pytest.raises(ConfigError, match=f"diffagent run -c FILE --until {name}"):
            invoke(name, "-c", run)


def test_options_that_calls_or_a_choice_do_not_use_are_refused(
    tmp_path: Path, models: Path
) -> None:
    call = json.dumps({"prompt": "a cat", "api": json.loads(api("dream_v8").to_json())})
    unused = ("-p", "steps=77", "--lora", "x:1", "-m", "y", "-n", 2)
    with pytest.raises(ConfigError, match=r"^--lora, --model, --n, --param: not for API calls"):
        render(tmp_path, models, *unused, text=call)
    with pytest.raises(ConfigError, match=r"^--lora, --model: not together with --agent"):
        render(tmp_path, models, "--agent", tmp_path, "-m", "y", "--lora", "x:1")
    path = tmp_path / "prompts.txt"
    for option in (("--download",), ("--base-model", "SD 1.5")):
        with pytest.raises(ConfigError, match=f"^{option[0]}: needs --models DIR"):
            invoke("render", path, *option, "--dabench", tmp_path, "--out", tmp_path / "other")


def test_the_released_rewards_are_those_of_the_paper() -> None:
    paper = yaml.safe_load((Path(__file__).parents[2] / "configs" / "paper.yaml").read_text())
    run = render_cli._config(None, ["rewards.batch_size=3"], {})
    assert run.rewards.model_dump()["unify"] == paper["rewards"]["unify"]
    named = [(s.name, s.model, s.weights) for s in run.rewards.scorers]
    assert named == [(s["name"], s["model"], s["weights"]) for s in paper["rewards"]["scorers"]]
    assert render_cli._config(None, None, {}).rewards.batch_size != 3
    assert parse_api(api().to_json())  # the helper of these tests makes calls
