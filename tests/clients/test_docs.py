"""docs/client.md: its examples run, and its lists are whole."""

import re
from pathlib import Path

import pytest

import loraplex
from loraplex import errors
from loraplex.protocol import CompletionOptions

PAGE = (Path(__file__).parents[2] / "docs/client.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number, server, monkeypatch, capsys):
    monkeypatch.setenv("LORAPLEX_URL", server.url)
    exec(EXAMPLES[number].replace("http://127.0.0.1:8000", server.url), {"__name__": "example"})
    assert "courage, life" in capsys.readouterr().out


def test_every_option_and_error_is_named():
    for name in CompletionOptions.__annotations__:
        assert f"`{name}" in PAGE
    for name in loraplex.__all__:
        if name not in ("Usage",):
            assert name in PAGE
    assert errors.__doc__
    for kind, kin in re.findall(r"── (\w+) \((\w+)\)", errors.__doc__):
        assert f"{kind} ({kin})" in PAGE
