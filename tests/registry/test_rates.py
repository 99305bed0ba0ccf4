"""Rate limits: buckets on a clock of the test's own, and a real server that says when to come back."""

import time

import httpx
import pytest
from click.testing import CliRunner
from serving import serving
from starlette.responses import PlainTextResponse

from loraplex_registry.auth import _address
from loraplex_registry.cli import cli
from loraplex_registry.errors import InvalidRequest, RateLimited, Unauthorized, UnknownAdapter
from loraplex_registry.http import create_app
from loraplex_registry.patience import Patience
from loraplex_registry.rates import Buckets, Rate
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry

from .conftest import Adapter, make_receipt


@pytest.fixture
def local(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


def limited(registry: Registry, rate: str, tokens: dict[str, str] | None = None):
    return serving(create_app(registry, tokens, rate=Rate.parse(rate)))


# --- buckets ---


def test_a_bucket_empties_and_fills_evenly():
    now = 100.0
    buckets = Buckets(Rate(60, 60), clock=lambda: now)
    assert [buckets.take("a") for _ in range(60)] == [0] * 60
    assert buckets.take("a") == buckets.take("a") == pytest.approx(1)  # asking in vain does not put it off
    assert buckets.take("b") == 0
    now += 0.25
    assert buckets.take("a") == pytest.approx(0.75)
    now += 0.75
    assert (buckets.take("a"), buckets.take("a")) == (0, pytest.approx(1))
    now += 3600
    assert [buckets.take("a") for _ in range(60)] == [0] * 60  # it holds no more than that
    assert buckets.take("a") > 0


def test_buckets_are_bounded_and_the_longest_unused_is_forgotten():
    buckets = Buckets(Rate(1, 3600), most=3)
    for key in ("a", "b", "c", "a"):
        buckets.take(key)
    buckets.take("d")
    assert len(buckets) == 3
    assert buckets.take("a") > 0
    assert buckets.take("b") == 0  # forgotten, so full
    for key in range(1000):
        buckets.take(str(key))
    assert len(buckets) == 3


@pytest.mark.parametrize(("text", "rate"), [("600/min", Rate(600, 60)), ("1/s", Rate(1, 1)), ("5/h", Rate(5, 3600))])
def test_a_rate_is_read(text, rate):
    assert (Rate.parse(text), str(rate)) == (rate, text)


@pytest.mark.parametrize("text", ["", "600", "0/min", "-1/s", "1.5/s", "600/day", "600/minute", "9999999999/s", "6 /s"])
def test_a_rate_that_cannot_be(text, tmp_path):
    with pytest.raises(InvalidRequest, match="expected a number and /s, /min or /h, as 600/min"):
        Rate.parse(text)
    if text:
        answer = CliRunner().invoke(cli, ["--registry", str(tmp_path / "r"), "serve", "--rate-limit", text])
        assert (answer.exit_code, answer.stderr.startswith(f"error: the rate limit is '{text}'")) == (1, True)


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("127.0.0.1", 1), "127.0.0.1"),
        (("2001:db8:1:2:3::4", 1), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::5", 1), "2001:db8:1:2::/64"),
        (("socket", 0), "socket"),
        (None, "unknown"),
    ],
)
def test_an_asker_is_an_address_or_a_network(client, address):
    assert _address({"client": client}) == address


# --- over HTTP ---


def test_each_token_has_its_own_limit(local):
    first, second = (local.tokens.create(name, ["read"]).secret for name in ("ci", "ci"))  # one name, two tokens
    with limited(local, "3/h", {"root": "root"}) as url:
        with RemoteRegistry(url, first) as registry:
            for _ in range(3):
                registry.list()
            with pytest.raises(RateLimited, match=r"more than 3/h requests; try again in \d+ s") as caught:
                registry.list()
            assert 1190 <= caught.value.retry_after_seconds <= 1200
        for secret in (second, "root"):
            with RemoteRegistry(url, secret) as registry:
                assert registry.list() == []
        answer = httpx.get(f"{url}/v1/adapters", headers={"Authorization": f"Bearer {first}"})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (429, "rate_limited", "rate_limit_error")
        assert int(answer.headers["retry-after"]) == error["detail"]["retry_after_seconds"]
        assert first not in answer.text
        told = httpx.get(f"{url}/api/whoami-v2", headers={"Authorization": f"Bearer {first}"})
        assert (told.status_code, "retry-after" in told.headers) == (429, True)  # in the Hub's shape too
        assert {httpx.get(f"{url}/health").status_code for _ in range(5)} == {200}


