"""Measures a saved adapter beside its bare base, both in the serving engine: losses, task metric, samples, goldens.

Owns what is asked of whom; the numbers come from `served` and `metrics`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loraplex_registry.goldens import Golden, Top
from loraplex_server.engine.engine import Completion
from loraplex_server.engine.errors import AdapterRefused
from loraplex_server.engine.rendering import ends_of
from loraplex_server.engine.request import MAX_LOGPROBS, SamplingParams
from loraplex_trainer import forms
from loraplex_trainer.config import EvaluationSection, RunConfig
from loraplex_trainer.data import Encoded, Split
from loraplex_trainer.encoding import Encoder, Example, encoder_for
from loraplex_trainer.general import general_text
from loraplex_trainer.metrics import Metric, find_metric
from loraplex_trainer.progress import say
from loraplex_trainer.served import Served

GOLDEN_TOKENS = 32  # of one golden prompt: whoever loads the adapter computes them
GOLDEN_TOP = 10  # likeliest next tokens that are written down
_TEXT_CHARACTERS = 200  # of a golden prompt, as people read it
_ASKED = 256  # samples among which golden prompts and those of the card are looked for
_WINDOW_TOKENS, _WINDOWS = 256, 64  # general text is scored in pieces, and so many at most


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


@dataclass(frozen=True)
class Measured:
    """What was measured. `not_served` says why nothing could be: the server does not serve this kind of adapter."""

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
    try:
        served = Served(config, folder)
    except AdapterRefused as refusal:
        say(console, f"not scored, since the server does not serve this adapter: {refusal}")
        return Measured({}, not_served=str(refusal))
    encoder = encoder_for(served.engine.base, config.data)
    stop, stop_token_ids = ends_of(served.tokenizer, encoder.template.get("stop", ()))
    greedy = SamplingParams(wanted.max_tokens, temperature=0.0, stop=stop, stop_token_ids=stop_token_ids)
    metrics: dict[str, float] = {}
    if heldout:
        metrics |= _both("heldout_loss", served.losses(heldout.examples[: wanted.examples]))
    if plan.metric:
        metrics |= _task_metrics(served, plan.metric, encoder, splits["heldout"].samples[: wanted.examples], greedy)
    if plan.general:
        metrics |= _both("general_loss", served.losses(_windows(plan.general, served)))
    name = "heldout" if heldout else "train"
    prompts = _prompts(encoder, splits[name].samples[:_ASKED], encoded[name].examples[:_ASKED])
    return Measured(
        metrics=metrics,
        samples=_samples(served, prompts[: wanted.samples], greedy, config),
        goldens=_goldens(served, list(_golden_prompts(prompts, wanted.goldens))),
    )


def score_table(metrics: dict[str, float], trainer_loss: float | None) -> Table:
    """Held-out numbers, adapter beside base."""
    table = Table("measured", "base", "adapter")
    for name, base, adapter in rows(metrics, trainer_loss):
        table.add_row(name, base, adapter)
    return table


def rows(metrics: dict[str, float], trainer_loss: float | None) -> Iterator[tuple[str, str, str]]:
    """Name, base's and adapter's number of each metric, as they are shown."""
    if trainer_loss is not None:
        yield "held-out loss while training", "", f"{trainer_loss:.4f}"
    for name, value in metrics.items():
        if not name.startswith("base_"):
            base = metrics.get(f"base_{name}")
            yield name, "" if base is None else f"{base:.4f}", f"{value:.4f}"


def _task_metrics(
    served: Served, metric: Metric, encoder: Encoder, samples: Sequence[forms.Sample], greedy: SamplingParams
) -> dict[str, float]:
    """Greedy answers to the held-out questions: the metric's numbers, `stop_rate`, and both again for the base."""
    questions = [question for sample in samples if (question := encoder.question(sample))]
    truths = [question.answer for question in questions]
    answers, base_answers = served.answers([question.prompt_ids for question in questions], greedy)
    base = metric([answer.text for answer in base_answers], truths) | {"stop_rate": _stop_rate(base_answers)}
    return {
        **metric([answer.text for answer in answers], truths),
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
    served: Served, prompts: Sequence[list[int]], greedy: SamplingParams, config: RunConfig
) -> tuple[Sample, ...]:
    wanted, room = config.evaluation, served.engine.max_tokens - greedy.max_tokens
    if room < 1:
        return ()
    drawn = replace(greedy, temperature=wanted.sample_temperature, top_p=wanted.sample_top_p)
    seeds = [(config.training.seed + number) % 2**63 for number in range(len(prompts))]
    params = [replace(drawn, seed=seed) for seed in seeds]
    answers, base_answers = served.answers([ids[-room:] for ids in prompts], params)
    texts = [served.text(ids) for ids in prompts]
    return tuple(
        Sample(text, base.text, adapted.text) for text, base, adapted in zip(texts, base_answers, answers, strict=True)
    )


def _goldens(served: Served, prompts: Sequence[tuple[int, ...]]) -> tuple[Golden, ...]:
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=MAX_LOGPROBS)
    tops = [[_top(answer) for answer in answers] for answers in served.answers(prompts, params)]
    texts = [served.text(ids)[-_TEXT_CHARACTERS:] for ids in prompts]
    return tuple(Golden(*one) for one in zip(texts, prompts, *tops, strict=True))


def _top(answer: Completion) -> Top:
    return tuple((token_id, round(logprob, 6)) for token_id, logprob in answer.scores[0].top[:GOLDEN_TOP])


def _golden_prompts(prompts: Sequence[list[int]], count: int) -> Iterator[tuple[int, ...]]:
    """The first different prompts; short ones before longer ones, of which the end is taken."""
    short = [tuple(ids) for ids in prompts if len(ids) <= GOLDEN_TOKENS]
    cut = [tuple(ids[-GOLDEN_TOKENS:]) for ids in prompts if len(ids) > GOLDEN_TOKENS]
    yield from list(dict.fromkeys(short + cut))[:count]


def _windows(text: str, served: Served) -> list[Example]:
    """General text as pieces whose every token but the first is scored."""
    ids: list[int] = served.tokenizer(text).input_ids
    size = min(_WINDOW_TOKENS, served.engine.max_tokens)
    pieces = [tuple(ids[start : start + size]) for start in range(0, len(ids), size)][:_WINDOWS]
    return [Example(piece, ((1, len(piece)),)) for piece in pieces if len(piece) > 1]


def _both(name: str, numbers: tuple[float, float]) -> dict[str, float]:
    return {name: numbers[0], f"base_{name}": numbers[1]}
