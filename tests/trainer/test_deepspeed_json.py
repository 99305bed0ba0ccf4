"""A DeepSpeed JSON file: what its values become, what the engine gets, and what is refused. No process starts."""

import json

import pytest

from loraplex_trainer.config import RunConfig
from loraplex_trainer.deepspeed_json import engine_settings
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.run_file import load_config

# transformers' own example for stage 2, where all that the run decides is "auto".
AUTO = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.fixture
def load(tmp_path, write_run, monkeypatch):
    """Reads a run file that says nothing of the training beside this DeepSpeed file, as one of so many processes."""

    def read(given, processes: int = 1, **training) -> tuple[RunConfig, list[str]]:
        path = tmp_path / "zero.json"
        path.write_text(json.dumps(given))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        lines: list[str] = []
        run = write_run(training=training | {"distributed": {"deepspeed": str(path)}})
        return load_config(run, tell=lines.append), [line.removeprefix(f"{path}: ") for line in lines]

    return read


def test_the_file_of_the_first_systems(load):
    """Micro-batch 160, Adam at 1e-3, stage 1 with its state on the CPU: all of it told, none of it lost."""
    given = {
        "train_micro_batch_size_per_gpu": 160,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
        "zero_optimization": {
            "stage": 1,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "overlap_comm": False,
            "contiguous_gradients": False,
        },
    }
    config, lines = load(given, processes=4)
    training = config.training
    assert (training.batch_size, training.accumulation_steps) == (160, 4)
    assert (training.optimizer, training.learning_rate) == ("adamw", 1e-3)
    assert (training.distributed.strategy, training.distributed.offload) == ("zero1", "cpu")
    assert "gradient_accumulation_steps: 1, in each of 4 processes -> training.accumulation_steps: 4" in lines
    assert "optimizer.type: Adam -> training.optimizer: adamw" in lines and len(lines) == 6
    told = engine_settings(given, training, width=64)
    assert told["zero_optimization"] == given["zero_optimization"]
    assert told["gradient_clipping"] == 1.0 and "optimizer" not in told


def test_what_is_auto_is_ours(load):
    config, _ = load(AUTO, learning_rate=3e-4, batch_size=2, accumulation_steps=6)
    training = config.training
    assert (training.learning_rate, training.batch_size, training.accumulation_steps) == (3e-4, 2, 6)
    assert training.schedule == "constant_with_warmup" and config.base.dtype == "float32"
    zero = engine_settings(AUTO, training, width=64)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 64 * 64 and zero["offload_optimizer"]["pin_memory"] is True


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4}, "accumulation_steps", 8),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 4}, "batch_size", 4),
        ({"train_batch_size": 32}, "batch_size", 16),
        ({"train_batch_size": 32}, "accumulation_steps", 2),
        ({"gradient_clipping": 0.3}, "max_grad_norm", 0.3),
        ({"gradient_clipping": 0}, "max_grad_norm", None),
        ({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, "momentum", 0.9),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.99]}}}, "betas", (0.8, 0.99)),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7}}}, "warmup_steps", 7),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 5e-4}}}, "learning_rate", 5e-4),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {"cos_min_ratio": 0.2}}}, "min_lr_ratio", 0.2),
    ],
)
def test_what_a_value_becomes(load, given, key, value):
    """With two processes, whose accumulation adds up."""
    config, lines = load(given, processes=2)
    assert getattr(config.training, key) == value
    assert any(f"-> training.{key}: " in line for line in lines)


def test_a_stage_of_none_is_plain_data_parallelism(load):
    assert load({})[0].training.distributed.strategy == "ddp"
    assert load({"zero_optimization": {"stage": 0}})[0].training.distributed.strategy == "ddp"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu: 8", "training.batch_size is 4"]),
        ({"train_micro_batch_size_per_gpu": 0}, ["train_micro_batch_size_per_gpu: 0", "whole number"]),
        (
            {"train_batch_size": 9, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
            ["train_batch_size: 9", "4 × 2 × 2 processes"],
        ),
        ({"train_batch_size": 9}, ["train_batch_size: 9", "2 processes to divide it"]),
        ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation", "unknown", "'zero_optimization'"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage: 4", "0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, ["zero_optimization.cpu_offload", "true"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            ["offload_param.device: nvme", "none or cpu"],
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param", "stage 2"]),
        ({"zero_optimization": {"stage": 2.0}}, ["zero_optimization.stage: 2.0", "0, 1, 2 or 3"]),
        (
            {"zero_optimization": {"offload_optimizer": "cpu"}},
            ["zero_optimization.offload_optimizer: cpu", "a mapping"],
        ),
        ({"zero_optimization": {"offload_param": True}}, ["zero_optimization.offload_param: true", "a mapping"]),
        ({"scheduler": {"type": ["WarmupLR"]}}, ['scheduler.type: ["WarmupLR"]', "expected WarmupLR"]),
        ({"scheduler": {"params": [1]}}, ["scheduler.params: [1]", "a mapping"]),
        ({"optimizer": {"params": 1}}, ["optimizer.params: 1", "a mapping"]),
        ({"fp16": {"enabled": 1}}, ["fp16.enabled: 1", "expected true, false"]),
        ({"optimizer": {"type": "OneBitAdam"}}, ["optimizer.type: OneBitAdam", "AdamW"]),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, ["adam_w_mode: false", "expected true"]),
        ({"optimizer": {"type": "Adam", "params": {"rate": 1}}}, ["optimizer.params.rate", "1"]),
        ({"scheduler": {"type": "OneCycle"}}, ["scheduler.type: OneCycle", "WarmupLR"]),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "log"}}},
            ["warmup_type: log", "expected linear"],
        ),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}}, ["total_num_steps: 9", '"auto"']),
        ({"tensorboard": {"enabled": True}}, ["tensorboard", "report_to"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", "base.dtype is float32"]),
        (
            {
                "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
                "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3}},
            },
            ["warmup_max_lr: 0.002", "training.learning_rate to 0.001", "keep one"],
        ),
        ([], ["zero.json", "mapping"]),
    ],
)
def test_what_disagrees_or_is_not_to_be_had_is_refused(load, tmp_path, given, words):
    with pytest.raises(ConfigError) as refused:
        load(given, processes=2, batch_size=4)
    assert all(word in str(refused.value) for word in words), refused.value
    assert str(refused.value).startswith(f"training.distributed.deepspeed: {tmp_path / 'zero.json'}: ")


def test_a_file_that_is_not_there_is_named(write_run, train):
    result = train(write_run(), "deepspeed=no-such.json", exit_code=2)
    assert result.stderr == "error: training.distributed.deepspeed: no-such.json: No such file or directory\n"
