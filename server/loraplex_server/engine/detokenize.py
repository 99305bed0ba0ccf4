"""Turns token ids into text: as they come, whole UTF-8 characters only and nothing of a stop string; or one by one.

Knows no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

_CONTEXT_TOKENS = 6  # prompt tokens decoded before the output, so that a leading space is not lost
_BROKEN = "\ufffd"  # what an incomplete character decodes to


@dataclass
class Detokenizer:
    """The text of one growing sequence.

    ``add`` returns the text that became certain; text that may be the start of a stop string, or half of a character,
    is held back until it is decided. ``stopped`` is set once a stop string has appeared; it is cut from the text.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt_ids: Sequence[int]
    stop: tuple[str, ...] = ()
    min_tokens: int = 0  # stop strings are looked for in what comes after these
    text: str = ""  # everything handed out so far
    stopped: bool = False
    _ids: list[int] = field(default_factory=list)
    _window: int = 0  # where decoding starts: text before it is settled
    _read: int = 0  # ids before this one are in _held or handed out
    _held: str = ""  # decoded, but it may be the start of a stop string
    _taken: int = 0  # tokens taken

    def __post_init__(self) -> None:
        self._ids = list(self.prompt_ids[-_CONTEXT_TOKENS:])
        self._read = len(self._ids)

    @property
    def settled_characters(self) -> int:
        """Where the text of the next token begins: characters handed out or held back, whole ones only."""
        return len(self.text) + len(self._held)

    def add(self, token_ids: Sequence[int], final: bool = False) -> str:
        """Take more tokens and return the new certain text; ``final`` says that none will follow."""
        if self.stopped:
            return ""
        self._ids.extend(token_ids)
        self._taken += len(token_ids)
        settled = self._decode(self._ids[self._window : self._read])
        decoded = self._decode(self._ids[self._window :])
        # A token without text stays in the window: alone it would be no context for the space of the next one.
        if final or (len(decoded) > len(settled) and not decoded.endswith(_BROKEN)):
            self._held += decoded[len(settled) :]
            self._window, self._read = self._read, len(self._ids)
        return self._release(final)

    def _release(self, final: bool) -> str:
        stops = self.stop if self._taken > self.min_tokens else ()
        found = min((at for s in stops if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            ready, self._held = self._held[:found], ""
        else:
            keep = 0 if final else max((_overlap(self._held, s) for s in stops), default=0)
            ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += ready
        return ready

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TokenTexts:
    """What single tokens are called: their text as it stands within a line, each looked up once.

    A token that is no whole text, such as half a character, goes by its name in the vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]  # or a leading space would be lost
        self._skipped = len(self._decode(self._before))
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """The text of a token."""
        if token_id not in self._known:
            text = self._decode([*self._before, token_id])[self._skipped :]
            if not text or _BROKEN in text:
                text = str(self._tokenizer.convert_ids_to_tokens(token_id) or f"token_id:{token_id}")
            self._known[token_id] = text
        return self._known[token_id]

    def bytes_of(self, token_id: int) -> list[int] | None:
        """The text of a token in UTF-8; None of a token that is no whole text."""
        text = self._decode([*self._before, token_id])[self._skipped :]
        return None if _BROKEN in text else list(text.encode())

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def text_offsets(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[int]:
    """Where the text of each token begins in the text of all."""
    detokenizer, offsets = Detokenizer(tokenizer, ()), []
    for token_id in token_ids:
        offsets.append(detokenizer.settled_characters)
        detokenizer.add((token_id,))
    return offsets


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)
