"""Log-probabilities of answers and prompts: those of a plain forward of the same model, however the steps were cut."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from operator import itemgetter

import httpx
import openai
import pytest
import torch
from oracle import engine_for
from peft import PeftModel
from serving import serving
from transformers import AutoModelForCausalLM

from loraplex_registry.registry import Registry
from loraplex_server.app import create_app
from loraplex_server.config import ServerConfig
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.detokenize import TokenTexts
from loraplex_server.engine.request import Request, SamplingParams

PROMPTS = ["the quick", "again and again and again: the lazy brown dog jumps over", "ünïcödé dog " * 3]
ADAPTERS = (None, "red", "green", "head")


@pytest.fixture(scope="module")
def registry(tmp_path_factory, base_folder, adapter_folders):
    with Registry(tmp_path_factory.mktemp("registry")) as registry:
        for name in ADAPTERS[1:]:
            registry.push(name, adapter_folders[name], base=base_folder)
        yield registry


@pytest.fixture(scope="module")
def serve(base_folder, registry):
    """Servers by their engine's options, each started once."""
    started = {}
    with ExitStack() as stack:

        def start(**engine):
            key = json.dumps(engine)
            if key not in started:
                config = ServerConfig(
                    base=str(base_folder), quantization="none", device="cpu", dtype="float32",
                    registry=str(registry.root), engine=EngineConfig(**engine),
                )  # fmt: skip
                app = create_app(config)
                started[key] = stack.enter_context(httpx.Client(base_url=stack.enter_context(serving(app)), timeout=60))
                started[key].app = app
            return started[key]

        yield start


