"""What answers prompts on the command line: a trained agent, or what is fitted on a DABench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffagent.agent.selector import Selector
from diffagent.errors import ConfigError


def open_selector(
    agent: Path | None,
    dabench: Path | None,
    name: str,
    *,
    encoder: str,
    store: str,
    device: str,
    int8: bool = False,
    **options: Any,
) -> Selector:
    """The selector that the options name.

    Args:
        agent: directory of an agent; it goes before ``dabench``.
        dabench: directory of a DABench to fit ``name`` on, once: what was fitted is kept.
        name: of a fitted selector.
        encoder: sentence encoder of a fitted selector, '' for none.
        store: where what was fitted is kept, a directory or a URI.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        int8: an agent's weights in 8 bits.
        options: of ``diffagent.agent.llm_selector.LLM``.

    Raises:
        ConfigError: neither is given, or there is no such selector.
    """
    if agent is not None:
        from diffagent.agent import llm_selector
        from diffagent.agent.llm import load_agent

        return llm_selector.LLM(load_agent(agent, device, "int8" if int8 else "none"), **options)
    from diffagent.agent.fitting import FITTED
    from diffagent.agent.selectors import fitted_selector
    from diffagent.artifacts import open_artifact
    from schemas.config import RuntimeConfig

    if dabench is None:
        raise ConfigError("select needs --agent DIR, or --dabench DIR to learn from")
    for known in FITTED:
        if known == name:
            runtime = RuntimeConfig(store=store, device=device)
            return fitted_selector(known, open_artifact(dabench), runtime, encoder)
    raise ConfigError(f"--selector: {name!r} is none of {', '.join(FITTED)}")
