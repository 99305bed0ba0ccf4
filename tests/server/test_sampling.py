"""The next token: penalties as transformers defines them, ends that are held off, and rows that do not disturb rows."""

import pytest
import torch
from tiny import EOS
from transformers import AutoModelForCausalLM

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.errors import BrokenLogits
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import Request, SamplingParams
from loraplex_server.engine.sampler import BROKEN, Sampler

PROMPT = "again and again and again: the lazy dog"
VOCABULARY = 5000


@pytest.fixture(scope="module")
def engine(base_folder, adapter_folders):
    engine = Engine(load_base(str(base_folder), quantization="none", device="cpu", dtype="float32"))
    engine.add_adapter("red", adapter_folders["red"])
    return engine


def ids(engine, adapter=None, **params) -> list[int]:
    return engine.generate([PROMPT], SamplingParams(**{"temperature": 0, **params}), adapter)[0].token_ids


def test_repetition_penalty_is_that_of_transformers(engine, base_folder):
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    prompt = torch.tensor([engine.base.tokenizer(PROMPT).input_ids])
    for penalty in (1.3, 0.7):
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, min_new_tokens=20, do_sample=False,
            repetition_penalty=penalty, pad_token_id=1,
        )  # fmt: skip
        expected = out[0, prompt.shape[1] :].tolist()
        assert ids(engine, max_tokens=20, min_tokens=20, repetition_penalty=penalty) == expected
        assert expected != ids(engine, max_tokens=20, min_tokens=20), "it must change the answer"


def test_the_end_can_be_held_off(engine):
    ends = {EOS: 100.0}
    assert ids(engine, max_tokens=9, logit_bias=ends) == []
    assert len(ids(engine, max_tokens=9, min_tokens=4, logit_bias=ends)) == 4
    assert ids(engine, max_tokens=9, ignore_eos=True, logit_bias=ends) == [EOS] * 9
    plain = ids(engine, max_tokens=9, logit_bias={EOS: -100})
    held = ids(engine, max_tokens=9, min_tokens=4, stop_token_ids=(plain[2],), logit_bias={EOS: -100})
    assert plain[2] not in held[:4]
    text = engine.generate([PROMPT], SamplingParams(max_tokens=9, temperature=0, logit_bias={EOS: -100}))[0].text
    for min_tokens, expected in ((0, ""), (9, text)):
        params = SamplingParams(
            max_tokens=9, temperature=0, logit_bias={EOS: -100}, stop=(text[0],), min_tokens=min_tokens
        )
        assert engine.generate([PROMPT], params)[0].text == expected


KINDS = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.4},
    {"temperature": 0, "frequency_penalty": 1.0, "presence_penalty": -0.5, "logit_bias": {7: 3.0}},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2, "top_k": 40},
    {"temperature": 1.3, "seed": 3, "top_p": 0.9},
    {"temperature": 5e-2, "seed": 4, "min_p": 0.2},
    {"temperature": 2.0, "seed": 5, "top_p": 0.999, "min_p": 1e-6},  # more than are put in order at first
    {"temperature": 1.0, "seed": 6, "top_k": 50, "top_p": 0.5, "min_tokens": 3, "stop_token_ids": (4,)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_together_give_what_each_gives_alone(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(3 * len(KINDS), VOCABULARY) * 3).to(dtype)
    before = logits.clone()

    def requests() -> list[Request]:
        return [
            Request(f"r{i}", [5, 6, 7], SamplingParams(**KINDS[i % len(KINDS)]), output_ids=[7, 9, 9][: i % 4])
            for i in range(len(logits))
        ]

    together, alone = Sampler([EOS]), Sampler([EOS])
    for _ in range(3):
        drawn = together.sample(requests(), logits)
        assert drawn == [alone.sample([request], logits[i : i + 1])[0] for i, request in enumerate(requests())]
    assert torch.equal(logits, before), "scores are taken from them afterwards"
    assert drawn[0] == int(logits[0].float().argmax())
    assert len(set(drawn)) > len(KINDS)


def test_the_tail_is_cut_where_a_whole_sort_cuts_it():
    """Only the first thousand tokens are put in order where those are enough; here they are not."""
    torch.manual_seed(0)
    flat = torch.randn(1, VOCABULARY) / 10
    ordered, order = flat[0].softmax(-1).sort(descending=True)
    kept = set(order[ordered.cumsum(-1) - ordered < 0.5].tolist())
    assert len(kept) > 1100
    sampler, request = Sampler(), Request("r", [1], SamplingParams(seed=1, top_p=0.5))
    drawn = {sampler.sample([request], flat)[0] for _ in range(3000)}
    assert drawn <= kept
    assert drawn & set(order[1100 : len(kept)].tolist())


def test_a_row_whose_numbers_overflowed_fails_alone(engine, monkeypatch):
    """float16 overflows in a layer, and what comes out is no number: the request fails, its neighbours go on."""
    assert Sampler().sample([Request("r", [1], SamplingParams())], torch.full((1, 9), torch.nan)) == [BROKEN]
    forward = engine._runner.forward

    def overflowing(model, batch):
        logits = forward(model, batch)
        for i, row in zip(batch.sampled_from, (row for row in batch.rows if row.samples), strict=True):
            if row.request.id == "bad":
                logits[i] = torch.nan
        return logits

    expected = ids(engine, max_tokens=8)
    monkeypatch.setattr(engine._runner, "forward", overflowing)
    prompt = engine.base.tokenizer(PROMPT).input_ids
    greedy = SamplingParams(max_tokens=8, temperature=0)
    requests = [Request(name, prompt, params) for name, params in (
        ("good", greedy), ("bad", SamplingParams(max_tokens=8, logprobs=2)), ("seeded", SamplingParams(seed=1)),
    )]  # fmt: skip
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    good, bad, seeded = requests
    assert good.output_ids == expected
    assert isinstance(bad.error, BrokenLogits)
    assert seeded.error is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("repetition_penalty", 0), ("repetition_penalty", float("nan")), ("min_tokens", 17), ("logprobs", 21)],
)
def test_values_out_of_range_name_themselves(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name
