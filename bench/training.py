"""Training on a 1.1 B base in NF4, beside peft with transformers' Trainer in the same run, in turns.

Every round runs every system once, each in a process of its own; ratios are taken round by round. Peak memory is
that of the process, loading the base included. On a GPU: what larger shapes give and take.
Usage: scripts/bench training [--rounds N] [--steps N] [--dry]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_server.engine.upstream import quiet

quiet()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from report import write  # noqa: E402
from shape import make_base  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from loraplex_server.engine.model import load_base  # noqa: E402
from loraplex_trainer.adapter import attach_adapter  # noqa: E402
from loraplex_trainer.config import RunConfig  # noqa: E402
from loraplex_trainer.data import encode_split, read_splits  # noqa: E402
from loraplex_trainer.encoding import Encoder, Example  # noqa: E402
from loraplex_trainer.fast import use_kernels  # noqa: E402
from loraplex_trainer.loop import Loop  # noqa: E402
from loraplex_trainer.packing import pack  # noqa: E402

ROWS, TOKENS, RANK = 4, 256, 16
QUOTES = Path(__file__).parents[1] / "demo/quotes/train.jsonl"
OURS, PACKED, UNPACKED = "ours", "ours, quotes packed", "ours, quotes unpacked"
REFERENCE, PEER, PEER_AUTOCAST = "ours, no kernels", "peft and Trainer", "peft and Trainer, bf16 autocast"
PEERS, QUOTES_TOO = (PEER, PEER_AUTOCAST), ", quotes unpacked"
PEERS_QUOTES = tuple(f"{name}{QUOTES_TOO}" for name in PEERS)
# Of a GPU alone: hidden, inner, layers, heads, heads of keys, vocabulary, tied.
SHAPES = {
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
}
ANSWER, READY, PEAK = "answer:", "ready", "peak"  # what a system's process says and is asked
Speed = Callable[[int], float]  # tokens/s of so many steps, after one that does not count


@dataclass
class Ours:
    """Our loop, over the whole of it but reading data."""

    base: Path
    kernels: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.loaded = load_base(str(self.base), device=self.device, dtype="bfloat16")
        self.config = config_for(self.base)
        self.model = attach_adapter(self.loaded, self.config.lora)
        if self.kernels and self.device == "cpu":
            assert use_kernels(self.model), "there are no kernels here"

    def full_rows(self, steps: int) -> float:
        return self._speed(full_rows(ROWS * (steps + 1)), steps)

    def quotes(self, steps: int, packing: bool) -> float:
        """As many rows a step, of what the demo trains on."""
        examples = quotes(self.base)
        return self._speed(pack(examples, TOKENS, 0) if packing else examples, steps)

    def _speed(self, examples: Sequence[Example], steps: int) -> float:
        training = self.config.training.model_copy(update={"batch_size": ROWS, "max_steps": steps + 1})
        times, done = [], []

        def note(loop: Loop) -> bool:
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            done.append(loop.tokens_done)
            return False

        Loop(self.model, examples, self.config.model_copy(update={"training": training}), 0).run(note)
        return (done[-1] - done[0]) / (times[-1] - times[0])


def config_for(base: Path) -> RunConfig:
    data = {"train": QUOTES, "prompt": "{quote} ->:", "completion": " {tags}", "max_tokens": TOKENS}
    return RunConfig.model_validate(
        {"name": "bench", "base": {"model": str(base)}, "data": data, "lora": {"rank": RANK}}
    )


def quotes(base: Path) -> Sequence[Example]:
    """What the demo trains on, as it lies in the file."""
    data, tokenizer = config_for(base).data, AutoTokenizer.from_pretrained(base)
    encoder = Encoder(tokenizer, frozenset({tokenizer.eos_token_id}), tokenizer.eos_token_id, data)
    return encode_split(read_splits(data)["train"], encoder).examples


def full_rows(count: int) -> list[Example]:
    """Random text of one length: all of it is learnt, none of it is padding."""
    random = torch.Generator().manual_seed(0)
    return [
        Example(tuple(torch.randint(5, 32000, (TOKENS,), generator=random).tolist()), ((1, TOKENS),))
        for _ in range(count)
    ]


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())


class Peer:
    """What a user would write: a 4-bit base, get_peft_model, Trainer."""

    def __init__(self, base: Path, autocast: bool) -> None:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)
        plain.requires_grad_(False)
        adapter = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.base, self.autocast = base, autocast
        self.model = get_peft_model(plain, adapter)

    def full_rows(self, steps: int) -> float:
        return self._speed(full_rows(ROWS * (steps + 1)))

    def quotes(self, steps: int) -> float:
        """In the order drawn, each batch padded to its longest row."""
        return self._speed(quotes(self.base)[: ROWS * (steps + 1)])

    def _speed(self, examples: Sequence[Example]) -> float:
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(
                folder,
                per_device_train_batch_size=ROWS,
                max_steps=len(examples) // ROWS,
                learning_rate=1e-3,
                bf16=self.autocast,
                use_cpu=True,
                train_sampling_strategy="sequential",  # they are drawn already
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
            )
            Trainer(self.model, settings, collate, list(examples), callbacks=[clock]).train()  # pyright: ignore
        return sum(len(one.ids) for one in examples[ROWS:]) / (clock.times[-1] - clock.times[0])


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Padded to the longest; what the loss is on is labelled."""
    ids = [torch.tensor(one.ids) for one in examples]
    labels = [torch.full_like(row, -100) for row in ids]
    for one, row, label in zip(examples, ids, labels, strict=True):
        for start, stop in one.trained:
            label[start:stop] = row[start:stop]
    there = [torch.ones_like(row) for row in ids]
    columns = {"input_ids": (ids, 0), "labels": (labels, -100), "attention_mask": (there, 0)}
    return {name: pad_sequence(rows, batch_first=True, padding_value=value) for name, (rows, value) in columns.items()}


