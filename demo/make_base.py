"""Makes the demo base from nothing: text by corpus.py, a byte-level BPE tokenizer, a small Llama, and the model card.

    python demo/make_base.py        # about 10 minutes on 2 free cores, writes demo/base/

It owns the model's shape and its training. It knows nothing of quotes, adapters and quantization.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import transformers
from corpus import documents, text_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<|bos|>", "<|endoftext|>"
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. The seeds of the three texts are `seed`, `seed + 1` and `seed + 2`."""

    seed: int = 20250601
    vocabulary: int = 4096
    tokenizer_characters: int = 6_000_000
    context_tokens: int = 512
    hidden: int = 256
    intermediate: int = 704
    layers: int = 6
    heads: int = 4
    key_value_heads: int = 2
    primer_growth: int = 400  # documents until the text takes up one more topic
    steps: int = 1100
    batch: int = 4
    learning_rate: float = 3e-3  # AdamW: embeddings and norms
    matrix_learning_rate: float = 0.02  # Muon: the linear layers
    warmup_steps: int = 30
    decay_share: float = 0.4
    weight_decay: float = 0.05
    heldout_batches: int = 16


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A lossless byte-level BPE: every UTF-8 text decodes to itself. Encoding puts BOS in front, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text_of(recipe.seed, recipe.tokenizer_characters), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=recipe.context_tokens,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token_type_ids
    )


def groups_of(size: int, items: Iterator) -> Iterator[list]:
    while group := list(islice(items, size)):
        yield group


def blocks(tokenizer: PreTrainedTokenizerFast, seed: int, length: int, growth: int = 0) -> Iterator[list[int]]:
    """Endless runs of `length` tokens: documents, each with its BOS and EOS, one after the other."""
    waiting: list[int] = []
    for some in groups_of(256, documents(seed, growth)):
        for encoding in tokenizer.backend_tokenizer.encode_batch(some):
            waiting += [*encoding.ids, tokenizer.eos_token_id]
        while len(waiting) >= length:
            yield waiting[:length]
            del waiting[:length]


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_value_heads,
            max_position_embeddings=recipe.context_tokens,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token; `tokens` is (rows, context_tokens + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def learning_rate_share(recipe: Recipe, step: int) -> float:
    """Of the peak learning rates: a linear warm-up, a plateau, and a linear decay over the last `decay_share`."""
    return min(1.0, (step + 1) / recipe.warmup_steps, (recipe.steps - step) / (recipe.steps * recipe.decay_share))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="original"
        ),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    batches = groups_of(
        recipe.batch, blocks(tokenizer, recipe.seed + 1, recipe.context_tokens + 1, recipe.primer_growth)
    )
    model.train()
    started = time.perf_counter()
    for step, rows in enumerate(islice(batches, recipe.steps)):
        for optimizer, peak in zip(optimizers, (recipe.matrix_learning_rate, recipe.learning_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate_share(recipe, step)
        loss = loss_of(model, torch.tensor(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if (step + 1) % 20 == 0 or step + 1 == recipe.steps:
            spent = time.perf_counter() - started
            speed = (step + 1) * recipe.batch * recipe.context_tokens / spent
            left = spent / (step + 1) * (recipe.steps - step - 1) / 60
            done = f"step {step + 1:5d}/{recipe.steps}"
            print(f"{done}  loss {loss.item():.3f}  {speed:,.0f} tokens/s  {left:.1f} min left", flush=True)


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> float:
    model.eval()
    batches = groups_of(recipe.batch, blocks(tokenizer, recipe.seed + 2, recipe.context_tokens + 1))
    losses = [loss_of(model, torch.tensor(rows)).item() for rows in islice(batches, recipe.heldout_batches)]
    return sum(losses) / len(losses)


@torch.no_grad()
def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    torch.manual_seed(0)
    written = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(
            **inputs, max_new_tokens=40, do_sample=True, temperature=0.7, top_p=0.9, pad_token_id=tokenizer.eos_token_id
        )
        written.append(tokenizer.decode(output[0], skip_special_tokens=True).replace("\n", " "))
    return written


def write_card(folder: Path, recipe: Recipe, facts: dict[str, str], written: list[str]) -> None:
    card = (HERE / "base_card.md").read_text(encoding="utf-8")
    facts |= {
        "recipe": json.dumps(asdict(recipe), indent=2),
        "samples": "\n".join(f"- {text}" for text in written),
        "files": "\n".join(
            f"| `{path.name}` | {path.stat().st_size:,} |"
            for path in sorted(folder.iterdir())
            if path.name != "README.md"
        ),
    }
    for key, value in facts.items():
        card = card.replace("{{" + key + "}}", value)
    (folder / "README.md").write_text(card, encoding="utf-8")


def make_base(folder: Path, recipe: Recipe) -> None:
    """Writes the whole folder beside `folder` first and puts it in place at the end."""
    started = time.perf_counter()
    tokenizer = train_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    parameters = model.num_parameters()
    print(f"{parameters:,} parameters, {len(tokenizer):,} tokens, {torch.get_num_threads()} threads", flush=True)
    train(model, tokenizer, recipe)
    model = model.to(torch.bfloat16)
    loss = heldout_loss(model, tokenizer, recipe)
    written = samples(model, tokenizer, ["Courage is", "The library", "When the soldier", "Where there is hope"])
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone
    minutes = (time.perf_counter() - started) / 60
    facts = {
        "loss": f"{loss:.3f}",
        "perplexity": f"{math.exp(loss):.1f}",
        "parameters": f"{parameters:,}",
        "tokens": f"{recipe.steps * recipe.batch * recipe.context_tokens:,}",
        "minutes": f"{minutes:.1f}",
        "threads": str(torch.get_num_threads()),
        "cpu": cpu_name(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    write_card(partial, recipe, facts, written)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder}: held-out loss {loss:.3f} nats per token, {minutes:.1f} minutes")
    print(*written, sep="\n")


def cpu_name() -> str:
    """The machine's class, as the kernel names its processor; empty hands where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown CPU"
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{os.cpu_count()} cores of {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "base")
    parser.add_argument(
        "--steps", type=int, default=Recipe.steps, help="optimizer steps of 2,048 tokens (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    make_base(arguments.out, Recipe(steps=arguments.steps, seed=arguments.seed))


if __name__ == "__main__":
    main()
