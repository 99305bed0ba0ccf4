"""What makes a run this run: equal identities give equal weights, so a checkpoint is resumed only by its own run."""

import hashlib
from typing import Any

from loraplex_server.engine.model import Base
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import Split
from loraplex_trainer.encoding import template_file

# What may differ between a run and its resumption without changing a single weight.
_FREE_KEYS = (
    "output",
    "registry",
    "evaluation",
    "report_to",
    "logs",
    "push",
    "data.heldout",
    "training.distributed",
    "training.gradient_checkpointing",
    "training.save_every",
    "training.log_every_steps",
)


def run_identity(
    config: RunConfig, splits: dict[str, Split], base: Base, parent: dict[str, Any] | None
) -> dict[str, Any]:
    """The settings, data, base and parent that the weights follow from."""
    template = template_file(config.data)
    return {
        "config": settings_of(config.model_dump(mode="json")),
        "train_sha256": splits["train"].sha256,
        # What is only measured may change; what decides when to stop, or which step to keep, may not.
        "heldout_sha256": splits["heldout"].sha256 if config.training.evaluate_every else None,
        "chat_template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        "base_fingerprint": base.fingerprint,
        "quantization": base.quantization,
        "parent": parent,
    }


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys and values that the weights follow from. `config`: as JSON has it."""
    return {key: value for key, value in flat(config).items() if not _is_free(key)}


def difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first thing in which two identities differ, in words."""
    before, now = flat(theirs), flat(ours)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            return f"{key.removeprefix('config.')} was {before.get(key)!r} and is {now.get(key)!r} now"
    return None


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as dotted keys and their values."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
