"""Where adapters are, with a device that only keeps a list: loads, evictions, pins and failures."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf

import pytest

from loraplex_registry.errors import CorruptBlob, InvalidAdapter, UnknownDigest
from loraplex_server.adapters.residency import Place, Residency, Unobserved
from loraplex_server.engine.errors import AdapterRefused


@dataclass
class Adapter:
    key: str
    host_bytes: int = 10

    def evicted(self) -> None:
        """Nobody is told: what becomes of the memory is not what is tested here."""


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
        if key == self.coming:
            self.coming = None
        else:
            self.held.remove(key)


class Bench:
    """A residency whose loads wait until they are let go."""

    def __init__(self, slots=2, host=3, pieces=1, **options) -> None:
        self.device, self.loads = ListDevice(slots, pieces), []
        self.gate, self.woken = threading.Event(), threading.Event()
        self.gate.set()
        self.pool, self.wanted = ThreadPoolExecutor(4), []
        self.residency = Residency(
            self.device, self.load, self.pool, slots, host, Unobserved(), self.woken.set, lambda: self.wanted, **options
        )

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


def wait_until(true) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_for_host(b, *keys) -> None:
    for key in keys:
        b.residency.warm(key)
    wait_until(lambda: b.residency.collect() or set(keys) <= set(b.residency.in_host))


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


def test_unload_frees_both_tiers_at_once_and_who_asks_next_has_it_loaded_anew(bench):
    b = bench(pieces=3)
    b.bring("a")
    b.residency.unload("a")
    assert (b.device.held, b.residency.in_host, b.residency.on_device) == ([], (), ())
    assert b.bring("a") is Place.READY
    assert b.loads == ["a", "a"]
    wait_for_host(b, "b")
    b.residency.want("b")
    b.residency.install(0)
    b.residency.unload("b")
    assert b.device.coming is None, "also from the middle of its installation"
    assert b.residency.in_host == ("a",)
    b.gate.clear()
    b.residency.warm("c")
    b.residency.unload("c")
    b.gate.set()
    assert b.bring("c") is Place.READY, "also from the middle of its load"
    b.residency.unload("never heard of")


def test_unload_waits_for_the_requests_that_run_and_lets_no_other_in(bench):
    b = bench()
    b.bring("a")
    b.residency.pin("a")
    b.residency.pin("a")
    b.residency.unload("a")
    b.residency.unpin("a")
    assert b.residency.want("a") is Place.LOADING
    assert b.device.held == ["a"]
    b.residency.unpin("a")
    assert (b.device.held, b.residency.in_host) == ([], ())
    assert b.bring("a") is Place.READY
    assert b.loads == ["a", "a"]


def test_a_failure_is_forgotten_by_unload(bench):
    b = bench()
    for _ in range(2):
        with pytest.raises(LookupError):
            b.bring("missing")
        b.residency.unload("missing")
    assert b.loads == ["missing", "missing"]


def test_what_is_kept_is_never_evicted_and_one_slot_is_left_for_the_others(bench):
    b = bench(slots=3, host=4)
    for key in ("a", "b"):
        b.residency.keep(key)
        b.bring(key)
    b.residency.keep("a")
    with pytest.raises(AdapterRefused, match=r"2 adapters are kept already.*3 device slots.*at most 2"):
        b.residency.keep("c")
    for key in "cdefgh":
        assert b.bring(key) is Place.READY
        assert {"a", "b"} <= set(b.device.held)
        assert {"a", "b"} <= set(b.residency.in_host)
    b.residency.release("a")
    b.residency.keep("c")
    for key in "defgh":
        assert b.bring(key) is Place.READY
    assert "a" not in b.residency.in_host
    assert set(b.residency.kept) == {"b", "c"}
    with pytest.raises(AdapterRefused, match="at most 0"):
        bench(slots=1).residency.keep("a")


def test_more_adapters_wanted_than_host_memory_holds_are_each_loaded_once(bench):
    """Each arrival pushed out one that had come before and was still waited for; it was loaded again, and so on: with
    20 wanted and room for 3, hundreds of loads. Here every adapter is used as soon as it can be, one at a time.
    """
    b = bench(slots=1, host=3)
    b.wanted = [f"a{i}" for i in range(20)]
    for key in b.wanted:
        b.residency.asked(key)
    deadline = time.monotonic() + 10
    while b.wanted:
        assert time.monotonic() < deadline, b.loads
        assert len(b.residency.in_host) <= 3
        for key in list(b.wanted):
            if b.residency.want(key) is Place.READY:
                b.residency.pin(key)
                b.wanted.remove(key)
                b.residency.unpin(key)
        b.residency.install(0)
    assert sorted(b.loads) == sorted(set(b.loads))
    assert len(b.loads) == 20


def test_an_aborted_wish_holds_no_room(bench):
    b = bench(slots=1, host=2)
    b.wanted = ["a", "b", "c"]
    for key in b.wanted:
        b.residency.asked(key)
    wait_until(lambda: b.residency.collect() or len(b.residency.in_host) == 2)
    assert b.residency.loading == ("c",)
    b.wanted = ["c"]
    assert b.bring("c") is Place.READY


def test_what_came_to_the_device_for_a_request_stays_until_it_has_run(bench):
    """With one slot, two requests that both waited for pages had their adapters push each other out at every step."""
    b = bench(slots=1, host=3)
    b.wanted = ["a", "b"]
    wait_for_host(b, "a", "b")
    assert b.bring("a") is Place.READY
    for _ in range(3):
        assert b.residency.want("b") is Place.LOADING, "it must let a's request past, or neither would ever run"
    b.residency.pin("a")
    assert b.residency.want("b") is Place.NO_SLOT
    b.residency.unpin("a")
    assert b.bring("b") is Place.READY


def test_host_memory_is_bounded_in_bytes_too(bench):
    b = bench(slots=1, host=9, max_host_bytes=35)
    for key in "abcde":
        assert b.bring(key) is Place.READY
        assert b.residency.host_bytes <= 35
    assert b.residency.in_host == ("c", "d", "e")
    with pytest.raises(AdapterRefused, match=r"36 bytes.*at most 35"):
        b.residency.put(Adapter("large", 36))
    b.load = b.residency._load = lambda key: Adapter(key, 36)
    with pytest.raises(AdapterRefused, match="36 bytes"):
        b.bring("large")


def test_kept_bytes_do_not_hold_up_the_others_for_ever(bench):
    b = bench(slots=3, host=9, max_host_bytes=20)
    for key in "ab":
        b.residency.keep(key)
        b.bring(key)
    for key in "cdc":
        assert b.bring(key) is Place.READY


def test_an_adapter_handed_over_again_replaces_the_old_one_unless_it_runs(bench):
    b = bench()
    b.residency.put(Adapter("a"))
    b.bring("a")
    b.residency.pin("a")
    with pytest.raises(AdapterRefused, match="in use"):
        b.residency.put(Adapter("a"))
    b.residency.unpin("a")
    b.residency.put(Adapter("a"))
    assert b.device.held == [], "the old weights would have been served"
    assert b.bring("a") is Place.READY


@pytest.mark.parametrize(
    "error",
    [
        LookupError("no such adapter"), CorruptBlob("a", "sha256:0", "altered"), UnknownDigest("x", "y"),
        OSError(2, "gone"), AdapterRefused("odd"), InvalidAdapter(["one", "two"]),
        UnicodeDecodeError("a", b"", 0, 1, "b"),
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_each_request_that_waits_for_a_failed_load_gets_an_error_of_its_own(bench, error):
    """One exception object was raised to all, from several tasks at once: each added its trace to everybody's."""
    b = bench()

    def fail(key) -> None:
        raise error

    b.residency._load = fail
    seen = []
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            b.bring("a")
        seen.append(caught.value)
        assert (str(caught.value), caught.value.args) == (str(error), error.args)
        assert vars(caught.value) == vars(error)
    assert seen[0] is not seen[1]
    assert all(one.__cause__ is error for one in seen)


def test_another_under_the_same_key_takes_the_place_of_the_first_wherever_it_is(bench):
    """It once stayed on the device, and answered for the new one."""
    b = bench()
    for there in (False, True):
        b.bring("a")
        if not there:
            b.residency.put(Adapter("a"))
            assert b.residency.want("a") is Place.LOADING, "half of the second is on the device"
        b.residency.put(Adapter("a"))
        assert b.device.held == []
        assert b.residency.on_device == ()
        assert b.bring("a") is Place.READY
        assert b.device.held == ["a"]


def test_a_failure_is_forgotten_when_another_is_handed_over(bench):
    b = bench()
    with pytest.raises(LookupError):
        b.bring("missing")
    b.residency.put(Adapter("missing"))
    assert b.bring("missing") is Place.READY
