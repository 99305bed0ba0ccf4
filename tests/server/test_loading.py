"""Adapters loaded, kept and freed over HTTP."""

import shutil
import threading
from contextlib import ExitStack, suppress

import httpx
import pytest
from safetensors.torch import load_file, save_file
from serving import serving
from tiny import make_adapter, make_base

from loraplex_registry.registry import Registry
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig
from loraplex_server.engine.config import EngineConfig

GREEDY = {"prompt": "the quick", "temperature": 0, "max_tokens": 8}


@pytest.fixture
def registry(tmp_path, base_folder, adapter_folders):
    with Registry(tmp_path / "registry") as registry:
        for name, folder in adapter_folders.items():
            registry.push(name, folder, base=base_folder)
        yield registry


@pytest.fixture
def client(base_folder, registry):
    engine = EngineConfig(max_loras=2, max_host_loras=3)
    config = ServerConfig(
        base=str(base_folder), quantization="none", device="cpu", dtype="float32", registry=str(registry.root),
        engine=engine,
    )  # fmt: skip
    with ExitStack() as stack:
        app = create_app(config)
        client = stack.enter_context(httpx.Client(base_url=stack.enter_context(serving(app)), timeout=60))
        client.residency = app.state.service.engine.residency
        client.registry = app.state.service.registry
        yield client


def load(client, name, **more) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, **more})


def unload(client, name) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def text(client, adapter=None) -> str:
    answer = client.post("/v1/completions", json={**GREEDY, **({"adapter": adapter} if adapter else {})})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@pytest.mark.parametrize(("value", "answered"), [(3.38e38, 500), (3.4e38, 422)])
def test_weights_that_would_become_infinite_on_the_device_are_refused(
    base_folder, registry, adapter_folders, value, answered
):
    """A file in float32 on a base in bfloat16: what one adapter holds must not reach rows of another."""
    folder = registry.root.parent / "huge"
    shutil.copytree(adapter_folders["blue"], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    next(tensor for key, tensor in tensors.items() if "lora_B" in key)[0, 0] = value
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    registry.push("huge", folder, base=base_folder)
    config = ServerConfig(base=str(base_folder), device="cpu", registry=str(registry.root))
    with serving(create_app(config)) as url:
        answer = httpx.post(f"{url}/v1/completions", json={**GREEDY, "adapter": "huge"}, timeout=60)
        assert answer.status_code == answered, answer.text
        said = "beyond 3.39e+38, the most of torch.bfloat16" if answered == 422 else "numbers overflowed"
        assert said in answer.json()["error"]["message"]


def test_a_loaded_adapter_is_there_before_it_is_asked_for(client, registry):
    registry.promote("red:1", "production")
    digest = registry.resolve("red").digest
    for _ in range(2):  # again is no error
        answer = load(client, "red@production")
        assert answer.status_code == 200
        named = {"lora_name": "red@production", "adapter": "red:1", "adapter_digest": digest}
        assert answer.json() == {**named, "loaded": True, "pinned": False}
        assert client.residency.in_host == (digest,)
        assert client.residency.on_device == ()
    assert text(client, "red") != text(client)


def test_unloading_frees_both_tiers_and_the_next_request_loads_anew(client, registry):
    digest = registry.resolve("red").digest
    before = text(client, "red")
    assert digest in client.residency.on_device
    assert unload(client, "red:1").json()["unloaded"] is True
    assert client.residency.on_device == client.residency.in_host == ()
    assert unload(client, "red").json()["unloaded"] is False
    assert text(client, "red") == before


def test_an_adapter_in_flight_goes_with_its_last_request(client, registry):
    digest = registry.resolve("red").digest
    body = {**GREEDY, "adapter": "red", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert unload(client, "red").status_code == 200
        held = digest in client.residency.on_device
        rest = [line for line in lines if line]
    assert held, "it must be in flight, or this test proves nothing"
    assert rest[-1] == "data: [DONE]"
    assert client.residency.on_device == client.residency.in_host == ()


def test_a_kept_adapter_outlives_the_others(client, registry):
    digest = registry.resolve("red").digest
    assert load(client, "red", pinned=True).status_code == 200
    for name in ("green", "blue", "head", "green", "blue"):
        text(client, name)
        assert digest in client.residency.in_host
    refused = load(client, "green", pinned=True)
    assert refused.status_code == 422
    assert "at most 1 can be" in refused.json()["error"]["message"]
    assert unload(client, "red").status_code == 200
    assert load(client, "green", pinned=True).status_code == 200


def test_what_cannot_be_loaded_says_why(client, registry, tmp_path, monkeypatch):
    stranger = make_base(tmp_path / "stranger", seed=4)
    registry.push("stranger", make_adapter(tmp_path / "s", stranger), base=stranger)
    for pinned in (False, True):
        refused = load(client, "stranger", pinned=pinned)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "adapter_refused")
        assert "fingerprint" in refused.json()["error"]["message"]
    assert load(client, "red", pinned=True).status_code == 200, "one that never came is not kept"
    for ask in (load, unload):
        unknown = ask(client, "rad")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "adapter_not_found")
        assert unknown.json()["error"]["param"] == "lora_name"
    path = load(client, "red", lora_path="/etc")
    assert (path.status_code, path.json()["error"]["param"]) == (400, "lora_path")
    assert "push" in path.json()["error"]["message"]
    kept = client.post("/v1/unload_lora_adapter", json={"lora_name": "red", "pinned": True})
    assert (kept.status_code, kept.json()["error"]["param"]) == (400, "pinned")
    for body, param in (({}, "lora_name"), ({"lora_name": 5}, "lora_name"), ({"lora_nam": "red"}, "lora_nam")):
        answer = client.post("/v1/load_lora_adapter", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_who_stops_waiting_for_a_load_holds_up_nobody(client, registry, monkeypatch):
    fetch, let_go = client.registry.fetch, threading.Event()
    monkeypatch.setattr(client.registry, "fetch", lambda *args: let_go.wait(30) and fetch(*args))
    try:
        with suppress(httpx.ReadTimeout):
            client.post("/v1/load_lora_adapter", json={"lora_name": "red", "pinned": True}, timeout=0.3)
        assert text(client)
    finally:
        let_go.set()
    assert load(client, "green", pinned=True).status_code == 200, "what nobody waited for is not kept"
