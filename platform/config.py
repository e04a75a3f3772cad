"""Typed configuration: a YAML file, then dotted overrides, then one validated frozen object.

Every job's configuration is a subclass of `Config`, defined beside the job. The string under a field is its
documentation and appears in `fewstep COMMAND --help`.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined, to_jsonable_python

from fewstep.platform.errors import ConfigError
from fewstep.platform.registry import nearest

_SHOWN = 80


class Config(BaseModel):
    """Base of every job configuration: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )


ConfigT = TypeVar("ConfigT", bound=BaseModel)


@dataclass(frozen=True)
class ConfigKey:
    """One settable key: its full dotted path, its type as text, its default as text, and its documentation.

    num_values: how many values its option takes on the command line; more than 1 for a tuple of that length.
    repeats: whether its option may be given several times, for a list: one value, or a tuple of such values.
    """

    path: str
    type: str
    default: str
    description: str
    num_values: int = 1
    repeats: bool = False


def load_config(cls: type[ConfigT], path: Path | None, overrides: Sequence[str]) -> ConfigT:
    """The configuration of one job.

    Args:
        cls: the job's configuration class.
        path: a YAML file with a mapping at its root; None = defaults only.
            A section given in part keeps the job's own defaults for the rest.
        overrides: `a.b.c=value` each, applied in order over the file; the value is parsed as YAML, list
            elements are addressed by their index.
    Raises:
        ConfigError: unreadable file, unknown key (names the nearest one), or a value of the wrong kind.
    """
    tree = _merge(cls, _section_defaults(cls), read_mapping(path) if path is not None else {})
    for override in overrides:
        _apply_override(tree, override)
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise _to_config_error(cls, error) from error


def render_config(config: BaseModel) -> str:
    """The resolved configuration as YAML; loading it back gives an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def config_keys(cls: type[BaseModel]) -> list[ConfigKey]:
    """Every settable key of a configuration class, nested ones as dotted paths, in declaration order."""
    return list(_walk_keys(cls, ""))


class _Loader(yaml.SafeLoader):
    """SafeLoader without two traps of YAML 1.1: `1e-3` read as text, and a repeated key silently winning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str, field: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader subclass
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            field, _shorten(where + problem), "valid YAML", "correct the YAML at that place"
        ) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file with a mapping at its root. Raises ConfigError, with the place of the mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
        raise ConfigError(
            str(path), reason, "a readable YAML file", "check the path of the configuration"
        ) from error
    tree = _parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            str(path), type(tree).__name__, "a mapping of keys at the root", "write `key: value` lines"
        )
    return tree


def _section_defaults(cls: type[BaseModel]) -> dict[str, Any]:
    """The defaults that overrides can reach into: sections and lists, as plain data.

    Without them `optimizer.betas=...` would silently replace a job's tuned `optimizer` default by the
    section class's own defaults.
    """
    tree = {}
    for name, field in cls.model_fields.items():
        value = (
            None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
        )
        if isinstance(value, BaseModel | list | tuple):
            tree[name] = to_jsonable_python(value)
    return tree


