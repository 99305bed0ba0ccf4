"""Makes what the tests serve: tiny random base models with a byte-level tokenizer, and LoRA adapters for them."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

EOS = 0
_COMMON = {"vocab_size": 320, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": None}
_LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GPT_LIKE = {**_LLAMA_LIKE, "num_key_value_heads": 4}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}
_WINDOW = {"sliding_window": 16}
# A family, or a family and what is special about it; all small enough that a forward takes milliseconds.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": None},
    "mistral-window": {**_LLAMA_LIKE, **_WINDOW},
    "qwen2": _LLAMA_LIKE,
    "qwen2-window": {**_LLAMA_LIKE, **_WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16},
    "gemma2": {**_LLAMA_LIKE, **_WINDOW, "head_dim": 16, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        **_LLAMA_LIKE,
        **_WINDOW,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {**_LLAMA_LIKE, **_WINDOW},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "scale_attn_by_inverse_layer_idx": True},
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
    },
    "gpt_neox": _GPT_LIKE,
    "mixtral": {**_LLAMA_LIKE, **_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_LLAMA_LIKE,
        **_EXPERTS,
        **_WINDOW,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {**_LLAMA_LIKE, **_EXPERTS, "head_dim": 16},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "bloom-heads": {"hidden_size": 96, "n_layer": 2, "n_head": 6},  # slopes of a number of heads that is no power of 2
    # What paged attention is not for.
    "phi3-longrope": {
        **_LLAMA_LIKE,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + i for i in range(8)],
            "original_max_position_embeddings": 32,
        },
    },
    "falcon": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
        "new_decoder_architecture": False,
    },
    "jamba": {
        **_LLAMA_LIKE,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    # What is not served.
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 4},
    "bert": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def make_base(folder: Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """A random model of a family with a byte-level BPE; its weights are spread so that greedy answers differ."""
    _tokenizer().save_pretrained(folder)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.partition("-")[0], **{**_COMMON, **FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    base: Path,
    rank: int = 4,
    targets: str | list[str] = "all-linear",
    seed: int = 1,
    strength: float = 4,
    **lora: Any,
) -> Path:
    """A random LoRA adapter, strong enough to change every answer, as peft saves it.

    ``strength`` 1 leaves the matrices as peft draws them. Whatever else the configuration trains (biases, whole
    modules, magnitudes) is moved away from the base's too.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora.setdefault("fan_in_fan_out", model.config.model_type == "gpt2")
    config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **lora)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and parameter.ndim > 1:
                parameter.mul_(strength)
            elif parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    adapted.save_pretrained(folder, save_embedding_layers=False)  # what is saved beside LoRA would be the base's own
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_COMMON["vocab_size"], special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog again and again and again"] * 2, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
