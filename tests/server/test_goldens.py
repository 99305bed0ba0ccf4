"""Golden prompts: an adapter that does not say here what it said where it was made is refused, and told why."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from serving import serving
from tiny import make_adapter, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex_registry.errors import InvalidAdapter
from loraplex_registry.goldens import Golden
from loraplex_registry.registry import Registry
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.goldens import ROUNDED, Result, judge
from loraplex_server.engine.model import load_base

PROMPTS = ("the quick brown fox", "over the lazy dog", "and again")
GREEDY = {"prompt": "the quick", "temperature": 0, "max_tokens": 8}
EXACT = "none:float32"


def write_receipt(folder: Path, base: Path, quantization: str = EXACT, **more) -> Path:
    """A receipt whose goldens transformers and peft computed, not our engine."""
    goldens = []
    for text in PROMPTS:
        ids = AutoTokenizer.from_pretrained(base)(text).input_ids
        goldens.append({"text": text, "ids": ids, "adapter": top(base, folder, ids), "base": top(base, None, ids)})
    receipt = {
        "format": "loraplex.receipt/1",
        "base": {"id": str(base), "quantization": quantization},
        "goldens": goldens,
    }
    (folder / "receipt.json").write_text(json.dumps(receipt | more))
    return folder


@torch.no_grad()
def top(base: Path, adapter: Path | None, ids: list[int]) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    values, found = logprobs.topk(10)
    return [[int(i), float(v)] for i, v in zip(found, values, strict=True)]


def altered(folder: Path, to: Path, factor: float) -> Path:
    """The same adapter with other weights, and the receipt of the first."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    changed = {key: tensor * factor if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(changed, to / "adapter_model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> Path:
    """Another base of the same shapes."""
    return make_base(tmp_path_factory.mktemp("twin"), seed=9)


@pytest.fixture(scope="module")
def colours(tmp_path_factory, base_folder) -> dict[str, Path]:
    """Adapters of several shapes with true receipts."""
    root, targets = tmp_path_factory.mktemp("colours"), (["q_proj", "v_proj"], ["down_proj"], "all-linear")
    folders = {name: root / name for name in ("red", "green", "blue", "white", "black")}
    for n, folder in enumerate(folders.values()):
        write_receipt(make_adapter(folder, base_folder, rank=2 + n, targets=targets[n % 3], seed=n), base_folder)
    return folders


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def serve(registry, base_folder):
    with ExitStack() as stack:

        def start(quantization="none", **engine):
            config = ServerConfig(
                str(base_folder), quantization=quantization, dtype="float32", device="cpu", registry=str(registry.root),
                engine=EngineConfig(**engine),
            )  # fmt: skip
            url = stack.enter_context(serving(create_app(config)))
            return stack.enter_context(httpx.Client(base_url=url, timeout=60))

        yield start


def ask(client, adapter, **body) -> httpx.Response:
    return client.post("/v1/completions", json={**GREEDY, "adapter": adapter, **body})


def text(client, adapter, **body) -> str:
    answer = ask(client, adapter, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def refused(client, adapter) -> str:
    answer = ask(client, adapter)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "adapter_refused"
    return answer.json()["error"]["message"]


def checks(client) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("lora_golden_checks_total{")]
    return {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in lines}


def test_an_adapter_that_is_what_its_receipt_says_is_checked_once_and_served(serve, registry, base_folder, colours):
    for name in ("red", "green", "blue"):
        registry.push(name, colours[name], base=base_folder)
    client, unchecked = serve(max_loras=1), serve(check_goldens=False)
    for _ in range(2):  # the one slot makes each of them leave and come back
        for name in ("red", "green", "blue"):
            assert text(client, name) == text(unchecked, name)
    assert checks(client) == {"passed": 3}
    assert checks(unchecked) == {}
    assert 'lora_requests_total{adapter="base"' not in client.get("/metrics").text  # goldens are nobody's requests


