"""What the model is asked, from columns or from messages. One renderer: what was trained on is what is served.

Templates come from the registry's Template, a run file or a tokenizer; jinja runs in transformers' sandbox. Knows no
torch, no files and no HTTP.
"""

import difflib
import json
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loraplex_registry.version import Template
from loraplex_server.engine.chat_templates import ALPACA_INPUT
from loraplex_server.engine.errors import InvalidRequest

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
_SAME_AS = {"developer": "system"}  # OpenAI's newer word; templates know the older one
_BREAK = "\U000f0000"  # for private use, so nobody's text
_TOOLS = ("tool_calls", "function_call", "tool_call_id")

Message = dict[str, str]  # {"role": one of ROLES, "content": text}


def columns_of(template: str) -> tuple[str, ...]:
    """The columns that a prompt or completion template is filled from, each once.

    Raises:
        InvalidRequest: braces that do not match, or more in them than a column's name.
    """
    return tuple(dict.fromkeys(column for _, column in _parsed(template) if column is not None))


def fill(template: str, columns: Mapping[str, Any]) -> str:
    """Puts each ``{column}`` of the template in its place; a list is joined with ", ".

    Raises:
        InvalidRequest: as columns_of; a column that is not there (the nearest is named), or no text.
    """
    return "".join(
        literal if column is None else literal + text_of(columns, column) for literal, column in _parsed(template)
    )


def read_messages(value: Any, field: str = "messages") -> list[Message]:
    """A conversation in OpenAI's shape, its contents as plain text.

    Raises:
        InvalidRequest: no list of messages, a role that is not known, content that is not text, tools.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InvalidRequest(f"{field} is {_short(value)}, expected a list of at least one message", field)
    return [_message(message, f"{field}[{at}]", field) for at, message in enumerate(value)]


def alpaca_messages(columns: Mapping[str, Any], chat_template: str) -> list[Message]:
    """An Alpaca row's ``instruction`` and ``input`` as the user's message, apart as the template wants them."""
    between = ALPACA_INPUT if ALPACA_INPUT.strip() in chat_template else "\n\n"
    given = text_of(columns, "input") if columns.get("input") is not None else ""
    instruction = text_of(columns, "instruction")
    return [{"role": "user", "content": instruction + between + given if given.strip() else instruction}]


def own_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The chat template that the tokenizer carries."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # it has none, or several of which none is the default
        return None


def text_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The ids of a prompt that is plain text: with the BOS that this tokenizer puts before text, or without."""
    return list(tokenizer(text, verbose=False).input_ids)  # how long it may be is looked at elsewhere


def chat_ids(
    tokenizer: "PreTrainedTokenizerBase", chat_template: str, messages: Sequence[Message], answer_next: bool
) -> list[int]:
    """The ids of a conversation; ``answer_next`` ends it where the assistant begins to speak.

    A control token that a user or a system message spells out (an end of turn, say) is text: only the template and the
    assistant write control tokens.

    Raises:
        InvalidRequest: the template does not take these messages; it says why.
    """
    control = _control_tokens(tokenizer, chat_template)
    spelt = [
        message if message["role"] == "assistant" else {**message, "content": _broken(message["content"], control)}
        for message in messages
    ]
    pieces = chat_text(tokenizer, chat_template, spelt, answer_next).split(_BREAK)
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False, verbose=False).input_ids]


def chat_text(
    tokenizer: "PreTrainedTokenizerBase", chat_template: str, messages: Sequence[Message], answer_next: bool
) -> str:
    """The text of a conversation. Raises InvalidRequest as chat_ids does."""
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=chat_template, add_generation_prompt=answer_next, tokenize=False
        )
    except Exception as error:  # a template is a program of somebody else's: whatever it raises is about its input
        raise InvalidRequest(f"the chat template does not take these messages: {error}", "messages") from error
    return str(text)


def end_of_turn(tokenizer: "PreTrainedTokenizerBase", chat_template: str) -> str:
    """What the template writes after each answer, without white space; "" when it marks no end.

    Raises:
        InvalidRequest: the template leaves out what the assistant says.
    """
    said = "x7q2"
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": said}]
    _, found, after = chat_text(tokenizer, chat_template, asked, answer_next=False).rpartition(said)
    if not found:
        raise InvalidRequest("the chat template leaves out what the assistant says", "chat_template")
    return after.strip()


