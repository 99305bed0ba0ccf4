"""Adapters in the model, against peft: its own injection and its own set_adapter on a fresh model are the reference."""

import gc
import itertools
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from math import inf
from pathlib import Path

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import make_adapter, make_base
from transformers import AutoModelForCausalLM

from loraplex_registry.base import describe_base
from loraplex_server.adapters.device import DeviceAdapters
from loraplex_server.adapters.host import AdapterReader, HostAdapter
from loraplex_server.adapters.memory import HostMemory
from loraplex_server.adapters.residency import Place, Residency, Unobserved
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.errors import AdapterRefused
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import Request, SamplingParams
from loraplex_server.kernels.native import native

needs_kernels = pytest.mark.skipif(not native(), reason=f"{native().why_not}; gcc comes with: apt-get install gcc")

PER_ADAPTER = (*LoraLayer.adapter_layer_names, *LoraLayer.other_param_names, "lora_variant")
KINDS = {
    "all-linear": {},
    "names": {"targets": ["q_proj", "v_proj"], "rank": 8, "lora_alpha": 3},
    "rslora": {"targets": ["down_proj"], "use_rslora": True, "lora_dropout": 0.1},
    "pattern": {"targets": r".*layers\.1\..*(q_proj|up_proj)"},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6}, "alpha_pattern": {"down_proj": 40}},
    "layers": {"targets": ["k_proj", "o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"targets": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "head": {"targets": ["lm_head", "o_proj"]},
    "embedding": {"targets": ["embed_tokens", "q_proj"]},
}


def base_of(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def read(folder: Path, key: str | None = None) -> HostAdapter:
    """As it is read for serving, without the check against the base: the device has its own."""
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    return HostAdapter(key or folder.name, config, load_file(folder / "adapter_model.safetensors"))


def put(device: DeviceAdapters, adapter: HostAdapter) -> None:
    device.begin(adapter)
    assert device.advance(inf)


def layers(model) -> dict[str, LoraLayer]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 12)[None]).logits


def of_adapter(layer: LoraLayer, name: str) -> dict:
    """All that a layer keeps under an adapter's name."""
    kept = {a: getattr(layer, a)[name] for a in PER_ADAPTER if name in getattr(layer, a)}
    modules = {a: v for a, v in kept.items() if isinstance(v, torch.nn.Module)}
    plain = {a: v for a, v in kept.items() if not isinstance(v, torch.nn.Module | torch.nn.Parameter)}
    return plain | {a: (repr(m), m.training) for a, m in modules.items()}


