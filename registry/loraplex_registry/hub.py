"""Adapters from and to the Hugging Face Hub: one commit's files, or a version's, through huggingface_hub.

What comes is compared with the digests that the Hub states: the client itself compares sizes alone. Knows no registry.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import huggingface_hub as hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - whichever client it uses
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

from .adapter_config import CONFIG
from .blobs import read_chunks
from .errors import InvalidAdapter, RegistryError, RemoteError
from .manifest import FileEntry
from .reference import HubReference
from .validate import FILES, PICKLES, WEIGHTS, Limits
from .version import Version

MAIN = "main"
BEGUN = ".begun"  # beside a commit's files: those that are not whole; hidden, and so no part of an adapter
TRIES = 6
LONGEST_WAIT_SECONDS = 300
SAID_CHARACTERS = 2000  # of a version's message: it keeps 4096, and another registry no more for all that a commit says
T = TypeVar("T")


def find_on_hub(
    ref: HubReference, limits: Limits, endpoint: str | None = None
) -> tuple[HubReference, list[RepoSibling]]:
    """The commit that a revision is now, and those of its files that an adapter may have: none hidden, no pickle.

    Raises RemoteError, and InvalidAdapter for what would be refused when it is here.
    """
    with _told(f"{ref} cannot be fetched"):
        api = hub.HfApi(endpoint=endpoint)
        info = _patiently(lambda: api.model_info(ref.repo_id, revision=ref.revision, files_metadata=True))
        if not info.sha:
            raise RemoteError("the Hub names no commit")
        files = [one for one in info.siblings or [] if _is_wanted(one.rfilename)]
        missing = {CONFIG, WEIGHTS} - {one.rfilename for one in files}
        if missing:
            raise InvalidAdapter([f"{name} is missing in {ref}" for name in sorted(missing)])
        total_bytes = sum(one.size or 0 for one in files)
        if total_bytes > limits.max_bytes or len(files) > FILES:
            told = f"{ref} has {len(files)} files of {total_bytes:,} bytes"
            raise InvalidAdapter(f"{told}, at most {FILES} of {limits.max_bytes:,} are taken")
        return HubReference(ref.repo_id, info.sha), files


def fetch_from_hub(ref: HubReference, files: list[RepoSibling], into: Path, endpoint: str | None = None) -> None:
    """Download files of a commit into a folder, and prove each. What lies there already is not fetched again.

    Nor is what an earlier call, which may have been killed, had of a file. Raises RemoteError; a file that is not what
    the Hub says is removed.
    """
    with _told(f"{ref} cannot be fetched"):
        for one in files:
            file, begun = into / one.rfilename, into / BEGUN / hashlib.sha256(one.rfilename.encode()).hexdigest()
            if file.is_file() and not _wrong_bytes(file, one):
                continue
            begun.parent.mkdir(exist_ok=True)
            _fetch(hub.hf_hub_url(ref.repo_id, one.rfilename, revision=ref.revision, endpoint=endpoint), one, begun)
            file.parent.mkdir(parents=True, exist_ok=True)
            begun.replace(file)


def _fetch(url: str, one: RepoSibling, begun: Path) -> None:
    """Go on with a file where it broke off. Not by `hf_hub_download`, which begins anew in every process.

    Raises RemoteError when the bytes are wrong, and not because of those that were there.
    """
    was_begun = begun.exists()
    if was_begun and one.size is not None and begun.stat().st_size > one.size:
        begun.unlink()  # none of it is to be trusted

    def go_on() -> None:
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # a range is of the file's own bytes
        with begun.open("ab") as stream:
            options = {"expected_size": one.size, "displayed_filename": one.rfilename}
            http_get(url, stream, resume_size=stream.tell(), headers=headers, **options)

    def found_wrong() -> str | None:
        _patiently(go_on)
        wrong = _wrong_bytes(begun, one)
        if wrong:
            begun.unlink()
        return wrong

    wrong = found_wrong()
    if wrong and was_begun:
        wrong = found_wrong()
    if wrong:
        raise RemoteError(f"{one.rfilename} {wrong}; it was removed, try again")


def push_to_hub(
    folder: Path,
    version: Version,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Upload a version's files as one commit, into a repository that is made if it is not there; gives its URL.

    Files of the repository that the version does not have stay. Raises RemoteError.
    """
    with _told(f"{version} cannot be pushed to hf://{repo_id}"):
        api = hub.HfApi(endpoint=endpoint)
        _patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
        if private and not _patiently(lambda: api.model_info(repo_id)).private:
            raise RemoteError("it is there already, and is not private")
        if revision and revision != MAIN:
            _patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        upload = partial(api.upload_folder, repo_id=repo_id, folder_path=folder, revision=revision)
        said = f"{version.message[:SAID_CHARACTERS]}\n\n{version.digest}".strip()
        done = _patiently(lambda: upload(commit_message=str(version), commit_description=said))
        return str(done.commit_url)


def _is_wanted(path: str) -> bool:
    """Whether a file may be an adapter's. Raises InvalidManifest for a path that would leave the folder."""
    if any(part.startswith(".") and part not in (".", "..") for part in path.split("/")):
        return False
    return Path(FileEntry(path, "0" * 64, 0).path).suffix.lower() not in PICKLES


def _wrong_bytes(file: Path, told: RepoSibling) -> str | None:
    """What is not as the Hub says: a large file's sha256, a small one's git id, which is a sha1 after a header."""
    if told.lfs:
        digest, stated = hashlib.sha256(), told.lfs.sha256
    elif told.blob_id:
        digest, stated = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False), told.blob_id
    else:
        return "has no digest on the Hub to prove it by"
    for chunk in read_chunks(file):
        digest.update(chunk)
    return None if digest.hexdigest() == stated else f"came as {digest.hexdigest()}, and the Hub has {stated}"


def _patiently(act: Callable[[], T]) -> T:
    """Try again when the Hub has no time just now (429, 503), after as long as it asks for."""
    for tried in range(TRIES):
        try:
            return act()
        except (OSError, HTTPError) as error:
            seconds = _asked_wait(error)
            if seconds is None or seconds > LONGEST_WAIT_SECONDS or tried == TRIES - 1:
                raise
            time.sleep(max(seconds, 2**tried))
    raise AssertionError("the last try returns or raises")


def _asked_wait(error: BaseException | None) -> int | None:
    """The seconds that a busy Hub asks to wait, 0 if it does not say; None for any other error."""
    while error and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if not error or error.response.status_code not in (429, 503):
        return None
    asked = error.response.headers.get("Retry-After", "")
    return int(asked) if asked.isdecimal() else 0


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever huggingface_hub raises, in one line."""
    try:
        yield
    except RemoteError as error:
        raise RemoteError(f"{what}: {error}") from error
    except RegistryError:
        raise
    except (OSError, ValueError, HTTPError) as error:
        reason = str(error).strip() or type(error).__name__
        raise RemoteError(f"{what}: {' '.join(reason.split())}") from error
