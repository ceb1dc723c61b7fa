"""The contact sheet: pictures with their prompts, models, parameters and scores, in one HTML file.

The file needs nothing else: pictures are in it, small, and lead to the full ones beside it. What
strangers wrote (prompts, names of models) is escaped, and a policy in the page lets no script run
but the one that sorts and filters.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from diffagent.errors import ConfigError
from diffagent.evaluation.report import picture_uri
from diffagent.schemas.api import T2IAPI
from diffagent.sheet.prompts_file import LOCAL_VERSION
from diffagent.store import atomic_file

#: Columns of scores with their names for people, in the order in which they are shown.
SCORES: Mapping[str, str] = {
    "unified": "Unified",
    "clip": "CLIP",
    "image_reward": "ImageReward",
    "hps_v2": "HPS v2",
    "nsfw": "NSFW",
}

#: The page's file, and the mark by which a page of an earlier run is known.
PAGE, RESULTS = "index.html", "results.jsonl"
_GENERATOR = "DiffAgent contact sheet"


def check_output(folder: Path) -> None:
    """Refuse a folder with files that the sheet would overwrite and no earlier sheet wrote.

    Raises:
        ConfigError: it is a file, or holds a file of somebody else that would be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {str(folder)!r} is a file; give a folder")
    page = folder / PAGE
    if page.is_file() and _GENERATOR.encode() in page.read_bytes()[:2000]:
        return
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if name := next((name for name in names if _OURS.fullmatch(name)), None):
        raise ConfigError(
            f"{str(folder)!r} holds {name!r}, which no contact sheet wrote; it is not overwritten: "
            "give another folder with --out"
        )


#: Names of the files that a sheet writes.
_OURS = re.compile(rf"{re.escape(PAGE)}|{re.escape(RESULTS)}|\d{{4,}}-\d+-\d+\.png")


@dataclass(frozen=True)
class Card:
    """One picture, or why there is none (``problem``).

    ``note``: how the picture differs from what its call means.
    """

    number: str
    prompt: str
    source: str
    seed: int
    api: T2IAPI | None = None
    picture: Path | None = None
    href: str = ""
    problem: str = ""
    note: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def model(self) -> str:
        """The checkpoint's name, and its version where it has one."""
        if self.api is None:
            return "no model"
        version = "" if self.api.version == LOCAL_VERSION else f" · {self.api.version}"
        return f"{self.api.model}{version}"

    @property
    def networks(self) -> list[str]:
        """LoRAs and embeddings with their weights."""
        return [
            f"{use.model} × {use.weight:g}"
            for use in (*self.api.loras, *self.api.embeddings)
        ] if self.api else []  # fmt: skip

    @property
    def parameters(self) -> str:
        """Sampler and numbers, in one line."""
        if self.api is None:
            return ""
        p = self.api.params
        skip = f" · clip skip {p.clip_skip}" if p.clip_skip > 1 else ""
        return (
            f"{p.sampler} · {p.steps} steps · CFG {p.cfg_scale:g} · {p.width}×{p.height}{skip} · "
            f"seed {self.seed}"
        )

    @property
    def image(self) -> str:
        """The small picture as a data: URI."""
        return picture_uri(self.picture) if self.picture else ""


def write_contact_sheet(
    path: Path, title: str, cards: Sequence[Card], facts: Mapping[str, Any]
) -> None:
    """Write the sheet at once or not at all.

    Args:
        path: the HTML file.
        title: in text.
        cards: in the order in which they are shown first.
        facts: name -> value, for the head of the page.
    """
    folder = resources.files("diffagent.sheet")
    script = folder.joinpath("contact_sheet.js").read_text(encoding="utf-8")
    style = folder.joinpath("contact_sheet.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = folder.joinpath("contact_sheet.html").read_text(encoding="utf-8")
    present = [name for name in SCORES if any(name in card.scores for card in cards)]
    page = environment.from_string(text).render(
        title=title,
        generator=_GENERATOR,
        cards=cards,
        facts=facts,
        scores={name: SCORES[name] for name in present},
        models=sorted({card.model for card in cards}),
        # Jinja takes the line break at a block's end away; what is hashed is what stands there.
        script=_embedded(script),
        style=_embedded(style),
        policy=(
            "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
            f"script-src '{_digest(script)}'; style-src '{_digest(style)}'"
        ),
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def write_results(path: Path, cards: Sequence[Card]) -> None:
    """The same as JSON lines, for programs."""
    lines = [
        json.dumps(
            {
                "number": card.number,
                "prompt": card.prompt,
                "source": card.source,
                "seed": card.seed,
                "api": json.loads(card.api.to_json()) if card.api else None,
                "picture": card.href or None,
                "problem": card.problem or None,
                "note": card.note or None,
                "scores": dict(card.scores),
            },
            ensure_ascii=False,
        )
        for card in cards
    ]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _embedded(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
