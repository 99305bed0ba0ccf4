"""The plan of the house, kept true: who may import whom, and that decisions and libraries keep their distance."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {
    "loraplex_registry": "registry",
    "loraplex_server": "server",
    "loraplex_trainer": "trainer",
    "loraplex": "clients/python",
}
# Who may know whom among ours. The client loads the others lazily, inside functions, and so through strings only.
MAY_IMPORT = {
    "loraplex_registry": set(),
    "loraplex_server": {"loraplex_registry"},
    "loraplex_trainer": {"loraplex_registry", "loraplex_server"},
    "loraplex": set(),
}
WEB = {"starlette", "uvicorn", "httpx"}


def files(package: str) -> list[Path]:
    found = sorted((ROOT / HOMES[package] / package).rglob("*.py"))
    assert found
    return found


def imported(file: Path) -> set[str]:
    """Every absolute import of a file, dotted, wherever in the file it stands."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", HOMES)
def test_each_room_imports_only_whom_it_may(package):
    for file in files(package):
        ours = {name.partition(".")[0] for name in imported(file)} & HOMES.keys()
        assert ours <= MAY_IMPORT[package] | {package}, file


def test_the_registry_and_the_client_need_no_torch():
    for package in ("loraplex_registry", "loraplex"):
        for file in files(package):
            roots = {name.partition(".")[0] for name in imported(file)}
            assert not roots & {"torch", "transformers", "peft", "bitsandbytes"}, file


def test_the_engine_and_the_adapters_know_no_http():
    for file in files("loraplex_server"):
        if file.parent.name in ("engine", "adapters"):
            roots = {name.partition(".")[0] for name in imported(file)}
            assert not roots & WEB, file


def test_the_trainer_knows_the_engine_and_its_kernels_and_nothing_else_of_the_server():
    for file in files("loraplex_trainer"):
        server = {name for name in imported(file) if name.startswith("loraplex_server")}
        assert all(name.startswith(("loraplex_server.engine", "loraplex_server.kernels")) for name in server), file


@pytest.mark.parametrize("package", HOMES)
def test_every_file_opens_by_saying_what_it_owns(package):
    for file in files(package):
        source = file.read_text()
        assert not source.strip() or ast.get_docstring(ast.parse(source)), file
