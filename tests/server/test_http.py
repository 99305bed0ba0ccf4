"""The server through its front door: a real uvicorn on a real socket, a real registry, httpx and the openai SDK."""

import asyncio
import json
import shutil
import threading
import time
from contextlib import ExitStack

import httpx
import openai
import pytest
from serving import serving
from tiny import make_adapter, make_base

from loraplex_registry.errors import UnknownAdapter
from loraplex_registry.registry import Registry
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig
from loraplex_server.engine.config import EngineConfig

KEY = "a-secret-key"
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture
def registry(tmp_path, base_folder, adapter_folders) -> Registry:
    registry = Registry(tmp_path / "registry")
    for name in ("red", "green"):
        registry.push(name, adapter_folders[name], base=base_folder)
    return registry


@pytest.fixture
def serve(base_folder, registry):
    """Start servers on the registry of the test, with a base of their own (an engine changes its base's layers)."""
    with ExitStack() as stack:

        def start(**options):
            engine = EngineConfig(**options.pop("engine", {}))
            config = ServerConfig(
                base=str(base_folder), quantization="none", device="cpu", dtype="float32",
                registry=str(registry.root), engine=engine, **options,
            )  # fmt: skip
            app = create_app(config)
            url = stack.enter_context(serving(app))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
            client.app = app
            return client

        yield start


