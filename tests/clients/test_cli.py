"""The `loraplex` command as a shell sees it: a process of its own, its two outputs and its exit code."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import DIGEST, WORDS, ProtocolServer, event, sse

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT / folder) for folder in ("server", "registry", "trainer", "clients/python")]
TEXT = "".join(WORDS)


def start(*args: str, code: str = "from loraplex.cli import main; main()", **env: str) -> subprocess.Popen[bytes]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-W", "error", "-c", code, *args]
    return subprocess.Popen(command, env=kept | {"PYTHONPATH": os.pathsep.join(PATHS)} | env, **pipes)


def run(*args: str, stdin: bytes = b"", **env: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with start(*args, **env) as process:
        out, err = process.communicate(stdin, timeout=20)
    return process.returncode, out.decode(), err.decode()


def error_line(result: tuple[int, str, str], status: int = 1) -> str:
    """The one line of a failed command."""
    assert result[0] == status, result
    assert re.fullmatch(r"error: .*\n", result[2]), result[2]
    return result[2]


def test_help_lists_every_command_and_imports_none():
    heavy = "torch transformers peft bitsandbytes loraplex_server loraplex_trainer loraplex_registry sqlalchemy"
    code = f"""
import sys
from loraplex.cli import main
try:
    main()
finally:
    print("imported:", sorted(set("{heavy}".split()) & set(sys.modules)))
"""
    with start("--help", code=code) as process:
        out = process.communicate(timeout=20)[0].decode()
    assert process.returncode == 0
    assert "imported: []" in out
    listed = re.findall(r"^  (\w+) {2,}\S", out.partition("Commands:")[2], re.MULTILINE)
    assert listed == ["complete", "export", "merge", "models", "registry", "serve", "train", "version"]


@pytest.mark.parametrize("name", ["serve", "train", "registry"])
def test_the_other_packages_commands_are_found(name: str):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"Usage: loraplex {name} ")


def test_a_missing_extra_is_named():
    """As after a plain install. None in sys.modules is how Python is told that a module cannot be found."""
    code = """
