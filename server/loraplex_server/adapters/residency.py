"""Where each adapter is (nowhere, loading, host, device), who may push out whom, and what failed. No torch, no HTTP.

Loads run on background threads, one per adapter however many requests wait for it; everything else runs on the engine's
thread. An adapter in use by a running request is pinned and never evicted.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from loraplex_server.engine.errors import AdapterRefused

if TYPE_CHECKING:  # its module imports torch, which deciding needs not
    from loraplex_server.adapters.host import HostAdapter

RETRY_SECONDS = 5.0  # a failed load is remembered this long, so that a bad adapter is not read again by every request


class Place(Enum):
    """What a request that wants an adapter finds."""

    READY = auto()  # on the device
    LOADING = auto()  # on its way to host memory, or from there to the device
    NO_SLOT = auto()  # in host memory, but every device slot is pinned by running requests


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
    def evicted(self, tier: str) -> None: ...


class Unobserved:
    """Nobody wants to know."""

    def cache_lookup(self, tier: str, hit: bool) -> None: ...
    def adapter_load(self, transition: str, seconds: float) -> None: ...
    def adapter_load_failed(self, reason: str) -> None: ...
    def evicted(self, tier: str) -> None: ...


class Residency:
    """``device_slots`` adapters on the device, at least one more in host memory; the least recently used goes first."""

    def __init__(
        self,
        device: Device,
        load: Callable[[str], HostAdapter],
        executor: Executor,
        device_slots: int,
        host_slots: int,
        observer: Observer,
        wake: Callable[[], None],
    ) -> None:
        self.device_slots = device_slots
        self.host_slots = max(host_slots, device_slots + 1)  # one more, or a new one could never arrive
        self._device, self._load, self._executor, self._observer, self._wake = device, load, executor, observer, wake
        self._loading: dict[str, Future[HostAdapter]] = {}
        self._failed: dict[str, tuple[float, Exception]] = {}
        self._host: OrderedDict[str, HostAdapter] = OrderedDict()  # least recently used first
        self._on_device: OrderedDict[str, None] = OrderedDict()  # a subset of _host
        self._installing: tuple[str, float] | None = None  # from host memory to the device, and when it began
        self._pins: Counter[str] = Counter()

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
        """Keys on their way to host memory."""
        return tuple(self._loading)

    def put(self, adapter: HostAdapter) -> None:
        """Hand over an adapter that was read elsewhere."""
        self._host[adapter.key] = adapter
        self._trim_host()

    def asked(self, key: str) -> None:
        """A request has just arrived that wants this adapter: count where it was found, and begin to load it."""
        self._observer.cache_lookup("device", key in self._on_device)
        if key not in self._on_device:
            self._observer.cache_lookup("host", key in self._host)
        self.warm(key)

    def warm(self, key: str) -> None:
        """Begin to bring an adapter to host memory, unless it is here, on its way, or failed a moment ago."""
        failed = self._failed.get(key)
        if failed and time.monotonic() - failed[0] > RETRY_SECONDS:
            del self._failed[key]
        if key in self._host or key in self._loading or key in self._failed:
            return
        self._loading[key] = self._executor.submit(self._timed_load, key)
        self._loading[key].add_done_callback(lambda _: self._wake())

    def collect(self) -> None:
        """Take finished loads over into host memory, or remember how they failed."""
        for key in [key for key, load in self._loading.items() if load.done()]:
            load = self._loading.pop(key)
            if error := load.exception():
                self._remember_failure(key, error if isinstance(error, Exception) else RuntimeError(repr(error)))
            else:
                self.put(load.result())

    def want(self, key: str) -> Place:
        """Where an adapter is, after beginning what brings it nearer to the device.

        One is put on the device at a time: the first that was wanted while nothing else was under way.

        Raises:
            Exception: what its load raised, for RETRY_SECONDS after it failed.
        """
        self.collect()
        if key in self._on_device:
            self._on_device.move_to_end(key)
            self._host.move_to_end(key)
            return Place.READY
        if key in self._failed:
            raise self._failed[key][1]
        if key not in self._host:
            self.warm(key)
            return Place.LOADING
        if self._installing:
            return Place.LOADING
        if not self._make_room():
            return Place.NO_SLOT
        self._device.begin(self._host[key])
        self._installing = key, time.perf_counter()
        return Place.LOADING

    def install(self, seconds: float) -> None:
        """Go on for about so long with what ``want`` began to put on the device. Who waits for it is told by wake."""
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
            self._observer.adapter_load("host_to_device", time.perf_counter() - started)
        self._installing = None
        self._wake()

    def pin(self, key: str) -> None:
        """Keep an adapter on the device for one more running request."""
        assert key in self._on_device
        self._pins[key] += 1

    def unpin(self, key: str) -> None:
        """One running request less."""
        assert self._pins[key] > 0
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def _timed_load(self, key: str) -> HostAdapter:
        started = time.perf_counter()
        adapter = self._load(key)
        self._observer.adapter_load("disk_to_host", time.perf_counter() - started)
        return adapter

    def _remember_failure(self, key: str, error: Exception) -> None:
        self._failed[key] = (time.monotonic(), error)
        self._observer.adapter_load_failed(type(error).__name__)

    def _make_room(self) -> bool:
        while len(self._on_device) >= self.device_slots:
            victim = next((key for key in self._on_device if key not in self._pins), None)
            if victim is None:
                return False
            del self._on_device[victim]
            self._device.remove(victim)
            self._observer.evicted("device")
        return True

    def _trim_host(self) -> None:
        while len(self._host) > self.host_slots:
            coming = self._installing and self._installing[0]
            victim = next((key for key in self._host if key not in self._on_device and key != coming), None)
            if victim is None:
                return
            del self._host[victim]
            self._observer.evicted("host")
