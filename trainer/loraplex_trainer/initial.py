"""How LoRA's matrices begin, where peft's way would change the base or needs one that is not quantized.

PiSSA and OLoRA (arXiv:2404.02948, arXiv:2406.01775) move a part of the weights W into the adapter: W − s·B₀A₀ + s·BA.
peft writes W − s·B₀A₀ over the base. Here the base stays as it is, quantized or not: −s·B₀A₀ is a second, frozen
adapter beside the first. Saved is both as one of twice the rank, so it works on the base as everybody has it.
"""

from collections.abc import Callable, Iterator
from copy import copy
from math import sqrt
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from loraplex_server.engine.model import Base
from loraplex_trainer.errors import ConfigError

OURS, INITIAL = "default", "initial"  # peft's names of the trained adapter, and of what it began with, taken away
_ITERATIONS = 16  # of the randomized SVD; as good as the whole one, says PiSSA's paper
Pair = tuple[torch.Tensor, torch.Tensor]  # A (rank, inputs) and B (outputs, rank)


@torch.no_grad()
def begin(model: PeftModel, init: str, base: Base) -> None:
    """Give a fresh adapter its start. Raises ConfigError for a rank that a layer's weight has not."""
    if init in ("default", "gaussian"):
        return
    layers = list(lora_layers(model))
    if init in ("pissa", "olora"):
        _add_frozen(model)
    start = _lost(base) if init == "loftq" else _STARTS[init]
    for path, layer in layers:
        a, b = layer.lora_A[OURS].weight, layer.lora_B[OURS].weight
        most = min(layer.in_features, layer.out_features)
        if init != "orthogonal" and a.shape[0] > most:
            raise ConfigError(f"lora.rank: {a.shape[0]}, but {init} takes at most {most} of the weight of {path}")
        if a.device.type == "meta":
            continue  # only sizes are asked for
        first_a, first_b = start(path, layer)
        a.copy_(first_a)
        b.copy_(first_b)
        if init in ("pissa", "olora"):
            layer.lora_A[INITIAL].weight.copy_(first_a)
            layer.lora_B[INITIAL].weight.copy_(-first_b)


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Path in the base, and layer, of every linear module that has an adapter."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and OURS in module.lora_A:
            yield name, module


def as_one(model: PeftModel, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trained adapter's tensors with what it began with taken away, where it did not begin with nothing."""
    if INITIAL not in model.peft_config:
        return weights
    first = get_peft_model_state_dict(model, adapter_name=INITIAL, save_embedding_layers=False)
    dimension = {key: 0 if ".lora_A." in key else 1 for key in first}
    return weights | {key: torch.cat([weights[key], first[key]], dimension[key]) for key in first}


def config_as_one(model: PeftModel, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of what `as_one` gives: twice the rank, and alpha such that the scaling is the same."""
    if INITIAL not in model.peft_config:
        return config
    more = sqrt(2) if config["use_rslora"] else 2
    return config | {
        "r": 2 * config["r"],
        "lora_alpha": more * config["lora_alpha"],
        "rank_pattern": {pattern: 2 * rank for pattern, rank in config["rank_pattern"].items()},
        "alpha_pattern": {pattern: more * alpha for pattern, alpha in config["alpha_pattern"].items()},
    }


def _add_frozen(model: PeftModel) -> None:
    ours = model.peft_config[OURS]
    assert isinstance(ours, LoraConfig)
    beside = copy(ours)
    # Modules trained whole are the first's alone; and what is taken away is taken away without dropout.
    beside.modules_to_save, beside.trainable_token_indices, beside.lora_dropout = None, None, 0.0
    model.add_adapter(INITIAL, beside)
    tuner: Any = model.base_model
    tuner.set_adapter([OURS, INITIAL])
    for name, parameter in model.named_parameters():
        if f".{INITIAL}." in name:
            parameter.requires_grad_(False)


def _principal(_: str, layer: Any) -> Pair:
    """PiSSA: the largest singular values, half in A and half in B."""
    return _halves(_weight(layer), layer)


def _orthonormal(_: str, layer: Any) -> Pair:
    """OLoRA: the first columns of a QR decomposition, as in peft's olora_init; W − s·QR there, so s·QR here."""
    q, r = torch.linalg.qr(_weight(layer))
    rank = layer.r[OURS]
    return r[:rank], q[:, :rank]


def _orthogonal(_: str, layer: Any) -> Pair:
    """Neither A nor B is zero and their product is: as peft's orthogonal_init, which knows no quantized weights."""
    rank = layer.r[OURS]
    basis, _ = torch.linalg.qr(torch.randn(rank, rank))
    a = torch.randn(layer.in_features, rank // 2) @ basis[0::2] / 10
    b = torch.randn(rank // 2, layer.out_features).T @ basis[1::2] / 10
    return a.T, b


_STARTS = {"pissa": _principal, "olora": _orthonormal, "orthogonal": _orthogonal}


def _lost(base: Base) -> Callable[[str, Any], Pair]:
    """LoftQ (arXiv:2310.08659) in one step: the adapter begins with what quantization lost of the checkpoint's weights.

    peft's own needs a GPU, and does not divide by the adapter's scaling.
    """
    files = {name: file for file in sorted(base.folder.glob("*.safetensors")) for name in _names(file)}

    def start(path: str, layer: Any) -> Pair:
        stored = base.description.weight_of(path)
        if stored not in files:
            raise ConfigError(f"lora.init: 'loftq' needs the weight of {path}, which {base.folder} has not")
        with safe_open(files[stored], framework="pt") as file:
            whole = file.get_tensor(stored).to(layer.lora_A[OURS].weight.device).float()
        weight = _weight(layer)
        # GPT-2 stores (inputs, outputs): of the two ways to look at it, the one that was quantized is nearer.
        lost = [turned - weight for turned in (whole, whole.T) if turned.shape == weight.shape]
        return _halves(min(lost, key=torch.linalg.norm), layer)

    return start


def _names(file: Any) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _halves(weight: torch.Tensor, layer: Any) -> Pair:
    """The best s·BA for a matrix (outputs, inputs), its singular values shared out evenly."""
    rank = layer.r[OURS]
    u, s, v = torch.svd_lowrank(weight, q=min(rank + 8, *weight.shape), niter=_ITERATIONS)
    share = (s[:rank] / layer.scaling[OURS]).sqrt()
    return (v[:, :rank] * share).T, u[:, :rank] * share


def _weight(layer: Any) -> torch.Tensor:
    """What a base layer multiplies with, (outputs, inputs) in float32."""
    base: Any = layer.get_base_layer()
    weight = base.weight
    if isinstance(base, Linear4bit):
        return dequantize_4bit(weight.data, weight.quant_state).float()
    if isinstance(base, Linear8bitLt):
        scales: Any = base.state.SCB if weight.SCB is None else weight.SCB
        return int8_vectorwise_dequant(weight.data, scales)
    return weight.float().T if isinstance(base, Conv1D) else weight.float()
