"""Forms: what a row's columns mean. Each turns a row into the turns of one sample, before any token.

Knows no tokenizer, so a mistake in the data is found before a base is loaded.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loraplex_server.engine.errors import InvalidRequest
from loraplex_server.engine.rendering import Message, column_of, fill, read_messages, text_of
from loraplex_trainer.data_keys import DataSection
from loraplex_trainer.errors import DataError
from loraplex_trainer.sources import Columns, Row

_SHAREGPT = {"human": "user", "gpt": "assistant"}
_MARKS = {"<sys>": "system", "<usr>": "user", "<bot>": "assistant"}
_MARK = re.compile(r"<(?:sys|usr|bot)>")


@dataclass(frozen=True)
class Sample:
    """One row as it will be learnt: its prompt and completion, or its messages, or its text.

    `where` begins what is said about it. Samples of equal content have equal digests, wherever they stand.
    """

    where: str
    turns: tuple[tuple[str, str], ...]  # role and text: prompt and completion; system, user, assistant …; text

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.turns, ensure_ascii=False).encode()).hexdigest()

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """What comes before the last answer; nothing in plain text, or where nobody answers."""
        answers = [at for at, (role, _) in enumerate(self.turns) if role in ("completion", "assistant")]
        return self.turns[: answers[-1]] if answers else ()

    @property
    def messages(self) -> list[Message]:
        return [{"role": role, "content": text} for role, text in self.turns]


def sample_of(row: Row, data: DataSection) -> Sample:
    """Raises DataError, naming the row, for a column that is missing or holds something else."""
    try:
        return Sample(row.where, tuple(_FORMS[data.form](row.columns, data)))
    except InvalidRequest as error:
        raise DataError(f"{row.where}: {error}") from error


def trained_roles(data: DataSection) -> frozenset[str]:
    """The roles whose turns the loss is on."""
    if data.form == "text":
        return frozenset({"text"})
    if data.loss_on == "completion":
        return frozenset({"assistant" if data.is_chat else "completion"})
    if data.loss_on == "all":
        return frozenset({"system", "user", "assistant"} if data.is_chat else {"prompt", "completion"})
    return frozenset(data.loss_on)


def _prompt_completion(columns: Columns, data: DataSection) -> list[tuple[str, str]]:
    return [("prompt", fill(data.prompt, columns)), ("completion", fill(data.completion, columns))]


def _text(columns: Columns, data: DataSection) -> list[tuple[str, str]]:
    return [("text", text_of(columns, data.column or "text"))]


def _alpaca(columns: Columns, _: DataSection) -> list[tuple[str, str]]:
    """Instruction and input stay apart: how they are joined is the chat template's affair."""
    given = text_of(columns, "input") if columns.get("input") is not None else ""
    return [("user", text_of(columns, "instruction")), ("input", given), ("assistant", text_of(columns, "output"))]


def _messages(columns: Columns, data: DataSection) -> list[tuple[str, str]]:
    """OpenAI's messages, or ShareGPT's `conversations` of `from` and `value`."""
    column = data.column or (
        "conversations" if "messages" not in columns and "conversations" in columns else "messages"
    )
    value = column_of(columns, column)
    messages = [_as_openai(message) for message in value] if isinstance(value, list) else value
    return [(message["role"], message["content"]) for message in read_messages(messages, column)]


def _as_openai(message: Any) -> Any:
    if not isinstance(message, dict) or "from" not in message or "role" in message:
        return message
    return {"role": _SHAREGPT.get(str(message["from"]), message["from"]), "content": message.get("value")}


def _usr_bot(columns: Columns, data: DataSection) -> list[tuple[str, str]]:
    """`<usr> … <bot> …`: a mark begins a turn."""
    text = text_of(columns, data.column or "text")
    before, *turns = _MARK.split(text)
    if before.strip() or not turns:
        raise InvalidRequest(f"expected a text that begins with one of {', '.join(_MARKS)}, got {text[:40]!r}", "text")
    roles = [_MARKS[mark] for mark in _MARK.findall(text)]
    return [(role, turn.strip()) for role, turn in zip(roles, turns, strict=True)]


_FORMS: dict[str, Callable[[Columns, DataSection], list[tuple[str, str]]]] = {
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "alpaca": _alpaca,
    "text": _text,
    "usr_bot": _usr_bot,
}
