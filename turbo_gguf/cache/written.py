"""Values with a notation: parsed once, compared by what they mean, stored as they are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self


class Written(ABC):
    """A value that :meth:`parse` reads and ``str`` writes, in its shortest form. Two with the same form are equal."""

    __slots__ = ()

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self:
        """Read the notation.

        Raises:
            UsageError: names the part that is wrong.
        """

    @abstractmethod
    def __str__(self) -> str:
        """The notation."""

    def __eq__(self, other: object) -> bool:
        """Whether both are written alike."""
        return type(self) is type(other) and str(self) == str(other)

    def __bool__(self) -> bool:
        """Whether there is anything to write."""
        return bool(str(self))

    def __hash__(self) -> int:
        """Of the notation."""
        return hash(str(self))

    def __repr__(self) -> str:
        """For messages of tests."""
        return f"{type(self).__name__}({str(self)!r})"


def encode(value: Any) -> str:
    """How msgspec writes what it does not know (``enc_hook``)."""
    if isinstance(value, Written):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def decode(kind: type, text: Any) -> Any:
    """How msgspec reads it back (``dec_hook``)."""
    if issubclass(kind, Written):
        return kind.parse(text)
    raise NotImplementedError(kind.__name__)
