"""The tokens that `registry login` keeps: a file for each registry's URL in the platform's config folder, mode 0600.

Owns these files, and which token is used for a URL. Knows no registry.
"""

import os
import tempfile
from pathlib import Path
from urllib.parse import quote

import httpx
from platformdirs import user_config_path

from .errors import InvalidRequest, StoreUnavailable
from .places import sync_folder

VARIABLE = "LORAPLEX_REGISTRY_TOKEN"


def token_for(url: str) -> str | None:
    """The environment's token, else the one kept for the URL. Raises InvalidRequest, StoreUnavailable."""
    file, given = _file(url), os.environ.get(VARIABLE)
    return check_secret(given, VARIABLE) if given else _kept(file)


def keep_token(url: str, secret: str) -> Path:
    """Keep it for this URL, in place of the one before; whole or not at all. Raises StoreUnavailable."""
    file = _file(url)
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, partial = tempfile.mkstemp(dir=file.parent, prefix=".token.")  # mode 0600 from the first byte on
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(secret + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            Path(partial).replace(file)
        except OSError:
            Path(partial).unlink(missing_ok=True)
            raise
        sync_folder(file.parent)
    except OSError as error:
        raise StoreUnavailable(f"the token cannot be kept in '{file}': {error.strerror}") from error
    return file


def forget_token(url: str) -> bool:
    """Whether there was one."""
    try:
        _file(url).unlink()
    except FileNotFoundError:
        return False
    return True


def check_secret(secret: str, what: str) -> str:
    """A token that a header can carry, as it came. Raises InvalidRequest, which does not show it."""
    if not secret or not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise InvalidRequest(f"{what} is no token, expected printable ASCII characters without spaces", "token")
    return secret


def _kept(file: Path) -> str | None:
    try:
        mode = file.stat().st_mode & 0o777
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # a service's home may be one it may not look into
        return None
    if mode & 0o077:
        raise StoreUnavailable(f"others can read the token in '{file}' (mode {mode:o}), expected 600: chmod 600 it")
    try:
        return check_secret(file.read_text(errors="replace").strip(), f"what '{file}' holds")
    except OSError as error:
        raise StoreUnavailable(f"the token in '{file}' cannot be read: {error.strerror}") from error


def _file(url: str) -> Path:
    """One name for all ways to write a URL. Raises InvalidRequest."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"'{url}' is not a URL: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidRequest(f"'{url}' is not a registry's URL, expected http://host[:port] or https://…")
    port = f":{parsed.port}" if parsed.port else ""  # httpx drops the scheme's own
    where = f"{parsed.scheme}://{parsed.host}{port}{parsed.path.rstrip('/')}"
    return user_config_path("loraplex") / "registry-tokens" / quote(where, safe="")
