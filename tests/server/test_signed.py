"""A server that requires signatures: it serves what one of its keys signed, and says why it does not serve the rest."""

from contextlib import closing

import httpx
import pytest
from click.testing import CliRunner
from serving import serving

from loraplex_registry.http import create_app as registry_app
from loraplex_registry.registry import Registry
from loraplex_registry.signing import PublicKey, create_key, sign
from loraplex_server.__main__ import _config, serve
from loraplex_server.adapters import residency
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig


@pytest.mark.parametrize("face", ["folder", "url"])
def test_only_signed_adapters_are_served(face, tmp_path, base_folder, adapter_folders, monkeypatch):
    monkeypatch.setattr(residency, "RETRY_SECONDS", 0.0)  # a refusal is not remembered: what is signed now is served
    key, other = create_key(tmp_path / "release.key"), create_key(tmp_path / "other.key")
    with Registry(tmp_path / "registry") as registry, serving(registry_app(registry)) as registry_url:
        version = registry.push("red", adapter_folders["red"], base=base_folder)
        registry.signatures.add(version.digest, *sign(version.digest, tmp_path / "other.key"))
        config = ServerConfig(
            str(base_folder), quantization="none", dtype="float32", device="cpu",
            registry=str(registry.root) if face == "folder" else registry_url,
            signed_by=(key,),
        )  # fmt: skip
        app = create_app(config)
        with closing(app.state.service.registry), serving(app) as url:
            body = {"prompt": "the quick", "adapter": "red:1", "temperature": 0, "max_tokens": 2}
            refused = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert refused.status_code == 422
            error = refused.json()["error"]
            assert error["code"] == "adapter_refused"
            said = f"has to be signed by {key.id}, and is signed only by {other.id}"
            assert said in error["message"]
            registry.signatures.add(version.digest, *sign(version.digest, tmp_path / "release.key"))
            served = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert (served.status_code, served.json()["adapter"]) == (200, "red:1")
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=60).status_code == 200


def test_a_key_that_cannot_be_read_stops_the_start(tmp_path):
    file = tmp_path / "none.pub"
    answer = CliRunner().invoke(serve, ["--base", "x", "--require-signature", str(file)])
    assert answer.exit_code == 1
    assert answer.stderr == f"error: the public key '{file}' cannot be read: No such file or directory\n"


def test_the_option_gives_the_keys(tmp_path):
    key, file = create_key(tmp_path / "release.key"), tmp_path / "release.key.pub"
    with serve.make_context("serve", ["--base", "x", "--require-signature", str(file)]) as context:
        assert _config(context.params).signed_by == (key,)
    assert PublicKey.read(file) == key
