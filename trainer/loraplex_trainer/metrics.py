"""Task metrics: how good answers are beside the true ones. Knows strings and numbers, no model.

A metric takes all answers and all truths, and gives one or more numbers by name.
"""

import importlib.util
import inspect
import math
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from loraplex_trainer.errors import ConfigError, EvaluationError

Metric = Callable[[Sequence[str], Sequence[str]], dict[str, float]]
_OURS = ("heldout_loss", "general_loss", "stop_rate")  # what a run measures itself, and promotions trust
_KEY = re.compile(r"[A-Za-z_][\w./@-]*")  # what a registry's `--require 'key>=0.9'` can name


def find_metric(name: str) -> Metric | None:
    """The metric that `evaluation.metric` names; None for `none`. Raises ConfigError when it cannot be had."""
    if name == "none":
        return None
    if name.startswith("python:"):
        return _users(name)
    score = {"tag_f1": tag_f1, "exact_match": exact_match, "rouge_l": _rouge_l}[name]
    one = score() if name == "rouge_l" else score
    return lambda answers, truths: {name: _mean([one(a, t) for a, t in zip(answers, truths, strict=True)])}


def tag_f1(answer: str, truth: str) -> float:
    """F1 of two sets of comma-separated tags, whatever their case and spacing; two empty sets agree."""
    answered, true = _tags(answer), _tags(truth)
    if not answered and not true:
        return 1.0
    return 2 * len(answered & true) / (len(answered) + len(true))


def exact_match(answer: str, truth: str) -> float:
    return float(answer.strip() == truth.strip())


class _Words:
    """Words of any alphabet. rouge-score's own tokenizer knows a to z alone: all Korean texts are equal to it."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def _rouge_l() -> Callable[[str, str], float]:
    """The F-measure of ROUGE-L (Lin, 2004), by rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            "evaluation.metric: 'rouge_l' needs the package rouge-score: pip install 'loraplex[train]'"
        ) from error
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return lambda answer, truth: float(scorer.score(truth, answer)["rougeL"].fmeasure)


def _users(name: str) -> Metric:
    """`python: path/to/file.py:function`: it is given (answers, truths) and gives a number, or numbers by name."""
    path, _, function_name = name.removeprefix("python:").strip().rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"evaluation.metric: {name!r}: no such file: {path}")
    spec = importlib.util.spec_from_file_location(f"_metric_{file.stem}", file)
    assert spec and spec.loader  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"evaluation.metric: {name!r}: {path} raised {_told(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"evaluation.metric: {name!r}: {path} has no function {function_name!r}")
    if _is_ours(function_name):
        raise ConfigError(f"evaluation.metric: {name!r}: {function_name} is a name of the run's own numbers")
    _check_takes_two(name, function)

    def score(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
        try:
            found = function(list(answers), list(truths))
        except (Exception, SystemExit) as error:
            raise EvaluationError(f"evaluation.metric: {name!r} raised {_told(error)}") from error
        return _numbers(name, found if isinstance(found, dict) else {function_name: found})

    return score


def _numbers(name: str, found: dict[Any, Any]) -> dict[str, float]:
    if not found:
        raise EvaluationError(f"evaluation.metric: {name!r} gave {{}}, expected a number, or some by name")
    for key, value in found.items():
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise EvaluationError(f"evaluation.metric: {name!r} gave the key {key!r}, expected a word such as f1")
        if _is_ours(key):
            raise EvaluationError(f"evaluation.metric: {name!r} gave the key {key!r}, a name of the run's own numbers")
        if not _is_finite(value):
            shown = reprlib.repr(value)
            raise EvaluationError(f"evaluation.metric: {name!r} gave {key} = {shown}, expected a finite number")
    return {key: float(value) for key, value in found.items()}


def _check_takes_two(name: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # not every function written in C says what it takes
        return
    try:
        signature.bind([], [])
    except TypeError as error:
        raise ConfigError(
            f"evaluation.metric: {name!r} is called with two lists, answers and truths: {error}"
        ) from error


def _is_finite(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_ours(key: str) -> bool:
    return key in _OURS or key.startswith("base_")


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of its own __str__
        return f"{type(error).__name__}, which cannot be shown"


def _tags(text: str) -> set[str]:
    return {tag for part in text.split(",") if (tag := part.strip().lower())}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
