"""Lines of a damaged part: those that are given back are right, whatever the damage."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.crawl import snapshot
from diffagent.crawl.salvage import good_lines

LINES = [b'{"id":%d,"text":"%s"}' % (n, b"abc" * (n % 7)) for n in range(300)]


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("part") / "part.jsonl.gz"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "_MEMBER_BYTES", 500)
        snapshot.write_lines(path, (line + b"\n" for line in LINES))
    assert gzip.decompress(path.read_bytes()).splitlines() == LINES
    return path


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_byte_costs_the_lines_of_its_member_and_falsifies_none(
    part: Path, data: st.DataObject
) -> None:
    content = bytearray(part.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = part.with_name("damaged.gz")
    damaged.write_bytes(content)
    found = list(good_lines(damaged, cut_short=False))
    assert found == [line for line in LINES if line in set(found)], "in order, and no other"
    assert len(LINES) - len(found) <= 2 * 30, "about twenty lines a member"


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_part_that_is_cut_keeps_its_beginning(part: Path, data: st.DataObject) -> None:
    content = part.read_bytes()
    damaged = part.with_name("cut.gz")
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    found = list(good_lines(damaged, cut_short=True))
    assert found == LINES[: len(found)]


def test_one_long_member_that_is_cut_keeps_its_beginning(tmp_path: Path) -> None:
    """As parts were written before they had several members."""
    text = b"".join(line + b"\n" for line in LINES)
    (tmp_path / "old.gz").write_bytes(gzip.compress(text, mtime=0)[:-200])
    found = list(good_lines(tmp_path / "old.gz", cut_short=True))
    assert 100 < len(found) < len(LINES) and found == LINES[: len(found)]
