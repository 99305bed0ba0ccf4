"""Every command of docs/registry.md, run as it is written, block after block, in one shell's world.

The world has what the page takes for granted: an adapter that was trained here, its base, and a Hub. Three things are
not taken from the page: installing, where the database and the bucket are, and that what serves runs beside the
commands after it.
"""

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import postgres
import psutil
import pytest
from serving import serving

from loraplex_registry.http import create_app
from loraplex_registry.registry import Registry

from .conftest import Adapter, make_base, make_receipt

PAGE = Path(__file__).parents[2] / "docs" / "registry.md"
BLOCKS = re.findall(r"^```(?:sh|console)\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)
TINYLLAMA = "models--TinyLlama--TinyLlama-1.1B-Chat-v1.0"
COMMIT = "ab" * 20
DATABASE = "postgresql://loraplex@db.example.com/loraplex"
STORE = "s3://adapters/team"
PORT, SERVER, SERVES = 8100, ".server", re.compile(r"^(\$ )?registry .*\bserve\b", flags=re.M)
WAIT = f"until (exec 3<>/dev/tcp/127.0.0.1/{PORT}) 2>/dev/null; do kill -0 $!; sleep 0.1; done"


@pytest.fixture
def hub(tmp_path):
    """Another registry, which the page takes for the Hub: it has owner/quotes-tagger, and knows the user's token."""
    base = make_base(tmp_path / "hub-base", seed=1)
    adapter = Adapter(seed=9, config={"base_model_name_or_path": "TinyLlama/TinyLlama-1.1B-Chat-v1.0"})
    with Registry(tmp_path / "hub") as registry:
        registry.push("owner/quotes-tagger", adapter.write(tmp_path / "hub-adapter"), base=base)
        with serving(create_app(registry, {"hf_secret": "owner"})) as url:
            yield url


@pytest.fixture
def world(tmp_path, hub):
    """A working folder, and the environment of its shell."""
    folder, home = tmp_path / "work", tmp_path / "home"
    base = make_base(tmp_path / "tiny")
    Adapter().write(folder / "adapters" / "quotes-tagger", make_receipt(base))
    cached = home / "hub" / TINYLLAMA
    make_base(cached / "snapshots" / COMMIT, seed=1)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    (folder / "models").mkdir()
    (folder / "models" / "tinyllama").symlink_to(base)
    (folder / "tokens").write_text("ada 3f9c5c7d1b6e4f0a8b2d\n")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(home),
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub,
        "HF_TOKEN": "hf_secret",
        "LORAPLEX_HOME": str(home / "loraplex"),
    }
    return folder, environment


def as_run(block: str) -> str:
    """The block for bash: prompts are not typed, and what serves runs beside what follows until the next one serves."""
    lines = []
    for line in block.splitlines():
        command = re.sub(r"\s+#.*", "", line.removeprefix("$ "))
        if SERVES.search(command):
            command = f"{command} > {SERVER}.log 2>&1 & echo $! > {SERVER}; {WAIT}"
        if not command.startswith("pip install"):
            lines.append(command)
    return "\n".join(lines)


def stop_server(folder: Path) -> None:
    if (file := folder / SERVER).exists():
        with suppress(psutil.NoSuchProcess):
            server = psutil.Process(int(file.read_text()))
            server.terminate()
            server.wait(10)
        file.unlink()


def test_the_commands_of_the_page(world, request):
    folder, environment = world
    with socket.socket() as probe:
        if not probe.connect_ex(("127.0.0.1", PORT)):
            pytest.skip(f"port {PORT}, which the page uses, is taken: stop what listens there")
    ran = 0
    try:
        for block in BLOCKS:
            if DATABASE in block:
                if not postgres.programs():
                    continue
                block = block.replace(DATABASE, request.getfixturevalue("database"))
            if STORE in block:
                block = block.replace(STORE, request.getfixturevalue("bucket"))
                environment |= {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
            if SERVES.search(block):
                stop_server(folder)
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", as_run(block)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
            ran += 1
    finally:
        stop_server(folder)
    assert ran >= 5, "the page has lost its commands"
