"""Merges an adapter into its base: a model that needs no adapter, and a receipt of how near it is to the two apart.

The base is quantized as it was in training and dequantized again, and the adapter is added to that: it was trained
against the rounding. On the weights of the checkpoint it has another loss, merged into 4 bits a worse one.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from bitsandbytes.nn.modules import Int8Params, Params4bit
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex_registry.base import HEADS, INPUT_EMBEDDINGS
from loraplex_server.engine.goldens import EXACT, ROUNDED
from loraplex_server.engine.model import DTYPES, Base
from loraplex_server.engine.rendering import text_ids
from loraplex_trainer.adapter import keep_quantized_layout
from loraplex_trainer.checkpoint import swap_in
from loraplex_trainer.errors import ConfigError, NotMerged
from loraplex_trainer.found import Found
from loraplex_trainer.general import general_text
from loraplex_trainer.receipt import sha256, versions

FORMAT, RECEIPT = "loraplex.merge/1", "merge.json"
_MERGEABLE = ("LORA", "IA3")
_NEW_TOKENS, _PROMPTS, _PROMPT_TOKENS = 16, 3, 32


@dataclass(frozen=True)
class Said:
    """What a model says to one prompt: log-probabilities of every next token, and what it goes on with, greedily."""

    logprobs: torch.Tensor  # (prompt tokens, vocabulary) float32
    tokens: list[int]


def merge(adapter: Found, out: Path, device: str, dtype: str | None) -> dict[str, Any]:
    """Writes the merged model into the new folder `out` and returns its receipt.

    `dtype` None is the dtype that was computed in during training. Raises ConfigError for what cannot be merged;
    NotMerged when the merged model is not the same; nothing is left in `out` then.
    """
    kind = adapter.config.get("peft_type")
    if kind not in _MERGEABLE:
        raise ConfigError(f"{adapter.name}: {kind} adds to the prompt, not to the weights: there is nothing to merge")
    if adapter.config.get("task_type") == "SEQ_2_SEQ_LM":
        raise ConfigError(f"{adapter.name}: it is of an encoder-decoder; only causal language models are merged")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: there is something already, and a new or an empty folder is expected")
    place = next(parent for parent in out.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"--out {out}: {place} is no folder that can be written to")
    base = adapter.load_base(device)
    precision = DTYPES[dtype] if dtype else base.dtype
    assert precision is not None
    _refuse_full_disk(base, out, place, precision)
    prompts = _prompts(adapter, base)
    plain = _dequantized(base, untied=base.description.tied and adapter.changes(*INPUT_EMBEDDINGS, *HEADS))
    unmerged = _unmerged(base, adapter, prompts)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(plain, adapter, precision, base, partial)
        del plain
        receipt = _receipt(adapter, base, precision, prompts, unmerged, partial)
        (partial / RECEIPT).write_text(json.dumps(receipt, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        swap_in(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return receipt


@torch.no_grad()
def _dequantized(base: Base, untied: bool) -> PreTrainedModel:
    """The model as training saw it, in float32: every weight as it was rounded, none of them quantized any more.

    `untied`: embeddings and head get weights of their own, since the adapter changes but one of them.
    """
    config = AutoConfig.from_pretrained(base.folder)
    if untied:
        config.tie_word_embeddings = False
    plain = AutoModelForCausalLM.from_pretrained(base.folder, config=config, dtype=torch.float32)
    for path, module in base.model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            ours = plain.get_submodule(path)
            value = weight
            if isinstance(weight, Params4bit | Int8Params):
                value = dequantize_bnb_weight(weight, getattr(module, "state", None))
                value = value.T if isinstance(ours, Conv1D) else value
            ours.get_parameter(name).copy_(value)
    return plain


@torch.no_grad()
def _unmerged(base: Base, adapter: Found, prompts: Sequence[list[int]]) -> list[Said]:
    """What base and adapter say side by side, by peft; the base's layers are wrapped then."""
    keep_quantized_layout(base.model)
    model = PeftModel.from_pretrained(base.model, str(adapter.folder)).eval()
    # IA³'s float32 vectors raise what they scale, which attention would not take beside what they do not.
    mixed = adapter.config["peft_type"] == "IA3" and base.dtype != torch.float32
    with torch.autocast(base.device.type, dtype=base.dtype, enabled=mixed):
        return [_said(model, ids) for ids in prompts]


