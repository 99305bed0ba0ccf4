"""Adapters from the Hub: the real huggingface_hub against a small server that speaks the Hub's protocol."""

import hashlib
import os
import subprocess
import sys

import pytest
from serving import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from loraplex_registry.registry import Registry

from .conftest import Adapter

COMMIT = "ab" * 20


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def hub_app(folder) -> Starlette:
    """The read side of the Hub for one repository, owner/adapter, whose main branch is at COMMIT."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    asked: list[str] = []

    def unknown(code: str) -> Response:
        return JSONResponse({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def info(request: Request) -> Response:
        if request.path_params["repo"] != "adapter":
            return unknown("RepoNotFound")
        if request.path_params["revision"] not in ("main", COMMIT):
            return unknown("RevisionNotFound")
        siblings = [{"rfilename": name, "size": len(data), "blobId": git_id(data)} for name, data in files.items()]
        return JSONResponse({"id": "owner/adapter", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    def tree(request: Request) -> Response:
        sizes = {name: len(data) for name, data in files.items()}
        return JSONResponse([{"type": "file", "path": name, "size": sizes[name], "oid": "0" * 40} for name in files])

    def resolve(request: Request) -> Response:
        name = request.path_params["file"]
        if name not in files:
            return unknown("EntryNotFound")
        asked.append(name)
        headers = {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return Response(files[name], headers=headers, media_type="application/octet-stream")

    app = Starlette(
        routes=[
            Route("/api/models/owner/{repo}/revision/{revision}", info),
            Route("/api/models/owner/{repo}", lambda request: info(_at_main(request))),
            Route("/api/models/owner/adapter/tree/{revision}", tree),
            Route("/owner/adapter/resolve/{revision}/{file:path}", resolve, methods=["GET", "HEAD"]),
        ]
    )
    app.state.asked = asked
    return app


def _at_main(request: Request) -> Request:
    request.path_params["revision"] = "main"
    return request


@pytest.fixture
def hub(base, tmp_path):
    """(app, push): push("hf://…", …) runs the command in a process of its own, which reads HF_ENDPOINT as it starts."""
    folder = Adapter().write(tmp_path / "upstream")
    (folder / "README.md").write_text("# an adapter")
    (folder / "training_args.bin").write_bytes(b"a pickle that is never fetched")
    app = hub_app(folder)
    with serving(app) as url:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "LORAPLEX_REGISTRY": str(tmp_path / "registry"),
        }

        def push(*arguments: str, **changed: str):
            command = [sys.executable, "-c", "from loraplex_registry.cli import main; main()", "push", *arguments]
            env = environment | changed
            return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

        yield app, push


def test_push_from_the_hub_records_the_commit(hub, base, tmp_path):
    app, push = hub
    done = push("quotes-tagger", "hf://owner/adapter@main", "--base", str(base), "-m", "from a friend")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pushed quotes-tagger:1 (")
    with Registry(tmp_path / "registry") as registry:
        version = registry.resolve("quotes-tagger:1")
        assert version.message == f"from a friend (hf://owner/adapter@{COMMIT})"
        files = [entry.path for entry in registry.manifest(version.digest).files]
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert "training_args.bin" not in app.state.asked
    assert push("quotes-tagger", "hf://owner/adapter", "--base", str(base)).stdout.startswith("already quotes-tagger:1")


@pytest.mark.parametrize("ref", ["hf://owner/nothing", "hf://owner/adapter@no-such-branch"])
def test_what_the_hub_does_not_have(hub, ref):
    done = hub[1]("x", ref)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {ref} cannot be fetched: ")
    assert done.stderr.count("\n") == 1


NOBODY = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}  # port 9 takes no connection


def test_a_hub_that_does_not_answer(hub):
    done = hub[1]("x", "hf://owner/adapter", **NOBODY)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: hf://owner/adapter cannot be fetched: "), done.stderr
    assert done.stderr.count("\n") == 1
