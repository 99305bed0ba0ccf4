"""Measures a saved adapter beside its bare base, both in the serving engine: losses, task metric, samples, goldens.

Owns what is asked of whom; the numbers come from `served`, of kinds that are not served from `unserved`, and `metrics`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from loraplex_registry.adapter_config import read_config, wrong_options
from loraplex_registry.goldens import Golden, Top
from loraplex_registry.validate import Limits
from loraplex_server.engine.engine import Completion
from loraplex_server.engine.errors import AdapterRefused, BaseUnusable
from loraplex_server.engine.model import Base
from loraplex_server.engine.rendering import ends_of, text_ids
from loraplex_server.engine.request import MAX_LOGPROBS, SamplingParams
from loraplex_trainer import forms
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import Encoded, Split
from loraplex_trainer.encoding import Encoder, Example, encoder_for
from loraplex_trainer.general import general_text
from loraplex_trainer.metrics import Metric, find_metric
from loraplex_trainer.progress import say
from loraplex_trainer.sections import EvaluationSection
from loraplex_trainer.served import Served
from loraplex_trainer.unserved import Unserved

GOLDEN_TOKENS = 32  # of one golden prompt: whoever loads the adapter computes them
GOLDEN_TOP = 10  # likeliest next tokens that are written down
_TEXT_CHARACTERS = 200  # of a golden prompt, as people read it
_ASKED = 256  # samples among which golden prompts and those of the card are looked for
_WINDOW_TOKENS, _WINDOWS = 256, 64  # general text is scored in pieces, and so many at most
_STOPPING = 64  # answers that tell the stop rate, where no metric asks for more


@dataclass(frozen=True)
class Plan:
    """What is to be measured, found and read before training, so that its mistakes are known then."""

    metric: Metric | None
    general: str | None  # text

    @classmethod
    def of(cls, evaluation: EvaluationSection) -> "Plan":
        """Raises ConfigError for a metric or a text that cannot be had."""
        return cls(find_metric(evaluation.metric), general_text(evaluation.general))


@dataclass(frozen=True)
class Sample:
    """One prompt with the answers of base and adapter, drawn with the same seed."""

    prompt: str
    base: str
    adapter: str


class Judge(Protocol):
    """Adapter and bare base side by side: `Served` or `Unserved`. Each pair is the adapter's, then the base's."""

    base: Base
    max_tokens: int  # of a prompt with its answer

    def answers(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams] | SamplingParams
    ) -> tuple[list[Completion], list[Completion]]: ...

    def losses(self, examples: Sequence[Example]) -> tuple[float, float]: ...


@dataclass(frozen=True)
class Measured:
    """What was measured. `not_served` says why not in the engine: the server does not serve this kind of adapter."""

    metrics: dict[str, float]
    samples: tuple[Sample, ...] = ()
    goldens: tuple[Golden, ...] = ()
    not_served: str | None = None


def evaluate(
    config: RunConfig,
    plan: Plan,
    folder: Path,
    splits: dict[str, Split],
    encoded: dict[str, Encoded],
    console: Console,
) -> Measured:
    """Loads the base and the adapter in `folder`, and measures what the run file asks for."""
    wanted, heldout = config.evaluation, encoded.get("heldout")
    if not (heldout or plan.general or wanted.goldens or wanted.samples):
        return Measured({})
    say(console, "scoring the adapter and its base with the serving engine")
    judge, not_served = _judge(config, folder)
    if not_served:
        say(console, f"scored by peft, since the server does not serve this adapter: {not_served}")
    tokenizer = judge.base.tokenizer
    encoder = encoder_for(judge.base, config.data)
    stop, stop_token_ids = ends_of(tokenizer, encoder.template.get("stop", ()))
    greedy = SamplingParams(wanted.max_tokens, temperature=0.0, stop=stop, stop_token_ids=stop_token_ids)
    metrics: dict[str, float] = {}
    if heldout:
        metrics |= _both("heldout_loss", judge.losses(heldout.examples[: wanted.examples]))
        metrics |= _answered(judge, plan.metric, encoder, splits["heldout"].samples[: wanted.examples], greedy)
    if plan.general and config.base.task == "causal":  # an encoder-decoder has no loss on text that answers nothing
        metrics |= _both("general_loss", judge.losses(_windows(plan.general, tokenizer, judge.max_tokens)))
    name = "heldout" if heldout else "train"
    prompts = _prompts(encoder, splits[name].samples[:_ASKED], encoded[name].examples[:_ASKED])
    return Measured(
        metrics=metrics,
        samples=_samples(judge, prompts[: wanted.samples], greedy, config),
        # Nobody asks for those of an adapter that is not served.
        goldens=() if not_served else _goldens(judge, list(_golden_prompts(prompts, wanted.goldens))),
        not_served=not_served,
    )


def _judge(config: RunConfig, folder: Path) -> tuple[Judge, str | None]:
    """Who measures, and why it is not the engine."""
    not_served = next(wrong_options(read_config(folder), Limits().max_rank), None)
    if not_served is None:
        try:
            return Served(config, folder), None
        except (AdapterRefused, BaseUnusable) as refusal:
            not_served = str(refusal)
    return Unserved(config, folder), not_served


def score_table(metrics: dict[str, float], trainer_loss: float | None) -> Table:
    """Held-out numbers, adapter beside base."""
    table = Table("measured", "base", "adapter")
    for name, base, adapter in rows(metrics, trainer_loss):
        table.add_row(name, base, adapter)
    return table


def rows(metrics: dict[str, float], trainer_loss: float | None) -> Iterator[tuple[str, str, str]]:
    """Name, base's and adapter's number of each metric, as they are shown."""
    if trainer_loss is not None and "heldout_loss" not in metrics:
        yield "held-out loss while training", "", f"{trainer_loss:.4f}"
    for name, value in metrics.items():
        if not name.startswith("base_"):
            base = metrics.get(f"base_{name}")
            yield name, "" if base is None else f"{base:.4f}", f"{value:.4f}"


def _answered(
    judge: Judge, metric: Metric | None, encoder: Encoder, samples: Sequence[forms.Sample], greedy: SamplingParams
) -> dict[str, float]:
    """Greedy answers to the held-out questions: the metric's numbers, `stop_rate`, and both again for the base."""
    questions = [question for sample in samples if (question := encoder.question(sample))]
    if metric is None:
        questions = questions[:_STOPPING]
    if not questions:  # plain text asks nothing
        return {}
    truths = [question.answer for question in questions]
    room = judge.max_tokens - greedy.max_tokens
    answers, base_answers = judge.answers([question.prompt_ids[-room:] for question in questions], greedy)
    score = metric or (lambda _answers, _truths: {})
    base = score([answer.text for answer in base_answers], truths) | {"stop_rate": _stop_rate(base_answers)}
    return {
        **score([answer.text for answer in answers], truths),
        "stop_rate": _stop_rate(answers),
        **{f"base_{key}": value for key, value in base.items()},
    }


