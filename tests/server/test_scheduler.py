"""Admission, turns and chunks, simulated without a model: a step takes the place of a forward."""

import os
import random
import subprocess
import sys
from collections import Counter
from itertools import groupby
from statistics import median

import pytest

from loraplex_server.adapters.residency import Place
from loraplex_server.engine.batch import Batch
from loraplex_server.engine.errors import Overloaded
from loraplex_server.engine.fairness import OUTPUT_TOKEN
from loraplex_server.engine.kv_cache import KVPages
from loraplex_server.engine.request import FinishReason, Request, SamplingParams
from loraplex_server.engine.scheduler import SLICE, Scheduler


def request(name, adapter=None, prompt=4, max_tokens=4) -> Request:
    return Request(name, [1] * prompt, SamplingParams(max_tokens=max_tokens), adapter)


def scheduler(
    pages=100, page_tokens=4, max_rows=8, step_tokens=64, max_waiting=1000, mixed=False, share=True
) -> Scheduler:
    return Scheduler(KVPages(pages, page_tokens, share), max_rows, step_tokens, max_waiting, mixed)


def schedule(s: Scheduler, place=lambda r: Place.READY, pin=lambda r: None, release=lambda r: None) -> Batch | None:
    return s.schedule(place, pin, release, lambda adapter: True)


def step(s: Scheduler, *slots, **more) -> list[str]:
    """One step as the engine takes it; returns who got tokens."""
    batch = schedule(s, *slots, **more)
    if batch is None:
        return []
    assert s.mixed or len(batch.adapters) == 1
    assert sum(row.tokens for row in batch.rows) <= s.step_tokens
    written = [slot for row in batch.rows for slot in s.pages.slots(row.request, row.start, row.stop)]
    assert len(set(written)) == len(written), "two rows write to one place"
    for row in batch.rows:
        row.request.computed_tokens = row.stop
        s.pages.publish(row.request, row.start, row.stop)
        if row.samples:
            row.request.output_ids.append(7)
            if len(row.request.output_ids) == row.request.params.max_tokens:
                row.request.finish_reason = FinishReason.LENGTH
                s.remove(row.request)
    return [row.request.id for row in batch.rows]


class Slots:
    """Device slots as residency keeps them: what runs is pinned, the least recently used goes first."""

    def __init__(self, slots: int) -> None:
        self.slots, self.on_device, self.pins = slots, [], Counter()

    def place(self, request: Request) -> Place:
        if request.adapter not in self.on_device:
            free = next((key for key in self.on_device if not self.pins[key]), None)
            if len(self.on_device) == self.slots:
                if free is None:
                    return Place.NO_SLOT
                self.on_device.remove(free)
        else:
            self.on_device.remove(request.adapter)
        self.on_device.append(request.adapter)
        return Place.READY

    def step(self, s: Scheduler) -> list[str]:
        ran = step(s, self.place, lambda r: self.pins.update([r.adapter]), lambda r: self.pins.subtract([r.adapter]))
        self.pins = Counter(r.adapter for r in s.running)
        return ran


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
    batch = schedule(s)
    assert [row.request.adapter for row in batch.rows] == [None, "A", "B", "B"], (
        "three whole prompts and a piece of a fourth"
    )
    assert sum(row.tokens for row in batch.rows) == 10
    for _ in range(3):
        step(s)
    batch = schedule(s)
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


def test_a_loading_adapter_is_passed_by_and_a_missing_slot_is_waited_for():
    s = scheduler(max_rows=2)
    s.add(request("cold", "C"))
    s.add(request("warm", "W"))
    places = {"C": Place.LOADING, "W": Place.READY}
    pinned = []
    assert step(s, lambda r: places[r.adapter], pinned.append) == ["warm"]
    assert [r.id for r in pinned] == ["warm"]
    places["C"] = Place.NO_SLOT
    s.add(request("later", "W"))
    assert step(s, lambda r: places[r.adapter]) == ["warm"]
    assert [r.id for r in s.waiting] == ["cold", "later"], "none may overtake who waits for a slot"
    places["C"] = Place.READY
    assert step(s, lambda r: places[r.adapter]) == ["cold"]


def test_a_flood_of_one_adapter_holds_every_row_and_another_s_request_gets_the_next_that_is_free():
    s = scheduler(pages=1000, max_rows=4, mixed=True)
    for i in range(50):
        s.add(request(f"a{i}", "A", max_tokens=10 + i % 3))
    for _ in range(3):
        step(s)
    late = request("b", "B", max_tokens=5)
    s.add(late)
    assert {r.adapter for r in s.running} == {"A"}
    steps = 0
    while late not in s.running:
        assert len(s.running) == 4, "it is the first to be admitted"
        step(s)
        schedule(s)
        steps += 1
    assert steps <= 12, "no longer than one answer of A"
    for _ in range(5):
        assert "b" in step(s), "what runs takes part in every step"
    assert late.finished


