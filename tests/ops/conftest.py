"""What the tests of the operations files share: a Metrics that has seen a bit of everything, and the project root."""

from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex_server.metrics import Metrics, ServedVersion, Snapshot

ROOT = Path(__file__).resolve().parents[2]

SNAPSHOT = Snapshot(
    requests_running=2,
    requests_waiting=1,
    kv_cache_usage=0.25,
    kv_block_tokens=16,
    kv_blocks=512,
    resident={"device": 2, "host": 3},
    slots={"device": 8, "host": 64},
    served=(ServedVersion("quotes-tagger", "2", "sha256:" + "a" * 64),),
    max_loras=8,
    running_adapters=("quotes-tagger", "shout"),
    waiting_adapters=("late",),
    registry_up=True,
    registry_sync_lag_seconds=1.5,
)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def traffic() -> Callable[[Metrics], None]:
    """Touches every series once: two adapters and the base answer, one request fails, one adapter moves."""

    def once(metrics: Metrics) -> None:
        for adapter in ("base", "quotes-tagger", "shout"):
            metrics.request_finished(adapter, "stop", 12, 7, 0.01, 0.15, 0.6)
            metrics.inter_token(adapter, 0.02)
            metrics.kv_cache_used(adapter, 12, 4, 1)
        metrics.request_failed("unknown", "adapter_not_found")
        metrics.request_failed("quotes-tagger", "internal_error")
        for tier in ("device", "host"):
            metrics.cache_lookup(tier, hit=False)
            metrics.cache_lookup(tier, hit=True)
            metrics.evicted(tier)
        metrics.adapter_load("disk_to_host", 0.03)
        metrics.adapter_load("host_to_device", 0.004)
        metrics.adapter_load_failed("AdapterRefused")
        metrics.golden_check("refused")

    return once


@pytest.fixture
def busy(traffic: Callable[[Metrics], None]) -> Metrics:
    metrics = Metrics(build={"version": "1.2.3"})
    metrics.observe_state(lambda: SNAPSHOT)
    traffic(metrics)
    return metrics
