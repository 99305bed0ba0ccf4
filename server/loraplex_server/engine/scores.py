"""How likely the model held the tokens of a step: log-probabilities of its own logits, before any sampling parameter.

Knows logits and token ids; what is told to whom is the business of its callers.
"""

import torch

from loraplex_server.engine.batch import Batch
from loraplex_server.engine.request import Request, TokenScore

_ROWS_AT_ONCE = 32  # what is computed beside the logits is bounded by this many rows of float32
_LEAST = -9999.0  # JSON has no infinity


def score_prompts(batch: Batch, logits: torch.Tensor) -> None:
    """Add to each request that wants it the scores of the prompt tokens that this step's logits predict.

    ``logits`` is (kept tokens, vocabulary). Only scores are kept: a prompt of any length costs no more memory a step.
    """
    first = 0
    for row in batch.rows:
        request = row.request
        if request.unscored_from is not None:
            predicted = request.prompt_ids[row.stop - row.kept + 1 : row.stop + 1]
            if predicted:
                assert row.stop - row.kept == request.unscored_from, "a prompt that is scored skips no token"
            request.prompt_scores += score(
                logits[first : first + len(predicted)], predicted, request.params.prompt_logprobs or 0
            )
        first += row.kept


def score_sampled(requests: list[Request], token_ids: list[int], logits: torch.Tensor) -> list[TokenScore | None]:
    """The score of each sampled token whose request wants one; ``logits`` is (requests, vocabulary)."""
    scores: list[TokenScore | None] = [None] * len(requests)
    wanted = [i for i, request in enumerate(requests) if request.params.logprobs is not None and token_ids[i] >= 0]
    if wanted:
        tops = [requests[i].params.logprobs or 0 for i in wanted]
        rows = logits if len(wanted) == len(requests) else logits[wanted]
        found = score(rows, [token_ids[i] for i in wanted], max(tops))
        for i, top, entry in zip(wanted, tops, found, strict=True):
            scores[i] = entry._replace(top=entry.top[:top])
    return scores


def score(logits: torch.Tensor, token_ids: list[int], top: int) -> list[TokenScore]:
    """The score of one token a row, with the row's ``top`` likeliest; ``logits`` is (rows, vocabulary)."""
    scores: list[TokenScore] = []
    for first in range(0, len(token_ids), _ROWS_AT_ONCE):
        part = logits[first : first + _ROWS_AT_ONCE].float()
        ids = torch.tensor(token_ids[first : first + _ROWS_AT_ONCE], device=part.device)
        total = part.logsumexp(-1, keepdim=True)
        own = (part.gather(-1, ids[:, None]) - total).clamp(min=_LEAST)[:, 0].tolist()
        values, alternatives = part.topk(min(top, part.shape[-1]))
        values, alternatives = (values - total).clamp(min=_LEAST).tolist(), alternatives.tolist()
        scores += [
            TokenScore(token_id, logprob, tuple(zip(likely, theirs, strict=True)))
            for token_id, logprob, likely, theirs in zip(ids.tolist(), own, alternatives, values, strict=True)
        ]
    return scores