def test_first_come_first_served_within_an_adapter_and_adapters_in_turn():
    s = scheduler(max_rows=1, mixed=True)
    for name in ("a0", "a1", "a2", "b0", "b1", "c0"):
        s.add(request(name, name[0].upper(), max_tokens=2))
    ran = [name for _ in range(12) for name in step(s)]
    assert ran[::2] == ["a0", "b0", "c0", "a1", "b1", "a2"]


def test_service_counts_tokens_not_requests_and_weights_divide_it():
    """A asks for long answers, B for long prompts, C for short ones at weight 3: C gets three times what each other
    gets, and A and B the same, an output token counted twice.
    """
    s, served = scheduler(pages=10_000, max_rows=6, mixed=True, share=False), Counter()
    shapes = {"A": (4, 30, 1.0), "B": (56, 4, 1.0), "C": (8, 4, 3.0)}
    made = []
    for i in range(2000):
        for adapter in shapes:
            if sum(r.adapter == adapter for r in s.waiting) < 8:
                prompt, most, weight = shapes[adapter]
                made.append(request(f"{adapter}{i}", adapter, prompt, most))
                made[-1].weight = weight
                s.add(made[-1])
        step(s)
    for r in made:
        served[r.adapter] += bool(r.output_ids) * len(r.prompt_ids) + 2 * len(r.output_ids)
    assert served["B"] == pytest.approx(served["A"], rel=0.05)
    assert served["C"] == pytest.approx(3 * served["A"], rel=0.05)


def test_who_was_away_saved_up_nothing():
    s = scheduler(pages=1000, max_rows=2, mixed=True)
    early = request("b", "B", max_tokens=1)
    s.add(early)
    for i in range(200):
        s.add(request(f"a{i}", "A"))
    for _ in range(100):
        step(s)
    assert early.finished
    for i in range(20):
        s.add(request(f"b{i}", "B"))
    ran = Counter(name[0] for _ in range(40) for name in step(s))
    assert ran["a"] == pytest.approx(ran["b"], abs=8), "B is not repaid for the time it asked for nothing"
    for r in [*s.waiting, *s.running]:
        s.remove(r)
    assert s.service.of("A") == 0, "and nobody is in debt when nobody is left"


def test_prompt_chunks_go_to_the_adapter_served_least():
    s = scheduler(step_tokens=8, mixed=True)
    for name in ("a0", "a1"):
        s.add(request(name, "A", prompt=40, max_tokens=2))
    step(s)
    s.add(request("b", "B", prompt=10, max_tokens=2))
    s.service._served["B"] = 1.0  # as if the others had had more since it arrived
    assert [step(s), step(s)] == [["b"], ["a0", "b"]], "all the budget, then what it needs of it"


def test_who_lacks_a_device_slot_is_not_starved_by_those_whose_adapter_is_loaded():
    """One slot, and an endless stream for the adapter that has it: once B has been served less, no A is admitted
    before B has had the slot."""
    s, device = scheduler(pages=1000, max_rows=3, mixed=True), Slots(1)
    late, admitted_after = request("b", "B"), None
    for i in range(100):
        s.add(request(f"a{i}", "A", max_tokens=5))
        if i == 20:
            s.add(late)
            running = {r.id for r in s.running}
        device.step(s)
        if i >= 20 and not late.finished and admitted_after is None:
            if late in s.running:
                admitted_after = i - 20
            else:
                assert {r.id for r in s.running} <= running, "an A was admitted before B"
        if late.finished:
            break
    assert admitted_after is not None and admitted_after <= 6, "an answer of A, no more"
    assert s.waiting, "A was there all the time, or this test proves nothing"


def test_one_that_wants_a_slot_holds_up_one_adapter_and_not_all():
    s, device = scheduler(pages=1000, max_rows=6, mixed=True), Slots(3)
    for adapter in "ABC":
        s.add(request(f"{adapter}0", adapter, max_tokens=6))
    device.step(s)
    for adapter in "DABC":
        s.add(request(f"{adapter}1", adapter, max_tokens=6))
    assert device.step(s) == ["A0", "B0", "B1", "C0", "C1"], "A, the first that can end, lets D in"
    while "A0" in {r.id for r in s.running}:
        device.step(s)
    assert "D1" in device.step(s)


def test_the_adapter_of_who_comes_next_is_brought_while_all_rows_are_taken():
    s, wanted = scheduler(max_rows=1, mixed=True), []
    for name in ("a0", "a1", "b0"):
        s.add(request(name, name[0].upper(), max_tokens=3))
    for _ in range(2):
        step(s, lambda r: wanted.append(r.adapter) or Place.READY)
    assert wanted == ["A", "B", "B"]


