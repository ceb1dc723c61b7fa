"""AUTOMATIC1111's text ("infotext"): prompt, negative prompt, and one line of settings.

The reader follows the WebUI's own (``parse_generation_parameters`` of infotext_utils.py: the last
line holds settings when three fields are found in it; a value in double quotes may hold commas;
the last of equal names counts, and fields called "Prompt" and "Negative prompt" replace the text
above). It differs where that one is plainly wrong: a line of weights such as
``(a:1), (b:1), (c:1)`` is a prompt; what follows the settings ("Template:" of dynamic prompts, the
rest of an unescaped value) is no prompt; JSON values (``Hashes``, ``Civitai resources``) are read
whole; a text that lost its line breaks is still read.

The writer is the only one of the repository, and `read_parameters` gives back what it wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from types import MappingProxyType

from diffagent.t2i.metadata.generation import Generation, Reading, Reference
from diffagent.t2i.metadata.keys import read_keys
from diffagent.t2i.metadata.prompt_tags import split_prompt
from diffagent.t2i.metadata.values import Bag, air, items

NEGATIVE = "Negative prompt:"
_KEY = re.compile(r"(?<![\w \-/])[\w \-/]++\Z")
#: A number with a comma, as programs write it in the language of their computer: ``7,5``.
_DECIMAL = re.compile(r"[+-]?\d{1,9},\d{1,9}(?= *(?:,|\Z))")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])+"(?=,|\Z)', re.S)
_STEPS = re.compile(r"\bSteps: ?\d{1,5}\s?(?:,|\Z)")
_HEADING = re.compile(r"\s*parameters\s*(?:\n|:)", re.I)
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)

#: Names of settings -> the site's keys. A line is one of settings only if it has one of them.
_SITE_KEYS = {
    "Steps": "steps",
    "Sampler": "sampler",
    "CFG scale": "cfgScale",
    "CFG Scale": "cfgScale",
    "Seed": "seed",
    "Hashes": "hashes",
    "Civitai resources": "civitaiResources",
    "Civitai metadata": "extra",
    "Prompt": "prompt",
    "Negative prompt": "negativePrompt",
}
_SETTINGS = frozenset(
    {"Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Model hash", "Model"}
    | {"Clip skip", "Hashes", "Civitai resources"}
)
_MIN_FIELDS = 3
_MAX_BROKEN = 20  # values of one line that look like JSON; each one may be read to the line's end


def read_parameters(text: str) -> Generation:
    """Read the text that AUTOMATIC1111 and its kin write into a picture. Never raises.

    Args:
        text: all of it; without a line of settings it is a prompt and perhaps a negative one.
    """
    return read_keys(parameters_reading(text))


def parameters_reading(text: str) -> Reading:
    """`read_parameters` up to the site's keys."""
    return Reading("a1111-text", _site_keys(*split_parameters(text)))


def split_parameters(text: str) -> tuple[str, str, str]:
    """(prompt, negative prompt, line of settings or '') of a text, as they are written."""
    text = text.strip()
    heading = _HEADING.match(text[:40])
    lines = _unfold(text[heading.end() if heading else 0 :].strip()).split("\n")
    at = _settings_line(lines)
    end = at + 1
    quotes = lines[at].count('"') if at < len(lines) else 0
    while quotes % 2 and end < len(lines):  # a value whose line breaks were not escaped
        quotes += lines[end].count('"')
        end += 1
    return (*_prompts(lines[:at]), "\n".join(lines[at:end]))


def _unfold(text: str) -> str:
    """Put the line breaks back that a tool took out before the settings."""
    match = _STEPS.search(text)
    if match is None or _STEPS.search(text, match.end()):  # none, or more than one place to guess
        return text
    start = text.rfind("\n", 0, match.start()) + 1
    before = text[start : match.start()]
    if not before.strip() or _knows(dict(read_fields(before))):
        return text
    text = f"{text[: match.start()].rstrip(' .,')}\n{text[match.start() :]}"
    if NEGATIVE in before and not before.lstrip().startswith(NEGATIVE):
        prompt, _, rest = text.partition(NEGATIVE)
        text = f"{prompt.rstrip(' .,')}\n{NEGATIVE}{rest}"
    return text


def _settings_line(lines: list[str]) -> int:
    """Index of the line of settings; the number of lines when there is none."""
    last = len(lines) - 1
    if _is_settings(lines[last]) and (last == 0 or _STEPS.search(lines[last])):
        return last
    for at in range(last - 1, -1, -1):
        if _STEPS.search(lines[at]) and _is_settings(lines[at]):
            return at
    return last if _is_settings(lines[last]) else len(lines)


def _is_settings(line: str) -> bool:
    if line.count(":") < _MIN_FIELDS:
        return False
    fields = list(read_fields(line))
    return len(fields) >= _MIN_FIELDS and _knows(dict(fields))


def _knows(fields: Bag) -> bool:
    return not _SETTINGS.isdisjoint(fields)


