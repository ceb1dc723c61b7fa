"""Models of strangers: no code of theirs runs, no pickle is read, whatever stdin answers."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

import diffagent
from diffagent.agent.lm.llm import load_agent
from diffagent.agent.retrieval.encoder import TransformerEncoder
from diffagent.errors import ArtifactError, ConfigError, ScoreError, TrainingError
from diffagent.pretrained import load_model, load_tokenizer, split_revision
from diffagent.rewards.clip import ClipScorer
from diffagent.rewards.judges import PickScoreScorer
from diffagent.rewards.weight_files import hub_or_local
from diffagent.sandbox.files import SCORERS
from diffagent.train.sft import load_base
from diffagent.train.sft_config import SFTConfig
from tests.conftest import AgentRun

#: Code that a stranger's directory brings; it leaves a mark beside itself when it is run.
EVIL = """
import os, pathlib
pathlib.Path(os.environ["MARK"]).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **kwargs):
    return None
"""
CLASSES = {
    "AutoConfig": "EvilConfig",
    "AutoModelForCausalLM": "EvilModel",
    "AutoModel": "EvilModel",
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that strangers' code would write; standard input says yes to every question."""
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    answers = (tmp_path / "answers").open("w+")
    answers.write("y\n" * 20)
    answers.seek(0)
    monkeypatch.setattr(sys, "stdin", answers)
    return tmp_path / "mark"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hostile(source: Path, target: Path, how: str) -> Path:
    """A copy of an agent that wants to run code in one of the ways there are."""
    shutil.copytree(source, target)
    (target / "evil.py").write_text(EVIL)
    (target / "custom_generate").mkdir()
    (target / "custom_generate" / "generate.py").write_text(EVIL)
    auto_map = {kind: f"evil.{name}" for kind, name in CLASSES.items()}
    if "config" in how:
        edit(target / "config.json", model_type="evil", auto_map=auto_map)
    if "known" in how:  # its own code although transformers has the architecture
        edit(target / "config.json", auto_map=auto_map)
    if "tokenizer" in how:
        edit(
            target / "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
            tokenizer_class="EvilTokenizer",
        )
    return target


@pytest.mark.parametrize("how", ["config", "tokenizer", "config and tokenizer"])
def test_a_strangers_agent_runs_no_code(
    agent_run: AgentRun, tmp_path: Path, mark: Path, how: str
) -> None:
    path = hostile(agent_run.agent.path, tmp_path / "agent", how)
    with pytest.raises(ConfigError, match=r"Python code of its own \(auto_map\), which is never"):
        load_agent(path, "cpu")
    with pytest.raises((ConfigError, TrainingError)):
        load_base(SFTConfig(model=str(path)), [], torch.float32)
    with pytest.raises(ConfigError):
        TransformerEncoder(str(path))
    assert not mark.exists()


@pytest.mark.parametrize("how", ["known", "custom generate"])
def test_code_that_is_not_needed_is_passed_over(
    agent_run: AgentRun, tmp_path: Path, mark: Path, how: str
) -> None:
    path = hostile(agent_run.agent.path, tmp_path / "agent", how)
    agent = load_agent(path, "cpu")
    assert agent.generate(["a moon"]) == load_agent(agent_run.agent.path, "cpu").generate(
        ["a moon"]
    )
    assert not mark.exists()


def test_the_trap_is_one(agent_run: AgentRun, tmp_path: Path, mark: Path) -> None:
    """With transformers alone and a "y" the same directory does leave its mark."""
    path = hostile(agent_run.agent.path, tmp_path / "agent", "tokenizer")
    AutoTokenizer.from_pretrained(path)
    assert mark.read_text() == "ran"


def test_the_command_runs_no_code_when_a_prompt_is_y(
    agent_run: AgentRun, tmp_path: Path, mark: Path
) -> None:
    path = hostile(agent_run.agent.path, tmp_path / "agent", "config and tokenizer")
    (path / "manifest.json").unlink()  # a directory of a stranger, not of a store
    command = [sys.executable, "-m", "diffagent", "select", "-", "--unconstrained"]
    done = subprocess.run(
        [*command, "--agent", str(path)],
        input="y\na red star\n",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(diffagent.__file__).parents[1])},
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "which is never run" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not mark.exists()


