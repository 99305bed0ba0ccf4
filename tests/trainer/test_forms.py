"""Conversations, Alpaca's rows, `<usr>`/`<bot>` text and raw text: what is fed, what has a label, what is cut."""

import json

import pytest

from loraplex_server.engine.chat_templates import NAMES
from loraplex_server.engine.model import load_base
from loraplex_server.engine.rendering import chat_ids, chat_text
from loraplex_trainer.data import encode_split, make_batch, read_split
from loraplex_trainer.data_keys import DataSection
from loraplex_trainer.encoding import encoder_for
from loraplex_trainer.errors import DataError

EOS = 1
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "river?"},
    {"role": "assistant", "content": "stone"},
    {"role": "user", "content": "lantern?"},
    {"role": "assistant", "content": "harbor winter"},
]
# Ends a turn in a marker that is no token; and one that forgets what was thought before (as Qwen3's does).
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FORGETS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ m['content'] if loop.last else m['content'].split('#')[-1] }}{{ eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SAYS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ENDLESS = (
    "{% for m in messages %}{{ '\n' + m['role'] + ': ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(str(base_folder), quantization="none", device="cpu", dtype="float32")


@pytest.fixture
def made(base, tmp_path):
    """The encoder and the examples that rows give."""

    def make(rows, **data):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if "\n" in data.get("chat_template", "") or "{" in data.get("chat_template", ""):
            (tmp_path / "chat.jinja").write_text(data["chat_template"])
            data["chat_template"] = str(tmp_path / "chat.jinja")
        section = DataSection(train=path, **{"max_tokens": 250, **data})
        encoder = encoder_for(base, section)
        return encoder, encode_split(read_split(path, section), encoder)

    return make


def labelled(example, tokenizer):
    """What the loss is on: the text of each span."""
    return [tokenizer.decode(example.ids[start:stop]) for start, stop in example.trained]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama3"])
def test_each_trained_turn_follows_the_ids_that_the_server_feeds(made, base, name):
    """For every turn: the prompt is the template's own rendering of what came before, and EOS or a marker ends it."""
    encoder, encoded = made([{"messages": CHAT}], form="messages", chat_template=name)
    (example,) = encoded.examples
    assert len(example.trained) == 2
    for (start, _), asked in zip(example.trained, (CHAT[:2], CHAT[:4]), strict=True):
        assert list(example.ids[:start]) == chat_ids(base.tokenizer, encoder.chat_template, asked, True)
    whole = chat_ids(base.tokenizer, encoder.chat_template, CHAT, False)
    assert list(example.ids[:-1]) == whole[: len(example.ids) - 1]  # and EOS
    assert example.ids[-1] == EOS and example.trained[-1][1] == len(example.ids)
    first, last = labelled(example, base.tokenizer)
    end = "<|im_end|>" if name == "chatml" else "</s>"
    assert first.strip() in (f"stone{end}", f"stone {end}")
    assert last.replace("<|im_end|></s>", end).strip() in (f"harbor winter{end}", f"harbor winter {end}")


def test_the_labels_are_the_spans_and_nothing_else(made, base):
    _, encoded = made([{"messages": CHAT}], form="messages", chat_template="zephyr")
    (example,) = encoded.examples
    batch = make_batch([example], pad_id=EOS)
    labels = [-100] * (len(example.ids) - 1 - batch.answer_positions) + batch.labels[0].tolist()
    expected = [
        example.ids[at] if any(a <= at < b for a, b in example.trained) else -100 for at in range(1, len(example.ids))
    ]
    assert labels == expected
    assert sum(label == EOS for label in labels) == 2  # of both answers, though the user's turns end in EOS too


def test_the_tokenizers_own_template_is_used_and_kept_for_the_server(made, base, monkeypatch):
    monkeypatch.setattr(base.tokenizer, "chat_template", MARKED)
    encoder, encoded = made([{"messages": CHAT}], form="messages")
    assert encoder.template == {"form": "messages", "chat": MARKED, "stop": ["<|end|>"]}
    assert labelled(encoded.examples[0], base.tokenizer) == ["stone<|end|>", "harbor winter<|end|></s>"]


def test_without_any_template_the_names_are_told(made):
    with pytest.raises(DataError, match=r"data\.chat_template.*alpaca, chatml.*zephyr"):
        made([{"messages": CHAT}], form="messages")


def test_a_template_that_writes_the_past_anew_makes_an_example_a_turn(made, base):
    """What is served is the past as it is written then: with one example, the second prompt would be another one."""
    chat = [{**one, "content": f"thought#{one['content']}"} if one["role"] == "assistant" else one for one in CHAT]
    encoder, encoded = made([{"messages": chat}], form="messages", chat_template=FORGETS)
    assert [labelled(example, base.tokenizer) for example in encoded.examples] == [
        ["thought#stone</s>"],
        ["thought#harbor winter</s>"],
    ]
    for example, asked in zip(encoded.examples, (chat[:2], chat[:4]), strict=True):
        prompt = chat_ids(base.tokenizer, encoder.chat_template, asked, True)
        assert list(example.ids[: example.answer_start]) == prompt


def test_a_template_without_an_end_of_turn_gets_eos_after_each_answer(made, base):
    encoder, encoded = made([{"messages": CHAT}], form="messages", chat_template=ENDLESS)
    assert encoder.turn_end == "" and encoder.template["stop"] == []
    assert [labelled(example, base.tokenizer) for example in encoded.examples] == [
        [" stone</s>"],
        [" harbor winter</s>"],
    ]


@pytest.mark.parametrize(
    ("loss_on", "texts"),
    [
        (["user"], ["<|user|>river?<|end|>", "<|user|>lantern?<|end|></s>"]),
        (["system", "assistant"], ["|system|>be brief<|end|>", "stone<|end|>", "harbor winter<|end|></s>"]),
    ],
)
def test_the_loss_is_on_chosen_roles(made, base, loss_on, texts):
    _, encoded = made([{"messages": CHAT}], form="messages", chat_template=MARKED, loss_on=tuple(loss_on))
    (example,) = encoded.examples
    assert [text.strip() for text in labelled(example, base.tokenizer)] == texts


def test_the_loss_on_all_is_on_everything_but_the_first_token(made, base):
    for rows, data in (
        ([{"messages": CHAT}], {"form": "messages", "chat_template": "chatml"}),
        ([{"prompt": "river ->:", "completion": " stone"}], {}),
    ):
        _, encoded = made(rows, loss_on="all", **data)
        (example,) = encoded.examples
        assert example.answer_tokens == len(example.ids) - 1 and example.ids[-1] == EOS


def test_a_control_token_in_a_message_is_text(made, base):
    """Else who writes `</s>` into a message ends a turn, in training and when served."""
    chat = [{"role": "user", "content": "river </s><s> stone"}, {"role": "assistant", "content": "the token"}]
    _, encoded = made([{"messages": chat}], form="messages", chat_template="zephyr")
    (example,) = encoded.examples
    assert [at for at, token in enumerate(example.ids) if token == EOS] == [
        at - 1 for at in (example.answer_start - len(base.tokenizer("\n<|assistant|>\n").input_ids), len(example.ids))
    ]
    assert "river </s><s> stone" in base.tokenizer.decode(example.ids)


def test_sharegpt_parts_and_developers_are_read_as_the_same_conversation(made):
    plain = [{"role": "user", "content": "river?"}, {"role": "assistant", "content": "stone"}]
    shared = [{"from": "human", "value": "river?"}, {"from": "gpt", "value": "stone"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "ri"}, {"type": "text", "text": "ver?"}]}, plain[1]]
    first, *others = (
        made([row], form="messages", chat_template="chatml")[1].examples
        for row in ({"messages": plain}, {"conversations": shared}, {"messages": parts})
    )
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("form", "row", "words"),
    [
        ("messages", {"mesages": CHAT}, ["rows.jsonl:1", "no column 'messages'", "'mesages'"]),
        ("messages", {"messages": "hi"}, ["messages", '"hi"', "a list"]),
        ("messages", {"messages": []}, ["messages", "at least one"]),
        ("messages", {"messages": [{"role": "usr", "content": "a"}]}, ["messages[0]", '"usr"', "user, assistant"]),
        ("messages", {"messages": [{"role": "user"}]}, ["messages[0]", "null", "text"]),
        ("messages", {"messages": [{"role": "tool", "content": "1"}]}, ["messages[0]", "tool"]),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, ["messages[0]", "not text"]),
        ("messages", {"messages": CHAT[:2]}, ["rows.jsonl", "assistant", "no loss is left"]),
        (
            "messages",
            {"messages": [{"role": "user", "content": "broken \ud83d emoji"}]},
            ["rows.jsonl:1: messages[0] has '\\ud83d' at character 7", "not Unicode text"],
        ),
        ("alpaca", {"instruction": "a", "ouput": "b"}, ["no column 'output'", "'ouput'"]),
        ("alpaca", {"instruction": "a", "input": "", "output": " "}, ["no loss is left"]),
        ("usr_bot", {"text": "no marks"}, ["rows.jsonl:1", "<usr>", "'no marks'"]),
        ("usr_bot", {"text": "<usr> only a question"}, ["no loss is left"]),
        ("text", {"txt": "a"}, ["no column 'text'", "'txt'"]),
        ("text", {"text": "  "}, ["no loss is left"]),
    ],
)  # fmt: skip
def test_rows_of_another_shape_are_named(made, form, row, words):
    template = {} if form == "text" else {"chat_template": "chatml"}
    with pytest.raises(DataError) as refused:
        made([row], form=form, **template)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (f"{SAYS}{{{{ 'assistant: ' if add_generation_prompt }}}}", "must not end in a space"),
        ("{{ messages[0]['content'] }}", "leaves out what the assistant says"),
        ("{% for m in messages %}{{ m['content'] }}", "does not take these messages"),
        ("{{ raise_exception('only poems') }}{{ messages }}", "only poems"),
        (
            "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<assistant><think>' }}{% endif %}",
            "which is not in the conversation",
        ),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_trained_with_is_refused(made, template, words):
    with pytest.raises(DataError, match=words):
        made([{"messages": CHAT[1:]}], form="messages", chat_template=template)


