"""The run file: what is understood, and what is refused with which words."""

from pathlib import Path

import pytest

from loraplex_trainer.errors import ConfigError
from loraplex_trainer.run_file import known_keys, load_config


def test_overrides_win_over_the_file_and_defaults_fill_the_rest(write_run):
    config = load_config(write_run(), ["training.learning_rate=1e-3", "lora.target_modules=[q_proj, v_proj]"])
    assert config.training.learning_rate == 1e-3
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.training.max_grad_norm == 1.0 and config.base.revision is None


def test_an_override_of_a_section_changes_the_keys_it_names(write_run):
    """`lora={rank: 2}` put the file's alpha back to its default, without a word."""
    config = load_config(write_run(), ["lora={rank: 2}", "training={distributed: {offload: none}}", "lora.rslora=true"])
    assert (config.lora.rank, config.lora.alpha, config.lora.rslora, config.training.max_steps) == (2, 8, True, 6)
    kept = {"lora__rank_pattern": {"q_proj": 2}, "lora__alpha_pattern": {"q_proj": 2}}
    config = load_config(write_run(**kept), ["lora.rank_pattern={v_proj: 8}", "lora.alpha_pattern={}", "training={}"])
    assert (config.lora.rank_pattern, config.lora.alpha_pattern) == ({"v_proj": 8}, {})
    assert config.training.max_steps == 6
    config = load_config(write_run(training__evaluate_every=1), ["training.early_stopping={}"])
    assert config.training.early_stopping is not None


@pytest.mark.parametrize("second", ["lora.rank=3", "lora={alpha: 4, rank: 3}"])
def test_a_key_that_is_given_twice_is_refused(write_run, train, second):
    result = train(write_run(), "lora.rank=2", second, exit_code=2)
    assert result.stderr == "error: lora.rank is given twice, as 2 and as 3: keep one\n"


@pytest.mark.parametrize(("options", "words"), [(["--no-timing"], "--check"), (["--check", "--resume"], "--resume")])
def test_options_that_do_nothing_are_refused(write_run, train, options, words):
    assert words in train(write_run(), *options, exit_code=2).stderr


def test_a_number_in_scientific_notation_is_a_number_in_the_file_too(write_run):
    """YAML 1.1 reads `3e-3` as text: the learning rate most people would write was refused as a string."""
    path = write_run()
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: 3e-3"))
    assert load_config(path).training.learning_rate == 3e-3


def test_numbers_and_dates_are_those_of_yaml_1_2(write_run):
    """By YAML 1.1 `max_steps=010` trained 8 steps, `1:30` 90, and a name that looks like a date was none."""
    path = write_run()
    written = {"training.learning_rate": ["2e-2", "0.02", ".02", "20_000e-6"], "training.seed": ["31", "0x1f", "+3_1"]}
    for key, ways in written.items():
        section, name = key.split(".")
        assert {getattr(getattr(load_config(path, [f"{key}={way}"]), section), name) for way in ways} in ({0.02}, {31})
    assert load_config(path, ["name=2024-02-30"]).name == "2024-02-30"
    assert load_config(path, ["data.completion=="]).data.completion == "="


