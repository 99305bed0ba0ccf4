"""How a run goes down: optimizers and their resumption, the learning rate, early stopping and the best step."""

import io
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import get_scheduler

from loraplex_trainer.errors import Interrupted
from loraplex_trainer.run import train as run_training
from loraplex_trainer.run_file import load_config
from loraplex_trainer.schedule import scheduled_rate, warmup_length
from loraplex_trainer.stopping import should_stop

STEPS = {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-3, "log_every_steps": 1, "save_every": 1000}
WIDE = {"rank": 64, "alpha": 64, "dropout": 0.2}  # 64 × 64 = 4,096: the smallest matrix bitsandbytes keeps in 8 bits


class Trip(io.StringIO):
    """A log that acts when a line first begins as it says."""

    def __init__(self, line: str, act) -> None:
        super().__init__()
        self.line, self.act = line, act

    def write(self, text: str) -> int:
        if self.line and text.startswith(self.line):
            self.line = ""
            self.act()
        return super().write(text)


def interrupt_and_go_on(run: Path, step: int) -> str:
    """Stops the run at `step`, resumes it, and returns the log of the resumption."""
    console = Console(file=Trip(f"step {step}/", lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(Interrupted):
        run_training(load_config(run), resume=False, console=console)
    log = io.StringIO()
    run_training(load_config(run), resume=True, console=Console(file=log))
    return log.getvalue()


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def losses_of(log: str) -> list[str]:
    return [" ".join(line.split()[1:4]) for line in log.splitlines() if line.startswith("step ")]


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor", "sgd"]
)
def test_every_optimizer_learns_and_goes_on_to_the_last_bit(optimizer, write_run, train, receipt, tmp_path):
    training = (
        STEPS | {"optimizer": optimizer} | ({"momentum": 0.9, "learning_rate": 0.1} if optimizer == "sgd" else {})
    )
    whole = train(write_run(name="whole", training=training, lora=WIDE)).stdout
    assert receipt("whole")["losses"]["train_last"] < receipt("whole")["losses"]["train_first"] - 0.1
    resumed = interrupt_and_go_on(write_run(name="parts", training=training, lora=WIDE), step=5)
    assert losses_of(resumed) == losses_of(whole)[-len(losses_of(resumed)) :] and 5 <= len(losses_of(resumed)) <= 7
    assert receipt("parts")["losses"] == receipt("whole")["losses"]
    assert weights(tmp_path / "adapters/parts") == weights(tmp_path / "adapters/whole")


@pytest.fixture
def checkpoint(write_run, tmp_path):
    """The tensors of a checkpoint taken at step 3."""

    def take(**training) -> dict[str, torch.Tensor]:
        console = Console(file=Trip("step 3/", lambda: signal.raise_signal(signal.SIGINT)))
        with pytest.raises(Interrupted):
            run_training(load_config(write_run(training=STEPS | training, lora=WIDE)), resume=False, console=console)
        return load_file(tmp_path / "adapters/tagger/.checkpoint/state.safetensors")

    return take


def test_the_state_of_8_bit_adam_takes_a_quarter(checkpoint):
    """Of the matrices that bitsandbytes keeps in 8 bits: those of 4,096 numbers and more."""
    small, whole = checkpoint(optimizer="paged_adamw_8bit"), checkpoint(optimizer="adamw")
    names = [key.split("/", 2)[2] for key, tensor in small.items() if tensor.dtype == torch.uint8 and "/state1/" in key]
    assert len(names) > 10

    def state_bytes(tensors: dict[str, torch.Tensor], *kinds: str) -> int:
        return sum(tensors[f"optimizer/{kind}/{name}"].nbytes for kind in kinds for name in names)

    kept = state_bytes(small, "state1", "state2", "absmax1", "absmax2")
    assert kept < 0.27 * state_bytes(whole, "exp_avg", "exp_avg_sq")


def test_32_bit_adam_is_the_same_adam_and_its_settings_reach_it(write_run, train, receipt):
    def heldout(name: str, **training) -> float:
        train(write_run(name=name, training=STEPS | {"weight_decay": 0.1} | training))
        return receipt(name)["losses"]["heldout"]

    plain = heldout("plain")
    assert heldout("paged", optimizer="paged_adamw_32bit") == pytest.approx(plain, abs=1e-4)
    for name, changed in (
        ("betas", {"betas": [0.5, 0.9]}),
        ("eps", {"eps": 0.1}),
        ("clip", {"max_grad_norm": 1e-9}),
        ("decay", {"weight_decay": 100.0}),
    ):
        assert abs(heldout(name, optimizer="paged_adamw_32bit", **changed) - plain) > 1e-3
    assert heldout("unclipped", max_grad_norm=None) == pytest.approx(heldout("high", max_grad_norm=1e9), abs=1e-6)


@pytest.mark.parametrize(
    ("schedule", "ours", "options"),
    [
        ("cosine", {}, {}),
        ("linear", {}, {}),
        ("constant_with_warmup", {}, {}),
        ("inverse_sqrt", {}, {}),
        ("cosine_with_min_lr", {"min_lr_ratio": 0.25}, {"min_lr_rate": 0.25}),
        ("cosine_with_restarts", {}, {}),
        ("cosine_with_restarts", {"cycles": 3}, {"num_cycles": 3}),
        ("polynomial", {}, {"lr_end": 0.0}),
        ("polynomial", {"power": 2.5}, {"power": 2.5, "lr_end": 0.0}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 10])
def test_after_the_warm_up_the_rate_is_transformers_own(write_run, schedule, ours, options, warmup):
    """Theirs begins the warm-up at a rate of zero, which wastes a step; from its end on the two are one."""
    training = {"schedule": schedule, "warmup_steps": warmup, "learning_rate": 2e-4} | ours
    config = load_config(write_run(training=training))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-4)
    theirs = get_scheduler(schedule, optimizer, warmup, 100, scheduler_specific_kwargs=options)
    rates = []
    for _ in range(100):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    found = [scheduled_rate(step, 100, config.training) for step in range(100)]
    assert found[warmup:] == pytest.approx(rates[warmup:])
    assert found[:warmup] == pytest.approx([2e-4 * (step + 1) / 10 for step in range(warmup)])


@pytest.mark.parametrize(
    ("training", "steps"),
    [({"warmup_ratio": 0.03}, 3), ({"warmup_steps": 7}, 7), ({"warmup_steps": 0}, 0), ({"warmup_steps": 500}, 100)],
)
def test_the_warm_up_is_a_share_or_a_number_of_steps(write_run, training, steps):
    assert warmup_length(100, load_config(write_run(training=training)).training) == steps


class TestEarlyStopping:
    """Held-out tags that are not the training data's: the loss on them falls, then rises."""

    @pytest.fixture
    def overfit(self, write_run, settings, tmp_path):
        rows = [json.loads(line) for line in Path(settings["data"]["heldout"]).read_text().splitlines()]
        wrong = [json.dumps(row | {"tags": ["candle", "bridge"]}) for row in rows]
        (tmp_path / "wrong.jsonl").write_text("\n".join(wrong))

        def make(name: str, **training) -> Path:
            steps = {"max_steps": 60, "learning_rate": 5e-3, "schedule": "constant", "warmup_steps": 0}
            lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
            return write_run(
                name=name, data__heldout=str(tmp_path / "wrong.jsonl"), training=STEPS | steps | training, lora=lora
            )

        return make

    STOP: dict = {"evaluate_every": 2, "early_stopping": {"patience": 3}}  # noqa: RUF012

    def test_it_stops_and_the_best_step_is_what_is_kept(self, overfit, train, receipt, tmp_path):
        result = train(overfit("best", **self.STOP, keep="best"))
        written = receipt("best")
        losses = {measured["step"]: measured["loss"] for measured in written["evaluations"]}
        best = min(losses, key=losses.__getitem__)
        assert written["steps"] == best + 6 < 60 and written["kept_step"] == best > 2
        assert written["losses"]["heldout"] == losses[best] and list(losses) == list(range(2, best + 7, 2))
        assert f"stopped at step {best + 6}" in result.stdout and f"step {best}" in result.stdout
        # The weights are those of that step to the bit: a run that ends there makes the same file.
        train(overfit("short", max_steps=best))
        assert weights(tmp_path / "adapters/best") == weights(tmp_path / "adapters/short")
        assert receipt("short")["losses"]["heldout"] == pytest.approx(losses[best], abs=1e-6)

    def test_the_last_step_is_kept_when_that_is_asked_for(self, overfit, train, receipt):
        train(overfit("last", **self.STOP))
        written = receipt("last")
        assert written["kept_step"] == written["steps"] == written["evaluations"][-1]["step"]
        assert written["losses"]["heldout"] == written["evaluations"][-1]["loss"]

    def test_a_resumed_run_stops_where_the_whole_one_does(self, overfit, train, receipt, tmp_path):
        train(overfit("whole", **self.STOP, keep="best"))
        stop = receipt("whole")["steps"]
        # after the best step, so that its weights and the count of failures must come out of the checkpoint
        interrupt_and_go_on(overfit("parts", **self.STOP, keep="best"), step=stop - 2)
        for key in ("losses", "evaluations", "steps", "kept_step"):
            assert receipt("parts")[key] == receipt("whole")[key]
        assert weights(tmp_path / "adapters/parts") == weights(tmp_path / "adapters/whole")

    def test_another_heldout_file_is_another_run_where_it_decides(self, overfit, train, tmp_path):
        console = Console(file=Trip("step 3/", lambda: signal.raise_signal(signal.SIGINT)))
        run = overfit("tagger", **self.STOP)
        with pytest.raises(Interrupted):
            run_training(load_config(run), resume=False, console=console)
        heldout = tmp_path / "wrong.jsonl"
        heldout.write_text(heldout.read_text().partition("\n")[2])
        assert "heldout_sha256" in train(run, "--resume", exit_code=2).stderr

    def test_a_gain_below_min_delta_is_none(self, write_run):
        falling = [(step, 2.0 - 0.01 * step) for step in range(1, 6)]
        rule = {"evaluate_every": 1, "early_stopping": {"patience": 2, "min_delta": 0.1}}
        training = load_config(write_run(training=rule)).training
        assert [should_stop(falling[:count], training.early_stopping) for count in range(1, 6)] == [
            False,
            False,
            True,
            True,
            True,
        ]
        assert not should_stop(falling, training.early_stopping.model_copy(update={"min_delta": 0.0}))


def test_measuring_on_the_way_changes_nothing_of_what_is_learnt(write_run, train, receipt, tmp_path):
    train(write_run(name="blind", training=STEPS, lora=WIDE))
    train(write_run(name="measured", training=STEPS | {"evaluate_every": "epoch"}, lora=WIDE))
    assert weights(tmp_path / "adapters/blind") == weights(tmp_path / "adapters/measured")
    assert [measured["step"] for measured in receipt("measured")["evaluations"]] == [6, 12]
    assert receipt("blind")["evaluations"] == [] and receipt("blind")["kept_step"] == 12


def test_a_checkpoint_every_epoch(write_run, tmp_path):
    class Crash(Exception):
        pass

    def crash():
        raise Crash

    config = load_config(write_run(training=STEPS | {"save_every": "epoch"}))
    with pytest.raises(Crash):
        run_training(config, resume=False, console=Console(file=Trip("step 11/", crash)))
    saved = json.loads((config.folder / ".checkpoint/progress.json").read_text())
    assert saved["step"] == 6 == math.ceil(48 / 8)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.optimizer=adam8"], ["training.optimizer", '"adam8"', "'adamw_8bit'"]),
        (["training.optimizer=sgd", "training.betas=[0.9, 0.99]"], ["training.betas", "'sgd'", "adamw"]),
        (["training.momentum=0.9"], ["training.momentum", "'adamw'", "sgd"]),
        (["training.min_lr_ratio=0.2"], ["training.min_lr_ratio", "'cosine'", "cosine_with_min_lr"]),
        (["training.cycles=3"], ["training.cycles", "'cosine'", "cosine_with_restarts"]),
        (["training.power=2"], ["training.power", "'cosine'", "polynomial"]),
        (["training.warmup_steps=3", "training.warmup_ratio=0.1"], ["warmup_steps", "warmup_ratio"]),
        (["training.keep=best"], ["training.keep", "training.evaluate_every"]),
        (["training.early_stopping={patience: 2}"], ["training.early_stopping", "training.evaluate_every"]),
        (["training.evaluate_every=5", "data.heldout=null"], ["training.evaluate_every", "data.heldout"]),
        (["training.save_every=day"], ["training.save_every", '"day"', "'epoch'"]),
        (["training.early_stopping.patients=2"], ["'training.early_stopping.patients'", "patience'"]),
        (["training.betas=[0.9]"], ["training.betas"]),
    ],
)
def test_settings_without_effect_or_sense_are_refused(write_run, train, overrides, words):
    result = train(write_run(), *overrides, exit_code=2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr
