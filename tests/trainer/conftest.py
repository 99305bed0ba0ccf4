"""A tiny random Llama with its own tokenizer, data for it, and run files: what the trainer's tests train."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loraplex_server.engine.upstream import quiet

WORDS = ["river", "stone", "lantern", "harbor", "winter", "garden", "letter", "mountain", "shadow", "candle", "bridge"]
SUBJECTS = ("river", "harbor", "garden", "mountain")


@pytest.fixture(autouse=True)
def quiet_dependencies():
    quiet()  # as the command does at its start


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    """Two layers of width 64, so that every linear layer quantizes; a byte-level BPE with BOS, EOS and pad."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), " ->: " + ", ".join(WORDS)], trainer)
    # pad is EOS on purpose: a label derived from the pad id would lose every EOS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.get_vocab()),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences whose tags are the subjects they name: learnable, and of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = 3 + int(torch.randint(6, (1,), generator=generator))
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=generator)]
        words.append(SUBJECTS[int(torch.randint(len(SUBJECTS), (1,), generator=generator))])
        made.append({"quote": " ".join(words), "tags": [word for word in SUBJECTS if word in words]})
    return made


def write_jsonl(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


@pytest.fixture
def settings(tmp_path: Path, base_folder: Path) -> dict[str, Any]:
    """A whole run file: a few seconds of training."""
    return {
        "name": "tagger",
        "base": {"model": str(base_folder), "quantization": "none", "dtype": "float32", "device": "cpu"},
        "data": {
            "train": str(write_jsonl(tmp_path / "train.jsonl", rows(48, seed=1))),
            "heldout": str(write_jsonl(tmp_path / "heldout.jsonl", rows(8, seed=2))),
            "prompt": "{quote} ->:",
            "completion": " {tags}",
            "max_tokens": 128,
        },
        "lora": {"rank": 4, "alpha": 8},
        "training": {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2, "log_every_steps": 1},
        "evaluation": {"general": "none", "samples": 0, "goldens": 0, "max_tokens": 4},
        "output": str(tmp_path / "adapters"),
    }


@pytest.fixture
def write_run(tmp_path: Path, settings: dict[str, Any]) -> Callable[..., Path]:
    """Writes the run file with `section__key=value` changes and gives its path."""

    def write(**changes) -> Path:
        whole = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                whole.setdefault(section, {})[name] = value
            else:
                whole[section] = value
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def train() -> Callable[..., Result]:
    """`loraplex train …` in this process."""
    from loraplex_trainer.__main__ import train as command

    def run(*arguments: str | Path, exit_code: int = 0) -> Result:
        result = CliRunner().invoke(command, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == exit_code, result.output
        return result

    return run


@pytest.fixture
def receipt(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def read(name: str = "tagger") -> dict[str, Any]:
        return json.loads((tmp_path / "adapters" / name / "receipt.json").read_text(encoding="utf-8"))

    return read
