"""Arrow schemas of every table that a stage writes. Bump SCHEMA_VERSION when a meaning changes."""

from __future__ import annotations

import pyarrow as pa


def _schema(*fields: tuple[str, pa.DataType, bool]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=null) for name, kind, null in fields])


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
    ("downloads", _int, False),
    ("creator", _text, True),
    ("allow_commercial_use", pa.list_(_text), True),  # null: unknown
    ("allow_derivatives", _bool, True),
    ("allow_no_credit", _bool, True),
)

#: Versions that a record's metadata may mean. ("element" is what parquet calls it.)
_CANDIDATES = pa.list_(
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

#: One row an (instruction, API) pair that passed the filters.
RECORDS = _schema(
    ("id", _int, False),  # image id
    ("prompt", _text, False),  # instruction: cleaned prompt
    ("prompt_raw", _text, False),
    ("api", _text, False),  # compact JSON of schemas.api.T2IAPI, everything set
    ("model", _text, False),
    ("version", _text, False),
    ("base_model", _text, False),
    ("model_id", _int, False),
    ("version_id", _int, False),
    ("resolved_via", _text, False),  # evidence of the version: see diffagent.dabench.resolve.VIAS
    ("confidence", _float, False),  # probability that the picture was made with this version
    ("candidates", _CANDIDATES, False),  # all versions that it may be, likeliest first
    ("sampler_raw", _text, False),
    ("loras_dropped", _int, False),  # LoRAs of the metadata that the API does not have
    ("form", _text, False),  # dialect of the metadata: a1111 | civitai | comfyui
    ("creator", _text, True),
    ("post_id", _int, True),
    ("url", _text, True),
    ("nsfw_level", _int, False),
    ("reactions", _int, False),
)

#: One row a pair of DABench. ``group``: smallest id among its near-duplicates and its post,
#: which all lie in one split.
DABENCH = pa.schema([*RECORDS, pa.field("group", _int, nullable=False)])

#: One row a candidate answer to a prompt: sampled, taken from DABench or given by a selector.
CANDIDATES = _schema(
    ("prompt_id", _int, False),  # DABENCH.id
    ("prompt", _text, False),
    ("candidate", pa.int32(), False),  # 0..k-1 within the prompt and source
    ("source", _text, False),  # 'dabench', 'sft', 'rrhf', 'popular', 'random', 'nearest'
    ("text", _text, False),  # what was answered, verbatim
    ("api", _text, True),  # compact JSON when valid
    ("status", _text, False),  # 'valid' | 'invalid'
    ("reason", _text, True),  # kind of hallucination: see diffagent.agent.verify.KINDS
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
)

#: One row a RENDERS row, in the same order. Rewards are null where there is no picture;
#: ``unified`` is the floor for an invalid call and null for a failed render.
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

#: One row a (selector, held-out prompt). Agreement with DABench is 1 or 0, and 0 for an invalid
#: answer; rewards are means over the seeds and null where there is no picture.
EVALUATION = _schema(
    ("selector", _text, False),
    ("prompt_id", _int, False),
    ("reason", _text, True),  # kind of hallucination; null: valid
    ("unified", _float, True),
    ("unified_valid", _float, True),
    ("clip", _float, True),
    ("image_reward", _float, True),
    ("hps_v2", _float, True),
    ("hallucinated", _float, False),
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
