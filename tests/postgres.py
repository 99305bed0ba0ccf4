"""Runs PostgreSQL for tests: a private cluster on a free port, from Debian's package; removed at the end.

PostgreSQL refuses root: then the cluster is run by the package's own user, `postgres`.
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psycopg
from psycopg import sql

APT = "apt-get install -y postgresql"
PREFIX = "loraplex-postgres-"
# A cluster of tests is thrown away: nothing is flushed, and 200 connections suffice for 50 processes.
SETTINGS = {"fsync": "off", "max_connections": "200", "shared_buffers": "32MB", "log_min_messages": "fatal"}


@dataclass(frozen=True)
class Cluster:
    """A running cluster. Each `make` makes a database of its own; `password` is in every URL."""

    programs: Path
    folder: Path
    port: int
    password: str
    _number: Iterator[int]

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/{database}"

    def make(self, template: str = "template0") -> str:
        """A new database, as `template` is; returns its URL."""
        name = f"test_{next(self._number)}"
        self.execute("CREATE DATABASE {} TEMPLATE {}", name, template)
        return self.url(name)

    def drop(self, url: str) -> None:
        self.execute("DROP DATABASE {} WITH (FORCE)", url.rpartition("/")[2])

    def execute(self, statement: str, *names: str) -> None:
        with psycopg.connect(self.url(), autocommit=True) as db:
            db.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    def control(self, *arguments: str) -> None:
        """`pg_ctl`: start, stop, restart."""
        _run(self.programs / "pg_ctl", "-D", self.folder / "data", "-w", "-s", *arguments)

    def start(self) -> None:
        options = " ".join(f"-c {key}={value}" for key, value in SETTINGS.items())
        here = f"-c port={self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder}"
        self.control("-l", str(self.folder / "log"), "-o", f"{here} {options}", "start")

    def stop(self) -> None:
        self.control("-m", "immediate", "stop")


def programs() -> Path | None:
    """Where initdb and pg_ctl are: Debian's newest release, else the PATH's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@contextmanager
def cluster(programs: Path) -> Iterator[Cluster]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    _end_orphans(programs)
    # pytest's own folder is closed to other users.
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir="/tmp"))
    running = Cluster(programs, folder, port, secrets.token_hex(8), count(1))
    (folder / "password").write_text(running.password)
    if os.geteuid() == 0:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")
    try:
        made = ("-D", folder / "data", "-U", "postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--no-sync")
        # Not the order of bytes, where the release has another: ours must not depend on it.
        order = ("--locale-provider=icu", "--icu-locale=en-US") if _release(programs) >= 15 else ()
        _run(programs / "initdb", *made, "--locale=C.UTF-8", *order, f"--pwfile={folder / 'password'}")
        running.start()
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder)


def _end_orphans(programs: Path) -> None:
    """Stop and remove the clusters of test runs that were killed."""
    for folder in Path("/tmp").glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and os.access(folder, os.W_OK):
            with suppress(subprocess.CalledProcessError):  # it runs no more
                _run(programs / "pg_ctl", "-D", folder / "data", "-w", "-s", "-m", "immediate", "stop")
            shutil.rmtree(folder, ignore_errors=True)  # another run may be at it, too


def _release(programs: Path) -> int:
    told = subprocess.run([programs / "initdb", "--version"], capture_output=True, text=True, check=True).stdout
    return int(told.split()[2].partition(".")[0])


def _run(*command: str | Path) -> None:
    root = ("setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups") if os.geteuid() == 0 else ()
    done = subprocess.run([*root, *command], cwd="/tmp", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    done.check_returncode()
