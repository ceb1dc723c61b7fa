"""The parts of the crawler that need no server: journal, walks, HTML, rate, answers."""

from __future__ import annotations

import gzip
import threading
import time
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.civitai.address import is_loopback, is_site_host, origin_of
from diffagent.civitai.lenient_json import parse_json
from diffagent.civitai.page_html import page_settings
from diffagent.civitai.pagination import ListingWalk, Page, next_cursor, walk_items
from diffagent.civitai.ratelimit import TokenBucket
from diffagent.crawl.journal import Journal, JournalEntry
from diffagent.crawl.memory import CrawlMemory, SnapshotInventory
from diffagent.crawl.snapshot import summarise, write_snapshot
from diffagent.crawl.snapshot_index import (
    FingerprintTable,
    creator_of,
    downloads_of,
    has_meta,
    image_fingerprint,
)
from diffagent.errors import (
    ArtifactError,
    BadCursor,
    CivitaiError,
    ConfigError,
    SchemaError,
    ServerError,
)
from diffagent.localcivitai.listing import StaleCursor, decode_cursor, encode_cursor
from diffagent.localcivitai.site import open_site
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.t2i.text import plain_text
from tests.conftest import file_size_limit

# --- journal ---

ENTRIES = [
    JournalEntry({"page": n}, [("images", n * 10 + i, b'{"id":%d}' % i) for i in range(n)])
    for n in range(6)
]


