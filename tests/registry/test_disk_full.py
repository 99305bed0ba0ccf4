"""A disk that fills up at any moment of a push: a real one, small, in a mount namespace of the test's own."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from .conftest import Adapter

SPACE = ["unshare", "--map-root-user", "--mount"]
PAGE_BYTES = 4096
PUSH_UNTIL_FULL = """
import json, subprocess, sys
from pathlib import Path
from loraplex_registry.errors import StoreUnavailable
from loraplex_registry.registry import Registry
disk, base, small, large, *rooms = sys.argv[1:]
for pages in map(int, rooms):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
    with Registry(Path(disk) / "registry") as registry:
        registry.push("quotes-tagger", small, base=base)
        free = subprocess.run(["stat", "-fc", "%a", disk], check=True, capture_output=True, text=True)
        filler, said = Path(disk) / "filler", None
        filler.write_bytes(bytes(4096 * (int(free.stdout) - pages)))
        try:
            registry.push("quotes-tagger", large, base=base)
        except StoreUnavailable as error:
            said = str(error)
        versions, staged = len(registry.versions("quotes-tagger")), list(map(str, registry.store.staging.iterdir()))
        faults = list(map(str, registry.verify()))
        filler.unlink()
        again = str(registry.push("quotes-tagger", large, base=base))
        faults += map(str, registry.verify())
    print(json.dumps({"said": said, "versions": versions, "staged": staged, "again": again, "faults": faults}))
    subprocess.run(["umount", disk], check=True)
"""


def test_a_push_onto_a_full_disk_says_so_and_is_repeated_when_there_is_room(tmp_path, base):
    """With room for so many pages more: from none to all that a push needs, so that each of its writes fails once."""
    if not shutil.which("unshare") or subprocess.run([*SPACE, "true"], capture_output=True).returncode:
        pytest.skip(f"needs a mount namespace of its own: `{' '.join(SPACE)} true` must work here")
    disk = tmp_path / "disk"
    disk.mkdir()
    small, large = Adapter(seed=1).write(tmp_path / "small"), Adapter(rank=64, seed=2).write(tmp_path / "large")
    needed = sum(-(-file.stat().st_size // PAGE_BYTES) for file in large.iterdir())
    rooms = [*range(0, needed, 3), *range(needed, needed + 24)]
    done = subprocess.run(
        [*SPACE, sys.executable, "-c", PUSH_UNTIL_FULL, *map(str, (disk, base, small, large, *rooms))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = list(map(json.loads, done.stdout.splitlines()))
    for one in found:
        assert one["versions"] == (1 if one["said"] else 2)
        assert (one["staged"], one["faults"], one["again"]) == ([], [], "quotes-tagger:2")
    said = [one["said"] for one in found]
    assert "No space left on device" in said[0]
    assert any("database or disk is full" in words for words in said if words), "the row's turn came too"
    assert said[-1] is None, "at last there is room"
