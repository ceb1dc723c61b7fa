"""Selection, order and cursors of the listings over a source's records.

A cursor is opaque to clients. Here it is the sort key of the last item served, its columns
joined by '|' as on the site: one column for Newest and Oldest (the id), two for the others
(value and id), one more for each deploy that the fault profile made. A '~1' at its end means that
an empty page was served there. A cursor of another arity is stale.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from diffagent.localcivitai.replay import MEDIA, ModelRow, Replay
from diffagent.schemas.payloads import ALL_LEVELS, BLOCKED, MODEL_TYPES, PG, XXX, R, X

#: Sort key of an item: whole numbers, ascending.
Key = tuple[int, ...]
MODEL_SORTS = (
    "Highest Rated",
    "Most Downloaded",
    "Most Liked",
    "Most Discussed",
    "Most Collected",
    "Most Images",
    "Newest",
    "Oldest",
)
IMAGE_SORTS = ("Most Reactions", "Most Comments", "Most Collected", "Newest", "Oldest", "Random")
_CACHED = 32  # of models, and of images


class BadParameter(ValueError):  # noqa: N818
    """A query parameter has a wrong value: HTTP 400."""

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(f"{parameter}: {problem}")
        self.parameter = parameter
        self.problem = problem


class StaleCursor(ValueError):  # noqa: N818
    """A cursor that this listing never gave, or not since the last deploy: HTTP 400."""


def encode_cursor(key: Key, epoch: int, *, empty: bool = False) -> str:
    """Return the cursor of the place behind the item with this key."""
    return "|".join(map(str, (*key, *([0] * epoch)))) + ("~1" if empty else "")


def decode_cursor(cursor: str, columns: int, epoch: int) -> tuple[Key, bool]:
    """Return the key, and whether an empty page was served there.

    Raises:
        StaleCursor: not a cursor of this sort and epoch.
    """
    text, mark, rest = cursor.partition("~")
    try:
        numbers = tuple(int(part) for part in text.split("|"))
    except ValueError:
        raise StaleCursor(cursor) from None
    if len(numbers) != columns + epoch or (mark and rest != "1"):
        raise StaleCursor(cursor)
    return numbers[:columns], bool(mark)


@dataclass(slots=True)
class Selection:
    """Items in order: their indexes, and the sort key of an index."""

    items: Sequence[int]
    key: Callable[[int], Key]
    columns: int

    def after(self, key: Key) -> int:
        """Return the position of the first item behind ``key``."""
        return bisect.bisect_right(self.items, key, key=self.key)

    def page(self, cursor: str | None, limit: int) -> tuple[Sequence[int], str | None]:
        """Return the indexes behind a cursor and the next cursor.

        Raises:
            StaleCursor: not a cursor of this order.
        """
        start = self.after(decode_cursor(cursor, self.columns, 0)[0]) if cursor else 0
        indexes = self.items[start : start + limit]
        is_last = start + limit >= len(self.items)
        return indexes, None if is_last else encode_cursor(self.key(indexes[-1]), 0)


class Listings:
    """Selections over a replay; the last ones are cached, since a walk reads one page by page.

    Attributes:
        models: models that match a query, in its order.
        images: images that match a query, in its order.
    """

    models: Callable[[ModelQuery], Selection]
    images: Callable[[ImageQuery], Selection]

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.models = functools.lru_cache(_CACHED)(self._select_models)
        self.images = functools.lru_cache(_CACHED)(self._select_images)

    def _select_models(self, query: ModelQuery) -> Selection:
        rows = self.replay.models
        key, columns = _model_order(query.sort, rows)
        if query.query:  # ordered by relevance, for which popularity is a substitute
            key, columns = _model_order("Most Downloaded", rows)
        candidates: Iterable[int] = range(len(rows))
        if query.ids is not None:
            index = self.replay.model_index
            candidates = {index[ident] for ident in query.ids if ident in index}
        matches = [i for i in candidates if query.matches(rows[i])]
        return Selection(sorted(matches, key=key), key, columns)

    def _select_images(self, query: ImageQuery) -> Selection:
        replay = self.replay
        key, columns = self._image_order(query.sort)
        level, media = replay.image_level, replay.image_media
        medium = MEDIA.index(query.media) if query.media else None
        matches = [
            i
            for i in self._candidates(query)
            if level[i] & query.levels and (medium is None or media[i] == medium)
        ]
        matches.sort(key=key)
        return Selection(array("l", matches), key, columns)

    def _candidates(self, query: ImageQuery) -> Iterable[int]:
        replay = self.replay
        sets: list[Iterable[int]] = []
        if query.image_id is not None:
            index = replay.image_index.get(query.image_id)
            # A picture that no listing shows has an id but no index.
            sets.append([] if index is None else [index])
        if query.version_id is not None:
            sets.append(replay.images_of_version.get(query.version_id, ()))
        if query.model_id is not None:
            row = replay.model_index.get(query.model_id)
            ids = replay.models[row].version_ids if row is not None else ()
            sets.append({i for v in ids for i in replay.images_of_version.get(v, ())})
        if query.post_id is not None:
            sets.append(replay.images_of_post.get(query.post_id, ()))
        if query.username:
            sets.append(replay.images_of_user.get(query.username, ()))
        if query.base_models:
            sets.append({i for b in query.base_models for i in replay.images_of_base.get(b, ())})
        if not sets:
            return range(len(replay.image_id))
        return set(sets[0]).intersection(*sets[1:])

    def _image_order(self, sort: str) -> tuple[Callable[[int], Key], int]:
        replay = self.replay
        ids = replay.image_id
        if sort == "Newest":
            return lambda i: (-ids[i],), 1
        if sort == "Oldest":
            return lambda i: (ids[i],), 1
        if sort == "Random":
            return lambda i: (_shuffled(ids[i]), ids[i]), 2
        values = replay.image_comments if sort == "Most Comments" else replay.image_reactions
        return lambda i: (-values[i], -ids[i]), 2


def _model_order(sort: str, rows: Sequence[ModelRow]) -> tuple[Callable[[int], Key], int]:
    if sort == "Newest":
        return lambda i: (-rows[i].id,), 1
    if sort == "Oldest":
        return lambda i: (rows[i].id,), 1
    name = {
        "Most Downloaded": "downloads",
        "Most Discussed": "comments",
        "Most Images": "images",
    }.get(sort, "thumbs")
    return lambda i: (-getattr(rows[i], name), -rows[i].id), 2


def _shuffled(item: int) -> int:
    return int.from_bytes(hashlib.blake2b(str(item).encode(), digest_size=6).digest(), "big")


Pairs = Sequence[tuple[str, str]]


class QueryParameters:
    """A query string, read as the site reads it: repeated keys, typed values, 400 otherwise."""

    def __init__(self, pairs: Pairs) -> None:
        self._values: dict[str, list[str]] = {}
        for key, value in pairs:
            self._values.setdefault(key.removesuffix("[]"), []).append(value)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def text(self, name: str) -> str:
        """Return the last value, or ''."""
        return self._values.get(name, [""])[-1]

    def many(self, name: str) -> tuple[str, ...]:
        """Return all values of a repeated key."""
        return tuple(self._values.get(name, ()))

    def number(self, name: str, *, low: int = 0, high: int = 2**53) -> int | None:
        """Return a whole number in low..high; None when the key is absent or empty."""
        text = self.text(name)
        if not text:
            return None
        try:
            value = int(text)
        except ValueError:
            raise BadParameter(name, f"Expected number, received {text[:40]!r}") from None
        if not low <= value <= high:
            raise BadParameter(name, f"Number must be between {low} and {high}")
        return value

    def numbers(self, name: str) -> tuple[int, ...] | None:
        """Return a comma list of whole numbers; None when absent."""
        if name not in self:
            return None
        parts = [part for value in self.many(name) for part in value.split(",") if part.strip()]
        try:
            return tuple(int(part) for part in parts)
        except ValueError:
            raise BadParameter(name, "Expected a comma list of numbers") from None

    def flag(self, name: str) -> bool | None:
        """Return true/false/1/0/yes/no as a flag; None when absent."""
        if name not in self:
            return None
        value = self.text(name).lower()
        if value in ("true", "1", "yes"):
            return True
        if value in ("false", "0", "no"):
            return False
        raise BadParameter(name, f"Expected boolean, received {value[:40]!r}")

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        """Return one of ``allowed``."""
        value = self.text(name) or default
        if value not in allowed:
            raise BadParameter(name, f"Invalid enum value. Expected {' | '.join(allowed)}")
        return value


@dataclass(frozen=True)
class ModelQuery:
    """The filters of /models that the replay can answer.

    Models that are flagged as showing minors are listed, also with ``nsfw=true``, where the site
    hides them: so no record of a source vanishes without a reason in a funnel.
    """

    sort: str
    types: tuple[str, ...]
    base_models: tuple[str, ...]
    levels: int
    adult: bool
    ids: tuple[int, ...] | None
    version_ids: tuple[int, ...] | None
    tag: str
    username: str
    query: str
    checkpoint_type: str

    @classmethod
    def parse(cls, parameters: QueryParameters) -> ModelQuery:
        """Read the query string.

        Raises:
            BadParameter: a value that the site refuses.
        """
        types = parameters.many("types")
        for kind in types:
            if kind not in MODEL_TYPES:
                raise BadParameter("types", f"Invalid enum value {kind[:40]!r}")
        if "browsingLevel" in parameters:  # z.number() without coercion
            raise BadParameter("browsingLevel", "Expected number, received string")
        parameters.choice("period", PERIODS, "AllTime")
        adult = parameters.flag("nsfw") is True
        return cls(
            sort=parameters.choice("sort", MODEL_SORTS, "Highest Rated"),
            types=types,
            base_models=parameters.many("baseModels"),
            levels=ALL_LEVELS if adult else PG,
            adult=adult,
            ids=parameters.numbers("ids"),
            version_ids=parameters.numbers("modelVersionIds"),
            tag=parameters.text("tag") or parameters.text("tagname"),
            username=parameters.text("username"),
            query=parameters.text("query").lower(),
            checkpoint_type=parameters.choice("checkpointType", ("", "Trained", "Merge"), ""),
        )

    def matches(self, row: ModelRow) -> bool:
        """Whether a model belongs to the listing."""
        return (
            (not self.types or row.type in self.types)
            and bool(row.levels & self.levels)
            and (self.adult or not row.nsfw)
            and (self.ids is None or row.id in self.ids)
            and (self.version_ids is None or not set(self.version_ids).isdisjoint(row.version_ids))
            and (not self.base_models or not row.base_models.isdisjoint(self.base_models))
            and (not self.tag or self.tag in row.tags)
            and (not self.username or self.username.lower() == row.username.lower())
            and (not self.checkpoint_type or self.checkpoint_type == row.checkpoint_type)
            and all(word in row.name.lower() for word in self.query.split())
        )


PERIODS = ("AllTime", "Year", "Month", "Week", "Day")
_NSFW_LEVELS = {
    "none": PG,
    "false": PG,
    "soft": 3,
    "mature": 7,
    "x": ALL_LEVELS,
    "blocked": BLOCKED,
    "true": R | X | XXX | BLOCKED,  # without SFW: it selects, while nsfw=true of /models widens
}


@dataclass(frozen=True)
class ImageQuery:
    """The filters of /images that the replay can answer."""

    sort: str
    levels: int
    media: str
    image_id: int | None
    model_id: int | None
    version_id: int | None
    post_id: int | None
    username: str
    base_models: tuple[str, ...]

    @classmethod
    def parse(cls, parameters: QueryParameters) -> ImageQuery:
        """Read the query string.

        Raises:
            BadParameter: a value that the site refuses.
        """
        level = parameters.number("browsingLevel", low=1, high=63)
        name = parameters.text("nsfw").lower() or "none"
        if name not in _NSFW_LEVELS:
            raise BadParameter("nsfw", f"Invalid enum value {name[:40]!r}")
        sort = parameters.choice("sort", IMAGE_SORTS, "Most Reactions")
        model_id, version_id = parameters.number("modelId"), parameters.number("modelVersionId")
        image_id = parameters.number("imageId")
        parameters.choice("period", PERIODS, "AllTime")
        if is_legacy(parameters) and sort.startswith("Most"):
            sort = "Newest"  # the old database path ignores engagement sorts
        bases = parameters.many("baseModels")
        return cls(
            sort=sort,
            levels=level or _NSFW_LEVELS[name],
            media=parameters.choice("type", ("", *MEDIA), ""),
            image_id=image_id,
            model_id=model_id,
            version_id=version_id,
            post_id=parameters.number("postId"),
            username=parameters.text("username"),
            base_models=tuple(b for value in bases for b in value.split(",") if b),
        )


def is_legacy(parameters: QueryParameters) -> bool:
    """Whether /images takes the site's old path: nested meta, engagement sorts ignored."""
    has_only_model = "modelId" in parameters and "modelVersionId" not in parameters
    return has_only_model or "imageId" in parameters
