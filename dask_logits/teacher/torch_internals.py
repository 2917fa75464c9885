"""The private parts of torch that this package uses, each with a test. torch 2.13 has no public equivalents."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn


def strict_compiler(recompile_limit: int) -> AbstractContextManager[object]:
    """Make the compiler raise after this many recompilations of a function, instead of falling back to eager code."""
    import torch._dynamo

    patched: AbstractContextManager[object] = torch._dynamo.config.patch(
        recompile_limit=recompile_limit, fail_on_recompile_limit_hit=True
    )
    return patched


def constant_floats() -> AbstractContextManager[object]:
    """Make the compiler treat numbers as constants. A soft cap that is a variable of FlexAttention does not compile."""
    import torch._dynamo

    patched: AbstractContextManager[object] = torch._dynamo.config.patch(specialize_float=True)
    return patched


def uncompile(module: nn.Module) -> None:
    """Undo ``module.compile()``."""
    module._compiled_call_impl = None


def load_cpp(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Compile a C++ file with the compiler's own cache and load it.

    Raises
    ------
    torch._inductor.exc.InductorError, RuntimeError
        If there is no C++ compiler, or it fails.
    """
    from torch._inductor.codecache import CppCodeCache

    library: ctypes.CDLL = CppCodeCache.load(source.read_text(), extra_flags=tuple(flags))
    return library
