"""Base models: which fit together, which make pictures, under which licence."""

from __future__ import annotations

import pytest

from diffagent.t2i.base_models import base_model_of, ecosystem, families, wanted
from diffagent.t2i.catalogue import commercial_state


@pytest.mark.parametrize(
    ("name", "root", "media"),
    [
        ("SD 1.4", "sd1", "image"),
        ("SD 1.6", "sd1", "image"),  # of a later day than the table
        ("SDXL Lightning", "sdxl", "image"),
        ("Pony", "sdxl", "image"),
        ("Pony V7", "auraflow", "image"),
        ("Illustrious", "sdxl", "image"),
        ("Flux.1 Krea", "flux1", "image"),
        ("Wan Video 2.2 T2V-A14B", "wanvideo", "video"),
        ("Wan Image 2.7", "wanimage27", "image"),
        ("LTXV 9", "ltxv", "video"),
        ("ACE Audio", "ace", "audio"),
        ("Other", "other", "none"),
        ("", "other", "none"),
        ("Brand New 1.0", "brandnew10", "image"),
    ],
)
def test_what_a_name_means(name: str, root: str, media: str) -> None:
    assert (ecosystem(name), base_model_of(name).media) == (root, media)


def test_a_choice_is_by_name_ecosystem_or_all() -> None:
    assert wanted("SD 1.5", ["SD 1.5"]) and not wanted("SD 1.4", ["SD 1.5"])
    assert wanted("SD 1.4", ["sd1"]) and wanted("NoobAI", ["sdxl"])
    assert wanted("Brand New 1.0", ["all"])
    for name in ("Other", "Upscaler", "SVD XT", "ACE Audio", ""):
        assert not wanted(name, ["all"]), name
    assert wanted("Other", ["Other"])  # whoever names it gets it


def test_every_family_of_the_table_can_be_chosen() -> None:
    seen: set[str] = set()
    for root, media, names in families():
        assert seen.isdisjoint(names)
        seen.update(names)
        for name in names:
            assert ecosystem(name) == root
            assert wanted(name, ["all"]) == wanted(name, [root]) == (media == "image")
    assert len(seen) > 80


@pytest.mark.parametrize(
    ("uses", "licence", "state"),
    [
        (("Image", "Rent"), "CreativeML Open RAIL-M", ("yes", "model")),
        (("RentCivit",), None, ("no", "model")),
        ((), None, ("no", "model")),
        (None, "Apache 2.0", ("unknown", None)),
        (("Image",), "FLUX.1 [dev] Non-Commercial License", ("no", "base_model")),
        (None, "SDXL 0.9 research license", ("no", "base_model")),
    ],
)
def test_commercial_use_has_three_states(
    uses: tuple[str, ...] | None, licence: str | None, state: tuple[str, str | None]
) -> None:
    assert commercial_state(uses, licence) == state
