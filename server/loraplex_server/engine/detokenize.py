"""Turns token ids into text as they come: whole UTF-8 characters only, and nothing of a stop string. Knows no torch."""

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
    text: str = ""  # everything handed out so far
    stopped: bool = False
    _ids: list[int] = field(default_factory=list)
    _window: int = 0  # where decoding starts: text before it is settled
    _read: int = 0  # ids before this one are in _held or handed out
    _held: str = ""  # decoded, but it may be the start of a stop string

    def __post_init__(self) -> None:
        self._ids = list(self.prompt_ids[-_CONTEXT_TOKENS:])
        self._read = len(self._ids)

    def add(self, token_ids: Sequence[int], final: bool = False) -> str:
        """Take more tokens and return the new certain text; ``final`` says that none will follow."""
        if self.stopped:
            return ""
        self._ids.extend(token_ids)
        settled = self._decode(self._ids[self._window : self._read])
        decoded = self._decode(self._ids[self._window :])
        # A token without text stays in the window: alone it would be no context for the space of the next one.
        if final or (len(decoded) > len(settled) and not decoded.endswith(_BROKEN)):
            self._held += decoded[len(settled) :]
            self._window, self._read = self._read, len(self._ids)
        return self._release(final)

    def _release(self, final: bool) -> str:
        found = min((at for s in self.stop if (at := self._held.find(s)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            ready, self._held = self._held[:found], ""
        else:
            keep = 0 if final else max((_overlap(self._held, s) for s in self.stop), default=0)
            ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += ready
        return ready

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-n:])), 0)
