"""Recipes: the settings of a run in a YAML file, under the names of the flags of `parscale train`.

Those that come with the package are found by name. Flags win over a recipe, and a recipe over the defaults.
"""

from dataclasses import is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from parscale.errors import InputError
from parscale.train.config import TrainConfig, whole_number

FOLDER = Path(__file__).parents[1] / "recipes"


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The arguments of `TrainConfig` that a recipe sets.

    `name` is a YAML file, or one of the package's recipes: pretrain, retrofit, frozen, sft.

    Raises:
        InputError: no such recipe, not a mapping in YAML, an unknown key (with the closest known one), or a value that
            is not of the flag's type.
    """
    path = _find(name)
    kinds = _kinds()
    values: dict[str, Any] = {}
    for key, value in _load(path).items():
        if key not in kinds:
            close = get_close_matches(str(key), kinds, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(kinds))}"
            raise InputError(f"recipe {path}: unknown key {key!r}; {hint}")
        try:
            values[key] = _converted(value, kinds[key])
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"recipe {path}: {key}={value!r} is not accepted; give {_named(kinds[key])}") from None
    for name, group in _groups().items():
        if chosen := {key: values.pop(key) for key in get_type_hints(group) if key in values}:
            values[name] = group(**chosen)
    return values


def _find(name: str | Path) -> Path:
    shipped = {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}
    if Path(name).is_file():
        return Path(name)
    if str(name) not in shipped:
        raise InputError(f"recipe {str(name)!r}: there is no such file; those that come along are {', '.join(shipped)}")
    return shipped[str(name)]


def _load(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"recipe {path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"recipe {path}: give keys and values, such as `streams: 4`")
    return content


def _groups() -> dict[str, Any]:
    """The settings of `TrainConfig` that are dataclasses; their fields stand beside the others, as flags do."""
    return {name: kind for name, kind in get_type_hints(TrainConfig).items() if is_dataclass(kind)}


def _kinds() -> dict[str, Any]:
    """Key → type."""
    groups = _groups()
    kinds = {name: kind for name, kind in get_type_hints(TrainConfig).items() if name not in groups}
    return kinds | {name: kind for group in groups.values() for name, kind in get_type_hints(group).items()}


def _converted(value: Any, kind: Any) -> Any:
    """`value` as `kind`. YAML reads 3e-3 and 1e6, which have no point, as text."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _converted(value, next(c for c in choices if c is not NoneType))
    if origin is tuple:
        return tuple(_converted(item, choices[0]) for item in (value if isinstance(value, list) else [value]))
    if origin is Literal:
        accepted = value in choices
    elif kind in (int, float):
        accepted = not isinstance(value, bool)
        kind = whole_number if kind is int else float
    else:
        accepted = isinstance(value, bool if kind is bool else str)
    if not accepted:
        raise TypeError(value)
    return value if origin is Literal else kind(value)


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {get_args(kind)}"
    if get_origin(kind) is tuple:
        return f"a list of {_named(get_args(kind)[0])}"
    if get_origin(kind) in (Union, UnionType):
        return _named(next(c for c in get_args(kind) if c is not NoneType))
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
