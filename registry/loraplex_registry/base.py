"""What a base model looks like from outside: its tensors' names and shapes, and a fingerprint of its weights.

Torch-free: reads config.json and safetensors files, from a folder, the Hub's cache or the Hub. Loads no model.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from .errors import BaseNotFound
from .tensors import TensorInfo, mapped, read_header

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
HEADS = ("lm_head", "embed_out")  # GPT-NeoX's checkpoints say embed_out where transformers' module is lm_head
INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


@dataclass(frozen=True)
class BaseDescription:
    """A base model's outside. `shapes` are as stored; `fingerprint` is None when only the Hub's headers were read."""

    id: str
    revision: str | None
    fingerprint: str | None
    architecture: str
    shapes: dict[str, tuple[int, ...]]
    tied: bool = False  # the output head shares the input embedding's weight

    def weight_of(self, module: str) -> str | None:
        """The stored tensor of a module path such as `model.layers.0.mlp.up_proj`, or None.

        A checkpoint may lack the module path's first part: gpt2 stores `h.0…` for `transformer.h.0…`. The output head
        may be stored under another name, or, if it is tied, as the input embedding.
        """
        candidates = [f"{module}.weight", f"{module.partition('.')[2]}.weight"]
        if module in HEADS:
            candidates += [f"{name}.weight" for name in HEADS]
            candidates += [name for name in self.shapes if self.tied and _leaf(name) in INPUT_EMBEDDINGS]
        return next((name for name in candidates if name in self.shapes), None)


def _leaf(tensor: str) -> str:
    """The name of the module that a stored weight belongs to: `model.embed_tokens.weight` → `embed_tokens`."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def describe_base(id_or_path: str | Path, revision: str | None = None) -> BaseDescription:
    """Describe a base from its folder, from the Hub's local cache or, failing both, from the Hub's headers.

    Raises BaseNotFound, which says to name the base with --base.
    """
    name = str(id_or_path)
    if Path(name).is_dir():
        return _describe_folder(Path(name), name, revision)
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise BaseNotFound(f"the base '{name}' is not a folder here; name the base with --base ID_OR_PATH")
    return _describe_hub(name, revision)


def describe_cached_base(repo_id: str, revision: object = None) -> BaseDescription | None:
    """Describe a base from the Hub's local cache alone; None when it is not whole there.

    Both words may be a stranger's: they only ever name a place inside the cache.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id, re.ASCII) or ".." in repo_id:
        return None
    if revision is not None and not (isinstance(revision, str) and re.fullmatch(r"[\w-][\w.-]*", revision, re.ASCII)):
        return None
    import huggingface_hub as hub  # here, not above: it costs a third of a second and most calls need none of it

    try:
        config_file = Path(hub.hf_hub_download(repo_id, "config.json", revision=revision, local_files_only=True))
        return _describe_folder(config_file.parent, repo_id, config_file.parent.name)
    except (OSError, ValueError):  # BaseNotFound, when some shards are not in the cache, is one
        return None


def fingerprint_base(folder: str | Path) -> str:
    """`sha256:` over every tensor's name, dtype, shape and sha256 of bytes, sorted by name: sharding does not matter.

    Remembered by the files' path, size and time of change in the user's cache folder. Raises BaseNotFound.
    """
    files = _checkpoint_files(Path(folder))
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    with suppress(OSError, RuntimeError):  # no home, no note, or one that cannot be read: compute
        return _note(key).read_text()
    fingerprint = _fingerprint(files)
    with suppress(OSError, RuntimeError):  # a cache that cannot be written only costs time
        note = _note(key)
        note.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=note.parent)
        with os.fdopen(handle, "w") as stream:
            stream.write(fingerprint)
        Path(partial).replace(note)
    return fingerprint


def _note(key: str) -> Path:
    """Where a fingerprint is remembered. Raises RuntimeError for a user who has no home."""
    return user_cache_path("loraplex") / "fingerprints" / key


def _fingerprint(files: Iterable[Path]) -> str:
    lines: list[str] = []
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock on large buffers
        for file in files:
            header = _header(file)
            with mapped(file) as view:
                lines.extend(pool.map(lambda item, view=view: _tensor_line(item[0], item[1], view), header.items()))
    return "sha256:" + hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _tensor_line(name: str, info: TensorInfo, view: memoryview) -> str:
    with view[info.begin : info.end] as data:
        return json.dumps([name, info.dtype, info.shape, hashlib.sha256(data).hexdigest()]) + "\n"


def _describe_folder(folder: Path, name: str, revision: str | None) -> BaseDescription:
    config = _read_json(folder / "config.json")
    shapes = {tensor: info.shape for file in _checkpoint_files(folder) for tensor, info in _header(file).items()}
    return _description(name, revision, fingerprint_base(folder), config, shapes)


def _describe_hub(repo_id: str, revision: str | None) -> BaseDescription:
    import huggingface_hub as hub  # here, not above: it costs a third of a second and most calls need none of it
    from huggingface_hub.errors import HTTPError, NotASafetensorsRepoError  # pyright: ignore[reportPrivateImportUsage]

    try:
        config_file = Path(hub.hf_hub_download(repo_id, "config.json", revision=revision))
        commit = config_file.parent.name  # <cache>/snapshots/<commit>/config.json
        if any((config_file.parent / weights).exists() for weights in (WEIGHTS, INDEX)):
            with suppress(BaseNotFound):  # some shards are not in the cache
                return _describe_folder(config_file.parent, repo_id, commit)
        metadata = hub.get_safetensors_metadata(repo_id, revision=commit)
    except (OSError, ValueError, HTTPError, NotASafetensorsRepoError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseNotFound(
            f"the base '{repo_id}' is neither a folder, nor in the Hub's cache, nor reachable on the Hub ({reason}); "
            "name the base with --base ID_OR_PATH"
        ) from error
    shapes = {
        tensor: tuple(info.shape) for file in metadata.files_metadata.values() for tensor, info in file.tensors.items()
    }
    return _description(repo_id, commit, None, _read_json(config_file), shapes)


def _description(
    name: str, revision: str | None, fingerprint: str | None, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> BaseDescription:
    architecture = (config.get("architectures") or ["unknown"])[0]
    tied = bool(config.get("tie_word_embeddings", not any(f"{head}.weight" in shapes for head in HEADS)))
    return BaseDescription(name, revision, fingerprint, architecture, shapes, tied)


def _checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files transformers would load: the index's shards, or the single file."""
    if (folder / INDEX).is_file():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
    else:
        names = [WEIGHTS]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise BaseNotFound(
            f"the base folder '{folder}' lacks {', '.join(missing) or 'its shards'}; a base is read from safetensors "
            "files, name another with --base ID_OR_PATH"
        )
    return [folder / name for name in names]


def _header(file: Path) -> dict[str, TensorInfo]:
    try:
        return read_header(file)
    except ValueError as error:
        raise BaseNotFound(f"the base file '{file}' cannot be read: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise BaseNotFound(f"the base folder '{file.parent}' has no {file.name}; name the base with --base") from error
    except ValueError as error:
        raise BaseNotFound(f"'{file}' is not JSON: {error}") from error
