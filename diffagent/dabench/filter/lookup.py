"""Asking the site what a hash is that no listed file has."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from diffagent.civitai.site import Site
from diffagent.errors import NotFound
from diffagent.schemas.payloads import whole_number

log = logging.getLogger(__name__)


class SiteLookup:
    """The site's by-hash route, each hash asked once and every answer written down.

    The file of answers lies in the artefact: it is provenance, and a run that was interrupted
    takes its answers from there. At most ``limit`` hashes are looked up, in the order of the
    records; the others stay unknown.
    """

    def __init__(self, path: Path, site: Site, limit: int) -> None:
        self._path, self._site, self._limit = path, site, limit
        self._answers = _read(path)
        path.write_text("".join(map(_line, self._answers.items())), encoding="utf-8")

    def __call__(self, digest: str) -> int | None:
        """Id of the version that has a file with this hash, or None."""
        if digest in self._answers or len(self._answers) >= self._limit:
            return self._answers.get(digest)
        try:
            answer = whole_number(self._site.get_by_hash(digest).get("id"))
        except NotFound:
            answer = None
        self._answers[digest] = answer
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line((digest, answer)))
        if len(self._answers) == self._limit:
            log.warning("%d hashes looked up, the limit; the rest stay unknown", self._limit)
        return answer


def _line(answer: tuple[str, int | None]) -> str:
    return json.dumps({"hash": answer[0], "model_version_id": answer[1]}) + "\n"


def _read(path: Path) -> dict[str, int | None]:
    """The answers of an earlier run, up to a line that was cut short."""
    answers: dict[str, int | None] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        answers[row["hash"]] = row["model_version_id"]
    return answers
