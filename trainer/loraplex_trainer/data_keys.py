"""The keys of `data`: where rows come from, what they are, and what is learnt of them. Each form has its own.

A path, a list, a share or a source is told by its value alone, so that a mistake is explained by what was meant.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from loraplex_server.engine.chat_templates import NAMES
from loraplex_trainer.sections import PositiveInt, Section

Roles = Annotated[tuple[Literal["system", "user", "assistant"], ...], Field(min_length=1)]


class SourceSection(Section):
    """One place that rows come from: a file, a folder that `datasets` wrote, or a dataset of the Hub."""

    path: str = Field(min_length=1)
    config: str | None = None
    revision: str | None = None
    split: str = "train"


_SHARE = r"^[0-9]{1,2}(\.[0-9]+)?%$"


def _checked_share(share: str) -> str:
    if not re.fullmatch(_SHARE, share):
        raise ValueError("a share below 100% is expected, such as 5% or 2.5%")
    return share


def _kind_of_source(value: object) -> str:
    if isinstance(value, Mapping | SourceSection):
        return "<source>"
    return "<list>" if isinstance(value, Sequence) and not isinstance(value, str) else "<path>"


def _kind_of_heldout(value: object) -> str:
    if isinstance(value, int):
        return "<count>"
    return "<share>" if isinstance(value, str) and value.rstrip().endswith("%") else _kind_of_source(value)


# The kind is told by the value alone, so that a mistake is explained by what was meant. Tags never reach a message.
_Path = Annotated[Path, Tag("<path>")]
_One = Annotated[SourceSection, Tag("<source>")]
_Either = Annotated[
    _Path | _One,
    Discriminator(
        _kind_of_source,
        custom_error_type="no_source",
        custom_error_message="a path, or a source such as {path: file.jsonl}; lists are not nested",
    ),
]
_Several = Annotated[tuple[_Either, ...], Field(min_length=1), Tag("<list>")]
_Share = Annotated[str, AfterValidator(_checked_share), Field(json_schema_extra={"pattern": _SHARE}), Tag("<share>")]
Sources = Annotated[_Path | _One | _Several, Discriminator(_kind_of_source)]
Heldout = Annotated[
    _Path | _One | _Several | _Share | Annotated[PositiveInt, Tag("<count>")], Discriminator(_kind_of_heldout)
]


class DataSection(Section):
    train: Sources
    heldout: Heldout | None = None
    form: Literal["prompt_completion", "messages", "alpaca", "text", "usr_bot"] = "prompt_completion"
    prompt: str = "{prompt}"
    completion: str = "{completion}"
    column: str | None = None
    chat_template: str | None = None
    loss_on: Literal["completion", "all"] | Roles = "completion"
    max_tokens: int = Field(default=512, ge=3)
    truncation: Literal["prompt_left", "turns", "split", "right", "drop", "error"] | None = None
    packing: bool = False
    on_leak: Literal["keep", "drop", "error"] = "keep"

    @field_validator("prompt")
    @classmethod
    def _ends_at_a_token_boundary(cls, prompt: str) -> str:
        if prompt.endswith((" ", "\t")):
            raise ValueError(
                "it must not end in a space: tokenizers join a space to the word after it, so the model would be served"
                " another last token than it was trained on; let data.completion begin with the space"
            )
        return prompt

    @field_validator("chat_template")
    @classmethod
    def _is_a_name_or_a_file(cls, chat_template: str | None) -> str | None:
        if chat_template is not None and chat_template not in NAMES and not chat_template.endswith(".jinja"):
            raise ValueError(f"expected {', '.join(NAMES)}, or the path of a file that ends in .jinja")
        return chat_template

    @model_validator(mode="after")
    def _fits_the_form(self) -> Self:
        """Each form has its own keys; one that would be read by nobody is refused."""
        given = self.model_fields_set
        if self.form != "prompt_completion" and (mine := given & {"prompt", "completion"}):
            raise ValueError(f"data.{sorted(mine)[0]} is for data.form: prompt_completion, and it is {self.form}")
        if self.column is not None and self.form not in ("messages", "usr_bot", "text"):
            raise ValueError(f"data.column is for data.form: messages, usr_bot or text, and it is {self.form}")
        if self.chat_template is not None and not self.is_chat:
            raise ValueError(f"data.chat_template is for data.form: messages, usr_bot or alpaca, and it is {self.form}")
        if not isinstance(self.loss_on, str) and not self.is_chat:
            raise ValueError(f"data.loss_on names roles, and rows of data.form: {self.form} have none")
        if self.truncation == "turns" and not self.is_chat:
            raise ValueError(f"data.truncation: 'turns' is for conversations, and data.form is {self.form}")
        if self.truncation == "split" and self.form != "text":
            raise ValueError(f"data.truncation: 'split' is for data.form: text, and it is {self.form}")
        if self.truncation == "prompt_left" and self.form == "text":
            raise ValueError("data.truncation: 'prompt_left' is for rows with a prompt, and data.form is text")
        return self

    @property
    def is_chat(self) -> bool:
        """Whether rows are conversations that a chat template writes."""
        return self.form in ("messages", "usr_bot", "alpaca")

    @property
    def truncates_by(self) -> str:
        """What happens to an example that is longer than max_tokens, where the run file leaves it open too."""
        by_form = {"text": "split", "messages": "turns", "usr_bot": "turns"}
        return self.truncation or by_form.get(self.form, "prompt_left")
