"""More bases than the trainer's tiny Llama, with its tokenizer, and what peft alone says of an adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from loraplex_server.engine.model import load_base
from loraplex_trainer.data import encode_split, read_splits
from loraplex_trainer.encoding import Example, encoder_for
from loraplex_trainer.run_file import load_config

EOS = 1
_SIZES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "qwen2": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    "stablelm": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    },
    "t5": {
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": EOS,
        "dropout_rate": 0.0,
    },
}


def make_base(folder: Path, tokenizer_of: Path, family: str, **more: Any) -> Path:
    """A random base of a family; its biases are drawn too, since zeros hide mistakes."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": EOS}
    config = AutoConfig.for_model(family, **(ids | _SIZES[family] | more))
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def heldout_examples(run: Path) -> Sequence[Example]:
    config = load_config(run)
    base = load_base(**config.base.load_options, weights=False)
    return encode_split(read_splits(config.data)["heldout"], encoder_for(base, config.data)).examples


@torch.no_grad()
def loss_of(model: Any, examples: Sequence[Example]) -> float:
    """transformers' own loss, one unpadded example at a time: nats per answer token."""
    total = 0.0
    model.eval()
    for example in examples:
        ids = torch.tensor([example.ids])
        if model.config.is_encoder_decoder:
            loss = model(input_ids=ids[:, : example.answer_start], labels=ids[:, example.answer_start :]).loss
        else:
            labels = ids.clone()
            labels[0, : example.answer_start] = -100
            loss = model(input_ids=ids, labels=labels).loss
        total += loss.item() * example.answer_tokens
    return total / sum(example.answer_tokens for example in examples)


def assert_measured(receipt: dict[str, Any], metric: str, alone: float | None = None, served: bool = False) -> None:
    """Base and adapter were scored; the adapter's held-out loss is the run's, the base's is `alone`."""
    metrics = receipt["metrics"]
    config = receipt["config"]
    general = config["evaluation"]["general"] != "none" and config["base"]["task"] == "causal"
    names = ["heldout_loss", metric, "stop_rate", *(["general_loss"] if general else [])]
    assert metrics.keys() == {*names, *(f"base_{name}" for name in names)}
    assert metrics["heldout_loss"] == pytest.approx(receipt["losses"]["heldout"], abs=5e-4 if served else 5e-5)
    if alone is not None:
        assert metrics["base_heldout_loss"] == pytest.approx(alone, abs=5e-5)
    assert (receipt["not_served"] is None) == served
    assert len(receipt["goldens"]) == (config["evaluation"]["goldens"] if served else 0)


def reloaded(base: Any, folder: Path) -> PeftModel:
    """The saved adapter as a stranger loads it: by peft, on a base loaded by transformers."""
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(base).is_encoder_decoder else AutoModelForCausalLM
    return PeftModel.from_pretrained(kind.from_pretrained(base, dtype=torch.float32), str(folder))
