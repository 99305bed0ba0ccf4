"""Scores a finished adapter on held-out prompts with the engine that will serve it, beside the bare base.

Knows the metrics; the answers come from `loraplex_server.engine` alone, never from a generation loop of the trainer's.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import load_base
from loraplex_server.engine.rendering import ends_of
from loraplex_server.engine.request import SamplingParams
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import Split
from loraplex_trainer.encoding import encoder_for


def evaluate(config: RunConfig, folder: Path, heldout: Split) -> dict[str, float]:
    """Greedy answers of the saved adapter and of the base: `<metric>`, `stop_rate`, `base_<metric>`, all 0 … 1.

    The base is loaded anew: what is scored is what was written to disk, on weights no training has touched.
    """
    metric = config.evaluation.metric
    score = {"tag_f1": tag_f1, "exact_match": exact_match}[metric]
    base = load_base(**config.base.load_options)
    encoder = encoder_for(base, config.data)
    questions = [question for sample in heldout.samples if (question := encoder.question(sample))]
    prompts, truths = [question.prompt_ids for question in questions], [question.answer for question in questions]
    engine = Engine(base, EngineConfig(max_rank=config.lora.rank))
    engine.add_adapter(config.name, folder)
    stop, stop_token_ids = ends_of(base.tokenizer, encoder.template.get("stop", ()))
    params = SamplingParams(
        max_tokens=config.evaluation.max_tokens, temperature=0.0, stop=stop, stop_token_ids=stop_token_ids
    )
    answers = engine.generate(prompts, params, adapter=config.name)
    base_answers = engine.generate(prompts, params, adapter=None)
    return {
        metric: _mean([score(a.text, truth) for a, truth in zip(answers, truths, strict=True)]),
        "stop_rate": _mean([float(answer.finish_reason == "stop") for answer in answers]),
        f"base_{metric}": _mean([score(a.text, truth) for a, truth in zip(base_answers, truths, strict=True)]),
    }


def tag_f1(answer: str, truth: str) -> float:
    """F1 of two sets of comma-separated tags, whatever their case and spacing; two empty sets agree."""
    answered, true = _tags(answer), _tags(truth)
    if not answered and not true:
        return 1.0
    return 2 * len(answered & true) / (len(answered) + len(true))


def exact_match(answer: str, truth: str) -> float:
    return float(answer.strip() == truth.strip())


def score_table(metrics: dict[str, float], heldout_loss: float | None) -> Table:
    """Held-out numbers, adapter beside base."""
    table = Table("held-out", "base", "adapter")
    if heldout_loss is not None:
        table.add_row("loss", "", f"{heldout_loss:.4f}")
    for name, value in metrics.items():
        if not name.startswith("base_"):
            base = metrics.get(f"base_{name}")
            table.add_row(name, "" if base is None else f"{base:.3f}", f"{value:.3f}")
    return table


def _tags(text: str) -> set[str]:
    return {tag for part in text.split(",") if (tag := part.strip().lower())}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
