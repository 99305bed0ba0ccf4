"""`loraplex train --check`: what it says is what the run then does, and it leaves nothing behind."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bases import make_base
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraplex_server.engine.model import load_base
from loraplex_trainer.adapter import attach
from loraplex_trainer.check import check, rendered
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import encode_split, read_split
from loraplex_trainer.encoding import Example, encoder_for
from loraplex_trainer.loop import Loop
from loraplex_trainer.memory import MemoryEstimate, base_bytes, estimate_memory, gib
from loraplex_trainer.run_file import load_config

NF4 = {"base__quantization": "nf4", "base__dtype": "bfloat16"}


def estimated(config: RunConfig) -> tuple[MemoryEstimate, tuple[Example, ...]]:
    base = load_base(**config.base.load_options, weights=False)
    split = read_split(config.data.train, config.data)
    examples = encode_split(split, encoder_for(base, config.data)).examples
    loaded = base_bytes(base.model, config.base)
    return estimate_memory(attach(base, config), loaded, examples, config.training), examples


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_it_tells_what_the_run_will_do_and_writes_nothing(write_run, train, receipt, tmp_path):
    run = write_run(training__max_steps=None, training__epochs=2)
    before = tree(tmp_path)
    report = train(run, "--check", "--no-timing").stdout
    assert tree(tmp_path) == before
    train(run)
    data = receipt()["data"]["train"]
    assert f"{data['examples']} examples, {data['tokens']:,} tokens, loss on {data['answer_tokens']:,};" in report
    assert "0 truncated by 0 tokens, 0 of 0 tokens left out" in report and "heldout" in report
    assert f"steps: {receipt()['steps']} of 8 × 1 examples, 6 to an epoch" in report
    weights = load_file(tmp_path / "adapters/tagger/adapter_model.safetensors")
    parameters, size = sum(t.numel() for t in weights.values()), sum(t.nbytes for t in weights.values())
    assert f"adapter: {parameters:,} trainable parameters; {size:,} bytes of weights" in report
    assert "time:" not in report


@pytest.mark.parametrize("timing", [(), ("--no-timing",)], ids=["timed", "untimed"])
def test_a_packed_run_is_checked_too(write_run, train, receipt, timing):
    """Its memory is estimated on tensors without numbers, of which none can be asked for its labels."""
    run = write_run(data__packing=True, data__max_tokens=64)
    report = train(run, "--check", *timing).stdout
    train(run)
    assert f"steps: {receipt()['steps']} of 8 × 1 packed rows" in report and "activations" in report


def test_the_examples_show_where_the_loss_is(write_run, train, settings):
    row = json.loads(Path(settings["data"]["train"]).read_text().splitlines()[0])
    report = train(write_run(), "--check", "--no-timing").stdout
    assert f"example 1: {row['quote']} ->:[ {', '.join(row['tags'])}</s>]" in report
    config = load_config(write_run())
    base = load_base(**config.base.load_options, weights=False)
    split = read_split(config.data.train, config.data)
    (example, *_) = encode_split(split, encoder_for(base, config.data)).examples
    coloured = rendered(1, example, base.tokenizer, colour=True)
    green = [coloured.plain[span.start : span.end] for span in coloured.spans if span.style == "green"]
    assert green == [f" {', '.join(row['tags'])}</s>"] and "[" not in coloured.plain


def test_truncated_and_dropped_examples_are_counted(write_run, train, receipt):
    run = write_run(data__max_tokens=14)
    report = train(run, "--check", "--no-timing").stdout
    train(run)
    data = receipt()["data"]["train"]
    assert data["truncated"] > 0
    assert f"{data['truncated']} truncated by {data['cut_tokens']} tokens, {data['dropped']} of " in report


def test_the_time_comes_from_real_steps(write_run, train, tmp_path):
    before = None
    run = write_run(training__max_steps=100, **NF4)
    before = tree(tmp_path)
    report = train(run, "--check").stdout
    assert tree(tmp_path) == before
    told = re.search(r"time: about (\d+) s, at the ([\d,]+) tokens/s", report)
    assert told, report
    # 100 steps of 8 of the 48 examples are 100 / 6 times their tokens
    tokens = int(re.search(r"train: .*, ([\d,]+) tokens", report)[1].replace(",", ""))
    assert int(told[1]) == pytest.approx(100 / 6 * tokens / int(told[2].replace(",", "")), abs=1)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_parts_of_the_estimate_are_those_of_a_real_run(write_run, quantization, optimizer):
    """Base, adapter, gradients and optimizer to a few percent: they follow from shapes."""
    changes = {"base__quantization": quantization, "base__dtype": "bfloat16", "lora": {"rank": 64, "alpha": 64}}
    config = load_config(write_run(training__optimizer=optimizer, **changes))
    estimate, examples = estimated(config)

    base = load_base(**config.base.load_options)
    states = [p.quant_state for p in base.model.parameters() if getattr(p, "quant_state", None)]
    scales = sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    real = sum(t.nbytes for t in [*base.model.parameters(), *base.model.buffers()]) + scales
    assert estimate.base == pytest.approx(real, rel=0.03)
    loop = Loop(attach(base, config), examples, config, 1)
    loop.total_steps = 1
    loop.run(lambda _: False)
    assert estimate.adapter == estimate.gradients == sum(p.nbytes for p in loop.parameters.values())
    state = [loop.optimizer.state[p] for p in loop.parameters.values()]
    maps = ("qmap1", "qmap2")  # one pair for all
    kept = sum(t.nbytes for s in state for key, t in s.items() if isinstance(t, torch.Tensor) and key not in maps)
    assert estimate.optimizer == pytest.approx(kept, rel=0.05, abs=1000)


@pytest.mark.parametrize(
    ("family", "quantization", "double"),
    [
        ("llama", "nf4", False),
        ("llama", "fp4", True),
        ("llama", "int8", True),
        ("t5", "int8", True),
        ("t5", "nf4", True),
        ("bloom", "int8", True),
    ],
)
def test_the_base_of_every_quantization_is_estimated(write_run, base_folder, tmp_path, family, quantization, double):
    folder = base_folder if family == "llama" else make_base(tmp_path / family, base_folder, family)
    task = "seq2seq" if family == "t5" else "causal"
    section = {"model": str(folder), "task": task, "quantization": quantization, "dtype": "bfloat16", "device": "cpu"}
    config = load_config(write_run(base=section, base__double_quantization=double))
    estimate, _ = estimated(config)
    model = load_base(**config.base.load_options).model
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None)]
    scales = sum(s.absmax.nbytes + (s.state2.absmax.nbytes if s.nested else 0) for s in states)
    scales += sum(p.SCB.nbytes for p in model.parameters() if getattr(p, "SCB", None) is not None)
    real = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) + scales
    assert estimate.base == pytest.approx(real, rel=0.03)


METHODS = {
    "ia3": {"method": "ia3", "lora": {}, **NF4},
    "prompt": {"method": "prompt", "lora": {}},
    "prefix": {"method": "prefix", "lora": {}},
    "p_tuning": {"method": "p_tuning", "lora": {}},
    "pissa": {"lora": {"rank": 4, "init": "pissa"}},
    "dora": {"lora": {"rank": 4, "dora": True}},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_every_method_is_checked_and_its_file_is_as_large_as_told(
    write_run, train, base_folder, tmp_path, method, family
):
    task = "causal" if family == "llama" else "seq2seq"
    folder = base_folder if family == "llama" else make_base(tmp_path / family, base_folder, family)
    run = write_run(**METHODS[method] | {"base__model": str(folder), "base__task": task})
    report = train(run, "--check", "--no-timing").stdout
    train(run, "training.max_steps=1")
    size = (tmp_path / "adapters/tagger/adapter_model.safetensors").stat().st_size
    assert f"in a file of {size:,}\n" in report
    assert "memory, an estimate: base " in report


def test_logits_are_counted_all_or_a_piece_of_them(write_run, monkeypatch):
    """Of a vocabulary of 320, 2 bytes each and 4 of a copy in float32; what autograd keeps for them goes as well."""
    monkeypatch.setattr("loraplex_trainer.memory.PIECE", 4)
    whole, piece = (
        estimated(load_config(write_run(training__kernels=kernels, **NF4)))[0].activations for kernels in (False, True)
    )
    config = load_config(write_run(**NF4))
    _, examples = estimated(config)
    longest = sorted(examples, key=lambda example: len(example.ids))[-config.training.batch_size :]
    labelled = sum(example.answer_tokens for example in longest)
    vocabulary = load_base(**config.base.load_options, weights=False).model.config.vocab_size
    assert whole - piece >= (labelled - 4) * vocabulary * 6 > 0.05 * whole


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer(write_run):
    sizes = {}
    for checkpointing in (False, True):
        estimate, _ = estimated(load_config(write_run(training__gradient_checkpointing=checkpointing, **NF4)))
        sizes[checkpointing] = estimate.activations
    assert 0.3 * sizes[False] < sizes[True] < 0.8 * sizes[False]  # of two layers


MEASURE = """
import resource, sys, psutil
from pathlib import Path
from loraplex_server.engine.upstream import quiet
from loraplex_trainer.run_file import load_config
from loraplex_trainer import run, loop
import torch, bitsandbytes
from rich.console import Console
quiet()
config = load_config(Path(sys.argv[1]))
small = config.model_copy(update={"training": config.training.model_copy(update={"batch_size": 1, "max_steps": 1})})
run.train(small, resume=False, console=Console(quiet=True))  # what is loaded once, and kept
before = psutil.Process().memory_info().rss
run.train(config, resume=False, console=Console(quiet=True))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
def test_the_sum_is_within_half_and_double_of_what_a_run_takes(write_run, base_folder, tmp_path):
    """A base wide enough that its activations, 100 MB and more, stand out from what Python and torch take."""
    wide = tmp_path / "wide"
    config = LlamaConfig.from_pretrained(base_folder)
    config.update({"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(wide)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (wide / file).write_bytes((base_folder / file).read_bytes())
    long = [json.dumps({"quote": "river stone " * 55, "tags": ["river"]}) for _ in range(16)]
    (tmp_path / "long.jsonl").write_text("\n".join(long))
    data = {"train": str(tmp_path / "long.jsonl"), "prompt": "{quote} ->:", "completion": " {tags}", "max_tokens": 256}
    run = write_run(
        base={"model": str(wide), "quantization": "none", "dtype": "float32", "device": "cpu"},
        data=data,
        training={"max_steps": 2, "batch_size": 16},
    )
    settings = load_config(run)
    estimate, _ = estimated(settings)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(run)], capture_output=True, text=True, env=environment, check=True
    )
    measured = int(child.stdout)
    assert estimate.activations > 100e6 and estimate.activations > 0.8 * estimate.total
    assert measured / 2 < estimate.total < measured * 2, (estimate, measured)


