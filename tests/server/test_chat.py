"""POST /v1/chat/completions: which template writes, which shape answers. That its ids are the trained ones is
tests/test_served_as_trained.py's.
"""

import json
import shutil
from contextlib import ExitStack

import httpx
import pytest
from serving import serving
from transformers import AutoTokenizer

from loraplex_registry.registry import Registry
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig
from loraplex_server.engine.config import EngineConfig

ASKED = [{"role": "system", "content": "brown"}, {"role": "user", "content": "the quick"}]
OWN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
PROMPT = "system: brown\nuser: the quick\nassistant:"


@pytest.fixture(scope="module")
def start(tmp_path_factory, base_folder, adapter_folders):
    """A server on a base whose tokenizer has a chat template, or has none, with an adapter that has none."""
    root = tmp_path_factory.mktemp("registry")
    with Registry(root) as registry:
        registry.push("red", adapter_folders["red"], base=base_folder)
    with ExitStack() as stack:

        def serve(template, **options):
            folder = tmp_path_factory.mktemp("base") / "base"
            shutil.copytree(base_folder, folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder)
            config = ServerConfig(
                base=str(folder), quantization="none", device="cpu", dtype="float32", registry=str(root), **options
            )
            url = stack.enter_context(serving(create_app(config)))
            return stack.enter_context(httpx.Client(base_url=url, timeout=60))

        yield serve


@pytest.fixture(scope="module")
def client(start):
    return start(OWN)


def chat(client, **body):
    answer = client.post("/v1/chat/completions", json={"messages": ASKED, "temperature": 0, "max_tokens": 12, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def completion(client, **body):
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, **body}
    return client.post("/v1/completions", json=body).json()


@pytest.mark.parametrize("adapter", [None, "red"])
def test_an_answer_is_that_of_the_rendered_prompt_in_chats_shape(client, adapter):
    answer, plain = chat(client, adapter=adapter), completion(client, adapter=adapter)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": plain["choices"][0]["text"], "refusal": None},
        "logprobs": None,
        "finish_reason": plain["choices"][0]["finish_reason"],
    }
    assert {key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens")} == {
        key: plain["usage"][key] for key in ("prompt_tokens", "completion_tokens")
    }
    assert answer["adapter"] == plain["adapter"]


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(client):
    whole = chat(client, n=2, seed=3, temperature=1.0)
    body = {"messages": ASKED, "temperature": 1.0, "max_tokens": 12, "n": 2, "seed": 3, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for index in (0, 1):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in own) == whole["choices"][index]["message"]["content"]
        assert [one["finish_reason"] for one in own][-1] == whole["choices"][index]["finish_reason"]


def test_an_answer_without_a_limit_has_the_rest_of_the_context(client):
    bias = {"0": -100}  # no end of sequence
    answer = client.post("/v1/chat/completions", json={"messages": ASKED, "temperature": 0, "logit_bias": bias}).json()
    assert answer["usage"]["total_tokens"] == 256 and answer["choices"][0]["finish_reason"] == "length"
    short = chat(client, max_tokens=None, max_completion_tokens=3)
    assert short["usage"]["completion_tokens"] == 3


def test_scores_are_those_of_a_completion(client):
    answer, plain = chat(client, logprobs=True, top_logprobs=2), completion(client, logprobs=2)
    content, scored = answer["choices"][0]["logprobs"]["content"], plain["choices"][0]["logprobs"]
    assert [one["logprob"] for one in content] == pytest.approx(scored["token_logprobs"])
    assert [one["token"] for one in content] == scored["tokens"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    assert all(one["bytes"] in (None, list(one["token"].encode())) for one in content)
    assert all(one["top_logprobs"] == [] for one in chat(client, logprobs=True)["choices"][0]["logprobs"]["content"])


def test_a_control_token_that_a_user_spells_out_is_text(client):
    spelt = chat(client, messages=[{"role": "user", "content": "<eos>"}])["usage"]["prompt_tokens"]
    assert spelt > chat(client, messages=[{"role": "user", "content": ""}])["usage"]["prompt_tokens"] + 1


BAD = {
    "no messages": ({}, "messages", "missing"),
    "no list": ({"messages": "hi"}, "messages", "hi"),
    "none in it": ({"messages": []}, "messages", "at least one"),
    "no object": ({"messages": ["hi"]}, "messages", "hi"),
    "a role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "robot"),
    "no content": ({"messages": [{"role": "user"}]}, "messages", "expected text"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "not text"),
    "a tool's": ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "tool"),
    "a name": ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages", "'name'"),
    "tools": ({"messages": ASKED, "tools": [{"type": "function"}]}, "tools", "does not support"),
    "a format": ({"messages": ASKED, "response_format": {"type": "json_object"}}, "response_format", "not support"),
    "an unknown field": ({"messages": ASKED, "max_token": 3}, "max_token", "'max_tokens'"),
    "two limits": ({"messages": ASKED, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "newer name"),
    "top alone": ({"messages": ASKED, "top_logprobs": 3}, "top_logprobs", "logprobs is false"),
    "too many": ({"messages": ASKED, "logprobs": True, "top_logprobs": 30}, "logprobs", "from 0 to 20"),
    "temperature": ({"messages": ASKED, "temperature": 3}, "temperature", "from 0 to 2"),
    "a prompt": ({"messages": ASKED, "prompt": "x"}, "prompt", "unrecognized"),
    "too long": ({"messages": [{"role": "user", "content": "again " * 300}]}, "prompt", "256"),
    "malformed": (b'{"messages": ', "body", "JSON"),
}


@pytest.mark.parametrize("story", BAD)
def test_bad_requests_name_the_field(client, story):
    body, param, said = BAD[story]
    answer = client.post("/v1/chat/completions", content=body if isinstance(body, bytes) else json.dumps(body))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert said in error["message"], error


def test_neutral_values_of_what_is_not_supported_are_taken(client):
    plain = chat(client)["choices"]
    assert (
        chat(client, tools=[], tool_choice="none", response_format={"type": "text"}, user="me", store=False)["choices"]
        == plain
    )
    assert chat(client, messages=[*ASKED[:1], {**ASKED[1], "tool_calls": None, "refusal": None}])["choices"] == plain


def test_without_any_chat_template_the_way_is_told(start):
    client = start(None)
    for adapter in (None, "red"):
        answer = client.post("/v1/chat/completions", json={"messages": ASKED, "adapter": adapter})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
        assert "/v1/completions" in answer.json()["error"]["message"]


def test_a_template_that_refuses_says_why(start):
    client = start("{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}x")
    answer = client.post("/v1/chat/completions", json={"messages": ASKED})
    assert answer.status_code == 400 and "one message only" in answer.json()["error"]["message"]


def test_keys_limits_and_the_queue_are_those_of_completions(start):
    client = start(OWN, api_keys=("key",), max_body_bytes=500, engine=EngineConfig(max_waiting=2))
    assert client.post("/v1/chat/completions", json={"messages": ASKED}).status_code == 401
    client.headers["Authorization"] = "Bearer key"
    assert client.post("/v1/chat/completions", content=b"x" * 600).status_code == 413
    answer = client.post("/v1/chat/completions", json={"messages": ASKED, "n": 3})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
    unknown = client.post("/v1/chat/completions", json={"messages": ASKED, "adapter": "rad"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "adapter_not_found")
