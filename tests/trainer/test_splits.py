"""What is held out, and what is the same: by content, so that rows can be added and moved."""

import json
import random
from pathlib import Path

import pytest

from loraplex_trainer.data import Split, read_splits
from loraplex_trainer.data_keys import DataSection
from loraplex_trainer.errors import DataError


def write(path: Path, numbers) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"river {n} ->:", "completion": f" stone {n}"}) + "\n" for n in numbers)
    )
    return path


def content(split: Split) -> set[str]:
    return set(split.prompts)


@pytest.fixture
def splits(tmp_path):
    def read(numbers, heldout, **data) -> dict[str, Split]:
        path = write(tmp_path / "rows.jsonl", numbers)
        return read_splits(DataSection(train=path, heldout=heldout, **data))

    return read


@pytest.mark.parametrize("heldout", ["5%", 50])
def test_rows_that_are_added_or_moved_change_no_other_rows_side(splits, heldout):
    first = splits(range(1000), heldout)
    assert 30 <= len(first["heldout"].samples) <= 70
    assert len(first["train"].samples) + len(first["heldout"].samples) == 1000
    assert not content(first["train"]) & content(first["heldout"])
    shuffled = list(range(1000))
    random.Random(0).shuffle(shuffled)
    moved = splits(shuffled, heldout)
    assert content(moved["heldout"]) == content(first["heldout"])
    more = splits(range(1100), heldout)
    if heldout == "5%":
        assert content(first["heldout"]) <= content(more["heldout"])
        assert content(first["train"]) <= content(more["train"])
    else:
        assert len(more["heldout"].samples) == 50
        assert len(content(first["heldout"]) & content(more["heldout"])) > 40


def test_equal_rows_stay_on_one_side_and_are_counted(splits):
    both = splits([*range(200), *range(100)], "20%")
    assert not content(both["train"]) & content(both["heldout"])
    assert both["train"].duplicates + both["heldout"].duplicates == 100
    assert both["train"].duplicates > 0 and both["heldout"].duplicates > 0 and both["train"].leaks == 0


def test_the_digest_is_the_files_where_all_of_it_is_used_and_the_rows_where_not(splits, tmp_path):
    whole, part = splits(range(100), None)["train"], splits(range(100), "10%")
    assert whole.sha256 == whole.sources[0].sha256
    assert len({whole.sha256, part["train"].sha256, part["heldout"].sha256}) == 3
    assert part["train"].sources == whole.sources


@pytest.mark.parametrize(("on_leak", "left"), [("keep", 20), ("drop", 17)])
def test_examples_in_both_splits_are_counted_and_dropped_from_training(splits, tmp_path, on_leak, left):
    heldout = write(tmp_path / "heldout.jsonl", [3, 4, 5, 99])
    both = splits(range(20), heldout, on_leak=on_leak)
    assert (len(both["train"].samples), both["train"].leaks, len(both["heldout"].samples)) == (left, 3, 4)


def test_a_leak_can_be_an_error(splits, tmp_path):
    heldout = write(tmp_path / "heldout.jsonl", [3, 4])
    with pytest.raises(DataError, match=r"rows\.jsonl:4: .*held out too, as are 1 others"):
        splits(range(20), heldout, on_leak="error")


CHATS = {"form": "messages", "chat_template": "chatml"}


def as_chat(*says: str) -> dict:
    roles = ("user", "assistant") * len(says)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, says, strict=False)]}


@pytest.mark.parametrize(
    ("data", "trained", "held"),
    [
        ({}, [{"prompt": p, "completion": c} for p, c in ("aA", "aB", "bA", "cC")], {"prompt": "a", "completion": "A"}),
        (CHATS, [as_chat(*"aAb", c) for c in "AB"] + [as_chat(*"aA"), as_chat(*"cCb", "A")], as_chat(*"aAb", "A")),
        (
            {"form": "alpaca"},
            [{"instruction": "a", "input": i, "output": o} for i, o in ("xA", "xB", "yA", "yB")],
            {"instruction": "a", "input": "x", "output": "A"},
        ),
        ({"form": "text"}, [{"text": text} for text in ("A", "a", "b")], {"text": "A"}),
    ],
    ids=["prompt", "chat", "alpaca", "text"],
)
@pytest.mark.parametrize("on_leak", ["keep", "drop"])
def test_a_held_out_prompt_with_another_answer_is_counted_apart(tmp_path, data, trained, held, on_leak):
    for name, rows in (("train", trained), ("heldout", [held])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("train", "heldout")}
    train = read_splits(DataSection(**paths, on_leak=on_leak, **data))["train"]
    assert (train.leaks, train.shared_prompts) == (1, 0 if data.get("form") == "text" else 1)


def test_a_run_says_which_prompts_are_shared_and_which_answers_empty(write_run, train, receipt, settings):
    rows = [json.loads(line) for line in Path(settings["data"]["train"]).read_text().splitlines()]
    for row in rows[:3]:
        row["tags"] = []
    Path(settings["data"]["train"]).write_text("\n".join(map(json.dumps, rows)))
    Path(settings["data"]["heldout"]).write_text(json.dumps(rows[5] | {"tags": ["candle"]}))
    for told in (train(write_run(), "--check", "--no-timing").stdout, train(write_run()).stdout):
        assert "train: 1 examples have the prompt of a held-out one, and another answer" in told
        assert "train: 3 examples have an empty answer" in told and told.count("an empty answer") == 1
    data = receipt()["data"]
    assert (data["train"]["shared_prompts"], data["train"]["leaks"]) == (1, 0)
    assert (data["train"]["empty"], data["train"]["unlearnt"], data["heldout"]["empty"]) == (3, 0, 0)


@pytest.mark.parametrize("heldout", [20, 50, "0%", "0.01%"])
def test_a_share_that_leaves_one_side_empty_is_refused(splits, heldout):
    with pytest.raises(DataError, match=r"data\.heldout: "):
        splits(range(20), heldout)


@pytest.mark.parametrize("heldout", ["100%", "5 %", -1, 0, 1.5, True])
def test_what_is_no_share_and_no_number_is_refused(write_run, train, heldout):
    result = train(write_run(data__heldout=heldout), exit_code=2)
    assert "data.heldout" in result.stderr and result.stderr.count("\n") == 1


def test_a_run_says_what_is_the_same_and_its_receipt_too(write_run, train, receipt, settings):
    rows = Path(settings["data"]["train"]).read_text().splitlines()
    Path(settings["data"]["train"]).write_text("\n".join([*rows, rows[0], rows[0]]))
    Path(settings["data"]["heldout"]).write_text("\n".join(rows[:2]))
    result = train(write_run())
    assert "train: 2 of 50 examples are the same as one before" in result.stdout
    assert "train: 4 examples are held out too" in result.stdout
    data = receipt()["data"]
    assert (data["train"]["duplicates"], data["train"]["leaks"], data["heldout"]["duplicates"]) == (2, 4, 0)
    train(write_run(name="shared", data__heldout="25%"))
    data = receipt("shared")["data"]
    assert data["train"]["examples"] + data["heldout"]["examples"] == 50 and data["train"]["leaks"] == 0
    assert receipt("shared")["losses"]["heldout"] > 0
