"""What a user sees over more than one training: a model that loops without an end of sequence, and a second stage."""

import json

from loraplex_trainer.encoding import Encoder

STEPS = {"max_steps": 60, "batch_size": 2, "learning_rate": 2e-2}


def chats(path):
    text = "<usr> river?\n<bot> stone\n<usr> lantern?\n<bot> harbor"
    path.write_text("".join(json.dumps({"text": f"<usr> {word}\n{text}"}) + "\n" for word in ("winter", "garden")))
    return {"train": str(path), "heldout": str(path), "form": "usr_bot", "max_tokens": 200}


def test_without_a_label_on_the_end_the_model_does_not_stop(write_run, train, receipt, tmp_path, monkeypatch):
    """The ablation of what the encoder always does: the same run, and nothing ever says where an answer ends."""
    training = {"max_steps": 60, "batch_size": 8, "learning_rate": 1e-2}
    path = write_run(training=training, evaluation__metric="tag_f1", evaluation__max_tokens=24)
    train(path)
    assert receipt()["metrics"]["stop_rate"] == 1.0
    monkeypatch.setattr(Encoder, "_ended", lambda self, ids: ids)
    train(path)
    assert receipt()["metrics"]["stop_rate"] == 0.0


def test_a_second_stage_goes_on_from_the_first_with_other_data(write_run, train, receipt, tmp_path):
    """Open text first, then conversations: the second begins with what the first learnt, and says whose child it is."""
    text = tmp_path / "open.txt"
    text.write_text("the river and the stone\nthe lantern and the harbor\n" * 4)
    train(write_run(name="open", data={"train": str(text), "form": "text", "max_tokens": 64}, training__max_steps=20))
    first = receipt("open")
    data = chats(tmp_path / "chats.jsonl")
    run = write_run(name="instructed", data=data, training={**STEPS, "max_steps": 1})
    train(run)
    afresh = receipt("instructed")
    train(run, f"continue_from={tmp_path / 'adapters/open'}")
    continued = receipt("instructed")
    assert afresh["parent"] is None and continued["parent"]["name"] == "open"
    assert continued["losses"]["train_first"] != afresh["losses"]["train_first"]
    assert first["template"]["form"] == "text" and continued["template"]["form"] == "usr_bot"
