"""The whole loop through the commands a user types: train, push, promote, serve, complete, train on, replace."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import make_base

COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black", "rose": "red"}


@pytest.fixture
def shell(tmp_path):
    """Runs our commands in a folder of their own, as the installed scripts would."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "LORAPLEX_HOME": str(tmp_path / "home")}

    def run(*command: str, expect: int = 0) -> str:
        call = [sys.executable, "-m", "loraplex", *command]
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == expect, done.stderr + done.stdout
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    run.environment = environment
    return run


@pytest.fixture
def run_file(tmp_path) -> Path:
    make_base(tmp_path / "base")
    rows = [{"thing": thing, "colour": colour} for thing, colour in COLOURS.items()] * 8
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    config = {
        "name": "colours",
        "base": {"model": "base", "quantization": "nf4"},
        "data": {
            "train": "train.jsonl",
            "heldout": "heldout.jsonl",
            "prompt": "{thing} ->:",
            "completion": " {colour}",
            "max_tokens": 64,
        },
        "training": {"max_steps": 60, "batch_size": 20, "learning_rate": 5e-3},
        "evaluation": {"metric": "exact_match", "max_tokens": 12},
    }
    path = tmp_path / "colours.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_train_push_promote_serve_replace(shell, run_file, tmp_path):
    shell("train", str(run_file))
    receipt = json.loads((tmp_path / "adapters/colours/receipt.json").read_text())
    assert receipt["losses"]["train_last"] < receipt["losses"]["train_first"] / 2

    assert "pushed colours:1" in shell("registry", "push", "colours")
    assert "already colours:1" in shell("registry", "push", "colours")
    shell("registry", "promote", "colours:1", "--to", "production")
    listed = json.loads(shell("registry", "list", "--format", "json"))
    assert [(row["name"], row["number"]) for row in listed] == [("colours", 1)]

    command = [sys.executable, "-m", "loraplex", "serve", "--base", "base", "--port", "0"]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=shell.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        url = next(found[1] for line in server.stdout if (found := re.search(r"listening on (\S+)", line)))

        def ask(adapter: str | None) -> dict:
            chosen = ["--adapter", adapter] if adapter else []
            options = ["--url", url, "--temperature", "0", "--max-tokens", "12", "--format", "json"]
            return json.loads(shell("complete", "sky ->:", *chosen, *options))

        first, base = ask("colours@production"), ask(None)
        assert (first["adapter"], first["text"], first["finish_reason"]) == ("colours:1", " blue", "stop")
        assert base["text"] != first["text"]
        assert "nearest is 'colours'" in shell("complete", "x", "--adapter", "colors", "--url", url, expect=1)

        # Version 2 learns another answer, so that nobody can take it for version 1.
        rows = [{"thing": thing, "colour": "grey"} for thing in COLOURS] * 8
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shell("train", str(run_file), "continue_from=colours:1")
        second = json.loads((tmp_path / "adapters/colours/receipt.json").read_text())
        assert second["parent"]["digest"] == first["adapter_digest"]
        assert "pushed colours:2" in shell("registry", "push", "colours")
        assert ask("colours")["adapter"] == "colours:1", "a push alone changes nothing that is served"
        shell("registry", "promote", "colours:2", "--to", "production", "--reason", "the world went grey")
        assert (ask("colours")["adapter"], ask("colours")["text"]) == ("colours:2", " grey")
        assert ask("colours:1")["text"] == " blue"
        shell("registry", "rollback", "colours@production")
        assert ask("colours@production")["text"] == " blue"
        assert "the world went grey" in shell("registry", "history", "colours@production")
        assert "colours:2" not in shell("registry", "verify")
    finally:
        server.kill()
        _, err = server.communicate()
    assert "Traceback" not in err, err
