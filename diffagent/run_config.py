"""Configuration of a whole run: its sections, and the reading and checking of a YAML file."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError, model_validator

from diffagent.agent.sample_config import SamplingConfig
from diffagent.crawl.crawl_config import CrawlConfig
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.filter.filter_config import FilterConfig
from diffagent.errors import ConfigError
from diffagent.evaluation.evaluate_config import EvaluationConfig
from diffagent.render.render_config import RenderConfig
from diffagent.rewards.judge_config import JudgesConfig
from diffagent.rewards.score_config import RewardsConfig
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.section import Section
from diffagent.schemas.yaml_file import YamlError, read_yaml
from diffagent.train.rrhf_config import RRHFConfig
from diffagent.train.sft_config import SFTConfig


class RunConfig(Section):
    """Settings of a run, a section for each stage."""

    crawl: CrawlConfig = CrawlConfig()
    filters: FilterConfig = FilterConfig()
    dabench: DABenchConfig = DABenchConfig()
    sft: SFTConfig = SFTConfig()
    sampling: SamplingConfig = SamplingConfig()
    render: RenderConfig = RenderConfig()
    rewards: RewardsConfig
    rrhf: RRHFConfig = RRHFConfig()
    judges: JudgesConfig = JudgesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.dabench.validation_fraction + self.dabench.test_fraction >= 1:
            raise ValueError("dabench: validation_fraction + test_fraction must be below 1")
        if self.rewards.unify == "zscore" and not self.rewards.reference:
            raise ValueError("rewards.unify 'zscore' needs rewards.reference")
        return self


def _shown(value: Any) -> str:
    """Return the beginning of a value for a message, without credentials of a URI."""
    text = re.sub("//.*@", "//***@", repr(value))
    text = re.sub("(//[^?]*[?]).*", r"\1***", text)
    return f"{text:.60}"


def _key(loc: tuple[int | str, ...]) -> str:
    """Return the dotted key of a location, on one line."""
    names = (
        part if re.fullmatch(r"[\w-]{1,60}", part) else f"{part!r:.60}" for part in map(str, loc)
    )
    return ".".join(names) or "config"


#: Former keys of ``runtime`` -> their names in its sections.
_RENAMED = {
    "cache": "cache.directory",
    "models": "models.directory",
    "cache_gb": "cache.max_gb",
    "models_max_gb": "models.max_gb",
    "model_folders": "models.folders",
    "max_downloads": "models.max_downloads",
    "workers": "tasks.workers",
    "runner": "tasks.runner",
    "ray_gpus": "tasks.ray_gpus",
    "lost_after_seconds": "tasks.lost_after_seconds",
    "stage_timeout_seconds": "tasks.timeout_seconds",
    "requests_per_second": "site.requests_per_second",
    "crawl_threads": "site.threads",
    "crawl_budget_seconds": "site.budget_seconds",
    "refresh_share": "site.refresh_share",
    "reconcile": "site.reconcile",
    "faults": "site.faults",
    "render_url": "render_server.url",
    "render_timeout_seconds": "render_server.timeout_seconds",
    "server_models": "render_server.models",
    "decode_threads": "scoring.decode_threads",
    "compile_scorers": "scoring.compile",
}


def _suggestion(error: Any) -> str:
    """Return a hint at the key that an unknown key was meant to be; '' for other errors."""
    *parents, key = error["loc"] or ("",)
    renamed = _RENAMED.get(str(key)) if parents == ["runtime"] else None
    if renamed and error["type"] in ("extra_forbidden", "model_type"):
        return f"; it is now 'runtime.{renamed}'"
    if error["type"] != "extra_forbidden":
        return ""
    names = _keys_at(RunConfig, [part for part in parents if isinstance(part, str)])
    similar = difflib.get_close_matches(str(key), names, n=1, cutoff=0.6)
    if similar:
        return f"; did you mean {similar[0]!r}?"
    same_name = [
        f"{section}.{key}"
        for section in RunConfig.model_fields
        if key in _keys_at(RunConfig, [section])
    ]
    if same_name:
        return f"; did you mean {same_name[0]!r}?"
    return f"; choose one of: {', '.join(sorted(names))}" if names else ""


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the names of the settings of the section at ``path``; none if it is no section."""
    for name in path:
        field = model.model_fields.get(name)
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not models:
            return []
        model = models[0]
    return list(model.model_fields)


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a YAML file.

    Args:
        path: the file.
        overrides: dotted keys ('runtime.store') -> values that replace those of the file.

    Raises:
        ConfigError: the file is missing or not YAML, or settings are wrong (all are listed).
    """
    try:
        data = read_yaml(Path(path))
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except (YamlError, ValueError) as error:  # a path with a NUL is a ValueError
        raise ConfigError(f"{str(path)!r} cannot be read as YAML: {error}") from None
    if data is not None and not isinstance(data, dict):
        raise ConfigError(f"{str(path)!r} needs sections at its top level, got {data!r:.80}")
    return configure(data or {}, overrides, path)


def configure(
    data: dict[str, Any], overrides: dict[str, Any] | None, path: str | Path
) -> RunConfig:
    """Check settings.

    Args:
        data: section -> settings; ``overrides`` change it in place.
        overrides: dotted keys -> values.
        path: name of the settings in messages.

    Raises:
        ConfigError: settings are wrong (all are listed).
    """
    for dotted, value in (overrides or {}).items():
        *parents, leaf = dotted.split(".")
        target = data
        for key in parents:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise ConfigError(f"cannot set {dotted!r}: {key!r} is {_shown(target)}")
        target[leaf] = value
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        problems = [
            f"  {_key(e['loc'])}: {e['msg']} (got {_shown(e['input'])}){_suggestion(e)}"
            for e in error.errors()
        ]
        raise ConfigError(
            "\n".join([f"{str(path)!r}: {len(problems)} problem(s)", *problems])
        ) from None
