"""Training by kernels against training by bitsandbytes' and peft's own layers: gradients, and whole runs."""

import shutil
from pathlib import Path

import pytest
import torch
from bases import make_base
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from loraplex_server.engine.model import load_base
from loraplex_server.kernels.native import Native, native
from loraplex_trainer.adapter import attach, attach_adapter, keep_quantized_layout, trainable_parameters
from loraplex_trainer.attention import Causal, Rotation, first_seen
from loraplex_trainer.data import make_batch
from loraplex_trainer.encoding import Example
from loraplex_trainer.fast import Packed, _Gate, _Linear, _Norm, use_kernels
from loraplex_trainer.head import head_in_pieces, loss_in_pieces, use_pieces
from loraplex_trainer.loop import loss_sum
from loraplex_trainer.packing import joined
from loraplex_trainer.run_file import load_config
from loraplex_trainer.sections import LoraSection

pytestmark = pytest.mark.skipif(not native(), reason=f"{native().why_not}; gcc comes with: apt-get install gcc")


@pytest.fixture(scope="module")
def base_folder(base_folder, tmp_path_factory) -> Path:
    """The other tests' base, with heads of a width that the kernels take."""
    folder = tmp_path_factory.mktemp("wide") / "base"
    shutil.copytree(base_folder, folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(base_folder, head_dim=32)).save_pretrained(folder)
    return folder


def quantized_linear(inputs, outputs, seed=0) -> Linear4bit:
    torch.manual_seed(seed)
    layer = Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
    )
    return layer.to("cpu")


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (128, 96), (192, 64), (2048, 256), (64, 5632)])
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 300])
def test_what_a_frozen_layer_hands_back_is_the_product_with_its_weight(inputs, outputs, rows):
    layer = quantized_linear(inputs, outputs)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).bfloat16().float()
    dy = torch.randn(rows, outputs, generator=torch.Generator().manual_seed(rows)).bfloat16()
    packed = Packed(layer)
    dx = packed.grad(dy)
    expected = dy.float() @ weight
    torch.testing.assert_close(dx.float(), expected, rtol=0, atol=2**-8 * float(expected.abs().max()))
    assert torch.equal(packed.grad(dy[:1]), dx[:1]), "the same bits in any company"


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_adapters_of_spans_are_added_to_a_frozen_layer_both_ways(rank):
    layer = quantized_linear(128, 96)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).bfloat16().float()
    random = torch.Generator().manual_seed(rank)
    x, dy = torch.randn(50, 128, generator=random).bfloat16(), torch.randn(50, 96, generator=random).bfloat16()
    spans = [(0, 5, 0.5), (5, 5, 9.0), (5, 37, 2.0)]  # the second is empty, and the last 13 tokens have none
    mine = [torch.randn(*shape, generator=random).requires_grad_() for shape in ((rank, 128), (96, rank)) * 3]
    wide = [part.detach().bfloat16().float().requires_grad_() for part in mine]
    given, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    out = _Linear.apply(given, Packed(layer), spans, *mine)
    out.backward(dy)
    adds = [s * exact[i:j] @ a.T @ b.T for (i, j, s), a, b in zip(spans, wide[::2], wide[1::2], strict=True)]
    expected = exact @ weight.T + torch.cat([*adds, torch.zeros(13, 96)])
    expected.backward(dy.float())
    assert alike(out, expected)
    for found, other in zip([given, *mine], [exact, *wide], strict=True):
        assert torch.allclose(found.grad.float(), other.grad, rtol=0, atol=2**-6 * other.grad.abs().max().item())


