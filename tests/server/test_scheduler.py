"""Admission, turns and chunks, simulated without a model: a step takes the place of a forward."""

import os
import subprocess
import sys

import pytest

from loraplex_server.adapters.residency import Place
from loraplex_server.engine.errors import Overloaded
from loraplex_server.engine.kv_cache import KVPages
from loraplex_server.engine.request import FinishReason, Request, SamplingParams
from loraplex_server.engine.scheduler import Scheduler


def request(name, adapter=None, prompt=4, max_tokens=4) -> Request:
    return Request(name, [1] * prompt, SamplingParams(max_tokens=max_tokens), adapter)


def scheduler(pages=100, page_tokens=4, max_rows=8, step_tokens=64, max_waiting=100, mixed=False) -> Scheduler:
    return Scheduler(KVPages(pages, page_tokens), max_rows, step_tokens, max_waiting, mixed)


def step(s: Scheduler, place=lambda r: Place.READY, pinned=None) -> list[str]:
    """One step as the engine takes it; returns who got tokens."""
    batch = s.schedule(place, (pinned if pinned is not None else []).append)
    if batch is None:
        return []
    assert s.mixed or len(batch.adapters) == 1
    for row in batch.rows:
        row.request.computed_tokens = row.stop
        if row.samples:
            row.request.output_ids.append(7)
            if len(row.request.output_ids) == row.request.params.max_tokens:
                row.request.finish_reason = FinishReason.LENGTH
                s.remove(row.request)
    return [row.request.id for row in batch.rows]


def test_a_lone_request_of_one_adapter_is_not_starved_by_an_endless_stream_of_another():
    s = scheduler(max_rows=4)
    late = request("b", "B", max_tokens=8)
    arrivals = [request(f"a{i}", "A", max_tokens=8) for i in range(500)]
    arrivals.insert(6, late)
    steps = []
    while not late.finished:
        s.add(arrivals.pop(0))
        steps.append(step(s))
        assert len(steps) < 100, "B starves"
    turns = [i for i, names in enumerate(steps) if names == ["b"]]
    assert turns == list(range(turns[0], turns[0] + 16, 2)), "once admitted it gets every other step"
    assert (bool(s.waiting), len(s.running)) == (True, 3), "A was there all the time, or this test proves nothing"


def test_adapters_take_turns_and_rows_of_one_share_a_step():
    s = scheduler()
    for name, adapter in (("a1", "A"), ("b1", "B"), ("a2", "A"), ("base", None)):
        s.add(request(name, adapter))
    steps = [step(s) for _ in range(6)]
    assert sorted(map(sorted, steps[:3])) == [["a1", "a2"], ["b1"], ["base"]]
    assert steps[:3] == steps[3:]


def test_where_a_step_may_be_mixed_all_take_part_grouped_by_adapter_and_prompts_take_what_is_left():
    s = scheduler(step_tokens=10, mixed=True)
    requests = [request(f"{adapter}{i}", adapter, prompt=3) for i in range(2) for adapter in ("B", None, "A")]
    for one in requests:
        s.add(one)
    batch = s.schedule(lambda r: Place.READY, lambda r: None)
    assert [row.request.adapter for row in batch.rows] == [None, "A", "B", "B"], (
        "three whole prompts and a piece of a fourth"
    )
    assert sum(row.tokens for row in batch.rows) == 10
    for _ in range(3):
        step(s)
    batch = s.schedule(lambda r: Place.READY, lambda r: None)
    assert [(row.request.adapter, row.tokens) for row in batch.rows] == [(None, 1)] * 2 + [("A", 1)] * 2 + [
        ("B", 1)
    ] * 2


def test_a_long_prompt_is_cut_into_chunks():
    s = scheduler(step_tokens=10)
    long = request("long", prompt=25, max_tokens=2)
    s.add(long)
    seen = []
    while not long.finished:
        step(s)
        seen.append(long.computed_tokens)
    assert seen == [10, 20, 25, 26]


def test_pages_are_reserved_for_the_longest_a_request_can_grow_and_freed_at_its_end():
    s = scheduler(pages=4, page_tokens=4)
    first, second = request("first", prompt=8, max_tokens=4), request("second", prompt=8, max_tokens=4)
    s.add(first)
    s.add(second)
    step(s)
    assert [r.id for r in s.running] == ["first"]
    assert s.pages.usage == 0.75
    while not first.finished:
        step(s)
    step(s)
    assert [r.id for r in s.running] == ["second"]
    s.remove(second)
    assert s.pages.usage == 0


def test_slots_of_two_requests_never_meet():
    pages = KVPages(8, 4)
    a, b = request("a", prompt=9, max_tokens=4), request("b", prompt=9, max_tokens=4)
    pages.allocate(a)
    pages.allocate(b)
    slots = pages.slots(a, 0, 13) + pages.slots(b, 0, 13)
    assert len(set(slots)) == 26
    assert max(slots) < 32
    assert not pages.can_allocate(request("c", prompt=1, max_tokens=1))
    assert pages.fits_ever(request("d", prompt=16, max_tokens=16))
    assert not pages.fits_ever(request("e", prompt=16, max_tokens=17))


def test_a_loading_adapter_is_passed_by_and_a_missing_slot_is_waited_for():
    s = scheduler()
    s.add(request("cold", "C"))
    s.add(request("warm", "W"))
    places = {"C": Place.LOADING, "W": Place.READY}
    pinned = []
    assert step(s, lambda r: places[r.adapter], pinned) == ["warm"]
    assert [r.id for r in pinned] == ["warm"]
    places["C"] = Place.NO_SLOT
    s.add(request("later", "W"))
    assert step(s, lambda r: places[r.adapter]) == ["warm"]
    assert [r.id for r in s.waiting] == ["cold", "later"], "none may overtake who waits for a slot"
    places["C"] = Place.READY
    assert step(s, lambda r: places[r.adapter]) == ["cold"]


def test_the_queue_is_bounded():
    s = scheduler(max_waiting=2)
    s.add(request("1"))
    s.add(request("2"))
    with pytest.raises(Overloaded, match="2 requests"):
        s.add(request("3"))


@pytest.mark.parametrize("module", ["engine.scheduler", "engine.kv_cache", "engine.batch", "adapters.residency"])
def test_decisions_need_no_torch(module):
    code = f"import sys, loraplex_server.{module}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
