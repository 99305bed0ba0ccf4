"""The C kernels: what each computes, against torch; and that they are built, kept, and missed in plain words."""

import errno
import os
import re
import resource
import shutil
import subprocess
from ctypes import addressof, c_double
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_registry.tensors import read_header
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.errors import AdapterRefused
from loraplex_server.engine.lora import Along, Segment
from loraplex_server.engine.lora_table import LoraTable
from loraplex_server.engine.model import load_base
from loraplex_server.engine.native_lora import NativeLora
from loraplex_server.kernels import native as module
from loraplex_server.kernels.native import KINDS, Native, addresses, build, native

needs_kernels = pytest.mark.skipif(not native(), reason=f"{native().why_not}; gcc comes with: apt-get install gcc")


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_kernels
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (96, 192), (2048, 256)])
def test_lora_of_many_adapters_is_what_each_gives_alone(inputs, outputs):
    ranks, scalings = [1, 7, 16, 256, 0], [0.5, 2.0, 1.0, 0.1, 9.0]
    weights = [(random(r, inputs, seed=r) / 8, random(outputs, r, seed=r + 1) / 8) for r in ranks]
    pointers = [torch.tensor([w[i].data_ptr() for w in weights]) for i in range(2)]
    table = LoraTable(*pointers, torch.tensor(ranks, dtype=torch.int32), torch.tensor(scalings), torch.bfloat16, 256)
    counts = [(-1, 2), (0, 1), (1, 3), (2, 9), (-1, 1), (3, 4), (4, 2), (0, 5)]
    segments, first = [], 0
    for slot, tokens in counts:
        segments.append(Segment(None if slot < 0 else str(slot), slot, first, first + tokens))
        first += tokens
    x, before = random(1, first, inputs, seed=3), random(1, first, outputs, seed=4)
    expected = before.float()
    out = NativeLora().apply(lambda _: before.clone(), x, Along(segments), table)
    for _, slot, start, stop in segments:
        if slot >= 0:
            a, b = weights[slot]
            expected[0, start:stop] += scalings[slot] * (x[0, start:stop].float() @ a.float().T) @ b.float().T
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))
    untouched = [t for _, slot, start, stop in segments if slot in (-1, 4) for t in range(start, stop)]
    assert torch.equal(out[0, untouched], before[0, untouched])
    for _, slot, start, stop in segments:  # the same bits alone
        if slot >= 0:
            part, along = before[:, start:stop].clone(), Along([Segment("x", slot, 0, stop - start)])
            alone = NativeLora().apply(lambda _, part=part: part, x[:, start:stop], along, table)
            assert torch.equal(alone, out[:, start:stop])


@needs_kernels
def test_an_adapter_that_overflows_spoils_its_own_tokens_only():
    table = LoraTable.empty(2, torch.bfloat16, 16, torch.device("cpu"))
    weights = [(random(16, 64), random(32, 16)), (torch.full((16, 64), 3e38).bfloat16(), random(32, 16, seed=2))]
    for slot, (a, b) in enumerate(weights):
        table.a[slot], table.b[slot], table.rank[slot], table.scaling[slot] = *addresses(a, b), 16, 1
    x, before = random(1, 8, 64, seed=3), random(1, 8, 32, seed=4)
    kernel = NativeLora()
    beside = kernel.apply(lambda _: before.clone(), x, Along([Segment("0", 0, 0, 4), Segment("1", 1, 4, 8)]), table)
    alone = kernel.apply(lambda _: before[:, :4].clone(), x[:, :4], Along([Segment("0", 0, 0, 4)]), table)
    assert torch.equal(beside[:, :4], alone)
    assert not beside[:, 4:].isfinite().any()


@needs_kernels
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 32), (8, 2, 64), (6, 1, 96)])
def test_attention_over_paged_keys_is_torch_s(heads, kv_heads, width):
    lengths = [1, 5, 40, 17]
    keys, values = random(64, kv_heads, width, seed=1), random(64, kv_heads, width, seed=2)
    query, tokens = random(9, heads, width, seed=3), torch.tensor([7, 0, 3, 4])
    contexts = [torch.randperm(64, generator=torch.Generator().manual_seed(n))[:n] for n in lengths]
    slots = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True, padding_value=2**40)
    seen_tokens = torch.tensor(lengths)
    out = torch.full_like(query, 9)
    native().library.attend(
        *addresses(out, query, keys, values, slots, seen_tokens, tokens), 4, max(lengths), heads, kv_heads, width, 0.1
    )
    for token, seen in zip(tokens, contexts, strict=True):
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[token][:, None].float(),
            keys[seen].transpose(0, 1).float(),
            values[seen].transpose(0, 1).float(),
            scale=0.1,
            enable_gqa=True,
        )[:, 0]
        torch.testing.assert_close(out[token].float(), expected, rtol=2**-7, atol=2**-7)
    assert (out[[1, 2, 5, 6, 8]] == 9).all(), "other tokens are left alone"


