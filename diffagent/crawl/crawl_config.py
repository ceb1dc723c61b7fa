"""Configuration of the stage ``crawl``."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from diffagent.schemas.section import Section


class CrawlConfig(Section):
    """What to ask of the site."""

    site: str = Field(
        default="https://civitai.com",
        description="address of a Civitai API; or for an embedded server 'sandbox', 'dump:DIR' "
        "(records as JSON lines or parquet, or a snapshot), 'local:DIR' (a folder of model files) "
        "or 'release:DIR' (instruction-API pairs)",
    )
    model_types: tuple[str, ...] = Field(
        default=("Checkpoint", "LORA", "LoCon", "DoRA", "TextualInversion"),
        description="types to list; empty for all of them",
    )
    nsfw: bool = Field(default=False, description="ask for records above PG (filters still apply)")
    image_source: Literal["feed", "versions", "showcase"] = Field(
        default="versions",
        description="'versions': /images of every model version; 'showcase': at most ten pictures "
        "of each by its creator, from /model-versions/:id; 'feed': the whole /images listing",
    )
    max_models: int | None = Field(default=None, ge=1)
    max_images: int | None = Field(default=None, ge=1)
    model_pages: int = Field(
        default=0, ge=0, description="HTML pages to read for recommended settings, most used first"
    )

    @field_validator("site")
    @classmethod
    def _holds_no_secret(cls, site: str) -> str:
        """Refuse what would put a password into manifests, names and logs."""
        if not re.match("https?:", site, re.IGNORECASE):
            return site
        parts = urlsplit(site)
        if "@" in site or "\\" in site or parts.query or parts.fragment:
            raise ValueError(
                "an address has no user name, password or query here, since it is written into "
                "manifests; a token belongs into the environment variable CIVITAI_TOKEN"
            )
        return site
