"""`registry hub pull` and `registry hub push` against our own server in another process, over a network that fails."""

import asyncio
import os
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import HfApi
from serving import serving
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from loraplex_registry.cli import cli
from loraplex_registry.errors import InvalidAdapter
from loraplex_registry.hub import find_on_hub
from loraplex_registry.reference import HubReference
from loraplex_registry.registry import Registry
from loraplex_registry.validate import Limits

from .conftest import Adapter, make_receipt, run_python, served
from .test_hub_upload import draft, serving_command

LARGE = "extra/large.npy"


class Network:
    """Passes requests on to a server, and does to some what networks and busy servers do."""

    def __init__(self, server: str) -> None:
        self.server, self.url = server, ""  # whence it passes on to, and where it is
        self.busy: Counter[str] = Counter()  # a word of the path → how many requests are still to be answered 429
        self.retry_after = "0"
        self.cut: dict[str, int] = {}  # the end of a path → the bytes after which its next answer breaks off
        self.stalled: dict[str, int] = {}  # the same, and nothing comes after them, until the client is gone
        self.served: Counter[str] = Counter()  # the name of a file → its bytes that were sent
        self.altered: set[str] = set()  # the ends of paths whose answers have a wrong byte
        self.seen: list[tuple[str, str, str]] = []  # method, path, range

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        path, method = request.url.path, request.method
        self.seen.append((method, path, request.headers.get("range", "")))
        for word in [word for word in self.busy if word in path and self.busy[word] > 0]:
            self.busy[word] -= 1
            told = {"Retry-After": self.retry_after}
            await JSONResponse({"error": "too many"}, 429, told)(scope, receive, send)
            return
        async with httpx.AsyncClient(timeout=60) as web:
            url = f"{self.server}{scope['raw_path'].decode()}?{scope['query_string'].decode()}"
            content = await request.body()
            answer = await web.request(method, url, headers=request.headers.raw, content=content)
        headers = {key: value for key, value in answer.headers.items() if key != "transfer-encoding"}
        body, cut, stall = answer.content, None, None
        if method == "GET" and answer.status_code in (200, 206):
            cut = next((self.cut.pop(end) for end in list(self.cut) if path.endswith(end)), None)
            stall = next((self.stalled.pop(end) for end in list(self.stalled) if path.endswith(end)), None)
            self.served[Path(path).name] += len(body[: cut or stall])
            if any(path.endswith(end) for end in self.altered):
                body = body[:-1] + bytes([body[-1] ^ 1])
        if cut is None and stall is None:
            await Response(body, answer.status_code, headers)(scope, receive, send)
        else:
            pieces = _pieces(body[: cut or stall], stall is not None)
            await StreamingResponse(pieces, answer.status_code, headers)(scope, receive, send)

    def fetched(self, end: str) -> list[str]:
        """The ranges of the requests for a file's content."""
        return [
            asked for method, path, asked in self.seen if method == "GET" and "/resolve/" in path and path.endswith(end)
        ]


async def _pieces(body: bytes, stalls: bool):
    yield body
    while stalls:  # the response that is sent ends this with the connection
        await asyncio.sleep(0.05)


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    """The client of this process may use the network, that is 127.0.0.1, and forgets its connections afterwards."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("LORAPLEX_REGISTRY", str(tmp_path / "here"))
    yield
    huggingface_hub.close_session()


@pytest.fixture
def upstream(tmp_path, base):
    """ns/tagger:1, with more files than three, in a registry that stands for the Hub."""
    folder = Adapter().write(tmp_path / "upstream-files", make_receipt(base))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    (folder / "extra").mkdir()
    (folder / LARGE).write_bytes(os.urandom(3_000_000))
    (folder / "extra" / "seen [é] #1.txt").write_text("a name that needs quoting")
    with Registry(tmp_path / "there") as registry:
        registry.push("ns/tagger", folder, base=base)
        yield registry


@pytest.fixture
def network(upstream, base):
    with serving_command(upstream.root, "--base", f"tiny/base={base}") as (_, environment):
        network = Network(environment["HF_ENDPOINT"])
        with serving(network, log_level="critical") as url:
            network.url = url
            yield network


@pytest.fixture
def hub(network):
    """hub("pull", …) → exit code, stdout, stderr."""

    def hub(verb: str, *arguments: object):
        options = ["hub", verb, *map(str, arguments), "--endpoint", network.url]
        done = CliRunner().invoke(cli, options)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.exit_code, done.stdout, done.stderr

    return hub


@pytest.fixture
def here(tmp_path):
    with Registry(tmp_path / "here") as registry:
        yield registry


def waiting(tmp_path) -> list[Path]:
    """What downloads left in the user's cache."""
    return [
        file
        for file in (tmp_path / "cache" / "loraplex" / "hub").rglob("*")
        if file.is_file() and file.suffix != ".lock"
    ]


