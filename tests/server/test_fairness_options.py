"""What the operator says about shares and the prefix cache, from the command line to the metrics."""

from contextlib import ExitStack

import httpx
import pytest
from serving import serving

from loraplex_registry.registry import Registry
from loraplex_server.__main__ import _config, serve
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig, read_adapter_weights
from loraplex_server.engine.config import EngineConfig


def configured(*arguments) -> ServerConfig:
    return _config(serve.make_context("serve", ["--base", "b", *arguments]).params)


def test_the_command_line_reaches_the_configuration(monkeypatch):
    assert configured().adapter_weights == {}
    assert configured().engine.prefix_cache
    config = configured("--adapter-weight", "red=2.5", "--adapter-weight", "a/b=0.5", "--no-prefix-cache")
    assert config.adapter_weights == {"red": 2.5, "a/b": 0.5}
    assert not config.engine.prefix_cache
    monkeypatch.setenv("LORAPLEX_ADAPTER_WEIGHT", "red=3 base=2")
    assert configured().adapter_weights == {"red": 3, "base": 2}


@pytest.mark.parametrize("pair", ["red", "red=", "=2", "red=0", "red=-1", "red=nan", "red=inf", "red=two", ""])
def test_a_weight_that_is_none_is_refused_with_what_was_expected(pair):
    with pytest.raises(ValueError, match=f"adapter-weight is '{pair}', expected NAME=NUMBER"):
        read_adapter_weights([pair])


def test_a_name_twice_is_refused():
    with pytest.raises(ValueError, match="'red' twice"):
        read_adapter_weights(["red=1", "red=2"])


def test_weights_go_with_requests_and_the_cache_is_counted(tmp_path, base_folder, adapter_folders):
    with Registry(tmp_path / "registry") as registry, ExitStack() as stack:
        for name in ("red", "green"):
            registry.push(name, adapter_folders[name], base=base_folder)
        app = create_app(
            ServerConfig(
                base=str(base_folder), quantization="none", device="cpu", dtype="float32", registry=str(registry.root),
                adapter_weights={"red": 2.5, "base": 0.5}, engine=EngineConfig(page_tokens=4),
            )
        )  # fmt: skip
        client = stack.enter_context(httpx.Client(base_url=stack.enter_context(serving(app)), timeout=60))
        engine, weights = app.state.service.engine, {}
        add = engine.add
        engine.add = lambda request: weights.update({request.adapter: request.weight}) or add(request)
        for adapter in ("red", "red:1", "green", None):
            body = {"prompt": list(range(1, 11)), "temperature": 0, "max_tokens": 2, "adapter": adapter}
            assert client.post("/v1/completions", json=body).status_code == 200
        seen = client.get("/metrics").text
        assert sorted(weights.values()) == [0.5, 1.0, 2.5]
        assert weights[registry.resolve("red").digest] == 2.5
    assert 'lora_prefix_cache_queries_total{adapter="red"} 20.0' in seen
    assert 'lora_prefix_cache_hits_total{adapter="red"} 8.0' in seen
    assert 'lora_prefix_cache_queries_total{adapter="green"} 10.0' in seen
    assert 'lora_prefix_cache_hits_total{adapter="green"} 0.0' in seen
    assert 'lora_prefix_cache_hits_total{adapter="base"} 0.0' in seen
    assert 'lora_preemptions_total{adapter="red"} 0.0' in seen
