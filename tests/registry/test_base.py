"""Bases from outside: the fingerprint does not see sharding, and sees any changed weight."""

import json
import shutil

import pytest

from loraplex_registry.base import describe_base, fingerprint_base
from loraplex_registry.errors import BaseNotFound

from .conftest import make_base


def test_fingerprint_ignores_sharding_and_sees_weights(base, tmp_path):
    sharded = make_base(tmp_path / "sharded", shards=3)
    other = make_base(tmp_path / "other", seed=1)
    assert fingerprint_base(sharded) == fingerprint_base(base)
    assert fingerprint_base(other) != fingerprint_base(base)
    assert describe_base(sharded).shapes == describe_base(base).shapes
    assert describe_base(base).architecture == "LlamaForCausalLM"
    assert describe_base(base).tied


def test_fingerprint_is_remembered_until_the_file_changes(base, tmp_path):
    first = fingerprint_base(base)
    (note,) = (tmp_path / "cache" / "loraplex" / "fingerprints").iterdir()
    assert note.read_text() == first
    note.write_text("sha256:remembered")
    assert fingerprint_base(base) == "sha256:remembered"
    shutil.copy(make_base(tmp_path / "other", seed=1) / "model.safetensors", base / "model.safetensors")
    assert fingerprint_base(base) not in (first, "sha256:remembered")


def test_module_paths_may_lack_their_first_part(tmp_path, base):
    description = describe_base(base)
    assert description.weight_of("model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj.weight"
    assert description.weight_of("transformer.model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj.weight"
    assert description.weight_of("layers.0.mlp.up_proj") is None


def test_a_user_without_a_home_only_goes_without_the_note(base, monkeypatch):
    before = fingerprint_base(base)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it does where nobody has that user's number
    assert fingerprint_base(base) == before


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c", "owner/not-in-the-cache"])
def test_missing_base_says_what_to_do(name):
    with pytest.raises(BaseNotFound, match="--base"):
        describe_base(name)


def test_broken_base_folders(base, tmp_path):
    sharded = make_base(tmp_path / "sharded", shards=2)
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(BaseNotFound, match=r"lacks model-1\.safetensors"):
        describe_base(sharded)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(BaseNotFound, match="not a whole safetensors file"):
        describe_base(base)
    (base / "config.json").unlink()
    with pytest.raises(BaseNotFound, match=r"no config\.json"):
        describe_base(base)


def test_base_in_the_hubs_cache(base, tmp_path, monkeypatch):
    """A model that huggingface_hub downloaded earlier is found without a network, with its commit."""
    commit = "c" * 40
    cache = tmp_path / "hub"
    repo = cache / "models--tiny--base"
    shutil.copytree(base, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    description = describe_base("tiny/base")
    assert (description.id, description.revision) == ("tiny/base", commit)
    assert description.fingerprint == fingerprint_base(base)


def test_index_without_shards(base):
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(BaseNotFound, match="lacks its shards"):
        fingerprint_base(base)