def gradients(base_folder, fast, lora, ids) -> tuple[float, dict[str, torch.Tensor]]:
    base = load_base(str(base_folder), device="cpu", dtype="bfloat16")
    torch.manual_seed(0)
    model = attach_adapter(base, lora)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    changed = use_kernels(model) if fast else 0
    assert bool(changed) == fast
    torch.manual_seed(1)  # for dropout
    model.train()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trainable_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize(
    "lora",
    [
        LoraSection(rank=4, alpha=8),
        LoraSection(rank=40, alpha=8, rslora=True),
        LoraSection(rank=4, alpha=8, dropout=0.5),
        LoraSection(rank=4, alpha=8, target_modules=("q_proj", "down_proj")),
    ],
    ids=["plain", "wide", "dropout", "some"],
)
def test_gradients_are_those_of_the_reference(base_folder, lora):
    ids = torch.randint(2, 300, (3, 21), generator=torch.Generator().manual_seed(0))
    expected_loss, expected = gradients(base_folder, False, lora, ids)
    loss, found = gradients(base_folder, True, lora, ids)
    assert loss == pytest.approx(expected_loss, rel=0.003)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name].dtype, found[name].shape) == (torch.float32, grad.shape)
        alike = torch.nn.functional.cosine_similarity(found[name].flatten(), grad.flatten(), dim=0)
        assert alike > 0.995, name
        assert found[name].norm().item() == pytest.approx(grad.norm().item(), rel=0.05), name


def test_a_run_by_kernels_learns_what_the_reference_learns(train, write_run, receipt, tmp_path):
    losses, weights = {}, {}
    for kernels in (True, False, True):
        run = {"base__quantization": "nf4", "base__dtype": "bfloat16", "training__kernels": kernels}
        train(write_run(training__max_steps=30, **run))
        losses.setdefault(kernels, []).append(receipt()["losses"])
        weights.setdefault(kernels, []).append(load_file(tmp_path / "adapters/tagger/adapter_model.safetensors"))
    fast, reference = losses[True][0], losses[False][0]
    assert fast["train_first"] == pytest.approx(reference["train_first"], rel=0.003)
    assert fast["train_last"] == pytest.approx(reference["train_last"], rel=0.1)
    assert fast["train_last"] < 0.9 * fast["train_first"]
    assert fast["heldout"] == pytest.approx(reference["heldout"], rel=0.1)
    first, again = weights[True]
    assert all(torch.equal(first[name], again[name]) for name in first), "equal runs give equal bytes"
    assert any(not torch.equal(first[name], weights[False][0][name]) for name in first), "or nothing was compared"


def test_adapters_that_look_at_the_base_s_weights_keep_bitsandbytes_layers(base_folder):
    base = load_base(str(base_folder), device="cpu", dtype="bfloat16")
    keep_quantized_layout(base.model)
    model = get_peft_model(base.model, LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    before = sum(layer.weight.quant_state is not None for layer in model.modules() if isinstance(layer, Linear4bit))
    changed = use_kernels(model)
    after = sum(layer.weight.quant_state is not None for layer in model.modules() if isinstance(layer, Linear4bit))
    assert (after, before - after) == (2, changed)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_layers_give_the_same_gradients(write_run, dropout):
    """Kernels are called anew in the backward pass: with the same bits, also where something is dropped."""
    found = []
    for checkpointing in (False, True):
        run = {"base__quantization": "nf4", "base__dtype": "bfloat16", "lora": {"rank": 4, "dropout": dropout}}
        config = load_config(write_run(training__gradient_checkpointing=checkpointing, **run))
        base = load_base(**config.base.load_options)
        torch.manual_seed(0)
        model = attach(base, config)
        assert use_kernels(model)
        with torch.no_grad():
            for parameter in trainable_parameters(model).values():
                parameter.normal_(std=0.05)
        ids = torch.randint(2, 300, (3, 21), generator=torch.Generator().manual_seed(0))
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in trainable_parameters(model).values())])
    assert len(found[0]) == 1 + 2 * 7 * 2
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))


