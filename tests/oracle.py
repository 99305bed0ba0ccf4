"""The oracle that the engine's answers are held against: peft, `set_adapter`, then plain greedy `generate`, alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import load_base


class PeftAlone:
    """The reference: one request at a time, on a model of its own; in float32, unless the model is given."""

    def __init__(self, base_folder: Path, adapters: Mapping[str, Path], model: Any = None) -> None:
        model = model or AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        for name, folder in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(folder, name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        self.model = model.eval()
        self.known: dict[tuple, list[int]] = {}

    def answer(self, prompt_ids: list[int], adapter: str | None, max_tokens: int = 20) -> list[int]:
        """The tokens of the greedy answer, without the end-of-sequence token."""
        key = (tuple(prompt_ids), adapter, max_tokens)
        if key not in self.known:
            if adapter:
                self.model.set_adapter(adapter, inference_mode=True)
                self.known[key] = self._generate(prompt_ids, max_tokens)
            else:
                with self.model.disable_adapter():
                    self.known[key] = self._generate(prompt_ids, max_tokens)
        return self.known[key]

    def answers(self, prompts: Sequence[str], adapters: Sequence[str | None], tokenizer: Any) -> list[list[int]]:
        """The greedy answers to some prompts, each of its adapter."""
        return [self.answer(tokenizer(prompt).input_ids, a) for prompt, a in zip(prompts, adapters, strict=True)]

    @torch.no_grad()
    def logits(self, ids: list[int], adapter: str | None) -> torch.Tensor:
        """Of the token after ``ids``, without a cache: (vocabulary,)."""
        if adapter is None:
            with self.model.disable_adapter():
                return self.model(input_ids=torch.tensor([ids])).logits[0, -1]
        self.model.set_adapter(adapter, inference_mode=True)
        return self.model(input_ids=torch.tensor([ids])).logits[0, -1]

    def exact_logits(self, ids: list[int], adapter: str | None) -> torch.Tensor:
        """The same of the model in float64."""
        self.model.double()
        try:
            return self.logits(ids, adapter)
        finally:
            self.model.float()  # no value is lost on the way there and back

    def _generate(self, prompt_ids: list[int], max_tokens: int) -> list[int]:
        ids = torch.tensor([prompt_ids])
        mask = torch.ones_like(ids)
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=1
        )
        answer = out[0, len(prompt_ids) :].tolist()
        return answer[: answer.index(0)] if 0 in answer else answer


def engine_for(base_folder: Path, adapters: Mapping[str, Path], **config: Any) -> Engine:
    """An engine in float32 on the CPU that knows some adapters by name."""
    engine = Engine(
        load_base(str(base_folder), quantization="none", device="cpu", dtype="float32"), EngineConfig(**config)
    )
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    return engine
