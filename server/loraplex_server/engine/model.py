"""Loads the base model: where it is, how it is quantized, which bytes it is made of.

The one function through which server, trainer and bench get a base; it knows nothing of adapters or requests.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from loraplex_registry.base import BaseDescription, describe_base
from loraplex_server.engine.errors import BaseNotFound, BaseUnusable

QUANTIZATIONS = ("nf4", "none")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Weights and tokenizer only: never pickles, never another framework's copy of the weights.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Base:
    """A loaded base model and what identifies it.

    ``quantization`` reads ``nf4+double:bfloat16`` (scheme, then compute dtype) or ``none:float32``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    folder: Path
    revision: str | None
    quantization: str
    device: torch.device
    context_tokens: int
    description: BaseDescription = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """Digest of the checkpoint's tensors; equal for equal weights however they are sharded."""
        assert self.description.fingerprint  # known for every base whose files are here
        return self.description.fingerprint

    @property
    def dtype(self) -> torch.dtype:
        """The dtype activations have, and so the KV cache."""
        return self.model.dtype

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every token id that ends a completion, from the generation config and the tokenizer."""
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = configured if isinstance(configured, list) else [configured, self.tokenizer.eos_token_id]
        return frozenset(int(i) for i in ids if i is not None)


def load_base(
    id_or_path: str,
    revision: str | None = None,
    quantization: str = "nf4",
    device: str = "auto",
    dtype: str = "auto",
) -> Base:
    """Load a causal language model and its tokenizer, frozen and in eval mode.

    ``nf4`` is bitsandbytes' 4-bit NormalFloat with double quantization (QLoRA, arXiv:2305.14314); ``dtype`` is the
    compute dtype: bfloat16 where the device computes in it, else float32.

    Raises:
        BaseNotFound: no such folder or Hub repository, or it holds no causal language model.
        BaseUnusable: an unknown option, or a device that is not there.
    """
    where = _device(device)
    compute = _compute_dtype(dtype, where)
    scheme = _quantization_config(quantization, compute)
    folder = _folder(id_or_path, revision)
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=compute,
            quantization_config=scheme,
            device_map={"": where},
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise BaseNotFound(f"base {id_or_path!r} cannot be loaded as a causal language model: {error}") from error
    model.requires_grad_(False)
    model.eval()
    name = str(compute).removeprefix("torch.")
    return Base(
        model=model,
        tokenizer=tokenizer,
        id=id_or_path,
        folder=folder,
        revision=revision,
        quantization=f"nf4+double:{name}" if scheme else f"none:{name}",
        device=where,
        context_tokens=_context_tokens(config),
        description=describe_base(str(folder)),
    )


def _folder(id_or_path: str, revision: str | None) -> Path:
    """The local folder of the checkpoint; a Hub id is downloaded (or found in the Hub cache) first."""
    path = Path(id_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BaseNotFound(f"base {id_or_path!r}: the folder has no config.json, so it is not a model")
        return path.resolve()
    if path.is_absolute() or id_or_path.startswith((".", "~")) or id_or_path.count("/") > 1:
        raise BaseNotFound(f"base {id_or_path!r}: no such folder")
    try:
        return Path(snapshot_download(id_or_path, revision=revision, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        at = f" at revision {revision!r}" if revision else ""
        raise BaseNotFound(
            f"base {id_or_path!r}{at}: no such folder, and not to be had from the Hub: {reason}"
        ) from error


def _device(device: str) -> torch.device:
    if device not in DEVICES:
        raise BaseUnusable(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BaseUnusable("device is 'cuda', but no CUDA device is available; use 'cpu' or 'auto'")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype not in DTYPES:
        raise BaseUnusable(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if (chosen := DTYPES[dtype]) is not None:
        return chosen
    if device.type == "cuda":
        # Turing and older only emulate it, far slower than float16.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Without AVX-512 BF16 a CPU emulates bfloat16, slower than float32.
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def _quantization_config(quantization: str, compute: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization not in QUANTIZATIONS:
        raise BaseUnusable(f"quantization is {quantization!r}, expected one of {', '.join(QUANTIZATIONS)}")
    if quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _context_tokens(config: Any) -> int:
    for key in ("max_position_embeddings", "n_positions", "seq_length"):
        if isinstance(value := getattr(config, key, None), int):
            return value
    return 2048  # BLOOM and its kin state no limit (ALiBi); 2,048 is what they were trained on
