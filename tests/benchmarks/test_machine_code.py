"""Machine code of the default kernels: no spill, tensor cores, wide loads.

A few are compiled here, for sm_90; the rows of all are in machine_code.csv, which must be those of
the kernels as they are.
"""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from tinybert_fast.benchmarks import machine_code
from tinybert_fast.ops.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")

# Instructions per score of the forward at heads of 32.
LIMIT, LIMIT_WITH_DROPOUT = 22, 34
RELATION_PASSES = {
    *("one tile", "one tile of itself", "statistics"),
    *(f"gradient of {of}" for of in ("rows", "columns", "itself")),
}
LOGITS = "loss and gradient of logits"


def rows(head, dropout_p, longest):
    found = machine_code.attention_kernels(90, head, torch.bfloat16, dropout_p, longest)
    return {one["pass"]: one for one in (machine_code.row(f, 90, torch.bfloat16) for f in found)}


@pytest.mark.parametrize("longest", [128, 512], ids=["one_tile", "two_kernels"])
@pytest.mark.parametrize("head", [32, 64])
def test_default_settings_compile_well(head, longest):
    passes = {128: {"forward", "backward, one tile"}}.get(
        longest, {"forward", "backward, dq", "backward, dk and dv"}
    )
    passes |= {f"{name} and what others add" for name in passes if name != "forward"}  # of a stack
    found = rows(head, 0.1, longest)
    assert found.keys() == passes
    for one in found.values():
        assert one["stack_bytes"] == one["spill_bytes"] == 0, one
        assert one["load_bytes"] == 16, one
        assert one["tensor_core"] > 0, one
        assert one["tensor_core_kind"] == "HGMMA", one
    if head == 32:
        assert found["forward"]["per_element"] <= LIMIT_WITH_DROPOUT


def test_forward_without_dropout():
    assert rows(32, 0.0, 512)["forward"]["per_element"] <= LIMIT


def test_a_rate_whose_threshold_is_1_compiles():
    """Triton takes an argument of 1 for a constant, which has no type; the interpreter does not."""
    assert machine_code.attention_kernels(90, 32, torch.bfloat16, 0.005, 64)
    assert machine_code.layer_norm_kernels(90, 312, torch.bfloat16, 0.005)


def test_a_relation_compiles_well():
    """Of a TinyBERT-4 under a BERT-base: one tile, and what longer sequences take."""
    found = [
        machine_code.row(one, 90, torch.bfloat16)
        for longest in (128, 512)
        for one in machine_code.relation_kernels(90, 26, 64, torch.bfloat16, longest)
    ]
    assert {one["pass"] for one in found} == RELATION_PASSES
    for one in found:
        assert one["op"] == "attention_relation_kl"
        assert one["stack_bytes"] == one["spill_bytes"] == 0, one
        assert one["tensor_core_kind"] == "HGMMA", one


@pytest.mark.parametrize(("inputs", "columns"), machine_code.INNER)
def test_a_product_and_its_gelu_compile_well(inputs, columns):
    """Tensor cores, TMA, and two programs on an SM; nothing on an sm_80."""
    (compiled,) = machine_code.linear_gelu_kernels(90, inputs, columns, torch.bfloat16)
    one = machine_code.row(compiled, 90, torch.bfloat16)
    assert (one["op"], one["pass"], one["columns"]) == ("linear_gelu", "forward", columns)
    assert one["stack_bytes"] == one["spill_bytes"] == 0, one
    assert one["tensor_core_kind"] == "HGMMA", one
    assert one["warps"] == 2 * one["num_warps"], one
    assert "cp.async.bulk.tensor" in compiled.code.asm["ptx"]
    assert not machine_code.linear_gelu_kernels(80, inputs, columns, torch.bfloat16)


def test_a_block_of_8_bit_floats_compiles_well():
    """Rounded two numbers at a time, multiplied as they are, two programs on an SM."""
    rounding, product = machine_code.feed_forward_fp8_kernels(90, 768, 3072)
    assert (rounding.op, product.op) == ("feed_forward_fp8", "linear_gelu")
    for one in (rounding, product):
        figures = machine_code.row(one, 90, torch.float8_e4m3fn)
        assert figures["stack_bytes"] == figures["spill_bytes"] == 0, figures
        assert "cvt.rn.satfinite.e4m3x2.f32" in one.code.asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3" in product.code.asm["ptx"]
    assert "cp.async.bulk.tensor" in product.code.asm["ptx"]
    assert figures["warps"] == 2 * figures["num_warps"], figures
    assert figures["tensor_core_kind"] == "QGMMA", figures
    assert not machine_code.feed_forward_fp8_kernels(80, 768, 3072)


