"""Serving many adapters on a 1.1 B base in NF4, beside peft and transformers in the same run: workloads W1 to W9.

Every round runs every system once, in turn; ratios are taken round by round. Results of workloads that are not run are
kept in the day's file. Usage: scripts/bench serving [--rounds N] [--only W1,W4] [--cycles N]
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
import torch
from report import RESULTS, write
from shape import make_adapters, make_base
from systems import WAIT_SECONDS, Ask, Peers, Run, engine_for, ours

from loraplex_registry.registry import Registry
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.request import Request, SamplingParams

ROOT = Path(__file__).parents[1]
System = Callable[[Sequence[Ask]], Run]
LOAD = 0.6  # of W7: requests a second, as a share of the most there can be with 16 adapters in 8 slots


@dataclass(frozen=True)
class Bar:
    """What the issue asks of a workload, and what was found."""

    asked: str
    found: float
    met: bool


@dataclass(frozen=True)
class Outcome:
    """One workload: what it was, what each system did in each round, and the bars."""

    shape: str
    unit: str
    values: dict[str, list[float]]
    bars: list[Bar]


class Lab:
    """The base, adapters in four ranks, and the systems: made when first needed."""

    def __init__(self, folder: Path, rounds: int, cycles: int) -> None:
        self.base, self.folder, self.rounds, self.cycles = make_base(), folder, rounds, cycles
        counts = {8: 1, 16: 8, 32: 1, 64: 1}
        self.ranked = {rank: make_adapters(self.base, folder / f"rank-{rank}", n, rank) for rank, n in counts.items()}
        self.eight = {path.name: path for path in self.ranked[16]}
        self.peers = Peers(self.base, self.eight)

    def engine(self, folders: dict[str, Path] | None = None, **config: int) -> Engine:
        """An engine of ours; by default 32 rows and eight adapters of rank 16 in as many slots."""
        return engine_for(self.base, self.eight if folders is None else folders, **{"max_rows": 32, **config})

    def turns(self, systems: dict[str, System], asks: Callable[[], list[Ask]]) -> dict[str, list[Run]]:
        """Every system in every round, after a short run that does not count."""
        found: dict[str, list[Run]] = {name: [] for name in systems}
        for system in systems.values():
            system([Ask(ask.prompt, ask.adapter, 2) for ask in asks()][:8])
        for number in range(self.rounds):
            random.seed(number)
            asked = asks()
            for name, system in systems.items():
                found[name].append(system(asked))
                print(f"  round {number + 1} of {self.rounds}: {name} {found[name][-1].rate:.1f} tokens/s", flush=True)
        return found


def requests(count: int, prompt: int, new: int, adapters: Sequence[str | None]) -> list[Ask]:
    """Requests with random prompts, adapters in turn."""
    return [Ask(random.choices(range(3, 4000), k=prompt), adapters[i % len(adapters)], new) for i in range(count)]


def rates(found: dict[str, list[Run]]) -> dict[str, list[float]]:
    return {name: [run.rate for run in runs] for name, runs in found.items()}


def over(values: dict[str, list[float]], one: str, other: str) -> float:
    """Median of the ratios round by round: machines drift, runs side by side drift together."""
    return statistics.median(a / b for a, b in zip(values[one], values[other], strict=True))


def at_least(asked: str, found: float, bound: float) -> Bar:
    return Bar(asked, found, found >= bound)


def at_most(asked: str, found: float, bound: float) -> Bar:
    return Bar(asked, found, found <= bound)


def w1(lab: Lab) -> Outcome:
    """Many at once, short answers."""
    engine, peers = lab.engine(), lab.peers
    systems: dict[str, System] = {
        "ours": lambda asks: ours(engine, asks),
        "peft switching": peers.switching,
        "peft mixed batch": peers.mixed,
        "transformers batching, base": peers.batching,
    }
    values = rates(lab.turns(systems, lambda: requests(16, 64, 16, list(lab.eight))))
    bars = [
        at_least("≥ 10 × peft switching", over(values, "ours", "peft switching"), 10),
        at_least("≥ 5 × peft mixed batch", over(values, "ours", "peft mixed batch"), 5),
        at_least("≥ 3 × transformers batching", over(values, "ours", "transformers batching, base"), 3),
    ]
    return Outcome("16 at once, 64 + 16 tokens, 8 adapters", "tokens/s", values, bars)


def w2(lab: Lab) -> Outcome:
    """What adapters cost beside the base alone."""
    engine = lab.engine()
    systems: dict[str, System] = {
        "ours": lambda asks: ours(engine, asks),
        "ours, base only": lambda asks: ours(engine, [Ask(ask.prompt, None, ask.new) for ask in asks]),
    }
    values = rates(lab.turns(systems, lambda: requests(32, 32, 64, list(lab.eight))))
    bars = [at_least("≥ 0.9 × base only", over(values, "ours", "ours, base only"), 0.9)]
    return Outcome("32 at once, 32 + 64 tokens, 8 adapters", "tokens/s", values, bars)


def w3(lab: Lab) -> Outcome:
    """Many adapters of many ranks, most asked for rarely."""
    names = [f"zipf-{i}" for i in range(100)]
    folders = {name: lab.ranked[random.Random(name).choice((8, 16, 32, 64))][0] for name in names}
    weights = [1 / (i + 1) for i in range(100)]
    random.seed(0)
    drawn = random.choices(names, weights, k=32)
    engine = lab.engine(folders, max_loras=16, max_host_loras=64)
    peers = Peers(lab.base, {name: folders[name] for name in dict.fromkeys(drawn)})
    systems: dict[str, System] = {"ours": lambda asks: ours(engine, asks), "peft switching": peers.switching}
    found = lab.turns(systems, lambda: requests(32, 32, 16, drawn))
    values = rates(found)
    worst = max(max(run.first) / statistics.median(run.first) for run in found["ours"])
    bars = [
        at_least("≥ 10 × peft switching", over(values, "ours", "peft switching"), 10),
        at_most("slowest first token ≤ 5 × the median", worst, 5),
    ]
    shape = f"32 at once, 32 + 16 tokens, 100 adapters by Zipf 1.0 ({len(set(drawn))} drawn), ranks 8 to 64, 16 slots"
    return Outcome(shape, "tokens/s", values, bars)


def w4(lab: Lab) -> Outcome:
    """One stream."""
    engine = lab.engine()
    systems: dict[str, System] = {
        "ours": lambda asks: ours(engine, asks),
        "transformers generate, base": lab.peers.generate,
        "peft generate": lab.peers.switching,
    }
    values = rates(lab.turns(systems, lambda: requests(1, 64, 64, list(lab.eight)[:1])))
    bars = [at_least("≥ 1.5 × transformers generate", over(values, "ours", "transformers generate, base"), 1.5)]
    return Outcome("one stream, 64 + 64 tokens, one adapter", "tokens/s", values, bars)


def w5(lab: Lab) -> Outcome:
    """What adapters that are only registered cost, over HTTP with a registry."""
    small = make_adapters(lab.base, lab.folder / "small", 1, 1, ("q_proj",))[0]
    registries = {5: Registry(lab.folder / "registry-5"), 2000: Registry(lab.folder / "registry-2000")}
    for count, registry in registries.items():
        for i in range(count):  # those in use first, in their real size; the others are there to be many
            registry.push(f"tagger-{i}", lab.ranked[16][i % 8] if i < 64 else small)
        print(f"  {count} adapters registered", flush=True)
    with served(lab.base, registries[5].root) as few, served(lab.base, registries[2000].root) as many:
        systems: dict[str, System] = {
            "5 registered, 5 in use": lambda asks: over_http(few, asks, 5),
            "2,000 registered, 5 in use": lambda asks: over_http(many, asks, 5),
            "2,000 registered, 64 in use": lambda asks: over_http(many, asks, 64),
        }
        for url, used in ((few, 5), (many, 64)):  # every adapter comes to the device once before it counts
            over_http(url, requests(64, 4, 1, [None]), used)
        values = rates(lab.turns(systems, lambda: requests(64, 32, 64, [None])))
    bars = [
        at_least("≥ 0.95 × with 2,000 registered, the same in use", over(values, *list(values)[1::-1]), 0.95),
        at_least("≥ 0.95 × with 2,000 registered, 64 in use", over(values, *list(values)[2::-2]), 0.95),
    ]
    return Outcome("64 requests, 32 at once, 32 + 64 tokens, over HTTP", "tokens/s", values, bars)


@contextmanager
def served(base: Path, registry: Path) -> Iterator[str]:
    """A server in a process of its own; its URL."""
    options = {"max-rows": 32, "max-loras": 64, "max-host-loras": 80, "port": 0, "base": base, "registry": registry}
    command = [sys.executable, "-m", "loraplex_server", "--no-prefix-cache"]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield next(line.split()[-1] for line in process.stdout if line.startswith("listening"))
    finally:
        process.terminate()
        process.wait()


def over_http(url: str, asks: Sequence[Ask], used: int) -> Run:
    """The requests through a server, 32 at once, the first ``used`` adapters of its registry in turn."""

    async def run() -> None:
        gate = asyncio.Semaphore(32)

        async def one(client: httpx.AsyncClient, number: int, ask: Ask) -> None:
            body = {"adapter": f"tagger-{number % used}", "prompt": ask.prompt, "max_tokens": ask.new}
            async with gate:
                answer = await client.post("/v1/completions", json={**body, "temperature": 0, "ignore_eos": True})
            answer.raise_for_status()
            assert answer.json()["usage"]["completion_tokens"] == ask.new

        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            await asyncio.gather(*(one(client, number, ask) for number, ask in enumerate(asks)))

    started = time.perf_counter()
    asyncio.run(run())
    return Run(sum(ask.new for ask in asks), time.perf_counter() - started)


def w6(lab: Lab) -> Outcome:
    """What others feel of an adapter that comes from disk every second."""
    folders = {f"cold-{i}": lab.ranked[16][i % 8] for i in range(200)} | lab.eight
    engine = lab.engine(folders, max_loras=9, max_host_loras=12, max_rows=40)
    ours(engine, requests(8, 4, 2, list(lab.eight)))
    for name in lab.eight:
        engine.residency.keep(name)
    cold, sent = iter([name for name in folders if name.startswith("cold")]), [0.0]

    def every_second(name: Callable[[], str]) -> Callable[[], None]:
        def ask() -> None:
            if time.perf_counter() - sent[0] > 1:
                sent[0] = time.perf_counter()
                params = SamplingParams(max_tokens=1, temperature=0)
                engine.add(Request(f"every-{sent[0]}", [5], params, name()))

        return ask

    def drained(run: Run) -> Run:
        while engine.has_work:
            if not engine.step() and not engine.scheduler.running:
                time.sleep(WAIT_SECONDS)
        return run

    def system(name: Callable[[], str]) -> System:
        return lambda asks: drained(ours(engine, asks, between=every_second(name)))

    systems = {
        "a cold adapter every second": system(lambda: next(cold)),
        "a resident one every second": system(lambda: next(iter(lab.eight))),
    }
    found = lab.turns(systems, lambda: requests(32, 32, 64, list(lab.eight)))
    values = {name: [statistics.quantiles(run.gaps, n=100)[98] * 1000 for run in runs] for name, runs in found.items()}
    bars = [at_most("99th percentile ≤ 1.25 ×", over(values, *values), 1.25)]
    shape = "W2, and each second a request of one token for an adapter from disk"
    return Outcome(shape, "ms between tokens, 99th percentile", values, bars)


def w7(lab: Lab) -> Outcome:
    """More adapters in use than slots."""
    folders = {f"used-{i}": lab.ranked[16][i % 8] for i in range(16)}
    engine = lab.engine(folders, max_loras=8, max_host_loras=20, max_rows=16)
    names = list(folders)

    def asked(asks: Sequence[Ask], used: int) -> list[Ask]:
        return [Ask(ask.prompt, names[i % used], ask.new) for i, ask in enumerate(asks)]

    sample = asked(requests(48, 32, 16, [None]), 16)
    ours(engine, sample[:16])
    most = len(sample) / ours(engine, sample, at_once=16).seconds  # requests a second

    def at_random(used: int) -> System:
        return lambda asks: ours(engine, asked(asks, used), rate=LOAD * most)

    def always_16(used: int) -> System:
        return lambda asks: ours(engine, asked(asks, used), at_once=16)

    systems = {
        "16 in use, at random": at_random(16),
        "8 in use, at random": at_random(8),
        "16 in use, always 16 at once": always_16(16),
        "8 in use, always 16 at once": always_16(8),
    }
    found = lab.turns(systems, lambda: requests(96, 32, 16, [None]))
    values = {name: [statistics.median(run.first) * 1000 for run in runs] for name, runs in found.items()}
    loads = {"at random times": list(values)[:2], "always 16 at once": list(values)[2:]}
    bars = [at_most(f"median first token ≤ 2 ×, {when}", over(values, *pair), 2) for when, pair in loads.items()]
    times = f"at random times at {LOAD:.0%} of what 16 allow, or always 16 at once"
    shape = f"96 requests, {times}, 32 + 16 tokens, 8 slots, 16 rows"
    return Outcome(shape, "ms to the first token, median", values, bars)


def w8(lab: Lab) -> Outcome:
    """What the base's requests pay for adapters that rest."""
    with_adapters, without = "eight adapters on the device", "no adapter ever"
    values: dict[str, list[float]] = {with_adapters: [], without: []}
    for order in ((with_adapters, without), (without, with_adapters)):  # a base's place in memory is worth 2 % too
        engines = {name: lab.engine(lab.eight if name == with_adapters else {}) for name in order}
        ours(engines[with_adapters], requests(8, 4, 2, list(lab.eight)))
        systems: dict[str, System] = {name: lambda asks, engine=engines[name]: ours(engine, asks) for name in values}
        for name, found in rates(lab.turns(systems, lambda: requests(32, 32, 64, [None]))).items():
            values[name] += found
    bars = [at_least("≥ 0.985 ×", over(values, *values), 0.985)]
    return Outcome("32 at once, 32 + 64 tokens, the base alone", "tokens/s", values, bars)


