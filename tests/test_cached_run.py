"""A run that finds everything in its store loads no library that only building needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from diffagent import pipeline
from diffagent.run_config import load_config
from diffagent.store import Artifact
from tests.conftest import ROOT, sealed

_HEAVY = ("torch", "transformers", "trl", "peft", "diffusers", "datasets", "open_clip", "sklearn")


def test_an_all_cached_run_imports_neither_torch_nor_trl(tmp_path: Path) -> None:
    config = load_config(
        ROOT / "configs" / "sandbox.yaml",
        {"runtime.store": str(tmp_path), "sft.model": str(tmp_path / "base"), "rrhf.seed": 3},
    )
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights that the identity reads")
    done: dict[str, Artifact] = {}
    for node in pipeline.plan(config).values():
        stage = pipeline.load_stage(node)
        inputs = pipeline.node_inputs(node, done)
        directory = stage.directory(node.config, inputs, config.runtime)
        directory.mkdir(parents=True)
        (directory / "made.txt").write_text(node.key)
        done[node.key] = sealed(stage.name, directory)
    script = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from diffagent import pipeline\n"
        "from diffagent.run_config import RunConfig\n"
        "config = RunConfig.model_validate_json(sys.stdin.read())\n"
        "hits = []\n"
        "pipeline.run(config, on_done=lambda node, artifact, cached: hits.append(cached))\n"
        "print(json.dumps([hits, sorted(sys.modules)]))\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script],
        input=config.model_dump_json(),
        capture_output=True,
        text=True,
        check=True,
    )
    hits, modules = json.loads(child.stdout)
    assert hits == [True] * len(done) and len(done) > 30
    assert not {*_HEAVY} & {*modules}
