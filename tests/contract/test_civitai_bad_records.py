"""One bad record ends nothing: it is left out, counted with its reason, and the others are kept.

The same records come from a site, from a dump and from a sidecar, and are treated alike.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from safetensors.numpy import save_file

from diffagent.civitai.lenient_json import loads
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_stage import crawl
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.dabench.filter.filter_stage import filter_records
from diffagent.localcivitai.faults import Faults
from diffagent.localcivitai.server import serve
from diffagent.localcivitai.site import read_source
from diffagent.schemas.payloads import MAX_DEPTH, flaw
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact
from tests.conftest import ROOT
from tests.contract.bad_records import POISONS, full_image, places, poisoned, site_of
from tests.contract.conftest import synthetic_image, synthetic_model
from tests.contract.test_civitai_crawl import ALL, rows

TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
NO_NUMBER = "its id is no whole number below 2^63"
#: An id that is none -> the reason; each value of it is one more bad record.
BAD_IDS = {
    **dict.fromkeys(("2^63", "2^64", "-2^63 - 1", "negative", "float"), NO_NUMBER),
    **dict.fromkeys(("true", "text", "digits beyond 2^63", "superscript", "list"), NO_NUMBER),
    **dict.fromkeys(("null", "NaN", "1e999", "5000 digits"), "no id"),
}
DEEP = [name for name in POISONS if "deep" in name and name != "arrays 90 deep"]


def plain(make: Callable[[int], dict[str, Any]], number: int) -> dict[str, Any]:
    return {key: value for key, value in make(number).items() if key[0] != "_"}


def run(url: str, store: Path, config: CrawlConfig = ALL, **options: Any) -> Artifact:
    return crawl.run(config, {}, RuntimeConfig(store=str(store)), site_url=url, **options)


def dropped(snapshot: Artifact, unit: str) -> dict[str, int]:
    (funnel,) = [f for f in snapshot.manifest.funnels if f.unit == unit]
    funnel.check()
    assert funnel.kept == snapshot.manifest.rows[unit]
    return {step.reason: step.dropped for step in funnel.steps}


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    """Models and images as JSON texts: two good ones, one for each bad id, deep and long ones."""
    models = [json.dumps(plain(synthetic_model, n)) for n in (1, 2)]
    images = [json.dumps(plain(synthetic_image, n)) for n in (1, 2)]
    for number, name in enumerate(BAD_IDS, 10):
        models.append(poisoned(plain(synthetic_model, number), ("id",), POISONS[name]))
        images.append(poisoned(plain(synthetic_image, number), ("id",), POISONS[name]))
    for number, name in enumerate(DEEP, 40):
        models.append(poisoned(plain(synthetic_model, number), ("description",), POISONS[name]))
        images.append(poisoned(plain(synthetic_image, number), ("meta", "prompt"), POISONS[name]))
    long = POISONS["too long text"]
    models.append(poisoned(plain(synthetic_model, 60), ("name",), long))
    images.append(poisoned(plain(synthetic_image, 60), ("meta", "prompt"), long))
    models += ["null", '"a text"', "[]"]
    return models, images


EXPECTED = {
    NO_NUMBER: 10,
    "no id": 4,
    TOO_DEEP: len(DEEP),
    "larger than 8 MB": 1,
}
OBJECTS = {f"no object but {kind}": 1 for kind in ("NoneType", "str", "list")}


@pytest.mark.parametrize("source", ["site", "dump", "gzip"])
def test_bad_records_are_counted_and_the_others_kept(
    texts: tuple[list[str], list[str]], tmp_path: Path, source: str
) -> None:
    models, images = texts
    if source == "site":
        with site_of(models, images) as url:
            snapshot = run(url, tmp_path / "store")
            again = run(url, tmp_path / "store", refresh=True)
            assert again.content_digest == snapshot.content_digest
    else:
        for name, lines in (("models", models), ("images", images)):
            data = "\n".join([*lines, "", "{no json", ""]).encode("utf-8", "surrogatepass")
            path = tmp_path / f"{name}.jsonl{'.gz' if source == 'gzip' else ''}"
            path.write_bytes(gzip.compress(data) if source == "gzip" else data)
        snapshot = run(f"dump:{tmp_path}", tmp_path / "store")
    unread = {} if source == "site" else {"no JSON": 1}
    assert [m["id"] for m in rows(snapshot, "models")] == [1, 2]
    assert [i["id"] for i in rows(snapshot, "images")] == [10_001, 10_002]
    assert dropped(snapshot, "models") == {**EXPECTED, **OBJECTS, **unread}
    assert dropped(snapshot, "images") == {**EXPECTED, **unread}


def test_a_crawl_that_is_resumed_counts_the_same(
    texts: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    models, images = texts
    runtime = RuntimeConfig(store=str(tmp_path), site={"budget_seconds": 1e-9})
    with site_of(models, images) as url:
        for _ in range(50):
            try:
                crawl.run(ALL, {}, runtime, site_url=url)
                break
            except Exception as error:
                assert "goes on from here" in str(error)
        snapshot = run(url, tmp_path)
    assert dropped(snapshot, "models") == {**EXPECTED, **OBJECTS}
    assert dropped(snapshot, "images") == EXPECTED


@pytest.mark.parametrize("seed", range(3))
def test_whatever_stands_wherever_the_crawl_and_the_filters_go_on(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    poisons = [text for text in POISONS.values() if len(text) < 50_000]

    def records(make: Callable[[int], dict[str, Any]]) -> Iterator[str]:
        for number in range(10, 130):
            record = plain(make, number)
            yield poisoned(record, rng.choice(list(places(record))), rng.choice(poisons))
        yield json.dumps(plain(make, 1))

    models, images = list(records(synthetic_model)), list(records(full_image))
    with site_of(models, images) as url:
        direct = run(url, tmp_path / "site")
    runtime = RuntimeConfig(store=str(tmp_path / "site"))
    filtered = filter_records.run(FilterConfig(), {"snapshot": [direct]}, runtime)
    assert filtered.manifest.rows["catalogue"] > 20
    assert filtered.manifest.rows["records"] > 20
    for kind, lines in (("models", models), ("images", images)):
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines))
    with serve(read_source(f"dump:{tmp_path}"), Faults()) as url:
        config = ALL.model_copy(update={"model_pages": 5})
        dumped = run(url, tmp_path / "dump", config)
        showcases = config.model_copy(update={"image_source": "showcase"})
        assert rows(run(url, tmp_path / "showcase", showcases), "images")
        for model in rows(dumped, "models"):
            for path in ("api/v1/models", "models"):
                answer = requests.get(f"{url}/{path}/{model['id']}", timeout=30)
                assert answer.status_code in (200, 400, 404), (path, model["id"])
    assert dumped.manifest.funnels == direct.manifest.funnels


def test_a_known_record_that_goes_bad_stays_as_it_was(tmp_path: Path) -> None:
    good = [json.dumps(plain(synthetic_model, n)) for n in (1, 2, 3)]
    bad = poisoned(plain(synthetic_model, 2), ("description",), POISONS["arrays 250 deep"])
    with site_of(good, []) as url:
        first = run(url, tmp_path)
    with site_of([good[0], bad, good[2]], []) as url:
        second = run(url, tmp_path, refresh=True)
    assert rows(second, "models") == rows(first, "models")
    assert second.content_digest == first.content_digest
    assert not rows(second, "gone")


def test_a_picture_of_a_showcase_and_a_page_may_be_bad_too(tmp_path: Path) -> None:
    model = plain(synthetic_model, 1)
    place = ("modelVersions", 0, "images", 3, "meta")
    (tmp_path / "models.jsonl").write_text(poisoned(model, place, POISONS["arrays 90 deep"]))
    (tmp_path / "images.jsonl").write_text("")
    config = ALL.model_copy(update={"image_source": "showcase", "model_pages": 1})
    snapshot = run(f"dump:{tmp_path}", tmp_path / "store", config)
    assert len(rows(snapshot, "images")) == 10


@pytest.mark.parametrize("name", POISONS)
def test_a_sidecar_stops_no_server(tmp_path: Path, name: str) -> None:
    weights = {"lora_unet_x.lora_down.weight": np.zeros((4, 4), np.float32)}
    for stem in ("bad", "good"):
        save_file(weights, tmp_path / f"{stem}.safetensors", {"name": stem})
    answer = {"id": 7, "modelId": 8, "name": "v", "files": [], "images": []}
    text = poisoned({**answer, "x": 1}, ("x",), POISONS[name])
    (tmp_path / "bad.civitai.info").write_text(text, "utf-8", "surrogatepass")
    text = poisoned(answer, ("id",), POISONS[name])
    (tmp_path / "good.civitai.info").write_text(text, "utf-8", "surrogatepass")
    replay = read_source(f"local:{tmp_path}")
    assert sum(len(row.version_ids) for row in replay.models) == 2


def test_the_server_s_command_starts_beside_a_bad_sidecar(tmp_path: Path) -> None:
    save_file({"w": np.zeros((4, 4), np.float32)}, tmp_path / "a.safetensors")
    for end in ("civitai.info", "metadata.json", "json"):
        text = '{"id": 9223372036854775808, "modelId": 1e999, "x": ' + "[" * 300 + "]" * 300 + "}"
        (tmp_path / f"a.{end}").write_text(text)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    command = [sys.executable, "-m", "diffagent.cli.civitai_commands", "serve", "--port", "0"]
    server = subprocess.Popen(
        [*command, "--site", f"local:{tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert server.stdout and server.stderr
    line = server.stdout.readline()
    try:
        assert line.startswith("serving on http://127.0.0.1:"), server.stderr.read()
        answer = requests.get(line.split()[-1] + "/api/v1/models?nsfw=true", timeout=30).json()
        assert len(answer["items"]) == 1
    finally:
        server.kill()
        _, warnings = server.communicate()
    assert "a.civitai.info' is left out: nested deeper" in warnings


def test_depth_is_counted_as_documented() -> None:
    def nested(levels: int) -> dict[str, Any]:
        value: Any = 1
        for _ in range(levels - 1):
            value = [value]
        return {"id": 1, "x": value}

    assert flaw(nested(MAX_DEPTH)) == ""
    assert flaw(nested(MAX_DEPTH + 1)) == TOO_DEEP


def test_reading_takes_time_in_proportion_to_the_text() -> None:
    """Steps of the tokeniser are counted: no clock."""
    from diffagent.civitai import lenient_json

    class Counting:
        def __init__(self) -> None:
            self.steps = 0

        def finditer(self, data: bytes) -> Iterator[Any]:
            for token in pattern.finditer(data):
                self.steps += 1 + len(token[0])
                yield token

    pattern = lenient_json._TOKEN
    for unit in (b'{"a":', b"[", b'"\\"', b'"', b"\\", b'["'):
        counts = []
        for size in (20_000, 40_000):
            counter = Counting()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lenient_json, "_TOKEN", counter)
                with pytest.raises(ValueError):
                    loads(unit * size)
            counts.append(counter.steps)
        assert counts[1] <= 2.1 * counts[0] + 10
