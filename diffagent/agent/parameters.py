"""How to call a chosen model for a prompt: no call is copied, every parameter is chosen.

The training calls vote for each parameter on its own, with a weight that grows with how alike
their prompt is and how close their model: the same version, the same model, the same base model.
So a version that is called often is called as people call it for such prompts, and one that
nobody called as its model or its base model is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from diffagent.agent.calls import FIELDS, Calls
from diffagent.agent.terms import Floats
from diffagent.dabench.catalogue import Catalogue, Entry

_POWER = 3  # of a similarity
#: Weight of a call: (whatever its prompt, and times its similarity to the power) for calls of the
#: same version, of the same model and of the same base model. Chosen on the validation split.
_LEVELS = ((0.02, 1.0), (0.005, 0.3), (1e-5, 0.3))


@dataclass(frozen=True)
class Parameters:
    """Chooses versions of models, and parameters for them."""

    calls: Calls
    catalogue: Catalogue

    @cached_property
    def _versions(self) -> dict[str, list[Entry]]:
        """Checkpoints of each model, most downloaded first."""
        found: dict[str, list[Entry]] = {}
        for entry in sorted(self.catalogue.checkpoints, key=lambda e: (-e.downloads, e.version_id)):
            found.setdefault(entry.model, []).append(entry)
        return found

    @cached_property
    def _version_codes(self) -> dict[tuple[str, str], int]:
        return {name: code for code, name in enumerate(self.calls.version[1])}

    @cached_property
    def _rows(self) -> dict[int, npt.NDArray[np.int64]]:
        """Rows of each model that is called."""
        order = np.argsort(self.calls.model, kind="stable")
        models, starts = np.unique(self.calls.model[order], return_index=True)
        parts = np.split(order, starts[1:])
        return dict(zip(models.tolist(), parts, strict=True))

    def version(self, model: int, similarity: Floats) -> Entry:
        """The version of a model to call.

        Args:
            model: number of ``calls.models``.
            similarity: (rows,) of the prompt to the training prompts.
        """
        entries = self._versions[self.calls.models[model]]
        rows = self._rows.get(model)
        if rows is None or len(entries) == 1:
            return entries[0]
        weight = self.calls.weight[rows] * (similarity[rows] ** _POWER + _LEVELS[0][0])
        mass = np.bincount(self.calls.version[0][rows], weights=weight)
        names = self.calls.version[1]
        by_votes = {names[code]: float(mass[code]) for code in np.flatnonzero(mass)}
        return max(entries, key=lambda e: by_votes.get((e.model, e.version), 0.0))

    def call(self, entry: Entry, similarity: Floats) -> dict[str, Any]:
        """The API's fields for a checkpoint, as ``schemas.api.T2IAPI`` takes them."""
        weight = self._weights(entry, similarity)
        chosen: dict[str, Any] = {}
        for name in FIELDS:
            codes, values = self.calls.fields[name]
            mass = np.bincount(codes, weights=weight, minlength=len(values))
            chosen[name] = _choose(name, mass, values)
        loras, embeddings = (
            [item for item in chosen[kind] if self._fits(item, kind, entry)]
            for kind in ("loras", "embeddings")
        )
        width, height = chosen["size"]
        params = {name: chosen[name] for name in ("sampler", "steps", "cfg_scale", "clip_skip")}
        return {
            "model": entry.model,
            "version": entry.version,
            "base_model": entry.base_model,
            "loras": loras,
            "embeddings": embeddings,
            "params": {**params, "width": width, "height": height},
            "negative_prompt": chosen["negative_prompt"],
        }

    def _weights(self, entry: Entry, similarity: Floats) -> npt.NDArray[np.float64]:
        calls = self.calls
        near = similarity.astype(np.float64) ** _POWER
        weight = np.zeros(len(near))
        base_codes, bases = calls.base_model
        same_base = base_codes == (bases.index((entry.base_model,)) if (entry.base_model,) in bases
                                   else -1)
        if not same_base.any():
            same_base[:] = True
        version = self._version_codes.get((entry.model, entry.version), -1)
        rows = self._rows.get(self._numbers[entry.model], np.zeros(0, np.int64))
        for (always, alike), chosen in zip(
            _LEVELS, (calls.version[0] == version, rows, same_base), strict=True
        ):
            weight[chosen] += always + alike * near[chosen]
        return weight * calls.weight

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.calls.models)}

    def _fits(self, item: dict[str, Any], kind: str, entry: Entry) -> bool:
        find = self.catalogue.lora if kind == "loras" else self.catalogue.embedding
        found = find(item["model"], item["version"])
        return found is not None and found.ecosystem == entry.ecosystem


def _choose(name: str, mass: npt.NDArray[np.float64], values: list[Any]) -> Any:
    """The value with the most votes; for steps and CFG with those of what is about the same."""
    if name in ("steps", "cfg_scale"):
        numbers = np.array(values, np.float64)
        room = 0.2 * numbers if name == "steps" else np.ones_like(numbers)
        # (i, j): whether i would do where j was meant; 20 % of what was meant.
        close = np.abs(numbers[:, None] - numbers) <= room + 1e-9
        mass = close @ mass + 1e-3 * mass
    return values[int(mass.argmax())]
