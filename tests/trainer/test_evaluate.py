"""The held-out scores: made by the serving engine, checked against transformers' own generation with peft."""

import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from serving import serving
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loraplex_registry.cli import cli as registry_command
from loraplex_registry.registry import Registry
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig
from loraplex_trainer.card import _cell
from loraplex_trainer.data import read_split
from loraplex_trainer.errors import EvaluationError
from loraplex_trainer.metrics import exact_match, find_metric, tag_f1
from loraplex_trainer.run_file import load_config

LEARN = {"max_steps": 80, "batch_size": 16, "learning_rate": 2e-2}
QUIET = {"general": "none", "samples": 0, "goldens": 0}
SHORT = {"metric": "tag_f1", "max_tokens": 16, **QUIET}


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


@torch.no_grad()
def reference_loss(base_folder, adapter_folder, config):
    """Mean nats of the answer tokens and the EOS after them, by transformers and peft."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter_folder) if adapter_folder else model
    losses = []
    heldout = read_split(config.data.heldout, config.data)
    for prompt, completion in zip(heldout.prompts, heldout.completions, strict=True):
        start = len(tokenizer(prompt).input_ids)
        ids = torch.tensor([[*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        losses += [-logprobs[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1])]
    return sum(losses) / len(losses)


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
        expected[f"{prefix}heldout_loss"] = reference_loss(base_folder, folder, config)
    assert receipt()["metrics"] == pytest.approx(expected, abs=1e-4)
    assert expected["heldout_loss"] == pytest.approx(receipt()["losses"]["heldout"], abs=1e-4)  # the trainer's own
    # The EOS was learnt: the random base does not stop, its adapter does; and it answers with some of the tags.
    assert expected["base_stop_rate"] < 0.2 and expected["stop_rate"] > 0.8
    assert expected["base_tag_f1"] == 0.0 and expected["tag_f1"] > 0.1
    assert f"{expected['tag_f1']:.4f}" in result.stdout and "stop_rate" in result.stdout


def test_a_4_bit_base_is_scored_in_4_bit(write_run, train, receipt):
    train(write_run(base__quantization="nf4", training=LEARN, evaluation=SHORT | {"metric": "exact_match"}))
    names = ("heldout_loss", "exact_match", "stop_rate")
    assert receipt()["metrics"].keys() == {f"{prefix}{name}" for prefix in ("", "base_") for name in names}
    assert receipt()["metrics"]["stop_rate"] > 0.8


def test_without_a_metric_the_stop_rate_is_that_with_one(write_run, train, receipt, settings):
    """Of the first 64 held-out prompts; those after them are of a kind whose answers do not end."""
    rows = Path(settings["data"]["heldout"]).read_text().splitlines()
    strange = [json.dumps({"quote": "@" * 200, "tags": []})] * 16
    Path(settings["data"]["heldout"]).write_text("\n".join(rows * 8 + strange))
    train(write_run(training=LEARN, evaluation={**SHORT, "examples": 64}))
    train(write_run(name="none", training=LEARN, evaluation=SHORT | {"metric": "none"}))
    scored, plain = (receipt(name)["metrics"] for name in ("tagger", "none"))
    assert plain.keys() == {"heldout_loss", "base_heldout_loss", "stop_rate", "base_stop_rate"}
    assert {key: plain[key] for key in ("stop_rate", "base_stop_rate")} == {
        key: scored[key] for key in ("stop_rate", "base_stop_rate")
    }
    assert plain["stop_rate"] > 0.8


def test_rows_of_text_ask_nothing_and_have_no_stop_rate(write_run, train, receipt, tmp_path):
    (tmp_path / "text.txt").write_text("the river and the stone\nthe lantern and the harbor\n" * 4)
    text = str(tmp_path / "text.txt")
    train(write_run(data={"train": text, "heldout": text, "form": "text", "max_tokens": 64}))
    assert receipt()["metrics"].keys() == {"heldout_loss", "base_heldout_loss"}


@pytest.mark.parametrize("changes", [{"evaluation__samples": 3, "data__heldout": None}, {}], ids=["samples", "heldout"])
@pytest.mark.parametrize("check", [(), ("--check", "--no-timing")], ids=["run", "check"])
def test_answers_that_fill_the_context_are_refused_before_training(write_run, train, changes, check):
    """The card had no samples then, and nothing said so."""
    result = train(write_run(**changes, evaluation__max_tokens=256), *check, exit_code=2)
    assert result.stderr.startswith("error: evaluation.max_tokens: 256: expected less than the 256 tokens")
    assert "step 1/" not in result.stdout


def test_prompts_without_room_for_an_answer_are_refused_before_training(write_run, train):
    result = train(write_run(evaluation={"metric": "tag_f1", "max_tokens": 250}), exit_code=2)
    assert "evaluation.max_tokens = 250" in result.stderr and "256" in result.stderr
    assert "step 1/" not in result.stdout


def test_forgetting_is_measured_on_general_text_with_and_without_the_adapter(
    write_run, train, receipt, base_folder, tmp_path
):
    text = "2 + 2 = 4; 7 * 8 = 56; 19 - 3 = 16; 81 / 9 = 9. " * 4
    (tmp_path / "general.txt").write_text(text)
    general = {**QUIET, "general": str(tmp_path / "general.txt")}
    train(write_run(training=LEARN, evaluation=general))
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    ids = torch.tensor([tokenizer(text).input_ids])
    assert ids.shape[1] < 256
    for key, folder in (("general_loss", tmp_path / "adapters/tagger"), ("base_general_loss", None)):
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder) if folder else model
        with torch.no_grad():
            assert receipt()["metrics"][key] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-4)
    assert receipt()["metrics"]["general_loss"] > receipt()["metrics"]["base_general_loss"]  # it forgot


def test_the_text_that_comes_along_is_scored_by_default(write_run, train, receipt):
    train(write_run(evaluation={}))
    assert {"general_loss", "base_general_loss"} <= receipt()["metrics"].keys()


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"\xff\xfe", "not UTF-8"), (b"  \n", "holds no text")]
)
def test_general_text_that_is_none_is_told_before_training(write_run, train, tmp_path, content, said):
    file = tmp_path / "general.txt"
    if content is not None:
        file.write_bytes(content)
    result = train(write_run(evaluation={"general": str(file)}), exit_code=2)
    assert "evaluation.general" in result.stderr and said in result.stderr and "step 1/" not in result.stdout


METRIC = """
from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import numpy as np

