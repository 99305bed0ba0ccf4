"""Where downloads from the Hub wait between two tries: a folder of the user's cache, by repository and commit.

Owns the folder's life: one process at a time, kept after a failure or a kill, removed when its files were taken.
"""

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from .reference import HubReference


@contextmanager
def download_folder(ref: HubReference, endpoint: str) -> Iterator[Path]:
    """The folder for a commit's files, with what an earlier try left there. Waits for others who use it."""
    key = hashlib.sha256(f"{endpoint} {ref}".encode()).hexdigest()[:32]
    folder = user_cache_path("loraplex") / "hub" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("ab") as lock:  # it stays: who waits for it may not meet another one
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder)
