"""Safetensors files without torch: which tensors lie where, and their raw bytes. Knows no adapter and no model."""

import json
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

HEADER_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """dtype as the file says it (F32, BF16, …), shape, and where its bytes begin and end in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name. Raises ValueError saying what is wrong with the file."""
    try:
        with safe_open(file, framework="numpy"):  # the library checks offsets, overlaps, gaps and the file's length
            pass
    except SafetensorError as error:
        raise ValueError(f"{file.name} is not a whole safetensors file: {error}") from error
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > HEADER_BYTES:
            raise ValueError(f"{file.name} has a header of {length:,} bytes, at most {HEADER_BYTES:,} are read")
        header = json.loads(stream.read(length))
    data_begin = 8 + length
    return {
        name: TensorInfo(
            entry["dtype"], tuple(entry["shape"]), *(data_begin + offset for offset in entry["data_offsets"])
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


@contextmanager
def mapped(file: Path) -> Iterator[memoryview]:
    """The file's bytes, mapped, not read. Slices must be released before the block ends."""
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as area,
        memoryview(area) as view,
    ):
        yield view
