"""What people ask of versions: `f1>=0.9`, `rank<=16`, `base:llama`, a word. Owns the grammar; the catalog finds.

A comparison is also what a promotion may require of a version.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import InvalidQuery
from .version import Version

NUMBERS = ("rank", "bytes", "version")  # of every version; any other key of a comparison is a metric
WORDS = ("name", "base", "by", "description", "dataset", "run")  # what versions are sorted by beside these and metrics
FIELDS = ("name", "base", "alias", "tag", "target", "by", "dataset", "run", "digest", "parent")
TERMS = 50  # of one query
SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
_KEY = r"[A-Za-z_][\w./@-]*"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_COMPARISON = re.compile(rf"(?P<key>{_KEY})(?P<sign>{'|'.join(SIGNS)})(?P<number>{_NUMBER})")
_FIELD = re.compile(rf"(?P<field>{'|'.join(FIELDS)}):(?P<text>.+)")
_FORMS = "expected comparisons (f1>=0.9, rank<=16), fields (" + ", ".join(f"{f}:…" for f in FIELDS) + ") or words"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A number of a version against another: `f1>=0.9`. A metric that a version does not have compares to nothing."""

    key: str
    sign: str
    number: float

    @classmethod
    def parse(cls, text: str) -> "Comparison":
        """Read one. Raises InvalidQuery."""
        found = _COMPARISON.fullmatch(text.strip())
        if not found:
            raise InvalidQuery(
                f"'{text}' is not a comparison: expected for instance f1>=0.9, with one of {' '.join(SIGNS)}"
            )
        return cls(found["key"], found["sign"], float(found["number"]))

    def of(self, version: Version) -> float | None:
        """The version's number; None if it has none of that name."""
        numbers = {"rank": version.rank, "bytes": version.bytes, "version": version.number}
        return numbers.get(self.key, version.metrics.get(self.key))

    def holds(self, version: Version) -> bool:
        """Whether the version has the number, and it compares so."""
        own = self.of(version)
        return own is not None and bool(SIGNS[self.sign](own, self.number))

    def refusal(self, version: Version) -> str | None:
        """Why it does not hold for the version, in words; None if it does."""
        own = self.of(version)
        if own is None:
            known = ", ".join(version.metrics) or "none"
            return f"{self} is required, and it has no {self.key} (its metrics are {known})"
        return None if self.holds(version) else f"{self} is required, and it has {own:.12g}"

    def __str__(self) -> str:
        return f"{self.key}{self.sign}{self.number:.12g}"


@dataclass(frozen=True, slots=True)
class Field:
    """Text in a field of a version, one of FIELDS; None: a word in its name, message or description.

    Case does not matter.
    """

    field: str | None
    text: str


def parse_query(text: str) -> tuple[Comparison | Field, ...]:
    """Terms between spaces, all of which must hold. Raises InvalidQuery."""
    words = text.split()
    if len(words) > TERMS:
        raise InvalidQuery(f"the query has {len(words)} terms, at most {TERMS} are taken")
    return tuple(map(_term, words))


def _term(word: str) -> Comparison | Field:
    if found := _FIELD.fullmatch(word):
        return Field(found["field"], found["text"])
    if any(sign in word for sign in "<>=!"):
        return Comparison.parse(word)
    if ":" in word:
        raise InvalidQuery(f"'{word}' asks for a field that there is not: {_FORMS}")
    return Field(None, word)


def parse_sort(text: str) -> tuple[str, bool]:
    """`f1`: from the lowest; `-f1`: from the highest. Returns the key and whether the highest comes first."""
    key = text.removeprefix("-")
    if not re.fullmatch(_KEY, key):
        raise InvalidQuery(
            f"sort is '{text}', expected a metric, {', '.join(NUMBERS)}, {', '.join(WORDS)} or created, or - and one"
        )
    return key, text.startswith("-")
