"""A reference finds every version that it may mean, with the confidence of its evidence."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffagent.dabench.filter.resolve import CONFIDENCE, FIRST_VERSION, VIAS, Resolution, Resolver
from diffagent.t2i.catalogue import Catalogue, make_entry
from diffagent.t2i.metadata import Reference, parse_generation
from diffagent.t2i.names import exact_key, file_stem, titles, words
from tests.dabench.dabench_records import model, version

SHA, BLAKE = "A1B2C3D4E5F6" + "7" * 52, "0F1E2D3C4B5A" + "6" * 52
KINDS = {
    "AutoV1": "1234ABCD",
    "AutoV2": SHA[:10],
    "AutoV3": "9A8B7C6D5E4F",
    "SHA256": SHA,
    "CRC32": "00C0FFEE",
    "BLAKE3": BLAKE,
}


def made(ident: int, file: str = "", digest: str = "", **changes: Any) -> dict[str, Any]:
    """A version whose file has this name and this hash, of whatever kind."""
    found = version(ident, **changes)
    found["files"][0]["name"] = f"{file or f'file{ident}'}.safetensors"
    found["files"][0]["hashes"] = {"any": digest or f"{ident:010X}"}
    return found


def resolver(*models: dict[str, Any], lookup: Any = None) -> Resolver:
    index = Resolver(lookup)
    for item in models:
        for one in item["modelVersions"]:
            index.add(item, one, "")
    return index


def several(*versions: dict[str, Any], **names: str) -> Resolver:
    """Each version of a model of its own."""
    return resolver(
        *(
            model(number, name=names.get(f"n{number}", f"Model{number}"), modelVersions=[one])
            for number, one in enumerate(versions, 1)
        )
    )


def resolve(index: Resolver, *references: Reference, **context: Any) -> Resolution:
    found = index.checkpoint(references, **context)
    assert isinstance(found, Resolution), found
    return found


def ids(found: Resolution) -> list[int]:
    return [candidate.version.version_id for candidate in found.candidates]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("digits", [8, 9, 10, 12, 64])
def test_every_kind_of_hash_is_found_at_every_length(kind: str, digits: int) -> None:
    one = version(1)
    one["files"][0]["hashes"] = {kind: KINDS[kind].lower()}
    index = resolver(model(1, modelVersions=[one]))
    digest = KINDS[kind][:digits]
    found = resolve(index, Reference(hash=digest))
    assert ids(found) == [1]
    assert found.via == ("hash" if len(digest) > 8 else "hash of 8 digits")
    assert index.checkpoint([Reference(hash=digest[:7] + "0" + digest[8:])]) == (
        "hash not in the snapshot"
    )


@pytest.mark.parametrize("prefix", ["blake3:", "sha256:", "0x", "BLAKE3_single: "])
def test_a_hash_with_a_prefix_is_found_on_both_sides(prefix: str) -> None:
    one = version(1)
    one["files"][0]["hashes"] = {"BLAKE3": "AB" * 32}
    for listed in ("AB" * 32, f"{prefix}{'ab' * 32}"):
        one["files"][0]["hashes"] = {"BLAKE3": listed}
        meta = {"positive_prompt": "a", "model": {"name": "x", "hash": f"{prefix}{'ab' * 32}"}}
        references = parse_generation(meta).checkpoints
        assert ids(resolve(resolver(model(1, modelVersions=[one])), *references)) == [1]


def test_ids_come_before_hashes_and_hashes_before_names() -> None:
    index = several(made(1, "a", "A" * 10), made(2, "bee", "B" * 10), made(3, "cee", "C" * 10))
    by_id, by_hash = Reference(version_id=1), Reference(hash="B" * 10, name="cee")
    assert (resolve(index, by_hash, by_id).via, ids(resolve(index, by_id))) == (
        "civitaiResources",
        [1],
    )
    assert ids(resolve(index, by_id, by_hash))[0] == 1
    assert ids(resolve(index, by_hash))[0] == 2
    assert ids(resolve(index, Reference(name="cee"))) == [3]


def test_what_is_not_there_says_so() -> None:
    index = resolver(model(1, modelVersions=[made(1)]), model(2, type="LORA"))
    assert index.checkpoint([]) == "nothing names a model"
    assert index.checkpoint([Reference(version_id=9)]) == "version not in the snapshot"
    assert index.checkpoint([Reference(version_id=200)]) == "version is not a Checkpoint"
    assert index.checkpoint([Reference(name="zzz yyy")]) == "name not in the snapshot"
    unknown = Reference(hash="F" * 10, name="zzz yyy")
    assert index.checkpoint([unknown]) == "hash and name not in the snapshot"
    # An id that no version has is another version than the one whose name is given.
    assert index.checkpoint([Reference(version_id=9), Reference(name="file1")]) == (
        "version not in the snapshot"
    )


def test_a_shared_hash_gives_every_version_the_earliest_first() -> None:
    late, early = made(1, digest="A" * 10), made(2, digest="A" * 10, publishedAt="2023-01-01")
    found = resolve(several(late, early), Reference(hash="A" * 10))
    assert (ids(found), found.standing) == ([2, 1], "shared")
    assert found.candidates[0].confidence == found.candidates[1].confidence < 0.5
    assert found.doubt(0.7) == "hash of several versions"


def test_a_name_chooses_among_versions_of_one_file() -> None:
    index = several(made(1, "one", "A" * 10), made(2, "two", "A" * 10))
    found = resolve(index, Reference(hash="A" * 10, name="two"))
    assert (ids(found), found.standing, found.doubt(0.7)) == ([2], "agrees", None)


def test_a_contradiction_shows_in_the_confidence() -> None:
    index = several(made(1, "one", "A" * 10), made(2, "two", "B" * 10))
    agreed = resolve(index, Reference(hash="A" * 10, name="one"))
    found = resolve(index, Reference(hash="A" * 10, name="two"))
    assert (ids(found), found.standing) == ([1, 2], "contradicts")
    assert [candidate.via for candidate in found.candidates] == ["hash", "file name"]
    assert agreed.best.confidence > found.best.confidence > found.candidates[1].confidence > 0
    assert sum(candidate.confidence for candidate in found.candidates) <= 1


def test_a_name_outweighs_eight_digits() -> None:
    index = several(made(1, "one", "AAAA1111"), made(2, "two", "B" * 10))
    found = resolve(index, Reference(hash="AAAA1111", name="two"))
    assert (ids(found), found.via, found.best.via) == ([2, 1], "hash of 8 digits", "file name")


def test_an_unknown_hash_weakens_a_name() -> None:
    index = several(made(1, "one"), made(2, "two"))
    alone = resolve(index, Reference(name="one"))
    found = resolve(index, Reference(name="one", hash="F" * 10))
    assert ids(found) == ids(alone) == [1]
    assert found.best.confidence < alone.best.confidence


@pytest.mark.parametrize(
    ("name", "via"),
    [
        ("dreamWorld_v20", "file name"),
        ("DREAMWORLD-V2.0.ckpt [0123abcd]", "file name"),
        (r"models\sd\dreamWorld_v20.safetensors", "file name"),
        ("Dream World (SD1.5) - v2.0 pruned", "model and version name"),
        ("Dream World Silver Lining", "model and version name"),
        ("silver_lining", "version name"),
        ("Dream World", "model name"),
        ("style_dreamWorld_v20-fp16", "most words of a name"),
        ("my dreamWorld_v20 of yesterday", "half of the words of a name"),
    ],
)
def test_names_are_found_however_they_are_written(name: str, via: str) -> None:
    one = made(1, "dreamWorld_v20", name="v2.0 pruned" if "pruned" in name else "Silver Lining (x)")
    index = resolver(
        model(1, name="Dream World (SD1.5)", modelVersions=[one]),
        *(model(n, name=f"Other {n}", modelVersions=[made(n, f"other{n}")]) for n in range(2, 40)),
    )
    found = resolve(index, Reference(name=name))
    assert (ids(found), found.via) == ([1], via)


def test_inpainting_is_another_model() -> None:
    index = several(made(1, "dream_8"), made(2, "dream_8Inpainting"))
    assert ids(resolve(index, Reference(name="dream_8"))) == [1]
    assert ids(resolve(index, Reference(name="dream_8-inpainting"))) == [2]


def test_a_models_name_gives_all_its_versions() -> None:
    versions = [made(n, publishedAt=f"2023-0{n}-01", name=f"{n}.0") for n in (1, 2, 3)]
    index = resolver(model(1, name="Dream World", modelVersions=versions))
    found = resolve(index, Reference(name="dream world"))
    assert (ids(found), found.via, found.standing) == ([1, 2, 3], "model name", "shared")
    assert found.best.confidence == pytest.approx(
        CONFIDENCE["model name", "shared"] * FIRST_VERSION, abs=1e-4
    )


def test_a_name_of_several_models_is_no_guess() -> None:
    found = resolve(several(made(1, "dream"), made(2, "dream")), Reference(name="dream"))
    assert (ids(found), found.doubt(0.7)) == ([1, 2], "name of several versions")


def test_the_base_model_chooses_and_speaks_against() -> None:
    index = several(made(1, "dream"), made(2, "dream", baseModel="SDXL 1.0"))
    name = Reference(name="dream")
    assert ids(resolve(index, name, base_model="SDXL 1.0")) == [2, 1]
    assert ids(resolve(index, name, base_model="SD 1.4")) == [1, 2]  # the same ecosystem
    fitting = resolve(index, name, base_model="Pony")
    assert ids(fitting) == [2, 1]
    assert fitting.best.confidence > 0.6 > resolve(index, name).best.confidence
    by_hash = Reference(hash=f"{1:010X}")
    plain = resolve(index, by_hash)
    assert resolve(index, by_hash, base_model="Other") == plain
    assert resolve(index, by_hash, base_model="SDXL 1.0").best.confidence < 0.7
    assert plain.best.confidence > 0.9


def test_a_worse_reading_of_a_name_may_fit_the_base_model() -> None:
    index = resolver(
        model(1, name="Night", modelVersions=[made(1, "dream", baseModel="SDXL 1.0")]),
        model(2, name="Dream", modelVersions=[made(2, "other")]),
    )
    assert ids(resolve(index, Reference(name="dream"))) == [1]
    assert ids(resolve(index, Reference(name="dream"), base_model="SD 1.5")) == [2]


def test_loras_tell_the_base_model_unless_they_disagree() -> None:
    index = resolver(
        model(1, modelVersions=[made(1, "dream")]),
        model(2, modelVersions=[made(2, "dream", baseModel="SDXL 1.0")]),
        model(3, type="LORA", modelVersions=[made(3, "x"), made(4, "y", baseModel="SDXL 1.0")]),
    )
    name, sd, xl = Reference(name="dream"), Reference(version_id=3), Reference(hash=f"{4:010X}")
    assert ids(resolve(index, name, loras=[xl]))[0] == 2
    assert ids(resolve(index, name, loras=[sd]))[0] == 1
    assert resolve(index, name, loras=[sd, xl]) == resolve(index, name)
    assert resolve(index, name, loras=[Reference(name="y")]) == resolve(index, name)


def test_a_date_orders_what_is_as_likely() -> None:
    index = several(
        made(1, "dream", publishedAt="2023-01-01", baseModel="SD 1.4"),
        made(2, "dream", publishedAt="2023-03-01"),
        made(3, "dream", publishedAt="2023-06-01"),
    )
    found = resolve(index, Reference(name="dream"), base_model="SD 1.5", created_at="2023-04-01")
    assert ids(found) == [2, 3, 1]
    assert len({candidate.confidence for candidate in found.candidates}) == 1
    found = resolve(index, Reference(name="dream"), created_at="2022-01-01")
    assert ids(found) == [1, 2, 3]


def test_the_site_is_asked_last_of_hashes_and_before_names() -> None:
    asked = []

    def lookup(digest: str) -> int | None:
        asked.append(digest)
        return 2 if digest == "F" * 10 else None

    index = resolver(
        model(1, modelVersions=[made(1, "one", "A" * 10), made(2, "two", "B" * 10)]), lookup=lookup
    )
    assert ids(resolve(index, Reference(hash="A" * 10))) == [1]
    assert asked == []
    found = resolve(index, Reference(hash="F" * 10, name="two"))
    assert (ids(found), found.via, found.standing) == ([2], "by-hash", "agrees")
    assert resolve(index, Reference(hash="E" * 10, name="two")).via == "file name"
    assert asked == ["F" * 10, "E" * 10]


def test_a_gallery_is_the_weakest_evidence() -> None:
    index = several(made(1, "one", "A" * 10), made(2, "two", "A" * 10), made(3, "three"))
    shared = Reference(hash="A" * 10)
    assert ids(resolve(index, shared, gallery=[2, 3, 99])) == [2]
    assert ids(resolve(index, shared, gallery=[3])) == [1, 2]
    alone = resolve(index, gallery=[3])
    assert (ids(alone), alone.via) == ([3], "gallery")
    assert alone.best.confidence == CONFIDENCE[VIAS[-2], "alone"]
    assert resolve(index, Reference(hash="F" * 10), gallery=[3]).best.confidence < 0.7


def test_a_hash_of_nothing_means_nothing() -> None:
    index = several(made(1, digest="E3B0C442"), made(2, digest="E3B0C44298FC"))
    for digest in ("E3B0C442", "E3B0C44298", "E3B0C44298FC"):
        assert index.checkpoint([Reference(hash=digest)]) == "hash not in the snapshot"


def test_loras_are_found_by_the_same_means() -> None:
    ink = model(2, type="LORA", name="Ink")
    ink["modelVersions"] = [made(20, "ink_v1", KINDS["AutoV3"]), made(21, "ink_v2", "AAAA1111")]
    copy = model(3, type="LoCon", name="Copy", modelVersions=[made(30, "copy", KINDS["AutoV3"])])
    other = model(4, type="LORA", modelVersions=[made(40, "xl", "BBBB2222", baseModel="SDXL 1.0")])
    near = model(5, type="LORA", modelVersions=[made(50, "near", "AAAA1111")])
    models = (model(1, modelVersions=[made(10)]), ink, copy, other, near)
    index = resolver(*models)
    entries = [make_entry(m, v, v["files"][0]) for m in models for v in m["modelVersions"]]
    index.use(Catalogue(entries))
    for reference, kept, outcome in (
        (Reference(version_id=21), [21], "kept by id or hash"),
        (Reference(hash=KINDS["AutoV3"][:10], name="whatever"), [20], "kept by id or hash"),
        (Reference(hash=KINDS["AutoV3"], name="copy"), [30], "kept by id or hash"),
        (Reference(hash="AAAA1111"), [], "hash of several"),
        (Reference(hash="AAAA1111", name="near"), [50], "kept by id or hash"),
        (Reference(hash="BBBB2222"), [], "made for another base model"),
        (Reference(name="INK-v2.safetensors"), [21], "kept by file name"),
        (Reference(name="ink"), [], "file name unknown"),
        (Reference(hash="F" * 12, name="ink_v2"), [], "hash not in the snapshot"),
        (Reference(version_id=10), [], "version is not a LORA"),
        (Reference(version_id=11, name="ink_v2"), [], "version not in the snapshot"),
        (Reference(version_id=21, weight=9), [], "weight out of range"),
    ):
        found = index.loras([reference], entries[0])
        assert [entry.version_id for entry, _ in found.kept] == kept, reference
        assert found.outcomes == (outcome,), reference


NAMES = st.sampled_from(["dream", "dream_v2", "Night Sky", "night", "v2", "sky mix", "犬 dog"])
DIGESTS = st.sampled_from(["AAAA1111", "BBBB2222", "A" * 10, "AAAA1111CC", "D" * 12, "B" * 64])
VERSIONS = st.lists(st.tuples(NAMES, NAMES, NAMES, DIGESTS, st.booleans()), min_size=1, max_size=7)
REFERENCES = st.lists(
    st.builds(
        Reference,
        version_id=st.none() | st.integers(1, 9),
        hash=st.none() | DIGESTS,
        name=st.none() | NAMES | st.text(max_size=12),
    ),
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(VERSIONS, REFERENCES, st.sampled_from([None, "SD 1.5", "Pony", "Other"]), st.randoms())
def test_answers_are_probabilities_whatever_the_order(
    versions: list[tuple[str, str, str, str, bool]],
    references: list[Reference],
    base_model: str | None,
    order: random.Random,
) -> None:
    pairs = []
    for ident, (title, name, file, digest, xl) in enumerate(versions, 1):
        base = "SDXL 1.0" if xl else "SD 1.5"
        one = made(ident, file, digest, name=name, baseModel=base)
        pairs.append((model(len(title), name=title), one))
    answers = []
    for shuffled in (pairs, order.sample(pairs, len(pairs))):
        index = Resolver()
        for parent, one in shuffled:
            index.add(parent, one, "")
        answers.append(index.checkpoint(references, base_model=base_model))
    assert answers[0] == answers[1]
    if isinstance(answers[0], Resolution):
        confidences = [candidate.confidence for candidate in answers[0].candidates]
        assert confidences == sorted(confidences, reverse=True)
        assert confidences[-1] >= 0 and sum(confidences) <= 1.001
        assert len(set(ids(answers[0]))) == len(confidences)
        assert {candidate.via for candidate in answers[0].candidates} <= set(VIAS)


def test_what_is_added_later_is_found() -> None:
    index = several(made(1, "dream"))
    assert ids(resolve(index, Reference(name="dream"))) == [1]
    index.add(model(2), made(2, "dream"), "")
    assert ids(resolve(index, Reference(name="dream"))) == [1, 2]


def test_confidences_are_probabilities_of_known_kinds() -> None:
    assert {via for via, _ in CONFIDENCE} <= set(VIAS)
    assert all(0 < value < 1 for value in CONFIDENCE.values())
    assert {via for via in VIAS if (via, "alone") not in CONFIDENCE} == {
        "civitaiResources",
        "by-hash",
        "gallery",
    }


def test_keys_of_names() -> None:
    assert file_stem("a/b\\Dream v2.safetensors [0123abcd]") == "Dream v2"
    assert exact_key("Dream-World_v2.0") == exact_key("dreamworld V20") == "dreamworldv20"
    assert words("dreamWorldV2_fp16") == words("World dream (v2) pruned") == {"dream", "world", "2"}
    assert titles("MIX 麦橘 - new (SD1.5)")[1:3] == ["MIX 麦橘 - new  ", "MIX 麦橘"]
    assert titles(None) == []
