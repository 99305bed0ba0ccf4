"""A Hub commit as it arrives: lines of JSON, one operation each, whose files are base64 in a line of any length.

Owns the reading: content is decoded in pieces into files, and no more than a line without its content is in memory.
Knows no drafts and no HTTP. The lines are those of huggingface_hub's `_prepare_commit_payload`.
"""

import binascii
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pydantic_core import from_json

from .errors import InvalidRequest, TooLarge
from .manifest import SHA256, FileEntry
from .validate import FILES

LINE_BYTES = 64 << 10  # a line without its content: a path, or the words of a header
OPERATIONS = 4 * FILES
_CONTENT = b"content"
_QUOTE, _ESCAPE, _COLON, _LINE = b'"\\:\n'
_OPEN, _CLOSE, _SPACE = b"{[", b"}]", b" \t\r"


@dataclass
class Commit:
    """What the lines say. `copied` are files that the repository is to have already, by their sha256."""

    summary: str = ""
    description: str = ""
    parent: str | None = None
    added: dict[str, FileEntry] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    deleted_folders: list[str] = field(default_factory=list)


class CommitReader:
    """Write the body's bytes as they come, then finish. Files lie in `folder`, flushed, named by their sha256."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.commit = folder, Commit()
        self.digest = hashlib.sha256()
        self._max_bytes, self._content_bytes = max_bytes, 0
        self._lines, self._headed = 0, False
        self._decoder: _Base64File | None = None
        self._partial = folder / "content.part"
        self._begin_line()

    def write(self, chunk: bytes) -> None:
        """Raises InvalidRequest, InvalidManifest, TooLarge."""
        self.digest.update(chunk)
        at = 0
        while at < len(chunk):
            if self._decoder:
                at = self._write_content(chunk, at)
            else:
                self._write_letter(chunk[at])
                at += 1

    def finish(self) -> Commit:
        """The commit, when all of it came. Raises InvalidRequest."""
        if self._decoder:
            raise InvalidRequest(f"line {self._lines + 1}: the body ends inside a file's content", "content")
        self._end_line()
        if not self._headed:
            raise InvalidRequest("the commit has no line with key 'header'", "header")
        return self.commit

    def close(self) -> None:
        """Close what is open. What lies in the folder is the caller's."""
        if self._decoder:
            self._decoder.close()

    # --- one line ---

    def _begin_line(self) -> None:
        self._line, self._depth = bytearray(), 0
        self._in_string = self._escaped = self._after_colon = False
        self._word = bytearray()  # the string that is being read, or was read last
        self._file: FileEntry | None = None

    def _write_letter(self, letter: int) -> None:
        if letter == _LINE:
            self._end_line()
            return
        self._line.append(letter)
        if len(self._line) > LINE_BYTES:
            raise TooLarge(f"line {self._lines + 1}: more than {LINE_BYTES:,} bytes beside a file's content")
        if self._in_string:
            self._write_word(letter)
        elif letter == _QUOTE:
            self._in_string = True
            if self._after_colon and self._depth == 2 and self._word == _CONTENT:
                self._begin_content()
            self._word = bytearray()
        elif letter == _COLON:
            self._after_colon = True
        elif letter not in _SPACE:
            self._after_colon = False
            self._depth += (letter in _OPEN) - (letter in _CLOSE)

    def _write_word(self, letter: int) -> None:
        if letter == _QUOTE and not self._escaped:
            self._in_string = self._after_colon = False
            return
        self._escaped = letter == _ESCAPE and not self._escaped
        self._word.append(letter)

    def _begin_content(self) -> None:
        if self._file:
            raise InvalidRequest(f"line {self._lines + 1}: 'content' is given twice", "content")
        self._decoder = _Base64File(self._partial, self._max_bytes - self._content_bytes, self._max_bytes)

    def _write_content(self, chunk: bytes, at: int) -> int:
        assert self._decoder
        stop = chunk.find(_QUOTE, at)
        try:
            self._decoder.write(chunk[at : stop if stop >= 0 else len(chunk)])
            if stop < 0:
                return len(chunk)
            sha256, size = self._decoder.finish()
        except binascii.Error as error:
            raise InvalidRequest(f"line {self._lines + 1}: 'content' is not base64: {error}", "content") from error
        self._content_bytes += size
        self._decoder = None
        self._partial.replace(self.folder / sha256)
        self._file = FileEntry("content", sha256, size)
        return stop  # the quote ends the string, which the line holds as an empty one

    def _end_line(self) -> None:
        line, kept = bytes(self._line), self._file
        self._begin_line()
        if not line.strip():
            return
        self._lines += 1
        if self._lines > OPERATIONS:
            raise TooLarge(f"more than {OPERATIONS} lines in one commit")
        try:
            operation = from_json(line)
        except ValueError as error:
            raise InvalidRequest(f"line {self._lines} is not JSON: {error}") from error
        if not isinstance(operation, dict) or not isinstance(operation.get("value"), dict):
            raise InvalidRequest(f"line {self._lines}: expected an object with 'key' and an object 'value'", "value")
        self._take(operation.get("key"), operation["value"], kept)

    # --- what a line asks for ---

    def _take(self, key: object, value: dict[str, Any], kept: FileEntry | None) -> None:
        if (key == "header") != (self._lines == 1):
            raise InvalidRequest(f"line {self._lines}: key is {key!r}; the first line alone is the header", "key")
        match key:
            case "header":
                self._take_header(value)
            case "file":
                self._take_file(value, kept)
            case "lfsFile":
                path, oid = self._path(value), self._text(value, "oid")
                if value.get("algo", "sha256") != "sha256" or not SHA256.fullmatch(oid):
                    raise InvalidRequest(
                        f"line {self._lines}: oid is {oid!r}, expected a sha256 in 64 hex digits", "oid"
                    )
                self._once(path)
                self.commit.copied[path] = oid
            case "deletedFile":
                self.commit.deleted.append(self._path(value))
            case "deletedFolder":
                self.commit.deleted_folders.append(self._path(value, folder=True))
            case _:
                expected = "header, file, lfsFile, deletedFile or deletedFolder"
                raise InvalidRequest(f"line {self._lines}: key is {key!r}, expected {expected}", "key")

    def _take_header(self, value: dict[str, Any]) -> None:
        self.commit.summary = self._text(value, "summary")
        self.commit.description = self._text(value, "description", "")
        parent = value.get("parentCommit")
        if parent is not None:
            digits = parent if isinstance(parent, str) else ""
            if not 7 <= len(digits) <= 40 or not set(digits) <= set("0123456789abcdef"):
                told = f"line {self._lines}: parentCommit is {parent!r}, expected 7 to 40 lowercase hex digits"
                raise InvalidRequest(told, "parentCommit")
        self.commit.parent, self._headed = parent, True

    def _take_file(self, value: dict[str, Any], kept: FileEntry | None) -> None:
        path = self._path(value)
        if value.get("encoding", "base64") != "base64":
            told = f"line {self._lines}: encoding is {value['encoding']!r}, expected 'base64'"
            raise InvalidRequest(told, "encoding")
        if kept is None or value.get("content") != "":
            raise InvalidRequest(f"line {self._lines}: 'content' is missing, expected a string of base64", "content")
        self._once(path)
        self.commit.added[path] = FileEntry(path, kept.sha256, kept.bytes)

    def _once(self, path: str) -> None:
        if path in self.commit.added or path in self.commit.copied:
            raise InvalidRequest(f"line {self._lines}: {path!r} is added twice", "path")

    def _path(self, value: dict[str, Any], folder: bool = False) -> str:
        """The field `path`, by the rules of a manifest's paths. Raises InvalidManifest, InvalidRequest."""
        path = self._text(value, "path")
        return FileEntry(path.removesuffix("/") if folder else path, "0" * 64, 0).path

    def _text(self, value: dict[str, Any], key: str, default: str | None = None) -> str:
        text = value.get(key, default)
        if not isinstance(text, str):
            raise InvalidRequest(f"line {self._lines}: {key} is {text!r}, expected a string", key)
        return text


