"""The server on a registry behind a URL: the same answers, aliases that move, and what happens when it goes away."""

from contextlib import ExitStack

import httpx
from serving import serving

from loraplex_registry.http import create_app as registry_app
from loraplex_registry.registry import Registry
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig


def test_adapters_come_over_http_and_a_registry_that_goes_away_is_said(tmp_path, base_folder, adapter_folders):
    with Registry(tmp_path / "registry") as registry, ExitStack() as stack:
        registry.push("red", adapter_folders["red"], base=base_folder)
        registry.promote("red:1", "production")
        registry_server = ExitStack()
        where = registry_server.enter_context(serving(registry_app(registry)))
        stack.enter_context(registry_server)
        config = ServerConfig(str(base_folder), quantization="none", dtype="float32", device="cpu", registry=where)
        url = stack.enter_context(serving(create_app(config)))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        body = {"prompt": "the quick", "adapter": "red@production", "temperature": 0}

        first = client.post("/v1/completions", json=body).json()
        assert first["adapter"] == "red:1"
        registry.push("red", adapter_folders["green"], base=base_folder)
        registry.promote("red:2", "production")
        second = client.post("/v1/completions", json=body).json()
        assert second["adapter"] == "red:2"
        assert second["choices"][0]["text"] != first["choices"][0]["text"]

        registry_server.close()
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "registry_unavailable"
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200, "the base needs no registry"
