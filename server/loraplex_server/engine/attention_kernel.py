"""The Triton kernel behind decode_attention: one token a row over the pages of its sequence, softmax as it goes.

The idea of running over pages is PagedAttention's (arXiv:2309.06180), of the running softmax FlashAttention's
(arXiv:2205.14135). Importing this file needs Triton.
"""

# ruff: noqa: ANN001, ANN202 - Triton takes annotations for types of its own
# pyright: reportCallIssue=false
import torch
import triton
import triton.language as tl

_BLOCK_VALUES = 4096  # of keys, and of values, that a program holds at once: what the shared memory of Turing allows


def attend(
    query: torch.Tensor,  # (rows, heads, head_dim)
    keys: torch.Tensor,  # (slots, kv_heads, head_dim)
    values: torch.Tensor,
    tables: torch.Tensor,  # (rows, most pages) int32
    lengths: torch.Tensor,  # (rows,) int64, at least 1
    page_tokens: int,
    scale: float,
    window: int,  # 0: none
    softcap: float,  # 0: none
) -> torch.Tensor:  # (rows, heads, head_dim)
    """What is launched depends on the number of rows and the model's shape alone."""
    rows, heads, width = query.shape
    kv_heads = keys.shape[1]
    block_width = max(16, triton.next_power_of_2(width))
    assert query.stride(2) == keys.stride(2) == values.stride(2) == 1 and keys.stride() == values.stride()
    out = torch.empty(rows, heads, width, dtype=query.dtype, device=query.device)
    _decode[rows, kv_heads](
        *(out, query, keys, values, tables, lengths, scale, softcap),
        *(query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), tables.stride(0)),
        WINDOW=window,
        CAPPED=softcap > 0,
        PAGE_TOKENS=page_tokens,
        HEADS=heads,
        GROUP=heads // kv_heads,
        BLOCK_GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),  # 16: the least that a tensor core multiplies
        BLOCK_TOKENS=min(64, max(16, _BLOCK_VALUES // block_width)),
        WIDTH=width,
        BLOCK_WIDTH=block_width,
        # Triton's interpreter, the only way to be here on a CPU, takes bfloat16's bits for integers in a dot product.
        EXACT=query.dtype == torch.float32 or query.device.type == "cpu",
        enable_fp_fusion=True,  # the default, which Triton warns it will change
    )
    return out


@triton.jit
def _decode(
    out,
    query,
    keys,
    values,
    tables,
    lengths,
    scale,
    softcap,
    query_row,
    query_head,
    kv_slot,
    kv_head,
    table_row,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """One row, one head of keys and values with the query heads that share it."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    g = tl.arange(0, BLOCK_GROUP)
    d = tl.arange(0, BLOCK_WIDTH)
    mine = (g[:, None] < GROUP) & (d[None, :] < WIDTH)
    q = tl.load(query + row * query_row + (head * GROUP + g[:, None]) * query_head + d[None, :], mask=mine, other=0.0)
    if EXACT:
        q = q.to(tl.float32)
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    highest = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_GROUP,), tl.float32)
    total = tl.zeros((BLOCK_GROUP, BLOCK_WIDTH), tl.float32)
    for start in range(first, length, BLOCK_TOKENS):  # at least one token is seen in each turn
        position = start + tl.arange(0, BLOCK_TOKENS)
        seen = position < length
        page = tl.load(tables + row * table_row + position // PAGE_TOKENS, mask=seen, other=0).to(tl.int64)
        at = (page * PAGE_TOKENS + position % PAGE_TOKENS) * kv_slot + head * kv_head
        there = seen[:, None] & (d[None, :] < WIDTH)
        k = tl.load(keys + at[:, None] + d[None, :], mask=there, other=0.0)
        v = tl.load(values + at[:, None] + d[None, :], mask=there, other=0.0)
        if EXACT:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:  # tanh, which Triton has only for some devices
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shares = tl.exp(scores - higher[:, None])
        shrunk = tl.exp(highest - higher)
        weight = weight * shrunk + tl.sum(shares, axis=1)
        total = total * shrunk[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
        highest = higher
    to = out + (row * HEADS + head * GROUP + g[:, None]) * WIDTH + d[None, :]
    tl.store(to, (total / weight[:, None]).to(out.dtype.element_ty), mask=mine)
