"""What is told of a version beside its bytes: tags, its card, and what its receipt says of data, run and template."""

import json

import httpx
import pytest
from click.testing import CliRunner

from loraplex_registry.card import first_words
from loraplex_registry.cli import cli
from loraplex_registry.errors import CorruptBlob, InvalidAdapter, InvalidReference, UnknownVersion
from loraplex_registry.registry import Registry
from loraplex_registry.tables import lineage_of
from loraplex_registry.version import Dataset, Lineage, Template

from .conftest import Adapter, make_receipt, served

CARD = """---
license: apache-2.0
---
# Quotes tagger

![badge](x.svg)

Tags a quote with
its topics.

## More
`code`
"""
TOLD = {
    "name": "night-run",
    "seed": 42,
    "steps": 240,
    "data": {
        "train": {"path": "data/quotes.jsonl", "sha256": "ab" * 32, "examples": 1000, "tokens": 5},
        "heldout": {"path": "data/heldout.jsonl", "sha256": None, "examples": None},
    },
    "template": {"prompt": "{quote} ->:", "completion": " {tags}", "stop": ["\n", "##"]},
}


@pytest.fixture
def told(registry, base, tmp_path):
    """quotes-tagger:1 with a card and a full receipt, other:1 without either."""
    folder = Adapter().write(tmp_path / "told", make_receipt(base, **TOLD))
    (folder / "README.md").write_text(CARD)
    registry.push("quotes-tagger", folder, message="first")
    registry.push("other", Adapter(seed=1).write(tmp_path / "other"), base=base)
    return registry


def test_a_version_tells_its_card_and_lineage(told):
    version = told.resolve("quotes-tagger")
    assert version.description == "Tags a quote with its topics."
    assert version.lineage == Lineage(
        datasets=(Dataset("heldout", "data/heldout.jsonl"), Dataset("train", "data/quotes.jsonl", "ab" * 32, 1000)),
        run="night-run",
        seed=42,
        steps=240,
        template=Template("{quote} ->:", " {tags}", ("\n", "##")),
    )
    assert told.card(version.digest) == CARD
    other = told.resolve("other")
    assert (other.description, other.lineage, told.card(other.digest)) == ("", Lineage(), None)
    assert told.versions("quotes-tagger") == told.search("first") == [version]


def test_a_template_keeps_the_form_and_the_chat_template(registry, base, tmp_path):
    told = {"form": "messages", "chat": "{{ messages }}", "stop": ["<|im_end|>"]}
    registry.push("chat", Adapter().write(tmp_path / "chat", make_receipt(base, template=told)))
    template = registry.resolve("chat").lineage.template
    assert template == Template(form="messages", chat="{{ messages }}", stop=("<|im_end|>",))


def test_a_template_from_before_there_were_forms_is_read():
    row = {
        "datasets": [],
        "run": None,
        "seed": 1,
        "steps": 2,
        "template": {"prompt": "a", "completion": None, "stop": []},
    }
    assert lineage_of(row).template == Template("a")


@pytest.mark.parametrize(
    "query", ["dataset:QUOTES.jsonl", "dataset:abab", "dataset:heldout", "run:night", "topics", "tag:nlp rank=4"]
)
def test_searches_look_through_it(told, query):
    told.tag("quotes-tagger:1", add=["nlp"])
    assert [str(version) for version in told.search(query)] == ["quotes-tagger:1"]
    assert [version.name for version in told.search("", "base")] == ["other", "quotes-tagger"]


def test_versions_are_sorted_by_it(registry, base, tmp_path):
    """Those that do not tell come last, whichever way; pages of one are the whole."""
    told = (("night", "zebra"), (None, ""), ("dawn", "ant"), ("dawn", ""), (None, "x"))
    for number, (run, words) in enumerate(told):
        about = {"name": run} | ({"data": {"train": {"path": f"{run}.jsonl"}}} if run else {})
        folder = Adapter(seed=number).write(tmp_path / f"told-{number}", make_receipt(base, **about))
        (folder / "README.md").write_text(words)
        registry.push(f"v{number}", folder)
    for sort, order in {
        "run": "v2 v3 v0 v1 v4",
        "-run": "v0 v2 v3 v1 v4",
        "dataset": "v2 v3 v0 v1 v4",
        "-dataset": "v0 v2 v3 v1 v4",
        "description": "v2 v4 v0 v1 v3",
        "-description": "v0 v4 v2 v1 v3",
    }.items():
        whole = registry.search("", sort)
        assert [version.name for version in whole] == order.split(), sort
        found, page = [], registry.search_page("", sort, 1)
        while page.next:
            found, page = found + page.data, registry.search_page("", sort, 1, page.next)
        assert found + page.data == whole
    assert [version.name for version in registry.search("dataset:dawn", "-description")] == ["v2", "v3"]


