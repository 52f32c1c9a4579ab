"""What the compiler makes of every Triton kernel, read from machine code; no GPU is needed.

    python benchmarks/machine_code.py --json FILE [--csv FILE] [--arch 90] [--head 32]

The launchers run as on a GPU, on operands of the shapes below, but each kernel is only compiled. A
row per kernel, architecture and case:

    registers, stack_bytes, spill_bytes, shared_bytes   of one thread; of one block
    warps                                               resident on an SM, by those: an estimate
    tensor_core                                         HMMA / HGMMA / tcgen05 instructions
    load_bytes                                          narrowest load of a q, k, v or dO tile
    per_element     instructions per score: of the loop without a mask, or of the whole kernel where
                    it has no loop, over BLOCK_M * BLOCK_N / threads
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tinybert_fast.benchmarks.hardware import facts
from tinybert_fast.data.atomic import atomic_write

ARCHITECTURES = (80, 90, 100)
HEADS = (26, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16)
DROPOUT = (0.0, 0.1)
LONGEST = (64, 128, 512)  # one of each bucket of kernels/configs.py
MODEL_HEADS = 12  # so that rows are as far apart as in BERT

KERNELS = {  # kernel -> (op, pass)
    "_forward_kernel": ("attention", "forward"),
    "_one_tile_kernel": ("attention", "backward, one tile"),
    "_dq_kernel": ("attention", "backward, dq"),
    "_dkdv_kernel": ("attention", "backward, dk and dv"),
}

# Of one SM: NVIDIA's CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SM_REGISTERS = 65536
SM_WARPS = 64
SM_SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
BLOCK_RESERVED_BYTES = 1024  # shared memory that each block takes for the system
REGISTER_UNIT = 8  # a thread's registers are given out in eights

TABLE_WIDTH = 220  # columns

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
SPILL = re.compile(r"\bSTL(?:\.(64|128))?\b")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
BACKWARDS = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
TILE_LOAD = re.compile(
    r"(?:tt\.load|ttg\.async_copy_global_to_local).*"
    r" : tensor<\d+x\d+x!tt\.ptr<(?:f16|bf16|f32)>, (#\w+)>"
)
LAYOUT = re.compile(r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[1, (\d+)\]", re.MULTILINE)


class Compiled(NamedTuple):
    """A kernel as a launcher asked for it."""

    kernel: str
    code: Any  # triton's CompiledKernel
    constants: dict[str, Any]


class _Target:
    """Stands in for Triton's driver of a GPU: it names the architecture and runs nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(arch: int) -> Iterator[list[Compiled]]:
    """Inside, launches compile for sm_``arch`` instead, and are listed."""
    from tinybert_fast.kernels import configs

    found: list[Compiled] = []
    run, family, active = JITFunction.run, configs.family, driver._active

    def compile_only(self, *args, grid, warmup, **constants):
        code = run(self, *args, grid=grid, warmup=True, **constants)
        found.append(Compiled(self.__name__, code, constants))
        return code

    JITFunction.run = compile_only
    configs.family = lambda device: arch
    driver.set_active(_Target(arch))
    try:
        yield found
    finally:
        JITFunction.run, configs.family = run, family
        driver._active = active  # reset_active() would look for a GPU


def attention_kernels(
    arch: int, head: int, dtype: torch.dtype, dropout_p: float, longest: int
) -> list[Compiled]:
    """Forward and backward of one call."""
    from tinybert_fast.kernels import attention

    q, k, v, grad = (torch.zeros(longest, MODEL_HEADS, head, dtype=dtype) for _ in range(4))
    seed = torch.zeros(2, dtype=torch.int64) if dropout_p else None
    cu_seqlens = torch.tensor([0, longest], dtype=torch.int32)
    call: tuple = (cu_seqlens, None, longest, head**-0.5, "both", dropout_p, seed, 0, [])
    with compiling_for(arch) as found:
        out, lse, rng = attention.forward(q, k, v, *call)
        attention.backward(grad, q, k, v, out, lse, rng, *call)
    return found


