"""What an adapter can be turned into for other programs, and how. Makes nothing itself: see `refusal`."""

import shlex

from loraplex_trainer.found import Found

_CLONE = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"
_NEEDS = "pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt"


def gguf_refusal(adapter: Found, ref: str) -> str:
    """Why there is no GGUF of ours, and the commands that make one with llama.cpp's own converter.

    The package `gguf` reads and writes the container. What a LoRA tensor is called there and how it is permuted is
    known to convert_lora_to_gguf.py alone, which is published in llama.cpp's repository, not as a package.
    """
    name = adapter.name.partition(":")[0].rpartition("/")[2]
    outfile = f"{name}.gguf"
    pulled = shlex.quote(f"{name}-adapter") if adapter.digest else shlex.quote(str(adapter.folder))
    if why := _not_as_lora(adapter):
        commands = [
            shlex.join(["loraplex", "merge", ref, "--out", f"{name}-merged"]),
            shlex.join(["python", "llama.cpp/convert_hf_to_gguf.py", f"{name}-merged", "--outfile", outfile]),
        ]
    else:
        why = "llama.cpp's own converter makes it"
        fetch = [shlex.join(["registry", "pull", ref]) + f" {pulled}"] if adapter.digest else []
        convert = f"python llama.cpp/convert_lora_to_gguf.py {pulled} --base {shlex.quote(adapter.base)}"
        commands = [*fetch, f"{convert} --outfile {shlex.quote(outfile)} --outtype f16"]
    return (
        "no package converts a LoRA adapter to GGUF (`gguf` reads and writes the container alone); "
        f"{why}: {' && '.join([_CLONE, _NEEDS, *commands])}"
    )


def _not_as_lora(adapter: Found) -> str | None:
    """Why llama.cpp's converter of adapters would get this one wrong: it knows one alpha and one rank, and A and B."""
    config = adapter.config
    if config.get("peft_type") != "LORA":
        return f"llama.cpp knows LoRA alone, and this is {config.get('peft_type')}: merge it first"
    beyond = {
        "rsLoRA's scale": config.get("use_rslora"),
        "DoRA": config.get("use_dora"),
        "patterns of alphas": config.get("alpha_pattern"),
        "patterns of ranks": config.get("rank_pattern"),
        "LoRA biases": config.get("lora_bias"),
        "whole modules": config.get("modules_to_save"),
    }
    found = [what for what, given in beyond.items() if given]
    return f"llama.cpp's converter does not know {' and '.join(found)}: merge it first" if found else None
