"""The cache of model files: what is evicted and what never, by one process and by several."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.numpy import save

from diffagent.errors import ConfigError, RenderError
from diffagent.render.files import model_cache as cache_module
from diffagent.render.files.model_cache import CachedModel, ModelCache, to_evict
from tests.conftest import ROOT

FILES = st.builds(
    CachedModel,
    sha256=st.text("0123456789abcdef", min_size=4, max_size=4),
    size=st.integers(0, 100),
    used=st.integers(0, 5).map(float),
    complete=st.booleans(),
    pinned=st.booleans(),
    in_use=st.booleans(),
    imported=st.booleans(),
)


@given(st.lists(FILES, unique_by=lambda file: file.sha256), st.integers(-10, 500))
def test_eviction_takes_the_longest_unused_and_no_more_than_needed(
    files: list[CachedModel], excess: int
) -> None:
    gone = to_evict(files, excess)
    free = [file for file in files if not (file.pinned or file.in_use or file.imported)]
    assert set(gone) <= set(free)
    if sum(file.size for file in free) >= excess:
        assert sum(file.size for file in gone) >= excess, "enough, where there is enough"
    else:
        assert set(gone) == set(free)
    assert sum(file.size for file in gone[:-1]) < max(excess, 1), "the last one was needed too"
    kept = [file for file in free if file not in gone]
    for file in gone:
        assert all((file.complete, file.used) <= (k.complete, k.used) for k in kept)
    assert to_evict(reversed(files), excess) == gone, "whatever the order"


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def put(cache: ModelCache, number: int, size: int = 100) -> str:
    """A file of the cache, as a download leaves it."""
    sha256 = digest(number)
    cache.use(sha256, size=size, model=f"model {number}")
    cache.path(sha256).write_bytes(bytes(size))
    cache.release(sha256)
    return sha256


def age(cache: ModelCache, sha256: str, seconds: float) -> None:
    about = cache.path(sha256).with_suffix(".json")
    now = about.stat().st_mtime
    os.utime(about, (now - seconds, now - seconds))


class TwoProcesses(RuleBasedStateMachine):
    """Two caches on one directory do what they like; nothing that is used or pinned ever goes."""

    LIMIT = 250

    @initialize()
    def open(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.caches = [ModelCache(self.directory, self.LIMIT) for _ in range(2)]
        self.uses: list[list[str]] = [[], []]
        self.pinned: set[str] = set()

    @rule(who=st.integers(0, 1), number=st.integers(0, 4), size=st.sampled_from([50, 100]))
    def fetch(self, who: int, number: int, size: int) -> None:
        cache, sha256 = self.caches[who], digest(number)
        cache.use(sha256, size=size)
        self.uses[who].append(sha256)
        if not cache.path(sha256).exists():
            cache.make_room(size)
            cache.path(sha256).write_bytes(bytes(size))

    @precondition(lambda self: any(self.uses))
    @rule(who=st.integers(0, 1), which=st.integers(0, 50))
    def release(self, who: int, which: int) -> None:
        if self.uses[who]:
            sha256 = self.uses[who].pop(which % len(self.uses[who]))
            self.caches[who].release(sha256)

    @rule(who=st.integers(0, 1), number=st.integers(0, 4), pinned=st.booleans())
    def pin(self, who: int, number: int, pinned: bool) -> None:
        sha256 = digest(number)
        if self.caches[who].path(sha256).exists():
            self.caches[who].pin(sha256, pinned)
            (self.pinned.add if pinned else self.pinned.discard)(sha256)

    @rule(who=st.integers(0, 1))
    def die(self, who: int) -> None:
        """Uses end with their process, and are not taken back."""
        register = self.caches[who]._register
        if register:
            register.close()
        self.caches[who] = ModelCache(self.directory, self.LIMIT)
        self.uses[who] = []

    @rule(who=st.integers(0, 1))
    def evict(self, who: int) -> None:
        before = {file.sha256: file for file in self.caches[who].files()}
        gone = self.caches[who].make_room()
        used = {sha256 for uses in self.uses for sha256 in uses}
        assert not {file.sha256 for file in gone} & (used | self.pinned)
        assert all(before[file.sha256] == file for file in gone)
        left = self.caches[who].files()
        assert sum(file.size for file in left) <= self.LIMIT or all(
            file.in_use or file.pinned for file in left
        )

    @invariant()
    def what_is_used_is_there(self) -> None:
        if not hasattr(self, "caches"):
            return
        for uses in self.uses:
            assert all(self.caches[0].path(sha256).exists() for sha256 in uses)
        assert all(self.caches[0].path(sha256).exists() for sha256 in self.pinned)
        told = {file.sha256 for file in self.caches[0].files() if file.in_use}
        assert told == {sha256 for uses in self.uses for sha256 in uses}

    def teardown(self) -> None:
        for cache in getattr(self, "caches", ()):
            cache.close()
        if hasattr(self, "directory"):
            shutil.rmtree(self.directory)


TwoProcesses.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
test_two_caches_of_one_directory = TwoProcesses.TestCase


def test_the_longest_unused_goes_and_what_is_pinned_stays(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path, max_bytes=300)
    oldest, pinned, old, new = (put(cache, number) for number in range(4))
    for number, sha256 in enumerate((oldest, pinned, old, new)):
        age(cache, sha256, 100 - number)
    cache.pin(pinned)
    cache.use(oldest), cache.release(oldest)  # now it is the newest
    assert [file.sha256 for file in cache.make_room()] == [old]
    with pytest.raises(ConfigError, match="pinned"):
        cache.remove(pinned)
    cache.pin(pinned, pinned=False)
    cache.remove(pinned)
    with pytest.raises(ConfigError, match="not there"):
        cache.remove(pinned)
    assert {file.sha256 for file in cache.files()} == {oldest, new}
    assert not list(tmp_path.glob(f"{old[:2]}/{old}*")), "nor its notes and lock"


def test_room_is_kept_for_what_is_on_its_way(tmp_path: Path) -> None:
    cache, other = ModelCache(tmp_path, 1000), ModelCache(tmp_path, 1000)
    kept = put(cache, 1, 300)
    cache.use(digest(2), size=900)
    (coming,) = (file for file in other.files() if file.sha256 == digest(2))
    assert (coming.size, coming.complete, coming.in_use) == (900, False, True)
    assert [file.sha256 for file in other.make_room()] == [kept]
    cache.path(digest(2)).with_suffix(".unchecked.part").write_bytes(bytes(400))
    cache.close()
    (left,) = other.files()
    assert (left.size, left.complete, left.in_use) == (400, False, False), "broken off"
    put(other, 3, 700)
    assert [file.sha256 for file in other.make_room()] == [digest(2)], "remains go first"


def test_what_did_not_come_leaves_nothing(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    cache.use(digest(1), size=10)
    cache.release(digest(1))
    assert cache.files() == []


def test_a_full_disk_evicts_even_without_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ModelCache(tmp_path)
    first, second = put(cache, 1), put(cache, 2)
    age(cache, first, 50)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("diffagent.render.files.model_cache.shutil.disk_usage", lambda path: usage)
    assert cache.make_room(1000) == []
    assert [file.sha256 for file in cache.make_room(1100)] == [first]
    assert cache.path(second).exists()


def test_notes_that_were_cut_off_do_no_harm(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    sha256 = put(cache, 1)
    cache.path(sha256).with_suffix(".json").write_bytes(b"")
    (file,) = cache.files()
    assert (file.model, file.size) == ("", 100)


def test_files_of_an_older_store_are_known(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    path = cache.path(digest(1))
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(7))
    Path(f"{path}.lock").touch()
    (file,) = cache.files()
    assert (file.size, file.complete, file.used) == (7, True, path.stat().st_mtime)


def test_import_checks_as_a_download_does(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path / "cache")
    good = save({"w": np.ones(3, dtype=np.float16)})
    (tmp_path / "ink.safetensors").write_bytes(good)
    (tmp_path / "bad.safetensors").write_bytes(save({"w": np.array([np.nan])}))
    sha256, path = cache.add(tmp_path / "ink.safetensors")
    assert sha256 == hashlib.sha256(good).hexdigest() and path.read_bytes() == good
    assert cache.add(tmp_path / "ink.safetensors") == (sha256, path)
    with pytest.raises(RenderError, match="NaN"):
        cache.add(tmp_path / "bad.safetensors")
    (file,) = cache.files()
    assert (file.model, file.in_use) == ("ink", False)


USER = """
import sys, time
from pathlib import Path
from diffagent.render.files.model_cache import ModelCache
cache = ModelCache(Path(sys.argv[1]))
cache.use(sys.argv[2])
print("in use", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["ends", "killed"])
def test_a_file_that_another_process_uses_stays_until_it_ends(tmp_path: Path, how: str) -> None:
    cache = ModelCache(tmp_path, max_bytes=0)
    used, unused = put(cache, 1), put(cache, 2)
    user = subprocess.Popen(
        [sys.executable, "-c", USER, str(tmp_path), used],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert user.stdout and user.stdin and user.stdout.readline() == b"in use\n"
        assert [file.sha256 for file in cache.make_room()] == [unused]
        with pytest.raises(ConfigError, match="in use"):
            cache.remove(used)
        assert cache.path(used).exists()
        user.stdin.close() if how == "ends" else user.send_signal(signal.SIGKILL)
        user.wait(timeout=30)
        assert [file.sha256 for file in cache.make_room()] == [used]
        cache.close()
        assert not list((tmp_path / "in-use").iterdir())
    finally:
        user.kill()
        user.wait()


RACER = """
import random, sys
from pathlib import Path
from diffagent.render.files.model_cache import ModelCache
cache, rng = ModelCache(Path(sys.argv[1]), 250), random.Random(int(sys.argv[2]))
names = sys.argv[3:]
for _ in range(150):
    name = rng.choice(names)
    path = cache.use(name, size=100)
    with cache.download_lock(name):
        if not path.exists():
            cache.make_room(100)
            whole = path.with_suffix(".unchecked")
            whole.write_bytes(name.encode() + bytes(36))
            whole.replace(path)
    cache.make_room()
    assert path.read_bytes()[:64] == name.encode()
    cache.release(name)
"""


def test_processes_that_fetch_and_evict_at_once_never_lose_what_they_use(tmp_path: Path) -> None:
    names = [digest(number) for number in range(6)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), str(seed), *names],
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        for seed in range(2)
    ]
    for racer in racers:
        _, said = racer.communicate(timeout=120)
        assert racer.returncode == 0, said.decode()
    cache = ModelCache(tmp_path, 250)
    cache.make_room()
    files = cache.files()
    assert sum(file.size for file in files) <= 250 and not any(file.in_use for file in files)


