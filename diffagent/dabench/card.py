"""The dataset card: what is in DABench, where it comes from, what was left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffagent.dabench.catalogue import Catalogue
from schemas.config import DABenchConfig
from schemas.manifest import Funnel

#: Licences of base models; what is trained from one is bound by its terms.
BASE_LICENCES: Mapping[str, str] = {
    "SD 1.4": "CreativeML Open RAIL-M",
    "SD 1.5": "CreativeML Open RAIL-M",
    "SD 2.0": "CreativeML Open RAIL++-M",
    "SD 2.0 768": "CreativeML Open RAIL++-M",
    "SD 2.1": "CreativeML Open RAIL++-M",
    "SD 2.1 768": "CreativeML Open RAIL++-M",
    "SDXL 1.0": "CreativeML Open RAIL++-M",
}

_TITLES: Mapping[str, str] = {
    "model_type": "Model type",
    "base_model": "Base model",
    "nsfw": "NSFW content",
    "file_availability": "File availability",
}
_MAX_BARS = 15


@dataclass(frozen=True)
class CardFacts:
    """What the card reports beside the catalogue.

    ``random_rows`` and ``exposed``: rows of each random split, and how many of its test rows have
    a near-duplicate, post- or series-mate in its train split. ``base_models``: rows of each base
    model in each split.
    """

    rows: Mapping[str, int]
    models_used: int
    groups: int
    largest_group: int
    random_rows: Mapping[str, int]
    exposed: int
    base_models: Mapping[str, Mapping[str, int]]
    distributions: Mapping[str, Any]
    funnels: tuple[Funnel, ...]
    config: DABenchConfig


def write_card(out: Path, facts: CardFacts, catalogue: Catalogue) -> None:
    """Write ``README.md`` and ``plots/*.png`` into ``out``; equal facts give equal bytes."""
    for name, distribution in facts.distributions.items():
        _plot(out / "plots" / f"{name}.png", _TITLES[name], distribution)
    sections = [
        _front_matter(facts),
        _summary(facts, catalogue),
        "## How pairs were chosen\n\nEvery item seen is kept or dropped for exactly one reason.",
        *(_funnel(funnel) for funnel in facts.funnels),
        _source(facts),
        _splits(facts),
        _licences(catalogue),
        _LIMITS,
    ]
    (out / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers are set to the right."""
    lines = [list(map(_cell, row)) for row in rows]
    numeric = [bool(lines) and all(_is_number(row[i]) for row in lines) for i in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), rule, *lines])


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _is_number(text: str) -> bool:
    return text.rstrip(" %").replace(",", "").replace(".", "").isdigit()


def _share(count: int, total: int) -> str:
    return f"{100 * count / max(total, 1):.1f} %"


def _front_matter(facts: CardFacts) -> str:
    files = "\n".join(
        f"      - split: {split}\n        path: data/{split}-*.parquet" for split in facts.rows
    )
    return (
        "---\npretty_name: DABench\nlicense: other\nlanguage: en\ntask_categories:\n"
        "  - text-generation\nconfigs:\n  - config_name: default\n    data_files:\n"
        f"{files}\n---"
    )


def _summary(facts: CardFacts, catalogue: Catalogue) -> str:
    total = sum(facts.rows.values())
    rows = [(split, count, _share(count, total)) for split, count in facts.rows.items()]
    return f"""# DABench

(instruction, API) pairs for learning which text-to-image model to call, and how, for a prompt: \
after DiffAgent (CVPR 2024, arXiv 2404.01342), built from answers of Civitai's public API. The \
instruction is a user's prompt; the API names a checkpoint and its version, LoRAs and embeddings \
with weights, sampler, steps, CFG scale, size, CLIP skip, seed and negative prompt.

{table(("split", "pairs", "share"), [*rows, ("all", total, "100.0 %")])}

The pairs call {facts.models_used:,} models. The catalogue holds \
{len(catalogue.checkpoints):,} checkpoint versions, {len(catalogue.loras):,} LoRA versions and \
{len(catalogue.embeddings):,} embeddings (textual inversions) that may be called. \
`catalogue.parquet` and `mapping/models.json` lead from a name to ids, AIR, SHA256 and download \
path (relative to the site); `mapping/samplers.json` from a sampler to its diffusers scheduler."""


def _funnel(funnel: Funnel) -> str:
    rows: list[tuple[object, ...]] = [
        (step.filter, step.reason, step.dropped, _share(step.dropped, funnel.seen))
        for step in funnel.steps
    ]
    return (
        f"### {funnel.unit.capitalize()}\n\n"
        f"{funnel.seen:,} seen, {funnel.kept:,} kept ({_share(funnel.kept, funnel.seen)}).\n\n"
        + table(("filter", "dropped because", "dropped", "of those seen"), rows)
    )


def _source(facts: CardFacts) -> str:
    parts = [
        "## The source\n\nDistributions of everything seen, before any filter (the four of the "
        "paper's figure 2)."
    ]
    for name, distribution in facts.distributions.items():
        counts, unit = distribution["counts"], distribution["unit"]
        total = sum(counts.values())
        rows = [(label, count, _share(count, total)) for label, count in counts.items()]
        parts.append(
            f"### {_TITLES[name]}\n\n![{_TITLES[name]}](plots/{name}.png)\n\n"
            + table((_TITLES[name].lower(), unit, "share"), rows)
        )
    return "\n\n".join(parts)


def _splits(facts: CardFacts) -> str:
    config = facts.config
    total = sum(facts.rows.values())
    chance = facts.random_rows
    kinds = [
        (split, n, _share(n, total), chance[split], _share(chance[split], total))
        for split, n in facts.rows.items()
    ]
    strata = [
        (name, sum(counts.values()), *(_share(n, sum(counts.values())) for n in counts.values()))
        for name, counts in facts.base_models.items()
    ]
    return f"""## Splits

Prompts that are alike (Jaccard similarity of their word pairs of \
{config.near_duplicate_jaccard:g} or more), pictures of one post, and one creator's series \
({config.series_jaccard:g} or more) form a group, transitively, and a group lies in one split: \
{facts.groups:,} groups, the largest of {facts.largest_group:,} pairs. What a refresh adds joins \
the oldest group that it touches; what is tied to two splits is left out, so no pair ever moves \
to another split. A hash of the group's first id and the seed {config.seed} decides for new \
groups, stratified by base model: test {config.test_fraction:g}, validation \
{config.validation_fraction:g}, the rest train.

The column `random_split` holds, for comparison, the split by a hash of the pair's own id. Of its \
{chance["test"]:,} test pairs {facts.exposed:,} ({_share(facts.exposed, chance["test"])}) have a \
near-duplicate, a picture of their post or of their series in its train split; of those of the \
leak-free split none has.

{table(("split", "leak-free", "share", "random", "share"), kinds)}

{table(("base model", "pairs", *facts.rows), strata)}"""


def _licences(catalogue: Catalogue) -> str:
    uses: Counter[str] = Counter()
    for entry in catalogue.entries:
        allowed = entry.allow_commercial_use
        uses["not stated" if allowed is None else ", ".join(allowed) or "none"] += 1
    bases = Counter(entry.base_model for entry in catalogue.entries)
    return f"""## Licences

Each model has its creator's terms; the columns `allow_commercial_use`, `allow_derivatives` and \
`allow_no_credit` of the catalogue are what the site stated when it was read. Prompts are their \
users'. Check the terms of a model at its page before using it.

{table(("commercial use allowed", "model versions"), _by_count(uses))}

{
        table(
            ("base model", "its licence", "model versions"),
            [
                (name, BASE_LICENCES.get(name, "see its publisher"), n)
                for name, n in _by_count(bases)
            ],
        )
    }"""


def _by_count(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


_LIMITS = """## Limits

- A pair says that a person made and published a picture this way, not that it is the best way.
- The checkpoint comes from the site's own ids, a file's hash or a name (`resolved_via`). \
`confidence` is the probability that it is that version, as measured on showcases of creators; \
`candidates` has every version that it may be.
- LoRAs and embeddings that could not be resolved, or that the filters dropped, are missing from \
the API; `loras_dropped` and `embeddings_dropped` count them. An embedding that the metadata does \
not prove is a word of the prompt, and stays one. Hypernetworks, ControlNet, upscaling and \
inpainting steps are not represented.
- The size is the one the sampler ran at, before upscaling. Where the metadata has none, the \
picture's own size stands in.
- NSFW filters rely on the flags of the site; what is flagged wrongly passes. Prompts are as \
their users wrote them.
- Popular models, anime and portraits of women are strongly overrepresented, as on the site."""


def _plot(path: Path, title: str, distribution: Mapping[str, Any]) -> None:
    """Horizontal bars, largest first, the tail summed up; the same bytes for the same counts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    items = list(distribution["counts"].items())
    shown, rest = items[:_MAX_BARS], items[_MAX_BARS:]
    if rest:
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    labels = [label for label, _ in reversed(shown)]
    values = [count for _, count in reversed(shown)]
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(shown)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = axes.barh(range(len(values)), values, color="#3b6ea5")
    axes.bar_label(bars, labels=[f" {value:,}" for value in values], fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xlabel(distribution["unit"])
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # the library's version is no content
