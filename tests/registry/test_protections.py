"""Protected aliases: the rule is checked where the alias moves, whoever asks; and what of it is not met is named."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraplex_registry.cli import cli
from loraplex_registry.errors import (
    Forbidden,
    InvalidKey,
    InvalidQuery,
    InvalidReference,
    InvalidRequest,
    NotApprovable,
    NotProtected,
    RequirementNotMet,
    UnknownAdapter,
    UnknownVersion,
)
from loraplex_registry.registry import Registry
from loraplex_registry.remote import RemoteRegistry
from loraplex_registry.signing import PublicKey, create_key, sign

from .conftest import Adapter, make_receipt, served

NAME = "quotes-tagger"


@pytest.fixture
def key(tmp_path) -> PublicKey:
    return create_key(tmp_path / "release.key")


def add_signature(registry, version, tmp_path):
    return registry.signatures.add(version.digest, *sign(version.digest, tmp_path / "release.key"))


def target(registry) -> int | None:
    return registry.aliases().get(NAME, {}).get("production")


# --- the same in a folder, behind a URL and on PostgreSQL ---


def test_a_rule_is_kept_replaced_and_taken_away(push, registry, key):
    push()
    rule = registry.protections.protect(NAME, "production", ["tag_f1>=0.7", "rank<=16"], [key.text], ["ada", "bob"])
    assert str(rule) == f"tag_f1>=0.7, rank<=16; signed by {key.id}; approved by ada or bob"
    assert (rule.name, rule.alias, bool(rule.who)) == (NAME, "production", True)
    assert registry.protections.list() == [rule]
    second = registry.protections.protect(NAME, "production", ["rank<=8"])
    assert registry.protections.list() == [second]
    assert registry.protections.unprotect(NAME, "production") == second
    assert registry.protections.list() == []
    with pytest.raises(NotProtected, match="quotes-tagger@production has no rule"):
        registry.protections.unprotect(NAME, "production")
    acts = [(act.action, act.subject, act.reason) for act in reversed(registry.audit(NAME)) if act.action != "push"]
    assert acts == [
        ("protect", "quotes-tagger@production", str(rule)),
        ("protect", "quotes-tagger@production", "rank<=8"),
        ("unprotect", "quotes-tagger@production", "rank<=8"),
    ]


@pytest.mark.parametrize(
    ("rule", "error", "said"),
    [
        ((NAME, "production"), InvalidRequest, "the rule is empty"),
        ((NAME, "production", ["good"]), InvalidQuery, "'good' is not a comparison"),
        ((NAME, "production", [], ["x"]), InvalidKey, "expected 32 bytes as base64"),
        ((NAME, "production", [], [], ["\n"]), InvalidRequest, "approvers holds"),
        ((NAME, "production", [], [], ["a"] * 51), InvalidRequest, "more than 50"),
        ((NAME, "3", ["f1>1"]), InvalidReference, "'3' is not an alias"),
        (("quotes-tager", "production", ["f1>1"]), UnknownAdapter, "the nearest is 'quotes-tagger'"),
    ],
)
def test_rules_that_cannot_be(push, registry, rule, error, said):
    push()
    with pytest.raises(error, match=said):
        registry.protections.protect(*rule)
    assert registry.protections.list() == []


def test_an_alias_moves_only_when_the_whole_rule_is_met(push, registry, key, tmp_path):
    first = push()
    registry.protections.protect(NAME, "production", ["tag_f1>=0.7500001", "rank<=16"], [key.text])
    with pytest.raises(RequirementNotMet) as caught:
        registry.promote("quotes-tagger:1", "production")
    said = str(caught.value)
    assert said.startswith("quotes-tagger@production does not move to quotes-tagger:1: tag_f1>=0.7500001 is required, ")
    assert f"has to be signed by {key.id}, and is signed by nobody" in said
    assert "rank" not in said  # that one holds
    assert target(registry) is None
    registry.promote("quotes-tagger:1", "staging")  # another alias has no rule
    registry.protections.protect(NAME, "production", ["tag_f1>=0.7"], [key.text])
    add_signature(registry, first, tmp_path)
    assert registry.promote("quotes-tagger:1", "production", "all of it").reason == "all of it"
    assert target(registry) == 1
    second = push(seed=1)
    with pytest.raises(RequirementNotMet, match=rf"does not move to quotes-tagger:2: it \({second.digest}\) has to be"):
        registry.promote("quotes-tagger:2", "production", require=["rank<=16"])
    with pytest.raises(RequirementNotMet, match=r"rank<=1 is required, and it has 4; it .* has to be signed"):
        registry.promote("quotes-tagger:2", "production", require=["rank<=1"])
    assert target(registry) == 1
    registry.protections.unprotect(NAME, "production")
    assert registry.promote("quotes-tagger:2", "production").to_number == 2


def test_a_rollback_asks_nothing_of_what_had_been_there(push, registry):
    push(), push(seed=1), push(seed=2)
    registry.promote("quotes-tagger:1", "production"), registry.promote("quotes-tagger:2", "production")
    registry.protections.protect(NAME, "production", ["tag_f1>=0.9"])
    with pytest.raises(RequirementNotMet, match=r"tag_f1>=0\.9 is required, and it has 0.75"):
        registry.rollback("quotes-tagger@production", to=3)  # it never was there
    assert registry.rollback("quotes-tagger@production").to_number == 1
    assert registry.rollback("quotes-tagger@production", to=2).to_number == 2
    with pytest.raises(RequirementNotMet):
        registry.promote("quotes-tagger:1", "production")
    registry.protections.protect(NAME, "production", ["tag_f1>=0.7"])
    assert registry.rollback("quotes-tagger@production", to=3).to_number == 3  # now the rule holds for it


def test_who_pushed_cannot_approve(push, registry):
    push()
    with pytest.raises(NotApprovable, match=r"quotes-tagger:1 was pushed by .*: somebody else has to approve it"):
        registry.protections.approve("quotes-tagger:1", "production")
    with pytest.raises(UnknownVersion):
        registry.protections.approve("quotes-tagger:2", "production")
    with pytest.raises(InvalidReference):
        registry.protections.approve("quotes-tagger:1", "3")


# --- people, over HTTP ---


@pytest.fixture
def team(tmp_path, base):
    """A registry over HTTP as carl (who pushes), ada and eve (who promote) and the administrator have it."""
    with Registry(tmp_path / "registry") as local, served(local, {"root": "root"}) as url:
        people = {
            name: RemoteRegistry(url, local.tokens.create(name, [scope]).secret)
            for name, scope in (("carl", "push"), ("ada", "promote"), ("eve", "promote"), ("root", "admin"))
        }
        people["carl"].push(NAME, Adapter().write(tmp_path / "made", make_receipt(base)), base=base)
        people["carl"].push(NAME, Adapter(seed=1).write(tmp_path / "made-1", make_receipt(base)), base=base)
        yield people
        for person in people.values():
            person.close()


def test_an_approver_approves_a_version_for_an_alias(team):
    ada, eve, root = team["ada"], team["eve"], team["root"]
    root.protections.protect(NAME, "production", approvers=["ada", "bob"])
    said = "an approval by ada or bob is required, and it has "
    with pytest.raises(RequirementNotMet, match=f"{said}none"):
        ada.promote("quotes-tagger:1", "production")
    eve.protections.approve("quotes-tagger:1", "production")
    with pytest.raises(RequirementNotMet, match=f"{said}one by eve"):
        ada.promote("quotes-tagger:1", "production")
    ada.protections.approve("quotes-tagger:1", "staging")
    with pytest.raises(RequirementNotMet, match=f"{said}one by eve"):  # another alias's approval is none
        ada.promote("quotes-tagger:1", "production")
    approval = ada.protections.approve("quotes-tagger:1", "production")
    assert (str(approval), approval.alias, approval.who) == ("quotes-tagger:1", "production", "ada")
    assert ada.protections.approve("quotes-tagger", "production").number == 2  # the newest
    assert ada.protections.approve("quotes-tagger:1", "production") == approval
    assert eve.promote("quotes-tagger:1", "production").who == "eve"
    told = team["carl"].protections.approvals("quotes-tagger@production")
    assert [(one.alias, one.who) for one in told] == [("production", "eve"), ("staging", "ada"), ("production", "ada")]
    assert told[-1] == approval
    approved = [act for act in root.audit(NAME) if act.action == "approve"][::-1]
    assert [(act.who, act.subject, act.reason) for act in approved] == [
        ("eve", "quotes-tagger:1", "for production"),
        ("ada", "quotes-tagger:1", "for staging"),
        ("ada", "quotes-tagger:1", "for production"),
        ("ada", "quotes-tagger:2", "for production"),
    ]


def test_only_an_administrator_makes_rules(team, tmp_path):
    team["root"].protections.protect(NAME, "production", ["rank<=2"])
    for act in (
        lambda: team["ada"].protections.protect(NAME, "production", ["rank<=64"]),
        lambda: team["ada"].protections.unprotect(NAME, "production"),
    ):
        with pytest.raises(Forbidden, match="needs the scope 'admin', and the token 'ada' has promote"):
            act()
    with pytest.raises(Forbidden, match="needs the scope 'promote'"):
        team["carl"].protections.approve("quotes-tagger:1", "production")
    with pytest.raises(RequirementNotMet, match="rank<=2 is required, and it has 4"):
        team["root"].promote("quotes-tagger:1", "production")  # nor does an administrator go round one
    assert len(team["carl"].protections.list()) == 1


def test_a_prefix_has_only_its_own_rules(team):
    root = team["root"]
    root.protections.protect(NAME, "production", ["rank<=2"])
    secret = root.tokens.create("other", ["admin"], "other-").secret
    with RemoteRegistry(root.url, secret) as other:
        assert other.protections.list() == []
        for act in (
            lambda: other.protections.protect(NAME, "production", ["rank<=64"]),
            lambda: other.protections.unprotect(NAME, "production"),
            lambda: other.protections.approve("quotes-tagger:1", "production"),
        ):
            with pytest.raises(Forbidden, match="is for names that begin with 'other-'"):
                act()
        with pytest.raises(UnknownAdapter):
            other.protections.approvals("quotes-tagger:1")
        with pytest.raises(UnknownAdapter) as caught:
            other.protections.protect("other-x", "production", ["rank<=64"])
        assert caught.value.nearest is None
    assert len(root.protections.list()) == 1


# --- the command ---


@pytest.fixture(params=["folder", "url"])
def run(request, tmp_path, base, monkeypatch):
    """run("approve", …) in an empty folder, on a registry to which carl pushed quotes-tagger:1."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("LOGNAME", "ada")
    with Registry(tmp_path / "registry") as local, served(local, {"root": "ada"}) as url:
        monkeypatch.setenv("LOGNAME", "carl")
        local.push(NAME, Adapter().write(tmp_path / "made", make_receipt(base)), base=base)
        monkeypatch.setenv("LOGNAME", "ada")
        monkeypatch.setenv("LORAPLEX_REGISTRY_TOKEN", "root")
        where = str(tmp_path / "registry") if request.param == "folder" else url
        yield lambda *arguments: CliRunner().invoke(cli, ["--registry", where, *arguments])


