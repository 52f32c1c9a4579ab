"""What the compiler makes of every Triton kernel, read from machine code; no GPU is needed.

    python benchmarks/machine_code.py [--json FILE] [--csv FILE] [--arch 90] [--op attention]
    python benchmarks/machine_code.py --cuda [--csv FILE]

The launchers run as on a GPU, on operands of the shapes below, but each kernel is only compiled. A
row per kernel, architecture and case:

    registers, stack_bytes, spill_bytes, shared_bytes   of one thread; of one block
    warps                                               resident on an SM, by those: an estimate
    tensor_core                                         HMMA / HGMMA / QGMMA / tcgen05 instructions
    load_bytes      narrowest load of a two-dimensional tile in the operands' dtype, by threads: of
                    linear_gelu, whose tiles TMA loads, none
    per_element     of attention, instructions per score: of the loop without a mask, or of the
                    whole kernel where it has no loop, over BLOCK_M * BLOCK_N / threads; none where
                    the first loop has a mask
    sources         a digest of the op's code, by which a test sees that rows are its kernels'

With --cuda the kernels of csrc/*.cu instead, as ptxas reports them; stack_bytes hold the arguments
of a message. It needs nvcc and a checkout.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import io
import itertools
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tinybert_fast.benchmarks.hardware import facts
from tinybert_fast.data.atomic import atomic_write
from tinybert_fast.kernels.settings import Table
from tinybert_fast.ops.block_mask import SIDES, BlockMask
from tinybert_fast.ops.layout import SequenceLayout

ARCHITECTURES = (80, 90, 100)
HEADS = (26, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16)
DROPOUT = (0.0, 0.1)
LONGEST = (64, 128, 512)  # one of each bucket of kernels/configs.py
LOSS_HEADS = ((26, 64), (64, 64))  # TinyBERT-4 and -6 under BERT-base
GIVEN = {32: 26, 64: 64}  # heads of a stack -> those whose gradients its backward adds
VARIANTS = [("causal", 0), ("anti_causal", 0), *(("both", side) for side in SIDES)]
MODEL_HEADS = 12  # so that rows are as far apart as in BERT
RELATIONS = ((26, 64), (32, 32), (64, 64), (128, 128))  # widths of student's and teacher's heads
WIDENED = (1200, 3072)  # columns of TinyBERT-4's and BERT-base's wide layers
INNER = ((312, 1200), (768, 3072))  # products before those
E4M3, FP8_INNER = torch.float8_e4m3fn, ((768, 3072),)  # a teacher's
FP8_FROM = torch.bfloat16, 0.0  # dtype of what it rounds, and dropout
COLUMNS = (312, 384, 768, 1024)  # TinyBERT-4, MiniLM, BERT-base, BERT-large
WORDS = 30522  # BERT's
ROW_LOSSES = ("hidden_mse", "linear_cross_entropy", "scaled_gradient")
ROWS = 64

PASSES = {
    "_forward_kernel": "forward",
    "_backward_kernel": "backward",
    "_one_tile_kernel": "backward, one tile",
    "_dq_kernel": "backward, dq",
    "_dkdv_kernel": "backward, dk and dv",
    "_add_kernel": "backward, sums of vectors",
    "_statistics_kernel": "statistics",
    "_gradient_kernel": "gradient",
    "_gram_kernel": "gram",
    "_direct_kernel": "direct, dq",
    "_pairs_kernel": "direct, pairs of a mask",
    "_error_kernel": "errors",
    "_loss_kernel": "loss and gradient of logits",
    "_scale_kernel": "gradient, scaled",
    "_round_kernel": "rounding of rows",
}

# Of one SM: NVIDIA's CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SM_REGISTERS = 65536
SM_WARPS = 64
SM_SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
BLOCK_RESERVED_BYTES = 1024  # shared memory that each block takes for the system
REGISTER_UNIT = 8  # a thread's registers are given out in eights

TABLE_WIDTH = 220  # columns

KERNELS, REFERENCE = "tinybert_fast.kernels", "tinybert_fast.reference"
SETTINGS = f"{KERNELS}.settings"  # of tables; what rows show of them is in the rows
CSRC = Path("csrc")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|QGMMA|UTC\w*MMA)\b")
SPILL = re.compile(r"\bSTL(?:\.(64|128))?\b")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
ENTRY = re.compile(
    r"Compiling entry function '\w*?\d([a-z_]+)_kernelE.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)
COMMENT = re.compile(r"//.*")
BACKWARDS = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
TILE_LOAD = re.compile(
    r"(?:tt\.load|ttg\.async_copy_global_to_local).*"
    r" : tensor<\d+x\d+x!tt\.ptr<(f16|bf16|f32)>, (#\w+)>"
)
BYTES = {"f16": 2, "bf16": 2, "f32": 4}
LAYOUT = re.compile(r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[1, (\d+)\]", re.MULTILINE)


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


class Compiled(NamedTuple):
    """A kernel as a launcher asked for it."""

    op: str
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
def compiling_for(
    arch: int, table: Table | None = None, only: str | None = None
) -> Iterator[list[Compiled]]:
    """Inside, launches compile for sm_``arch`` instead, with the settings of ``table`` (by default
    the built-in ones), and are listed; ``only``: of the kernel of that name.
    """
    from tinybert_fast.kernels import configs

    found: list[Compiled] = []
    run, active = JITFunction.run, driver._active
    device = configs.capability, configs.processors

    def compile_only(self, *args, grid, warmup, **constants):
        if only not in (None, self.__name__):
            return None
        self.device_caches.clear()  # their keys do not name the architecture
        code = run(self, *args, grid=grid, warmup=True, **constants)
        op = self.fn.__module__.removeprefix(f"{KERNELS}.").partition(".")[0]
        op = "layer_norm" if op == "rows" else op  # what all layer norms share
        found.append(Compiled(op, self.__name__, code, constants))
        return code

    JITFunction.run = compile_only
    configs.capability = lambda device: arch
    configs.processors = lambda device: 1  # an argument, which no code depends on
    driver.set_active(_Target(arch))
    try:
        with configs.forced(configs.FAMILIES[arch] if table is None else table):
            yield found
    finally:
        JITFunction.run = run
        configs.capability, configs.processors = device
        driver._active = active  # reset_active() would look for a GPU


def attention_kernels(
    arch: int,
    head: int,
    dtype: torch.dtype,
    dropout_p: float,
    longest: int,
    direction: str = "both",
    side: int = 0,
) -> list[Compiled]:
    """Forward and backward of one call; with a block mask of ``side``, if that is not 0."""
    from tinybert_fast.kernels import attention

    q, k, v, grad = (torch.zeros(longest, MODEL_HEADS, head, dtype=dtype) for _ in range(4))
    seed = torch.zeros(2, dtype=torch.int64) if dropout_p else None
    layout = SequenceLayout.from_lengths((longest,))
    places = (layout.cu_seqlens, layout.work)
    mask = []
    if side:
        mask = list(BlockMask.from_dense(torch.ones(longest, longest).tril() > 0, side).lists)
    call: tuple = (*places, longest, head**-0.5, direction, dropout_p, seed, 0, mask)
    with compiling_for(arch) as found:
        out, lse, rng = attention.forward(q, k, v, *call)
        attention.backward(grad, q, k, v, out, lse, rng, *call)
        if head in GIVEN and direction == "both" and not side:
            stack = torch.stack((q, k, v), 1)
            more = (torch.zeros(longest, MODEL_HEADS, GIVEN[head], dtype=dtype) for _ in range(3))
            attention.backward_of_stack(grad, stack, *more, out, lse, rng, *call)
    return found


def relation_kernels(
    arch: int, width: int, width_teacher: int, dtype: torch.dtype, longest: int
) -> list[Compiled]:
    """One call of attention_relation_kl, of two operands and of one with itself."""
    from tinybert_fast.kernels import attention_relation_kl

    a, b = (torch.zeros(longest, MODEL_HEADS, width, dtype=dtype) for _ in range(2))
    c, d = (torch.zeros(longest, MODEL_HEADS, width_teacher, dtype=dtype) for _ in range(2))
    layout = SequenceLayout.from_lengths((longest,))
    call = (layout.cu_seqlens, layout.work, longest)
    with compiling_for(arch) as found:
        attention_relation_kl.forward(a, b, c, d, *call)
        attention_relation_kl.forward(a, None, c, None, *call)
    return found


def attention_loss_kernels(arch: int, heads: tuple[int, int], dtype: torch.dtype) -> list[Compiled]:
    """Both forms of attention_score_mse, the second also with block masks."""
    from tinybert_fast.kernels import attention_score_mse

    length = LONGEST[-1]
    q, k, p, r = (
        torch.zeros(length, MODEL_HEADS, width, dtype=dtype) for width in sorted(heads * 2)
    )
    call: tuple = (torch.tensor([0, length], dtype=torch.int32), length)
    pairs = torch.ones(length, length).tril() > 0
    with compiling_for(arch) as found:
        for loss in ("full", "student"):
            attention_score_mse.forward(q, k, p, r, *call, "gram", loss, [])
        for mask in ([], *(list(BlockMask.from_dense(pairs, side).lists) for side in SIDES)):
            attention_score_mse.forward(q, k, p, r, *call, "direct", "full", mask)
    return found


def row_loss_kernels(arch: int, dtype: torch.dtype) -> list[Compiled]:
    """hidden_mse with a projection and without, linear_cross_entropy; products are cuBLAS's."""
    from tinybert_fast.kernels import hidden_mse, linear_cross_entropy, scaled_gradient

    student, teacher = (torch.zeros(ROWS, width, dtype=dtype) for width in (312, 768))
    weight, words = torch.zeros(768, 312), torch.zeros(WORDS, 312)
    rows = torch.zeros(ROWS, dtype=torch.int64)
    options = (-100, 0.1)  # ignore_index, label_smoothing
    with compiling_for(arch) as found:
        hidden_mse.forward(student, weight, weight[:, 0], teacher, [True] * 3)
        hidden_mse.forward(teacher, None, None, teacher, [True, False, False])
        scaled_gradient.forward(student, weight[0, :1], dtype)
        for upstream in (None, torch.ones(ROWS)):
            linear_cross_entropy.forward(
                student, words, words[:, 0], rows, rows, *options, upstream, [True] * 3
            )
    return found