def _prompts(lines: list[str]) -> tuple[str, str]:
    prompt: list[str] = []
    negative: list[str] = []
    found = prompt
    for line in map(str.strip, lines):
        if line.startswith(("Template:", "Negative Template:")):
            break
        if line.startswith("Steps:") and _is_settings(line):
            break  # another picture's text, pasted into this one's
        if line.startswith(NEGATIVE):
            found = negative
            line = line.removeprefix(NEGATIVE).strip()  # noqa: PLW2901
        found.append(line)
    return "\n".join(prompt).strip(), "\n".join(negative).strip()


def read_fields(line: str) -> Iterator[tuple[str, object]]:
    """(name, value) of every field in a line of settings, in time linear in its length.

    A value is text, or what JSON says when it is an object or a list.
    """
    at, broken = 0, 0
    while (colon := line.find(":", at)) >= 0:
        run = _KEY.search(line, at, colon)
        name = run.group().lstrip(" -/") if run else ""
        if len(name) < 2:
            at = colon + 1
            continue
        at = colon + 1
        while at < len(line) and line[at].isspace():
            at += 1
        begins = line[at : at + 1]
        value, at = _value(line, at, is_json=broken < _MAX_BROKEN)
        broken += begins in ("{", "[") and isinstance(value, str)
        yield name, value


def _value(line: str, at: int, *, is_json: bool) -> tuple[object, int]:
    """The value that begins at ``at``, which may be JSON, and where the next field begins."""
    if line[at : at + 1] == '"':
        quoted = _QUOTED.match(line, at)
        if quoted:
            return _unquote(quoted.group()), quoted.end() + 1
    elif is_json and line[at : at + 1] in ("{", "["):
        try:
            value, end = _DECODER.raw_decode(line, at)
        except (ValueError, RecursionError):
            pass
        else:
            if line[end : end + 1] in ("", ","):
                return value, end + 1
    decimal = _DECIMAL.match(line, at)
    end = decimal.end() if decimal else line.find(",", at)
    end = len(line) if end < 0 else end
    return _unquote(line[at:end]), end + 1


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _site_keys(prompt: str, negative: str, settings: str) -> dict[str, object]:
    keys: dict[str, object] = {"prompt": prompt, "negativePrompt": negative}
    for name, value in read_fields(settings):
        keys[_SITE_KEYS.get(name, name)] = value
    raw = keys.pop("Raw prompt", None)  # Fooocus: what was asked for, before its styles
    if isinstance(raw, str) and raw.strip():
        keys["prompt"] = raw
        keys["negativePrompt"] = keys.pop("Raw negative prompt", "")
    resources = keys.get("civitaiResources")
    if isinstance(resources, list):
        keys["civitaiResources"] = [_typed(item) for item in items(resources)]
    return keys


def _typed(item: Bag) -> dict[str, object]:
    """A resource with the type and version that its AIR says, as the site reads it."""
    made = dict(item)
    parts = str(item.get("air", "")).split(":")
    if "modelVersionId" not in item and len(parts) > 3:
        made["modelVersionId"] = air(item["air"], frozenset({parts[3]}))
        made["type"] = parts[3]
    return made


def recover(bag: Bag) -> Reading | None:
    """A record whose prompts still hold the text that they were parsed from, or None.

    The site looks for the settings in one way, and other writers' texts escape it: they are left
    in the prompt or, mostly, in the negative prompt. What the site did parse wins.
    """
    prompt, negative = bag.get("prompt"), bag.get("negativePrompt")
    prompt = prompt if isinstance(prompt, str) else ""
    negative = negative if isinstance(negative, str) else ""
    for left in _LEFT:
        if left in negative or left in prompt:
            break
    else:  # the hot path: nothing is left in nearly all records
        return None
    if not (_LINES.search(negative) or _LINES.search(prompt)):
        return None
    if prompt.lstrip().startswith('{"parameters"'):  # the JSON of a tool, cut in two by the site
        prompt, negative = prompt.replace("\\n", "\n"), negative.replace("\\n", "\n")
        prompt = prompt.partition('"parameters"')[2].lstrip(' :"')
        negative = negative.rstrip(' "}')
    negative = negative.strip().removeprefix(NEGATIVE)
    found = _site_keys(*split_parameters(f"{prompt}\n{NEGATIVE} {negative}"))
    read = {"prompt": found["prompt"], "negativePrompt": found["negativePrompt"]}
    kept = {key: value for key, value in bag.items() if value not in (None, "")}
    return Reading("a1111-text", {**found, **kept, **read}, original=bag)


_LEFT = ("Steps:", "Template:", NEGATIVE)
_LINES = re.compile(
    r"(?:\A|\n|\\n)\s?(?:Steps|Template|Negative (?:prompt|Template)):|Steps: ?\d+, ?Sampler:"
)


