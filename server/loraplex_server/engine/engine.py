"""The engine: schedule, forward, sample, finish. One step at a time, on one thread; knows no HTTP.

Owns the requests from the moment they are added until their last delta is handed out.
"""

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from math import inf
from pathlib import Path
from time import monotonic

import torch

from loraplex_server.adapters.device import DeviceAdapters
from loraplex_server.adapters.host import AdapterReader, HostAdapter
from loraplex_server.adapters.residency import Observer, Place, Residency, Unobserved
from loraplex_server.engine.attention import KVTensors
from loraplex_server.engine.backend import prepare
from loraplex_server.engine.batch import Batch
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.detokenize import Detokenizer
from loraplex_server.engine.errors import AdapterRefused, BaseUnusable, BrokenLogits, InvalidRequest
from loraplex_server.engine.goldens import GoldenChecks, Result, Verdict
from loraplex_server.engine.kv_cache import KVPages
from loraplex_server.engine.lora import Routing
from loraplex_server.engine.model import Base
from loraplex_server.engine.rendering import text_ids
from loraplex_server.engine.request import FinishReason, Request, SamplingParams, TokenScore
from loraplex_server.engine.runner import make_runner
from loraplex_server.engine.sampler import BROKEN, Sampler
from loraplex_server.engine.scheduler import Scheduler
from loraplex_server.engine.scores import score_prompts, score_sampled

log = logging.getLogger(__name__)

LOAD_NICENESS = 10
_REMEMBERED = 4  # times what the most rows can use: so much a prefix cache may hold


@dataclass(frozen=True)
class Delta:
    """What a step gave one request: certain text, the token it came with, and why it ended, if it did.

    ``score`` is the token's, where scores are wanted, and ``offset`` the characters of the answer before it.

    The request itself moves on while a delta is on its way to another thread: read the end from the delta.
    """

    request: Request
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    score: TokenScore | None = None
    offset: int = 0

    @property
    def finished(self) -> bool:
        """Whether this is the request's last delta."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class Completion:
    """A whole answer; ``scores`` are its tokens', where they are wanted."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    scores: tuple[TokenScore, ...] = ()


