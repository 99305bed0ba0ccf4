"""Mixed load on a server: clients that ask in every way, hang up, ask for what is wrong, load, unload, push and move.

Owns what is asked and how an answer is judged; knows the server by its HTTP face and the registry alone.
"""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from oracle_process import Expected, Oracle
from transformers import PreTrainedTokenizerFast

from loraplex_registry.base import BaseDescription
from loraplex_registry.registry import Registry

LONGEST = 32  # tokens of an answer
ANSWER_SECONDS = 300  # whoever waits longer hangs; far above what a starved machine makes of it
_UNCHECKED = 400  # answers that may wait for the oracle before the clients do
_HEADS = [
    "",
    "again and again and again and again: the lazy brown dog jumps over the quick fox, and then ",
    "ünïcödé dögs jump över the lazy fox. ",
    "the quick brown fox jumps over the lazy dog; the lazy dog looks up. It was like this every day, said the fox: ",
]
_TAILS = ["the quick", "lazy dog again", "and so on", "fox?", "what then, dog", "over and över again the"]
PROMPTS = [head + tail for head in _HEADS for tail in _TAILS]
_STOPS = ["e", "a", "o", "the", " "]


class Meanings:
    """Which digests each reference may mean, while versions are pushed and aliases move."""

    def __init__(self) -> None:
        self._digests: dict[str, list[str]] = {}
        self._settled: dict[str, int] = {}

    @property
    def references(self) -> list[str]:
        """All that mean something already."""
        return list(self._settled)

    def moving(self, reference: str, digest: str) -> None:
        """From now on it may mean this as well."""
        self._digests.setdefault(reference, []).append(digest)

    def moved(self, reference: str) -> None:
        """From now on it means the newest alone, for those who ask anew."""
        self._settled[reference] = len(self._digests[reference]) - 1

    def mark(self, reference: str) -> int:
        """To be taken before one asks."""
        return self._settled[reference]

    def since(self, reference: str, mark: int) -> set[str]:
        """What it may have meant to who asked at a mark and has his answer now."""
        return set(self._digests[reference][mark:])


@dataclass
class Said:
    """An answer, whole or put together from its events: a choice each."""

    digest: str | None
    texts: list[str]
    reasons: list[str | None]
    logprobs: list[dict[str, list[Any]] | None]
    usage: dict[str, Any]
    error: str | None = None  # the code of the event that ended a stream


