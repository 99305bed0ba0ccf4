"""The loss of an encoder-decoder (T5-style): the encoder reads the prompt, the decoder learns the answer and its end.

Knows examples and models, no steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from loraplex_trainer.data import IGNORED
from loraplex_trainer.encoding import Example


def loss_sum(model: Any, examples: Sequence[Example], pad_id: int) -> torch.Tensor:
    """Cross-entropy summed over the answers' tokens, in float32. Each answer is a row, after all that is before it."""
    device = next(model.parameters()).device
    spans = [(example.ids, start, stop) for example in examples for start, stop in example.trained]
    prompts = [ids[:start] for ids, start, _ in spans]
    input_ids, real = _padded(prompts, pad_id).to(device), _padded([[1] * len(ids) for ids in prompts], 0).to(device)
    labels = _padded([ids[start:stop] for ids, start, stop in spans], IGNORED).to(device)
    logits = model(
        input_ids=input_ids,
        attention_mask=real,
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        use_cache=False,
    ).logits  # (rows, answer tokens, vocabulary)
    labels = labels.to(logits.device)
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Right-padded, (rows, longest)."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
