"""The card: README.md beside an adapter, for people; the registry and the Hub show it.

Tells neither time nor machine: a second run of the same file writes the same bytes.
"""

import html
from pathlib import Path
from typing import Any

from loraplex_trainer.evaluate import Measured, rows

CARD = "README.md"


def write_card(folder: Path, receipt: dict[str, Any], measured: Measured) -> None:
    """`receipt` is what receipt_of gives."""
    (folder / CARD).write_text(render_card(receipt, measured), encoding="utf-8")


def render_card(receipt: dict[str, Any], measured: Measured) -> str:
    config, base, train = receipt["config"], receipt["base"], receipt["data"]["train"]
    parts = [
        _front_matter(base),
        f"# {receipt['name']}\n",
        f"An adapter of `{base['id']}`, trained on {base['quantization']}: {train['examples']:,} examples of "
        f"`{Path(train['path']).name}`, {receipt['steps']:,} steps, seed {receipt['seed']}; the loss went from "
        f"{receipt['losses']['train_first']:.4f} to {receipt['losses']['train_last']:.4f}.\n",
    ]
    scores = list(rows(measured.metrics, receipt["losses"]["heldout"]))
    if scores:
        parts += ["## Scores\n", _table(("", "base", "adapter"), scores)]
    if measured.not_served:
        parts.append(f"Not served, and so scored by peft and transformers: {measured.not_served}\n")
    if measured.samples:
        about = config["evaluation"]
        parts += [
            "## Samples\n",
            f"Base and adapter with the same seeds, temperature {about['sample_temperature']:g}, "
            f"top-p {about['sample_top_p']:g}, at most {about['max_tokens']} tokens.\n",
            _table(
                ("prompt", "base", "adapter"),
                [(_cell(one.prompt), _cell(one.base), _cell(one.adapter)) for one in measured.samples],
            ),
        ]
    return "\n".join(parts)


def _front_matter(base: dict[str, Any]) -> str:
    """What the Hub reads. A base that lies in a folder has no name that others know."""
    known = [] if base["path"] else [f"base_model: {base['id']}"]
    return "\n".join(["---", *known, "library_name: peft", "---", ""])


def _table(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Text as it is, in one cell of a Markdown table: nothing of it is markup."""
    shown = "".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in text)
    escaped = html.escape(shown, quote=False)
    for letter in "\\|`*_[]":
        escaped = escaped.replace(letter, f"&#{ord(letter)};")
    return escaped.replace("\n", "<br>")
