"""What is known of versions, and for how long."""

from dataclasses import dataclass

from loraplex_server.known import KnownVersions


@dataclass
class Version:
    digest: str
    name: str = "tagger"


def test_the_resident_and_the_last_resolved_stay_known():
    resident = ("0", "3")
    known = KnownVersions(4, lambda: resident)
    for number in range(100):
        known.remember(Version(f"{number}"))
        known.remember(Version("7", "asked for all the time"))
    assert [version.digest for version in known.of(map(str, range(100)))] == ["0", "3", "7", "97", "98", "99"]
    assert len(known) == 6
    assert known.names(["7", "98", "50"]) == ("asked for all the time", "tagger")
    assert known.has("tagger") and not known.has("another")
    resident = ()
    known.remember(Version("100"))
    assert len(known) == 4, "what left memory is forgotten too"
