"""Tokens: what each scope opens, what a prefix hides, and that no secret is kept or told twice; over a real server."""

import base64
import hashlib
import re
import sqlite3
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import httpx
import pytest
from click.testing import CliRunner
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from loraplex_registry.auth import OPEN, GuardedRoute
from loraplex_registry.cli import cli
from loraplex_registry.errors import (
    CorruptBlob,
    Forbidden,
    InvalidRequest,
    StoreUnavailable,
    Unauthorized,
    UnknownAdapter,
    UnknownToken,
)
from loraplex_registry.garbage import Marks
from loraplex_registry.http import create_app
from loraplex_registry.limited import LimitedRegistry
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry
from loraplex_registry.tokens import ADMIN, INCLUDES, Identity, NewToken

from .conftest import Adapter, make_receipt, served

STATIC = {"root-secret": "root"}


@pytest.fixture
def local(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def url(local):
    """A server of `local` that wants tokens."""
    with served(local, STATIC) as url:
        yield url


@pytest.fixture(params=["folder", "url"])
def admin(request, local):
    """The registry as who may do everything has it: in the folder, and over HTTP."""
    if request.param == "folder":
        yield local
        return
    with served(local, STATIC) as url, RemoteRegistry(url, "root-secret") as remote:
        yield remote


@pytest.fixture
def two(local, base, tmp_path):
    """quotes-a:1 and other:1, both in production; they share all but their weights."""
    for seed, name in enumerate(("quotes-a", "other")):
        local.push(name, Adapter(seed=seed).write(tmp_path / name, make_receipt(base)), base=base, message=name)
        local.promote(f"{name}:1", "production")
    return local


def client(url: str, secret: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"})


# --- making, listing, revoking ---


def test_a_token_is_made_listed_and_revoked(admin, local):
    made = admin.tokens.create("ci", ["push", "read", "push"], "quotes-", 3600)
    token = made.token
    assert re.fullmatch(r"lpx_[\w-]{43}", made.secret)  # 43 × 6 bits hold 256
    assert token.id == hashlib.sha256(made.secret.encode()).hexdigest()[:12]
    assert (token.name, token.scopes, token.prefix, token.state) == ("ci", ("read", "push"), "quotes-", "live")
    assert token.expires_at is not None
    assert abs(token.expires_at - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=1)
    other = admin.tokens.create("ada", ["admin"]).token
    assert admin.tokens.list() == [token, other]
    revoked = admin.tokens.revoke(token.id)
    assert (revoked.state, admin.tokens.list()) == ("revoked", [revoked, other])
    assert admin.tokens.revoke(token.id) == revoked
    with pytest.raises(UnknownToken, match="no token 'none'"):
        admin.tokens.revoke("none")
    assert [(act.action, act.subject, act.reason) for act in reversed(admin.audit())] == [
        ("token create", f"ci ({token.id})", "read, push of quotes-…"),
        ("token create", f"ada ({other.id})", "admin"),
        ("token revoke", f"ci ({token.id})", ""),
    ]
    assert len({act.who for act in admin.audit()}) == 1
    with closing(sqlite3.connect(local.root / "catalog.sqlite3")) as db:
        for change in ("UPDATE acts SET who = 'x'", "DELETE FROM acts"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(change)


@pytest.mark.parametrize(
    ("name", "scopes", "prefix", "seconds", "param"),
    [
        ("two words", ["read"], "", None, "name"),
        ("", ["read"], "", None, "name"),
        ("a\nb", ["read"], "", None, "name"),
        ("a" * 97, ["read"], "", None, "name"),
        ("ci", [], "", None, "scopes"),
        ("ci", ["write"], "", None, "scopes"),
        ("ci", ["read"], "Quotes", None, "prefix"),
        ("ci", ["read"], "%", None, "prefix"),
        ("ci", ["read"], "a/b/", None, "prefix"),
        ("ci", ["read"], "", 0, "expires_seconds"),
        ("ci", ["read"], "", 10**12, "expires_seconds"),
    ],
)
def test_tokens_that_cannot_be(admin, name, scopes, prefix, seconds, param):
    with pytest.raises(InvalidRequest) as caught:
        admin.tokens.create(name, scopes, prefix, seconds)
    assert caught.value.param == param
    assert "expected" in str(caught.value)
    assert admin.tokens.list() == []


def test_no_secret_is_kept_or_told_twice(two, url, tmp_path, caplog):
    with RemoteRegistry(url, "root-secret") as root:
        made = root.tokens.create("ci", ["push", "promote"])
        assert made.secret not in repr(made)
        assert made.secret not in repr(root.tokens.list()) + repr(root.audit()) + repr(
            root.tokens.revoke(made.token.id)
        )
    with client(url, made.secret) as revoked:
        assert made.secret not in revoked.get("/v1/adapters").text
    for file in two.root.rglob("*"):
        assert not file.is_file() or made.secret.encode() not in file.read_bytes()
        assert not file.is_file() or made.secret[4:].encode() not in file.read_bytes()
    assert made.secret not in caplog.text


def test_tokens_in_postgresql(tmp_path, database):
    with Registry(tmp_path / "registry", database=database) as local, served(local) as url:
        made = local.tokens.create("ci", ["push"], "quotes-", 3600)
        with RemoteRegistry(url, made.secret) as ci:
            assert ci.whoami() == made.token.identity
            assert local.tokens.revoke(made.token.id).state == "revoked"
            with pytest.raises(Unauthorized):
                ci.whoami()
        assert [act.action for act in local.audit()] == ["token revoke", "token create"]
        with pytest.raises(StoreUnavailable, match="the ledger of acts is append-only"), local.catalog.writing() as db:
            db.exec_driver_sql("DELETE FROM acts")


# --- who is let in ---


def test_the_first_token_closes_the_registry_for_good(two):
    with served(two) as url:
        with RemoteRegistry(url) as anyone:
            assert anyone.whoami() == Identity("http", (ADMIN,))
            made = anyone.tokens.create("ada", ["admin"])
            for ask in (anyone.list, anyone.whoami, anyone.tokens.list):
                with pytest.raises(Unauthorized, match="a bearer token that this registry knows is needed"):
                    ask()
        with RemoteRegistry(url, made.secret) as ada:
            assert ada.promote("other:1", "staging").who == "ada"
            ada.tokens.revoke(made.token.id)
            with pytest.raises(Unauthorized):
                ada.list()
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ready").status_code == 200
        assert httpx.get(f"{url}/v1/adapters").status_code == 401
    assert [version.name for version in two.list()] == ["other", "quotes-a"]  # the folder needs none


@pytest.mark.parametrize("given", [None, "Bearer", "Bearer wrong", "Basic {}", "{}", "Bearer {}x", "Bearer \xe9"])
def test_what_is_no_known_token_is_401(local, url, given):
    made = local.tokens.create("ci", ["admin"])
    headers = {} if given is None else {"Authorization": given.format(made.secret).encode("latin-1")}
    answer = httpx.get(f"{url}/v1/adapters", headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]["code"] == "unauthorized"
    assert made.secret not in answer.text


def test_an_expired_token_opens_nothing(local, url):
    made = local.tokens.create("ci", ["read"], expires_seconds=1)
    with RemoteRegistry(url, made.secret) as ci:
        assert ci.whoami() == Identity("ci", ("read",), "", made.token.expires_at)
        time.sleep(1.1)
        with pytest.raises(Unauthorized):
            ci.list()
    assert local.tokens.list()[0].state == "expired"


def test_every_route_needs_a_scope_and_is_held_to_it(local):
    """There is no route without one, and each refuses whoever lacks it, before it reads anything."""
    needs = {}
    for route in create_app(local, STATIC).routes:
        assert isinstance(route, GuardedRoute)
        (method,) = route.methods - {"HEAD"}
        needs[f"{method} {route.path}"] = route.needs
    assert [key for key, scope in needs.items() if scope == OPEN] == ["GET /health", "GET /ready"]
    assert {*needs.values()} == {OPEN, *INCLUDES}
    secrets = {scope: local.tokens.create(scope, [scope]).secret for scope in INCLUDES}
    with served(local, STATIC) as url:
        for key, needed in needs.items():
            if needed == OPEN:
                continue
            method, path = key.split()
            path = re.sub(r"{\w+(:\w+)?}", "x", path)
            assert httpx.request(method, url + path, headers={}).status_code == 401, key
            for scope, secret in secrets.items():
                if key == "GET /v1/watch":
                    continue  # an endless answer; see below
                with client(url, secret) as http:
                    answer = http.request(method, path, params={"name": "x"})
                    lacking = needed not in INCLUDES[scope]
                    assert (answer.status_code == 403) == lacking, (key, scope)
                    assert not lacking or f"needs the scope '{needed}'" in answer.text
        with client(url, secrets["read"]) as http, http.stream("GET", "/v1/watch") as stream:
            assert stream.status_code == 200


def test_what_each_scope_allows(two, url, base, tmp_path):
    third = Adapter(seed=7).write(tmp_path / "third", make_receipt(base))

    def may(scope: str) -> dict[str, bool]:
        """Try all verbs with a token of one scope."""
        secret = two.tokens.create(scope, [scope]).secret
        with RemoteRegistry(url, secret) as registry:
            acts = {
                "read": lambda: registry.pull("other", tmp_path / f"pulled-{scope}"),
                "push": lambda: registry.push(f"by-{scope}", third, base=base),
                "promote": lambda: registry.promote("other:1", "staging"),
                "rollback": lambda: registry.rollback("other@production", to=1),
                "audit of one": lambda: registry.audit("other"),
                "audit of all": registry.audit,
                "delete": lambda: registry.delete(f"by-{scope}:1"),
                "restore": lambda: registry.restore(f"by-{scope}:1"),
                "verify": lambda: registry.verify("other"),
                "gc": lambda: registry.gc(dry_run=True),
                "tokens": registry.tokens.list,
            }
            found = {}
            for what, act in acts.items():
                try:
                    act()
                except Forbidden as error:
                    found[what] = False
                    assert f"the token '{scope}' has {scope}" in str(error)
                except Exception as error:  # allowed, but there is nothing to restore
                    found[what] = what == "restore" and "deleted" in str(error)
                else:
                    found[what] = True
        return found

    reading = {"read", "audit of one"}
    allowed = {
        "read": reading,
        "push": reading | {"push", "restore"},
        "promote": reading | {"promote", "rollback"},
        "admin": reading
        | {"push", "promote", "rollback", "audit of all", "delete", "restore", "verify", "gc", "tokens"},
    }
    for scope, expected in allowed.items():
        assert {what for what, could in may(scope).items() if could} == expected, scope


# --- what a prefix hides ---


@pytest.fixture
def limited(two, url):
    """The registry over HTTP with a token for quotes- that may do all that a token with a prefix can."""
    made: NewToken = two.tokens.create("team", ["admin"], "quotes-")
    with RemoteRegistry(url, made.secret) as registry, client(url, made.secret) as http:
        yield SimpleNamespace(registry=registry, http=http, secret=made.secret)


def test_other_names_are_not_there(two, limited):
    registry, other = limited.registry, two.resolve("other")
    assert [version.name for version in registry.list()] == ["quotes-a"]
    assert registry.aliases() == {"quotes-a": {"production": 1}}
    assert [version.name for version in registry.search()] == ["quotes-a"]
    assert registry.search("name:other") == []
    assert {act.subject for act in registry.audit()} == {"quotes-a:1", "quotes-a@production: 1"}
    assert registry.verify() == []
    for ask in (
        lambda: registry.resolve("other"),
        lambda: registry.resolve("other:1"),
        lambda: registry.resolve(f"other@{other.digest}"),
        lambda: registry.versions("other"),
        lambda: registry.history("other", "production"),
        lambda: registry.audit("other"),
        lambda: registry.verify("other:1"),
        lambda: registry.watch("other@production"),
    ):
        with pytest.raises(UnknownAdapter) as caught:
            ask()
        assert caught.value.nearest is None
    for name in ("othe", "other"):  # one that is, and one that is not, are told in the same words
        assert limited.http.get(f"/v1/resolve?ref={name}").json()["error"]["message"] == f"no adapter '{name}'"
    with pytest.raises(UnknownAdapter, match="'quotes-b'; the nearest is 'quotes-a'"):
        registry.resolve("quotes-b")


def test_the_limit_of_a_search_counts_only_what_is_seen(two, limited, base, tmp_path):
    for seed in range(3, 6):
        two.push("other", Adapter(seed=seed).write(tmp_path / f"more-{seed}"), base=base)
    assert [version.name for version in limited.registry.search(limit=1)] == ["quotes-a"]
    assert [act.subject for act in limited.registry.audit(limit=1)] == ["quotes-a@production: 1"]


def every_page(ask) -> list:
    """All rows, one to a page."""
    found, page = [], ask(1, None)
    while True:
        assert len(page.data) == 1
        found += page.data
        if not page.next:
            return found
        page = ask(1, page.next)


def test_pages_hold_only_what_is_seen(two, limited, base, tmp_path):
    """Other names lie before, between and after; an act of theirs, and a version, between any two of ours."""
    for number, name in enumerate(("a-first", "quotes-b", "quotes-between", "z-last", "quotes-a", "other", "quotes-a")):
        two.push(name, Adapter(seed=10 + number).write(tmp_path / f"page-{number}", make_receipt(base)), base=base)
        two.tag("other:1", [f"t{number}"])
    registry = limited.registry
    seen = ["quotes-a", "quotes-b", "quotes-between"]
    assert [version.name for version in every_page(registry.list_page)] == seen
    assert [str(one) for one in every_page(lambda *page: registry.versions_page("quotes-a", *page))] == [
        f"quotes-a:{number}" for number in (1, 2, 3)
    ]
    with pytest.raises(UnknownAdapter):
        registry.versions_page("other")
    for sort in ("-created", "name", "-tag_f1"):
        found = every_page(lambda *page, sort=sort: registry.search_page("", sort, *page))
        assert sorted(map(str, found)) == ["quotes-a:1", "quotes-a:2", "quotes-a:3", "quotes-b:1", "quotes-between:1"]
    acts = every_page(lambda *page: registry.audit_page(None, *page))
    assert acts == registry.audit()
    assert [act.subject for act in acts] == [
        "quotes-a:3",
        "quotes-a:2",
        "quotes-between:1",
        "quotes-b:1",
        "quotes-a@production: 1",
        "quotes-a:1",
    ]
    mine = every_page(lambda *page: registry.audit_page("quotes-a", *page))
    assert {act.subject.partition(":")[0].partition("@")[0] for act in mine} == {"quotes-a"}
    with pytest.raises(UnknownAdapter):
        registry.audit_page("other")
    for page in (registry.list_page(1), registry.search_page(limit=1), registry.audit_page(limit=1)):
        assert page.next
        assert b"other" not in base64.urlsafe_b64decode(page.next + "==")


def test_tags_and_cards_of_other_names_are_out_of_reach(two, limited, base, tmp_path):
    for name in ("quotes-card", "other-card"):
        folder = Adapter(seed=len(name)).write(tmp_path / name, make_receipt(base))
        (folder / "README.md").write_text(f"The card of {name}.")
        two.push(name, folder, base=base)
    other, own = two.tag("other-card:1", ["theirs"]), two.resolve("quotes-card")
    registry = limited.registry
    assert registry.tag("quotes-card:1", add=["nlp"]).tags == ("nlp",)
    assert registry.search("tag:theirs") == []
    for name in ("other-card:1", "other-nothing:1"):  # one that is, and one that is not
        with pytest.raises(Forbidden, match="is for names that begin with 'quotes-'"):
            registry.tag(name, add=["mine"], remove=["theirs"])
    assert two.resolve("other-card:1") == other
    assert registry.card(own.digest) == limited.http.get("/v1/card?ref=quotes-card").text == "The card of quotes-card."
    with pytest.raises(CorruptBlob, match="missing"):
        registry.card(other.digest)
    with pytest.raises(CorruptBlob, match="missing"):  # the server's own, whatever its client asks before
        LimitedRegistry(two, Identity("team", ("read",), "quotes-"), Marks(two.manifest)).card(other.digest)
    hidden, nothing = (limited.http.get(f"/v1/card?ref={name}") for name in ("other-card", "other-gone"))
    assert hidden.status_code == nothing.status_code == 404
    assert hidden.text == nothing.text.replace("other-gone", "other-card")


def test_the_ids_of_moves_do_not_tell_how_many_others_were_made(two, limited):
    """They are places among what is seen, in every answer alike, so that one can be watched from."""
    for number in range(5):
        two.promote("other:1", f"alias-{number}")
    registry = limited.registry
    made = [registry.promote("quotes-a:1", alias) for alias in ("staging", "canary")]
    two.promote("other:1", "again")
    made.append(registry.remove_alias("quotes-a@staging"))
    assert [move.id for move in made] == [2, 3, 4]
    assert registry.history("quotes-a", "staging") == [made[0], made[2]]
    assert registry.promote("quotes-a:1", "canary").id == 3  # where it was
    with registry.watch(after=1) as moves:
        assert [next(moves) for _ in made] == made
    with registry.watch("quotes-a@staging", after=2) as moves:
        assert next(moves) == made[2]
    with registry.watch() as moves:
        assert moves.after == 4
    with pytest.raises(InvalidRequest, match="after is 5, expected 0 to 4"):
        registry.watch(after=5)
    assert two.history("quotes-a", "canary")[0].id == 9  # in the folder, of all


def test_other_names_bytes_are_not_there_by_digest(two, limited, base, tmp_path):
    other, own = two.resolve("other"), two.resolve("quotes-a")
    assert limited.registry.pull("quotes-a", tmp_path / "own").digest == own.digest
    with pytest.raises(CorruptBlob, match="missing"):
        limited.registry.manifest(other.digest)
    hidden = limited.http.get(f"/v1/manifests/{other.digest}")
    nothing = limited.http.get("/v1/manifests/sha256:" + "0" * 64)
    assert (hidden.status_code, hidden.json()["error"]["code"]) == (
        nothing.status_code,
        nothing.json()["error"]["code"],
    )
    weights = next(entry for entry in two.manifest(other.digest).files if entry.path == "adapter_model.safetensors")
    answer = limited.http.get(f"/v1/blobs/sha256:{weights.sha256}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "digest_not_found")
    assert limited.http.get(f"/v1/blobs/{other.digest}").status_code == 404  # the manifest, as a blob
    for entry in two.manifest(own.digest).files:
        assert limited.http.get(f"/v1/blobs/sha256:{entry.sha256}").status_code == 200


def test_a_push_cannot_take_bytes_that_only_other_names_have(two, limited, base, tmp_path):
    """Naming a digest is not having its bytes: else a push would hand out what a read refuses."""
    sent = []
    pushed = limited.registry.push("quotes-b", tmp_path / "other", base=base, progress=sent.append)
    assert pushed.digest == two.resolve("other").digest
    weights = next(entry for entry in two.manifest(pushed.digest).files if entry.path == "adapter_model.safetensors")
    assert sum(sent) == weights.bytes  # these had to be uploaded; the rest quotes-a has too
    again = []
    limited.registry.push("quotes-c", tmp_path / "other", base=base, progress=again.append)
    assert again == []  # now it has them


def test_a_prefix_writes_to_no_other_name(two, limited, base, tmp_path):
    registry, before = limited.registry, two.audit("other")
    for act in (
        lambda: registry.push("other", tmp_path / "quotes-a", base=base),
        lambda: registry.push("nobody", tmp_path / "quotes-a", base=base),
        lambda: registry.promote("other:1", "staging"),
        lambda: registry.rollback("other@production", to=1),
        lambda: registry.delete("other:1"),
        lambda: registry.restore("other:1"),
    ):
        with pytest.raises(Forbidden, match="the token 'team' is for names that begin with 'quotes-', and"):
            act()
    for act in (registry.gc, registry.tokens.list, lambda: registry.tokens.create("x", ["admin"])):
        with pytest.raises(Forbidden, match="concerns all names"):
            act()
    assert two.audit("other") == before
    assert registry.promote("quotes-a:1", "staging").who == "team"
    assert registry.rollback("quotes-a@production", to=1).moved is False


def test_a_prefix_watches_only_its_names(two, limited):
    with limited.registry.watch() as moves:
        two.promote("other:1", "staging")
        two.promote("quotes-a:1", "staging")
        assert str(next(moves)) == "quotes-a@staging"
    with limited.registry.watch(after=0) as moves:
        assert [str(next(moves)), str(next(moves))] == ["quotes-a@production", "quotes-a@staging"]


def test_a_watch_ends_with_its_token(two, url):
    made = two.tokens.create("ci", ["read"])
    with RemoteRegistry(url, made.secret) as registry, registry.watch() as moves:
        two.promote("other:1", "staging")
        assert str(next(moves)) == "other@staging"
        two.tokens.revoke(made.token.id)
        two.promote("quotes-a:1", "staging")
        with pytest.raises(Unauthorized):
            next(moves)


def test_the_hubs_clients_see_only_a_prefixs_names(two, limited, url, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the Hub is one of our own here
    hub = HfApi(endpoint=url, token=limited.secret)
    assert hub.model_info("quotes-a").id == "quotes-a"
    for repo in ("other", "nothing"):
        with pytest.raises(RepositoryNotFoundError):
            hub.model_info(repo)
        with pytest.raises(RepositoryNotFoundError):
            hub.list_repo_refs(repo)
        with pytest.raises(RepositoryNotFoundError):
            list(hub.list_repo_tree(repo))
    answer = limited.http.get("/other/resolve/1/adapter_config.json")
    assert (answer.status_code, answer.headers["x-error-code"]) == (404, "RepoNotFound")


def test_uploads_of_the_hubs_clients_are_held_to_scopes_and_prefixes(two, limited, url):
    tag = "/api/models/quotes-a/tag/main"
    with client(url, two.tokens.create("pusher", ["push"]).secret) as http:
        assert http.get("/api/whoami-v2").json()["auth"]["accessToken"]["role"] == "write"
        refused = http.post(tag, json={"tag": "staging"})  # it would move an alias
        assert refused.status_code == 403
        assert "needs the scope 'promote'" in refused.headers["x-error-message"]
        assert http.post(tag, json={"tag": "v1"}).status_code == 201
        assert http.post("/api/repos/create", json={"name": "made", "organization": "other"}).status_code == 200
    assert two.aliases()["quotes-a"] == {"production": 1}
    with client(url, two.tokens.create("both", ["push", "promote"]).secret) as http:
        assert http.post(tag, json={"tag": "staging"}).status_code == 201
    with client(url, two.tokens.create("reader", ["read"]).secret) as http:
        assert http.get("/api/whoami-v2").json()["auth"]["accessToken"]["role"] == "read"
        for method, path in (("POST", "/api/repos/create"), ("DELETE", "/api/repos/delete"), ("POST", tag)):
            assert http.request(method, path, json={"tag": "x"}).status_code == 403
    draft = {"name": "made", "organization": "other"}
    hidden = [
        limited.http.get("/api/models/other/made"),
        limited.http.get("/api/models/other/made/tree/main"),
        limited.http.post("/api/models/other/made/preupload/main", json={"files": []}),
        limited.http.post("/api/models/other/made/commit/main", content=b"{}"),
        limited.http.post("/api/models/other/made/tag/main", json={"tag": "v1"}),
    ]
    assert [(answer.status_code, answer.headers["x-error-code"]) for answer in hidden] == [(404, "RepoNotFound")] * 5
    assert limited.http.post("/api/repos/create", json=draft).status_code == 403
    assert limited.http.request("DELETE", "/api/repos/delete", json=draft).status_code == 403
    assert limited.http.post("/v1/adapters/other/made/publish", json={}).status_code == 403
    assert limited.http.post("/v1/adapters/other/made/discard").status_code == 403
    assert two.drafts.find("other/made")
    own = {"name": "made", "organization": "quotes-ns"}
    assert limited.http.post("/api/repos/create", json=own).status_code == 200
    assert limited.http.get("/api/models/quotes-ns/made").status_code == 200
    assert limited.http.request("DELETE", "/api/repos/delete", json=own).status_code == 200


# --- the command ---


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(params=["folder", "url"])
def where(request, local, monkeypatch):
    if request.param == "folder":
        yield str(local.root)
        return
    monkeypatch.setenv("LORAPLEX_REGISTRY_TOKEN", "root-secret")
    with served(local, STATIC) as url:
        yield url


def test_the_command_prints_the_secret_once_to_stdout(where, local):
    answer = run("token", "create", "--name", "ci", "--scope", "push,promote", "--scope", "read", "--prefix", "quotes-",
                 "--expires", "90d", "--registry", where)  # fmt: skip
    assert (answer.exit_code, answer.exception) == (0, None)
    secret = answer.stdout.removesuffix("\n")
    (token,) = local.tokens.list()
    assert local.tokens.find(secret) == token
    assert answer.stderr.startswith(f"created ci ({token.id}): read, push, promote of quotes-…, until ")
    assert secret not in answer.stderr
    listed = run("--registry", where, "token", "list")
    assert secret not in listed.stdout
    row = listed.stdout.splitlines()[1]
    assert row.split()[:6] == [token.id, "ci", "read,", "push,", "promote", "of"]
    assert " live " in row
    assert run("--registry", where, "token", "revoke", token.id).stdout == f"revoked ci ({token.id})\n"
    assert '"state": "revoked"' in run("--registry", where, "token", "list", "--format", "json").stdout
    assert local.tokens.find(secret) is None


def test_mistakes_of_the_command_are_one_line(where):
    for arguments, said in (
        (("create", "--name", "ci", "--scope", "write"), "scopes holds 'write', expected read, push, promote, admin"),
        (("create", "--name", "c i", "--scope", "read"), "name is 'c i', expected letters"),
        (("revoke", "3f9c"), "no token '3f9c'"),
    ):
        answer = run("--registry", where, "token", *arguments)
        assert (answer.exit_code, answer.stdout) == (1, "")
        assert answer.stderr.startswith(f"error: {said}")
        assert answer.stderr.count("\n") == 1
    assert run("--registry", where, "token", "create", "--name", "ci").exit_code == 2
    assert (
        run("--registry", where, "token", "create", "--name", "c", "--scope", "read", "--expires", "9").exit_code == 2
    )
