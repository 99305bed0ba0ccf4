"""Whether a folder is a LoRA adapter we serve, and whether it fits its base. Everything wrong is told at once.

Torch-free: reads adapter_config.json, the safetensors header and the raw values. Stores nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .adapter_config import CONFIG, read_config, wrong_options
from .base import BaseDescription
from .errors import InvalidAdapter
from .fit import DTYPES, Fit
from .manifest import FileEntry
from .receipt import Receipt
from .tensors import TensorInfo, mapped, read_header

WEIGHTS = "adapter_model.safetensors"
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
FILES = 200
RANKED = (".lora_A.weight", ".lora_embedding_A")  # tensors whose first dimension is the rank


@dataclass(frozen=True, slots=True)
class Limits:
    """What a push may hold at most: LoRA rank, and bytes of all files together."""

    max_rank: int = 256
    max_bytes: int = 8 << 30


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that passed. `tensors` are its file's, by key; `rank` is the largest over its modules."""

    config: dict[str, Any]
    files: tuple[FileEntry, ...]
    tensors: dict[str, TensorInfo]
    rank: int
    receipt: Receipt

    @property
    def targets(self) -> tuple[str, ...]:
        """The adapted modules' last names, sorted: ("down_proj", "q_proj", …)."""
        return tuple(sorted({key.rpartition(".lora_")[0].rpartition(".")[2] for key in self.tensors}))


def check_adapter(
    folder: Path,
    base: BaseDescription,
    limits: Limits | None = None,
    files: tuple[FileEntry, ...] | None = None,
    values: bool = True,
) -> CheckedAdapter:
    """Check a folder against its base. `files` spares hashing when who made the folder already did; without `values`,
    whoever reads them must look for NaN.

    Raises InvalidAdapter with every reason of the first step that fails: files, configuration, shapes, values.
    """
    limits = limits or Limits()
    paths = adapter_files(folder, limits)
    config = read_config(folder)
    _refuse(wrong_options(config, limits.max_rank))
    receipt = Receipt.read(folder)
    _refuse(_wrong_base(receipt, base))
    header = _read_header(folder / WEIGHTS)
    _refuse(Fit(config, header, base).reasons())
    if values:
        _refuse(_wrong_values(folder / WEIGHTS, header))
    if files is None:
        files = tuple(FileEntry.of(path, path.relative_to(folder).as_posix()) for path in paths)
    return CheckedAdapter(
        config=config,
        files=files,
        tensors=header,
        rank=max(info.shape[0] for key, info in header.items() if key.endswith(RANKED)),
        receipt=receipt,
    )


def adapter_files(folder: Path, limits: Limits) -> list[Path]:
    """The folder's files, sorted; hidden ones are no part of an adapter. Raises InvalidAdapter."""
    if not folder.is_dir():
        raise InvalidAdapter(f"'{folder}' is not a folder")
    files, reasons = [], []
    for path in sorted(_walk(folder)):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            reasons.append(f"{name} is a symbolic link; an adapter holds its own files")
        elif not path.is_file():
            reasons.append(f"{name} is not a regular file")
        elif path.suffix.lower() in PICKLES:
            reasons.append(f"{name} is a pickle, which can run code when it is read; only safetensors is taken")
        files.append(path)
    reasons += [f"{name} is missing" for name in (CONFIG, WEIGHTS) if folder / name not in files]
    _refuse(reasons)
    total_bytes = sum(path.stat().st_size for path in files)
    if total_bytes > limits.max_bytes:
        raise InvalidAdapter(f"{total_bytes:,} bytes in all, at most {limits.max_bytes:,} are taken")
    if len(files) > FILES:
        raise InvalidAdapter(f"{len(files)} files, at most {FILES} are taken")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _refuse(reasons: Iterable[str]) -> None:
    reasons = tuple(reasons)
    if reasons:
        raise InvalidAdapter(reasons)


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        header = read_header(file)
    except ValueError as error:
        raise InvalidAdapter(str(error)) from error
    if not header:
        raise InvalidAdapter(f"{file.name} holds no tensor")
    return header


def _wrong_base(receipt: Receipt, base: BaseDescription) -> Iterator[str]:
    trained = receipt.base
    if not trained or not trained.fingerprint:
        return  # without a receipt the shapes alone must fit
    if base.fingerprint and base.fingerprint != trained.fingerprint:
        yield (
            f"trained on base {trained.id} fingerprint {trained.fingerprint}, "
            f"given base {base.id} fingerprint {base.fingerprint}"
        )
    if not base.fingerprint and base.id != trained.id:  # only the Hub's headers were read: the name must do
        yield f"trained on base {trained.id}, given base {base.id}, whose weights are not here to compare"


def _wrong_values(file: Path, header: dict[str, TensorInfo]) -> Iterator[str]:
    with mapped(file) as view:
        for key, info in header.items():
            with view[info.begin : info.end] as data:
                if not _is_finite(data, info.dtype):
                    yield f"{key} holds NaN or infinite values"


def _is_finite(data: memoryview, dtype: str) -> bool:
    values = np.frombuffer(data, DTYPES[dtype])
    if dtype == "BF16":  # numpy has no bfloat16: NaN and infinity are the numbers whose exponent bits are all set
        return not bool(((values & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(values).all())
