"""From a line of jsonl to token ids and the places where the loss is."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from loraplex_server.engine.rendering import fill
from loraplex_trainer.data import IGNORED, encode_split, epoch_order, make_batch, read_split
from loraplex_trainer.data_keys import DataSection
from loraplex_trainer.encoding import Encoder
from loraplex_trainer.errors import DataError
from loraplex_trainer.forms import Sample

PROMPT, COMPLETION = "river of stone ->:", " river, stone"
EOS = 1


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


def encoder(tokenizer, **data):
    data = {"train": Path("unused"), "prompt": "{quote} ->:", "completion": " {tags}", "max_tokens": 128} | data
    return Encoder(tokenizer, frozenset({EOS}), EOS, DataSection(**data))


def encode(prompt, completion, tokenizer, **data):
    (example,) = encoder(tokenizer, **data).encode(Sample("here", (("prompt", prompt), ("completion", completion))))
    return example


def labels_of(example):
    """The label at each position that predicts the token after it."""
    batch = make_batch([example], pad_id=EOS)
    ids = [*batch.input_ids[0].tolist(), example.ids[-1]]
    padding = [IGNORED] * (len(ids) - 1 - batch.answer_positions)
    return ids, padding + batch.labels[0].tolist()


def test_the_loss_is_on_the_completion_and_eos_and_on_nothing_before(tokenizer):
    example = encode(PROMPT, COMPLETION, tokenizer)
    ids, labels = labels_of(example)
    labelled = [label for label in labels if label != IGNORED]
    assert tokenizer.decode(labelled) == COMPLETION + "</s>"
    assert labels == [IGNORED] * (len(labels) - len(labelled)) + labelled
    assert ids[-len(labelled) :] == labelled


def test_eos_is_trained_though_pad_is_eos(tokenizer):
    """Labels made by `ids == pad_id` lose the EOS when pad is EOS, and the adapter never stops (trl#1623)."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    short, long = (encode(PROMPT, text, tokenizer) for text in (" a", COMPLETION))
    batch = make_batch([short, long], pad_id=EOS)
    for row, example in enumerate((short, long)):
        labelled = [label for label in batch.labels[row].tolist() if label != IGNORED]
        assert labelled == list(example.ids[example.answer_start :]) and labelled[-1] == EOS


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_prompt_has_the_ids_that_the_server_feeds(tokenizer, base_folder, adds_bos):
    """With BOS where the tokenizer puts one by default and without where it does not: the server asks the same way."""
    from tokenizers.processors import TemplateProcessing

    mine = AutoTokenizer.from_pretrained(base_folder)
    if adds_bos:
        mine.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    example = encode(PROMPT, COMPLETION, mine)
    assert list(example.ids[: example.answer_start]) == mine(PROMPT).input_ids
    assert (example.ids[0] == 0) is adds_bos
    assert example.ids.count(0) == int(adds_bos)


def test_a_merge_across_the_boundary_does_not_move_it(tokenizer):
    """`riv` + `er` merge to one token when tokenized together: the prompt keeps the ids it has alone."""
    assert tokenizer("river").input_ids[: len(tokenizer("riv").input_ids)] != tokenizer("riv").input_ids
    example = encode("riv", "er", tokenizer)
    assert list(example.ids[: example.answer_start]) == tokenizer("riv").input_ids
    assert tokenizer.decode(example.ids[example.answer_start :]) == "er</s>"


def test_padding_changes_no_loss_and_unneeded_positions_are_not_made(tokenizer):
    short, long = (encode(prompt, COMPLETION, tokenizer) for prompt in ("stone ->:", PROMPT * 2))
    batch = make_batch([short, long], pad_id=EOS)
    assert batch.input_ids.shape == (2, len(long.ids) - 1)
    assert batch.answer_positions == len(long.ids) - short.answer_start
    assert batch.tokens == len(short.ids) + len(long.ids)


def test_a_list_is_joined_and_text_is_kept():
    assert fill("{quote} ->: {tags}{n}", {"quote": "a {b}", "tags": ["x", "y"], "n": 3}) == "a {b} ->: x, y3"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"quote": "a", "tags": []}', "{oops"], ["data.jsonl:2", "not JSON"]),
        (["", "[1]"], ["data.jsonl:2", "an object is expected|a JSON object is expected"]),
        (['{"qoute": "a", "tags": "b"}'], ["data.jsonl:1", "no column 'quote'", "'qoute'"]),
        (['{"quote": null, "tags": "b"}'], ["data.jsonl:1", "'quote' is null"]),
        (['{"quote": "a", "tags": NaN}'], ["data.jsonl:1", "'tags' is NaN", "text, a number, a date or a list"]),
        (['{"quote": "a", "tags": ["b", null]}'], ["data.jsonl:1", "'tags' is [\"b\", null]"]),
        (['{"quote": "a", "tags": [["b"]]}'], ["data.jsonl:1", "'tags' is [[\"b\"]]"]),
        (['{"quote": "a", "tags": [{"b": 1}]}'], ["data.jsonl:1", "'tags' is [{"]),
        ([r'{"quote": "a\ud83d", "tags": "b"}'], ["data.jsonl:1", "'quote' has '\\ud83d'", "not Unicode text"]),
        ([], ["no examples"]),
        (['{"quote": "a", "tags": []}', '{"quote": "b", "tags": ""}'], ["empty completion in every row"]),
    ],
)
def test_bad_data_is_named_by_file_and_line(tmp_path, lines, words):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as refused:
        read_split(path, DataSection(train=path, prompt="{quote} ->:", completion=" {tags}"))
    assert all(any(option in str(refused.value) for option in word.split("|")) for word in words), refused.value


