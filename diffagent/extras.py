"""Extras: groups of optional packages, and the one error that names the missing one.

``pip install diffagent`` installs the dependencies of the dataset and of retrieval selection. Other
code imports its packages as usual, inside a function or in a leaf module. `install` adds a finder
to the end of Python's import path, which is reached only if a package is not installed. If a module
of this project imports the package, the finder raises `diffagent.errors.MissingExtra` with the
feature and its extra, e.g. for `import torch` in ``diffagent.render.diffusers.pipelines``::

    drawing pictures needs the package 'torch', which is not installed:
    pip install 'diffagent[render]'

The extra depends on the importing module, because several extras bring the same package. Other
projects' imports, such as a library's own check for torch, fail as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType

from diffagent.errors import MissingExtra

#: Package of this project -> (feature, extra). The first entry that matches decides.
FEATURES = {
    "diffagent.agent.retrieval": (
        "fitting this selector ('neighbours', 'bm25' and 'cards' need no extra)",
        "train",
    ),
    "diffagent.agent": ("running a language model or a text encoder", "train"),
    "diffagent.train": ("training", "train"),
    "diffagent.render": ("drawing pictures", "render"),
    "diffagent.t2i.quantised": ("drawing pictures", "render"),
    "diffagent.rewards": ("scoring pictures", "rewards"),
    "diffagent.localcivitai": ("serving over HTTP", "serve"),
    "diffagent.store.store_server": ("serving over HTTP", "serve"),
    "diffagent.webguard": ("serving over HTTP", "serve"),
    "diffagent.sandbox": ("the sandbox", "all"),
    "flows": ("running flows", "prefect"),
    "tasks": ("running flows", "prefect"),
    "diffagent": ("this command", "all"),
}
#: Packages that only extras install.
PACKAGES = frozenset(
    [
        *("accelerate", "datasets", "peft", "tokenizers", "torch", "transformers", "trl"),
        *("compel", "diffusers", "ftfy", "huggingface_hub", "open_clip", "timm", "torchvision"),
        *("prefect", "starlette", "uvicorn"),
    ]
)


def install() -> None:
    """Adds the finder to the import path. Calling it again does nothing."""
    if not any(isinstance(finder, _MissingPackageFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MissingPackageFinder())


class _MissingPackageFinder(MetaPathFinder):
    """Last finder of the import path; finds nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in PACKAGES and (feature := _importing_feature(sys._getframe(1))):
            name, extra = feature
            raise MissingExtra(
                f"{name} needs the package {fullname!r}, which is not installed: "
                f"pip install 'diffagent[{extra}]'"
            )
        return None


def _importing_feature(frame: FrameType | None) -> tuple[str, str] | None:
    """Returns the feature and extra of the importing module; None for another project's."""
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "importlib",
        "_frozen_importlib",
    ):
        frame = frame.f_back
    importer = frame.f_globals.get("__name__", "") if frame else ""
    return next(
        (
            feature
            for package, feature in FEATURES.items()
            if importer == package or importer.startswith(f"{package}.")
        ),
        None,
    )
