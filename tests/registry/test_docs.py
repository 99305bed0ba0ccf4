"""docs/registry.md names every verb, option and route there is, and none that is not."""

import re
from pathlib import Path

import pytest
from starlette.routing import Route

from loraplex_registry.cli import cli
from loraplex_registry.errors import RegistryError
from loraplex_registry.http import create_app
from loraplex_registry.registry import Registry

DOCS = (Path(__file__).parents[2] / "docs" / "registry.md").read_text()


@pytest.fixture
def registry(tmp_path):
    with Registry(tmp_path / "registry") as registry:
        yield registry


def test_every_verb_and_option():
    assert set(re.findall(r"^\| `registry (\w+)", DOCS, flags=re.M)) == set(cli.commands)
    options = {word for command in cli.commands.values() for option in command.params for word in option.opts}
    for option in sorted(word for word in options if word.startswith("--") and word not in ("--message", "--all")):
        assert option in DOCS


def test_every_route(registry):
    routes = {re.sub(r":\w+}", "}", route.path) for route in create_app(registry).routes if isinstance(route, Route)}
    documented = re.findall(r"`(?:GET|POST|PUT|DELETE) (/[^`?]*)[^`]*`", DOCS)
    assert set(documented) == routes


def test_errors_have_a_code_and_stdlib_kin_of_their_own():
    """The client finds an error's class by its code: two with one code would be confused."""

    def below(kind):
        return [kind, *(deeper for child in kind.__subclasses__() for deeper in below(child))]

    kinds = below(RegistryError)
    assert len({kind.code for kind in kinds}) == len(kinds)
    assert all(issubclass(kind, (ValueError, LookupError, OSError)) for kind in kinds[1:])


def test_the_room_knows_no_torch_and_no_other_room():
    sources = [path.read_text() for path in Path(__file__).parents[2].glob("registry/loraplex_registry/*.py")]
    imported = {name for source in sources for name in re.findall(r"^\s*(?:from|import) (\w+)", source, flags=re.M)}
    assert "sqlalchemy" in imported
    assert not imported & {"torch", "transformers", "peft", "loraplex", "loraplex_server", "loraplex_trainer"}
