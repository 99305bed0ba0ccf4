"""The receipt: what an adapter was made of, with what, how it scored and what it cost. Names no host and no user."""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from loraplex_server.engine.model import Base
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import Encoded, Split
from loraplex_trainer.evaluate import Measured
from loraplex_trainer.stopping import Evaluation

FORMAT, RECEIPT = "loraplex.receipt/1", "receipt.json"
PACKAGES = (
    *("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "safetensors", "datasets"),
    "loraplex",
)


@dataclass(frozen=True)
class Trained:
    """What the receipt tells once model and optimizer are gone."""

    base: dict[str, Any]
    encoded: dict[str, Encoded]
    template: dict[str, Any]  # how the adapter wants to be asked
    mask: dict[str, Any]  # what the loss is on
    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    kept_step: int  # whose weights the adapter has
    heldout_loss: float | None
    parent: dict[str, Any] | None
    processes: int  # that trained it
    started: float  # time.monotonic() at which a run without interruptions would have started
    beside: tuple[str, ...] = ()  # names of the runs that were trained in the same batches


def receipt_of(config: RunConfig, splits: dict[str, Split], trained: Trained, measured: Measured) -> dict[str, Any]:
    last = trained.losses[-config.training.log_every_steps :]
    return {
        "name": config.name,
        "config": config.model_dump(mode="json"),
        "base": trained.base,
        "data": {name: _data_record(split, trained.encoded[name]) for name, split in splits.items()},
        "template": trained.template,
        "mask": trained.mask,
        "seed": config.training.seed,
        "steps": len(trained.losses),
        "kept_step": trained.kept_step,
        "evaluations": [{"step": step, "loss": loss} for step, loss in trained.evaluations],
        "losses": {
            "train_first": trained.losses[0],
            "train_last": sum(last) / len(last),
            "heldout": trained.heldout_loss,
        },
        "metrics": measured.metrics,
        "goldens": [golden.record for golden in measured.goldens],
        "not_served": measured.not_served,
        "parent": trained.parent,
        "trained_beside": list(trained.beside),
        "processes": trained.processes,
        "wall_seconds": round(time.monotonic() - trained.started, 3),
    }


def base_record(base: Base) -> dict[str, Any]:
    return {
        "id": base.id,
        "path": str(base.folder) if Path(base.id).is_dir() else None,
        "revision": base.revision,
        "fingerprint": base.fingerprint,
        "quantization": base.quantization,
    }


def _data_record(split: Split, encoded: Encoded) -> dict[str, Any]:
    return {
        **split.record,
        "examples": len(encoded.examples),
        "tokens": encoded.tokens,
        "answer_tokens": encoded.answer_tokens,
        "truncated": encoded.truncated,
        "dropped": encoded.dropped,
        "cut_tokens": encoded.cut_tokens,
        "dropped_tokens": encoded.dropped_tokens,
        "unlearnt": encoded.unlearnt,
        "empty": encoded.empty,
    }


def write_receipt(folder: Path, receipt: dict[str, Any]) -> None:
    """Adds the sha256 of the files beside it and what it ran on, and writes receipt.json: the last file of a run."""
    shares_by_deepspeed = receipt["config"]["training"]["distributed"]["strategy"].startswith("zero")
    document = {
        "format": FORMAT,
        **receipt,
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
        "versions": versions("deepspeed") if shares_by_deepspeed else versions(),
        "hardware": hardware(),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    (folder / RECEIPT).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def versions(*more: str) -> dict[str, str | None]:
    """Of Python, of the CUDA that torch is built for, and of the packages that the numbers follow from."""
    own = {"python": platform.python_version(), "cuda": torch.version.cuda}
    return own | {name: _version(name) for name in (*PACKAGES, *more)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def hardware() -> dict[str, str | int | None]:
    """Processor, cores, memory, GPU model, and how many of them this machine gives."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def peak_memory_bytes() -> int:
    """Of the GPU where there is one, else of this process, evaluation included."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a source tree that is not installed


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
