"""T5-style bases: the encoder reads the prompt, the decoder learns the answer; scored by transformers, never served."""

from pathlib import Path
from typing import Any

import pytest
from bases import assert_measured, heldout_examples, loss_of, make_base, reloaded
from oracle import engine_for
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.errors import AdapterRefused, BaseNotFound, BaseUnusable
from loraplex_server.engine.model import load_base


@pytest.fixture
def t5(base_folder, tmp_path) -> Path:
    return make_base(tmp_path / "t5", base_folder, "t5")


@pytest.fixture
def settings(settings, t5) -> dict[str, Any]:
    base = {"model": str(t5), "task": "seq2seq", "quantization": "none", "dtype": "float32", "device": "cpu"}
    return settings | {"base": base}


def test_the_first_loss_is_transformers_own_and_it_falls(write_run, train, receipt, t5):
    run = write_run(training={"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2})
    train(run, f"data.train={run.parent / 'heldout.jsonl'}")
    losses = receipt()["losses"]
    expected = loss_of(AutoModelForSeq2SeqLM.from_pretrained(t5), heldout_examples(run))
    assert losses["train_first"] == pytest.approx(expected, abs=1e-5)
    assert losses["heldout"] < losses["train_first"] - 0.3


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4}},
    "pissa-head": {"lora": {"rank": 4, "init": "pissa", "target_modules": ["q", "v", "wo"]}},
    "ia3": {"method": "ia3", "lora": {}},
    "prompt": {"method": "prompt", "lora": {}},
    "prefix": {"method": "prefix", "lora": {}},
    "p_tuning": {"method": "p_tuning", "lora": {}},
}


@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        "prompt",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pissa-head", "ia3", "prefix", "p_tuning")),
    ],
)
def test_each_method_trains_saves_and_reloads(write_run, train, receipt, tmp_path, t5, kind):
    run = write_run(training={"max_steps": 8, "batch_size": 16}, **KINDS[kind])
    result = train(run, "evaluation.metric=tag_f1", "evaluation.max_tokens=4", "evaluation.general=default")
    losses = receipt()["losses"]
    assert losses["train_last"] < losses["train_first"]
    assert_measured(receipt(), "tag_f1", loss_of(AutoModelForSeq2SeqLM.from_pretrained(t5), heldout_examples(run)))
    assert "registry push" not in result.stdout
    model = reloaded(t5, tmp_path / "adapters/tagger")
    assert loss_of(model, heldout_examples(run)) == pytest.approx(losses["heldout"], abs=5e-5)


def test_both_halves_learn_and_4_batches_of_4_are_1_of_16(write_run, train, receipt, tmp_path):
    for name, batch_size, parts in (("whole", 16, 1), ("parts", 4, 4)):
        steps = {"max_steps": 6, "learning_rate": 1e-2, "batch_size": batch_size, "accumulation_steps": parts}
        train(write_run(name=name, training=steps))
    assert receipt("whole")["losses"] == pytest.approx(receipt("parts")["losses"], abs=1e-5)
    tensors = load_file(tmp_path / "adapters/whole/adapter_model.safetensors")
    for half in (".encoder.", ".decoder."):
        assert any(half in key and ".lora_B." in key and tensor.abs().max() > 0 for key, tensor in tensors.items())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_one_trains_with_checkpointing(write_run, train, receipt, quantization):
    run = write_run(base__quantization=quantization, training__gradient_checkpointing=True)
    train(run)
    assert receipt()["losses"]["train_last"] < receipt()["losses"]["train_first"]


def test_the_engine_refuses_the_base_and_the_adapter(write_run, train, tmp_path, t5, base_folder):
    train(write_run())
    with pytest.raises(BaseUnusable, match="encoder-decoder"):
        Engine(load_base(str(t5), quantization="none", task="seq2seq"))
    with pytest.raises(AdapterRefused, match="SEQ_2_SEQ_LM"):
        engine_for(base_folder, {"it": tmp_path / "adapters/tagger"})


def test_a_base_of_the_other_task_is_refused(write_run, train, t5, base_folder):
    assert "encoder-decoder" in train(write_run(base__model=str(base_folder)), exit_code=2).stderr
    with pytest.raises(BaseNotFound, match="causal"):
        load_base(str(t5))