def test_pull_over_a_network_that_throttles_and_cuts(hub, network, here, upstream, base, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # of 10 MB: what it keeps of a cut
    network.busy.update({"/api/models/ns/tagger": 1, "adapter_config.json": 1})
    network.cut = {"large.npy": 1_000_000}
    code, out, _ = hub("pull", "ns/tagger@main", "--base", base)
    there = upstream.resolve("ns/tagger:1")
    commit = there.digest.removeprefix("sha256:")[:40]
    assert (code, out.startswith(f"hf://ns/tagger@{commit} is ns/tagger:1 (")) == (0, True)
    version = here.resolve("ns/tagger")
    assert (version.digest, version.message) == (there.digest, f"from hf://ns/tagger@{commit}")
    assert here.verify() == []
    assert sum(network.busy.values()) == 0
    first, second = network.fetched("large.npy")
    assert (first, bool(re.fullmatch(r"bytes=[1-9]\d*-", second))) == ("", True)  # it goes on where it was cut
    assert waiting(tmp_path) == []
    code, out, _ = hub("pull", "hf://ns/tagger@v1", "--as", "mine", "--base", base, "-m", "a copy")
    assert (code, here.resolve("mine:1").message) == (0, f"a copy (hf://ns/tagger@{commit})")
    code, out, _ = hub("pull", "ns/tagger", "--base", base)
    assert (code, out) == (0, f"already ns/tagger:1 {there.digest}\n")


PULL = """
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 100_000  # of 10 MB, as above
from loraplex_registry.cli import main
main()
"""


def killed_pull(network, base, tmp_path, monkeypatch) -> Path:
    """A pull that is killed while LARGE comes; what it has of that file."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    network.stalled = {"large.npy": 1_500_000}
    arguments = ["hub", "pull", "ns/tagger", "--base", base, "--endpoint", network.url]
    process = run_python(PULL, *arguments, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (found := [file for file in waiting(tmp_path) if 1_000_000 <= file.stat().st_size < 3_000_000]):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    network.served.clear()
    network.seen.clear()
    return found[0]


def test_a_pull_that_was_killed_goes_on_where_it_was(hub, network, here, base, tmp_path, monkeypatch):
    begun = killed_pull(network, base, tmp_path, monkeypatch)
    size = begun.stat().st_size
    code, _, err = hub("pull", "ns/tagger", "--base", base)
    assert (code, network.fetched("large.npy")) == (0, [f"bytes={size}-"]), err
    assert network.served["large.npy"] == 3_000_000 - size
    assert here.verify() == []
    assert (here.resolve("ns/tagger").number, waiting(tmp_path)) == (1, [])


@pytest.mark.parametrize("spoilt", [b"wrong", b"w" * 3_000_001])
def test_wrong_bytes_that_a_killed_pull_left_are_discarded(hub, network, here, base, tmp_path, monkeypatch, spoilt):
    begun = killed_pull(network, base, tmp_path, monkeypatch)
    data = begun.read_bytes()
    begun.write_bytes(spoilt + data[len(spoilt) :])
    assert hub("pull", "ns/tagger", "--base", base)[0] == 0
    too_long = len(spoilt) > 3_000_000
    assert network.fetched("large.npy") == [*([] if too_long else [f"bytes={len(data)}-"]), ""]
    assert network.served["large.npy"] == 3_000_000 + (0 if too_long else 3_000_000 - len(data))
    assert here.verify() == []
    assert waiting(tmp_path) == []


def test_from_the_hub_into_a_registry_behind_a_url(hub, here, upstream, base):
    with served(here) as url:
        code, out, err = hub("pull", "ns/tagger", "--as", "copy", "--base", base, "--registry", url)
        assert (code, out.startswith("hf://ns/tagger@")) == (0, True), err
        assert here.resolve("copy:1").digest == upstream.resolve("ns/tagger:1").digest
        assert hub("push", "copy:1", "ns/again", "--registry", url)[0] == 0
    assert upstream.drafts.find("ns/again")


def test_wrong_bytes_are_never_pushed(hub, network, here, base, tmp_path):
    """The Hub's client takes them, since their number is right; what was right is not fetched again."""
    network.altered = {"adapter_model.safetensors"}
    code, out, err = hub("pull", "ns/tagger", "--base", base)
    assert (code, out) == (1, "")
    told = "adapter_model.safetensors came as [0-9a-f]{64}, and the Hub has [0-9a-f]{64}; it was removed, try again"
    assert re.fullmatch(f"error: hf://ns/tagger@[0-9a-f]{{40}} cannot be fetched: {told}", err.splitlines()[-1])
    assert here.list() == []
    assert waiting(tmp_path)
    network.altered, network.seen = set(), []
    assert hub("pull", "ns/tagger", "--base", base)[0] == 0
    assert len(network.fetched("adapter_model.safetensors")) == 1
    assert network.fetched("adapter_config.json") == []
    assert here.verify() == []


def test_what_cannot_be_pulled(hub, network, here, base):
    network.busy["/none"] = 99
    network.retry_after = "301"  # longer than one waits for
    errors = {
        ("ns/none",): "error: hf://ns/none cannot be fetched: ",
        ("ns/absent",): "error: hf://ns/absent cannot be fetched: 404 ",
        ("ns/tagger@staging",): "error: hf://ns/tagger@staging cannot be fetched: 404 ",
        ("Ns/Tagger",): "error: 'Ns/Tagger' is not an adapter name: ",
        ("tagger",): "error: 'hf://tagger' is not a Hub reference: ",
        ("ns/tagger", "--as", "A B"): "error: 'A B' is not an adapter name: ",
        ("ns/tagger", "--base", base / "nowhere"): f"error: the base '{base / 'nowhere'}' is not a folder here",
    }
    for arguments, told in errors.items():
        code, out, err = hub("pull", *arguments)
        assert (code, out, err.splitlines()[-1][: len(told)]) == (1, "", told)
    assert "--as NAME" in hub("pull", "Ns/Tagger")[2]
    assert here.list() == []


def test_only_an_adapters_files_are_fetched(upstream, network, here, monkeypatch):
    """Pickles and hidden files stay where they are; what is too large is told before a byte of it comes."""
    ref, limits = HubReference.parse("hf://ns/tagger"), Limits(max_bytes=1_000_000)
    with pytest.raises(
        InvalidAdapter, match=r"hf://ns/tagger has 6 files of 3,\d{3},\d{3} bytes, at most 200 of 1,000,000"
    ):
        find_on_hub(ref, limits, network.url)
    assert network.fetched("") == []
    _, files = find_on_hub(ref, Limits(), network.url)
    assert {one.rfilename for one in files} == {
        entry.path for entry in upstream.manifest(upstream.resolve("ns/tagger").digest).files
    }


def test_push_over_a_network_that_throttles(hub, network, here, upstream, base, tmp_path):
    folder = Adapter(seed=3).write(tmp_path / "ours", make_receipt(base))
    (folder / "README.md").write_text("# Ours")
    pushed = here.push("ours", folder, base=base, message="ready")
    network.busy.update({"repos/create": 1, "preupload": 1, "commit": 1})
    code, out, _ = hub("push", "ours:1", "ns/ours", "--revision", "main")
    head = upstream.drafts.find("ns/ours")
    assert (code, out) == (0, f"ours:1 is {network.url}/ns/ours/commit/{head.commit}\n")
    assert sum(network.busy.values()) == 0
    assert head.messages == (f"ours:1\nready\n\n{pushed.digest}",)
    assert draft(upstream, "ns/ours").keys() == {entry.path for entry in here.manifest(pushed.digest).files}
    assert hub("push", "ours", "ns/ours")[:2] == (0, out)  # again changes nothing
    here.push("wordy", folder, base=base, message="m" * 4096)
    assert hub("push", "wordy", "ns/wordy")[0] == 0
    HfApi(endpoint=network.url, token=False).create_tag("ns/ours", tag="v1")
    assert upstream.resolve("ns/ours:1").digest == pushed.digest
    for arguments, told in {
        ("ours:2", "ns/ours"): "error: no version 'ours:2'",
        ("ours", "ns/ours", "--private"): "error: ours:1 cannot be pushed to hf://ns/ours: ",
        ("ours", "ns/ours", "--revision", "dev"): "error: ours:1 cannot be pushed to hf://ns/ours: ",
        ("ours", "ours"): "error: 'hf://ours' is not a Hub reference",
    }.items():
        code, out, err = hub("push", *arguments)
        assert (code, out, err.splitlines()[-1][: len(told)]) == (1, "", told)


def test_private_repositories(base, upstream, here, tmp_path, monkeypatch):
    (tmp_path / "tokens").write_text("ada s3cret")
    options = ["--token-file", str(tmp_path / "tokens"), "--base", f"tiny/base={base}"]
    with serving_command(upstream.root, *options) as (_, environment):
        at = ["--endpoint", environment["HF_ENDPOINT"]]

        def run(*arguments: str):
            done = CliRunner().invoke(cli, ["hub", *arguments, *at])
            return done.exit_code, done.stdout, done.stderr

        code, out, err = run("pull", "ns/tagger", "--base", str(base))
        assert (code, out) == (1, "")
        assert err.splitlines()[-1].startswith("error: hf://ns/tagger cannot be fetched: 401 ")
        assert "s3cret" not in err
        monkeypatch.setenv("HF_TOKEN", "s3cret")
        assert run("pull", "ns/tagger", "--base", str(base))[0] == 0
        assert run("push", "ns/tagger:1", "ns/secret", "--private")[0] == 0
        assert upstream.drafts.find("ns/secret")
