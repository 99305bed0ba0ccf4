"""The resumable state of a run: adapter weights, optimizer, random state and progress, as safetensors and JSON.

Owns the folder `<output>/<name>/.checkpoint`. No pickle: reading a checkpoint runs no code. One digest over both files
tells whether they are as they were written, so nothing more is asked of their contents.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from loraplex_trainer.errors import CheckpointError, NotWritten
from loraplex_trainer.loop import Loop
from loraplex_trainer.optimizers import optimizer_state, restore_optimizer
from loraplex_trainer.stopping import Evaluation

FORMAT = "loraplex.checkpoint/3"
CHECKPOINT, STATE, PROGRESS = ".checkpoint", "state.safetensors", "progress.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is. The data order follows from the seed and `step`, so neither it nor a position is stored."""

    step: int
    losses: tuple[float, ...]  # one for each step done
    evaluations: tuple[Evaluation, ...]  # held-out losses on the way
    wall_seconds: float
    run: dict[str, Any]  # what the run is about: a checkpoint of another run is not resumed


def save_checkpoint(folder: Path, progress: Progress, loop: Loop) -> None:
    """Writes beside, then swaps: a crash leaves the previous checkpoint or the new one, whole."""
    tensors = {f"adapter/{name}": parameter.detach() for name, parameter in loop.parameters.items()}
    tensors |= {f"best/{name}": tensor for name, tensor in loop.best.items()}
    tensors |= optimizer_state(loop.optimizer, loop.parameters)
    tensors |= {f"random/{kind}": generator.get_state() for kind, generator in loop.generators.items()}
    partial = folder.with_name(f"{folder.name}.partial")
    document = {"format": FORMAT, **vars(progress)}
    with writing(partial, f"the checkpoint of step {progress.step}"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_each_its_own(tensors), partial / STATE)
        document["sha256"] = _digest(document, partial / STATE)
        (partial / PROGRESS).write_text(json.dumps(document, indent=1), encoding="utf-8")
        swap_in(partial, folder)


def load_progress(folder: Path) -> Progress:
    """Raises CheckpointError when there is no checkpoint, not one this version reads, or a damaged one."""
    finish_swap(folder)
    try:
        document = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"nothing to resume: there is no checkpoint in {folder}") from error
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error
    if not isinstance(document, dict):
        raise _damaged(folder, f"{PROGRESS} is no JSON object")
    if (found := document.get("format")) != FORMAT:
        raise CheckpointError(
            f"the checkpoint {folder} is of the format {found!r}, and this version reads {FORMAT}: "
            "start anew without --resume"
        )
    written = document.pop("sha256", None)
    try:
        if written != _digest(document, folder / STATE):
            raise _damaged(folder, f"{PROGRESS} and {STATE} are not as they were written together")
    except OSError as error:
        raise _damaged(folder, error) from error
    del document["format"]
    losses, evaluations = tuple(document["losses"]), tuple((step, loss) for step, loss in document["evaluations"])
    return Progress(**(document | {"losses": losses, "evaluations": evaluations}))


def restore_state(folder: Path, loop: Loop) -> None:
    """Puts weights, optimizer state and random state back as they were saved, and `load_progress` has proven."""
    tensors = load_file(folder / STATE, device=str(loop.model.device))
    expected = {f"adapter/{name}" for name in loop.parameters}
    if expected != {key for key in tensors if key.startswith("adapter/")}:
        raise CheckpointError(f"the checkpoint {folder} holds an adapter of other modules")
    with torch.no_grad():
        for name, parameter in loop.parameters.items():
            parameter.copy_(tensors[f"adapter/{name}"])
    loop.best = {key.removeprefix("best/"): tensors[key].cpu() for key in tensors if key.startswith("best/")}
    saved = {key: tensor for key, tensor in tensors.items() if key.startswith(("optimizer/", "number/"))}
    restore_optimizer(loop.optimizer, loop.parameters, saved)
    for kind, generator in loop.generators.items():
        if (state := tensors.get(f"random/{kind}")) is not None:
            generator.set_state(state.cpu())


def _digest(document: dict[str, Any], state: Path) -> str:
    """Of all that a checkpoint says, `sha256` itself left out, and of its tensors."""
    with state.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(document).encode())
    return digest.hexdigest()


def _damaged(folder: Path, why: object) -> CheckpointError:
    return CheckpointError(f"the checkpoint {folder} is damaged: {why}: start anew without --resume")


def _each_its_own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors takes no two tensors in one memory; bitsandbytes' 8-bit states share their quantization maps."""
    seen: set[int] = set()
    separate: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        shared = tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        separate[key] = tensor.clone() if shared else tensor.contiguous()
    return separate


@contextmanager
def writing(partial: Path, what: str) -> Iterator[None]:
    """Removes `partial` and raises NotWritten, naming `what`, where the disk does not take it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise NotWritten(
            f"{what} could not be written to {partial.parent}: {reason}; what was there before is whole: "
            "make room, and go on with --resume"
        ) from error


def swap_in(partial: Path, folder: Path) -> None:
    """Makes `partial` be `folder`; what was there is removed afterwards. Both are synced to disk first.

    The caller knows that nothing but its own was there.
    """
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def finish_swap(folder: Path) -> None:
    """A crash between the two renames of swap_in leaves only the old folder: it is the good one."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)


def _old(folder: Path) -> Path:
    """Not to be mixed up with an adapter: no name begins with a dot."""
    return folder.with_name(f".{folder.name}.old")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
