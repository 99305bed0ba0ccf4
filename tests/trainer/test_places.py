"""Where a run writes: what cannot be written to is told before any work, and nothing that is not ours is lost."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from loraplex_trainer.errors import NotWritten
from loraplex_trainer.run import train as run_training
from loraplex_trainer.run_file import load_config

COMMANDS = pytest.mark.parametrize("flags", [(), ("--check", "--no-timing")], ids=["train", "check"])


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("there", "named"),
    [
        (["code.py"], "code.py"),
        (["a", "b", "c", "d", "e"], "a, b, c and 2 more"),
        (["README.md"], "README.md"),  # called like the card, and beside no receipt
        (["receipt.json", "merged/model.safetensors"], "merged"),
        (["receipt.json", ".training/notes.txt"], ".training/notes.txt"),
        ([".checkpoint/kept/state.safetensors"], ".checkpoint/kept"),
    ],
)
@COMMANDS
def test_a_folder_with_what_no_run_wrote_is_refused(write_run, train, tmp_path, flags, there, named):
    """It was deleted in silence when the adapter took its place."""
    for name in there:
        path = tmp_path / "adapters/tagger" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    run = write_run()
    before = tree(tmp_path)
    (line,) = train(run, *flags, exit_code=2).stderr.splitlines()
    assert line.startswith(f"error: output: {tmp_path}/adapters/tagger is replaced by the adapter, and holds")
    assert f" what no run has written: {named}: move it away" in line
    assert tree(tmp_path) == before


def test_an_adapter_is_not_lost_by_one_called_like_its_namespace_or_nearly_like_it(write_run, train, tmp_path):
    run = write_run(training__max_steps=1)
    train(run, "name=team/small")
    train(run, "name=tagger.old")
    before = tree(tmp_path / "adapters")
    assert "adapters/team is replaced by the adapter, and holds" in train(run, "name=team", exit_code=2).stderr
    train(run)
    train(run)
    assert before.items() <= tree(tmp_path / "adapters").items()


def test_what_comes_while_a_run_is_at_work_stays_and_the_training_is_kept(write_run, train, tmp_path):
    note = tmp_path / "adapters/tagger/note.txt"

    class Comes(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("step 3/"):
                note.parent.mkdir()
                note.write_text("precious")
            return super().write(text)

    run = write_run()
    with pytest.raises(NotWritten, match=r"holds what no run has written: note\.txt; .* go on with --resume") as told:
        run_training(load_config(run), resume=False, console=Console(file=Comes()))
    assert told.value.exit_code == 1
    assert note.read_text() == "precious"
    note.unlink()
    assert "step 6/6" not in train(run, "--resume").stdout
    assert (note.parent / "receipt.json").is_file()


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
@COMMANDS
def test_what_is_no_folder_is_refused_where_the_adapter_is_to_lie(write_run, train, tmp_path, flags, kind):
    """It was told after the training, which was lost; a link was replaced."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "adapters").mkdir()
    place = tmp_path / "adapters/tagger"
    if kind == "file":
        place.write_text("precious")
    else:
        place.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    run = write_run()
    before = tree(tmp_path)
    error = train(run, *flags, exit_code=2).stderr
    assert error.startswith(f"error: output: {place} is a {kind.split()[-1]}, and the adapter's own folder is expected")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file", "Not a directory"),
        ("file/deeper", "Not a directory"),
        ("dangling/deeper", "No such file or directory"),
        ("/proc/foo", "No such file or directory"),
        ('"a\\0b"', "embedded null byte"),
        ("a" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("key", ["output", "logs"])
@COMMANDS
def test_a_place_that_cannot_be_written_to_is_told_first(
    write_run, train, tmp_path, monkeypatch, flags, key, place, reason
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("precious")
    Path("dangling").symlink_to("nowhere")
    run = write_run(report_to=["tensorboard"])
    before = tree(tmp_path)
    error = train(run, f"{key}={place}", *flags, exit_code=2).stderr
    assert error.startswith(f"error: {key}: '") and f": {reason}: a folder that can be written to is expected" in error
    assert tree(tmp_path) == before


def test_logs_in_the_adapters_own_folder_are_refused(write_run, train, tmp_path, monkeypatch):
    """They went away with the folder that the adapter replaces."""
    monkeypatch.chdir(tmp_path)
    result = train(write_run(report_to=["tensorboard"]), "logs=adapters/tagger/logs", "output=adapters", exit_code=2)
    assert "logs: adapters/tagger/logs lies in adapters/tagger, which is replaced" in result.stderr
