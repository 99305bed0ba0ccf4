"""Encoding: from a sample's turns to token ids and the spans that the loss is on.

The ids of a prompt are those that the server feeds for it: both come from `engine.rendering`. A span begins and ends
where a turn does, so no label is derived from an id, and a pad token that is also EOS cannot mask it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraplex_registry.receipt import CHAT_CHARACTERS
from loraplex_server.engine.chat_templates import NAMES, named_template
from loraplex_server.engine.errors import InvalidRequest
from loraplex_server.engine.model import Base
from loraplex_server.engine.rendering import (
    Message,
    alpaca_messages,
    chat_ids,
    chat_text,
    end_of_turn,
    own_template,
    text_ids,
)
from loraplex_trainer.data_keys import DataSection
from loraplex_trainer.errors import DataError
from loraplex_trainer.forms import Sample, trained_roles

Span = tuple[int, int]  # positions from the first to before the second


@dataclass(frozen=True)
class Example:
    """Token ids, and the spans of them that the loss is on: each begins after the first token.

    Several packed into one begin at `starts`, each with positions of its own. `where` says which rows they are.
    """

    ids: tuple[int, ...]
    trained: tuple[Span, ...]
    starts: tuple[int, ...] = (0,)
    where: tuple[str, ...] = field(default=(), compare=False)

    @property
    def answer_start(self) -> int:
        """The first position with a label."""
        return self.trained[0][0]

    @property
    def answer_tokens(self) -> int:
        return sum(stop - start for start, stop in self.trained)


@dataclass(frozen=True)
class Question:
    """What a held-out sample asks, and what it would have answered."""

    prompt_ids: list[int]
    answer: str


@dataclass(frozen=True)
class Encoder:
    """Writes samples as the `data` section says, for one tokenizer. Raises DataError, naming the row."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    eos_id: int  # the one that is put where a template writes none
    data: DataSection
    chat_template: str | None = None
    turn_end: str = ""  # what the chat template writes after an answer; "": nothing
    roles: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", trained_roles(self.data))

    @property
    def template(self) -> dict[str, Any]:
        """How the adapter wants to be asked: what the receipt says, and the server reads."""
        if self.data.form == "prompt_completion":
            return {"form": self.data.form, "prompt": self.data.prompt, "completion": self.data.completion}
        ends = self.turn_end and self.tokenizer.convert_tokens_to_ids(self.turn_end) not in self.eos_ids
        return {"form": self.data.form, "chat": self.chat_template, "stop": [self.turn_end] if ends else []}

    def mask(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What the loss is on, as the receipt says it: these turns, and the end of so many examples."""
        ends = [one.ids[-1] in self.eos_ids and one.trained[-1][1] == len(one.ids) for one in examples]
        return {"loss_on": sorted(self.roles), "end_of_sequence": sum(ends)}

    def encode(self, sample: Sample) -> list[Example]:
        """The sample's examples, whole: one, or more where a template writes the past anew; none without a label."""
        if self.data.is_chat:
            return self._chat(sample, self._messages(sample))
        if self.data.form == "text":
            return _learnt_whole(self._ended(text_ids(self.tokenizer, sample.turns[0][1])))
        return [self._prompt_completion(sample)]

    def fit(self, sample: Sample) -> tuple[list[Example], list[Example]]:
        """The sample's examples, whole, and what data.truncation leaves of them in data.max_tokens."""
        whole = self.encode(sample)
        limit = self.data.max_tokens
        if all(len(example.ids) <= limit for example in whole):
            return whole, whole
        if self.data.truncates_by == "turns":
            return whole, self._last_turns(sample)
        return whole, [part for example in whole for part in self._parts(example, sample)]

    def question(self, sample: Sample) -> Question | None:
        """What the sample's last answer answers; none in plain text, or where nobody answers."""
        if self.data.form == "text":
            return None
        if not self.data.is_chat:
            (_, prompt), (_, completion) = sample.turns
            return Question(text_ids(self.tokenizer, prompt), completion)
        messages = self._messages(sample)
        last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        return Question(self._written(sample, messages[:last], True), messages[last]["content"]) if last else None

    def _prompt_completion(self, sample: Sample) -> Example:
        (_, prompt), (_, completion) = sample.turns
        prompt_ids = text_ids(self.tokenizer, prompt)
        if not prompt_ids:
            told = "the prompt is empty, and this tokenizer puts no token before it: nothing to predict from"
            raise DataError(f"{sample.where}: {told}")
        # The model's own spelling, also where text begins with a "▁".
        answer_ids = _after(prompt_ids, text_ids(self.tokenizer, prompt + completion))
        if answer_ids is None:  # a token would reach over the boundary
            answer_ids = self._plain_ids(completion)
        answer_ids = self._ended(answer_ids)
        start, ids = len(prompt_ids), (*prompt_ids, *answer_ids)
        before = ((1, start),) if "prompt" in self.roles and start > 1 else ()
        return Example(ids, (*before, (start, len(ids))))

    def _chat(self, sample: Sample, messages: list[Message]) -> list[Example]:
        """One example, as long as what comes before each trained turn goes on from the last one.

        It does not where the template writes the past anew (thoughts that are left out later), or has no end of a
        turn, so that an EOS stands there which no server would send: then the next turn begins an example.
        """
        if self.data.loss_on == "all":
            return _learnt_whole(self._ended(self._without_end_space(self._written(sample, messages, False))))
        examples: list[Example] = []
        ids: list[int] = []
        spans: list[Span] = []
        for at, message in enumerate(messages):
            role = message["role"]
            if role not in self.roles or (role == "assistant" and at == 0):  # nobody can ask for an answer to nothing
                continue
            before = self._written(sample, messages[:at], role == "assistant") if at else []
            turn = self._turn(sample, messages[: at + 1], before)
            if ids and before[: len(ids)] != ids:
                examples.append(self._closed(ids, spans))
                spans = []
            spans.append((max(1, len(before)), len(before) + len(turn)))
            ids = before + turn
        return [*examples, self._closed(ids, spans)] if spans else examples

    def _turn(self, sample: Sample, messages: list[Message], before: list[int]) -> list[int]:
        """The ids of the last message, to the end of its turn, white space after it left out."""
        asked = messages[-1]["role"] == "assistant"
        turn = _after(before, self._written(sample, messages, False))
        if turn is None:
            prompt = chat_text(self.tokenizer, self.chat_template or "", messages[:-1], asked)
            whole = chat_text(self.tokenizer, self.chat_template or "", messages, False)
            if not whole.startswith(prompt):
                raise DataError(
                    f"{sample.where}: the chat template ends a prompt in {prompt[-40:]!r}, which is not in the "
                    "conversation that it writes: no answer can follow; name another data.chat_template"
                )
            turn = self._plain_ids(whole[len(prompt) :])
        turn = self._without_end_space(turn)
        if not turn and messages[-1]["content"].strip():
            raise DataError(f"{sample.where}: the chat template leaves out what the {messages[-1]['role']} says")
        return turn if self.turn_end and turn else self._ended(turn)

    def _closed(self, ids: list[int], spans: list[Span]) -> Example:
        """An example ends in EOS, with a label: a server without the template's stop strings stops there too."""
        ended = self._ended(ids)
        *others, (start, stop) = spans
        return Example(tuple(ended), (*others, (start, stop + len(ended) - len(ids))))

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] in self.eos_ids else [*ids, self.eos_id]

    def _without_end_space(self, ids: list[int]) -> list[int]:
        """Without the tokens of white space that a template writes after the end of a turn."""
        while ids and not str(self.tokenizer.decode(ids[-1:], skip_special_tokens=False)).strip():
            ids = ids[:-1]
        return ids

    def _last_turns(self, sample: Sample) -> list[Example]:
        """The sample without its oldest turns, as few as need be; a system message stays. Nothing if none fits."""
        messages = self._messages(sample)
        system = [message for message in messages[:1] if message["role"] == "system"]
        begins = [at for at, message in enumerate(messages) if message["role"] == "user" and at > len(system)]
        for begin in begins:
            examples = self._chat(sample, system + messages[begin:])
            if all(len(example.ids) <= self.data.max_tokens for example in examples):
                return examples
        return []

    def _parts(self, example: Example, sample: Sample) -> list[Example]:
        """What is left of one example, by the policies that cut or leave out single examples."""
        limit, policy = self.data.max_tokens, self.data.truncates_by
        if len(example.ids) <= limit:
            return [example]
        if policy == "error":
            told = f"{len(example.ids)} tokens, more than data.max_tokens = {limit}, and data.truncation is error"
            raise DataError(f"{sample.where}: {told}")
        if policy == "right":
            return _cut(example, [(0, limit)])
        if policy == "split":  # the last token of a part is the first of the next: each is predicted once
            return _cut(example, [(at, at + limit) for at in range(0, len(example.ids) - 1, limit - 1)])
        return _without_front(example, limit, self.tokenizer.bos_token_id) if policy == "prompt_left" else []

    def _messages(self, sample: Sample) -> list[Message]:
        if self.data.form != "alpaca":
            return sample.messages
        columns = {"instruction": sample.turns[0][1], "input": sample.turns[1][1]}
        return [*alpaca_messages(columns, self.chat_template or ""), sample.messages[2]]

    def _written(self, sample: Sample, messages: Sequence[Message], answer_next: bool) -> list[int]:
        try:
            return chat_ids(self.tokenizer, self.chat_template or "", messages, answer_next)
        except InvalidRequest as error:
            raise DataError(f"{sample.where}: {error}") from error

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def encoder_for(base: Base, data: DataSection) -> Encoder:
    """Finds the chat template where the form has one. Raises DataError for one that cannot be trained with."""
    eos_id = end_of_sequence(base)
    if not data.is_chat:
        return Encoder(base.tokenizer, base.eos_token_ids, eos_id, data)
    template = template_file(data) or _named_or_own(base, data)
    try:
        prompt = chat_text(base.tokenizer, template, [{"role": "user", "content": "a"}], True)
        turn_end = end_of_turn(base.tokenizer, template)
    except InvalidRequest as error:
        raise DataError(f"data.chat_template: {error}") from error
    if prompt.endswith((" ", "\t")):
        raise DataError(
            "data.chat_template: a prompt must not end in a space: tokenizers join a space to the word after it, so "
            f"the model would be served another last token than it was trained on; this one ends in {prompt[-20:]!r}"
        )
    return Encoder(base.tokenizer, base.eos_token_ids, eos_id, data, template, turn_end)


