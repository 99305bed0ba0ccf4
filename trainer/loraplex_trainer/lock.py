"""One training of a name at a time: the lock on the folder in which its adapter is made. Gone with its process."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraplex_trainer.errors import ConfigError


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes `folder` anew, empty, and holds it; raises ConfigError while another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"name: another training of this name is at work in {folder.parent}: wait until it ends, or give this "
                "one another name or output"
            ) from error
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        os.close(descriptor)
