"""Nodes of ComfyUI that compute a number, a text or a size from their inputs.

The semantics are those of the authors' code: of ComfyUI itself, and of the packs that graphs use
most for such things (Custom-Scripts, WAS Suite, Comfyroll, KJNodes, essentials, Easy-Use, Impact,
Efficiency, ComfyMath, mtb, rgthree, Image Saver, Derfuu). Each entry of `COMPUTED` gives a node's
outputs by slot; `SIZES` gives the size of the empty latent that a node makes. A node that is in
neither and is no plain constant (`constant`) is not known, and so is all that comes from it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from diffagent.t2i.metadata.expression import (
    MAX_CHARS,
    NotKnownError,
    evaluate,
    find_pattern,
    replace_pattern,
    replace_text,
)
from diffagent.t2i.metadata.graph import Node, is_link
from diffagent.t2i.metadata.values import number

Scalar = str | int | float
Size = tuple[int, int]
_REQUIRED: Any = object()


class Inputs:
    """A node's inputs, each evaluated when it is read; all raise `NotKnownError`.

    Args:
        node: whose inputs.
        evaluate_input: the value of an input, which may be a link.
        latent_size: the size of the latent that an input is linked to.
    """

    def __init__(
        self,
        node: Node,
        evaluate_input: Callable[[object], Scalar],
        latent_size: Callable[[object], Size],
    ) -> None:
        self.raw = node.inputs
        self._evaluate, self._latent_size = evaluate_input, latent_size

    def value(self, name: str, default: Any = _REQUIRED) -> Scalar:
        """The value of an input, or the default where the node has no such input."""
        if name not in self.raw:
            if default is _REQUIRED:
                raise NotKnownError(f"no input {name!r}")
            return default  # type: ignore[no-any-return]
        return self._evaluate(self.raw[name])

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A text, as nodes take it: a number is none."""
        value = self.value(name, default)
        if not isinstance(value, str):
            raise NotKnownError(f"{name!r} is no text")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> int | float:
        """A finite number; the text of one counts."""
        value = self.value(name, default)
        given = number(value) if isinstance(value, str) else value
        if isinstance(given, str) or given is None or not math.isfinite(given):
            raise NotKnownError(f"{name!r} is no number")
        return given

    def whole(self, name: str, default: Any = _REQUIRED) -> int:
        """A whole number."""
        value = self.number(name, default)
        if value != int(value):
            raise NotKnownError(f"{name!r} is no whole number")
        return int(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """A switch: a boolean, or the text or number of one."""
        value = self.value(name, default)
        if isinstance(value, str):
            word = value.casefold()
            if word not in ("true", "false", "yes", "no", "on", "off"):
                raise NotKnownError(f"{name!r} is no switch")
            return word in ("true", "yes", "on")
        return bool(value)

    def size(self, name: str) -> Size:
        """The size of a latent."""
        return self._latent_size(self.raw.get(name))


Outputs = tuple[Scalar, ...]
Compute = Callable[[Inputs], Outputs]


# --- constants ------------------------------------------------------------------------------

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
#: A node is a constant when it has one value and its name has only such words: "INTConstant",
#: "Seed (rgthree)", "easy int", "Text box". An "LLM Text" or a "Random Number" is none.
_CONSTANT_WORDS = frozenset(
    {"primitive", "constant", "const", "literal", "value", "input", "node", "field", "selector"}
    | {"int", "integer", "float", "number", "percent", "bool", "boolean", "slider", "seed"}
    | {"string", "text", "textbox", "box", "multiline", "prompt", "positive", "negative", "note"}
    | {"sampler", "scheduler", "cfg", "steps", "width", "height", "size", "denoise", "clip", "skip"}
    | {"ckpt", "checkpoint", "model", "lora", "name", "simple", "plain", "raw", "everywhere"}
    | {"cr", "df", "jw", "tt", "n", "ttn", "kep", "easy", "was", "impact", "rgthree", "crystools"}
    | {"manager", "jjk", "layer", "utility", "mx"}
    | {"mtb", "kj", "essentials", "image", "saver", "eff", "inspire", "pysssss", "a", "the", "for"}
)
#: Settings of the editor, which no output depends on.
_OF_THE_EDITOR = frozenset(
    {"control_after_generate", "speak_and_recognation", "print_to_console", "title", "hidden"}
)


def constant(node: Node) -> Scalar | None:
    """The value of a node that only holds one, or None."""
    values = [value for name, value in node.inputs.items() if name not in _OF_THE_EDITOR]
    if len(values) != 1 or not isinstance(values[0], str | int | float):
        return None
    if node.kind in _CONSTANT_KINDS:
        return values[0]
    words = {word.casefold() for word in _WORD.findall(node.kind[:80])}
    foreign = any(letter.isalpha() and not letter.isascii() for letter in node.kind)
    return values[0] if words and words <= _CONSTANT_WORDS and not foreign else None


_CONSTANT_KINDS = frozenset(
    {"Seed Generator", "JWString", "JWInteger", "JWFloat", "JWStringMultiline"}
    | {"SimpleMathInt+", "SimpleMathFloat+", "SimpleMathBoolean+", "SimpleMathPercent+"}
)


# --- numbers --------------------------------------------------------------------------------


def _formula(inputs: Inputs, name: str, default: Any = _REQUIRED) -> int | float:
    """A formula of variables that are inputs, and of sizes of latents: ``a.width / 2``."""

    def variable(word: str) -> int | float:
        source, dot, side = word.partition(".")
        if dot and source in inputs.raw and side in ("width", "height"):
            return inputs.size(source)[side == "height"]
        if dot or word == name:
            raise NotKnownError(f"the variable {word!r}")
        # The newer kind of node has its variables in a group.
        grown = (f"{group}.{word}" for group in ("values", "variables"))
        return inputs.number(next((name for name in grown if name in inputs.raw), word), default)

    return evaluate(inputs.text(name), variable)


def _int_float(value: float) -> Outputs:
    return int(value), float(value)


def _rounded(value: float) -> Outputs:
    return round(value), float(value)


_OPERATIONS: Mapping[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("add", "addition"), operator.add),
    **dict.fromkeys(("sub", "subtract", "subtraction"), operator.sub),
    **dict.fromkeys(("mul", "multiply", "multiplication"), operator.mul),
    **dict.fromkeys(("floordiv", "floor division"), operator.floordiv),
    **dict.fromkeys(("mod", "modulo", "modulus"), operator.mod),
    **dict.fromkeys(("div", "divide", "division"), operator.truediv),
    "max": max,
    "min": min,
}