@pytest.mark.parametrize("quantization", ["fp4", "int8"])
def test_other_quantizations_train_as_the_reference_does(write_run, train, receipt, quantization):
    """FP4 by kernels with its own book of values; of an 8-bit base only the gates are computed by them."""
    losses = []
    for kernels in (True, False):
        run = {"base__quantization": quantization, "base__dtype": "bfloat16", "training__kernels": kernels}
        train(write_run(training__max_steps=10, **run))
        losses.append(receipt()["losses"])
    assert losses[0]["train_first"] == pytest.approx(losses[1]["train_first"], rel=0.003)
    assert losses[0]["heldout"] == pytest.approx(losses[1]["heldout"], rel=0.1)


OTHERS = {
    "prompt": {"method": "prompt", "lora": {}},
    "prefix": {"method": "prefix", "lora": {}},
    "p_tuning": {"method": "p_tuning", "lora": {}},
    "dora": {"lora": {"rank": 4, "dora": True}},
    "whole-head": {"lora": {"rank": 4, "modules_to_save": ["lm_head", "norm"]}},
    "tokens": {"lora": {"rank": 4, "trainable_token_indices": [5, 6]}},
    "pissa": {"lora": {"rank": 4, "init": "pissa"}},
    "ia3": {"method": "ia3", "lora": {}, "base__quantization": "none"},
    "t5": {"base__task": "seq2seq"},
}


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in {"prompt", "dora", "whole-head", "t5"} else pytest.param(kind, marks=pytest.mark.slow)
        for kind in OTHERS
    ],
)
def test_what_is_more_than_two_matrices_is_learnt_as_by_the_reference(
    write_run, train, receipt, base_folder, tmp_path, kind
):
    """Its kernels leave out nothing that a method puts before the prompt, beside a layer or in its place."""
    run = {"base__quantization": "nf4", "base__dtype": "bfloat16"} | OTHERS[kind]
    if kind == "t5":
        run["base__model"] = str(make_base(tmp_path / "t5", base_folder, "t5"))
    losses = []
    for kernels in (True, False):
        train(write_run(training={"max_steps": 4, "batch_size": 48, "kernels": kernels, "log_every_steps": 1}, **run))
        losses.append(receipt()["losses"])
    fast, reference = losses
    assert fast["train_first"] == pytest.approx(reference["train_first"], rel=0.003)
    fell = reference["train_first"] - reference["train_last"]
    assert fell > 0.003
    assert fast["train_first"] - fast["train_last"] == pytest.approx(fell, rel=0.2, abs=0.003)


def alike(found, expected) -> bool:
    return torch.allclose(found.float(), expected.float(), rtol=0, atol=2**-7 * expected.abs().max().item())


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_a_norm_hands_back_what_torch_does(rows):
    random = torch.Generator().manual_seed(rows)
    x, dy, weight = (torch.randn(*shape, generator=random).bfloat16() for shape in ((rows, 96), (rows, 96), (96,)))
    wide = x.float().requires_grad_()
    expected = torch.nn.functional.rms_norm(wide, (96,), weight.float(), 1e-5)
    expected.backward(dy.float())
    mine = x.clone().requires_grad_()
    out = _Norm.apply(mine, weight, 1e-5)
    out.backward(dy)
    assert alike(out, expected)
    assert alike(mine.grad, wide.grad)


@pytest.mark.parametrize("rows", [1, 300])
def test_a_gate_hands_back_what_torch_does(rows):
    random = torch.Generator().manual_seed(rows)
    gate, up, dy = (3 * torch.randn(rows, 64, generator=random).bfloat16() for _ in range(3))
    wide = [gate.float().requires_grad_(), up.float().requires_grad_()]
    (torch.nn.functional.silu(wide[0]) * wide[1]).backward(dy.float())
    mine = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    _Gate.apply(*mine).backward(dy)
    for found, expected in zip(mine, wide, strict=True):
        assert alike(found.grad, expected.grad)


