"""Compiles the Triton kernels for NVIDIA GPUs, down to machine code; needs no GPU, and writes one line a kernel.

A program of its own: in the tests' process Triton interprets. Usage: compile_kernels.py CAPABILITY…, as in 80 90
"""

import sys
from collections.abc import Iterator

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from loraplex_server.engine import attention_kernel, lora_kernels

OPTIONS = {"enable_fp_fusion": True}  # as the kernels are launched
TYPES = {tl.float32: "fp32", tl.bfloat16: "bf16", tl.float16: "fp16"}


def lora(activations: tl.dtype, weights: tl.dtype) -> Iterator[tuple]:
    """Kernel, types of its pointers and numbers, constants."""
    kept, product = f"*{TYPES[activations]}", activations if activations == weights else tl.float32
    types = {"x": kept, "out": kept, "middle": "*fp32", "scalings": "*fp32", "slots": "*i32", "ranks": "*i32"}
    types |= {"a": "*i64", "b": "*i64"}
    constants = {"PARTS": 2, "BLOCK_TOKENS": 16, "BLOCK_RANK": 64, "WEIGHT": weights}
    for shrink in (lora_kernels.shrink, lora_kernels.shrink_blocked):
        yield shrink, types, constants | {"BLOCK_IN": 128, "PRODUCT": product}
    for expand in (lora_kernels.expand, lora_kernels.expand_blocked):
        yield expand, types, constants | {"BLOCK_OUT": 64}


def attention(activations: tl.dtype, width: int) -> Iterator[tuple]:
    """The same, for a model with a window and a cap, which compiles everything."""
    types = dict.fromkeys(("out", "query", "keys", "values"), f"*{TYPES[activations]}")
    types |= {"tables": "*i32", "lengths": "*i64", "scale": "fp32", "softcap": "fp32"}
    constants = {"WINDOW": 4096, "CAPPED": True, "PAGE_TOKENS": 16, "HEADS": 32, "GROUP": 8, "BLOCK_GROUP": 16}
    constants |= {"BLOCK_TOKENS": max(16, 4096 // width), "EXACT": activations == tl.float32}
    constants |= {"WIDTH": width, "BLOCK_WIDTH": width}
    yield attention_kernel._decode, types, constants


for capability in map(int, sys.argv[1:]):
    wide = tl.bfloat16 if capability >= 80 else tl.float16
    wanted = [*lora(wide, wide), *attention(wide, 128)]
    if capability >= 80:
        wanted += [*lora(wide, tl.float32), *attention(tl.float32, 256)]
    for kernel, types, constants in wanted:
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        made = compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", capability, 32), options=OPTIONS)
        line = capability, kernel.__name__, TYPES[wide], len(made.asm["cubin"]), made.metadata.shared
        sys.stdout.write(" ".join(map(str, line)) + "\n")
