"""Stage ``render``: every valid answer becomes a picture for each seed, none is drawn twice."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.errors import RenderError
from diffagent.localcivitai.site import open_site
from diffagent.render.backends import open_renderer
from diffagent.render.files.model_store import ModelStore
from diffagent.render.notes import note_on
from diffagent.render.picture_cache import PictureCache
from diffagent.render.planner import draw
from diffagent.render.pnginfo import payload_hash, write_png
from diffagent.render.recipe import UNKNOWN_BASE_MODEL, Recipe, by_hash, resolve
from diffagent.render.render_config import RenderConfig
from diffagent.render.renderer import Files, ModelRef, Renderer
from diffagent.render.safety import check_pictures
from diffagent.schemas.api import ApiError, parse_api
from diffagent.schemas.manifest import Funnel, FunnelStep
from diffagent.schemas.tables import RENDERS
from diffagent.store import Progress, StageContext, StageResult, stage
from diffagent.t2i.catalogue import Catalogue

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffagent.t2i.catalogue import Entry

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
    "unsupported-sampler": "the backend has nothing like it",
    "unsupported-size": "no multiple of 8 pixels",
    "prompt-too-long": "a prompt is longer than what is encoded; shorten it",
    "too-large": "more pixels than render.max_pixels",
    "download": "the site does not give the file, or gives another",
    "no-room": "the file does not fit on the disk, or into runtime.models.max_gb",
    "bad-model-file": "not a safetensors file that diffusers can load",
    "bad-vae": "the VAE does not fit the checkpoint",
    "vae-base-mismatch": "the VAE is for another architecture",
    "bad-lora": "the LoRA does not fit the checkpoint, or diffusers cannot read its kind",
    "bad-embedding": "the embedding does not fit the checkpoint",
    "clip-skip": "the text encoder has fewer layers",
    "out-of-memory": "the picture or the model does not fit into the device's memory",
    "nan": "the picture is not a number somewhere",
    "black": "the picture is black all over",
    "unsafe": "the safety check withholds the picture",
    "prompt-network": "the prompt orders a server to load a network that the call does not name",
    "missing-on-server": "the server has no such model",
    "ambiguous-on-server": "the server has more than one file that it may be",
    "unverified-model": "the server does not say which checkpoint it used",
    "wrong-model": "the server used another file",
    "wrong-answer": "the server drew something else than it was asked for",
    "bad-picture": "the picture is damaged",
    "too-many-pixels": "the picture is too large to be read",
    "no-prompt": "the picture states no prompt; --prompt gives one",
    "not-here": "the model is not in the folder; --download fetches it",
    "server-refused": "the server does not take the call",
    "server-error": "the server failed; the log says how",
    "no-endpoint": "the server lacks a part of its API",
    "render-error": "the renderer failed; the log says how",
}


@dataclass(frozen=True)
class Job:
    """One row of the table: a candidate with a seed. ``status`` 'ok' once it has a picture.

    ``problem``: the message of a failed picture, beside the kind of failure in ``reason``.
    ``note``: how the picture differs from what the call means.
    """

    row: Mapping[str, Any]
    seed: int
    recipe: Recipe | None
    status: str
    reason: str | None
    nsfw: float | None = None
    problem: str | None = None
    note: str | None = None


@stage("render", version=3, config=RenderConfig)
def render(config: RenderConfig, context: StageContext) -> StageResult:
    """Render the candidates that are valid.

    Inputs: ``candidates`` (candidates.parquet), ``dabench`` (the catalogue). Files:
    renders.parquet (``diffagent.schemas.tables.RENDERS``) and images/RECIPE.png. Every picture is
    kept in
    ``STORE/pictures`` for all runs, so an interrupted one goes on after the last whole picture.
    Model files are cached in ``runtime.models.directory``.

    Raises:
        RenderError: more than ``max_failed_fraction`` of the valid ones failed.
        CivitaiError: the site is in trouble that may pass; run it again.
    """
    catalogue = Catalogue.load(context.one("dabench").path)
    candidates = pq.read_table(context.one("candidates").file("candidates.parquet")).to_pylist()
    jobs = list(make_jobs(candidates, catalogue, config))
    wanted = {job.recipe.digest: job.recipe for job in jobs if job.recipe}
    started = time.monotonic()
    with (
        open_site(context.site_url, context.runtime) as site,
        ModelStore.of(context.runtime, site) as store,
        contextlib.closing(open_renderer(config, context.runtime, store.local)) as renderer,
    ):
        cache = PictureCache(context.runtime.local_store / "pictures", renderer)
        album = Album(by_hash(catalogue), store, cache, context.out / "images")
        failed = album.fill(wanted.values(), renderer, context.progress)
        name, backend = renderer.name, f"{renderer.name} {renderer.version}"
    seconds = time.monotonic() - started
    unsafe = album.check_safety(config)
    failed |= {digest: RenderError(REASONS["unsafe"], reason="unsafe") for digest in unsafe}
    jobs = [finish(job, failed, album.nsfw, name) for job in jobs]
    check_failures(jobs, config.max_failed_fraction)
    pq.write_table(to_table(jobs), context.out / "renders.parquet", compression="zstd")
    return StageResult(
        rows={"renders.parquet": len(jobs)},
        funnels=(funnel(jobs),),
        metrics={
            "pictures": len(wanted) - len(failed),
            "pictures_drawn": album.drawn,
            "pictures_cached": album.cached,
            "checkpoint_loads": renderer.loads,
            "render_seconds": round(seconds, 3),
            "seconds_per_picture": round(seconds / album.drawn, 4) if album.drawn else None,
            "backend": backend,
            "renders_noted": sum(job.note is not None for job in jobs),
            "pictures_unsafe": sum(p >= config.safety_threshold for p in album.nsfw.values()),
        },
    )


def make_jobs(
    candidates: Iterable[Mapping[str, Any]], catalogue: Catalogue, config: RenderConfig
) -> Iterator[Job]:
    """A job for each candidate and seed, sorted by prompt, source, candidate, seed.

    Args:
        candidates: rows of ``diffagent.schemas.tables.CANDIDATES``.
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
                yield Job(row, seed, None, "failed", error.reason, problem=str(error))


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


