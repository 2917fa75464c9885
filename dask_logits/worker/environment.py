"""Software and hardware that determine the last bits of the targets, compared between workers.

Two workers give the same bits only with the same release of this package, of torch, transformers and tokenizers, and
with the same instruction set or GPU model. The release number is not sufficient, so the digest of the package's own
scoring sources identifies patched copies.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from dask_logits import __version__
from dask_logits.teacher.placement import require_gpu

Environment = Mapping[str, str]

# All modules that convert rows to stored targets.
_SOURCES = (
    "data/*.py",
    "teacher/**/*.py",
    "teacher/**/*.cpp",
    "worker/*.py",
    "records.py",
    "cache/profile.py",
    "cache/chunks.py",
)
_LIBRARIES = ("transformers", "tokenizers")
# Units used by oneDNN but not included in torch's capability.
_CPU_FLAGS = ("avx512_bf16", "amx_bf16")
_FIXES = {
    "cpu": "use machines with one instruction set, and unset ATEN_CPU_CAPABILITY",
    "gpu": "use GPUs of one model",
}
_CAPABILITY = ", compute capability "
# First compute capability with bfloat16 units.
_BFLOAT16 = (8, 0)
_INSTALL = "install the same packages on every machine"


@functools.cache
def _shared() -> dict[str, str]:
    from importlib.metadata import version

    return {
        "dask_logits": f"{__version__} (sources {_source_digest()[:12]})",
        "torch": torch.__version__,
        **{name: version(name) for name in _LIBRARIES},
    }


def environment(device: str) -> dict[str, str]:
    """Return the environment of this process for a device.

    Parameters
    ----------
    device
        ``cpu`` or ``cuda``.

    Returns
    -------
    dict
        Name → value: the packages, and ``cpu`` (architecture and instruction set) or ``gpu`` (model and compute
        capability).

    Raises
    ------
    TeacherError
        If this process sees no GPU, although the device is one.
    """
    if device == "cuda":
        require_gpu()
        major, minor = torch.cuda.get_device_capability()
        return {**_shared(), "gpu": f"{torch.cuda.get_device_name()}{_CAPABILITY}{major}.{minor}"}
    capability = torch.backends.cpu.get_cpu_capability()
    # If the user forces a lower capability, these units are unused.
    found = torch.cpu.get_capabilities() if capability.startswith("AVX512") else {}
    units = [flag for flag in _CPU_FLAGS if found.get(flag)]
    return {**_shared(), "cpu": " ".join([platform.machine(), capability, *units])}


def has_bfloat16(there: Environment) -> bool:
    """Whether the GPU of an environment has bfloat16 units. Older GPUs only emulate the type.

    >>> has_bfloat16({"gpu": "Tesla T4, compute capability 7.5"})
    False
    >>> has_bfloat16({"gpu": "NVIDIA H200, compute capability 9.0"})
    True
    """
    major, minor = there["gpu"].rpartition(_CAPABILITY)[2].split(".")
    return (int(major), int(minor)) >= _BFLOAT16


def gpus_in_use(n_gpus: int) -> tuple[str, ...]:
    """Return the model and UUID of the GPUs on which torch computes in this process, in its order.

    Parameters
    ----------
    n_gpus
        Number of GPUs of the worker. The first ones are used.

    Returns
    -------
    tuple of str
        Such as ``"NVIDIA H200 GPU-…"``. Fewer than `n_gpus` if fewer are visible.
    """
    found = [torch.cuda.get_device_properties(index) for index in range(min(n_gpus, torch.cuda.device_count()))]
    return tuple(f"{gpu.name} GPU-{gpu.uuid}" for gpu in found)


def differences(expected: Environment, got: Environment) -> dict[str, tuple[str, str]]:
    """Return the differences between two environments: name → (expected, got).

    >>> differences({"torch": "2.13.0", "cpu": "x86_64 AVX2"}, {"torch": "2.12.0", "cpu": "x86_64 AVX2"})
    {'torch': ('2.13.0', '2.12.0')}
    """
    names = sorted(expected.keys() | got.keys())
    pairs = {name: (expected.get(name, "none"), got.get(name, "none")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe(differing: Mapping[str, tuple[str, str]]) -> str:
    """Format differences for display.

    >>> describe({"torch": ("2.13.0", "2.12.0")})
    'torch: expected 2.13.0, got 2.12.0'
    """
    return "; ".join(f"{name}: expected {expected}, got {got}" for name, (expected, got) in differing.items())


def fix_for(names: Iterable[str]) -> str:
    """Return the remedy for differences of some names.

    >>> fix_for(["torch"])
    'install the same packages on every machine'
    """
    return "; ".join(dict.fromkeys(_FIXES.get(name, _INSTALL) for name in sorted(names)))


def _source_digest() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in package.glob(pattern)):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
