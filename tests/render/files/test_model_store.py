"""The model store: verified, atomic, shared, ahead of its time; folders before downloads."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import save

from diffagent.errors import CivitaiError, EarlyAccess, RenderError, ServerError
from diffagent.render.files.model_store import ModelStore

CONTENT = save({"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0)})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _weights(number: int, size: int = 1000) -> bytes:
    return save({"w": np.full(size, number, dtype=np.float32)})


def _file(content: bytes, **fields: Any) -> File:
    return File(sha256=_sha256(content), size_bytes=len(content), **fields)


@dataclass(frozen=True)
class File:
    model: str = "Model"
    air: str = "urn:air:sd1:checkpoint:civitai:1@1"
    download_path: str = "/api/download/models/1"
    sha256: str | None = hashlib.sha256(CONTENT).hexdigest()
    size_bytes: int | None = len(CONTENT)


class Client:
    """Gives bytes, slowly; counts."""

    def __init__(self, *contents: bytes) -> None:
        self.contents = {_sha256(content): content for content in contents or (CONTENT,)}
        self.calls = 0
        self.now = self.most = 0
        self.lock = threading.Lock()

    def download(
        self, url: str, path: Path, *, sha256: str, on_bytes: Any, **expected: Any
    ) -> None:
        with self.lock:
            self.calls += 1
            self.now += 1
            self.most = max(self.most, self.now)
        content = self.contents[sha256.lower()]
        try:
            for half in (content[: len(content) // 2], content):
                path.write_bytes(half)
                time.sleep(0.05)
                on_bytes(len(content) // 2)
        finally:
            with self.lock:
                self.now -= 1


def test_a_file_is_fetched_once_and_named_by_its_content(tmp_path: Path) -> None:
    client = Client()
    store = ModelStore(tmp_path, client)
    path = store.fetch(File())
    assert path == store.fetch(File(sha256=File.sha256 and File.sha256.upper()))
    assert client.calls == 1
    assert path.read_bytes() == CONTENT
    assert path.relative_to(tmp_path).as_posix() == f"{path.stem[:2]}/{File.sha256}.safetensors"


def test_concurrent_fetches_share_one_download(tmp_path: Path) -> None:
    client = Client()
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(ModelStore(tmp_path, client).fetch(File())))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.calls == 1
    assert {path.read_bytes() for path in paths} == {CONTENT}
    assert len(paths) == 4


def left(directory: Path) -> list[str]:
    """Files of the store but its locks."""
    found = (p for p in directory.rglob("*") if p.is_file() and p.suffix != ".lock")
    return sorted(p.name for p in found if p.parent.name != "in-use")


def test_what_the_client_refuses_leaves_nothing(tmp_path: Path) -> None:
    class Strict(Client):
        def download(self, url: str, path: Path, **expected: Any) -> None:
            expected.pop("on_bytes")
            assert (url, expected) == (
                "/api/download/models/1",
                {"sha256": File.sha256, "size_bytes": len(CONTENT)},
            )
            raise CivitaiError("SHA256 0 instead of 1")

    with pytest.raises(CivitaiError):
        ModelStore(tmp_path, Strict()).fetch(File())
    assert left(tmp_path) == []


def test_a_pickle_with_the_right_hash_is_refused(tmp_path: Path) -> None:
    pickle = b"\x80\x02}q\x00." + b"x" * 100
    store = ModelStore(tmp_path, Client(pickle))
    with pytest.raises(RenderError, match="pickle") as refused:
        store.fetch(File(sha256=hashlib.sha256(pickle).hexdigest()))
    assert refused.value.reason == "bad-model-file"
    assert left(tmp_path) == []


@pytest.mark.parametrize("sha256", [None, "", "../" * 21 + "x", "g" * 64])
def test_only_hashes_become_paths(tmp_path: Path, sha256: str | None) -> None:
    with pytest.raises(RenderError, match="not a SHA256"):
        ModelStore(tmp_path, Client()).fetch(File(sha256=sha256))


def test_weights_with_nan_are_refused_and_not_kept(tmp_path: Path) -> None:
    content = save({"w": np.array([1, np.nan], dtype=np.float32)})
    with pytest.raises(RenderError, match="holds NaN"):
        ModelStore(tmp_path, Client(content)).fetch(_file(content))
    assert left(tmp_path) == []


def test_who_is_refused_is_named(tmp_path: Path) -> None:
    class Early(Client):
        def download(self, url: str, path: Path, **expected: Any) -> None:
            raise EarlyAccess("/api/download/models/1: 403 'Early Access: 2030-01-01'")

    with pytest.raises(EarlyAccess, match=r"'Ink': /api.*Early Access: 2030"):
        ModelStore(tmp_path, Early()).fetch(File(model="Ink"))


def test_downloads_at_once_are_bounded_over_all_stores_of_a_directory(tmp_path: Path) -> None:
    contents = [_weights(number) for number in range(5)]
    client = Client(*contents)
    with (
        ModelStore(tmp_path, client, max_downloads=2) as one,
        ModelStore(tmp_path, client, max_downloads=2) as other,
    ):
        futures = one.prefetch(map(_file, contents)) + other.prefetch(
            map(_file, reversed(contents))
        )
        for future in futures:
            future.result(timeout=30)
        assert client.calls == 5
        assert client.most == 2
        assert {one.fetch(_file(content)).read_bytes() for content in contents} == set(contents)
        assert client.calls == 5


def test_prefetching_returns_at_once_and_its_trouble_is_told_by_fetch(tmp_path: Path) -> None:
    pickle = b"\x80\x02}q\x00." + b"x" * 100
    client = Client(CONTENT, pickle)
    with ModelStore(tmp_path, client) as store:
        good, bad = store.prefetch([File(), _file(pickle)])
        assert not good.done()
        good.result(timeout=30), bad.result(timeout=30)
        assert store.fetch(File()).read_bytes() == CONTENT
        with pytest.raises(RenderError, match="pickle"):
            store.fetch(_file(pickle))
        assert client.calls == 3


def test_closing_breaks_prefetching_off_and_what_came_stays(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Client):
        def download(self, url: str, path: Path, *, on_bytes: Any, **_: Any) -> None:
            path.with_name(f"{path.name}.part").write_bytes(b"some")
            begun.set()
            go_on.wait(30)
            on_bytes(4)

    store = ModelStore(tmp_path, Slow(), max_downloads=1)
    first, second = store.prefetch([File(), _file(_weights(1))])
    assert begun.wait(10)
    store.close()  # does not wait
    assert second.cancelled() and not first.done()
    go_on.set()
    first.result(timeout=30)
    assert left(tmp_path) == [f"{File.sha256}.json", f"{File.sha256}.unchecked.part"]


def test_what_is_fetched_is_evicted_only_after_release(tmp_path: Path) -> None:
    contents = [_weights(number) for number in range(3)]
    first, second, third = map(_file, contents)
    with ModelStore(tmp_path, Client(*contents), max_bytes=2 * len(contents[0])) as store:
        paths = [store.fetch(file) for file in (first, second, third)]
        assert all(path.exists() for path in paths), "more than the limit, but all in use"
        store.release(second, second)
        again = store.fetch(first)  # twice in use now
        store.release(first)
        assert [file.sha256 for file in store.cache.make_room()] == [second.sha256]
        assert again.exists() and not paths[1].exists()
        store.release(first)
        assert store.fetch(second).exists()
        assert not again.exists()


def test_a_folder_is_read_in_place_and_only_files_of_the_size_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffagent.localcivitai.sources import local

    wanted, same_size, other = _weights(1), _weights(2), _weights(3, size=5000)
    install = tmp_path / "ComfyUI"
    for name, content in (
        ("main.py", b""),
        ("models/checkpoints/a.safetensors", same_size),
        ("models/loras/deep/b.safetensors", wanted),
        ("models/loras/c.safetensors", other),
        ("output/d.safetensors", wanted),
    ):
        (install / name).parent.mkdir(parents=True, exist_ok=True)
        (install / name).write_bytes(content)
    hashed: list[str] = []
    hash_file = local.hash_file
    monkeypatch.setattr(
        local, "hash_file", lambda path: hashed.append(path.name) or hash_file(path)
    )
    client = Client()
    before = {path: path.stat().st_mtime_ns for path in install.rglob("*")}
    for _ in range(2):
        with ModelStore(tmp_path / "store", client, folders=[install]) as store:
            path = store.fetch(_file(wanted))
            assert path == install / "models/loras/deep/b.safetensors"
            store.release(_file(wanted))
    assert hashed == ["a.safetensors", "b.safetensors"], "once, although the store was opened twice"
    assert client.calls == 0
    assert {path: path.stat().st_mtime_ns for path in install.rglob("*")} == before


def test_a_folder_s_file_with_nan_is_refused_by_name(tmp_path: Path) -> None:
    content = save({"w": np.array([np.inf], dtype=np.float16)})
    (tmp_path / "models").mkdir()
    (tmp_path / "models/broken.safetensors").write_bytes(content)
    for _ in range(2):  # the second time from the index
        store = ModelStore(tmp_path / "store", Client(), folders=[tmp_path / "models"])
        with pytest.raises(RenderError, match=r"broken.safetensors.*holds NaN or infinity"):
            store.fetch(_file(content))


def test_a_folder_s_file_that_went_is_not_asked_of_a_site(tmp_path: Path) -> None:
    client = Client()
    with pytest.raises(RenderError, match="'Ink' is in none of the model folders") as caught:
        ModelStore(tmp_path, client).fetch(File(model="Ink", download_path=""))
    assert caught.value.reason == "not-here"
    assert client.calls == 0 and left(tmp_path) == []


def test_a_site_that_is_away_is_waited_for_once(tmp_path: Path) -> None:
    """The second missing model fails at once, by its own name or the first one's."""

    class Away(Client):
        def download(self, *_: Any, **__: Any) -> None:
            self.calls += 1
            raise ServerError("gave up after 9 tries in 600 s", retry_after=7)

    client = Away()
    with ModelStore(tmp_path, client) as store:
        for content in (_weights(1), _weights(2)):
            with pytest.raises(ServerError, match="'Ink': gave up after 9 tries") as caught:
                store.fetch(_file(content, model="Ink"))
            assert caught.value.retry_after == 7
    assert client.calls == 1


def test_who_waits_for_another_download_hears_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ModelStore(tmp_path, Client()) as store:
        path = store.cache.download_lock(File().sha256 or "").lock_file
        other = FileLock(path, thread_local=False)
        other.acquire()
        timer = threading.Timer(3, other.release)
        timer.start()
        assert store.fetch(File(model="Ink")).read_bytes() == CONTENT
        timer.join()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "'Ink' waits for downloads of other processes" in warning
