"""Metrics through its public door: what a scrape says after something happened, and that the label stays bounded."""

import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loraplex_server.metrics import Metrics, Snapshot

APT = "apt-get install -y prometheus"


def series(body: bytes) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name -> sorted label pairs (as name=value) -> value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            labels = tuple(sorted(f"{key}={value}" for key, value in sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), f"{sample.name}{labels} is served twice"
            found[sample.name][labels] = sample.value
    return found


def test_a_request_is_counted_once_by_adapter_and_finish_reason(busy: Metrics):
    got = series(busy.render()[0])
    assert got["lora_requests_total"][("adapter=quotes-tagger", "finish_reason=stop")] == 1
    assert got["lora_prompt_tokens_total"][("adapter=base",)] == 12
    assert got["lora_generation_tokens_total"][("adapter=shout",)] == 7
    assert got["lora_time_to_first_token_seconds_sum"][("adapter=shout",)] == 0.15
    assert got["lora_time_to_first_token_seconds_bucket"][("adapter=shout", "le=0.1")] == 0
    assert got["lora_time_to_first_token_seconds_bucket"][("adapter=shout", "le=0.2")] == 1
    assert got["lora_request_errors_total"][("adapter=unknown", "code=adapter_not_found")] == 1


def test_a_request_that_never_ran_leaves_no_latency():
    metrics = Metrics()
    metrics.request_finished("a", "cancelled", 3, 0, None, None, 0.5)
    got = series(metrics.render()[0])
    assert got["lora_requests_total"] == {("adapter=a", "finish_reason=cancelled"): 1}
    assert "lora_time_to_first_token_seconds_count" not in got
    assert "lora_queue_time_seconds_count" not in got
    assert got["lora_request_duration_seconds_count"][("adapter=a",)] == 1


def test_a_miss_is_a_lookup_without_a_hit():
    metrics = Metrics()
    metrics.cache_lookup("device", hit=False)
    got = series(metrics.render()[0])
    assert got["lora_adapter_cache_lookups_total"] == {("tier=device",): 1}
    assert got["lora_adapter_cache_hits_total"] == {("tier=device",): 0}  # present, so that a ratio has a value


def test_gauges_are_read_at_scrape_time():
    metrics, now = Metrics(), Snapshot(requests_running=1, resident={"device": 1})
    metrics.observe_state(lambda: now)
    assert series(metrics.render()[0])["lora_requests_running"] == {(): 1}
    now = Snapshot(requests_running=4, resident={"host": 2})
    got = series(metrics.render()[0])
    assert got["lora_requests_running"] == {(): 4}
    assert got["lora_adapters_resident"] == {("tier=host",): 2}  # the old label set is gone


def test_without_a_registry_it_is_neither_up_nor_down():
    got = series(Metrics().render()[0])
    assert "lora_registry_up" not in got
    assert "lora_registry_sync_lag_seconds" not in got


def test_the_adapter_label_is_bounded():
    metrics = Metrics(max_adapters=2)
    for name in ("a", "b", "c", "d", "a", "base"):
        metrics.request_finished(name, "stop", 1, 1, 0.1, 0.1, 0.1)
    got = series(metrics.render()[0])
    adapters = {labels[0] for labels in got["lora_requests_total"]}
    assert adapters == {"adapter=a", "adapter=b", "adapter=other", "adapter=base"}
    assert got["lora_requests_total"][("adapter=other", "finish_reason=stop")] == 2
    assert got["lora_metrics_label_overflow_total"][()] == 2


def test_the_bound_holds_under_threads():
    metrics = Metrics(max_adapters=5)
    threads = [
        threading.Thread(target=lambda n=n: [metrics.inter_token(f"a{i}", 0.01) for i in range(n, n + 40)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = series(metrics.render()[0])["lora_inter_token_latency_seconds_count"]
    assert len(counts) == 6  # five names and "other"
    assert sum(counts.values()) == 8 * 40


def test_forget_drops_the_series_and_frees_the_label():
    metrics = Metrics(max_adapters=1)
    metrics.request_finished("a", "stop", 1, 1, 0.1, 0.1, 0.1)
    metrics.request_failed("a", "engine_failed")
    metrics.inter_token("a", 0.1)
    metrics.forget("a")
    assert b'"a"' not in metrics.render()[0]
    assert metrics.label("b") == "b"
    assert metrics.label("a") == "other"


def test_forget_leaves_the_base_and_strangers_alone():
    metrics = Metrics()
    metrics.request_finished("base", "stop", 1, 1, 0.1, 0.1, 0.1)
    metrics.forget("base")
    metrics.forget("never-seen")
    assert series(metrics.render()[0])["lora_requests_total"] == {("adapter=base", "finish_reason=stop"): 1}


def test_two_servers_in_one_process_count_apart():
    one, two = Metrics(), Metrics()
    one.adapter_load_failed("refused")
    assert "lora_adapter_load_failures_total" not in series(two.render()[0])


def test_a_negative_bound_is_refused():
    with pytest.raises(ValueError, match="max_adapters=-1"):
        Metrics(max_adapters=-1)


def test_the_build_says_what_runs():
    (labels,) = series(Metrics(build={"version": "1.2.3", "quantization": "nf4"}).render()[0])["lora_build_info"]
    assert labels == ("quantization=nf4", "version=1.2.3")


def test_it_is_plain_text_0_0_4_without_creation_times(busy: Metrics):
    body, content_type = busy.render()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert b"_created" not in body
    assert not re.search(rb"^\w*:", body, re.MULTILINE), "a colon is for recording rules"


def test_buckets_are_few(busy: Metrics):
    for name, samples in series(busy.render()[0]).items():
        if name.endswith("_bucket"):
            edges = {label for labels in samples for label in labels if label.startswith("le=")}
            assert 10 <= len(edges) <= 12, name


def test_a_scrape_at_the_bound_is_quick():
    metrics = Metrics()
    for n in range(100):
        metrics.request_finished(f"adapter-{n}", "stop", 1, 1, 0.1, 0.1, 0.1)
        metrics.inter_token(f"adapter-{n}", 0.1)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        metrics.render()
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5  # about 0.03 s on a laptop core: an order of magnitude means a bound was lost


def test_routing_has_exactly_one_series_of_each_name():
    now = Snapshot(
        requests_running=2,
        requests_waiting=3,
        kv_cache_usage=0.5,
        kv_block_tokens=16,
        kv_blocks=512,
        max_loras=8,
        running_adapters=("a", "ns/b"),
        waiting_adapters=("c",),
    )
    before = time.time()
    got = series(Metrics.render_routing(now))
    assert got["vllm:num_requests_running"] == {(): 2}
    assert got["vllm:num_requests_waiting"] == {(): 3}
    assert got["vllm:kv_cache_usage_perc"] == {(): 0.5}
    assert got["vllm:cache_config_info"] == {("block_size=16", "num_gpu_blocks=512"): 1}
    (labels,) = got["vllm:lora_requests_info"]
    assert labels == ("max_lora=8", "running_lora_adapters=a,ns/b", "waiting_lora_adapters=c")
    assert before <= got["vllm:lora_requests_info"][labels] <= time.time()
    assert len(got) == 5


def test_promtool_has_nothing_to_say_about_the_names(busy: Metrics):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip(APT)
    done = subprocess.run([promtool, "check", "metrics"], input=busy.render()[0], capture_output=True, check=False)
    assert (done.returncode, done.stdout.decode() + done.stderr.decode()) == (0, "")


def test_every_metric_is_documented(busy: Metrics, root: Path):
    families = text_string_to_metric_families(busy.render()[0].decode())
    served = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    routing = set(series(Metrics.render_routing(Snapshot())))
    page = (root / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `((?:lora_|vllm:)\w+)`", page, re.MULTILINE))
    assert documented == served | routing
