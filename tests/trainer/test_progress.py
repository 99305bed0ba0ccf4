"""What a run shows and leaves of its course: lines and a bar, the loss as a table and a picture, and trackers."""

import csv
import io
import json
import os
import sqlite3
import subprocess
import sys

import pytest
from rich.console import Console

from loraplex_registry.registry import Registry
from loraplex_trainer.progress import duration
from loraplex_trainer.run import train as run_training
from loraplex_trainer.run_file import load_config
from loraplex_trainer.schedule import scheduled_rate

INSTALL = "scripts/test --all, or: pip install -c constraints.txt 'loraplex"
MEASURED = {"max_steps": 12, "batch_size": 8, "log_every_steps": 1, "evaluate_every": 4}


def test_the_losses_are_a_table_and_a_picture_and_no_part_of_the_version(write_run, train, receipt, tmp_path):
    run = write_run(training=MEASURED)
    train(run)
    folder = tmp_path / "adapters/tagger"
    with (folder / ".training/loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert float(rows[0]["loss"]) == receipt()["losses"]["train_first"]
    measured = {int(row["step"]): float(row["heldout_loss"]) for row in rows if row["heldout_loss"]}
    assert measured == {one["step"]: one["loss"] for one in receipt()["evaluations"]} and list(measured) == [4, 8, 12]
    training = load_config(run).training
    assert [float(row["learning_rate"]) for row in rows] == [scheduled_rate(step, 12, training) for step in range(12)]
    picture = (folder / ".training/loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    with Registry(tmp_path / "registry") as registry:
        version = registry.push("tagger", folder)
        registry.fetch(version.digest, tmp_path / "fetched")
    assert not [*(tmp_path / "fetched").rglob("*loss*")] and [*(tmp_path / "fetched").rglob("*.safetensors")]


def test_few_steps_make_a_table_alone(write_run, train, tmp_path):
    train(write_run(training__max_steps=2))
    assert [path.name for path in (tmp_path / "adapters/tagger/.training").iterdir()] == ["loss.csv"]


def test_a_line_has_memory_and_the_held_out_loss_has_its_own(write_run, train, receipt):
    lines = train(write_run(training=MEASURED)).stdout.splitlines()
    steps = [line for line in lines if line.startswith("step ") and "lr" in line]
    assert len(steps) == 12 and all(" GiB  " in line and line.endswith(" left") for line in steps)
    first = receipt()["evaluations"][0]
    assert f"step 4/12  held-out loss {first['loss']:.4f}" in lines


def test_the_bar_has_them_too(write_run):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    run_training(load_config(write_run(training=MEASURED)), resume=False, console=console)
    assert all(word in screen.getvalue() for word in ("12/12", "GiB", "tokens/s", "lr ", "0:00:00"))
    assert "held-out loss" in screen.getvalue()


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (1800, "30 min"), (12_000, "3 h 20 min")])
def test_a_time_is_told_in_what_one_plans_by(seconds, words):
    assert duration(seconds) == words


class TestTrackers:
    @pytest.fixture
    def run(self, write_run, tmp_path, monkeypatch):
        for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "TRACKIO_DIR"):
            monkeypatch.setenv(name, "")  # restored afterwards, whatever the run sets
            monkeypatch.delenv(name)
        return lambda *names: write_run(training=MEASURED, report_to=[*names], logs=str(tmp_path / "logs"))

    def test_tensorboard(self, run, train, receipt, tmp_path):
        pytest.importorskip("tensorboard", reason="pip install -c constraints.txt 'loraplex[tensorboard]'")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        train(run("tensorboard"))
        events = EventAccumulator(str(tmp_path / "logs/tensorboard/tagger"))
        events.Reload()
        losses = {event.step: event.value for event in events.Scalars("loss")}
        assert list(losses) == list(range(1, 13))
        assert losses[1] == pytest.approx(receipt()["losses"]["train_first"])
        heldout = {event.step: event.value for event in events.Scalars("heldout_loss")}
        assert heldout == pytest.approx({one["step"]: one["loss"] for one in receipt()["evaluations"]})
        assert {"learning_rate", "tokens_per_second", "memory_bytes"} <= set(events.Tags()["scalars"])

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # its own, of SQLAlchemy's ways and pydantic's
    def test_mlflow(self, run, train, receipt, tmp_path):
        mlflow = pytest.importorskip("mlflow", reason=f"{INSTALL}[mlflow]'")
        train(run("mlflow"))
        assert (tmp_path / "logs/mlflow.db").is_file()
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/logs/mlflow.db")
        (experiment,) = client.search_experiments(filter_string="name = 'loraplex'")
        (found,) = client.search_runs([experiment.experiment_id])
        assert found.info.run_name == "tagger" and found.info.status == "FINISHED"
        assert found.data.params["training.batch_size"] == "8"
        history = {one.step: one.value for one in client.get_metric_history(found.info.run_id, "heldout_loss")}
        assert history == pytest.approx({one["step"]: one["loss"] for one in receipt()["evaluations"]})

    @pytest.fixture
    def run_cut_off(self, run, tmp_path):
        """A run in a process of its own, without a way out: what is written is written here."""

        def of(tracker: str) -> None:
            pytest.importorskip(tracker, reason=f"{INSTALL}[{tracker}]'")
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "https_proxy": "http://127.0.0.1:9"}
            command = [sys.executable, "-m", "loraplex_trainer", str(run(tracker))]
            subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, timeout=300)

        return of

    @pytest.mark.slow
    def test_wandb_stays_off_line(self, run_cut_off, tmp_path):
        run_cut_off("wandb")
        (file,) = (tmp_path / "logs/wandb").glob("offline-run-*/run-*.wandb")
        assert b"heldout_loss" in file.read_bytes()

    @pytest.mark.slow
    def test_trackio_stays_here(self, run_cut_off, tmp_path):
        run_cut_off("trackio")
        with sqlite3.connect(tmp_path / "logs/trackio/loraplex.db") as database:
            logged = database.execute("SELECT step, metrics FROM metrics WHERE run_name = 'tagger'").fetchall()
        losses = {step: found["loss"] for step, text in logged if "loss" in (found := json.loads(text))}
        assert list(losses) == list(range(1, 13)) and losses[12] < losses[1]

    def test_one_that_is_not_installed_is_named_before_any_work(self, run, train, tmp_path, monkeypatch):
        monkeypatch.setattr("loraplex_trainer.tracking.find_spec", lambda name: None)
        for arguments in ((), ("--check", "--no-timing")):
            result = train(run("trackio"), *arguments, exit_code=2)
            assert "report_to: 'trackio'" in result.stderr and "pip install 'loraplex[trackio]'" in result.stderr
        assert not (tmp_path / "adapters").exists() and not (tmp_path / "logs").exists()

    def test_nothing_is_reported_unless_asked_for(self, write_run, train, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        train(write_run())
        assert not (tmp_path / "logs").exists()
