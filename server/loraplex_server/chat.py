"""OpenAI's chat completions in and out: what a body may say, and how answers and chunks look. No engine, no sockets.

Source: https://platform.openai.com/docs/api-reference/chat. The additions are those of completions.
"""

from collections.abc import Sequence
from typing import Any

from loraplex_server.engine.detokenize import TokenTexts
from loraplex_server.engine.errors import InvalidRequest
from loraplex_server.engine.rendering import Message, read_messages
from loraplex_server.engine.request import TokenScore
from loraplex_server.openai import Items, SamplingBody, Shape, fields_of, parse

# Fields of OpenAI's that are not honoured here; asking for them is an error, their neutral value is not.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "include_stop_str_in_output": (None, False),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "skip_special_tokens": (None, True),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
}
_KNOWN_OF_A_MESSAGE = frozenset({"role", "content"})


class ChatBody(SamplingBody):
    """The body of POST /v1/chat/completions. A null field is one that was left out."""

    messages: Items[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    tools: Any = None

    @property
    def most_tokens(self) -> int | None:
        """Of an answer; None: what the context has room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """How many are told of each token beside it; None: no scores are."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def conversation(self) -> list[Message]:
        """The messages as text.

        Raises:
            InvalidRequest: one of them is not one, or says what is not supported.
        """
        for at, message in enumerate(self.messages):
            if extra := [key for key in message if key not in _KNOWN_OF_A_MESSAGE and message[key]]:
                told = f"messages[{at}] has {extra[0][:80]!r}, which is not supported; expected role and content"
                raise InvalidRequest(told, "messages")
        return read_messages(self.messages)


def parse_chat(body: bytes) -> ChatBody:
    """Read a request body.

    Raises:
        InvalidRequest: as parse_completion, and for messages that are not text.
    """
    data = fields_of(body, ChatBody)
    if "messages" not in data:
        raise InvalidRequest("messages is missing, expected a list of at least one message", "messages")
    parsed = parse(ChatBody, data, _NOT_YET)
    both = parsed.max_tokens, parsed.max_completion_tokens
    if None not in both and both[0] != both[1]:
        told = f"max_tokens is {both[0]} and max_completion_tokens is {both[1]}, which is its newer name"
        raise InvalidRequest(f"{told}; expected one of them", "max_tokens")
    if parsed.top_logprobs is not None and not parsed.logprobs:
        raise InvalidRequest("top_logprobs is given, but logprobs is false", "top_logprobs")
    assert parsed.conversation  # raises what is wrong with it
    return parsed


def _choice(index: int, text: str, finish_reason: str | None, scored: dict[str, Any] | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": scored, "finish_reason": finish_reason}


def _piece(index: int, text: str, finish_reason: str | None, scored: dict[str, Any] | None) -> dict[str, Any]:
    delta = {"content": text} if text else {}
    return {"index": index, "delta": delta, "logprobs": scored, "finish_reason": finish_reason}


def _opening(index: int) -> dict[str, Any]:
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _logprobs(scores: Sequence[TokenScore], _offsets: Sequence[int], texts: TokenTexts) -> dict[str, Any]:
    """``logprobs`` of a choice: an entry a token, with the likeliest in its place, likeliest first."""

    def told(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": texts(token_id), "logprob": logprob, "bytes": texts.bytes_of(token_id)}

    content = [
        {**told(score.token_id, score.logprob), "top_logprobs": [told(*one) for one in score.top]} for score in scores
    ]
    return {"content": content, "refusal": None}


CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk", _choice, _piece, _logprobs, _opening)
