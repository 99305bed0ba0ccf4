"""Merging: the folder is a plain model that answers as base and adapter do, made from the base as it was trained on."""

import json
import shlex
import shutil

import pytest
import torch
from click.testing import CliRunner
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_adapter, make_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraplex_registry.base import fingerprint_base
from loraplex_registry.registry import Registry
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import SamplingParams
from loraplex_trainer.adapter import keep_quantized_layout
from loraplex_trainer.commands import export, merge

LEARN = {"batch_size": 16, "learning_rate": 2e-2}
QUIET = {"general": "none", "samples": 0, "goldens": 2}
PROMPTS = ["river stone ->:", "garden lantern harbor ->:", "shadow candle ->:"]


@pytest.fixture
def trained(write_run, train, tmp_path):
    def run(quantization="nf4", steps=6):
        base = {"base__quantization": quantization, "base__dtype": "float32"}
        train(write_run(**base, training=LEARN | {"max_steps": steps}, evaluation=QUIET))
        return tmp_path / "adapters/tagger"

    return run


def merged(*arguments, exit_code=0):
    result = CliRunner().invoke(merge, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


@torch.no_grad()
def greedy(model, tokenizer, prompt: str) -> list[int]:
    ids = list(tokenizer(prompt).input_ids)
    start = len(ids)
    while len(ids) - start < 16 and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def test_a_4_bit_adapter_is_merged_into_what_it_was_trained_on(trained, base_folder, tmp_path):
    folder, out = trained(steps=60), tmp_path / "merged"
    result = merged(folder, "--out", out)
    assert "merged:" in result.stdout and "float32, from nf4+double:float32" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32 and not hasattr(model, "hf_quantizer")
    # The same tokens as the server gives for base and adapter.
    engine = Engine(load_base(str(base_folder), device="cpu", dtype="float32"))
    engine.add_adapter("tagger", folder)
    answers = engine.generate(PROMPTS, SamplingParams(max_tokens=16, temperature=0.0), "tagger")
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        text = tokenizer.decode(greedy(model, tokenizer, prompt), skip_special_tokens=True)
        assert text == answer.text
    # Nearer than a merge onto the weights of the checkpoint, which is what one does without thinking.
    careless = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder).merge_and_unload()
    unmerged = PeftModel.from_pretrained(load_base(str(base_folder), device="cpu", dtype="float32").model, folder)
    ids = torch.tensor([tokenizer(PROMPTS[1]).input_ids])
    with torch.no_grad():
        keep_quantized_layout(unmerged)
        there, here, elsewhere = (one.eval()(input_ids=ids).logits for one in (unmerged, model, careless))
    assert (there - here).abs().max() < 1e-3 < 0.01 < (there - elsewhere).abs().max()


def test_the_receipt_says_how_near_the_merged_is(trained, base_folder, tmp_path):
    folder, out = trained(), tmp_path / "merged"
    with Registry(tmp_path / "registry") as registry:
        version = registry.push("tagger", folder)
    merged("tagger:1", "--registry", tmp_path / "registry", "--out", out)
    written = json.loads((out / "merge.json").read_text())
    assert written["format"] == "loraplex.merge/1"
    assert written["adapter"] == {"name": "tagger:1", "digest": version.digest}
    assert written["base"]["fingerprint"] == fingerprint_base(base_folder)
    assert (written["quantization"], written["dtype"]) == ("nf4+double:float32", "float32")
    compared = written["merged_against_unmerged"]
    goldens = json.loads((folder / "receipt.json").read_text())["goldens"]
    assert compared["prompts"] == [golden["ids"] for golden in goldens]
    assert 0 <= compared["mean_logprob_difference"] < 1e-3 and compared["same_tokens"] == 1.0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written["files"].keys()


