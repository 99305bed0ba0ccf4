"""The SDK and the command against the real server: a tiny random base in NF4, two adapters in a real registry."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from serving import serving

import loraplex
from loraplex import AsyncClient, Client, errors
from loraplex.protocol import CompletionOptions

from .test_cli import error_line, run, wait_until

PROMPT = "the quick brown fox"
GREEDY = {"max_tokens": 12, "temperature": 0.0}
KEY = "a-key-for-tests"


@dataclass
class Served:
    url: str
    digests: dict[str, str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from tiny import make_adapter, make_base

    from loraplex_registry.registry import Registry
    from loraplex_server.app import create_app
    from loraplex_server.config import ServerConfig
    from loraplex_server.engine.config import EngineConfig

    folder: Path = tmp_path_factory.mktemp("served")
    base = make_base(folder / "base")
    with Registry(folder / "registry") as registry:
        versions = [
            registry.push(name, make_adapter(folder / name, base, seed=seed), base=base)
            for seed, name in enumerate(("red", "green"), start=1)
        ]
        registry.promote("red:1", to="production")
    engine = EngineConfig(lean=True)  # else a close choice in 4 bits depends on how many requests share a step
    config = ServerConfig(
        base=str(base), registry=str(folder / "registry"), device="cpu", api_keys=(KEY,), engine=engine
    )
    with serving(create_app(config), log_config=None) as url:
        yield Served(url, {version.name: version.digest for version in versions})


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.url, api_key=KEY) as client:
        yield client


def test_each_adapter_gives_its_own_answer(client: Client, served: Served):
    base = client.complete(PROMPT, **GREEDY)
    red = client.complete(PROMPT, adapter="red@production", **GREEDY)
    green = client.complete(PROMPT, model="green", **GREEDY)
    assert len({base.text, red.text, green.text}) == 3
    assert (base.adapter, base.adapter_digest) == (None, None)
    assert (red.adapter, red.adapter_digest) == ("red:1", served.digests["red"])
    assert (green.adapter, green.adapter_digest) == ("green:1", served.digests["green"])
    assert red.usage is not None
    assert red.usage.total_tokens == red.usage.prompt_tokens + red.usage.completion_tokens
    assert red.finish_reason in ("stop", "length")


def test_concurrent_streams_equal_what_each_gives_alone(client: Client, served: Served):
    asked = [None, "red", "green"] * 4
    alone = {name: client.complete(PROMPT, adapter=name, **GREEDY).text for name in set(asked)}

    async def ask(client: AsyncClient, name: str | None) -> str:
        chunks = [chunk async for chunk in client.stream(PROMPT, adapter=name, include_usage=True, **GREEDY)]
        assert chunks[-1].usage is not None
        assert chunks[-2].finish_reason in ("stop", "length")
        assert {chunk.adapter_digest for chunk in chunks} == {served.digests[name] if name else None}
        return "".join(chunk.text for chunk in chunks)

    async def ask_all() -> list[str]:
        async with AsyncClient(served.url, api_key=KEY) as client:
            return await asyncio.gather(*(ask(client, name) for name in asked))

    assert asyncio.run(ask_all()) == [alone[name] for name in asked]


def test_models(client: Client, served: Served):
    base, *adapters = client.models()
    assert base.parent is None
    found = {model.id: model for model in adapters}
    assert {name: found[name].digest for name in ("red", "green")} == served.digests
    assert {model.parent for model in adapters} == {base.id}
    assert (found["red"].version, found["red"].aliases) == (1, ("production",))


def test_errors(client: Client, served: Served):
    with pytest.raises(errors.AdapterNotFound, match=r"gren.*green") as caught:
        client.complete(PROMPT, adapter="gren")
    assert (caught.value.status, caught.value.param) == (404, "adapter")
    with pytest.raises(errors.AdapterNotFound):
        next(client.stream(PROMPT, model="nobody"))
    with pytest.raises(errors.BadRequest) as bad:
        client.complete(PROMPT, temperature=-1.0)
    assert bad.value.param == "temperature"
    with Client(served.url) as stranger:
        assert stranger.health()
        with pytest.raises(errors.Unauthorized):
            stranger.complete(PROMPT)


def test_leaving_a_stream_early_ends_its_request(client: Client, served: Served):
    never_stop = {"0": -100.0}  # token 0 ends a sequence
    aborted = 'lora_requests_total{adapter="green",finish_reason="abort"} 1.0'
    with closing(client.stream(PROMPT, adapter="green", max_tokens=200, logit_bias=never_stop)) as chunks:
        assert isinstance(next(chunks), loraplex.Chunk)
        assert aborted not in httpx.get(served.url + "/metrics").text
    wait_until(lambda: aborted in httpx.get(served.url + "/metrics").text)


def test_the_command(client: Client, served: Served):
    env = {"LORAPLEX_URL": served.url, "LORAPLEX_API_KEY": KEY}
    expected = client.complete(PROMPT, adapter="red", **GREEDY).text
    ask = ("complete", PROMPT, "--adapter", "red", "--max-tokens", "12", "--temperature", "0")
    for mode in ("--stream", "--no-stream"):
        status, out, err = run(*ask, mode, **env)
        assert (status, err) == (0, "")
        assert out == expected + "\n"
    assert re.search(r"^red +1 +production ", run("models", **env)[1], re.MULTILINE)
    assert "green" in error_line(run("complete", PROMPT, "--adapter", "gren", **env))


def test_the_server_takes_every_typed_option(client: Client) -> None:
    every: CompletionOptions = {
        "adapter": "red", "model": "red", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 20, "min_p": 0.01,
        "stop": ["never"], "seed": 1, "n": 2, "best_of": 3, "echo": True, "logprobs": 2, "logit_bias": {"0": -100},
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "suffix": "", "user": "me",
        "extra_body": {"min_tokens": 3},
    }  # fmt: skip
    assert every.keys() == CompletionOptions.__annotations__.keys()
    answer = client.complete(PROMPT, **every)
    assert len(answer.choices) == 2
    assert answer.usage
    assert answer.usage.completion_tokens == 9
    scored = answer.choices[0]["logprobs"]
    assert len(scored["tokens"]) == answer.usage.prompt_tokens + 3
    assert scored["token_logprobs"][0] is None
