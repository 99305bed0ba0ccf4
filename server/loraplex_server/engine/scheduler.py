"""Who runs in the next step: admission, preemption, turns, and how long a prompt chunk is. No torch.

The next row goes to the adapter that has been served least. Where the model can run many adapters in one step, all that
run take part; where it cannot, adapters take turns, the one that has waited longest first. Where there are rows for all
but not device slots, adapters are paused: their requests wait, with their pages kept, and others use the slot.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from loraplex_server.adapters.residency import Place
from loraplex_server.engine.batch import Batch, Row
from loraplex_server.engine.errors import Overloaded
from loraplex_server.engine.fairness import Service
from loraplex_server.engine.kv_cache import KVPages
from loraplex_server.engine.request import Request

SLICE = 64.0  # service after which an adapter leaves its slot to one that has had less: 32 tokens of a lone request


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
        self.waiting: deque[Request] = deque()  # the paused ones among them, in front
        self.running: list[Request] = []  # in the order of admission
        self.service = Service()
        self._arrivals = count()
        self._turns: dict[str | None, int] = {}  # the step at which an adapter last ran
        self._began: dict[str | None, float] = {}  # the service an adapter had had when it got its slot
        self._step = 0

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            Overloaded: ``max_waiting`` requests wait already.
        """
        waiting = len(self.waiting) - len(list(self._paused()))
        if waiting >= self.max_waiting:
            raise Overloaded(f"{waiting} requests are waiting already, which is the limit; try again later")
        self.service.arrived(request.adapter, {r.adapter for r in (*self.waiting, *self.running)})
        request.order = next(self._arrivals)
        self.waiting.append(request)

    def add_first(self, requests: Sequence[Request]) -> None:
        """Queue requests of the engine's own before all others, beyond the limit."""
        for request in reversed(requests):
            self.service.arrived(request.adapter, {r.adapter for r in (*self.waiting, *self.running)})
            request.order = next(self._arrivals)
            self.waiting.appendleft(request)

    def schedule(
        self,
        place: Callable[[Request], Place],
        pin: Callable[[Request], None],
        release: Callable[[Request], None],
        may_leave: Callable[[str], bool],
    ) -> Batch | None:
        """Find room for what runs, admit what fits, and choose the rows of one step.

        ``place`` says where a request's adapter is. ``pin`` is called as a request begins to run, before the next one
        is looked at; ``release`` as it waits again: paused, or preempted and to be computed from its first token.
        ``may_leave`` says whether an adapter leaves its slot when none of its requests runs.
        """
        for request in sorted(self.running, key=lambda r: r.order):
            self._grow(request, release)
        self._admit(place, pin, release, may_leave)
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

    def remove(self, request: Request) -> None:
        """Forget a request that ended, wherever it is, and free its pages."""
        self.pages.free(request)
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self._stop(request)
        if not self.waiting and not self.running:
            self.service.reset()

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
            holders = [*self.running, *self._paused()]
            oldest = min(holders, key=lambda r: r.order)
            others = (r for r in holders if r is not oldest)
            victim = max(others, key=lambda r: (self.service.of(r.adapter), r.order))
            self.pages.free(victim)
            victim.computed_tokens = 0
            victim.preemptions += 1
            self._wait_again(victim, release)

    def _wait_again(self, request: Request, release: Callable[[Request], None]) -> None:
        if request in self.running:
            self._stop(request)
            self.waiting.appendleft(request)
        release(request)

    def _stop(self, request: Request) -> None:
        self.running.remove(request)
        if not any(r.adapter == request.adapter for r in self.running):
            self._turns.pop(request.adapter, None)
            self._began.pop(request.adapter, None)

    def _paused(self) -> Iterator[Request]:
        """Those that wait with their pages kept: they have a row, and lack the slot."""
        return (request for request in self.waiting if self.pages.holds(request))

    def _admit(
        self,
        place: Callable[[Request], Place],
        pin: Callable[[Request], None],
        release: Callable[[Request], None],
        may_leave: Callable[[str], bool],
    ) -> None:
        """Fill the free rows, the adapter served least first; what it lacks is not given to those behind it.

        Where not all have a row, an adapter that lacks a device slot makes another hold still, the one whose last
        admission is longest ago: it gets no more rows until its last one ended and the slot is free. Who got its slot
        just now may fill rows that nobody else can use: they work in turns, each with many rows.
        """
        last_row = {r.adapter: at for at, r in enumerate(self.running) if r.adapter is not None}
        slots = sorted(last_row, key=last_row.__getitem__)
        rows_for_all = len(self.running) + len(self.waiting) <= self.max_rows
        free_rows = self.max_rows - len(self.running) - len(list(self._paused()))
        passed: set[str | None] = set()
        while request := self._next(passed, paused_only=free_rows <= 0):
            found, held = place(request), self.pages.holds(request)
            adapter = self._to_pause(request, may_leave) if found is Place.NO_SLOT and rows_for_all else None
            # Before the slot, a page to grow spared for each: who has a slot and no pages would wait for who is paused.
            if (found is Place.READY or adapter) and not held:
                if not self.pages.admit(request, spare=self.max_rows - free_rows):
                    free_rows = 0
                    continue
                free_rows -= 1
                if not request.preemptions:
                    self.service.prompt(request)
            if adapter:
                for victim in [r for r in self.running[::-1] if r.adapter == adapter]:
                    self._wait_again(victim, release)
                passed.add(adapter)
                found = place(request)  # at once, before another takes the slot
            if request.finished:  # its adapter failed, and so did it
                continue
            if found is Place.READY:
                self.waiting.remove(request)
                pin(request)
                self.running.append(request)
                self._began.setdefault(request.adapter, self.service.of(request.adapter))
                continue
            passed.add(request.adapter)
            if found is Place.NO_SLOT and slots and not rows_for_all:
                passed.add(slots.pop(0))
        if free_rows <= 0 and (request := self._next(passed)):
            place(request)  # who gets the next row: its adapter comes while it waits

    def _to_pause(self, request: Request, may_leave: Callable[[str], bool]) -> str | None:
        """The adapter that leaves its slot to a request's, of those that may the one served most.

        First tokens come before next ones: to who has none yet, any adapter whose requests have theirs leaves the slot.
        Else one that has had a slice, and more than who asks.
        """
        rows: dict[str, list[Request]] = {}
        for running in self.running:
            if running.adapter is not None and may_leave(running.adapter):
                rows.setdefault(running.adapter, []).append(running)

        def leaves(adapter: str) -> bool:
            served = self.service.of(adapter)
            had = served - self._began[adapter]
            if had > 0 and not request.output_ids and all(r.output_ids for r in rows[adapter]):
                return True
            return had >= SLICE and served > self.service.of(request.adapter)

        return max(filter(leaves, rows), key=self.service.of, default=None)

    def _next(self, passed: set[str | None], paused_only: bool = False) -> Request | None:
        """The first request of the adapter that has been served least; of equals, of the one with fewest rows.

        The paused come first: their pages may be what the others lack.
        """
        first: dict[str | None, Request] = {}
        for request in self._paused() if paused_only else self.waiting:
            if request.adapter not in passed:
                first.setdefault(request.adapter, request)
        rows = Counter(request.adapter for request in self.running)

        def least(request: Request) -> tuple[bool, float, int]:
            return not self.pages.holds(request), self.service.of(request.adapter), rows[request.adapter]

        return min(first.values(), key=least, default=None)