def assert_same_as_peft(base_folder: Path, device: DeviceAdapters, adapter: Path) -> None:
    expected = PeftModel.from_pretrained(base_of(base_folder), adapter, adapter_name="ref")
    theirs = layers(expected.base_model.model)
    name = device._held[adapter.name].name
    ours = dict(device.layers_of(adapter.name))
    assert ours.keys() == theirs.keys()
    for path, layer in ours.items():
        assert of_adapter(layer, name) == of_adapter(theirs[path], "ref"), path
        assert type(layer) is type(theirs[path])
    device.activate(adapter.name)  # peft reads the active one's configuration, whichever it is asked about
    ours = get_peft_model_state_dict(device._peft, adapter_name=name, save_embedding_layers=False)
    theirs = get_peft_model_state_dict(expected, adapter_name="ref", save_embedding_layers=False)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
        assert ours[key].dtype == tensor.dtype
    assert not any(p.requires_grad for p in device.model.parameters())
    assert torch.equal(logits(device.model), logits(expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [(), ("other",)], ids=["first", "second"])
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_installed_adapter_is_what_peft_makes_of_it(tmp_path, base_folder, kind, after):
    device = DeviceAdapters(base_of(base_folder), 2)
    for name in after:
        put(device, read(make_adapter(tmp_path / name, base_folder, rank=3, targets=["q_proj", "down_proj"], seed=9)))
    folder = make_adapter(tmp_path / kind, base_folder, **KINDS[kind])
    put(device, read(folder))
    assert_same_as_peft(base_folder, device, folder)
    assert not torch.equal(logits(device.model), logits(base_of(base_folder))), "without effect, it proves nothing"


def test_modules_of_one_that_left_are_filled_by_the_next_of_its_configuration_alone(tmp_path, base_folder):
    device = DeviceAdapters(base_of(base_folder), 2)
    made = {"one": {}, "like it": {}, "stronger": {"lora_alpha": 64}, "one more": {}}
    names = []
    for seed, (key, how) in enumerate(made.items()):
        folder = make_adapter(tmp_path / key, base_folder, rank=3, seed=seed, **how)
        put(device, read(folder, key))
        names.append(device._held[key].name)
        expected = PeftModel.from_pretrained(base_of(base_folder), folder)
        device.activate(key)
        assert torch.equal(logits(device.model), logits(expected)), key
        device.remove(key)
    assert names[0] == names[1] == names[3] != names[2]


def test_gpt2_s_transposed_layers_too(tmp_path):
    base_folder = make_base(tmp_path / "base", "gpt2")
    device = DeviceAdapters(base_of(base_folder), 2)
    for name, targets in (("one", "all-linear"), ("two", ["c_attn"])):
        folder = make_adapter(tmp_path / name, base_folder, targets=targets)
        put(device, read(folder))
        assert_same_as_peft(base_folder, device, folder)
        assert not torch.equal(logits(device.model), logits(base_of(base_folder))), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_on_a_4_bit_base_too(tmp_path, base_folder, adapter_folders, stored):
    """As PeftModel.from_pretrained has it: 32 bits over a base that computes in 16, whatever the file holds."""
    ours, theirs = (load_base(str(base_folder), device="cpu", dtype="bfloat16").model for _ in range(2))
    device = DeviceAdapters(ours, 2)
    folder = shutil.copytree(adapter_folders["red"], tmp_path / "red")
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor.to(stored) for key, tensor in load_file(file).items()}, file)
    for name in ("green", "red"):
        put(device, read(folder if name == "red" else adapter_folders[name]))
    expected = PeftModel.from_pretrained(theirs, folder, adapter_name="ref")
    name = device._held["red"].name
    for path, layer in layers(expected.base_model.model).items():
        held = dict(device.layers_of("red"))[path]
        assert of_adapter(held, name) == of_adapter(layer, "ref")
        for side in ("lora_A", "lora_B"):
            weight = getattr(held, side)[name].weight
            assert weight.dtype == torch.float32
            assert torch.equal(weight, getattr(layer, side)["ref"].weight)
    device.activate("red")
    assert torch.equal(logits(device.model), logits(expected))


def test_an_install_in_pieces_is_not_seen_before_it_is_whole(base_folder, adapter_folders):
    """Layer after layer is wrapped and filled while others are served: each forward in between must be theirs."""
    device = DeviceAdapters(base_of(base_folder), 4)
    alone = logits(device.model)
    put(device, read(adapter_folders["green"]))
    device.activate("green")
    green = logits(device.model)
    device.begin(read(adapter_folders["red"]))
    pieces, touched = 0, 0
    while not device.advance(0):
        pieces += 1
        assert torch.equal(logits(device.model), green)
        device.activate(None)
        assert torch.equal(logits(device.model), alone)
        device.activate("green")
        touched += any("adapter_1" in layer.lora_A for layer in layers(device.model).values())
    assert pieces > 14, "a piece is at most one of the model's modules"
    assert touched, "it was seen half installed, or this test proves nothing"
    assert_same_as_peft(base_folder, device, adapter_folders["red"])