def test_the_dtype_is_what_is_asked_for(trained, tmp_path):
    out = tmp_path / "merged"
    merged(trained(quantization="none"), "--out", out, "--dtype", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert json.loads((out / "merge.json").read_text())["dtype"] == "bfloat16"


def test_an_adapter_of_another_base_is_refused(trained, base_folder, tmp_path):
    folder = trained(quantization="none")
    other = shutil.copytree(base_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({key: 2 * tensor for key, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    result = merged(folder, "--out", tmp_path / "merged", "--base", other, exit_code=2)
    assert "fingerprint" in result.stderr and not (tmp_path / "merged").exists()


def test_a_base_of_the_hub_is_found_in_the_folder_where_it_lay(trained, tmp_path):
    folder = trained(quantization="none")
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["base"] |= {"id": "owner/base", "revision": "main"}
    (folder / "receipt.json").write_text(json.dumps(receipt))
    merged(folder, "--out", tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING adds to the prompt, not to the weights"),
        ({"peft_type": "PREFIX_TUNING"}, "nothing to merge"),
    ],
)
def test_kinds_that_cannot_be_merged_are_named(trained, tmp_path, change, said):
    folder = trained(quantization="none")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    result = merged(folder, "--out", tmp_path / "merged", exit_code=2)
    assert said in result.stderr and not (tmp_path / "merged").exists()


def test_what_is_missing_or_in_the_way_is_one_line(trained, tmp_path):
    folder = trained(quantization="none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for arguments, said in (
        ((folder, "--out", tmp_path / "full"), "there is something already"),
        (("nobody:3", "--out", tmp_path / "m", "--registry", tmp_path / "none"), "no registry at"),
        ((folder, "--out", tmp_path / "m", "--base", tmp_path / "no-base"), "no such folder"),
    ):
        result = merged(*arguments, exit_code=2)
        assert said in result.stderr and len(result.stderr.strip().splitlines()) == 1
    (folder / "receipt.json").unlink()
    result = merged(folder, "--out", tmp_path / "m", exit_code=2)
    assert "say it with --quantization" in result.stderr
    merged(folder, "--out", tmp_path / "m", "--quantization", "none:float32")
    assert (tmp_path / "m/merge.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantization", "foo"], "quantization is 'foo', expected one of nf4, fp4, int8, none"),
        (["--quantization", "nf4+foo"], "--quantization nf4+foo: expected nf4, nf4+double"),
        (["--quantization", "int8+double"], "--quantization int8+double: expected nf4, nf4+double"),
        (["--quantization", "nf4:float8"], "dtype is 'float8', expected one of auto, float32"),
        (["--out", "{file}/merged"], "--out {file}/merged: {file} is no folder that can be written to"),
        pytest.param(
            ["--device", "cuda"],
            "device is 'cuda', but no CUDA device is available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU"),
        ),
    ],
)
def test_what_is_known_to_be_wrong_before_merging_has_exit_code_2(base_folder, tmp_path, arguments, words):
    adapter, file = make_adapter(tmp_path / "adapter", base_folder), tmp_path / "file"
    file.touch()
    given = ["--out", tmp_path / "merged", "--base", base_folder, "--quantization", "none:float32"]
    result = merged(adapter, *given, *(argument.format(file=file) for argument in arguments), exit_code=2)
    assert words.format(file=file) in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("damage", [lambda whole: whole[:-1], lambda whole: b"\xff" * 16 + whole[16:], None])
def test_an_adapter_without_whole_weights_is_refused(base_folder, tmp_path, damage):
    adapter = make_adapter(tmp_path / "adapter", base_folder)
    weights = adapter / "adapter_model.safetensors"
    if damage:
        weights.write_bytes(damage(weights.read_bytes()))
    else:
        weights.unlink()
    result = merged(adapter, "--out", tmp_path / "merged", "--base", base_folder, "--quantization", "none", exit_code=2)
    assert f"error: {adapter}: adapter_model.safetensors " in result.stderr and result.stderr.count("\n") == 1


def test_a_merge_that_is_another_model_is_not_written(trained, tmp_path):
    """Told that it was trained on 4 bits, where its receipt says none: that is for the one who says it to know."""
    folder = trained(quantization="none")
    tensors = load_file(folder / "adapter_model.safetensors")
    huge = {key: tensor * 1e19 for key, tensor in tensors.items()}  # beyond what float16 holds
    save_file(huge, folder / "adapter_model.safetensors", {"format": "pt"})
    result = merged(folder, "--out", tmp_path / "merged", "--dtype", "float16", exit_code=1)
    assert "nothing was written" in result.stderr
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("family", "lora"),
    [("gpt2", {}), ("gemma2", {"targets": ["lm_head", "q_proj"]}), ("llama", {"use_dora": True, "use_rslora": True})],
)
def test_transposed_layers_tied_heads_and_dora_are_merged_too(tmp_path, family, lora):
    """The server serves not all of these; the receipt is peft's own answer, so it tells all the same."""
    base = make_base(tmp_path / "base", family)
    adapter = make_adapter(tmp_path / "adapter", base, strength=1.5, **lora)
    out = tmp_path / "merged"
    merged(adapter, "--out", out, "--base", base, "--quantization", "nf4+double:float32")
    compared = json.loads((out / "merge.json").read_text())["merged_against_unmerged"]
    assert compared["mean_logprob_difference"] < 1e-3 and compared["same_tokens"] == 1.0


def test_ia3_is_merged(tmp_path):
    base = make_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    config = IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    )
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    for quantization in ("nf4+double:float32", "nf4+double:bfloat16"):
        out = tmp_path / quantization
        merged(tmp_path / "adapter", "--out", out, "--base", base, "--quantization", quantization)
        compared = json.loads((out / "merge.json").read_text())["merged_against_unmerged"]
        assert compared["mean_logprob_difference"] < (1e-3 if "32" in quantization else 0.2)


def test_gguf_is_refused_with_the_commands_of_llama_cpp(trained, base_folder, tmp_path):
    folder = trained(quantization="none")
    result = CliRunner().invoke(export, [str(folder), "--format", "gguf"])
    assert result.exit_code == 2
    command = result.stderr.strip().rpartition(" && ")[2]
    script, adapter, *options = shlex.split(command)[1:]
    assert (script, adapter) == ("llama.cpp/convert_lora_to_gguf.py", str(folder))
    assert options == ["--base", str(base_folder.resolve()), "--outfile", "tagger.gguf", "--outtype", "f16"]
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    result = CliRunner().invoke(export, [str(folder), "--format", "gguf"])
    assert "does not know rsLoRA's scale: merge it first" in result.stderr and "convert_hf_to_gguf.py" in result.stderr
