"""Training on a 1.1 B base in NF4, beside peft with transformers' Trainer in the same run, in turns.

Every round runs every system once, each in a process of its own; ratios are taken round by round. Peak memory is
that of the process, loading the base included. `--gpu`: larger shapes on a GPU instead. `--trl`: its SFTTrainer too.
Usage: scripts/bench training [--gpu] [--trl] [--rounds N] [--steps N] [--dry]
"""

import argparse
import gc
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read as huggingface_hub is imported: all is made here, and trl pings home

import torch
from report import PACKAGES, write
from shape import make_base
from trainers import RANK, ROWS, Ours, Peer, Setting, Speed, Trl

OURS, PACKED, UNPACKED = "ours", "ours, quotes packed", "ours, quotes unpacked"
REFERENCE, PEER, PEER_AUTOCAST = "ours, no kernels", "peft and Trainer", "peft and Trainer, bf16 autocast"
TRL, QUOTES_TOO, QUOTES_PACKED = "trl's SFTTrainer, bf16 autocast", ", quotes unpacked", ", quotes packed"
# Of a GPU alone: hidden, inner, layers, heads, heads of keys, vocabulary, tied.
SHAPES = {
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
    "tiny": (64, 128, 2, 4, 2, 32000, False),  # to try the script itself
}
GPU_TOKENS = 512  # a row: what data.max_tokens is unless told otherwise
# Of each shape in NF4, and in bfloat16 (none): what others found on one A100, tokens/s and peak GiB, if they did.
ANCHORS = {
    ("Llama-3.2-3B", "nf4"): "8035 | 4.6",
    ("Llama-3.2-3B", "none"): "8210 | 8.5",
    ("Llama-2-7B", "nf4"): " | ",
    ("tiny", "nf4"): " | ",
    ("tiny", "none"): " | ",
}
ANSWER, READY, PEAK = "answer:", "ready", "peak"  # what a system's process says and is asked


def ours(base: Path) -> dict[str, Speed]:
    mine = Ours(Setting(base))
    return {
        OURS: mine.full_rows,
        PACKED: lambda steps: mine.quotes(steps, packing=True),
        UNPACKED: lambda steps: mine.quotes(4 * steps, packing=False),
    }


def peer(base: Path, name: str) -> dict[str, Speed]:
    other = Peer(Setting(base), autocast=name == PEER_AUTOCAST)
    return {name: other.full_rows, f"{name}{QUOTES_TOO}": lambda steps: other.quotes(4 * steps)}


def trl(base: Path) -> dict[str, Speed]:
    other = Trl(Setting(base), autocast=True)
    unpacked = {TRL: other.full_rows, f"{TRL}{QUOTES_TOO}": lambda steps: other.quotes(4 * steps)}
    return unpacked | {f"{TRL}{QUOTES_PACKED}": other.quotes_packed}


LOADED: dict[str, Callable[[Path], dict[str, Speed]]] = {
    OURS: ours,
    PEER: lambda base: peer(base, PEER),
    PEER_AUTOCAST: lambda base: peer(base, PEER_AUTOCAST),
    TRL: trl,
    REFERENCE: lambda base: {REFERENCE: Ours(Setting(base), kernels=False).full_rows},
}
RUNS = {  # of a system, if it has others than its own name's
    OURS: (OURS, PACKED, UNPACKED),
    PEER: (PEER, f"{PEER}{QUOTES_TOO}"),
    PEER_AUTOCAST: (PEER_AUTOCAST, f"{PEER_AUTOCAST}{QUOTES_TOO}"),
    TRL: (TRL, f"{TRL}{QUOTES_TOO}", f"{TRL}{QUOTES_PACKED}"),
}


class Worker:
    """A process of its own for one system, which waits while others are measured."""

    def __init__(self, system: str) -> None:
        command = [sys.executable, __file__, "--work", system]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer() == READY

    def ask(self, what: str) -> float:
        assert self.process.stdin
        print(what, file=self.process.stdin, flush=True)
        return float(self._answer())

    def end(self) -> float:
        """The most memory that it ever had, in MiB."""
        return self.ask(PEAK)

    def _answer(self) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER).strip()
        raise RuntimeError("a system ended before it was measured")


def work(system: str, base: Path) -> None:
    """The other side of Worker: asked for a run and its steps, it answers with tokens/s."""
    runs = LOADED[system](base)
    print(ANSWER, READY, flush=True)
    for line in sys.stdin:
        if line.strip() == PEAK:
            print(ANSWER, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)
            return
        name, steps = line.rsplit(maxsplit=1)
        print(ANSWER, runs[name](int(steps)), flush=True)