def complete(client, prompt="the quick", **body) -> dict:
    answer = client.post("/v1/completions", json={"prompt": prompt, **GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(client, prompt="the quick", **body) -> str:
    return complete(client, prompt, **body)["choices"][0]["text"]


def wait_until(true) -> None:
    deadline = time.monotonic() + 15
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def events(lines) -> list[dict]:
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    return [json.loads(entry) for entry in data[:-1]]


def streamed(client, prompt="the quick", **body) -> list[dict]:
    with client.stream("POST", "/v1/completions", json={"prompt": prompt, "stream": True, **GREEDY, **body}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events(answer.iter_lines())


def test_base_and_adapters_answer_each_as_itself(serve, registry):
    client = serve()
    answers = {ref: complete(client, **({"adapter": ref} if ref else {})) for ref in (None, "red", "green:1")}
    assert len({a["choices"][0]["text"] for a in answers.values()}) == 3
    assert answers[None]["adapter"] is None
    assert answers["red"]["adapter"] == "red:1"
    assert answers["red"]["adapter_digest"] == registry.resolve("red").digest
    assert answers["red"]["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14} or (
        answers["red"]["usage"]["total_tokens"]
        == answers["red"]["usage"]["prompt_tokens"] + answers["red"]["usage"]["completion_tokens"]
    )
    headers = client.post("/v1/completions", json={"prompt": "x", "adapter": "green"}).headers
    assert headers["X-Loraplex-Adapter-Digest"] == registry.resolve("green").digest
    assert headers["X-Loraplex-Adapter-Version"] == "1"
    assert text(client, model="red") == answers["red"]["choices"][0]["text"]


def test_interleaved_streams_equal_what_each_gets_alone(serve):
    client = serve()
    asked = [(prompt, ref) for prompt in ("the quick", "lazy dog", "över") for ref in (None, "red", "green")]
    alone = [text(client, prompt, adapter=ref) for prompt, ref in asked]

    async def all_at_once():
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as many:

            async def one(prompt, ref):
                body = {"prompt": prompt, "adapter": ref, "stream": True, **GREEDY}
                async with many.stream("POST", "/v1/completions", json=body) as answer:
                    chunks = events([line async for line in answer.aiter_lines()])
                return "".join(chunk["choices"][0]["text"] for chunk in chunks)

            return await asyncio.gather(*(one(*a) for a in asked))

    assert asyncio.run(all_at_once()) == alone
    assert len(set(alone)) == len(alone)


def test_a_moved_alias_serves_the_new_version_and_a_running_stream_ends_on_the_old(
    serve, registry, base_folder, adapter_folders, tmp_path
):
    registry.promote("red:1", "production")
    client = serve()
    endless = {"temperature": 0, "max_tokens": 240, "logit_bias": {"0": -100}}
    old = text(client, adapter="red@production", **endless)
    newer = make_adapter(tmp_path / "newer", base_folder, rank=4, seed=9)
    registry.push("red", newer, base=base_folder)
    body = {"prompt": "the quick", "adapter": "red@production", "stream": True, **endless}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        registry.promote("red:2", "production")
        during = complete(client, adapter="red@production")
        running_still = len(client.app.state.service.engine.scheduler.running)
        chunks = events([first, *(line for line in lines)])
    assert running_still == 1, "the stream must still be running, or this test proves nothing"
    assert during["adapter"] == "red:2"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == old
    assert {chunk["adapter"] for chunk in chunks} == {"red:1"}
    assert not old.startswith(during["choices"][0]["text"])
    assert text(client, adapter="red@production") == during["choices"][0]["text"] == text(client, adapter="red:2")


def test_a_removed_alias_is_404_and_a_running_stream_ends_on_its_version(serve, registry):
    registry.promote("red:1", "canary")
    client = serve()
    endless = {"temperature": 0, "max_tokens": 240, "logit_bias": {"0": -100}}
    old = text(client, adapter="red@canary", **endless)
    body = {"prompt": "the quick", "adapter": "red@canary", "stream": True, **endless}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        registry.remove_alias("red@canary")
        after = client.post("/v1/completions", json=body | {"stream": False})
        running_still = len(client.app.state.service.engine.scheduler.running)
        chunks = events([first, *(line for line in lines)])
    assert running_still == 1, "the stream must still be running, or this test proves nothing"
    assert after.status_code == 404
    assert "red@canary" in after.json()["error"]["message"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == old
    client.app.state.service.watch.look()
    assert client.app.state.service.watch.up  # the watch understands that an alias is gone


def test_a_version_is_fetched_when_it_is_pushed_before_any_alias_moves(
    serve, registry, base_folder, adapter_folders, tmp_path
):
    """Also that only names in use here are asked about, and that series of one that is gone are dropped."""
    registry.promote("red:1", "production")
    client = serve()
    text(client, adapter="red@production")
    residency, served = client.app.state.service.engine.residency, client.app.state.service.registry
    asked, versions = [], served.versions
    served.versions = lambda name: asked.append(name) or versions(name)
    wait_until(lambda: asked)  # it was seen as it is now
    newer = make_adapter(tmp_path / "newer", base_folder, rank=4, seed=9)
    pushed = registry.push("red", newer, base=base_folder)
    registry.push("green", newer, base=base_folder)
    wait_until(lambda: pushed.digest in residency.in_host)
    assert set(asked) == {"red"}
    assert len(residency.in_host) == 2
    assert complete(client, adapter="red")["adapter"] == "red:1"

    def vanished(name):
        raise UnknownAdapter(name)

    assert 'adapter="red"' in client.get("/metrics").text
    served.versions = vanished
    wait_until(lambda: 'lora_requests_total{adapter="red"' not in client.get("/metrics").text)


def test_a_load_does_not_hold_up_the_tokens_of_others(serve, monkeypatch):
    """green's files take until we say so; red's stream goes on meanwhile, and green is answered in the end."""
    client = serve()
    registry = client.app.state.service.registry
    fetch, let_go, began = registry.fetch, threading.Event(), threading.Event()
    green = registry.resolve("green").digest

    def slow_fetch(digest, into):
        if digest == green:
            began.set()
            assert let_go.wait(30)
        return fetch(digest, into)

    monkeypatch.setattr(registry, "fetch", slow_fetch)
    alone = text(client, adapter="red", max_tokens=60)
    answers = []
    slow = [threading.Thread(target=lambda: answers.append(complete(client, adapter="green"))) for _ in range(3)]
    for thread in slow:
        thread.start()
    assert began.wait(30)
    assert text(client, adapter="red", max_tokens=60) == alone
    assert not answers
    let_go.set()
    for thread in slow:
        thread.join()
    assert [a["adapter"] for a in answers] == ["green:1"] * 3
    loads = client.get("/metrics").text
    assert 'lora_adapter_load_seconds_count{transition="disk_to_host"} 2.0' in loads, "one load however many wait"


def test_openai_sdk_works_unmodified(serve, registry, base_folder):
    client = serve(api_keys=(KEY,))
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=KEY, max_retries=0) as sdk:
        names = [model.id for model in sdk.models.list()]
        assert names == [str(base_folder), "green", "red"]
        assert sdk.models.retrieve("red").parent == str(base_folder)
        whole = sdk.completions.create(model="red", prompt="the quick", temperature=0, max_tokens=12)
        other = sdk.completions.create(
            model=str(base_folder), prompt="the quick", temperature=0, max_tokens=12, extra_body={"adapter": "red"}
        )
        assert whole.choices[0].text == other.choices[0].text
        assert whole.choices[0].finish_reason == "length"
        chunks = list(
            sdk.completions.create(
                model="red",
                prompt="the quick",
                temperature=0,
                max_tokens=12,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
        assert chunks[-1].usage == whole.usage
        with pytest.raises(openai.NotFoundError) as caught:
            sdk.completions.create(model="rad", prompt="x")
        assert "'rad'" in caught.value.message
        assert "'red'" in caught.value.message
        assert caught.value.code == "model_not_found"
    stranger = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_keys_guard_the_api_and_nothing_else(serve):
    client = serve(api_keys=(KEY, "another"))
    for path in ("/v1/models", "/v1/completions"):
        answer = client.get(path)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert client.get("/v1/models", headers={"Authorization": "Bearer another"}).status_code == 200
    for path in ("/health", "/ready", "/metrics", "/metrics/routing"):
        assert client.get(path).status_code == 200


def test_prompts_choices_stops_and_echo(serve):
    client = serve()
    tokenizer = client.app.state.service.base.tokenizer
    whole = text(client)
    ids = tokenizer("the quick").input_ids
    assert text(client, ids) == whole
    many = complete(client, ["the quick", "lazy"], n=2, adapter="red")
    assert [c["index"] for c in many["choices"]] == [0, 1, 2, 3]
    assert many["choices"][0]["text"] == many["choices"][1]["text"] == text(client, adapter="red")
    assert many["choices"][2]["text"] == text(client, "lazy", adapter="red")
    assert text(client, echo=True) == "the quick" + whole
    assert "".join(c["choices"][0]["text"] for c in streamed(client, echo=True)) == "the quick" + whole
    stop = whole[3:6]
    stopped = complete(client, stop=stop)["choices"][0]
    assert stopped["text"] == whole[: whole.index(stop)]
    assert stopped["finish_reason"] == "stop"
    seeded = {"temperature": 1.5, "seed": 5, "n": 2}
    first, second = (complete(client, **seeded)["choices"] for _ in range(2))
    assert first == second
    assert first[0]["text"] != first[1]["text"]


BAD = {
    "malformed JSON": (b'{"prompt": "x"', "body", "JSON"),
    "not an object": (b"[1]", "body", "object"),
    "no prompt": ({}, "prompt", "missing"),
    "prompt of a wrong type": ({"prompt": 5}, "prompt", "5"),
    "empty prompt": ({"prompt": ""}, "prompt", "empty"),
    "no prompts": ({"prompt": []}, "prompt", "empty"),
    "prompt over the context": ({"prompt": "again " * 300}, "prompt", "256"),
    "token out of vocabulary": ({"prompt": [5, 999999]}, "prompt", "999999"),
    "max_tokens of a wrong type": ({"prompt": "x", "max_tokens": "ten"}, "max_tokens", "ten"),
    "max_tokens negative": ({"prompt": "x", "max_tokens": -1}, "max_tokens", "-1"),
    "max_tokens over the context": ({"prompt": "x", "max_tokens": 4000}, "max_tokens", "256"),
    "temperature": ({"prompt": "x", "temperature": 3}, "temperature", "from 0 to 2"),
    "top_p": ({"prompt": "x", "top_p": 0}, "top_p", "above 0"),
    "n": ({"prompt": "x", "n": 1000}, "n", "1000"),
    "unknown field": ({"prompt": "x", "max_token": 5}, "max_token", "'max_tokens'"),
    "empty stop": ({"prompt": "x", "stop": ""}, "stop", "empty"),
    "unsupported": ({"prompt": "x", "suffix": "y"}, "suffix", "does not support"),
    "malformed reference": ({"prompt": "x", "adapter": "red@@x"}, "adapter", "red@@x"),
    "model against adapter": ({"prompt": "x", "adapter": "red", "model": "green"}, "model", "green"),
    "stream_options without stream": ({"prompt": "x", "stream_options": {}}, "stream_options", "stream is false"),
    "stop token out of vocabulary": ({"prompt": "x", "stop_token_ids": [777777]}, "stop_token_ids", "777777"),
    "logit_bias": ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "token id"),
}


def test_bad_requests_name_the_field(serve):
    client = serve()
    for story, (body, param, said) in BAD.items():
        content = body if isinstance(body, bytes) else json.dumps(body)
        answer = client.post("/v1/completions", content=content)
        error = answer.json()["error"]
        assert answer.status_code == 400, story
        assert error["param"] == param, story
        assert said in error["message"], (story, error)
        assert error["type"] == "invalid_request_error", story
    assert text(client, adapter="red")


def test_other_refusals_have_the_same_shape(serve):
    client = serve(max_body_bytes=1000)
    cases = [
        (client.post("/v1/completions", content=b"x" * 2000), 413, "too_large"),
        (client.get("/v1/nothing"), 404, "not_found"),
        (client.get("/v1/completions"), 405, "method_not_allowed"),
        (client.get("/v1/models/rod"), 404, "model_not_found"),
    ]
    for answer, status, code in cases:
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize("ref", ["rad", "red:7", "red@staging", "red@sha256:" + "0" * 64])
def test_unknown_adapters_are_404_and_never_the_base(serve, registry, ref):
    registry.promote("red:1", "production")
    client = serve()
    answer = client.post("/v1/completions", json={"prompt": "x", "adapter": ref})
    error = answer.json()["error"]
    assert answer.status_code == 404
    assert error["code"] == "adapter_not_found"
    assert error["param"] == "adapter"
    assert ref in error["message"]
    if ref in ("rad", "red@staging"):
        assert {"rad": "'red'", "red@staging": "production"}[ref] in error["message"]


def test_an_altered_blob_is_refused_named_and_never_served(serve, registry):
    weights = next(
        f for f in registry.manifest(registry.resolve("red").digest).files if f.path.endswith(".safetensors")
    )
    blob = next(registry.root.rglob(weights.sha256))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    client = serve()
    for stream in (False, True):
        answer = client.post("/v1/completions", json={"prompt": "x", "adapter": "red", "stream": stream})
        assert answer.status_code == 422
        assert answer.json()["error"]["code"] == "adapter_refused"
        assert "adapter_model.safetensors" in answer.json()["error"]["message"]
    assert text(client, adapter="green"), "others are served on"
    assert 'lora_adapter_load_failures_total{reason="CorruptBlob"} 1.0' in client.get("/metrics").text


def test_an_adapter_of_another_base_or_too_high_a_rank_is_refused_at_load(serve, registry, tmp_path, base_folder):
    stranger = make_base(tmp_path / "stranger", hidden_size=128, seed=4)
    registry.push("stranger", make_adapter(tmp_path / "s", stranger), base=stranger)
    twin = make_base(tmp_path / "twin", seed=5)
    registry.push("twin", make_adapter(tmp_path / "t", twin), base=twin)
    registry.push("fat", make_adapter(tmp_path / "f", base_folder, rank=32), base=base_folder)
    client = serve(engine={"max_rank": 16})
    for ref, said in (("stranger", "fingerprint"), ("twin", "fingerprint"), ("fat", "rank")):
        answer = client.post("/v1/completions", json={"prompt": "x", "adapter": ref})
        assert answer.status_code == 422
        assert said in answer.json()["error"]["message"]
    assert text(client, adapter="red")


def test_a_full_queue_is_429_with_retry_after(serve, monkeypatch):
    client = serve(engine={"max_waiting": 1})
    registry = client.app.state.service.registry
    fetch, let_go, began = registry.fetch, threading.Event(), threading.Event()

    def slow_fetch(digest, into):
        began.set()
        assert let_go.wait(30)
        return fetch(digest, into)

    monkeypatch.setattr(registry, "fetch", slow_fetch)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(complete(client, adapter="red")))
    thread.start()
    assert began.wait(30)
    refused = client.post("/v1/completions", json={"prompt": "x", "adapter": "red"})
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) >= 1
    let_go.set()
    thread.join()
    assert answers


def test_a_client_that_hangs_up_frees_its_place(serve):
    client = serve()
    engine = client.app.state.service.engine
    body = {"prompt": "the quick", "adapter": "red", "max_tokens": 200, "temperature": 0, "logit_bias": {"0": -100}}
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.05)
    deadline = time.monotonic() + 10
    while engine.has_work and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.has_work
    assert engine.pages.usage == 0
    deadline = time.monotonic() + 10
    counted = 'lora_requests_total{adapter="red",finish_reason="abort"} 2.0'
    while counted not in client.get("/metrics").text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counted in client.get("/metrics").text


def test_metrics_tell_what_was_served(serve):
    client = serve()
    complete(client, adapter="red")
    complete(client)
    streamed(client, adapter="green")
    client.post("/v1/completions", json={"prompt": "x", "adapter": "nobody"})
    seen = client.get("/metrics").text
    for name in ("red", "green", "base"):
        assert f'lora_requests_total{{adapter="{name}",finish_reason="length"}} 1.0' in seen
        assert f'lora_generation_tokens_total{{adapter="{name}"}} 12.0' in seen
        assert f'lora_time_to_first_token_seconds_count{{adapter="{name}"}} 1.0' in seen
        assert f'lora_inter_token_latency_seconds_count{{adapter="{name}"}} 11.0' in seen
    assert 'lora_request_errors_total{adapter="unknown",code="adapter_not_found"} 1.0' in seen
    assert "nobody" not in seen
    assert 'lora_adapters_resident{tier="device"} 2.0' in seen
    assert "lora_registry_up 1.0" in seen
    routing = client.get("/metrics/routing").text
    assert 'running_lora_adapters="green,red"' in routing


def test_models_show_versions_digests_parents_and_aliases(serve, registry, base_folder):
    registry.promote("red:1", "production")
    client = serve()
    base, green, red = client.get("/v1/models").json()["data"]
    assert base["id"] == str(base_folder)
    assert base["parent"] is None
    assert base["digest"].startswith("sha256:")
    assert (red["id"], red["version"], red["parent"], red["aliases"]) == ("red", 1, base["id"], {"production": 1})
    assert red["digest"] == registry.resolve("red").digest
    assert green["aliases"] == {}
    assert client.get("/v1/models/red@production").json()["version"] == 1


def test_usage_says_what_was_found_computed_already(serve):
    client = serve()
    prompt = "again and again: " * 5
    first, second, other = (complete(client, prompt, adapter=name)["usage"] for name in ("red", "red", "green"))
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (first, second, other)]
    assert cached[0] == cached[2] == 0
    assert 16 <= cached[1] < second["prompt_tokens"]
    scored = complete(client, prompt, adapter="red", echo=True, logprobs=1)
    assert scored["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}, "every token's logits are needed"
    chunks = streamed(client, prompt, adapter="red", stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == second


def test_models_lists_what_this_base_can_serve(serve, registry, tmp_path, base_folder):
    """An adapter of another base was listed as if it could be asked for. By its name it is still found."""
    stranger = make_base(tmp_path / "stranger", seed=4)
    registry.push("stranger", make_adapter(tmp_path / "s", stranger), base=stranger)
    client = serve()
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == [str(base_folder), "green", "red"]
    assert client.get("/v1/models/stranger").json()["parent"] == str(stranger)


def test_answers_streams_and_errors_name_the_version_they_are_about(serve, registry, monkeypatch):
    client = serve()
    digest = registry.resolve("red").digest
    said = [
        client.post("/v1/completions", json={"prompt": "x", "adapter": "red", **more})
        for more in ({}, {"stream": True}, {"max_tokens": 4000}, {"n": 2, "seed": 1}, {"timeout": 1e-6})
    ]
    assert [answer.status_code for answer in said] == [200, 200, 400, 200, 408]
    for answer in said:
        assert answer.headers["X-Loraplex-Adapter-Digest"] == digest
        assert answer.headers["X-Loraplex-Adapter-Version"] == "1"
    for body in ({"prompt": "x"}, {"prompt": "x", "adapter": "rad"}):
        assert "X-Loraplex-Adapter-Digest" not in client.post("/v1/completions", json=body).headers


def test_an_adapter_that_this_machine_cannot_read_is_503_and_not_our_mistake(serve, registry, monkeypatch):
    """A full disk was answered 500, which says that the program is wrong."""
    client = serve()

    def full(digest, into):
        raise OSError(28, "No space left on device", str(into))

    monkeypatch.setattr(client.app.state.service.registry, "fetch", full)
    answer = client.post("/v1/completions", json={"prompt": "x", "adapter": "red"})
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["code"] == "adapter_unavailable"
    assert "No space left" in answer.json()["error"]["message"]
    assert text(client)


def test_readiness_follows_health_and_the_registry(serve):
    client = serve()
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["ready"] is True
    shutil.rmtree(client.app.state.service.registry.root)
    assert client.get("/ready").status_code == 200, "what is known is served on; the registry may be away"
    client.app.state.service.loop.stop()
    assert client.get("/health").status_code == 503
    assert client.get("/ready").status_code == 503
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503