def test_protect_approve_promote_and_unprotect(run, tmp_path):
    assert run("key", "create", "release.key").exit_code == 0
    key = PublicKey.read(Path("release.key.pub"))
    rule = f"tag_f1>=0.7; signed by {key.id}; approved by ada or bob"
    asked = ("--require", "tag_f1>=0.7", "--signed-by", "release.key.pub", "--approver", "ada", "--approver", "bob")
    made = run("alias", "protect", "quotes-tagger@production", *asked)
    assert made.stdout == f"protected quotes-tagger@production: {rule}\n"
    head, row = run("alias", "rules").stdout.splitlines()
    assert head.split() == ["alias", "asks", "since", "by"]
    assert row.startswith(f"quotes-tagger@production  {rule}  ")
    assert row.endswith("  ada")
    (told,) = json.loads(run("alias", "rules", "--format", "json").stdout)
    assert (told["require"], told["signed_by"], told["approvers"]) == (["tag_f1>=0.7"], [key.text], ["ada", "bob"])
    refused = run("promote", "quotes-tagger:1", "--to", "production")
    assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert "; an approval by ada or bob is required, and it has none" in refused.stderr
    assert run("sign", "quotes-tagger:1", "--key", "release.key").exit_code == 0
    assert json.loads(run("show", "quotes-tagger", "--format", "json").stdout)["approvals"] == []
    approved = run("approve", "quotes-tagger:1", "--for", "production")
    assert approved.stdout == "approved quotes-tagger:1 for production as ada\n"
    (told,) = json.loads(run("show", "quotes-tagger", "--format", "json").stdout)["approvals"]
    assert (told["name"], told["number"], told["alias"], told["who"]) == (NAME, 1, "production", "ada")
    at = datetime.fromisoformat(told["at"]).astimezone()
    assert f"  for production by ada, {at:%Y-%m-%d %H:%M}" in run("show", "quotes-tagger").stdout
    assert (
        run("promote", "quotes-tagger:1", "--to", "production").stdout == "quotes-tagger@production: quotes-tagger:1\n"
    )
    gone = run("alias", "unprotect", "quotes-tagger@production")
    assert gone.stdout == f"unprotected quotes-tagger@production, which asked: {rule}\n"
    assert run("alias", "unprotect", "quotes-tagger@production").stderr == (
        "error: quotes-tagger@production has no rule\n"
    )
    assert run("alias", "protect", "quotes-tagger", "--require", "f1>1").stderr.startswith(
        "error: 'quotes-tagger' names no"
    )
    assert run("alias", "protect", "quotes-tagger@production").stderr.startswith("error: the rule is empty, expected")


def test_a_protected_alias_is_not_removed(push, registry):
    push()
    registry.promote("quotes-tagger:1", "production")
    registry.protections.protect("quotes-tagger", "production", ["rank<=8"])
    with pytest.raises(RequirementNotMet, match="quotes-tagger@production is not removed: it is protected"):
        registry.remove_alias("quotes-tagger@production")
    assert registry.aliases() == {"quotes-tagger": {"production": 1}}
    registry.protections.unprotect("quotes-tagger", "production")
    assert registry.remove_alias("quotes-tagger@production").to_number is None