def ends_of(tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """A template's stop strings as what ends an answer: text, and the tokens that are no text of an answer."""
    added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    return tuple(one for one in stop if one and one not in added), tuple(added[one] for one in stop if one in added)


def chat_prompt(tokenizer: "PreTrainedTokenizerBase", template: Template, messages: Sequence[Message]) -> list[int]:
    """The ids that ask a model for the next answer, as an adapter with this template was trained to be asked.

    Raises:
        InvalidRequest: the template is not one for these messages, or there is none.
    """
    if template.chat is not None:
        return chat_ids(tokenizer, template.chat, messages, answer_next=True)
    if template.prompt is not None:
        return text_ids(tokenizer, _as_prompt(template.prompt, messages))
    if (own := own_template(tokenizer)) is not None:
        return chat_ids(tokenizer, own, messages, answer_next=True)
    raise InvalidRequest(
        "neither the adapter nor the base's tokenizer has a chat template: send a prompt to /v1/completions", "messages"
    )


def columns_prompt(tokenizer: "PreTrainedTokenizerBase", template: Template, columns: Mapping[str, Any]) -> list[int]:
    """The ids that ask about a row's columns, as an adapter with this template was trained to be asked.

    Raises:
        InvalidRequest: the adapter was not trained on columns, or one of them is missing.
    """
    if template.form == "alpaca" and template.chat is not None:
        _only(columns, ("instruction", "input"))
        return chat_ids(tokenizer, template.chat, alpaca_messages(columns, template.chat), answer_next=True)
    if template.prompt is None:
        raise InvalidRequest("inputs fill the prompt template of an adapter, and there is none here", "inputs")
    _only(columns, columns_of(template.prompt))
    return text_ids(tokenizer, fill(template.prompt, columns))


def _only(columns: Mapping[str, Any], wanted: Sequence[str]) -> None:
    """Raises InvalidRequest for a column that nobody asks for."""
    for column in columns:
        if column not in wanted:
            expected = ", ".join(map(repr, wanted)) or "none"
            raise InvalidRequest(
                f"inputs has the column {column!r}, which is not asked for; expected {expected}", "inputs"
            )


def _as_prompt(prompt: str, messages: Sequence[Message]) -> str:
    """One question is the one column of a prompt template; nothing else can be put into one."""
    columns = columns_of(prompt)
    if len(columns) != 1 or len(messages) != 1 or messages[0]["role"] != "user":
        asked = f"the adapter was trained on prompts of the form {prompt!r}, not on conversations"
        if len(columns) == 1:
            raise InvalidRequest(f"{asked}: send one user message, which is its {columns[0]!r}", "messages")
        raise InvalidRequest(f"{asked}: send them as prompt or as inputs to /v1/completions", "messages")
    return fill(prompt, {columns[0]: messages[0]["content"]})


def _parsed(template: str) -> Iterable[tuple[str, str | None]]:
    """Pieces of literal text, each with the column that follows it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InvalidRequest(f"template {template!r}: {error}", "template") from error
    if any(format_spec or conversion or column == "" for _, column, format_spec, conversion in parts):
        told = "only {column} is understood, without format or conversion"
        raise InvalidRequest(f"template {template!r}: {told}", "template")
    return [(literal, column) for literal, column, _, _ in parts]


def column_of(columns: Mapping[str, Any], column: str) -> Any:
    """What a column holds. Raises InvalidRequest when it is not there; the nearest is named."""
    if column in columns:
        return columns[column]
    near = difflib.get_close_matches(column, columns, n=1)
    others = f"the nearest is {near[0]!r}" if near else f"there are {', '.join(map(repr, columns)) or 'none'}"
    raise InvalidRequest(f"no column {column!r}; {others}", "inputs")


def text_of(columns: Mapping[str, Any], column: str) -> str:
    """The text of a column; a list is joined with ", ". Raises InvalidRequest as column_of, and for what is no text."""
    value = column_of(columns, column)
    if not all(map(_has_text, value if isinstance(value, list | tuple) else [value])):
        raise InvalidRequest(
            f"column {column!r} is {_short(value)}; text, a number, a date or a list of those is expected", "inputs"
        )
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return _unicode(text, f"column {column!r}", "inputs")


def _has_text(value: Any) -> bool:
    """Whether what str makes of it is what stands in the data, not Python's way of showing it."""
    return isinstance(value, str | int | date | time | Decimal) or (isinstance(value, float) and math.isfinite(value))


def _unicode(text: str, what: str, field: str) -> str:
    """The text. Raises InvalidRequest for half a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        told = f"{text[error.start]!a} at character {error.start}, which is not Unicode text"
        raise InvalidRequest(f"{what} has {told}", field) from error
    return text


def _message(message: Any, where: str, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{where} is {_short(message)}, expected an object with role and content", field)
    role = message.get("role")
    role = _SAME_AS.get(role, role) if isinstance(role, str) else role
    if any(message.get(key) for key in _TOOLS) or role in ("tool", "function"):
        raise InvalidRequest(f"{where} is about a tool, and tools are not supported", field)
    if role not in ROLES:
        raise InvalidRequest(f"{where} has the role {_short(role)}, expected one of {', '.join(ROLES)}", field)
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = _joined(content, where, field)
    if not isinstance(content, str):
        raise InvalidRequest(f"{where} has the content {_short(content)}, expected text", field)
    return {"role": role, "content": _unicode(content, where, field)}


def _joined(parts: Sequence[Any], where: str, field: str) -> str:
    """OpenAI's list of parts, where all of them are text."""
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"{where} has content that is not text, and only text is supported", field)
    return "".join(map(str, texts))


@lru_cache(maxsize=64)
def _control_tokens(tokenizer: "PreTrainedTokenizerBase", chat_template: str) -> re.Pattern[str]:
    """What matches the tokens that a message must not write: the special ones, and those that the template writes."""
    tokens = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content) > 1 and not token.content.isspace() and (token.special or token.content in chat_template)
    ]
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or "(?!)")


def _broken(text: str, control: re.Pattern[str]) -> str:
    """The text with a break in each control token, at which it is encoded in two."""
    return control.sub(lambda found: found[0][:1] + _BREAK + found[0][1:], text.replace(_BREAK, ""))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:80]}…"
