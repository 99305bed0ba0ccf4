"""What the registry reads of a trainer's receipt.json: base, metrics, parent, goldens. All of it is optional."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from .errors import InvalidAdapter
from .goldens import Golden, read_goldens
from .manifest import BaseRef
from .version import Dataset, Lineage, Template

FORMAT = "loraplex.receipt/1"
RECEIPT = "receipt.json"
RECEIPT_BYTES = 16 << 20
CHAT_CHARACTERS = 1 << 16  # the longest in use are a fifth of it; every answer about a version carries its own


@dataclass(frozen=True)
class Receipt:
    """`base_path` is where the base lay on the trainer's machine; `parent` is the digest that training continued.

    `lineage` is what it was trained on, by which run, and how it wants to be asked. `goldens` are for who loads it.
    """

    base: BaseRef | None = None
    base_path: str | None = None
    metrics: dict[str, float] | None = None
    parent: str | None = None
    lineage: Lineage = field(default_factory=Lineage)
    goldens: tuple[Golden, ...] = ()

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
                lineage=_lineage(body),
                goldens=read_goldens(body.get("goldens")),
            )
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise InvalidAdapter(f"{RECEIPT}: {error}") from error


def _lineage(body: dict[str, Any]) -> Lineage:
    data, template = body.get("data") or {}, body.get("template") or {}
    datasets = [
        Dataset(
            split=split,
            path=_text(f"data.{split}.path", about.get("path")) or "",
            sha256=_text(f"data.{split}.sha256", about.get("sha256")),
            examples=_count(f"data.{split}.examples", about.get("examples")),
        )
        for split, about in sorted(data.items())
    ]
    stop = template.get("stop") or []
    if not isinstance(stop, list):
        raise ValueError(f"template.stop is {stop!r}, expected a list of strings")
    return Lineage(
        datasets=tuple(datasets),
        run=_text("name", body.get("name")),
        seed=_count("seed", body.get("seed")),
        steps=_count("steps", body.get("steps")),
        template=Template(
            prompt=_text("template.prompt", template.get("prompt")),
            completion=_text("template.completion", template.get("completion")),
            stop=tuple(_text("template.stop", one) or "" for one in stop),
            form=_text("template.form", template.get("form")),
            chat=_chat(template.get("chat")),
        ),
    )


def _chat(value: object) -> str | None:
    chat = _text("template.chat", value)
    if chat is not None and len(chat) > CHAT_CHARACTERS:
        raise ValueError(f"template.chat has {len(chat):,} characters, expected at most {CHAT_CHARACTERS:,}")
    return chat


def _count(key: str, value: object) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63):
        return value
    raise ValueError(f"{key} is {value!r}, expected a whole number")


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