def layer_norm_kernels(
    arch: int, columns: int, dtype: torch.dtype, dropout_p: float
) -> list[Compiled]:
    """Forward and backward of one call of each op with a layer norm."""
    from tinybert_fast.kernels import dropout_add_layer_norm, embedding_layer_norm, layer_norm

    x, residual, grad = (torch.zeros(ROWS, columns, dtype=dtype) for _ in range(3))
    bias, weight, ln_bias = (torch.zeros(columns, dtype=dtype) for _ in range(3))
    ids = torch.zeros(ROWS, dtype=torch.int64)
    seed = torch.zeros(2, dtype=torch.int64) if dropout_p else None
    place = (ids.int(), ids.int())  # sequences, positions
    eps, site = 1e-12, 0
    with compiling_for(arch) as found:
        if not dropout_p:
            _, mean, rstd = layer_norm.forward(x, weight, ln_bias, eps)
            layer_norm.backward(grad, x, weight, mean, rstd)
        _, *kept = dropout_add_layer_norm.forward(
            x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, *place, True
        )
        dropout_add_layer_norm.backward(
            grad, *kept, weight, dropout_p, seed, site, *place, dtype, True
        )
        _, *kept = embedding_layer_norm.forward(
            x, x, x[:2], weight, ln_bias, ids, ids, ids, 0, eps, dropout_p, seed, site, *place
        )
        embedding_layer_norm.backward(
            grad, *kept, weight, ids, ids, ids, seed, site, *place, ROWS, ROWS, 2, 0, dropout_p
        )
    return found


