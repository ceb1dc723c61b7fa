"""Who else gets the numbers of each step: TensorBoard, Weights & Biases, MLflow.

None of it is content of an agent. TensorBoard's files lie in the store beside the artefacts, in
``logs/STAGE/IDENTITY``; the other two take their settings, an address among them, from their own
environment variables. Nothing is sent anywhere unless ``runtime.report_to`` names it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffagent.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from diffagent.store import StageContext


@dataclass(frozen=True)
class ReportTo:
    """Receivers of a run's numbers.

    Attributes:
        names: 'tensorboard', 'wandb', 'mlflow'.
        directory: of TensorBoard's files.
    """

    names: tuple[str, ...]
    directory: Path

    @classmethod
    def of(cls, context: StageContext, stage: str) -> ReportTo:
        """The trackers that ``runtime.report_to`` names, for the run that fills ``context.out``.

        Raises:
            ConfigError: a package is not installed.
        """
        names = context.runtime.report_to
        for name in names:
            if importlib.util.find_spec(name) is None:
                package = "'diffagent[tensorboard]'" if name == "tensorboard" else name
                raise ConfigError(
                    f"runtime.report_to: {name} is not installed; pip install {package}, or leave "
                    "it out"
                )
        identity = context.out.name.removeprefix(".").removesuffix(".partial")
        return cls(names, context.runtime.local_store / "logs" / stage / identity)

    def callbacks(self) -> Iterator[TrainerCallback]:
        """Of transformers, one a receiver."""
        from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

        for name in self.names:
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                yield TensorBoardCallback(SummaryWriter(str(self.directory)))
            else:
                yield {"wandb": WandbCallback, "mlflow": MLflowCallback}[name]()
