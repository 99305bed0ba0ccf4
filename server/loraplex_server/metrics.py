"""What the server counts, by adapter and by tier. Owns every series and the bound on their number.

Knows neither HTTP nor torch: the server tells it what happened, and hands it a `Snapshot` when a scrape asks for one.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

BASE = "base"  # the label of requests that asked for no adapter
OTHER = "other"  # the label of every adapter beyond the bound
UNKNOWN = "unknown"  # the label of errors whose adapter did not resolve

# Edges sit on the thresholds people promise (200 ms and 1 s to the first token, 50 ms between tokens): a burn rate
# read off an edge is exact. Eleven each, because a scrape costs buckets x adapters.
_FIRST_TOKEN_SECONDS = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 1, 2, 5, 10, 30)
_INTER_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_DURATION_SECONDS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120)
_QUEUE_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30)
_LOAD_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30)


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """One adapter version the server holds; `adapter` is its name without the version."""

    adapter: str
    version: str
    digest: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How the server stands at one moment. Tiers are short fixed names: "device", "host", "disk"."""

    requests_running: int = 0
    requests_waiting: int = 0
    kv_cache_usage: float = 0.0  # 0..1
    kv_block_tokens: int = 0
    kv_blocks: int = 0
    resident: Mapping[str, int] = field(default_factory=dict)  # tier -> adapters held
    slots: Mapping[str, int] = field(default_factory=dict)  # tier -> adapters it can hold; no entry: unbounded
    served: tuple[ServedVersion, ...] = ()
    max_loras: int = 0
    running_adapters: tuple[str, ...] = ()  # resident on the device and ready, by the name a request uses
    waiting_adapters: tuple[str, ...] = ()  # asked for by a queued request and not resident
    registry_up: bool | None = None  # None: no registry is configured
    registry_sync_lag_seconds: float | None = None  # age of the newest registry snapshot seen


