"""The run files to begin from: each is read as it stands, and says what it is."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from loraplex_trainer.__main__ import PRESETS
from loraplex_trainer.config import RunConfig
from loraplex_trainer.run_file import load_config
from loraplex_trainer.run_schema import FILE

NAMES = ["bloom-quotes", "korean-instructions", "llama-2-7b-qlora", "tinyllama-chat"]


@pytest.fixture
def preset(train, tmp_path):
    """The config of a preset as the command prints it."""

    def read(name: str) -> RunConfig:
        path = tmp_path / "run.yaml"
        path.write_text(train("presets", name).stdout)
        lines: list[str] = []
        config = load_config(path, (), lines.append)
        assert not lines  # our own names, not those of others
        return config

    return read


def test_they_are_listed_with_what_they_are(train):
    lines = train("presets").stdout.splitlines()
    assert [line.split()[0] for line in lines] == NAMES == sorted(file.stem for file in PRESETS.iterdir())
    for line in lines:  # one whole sentence each, over as many lines as it takes in the file
        name, told = line.split(maxsplit=1)
        words = " ".join((PRESETS / f"{name}.yaml").read_text().replace("\n# ", " ").removeprefix("# ").split())
        assert told.endswith(".") and words.startswith(told) and told.count(". ") == 0


@pytest.mark.parametrize("name", NAMES)
def test_each_is_read_and_fits_the_schema(preset, name):
    preset(name)
    document = json.loads(json.dumps(yaml.safe_load((PRESETS / f"{name}.yaml").read_text())))
    assert not list(Draft202012Validator(json.loads(FILE.read_text())).iter_errors(document))


def test_the_seven_billion_one_has_every_value_of_the_run_it_comes_from(preset):
    config = preset("llama-2-7b-qlora")
    lora, training, base, data = config.lora, config.training, config.base, config.data
    assert (lora.rank, lora.alpha, lora.dropout, lora.bias) == (64, 16, 0.1, "none")
    assert (training.epochs, training.batch_size, training.accumulation_steps) == (3, 4, 2)
    assert (training.optimizer, training.learning_rate, training.schedule) == ("paged_adamw_32bit", 2e-4, "cosine")
    assert (training.weight_decay, training.max_grad_norm, training.warmup_ratio) == (0.001, 0.3, 0.03)
    assert (training.save_every, training.log_every_steps, training.seed) == ("epoch", 5, 42)
    assert training.gradient_checkpointing and data.packing and data.max_tokens == 2048 and config.report_to == ()
    assert base.quantization == "nf4" and base.double_quantization


def test_the_quotes_one_is_as_large_as_the_adapter_it_comes_from(preset):
    """31 MB: rank 16 on `query_key_value` of BLOOM-7B, 30 layers from 4,096 to 3 × 4,096, in float32."""
    lora = preset("bloom-quotes").lora
    assert 30 * lora.rank * (4096 + 3 * 4096) == 7_864_320 and lora.target_modules == ("query_key_value",)


def test_a_name_that_is_none_is_refused(train):
    assert "llama-2-7b-qlora" in train("presets", "llama", exit_code=2).stderr


def test_they_are_in_the_package():
    assert PRESETS.parent == Path(__file__).parents[2] / "trainer" / "loraplex_trainer"