@pytest.mark.parametrize("lengths", [(32, 32), (8, 32)])
def test_twice_as_many_adapters_as_slots_is_no_cliff(lengths):
    """The time to the first token, in steps, of a burst of 64: half the adapters wait for a slot, but those that have
    one fill the rows meanwhile, so that all wait hardly longer than with a slot for each."""

    def first_tokens(adapters: int) -> list[int]:
        draw = random.Random(0)
        s, device = scheduler(pages=10_000, max_rows=16, step_tokens=512, mixed=True), Slots(8)
        requests = [request(f"{i}", f"{i % adapters}", max_tokens=draw.randint(*lengths)) for i in range(64)]
        seen = {}
        for one in requests:
            s.add(one)
        for at in range(1, 10_000):
            for name in device.step(s):
                seen.setdefault(name, at)
            if len(seen) == len(requests):
                return sorted(seen.values())
        raise AssertionError("some starve")

    fits, twice = first_tokens(8), first_tokens(16)
    assert median(twice) <= 1.5 * median(fits)
    assert twice[-1] <= 1.5 * fits[-1]


def pausing(adapters: int, tokens: int, slots: int = 8, pages: int = 1000) -> tuple[Scheduler, Slots, list[Request]]:
    """One request for each adapter, and a row for each."""
    s, device = scheduler(pages=pages, max_rows=adapters, step_tokens=512, mixed=True), Slots(slots)
    requests = [request(f"{i}", f"{i}", max_tokens=tokens) for i in range(adapters)]
    for one in requests:
        s.add(one)
    return s, device, requests


def test_where_there_are_rows_but_no_slots_who_comes_has_a_first_token_as_with_a_slot_for_each():
    """Sixteen always under way, for as many adapters in half as many slots: who ends is followed by the next."""

    def first_tokens(slots: int) -> list[int]:
        s, device, requests = pausing(16, 32, slots)
        came, seen = dict.fromkeys("0123456789", 0), {}
        for at in range(1000):
            for name in device.step(s):
                seen.setdefault(name, at)
            while len(s.running) + len(s.waiting) < 16 and len(requests) < 100:
                requests.append(request(f"{len(requests)}", f"{len(requests) % 16}", max_tokens=32))
                came[requests[-1].id] = at + 1
                s.add(requests[-1])
        assert all(r.finished for r in requests)
        return [seen[r.id] - came[r.id] for r in requests[16:]]

    assert median(first_tokens(16)) == 0, "in the next step"
    assert median(first_tokens(8)) <= 1


def test_adapters_that_share_a_slot_get_slices_and_compute_nothing_twice():
    s, device, requests = pausing(3, 200, slots=1)
    ran = []
    while s.running or s.waiting:
        ran.append(device.step(s))
    assert all(len(names) == 1 for names in ran)
    alone = [len([name for name in ran if name == [r.id]]) for r in requests]
    assert alone == [200, 200, 200], "the prompt's step, and one for each further token"
    assert {name for names in ran[:3] for name in names} == {"0", "1", "2"}, "first tokens come first"
    turns = [len(list(turn)) for _, turn in groupby(ran)]
    assert max(turns[3:-3]) <= SLICE / OUTPUT_TOKEN + 1
    assert min(turns[3:-3]) >= SLICE / OUTPUT_TOKEN / 2, "and none for nothing"


def test_who_ends_at_its_first_token_does_not_keep_a_slot_from_others():
    """Each of A's is in its prompt when B looks for an adapter to pause, and a new one always comes."""
    s, device = scheduler(max_rows=4, mixed=True), Slots(1)
    late = request("b", "B")
    for at in range(100):
        s.add(request(f"a{at}", "A", max_tokens=1))
        if at == 5:
            s.add(late)
        device.step(s)
    assert late.finished


def test_an_adapter_that_does_not_leave_its_slot_is_not_paused():
    s, device, _ = pausing(2, 50, slots=1)
    ran = []
    while s.running or s.waiting:
        asked = s.schedule(device.place, lambda r: device.pins.update([r.adapter]), lambda r: None, lambda a: a != "0")
        ran.append(asked.rows[0].request.id)
        for row in asked.rows:
            row.request.computed_tokens = row.stop
            row.request.output_ids.append(7)
            if len(row.request.output_ids) == 50:
                row.request.finish_reason = FinishReason.LENGTH
                s.remove(row.request)
        device.pins = Counter(r.adapter for r in s.running)
    assert ran == ["0"] * 50 + ["1"] * 50


