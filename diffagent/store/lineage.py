"""Where an artefact comes from, read from the manifests of its store alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from diffagent.errors import ArtifactError
from diffagent.schemas.manifest import InputRef
from diffagent.store import latest
from diffagent.store.artifacts import PREVIOUS, Artifact, find_in_store, open_artifact


def find_parent(artifact: Artifact, parent: InputRef) -> Artifact | None:
    """The artefact that ``parent`` names, in the same store; None when it is there no more."""
    stage = artifact.path.resolve().parent.parent / parent.stage
    name = parent.identity[:16]
    # A refresh that finds news sets the old artefact aside as IDENTITY.CONTENT.
    for directory in (stage / name, stage / f"{name}.{parent.content_digest[:8]}"):
        found = _open(directory)
        if found and found.content_digest == parent.content_digest:
            return found
    if artifact.remote:
        uri = f"{artifact.remote.rsplit('/', 2)[0]}/{parent.stage}/{name}"
        found = find_in_store(stage / name, uri)
        if found and found.content_digest == parent.content_digest:
            return found
    return None


@functools.lru_cache(maxsize=4096)
def series_of(artifact: Artifact) -> str:
    """The series of an artefact (``diffagent.store.latest``).

    A manifest from before there were series has none: it is made from the ancestors that are
    still in the store, and of others from the identity.
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
    return latest.series_of(manifest.stage, manifest.config, parents)


def ancestors(artifact: Artifact) -> Iterator[Artifact]:
    """The artefact and everything it was made from that is still in the store, each once.

    Its history (earlier versions of itself) is not among them: see `PREVIOUS`.
    """
    seen: set[Path] = set()
    waiting = [artifact]
    while waiting:
        current = waiting.pop(0)
        if current.path in seen:
            continue
        seen.add(current.path)
        yield current
        for name, refs in current.manifest.inputs.items():
            if name != PREVIOUS:
                waiting += [found for ref in refs if (found := find_parent(current, ref))]


def lineage_lines(artifact: Artifact) -> list[str]:
    """The tree of parents, a line each; what was shown before is not opened up again."""
    lines: list[str] = []
    shown: set[str] = set()

    def walk(current: Artifact, label: str, depth: int) -> None:
        again = current.identity in shown
        shown.add(current.identity)
        lines.append(
            f"{'  ' * depth}{label}{current.stage} {current.identity[:16]} "
            f"(content {current.content_digest[:16]}){' ...' if again else ''}"
        )
        if again:
            return
        for name, refs in current.manifest.inputs.items():
            for ref in refs:
                found = find_parent(current, ref)
                if found and name == PREVIOUS:  # named, and not opened up
                    lines.append(
                        f"{'  ' * (depth + 1)}{name}: {ref.stage} {ref.identity[:16]} "
                        f"(content {ref.content_digest[:16]})"
                    )
                elif found:
                    walk(found, f"{name}: ", depth + 1)
                else:
                    lines.append(
                        f"{'  ' * (depth + 1)}{name}: {ref.stage} {ref.identity[:16]} "
                        "(not in this store)"
                    )

    walk(artifact, "", 0)
    return lines


def _open(directory: Path) -> Artifact | None:
    try:
        return open_artifact(directory)
    except ArtifactError:
        return None