def test_a_refusal_at_any_module_takes_out_all_that_came_before(base_folder, adapter_folders):
    """Whole or nothing, whichever tensor is missing, odd, or of a wrong shape."""
    device = DeviceAdapters(base_of(base_folder), 2)
    put(device, read(adapter_folders["green"]))
    device.activate("green")
    before, keys = logits(device.model), set(device.model.state_dict())
    whole = read(adapter_folders["red"])
    for key in list(whole.tensors)[::5]:
        for wrong in ("missing", "odd", "shape"):
            tensors = dict(whole.tensors)
            tensor = tensors.pop(key)
            if wrong == "odd":
                tensors |= {key: tensor, key.replace("layers", "floors"): tensor}
            if wrong == "shape":
                tensors[key] = tensor[:, :-1]
            device.begin(HostAdapter("half", whole.config, tensors))
            with pytest.raises(AdapterRefused, match=r"base_model\.model"):
                device.advance(inf)
            assert torch.equal(logits(device.model), before)
            assert list(device._peft.peft_config) == ["adapter_0"]
            assert not [k for k in device.model.state_dict() if "lora_" in k and "adapter_0" not in k]
    assert len(device.model.state_dict()) == len(keys)
    put(device, whole)  # and its slot is free again
    assert_same_as_peft(base_folder, device, adapter_folders["red"])


def test_activation_is_peft_s_set_adapter(tmp_path, base_folder, adapter_folders):
    device = DeviceAdapters(base_of(base_folder), 8)
    theirs = base_of(base_folder)
    for name, folder in adapter_folders.items():
        put(device, read(folder))
        if isinstance(theirs, PeftModel):
            theirs.load_adapter(folder, name)
        else:
            theirs = PeftModel.from_pretrained(theirs, folder, adapter_name=name)
    answers = []
    for key in ("red", "head", "red", "green", "blue"):
        theirs.set_adapter(key, inference_mode=True)
        device.activate(key)
        name = device._held[key].name
        assert device._peft.active_adapter == device._peft.base_model.active_adapter == name
        assert device._peft.active_adapters == [name]
        assert all(layer.active_adapters == [name] and not layer.merged for layer in layers(device.model).values())
        answers.append(logits(device.model))
        assert torch.equal(answers[-1], logits(theirs)), key
    device.activate(None)
    assert device._peft.active_adapters == []
    with theirs.disable_adapter():
        assert torch.equal(logits(device.model), logits(theirs))
    assert not torch.equal(answers[0], answers[1]), "the adapters must differ, or this test proves nothing"


def test_a_swap_costs_the_same_however_many_adapters_are_loaded(base_folder, adapter_folders):
    """peft's walks every adapter in every layer: 22 ms with 8 on 22 layers. Counted in lines run, not in seconds."""

    def lines_of_a_swap(adapters: int) -> int:
        device, lines = DeviceAdapters(base_of(base_folder), adapters), 0
        for number in range(adapters):
            put(device, read(adapter_folders["red"], f"red{number}"))
        device.activate("red0")

        def count(*_):
            nonlocal lines
            lines += 1
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            device.activate("red1")
        finally:
            sys.settrace(before)
        return lines

    assert lines_of_a_swap(2) == lines_of_a_swap(9) > 14


def test_slots_are_allotted_and_given_back_and_each_layer_is_told(base_folder, adapter_folders):
    device, told = DeviceAdapters(base_of(base_folder), 3), {}

    def filled(layer, slot, name) -> None:
        assert not layer.lora_A[name].weight.is_meta
        assert (id(layer), slot) not in told
        told[id(layer), slot] = name

    device._routing.filled = filled
    device._routing.cleared = lambda layer, slot: told.pop((id(layer), slot), None)
    for name in ("red", "green", "blue"):
        put(device, read(adapter_folders[name]))
    assert {slot for _, slot in told} == {0, 1, 2}
    assert len(told) == sum(len(list(device.layers_of(name))) for name in ("red", "green", "blue"))
    device.remove("green")
    assert {slot for _, slot in told} == {0, 2}
    put(device, read(adapter_folders["head"]))
    assert {slot for _, slot in told} == {0, 1, 2}
    for name in ("red", "blue", "head"):
        device.remove(name)
    assert not told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_kept_in_one_dtype_whatever_the_file_s(base_folder, adapter_folders, dtype):
    device = DeviceAdapters(base_of(base_folder), 2, dtype)
    for name, stored in (("red", torch.bfloat16), ("green", torch.float32)):
        whole = read(adapter_folders[name])
        put(device, HostAdapter(name, whole.config, {k: t.to(stored) for k, t in whole.tensors.items()}))
        for path, layer in device.layers_of(name):
            weight = layer.lora_A[device._held[name].name].weight
            assert weight.dtype == dtype
            tensor = whole.tensors[f"base_model.model.{path}.lora_A.weight"]
            assert torch.equal(weight, tensor.to(stored).to(dtype))


