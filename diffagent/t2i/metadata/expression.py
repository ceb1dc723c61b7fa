"""Formulas and regular expressions of strangers, evaluated at a bounded price or not at all.

A formula is arithmetic in the syntax of Python, as the math nodes of ComfyUI take it. A regular
expression runs only if the most steps that it could take are few: its cost is estimated from its
text, never from a clock, so that the same record reads the same everywhere.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

Number = int | float

MAX_CHARS = 20_000  # of a text that is put together
_MAX_FORMULA = 500  # characters
_MAX_PATTERN = 300  # characters
_MAX_STEPS = 30_000_000  # of one regular expression, a fraction of a second
_LARGEST = 2.0**70  # of a number; seeds have 64 bits

#: Text that arithmetic does not need and that Python's parser warns of: ``1if x else 2``.
_NO_FORMULA = re.compile(r"""["'\\]|\d(?:and|or|if|else|in|is|not|for)\b""")
_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: Mapping[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_COMPARE: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "round": round,
    "ceil": math.ceil,
    "floor": math.floor,
    "int": int,
    "float": float,
    "abs": abs,
    "sqrt": math.sqrt,
    "min": min,
    "max": max,
    "iif": lambda condition, yes, no: yes if condition else no,
}
_CONSTANTS: Mapping[str, Number] = {"pi": math.pi, "True": True, "False": False}


class NotKnownError(Exception):
    """A value that metadata computes in a way that this reader does not know."""


def evaluate(formula: str, variables: Callable[[str], Number]) -> Number:
    """The value of a formula such as ``round(a * 0.4)``.

    Args:
        formula: arithmetic in the syntax of Python.
        variables: gives the value of a name; raises `NotKnownError` where there is none.

    Raises:
        NotKnownError: it is no such formula, has no value, or is too long.
    """
    if len(formula) > _MAX_FORMULA or _NO_FORMULA.search(formula):
        raise NotKnownError("a long formula, or one with more than arithmetic")
    try:
        tree = ast.parse(" ".join(formula.split()), mode="eval")
        return _bounded(_Formula(variables).visit(tree.body))
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        raise NotKnownError(f"no value of {formula!r}") from None


def _bounded(value: Any) -> Number:
    if not isinstance(value, int | float) or not abs(value) < _LARGEST:  # nor NaN
        raise NotKnownError("no number of a usable size")
    return value


class _Formula:
    """A walk over the syntax tree of a formula."""

    def __init__(self, variables: Callable[[str], Number]) -> None:
        self._variables = variables

    def visit(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int() | float() as value):
                return _bounded(value)
            case ast.Name(id=name):
                return _CONSTANTS[name] if name in _CONSTANTS else _bounded(self._variables(name))
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                return self._power(self.visit(left), self.visit(right))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _bounded(_BINARY[type(op)](self.visit(left), self.visit(right)))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self.visit(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                return _COMPARE[type(op)](self.visit(left), self.visit(right))
            case ast.IfExp(test=test, body=yes, orelse=no):
                return self.visit(yes if self.visit(test) else no)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(name, [self.visit(argument) for argument in arguments])
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                return _bounded(self._variables(f"{name}.{attribute}"))
            case _:
                raise NotKnownError(f"a formula with {type(node).__name__}")

    def _call(self, name: str, arguments: list[Any]) -> Number:
        if name == "pow" and len(arguments) == 2:
            return self._power(*arguments)
        if name not in _FUNCTIONS:
            raise NotKnownError(f"the function {name!r}")
        if name == "round" and len(arguments) == 2 and abs(arguments[1]) > 20:
            raise NotKnownError("digits beyond those of a number")
        return _bounded(_FUNCTIONS[name](*arguments))

    def _power(self, base: Number, exponent: Number) -> Number:
        if abs(exponent) > 64:
            raise NotKnownError("a large exponent")
        return _bounded(base**exponent)


def replace_text(text: str, find: str, new: str) -> str:
    """``text.replace(find, new)`` where the result is not too long."""
    if len(text) + text.count(find) * len(new) > MAX_CHARS:
        raise NotKnownError("a long text")
    return text.replace(find, new)


def replace_pattern(text: str, pattern: str, new: str, flags: int = 0, count: int = 0) -> str:
    """``re.sub`` where it is cheap.

    Raises:
        NotKnownError: the pattern is wrong or may take long on this text.
    """
    compiled = _compile(text, pattern, flags)
    if (len(text) + 1) * len(new) > 50 * MAX_CHARS:
        raise NotKnownError("a long text")
    try:
        return compiled.sub(new, text, count)
    except (re.error, IndexError):
        raise NotKnownError("a wrong replacement") from None


def find_pattern(text: str, pattern: str, flags: int = 0) -> re.Match[str] | None:
    """``re.search`` where it is cheap; raises `NotKnownError` as `replace_pattern` does."""
    return _compile(text, pattern, flags).search(text)


def _compile(text: str, pattern: str, flags: int) -> re.Pattern[str]:
    if len(pattern) > _MAX_PATTERN or _steps(pattern, len(text) + 1) > _MAX_STEPS:
        raise NotKnownError("a regular expression that may take long")
    try:
        return re.compile(pattern, flags)
    except (re.error, OverflowError, RecursionError):
        raise NotKnownError("a wrong regular expression") from None


_DOUBTFUL_SET = re.compile(r"\A\[\^?\[|--|&&|~~|\|\|")
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]|\(\?(?:[:=!]|<[=!])?|.", re.S)


def _steps(pattern: str, length: int) -> float:
    """The most steps that a pattern may take on a text: the product of all its choices.

    Every repeat chooses among ``length`` lengths, every option and alternative between two. A
    repeated group multiplies repeats, and a reference to a group takes any length: endless.
    """
    steps, alternatives, before = float(length), 1, ""
    grouped = "(" in pattern.replace("\\(", "")
    for match in _TOKEN.finditer(pattern):
        token = match.group()
        if token in ("*", "+", "{"):
            if before == ")":
                return math.inf
            if before not in ("*", "+", "?", "}"):  # else: lazy or possessive, no further choice
                steps *= length
        elif token == "?":
            steps *= 1 if before in ("*", "+", "?", "}") else 2
        elif token == "|":
            alternatives = alternatives * 2 if grouped else alternatives + 1
        elif token[0] == "[" and _DOUBTFUL_SET.search(token):
            return math.inf  # Python warns that it may read such a set in another way one day
        elif token == "(?" or (token[0] == "\\" and token[1:].isdigit()):
            return math.inf  # flags, names, conditions; a reference
        before = token
        if steps * alternatives > _MAX_STEPS:
            return math.inf
    return steps * alternatives
