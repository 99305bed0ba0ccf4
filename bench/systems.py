"""What is measured: our engine and its peers over one stored base, each answering the same requests.

Knows how to run each system, not what a workload is made of or what its bar is.
"""

# ruff: noqa: E402 - what dependencies say as they are imported is quieted first
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, count
from pathlib import Path

from loraplex_server.engine.upstream import quiet

quiet()

import torch
from peft import PeftModel
from transformers import GenerationConfig

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import Request, SamplingParams

WAIT_SECONDS = 0.001
numbers = count()


@dataclass(frozen=True)
class Ask:
    """One request: its prompt, who answers (None: the base), and how many tokens."""

    prompt: list[int]
    adapter: str | None
    new: int


@dataclass
class Run:
    """What a system did with some requests."""

    tokens: int
    seconds: float
    first: list[float] = field(default_factory=list)  # seconds to the first token, by request
    gaps: list[float] = field(default_factory=list)  # seconds between two tokens of one request

    @property
    def rate(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds


def engine_for(base: Path, folders: dict[str, Path], **config: int | bool) -> Engine:
    """Our engine; an adapter is read from its folder when it is first asked for, on a thread of its own."""
    loaded = load_base(str(base))
    settings = EngineConfig(prefix_cache=False, **config)  # random prompts: nothing could be shared but a rerun's
    return Engine(loaded, settings, lambda key: nullcontext(folders[key]))


def ours(
    engine: Engine,
    asks: Sequence[Ask],
    at_once: int | None = None,
    rate: float = math.inf,
    between: Callable[[], None] | None = None,
) -> Run:
    """The engine, at most ``at_once`` requests under way (None: all), which come at random, ``rate`` of them a second.

    A request's time begins when it is due, also if a step was running then. ``between`` is called after each step.
    """
    todo = [_request(ask) for ask in asks][::-1]
    due = list(accumulate(random.expovariate(rate) if rate < math.inf else 0.0 for _ in asks))[::-1]
    sent: dict[str, float] = {}
    last: dict[str, float] = {}
    result = Run(sum(ask.new for ask in asks), 0)
    started = time.perf_counter()
    open_requests = 0
    while todo or open_requests:
        if not open_requests:
            time.sleep(max(0, started + due[-1] - time.perf_counter()))
        while todo and open_requests < (at_once or len(asks)) and started + due[-1] <= time.perf_counter():
            request, at = todo.pop(), started + due.pop()
            sent[request.id] = at if rate < math.inf else time.perf_counter()
            engine.add(request)
            open_requests += 1
        if not (deltas := engine.step()) and not engine.scheduler.running:
            time.sleep(WAIT_SECONDS)  # as a server does, so that what loads an adapter has the CPU
        for delta in deltas:
            if delta.request.error:
                raise delta.request.error
            now, name = time.perf_counter(), delta.request.id
            if name not in sent:
                continue  # one of those that `between` sends
            open_requests -= delta.finished
            if name in last:
                result.gaps.append(now - last[name])
            else:
                result.first.append(now - sent[name])
            last[name] = now
        if between:
            between()
    result.seconds = time.perf_counter() - started
    return result


def _request(ask: Ask) -> Request:
    params = SamplingParams(max_tokens=ask.new, temperature=0, ignore_eos=True)  # as many as were asked for
    return Request(f"{next(numbers)}", ask.prompt, params, ask.adapter)


class Peers:
    """peft and transformers over the same base, each on a model of its own that is loaded when it is first run."""

    def __init__(self, base: Path, folders: dict[str, Path]) -> None:
        self._base, self._folders = str(base), folders

    @cached_property
    def _plain(self) -> torch.nn.Module:
        return load_base(self._base).model

    @cached_property
    def _peft(self) -> PeftModel:
        (name, folder), *rest = self._folders.items()
        model = PeftModel.from_pretrained(load_base(self._base).model, folder, name)
        for name, folder in rest:
            model.load_adapter(folder, name)
        return model.eval()

    def switching(self, asks: Sequence[Ask]) -> Run:
        """peft the plain way: one request after another, each after set_adapter."""
        return _timed(asks, lambda: [self._switched(ask) for ask in asks])

    def mixed(self, asks: Sequence[Ask]) -> Run:
        """peft's mixed batch: one padded batch, its adapter named for every row."""
        names = [ask.adapter for ask in asks]
        return _timed(asks, lambda: _generate(self._peft, asks, adapter_names=names))

    def generate(self, asks: Sequence[Ask]) -> Run:
        """transformers' generate on the base alone."""
        return _timed(asks, lambda: _generate(self._plain, asks))

    def batching(self, asks: Sequence[Ask]) -> Run:
        """transformers' continuous batching, which knows no adapters."""
        config = GenerationConfig(max_new_tokens=asks[0].new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        prompts = [ask.prompt for ask in asks]
        return _timed(asks, lambda: self._plain.generate_batch(inputs=prompts, generation_config=config))

    def _switched(self, ask: Ask) -> None:
        self._peft.set_adapter(ask.adapter, inference_mode=True)
        _generate(self._peft, [ask])


def _timed(asks: Sequence[Ask], work: Callable[[], object]) -> Run:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Run(sum(ask.new for ask in asks), time.perf_counter() - started)


@torch.no_grad()
def _generate(model: torch.nn.Module, asks: Sequence[Ask], **more: list[str | None]) -> None:
    """transformers' generate, greedy, no early end."""
    ids = torch.tensor([ask.prompt for ask in asks], device=next(model.parameters()).device)
    model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=asks[0].new,
        min_new_tokens=asks[0].new,
        do_sample=False,
        pad_token_id=0,
        **more,
    )