def _binary(a: float, b: float, operation: str, *, whole: bool = False) -> int | float:
    name = operation.casefold()
    if whole and name in ("div", "divide"):
        name = "floordiv"
    if name not in _OPERATIONS:
        raise NotKnownError(f"the operation {operation!r}")
    try:
        result = _OPERATIONS[name](a, b)
    except ArithmeticError:
        raise NotKnownError("a division by zero") from None
    if not abs(result) < 2.0**70:
        raise NotKnownError("no number of a usable size")
    return int(result) if isinstance(result, int) else float(result)


_UNARY: Mapping[str, Callable[[Any], Any]] = {
    "Neg": operator.neg,
    "Abs": abs,
    "Inc": lambda a: a + 1,
    "Dec": lambda a: a - 1,
    "Sqr": lambda a: a * a,
    "Round": round,
    "Floor": math.floor,
    "Ceil": math.ceil,
    "Trunc": math.trunc,
}


def _unary(inputs: Inputs) -> Outputs:
    name, value = inputs.text("op"), inputs.number("a")
    if name not in _UNARY:
        raise NotKnownError(f"the operation {name!r}")
    return (_UNARY[name](value),)


def _was_number(inputs: Inputs) -> Outputs:
    result = _binary(inputs.number("number_a"), inputs.number("number_b"), inputs.text("operation"))
    return result, result, int(result)


def _was_constant(inputs: Inputs) -> Outputs:
    if is_link(inputs.raw.get("number_as_text")) or inputs.raw.get("number_as_text"):
        raise NotKnownError("a number as text")
    value, kind = inputs.number("number"), inputs.text("number_type")
    if kind == "bool":
        value = 1 if value > 0.5 else 0
    return (int(value) if kind != "float" else float(value)), float(value), int(value)


def _compared(inputs: Inputs) -> Outputs:
    sign = inputs.text("cmp" if "cmp" in inputs.raw else "comparison")
    sign = {"a = b": "a == b", "a <> b": "a != b"}.get(sign, sign)
    return (bool(evaluate(sign, inputs.number)),)


