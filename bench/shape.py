"""A base in TinyLlama-1.1B's shape with random weights, made once in the user's cache, and adapters for it.

Speed does not depend on what weights say. Knows nothing of what is measured.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = Path(__file__).parents[1] / "demo/base"
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_base(name: str = "llama-1.1b", **other: Any) -> Path:
    """The folder of the base: 1.1 B parameters, 22 layers, 2.2 GB on disk. `other`: what its config has else."""
    folder = user_cache_path("loraplex") / "bench" / f"{name}-random"
    if not (folder / "config.json").exists():
        print(f"making {folder} …", flush=True)
        torch.manual_seed(0)
        shape = {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "eos_token_id": 2,
        }
        config = LlamaConfig(**(shape | other))
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        place = "cuda" if torch.cuda.is_available() else "cpu"  # which draws 7 B numbers in no time
        model = model.to(torch.bfloat16).to_empty(device=place)
        model.tie_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1)
        model.save_pretrained(partial)
        for file in TOKENIZER.glob("tokenizer*"):  # any will do: requests are token ids
            shutil.copy(file, partial)
        partial.rename(folder)
    return folder


def make_adapters(
    base: Path, folder: Path, count: int, rank: int = 16, targets: tuple[str, ...] = LINEAR
) -> list[Path]:
    """Random adapters of one rank on some linear layers, by default all, as peft would save them."""
    config = json.loads((base / "config.json").read_text())
    shapes = linear_shapes(config)
    made = []
    for number in range(count):
        random = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for name in targets:
                outputs, inputs = shapes[name]
                part = "self_attn" if name in LINEAR[:4] else "mlp"
                key = f"base_model.model.model.layers.{layer}.{part}.{name}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs, generator=random) * 0.02
                tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank, generator=random) * 0.02
        made.append(folder / f"adapter-{number}")
        made[-1].mkdir(parents=True)
        save_file(tensors, made[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
        written = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
        written |= {"target_modules": list(targets), "base_model_name_or_path": str(base), "bias": "none"}
        (made[-1] / "adapter_config.json").write_text(json.dumps(written))
    return made


def linear_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer of a block."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return dict(zip(LINEAR, shapes, strict=True))