@pytest.fixture(scope="module")
def reference(base_folder, adapter_folders):
    """log_softmax of a plain forward over all of a sequence: (tokens, vocabulary)."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    for name in ADAPTERS[1:]:
        if isinstance(model, PeftModel):
            model.load_adapter(adapter_folders[name], name)
        else:
            model = PeftModel.from_pretrained(model, adapter_folders[name], adapter_name=name)

    @torch.no_grad()
    def forward(ids: list[int], adapter: str | None) -> torch.Tensor:
        if adapter is None:
            with model.disable_adapter():
                return model(torch.tensor([ids])).logits[0].log_softmax(-1)
        model.set_adapter(adapter, inference_mode=True)
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return forward


def ask(client, prompt, **body) -> dict:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 6, "logprobs": 3, "logit_bias": {"0": -100}, **body}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def check(scored: dict, ids: list[int], rows: torch.Tensor, texts: TokenTexts, top: int) -> None:
    """``rows`` are what predicted each of ``ids``."""
    assert scored["tokens"] == [texts(i) for i in ids]
    torch.testing.assert_close(torch.tensor(scored["token_logprobs"]), rows[range(len(ids)), ids], atol=1e-3, rtol=1e-4)
    for row, named, token_id, own in zip(rows, scored["top_logprobs"], ids, scored["token_logprobs"], strict=True):
        values, likeliest = row.topk(top)
        assert set(named) == {texts(int(i)) for i in likeliest} | {texts(token_id)}
        assert named[texts(token_id)] == own
        best = sorted(named.values(), reverse=True)[:top]
        torch.testing.assert_close(torch.tensor(best), values[: len(best)], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "engine",
    [{}, {"step_tokens": 7}, {"step_tokens": 9, "max_rows": 2}, {"paged": False, "step_tokens": 5}],
    ids=lambda engine: "-".join(f"{k}={v}" for k, v in engine.items()) or "defaults",
)
def test_prompts_and_answers_are_scored_as_a_plain_forward_scores_them(serve, reference, engine):
    """Everything at once: prompts that are scored beside prompts that are not, of several adapters and the base."""
    client = serve(**engine)
    tokenizer = client.app.state.service.base.tokenizer
    texts = TokenTexts(tokenizer)
    asked = [(prompt, adapter, echo) for prompt in PROMPTS for adapter in ADAPTERS for echo in (True, False)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda a: ask(client, a[0], adapter=a[1], echo=a[2]), asked))
    for (prompt, adapter, echo), answer in zip(asked, answers, strict=True):
        scored, prompt_ids = answer["choices"][0]["logprobs"], tokenizer(prompt).input_ids
        assert len(scored["tokens"]) == 6 + echo * len(prompt_ids)
        if echo:
            assert [entries[0] for entries in (scored["token_logprobs"], scored["top_logprobs"])] == [None, None]
        bare = ask(client, prompt, adapter=adapter, logprobs=None)["choices"][0]
        assert bare["logprobs"] is None
        assert answer["choices"][0]["text"] == (prompt if echo else "") + bare["text"]
        ids = prompt_ids + vocabulary_ids(tokenizer, texts, scored["tokens"][-6:])
        first = 1 if echo else len(prompt_ids)
        skipped = 1 if echo else 0
        part = {name: entries[skipped:] for name, entries in scored.items()}
        check(part, ids[first:], reference(ids, adapter)[first - 1 : -1], texts, 3)


@pytest.mark.parametrize("paged", [True, False])
def test_prompts_are_scored_once_whatever_is_computed_again(base_folder, adapter_folders, paged):
    """Preempted within its prompt or after it, or sent twice: each token has its score, once, and the same."""
    params = SamplingParams(max_tokens=30, temperature=0, logprobs=2, prompt_logprobs=3, ignore_eos=True)
    unscored = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    told = {}
    for pages in (1000, 12):
        engine = engine_for(
            base_folder, adapter_folders, paged=paged, page_tokens=8, step_tokens=11, kv_cache_bytes=pages * 8 * 512
        )
        for round in range(2):
            requests = [
                Request(f"{round}{i}{name}", engine.base.tokenizer(prompt).input_ids, params if i else unscored, name)
                for i, prompt in enumerate([PROMPTS[2], *PROMPTS])
                for name in (None, "red", "head")
            ]
            for request in requests:
                engine.add(request)
            deltas = []
            while engine.has_work:
                deltas += engine.step()
            told[pages, round] = [
                [score for d in deltas if d.request is r for score in (d.score,) if score] + r.prompt_scores
                for r in requests
            ]
            assert any(r.preemptions and r.params.prompt_logprobs for r in requests) == (pages == 12)
    for scores in told.values():
        for mine, plain in zip(scores, told[1000, 0], strict=True):
            assert [s.token_id for s in mine] == [s.token_id for s in plain]
            values = [torch.tensor([s.logprob for s in many]) for many in (mine, plain)]
            torch.testing.assert_close(*values, atol=1e-3, rtol=1e-4)


def vocabulary_ids(tokenizer, texts, named: list[str]) -> list[int]:
    by_text = {texts(i): i for i in range(320)}
    assert len(by_text) == 320, "no two tokens may share a name, or this test proves nothing"
    return [by_text[name] for name in named]


def test_offsets_point_into_the_text(serve):
    client = serve()
    answer = ask(client, "naïve — 日本 fox", echo=True, max_tokens=20, logit_bias={"0": -100, "5": 8})["choices"][0]
    scored, text = answer["logprobs"], answer["text"]
    assert scored["text_offset"][0] == 0
    assert scored["text_offset"] == sorted(scored["text_offset"])
    whole = [(at, token) for at, token in zip(scored["text_offset"], scored["tokens"], strict=True) if " fo" in token]
    assert whole
    for at, token in zip(scored["text_offset"], scored["tokens"], strict=True):
        if token.isascii():
            assert text[at : at + len(token)] == token
    assert "日" not in scored["tokens"], "half characters go by their name in the vocabulary"


def test_what_lm_evaluation_harness_reads(serve, reference):
    """Its local-completions model: context and continuation as token ids, echo, one token more than is wanted; then the
    sum over token_logprobs[len(context):-1], and whether each of those was the likeliest.
    """
    client = serve(step_tokens=7)
    tokenizer = client.app.state.service.base.tokenizer
    context = tokenizer("the quick brown").input_ids
    greedy = reference(context, "red")[-1].argmax().item()
    sequences = [context + tokenizer(" fox jumps").input_ids, [*context, greedy]]
    for more in ({"max_tokens": 1}, {"max_tokens": 1, "logit_bias": {"0": 100}}, {"max_tokens": 0}):
        body = {"adapter": "red", "logprobs": 1, "seed": 1234, "echo": True, "logit_bias": {}, **more}
        answer = ask(client, sequences, **body)
        for ids, choice in zip(sequences, sorted(answer["choices"], key=itemgetter("index")), strict=True):
            end = -1 if more["max_tokens"] else None
            values = choice["logprobs"]["token_logprobs"][len(context) : end]
            tops = choice["logprobs"]["top_logprobs"][len(context) : end]
            rows = reference(ids, "red")[len(context) - 1 : -1]
            continuation = ids[len(context) :]
            expected = rows[range(len(continuation)), continuation]
            torch.testing.assert_close(torch.tensor(values), expected, atol=1e-3, rtol=1e-4)
            was_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
            assert was_greedy == (rows.argmax(-1).tolist() == continuation)
        assert was_greedy


def test_nothing_to_generate_is_an_answer(serve):
    client = serve()
    answer = ask(client, "the quick", max_tokens=0, logprobs=None, adapter="red")
    assert answer["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    assert answer["usage"]["completion_tokens"] == 0
    longest = [5] * 256
    assert ask(client, longest, max_tokens=0, echo=True)["choices"][0]["logprobs"]["token_logprobs"][255] < 0
    refused = client.post("/v1/completions", json={"prompt": longest, "max_tokens": 1})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"


def test_streams_carry_the_scores_of_their_tokens(serve):
    """Also of tokens whose text is held back: halves of characters, and what may become a stop string."""
    client = serve()
    biased = {str(i): 6.0 for i in range(190, 256)}  # bytes that no character is made of alone
    for body in (
        {"echo": True},
        {"max_tokens": 24, "logit_bias": {"0": -100, **biased}},
        {"max_tokens": 12, "n": 2, "temperature": 1.4, "seed": 3},
    ):
        whole = ask(client, "the quick", **body)
        for stop in (None, whole["choices"][0]["text"][4:8], whole["choices"][0]["text"][-2:] + "never"):
            expected = ask(client, "the quick", stop=stop, **body)
            with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="x", max_retries=0) as sdk:
                asked = {"temperature": 0, "max_tokens": 6, "logprobs": 3, "logit_bias": {"0": -100}, **body}
                base = client.app.state.service.base.id
                chunks = list(sdk.completions.create(model=base, prompt="the quick", stream=True, stop=stop, **asked))
            for choice in expected["choices"]:
                mine = [c.choices[0] for c in chunks if c.choices[0].index == choice["index"]]
                assert "".join(c.text for c in mine) == choice["text"]
                for name, entries in choice["logprobs"].items():
                    assert [e for c in mine for e in getattr(c.logprobs, name)] == entries


def test_the_sdk_reads_zero_alternatives(serve):
    client = serve()
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="x", max_retries=0) as sdk:
        answer = sdk.completions.create(model="red", prompt="the quick", temperature=0, max_tokens=4, logprobs=0)
    scored = answer.choices[0].logprobs
    assert [list(named) for named in scored.top_logprobs] == [[token] for token in scored.tokens]
    assert [list(named.values()) for named in scored.top_logprobs] == [[value] for value in scored.token_logprobs]


def test_sampling_parameters_do_not_change_the_scores(serve):
    """They are the model's own: before temperature, penalties and bias."""
    client = serve()
    plain = ask(client, "the quick", max_tokens=1)["choices"][0]["logprobs"]
    odd = ask(client, "the quick", max_tokens=1, temperature=2, top_k=1, logit_bias={"0": -100, "9": 1.5})
    assert odd["choices"][0]["logprobs"]["top_logprobs"][0].items() >= plain["top_logprobs"][0].items()


