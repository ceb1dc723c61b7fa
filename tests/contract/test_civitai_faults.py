"""What else goes wrong: the disk, the clock, the journal, the schema, the time that there is."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.crawl import crawler, refresh
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.crawl.crawl_stage import crawl
from diffagent.errors import ArtifactError, CivitaiError, DiffAgentError
from diffagent.localcivitai.faults import Faults, Profile
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact
from tests.conftest import file_size_limit
from tests.contract.conftest import synthetic_image, synthetic_model
from tests.contract.test_civitai_crawl import ALL, HOSTILE, files, rows
from tests.contract.test_civitai_refresh import GALLERIES, World


def run(url: str, store: Path, config: CrawlConfig = ALL, **options: object) -> Artifact:
    refreshing = bool(options.pop("refresh", False))
    runtime = RuntimeConfig(store=str(store), site=options)
    return crawl.run(config, {}, runtime, site_url=url, refresh=refreshing)


# --- the schema ---


@pytest.mark.parametrize(("after", "kind"), [(2, "models"), (8, "images")])
def test_a_schema_that_changes_in_the_middle_loses_nothing(faulty, site, tmp_path, after, kind):
    calm = run(site, tmp_path / "calm")
    with faulty(Faults(Profile(new_schema_after=after))) as url:
        changed = run(url, tmp_path / "changed")
    assert calm.manifest.rows == changed.manifest.rows
    old, new = ({i["id"]: i for i in rows(s, kind)} for s in (calm, changed))
    assert old.keys() == new.keys()
    evolved = [i for i in new.values() if "schemaVersion" in i]
    assert 0 < len(evolved) < len(new)
    for model in rows(changed, "models"):
        assert [v["id"] for v in model["modelVersions"]] == [1000 + model["id"]]
    for image in rows(changed, "images"):
        assert all(type(i) is int for i in image["modelVersionIds"])
    drift = changed.manifest.metrics["schema_drift"]
    for what in ("image.width: str", "image.schemaVersion: unknown", "ids in quotes, made numbers"):
        assert drift[what] > 0
    assert calm.manifest.metrics["schema_drift"] == {}


def test_new_values_and_missing_fields_are_counted(faulty, tmp_path):
    with faulty(Faults(Profile(new_schema_after=1))) as url:
        drift = run(url, tmp_path).manifest.metrics["schema_drift"]
    assert drift["model.availability: new value 'Lent'"] > 0
    assert drift["version.baseModelType: new value 'Quantum'"] > 0


# --- the disk ---


@pytest.mark.parametrize("room", [300, 6_000, 25_000])
def test_a_full_disk_is_an_error_that_says_what_to_do_and_resumes(site, tmp_path, room):
    with file_size_limit(room), pytest.raises(ArtifactError, match=r"runtime\.store") as caught:
        run(site, tmp_path)
    assert "it goes on from what was written" in str(caught.value)
    assert not list(tmp_path.glob("crawl/[0-9a-f]*/manifest.json")), (
        "nothing half-written is visible"
    )
    resumed = run(site, tmp_path)
    assert files(resumed) == files(run(site, tmp_path / "other"))


# --- the clock ---


def test_a_clock_that_jumps_changes_neither_pauses_nor_contents(
    faulty, site, tmp_path, monkeypatch
):
    calm = run(site, tmp_path / "calm")
    rng, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + rng.uniform(-1e6, 1e6))
    started = time.monotonic()
    with faulty(Faults(HOSTILE, seed=6)) as url:
        jumping = run(url, tmp_path / "jumping", budget_seconds=250.0)
    assert files(jumping) == files(calm)
    assert time.monotonic() - started < 250


# --- the time that there is ---


def test_a_crawl_that_runs_out_of_time_goes_on_the_next_time(site, tmp_path):
    reached = []
    for _ in range(40):
        try:
            done = run(site, tmp_path, budget_seconds=1e-9)
            break
        except CivitaiError as error:
            assert error.retryable
            assert "budget_seconds" in str(error) and "goes on from here" in str(error)
            reached.append(str(error))
    assert len(reached) == 14, "a page each: 3 + 3 of models, 4 + 4 of images"
    assert "230 models" in reached[-1]
    assert files(done) == files(run(site, tmp_path / "other"))


# --- progress ---


def test_progress_is_told(site, tmp_path, monkeypatch):
    monkeypatch.setattr("diffagent.crawl.meter._REPORT_SECONDS", 0.0)
    told: list[tuple[float | None, str]] = []
    config = GALLERIES.model_copy(update={"max_models": 20})
    runtime = RuntimeConfig(store=str(tmp_path))
    crawl.run(config, {}, runtime, site_url=site, progress=lambda f, text: told.append((f, text)))
    assert (1.0, "galleries: 20 of 20") in told
    halfway = [text for fraction, text in told if fraction == 0.5 and "galleries" in text]
    assert halfway and "left" in halfway[0]
    assert all(fraction is None or 0 <= fraction <= 1 for fraction, _ in told if fraction)


# --- threads ---


@pytest.mark.parametrize("source", ["versions", "showcase"])
def test_threads_do_not_show(faulty, site, tmp_path, source):
    config = ALL.model_copy(update={"image_source": source, "max_models": 40})
    alone = run(site, tmp_path / "alone", config, threads=1)
    with faulty(Faults(HOSTILE, seed=8)) as url:
        together = run(url, tmp_path / "together", config, threads=16)
    assert files(together) == files(alone)
    assert len(rows(alone, "images")) > 300


def test_threads_share_the_rate(recorder, site, tmp_path):
    config = ALL.model_copy(update={"image_source": "showcase", "max_models": 20})
    started = time.monotonic()
    made = run(site, tmp_path, config, threads=16, requests_per_second=20.0)
    requests = made.manifest.metrics["requests"]
    assert requests >= 21
    assert time.monotonic() - started >= (requests - 1) / 20


# --- kill points ---


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A site of little, before and after a change, and what undisturbed crawls make of it."""
    world = World(models=30, images=60)
    with world.site() as url:
        before = run(url, tmp_path_factory.mktemp("before"), GALLERIES)
    world.models[31] = synthetic_model(31)
    del world.models[4]
    picture = synthetic_image(200)
    picture["_context"] = {"modelVersionId": 1031}
    world.images[10_200] = picture
    return world, before


