"""The registry watch, look by look."""

from dataclasses import dataclass

from loraplex_registry.errors import UnknownAdapter
from loraplex_server.watch import ROUND, RegistryWatch


@dataclass
class Newest:
    name: str
    number: int


class Names:
    """A registry that counts who is asked about."""

    def __init__(self, **newest) -> None:
        self.newest, self.asked = newest, []

    def aliases(self) -> dict:
        return {}

    def versions(self, name) -> list:
        self.asked.append(name)
        if name not in self.newest:
            raise UnknownAdapter(name)
        return [Newest(name, number) for number in range(1, self.newest[name] + 1)]


def test_every_held_name_is_asked_about_in_a_round_and_no_look_asks_about_all():
    registry = Names(**{f"n{i}": 1 for i in range(100)})
    watch = RegistryWatch(registry, lambda version: None, lambda: [f"n{i}" for i in range(12)])
    looks = []
    for _ in range(ROUND):
        watch.look()
        looks.append(len(registry.asked) - sum(looks))
    assert set(registry.asked) == {f"n{i}" for i in range(12)}
    assert max(looks) == 3


def test_a_push_to_a_held_name_is_told_once_and_what_was_there_before_is_not():
    told, gone, held = [], [], ["a", "b", "ghost"]
    registry = Names(a=3, b=1, c=1)
    watch = RegistryWatch(registry, told.append, lambda: held, gone.append)
    for _ in range(2 * ROUND):
        watch.look()
    assert told == []
    assert set(gone) == {"ghost"}
    registry.newest |= {"a": 5, "c": 2}
    for _ in range(2 * ROUND):
        watch.look()
    assert told == [Newest("a", 5)]
    held.remove("a")
    registry.newest["a"] = 6
    for _ in range(2 * ROUND):
        watch.look()
    assert told == [Newest("a", 5)]
    assert watch.up
