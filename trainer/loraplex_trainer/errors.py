"""What can go wrong in a training run. Each message is one line that a user can act on.

TrainerError
├── ConfigError(ValueError)         the run file: an unknown key, a wrong value, two settings that exclude each other
├── DataError(ValueError)           the examples: unreadable, a column missing, nothing left to learn from
├── CheckpointError(RuntimeError)   nothing to resume, or a checkpoint of another run
├── NotFinite(ArithmeticError)      the loss or its gradient became NaN or infinite
├── BaseTooLarge(MemoryError)       the base did not fit
├── AdapterTooLarge(MemoryError)    the adapter did not fit beside it
├── OutOfMemory(MemoryError)        a step did not fit
├── TooMuchTogether(MemoryError)    a step of several runs did not fit
├── NotScored(MemoryError)          scoring what was trained did not fit
├── NotWritten(OSError)             the disk is full, or not to be written to
├── EvaluationError(RuntimeError)   the user's metric failed; what was trained is in the checkpoint
├── NotMerged(ArithmeticError)      the merged model is another one than base and adapter side by side
├── NotPushed(OSError)              all is done but for the registry, which did not take every save
├── SomeFailed                      of several runs trained together
└── Interrupted                     the user or the system asked the run to stop; a checkpoint was saved
"""

from collections.abc import Mapping, Sequence

NAMED_ROWS = 16  # of one step: more are counted


class TrainerError(Exception):
    """Root of every error this package raises on purpose; `exit_code` is what the command ends with."""

    exit_code = 1


class ConfigError(TrainerError, ValueError):
    """The run file or an override is wrong."""

    exit_code = 2


class DataError(TrainerError, ValueError):
    """The examples cannot be trained on; the message names file and line where there is one."""

    exit_code = 2


class CheckpointError(TrainerError, RuntimeError):
    """`--resume` has no checkpoint to go on from, or one that belongs to another run."""

    exit_code = 2


class NotFinite(TrainerError, ArithmeticError):
    """Loss or gradient is NaN or infinite at `step`, which saw `rows` (file and line each); nothing of it is saved."""

    def __init__(self, step: int, what: str, value: float, rows: Sequence[str]) -> None:
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        super().__init__(
            f"the {what} is {value} at step {step}, whose examples are {', '.join(rows[:NAMED_ROWS])}{more}: "
            "look at them, or lower training.learning_rate (a checkpoint saved before is kept)"
        )
        self.step = step


class BaseTooLarge(TrainerError, MemoryError):
    """The weights of the base did not fit into memory."""


class AdapterTooLarge(TrainerError, MemoryError):
    """The adapter of `method` did not fit into memory beside the base."""

    def __init__(self, method: str) -> None:
        advice = {
            "lora": "lower lora.rank, or name fewer lora.target_modules",
            "ia3": "name fewer ia3.target_modules",
        }.get(method, "lower prompt.virtual_tokens, or prompt.hidden_size")
        super().__init__(f"the adapter does not fit into memory beside the base: {advice}")


class OutOfMemory(TrainerError, MemoryError):
    """A forward or backward pass of `rows` examples, the longest of `tokens` tokens, did not fit into memory."""

    def __init__(self, step: int, rows: int, tokens: int, accumulation_steps: int) -> None:
        if rows > 1:
            advice = (
                f"set training.batch_size to {-(-rows // 2)} and training.accumulation_steps to "
                f"{2 * accumulation_steps}: the same steps, with half of it in memory at a time"
            )
        else:
            advice = f"lower data.max_tokens to {tokens // 2}, or take a smaller base"
        at_a_time = f"{rows} examples of up to {tokens} tokens at a time"
        super().__init__(f"out of memory at step {step}, with {at_a_time}: {advice}")
        self.step = step


class TooMuchTogether(TrainerError, MemoryError):
    """A pass of the rows of several runs at once did not fit into memory."""

    def __init__(self, rows: int, runs: int, tokens: int) -> None:
        super().__init__(
            f"out of memory with {rows} examples of {runs} runs, of up to {tokens} tokens, at a time: halve "
            "training.batch_size of each and double training.accumulation_steps: the same steps, with half of it in "
            "memory at a time; or train fewer together"
        )


class NotScored(TrainerError, MemoryError):
    """The steps are done, and scoring their adapter did not fit into memory. Nothing that was trained is lost."""

    def __init__(self, quantization: str) -> None:
        smaller = "" if quantization == "nf4" else ", set base.quantization to nf4"
        super().__init__(
            "out of memory while the adapter was scored by the serving engine, which loads the base anew: end what "
            f"else takes memory{smaller}, or lower evaluation.max_tokens; the training is done and kept: --resume "
            "scores it"
        )


class NotWritten(TrainerError, OSError):
    """A file could not be written; what was there before is whole."""


class EvaluationError(TrainerError, RuntimeError):
    """The user's own metric raised, or gave what is no number. Nothing that was trained is lost."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; the training is done and kept: put it right, and --resume scores it again")


class NotMerged(TrainerError, ArithmeticError):
    """The merged model does not say what base and adapter say."""


class NotPushed(TrainerError, OSError):
    """The run is done, and the registry has not got all that was to be pushed."""


class Interrupted(TrainerError):
    """SIGINT or SIGTERM arrived; `step` steps are done and saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"interrupted at step {step}")
        self.exit_code = 128 + signal_number
        self.step = step


class SomeFailed(TrainerError):
    """Of several runs trained together, those in `failures` did not get to their end; the others did."""

    def __init__(self, failures: Mapping[str, Exception], complete: Sequence[str]) -> None:
        told = "; ".join(f"{name}: {error}" for name, error in failures.items())
        rest = f"; complete: {', '.join(complete)}" if complete else ""
        super().__init__(f"{told}{rest}")
        first = next(iter(failures.values()))
        self.exit_code = first.exit_code if isinstance(first, TrainerError) else 1