def bias_gelu_kernels(arch: int, columns: int, dtype: torch.dtype) -> list[Compiled]:
    """Forward and backward of one call of bias_gelu."""
    from tinybert_fast.kernels import bias_gelu

    x, bias = torch.zeros(ROWS, columns, dtype=dtype), torch.zeros(columns)  # as under autocast
    with compiling_for(arch) as found:
        bias_gelu.backward(bias_gelu.forward(x, bias), x, bias)
    return found


def linear_gelu_kernels(arch: int, inputs: int, columns: int, dtype: torch.dtype) -> list[Compiled]:
    """The kernel of a product and its GELU, where an architecture has one."""
    from tinybert_fast.kernels import configs, linear_gelu

    x, weight = torch.zeros(ROWS, inputs, dtype=dtype), torch.zeros(columns, inputs, dtype=dtype)
    with compiling_for(arch) as found:
        if configs.linear_gelu(x, columns) is not None:
            linear_gelu.forward(x, weight, torch.zeros(columns))
    return found


def feed_forward_fp8_kernels(arch: int, inputs: int, columns: int) -> list[Compiled]:
    """Of a block of 8-bit floats: the rounding of rows, and linear_gelu's kernel in e4m3."""
    from tinybert_fast.kernels import configs, feed_forward_fp8, linear_gelu

    x, weight = torch.zeros(ROWS, inputs), torch.zeros(columns, inputs).to(E4M3)
    scale, bias, reach = torch.zeros(columns), torch.zeros(columns), torch.zeros(2)
    with compiling_for(arch) as found:
        if configs.linear_gelu(x.bfloat16(), columns) is not None:
            rows, *scales = feed_forward_fp8.rounded(x.bfloat16(), reach)
            linear_gelu.forward_fp8(rows, scales[0], weight, scale, bias, scales[1])
    return found