_NUMBERS: dict[str, Compute] = {
    "MathExpression|pysssss": lambda i: _int_float(_formula(i, "expression")),
    "ComfyMathExpression": lambda i: _int_float(_formula(i, "expression"))[::-1],
    "SimpleMath+": lambda i: _rounded(_formula(i, "value", 0.0)),
    "SimpleMathDual+": lambda i: (
        *_rounded(_formula(i, "value_1", 0.0)),
        *_rounded(_formula(i, "value_2", 0.0)),
    ),
    "SimpleCalculatorKJ": lambda i: _int_float(_formula(i, "expression"))[::-1],
    "easy simpleMath": lambda i: _int_float(_formula(i, "value", 0)),
    "easy simpleMathDual": lambda i: (
        *_int_float(_formula(i, "value1", 0)),
        *_int_float(_formula(i, "value2", 0)),
    ),
    "Evaluate Integers": lambda i: _int_float(_formula(i, "python_expression", 0)),
    "Evaluate Floats": lambda i: _int_float(_formula(i, "python_expression", 0)),
    "Math Expression (mtb)": lambda i: _int_float(_formula(i, "expression"))[::-1],
    "easy mathInt": lambda i: (
        _binary(i.whole("a"), i.whole("b"), i.text("operation"), whole=True),
    ),
    "easy mathFloat": lambda i: (
        round(_binary(i.number("a"), i.number("b"), i.text("operation")), 3),
    ),
    "CM_IntBinaryOperation": lambda i: (
        _binary(i.whole("a"), i.whole("b"), i.text("op"), whole=True),
    ),
    **dict.fromkeys(
        ("CM_FloatBinaryOperation", "CM_NumberBinaryOperation"),
        lambda i: (_binary(float(i.number("a")), float(i.number("b")), i.text("op")),),
    ),
    **dict.fromkeys(
        ("CM_IntUnaryOperation", "CM_FloatUnaryOperation", "CM_NumberUnaryOperation"), _unary
    ),
    **dict.fromkeys(("CM_FloatToInt", "CM_NumberToInt"), lambda i: (int(i.number("a")),)),
    **dict.fromkeys(
        ("CM_IntToFloat", "CM_NumberToFloat", "CM_IntToNumber", "CM_FloatToNumber"),
        lambda i: (i.number("a"),),
    ),
    "Number Operation": _was_number,
    "Constant Number": _was_constant,
    "Number to Int": lambda i: (int(i.number("number")),),
    "Number to Float": lambda i: (float(i.number("number")),),
    "Seed": lambda i: (i.whole("seed"),) * 4,
    "mxSlider": lambda i: (i.number("Xf") if i.flag("isfloatX") else i.number("Xi"),),
    "CR Value": lambda i: (float(i.number("value")), int(i.number("value"))),
    "CR Seed": lambda i: (i.whole("seed"),),
    "CR Integer Multiple": lambda i: (int(i.number("integer") * (i.number("multiple", 8) or 1)),),
    "CR Float To Integer": lambda i: (int(i.number("_float")),),
    "CR Clamp Value": lambda i: (
        max(i.number("range_min"), min(i.number("a"), i.number("range_max"))),
    ),
    "ImpactMinMax": lambda i: ((max if i.flag("mode") else min)(i.number("a"), i.number("b")),),
    **dict.fromkeys(("ImpactCompare", "easy compare", "Compare"), _compared),
    "DF_Sum": lambda i: (float(i.number("Value_A") + i.number("Value_B")),),
    "DF_Subtract": lambda i: (float(i.number("Value_A") - i.number("Value_B")),),
    "DF_Multiply": lambda i: (float(i.number("Value_A") * i.number("Value_B")),),
    "DF_Divide": lambda i: (_binary(i.number("Numerator"), i.number("Denominator"), "div"),),
    "Seed Generator (Image Saver)": lambda i: (i.whole("seed") + i.whole("increment", 0),),
    "KSampler Config (rgthree)": lambda i: tuple(
        i.value(name)
        for name in ("steps_total", "refiner_step", "cfg", "sampler_name", "scheduler")
    ),
    "Input Parameters (Image Saver)": lambda i: tuple(
        i.value(name) for name in ("seed", "steps", "cfg", "sampler", "scheduler", "denoise")
    ),
}


# --- texts ----------------------------------------------------------------------------------

_DELIMITERS = {"comma": ", ", "space": " ", "newline": "\n", "\\n": "\n", "tab": " "}
_PART = re.compile(r"(?:text|string|prompt|str)_?(?:[a-h]|\d{1,2})\Z")


def join(delimiter: str, parts: list[str]) -> str:
    """A text of parts that is not too long."""
    if sum(map(len, parts)) + len(delimiter) * len(parts) > MAX_CHARS:
        raise NotKnownError("a long text")
    return delimiter.join(parts)