def test_an_override_may_be_longer_than_the_name_of_a_file(write_run, train):
    report = train(write_run(), f"data.prompt='{'stone ' * 50}{{quote}}'", "--check", "--no-timing").stdout
    assert "example 1: stone stone" in report


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("!!int foo", "foo"),
        ("!!bool foo", "foo"),
        ("!!set [a]", ""),
        ("!!binary aGk=", "bytes"),
        ("!!timestamp 2024-01-01", "date"),
        ("9" * 5000, "4300 digits"),
        ("&a {model: *a}", "Circular"),
        ("[" * 5000, "recursion"),
        (r'"\ud83d"', "surrogates"),
    ],
    ids=lambda text: text[:20],
)
def test_what_no_value_can_be_is_refused_in_a_line(tmp_path, write_run, train, value, words):
    result = train(write_run(), f"base={value}", exit_code=2)
    assert result.stderr.startswith("error: override 'base=") and result.stderr.count("\n") == 1
    path = tmp_path / "bad.yaml"
    path.write_text(f"base: {value}\n")
    result = train(path, exit_code=2)
    assert result.stderr.startswith(f"error: {path}: not YAML: ") and words in result.stderr


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learnin_rate=1", ["'training.learnin_rate'", "nearest", "'training.learning_rate'"]),
        ("rank=1", ["'rank'", "'lora.rank'"]),
        ("lora.r=8", ["'lora.r'"]),
        ("lora.rank=many", ["lora.rank", '"many"', "a valid integer"]),
        ("lora.rank='8'", ["lora.rank", '"8"', "a valid integer"]),
        ("lora.rank=0", ["lora.rank", "0", "greater than 0"]),
        ("training.max_steps=010", ["training.max_steps", '"010"', "a valid integer"]),
        ("training.max_steps=1:30", ["training.max_steps", '"1:30"', "a valid integer"]),
        ("lora.rank=0x_", ["lora.rank", '"0x_"', "a valid integer"]),
        ("lora={2024-01-01: 3}", ["'lora.2024-01-01'"]),
        ("lora.target_modules=5", ["lora.target_modules", "5", "'all-linear'"]),
        ("base.quantization=int3", ["base.quantization", '"int3"', "'nf4', 'fp4', 'int8' or 'none'"]),
        ("training.schedule=", ["training.schedule", "null", "'cosine'"]),
        ("training.learning_rate=.nan", ["training.learning_rate"]),
        ("name=Quotes Tagger", ["name", "Quotes Tagger", "lowercase"]),
        ("name=quotes:3", ["name", "quotes:3"]),
        ("data.prompt='{quote} ->: '", ["data.prompt", "must not end in a space", "data.completion"]),
        ("data.train=null", ["data.train", "null"]),
        ("training.seed", ["training.seed", "key=value"]),
        ("lora.rank=10000000000", ["lora.rank: 10000000000: ", "65536"]),
        (f"lora.alpha=1{'0' * 401}", ["lora.alpha: 1000", "…: ", "1000000"]),
        ("lora.rank_pattern={q_proj: 65537}", ["lora.rank_pattern", "65537", "65536"]),
        ("prompt.hidden_size=100000000000", ["prompt.hidden_size", "65536"]),
        (f"training.warmup_steps=1{'0' * 400}", ["training.warmup_steps", "1000000000"]),
        ("training.epochs=1e300", ["training.epochs", "1000000000"]),
        ("evaluation.max_tokens=1000001", ["evaluation.max_tokens", "1000000"]),
        ("lora=", ["lora: null: expected a section, with keys of its own such as rank, alpha"]),
        ("lora=3", ["lora: 3: expected a section"]),
        ("training.early_stopping=true", ["training.early_stopping: true: expected a section", "patience, min_delta"]),
        ("training.betas=[0.9]", ["training.betas: [0.9]: expected 2 values"]),
        ("training.betas=[]", ["training.betas: []: expected 2 values"]),
        ("data.heldout=100%", ['data.heldout: "100%": a share below 100% is expected, such as 5%']),
        ("data.train=[[a]]", ['data.train: ["a"]: expected a path, or a source such as {path: file.jsonl}']),
        ("registry=/nope", ["registry: '/nope'", "continue_from or push.every"]),
        ("name.x=1", ["'name' is a value"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_was_expected(write_run, train, override, words):
    result = train(write_run(), override, exit_code=2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_all_mistakes_of_a_file_are_told_at_once(write_run):
    with pytest.raises(ConfigError) as refused:
        load_config(write_run(training__epoch=3, lora__rank="x"))
    assert "'training.epochs'" in str(refused.value) and "lora.rank" in str(refused.value)


def test_a_key_with_dots_in_a_file_is_told_how_it_is_nested(write_run, train):
    """It said: unknown key 'lora.rank'; the nearest known key is 'lora.rank'."""
    error = train(write_run(**{"lora.rank": 8}), exit_code=2).stderr
    assert "unknown key 'lora.rank'; dots are for key=value, and a file nests its keys: lora: {rank: 8}\n" in error
    error = train(write_run(**{"training__distributed.strategy": "fsdp"}), exit_code=2).stderr
    assert error.endswith('training: {distributed: {strategy: "fsdp"}}\n')


def test_a_missing_key_is_named(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nbase: {model: b}\ndata: {prompt: x}\n")
    with pytest.raises(ConfigError, match=r"'data\.train' is missing"):
        load_config(path)


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "- 1\n", "name: [\n", b"name: \xff\n"])
def test_a_file_that_is_not_one_mapping_is_refused(tmp_path: Path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)


def test_a_metric_without_examples_is_refused(write_run):
    with pytest.raises(ConfigError, match=r"evaluation\.metric.*data\.heldout"):
        load_config(write_run(data__heldout=None, evaluation={"metric": "tag_f1"}))


def test_every_key_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    leaves = [key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())]
    assert [key for key in leaves if f"| `{key}` |" not in page] == []
