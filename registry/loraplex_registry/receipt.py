"""What the registry reads of a trainer's receipt.json: the base, the metrics and the parent. All of it is optional."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from .errors import InvalidAdapter
from .manifest import BaseRef

FORMAT = "loraplex.receipt/1"
RECEIPT = "receipt.json"
RECEIPT_BYTES = 16 << 20


@dataclass(frozen=True)
class Receipt:
    """`base_path` is where the base lay on the trainer's machine; `parent` is the digest that training continued."""

    base: BaseRef | None = None
    base_path: str | None = None
    metrics: dict[str, float] | None = None
    parent: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Receipt":
        """The receipt in the folder, or an empty one when there is none. Raises InvalidAdapter."""
        file = folder / RECEIPT
        if not file.is_file():
            return cls()
        if file.stat().st_size > RECEIPT_BYTES:
            raise InvalidAdapter(f"{RECEIPT} is larger than {RECEIPT_BYTES:,} bytes, which is the limit")
        try:
            body = json.loads(file.read_bytes())
            if body.get("format") != FORMAT:
                raise ValueError(f"format is {body.get('format')!r}, expected {FORMAT!r}")
            base, parent, metrics = (body.get(key) or {} for key in ("base", "parent", "metrics"))
            about = {key: _text(f"base.{key}", base.get(key)) for key in ("revision", "fingerprint", "quantization")}
            base_id = _text("base.id", base.get("id"))
            return cls(
                base=BaseRef(base_id, **about) if base_id else None,
                base_path=_text("base.path", base.get("path")),
                metrics={key: _number(f"metrics.{key}", value) for key, value in metrics.items()},
                parent=_text("parent.digest", parent.get("digest")),
            )
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise InvalidAdapter(f"{RECEIPT}: {error}") from error


def _text(key: str, value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"{key} is {value!r}, expected a string")


def _number(key: str, value: object) -> float:
    if not is_number(value):
        raise ValueError(f"{key} is {value!r}, expected a finite number")
    return float(value)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a JSON value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
