"""Throughput of the engine with many adapters on a 1.1 B base in NF4, beside peft and transformers in the same run.

Every round runs every system once, in turn; ratios are taken round by round.
Usage: scripts/bench serving [--rounds N] [--only W1,W2,W4]
"""

# ruff: noqa: E402 - what dependencies say as they are imported is quieted first
import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from loraplex_server.engine.upstream import quiet

quiet()

import torch
from peft import PeftModel
from report import Series, write
from shape import make_adapters, make_base
from transformers import GenerationConfig

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import Request, SamplingParams

ROOT = Path(__file__).parents[1]
ADAPTERS = 8
numbers = count()


@dataclass(frozen=True)
class Workload:
    """Requests that come at once, with their lengths in tokens, and what is measured on them."""

    requests: int
    prompt: int
    new: int
    adapters: int
    systems: tuple[str, ...]  # the first is ours


WORKLOADS = {
    "W1": Workload(16, 64, 16, 8, ("engine", "peft switching", "peft mixed batch", "transformers batching, base")),
    "W2": Workload(32, 32, 64, 8, ("engine", "engine, base")),
    "W4": Workload(1, 64, 64, 1, ("engine", "peft switching", "transformers generate, base")),
}


class Systems:
    """Every system over one stored base: ours on a model of its own, the peers on another."""

    def __init__(self, base_folder: Path, adapters: Sequence[Path]) -> None:
        self.engine = Engine(load_base(str(base_folder)), EngineConfig(max_rows=32, max_loras=ADAPTERS))
        for folder in adapters:
            self.engine.add_adapter(folder.name, folder)
        self.names = [folder.name for folder in adapters]
        self.plain = load_base(str(base_folder)).model
        model = PeftModel.from_pretrained(load_base(str(base_folder)).model, adapters[0], self.names[0])
        for folder in adapters[1:]:
            model.load_adapter(folder, folder.name)
        self.peft = model.eval()

    def run(self, system: str, work: Workload) -> int:
        """Answer the workload; returns the number of tokens generated."""
        prompts = [torch.randint(3, 4000, (work.prompt,)).tolist() for _ in range(work.requests)]
        wanted = [self.names[i % work.adapters] for i in range(work.requests)]
        runs: dict[str, Callable[[], int]] = {
            "engine": lambda: self.ours(prompts, wanted, work.new),
            "engine, base": lambda: self.ours(prompts, [None] * work.requests, work.new),
            "peft switching": lambda: self.switching(prompts, wanted, work.new),
            "peft mixed batch": lambda: self.mixed(prompts, wanted, work.new),
            "transformers batching, base": lambda: self.batching(prompts, work.new),
            "transformers generate, base": lambda: self.generate(self.plain, prompts, work.new),
        }
        return runs[system]()

    def ours(self, prompts: list[list[int]], wanted: Sequence[str | None], new: int) -> int:
        """The engine, all requests at once."""
        params = SamplingParams(max_tokens=new, temperature=0, logit_bias={2: -100.0})
        requests = [Request(f"{next(numbers)}", p, params, a) for p, a in zip(prompts, wanted, strict=True)]
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            self.engine.step()
        return sum(len(request.output_ids) for request in requests)

    def switching(self, prompts: list[list[int]], wanted: list[str], new: int) -> int:
        """peft the plain way: one request after another, each after set_adapter."""
        made = 0
        for prompt, adapter in zip(prompts, wanted, strict=True):
            self.peft.set_adapter(adapter, inference_mode=True)
            made += self.generate(self.peft, [prompt], new)
        return made

    def mixed(self, prompts: list[list[int]], wanted: list[str], new: int) -> int:
        """peft's mixed batch: one padded batch, its adapter named for every row."""
        return self.generate(self.peft, prompts, new, adapter_names=wanted)

    @torch.no_grad()
    def generate(self, model: torch.nn.Module, prompts: list[list[int]], new: int, **more: list[str]) -> int:
        """transformers' generate, greedy, no early end."""
        ids = torch.tensor(prompts)
        out = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **more,
        )
        return (out.shape[1] - ids.shape[1]) * len(prompts)

    def batching(self, prompts: list[list[int]], new: int) -> int:
        """transformers' continuous batching, which knows no adapters."""
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        answers = self.plain.generate_batch(inputs=prompts, generation_config=config)
        return sum(len(answer.generated_tokens) for answer in answers.values())


def main() -> None:
    """Measure, print, write."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", default=",".join(WORKLOADS))
    chosen = options.parse_args()
    base = make_base()
    results: dict[str, dict[str, Series]] = {}
    with tempfile.TemporaryDirectory() as folder:
        systems = Systems(base, make_adapters(base, Path(folder), ADAPTERS))
    for name in chosen.only.split(","):
        results[name] = measure(name, WORKLOADS[name], systems, chosen.rounds)
    said = "Generated tokens/s; rank 16 on all linear layers; greedy; all requests arrive at once; rounds:"
    lines = [f"{said} {chosen.rounds}, systems in turn, medians.", ""]
    lines += ["| | requests, prompt + new | system | tokens/s | ours over it |", "|---|---|---|---|---|"]
    for name, by_system in results.items():
        work = WORKLOADS[name]
        ours = by_system[work.systems[0]]
        for series in by_system.values():
            shape = f"{work.requests}, {work.prompt} + {work.new}, {work.adapters} adapters"
            lines.append(f"| {name} | {shape} | {series.name} | {series.median:.1f} | {ours.ratio(series):.2f} |")
    values = {name: {s: series.values for s, series in found.items()} for name, found in results.items()}
    path = write("serving", "Serving many adapters: Llama 1.1 B, NF4", lines, {"tokens_per_second": values})
    print("\n".join(lines))
    print(f"\nwritten to {path.relative_to(ROOT)}")


def measure(name: str, work: Workload, systems: Systems, rounds: int) -> dict[str, Series]:
    """Tokens per second of every system in every round, after a short one that does not count."""
    results = {system: Series(system, []) for system in work.systems}
    for system in work.systems:
        systems.run(system, Workload(min(work.requests, 2), work.prompt, 2, 1, ()))
    for number in range(rounds):
        for system, series in results.items():
            torch.manual_seed(number)
            started = time.perf_counter()
            tokens = systems.run(system, work)
            series.values.append(tokens / (time.perf_counter() - started))
            print(f"{name} round {number + 1} of {rounds}: {system} {series.values[-1]:.1f} tokens/s", flush=True)
    return results


if __name__ == "__main__":
    main()
