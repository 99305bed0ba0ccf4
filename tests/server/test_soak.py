"""Minutes of mixed load on a real server: every answer right, nobody without one, and nothing left behind.

``LORAPLEX_SOAK_SECONDS`` says how long, 600 by default: pytest -m slow tests/server/test_soak.py --log-cli-level=INFO
"""

import asyncio
import gc
import logging
import os
import threading
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import httpx
import psutil
import pytest
import torch
from oracle_process import Oracle
from serving import serving
from starlette.applications import Starlette
from storm import LONGEST, Storm
from tiny import make_adapter, make_base

from loraplex_registry.registry import Registry
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig
from loraplex_server.engine.config import EngineConfig
from loraplex_server.service import Service

log = logging.getLogger(__name__)

SECONDS = float(os.environ.get("LORAPLEX_SOAK_SECONDS", "600"))
VERSIONS = 3  # of each adapter: the first is there at the start, the others are pushed meanwhile
GROWTH_BYTES = 24 << 20  # most that memory may grow by after the warm-up, a quarter of the time
ADAPTERS = {
    "all": {"rank": 4},
    "thick": {"rank": 16, "targets": ["q_proj", "k_proj", "v_proj"]},
    "thin": {"rank": 1, "targets": ["down_proj"]},
    "attention": {"rank": 8, "targets": ["q_proj", "v_proj"], "lora_alpha": 64},
    "rs": {"rank": 2, "targets": ["down_proj", "gate_proj"], "use_rslora": True},
    "head": {"rank": 3, "targets": ["lm_head", "o_proj"]},
    "strong": {"rank": 5, "targets": ["gate_proj", "k_proj"], "strength": 6},
    "patterns": {"rank": 4, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "mlp": {"rank": 12, "targets": ["gate_proj", "up_proj", "down_proj"]},
    "key": {"rank": 2, "targets": ["k_proj"], "strength": 8},
    "one-layer": {"rank": 6, "targets": ["o_proj", "q_proj"], "layers_to_transform": [1]},
    "wide": {"rank": 64, "targets": ["up_proj"], "strength": 1},
}
# Small enough that adapters, requests and pages are always in each other's way.
TIGHT = EngineConfig(
    max_loras=3, max_host_loras=5, max_rows=8, max_waiting=16, step_tokens=48, kv_cache_bytes=16 * 16 * 512
)
CLIENTS = 24


class Memory(NamedTuple):
    """What the process holds while nothing runs and no adapter is loaded."""

    resident_bytes: int
    tensors: int
    threads: int


@pytest.fixture
def folders(tmp_path, base_folder) -> dict[str, list[Path]]:
    """The versions of each adapter, made before a server runs: peft patches torch's modules while it builds."""
    return {
        name: [
            make_adapter(tmp_path / f"{name}-{version}", base_folder, seed=100 * version + at, **lora)
            for version in range(VERSIONS)
        ]
        for at, (name, lora) in enumerate(ADAPTERS.items())
    }


@pytest.fixture
def registry(tmp_path, base_folder):
    """One that holds only what cannot be served."""
    with Registry(tmp_path / "registry") as registry:
        stranger = make_base(tmp_path / "stranger", seed=5)
        registry.push("stranger", make_adapter(tmp_path / "strange", stranger), base=stranger)
        broken = registry.push("broken", make_adapter(tmp_path / "broken", base_folder, seed=77), base=base_folder)
        registry.push("fat", make_adapter(tmp_path / "fat", base_folder, rank=65), base=base_folder)
        weights = next(f for f in registry.manifest(broken.digest).files if f.path.endswith(".safetensors"))
        blob = next(registry.root.rglob(weights.sha256))
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.chmod(0o644)
        blob.write_bytes(data)
        yield registry


@pytest.mark.slow
def test_a_storm_is_answered_right_and_leaves_nothing_behind(base_folder, folders, registry, caplog):
    config = ServerConfig(
        base=str(base_folder), quantization="none", device="cpu", dtype="float32",
        registry=str(registry.root), engine=TIGHT,
    )  # fmt: skip
    app = create_app(config)
    service: Service = app.state.service
    every = [folder for versions in folders.values() for folder in versions]
    caplog.set_level(logging.WARNING, "httpx")  # its line for each request would be kept, and grow
    with Oracle(base_folder, every, LONGEST) as oracle, serving(app) as url:
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)
        storm = Storm(
            url, service.base.id, registry, service.base.description, service.base.tokenizer, oracle,
            spares=[(name, folders[name][version]) for version in range(1, VERSIONS) for name in ADAPTERS],
            refused={"stranger": "of another base", "broken": "damaged", "fat": "too high a rank"},
            clients=CLIENTS,
        )  # fmt: skip
        for at, name in enumerate(ADAPTERS):
            storm.push(name, folders[name][0])
            storm.promote(name, 1, "live")
            if at % 2:
                storm.promote(name, 1, "production")
        first, last, resident = asyncio.run(_weather(storm, app, url))
        seen = _counters(url)
    told = sorted({**storm.seen, **seen}.items())
    log.info("in %g s: %s", SECONDS, ", ".join(f"{what} {number:g}" for what, number in told))
    log.info("answers/s %.1f, tokens/s %.1f", storm.seen["answers"] / SECONDS, storm.seen["tokens"] / SECONDS)
    log.info("after the warm-up %s, at the end %s", first, last)

    for what in (
        "answers", "streams", "greedy answers checked", "scored answers checked", "seeded answers", "sampled answers",
        "alias moves", "pushes", "loads by request", "unloads by request", "scrapes", "overloaded", "deadlines",
        "disconnects before the answer", "disconnects within a stream", "disconnects within a body",
        "disconnects before a load was done",
        *(f"bad: {story}" for story in storm._mistakes),
    ):  # fmt: skip
        assert storm.seen[what], f"the storm was without {what}: {storm.seen}"
    for what, number in seen.items():
        assert number, f"the server saw no {what}: {seen}"
    assert storm.seen["pushes"] == VERSIONS * len(ADAPTERS)
    assert storm.seen["ties"] < 0.1 * storm.seen["greedy answers checked"]
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not errors

    assert last.tensors == first.tensors
    assert last.threads <= first.threads
    assert last.resident_bytes - first.resident_bytes < GROWTH_BYTES
    third = len(resident) // 3
    assert median(resident[-third:]) - median(resident[:third]) < GROWTH_BYTES