def _parts(inputs: Inputs, names: list[str]) -> list[str]:
    return [inputs.text(name) for name in names if inputs.raw[name] is not None]


def _was_concatenate(inputs: Inputs) -> Outputs:
    parts = _parts(inputs, sorted(name for name in inputs.raw if name.startswith("text")))
    if inputs.flag("clean_whitespace", "true"):
        parts = [part.strip() for part in parts]
    delimiter = inputs.text("delimiter")
    delimiter = "\n" if delimiter == "\\n" else delimiter
    return (join(delimiter, [part for part in parts if part]),)


def concatenation(node: Node) -> bool:
    """Whether a node of any author joins its texts with a delimiter, and does no more."""
    joins = re.search(r"concat|join", node.kind, re.I)
    parts = [name for name in node.inputs if _PART.match(name)]
    others = node.inputs.keys() - {*parts, "delimiter", "separator", "inputcount"}
    return bool(joins) and len(parts) > 1 and not others


def concatenate(inputs: Inputs) -> Outputs:
    """The text of such a node."""
    given = inputs.text("delimiter" if "delimiter" in inputs.raw else "separator")
    parts = _parts(inputs, [name for name in inputs.raw if _PART.match(name)])
    return (join(_DELIMITERS.get(given, given), [part for part in parts if part]),)


def _lines(inputs: Inputs, name: str, *, without_empty: bool = False) -> str:
    """The one line that a list is cut down to; more of them draw several pictures."""
    lines = inputs.text(name).split("\n")
    if without_empty:
        lines = [line for line in lines if line.strip()]
    start = max(0, min(inputs.whole("start_index"), len(lines) - 1))
    chosen = lines[start : start + inputs.whole("max_rows")]
    if len(chosen) != 1:
        raise NotKnownError("several texts")
    return chosen[0]


def _replaced(inputs: Inputs, name: str) -> Outputs:
    text = inputs.text(name)
    for slot in "123":
        text = replace_text(text, inputs.text(f"find{slot}", ""), inputs.text(f"replace{slot}", ""))
    return (text,)


def _flags(inputs: Inputs) -> int:
    flags = re.IGNORECASE if inputs.flag("case_insensitive", True) else 0
    flags |= re.MULTILINE if inputs.flag("multiline", False) else 0
    return int(flags | (re.DOTALL if inputs.flag("dotall", False) else 0))


def _regex_replace(inputs: Inputs) -> Outputs:
    return (
        replace_pattern(
            inputs.text("string"),
            inputs.text("regex_pattern"),
            inputs.text("replace"),
            _flags(inputs),
            inputs.whole("count", 0),
        ),
    )


def _regex_extract(inputs: Inputs) -> Outputs:
    match = find_pattern(inputs.text("string"), inputs.text("regex_pattern"), _flags(inputs))
    mode, group = inputs.text("mode"), inputs.whole("group_index", 1)
    if mode == "First Match":
        return (match.group() if match else "",)
    if mode == "First Group":
        groups = match.groups() if match else ()
        return ((groups[group - 1] or "") if 0 < group <= len(groups) else "",)
    raise NotKnownError(f"the mode {mode!r}")


def _string_function(inputs: Inputs) -> Outputs:
    a, b, c = (inputs.text(f"text_{letter}", "") for letter in "abc")
    tidy = inputs.flag("tidy_tags")
    if inputs.text("action") == "append":
        text = join(", " if tidy else "", [part for part in (a, b, c) if part])
    elif b.startswith("/") and b.endswith("/"):
        text = replace_pattern(a, b[1:-1], c)
    else:
        text = replace_text(a, b, c)
    if tidy:
        text = re.sub(r"\s{2,}", " ", text).replace(" ,", ",")
        text = re.sub(r",{2,}", ",", text).strip()
    return (text,)


def _mtb_replace(inputs: Inputs) -> Outputs:
    text, old, new = (inputs.text(name) for name in ("string", "old", "new"))
    if inputs.flag("use_regex", False):
        return (replace_pattern(text, old, new),)
    return (replace_text(text, old, new),)


_CASES: Mapping[str, Callable[[str], str]] = {
    "uppercase": str.upper,
    "lowercase": str.lower,
    "capitalize": str.capitalize,
    "title case": str.title,
    "invert_case": str.swapcase,
    "trim": str.strip,
    "both": str.strip,
    "left": str.lstrip,
    "right": str.rstrip,
    "reverse": lambda text: text[::-1],
    "remove_spaces": lambda text: text.replace(" ", ""),
}


