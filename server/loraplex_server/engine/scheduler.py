"""Who runs in the next step: admission, the turn of each adapter, and how long a prompt chunk is. No torch.

Where the model can run many adapters in one step, all that run take part. Where it cannot, adapters take turns, the one
that has waited longest first, so that a busy adapter cannot starve another.
"""

from collections import deque
from collections.abc import Callable

from loraplex_server.adapters.residency import Place
from loraplex_server.engine.batch import Batch, Row
from loraplex_server.engine.errors import Overloaded
from loraplex_server.engine.kv_cache import KVPages
from loraplex_server.engine.request import Request


class Scheduler:
    """Holds the waiting and the running requests.

    ``max_rows`` bounds the running requests, ``step_tokens`` the tokens of one step (a longer prompt is cut into
    chunks), ``max_waiting`` the queue; ``mixed`` says that one step may hold rows of many adapters.
    """

    def __init__(self, pages: KVPages, max_rows: int, step_tokens: int, max_waiting: int, mixed: bool) -> None:
        self.pages = pages
        self.max_rows = max_rows
        self.step_tokens = step_tokens
        self.max_waiting = max_waiting
        self.mixed = mixed
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._turns: dict[str | None, int] = {}  # the step at which an adapter last ran
        self._step = 0

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            Overloaded: ``max_waiting`` requests wait already.
        """
        if len(self.waiting) >= self.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting already, which is the limit; try again later")
        self.waiting.append(request)

    def schedule(self, place: Callable[[Request], Place], pin: Callable[[Request], None]) -> Batch | None:
        """Admit what fits and choose the rows of one step.

        ``place`` says where a request's adapter is; a request whose adapter is still loading is passed by and keeps its
        turn. ``pin`` is called as a request is admitted, before the next one is looked at.
        """
        self._admit(place, pin)
        if not self.running:
            return None
        budget, rows = self.step_tokens, []
        for request in sorted(self._whose_turn(), key=lambda r: r.pending_tokens > 1):  # prompts take what is left
            if budget > 0:
                rows.append(Row.of(request, min(request.pending_tokens, budget)))
                budget -= rows[-1].tokens
        return Batch.of(rows)

    def remove(self, request: Request) -> bool:
        """Forget a request that ended, wherever it is, and free its pages; says whether it was running."""
        self.pages.free(request)
        if request in self.waiting:
            self.waiting.remove(request)
        if request not in self.running:
            return False
        self.running.remove(request)
        if not any(r.adapter == request.adapter for r in self.running):
            self._turns.pop(request.adapter, None)
        return True

    def _whose_turn(self) -> list[Request]:
        if self.mixed:
            return self.running
        self._step += 1
        adapter = min({r.adapter for r in self.running}, key=lambda a: self._turns.get(a, 0))
        self._turns[adapter] = self._step
        return [request for request in self.running if request.adapter == adapter]

    def _admit(self, place: Callable[[Request], Place], pin: Callable[[Request], None]) -> None:
        for request in list(self.waiting):
            if len(self.running) >= self.max_rows:
                return
            match place(request):
                case Place.READY if self.pages.can_allocate(request):
                    self.waiting.remove(request)
                    self.pages.allocate(request)
                    pin(request)
                    self.running.append(request)
                case Place.LOADING:
                    continue
                case _:  # first come, first served: nothing behind it may take the pages or the slot it waits for
                    return
