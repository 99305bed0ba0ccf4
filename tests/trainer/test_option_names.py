"""Options under the names of transformers, trl, peft and Axolotl: what each becomes, and which are refused."""

from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from loraplex_trainer.config import RunConfig
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.option_names import AS_IT_IS, CHOICES, COMPUTED, INSTEAD, NESTED, RENAMED
from loraplex_trainer.run_file import known_keys, load_config

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture
def load(tmp_path, base_folder):
    """Reads a run file of these settings beside what every run needs; gives the config and what was told."""

    def read(*overrides: str, **settings) -> tuple[RunConfig, list[str]]:
        path = tmp_path / "theirs.yaml"
        needed = {"name": "tagger", "base_model": str(base_folder), "train_file": "train.jsonl"}
        path.write_text(yaml.safe_dump(needed | settings))
        lines: list[str] = []
        return load_config(path, overrides, lines.append), lines

    return read


def test_the_settings_of_the_seven_billion_run_under_their_old_names(load):
    """Llama-2-7B on one 24 GB card, as its TrainingArguments, LoraConfig and BitsAndBytesConfig were written."""
    config, lines = load(
        quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
        peft_config={"r": 64, "lora_alpha": 16, "lora_dropout": 0.1, "bias": "none", "task_type": "CAUSAL_LM"},
        output_dir="results",
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        optim="paged_adamw_32bit",
        save_strategy="epoch",
        logging_steps=5,
        learning_rate=2e-4,
        weight_decay=0.001,
        fp16=False,
        bf16=True,
        max_grad_norm=0.3,
        max_steps=-1,
        warmup_ratio=0.03,
        group_by_length=True,
        lr_scheduler_type="cosine",
        seed=42,
        max_seq_length=2048,
        gradient_checkpointing=True,
        packing=False,
        dataset_text_field="text",
        report_to="tensorboard",
    )
    training, lora = config.training, config.lora
    assert (lora.rank, lora.alpha, lora.dropout) == (64, 16, 0.1)
    assert (training.epochs, training.max_steps, training.batch_size, training.accumulation_steps) == (3, None, 4, 2)
    assert (training.optimizer, training.schedule, training.warmup_ratio) == ("paged_adamw_32bit", "cosine", 0.03)
    assert (training.learning_rate, training.weight_decay, training.max_grad_norm) == (2e-4, 0.001, 0.3)
    assert (training.save_every, training.log_every_steps, training.seed) == ("epoch", 5, 42)
    assert (config.base.quantization, config.base.dtype, config.data.max_tokens) == ("nf4", "bfloat16", 2048)
    assert str(config.output) == "results" and config.report_to == ("tensorboard",)
    assert (config.data.form, config.data.column, config.data.packing) == ("text", "text", False)
    assert training.gradient_checkpointing
    assert "per_device_train_batch_size -> training.batch_size" in lines
    assert "bf16: true -> base.dtype: bfloat16" in lines
    assert "bias -> lora.bias" in lines
    assert "task_type: CAUSAL_LM: needs no setting" in lines
    assert len(lines) == 31  # every option is told of


@pytest.mark.parametrize(
    ("given", "taken"), [("wandb", ("wandb",)), ("none", ()), (["mlflow", "wandb"], ("mlflow", "wandb"))]
)
def test_one_tracker_needs_no_list(load, given, taken):
    assert load(report_to=given)[0].report_to == taken