def _stand_back() -> None:
    """Let the engine's threads go first on a busy CPU: a load then takes about a tenth of each core from them.

    Linux has a niceness for each thread; elsewhere it is the process's, and left alone.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOAD_NICENESS)


def _no_registry(key: str) -> AbstractContextManager[Path]:
    raise AdapterRefused(f"adapter {key!r} was never added to this engine")


class Engine:
    """Serves requests over one base and many adapters.

    ``fetch`` brings an adapter that is asked for by its digest to a folder (see adapters.disk.folders); without it only
    adapters given to ``add_adapter`` are known. ``wake`` is called from another thread when a load has ended.
    """

    def __init__(
        self,
        base: Base,
        config: EngineConfig | None = None,
        fetch: Callable[[str], AbstractContextManager[Path]] = _no_registry,
        observer: Observer | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.base = base
        self.config = config = config or EngineConfig()
        self.max_tokens = config.max_model_len or base.context_tokens
        if self.max_tokens > base.context_tokens:
            most = f"expected at most {base.context_tokens}, the context of base {base.id}"
            raise BaseUnusable(f"max_model_len is {self.max_tokens}, {most}")
        self.pages = _make_pages(base, config, self.max_tokens)
        self.backend = backend = prepare(base, config)
        routing = Routing(config.max_loras, config.max_rank, backend.lora)
        graph_rows = config.max_rows if backend.cuda and config.cuda_graphs else 0
        self._runner = make_runner(
            base.model, self.pages, config.paged, graph_rows, self.max_tokens, routing, backend.native
        )
        self.pages.share = config.prefix_cache and self._runner.paged
        self.scheduler = Scheduler(
            self.pages, config.max_rows, config.step_tokens, config.max_waiting, self._runner.mixed
        )
        self._folders: dict[str, Path] = {}  # of adapters that were added by hand
        self._fetch = fetch
        cpu = base.device.type == "cpu"  # elsewhere the device casts faster than the host
        self._reader = AdapterReader(
            base.description, config.max_rank, pin=base.device.type == "cuda", dtype=backend.lora_dtype if cpu else None
        )
        self._observer = observer or Unobserved()
        self._wake = wake
        self._goldens = GoldenChecks(base.quantization, lambda token_id: str(base.tokenizer.decode([token_id])))
        self.device = DeviceAdapters(base.model, config.max_loras, backend.lora_dtype, routing)
        self.residency = Residency(
            self.device,
            self._load,
            ThreadPoolExecutor(2, "adapter-load", _stand_back),
            config.max_loras,
            config.max_host_loras,
            self._observer,
            wake,
            lambda: {request.adapter for request in self.scheduler.waiting if request.adapter},
            config.max_host_bytes,
        )
        self._eos = base.eos_token_ids
        self._sampler = Sampler(self._eos)
        self._detokenizers: dict[str, Detokenizer] = {}
        self._ids = count()
        self._pinned: dict[str, str] = {}  # the adapter of each running request, by its id
        self._forward_seconds: deque[float] = deque(maxlen=16)  # of the last steps
        self._install_left = 0.0  # seconds, of this step

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add_adapter(self, name: str, folder: str | Path) -> None:
        """Read an adapter folder and serve it under ``name``, in place of what had that name.

        The folder must stay as it is: it is read again when the adapter had to leave host memory.

        Raises:
            AdapterRefused: it cannot be used whole on this base, or requests for that name have not ended.
        """
        adapter = self._reader.read(name, Path(folder))
        if users := sum(r.adapter == name for r in (*self.scheduler.running, *self.scheduler.waiting)):
            raise AdapterRefused(f"adapter {name!r} is used by {users} requests, expected none while it is replaced")
        self.residency.put(adapter)
        self._goldens.forget(name)
        self.pages.forget_adapter(name)
        self._folders[name] = Path(folder)

    def check(self, request: Request) -> None:
        """Whether a request can ever be served.

        Raises:
            InvalidRequest: an empty prompt, a token that is not in the vocabulary, more tokens than fit, or a weight
                that is no positive number.
        """
        vocabulary = self.base.model.config.vocab_size
        wanted, prompt = request.most_tokens, len(request.prompt_ids)
        if not 0 < request.weight < inf:
            raise InvalidRequest(f"weight is {request.weight!r}, expected a number above 0", "weight")
        if not prompt:
            raise InvalidRequest("prompt is empty, expected at least one token", "prompt")
        params = request.params
        named = {"prompt": request.prompt_ids, "logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}
        for name, ids in named.items():
            if bad := next((i for i in ids if not 0 <= i < vocabulary), None):
                raise InvalidRequest(f"{name} holds token id {bad}, expected ids from 0 to {vocabulary - 1}", name)
        if prompt > self.max_tokens or (prompt == self.max_tokens and params.max_tokens):
            most = "fewer than" if params.max_tokens else "at most"
            raise InvalidRequest(f"prompt has {prompt} tokens, expected {most} {self.max_tokens}", "prompt")
        if wanted > self.max_tokens or not self.pages.fits_ever(request):
            most = min(self.max_tokens, self.pages.pages * self.pages.page_tokens)
            asked = f"{prompt} of the prompt and max_tokens {request.params.max_tokens}"
            raise InvalidRequest(
                f"the request asks for {wanted} tokens ({asked}), expected at most {most}", "max_tokens"
            )

    def add(self, request: Request) -> None:
        """Queue a request and begin to load its adapter.

        Raises:
            InvalidRequest: see check.
            Overloaded: the queue is full.
        """
        self.check(request)
        self.scheduler.add(request)
        params = request.params
        self._detokenizers[request.id] = Detokenizer(
            self.base.tokenizer, request.prompt_ids, params.stop, params.min_tokens
        )
        if request.adapter is not None:
            self.residency.asked(request.adapter)

    def abort(self, request: Request) -> None:
        """End a request that nobody waits for any more."""
        if not request.finished:
            self._end(request, FinishReason.ABORT)

    def step(self) -> list[Delta]:
        """Compute some tokens of some requests; a request whose adapter or forward failed ends with its error.

        What golden prompts were answered is nobody's but ours.
        """
        deltas = []
        for delta in self._step():
            if not self._goldens.owns(delta.request):
                deltas.append(delta)
                continue
            if verdict := self._goldens.take(delta.request, delta.score):
                self._judged(verdict)
            self._wake()  # nobody sees that something was done: there may be more to do
        return deltas

    def proven(self, adapter: str) -> bool:
        """Whether an adapter may answer: it is in host memory, and its golden prompts, if any, came out right.

        The first to ask has them computed, before all other requests that wait; `wake` tells when that is done.
        """
        if not self.config.check_goldens or self._goldens.passed(adapter):
            return True
        held = self.residency.held(adapter)
        if held and not self._goldens.running(adapter):
            try:
                asked = self._goldens.begin(adapter, held.receipt, self.check)
            except InvalidRequest as error:
                self._judged(Verdict(adapter, Result.REFUSED, f"its golden prompts cannot be computed here: {error}"))
                asked = []
            for request in asked:
                self._detokenizers[request.id] = Detokenizer(self.base.tokenizer, request.prompt_ids)
            self.scheduler.add_first(asked)
            self._wake()  # they, or the verdict, come with the next step
        return self._goldens.passed(adapter)

    def _step(self) -> list[Delta]:
        failed: list[Delta] = []
        self._reader.share.value, self._install_left = self._shares()
        batch = self.scheduler.schedule(
            lambda request: self._place(request, failed), self._pin, self._release, self.residency.may_leave
        )
        if batch is None:  # nobody to keep waiting, though somebody may have run until now
            self._install_left = inf
        self._install()
        if batch is None:
            return failed
        started = monotonic()
        try:
            tokens = self._forward_and_sample(batch)
        except Exception as error:  # this step's requests fail; the engine goes on
            return failed + [self._fail(row.request, error) for row in batch.rows]
        self._forward_seconds.append(monotonic() - started)
        return failed + self._finish(batch, tokens)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        """Answer prompts, as text or as token ids, and wait for all; ``adapter`` is one for all, or one for each.

        Raises:
            Exception: what the first failing request failed with.
        """
        adapters = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        return self.run(
            [
                Request(f"generate-{next(self._ids)}", self._prompt_ids(prompt), params, key, monotonic())
                for prompt, key in zip(prompts, adapters, strict=True)
            ]
        )

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer requests and wait for all of them.

        Raises:
            Exception: what the first failing request failed with.
        """
        todo, deltas = list(reversed(requests)), {request.id: [] for request in requests}
        while todo or self.has_work:
            while todo and len(self.scheduler.waiting) < self.config.max_waiting:
                self.add(todo.pop())
            for delta in self.step():
                deltas[delta.request.id].append(delta)
                if delta.request.error:
                    raise delta.request.error
        return [_completion(request, deltas[request.id]) for request in requests]

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        return text_ids(self.base.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)

    def _shares(self) -> tuple[float, float]:
        """What adapters may take: how much of a core's time on their way to the host, and how many seconds of this step
        on their way to the device. More if many wait for one and few run.
        """
        if not self.scheduler.running:
            return 1, inf
        on_device, share = set(self.residency.on_device), self.config.load_share
        waiting = sum(r.adapter is not None and r.adapter not in on_device for r in self.scheduler.waiting)
        share = max(share, bool(share) * waiting / len(self.scheduler.running))
        return share or 1, share * min(
            self._forward_seconds, default=0.0
        )  # the shortest: others may have had long prompts

    def _install(self) -> None:
        """Go on with the adapter on its way to the device for what is left of the share, one module at least."""
        started = monotonic()
        self.residency.install(self._install_left)
        self._install_left -= monotonic() - started

    def _load(self, key: str) -> HostAdapter:
        if folder := self._folders.get(key):
            return self._reader.read(key, folder)
        with self._fetch(key) as folder:
            return self._reader.read(key, folder)

    def _place(self, request: Request, failed: list[Delta]) -> Place:
        if request.adapter is None:
            return Place.READY
        try:
            place = self.residency.want(request.adapter)
            if place is Place.LOADING and self._install_left > 0:  # it may well be done in time for this step
                self._install()
                place = self.residency.want(request.adapter)
            # An unproven one never has no slot: what it waits for is its golden prompts, and they ask for the slot.
            return place if self._goldens.owns(request) or self.proven(request.adapter) else Place.LOADING
        except Exception as error:  # whatever the registry or the file had to say is this request's answer
            failed.append(self._fail(request, error))
            return Place.LOADING

    def _judged(self, verdict: Verdict) -> None:
        self._observer.golden_check(verdict.result)
        if verdict.result is Result.REFUSED:
            self.residency.refuse(verdict.adapter, AdapterRefused(verdict.reason), for_good=True)
        elif verdict.error:
            self.residency.refuse(verdict.adapter, verdict.error, for_good=False)
        elif verdict.reason:
            log.warning("adapter %s: %s", verdict.adapter, verdict.reason)

    def _pin(self, request: Request) -> None:
        if request.adapter is not None:
            self.residency.pin(request.adapter)
            self._pinned[request.id] = request.adapter

    def _release(self, request: Request) -> None:
        """A request runs no more, for now or for ever: its adapter may go, and with its pages what was computed."""
        if adapter := self._pinned.pop(request.id, None):
            self.residency.unpin(adapter)
        if not self.pages.holds(request):
            self._runner.forget(request)

    @torch.no_grad()
    def _forward_and_sample(self, batch: Batch) -> list[tuple[int, TokenScore | None]]:
        now = monotonic()
        for row in batch.rows:
            row.request.started_at = row.request.started_at or now
        self.device.route(batch)
        logits = self._runner.forward(self.device.model, batch)  # (kept tokens, vocabulary)
        score_prompts(batch, logits)
        if len(logits) != batch.sampling:
            logits = logits[batch.sampled_from]
        sampling = [row.request for row in batch.rows if row.samples]
        token_ids = self._sampler.sample(sampling, logits)
        return list(zip(token_ids, score_sampled(sampling, token_ids, logits), strict=True))

    def _finish(self, batch: Batch, tokens: list[tuple[int, TokenScore | None]]) -> list[Delta]:
        """Take the sampled tokens into their requests, and end those that are complete."""
        sampling = [row.request for row in batch.rows if row.samples]
        for row in batch.rows:
            row.request.computed_tokens = row.stop
            self.pages.publish(row.request, row.start, row.stop)
        return [self._extend(request, *token) for request, token in zip(sampling, tokens, strict=True)]

    def _extend(self, request: Request, token_id: int, score: TokenScore | None) -> Delta:
        if token_id == BROKEN:
            return self._fail(request, BrokenLogits("the model's numbers overflowed: no next token can be chosen"))
        params, detokenizer = request.params, self._detokenizers[request.id]
        offset = detokenizer.settled_characters
        if params.max_tokens == 0:  # the prompt was all that was asked for
            self._end(request, FinishReason.LENGTH)
            return Delta(request, "", finish_reason=FinishReason.LENGTH)
        if (token_id in self._eos and not params.ignore_eos) or token_id in params.stop_token_ids:
            text, reason = detokenizer.add((), final=True), FinishReason.STOP
        else:
            request.output_ids.append(token_id)
            last = len(request.output_ids) >= params.max_tokens
            text = detokenizer.add((token_id,), final=last)
            reason = FinishReason.STOP if detokenizer.stopped else FinishReason.LENGTH if last else None
        if reason:
            self._end(request, reason)
        return Delta(request, text, (token_id,), reason, score, offset)

    def _fail(self, request: Request, error: Exception) -> Delta:
        request.error = error
        self._end(request, FinishReason.ERROR)
        return Delta(request, "", finish_reason=FinishReason.ERROR)

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        self.scheduler.remove(request)
        self._release(request)
        self._sampler.forget(request)
        self._detokenizers.pop(request.id, None)


def _completion(request: Request, deltas: Sequence[Delta]) -> Completion:
    text, scores = "".join(delta.text for delta in deltas), tuple(delta.score for delta in deltas if delta.score)
    return Completion(text, request.output_ids, request.finish_reason or FinishReason.ERROR, scores)


def _make_pages(base: Base, config: EngineConfig, max_tokens: int) -> KVPages:
    """As many pages as the byte budget holds, and no more than are of use: to the rows, and to who comes back."""
    page_bytes = config.page_tokens * KVTensors.bytes_per_token(base.model.config, base.dtype)
    if config.kv_cache_bytes < page_bytes:
        least = f"expected at least {page_bytes:,}, what {config.page_tokens} tokens take on this base"
        raise BaseUnusable(f"kv_cache_bytes is {config.kv_cache_bytes:,}, {least}")
    useful = config.max_rows * -(-max_tokens // config.page_tokens) * (_REMEMBERED if config.prefix_cache else 1)
    return KVPages(min(config.kv_cache_bytes // page_bytes, useful), config.page_tokens)
