"""Generation metadata: what a record or a picture says about how it was made.

Civitai's ``meta`` is an open bag of keys (thousands of them) in a handful of dialects, and the
files that it was read from have as many. Each reader turns its dialect into the keys of the site,
and `keys` reads those into one `Generation`, which names the reader. Nothing here raises on what a
record says: what cannot be read is None, and the filters decide what that means.
"""

from diffagent.t2i.metadata.a1111 import read_parameters, tag_name, write_parameters
from diffagent.t2i.metadata.generation import Form, Generation, Reading, Reference
from diffagent.t2i.metadata.image import read_image_metadata
from diffagent.t2i.metadata.keys import NOTHING_NAMED, Named, checkpoints, read_keys, read_named
from diffagent.t2i.metadata.parse import parse_generation, read_metadata
from diffagent.t2i.metadata.prompt_tags import clean_prompt

#: Raised whenever a record may be read differently than before; part of every row's provenance.
PARSER_VERSION = 3

__all__ = [
    "NOTHING_NAMED",
    "PARSER_VERSION",
    "Form",
    "Generation",
    "Named",
    "Reading",
    "Reference",
    "checkpoints",
    "clean_prompt",
    "parse_generation",
    "read_image_metadata",
    "read_keys",
    "read_metadata",
    "read_named",
    "read_parameters",
    "tag_name",
    "write_parameters",
]
