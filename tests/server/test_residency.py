"""Where adapters are, with a device that only keeps a list: loads, evictions, pins and failures."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf

import pytest

from loraplex_server.adapters.residency import Place, Residency, Unobserved
from loraplex_server.engine.errors import AdapterRefused


@dataclass
class Adapter:
    key: str


class ListDevice:
    """Each adapter takes ``pieces`` calls of advance."""

    def __init__(self, slots, pieces) -> None:
        self.held, self.coming, self.slots, self.pieces, self.left = [], None, slots, pieces, 0

    def begin(self, adapter) -> None:
        assert self.coming is None
        assert adapter.key not in self.held
        assert len(self.held) < self.slots
        self.coming, self.left = adapter.key, self.pieces

    def advance(self, seconds) -> bool:
        self.left -= 1
        if self.left and seconds < inf:
            return False
        key, self.coming = self.coming, None
        if key == "bad":
            raise AdapterRefused("it does not fit")
        self.held.append(key)
        return True

    def remove(self, key) -> None:
        self.held.remove(key)


class Bench:
    """A residency whose loads wait until they are let go."""

    def __init__(self, slots=2, host=3, pieces=1) -> None:
        self.device, self.loads = ListDevice(slots, pieces), []
        self.gate, self.woken = threading.Event(), threading.Event()
        self.gate.set()
        self.pool = ThreadPoolExecutor(4)
        self.residency = Residency(self.device, self.load, self.pool, slots, host, Unobserved(), self.woken.set)

    def load(self, key) -> Adapter:
        self.loads.append(key)
        assert self.gate.wait(10)
        if key == "missing":
            raise LookupError("no such adapter")
        return Adapter(key)

    def bring(self, key) -> Place:
        """Ask until it is no longer loading."""
        while True:
            self.woken.clear()
            place = self.residency.want(key)
            self.residency.install(inf)
            if place is not Place.LOADING:
                return place
            assert self.woken.wait(10)


@pytest.fixture
def bench():
    made = []

    def make(**options) -> Bench:
        made.append(Bench(**options))
        return made[-1]

    yield make
    for one in made:
        one.gate.set()
        one.pool.shutdown()


def test_one_load_however_many_wait(bench):
    b = bench()
    b.gate.clear()
    for _ in range(20):
        b.residency.asked("a")
        assert b.residency.want("a") is Place.LOADING
    b.gate.set()
    assert b.bring("a") is Place.READY
    assert b.loads == ["a"]


def test_the_least_recently_used_is_evicted_and_comes_back_from_host_memory(bench):
    b = bench(slots=2, host=3)
    for key in ("a", "b", "a", "c"):
        assert b.bring(key) is Place.READY
    assert b.device.held == ["a", "c"]
    assert b.bring("b") is Place.READY
    assert b.device.held == ["c", "b"]
    assert b.loads == ["a", "b", "c"], "b was still in host memory"
    b.bring("d")
    b.bring("a")
    assert b.loads == ["a", "b", "c", "d", "a"], "host memory holds three"
    assert len(b.residency.in_host) == 3
    assert set(b.residency.on_device) == set(b.device.held)


def test_a_pinned_adapter_is_never_evicted(bench):
    b = bench(slots=1)
    b.bring("a")
    b.residency.pin("a")
    b.residency.pin("a")
    assert b.bring("b") is Place.NO_SLOT
    b.residency.unpin("a")
    assert b.bring("b") is Place.NO_SLOT
    b.residency.unpin("a")
    assert b.bring("b") is Place.READY
    assert b.device.held == ["b"]


def test_a_failed_load_fails_who_asked_is_remembered_and_harms_no_other(bench, monkeypatch):
    b = bench()
    for key, error in (("missing", LookupError), ("bad", AdapterRefused)):
        with pytest.raises(error):
            b.bring(key)
        with pytest.raises(error):
            b.residency.want(key)
    assert b.loads == ["missing", "bad"], "a failure is remembered for a while"
    assert b.bring("a") is Place.READY
    monkeypatch.setattr("loraplex_server.adapters.residency.RETRY_SECONDS", 0)
    b.residency.asked("missing")
    with pytest.raises(LookupError):
        b.bring("missing")
    assert b.loads.count("missing") == 2, "and tried again afterwards"


def test_warming_loads_ahead_of_the_first_request(bench):
    b = bench()
    b.residency.warm("a")
    assert b.woken.wait(10)
    assert b.residency.want("a") is Place.LOADING
    assert b.loads == ["a"]
    b.residency.install(inf)
    assert b.residency.want("a") is Place.READY
    assert b.loads == ["a"]


def wait_for_host(b, *keys) -> None:
    for key in keys:
        b.residency.warm(key)
    deadline = time.monotonic() + 10
    while b.residency.loading or not set(keys) <= set(b.residency.in_host):
        assert time.monotonic() < deadline
        b.residency.collect()
        time.sleep(0.001)


def test_one_is_put_on_the_device_at_a_time_in_the_order_wanted_and_others_stay_in_use(bench):
    b = bench(slots=3, host=4, pieces=3)
    b.bring("a")
    wait_for_host(b, "b", "c")
    seen = []
    while not {"b", "c"} <= set(b.device.held):
        assert b.residency.want("a") is Place.READY, "others go on meanwhile"
        for key in ("b", "c"):
            b.residency.want(key)
        seen.append(b.device.coming)
        b.woken.clear()
        b.residency.install(0.001)
        assert b.woken.is_set() == (b.device.coming is None), "who waits is woken when it is there, not before"
    assert seen == ["b", "b", "b", "c", "c", "c"]


def test_what_is_being_installed_is_evicted_from_neither_tier(bench):
    b = bench(slots=1, host=2, pieces=3)
    wait_for_host(b, "a")
    assert b.residency.want("a") is Place.LOADING
    b.residency.install(0)
    for key in ("b", "c"):
        wait_for_host(b, key)
        assert b.residency.want(key) is Place.LOADING
    b.residency.install(inf)
    assert b.device.held == ["a"]
    assert set(b.residency.in_host) == {"a", "c"}


def test_a_refusal_halfway_fails_who_asked_and_frees_the_way(bench):
    b = bench(slots=1, host=3, pieces=3)
    wait_for_host(b, "bad", "a")
    assert b.residency.want("bad") is Place.LOADING
    assert b.residency.want("a") is Place.LOADING
    b.residency.install(inf)
    with pytest.raises(AdapterRefused, match="does not fit"):
        b.residency.want("bad")
    assert b.bring("a") is Place.READY
