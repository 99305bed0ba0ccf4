"""Chooses the next token of each row from its logits. Knows nothing of models, caches or text."""

import torch

from loraplex_server.engine.request import Request, SamplingParams

_SMALLEST = 1e-30  # temperature: less is 0 in float32, and 0 / 0 is no probability


class Sampler:
    """Keeps one random generator per seeded request, so that its draws do not depend on its neighbours."""

    def __init__(self) -> None:
        self._generators: dict[str, torch.Generator] = {}

    def sample(self, requests: list[Request], logits: torch.Tensor) -> list[int]:
        """The next token id of each request; ``logits`` is (requests, vocabulary)."""
        logits = logits.float().cpu()
        return [self._one(request, row) for request, row in zip(requests, logits, strict=True)]

    def forget(self, request: Request) -> None:
        """Drop the generator of a request that ended."""
        self._generators.pop(request.id, None)

    def _one(self, request: Request, logits: torch.Tensor) -> int:
        params = request.params
        logits = _adjusted(logits, request)
        if params.temperature == 0:
            return int(logits.argmax())
        logits = (logits - logits.max()) / max(params.temperature, _SMALLEST)
        probabilities = _truncated(logits.softmax(-1), params)
        return int(torch.multinomial(probabilities, 1, generator=self._generator(request)))

    def _generator(self, request: Request) -> torch.Generator:
        if request.id not in self._generators:
            generator = torch.Generator()
            if request.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.params.seed)
            self._generators[request.id] = generator
        return self._generators[request.id]


def _adjusted(logits: torch.Tensor, request: Request) -> torch.Tensor:
    """Logits with bias and penalties, as https://platform.openai.com/docs/api-reference/completions defines them."""
    params = request.params
    if not (params.logit_bias or params.presence_penalty or params.frequency_penalty):
        return logits
    logits = logits.clone()
    if params.logit_bias:
        logits[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype)
    counts = torch.bincount(torch.tensor(request.output_ids, dtype=torch.long), minlength=logits.shape[-1])
    return logits - counts * params.frequency_penalty - (counts > 0) * params.presence_penalty


def _truncated(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities with the tail cut off: top-k, then nucleus (arXiv:1904.09751), then min-p (arXiv:2407.01082)."""
    if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
        return probabilities
    ordered, order = probabilities.sort(descending=True)
    keep = ordered.cumsum(-1) - ordered < params.top_p  # the token that crosses top_p is kept
    keep &= ordered >= params.min_p * ordered[0]
    keep[0] = True  # whatever float32 makes of a tiny top_p
    if params.top_k:
        keep[params.top_k :] = False
    return torch.zeros_like(probabilities).scatter(-1, order, ordered * keep)
