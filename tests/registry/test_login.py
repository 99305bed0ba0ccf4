"""login, logout and whoami: which token goes to which URL, and that it lies in a file of its owner's alone."""

import re
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraplex_registry.cli import cli
from loraplex_registry.credentials import keep_token, token_for
from loraplex_registry.errors import InvalidRequest, StoreUnavailable, Unauthorized
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry

from .conftest import served


@pytest.fixture
def local(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def secret(local) -> str:
    return local.tokens.create("ci", ["push"], "quotes-").secret


@pytest.fixture
def url(local, secret):
    with served(local) as url:
        yield url


def run(*arguments: object, typed: str | None = None):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=typed)


def kept(tmp_path) -> list[Path]:
    return [file for file in (tmp_path / "config").rglob("*") if file.is_file()]


@pytest.mark.parametrize("how", ["-", "given", "asked"])
def test_a_token_is_kept_and_used(url, secret, local, tmp_path, how):
    arguments = [] if how == "asked" else ["--token", secret if how == "given" else "-"]
    answer = run("login", f"{url}/", *arguments, typed=f"{secret}\n")
    assert (answer.exit_code, answer.stdout) == (0, f"logged in to {url} as ci: push of quotes-…\n")
    assert secret not in answer.output
    (file,) = kept(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    with RemoteRegistry(url) as registry:
        assert registry.whoami().name == "ci"
    assert run("--registry", url, "whoami").stdout == "ci: push of quotes-…\n"
    assert '"scopes": [\n    "push"\n  ]' in run("--registry", url, "whoami", "--format", "json").stdout
    assert run("logout", "--registry", url).stdout == f"logged out of {url}\n"
    assert kept(tmp_path) == []
    assert run("logout", url).stdout == f"there was no token for {url}\n"
    with RemoteRegistry(url) as registry, pytest.raises(Unauthorized):
        registry.whoami()


def test_a_token_the_server_does_not_know_is_not_kept(url, tmp_path):
    answer = run("login", url, "--token", "-", typed="lpx_wrong\n")
    assert (answer.exit_code, answer.stdout) == (1, "")
    assert answer.stderr == "error: a bearer token that this registry knows is needed\n"
    answer = run("login", "http://127.0.0.1:1", "--token", "-", typed="lpx_right\n")
    assert answer.stderr.startswith("error: the registry at http://127.0.0.1:1 does not answer")
    for typed in ("two words\n", "\n", "d\xe9j\xe0\n"):
        answer = run("login", url, "--token", "-", typed=typed)
        assert answer.stderr == (
            "error: what was given is no token, expected printable ASCII characters without spaces\n"
        )
    assert run("login", tmp_path).stderr == f"error: login is for a registry's URL, not {tmp_path}; give URL\n"
    assert run("login").stderr == "error: login is for a registry's URL, not the default folder; give URL\n"
    assert kept(tmp_path) == []


def test_the_environment_goes_first(url, secret, local, monkeypatch):
    other = local.tokens.create("ada", ["admin"], expires_seconds=3600)
    run("login", url, "--token", "-", typed=secret)
    monkeypatch.setenv("LORAPLEX_REGISTRY_TOKEN", other.secret)
    assert run("--registry", url, "whoami").stdout.startswith("ada: admin, until ")
    answer = run("login", url, "--token", "-", typed=secret)
    assert answer.stderr == "warning: LORAPLEX_REGISTRY_TOKEN is set, and is used instead\n"
    assert answer.stdout.startswith(f"logged in to {url} as ci")  # of the token that was given
    monkeypatch.setenv("LORAPLEX_REGISTRY_TOKEN", "no token")
    with pytest.raises(InvalidRequest, match="LORAPLEX_REGISTRY_TOKEN is no token") as caught:
        RemoteRegistry(url)
    assert "no token" in str(caught.value)


@pytest.mark.parametrize("token", [None, "lpx_secret"])
@pytest.mark.parametrize("where", ["http://", "http://[::1"])
def test_what_is_no_url_is_told_whoevers_the_token_is(monkeypatch, where, token):
    if token:
        monkeypatch.setenv("LORAPLEX_REGISTRY_TOKEN", token)
    with pytest.raises(InvalidRequest, match=re.escape(f"'{where}' is not a ")):
        RemoteRegistry(where)


def test_a_token_goes_only_to_its_own_url():
    keep_token("http://Example.org:80/one/", "lpx_secret")
    for same in ("http://example.org/one", "http://example.org:80/one/", "HTTP://EXAMPLE.ORG/one"):
        assert token_for(same) == "lpx_secret"
    for other in (
        "http://example.org",
        "http://example.org/one/two",
        "https://example.org/one",
        "http://example.org:81/one",
    ):
        assert token_for(other) is None


def test_a_file_that_others_can_read_is_refused(tmp_path):
    file = keep_token("http://example.org", "lpx_secret")
    file.chmod(0o640)
    with pytest.raises(StoreUnavailable, match=r"others can read the token in .* \(mode 640\), expected 600") as caught:
        token_for("http://example.org")
    assert "lpx_secret" not in str(caught.value)
    keep_token("http://example.org", "lpx_other")  # a new login mends it
    assert token_for("http://example.org") == "lpx_other"
    assert kept(tmp_path) == [file]


def test_whoever_has_the_folder_may_do_everything(local):
    answer = run("--registry", local.root, "whoami")
    assert answer.stdout.endswith(": admin\n")
