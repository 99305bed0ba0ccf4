"""A tiny base and two adapters for it, shared by the server's tests."""

from pathlib import Path

import pytest
from tiny import make_adapter, make_base


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory, base_folder) -> dict[str, Path]:
    """Different ranks, targets and scalings."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "red": make_adapter(root / "red", base_folder, rank=4, seed=1),
        "green": make_adapter(root / "green", base_folder, rank=8, targets=["q_proj", "v_proj"], seed=2, lora_alpha=64),
        "blue": make_adapter(root / "blue", base_folder, rank=2, targets=["down_proj"], seed=3, use_rslora=True),
        "head": make_adapter(root / "head", base_folder, rank=3, targets=["lm_head", "o_proj"], seed=4),
    }
