"""Training on a CPU by kernels: 4-bit layers that hand gradients back by kernels, and the adapters' part beside them.

Without kernels, and for adapters that are more than two matrices, peft's own layers compute the same, more slowly: the
reference that this is tested against. Knows layers, not data or steps.
"""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from loraplex_server.engine.fused import epsilon_of, is_gated, is_rms_norm, replace
from loraplex_server.engine.quantized import fits, pack
from loraplex_server.kernels.native import addresses, native
from loraplex_trainer.attention import use_attention_kernel
from loraplex_trainer.head import use_pieces
from loraplex_trainer.mixed import PartsOf, active_parts, add_parts

NO_ADAPTERS = (0,) * 7
Spans = Sequence[tuple[int, int, float]]  # first token, the one behind the last, scaling
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3)


class Packed:
    """A frozen 4-bit layer as the kernels read it; bitsandbytes' layout of the same weights is given up."""

    def __init__(self, layer: Linear4bit) -> None:
        weight: Any = layer.weight
        state = weight.quant_state
        self.outputs, self.inputs = state.shape
        self.codes, self.scales = pack(weight.data, state)
        self.book = state.code.float()
        self.bias = None if layer.bias is None else layer.bias.to(torch.bfloat16)
        weight.data, weight.quant_state = self.codes, None

    def forward(self, x: torch.Tensor, spans: Spans = (), weights: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """x W^T, plus the bias, plus B A x of the spans: (tokens, inputs) → (tokens, outputs), all bfloat16.

        `weights` are A and B of the first span, of the second, …
        """
        out = x.new_empty(len(x), self.outputs)
        constant = addresses(self.codes, self.scales, self.bias, self.book)
        sizes = len(x), self.inputs, self.outputs
        if not spans:
            _library().nf4_linear(*addresses(out, x), *constant, *sizes, *NO_ADAPTERS)
            return out
        ranks = [len(a) for a in weights[::2]]
        runs = runs_of(tuple((start, stop) for start, stop, _ in spans))
        tables = [
            runs,
            *(torch.tensor([part.data_ptr() for part in parts]) for parts in (weights[::2], weights[1::2])),
            torch.tensor(ranks, dtype=torch.int32),
            torch.tensor([scaling for *_, scaling in spans]),
        ]
        where, *adapters = addresses(*tables)
        _library().nf4_linear(*addresses(out, x), *constant, *sizes, where, len(runs), *adapters, max(ranks))
        return out

    def grad(self, dy: torch.Tensor, dh: torch.Tensor | None = None, a: torch.Tensor | None = None) -> torch.Tensor:
        """dy W, plus dh A: (tokens, outputs), and (tokens, ranks) and (ranks, inputs) → (tokens, inputs), all bfloat16.

        `ranks` is a multiple of 32.
        """
        out = dy.new_empty(len(dy), self.inputs)
        where = addresses(out, dy, self.codes, self.scales, self.book, dh, a)
        _library().nf4_grad(*where, len(dy), self.inputs, self.outputs, 0 if a is None else len(a))
        return out


@lru_cache(maxsize=64)
def runs_of(spans: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """What kernels/lora.c calls runs, (runs, 3) int32: first token, tokens, span; none goes over a border of 16."""
    cut = [
        (first, min(stop, first - first % 16 + 16) - first, number)
        for number, (start, stop) in enumerate(spans)
        for first in (start, *range(start - start % 16 + 16, stop, 16))
        if stop > start
    ]
    return torch.tensor(cut, dtype=torch.int32)


def one_each(spans: Spans, weights: Sequence[torch.Tensor]) -> tuple[Spans, Sequence[torch.Tensor]]:
    """Adapters of the same tokens as one of all their ranks: a kernel knows one for each token."""
    whole = {span[:2]: span for span in reversed(spans)}
    if len(whole) == len(spans):
        return spans, weights
    joined: list[torch.Tensor] = []
    for tokens, (*_, scaling) in whole.items():
        mine = [at for at, span in enumerate(spans) if span[:2] == tokens]
        joined.append(torch.cat([weights[2 * at] for at in mine]))
        joined.append(torch.cat([weights[2 * at + 1] * (spans[at][2] / scaling) for at in mine], 1).contiguous())
    return list(whole.values()), joined


class _Linear(torch.autograd.Function):
    """The frozen layer, and B A x of one adapter for each span of tokens. A and B, in float32, are used in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Packed, spans: Spans, *weights: torch.Tensor) -> torch.Tensor:
        flat = x.to(torch.bfloat16).reshape(-1, layer.inputs).contiguous()
        low = [weight.to(torch.bfloat16).contiguous() for weight in weights]
        out = layer.forward(flat, *one_each(spans, low))
        ctx.layer, ctx.spans, ctx.shape, ctx.dtype = layer, spans, x.shape, x.dtype
        ctx.save_for_backward(flat, *low)
        return out.view(*x.shape[:-1], layer.outputs).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        layer, (flat, *low) = ctx.layer, ctx.saved_tensors
        dy = grads[0].to(torch.bfloat16).reshape(-1, layer.outputs).contiguous()
        room = sum(-(-len(a) // 32) * 32 for a in low[::2])
        all_dh, all_a = dy.new_zeros(len(dy), room), dy.new_zeros(room, layer.inputs)
        of_weights: list[torch.Tensor] = []
        place = 0
        for (start, stop, scaling), a, b in zip(ctx.spans, low[::2], low[1::2], strict=True):
            x, mine = flat[start:stop], dy[start:stop]
            dh = (mine @ b) * scaling  # (tokens, rank)
            of_weights += [(dh.T @ x).float(), ((x @ a.T).T @ mine).T.float() * scaling]
            all_dh[start:stop, place : place + len(a)] = dh
            all_a[place : place + len(a)] = a
            place += -(-len(a) // 32) * 32
        dx = layer.grad(dy, all_dh, all_a) if ctx.needs_input_grad[0] else None
        return dx if dx is None else dx.view(ctx.shape).to(ctx.dtype), None, None, *of_weights


def use_kernels(model: PeftModel, parts_of: PartsOf = active_parts) -> int:
    """Let the model's 4-bit layers train by kernels, those with adapters and those without; returns how many can.

    None can of a base that is not on a CPU or not in bfloat16; its loss is made in pieces all the same. Done once,
    before the first step, when all adapters are there; `parts_of` says which of them work on which tokens.
    """
    use_pieces(model)
    embeddings: Any = model.get_input_embeddings()
    if not native() or embeddings.weight.device.type != "cpu" or embeddings.weight.dtype != torch.bfloat16:
        return 0
    with torch.no_grad():
        for module in model.modules():
            _use_small_kernels(module)
    wrapped = {id(layer.base_layer): layer for layer in model.modules() if isinstance(layer, LoraLayer)}
    changed = 0
    for layer in list(model.modules()):
        if not isinstance(layer, Linear4bit) or not _can(layer):
            continue
        adapted: Any = wrapped.get(id(layer))
        if adapted is not None and adapted.lora_variant:  # DoRA and its kind look at the base's weights themselves
            continue
        packed = Packed(layer)
        layer.forward = partial(_alone, packed)
        if adapted is not None:
            adapted.forward = partial(_with_adapter, adapted, packed, parts_of)
        changed += 1
    _keep_memory()
    return changed


def _keep_memory() -> None:
    """Let glibc keep what is freed for the next step, which needs as much again: the system would zero its pages anew.

    A tenth of a step is spent on that otherwise, on a base of 1.1 B parameters.
    """
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
            mallopt(option, value)


class _Norm(torch.autograd.Function):
    """An RMS norm of frozen weights, and what it hands back, in one pass each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        out, width, library = torch.empty_like(x), x.shape[-1], _library()
        library.rms_norm(*addresses(out, x, weight), x.numel() // width, width, epsilon)
        ctx.epsilon = epsilon
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x, weight), dy = ctx.saved_tensors, grads[0].contiguous()
        dx, width = torch.empty_like(x), x.shape[-1]
        _library().rms_norm_grad(*addresses(dx, dy, x, weight), x.numel() // width, width, ctx.epsilon)
        return dx, None, None


class _Gate(torch.autograd.Function):
    """silu(gate) * up, and what it hands back, in one pass each."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        _library().silu_mul(*addresses(out, gate, up), gate.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (gate, up), dy = ctx.saved_tensors, grads[0].contiguous()
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        _library().silu_mul_grad(*addresses(of_gate, of_up, dy, gate, up), gate.numel())
        return of_gate, of_up


def _use_small_kernels(module: Any) -> None:
    use_attention_kernel(module)
    if is_rms_norm(module) and not module.weight.requires_grad:
        weight, epsilon = module.weight, epsilon_of(module)
        replace(module, lambda x: _Norm.apply(x, weight, epsilon), module.weight.shape[0])  # pyright: ignore
    elif is_gated(module):

        def gated(x: torch.Tensor) -> torch.Tensor:
            return module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x)))

        replace(module, gated, module.gate_proj.in_features)


def _library() -> Any:
    return native().library


def _can(layer: Linear4bit) -> bool:
    state: Any = getattr(layer.weight, "quant_state", None)
    return layer.weight.device.type == "cpu" and state is not None and fits(layer, state)


def _alone(packed: Packed, x: torch.Tensor) -> torch.Tensor:
    return _Linear.apply(x, packed, [])  # pyright: ignore[reportReturnType]


def _with_adapter(layer: Any, packed: Packed, parts_of: PartsOf, x: torch.Tensor) -> torch.Tensor:
    """peft's forward of one layer; dropout and biases, which the kernels do not know, are left to torch."""
    parts = parts_of(layer, x.shape[:-1].numel())
    plain = [part for part in parts if not _is_more_than_two_matrices(layer, part.adapter)]
    spans = [(part.start, part.stop, layer.scaling[part.adapter]) for part in plain]
    weights = [matrix[part.adapter].weight for part in plain for matrix in (layer.lora_A, layer.lora_B)]
    out: Any = _Linear.apply(x, packed, spans, *weights)
    return out if plain == parts else add_parts(layer, out, x, [part for part in parts if part not in plain])


def _is_more_than_two_matrices(layer: Any, adapter: str) -> bool:
    dropped = layer.training and getattr(layer.lora_dropout[adapter], "p", 0)
    return bool(dropped) or layer.lora_B[adapter].bias is not None
