"""adapter_config.json: which of peft's options are served, and of which types. Knows no weights and no base."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InvalidAdapter
from .receipt import is_number

CONFIG = "adapter_config.json"
CONFIG_BYTES = 1 << 20
NAMES = 4096

# Options that may hold any value; every other option must be absent or empty, so that none is ignored in silence.
_ANY_VALUE = """
alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_bias
lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size r rank_pattern revision
runtime_config target_modules task_type use_rslora
"""
SERVED = frozenset(_ANY_VALUE.split())
REFUSED = {
    "use_dora": "DoRA adapters are not served",
    "modules_to_save": "whole modules saved beside the LoRA weights are not served",
    "trainable_token_indices": "trained token embeddings are not served",
    "layer_replication": "replicated layers are not served",
    "target_parameters": "LoRA on bare parameters is not served",
}
# The other ways to start (pissa, olora, corda, loftq, …) change the base's own weights, which all adapters share.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json. Raises InvalidAdapter."""
    file = folder / CONFIG
    if not file.is_file():
        raise InvalidAdapter(f"{CONFIG} is missing in '{folder}'")
    if file.stat().st_size > CONFIG_BYTES:
        raise InvalidAdapter(f"{CONFIG} has {file.stat().st_size:,} bytes, at most {CONFIG_BYTES:,} are taken")
    try:
        config = json.loads(file.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidAdapter(f"{CONFIG} holds a {type(config).__name__}, expected an object")
    return config


def wrong_options(config: dict[str, Any], max_rank: int) -> Iterator[str]:
    """Every reason to refuse the configuration."""
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}; only LORA adapters are served"
        return
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        yield f"task_type is {config['task_type']!r}; only CAUSAL_LM adapters are served"
    if config.get("bias", "none") != "none":
        yield f"bias is {config['bias']!r}; adapters with trained biases are not served"
    for key in sorted(config.keys() - SERVED - {"bias"}):
        if config[key]:
            yield f"{key} is {_short(config[key])}: {REFUSED.get(key, 'this option is not served')}"
    if config.get("init_lora_weights") not in STARTS:
        yield f"init_lora_weights is {_short(config['init_lora_weights'])}: it changes the base's weights"
    yield from _wrong_types(config, max_rank)


def of_module(config: dict[str, Any], patterns: str, default: str, module: str) -> Any:
    """A module's rank or alpha, as peft's get_pattern_key finds it: the first pattern that ends its path wins."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config[default]


def _wrong_types(config: dict[str, Any], max_rank: int) -> Iterator[str]:
    ranks = {"r": config.get("r"), **_entries(config, "rank_pattern")}
    for key, rank in ranks.items():
        if type(rank) is not int or not 1 <= rank <= max_rank:
            yield f"rank {key} is {_short(rank)}, expected a whole number from 1 to {max_rank}"
    for key, alpha in {"lora_alpha": config.get("lora_alpha"), **_entries(config, "alpha_pattern")}.items():
        if not is_number(alpha):
            yield f"alpha {key} is {_short(alpha)}, expected a number"
    for key in ("fan_in_fan_out", "use_rslora", "lora_bias", "ensure_weight_tying"):
        if not isinstance(config.get(key), bool | None):
            yield f"{key} is {_short(config[key])}, expected true or false"
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        if not (value is None or isinstance(value, str) or _is_list_of(value, str)):
            yield f"{key} is {_short(value)}, expected names or one pattern"
    if not config.get("target_modules"):
        yield "target_modules is empty"
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            yield f"{key} is {_short(config[key])}, expected a string"
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            yield f"{key} is {_short(config[key])}, expected an object"
    layers = config.get("layers_to_transform")
    if not (layers is None or type(layers) is int or _is_list_of(layers, int)):
        yield f"layers_to_transform is {_short(layers)}, expected layer numbers"
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        patterns = [config.get(key)] if isinstance(config.get(key), str) else _entries(config, key)
        yield from (f"{key}: {reason}" for pattern in patterns if (reason := _wrong_pattern(str(pattern))))


def _wrong_pattern(pattern: str) -> str | None:
    """Patterns come from strangers: only those that Python's re matches in bounded time are tried."""
    if len(pattern) > 1024 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 6:
        return f"the pattern {_short(pattern)} is too long or repeats too much"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{_short(pattern)} is not a pattern: {error}"
    return None


def _entries(config: dict[str, Any], key: str) -> dict[str, Any]:
    return config[key] if isinstance(config.get(key), dict) else {}


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and len(value) <= NAMES and all(type(item) is kind for item in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")
