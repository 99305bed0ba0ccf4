"""A saved adapter and its bare base in the engine that will serve them: answers, losses, likeliest tokens of both.

The base is loaded anew: what is measured is what was written to disk, on weights no training has touched. Knows no
metrics and no files but the adapter's folder.
"""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Completion, Engine
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import Request, SamplingParams
from loraplex_trainer.config import RunConfig
from loraplex_trainer.encoding import Example

_SCORED = SamplingParams(max_tokens=0, prompt_logprobs=0)


class Served:
    """One adapter in an engine of its own.

    Raises AdapterRefused for a kind that the server does not serve, BaseUnusable for a base that it does not.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._name = config.name
        self.base = load_base(**config.base.load_options)
        self._engine = Engine(self.base, EngineConfig(max_rank=config.lora.largest_rank))
        self._engine.add_adapter(self._name, folder)
        self.max_tokens = self._engine.max_tokens  # of a prompt with its answer
        self._ids = count()

    def answers(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams] | SamplingParams
    ) -> tuple[list[Completion], list[Completion]]:
        """What the adapter answers to each prompt, and what the base does, with the same parameters."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        completions = self._engine.run(
            [
                self._request(ids, one, adapted)
                for ids, one in zip(prompts, each, strict=True)
                for adapted in (True, False)
            ]
        )
        return completions[::2], completions[1::2]

    def losses(self, examples: Sequence[Example]) -> tuple[float, float]:
        """Nats per answer token over all examples: the adapter's, and the base's."""
        return self._loss(examples, adapted=True), self._loss(examples, adapted=False)

    def _loss(self, examples: Sequence[Example], adapted: bool) -> float:
        requests = [self._request(example.ids, _SCORED, adapted) for example in examples]
        self._engine.run(requests)
        scores = [
            request.prompt_scores[position - 1].logprob or 0.0  # those of a prompt begin at its second token
            for example, request in zip(examples, requests, strict=True)
            for start, stop in example.trained
            for position in range(start, stop)
        ]
        return -sum(scores) / len(scores)

    def _request(self, ids: Sequence[int], params: SamplingParams, adapted: bool) -> Request:
        return Request(f"served-{next(self._ids)}", list(ids), params, self._name if adapted else None)