def test_alpaca_rows_are_asked_in_alpacas_words(made, base):
    rows = [
        {"instruction": "Name a river.", "input": "", "output": "Rhine"},
        {"instruction": "Name it.", "input": "a stone", "output": "granite"},
    ]
    _, encoded = made(rows, form="alpaca")
    texts = [base.tokenizer.decode(example.ids) for example in encoded.examples]
    assert texts == [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a river.\n\n### Response:\nRhine</s>",
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nName it.\n\n### Input:\na stone\n\n### Response:\ngranite</s>",
    ]
    assert [labelled(example, base.tokenizer) for example in encoded.examples] == [["Rhine</s>"], ["granite</s>"]]
    _, encoded = made(rows, form="alpaca", chat_template="zephyr")
    assert "<|user|>\nName it.\n\na stone</s>" in base.tokenizer.decode(encoded.examples[1].ids)


def test_usr_and_bot_are_turns_and_the_loss_is_on_bot(made, base):
    text = "<usr> 강은 무엇인가요?\n<bot> 강은 물입니다.\n<usr> 돌은?<bot>돌은 단단합니다."
    encoder, encoded = made([{"text": text}], form="usr_bot")
    (example,) = encoded.examples
    assert labelled(example, base.tokenizer) == [" 강은 물입니다.</s>", " 돌은 단단합니다.</s>"]
    asked = [{"role": "user", "content": "강은 무엇인가요?"}]
    assert chat_text(base.tokenizer, encoder.chat_template, asked, True) == "<usr> 강은 무엇인가요?\n<bot>"
    assert list(example.ids[: example.answer_start]) == chat_ids(base.tokenizer, encoder.chat_template, asked, True)


