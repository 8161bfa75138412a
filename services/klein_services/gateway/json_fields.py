"""Fields of a JSON request: each is read once with its type and limits, and every violation is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from klein_services.gateway.errors import FieldViolation, invalid_fields

MAXIMUM_SEED = 2**63 - 1
"""Largest seed that the suite takes."""


class JsonFields:
    """Reader of an object's fields; `check` raises when one was wrong or was not read.

    Args:
        values: the object.
        path: prefix of the fields' names in messages, such as `input.`.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path
        self._read: set[str] = set()
        self._violations: list[FieldViolation] = []

    def refuse(self, name: str, message: str) -> None:
        """Notes that a field's value is wrong."""
        self._violations.append(FieldViolation(self._path + name, message))

    def raw(self, name: str) -> Any:
        """Returns a field as it is; `None` where it is missing or null."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str, *, limit: int, required: bool = False) -> str | None:
        """Returns a string of at most `limit` characters."""
        value = self.raw(name)
        if value is None:
            if required:
                self.refuse(name, "is missing")
            return None
        if not isinstance(value, str):
            self.refuse(name, "must be a string")
        elif len(value) > limit:
            self.refuse(name, f"has {len(value)} characters; at most {limit} are allowed")
        elif any("\ud800" <= character <= "\udfff" for character in value):
            self.refuse(name, "is not valid Unicode")
        else:
            return value
        return None

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        """Returns one of some words."""
        value = self.raw(name)
        if value is None:
            return default
        if value not in choices:
            self.refuse(name, f"must be one of {', '.join(choices)}")
            return default
        return str(value)

    def integer(self, name: str, *, minimum: int, maximum: int) -> int | None:
        """Returns a whole number within limits."""
        value = self.raw(name)
        # JSON has one kind of number: 4.0 is 4.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if type(value) is not int:
            self.refuse(name, "must be a whole number")
        elif not minimum <= value <= maximum:
            self.refuse(name, f"is {value}; it must be at least {minimum} and at most {maximum}")
        else:
            return value
        return None

    def number(self, name: str, *, minimum: float, maximum: float) -> float | None:
        """Returns a number within limits."""
        value = self.raw(name)
        if value is None:
            return None
        if type(value) not in (int, float):
            self.refuse(name, "must be a number")
        elif not minimum <= value <= maximum:
            self.refuse(name, f"is {value}; it must be at least {minimum:g} and at most {maximum:g}")
        else:
            return float(value)
        return None

    def boolean(self, name: str) -> bool | None:
        """Returns true or false."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            self.refuse(name, "must be true or false")
            return None
        return value

    def texts(self, name: str, *, count: int) -> list[str]:
        """Returns a list of at most `count` strings; one string stands for a list of it."""
        value = self.raw(name)
        if value is None:
            return []
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            self.refuse(name, "must be a list of strings")
        elif len(listed) > count:
            self.refuse(name, f"has {len(listed)} entries; at most {count} are allowed")
        else:
            return listed
        return []

    def side(self, name: str) -> int | None:
        """Returns a width or height of at least 64 pixels; 0 stands for none."""
        value = self.integer(name, minimum=0, maximum=16384)
        if not value:
            return None
        if value < 64 or value % 16:
            self.refuse(name, f"is {value}; it must be a multiple of 16, at least 64, or 0 for automatic")
            return None
        return value

    def check(self, status: HTTPStatus = HTTPStatus.UNPROCESSABLE_ENTITY) -> None:
        """Checks that no field was wrong and none is unknown.

        Raises:
            ApiError: there are such fields; all are named.
        """
        for name in sorted(self._values.keys() - self._read)[:20]:
            self.refuse(name[:64], f"is unknown; known are {', '.join(sorted(self._read))}")
        if self._violations:
            error = invalid_fields(self._violations)
            error.status = status
            raise error