def test_weights_without_effect_are_refused_with_what_was_expected(serve, registry, base_folder, colours, tmp_path):
    registry.push("mute", altered(colours["red"], tmp_path / "mute", 0.0), base=base_folder)
    registry.push("red", colours["red"], base=base_folder)
    client = serve()
    for _ in range(2):
        said = refused(client, "mute")
        assert any(f"golden prompt {prompt!r}: expected " in said for prompt in PROMPTS)
        assert "no effect here" in said
    assert text(client, "red"), "others are served on"
    assert client.post("/v1/completions", json=GREEDY).status_code == 200
    assert checks(client) == {"refused": 1, "passed": 1}  # once a process
    assert 'lora_adapter_load_failures_total{reason="AdapterRefused"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("factor", [-1.0, 0.8, 1.1])
def test_other_weights_than_the_receipt_was_written_for_are_refused(
    serve, registry, base_folder, colours, tmp_path, factor
):
    registry.push("other", altered(colours["red"], tmp_path / "other", factor), base=base_folder)
    client = serve()
    assert "by the adapter: its weights or its base are not those of its receipt" in refused(client, "other")
    assert text(serve(check_goldens=False), "other")


def test_an_adapter_of_another_base_of_the_same_shape_is_caught_though_its_fingerprint_is_not_told(
    serve, registry, base_folder, twin, tmp_path
):
    """The receipt names no fingerprint and the push names the wrong base: nothing but the goldens can tell."""
    folder = write_receipt(make_adapter(tmp_path / "stranger", twin), twin)
    registry.push("stranger", folder, base=base_folder)
    client = serve()
    said = refused(client, "stranger")
    assert "another base than it was made on" in said and "golden prompt" in said
    assert text(serve(check_goldens=False), "stranger"), "without the check it is served, wrongly"


def test_on_another_quantization_it_is_served_with_a_warning(serve, registry, base_folder, colours, tmp_path, caplog):
    registry.push("red", colours["red"], base=base_folder)
    registry.push("mute", altered(colours["red"], tmp_path / "mute", 0.0), base=base_folder)
    client = serve(quantization="nf4")
    with caplog.at_level(logging.WARNING, "loraplex_server.engine.engine"):
        assert text(client, "red")
    assert "made on none:float32 and is served on nf4+double:float32" in caplog.text
    assert "no effect here" in refused(client, "mute"), "that is seen on any base"
    assert checks(client) == {"other_quantization": 1, "refused": 1}


@pytest.mark.parametrize("options", [{"max_loras": 2, "max_rows": 2}, {"max_loras": 1}, {"paged": False}, {}])
def test_many_at_once_stay_exact(serve, registry, base_folder, colours, options):
    """With fewer slots and rows than adapters: goldens go before others' requests, and nobody waits for ever."""
    for name, folder in colours.items():
        registry.push(name, folder, base=base_folder)
    client, unchecked = serve(**options), serve(check_goldens=False)
    wanted = [(name, prompt) for prompt in PROMPTS for name in colours]
    with ThreadPoolExecutor(len(wanted)) as pool:
        found = list(pool.map(lambda one: text(client, one[0], prompt=one[1], max_tokens=12), wanted))
    assert found == [text(unchecked, name, prompt=prompt, max_tokens=12) for name, prompt in wanted]
    assert checks(client) == {"passed": len(colours)}


def test_a_long_answer_goes_on_while_another_adapter_is_checked(serve, registry, base_folder, colours):
    """One slot, two rows: the checked adapter must take the slot from the one that runs, and give it back."""
    for name in ("red", "green"):
        registry.push(name, colours[name], base=base_folder)
    client = serve(max_loras=1, max_rows=2)
    alone = text(client, "red", max_tokens=150, ignore_eos=True)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(text, client, "red", max_tokens=150, ignore_eos=True)
        second = pool.submit(text, client, "green", max_tokens=150, ignore_eos=True)
        assert first.result() == alone and second.result()
    assert checks(client) == {"passed": 2}


def test_loading_ahead_answers_what_a_request_would(serve, registry, base_folder, colours, tmp_path):
    registry.push("red", colours["red"], base=base_folder)
    registry.push("mute", altered(colours["red"], tmp_path / "mute", 0.0), base=base_folder)
    client = serve()
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "red"}).status_code == 200
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": "mute", "pinned": True})
    assert answer.status_code == 422 and "no effect here" in answer.text
    assert checks(client) == {"passed": 1, "refused": 1}


