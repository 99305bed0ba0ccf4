"""What the server does for its callers, below HTTP: resolve an adapter, run a completion, list models, tell its state.

Owns the meeting of engine, registry and metrics; knows no sockets and no headers.
"""

import asyncio
import difflib
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any
from uuid import uuid4

from anyio import CapacityLimiter

from loraplex_registry.errors import UnknownAdapter
from loraplex_registry.version import Template, Version
from loraplex_server.chat import ChatBody
from loraplex_server.engine.detokenize import TokenTexts, text_offsets
from loraplex_server.engine.engine import Delta, Engine
from loraplex_server.engine.errors import InvalidRequest
from loraplex_server.engine.rendering import chat_prompt, columns_prompt, ends_of, text_ids
from loraplex_server.engine.request import FinishReason, Request, SamplingParams, TokenScore
from loraplex_server.known import KnownVersions
from loraplex_server.loop import EngineLoop
from loraplex_server.metrics import BASE, Metrics, ServedVersion, Snapshot
from loraplex_server.openai import CompletionBody, SamplingBody
from loraplex_server.watch import RegistrySource, RegistryWatch

_LOAD_POLL_SECONDS = 0.02
KNOWN_VERSIONS = 1024  # resolved last, beside those in memory: names for metrics, and whose new versions to fetch
REGISTRY_THREADS = 32  # apart from all others, so that a registry that hangs holds up its own callers alone


@dataclass(frozen=True)
class Prompt:
    """What one prompt feeds the model: its ids, the text a caller wrote, and what the template ends answers with."""

    ids: list[int]
    text: str | None = None
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A completion that was understood: its requests, some for each prompt, and the version that answers."""

    id: str
    created: int  # Unix seconds
    model: str
    version: Version | None  # None: the base
    requests: list[Request]
    sequences: int  # requests a prompt, one after the other
    n: int  # of which so many are given
    prompt_texts: list[str]  # one a prompt, where it is wanted
    prompt_offsets: list[list[int]]  # where each token of a prompt begins in its text; one a prompt, where wanted
    deadline: float | None = None  # seconds, monotonic

    @property
    def label(self) -> str:
        """The value of the metrics' adapter label."""
        return self.version.name if self.version else BASE

    def best(self, answers: Mapping[str, "Answer"]) -> list[Request]:
        """The requests whose answers are given: of each prompt's the ``n`` likeliest a token, likeliest first."""
        groups = [self.requests[i : i + self.sequences] for i in range(0, len(self.requests), self.sequences)]
        if self.sequences > self.n:
            for group in groups:
                group.sort(key=lambda request: answers[request.id].mean_logprob, reverse=True)
        return [request for group in groups for request in group[: self.n]]


@dataclass
class Answer:
    """Text, with the scores of its tokens where they are wanted: what one request has said so far."""

    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # where each scored token begins in the text

    @property
    def mean_logprob(self) -> float:
        """How likely its tokens were, each, the one that ended it included."""
        return mean(score.logprob or 0.0 for score in self.scores) if self.scores else 0.0

    def take(self, delta: Delta) -> None:
        """Add what a step gave."""
        self.text += delta.text
        if delta.score:
            self.scores.append(delta.score)
            self.offsets.append(delta.offset)


