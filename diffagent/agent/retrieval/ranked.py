"""A mixture of experts as a selector: models by probability, each called as suits the prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffagent.agent.retrieval.experts import Evidence, Memory
from diffagent.agent.retrieval.mixture import Mixture, blocks
from diffagent.agent.retrieval.parameters import Parameters
from diffagent.agent.retrieval.terms import Floats
from diffagent.agent.selector import Choice
from diffagent.agent.verify import verify
from diffagent.schemas.api import T2IAPI
from diffagent.t2i.catalogue import Catalogue


@dataclass(frozen=True)
class Ranked:
    """Different models, likeliest first; ``probability`` is that of the model, calibrated."""

    memory: Memory
    mixture: Mixture
    parameters: Parameters

    @property
    def catalogue(self) -> Catalogue:
        """See `Selector`."""
        return self.parameters.catalogue

    def select(self, prompts: Sequence[str], n: int = 1) -> list[list[Choice]]:
        """See `Selector`."""
        return list(self.choices(prompts, n))

    def choices(
        self, prompts: Sequence[str], n: int = 1, vectors: Floats | None = None
    ) -> Iterator[list[Choice]]:
        """`select` for prompts whose vectors of the encoder may be known already."""
        for _, evidence in blocks(self.memory, prompts, vectors):
            chances = np.exp(self.mixture.log_probabilities(evidence))
            for row in range(len(evidence.prompts)):
                yield self._rank(chances[row], evidence, row, n)

    def only(self, names: Collection[tuple[str, str]]) -> Ranked:
        """The selector restricted to some (model, version), with probabilities among them.

        Raises:
            ConfigError: there is no checkpoint among them.
        """
        catalogue = self.parameters.catalogue.only(names)
        return replace(self, parameters=Parameters(self.parameters.calls, catalogue))

    def _rank(self, chances: Floats, evidence: Evidence, row: int, n: int) -> list[Choice]:
        usable = self.parameters.usable
        if not usable.all():
            chances = np.where(usable, chances, 0)
            chances = chances / max(float(chances.sum()), 1e-30)
            n = min(n, int(usable.sum()))
        kept = min(n, len(chances))
        best = np.argpartition(-chances, kept - 1)[:kept]
        advice = self.parameters.about(evidence.similarity("tokens")[row])
        found = []
        for model in best[np.lexsort((best, -chances[best]))].tolist():
            entry = advice.version(self.memory.calls.models[model])
            text = T2IAPI.model_validate(advice.call(entry)).to_json()
            verdict = verify(text, self.parameters.catalogue)
            found.append(Choice(text, verdict, float(chances[model])))
        return found
