"""The registry at 10,000 adapters of 5 versions, in SQLite, beside sha256sum, cp and sync in the same run.

One function per bar; the server is `registry serve` in a process of its own. Writes bench/results/registry-DATE-….
Usage: scripts/bench registry [--only resolve,push] [--adapters N] [--catalog FOLDER] [--dry]
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
from report import write
from safetensors.numpy import save_file

from loraplex_registry.base import describe_base
from loraplex_registry.manifest import BaseRef
from loraplex_registry.registry import Registry
from loraplex_registry.version import Version

ROOT = Path(__file__).parents[1]
VERSIONS = 5
ASKED = 2000  # questions of a latency's percentiles
ROUNDS = 9  # of what is compared with plain tools, in turn
PULLS = 200
UPLOAD_BYTES = 4 << 30
PACKAGES = ("sqlalchemy", "starlette", "uvicorn", "httpx", "pydantic", "safetensors")


@dataclass(frozen=True)
class Outcome:
    """What was measured, the most it may be where there is a bar, and what helps to read it."""

    what: str
    found: float
    bar: float | None
    unit: str
    note: str = ""

    @property
    def verdict(self) -> str:
        return "no bar" if self.bar is None else "met" if self.found <= self.bar else "**not met**"

    def __str__(self) -> str:
        asked = "" if self.bar is None else f", bar {self.bar:g}"
        return f"{self.what}: {self.found:.3g} {self.unit}{asked}: {self.verdict}  {self.note}"


@dataclass(frozen=True)
class Lab:
    """A folder to work in, and another with a catalog of many adapters, filled once."""

    folder: Path
    crowded: Path
    adapters: int
    made: dict[str, Path] = field(default_factory=dict)

    def adapter(self, number: int) -> Path:
        """An adapter of 30 MB, another for each number."""
        return self._once(f"adapter-{number}", lambda to: write_adapter(to, number))

    @property
    def base(self) -> Path:
        return self._once("base", write_base)

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        if name not in self.made:
            make(self.folder / name)
            self.made[name] = self.folder / name
        return self.made[name]


# --- what is measured on ---

LAYERS, WIDTH, RANK = 22, 256, 96
MODULES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def write_base(folder: Path) -> None:
    """22 layers of 7 square modules: as many tensors as TinyLlama has."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    weight = np.ones((WIDTH, WIDTH), np.float16)
    tensors = {f"model.layers.{i}.{module}.weight": weight for i in range(LAYERS) for module in MODULES}
    save_file(tensors, folder / "model.safetensors")


def write_adapter(folder: Path, number: int) -> None:
    """30 MB of random weights on every module of the base."""
    folder.mkdir()
    random, tensors = np.random.default_rng(number), {}
    for i in range(LAYERS):
        for module in MODULES:
            key = f"base_model.model.model.layers.{i}.{module}"
            tensors[f"{key}.lora_A.weight"] = random.standard_normal((RANK, WIDTH), np.float32)
            tensors[f"{key}.lora_B.weight"] = random.standard_normal((WIDTH, RANK), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2] for module in MODULES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "bench/base"}))


def fill(folder: Path, adapters: int) -> None:
    """Versions that differ in base, rank, metrics and time, and `production` of every name on its third.

    Through Catalog.publishing and promote, a transaction each; without files, which no question here reads.
    """
    with Registry(folder) as registry:
        if len(registry.catalog.aliases()) == adapters:
            return
        print(f"filling a catalog with {adapters * VERSIONS:,} versions …", flush=True)
        began, start = datetime(2026, 1, 1, tzinfo=UTC), time.monotonic()
        with registry.catalog.publishing() as add:
            for order in range(adapters * VERSIONS):
                add(draft(order % adapters, order, began + timedelta(minutes=order)))
        for adapter in range(adapters):
            registry.promote(f"team-{adapter % 50}/adapter-{adapter}:3", "production", who="bench")
        print(f"… in {time.monotonic() - start:.0f} s", flush=True)


def draft(adapter: int, order: int, at: datetime) -> Version:
    return Version(
        name=f"team-{adapter % 50}/adapter-{adapter}",
        number=0,
        digest="sha256:" + hashlib.sha256(str(order).encode()).hexdigest(),
        base=BaseRef(f"org/base-{adapter % 7}", None, "sha256:" + "0" * 64, "nf4"),
        rank=(8, 16, 32, 64)[adapter % 4],
        targets=("down_proj", "q_proj", "up_proj"),
        bytes=30_000_000,
        metrics={"f1": order * 7919 % 10_000 / 10_000, "loss": order % 97 / 10},
        parent=None,
        created_at=at,
        created_by=f"person-{adapter % 20}",
        message=f"try {order // 7}",
    )


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, int]]:
    """`registry serve` of a folder in a process of its own: its URL and its number."""
    code = "from loraplex_registry.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, "--registry", str(folder), "serve", "--port", "0"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        try:
            yield server.stderr.readline().split()[-1], server.pid
        finally:
            server.terminate()


# --- the bars ---