@dataclass
class Score:
    value: float

def lone(answers):
    return 0.5

def named(*, answers, truths):
    return 0.5

def numpys(answers, truths):
    return np.float32(Score(0.5).value)

def huge(answers, truths):
    return 10**400

def truth(answers, truths):
    return True

def lengths(answers, truths):
    assert len(answers) == len(truths) == 8
    return {"words": fmean(len(a.split()) for a in answers), "commas": fmean(a.count(",") for a in answers)}

def half(answers, truths):
    return 0.5

def text(answers, truths):
    return "good"

def broken(answers, truths):
    raise KeyError("no such tag")

def heldout_loss(answers, truths):
    return 0.001

def base_half(answers, truths):
    return 0.5

def ours(answers, truths):
    return {"f": 0.5, "stop_rate": 1.0}

def bases(answers, truths):
    return {"f": 0.5, "base_f": 0.1}

def nothing(answers, truths):
    return {}

def quits(answers, truths):
    raise SystemExit(0)

class Mute(Exception):
    def __str__(self):
        raise ValueError

def mute(answers, truths):
    raise Mute
"""


def test_a_metric_can_be_a_function_of_the_users(write_run, train, receipt, tmp_path):
    (tmp_path / "mine.py").write_text(METRIC)
    train(write_run(evaluation={**SHORT, "metric": f"python: {tmp_path}/mine.py:lengths"}))
    assert {"words", "commas", "base_words", "base_commas", "stop_rate"} <= receipt()["metrics"].keys()
    train(write_run(evaluation={**SHORT, "metric": f"python:{tmp_path}/mine.py:half"}))
    assert receipt()["metrics"]["half"] == receipt()["metrics"]["base_half"] == 0.5
    assert find_metric(f"python:{tmp_path}/mine.py:numpys")(["a"], ["b"]) == {"numpys": 0.5}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("gone.py:half", "no such file"),
        ("mine.py:gone", "no function 'gone'"),
        ("bad.py:half", "ZeroDivisionError"),
        ("quits.py:half", "raised SystemExit: 0"),
        ("mine.py:lone", "is called with two lists, answers and truths: too many positional arguments"),
        ("mine.py:named", "is called with two lists, answers and truths: too many positional arguments"),
        ("mine.py:heldout_loss", "heldout_loss is a name of the run's own numbers"),
        ("mine.py:base_half", "base_half is a name of the run's own numbers"),
    ],
)
def test_a_metric_that_is_not_there_is_told_before_training(write_run, train, tmp_path, what, said):
    (tmp_path / "mine.py").write_text(METRIC)
    (tmp_path / "bad.py").write_text("1 / 0")
    (tmp_path / "quits.py").write_text("import sys; sys.exit(0)")
    result = train(write_run(evaluation={**SHORT, "metric": f"python: {tmp_path}/{what}"}), exit_code=2)
    assert "evaluation.metric" in result.stderr and said in result.stderr and "step 1/" not in result.stdout


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("broken", "KeyError: 'no such tag'"),
        ("text", "'good'"),
        ("ours", "gave the key 'stop_rate', a name of the run's own numbers"),
        ("bases", "gave the key 'base_f', a name of the run's own numbers"),
        ("nothing", "gave {}, expected a number, or some by name"),
        ("quits", "raised SystemExit: 0"),
        ("mute", "raised Mute, which cannot be shown"),
    ],
)
def test_a_metric_that_fails_costs_no_training(write_run, train, receipt, tmp_path, function, said):
    (tmp_path / "mine.py").write_text(METRIC)
    run = write_run(evaluation={**SHORT, "metric": f"python: {tmp_path}/mine.py:{function}"})
    result = train(run, exit_code=1)
    assert said in result.stderr and "--resume" in result.stderr
    result = train(run, "--resume", f"evaluation.metric=python:{tmp_path}/mine.py:half")
    assert "step 1/" not in result.stdout and receipt()["metrics"]["half"] == 0.5


@pytest.mark.parametrize(
    ("function", "said"), [("huge", "huge = 10000000.*000000, expected"), ("truth", "truth = True")]
)
def test_a_metric_gives_a_number_that_a_receipt_can_hold(tmp_path, function, said):
    (tmp_path / "mine.py").write_text(METRIC)
    with pytest.raises(EvaluationError, match=said):
        find_metric(f"python:{tmp_path}/mine.py:{function}")(["a"], ["b"])


def test_rouge_l_knows_words_of_any_alphabet():
    rouge_l = find_metric("rouge_l")
    assert rouge_l
    assert rouge_l(["the cat sat"], ["the cat sat on the mat"])["rouge_l"] == pytest.approx(2 / 3)
    assert rouge_l(["고양이가 앉았다", "강"], ["고양이가 앉았다", "산"])["rouge_l"] == pytest.approx(0.5)


def test_fewer_examples_can_be_scored(write_run, train, receipt, settings, tmp_path):
    """The first ones: the scores are those of a file that holds no others."""
    rows = Path(settings["data"]["heldout"]).read_text().splitlines()
    (tmp_path / "two.jsonl").write_text("\n".join(rows[:2]))
    evaluation = SHORT | {"metric": "rouge_l", "examples": 2}
    train(write_run(evaluation=evaluation, training=LEARN))
    train(write_run(name="two", evaluation=evaluation, training=LEARN, data__heldout=str(tmp_path / "two.jsonl")))
    assert receipt()["metrics"] == receipt("two")["metrics"]
    assert receipt()["metrics"]["heldout_loss"] != pytest.approx(receipt()["losses"]["heldout"], abs=1e-3)  # of all


def test_the_goldens_are_what_transformers_and_peft_say(write_run, train, receipt, base_folder, tmp_path):
    train(write_run(evaluation={**QUIET, "goldens": 2}))
    goldens = receipt()["goldens"]
    assert len(goldens) == 2 and goldens[0]["ids"] != goldens[1]["ids"]
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    for golden in goldens:
        assert tokenizer.decode(golden["ids"], skip_special_tokens=True) == golden["text"] and golden["text"].endswith(
            " ->:"
        )
        for who, folder in (("adapter", tmp_path / "adapters/tagger"), ("base", None)):
            model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
            model = PeftModel.from_pretrained(model, folder) if folder else model
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([golden["ids"]])).logits[0, -1].log_softmax(-1)
            values, ids = logprobs.topk(10)
            assert [token_id for token_id, _ in golden[who]] == ids.tolist()
            assert [logprob for _, logprob in golden[who]] == pytest.approx(values.tolist(), abs=1e-4)


def test_the_card_shows_scores_and_samples_and_is_the_same_for_the_same_run(write_run, train, receipt, tmp_path):
    evaluation = {"metric": "tag_f1", "max_tokens": 8, "samples": 2}
    for name in ("tagger", "again"):
        train(write_run(name=name, evaluation=evaluation))
    card = (tmp_path / "adapters/tagger/README.md").read_text()
    assert card.replace("# tagger", "# again") == (tmp_path / "adapters/again/README.md").read_text()
    assert f"| tag_f1 | {receipt()['metrics']['base_tag_f1']:.4f} | {receipt()['metrics']['tag_f1']:.4f} |" in card
    samples = card.partition("## Samples")[2].strip().splitlines()
    assert len(samples) == 6 and all(line.count(" | ") == 2 for line in samples[2:])
    with Registry(tmp_path / "registry") as registry:
        version = registry.push("tagger", tmp_path / "adapters/tagger")
        assert version.description.startswith("An adapter of ") and "48 examples" in version.description
        assert registry.card(version.digest) == card


def test_markup_in_a_sample_stays_text():
    assert _cell("a | <b>*x*\n`y` _z_ [l](u)\x07") == (
        "a &#124; &lt;b&gt;&#42;x&#42;<br>&#96;y&#96; &#95;z&#95; &#91;l&#93;(u)\ufffd"
    )


def test_a_promotion_requires_what_was_measured(write_run, train, receipt, tmp_path):
    train(write_run(evaluation=SHORT))
    score = receipt()["metrics"]["tag_f1"]
    shell = CliRunner()
    where = ["--registry", str(tmp_path / "registry")]
    pushed = shell.invoke(registry_command, ["push", "tagger", str(tmp_path / "adapters/tagger"), *where])
    assert pushed.exit_code == 0, pushed.output
    promote = ["promote", "tagger:1", "--to", "production", *where, "--require"]
    refused = shell.invoke(registry_command, [*promote, f"tag_f1>={score + 0.01}"])
    assert refused.exit_code == 1 and "tag_f1" in refused.output
    assert shell.invoke(registry_command, [*promote, f"tag_f1>={score - 0.01}"]).exit_code == 0
    assert shell.invoke(registry_command, [*promote, "heldout_loss<9"]).exit_code == 0


def test_a_trained_adapter_is_served_on_its_base_and_refused_on_another(write_run, train, base_folder, tmp_path):
    """The loop closed: what the trainer wrote down, the server finds, on 4 bits; on other weights it says so."""
    train(write_run(base__quantization="nf4", training=LEARN, evaluation={**QUIET, "goldens": 3}))
    other = shutil.copytree(base_folder, tmp_path / "other")
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig.from_pretrained(base_folder)).save_pretrained(other)
    receipt_file = tmp_path / "adapters/tagger/receipt.json"
    written = json.loads(receipt_file.read_text())
    written["base"] |= {"fingerprint": None, "path": None}
    receipt_file.write_text(json.dumps(written))
    for base, status in ((base_folder, 200), (other, 422)):
        with Registry(tmp_path / f"registry-{status}") as registry:
            registry.push("tagger", tmp_path / "adapters/tagger", base=base)
        config = ServerConfig(str(base), dtype="float32", device="cpu", registry=str(tmp_path / f"registry-{status}"))
        with serving(create_app(config)) as url:
            body = {"prompt": "river ->:", "adapter": "tagger", "max_tokens": 4}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == status, answer.text
    assert "golden prompt" in answer.text
