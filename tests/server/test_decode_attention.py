"""Attention of a decode step: the gathering way against torch's own attention, and the Triton kernel against both."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from loraplex_server.engine.attention import KVTensors
from loraplex_server.engine.decode_attention import DecodeStep, by_gathering

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 5, 16, 17, 63, 64, 65, 150]
PAGE = 16


def case(heads, kv_heads, width, dtype):
    """Rows of many lengths, their pages in disorder, and memory that nobody has written full of NaN."""
    random = torch.Generator().manual_seed(0)
    most = -(-max(LENGTHS) // PAGE)
    pages = torch.randperm(len(LENGTHS) * most, generator=random)
    kv = KVTensors.__new__(KVTensors)
    kv.keys = [torch.full((len(pages) * PAGE + 1, kv_heads, width), float("nan"), dtype=dtype)]
    kv.values = [kv.keys[0].clone()]
    tables = torch.zeros(len(LENGTHS), most, dtype=torch.int32)
    written = torch.empty(len(LENGTHS), dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        own = pages[row * most : row * most + -(-length // PAGE)]
        tables[row, : len(own)] = own.int()
        slots = (own[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length]
        kv.keys[0][slots] = torch.randn(length, kv_heads, width, generator=random).to(dtype)
        kv.values[0][slots] = torch.randn(length, kv_heads, width, generator=random).to(dtype)
        written[row] = slots[-1]
    kv.keys, kv.values = [kv.keys[0].to(DEVICE)], [kv.values[0].to(DEVICE)]
    query = torch.randn(len(LENGTHS), heads, width, generator=random).to(dtype).to(DEVICE)
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    return query, DecodeStep(kv, written.to(DEVICE), tables.to(DEVICE), lengths, PAGE)


def formula(query, step, scale, window, softcap):
    """Row by row in float64."""
    rows = []
    for row, length in enumerate(step.lengths.tolist()):
        slots = (step.tables[row].long()[:, None] * PAGE + torch.arange(PAGE, device=DEVICE)).flatten()[:length]
        slots = slots[-window:] if window else slots
        group = query.shape[1] // step.kv.keys[0].shape[1]
        k = step.kv.keys[0][slots].repeat_interleave(group, 1).double().transpose(0, 1)  # (heads, seen, width)
        v = step.kv.values[0][slots].repeat_interleave(group, 1).double().transpose(0, 1)
        q = query[row, :, None].double()
        if softcap:
            scores = softcap * torch.tanh(q @ k.transpose(1, 2) * scale / softcap)
            rows.append((scores.softmax(-1) @ v)[:, 0])
        else:
            rows.append(scaled_dot_product_attention(q, k, v, scale=scale)[:, 0])
    return torch.stack(rows)


SHAPES = [(4, 2, 16), (4, 4, 64), (6, 1, 48), (32, 1, 8)]
SCORES = [(0, 0.0), (1, 0.0), (20, 0.0), (0, 5.0), (64, 5.0)]


@pytest.mark.parametrize(("window", "softcap"), SCORES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_gathering_gives_attention_of_each_row_over_its_own_pages(heads, kv_heads, width, window, softcap):
    query, step = case(heads, kv_heads, width, torch.float32)
    out = by_gathering(query, step.kv.keys[0], step.kv.values[0], step, 0.3, window, softcap)
    torch.testing.assert_close(out.double(), formula(query, step, 0.3, window, softcap), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "dtype", "window", "softcap"),
    [
        *((*shape, torch.float32, 0, 0.0) for shape in SHAPES),
        *((*SHAPES[0], torch.float32, *score) for score in SCORES[1:]),
        *((*SHAPES[2], dtype, *score) for dtype in (torch.bfloat16, torch.float16) for score in SCORES[:4:3]),
    ],
)
def test_the_kernel_gives_the_same(heads, kv_heads, width, dtype, window, softcap):
    pytest.importorskip("triton", reason="pip install 'loraplex[kernels]'; scripts/test does")
    from loraplex_server.engine.attention_kernel import attend

    query, step = case(heads, kv_heads, width, dtype)
    apart = torch.empty(heads, len(LENGTHS), width, dtype=dtype, device=DEVICE).transpose(0, 1)
    query = apart.copy_(query)  # as the layer hands it over: rows and heads the other way round in memory
    out = attend(query, step.kv.keys[0], step.kv.values[0], step.tables, step.lengths, PAGE, 0.3, window, softcap)
    assert out.is_contiguous() and out.dtype == dtype
    # A share of the softmax and a result are rounded to the dtype; the rest is float32.
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), formula(query, step, 0.3, window, softcap), rtol=tolerance, atol=tolerance)