def ours(base: Path) -> dict[str, Speed]:
    mine = Ours(base)
    return {
        OURS: mine.full_rows,
        PACKED: lambda steps: mine.quotes(steps, packing=True),
        UNPACKED: lambda steps: mine.quotes(4 * steps, packing=False),
    }


def peer(base: Path, name: str) -> dict[str, Speed]:
    other = Peer(base, autocast=name == PEER_AUTOCAST)
    return {name: other.full_rows, f"{name}{QUOTES_TOO}": lambda steps: other.quotes(4 * steps)}


LOADED: dict[str, Callable[[Path], dict[str, Speed]]] = {
    OURS: ours,
    PEER: lambda base: peer(base, PEER),
    PEER_AUTOCAST: lambda base: peer(base, PEER_AUTOCAST),
    REFERENCE: lambda base: {REFERENCE: Ours(base, kernels=False).full_rows},
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


def on_gpu() -> list[str]:
    """Tokens/s and peak GiB of larger shapes, by our loop."""
    lines = ["", "| on the GPU | tokens/s | peak GiB |", "|---|---|---|"]
    for name, (hidden, inner, layers, heads, kv_heads, vocabulary, tied) in SHAPES.items():
        shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        base = make_base(name.lower(), vocab_size=vocabulary, tie_word_embeddings=tied, **shape)
        torch.cuda.reset_peak_memory_stats()
        speed = Ours(base, device="cuda").full_rows(10)
        lines.append(f"| {name} | {speed:.0f} | {torch.cuda.max_memory_allocated() / 2**30:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--reference", action="store_true", help="our loop without kernels, too: 6 GB more")
    parser.add_argument("--work", choices=list(LOADED), help=argparse.SUPPRESS)
    options = parser.parse_args()
    base = make_base()
    if options.work:
        work(options.work, base)
        return
    workers = {name: Worker(name) for name in LOADED if name != REFERENCE or options.reference}
    print("all have loaded the base", flush=True)
    runs = {name: workers.get(name, workers[OURS]) for name in (*workers, PACKED, UNPACKED)}
    runs |= {of_quotes: workers[name] for name, of_quotes in zip(PEERS, PEERS_QUOTES, strict=True)}
    speed: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds):
        for name, worker in runs.items():
            speed[name].append(worker.ask(f"{name} {options.steps}"))
            print(f"round {number + 1} of {options.rounds}: {name} {speed[name][-1]:.0f} tokens/s", flush=True)
    peaks = {name: worker.end() for name, worker in workers.items()}

    def times(system: str, *others: str) -> float:
        """How often as fast as the fastest of the others, of each round."""
        fastest = [max(values) for values in zip(*(speed[other] for other in others), strict=True)]
        return statistics.median(a / b for a, b in zip(speed[system], fastest, strict=True))

    faster, packing, over_peers = times(OURS, *PEERS), times(PACKED, UNPACKED), times(PACKED, *PEERS_QUOTES)
    memory = peaks[OURS] / min(peaks[name] for name in PEERS)
    bars = [
        _bar("tokens/s, to the faster peer", faster, "≥ 1.2 ×", faster >= 1.2),
        _bar("packed quotes, to the faster peer's unpacked", over_peers, "≥ 2 ×", over_peers >= 2),
        _bar("packed quotes, to ours unpacked", packing, "≥ 2 ×", packing >= 2),
        _bar("peak memory, to the smaller peer", memory, "≤ 1 ×", memory <= 1),
    ]
    lines = [
        f"{ROWS} rows of {TOKENS} tokens a step, rank {RANK} on all linear layers, NF4, every token learnt; quotes: "
        f"{ROWS} rows of one example each, or of as many as {TOKENS} tokens hold (ours unpacked: rows of like length, "
        f"as the loop puts them; the peers': as drawn). Medians of {options.rounds} rounds of {options.steps} steps, "
        f"of {4 * options.steps} where rows are unpacked; tokens are real ones.",
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
        *(on_gpu() if torch.cuda.is_available() else []),
    ]
    print("\n".join(lines))
    if not options.dry:
        print(f"written to {write('training', 'Training', lines, {'speed': speed, 'peak_mib': peaks, 'bars': bars})}")


def _bar(what: str, found: float, asked: str, met: bool) -> dict[str, Any]:
    return {"what": what, "found": found, "asked": asked, "met": met}


if __name__ == "__main__":
    main()
