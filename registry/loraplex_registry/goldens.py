"""Golden prompts of a receipt: what adapter and base gave next where the adapter was made. Owns their form and bounds.

Whoever loads the adapter asks the same and compares; here nothing is computed.
"""

from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

PROMPTS = 8  # of one receipt
PROMPT_TOKENS = 64  # of one prompt
TOP = 20  # likeliest tokens of one answer
_CHARACTERS = 1000  # of a prompt as text

Top = tuple[tuple[int, float], ...]  # token id and natural logarithm of its probability, likeliest first


@dataclass(frozen=True, slots=True)
class Golden:
    """One prompt, and what was likeliest to come next by the adapter and by the bare base. `text` is for people."""

    text: str
    ids: tuple[int, ...]
    adapter: Top
    base: Top

    @property
    def record(self) -> dict[str, Any]:
        """As a receipt holds it."""
        return asdict(self)


def read_goldens(value: object) -> tuple[Golden, ...]:
    """The goldens of a receipt's JSON; none where there are none. Raises ValueError, which names the place."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > PROMPTS:
        raise ValueError(f"goldens: expected a list of at most {PROMPTS} prompts")
    return tuple(_golden(f"goldens[{at}]", one) for at, one in enumerate(value))


def _golden(where: str, value: object) -> Golden:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object with text, ids, adapter and base")
    text, ids = value.get("text"), value.get("ids")
    if not isinstance(text, str) or len(text) > _CHARACTERS:
        raise ValueError(f"{where}.text: expected a string of at most {_CHARACTERS} characters")
    if not isinstance(ids, list) or not 0 < len(ids) <= PROMPT_TOKENS or not all(map(_is_id, ids)):
        raise ValueError(f"{where}.ids: expected 1 to {PROMPT_TOKENS} token ids")
    return Golden(text, tuple(ids), *(_top(f"{where}.{who}", value.get(who)) for who in ("adapter", "base")))


def _top(where: str, value: object) -> Top:
    if isinstance(value, list) and 0 < len(value) <= TOP and all(map(_is_likely, value)):
        return tuple((token_id, float(logprob)) for token_id, logprob in value)
    raise ValueError(f"{where}: expected 1 to {TOP} pairs of a token id and a logarithm")


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_likely(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not _is_id(value[0]):
        return False
    return type(value[1]) in (int, float) and isfinite(value[1]) and value[1] <= 0.01