def template_file(data: DataSection) -> str | None:
    """The content of the file that data.chat_template names; None where it names none. Raises DataError."""
    if data.chat_template is None or data.chat_template in NAMES:
        return None
    try:
        text = Path(data.chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"data.chat_template: {data.chat_template}: {reason}") from error
    if len(text) > CHAT_CHARACTERS:
        raise DataError(f"data.chat_template: {data.chat_template}: more than {CHAT_CHARACTERS:,} characters")
    return text


def end_of_sequence(base: Base) -> int:
    """The id every answer ends in: one at which the server stops."""
    tokenizers_own = base.tokenizer.eos_token_id
    if tokenizers_own in base.eos_token_ids:
        return tokenizers_own
    if not base.eos_token_ids:
        raise DataError(f"{base.id} has no end-of-sequence token: the adapter could not learn to stop")
    return min(base.eos_token_ids)


def _named_or_own(base: Base, data: DataSection) -> str:
    name = data.chat_template or {"usr_bot": "usr_bot", "alpaca": "alpaca"}.get(data.form)
    if name is not None:
        bos_id = base.tokenizer.bos_token_id
        return named_template(name, bos_id is not None and text_ids(base.tokenizer, "a")[:1] == [bos_id])
    if own := own_template(base.tokenizer):
        return own
    raise DataError(f"data.chat_template: {base.id} has no chat template of its own: name one of {', '.join(NAMES)}")