class Metrics:
    """The series of one server. Every method may be called from any thread.

    At most `max_adapters` adapter names get series of their own; the rest share `adapter="other"`. Callers pass only
    names that resolved, "base", or "unknown": a name a stranger typed never becomes a label.
    """

    def __init__(self, *, max_adapters: int = 100, build: Mapping[str, str] | None = None) -> None:
        """`build` adds labels to lora_build_info (base, quantization, device) beside the installed version."""
        if max_adapters < 0:
            raise ValueError(f"max_adapters={max_adapters}: expected 0 or more adapter names")
        self._max_adapters = max_adapters
        self._named: set[str] = set()
        self._lock = threading.Lock()
        self._state: Callable[[], Snapshot] = Snapshot
        self._registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=self._registry)

        def histogram(name: str, help: str, label: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, (label,), registry=self._registry, buckets=buckets)

        self._requests = counter("lora_requests_total", "Requests answered.", "adapter", "finish_reason")
        self._errors = counter("lora_request_errors_total", "Requests refused or failed.", "adapter", "code")
        self._prompt_tokens = counter("lora_prompt_tokens_total", "Prompt tokens of answered requests.", "adapter")
        self._generation_tokens = counter("lora_generation_tokens_total", "Tokens generated.", "adapter")
        self._prefix_queries = counter(
            "lora_prefix_cache_queries_total", "Prompt tokens looked for in the prefix cache.", "adapter"
        )
        self._prefix_hits = counter("lora_prefix_cache_hits_total", "Prompt tokens found there.", "adapter")
        self._preemptions = counter(
            "lora_preemptions_total", "Times a request lost its KV pages and was computed again.", "adapter"
        )
        self._first_token = histogram(
            "lora_time_to_first_token_seconds", "Arrival to first token.", "adapter", _FIRST_TOKEN_SECONDS
        )
        self._inter_token = histogram(
            "lora_inter_token_latency_seconds", "Between two tokens of one request.", "adapter", _INTER_TOKEN_SECONDS
        )
        self._duration = histogram(
            "lora_request_duration_seconds", "Arrival to last token.", "adapter", _DURATION_SECONDS
        )
        self._queue = histogram("lora_queue_time_seconds", "Arrival to first scheduling.", "adapter", _QUEUE_SECONDS)
        self._by_adapter: tuple[Counter | Histogram, ...] = (
            self._requests,
            self._errors,
            self._prompt_tokens,
            self._generation_tokens,
            self._prefix_queries,
            self._prefix_hits,
            self._preemptions,
            self._first_token,
            self._inter_token,
            self._duration,
            self._queue,
        )
        self._load = histogram(
            "lora_adapter_load_seconds", "Moving one adapter between tiers.", "transition", _LOAD_SECONDS
        )
        self._load_failures = counter("lora_adapter_load_failures_total", "Adapters that did not load.", "reason")
        self._golden_checks = counter(
            "lora_golden_checks_total", "Adapters whose golden prompts were computed.", "result"
        )
        self._lookups = counter("lora_adapter_cache_lookups_total", "Times a tier was asked for an adapter.", "tier")
        self._hits = counter("lora_adapter_cache_hits_total", "Times the tier held it.", "tier")
        self._evictions = counter("lora_adapter_cache_evictions_total", "Adapters a tier gave up for room.", "tier")
        self._overflow = counter(
            "lora_metrics_label_overflow_total", 'Observations filed under adapter="other" for lack of a label.'
        )
        Info("lora_build", "What is running.", registry=self._registry).info(
            {"version": _installed_version(), **(build or {})}
        )
        self._registry.register(_Now(self._gauges))

    # What happened

    def request_finished(
        self,
        adapter: str,
        finish_reason: str,
        prompt_tokens: int,
        generated_tokens: int,
        queued_seconds: float | None,
        first_token_seconds: float | None,
        duration_seconds: float,
    ) -> None:
        """One request ended with an answer or a cancellation; None for a stage that it never reached."""
        label = self.label(adapter)
        self._requests.labels(label, finish_reason).inc()
        self._prompt_tokens.labels(label).inc(prompt_tokens)
        self._generation_tokens.labels(label).inc(generated_tokens)
        self._duration.labels(label).observe(duration_seconds)
        if queued_seconds is not None:
            self._queue.labels(label).observe(queued_seconds)
        if first_token_seconds is not None:
            self._first_token.labels(label).observe(first_token_seconds)

    def kv_cache_used(self, adapter: str, looked_up_tokens: int, cached_tokens: int, preemptions: int) -> None:
        """How one request that ended fared in the KV cache."""
        label = self.label(adapter)
        self._prefix_queries.labels(label).inc(looked_up_tokens)
        self._prefix_hits.labels(label).inc(cached_tokens)
        self._preemptions.labels(label).inc(preemptions)

    def inter_token(self, adapter: str, seconds: float) -> None:
        self._inter_token.labels(self.label(adapter)).observe(seconds)

    def request_failed(self, adapter: str, code: str) -> None:
        """`code` is one of the server's own error codes; `adapter` is "unknown" when it did not resolve."""
        self._errors.labels(self.label(adapter), code).inc()

    def adapter_load(self, transition: str, seconds: float) -> None:
        """`transition` names the two tiers, as in "disk_to_host"."""
        self._load.labels(transition).observe(seconds)

    def adapter_load_failed(self, reason: str) -> None:
        self._load_failures.labels(reason).inc()

    def golden_check(self, result: str) -> None:
        """`result` is passed, other_quantization, refused or failed."""
        self._golden_checks.labels(result).inc()

    def cache_lookup(self, tier: str, hit: bool) -> None:
        self._lookups.labels(tier).inc()
        self._hits.labels(tier).inc(int(hit))

    def evicted(self, tier: str) -> None:
        self._evictions.labels(tier).inc()

    def forget(self, adapter: str) -> None:
        """Drop the adapter's series (it was deleted, or is long idle) and free its label for another name."""
        with self._lock:
            if adapter not in self._named:  # "base", "other" and "unknown" hold no label of their own to free
                return
            self._named.discard(adapter)
            for metric in self._by_adapter:
                metric.remove_by_labels({"adapter": adapter})

    def label(self, name: str) -> str:
        """The value of the adapter label for this name: itself for the first `max_adapters` names, then "other"."""
        if name in self._named or name in (BASE, OTHER, UNKNOWN):
            return name
        with self._lock:
            if name in self._named:
                return name
            if len(self._named) < self._max_adapters:
                self._named.add(name)
                return name
        self._overflow.inc()
        return OTHER

    # How things are

    def observe_state(self, read: Callable[[], Snapshot]) -> None:
        """`read` is called once per scrape, from the scraping thread, for the gauges."""
        self._state = read

    def render(self) -> tuple[bytes, str]:
        """The scrape body and its content type (text format 0.0.4). Milliseconds at 100 adapters: call off the loop."""
        return generate_latest(_WithoutCreated(self._registry)), CONTENT_TYPE

    @staticmethod
    def render_routing(now: Snapshot) -> bytes:
        """What a Gateway API inference picker reads to route by adapter, as text format 0.0.4: one series per name.

        Served with the content type of `render`. Names and labels are those of the Gateway API Inference Extension's
        model server protocol. A picker scrapes every 50 ms, so this holds nothing else.
        """
        cache = GaugeMetricFamily(
            "vllm:cache_config_info", "KV cache geometry; always 1.", labels=("block_size", "num_gpu_blocks")
        )
        cache.add_metric((str(now.kv_block_tokens), str(now.kv_blocks)), 1)
        loras = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters ready and waited for; the value is the Unix time.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        loras.add_metric(
            (str(now.max_loras), ",".join(now.running_adapters), ",".join(now.waiting_adapters)), time.time()
        )
        families = (
            _gauge("vllm:num_requests_running", "Requests in the current batch.", now.requests_running),
            _gauge("vllm:num_requests_waiting", "Requests queued.", now.requests_waiting),
            _gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", now.kv_cache_usage),
            cache,
            loras,
        )
        return generate_latest(_Now(lambda: families))

    def _gauges(self) -> Iterator[Metric]:
        now = self._state()
        yield _gauge("lora_requests_running", "Requests in the current batch.", now.requests_running)
        yield _gauge("lora_requests_waiting", "Requests queued.", now.requests_waiting)
        yield _gauge("lora_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1.", now.kv_cache_usage)
        yield _gauges_by("tier", "lora_adapters_resident", "Adapters the tier holds.", now.resident)
        yield _gauges_by("tier", "lora_adapter_slots", "Adapters the tier can hold.", now.slots)
        served = GaugeMetricFamily(
            "lora_adapter_info", "Adapter versions the server holds; always 1.", labels=("adapter", "version", "digest")
        )
        for held in now.served[: self._max_adapters]:
            served.add_metric((held.adapter, held.version, held.digest), 1)
        yield served
        if now.registry_up is not None:
            yield _gauge("lora_registry_up", "1 when the last call to the registry worked.", int(now.registry_up))
        if now.registry_sync_lag_seconds is not None:
            lag = now.registry_sync_lag_seconds
            yield _gauge("lora_registry_sync_lag_seconds", "Age of the newest registry snapshot seen.", lag)


def _installed_version() -> str:
    try:
        return version("loraplex")
    except PackageNotFoundError:  # run from a source tree
        return "source"


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=value)


def _gauges_by(label: str, name: str, help: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(name, help, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


class _Now(Collector):
    """Families made at scrape time, so that an old label set cannot linger."""

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families()


class _WithoutCreated(Collector):
    """Text format 0.0.4 has no place for OpenMetrics' creation times: left in, they double the counters' series.

    prometheus_client's own switch for this is global to the process, which is not ours to set.
    """

    def __init__(self, inner: Collector) -> None:
        self._inner = inner

    def collect(self) -> Iterator[Metric]:
        for family in self._inner.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
