"""Pages and the prefix cache, without a model: who holds what, who finds what, and random lives."""

import random
from collections import Counter

import pytest

from loraplex_server.engine.kv_cache import KVPages
from loraplex_server.engine.request import Request, SamplingParams


def request(name, tokens, adapter=None, max_tokens=4, **params) -> Request:
    return Request(name, list(tokens), SamplingParams(max_tokens=max_tokens, **params), adapter)


def computed(pages: KVPages, one: Request) -> None:
    """All its tokens were computed, as far as they were not yet."""
    pages.publish(one, one.computed_tokens, one.total_tokens)
    one.computed_tokens = one.total_tokens


def serve(pages: KVPages, *args, **kwargs) -> Request:
    one = request(*args, **kwargs)
    assert pages.admit(one, 0)
    computed(pages, one)
    pages.free(one)
    return one


def test_slots_of_two_requests_never_meet():
    pages = KVPages(8, 4)
    a, b = request("a", range(13)), request("b", range(13, 26))
    assert pages.admit(a, 0)
    assert pages.admit(b, 0)
    slots = pages.slots(a, 0, 13) + pages.slots(b, 0, 13)
    assert len(set(slots)) == 26
    assert max(slots) < 32
    assert not pages.admit(request("c", [1]), 0)
    assert pages.fits_ever(request("d", [1] * 16, max_tokens=16))
    assert not pages.fits_ever(request("e", [1] * 16, max_tokens=17))


def test_admission_leaves_spare_pages():
    pages = KVPages(4, 4)
    assert not pages.admit(request("a", range(8)), 3)
    assert pages.usage == 0
    assert pages.admit(request("a", range(8)), 2)


def test_a_prefix_is_shared_up_to_the_last_full_page_and_the_last_token_is_computed_again():
    pages = KVPages(20, 4)
    serve(pages, "first", range(12))
    longer, same, other = request("l", range(14)), request("s", range(12)), request("o", [*range(8), 99, 99, 99, 99, 0])
    for one in (longer, same, other):
        assert pages.admit(one, 0)
    assert [one.cached_tokens for one in (longer, same, other)] == [12, 8, 8]
    assert [one.computed_tokens for one in (longer, same, other)] == [12, 8, 8]
    assert [one.looked_up_tokens for one in (longer, same, other)] == [14, 12, 13]
    assert pages.slots(longer, 0, 8) == pages.slots(same, 0, 8) == pages.slots(other, 0, 8)
    assert set(pages.slots(same, 8, 12)).isdisjoint(pages.slots(longer, 0, 14)), "nobody writes to a shared page"
    assert pages.usage == (3 + 1 + 1 + 2) / 20


def test_a_page_is_found_only_once_it_was_computed():
    pages = KVPages(20, 4)
    first, second = request("1", range(9)), request("2", range(9))
    assert pages.admit(first, 0)
    assert pages.admit(second, 0)
    assert second.cached_tokens == 0
    pages.publish(first, 0, 6)
    third, fourth = request("3", range(9)), request("4", range(9))
    assert pages.admit(third, 0)
    assert third.cached_tokens == 4
    pages.free(first)
    pages.publish(third, 4, 8)
    assert pages.admit(fourth, 0)
    assert fourth.cached_tokens == 8


def test_tokens_of_the_answer_are_found_by_the_next_turn():
    pages = KVPages(20, 4)
    one = request("1", range(5), max_tokens=8)
    assert pages.admit(one, 0)
    computed(pages, one)
    for token in range(5, 13):
        one.output_ids.append(token)
        assert pages.grow(one)
        computed(pages, one)
    pages.free(one)
    turn = request("2", range(16))
    assert pages.admit(turn, 0)
    assert turn.cached_tokens == 12


@pytest.mark.parametrize("adapters", [("A", "B"), ("A", None), ("None", None), ("", None)])
def test_another_adapter_finds_nothing(adapters):
    pages = KVPages(20, 4)
    serve(pages, "1", range(12), adapters[0])
    assert serve(pages, "2", range(12), adapters[1]).cached_tokens == 0
    assert serve(pages, "3", range(12), adapters[0]).cached_tokens == 8
    assert serve(pages, "4", [0, *range(11)], adapters[0]).cached_tokens == 0, "the same tokens one place later"


def test_a_page_s_key_holds_all_that_came_before_it():
    pages = KVPages(20, 4)
    serve(pages, "1", [1] * 4 + [2] * 4 + [3] * 4)
    assert serve(pages, "2", [9] * 4 + [2] * 4 + [3] * 4).cached_tokens == 0


def test_a_forgotten_adapter_is_not_found_by_any_who_came_before_or_after():
    pages = KVPages(40, 4)
    serve(pages, "1", range(13), "A")
    serve(pages, "2", range(13), "B")
    waits = request("waits", range(13), "A")
    assert not pages.admit(waits, 100)  # it looked, and lacked room
    runs = request("runs", range(13), "A")
    assert pages.admit(runs, 0)
    assert runs.cached_tokens == 12
    pages.forget_adapter("A")
    runs.output_ids += range(13, 20)
    assert pages.grow(runs)
    computed(pages, runs)  # still of the old weights
    assert pages.admit(waits, 0)
    late = request("late", range(20), "A")
    assert pages.admit(late, 0)
    assert (waits.cached_tokens, late.cached_tokens) == (0, 0)
    assert serve(pages, "3", range(13), "B").cached_tokens == 12


