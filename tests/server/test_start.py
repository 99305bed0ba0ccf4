"""Starting `loraplex serve`: what cannot start says why in one line, and what can answers and stops on a signal."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "loraplex_server", *map(str, arguments)]


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "LORAPLEX_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }


def refused(environment, *arguments) -> str:
    done = subprocess.run(command(*arguments), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_a_port_in_use(environment, base_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(environment, "--base", base_folder, "--port", port)
    assert said.startswith("error: ")
    assert str(port) in said
    assert "--port" in said


def test_a_base_that_is_not_there(environment, tmp_path):
    assert "no-such-base" in refused(environment, "--base", tmp_path / "no-such-base", "--port", 0)
    assert "owner/nothing" in refused(environment, "--base", "owner/nothing", "--port", 0)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(environment, "--base", tmp_path / "empty", "--port", 0)


def test_a_data_directory_that_cannot_be_used(environment, base_folder, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    said = refused(environment, "--base", base_folder, "--registry", file, "--port", 0)
    assert str(file) in said


def test_a_key_file_without_keys(environment, base_folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# none yet\n\n")
    assert str(keys) in refused(environment, "--base", base_folder, "--api-key-file", keys, "--port", 0)


def test_an_option_of_a_wrong_type_names_it(environment):
    done = subprocess.run(
        command("--base", "x", "--max-loras", "many"), env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "--max-loras" in done.stderr
    assert "many" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_and_stops_cleanly(environment, base_folder, how):
    environment["LORAPLEX_QUANTIZATION"] = "none"
    process = subprocess.Popen(
        command("--base", base_folder, "--port", 0),
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line):
                break
        answer = httpx.post(f"{found[1]}/v1/completions", json={"prompt": "the quick", "max_tokens": 3}, timeout=60)
        assert answer.status_code == 200
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (0, -how)
    assert "Traceback" not in err, err
    assert "FutureWarning" not in err, err


def test_no_base_is_a_usage_error(environment):
    """To click a default of None is a default: the option was required, and its absence loaded a base called None."""
    done = subprocess.run(command(), env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--base" in done.stderr
    assert "Traceback" not in done.stderr
