"""Every setting of a training run as one frozen object, and which of them go together.

The keys of its sections are in `sections` and `data_keys`; `run_file` reads it from YAML. Knows no torch.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from loraplex_registry.reference import check_name
from loraplex_registry.validate import Limits
from loraplex_server.engine.config import EngineConfig
from loraplex_trainer.data_keys import DataSection
from loraplex_trainer.sections import (
    BaseSection,
    EvaluationSection,
    Ia3Section,
    LoraSection,
    PromptSection,
    PushSection,
    Section,
    TrainingSection,
)
from loraplex_trainer.unfit import unfit

# Of the methods that want another than LoRA: they train few numbers, or vectors far from where they begin.
LEARNING_RATES = {"ia3": 5.0e-3, "prompt": 3.0e-2, "prefix": 1.0e-2, "p_tuning": 3.0e-3}


class RunConfig(Section):
    """Every setting of one run. Paths are relative to the folder the command is started in."""

    name: str
    base: BaseSection
    data: DataSection
    method: Literal["lora", "ia3", "prompt", "prefix", "p_tuning"] = "lora"
    lora: LoraSection = LoraSection()
    ia3: Ia3Section = Ia3Section()
    prompt: PromptSection = PromptSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection = EvaluationSection()
    push: PushSection = PushSection()
    output: Path = Path("adapters")
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()
    logs: Path = Path("logs")
    continue_from: str | None = None
    registry: str | None = None

    @field_validator("name")
    @classmethod
    def _is_a_registry_name(cls, name: str) -> str:
        return check_name(name)

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_by_its_name(cls, given: Any) -> Any:
        """As transformers takes it."""
        named = ([] if given == "none" else [given]) if isinstance(given, str) else given
        return tuple(named) if isinstance(named, list) else named

    @model_validator(mode="after")
    def _metric_has_examples(self) -> Self:
        if self.evaluation.metric != "none" and self.data.heldout is None:
            raise ValueError(f"evaluation.metric: {self.evaluation.metric!r} needs examples: set data.heldout")
        if self.evaluation.metric != "none" and self.data.form == "text":
            raise ValueError(
                f"evaluation.metric: {self.evaluation.metric!r} needs questions, and rows of text have none"
            )
        return self

    @model_validator(mode="after")
    def _take_the_learning_rate_of_the_method(self) -> Self:
        if self.method not in LEARNING_RATES or "learning_rate" in self.training.model_fields_set:
            return self
        training = self.training.model_copy(update={"learning_rate": LEARNING_RATES[self.method]})
        return self.model_copy(update={"training": training})

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Self:
        if reason := next(unfit(self), None):
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _training_agrees(self) -> Self:
        if disagreement := self.training.disagreement():
            raise ValueError(disagreement)
        if self.training.evaluate_every is not None and self.data.heldout is None:
            raise ValueError("training.evaluate_every: it needs examples to measure the loss on: set data.heldout")
        return self

    @model_validator(mode="after")
    def _a_push_has_its_time(self) -> Self:
        given = self.push.model_fields_set - {"every"}
        if self.push.every == "never" and given:
            raise ValueError(f"push.{min(given)}: nothing is pushed unless push.every is save, epoch or end")
        return self

    @model_validator(mode="after")
    def _a_registry_has_its_use(self) -> Self:
        if self.registry is not None and self.continue_from is None and self.push.every == "never":
            raise ValueError(
                f"registry: {self.registry!r}: nothing is looked up or pushed there: set continue_from or push.every"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where the finished adapter lies."""
        return self.output / self.name

    @property
    def served(self) -> bool:
        """Whether registry and server take such an adapter: LoRA of no huge rank on a causal model, nothing beside."""
        lora = self.lora
        beside = lora.dora or lora.bias != "none" or lora.modules_to_save or lora.trainable_token_indices
        fits = lora.largest_rank <= Limits().max_rank
        return self.method == "lora" and self.base.task == "causal" and fits and not beside

    @property
    def serving_hint(self) -> str:
        """What a server has to be told for this adapter, in words; "": nothing."""
        rank = self.lora.largest_rank
        if not self.served or rank <= EngineConfig().max_rank:
            return ""
        return f"its rank is {rank} as it is saved: serve it with --max-rank {rank}"

    @property
    def virtual_tokens(self) -> int:
        """What a method puts before each prompt."""
        return 0 if self.method in ("lora", "ia3") else self.prompt.virtual_tokens

    @property
    def examples_per_step(self) -> int:
        return self.training.batch_size * self.training.accumulation_steps
