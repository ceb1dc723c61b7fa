"""Time grows with the length of a stranger's text, not with its square: in every reader."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from diffagent.agent.retrieval.terms import clean, ngrams
from diffagent.dabench.filter.name_words import NameWords
from diffagent.dabench.filter.version_index import VersionIndex
from diffagent.t2i.metadata import (
    Generation,
    Reference,
    a1111,
    clean_prompt,
    parse_generation,
    read_parameters,
    tag_name,
    write_parameters,
)
from diffagent.t2i.metadata.a1111 import read_fields
from diffagent.t2i.metadata.image import _xmp_texts, decode_comment
from diffagent.t2i.metadata.programs import read_dream
from diffagent.t2i.metadata.prompt_tags import split_prompt
from diffagent.t2i.metadata.values import (
    air,
    file_hash,
    integer,
    load_json,
    number,
    size,
    text,
    weight,
)
from diffagent.t2i.names import exact_key, file_stem, titles, words

HASH = "0123456789"
KEYS = ("prompt", "negativePrompt", "Model", "Model hash", "Size", "sampler", "Lora hashes",
        "TI hashes", "Lora weights", "VAE", "Hypernet", "AddNet Model 1", "scheduler", "seed",
        "steps", "workflow")  # fmt: skip


def _graph(text_: str) -> dict[str, Any]:
    """A graph in which every value is the text."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    return {
        "1": node("KSampler", steps=["2", 0], cfg=text_, seed=text_, sampler_name=text_,
                  model=["7", 0], positive=["3", 0], negative=["4", 0], latent_image=["6", 0]),
        "2": node("MathExpression|pysssss", expression=text_, a=text_),
        "3": node("CLIPTextEncode", text=["5", 0]),
        "4": node("CLIPTextEncode", text=["8", 0]),
        "5": node("RegexReplace", string=text_, regex_pattern=text_[:200], replace=text_),
        "6": node("CR SDXL Aspect Ratio", width=8, height=8, aspect_ratio=text_),
        "7": node("LoraLoader", lora_name=text_, strength_model=text_, model=["9", 0]),
        "8": node("StringFunction|pysssss", action="replace", tidy_tags="yes", text_a=text_,
                  text_b=text_, text_c=text_),
        "9": node("CheckpointLoaderSimple", ckpt_name=text_),
        text_: node(text_, **{text_: text_}),
    }  # fmt: skip


def _keyed(key: str, value: str) -> None:
    parse_generation({"prompt": "a", key: value})


def _name_words(value: str) -> None:
    names = NameWords()
    names.add(1, 1, [value, "an ink wash"])
    names.find(value, 0.5)


def _index(value: str) -> None:
    index = VersionIndex()
    version = {"id": 1, "name": value, "baseModel": value, "files": [
        {"type": "Model", "name": value, "hashes": {"SHA256": value}}]}  # fmt: skip
    index.add({"id": 1, "type": "Checkpoint", "name": value}, version, "")
    list(index.by_name(value, ("Checkpoint",)))
    list(index.by_words(value))