def _after(prompt: list[int], whole: list[int]) -> list[int] | None:
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else None


def _learnt_whole(ids: list[int]) -> list[Example]:
    """The loss is on all but the first token, which nothing predicts."""
    return _cut(Example(tuple(ids), ((1, len(ids)),)), [(0, len(ids))])


def _cut(example: Example, windows: Sequence[Span]) -> list[Example]:
    """The parts of an example in these windows; one without a label left is none."""
    parts = []
    for begin, end in windows:
        ids = example.ids[begin:end]
        if spans := _clipped(example.trained, begin, 1, len(ids)):
            parts.append(Example(ids, spans))
    return parts


def _without_front(example: Example, limit: int, bos_id: object) -> list[Example]:
    """The front goes, never the last answer; BOS stays. Nothing when not one token before that answer is left."""
    last_answer = example.trained[-1][0]
    prompt, answer = example.ids[:last_answer], example.ids[last_answer:]
    front = prompt[:1] if prompt[0] == bos_id else ()
    room = limit - len(answer) - len(front)
    if room < 1:
        return []
    ids = (*front, *prompt[-room:], *answer)
    return [Example(ids, _clipped(example.trained, len(example.ids) - limit, len(front) + 1, limit))]


def _clipped(spans: Sequence[Span], shift: int, first: int, end: int) -> tuple[Span, ...]:
    """Spans moved to the front by `shift`, without what is before `first` or from `end` on."""
    moved = ((max(start - shift, first), min(stop - shift, end)) for start, stop in spans)
    return tuple((start, stop) for start, stop in moved if start < stop)
