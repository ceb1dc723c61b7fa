"""How to call a chosen model for a prompt: no call is copied, every parameter is chosen.

The training calls vote for each parameter on its own, with a weight that grows with how alike
their prompt is and how close their model: the same version, the same model, the same base model.
So a version that is called often is called as people call it for such prompts, and one that
nobody called as its model or its base model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from diffagent.agent.retrieval.terms import Floats
from diffagent.agent.retrieval.training_calls import Calls
from diffagent.t2i.catalogue import Catalogue, Entry

Floats64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_POWER = 5  # of a similarity
#: Weight of a call: (whatever its prompt, times its similarity to the power), for calls of the
#: same version, of the same model and of the same base model, which add up. Chosen on the
#: validation split, where habits go with the prompt (and so its writer) more than with the model.
_VERSION, _MODEL, _BASE = (1e-5, 1.0), (1e-5, 1.0), (1e-9, 30.0)


@dataclass(frozen=True)
class Parameters:
    """What is known of how models are called."""

    calls: Calls
    catalogue: Catalogue

    def about(self, similarity: Floats) -> Advice:
        """Advice on one prompt, given its similarity to the training prompts: (rows,)."""
        near = similarity.astype(np.float64) ** _POWER
        return Advice(self, near, {})

    @cached_property
    def versions(self) -> dict[str, list[Entry]]:
        """Checkpoints of each model, most downloaded first."""
        found: dict[str, list[Entry]] = {}
        for entry in sorted(self.catalogue.checkpoints, key=lambda e: (-e.downloads, e.version_id)):
            found.setdefault(entry.model, []).append(entry)
        return found

    @cached_property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(models,) whether the catalogue has a checkpoint of each model of the calls."""
        return np.array([model in self.versions for model in self.calls.models])

    @cached_property
    def version_codes(self) -> dict[tuple[str, ...], int]:
        """(model, version) -> code of ``calls.version``."""
        return {tuple(name): code for code, name in enumerate(self.calls.version[1])}

    @cached_property
    def rows(self) -> dict[str, Ints]:
        """Rows of each model that is called."""
        order = np.argsort(self.calls.model, kind="stable")
        models, starts = np.unique(self.calls.model[order], return_index=True)
        parts = np.split(order, starts[1:])
        names = (self.calls.models[model] for model in models.tolist())
        return dict(zip(names, parts, strict=True))

    @cached_property
    def bases(self) -> dict[str, Ints]:
        """Rows of each base model that is called."""
        codes, names = self.calls.base_model
        return {name: np.flatnonzero(codes == code) for code, (name,) in enumerate(names)}

    def fits(self, item: dict[str, Any], kind: str, entry: Entry) -> bool:
        """Whether a LoRA or an embedding can be laid over a checkpoint."""
        find = self.catalogue.lora if kind == "loras" else self.catalogue.embedding
        found = find(item["model"], item["version"])
        return found is not None and found.ecosystem == entry.ecosystem


@dataclass(frozen=True)
class Advice:
    """Versions and parameters for one prompt.

    Attributes:
        known: what is known of the calls.
        near: (rows,) powers of the prompt's similarity to the training prompts.
        votes: base model -> field -> mass of its values; filled when first asked for.
    """

    known: Parameters
    near: Floats64
    votes: dict[str, dict[str, Floats64]]

    def version(self, model: str) -> Entry:
        """The version of a model to call; of one that nobody called the most downloaded."""
        entries = self.known.versions[model]
        rows = self.known.rows.get(model)
        if rows is None or len(entries) == 1:
            return entries[0]
        codes, names = self.known.calls.version
        mass = np.bincount(codes[rows], weights=self._weight(rows, _VERSION))
        votes = {names[code]: float(mass[code]) for code in np.flatnonzero(mass)}
        return max(entries, key=lambda e: votes.get((e.model, e.version), 0.0))

    def call(self, entry: Entry) -> dict[str, Any]:
        """The API for a checkpoint, as ``diffagent.schemas.api.T2IAPI`` takes it."""
        known = self.known
        rows = known.rows.get(entry.model, np.zeros(0, np.int64))
        code = known.version_codes.get((entry.model, entry.version), -1)
        weight = self._weight(rows, _MODEL)
        weight += self._weight(rows, _VERSION) * (known.calls.version[0][rows] == code)
        chosen: dict[str, Any] = {}
        for name, votes in self._base_votes(entry.base_model).items():
            codes, values = known.calls.fields[name]
            mass = votes + np.bincount(codes[rows], weights=weight, minlength=len(values))
            chosen[name] = _choose(name, mass, values)
        for kind in ("loras", "embeddings"):
            chosen[kind] = [item for item in chosen[kind] if known.fits(item, kind, entry)]
        width, height = chosen.pop("size")
        params = {name: chosen.pop(name) for name in ("sampler", "steps", "cfg_scale", "clip_skip")}
        return {
            "model": entry.model,
            "version": entry.version,
            "base_model": entry.base_model,
            "params": {**params, "width": width, "height": height},
            **chosen,
        }

    def _base_votes(self, base_model: str) -> dict[str, Floats64]:
        """Of calls of the base model; of all calls, if nobody called it."""
        if base_model not in self.votes:
            rows = self.known.bases.get(base_model, np.arange(len(self.near)))
            weight = self._weight(rows, _BASE)
            self.votes[base_model] = {
                name: np.bincount(codes[rows], weight, len(values)).astype(np.float64)
                for name, (codes, values) in self.known.calls.fields.items()
            }
        return self.votes[base_model]

    def _weight(self, rows: Ints, level: tuple[float, float]) -> Floats64:
        weight: Floats64 = self.known.calls.weight[rows] * (level[0] + level[1] * self.near[rows])
        return weight


def _choose(name: str, mass: Floats64, values: Sequence[Any]) -> Any:
    """The value with the most votes; for steps and CFG with those of what is about the same."""
    if name in ("steps", "cfg_scale"):
        numbers = np.array(values, np.float64)
        room = 0.2 * numbers if name == "steps" else np.ones_like(numbers)
        close = np.abs(numbers[:, None] - numbers) <= room + 1e-9  # (what to say, what was meant)
        mass = close @ mass + 1e-3 * mass
    return values[int(mass.argmax())]