@pytest.mark.parametrize("prompt", ["{quote", "{quote!r}", "{quote:>9}"])
def test_a_template_is_columns_and_text_only(prompt, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"quote": "a", "completion": "b"}')
    with pytest.raises(DataError, match="template"):
        read_split(path, DataSection(train=path, prompt=prompt))


def split_of(tmp_path, quotes):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"quote": quote, "tags": "river"}) + "\n" for quote in quotes))
    return read_split(path, DataSection(train=path, prompt="{quote} ->:", completion=" {tags}"))


def test_long_prompts_lose_their_front_and_keep_answer_and_eos(tmp_path, tokenizer):
    split = split_of(tmp_path, ["stone", "stone " * 40])
    encoded = encode_split(split, encoder(tokenizer, max_tokens=16))
    assert (len(encoded.examples), encoded.truncated, encoded.dropped) == (2, 1, 0)
    cut = encoded.examples[1]
    assert len(cut.ids) == 16
    assert tokenizer.decode(cut.ids[cut.answer_start :]) == " river</s>"
    assert tokenizer.decode(cut.ids[: cut.answer_start]).endswith("stone  ->:")


def test_an_answer_without_room_is_dropped_and_counted(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"quote": "stone", "tags": tags}) + "\n" for tags in ("river", "river " * 40)))
    split = read_split(path, DataSection(train=path, prompt="{quote} ->:", completion=" {tags}"))
    encoded = encode_split(split, encoder(tokenizer, max_tokens=16))
    assert (len(encoded.examples), encoded.truncated, encoded.dropped) == (1, 0, 1)
    with pytest.raises(DataError, match=r"every example.*data\.max_tokens = 16"):
        encode_split(replace(split, samples=split.samples[1:]), encoder(tokenizer, max_tokens=16))


def test_every_example_comes_once_an_epoch_in_another_order_each_time():
    lengths = torch.randint(5, 60, (103,), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = (epoch_order(lengths, 8, seed=1, epoch=epoch) for epoch in (0, 1))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(103))
    assert first != second and first == epoch_order(lengths, 8, seed=1, epoch=0)


def test_like_lengths_share_a_step():
    """Without bucketing a third of the computed positions of a mixed set are padding."""
    lengths = torch.randint(5, 60, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    steps = epoch_order(lengths, 16, seed=1, epoch=0)
    computed = sum(max(lengths[i] for i in step) * len(step) for step in steps)
    assert sum(lengths) / computed > 0.9
