"""How a base is loaded: what it computes in on which device."""

from types import SimpleNamespace

import pytest
import torch

from loraplex_server.engine.model import _compute_dtype


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16(monkeypatch, major, dtype):
    """Turing (7.5) makes bfloat16 tensors, which torch calls support unless asked not to."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert _compute_dtype("auto", torch.device("cuda")) == dtype
