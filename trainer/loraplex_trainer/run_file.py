"""Reads a run file: YAML and `key=value` overrides, options under other trainers' names, mistakes in words."""

import difflib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from loraplex_trainer.config import RunConfig
from loraplex_trainer.deepspeed_json import additions
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.launch import read_launch
from loraplex_trainer.option_names import is_theirs, translate


def load_config(path: Path, overrides: Sequence[str] = (), tell: Callable[[str], object] = lambda _: None) -> RunConfig:
    """Reads a run file and applies overrides such as `training.learning_rate=1e-3` (the value is YAML).

    Options under the names of transformers, trl, peft and Axolotl are taken over, and `tell` is told of each one.
    Raises ConfigError, naming the key, its value and what was expected; for an unknown key, the nearest known one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    settings = _read(content, str(path))
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is expected")
    settings, taken_over = _in_our_names(settings, tell)
    given, given_over = _in_our_names(_parsed(overrides), tell)
    for key, value in {**taken_over, **given, **given_over}.items():
        _set(settings, key, value)
    for key, value in additions(settings, read_launch().size, tell):
        _set(settings, key, value)
    try:
        # Through JSON, where strict validation still takes a string for a path and a list for a tuple.
        return RunConfig.model_validate_json(json.dumps(settings))
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
    """SafeLoader that takes numbers as YAML 1.2 does, a date or a lone = for text, and refuses a key given twice.

    By YAML 1.1 1e-3 is text, 010 is 8 and 1:30 is 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"the key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]{1,16}",
    "float": r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
    r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in those if tag.rpartition(":")[2] not in (*_NUMBERS, "timestamp", "value")]
    for first, those in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_pattern})$"), list("-+.0123456789"))


def _read(text: str | bytes, where: str) -> Any:
    """What YAML says, of the kinds that JSON has: keys are text. Raises ConfigError, which begins with `where`."""
    try:
        as_json = json.dumps(yaml.load(text, _Loader), ensure_ascii=False)  # refuses bytes, and an anchor in itself
        return json.loads(as_json.encode())  # refuses half a surrogate pair
    # What a tag such as !!bool makes of what it does not fit, and what lies too deep, yaml lets rise.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


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
    return key, _read(text, f"override {override[:80]!r}")


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
    """Values by dotted keys. Raises ConfigError for a key that is given twice."""
    given: dict[str, Any] = {}
    for override in overrides:
        for key, value in _one_by_one(*_parse(override)):
            if key in given:
                raise ConfigError(f"{key} is given twice, as {given[key]!r} and as {value!r}: keep one")
            given[key] = value
    return given


def _one_by_one(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Of a section its keys: those that the override leaves out stay as they are."""
    if value and isinstance(value, dict) and _is_section(key):
        for name, inner in value.items():
            yield from _one_by_one(f"{key}.{name}", inner)
    else:
        yield key, value


def _is_section(key: str) -> bool:
    return any(other.startswith(f"{key}.") for other in known_keys())


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for part in sections:
        settings = settings.setdefault(part, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{key}={value}: {part!r} is a value, not a section")
    if value == {} and settings.get(last) and _is_section(key):
        return  # a section that is there loses nothing by one that says nothing
    settings[last] = value


def _explain(errors: Sequence[ErrorDetails]) -> Iterator[str]:
    known = list(known_keys())
    wrong: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        path = ".".join(str(part) for part in error["loc"] if not str(part).startswith("<"))
        # Below a known key, pydantic adds the branch of a union or the index in a list: the key is what the user wrote.
        key = max((key for key in known if path == key or path.startswith(f"{key}.")), key=len, default=path)
        if error["type"] == "extra_forbidden":
            yield f"unknown key {path!r}{_nested(path, error['input']) if path in known else _nearest(path, known)}"
        elif error["type"] == "missing" and isinstance(error["loc"][-1], str):
            yield f"the key {path!r} is missing"
        elif error["type"] == "missing":  # of a list of fixed length: the last one that is says how many are wanted
            wrong[key] = [error]
        else:
            wrong.setdefault(key, []).append(error)
    for key, its_errors in wrong.items():
        # A list whose only item is wrong is said to be too short as well.
        its_errors = [error for error in its_errors if error["type"] != "too_short"] or its_errors
        messages = [_expected(error, key, known) for error in its_errors]
        if not key or (its_errors[0]["type"] == "value_error" and _is_section(key)):  # the message names its keys
            yield messages[0]
            continue
        value = json.dumps(its_errors[0]["input"], ensure_ascii=False, default=str)
        value = value if len(value) <= 200 else f"{value[:200]}…"
        expected = "" if its_errors[0]["type"] == "value_error" else "expected "
        yield f"{key}: {value}: {expected}{' or '.join(dict.fromkeys(messages))}"


def _expected(error: ErrorDetails, key: str, known: Sequence[str]) -> str:
    """What pydantic says was expected, in our words where its own are of no use."""
    if error["type"] == "model_type":
        inside = [other.removeprefix(f"{key}.") for other in known if other.startswith(f"{key}.")]
        return f"a section, with keys of its own such as {', '.join(inside[:2])}"
    if error["type"] == "missing":
        return f"{int(error['loc'][-1]) + 1} values"
    return error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")


def _nested(path: str, value: Any) -> str:
    """How a file says what an override says with dots, as the end of a sentence."""
    text = json.dumps(value, ensure_ascii=False)
    *sections, last = path.split(".")
    text = f"{last}: {text}"
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    return f"; dots are for key=value, and a file nests its keys: {text}"


def _nearest(path: str, known: Sequence[str]) -> str:
    """The known key a misspelt or misplaced one most likely meant, as the end of a sentence."""
    leaf = path.rpartition(".")[2]
    misplaced = [key for key in known if key.rpartition(".")[2] == leaf]
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = misplaced or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    near = near or [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.6)]
    return f"; the nearest known key is {near[0]!r}" if near else f"; the known keys are {', '.join(known)}"
