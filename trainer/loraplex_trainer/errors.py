"""What can go wrong in a training run. Each message is one line that a user can act on.

TrainerError
├── ConfigError(ValueError)         the run file: an unknown key, a wrong value, two settings that exclude each other
├── DataError(ValueError)           the examples: unreadable, a column missing, nothing left to learn from
├── CheckpointError(RuntimeError)   nothing to resume, or a checkpoint of another run
├── NotFinite(ArithmeticError)      the loss or its gradient became NaN or infinite
└── Interrupted                     the user or the system asked the run to stop; a checkpoint was saved
"""


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
    """The loss or its gradient is NaN or infinite at `step`; nothing of it is saved."""

    def __init__(self, step: int, what: str, value: float) -> None:
        super().__init__(
            f"the {what} is {value} at step {step}: lower training.learning_rate (a checkpoint saved before is kept)"
        )
        self.step = step


class Interrupted(TrainerError):
    """SIGINT or SIGTERM arrived; `step` steps are done and saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"interrupted at step {step}")
        self.exit_code = 128 + signal_number
        self.step = step