def test_who_is_paused_makes_room_when_pages_are_short():
    """Four requests that grow to eight pages each share ten: the one that runs may have those of who is paused."""
    s, device, requests = pausing(4, 28, slots=1, pages=10)
    preempted = set()
    for _ in range(1000):
        device.step(s)
        preempted |= {r.id for r in requests if r.preemptions}
    assert all(r.finished and len(r.output_ids) == 28 for r in requests)
    assert preempted
    assert "0" not in preempted, "the oldest never makes room"
    assert s.pages.usage == 0


def test_a_page_is_taken_when_a_request_grows_over_one_and_freed_at_its_end():
    s = scheduler(pages=10, page_tokens=4, mixed=True)
    one = request("one", prompt=8, max_tokens=8)
    s.add(one)
    seen = []
    while not one.finished:
        step(s)
        seen.append(s.pages.usage)
    assert seen == pytest.approx([0.2] + [0.3] * 4 + [0.4] * 2 + [0])


def test_who_comes_leaves_a_page_to_grow_for_each_that_runs():
    s = scheduler(pages=6, page_tokens=4, mixed=True, share=False)
    for name in ("first", "second"):
        s.add(request(name, prompt=6, max_tokens=4))
    step(s)
    s.add(request("third", prompt=1))
    step(s)
    assert [r.id for r in s.running] == ["first", "second"], "the two free pages are theirs"
    while s.running or s.waiting:
        step(s)


def test_the_youngest_makes_room_and_goes_to_the_front_of_the_queue():
    s, released = scheduler(pages=6, page_tokens=4, max_rows=3, mixed=True), []
    first, second, third, fourth = (request(name, "A", prompt=4, max_tokens=12) for name in "1234")
    for one in (first, second, third, fourth):
        s.add(one)
    while not released:
        step(s, release=released.append)
    assert released == [third]
    assert [r.id for r in s.running] == ["1", "2"]
    assert [r.id for r in s.waiting] == ["3", "4"]
    assert (third.computed_tokens, third.preemptions) == (0, 1)
    assert third.output_ids, "what it said is kept"
    kept = list(third.output_ids)
    s.service.reset = lambda: None
    ran = []
    while s.running or s.waiting:
        ran += step(s, release=released.append)
        assert third.output_ids[: len(kept)] == kept
    assert first not in released, "the oldest never makes room"
    assert all(r.finished and len(r.output_ids) == 12 for r in (first, second, third, fourth))
    assert ran.index("3") < ran.index("4")
    assert s.service.of("A") == 4 * (4 + 2 * 12), "what is computed twice is charged once"


def test_the_adapter_that_had_most_makes_room():
    s, released = scheduler(pages=9, page_tokens=4, mixed=True), []
    for name, adapter, prompt in (("old", "C", 4), ("a", "A", 12), ("b", "B", 4)):
        s.add(request(name, adapter, prompt, max_tokens=14))
    while not released:
        step(s, release=released.append)
    assert [r.id for r in released] == ["a"], "not the youngest of all, but the youngest of the most served"


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_whatever_comes_all_end_and_the_oldest_that_runs_is_never_preempted(seed, mixed):
    draw = random.Random(seed)
    s = scheduler(pages=12, page_tokens=4, max_rows=5, step_tokens=16, mixed=mixed)
    device, made, preemptions = Slots(2), [], 0

    def release(victim: Request) -> None:
        nonlocal preemptions
        if not victim.computed_tokens:
            assert any(r.order < victim.order for r in (*s.running, *s.waiting) if s.pages.holds(r))
            preemptions += 1

    for at in range(5000):
        if at < 300 and draw.random() < 0.5:
            prompt = draw.randint(1, 30)
            most = draw.randint(1, 48 - prompt)
            made.append(request(f"{at}", draw.choice("ABCD"), prompt, most))
            made[-1].prompt_ids[:] = [draw.randint(0, 1)] * prompt
            s.add(made[-1])
        step(s, device.place, lambda r: device.pins.update([r.adapter]), release)
        device.pins = Counter(r.adapter for r in s.running)
        if at > 300 and not s.waiting and not s.running:
            break
    assert all(len(r.output_ids) == r.params.max_tokens for r in made)
    assert s.pages.usage == 0
    assert preemptions > 3
    assert sum(r.cached_tokens for r in made) > 0


def test_the_queue_is_bounded():
    s = scheduler(max_waiting=2)
    s.add(request("1"))
    s.add(request("2"))
    with pytest.raises(Overloaded, match="2 requests"):
        s.add(request("3"))


@pytest.mark.parametrize(
    "module", ["engine.scheduler", "engine.kv_cache", "engine.fairness", "engine.batch", "adapters.residency"]
)
def test_decisions_need_no_torch(module):
    code = f"import sys, loraplex_server.{module}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