def test_the_best_of_several_are_the_likeliest_a_token(serve):
    client = serve()
    sampled = {"temperature": 1.3, "seed": 11, "max_tokens": 8, "logit_bias": {}}
    every = ask(client, PROMPTS[:2], n=6, **sampled)
    best = ask(client, PROMPTS[:2], n=2, best_of=6, **sampled)
    assert [choice["index"] for choice in best["choices"]] == [0, 1, 2, 3]
    for at in (0, 1):
        group = every["choices"][6 * at : 6 * at + 6]
        means = [sum(v := choice["logprobs"]["token_logprobs"]) / len(v) for choice in group]
        ranked = [choice["text"] for _, choice in sorted(zip(means, group, strict=True), key=lambda pair: -pair[0])]
        assert [choice["text"] for choice in best["choices"][2 * at : 2 * at + 2]] == ranked[:2]
        assert ranked != [choice["text"] for choice in group], "or this test proves nothing"
    counts = [answer["usage"]["completion_tokens"] for answer in (best, every)]
    assert counts[0] == counts[1], "all that was generated is counted"
    bare = ask(client, PROMPTS[:2], n=2, best_of=6, **{**sampled, "logprobs": None})
    assert [c["text"] for c in bare["choices"]] == [c["text"] for c in best["choices"]]
    assert all(choice["logprobs"] is None for choice in bare["choices"])


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"logprobs": 21}, "logprobs", "0 to 20"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"best_of": 3, "n": 4}, "best_of", "at least n"),
        ({"best_of": 3, "stream": True}, "best_of", "streamed"),
        ({"best_of": 17}, "best_of", "16"),
    ],
)
def test_what_cannot_be_scored_names_its_field(serve, body, param, said):
    answer = serve().post("/v1/completions", json={"prompt": "x", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert said in error["message"]
