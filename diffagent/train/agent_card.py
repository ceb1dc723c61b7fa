"""The model card of an agent, and its log of training: equal runs give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffagent.agent.lm.llm import AgentInfo
from diffagent.dabench.build.card import table
from diffagent.store import Artifact
from diffagent.train.rrhf_config import RRHFConfig
from diffagent.train.sft_config import SFTConfig

CARD, LOG, CURVES = "README.md", "training_log.jsonl", "loss.png"

#: Models whose weights the project makes or ships by a package -> licence by its SPDX identifier.
LICENCES = {"tiny-llama": "apache-2.0", "smollm2-135m": "apache-2.0"}

_TITLES = {
    "sft": "supervised fine-tuning (SFT) on pairs of prompt and API call",
    "rrhf": "training on ranked candidates (RRHF)",
}
_USE = """## Use

Give an answer on the command line, or in Python; `DIR` is this directory:

```sh
diffagent select "a lighthouse in a storm, oil painting" --agent DIR
```

```python
from diffagent.agent.lm.llm import load_agent
from diffagent.agent.llm_selector import LLM

agent = load_agent("DIR")
best, *others = LLM(agent).select(["a lighthouse in a storm, oil painting"], n=3)[0]
print(best.verdict.api, best.probability)
```

The directory is also one of transformers (`AutoModelForCausalLM`, `AutoTokenizer`): the prompt goes
into the template of `agent.json`, and the answer is one line of JSON."""
_LIMITS = """## Limits

* The agent names models of its own `catalogue.parquet` alone, as it was when the dataset was built.
* Unconstrained, it may write names that do not exist; `diffagent select` does not let it.
* People's prompts and choices on Civitai are what it learnt from, with their tastes and biases."""


@dataclass(frozen=True)
class TrainingFacts:
    """The facts that a card reports.

    Attributes:
        stage: 'sft' or 'rrhf'.
        info: of the agent.
        config: of the stage.
        dabench: the dataset.
        metrics: numbers of the run, without times.
        history: rows of the log, one a step.
    """

    stage: str
    info: AgentInfo
    config: SFTConfig | RRHFConfig
    dabench: Artifact
    metrics: Mapping[str, float | int]
    history: Sequence[Mapping[str, float | int]]


def write_card(out: Path, facts: TrainingFacts) -> None:
    """Write README.md, training_log.jsonl and loss.png into ``out``."""
    log = "".join(json.dumps(row) + "\n" for row in facts.history)
    (out / LOG).write_text(log, encoding="utf-8")
    _plot(out / CURVES, facts.history)
    sections = [
        _front_matter(facts.info),
        _summary(facts),
        _USE,
        _training(facts),
        _data(facts.dabench),
        _licence(facts.info),
        _LIMITS,
    ]
    (out / CARD).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _front_matter(info: AgentInfo) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": LICENCES.get(info.base_model, "other"),
        "tags": ["diffagent", "text-to-image", *info.trained_by],
    }
    if info.base_model not in LICENCES and "/" in info.base_model:
        fields["base_model"] = info.base_model.partition("@")[0]
    text: str = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _summary(facts: TrainingFacts) -> str:
    how = ", then ".join(_TITLES.get(stage, stage) for stage in facts.info.trained_by)
    return (
        f"# A DiffAgent after {' and '.join(s.upper() for s in facts.info.trained_by)}\n\n"
        "A language model that answers a prompt with a text-to-image API call: model, version, "
        "LoRAs and parameters (after DiffAgent, arXiv 2404.01342).\n\n"
        f"Its weights started from `{facts.info.base_model}`; what followed is {how}. It reads at "
        f"most {facts.info.max_length} tokens of prompt and answer."
    )


def _training(facts: TrainingFacts) -> str:
    settings = facts.config.model_dump(mode="json")
    if "model" in settings:
        settings["model"] = facts.info.base_model  # a path would name this machine
    numbers = [(name, _number(value)) for name, value in facts.metrics.items()]
    kept = ""
    if "kept_step" in facts.metrics:
        kept = (
            f"\n\nThe loss on prompts that were not trained on was measured every "
            f"{facts.config.eval_steps} steps; the weights are those of step "
            f"{facts.metrics['kept_step']}."
        )
    return "\n\n".join(
        [
            f"## Training\n\n![loss by step]({CURVES})\n\nEvery step is a line of `{LOG}`.{kept}",
            table(("figure", "value"), numbers),
            table(
                (f"setting of {facts.stage}", "value"),
                [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in settings.items()],
            ),
        ]
    )


def _data(dabench: Artifact) -> str:
    rows = dabench.manifest.rows
    splits = [f"{name} {rows[name]:,}" for name in ("train", "validation", "test") if name in rows]
    sizes = f" (pairs: {', '.join(splits)})" if splits else ""
    return (
        f"## Data\n\nA DABench with content digest `{dabench.content_digest}`{sizes}. Its card "
        "states where the pairs come from, how they were chosen and split, and under which terms; "
        "its catalogue lies here as `catalogue.parquet`."
    )


def _licence(info: AgentInfo) -> str:
    known = LICENCES.get(info.base_model)
    of_base = (
        f"`{info.base_model}` is under {known}."
        if known
        else f"The licence of `{info.base_model}` binds these weights; see its own card."
    )
    return (
        f"## Licence\n\n{of_base} The prompts and calls in the training data are their authors', "
        "published through Civitai's API; the models that an answer names have licences of their "
        "own, which the catalogue states where Civitai does."
    )


def _number(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _plot(path: Path, history: Sequence[Mapping[str, float | int]]) -> None:
    """Loss in training and on held-out prompts by step, and the learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, style in (
        ("loss", "training", {"linewidth": 1.0, "color": "#4c72b0"}),
        ("eval_loss", "held out", {"marker": "o", "color": "#c44e52"}),
    ):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="upper right")
    rates = axes.twinx()
    points = [(row["step"], row["learning_rate"]) for row in history if "learning_rate" in row]
    if points:
        rates.plot(*zip(*points, strict=True), color="#999999", linestyle=":", linewidth=1.0)
    rates.set_ylabel("learning rate (dotted)")
    figure.savefig(path, format="png", metadata={"Software": None})