def journal_of(monkeypatch, store: Path, call) -> Path:
    """The partial directory of a crawl that was stopped just before it wrote its snapshot."""

    def stop(*args: object, **options: object) -> None:
        raise DiffAgentError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(crawler, "write_snapshot", stop)
        patch.setattr(refresh, "write_snapshot", stop)
        with pytest.raises(DiffAgentError, match="stopped"):
            call()
    (partial,) = store.glob("crawl/.*.partial")
    return partial


@pytest.mark.parametrize("refreshing", [False, True], ids=["first", "refresh"])
def test_a_journal_cut_at_any_byte_gives_the_same_snapshot(
    small, tmp_path, monkeypatch, refreshing
):
    world, before = small
    store = tmp_path / "store"
    if refreshing:
        shutil.copytree(before.path.parents[1], store)
    with world.site() as url:

        def call() -> Artifact:
            return run(url, store, GALLERIES, refresh=refreshing, refresh_share=0.2)

        partial = journal_of(monkeypatch, store, call)
        journal = (partial / "journal.gz").read_bytes()
        kept = tmp_path / "kept"
        shutil.copytree(store, kept)
        expected = call().content_digest
        assert refreshing == (expected != run(url, tmp_path / "x", GALLERIES).content_digest)

        @settings(deadline=None, max_examples=25)
        @given(st.integers(0, len(journal)), st.booleans())
        def check(cut: int, damaged: bool) -> None:
            shutil.rmtree(store)
            shutil.copytree(kept, store)
            rest = bytes(50) if damaged else b""
            (partial / "journal.gz").write_bytes(journal[:cut] + rest)
            assert call().content_digest == expected

        check()
