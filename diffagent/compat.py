"""Import of torchvision next to a CPU build of torch, which its wheel does not support.

`install` registers an import hook and does nothing more: no library is imported, and a fix is
applied at the moment when the module that needs it is imported. Call it before anything that
imports torchvision (transformers' image models, diffusers, open_clip, timm).

The wheel of torchvision is a CUDA build. Next to a CPU build of torch its compiled extension cannot
be loaded, and registering meta kernels for the operators that the extension should have declared
fails (``operator torchvision::nms does not exist``). When, and only when, the extension did not
load, the two operators are declared without an implementation: transforms and models work,
`torchvision.ops.nms` stays unavailable.

`python -m diffagent.compat`, the last step of `make install`, checks whether torchvision can be
imported in this environment. If not, it adds a .pth file by which every interpreter of the
environment registers the hook at its start, so that `import open_clip` or
`AutoModelForCausalLM.from_pretrained` work for users who never import diffagent.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

Fix = Callable[[ModuleType], AbstractContextManager[None]]


def install(fixes: Mapping[str, Fix] | None = None) -> None:
    """Registers the import hook. Calling it again does nothing.

    Args:
        fixes: module name -> context manager that surrounds its execution; in addition to
            torchvision's.
    """
    _FIXES.update(fixes or {})
    if not any(isinstance(finder, _FixingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FixingFinder())


#: One line, as site.py requires; silent if diffagent was uninstalled later.
_START_UP = (
    r'exec("try:\n from diffagent.compat import install\n install()\nexcept ImportError:\n pass")'
)


def register_at_startup(site_packages: Path) -> Path | None:
    """Makes every interpreter of an environment register the hook, if torchvision needs it.

    Args:
        site_packages: directory of this interpreter that gets the .pth file.

    Returns:
        The .pth file, or None if torchvision can be imported without it.
    """
    path = site_packages / "diffagent-torchvision.pth"
    path.unlink(missing_ok=True)
    check = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(check, capture_output=True, check=False).returncode == 0:
        return None
    path.write_text(f"import sys; {_START_UP}\n", encoding="utf-8")
    return path


class _FixingFinder(MetaPathFinder):
    """Finder that surrounds the execution of a module with its fix."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        fix = _FIXES.get(fullname)
        if fix is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _FixingLoader(spec.loader, fix)
                return spec
        return None


class _FixingLoader(Loader):
    def __init__(self, loader: Loader, fix: Fix) -> None:
        self._loader = loader
        self._fix = fix

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Some of these modules silence all warnings of the process during their import.
        with warnings.catch_warnings(), self._fix(module):
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        # importlib.resources, inspect and pkgutil use more than these two methods of a loader.
        return getattr(self._loader, name)


_LIBRARIES: list[Any] = []  # torch drops the operators of a Library that is garbage-collected


@contextmanager
def _declare_torchvision_operators(extension: ModuleType) -> Iterator[None]:
    yield
    if not extension._has_ops():
        from torch import library as torch_library

        library: Any = torch_library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


_FIXES: dict[str, Fix] = {"torchvision.extension": _declare_torchvision_operators}

if __name__ == "__main__":
    register_at_startup(Path(sysconfig.get_path("purelib")))
