"""What is trained with: our loop, peft with transformers' Trainer, and trl's SFTTrainer, each on a base of its own.

Each gives the tokens/s of so many steps, after one that does not count. Knows nothing of what they are compared for.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex_server.engine.upstream import quiet

quiet()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
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

ROWS, RANK = 4, 16
QUOTES = Path(__file__).parents[1] / "demo/quotes/train.jsonl"
Speed = Callable[[int], float]  # tokens/s of so many steps, after one that does not count


@dataclass(frozen=True)
class Setting:
    """On what all are trained alike."""

    base: Path
    device: str = "cpu"
    quantization: str = "nf4"  # or none: bfloat16
    tokens: int = 256  # a row


@dataclass
class Ours:
    """Our loop, over the whole of it but reading data."""

    setting: Setting
    kernels: bool = True

    def __post_init__(self) -> None:
        where = self.setting
        base = load_base(str(where.base), quantization=where.quantization, device=where.device, dtype="bfloat16")
        self.config = config_for(where)
        self.model = attach_adapter(base, self.config.lora)
        by_kernels = use_kernels(self.model) if self.kernels else 0
        if self.kernels and where.device == "cpu" and where.quantization == "nf4":
            assert by_kernels, "there are no kernels here"

    def full_rows(self, steps: int) -> float:
        return self._speed(full_rows(ROWS * (steps + 1), self.setting.tokens), steps)

    def quotes(self, steps: int, packing: bool) -> float:
        """As many rows a step, of what the demo trains on."""
        examples = quotes(self.setting)
        return self._speed(pack(examples, self.setting.tokens, 0) if packing else examples, steps)

    def _speed(self, examples: Sequence[Example], steps: int) -> float:
        training = self.config.training.model_copy(update={"batch_size": ROWS, "max_steps": steps + 1})
        times, done = [], []

        def note(loop: Loop) -> bool:
            times.append(now(self.setting.device))
            done.append(loop.tokens_done)
            return False

        Loop(self.model, examples, self.config.model_copy(update={"training": training}), 0).run(note)
        return (done[-1] - done[0]) / (times[-1] - times[0])


def now(device: str) -> float:
    """When what the device was asked for is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def config_for(setting: Setting) -> RunConfig:
    data = {"train": QUOTES, "prompt": "{quote} ->:", "completion": " {tags}", "max_tokens": setting.tokens}
    return RunConfig.model_validate(
        {"name": "bench", "base": {"model": str(setting.base)}, "data": data, "lora": {"rank": RANK}}
    )


def quotes(setting: Setting) -> Sequence[Example]:
    """What the demo trains on, as it lies in the file."""
    data, tokenizer = config_for(setting).data, AutoTokenizer.from_pretrained(setting.base)
    encoder = Encoder(tokenizer, frozenset({tokenizer.eos_token_id}), tokenizer.eos_token_id, data)
    return encode_split(read_splits(data)["train"], encoder).examples


def full_rows(count: int, tokens: int) -> list[Example]:
    """Random text of one length: all of it is learnt, none of it is padding."""
    random = torch.Generator().manual_seed(0)
    return [
        Example(tuple(torch.randint(5, 32000, (tokens,), generator=random).tolist()), ((1, tokens),))
        for _ in range(count)
    ]


class _Clock(TrainerCallback):
    def __init__(self, device: str) -> None:
        self.device, self.times = device, list[float]()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(now(self.device))

    @property
    def seconds(self) -> float:
        return self.times[-1] - self.times[0]


class Peer:
    """What a user would write: a 4-bit base, get_peft_model, Trainer."""

    def __init__(self, setting: Setting, autocast: bool) -> None:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options = {"quantization_config": quantization} if setting.quantization == "nf4" else {}
        plain = AutoModelForCausalLM.from_pretrained(
            setting.base, dtype=torch.bfloat16, device_map={"": setting.device}, **options
        )
        plain.requires_grad_(False)
        adapter = LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        self.setting, self.autocast = setting, autocast
        self.model = get_peft_model(plain, adapter)

    def full_rows(self, steps: int) -> float:
        return self._speed(full_rows(ROWS * (steps + 1), self.setting.tokens))

    def quotes(self, steps: int) -> float:
        """In the order drawn, each batch padded to its longest row."""
        return self._speed(quotes(self.setting)[: ROWS * (steps + 1)])

    def options(self, steps: int, folder: str) -> dict[str, Any]:
        return {
            "output_dir": folder,
            "per_device_train_batch_size": ROWS,
            "max_steps": steps,
            "learning_rate": 1e-3,
            "bf16": self.autocast,
            "use_cpu": self.setting.device == "cpu",
            "train_sampling_strategy": "sequential",  # they are drawn already
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
        }

    def _speed(self, examples: Sequence[Example]) -> float:
        clock = _Clock(self.setting.device)
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainingArguments(**self.options(len(examples) // ROWS, folder))
            Trainer(self.model, settings, collate, list(examples), callbacks=[clock]).train()  # pyright: ignore
        return sum(len(one.ids) for one in examples[ROWS:]) / clock.seconds


class Trl(Peer):
    """The same model in trl's SFTTrainer, off line: it pings home otherwise. Packs by itself."""

    def quotes_packed(self, steps: int) -> float:
        return self._speed(quotes(self.setting), steps)

    def _speed(self, examples: Sequence[Example], packed_steps: int = 0) -> float:
        from trl.trainer.sft_config import SFTConfig  # pyright: ignore[reportMissingImports]
        from trl.trainer.sft_trainer import SFTTrainer  # pyright: ignore[reportMissingImports]

        clock, steps = _Clock(self.setting.device), packed_steps + 1 if packed_steps else len(examples) // ROWS
        rows = [{"input_ids": list(one.ids), "labels": labels_of(one).tolist()} for one in examples]
        with tempfile.TemporaryDirectory() as folder:
            options = {"activation_checkpointing": False, "packing": packed_steps > 0}
            settings = SFTConfig(**self.options(steps, folder), **options, max_length=self.setting.tokens)
            tokenizer = AutoTokenizer.from_pretrained(self.setting.base)
            trainer = SFTTrainer(
                self.model,
                settings,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[clock],
            )
            trainer.train()
        seen = [len(ids) for ids in trainer.train_dataset["input_ids"]][ROWS : ROWS * steps]
        return sum(seen) / clock.seconds


def labels_of(example: Example) -> torch.Tensor:
    """The ids that the loss is on, and -100."""
    ids = torch.tensor(example.ids)
    labels = torch.full_like(ids, -100)
    for start, stop in example.trained:
        labels[start:stop] = ids[start:stop]
    return labels


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Padded to the longest; what the loss is on is labelled."""
    ids = [torch.tensor(one.ids) for one in examples]
    labels = [labels_of(one) for one in examples]
    there = [torch.ones_like(row) for row in ids]
    columns = {"input_ids": (ids, 0), "labels": (labels, -100), "attention_mask": (there, 0)}
    return {name: pad_sequence(rows, batch_first=True, padding_value=value) for name, (rows, value) in columns.items()}
