"""How much memory a run will take, by parts, from the base's architecture alone: no weight is read.

An estimate: what autograd keeps is counted on a model without numbers, the rest follows from shapes and settings. What
Python and torch take for themselves is not in it.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex_registry.base import describe_base
from loraplex_server.engine.errors import BaseNotFound
from loraplex_server.engine.model import Base, _compute_dtype, _context_tokens, _device
from loraplex_trainer.adapter import trainable_parameters
from loraplex_trainer.config import BaseSection, TrainingSection
from loraplex_trainer.data import IGNORED, Batch, make_batch
from loraplex_trainer.encoding import Example
from loraplex_trainer.packing import packed_inputs

# Of a quantized weight: 4 bits, for each 64 weights a scale of 8 bits, for each 256 scales one of 32 bits.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


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


def empty_base(section: BaseSection) -> Base:
    """The base as `load_base` gives it, but without its numbers and not quantized. Raises BaseNotFound."""
    compute = _compute_dtype(section.dtype, _device(section.device))
    where = {"pretrained_model_name_or_path": section.model, "revision": section.revision}
    try:
        config = AutoConfig.from_pretrained(**where)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        description = describe_base(section.model, section.revision)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=compute)
    except (OSError, ValueError, KeyError) as error:
        raise BaseNotFound(f"base {section.model!r} is not a causal language model that is here: {error}") from error
    try:
        model.generation_config = GenerationConfig.from_pretrained(section.model, revision=section.revision or "main")
    except OSError:  # none is there: the one made from config.json stays
        model.generation_config = GenerationConfig.from_model_config(config)
    return Base(
        model=model,
        tokenizer=tokenizer,
        id=section.model,
        folder=Path(section.model),
        revision=section.revision,
        quantization=section.quantization,
        device=torch.device("meta"),
        context_tokens=_context_tokens(config),
        description=description,
    )


def base_bytes(model: PreTrainedModel, quantization: str) -> int:
    """Of the base's weights once they are loaded. `model` may be without numbers, and has no adapter yet."""
    head = model.get_output_embeddings()
    linear = [
        module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    whole = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if quantization == "none":
        return whole
    quantized = sum(module.weight.numel() for module in linear)
    return int(whole - sum(module.weight.nbytes for module in linear) + quantized * _NF4_BYTES)


def estimate_memory(
    model: PeftModel, loaded: int, examples: Sequence[Example], training: TrainingSection
) -> MemoryEstimate:
    """For `model`, an adapter on a base without numbers, and the longest batch that `examples` can make.

    `loaded` is what base_bytes said of the base. The model is of no other use afterwards.
    """
    longest = sorted(examples, key=lambda example: len(example.ids))[-training.batch_size :]
    batch = make_batch(longest, pad_id=0)
    labelled = int((batch.labels != IGNORED).sum())
    with FakeTensorMode():
        _pretend_to_be_somewhere(model)
        activations = _activation_bytes(model, batch, labelled)
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


def _activation_bytes(model: PeftModel, batch: Batch, labelled: int) -> int:
    """What one forward leaves for the backward pass, and the logits with their gradient."""
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()  # views of one tensor are counted once
        return tensor

    model.train()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        ids = torch.zeros(batch.input_ids.shape, dtype=torch.long)
        more = packed_inputs(model, batch.position_ids)
        logits = model(input_ids=ids, logits_to_keep=batch.logits_to_keep, use_cache=False, **more).logits
        cross_entropy(logits.flatten(0, 1)[:labelled].float(), torch.zeros(labelled, dtype=torch.long))
        return sum(kept.values()) + logits.nbytes + 4 * labelled * logits.shape[-1]


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