def _case(inputs: Inputs, name: str, mode: str) -> Outputs:
    change = _CASES.get(inputs.text(mode).casefold())
    if change is None:
        raise NotKnownError("an unknown change of case")
    return (change(inputs.text(name)),)


def _select_string(inputs: Inputs) -> Outputs:
    """The Impact Pack's: a line, or with ``multiline`` a paragraph that begins with '#'."""
    strings, select = inputs.text("strings"), inputs.whole("select")
    if not inputs.flag("multiline"):
        lines = strings.split("\n")
        return (lines[select % len(lines)],)
    paragraphs = [part.strip() for part in re.split(r"^(?=#)", strings, flags=re.M) if part]
    chosen = paragraphs[select % len(paragraphs)] if paragraphs else strings
    return (chosen.removeprefix("#"),)


_TOKENS = re.compile(r"\[(?:time|hostname|user|cuda_\w+)\b")


def _was_text(inputs: Inputs, name: str) -> str:
    text = inputs.text(name)
    if _TOKENS.search(text):
        raise NotKnownError("a text with the time or the machine's name")
    return text


def _was_multiline(inputs: Inputs) -> Outputs:
    lines = _was_text(inputs, "text").split("\n")
    return ("\n".join(line for line in lines if not line.strip().startswith("#")),)


def _as_text(inputs: Inputs, name: str) -> Outputs:
    value = inputs.value(name)
    return (f"{inputs.text('prefix', '')}{value}{inputs.text('suffix', '')}",)


def _join_strings(inputs: Inputs) -> Outputs:
    if inputs.flag("return_list", False):
        raise NotKnownError("several texts")
    names = [f"string_{slot}" for slot in range(1, inputs.whole("inputcount") + 1)][:100]
    parts = [inputs.text(name, "") for name in names]
    return (join(inputs.text("delimiter"), [parts[0], *(part for part in parts[1:] if part)]),)


def _styler(inputs: Inputs) -> Outputs:
    """Styles lie in files of the machine; the style of none leaves the texts as they are."""
    if str(inputs.value("style", "")).casefold() not in ("base", "none", "no style", ""):
        raise NotKnownError("a style")
    return inputs.text("text_positive", ""), inputs.text("text_negative", "")


_TEXTS: dict[str, Compute] = {
    "StringConcatenate": lambda i: (
        join(i.text("delimiter", ""), [i.text("string_a"), i.text("string_b")]),
    ),
    "StringSubstring": lambda i: (i.text("string")[i.whole("start") : i.whole("end")],),
    "StringLength": lambda i: (len(i.text("string")),),
    "StringReplace": lambda i: (replace_text(i.text("string"), i.text("find"), i.text("replace")),),
    "RegexReplace": _regex_replace,
    "RegexExtract": _regex_extract,
    **dict.fromkeys(("CaseConverter", "StringTrim"), lambda i: _case(i, "string", "mode")),
    "StringFunction|pysssss": _string_function,
    "Text Concatenate": _was_concatenate,
    **dict.fromkeys(
        ("Text Find and Replace", "Text Find and Replace Input"),
        lambda i: (replace_pattern(i.text("text"), i.text("find"), i.text("replace")),),
    ),
    "Text Multiline": _was_multiline,
    "Text String": lambda i: tuple(
        _was_text(i, name) for name in ("text", "text_b", "text_c", "text_d") if name in i.raw
    ),
    "CR Text": lambda i: (i.text("text"),),
    "CR Prompt Text": lambda i: (i.text("prompt"),),
    "CR Text Concatenate": lambda i: (
        join(i.text("separator", ""), [i.text("text1", ""), i.text("text2", "")]),
    ),
    "CR Combine Prompt": lambda i: (
        join(i.text("separator", ""), [i.text(f"part{slot}", "") for slot in range(1, 5)]),
    ),
    "CR Text Replace": lambda i: _replaced(i, "text"),
    "CR Text Operation": lambda i: _case(i, "text", "operation"),
    "CR Text Length": lambda i: (len(i.text("text")),),
    "CR Text List": lambda i: (_lines(i, "multiline_text"),),
    "CR Prompt List": lambda i: (
        join(
            "", [i.text("prepend_text", ""), _lines(i, "multiline_text"), i.text("append_text", "")]
        ),
        _lines(i, "multiline_text"),
    ),
    "CR Integer To String": lambda i: (str(i.whole("int_")),),
    "JoinStrings": lambda i: (
        join(i.text("delimiter"), [i.text("string1", ""), i.text("string2", "")]),
    ),
    "JoinStringMulti": _join_strings,
    "StringConstantMultiline": lambda i: (
        i.text("string").replace("\n", "").strip()
        if i.flag("strip_newlines", True)
        else i.text("string"),
    ),
    "SomethingToString": lambda i: _as_text(i, "input"),
    "Any To String (mtb)": lambda i: _as_text(i, "input"),
    "String Replace (mtb)": _mtb_replace,
    **dict.fromkeys(("Number to String", "Number to Text"), lambda i: _as_text(i, "number")),
    "easy promptConcat": lambda i: (
        join(i.text("separator", ""), [i.text("prompt1", ""), i.text("prompt2", "")]),
    ),
    "easy promptReplace": lambda i: _replaced(i, "prompt"),
    "easy promptLine": lambda i: (
        _lines(i, "prompt", without_empty=i.flag("remove_empty_lines", True)),
    ),
    "ImpactStringSelector": _select_string,
    "ImpactWildcardProcessor": lambda i: (i.text("populated_text"),),
    "SDXLPromptStyler": _styler,
}


