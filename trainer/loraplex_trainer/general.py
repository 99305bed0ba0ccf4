"""General text: what an adapter should not make the base worse at. Owns the text that comes along, general.txt."""

from importlib.resources import files
from pathlib import Path

from loraplex_trainer.errors import ConfigError


def general_text(where: str) -> str | None:
    """The text that `evaluation.general` names: `default`, a path, or `none`. Raises ConfigError."""
    if where == "none":
        return None
    if where == "default":
        return files("loraplex_trainer").joinpath("general.txt").read_text(encoding="utf-8")
    try:
        text = Path(where).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"evaluation.general: {where!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"evaluation.general: {where!r}: not UTF-8 text") from error
    if len(text.split()) < 2:
        raise ConfigError(f"evaluation.general: {where!r}: the file holds no text")
    return text
