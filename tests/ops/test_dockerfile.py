"""The Dockerfile: a linter's view, and what it promises to those who run the images."""

import json
import re
import shutil
import subprocess
import sysconfig
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

EXTRA = "pip install 'loraplex[ops]'"


@pytest.fixture(scope="module")
def instructions(root: Path) -> list[tuple[str, str, str]]:
    """(stage, keyword, rest) of every instruction, with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (root / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stage, found = "", []
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            stage = rest.rpartition(" AS ")[2]
        found.append((stage, keyword, re.sub(r"\s+", " ", rest).strip()))
    return found


def in_stage(instructions: list[tuple[str, str, str]], stage: str, keyword: str) -> list[str]:
    return [rest for at, key, rest in instructions if (at, key) == (stage, keyword)]


def test_hadolint_has_no_findings(root: Path):
    linter = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    if linter is None:
        pytest.skip(EXTRA)
    command = [linter, "--no-color", "--failure-threshold=ignore", "--format=json", str(root / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (json.loads(done.stdout or "null"), done.stderr) == ([], "")


@pytest.mark.parametrize(
    ("target", "command", "port"), [("server", ["loraplex", "serve"], 8000), ("registry", ["registry", "serve"], 8100)]
)
def test_each_target_runs_its_command(
    instructions: list[tuple[str, str, str]], target: str, command: list[str], port: int
):
    (entrypoint,) = in_stage(instructions, target, "ENTRYPOINT")
    assert json.loads(entrypoint) == [*command, "--host", "0.0.0.0"]  # the exec form: signals reach the program itself
    assert in_stage(instructions, target, "EXPOSE") == [str(port)]
    (check,) = in_stage(instructions, target, "HEALTHCHECK")
    assert f"http://127.0.0.1:{port}/health" in check
    assert re.search(r"CMD \[", check)


def test_the_programs_run_as_a_numeric_user_that_is_not_root(instructions: list[tuple[str, str, str]]):
    (user,) = in_stage(instructions, "runtime", "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # numeric: runAsNonRoot can check it
    for target in ("server", "registry"):
        assert in_stage(instructions, target, "USER") == []
        (base,) = in_stage(instructions, target, "FROM")
        assert base.startswith("runtime ")


def test_the_registry_image_has_no_torch(instructions: list[tuple[str, str, str]]):
    for stage in ("registry-environment", "registry"):
        assert all("torch" not in rest and "serve" not in rest for rest in in_stage(instructions, stage, "RUN"))


def test_both_images_can_use_a_database_and_an_object_store(instructions: list[tuple[str, str, str]], root: Path):
    (installing,) = in_stage(instructions, "registry-environment", "RUN")
    (extras,) = re.findall(r'"\$\{wheel\}\[(.*?)\]"', installing)
    assert {"postgres", "object-store"} <= set(extras.split(","))
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert [rest for rest in in_stage(instructions, "server-environment", "FROM") if "registry-environment" in rest]


def test_every_copied_path_exists_and_is_in_the_build_context(instructions: list[tuple[str, str, str]], root: Path):
    stages = {stage for stage, _, _ in instructions}
    lines = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    allowed = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert lines[0] == "*"
    copied = set()
    for rest in (rest for _, keyword, rest in instructions if keyword == "COPY"):
        if source := re.match(r"--from=(\S+) ", rest):
            assert source[1] in stages, rest
            continue
        for path in rest.split()[:-1]:
            assert (root / path).exists(), f"COPY {rest}: there is no {path}"
            assert any(fnmatch(path, pattern) or path.startswith(f"{pattern}/") for pattern in allowed), path
            copied.add(path)
    assert {path.split("/")[0] for path in copied} == set(allowed)  # and nothing more is sent to the builder


def test_the_wheel_gets_everything_that_hatch_packs(instructions: list[tuple[str, str, str]], root: Path):
    project = tomllib.loads((root / "pyproject.toml").read_text())
    copied = [path for rest in in_stage(instructions, "wheel", "COPY") for path in rest.split()[:-1]]
    needed = [*project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], project["project"]["readme"]]
    for path in [*needed, *project["project"]["license-files"]]:
        assert any(path == source or path.startswith(f"{source}/") for source in copied), path


def test_the_servers_kernels_are_built_where_they_are_copied_from_and_the_compiler_stays_behind(
    instructions: list[tuple[str, str, str]],
):
    building = in_stage(instructions, "server-environment", "RUN")
    (installed,) = (at for at, rest in enumerate(building) if "[serve" in rest)
    (built,) = (at for at, rest in enumerate(building) if "-m loraplex_server.kernels.native" in rest)
    assert installed < built
    assert re.search(r"apt-get install .*\bgcc\b.*\blibc6-dev\b", building[built])
    for stage in ("runtime", "server", "registry"):
        assert "apt-get" not in " ".join(in_stage(instructions, stage, "RUN"))