def test_a_scorer_directory_runs_no_code(tmp_path: Path, mark: Path, agent_run: AgentRun) -> None:
    """open_clip would hand ``trust_remote_code`` of a configuration to transformers."""
    folder = tmp_path / "clip"
    shutil.copytree(SCORERS / "clip", folder)
    (folder / "bpe_vocabulary.txt.gz").unlink()
    (folder / "evil.py").write_text(EVIL)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(agent_run.agent.path / name, folder / name)
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
        tokenizer_class="EvilTokenizer",
    )
    config = json.loads((folder / "open_clip_config.json").read_text())
    for kwargs in ({"trust_remote_code": True}, {}):
        config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": kwargs}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises((ConfigError, ScoreError), match="which is never run"):
            ClipScorer.load(str(folder))
    assert not mark.exists()


def test_pickles_are_refused(agent_run: AgentRun, tmp_path: Path) -> None:
    path = tmp_path / "agent"
    shutil.copytree(agent_run.agent.path, path)
    (path / "model.safetensors").unlink()
    torch.save(
        load_agent(agent_run.agent.path, "cpu").model.state_dict(), path / "pytorch_model.bin"
    )
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        load_agent(path, "cpu")
    with pytest.raises(TrainingError, match="safetensors"):
        load_base(SFTConfig(model=str(path)), [], torch.float32)
    judge = tmp_path / "judge"
    CLIPTextModel(CLIPTextConfig(hidden_size=8, num_attention_heads=2)).config.save_pretrained(
        judge
    )
    torch.save({}, judge / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors only"):
        PickScoreScorer.load(str(judge))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "llama", "hidden_size": "many"}'),
        ("config.json", '{"model_type": "no-such-architecture"}'),
        ("config.json", '{"model_type": "clip_vision_model"}'),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "7"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
    ],
)
def test_a_damaged_agent_is_one_error(
    agent_run: AgentRun, tmp_path: Path, name: str, content: str
) -> None:
    path = tmp_path / "agent"
    shutil.copytree(agent_run.agent.path, path)
    (path / name).write_text(content)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_agent(path, "cpu")
    with pytest.raises(TrainingError, match="cannot load"):
        load_base(SFTConfig(model=str(path)), [], torch.float32)


def test_a_chat_template_cannot_leave_its_sandbox(agent_run: AgentRun, tmp_path: Path) -> None:
    from jinja2.exceptions import SecurityError

    path = tmp_path / "agent"
    shutil.copytree(agent_run.agent.path, path)
    (path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    agent = load_agent(path, "cpu")  # no template takes part in an answer
    assert agent.generate(["a moon"])[0][0].ended
    with pytest.raises(SecurityError):
        agent.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def test_a_revision_is_part_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_revision("gpt2") == ("gpt2", None)
    assert split_revision("org/model@v1.0") == ("org/model", "v1.0")
    (tmp_path / "a@b").mkdir()
    assert split_revision(tmp_path / "a@b") == (str(tmp_path / "a@b"), None)
    for wrong in ("model@", "@v1"):
        with pytest.raises(ConfigError, match="NAME@REVISION"):
            split_revision(wrong)

    calls: list[tuple[str, dict[str, Any]]] = []

    class Kind:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> None:
            calls.append((name, options))

    load_model(Kind, "org/model@abc")
    safe = {"revision": "abc", "trust_remote_code": False, "use_safetensors": True}
    assert calls == [("org/model", safe)]
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", Kind.from_pretrained)
    load_tokenizer("org/model@abc")
    assert calls[-1] == ("org/model", {"revision": "abc", "trust_remote_code": False})

    def download(name: str, file: str, *, revision: str | None) -> Path:
        calls.append((name, {"file": file, "revision": revision}))
        return Path(file)

    monkeypatch.setattr("diffagent.rewards.weight_files.hub_file", download)
    hub_or_local("xswu/HPSv2@1234", "w.pt")
    assert calls[-1] == ("xswu/HPSv2", {"file": "w.pt", "revision": "1234"})


def test_nothing_else_loads_models_of_strangers() -> None:
    """The calls beside `diffagent.pretrained` are of classes without code, on files of ours."""
    root = Path(diffagent.__file__).parent
    calls = {
        (path.relative_to(root).as_posix(), ast.unparse(node.func))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
    }
    assert calls == {
        ("pretrained.py", "kind.from_pretrained"),
        ("rewards/image_reward.py", "BertTokenizer.from_pretrained"),
        ("agent/lm/smollm2.py", "LlamaForCausalLM.from_pretrained"),
    }