def test_a_relations_statistics_in_fp32():
    """Of a student's and a teacher's heads of 32, as MiniLM's: nothing in the stack."""
    found = [
        machine_code.row(one, 90, torch.float32)
        for one in machine_code.relation_kernels(90, 32, 32, torch.float32, 512)
        if one.kernel == "_statistics_kernel"
    ]
    assert found
    for one in found:
        assert one["stack_bytes"] == one["spill_bytes"] == 0, one


@pytest.mark.parametrize("columns", [3000, 8192])
def test_wide_rows_fit_into_shared_memory(columns):
    """Of every GPU from sm_80 on, in fp32 and with dropout, where most rows are in flight."""
    compiled = machine_code.layer_norm_kernels(80, columns, torch.float32, 0.1)
    backward = [one for one in compiled if one.kernel == "_backward_kernel"]
    assert len(backward) == 2
    assert all(one.code.metadata.shared <= 99 << 10 for one in backward)


def test_narrow_strides_show():
    """Heads of 26, as a model without padded heads hands them over: 4 bytes at a time."""
    assert rows(26, 0.0, 64)["forward"]["load_bytes"] == 4


@pytest.fixture(scope="module")
def committed():
    """The rows of the kernels as they are, of every architecture."""
    with (Path(machine_code.__file__).parent / "results/machine_code.csv").open() as file:
        found = list(csv.DictReader(file))
    digests = {op: machine_code.sources(op) for op in {one["op"] for one in found}}
    old = {one["op"] for one in found if one["sources"] != digests[one["op"]]}
    assert not old, (
        f"the code of {', '.join(sorted(old))} changed since its machine code was last reported; "
        "run for each: python benchmarks/machine_code.py --op OP "
        "--csv benchmarks/results/machine_code.csv"
    )
    return found


def test_every_default_is_reported(committed):
    assert {one["arch"] for one in committed} == {"sm_80", "sm_90", "sm_100"}
    assert {one["dtype"] for one in committed} == {"float16", "bfloat16", "float8_e4m3fn"}
    heads = {"", "26", "32", "64", "128", "26/64", "32/32", "64/64", "128/128"}
    assert {one["head_dim"] for one in committed} == heads
    columns = {"", "312", "384", "768", "1024", "1200", "3072"}
    assert {one["columns"] for one in committed} == columns
    passes = {(one["op"], one["pass"]) for one in committed}
    norms = ("layer_norm", "dropout_add_layer_norm", "embedding_layer_norm")
    assert passes >= {
        (op, which) for op in (*norms, "bias_gelu") for which in ("forward", "backward")
    }
    assert passes >= {
        ("attention", which)
        for which in ("forward", "backward, one tile", "backward, dq", "backward, dk and dv")
    }
    assert passes >= {("attention_relation_kl", which) for which in RELATION_PASSES}
    assert passes >= {("hidden_mse", "errors"), ("linear_cross_entropy", LOGITS)}
    of_gelu = [one for one in committed if one["op"] == "linear_gelu"]
    assert {one["dtype"] for one in of_gelu} == {"float16", "bfloat16", "float8_e4m3fn"}
    assert ("feed_forward_fp8", "rounding of rows") in passes
    assert ("scaled_gradient", "gradient, scaled") in passes
    forms = {(one["pass"], one["head_dim"], one["mask_side"]) for one in of_the_loss(committed)}
    for heads in ("26/64", "64/64"):
        assert forms >= {("gram", heads, "0"), ("gram of the student's part", heads, "0")}
        for side in ("0", "64", "128"):
            assert forms >= {("direct, dq", heads, side), ("direct, dk", heads, side)}


def of_the_loss(committed):
    """The kernels of attention_score_mse that multiply."""
    return [one for one in committed if one["op"] == "attention_score_mse" and one["head_dim"]]


def test_no_default_spills(committed):
    for one in committed:
        assert (one["spill_bytes"], one["stack_bytes"]) == ("0", "0"), one


def test_attention_has_tensor_cores_and_wide_loads(committed):
    kinds = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    for one in committed:
        if one["op"] in ("attention", "attention_relation_kl"):
            assert int(one["tensor_core"]) > 0, one
            # A product of 32 columns may take the older instruction beside its family's own.
            assert kinds[one["arch"]] in one["tensor_core_kind"].split("+"), one
            narrow = one["head_dim"].startswith("26")
            assert one["load_bytes"] == ("4" if narrow else "16"), one


def test_attention_loss_has_tensor_cores(committed):
    kinds = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    for one in of_the_loss(committed):
        assert kinds[one["arch"]] in one["tensor_core_kind"].split("+"), one
        assert one["load_bytes"] == ("4" if one["head_dim"] == "26/64" else "16"), one


