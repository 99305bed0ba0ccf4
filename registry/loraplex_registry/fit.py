"""An adapter's tensors against its base's modules, by peft's rules of naming. Knows headers only, no values."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from .base import BaseDescription
from .tensors import TensorInfo

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
EMBEDDINGS = {"embed_tokens", "wte", "wpe", "word_embeddings", "embed_in"}
HEADS = {"lm_head", "embed_out"}
HINTS = 3  # each is a search through the base's modules: a few are help enough
SEARCHED = 4096
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass
class Fit:
    """One comparison: `reasons` tells all that does not fit. The configuration has passed `wrong_options`."""

    config: dict[str, Any]
    header: dict[str, TensorInfo]
    base: BaseDescription
    modules: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)  # module path -> {"A": …, "B": …}
    hints: int = 0

    def reasons(self) -> Iterator[str]:
        yield from self._odd_keys()
        for module, sides in self.modules.items():
            yield from self._odd_module(module, sides)
        yield from self._untouched()

    def _odd_keys(self) -> Iterator[str]:
        for key, info in sorted(self.header.items()):
            found = _KEY.fullmatch(key)
            if not found:
                yield f"{key}: expected base_model.model.<module>.lora_A.weight or .lora_B.weight"
            elif info.dtype not in DTYPES:
                yield f"{key}: dtype {info.dtype}, expected one of {', '.join(DTYPES)}"
            else:
                self.modules.setdefault(found["module"], {})[found["side"]] = info

    def _odd_module(self, module: str, sides: dict[str, TensorInfo]) -> Iterator[str]:
        key = f"base_model.model.{module}"
        for side, other in ("AB", "BA"):
            if side not in sides:
                yield f"{key}.lora_{other}.weight has no lora_{side}"
                return
        leaf = module.rpartition(".")[2]
        stored = self.base.weight_of(module)
        if leaf in EMBEDDINGS:
            yield f"{key}: LoRA on embeddings is not served"
        elif leaf in HEADS and (self.base.tied or stored is None):
            yield f"{key}: in {self.base.id} this module shares the embedding's weight; LoRA on it is not served"
        elif stored is None:
            yield f"{key}: no module '{module}' in base {self.base.id}{self._nearest(module, self._base_modules())}"
        elif len(self.base.shapes[stored]) != 2:
            yield f"{key}: '{module}' is not a linear layer, its weight has shape {list(self.base.shapes[stored])}"
        elif not self._targeted(module):
            yield f"{key}: target_modules does not name this module, so its weights would be ignored"
        else:
            outputs, inputs = self._linear(self.base.shapes[stored])
            rank = self._rank(module)
            for side, expected in (("A", (rank, inputs)), ("B", (outputs, rank))):
                if sides[side].shape != expected:
                    found = list(sides[side].shape)
                    yield f"{key}.lora_{side}.weight has shape {found}, expected {list(expected)} (rank {rank})"

    def _untouched(self) -> Iterator[str]:
        """Targets that match nothing, and modules that are targeted but have no tensors."""
        targets, every = self.config["target_modules"], list(self._base_modules())
        endings = {ending for module in every for ending in _endings(module)}
        leaves = {module.rpartition(".")[2] for module in every}
        targeted = [module for module in every if self._targeted(module)]
        for target in targets if isinstance(targets, list) else ():
            if target not in endings:
                hint = self._nearest(target, leaves)
                yield f"target_modules: no module of base {self.base.id} is called '{target}'{hint}"
        for module in targeted:
            if module not in self.modules:
                yield f"target_modules names '{module}', which has no tensors in the file"
        if isinstance(self._targets, str) and self._targets != "all-linear":
            for module in sorted(self._others(every)):
                if self._matches(self._targets, module):
                    yield f"target_modules: the pattern also names '{module}', which is no linear layer"

    def _others(self, linear: Iterable[str]) -> set[str]:
        """Paths of norms and of the modules that hold others: peft gives up when a pattern names one."""
        tensors = (tensor.removesuffix(".weight") for tensor in self.base.shapes)
        parts = (path.split(".") for path in {*linear, *tensors})
        return {".".join(path[:end]) for path in parts for end in range(1, len(path) + 1)} - set(linear)

    def _base_modules(self) -> Iterator[str]:
        """Paths of the base's modules as the adapter spells them, with the part its checkpoint lacks in front."""
        lacking = {
            module.removesuffix(stored.removesuffix(".weight"))
            for module in self.modules
            if (stored := self.base.weight_of(module)) and f"{module}.weight" != stored
        }
        prefix = min(lacking, default="")
        for tensor, shape in self.base.shapes.items():
            if tensor.endswith(".weight") and len(shape) == 2:
                yield prefix + tensor.removesuffix(".weight")

    @cached_property
    def _targets(self) -> str | frozenset[str]:
        return _pattern_or_names(self.config["target_modules"])

    @cached_property
    def _excluded(self) -> str | frozenset[str]:
        return _pattern_or_names(self.config.get("exclude_modules") or [])

    def _targeted(self, module: str) -> bool:
        """peft's check_target_module_exists, for the options that are served."""
        targets, leaf = self._targets, module.rpartition(".")[2]
        if self._matches(self._excluded, module):
            return False
        if targets == "all-linear":
            return leaf not in EMBEDDINGS | HEADS
        return self._matches(targets, module) and (isinstance(targets, str) or self._layer_wanted(module))

    def _matches(self, names: str | frozenset[str], module: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return not names.isdisjoint(_endings(module))

    def _layer_wanted(self, module: str) -> bool:
        layers, patterns = self.config.get("layers_to_transform"), self.config.get("layers_pattern") or []
        if layers is None or layers == []:
            return True
        names = [patterns] if isinstance(patterns, str) else patterns
        part = "|".join(map(re.escape, names)) or r"[^.]*"
        found = re.match(rf"(?:^|.*?\.)(?:{part})\.(\d+)\.", module)
        return bool(found) and int(found[1]) in ([layers] if isinstance(layers, int) else layers)

    def _rank(self, module: str) -> int:
        """peft's get_pattern_key: the first rank_pattern that ends the module's path wins."""
        for pattern, rank in (self.config.get("rank_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return rank
        return self.config["r"]

    def _linear(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(outputs, inputs) of a stored weight; gpt2's Conv1D stores (inputs, outputs)."""
        conv1d = self.config.get("fan_in_fan_out") or self.base.architecture.startswith(("GPT2", "OpenAIGPT"))
        return (shape[1], shape[0]) if conv1d else (shape[0], shape[1])

    def _nearest(self, word: str, known: Iterable[str]) -> str:
        self.hints += 1
        near = difflib.get_close_matches(word, list(islice(known, SEARCHED)), n=1) if self.hints <= HINTS else []
        return f"; the nearest is '{near[0]}'" if near else ""


def _pattern_or_names(value: str | list[str]) -> str | frozenset[str]:
    return value if isinstance(value, str) else frozenset(value)


def _endings(module: str) -> list[str]:
    """`a.b.c` → `a.b.c`, `b.c`, `c`."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