# --- room -------------------------------------------------------------------------------------


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    usage = type("Usage", (), {"free": size})
    monkeypatch.setattr("diffagent.render.files.model_cache.shutil.disk_usage", lambda path: usage)


def test_what_cannot_fit_is_refused_before_anything_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ModelCache(tmp_path / "cache")
    files = [put(cache, number) for number in range(3)]
    free(monkeypatch, 1000)
    for refuse in (cache.check_room, cache.make_room):
        with pytest.raises(RenderError, match="1000 bytes are free and 300 can be evicted") as said:
            refuse(1301)
        assert said.value.reason == "no-room"
    assert all(cache.path(sha256).exists() for sha256 in files)
    assert len(cache.make_room(1250)) == 3, "all of it helps here"

    limited = ModelCache(tmp_path / "cache", max_bytes=250)
    files = [put(limited, number) for number in range(2)]
    with pytest.raises(RenderError, match=r"larger than the model cache may be \(250\)") as said:
        limited.make_room(251)
    assert said.value.reason == "no-room"
    source = tmp_path / "large.safetensors"
    source.write_bytes(save({"w": np.ones(300, dtype=np.float16)}))
    with pytest.raises(RenderError, match="larger than the model cache"):
        limited.add(source)
    free(monkeypatch, 0)
    with pytest.raises(RenderError, match="0 bytes are free and 200 can be evicted"):
        ModelCache(tmp_path / "cache").add(source)
    assert [file.sha256 for file in limited.files()] == sorted(files), "nothing went, nothing came"


