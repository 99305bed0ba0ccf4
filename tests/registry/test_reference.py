"""The grammar of references."""

import pytest

from loraplex_registry.errors import InvalidReference
from loraplex_registry.reference import HubReference, Reference, parse_alias

DIGEST = "sha256:" + "a1" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quotes-tagger", Reference("quotes-tagger")),
        ("quotes-tagger:3", Reference("quotes-tagger", version=3)),
        ("quotes-tagger@production", Reference("quotes-tagger", alias="production")),
        (f"quotes-tagger@{DIGEST}", Reference("quotes-tagger", digest=DIGEST)),
        ("team/quotes.tagger_2:12", Reference("team/quotes.tagger_2", version=12)),
        ("a@1b", Reference("a", alias="1b")),
    ],
)
def test_parse_and_back(text, expected):
    assert Reference.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "Quotes", "a b", "-a", "a-", "a/b/c", "/a", "a/", "../a", "a\n", "à", "a" * 97),
        *("a:0", "a:01", "a:-1", "a:x", "a:1\n", "a:1@b"),
        *("a@", "a@12", "a@A", "a@x/y", "a@sha256:12", f"a@{DIGEST.upper()}", f"a@{DIGEST}0"),
    ],
)
def test_refused(text):
    with pytest.raises(InvalidReference, match="is not a reference: expected name, name:3"):
        Reference.parse(text)


def test_hub_references():
    assert HubReference.parse("hf://owner/repo") == HubReference("owner/repo", None)
    assert str(HubReference.parse("hf://owner/repo@refs/pr/1")) == "hf://owner/repo@refs/pr/1"
    for text in ("hf://owner", "hf://a/b/c", "owner/repo", "hf://owner/repo@"):
        with pytest.raises(InvalidReference, match="expected hf://owner/repo"):
            HubReference.parse(text)


def test_alias_is_asked_for():
    assert parse_alias("a@b") == ("a", "b")
    with pytest.raises(InvalidReference, match="a@production"):
        parse_alias("a:1")