def _write(plain: PreTrainedModel, adapter: Found, precision: torch.dtype, base: Base, folder: Path) -> None:
    try:
        merged = PeftModel.from_pretrained(plain, str(adapter.folder)).merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError) as error:  # peft's own words: a kind that no weight can hold, or NaN
        raise NotMerged(f"{adapter.name}: {error}; nothing was written") from error
    merged.to(precision).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


@torch.no_grad()
def _receipt(
    adapter: Found, base: Base, precision: torch.dtype, prompts: Sequence[list[int]], unmerged: list[Said], folder: Path
) -> dict[str, Any]:
    """Loads the folder as anybody would, and compares. Raises NotMerged."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": base.device}).eval()
    merged = [_said(model, ids) for ids in prompts]
    pairs = list(zip(unmerged, merged, strict=True))
    # Over the tokens that matter: those that base and adapter hold for at all likely.
    apart = [(there.logprobs - here.logprobs).abs()[there.logprobs.exp() > 1e-3] for there, here in pairs]
    off = fmean(one.mean().item() for one in apart)
    tolerance = EXACT if base.quantization.endswith("float32") and precision == torch.float32 else ROUNDED
    dtype = str(precision).removeprefix("torch.")
    if not off <= tolerance:
        raise NotMerged(
            f"{adapter.name}: merged, its answers differ from those of base and adapter by {off:.3f} nats, at most "
            f"{tolerance} can be rounding; nothing was written. With --dtype float32 nothing but the merge is rounded"
        )
    return {
        "format": FORMAT,
        "adapter": {"name": adapter.name, "digest": adapter.digest},
        "base": {"id": base.id, "revision": base.revision, "fingerprint": base.fingerprint},
        "quantization": base.quantization,
        "dtype": dtype,
        "merged_against_unmerged": {
            "prompts": prompts,
            "mean_logprob_difference": off,
            "largest_logprob_difference": max(one.max().item() for one in apart),
            "same_first_token": fmean(there.tokens[0] == here.tokens[0] for there, here in pairs),
            "same_tokens": fmean(there.tokens == here.tokens for there, here in pairs),
            "tokens": _NEW_TOKENS,
        },
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
        "versions": versions(),
    }


def _said(model: Any, ids: list[int]) -> Said:
    whole = list(ids)
    first = None
    for _ in range(_NEW_TOKENS):
        logits = model(input_ids=torch.tensor([whole], device=model.device), use_cache=False).logits[0]
        first = logits if first is None else first
        whole.append(int(logits[-1].argmax()))
    assert first is not None
    return Said(first.float().log_softmax(-1).cpu(), whole[len(ids) :])


def _prompts(adapter: Found, base: Base) -> list[list[int]]:
    """The golden prompts of the receipt; without any, general text."""
    if adapter.receipt.goldens:
        return [list(golden.ids) for golden in adapter.receipt.goldens]
    paragraphs = (general_text("default") or "").split("\n\n")
    return [text_ids(base.tokenizer, text)[:_PROMPT_TOKENS] for text in paragraphs[:_PROMPTS]]


def _refuse_full_disk(base: Base, out: Path, place: Path, precision: torch.dtype) -> None:
    shapes = base.description.shapes.values()
    needed = sum(torch.Size(shape).numel() for shape in shapes) * precision.itemsize
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(f"--out {out}: the merged model takes {needed:,} bytes, and {free:,} are free there")