@needs_kernels
def test_they_are_built_once(tmp_path, monkeypatch):
    first, second = (build(kind, tmp_path) for kind in KINDS)
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}, "nothing is left beside them"
    monkeypatch.setattr(module.shutil, "which", lambda name: pytest.fail("it asked for a compiler again"))
    assert [build(kind, tmp_path) for kind in KINDS] == [first, second]


@needs_kernels
def test_where_the_system_withholds_amx_the_others_serve(monkeypatch):
    withheld = Native(None, "the system does not let this process use AMX")
    loaded = module._loaded
    monkeypatch.setattr(module, "_cpu_flags", lambda: set(KINDS[0].flags))
    monkeypatch.setattr(module, "_loaded", lambda kind: withheld if kind.name == "AMX" else loaded(kind))
    assert native.__wrapped__().name == "AVX-512 kernels"


def test_a_cpu_of_another_kind_has_none(monkeypatch):
    monkeypatch.setattr(module, "_cpu_flags", lambda: {"avx2", "avx512f", "amx_tile"})
    found = native.__wrapped__()
    assert (bool(found), found.why_not) == (False, "this CPU has no AVX-512 BF16")


@pytest.fixture
def unbuilt(monkeypatch):
    """A machine with AMX where the kernels are not beside the sources."""
    monkeypatch.setattr(module, "_name", lambda kind: f"loraplex-unbuilt-{kind.name}.so")
    monkeypatch.setattr(module, "_cpu_flags", lambda: set(KINDS[0].flags))


@pytest.mark.parametrize("compiler", [None, "false"])
def test_without_a_compiler_that_works_there_are_none_and_the_reason_is_told(tmp_path, monkeypatch, compiler, unbuilt):
    monkeypatch.setattr(module.shutil, "which", lambda name: compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises((FileNotFoundError, subprocess.CalledProcessError)):
        build(KINDS[0], tmp_path)
    assert list(tmp_path.iterdir()) == []
    found = native.__wrapped__()
    assert not found and ("gcc" in found.why_not or "false" in found.why_not)


@needs_kernels
@torch.no_grad()
def test_a_4_bit_layer_adds_the_same_as_any_other(base_folder):
    """It adds to its sums before they are rounded; other layers are added to afterwards."""
    base = load_base(str(base_folder), device="cpu")
    Engine(base)
    layer = base.model.model.layers[0].mlp.down_proj
    slots, tokens = [2, 0, -1, 1, 0], [3, 140, 2, 17, 1]  # a run across the rows that the kernel takes at once
    inputs, outputs = layer.in_features, layer.out_features
    weights = [(random(rank, inputs, seed=rank) / 8, random(outputs, rank, seed=9) / 8) for rank in (5, 16, 64)]
    table = LoraTable.empty(3, torch.bfloat16, 64, torch.device("cpu"))
    for slot, (a, b) in enumerate(weights):
        table.a[slot], table.b[slot], table.rank[slot], table.scaling[slot] = *addresses(a, b), len(a), 0.5
    starts = torch.tensor([0, *tokens]).cumsum(0).tolist()
    segments = [Segment(str(s), s, *ends) for s, ends in zip(slots, pairwise(starts), strict=True)]
    along, x = Along(segments), random(1, starts[-1], inputs, seed=1)
    fused = NativeLora().apply(layer, x, along, table)
    afterwards = NativeLora().apply(layer.forward, x, along, table)
    torch.testing.assert_close(fused, afterwards, rtol=2**-6, atol=2**-7 * float(afterwards.abs().max()))
    assert not torch.equal(fused, layer(x))
    for slot, first, last in [(s.slot, s.first, s.last) for s in segments]:
        alone = Along([Segment(None, slot, 0, last - first)])
        assert torch.equal(NativeLora().apply(layer, x[:, first:last], alone, table), fused[:, first:last])


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_without_a_folder_to_keep_them_in_the_server_goes_on(tmp_path, monkeypatch, error, unbuilt):
    """A container's root file system may be read-only; root, as tests may run, is denied nothing for real."""

    def denied(*args, **kwargs):
        raise error

    monkeypatch.setattr(module.shutil, "which", lambda name: "gcc")
    monkeypatch.setattr(module.Path, "mkdir", denied)
    found = native.__wrapped__()
    assert not found and error.strerror in found.why_not


def test_a_file_where_the_folder_should_be(tmp_path, monkeypatch, unbuilt):
    (tmp_path / "loraplex").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module.shutil, "which", lambda name: "gcc")
    found = native.__wrapped__()
    assert not found and str(tmp_path) in found.why_not


