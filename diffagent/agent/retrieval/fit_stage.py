"""The stage ``fit``: fits a selector on a DABench and keeps it in the store."""

from __future__ import annotations

import time

from diffagent.agent.retrieval.encoder import MINILM, TransformerEncoder
from diffagent.agent.retrieval.fit_config import FitConfig, FittedSelector
from diffagent.agent.retrieval.fitting import (
    RECIPES,
    encode_rows,
    fit,
    load_selector,
    save_selector,
)
from diffagent.agent.retrieval.ranked import Ranked
from diffagent.agent.retrieval.training_calls import read_rows
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import Artifact, StageContext, StageResult, stage
from diffagent.t2i.catalogue import Catalogue


@stage("fit", version=1, config=FitConfig)
def fit_selector(config: FitConfig, context: StageContext) -> StageResult:
    """Fit a selector on the input ``dabench``; `load_selector` reads the artifact."""
    dabench = context.one("dabench").path
    rows, catalogue = read_rows(dabench), Catalogue.load(dabench)
    encoder = TransformerEncoder(config.encoder, context.runtime.device) if config.encoder else None
    train, validation = (rows.filter(split=split) for split in ("train", "validation"))
    started = time.perf_counter()
    vectors = encode_rows(encoder, train, validation, catalogue) if encoder else None
    encoded_at = time.perf_counter()
    fitted = fit(config, train, validation, catalogue, encoded=(encoder, vectors))
    save_selector(fitted, config, context.out)
    seconds = {"encode": encoded_at - started, "fit": time.perf_counter() - encoded_at}
    return StageResult(rows={"train": train.height}, metrics={"seconds": seconds})


def fitted_selector(
    name: FittedSelector,
    dabench: Artifact,
    runtime: RuntimeConfig,
    encoder: str = "",
    seed: int = 0,
) -> Ranked:
    """Returns the fitted selector of a DABench, from the store when it was fitted before."""
    fit_config = FitConfig(selector=name, encoder=resolve_encoder(encoder, name), seed=seed)
    artifact = fit_selector.run(fit_config, {"dabench": [dabench]}, runtime)
    return load_selector(artifact.local(), runtime.device)


def resolve_encoder(name: str, selector: str) -> str:
    """Returns the encoder of a selector: ``name``, MiniLM where it needs one, or '' for none."""
    plain, embedded = RECIPES[selector]
    return (name or ("" if plain else MINILM)) if embedded else ""
