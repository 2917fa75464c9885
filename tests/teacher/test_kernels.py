"""The Triton kernels compile for GPUs, ahead of time and without one."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import warm

pytest.importorskip("triton")

COMPILE = """
import json, subprocess, sys, tempfile, time
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dask_logits.teacher.cuda import kernels

capability = int(sys.argv[1])
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
statistics = {
    "logits": None, "maxima": "*fp32", "sums": "*fp32", "bases": "*fp32", "blocks": "i32", "scale": "fp32",
    "softcap": "fp32", "EACH": "constexpr", "WIDTH": "constexpr",
}
largest = {"values": "*fp32", "places": "*i32", "width": "i32", "count": "i32", "LANES": "constexpr"}
wide = {"EACH": kernels._BLOCKS_EACH, "WIDTH": kernels.BLOCK}
jobs = [(f"statistics {dtype}", kernels._statistics_kernel(), {**statistics, "logits": dtype}, wide, 4, 4)
        for dtype in ("*fp32", "*bf16", "*fp16")]
jobs += [(f"largest {lanes}", kernels._largest_kernel(), largest, {"LANES": lanes}, 2, kernels.warps_for(lanes))
         for lanes in (64, 2048, kernels.MOST_VALUES)]
# As in the first check of a device. Triton makes constants of sizes of 1.
jobs += [
    ("statistics once", kernels._statistics_kernel(), {**statistics, "logits": "*fp32", "blocks": "constexpr"},
     {**wide, "blocks": 1}, 4, 4),
    ("largest once", kernels._largest_kernel(), {**largest, "width": "constexpr", "count": "constexpr"},
     {"LANES": 1, "width": 1, "count": 1}, 2, kernels.warps_for(1)),
]
for name, kernel, signature, constants, pointers, warps in jobs:
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(pointers)}
    started = time.perf_counter()
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    seconds = time.perf_counter() - started
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(json.dumps({"name": name, "seconds": seconds, "usage": usage}))
"""


@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_kernels_compile_without_spills(capability: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = warm.run([sys.executable, "-c", COMPILE, str(capability)], env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 8
    for kernel in found:
        ((registers, stack, spilled),) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", kernel["usage"])
        assert (int(spilled), int(stack) <= 64) == (0, True), kernel
        assert int(registers) <= 128, kernel
        # It takes a second on an idle core.
        assert kernel["seconds"] < 60, kernel
