"""What can go wrong below HTTP. Owns the error tree; knows nothing of status codes.

EngineError
├── BaseNotFound(OSError)        the base model is not there, or is not a causal language model
├── BaseUnusable(ValueError)     it is there, but cannot be loaded as asked (quantization, device, dtype)
├── InvalidRequest(ValueError)   the request can never be served; ``field`` names what is wrong with it
├── AdapterRefused(ValueError)   the adapter does not fit this base or this server; the reason says why
├── Overloaded(RuntimeError)     the queue is full; try again later
├── BrokenLogits(ArithmeticError)   the model gave numbers that are not finite, so no token can be chosen
└── DeadlinePassed(TimeoutError)     the request was not done in the time it was given
"""


class EngineError(Exception):
    """Root of everything the engine raises on purpose."""


class BaseNotFound(EngineError, OSError):
    """No causal language model at this path or Hub id."""


class BaseUnusable(EngineError, ValueError):
    """The base is there, but cannot be loaded as asked."""


class InvalidRequest(EngineError, ValueError):
    """The request can never be served. ``field`` is the request field at fault."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


class AdapterRefused(EngineError, ValueError):
    """The adapter cannot be used whole on this base, so it is not used at all."""


class Overloaded(EngineError, RuntimeError):
    """Too many requests are waiting."""


class BrokenLogits(EngineError, ArithmeticError):
    """The model gave logits that are not finite."""


class DeadlinePassed(EngineError, TimeoutError):
    """The request was not done in the time it was given."""
