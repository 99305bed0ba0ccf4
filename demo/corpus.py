"""The demo's text: a seeded generator of English-like prose from topics.toml and grammar.toml. Pure standard library.

It owns the kinds of document and the forms of words. It knows nothing of tokenizers and models, and never writes the
quotes data's task marker: the base model that learns from this text has not seen the adapters' tasks.
"""

import random
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

HERE = Path(__file__).parent
FIRST_TOPICS = 4

_PLURALS = {
    "man": "men", "woman": "women", "child": "children", "leaf": "leaves", "wolf": "wolves", "shelf": "shelves",
    "thief": "thieves", "mouse": "mice", "goose": "geese", "foot": "feet", "knife": "knives", "half": "halves",
    "loaf": "loaves", "deer": "deer", "dove": "doves", "will": "wills", "person": "people",
}  # fmt: skip
_DOUBLING = re.compile(r"win|plan|run|stop|hum|drum|skip|cut|let|get|sit|bet|hit|put|rob|nod|rub|hug|begin")
_IRREGULAR_PAST = re.compile(
    r"stood|fled|hid|wrote|taught|understood|built|spent|paid|bought|sold|won|fell|lost|sang|fought|slept|ate|drew|drawn"
    r"|forgot|gave|forgave|chose|became|dreamt"
)
_INTRANSITIVE = {"come", "go", "stay", "remain", "walk", "run", "burn"}
_UNLIKE_AN = re.compile(r"\b([Aa])n? (?=(\w+))")


def plural(noun: str) -> str:
    if noun in _PLURALS:
        return _PLURALS[noun]
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def third_person(verb: str) -> str:
    return "goes" if verb == "go" else plural(verb) if verb not in _PLURALS else verb + "s"


def gerund(verb: str) -> str:
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + "ing"
    return verb + verb[-1] + "ing" if _DOUBLING.fullmatch(verb) else verb + "ing"


def join_topics(topics: list[str]) -> str:
    """`["a", "b", "c"]` → `"a, b and c"`."""
    return topics[0] if len(topics) == 1 else ", ".join(topics[:-1]) + " and " + topics[-1]


@dataclass(frozen=True)
class World:
    """The vocabulary and the grammar."""

    pools: dict[str, dict[str, list[str]]]  # topic → kind of word → words
    general: dict[str, list[str]]  # kind of word → the words of no topic
    rules: dict[str, list[str]]  # symbol → its shapes

    @property
    def topics(self) -> list[str]:
        return list(self.pools)

    @classmethod
    def load(cls) -> "World":
        pools = {}
        for topic, kinds in tomllib.loads((HERE / "topics.toml").read_text(encoding="utf-8")).items():
            pools[topic] = {kind: words.split() for kind, words in kinds.items()}
        general = pools.pop("general")
        for kinds in pools.values():
            kinds["any"] = [word for words in kinds.values() for word in words]
            kinds["past"] = [word for word in kinds["also"] if word.endswith("ed") or _IRREGULAR_PAST.fullmatch(word)]
        return cls(pools, general, tomllib.loads((HERE / "grammar.toml").read_text(encoding="utf-8")))


_SYMBOLS: dict[str, tuple[str, Callable[[str], str]]] = {
    "N": ("things", str), "S": ("things", plural), "M": ("stuff", str), "A": ("traits", str), "VD": ("past", str),
    "P": ("people", str), "PS": ("people", plural), "V": ("verbs", str), "VS": ("verbs", third_person),
    "VG": ("verbs", gerund),
}  # fmt: skip


