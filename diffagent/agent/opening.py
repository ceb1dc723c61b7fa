"""What answers prompts on the command line: an agent, what is fitted on a DABench, or both."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffagent.agent.selector import Selector
from diffagent.errors import ConfigError

if TYPE_CHECKING:
    from diffagent.agent.lm.llm import Quantization


def open_selector(
    agent: Path | None,
    dabench: Path | None,
    name: str,
    *,
    encoder: str,
    store: str,
    device: str,
    int8: bool = False,
    usable: Collection[tuple[str, str]] | None = None,
    **options: Any,
) -> Selector:
    """The selector that the options name.

    Args:
        agent: directory of an agent.
        dabench: directory of a DABench to fit ``name`` on, once: what was fitted is kept. With an
            agent too, ``name`` proposes and the agent chooses.
        name: of a fitted selector.
        encoder: sentence encoder of a fitted selector, '' for none.
        store: where what was fitted is kept, a directory or a URI.
        device: 'auto', 'cpu', 'cuda', 'mps'.
        int8: an agent's weights in 8 bits.
        usable: (model, version) of the models and LoRAs that may be chosen; None: all.
        options: of ``diffagent.agent.llm_selector.LLM``; an agent that chooses writes nothing.

    Raises:
        ConfigError: neither is given, there is no such selector, or it takes no such option.
    """
    quantization: Quantization = "int8" if int8 else "none"
    if agent is not None and dabench is None:
        from diffagent.agent import llm_selector
        from diffagent.agent.lm.llm import load_agent

        generates = options.get("constrained") is False
        writer = load_agent(agent, device, quantization, generates=generates)
        return llm_selector.LLM(writer if usable is None else writer.only(usable), **options)
    from diffagent.agent.retrieval.fit_stage import fitted_selector
    from diffagent.agent.retrieval.fitting import FITTED
    from diffagent.agent.retrieval.rerank_config import RerankConfig
    from diffagent.schemas.runtime import RuntimeConfig
    from diffagent.store import open_artifact

    if dabench is None:
        raise ConfigError("select needs --agent DIR, or --dabench DIR to learn from")
    if options.get("constrained") is False or options.get("negative_prompts") == "free":
        raise ConfigError(
            "--unconstrained and --free-negative-prompt are for an agent that writes its answers; "
            "leave out --dabench"
        )
    retrieval = next((known for known in FITTED if known == name), None)
    if retrieval is None:
        raise ConfigError(f"--selector: {name!r} is none of {', '.join(FITTED)}")
    runtime, data = RuntimeConfig(store=store, device=device), open_artifact(dabench)
    if agent is None:
        fitted = fitted_selector(retrieval, data, runtime, encoder)
        return fitted if usable is None else fitted.only(usable)
    from diffagent.agent.retrieval.rerank_stage import reranked_selector

    rerank = RerankConfig(retrieval=retrieval, encoder=encoder)
    reranked = reranked_selector(rerank, data, open_artifact(agent), runtime, quantization)
    return reranked if usable is None else reranked.only(usable)
