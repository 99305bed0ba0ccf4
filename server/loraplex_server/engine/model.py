"""Loads the base model: where it is, how it is quantized, which bytes it is made of.

The one function through which server, trainer and bench get a base; it knows nothing of adapters or requests.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from loraplex_registry.base import BaseDescription, describe_base
from loraplex_server.engine.errors import BaseNotFound, BaseUnusable
from loraplex_server.engine.int8 import prepare_int8

QUANTIZATIONS = ("nf4", "fp4", "int8", "none")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TASKS = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
OUT_OF_MEMORY = ("out of memory", "allocate memory")  # in what torch says for want of it
# Weights and tokenizer only: never pickles, never another framework's copy of the weights.
_HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.safetensors")
# Sizes that differ are told too, instead of transformers' own error.
_TELLING = {"output_loading_info": True, "ignore_mismatched_sizes": True}


@dataclass(frozen=True)
class Base:
    """A loaded base model and what identifies it.

    ``quantization`` reads ``nf4+double:bfloat16`` (scheme, then compute dtype), ``int8:bfloat16`` or ``none:float32``.
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
    double_quantization: bool = True,
    task: str = "causal",
    device_map: str | Mapping[str, int | str] | None = None,
    weights: bool = True,
) -> Base:
    """Load a language model and its tokenizer, frozen and in eval mode.

    ``nf4`` and ``fp4`` are bitsandbytes' 4 bits (QLoRA, arXiv:2305.14314), with double quantization unless told
    otherwise; ``int8`` is LLM.int8's storage, see engine.int8; ``dtype`` is the compute dtype: bfloat16 where the
    device computes in it, else float32. ``task`` is ``causal`` or ``seq2seq``, an encoder and a decoder. ``device_map``
    spreads the base over several devices as transformers does (``auto``, ``balanced``, ``sequential``, or modules to
    devices).

    ``weights`` False gives the same base without its numbers, on the meta device and not quantized: for sizes. Of a
    base on the Hub no weight is downloaded then.

    Raises:
        BaseNotFound: no such folder or Hub repository, or it holds no language model of this task.
        MemoryError, or torch's own error: it did not fit.
        BaseUnusable: an unknown option, a device that is not there, a base of which a part would be off its GPUs, one
            that reads more than text, is quantized or adapted already, or whose weights are damaged, missing, or of
            other sizes than its config says.
    """
    if device_map is not None and device != "auto":
        raise BaseUnusable(f"device is {device!r} and device_map is {device_map!r}, expected only one of the two")
    where = _device(device)
    compute = _compute_dtype(dtype, where)
    scheme = _quantization_config(quantization, double_quantization, compute)
    if task not in TASKS:
        raise BaseUnusable(f"task is {task!r}, expected one of {', '.join(TASKS)}")
    if isinstance(device_map, Mapping):
        if not device_map:
            raise BaseUnusable("device_map is {}, expected modules to devices, or no device_map")
        _refuse_offload(device_map)
        _refuse_absent(device_map)
    folder = _folder(id_or_path, revision, _HUB_FILES if weights else _HUB_FILES[:-1])
    _refuse_adapted(id_or_path, folder)
    if not (folder / "config.json").is_file():
        raise BaseNotFound(f"base {id_or_path!r}: it has no config.json, so it is not a model")
    try:
        config = AutoConfig.from_pretrained(folder)
        _refuse_other_senses(id_or_path, config)
        _refuse_quantized(id_or_path, config)
        tokenizer = _tokenizer(id_or_path, folder)
        if weights or Path(id_or_path).expanduser().is_dir():
            _refuse_incomplete(id_or_path, _told_beforehand(id_or_path, folder, config, task))
        if weights:
            placed = {"": where} if device_map is None else device_map
            options = {"dtype": compute, "quantization_config": scheme, "device_map": placed, "use_safetensors": True}
            model = _with_numbers(id_or_path, folder, config, task, options)
        else:
            model = _without_numbers(folder, config, task, compute)
        described = describe_base(str(folder)) if weights else describe_base(id_or_path, revision)
    except BaseUnusable:
        raise
    except SafetensorError as error:
        raise BaseUnusable(f"base {id_or_path!r}: its weights are no whole safetensors files: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        kind = {"causal": "a causal", "seq2seq": "an encoder-decoder"}[task]
        raise BaseNotFound(f"base {id_or_path!r} cannot be loaded as {kind} language model: {error}") from error
    _refuse_offload(getattr(model, "hf_device_map", {}))
    if quantization == "int8" and weights:
        prepare_int8(model, compute)
    model.requires_grad_(False)
    model.eval()
    return Base(
        model=model,
        tokenizer=tokenizer,
        id=id_or_path,
        folder=folder,
        revision=revision,
        quantization=_quantization_name(quantization, double_quantization, compute),
        device=where,
        context_tokens=_context_tokens(config),
        description=described,
    )


def _folder(id_or_path: str, revision: str | None, files: Sequence[str]) -> Path:
    """The local folder of the checkpoint; a Hub id is downloaded (or found in the Hub cache) first."""
    path = Path(id_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise BaseUnusable(
                f"base {id_or_path!r}: revision is {revision!r}, which is for a base of the Hub, and this is a folder"
            )
        return path.resolve()
    if path.is_absolute() or id_or_path.startswith((".", "~")) or id_or_path.count("/") > 1:
        raise BaseNotFound(f"base {id_or_path!r}: no such folder")
    try:
        return Path(snapshot_download(id_or_path, revision=revision, allow_patterns=list(files)))
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


def _quantization_config(quantization: str, double: bool, compute: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization not in QUANTIZATIONS:
        raise BaseUnusable(f"quantization is {quantization!r}, expected one of {', '.join(QUANTIZATIONS)}")
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def _quantization_name(quantization: str, double: bool, compute: torch.dtype) -> str:
    scheme = f"{quantization}+double" if double and quantization in ("nf4", "fp4") else quantization
    return f"{scheme}:{str(compute).removeprefix('torch.')}"


def _refuse_other_senses(name: str, config: Any) -> None:
    if sense := next((sense for sense in ("vision", "audio") if hasattr(config, f"{sense}_config")), None):
        raise BaseUnusable(
            f"base {name!r} is a {sense} and language model ({config.model_type}); only language models are trained "
            "and served, causal or encoder-decoder"
        )


def _refuse_quantized(name: str, config: Any) -> None:
    """Its layers would stay as they are stored, whatever is asked for, and receipts would say otherwise."""
    if stored := getattr(config, "quantization_config", None):
        settings = stored if isinstance(stored, Mapping) else stored.to_dict()
        raise BaseUnusable(
            f"base {name!r} is quantized already ({settings.get('quant_method')}); expected the checkpoint that it was "
            "made from: it is quantized as it is loaded"
        )


def _refuse_adapted(name: str, folder: Path) -> None:
    """transformers would put an adapter that lies beside a base onto it."""
    if not (config := folder / "adapter_config.json").is_file():
        return
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    of = f" of {base}" if base else ""
    raise BaseUnusable(
        f"base {name!r} is an adapter{of}, or has one beside it (adapter_config.json); expected the base alone"
    )


def _tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library knows no narrower one
        raise BaseUnusable(
            f"base {name!r}: no tokenizer can be made of its tokenizer.json and tokenizer_config.json: "
            f"{type(error).__name__}: {error}"
        ) from error


def _told_beforehand(name: str, folder: Path, config: Any, task: str) -> Mapping[str, Any]:
    """What loading says of a checkpoint, of no more than its headers: that of a quantized layer looks at no size."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # the same table comes when it is loaded
    try:
        options = {"device_map": {"": "meta"}, "use_safetensors": True}
        _, told = TASKS[task].from_pretrained(folder, config=config, **options, **_TELLING)
    except RuntimeError as error:  # of several weights that become one, such as experts
        raise BaseUnusable(f"base {name!r}: its weights are not those of the model in its config.json") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    return told


def _hidden_errors(error: RuntimeError) -> str:
    """What went wrong while weights were quantized: transformers keeps it for a table, and raises its own error."""
    trace = error.__traceback__
    while trace:
        if found := getattr(trace.tb_frame.f_locals.get("loading_info"), "conversion_errors", None):
            return "\n".join(found.values())
        trace = trace.tb_next
    return ""


def _refuse_incomplete(name: str, told: Mapping[str, Any]) -> None:
    """What a checkpoint lacks, transformers fills with random numbers. `told` is what it says of the loading."""
    if missing := sorted(told.get("missing_keys", ())):
        first = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise BaseUnusable(f"base {name!r} lacks {len(missing)} of its weights: {first}")
    if sizes := sorted(told.get("mismatched_keys", ())):
        key, stored, expected = sizes[0]
        raise BaseUnusable(
            f"base {name!r}: {len(sizes)} of its weights have other sizes than its config.json says: {key} is "
            f"{tuple(stored)}, expected {tuple(expected)}"
        )


def _with_numbers(name: str, folder: Path, config: Any, task: str, options: Mapping[str, Any]) -> Any:
    """The model, by from_pretrained and its `options`."""
    try:
        model, told = TASKS[task].from_pretrained(folder, config=config, **options, **_TELLING)
    except RuntimeError as error:
        if not any(words in (hidden := _hidden_errors(error)) for words in OUT_OF_MEMORY):
            raise
        raise MemoryError(f"base {name!r} did not fit into memory: {hidden.splitlines()[-1]}") from error
    _refuse_incomplete(name, told)
    return model


def _without_numbers(folder: Path, config: Any, task: str, compute: torch.dtype) -> Any:
    """The model on the meta device."""
    with torch.device("meta"):
        model = TASKS[task].from_config(config, dtype=compute)
    model.generation_config = _generation_config(folder, config)
    return model


def _generation_config(folder: Path, config: Any) -> GenerationConfig:
    """As from_pretrained finds it."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def _refuse_absent(places: Mapping[str, Any]) -> None:
    for place in places.values():
        try:
            there = torch.device(f"cuda:{place}" if isinstance(place, int) else place)
        except RuntimeError:
            raise BaseUnusable(f"device_map names {place!r}, expected a device such as 0, 'cuda:1' or 'cpu'") from None
        if there.type == "cuda" and (there.index or 0) >= torch.cuda.device_count():
            raise BaseUnusable(f"device_map names GPU {there.index or 0}, and {torch.cuda.device_count()} are here")


def _refuse_offload(places: Mapping[str, Any]) -> None:
    """A part in host memory or on disk comes to the GPU anew in every step; no quantized layer can be there."""
    where = {str(place) for place in places.values()}
    if "disk" in where or ("cpu" in where and len(where) > 1):
        raise BaseUnusable(
            f"device_map puts a part of the base on {' and '.join(sorted(where & {'cpu', 'disk'}))}, which is not "
            "supported: choose a smaller quantization (nf4), a smaller base, or a GPU with more memory"
        )


def _context_tokens(config: Any) -> int:
    for key in ("max_position_embeddings", "n_positions", "seq_length"):
        if isinstance(value := getattr(config, key, None), int):
            return value
    return 2048  # BLOOM and its kin state no limit (ALiBi); 2,048 is what they were trained on