# --- sizes ----------------------------------------------------------------------------------

_PRESET = re.compile(r"(\d{2,5})\s?[x×]\s?(\d{2,5})\b")
_MAX_SIDE = 16384  # pixels


def sized(width: float, height: float) -> Size:
    """A size in pixels that a latent can have."""
    if not (8 <= width <= _MAX_SIDE and 8 <= height <= _MAX_SIDE):
        raise NotKnownError("no size")
    return int(width), int(height)


def _preset(inputs: Inputs, name: str) -> Size:
    match = _PRESET.search(inputs.text(name)[-200:])
    if match is None:
        raise NotKnownError("no preset")
    return sized(int(match.group(1)), int(match.group(2)))


def _comfyroll(inputs: Inputs) -> Size:
    """``3:4 portrait 896x1152``, or "custom" with a width and a height; then swap and scale."""
    if inputs.text("aspect_ratio") == "custom":
        width, height = inputs.number("width"), inputs.number("height")
    else:
        width, height = _preset(inputs, "aspect_ratio")
    if inputs.flag("swap_dimensions", "Off"):
        width, height = height, width
    scale = inputs.number("prescale_factor", 1)
    return sized(width * scale, height * scale)


def _inverted(inputs: Inputs) -> Size:
    width, height = _preset(inputs, "dimensions")
    return (height, width) if inputs.flag("invert", False) else (width, height)


def _size_picker(inputs: Inputs) -> Size:
    width, height = _preset(inputs, "resolution")
    wide, high = inputs.whole("width_override", 0), inputs.whole("height_override", 0)
    return sized(wide or width, high or height)


SIZES: Mapping[str, Callable[[Inputs], Size]] = {
    **dict.fromkeys(("CR SDXL Aspect Ratio", "CR SD1.5 Aspect Ratio"), _comfyroll),
    **dict.fromkeys(("CR Aspect Ratio", "CR_Aspect Ratio For Print"), _comfyroll),
    "SDXL Empty Latent Image (rgthree)": lambda i: _preset(i, "dimensions"),
    "EmptyLatentImagePresets": _inverted,
    "SDXLEmptyLatentSizePicker+": _size_picker,
}
_OUTPUT_SIZES: dict[str, Compute] = {
    **dict.fromkeys(
        ("CR SDXL Aspect Ratio", "CR SD1.5 Aspect Ratio"),
        lambda i: (*_comfyroll(i), i.number("upscale_factor", 1), i.number("batch_size", 1)),
    ),
    **dict.fromkeys(
        ("CR Aspect Ratio", "CR_Aspect Ratio For Print"),
        lambda i: (*_comfyroll(i), i.number("upscale_factor", 1), i.number("prescale_factor", 1)),
    ),
    "SDXLEmptyLatentSizePicker+": lambda i: ("", *_size_picker(i)),
    "EmptyLatentImagePresets": lambda i: ("", *_inverted(i)),
    **dict.fromkeys(
        ("CM_SDXLResolution", "CM_SDXLExtendedResolution"), lambda i: _preset(i, "resolution")
    ),
}

COMPUTED: Mapping[str, Compute] = {**_NUMBERS, **_TEXTS, **_OUTPUT_SIZES}
#: Inputs that an empty latent may have besides its size; any other may change the size.
PLAIN_LATENT = frozenset(
    {"width", "height", "batch_size", "length", "frames", "color", "vae", "seed", "device"}
)
