"""Where each adapter is (nowhere, loading, host, device), who may push out whom, and what failed. No torch, no HTTP.

Loads run on background threads, one per adapter however many requests wait for it; everything else runs on the engine's
thread. An adapter in use by a running request is pinned and never evicted.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from copy import copy
from enum import Enum, auto
from math import inf
from typing import TYPE_CHECKING, Protocol

from loraplex_server.engine.errors import AdapterRefused

if TYPE_CHECKING:  # its module imports torch, which deciding needs not
    from loraplex_server.adapters.host import HostAdapter

RETRY_SECONDS = 5.0  # a failed load is remembered this long, so that a bad adapter is not read again by every request


class Place(Enum):
    """What a request that wants an adapter finds."""

    READY = auto()  # on the device
    LOADING = auto()  # on its way to host memory or the device, or behind one that has arrived and is still to be used
    NO_SLOT = auto()  # in host memory, but every device slot is kept, or pinned by running requests


class Device(Protocol):
    """The hands that put adapters on the device, one after another."""

    def begin(self, adapter: HostAdapter) -> None: ...
    def advance(self, seconds: float) -> bool: ...
    def remove(self, key: str) -> None: ...


class Observer(Protocol):
    """Who wants to know (the metrics)."""

    def cache_lookup(self, tier: str, hit: bool) -> None: ...
    def adapter_load(self, transition: str, seconds: float) -> None: ...
    def adapter_load_failed(self, reason: str) -> None: ...
    def golden_check(self, result: str) -> None: ...
    def evicted(self, tier: str) -> None: ...


class Unobserved:
    """Nobody wants to know."""

    def cache_lookup(self, tier: str, hit: bool) -> None: ...
    def adapter_load(self, transition: str, seconds: float) -> None: ...
    def adapter_load_failed(self, reason: str) -> None: ...
    def golden_check(self, result: str) -> None: ...
    def evicted(self, tier: str) -> None: ...


class Residency:
    """``device_slots`` adapters on the device, at least one more in host memory; the least recently used goes first.

    ``wanted`` names what the waiting requests want: it is not evicted from host memory before they had it, and no more
    is loaded than fits beside it. Loads already under way may take host memory over its bounds for a moment.
    """

    def __init__(
        self,
        device: Device,
        load: Callable[[str], HostAdapter],
        executor: Executor,
        device_slots: int,
        host_slots: int,
        observer: Observer,
        wake: Callable[[], None],
        wanted: Callable[[], Iterable[str]] = tuple,
        max_host_bytes: float = inf,
    ) -> None:
        self.device_slots = device_slots
        self.host_slots = max(host_slots, device_slots + 1)  # one more, or a new one could never arrive
        self.max_host_bytes = max_host_bytes
        self._device, self._load, self._executor, self._observer, self._wake = device, load, executor, observer, wake
        self._wanted = wanted
        self._queued: dict[str, None] = {}  # to be loaded when host memory has room, in this order
        self._loading: dict[str, Future[HostAdapter]] = {}
        self._failed: dict[str, tuple[float, Exception]] = {}
        self._host: OrderedDict[str, HostAdapter] = OrderedDict()  # least recently used first
        self._on_device: OrderedDict[str, None] = OrderedDict()  # a subset of _host
        self._installing: tuple[str, float] | None = None  # from host memory to the device, and when it began
        self._unused: set[str] = set()  # on the device, and no request has run with them since they came
        self._pins: Counter[str] = Counter()
        self._kept: set[str] = set()
        self._leaving: set[str] = set()  # go with the last request that runs with them

    @property
    def on_device(self) -> tuple[str, ...]:
        """Keys on the device, least recently used first."""
        return tuple(self._on_device)

    @property
    def in_host(self) -> tuple[str, ...]:
        """Keys in host memory; those on the device are among them."""
        return tuple(self._host)

    @property
    def loading(self) -> tuple[str, ...]:
        """Keys on their way to host memory, or waiting for room there."""
        return (*self._loading, *self._queued)

    @property
    def kept(self) -> tuple[str, ...]:
        """Keys that are not evicted whatever happens."""
        return tuple(self._kept)

    @property
    def host_bytes(self) -> int:
        """What the adapters in host memory take."""
        return sum(adapter.host_bytes for adapter in self._host.values())

    def held(self, key: str) -> HostAdapter | None:
        """An adapter that is in host memory, else None."""
        return self._host.get(key)

    def put(self, adapter: HostAdapter) -> None:
        """Hand over an adapter that was read elsewhere; one of its key that is here already makes way for it.

        Raises:
            AdapterRefused: the one that is here is in use, or this one is larger than host memory.
        """
        if self._pins[adapter.key]:
            raise AdapterRefused(f"adapter {adapter.key!r} is in use by running requests; try again when they ended")
        self._refuse_too_large(adapter)
        self._drop(adapter.key)
        self._host[adapter.key] = adapter
        self._trim_host()

    def asked(self, key: str) -> None:
        """A request has just arrived that wants this adapter: count where it was found, and begin to load it."""
        self._observer.cache_lookup("device", key in self._on_device)
        if key not in self._on_device:
            self._observer.cache_lookup("host", key in self._host)
        self.warm(key)

    def warm(self, key: str) -> None:
        """Bring an adapter to host memory as soon as there is room, unless it is here or failed a moment ago."""
        failed = self._failed.get(key)
        if failed and time.monotonic() - failed[0] > RETRY_SECONDS:
            del self._failed[key]
        if not any(key in known for known in (self._host, self._loading, self._queued, self._failed)):
            self._queued[key] = None
            self._start_loads()

    def stay(self, key: str) -> None:
        """As warm; and an unload that waits for the last request is called off: this was asked for later."""
        self._leaving.discard(key)
        self.warm(key)

    def keep(self, key: str) -> None:
        """Never evict this adapter from where it is or comes to be, and begin to load it if it is nowhere.

        Raises:
            AdapterRefused: all device slots but one are kept already; the last is for all other adapters.
        """
        if key not in self._kept and len(self._kept) >= self.device_slots - 1:
            raise AdapterRefused(
                f"{len(self._kept)} adapters are kept already, and with {self.device_slots} device slots "
                f"at most {self.device_slots - 1} can be; release one first"
            )
        self._kept.add(key)
        self.stay(key)

    def release(self, key: str) -> None:
        """Let an adapter be evicted again; nothing happens if it was not kept."""
        self._kept.discard(key)

    def unload(self, key: str) -> None:
        """Free the host and device memory of an adapter now, or with the last request that runs with it.

        Who asks for it from now on has it loaded anew.
        """
        self._kept.discard(key)
        if self._pins[key]:
            self._leaving.add(key)
        else:
            self._drop(key)

    def refuse(self, key: str, error: Exception, for_good: bool) -> None:
        """Drop an adapter, and give this error to who asks for it: for RETRY_SECONDS, or until it is unloaded."""
        assert not self._pins[key]
        self._drop(key)
        self._remember_failure(key, error, inf if for_good else None)

    def collect(self) -> None:
        """Take finished loads over into host memory, or remember how they failed; start what has room now."""
        for key in [key for key, load in self._loading.items() if load.done()]:
            load = self._loading.pop(key)
            if error := load.exception():
                self._remember_failure(key, error if isinstance(error, Exception) else RuntimeError(repr(error)))
                continue
            try:
                self.put(load.result())
            except AdapterRefused as refusal:
                self._remember_failure(key, refusal)
        self._start_loads()

    def want(self, key: str) -> Place:
        """Where an adapter is, after beginning what brings it nearer to the device.

        One is put on the device at a time: the first that was wanted while nothing else was under way.

        Raises:
            Exception: what its load raised, for RETRY_SECONDS after it failed; for each who asks, an exception anew.
        """
        self.collect()
        if key in self._leaving:  # none may run with it any more, or it would never go
            return Place.LOADING
        if key in self._on_device:
            self._on_device.move_to_end(key)
            self._host.move_to_end(key)
            return Place.READY
        if key in self._failed:
            raise _again(self._failed[key][1])
        if key not in self._host:
            self.warm(key)
            return Place.LOADING
        if self._installing:
            return Place.LOADING
        if (room := self._make_room()) is not Place.READY:
            return room
        self._device.begin(self._host[key])
        self._installing = key, time.perf_counter()
        return Place.LOADING

    def install(self, seconds: float) -> None:
        """Go on for about so long with what ``want`` began to put on the device. Who waits for it is told by wake."""
        self.collect()
        if not self._installing:
            return
        key, started = self._installing
        try:
            if not self._device.advance(seconds):
                return
        except AdapterRefused as error:
            del self._host[key]
            self._remember_failure(key, error)
        else:
            self._on_device[key] = None
            self._unused.add(key)
            self._observer.adapter_load("host_to_device", time.perf_counter() - started)
        self._installing = None
        self._wake()

    def pin(self, key: str) -> None:
        """Keep an adapter on the device for one more running request."""
        assert key in self._on_device
        self._pins[key] += 1
        self._unused.discard(key)

    def may_leave(self, key: str) -> bool:
        """Whether its slot is free for another, and it comes back by itself, when none of its requests runs."""
        return key not in self._kept and key not in self._leaving

    def unpin(self, key: str) -> None:
        """One running request less."""
        assert self._pins[key] > 0
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            if key in self._leaving:
                self._drop(key)

    def _timed_load(self, key: str) -> HostAdapter:
        started = time.perf_counter()
        adapter = self._load(key)
        self._observer.adapter_load("disk_to_host", time.perf_counter() - started)
        return adapter

    def _remember_failure(self, key: str, error: Exception, at: float | None = None) -> None:
        self._failed[key] = (time.monotonic() if at is None else at, error)
        self._observer.adapter_load_failed(type(error).__name__)

    def _refuse_too_large(self, adapter: HostAdapter) -> None:
        if adapter.host_bytes > self.max_host_bytes:
            raise AdapterRefused(
                f"it takes {adapter.host_bytes:,} bytes of host memory, at most {self.max_host_bytes:,} serve all"
            )

    def _start_loads(self) -> None:
        while self._queued and self._room_for_one_more():
            key = next(iter(self._queued))
            del self._queued[key]
            self._loading[key] = self._executor.submit(self._timed_load, key)
            self._loading[key].add_done_callback(lambda _: self._wake())

    def _room_for_one_more(self) -> bool:
        """Whether host memory will have room for one more when all under way have come."""
        if len(self._host) + len(self._loading) < self.host_slots and self.host_bytes < self.max_host_bytes:
            return True
        stay = self._not_to_go() & self._host.keys()
        # Waiting does not make what is kept go: its bytes must not hold up the others for ever.
        stay_bytes = sum(self._host[key].host_bytes for key in stay - self._kept)
        return len(stay) + len(self._loading) < self.host_slots and stay_bytes < self.max_host_bytes

    def _not_to_go(self) -> set[str]:
        """Keys that host memory must not lose: in use, kept, on their way to the device, or waited for."""
        coming = {self._installing[0]} if self._installing else set()
        return {*self._pins, *self._kept, *coming, *self._wanted()}

    def _make_room(self) -> Place:
        """Evict from the device if no slot is free: first what nobody waits for, never what is still to be used.

        Such a one is ready for a request further back in the queue, which must be let past to use it.
        """
        if len(self._on_device) < self.device_slots:
            return Place.READY
        idle = [key for key in self._on_device if key not in self._pins and key not in self._kept]
        if not idle:
            return Place.NO_SLOT
        wanted = set(self._wanted())
        victim = next((key for key in idle if key not in wanted), None)
        victim = victim or next((key for key in idle if key not in self._unused), None)
        if victim is None:
            return Place.LOADING
        self._leave_device(victim)
        self._observer.evicted("device")
        return Place.READY

    def _trim_host(self) -> None:
        """Evict from host memory until it is within its bounds; what is on the device goes last, and from there too."""
        if len(self._host) <= self.host_slots and self.host_bytes <= self.max_host_bytes:
            return
        newest, stay = next(reversed(self._host)), self._not_to_go()
        idle = [key for key in self._host if key not in stay and key != newest]
        for key in sorted(idle, key=lambda key: key in self._on_device):  # else least recently used first
            if len(self._host) <= self.host_slots and self.host_bytes <= self.max_host_bytes:
                return
            self._host[key].evicted()
            self._drop(key)
            self._observer.evicted("host")

    def _leave_device(self, key: str) -> None:
        del self._on_device[key]
        self._unused.discard(key)
        self._device.remove(key)

    def _drop(self, key: str) -> None:
        """Forget an adapter wherever it is; nothing happens if it is nowhere."""
        self._leaving.discard(key)
        self._queued.pop(key, None)
        self._failed.pop(key, None)
        if load := self._loading.pop(key, None):
            load.cancel()  # one that runs already ends unseen
        if self._installing and self._installing[0] == key:
            self._installing = None
            self._device.remove(key)
        if key in self._on_device:
            self._leave_device(key)
        self._host.pop(key, None)


def _again(error: Exception) -> Exception:
    """The error anew, caused by the first: each request raises its own, and no trace grows with who asked."""
    try:
        anew = copy(error)
    except TypeError:  # its class is not made from its args alone
        anew = type(error).__new__(type(error), *error.args)
    anew.args = error.args
    vars(anew).update(vars(error))
    anew.__cause__ = error
    return anew
