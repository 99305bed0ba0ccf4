"""Starting `loraplex serve`: what cannot start says why in one line, and what can answers and stops on a signal."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from tiny import make_base

from loraplex_server.kernels.native import native


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


@contextmanager
def running(environment, *arguments) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of one's own, and its URL."""
    process = subprocess.Popen(
        command(*arguments, "--port", 0, "--quantization", "none"),
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        process.told = []
        for line in process.stdout:
            process.told.append(line)
            if found := re.search(r"listening on (http://127\.0\.0\.1:\d+)", line):
                break
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def ended(process) -> tuple[int, str]:
    """Its exit code and what it said on stderr."""
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, err


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A base whose answers can be long."""
    return make_base(tmp_path_factory.mktemp("wide"), max_position_embeddings=8192)


# Hundreds of steps: a second at least.
LONG = {"prompt": "the quick", "temperature": 0, "n": 2, "ignore_eos": True, "max_tokens": 400, "stream": True}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_and_stops_cleanly(environment, base_folder, how):
    with running(environment, "--base", base_folder) as (process, url):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "the quick", "max_tokens": 3}, timeout=60)
        assert answer.status_code == 200
        process.send_signal(how)
        code, err = ended(process)
    assert code == 0
    assert "FutureWarning" not in err, err


@pytest.mark.parametrize(("arguments", "variables"), [(["--no-kernels"], {}), ([], {"LORAPLEX_NO_KERNELS": "1"})])
def test_it_says_that_kernels_were_turned_off(environment, base_folder, arguments, variables):
    options = ["--base", base_folder, "--device", "cpu", "--dtype", "bfloat16", *arguments]
    with running({**environment, **variables}, *options) as (process, _):
        assert any("none:bfloat16, no kernels of our own: turned off, sha256:" in line for line in process.told)


def test_it_says_what_it_computes_with(environment, base_folder):
    expected = f"no kernels of our own: {native().why_not}" if not native() else native().name
    with running(environment, "--base", base_folder, "--device", "cpu", "--dtype", "bfloat16") as (process, _):
        assert any(f"none:bfloat16, {expected}, sha256:" in line for line in process.told)


def test_told_to_stop_it_turns_new_work_away_and_finishes_what_runs(environment, wide_base):
    with (
        running(environment, "--base", wide_base) as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=LONG) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        while (ready := client.get("/ready")).status_code == 200:
            pass
        assert ready.json() == {"ready": False, "waiting_for": ["draining"]}
        assert client.get("/health").status_code == 200
        for refused in (client.post("/v1/completions", json={"prompt": "x"}), client.get("/v1/models")):
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "stopping"
            assert int(refused.headers["Retry-After"]) >= 1
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        ends = [c["finish_reason"] for line in rest[:-1] for c in json.loads(line[6:])["choices"]]
        assert ends.count("length") == LONG["n"]
        assert ended(process)[0] == 0


def test_what_has_not_finished_in_time_is_told_so(environment, wide_base):
    endless = {**LONG, "max_tokens": 8000}
    with (
        running(environment, "--base", wide_base, "--drain-seconds", 1) as (process, url),
        httpx.stream("POST", f"{url}/v1/completions", json=endless, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        assert ended(process)[0] == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(environment, wide_base, how):
    """uvicorn printed a traceback at the second Ctrl-C."""
    with (
        running(environment, "--base", wide_base) as (process, url),
        httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 8000}, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(how)
        while httpx.get(f"{url}/ready").status_code == 200:
            pass
        process.send_signal(how)
        process.wait(timeout=5)
        assert ended(process) == (-how, "")


def test_limits_that_the_base_cannot_keep(environment, base_folder):
    options = ("--base", base_folder, "--port", 0, "--quantization", "none", "--dtype", "float32")
    said = refused(environment, *options, "--max-model-len", 300)
    assert "max_model_len is 300, expected at most 256" in said
    said = refused(environment, *options, "--kv-cache-bytes", 4096)
    assert "kv_cache_bytes is 4,096, expected at least 8,192" in said


def test_its_version(environment):
    done = subprocess.run(command("--version"), env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert re.fullmatch(r"loraplex, version \d+\.\d+.*\n", done.stdout)


def test_no_base_is_a_usage_error(environment):
    """To click a default of None is a default: the option was required, and its absence loaded a base called None."""
    done = subprocess.run(command(), env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--base" in done.stderr
    assert "Traceback" not in done.stderr
