"""How often the resolver finds the checkpoint that a picture was made with, and how fast.

    python benchmarks/bench_resolve.py [--fit] [DIR]

DIR is a dump (``models*.jsonl[.gz]``, ``images*.jsonl[.gz]``); without it, the sandbox's records.
One JSON object a line. ``--fit`` prints the constants of ``diffagent.dabench.filter.resolve``
instead.

Truth: the version of a checkpoint in whose showcase the picture is (``_context`` of the dump; of a
record without that, the only checkpoint among its ``modelVersionIds``). It is read for counting
only: the resolver gets the metadata, never the gallery and never a base model that comes from it.
A showcase is its creator's choice, and at times shows what another version or another checkpoint
made; the lines 'ceiling' say how often a file's hash proves that.

The models fall in two halves by a checksum of their ids: constants come from one, and all
figures but 'baseline' and 'names' from the other. Intervals are 95 %, by bootstrap over models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import tracemalloc
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from diffagent.dabench.filter.resolve import VIAS, Candidate, Resolution, Resolver, Standing
from diffagent.dabench.filter.version_index import NAME_VIAS, KnownVersion, told_base
from diffagent.localcivitai.sources.dump import read_records
from diffagent.sandbox.files import materialise
from diffagent.t2i.catalogue import CHECKPOINT
from diffagent.t2i.metadata import Generation, Reference, parse_generation

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
RESAMPLES = 1000
SPEED_REPEATS = 3
STRIDE = 20  # of the names asked of many versions
MANY_VERSIONS = 100_000
MIN_FILE_DIGITS = 10  # of a hash of the whole file


def in_fit(model_id: int) -> bool:
    """Which half of the models one is of."""
    return zlib.crc32(str(model_id).encode()) % 2 == 0


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture of which the truth is known."""

    version_id: int
    model_id: int
    references: tuple[Reference, ...]
    loras: tuple[Reference, ...]

    @property
    def fits(self) -> bool:
        """Whether its model is of the half that the constants come from."""
        return in_fit(self.model_id)


class World:
    """A dump: its versions in a resolver, and its pictures of checkpoints."""

    def __init__(self, directory: Path) -> None:
        self.resolver = Resolver()
        self.bases: Counter[str] = Counter()  # of the checkpoints
        self.models = {model["id"]: model for model in read_records(directory, "models")}
        self.checkpoints: dict[int, int] = {}  # version id -> model id
        for model in self.models.values():
            for version in model.get("modelVersions") or ():
                self.resolver.add(model, version, "")
                if model.get("type") == CHECKPOINT:
                    self.bases.update(filter(None, [told_base(version.get("baseModel"))]))
                    self.checkpoints.setdefault(version["id"], model["id"])
        self.shown: list[Shown] = []
        self.made: list[Generation] = []
        for item in read_records(directory, "images"):
            generation = parse_generation(
                item.get("meta"), image_width=item.get("width"), image_height=item.get("height")
            )
            self.made.append(generation)
            truth = self._truth(item)
            if truth is not None:
                self.shown.append(
                    Shown(truth, self.checkpoints[truth], generation.checkpoints, generation.loras)
                )

    def _truth(self, item: dict[str, Any]) -> int | None:
        context = item.get("_context")
        ids = [context["modelVersionId"]] if context else item.get("modelVersionIds") or []
        found = [ident for ident in ids if ident in self.checkpoints]
        return found[0] if len(found) == 1 else None

    def resolve(self, shown: Shown, hidden: bool = False) -> Resolution | None:
        """With all that its metadata says, or with the name alone."""
        references = shown.references
        if hidden:
            names = [r.name for r in references if r.name]
            references = (Reference(name=names[0]),) if names else ()
        found = self.resolver.checkpoint(references, loras=shown.loras)
        return found if isinstance(found, Resolution) else None

    def by_file(self, references: Iterable[Reference]) -> KnownVersion | None:
        """The version that alone has a file of the first hash of ten digits or more."""
        digest = next(
            (r.hash for r in references if r.hash and len(r.hash) >= MIN_FILE_DIGITS), None
        )
        found = self.resolver.checkpoint((Reference(hash=digest),)) if digest else ""
        if isinstance(found, str) or len(found.candidates) > 1:
            return None
        return found.best.version


