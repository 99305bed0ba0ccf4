"""trl's SFTTrainer as an oracle: of the same file, base and fresh adapter it must have the losses that we have.

It is no dependency: `pip install --no-deps trl` brings it, the rest is there. It pings home at each start, and sets the
base's pad token to the tokenizer's, which is the end of the sequence here: labels must not come from that (trl#1623).
"""

import csv
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainer.conftest import rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow
STEPS, RATE, LONGEST = 4, 1e-2, 128


@pytest.fixture
def trl(monkeypatch):
    """Off line, though what it asks has read its environment already."""
    module = pytest.importorskip("trl", reason="scripts/test --all, or: pip install -c constraints.txt trl")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return module


@pytest.fixture
def run(write_run):
    """All rows in each step, so that their order is nothing: three steps after the first show what was learnt."""
    training = {"max_steps": STEPS, "batch_size": 48, "learning_rate": RATE, "schedule": "constant", "warmup_steps": 0}
    return lambda **data: write_run(training=training | {"log_every_steps": 1}, **data)


def our_losses(train, run: Path, folder: Path) -> list[float]:
    train(run)
    with (folder / "adapters/tagger/.training/loss.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def their_losses(trl, base: Path, data: Path, folder: Path, packing: bool) -> list[float]:
    from datasets import Dataset

    made = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    texts = [{"prompt": f"{row['quote']} ->:", "completion": " " + ", ".join(row["tags"])} for row in made]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(42)  # as training.seed: A is drawn, module by module
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = trl.SFTConfig(
        str(folder / "trl"),
        per_device_train_batch_size=len(texts),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        max_length=LONGEST,
        packing=packing,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = trl.SFTTrainer(
        get_peft_model(model, lora), settings, train_dataset=Dataset.from_list(texts), processing_class=tokenizer
    )
    trainer.train()
    assert (len(trainer.train_dataset) < len(texts)) is packing
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_losses_are_those_of_trl_packed_and_not(trl, run, train, tmp_path, base_folder):
    data = write_jsonl(tmp_path / "oracle.jsonl", rows(48, seed=3))
    losses = {}
    for packing in (False, True):
        chosen = {"data__train": str(data), "data__packing": packing, "data__max_tokens": LONGEST}
        losses["ours", packing] = our_losses(train, run(**chosen), tmp_path)
        losses["trl's", packing] = their_losses(trl, base_folder, data, tmp_path, packing)
    expected = losses["trl's", False]
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.5
    for which, found in losses.items():
        assert found == pytest.approx(expected, abs=1e-5), which