class _Base64File:
    """Base64 letters in, a file of what they stand for out. The last four letters wait: only they may be padded."""

    def __init__(self, file: Path, left_bytes: int, max_bytes: int) -> None:
        self._left_bytes, self._max_bytes = left_bytes, max_bytes
        self._stream: IO[bytes] = file.open("wb")
        self._digest, self._size, self._held = hashlib.sha256(), 0, b""

    def write(self, letters: bytes) -> None:
        """Raises binascii.Error, TooLarge."""
        letters = self._held + letters
        ready = max((len(letters) - 1) // 4 * 4, 0)
        self._held = letters[ready:]
        if b"=" in letters[:ready]:
            raise binascii.Error("padding before the end")
        self._keep(letters[:ready])

    def finish(self) -> tuple[str, int]:
        """The file's sha256 and its bytes; it is flushed to the disk. Raises binascii.Error, TooLarge."""
        self._keep(self._held)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.close()
        return self._digest.hexdigest(), self._size

    def close(self) -> None:
        self._stream.close()

    def _keep(self, letters: bytes) -> None:
        data = binascii.a2b_base64(letters, strict_mode=True)
        self._size += len(data)
        if self._size > self._left_bytes:
            raise TooLarge(f"the files of one commit have more than {self._max_bytes:,} bytes, which is the limit")
        self._digest.update(data)
        self._stream.write(data)