def test_who_wants_the_prompt_s_logprobs_looks_nothing_up_but_others_find_its_pages():
    pages = KVPages(20, 4)
    one = serve(pages, "1", range(12), prompt_logprobs=1)
    two = serve(pages, "2", range(12), prompt_logprobs=0)
    assert (one.looked_up_tokens, two.looked_up_tokens, two.cached_tokens) == (0, 0, 0)
    assert serve(pages, "3", range(12)).cached_tokens == 8


def test_without_sharing_nothing_is_looked_up():
    pages = KVPages(20, 4, share=False)
    serve(pages, "1", range(12))
    two = serve(pages, "2", range(12))
    assert (two.looked_up_tokens, two.cached_tokens) == (0, 0)


def test_the_least_recently_used_goes_first_and_the_end_of_a_sequence_before_its_beginning():
    pages = KVPages(6, 4)
    for tokens in (range(9), range(20, 29)):
        serve(pages, f"{tokens}", tokens)
    serve(pages, "again", range(9))  # now the other is the older
    big = request("big", range(40, 52))
    assert pages.admit(big, 0)  # two blank pages, and one of the older
    pages.free(big)
    assert serve(pages, "a", range(9)).cached_tokens == 8
    assert serve(pages, "b", range(20, 29)).cached_tokens == 4


def test_a_preempted_request_is_counted_once_and_finds_its_own_pages():
    pages = KVPages(20, 4)
    one = request("1", range(9))
    assert pages.admit(one, 0)
    computed(pages, one)
    pages.free(one)
    one.preemptions, one.computed_tokens = 1, 0
    one.output_ids.append(5)
    assert pages.admit(one, 0)
    assert one.computed_tokens == 8
    assert (one.looked_up_tokens, one.cached_tokens) == (9, 0)


@pytest.mark.parametrize("seed", range(20))
def test_random_lives(seed):
    """What a page holds is written down beside the pool, as the runner would write it; every page found must hold
    exactly the tokens, the adapter and the past that its finder has."""
    draw = random.Random(seed)
    pages, size = KVPages(draw.randint(8, 24), 4), 4
    live: list[Request] = []
    written: dict[int, tuple] = {}  # slot -> what was computed into it
    weights = Counter()  # by adapter: how often it was replaced
    found = replaced = 0

    def compute(one: Request, stop: int) -> None:
        for at, slot in zip(range(one.computed_tokens, stop), pages.slots(one, one.computed_tokens, stop), strict=True):
            written[slot] = (one.adapter, one.epoch, tuple(one.token_ids[: at + 1]))
        pages.publish(one, one.computed_tokens, stop)
        one.computed_tokens = stop

    for step in range(1500):
        action = draw.random()
        if action < 0.35:
            adapter = draw.choice([None, "A", "B"])
            one = request(f"{step}", [draw.randint(0, 1) for _ in range(draw.randint(1, 24))], adapter, 40)
            one.epoch = weights[adapter]
            free = pages.free_pages
            if pages.admit(one, draw.randint(0, 3)):
                live.append(one)
                found += one.cached_tokens
                assert one.computed_tokens == one.cached_tokens < one.total_tokens
            else:
                assert pages.free_pages == free
                pages.free(one)
        elif live and action < 0.9:
            one = draw.choice(live)
            if one.computed_tokens < one.total_tokens:
                compute(one, draw.randint(one.computed_tokens + 1, one.total_tokens))
            else:
                one.output_ids.append(draw.randint(0, 1))
                if not pages.grow(one):
                    live.remove(one)
                    pages.free(one)
        elif live and action < 0.99:
            pages.free(live.pop(draw.randrange(len(live))))
        else:
            replaced += 1
            weights["A"] += 1
            pages.forget_adapter("A")

        users = Counter(slot // size for one in live for slot in pages.slots(one, 0, one.total_tokens)[::size])
        assert pages.free_pages == pages.pages - len(users)
        assert all(pages._users[page] == users[page] for page in range(pages.pages))
        spare = [*pages._blank, *pages._idle]
        assert sorted([*spare, *users]) == list(range(pages.pages)), "each page is blank, idle or used, and only one"
        assert pages._page_of == {key: page for page, key in pages._key_of.items()}
        assert set(pages._idle) <= set(pages._key_of)
        for one in live:
            for at, slot in enumerate(pages.slots(one, 0, one.computed_tokens)):
                assert written[slot] == (one.adapter, one.epoch, tuple(one.token_ids[: at + 1]))
    assert found > 10
    assert replaced
    for one in live:
        pages.free(one)
    assert pages.usage == 0
