"""Tables that stages write: typed rows where they are passed on, Arrow schemas of the others.

Bump SCHEMA_VERSION when a meaning changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa

from diffagent.schemas.rows import Int32, Table, struct_of


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateVersion:
    """Model version that a record's metadata may mean."""

    version_id: int
    via: str
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingReference:
    """Embedding as a record's metadata names it."""

    name: str | None
    hash: str | None
    weight: float | None
    negative: bool | None  # of which prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ReactionCounts:
    """Reactions to a picture, by kind."""

    like: int | None
    heart: int | None
    laugh: int | None
    cry: int | None


#: Arrow type of all candidate versions of a record. ("element" is what parquet calls it.)
_CANDIDATE_VERSIONS = pa.list_(pa.field("element", struct_of(CandidateVersion), nullable=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRow:
    """(Instruction, API) pair that passed the filters."""

    id: int  # image id
    prompt: str  # instruction: cleaned prompt
    prompt_raw: str
    negative_prompt_raw: str | None
    api: str  # compact JSON of diffagent.schemas.api.T2IAPI, everything set
    model: str
    version: str
    base_model: str
    model_id: int
    version_id: int
    resolved_via: str  # evidence of the version: see diffagent.dabench.filter.resolve.VIAS
    confidence: float  # probability that the picture was made with this version
    candidates: Annotated[tuple[CandidateVersion, ...], _CANDIDATE_VERSIONS]  # likeliest first
    sampler_raw: str
    loras_dropped: int  # LoRAs of the metadata that the API does not have
    embeddings_dropped: int  # embeddings of the metadata that the API does not have
    embeddings_raw: tuple[EmbeddingReference, ...]
    size_from_image: bool  # the metadata state no size: it is the picture's
    from_image: bool  # img2img: the prompt and the parameters are not all
    form: str  # dialect of the metadata: diffagent.t2i.metadata.Form
    parser: Int32  # version of the reader of metadata
    creator: str | None
    post_id: int | None
    url: str | None
    created_at: str | None
    nsfw_level: int  # bit: 1 PG, 2 PG-13, 4 R
    nsfw_source: str | None  # field of the record that states the level
    reactions: int  # of all kinds
    reaction_counts: ReactionCounts
    generation: Int32  # crawl that first had picture and checkpoint
    first_seen: str | None  # day of that crawl, YYYY-MM-DD


RECORD_TABLE = Table(RecordRow)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow(RecordRow):
    """Pair of DABench.

    ``group``: the id that names all that is tied to the pair by near-duplicate prompts, posts and
    series, and lies in one split; the smallest id of those that were new when it was decided (its
    complement, below 0, where another group has that name by now).
    ``random_split``: where a hash of the pair's own id would have put it, leaks and all.
    """

    group: int
    random_split: str


PAIR_TABLE = Table(PairRow)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRow:
    """Answer to a prompt: sampled, taken from DABench or chosen by a selector."""

    prompt_id: int  # PairRow.id
    prompt: str
    candidate: Int32  # 0..k-1 within the prompt and source
    source: str  # 'dabench', 'sft', 'rrhf', 'popular', 'random', 'nearest', ...
    text: str  # the answer, verbatim
    api: str | None = None  # compact JSON when valid
    status: str  # 'valid' | 'invalid'
    reason: str | None = None  # 'truncated', or the kind of hallucination: agent.verify.KINDS
    logprob: float | None = None  # length-normalised, of the sampled tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderRow:
    """Candidate with a seed, drawn or not.

    ``recipe`` is the digest of everything that determines the picture, and the picture is
    images/RECIPE.png of the same artifact.
    """

    prompt_id: int
    source: str
    candidate: Int32
    seed: int
    prompt: str
    recipe: str | None = None
    status: str  # 'ok' | 'invalid' | 'failed'
    reason: str | None = None
    problem: str | None = None  # message of a failed picture: which file, what is wrong with it
    nsfw: float | None = None  # probability by the safety check; null: not checked
    note: str | None = None  # how the picture differs from the meaning of its call


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """Rewards of a `RenderRow`, in the same order; null where there is no picture.

    ``unified`` is the floor for a hallucination and null for a truncated answer or a failed render.
    """

    prompt_id: int
    source: str
    candidate: Int32
    seed: int
    recipe: str | None = None
    clip: float | None = None
    image_reward: float | None = None
    hps_v2: float | None = None
    unified: float | None = None
    status: str
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgementRow:
    """Held-out judges' scores of a `RenderRow`, in the same order; no agent is trained on them.

    Null where there is no picture or no such judge.
    """

    prompt_id: int
    source: str
    candidate: Int32
    seed: int
    recipe: str | None = None
    pick_score: float | None = None
    aesthetic: float | None = None
    status: str
    reason: str | None = None


CANDIDATE_TABLE = Table(CandidateRow)
RENDER_TABLE = Table(RenderRow)
SCORE_TABLE = Table(ScoreRow)
JUDGEMENT_TABLE = Table(JudgementRow)

# Arrow schemas of the typed tables, for modules that work on columns.
RECORDS, DABENCH = RECORD_TABLE.schema, PAIR_TABLE.schema
CANDIDATES, RENDERS = CANDIDATE_TABLE.schema, RENDER_TABLE.schema
SCORES, JUDGEMENTS = SCORE_TABLE.schema, JUDGEMENT_TABLE.schema

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