def test_a_user_without_a_home(tmp_path, monkeypatch, unbuilt):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it does where nobody has that user's number
    found = native.__wrapped__()
    assert not found and "home directory" in found.why_not
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("machine", "compiler", "status", "said"),
    [
        ("aarch64", "", 0, "no kernels were built: they are for x86-64, and this is aarch64"),
        ("x86_64", "", 0, "no kernels were built: there is no C compiler"),
        ("x86_64", "echo no such option >&2; exit 1", 1, "the kernels could not be built:\nno such option"),
    ],
)
def test_an_images_build_fails_only_where_it_should_have_worked(
    tmp_path, monkeypatch, unbuilt, machine, compiler, status, said
):
    if compiler:
        (tmp_path / "gcc").write_text(f"#!/bin/sh\n{compiler}\n")
        (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    code, told = module.build_for_image()
    assert code == status
    assert told.startswith(said)


@pytest.mark.skipif(not shutil.which("gcc"), reason="apt-get install gcc")
def test_an_images_build_needs_no_cpu_that_can_run_them(tmp_path, monkeypatch):
    """Beside a copy of the sources, so that nothing is left in this checkout."""
    shutil.copytree(module._HERE, tmp_path / "kernels", ignore=shutil.ignore_patterns("*.so"))
    monkeypatch.setattr(module, "_HERE", tmp_path / "kernels")
    monkeypatch.setattr(module, "_cpu_flags", set)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    code, said = module.build_for_image()
    assert (code, len(said.splitlines())) == (0, len(KINDS))
    for kind, built in zip(KINDS, said.splitlines(), strict=True):
        assert module._built(kind) == Path(built), "found beside the sources, and not built again"


def file_of(tmp_path, tensors) -> tuple[Path, torch.Tensor]:
    """A safetensors file, and the table that load_bf16 reads it by."""
    save_file(tensors, tmp_path / "some.safetensors")
    header = read_header(tmp_path / "some.safetensors")
    kinds = {"F32": 0, "F16": 1, "BF16": 2}
    rows = [(info.begin, prod(info.shape), kinds[info.dtype]) for info in header.values()]
    starts = [0, *accumulate(count for _, count, _ in rows)][:-1]
    return tmp_path / "some.safetensors", torch.tensor([*zip(*rows, strict=True), starts])


def load_bf16(file, table, share=1.0) -> tuple[int, torch.Tensor]:
    out = torch.full((int(table[1].sum()) + 1,), 7.0).bfloat16()  # one more, which must stay
    with file.open("rb") as stream:
        arguments = stream.fileno(), *addresses(out), table.shape[1], *addresses(*table), addressof(c_double(share))
        return native().library.load_bf16(*arguments), out


@needs_kernels
def test_a_file_is_rounded_as_torch_rounds_it(tmp_path):
    """Every 16 bits there are, the ties between two of them, and more values than are read at a time."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    bfloat, half = every.view(torch.bfloat16), every.view(torch.float16)
    halfway = torch.arange(1 << 16).repeat_interleave(3) * 65536 + torch.tensor([0x7FFF, 0x8000, 0x8001]).repeat(
        1 << 16
    )
    halfway = halfway.to(torch.uint32).view(torch.float32)
    tensors = {
        "a": random(3), "b": random(70_001).float() / 3, "c": bfloat[bfloat.isfinite()], "d": half[half.isfinite()],
        "e": halfway[halfway.bfloat16().isfinite()],
    }  # fmt: skip
    failed, out = load_bf16(*file_of(tmp_path, tensors))
    expected = [
        load_file(tmp_path / "some.safetensors")[name].bfloat16() for name in read_header(tmp_path / "some.safetensors")
    ]
    assert failed == 0
    assert torch.equal(out.view(torch.int16), torch.cat([*expected, torch.tensor([7.0]).bfloat16()]).view(torch.int16))


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_a_tensor_that_is_not_finite_is_named(tmp_path, value):
    tensors = {f"t{i}": random(40).float() for i in range(5)}
    tensors["t3"][39] = value
    file, table = file_of(tmp_path, tensors)
    assert load_bf16(file, table)[0] == -1 - [*read_header(file)].index("t3")


@needs_kernels
def test_who_may_take_a_share_of_the_time_rests_in_between(tmp_path):
    """Some twenty milliseconds of work, in turns of half a one: counted in rests, since time depends on the machine."""
    file, table = file_of(tmp_path, {"t": random(1 << 24).float()})

    def rests(share) -> tuple[int, torch.Tensor]:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        failed, out = load_bf16(file, table, share)
        assert failed == 0
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before, out

    (all_the_time, expected), (seldom, out) = rests(1.0), rests(0.5)
    assert seldom > all_the_time + 10
    assert torch.equal(out, expected)


@needs_kernels
def test_a_file_that_became_shorter_is_an_error(tmp_path):
    file, table = file_of(tmp_path, {"t": random(40).float()})
    os.truncate(file, file.stat().st_size - 1)
    assert load_bf16(file, table)[0] == errno.EIO


@needs_kernels
def test_an_adapter_of_nan_is_refused_with_the_tensors_name(base_folder, adapter_folders, tmp_path):
    shutil.copytree(adapter_folders["red"], folder := tmp_path / "nan")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(key for key in tensors if "lora_B" in key)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    engine = Engine(load_base(str(base_folder), device="cpu"))
    with pytest.raises(AdapterRefused, match=f"{re.escape(name)} holds NaN"):
        engine.add_adapter("nan", folder)
