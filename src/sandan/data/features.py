"""The Arrow types of columns, from the rows themselves: text stays text, whatever it looks like.

Mappings that all have the same members are structs. Those of several shapes are kept as JSON, which comes back as it was
written; structs would come back with a null for each member that another row has. A column of several kinds of values
becomes text: JSON, where it is not text already.
"""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Features

# A type is the name of a scalar, "null", ("list", type), a dict of types, "json" (mappings of several shapes), "mixed"
# (values of several kinds) or "other" (nothing that JSON has).
Type = Any
SCALARS = {bool: "bool", int: "int64", float: "float64", str: "string"}


def type_of(value: Any) -> Type:
    """Return the type of a value of a row."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return ("list", merged_all(map(type_of, value)))
    if isinstance(value, dict):
        members = {name: type_of(member) for name, member in value.items()}
        return members if members and all(member in SCALARS.values() for member in members.values()) else "json"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "mixed"
    return SCALARS.get(type(value), "other")


def merged_all(types: Iterable[Type]) -> Type:
    """Return the type of values of several types."""
    found: Type = "null"
    for kind in types:
        found = merged(found, kind)
    return found


def merged(one: Type, other: Type) -> Type:
    """Return the type that holds values of both types."""
    if "other" in (one, other):
        return "other"
    if one == "null":
        one, other = other, one
    if other == "null":
        return "json" if isinstance(one, dict) else one
    if one == other:
        return one
    if isinstance(one, tuple) and isinstance(other, tuple):
        return ("list", merged(one[1], other[1]))
    if isinstance(one, (dict, str)) and isinstance(other, (dict, str)) and all(map(_is_mapping, (one, other))):
        return _merged_mappings(one, other)
    return "float64" if all(kind in ("int64", "float64") for kind in (one, other)) else "mixed"


def _is_mapping(kind: Type) -> bool:
    return isinstance(kind, dict) or kind == "json"


def _merged_mappings(one: Type, other: Type) -> Type:
    if "json" in (one, other) or one.keys() != other.keys():
        return "json"
    members = {name: merged(one[name], other[name]) for name in one}
    return "json" if "mixed" in members.values() else members


def _holds(kind: Type, part: str) -> bool:
    """Return whether a type, or what is in its lists, is `part`."""
    return _holds(kind[1], part) if isinstance(kind, tuple) else kind == part


class ColumnTypes:
    """The types of the columns of all rows seen, in the order in which they were first seen."""

    def __init__(self):
        self.types: dict[str, Type] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Widen the types so that they hold a row."""
        for name, value in row.items():
            # Nearly every value is text in a column of text.
            if type(value) is not str or self.types.get(name) != "string":
                self.types[name] = merged(self.types.get(name, "null"), type_of(value))

    def features(self) -> "Features":
        """Return the types as features; columns that hold something else than JSON are left out."""
        from datasets import Features

        return Features({name: _feature(kind) for name, kind in self.types.items() if not _holds(kind, "other")})

    def mixed(self) -> tuple[str, ...]:
        """Return the columns of several kinds of values, whose values become text (see [`as_text`])."""
        return tuple(name for name, kind in self.types.items() if _holds(kind, "mixed"))


def as_text(value: Any) -> str | None:
    """Return text as it is, and any other value as JSON."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _feature(kind: Type) -> Any:
    from datasets import Json, List, Value

    if _holds(kind, "mixed"):
        return Value("string")
    if isinstance(kind, tuple):
        return List(_feature(kind[1]))
    if isinstance(kind, dict):
        return {name: _feature(member) for name, member in kind.items()}
    return Json() if kind == "json" else Value("string" if kind == "null" else kind)
