"""Configs are strict both ways, and a wrong one says where, what and what instead."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vatt_engine.schema import ConfigError, dump_yaml, from_dict, load_yaml, nearest, replace, to_dict


@dataclass(frozen=True, kw_only=True)
class Leaf:
    steps: int = 3
    rate: float = 0.5
    mode: Literal["fp32", "bf16"] = "fp32"
    name: str | None = None
    flag: bool = False
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.5, 1.0)
    number: int | float | str = 1
    path: Path = Path("a/b")
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"Leaf: steps must be at least 0, got {self.steps}.")
        if self.flag and self.name is None:
            raise ValueError("a flag needs a name.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    needed: int
    leaf: Leaf = field(default_factory=Leaf)
    other: Leaf | None = None


FULL = Tree(
    needed=1, leaf=Leaf(rate=1e-5, name="no", weights={"a": 1.0}, number="1e3"), other=Leaf(sizes=(), number=2.5)
)


def test_goes_to_plain_values_and_back():
    plain = to_dict(FULL)
    assert plain["leaf"]["sizes"] == [1, 2]
    assert plain["leaf"]["path"] == "a/b"
    assert plain["other"]["pair"] == [0.5, 1.0]
    assert from_dict(Tree, plain) == FULL


def test_goes_through_yaml_and_back(tmp_path):
    (tmp_path / "c.yaml").write_text(dump_yaml(to_dict(FULL)))
    document = load_yaml(tmp_path / "c.yaml")
    assert from_dict(Tree, document.values) == FULL


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=12)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS, st.lists, max_leaves=6)
)
def test_yaml_keeps_every_plain_value(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(dump_yaml({"key": value}), encoding="utf-8")
    assert repr(load_yaml(path).values) == repr({"key": value})


@given(
    st.sampled_from(
        ["1e-4", "1_000", "no", "null", "~", "true", ".5", "0x10", "1:30", "2020-01-01", "-", "", "<<", "="]
    )
)
def test_yaml_keeps_strings_that_look_like_something_else(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(dump_yaml({"key": text, "list": [text]}))
    assert load_yaml(path).values == {"key": text, "list": [text]}


def test_missing_fields_come_from_the_base_at_every_depth():
    changed = from_dict(Tree, {"leaf": {"steps": 9}}, base=FULL)
    assert changed.leaf == Leaf(steps=9, rate=1e-5, name="no", weights={"a": 1.0}, number="1e3")
    assert (changed.needed, changed.other) == (1, FULL.other)
    assert replace(FULL, {"leaf.steps": 9}) == changed
    assert replace(FULL, {"other": None}).other is None
    assert replace(Tree(needed=1), {"other.steps": 4}).other == Leaf(steps=4)
    assert replace(FULL, {"leaf": Leaf(steps=5)}).leaf == Leaf(steps=5)


def test_dashes_are_underscores():
    @dataclass(frozen=True)
    class Two:
        a_b: int = 0

    assert from_dict(Two, {"a-b": 3}) == Two(3)
    with pytest.raises(ConfigError, match="given once"):
        from_dict(Two, {"a-b": 3, "a_b": 3})


def build(path: Path) -> Tree:
    document = load_yaml(path)
    return from_dict(Tree, document.values, where=document.where, lines=document.lines)


REFUSED = [
    ({}, "config: needed must be given, got nothing."),
    ({"needed": True}, "config: needed must be an integer, got True."),
    ({"needed": 1.0}, "config: needed must be an integer, got 1.0."),
    ({"needed": "1"}, "config: needed must be an integer, got '1'."),
    ({"neded": 1}, "config: neded must be a field of Tree, got an unknown key. Did you mean 'needed'?"),
    (
        {"needed": 1, "zzz": 1},
        "config: zzz must be a field of Tree, got an unknown key. Known names: needed, leaf, other.",
    ),
    ({"needed": 1, 3: 1}, "config: 3 must be a field of Tree, got an unknown key. Known names: needed, leaf, other."),
    ({"needed": 1, "leaf": 3}, "config: leaf must be a mapping of the fields of Leaf, got 3."),
    ({"needed": 1, "leaf": None}, "config: leaf must be a mapping of the fields of Leaf, got None."),
    ({"needed": 1, "leaf": {"rate": float("nan")}}, "config: leaf.rate must be a finite number, got nan."),
    ({"needed": 1, "leaf": {"rate": float("inf")}}, "config: leaf.rate must be a finite number, got inf."),
    ({"needed": 1, "leaf": {"rate": 10**400}}, "config: leaf.rate must be a finite number, got 1000000000"),
    ({"needed": 1, "leaf": {"rate": False}}, "config: leaf.rate must be a finite number, got False."),
    ({"needed": 1, "leaf": {"flag": 1}}, "config: leaf.flag must be true or false, got 1."),
    (
        {"needed": 1, "leaf": {"mode": "bf61"}},
        "config: leaf.mode must be one of 'fp32', 'bf16', got 'bf61'. Did you mean 'bf16'?",
    ),
    ({"needed": 1, "leaf": {"sizes": 3}}, "config: leaf.sizes must be a list, each an integer, got 3."),
    ({"needed": 1, "leaf": {"sizes": [1, "2"]}}, "config: leaf.sizes[1] must be an integer, got '2'."),
    ({"needed": 1, "leaf": {"pair": [1.0]}}, "config: leaf.pair must be a list of 2, each a finite number, got [1.0]."),
    ({"needed": 1, "leaf": {"name": 3}}, "config: leaf.name must be a string, got 3."),
    (
        {"needed": 1, "leaf": {"number": []}},
        "config: leaf.number must be an integer or a finite number or a string, got [].",
    ),
    ({"needed": 1, "leaf": {"weights": {"a": "b"}}}, "config: leaf.weights.a must be a finite number, got 'b'."),
    (
        {"needed": 1, "leaf": {"weights": {1: 1.0}}},
        "config: leaf.weights must be a mapping of names, each value a finite number, got {1: 1.0}.",
    ),
    ({"needed": 1, "leaf": {"steps": -1}}, "config: leaf.steps must be at least 0, got -1."),
    ({"needed": 1, "leaf": {"flag": True}}, "config: leaf: a flag needs a name."),
    ([], "config: the document must be a mapping of the fields of Tree, got []."),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refuses(values, message):
    with pytest.raises(ConfigError) as error:
        from_dict(Tree, values)
    assert str(error.value).startswith(message)


def test_replace_refuses_a_section_together_with_its_field():
    for changes in ({"leaf.steps": 1, "leaf": Leaf()}, {"leaf": Leaf(), "leaf.steps": 1}):
        with pytest.raises(ConfigError, match="must not be set together"):
            replace(FULL, changes)
    with pytest.raises(ConfigError, match=r"override: leaf\.stepz must be a field of Leaf.*'steps'"):
        replace(FULL, {"leaf.stepz": 1})


YAML = [
    ("needed: 1\nleaf:\n  steps: x", "3: leaf.steps must be an integer, got 'x'."),
    ("needed: 1\nleaf:\n\n  sizes:\n  - 1\n  - b", "6: leaf.sizes[1] must be an integer, got 'b'."),
    ("needed: 1\nleaf:\n  stepz: 1", "3: leaf.stepz must be a field of Leaf, got an unknown key."),
    ("leaf:\n  steps: -4\nneeded: 1", "2: leaf.steps must be at least 0, got -4."),
    ("needed: 1\nleaf:\n  rate: .nan", "3: leaf.rate must be a finite number, got nan."),
    ("needed: 1\nleaf:\n  rate: 1e999", "3: leaf.rate must be a finite number, got inf."),
    ("needed: 1\nleaf: {steps: 1}\nneeded: 2", "3: needed must be given once, got it on line 1 too."),
    (
        "needed: !!python/object/apply:os.system [x]",
        "1: needed must be a plain value, got the tag 'tag:yaml.org,2002:python/obj",
    ),
    ("needed: 1\nleaf: !Leaf {steps: 1}", "2: leaf must be a plain value, got the tag '!Leaf'."),
    ("needed: !!binary aGVsbG8=", "1: needed must be a plain value, got the tag 'tag:yaml.org,2002:binary'."),
    ("needed: 1\n--- \nneeded: 2", "2: the document must be one valid YAML mapping, got an error: but found another"),
    ("needed: 1\n\tleaf: 2", "2: the document must be one valid YAML mapping, got an error: found character '\\t'"),
    ("needed: [1, 2", "1: the document must be one valid YAML mapping, got an error: expected ',' or ']'"),
    ("- 1\n- 2", "1: the document must be one valid YAML mapping, got [1, 2]."),
    ("needed: 1\n3: 4", "2: the document must have names as its keys, got '3'."),
    ("needed: 1\n[a]: 4", "2: the document must have names as its keys, got a sequence."),
    ("needed: !!int abc", "1: needed must be a valid int, got 'abc'."),
    ("needed: " + "9" * 5000, "1: needed must be a valid int, got '999999"),
    ('needed: "\\ud800"', "1: needed must be a valid str, got '\\ud800'."),
]


@pytest.mark.parametrize(("text", "message"), YAML, ids=lambda value: value[:30])
def test_yaml_errors_have_the_line(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        build(path)
    assert str(error.value).startswith(f"{path}:{message}")


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in ("ab", "bc", "cd", "de", "ef", "fg")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"# nothing\n", "got an empty file"),
        (b"\xff\xfe\x00", "must be one valid YAML mapping"),
        (b"a: \xff", "must be one valid YAML mapping"),
        (b"a: \x00", "must be one valid YAML mapping"),
        (b"[" * 5000, "must be one valid YAML mapping"),
        (b'a: "\\UFFFFFFFF"', "must be one valid YAML mapping"),
        (b"a: *b", "undefined alias"),
        (BOMB.encode(), "aliases expanded"),
        (b"a: &a\n  b: *a", "aliases expanded"),
        (b"a: " + b"x" * (1 << 20), "at most 1048576 bytes"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_yaml_that_is_no_config_is_refused(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_yaml(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="got a folder"):
        load_yaml(tmp_path)


def test_random_bytes_never_raise_anything_else(tmp_path):
    rng = random.Random(0)
    good = dump_yaml(to_dict(FULL)).encode()
    path = tmp_path / "c.yaml"
    refused = 0
    for _ in range(300):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            build(path)
        except ConfigError as error:
            refused += str(error).startswith(f"{path}:")
    assert refused > 200


def test_nearest_name():
    assert nearest("sedd", ["seed", "steps"]) == "Did you mean 'seed'?"
    assert nearest("qqq", ["seed", "steps"]) == "Known names: seed, steps."