@dataclass
class Writer:
    """Writes sentences and documents from one random stream."""

    world: World
    rng: random.Random
    topics: list[str]  # the ones it speaks of
    used: list[str] = field(default_factory=list)  # the topics of the words written so far, in order of appearance

    def sentence(self, topics: list[str]) -> str:
        """One sentence with words of `topics`; appends the topics it really used to `self.used`."""
        return _polish(self._expand(self._one_of("s"), topics))

    def document(self) -> str:
        kinds: list[tuple[Callable[[], str], float]] = [
            (self._saying, 44), (self._passage, 14), (self._words, 20), (self._word_list, 6),
            (self._answers, 8), (self._talk, 4), (self._figures, 4),
        ]  # fmt: skip
        write = self.rng.choices([kind for kind, _ in kinds], [share for _, share in kinds])[0]
        self.used = []
        return write()

    def _one_of(self, symbol: str) -> str:
        return self.rng.choice(self.world.rules[symbol])

    def _word(self, pool: list[str]) -> str:
        """The words at the front of a pool are the common ones, as in any language."""
        return pool[int(len(pool) * self.rng.random() ** 1.8)]

    def _pick_topics(self, most: int) -> list[str]:
        number = self.rng.choices(range(1, most + 1), [1 / size for size in range(1, most + 1)])[0]
        return self.rng.sample(self.topics, min(number, len(self.topics)))

    def _about(self) -> str:
        return join_topics(list(dict.fromkeys(self.used)))

    def _sentences(self, count: int, topics: list[str]) -> list[str]:
        written: list[str] = []
        while len(written) < count:
            before = len(self.used)
            text = self.sentence(topics)
            if len(self.used) > before or self.rng.random() < 0.1:
                written.append(text)
        return written

    def _saying(self) -> str:
        text = " ".join(self._sentences(self.rng.choice([1, 1, 1, 2]), self._pick_topics(4)))
        if not self.used:
            return text
        topics = self._about()
        closing = self._one_of("closing").format(t=topics)
        if self.rng.random() < 0.15:
            closing = f'It is called "ON {topics.upper()}".'
        return f"{text} {closing}"

    def _passage(self) -> str:
        body = self._sentences(self.rng.randint(2, 7), self._pick_topics(3))
        if not self.used:
            return " ".join(body)
        parts = [" ".join(body)]
        if self.rng.random() < 0.5:
            topics = self._about()
            parts.insert(0, self._one_of("heading").format(t=topics, T=topics.upper()) + "\n")
        if self.rng.random() < 0.6:
            parts.append(" " + self._one_of("closing").format(t=self._about()))
        return "".join(parts)

    def _words(self) -> str:
        lines = []
        for _ in range(self.rng.randint(1, 5)):
            topic, other = self.rng.sample(self.topics, 2)
            first, second, third = self.rng.sample(self.world.pools[topic]["any"], 3)
            statement = self._one_of("word_statement")
            lines.append(_polish(statement.format(w=first, w2=second, w3=third, t=topic, u=other), end=""))
        return " ".join(lines)

    def _word_list(self) -> str:
        topic = self.rng.choice(self.topics)
        words = self.rng.sample(self.world.pools[topic]["any"], self.rng.randint(4, 9))
        style = self.rng.choice(["{t}: {w}.", "{t}\n- {l}", "Words of {t}: {w}.", "{w}. All of {t}."])
        return _polish(style.format(t=topic, w=", ".join(words), l="\n- ".join(words)), end="")

    def _answers(self) -> str:
        topic = self.rng.choice(self.topics)
        one_of = {kind: self.rng.choice(words) for kind, words in self.world.pools[topic].items() if kind != "past"}
        doing = gerund(one_of["verbs"]).capitalize()
        asked = self.rng.choice([
            f"What belongs to {topic}? The {one_of['things']}, the {one_of['people']} and {one_of['stuff']}.",
            f"Who is the {one_of['people']}? Somebody who knows {topic}.",
            f"What does the {one_of['people']} do? {doing} is the answer, for it is {topic}.",
            f"What is {one_of['traits']}? All that has to do with {topic}.",
            f"Why {one_of['verbs']}? For {topic}.",
        ])  # fmt: skip
        return f"{asked} {self.sentence([topic])}"

    def _talk(self) -> str:
        topics = self._pick_topics(2)
        speakers = [self.rng.choice(self.world.pools[topic]["people"]) for topic in (topics * 2)[:2]]
        lines = [f"The {speakers[turn % 2]}: {self.sentence(topics)}" for turn in range(self.rng.randint(2, 5))]
        return "\n".join(lines)

    def _figures(self) -> str:
        """Digits and signs, so that no byte of a prompt is quite unknown to the base."""
        low, high = sorted(self.rng.sample(range(1, 1000), 2))
        first, second = (self.sentence(self._pick_topics(2)) for _ in range(2))
        return self.rng.choice([
            f"{high} > {low} and {low} < {high}.", f"{low} + {high - low} = {high}; {high} - {low} = {high - low}.",
            f"See page {low}, lines {low}-{high}.", f"a > b, b < c, c = {low}; {low}/{high} & #{high} * 2 @ {low}%.",
            f"[{low}] {first} ({high})", f"{low}: {first}",
            f"It was the year {low + 1000}. {first}", f"* {first}\n* {second}",
        ])  # fmt: skip

    def _expand(self, shape: str, topics: list[str]) -> str:
        def fill(match: re.Match[str]) -> str:
            symbol = match[1]
            if symbol in self.world.rules:
                return self._expand(self._one_of(symbol), topics)
            return self._general(symbol[1:]) if symbol[0] == "g" else self._topical(symbol, topics)

        return re.sub(r"{(\w+)}", fill, shape)

    def _general(self, symbol: str) -> str:
        pools, rng = self.world.general, self.rng
        if symbol[0] == "V":
            index = rng.randrange(len(pools["verbs"]))
            verb = pools["verbs"][index]
            if verb in _INTRANSITIVE:
                return self._general(symbol)
            return {"V": verb, "VS": third_person(verb), "VG": gerund(verb), "VD": pools["past"][index]}[symbol]
        word = rng.choice(pools[{"N": "nouns", "S": "nouns", "A": "traits", "R": "adverbs"}[symbol]])
        return plural(word) if symbol == "S" else word

    def _topical(self, symbol: str, topics: list[str]) -> str:
        if symbol in ("N", "S", "A") and self.rng.random() < 0.2:
            return self._general(symbol)
        if symbol == "P" and self.rng.random() < 0.2:
            return self._one_of("anyone")
        topic = self.rng.choice(topics)
        self.used.append(topic)
        if symbol == "T":
            return topic
        kind, form = _SYMBOLS[symbol]
        return form(self._word(self.world.pools[topic][kind]))


