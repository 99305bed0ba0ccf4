"""Which options of a run file do not go together, and why: nothing that is asked for is left out in silence.

Knows the settings alone; what a base cannot do is found when the adapter is put on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from loraplex_registry.validate import Limits

if TYPE_CHECKING:
    from loraplex_trainer.config import RunConfig
    from loraplex_trainer.sections import Section

# The section of each method.
_SECTIONS = {"lora": "lora", "ia3": "ia3", "prompt": "prompt", "prefix": "prompt", "p_tuning": "prompt"}
# Starts that are not nothing: the adapter takes the place of a part of the weights.
_OF_THE_WEIGHTS = ("pissa", "olora", "loftq")


def unfit(config: RunConfig) -> Iterator[str]:
    """Every reason to refuse the settings, each beginning with the key at fault."""
    yield from _of_the_base(config)
    yield from _of_the_strategy(config)
    for section in sorted(set(_SECTIONS.values()) - {_SECTIONS[config.method]}):
        if key := _changed(getattr(config, section)):
            yield f"{section}.{key}: not an option of method {config.method!r}"
    if config.method == "lora":
        yield from _of_lora(config)
    elif config.continue_from is not None:
        yield f"continue_from: only LoRA adapters are trained on from; method is {config.method!r}"
    if _SECTIONS[config.method] == "prompt":
        yield from _of_prompt(config)
    if config.push.every != "never" and not config.served:
        yield (
            "push.every: registry and server take LoRA on causal models alone, of ranks up to "
            f"{Limits().max_rank} as it is saved, and nothing trained beside it"
        )


def _of_the_base(config: RunConfig) -> Iterator[str]:
    base = config.base
    if not base.double_quantization and base.quantization not in ("nf4", "fp4"):
        yield f"base.double_quantization: false: only nf4 and fp4 have it; base.quantization is {base.quantization!r}"
    if base.device_map is not None and base.device != "auto":
        yield f"base.device_map: it places the base, and so does base.device = {base.device!r}: leave one out"

    if base.task == "seq2seq":
        if config.data.form == "text":
            yield "data.form: 'text' has no prompt for the encoder of base.task = 'seq2seq' to read"
        if config.data.loss_on != "completion":
            yield "data.loss_on: of base.task = 'seq2seq' the decoder learns completions, and nothing else"
        if config.data.packing:
            yield "data.packing: not with base.task = 'seq2seq', whose encoder reads one prompt a row"


def _of_the_strategy(config: RunConfig) -> Iterator[str]:
    """What shares out weights or state does it for LoRA's two matrices a layer, on a causal base."""
    base, lora, strategy = config.base, config.lora, config.training.distributed.strategy
    if strategy == "ddp":
        return
    if base.device_map is not None:
        yield f"base.device_map: it spreads the base over devices, and so does strategy {strategy!r}: leave one out"
    for key, given in (
        ("method", config.method != "lora"),
        ("base.task", base.task != "causal"),
        ("base.quantization", base.quantization == "int8" and strategy in ("fsdp", "zero3")),
        ("lora.dora", lora.dora),
        ("lora.init", lora.init in _OF_THE_WEIGHTS),
        ("lora.bias", lora.bias != "none"),
        ("lora.modules_to_save", bool(lora.modules_to_save)),
        ("lora.trainable_token_indices", bool(lora.trainable_token_indices)),
    ):
        if given:
            yield f"{key}: training.distributed.strategy {strategy!r} does not share this out: expected ddp there"


def _of_lora(config: RunConfig) -> Iterator[str]:
    lora = config.lora
    if lora.init in _OF_THE_WEIGHTS:
        for option, given in (("dora", lora.dora), ("bias", lora.bias != "none")):
            if given:
                yield f"lora.{option}: not with lora.init = {lora.init!r}, which begins with a part of the weights"
    if lora.init == "loftq" and config.base.quantization == "none":
        yield "lora.init: 'loftq' begins with what quantization lost, and base.quantization is 'none'"
    if lora.init == "orthogonal" and (odd := _first_odd(lora.rank, *lora.rank_pattern.values())):
        yield f"lora.init: 'orthogonal' needs even ranks, not {odd}"
    if config.continue_from is not None and lora.init != "default":
        yield f"lora.init: {lora.init!r}, but continue_from begins with the weights of its adapter"


def _of_prompt(config: RunConfig) -> Iterator[str]:
    prompt, method = config.prompt, config.method
    if method != "prompt" and prompt.init != "vocabulary":
        yield f"prompt.init: only method 'prompt' begins with tokens; method is {method!r}"
    if (prompt.text is not None) != (prompt.init == "text"):
        yield "prompt.text: it is what prompt.init = 'text' begins with: give both or none"
    if prompt.projection and method != "prefix":
        yield f"prompt.projection: an option of method 'prefix'; method is {method!r}"
    if prompt.encoder != "mlp" and method != "p_tuning":
        yield f"prompt.encoder: an option of method 'p_tuning'; method is {method!r}"
    if prompt.hidden_size is not None and not (method == "p_tuning" or prompt.projection):
        yield "prompt.hidden_size: an option of method 'p_tuning', and of 'prefix' with prompt.projection"
    if config.data.packing:
        yield f"data.packing: not with method {method!r}, which puts its vectors before a row, not before each example"
    if method == "prefix" and config.training.gradient_checkpointing:
        yield "training.gradient_checkpointing: not with method 'prefix', whose keys and values it would leave out"


def _changed(section: Section) -> str | None:
    """The first key of a section that is not as it is by default."""
    return next((key for key, value in section if value != type(section).model_fields[key].get_default()), None)


def _first_odd(*ranks: int) -> int | None:
    return next((rank for rank in ranks if rank % 2), None)
