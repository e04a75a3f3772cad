"""The codec that crosses the sandbox's border: exact types there and back, and a comparison nobody can trick."""

import json
import math
from collections import Counter, OrderedDict, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.actors.sandbox import values

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=20)
    | st.complex_numbers(allow_nan=False)
)
_HASHABLE = st.recursive(
    _SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=6
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(_HASHABLE, inner, max_size=4)
        | st.sets(_HASHABLE, max_size=4)
    ),
    max_leaves=12,
)


@given(_VALUES)
def test_a_value_survives_the_wire_with_its_types(value: object) -> None:
    tree = json.loads(json.dumps(values.encode(value)))
    back = values.decode(tree)
    assert back == value
    assert type(back) is type(value)
    assert values.same(values.encode(value), tree)


def test_dictionaries_of_the_standard_library_travel_as_plain_ones() -> None:
    for value in (Counter("abca"), defaultdict(int, {"a": 2, "b": 1, "c": 1}), OrderedDict(a=2, b=1, c=1)):
        back = values.decode(json.loads(json.dumps(values.encode(value))))
        assert (type(back), back) == (dict, {"a": 2, "b": 1, "c": 1})

    class Liar(Counter[str]):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    with pytest.raises(values.NotPlainData, match="Liar"):
        values.encode(Liar())


def test_types_of_plain_data_travel_by_name_and_no_others_do() -> None:
    for kind in (int, str, float, bool, list, tuple, dict, set):
        assert values.decode(json.loads(json.dumps(values.encode(kind)))) is kind

    class Fake:
        pass

    Fake.__name__ = "int"
    for other in (Fake, type, object, Exception):
        with pytest.raises(values.NotPlainData):
            values.encode(other)
    with pytest.raises(ValueError, match="malformed"):
        values.decode({"$type": "os"})


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        (1, True),
        (0, False),
        (1, 1.0),
        ([1], (1,)),
        ((1, 2), [1, 2]),
        ({1}, {True}),
        ({1}, frozenset({1})),
        ({1: "a"}, {True: "a"}),
        ({1: "a"}, {"1": "a"}),
        ("1", 1),
        (b"a", "a"),
        (None, False),
        ([1, 2], [1, 2, 3]),
        ({"a": 1}, {"a": 1, "b": 2}),
        (0.1, 0.1001),
        (2**70, float(2**70)),
        (float("nan"), 0.0),
    ],
)
def test_different_values_are_not_the_same(expected: object, got: object) -> None:
    assert not values.same(values.encode(expected), values.encode(got))
    assert not values.same(values.encode(got), values.encode(expected))


def test_floats_are_the_same_up_to_rounding_and_nan_is_itself() -> None:
    assert values.same(values.encode(0.3), values.encode(0.1 + 0.2))
    assert values.same(values.encode([float("nan")]), values.encode([math.nan]))
    assert values.same(values.encode(math.inf), values.encode(math.inf))


def test_the_order_of_keys_does_not_matter_but_is_kept() -> None:
    mixed = {"p": 1, 5: 2, "a": 3}
    assert list(values.decode(values.encode(mixed))) == ["p", 5, "a"]
    assert values.same(values.encode(mixed), values.encode({5: 2, "a": 3, "p": 1}))


class _Always(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize("value", [_Always(3), object(), (item for item in ()), len, [_Always(1)], type])
def test_what_is_not_plain_data_is_refused(value: object) -> None:
    with pytest.raises(values.NotPlainData):
        values.encode(value)


def test_size_and_depth_are_bounded() -> None:
    nested: list[object] = []
    nested.append(nested)
    with pytest.raises(values.NotPlainData):
        values.encode(nested)
    with pytest.raises(values.NotPlainData):
        values.encode([0] * (values.MAX_NODES + 1))


@pytest.mark.parametrize(
    "tree", [{"$dict": [[1, 2]]}, {"$dict": 3}, {"$dict": [[1, 2], [1, 2]]}, {"$set": [1]}, {}, 3, None]
)
def test_hostile_trees_are_compared_without_error(tree: object) -> None:
    assert not values.same(values.encode({1: 2, 3: 4}), tree)


@pytest.mark.parametrize(
    "tree", [{"$pickle": "x"}, {"$set": 3}, {"$int": 3}, {"$tuple": [1], "a": 2}, {"$bytes": "zz"}]
)
def test_malformed_trees_do_not_decode(tree: object) -> None:
    with pytest.raises(ValueError, match=r"tag|malformed|alone|hex"):
        values.decode(tree)
