"""OpenAI's completions in and out: what a body may say, and how answers, chunks and errors look. No engine, no sockets.

Source: https://platform.openai.com/docs/api-reference/completions. ``adapter``, ``top_k``, ``min_p``,
``stop_token_ids``, ``repetition_penalty``, ``min_tokens`` and ``ignore_eos`` are additions that vLLM's and LoRAX's
users know; ``timeout`` is ours.
"""

import difflib
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from loraplex_server.engine.detokenize import TokenTexts
from loraplex_server.engine.errors import InvalidRequest
from loraplex_server.engine.request import Request, SamplingParams, TokenScore

MAX_PROMPTS = 64
MAX_CHOICES = 16
MAX_STOPS = 16
MOST_TOKENS = 1_000_000  # of an answer that is given no limit of its own; the context has less
# Fields of OpenAI's and vLLM's that are not honoured here; asking for them is an error, their neutral value is not.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
}


class _AtFirst(FailFast):
    """Stops at the first wrong item of a list: without it a long list of wrong items makes an error of each."""

    def __hash__(self) -> int:  # Python 3.11 wants it of what stands in a union
        return id(self)


T = TypeVar("T")
Body = TypeVar("Body", bound="SamplingBody")
Items = Annotated[list[T], _AtFirst()]


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class SamplingBody(BaseModel):
    """What completions of both kinds may say. A null field is one that was left out."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    adapter: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: str | Items[str] = Field(default_factory=list)
    stop_token_ids: Items[int] = Field(default_factory=list)
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: dict[str, float] = Field(default_factory=dict)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    timeout: float | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    @property
    def sequences(self) -> int:
        """How many answers are made of each prompt; the best ``n`` are given."""
        return self.n

    @property
    def most_tokens(self) -> int | None:
        """Of an answer; None: what the context has room for."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """How many are told of each token beside it; None: no scores are."""
        raise NotImplementedError

    @property
    def echoes(self) -> bool:
        """Whether an answer begins with its prompt."""
        return False

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters.

        Raises:
            InvalidRequest: one of them is out of range.
        """
        try:
            bias = {int(token_id): value for token_id, value in self.logit_bias.items()}
        except ValueError as error:
            raise InvalidRequest("logit_bias has a key that is not a token id", "logit_bias") from error
        ranked = self.alternatives is None and self.sequences > self.n
        return SamplingParams(
            max_tokens=MOST_TOKENS if self.most_tokens is None else self.most_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            seed=self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=bias,
            prompt_logprobs=self.alternatives if self.echoes else None,
            logprobs=0 if ranked else self.alternatives,  # 0: to rank them
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
        )


class CompletionBody(SamplingBody):
    """The body of POST /v1/completions."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]] | None = None
    inputs: dict[str, Any] | None = None
    max_tokens: int = 16
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    echo: bool = False
    logprobs: int | None = None
    suffix: str | None = None

    @property
    def sequences(self) -> int:
        """How many answers are made of each prompt; the best ``n`` are given."""
        return self.best_of or self.n

    @property
    def most_tokens(self) -> int | None:
        """Of an answer."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many are told of each token beside it; None: no scores are."""
        return self.logprobs

    @property
    def echoes(self) -> bool:
        """Whether an answer begins with its prompt."""
        return self.echo

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt, as text or as token ids; none where inputs stand in its place."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt or []  # pyright: ignore[reportReturnType]