def w9(lab: Lab) -> Outcome:
    """Memory, each in a process of its own."""

    def told(what: str, *more: str) -> list[float]:
        command = [sys.executable, str(Path(__file__).with_name("memory.py")), what, str(lab.base), *more]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])

    stored, resident = told("base")
    rss = told("cycles", str(lab.cycles), *map(str, lab.ranked[16]))
    quarter = len(rss) // 4
    growth = statistics.mean(rss[-quarter:]) - statistics.mean(rss[quarter : 2 * quarter])
    values = {"stored in 4 and 16 bits": [stored], "resident": [resident], f"RSS over {lab.cycles} cycles": rss}
    bars = [
        at_most("resident ≤ 1.1 × stored", resident / stored, 1.1),
        at_most("RSS grows by ≤ 1 % of it from the second to the last quarter", 1 + growth / rss[quarter], 1.01),
    ]
    return Outcome("the base with our kernels; adapters of rank 16 loaded and unloaded", "MiB", values, bars)


WORKLOADS = {"W1": w1, "W2": w2, "W3": w3, "W4": w4, "W5": w5, "W6": w6, "W7": w7, "W8": w8, "W9": w9}


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", default=",".join(WORKLOADS))
    options.add_argument("--cycles", type=int, default=1000, help="loads and unloads of W9")
    chosen = options.parse_args()
    results = earlier_today()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), chosen.rounds, chosen.cycles)
        for name in chosen.only.split(","):
            print(f"{name}: {(WORKLOADS[name].__doc__ or '').strip()}", flush=True)
            outcome = WORKLOADS[name](lab)
            bars = [{"asked": bar.asked, "found": bar.found, "met": bar.met} for bar in outcome.bars]
            results[name] = {"shape": outcome.shape, "unit": outcome.unit, "values": outcome.values, "bars": bars}
            path = write("serving", "Serving many adapters: Llama 1.1 B, NF4", lines(results), {"workloads": results})
    print("\n".join(lines(results)))
    print(f"\nwritten to {path.relative_to(ROOT)}")


