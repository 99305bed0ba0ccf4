"""Where a result was measured and how it is written down. Knows nothing of what was measured."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def machine() -> dict[str, Any]:
    """The machine in words and numbers: no host name, no user."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions that matter to speed."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


@dataclass
class Series:
    """What repeated runs of one system gave, in generated tokens per second."""

    name: str
    values: list[float]

    @property
    def median(self) -> float:
        """The number to quote."""
        return statistics.median(self.values)

    def ratio(self, other: "Series") -> float:
        """Median of the ratios run by run: machines drift, alternating runs drift together."""
        return statistics.median(a / b for a, b in zip(self.values, other.values, strict=True))


def write(name: str, title: str, lines: list[str], data: dict[str, Any], packages: Sequence[str] = PACKAGES) -> Path:
    """Write ``results/NAME-DATE.json`` and ``.md``; returns the latter's path."""
    now, where, used = datetime.now(UTC), machine(), versions(packages)
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{name}-{now:%Y-%m-%d}-{'gpu' if where['gpu'] else 'cpu'}"
    whole = {"date": now.isoformat(timespec="seconds"), "machine": where, "versions": used, **data}
    stem.with_suffix(".json").write_text(json.dumps(whole, indent=2) + "\n")
    device = where["gpu"] or f"{where['cpu']}, {where['cores']} cores, {where['threads']} threads"
    head = [f"# {title}", "", f"{now:%Y-%m-%d}, {device}; " + ", ".join(f"{k} {v}" for k, v in used.items()), ""]
    stem.with_suffix(".md").write_text("\n".join(head + lines) + "\n")
    return stem.with_suffix(".md")
