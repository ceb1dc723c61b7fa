"""The stage ``sft``: fine-tunes a language model on the train split of a DABench."""

from __future__ import annotations

from diffagent.store import StageContext, StageResult, named_files, stage
from diffagent.train.sft_config import SFTConfig


@stage("sft", version=3, config=SFTConfig, files=lambda config: named_files(config.model))
def train_sft(config: SFTConfig, context: StageContext) -> StageResult:
    """Train on the input ``dabench`` and write an agent directory.

    The trainer is imported here, so that a run that finds the agent in its store loads neither
    torch nor TRL.
    """
    from diffagent.train import sft

    return sft.train(config, context)
