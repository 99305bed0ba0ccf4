"""Small modules are replaced by kernels where they give the same, whatever they are called, and nowhere else."""

import pytest
import torch
from tiny import make_base

from loraplex_server.engine.fused import fuse
from loraplex_server.engine.model import load_base
from loraplex_server.kernels.native import native

pytestmark = pytest.mark.skipif(not native(), reason=f"{native().why_not}; gcc comes with: apt-get install gcc")


def load(tmp_path, family):
    return load_base(str(make_base(tmp_path / family, family)), quantization="none", device="cpu", dtype="bfloat16")


def replaced(model) -> set[str]:
    return {name.split(".")[-1] for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"input_layernorm", "post_attention_layernorm", "norm", "mlp"}),
        ("qwen3", {"input_layernorm", "post_attention_layernorm", "norm", "mlp", "q_norm", "k_norm"}),
        ("phi3", {"input_layernorm", "post_attention_layernorm", "norm"}),
        ("gemma2", set()),  # its norms multiply by 1 + weight, and its activation is a GELU
        ("gpt2", set()),
    ],
)
@torch.no_grad()
def test_the_logits_stay(tmp_path, family, expected):
    model = load(tmp_path, family).model
    ids = torch.tensor([[5, 60, 7, 200, 9, 33, 100]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:  # ones would hide a weight that is not used
                parameter.uniform_(0.5, 2)
    before = model(ids).logits.float()
    fuse(model)
    assert replaced(model) == expected
    after = model(ids).logits.float()
    torch.testing.assert_close(after, before, rtol=0, atol=0.03 * float(before.abs().max()))


@torch.no_grad()
def test_extreme_values_are_torch_s(tmp_path):
    model = load(tmp_path, "llama").model
    x = torch.tensor([-1e4, -90, -87, -20, -1, -1e-3, 0, 1e-3, 1, 20, 88, 3e4] * 4).bfloat16()
    out, up = torch.empty_like(x), torch.ones_like(x)
    native().library.silu_mul(out.data_ptr(), x.data_ptr(), up.data_ptr(), len(x))
    expected = torch.nn.functional.silu(x.float()).bfloat16()
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-30)
    fuse(model)
    tiny, large = torch.full((1, 1, 64), 1e-20).bfloat16(), torch.full((1, 1, 64), 1e18).bfloat16()
    for value in (tiny, large, torch.zeros(1, 1, 64).bfloat16()):
        assert model.model.norm(value).isfinite().all()