def test_tags_change_and_the_audit_log_says_so(told):
    before = told.resolve("quotes-tagger:1")
    assert told.tag("quotes-tagger", add=["nlp", "beta", "nlp"]).tags == ("beta", "nlp")
    after = told.tag("quotes-tagger:1", add=["nlp", "v2.0"], remove=["beta", "never"])
    assert after == told.resolve("quotes-tagger:1")
    assert (after.tags, after.digest) == (("nlp", "v2.0"), before.digest)
    assert told.list()[1].tags == ("nlp", "v2.0")
    acts = [(act.action, act.subject) for act in told.audit("quotes-tagger")[::-1]]
    assert acts[0] == ("push", "quotes-tagger:1")
    assert sorted(acts[1:3]) == [("tag", "quotes-tagger:1 beta"), ("tag", "quotes-tagger:1 nlp")]
    assert sorted(acts[3:]) == [("tag", "quotes-tagger:1 v2.0"), ("untag", "quotes-tagger:1 beta")]
    assert all(act.who for act in told.audit())
    assert told.search("tag:bet") == told.search("tag:beta") == []
    with pytest.raises(InvalidReference, match="'A b' is not a tag"):
        told.tag("quotes-tagger:1", add=["fine", "A b"])
    with pytest.raises(UnknownVersion):
        told.tag("quotes-tagger:7", add=["fine"])
    assert told.resolve("quotes-tagger:1").tags == ("nlp", "v2.0")


def test_a_card_is_proven(told, store, tmp_path):
    version = told.resolve("quotes-tagger")
    entry = next(entry for entry in told.manifest(version.digest).files if entry.path == "README.md")
    store.place.remove([entry.sha256])
    (tmp_path / "altered").write_text(CARD.replace("quote", "query"))
    store.place.put(tmp_path / "altered", entry.sha256)
    with pytest.raises(CorruptBlob, match=r"README\.md"):
        told.card(version.digest)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": "42"}, "seed is '42', expected a whole number"),
        ({"steps": 1 << 70}, "steps is"),
        ({"template": {"stop": "x"}}, "template.stop is 'x', expected a list of strings"),
        ({"template": {"stop": [1]}}, "template.stop is 1, expected a string"),
        ({"template": {"prompt": 1}}, "template.prompt is 1, expected a string"),
        ({"template": {"form": 1}}, "template.form is 1, expected a string"),
        ({"template": {"chat": "x" * 70_000}}, "template.chat has 70,000 characters, expected at most 65,536"),
        ({"data": {"train": {"path": 1}}}, "data.train.path is 1"),
        ({"data": [1]}, "receipt.json"),
    ],
)
def test_a_receipt_that_cannot_be_read_is_refused(registry, base, tmp_path, change, said):
    folder = Adapter().write(tmp_path / "a", make_receipt(base, **change))
    with pytest.raises(InvalidAdapter, match=said.replace(".", r"\.")):
        registry.push("x", folder)
    assert registry.list() == []


@pytest.mark.parametrize(
    ("card", "description"),
    [
        ("", ""),
        ("# Only a heading\n", ""),
        ("# Heading\nand words\r\n\r\nmore", "and words"),
        ("| a | b |\n\n- one\n\n<b>x</b>\n\nWords.", "Words."),
        ("```\ncode\n\nin code\n```\n\nAfter.", "After."),
        ("x" * 500, "x" * 299 + "…"),
    ],
)
def test_the_first_words_of_a_card(tmp_path, card, description):
    (tmp_path / "README.md").write_text(card)
    assert first_words(tmp_path) == description


def test_the_card_over_http(base, tmp_path):
    folder = Adapter().write(tmp_path / "a", make_receipt(base))
    (folder / "README.md").write_text(CARD)
    with Registry(tmp_path / "registry") as local, served(local) as url:
        version = local.push("x", folder)
        local.push("y", Adapter(seed=1).write(tmp_path / "b"), base=base)
        answer = httpx.get(f"{url}/v1/card?ref=x")
        assert (answer.text, answer.headers["content-type"]) == (CARD, "text/markdown; charset=utf-8")
        assert answer.headers["etag"] == f'"{version.digest}"'
        none = httpx.get(f"{url}/v1/card?ref=y")
        assert (none.status_code, none.json()["error"]["code"]) == (404, "file_not_found")
        for body, param in (({"ref": "x", "add": "nlp"}, "add"), ({"ref": "x", "remove": [1]}, "remove")):
            refused = httpx.post(f"{url}/v1/tag", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_the_command_tags_and_shows(base, tmp_path):
    folder = Adapter().write(tmp_path / "told", make_receipt(base, **TOLD))
    (folder / "README.md").write_text(CARD + "\x1b[31mred\n")

    def run(*words):
        answer = CliRunner().invoke(cli, ["--registry", str(tmp_path / "r"), *map(str, words)])
        assert answer.exit_code == 0, answer.output
        return answer.stdout

    run("push", "x", folder, "--tag", "nlp", "--tag", "beta")
    assert run("tag", "add", "x", "fast") == "x:1: beta, fast, nlp\n"
    assert run("tag", "rm", "x:1", "beta", "nlp", "fast") == "x:1: no tags\n"
    run("tag", "add", "x:1", "nlp")
    assert "x:1" in run("search", "tag:nlp")
    said = run("show", "x")
    for words in (
        "Tags a quote with its topics.",
        "train: data/quotes.jsonl  1,000 examples  sha256:" + "ab" * 32,
        "night-run, seed 42, steps 240",
        "'{quote} ->:'",
        "'\\n', '##'",
        "# Quotes tagger",
    ):
        assert words in said
    assert "license" not in said
    found = json.loads(run("show", "x", "--format", "json"))
    assert found["card"] == CARD + "\x1b[31mred\n"
    assert found["version"]["lineage"]["template"]["stop"] == ["\n", "##"]
    refused = CliRunner().invoke(cli, ["--registry", str(tmp_path / "r"), "push", "y", str(folder), "--tag", "No!"])
    assert (refused.exit_code, refused.stderr.startswith("error: 'No!' is not a tag")) == (1, True)
    assert "y" not in [version["name"] for version in json.loads(run("list", "--format", "json"))]