def row(compiled: Compiled, arch: int, dtype: torch.dtype) -> dict[str, Any]:
    """The figures of one kernel."""
    constants, code = compiled.constants, compiled.code
    usage, sass = _disassemble(code.asm["cubin"])
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"{CUOBJDUMP} says nothing of registers: {usage!r}")
    registers, stack = (int(n) for n in numbers.groups())
    warps = code.metadata.num_warps
    threads = 32 * warps
    attention = compiled.op == "attention"
    head = constants.get("D")
    if "DT" in constants:
        head = f"{head}/{constants['DT']}"
    plain = attention and constants["DIRECTION"] != "anti_causal" and not constants.get("SIDE")
    whole = constants.get("BLOCK", 1)  # of a kernel with one kind of block
    tile = [constants.get(name, whole) for name in ("BLOCK_M", "BLOCK_N")]
    scores = math.prod(tile) / threads
    return {
        "op": compiled.op,
        "pass": pass_of(compiled),
        "arch": f"sm_{arch}",
        "head_dim": head,
        "columns": constants.get("C"),
        "dtype": str(dtype).removeprefix("torch."),
        "dropout": constants.get("DROPOUT", False),
        "direction": constants.get("DIRECTION"),
        "mask_side": constants.get("SIDE", 0),
        "tile": "x".join(map(str, tile)),
        "num_warps": warps,
        "num_stages": code.metadata.num_stages,
        "registers": registers,
        "spill_bytes": sum(int(width or 32) // 8 for width in SPILL.findall(sass)),
        "stack_bytes": stack,
        "shared_bytes": code.metadata.shared,
        "warps": resident_warps(arch, registers, code.metadata.shared, warps),
        "tensor_core": len(TENSOR_CORE.findall(sass)),
        "tensor_core_kind": "+".join(sorted(set(TENSOR_CORE.findall(sass)))),
        "load_bytes": load_bytes(code.asm["ttgir"]),
        "per_element": round(body(sass) / scores, 1) if plain else None,
    }


def pass_of(compiled: Compiled) -> str:
    """Where a kernel belongs; a loss makes its gradients in the forward."""
    name, constants = PASSES[compiled.kernel], compiled.constants
    if constants.get("D_MORE"):
        return f"{name} and what others add"
    if constants.get("OF_KEYS"):
        return "direct, dk"
    if constants.get("LOSS") == "student":
        return f"{name} of the student's part"
    if compiled.op == "attention_relation_kl":
        kinds = {"both": "of itself", "rows": "of rows", "columns": "of columns"}
        kind = kinds.get(constants.get("OF", "both" if constants.get("SELF") else ""))
        name = name.replace("backward, ", "")
        return f"{name} {kind}" if kind else name
    return name


def resident_warps(arch: int, registers: int, shared: int, num_warps: int) -> int:
    """Warps of one kernel that an SM holds at a time, by registers and shared memory."""
    given = triton.cdiv(registers, REGISTER_UNIT) * REGISTER_UNIT
    by_registers = SM_REGISTERS // (given * 32 * num_warps)
    by_shared = SM_SHARED_BYTES[arch] // (shared + BLOCK_RESERVED_BYTES)
    return min(by_registers, by_shared, SM_WARPS // num_warps) * num_warps


def load_bytes(ttgir: str) -> int | None:
    """The narrowest of the loads that fill two-dimensional tiles."""
    widths = dict(LAYOUT.findall(ttgir))
    loads = [BYTES[kind] * int(widths[layout]) for kind, layout in TILE_LOAD.findall(ttgir)]
    return min(loads, default=None)


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
    architectures: tuple[int, ...] = ARCHITECTURES, op: str | None = None
) -> list[dict[str, Any]]:
    """A row for every default configuration of one op, or of all, in fp16 and bf16. Directions and
    block masks are compiled in bf16 with dropout alone, where they need most registers.
    """
    rows = {}
    for arch, dtype, dropout_p in itertools.product(architectures, DTYPES, DROPOUT):
        found = []
        if op in (None, "attention"):
            for head, longest in itertools.product(HEADS, LONGEST):
                found += attention_kernels(arch, head, dtype, dropout_p, longest)
            if dropout_p and dtype == torch.bfloat16:  # what needs most registers
                for head, (direction, side) in itertools.product(HEADS, VARIANTS):
                    found += attention_kernels(arch, head, dtype, dropout_p, 512, direction, side)
        if op in (None, "attention_relation_kl") and not dropout_p:
            for (ours, theirs), longest in itertools.product(RELATIONS, LONGEST):
                found += relation_kernels(arch, ours, theirs, dtype, longest)
        if op in (None, "attention_score_mse") and not dropout_p:
            for heads in LOSS_HEADS:
                found += attention_loss_kernels(arch, heads, dtype)
        if op in (None, *ROW_LOSSES) and not dropout_p:
            found += row_loss_kernels(arch, dtype)
        if op is None or op.endswith("layer_norm"):
            for columns in COLUMNS:
                found += layer_norm_kernels(arch, columns, dtype, dropout_p)
        if op in (None, "bias_gelu") and not dropout_p:
            for columns in WIDENED:
                found += bias_gelu_kernels(arch, columns, dtype)
        if op in (None, "linear_gelu") and not dropout_p:
            for inputs, columns in INNER:
                found += linear_gelu_kernels(arch, inputs, columns, dtype)
        kinds = [(one, dtype) for one in found]
        if op in (None, "linear_gelu", "feed_forward_fp8") and (dtype, dropout_p) == FP8_FROM:
            for inputs, columns in FP8_INNER:
                kinds += [(one, E4M3) for one in feed_forward_fp8_kernels(arch, inputs, columns)]
        for compiled, kind in kinds:
            if op in (None, compiled.op):
                new = row(compiled, arch, kind)
                rows[tuple(new.values())] = new  # two lengths may share a configuration
    return list(rows.values())


def cuda_rows(csrc: Path, architectures: tuple[int, ...] = ARCHITECTURES) -> list[dict[str, Any]]:
    """A row for every kernel of ``csrc``'s .cu files, by what ptxas says of it."""
    rows = []
    for source, arch in itertools.product(sorted(csrc.glob("*.cu")), architectures):
        with tempfile.TemporaryDirectory() as folder:
            command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v"]
            said = subprocess.run(
                [*command, "-Werror=all-warnings", source, "-o", Path(folder) / "kernels.cubin"],
                capture_output=True, text=True, check=True,
            ).stderr  # fmt: skip
        for kernel, *numbers in ENTRY.findall(said):
            stack, stores, loads, registers, shared = (int(number or 0) for number in numbers)
            rows.append(
                {
                    "op": source.stem,
                    "kernel": kernel,
                    "arch": f"sm_{arch}",
                    "registers": registers,
                    "spill_bytes": stores + loads,
                    "stack_bytes": stack,
                    "shared_bytes": shared,
                }
            )
    return rows


def nvcc_version() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release ([\d.]+)", said)[0]


def cuda_sources(csrc: Path) -> str:
    """A digest of the CUDA code and its headers, which comments don't change."""
    digest = hashlib.sha256()
    for file in sorted(csrc.iterdir()):
        if file.suffix in (".cu", ".cuh", ".h") and file.name != "lists.h":  # Python's, on the host
            digest.update(
                "".join(COMMENT.sub("", file.read_text(encoding="utf-8")).split()).encode()
            )
    return digest.hexdigest()[:12]


def sources(op: str) -> str:
    """A digest of an op's kernels and of all that they import from the project but tables of
    settings; comments and docstrings don't change it.
    """
    digest, modules = hashlib.sha256(), [f"{KERNELS}.{op}"]
    for module in modules:  # which grow
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ValueError(f"{op}: no module {module}")
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            if isinstance(node, ast.ImportFrom):
                modules += [name for name in _imported(node) if name not in (*modules, SETTINGS)]
        digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()[:12]


def _imported(node: ast.ImportFrom) -> list[str]:
    """The project's modules that a statement imports, or imports from."""
    module = node.module or ""
    if module in (KERNELS, REFERENCE):
        return [f"{module}.{one.name}" for one in node.names]
    return [module] if module.startswith((KERNELS, REFERENCE)) else []


def show(rows: list[dict[str, Any]]) -> None:
    """A table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for one in rows:
        table.add_row(*map(str, one.values()))
    Console(width=TABLE_WIDTH).print(table)


def put_into_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    """The rows, with the commit, in the place of those that the file has of the same ops and
    architectures; a file with other columns is refused.
    """
    known = facts(torch.device("cpu"))
    rows = [{**one, "commit": known["commit"], "date": known["date"]} for one in rows]
    old = (
        list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))) if file.exists() else []
    )
    if old and list(old[0]) != list(rows[0]):
        raise SystemExit(f"{file} has other columns than these rows: name a new file")
    replaced = {(one["op"], one["arch"]) for one in rows}
    kept = [one for one in old if (one["op"], one["arch"]) not in replaced]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*kept, *rows])
    atomic_write(file, text.getvalue())


def main() -> None:
    """Print the rows, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--op", help="only this operator")
    parser.add_argument(
        "--cuda", action="store_true", help="instead the kernels of csrc/, compiled by nvcc"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--csv", type=Path, help="put the rows, with the commit, into this file")
    given = parser.parse_args()
    if given.cuda:
        rows = [row for row in cuda_rows(CSRC, tuple(given.arch)) if given.op in (None, row["op"])]
        rows = [{**one, "sources": cuda_sources(CSRC), "nvcc": nvcc_version()} for one in rows]
    else:
        rows = [
            {**one, "sources": sources(one["op"]), "triton": triton.__version__}
            for one in report(tuple(given.arch), given.op)
        ]
    if not rows:
        parser.error(f"--op {given.op}: no kernel of that name")
    show(rows)
    if given.json:
        atomic_write(given.json, json.dumps(rows, indent=1) + "\n")
    if given.csv:
        put_into_csv(given.csv, rows)


if __name__ == "__main__":
    main()