def test_goldens_that_cannot_be_asked_here_are_a_refusal(serve, registry, base_folder, colours, tmp_path):
    folder = shutil.copytree(colours["red"], tmp_path / "far")
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["goldens"][0]["ids"] = [9999]
    (folder / "receipt.json").write_text(json.dumps(receipt))
    registry.push("far", folder, base=base_folder)
    assert "golden prompts cannot be computed here: prompt holds token id 9999" in refused(serve(), "far")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ids", [], "goldens[0].ids"),
        ("ids", [1] * 65, "goldens[0].ids"),
        ("ids", [True], "goldens[0].ids"),
        ("text", None, "goldens[0].text"),
        ("adapter", [[1, 0.5]], "goldens[0].adapter"),
        ("base", [[1, "x"]], "goldens[0].base"),
        ("base", [], "goldens[0].base"),
    ],
)
def test_goldens_that_are_none_are_refused_at_the_push(registry, base_folder, colours, tmp_path, key, value, said):
    folder = shutil.copytree(colours["red"], tmp_path / "odd")
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["goldens"][0][key] = value
    (folder / "receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(InvalidAdapter) as error:
        registry.push("odd", folder, base=base_folder)
    assert said in str(error.value)


def likely(*logprobs: float) -> tuple[tuple[int, float], ...]:
    return tuple(enumerate(logprobs))


@pytest.mark.parametrize(
    ("off", "trained_on", "served_on", "result"),
    [
        (0.01, EXACT, EXACT, Result.PASSED),
        (0.03, EXACT, EXACT, Result.REFUSED),
        (0.03, "none:bfloat16", EXACT, Result.PASSED),  # the wider of the two
        (0.9 * ROUNDED, "nf4+double:bfloat16", "nf4+double:float32", Result.PASSED),
        (1.1 * ROUNDED, "nf4+double:bfloat16", "nf4+double:float32", Result.REFUSED),
        (1.1 * ROUNDED, None, EXACT, Result.REFUSED),
        (5.0, "nf4+double:bfloat16", "none:bfloat16", Result.OTHER_QUANTIZATION),
    ],
)
def test_how_far_an_adapter_may_be_off(off, trained_on, served_on, result):
    golden = Golden("x", (1,), likely(-0.5, -1.5), likely(-3.0, -4.0))
    answer = (likely(-0.5 - off, -1.5 - off), likely(-3.0, -4.0))
    found, reason = judge([golden], [answer], trained_on, served_on, str)
    assert (found, bool(reason)) == (result, result is not Result.PASSED)
    assert judge([golden], [answer], trained_on, served_on, str)[0] == result


def test_an_adapter_that_changed_next_to_nothing_is_not_taken_for_one_without_effect():
    golden = Golden("x", (1,), likely(-0.5, -1.5), likely(-0.503, -1.503))
    same = likely(-0.503, -1.503)
    assert judge([golden], [(same, same)], EXACT, EXACT, str) == (Result.PASSED, "")


def test_an_engine_checks_folders_too(base_folder, colours, tmp_path):
    from loraplex_server.engine.engine import Engine
    from loraplex_server.engine.errors import AdapterRefused
    from loraplex_server.engine.request import SamplingParams

    engine = Engine(load_base(str(base_folder), quantization="none", device="cpu", dtype="float32"))
    params = SamplingParams(max_tokens=4, temperature=0.0)
    engine.add_adapter("red", altered(colours["red"], tmp_path / "mute", 0.0))
    with pytest.raises(AdapterRefused, match="no effect here"):
        engine.generate(["the quick"], params, "red")
    engine.add_adapter("red", colours["red"])  # another under the same name
    assert engine.generate(["the quick"], params, "red")[0].text
    engine.add_adapter("red", tmp_path / "mute")
    with pytest.raises(AdapterRefused, match="no effect here"):
        engine.generate(["the quick"], params, "red")
