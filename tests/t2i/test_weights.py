"""Which files may be loaded: safetensors that tell the truth and hold numbers."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from diffagent.errors import RenderError
from diffagent.t2i.weights import (
    MAX_TENSORS,
    Tensor,
    _is_unread,
    check_weights,
    read_header,
    read_metadata,
    reading,
)

CONTENT = save({"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0)})


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
        (b"", "is empty"),
        (_file({}, length=10**12), "a header of"),
        (
            _file({"a": _entry(0, 4)}, b"1234", length=500),
            "cut off after 72 bytes, inside of its header",
        ),
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
        (_file({"a": _entry(0, 8)}, b"1234"), "cut off after 72 of 76 bytes"),
        (_file({"../../etc/passwd": _entry(0, 4)}, b"1234"), "path"),
        (_file({"..\\x": _entry(0, 4)}, b"1234"), "path"),
        (_file({"a\x00b": _entry(0, 4)}, b"1234"), "control"),
        (_file(b'{"a":1,"a":2}'), "twice"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises(RenderError, match=problem) as refused:
        read_header(path)
    assert refused.value.reason == "bad-model-file"


def test_a_zip_bomb_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(50_000_000))
    assert (tmp_path / "x").stat().st_size < 100_000
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


#: Bits of NaN and infinity in every type of floating point that is read.
NOT_NUMBERS = {
    "F8_E4M3": [0x7F, 0xFF],
    "F8_E5M2": [0x7C, 0x7E, 0xFC],
    "F16": [0x7C00, 0xFC00, 0x7E01],
    "BF16": [0x7F80, 0xFF80, 0x7FC1],
    "F32": [0x7F800000, 0xFF800000, 0x7FC00001],
    "F64": [0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000001],
}
WIDTH = {"F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4}


def _weights(dtype: str, bits: list[int], name: str = "unet.weight") -> bytes:
    width = WIDTH[dtype]
    data = b"".join(n.to_bytes(width, "little") for n in bits)
    entry = {"dtype": dtype, "shape": [len(bits)], "data_offsets": [3, 3 + len(data)]}
    return _file({"first": _entry(0, 3), name: entry}, b"abc" + data)


@pytest.mark.parametrize(
    ("dtype", "bits"), [(dtype, n) for dtype, found in NOT_NUMBERS.items() for n in found]
)
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, dtype: str, bits: int) -> None:
    path = tmp_path / "x"
    # The largest finite value of each type is one bit below infinity; 448 of F8_E4M3 below NaN.
    below = min(NOT_NUMBERS[dtype]) - 1
    path.write_bytes(_weights(dtype, [0, 1, below, below]))
    check_weights(path)
    for at in (0, 3):
        values = [0, 1, below, below]
        values[at] = bits
        path.write_bytes(_weights(dtype, values))
        with pytest.raises(RenderError, match=r"'unet.weight' holds NaN or infinity") as refused:
            check_weights(path)
        assert refused.value.reason == "bad-model-file"


def test_a_nan_at_the_end_of_many_blocks_is_found(tmp_path: Path) -> None:
    values = np.zeros(3 << 20, dtype=np.float16)
    (tmp_path / "x").write_bytes(save({"a": values}))
    check_weights(tmp_path / "x")
    values[-1] = np.nan
    (tmp_path / "x").write_bytes(save({"a": values}))
    with pytest.raises(RenderError, match="NaN"):
        check_weights(tmp_path / "x")


@pytest.mark.parametrize(
    "name", ["cond_stage_model.model.attn_mask", "sqrt_recip_alphas_cumprod", "lvlb_weights"]
)
def test_buffers_that_no_loader_reads_may_be_infinite(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").write_bytes(_weights("F32", [0xFF800000, 0], name))
    check_weights(tmp_path / "x")


def test_integers_have_no_nan(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(_weights("I32", [0x7FC00001]))
    check_weights(tmp_path / "x")


@pytest.mark.parametrize(
    "metadata",
    [5, "text", [1], True, {"a": 5}, {"a": None}, {"a": {}}, {"a": True}, {"a": ["x"]}],
)
def test_notes_that_are_no_texts_are_refused_with_that_reason(
    tmp_path: Path, metadata: Any
) -> None:
    path = tmp_path / "x"
    path.write_bytes(_file({"__metadata__": metadata, "a": _entry(0, 4)}, b"1234"))
    for read in (read_header, check_weights):
        with pytest.raises(RenderError, match=r"its __metadata__ (is|has)") as refused:
            read(path)
        assert refused.value.reason == "bad-model-file"


def test_what_only_the_library_objects_to_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(_file(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"))
    with pytest.raises(RenderError, match="refused by the safetensors library"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "git lfs pull"),
        (b"\n  <!doctype html><html lang=en>", "a web page.*logged in"),
        (b"<html><body>Too many requests</body></html>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "an XML answer"),
        (b'{"error":"Unauthorized","message":"log in"}', "JSON text"),
        (b"PK\x03\x04" + bytes(60), "a zip archive or a PyTorch pickle"),
        (b"\x80\x02}q\x00.........", "a pickle"),
        (b"GGUF\x03\x00\x00\x00\x24\x01\x00\x00", "a GGUF file.*safetensors"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "a gzip archive.*unpack it"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04" + bytes(30), "a 7z archive"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "a picture"),
        (b"Please log in to download this file.", "text, beginning with 'Please log in"),
        (bytes(4096), "begins with zeros.*download it again"),
        (b"", "is empty.*download it again"),
        (CONTENT[:20], "cut off after 20 bytes, inside of its header; download it again"),
        (CONTENT[:-5], "cut off after .* download it again"),
    ],
)  # fmt: skip
def test_a_broken_download_is_named_by_its_first_bytes(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(RenderError, match=problem) as refused:
        read_header(tmp_path / "x")
    assert refused.value.reason == "bad-model-file"
    assert "a header of" not in str(refused.value)


def test_headers_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb") as stream:
        stream.write((99_000_000).to_bytes(8, "little") + b"{")
        stream.truncate(99_000_100)
    tracemalloc.start()
    with pytest.raises(RenderError, match=r"header of 99000000 bytes is longer than"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    entry = json.dumps(_entry(0, 0))
    many = ",".join(f'"{n}":{entry}' for n in range(MAX_TENSORS + 1))
    path.write_bytes(_file(f"{{{many}}}".encode()))
    with pytest.raises(RenderError, match=f"more than {MAX_TENSORS} tensors"):
        read_header(path)
    path.write_bytes(_file(b'{"a":[' + b"[]," * 700_000 + b"0]}"))
    with pytest.raises(RenderError, match="more lists and objects"):
        read_header(path)
    path.write_bytes(_file({"a": _entry(0, 0, shape=[9_999_999_999] * 100_000)}))
    with pytest.raises(RenderError, match="of shape"):
        read_header(path)


def test_names_are_bounded_and_read_in_time_that_grows_with_their_size(tmp_path: Path) -> None:
    name = "alphas_cumprod" * 16_000  # 224 kB
    (tmp_path / "x").write_bytes(_weights("F32", [0], name))
    with pytest.raises(RenderError, match="a tensor name of 224000 characters") as refused:
        check_weights(tmp_path / "x")
    assert len(str(refused.value)) < 500

    def seconds(size: int) -> float:
        long = ("alphas_cumprod_posterior_" * size)[: size * 20]
        started = time.perf_counter()
        for _ in range(5):
            _is_unread(f"{long}.")
        return time.perf_counter() - started

    # A reader with the square of the size takes four times as long, from some size on seconds.
    assert seconds(80_000) < 10 * seconds(20_000) + 0.5


def test_any_exception_of_a_reader_belongs_to_the_file() -> None:
    class PanicException(BaseException):  # as Rust's readers raise it
        __module__ = "pyo3_runtime"

    for error in (
        KeyError("x"),
        OSError(5, "Input/output error"),
        RecursionError(),
        PanicException(),
    ):
        with (
            pytest.raises(RenderError, match="'ink' cannot be read") as refused,
            reading("ink", "cannot be read", "bad-lora"),
        ):
            raise error
        assert refused.value.reason == "bad-lora"
    for passing in (KeyboardInterrupt(), MemoryError(), RenderError("x", reason="nan")):
        with pytest.raises(type(passing)) as raised, reading("ink", "cannot be read"):
            raise passing
        assert raised.value is passing


def test_a_header_is_parsed_once_a_state_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(_file({"__metadata__": {"a": "1"}, "w": _entry(0, 4)}, b"1234"))
    read_metadata(path).clear()
    assert read_metadata(path) == {"a": "1"}
    path.write_bytes(_file({"__metadata__": {"a": "2"}, "w": _entry(0, 4)}, b"1234"))
    assert read_metadata(path) == {"a": "2"}
