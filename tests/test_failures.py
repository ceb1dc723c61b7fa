"""Any exception becomes one line with a remedy, in stages, their children and commands."""

from __future__ import annotations

import errno
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffagent import errors
from diffagent.errors import (
    ArtifactError,
    DiffAgentError,
    RateLimited,
    RenderError,
    SchemaError,
    ServerError,
    UnexpectedError,
)
from diffagent.failures import as_error, explained, pack, unpack
from diffagent.schemas.api import ApiError
from diffagent.schemas.printable import printable
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.store import StageContext, StageResult, stage
from diffagent.store.child import run_in_child
from tests.store.test_stage import Words

_ERRORS = [
    RateLimited("slow down", retry_after=7.5),
    ServerError("away", retry_after=None),
    SchemaError("wrong", field="params.steps"),
    RenderError("too large", reason="too-large"),
    errors.RenderServerError("busy", retry_after=3.0),
]


@stage("toy-fails", version=1, config=Words)
def fail(config: Words, context: StageContext) -> StageResult:
    """Fail as ``config.fail`` requests."""
    context.progress(0.5, "half of the words")
    if config.fail.isdigit():
        raise _ERRORS[int(config.fail)]
    if config.fail == "exit":
        raise SystemExit(9)
    if config.fail == "panic":
        raise type("PanicException", (BaseException,), {})("a panic of a library in Rust")
    raise KeyError("un\x1b[31mexpected\nkey")


@pytest.mark.parametrize("number", range(len(_ERRORS)))
def test_an_error_crosses_the_child_whole(number: int, tmp_path: Path) -> None:
    runtime = RuntimeConfig(store=str(tmp_path))
    with pytest.raises(type(_ERRORS[number])) as caught:
        run_in_child("tests.test_failures:fail", Words(fail=str(number)), {}, runtime)
    assert type(caught.value) is type(_ERRORS[number])
    assert (str(caught.value), vars(caught.value)) == (
        str(_ERRORS[number]),
        vars(_ERRORS[number]),
    )
    assert caught.value.retryable == _ERRORS[number].retryable


def test_an_unexpected_exception_names_stage_cause_and_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, calls = RuntimeConfig(store=str(tmp_path)), []
    with pytest.raises(UnexpectedError) as here:
        fail.run(Words(), {}, runtime)
    caplog.set_level("INFO", "diffagent")
    with pytest.raises(UnexpectedError) as child:
        run_in_child(
            *("tests.test_failures:fail", Words(), {}, runtime),
            progress=lambda fraction, text: calls.append((fraction, text)),
        )
    for error in (here.value, child.value):
        assert "stage 'toy-fails': unexpected KeyError" in str(error)
        assert "-v" in str(error) and "\n" not in str(error) and "\x1b" not in str(error)
    assert isinstance(here.value.__cause__, KeyError)
    assert "Traceback" in caplog.text and "raise KeyError" in caplog.text, "-v shows the child's"
    assert calls == [(0.5, "half of the words")], "progress crosses too"


def test_a_panic_is_a_failure_and_an_exit_is_none(tmp_path: Path) -> None:
    runtime = RuntimeConfig(store=str(tmp_path))
    with pytest.raises(UnexpectedError, match="PanicException: a panic"):
        fail.run(Words(fail="panic"), {}, runtime)
    with pytest.raises(SystemExit):
        fail.run(Words(fail="exit"), {}, runtime)
    with pytest.raises(ArtifactError, match=r"ended with code 9.*-v shows"):
        run_in_child("tests.test_failures:fail", Words(fail="exit"), {}, runtime)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left", "/s/x"), ArtifactError, "'/s/x'.*Make room"),
        (OSError(errno.EROFS, "Read-only file system", "/s"), ArtifactError, "permissions"),
        (PermissionError(errno.EACCES, "Permission denied"), ArtifactError, "'/the/store'"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/f/x"), ArtifactError, "'/f/x'"),
        # As safetensors, tokenizers and torch spell a full disk.
        (Exception("I/O error: No space left on device (os error 28)"), ArtifactError, "Make room"),
        (Exception("File too large (os error 27)"), ArtifactError, "Make room"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0"),
            ArtifactError,
            "Make room",
        ),
        (RuntimeError("CUDA out of memory. Tried"), UnexpectedError, "smaller batches"),
        (MemoryError(), UnexpectedError, "out of memory: no message; use smaller"),
        (ModuleNotFoundError("No module named 'vllm'"), errors.ConfigError, "install"),
        (RecursionError("maximum recursion depth"), UnexpectedError, "nests too deeply"),
        (ApiError("params.steps", "not a number"), SchemaError, "params.steps"),
        (ZeroDivisionError(), UnexpectedError, "unexpected ZeroDivisionError: no message.*-v"),
    ],
)
def test_each_kind_has_its_remedy(error: Exception, kind: type[DiffAgentError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught, explained("stage 'x'", Path("/the/store")):
        raise error
    assert type(caught.value) is kind and caught.value.__cause__ is error


def test_the_cause_of_an_error_may_be_the_full_disk() -> None:
    error = ValueError("cannot save")
    error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded", "/s/model")
    assert "'/s/model'" in str(as_error(error, "stage 'sft'"))
    own = TypeError("own")
    own.__cause__ = ArtifactError("a file too large for this test, which is no full disk")
    assert "unexpected TypeError" in str(as_error(own, "x"))


@given(st.text())
def test_nothing_printed_moves_the_cursor(text: str) -> None:
    shown = printable(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown


def every_error(kind: type[DiffAgentError] = DiffAgentError) -> Iterator[DiffAgentError]:
    """One error of each class in the tree, with a value in every field."""
    if kind.__module__ == errors.__name__:
        fields = {
            name: 7.5 if "float" in parameter.annotation else f"a {name}"
            for name, parameter in inspect.signature(kind.__init__).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        yield kind("what, where and the remedy", **fields)
    for subclass in kind.__subclasses__():
        yield from every_error(subclass)


@pytest.mark.parametrize("error", every_error(), ids=lambda error: type(error).__name__)
def test_every_error_is_packed_with_all_its_attributes(error: DiffAgentError) -> None:
    for retryable in (type(error).retryable, not type(error).retryable):
        error.retryable = retryable
        vars(error)["files"] = ["a", {"b": None}]  # as a later version may add
        copy = unpack(json.loads(json.dumps(pack(error))))
        assert type(copy) is type(error) and copy.args == error.args
        assert vars(copy) == vars(error)


def test_the_tree_is_drawn_whole() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    assert {type(error).__name__ for error in every_error()} == drawn | {"DiffAgentError"}


def test_an_attribute_that_json_cannot_hold_stays_behind() -> None:
    error = RenderError("too large", reason="too-large")
    vars(error).update(image=object(), size=(1, 2))
    assert vars(unpack(json.loads(json.dumps(pack(error))))) == {"reason": "too-large"}


def test_an_error_of_another_module_is_unpacked() -> None:
    class LocalError(DiffAgentError):
        """One that the other process cannot find."""

    packed = json.loads(json.dumps(pack(LocalError("here"))))
    assert type(unpack(packed)) is UnexpectedError and str(unpack(packed)) == "here"
