"""How much memory a run will take, by parts, from the base's architecture alone: no weight is read.

An estimate: what autograd keeps is counted on a model without numbers, the rest follows from shapes and settings. What
Python and torch take for themselves is not in it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from loraplex_server.engine.model import Base, load_base
from loraplex_trainer import seq2seq
from loraplex_trainer.adapter import attach, trainable_parameters
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import make_batch
from loraplex_trainer.encoding import Example
from loraplex_trainer.errors import AdapterTooLarge, BaseTooLarge
from loraplex_trainer.head import PIECE, fits_pieces, hidden_states
from loraplex_trainer.loop import memory_named
from loraplex_trainer.packing import packed_inputs
from loraplex_trainer.sections import BaseSection, TrainingSection

# Of a quantized weight: 4 bits, for each 64 weights a scale of 8 bits, for each 256 scales one of 32 bits.
_4_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_4_BIT_BYTES_SINGLE = 0.5 + 4 / 64  # scales of 32 bits


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the height of a step."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def base_bytes(model: PreTrainedModel, section: BaseSection) -> int:
    """Of the base's weights once they are loaded. `model` is without numbers, and has no adapter yet."""
    whole = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if section.quantization == "none":
        return whole
    quantized = list(_quantized(model))
    weights = sum(module.weight.numel() for module in quantized)
    if section.quantization == "int8":
        stored = weights + 4 * sum(module.weight.shape[isinstance(module, Conv1D)] for module in quantized)
    else:
        stored = weights * (_4_BIT_BYTES if section.double_quantization else _4_BIT_BYTES_SINGLE)
    return int(whole - sum(module.weight.nbytes for module in quantized) + stored)


def load_within_memory(section: BaseSection, options: Mapping[str, Any]) -> Base:
    """`load_base`, by its own `options`. Raises BaseTooLarge, which says what it takes and what would take less."""
    with memory_named(lambda: _too_large(section)):
        return load_base(**options)


def attach_within_memory(base: Base, config: RunConfig) -> PeftModel:
    """`attach`. Raises AdapterTooLarge, which says what to lower."""
    with memory_named(lambda: AdapterTooLarge(config.method)):
        return attach(base, config)


def _too_large(section: BaseSection) -> BaseTooLarge:
    model = load_base(**section.load_options, weights=False).model
    takes = base_bytes(model, section)
    told = f"base.model: {section.model} does not fit into memory: {gib(takes)} of weights by {section.quantization}"
    smaller = base_bytes(model, section.model_copy(update={"quantization": "nf4"}))
    if smaller < takes:
        return BaseTooLarge(f"{told}, {gib(smaller)} by nf4: set base.quantization to nf4, or take a smaller base")
    return BaseTooLarge(f"{told}, which is the least: take a smaller base")


def gib(count: int) -> str:
    """Bytes, as people compare them."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _quantized(model: PreTrainedModel) -> Iterator[Any]:
    """The layers that transformers quantizes: not the head, nor what a model keeps in float32."""
    kept = HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ()))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and should_convert_module(name, kept):
            yield module


def estimate_memory(
    model: PeftModel, loaded: int, examples: Sequence[Example], training: TrainingSection
) -> MemoryEstimate:
    """For `model`, an adapter on a base without numbers, and the longest batch that `examples` can make.

    `loaded` is what base_bytes said of the base. The model is of no other use afterwards.
    """
    longest = sorted(examples, key=lambda example: len(example.ids))[-training.batch_size :]
    with FakeTensorMode(allow_non_fake_inputs=True):  # what peft keeps beside the modules has numbers
        _pretend_to_be_somewhere(model)
        pieces = training.kernels and fits_pieces(model)
        activations = _activation_bytes(model, longest, pieces)
        if training.gradient_checkpointing:
            activations += _layer_bytes(model, longest, pieces, activations)
    trained = list(trainable_parameters(model).values())
    adapter = sum(parameter.nbytes for parameter in trained)
    state = sum(_state_bytes(parameter, training) for parameter in trained)
    return MemoryEstimate(loaded, adapter, adapter, state, activations)


def _state_bytes(parameter: torch.nn.Parameter, training: TrainingSection) -> int:
    """Of the optimizer, for one parameter."""
    numbers = parameter.numel()
    match training.optimizer:
        case "adafactor":  # a row and a column of each matrix
            return 4 * sum(parameter.shape)
        case "sgd":
            return 4 * numbers if training.momentum else 0
        case "adamw_8bit" | "paged_adamw_8bit" if numbers >= 4096:  # bitsandbytes keeps smaller ones in 32 bits
            return 2 * numbers + 2 * 4 * numbers // 256
    return 8 * numbers


def _activation_bytes(model: PeftModel, examples: Sequence[Example], pieces: bool) -> int:
    """What one forward leaves for the backward pass, and the logits with their gradient: all of them, or a piece."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()  # views of one tensor are counted once
        return tensor

    def note_inputs(_: torch.nn.Module, inputs: tuple[object, ...]) -> None:
        for given in inputs:
            if isinstance(given, torch.Tensor):
                note(given)

    hooks = [layer.register_forward_pre_hook(note_inputs) for layer in _checkpointed(model)]
    model.train()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        logits_bytes = _pretend_to_train(model, examples, pieces)
    for hook in hooks:
        hook.remove()
    return sum(kept.values()) + logits_bytes


def _pretend_to_train(model: PeftModel, examples: Sequence[Example], pieces: bool) -> int:
    """One forward; returns the bytes of the logits and of their gradient, in float32, that are there at once."""
    vocabulary, size = model.get_input_embeddings().weight.shape[0], model.dtype.itemsize
    if model.config.is_encoder_decoder:
        seq2seq.loss_sum(model, examples, pad_id=0)
        lengths = [stop - start for example in examples for start, stop in example.trained]
        return len(lengths) * max(lengths) * vocabulary * (size + 4)
    batch = make_batch(examples, pad_id=0)
    labelled = sum(example.answer_tokens for example in examples)
    more = packed_inputs(model, batch.position_ids)
    if pieces:
        hidden_states(model, {"input_ids": batch.input_ids, "use_cache": False, **more}, batch.logits_to_keep)
        return min(labelled, PIECE) * vocabulary * (size + 4)
    logits = model(input_ids=batch.input_ids, logits_to_keep=batch.logits_to_keep, use_cache=False, **more).logits
    cross_entropy(logits.flatten(0, 1)[:labelled].float(), torch.zeros(labelled, dtype=torch.long))
    return logits.nbytes + 4 * labelled * vocabulary


def _layer_bytes(model: PeftModel, examples: Sequence[Example], pieces: bool, kept: int) -> int:
    """What one checkpointed layer, computed again in the backward pass, leaves; `kept` is what is kept of all."""
    layers = _checkpointed(model)
    base: Any = model.get_base_model()
    base.activation_checkpointing_disable()
    return max(0, _activation_bytes(model, examples, pieces) - kept) // max(1, len(layers))


def _checkpointed(model: PeftModel) -> list[GradientCheckpointingLayer]:
    """The layers whose inputs alone are kept for the backward pass."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if layer.gradient_checkpointing]


def _pretend_to_be_somewhere(model: PeftModel) -> None:
    """Gives tensors that are nowhere (meta) a device, still without numbers: kernels are chosen by it."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
