"""Training on a 1.1 B base in NF4, beside peft with transformers' Trainer in the same run, in turns.

Every round runs every system once; ratios are taken round by round. Peak memory is of a process of its own each.
Usage: scripts/bench training [--rounds N] [--steps N] [--dry]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from loraplex_server.engine.upstream import quiet

quiet()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from report import write  # noqa: E402
from shape import make_base  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from loraplex_server.engine.model import load_base  # noqa: E402
from loraplex_trainer.adapter import attach_adapter  # noqa: E402
from loraplex_trainer.config import RunConfig  # noqa: E402
from loraplex_trainer.encoding import Example  # noqa: E402
from loraplex_trainer.fast import use_kernels  # noqa: E402
from loraplex_trainer.loop import Loop  # noqa: E402

ROWS, TOKENS, RANK = 4, 256, 16
OURS, REFERENCE, PEER, PEER_AUTOCAST = "ours", "ours, no kernels", "peft and Trainer", "peft and Trainer, bf16 autocast"
Steps = Callable[[int], list[float]]  # so many steps, after one that does not count: the seconds of each


def examples(count: int) -> list[Example]:
    """Random text of one length: all of it is learnt, none of it is padding."""
    random = torch.Generator().manual_seed(0)
    return [
        Example(tuple(torch.randint(5, 32000, (TOKENS,), generator=random).tolist()), ((1, TOKENS),))
        for _ in range(count)
    ]


def ours(base: Path, kernels: bool) -> Steps:
    """Our loop, over the whole of it but reading data."""
    loaded = load_base(str(base), device="cpu", dtype="bfloat16")
    config = RunConfig.model_validate(
        {"name": "bench", "base": {"model": str(base)}, "data": {"train": Path("none")}, "lora": {"rank": RANK}}
    )
    model = attach_adapter(loaded, config.lora)
    if kernels:
        assert use_kernels(model), "there are no kernels here"

    def run(count: int) -> list[float]:
        training = config.training.model_copy(update={"batch_size": ROWS, "max_steps": count + 1})
        times: list[float] = []
        loop = Loop(model, examples(ROWS * (count + 1)), config.model_copy(update={"training": training}), 0)
        loop.run(lambda _: times.append(time.perf_counter()))  # pyright: ignore[reportArgumentType]
        return [after - before for before, after in pairwise(times)]

    return run


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())


def peer(base: Path, autocast: bool) -> Steps:
    """What a user would write: a 4-bit base, get_peft_model, Trainer."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)
    plain.requires_grad_(False)
    adapter = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(plain, adapter)

    def run(count: int) -> list[float]:
        rows = [{"input_ids": list(one.ids), "labels": list(one.ids)} for one in examples(ROWS * (count + 1))]
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder,
                per_device_train_batch_size=ROWS,
                max_steps=count + 1,
                learning_rate=1e-3,
                bf16=autocast,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
            )
            Trainer(model=model, args=settings, train_dataset=rows, callbacks=[clock]).train()  # pyright: ignore
        return [after - before for before, after in pairwise(clock.times)]

    return run


SYSTEMS: dict[str, Callable[[Path], Steps]] = {
    OURS: lambda base: ours(base, kernels=True),
    REFERENCE: lambda base: ours(base, kernels=False),
    PEER: lambda base: peer(base, autocast=False),
    PEER_AUTOCAST: lambda base: peer(base, autocast=True),
}


def peak_bytes(system: str) -> int:
    """The most memory that a process of its own had, which trained two steps."""
    command = [sys.executable, __file__, "--peak", system]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--peak", choices=list(SYSTEMS))
    options = parser.parse_args()
    base = make_base()
    if options.peak:
        SYSTEMS[options.peak](base)(1)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    systems = {name: make(base) for name, make in SYSTEMS.items()}
    speed: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(options.rounds):
        for name, run in systems.items():
            speed[name].append(ROWS * TOKENS / statistics.median(run(options.steps)))
            print(f"round {number + 1} of {options.rounds}: {name} {speed[name][-1]:.0f} tokens/s", flush=True)
    del systems
    peaks = {name: peak_bytes(name) / 2**20 for name in (OURS, PEER, PEER_AUTOCAST)}
    best_peer = [max(pair) for pair in zip(speed[PEER], speed[PEER_AUTOCAST], strict=True)]
    faster = statistics.median(a / b for a, b in zip(speed[OURS], best_peer, strict=True))
    memory = peaks[OURS] / min(peaks[PEER], peaks[PEER_AUTOCAST])
    bars = [
        {"what": "tokens/s, to the faster peer", "found": faster, "asked": "≥ 1.2 ×", "met": faster >= 1.2},
        {"what": "peak memory, to the smaller peer", "found": memory, "asked": "≤ 1 ×", "met": memory <= 1},
    ]
    lines = [
        f"{ROWS} rows of {TOKENS} tokens a step, rank {RANK} on all linear layers, NF4, every token learnt; medians.",
        "",
        "| | tokens/s | peak MiB |",
        "|---|---|---|",
        *(f"| {name} | {statistics.median(speed[name]):.0f} | {peaks.get(name, float('nan')):.0f} |" for name in speed),
        "",
        "| | found | asked | |",
        "|---|---|---|---|",
        *(f"| {b['what']} | {b['found']:.2f} | {b['asked']} | {'met' if b['met'] else '**not met**'} |" for b in bars),
    ]
    print("\n".join(lines))
    if not options.dry:
        print(f"written to {write('training', 'Training', lines, {'speed': speed, 'peak_mib': peaks, 'bars': bars})}")


if __name__ == "__main__":
    main()
