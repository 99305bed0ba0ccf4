"""Tiny bases and adapters made with numpy alone, and a registry in a temporary folder."""

import json
import logging
import os
import secrets
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import postgres
import pytest
from safetensors.numpy import save_file
from serving import serving

from loraplex_registry.base import fingerprint_base
from loraplex_registry.blobs import BlobStore
from loraplex_registry.bucket import Bucket
from loraplex_registry.http import create_app
from loraplex_registry.postgres import PostgresDatabase
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry, open_registry

HIDDEN, INNER, VOCAB, LAYERS = 8, 16, 32, 2


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No test reads or writes the user's folders, nor the network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # of commands; huggingface_hub has read its own by now
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("LORAPLEX_REGISTRY", raising=False)
    monkeypatch.delenv("LORAPLEX_REGISTRY_TOKEN", raising=False)
    monkeypatch.delenv("LORAPLEX_REGISTRY_DATABASE", raising=False)
    monkeypatch.delenv("LORAPLEX_REGISTRY_STORE", raising=False)


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"model.layers.{layer}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"model.layers.{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def make_base(folder: Path, seed: int = 0, shards: int = 1, **config) -> Path:
    folder.mkdir(parents=True)
    described = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True} | config
    (folder / "config.json").write_text(json.dumps(described))
    tensors = llama_tensors(seed)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@dataclass
class Adapter:
    """An adapter before it is written: tests change one thing and write it."""

    rank: int = 4
    targets: tuple[str, ...] = ("up_proj", "down_proj")
    seed: int = 0
    config: dict = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed)
        sizes = {"up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER), "q_proj": (HIDDEN, HIDDEN)}
        for layer in range(LAYERS):
            for target in self.targets:
                outputs, inputs = sizes[target]
                block = "self_attn" if target == "q_proj" else "mlp"
                key = f"base_model.model.model.layers.{layer}.{block}.{target}"
                self.tensors[f"{key}.lora_A.weight"] = random.standard_normal((self.rank, inputs)).astype(np.float32)
                self.tensors[f"{key}.lora_B.weight"] = random.standard_normal((outputs, self.rank)).astype(np.float32)
        self.config = {
            "base_model_name_or_path": "tiny/base",
            "bias": "none",
            "init_lora_weights": True,
            "lora_alpha": 8,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": sorted(self.targets),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
        } | self.config

    def write(self, folder: Path, receipt: dict | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        if receipt is not None:
            (folder / "receipt.json").write_text(json.dumps(receipt))
        return folder


def make_receipt(base: Path, **changes) -> dict:
    described = {"id": "tiny/base", "path": str(base), "revision": None, "fingerprint": fingerprint_base(base)}
    return {
        "format": "loraplex.receipt/1",
        "base": described | {"quantization": "nf4+double:bfloat16"},
        "metrics": {"tag_f1": 0.75, "stop_rate": 1},
        "parent": None,
    } | changes


PUSHER = """
import sys
from loraplex_registry.remote import open_registry
root, base, *folders = sys.argv[1:]
with open_registry(root) as registry:
    for folder in folders:
        print(registry.push("quotes-tagger", folder, base=base), flush=True)
"""


def run_python(code: str, *arguments: object, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True, **options)


@pytest.fixture
def base(tmp_path) -> Path:
    return make_base(tmp_path / "base")


def served(registry: Registry, tokens: dict[str, str] | None = None):
    """The registry's own server, as a context that yields its URL."""
    return serving(create_app(registry, tokens))


@pytest.fixture(scope="session")
def cluster():
    """A running PostgreSQL, with a database `ready` that holds an empty catalog."""
    programs = postgres.programs()
    if not programs:
        pytest.skip(postgres.APT)
    with postgres.cluster(programs) as cluster:
        cluster.execute("CREATE DATABASE ready TEMPLATE template0")
        with closing(PostgresDatabase(cluster.url("ready"))) as ready:
            ready.open()
        yield cluster


@pytest.fixture
def database(cluster):
    """The URL of a database of the test's own, with an empty catalog."""
    url = cluster.make("ready")
    yield url
    cluster.drop(url)


@pytest.fixture(scope="session")
def object_store():
    """An S3 that answers here, moto's, as its URL; it has a bucket `adapters`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    bucket = f"{url}/adapters"
    httpx.put(bucket, headers={"Authorization": "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request"})
    assert httpx.head(bucket).is_success
    yield url
    server.stop()


@pytest.fixture
def bucket(object_store, monkeypatch):
    """The URL of a store with nothing in it; credentials are in the environment."""
    for key, value in {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
    }.items():
        monkeypatch.setenv(key, value)
    return f"s3://adapters/team/{secrets.token_hex(4)}"


@pytest.fixture(params=["folder", "url", "postgres"])
def registry(request, tmp_path, monkeypatch):
    """A registry in tmp_path/registry: opened here, behind its server, with PostgreSQL, or with that and S3.

    `open_registry(tmp_path / "registry")` opens the same one once more, also in another process.
    """
    if request.param in ("postgres", "bucket"):
        monkeypatch.setenv("LORAPLEX_REGISTRY_DATABASE", request.getfixturevalue("database"))
    if request.param == "bucket":
        monkeypatch.setenv("LORAPLEX_REGISTRY_STORE", request.getfixturevalue("bucket"))
    with open_registry(tmp_path / "registry") as local:
        assert isinstance(local, Registry)
        if request.param != "url":
            yield local
            return
        with served(local) as url, RemoteRegistry(url) as remote:
            yield remote


@pytest.fixture
def store(registry, tmp_path) -> BlobStore:
    """The registry's blobs, beside it."""
    url = os.environ.get("LORAPLEX_REGISTRY_STORE")
    return BlobStore(tmp_path / "registry", Bucket(url) if url else None)


@pytest.fixture
def push(registry, base, tmp_path):
    """push("name", seed=1) → a new version; another seed is another adapter."""

    def push(name: str = "quotes-tagger", seed: int = 0, **options):
        folder = Adapter(seed=seed).write(tmp_path / "made" / f"{name.replace('/', '-')}-{seed}", make_receipt(base))
        return registry.push(name, folder, base=base, **options)

    return push