async def _weather(storm: Storm, app: Starlette, url: str) -> tuple[Memory, Memory, list[int]]:
    """A storm to warm up, a calm, the storm itself, a calm: the memory of both calms, and of every second between."""
    resident: list[int] = []

    async def watch() -> None:
        while True:
            resident.append(psutil.Process().memory_info().rss)
            await asyncio.sleep(1)

    await storm.blow(SECONDS / 4)
    first = await asyncio.to_thread(_calm, app, url, storm)
    watching = asyncio.create_task(watch())
    await storm.blow(SECONDS * 3 / 4)
    watching.cancel()
    return first, await asyncio.to_thread(_calm, app, url, storm), resident


def _calm(app: Starlette, url: str, storm: Storm) -> Memory:
    """Nobody asks any more: wait for the end of what was hung up on, then look for what was left behind."""
    service: Service = app.state.service
    engine, residency = service.engine, service.engine.residency
    deadline = time.monotonic() + 120
    while (engine.has_work or residency.loading or service.loop._waiting) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert service.loop.alive
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert not service.loop._waiting
    assert engine.pages.free_pages == engine.pages.pages
    assert not engine.pages._held
    assert not engine.pages._chains
    assert not residency._pins
    assert not residency._leaving
    assert not residency.kept
    assert not engine._detokenizers
    assert not engine._sampler._generators
    with httpx.Client(base_url=url, timeout=120) as client:
        running = client.get("/metrics").text
        for gauge in ("lora_requests_running", "lora_requests_waiting", "lora_kv_cache_usage_ratio"):
            assert f"{gauge} 0.0" in running
        for name, digests in storm.versions.items():
            for digest in digests:
                answer = client.post("/v1/unload_lora_adapter", json={"lora_name": f"{name}@{digest}"})
                assert answer.status_code == 200, answer.text
        assert 'lora_adapters_resident{tier="host"} 0.0' in client.get("/metrics").text
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors = sum(not tensor.is_meta for tensor in found)  # those without memory wait for the next adapter
    pooled = ("AnyIO", "asyncio")  # bounded, and as many as ever were busy at once
    threads = sum(not thread.name.startswith(pooled) for thread in threading.enumerate())
    return Memory(psutil.Process().memory_info().rss, tensors, threads)


def _counters(url: str) -> dict[str, float]:
    """What the server counted, summed over its adapters."""
    series = {
        "evictions from the device": 'lora_adapter_cache_evictions_total{tier="device"}',
        "evictions from the host": 'lora_adapter_cache_evictions_total{tier="host"}',
        "loads to the host": 'lora_adapter_load_seconds_count{transition="disk_to_host"}',
        "loads to the device": 'lora_adapter_load_seconds_count{transition="host_to_device"}',
        "failed loads": "lora_adapter_load_failures_total{",
        "preemptions": "lora_preemptions_total{",
        "prefix hits": "lora_prefix_cache_hits_total{",
    }
    lines = httpx.get(f"{url}/metrics", timeout=120).text.splitlines()
    assert not [line for line in lines if 'code="internal_error"' in line]
    return {
        what: sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
        for what, name in series.items()
    }
