"""`loraplex train a.yaml b.yaml`: several runs on one base become what each becomes by itself."""

import io
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from loraplex_trainer.errors import Interrupted
from loraplex_trainer.run_file import load_config
from loraplex_trainer.several import train_several

OF_RUN = {
    "small": {"training__seed": 1, "training__max_steps": 8},
    "wide": {
        "training__evaluate_every": 2,
        "lora__rank": 12,
        "lora__dropout": 0.1,
        "lora__target_modules": ["q_proj", "down_proj"],
        "training__max_steps": 4,
        "training__batch_size": 4,
        "training__accumulation_steps": 2,
        "data__completion": " {quote}",
    },
    "packed": {"lora__target_modules": ["v_proj"], "data__packing": True, "training__optimizer": "sgd"},
}


@pytest.fixture
def files(write_run, tmp_path) -> Callable[..., list[Path]]:
    """Run files of other ranks, targets, data and settings, on one base."""

    def write(*names: str, **changes: Any) -> list[Path]:
        made, lines = [], (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
        for number, name in enumerate(names):
            data = tmp_path / f"{name}.jsonl"
            data.write_text("".join(lines[8 * number : 8 * number + 30]))
            path = write_run(name=name, **{"data__train": str(data), **OF_RUN[name], **changes})
            made.append(path.rename(tmp_path / f"{name}.yaml"))
        return made

    return write


def weights(tmp_path, name) -> dict[str, torch.Tensor]:
    return load_file(tmp_path / "adapters" / name / "adapter_model.safetensors")


def alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], tensor, rtol=0, atol=1e-3 * float(tensor.abs().max()))
        for name, tensor in expected.items()
    )


def test_runs_together_give_the_adapters_of_runs_alone(files, train, receipt, tmp_path):
    runs = files("small", "wide", "packed")
    result = train(*runs)
    for name in OF_RUN:
        assert f"{name}: step 4/" in result.output
        assert f"adapter: {tmp_path}/adapters/{name}\n" in result.output
    together = {name: (weights(tmp_path, name), receipt(name)) for name in OF_RUN}
    configs = {name: json.loads((tmp_path / "adapters" / name / "adapter_config.json").read_text()) for name in OF_RUN}
    for run, name in zip(runs, OF_RUN, strict=True):
        train(run)
        found, told = together[name]
        assert alike(found, weights(tmp_path, name)), name
        assert configs[name] == json.loads((tmp_path / "adapters" / name / "adapter_config.json").read_text())
        alone = receipt(name)
        assert (told["trained_beside"], alone["trained_beside"]) == ([other for other in OF_RUN if other != name], [])
        assert told["losses"]["heldout"] == pytest.approx(alone["losses"]["heldout"], rel=1e-4)
        assert told["losses"]["train_last"] == pytest.approx(alone["losses"]["train_last"], rel=1e-4)
        assert [e["step"] for e in told["evaluations"]] == [e["step"] for e in alone["evaluations"]]
        for key in ("config", "data", "steps", "template", "seed"):
            assert told[key] == alone[key], key
    assert not alike(together["small"][0], together["packed"][0])


