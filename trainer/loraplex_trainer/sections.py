"""The keys of a run file, section by section, but for those of `data`. A default is written here and nowhere else.

Knows no torch: a bad run file is refused before anything is loaded.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    field_validator,
)

from loraplex_registry.goldens import PROMPTS
from loraplex_registry.reference import check_name

MOST = 10**9  # of whatever is counted: beyond it a number is a slip, and C's and torch's whole numbers end
PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
Rank = Annotated[int, Field(gt=0, le=65_536)]  # the base's layers bound it further
Alpha = Annotated[int, Field(gt=0, le=1_000_000)]
Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Targets = Annotated[tuple[str, ...], Field(min_length=1)]
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Every = PositiveInt | Literal["epoch"]  # steps
ADAM = ("adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
SHARED = {  # strategies that share out more than a step's examples, and what
    "fsdp": "base, adapter, gradients, optimizer",
    "zero1": "optimizer",
    "zero2": "gradients, optimizer",
    "zero3": "base, adapter, gradients, optimizer",
}


def _checked_metric(name: str) -> str:
    if not re.fullmatch(r"python:\s*\S.*\.py:[A-Za-z_]\w*", name):
        raise ValueError("'python: path/to/file.py:function'")
    return name


UserMetric = Annotated[str, AfterValidator(_checked_metric)]


class Section(BaseModel):
    """A group of keys. Strict: a quoted number is a mistake, not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class BaseSection(Section):
    model: str = Field(min_length=1)
    revision: str | None = None
    task: Literal["causal", "seq2seq"] = "causal"
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    double_quantization: bool = True
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: Literal["auto", "balanced", "sequential"] | dict[str, int | str] | None = None

    @property
    def load_options(self) -> dict[str, Any]:
        """The arguments of `loraplex_server.engine.model.load_base`."""
        return {"id_or_path": self.model, **self.model_dump(exclude={"model"})}


class LoraSection(Section):
    rank: Rank = 16
    alpha: Alpha = 32
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: Literal["all-linear"] | Targets = "all-linear"
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[NonNegativeInt, ...] = ()
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Alpha] = {}
    rslora: bool = False
    dora: bool = False
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"] = "default"
    plus_ratio: float = Field(default=1.0, ge=1.0)
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[NonNegativeInt, ...] = ()

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _keys_are_patterns(cls, patterns: dict[str, int]) -> dict[str, int]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a pattern: {error}") from error
        return patterns

    @property
    def largest_rank(self) -> int:
        """Of any module, as it is saved: PiSSA and OLoRA save what training changed, which takes twice the rank."""
        rank = max((self.rank, *self.rank_pattern.values()))
        return 2 * rank if self.init in ("pissa", "olora") else rank


class Ia3Section(Section):
    target_modules: Targets | None = None
    feedforward_modules: tuple[str, ...] | None = None


class PromptSection(Section):
    """Of the methods that put vectors before the prompt: prompt, prefix and p_tuning."""

    virtual_tokens: PositiveInt = 20
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    text: str | None = None
    projection: bool = False
    encoder: Literal["mlp", "lstm"] = "mlp"
    hidden_size: Annotated[int, Field(gt=0, le=65_536)] | None = None


class EarlyStopping(Section):
    patience: PositiveInt = 3
    min_delta: NonNegativeFloat = 0.0


class DistributedSection(Section):
    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    offload: Literal["none", "cpu"] = "none"
    deepspeed: Path | None = None


class TrainingSection(Section):
    epochs: float = Field(default=3, gt=0, le=MOST)
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 16
    accumulation_steps: PositiveInt = 1
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 1.0e-3
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: PositiveFloat = 1.0e-8
    momentum: Momentum = 0.0
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat | None = 1.0
    schedule: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_min_lr",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
    ] = "cosine"
    warmup_ratio: Ratio = 0.05
    warmup_steps: NonNegativeInt | None = None
    min_lr_ratio: Ratio = 0.1
    cycles: PositiveInt = 1
    power: PositiveFloat = 1.0
    gradient_checkpointing: bool = False
    seed: int = Field(default=42, ge=0, lt=2**63)
    save_every: Every = 50
    evaluate_every: Every | None = None
    early_stopping: EarlyStopping | None = None
    keep: Literal["last", "best"] = "last"
    log_every_steps: PositiveInt = 5
    kernels: bool = True
    distributed: DistributedSection = DistributedSection()

    def disagreement(self) -> str | None:
        """The first setting that another one leaves without effect, in words."""
        changed = {key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default}
        for key, choice, chosen, choices in (
            ("betas", "optimizer", self.optimizer, ADAM),
            ("eps", "optimizer", self.optimizer, ADAM),
            ("momentum", "optimizer", self.optimizer, ("sgd",)),
            ("min_lr_ratio", "schedule", self.schedule, ("cosine_with_min_lr",)),
            ("cycles", "schedule", self.schedule, ("cosine_with_restarts",)),
            ("power", "schedule", self.schedule, ("polynomial",)),
        ):
            if key in changed and chosen not in choices:
                return f"training.{key}: it is nothing to training.{choice} = {chosen!r}, only to {', '.join(choices)}"
        strategy = self.distributed.strategy
        if self.distributed.offload != "none" and strategy == "ddp":
            return f"training.distributed.offload: it is nothing to strategy {strategy!r}, only to {', '.join(SHARED)}"
        if strategy != "ddp" and self.optimizer not in ("adamw", "sgd"):
            return (
                f"training.optimizer: {self.optimizer!r}: expected adamw or sgd where {strategy} shares its state out"
            )
        if "warmup_ratio" in changed and self.warmup_steps is not None:
            return "training.warmup_steps and training.warmup_ratio say the same thing in two ways: keep one"
        if self.evaluate_every is None and (self.early_stopping or self.keep == "best"):
            key = "early_stopping" if self.early_stopping else "keep"
            return f"training.{key}: it goes by the held-out loss during the run: set training.evaluate_every"
        return None


class EvaluationSection(Section):
    metric: Literal["tag_f1", "exact_match", "rouge_l", "none"] | UserMetric = "none"
    max_tokens: Annotated[int, Field(gt=0, le=1_000_000)] = 32  # as the engine has it
    examples: PositiveInt | None = None
    general: str = Field(default="default", min_length=1)
    samples: int = Field(default=3, ge=0, le=20)
    sample_temperature: float = Field(default=0.5, ge=0.0, le=2.0)
    sample_top_p: float = Field(default=0.9, gt=0.0, le=1.0)
    goldens: int = Field(default=3, ge=0, le=PROMPTS)


class PushSection(Section):
    every: Literal["never", "save", "epoch", "end"] = "never"
    name: str | None = None
    registry: str | None = None
    wait_seconds: float = Field(default=60.0, ge=0.0, le=86_400.0)

    @field_validator("name")
    @classmethod
    def _is_a_registry_name(cls, name: str | None) -> str | None:
        return name if name is None else check_name(name)