def resolve(lab: Lab) -> Iterator[Outcome]:
    """A bare name, a number, an alias and a digest, in turn, all over the catalog."""
    with Registry(lab.crowded) as registry:
        refs = list(references(registry, lab.adapters))
        taken = [timed(lambda ref=ref: registry.resolve(ref)) for ref in refs]
    yield percentile("resolve in process, p99", taken, 1.0)
    with serving(lab.crowded) as (url, _), httpx.Client(base_url=url) as http:
        taken = [timed(lambda ref=ref: answered(http, "/v1/resolve", ref=ref)) for ref in refs]
    yield percentile("resolve over HTTP, p99", taken, 5.0)


def references(registry: Registry, adapters: int) -> Iterator[str]:
    random = np.random.default_rng(0)
    for order, adapter in enumerate(random.integers(0, adapters, ASKED)):
        name = f"team-{adapter % 50}/adapter-{adapter}"
        digest = "sha256:" + hashlib.sha256(str(adapter).encode()).hexdigest()
        yield (name, f"{name}:{1 + order % VERSIONS}", f"{name}@production", f"{name}@{digest}")[order % 4]


def pages(lab: Lab) -> Iterator[Outcome]:
    """Pages of 100 of every long answer, the first and the two after it."""
    name = "team-7/adapter-7"
    asked = {
        "list": "/v1/adapters",
        "versions": f"/v1/adapters/{name}/versions",
        "search by metric": "/v1/search?q=f1>0.8 base:base-3&sort=-f1",
        "search by word": "/v1/search?q=name:adapter-99",
        "audit": "/v1/audit",
        "audit of a name": f"/v1/audit?name={name}",
    }
    with serving(lab.crowded) as (url, _), httpx.Client(base_url=url, timeout=60) as http:
        for what, route in asked.items():
            taken = []
            for _ in range(20):
                cursor: dict[str, str] = {}
                for _ in range(3):
                    url_with = httpx.URL(route).copy_merge_params({"limit": "100"} | cursor)
                    start = time.perf_counter()
                    answer = http.get(url_with).raise_for_status().json()
                    taken.append(time.perf_counter() - start)
                    if not answer.get("next"):
                        break
                    cursor = {"cursor": answer["next"]}
            bar = None if "word" in what else 20.0  # the issue asks it of a list; words in names have no index
            yield percentile(f"a page of {what}, p95", taken, bar, 95)


def push(lab: Lab) -> Iterator[Outcome]:
    """A push of 30 MB, new bytes every time, beside sha256sum, cp and sync of the same file; in turns."""
    ours, tools = [], []
    base = describe_base(lab.base)
    with Registry(lab.folder / "pushed") as registry:
        for number in range(ROUNDS):
            folder = lab.adapter(number)
            turns = [
                lambda folder=folder: ours.append(timed(lambda: registry.push("bench", folder, base=base))),
                lambda folder=folder, number=number: tools.append(
                    plain_copy(folder / "adapter_model.safetensors", lab.folder / f"plain-{number}")
                ),
            ]
            for turn in turns if number % 2 else turns[::-1]:
                turn()
    yield beside("push of 30 MB, to sha256sum + cp + sync", ours, tools, 1.5)


def pull(lab: Lab) -> Iterator[Outcome]:
    """A pull of 30 MB to a new folder, beside sha256sum, cp and sync of the same file; in turns."""
    ours, tools = [], []
    with Registry(lab.folder / "pulled-from") as registry:
        version = registry.push("bench", lab.adapter(0), base=lab.base)
        entry = next(entry for entry in registry.manifest(version.digest).files if entry.bytes > 1 << 20)
        blob = lab.folder / "pulled-from" / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256
        for number in range(ROUNDS):
            turns = [
                lambda number=number: ours.append(
                    timed(lambda: registry.fetch(version.digest, lab.folder / f"pulled-{number}"))
                ),
                lambda number=number: tools.append(plain_copy(blob, lab.folder / f"plainly-{number}")),
            ]
            for turn in turns if number % 2 else turns[::-1]:
                turn()
    yield beside("pull of 30 MB, to sha256sum + cp + sync", ours, tools, 1.3)


def shared(lab: Lab) -> Iterator[Outcome]:
    """200 clients begin to pull one adapter at once: what the server's process read of files meanwhile."""
    folder = lab.folder / "shared"
    with Registry(folder) as registry:
        version = registry.push("bench", lab.adapter(0), base=lab.base)
        entry = next(entry for entry in registry.manifest(version.digest).files if entry.bytes > 1 << 20)
    with serving(folder) as (url, pid), ThreadPoolExecutor(PULLS) as pool:
        httpx.get(f"{url}/ready").raise_for_status()
        before = read_bytes(pid)
        start = time.perf_counter()
        sizes = list(pool.map(lambda _: drained(f"{url}/v1/blobs/sha256:{entry.sha256}", entry.sha256), range(PULLS)))
        seconds = time.perf_counter() - start
        found = (read_bytes(pid) - before) / entry.bytes
    assert sizes == [entry.bytes] * PULLS
    note = f"{PULLS} pulls in {seconds:.1f} s, each proven by its client"
    yield Outcome(f"{PULLS} pulls at once of 30 MB, reads of the store", found, 1.1, "times the file", note)


