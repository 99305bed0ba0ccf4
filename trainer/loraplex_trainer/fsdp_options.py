"""The options `fsdp` and `fsdp_config` of transformers, accelerate and Axolotl: what of them is a setting here.

Tables and two functions for `option_names`; knows no torch.
"""

import json
from collections.abc import Mapping
from typing import Any

from loraplex_trainer.errors import ConfigError

STRATEGY, OFFLOAD = "training.distributed.strategy", "training.distributed.offload"

# Of fsdp_config, with or without "fsdp_" before them: those without effect here, whatever they are …
NEEDS_NO_SETTING = (
    "auto_wrap_policy",
    "backward_prefetch",
    "backward_prefetch_policy",
    "cpu_ram_efficient_loading",
    "final_state_dict_type",
    "forward_prefetch",
    "limit_all_gathers",
    "min_num_params",
    "state_dict_type",
    "sync_module_states",
    "transformer_layer_cls_to_wrap",
    "use_orig_params",
    "version",
)
# … and those that must ask for what is done: every weight shared out, and whole only while its layer computes.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_checkpointing": (False,),
    "reshard_after_forward": (True, "FULL_SHARD"),
    "sharding_strategy": ("FULL_SHARD", 1),
    "xla": (False,),
    "xla_fsdp_grad_ckpt": (False,),
    "xla_fsdp_v2": (False,),
}
OFFLOADS = ("cpu_offload", "offload_params")


def fsdp(value: Any, _: Mapping[str, Any]) -> dict[str, Any] | None:
    """`true`, or words in a string or a list: "full_shard auto_wrap offload"."""
    if _is_off(value):
        return {}
    given = "full_shard" if value is True else value
    words = given.split() if isinstance(given, str) else given
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return None
    words = {*words}
    if "full_shard" not in words or words - {"full_shard", "auto_wrap", "offload"}:
        return None
    return {STRATEGY: "fsdp"} | ({OFFLOAD: "cpu"} if "offload" in words else {})


def fsdp_config(value: Any, theirs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Axolotl's files have it alone; beside an `fsdp` that is off it is nothing. Raises ConfigError naming the key."""
    if not isinstance(value, Mapping):
        return None
    if _is_off(theirs.get("fsdp", True)):
        return {}
    offloaded = False
    for key, wanted in value.items():
        name = str(key).removeprefix("fsdp_")
        if name in OFFLOADS and not isinstance(wanted, bool):
            raise ConfigError(f"fsdp_config.{key}: {json.dumps(wanted, default=str)}: expected true or false")
        if name in OFFLOADS:
            offloaded = offloaded or wanted
        elif name in FIXED and wanted not in FIXED[name]:
            expected = " or ".join(json.dumps(choice) for choice in FIXED[name])
            raise ConfigError(f"fsdp_config.{key}: {json.dumps(wanted, default=str)}: expected {expected}")
        elif name not in FIXED and name not in NEEDS_NO_SETTING:
            raise ConfigError(f"fsdp_config.{key}: an unknown option")
    return {STRATEGY: "fsdp"} | ({OFFLOAD: "cpu"} if offloaded else {})


def _is_off(value: Any) -> bool:
    return value is False or value in ("", [])
