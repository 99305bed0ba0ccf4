"""The Triton kernels behind triton_lora: shrink (A @ x) and expand (out += scaling * B @ …), by each token's slot.

Importing this file needs Triton; only triton_lora does. `single` kernels run one token a program, for decoding;
`blocked` kernels run a block of tokens, once for each adapter that the block holds.
"""

# ruff: noqa: ANN001, ANN201 - Triton takes annotations for types of its own
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def shrink(
    middle,  # (PARTS, tokens, max_rank) float32, written
    x,  # (tokens, in_features)
    slots,
    a,
    ranks,
    tokens,
    in_features,
    max_rank,
    x_stride,
    PARTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WEIGHT: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """One token, a block of its adapter's rank, one part of its features."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    first = tl.program_id(1) * BLOCK_RANK
    slot = tl.load(slots + token)
    if slot < 0:
        return
    rank = tl.load(ranks + slot)
    if first >= rank:
        return
    weight = tl.multiple_of(tl.load(a + slot).to(tl.pointer_type(WEIGHT)), 16)
    r = first + tl.arange(0, BLOCK_RANK)
    total = tl.zeros((BLOCK_RANK,), tl.float32)
    for start in range(part * BLOCK_IN, in_features, PARTS * BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        value = tl.load(x + token * x_stride + i, mask=i < in_features, other=0.0).to(tl.float32)
        row = tl.load(
            weight + r[:, None] * in_features + i[None, :],
            mask=(r[:, None] < rank) & (i[None, :] < in_features),
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(row * value[None, :], axis=1)
    tl.store(middle + (part * tokens.to(tl.int64) + token) * max_rank + r, total, mask=r < rank)


@triton.jit(do_not_specialize=["tokens"])
def expand(
    out,  # (tokens, out_features), added to
    middle,
    slots,
    b,
    ranks,
    scalings,
    tokens,
    out_features,
    max_rank,
    out_stride,
    PARTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    """One token, a block of the layer's outputs."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    rank = tl.load(ranks + slot)
    if rank == 0:
        return
    weight = tl.multiple_of(tl.load(b + slot).to(tl.pointer_type(WEIGHT)), 16)
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        r = start + tl.arange(0, BLOCK_RANK)
        shrunk = tl.zeros((BLOCK_RANK,), tl.float32)
        for part in tl.static_range(PARTS):
            shrunk += tl.load(middle + (part * tokens.to(tl.int64) + token) * max_rank + r, mask=r < rank, other=0.0)
        row = tl.load(
            weight + o[:, None].to(tl.int64) * rank + r[None, :],
            mask=(o[:, None] < out_features) & (r[None, :] < rank),
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(row * shrunk[None, :], axis=1)
    at = out + token * out_stride + o
    before = tl.load(at, mask=o < out_features, other=0.0).to(tl.float32)
    after = before + tl.load(scalings + slot) * total
    tl.store(at, after.to(out.dtype.element_ty), mask=o < out_features)


@triton.jit(do_not_specialize=["tokens"])
def shrink_blocked(
    middle,
    x,
    slots,
    a,
    ranks,
    tokens,
    in_features,
    max_rank,
    x_stride,
    PARTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    WEIGHT: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """A block of tokens; see shrink. Most blocks hold one adapter, and go through the loop once."""
    part = tl.program_id(2)
    first = tl.program_id(1) * BLOCK_RANK
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    todo = tl.load(slots + token, mask=token < tokens, other=-1)
    slot = tl.max(todo, axis=0)
    while slot >= 0:
        mine = todo == slot
        rank = tl.load(ranks + slot)
        if first < rank:
            weight = tl.multiple_of(tl.load(a + slot).to(tl.pointer_type(WEIGHT)), 16)
            r = first + tl.arange(0, BLOCK_RANK)
            total = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), tl.float32)
            for start in range(part * BLOCK_IN, in_features, PARTS * BLOCK_IN):
                i = start + tl.arange(0, BLOCK_IN)
                value = tl.load(
                    x + token[:, None] * x_stride + i[None, :],
                    mask=mine[:, None] & (i[None, :] < in_features),
                    other=0.0,
                ).to(PRODUCT)
                column = tl.load(
                    weight + r[None, :] * in_features + i[:, None],
                    mask=(r[None, :] < rank) & (i[:, None] < in_features),
                    other=0.0,
                ).to(PRODUCT)
                total += tl.dot(value, column, input_precision="ieee")
            tl.store(
                middle + (part * tokens.to(tl.int64) + token[:, None]) * max_rank + r[None, :],
                total,
                mask=mine[:, None] & (r[None, :] < rank),
            )
        todo = tl.where(mine, -1, todo)
        slot = tl.max(todo, axis=0)


@triton.jit(do_not_specialize=["tokens"])
def expand_blocked(
    out,
    middle,
    slots,
    b,
    ranks,
    scalings,
    tokens,
    out_features,
    max_rank,
    out_stride,
    PARTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    """A block of tokens and of the layer's outputs; see expand."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    o = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    todo = tl.load(slots + token, mask=token < tokens, other=-1)
    slot = tl.max(todo, axis=0)
    while slot >= 0:
        mine = todo == slot
        rank = tl.load(ranks + slot)
        if rank > 0:
            weight = tl.multiple_of(tl.load(b + slot).to(tl.pointer_type(WEIGHT)), 16)
            total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)
            for start in range(0, rank, BLOCK_RANK):
                r = start + tl.arange(0, BLOCK_RANK)
                known = mine[:, None] & (r[None, :] < rank)
                shrunk = tl.zeros((BLOCK_TOKENS, BLOCK_RANK), tl.float32)
                for part in tl.static_range(PARTS):
                    shrunk += tl.load(
                        middle + (part * tokens.to(tl.int64) + token[:, None]) * max_rank + r[None, :],
                        mask=known,
                        other=0.0,
                    )
                column = tl.load(
                    weight + o[None, :].to(tl.int64) * rank + r[:, None],
                    mask=(o[None, :] < out_features) & (r[:, None] < rank),
                    other=0.0,
                ).to(tl.float32)
                total += tl.dot(shrunk, column, input_precision="ieee")
            at = out + token[:, None] * out_stride + o[None, :]
            there = mine[:, None] & (o[None, :] < out_features)
            before = tl.load(at, mask=there, other=0.0).to(tl.float32)
            after = before + tl.load(scalings + slot) * total
            tl.store(at, after.to(out.dtype.element_ty), mask=there)
        todo = tl.where(mine, -1, todo)
        slot = tl.max(todo, axis=0)
