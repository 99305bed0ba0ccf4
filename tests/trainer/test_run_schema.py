"""The JSON Schema of run files: true to what is read, complete, and printed by the command."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from loraplex_trainer.errors import ConfigError
from loraplex_trainer.run_file import load_config
from loraplex_trainer.run_schema import FILE, schema_text

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training.md"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json.loads(FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_it_is_what_the_model_and_the_page_say():
    again = "python -m loraplex_trainer.run_schema docs/training.md > trainer/loraplex_trainer/run.schema.json"
    text = schema_text(PAGE.read_text(encoding="utf-8"))
    assert FILE.read_text(encoding="utf-8") == text, f"after a change of keys or of their table: {again}"


def test_every_key_has_the_words_of_the_page(validator):
    def undescribed(place: dict, path: str) -> list[str]:
        found = []
        for name, inner in place.get("properties", {}).items():
            if "description" in inner:
                continue
            sections = [part["$ref"].rpartition("/")[2] for part in [inner, *inner.get("anyOf", [])] if "$ref" in part]
            for section in sections:
                found += undescribed(validator.schema["$defs"][section], f"{path}{name}.")
            if not sections:
                found.append(path + name)
        return found

    assert undescribed(validator.schema, "") == []
    assert validator.schema["$defs"]["TrainingSection"]["properties"]["save_every"]["description"].startswith("steps")


def test_the_command_prints_it(train):
    assert json.loads(train("schema").stdout)["title"] == "A run of loraplex train"


def test_the_projects_own_run_files_pass(validator):
    files = list(ROOT.glob("demo/*.yaml"))
    assert len(files) >= 3
    for file in files:
        document = json.loads(json.dumps(yaml.safe_load(file.read_text())))
        assert not list(validator.iter_errors(document)), file


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("name", 3, False),
        ("nmae", "x", False),
        ("training.epochs", 1, True),
        ("training.epochs", "1", False),
        ("training.epochs", 0, False),
        ("training.optimizer", "paged_adamw_8bit", True),
        ("training.optimizer", "adam9", False),
        ("training.betas", [0.9, 0.99], True),
        ("training.betas", [0.9], False),
        ("training.save_every", "epoch", True),
        ("training.save_every", "day", False),
        ("training.early_stopping", None, True),
        ("training.early_stopping", {"patients": 3}, False),
        ("training.max_steps", None, True),
        ("lora.target_modules", ["q_proj"], True),
        ("lora.target_modules", [], False),
        ("lora.dropout", 1.0, False),
        ("data.max_tokens", 2, False),
    ],
)
def test_it_takes_what_is_read_and_refuses_what_is_refused(validator, write_run, key, value, fits):
    document = yaml.safe_load(write_run().read_text())
    section, _, name = key.rpartition(".")
    (document[section] if section else document)[name] = value
    assert validator.is_valid(document) == fits
    try:
        load_config(write_run(**document))
    except ConfigError:
        assert not fits
    else:
        assert fits


def test_a_run_file_may_name_its_schema(write_run):
    path = write_run()
    path.write_text("# yaml-language-server: $schema=run.schema.json\n" + path.read_text())
    assert load_config(path).name == "tagger"
