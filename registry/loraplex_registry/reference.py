"""How an adapter version is named: `name`, `name:3`, `name@production`, `name@sha256:…`, `hf://owner/repo@revision`.

Owns the grammar only; what a reference stands for today is the catalog's to say.
"""

import re
from dataclasses import dataclass

from .errors import InvalidReference

_WORD = r"[a-z0-9](?:[a-z0-9._-]{0,94}[a-z0-9])?"
_NAME = rf"(?:{_WORD}/)?{_WORD}"
_ALIAS = rf"(?![0-9]+\Z){_WORD}"
_DIGEST = r"sha256:[0-9a-f]{64}"
_TARGET = rf":(?P<version>[1-9][0-9]{{0,8}})|@(?P<digest>{_DIGEST})|@(?P<alias>{_ALIAS})"
_REFERENCE = re.compile(rf"(?P<name>{_NAME})(?:{_TARGET})?")
NAME_PATTERN, DIGEST_PATTERN = f"^{_NAME}$", f"^{_DIGEST}$"  # as JSON schemas and browsers read them
ALIAS_PATTERN = f"^{_ALIAS}$".replace(r"\Z", "$")
REFERENCE_PATTERN = re.sub(r"\?P<\w+>", "?:", f"^{_REFERENCE.pattern}$").replace(r"\Z", "$")
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_WORDS = "lowercase letters, digits and . _ - inside, 96 at most"


@dataclass(frozen=True, slots=True)
class Reference:
    """One of `name`, `name:version`, `name@alias`, `name@digest`. `str()` gives back what `parse` read."""

    name: str
    version: int | None = None
    alias: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Read a reference. Raises InvalidReference with the accepted forms."""
        found = _REFERENCE.fullmatch(text)
        if not found:
            raise InvalidReference(
                f"'{text}' is not a reference: expected name, name:3, name@alias or name@sha256:<64 hex digits> "
                f"(a name is {_WORDS}, with at most one 'namespace/' in front; an alias is not a number)"
            )
        version = found["version"]
        return cls(found["name"], int(version) if version else None, found["alias"], found["digest"])

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.name}:{self.version}"
        target = self.alias or self.digest
        return f"{self.name}@{target}" if target else self.name


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository on the Hugging Face Hub, at a revision (branch, tag or commit) or at its main branch."""

    repo_id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubReference":
        """Read `hf://owner/repo[@revision]`. Raises InvalidReference."""
        found = _HUB.fullmatch(text)
        if not found:
            raise InvalidReference(
                f"'{text}' is not a Hub reference: expected hf://owner/repo or hf://owner/repo@revision"
            )
        return cls(found["repo"], found["revision"])

    def __str__(self) -> str:
        return f"hf://{self.repo_id}" + (f"@{self.revision}" if self.revision else "")


def check_name(text: str) -> str:
    """A bare adapter name, as it came. Raises InvalidReference."""
    if not re.fullmatch(_NAME, text):
        raise InvalidReference(f"'{text}' is not an adapter name: {_WORDS}, with at most one 'namespace/' in front")
    return text


def check_alias(text: str) -> str:
    """A bare alias, as it came. Raises InvalidReference."""
    if not re.fullmatch(_ALIAS, text):
        raise InvalidReference(f"'{text}' is not an alias: {_WORDS}, and not a number")
    return text


def check_tag(text: str) -> str:
    """A tag, as it came. Raises InvalidReference."""
    if not re.fullmatch(_WORD, text):
        raise InvalidReference(f"'{text}' is not a tag: {_WORDS}")
    return text


def check_digest(text: str) -> str:
    """A `sha256:<64 hex digits>`, as it came. Raises InvalidReference."""
    if not re.fullmatch(_DIGEST, text):
        raise InvalidReference(f"'{text}' is not a digest: expected sha256:<64 hex digits>")
    return text


def parse_version(text: str) -> tuple[str, int]:
    """Read `name:3` into its two parts. Raises InvalidReference."""
    ref = Reference.parse(text)
    if ref.version is None:
        raise InvalidReference(f"'{text}' names no version by its number: expected for instance {ref.name}:3")
    return ref.name, ref.version


def parse_alias(text: str) -> tuple[str, str]:
    """Read `name@alias` into its two parts. Raises InvalidReference."""
    ref = Reference.parse(text)
    if ref.alias is None:
        raise InvalidReference(f"'{text}' names no alias: expected for instance {ref.name}@production")
    return ref.name, ref.alias
