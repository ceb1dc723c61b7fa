"""Compatibility of torchvision; each case has its own interpreter, as imports are global state."""

import subprocess
import sys
from pathlib import Path


def run(code: str) -> str:
    prelude = "import sys\nfrom diffagent.compat import install\ninstall()\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_install_imports_no_library_and_registers_one_hook():
    run(
        "before = list(sys.meta_path)\n"
        "install()\n"
        "assert sys.meta_path == before\n"
        "heavy = {'torch', 'torchvision', 'transformers', 'timm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )


def test_diffusers_and_open_clip_import_and_torchvision_resizes():
    out = run(
        "import open_clip, torch, torchvision\n"
        "from diffusers import StableDiffusionPipeline\n"
        "from torchvision.transforms.functional import resize\n"
        "print(tuple(resize(torch.zeros(3, 8, 4), [4]).shape))\n"
    )
    assert out.strip() == "(3, 8, 4)"


def test_operators_are_declared_only_where_the_extension_is_missing():
    run(
        "import torch, torchvision\n"
        "from diffagent import compat\n"
        "assert bool(compat._LIBRARIES) != torchvision.extension._has_ops()\n"
        "assert torch.ops.torchvision.nms is not None\n"
    )


def test_torchvision_imports_in_the_environment_without_diffagent():
    """An environment whose torchvision is broken gets the hook at start-up; a sound one nothing."""
    code = "import sys, torchvision; from transformers import CLIPModel, AutoModelForCausalLM"
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", env=environment)


def test_the_start_up_line_registers_the_hook_and_imports_nothing_heavy(tmp_path: Path):
    from diffagent.compat import _START_UP

    (tmp_path / "x.pth").write_text(f"import sys; {_START_UP}\n")
    code = (
        f"import site, sys; sys.path += {sys.path!r}; before = len(sys.meta_path)\n"
        f"site.addsitedir({str(tmp_path)!r})\n"
        "print(len(sys.meta_path) - before, 'torch' in sys.modules)\n"
    )
    isolated = [sys.executable, "-S", "-c", code]
    done = subprocess.run(isolated, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]  # of compat and of extras