def _stop_rate(answers: Sequence[Completion]) -> float:
    """The share of answers that ended by themselves."""
    return sum(answer.finish_reason == "stop" for answer in answers) / len(answers)


def _prompts(encoder: Encoder, samples: Sequence[forms.Sample], examples: Sequence[Example]) -> list[list[int]]:
    """What samples ask; the beginnings of plain text, which asks nothing."""
    asked = [question.prompt_ids for sample in samples if (question := encoder.question(sample))]
    return asked or [list(example.ids[: len(example.ids) // 2]) for example in examples if len(example.ids) > 1]


def _samples(
    judge: Judge, prompts: Sequence[list[int]], greedy: SamplingParams, config: RunConfig
) -> tuple[Sample, ...]:
    wanted, room = config.evaluation, judge.max_tokens - greedy.max_tokens
    drawn = replace(greedy, temperature=wanted.sample_temperature, top_p=wanted.sample_top_p)
    seeds = [(config.training.seed + number) % 2**63 for number in range(len(prompts))]
    params = [replace(drawn, seed=seed) for seed in seeds]
    answers, base_answers = judge.answers([ids[-room:] for ids in prompts], params)
    texts = [_text(ids, judge.base.tokenizer) for ids in prompts]
    return tuple(
        Sample(text, base.text, adapted.text) for text, base, adapted in zip(texts, base_answers, answers, strict=True)
    )


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Token ids as people read them."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _goldens(judge: Judge, prompts: Sequence[tuple[int, ...]]) -> tuple[Golden, ...]:
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=MAX_LOGPROBS)
    tops = [[_top(answer) for answer in answers] for answers in judge.answers(prompts, params)]
    texts = [_text(ids, judge.base.tokenizer)[-_TEXT_CHARACTERS:] for ids in prompts]
    return tuple(Golden(*one) for one in zip(texts, prompts, *tops, strict=True))


def _top(answer: Completion) -> Top:
    return tuple((token_id, round(logprob, 6)) for token_id, logprob in answer.scores[0].top[:GOLDEN_TOP])


def _golden_prompts(prompts: Sequence[list[int]], count: int) -> Iterator[tuple[int, ...]]:
    """The first different prompts; short ones before longer ones, of which the end is taken."""
    short = [tuple(ids) for ids in prompts if len(ids) <= GOLDEN_TOKENS]
    cut = [tuple(ids[-GOLDEN_TOKENS:]) for ids in prompts if len(ids) > GOLDEN_TOKENS]
    yield from list(dict.fromkeys(short + cut))[:count]


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Example]:
    """General text as pieces whose every token but the first is scored."""
    ids = text_ids(tokenizer, text)
    size = min(_WINDOW_TOKENS, max_tokens)
    pieces = [tuple(ids[start : start + size]) for start in range(0, len(ids), size)][:_WINDOWS]
    return [Example(piece, ((1, len(piece)),)) for piece in pieces if len(piece) > 1]


def _both(name: str, numbers: tuple[float, float]) -> dict[str, float]:
    return {name: numbers[0], f"base_{name}": numbers[1]}
