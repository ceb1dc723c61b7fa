"""Artifacts, the stages that make them, and the stores that keep them: the public names."""

from diffagent.store.artifact import Artifact, artifact_directory, open_artifact, verify_artifact
from diffagent.store.atomic_writes import atomic_file
from diffagent.store.digests import (
    canonical_json,
    files_digest,
    named_files,
    sha256_file,
)
from diffagent.store.lineage import PREVIOUS
from diffagent.store.manifest_file import MANIFEST, describe_directory, read_manifest
from diffagent.store.provenance import peak_memory_bytes
from diffagent.store.stage import Inputs, Progress, Stage, StageContext, StageResult, stage
from diffagent.store.store import Store, open_store

__all__ = [
    "MANIFEST",
    "PREVIOUS",
    "Artifact",
    "Inputs",
    "Progress",
    "Stage",
    "StageContext",
    "StageResult",
    "Store",
    "artifact_directory",
    "atomic_file",
    "canonical_json",
    "describe_directory",
    "files_digest",
    "named_files",
    "open_artifact",
    "open_store",
    "peak_memory_bytes",
    "read_manifest",
    "sha256_file",
    "stage",
    "verify_artifact",
]
