"""An adapter's card: the README.md of its folder, for people. Owns where it is and what its first words are."""

import re
from pathlib import Path

from .manifest import FileEntry, Manifest

CARD = "README.md"
CARD_BYTES = 1 << 20  # of a card that is shown; a larger file is kept like any other
DESCRIPTION_CHARACTERS = 300
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # YAML, as the Hub's cards begin with


def card_of(manifest: Manifest) -> FileEntry | None:
    """The file, if the version has one that can be shown."""
    return next((entry for entry in manifest.files if entry.path == CARD and entry.bytes <= CARD_BYTES), None)


def body_of(card: str) -> str:
    """The card without its front matter."""
    return _FRONT_MATTER.sub("", card.replace("\r\n", "\n"), count=1).strip()


def first_words(folder: Path) -> str:
    """The first paragraph of a folder's card that is neither heading, list, table, picture nor code; or nothing."""
    file = folder / CARD
    if not file.is_file() or file.stat().st_size > CARD_BYTES:
        return ""
    text = re.sub(r"^```.*?^```", "", body_of(file.read_text(errors="replace")), flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line for line in paragraph.splitlines() if not line.lstrip().startswith("#")]
        words = " ".join(" ".join(lines).split())
        if words and words[0] not in "|-*<![>`":
            more = len(words) > DESCRIPTION_CHARACTERS
            return words[: DESCRIPTION_CHARACTERS - 1] + "…" if more else words
    return ""
