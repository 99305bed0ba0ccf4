"""The OpenAPI document is true: it has every route, and schemathesis finds no answer that it does not foresee."""

import hashlib
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from serving import serving
from starlette.routing import Route

from loraplex_registry.events import read_events, read_row
from loraplex_registry.http import STATUSES, create_app
from loraplex_registry.openapi import OPERATIONS, document
from loraplex_registry.registry import Registry

from .conftest import Adapter, make_receipt, served

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")


@pytest.fixture
def local(tmp_path, base):
    with Registry(tmp_path / "registry") as local:
        for seed in range(2):
            folder = Adapter(seed=seed).write(tmp_path / f"a{seed}", make_receipt(base))
            (folder / "README.md").write_text("words")
            local.push("quotes-tagger", folder, base=base)
        local.promote("quotes-tagger:1", "production")
        local.drafts.create("ns/begun", "ada")
        yield local


def test_every_route_is_told(local):
    routes = {
        (method, re.sub(r":\w+}", "}", route.path))
        for route in create_app(local).routes
        if isinstance(route, Route) and route.path.startswith("/v1/")
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert set(OPERATIONS) == routes


def test_the_document_stands_alone(local):
    with served(local) as url:
        told = httpx.get(f"{url}/v1/openapi.json").json()
    assert told == document(tuple(STATUSES.items()), told["info"]["version"])
    named = set(re.findall(r"#/components/schemas/(\w+)", str(told)))
    assert named <= set(told["components"]["schemas"])
    assert {"Version", "AliasMove", "Error"} <= set(told["components"]["schemas"])


def test_answers_are_as_told(local):
    """Each route asked so that it succeeds, the answer against the document's schema."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install 'loraplex[dev]'")
    version = local.resolve("quotes-tagger:1")
    digest, blob = version.digest, f"sha256:{local.manifest(version.digest).files[0].sha256}"
    new = "sha256:" + hashlib.sha256(b"new").hexdigest()
    named = {"ref": "quotes-tagger:2"}
    asked = [
        ("GET", "/v1/openapi.json", {}, {}),
        ("GET", "/v1/adapters", {}, {"params": {"limit": 1}}),
        ("GET", "/v1/adapters/{name}/versions", {"name": "quotes-tagger"}, {"params": {"limit": 1}}),
        ("GET", "/v1/aliases", {}, {}),
        ("GET", "/v1/drafts", {}, {"params": {"limit": 1}}),
        ("GET", "/v1/search", {}, {"params": {"q": "tag_f1>0 base:tiny", "limit": 1}}),
        ("GET", "/v1/resolve", {}, {"params": {"ref": f"quotes-tagger@{digest}"}}),
        ("GET", "/v1/history", {}, {"params": {"ref": "quotes-tagger@production"}}),
        ("GET", "/v1/audit", {}, {"params": {"name": "quotes-tagger", "limit": 1}}),
        ("GET", "/v1/verify", {}, {"params": {"ref": "quotes-tagger"}}),
        ("GET", "/v1/card", {}, {"params": {"ref": "quotes-tagger"}}),
        ("GET", "/v1/manifests/{digest}", {"digest": digest}, {}),
        ("GET", "/v1/blobs/{digest}", {"digest": blob}, {}),
        ("GET", "/v1/blobs/{digest}", {"digest": blob}, {"headers": {"Range": "bytes=1-2"}}),
        ("PUT", "/v1/blobs/{digest}", {"digest": new}, {"content": b"new"}),
        ("POST", "/v1/promote", {}, {"json": {"ref": "quotes-tagger:2", "to": "production", "require": ["rank=4"]}}),
        ("POST", "/v1/rollback", {}, {"json": {"ref": "quotes-tagger@production", "to": None}}),
        ("POST", "/v1/tag", {}, {"json": {"ref": "quotes-tagger", "add": ["nlp"]}}),
        ("POST", "/v1/delete", {}, {"json": named}),
        ("POST", "/v1/restore", {}, {"json": named | {"reason": "why"}}),
        ("POST", "/v1/unalias", {}, {"json": {"ref": "quotes-tagger@production"}}),
        ("POST", "/v1/gc", {}, {"json": {"dry_run": True}}),
    ]
    asked += [
        ("GET", "/v1/signatures", {}, {"params": {"digest": digest}}),
        ("POST", "/v1/protect", {}, {"json": {"ref": "quotes-tagger@production", "require": ["rank<=8"]}}),
        ("GET", "/v1/protections", {}, {}),
        ("GET", "/v1/approvals", {}, {"params": {"ref": "quotes-tagger"}}),
        ("POST", "/v1/unprotect", {}, {"json": {"ref": "quotes-tagger@production"}}),
        ("GET", "/v1/whoami", {}, {}),
        ("GET", "/v1/uploads/{digest}", {"digest": new}, {}),
        ("GET", "/v1/tokens", {}, {}),
    ]
    # These need a draft, an approver or a first token, or have no end.
    elsewhere = {
        "/v1/adapters/{name}/publish",
        "/v1/adapters/{name}/discard",
        "/v1/watch",
        "/v1/approve",
        "/v1/tokens/revoke",
    }
    assert {path for _, path, *_ in asked} == {path for _, path in OPERATIONS} - elsewhere
    with served(local) as url:
        told = schemathesis.openapi.from_url(f"{url}/v1/openapi.json")
        for method, path, parts, options in asked:
            answer = httpx.request(method, url + path.format(**parts), **options)
            assert answer.is_success, (method, path, answer.text)
            told[path][method].validate_response(answer)


def test_the_watch_answers_as_told(local):
    """Its stream, read as far as the first move, and every refusal that it has of its own."""
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install 'loraplex[dev]'")
    app = create_app(local, {"secret": "ada"})
    known = {"Authorization": "Bearer secret"}
    with serving(app) as url, httpx.Client(base_url=url, headers=known) as web:
        told = schemathesis.openapi.from_url(f"{url}/v1/openapi.json", headers=known)["/v1/watch"]["GET"]
        read = b""
        with web.stream("GET", "/v1/watch", params={"ref": "quotes-tagger@production", "after": 0}) as stream:
            for chunk in stream.iter_bytes():
                read += chunk
                if b"data: " in read:
                    break
        begun = httpx.Response(stream.status_code, headers=stream.headers, content=read, request=stream.request)
        begun.elapsed = timedelta(0)
        told.validate_response(begun)
        assert begun.headers["content-type"].partition(";")[0] == "text/event-stream"
        start, move = read_events([read])
        assert (start.id, read_row(move)[1]) == ("0", local.history("quotes-tagger", "production")[0])
        refused = [web.get("/v1/watch", params={key: value}) for key, value in WATCHES_REFUSED]
        refused.append(httpx.get(f"{url}/v1/watch"))
        app.state.watchers.most = 0
        refused.append(web.get("/v1/watch"))
        assert [answer.status_code for answer in refused] == [400, 400, 400, 404, 400, 401, 503]
        for answer in refused:
            told.validate_response(answer)


WATCHES_REFUSED = [("after", "-1"), ("after", "x"), ("after", "7"), ("ref", "nothing"), ("ref", "quotes-tagger:1")]


@pytest.mark.skipif(not SCHEMATHESIS.exists(), reason="needs schemathesis: pip install 'loraplex[dev]'")
def test_schemathesis_finds_nothing_that_is_not_told(local, tmp_path):
    """Requests that fit the document and requests that do not, against a server with versions in it.

    Not asked: watch, whose answer has no end, see above. A request that fits may be refused: that a name is known, or
    a query can be read, is more than a schema says.
    """
    with served(local) as url:
        command = [SCHEMATHESIS, "run", f"{url}/v1/openapi.json", "--exclude-path", "/v1/watch", "--no-color"]
        command += ["--phases", "examples,coverage,fuzzing", "--exclude-checks", "positive_data_acceptance"]
        command += ["--max-examples", "15", "--generation-deterministic", "--max-time", "30", "--no-shrink"]
        command += ["--warnings", "off"]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout[-8000:]