def test_memory_is_handed_on_when_the_last_view_of_it_is_gone():
    memory = HostMemory()
    flat, block = memory.bfloat16(5000)
    address, view = flat.data_ptr(), flat[7:9].fill_(3)
    block.hand_on()
    del flat
    other, _ = memory.bfloat16(5000)
    other.fill_(4)
    assert other.data_ptr() != address
    assert view.tolist() == [3, 3]
    del view
    assert memory.bfloat16(2501)[0].data_ptr() == address, "handed on, and large enough"


def test_memory_of_another_size_is_not_kept():
    memory = HostMemory()
    for first, second in ((5000, 2400), (5000, 5001)):
        flat, block = memory.bfloat16(first)
        block.hand_on()
        del flat
        assert len(memory._spare) == 1
        assert memory.bfloat16(second)[0].shape == (second,)
        assert memory._spare == [], "neither that, nor what was not handed on"


@needs_kernels
def test_adapters_that_come_and_go_answer_as_ever(base_folder, adapter_folders):
    """In room for two, each comes to lie where one that was evicted lay."""
    engine = Engine(load_base(str(base_folder), device="cpu"), EngineConfig(max_loras=1, max_host_loras=2))
    params = SamplingParams(max_tokens=6, temperature=0)
    for name, folder in adapter_folders.items():
        engine.add_adapter(name, folder)
    first = {name: engine.generate(["the quick"], params, name)[0].token_ids for name in adapter_folders}
    assert len({*map(tuple, first.values())}) > 1
    for _ in range(3):
        for name in adapter_folders:
            assert engine.generate(["the quick"], params, name)[0].token_ids == first[name]


@pytest.mark.parametrize("dtype", [None, pytest.param(torch.bfloat16, marks=needs_kernels)])
def test_a_thousand_loads_and_unloads_leave_nothing(base_folder, adapter_folders, dtype):
    """Memory was not freed after an unload elsewhere (vllm#42207), and peft keeps nearly a dozen things under an
    adapter's name in every layer. Through both tiers, from files; counted once the layers are wrapped and warm.
    """
    adapters = {f"{name}{i}": folder for i in range(3) for name, folder in adapter_folders.items()}
    pool, woken = ThreadPoolExecutor(1), threading.Event()
    device = DeviceAdapters(base_of(base_folder), 3)
    reader = AdapterReader(describe_base(str(base_folder)), max_rank=64, dtype=dtype)

    def load(key) -> HostAdapter:
        return reader.read(key, adapters[key])

    residency = Residency(device, load, pool, 3, 4, Unobserved(), woken.set)

    def cycle(key) -> None:
        while residency.want(key) is not Place.READY:
            residency.install(inf)
            assert woken.wait(10)
            woken.clear()
        device.activate(key)
        residency.pin(key)
        residency.unload(key)
        residency.unpin(key)

    def counted() -> tuple[int, int, int, int]:
        gc.collect()
        blocks = sys.getallocatedblocks()  # also of strings and numbers, which the collector does not track
        kinds = [type(each) for each in gc.get_objects()]  # not isinstance, which asks lazy objects who they are
        tensors, modules = (sum(issubclass(kind, each) for kind in kinds) for each in (torch.Tensor, torch.nn.Module))
        return tensors, modules, len(kinds), blocks

    keys = itertools.cycle(key for key in adapters if not key.startswith("red"))  # few layers: it takes seconds
    for key in (*adapters, *itertools.islice(keys, 100)):
        cycle(key)
    tensors, modules, objects, blocks = counted()
    resident_bytes = psutil.Process().memory_info().rss
    for _ in range(1000):
        cycle(next(keys))
    assert counted()[:2] == (tensors, modules)
    assert counted()[2] - objects < 1000, "less than one object a cycle"
    assert counted()[3] - blocks < 1000
    assert psutil.Process().memory_info().rss - resident_bytes < 8 << 20
    assert (residency.in_host, residency.on_device, residency.loading) == ((), (), ())
    assert device._peft.peft_config == {}
    for layer in layers(device.model).values():
        assert all(len(getattr(layer, attribute)) <= 3 for attribute in PER_ADAPTER), "empty, and as many as slots"
        assert all(parameter.is_meta for name, parameter in layer.named_parameters() if "lora_" in name)
        assert layer.active_adapters == []
    pool.shutdown()


