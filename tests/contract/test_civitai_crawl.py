"""The crawl gets everything, whatever happens, and its snapshot is always the same bytes."""

from __future__ import annotations

import gzip
import itertools
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from diffagent.civitai.client import CivitaiClient
from diffagent.civitai.pagination import Page
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_stage import crawl
from diffagent.crawl.snapshot import GENERATIONS
from diffagent.errors import ServerError
from diffagent.localcivitai.faults import Faults, Profile
from diffagent.localcivitai.sources.dump import read_records, write_dump
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact, verify_artifact
from tests.conftest import ROOT, SHARED_DATA
from tests.contract.conftest import IMAGES, MODELS

ALL = CrawlConfig(site="http://synthetic", nsfw=True, model_types=(), image_source="feed")
#: Rates high enough for a few dozen requests; waits are left out.
FLAKY = Profile(
    {"too_many": 0.1, "unavailable": 0.1, "truncated": 0.1, "empty": 0.3, "duplicate": 0.3},
    deploy_every=9,
    deploys=1,
)
HOSTILE = Profile(
    {
        **{"too_many": 0.1, "unavailable": 0.1, "timeout": 0.1, "html": 0.1, "truncated": 0.1},
        **{"cut": 0.1, "empty": 0.3, "loop": 0.4, "duplicate": 0.5, "skip": 1.0, "moved": 0.5},
    },
    deploy_every=5,
    deploys=3,
)


def run(url: str, store: Path, config: CrawlConfig = ALL) -> Artifact:
    return crawl.run(config, {}, RuntimeConfig(store=str(store)), site_url=url)


def rows(snapshot: Artifact, kind: str) -> list[dict]:
    return [
        orjson.loads(line)
        for path in snapshot.glob(f"{kind}/*.jsonl.gz")
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]


def files(snapshot: Artifact) -> list[tuple[str, str]]:
    """Names and digests of all files but the one with the day of the crawl."""
    entries = snapshot.manifest.files
    return [(entry.path, entry.sha256) for entry in entries if entry.path != GENERATIONS]


@pytest.fixture(scope="module")
def undisturbed(site, tmp_path_factory) -> Artifact:
    return run(site, tmp_path_factory.mktemp("undisturbed"))


def test_the_snapshot_is_complete_sorted_and_plain(undisturbed, site):
    models, images = rows(undisturbed, "models"), rows(undisturbed, "images")
    assert [m["id"] for m in models] == list(range(1, MODELS + 1))
    # One video, one minor: the first is not asked for, the second not listed.
    assert [i["id"] for i in images] == [10_000 + n for n in range(IMAGES) if n not in (3, 6)]
    assert images[0]["meta"]["seed"] == 2**53
    assert models[0]["modelVersions"][0]["downloadUrl"] == "/api/download/models/1001"
    assert undisturbed.manifest.rows == {"models": 230, "images": 618, "pages": 0}
    text = b"".join(gzip.decompress(p.read_bytes()) for p in undisturbed.glob("*/*.jsonl.gz"))
    assert site.encode() not in text
    assert undisturbed.manifest.metrics["schema_drift"] == {}
    verify_artifact(undisturbed)


@pytest.mark.parametrize(
    ("profile", "seed"), [(FLAKY, 1), (HOSTILE, 1), (HOSTILE, 2)], ids=["flaky", "hostile", "2"]
)
def test_faults_change_nothing(faulty, undisturbed, tmp_path, profile, seed):
    faults = Faults(profile, seed=seed)
    with faulty(faults) as url:
        disturbed = run(url, tmp_path)
    assert disturbed.content_digest == undisturbed.content_digest
    assert files(disturbed) == files(undisturbed)
    assert len(faults.injected) >= len(profile.rates) - 3
    assert disturbed.manifest.metrics["retries"] > 0
    assert disturbed.manifest.metrics["restarts"] > 0