def test_too_little_memory_says_what_to_lower_and_by_how_much(write_run, monkeypatch, capsys):
    """Half of what the activations take is free beside the rest: half of the batch fits."""
    config = load_config(write_run(training__batch_size=8, training__accumulation_steps=2))
    estimate, _ = estimated(config)
    free = estimate.total - math.floor(estimate.activations * 0.45)
    monkeypatch.setattr("loraplex_trainer.check._free_memory", lambda _: (free, "CPU"))
    check(config, Console(), timing=False)
    told = capsys.readouterr().out
    assert "lower training.batch_size from 8 to 4" in told and "raise training.accumulation_steps to 4" in told


@pytest.mark.parametrize("short", [False, True], ids=["fits", "too-much"])
def test_of_several_runs_the_memory_is_added_up_with_one_base(write_run, train, tmp_path, monkeypatch, short):
    (tmp_path / "first.yaml").write_bytes(write_run(name="first", training__batch_size=4, **NF4).read_bytes())
    second = write_run(name="second", lora__rank=16, **NF4)
    (one, _), (two, _) = (estimated(load_config(file)) for file in (tmp_path / "first.yaml", second))
    whole = one.total + two.total - two.base
    assert one.base == two.base and one.total < two.total < whole
    monkeypatch.setattr("loraplex_trainer.check._free_memory", lambda _: (whole - short, "CPU"))
    report = train(tmp_path / "first.yaml", second, "--check", "--no-timing").stdout
    (line,) = (line for line in report.splitlines() if line.startswith("memory together"))
    assert f"base {gib(one.base)}, once" in line and f": {gib(whole)} in all" in line
    assert ("or train fewer together" in report) == short


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.epochs=no"], ["training.epochs"]),
        (["data.train=no-such.jsonl"], ["no-such.jsonl"]),
        (["data.prompt='{text} ->:'"], ["'text'"]),
        (["base.model=./no-such-base"], ["no-such-base"]),
        (["lora.target_modules=[query_key_value]"], ["query_key_value", "q_proj"]),
        (["data.max_tokens=9999"], ["data.max_tokens", "256"]),
        (["continue_from=./no-such-adapter"], ["continue_from", "no-such-adapter"]),
        (["continue_from=a:1", "registry=htp://x"], ["continue_from", "'htp://x': expected a folder, http:// or http"]),
        (["continue_from=a:1", "registry=http://"], ["continue_from", "'http://' is not a registry's URL"]),
        (["push.every=end", "push.registry=htp://x"], ["push.registry", "'htp://x': expected a folder, http:// or"]),
        (["push.every=end", "push.registry=http://"], ["push.registry", "'http://' is not a registry's URL"]),
        (["push.every=end", "push.registry='http://[::1'"], ["push.registry", "'http://[::1' is not a URL"]),
        (["push.every=end", "push.registry=HERE/train.jsonl"], ["push.registry", "train.jsonl is none"]),
        (["push.every=end", "registry=HERE/train.jsonl/below"], ["push.registry", "train.jsonl is none"]),
    ],
)
def test_anything_wrong_is_one_line_and_exit_code_2(write_run, train, overrides, words, tmp_path):
    run = write_run()
    before = tree(tmp_path)
    overrides = [override.replace("HERE", str(tmp_path)) for override in overrides]
    result = train(run, *overrides, "--check", "--no-timing", exit_code=2)
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), result.stderr
    assert tree(tmp_path) == before


def test_a_parent_of_another_shape_is_refused_before_any_weight_is_read(write_run, train, tmp_path):
    train(write_run(name="first"))
    parent = str(tmp_path / "adapters/first")
    assert "continues: first" in train(write_run(continue_from=parent), "--check", "--no-timing").stdout
    result = train(write_run(continue_from=parent), "lora.rank=8", "--check", "--no-timing", exit_code=2)
    assert "lora.rank" in result.stderr