def _merge(cls: type[BaseModel], base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section; a section that can be of several kinds is replaced whole."""
    merged = {**base, **over}
    for name in base.keys() & over.keys() & cls.model_fields.keys():
        models = _models_in(cls.model_fields[name].annotation)
        if len(models) == 1 and isinstance(base[name], dict) and isinstance(over[name], dict):
            merged[name] = _merge(models[0], base[name], over[name])
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            "override",
            repr(_shorten(override)),
            "key=value or a.b.c=value",
            "write the key, `=`, and the value",
        )
    value = _parse_yaml(text, dotted)
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[_slot(node, part, dotted)]
        if not isinstance(node, dict | list):
            prefix = ".".join(parts[: depth + 1])
            raise ConfigError(
                dotted, f"{prefix}={_shorten(repr(node))}, which has no keys of its own", "keys below a section",
                f"override {prefix} itself",
            )  # fmt: skip
    if isinstance(node, dict):
        node[parts[-1]] = value
    else:
        node[_slot(node, parts[-1], dotted)] = value


def _slot(node: dict[str, Any] | list[Any], part: str, dotted: str) -> Any:
    """The key of a mapping, or the checked index of a list."""
    if isinstance(node, dict):
        return part
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(dotted, repr(part), f"an index from 0 to {len(node) - 1}", "use an existing index")
    return int(part)


def _to_config_error(cls: type[BaseModel], error: ValidationError) -> ConfigError:
    problems = error.errors()
    # An unknown key often makes a required one missing too; the misspelling is the useful half.
    problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    first, more = _most_telling(problems), len(problems) - 1
    suffix = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    path = _dotted(cls, first["loc"]) or cls.__name__
    if first["type"] == "extra_forbidden":
        return _unknown_key(cls, first["loc"], suffix)
    if first["type"] == "missing":
        return ConfigError(path, "nothing", "a value (the key is required)", f"set {path}" + suffix)
    allowed = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return ConfigError(path, _got(first), _one_line(allowed), f"change {path}" + suffix)


def _most_telling(problems: Sequence[ErrorDetails]) -> ErrorDetails:
    """The first problem; where a value fits no member of a union, the member that it came furthest in."""
    first = problems[0]
    if not any(_is_member(part) for problem in problems for part in problem["loc"]):
        return first
    return max((p for p in problems if p["loc"][:1] == first["loc"][:1]), key=lambda p: len(p["loc"]))


def _is_member(part: int | str) -> bool:
    """Whether a step of an error's location is pydantic's name of a union's member that is no model."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part)


def _got(problem: ErrorDetails) -> str:
    value = problem["input"]
    return _shorten(repr(value.model_dump() if isinstance(value, BaseModel) else value))


def _unknown_key(cls: type[BaseModel], loc: tuple[int | str, ...], suffix: str) -> ConfigError:
    path = _dotted(cls, loc)
    owner = _model_at(cls, loc[:-1])
    siblings = sorted(owner.model_fields)
    parent = path.rpartition(".")[0]
    hint = nearest(str(loc[-1]), siblings)
    if hint:
        close = hint.removeprefix(" (did you mean ").removesuffix("?)")
        target = f"{parent}.{close}" if parent else close
    else:
        # The right leaf in the wrong section, such as `lr` for `optimizer.lr`.
        every = [key.path for key in config_keys(cls)]
        by_leaf = [key for key in every if key.rpartition(".")[2] == loc[-1]]
        target = (
            by_leaf[0] if by_leaf else nearest(path, every).removeprefix(" (did you mean ").removesuffix("?)")
        )
    fix = f"did you mean {target}?" if target else "remove the key"
    return ConfigError(path, "an unknown key", f"{', '.join(siblings)}", fix + suffix)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models an annotation can hold, through Optional, lists, tuples, mappings and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _model_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The model class that owns the keys at a pydantic error location."""
    current = cls
    for part in loc:
        if isinstance(part, str) and part in current.model_fields:
            inner = _models_in(current.model_fields[part].annotation)
            current = inner[0] if inner else current
    return current


def _dotted(cls: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """An error location as the user spells it (pydantic adds names of union members, which nobody typed)."""
    members = {model.__name__ for model in _reachable(cls)}
    return ".".join(str(part) for part in loc if part not in members and not _is_member(part))


def _reachable(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield cls
    for field in cls.model_fields.values():
        for model in _models_in(field.annotation):
            yield from _reachable(model)


def _walk_keys(cls: type[BaseModel], prefix: str) -> Iterator[ConfigKey]:
    for name, field in cls.model_fields.items():
        path = f"{prefix}{name}"
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _walk_keys(annotation, f"{path}.")
            continue
        if field.is_required():
            default = "required"
        else:
            value = field.get_default(call_default_factory=True, validated_data={})
            default = "" if value is PydanticUndefined else _shorten(_plain(value))
        description = _one_line(field.description or "")
        yield ConfigKey(
            path, _type_text(annotation), default, description, _num_values(annotation), _repeats(annotation)
        )


def _plain(value: Any) -> str:
    if isinstance(value, BaseModel):
        return repr(value.model_dump(mode="json"))
    return str(value) if isinstance(value, Path) else repr(value)


def _type_text(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(argument) for argument in get_args(annotation))
    if annotation is type(None):
        return "null"
    if origin is not None and str(origin) == "typing.Literal":
        return " | ".join(str(argument) for argument in get_args(annotation))
    if origin is not None:
        arguments = ", ".join(
            "..." if argument is ... else _type_text(argument) for argument in get_args(annotation)
        )
        return f"{getattr(origin, '__name__', str(origin))}[{arguments}]"
    return getattr(annotation, "__name__", str(annotation))


def _num_values(annotation: Any) -> int:
    """The length of a tuple of fixed length, through Optional; 1 for anything else."""
    if get_origin(annotation) in (Union, types.UnionType):
        return max(_num_values(argument) for argument in get_args(annotation))
    fixed = get_origin(annotation) is tuple and Ellipsis not in get_args(annotation)
    return len(get_args(annotation)) if fixed else 1


def _repeats(annotation: Any) -> bool:
    """Whether it is `X | tuple[X, ...]`, or `X | Y | tuple[X | Y, ...]`."""
    kinds = _kinds(annotation)
    listed = [get_args(kind) for kind in kinds if get_origin(kind) is tuple]
    return any(len(items) == 2 and items[1] is ... and {*_kinds(items[0])} < {*kinds} for items in listed)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of anything else, itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _shorten(text: str) -> str:
    text = _one_line(text)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
