"""What an adapter must be. Each test spoils one thing and reads the reason; the unspoiled one passes."""

import json
import os
import struct
from dataclasses import replace

import numpy as np
import pytest

from loraplex_registry.base import BaseDescription, describe_base
from loraplex_registry.errors import InvalidAdapter
from loraplex_registry.validate import Limits, check_adapter

from .conftest import HIDDEN, INNER, VOCAB, Adapter, make_base, make_receipt

UP0 = "base_model.model.model.layers.0.mlp.up_proj"
A0, B0 = f"{UP0}.lora_A.weight", f"{UP0}.lora_B.weight"


@pytest.fixture
def check(base, tmp_path):
    """check(adapter, receipt=…) → CheckedAdapter, against the tiny base."""
    description = describe_base(base)

    def check(adapter, receipt=None, limits=None, base=description):
        return check_adapter(adapter.write(tmp_path / "adapter", receipt), base, limits)

    return check


@pytest.fixture
def refused(check):
    """refused(adapter, …) → the reasons."""

    def refused(adapter, **options) -> tuple[str, ...]:
        with pytest.raises(InvalidAdapter) as caught:
            check(adapter, **options)
        return caught.value.reasons

    return refused


def test_a_good_adapter(check, base):
    checked = check(Adapter(rank=4), receipt=make_receipt(base))
    assert checked.rank == 4
    assert checked.targets == ("down_proj", "up_proj")
    assert (checked.tensors[A0].dtype, checked.tensors[A0].shape) == ("F32", (4, HIDDEN))
    assert (checked.tensors[B0].dtype, checked.tensors[B0].shape) == ("F32", (INNER, 4))
    assert [entry.path for entry in checked.files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "receipt.json",
    ]


# --- files ---


@pytest.mark.parametrize("name", ["adapter_model.bin", "training_args.bin", "deep/er/optimizer.PT", "a.pkl", "b.ckpt"])
def test_pickles(check, refused, tmp_path, name):
    file = tmp_path / "adapter" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\x80\x04N.")
    (reason,) = refused(Adapter())
    assert reason.startswith(f"{name} is a pickle")
    file.unlink()
    check(Adapter())


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_files(base, tmp_path, name):
    folder = Adapter().write(tmp_path / "adapter")
    (folder / name).unlink()
    with pytest.raises(InvalidAdapter, match=f"{name} is missing"):
        check_adapter(folder, describe_base(base))
    with pytest.raises(InvalidAdapter, match="is not a folder"):
        check_adapter(tmp_path / "nowhere", describe_base(base))


