"""Makes demo/quotes/train.jsonl and heldout.jsonl from the hand-written quotes and the shapes with their phrases.

    python demo/make_quotes.py

It owns the split and the two tasks' columns: `tags` and `headline`. It knows nothing of models. A line is
{"quote", "tags", "headline", "made": "hand" | "composed", "shape"}; the shape of a hand-written quote is the quote.
"""

import hashlib
import json
import random
import re
import tomllib
from pathlib import Path

from corpus import gerund, join_topics

QUOTES = Path(__file__).parent / "quotes"
SEED = 7
PER_SHAPE = 8
HELD_OUT_ONE_IN = 6


def is_heldout(shape: str) -> bool:
    """The split rule: by the sha256 of the shape, so that no shape of sentence is on both sides."""
    return int(hashlib.sha256(shape.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def headline(tags: list[str]) -> str:
    """The second task's answer: the first two topics, in capitals."""
    return "ON " + join_topics(tags[:2]).upper()


def line(quote: str, tags: list[str], made: str, shape: str) -> dict[str, str | list[str]]:
    return {"quote": quote, "tags": tags, "headline": headline(tags), "made": made, "shape": shape}


def hand_written() -> list[dict[str, str | list[str]]]:
    rows = (row.rsplit(" | ", 1) for row in (QUOTES / "hand.txt").read_text(encoding="utf-8").splitlines())
    return [line(quote, tags.split(", "), "hand", quote) for quote, tags in rows]


def composed(rng: random.Random) -> list[dict[str, str | list[str]]]:
    """Each shape `PER_SHAPE` times, with topics drawn so that all are used equally often."""
    phrases = tomllib.loads((QUOTES / "phrases.toml").read_text(encoding="utf-8"))
    waiting: list[str] = []
    rows = []
    for shape in (QUOTES / "shapes.txt").read_text(encoding="utf-8").splitlines():
        for _ in range(PER_SHAPE):
            slots = sorted(set(re.findall(r"{([abc])\.", shape)), key=lambda slot: shape.index("{" + slot))
            if len(waiting) < 2 * len(slots):
                waiting += rng.sample(list(phrases), len(phrases))
            topics = list(dict.fromkeys(waiting))[: len(slots)]
            for topic in topics:
                waiting.remove(topic)
            words = {}
            for slot, topic in zip(slots, topics, strict=True):
                deed = rng.choice(phrases[topic]["deeds"])
                first, *rest = deed.split(" ")
                words[f"{slot}.name"] = rng.choice(phrases[topic]["names"])
                words[f"{slot}.do"] = deed
                words[f"{slot}.doing"] = " ".join([gerund(first), *rest])
            text = re.sub(r"{([abc]\.\w+)}", lambda match, words=words: words[match[1]], shape)
            rows.append(line(text[0].upper() + text[1:], topics, "composed", shape))
    return rows


def main() -> None:
    rng = random.Random(SEED)
    rows = list({row["quote"]: row for row in hand_written() + composed(rng)}.values())
    rng.shuffle(rows)
    for name, wanted in (("train", False), ("heldout", True)):
        chosen = [row for row in rows if is_heldout(str(row["shape"])) is wanted]
        path = QUOTES / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen), encoding="utf-8")
        print(f"{path.name}: {len(chosen)} quotes, {sum(row['made'] == 'hand' for row in chosen)} by hand")


if __name__ == "__main__":
    main()
