"""Tables that stages write: one definition gives the Arrow schema, the reader and the writer.

Tables that only one package reads are Arrow schemas. Tables that stages pass on (candidates,
renders, scores, judgements) are types of rows: a `Table` derives the schema from a dataclass, so a
misspelt column is an error of the type checker, and a file with other columns is refused by name.
Bump SCHEMA_VERSION when a meaning changes.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from diffagent.errors import ArtifactError

if TYPE_CHECKING:
    import polars as pl


def _schema(*fields: tuple[str, pa.DataType, bool]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=null) for name, kind, null in fields])


#: Reason of an answer that ``max_new_tokens`` cut short: its text is the beginning of a JSON value.
TRUNCATED = "truncated"

_text, _int, _float, _bool = pa.string(), pa.int64(), pa.float64(), pa.bool_()

#: One row a model version that can be called: checkpoints, and LoRAs to lay over them.
#: ``model`` is unique per model id over the whole catalogue (the site's names are not).
CATALOGUE = _schema(
    ("model", _text, False),
    ("version", _text, False),
    ("type", _text, False),  # Checkpoint | LORA | LoCon | DoRA
    ("base_model", _text, False),
    ("model_id", _int, False),
    ("version_id", _int, False),
    ("air", _text, False),
    ("file_name", _text, False),  # as the site gives it; never used as a path
    ("file_id", _int, True),
    ("size_bytes", _int, True),
    ("sha256", _text, True),  # lower case
    ("download_path", _text, False),  # '/api/download/models/ID?...', relative to the site
    ("description", _text, False),  # first sentences, plain text
    ("tags", pa.list_(_text), False),
    ("trained_words", pa.list_(_text), False),
    ("downloads", _int, False),  # 0 also where the creator hides it
    ("creator", _text, True),
    ("allow_commercial_use", pa.list_(_text), True),  # null: unknown
    ("allow_derivatives", _bool, True),
    ("allow_no_credit", _bool, True),
    ("base_model_licence", _text, True),
    ("commercial_use", _text, False),  # of pictures: yes | no | unknown
    ("commercial_use_source", _text, True),  # model: the creator's settings | base_model: licence
    ("nsfw", _bool, False),  # the model's own flag
    ("nsfw_levels", _int, True),  # bits: union of its pictures', no evidence of what it makes
    ("page", _text, False),  # '/models/ID?modelVersionId=ID', relative to the site
    ("generation", pa.int32(), False),  # crawl that first had it: 0, or the n-th with news
    ("first_seen", _text, True),  # day of that crawl, YYYY-MM-DD
)

#: Versions that a record's metadata may mean. ("element" is what parquet calls it.)
CANDIDATE_VERSIONS = pa.list_(
    pa.field(
        "element",
        pa.struct(
            _schema(
                ("version_id", _int, False), ("via", _text, False), ("confidence", _float, False)
            )
        ),
        nullable=False,
    )
)
EMBEDDING = pa.struct(
    [("name", _text), ("hash", _text), ("weight", _float), ("negative", _bool)]  # of which prompt
)
REACTIONS = pa.struct([(name, _int) for name in ("like", "heart", "laugh", "cry")])

#: One row an (instruction, API) pair that passed the filters.
RECORDS = _schema(
    ("id", _int, False),  # image id
    ("prompt", _text, False),  # instruction: cleaned prompt
    ("prompt_raw", _text, False),
    ("negative_prompt_raw", _text, True),
    ("api", _text, False),  # compact JSON of diffagent.schemas.api.T2IAPI, everything set
    ("model", _text, False),
    ("version", _text, False),
    ("base_model", _text, False),
    ("model_id", _int, False),
    ("version_id", _int, False),
    (
        "resolved_via",
        _text,
        False,
    ),  # evidence of the version: see diffagent.dabench.filter.resolve.VIAS
    ("confidence", _float, False),  # probability that the picture was made with this version
    ("candidates", CANDIDATE_VERSIONS, False),  # all versions that it may be, likeliest first
    ("sampler_raw", _text, False),
    ("loras_dropped", _int, False),  # LoRAs of the metadata that the API does not have
    ("embeddings_dropped", _int, False),  # embeddings of the metadata that the API does not have
    ("embeddings_raw", pa.list_(EMBEDDING), False),  # as the metadata names them
    ("size_from_image", _bool, False),  # no size is written; the picture's own stands in
    ("from_image", _bool, False),  # img2img: the prompt and the parameters are not all
    ("form", _text, False),  # dialect of the metadata: diffagent.t2i.metadata.Form
    ("parser", pa.int32(), False),  # version of the reader of metadata
    ("creator", _text, True),
    ("post_id", _int, True),
    ("url", _text, True),
    ("created_at", _text, True),
    ("nsfw_level", _int, False),  # bit: 1 PG, 2 PG-13, 4 R
    ("nsfw_source", _text, True),  # field of the record that says so
    ("reactions", _int, False),  # of all kinds
    ("reaction_counts", REACTIONS, False),
    ("generation", pa.int32(), False),  # crawl that first had picture and checkpoint
    ("first_seen", _text, True),  # day of that crawl, YYYY-MM-DD
)

#: One row a record with a prompt and a known checkpoint, whether the filters keep it or not, by
#: id: what splits are decided from. RECORDS are those that are ``kept``, in the same order.
PRINTS = _schema(
    ("id", _int, False),
    ("generation", pa.int32(), False),  # number of the refresh that brought it; 0: first crawl
    ("post_id", _int, True),
    ("creator", _text, True),
    ("base_model", _text, False),
    ("kept", _bool, False),
    ("shingles", pa.list_(_int), False),  # diffagent.dabench.build.splits.shingles of the prompt
)

#: One row a pair of DABench. ``group``: the id that names all that is tied to it by near-duplicate
#: prompts, posts and series, and lies in one split; the smallest id of those that were new when it
#: was decided (its complement, below 0, where another group has that name by now).
#: ``random_split``: where a hash of its own id would have put it, leaks and all.
DABENCH = pa.schema(
    [
        *RECORDS,
        pa.field("group", _int, nullable=False),
        pa.field("random_split", _text, nullable=False),
    ]
)

#: One row a record whose split was ever decided, by id: the dataset's memory (``splits.parquet``).
#: The metadata of its schema have the frozen cut points: ``cuts``, JSON {base model: [test,
#: validation]}.
DECISIONS = _schema(
    ("id", _int, False),
    ("split", _text, False),
    ("group", _int, False),  # names its group
    ("age", pa.int32(), False),  # rank of the group, oldest first
    ("mark", pa.uint64(), False),  # hash of what ties it to others: word pairs, post, creator
    ("present", _bool, False),  # among the prints of this version, with this mark and split
)

Int32 = Annotated[int, pa.int32()]


class _Row(Protocol):
    __dataclass_fields__: typing.ClassVar[dict[str, Any]]


R = TypeVar("R", bound=_Row)


class Table(Generic[R]):
    """Rows of one dataclass in parquet files.

    Args:
        row: a dataclass of texts, numbers and truth values; ``X | None`` is a nullable column.
        file_name: name of the file in an artifact.
    """

    def __init__(self, row: type[R], file_name: str) -> None:
        self.row, self.file_name = row, file_name
        hints = typing.get_type_hints(row, include_extras=True)
        self.schema = pa.schema([_column(name, hint) for name, hint in hints.items()])

    def write(
        self, rows: Iterable[R], path: Path, metadata: Mapping[bytes, str] | None = None
    ) -> None:
        """Write ``rows`` to the file ``path``, with ``metadata`` in its schema."""
        rows = list(rows)
        columns = [[getattr(row, name) for row in rows] for name in self.schema.names]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, self.schema, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=self.schema)
        if metadata:
            table = table.replace_schema_metadata(dict(metadata))
        pq.write_table(table, path, compression="zstd")

    def read(self, path: Path) -> list[R]:
        """Read the rows of a file.

        Raises:
            ArtifactError: it has other columns.
        """
        self.check(path)
        return [self.row(**values) for values in pq.read_table(path).to_pylist()]

    def read_frame(self, path: Path) -> pl.DataFrame:
        """Read a file as a data frame.

        Raises:
            ArtifactError: it has other columns.
        """
        import polars as pl

        self.check(path)
        return pl.read_parquet(path)

    def check(self, path: Path) -> None:
        """Compare the columns of a file with the schema.

        Raises:
            ArtifactError: a column is missing, unknown or of another type; each is named.
        """
        columns = {field.name: field.type for field in pq.read_schema(path)}
        expected = {field.name: field.type for field in self.schema}
        problems = [f"lacks {name!r}" for name in expected if name not in columns]
        problems += [f"has an unknown column {name!r}" for name in columns if name not in expected]
        problems += [
            f"{name!r} is {columns[name]} instead of {kind}"
            for name, kind in expected.items()
            if name in columns and columns[name] != kind
        ]
        if problems:
            raise ArtifactError(
                f"{str(path)!r} is not a table of {self.row.__name__}: {'; '.join(problems)}; "
                "build its stage again with this version"
            )


def _column(name: str, hint: Any) -> pa.Field:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    [kind] = [option for option in options if option is not type(None)]
    if typing.get_origin(kind) is Annotated:
        arrow = typing.get_args(kind)[1]
    else:
        arrow = {str: _text, int: _int, float: _float, bool: _bool}[kind]
    return pa.field(name, arrow, nullable=len(options) > 1)


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """One answer to a prompt: sampled, taken from DABench, or given by a selector.

    Attributes:
        prompt_id: ``id`` of the pair in DABench.
        prompt: the prompt.
        candidate: number of the answer within the prompt and source, from 0.
        source: 'dabench' or the name of the selector.
        text: the answer, verbatim.
        api: compact JSON of the API call when it is valid.
        status: 'valid' or 'invalid'.
        reason: 'truncated', or the kind of hallucination (``agent.verify.KINDS``).
        logprob: length-normalised log-probability of the sampled tokens.
    """

    prompt_id: int
    prompt: str
    candidate: Int32
    source: str
    text: str
    api: str | None
    status: str
    reason: str | None
    logprob: float | None = None


@dataclass(frozen=True, slots=True)
class RenderRow:
    """One (candidate, seed): a picture, or the reason why there is none.

    Attributes:
        prompt_id: as in `CandidateRow`.
        source: as in `CandidateRow`.
        candidate: as in `CandidateRow`.
        seed: of the picture.
        prompt: the prompt.
        recipe: digest of everything that determines the picture, which is images/RECIPE.png of the
            same artifact.
        status: 'ok', 'invalid' or 'failed'.
        reason: of a row without a picture.
        problem: message of a failed picture: which file, and its fault.
        nsfw: probability by the safety check; null: not checked.
        note: difference between the picture and the meaning of its API call; null: none.
    """

    prompt_id: int
    source: str
    candidate: Int32
    seed: int
    prompt: str
    recipe: str | None
    status: str
    reason: str | None
    problem: str | None = None
    nsfw: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """Rewards of one `RenderRow`, in the same order; null where there is no picture.

    ``unified`` is the floor for a hallucination and null for a truncated answer or a failed render.
    """

    prompt_id: int
    source: str
    candidate: Int32
    seed: int
    recipe: str | None
    clip: float | None
    image_reward: float | None
    hps_v2: float | None
    unified: float | None
    status: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class JudgementRow:
    """Scores of held-out judges for one `RenderRow`, in the same order.

    Null where there is no picture or no such judge. No agent is trained on them.
    """

    prompt_id: int
    source: str
    candidate: Int32
    seed: int
    recipe: str | None
    pick_score: float | None
    aesthetic: float | None
    status: str
    reason: str | None


CANDIDATES = Table(CandidateRow, "candidates.parquet")
RENDERS = Table(RenderRow, "renders.parquet")
SCORES = Table(ScoreRow, "scores.parquet")
JUDGEMENTS = Table(JudgementRow, "judgements.parquet")

#: One row a (selector, held-out prompt). Agreement with DABench is 1 or 0, and 0 for an invalid
#: answer; rewards are means over the seeds and null where there is no picture.
EVALUATION = _schema(
    ("selector", _text, False),
    ("prompt_id", _int, False),
    ("reason", _text, True),  # 'truncated', or the kind of hallucination; null: valid
    ("unified", _float, True),
    ("unified_valid", _float, True),
    ("clip", _float, True),
    ("image_reward", _float, True),
    ("hps_v2", _float, True),
    ("pick_score", _float, True),  # held-out judges: null where they were not asked
    ("aesthetic", _float, True),
    ("hallucinated", _float, False),
    ("truncated", _float, False),
    ("render_failed", _float, True),
    ("model", _float, False),
    ("model_version", _float, False),
    ("sampler", _float, False),
    ("steps", _float, False),
    ("cfg_scale", _float, False),
    ("size", _float, False),
    ("clip_skip", _float, False),
    ("loras", _float, False),
    ("negative_prompt", _float, False),
    ("negative_prompt_overlap", _float, False),
)