def test_what_a_person_imported_goes_only_when_asked(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path / "cache", max_bytes=1000)
    source = tmp_path / "ink.safetensors"
    source.write_bytes(save({"w": np.ones(300, dtype=np.float16)}))
    imported, _ = cache.add(source)
    age(cache, imported, 1000)
    downloaded = put(cache, 1, 800)
    assert [file.sha256 for file in cache.make_room()] == [downloaded]
    assert [(file.sha256, file.imported) for file in cache.files()] == [(imported, True)]
    tight = ModelCache(tmp_path / "cache", max_bytes=10)
    assert tight.make_room() == []
    assert [file.sha256 for file in tight.make_room(imported=True)] == [imported]
    cache.add(source)
    cache.remove(imported)
    assert cache.files() == []


def test_a_full_disk_ends_an_import_with_a_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "ink.safetensors"
    source.write_bytes(save({"w": np.ones(3, dtype=np.float16)}))
    cache = ModelCache(tmp_path / "cache")

    def full(_: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffagent.render.files.model_cache.shutil.copyfile", full)
    with pytest.raises(RenderError, match="No space left on device"):
        cache.add(source)
    assert cache.files() == []


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_what_is_no_file_is_not_imported(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "x.safetensors"
    if kind == "folder":
        source.mkdir()
    elif kind == "fifo":
        os.mkfifo(source)
    told = {"missing": "no such file", "folder": "it is a folder", "fifo": "no such file"}[kind]
    with pytest.raises(RenderError, match=told):
        ModelCache(tmp_path / "cache").add(source)


def test_a_cache_that_cannot_be_written_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"cannot be written.*--models"):
            ModelCache(directory).files()


def test_a_disk_without_room_for_notes_is_a_file_s_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cache = ModelCache(tmp_path)
    monkeypatch.setattr(cache, "_note", full)
    with pytest.raises(RenderError, match="No space left") as refused:
        cache.use(digest(1))
    assert refused.value.reason == "no-room"
    assert cache.files() == [], "nor is it in use"


# --- verification -----------------------------------------------------------------------------


def imported(tmp_path: Path) -> tuple[ModelCache, str, Path]:
    source = tmp_path / "ink.safetensors"
    source.write_bytes(save({"w": np.ones(300, dtype=np.float16)}))
    cache = ModelCache(tmp_path / "cache")
    return cache, *cache.add(source)


def test_a_file_is_hashed_once_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, sha256, path = imported(tmp_path)
    hashed: list[Path] = []
    sha256_file = cache_module.sha256_file
    monkeypatch.setattr(cache_module, "sha256_file", lambda p: hashed.append(p) or sha256_file(p))
    for _ in range(3):
        assert ModelCache(tmp_path / "cache").verified(sha256) == path
    assert hashed == [], "its hash was taken when it came"
    os.utime(path, ns=(5, 5))
    for _ in range(3):
        assert ModelCache(tmp_path / "cache").verified(sha256) == path
    assert hashed == [path]
    assert cache.verified("0" * 64) is None


@pytest.mark.parametrize("damage", ["flipped", "flipped, old time", "cut", "empty"])
def test_a_damaged_file_is_none(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache, sha256, path = imported(tmp_path)
    content, time = path.read_bytes(), path.stat().st_mtime_ns
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    damaged = {"cut": content[:-100], "empty": b""}.get(damage, flipped)
    path.write_bytes(damaged)
    if "old time" in damage:
        os.utime(path, ns=(time, time))
    assert cache.verified(sha256) is None
    assert not path.exists()
    assert f"{len(damaged)} bytes with SHA256" in caplog.text


def test_a_damaged_file_may_go_while_it_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, sha256, path = imported(tmp_path)
    os.utime(path, ns=(5, 5))

    def gone(target: Path) -> str:
        target.unlink()  # by another thread that was faster
        return hashlib.sha256(target.read_bytes()).hexdigest()

    monkeypatch.setattr(cache_module, "sha256_file", gone)
    assert cache.verified(sha256) is None


def test_a_file_of_an_older_store_is_hashed_before_it_is_used(tmp_path: Path) -> None:
    cache = ModelCache(tmp_path)
    content = b"of an older store"
    good, bad = hashlib.sha256(content).hexdigest(), digest(1)
    for sha256 in (good, bad):
        cache.path(sha256).parent.mkdir(parents=True, exist_ok=True)
        cache.path(sha256).write_bytes(content)
    assert cache.verified(good) == cache.path(good)
    assert cache.verified(bad) is None


def test_bytes_reach_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().suffix}")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        if self.suffix == ".unchecked":
            events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    imported(tmp_path)
    assert events == ["sync .unchecked", "rename", "sync "]