class Service:
    """One base, one registry, one engine."""

    def __init__(
        self,
        loop: EngineLoop,
        registry: RegistrySource,
        metrics: Metrics,
        weights: Mapping[str, float],
        request_timeout: float = 0.0,
    ) -> None:
        """``request_timeout`` is the most seconds a completion may take; 0: no limit."""
        self.loop = loop
        self.request_timeout = request_timeout
        self.engine = loop.engine
        self.base = loop.engine.base
        self.registry = registry
        self.registry_threads = CapacityLimiter(REGISTRY_THREADS)
        self.metrics = metrics
        self.weights = weights
        self.started = int(time.time())
        self.watch = RegistryWatch(registry, self._warm, self._held_names, self._forget)
        self.token_texts = TokenTexts(self.base.tokenizer)
        most = max(KNOWN_VERSIONS, self.engine.config.max_waiting + self.engine.config.max_rows)  # all that wait
        self._known = KnownVersions(most, lambda: self.engine.residency.in_host)
        metrics.observe_state(self.snapshot)

    def wants_base(self, body: SamplingBody) -> bool:
        """Whether a body asks for the base alone, which needs no registry."""
        return body.adapter is None and body.model in (None, self.base.id)

    def resolve(self, body: SamplingBody) -> Version:
        """The adapter version a body asks for. Called off the event loop.

        Raises:
            InvalidRequest: adapter and model contradict each other.
            loraplex_registry.errors.RegistryError: the reference is malformed or unknown, or the registry is away.
        """
        if body.adapter is not None:
            if body.model not in (None, self.base.id, body.adapter):
                raise InvalidRequest(
                    f"model is {body.model!r} and adapter is {body.adapter!r}; "
                    f"expected model to be the base {self.base.id!r}, the same adapter, or left out",
                    "model",
                )
            return self._remember(self.registry.resolve(body.adapter))
        assert body.model is not None  # else it wants the base
        return self._remember(self._resolve_model(body.model))

    def job(
        self, body: CompletionBody | ChatBody, version: Version | None, arrived_at: float, id_prefix: str = "cmpl"
    ) -> Job:
        """Make the requests of a completion that arrived at a time (seconds, monotonic).

        Raises:
            InvalidRequest: a parameter is out of range, or the prompt cannot be rendered or served.
        """
        job_id, each = f"{id_prefix}-{uuid4().hex}", body.sequences
        digest = version.digest if version else None
        weight = self.weights.get(version.name if version else BASE, 1.0)
        asked = self._asked(body, version.lineage.template if version else Template())
        total, most = len(asked) * each, self.engine.config.max_waiting
        if total > most:
            told = f"{len(asked)} prompts with n {body.n}" + (f", best_of {each}" if each > body.n else "")
            raise InvalidRequest(
                f"the request asks for {total} answers ({told}), expected at most {most}",
                "n" if body.n > 1 else "best_of" if each > 1 else "prompt",
            )
        requests, texts, offsets, tokenizer = [], [], [], self.base.tokenizer
        for at, prompt in enumerate(asked):
            for i in range(each):
                params = body.params if body.seed is None else body.model_copy(update={"seed": body.seed + i}).params
                params = self._completed(params, prompt, body.most_tokens)
                request = Request(
                    f"{job_id}-{at * each + i}", list(prompt.ids), params, digest, arrived_at, weight=weight
                )
                self.engine.check(request)
                requests.append(request)
            if body.echoes:
                text = prompt.text
                texts.append(tokenizer.decode(prompt.ids, skip_special_tokens=True) if text is None else text)
                offsets.append(text_offsets(tokenizer, prompt.ids) if body.alternatives is not None else [])
        limits = [seconds for seconds in (body.timeout, self.request_timeout) if seconds]
        deadline = arrived_at + min(limits) if limits else None
        model = body.model or body.adapter or self.base.id
        return Job(job_id, int(time.time()), model, version, requests, each, body.n, texts, offsets, deadline)

    def _asked(self, body: CompletionBody | ChatBody, template: Template) -> list[Prompt]:
        """The prompts of a body, rendered as the adapter's template says where the body leaves that to it."""
        tokenizer = self.base.tokenizer
        if isinstance(body, ChatBody):
            return [Prompt(chat_prompt(tokenizer, template, body.conversation), ends=template.stop)]
        if body.inputs is not None:
            return [Prompt(columns_prompt(tokenizer, template, body.inputs), ends=template.stop)]
        return [
            Prompt(text_ids(tokenizer, prompt), prompt) if isinstance(prompt, str) else Prompt(prompt)
            for prompt in body.prompts
        ]

    def _completed(self, params: SamplingParams, prompt: Prompt, most_tokens: int | None) -> SamplingParams:
        """The parameters with the ends that the template wants, and as many tokens as there is room for."""
        if most_tokens is None:
            room = min(self.engine.max_tokens, self.engine.pages.pages * self.engine.pages.page_tokens)
            params = replace(params, max_tokens=max(1, room - len(prompt.ids)))
        if not prompt.ends:
            return params
        stop, stop_token_ids = ends_of(self.base.tokenizer, prompt.ends)
        return replace(params, stop=params.stop + stop, stop_token_ids=params.stop_token_ids + stop_token_ids)

    def prompt(self, job: Job, request: Request) -> Answer:
        """What an answer to a request says of its prompt: nothing, its text, or its text and scores."""
        if not job.prompt_texts:
            return Answer()
        at = job.requests.index(request) // job.sequences
        if request.params.prompt_logprobs is None:
            return Answer(job.prompt_texts[at])
        scores = [TokenScore(request.prompt_ids[0], None), *request.prompt_scores]
        return Answer(job.prompt_texts[at], scores, job.prompt_offsets[at])

    async def run(self, job: Job) -> AsyncGenerator[Delta]:
        """The deltas of all sequences of a job as they come; every stage of each is measured.

        Raises:
            Exception: what the first failing sequence failed with.
        """
        last: dict[str, float] = {}
        first: dict[str, float] = {}
        open_requests = {request.id for request in job.requests}
        try:
            async for delta in self.loop.stream(job.requests, job.deadline):
                now, request = time.monotonic(), delta.request
                if request.id in last:
                    self.metrics.inter_token(job.label, now - last[request.id])
                last[request.id] = now
                first.setdefault(request.id, now - request.arrived_at)
                if delta.finished:
                    open_requests.discard(request.id)
                    self._finished(job, request, first[request.id])
                yield delta
        except (GeneratorExit, asyncio.CancelledError):  # the client went away
            for request in job.requests:
                if request.id in open_requests:
                    self._finished(job, request, first.get(request.id), FinishReason.ABORT)
            raise

    def find(self, ref: str) -> Version:
        """The version that a reference names now. Called off the event loop. Raises RegistryError."""
        return self._remember(self.registry.resolve(ref))

    async def load(self, version: Version, pinned: bool) -> None:
        """Bring an adapter to host memory, wait until it is there and proven; ``pinned``: and keep it.

        Raises:
            AdapterRefused: it does not fit, or too many are kept already.
            Exception: what its load raised.
        """
        kept_by_us = False  # written and read on the engine's thread alone

        def begin(engine: Engine) -> None:
            nonlocal kept_by_us
            if not pinned:
                engine.residency.stay(version.digest)
                return
            before = engine.residency.kept
            engine.residency.keep(version.digest)
            kept_by_us = version.digest not in before

        def give_up(engine: Engine) -> None:
            if kept_by_us:
                engine.residency.release(version.digest)

        def is_there(engine: Engine) -> bool:
            residency = engine.residency
            residency.collect()
            if version.digest not in residency.in_host and version.digest not in residency.loading:
                residency.want(version.digest)  # raises what became of it
            return version.digest in residency.in_host and engine.proven(version.digest)

        try:
            await self.loop.ask(begin)
            while not await self.loop.ask(is_there):
                await asyncio.sleep(_LOAD_POLL_SECONDS)
        except BaseException:  # one that never came is not kept
            self.loop.tell(give_up)  # comes after begin, even if that was not waited for
            raise

    async def unload(self, version: Version) -> bool:
        """Free an adapter's memory, with the last request that runs with it; says whether it held any."""

        def drop(engine: Engine) -> bool:
            held = version.digest in (*engine.residency.in_host, *engine.residency.loading)
            engine.residency.unload(version.digest)
            return held

        return await self.loop.ask(drop)

    def models(self) -> list[dict[str, Any]]:
        """The base, then each adapter of it as a bare name finds it. Called off the event loop."""
        aliases = self.registry.aliases()
        found = [self.registry.resolve(newest.name) for newest in self.registry.list()]
        return [self._base_card()] + [
            self._adapter_card(version, aliases.get(version.name, {})) for version in found if self._is_ours(version)
        ]

    def model(self, name: str) -> dict[str, Any]:
        """One entry of models, by any reference. Raises RegistryError."""
        if name == self.base.id:
            return self._base_card()
        version = self._resolve_model(name)
        return {**self._adapter_card(version, self.registry.aliases().get(version.name, {})), "id": name}

    def snapshot(self) -> Snapshot:
        """How things stand, for the metrics. Safe from any thread."""
        engine, residency = self.engine, self.engine.residency
        running, waiting = list(engine.scheduler.running), list(engine.scheduler.waiting)
        on_device = residency.on_device
        wanted = {r.adapter for r in waiting if r.adapter and r.adapter not in on_device}
        return Snapshot(
            requests_running=len(running),
            requests_waiting=len(waiting),
            kv_cache_usage=engine.pages.usage,
            kv_block_tokens=engine.pages.page_tokens,
            kv_blocks=engine.pages.pages,
            resident={"device": len(on_device), "host": len(residency.in_host)},
            slots={"device": residency.device_slots, "host": residency.host_slots},
            served=tuple(ServedVersion(v.name, str(v.number), v.digest) for v in self._known.of(on_device)),
            max_loras=residency.device_slots,
            running_adapters=self._known.names(on_device),
            waiting_adapters=self._known.names(wanted),
            registry_up=self.watch.up,
            registry_sync_lag_seconds=self.watch.lag_seconds,
        )

    def _finished(
        self, job: Job, request: Request, first_token_seconds: float | None, reason: FinishReason | None = None
    ) -> None:
        started = request.started_at
        self.metrics.request_finished(
            job.label,
            str(reason or request.finish_reason),
            len(request.prompt_ids),
            len(request.output_ids),
            None if started is None else started - request.arrived_at,
            first_token_seconds,
            time.monotonic() - request.arrived_at,
        )
        self.metrics.kv_cache_used(job.label, request.looked_up_tokens, request.cached_tokens, request.preemptions)

    def _resolve_model(self, name: str) -> Version:
        try:
            return self.registry.resolve(name)
        except UnknownAdapter as error:  # it may have meant the base
            near = difflib.get_close_matches(name, [n for n in (error.nearest, self.base.id) if n], 1)
            raise UnknownAdapter(name, near[0] if near else error.nearest) from error

    def _is_ours(self, version: Version) -> bool:
        """Whether a version was made on the base that is served; its weights decide, where they are known."""
        theirs = version.base
        return theirs.fingerprint == self.base.fingerprint if theirs.fingerprint else theirs.id == self.base.id

    def _remember(self, version: Version) -> Version:
        self._known.remember(version)
        return version

    def _held_names(self) -> tuple[str, ...]:
        return self._known.names(self.engine.residency.in_host)

    def _forget(self, name: str) -> None:
        """The registry knows the name no more."""
        self.metrics.forget(name)

    def _warm(self, version: Version) -> None:
        if self._known.has(version.name):  # it is in use here
            self._remember(version)
            self.loop.warm(version.digest)

    def _base_card(self) -> dict[str, Any]:
        base = self.base
        return self._card(
            base.id, None, digest=base.fingerprint, version=None, aliases={}, quantization=base.quantization
        )

    def _adapter_card(self, version: Version, aliases: dict[str, int]) -> dict[str, Any]:
        what = {"digest": version.digest, "version": version.number, "aliases": aliases, "rank": version.rank}
        return self._card(version.name, version.base.id, **what)

    def _card(self, name: str, parent: str | None, **more: Any) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "loraplex",
            "parent": parent,
            "max_model_len": self.engine.max_tokens,
            **more,
        }