@pytest.mark.parametrize(
    ("theirs", "key", "value"),
    [
        ({"micro_batch_size": 2}, "training.batch_size", 2),
        ({"num_epochs": 1.5}, "training.epochs", 1.5),
        ({"sequence_len": 100}, "data.max_tokens", 100),
        ({"optim": "adamw_torch_fused"}, "training.optimizer", "adamw"),
        ({"optimizer": "adamw_bnb_8bit"}, "training.optimizer", "adamw_8bit"),
        ({"adam_beta1": 0.8}, "training.betas", (0.8, 0.999)),
        ({"adam_beta1": 0.8, "adam_beta2": 0.95}, "training.betas", (0.8, 0.95)),
        ({"adam_epsilon": 1e-6}, "training.eps", 1e-6),
        ({"max_grad_norm": 0}, "training.max_grad_norm", None),
        ({"max_steps": 7}, "training.max_steps", 7),
        ({"warmup_steps": 10}, "training.warmup_steps", 10),
        ({"warmup_steps": 0.1}, "training.warmup_ratio", 0.1),  # warmup_ratio's new name
        ({"warmup_steps": 0, "warmup_ratio": 0.2}, "training.warmup_ratio", 0.2),
        ({"lr_scheduler": "linear"}, "training.schedule", "linear"),
        ({"lr_scheduler_type": "constant"}, "training.warmup_ratio", 0.0),
        ({"lr_scheduler_type": "constant_with_warmup"}, "training.warmup_ratio", 0.05),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}},
            "training.min_lr_ratio",
            0.2,
        ),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 4}},
            "training.cycles",
            4,
        ),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}}, "training.power", 2.0),
        ({"cosine_min_lr_ratio": 0.3}, "training.schedule", "cosine_with_min_lr"),
        ({"save_strategy": "steps", "save_steps": 9}, "training.save_every", 9),
        ({"save_strategy": "epoch", "save_steps": 9}, "training.save_every", "epoch"),
        ({"load_in_4bit": True}, "base.quantization", "nf4"),
        ({"load_in_4bit": False}, "base.quantization", "none"),
        ({"load_in_4bit": False, "load_in_8bit": False}, "base.quantization", "none"),
        ({"load_in_8bit": False, "adapter": "qlora"}, "base.quantization", "nf4"),
        ({"torch_dtype": "torch.float32"}, "base.dtype", "float32"),
        ({"dtype": "bf16"}, "base.dtype", "bfloat16"),
        ({"no_cuda": True}, "base.device", "cpu"),
        ({"use_cpu": False}, "base.device", "auto"),
        ({"lora_target_linear": True}, "lora.target_modules", "all-linear"),
        ({"lora_target_linear": False, "lora_target_modules": ["q_proj"]}, "lora.target_modules", ("q_proj",)),
        ({"target_modules": ["q_proj"]}, "lora.target_modules", ("q_proj",)),
        ({"use_rslora": True}, "lora.rslora", True),
        ({"use_dora": True}, "lora.dora", True),
        ({"init_lora_weights": True}, "lora.init", "default"),
        ({"init_lora_weights": "pissa_niter_16"}, "lora.init", "pissa"),
        ({"peft_init_lora_weights": "gaussian"}, "lora.init", "gaussian"),
        ({"bias": "lora_only"}, "lora.bias", "lora_only"),
        ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save", ("lm_head",)),
        ({"rank_pattern": {"q_proj": 4}}, "lora.rank_pattern", {"q_proj": 4}),
        ({"loraplus_lr_ratio": 16.0}, "lora.plus_ratio", 16.0),
        ({"gradient_checkpointing": True}, "training.gradient_checkpointing", True),
        (
            {"activation_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            "training.gradient_checkpointing",
            True,
        ),
        ({"device_map": "auto"}, "base.device_map", "auto"),
        ({"device_map": {"": 0}}, "base.device_map", {"": 0}),
        ({"load_in_8bit": True}, "base.quantization", "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "base.quantization", "fp4"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": False}, "base.double_quantization", False),
        ({"fp16": True}, "base.dtype", "float16"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "base.task", "seq2seq"),
        ({"model_type": "AutoModelForSeq2SeqLM"}, "base.task", "seq2seq"),
        ({"peft_config": {"peft_type": "IA3", "target_modules": ["v_proj"]}}, "ia3.target_modules", ("v_proj",)),
        (
            {"peft_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8, "prompt_tuning_init": "RANDOM"}},
            "prompt.init",
            "random",
        ),
        (
            {"peft_config": {"peft_type": "P_TUNING", "encoder_reparameterization_type": "LSTM"}},
            "prompt.encoder",
            "lstm",
        ),
        ({"peft_config": {"peft_type": "PREFIX_TUNING", "prefix_projection": True}}, "method", "prefix"),
        ({"fsdp": "full_shard auto_wrap"}, "training.distributed.strategy", "fsdp"),
        ({"fsdp": ["full_shard", "auto_wrap", "offload"]}, "training.distributed.offload", "cpu"),
        ({"fsdp": True, "fsdp_config": {"reshard_after_forward": True}}, "training.distributed.offload", "none"),
        ({"fsdp": "", "fsdp_config": {"cpu_offload": True}}, "training.distributed.strategy", "ddp"),
        (
            {
                "fsdp_version": 2,
                "fsdp_config": {"fsdp_offload_params": True, "use_orig_params": True},
            },
            "training.distributed.offload",
            "cpu",
        ),
        ({"lora_dropout": None}, "lora.dropout", 0.0),  # Axolotl's files are full of empty keys
    ],
)
def test_what_an_option_becomes(load, theirs, key, value):
    config, lines = load(**theirs)
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value
    names = [name for option, given in theirs.items() for name in (given if option == "peft_config" else [option])]
    assert all(any(line.startswith(name) for line in lines) for name in names)


