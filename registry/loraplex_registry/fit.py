"""An adapter's tensors against its base's modules, by peft's rules of naming. Knows headers only, no values."""

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from .adapter_config import of_module
from .base import HEADS, INPUT_EMBEDDINGS, BaseDescription
from .tensors import TensorInfo

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
EMBEDDINGS = {*INPUT_EMBEDDINGS, "wpe"}  # modules that look up ids; gpt2's wpe looks up positions
POSITIONS = {"embed_positions"}  # embeddings that are given more than ids, so that peft's LoRA on them is not theirs
HINTS = 3  # each is a search through the base's modules: a few are help enough
SEARCHED = 4096
MODULE_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_(A\.weight|B\.weight|B\.bias|embedding_[AB]))"
)

_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass
class Fit:
    """One comparison: `reasons` tells all that does not fit. The configuration has passed `wrong_options`."""

    config: dict[str, Any]
    header: dict[str, TensorInfo]
    base: BaseDescription
    modules: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)  # module path -> {"lora_A.weight": …, …}
    hints: int = 0

    def reasons(self) -> Iterator[str]:
        yield from self._odd_keys()
        for module, parts in self.modules.items():
            yield from self._odd_module(module, parts)
        yield from self._untouched()

    def _odd_keys(self) -> Iterator[str]:
        for key, info in sorted(self.header.items()):
            found = MODULE_KEY.fullmatch(key)
            if key.endswith(".base_layer.weight"):
                yield (
                    f"{key}: this is the base's own weight, which all adapters share; "
                    "save the adapter with save_embedding_layers=False"
                )
            elif not found:
                yield f"{key}: expected base_model.model.<module>.lora_A.weight or .lora_B.weight"
            elif info.dtype not in DTYPES:
                yield f"{key}: dtype {info.dtype}, expected one of {', '.join(DTYPES)}"
            else:
                self.modules.setdefault(found["module"], {})[found["part"]] = info

    def _odd_module(self, module: str, parts: dict[str, TensorInfo]) -> Iterator[str]:
        key = f"base_model.model.{module}"
        leaf = module.rpartition(".")[2]
        stored = self.base.weight_of(module)
        if stored is None:
            yield f"{key}: no module '{module}' in base {self.base.id}{self._nearest(module, self._base_modules())}"
        elif len(self.base.shapes[stored]) != 2:
            yield f"{key}: '{module}' is not a linear layer, its weight has shape {list(self.base.shapes[stored])}"
        elif leaf in POSITIONS:
            yield f"{key}: LoRA on this kind of embedding is not served"
        elif leaf in EMBEDDINGS and self.config.get("lora_bias"):
            yield f"{key}: lora_bias is True, and peft has no LoRA biases on embeddings"
        elif leaf in {*EMBEDDINGS, *HEADS} and self.base.tied and self.config.get("ensure_weight_tying"):
            yield f"{key}: ensure_weight_tying is True: adapters that embedding and output head share are not served"
        elif not self._targeted(module):
            yield f"{key}: target_modules does not name this module, so its weights would be ignored"
        else:
            yield from self._odd_parts(module, parts, self._expected(module, stored))

    def _odd_parts(self, module: str, parts: dict[str, TensorInfo], expected: dict[str, list[int]]) -> Iterator[str]:
        """Tensors of one module that are missing, too many, or of another shape."""
        key, rank = f"base_model.model.{module}", self._rank(module)
        for part in sorted(expected.keys() - parts.keys()):
            yield f"{key}.{min(parts)} has no {part.removesuffix('.weight')}"
        for part in sorted(parts):
            if part not in expected:
                yield f"{key}.{part}: expected {' and '.join(expected)} for this module"
            elif list(parts[part].shape) != expected[part]:
                yield f"{key}.{part} has shape {list(parts[part].shape)}, expected {expected[part]} (rank {rank})"

    def _expected(self, module: str, stored: str) -> dict[str, list[int]]:
        """The shapes that peft would save for a module."""
        rank, shape = self._rank(module), self.base.shapes[stored]
        leaf = module.rpartition(".")[2]
        if leaf in EMBEDDINGS:
            return {"lora_embedding_A": [rank, shape[0]], "lora_embedding_B": [shape[1], rank]}
        outputs, inputs = (shape[0], shape[1]) if leaf in HEADS else self._linear(shape)
        bias = {"lora_B.bias": [outputs]} if self.config.get("lora_bias") else {}
        return {"lora_A.weight": [rank, inputs], "lora_B.weight": [outputs, rank], **bias}

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
        # Experts that are stored one by one are one tensor a layer in the model, so a name reaches only the modules
        # beside them. Who trained them one by one has tensors for them, and all must be there; the server refuses it.
        experts = any(map(_SINGLE_EXPERT.search, self.modules))
        for module in targeted:
            if module not in self.modules and (experts or not _SINGLE_EXPERT.search(module)):
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
            if module not in HEADS and (stored := self.base.weight_of(module)) and f"{module}.weight" != stored
        }
        prefix = min(lacking, default="")
        for tensor, shape in self.base.shapes.items():
            if tensor.endswith(".weight") and len(shape) == 2:
                module = tensor.removesuffix(".weight")
                yield module if module in HEADS else prefix + module
        if "lm_head.weight" not in self.base.shapes and self.base.weight_of("lm_head"):
            yield "lm_head"

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
            return leaf not in {*EMBEDDINGS, *HEADS}
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
        return of_module(self.config, "rank_pattern", "r", module)

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