def read(path) -> list[JournalEntry]:
    with Journal(path) as journal:
        return list(journal.read())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_journal_cut_anywhere_keeps_its_whole_pages(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "journal.gz"
    ends = [0]
    with Journal(path) as journal:
        for entry in ENTRIES:
            journal.append(entry.state, entry.items)
            ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    garbage = data.draw(st.binary(max_size=20))
    path.write_bytes(path.read_bytes()[:cut] + garbage)
    whole = sum(end <= cut for end in ends) - 1
    if cut in ends:  # behind a whole page anything but a whole page is cut off
        assert read(path) == ENTRIES[:whole]
    kept = len(read(path))
    assert kept == whole or garbage
    with Journal(path) as journal:
        list(journal.read())
        journal.append({"page": "next"}, [])
    assert read(path)[-1] == JournalEntry({"page": "next"}, [])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_journal_keeps_its_good_beginning(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "journal.gz"
    ends = []
    with Journal(path) as journal:
        for entry in ENTRIES:
            journal.append(entry.state, entry.items)
            ends.append(path.stat().st_size)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    before = sum(end <= place for end in ends)
    kept = read(path)
    # A header may hold a time or a system that nobody reads: then nothing is damaged.
    assert kept in (ENTRIES[:before], ENTRIES)
    assert read(path) == kept


def test_damage_is_told_and_what_is_cut_off_set_aside(tmp_path, caplog):
    path = tmp_path / "journal.gz"
    with Journal(path) as journal:
        for entry in ENTRIES:
            journal.append(entry.state, entry.items)
    content = path.read_bytes()
    half = len(content) // 2
    damaged = content[:half] + bytes(10) + content[half + 10 :]
    for number in (1, 2):
        path.write_bytes(damaged)
        with Journal(path, aside=tmp_path / "crawl") as journal:
            assert 0 < len(list(journal.read())) < len(ENTRIES)
        aside = tmp_path / f"crawl.journal-damaged-{number}"
        assert path.read_bytes() + aside.read_bytes() == damaged
        assert str(aside) in caplog.text
    assert "is damaged behind byte" in caplog.text and "are good and stay" in caplog.text


@pytest.mark.parametrize("text", [b"no state", b'{"a":1}\nmodels\tx\t{}', b'{"a":1}\nmodels'])
def test_a_journal_of_something_else_names_the_file_and_the_remedy(tmp_path, text):
    path = tmp_path / "journal.gz"
    path.write_bytes(gzip.compress(text + b"\n"))
    with pytest.raises(ArtifactError, match=r"journal\.gz.*move it away.*begins again"):
        read(path)
    assert path.exists()


def test_a_damaged_memory_says_so_and_knows_nothing(tmp_path, caplog):
    path = tmp_path / "x.memory.json"
    assert CrawlMemory.load(path) == CrawlMemory()
    inventory = SnapshotInventory(
        {"images": {0: array("q", [5, 9]), 2: array("q", [7])}}, [{"id": 1}], [{}]
    )
    memory = CrawlMemory({3: "2026-01-01"}, inventory, {"requests": 1})
    memory.save(path)
    assert CrawlMemory.load(path) == memory
    assert set(inventory) == {("images", 5, 0), ("images", 9, 0), ("images", 7, 2)}
    path.write_bytes(path.read_bytes()[:-20])
    assert CrawlMemory.load(path) == CrawlMemory()
    assert "x.memory.json cannot be read" in caplog.text


@pytest.mark.parametrize("room", [0, 1, 40])
def test_a_page_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path, monkeypatch, room):
    path = tmp_path / "journal.gz"
    with Journal(path) as journal:
        journal.append({"page": 1}, ENTRIES[3].items)
        full = path.stat().st_size
        with file_size_limit(full + room), pytest.raises(OSError, match="large"):
            journal.append({"page": 2}, ENTRIES[5].items)
        assert path.stat().st_size == full
        journal.append({"page": 3}, ())
    assert [entry.state["page"] for entry in read(path)] == [1, 3]


def test_a_journal_is_readable_by_gzip(tmp_path):
    with Journal(tmp_path / "j.gz") as journal:
        journal.append({"a": 1}, [("models", 7, b"{}")])
        journal.append({"b": 2}, [])
    assert gzip.decompress((tmp_path / "j.gz").read_bytes()) == b'{"a":1}\nmodels\t7\t{}\n{"b":2}\n'


@given(st.permutations(range(40)), st.integers(1, 7))
@settings(deadline=None, max_examples=20)
def test_a_snapshot_forgets_order_pages_and_repeats(tmp_path_factory, order, size):
    out = tmp_path_factory.mktemp("snapshot")
    items = [("images", n, b'{"id":%d}' % n) for n in [*order, *order[:5]]]
    pages = [JournalEntry({}, items[i : i + size]) for i in range(0, len(items), size)]
    write_snapshot(out, pages, {"images": range(40)}, out / "scratch")
    found = summarise(out)
    assert found.rows == {"images": 40, "models": 0, "pages": 0}
    assert found.drift == {"image.url: missing": 40}
    lines = gzip.decompress((out / "images/part-00000.jsonl.gz").read_bytes()).splitlines()
    assert lines == [b'{"id":%d}' % n for n in range(40)]
    reference = tmp_path_factory.mktemp("reference")
    write_snapshot(
        reference, [JournalEntry({}, sorted(items))], {"images": range(40)}, out / "scratch"
    )
    assert summarise(reference).digest == found.digest
    assert (reference / "images/part-00000.jsonl.gz").read_bytes() == (
        out / "images/part-00000.jsonl.gz"
    ).read_bytes()


# --- walks ---


def listing(pages: dict[str | None, tuple[list[int], str | None]]):
    def fetch(cursor: str | None) -> Page:
        if cursor not in pages:
            raise BadCursor(f"no {cursor}")
        ids, following = pages[cursor]
        return Page.of([{"id": i} for i in ids], following)

    return fetch


def test_an_empty_page_is_not_the_end_and_repeats_are_dropped():
    fetch = listing({None: ([1, 2], "a"), "a": ([], "b"), "b": ([2, 3], None)})
    assert [i["id"] for i in walk_items(fetch)] == [1, 2, 3]


def test_a_circle_ends_a_walk_as_incomplete():
    fetch = listing({None: ([1], "a"), "a": ([2], "b"), "b": ([3], "a")})
    pages = ListingWalk(fetch)
    assert [page.items[0]["id"] for page in pages] == [1, 2, 3]
    assert not pages.complete
    with pytest.raises(CivitaiError, match="circle"):
        list(walk_items(fetch))


def test_cursors_that_are_always_stale_end_with_an_error():
    with pytest.raises(CivitaiError, match="stale"):
        list(walk_items(listing({None: ([1], "a")})))


def test_entries_that_are_no_items_are_counted():
    page = Page.of([{"id": 1}, {"id": "2"}, None, {"id": True}, {"id": "x2"}, {}], None)
    assert [item["id"] for item in page.items] == [1, 2]
    assert (page.malformed, page.text_ids) == (4, 1)


@given(st.tuples(st.integers(), st.integers()), st.integers(0, 3), st.booleans())
def test_cursors_are_read_as_they_were_written(key, epoch, empty):
    cursor = encode_cursor(key, epoch, empty=empty)
    assert decode_cursor(cursor, 2, epoch) == (key, empty)
    with pytest.raises(StaleCursor):
        decode_cursor(cursor, 2, epoch + 1)


def test_the_next_cursor_is_found_in_either_field():
    assert next_cursor({"nextCursor": 12}) == "12"
    assert next_cursor({"nextPage": "https://civitai.red/x?cursor=a%7Cb&limit=2"}) == "a|b"
    assert next_cursor({"nextPage": "https://civitai.red/x?page=2"}) is None
    assert next_cursor({"nextCursor": None, "totalPages": 5}) is None


# --- answers ---


def test_json_that_the_site_may_write_is_read():
    assert parse_json(b'{"a": NaN, "b": "\\ud83d"}', "x") == {"a": None, "b": "?"}
    for broken in (b'{"a": [1, 2', b"<html>", b""):
        with pytest.raises(ServerError):
            parse_json(broken, "x")


def test_hosts():
    assert origin_of("HTTPS://Civitai.com/api?x=1") == "https://civitai.com"
    assert origin_of("http://[::1]:80/x") == "http://[::1]:80"
    assert is_site_host("civitai.red")
    assert is_site_host("api.civitai.com")
    assert not is_site_host("notcivitai.com")
    assert is_loopback("http://127.0.0.1:1")
    assert not is_loopback("https://civitai.com")


# --- what is known ---


def test_marks_are_found_by_id():
    marks = FingerprintTable()
    for ident in (3, 7, 2**40):
        marks.add(ident, ident % 2**64)
    assert [marks.get(i) for i in (3, 7, 2**40, 1, 5, 2**41)] == [3, 7, 2**40, None, None, None]
    assert 7 in marks and 8 not in marks and list(marks) == [3, 7, 2**40]


@pytest.mark.parametrize("stats", [None, {}, {"downloadCount": None}, [], {"downloadCount": "x"}])
def test_creators_may_hide_their_counts_and_themselves(stats):
    assert downloads_of({"id": 1, "stats": stats}) == 0
    assert creator_of({"id": 1, "creator": None}) is None
    assert creator_of({"id": 1}) is None


def test_fingerprints_tell_metadata_and_leave_counters_out():
    image = {"id": 1, "url": "x", "stats": {"likeCount": 1}, "meta": {"prompt": "a"}}
    mark = image_fingerprint(image)
    assert has_meta(mark)
    assert image_fingerprint({**image, "stats": {}}) == mark
    assert image_fingerprint({**image, "url": "y"}) != mark
    assert not has_meta(image_fingerprint({**image, "meta": None}))


# --- HTML ---


def test_plain_text_keeps_paragraphs_and_drops_markup():
    html = (
        "<h2>Use</h2><p>Sampler: <strong>Euler&nbsp;a</strong>,<br>20 steps</p><script>x()</script>"
    )
    assert plain_text(html) == "Use\nSampler: Euler a,\n20 steps"
    assert plain_text("<ul><li>one</li><li>two</li></ul>") == "one\ntwo"
    assert plain_text(None) == plain_text("") == ""
    assert plain_text("<p>never closed") == "never closed"


def test_a_page_without_state_names_the_problem():
    with pytest.raises(SchemaError, match="__NEXT_DATA__"):
        page_settings("<html></html>")
    with pytest.raises(SchemaError, match="getById"):
        page_settings('<script id="__NEXT_DATA__">{"props":{}}</script>')


# --- rate and site ---


def test_threads_share_a_bucket():
    bucket = TokenBucket(rate=50.0)
    started = time.monotonic()
    threads = [threading.Thread(target=bucket.acquire) for _ in range(11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started >= 0.2


def test_whoever_is_told_to_wait_makes_all_wait():
    bucket = TokenBucket(rate=None)
    bucket.acquire()
    bucket.hold(0.1)
    started = time.monotonic()
    assert bucket.acquire() > 0.05
    assert time.monotonic() - started >= 0.05
    assert bucket.acquire() < 0.05


def test_an_address_is_its_own_site():
    with open_site("https://civitai.red/", RuntimeConfig()) as site:
        assert site.origin == "https://civitai.red"


def test_a_web_site_takes_no_faults():
    runtime = RuntimeConfig(site={"faults": "flaky"})
    with pytest.raises(ConfigError, match="faults=none"), open_site("https://x.org", runtime):
        pass


@pytest.mark.parametrize("site", ["civitai.com", "dump:/nowhere/at/all", ""])
def test_what_is_no_site_is_refused(site):
    with pytest.raises(ConfigError, match="neither"), open_site(site, RuntimeConfig()):
        pass