@pytest.mark.parametrize("strategy", ["eval_strategy", "evaluation_strategy"])
def test_measuring_on_the_way_with_the_best_kept(load, strategy):
    config, _ = load(
        validation_file="heldout.jsonl",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        early_stopping_patience=2,
        early_stopping_threshold=0.01,
        **{strategy: "steps", "eval_steps": 20},
    )
    assert config.training.evaluate_every == 20 and config.training.keep == "best"
    assert (config.training.early_stopping.patience, config.training.early_stopping.min_delta) == (2, 0.01)
    for never in ("no", False):  # a bare no is YAML's false
        assert load(validation_file="h.jsonl", **{strategy: never})[0].training.evaluate_every is None


def test_linear_targets_may_be_off_where_the_section_names_modules(load):
    config, _ = load(lora_target_linear=False, lora={"target_modules": ["v_proj"]})
    assert config.lora.target_modules == ("v_proj",)


def test_as_key_value_they_win_over_the_file_under_either_name(write_run, train):
    result = train(write_run(), "per_device_train_batch_size=4", "training.max_steps=2", "logging_steps=2")
    assert "per_device_train_batch_size -> training.batch_size\n" in result.stdout
    assert "step 2/2" in result.stdout and "step 1/2" not in result.stdout
    assert load_config(write_run(), ["per_device_train_batch_size=4"]).training.batch_size == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["num_train_epochs=1", "training.epochs=2"], ["training.epochs", "num_train_epochs", "keep one"]),
        (["num_train_epochs=1", "num_epochs=2"], ["num_train_epochs", "num_epochs", "training.epochs", "1", "2"]),
        (["fp16=true", "bf16=true"], ["fp16", "bf16", "base.dtype"]),
        (["push_to_hub=true"], ["push_to_hub", "true"]),
        (["hub_model_id=me/it"], ["hub_model_id", "registry hub push"]),
        (["resume_from_checkpoint=out"], ["resume_from_checkpoint", "--resume"]),
        (["per_device_eval_batch_size=8"], ["per_device_eval_batch_size", "training.batch_size"]),
        (["bias=most"], ["lora.bias", "most", "'lora_only'"]),
        (["lora_bias=true"], ["lora_bias", "true", "no bias of their own"]),
        (["init_lora_weights=false"], ["init_lora_weights", "false", "lora.init"]),
        (["init_lora_weights=eva"], ["lora.init", "eva", "'pissa'"]),
        (["gradient_checkpointing_kwargs={use_reentrant: true}"], ["use_reentrant", "not reentrant"]),
        (["llm_int8_threshold=6.0"], ["llm_int8_threshold", "6.0", "dequantized"]),
        (["peft_type=LOHA"], ["peft_type", "LOHA", "p_tuning"]),
        (["deepspeed={zero_optimization: {stage: 2}}"], ["deepspeed", "JSON file"]),
        (["fsdp=shard_grad_op auto_wrap"], ["fsdp", "shard_grad_op", "zero2"]),
        (["fsdp_config={activation_checkpointing: true}"], ["fsdp_config.activation_checkpointing", "expected false"]),
        (["fsdp_config={fsdp_ofload_params: true}"], ["fsdp_config.fsdp_ofload_params", "unknown"]),
        (["task_type=TOKEN_CLS"], ["task_type", "TOKEN_CLS"]),
        (["optim=lomo"], ["training.optimizer", "lomo", "'adamw_8bit'"]),
        (["lr_scheduler_kwargs={min_lr: 1e-5}"], ["lr_scheduler_kwargs", "training.min_lr_ratio"]),
        (["save_strategy=best"], ["save_strategy", "best", "training.save_every"]),
        (["eval_strategy=steps"], ["eval_strategy", "training.evaluate_every"]),
        (["quantization_config={load_in_3bit: true}"], ["load_in_3bit", "quantization_config"]),
        (["quantization_config=nf4"], ["quantization_config", "mapping"]),
        (["learning_rate=high"], ["training.learning_rate", '"high"']),
        (["bf16=[1]"], ["bf16", "[1]"]),
        (['bf16="true"'], ['bf16: "true"', "true or false is expected"]),
        (["use_cpu=1"], ["use_cpu: 1", "true or false is expected"]),
        (['load_in_4bit="true"'], ['load_in_4bit: "true"', "true or false is expected"]),
        (["load_in_4bit=1"], ["load_in_4bit: 1", "true or false is expected"]),
        (["load_in_8bit=[]"], ["load_in_8bit: []", "true or false is expected"]),
        (['fsdp_config={offload_params: "true"}'], ["fsdp_config.offload_params", "expected true or false"]),
        (["lora_target_linear=false"], ["lora_target_linear: false", "lora.target_modules names the modules"]),
        (["peft_init_lora_weights=false"], ["peft_init_lora_weights: false", "lora.init"]),
        (["learning_rate=.nan"], ["training.learning_rate", "NaN", "finite"]),
        (["seed=.nan"], ["training.seed", "NaN", "integer"]),
        (["output_dir=.nan"], ["output", "NaN"]),
        (["max_grad_norm=[]"], ["training.max_grad_norm: []"]),
        (["lr_scheduler_kwargs=3"], ["lr_scheduler_kwargs: 3", "min_lr_rate"]),
        (["lr_scheduler_kwargs=[min_lr_rate]"], ["lr_scheduler_kwargs", "min_lr_rate: "]),
        (["fsdp=3"], ["fsdp: 3", "full_shard"]),
        (["fsdp=[[1]]"], ["fsdp: [[1]]", "full_shard"]),
        (["quantization_config={peft_config: {r: 1}}"], ["peft_config", "unknown option in quantization_config"]),
    ],
)
def test_what_disagrees_or_has_no_counterpart_is_refused(write_run, train, overrides, words):
    result = train(write_run(), *overrides, exit_code=2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("value", [float("nan"), 3, [[1]], {"a": [1]}], ids=repr)
def test_a_value_of_any_kind_is_taken_or_refused(write_run, value):
    """NaN alone was a KeyError under sixty names."""
    run = write_run()
    for name in {*RENAMED, *CHOICES, *AS_IT_IS, *COMPUTED, *INSTEAD, *NESTED}:
        with suppress(ConfigError):
            load_config(run, [f"{name}={yaml.safe_dump(value, default_flow_style=True)}"])


def test_both_names_in_a_file_are_refused(write_run, train):
    result = train(write_run(learning_rate=1e-4), exit_code=2)
    assert "training.learning_rate" in result.stderr and "learning_rate -> " in result.stderr


def test_the_tables_name_keys_that_exist_and_no_name_of_ours():
    keys = set(known_keys())
    chosen = [choice for choices in CHOICES.values() for _, choice in choices]
    assert {*RENAMED.values(), *(key for choice in chosen for key in choice)} <= keys
    tables = [*RENAMED, *CHOICES, *AS_IT_IS, *COMPUTED, *NESTED]
    assert len(tables) == len(set(tables))
    assert not {*tables, *INSTEAD} & set(RunConfig.model_fields)


def test_the_pages_example_is_read(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    (example,) = [block.partition("```")[0] for block in text.split("```yaml\n")[1:] if "base_model:" in block]
    path = tmp_path / "run.yaml"
    path.write_text(example)
    config = load_config(path)
    assert config.training.optimizer == "paged_adamw_32bit" and config.training.accumulation_steps == 4
