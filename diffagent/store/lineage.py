"""The ancestors of an artifact, read from the manifests of its store."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from diffagent.errors import ArtifactError
from diffagent.schemas.manifest import InputRef
from diffagent.store import latest
from diffagent.store.artifact import Artifact, find_remote, open_artifact

#: Name of the input that holds earlier artifacts of the same stage: its history in the store.
PREVIOUS = "previous"


def find_parent(artifact: Artifact, parent: InputRef) -> Artifact | None:
    """Find the artifact that ``parent`` names in the same store; None when it was removed."""
    candidates = _candidates(artifact, parent)
    return next((c for c in candidates if c and c.content_digest == parent.content_digest), None)


def _candidates(artifact: Artifact, parent: InputRef) -> Iterator[Artifact | None]:
    """Yield the artifacts in the places where a parent may be, those on this disk first."""
    stage = artifact.path.resolve().parent.parent / parent.stage
    name = parent.identity[:16]
    yield _open(stage / name)
    # A refresh with new content renames the old artifact to IDENTITY.CONTENT.
    yield _open(stage / f"{name}.{parent.content_digest[:8]}")
    if artifact.remote:
        uri = f"{artifact.remote.rsplit('/', 2)[0]}/{parent.stage}/{name}"
        yield find_remote(uri, stage / name)


@functools.lru_cache(maxsize=4096)
def series_of(artifact: Artifact) -> str:
    """Return the series of an artifact (``diffagent.store.latest``).

    A manifest of an older version names no series: it is computed from the ancestors that are still
    in the store, and from the identities of the others.
    """
    manifest = artifact.manifest
    if manifest.series:
        return manifest.series
    parents = {
        name: [
            series_of(parent) if (parent := find_parent(artifact, ref)) else ref.identity
            for ref in refs
        ]
        for name, refs in manifest.inputs.items()
        if name != PREVIOUS
    }
    return latest.name_series(manifest.stage, manifest.config, parents)


def ancestors(artifact: Artifact) -> Iterator[Artifact]:
    """Yield the artifact and its ancestors that are still in the store, each once.

    Its history (earlier versions of itself) is not among them: see `PREVIOUS`.
    """
    seen: set[Path] = set()
    queue = [artifact]
    while queue:
        current = queue.pop(0)
        if current.path in seen:
            continue
        seen.add(current.path)
        yield current
        for name, refs in current.manifest.inputs.items():
            if name != PREVIOUS:
                queue += [parent for ref in refs if (parent := find_parent(current, ref))]


def lineage_lines(artifact: Artifact) -> list[str]:
    """Return the tree of parents, one per line; an artifact shown before is not expanded again."""
    lines: list[str] = []
    shown: set[str] = set()

    def add(depth: int, label: str, ref: InputRef, note: str) -> None:
        lines.append(f"{'  ' * depth}{label}{ref.stage} {ref.identity[:16]} {note}")

    def content(ref: InputRef) -> str:
        return f"(content {ref.content_digest[:16]})"

    def walk(current: Artifact, label: str, depth: int) -> None:
        is_repeated = current.identity in shown
        shown.add(current.identity)
        reference = current.reference
        add(depth, label, reference, f"{content(reference)}{' ...' if is_repeated else ''}")
        if is_repeated:
            return
        for name, refs in current.manifest.inputs.items():
            for ref in refs:
                parent = find_parent(current, ref)
                if parent is None:
                    add(depth + 1, f"{name}: ", ref, "(not in this store)")
                elif name == PREVIOUS:  # named, but not expanded
                    add(depth + 1, f"{name}: ", ref, content(ref))
                else:
                    walk(parent, f"{name}: ", depth + 1)

    walk(artifact, "", 0)
    return lines


def _open(directory: Path) -> Artifact | None:
    try:
        return open_artifact(directory)
    except ArtifactError:
        return None
