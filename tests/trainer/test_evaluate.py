"""The held-out scores: made by the serving engine, checked against transformers' own generation with peft."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex_trainer.config import load_config
from loraplex_trainer.data import read_split
from loraplex_trainer.evaluate import exact_match, tag_f1

LEARN = {"max_steps": 80, "batch_size": 16, "learning_rate": 2e-2}
SHORT = {"metric": "tag_f1", "max_tokens": 16}


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        (" River,stone ", "river, Stone", 1.0),
        ("river, river", "river, stone", 2 / 3),
        ("river, stone, sea, sky", "river, stone", 2 / 3),
        ("sea", "river", 0.0),
        ("", "river", 0.0),
        ("river", "", 0.0),
        ("", " , ", 1.0),
    ],
)
def test_tag_f1_compares_sets(answer, truth, score):
    assert tag_f1(answer, truth) == pytest.approx(score)


def test_exact_match_looks_past_outer_space_only():
    assert exact_match(" river\n", "river") == 1.0
    assert exact_match("River", "river") == 0.0


@torch.no_grad()
def reference_answers(base_folder, adapter_folder, prompts, max_tokens):
    """Greedy answers of transformers and peft, one prompt at a time: text, and whether it stopped by itself."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter_folder) if adapter_folder else model
    answers = []
    for prompt in prompts:
        ids = list(tokenizer(prompt).input_ids)
        start = len(ids)
        while len(ids) - start < max_tokens and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        stopped = ids[-1] == tokenizer.eos_token_id
        answers.append((tokenizer.decode(ids[start:], skip_special_tokens=True), stopped))
    return answers


def test_the_scores_are_those_of_transformers_and_peft(write_run, train, receipt, base_folder, tmp_path):
    path = write_run(training=LEARN, evaluation=SHORT)
    result = train(path)
    config = load_config(path)
    heldout = read_split(config.data.heldout, config.data)
    expected = {}
    for prefix, folder in (("", config.folder), ("base_", None)):
        answers = reference_answers(base_folder, folder, heldout.prompts, 16)
        scores = [tag_f1(text, truth) for (text, _), truth in zip(answers, heldout.completions, strict=True)]
        expected[f"{prefix}tag_f1"] = sum(scores) / len(scores)
        expected[f"{prefix}stop_rate"] = sum(stopped for _, stopped in answers) / len(answers)
    base_stop_rate = expected.pop("base_stop_rate")
    assert receipt()["metrics"] == pytest.approx(expected)
    # The EOS was learnt: the random base does not stop, its adapter does; and it answers with some of the tags.
    assert base_stop_rate < 0.2 and expected["stop_rate"] > 0.8
    assert expected["base_tag_f1"] == 0.0 and expected["tag_f1"] > 0.1
    assert f"{expected['tag_f1']:.3f}" in result.stdout and "stop_rate" in result.stdout


def test_a_4_bit_base_is_scored_in_4_bit(write_run, train, receipt):
    train(write_run(base__quantization="nf4", training=LEARN, evaluation=SHORT | {"metric": "exact_match"}))
    assert receipt()["metrics"].keys() == {"exact_match", "stop_rate", "base_exact_match"}
    assert receipt()["metrics"]["stop_rate"] > 0.8


def test_prompts_without_room_for_an_answer_are_refused_before_training(write_run, train):
    result = train(write_run(evaluation={"metric": "tag_f1", "max_tokens": 250}), exit_code=2)
    assert "evaluation.max_tokens = 250" in result.stderr and "256" in result.stderr
    assert "step 1/" not in result.stdout
