"""The stages ``sft`` and ``rrhf``, declared without the libraries that their bodies import.

A run that finds both in its store reads these declarations only: neither torch nor TRL is loaded.
"""

from __future__ import annotations

from diffagent.store.artifacts import StageContext, StageResult, named_files, stage
from diffagent.train.rrhf_config import RRHFConfig
from diffagent.train.sft_config import SFTConfig


@stage("sft", version=3, config=SFTConfig, files=lambda config: named_files(config.model))
def train_sft(config: SFTConfig, context: StageContext) -> StageResult:
    """DABench's train split -> agent directory."""
    from diffagent.train import sft

    return sft.train(config, context)


@stage("rrhf", version=3, config=RRHFConfig)
def train_rrhf(config: RRHFConfig, context: StageContext) -> StageResult:
    """SFT agent, candidates and their scores -> aligned agent directory."""
    from diffagent.train import rrhf

    return rrhf.train(config, context)
