"""What metadata says of a picture, in the field's units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

#: Which reader read a record.
Form = Literal[
    "none",  # nothing to read
    "a1111",  # the WebUI's text as the site parses it
    "a1111-text",  # that text itself: of a file, or left in a prompt by the site's parser
    "typed",  # what the site's form asks for and nothing that a program adds
    "civitai",  # the on-site generator: civitaiResources
    "comfyui",  # a ComfyUI graph in API format
    "comfyui-workflow",  # only the editor's graph, whose widgets have no names
    "swarmui",
    "fooocus",
    "ruinedfooocus",
    "invokeai",
    "novelai",
    "drawthings",
    "easydiffusion",
    "stabilitymatrix",
    "external",  # another service's picture; the site keeps its fields apart
]


class Reference(NamedTuple):
    """How metadata names a model: by the site's version id, by a file's hash, or only by name."""

    version_id: int | None = None
    hash: str | None = None  # upper case
    name: str | None = None
    weight: float = 1.0


class Generation(NamedTuple):
    """What metadata says; None where it does not say."""

    form: Form = "none"
    prompt_raw: str | None = None
    prompt: str = ""  # without what loads networks and embeddings, in one line
    negative_prompt_raw: str | None = None
    negative_prompt: str = ""
    sampler_name: str | None = None  # as written
    schedule_name: str | None = None  # as written, when apart from the sampler
    sampler: str | None = None  # canonical, with its schedule; None when the spelling is unknown
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    size_from_image: bool = False  # no size is written; the picture's own stands in
    clip_skip: int = 1
    seed: int | None = None
    from_image: bool = False  # the sampler began with a picture, not with noise alone
    checkpoints: tuple[Reference, ...] = ()  # of the one checkpoint, best evidence first
    loras: tuple[Reference, ...] = ()
    hypernetworks: tuple[Reference, ...] = ()
    embeddings: tuple[Reference, ...] = ()  # of the prompt
    negative_embeddings: tuple[Reference, ...] = ()
    vae: Reference | None = None  # laid over the checkpoint's own
    #: Fields of this that a graph computes in a way that the reader does not know: none of them
    #: has the value that the picture was made with.
    not_known: tuple[str, ...] = ()

    @property
    def sampler_raw(self) -> str | None:
        """Sampler as written, with the schedule that is written apart: ``DPM++ 2M (Karras)``."""
        if self.sampler_name and self.schedule_name:
            return f"{self.sampler_name} ({self.schedule_name})"
        return self.sampler_name


class Reading(NamedTuple):
    """A dialect in the site's own keys, which is what every reader but that of keys makes.

    ``keys`` are those of the WebUI's text as the site parses it; ``checkpoints`` and ``loras``
    are what keys cannot say. ``original`` has the prompts where ``keys`` has only parts of them.
    ``literals`` is None where no sampler of a graph is known to have drawn the picture.
    """

    form: Form
    keys: Mapping[str, Any]
    checkpoints: tuple[Reference, ...] = ()
    loras: tuple[Reference, ...] = ()
    from_image: bool = False
    original: Mapping[str, Any] | None = None
    not_known: tuple[str, ...] = ()  # keys, "size" and "loras", that a graph computes
    literals: frozenset[Any] | None = None  # all that the nodes of a graph hold
