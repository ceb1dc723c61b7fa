"""Arrow schemas of every table that a stage writes. Bump SCHEMA_VERSION when a meaning changes."""

from __future__ import annotations

import pyarrow as pa


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

#: One row a candidate answer to a prompt: sampled, taken from DABench or given by a selector.
CANDIDATES = _schema(
    ("prompt_id", _int, False),  # DABENCH.id
    ("prompt", _text, False),
    ("candidate", pa.int32(), False),  # 0..k-1 within the prompt and source
    ("source", _text, False),  # 'dabench', 'sft', 'rrhf', 'popular', 'random', 'nearest'
    ("text", _text, False),  # what was answered, verbatim
    ("api", _text, True),  # compact JSON when valid
    ("status", _text, False),  # 'valid' | 'invalid'
    ("reason", _text, True),  # 'truncated', or the kind of hallucination: agent.verify.KINDS
    ("logprob", _float, True),  # length-normalised, of the sampled tokens
)

#: One row a (candidate, seed). ``recipe`` is the digest of what determines the picture, and
#: the picture is images/RECIPE.png of the same artefact.
RENDERS = _schema(
    ("prompt_id", _int, False),
    ("source", _text, False),
    ("candidate", pa.int32(), False),
    ("seed", _int, False),
    ("prompt", _text, False),
    ("recipe", _text, True),
    ("status", _text, False),  # 'ok' | 'invalid' | 'failed'
    ("reason", _text, True),
    ("problem", _text, True),  # a failed picture's own message: which file, what is wrong with it
    ("nsfw", _float, True),  # probability by the safety check; null: not checked
    ("note", _text, True),  # how the picture differs from what its call means; null: it does not
)

#: One row a RENDERS row, in the same order. Rewards are null where there is no picture;
#: ``unified`` is the floor for a hallucination and null for a truncated answer or a failed render.
SCORES = _schema(
    ("prompt_id", _int, False),
    ("source", _text, False),
    ("candidate", pa.int32(), False),
    ("seed", _int, False),
    ("recipe", _text, True),
    ("clip", _float, True),
    ("image_reward", _float, True),
    ("hps_v2", _float, True),
    ("unified", _float, True),
    ("status", _text, False),
    ("reason", _text, True),
)

#: One row a RENDERS row, in the same order: what held-out judges say, null where there is no
#: picture or no such judge. Not what an agent is trained on.
JUDGEMENTS = _schema(
    ("prompt_id", _int, False),
    ("source", _text, False),
    ("candidate", pa.int32(), False),
    ("seed", _int, False),
    ("recipe", _text, True),
    ("pick_score", _float, True),
    ("aesthetic", _float, True),
    ("status", _text, False),
    ("reason", _text, True),
)

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