def row(compiled: Compiled, arch: int, dtype: torch.dtype) -> dict[str, Any]:
    """The figures of one kernel."""
    constants, code = compiled.constants, compiled.code
    usage, sass = _disassemble(code.asm["cubin"])
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"{CUOBJDUMP} says nothing of registers: {usage!r}")
    registers, stack = (int(n) for n in numbers.groups())
    threads = 32 * constants["num_warps"]
    op, which = KERNELS[compiled.kernel]
    return {
        "op": op,
        "pass": which,
        "arch": f"sm_{arch}",
        "head_dim": constants["D"],
        "dtype": str(dtype).removeprefix("torch."),
        "dropout": constants["DROPOUT"],
        "tile": f"{constants['BLOCK_M']}x{constants['BLOCK_N']}",
        "num_warps": constants["num_warps"],
        "num_stages": constants["num_stages"],
        "registers": registers,
        "spill_bytes": sum(int(width or 32) // 8 for width in SPILL.findall(sass)),
        "stack_bytes": stack,
        "shared_bytes": code.metadata.shared,
        "warps": resident_warps(arch, registers, code.metadata.shared, constants["num_warps"]),
        "tensor_core": len(TENSOR_CORE.findall(sass)),
        "tensor_core_kind": "+".join(sorted(set(TENSOR_CORE.findall(sass)))),
        "load_bytes": load_bytes(code.asm["ttgir"], dtype),
        "per_element": round(
            body(sass) * threads / (constants["BLOCK_M"] * constants["BLOCK_N"]), 1
        ),
    }


def resident_warps(arch: int, registers: int, shared: int, num_warps: int) -> int:
    """Warps of one kernel that an SM holds at a time, by registers and shared memory."""
    given = triton.cdiv(registers, REGISTER_UNIT) * REGISTER_UNIT
    by_registers = SM_REGISTERS // (given * 32 * num_warps)
    by_shared = SM_SHARED_BYTES[arch] // (shared + BLOCK_RESERVED_BYTES)
    return min(by_registers, by_shared, SM_WARPS // num_warps) * num_warps


def load_bytes(ttgir: str, dtype: torch.dtype) -> int:
    """The narrowest of the loads that fill two-dimensional tiles."""
    widths = dict(LAYOUT.findall(ttgir))
    return min(int(widths[layout]) for layout in TILE_LOAD.findall(ttgir)) * dtype.itemsize


def body(sass: str) -> int:
    """Instructions of the first loop that multiplies and exponentiates; of all if none does."""
    listing = [(int(at, 16), text) for at, text in INSTRUCTION.findall(sass)]
    loops = []
    for at, text in listing:
        target = BACKWARDS.search(text)
        if target is None or (start := int(target[1], 16)) >= at:
            continue
        inside = [other for where, other in listing if start <= where <= at]
        joined = "\n".join(inside)
        if TENSOR_CORE.search(joined) and "MUFU.EX2" in joined:
            loops.append((start, len(inside)))
    return min(loops)[1] if loops else len(listing)


def _disassemble(cubin: bytes) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return [
            subprocess.run(
                [CUOBJDUMP, what, file], capture_output=True, text=True, check=True
            ).stdout
            for what in ("-res-usage", "-sass")
        ]


def report(
    architectures: tuple[int, ...] = ARCHITECTURES,
    heads: tuple[int, ...] = HEADS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> list[dict[str, Any]]:
    """A row for every default configuration."""
    rows = {}
    cases = itertools.product(architectures, heads, dtypes, DROPOUT, LONGEST)
    for arch, head, dtype, dropout_p, longest in cases:
        for compiled in attention_kernels(arch, head, dtype, dropout_p, longest):
            new = row(compiled, arch, dtype)
            rows[tuple(new.values())] = new  # two lengths may share a configuration
    return list(rows.values())


def show(rows: list[dict[str, Any]]) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for one in rows:
        table.add_row(*map(str, one.values()))
    Console(width=TABLE_WIDTH).print(table)


def add_to_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    """Append the rows with the commit and the compiler; a file with other columns is refused."""
    known = facts(torch.device("cpu"))
    rows = [{**one, **{name: known[name] for name in ("triton", "commit", "date")}} for one in rows]
    old = file.read_text(encoding="utf-8") if file.exists() else ",".join(rows[0]) + "\n"
    if old.partition("\n")[0] != ",".join(rows[0]):
        raise SystemExit(f"{file} has other columns than these rows: name a new file")
    new = io.StringIO()
    csv.DictWriter(new, list(rows[0]), lineterminator="\n").writerows(rows)
    atomic_write(file, old + new.getvalue())


def main() -> None:
    """Print the rows, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--head", type=int, nargs="*", default=HEADS)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--csv", type=Path, help="add the rows, with the commit, to this file")
    given = parser.parse_args()
    rows = report(tuple(given.arch), tuple(given.head))
    show(rows)
    if given.json:
        atomic_write(given.json, json.dumps(rows, indent=1) + "\n")
    if given.csv:
        add_to_csv(given.csv, rows)


if __name__ == "__main__":
    main()
