"""docs/server.md tells the whole: every option, every field, every error code, every path, and the defaults."""

import re
from pathlib import Path

from loraplex_server.__main__ import serve
from loraplex_server.chat import ChatBody
from loraplex_server.openai import CompletionBody
from loraplex_server.routes import ROUTES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/server.md").read_text()


def test_every_option_and_its_default_is_documented():
    for option in serve.params:
        row = next((line for line in PAGE.splitlines() if line.startswith("| `--") and option.opts[0] in line), None)
        assert row, option.opts[0]
        if isinstance(option.default, str | int) and not option.name.endswith("_bytes"):
            assert str(option.default) in row, row


def test_every_field_is_documented():
    for field in CompletionBody.model_fields.keys() | ChatBody.model_fields.keys():
        assert re.search(rf"^\|.*`{field}[`.]", PAGE, re.MULTILINE), field


def test_every_error_code_is_documented():
    source = "".join((ROOT / "server/loraplex_server" / name).read_text() for name in ("problems.py", "app.py"))
    codes = set(re.findall(r'Problem\(\s*\d+, "\w+", "(\w+)"', source)) | {
        "not_found",
        "method_not_allowed",
        "http_error",
    }
    assert len(codes) > 8
    for code in codes:
        assert f"`{code}`" in PAGE, code


def test_every_path_is_documented():
    for route in ROUTES:
        assert route.path.replace("{name:path}", "{reference}") in PAGE, route.path
