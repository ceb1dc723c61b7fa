"""The model store: verified, atomic, shared; and the headers that it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from diffagent.errors import CivitaiError, RenderError
from diffagent.render.store import ModelStore, Tensor, read_header

CONTENT = save({"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0)})


@dataclass(frozen=True)
class File:
    model: str = "Model"
    download_path: str = "/api/download/models/1"
    sha256: str | None = hashlib.sha256(CONTENT).hexdigest()
    size_bytes: int | None = len(CONTENT)


class Client:
    """Gives bytes, slowly; counts."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.calls = 0

    def download(self, url: str, path: Path, **expected: Any) -> None:
        self.calls += 1
        path.write_bytes(self.content[: len(self.content) // 2])
        time.sleep(0.05)
        path.write_bytes(self.content)


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


def test_what_the_client_refuses_leaves_nothing(tmp_path: Path) -> None:
    class Strict(Client):
        def download(self, url: str, path: Path, **expected: Any) -> None:
            assert (url, expected) == (
                "/api/download/models/1",
                {"sha256": File.sha256, "size_bytes": len(CONTENT)},
            )
            raise CivitaiError("SHA256 0 instead of 1")

    with pytest.raises(CivitaiError):
        ModelStore(tmp_path, Strict()).fetch(File())
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_a_pickle_with_the_right_hash_is_refused(tmp_path: Path) -> None:
    pickle = b"\x80\x02}q\x00." + b"x" * 100
    store = ModelStore(tmp_path, Client(pickle))
    with pytest.raises(RenderError, match="pickle") as refused:
        store.fetch(File(sha256=hashlib.sha256(pickle).hexdigest()))
    assert refused.value.reason == "bad-model-file"
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]


@pytest.mark.parametrize("sha256", [None, "", "../" * 21 + "x", "g" * 64])
def test_only_hashes_become_paths(tmp_path: Path, sha256: str | None) -> None:
    with pytest.raises(RenderError, match="not a SHA256"):
        ModelStore(tmp_path, Client()).fetch(File(sha256=sha256))


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    assert read_header(path) == {"a.weight": Tensor("F32", (2, 3)), "b": Tensor("F64", (0,))}


def _file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def _entry(begin: int, end: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **other}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "header of 0 bytes"),
        (b"<!DOCTYPE html><html>", "a header of"),
        (_file({}, length=10**12), "a header of"),
        (_file({"a": _entry(0, 4)}, b"1234", length=500), "a header of"),
        (_file(b"{nonsense}"), "not JSON"),
        (_file(b"[" * 100_000), "not JSON"),
        (_file([1, 2]), "not an object"),
        (_file({"a": 1}), "no dtype"),
        (_file({"a": _entry(0, 4, dtype="OBJECT")}, b"1234"), "OBJECT"),
        (_file({"a": _entry(0, 4, shape=[-4])}, b"1234"), "shape"),
        (_file({"a": _entry(0, 4, shape=[True])}, b"1234"), "shape"),
        (_file({"a": _entry(0, 4, shape=[2**40, 2**40])}, b"1234"), "does not fill"),
        (_file({"a": _entry(-4, 0)}, b""), "does not fill"),
        (_file({"a": _entry(0, 4), "b": _entry(2, 6)}, b"123456"), "starts at 2"),
        (_file({"a": _entry(0, 4), "b": _entry(5, 6)}, b"123456"), "starts at 5"),
        (_file({"a": _entry(0, 4)}, b"123456"), "tensors of 4 bytes in data of 6"),
        (_file({"a": _entry(0, 8)}, b"1234"), "tensors of 8 bytes in data of 4"),
        (_file({"../../etc/passwd": _entry(0, 4)}, b"1234"), "path"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(RenderError, match=problem) as refused:
        read_header(path)
    assert refused.value.reason == "bad-model-file"


def test_a_zip_is_refused_by_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("data.pkl", b"\x80\x02.")
    with pytest.raises(RenderError, match="zip"):
        read_header(tmp_path / "x")


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_in_our_words(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "arbitrary"
    path.write_bytes(content)
    with pytest.raises(RenderError):
        read_header(path)


@given(st.integers(0, len(CONTENT) - 1), st.integers(1, 255))
def test_a_flipped_byte_never_escapes(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(CONTENT[:at] + bytes([CONTENT[at] ^ flip]) + CONTENT[at + 1 :])
    try:
        tensors = read_header(path)
    except RenderError:
        return
    assert sum(math.prod(tensor.shape) for tensor in tensors.values()) <= len(CONTENT)
