"""The C kernels for CPUs with AMX or AVX-512 BF16: built once with the machine's own compiler, then kept. No models.

Nothing needs them: on another CPU or without a compiler the engine computes the same through torch and bitsandbytes,
more slowly.
"""

import ctypes
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from platformdirs import user_cache_path

_HERE = Path(__file__).parent
_SOURCES = (
    "init.c",
    "linear.c",
    "nf4_grad.c",
    "attention.c",
    "attention_grad.c",
    "pointwise.c",
    "loss.c",
    "load.c",
)
# OpenMP is left unresolved: it is found in the library that torch has loaded, so that both share one team of threads.
_COMPILE = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-mfma")


@dataclass(frozen=True)
class Kind:
    """The kernels for one kind of CPU."""

    name: str
    flags: tuple[str, ...]  # of the CPU, as Linux names them; as the compiler does, with - or nothing in place of _

    @property
    def compile(self) -> tuple[str, ...]:
        """The compiler's options."""
        features = (flag.replace("avx512_", "avx512").replace("_", "-") for flag in self.flags)
        return (*_COMPILE, *(f"-m{feature}" for feature in features))


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16")
KINDS = (Kind("AMX", (*_AVX512, "amx_tile", "amx_bf16")), Kind("AVX-512", _AVX512))  # the faster first

_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_LORA = [_P, _L, _P, _P, _P, _P, _L]
_ARGUMENTS = {
    "nf4_linear": [_P] * 6 + [_L] * 3 + _LORA,
    "nf4_grad": [_P] * 7 + [_L] * 4,
    "lora_add": [_P] * 2 + [_L] * 3 + _LORA,
    "attend": [_P] * 7 + [_L] * 5 + [_F],
    "rms_norm": [_P] * 3 + [_L] * 2 + [_F],
    "silu_mul": [_P] * 3 + [_L],
    "rms_norm_grad": [_P] * 4 + [_L] * 2 + [_F],
    "silu_mul_grad": [_P] * 5 + [_L],
    "causal": [_P] * 6 + [_L] * 5 + [_F],
    "causal_grad": [_P] * 10 + [_L] * 5 + [_F],
    "rotate": [_P] * 4 + [_L] * 3 + [ctypes.c_int],
    "label_loss": [_P] * 3 + [_L] * 2 + [ctypes.c_int],
    "load_bf16": [ctypes.c_int, _P, _L] + [_P] * 5,
}
_RESULTS = {"load_bf16": _L}


@dataclass(frozen=True)
class Native:
    """The kernels, or why there are none."""

    library: ctypes.CDLL | None
    why_not: str = ""
    name: str = ""  # for people

    def __bool__(self) -> bool:
        return self.library is not None


class NoCompiler(FileNotFoundError):
    """There is nothing to build the kernels with."""


@cache
def native() -> Native:
    """The fastest kernels that this machine can run, built if they were not yet (a few seconds)."""
    flags, found = _cpu_flags(), Native(None, "this CPU has no AVX-512 BF16")
    for kind in KINDS:
        if flags.issuperset(kind.flags) and (found := _loaded(kind)):
            break
    return found


def _loaded(kind: Kind) -> Native:
    try:
        library = ctypes.CDLL(str(_built(kind)))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return Native(None, f"the {kind.name} kernels cannot be had: {said.strip().splitlines()[0]}")
    if library.request_tiles():
        return Native(None, "the system does not let this process use AMX")
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, _RESULTS.get(name)
    return Native(library, name=f"{kind.name} kernels")


def build(kind: Kind, into: Path) -> Path:
    """Compile the kernels into a folder; what is there under the name of the same sources is left as it is.

    Raises:
        NoCompiler: there is no C compiler.
        OSError: the folder cannot be written.
        subprocess.CalledProcessError: it refused; ``stderr`` says why.
    """
    built = into / _name(kind)
    if built.exists():
        return built
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise NoCompiler("there is no C compiler (gcc) to build them with")
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into) as folder:
        whole, compiled, linked = (Path(folder) / name for name in ("kernels.c", "kernels.o", "kernels.so"))
        whole.write_text("".join(f'#include "{_HERE / name}"\n' for name in _SOURCES))
        for command in ([*kind.compile, "-c", whole, "-o", compiled], ["-shared", compiled, "-lm", "-o", linked]):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True)
        linked.replace(built)  # whoever builds at the same time builds the same
    return built


def addresses(*tensors: torch.Tensor | None) -> list[int]:
    """Where tensors lie; 0 for None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _built(kind: Kind) -> Path:
    """Beside the sources, where an image's build leaves it, or in the user's cache."""
    beside = _HERE / _name(kind)
    if beside.exists():
        return beside
    return build(kind, user_cache_path("loraplex") / "kernels")  # RuntimeError: the user has no home


def _name(kind: Kind) -> str:
    digest = hashlib.sha256(" ".join(kind.compile).encode())
    for source in sorted(_HERE.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return f"loraplex-{digest.hexdigest()[:16]}.so"


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def build_for_image() -> tuple[int, str]:
    """Leave the kernels beside the sources, whatever CPU this runs on. Returns an exit code and what to say.

    Where there can be none, on another architecture or without a compiler, that is said and is no failure.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return 0, f"no kernels were built: they are for x86-64, and this is {platform.machine()}"
    try:
        return 0, "\n".join(str(build(kind, _HERE)) for kind in KINDS)
    except NoCompiler as error:
        return 0, f"no kernels were built: {error}"
    except subprocess.CalledProcessError as error:
        return 1, f"the kernels could not be built:\n{error.stderr}"


if __name__ == "__main__":
    code, said = build_for_image()
    print(said)  # noqa: T201
    sys.exit(code)