def write_parameters(
    generation: Generation,
    program: str = "diffagent",
    *,
    extra: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """The text that AUTOMATIC1111 would write, and the site reads.

    Args:
        generation: what to write. LoRAs that the prompt does not tag are added to it as
            ``<lora:NAME:WEIGHT>``; models known by the site's version id are written as "Civitai
            resources".
        program: for the field "Version".
        extra: fields that a generation has no place for.

    Returns:
        Prompt, negative prompt and settings. Where a prompt would not survive the reading (it has
        a line "Negative prompt:", or ends in a space), its exact text is a field of its own,
        which the WebUI prefers too.
    """
    prompt, negative = generation.prompt_raw or "", generation.negative_prompt_raw or ""
    tagged = {reference.name for reference in split_prompt(prompt).loras}
    loras = [
        use if use.name in tagged else use._replace(name=tag_name(use.name))
        for use in generation.loras
        if use.name and use.version_id is None
    ]
    tags = [
        f"<lora:{use.name}:{shortest(round(use.weight, 4))}>"
        for use in loras
        if use.name not in tagged
    ]
    prompt = " ".join([*([prompt] if prompt else []), *tags])
    fields = {**_fields(generation, loras, program), **extra}
    lines = [prompt, *([f"{NEGATIVE} {negative}"] if negative else [])]
    if split_parameters("\n".join([*lines, _line(fields)])) != (prompt, negative, _line(fields)):
        fields |= {"Prompt": prompt, "Negative prompt": negative}
        lines = []
    return "\n".join([*lines, _line(fields)])


def _fields(generation: Generation, loras: list[Reference], program: str) -> dict[str, object]:
    checkpoint = next((ref for ref in generation.checkpoints if ref.hash or ref.name), Reference())
    size = f"{generation.width}x{generation.height}" if generation.width else None
    cfg_scale, clip_skip = generation.cfg_scale, generation.clip_skip
    hashes = {"model": checkpoint.hash.lower()} if checkpoint.hash else {}
    hashes |= {f"lora:{use.name}": use.hash.lower() for use in loras if use.hash}
    embeddings = (*generation.embeddings, *generation.negative_embeddings)
    hashes |= {f"embed:{use.name}": use.hash.lower() for use in embeddings if use.hash and use.name}
    vae = generation.vae or Reference()
    hashes |= {"vae": vae.hash.lower()} if vae.hash else {}
    fields: dict[str, object | None] = {
        "Steps": generation.steps,
        "Sampler": generation.sampler_name,
        "Schedule type": generation.schedule_name,
        "CFG scale": None if cfg_scale is None else shortest(cfg_scale),
        "Seed": generation.seed,
        "Size": size,
        "Model hash": checkpoint.hash.lower() if checkpoint.hash else None,
        "Model": checkpoint.name,
        "VAE hash": vae.hash.lower() if vae.hash else None,
        "VAE": vae.name,
        "Clip skip": clip_skip if clip_skip > 1 else None,
        "Civitai resources": _resources(generation) or None,
        "Hashes": hashes or None,
        "Lora hashes": _pairs(loras),
        "TI hashes": _pairs(embeddings),
        "Version": program,
    }
    made = {name: value for name, value in fields.items() if value is not None}
    if len(made) < _MIN_FIELDS or not _knows(made):  # else it would be read as a prompt
        made = {"Clip skip": clip_skip, "Hashes": hashes, **made}
    return made


def _pairs(uses: Iterable[Reference]) -> str | None:
    """``NAME: HASH, ...`` of those whose names can stand in it; the WebUI has no others."""
    pairs = {
        use.name: use.hash.lower()
        for use in uses
        if use.name and use.hash and tag_name(use.name) == use.name
    }
    return ", ".join(f"{name}: {digest}" for name, digest in pairs.items()) or None


def _line(fields: Bag) -> str:
    return ", ".join(f"{name}: {_written(value)}" for name, value in fields.items())


def _written(value: object) -> str:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    text = str(value)
    plain = text and text == text.strip() and not re.search(r'[,:\n"]|\A[{\[]', text)
    return text if plain else json.dumps(text, ensure_ascii=False)


def _resources(generation: Generation) -> list[dict[str, object]]:
    found: list[dict[str, object]] = [
        {"type": "checkpoint", "modelVersionId": reference.version_id}
        for reference in generation.checkpoints
        if reference.version_id
    ]
    for use in generation.loras:
        if use.version_id:
            named = {"modelVersionName": use.name} if use.name else {}
            found.append(
                {"type": "lora", "weight": use.weight, "modelVersionId": use.version_id, **named}
            )
    return found


def tag_name(name: str) -> str:
    """A name that can stand between the colons of ``<lora:NAME:WEIGHT>`` and in lists of hashes.

    The site's parser ends a list at any brace and loses the whole text at a quotation mark.
    """
    return re.sub(r'[<>:,"{}\\\s]+', "_", name)


def shortest(value: float) -> str:
    """A number without exponent or needless digits, which reads back as the same number."""
    text = format(Decimal(repr(float(value))), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text
