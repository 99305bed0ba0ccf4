"""Rows: from jsonl, csv, parquet and text files, from folders that `datasets` wrote, and from datasets of the Hub.

Owns what was read, with its digest. Knows nothing of what the columns mean.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraplex_trainer.data_keys import SourceSection
from loraplex_trainer.errors import DataError

Columns = dict[str, Any]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Row:
    """The columns of one row, and where it stands: what a message about it begins with."""

    where: str
    columns: Columns


@dataclass(frozen=True)
class Source:
    """What was read. `sha256` is of the file, or of the rows where there is none; `revision` is the Hub's commit."""

    path: str
    sha256: str
    rows: int
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    fingerprint: str | None = None

    @property
    def record(self) -> dict[str, Any]:
        """As the receipt tells it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_source(section: SourceSection) -> tuple[Source, list[Row]]:
    """All rows of a source. Raises DataError, naming file and row."""
    path = Path(section.path)
    reader = _READERS.get(path.suffix.lower())
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # too long a name
        raise DataError(f"{path}: {error.strerror}") from error
    if is_file or reader or not (is_folder or _HUB_ID.fullmatch(section.path)):
        return _from_file(section, path, reader or _jsonl)
    return _from_datasets(section, path if is_folder else None)


def _from_file(section: SourceSection, path: Path, reader: "_Reader") -> tuple[Source, list[Row]]:
    for key in ("config", "revision"):
        if getattr(section, key) is not None:
            raise DataError(f"{path}: {key} is for a dataset of the Hub, and this is a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in it
        raise DataError(f"{str(path)!r}: {error}") from error
    rows = [Row(f"{path}:{number}", columns) for number, columns in reader(path, content)]
    sha256 = "sha256:" + hashlib.sha256(content).hexdigest()
    if section.split == "train":
        return Source(section.path, sha256, len(rows)), rows
    chosen = _slice(section, rows)
    return Source(section.path, sha256, len(chosen), split=section.split), chosen


def _slice(section: SourceSection, rows: list[Row]) -> list[Row]:
    """The part that a split such as `train[:10%]` names, as `datasets` reads it; a file has the split `train` alone."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(section.split).to_absolute({"train": len(rows)})
    except (AssertionError, ValueError) as error:
        raise DataError(f"{section.path}: split {section.split!r}: {error}") from error
    return [row for part in parts for row in rows[part.from_ : part.to]]


def _from_datasets(section: SourceSection, folder: Path | None) -> tuple[Source, list[Row]]:
    """A folder, or a dataset of the Hub at one commit, which is asked for first; off line, what the cache has."""
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    datasets.disable_progress_bars()
    options = {"name": section.config, "split": section.split}
    try:
        if folder is None:
            commit = (
                section.revision
                if HF_HUB_OFFLINE
                else HfApi().dataset_info(section.path, revision=section.revision).sha
            )
            table = datasets.load_dataset(section.path, revision=commit, **options)
        else:
            commit = None
            table = _from_folder(section, folder)
        rows = [Row(f"{section.path} {section.split} row {at}", dict(columns)) for at, columns in enumerate(table, 1)]
    except DataError:
        raise
    except Exception as error:  # what lies in somebody's folder may raise anything in datasets
        unread = "datasets cannot read it: " if folder else "no such file or folder, and not to be had from the Hub: "
        raise DataError(f"{section.path}: {unread}{_reason(error)}") from error
    digest = "sha256:" + digest_of([row.columns for row in rows])
    fingerprint = getattr(table, "_fingerprint", None)
    return Source(section.path, digest, len(rows), section.config, section.split, commit, fingerprint), rows


def _from_folder(section: SourceSection, folder: Path) -> Any:
    """What `save_to_disk` wrote, or a folder of data files."""
    import datasets

    if section.revision is not None:
        raise DataError(f"{folder}: revision is for a dataset of the Hub, and this is a folder")
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_dataset(str(folder), name=section.config, split=section.split)
    if section.config is not None:
        raise DataError(f"{folder}: config is for a dataset of the Hub, and this is a folder that save_to_disk wrote")
    saved = datasets.load_from_disk(str(folder))
    splits = saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict({"train": saved})
    parts = datasets.ReadInstruction.from_spec(section.split).to_absolute({name: len(splits[name]) for name in splits})
    return datasets.concatenate_datasets(
        [
            splits[part.splitname].select(range(*slice(part.from_, part.to).indices(len(splits[part.splitname]))))
            for part in parts
        ]
    )


def digest_of(rows: Sequence[object]) -> str:
    """sha256 of rows, whatever file they come from: of each row's JSON with sorted keys, a line each."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()


_Reader = Callable[[Path, bytes], Iterator[tuple[int, Columns]]]


def _jsonl(path: Path, content: bytes) -> Iterator[tuple[int, Columns]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _loaded(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a JSON object is expected, not {type(row).__name__}")
        yield number, row


def _json(path: Path, content: bytes) -> Iterator[tuple[int, Columns]]:
    """A list of objects; anything else is read as a line each."""
    if not content.lstrip().startswith(b"["):
        yield from _jsonl(path, content)
        return
    for number, row in enumerate(_loaded(content, str(path)), start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a JSON object is expected, not {type(row).__name__}")
        yield number, row


def _loaded(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # not only JSONDecodeError: thousands of digits, or of brackets
        raise DataError(f"{where}: not JSON: {error}") from error


def _csv(path: Path, content: bytes) -> Iterator[tuple[int, Columns]]:
    """Every cell is the text that stands there: no 007 becomes 7, no "NA" nothing."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(_decoded(path, content), newline=""), delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError(f"{path}:1: two columns have the same name")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(f"{path}:{reader.line_num}: {len(cells)} cells, and the first line names {len(names)}")
            yield reader.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _text(path: Path, content: bytes) -> Iterator[tuple[int, Columns]]:
    for number, line in enumerate(_decoded(path, content).split("\n"), start=1):
        if line.strip():
            yield number, {"text": line.removesuffix("\r")}


def _parquet(path: Path, content: bytes) -> Iterator[tuple[int, Columns]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not Parquet: {_reason(error)}") from error
    names, columns = table.column_names, []
    for name, column in zip(names, table.columns, strict=True):
        try:
            columns.append(column.to_pylist())
        except (ValueError, OverflowError) as error:  # no UTF-8, or a date that Python has not
            raise DataError(f"{path}: column {name!r}: {_reason(error)}") from error
    yield from enumerate((dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)), start=1)


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8: {error.reason}") from error


def _reason(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error: `datasets` wraps what it met."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


_READERS: dict[str, _Reader] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