def earlier_today() -> dict[str, dict]:
    """The day's results so far, by workload."""
    device = "gpu" if torch.cuda.is_available() else "cpu"
    file = RESULTS / f"serving-{datetime.now(UTC):%Y-%m-%d}-{device}.json"
    return json.loads(file.read_text()).get("workloads", {}) if file.exists() else {}


def lines(results: dict[str, dict]) -> list[str]:
    """The report: a table of bars, and one of what was measured."""
    said = "Adapters of rank 16 on all linear layers unless said; greedy; medians over rounds, ratios round by round."
    text = [said, ""]
    text += ["| | workload | asked | found | |", "|---|---|---|---|---|"]
    ordered = dict(sorted(results.items()))
    for name, result in ordered.items():
        for bar in result["bars"]:
            found = f"{bar['found']:.3f}" if bar["found"] < 2 else f"{bar['found']:.1f}"
            verdict = "met" if bar["met"] else "**not met**"
            text.append(f"| {name} | {result['shape']} | {bar['asked']} | {found} | {verdict} |")
    text += ["", "| | system | median | unit | rounds |", "|---|---|---|---|---|"]
    for name, result in ordered.items():
        for system, values in result["values"].items():
            text.append(f"| {name} | {system} | {statistics.median(values):.1f} | {result['unit']} | {len(values)} |")
    return text


if __name__ == "__main__":
    main()
