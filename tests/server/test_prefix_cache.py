"""Shared prefixes and preemption against the oracle: what was cached, or computed twice, changes no token."""

from itertools import count

import pytest
from oracle import PeftAlone, engine_for
from tiny import make_adapter

from loraplex_server.engine.attention import KVTensors
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.errors import AdapterRefused, InvalidRequest
from loraplex_server.engine.request import FinishReason, Request, SamplingParams

GREEDY = SamplingParams(max_tokens=20, temperature=0)
PREFIX = list(range(1, 60))  # three full pages and a piece
NAMES = count()


@pytest.fixture(scope="module")
def alone(base_folder, adapter_folders) -> PeftAlone:
    return PeftAlone(base_folder, adapter_folders)


def ask(engine: Engine, prompts, adapters, params=GREEDY) -> list[Request]:
    """Prompts together, until all ended."""
    requests = [
        Request(f"{next(NAMES)}", list(prompt), params, adapter)
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert engine.pages.usage == 0
    return requests


def pages_worth(engine: Engine, pages: int) -> int:
    """Bytes of a cache of so many pages."""
    return pages * engine.config.page_tokens * KVTensors.bytes_per_token(engine.base.model.config, engine.base.dtype)


@pytest.mark.parametrize("config", [{}, {"page_tokens": 3}, {"step_tokens": 7}, {"prefix_cache": False}])
def test_hit_or_miss_the_tokens_are_those_of_peft_alone(base_folder, adapter_folders, alone, config):
    engine = engine_for(base_folder, adapter_folders, **config)
    adapters = [None, *adapter_folders]
    prompts = [PREFIX, PREFIX[:48], [*PREFIX[:40], 99, 98, 97], [7, *PREFIX], PREFIX[:49]]
    cached = []
    for prompt in (*prompts, *prompts):
        for request in ask(engine, [prompt] * 5, adapters):
            assert request.output_ids == alone.answer(prompt, request.adapter)
            cached.append(request.cached_tokens)
    by_prompt = [set(cached[i : i + 5]) for i in range(0, len(cached), 5)]
    assert all(len(five) == 1 for five in by_prompt), "an adapter found what only another computed"
    if config.get("page_tokens"):
        assert [five.pop() for five in by_prompt] == [0, 45, 39, 0, 48, 57, 45, 42, 57, 48]
    elif config.get("prefix_cache", True):
        assert [five.pop() for five in by_prompt] == [0, 32, 32, 0, 48, 48, 32, 32, 48, 48]
    else:
        assert by_prompt == [{0}] * 10
    tokens = [tuple(alone.answer(PREFIX, adapter)) for adapter in adapters]
    assert len(set(tokens)) == 5, "the adapters must answer differently, or this test proves nothing"


def test_the_next_turn_of_a_talk_finds_the_answer_before_it(base_folder, adapter_folders, alone):
    engine = engine_for(base_folder, adapter_folders, page_tokens=4)
    (first,) = ask(engine, [PREFIX], ["green"])
    talk = [*first.token_ids, 5, 6, 7]
    (second,) = ask(engine, [talk], ["green"])
    assert len(PREFIX) < second.cached_tokens
    assert second.output_ids == alone.answer(talk, "green")


@pytest.mark.parametrize("paged", [True, False])
def test_preempted_or_not_the_tokens_are_those_of_peft_alone(base_folder, adapter_folders, alone, paged):
    plenty = engine_for(base_folder, adapter_folders, page_tokens=4)
    memory = pages_worth(plenty, 24)
    engine = engine_for(
        base_folder, adapter_folders, page_tokens=4, kv_cache_bytes=memory, max_loras=3, step_tokens=24, paged=paged
    )
    assert engine.pages.pages == 24
    adapters = ["red", "green", None, "blue", "head", "red", "green", "red"]
    prompts = [PREFIX[i : i + 10 + i] for i in range(8)]
    params = SamplingParams(max_tokens=40, temperature=0)
    requests = ask(engine, prompts, adapters, params)
    for request in requests:
        assert request.output_ids == alone.answer(request.prompt_ids, request.adapter, 40), request.preemptions
    assert sum(request.preemptions for request in requests) > 3
    assert any(request.preemptions and request.adapter for request in requests)
    assert not engine.residency._pins


def test_a_seeded_sample_and_its_text_are_the_same_preempted_or_not(base_folder, adapter_folders):
    plenty = engine_for(base_folder, adapter_folders)
    tight = engine_for(base_folder, adapter_folders, kv_cache_bytes=pages_worth(plenty, 8))
    prompts, adapters = ["again and again and again: the lazy brown dog ü"] * 4, ["red", "green", None, "red"]
    answers, started = [], []
    for engine in (plenty, tight):
        begin, params = (
            engine._forward_and_sample,
            [SamplingParams(48, 1.3, seed=i, frequency_penalty=0.5) for i in range(4)],
        )

        def noted(batch, begin=begin):
            result = begin(batch)
            started.extend((row.request.id, row.request.started_at) for row in batch.rows)
            return result

        engine._forward_and_sample = noted
        requests = [
            Request(f"{engine is tight}-{i}", engine.base.tokenizer(prompt).input_ids, params[i], adapters[i])
            for i, prompt in enumerate(prompts)
        ]
        texts = dict.fromkeys((r.id for r in requests), "")
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for delta in engine.step():
                texts[delta.request.id] += delta.text
        answers.append([(r.output_ids, texts[r.id]) for r in requests])
        assert any(r.preemptions for r in requests) == (engine is tight)
    assert answers[0] == answers[1]
    assert len(set(started)) == 8, "queued until its first step, however often it begins anew"


def test_one_that_fills_the_cache_alone_ends_and_one_larger_is_refused(base_folder, adapter_folders, alone):
    plenty = engine_for(base_folder, adapter_folders)
    engine = engine_for(base_folder, adapter_folders, kv_cache_bytes=pages_worth(plenty, 5))
    params = SamplingParams(max_tokens=21, temperature=0, logit_bias={0: -100})
    requests = ask(engine, [PREFIX] * 3, ["red", "green", None], params)
    assert [len(r.output_ids) for r in requests] == [21, 21, 21]
    with pytest.raises(InvalidRequest, match="80"):
        engine.add(Request("large", PREFIX, SamplingParams(max_tokens=22), None))


def test_another_adapter_under_the_same_name_does_not_find_the_pages_of_the_first(tmp_path, base_folder):
    """vllm#42125: an adapter was loaded anew under its name, and answered from the keys and values of the old one."""
    first, second = (make_adapter(tmp_path / str(seed), base_folder, seed=seed) for seed in (11, 12))
    engine = engine_for(base_folder, {"same": first}, max_loras=1)
    (before,) = ask(engine, [PREFIX], ["same"])
    assert before.output_ids == PeftAlone(base_folder, {"same": first}).answer(PREFIX, "same")
    engine.add_adapter("same", second)
    (after,) = ask(engine, [PREFIX], ["same"])
    assert after.output_ids == PeftAlone(base_folder, {"same": second}).answer(PREFIX, "same")
    assert after.output_ids != before.output_ids
    assert after.cached_tokens == 0
    assert ask(engine, [PREFIX], ["same"])[0].cached_tokens == 48


def test_an_adapter_in_use_is_not_replaced(base_folder, adapter_folders):
    engine = engine_for(base_folder, adapter_folders)
    engine.add(Request("r", list(PREFIX), GREEDY, "red"))
    for _ in range(3):
        with pytest.raises(AdapterRefused, match="'red' is used by 1 requests"):
            engine.add_adapter("red", adapter_folders["green"])
        engine.step()
    while engine.has_work:
        engine.step()
    engine.add_adapter("red", adapter_folders["red"])


@pytest.mark.parametrize("when", ["forward", "sample"])
def test_a_step_that_failed_leaves_nothing_to_be_found(base_folder, adapter_folders, alone, when):
    """Keys were half written, or never: whoever found their pages would read rubbish."""
    engine = engine_for(base_folder, adapter_folders, step_tokens=32)
    owner, name = (engine._runner, "forward") if when == "forward" else (engine._sampler, "sample")
    right, calls = getattr(owner, name), []

    def wrong(*args):
        calls.append(args)
        if len(calls) == 2:
            for tensor in (*engine._runner._kv.keys, *engine._runner._kv.values):
                tensor[32:] = float("nan")  # what the first step wrote is whole
            raise RuntimeError("the device fell over")
        return right(*args)

    setattr(owner, name, wrong)
    (failed,) = ask(engine, [PREFIX], ["red"])
    assert failed.finish_reason is FinishReason.ERROR
    setattr(owner, name, right)
    (again,) = ask(engine, [PREFIX], ["red"])
    assert again.cached_tokens == 32
    assert again.output_ids == alone.answer(PREFIX, "red")


def test_an_abort_midway_leaves_whole_pages_that_are_right(base_folder, adapter_folders, alone):
    engine = engine_for(base_folder, adapter_folders, step_tokens=20)
    request = Request("gone", list(PREFIX), GREEDY, "blue")
    engine.add(request)
    while not request.computed_tokens:  # its adapter comes first
        engine.step()
    engine.abort(request)
    assert engine.pages.usage == 0
    (again,) = ask(engine, [PREFIX], ["blue"])
    assert again.cached_tokens == 16
    assert again.output_ids == alone.answer(PREFIX, "blue")


def test_an_adapter_that_was_evicted_and_came_back_finds_its_pages(base_folder, adapter_folders, alone):
    engine = engine_for(base_folder, adapter_folders, max_loras=1)
    for name in ("red", "green", "red"):
        (request,) = ask(engine, [PREFIX], [name])
        assert request.output_ids == alone.answer(PREFIX, name)
    assert request.cached_tokens == 48


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_positive_number_is_refused(base_folder, weight):
    engine = engine_for(base_folder, {})
    with pytest.raises(InvalidRequest, match="weight is"):
        engine.add(Request("r", [1], GREEDY, weight=weight))
