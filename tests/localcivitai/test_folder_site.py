"""A folder of records behind the interface of a site: single records, files, and errors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from diffagent.civitai.client import CivitaiClient
from diffagent.civitai.pagination import walk_items
from diffagent.errors import (
    BadCursor,
    CivitaiError,
    ConfigError,
    DownloadsDisabled,
    EarlyAccess,
    NotFound,
)
from diffagent.localcivitai.faults import Faults
from diffagent.localcivitai.folder_site import FolderSite
from diffagent.localcivitai.replay import Replay
from diffagent.localcivitai.server import serve
from diffagent.schemas.payloads import unwrap_meta

WEIGHTS = b"\x08\0\0\0\0\0\0\0{}      " * 1000
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


def model(number: int, sha256: str = SHA256, **version: Any) -> dict[str, Any]:
    file = {"id": number, "name": "a.safetensors", "hashes": {"SHA256": sha256.upper()}}
    link = f"https://civitai.com/api/download/models/{number * 10}"
    record = {"id": number * 10, "name": "v", "baseModel": "SD 1.5", "downloadUrl": link}
    record |= {"settings": {"strength": 0.8}, "files": [file], "images": []}
    return {
        "id": number,
        "name": f"Model {number}",
        "type": "Checkpoint",
        "checkpointType": "Merge",
        "modelVersions": [record | version],
    }


def image(number: int) -> dict[str, Any]:
    return {
        "id": number,
        "url": f"{number}.png",
        "type": "image",
        "browsingLevel": 1,
        "modelVersionIds": [10],
        "meta": {"prompt": "a cat", "seed": 2**53 + number},
    }


@pytest.fixture
def replay(tmp_path: Path) -> Replay:
    (tmp_path / "weights").write_bytes(WEIGHTS)
    models = [
        model(1),
        model(2, "ab" * 32),
        model(3, availability="EarlyAccess"),
        model(4, usageControl="Generation"),
        model(5) | {"mode": "Archived"},
    ]
    return Replay.load(models, map(image, range(1, 8)), {SHA256: tmp_path / "weights"})


@pytest.fixture
def folder(replay: Replay) -> FolderSite:
    return FolderSite(lambda: replay)


@pytest.fixture
def client(replay: Replay) -> Iterator[CivitaiClient]:
    with serve(replay, Faults()) as url, CivitaiClient(url) as client:
        yield client


def on_site(record: Any, origin: str) -> Any:
    """A record with the links of ``origin`` as the folder has them."""
    if isinstance(record, dict):
        return {key: on_site(value, origin) for key, value in record.items()}
    if isinstance(record, list):
        return [on_site(value, origin) for value in record]
    return record.replace(origin, FolderSite.origin) if isinstance(record, str) else record


def test_answers_are_those_of_a_server(folder: FolderSite, client: CivitaiClient) -> None:
    for call in (
        lambda site: site.get_model(1),
        lambda site: site.get_version(10),
        lambda site: site.get_by_hash(SHA256[:64]),
        lambda site: site.get_ids_by_hash([SHA256, "cd" * 32]),
        lambda site: site.get_model_page(1),
        lambda site: [unwrap_meta(i["meta"]) for i in site.get_images(imageId=3).items],
    ):
        assert call(folder) == on_site(call(client), client.origin)
    for params in ({"sort": "Newest"}, {"sort": "Oldest"}, {"modelVersionId": 10}):
        walks = [
            [i["id"] for i in walk_items(partial(site.get_images, limit=2, **params))]
            for site in (folder, client)
        ]
        assert walks[0] == walks[1] and len(walks[0]) == 7
    assert folder.requests > 0


def test_errors_are_those_of_a_server(folder: FolderSite, client: CivitaiClient) -> None:
    for call, error in (
        (lambda site: site.get_model(9), NotFound),
        (lambda site: site.get_version(9), NotFound),
        (lambda site: site.get_by_hash("00" * 32), NotFound),
        (lambda site: site.get_model_page(9), NotFound),
        (lambda site: site.get_images("1|2|3", sort="Newest"), BadCursor),
        (lambda site: site.get_models("no cursor", sort="Newest"), BadCursor),
        (lambda site: site.get_models(types=["Nonsense"]), CivitaiError),
    ):
        for site in (folder, client):
            with pytest.raises(error):
                call(site)


@pytest.mark.parametrize(
    ("version", "error"),
    [(20, NotFound), (30, EarlyAccess), (40, DownloadsDisabled), (50, NotFound), (60, NotFound)],
    ids=["no file", "early access", "disabled", "archived", "unknown"],
)
def test_a_file_that_is_not_available_says_why(
    folder: FolderSite, client: CivitaiClient, tmp_path: Path, version: int, error: type
) -> None:
    for site in (folder, client):
        with pytest.raises(error):
            site.download(version, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_file_is_copied_whole_and_verified(folder: FolderSite, tmp_path: Path) -> None:
    steps: list[int] = []
    for url in (10, "/api/download/models/10", "https://civitai.red/api/download/models/10?fp=x"):
        if "fp" in str(url):
            with pytest.raises(NotFound):
                folder.download(url, tmp_path / "out")
            continue
        path = folder.download(url, tmp_path / "out", sha256=SHA256, on_bytes=steps.append)
        assert path.read_bytes() == WEIGHTS
    assert sum(steps) == 2 * len(WEIGHTS)
    for expected in ({"sha256": "ab" * 32}, {"size_bytes": 5}):
        with pytest.raises(CivitaiError, match="not the one expected"):
            folder.download(10, tmp_path / "other", **expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "weights"]
    for address in ("https://civitai.com\\@other/x", "https://other.org/api/download/models/10"):
        with pytest.raises(ConfigError):
            folder.download(address, tmp_path / "out")


def test_a_part_of_an_earlier_run_does_not_spoil_a_copy(folder: FolderSite, tmp_path: Path) -> None:
    (tmp_path / "out.part").write_bytes(b"left over")
    assert folder.download(10, tmp_path / "out", sha256=SHA256).read_bytes() == WEIGHTS


def test_records_are_read_when_the_first_is_requested() -> None:
    def load() -> Replay:
        raise ConfigError("read")

    folder = FolderSite(load)
    with pytest.raises(ConfigError, match="read"):
        folder.get_model(1)
