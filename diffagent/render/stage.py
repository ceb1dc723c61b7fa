"""Stage ``render``: every valid answer becomes a picture for each seed, none is drawn twice."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.artifacts import StageContext, StageResult, stage
from diffagent.civitai.client import client_for
from diffagent.dabench.catalogue import Catalogue
from diffagent.device import resolve_device
from diffagent.errors import CivitaiError, RenderError
from diffagent.render.pipelines import DiffusersRenderer, local_configs
from diffagent.render.planner import Group, plan
from diffagent.render.pnginfo import read_png, write_png
from diffagent.render.recipe import Recipe, by_hash, resolve
from diffagent.render.store import ModelStore
from schemas.api import ApiError, parse_api
from schemas.config import RenderConfig
from schemas.dabench import RENDERS
from schemas.manifest import Funnel, FunnelStep

if TYPE_CHECKING:
    from diffagent.dabench.catalogue import Entry

log = logging.getLogger(__name__)

#: Why a valid answer may have no picture: the value of ``reason`` where ``status`` is 'failed'.
REASONS: Mapping[str, str] = {
    "unreadable-api": "the candidate's API is not one of this version",
    "unknown-model": "no such checkpoint in the catalogue",
    "unknown-lora": "no such LoRA in the catalogue",
    "unknown-embedding": "no such embedding in the catalogue",
    "unsupported-base-model": "not Stable Diffusion 1.x, 2.x or XL",
    "lora-base-mismatch": "the LoRA is for another architecture",
    "embedding-base-mismatch": "the embedding is for another architecture",
    "no-hash": "the catalogue has no SHA256 of the file",
    "unsupported-sampler": "diffusers has nothing like it",
    "too-large": "more pixels than render.max_pixels",
    "download": "the site does not give the file, or gives another",
    "bad-model-file": "not a safetensors file that diffusers can load",
    "bad-lora": "the LoRA does not fit the checkpoint",
    "bad-embedding": "the embedding does not fit the checkpoint",
    "embedding-weight": "the backend does not weigh parts of a prompt",
    "clip-skip": "the text encoder has fewer layers",
    "out-of-memory": "the picture or the model does not fit into the device's memory",
    "nan": "the picture is not a number somewhere",
    "black": "the picture is black all over",
    "render-error": "diffusers failed; the log says how",
}


@dataclass(frozen=True)
class Job:
    """One row of the table: a candidate with a seed. ``status`` 'ok' once it has a picture."""

    row: Mapping[str, Any]
    seed: int
    recipe: Recipe | None
    status: str
    reason: str | None


@stage("render", version=1, config=RenderConfig)
def render(config: RenderConfig, context: StageContext) -> StageResult:
    """Render the candidates that are valid.

    Inputs: ``candidates`` (candidates.parquet), ``dabench`` (the catalogue). Files:
    renders.parquet (``schemas.dabench.RENDERS``) and images/RECIPE.png. An interrupted run goes
    on after the last whole picture. Model files are cached in ``runtime.models``.

    Raises:
        RenderError: more than ``max_failed_fraction`` of the valid ones failed.
        CivitaiError: the site is in trouble that may pass; run it again.
    """
    catalogue = Catalogue.load(context.one("dabench").path)
    candidates = pq.read_table(context.one("candidates").file("candidates.parquet")).to_pylist()
    jobs = list(make_jobs(candidates, catalogue, config))
    images = context.out / "images"
    images.mkdir(exist_ok=True)
    wanted = {job.recipe.digest: job.recipe for job in jobs if job.recipe}
    done = usable_pictures(images, wanted)
    missing = [recipe for digest, recipe in wanted.items() if digest not in done]
    models = Path(context.runtime.models or context.runtime.local_store / "models")
    renderer = DiffusersRenderer(
        resolve_device(context.runtime.device), local_configs(models / "configs")
    )
    started = time.monotonic()
    with client_for(context.site_url, context.runtime.requests_per_second) as client:
        store = ModelStore(models, client)
        failed = draw(missing, by_hash(catalogue), store, renderer, images)
    seconds = time.monotonic() - started
    jobs = [finish(job, failed) for job in jobs]
    check_failures(jobs, config.max_failed_fraction)
    pq.write_table(to_table(jobs), context.out / "renders.parquet", compression="zstd")
    drawn = len(missing) - len(failed)
    return StageResult(
        rows={"renders.parquet": len(jobs)},
        funnels=(funnel(jobs),),
        metrics={
            "pictures": len(wanted) - len(failed),
            "pictures_drawn": drawn,
            "pictures_resumed": len(done),
            "checkpoint_loads": renderer.loads,
            "truncated_prompts": renderer.truncated,
            "render_seconds": round(seconds, 3),
            "seconds_per_picture": round(seconds / drawn, 4) if drawn else None,
            "device": str(renderer.device),
        },
    )


def make_jobs(
    candidates: Iterable[Mapping[str, Any]], catalogue: Catalogue, config: RenderConfig
) -> Iterator[Job]:
    """A job for each candidate and seed, sorted by prompt, source, candidate, seed.

    Args:
        candidates: rows of ``schemas.dabench.CANDIDATES``.
        catalogue: what the names in them mean.
        config: seeds and the largest size.
    """
    key = ("prompt_id", "source", "candidate")
    for row in sorted(candidates, key=lambda row: tuple(row[name] for name in key)):
        for seed in sorted(set(config.seeds)):
            if row["status"] != "valid":
                yield Job(row, seed, None, "invalid", row["reason"])
                continue
            try:
                yield Job(row, seed, _recipe(row, seed, catalogue, config), "ok", None)
            except RenderError as error:
                log.warning("prompt %s, %s: %s", row["prompt_id"], row["source"], error)
                yield Job(row, seed, None, "failed", error.reason)


def _recipe(
    row: Mapping[str, Any], seed: int, catalogue: Catalogue, config: RenderConfig
) -> Recipe:
    try:
        api = parse_api(row["api"] or "")
    except ApiError as error:
        raise RenderError(f"cannot read the API: {error}", reason="unreadable-api") from None
    size = api.params.width * api.params.height
    if size > config.max_pixels:
        raise RenderError(
            f"{api.params.width}x{api.params.height} is more than render.max_pixels "
            f"({config.max_pixels})",
            reason="too-large",
        )
    return resolve(api, row["prompt"], seed, catalogue)


def usable_pictures(images: Path, wanted: Mapping[str, Recipe]) -> set[str]:
    """Digests of the wanted recipes whose whole picture is there; everything else is removed."""
    usable = set()
    for path in sorted(images.iterdir()):
        try:
            if path.suffix == ".png" and wanted.get(path.stem) == read_png(path)[0]:
                usable.add(path.stem)
                continue
        except RenderError as error:
            log.warning("%s", error)
        path.unlink()
    return usable


def draw(
    recipes: Iterable[Recipe],
    models: Mapping[str, Entry],
    store: ModelStore,
    renderer: DiffusersRenderer,
    images: Path,
) -> dict[str, str]:
    """Render recipes into ``images``, each checkpoint loaded once.

    Args:
        recipes: in any order.
        models: what the hashes in them stand for.
        store: gives the files.
        renderer: draws.
        images: directory that gets DIGEST.png.

    Returns:
        The reasons of those that failed, by digest.
    """
    names = {sha256: entry.model for sha256, entry in models.items()}
    failed: dict[str, str] = {}
    for group in plan(recipes):
        try:
            prepare(group, models, store, renderer)
        except RenderError as error:
            log.warning("%d pictures fail: %s", len(group.recipes), error)
            failed |= {recipe.digest: error.reason for recipe in group.recipes}
            continue
        log.info("%s: %d pictures", names[group.checkpoint], len(group.recipes))
        for recipe in group.recipes:
            try:
                image = renderer.render(recipe)
            except RenderError as error:
                log.warning("%s", error)
                failed[recipe.digest] = error.reason
                continue
            write_png(images / f"{recipe.digest}.png", image, recipe, names)
    return failed


def prepare(
    group: Group, models: Mapping[str, Entry], store: ModelStore, renderer: DiffusersRenderer
) -> None:
    """Fetch a group's files and put them to use.

    Raises:
        RenderError: a file cannot be had or used, and trying again would not help.
        CivitaiError: the site may give it later.
    """
    try:
        checkpoint = store.fetch(models[group.checkpoint])
        loras = {sha256: store.fetch(models[sha256]) for sha256 in group.loras}
        embeddings = {sha256: store.fetch(models[sha256]) for sha256 in group.embeddings}
    except CivitaiError as error:
        if error.retryable:
            raise
        raise RenderError(str(error), reason="download") from error
    renderer.use(checkpoint, loras, embeddings)


def finish(job: Job, failed: Mapping[str, str]) -> Job:
    """The job with what became of its recipe."""
    reason = failed.get(job.recipe.digest) if job.recipe else None
    return replace(job, recipe=None, status="failed", reason=reason) if reason else job


def check_failures(jobs: Iterable[Job], limit: float) -> None:
    """Raise when too many of the valid answers have no picture.

    Raises:
        RenderError: the message counts the reasons.
    """
    valid = [job for job in jobs if job.status != "invalid"]
    reasons = Counter(job.reason for job in valid if job.status == "failed")
    if reasons.total() > limit * len(valid):
        told = "; ".join(
            f"{n} {name} ({REASONS[name]})" for name, n in reasons.most_common() if name
        )
        raise RenderError(
            f"{reasons.total()} of {len(valid)} valid answers have no picture, more than "
            f"render.max_failed_fraction ({limit:g}): {told}",
            reason="too-many-failed",
        )


def to_table(jobs: Iterable[Job]) -> pa.Table:
    """The jobs as ``schemas.dabench.RENDERS``."""
    rows = [
        {
            **{name: job.row[name] for name in ("prompt_id", "source", "candidate", "prompt")},
            "seed": job.seed,
            "recipe": job.recipe.digest if job.recipe else None,
            "status": job.status,
            "reason": job.reason,
        }
        for job in jobs
    ]
    return pa.Table.from_pylist(rows, schema=RENDERS)


def funnel(jobs: Iterable[Job]) -> Funnel:
    """How many answers became pictures, and why the others did not."""
    counts = Counter((job.status, job.reason or "") for job in jobs)
    steps = tuple(
        FunnelStep(filter=status, reason=reason, dropped=n)
        for (status, reason), n in sorted(counts.items())
        if status != "ok"
    )
    return Funnel(unit="renders", seen=counts.total(), kept=counts[("ok", "")], steps=steps)
