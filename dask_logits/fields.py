"""Base class and field types of JSON records.

A file may come from someone else. Counts, numbers and names are therefore bounded, and a record with invalid fields is
refused with all of them at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from dask_logits.errors import CacheError

# Far larger than any count, yet sums and products of a few counts still fit into 64 bits.
MOST_COUNT = 1 << 48
# Largest number of temperatures, besides 1, of a cache.
MOST_TEMPERATURES = 16
# Largest number of draws of a position: each of its counts is stored in a byte.
MOST_DRAWS = 255
_MOST_NUMBER = 1e300
_NAME = r"(?!\.\.?(?:/|$))[A-Za-z0-9_.-]{1,200}"
_PATH = f"{_NAME}(?:/{_NAME})*"
_DIGEST = "[0-9a-f]{64}"
# Invalid fields that a message lists.
_NAMED = 8
# Names of JSON types in place of Python's.
_TYPES = {
    "dict_type": "be a JSON object",
    "model_type": "be a JSON object",
    "tuple_type": "be a list",
    "string_type": "be text",
    "int_type": "be an integer",
}


def _must(what: str, holds: Callable[[Any], bool]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not holds(value):
            raise PydanticCustomError("record", "Input should be {what}", {"what": what})
        return value

    return BeforeValidator(check)


def _match(what: str, pattern: str) -> BeforeValidator:
    return _must(what, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def _is_finite(value: Any) -> bool:
    # Also excludes integers too large for a float.
    return type(value) in (int, float) and -_MOST_NUMBER < value < _MOST_NUMBER


_NUMBER = WithJsonSchema({"type": "number"})
Count = Annotated[int, Field(strict=True, ge=0, lt=MOST_COUNT)]
Flag = Annotated[bool, Field(strict=True)]
Finite = Annotated[int | float, _must("a finite number", _is_finite), _NUMBER]
Temperature = Annotated[
    float, Field(gt=0), _must("a positive number", lambda value: _is_finite(value) and value > 0), _NUMBER
]
NumberOrInfinity = Annotated[
    int | float, _must("a number", lambda value: value in (float("inf"), float("-inf")) or _is_finite(value)), _NUMBER
]
# A file in a folder or below it. Paths that leave the folder are refused.
FileName = Annotated[
    str, _match("a plain file name", _NAME), WithJsonSchema({"type": "string", "pattern": f"^{_NAME}$"})
]
InnerPath = Annotated[
    str, _match("a path below the folder", _PATH), WithJsonSchema({"type": "string", "pattern": f"^{_PATH}$"})
]
Digest = Annotated[
    str, _match("64 hexadecimal digits", _DIGEST), WithJsonSchema({"type": "string", "pattern": f"^{_DIGEST}$"})
]


class Record(BaseModel):
    """A frozen record. Unknown fields are ignored, because a later minor version may add some.

    Examples
    --------
    >>> class Part(Record):
    ...     rows: Count
    ...     name: str | None = None
    >>> Part.parse(Path("a.json"), {"rows": 3}).to_json()
    {'rows': 3}
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    @classmethod
    def parse(cls, path: Path, values: Mapping[str, Any], cure: str = "restore or delete it") -> Self:
        """Validate the values of a file.

        Parameters
        ----------
        path
            The file, for error messages.
        values
            The JSON object in it.
        cure
            What the user can do about a damaged file.

        Raises
        ------
        CacheError
            Naming the file and every invalid field.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_problem(each) for each in error.errors()]
            more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
            raise CacheError.at(path, f"{'; '.join(problems[:_NAMED])}{more}; the file is damaged: {cure}") from error

    def to_json(self) -> dict[str, Any]:
        """Return the fields that were given, as JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


def _problem(error: ErrorDetails) -> str:
    name = ".".join(map(str, error["loc"]))[:80]
    if error["type"] == "missing":
        return f"expected {name}, got none"
    if error["type"] == "extra_forbidden":
        return f"expected no field {name}"
    expected = _TYPES.get(error["type"]) or error["msg"].partition(" should ")[2] or error["msg"]
    return f"expected {name} to {expected}, got {shown(error['input'])}"


def shown(value: object) -> str:
    """Format a value for a message: in full if short, else its beginning or its type.

    >>> shown(-1), shown([1, [2]])
    ('-1', 'a list')
    """
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
