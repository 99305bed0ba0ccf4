"""One renderer: what the server feeds the model for a question is what the trainer put before the answer."""

import json
import math
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
from click.testing import CliRunner
from serving import serving
from tiny import make_base

from loraplex_registry.registry import Registry
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig
from loraplex_server.engine.model import load_base
from loraplex_trainer.__main__ import train as train_command
from loraplex_trainer.data import encode_split, read_splits
from loraplex_trainer.encoding import encoder_for
from loraplex_trainer.run_file import load_config

SYSTEM = {"role": "system", "content": "the lazy dog"}
CHAT = [
    SYSTEM,
    {"role": "user", "content": "quick?"},
    {"role": "assistant", "content": "brown"},
    {"role": "user", "content": "fox <eos> ?"},
    {"role": "assistant", "content": "jumps"},
]
TEXT = "<usr> quick 강?\n<bot> brown\n<usr> fox?\n<bot> jumps 물"
TURNS = [
    {"role": "user", "content": "quick 강?"},
    {"role": "assistant", "content": "brown"},
    {"role": "user", "content": "fox?"},
]
# What is trained on, and the body that asks the last question of it.
CASES = {
    "columns": (
        {"prompt": "{quote} -> {n}:", "completion": " {tags}"},
        {"quote": "the quick", "n": 3, "tags": ["brown", "fox"]},
        {"inputs": {"quote": "the quick", "n": 3}},
    ),
    "one column": (
        {"prompt": "{quote} ->:", "completion": " {tags}"},
        {"quote": "the quick", "tags": "brown"},
        {"messages": [{"role": "user", "content": "the quick"}]},
    ),
    "messages": ({"form": "messages", "chat_template": "zephyr"}, {"messages": CHAT}, {"messages": CHAT[:4]}),
    "marked": ({"form": "messages", "chat_template": "chatml"}, {"messages": CHAT}, {"messages": CHAT[:4]}),
    "usr_bot": ({"form": "usr_bot"}, {"text": TEXT}, {"messages": TURNS}),
    "alpaca": (
        {"form": "alpaca"},
        {"instruction": "quick?", "input": "the fox", "output": "brown"},
        {"inputs": {"instruction": "quick?", "input": "the fox"}},
    ),
    "alpaca chat": (
        {"form": "alpaca"},
        {"instruction": "quick?", "input": "", "output": "brown"},
        {"messages": [{"role": "user", "content": "quick?"}]},
    ),
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base_folder) -> dict[str, list[int]]:
    """Every case trained by the command and pushed; the ids before its last answer, and the registry."""
    folder = tmp_path_factory.mktemp("runs")
    registry = Registry(folder / "registry")
    before = {}
    base = load_base(str(base_folder), quantization="none", device="cpu", dtype="float32")
    for name, (data, row, _) in CASES.items():
        rows = folder / f"{name}.jsonl"
        rows.write_text(json.dumps(row, ensure_ascii=False))
        run = folder / f"{name}.yaml"
        adapter = name.replace(" ", "-").replace("_", "-")
        settings = {
            "name": adapter,
            "base": {"model": str(base_folder), "quantization": "none", "dtype": "float32", "device": "cpu"},
            "data": {"train": str(rows), "max_tokens": 400, **data},
            "lora": {"rank": 2},
            "training": {"max_steps": 1, "batch_size": 1},
            "output": str(folder / "adapters"),
        }
        run.write_text(json.dumps(settings))
        result = CliRunner().invoke(train_command, [str(run)])
        assert result.exit_code == 0, result.output
        registry.push(adapter, folder / "adapters" / adapter)
        section = load_config(run).data
        (example,) = encode_split(read_splits(section)["train"], encoder_for(base, section)).examples
        before[name] = list(example.ids[: example.trained[-1][0]])
    registry.close()
    return {"ids": before, "registry": str(registry.root)}


@pytest.fixture(scope="module")
def client(trained, base_folder):
    with ExitStack() as stack:
        config = ServerConfig(
            base=str(base_folder), quantization="none", device="cpu", dtype="float32", registry=trained["registry"]
        )
        app = create_app(config)
        client = stack.enter_context(httpx.Client(base_url=stack.enter_context(serving(app)), timeout=60))
        client.fed = []
        engine = app.state.service.engine
        add = engine.add

        def noted(request):
            client.fed.append(request)
            add(request)

        engine.add = noted
        yield client


@pytest.mark.parametrize("name", CASES)
def test_the_server_feeds_the_ids_that_were_trained_on(client, trained, name):
    body = CASES[name][2] | {"adapter": name.replace(" ", "-").replace("_", "-"), "max_tokens": 1, "temperature": 0}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert client.fed[-1].prompt_ids == trained["ids"][name]
    assert answer.json()["usage"]["prompt_tokens"] == len(trained["ids"][name])
    assert client.fed[-1].params.stop == (("<|im_end|>",) if name == "marked" else ())


def test_the_version_keeps_the_template(trained):
    with Registry(trained["registry"]) as registry:
        template = registry.resolve("usr-bot").lineage.template
        assert template.form == "usr_bot" and "<bot>" in template.chat and template.stop == ()
        assert registry.resolve("marked").lineage.template.stop == ("<|im_end|>",)
        assert registry.resolve("columns").lineage.template.prompt == "{quote} -> {n}:"


def test_the_openai_sdk_talks_to_an_adapter(client):
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as sdk:
        asked = {"model": "usr-bot", "messages": TURNS, "temperature": 0, "max_completion_tokens": 8}
        whole = sdk.chat.completions.create(**asked)
        assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
        chunks = list(sdk.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize(
    ("adapter", "path", "body", "param", "said"),
    [
        ("columns", "chat/completions", {"messages": TURNS[:1]}, "messages", "inputs"),
        ("one-column", "chat/completions", {"messages": TURNS}, "messages", "one user message, which is its 'quote'"),
        ("columns", "completions", {"inputs": {"quote": "x"}}, "inputs", "'n'"),
        ("columns", "completions", {"inputs": {"quote": "x", "n": 1, "m": 2}}, "inputs", "'m'"),
        ("columns", "completions", {"inputs": {"quote": None, "n": 1}}, "inputs", "'quote' is null"),
        ("columns", "completions", {"inputs": {"quote": [["x"], None], "n": 1}}, "inputs", "'quote' is [["),
        ("columns", "completions", {"inputs": {"quote": "x", "n": math.nan}}, "inputs", "'n' is NaN"),
        ("messages", "completions", {"inputs": {"quote": "x"}}, "inputs", "prompt template"),
        ("columns", "completions", {"inputs": {"quote": "x", "n": 1}, "prompt": "x"}, "inputs", "one of them"),
    ],
)
def test_what_the_template_has_no_place_for_is_refused(client, adapter, path, body, param, said):
    answer = client.post(f"/v1/{path}", content=json.dumps(body | {"adapter": adapter}))  # httpx would refuse NaN
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert said in error["message"], error
