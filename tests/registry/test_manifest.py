"""A version's identity: the same content gives the same digest, and nothing odd can be a manifest."""

import json

import pytest

from loraplex_registry.errors import InvalidManifest
from loraplex_registry.manifest import BaseRef, FileEntry, Manifest

A, B = FileEntry("a.txt", "a" * 64, 1), FileEntry("b.txt", "b" * 64, 2)


def test_digest_does_not_depend_on_order():
    one = Manifest((A, B), BaseRef("base"), {"r": 4, "alpha": {"x": 1, "y": 2}})
    other = Manifest((B, A), BaseRef("base"), {"alpha": {"y": 2, "x": 1}, "r": 4})
    assert one.digest == other.digest
    assert (
        one.digest == "sha256:4d2bfbc0d6d2766c48df13f17a8f214d3b465a6383a1f2bdc212821ea6ef5d0a"
    )  # in stores out there
    assert Manifest.from_bytes(other.canonical()).canonical() == one.canonical()


@pytest.mark.parametrize(
    "other",
    [
        Manifest((A,), BaseRef("base"), {"r": 4}),
        Manifest((A, B), BaseRef("base", fingerprint="sha256:1"), {"r": 4}),
        Manifest((A, B), BaseRef("base"), {"r": 5}),
    ],
)
def test_any_difference_is_another_digest(other):
    assert other.digest != Manifest((A, B), BaseRef("base"), {"r": 4}).digest


@pytest.mark.parametrize("path", ["../a", "/a", "a//b", "a/../b", "", ".hidden", "a\\b", "a\0b", "a\nb", "x" * 256])
def test_paths_stay_inside(path):
    with pytest.raises(InvalidManifest, match="file path"):
        FileEntry(path, "a" * 64, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other/1"},
        {"files": None},
        {"files": [{"path": "a", "sha256": "zz", "bytes": 1}]},
        {"files": [{"path": 3, "sha256": "a" * 64, "bytes": 1}]},
        {"files": [{"path": "a", "sha256": "a" * 64, "bytes": -1}]},
        {"base": {"nonsense": 1}},
        {"config": 3},
    ],
)
def test_broken_manifests(change):
    body = json.loads(Manifest((A,), BaseRef("base"), {}).canonical()) | change
    with pytest.raises(InvalidManifest):
        Manifest.from_bytes(json.dumps(body).encode())
