"""Configuration of the stage ``crawl``."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from diffagent.schemas.section import Section


class CrawlConfig(Section):
    """Items to crawl, and the site to crawl."""

    site: str = Field(
        default="https://civitai.com",
        description="address of a Civitai API, or a source: 'dump:DIR' (records as JSON lines or "
        "parquet, or a snapshot), 'local:DIR' (a folder of model files) or 'release:DIR' "
        "(instruction-API pairs)",
    )
    model_types: tuple[str, ...] = Field(
        default=("Checkpoint", "LORA", "LoCon", "DoRA", "TextualInversion"),
        description="model types to list; empty: all",
    )
    nsfw: bool = Field(
        default=False, description="request items above PG; the section filters still applies"
    )
    image_source: Literal["feed", "versions", "showcase"] = Field(
        default="versions",
        description="source of generation metadata; 'versions': /images of every model version; "
        "'showcase': at most ten pictures of each version by its creator, from "
        "/model-versions/:id; 'feed': the whole /images listing",
    )
    max_models: int | None = Field(
        default=None, ge=1, description="models to crawl; null: all that the site lists"
    )
    max_images: int | None = Field(
        default=None, ge=1, description="images to crawl; null: all that the site lists"
    )
    model_pages: int = Field(
        default=0,
        ge=0,
        description="HTML pages of models to read for recommended settings, most downloaded first",
    )

    @field_validator("site")
    @classmethod
    def _holds_no_secret(cls, site: str) -> str:
        """Refuse an address that would put a password into manifests, names and logs."""
        if not re.match("https?:", site, re.IGNORECASE):
            return site
        parts = urlsplit(site)
        if "@" in site or "\\" in site or parts.query or parts.fragment:
            raise ValueError(
                "an address has no user name, password or query here, since it is written into "
                "manifests; put a token into the environment variable CIVITAI_TOKEN"
            )
        return site
