"""What memory a base and its adapters take, measured in a process of its own; the last line is JSON, in MiB.

Usage: memory.py base FOLDER                          stored and resident bytes of the base in an engine
       memory.py cycles FOLDER COUNT ADAPTER…         resident bytes after each of 20 parts of so many loads and unloads
"""

import json
import sys
from pathlib import Path

import torch
from bitsandbytes.nn.modules import Linear4bit
from systems import Ask, engine_for, ours

from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import load_base

MIB = 1 << 20


def stored(folder: Path) -> int:
    """Bytes of the base as bitsandbytes stores it: 4 bits with their double-quantized scales, the rest in 16."""
    model = load_base(str(folder)).model
    count = sum(parameter.nbytes for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            state = layer.weight.quant_state
            count += state.absmax.nbytes + state.state2.absmax.nbytes
    return count


def resident() -> int:
    """Bytes of this process that are its own: RssAnon."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def base(folder: Path) -> list[float]:
    """Stored, and what the process grew by when the base was loaded and had answered; the cache of keys counts not."""
    count = stored(folder)
    engine = engine_for(folder, {}, max_rows=1, kv_cache_bytes=1 << 22)  # libraries have their memory by now
    ours(engine, [Ask([5, 6, 7] * 40, None, 4), Ask([5], None, 4)])
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(engine)}
    return [count / MIB, sum(tensors.values()) / MIB]


def _tensors(engine: Engine) -> list[torch.Tensor]:
    model = engine.base.model
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        found += vars(module).get("kernel_tensors", ())
    return [tensor for tensor in found if tensor is not None]


def cycles(folder: Path, count: int, adapters: list[Path]) -> list[float]:
    """Each cycle brings one adapter from disk to the device, answers with it, and unloads it."""
    engine = engine_for(folder, {str(path): path for path in adapters}, max_rows=4)
    found = []
    for number in range(count):
        key = str(adapters[number % len(adapters)])
        ours(engine, [Ask([5], key, 1)])
        engine.residency.unload(key)
        assert not engine.residency.in_host
        if number % max(1, count // 20) == 0:
            found.append(resident() / MIB)
            print(f"{number} of {count}: {found[-1]:.0f} MiB", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    what, folder, *more = sys.argv[1:]
    result = base(Path(folder)) if what == "base" else cycles(Path(folder), int(more[0]), [Path(m) for m in more[1:]])
    print(json.dumps(result))