def test_an_adapter_in_host_memory_needs_its_file_no_more(tmp_path, base_folder, adapter_folders):
    """Its tensors were views of the file: memory that the system takes back and reads again, on the engine's thread."""
    folder = shutil.copytree(adapter_folders["red"], tmp_path / "red")
    held = AdapterReader(describe_base(str(base_folder)), max_rank=8).read("red", folder)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        file.write(bytes(sum(tensor.nbytes for tensor in held.tensors.values())))
    expected = load_file(adapter_folders["red"] / "adapter_model.safetensors")
    assert held.tensors.keys() == expected.keys()
    assert all(torch.equal(held.tensors[key], expected[key]) for key in expected)


def test_who_runs_goes_on_while_another_s_adapter_is_put_on_the_device(base_folder, adapter_folders):
    """With a share of nothing each step does one module, and green's tokens come between."""
    base = load_base(str(base_folder), quantization="none", device="cpu", dtype="float32")
    engine = Engine(base, EngineConfig(load_share=0))
    for name in ("red", "green"):
        engine.add_adapter(name, adapter_folders[name])
    params = SamplingParams(max_tokens=90, temperature=0, logit_bias={0: -100})
    green, red = (Request(name, base.tokenizer("the quick").input_ids, params, name) for name in ("green", "red"))
    engine.add(green)
    while not green.output_ids:
        engine.step()
    engine.add(red)
    meanwhile = 0
    while engine.has_work:
        meanwhile += bool(engine.step()) and not red.output_ids
    assert meanwhile > 14, "a step for each module that red changes, at least"
    assert engine.generate(["the quick"], params, "red")[0].token_ids == red.output_ids
    assert engine.generate(["the quick"], params, "green")[0].token_ids == green.output_ids
    assert green.output_ids != red.output_ids


def test_an_adapter_that_is_put_on_the_device_in_time_runs_in_the_step_that_asked_for_it(base_folder, adapter_folders):
    base = load_base(str(base_folder), quantization="none", device="cpu", dtype="float32")
    engine = Engine(base, EngineConfig(load_share=1e6))
    for name in ("red", "green"):
        engine.add_adapter(name, adapter_folders[name])
    params = SamplingParams(max_tokens=9, temperature=0, logit_bias={0: -100})
    ids = base.tokenizer("the quick").input_ids
    runs, red, green = (Request(str(name), ids, params, name) for name in (None, "red", "green"))
    engine.add(runs)
    engine.step()
    engine.add(red), engine.add(green)
    assert {delta.request for delta in engine.step()} == {runs, red, green}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness is the process's")
def test_a_load_stands_back_behind_the_engine_s_threads(base_folder, adapter_folders):
    niceness = []

    def fetch(key):
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return nullcontext(adapter_folders[key])

    base = load_base(str(base_folder), quantization="none", device="cpu", dtype="float32")
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    Engine(base, fetch=fetch).generate(["the quick"], SamplingParams(max_tokens=1), "red")
    assert niceness == [10]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == own


def test_an_adapter_added_by_hand_comes_back_after_it_left_host_memory(base_folder, adapter_folders):
    """It was then said never to have been added."""
    base = load_base(str(base_folder), quantization="none", device="cpu", dtype="float32")
    engine = Engine(base, EngineConfig(max_loras=1, max_host_loras=2))
    for name, folder in adapter_folders.items():
        engine.add_adapter(name, folder)
    assert len(engine.residency.in_host) == 2
    params = SamplingParams(max_tokens=8, temperature=0)
    answers = engine.generate(["the quick"] * 4, params, list(adapter_folders))
    assert len({tuple(answer.token_ids) for answer in answers}) == 4
