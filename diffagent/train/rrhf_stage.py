"""The stage ``rrhf``: aligns an agent with the rewards of its ranked candidates."""

from __future__ import annotations

from diffagent.store import StageContext, StageResult, stage
from diffagent.train.rrhf_config import RRHFConfig


@stage("rrhf", version=3, config=RRHFConfig)
def train_rrhf(config: RRHFConfig, context: StageContext) -> StageResult:
    """Train on the inputs ``dabench``, ``agent``, ``candidates`` and ``scores``.

    Writes an agent directory. The trainer is imported here, so that a run that finds the agent in
    its store loads neither torch nor TRL.
    """
    from diffagent.train import rrhf

    return rrhf.train(config, context)
