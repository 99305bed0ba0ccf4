"""The demo's data and base as they lie in the repository: counts, split, shapes; and the scripts repeat themselves."""

import hashlib
import json
import re
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

DEMO = Path(__file__).parents[2] / "demo"
MARKER = " ->:"


@pytest.fixture(scope="module", autouse=True)
def demo_on_path():
    sys.path.insert(0, str(DEMO))
    yield
    sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def rows():
    return {
        part: [
            json.loads(line) for line in (DEMO / "quotes" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for part in ("train", "heldout")
    }


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json"))


def words(quote: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[a-z']+", quote.lower()))


def test_there_are_enough_quotes_by_hand_and_held_out(rows):
    both = rows["train"] + rows["heldout"]
    assert len(both) >= 500
    assert sum(row["made"] == "hand" for row in both) >= 300
    assert len(rows["heldout"]) >= 80
    assert sum(row["made"] == "hand" for row in rows["heldout"]) >= 40


def test_every_quote_has_one_to_five_known_tags(rows):
    from corpus import World

    topics = set(World.load().topics)
    for row in rows["train"] + rows["heldout"]:
        assert 1 <= len(row["tags"]) <= 5, row
        assert len(set(row["tags"])) == len(row["tags"]) and set(row["tags"]) <= topics, row
        assert row["quote"] == row["quote"].strip() and MARKER not in row["quote"], row


def test_every_topic_is_learned_and_asked(rows):
    from corpus import World

    for part, least in (("train", 10), ("heldout", 1)):
        counts = Counter(tag for row in rows[part] for tag in row["tags"])
        assert all(counts[topic] >= least for topic in World.load().topics), (part, counts.most_common()[-3:])


def test_headlines_follow_from_the_tags(rows):
    for row in rows["train"] + rows["heldout"]:
        assert row["headline"] == "ON " + " AND ".join(row["tags"][:2]).upper()


def test_no_quote_is_twice_and_none_is_on_both_sides(rows):
    for part in rows.values():
        assert len({words(row["quote"]) for row in part}) == len(part)
    assert not {words(row["quote"]) for row in rows["train"]} & {words(row["quote"]) for row in rows["heldout"]}


def test_hand_written_heldout_quotes_have_no_near_duplicate_in_train(rows):
    train = [set(words(row["quote"])) for row in rows["train"]]
    for row in rows["heldout"]:
        if row["made"] == "hand":
            mine = set(words(row["quote"]))
            nearest = max(len(mine & other) / len(mine | other) for other in train)
            assert nearest < 0.7, (row["quote"], nearest)


def test_the_split_is_by_the_hash_of_the_shape(rows):
    for part, heldout in (("train", False), ("heldout", True)):
        for row in rows[part]:
            assert (int(hashlib.sha256(row["shape"].encode()).hexdigest(), 16) % 6 == 0) is heldout, row
    assert not {row["shape"] for row in rows["train"]} & {row["shape"] for row in rows["heldout"]}


def test_the_script_makes_the_same_files(rows, tmp_path, monkeypatch, capsys):
    import make_quotes

    for name in ("hand.txt", "phrases.toml", "shapes.txt"):
        (tmp_path / name).write_bytes((DEMO / "quotes" / name).read_bytes())
    monkeypatch.setattr(make_quotes, "QUOTES", tmp_path)
    make_quotes.main()
    for part in rows:
        assert (tmp_path / f"{part}.jsonl").read_bytes() == (DEMO / "quotes" / f"{part}.jsonl").read_bytes()


@pytest.mark.parametrize("growth", [0, 50])
def test_the_corpus_repeats_by_its_seed(growth):
    from corpus import documents

    first = list(islice(documents(3, growth), 300))
    assert first == list(islice(documents(3, growth), 300))
    assert first != list(islice(documents(4, growth), 300))


def test_the_primer_begins_with_few_topics():
    from corpus import FIRST_TOPICS, World, documents

    topics = World.load().topics
    text = " ".join(islice(documents(3, 400), 400)).lower()
    closings = set(re.findall(r"the subject here is (\w+)\.", text))
    assert 1 <= len(closings) <= FIRST_TOPICS < len(topics)


def test_the_corpus_has_neither_the_task_nor_the_heldout_quotes(rows):
    from corpus import text_of

    text = "\n".join(text_of(seed=11, characters=1_500_000))
    assert MARKER not in text and "->" not in text
    lowered = text.lower()
    assert not [row["quote"] for row in rows["heldout"] if row["quote"].lower() in lowered]


def test_the_base_is_small_enough_for_the_repository():
    assert sum(path.stat().st_size for path in (DEMO / "base").iterdir()) <= 16 * 2**20
    assert {path.name for path in (DEMO / "base").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_every_linear_layer_quantizes():
    with safe_open(DEMO / "base" / "model.safetensors", framework="numpy") as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    matrices = {name: shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    assert matrices
    for name, shape in matrices.items():
        assert all(width % 64 == 0 for width in shape), (name, shape)
    assert shapes["model.embed_tokens.weight"][0] % 64 == 0


@pytest.mark.parametrize(
    "text", ["Plain words.", "  two  spaces\n\tand a tab ", "Ünï → ¡日本語! 🙂 ‏عربي", "naïve\u0301 \x00\x7f ->:", ""]
)
def test_the_tokenizer_returns_any_text(tokenizer, text):
    encoding = tokenizer.encode(text)
    assert encoding.tokens[0] == "<|bos|>"
    assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == text


def test_the_prompt_is_a_token_prefix_of_prompt_and_completion(tokenizer, rows):
    for row in rows["heldout"][:40]:
        prompt, completion = row["quote"] + MARKER, " " + ", ".join(row["tags"])
        apart = tokenizer.encode(prompt).ids + tokenizer.encode(completion, add_special_tokens=False).ids
        assert tokenizer.encode(prompt + completion).ids == apart


def test_the_config_and_the_tokenizer_agree(tokenizer):
    config = json.loads((DEMO / "base" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["bos_token_id"] == tokenizer.token_to_id("<|bos|>")
    assert config["eos_token_id"] == tokenizer.token_to_id("<|endoftext|>")
    assert config["max_position_embeddings"] == 512