class Album:
    """A run's pictures, DIGEST.png each, out of the cache or drawn; ``drawn`` and ``cached`` count.

    ``nsfw`` is what the safety check has said, by digest.

    Pictures tell the names of their models as this run knows them, so they are written anew.
    """

    def __init__(
        self,
        models: Mapping[str, Entry],
        store: ModelStore,
        cache: PictureCache,
        images: Path,
    ) -> None:
        self.drawn = self.cached = 0
        self.nsfw: dict[str, float] = {}
        self._models = models
        self._names = {sha256: entry.model for sha256, entry in models.items()}
        self._store = store
        self._cache = cache
        self._images = images
        self._payloads: dict[str, str] = {}

    def fill(
        self,
        recipes: Iterable[Recipe],
        renderer: Renderer,
        progress: Progress = lambda fraction, text: None,
    ) -> dict[str, RenderError]:
        """Write the pictures of recipes; returns the errors of those that failed, by digest."""
        shutil.rmtree(self._images, ignore_errors=True)  # of an interrupted run: all is cached
        self._images.mkdir()
        missing = []
        for recipe in recipes:
            image = self._cache.get(recipe)
            if image is None:
                missing.append(recipe)
                continue
            self.cached += 1
            self._write(recipe, image)
        failed: dict[str, RenderError] = {}
        drawn = draw(
            missing,
            renderer,
            self.files,
            fetch=lambda ref: self._store.fetch(self._models[ref.sha256]),
            release=lambda ref: self._store.release(self._models[ref.sha256]),
        )
        for number, (recipe, outcome) in enumerate(drawn, start=1):
            progress(number / len(missing), f"{number} of {len(missing)} pictures")
            if isinstance(outcome, RenderError):
                log.warning("%s: %s", recipe.digest[:12], outcome)
                failed[recipe.digest] = outcome
                continue
            self.drawn += 1
            self._cache.put(recipe, outcome)
            self._write(recipe, outcome)
        return failed

    def check_safety(self, config: RenderConfig) -> list[str]:
        """Check the pictures, where ``config`` says so; the digests of those that are withheld.

        Raises:
            ConfigError: the extra with the classifier is not installed.
        """
        if config.safety == "off":
            return []
        pictures = {path.stem: path for path in self._images.iterdir()}
        self.nsfw = check_pictures(pictures, config.safety_threshold)
        if config.safety == "flag":
            return []
        unsafe = [name for name, nsfw in self.nsfw.items() if nsfw >= config.safety_threshold]
        for name in unsafe:
            pictures[name].unlink()
        return unsafe

    def files(self, recipe: Recipe) -> Files:
        """What the hashes in a recipe stand for."""
        embeddings = sorted({item.sha256 for item in recipe.embeddings})
        return Files(
            self._ref(recipe.checkpoint),
            self._ref(recipe.vae) if recipe.vae else None,
            tuple(self._ref(use.sha256) for use in recipe.loras),
            tuple(map(self._ref, embeddings)),
        )

    def _ref(self, sha256: str) -> ModelRef:
        entry = self._models.get(sha256)
        if entry is None:
            raise RenderError(f"the catalogue has no file {sha256!r}", reason="unknown-model")
        base_model = "" if entry.base_model == UNKNOWN_BASE_MODEL else entry.base_model
        return ModelRef(sha256, entry.model, base_model, entry.file_name)

    def _write(self, recipe: Recipe, image: Image) -> None:
        payloads = {
            use.sha256: digest for use in recipe.loras if (digest := self._payload(use.sha256))
        }
        write_png(self._images / f"{recipe.digest}.png", image, recipe, self._names, payloads)

    def _payload(self, sha256: str) -> str:
        """AutoV3 of a LoRA that is here, by which a WebUI finds it; '' of one that is not."""
        if sha256 not in self._payloads:
            self._payloads[sha256] = ""
            # A flawed file, or one that went: a server has drawn with its own.
            with contextlib.suppress(RenderError, OSError):
                path = self._store.local(sha256)
                self._payloads[sha256] = payload_hash(path) if path else ""
        return self._payloads[sha256]


def finish(
    job: Job, failed: Mapping[str, RenderError], nsfw: Mapping[str, float], backend: str
) -> Job:
    """Complete a job with what became of its recipe, its safety check, and its note.

    Args:
        job: as `make_jobs` gives it.
        failed: the errors of recipes without a picture, by digest.
        nsfw: probabilities by digest.
        backend: name of the renderer.
    """
    if job.recipe is None:
        return job
    done = replace(job, nsfw=nsfw.get(job.recipe.digest))
    error = failed.get(job.recipe.digest)
    if error:
        return replace(done, recipe=None, status="failed", reason=error.reason, problem=str(error))
    return replace(done, note=note_on(job.recipe, backend) or None)


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
    """The jobs as ``diffagent.schemas.tables.RENDERS``."""
    rows = [
        {
            **{name: job.row[name] for name in ("prompt_id", "source", "candidate", "prompt")},
            "seed": job.seed,
            "recipe": job.recipe.digest if job.recipe else None,
            "nsfw": job.nsfw,
            "status": job.status,
            "reason": job.reason,
            "problem": job.problem,
            "note": job.note,
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
