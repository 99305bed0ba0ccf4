"""Saves that go to a registry while the run goes on: real `registry serve` processes, killed and started again."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraplex_registry.cli import cli as registry_command
from loraplex_registry.registry import Registry
from loraplex_registry.remote import open_registry

SAVES = {"max_steps": 6, "batch_size": 8, "log_every_steps": 1, "save_every": 2}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "LORAPLEX_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def registry_server(folder: Path, port: int, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    command = ["-m", "loraplex", "registry", "serve", "--registry", str(folder), "--port", str(port)]
    process = subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr and "registry " in process.stderr.readline()
        wait_until(lambda: is_open(port))
        yield process
    finally:
        process.kill()
        process.communicate()


def is_open(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def wait_until(true, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tags(folder: Path, name: str = "tagger") -> list[tuple[str, ...]]:
    with Registry(folder) as registry:
        return [version.tags for version in registry.versions(name)]


def waiting(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "adapters/.tagger.push").glob("*"))


def test_every_save_becomes_a_draft_and_the_end_a_version(write_run, train, receipt, tmp_path, base_folder):
    folder = tmp_path / "registry"
    run = write_run(training=SAVES, push={"every": "save", "registry": str(folder)})
    result = train(run)
    assert tags(folder) == [("draft", "step-2"), ("draft", "step-4"), ("final", "step-6")]
    assert "pushed tagger:1 (draft, step-2)" in result.stdout
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["tagger"], "nothing is left of the queue"
    with Registry(folder) as registry:
        assert not registry.aliases().get("tagger"), "no alias points to any of them"
        digests = []
        for number, step in ((1, 2), (2, 4), (3, 6)):
            pulled = tmp_path / f"pulled-{number}"
            version = registry.pull(f"tagger:{number}", pulled)
            written = json.loads((pulled / "receipt.json").read_text())
            assert written["steps"] == step == version.lineage.steps
            assert (pulled / "README.md").is_file()
            digests.append(written["files"]["adapter_model.safetensors"])
        assert len(set(digests)) == 3
        assert digests[-1] == receipt()["files"]["adapter_model.safetensors"]
        assert registry.promote("tagger:2", "production").moved, "a draft is promoted like any version"


def test_a_run_that_pushes_gives_the_bytes_of_one_that_does_not(write_run, train, receipt, tmp_path):
    train(write_run(training=SAVES))
    weights = receipt()["files"]["adapter_model.safetensors"]
    train(write_run(training=SAVES, push={"every": "save", "registry": str(tmp_path / "registry")}))
    assert receipt()["files"]["adapter_model.safetensors"] == weights


def test_epochs_and_the_end_alone_can_be_pushed(write_run, train, tmp_path):
    for every, expected in (
        ("epoch", [("draft", "step-6"), ("draft", "step-12"), ("final", "step-13")]),
        ("end", [("final", "step-13")]),
    ):
        folder = tmp_path / f"registry-{every}"
        push = {"every": every, "registry": str(folder), "name": "team/tagger"}
        train(write_run(training={**SAVES, "max_steps": 13}, push=push))  # 48 examples: 6 steps
        assert tags(folder, "team/tagger") == expected


@pytest.mark.slow
def test_a_registry_that_dies_and_comes_back_gets_everything(write_run, tmp_path, port, environment):
    """It is killed after the first draft and back before the end; the run does not wait for it meanwhile."""
    folder, url = tmp_path / "registry", f"http://127.0.0.1:{port}"
    training = {**SAVES, "max_steps": 600, "save_every": 100, "log_every_steps": 50}
    run = write_run(training=training, push={"every": "save", "registry": url, "wait_seconds": 120})
    with registry_server(folder, port, environment):
        process = start(run, environment)
        wait_until(lambda: folder.is_dir() and any_version(folder))
    steps = output_until(process, "step 600/")  # no registry is there, and all steps are taken
    assert any("trying again" in line for line in steps), steps
    with registry_server(folder, port, environment):
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, out + err
    assert tags(folder) == [*(("draft", f"step-{n}00") for n in range(1, 6)), ("final", "step-600")]


def test_a_registry_that_stays_away_is_told_with_the_commands_that_push(write_run, train, tmp_path, port, environment):
    url = f"http://127.0.0.1:{port}"
    run = write_run(training=SAVES, push={"every": "save", "registry": url, "wait_seconds": 0.2})
    result = train(run, exit_code=1)
    assert (tmp_path / "adapters/tagger/receipt.json").is_file(), "the adapter is complete all the same"
    message = result.stderr.splitlines()[-1]
    assert "3 saves were not pushed" in message and "does not answer" in message and url in message
    folder = tmp_path / "registry"
    with registry_server(folder, port, environment):
        for command in message.partition("push them with: ")[2].split(" && "):
            pushed = CliRunner().invoke(registry_command, shlex.split(command)[1:])
            assert pushed.exit_code == 0, pushed.output
    assert tags(folder) == [("draft", "step-2"), ("draft", "step-4"), ("final", "step-6")]


@pytest.mark.slow
def test_what_a_killed_run_queued_is_pushed_by_the_next(write_run, train, tmp_path, port, environment):
    """Killed without a chance to say goodbye, with the registry away: the saves lie on disk."""
    folder = tmp_path / "registry"
    training = {**SAVES, "max_steps": 2000, "save_every": 20, "log_every_steps": 10}
    run = write_run(training=training, push={"every": "save", "registry": f"http://127.0.0.1:{port}"})
    process = start(run, environment)
    wait_until(lambda: len(waiting(tmp_path)) > 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = [name for name in waiting(tmp_path) if not name.endswith(".partial")]
    checkpoint = json.loads((tmp_path / "adapters/tagger/.checkpoint/progress.json").read_text())["step"]
    assert checkpoint - int(left[-1].rpartition("-")[2]) in (0, 20), "at most one interval is lost"
    end = checkpoint + 10
    train(run, "--resume", f"training.max_steps={end}", exit_code=2)  # another run
    train(run, f"training.max_steps={end}", "training.save_every=1000", f"push.registry={folder}")
    assert tags(folder) == [("draft", name.partition("draft-")[2]) for name in left] + [("final", f"step-{end}")]
    assert waiting(tmp_path) == []


def test_what_the_registry_refuses_is_told_and_the_rest_is_pushed(write_run, train, tmp_path):
    folder = tmp_path / "registry"
    run = write_run(training=SAVES, push={"every": "save", "registry": str(folder)})
    broken = tmp_path / "adapters/.tagger.push/000001-draft-step-1"
    broken.mkdir(parents=True)
    (broken / "adapter_config.json").write_text("{}")
    result = train(run, exit_code=1)
    assert (
        "000001-draft-step-1 is not taken" in result.stdout and "adapter_model.safetensors is missing" in result.stdout
    )
    assert "1 saves were not pushed" in result.stderr
    assert tags(folder) == [("draft", "step-2"), ("draft", "step-4"), ("final", "step-6")]


@pytest.mark.parametrize(
    ("push", "said"),
    [
        ({"every": "often"}, "push.every"),
        ({"registry": "somewhere"}, "push.registry: nothing is pushed unless push.every"),
        ({"every": "end", "name": "Not A Name"}, "push.name"),
        ({"every": "end", "wait_seconds": -1}, "push.wait_seconds"),
        ({"every": "end", "wait_seconds": 1e30}, "push.wait_seconds: 1e+30: "),
        ({"every": "end", "registry": "http://"}, "push.registry: 'http://' is not a registry's URL"),
        ({"every": "end", "registry": "/dev/null"}, "push.registry: '/dev/null': expected a folder to write in"),
    ],
)
def test_a_push_that_cannot_be_is_told_before_any_work(write_run, train, push, said):
    assert said in train(write_run(push=push), exit_code=2).stderr


def any_version(folder: Path) -> bool:
    with open_registry(folder) as registry:
        return bool(registry.list())


def start(run: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "loraplex_trainer", str(run)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_until(process: subprocess.Popen, start: str) -> list[str]:
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.match(start, line):
            return lines
    raise AssertionError("".join(lines))
