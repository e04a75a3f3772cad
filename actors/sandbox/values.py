"""Plain Python data as JSON, with every type kept: what crosses the sandbox's border instead of pickles.

None, bool, str, finite and non-finite floats, lists, integers that fit 64 bits and dictionaries with plain string
keys stand for themselves. Everything else is an object with one `$`-key: `{"$tuple": [...]}`, `{"$set": [...]}`,
`{"$frozenset": [...]}`, `{"$dict": [[key, value], ...]}`, `{"$bytes": "hex"}`, `{"$int": "0x..."}`,
`{"$complex": [re, im]}`, and `{"$type": "int"}` for the types of plain data themselves. Task files use the same notation.

Encoding looks at the exact type, so a subclass with its own `__eq__` never passes for the value it imitates. The
standard library's Counter, defaultdict and OrderedDict are equal to the dictionary with their items and travel as one.
"""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, defaultdict
from typing import Any

MAX_DEPTH = 64
MAX_NODES = 200_000
FLOAT_REL_TOL = 1e-9
FLOAT_ABS_TOL = 1e-12

_INT64 = 1 << 63
_PLAIN = (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
_TYPES: dict[str, type] = {kind.__name__: kind for kind in _PLAIN}


class NotPlainData(ValueError):
    """A value that is not plain data, is nested deeper than MAX_DEPTH or has more than MAX_NODES parts."""


def encode(value: Any) -> Any:
    """The JSON tree of a value.

    Raises:
        NotPlainData: names the offending type or the limit.
    """
    return _encode(value, MAX_DEPTH, [MAX_NODES])


def _encode(value: Any, depth: int, nodes: list[int]) -> Any:
    nodes[0] -= 1
    if depth < 0 or nodes[0] < 0:
        raise NotPlainData(f"more than {MAX_DEPTH} levels or {MAX_NODES} values")
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -_INT64 <= value < _INT64 else {"$int": hex(value)}
    if kind is list:
        return [_encode(item, depth - 1, nodes) for item in value]
    if kind is tuple:
        return {"$tuple": [_encode(item, depth - 1, nodes) for item in value]}
    if kind is set or kind is frozenset:
        items = [_encode(item, depth - 1, nodes) for item in value]
        return {f"${kind.__name__}": sorted(items, key=_sort_key)}
    if kind in (dict, Counter, defaultdict, OrderedDict):
        return _encode_dict(value, depth, nodes)
    if kind is bytes:
        return {"$bytes": value.hex()}
    if kind is complex:
        return {"$complex": [value.real, value.imag]}
    if kind is type and value in _PLAIN:
        return {"$type": value.__name__}
    raise NotPlainData(f"{kind.__name__} is not plain data")


def _encode_dict(value: dict[Any, Any], depth: int, nodes: list[int]) -> Any:
    if all(type(key) is str and not key.startswith("$") for key in value):
        return {key: _encode(item, depth - 1, nodes) for key, item in value.items()}
    # In insertion order, which a program may depend on.
    pairs = [[_encode(key, depth - 1, nodes), _encode(item, depth - 1, nodes)] for key, item in value.items()]
    return {"$dict": pairs}


def _sort_key(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True)


def decode(tree: Any) -> Any:
    """The value of a JSON tree; the inverse of `encode`. Only for trees of trusted senders or inside a sandbox:
    it hashes what it is given.

    Raises:
        ValueError: an unknown `$`-key or a malformed one.
    """
    if isinstance(tree, list):
        return [decode(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if not any(key.startswith("$") for key in tree):
        return {key: decode(item) for key, item in tree.items()}
    if len(tree) != 1:
        raise ValueError(f"a $-key must stand alone, found {sorted(tree)}")
    ((tag, body),) = tree.items()
    try:
        return _decode_tagged(tag, body)
    except (TypeError, KeyError) as error:
        raise ValueError(f"malformed {tag}: {error}") from error


def _decode_tagged(tag: str, body: Any) -> Any:
    if tag == "$tuple":
        return tuple(decode(item) for item in body)
    if tag == "$set":
        return {decode(item) for item in body}
    if tag == "$frozenset":
        return frozenset(decode(item) for item in body)
    if tag == "$dict":
        return {decode(key): decode(item) for key, item in body}
    if tag == "$bytes":
        return bytes.fromhex(body)
    if tag == "$int":
        return int(body, 16)
    if tag == "$complex":
        return complex(*body)
    if tag == "$type":
        return _TYPES[body]
    raise ValueError(f"unknown tag {tag}")


def same(expected: Any, got: Any) -> bool:
    """Whether two JSON trees stand for the same value: types must agree, floats may differ by FLOAT_REL_TOL.

    The order of a dictionary's keys does not matter. `got` may come from a hostile sender: it is walked along
    `expected` and never decoded, so nothing of it is hashed but strings.
    """
    if type(expected) is not type(got):
        return False
    if isinstance(expected, float):
        if math.isnan(expected) or math.isnan(got):
            return math.isnan(expected) and math.isnan(got)
        return math.isclose(expected, got, rel_tol=FLOAT_REL_TOL, abs_tol=FLOAT_ABS_TOL)
    if isinstance(expected, list):
        return len(expected) == len(got) and all(map(same, expected, got))
    if isinstance(expected, dict):
        if "$dict" in expected:
            return _same_pairs(expected["$dict"], got.get("$dict"))
        return len(expected) == len(got) and all(
            key in got and same(item, got[key]) for key, item in expected.items()
        )
    return bool(expected == got)


def _same_pairs(expected: list[Any], got: Any) -> bool:
    if not isinstance(got, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in got):
        return False
    by_key = {_sort_key(key): item for key, item in got}
    return len(expected) == len(got) == len(by_key) and all(
        _sort_key(key) in by_key and same(item, by_key[_sort_key(key)]) for key, item in expected
    )