def deciding(found: Resolution) -> list[Candidate]:
    """The candidates of the best evidence."""
    return [candidate for candidate in found.candidates if candidate.via == found.via]


@dataclass
class Fit:
    """What the constants are made of."""

    right: Counter[tuple[str, Standing]] = field(default_factory=Counter)
    seen: Counter[tuple[str, Standing]] = field(default_factory=Counter)
    first: int = 0
    several: int = 0

    def confidence(self, kind: tuple[str, Standing]) -> float:
        """Share of right answers, by rule of succession."""
        return round((self.right[kind] + 1) / (self.seen[kind] + 2), 4)

    @property
    def first_version(self) -> float:
        return round((self.first + 1) / (self.several + 2), 4)


def fit(world: World) -> Fit:
    """Count how often each kind of evidence is right, on the half for that."""
    made = Fit()
    for shown, hidden in itertools.product(filter(lambda s: s.fits, world.shown), (False, True)):
        found = world.resolve(shown, hidden)
        # A name is also tried where a hash decides; a name beside an unknown hash as it is.
        if found is None or hidden != (found.via in NAME_VIAS and found.standing in _ALONE):
            continue
        meant = [candidate.version for candidate in deciding(found)]
        right = shown.version_id in {version.version_id for version in meant}
        made.seen[found.via, found.standing] += 1
        made.right[found.via, found.standing] += right
        if found.via == "model name" and len(meant) > 1 and right:
            made.several += 1
            made.first += min(meant, key=_date).version_id == shown.version_id
    return made


def print_constants(world: World) -> None:
    made = fit(world)
    for kind in sorted(made.seen, key=lambda kind: (VIAS.index(kind[0]), kind[1])):
        counts = f"{made.right[kind]} of {made.seen[kind]}"
        print(f'        ("{kind[0]}", "{kind[1]}"): {made.confidence(kind)},  # {counts}')
    print(f"FIRST_VERSION = {made.first_version}  # {made.first} of {made.several}")
    against, told, others = base_models(world)
    odds = (against + 1) / (told + 2) / max(others, 1e-9)
    print(f"BASE_MODEL_ODDS = {odds:.4f}  # {against} of {told} against {others:.4f}")


_ALONE = ("alone", "shared")


def _date(version: KnownVersion) -> tuple[str, int]:
    return version.published, version.version_id


def base_models(world: World) -> tuple[int, int, float]:
    """How often LoRAs speak against the checkpoint that a file proves, of how many pictures, and
    against what share of all checkpoints they do."""
    against, told, others = 0, 0, 0.0
    for made in world.made:
        version = world.by_file(made.checkpoints)
        base = world.resolver.base_of_loras(made.loras)
        if version is None or version.base is None or base is None:
            continue
        told += 1
        against += version.base != base
        others += 1 - world.bases[base] / world.bases.total()
    return against, told, others / max(told, 1)


class Score:
    """Answers counted by model, for intervals over models."""

    def __init__(self) -> None:
        self._of_model: defaultdict[int, list[float]] = defaultdict(lambda: [0.0] * 5)

    def add(self, shown: Shown, answer: Candidate | None) -> None:
        row = self._of_model[shown.model_id]
        row[0] += 1
        if answer is not None:
            row[1] += 1
            row[2] += answer.version.version_id == shown.version_id
            row[3] += answer.version.model_id == shown.model_id
            row[4] += answer.confidence

    def figures(self, *, coverage: bool = False) -> dict[str, Any]:
        rows = np.array(list(self._of_model.values()) or [[0.0] * 5])
        rng = np.random.default_rng(0)
        drawn = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
        sums, total = drawn @ rows, rows.sum(axis=0)
        made: dict[str, Any] = {"records": int(total[0]), "answers": int(total[1])}
        if coverage:
            made["coverage"] = _interval(total[1], total[0], sums[:, 1], sums[:, 0])
        made["precision_version"] = _interval(total[2], total[1], sums[:, 2], sums[:, 1])
        made["precision_model"] = _interval(total[3], total[1], sums[:, 3], sums[:, 1])
        made["mean_confidence"] = round(float(total[4] / max(total[1], 1)), 4)
        return made


