"""Chooses the next token of each row from its logits. Knows nothing of models, caches or text."""

from collections.abc import Collection

import torch

from loraplex_server.engine.request import Request, SamplingParams

BROKEN = -1  # in place of a token id: the row's logits are not finite
_SMALLEST = 1e-30  # temperature: less is 0 in float32, and 0 / 0 is no probability
_NEVER = torch.finfo(torch.float32).min
_SEARCHED = 1024  # tokens that are put in order for top_p and min_p before the whole vocabulary is


class Sampler:
    """Keeps one random generator per sampled request, so that its draws do not depend on its neighbours.

    ``eos_ids`` are the tokens that end an answer: ``min_tokens`` holds them off.
    """

    def __init__(self, eos_ids: Collection[int] = ()) -> None:
        self._eos = list(eos_ids)
        self._generators: dict[str, torch.Generator] = {}

    def sample(self, requests: list[Request], logits: torch.Tensor) -> list[int]:
        """The next token id of each request, or BROKEN; ``logits`` is (requests, vocabulary), on any device.

        Greedy rows are one argmax over the batch; the ids leave the device in one piece.
        """
        if not requests:
            return []
        likeliest = logits.argmax(-1)  # the first of equals, a NaN before all
        finite = logits.gather(-1, likeliest[:, None])[:, 0].isfinite()
        chosen = torch.where(finite, likeliest, BROKEN)
        others = [i for i, request in enumerate(requests) if not self._takes_likeliest(request)]
        if others:
            drawn = torch.stack([self._choose(requests[i], logits[i].float()) for i in others])
            at = torch.tensor(others, device=chosen.device)
            chosen[at] = torch.where(finite[at], drawn, BROKEN)
        return chosen.tolist()

    def forget(self, request: Request) -> None:
        """Drop the generator of a request that ended."""
        self._generators.pop(request.id, None)

    def _takes_likeliest(self, request: Request) -> bool:
        return request.params.temperature == 0 and not _is_adjusted(request)

    def _choose(self, request: Request, logits: torch.Tensor) -> torch.Tensor:  # (vocabulary,) → ()
        params = request.params
        if _is_adjusted(request):
            logits = self._adjusted(logits, request)
        if params.temperature == 0:
            return logits.argmax()
        logits = (logits - logits.max()) / max(params.temperature, _SMALLEST)
        probabilities, ids = _truncated(logits, params)
        cumulated = probabilities.cumsum(-1, dtype=torch.float64)
        drawn = torch.rand(1, generator=self._generator(request), dtype=torch.float64).to(logits.device)
        # The first that exceeds it, so never a token without probability; the bound is for a row that is not finite.
        found = torch.searchsorted(cumulated, drawn * cumulated[-1:], right=True).clamp(max=len(cumulated) - 1)
        return found[0] if ids is None else ids[found[0]]

    def _adjusted(self, logits: torch.Tensor, request: Request) -> torch.Tensor:
        """A copy with bias and penalties: the first and the last two as OpenAI defines them, repetition as in CTRL.

        Source: https://platform.openai.com/docs/api-reference/completions and arXiv:1909.05858, 4.1.
        """
        params, logits = request.params, logits.clone()
        if params.logit_bias:
            bias = torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
            logits[list(params.logit_bias)] += bias
        if params.repetition_penalty != 1:
            seen = torch.tensor(request.token_ids, device=logits.device).unique()
            there = logits[seen]
            logits[seen] = torch.where(there > 0, there / params.repetition_penalty, there * params.repetition_penalty)
        if request.output_ids and (params.presence_penalty or params.frequency_penalty):
            used, counts = torch.tensor(request.output_ids, device=logits.device).unique(return_counts=True)
            logits[used] -= counts * params.frequency_penalty + params.presence_penalty
        if len(request.output_ids) < params.min_tokens:
            logits[self._eos + list(params.stop_token_ids)] = _NEVER
        return logits

    def _generator(self, request: Request) -> torch.Generator:
        if request.id not in self._generators:
            generator = torch.Generator()
            if request.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.params.seed)
            self._generators[request.id] = generator
        return self._generators[request.id]


def _is_adjusted(request: Request) -> bool:
    params = request.params
    return (
        bool(params.logit_bias or params.presence_penalty or params.frequency_penalty)
        or params.repetition_penalty != 1
        or len(request.output_ids) < params.min_tokens
    )


def _truncated(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights of the tokens that are left, and their ids: top-k, of those the nucleus (arXiv:1904.09751), of those
    min-p (arXiv:2407.01082). Ids of None: the whole vocabulary, in order.
    """
    if params.top_k:
        values, ids = logits.topk(min(params.top_k, len(logits)))
        probabilities = values.softmax(-1)
        return probabilities * _kept(probabilities, params), ids
    probabilities = logits.softmax(-1)
    if params.top_p == 1 and params.min_p == 0:
        return probabilities, None
    ordered, ids = probabilities.topk(min(_SEARCHED, len(probabilities)))
    keep = _kept(ordered, params)
    if keep[-1] and len(ordered) < len(probabilities):  # a flat distribution: more may be left
        ordered, ids = probabilities.sort(descending=True)
        keep = _kept(ordered, params)
    return ordered * keep, ids


def _kept(ordered: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Which of the probabilities, largest first, top_p and min_p leave: always the first, and never one after a gap."""
    keep = ordered.cumsum(-1) - ordered < params.top_p  # the token that crosses top_p is kept
    keep &= ordered >= params.min_p * ordered[0]
    keep[0] = True  # whatever float32 makes of a tiny top_p
    return keep
