"""Which pages of the KV cache belong to whom, and which tokens they hold. Bookkeeping only: no torch.

A request takes pages as it grows. A full page is known by a hash of its adapter and of every token up to its end, so
that requests that begin alike share it; it stays known after they ended, until its room is wanted.
"""

from array import array
from collections import Counter, OrderedDict
from hashlib import sha256

from loraplex_server.engine.request import Request


class KVPages:
    """A pool of ``pages`` pages of ``page_tokens`` tokens each.

    A page is blank; or used, by one request or by several; or idle: it holds known tokens that nobody uses now. Only
    full pages whose tokens were computed are known, and nobody writes to them again. ``share`` False: none ever is.
    """

    def __init__(self, pages: int, page_tokens: int, share: bool = True) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self.share = share
        self._blank = list(range(pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._users = [0] * pages
        self._held: dict[str, list[int]] = {}  # by request, in the order of its tokens
        self._chains: dict[str, list[bytes]] = {}  # by request: a root, and the keys of its full pages so far
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._epochs: Counter[str | None] = Counter()  # by adapter: how often its pages were forgotten

    @property
    def usage(self) -> float:
        """Share of the pages that requests use, 0 to 1."""
        return 1 - self.free_pages / self.pages

    @property
    def free_pages(self) -> int:
        """Pages that nobody uses, idle ones included."""
        return len(self._blank) + len(self._idle)

    def holds(self, request: Request) -> bool:
        """Whether a request has pages: from its admission to its end, or until it is preempted."""
        return request.id in self._held

    def fits_ever(self, request: Request) -> bool:
        """Whether the request, grown to its longest, would fit an empty cache."""
        return self._needed(request.most_tokens) <= self.pages

    def admit(self, request: Request, spare: int) -> bool:
        """Give a request the pages of its tokens so far, those that are known already shared, and say where it begins.

        Does nothing and says False where fewer than ``spare`` pages would be left. Sets ``computed_tokens``, and at the
        first admission ``looked_up_tokens`` and ``cached_tokens``.
        """
        assert request.id not in self._held
        known = self._known(request)
        missing = self._needed(request.total_tokens) - len(known)
        if missing + spare > self.free_pages - sum(not self._users[page] for page in known):
            return False
        for page in known:
            self._idle.pop(page, None)
            self._users[page] += 1
        self._held[request.id] = known + self._take(missing)
        request.computed_tokens = len(known) * self.page_tokens
        if not request.preemptions and self._looks_up(request):
            request.looked_up_tokens, request.cached_tokens = request.total_tokens, request.computed_tokens
        return True

    def grow(self, request: Request) -> bool:
        """Give a request the pages that its tokens need by now; False, and none given, where too few are free."""
        held = self._held[request.id]
        missing = self._needed(request.total_tokens) - len(held)
        if missing > self.free_pages:
            return False
        held += self._take(missing)
        return True

    def publish(self, request: Request, start: int, stop: int) -> None:
        """The tokens ``start`` up to ``stop`` were computed: others may find the pages that are full by it."""
        first, last = start // self.page_tokens, stop // self.page_tokens
        if not self.share or first == last:
            return
        keys, held = self._keys_of(request, last), self._held[request.id]
        for key, page in zip(keys[first:last], held[first:last], strict=True):
            if key not in self._page_of:  # else two computed the same side by side: one copy is enough
                self._page_of[key], self._key_of[page] = page, key

    def free(self, request: Request) -> None:
        """Give the pages back; nothing happens if it holds none."""
        self._chains.pop(request.id, None)
        for page in reversed(self._held.pop(request.id, [])):  # a page is of no use without those before it
            self._users[page] -= 1
            if not self._users[page]:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def forget_adapter(self, adapter: str) -> None:
        """What is known of an adapter is of other weights from now on: nobody finds it again."""
        self._epochs[adapter] += 1
        self._chains = {id: chain for id, chain in self._chains.items() if id in self._held}  # who waits begins anew

    def slots(self, request: Request, start: int, stop: int) -> list[int]:
        """Where the tokens ``start`` up to ``stop`` of a request lie in the cache."""
        pages, size = self._held[request.id], self.page_tokens
        return [pages[i // size] * size + i % size for i in range(start, stop)]

    def table(self, request: Request) -> list[int]:
        """The pages of a request, in the order of its tokens."""
        return self._held[request.id]

    def _needed(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def _looks_up(self, request: Request) -> bool:
        return self.share and request.params.prompt_logprobs is None  # they need the logits of the whole prompt

    def _known(self, request: Request) -> list[int]:
        """The pages that hold the beginning of a request; its last token is left out, whose logits are needed."""
        pages: list[int] = []
        for key in self._keys_of(request, (request.total_tokens - 1) // self.page_tokens):
            if key not in self._page_of or not self._looks_up(request):
                break
            pages.append(self._page_of[key])
        return pages

    def _keys_of(self, request: Request, pages: int) -> list[bytes]:
        """The keys of its first pages. The chain begins with the adapter's epoch, as it stood at the first call."""
        root = repr((request.adapter, self._epochs[request.adapter])).encode()
        chain, size = self._chains.setdefault(request.id, [root]), self.page_tokens
        if len(chain) <= pages:
            tokens = array("q", request.token_ids[: pages * size])
            for at in range((len(chain) - 1) * size, pages * size, size):
                chain.append(sha256(chain[-1] + tokens[at : at + size].tobytes()).digest())
        return chain[1 : pages + 1]

    def _take(self, pages: int) -> list[int]:
        taken = [self._blank.pop() if self._blank else self._evict() for _ in range(pages)]
        for page in taken:
            self._users[page] = 1
        return taken

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page