import sys
sys.modules |= dict.fromkeys("accelerate bitsandbytes peft prometheus_client torch transformers".split())
from loraplex.cli import main
main()
"""
    with start("serve", "--base", "anything", "--port", "0", code=code) as process:
        err = process.communicate(timeout=20)[1].decode()
    assert process.returncode == 1
    assert re.match(r"error: loraplex serve needs \w+: pip install 'loraplex\[serve\]'\n", err), err
    assert "Traceback" not in err


def test_complete(server: ProtocolServer):
    assert run("complete", "hi", "--url", server.url) == (0, TEXT + "\n", "")
    assert server.seen[0].body == {"prompt": "hi", "stream": False}


def test_complete_sends_every_option(server: ProtocolServer):
    sampling = "--max-tokens 5 --temperature 0 --top-p 0.5 --seed 7 --stop X --stop Y"
    options = shlex.split(f"--adapter a:1 --model m {sampling} --format json")
    env = {"LORAPLEX_URL": server.url, "LORAPLEX_API_KEY": "secret"}
    status, out, _ = run("complete", "-", *options, stdin="naïve ->:\n".encode(), **env)
    assert status == 0
    assert json.loads(out)["adapter_digest"] == DIGEST
    assert json.loads(out)["text"] == TEXT
    sent = {"prompt": "naïve ->:", "adapter": "a:1", "model": "m", "max_tokens": 5, "temperature": 0.0, "top_p": 0.5}
    assert server.seen[0].body == sent | {"seed": 7, "stop": ["X", "Y"], "stream": False}
    assert server.seen[0].headers["authorization"] == "Bearer secret"


def test_complete_streams_when_asked(server: ProtocolServer):
    assert run("complete", "hi", "--stream", "--url", server.url) == (0, TEXT + "\n", "")
    status, out, _ = run("complete", "hi", "--stream", "--format", "json", "--url", server.url)
    assert status == 0
    assert [json.loads(line)["text"] for line in out.splitlines()] == WORDS
    assert all(seen.body["stream"] for seen in server.seen)


def test_complete_streams_by_default_on_a_terminal(server: ProtocolServer):
    ours, its = pty.openpty()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}
    try:
        command = [sys.executable, "-m", "loraplex", "complete", "hi", "--url", server.url]
        assert subprocess.run(command, env=env, stdout=its, timeout=20).returncode == 0
        assert os.read(ours, 1000).decode().replace("\r\n", "\n") == TEXT + "\n"
    finally:
        os.close(ours)
        os.close(its)
    assert server.seen[0].body["stream"] is True


def test_models(server: ProtocolServer):
    status, out, _ = run("models", "--url", server.url)
    assert status == 0
    header, base, adapter = (re.split(r"\s{2,}", line.strip()) for line in out.splitlines())
    assert header == ["ID", "VERSION", "ALIASES", "DIGEST", "PARENT"]
    assert base == ["org/tiny[4bit]"]
    assert adapter == ["quotes-tagger", "3", "production, canary", "ab" * 6, "org/tiny[4bit]"]
    status, out, _ = run("models", "--url", server.url, "--format", "json")
    assert status == 0
    assert json.loads(out)[1]["digest"] == DIGEST


def test_version():
    status, out, err = run("version")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"loraplex \d+\S*\n", out)


def test_errors_take_one_line(server: ProtocolServer, nowhere: str):
    server.script.append(server.error(404, "adapter_not_found"))
    assert error_line(run("complete", "hi", "--adapter", "x", "--url", server.url)) == "error: told to say 404\n"
    server.script.append(server.raw("<h1>no</h1>\n<p>such\npage", 404))
    assert "HTTP 404: <h1>no</h1> <p>such page" in error_line(run("models", "--url", server.url))
    server.script.append(server.hang())
    assert "within 0.2 s" in error_line(run("complete", "hi", "--timeout", "0.2", "--url", server.url))
    line = error_line(run("models", "--url", nowhere))
    assert f"cannot reach {nowhere}" in line
    assert "loraplex serve" in line
    assert "base_url" in error_line(run("models", "--url", "nonsense"))
    assert "not UTF-8" in error_line(run("complete", "-", "--url", server.url, stdin=b"\xff"))


def test_an_error_inside_a_stream_comes_after_the_text(server: ProtocolServer):
    server.script.append(server.pieces(event("one two"), sse({"error": {"message": "engine stopped"}})))
    result = run("complete", "hi", "--stream", "--url", server.url)
    assert error_line(result) == "error: engine stopped\n"
    assert result[1] == "one two\n"


def test_errors_of_the_other_packages_take_one_line(server: ProtocolServer, tmp_path: Path):
    assert "nobody" in error_line(run("registry", "show", "nobody", LORAPLEX_HOME=str(tmp_path)))
    port = server.url.rpartition(":")[2]
    assert f"127.0.0.1:{port}" in error_line(run("serve", "--base", "anything", "--port", port))
    assert "none.yaml" in error_line(run("train", str(tmp_path / "none.yaml")), status=2)


def test_wrong_usage():
    assert "'--max-tokens'" in error_line(run("complete", "--max-token", "3", "hi"), status=2)
    assert "see loraplex complete --help" in error_line(run("complete"), status=2)
    assert "No such command 'srve'" in error_line(run("srve"), status=2)
    status, out, err = run()
    assert (status, out) == (2, "")
    assert err.startswith("Usage: loraplex ")


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_ctrl_c(server: ProtocolServer, stream: str):
    server.script.append(server.hang(event("one")))
    with start("complete", "hi", stream, "--url", server.url) as process:
        wait_until(lambda: bool(server.seen))
        time.sleep(0.2)  # into the wait for the answer
        process.send_signal(signal.SIGINT)
        out, err = (piped.decode() for piped in process.communicate(timeout=20))
    assert process.returncode == 130
    assert err.strip() == ""
    assert out == ("one\n" if stream == "--stream" else "")
    assert server.cancelled.wait(5)


def test_a_reader_that_leaves(server: ProtocolServer):
    """`loraplex complete … | head -c 1` ends quietly."""
    server.script.append(server.endless())
    with start("complete", "hi", "--stream", "--url", server.url) as process:
        assert process.stdout and process.stderr
        assert process.stdout.read(1) == b"a"
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == b""
    assert server.cancelled.wait(5)


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