def _interval(value: float, of: float, values: Any, ofs: Any) -> list[float]:
    """[share, low, high]"""
    ratios = values[ofs > 0] / ofs[ofs > 0]
    if not of or not len(ratios):
        return []
    low, high = np.quantile(ratios, (0.025, 0.975))
    return [round(float(x), 4) for x in (value / of, low, high)]


def emit(figure: str, **values: Any) -> None:
    print(json.dumps({"benchmark": "resolve", "figure": figure, **values}))


def thresholds(world: World, held_out: list[Shown]) -> None:
    """Precision against coverage, and what each kind of evidence is worth."""
    scores = {limit: Score() for limit in THRESHOLDS}
    kinds: defaultdict[tuple[str, str], Score] = defaultdict(Score)
    reached = 0
    for shown in held_out:
        found = world.resolve(shown)
        for limit, score in scores.items():
            sure = found is not None and found.best.confidence >= limit
            score.add(shown, found.best if found is not None and sure else None)
        if found is not None:
            kinds[found.via, found.standing].add(shown, found.best)
            reached += any(c.version.version_id == shown.version_id for c in found.candidates)
    for limit, score in scores.items():
        emit("threshold", min_confidence=limit, **score.figures(coverage=True))
    for (via, standing), score in sorted(kinds.items()):
        emit("evidence", via=via, standing=standing, **score.figures())
    emit("ceiling", truth_among_candidates=round(reached / len(held_out), 4))


def ceiling(world: World, held_out: list[Shown]) -> None:
    """A file that one version alone has: where that is not the showcase's, the showcase errs."""
    score = Score()
    for shown in held_out:
        if version := world.by_file(shown.references):
            score.add(shown, Candidate(version, "hash", 1.0))
    emit("ceiling", what="file of one version", **score.figures())


def baseline(world: World, pictures: list[Shown], of: str) -> None:
    """By hash alone, the first published of the versions that share it."""
    score = Score()
    for shown in pictures:
        answer = None
        for reference in shown.references:
            found = world.resolver.checkpoint((Reference(hash=reference.hash),))
            if reference.hash and isinstance(found, Resolution):
                version = min((c.version for c in found.candidates), key=_date)
                answer = Candidate(version, "hash", 1.0)
                break
        score.add(shown, answer)
    emit("baseline", of=of, **score.figures(coverage=True))


