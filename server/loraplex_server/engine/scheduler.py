"""Who runs in the next step: admission, preemption, turns, and how long a prompt chunk is. No torch.

The next row goes to the adapter that has been served least. Where the model can run many adapters in one step, all that
run take part; where it cannot, adapters take turns, the one that has waited longest first.
"""

from collections import Counter, deque
from collections.abc import Callable
from itertools import count

from loraplex_server.adapters.residency import Place
from loraplex_server.engine.batch import Batch, Row
from loraplex_server.engine.errors import Overloaded
from loraplex_server.engine.fairness import Service
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
        self.running: list[Request] = []  # in the order of admission
        self.service = Service()
        self._arrivals = count()
        self._turns: dict[str | None, int] = {}  # the step at which an adapter last ran
        self._step = 0

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            Overloaded: ``max_waiting`` requests wait already.
        """
        if len(self.waiting) >= self.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests are waiting already, which is the limit; try again later")
        self.service.arrived(request.adapter, {r.adapter for r in (*self.waiting, *self.running)})
        request.order = next(self._arrivals)
        self.waiting.append(request)

    def schedule(
        self,
        place: Callable[[Request], Place],
        pin: Callable[[Request], None],
        release: Callable[[Request], None],
    ) -> Batch | None:
        """Find room for what runs, admit what fits, and choose the rows of one step.

        ``place`` says where a request's adapter is. ``pin`` is called as a request is admitted, before the next one is
        looked at; ``release`` as it is preempted: it waits again, and will be computed from its first token.
        """
        for request in sorted(self.running, key=lambda r: r.order):
            self._grow(request, release)
        self._admit(place, pin)
        if not self.running:
            return None
        budget, rows = self.step_tokens, []
        # Prompts take what the others leave, those of the adapter that has had least first.
        for request in sorted(self._whose_turn(), key=lambda r: (r.pending_tokens > 1, self.service.of(r.adapter))):
            if budget > 0:
                rows.append(Row.of(request, min(request.pending_tokens, budget)))
                budget -= rows[-1].tokens
        for row in rows:
            if row.samples:
                self.service.output(row.request)
        return Batch.of(rows)

    def remove(self, request: Request) -> bool:
        """Forget a request that ended, wherever it is, and free its pages; says whether it was running."""
        self.pages.free(request)
        if request in self.waiting:
            self.waiting.remove(request)
        ran = request in self.running
        if ran:
            self._stop(request)
        if not self.waiting and not self.running:
            self.service.reset()
        return ran

    def _whose_turn(self) -> list[Request]:
        if self.mixed:
            return self.running
        self._step += 1
        adapter = min({r.adapter for r in self.running}, key=lambda a: self._turns.get(a, 0))
        self._turns[adapter] = self._step
        return [request for request in self.running if request.adapter == adapter]

    def _grow(self, request: Request, release: Callable[[Request], None]) -> None:
        """Give a running request the page it needs, if need be another's, or let it wait itself.

        The oldest is never the victim: so it ends, and then the next oldest, and nobody is preempted for ever.
        """
        while request in self.running and not self.pages.grow(request):
            oldest = min(self.running, key=lambda r: r.order)
            others = (r for r in self.running if r is not oldest)
            victim = max(others, key=lambda r: (self.service.of(r.adapter), r.order))
            self._stop(victim)
            self.pages.free(victim)
            victim.computed_tokens = 0
            victim.preemptions += 1
            self.waiting.appendleft(victim)
            release(victim)

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        if not any(r.adapter == request.adapter for r in self.running):
            self._turns.pop(request.adapter, None)

    def _admit(self, place: Callable[[Request], Place], pin: Callable[[Request], None]) -> None:
        """Fill the free rows, the adapter served least first; what it lacks is not given to those behind it.

        An adapter that lacks a device slot makes another hold still, the one whose last admission is longest ago: it
        gets no more rows until its last one ended and the slot is free. Who got its slot just now may fill rows that
        nobody else can use: with more adapters than slots they work in turns, each with many rows.
        """
        last_row = {r.adapter: at for at, r in enumerate(self.running) if r.adapter is not None}
        slots = sorted(last_row, key=last_row.__getitem__)
        passed: set[str | None] = set()
        while len(self.running) < self.max_rows and (request := self._next(passed)):
            match place(request):
                case _ if request.finished:  # its adapter failed, and so did it
                    continue
                case Place.READY:
                    if not self.pages.admit(request, spare=len(self.running)):  # a page for each to grow
                        return
                    self.waiting.remove(request)
                    pin(request)
                    self.running.append(request)
                    if not request.preemptions:
                        self.service.prompt(request)
                case Place.LOADING:
                    passed.add(request.adapter)
                case Place.NO_SLOT:
                    passed.add(request.adapter)
                    if slots:
                        passed.add(slots.pop(0))
        if len(self.running) >= self.max_rows and (request := self._next(passed)):
            place(request)  # who gets the next row: its adapter comes while it waits

    def _next(self, passed: set[str | None]) -> Request | None:
        """The first request of the adapter that has been served least; of equals, of the one with fewest rows."""
        first: dict[str | None, Request] = {}
        for request in self.waiting:
            if request.adapter not in passed:
                first.setdefault(request.adapter, request)
        rows = Counter(request.adapter for request in self.running)
        return min(first.values(), key=lambda r: (self.service.of(r.adapter), rows[r.adapter]), default=None)
