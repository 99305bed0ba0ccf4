"""Reading one content for many at once: a piece that several want is read once, and kept while it may be wanted.

Owns the pieces in memory, and how many there are. Knows no files and no digests: who asks says how a piece is read, and
proves what it gets. Nothing is kept beyond the last reader, so that whoever comes later sees what is there then.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator
from concurrent.futures import Future
from itertools import count

PIECE_BYTES = 1 << 20
KEPT_PIECES = 64  # of all contents together, least recently wanted out first


class SharedReads:
    """Pieces by content and number, for threads. A reader that falls more than KEPT_PIECES behind reads for itself."""

    def __init__(self, kept: int = KEPT_PIECES) -> None:
        self._kept = kept
        self._pieces: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._readers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def pieces(self, content: str, read: Callable[[int], bytes], first: int = 0) -> Generator[bytes]:
        """The pieces of a content, from a number on, until one is empty. ``read`` gives a piece by its number.

        Raises what ``read`` raises, in everybody who waited for that piece; the next who wants it tries again.
        """
        with self._lock:
            self._readers[content] += 1
        try:
            for number in count(first):
                piece = self._piece(content, number, read)
                if not piece:
                    return
                yield piece
        finally:
            self._leave(content)

    def _piece(self, content: str, number: int, read: Callable[[int], bytes]) -> bytes:
        key, mine = (content, number), None
        with self._lock:
            wanted = self._pieces.get(key)
            if wanted is None:
                wanted = mine = self._pieces[key] = Future()
                if len(self._pieces) > self._kept:
                    self._pieces.popitem(last=False)  # those who have it, or wait for it, keep it
            else:
                self._pieces.move_to_end(key)
        if mine:
            try:
                mine.set_result(read(number))
            except BaseException as error:
                with self._lock:
                    self._pieces.pop(key, None)
                mine.set_exception(error)
        return wanted.result()

    def _leave(self, content: str) -> None:
        with self._lock:
            self._readers[content] -= 1
            if not self._readers[content]:
                del self._readers[content]
                for key in [key for key in self._pieces if key[0] == content]:
                    del self._pieces[key]
