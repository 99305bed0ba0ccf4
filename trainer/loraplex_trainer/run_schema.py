"""The JSON Schema of a run file, for editors: what the keys take, from the model, and what they are, from the page.

`python -m loraplex_trainer.run_schema docs/training.md` prints it; the package carries it in run.schema.json.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraplex_trainer.config import RunConfig
from loraplex_trainer.run_file import known_keys

FILE = Path(__file__).with_name("run.schema.json")


def run_schema(page: str) -> dict[str, Any]:
    """JSON Schema 2020-12 of a run file, each key described as in the table of `page`, docs/training.md."""
    schema = RunConfig.model_json_schema()
    words = dict(re.findall(r"^\| `([a-z0-9_.]+)` \|[^|]*\| (.+) \|$", page, re.MULTILINE))
    for key in known_keys():
        if key in words:
            _place_of(key, schema)["description"] = words[key].replace("`", "")
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A run of loraplex train"}
    return _any_of(whole)


def _any_of(schema: Any) -> Any:
    """What pydantic tells apart by a function (`5%` is a share, and could be a path) is more than one of its kinds."""
    if isinstance(schema, dict):
        return {"anyOf" if key == "oneOf" else key: _any_of(value) for key, value in schema.items()}
    return [_any_of(one) for one in schema] if isinstance(schema, list) else schema


def schema_text(page: str) -> str:
    return json.dumps(run_schema(page), indent=1, ensure_ascii=False) + "\n"


def _place_of(key: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The subschema of a dotted key."""
    place = schema
    for part in key.split("."):
        (place,) = [
            found["properties"][part] for found in _targets(place, schema) if part in found.get("properties", {})
        ]
    return place


def _targets(place: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A subschema and what it refers to: a section stands in $defs, under anyOf where it may be left out."""
    yield place
    for other in [place, *place.get("anyOf", [])]:
        if reference := other.get("$ref"):
            yield schema["$defs"][reference.rpartition("/")[2]]


if __name__ == "__main__":
    sys.stdout.write(schema_text(Path(sys.argv[1]).read_text(encoding="utf-8")))
