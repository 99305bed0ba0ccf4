"""Four adapters trained together on one 1.1 B base in NF4, against the same four one after another: the quotes data.

Steps alone: in one process, in turns. Whole runs: `loraplex train`, from its start to the adapters on disk.
Usage: scripts/bench many [whole|steps] [--rounds N] [--steps N] [--batch N] [--dry]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraplex_server.engine.upstream import quiet

quiet()

import yaml  # noqa: E402
from report import write  # noqa: E402
from shape import make_base  # noqa: E402

from loraplex_server.engine.model import load_base  # noqa: E402
from loraplex_trainer.config import RunConfig  # noqa: E402
from loraplex_trainer.data import encode_split, read_splits  # noqa: E402
from loraplex_trainer.encoding import Example, encoder_for  # noqa: E402
from loraplex_trainer.loop import Loop  # noqa: E402
from loraplex_trainer.run_file import load_config  # noqa: E402
from loraplex_trainer.together import Member, Shared, share, train_together  # noqa: E402

QUOTES = Path(__file__).parents[1] / "demo/quotes/train.jsonl"
RANKS = (8, 16, 16, 32)
TARGETS = ("all-linear", "all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"], "all-linear")
TOGETHER, IN_TURN = "together", "one after another"


def run_files(folder: Path, base: Path, batch: int, steps: int) -> list[Path]:
    """Four runs of other ranks and targets, each on a quarter of the quotes."""
    lines, files = QUOTES.read_text(encoding="utf-8").splitlines(keepends=True), []
    for number, (rank, targets) in enumerate(zip(RANKS, TARGETS, strict=True)):
        rows = folder / f"quotes-{number}.jsonl"
        rows.write_text("".join(lines[number::4]), encoding="utf-8")
        settings: dict[str, Any] = {
            "name": f"tagger-{number}",
            "base": {"model": str(base), "quantization": "nf4", "dtype": "bfloat16", "device": "cpu"},
            "data": {"train": str(rows), "prompt": "{quote} ->:", "completion": " {tags}", "max_tokens": 128},
            "lora": {"rank": rank, "alpha": 32, "target_modules": targets},
            "training": {"batch_size": batch, "max_steps": steps, "seed": number, "save_every": steps},
            "evaluation": {"samples": 0, "goldens": 0, "general": "none"},
            "output": str(folder / "adapters"),
        }
        files.append(folder / f"{number}.yaml")
        files[-1].write_text(yaml.safe_dump(settings), encoding="utf-8")
    return files


def make_loops(shared: Shared, configs: list[RunConfig], rows: list[tuple[Example, ...]]) -> list[Loop]:
    """Fresh ones, of the adapters as they are now."""
    return [
        Loop(shared.model, mine, config, 0, adapter=name, generators=shared.generators[name])
        for name, config, mine in zip(shared.generators, configs, rows, strict=True)
    ]


def steps_only(files: list[Path], rounds: int) -> dict[str, list[float]]:
    """Real tokens per second, of all four."""
    configs = [load_config(file) for file in files]
    base = load_base(**configs[0].base.load_options)
    rows = [encode_split(read_splits(one.data)["train"], encoder_for(base, one.data)).examples for one in configs]
    shared, speed = share(base, configs), {TOGETHER: [], IN_TURN: []}
    for number in range(rounds + 1):  # the first does not count
        for system in speed:
            loops, start = make_loops(shared, configs, rows), time.perf_counter()
            if system == TOGETHER:
                train_together(shared, [Member(loop, lambda _: False) for loop in loops])
            else:
                for loop in loops:
                    with shared.mixed.alone(loop.adapter):
                        loop.run(lambda _: False)
            tokens = sum(loop.tokens_done for loop in loops)
            speed[system].append(tokens / (time.perf_counter() - start))
            print(f"round {number} of {rounds}: {system} {speed[system][-1]:.1f} tokens/s", flush=True)
    return {system: values[1:] for system, values in speed.items()}


def whole_runs(folder: Path, files: list[Path]) -> dict[str, dict[str, float]]:
    """Seconds from the command to the adapters, and the most memory that a process had."""
    found: dict[str, dict[str, float]] = {}
    for system, commands in {TOGETHER: [files], IN_TURN: [[file] for file in files]}.items():
        start = time.perf_counter()
        for command in commands:
            subprocess.run([sys.executable, "-m", "loraplex_trainer", *map(str, command)], check=True)
        seconds = time.perf_counter() - start
        receipts = [json.loads(path.read_text()) for path in (folder / "adapters").glob("*/receipt.json")]
        peak = max(receipt["peak_memory_bytes"] for receipt in receipts) / 2**20
        found[system] = {"seconds": seconds, "peak_mib": peak}
        print(f"{system}: {seconds:.1f} s, {peak:.0f} MiB", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["whole", "steps"], nargs="?", default="whole")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        files = run_files(Path(scratch), make_base(), options.batch, options.steps)
        if options.part == "whole":
            found: dict[str, Any] = whole_runs(Path(scratch), files)
            seconds, peak = ([found[system][key] for system in (IN_TURN, TOGETHER)] for key in ("seconds", "peak_mib"))
            bars = [
                _bar("four together, to one after another", seconds[0] / seconds[1], "≥ 1.5 ×", lambda x: x >= 1.5),
                _bar("peak memory of a process, to one run's", peak[1] / peak[0], "≤ 1.25 ×", lambda x: x <= 1.25),
            ]
            rows = [*_rows("seconds", *seconds[::-1]), *_rows("peak MiB of a process", *peak[::-1])]
        else:
            found = steps_only(files, options.rounds)
            faster = statistics.median(a / b for a, b in zip(found[TOGETHER], found[IN_TURN], strict=True))
            bars = [_bar("four together, to one after another", faster, "≥ 1.5 ×", lambda x: x >= 1.5)]
            rows = _rows("tokens/s", *(statistics.median(found[system]) for system in (TOGETHER, IN_TURN)))
    what = {"whole": "whole runs, each from the command to the adapter", "steps": "steps alone, the base loaded"}
    lines = [
        f"Four runs of {options.steps} steps of {options.batch} quotes (22 tokens each), ranks "
        f"{', '.join(map(str, RANKS))}, NF4: {what[options.part]}.",
        "",
        f"| | {TOGETHER} | {IN_TURN} |",
        "|---|---|---|",
        *rows,
        "",
        "| | found | asked | |",
        "|---|---|---|---|",
        *(f"| {b['what']} | {b['found']:.2f} | {b['asked']} | {'met' if b['met'] else '**not met**'} |" for b in bars),
    ]
    print("\n".join(lines), flush=True)
    if not options.dry:
        data = {"settings": vars(options), "found": found, "bars": bars}
        print(f"written to {write(f'many-{options.part}-of-{options.batch}', 'Several adapters at once', lines, data)}")


def _bar(what: str, found: float, asked: str, met: Callable[[float], bool]) -> dict[str, Any]:
    return {"what": what, "found": found, "asked": asked, "met": met(found)}


def _rows(what: str, together: float, in_turn: float) -> list[str]:
    return [f"| {what} | {together:.1f} | {in_turn:.1f} |"]


if __name__ == "__main__":
    main()