def names(world: World) -> None:
    """Names against files: all pictures of the dump whose file is known, by their name alone."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for made in world.made:
        version = world.by_file(made.checkpoints)
        name = next((r.name for r in made.checkpoints if r.name), None)
        if version is None or name is None:
            continue
        found = world.resolver.checkpoint((Reference(name=name),))
        count = counts["none" if isinstance(found, str) else found.via]
        count["n"] += 1
        if isinstance(found, Resolution):
            count["version"] += found.best.version == version
            count["model"] += found.best.version.model_id == version.model_id
    for via, count in sorted(counts.items()):
        n = count["n"]
        emit(
            "names",
            via=via,
            records=n,
            precision_version=round(count["version"] / n, 4),
            precision_model=round(count["model"] / n, 4),
        )


def absent(world: World) -> None:
    """What is answered when the checkpoint is not in the snapshot: every answer is wrong.

    The snapshot is the held-out half; the pictures are those whose file is of the other.
    """
    half, left_out = Resolver(), set()
    for model in world.models.values():
        if in_fit(model["id"]):
            left_out.add(model["id"])
            continue
        for version in model.get("modelVersions") or ():
            half.add(model, version, "")
    seen, answers = 0, Counter[float]()
    vias: Counter[str] = Counter()
    for made in world.made:
        version = world.by_file(made.checkpoints)
        if version is None or version.model_id not in left_out:
            continue
        seen += 1
        found = half.checkpoint(made.checkpoints, loras=made.loras)
        if isinstance(found, Resolution):
            vias[found.best.via] += 1
            answers.update(limit for limit in THRESHOLDS if found.best.confidence >= limit)
    shares = {str(limit): round(answers[limit] / max(seen, 1), 4) for limit in THRESHOLDS}
    emit("absent", records=seen, wrong_answers=shares, vias=dict(vias.most_common()))


def loras(world: World) -> None:
    """LoRAs whose file is known, by the name of the file alone."""
    seen, right, wrong = 0, 0, 0
    resolver = world.resolver
    for made in world.made:
        for lora in made.loras:
            proved = resolver.lora_versions(Reference(hash=lora.hash)) if lora.hash else ()
            if not lora.name or len(lora.hash or "") < MIN_FILE_DIGITS or len(proved) != 1:
                continue
            seen += 1
            named = resolver.lora_versions(Reference(name=lora.name))
            if len(named) == 1:
                right += named == proved
                wrong += named != proved
    share = round(right / max(right + wrong, 1), 4)
    emit("loras by file name", loras=seen, answers=right + wrong, precision_version=share)


def speed(world: World) -> None:
    """Processor time of a record, as a build meets them: what was asked before is remembered."""
    world.resolver.forget()
    times = []
    for _ in range(SPEED_REPEATS):
        started = time.process_time()
        for made in world.made:
            world.resolver.checkpoint(made.checkpoints, loras=made.loras)
        seconds = time.process_time() - started
        times.append(round(1e6 * seconds / max(len(world.made), 1), 2))
    emit("speed", records=len(world.made), microseconds_first=times[0], microseconds=min(times))


def many(world: World) -> None:
    """100,000 versions: the dump's, again and again with fresh ids, hashes and names."""
    started, resolver = time.process_time(), Resolver()
    for model, version in _fresh_versions(world.models):
        resolver.add(model, version, "")
    resolver.checkpoint((Reference(hash="0123456789", name="nobody knows it"),))  # sorts
    built = time.process_time() - started
    asked = {r for made in world.made for r in made.checkpoints if r.name and r.hash}
    asked = set(sorted(asked, key=lambda r: (r.hash or "", r.name or ""))[::STRIDE])
    started = time.process_time()
    for reference in asked:
        resolver.checkpoint((reference,))
    per_name = 1e6 * (time.process_time() - started) / max(len(asked), 1)
    del resolver
    tracemalloc.start()
    resolver = Resolver()
    for model, version in _fresh_versions(world.models):
        resolver.add(model, version, "")
    resolver.checkpoint((Reference(hash="0123456789", name="nobody knows it"),))
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    emit(
        "many versions",
        versions=MANY_VERSIONS,
        build_seconds=round(built, 1),
        mebibytes=round(size / 2**20, 1),
        peak_mebibytes=round(peak / 2**20, 1),
        microseconds_per_new_name=round(per_name),
    )


def _fresh_versions(
    models: dict[int, dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    endless = (
        (model, version)
        for model in itertools.cycle(models.values())
        for version in model.get("modelVersions") or ()
    )
    for number, (model, version) in enumerate(islice(endless, MANY_VERSIONS)):
        files = [
            {
                **file,
                "name": f"{number}_{file.get('name')}",
                "hashes": {
                    kind: f"{zlib.crc32(f'{number}{kind}{at}'.encode()):08X}{value}"[: len(value)]
                    for kind, value in (file.get("hashes") or {}).items()
                },
            }
            for at, file in enumerate(version.get("files") or ())
        ]
        fresh = {**version, "id": number, "files": files, "name": f"{version['name']} {number}"}
        yield {**model, "id": number}, fresh


def main(directory: Path, only_fit: bool) -> None:
    world = World(directory)
    if only_fit:
        print_constants(world)
        return
    held_out = [shown for shown in world.shown if not shown.fits]
    thresholds(world, held_out)
    ceiling(world, held_out)
    baseline(world, held_out, "held-out half")
    baseline(world, world.shown, "all")
    names(world)
    absent(world)
    loras(world)
    speed(world)
    many(world)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    main(arguments.directory or materialise(Path("build/sandbox")), arguments.fit)
