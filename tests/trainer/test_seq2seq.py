"""T5-style bases: the encoder reads the prompt, the decoder learns the answer; scored by transformers, never served."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import EOS, assert_measured, heldout_examples, loss_of, make_base, reloaded
from oracle import engine_for
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

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


def test_each_answer_of_a_conversation_is_learnt_after_all_that_is_before_it(write_run, train, receipt, t5, tmp_path):
    rows = ["<usr> river <bot> stone <usr> winter garden <bot> letter", "<usr> harbor <bot> lantern, candle"]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    data = {"train": str(path), "heldout": str(path), "form": "usr_bot", "max_tokens": 128}
    run = write_run(data=data, training={"max_steps": 1, "batch_size": 2})
    train(run, "evaluation.metric=exact_match")
    examples = heldout_examples(run)
    assert [len(example.trained) for example in examples] == [2, 1]
    alone, total = AutoModelForSeq2SeqLM.from_pretrained(t5), 0.0
    for example in examples:
        ids = torch.tensor([example.ids])
        for start, stop in example.trained:
            total += alone(input_ids=ids[:, :start], labels=ids[:, start:stop]).loss.item() * (stop - start)
    expected = total / sum(example.answer_tokens for example in examples)
    assert receipt()["losses"]["train_first"] == pytest.approx(expected, abs=1e-5)
    assert receipt()["metrics"]["base_heldout_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__packing": True}, "data.packing"),
        ({"data__loss_on": "all"}, "data.loss_on"),
        ({"data": {"train": "x.txt", "form": "text"}}, "data.form"),
    ],
    ids=str,
)
def test_what_leaves_the_encoder_nothing_to_read_is_refused(write_run, train, changes, words):
    message = train(write_run(**changes), exit_code=2).stderr
    assert words in message and "seq2seq" in message and message.count("\n") == 1


def test_a_tokenizer_that_ends_each_text_as_t5_s_does_is_read_as_it_is(write_run, train, receipt, t5):
    """T5's encoder has seen every text with its end: the prompt keeps it, and the answer has one of its own."""
    tokenizer = AutoTokenizer.from_pretrained(t5)
    ended = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = ended
    tokenizer.save_pretrained(t5)
    run = write_run()
    train(run)
    example = heldout_examples(run)[0]
    ((start, stop),) = example.trained
    assert example.ids[start - 1] == example.ids[stop - 1] == EOS and example.ids.count(EOS) == 2
    assert receipt()["losses"]["train_last"] < receipt()["losses"]["train_first"]


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
