"""The file ``manifest.json``, which makes a directory an artifact."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from diffagent.errors import ArtifactError, DamagedArtifact
from diffagent.schemas.manifest import Manifest
from diffagent.store import latest

MANIFEST = "manifest.json"


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of an artifact's directory.

    Raises:
        DamagedArtifact: the manifest is missing or is not one of this version.
        ArtifactError: it cannot be read.
    """
    try:
        return Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedArtifact(
            f"no artifact in {str(directory)!r}: {describe_directory(directory)}"
        ) from None
    except OSError as error:
        raise ArtifactError(
            f"cannot read {str(directory / MANIFEST)!r}: {error.strerror}; check its permissions"
        ) from None
    except ValidationError as error:
        raise DamagedArtifact(
            f"{str(directory / MANIFEST)!r} is not a manifest of this version: "
            f"{error.errors()[0]['msg']}; delete the directory and run the stage again"
        ) from None


def describe_directory(directory: Path) -> str:
    """Describe a directory that a person named by mistake, with a remedy."""
    if not directory.is_dir():
        problem = "it is a file" if directory.exists() else "there is no such directory"
        return f"{problem}; give STORE/STAGE/NAME, as the runs print it, or STORE/STAGE/latest"
    if (directory / MANIFEST).exists():
        stage = read_manifest(directory).stage
        return f"it is an artifact of the stage {stage!r}; 'diffagent artifact list' shows others"
    artifacts = sorted(path.parent.name for path in directory.glob("*/" + MANIFEST))
    if not artifacts:
        return f"it has no {MANIFEST}; give STORE/STAGE/NAME, as the runs print it"
    name = latest.LATEST if latest.LATEST in artifacts else artifacts[0]
    return f"it holds artifacts of a stage; did you mean {str(directory / name)!r}?"
