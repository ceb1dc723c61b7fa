"""The dataset card: what is in DABench, where it comes from, what was left out and why.

Names of models, base models and reasons are what strangers wrote: `literal` shows them as they are,
and a figure draws them as they are.
"""

from __future__ import annotations

import html
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
import yaml

from diffagent.dabench import columns
from diffagent.dabench.build.shard_config import DABenchConfig
from diffagent.dabench.tools.layout import one_line
from diffagent.localcivitai.sources import SOURCES
from diffagent.schemas.manifest import Funnel
from diffagent.schemas.tables import CATALOGUE, DABENCH
from diffagent.t2i.base_models import base_model_of
from diffagent.t2i.catalogue import SYNTHETIC, Catalogue

#: Kinds of sites. ``api``: an address that is not Civitai's.
Source = Literal["civitai", "api", "dump", "local", "release", "unknown"]

_FROM: Mapping[Source, str] = {
    "civitai": "built from answers of Civitai's public API",
    "api": "built from answers of a site whose API has the shape of Civitai's",
    "dump": "built from a dump of records in the shape of Civitai's public API",
    "local": "built from a folder of model files, their sidecars and the pictures next to them",
    "release": "built from instruction-API pairs in the layout of the authors' release",
    "unknown": "built from records in the shape of Civitai's public API",
}
#: Limits that hold for some sources.
_RATED = (
    "NSFW filters rely on the flags of the site; what is flagged wrongly passes. Prompts are as "
    "their users wrote them."
)
_POPULAR = (
    "Popular models, anime and portraits of women are strongly overrepresented, as on the site."
)
_LIMITS_OF: Mapping[Source, tuple[str, ...]] = {
    "civitai": (_RATED, _POPULAR),
    "api": (_RATED,),
    "dump": (_RATED, _POPULAR),
    "local": (
        "The pictures of a folder were rated by no site: they count as PG unless a sidecar or the "
        "model's flag states otherwise.",
    ),
    "release": ("A release states no levels, scans or licences.",),
    "unknown": (_RATED,),
}
_CIVITAI = re.compile(r"(.+\.)?civitai\.(com|green|red)")
_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
_SIZE_NAMES = ("1K", "10K", "100K", "1M", "10M", "100M")
#: Escapes that keep Markdown from taking a text for anything else.
_SPECIAL = re.compile(r"[\\`*~\[\]|$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
_MAX_NAME = 100
LICENCE_FILE = "LICENSE.md"

_TITLES: Mapping[str, str] = {
    "model_type": "Model type",
    "base_model": "Base model",
    "nsfw": "NSFW content",
    "file_availability": "File availability",
}
_MAX_BARS = 15
_MAX_LABEL = 40


@dataclass(frozen=True)
class CardFacts:
    """What the card reports beside the catalogue.

    ``about``: note of the source about itself, with its own ``source`` and ``limits``; or empty.
    ``random_rows`` and ``exposed``: rows of each random split, and how many of its test rows have
    a near-duplicate, post- or series-mate in its train split. ``base_models``: rows of each base
    model in each split.
    """

    rows: Mapping[str, int]
    models_used: int
    source: Source
    about: Mapping[str, Any]
    groups: int
    largest_group: int
    random_rows: Mapping[str, int]
    exposed: int
    base_models: Mapping[str, Mapping[str, int]]
    distributions: Mapping[str, Any]
    funnels: tuple[Funnel, ...]
    config: DABenchConfig


def write_card(out: Path, facts: CardFacts, catalogue: Catalogue) -> None:
    """Write ``README.md``, ``LICENSE.md`` and ``plots/*.png``; equal facts give equal bytes."""
    for name, distribution in facts.distributions.items():
        _plot(out / "plots" / f"{name}.png", _TITLES[name], distribution)
    sections = [
        front_text(front_matter(facts.rows.items())),
        _summary(facts, catalogue),
        USE,
        _columns(),
        "## How pairs were chosen\n\nEvery item seen is kept or dropped for exactly one reason.",
        *(_funnel(funnel) for funnel in facts.funnels),
        _source(facts),
        _splits(facts),
        _licences(catalogue),
        _LIMITS + "".join(f"\n- {limit}" for limit in _source_limits(facts)),
        CITATION,
    ]
    (out / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    (out / LICENCE_FILE).write_text(LICENCE, encoding="utf-8")


def source_of(site: str | None) -> Source:
    """The kind of a crawl's ``site``; None: not known."""
    if site is None:
        return "unknown"
    kind = site.partition(":")[0]
    if kind in SOURCES:
        return kind  # type: ignore[return-value]
    host = urlsplit(site).hostname or ""
    return "civitai" if _CIVITAI.fullmatch(host) else "api"


def _built_from(facts: CardFacts) -> str:
    return literal(facts.about["source"]) if facts.about else _FROM[facts.source]


def _source_limits(facts: CardFacts) -> Sequence[str]:
    about = facts.about
    return [literal(text) for text in about["limits"]] if about else _LIMITS_OF[facts.source]


def literal(value: object) -> str:
    """A stranger's text as Markdown, within a line, that shows it as it is: no markup, no HTML.

    Line breaks become spaces; longer texts are cut at 100 characters.
    """
    return html.escape(_SPECIAL.sub(r"\\\g<0>", one_line(value, _MAX_NAME)), quote=False)


def front_matter(rows: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """The metadata of the card as the Hugging Face Hub reads it.

    Args:
        rows: (split, its rows). ``datasets`` cannot load an empty one, so those are left out.
    """
    sizes = dict(rows)
    files = [
        {"split": split, "path": f"data/{split}-*.parquet"}
        for split, count in sizes.items()
        if count
    ]
    return {
        "pretty_name": "DABench",
        "license": "other",
        "license_name": "terms-of-each-model-and-prompt",
        "license_link": LICENCE_FILE,
        "language": ["en"],
        "task_categories": ["text-generation"],
        "tags": ["text-to-image", "model-selection", "tool-use", "stable-diffusion"],
        "size_categories": [size_category(sum(sizes.values()))],
        "configs": [
            {"config_name": "default", "default": True, "data_files": files},
            {"config_name": "catalogue", "data_files": "catalogue.parquet"},
        ],
    }


def front_text(front: Mapping[str, Any]) -> str:
    """Front matter between its rules."""
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---"


def size_category(rows: int) -> str:
    """The Hub's name of a size, as ``10K<n<100K``."""
    place = bisect_right(_SIZES, rows)
    if place == 0:
        return f"n<{_SIZE_NAMES[0]}"
    if place == len(_SIZES):
        return f"n>{_SIZE_NAMES[-1]}"
    return f"{_SIZE_NAMES[place - 1]}<n<{_SIZE_NAMES[place]}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table of literal texts; numbers are set to the right."""
    lines = [list(map(_cell, row)) for row in rows]
    numeric = [bool(lines) and all(_is_number(row[i]) for row in lines) for i in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), rule, *lines])


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else literal(value)


def _is_number(text: str) -> bool:
    return text.rstrip(" %").replace(",", "").replace(".", "").isdigit()


def _share(count: int, total: int) -> str:
    return f"{100 * count / max(total, 1):.1f} %"


def _summary(facts: CardFacts, catalogue: Catalogue) -> str:
    total = sum(facts.rows.values())
    rows = [(split, count, _share(count, total)) for split, count in facts.rows.items()]
    own = sum(entry.model_id >= SYNTHETIC for entry in catalogue.entries)
    own_text = f"""

{own:,} of the versions are files that no site knows: their ids come from their SHA256, the source \
of their AIR is `local`, and their download paths lead somewhere only while the folder that they \
came from is served."""
    return f"""# DABench

(instruction, API) pairs for learning which text-to-image model to call, and how, for a prompt: \
after DiffAgent (CVPR 2024, arXiv 2404.01342), {_built_from(facts)}. The \
instruction is a user's prompt; the API names a checkpoint and its version, LoRAs and embeddings \
with weights, sampler, steps, CFG scale, size, CLIP skip, seed and negative prompt.

{table(("split", "pairs", "share"), [*rows, ("all", total, "100.0 %")])}

The pairs call {facts.models_used:,} models. The catalogue holds \
{len(catalogue.checkpoints):,} checkpoint versions, {len(catalogue.loras):,} LoRA versions and \
{len(catalogue.embeddings):,} embeddings (textual inversions) that may be called. \
`catalogue.parquet` and `mapping/models.json` lead from a name to ids, AIR, SHA256 and download \
path (relative to the site); `mapping/samplers.json` from a sampler to its diffusers scheduler.\
{own_text if own else ""}"""


def _columns() -> str:
    parts = ["## Columns"]
    for title, schema, texts in (
        ("Pairs (`data/*.parquet`)", DABENCH, columns.PAIRS),
        ("Catalogue (`catalogue.parquet`)", CATALOGUE, columns.CATALOGUE),
    ):
        rows = [(field.name, _type(field), texts[field.name]) for field in schema]
        parts.append(f"### {title}\n\n{table(('column', 'type', 'meaning'), rows)}")
    return "\n\n".join(parts)


def _type(field: pa.Field) -> str:
    """The type of a column in short, as ``list of string``."""
    kind = field.type
    if pa.types.is_list(kind):
        inner = kind.value_type
        name = "list of " + ("structs" if pa.types.is_struct(inner) else f"{inner}")
    else:
        name = "struct" if pa.types.is_struct(kind) else str(kind)
    return f"{name} or null" if field.nullable else name


def _funnel(funnel: Funnel) -> str:
    rows: list[tuple[object, ...]] = [
        (step.filter, step.reason, step.dropped, _share(step.dropped, funnel.seen))
        for step in funnel.steps
    ]
    text = (
        f"### {funnel.unit.capitalize()}\n\n"
        f"{funnel.seen:,} seen, {funnel.kept:,} kept ({_share(funnel.kept, funnel.seen)})."
    )
    if not rows:
        return text
    return f"{text}\n\n{table(('filter', 'dropped because', 'dropped', 'of those seen'), rows)}"


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
{facts.groups:,} groups, the largest of {facts.largest_group:,} pairs. What is new joins the \
oldest group that it touches; what is tied to two splits is left out. A hash of the group's first \
id and the seed {config.seed} decides for new groups, stratified by base model: test \
{config.test_fraction:g}, validation {config.validation_fraction:g}, the rest train.

`splits.parquet` remembers what was decided, and the next version that is built in the same store \
begins with it: no pair moves to another split. It keeps its own, or is left out where it would \
leak since it changed or came back.

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
`allow_no_credit` of the catalogue are what was stated when it was read. Prompts are their users'. \
What is made from a base model is bound by its licence, too. Check the terms of a model before \
using it.

{table(("commercial use allowed", "model versions"), _by_count(uses))}

{
        table(
            ("base model", "its licence", "model versions"),
            [
                (name, base_model_of(name).licence or "not known: see its publisher", n)
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
picture's own size stands in."""

USE = """## Use

In this directory:

```python
from pathlib import Path

from datasets import load_dataset

dabench = str(Path.cwd())  # or its path, or the name of a copy on a hub
pairs = load_dataset(dabench)  # train, validation, test
catalogue = load_dataset(dabench, "catalogue", split="train")
```

Without `datasets`:

```python
import polars as pl

train = pl.read_parquet("data/train-*.parquet")
catalogue = pl.read_parquet("catalogue.parquet")
```"""

CITATION = """## Citation

The method, and the dataset that this one is modelled on:

```bibtex
@inproceedings{zhao2024diffagent,
  title     = {{DiffAgent}: Fast and Accurate Text-to-Image {API} Selection with Large Language
               Model},
  author    = {Zhao, Lirui and Yang, Yue and Zhang, Kaipeng and Shao, Wenqi and Zhang, Yuxin and
               Qiao, Yu and Luo, Ping and Ji, Rongrong},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2024}
}
```"""

LICENCE = """# Terms

This dataset has no licence of its own, and grants none.

- A prompt is its user's; `creator` and `url` name the user and the picture.
- A model has its creator's terms: `allow_commercial_use`, `allow_derivatives` and `allow_no_credit`
  of `catalogue.parquet` are what was stated when it was read. Check the model's own page.
- What is made from a base model is bound by that model's licence: `base_model_licence`.
"""


def _plot(path: Path, title: str, distribution: Mapping[str, Any]) -> None:
    """Horizontal bars, largest first, the tail summed up; the same bytes for the same counts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    items = list(distribution["counts"].items())
    shown, rest = items[:_MAX_BARS], items[_MAX_BARS:]
    if rest:
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    labels = [one_line(label, _MAX_LABEL) for label, _ in reversed(shown)]
    values = [count for _, count in reversed(shown)]
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(shown)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = axes.barh(range(len(values)), values, color="#3b6ea5")
    axes.bar_label(bars, labels=[f" {value:,}" for value in values], fontsize=8)
    # Names are drawn as they are: "a$x_$b" is no formula.
    axes.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
    axes.set_xlabel(distribution["unit"])
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # the library's version is no content