def test_links_and_odd_files(refused, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").symlink_to("/etc/passwd")
    (tmp_path / "adapter" / "deep").symlink_to("/etc")
    os.mkfifo(tmp_path / "adapter" / "pipe")
    assert refused(Adapter()) == (
        "README.md is a symbolic link; an adapter holds its own files",
        "deep is a symbolic link; an adapter holds its own files",
        "pipe is not a regular file",
    )


def test_hidden_files_are_no_part(check, tmp_path):
    (tmp_path / "adapter" / ".cache").mkdir(parents=True)
    (tmp_path / "adapter" / ".cache" / "x.bin").write_bytes(b"x")
    assert len(check(Adapter()).files) == 2


def test_too_large(refused, check):
    (reason,) = refused(Adapter(), limits=Limits(max_bytes=100))
    assert reason.endswith("bytes in all, at most 100 are taken")


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-1], lambda data: data[:20], lambda data: b"", lambda d: d + b"x"]
)
def test_broken_safetensors(base, tmp_path, spoil):
    folder = Adapter().write(tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(spoil(weights.read_bytes()))
    with pytest.raises(InvalidAdapter, match="is not a whole safetensors file"):
        check_adapter(folder, describe_base(base))


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"r": NaN}', "[" * 100_000])
def test_broken_config(base, tmp_path, text):
    folder = Adapter().write(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json"):
        check_adapter(folder, describe_base(base))


# --- the configuration ---


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'; only LORA"),
        ({"peft_type": None}, "peft_type is None; only LORA"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type is 'SEQ_2_SEQ_LM'; only CAUSAL_LM"),
        ({"use_dora": True}, "use_dora is True: DoRA adapters are not served"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']: whole modules"),
        ({"bias": "all"}, "bias is 'all'; adapters with trained biases"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]: trained token"),
        ({"lora_bias": "yes"}, "lora_bias is 'yes', expected true or false"),
        ({"brand_new_option": {"a": 1}}, "brand_new_option is {'a': 1}: this option is not served"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': it changes the base's weights"),
        ({"r": 0}, "rank r is 0, expected a whole number from 1 to 256"),
        ({"r": 257}, "rank r is 257, expected"),
        ({"r": "8"}, "rank r is '8', expected"),
        ({"r": True}, "rank r is True, expected"),
        ({"rank_pattern": {"up_proj": 1000}}, "rank up_proj is 1000, expected"),
        ({"rank_pattern": [1]}, "rank_pattern is [1], expected an object"),
        ({"lora_alpha": None}, "alpha lora_alpha is None, expected a number"),
        ({"lora_alpha": 10**400}, "alpha lora_alpha is 1000"),
        ({"fan_in_fan_out": "yes"}, "fan_in_fan_out is 'yes', expected true or false"),
        ({"alpha_pattern": {"x": "y"}}, "alpha x is 'y', expected a number"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": [1]}, "target_modules is [1], expected names"),
        ({"target_modules": "(a+)+b"}, "target_modules: the pattern '(a+)+b' is too long or repeats too much"),
        ({"target_modules": "(a"}, "target_modules: '(a' is not a pattern"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1', expected layer numbers"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, expected a string"),
    ],
)
def test_configuration(refused, change, reason):
    assert any(found.startswith(reason) for found in refused(Adapter(config=change)))


def test_every_reason_is_told(refused):
    assert len(refused(Adapter(config={"use_dora": True, "bias": "all", "task_type": "SEQ_CLS"}))) == 3


# --- the base ---


def test_another_base(refused, check, base, tmp_path):
    other = make_base(tmp_path / "other", seed=9)
    (reason,) = refused(Adapter(), receipt=make_receipt(other))
    trained, given = make_receipt(other)["base"]["fingerprint"], describe_base(base).fingerprint
    assert reason == f"trained on base tiny/base fingerprint {trained}, given base {base} fingerprint {given}"
    check(Adapter(config={"base_model_name_or_path": "some/other-name"}), receipt=make_receipt(base))


def test_headers_only_need_the_same_name(refused, check, base):
    description = replace(describe_base(base), id="tiny/base", fingerprint=None)
    check(Adapter(), receipt=make_receipt(base), base=description)
    (reason,) = refused(Adapter(), receipt=make_receipt(base), base=replace(description, id="tiny/other"))
    assert reason.startswith("trained on base tiny/base, given base tiny/other")


def test_missing_side(refused):
    adapter = Adapter()
    del adapter.tensors[B0]
    assert refused(adapter) == (f"{UP0}.lora_A.weight has no lora_B",)


def test_unknown_module_names_the_nearest(refused):
    adapter = Adapter()
    for side in "AB":
        wrong = f"base_model.model.model.layers.0.mlp.upp_proj.lora_{side}.weight"
        adapter.tensors[wrong] = adapter.tensors[f"{UP0}.lora_{side}.weight"]
    adapter.config["target_modules"].append("upp_proj")
    reasons = refused(adapter)
    assert "no module 'model.layers.0.mlp.upp_proj' in base" in reasons[0]
    assert reasons[0].endswith("the nearest is 'model.layers.0.mlp.up_proj'")
    assert reasons[1].endswith("is called 'upp_proj'; the nearest is 'up_proj'")


@pytest.mark.parametrize("key", ["base_model.model.x.lora_A.default.weight", "x.lora_A.weight", "extra"])
def test_foreign_keys(refused, key):
    adapter = Adapter()
    adapter.tensors[key] = np.zeros((4, 4), np.float32)
    assert refused(adapter)[0].startswith(f"{key}: expected base_model.model.<module>.lora_A.weight")


EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"


def on_ends(*targets: str, rank: int = 4, **config) -> Adapter:
    """An adapter of the embedding, or the head, or both, and nothing else."""
    adapter = Adapter(rank=rank, targets=(), config={"target_modules": list(targets), **config})
    if "embed_tokens" in targets:
        adapter.tensors[f"{EMBEDDING}.lora_embedding_A"] = np.zeros((rank, VOCAB), np.float32)
        adapter.tensors[f"{EMBEDDING}.lora_embedding_B"] = np.zeros((HIDDEN, rank), np.float32)
    if "lm_head" in targets:
        adapter.tensors[f"{HEAD}.lora_A.weight"] = np.zeros((rank, HIDDEN), np.float32)
        adapter.tensors[f"{HEAD}.lora_B.weight"] = np.zeros((VOCAB, rank), np.float32)
    return adapter


def test_embeddings_and_a_tied_head(check):
    checked = check(on_ends("embed_tokens", "lm_head", rank=5))
    assert (checked.rank, checked.targets) == (5, ("embed_tokens", "lm_head"))
    assert check(on_ends("embed_tokens")).rank == 4
    check(on_ends("lm_head"))


def test_what_does_not_fit_an_embedding(refused):
    adapter = on_ends("embed_tokens")
    adapter.tensors[f"{EMBEDDING}.lora_embedding_A"] = np.zeros((4, VOCAB - 1), np.float32)
    assert refused(adapter) == (
        f"{EMBEDDING}.lora_embedding_A has shape [4, {VOCAB - 1}], expected [4, {VOCAB}] (rank 4)",
    )
    adapter = on_ends("embed_tokens")
    del adapter.tensors[f"{EMBEDDING}.lora_embedding_B"]
    assert refused(adapter) == (f"{EMBEDDING}.lora_embedding_A has no lora_embedding_B",)
    adapter = on_ends("embed_tokens")
    adapter.tensors[f"{EMBEDDING}.lora_A.weight"] = np.zeros((4, HIDDEN), np.float32)
    assert "expected lora_embedding_A and lora_embedding_B for this module" in refused(adapter)[0]
    adapter = Adapter(config={"target_modules": ["up_proj", "down_proj", "embed_tokens"]})
    assert refused(adapter) == ("target_modules names 'model.embed_tokens', which has no tensors in the file",)
    assert "peft has no LoRA biases on embeddings" in refused(on_ends("embed_tokens", lora_bias=True))[0]


def test_the_bases_own_weights_saved_beside_an_adapter(refused):
    """What peft's save_pretrained adds unless it is told not to."""
    adapter = on_ends("lm_head")
    adapter.tensors[f"{HEAD}.base_layer.weight"] = np.zeros((VOCAB, HIDDEN), np.float32)
    assert "save the adapter with save_embedding_layers=False" in refused(adapter)[0]


def test_adapters_tied_to_each_other(refused, check, tmp_path):
    adapter = on_ends("embed_tokens", "lm_head", ensure_weight_tying=True)
    assert all("ensure_weight_tying is True" in reason for reason in refused(adapter))
    check(Adapter(config={"ensure_weight_tying": True}))  # it says nothing about what is adapted


def test_a_head_that_is_not_there(tmp_path, refused):
    base = describe_base(make_base(tmp_path / "headless", tie_word_embeddings=False))
    assert "no module 'lm_head' in base" in refused(on_ends("lm_head"), base=base)[0]


def test_a_head_that_the_checkpoint_calls_embed_out(check, refused):
    shapes = {"gpt_neox.embed_in.weight": (VOCAB, HIDDEN), "embed_out.weight": (VOCAB, HIDDEN)}
    neox = BaseDescription("neox", None, None, "GPTNeoXForCausalLM", shapes)
    assert check(on_ends("lm_head"), base=neox).targets == ("lm_head",)
    wrong = on_ends("lm_head")
    wrong.tensors[f"{HEAD}.lora_A.weight"] = np.zeros((4, HIDDEN + 1), np.float32)
    assert "has shape" in refused(wrong, base=neox)[0]


def test_a_head_beside_conv1d_is_linear(check):
    """gpt2: nothing of the module's path stands before lm_head, and its weight is (outputs, inputs)."""
    shapes = {"wte.weight": (VOCAB, HIDDEN), "wpe.weight": (99, HIDDEN), "h.0.attn.c_attn.weight": (HIDDEN, 24)}
    gpt2 = BaseDescription("gpt2", None, None, "GPT2LMHeadModel", shapes, tied=True)
    adapter = on_ends("lm_head", fan_in_fan_out=True)
    adapter.config["target_modules"] = ["lm_head", "c_attn", "transformer.wpe"]
    key = "base_model.model.transformer."
    for part, shape in (("lora_A", (4, HIDDEN)), ("lora_B", (24, 4))):
        adapter.tensors[f"{key}h.0.attn.c_attn.{part}.weight"] = np.ones(shape, np.float32)
    adapter.tensors |= {f"{key}wpe.lora_embedding_A": np.ones((4, 99), np.float32)}
    adapter.tensors |= {f"{key}wpe.lora_embedding_B": np.ones((HIDDEN, 4), np.float32)}
    assert check(adapter, base=gpt2).targets == ("c_attn", "lm_head", "wpe")
    assert check(on_ends("lm_head"), base=gpt2).targets == ("lm_head",)


def test_lora_biases(check, refused):
    adapter = Adapter(config={"lora_bias": True})
    assert len(refused(adapter)) == 4
    for key in [key for key in adapter.tensors if "lora_B" in key]:
        adapter.tensors[key.replace(".weight", ".bias")] = np.zeros(len(adapter.tensors[key]), np.float32)
    assert check(adapter).rank == 4
    adapter.config["lora_bias"] = False
    assert all("expected lora_A.weight and lora_B.weight for this module" in reason for reason in refused(adapter))
    adapter.config["lora_bias"] = True
    adapter.tensors[B0.replace(".weight", ".bias")] = np.zeros(INNER + 1, np.float32)
    assert refused(adapter)[0].endswith(f"lora_B.bias has shape [{INNER + 1}], expected [{INNER}] (rank 4)")


def test_names_that_single_experts_share(check, refused):
    """The experts of a layer are one tensor in the model: peft's names reach the modules beside them."""
    shapes = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (INNER, HIDDEN) for i in range(3)}
    shapes |= {"model.layers.0.mlp.shared_expert.up_proj.weight": (INNER, HIDDEN)}
    experts = BaseDescription("experts", None, None, "Qwen2MoeForCausalLM", shapes)

    def tensors(module: str) -> dict[str, np.ndarray]:
        key = f"base_model.model.model.layers.0.mlp.{module}.up_proj"
        return {
            f"{key}.lora_A.weight": np.ones((4, HIDDEN), np.float32),
            f"{key}.lora_B.weight": np.ones((INNER, 4), np.float32),
        }

    adapter = Adapter(targets=(), config={"target_modules": ["up_proj"]}, tensors=tensors("shared_expert"))
    assert check(adapter, base=experts).targets == ("up_proj",)
    adapter.tensors |= tensors("experts.1")  # made when experts were modules, and half of it lost
    assert [reason.partition("which")[0] for reason in refused(adapter, base=experts)] == [
        "target_modules names 'model.layers.0.mlp.experts.0.up_proj', ",
        "target_modules names 'model.layers.0.mlp.experts.2.up_proj', ",
    ]


def test_wrong_shapes_name_found_and_expected(refused):
    adapter = Adapter()
    adapter.tensors[A0] = adapter.tensors[A0][:, :-1]
    assert refused(adapter) == (f"{A0} has shape [4, {HIDDEN - 1}], expected [4, {HIDDEN}] (rank 4)",)


def test_rank_must_be_the_configs(refused, check):
    adapter = Adapter(rank=4, config={"r": 8})
    assert len(refused(adapter)) == 8
    adapter = Adapter(rank=4, config={"r": 8, "rank_pattern": {"up_proj": 4, r"layers\.\d.mlp.down_proj": 4}})
    assert check(adapter).rank == 4


def test_tensors_that_the_config_does_not_target(refused):
    adapter = Adapter(config={"target_modules": ["up_proj"]})
    assert all(reason.endswith("so its weights would be ignored") for reason in refused(adapter))


def test_targets_without_tensors(refused, check):
    adapter = Adapter(config={"target_modules": ["up_proj", "down_proj", "q_proj"]})
    assert refused(adapter)[0] == (
        "target_modules names 'model.layers.0.self_attn.q_proj', which has no tensors in the file"
    )
    check(Adapter(config={"target_modules": ["up_proj", "down_proj", "q_proj"], "exclude_modules": ["q_proj"]}))


def test_layers_to_transform(refused, check):
    adapter = Adapter(config={"layers_to_transform": [1]})
    assert len(refused(adapter)) == 2
    for key in [key for key in adapter.tensors if ".0." in key]:
        del adapter.tensors[key]
    check(adapter)


def test_patterns_and_all_linear(refused, check):
    check(Adapter(config={"target_modules": r".*\.mlp\.(up|down)_proj"}))
    check(Adapter(config={"target_modules": "all-linear"}, targets=("up_proj", "down_proj", "q_proj")))
    assert "q_proj" in refused(Adapter(config={"target_modules": "all-linear"}))[0]
    for pattern, named in (
        (r".*(up_proj|down_proj|norm)", "model.norm"),
        (r".*(up_proj|down_proj|mlp)", "layers.0.mlp"),
    ):
        reasons = refused(Adapter(config={"target_modules": pattern}))
        assert any(named in reason and "no linear layer" in reason for reason in reasons), pattern


def test_conv1d_stores_inputs_first(tmp_path, refused):
    """gpt2: the checkpoint lacks 'transformer.' and its Conv1D weights are (inputs, outputs)."""
    gpt2 = BaseDescription("gpt2", None, None, "GPT2LMHeadModel", {"h.0.attn.c_attn.weight": (8, 24)}, tied=True)
    adapter = Adapter(targets=(), config={"target_modules": ["c_attn"], "fan_in_fan_out": True})
    key = "base_model.model.transformer.h.0.attn.c_attn"
    adapter.tensors = {
        f"{key}.lora_A.weight": np.ones((4, 8), np.float16),
        f"{key}.lora_B.weight": np.ones((24, 4), np.float16),
    }
    assert check_adapter(adapter.write(tmp_path / "gpt2"), gpt2).targets == ("c_attn",)
    adapter.config["target_modules"] = r"transformer\.h\.\d+\.attn\.c_attn"
    check_adapter(adapter.write(tmp_path / "gpt2"), gpt2)
    adapter.tensors[f"{key}.lora_A.weight"] = np.ones((4, 24), np.float16)
    assert refused(adapter, base=gpt2)[0].endswith("expected [4, 8] (rank 4)")


# --- values ---


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(refused, check, dtype, value):
    adapter = Adapter()
    adapter.tensors[B0] = adapter.tensors[B0].astype(dtype)
    check(adapter)
    adapter.tensors[B0][-1, -1] = value
    assert refused(adapter) == (f"{B0} holds NaN or infinite values",)


@pytest.mark.parametrize(
    ("bits", "fine"), [(0x3F80, True), (0x7F7F, True), (0x7F80, False), (0xFF80, False), (0x7FC1, False)]
)
def test_bfloat16_by_its_bits(base, tmp_path, bits, fine):
    """1.0 and the largest finite number pass; infinities and NaN do not. numpy cannot make the file: bytes can."""
    folder = Adapter(targets=("up_proj",)).write(tmp_path / "adapter")
    header, data = {}, b""
    for layer in range(2):
        for side, shape in (("A", [4, HIDDEN]), ("B", [INNER, 4])):
            raw = struct.pack("<H", bits) * (shape[0] * shape[1])
            key = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{side}.weight"
            header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
    head = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    if fine:
        found = check_adapter(folder, describe_base(base)).tensors[A0]
        assert (found.dtype, found.shape) == ("BF16", (4, HIDDEN))
    else:
        with pytest.raises(InvalidAdapter, match="NaN or infinite"):
            check_adapter(folder, describe_base(base))


def test_whole_numbers_are_no_weights(refused):
    adapter = Adapter()
    adapter.tensors[A0] = adapter.tensors[A0].astype(np.int8)
    assert refused(adapter)[0] == f"{A0}: dtype I8, expected one of F32, F16, BF16"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "other/1"}, "format is 'other/1'"),
        ({"metrics": {"f1": "high"}}, "metrics.f1 is 'high', expected a finite number"),
        ({"metrics": {"f1": 10**400}}, "expected a finite number"),
        ({"base": {"id": 3}}, "base.id is 3, expected a string"),
        ({"base": []}, None),
        ({"parent": "x"}, "receipt.json"),
    ],
)
def test_receipts(refused, check, base, change, reason):
    receipt = make_receipt(base) | change
    if reason is None:
        check(Adapter(), receipt=receipt)
    else:
        assert reason in refused(Adapter(), receipt=receipt)[0]