def test_skipped_items_are_found_by_the_cross_check(faulty, undisturbed, tmp_path):
    faults = Faults(Profile({"skip": 1.0}))
    with faulty(faults) as url:
        assert run(url, tmp_path).content_digest == undisturbed.content_digest
    assert faults.injected["skip"] > 0


def test_galleries_give_what_belongs_to_versions(faulty, site, undisturbed, tmp_path):
    config = ALL.model_copy(update={"image_source": "versions", "max_models": 30})
    calm = run(site, tmp_path / "calm", config)
    with faulty(Faults(HOSTILE, seed=5)) as url:
        stormy = run(url, tmp_path / "stormy", config)
    wanted = [i["id"] for i in rows(undisturbed, "images") if max(i["modelVersionIds"]) > 1200]
    assert [i["id"] for i in rows(calm, "images")] == wanted
    assert len(wanted) > 400
    assert files(stormy) == files(calm)


@pytest.mark.parametrize("source", ["feed", "versions"])
def test_limits_keep_the_newest_under_any_faults(faulty, site, tmp_path, source):
    config = ALL.model_copy(update={"image_source": source, "max_models": 120, "max_images": 350})
    calm = run(site, tmp_path / "calm", config)
    assert [m["id"] for m in rows(calm, "models")] == list(range(111, 231))
    with faulty(Faults(HOSTILE, seed=3)) as url:
        assert files(run(url, tmp_path / "stormy", config)) == files(calm)
    if source == "feed":
        assert len(rows(calm, "images")) == 350


@pytest.mark.parametrize("dead", [1, 4])
def test_galleries_that_time_out_are_left_out_and_named(site, tmp_path, monkeypatch, dead):
    ask = CivitaiClient.get_images

    def get_images(self: CivitaiClient, cursor: str | None = None, **params: object) -> Page:
        if params["modelVersionId"] in range(1200, 1200 + dead):
            raise ServerError("524")
        return ask(self, cursor, **params)

    monkeypatch.setattr(CivitaiClient, "get_images", get_images)
    config = ALL.model_copy(update={"image_source": "versions", "max_models": 40})
    if dead > 2:
        with pytest.raises(ServerError):
            run(site, tmp_path, config)
    else:
        snapshot = run(site, tmp_path, config)
        assert snapshot.manifest.metrics["failed_galleries"] == [1200]
        assert not any(i["modelVersionIds"] == [1200] for i in rows(snapshot, "images"))


def test_types_and_browsing_level_are_those_asked_for(site, tmp_path):
    config = CrawlConfig(site="x", model_types=("LORA",), image_source="feed")
    snapshot = run(site, tmp_path, config)
    assert {m["type"] for m in rows(snapshot, "models")} == {"LORA"}
    assert not any(m["nsfw"] for m in rows(snapshot, "models"))
    assert {i["nsfwLevel"] for i in rows(snapshot, "images")} == {"None"}


def test_pages_of_the_most_used_models(faulty, tmp_path):
    config = ALL.model_copy(update={"model_pages": 3, "max_models": 10, "max_images": 1})
    with faulty(Faults(HOSTILE, seed=4)) as url:
        pages = rows(run(url, tmp_path, config), "pages")
    assert [page["id"] for page in pages] == [221, 222, 223]
    assert pages[0]["checkpointType"] == "Trained"
    assert pages[0]["versions"][0]["settings"] == {"strength": 0.8}
    assert pages[0]["versions"][0]["clipSkip"] == 2


# A crawl that kills itself with SIGKILL when a function is called for the n-th time.
KILLER = """
import itertools, os, signal, sys
from diffagent.crawl import crawl_stage as crawling, journal, snapshot
from tests.contract.test_civitai_crawl import ALL, run
from pathlib import Path

url, store, place, number = sys.argv[1:]
calls = itertools.count(1)

def deadly(function, before=lambda *a: None):
    def wrapped(*args, **kwargs):
        if next(calls) == int(number):
            before(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

def tear(self, state, items):
    self._stream.write(b"\\x1f\\x8b\\x08\\x00half a member")
    self._stream.flush()

match place:
    case "append":
        journal.Journal.append = deadly(journal.Journal.append)
    case "torn":
        journal.Journal.append = deadly(journal.Journal.append, tear)
    case "part":
        snapshot._write_part = deadly(snapshot._write_part)
    case "summary":
        crawling.summarise = deadly(crawling.summarise)
    case "told":
        crawling.StageResult = deadly(crawling.StageResult)
run(url, Path(store))
"""


