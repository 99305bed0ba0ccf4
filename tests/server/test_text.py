"""Text as it comes: whole characters, stop strings across tokens, and the odds of sampling."""

import pytest
import torch
from transformers import AutoTokenizer

from loraplex_server.engine.detokenize import Detokenizer
from loraplex_server.engine.errors import InvalidRequest
from loraplex_server.engine.request import Request, SamplingParams
from loraplex_server.engine.sampler import Sampler


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


def feed(tokenizer, text, stop=(), prompt="the quick") -> tuple[list[str], Detokenizer]:
    ids = tokenizer(text).input_ids
    detokenizer = Detokenizer(tokenizer, tokenizer(prompt).input_ids, stop)
    return [detokenizer.add((i,), final=n == len(ids) - 1) for n, i in enumerate(ids)], detokenizer


@pytest.mark.parametrize("text", [" brown fox", "naïve — 日本語 🦊🦊 end", "日", "a\n\nb", "  two  spaces "])
def test_pieces_join_to_the_text_and_never_hold_half_a_character(tokenizer, text):
    pieces, detokenizer = feed(tokenizer, text)
    assert "".join(pieces) == text == detokenizer.text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 1


def test_a_broken_character_at_the_very_end_is_shown_as_such(tokenizer):
    ids = tokenizer("日").input_ids[:-1]
    detokenizer = Detokenizer(tokenizer, tokenizer("x").input_ids)
    assert [detokenizer.add((i,), final=i == ids[-1]) for i in ids] == ["", "\ufffd"]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("fox",), "quick brown "),
        (("brown fox j",), "quick "),
        (("k b", "q"), ""),
        (("zebra",), "quick brown fox jumps"),
    ],
)
def test_stop_strings_across_tokens_are_cut_and_nothing_of_them_leaks(tokenizer, stop, expected):
    pieces, detokenizer = feed(tokenizer, "quick brown fox jumps", stop)
    assert "".join(pieces) == expected
    assert detokenizer.stopped == (expected != "quick brown fox jumps")
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert expected.startswith(so_far), "what was handed out can never be taken back"


def draw(logits, times=2000, **params) -> torch.Tensor:
    sampler = Sampler()
    request = Request("r", [1], SamplingParams(**{"seed": 3, **params}))
    drawn = [sampler.sample([request], torch.tensor([logits]))[0] for _ in range(times)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / times


def test_sampling_follows_the_probabilities_and_its_limits():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    torch.testing.assert_close(draw(logits), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.04, rtol=0)
    assert draw(logits, temperature=0).tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(draw(logits, top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.04, rtol=0)
    torch.testing.assert_close(draw(logits, top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.04, rtol=0)
    assert draw(logits, min_p=0.4)[2:].tolist() == [0, 0]
    assert draw(logits, logit_bias={3: 100}, temperature=0).tolist() == [0, 0, 0, 1]


def test_penalties_count_what_was_generated():
    request = Request("r", [0], SamplingParams(temperature=0, frequency_penalty=1.0), output_ids=[0, 0])
    assert Sampler().sample([request], torch.tensor([[1.9, 0.0]])) == [1]
    request.output_ids = [0]
    assert Sampler().sample([request], torch.tensor([[1.9, 0.0]])) == [0]
    present = Request("r", [0], SamplingParams(temperature=0, presence_penalty=2.0), output_ids=[0])
    assert Sampler().sample([present], torch.tensor([[1.9, 0.0]])) == [1]


@pytest.mark.parametrize(("name", "value"), [("temperature", float("nan")), ("max_tokens", -1), ("top_k", -1)])
def test_parameters_out_of_range_name_themselves(name, value):
    with pytest.raises(InvalidRequest, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name
