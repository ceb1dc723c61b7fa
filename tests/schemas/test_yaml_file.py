"""Configuration files as people and strangers write them: an error each, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffagent.errors import ConfigError
from diffagent.run_config import load_config
from diffagent.schemas.runtime import RuntimeConfig
from diffagent.schemas.yaml_file import YamlError, parse_yaml

REWARDS = "rewards: {scorers: [{name: clip, model: tiny}], unify: chatgen}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"crawl: {site: caf\xe9}\n", "not UTF-8 at byte 17.*save it as UTF-8"),
        (b"\xff\xfe\x00", "UTF-8|YAML"),
        (b"\x89PNG\r\n\x1a\n", "UTF-8|special characters"),
        (b"crawl: {site: 'a\x00b'}", "special characters"),
        (("[" * 10_000).encode(), "line 1: nests deeper than 32"),
        (("{a: " * 10_000).encode(), "line 1: nests deeper than 32"),
        (("- " * 10_000).encode(), "nests deeper than 32"),
        (BOMB.encode(), "values with its references written out"),
        (CHAIN.encode(), "values with its references written out"),
        (b"a: &a {b: *a}", "references nest without end"),
        (b"crawl: {}\nsft: {}\ncrawl: {max_models: 3}\n", "line 3: 'crawl' is given twice"),
        (b"sft:\n  seed: 1\n  model: x\n  seed: 2\n", "line 4: 'seed' is given twice"),
        (b"a: [1\n", "line 2, column 1"),
        (b"a: b: c\n", "line 1, column 5"),
        (b"\tcrawl: {}\n", "line 1, column 1"),
        (b"a: *nowhere\n", "undefined alias 'nowhere'"),
        (b"a: !!python/object/apply:os.system [id]\n", "could not determine a constructor"),
        (b"a: 2001-99-99\n", "a value cannot be read: ValueError"),
        (b"a: !!int ''\n", "a value cannot be read"),
        (b"a: !!timestamp x\n", "a value cannot be read"),
        (b"a: !!bool perhaps\n", "a value cannot be read"),
        (b"a: " + b"9" * 5000, "a value cannot be read"),
        (b"? [a, b]\n: c\n", "unhashable key"),
        (b"--- a\n--- b\n", "another document"),
        (b"#" * (2**20 + 1), "larger than 1 MiB"),
    ],
)
def test_each_fault_has_its_place_on_one_line(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_references_and_merges_are_yaml_that_works(tmp_path: Path) -> None:
    text = (
        "base: &base {seed: 1, model: a}\n"
        "deep: {one: &one {<<: *base, seed: 2}}\n"
        "two: {<<: *one, model: b}\n"
        "three: [*base, *base]\n"
    )
    assert parse_yaml(text) == yaml.safe_load(text)
    path = tmp_path / "run.yaml"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(REWARDS + "crawl: {site: 'dump:caf\u00e9'}\n", encoding=encoding)
        assert load_config(path).crawl.site == "dump:caf\u00e9"
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="null byte"):
        load_config("a\0b")


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(_values)
def test_what_pyyaml_writes_is_read_as_it_reads_it(value: Any) -> None:
    text = yaml.safe_dump(value, allow_unicode=True)
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError:
        return
    assert parse_yaml(text) == expected


@given(st.binary(max_size=200) | st.text("[]{}&*:,-?!'\"|>#% \nab<", max_size=60))
def test_any_bytes_are_a_value_or_a_yaml_error(data: bytes | str) -> None:
    try:
        parse_yaml(data)
    except YamlError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sft: {learning_rat: 1}", "sft.learning_rat: .*did you mean 'learning_rate'"),
        ("sftt: {seed: 1}", "sftt: .*did you mean 'sft'"),
        ("seed: 1", "did you mean '[a-z]+.seed'"),
        ("runtime: {stor: x}", "did you mean 'store'"),
        ("crawl: {max_pages: 1}", "crawl.max_pages: .*(did you mean|choose one of: image_source)"),
        ("rewards: {scorers: [{nam: clip, model: x}], unify: chatgen}", "did you mean 'name'"),
        ('runtime: {store: "a\\0b"}', "runtime.store: .*holds the character '.x00'"),
        ('runtime: {store: "a\\nb"}', "runtime.store: .*holds a line end"),
        ('sft: {model: "a\\eb"}', "sft.model: .*holds the character '.x1b'"),
        ('crawl: {model_types: ["\\udc80"]}', "crawl.model_types: .*holds the character"),
        (
            'runtime: {render_server: {models: {"a\\0": b}}}',
            "runtime.render_server.models: .*holds the character",
        ),
        ("runtime: {crawl_threads: 3}", "crawl_threads: .*it is now 'runtime.site.threads'"),
        ("runtime: {models: here}", "runtime.models: .*it is now 'runtime.models.directory'"),
        ('"a\\nb\\e[31m": 1', r"'a.nb.x1b\[31m'"),
    ],
)
def test_a_wrong_key_or_text_is_named_with_the_right_one(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text if "rewards" in text else REWARDS + text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) <= 4 and "\x1b" not in str(caught.value)


def test_every_former_key_of_runtime_names_a_setting() -> None:
    from diffagent.run_config import _RENAMED

    for key, path in _RENAMED.items():
        section, name = path.split(".")
        kind = RuntimeConfig.model_fields[section].annotation
        assert name in kind.model_fields, path
        assert key not in RuntimeConfig.model_fields or key == section
