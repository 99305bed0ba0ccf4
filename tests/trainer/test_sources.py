"""Where rows come from: every kind of file, folders that `datasets` wrote, and datasets of the Hub."""

import hashlib
import json
import os
import subprocess
import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import pyarrow
import pytest
from dataset_hub import COMMIT, serve_dataset
from pyarrow import parquet

from loraplex_trainer.data import read_split, read_splits
from loraplex_trainer.data_keys import DataSection, SourceSection
from loraplex_trainer.errors import DataError
from loraplex_trainer.sources import read_source

ROWS = [{"quote": f"river {i}", "tags": f"t{i}"} for i in range(10)]
PAIRS = {"prompt": "{quote} ->:", "completion": " {tags}"}


def write(folder: Path, name: str) -> Path:
    """The ten rows, in the format that the file's name says."""
    path = folder / name
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case ".json":
            path.write_text(json.dumps(ROWS, indent=1))
        case ".csv" | ".tsv":
            mark = "\t" if path.suffix == ".tsv" else ","
            path.write_text(f"quote{mark}tags\n" + "".join(f"{row['quote']}{mark}{row['tags']}\n" for row in ROWS))
        case ".parquet":
            import datasets

            datasets.Dataset.from_list(ROWS).to_parquet(path)
    return path


def parquet_of(unused: pyarrow.Array) -> bytes:
    """One good row with a column that nobody asks for."""
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"quote": ["a"], "tags": ["b"], "unused": unused}), sink)
    return sink.getvalue().to_pybytes()


# A string of two bytes that are no UTF-8, which Arrow does not look at.
BROKEN = pyarrow.Array.from_buffers(
    pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet"])
def test_every_format_gives_the_same_rows_and_the_files_digest(tmp_path, name):
    path = write(tmp_path, name)
    source, rows = read_source(SourceSection(path=str(path)))
    assert [row.columns for row in rows] == ROWS
    assert source.record == {
        "path": str(path),
        "sha256": "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(),
        "rows": 10,
    }


def test_text_is_a_row_a_line(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("one line\n\nanother\r\n")
    assert [(row.where, row.columns) for row in read_source(SourceSection(path=str(path)))[1]] == [
        (f"{path}:1", {"text": "one line"}),
        (f"{path}:3", {"text": "another"}),
    ]


def test_a_cell_is_the_text_that_stands_there(tmp_path):
    """Readers that guess types make 7 of 007, 1.0 of 1 in a column with a gap, and nothing of "NA"."""
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n007,NA\n1,"two\nlines, ""quoted"""\n,x\n')
    rows = read_source(SourceSection(path=str(path)))[1]
    assert [row.columns for row in rows] == [
        {"a": "007", "b": "NA"},
        {"a": "1", "b": 'two\nlines, "quoted"'},
        {"a": "", "b": "x"},
    ]
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (2, 4, 5)]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:10%]", ROWS[:1]),
        ("train[70%:]", ROWS[7:]),
        ("train[-2:]", ROWS[8:]),
        ("train[:2]+train[9:]", [*ROWS[:2], ROWS[9]]),
    ],
)
@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.parquet", "saved", "dict"])
def test_a_slice_of_a_split(tmp_path, split, expected, kind):
    import datasets

    if kind in ("saved", "dict"):
        path = tmp_path / kind
        table = datasets.Dataset.from_list(ROWS)
        (table if kind == "saved" else datasets.DatasetDict({"train": table, "test": table})).save_to_disk(path)
    else:
        path = write(tmp_path, kind)
    source, rows = read_source(SourceSection(path=str(path), split=split))
    assert [row.columns for row in rows] == expected
    assert (source.split, source.rows) == (split, len(expected))


def test_several_sources_are_one_split_and_each_is_in_the_record(tmp_path):
    one, other = write(tmp_path, "one.jsonl"), write(tmp_path, "other.csv")
    data = DataSection(train=(one, SourceSection(path=str(other), split="train[:3]")), **PAIRS)
    split = read_split(data.train, data)
    assert split.prompts == tuple(f"{row['quote']} ->:" for row in [*ROWS, *ROWS[:3]])
    assert [source["rows"] for source in split.record["sources"]] == [10, 3]
    assert split.path == f"{one}, {other}" and split.duplicates == 3
    again = read_split((other, one), data)
    assert split.sha256 not in (again.sha256, split.sources[0].sha256)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "quote,tags\nx,y,z\n", ["a.csv:2", "3 cells", "2"]),
        ("a.csv", 'quote,tags\nx,"y\n', ["a.csv:", "not CSV"]),
        ("a.csv", "quote,quote\nx,y\n", ["a.csv:1", "same name"]),
        ("a.csv", b"quote,tags\nok,ok\n\xff,y\n", ["a.csv:3", "not UTF-8"]),
        ("a.csv", "quote,tags\n", ["a.csv", "no examples"]),
        ("a.csv", "qoute,tags\nx,y\n", ["a.csv:2", "no column 'quote'", "'qoute'"]),
        ("a.parquet", "no parquet", ["a.parquet", "not Parquet"]),
        ("a.json", "[1]", ["a.json:1", "a JSON object is expected"]),
        ("a.json", "[{]", ["a.json", "not JSON"]),
        ("a.json", f'[{{"quote": {"9" * 5000}}}]', ["a.json", "not JSON", "4300 digits"]),
        ("a.jsonl", f'{{}}\n{{"quote": {"9" * 5000}}}', ["a.jsonl:2", "not JSON", "4300 digits"]),
        ("a.jsonl", '{"quote": ' + "[" * 100_000, ["a.jsonl:1", "not JSON", "recursion"]),
        ("a.parquet", parquet_of(BROKEN), ["a.parquet", "column 'unused'", "utf-8"]),
        ("a.parquet", parquet_of(pyarrow.array([2**62], pyarrow.timestamp("us"))), ["column 'unused'", "out of range"]),
    ],
    ids=lambda value: None if isinstance(value, str | bytes) and len(value) > 40 else value,
)
def test_bad_files_are_named_with_their_row(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as refused:
        read_splits(DataSection(train=path, **PAIRS))
    assert all(word in str(refused.value) for word in words), refused.value


def test_bytes_are_not_trained_as_python_shows_them(tmp_path):
    """Spark writes text as binary unless told otherwise; `b'b'` was learnt of it."""
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"quote": ["a"], "tags": [b"b"]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet:1: column 'tags' is \"b'b'\"; text, a number"):
        read_splits(DataSection(train=path, **PAIRS))


