"""A saved adapter of a kind that the server does not serve, and its bare base: answers and losses by peft.

Stands in for `served`, one prompt after another. The base is loaded anew: what is measured is what was written to disk.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from loraplex_server.engine.detokenize import Detokenizer
from loraplex_server.engine.engine import Completion
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import FinishReason, SamplingParams
from loraplex_trainer.adapter import WEIGHTS, keep_dtype, keep_quantized_layout, raise_copies
from loraplex_trainer.config import RunConfig
from loraplex_trainer.encoding import Example
from loraplex_trainer.loop import mean_loss


class Unserved:
    """One adapter on a base of its own, as peft loads it."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.base = load_base(**config.base.load_options)
        keep_quantized_layout(self.base.model)  # some methods read the weights themselves
        # peft writes trained biases over the base's own: what they were is kept.
        own = [parameter for name, parameter in self.base.model.named_parameters() if name.endswith(".bias")]
        self._biases = [(parameter, parameter.detach().clone()) for parameter in own]
        self._model = PeftModel.from_pretrained(self.base.model, str(folder)).eval()
        keep_dtype(self._model)
        if config.lora.modules_to_save:  # peft has read them in the base's dtype
            raise_copies(self._model, self.base.dtype)
            set_peft_model_state_dict(self._model, load_file(folder / WEIGHTS))
        self._rows = config.training.batch_size
        self.max_tokens = self.base.context_tokens - config.virtual_tokens

    def answers(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams] | SamplingParams
    ) -> tuple[list[Completion], list[Completion]]:
        """What the adapter answers to each prompt, and what the base does, with the same parameters."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        adapted = [self._answer(self._model, *one) for one in zip(prompts, each, strict=True)]
        with self._base_alone():
            return adapted, [self._answer(self.base.model, *one) for one in zip(prompts, each, strict=True)]

    def losses(self, examples: Sequence[Example]) -> tuple[float, float]:
        """Nats per answer token over all examples: the adapter's, and the base's."""
        pad_id = min(self.base.eos_token_ids)
        adapted = mean_loss(self._model, examples, self._rows, pad_id)
        with self._base_alone():
            return adapted, mean_loss(self.base.model, examples, self._rows, pad_id)

    @torch.no_grad()
    def _answer(self, model: Any, prompt: Sequence[int], params: SamplingParams) -> Completion:
        ends = {*self.base.eos_token_ids, *params.stop_token_ids}
        more: dict[str, Any] = {}
        if params.temperature:
            more |= {"temperature": params.temperature, "top_p": params.top_p, "top_k": 0}
        if params.stop:
            more |= {"stop_strings": list(params.stop), "tokenizer": self.base.tokenizer}
        ids = torch.tensor([list(prompt)], device=self.base.model.device)
        torch.manual_seed(params.seed or 0)
        with warnings.catch_warnings():
            # generate makes them, of a row without padding: those that the model counts by itself.
            warnings.filterwarnings("ignore", "Position ids are not supported", UserWarning)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=params.max_tokens,
                do_sample=params.temperature > 0,
                eos_token_id=sorted(ends),
                pad_token_id=min(ends),
                **more,
            )[0].tolist()
        # A decoder's answer begins after its start token.
        before, given = ([], out[1:]) if self.base.model.config.is_encoder_decoder else (prompt, out[len(prompt) :])
        ended = bool(given) and given[-1] in ends
        answer = Detokenizer(self.base.tokenizer, before, params.stop)
        answer.add(given[:-1] if ended else given, final=True)
        reason = FinishReason.STOP if ended or answer.stopped else FinishReason.LENGTH
        return Completion(answer.text, given, reason)

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        """The base as it was, below the adapter that is turned off."""
        trained = [parameter.detach().clone() for parameter, _ in self._biases]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias", UserWarning)
            with torch.no_grad(), self._model.disable_adapter():
                for parameter, before in self._biases:
                    parameter.copy_(before)
                yield
                for (parameter, _), ours in zip(self._biases, trained, strict=True):
                    parameter.copy_(ours)
