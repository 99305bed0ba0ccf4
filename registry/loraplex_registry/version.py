"""The registry's answers: a Version, an AliasMove, a Fault and others. Plain data, the same from a folder or a URL."""

from dataclasses import dataclass, field
from datetime import datetime

from .manifest import BaseRef


@dataclass(frozen=True)
class Dataset:
    """What an adapter was trained or measured on: the split's name, the trainer's path to it, its sha256."""

    split: str
    path: str
    sha256: str | None = None
    examples: int | None = None


@dataclass(frozen=True)
class Template:
    """How the adapter wants to be asked: the prompt, what an answer is like, and the strings that end one.

    `form` is what its rows were (`messages`, `alpaca`, …); `chat` is the jinja text that writes a conversation.
    """

    prompt: str | None = None
    completion: str | None = None
    stop: tuple[str, ...] = ()
    form: str | None = None
    chat: str | None = None


@dataclass(frozen=True)
class Lineage:
    """Where an adapter comes from, as its receipt says. `run` is the run's name."""

    datasets: tuple[Dataset, ...] = ()
    run: str | None = None
    seed: int | None = None
    steps: int | None = None
    template: Template = Template()


@dataclass(frozen=True)
class Version:
    """One immutable adapter version. `digest` is its manifest's; `bytes` counts all its files; times are UTC."""

    name: str
    number: int
    digest: str
    base: BaseRef
    rank: int
    targets: tuple[str, ...]
    bytes: int
    metrics: dict[str, float]
    parent: str | None
    created_at: datetime
    created_by: str
    message: str
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    description: str = ""  # the first words of its card
    lineage: Lineage = Lineage()
    pushed: bool = field(default=False, compare=False)  # True only in the answer to the push that made it
    restored: bool = field(default=False, compare=False)  # True only in the answer to the push that brought it back

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"


@dataclass(frozen=True)
class AliasMove:
    """One row of the ledger, which `id` numbers across all aliases.

    `from_number` is None when the alias was new, `to_number` when it was removed.
    """

    name: str
    alias: str
    from_number: int | None
    to_number: int | None
    who: str
    at: datetime
    reason: str
    action: str = "promote"  # or "rollback", or "remove"
    id: int = 0
    moved: bool = field(default=True, compare=False)  # False in an answer when the alias was there already

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


@dataclass(frozen=True)
class Deletion:
    """One row of the ledger of deletions: a version was deleted, brought back, or purged by gc."""

    name: str
    number: int
    action: str  # "delete", "restore" or "purge"
    who: str
    at: datetime
    reason: str

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"


@dataclass(frozen=True)
class Act:
    """One line of the audit log. `subject` is what it was done to: `name:3`, or `name@alias` and where it went."""

    at: datetime
    who: str
    action: str  # push, promote, rollback, remove, delete, restore, purge, tag, untag
    subject: str
    reason: str


@dataclass(frozen=True)
class Collected:
    """What one gc removed, or would have: versions as `name:3`, blobs as a count and their bytes."""

    dry_run: bool
    deleted: tuple[str, ...]  # because they are older than those to keep; restorable until the grace is over
    purged: tuple[str, ...]  # deleted earlier, and now beyond restoring
    files: int
    bytes: int


@dataclass(frozen=True)
class Fault:
    """One damaged file of one version. `version` is `name:3`, `what` is missing, truncated: …, altered."""

    version: str
    path: str
    what: str


def previous_target(moves: list[AliasMove]) -> int | None:
    """Where a rollback goes: the target before the present one, as a browser's back button walks.

    1, 2, 3, back, back ends at 1: a second rollback does not return to the version the first one left. An alias that
    was removed goes back to where it pointed; what came after it had been removed goes back to before that.
    """
    trail: list[int | None] = []
    for move in moves:
        if trail and trail[-1] is None:
            trail.pop()
        if move.action == "rollback" and move.to_number in trail:
            while trail[-1] != move.to_number:
                trail.pop()
        else:
            trail.append(move.to_number)
    return trail[-2] if len(trail) > 1 else None