def killed_run(url: str, store: Path, place: str, number: int) -> int:
    command = [sys.executable, "-c", KILLER, url, str(store), place, str(number)]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=120).returncode


@pytest.mark.parametrize(
    ("place", "numbers"),
    [("append", (1, 3, 2)), ("torn", (2, 4)), ("part", (1, 2)), ("summary", (1,)), ("told", (1,))],
)
def test_kill_9_and_again(site, faulty, undisturbed, tmp_path, place, numbers):  # noqa: PLR0917
    """One kill after the other in the same store, then the same command to the end."""
    for number in numbers:
        assert killed_run(site, tmp_path, place, number) == -signal.SIGKILL
        assert not list(tmp_path.glob("crawl/[0-9a-f]*/manifest.json"))
    # The last run meets another server: cursors of the first are as good, or stale.
    with faulty(Faults(FLAKY, seed=9)) as url:
        resumed = run(url, tmp_path)
    assert files(resumed) == files(undisturbed)
    assert resumed.content_digest == undisturbed.content_digest
    assert resumed.manifest.metrics.keys() == undisturbed.manifest.metrics.keys()
    assert not list(tmp_path.glob("crawl/.*partial"))


def test_a_resumed_crawl_repeats_nothing(site, tmp_path):
    assert killed_run(site, tmp_path, "append", 6) == -signal.SIGKILL
    metrics = run(site, tmp_path).manifest.metrics
    # 3 + 3 pages of models, 4 + 4 of images; behind its head the journal had four at the kill.
    assert metrics["requests"] == 14 - 4


@pytest.mark.parametrize("source", ["feed", "versions", "showcase"])
def test_a_folder_that_is_read_gives_what_a_server_of_it_gives(dump, site, tmp_path, source):
    config = ALL.model_copy(update={"image_source": source, "max_models": 40, "model_pages": 5})
    served = run(site, tmp_path / "served", config)
    read = run(f"dump:{dump}", tmp_path / "read", config)
    assert files(read) == files(served)
    assert read.content_digest == served.content_digest
    assert read.manifest.funnels == served.manifest.funnels


def test_a_folder_with_faults_is_served_with_them(dump, undisturbed, tmp_path):
    runtime = RuntimeConfig(store=str(tmp_path), site={"faults": "hostile"})
    snapshot = crawl.run(ALL, {}, runtime, site_url=f"dump:{dump}")
    assert snapshot.manifest.metrics["retries"] > 0
    assert files(snapshot) == files(undisturbed)


@pytest.mark.skipif(
    not (SHARED_DATA / "civitai/models.jsonl.gz").is_file(), reason="no real records at hand"
)
def test_a_sample_of_real_records_survives(tmp_path):
    source = SHARED_DATA / "civitai"
    models = list(itertools.islice(read_records(source, "models"), 200))
    images = list(itertools.islice(read_records(source, "images"), 0, 60_000, 100))
    write_dump(tmp_path / "dump", models, images)
    runtime = RuntimeConfig(store=str(tmp_path), site={"faults": "hostile"})
    snapshot = crawl.run(ALL, {}, runtime, site_url=f"dump:{tmp_path / 'dump'}")
    assert {m["id"] for m in rows(snapshot, "models")} == {m["id"] for m in models}
    found = {i["id"]: i for i in rows(snapshot, "images")}
    assert set(found) == {i["id"] for i in images}
    assert all(found[i["id"]]["meta"] == i["meta"] for i in images)
    assert snapshot.manifest.metrics["schema_drift"] == {}
