"""The private parts of torch that this package uses, each with a test. torch 2.13 has no public equivalents."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

_T = TypeVar("_T")
# The dynamic linker's message: file, reason.
_UNLOADABLE = re.compile(r"(\S+\.so): ")
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@contextlib.contextmanager
def strict_compiler(recompile_limit: int, *, may_time: bool = True) -> Iterator[None]:
    """Make the compiler raise after this many recompilations of a function, instead of falling back to eager code.

    Parameters
    ----------
    recompile_limit
        Maximum number.
    may_time
        Whether it may time several orders of a sum on a GPU and take the fastest one. Then the results of two
        processes can differ in their last bits.
    """
    import torch._dynamo
    import torch._inductor.config

    with (
        torch._dynamo.config.patch(recompile_limit=recompile_limit, fail_on_recompile_limit_hit=True),
        contextlib.nullcontext() if may_time else torch._inductor.config.patch(deterministic=True),
    ):
        yield


def grow_segments() -> None:
    """Have CUDA's allocator grow its memory segments, so that batches of many shapes leave no unusable gaps.

    torch reads ``PYTORCH_ALLOC_CONF`` when it is imported (2.13: ``BackendStaticInitializer`` in
    c10/cuda/CUDACachingAllocator.cpp), so it is too late to set it. A user who has set it has chosen. Under WSL 2 the
    driver refuses such segments (PyTorch 192330).
    """
    is_wsl = "microsoft" in platform.release().lower()
    if not is_wsl and not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def constant_floats() -> AbstractContextManager[object]:
    """Make the compiler treat numbers as constants. A soft cap that is a variable of FlexAttention does not compile."""
    import torch._dynamo

    patched: AbstractContextManager[object] = torch._dynamo.config.patch(specialize_float=True)
    return patched


def uncompile(module: nn.Module) -> None:
    """Undo ``module.compile()``."""
    module._compiled_call_impl = None


def remove_incomplete_code(error: BaseException) -> bool:
    """Remove compiled code that a killed process or a full disk left incomplete in the compiler's cache.

    The compiler writes a library in place, and takes any file of its name for a complete one ever after (torch 2.13).

    Parameters
    ----------
    error
        What using the compiled code raised.

    Returns
    -------
    bool
        Whether there was such code. Then it is worth another try.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    cause = getattr(error, "inner_exception", error)
    found = _UNLOADABLE.match(str(cause)) if isinstance(cause, (ImportError, OSError)) else None
    path = Path(found[1]) if found else None
    if path is None or Path(cache_dir()) not in path.parents or not path.exists():
        return False
    path.unlink()
    return True


def with_complete_code(function: Callable[[], _T]) -> _T:
    """Call a function that may compile, again whenever incomplete code was removed from the compiler's cache."""
    while True:
        try:
            return function()
        except Exception as error:
            if not remove_incomplete_code(error):
                raise


def load_cpp(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Compile a C++ file with the compiler's own cache and load it.

    Raises
    ------
    torch._inductor.exc.InductorError, RuntimeError
        If there is no C++ compiler, or it fails.
    """
    from torch._inductor.codecache import CppCodeCache

    library: ctypes.CDLL = with_complete_code(lambda: CppCodeCache.load(source.read_text(), extra_flags=tuple(flags)))
    return library