def test_dates_and_decimals_are_text(tmp_path):
    path = tmp_path / "rows.parquet"
    at = datetime(2024, 2, 29, 12, 30)
    table = {"quote": [at], "tags": [[Decimal("1.50"), Decimal("2.00")]], "day": [at.date()], "time": [at.time()]}
    parquet.write_table(pyarrow.table(table), path)
    split = read_split(path, DataSection(train=path, prompt="{quote} {day} {time}", completion=" {tags}"))
    assert (split.prompts, split.completions) == (("2024-02-29 12:30:00 2024-02-29 12:30:00",), (" 1.50, 2.00",))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"path": "rows.jsonl", "split": "test"}, ["rows.jsonl", "'test'"]),
        ({"path": "rows.jsonl", "split": "train[:x]"}, ["rows.jsonl", "train[:x]"]),
        ({"path": "rows.jsonl", "revision": "main"}, ["revision", "this is a file"]),
        ({"path": "saved", "split": "test"}, ["saved", "test"]),
        ({"path": "saved", "config": "en"}, ["config", "save_to_disk"]),
        ({"path": "broken"}, ["broken: datasets cannot read it: "]),
        ({"path": "/"}, ["/: datasets cannot read it: "]),
        ({"path": "a\0b"}, ["'a\\x00b'", "null"]),
        ({"path": "x" * 300}, ["xxx: ", "too long"]),
    ],
)
def test_what_a_source_does_not_have_is_named(tmp_path, monkeypatch, source, words):
    import datasets

    monkeypatch.chdir(tmp_path)
    write(tmp_path, "rows.jsonl")
    datasets.Dataset.from_list(ROWS).save_to_disk("saved")
    Path("broken").mkdir()
    Path("broken/dataset_dict.json").write_text("[]")
    with pytest.raises(DataError) as refused:
        read_source(SourceSection(**source))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ({"pth": "x"}, ["'data.train.pth'"]),
        ({"split": "train"}, ["'data.train.path' is missing"]),
        (["x.jsonl", {"path": 5}], ["data.train", "5", "string"]),
        ([], ["data.train", "[]", "at least 1 item"]),
        (5, ["data.train", "5", "string"]),
    ],
)
def test_a_malformed_source_is_one_line(write_run, train, sources, words):
    result = train(write_run(data__train=sources), exit_code=2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


READ_ALL = """
import json, sys
from loraplex_trainer.data_keys import SourceSection
from loraplex_trainer.errors import DataError
from loraplex_trainer.sources import read_source
for settings in json.loads(sys.argv[1]):
    try:
        source, rows = read_source(SourceSection(**settings))
        print(json.dumps([source.record, [row.columns for row in rows], rows[0].where]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


def test_a_dataset_of_the_hub_is_read_at_one_commit(tmp_path):
    """In a process of its own: `datasets` reads HF_ENDPOINT once, when it is imported."""
    sources = [
        {"path": "team/quotes", "split": "train[:30%]", "revision": "main"},
        {"path": "team/quotes", "split": "train[:30%]"},
        {"path": "team/quotes", "split": "test"},
        {"path": "team/quotes", "split": "validation"},
        {"path": "team/quotes", "revision": "v2"},
        {"path": "team/nothing"},
    ]
    with serve_dataset("team/quotes", {"data/train.jsonl": ROWS, "data/test.jsonl": ROWS[:2]}) as url:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", READ_ALL, json.dumps(sources)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-c", READ_ALL, json.dumps(sources[1:2])]  # the server is gone: what the cache has
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    cached = subprocess.run(command, capture_output=True, text=True, env=offline, timeout=120)
    assert json.loads(cached.stdout)[1] == ROWS[:3], cached.stdout
    first, again, test, no_split, no_revision, nothing = map(json.loads, done.stdout.splitlines())
    record, rows, where = first
    assert rows == ROWS[:3] and where == "team/quotes train[:30%] row 1"
    assert record["revision"] == COMMIT and record["split"] == "train[:30%]" and record["rows"] == 3
    assert record["sha256"].startswith("sha256:") and record["fingerprint"]
    assert again == first and test[1] == ROWS[:2] and test[0]["sha256"] != record["sha256"]
    assert "team/quotes" in no_split and "validation" in no_split
    assert "team/quotes" in no_revision and "not to be had from the Hub" in no_revision
    assert nothing.startswith("team/nothing: no such file or folder, and not to be had from the Hub: ")
    assert "\n" not in no_split + no_revision + nothing