def on_gpu(chosen: list[str], device: str, rounds: int, steps: int, with_trl: bool) -> tuple[list[str], dict[str, Any]]:
    """Tokens/s and peak GiB of larger shapes, one system after another, each alone on the device. Lines, and data."""
    systems: dict[str, Callable[[Setting], Ours | Peer]] = {
        OURS: Ours,
        PEER: lambda setting: Peer(setting, autocast=False),
        PEER_AUTOCAST: lambda setting: Peer(setting, autocast=True),
    }
    if with_trl:
        systems[TRL] = lambda setting: Trl(setting, autocast=True)
    lines = [
        f"{ROWS} rows of {GPU_TOKENS} tokens a step, rank {RANK} on all linear layers, every token learnt, activations "
        f"kept; random weights. Medians of {rounds} rounds of {steps} steps, after one that does not count; memory is "
        "the most that torch had allocated, loading included. Those of the A100 do not tell how large a step was.",
        "",
        "| | base | | tokens/s | peak GiB | others', on an A100: tokens/s | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    found: list[dict[str, Any]] = []
    for (shape, quantization), anchor in ANCHORS.items():
        if shape not in chosen:
            continue
        setting = Setting(base_of_shape(shape), device, quantization, GPU_TOKENS)
        for name, load in systems.items():
            speeds, peak = measured_alone(load, setting, rounds, steps)
            found.append({"shape": shape, "base": quantization, "system": name, "speeds": speeds, "peak_gib": peak})
            base, told = "NF4" if quantization == "nf4" else "bf16", "" if peak is None else f"{peak:.1f}"
            lines.append(
                f"| {shape} | {base} | {name} | {statistics.median(speeds):.0f} | {told} "
                f"| {anchor if name == OURS else ' | '} |"
            )
            print(lines[-1], flush=True)
    return lines, {"systems": found}


def base_of_shape(shape: str) -> Path:
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return make_base(shape.lower(), vocab_size=vocabulary, tie_word_embeddings=tied, **sizes)


def measured_alone(
    load: Callable[[Setting], Ours | Peer], setting: Setting, rounds: int, steps: int
) -> tuple[list[float], float | None]:
    """Tokens/s of each round, and the peak in GiB where the device is a GPU; what was loaded before is let go of."""
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    system = load(setting)
    speeds = [system.full_rows(steps) for _ in range(rounds)]
    return speeds, torch.cuda.max_memory_allocated() / 2**30 if setting.device == "cuda" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="2 on a CPU, 10 on a GPU", default=0)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--reference", action="store_true", help="our loop without kernels, too: 6 GB more")
    parser.add_argument("--trl", action="store_true", help="trl's SFTTrainer, too, where trl is installed")
    parser.add_argument("--gpu", action="store_true", help="larger shapes on a GPU, and nothing else")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["Llama-3.2-3B", "Llama-2-7B"])
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="of --gpu; cpu only to try the script"
    )
    parser.add_argument("--work", choices=list(LOADED), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.gpu:
        if options.device == "cuda" and not torch.cuda.is_available():
            parser.error("--gpu: there is no CUDA device")
        lines, data = on_gpu(options.shapes, options.device, options.rounds, options.steps or 10, options.trl)
    elif options.work:
        work(options.work, make_base())
        return
    else:
        left_out = {name for name, wanted in ((REFERENCE, options.reference), (TRL, options.trl)) if not wanted}
        lines, data = on_cpu([name for name in LOADED if name not in left_out], options.rounds, options.steps or 2)
        print("\n".join(lines))
    if not options.dry:
        packages = (*PACKAGES, "trl") if options.trl else PACKAGES
        name = "training-shapes" if options.gpu else "training"
        print(f"written to {write(name, 'Training', lines, data, packages)}")


def on_cpu(systems: list[str], rounds: int, steps: int) -> tuple[list[str], dict[str, Any]]:
    """Lines, and data."""
    make_base()
    workers = {name: Worker(name) for name in systems}
    print("all have loaded the base", flush=True)
    runs = {run: workers[name] for name in systems for run in RUNS.get(name, (name,))}
    speed: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, worker in runs.items():
            speed[name].append(worker.ask(f"{name} {steps}"))
            print(f"round {number + 1} of {rounds}: {name} {speed[name][-1]:.0f} tokens/s", flush=True)
    peaks = {name: worker.end() for name, worker in workers.items()}
    peers = [name for name in systems if name not in (OURS, REFERENCE)]

    def times(system: str, *others: str) -> float:
        """How often as fast as the fastest of the others, of each round."""
        fastest = [max(values) for values in zip(*(speed[other] for other in others), strict=True)]
        return statistics.median(a / b for a, b in zip(speed[system], fastest, strict=True))

    faster, packing = times(OURS, *peers), times(PACKED, UNPACKED)
    over_peers = times(PACKED, *(f"{name}{QUOTES_TOO}" for name in peers))
    memory = peaks[OURS] / min(peaks[name] for name in peers)
    bars = [
        _bar("tokens/s, to the faster peer", faster, "≥ 1.2 ×", faster >= 1.2),
        _bar("packed quotes, to the faster peer's unpacked", over_peers, "≥ 2 ×", over_peers >= 2),
        _bar("packed quotes, to ours unpacked", packing, "≥ 2 ×", packing >= 2),
        _bar("peak memory, to the smaller peer", memory, "≤ 1 ×", memory <= 1),
    ]
    lines = [
        f"{ROWS} rows of {Setting.tokens} tokens a step, rank {RANK} on all linear layers, NF4, every token learnt; "
        f"quotes: {ROWS} rows of one example each, or of as many as {Setting.tokens} tokens hold (ours unpacked: rows "
        f"of like length, as the loop puts them; the peers': as drawn). Medians of {rounds} rounds of {steps} steps, "
        f"of {4 * steps} where rows are unpacked; tokens are real ones.",
        "",
        "| | tokens/s | peak MiB |",
        "|---|---|---|",
        *(
            f"| {name} | {statistics.median(speed[name]):.0f} | {f'{peaks[name]:.0f}' if name in peaks else ''} |"
            for name in speed
        ),
        "",
        "| | found | asked | |",
        "|---|---|---|---|",
        *(f"| {b['what']} | {b['found']:.2f} | {b['asked']} | {'met' if b['met'] else '**not met**'} |" for b in bars),
    ]
    return lines, {"speed": speed, "peak_mib": peaks, "bars": bars}


def _bar(what: str, found: float, asked: str, met: bool) -> dict[str, Any]:
    return {"what": what, "found": found, "asked": asked, "met": met}


if __name__ == "__main__":
    main()