@dataclass
class Storm:
    """The traffic and what was seen of it. A wrong answer ends it with AssertionError.

    ``spares`` are folders of versions still to be pushed; ``refused`` are references that cannot be served, and why.
    """

    url: str
    base_id: str
    registry: Registry
    base: BaseDescription
    tokenizer: PreTrainedTokenizerFast
    oracle: Oracle
    spares: list[tuple[str, Path]]
    refused: dict[str, str]
    clients: int
    seed: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    meanings: Meanings = field(default_factory=Meanings)
    versions: dict[str, list[str]] = field(default_factory=dict)  # by name: digests of :1, :2 …
    _folders: dict[str, Path] = field(default_factory=dict)  # by digest
    _seeded: dict[tuple, list[str]] = field(default_factory=dict)  # first answers
    _pushing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _checks: asyncio.TaskGroup = field(init=False)
    _http: httpx.AsyncClient = field(init=False)
    _until: float = 0.0

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self._free = asyncio.Semaphore(_UNCHECKED)

    async def blow(self, seconds: float) -> None:
        """Traffic for so long; returns when every answer has come and was checked."""
        self._until = time.monotonic() + seconds
        pushes = seconds / (len(self.spares) + 1)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits) as self._http:
            try:
                async with asyncio.TaskGroup() as self._checks, asyncio.TaskGroup() as askers:
                    for _ in range(self.clients):
                        askers.create_task(self._repeat(self._client))
                    askers.create_task(self._keeper(pushes))
                    askers.create_task(self._repeat(self._loader))
                    askers.create_task(self._repeat(self._unloader))
                    askers.create_task(self._repeat(self._impatient_loader))
                    askers.create_task(self._repeat(self._scraper))
            except* AssertionError as wrong:
                first: BaseException = wrong
                while isinstance(first, BaseExceptionGroup):
                    first = first.exceptions[0]
                raise first from None

    def push(self, name: str, folder: Path) -> None:
        """Push a folder as the next version of a name, with what it comes to mean."""
        bare = name not in self._in_production
        number = len(self.versions.setdefault(name, [])) + 1
        version = self.registry.push(name, folder, base=self.base)
        assert version.number == number
        self._folders[version.digest] = folder
        self.versions[name].append(version.digest)
        for reference in (f"{name}:{number}", f"{name}@{version.digest}", *([name] if bare else [])):
            self.meanings.moving(reference, version.digest)
            self.meanings.moved(reference)
        self.seen["pushes"] += 1

    def promote(self, name: str, number: int, alias: str) -> None:
        """Move an alias, with what it comes to mean."""
        references = [f"{name}@{alias}", *([name] if alias == "production" else [])]
        for reference in references:
            self.meanings.moving(reference, self.versions[name][number - 1])
        self.registry.promote(f"{name}:{number}", alias)
        for reference in references:
            self.meanings.moved(reference)
        self.seen["alias moves"] += 1

    @property
    def _in_production(self) -> set[str]:
        """Names whose bare form follows their production alias."""
        return {reference.partition("@")[0] for reference in self.meanings.references if "@production" in reference}

    # --- who makes it ---

    async def _repeat(self, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while time.monotonic() < self._until:
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await act()
            except TimeoutError:
                raise AssertionError(f"{act.__name__} had no answer within {ANSWER_SECONDS} s") from None

    async def _client(self) -> None:
        acts = {
            self._greedy: 40, self._scored: 10, self._stopped: 8, self._seeded_one: 8, self._free_one: 4,
            self._in_a_hurry: 3, self._hang_up: 12, self._hang_up_within_the_body: 1, self._bad: 8,
        }  # fmt: skip
        await self._dice.choices(list(acts), list(acts.values()))[0]()

    async def _keeper(self, push_seconds: float) -> None:
        """Pushes and moves, one after the other, off the event loop as a program of its own would be."""
        next_push = time.monotonic() + push_seconds
        while time.monotonic() < self._until:
            await asyncio.sleep(self._dice.uniform(0.1, 1))
            if self.spares and time.monotonic() > next_push:
                next_push += push_seconds
                async with self._pushing:
                    await asyncio.to_thread(self.push, *self.spares.pop(0))
            name = self._dice.choice(list(self.versions))
            aliases = ("live", "production") if name in self._in_production else ("live",)
            number = self._dice.randint(1, len(self.versions[name]))
            await asyncio.to_thread(self.promote, name, number, self._dice.choice(aliases))

    async def _loader(self) -> None:
        await asyncio.sleep(self._dice.uniform(0, 0.3))
        reference, pinned = self._reference(), self._dice.random() < 0.3
        mark = self.meanings.mark(reference)
        answer = await self._post("load_lora_adapter", {"lora_name": reference, "pinned": pinned})
        assert answer.status_code == 200, answer.text
        digest = answer.json()["adapter_digest"]
        await self._must_mean(reference, mark, digest)
        assert answer.json()["loaded"] is True
        self.seen["loads by request"] += 1
        await asyncio.sleep(self._dice.uniform(0, 1))
        by_digest = f"{reference.partition('@')[0].partition(':')[0]}@{digest}"
        if pinned or self._dice.random() < 0.7:
            answer = await self._post("unload_lora_adapter", {"lora_name": by_digest})
            assert answer.status_code == 200, answer.text
            assert answer.json()["adapter_digest"] == digest
            self.seen["unloads by request"] += answer.json()["unloaded"]

    async def _unloader(self) -> None:
        """Frees what others run with."""
        await asyncio.sleep(self._dice.uniform(0, 0.5))
        answer = await self._post("unload_lora_adapter", {"lora_name": self._reference()})
        assert answer.status_code == 200, answer.text
        self.seen["unloads by request"] += answer.json()["unloaded"]

    async def _impatient_loader(self) -> None:
        """Hangs up before it is told that what it wanted kept is there."""
        await asyncio.sleep(self._dice.uniform(0, 1))
        name = self._dice.choice(list(self.versions))
        reference = f"{name}:{self._dice.randint(1, len(self.versions[name]))}"
        try:
            async with asyncio.timeout(self._dice.uniform(0.001, 0.05)):
                answer = await self._post("load_lora_adapter", {"lora_name": reference, "pinned": True})
                assert answer.status_code == 200, answer.text
        except TimeoutError:
            self.seen["disconnects before a load was done"] += 1
        answer = await self._post("unload_lora_adapter", {"lora_name": reference})  # it may have been done all the same
        assert answer.status_code == 200, answer.text

    async def _scraper(self) -> None:
        await asyncio.sleep(self._dice.uniform(0, 1))
        reference = self._reference()
        for path in ("/metrics", "/metrics/routing", "/health", "/ready", "/v1/models", f"/v1/models/{reference}"):
            answer = await self._http.get(path)
            assert answer.status_code == 200, (path, answer.text)
        self.seen["scrapes"] += 1

    # --- what is asked ---

    async def _greedy(self) -> None:
        prompts = self._dice.choices(PROMPTS, k=self._dice.choice((1, 1, 1, 1, 2)))
        more = {"n": self._dice.choice((2, 3))} if self._dice.random() < 0.1 else {}
        await self._ask_greedy(prompts, max_tokens=self._dice.choice((1, 8, 16, LONGEST, LONGEST)), **more)

    async def _scored(self) -> None:
        max_tokens = self._dice.choice((0, 1, 8, 16))
        more = {"n": 2} if self._dice.random() < 0.2 else {}
        echo = not max_tokens or self._dice.random() < 0.7
        alternatives = self._dice.choice((0, 1, 5))
        await self._ask_greedy(self._prompts(), max_tokens=max_tokens, echo=echo, logprobs=alternatives, **more)

    async def _stopped(self) -> None:
        await self._ask_greedy(self._prompts(), max_tokens=LONGEST, stop=self._dice.choice(_STOPS))

    async def _seeded_one(self) -> None:
        """Few tokens, prompts and versions: every draw runs a small risk to lie on the edge between two tokens."""
        reference = self._dice.choice([None, *(f"{name}:1" for name in self.versions)])
        prompt, seed, n = self._dice.choice(PROMPTS[6:8]), self._dice.choice((5, 2**40)), self._dice.choice((1, 2))
        body = {"prompt": prompt, "seed": seed, "n": n, "max_tokens": 8, "temperature": 0.8, "top_k": 20}
        if (said := await self._ask(body, reference)) is None:
            return
        for choice, text in enumerate(said.texts):
            first = self._seeded.setdefault((prompt, said.digest, seed + choice), [text, said.reasons[choice] or ""])
            assert [text, said.reasons[choice]] == first, (body, reference)
            self.seen["seeded answers"] += 1

    async def _free_one(self) -> None:
        best_of = self._dice.choice((None, None, 2))
        body = {
            "prompt": self._prompts(), "max_tokens": 16, "min_tokens": 4, "temperature": 1.2, "top_p": 0.9,
            "min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": 0.5, "logit_bias": {"40": -20},
            "best_of": best_of,
        }  # fmt: skip
        if said := await self._ask(body, self._reference(), may_stream=best_of is None):
            assert said.usage["completion_tokens"] >= 4
            self.seen["sampled answers"] += 1

    async def _in_a_hurry(self) -> None:
        body = {"prompt": self._prompts(), "max_tokens": LONGEST, "timeout": self._dice.choice((0.01, 0.05, 0.2))}
        await self._ask(body, self._reference(), may_be=(408,))

    async def _hang_up(self) -> None:
        """Before the first token, or within a stream."""
        body = {"prompt": self._prompts(), "max_tokens": LONGEST, "n": self._dice.choice((1, 2))}
        body = self._body(body, None if self._dice.random() < 0.1 else self._reference())
        body["stream"] = within = self._dice.random() < 0.6
        if not within:
            try:
                async with asyncio.timeout(self._dice.uniform(0.002, 0.1)):
                    await self._post("completions", body)
            except TimeoutError:
                self.seen["disconnects before the answer"] += 1
            return
        async with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                await self._overloaded(answer)
                return
            assert answer.status_code == 200, await answer.aread()
            lines, left = answer.aiter_lines(), self._dice.randint(1, 8)
            async for line in lines:
                left -= 1
                if line == "data: [DONE]":
                    return
                if not left:
                    self.seen["disconnects within a stream"] += 1
                    return

    async def _hang_up_within_the_body(self) -> None:
        _, writer = await asyncio.open_connection(self._http.base_url.host, self._http.base_url.port)
        writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"pro')
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        self.seen["disconnects within a body"] += 1

    async def _bad(self) -> None:
        mistakes = self._mistakes
        story = min(mistakes, key=lambda told: (self.seen[f"bad: {told}"], self._dice.random()))  # all, as often
        method, path, body, status, code = mistakes[story]
        content = body if isinstance(body, bytes) else json.dumps(body)
        answer = await self._http.request(method, path, content=content)
        if answer.status_code == 429 and (status == 408 or code == "adapter_refused"):  # found out behind the queue
            await self._overloaded(answer)
            return
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), (story, answer.text)
        assert answer.json()["error"]["message"], story
        self.seen[f"bad: {story}"] += 1

    @property
    def _mistakes(self) -> dict[str, tuple[str, str, Any, int, str]]:
        name = self._dice.choice(list(self.versions))

        def completion(body: Any, status: int = 400, code: str = "invalid_value") -> tuple[str, str, Any, int, str]:
            whole = {"prompt": "x", **body} if isinstance(body, dict) else body
            return "POST", "/v1/completions", whole, status, code

        return {
            "malformed JSON": completion(b'{"prompt": "x"'),
            "not an object": completion(b"[1]"),
            "not UTF-8": completion(b'{"prompt": "\xff"}'),
            "prompt of a wrong type": completion({"prompt": 5}),
            "empty prompt": completion({"prompt": ""}),
            "too long a prompt": completion({"prompt": "again " * 300, "adapter": name}),
            "too long an answer": completion({"max_tokens": 4000, "adapter": name}),
            "more answers than the queue holds": completion({"prompt": ["x"] * 16, "n": 8, "adapter": name}),
            "token out of vocabulary": completion({"prompt": [5, 999999]}),
            "wrong type": completion({"max_tokens": "ten", "adapter": name}),
            "out of range": completion({"temperature": 3, "adapter": name}),
            "unknown field": completion({"max_token": 5}),
            "best of a stream": completion({"best_of": 2, "stream": True}),
            "malformed reference": completion({"adapter": f"{name}@@x"}, 400, "invalid_reference"),
            "model against adapter": completion({"adapter": name, "model": "somebody"}),
            "unknown adapter": completion({"adapter": "nobody"}, 404, "adapter_not_found"),
            "unknown version": completion({"adapter": f"{name}:999"}, 404, "adapter_not_found"),
            "unknown alias": completion({"adapter": f"{name}@nowhere"}, 404, "adapter_not_found"),
            "unknown digest": completion({"adapter": f"{name}@sha256:{'0' * 64}"}, 404, "adapter_not_found"),
            "unknown model": completion({"model": "nobody"}, 404, "model_not_found"),
            "no time": completion({"timeout": 1e-6, "adapter": name, "max_tokens": LONGEST}, 408, "timeout"),
            "too large a body": completion(b" " * (5 << 20), 413, "too_large"),
            "another method": ("GET", "/v1/completions", b"", 405, "method_not_allowed"),
            "another path": ("POST", "/v1/chat", b"{}", 404, "not_found"),
            "a path to load": ("POST", "/v1/load_lora_adapter", {"lora_path": "/etc"}, 400, "invalid_value"),
            "unknown adapter to load": ("POST", "/v1/load_lora_adapter", {"lora_name": "no"}, 404, "adapter_not_found"),
            **{why: completion({"adapter": ref}, 422, "adapter_refused") for ref, why in self.refused.items()},
            **{
                f"{why}, to load": ("POST", "/v1/load_lora_adapter", {"lora_name": ref}, 422, "adapter_refused")
                for ref, why in self.refused.items()
            },
        }

    # --- how it is asked and judged ---

    def _prompts(self) -> list[str]:
        return [self._dice.choice(PROMPTS)]

    def _reference(self) -> str:
        """Of a few names often and of others seldom, in one of the ways to name an adapter."""
        names = list(self.versions)
        name = self._dice.choices(names, [1 / (rank + 1) for rank in range(len(names))])[0]
        return self._dice.choice([r for r in self.meanings.references if r.partition("@")[0].partition(":")[0] == name])

    def _body(self, body: dict[str, Any], reference: str | None = None) -> dict[str, Any]:
        if reference is None:
            return body if self._dice.random() < 0.5 else {**body, "model": self.base_id}
        return {**body, self._dice.choice(("adapter", "model")): reference}

    async def _ask_greedy(self, prompts: Sequence[str], **params: Any) -> None:
        reference = None if self._dice.random() < 0.15 else self._reference()
        ids = [self._ids(prompt) for prompt in prompts]
        as_ids = self._dice.random() < 0.2 and not params.get("echo")
        prompt = (
            (list(map(list, ids)) if as_ids else list(prompts))
            if len(prompts) > 1
            else ids[0]
            if as_ids
            else prompts[0]
        )
        said = await self._ask({"prompt": prompt, "temperature": 0, **params}, reference)
        if said:
            await self._free.acquire()
            self._checks.create_task(self._check(said, prompts, ids, params))

    async def _ask(
        self, body: dict[str, Any], reference: str | None, may_stream: bool = True, may_be: tuple[int, ...] = ()
    ) -> Said | None:
        """The answer, by the version that was asked for; None where the server had no room or, if allowed, no time."""
        body = self._body(body, reference)
        mark = self.meanings.mark(reference) if reference else 0
        if may_stream and self._dice.random() < 0.5:
            more = {"stream": True, "stream_options": {"include_usage": True}}
            async with self._http.stream("POST", "/v1/completions", json={**body, **more}) as answer:
                said = await self._streamed(answer) if answer.status_code == 200 else None
                await answer.aread() if said is None else None
        else:
            answer = await self._post("completions", body)
            said = _whole(answer.json()) if answer.status_code == 200 else None
        if answer.status_code == 429:
            await self._overloaded(answer)
            return None
        if answer.status_code in may_be or (said and said.error == "timeout" and 408 in may_be):
            self.seen["deadlines"] += 1
            return None
        assert said, (body, answer.status_code, answer.text)
        assert said.error is None, (body, said.error)
        assert answer.headers.get("X-Loraplex-Adapter-Digest") == said.digest
        if reference:
            await self._must_mean(reference, mark, said.digest)
        else:
            assert said.digest is None
        self.seen["answers"] += 1
        self.seen["tokens"] += said.usage["completion_tokens"]
        return said

    async def _must_mean(self, reference: str, mark: int, digest: str | None) -> None:
        if digest not in self.meanings.since(reference, mark):
            async with self._pushing:  # a version is found as soon as it is pushed, before we know its digest
                may_mean = self.meanings.since(reference, mark)
            assert digest in may_mean, f"{reference} was answered by {digest}, expected one of {may_mean}"

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self._http.post(f"/v1/{path}", json=body)

    async def _overloaded(self, answer: httpx.Response) -> None:
        await answer.aread()
        assert answer.json()["error"]["code"] == "overloaded", answer.text
        assert int(answer.headers["Retry-After"]) >= 1
        self.seen["overloaded"] += 1
        await asyncio.sleep(self._dice.uniform(0.1, 0.6))  # less than is asked for, so that it stays full

    async def _streamed(self, answer: httpx.Response) -> Said:
        chunks = [chunk async for chunk in _events(answer)]
        said = Said(None, [], [], [], {})
        for chunk in chunks:
            if "error" in chunk:
                said.error = chunk["error"]["code"]
                return said
            said.digest, said.usage = chunk.get("adapter_digest"), chunk.get("usage") or {}
            for part in chunk["choices"]:
                while len(said.texts) <= part["index"]:
                    said.texts.append("")
                    said.reasons.append(None)
                    said.logprobs.append(None)
                said.texts[part["index"]] += part["text"]
                said.reasons[part["index"]] = part["finish_reason"]
                if scores := part["logprobs"]:
                    known = said.logprobs[part["index"]] or {name: [] for name in scores}
                    said.logprobs[part["index"]] = {name: known[name] + scores[name] for name in scores}
        self.seen["streams"] += 1
        return said

    async def _check(
        self, said: Said, prompts: Sequence[str], ids: Sequence[tuple[int, ...]], params: dict[str, Any]
    ) -> None:
        try:
            folder = self._folders[said.digest] if said.digest else None
            answers = [await self.oracle.answer(prompt, folder) for prompt in ids]
        finally:
            self._free.release()
        each, counted = params.get("n", 1), 0
        assert len(said.texts) == each * len(prompts)
        for choice in range(len(said.texts)):
            at = choice // each
            counted += self._check_choice(said, choice, prompts[at], answers[at], params)
        assert said.usage["prompt_tokens"] == sum(map(len, ids))
        if "stop" not in params and all(answer.firm >= params["max_tokens"] for answer in answers):
            assert said.usage["completion_tokens"] == counted
        self.seen["greedy answers checked"] += 1

    def _check_choice(self, said: Said, choice: int, prompt: str, expected: Expected, params: dict[str, Any]) -> int:
        """Hold one choice against the oracle's; returns how many tokens it should have."""
        max_tokens, context = params["max_tokens"], (prompt, said.digest, params, said)
        ids = expected.ids[:max_tokens]
        ended = expected.ended and len(expected.ids) < max_tokens
        before, text, reason = prompt if params.get("echo") else "", self._text(ids), "stop" if ended else "length"
        at = text.find(params["stop"]) if "stop" in params else -1
        if at >= 0:
            text, reason = text[:at], "stop"
        firm = expected.firm >= len(ids) + ended
        if firm:
            assert (said.texts[choice], said.reasons[choice]) == (before + text, reason), (text, context)
        else:  # up to the tie
            sure = before + self._text(ids[: expected.firm]).rstrip("\ufffd")
            if "stop" not in params:
                assert said.texts[choice].startswith(sure), (sure, context)
            self.seen["ties"] += 1
        if "logprobs" in params:
            scores = said.logprobs[choice]
            assert scores, context
            told = [None, *expected.scores[: len(self._ids(prompt)) - 1]] if before else []
            first = len(self._ids(prompt)) - 1
            told += expected.scores[first : first + (len(ids) + ended if firm else expected.firm)]
            given = scores["token_logprobs"][: len(told)] if not firm else scores["token_logprobs"]
            assert [x is None for x in given] == [x is None for x in told], context
            far = max((abs(x - y) for x, y in zip(given, told, strict=True) if x is not None), default=0)
            assert far < 1e-3, (far, context)
            assert len({len(entries) for entries in scores.values()}) == 1, context
            self.seen["scored answers checked"] += 1
        return len(ids)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text).input_ids)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _whole(body: dict[str, Any]) -> Said:
    choices = body["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return Said(
        body.get("adapter_digest"),
        [choice["text"] for choice in choices],
        [choice["finish_reason"] for choice in choices],
        [choice["logprobs"] for choice in choices],
        body["usage"],
    )


async def _events(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream, which must end as streams do: by DONE, or by an error."""
    last: dict[str, Any] = {}
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            return
        if line:
            last = json.loads(line.removeprefix("data: "))
            yield last
    assert "error" in last, f"the stream ended without [DONE], after {last}"