def upload(lab: Lab) -> Iterator[Outcome]:
    """4 GB in one PUT: how much more memory the server's process then has had at most."""
    chunk = bytes(1 << 20)
    digest = hashlib.sha256()
    for _ in range(UPLOAD_BYTES // len(chunk)):
        digest.update(chunk)
    with serving(lab.folder / "uploaded") as (url, pid):
        small = hashlib.sha256(chunk).hexdigest()
        httpx.put(f"{url}/v1/blobs/sha256:{small}", content=chunk).raise_for_status()
        before = peak_bytes(pid)
        start = time.perf_counter()
        content = (chunk for _ in range(UPLOAD_BYTES // len(chunk)))
        route = f"{url}/v1/blobs/sha256:{digest.hexdigest()}"
        httpx.put(route, content=content, timeout=None).raise_for_status()
        seconds = time.perf_counter() - start
        found = (peak_bytes(pid) - before) / (1 << 20)
    note = f"{UPLOAD_BYTES / seconds / 1e6:.0f} MB/s"
    yield Outcome("4 GB uploaded, growth of the server's peak memory", found, 64, "MiB", note)


BARS = {"resolve": resolve, "pages": pages, "push": push, "pull": pull, "shared": shared, "upload": upload}


# --- how it is measured ---


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def answered(http: httpx.Client, route: str, **params: str) -> None:
    http.get(route, params=params).raise_for_status()


def percentile(what: str, taken: list[float], bar: float | None, percent: int = 99) -> Outcome:
    """Of latencies in seconds, told in milliseconds. The first tenth of the questions warms up."""
    ordered = sorted(taken[len(taken) // 10 :])
    at = ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
    note = f"median {statistics.median(ordered) * 1000:.2f} ms of {len(ordered):,}"
    return Outcome(what, at * 1000, bar, "ms", note)


def beside(what: str, ours: list[float], tools: list[float], bar: float) -> Outcome:
    """The median of the ratios round by round; the first round warms up."""
    found = statistics.median(a / b for a, b in zip(ours[1:], tools[1:], strict=True))
    note = f"{statistics.median(ours[1:]) * 1000:.0f} ms and {statistics.median(tools[1:]) * 1000:.0f} ms, medians"
    return Outcome(what, found, bar, "times", f"{note} of {len(ours) - 1} rounds in turn")


def plain_copy(source: Path, target: Path) -> float:
    """Seconds that a shell's tools need to hash a file, copy it and flush the copy."""
    script = 'sha256sum -- "$1" >/dev/null && cp -- "$1" "$2" && sync -- "$2"'
    return timed(lambda: subprocess.run(["sh", "-c", script, "sh", source, target], check=True))


def drained(url: str, sha256: str) -> int:
    """The size of what a URL answers, proven."""
    digest, total_bytes = hashlib.sha256(), 0
    with httpx.stream("GET", url, timeout=None) as answer:
        for chunk in answer.raise_for_status().iter_raw():
            digest.update(chunk)
            total_bytes += len(chunk)
    assert digest.hexdigest() == sha256
    return total_bytes


def read_bytes(pid: int) -> int:
    """What a process has read from files, as the kernel counts it, whether from the disk or from its cache."""
    return int(proc(pid, "io", r"rchar: (\d+)"))


def peak_bytes(pid: int) -> int:
    return int(proc(pid, "status", r"VmHWM:\s+(\d+) kB")) << 10


def proc(pid: int, file: str, pattern: str) -> str:
    found = re.search(pattern, Path(f"/proc/{pid}/{file}").read_text())
    assert found
    return found[1]


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", default=",".join(BARS))
    options.add_argument("--adapters", type=int, default=10_000)
    options.add_argument("--catalog", type=Path, help="a folder whose catalog is filled once and kept")
    options.add_argument("--dry", action="store_true", help="print, and write no result")
    chosen = options.parse_args()
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), chosen.catalog or Path(folder) / "crowded", chosen.adapters)
        if {"resolve", "pages"} & set(chosen.only.split(",")):
            fill(lab.crowded, lab.adapters)
        for name in chosen.only.split(","):
            for outcome in BARS[name](lab):
                print(outcome, flush=True)
                outcomes.append(outcome)
    if not chosen.dry:
        title = f"The registry: {chosen.adapters:,} adapters of {VERSIONS} versions in SQLite"
        data = {"outcomes": [asdict(outcome) | {"verdict": outcome.verdict} for outcome in outcomes]}
        path = write("registry", title, lines(outcomes), data, PACKAGES)
        print(f"\nwritten to {path.relative_to(ROOT)}")


def lines(outcomes: list[Outcome]) -> list[str]:
    """The report: a table of bars."""
    text = ["| what | bar | found | | |", "|---|---|---|---|---|"]
    for one in outcomes:
        asked = "" if one.bar is None else f"≤ {one.bar:g} {one.unit}"
        text.append(f"| {one.what} | {asked} | {one.found:.3g} {one.unit} | {one.verdict} | {one.note} |")
    return text


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
