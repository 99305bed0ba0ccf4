"""A small Hub for tests: one dataset repository of jsonl files, as much of the Hub's API as `datasets` asks for."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from serving import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

COMMIT = "c0ffee" * 6 + "c0ff"
_REVISIONS = ("main", COMMIT)


@contextmanager
def serve_dataset(repo: str, files: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The URL for HF_ENDPOINT; the only revision is `main`, which is COMMIT."""
    contents = {path: "".join(json.dumps(row) + "\n" for row in rows).encode() for path, rows in files.items()}

    def known(http: Request) -> bool:
        owner, name = http.path_params["owner"], http.path_params["name"]
        return f"{owner}/{name}" == repo and http.path_params.get("revision", "main") in _REVISIONS

    def entry(path: str) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(contents[path]), "oid": oid(path)}

    def oid(path: str) -> str:
        return hashlib.sha1(contents[path]).hexdigest()

    def missing() -> Response:
        headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
        return JSONResponse({"error": "Repository not found"}, 404, headers)

    def info(http: Request) -> Response:
        if not known(http):
            return missing()
        siblings = [{"rfilename": path} for path in contents]
        return JSONResponse({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def tree(http: Request) -> Response:
        if not known(http):
            return missing()
        inside = http.path_params.get("path", "")
        deep = http.query_params.get("recursive", "false").lower() == "true"
        prefix = f"{inside}/" if inside else ""
        below = [path for path in contents if path.startswith(prefix)]
        folders = sorted(
            {path.removeprefix(prefix).split("/")[0] for path in below if "/" in path.removeprefix(prefix)}
        )
        found = [entry(path) for path in below if deep or "/" not in path.removeprefix(prefix)]
        if not below:
            return JSONResponse({"error": "no such entry"}, 404, {"X-Error-Code": "EntryNotFound"})
        return JSONResponse(
            [{"type": "directory", "path": prefix + one, "oid": "0" * 40, "size": 0} for one in folders] + found
        )

    async def paths_info(http: Request) -> Response:
        if not known(http):
            return missing()
        form = await http.json() if "json" in http.headers.get("content-type", "") else await http.form()
        paths = form["paths"] if isinstance(form, dict) else form.getlist("paths")
        folders = {path.rpartition("/")[0] for path in contents}
        told = [entry(path) for path in paths if path in contents]
        told += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in paths if path in folders]
        return JSONResponse(told)

    def file(http: Request) -> Response:
        path = http.path_params["path"]
        if not known(http):
            return missing()
        if path not in contents:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{oid(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return Response(contents[path], headers=headers)

    at = "/api/datasets/{owner}/{name}"
    routes = [
        Route(at, info),
        Route(f"{at}/revision/{{revision}}", info),
        Route(f"{at}/tree/{{revision}}", tree),
        Route(f"{at}/tree/{{revision}}/{{path:path}}", tree),
        Route(f"{at}/paths-info/{{revision}}", paths_info, methods=["POST"]),
        Route("/datasets/{owner}/{name}/resolve/{revision}/{path:path}", file, methods=["GET", "HEAD"]),
    ]
    with serving(Starlette(routes=routes)) as url:
        yield url