def test_wrong_tokens_and_none_count_for_the_address(local):
    with limited(local, "3/h") as url, RemoteRegistry(url) as anyone:
        for _ in range(3):
            anyone.list()
        with pytest.raises(RateLimited):
            anyone.list()
    made = local.tokens.create("ci", ["read"])
    with limited(local, "3/h") as url:
        for number in range(3):
            with RemoteRegistry(url, f"wrong-{number}") as wrong, pytest.raises(Unauthorized):
                wrong.list()
        with RemoteRegistry(url, "wrong-3") as wrong, pytest.raises(RateLimited):
            wrong.list()
        with RemoteRegistry(url, made.secret) as registry:
            assert registry.list() == []


class Throttled:
    """Refuses every request once as a proxy does, with words of its own, and then lets the same one through."""

    def __init__(self, app, retry_after: str = "0", always: bool = False) -> None:
        self.app, self.retry_after, self.always = app, retry_after, always
        self.refused: list[str] = []
        self._due: set[str] = set()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = f"{scope['method']} {scope['path']}"
        if asked in self._due and not self.always:
            self._due.remove(asked)
            await self.app(scope, receive, send)
            return
        self._due.add(asked)
        self.refused.append(asked)
        answer = PlainTextResponse("slow down", 429, {"Retry-After": self.retry_after})
        await answer(scope, receive, send)


def test_every_call_waits_for_its_turn(local, base, tmp_path):
    throttled, told = Throttled(create_app(local)), []
    folder = Adapter().write(tmp_path / "adapter", make_receipt(base))
    (folder / "README.md").write_text("A card.")
    (folder / "large.npy").write_bytes(bytes(range(256)) * 8192)  # over what is sent anew after a cut
    with serving(throttled) as url, RemoteRegistry(url, patience=Patience(told=told.append)) as registry:
        with registry.watch() as moves:
            assert registry.push("quotes-tagger", folder, base=base).pushed
            assert registry.promote("quotes-tagger:1", "production").moved
            assert str(next(moves)) == "quotes-tagger@production"
        version = registry.pull("quotes-tagger", tmp_path / "pulled")
        assert registry.card(version.digest) == "A card."
        assert [str(one) for one in registry.list()] == ["quotes-tagger:1"]
        assert registry.signatures.of(version.digest) == []
        assert registry.tokens.list() == []
        with pytest.raises(UnknownAdapter):
            registry.resolve("nothing")
    assert local.verify() == []
    assert {"GET /v1/watch", "POST /v1/adapters/quotes-tagger/versions", "GET /v1/resolve"} <= {*throttled.refused}
    assert sum(asked.startswith("PUT /v1/blobs/") for asked in throttled.refused) == 5
    assert len(told) == len(throttled.refused)
    assert str(told[0]) == "more than the allowed requests; try again in 0 s"


def test_a_wait_has_an_end(local):
    with serving(Throttled(create_app(local), "1", always=True)) as url:
        with RemoteRegistry(url, patience=Patience(1.5)) as registry:
            began = time.monotonic()
            with pytest.raises(RateLimited, match="waited 1 s in vain; try again in 1 s"):
                registry.list()
            assert 1 <= time.monotonic() - began < 1.5
        with RemoteRegistry(url, patience=Patience(0.5)) as registry:
            began = time.monotonic()
            for ask in (registry.list, registry.watch):
                with pytest.raises(RateLimited, match="more than the allowed requests; try again in 1 s"):
                    ask()  # there is no use in waiting for less than is asked
            assert time.monotonic() - began < 0.5
    throttled = Throttled(create_app(local), "0", always=True)
    with serving(throttled) as url, RemoteRegistry(url, patience=Patience(0.5)) as registry:
        with pytest.raises(RateLimited):
            registry.list()
        assert 2 <= len(throttled.refused) <= 4  # 0 is no leave to ask without a pause


def test_a_command_waits_and_says_so(local):
    with serving(Throttled(create_app(local))) as url:
        answer = CliRunner().invoke(cli, ["--registry", url, "list"])
    assert (answer.exit_code, answer.stdout[:15]) == (0, "no adapters yet")
    assert answer.stderr == "more than the allowed requests; waiting 0 s\n"


def test_without_a_rate_there_is_no_limit(local):
    with serving(create_app(local)) as url, RemoteRegistry(url) as registry:
        for _ in range(200):
            registry.list()