def prepared(base_folder, **config) -> PeftModel:
    base = load_base(str(base_folder), device="cpu", dtype="bfloat16")
    for name, value in config.items():
        setattr(base.model.config, name, value)
    torch.manual_seed(0)
    model = attach_adapter(base, LoraSection(rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("by", ["kernel", "torch"])
def test_the_loss_in_pieces_is_that_of_all_logits(base_folder, monkeypatch, packing, by):
    if by == "torch":  # as on a GPU
        monkeypatch.setattr("loraplex_trainer.head.native", lambda: Native(None))
    monkeypatch.setattr("loraplex_trainer.head.PIECE", 16)  # three pieces, the last of them short
    random = torch.Generator().manual_seed(0)
    rows = [
        Example(tuple(torch.randint(2, 300, (size,), generator=random).tolist()), ((3, size),)) for size in (24, 11, 9)
    ]
    batch = make_batch([joined(rows), rows[1]] if packing else rows, 0)
    model = prepared(base_folder)
    expected = loss_sum(model, batch)
    expected.backward()
    grads = {name: p.grad for name, p in trainable_parameters(model).items()}
    model.zero_grad()
    use_pieces(model)
    assert head_in_pieces(model)
    with torch.no_grad():
        assert loss_sum(model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    found = loss_sum(model, batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * found).backward()
    for name, parameter in trainable_parameters(model).items():
        torch.testing.assert_close(parameter.grad / 3, grads[name], rtol=0, atol=0.02 * float(grads[name].abs().max()))


def test_a_head_that_is_trained_or_followed_by_more_keeps_the_plain_loss(base_folder):
    capped = prepared(base_folder)
    head = capped.get_base_model().lm_head
    head.register_forward_hook(lambda *given: given[2] * 0.5)
    use_pieces(capped)
    assert head_in_pieces(capped) is None
    trained = prepared(base_folder)
    trained.get_base_model().lm_head.weight.requires_grad_(True)
    use_pieces(trained)
    assert head_in_pieces(trained) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_either_16_bit_type_hands_back_what_torch_does(dtype, monkeypatch):
    monkeypatch.setattr("loraplex_trainer.head.native", lambda: Native(None))
    monkeypatch.setattr("loraplex_trainer.head.PIECE", 5)
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(32, 300, bias=False, dtype=dtype), torch.randint(0, 300, (12,))
    given, plain = (torch.randn(12, 32, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    for hidden in (given, plain):
        hidden.requires_grad_()
    found = loss_in_pieces(given, head, labels)
    expected = cross_entropy(head(plain).float(), labels, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for loss in (found, expected):
        loss.backward()
    assert alike(given.grad, plain.grad)


def test_logits_that_are_no_numbers_give_a_loss_that_is_none(base_folder):
    for value in (float("nan"), float("inf")):
        hidden = torch.ones(2, 32, dtype=torch.bfloat16)
        head = torch.nn.Linear(32, 64, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            head.weight[5, 5] = value
        assert loss_in_pieces(hidden, head, torch.tensor([1, 2])).isnan()


def test_norms_and_gates_are_replaced_where_they_are_frozen(base_folder):
    base = load_base(str(base_folder), device="cpu", dtype="bfloat16")
    model = attach_adapter(base, LoraSection())
    base.model.model.norm.weight.requires_grad_(True)
    use_kernels(model)
    own = [module for module in base.model.modules() if "forward" in vars(module)]
    assert sum(type(module).__name__ == "LlamaRMSNorm" for module in own) == 4, "two in each layer, and not the last"
    assert sum(type(module).__name__ == "LlamaMLP" for module in own) == 2


@pytest.mark.parametrize("base", [{"dtype": "float32"}, {"dtype": "float32", "quantization": "none"}])
def test_a_base_in_float32_is_left_as_it_is(base_folder, base):
    model = attach_adapter(load_base(str(base_folder), device="cpu", **base), LoraSection())
    assert use_kernels(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "width"), [(1, 2, 1, 32), (40, 4, 2, 64), (150, 3, 3, 96)])
def test_attention_hands_back_what_torch_does(tokens, heads, kv_heads, width, packed):
    random = torch.Generator().manual_seed(tokens)
    shapes = [(2, tokens, count, width) for count in (heads, kv_heads, kv_heads, heads)]
    *given, dy = (torch.randn(*shape, generator=random).bfloat16() for shape in shapes)
    piece = (torch.rand(2, tokens, generator=random) < 0.1 * packed).cumsum(1)
    mask = (piece[:, :, None] == piece[:, None, :]).tril()[:, None]  # (rows, 1, tokens, tokens)
    mine = [part.clone().requires_grad_() for part in given]
    out = Causal.apply(*mine, first_seen(mask, 2) if packed else None, 0.2)
    out.backward(dy)
    wide = [part.float().requires_grad_() for part in given]
    turned = [part.transpose(1, 2) for part in wide]
    expected = scaled_dot_product_attention(*turned, attn_mask=mask, scale=0.2, enable_gqa=True).transpose(1, 2)
    expected.backward(dy.float())
    assert alike(out, expected)
    for found, other in zip(mine, wide, strict=True):
        assert torch.allclose(found.grad.float(), other.grad, rtol=0, atol=2**-6 * other.grad.abs().max().item() + 1e-6)


def test_a_mask_that_is_no_row_of_examples_is_not_taken_for_one():
    triangle = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    assert first_seen(triangle, 2).tolist() == [[0] * 5] * 2
    assert first_seen(triangle.triu(-1), 1).tolist() == [[0, 0, 1, 2, 3]], "a window"
    hole = triangle.clone()
    hole[..., 4, 1] = False
    ahead = triangle.clone()
    ahead[..., 0, 1] = True
    blind = triangle.clone()
    blind[..., 3, :] = False
    for mask in (hole, ahead, blind, triangle.float()):
        assert first_seen(mask, 1) is None


def test_a_rotation_hands_back_what_transformers_does():
    random = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 5, 3, 64, generator=random).bfloat16() for _ in range(2))
    angles = 9 * torch.rand(2, 5, 32, generator=random).repeat(1, 1, 2)
    turn = angles.cos().bfloat16(), angles.sin().bfloat16()
    mine, wide = x.clone().requires_grad_(), x.float().requires_grad_()
    expected, _ = apply_rotary_pos_emb(wide, wide, *(part.float() for part in turn), unsqueeze_dim=2)
    expected.backward(dy.float())
    out = Rotation.apply(mine, *turn)
    out.backward(dy)
    assert alike(out, expected)
    assert alike(mine.grad, wide.grad)


def test_packed_rows_by_kernels_teach_what_rows_of_their_own_do(base_folder, monkeypatch):
    masks = []
    monkeypatch.setattr("loraplex_trainer.attention.first_seen", lambda *a: masks.append(a) or first_seen(*a))
    random = torch.Generator().manual_seed(0)
    rows = [
        Example(tuple(torch.randint(2, 300, (size,), generator=random).tolist()), ((3, size),)) for size in (40, 11, 9)
    ]
    grads, losses = {}, {}
    for fast in (False, True):
        for packing in (False, True):
            model = prepared(base_folder)
            if fast:
                use_kernels(model)
            model.train()
            loss = loss_sum(model, make_batch([joined(rows)] if packing else rows, 0))
            loss.backward()
            losses[fast, packing] = loss.item()
            grads[fast, packing] = torch.cat([p.grad.flatten() for p in trainable_parameters(model).values()])
    assert len(masks) == 1, "read once for all layers, and only where rows are packed"
    for way, found in grads.items():
        assert losses[way] == pytest.approx(losses[False, False], rel=0.003)
        assert torch.nn.functional.cosine_similarity(found, grads[False, False], dim=0) > 0.995, way


def test_attention_is_replaced_where_it_is_plain(base_folder):
    def replaced(**config) -> int:
        model = prepared(base_folder, **config)
        use_kernels(model)
        return sum("forward" in vars(m) for m in model.modules() if type(m).__name__ == "LlamaAttention")

    assert replaced() == 2
    assert replaced(_attn_implementation="eager") == 0
