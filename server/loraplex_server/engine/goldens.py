"""Whether an adapter says here what it said where it was made: the golden prompts of its receipt, computed once.

Owns what is known of each adapter: not asked yet, being computed, good. Knows requests and scores; no torch, no tiers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from math import exp
from statistics import fmean
from time import monotonic

from loraplex_registry.goldens import Golden, Top
from loraplex_registry.receipt import Receipt
from loraplex_server.engine.request import MAX_LOGPROBS, Request, SamplingParams, TokenScore

EXACT = 0.02  # nats: difference of the likeliest tokens, see `distance`, that unquantized float32 may show
ROUNDED = 0.2  # the same for 4 bits and 16 bits, where kernels and devices round differently: 0.09 was the most seen
_VISIBLE = 0.25  # of the tolerance: what an adapter must have changed for its absence to be seen
_ASKED = SamplingParams(max_tokens=1, temperature=0.0, logprobs=MAX_LOGPROBS)

Answer = tuple[Top, Top]  # of the adapter, and of the bare base


class Result(StrEnum):
    """How a check ended, as the metrics count it. What was made on another quantization is served, with a warning."""

    PASSED = "passed"
    OTHER_QUANTIZATION = "other_quantization"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """How the check of one adapter ended; `error` is what its computation failed with."""

    adapter: str
    result: Result
    reason: str = ""
    error: Exception | None = None


@dataclass
class _Check:
    receipt: Receipt
    asked: list[Request]  # of each golden the adapter's, then the base's
    found: dict[str, Top] = field(default_factory=dict)  # by request
    error: Exception | None = None

    @property
    def answers(self) -> list[Answer]:
        found = [self.found[request.id] for request in self.asked]
        return list(zip(found[::2], found[1::2], strict=True))


class GoldenChecks:
    """The checks of one engine. ``quantization`` is its base's, ``text_of`` gives a token's text."""

    def __init__(self, quantization: str, text_of: Callable[[int], str]) -> None:
        self._quantization, self._text_of = quantization, text_of
        self._passed: set[str] = set()
        self._open: dict[str, _Check] = {}
        self._of: dict[str, str] = {}  # request → adapter
        self._numbers = count()

    def passed(self, adapter: str) -> bool:
        """Whether an adapter may answer."""
        return adapter in self._passed

    def running(self, adapter: str) -> bool:
        """Whether its goldens are being computed."""
        return adapter in self._open

    def owns(self, request: Request) -> bool:
        """Whether a request is one of ours, and nobody's answer."""
        return request.id in self._of

    def begin(self, adapter: str, receipt: Receipt, check: Callable[[Request], None]) -> list[Request]:
        """What is to be computed for an adapter; nothing, and it has passed, if its receipt has no goldens.

        Raises what ``check`` raises for a request that can never be served.
        """
        if not receipt.goldens:
            self._passed.add(adapter)
            return []
        asked = [
            Request(f"golden-{next(self._numbers)}", list(golden.ids), _ASKED, who, monotonic())
            for golden in receipt.goldens
            for who in (adapter, None)
        ]
        for request in asked:
            check(request)
        self._open[adapter] = _Check(receipt, asked)
        self._of |= {request.id: adapter for request in asked}
        return asked

    def forget(self, adapter: str) -> None:
        """What has this name is another adapter from now on."""
        self._passed.discard(adapter)

    def take(self, request: Request, score: TokenScore | None) -> Verdict | None:
        """One of our requests has ended; gives the verdict when it was the last of its adapter."""
        adapter = self._of.pop(request.id)
        check = self._open[adapter]
        if score:
            check.found[request.id] = score.top
        check.error = check.error or request.error
        if any(one.id in self._of for one in check.asked):
            return None
        del self._open[adapter]
        if check.error:
            return Verdict(adapter, Result.FAILED, error=check.error)
        trained_on = check.receipt.base and check.receipt.base.quantization
        result, reason = judge(check.receipt.goldens, check.answers, trained_on, self._quantization, self._text_of)
        if result is not Result.REFUSED:
            self._passed.add(adapter)
        return Verdict(adapter, result, reason)


def judge(
    goldens: Sequence[Golden],
    answers: Sequence[Answer],
    trained_on: str | None,
    served_on: str,
    text_of: Callable[[int], str],
) -> tuple[Result, str]:
    """Compare what was found with what was expected; the reason names the prompt, the expected and the found.

    Quantizations read as `Base.quantization`; another scheme than trained on (4 bits, none) changes every number, so
    that only an adapter without any effect is refused there.
    """
    tolerance = EXACT if trained_on == served_on == "none:float32" else ROUNDED
    pairs = list(zip(goldens, answers, strict=True))
    by_adapter = [_Compared(golden.text, golden.adapter, found) for golden, (found, _) in pairs]
    by_base = [_Compared(golden.text, golden.base, found) for golden, (_, found) in pairs]
    moved_there = fmean(distance(golden.adapter, golden.base) for golden in goldens)
    moved_here = fmean(distance(adapter, base) for adapter, base in answers)
    if moved_there > _VISIBLE * tolerance and moved_here < moved_there / 10:
        return Result.REFUSED, (
            f"{max(by_adapter, key=_off).told(text_of)}, the bare base's answer: the adapter has no effect here "
            f"({moved_here:.3f} nats on its golden prompts, {moved_there:.3f} where it was made)"
        )
    if trained_on and _scheme(trained_on) != _scheme(served_on):
        off = fmean(map(_off, by_adapter))
        return Result.OTHER_QUANTIZATION, (
            f"it was made on {trained_on} and is served on {served_on}; its golden prompts differ by {off:.3f} nats"
        )
    for compared, blame in (
        (by_base, "by the bare base: this is another base than it was made on"),
        (by_adapter, "by the adapter: its weights or its base are not those of its receipt"),
    ):
        worst = max(compared, key=_off)
        if worst.off > tolerance:
            told, allowed = worst.told(text_of), f"at most {tolerance} can be rounding on {served_on}"
            return Result.REFUSED, f"{told} {blame} (off by {worst.off:.3f} nats, {allowed})"
    return Result.PASSED, ""


def distance(expected: Top, found: Top) -> float:
    """Mean difference in nats over the expected tokens, each counted by its probability.

    One that was not found is at most as likely as the last that was.
    """
    known, least = dict(found), min(logprob for _, logprob in found)
    return fmean(
        [
            abs(logprob - known[token_id]) if token_id in known else max(0.0, logprob - least)
            for token_id, logprob in expected
        ],
        weights=[exp(logprob) for _, logprob in expected],
    )


@dataclass(frozen=True)
class _Compared:
    """One prompt's answer beside the one that was expected."""

    prompt: str
    expected: Top
    found: Top

    @property
    def off(self) -> float:
        return distance(self.expected, self.found)

    def told(self, text_of: Callable[[int], str]) -> str:
        expected, found = (f"{text_of(top[0][0])!r} ({top[0][1]:.2f})" for top in (self.expected, self.found))
        return f"golden prompt {self.prompt!r}: expected {expected} next, found {found}"


def _off(compared: _Compared) -> float:
    return compared.off


def _scheme(quantization: str) -> str:
    return quantization.partition(":")[0]
