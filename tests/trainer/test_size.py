"""The size that is told before training is the size that is written, to the byte."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import make_base
from transformers import BloomConfig, BloomForCausalLM

from loraplex_server.engine.model import load_base
from loraplex_trainer.adapter import attach
from loraplex_trainer.run_file import load_config
from loraplex_trainer.size import AdapterSize, adapter_size


def predicted_size(run: Path) -> AdapterSize:
    config = load_config(run)
    return adapter_size(attach(load_base(**config.base.load_options, weights=False), config))


RUNS: dict[str, dict[str, Any]] = {
    "lora": {},
    "patterns": {"lora": {"rank": 3, "rank_pattern": {"q_proj": 7}, "layers_to_transform": [1]}},
    "dora": {"lora": {"rank": 4, "dora": True}},
    "pissa": {"lora": {"rank": 4, "init": "pissa"}},
    "olora": {"lora": {"rank": 4, "init": "olora"}},
    "loftq": {"lora": {"rank": 4, "init": "loftq"}, "base__quantization": "nf4"},
    "head": {"lora": {"rank": 4, "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4]}},
    "nf4": {"base__quantization": "nf4", "base__dtype": "bfloat16"},
    "int8": {"base__quantization": "int8"},
    "ia3": {"method": "ia3", "lora": {}},
    "prompt": {"method": "prompt", "lora": {}, "prompt": {"virtual_tokens": 7}},
    "prefix": {"method": "prefix", "lora": {}},
    "projection": {"method": "prefix", "lora": {}, "prompt": {"projection": True}},
    "p_tuning": {"method": "p_tuning", "lora": {}},
}


QUICK = {"patterns", "pissa", "head", "int8", "ia3", "prefix"}  # the others take half a minute


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_the_bytes_predicted_are_the_bytes_written(write_run, train, tmp_path, name):
    run = write_run(**RUNS[name])
    predicted = predicted_size(run)
    result = train(run, "training.max_steps=1")
    assert (tmp_path / "adapters/tagger/adapter_model.safetensors").stat().st_size == predicted.file_bytes
    assert f"{predicted.parameters:,} trainable parameters" in result.stdout


def test_of_an_encoder_decoder_too(write_run, train, tmp_path, base_folder):
    base = make_base(tmp_path / "t5", base_folder, "t5")
    run = write_run(base={"model": str(base), "task": "seq2seq", "quantization": "none", "dtype": "float32"})
    predicted = predicted_size(run)
    train(run, "training.max_steps=1")
    assert (tmp_path / "adapters/tagger/adapter_model.safetensors").stat().st_size == predicted.file_bytes


def test_bloom_7b_at_rank_16_is_the_31_megabytes_it_was(write_run, base_folder, tmp_path):
    """Its config alone is here: 7,069,016,064 parameters of base are never made."""
    folder = make_base(tmp_path / "bloom", base_folder, "bloom")
    lora = {"rank": 16, "target_modules": ["query_key_value"]}
    config = load_config(write_run(base={"model": str(folder), "quantization": "int8"}, lora=lora))
    with torch.device("meta"):
        large = BloomForCausalLM(BloomConfig(vocab_size=250_880, hidden_size=4096, n_layer=30, n_head=32))
    base = replace(load_base(**config.base.load_options, weights=False), model=large)
    size = adapter_size(attach(base, config))
    assert size == AdapterSize(7_864_320, 7_864_320 * 4, size.file_bytes)
    assert 0 < size.file_bytes - size.tensor_bytes < 20_000
