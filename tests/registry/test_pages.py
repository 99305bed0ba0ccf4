"""Long answers in pages: together they are the whole answer, in its order, whatever comes or goes meanwhile."""

import pytest

from loraplex_registry.errors import InvalidQuery, InvalidRequest, UnknownAdapter
from loraplex_registry.pages import pages, read_cursor, take, write_cursor

from .conftest import Adapter, make_receipt


def all_pages(ask, limit):
    found = list(pages(lambda cursor: ask(limit=limit, cursor=cursor)))
    assert all(len(page.data) == limit for page in found[:-1])
    assert len(found[-1].data) <= limit
    return [row for page in found for row in page.data]


@pytest.fixture
def many(registry, base, tmp_path):
    """Seven versions of three names, some of equal metrics, one without; two aliases, a deletion."""
    scores = [0.5, 0.9, 0.5, None, 0.5, 0.7, 0.9]
    for seed, score in enumerate(scores):
        receipt = make_receipt(base, metrics={} if score is None else {"f1": score})
        folder = Adapter(rank=4 + seed % 2, seed=seed).write(tmp_path / f"many-{seed}", receipt)
        registry.push(("a", "ns/b", "c")[seed % 3], folder, message=f"number {seed}")
    registry.promote("a:1", "production")
    registry.promote("a:2", "production")
    registry.delete("c:1", "no good")
    return registry


def test_pages_of_a_search_are_the_search(many):
    for sort in ("f1", "-f1", "rank", "-rank", "-created", "created", "name", "-bytes", "version", "x"):
        for query in ("", "f1>0.4 rank>=4", "number"):
            whole = many.search(query, sort)
            assert len(whole) == (5 if "f1" in query else 6)
            for limit in (1, 3, 7):
                found = all_pages(lambda sort=sort, query=query, **page: many.search_page(query, sort, **page), limit)
                assert found == whole, (sort, query, limit)


def test_pages_of_everything_else(many):
    assert [str(version) for version in many.list()] == ["a:3", "c:2", "ns/b:2"]
    for limit in (1, 2, 5):
        assert all_pages(many.list_page, limit) == many.list()
        assert all_pages(lambda **page: many.versions_page("a", **page), limit) == many.versions("a")
        assert all_pages(many.audit_page, limit) == many.audit()
        assert all_pages(lambda **page: many.audit_page("c", **page), limit) == many.audit("c")
    assert [act.action for act in many.audit("c")] == ["delete", "push", "push"]
    assert take(lambda size, cursor: many.audit_page(None, min(size, 2), cursor), 5) == many.audit(limit=5)


def test_what_comes_meanwhile_moves_nothing(many, base, tmp_path):
    """Rows before the cursor's place do not push what was seen into the next page, as offsets would."""
    whole, first = many.search("", "-created"), many.search_page("", "-created", 3)
    many.push("a", Adapter(seed=20).write(tmp_path / "new", make_receipt(base)))
    many.delete(str(whole[1]))
    rest = many.search_page("", "-created", 3, first.next)
    assert first.data + rest.data == whole
    many.restore(str(whole[1]))
    listed = many.list_page(1)
    many.push("0-before", Adapter(seed=21).write(tmp_path / "before", make_receipt(base)))
    assert [version.name for version in many.list_page(2, listed.next).data] == ["c", "ns/b"]


def test_a_page_of_the_list_has_its_names_aliases(many):
    many.promote("ns/b:1", "staging")
    first = many.list_page(2)
    assert first.aliases == {"a": {"production": 2}}
    assert many.list_page(2, first.next).aliases == {"ns/b": {"staging": 1}}


def test_questions_that_cannot_be(many):
    cursor = many.search_page("", "name", 1).next
    for ask in (
        lambda: many.search_page("", "rank", 1, cursor),  # of another question
        lambda: many.list_page(1, cursor),
        lambda: many.list_page(1, cursor[:-5]),
        lambda: many.list_page(1, "é"),
        lambda: many.list_page(1, write_cursor("list", [1])),
        lambda: many.versions_page("a", 1, write_cursor("versions of a", [True])),
        lambda: many.versions_page("a", 1, write_cursor("versions of a", [1 << 70])),
    ):
        with pytest.raises(InvalidRequest, match="expected what 'next' was in an answer to this question"):
            ask()
    with pytest.raises(InvalidRequest, match="limit is 0, expected 1 to 1,000"):
        many.list_page(0)
    with pytest.raises(InvalidQuery, match="limit is 1001"):
        many.search_page("", "name", 1001)
    for ask in (many.versions_page, many.audit_page):
        with pytest.raises(UnknownAdapter, match="nearest is 'ns/b'"):
            ask("ns/c")


def test_a_cursor_gives_back_what_it_was_made_of():
    place = ["é/&?", None, 0.1, 3]
    assert read_cursor(write_cursor("q", place), "q", [str, type(None), float, int]) == place