def _polish(text: str, end: str = ".") -> str:
    """The article before a vowel, a capital at the start, a full stop at the end."""

    def article(match: re.Match[str]) -> str:
        vowel = re.match(r"(?!uni|use|one|euro)[aeiou]|hour|honest|heir", match[2]) is not None
        return f"{match[1]}{'n' if vowel else ''} "

    text = _UNLIKE_AN.sub(article, text)
    text = re.sub(r"\bi\b", "I", text)
    text = re.sub(r"(^|[.?!:] )\"?[a-z]", lambda match: match[0].upper() if match[1] != ": " else match[0], text)
    return text if text[-1] in '.?!"' else text + end


def documents(seed: int, growth: int = 0, world: World | None = None) -> Iterator[str]:
    """An endless stream of documents; the same arguments give the same stream.

    With `growth` it begins as a primer, with `FIRST_TOPICS` topics, and takes up one more every `growth` documents. A
    model that meets forty topics at once, all equally often, sits for millions of tokens on the plateau where it
    guesses each of them alike; with a few it finds out at once what a topic is, and the others join.
    """
    world = world or World.load()
    rng = random.Random(seed)
    topics = rng.sample(world.topics, len(world.topics))
    for number in count():
        known = FIRST_TOPICS + number // growth if growth else len(topics)
        yield Writer(world, rng, topics[:known]).document()


def text_of(seed: int, characters: int) -> list[str]:
    """Documents of one stream, together at least `characters` long."""
    taken: list[str] = []
    stream = documents(seed)
    while characters > 0:
        taken.append(next(stream))
        characters -= len(taken[-1])
    return taken


if __name__ == "__main__":
    for sample in text_of(seed=1, characters=4000):
        print(sample, end="\n\n")
