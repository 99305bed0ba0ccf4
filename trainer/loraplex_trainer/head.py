"""The loss over a frozen head, in pieces: the logits of all positions are never there at once, nor in float32.

What the loss hands back to the hidden states is made with it, while a piece's logits are at hand. Knows a head and
labels; what else a model does is asked once.
"""

from typing import Any
from weakref import WeakSet

import torch
from peft import PeftModel

from loraplex_server.kernels.native import addresses, native

PIECE = 256  # rows of logits at a time: 16 MiB for 32,000 tokens, and a CPU's product as fast as for more
PIECE_ON_GPU = 1024
_heads: WeakSet[torch.nn.Module] = WeakSet()  # whose loss is made here


class _Loss(torch.autograd.Function):
    """The summed cross-entropy of hidden (rows, width) and labels (rows,); both matrices of one 16-bit type."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden, back = hidden.contiguous(), ctx.needs_input_grad[0]
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        grad = torch.empty_like(hidden) if back else hidden
        most = PIECE if hidden.device.type == "cpu" else PIECE_ON_GPU
        logits = hidden.new_empty(min(most, len(hidden)), len(weight))
        for start in range(0, len(hidden), most):
            piece = slice(start, min(start + most, len(hidden)))
            part = torch.mm(hidden[piece], weight.T, out=logits[: piece.stop - start])
            _label_loss(losses[piece], part, labels[piece], back)
            if back:
                torch.mm(part, weight, out=grad[piece])
        ctx.save_for_backward(grad)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None


def _label_loss(losses: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, back: bool) -> None:
    """Writes the loss of each row; with `back` the logits become what it hands back to them (kernels/loss.c)."""
    if logits.device.type == "cpu" and logits.dtype == torch.bfloat16 and native():
        _library().label_loss(*addresses(losses, logits, labels), *logits.shape, back)
        return
    wide, at = logits.float(), labels[:, None]
    total = wide.logsumexp(1, keepdim=True)
    losses.copy_((total - wide.gather(1, at)).squeeze(1))
    if back:
        shares = wide.sub_(total).exp_()
        logits.copy_(shares.scatter_add_(1, at, torch.full_like(shares[:, :1], -1)))


def loss_in_pieces(hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the rows of `hidden` (rows, width), of which `labels` (rows,) are expected."""
    return _Loss.apply(hidden, head.weight, labels.to(hidden.device))  # pyright: ignore[reportReturnType]


def use_pieces(model: PeftModel) -> None:
    """Let the loss of a causal model be made in pieces, where its head is frozen and nothing follows it."""
    base: Any = model.get_base_model()
    head = base.get_output_embeddings()
    if fits_pieces(model) and _ends_with(base, head):
        _heads.add(head)


def fits_pieces(model: PeftModel) -> bool:
    """Whether a head is of the kind whose loss can be made in pieces, as far as that is seen without numbers."""
    base: Any = model.get_base_model()
    if base.config.is_encoder_decoder or model.active_peft_config.is_prompt_learning:
        return False  # there is more in front of the body than ids
    head = base.get_output_embeddings()
    return (
        type(head) is torch.nn.Linear
        and head.bias is None
        and head.weight.dtype in (torch.bfloat16, torch.float16)
        and "forward" not in vars(head)  # as where weights lie on several devices
        and not head.weight.requires_grad
    )


def head_in_pieces(model: torch.nn.Module) -> torch.nn.Linear | None:
    """The head whose loss is made here, if it is."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else None
    head = base.get_output_embeddings() if base else None
    return head if head in _heads else None


def hidden_states(model: Any, inputs: dict[str, Any], positions: int | torch.Tensor) -> torch.Tensor:
    """What the head is given: the last so many positions or these ones, (rows, positions, width)."""
    hidden = model.get_base_model().base_model(**inputs).last_hidden_state
    return hidden[:, positions if isinstance(positions, torch.Tensor) else slice(-positions, None)]


@torch.no_grad()
def _ends_with(model: Any, head: Any) -> bool:
    """Whether the logits are what `head` gives, not capped and not scaled, of what the body of the model ends with."""
    given, ended = [], []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        given.append(hidden)
        return hidden.new_full((*hidden.shape[:-1], head.out_features), 100.0)

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        ended.append(output.last_hidden_state)

    hook = model.base_model.register_forward_hook(note)
    head.forward = forward
    try:
        with torch.random.fork_rng([] if model.device.type == "cpu" else [model.device]):  # dropout draws from it
            logits = model(input_ids=torch.arange(4, device=model.device)[None], use_cache=False).logits
    finally:
        del head.forward
        hook.remove()
    return len(given) == len(ended) == 1 and torch.equal(given[0], ended[0]) and bool((logits == 100).all())


def _library() -> Any:
    return native().library