def test_few_instructions_for_a_score(committed):
    forward = [
        one for one in committed
        if (one["op"], one["pass"], one["head_dim"]) == ("attention", "forward", "32")
        and (one["direction"], one["mask_side"]) == ("both", "0")
    ]  # fmt: skip
    assert {one["arch"] for one in forward} == {"sm_80", "sm_90", "sm_100"}
    for one in forward:
        limit = LIMIT_WITH_DROPOUT if one["dropout"] == "True" else LIMIT
        assert float(one["per_element"]) <= limit, one


def test_layer_norms_load_16_bytes(committed):
    for one in committed:
        by_threads = one["columns"] and one["op"] != "linear_gelu"  # which loads by TMA
        assert not by_threads or int(one["load_bytes"]) >= 16, one  # 32: two, of what is stored so


def test_a_comment_keeps_the_digest_and_code_changes_it(tmp_path, monkeypatch):
    """Code of the op or of what it imports; not another's."""
    monkeypatch.setattr(machine_code, "find_spec", lambda name: Spec(tmp_path / f"{name}.py"))
    modules = {
        "kernels.one": "from tinybert_fast.kernels.tiles import x\n",
        "kernels.tiles": "from tinybert_fast.reference import philox\nx = 1\n",
        "kernels.other": "",
        "reference.philox": "KEY = 1\n",
    }

    def digest(**changed):
        for name, code in (modules | {f"kernels.{k}": v for k, v in changed.items()}).items():
            (tmp_path / f"tinybert_fast.{name}.py").write_text(code)
        return machine_code.sources("one")

    before = digest()
    assert digest(one='"""A."""\n# why\n' + modules["kernels.one"]) == before
    assert digest(other="x = 2\n") == before
    assert digest(tiles=modules["kernels.tiles"] + "y = 2\n") != before
    modules["reference.philox"] = "KEY = 2\n"
    assert digest() != before


def test_new_rows_replace_those_of_the_op(tmp_path):
    file = tmp_path / "rows.csv"

    def put(*names, **other):
        rows = [{"op": op, "arch": arch, "registers": 1, **other} for op, arch in names]
        machine_code.put_into_csv(file, rows)
        found = list(csv.DictReader(file.open()))
        return [(one["op"], one["arch"], one["registers"]) for one in found]

    a, b = ("one", "sm_80"), ("one", "sm_90")
    assert put(a, b, ("other", "sm_80")) == [(*a, "1"), (*b, "1"), ("other", "sm_80", "1")]
    assert put(a, registers=2) == [(*b, "1"), ("other", "sm_80", "1"), (*a, "2")]
    with pytest.raises(SystemExit, match="has other columns"):
        put(a, spill_bytes=0)


class Spec:
    def __init__(self, file):
        self.origin = str(file)


def test_cuda_kernels_are_reported_and_do_not_spill():
    """The rows of csrc/ as it is."""
    results = Path(machine_code.__file__).parent / "results/machine_code_cuda.csv"
    digest = machine_code.cuda_sources(machine_code.CSRC)
    with results.open() as file:
        found = [one for one in csv.DictReader(file) if one["sources"] == digest]
    kernels = {
        ("block_mask", "kinds"), ("block_mask", "lists"), ("block_mask", "cells"),
        ("mlm_mask", "mask"), ("mlm_mask", "list"),
        ("sequence_layout", "extents"), ("sequence_layout", "layout"),
    }  # fmt: skip
    for arch in ("sm_80", "sm_90", "sm_100"):
        assert {(one["op"], one["kernel"]) for one in found if one["arch"] == arch} == kernels, (
            "csrc/ changed since its machine code was last reported; run: python "
            "benchmarks/machine_code.py --cuda --csv benchmarks/results/machine_code_cuda.csv"
        )
    for one in found:
        assert one["spill_bytes"] == "0", one
        assert int(one["registers"]) <= 64, one


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_ptxas_is_understood(tmp_path):
    """A kernel that keeps 256 numbers alive in 32 registers spills."""
    (tmp_path / "busy.cu").write_text(
        """
        namespace tbf {
        __global__ void __launch_bounds__(1024, 2) busy_kernel(float* x, int n) {
          float own[256];
          for (int i = 0; i < 256; ++i) own[i] = x[i * n];
          __syncthreads();
          for (int i = 0; i < 256; ++i) x[i] = own[i] * own[255 - i];
        }
        }
        """
    )
    (found,) = machine_code.cuda_rows(tmp_path, (90,))
    assert (found["op"], found["kernel"], found["arch"]) == ("busy", "busy", "sm_90")
    assert found["spill_bytes"] > 0
    assert 24 <= found["registers"] <= 32