def test_raw_text_is_trained_whole_and_split_without_loss(made, base):
    words = " ".join(["river", "stone", "lantern"] * 20)
    _, encoded = made([{"text": words}], form="text")
    assert labelled(encoded.examples[0], base.tokenizer) == [
        words.removeprefix(base.tokenizer.decode(encoded.examples[0].ids[:1])) + "</s>"
    ]
    _, parts = made([{"text": words}], form="text", max_tokens=16)
    assert all(len(part.ids) <= 16 for part in parts.examples) and len(parts.examples) > 3
    assert parts.answer_tokens == encoded.answer_tokens and (parts.truncated, parts.dropped) == (0, 0)


LONG = [
    {"prompt": "river stone ->:", "completion": " lantern"},
    {"prompt": "river stone " * 9 + "->:", "completion": " harbor"},
]


class TestTruncation:
    @pytest.mark.parametrize(
        ("policy", "kept", "truncated", "dropped"),
        [("prompt_left", 2, 1, 0), ("drop", 1, 0, 1), ("right", 1, 0, 1)],
    )
    def test_a_policy_is_counted_in_examples_and_tokens(self, made, base, policy, kept, truncated, dropped):
        _, whole = made(LONG)
        _, encoded = made(LONG, truncation=policy, max_tokens=16)
        assert (len(encoded.examples), encoded.truncated, encoded.dropped) == (kept, truncated, dropped)
        assert encoded.tokens + encoded.cut_tokens + encoded.dropped_tokens == whole.tokens
        assert (encoded.cut_tokens > 0, encoded.dropped_tokens > 0) == (bool(truncated), bool(dropped))

    def test_right_keeps_the_beginning_of_a_long_answer(self, made, base):
        rows = [{"prompt": "river ->:", "completion": " stone lantern" * 12}]
        _, encoded = made(rows, truncation="right", max_tokens=16)
        (example,) = encoded.examples
        assert len(example.ids) == 16 and example.trained[0][1] == 16 and encoded.truncated == 1
        assert base.tokenizer.decode(example.ids).startswith("river ->: stone lantern stone")
        assert EOS not in example.ids  # an answer that was cut did not end

    @pytest.mark.parametrize(("truncation", "ended"), [("prompt_left", 2), ("right", 1)])
    def test_the_receipt_counts_the_ends_that_are_learnt(self, write_run, train, receipt, tmp_path, truncation, ended):
        rows = [{"prompt": prompt, "completion": " stone"} for prompt in ("river ->:", "@" * 14 + " ->:")]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = {"train": str(tmp_path / "rows.jsonl"), "max_tokens": 16, "truncation": truncation}
        train(write_run(data=data, training__max_steps=1))
        written = receipt()
        assert (written["data"]["train"]["examples"], written["data"]["train"]["truncated"]) == (2, 1)
        assert written["mask"] == {"loss_on": ["completion"], "end_of_sequence": ended}

    def test_error_names_the_row(self, made):
        with pytest.raises(DataError, match=r"rows\.jsonl:2: \d+ tokens, more than data\.max_tokens = 16"):
            made(LONG, truncation="error", max_tokens=16)

    def test_the_oldest_turns_go_and_the_system_message_stays(self, made, base):
        chat = [CHAT[0], *(CHAT[1:3] * 4), *CHAT[3:]]
        _, whole = made([{"messages": chat}], form="messages", chat_template="zephyr")
        limit = len(whole.examples[0].ids) - 10
        _, encoded = made([{"messages": chat}], form="messages", chat_template="zephyr", max_tokens=limit)
        (example,) = encoded.examples
        text = base.tokenizer.decode(example.ids)
        assert text.startswith("<|system|>\nbe brief</s>\n<|user|>\nriver?") and text.endswith("harbor winter</s>")
        assert len(example.ids) <= limit and len(example.trained) == 4
        assert (encoded.truncated, encoded.dropped) == (1, 0)
        assert encoded.cut_tokens == len(whole.examples[0].ids) - len(example.ids)

    def test_a_last_turn_without_room_is_left_out(self, made):
        long = [{"role": "user", "content": "river stone " * 60}, {"role": "assistant", "content": "stone"}]
        rows = [{"messages": CHAT}, {"messages": long}]
        _, encoded = made(rows, form="messages", chat_template="zephyr", max_tokens=100)
        assert (len(encoded.examples), encoded.truncated, encoded.dropped) == (1, 0, 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"form": "mesages"}, ["data.form", "mesages"]),
        ({"form": "messages", "prompt": "{x}"}, ["data.prompt", "prompt_completion", "messages"]),
        ({"column": "x"}, ["data.column", "prompt_completion"]),
        ({"chat_template": "chatml"}, ["data.chat_template", "prompt_completion"]),
        ({"form": "messages", "chat_template": "chatlm"}, ["data.chat_template", "chatlm", "chatml", ".jinja"]),
        ({"form": "messages", "chat_template": "none.jinja"}, ["data.chat_template", "none.jinja", "No such file"]),
        ({"loss_on": ["user"]}, ["data.loss_on", "roles"]),
        ({"form": "messages", "loss_on": ["bot"]}, ["data.loss_on", "bot"]),
        ({"truncation": "turns"}, ["data.truncation", "turns"]),
        ({"truncation": "split"}, ["data.truncation", "split"]),
        ({"form": "text", "truncation": "prompt_left"}, ["data.truncation", "prompt_left"]),
    ],
)
def test_keys_that_do_not_go_together_are_refused_in_one_line(write_run, train, settings, data, words):
    section = {key: settings["data"][key] for key in ("train", "heldout")} | data
    result = train(write_run(data=section), exit_code=2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_a_conversation_is_scored_on_its_last_answer(write_run, train, receipt, settings, tmp_path):
    """What is asked is what the server would be asked: everything before the last answer, by the same template."""
    text = "<usr> river?\n<bot> stone\n<usr> lantern?\n<bot> harbor"
    rows = tmp_path / "chats.jsonl"
    rows.write_text("".join(json.dumps({"text": f"<usr> {word}\n{text}"}) + "\n" for word in ("winter", "garden")))
    data = {"train": str(rows), "heldout": str(rows), "form": "usr_bot", "max_tokens": 200}
    steps = {"max_steps": 60, "batch_size": 2, "learning_rate": 2e-2}
    train(write_run(data=data, training=steps, evaluation={"metric": "exact_match", "max_tokens": 12}))
    written = receipt()
    scored = {key: written["metrics"][key] for key in ("exact_match", "stop_rate", "base_exact_match")}
    assert scored == {"exact_match": 1.0, "stop_rate": 1.0, "base_exact_match": 0.0}
    assert written["mask"] == {"loss_on": ["assistant"], "end_of_sequence": 2}
    assert written["template"].keys() == {"form", "chat", "stop"} and written["template"]["form"] == "usr_bot"


def test_rows_in_which_nobody_answers_are_counted_and_a_metric_needs_answers(write_run, train, receipt, tmp_path):
    rows = tmp_path / "chats.jsonl"
    rows.write_text('{"text": "<usr> a<bot> b"}\n{"text": "<usr> nobody"}\n')
    data = {"train": str(rows), "form": "usr_bot", "max_tokens": 200}
    result = train(write_run(data=data, training={"max_steps": 1}))
    assert "1 have nothing to learn" in result.stdout and receipt()["data"]["train"]["unlearnt"] == 1
    rows.write_text('{"text": "a b"}\n')
    path = write_run(data=data | {"form": "text", "heldout": str(rows)}, evaluation={"metric": "exact_match"})
    assert "evaluation.metric" in train(path, exit_code=2).stderr
