"""What `registry diff` finds, against the products B A written out."""

import numpy as np
import pytest
from safetensors import TensorSpec, serialize

from loraplex_registry.diff import compare

from .conftest import Adapter, make_receipt


def updates(adapter: Adapter, scaling: float) -> dict[str, np.ndarray]:
    keys = sorted(key for key in adapter.tensors if "lora_A" in key)
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scaling
        * (adapter.tensors[key.replace("lora_A", "lora_B")] @ adapter.tensors[key])
        for key in keys
    }


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


def test_facts_that_differ_and_no_others(registry, base, tmp_path):
    registry.push("x", Adapter().write(tmp_path / "a", make_receipt(base)), base=base)
    better = make_receipt(base, metrics={"tag_f1": 0.9, "stop_rate": 1})
    registry.push("x", Adapter(rank=8, targets=("up_proj",)).write(tmp_path / "b", better), base=base)
    found = {change.what: (change.before, change.after) for change in compare(registry, "x:1", "x:2").changes}
    assert found["rank"] == (4, 8)
    assert found["config.r"] == (4, 8)
    assert found["targets"] == (("down_proj", "up_proj"), ("up_proj",))
    assert found["metrics.tag_f1"] == (0.75, 0.9)
    told = {"digest", "rank", "targets", "bytes", "config.r", "config.target_modules", "metrics.tag_f1"}
    assert set(found) == told | {"adapter_config.json", "adapter_model.safetensors", "receipt.json"}


def test_norms_and_cosines_are_those_of_the_products(registry, base, tmp_path):
    """Ranks, alphas and rsLoRA differ; a module that only one of them changes has no cosine."""
    one = Adapter(rank=4, config={"alpha_pattern": {"up_proj": 2}})
    other = Adapter(rank=2, targets=("up_proj", "q_proj"), seed=3, config={"use_rslora": True})
    for adapter in (one, other):
        registry.push("x", adapter.write(tmp_path / str(adapter.rank)), base=base)
    expected = updates(one, 8 / 4) | {k: v / 4 for k, v in updates(one, 8 / 4).items() if "up_proj" in k}
    others = updates(other, 8 / np.sqrt(2))
    found = {update.module: update for update in compare(registry, "x:1", "x:2").updates}
    assert sorted(found) == sorted({*expected, *others})
    for module, update in found.items():
        for norm, products in ((update.before, expected), (update.after, others)):
            assert (norm is None) == (module not in products)
            assert norm is None or norm == pytest.approx(np.linalg.norm(products[module]), rel=1e-5)
        both = module in expected and module in others
        assert (update.cosine is not None) == both == ("up_proj" in module)
        if both:
            assert update.cosine == pytest.approx(cosine(expected[module], others[module]), abs=1e-5)


def test_bfloat16_and_the_same_direction(registry, base, tmp_path):
    adapter = Adapter()
    registry.push("x", adapter.write(tmp_path / "a"), base=base)
    halves = {key: np.ascontiguousarray(value.view("<u2")[:, 1::2]) for key, value in adapter.tensors.items()}
    stored = {
        key: TensorSpec(dtype="bfloat16", shape=value.shape, data_ptr=value.ctypes.data, data_len=value.nbytes)
        for key, value in halves.items()
    }
    folder = adapter.write(tmp_path / "b")
    (folder / "adapter_model.safetensors").write_bytes(serialize(stored))
    registry.push("x", folder, base=base)
    found = compare(registry, "x:1", "x:2").updates
    assert all(update.cosine == pytest.approx(1, abs=1e-4) for update in found)
    assert all(update.after == pytest.approx(update.before, rel=1e-2) for update in found)


def test_the_same_weights_under_another_receipt(registry, base, tmp_path):
    registry.push("x", Adapter().write(tmp_path / "a", make_receipt(base)), base=base)
    registry.push("x", Adapter().write(tmp_path / "b", make_receipt(base, metrics={"tag_f1": 0.1})), base=base)
    found = compare(registry, "x:1", "x:2")
    assert [change.what for change in found.changes if change.what.startswith("metrics")] == [
        "metrics.tag_f1",
        "metrics.stop_rate",
    ]
    assert found.updates == ()
    assert compare(registry, "x:1", "x:1").changes == ()
