"""The run file: one frozen object with every setting of a training run, read from YAML and `key=value` overrides.

A default is written here and nowhere else. Knows no torch: a bad run file is refused before anything is loaded.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from loraplex_registry.goldens import PROMPTS
from loraplex_registry.reference import check_name
from loraplex_server.engine.chat_templates import NAMES
from loraplex_trainer.deepspeed_json import additions
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.option_names import is_theirs, translate
from loraplex_trainer.unfit import unfit

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Targets = Annotated[tuple[str, ...], Field(min_length=1)]
# Of the methods that want another than LoRA: they train few numbers, or vectors far from where they begin.
LEARNING_RATES = {"ia3": 5.0e-3, "prompt": 3.0e-2, "prefix": 1.0e-2, "p_tuning": 3.0e-3}
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Every = PositiveInt | Literal["epoch"]  # steps
ADAM = ("adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
SHARED = {  # strategies that share out more than a step's examples, and what
    "fsdp": "base, adapter, gradients, optimizer",
    "zero1": "optimizer",
    "zero2": "gradients, optimizer",
    "zero3": "base, adapter, gradients, optimizer",
}
Roles = Annotated[tuple[Literal["system", "user", "assistant"], ...], Field(min_length=1)]


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


class SourceSection(Section):
    """One place that rows come from: a file, a folder that `datasets` wrote, or a dataset of the Hub."""

    path: str = Field(min_length=1)
    config: str | None = None
    revision: str | None = None
    split: str = "train"


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
_Either = Annotated[_Path | _One, Discriminator(_kind_of_source)]
_Several = Annotated[tuple[_Either, ...], Field(min_length=1), Tag("<list>")]
_Share = Annotated[str, Field(pattern=r"^[0-9]{1,2}(\.[0-9]+)?%$"), Tag("<share>")]
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


class LoraSection(Section):
    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target_modules: Literal["all-linear"] | Targets = "all-linear"
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[NonNegativeInt, ...] = ()
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, PositiveInt] = {}
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
    hidden_size: PositiveInt | None = None


class EarlyStopping(Section):
    patience: PositiveInt = 3
    min_delta: NonNegativeFloat = 0.0


class DistributedSection(Section):
    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "ddp"
    offload: Literal["none", "cpu"] = "none"
    deepspeed: Path | None = None


class TrainingSection(Section):
    epochs: PositiveFloat = 3
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
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr", "inverse_sqrt"] = (
        "cosine"
    )
    warmup_ratio: Ratio = 0.05
    warmup_steps: NonNegativeInt | None = None
    min_lr_ratio: Ratio = 0.1
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
    max_tokens: PositiveInt = 32
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
    wait_seconds: NonNegativeFloat = 60.0

    @field_validator("name")
    @classmethod
    def _is_a_registry_name(cls, name: str | None) -> str | None:
        return name if name is None else check_name(name)


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

    @property
    def folder(self) -> Path:
        """Where the finished adapter lies."""
        return self.output / self.name

    @property
    def served(self) -> bool:
        """Whether registry and server take such an adapter: LoRA on a causal model, and nothing beside it."""
        lora = self.lora
        beside = lora.dora or lora.bias != "none" or lora.modules_to_save or lora.trainable_token_indices
        return self.method == "lora" and self.base.task == "causal" and not beside

    @property
    def virtual_tokens(self) -> int:
        """What a method puts before each prompt."""
        return 0 if self.method in ("lora", "ia3") else self.prompt.virtual_tokens

    @property
    def examples_per_step(self) -> int:
        return self.training.batch_size * self.training.accumulation_steps


def load_config(path: Path, overrides: Sequence[str] = (), tell: Callable[[str], object] = lambda _: None) -> RunConfig:
    """Reads a run file and applies overrides such as `training.learning_rate=1e-3` (the value is YAML).

    Options under the names of transformers, trl, peft and Axolotl are taken over, and `tell` is told of each one.
    Raises ConfigError, naming the key, its value and what was expected; for an unknown key, the nearest known one.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is expected")
    settings, taken_over = _in_our_names(settings, tell)
    given, given_over = _in_our_names(dict(map(_parse, overrides)), tell)
    for key, value in {**taken_over, **given, **given_over}.items():
        _set(settings, key, value)
    for key, value in additions(settings, int(os.environ.get("WORLD_SIZE", "1")), tell):
        _set(settings, key, value)
    try:
        # Through JSON, where strict validation still takes a string for a path and a list for a tuple.
        return RunConfig.model_validate_json(json.dumps(settings, default=str))
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(dict.fromkeys(_explain(error.errors())))}") from error


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a run file as a dotted path, sections before their keys."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or one that may be left out
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.2 does, YAML 1.1 calls it text) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"the key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _in_our_names(given: dict[str, Any], tell: Callable[[str], object]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of `given` is ours, and what the rest of it means in dotted keys of ours."""
    translated, lines = translate(given)
    ours = {key: value for key, value in given.items() if not is_theirs(str(key))}
    for key in translated:
        if _has(ours, key):
            raise ConfigError(f"{key} is given, and again under another name ({'; '.join(lines)}): keep one")
    for line in lines:
        tell(line)
    return ours, translated


def _has(settings: dict[str, Any], key: str) -> bool:
    section, _, rest = key.partition(".")
    inner = settings.get(section)
    return key in settings or bool(rest and isinstance(inner, dict) and _has(inner, rest))


def _parse(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: key=value is expected, such as training.learning_rate=1e-3")
    try:
        return key, yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for part in sections:
        settings = settings.setdefault(part, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{key}={value}: {part!r} is a value, not a section")
    settings[last] = value


def _explain(errors: Sequence[ErrorDetails]) -> Iterator[str]:
    known = list(known_keys())
    wrong: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        path = ".".join(str(part) for part in error["loc"] if not str(part).startswith("<"))
        # Below a known key, pydantic adds the branch of a union or the index in a list: the key is what the user wrote.
        key = max((key for key in known if path == key or path.startswith(f"{key}.")), key=len, default=path)
        if error["type"] == "extra_forbidden":
            yield f"unknown key {path!r}{_nearest(path, known)}"
        elif error["type"] == "missing":
            yield f"the key {path!r} is missing"
        else:
            wrong.setdefault(key, []).append(error)
    for key, its_errors in wrong.items():
        messages = [e["msg"].removeprefix("Input should be ").removeprefix("Value error, ") for e in its_errors]
        if not key or any(
            other.startswith(f"{key}.") for other in known
        ):  # about a section: the message names its keys
            yield messages[0]
            continue
        value = json.dumps(its_errors[0]["input"], ensure_ascii=False, default=str)
        expected = "" if its_errors[0]["type"] == "value_error" else "expected "
        yield f"{key}: {value}: {expected}{' or '.join(dict.fromkeys(messages))}"


def _nearest(path: str, known: Sequence[str]) -> str:
    """The known key a misspelt or misplaced one most likely meant, as the end of a sentence."""
    leaf = path.rpartition(".")[2]
    misplaced = [key for key in known if key.rpartition(".")[2] == leaf]
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = misplaced or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    near = near or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)]
    return f"; the nearest known key is {near[0]!r}" if near else f"; the known keys are {', '.join(known)}"