class AdapterBody(BaseModel):
    """The body of POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM names them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: str
    pinned: bool = False
    lora_path: str | None = None  # known, to be refused in so many words


def parse_adapter(body: bytes) -> AdapterBody:
    """Read the body of a request to load or unload an adapter.

    Raises:
        InvalidRequest: as parse_completion, and for a path: what is served comes from the registry.
    """
    data = fields_of(body, AdapterBody)
    if "lora_path" in data:
        told = "lora_path names a file of the caller's, which this server does not read"
        raise InvalidRequest(
            f"{told}; push the adapter to the registry and give its reference as lora_name", "lora_path"
        )
    if "lora_name" not in data:
        raise InvalidRequest("lora_name is missing, expected a reference to an adapter", "lora_name")
    try:
        return AdapterBody.model_validate(data)
    except ValidationError as error:
        raise _first(error, data) from error


def parse_completion(body: bytes) -> CompletionBody:
    """Read a request body.

    Raises:
        InvalidRequest: not a JSON object, an unknown field (the nearest is named), a wrong type, a value out of range.
    """
    data = fields_of(body, CompletionBody)
    if "prompt" not in data and "inputs" not in data:
        raise InvalidRequest("prompt is missing, expected a string, a list of strings or token ids", "prompt")
    if "prompt" in data and "inputs" in data:
        raise InvalidRequest("inputs is given, and prompt too; expected one of them", "inputs")
    parsed = parse(CompletionBody, data, _NOT_YET)
    if "prompt" in data and not parsed.prompts:
        raise InvalidRequest("prompt is an empty list, expected at least one prompt", "prompt")
    if len(parsed.prompts) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt holds {len(parsed.prompts)} prompts, expected at most {MAX_PROMPTS}", "prompt")
    if parsed.sequences < parsed.n:
        raise InvalidRequest(f"best_of is {parsed.best_of}, expected at least n, which is {parsed.n}", "best_of")
    if parsed.sequences > parsed.n and parsed.stream:
        told = f"best_of is {parsed.best_of} and n is {parsed.n}: the best are known at the end, so they"
        raise InvalidRequest(f"{told} cannot be streamed; expected n or nothing", "best_of")
    return parsed


def parse(kind: type[Body], data: dict[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> Body:
    """The body that the fields make; of the ``refused`` ones only the values that change nothing are taken.

    Raises:
        InvalidRequest: see parse_completion.
    """
    for name, neutral in refused.items():
        if data.get(name) not in neutral:
            raise InvalidRequest(f"{name} is {data[name]!r}, which this server does not support; leave it out", name)
    try:
        parsed = kind.model_validate(data)
    except ValidationError as error:
        raise _first(error, data) from error
    if parsed.timeout is not None and not 0 < parsed.timeout < inf:
        raise InvalidRequest(f"timeout is {parsed.timeout!r}, expected seconds above 0", "timeout")
    if len(parsed.params.stop) > MAX_STOPS:
        raise InvalidRequest(f"stop holds {len(parsed.params.stop)} strings, expected at most {MAX_STOPS}", "stop")
    if parsed.stream_options and not parsed.stream:
        raise InvalidRequest("stream_options is given, but stream is false", "stream_options")
    return parsed


def fields_of(body: bytes, known: type[BaseModel]) -> dict[str, Any]:
    """The fields that are given, all of them known.

    Raises:
        InvalidRequest: not a JSON object, or an unknown field.
    """
    try:
        data = from_json(body)  # unlike json, it refuses half a surrogate pair, which no UTF-8 can carry
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}", "body") from error
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body is a JSON {type(data).__name__}, expected an object", "body")
    data = {key: value for key, value in data.items() if value is not None}
    for name in data.keys() - known.model_fields.keys():
        near = difflib.get_close_matches(name[:80], known.model_fields, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidRequest(f"unrecognized field {name[:80]!r}{hint}", name[:80])
    return data


def _first(error: ValidationError, data: dict[str, Any]) -> InvalidRequest:
    first = error.errors()[0]
    name = str(first["loc"][0])
    shown = reprlib.repr(data.get(name))
    if name == "prompt":  # a union: pydantic names only its first arm
        expected = "a string, a list of strings, a list of token ids, or a list of those"
    elif name == "stop":
        expected = "a string or a list of strings"
    else:
        expected = first["msg"].removeprefix("Input should be ")
    return InvalidRequest(f"{name} is {shown}, expected {expected}", name)


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def choice(index: int, text: str, finish_reason: str | None, scored: dict[str, Any] | None = None) -> dict[str, Any]:
    """One entry of ``choices``, in an answer or in a chunk."""
    return {"index": index, "text": text, "logprobs": scored, "finish_reason": finish_reason}


def logprobs(scores: Sequence[TokenScore], offsets: Sequence[int], text_of: TokenTexts) -> dict[str, Any]:
    """``logprobs`` of a choice: four lists, an entry a token."""
    return {
        "tokens": [text_of(score.token_id) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_alternatives(score, text_of) for score in scores],
        "text_offset": list(offsets),
    }


def _alternatives(score: TokenScore, text_of: Callable[[int], str]) -> dict[str, float] | None:
    """The likeliest tokens and the one that stands there; of two with one text the likelier is told."""
    if score.logprob is None:
        return None
    named: dict[str, float] = {}
    for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
        named.setdefault(text_of(token_id), logprob)
    return named


def usage(requests: list[Request], sequences: int) -> dict[str, Any]:
    """Token counts over all that was generated; a prompt with several ``sequences`` counts once, as OpenAI counts."""
    prompt = sum(len(request.prompt_ids) for request in requests[::sequences])
    cached = sum(request.cached_tokens for request in requests[::sequences])
    completion = sum(len(request.output_ids) for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def envelope(
    kind: str, head: dict[str, Any], choices: list[dict[str, Any]], counted: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An answer or a chunk, as its ``object`` says: ``head`` has id, created, model and adapter."""
    body = {"object": kind, **head, "choices": choices}
    return body if counted is None else {**body, "usage": counted}


@dataclass(frozen=True)
class Shape:
    """How the answers of one endpoint look. A choice is made of index, text, finish_reason and scores."""

    id_prefix: str
    whole: str  # the ``object`` of an answer
    chunk: str  # and of an event
    choice: Callable[[int, str, str | None, dict[str, Any] | None], dict[str, Any]]
    piece: Callable[[int, str, str | None, dict[str, Any] | None], dict[str, Any]]  # of an event
    logprobs: Callable[[Sequence[TokenScore], Sequence[int], TokenTexts], dict[str, Any]]
    opening: Callable[[int], dict[str, Any]] | None = None  # the choice of each answer's first event


COMPLETION = Shape("cmpl", "text_completion", "text_completion", choice, choice, logprobs)
