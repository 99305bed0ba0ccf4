"""A request and what happens to it: what was asked, how far it is, why it ended.

Owns the states of one sequence; knows no torch, no HTTP and no clock but the one it is handed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from types import MappingProxyType
from typing import NamedTuple

from loraplex_server.engine.errors import InvalidRequest

MAX_LOGPROBS = 20  # alternatives per token, as vLLM allows; OpenAI's own limit is 5


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words; ``ERROR`` and ``ABORT`` never reach a successful answer."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class TokenScore(NamedTuple):
    """How likely the model held a token: natural logarithms of its own probabilities, before any sampling parameter.

    ``top`` holds the likeliest tokens with theirs, likeliest first. The first token of a prompt has no ``logprob``.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and what is told of them. Names and ranges are OpenAI's; ``top_k``, ``min_p``,
    ``repetition_penalty``, ``min_tokens`` and ``ignore_eos`` are vLLM's.

    ``temperature`` 0 is greedy. ``seed`` makes a sampled answer reproducible whatever else is in the batch.
    ``max_tokens`` 0 computes the prompt alone.

    Raises:
        InvalidRequest: a value out of range; its ``field`` is the parameter's name.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    prompt_logprobs: int | None = None  # score the prompt too: this many alternatives per token
    logprobs: int | None = None  # score what is sampled: this many alternatives per token
    repetition_penalty: float = 1.0
    min_tokens: int = 0  # before it has these, nothing but max_tokens ends an answer
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 0, 1_000_000)
        _within("temperature", self.temperature, 0, 2)
        _within("top_p", self.top_p, 0, 1)
        _within("top_k", self.top_k, 0, 1_000_000)
        _within("min_p", self.min_p, 0, 1)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name, alternatives in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if alternatives is not None:
                _within(name, alternatives, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        for token_id, bias in self.logit_bias.items():
            _within("logit_bias", bias, -100, 100)
            _within("logit_bias", token_id, 0, 10_000_000)
        if not 0 < self.repetition_penalty < inf:  # also refuses NaN
            wrong = f"repetition_penalty is {self.repetition_penalty!r}, expected a number above 0"
            raise InvalidRequest(wrong, "repetition_penalty")
        if self.top_p == 0:
            raise InvalidRequest("top_p is 0, expected a number above 0 and up to 1", "top_p")
        if any(not text for text in self.stop):
            raise InvalidRequest("stop holds an empty string, expected non-empty strings", "stop")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise InvalidRequest(f"{name} is {value!r}, expected a number from {low} to {high}", name)


@dataclass(eq=False)
class Request:
    """One sequence: its prompt, its adapter (a digest, or None for the base) and its progress."""

    id: str
    prompt_ids: list[int]
    params: SamplingParams
    adapter: str | None = None
    arrived_at: float = 0.0  # seconds, monotonic
    output_ids: list[int] = field(default_factory=list)
    computed_tokens: int = 0  # tokens whose keys and values are in the cache
    finish_reason: FinishReason | None = None
    error: Exception | None = None  # set with FinishReason.ERROR
    started_at: float | None = None  # when its first token was scheduled
    weight: float = 1.0  # its adapter's share of the service, beside the others' 1
    order: int = 0  # of arrival, given by the scheduler
    preemptions: int = 0  # times it lost its pages and began anew
    looked_up_tokens: int = 0  # tokens of the prompt that were looked for in the prefix cache
    cached_tokens: int = 0  # of these, how many were found and not computed again
    prompt_scores: list[TokenScore] = field(default_factory=list)  # from its second token on, as far as computed

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output so far."""
        return self.prompt_ids + self.output_ids

    @property
    def total_tokens(self) -> int:
        """How many tokens it has now."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def most_tokens(self) -> int:
        """How many tokens it can grow to."""
        return len(self.prompt_ids) + self.params.max_tokens

    @property
    def pending_tokens(self) -> int:
        """Tokens not yet in the cache: the prompt at first, then the one just sampled; after a preemption, both."""
        return self.total_tokens - self.computed_tokens

    @property
    def unscored_from(self) -> int | None:
        """The first position whose logits score a token of the prompt that has no score yet; None: none is wanted."""
        if self.params.prompt_logprobs is None or len(self.prompt_scores) == len(self.prompt_ids) - 1:
            return None
        return len(self.prompt_scores)

    @property
    def finished(self) -> bool:
        """Whether it has ended, for whatever reason."""
        return self.finish_reason is not None
