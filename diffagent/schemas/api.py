"""The T2I API call: the answer of an agent, which every later stage passes on."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

Name = Annotated[str, StringConstraints(min_length=1, max_length=300)]


class ApiError(ValueError):
    """A text is not a T2I API call.

    Attributes:
        field: dotted path of the first wrong field.
        problem: description of the error.
        code: 'json' if the text is not JSON, else pydantic's type of the error.
    """

    def __init__(self, field: str, problem: str, code: str = "json") -> None:
        super().__init__(f"{field}: {problem}" if field else problem)
        self.field = field
        self.problem = problem
        self.code = code


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Network(_Record):
    """A network that is applied to the checkpoint or named in a prompt."""

    model: Name
    version: Name
    weight: float = Field(default=1, ge=-4, le=4, description="strength; 1 is as trained")


class LoRA(Network):
    """A LoRA applied to the checkpoint."""

    weight: float = Field(ge=-4, le=4, description="strength; 1 is as trained")


class Embedding(Network):
    """A textual inversion at the beginning of a prompt; weight 1 adds no attention."""

    negative: bool = Field(default=False, description="in the negative prompt")


class Params(_Record):
    """Generation parameters, in the field's units."""

    sampler: Name = Field(description="name in A1111, e.g. 'DPM++ 2M Karras'")
    steps: int = Field(ge=1, le=150, description="num_inference_steps")
    cfg_scale: float = Field(ge=0, le=30, description="guidance_scale")
    width: int = Field(ge=64, le=4096, multiple_of=8, description="pixels")
    height: int = Field(ge=64, le=4096, multiple_of=8, description="pixels")
    clip_skip: int = Field(
        default=1, ge=1, le=12, description="layer of CLIP from the end; 1: the last"
    )
    seed: int | None = Field(default=None, ge=0, lt=2**64, description="seed of the noise")


class T2IAPI(_Record):
    """A text-to-image API call: a model, and the parameters to run it with.

    The compact JSON form (``to_json``) has the keys in the order of the fields, no spaces, and no
    unset fields (``embeddings``, ``air``, ``description``, ``params.seed``);
    ``parse_api(api.to_json()) == api`` holds for every call. Whole numbers are written without a
    fraction: a value has one spelling, so that a language model has one spelling to learn.
    """

    model: Name = Field(description="unique name in the catalogue")
    version: Name
    type: Literal["Checkpoint"] = "Checkpoint"
    base_model: Name = Field(description="name on Civitai, e.g. 'SD 1.5'")
    air: str | None = Field(default=None, description="urn:air:{ecosystem}:checkpoint:civitai:M@V")
    loras: tuple[LoRA, ...] = Field(default=(), max_length=8)
    embeddings: tuple[Embedding, ...] = Field(default=(), max_length=8)
    params: Params
    negative_prompt: Annotated[str, StringConstraints(max_length=4000)] = ""
    description: str | None = Field(default=None, max_length=500)

    def to_json(self) -> str:
        """Return the compact JSON form, one line."""
        data = self.model_dump(exclude_none=True)
        data["params"]["cfg_scale"] = _shortest(data["params"]["cfg_scale"])
        for name in ("loras", "embeddings"):
            data[name] = [{**item, "weight": _shortest(item["weight"])} for item in data[name]]
        if not data["embeddings"]:
            del data["embeddings"]
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"))

    def response(self) -> T2IAPI:
        """Return the part that an agent writes: without AIR, description and seed."""
        params = self.params.model_copy(update={"seed": None})
        return self.model_copy(update={"air": None, "description": None, "params": params})


def _shortest(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (duplicate, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ApiError(duplicate, "key appears twice", "duplicate_key")
    return result


def parse_api(text: str) -> T2IAPI:
    """Parse an API call from JSON text with keys in any order and any spacing.

    Types are strict: ``true``, ``"20"`` and ``20.0`` are not numbers of steps.

    Raises:
        ApiError: not JSON, or a field is missing, unknown, of the wrong type or out of range;
            ``field`` names it.
    """
    try:
        json.loads(text, object_pairs_hook=_unique_keys)  # pydantic takes the last of equal keys
    except RecursionError:
        raise ApiError("", "nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ApiError("", f"not JSON: {error.msg} at character {error.pos}") from None
    except ApiError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise ApiError("", f"not JSON: {error}") from None
    try:
        return T2IAPI.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "json_invalid":  # half of a surrogate pair, which no file can hold
            raise ApiError("", f"not JSON: {first['ctx']['error']}") from None
        field = ".".join(str(part) for part in first["loc"])
        problem = f"{first['msg']} (got {first['input']!r:.80})"
        raise ApiError(field, problem, first["type"]) from None