def test_an_interruption_saves_all_and_all_go_on(files, train, tmp_path):
    """One is done before, one is in the middle, with dropout: its random numbers must come back too."""
    runs = files("small", "wide", training__log_every_steps=1, lora__dropout=0.2)
    several = [load_config(run, ["training.save_every=1000"]) for run in runs]

    class Trip(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("small: step 5/"):
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    with pytest.raises(Interrupted) as stop:
        train_several(several, resume=False, console=Console(file=Trip()))
    assert stop.value.exit_code == 130
    steps = [json.loads((run.folder / ".checkpoint/progress.json").read_text())["step"] for run in several]
    assert steps == [6, 4], "the signal came after step 5 had asked for it"
    assert not list(tmp_path.glob("adapters/*/receipt.json"))
    train(runs[1], "training.save_every=1000", "--resume")  # one by itself, from what all of them left
    output = train(*runs, "training.save_every=1000", "--resume").output
    assert "wide: complete, and left alone" in output
    assert "going on after step 6" in output
    resumed = {name: weights(tmp_path, name) for name in ("small", "wide")}
    assert "small: complete, and left alone\nwide: complete, and left alone\n" in train(*runs, "--resume").output
    train(*runs, "lora.rank=3", "--resume", exit_code=2)
    train(*runs)
    for name, found in resumed.items():
        whole = weights(tmp_path, name)
        assert all(torch.equal(tensor, whole[key]) for key, tensor in found.items()), name


def test_layers_that_are_computed_again_know_whose_tokens_they_are(files, train, tmp_path):
    """With dropout: what is drawn the second time must be what was drawn the first."""
    found = []
    for again in (True, False):
        train(*files("small", "wide", training__gradient_checkpointing=again))
        found.append({name: weights(tmp_path, name) for name in ("small", "wide")})
    assert all(alike(found[0][name], found[1][name]) for name in found[0])


def test_nothing_to_resume_is_an_error(files, train, tmp_path):
    result = train(*files("small", "wide"), "--resume", exit_code=2)
    assert "nothing to resume: none of the runs has a checkpoint, and none is complete" in result.output
    assert not list(tmp_path.glob("adapters/*/*"))


def test_a_run_that_fails_is_named_and_the_others_are_complete(files, train, receipt, write_run, tmp_path):
    (good,) = files("small")
    bad = write_run(name="bad", training__learning_rate=1e36, training__save_every=1, training__warmup_ratio=1.0)
    result = train(good, bad, "training.max_steps=4", exit_code=1)
    assert re.search(r"^error: bad: the (loss|gradient norm) is (nan|inf).*; complete: small$", result.output, re.M)
    assert receipt("small")["steps"] == 4, "KEY=VALUE is for every file"
    assert not (tmp_path / "adapters/bad/receipt.json").exists()
    assert (tmp_path / "adapters/bad/.checkpoint").is_dir()
    told = train(good, bad, "training.max_steps=4", "training.log_every_steps=1", "--resume", exit_code=1).output
    assert "small: complete, and left alone" in told
    assert "error: bad: the" in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"base__dtype": "bfloat16"},
            "base.dtype: 'float32' in {0}, 'bfloat16' in {1}: runs that are trained together",
        ),
        ({"training__kernels": False}, "training.kernels: True in {0}, False in {1}: runs that are trained together"),
        ({"name": "small"}, "name: 'small' in {0}, and in {1}: each run needs its own"),
        ({"lora__dora": True}, "lora.dora: True in {1}: only plain LoRA on a causal base can be trained beside"),
        ({"lora__modules_to_save": ["lm_head"]}, "lora.modules_to_save: ['lm_head'] in {1}: only plain LoRA"),
        (
            {"lora__target_modules": ["q_proj", "lm_head"]},
            "lora.target_modules: 'lm_head' in {1}: the head is given the answers' tokens alone",
        ),
        ({"lora__init": "pissa"}, "lora.init: 'pissa' in {1}: only plain LoRA"),
        (
            {"training__distributed": {"strategy": "fsdp"}},
            "training.distributed.strategy: 'fsdp' in {1}: only plain LoRA on a causal base",
        ),
        ({"method": "prefix", "lora": {}}, "method: 'prefix' in {1}: only plain LoRA"),
        ({"name": "b", "report_to": ["mlflow"]}, "report_to: 'mlflow' in {1}: it follows one run at a time"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("--check", "--no-timing")], ids=["train", "check"])
def test_runs_that_cannot_share_a_base_are_refused(files, write_run, train, tmp_path, changes, words, flags):
    (first,) = files("small")
    second = write_run(**{"name": "other", **changes})
    result = train(first, second, *flags, exit_code=2)
    assert words.format(first, second) in result.output
    assert not (tmp_path / "adapters").exists()


def test_several_processes_take_one_file(files, train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start them without torchrun" in train(*files("small", "wide"), exit_code=2).output


def test_a_file_that_is_not_there_is_told_from_a_setting(files, train):
    (first,) = files("small")
    assert "missing.yaml: No such file" in train(first, "missing.yaml", exit_code=2).output
    assert "override 'lora.rank': key=value is expected" in train(first, "lora.rank", exit_code=2).output


def test_check_shows_each_file(files, train, tmp_path):
    runs = files("small", "wide")
    output = train(*runs, "--check", "--no-timing").output
    assert all(f"{run}:\n" in output for run in runs)
    assert not (tmp_path / "adapters").exists()


def test_a_terminal_gets_a_bar_for_each(files):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    train_several([load_config(run) for run in files("small", "wide")], resume=False, console=console)
    assert re.search("small.*8/8", screen.getvalue())
    assert re.search("wide.*4/4", screen.getvalue())