READERS: dict[str, Callable[[str], object]] = {
    **{f.__name__: f for f in (text, number, integer, size, file_hash, weight, load_json)},
    "air": lambda value: air(value, frozenset({"lora"})),
    "fields": lambda value: list(read_fields(value)),
    "parameters": read_parameters,
    "parameters with settings": lambda value: read_parameters(f"{value}\nSteps: 5, Seed: {value}"),
    "written": lambda value: write_parameters(
        Generation(prompt_raw=value, negative_prompt_raw=value, loras=(Reference(name=value),))
    ),
    "any text": parse_generation,
    "left in a prompt": lambda value: parse_generation(
        {"prompt": f"{value}\nNegative prompt: {value}", "negativePrompt": value}
    ),
    **{f"key {key}": partial(_keyed, key) for key in KEYS},
    "keys": lambda value: parse_generation(
        {"prompt": f"a <lora:x:{value}>", "hashes": {f"lora:{value}": value, value: value,
         f"embed:{value}": HASH}, "resources": [{"type": "lora", "name": value, "hash": value}]}
    ),
    "embeddings": lambda value: split_prompt(value, ((value, HASH), (value[:99], HASH), ("(", ""))),
    "many embeddings": lambda value: parse_generation(
        {"prompt": value, "hashes": {f"embed:{i}": HASH for i in range(len(value) // 9)}}
    ),
    "many networks": lambda value: parse_generation(
        {"prompt": "".join(f"<lora:{i}:1>" for i in range(len(value) // 9)), "hashes": {
            f"lora:x{i}": f"{i:010}" for i in range(len(value) // 9)}}
    ),
    "clean_prompt": clean_prompt,
    "tag_name": tag_name,
    "comfy": lambda value: parse_generation({"comfy": value}),
    "comfy string": lambda value: parse_generation({"comfy": '{"prompt": NaN, "a": "' + value}),
    "graph": lambda value: parse_generation({"comfy": {"prompt": _graph(value)}}),
    "invokeai": lambda value: parse_generation(
        {"model_weights": value, "image": {"prompt": value, "sampler": value}}
    ),
    "dream": lambda value: read_dream(f'"{value}" {value} -s 5'),
    "fooocus": lambda value: parse_generation(
        {"base_model": value, "prompt": value, "loras": value, "lora_combined_1": value,
         "resolution": value}
    ),
    "ruinedfooocus": lambda value: parse_generation(
        {"software": "RuinedFooocus", "prompt": value, "loras": value}
    ),
    "swarmui": lambda value: parse_generation(
        {"sui_image_params": {"prompt": value, "loras": value, "loraweights": value}}
    ),
    "easydiffusion": lambda value: parse_generation(
        {"use_stable_diffusion_model": value, "prompt": value, "use_lora_model": value}
    ),
    "comment": lambda value: decode_comment(b"ASCII\0\0\0" + value.encode("utf-8", "replace")),
    "wide comment": lambda value: decode_comment(
        b"UNICODE\0" + value.encode("utf-16", "replace")
    ),
    "xmp": _xmp_texts,
    "xmp comment": lambda value: _xmp_texts(f"<exif:UserComment>{value}</exif:UserComment>"),
    "xmp attribute": lambda value: _xmp_texts(f'<x exif:UserComment="{value}'),
    "file_stem": file_stem,
    "exact_key": exact_key,
    "words": words,
    "titles": titles,
    "name words": _name_words,
    "index": _index,
    "terms": lambda value: list(ngrams(clean(value), "pairs")),
}  # fmt: skip

#: (before, what is repeated, after).
HOSTILE = [
    *(("", unit, "") for unit in (
        "(", "[", "{", "<", ")", '"', "'", "\\", '\\"', ",", ", ", ":", " :", "a", " ", "\n", "\t",
        "\0", "-", "1", "9", "0", "é", "🐈", "猫", "\u0316\u0301", "\ufdfa", "aB", "a1", "_", "|",
        "((a:1.1)", "<lora:", "<lora:a:1>", "<lora:a", "embedding:", "(embedding:a:", "urn:air:",
        "urn:air:a:lora:civitai:1@", "a: ", "ab: {", "ab: [", 'ab: "', "ab: [1,", 'ab: {"a": ',
        "ab: ab12cd34, ", "\nSteps: 5, ", "Steps: 5,", "\nNegative prompt: ", "\nTemplate: ",
        "undefined ", "null,", "NaN,", "&amp;", "&#", "<rdf:li>", "<exif:UserComment>", "BREAK ",
        " AND ", "__a__", "{a|b}", "[a:b:0.5]", "a,b:", "0,", "1.", "e", "-s 1 ", "blake3:",
    )),
    ("", "[", "]"), ('"', '\\"', "\\"), ("{", '"a":{', ""), ("{", '"a":1,', ""), ("[", "1,", ""),
    ('{"a": "', "\\", ""), ('{"a": "', '\\"', ""), ("0.", "0", "1"), ("1", "0", "e-9"),
    ("<lora:", "a", ""), ("<lora:a:", "1", ">"), ("<lora:", "a:", ">"), ("ab: ", '"', ","),
    ("(", " ", ""), ("a", " ", "\n"), ("x: [", '"a",', ""), ("[[", "0,", ""),
]  # fmt: skip
_SMALL, _TIMES = 4_000, 8


def _seconds(read: Callable[[str], object], value: str) -> float:
    started = time.process_time()
    read(value)
    return time.process_time() - started


@pytest.mark.parametrize("name", list(READERS))
def test_time_grows_no_faster_than_the_text(name: str) -> None:
    """Eight times the text takes 8 times as long, and 64 times where time goes with its square.

    The bound lies between; what takes no time that counts is linear enough.
    """
    read = READERS[name]
    for before, unit, after in HOSTILE:
        repeats = _SMALL // len(unit)
        large = before + unit * (repeats * _TIMES) + after
        slow = _seconds(read, large)
        if slow > 0.2:
            small = before + unit * repeats + after
            fast = min(_seconds(read, small) for _ in range(3))
            slow = min(slow, _seconds(read, large))
            assert slow < 4 * _TIMES * max(fast, 0.005), (before, unit, after, fast, slow)


def test_broken_json_in_settings_is_read_a_few_times_only(monkeypatch: Any) -> None:
    tries = 0
    decode = a1111._DECODER.raw_decode

    def counted(line: str, at: int) -> Any:
        nonlocal tries
        tries += 1
        return decode(line, at)

    monkeypatch.setattr(a1111._DECODER, "raw_decode", counted)
    fields = list(read_fields("ab: [1," * 5000 + 'last: {"a": 1}'))
    assert (tries, len(fields)) == (20, 5001)
    assert list(read_fields("ab: [1," * 9 + 'last: {"a": 1}'))[-1] == ("last", {"a": 1})


def test_hostile_text_of_a_usual_size_is_read_at_once() -> None:
    """The inputs that took a minute: 120 kB of escaped quotes in a graph's text."""
    value = '{"prompt": NaN, "a": "' + '\\"' * 60_000 + "\\"
    assert _seconds(lambda given: parse_generation({"comfy": given}), value) < 2
    assert _seconds(parse_generation, value) < 2
    assert _seconds(parse_generation, json.dumps({"a": value})[:-3]) < 2
