"""From the artefacts of ``render`` and ``score`` to a contact sheet, and from pictures to one."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from diffagent.errors import ConfigError, RenderError
from diffagent.render.render_stage import REASONS
from diffagent.schemas.api import T2IAPI, LoRA, Params, parse_api
from diffagent.schemas.tables import RENDERS
from diffagent.sheet.contact_sheet import SCORES, Card
from diffagent.store import Artifact, StageContext, StageResult, sha256_file, stage
from diffagent.t2i.metadata import Generation, read_image_metadata

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

Key = tuple[int, str, int]

#: A picture of more pixels is not scored: decoded it would take over 300 MB.
MAX_PIXELS = 100_000_000


class PicturesConfig(BaseModel):
    """What the stage ``pictures`` takes: (file, prompt) of each picture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pictures: tuple[tuple[str, str], ...]


@stage(
    "pictures",
    version=3,
    config=PicturesConfig,
    files=lambda config: [Path(path) for path, _ in config.pictures],
)
def pictures(config: PicturesConfig, context: StageContext) -> StageResult:
    """Pictures from elsewhere as the stage ``score`` wants them: as if they were rendered here."""
    images = context.out / "images"
    images.mkdir(exist_ok=True)
    rows = []
    for number, (name, prompt) in enumerate(config.pictures, 1):
        digest = sha256_file(Path(name))
        row = {"prompt_id": number, "source": "pictures", "candidate": 0, "seed": 0}
        row |= {"prompt": prompt, "recipe": digest, "status": "ok", "reason": None}
        try:
            if not prompt:
                raise RenderError(f"{name!r} states no prompt", reason="no-prompt")
            upright(Path(name)).save(images / f"{digest}.png")
        except RenderError as error:
            log.warning("%s", error)
            row |= {"recipe": None, "status": "failed", "reason": error.reason}
            row |= {"problem": str(error)} if error.reason == "bad-picture" else {}
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows, schema=RENDERS), context.out / "renders.parquet")
    return StageResult(rows={"renders.parquet": len(rows)})


def upright(path: Path) -> Image:
    """Read a picture as people see it: turned and mirrored as its EXIF orientation states.

    Raises:
        RenderError: damaged, of 32 bits a pixel, or more pixels than `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise RenderError(
                    f"{str(path)!r} has {width} x {height} pixels, more than {MAX_PIXELS:,}",
                    reason="too-many-pixels",
                )
            if image.mode in ("I", "F"):
                raise RenderError(
                    f"{str(path)!r} has 32 bits a pixel, whose black and white are not stated; "
                    "save it with 8 bits a channel",
                    reason="bad-picture",
                )
            turned = ImageOps.exif_transpose(image)
            if turned.mode.startswith("I;16"):  # Pillow would cut off at 255
                turned = turned.point(lambda value: value / 257).convert("L")
            return turned.convert("RGB")
    except RenderError:
        raise
    except Image.DecompressionBombError as error:
        raise RenderError(f"{str(path)!r}: {error}", reason="too-many-pixels") from None
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        raise RenderError(f"{str(path)!r} cannot be read: {error}", reason="bad-picture") from None


def pictures_config(
    paths: Sequence[Path], prompt: str | None
) -> tuple[PicturesConfig, dict[Key, str]]:
    """The stage's configuration, and what the pictures say of how they were made.

    Args:
        paths: of pictures.
        prompt: of those that do not state theirs. One without any is a failed row.

    Raises:
        ConfigError: there are none, or none has a prompt.
    """
    if not paths:
        raise ConfigError("there is no picture (.png, .jpg, .webp, .avif, ...) in these folders")
    found, apis = [], {}
    for number, path in enumerate(paths, 1):
        made = read_image_metadata(path)
        found.append((str(path.resolve()), made.prompt or prompt or ""))
        api = _api(made)
        if api:
            apis[number, "pictures", 0] = api.to_json()
    if not any(text for _, text in found):
        raise ConfigError(f"{str(paths[0])!r} states no prompt; give one with --prompt")
    return PicturesConfig(pictures=tuple(found)), apis


def _api(made: Generation) -> T2IAPI | None:
    """What a picture says as an API call; None when it does not say enough."""
    checkpoint = made.checkpoints[0] if made.checkpoints else None
    if made.not_known:
        return None
    try:
        return T2IAPI(
            model=(checkpoint and checkpoint.name) or "",
            version=(checkpoint and checkpoint.hash) or "?",
            base_model="?",
            loras=tuple(
                LoRA(model=use.name or use.hash or "", version=use.hash or "?", weight=use.weight)
                for use in made.loras
            ),
            params=Params.model_validate(
                {
                    "sampler": made.sampler,
                    "steps": made.steps,
                    "cfg_scale": made.cfg_scale,
                    "width": made.width,
                    "height": made.height,
                    "clip_skip": made.clip_skip,
                }
            ),
            negative_prompt=made.negative_prompt,
        )
    except ValidationError:
        return None


def sheet_cards(
    renders: Artifact, apis: Mapping[Key, str], scores: Artifact | None = None
) -> list[Card]:
    """A card for each row of renders.parquet, in its order.

    Args:
        renders: the artefact with the pictures.
        apis: the call of (prompt, source, candidate), as JSON.
        scores: the artefact of their scores, when there is one.
    """
    rows = pq.read_table(renders.file("renders.parquet")).to_pylist()
    scored = (
        pq.read_table(scores.file("scores.parquet")).to_pylist() if scores else [{} for _ in rows]
    )
    return [_card(row, more, renders, apis) for row, more in zip(rows, scored, strict=True)]


def _card(
    row: Mapping[str, Any], scored: Mapping[str, Any], renders: Artifact, apis: Mapping[Key, str]
) -> Card:
    number = f"{row['prompt_id']:04d}-{row['candidate']}-{row['seed']}"
    api = apis.get((row["prompt_id"], row["source"], row["candidate"]))
    drawn = row["status"] == "ok"
    told = {**row, **{k: v for k, v in scored.items() if k in SCORES}}
    reason = row["reason"] or scored.get("reason") or ""
    return Card(
        number=number,
        prompt=row["prompt"],
        source=row["source"],
        seed=row["seed"],
        api=parse_api(api) if api else None,
        picture=renders.file(f"images/{row['recipe']}.png") if drawn else None,
        href=f"{number}.png" if drawn else "",
        problem=row.get("problem") or REASONS.get(reason, reason),
        note=row.get("note") or "",
        scores={n: told[n] for n in SCORES if told.get(n) is not None} if drawn else {},
    )


def copy_pictures(cards: Sequence[Card], out: Path) -> None:
    """Put the pictures of cards beside their sheet."""
    for card in cards:
        if card.picture:
            shutil.copyfile(card.picture, out / card.href)


def sheet_facts(renders: Artifact, scores: Artifact | None) -> dict[str, str]:
    """What the head of a sheet tells."""
    metrics = renders.manifest.metrics
    facts = {"Made": f"{renders.manifest.created_at:%Y-%m-%d %H:%M} UTC"}
    if "backend" in metrics:
        facts["Drawn with"] = str(metrics["backend"])
    if scores:
        found = scores.manifest.metrics
        facts |= {name: str(told["version"]) for name, told in found["scorers"].items()}
        facts["Unified score"] = str(found["unified"]["method"])
    return facts
