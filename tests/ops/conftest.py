"""Which implementations a test of an op gets, and NaN in all uninitialised memory, so that an
unwritten output shows.
"""

import pytest
import torch

from tinybert_fast.ops import dispatch
from tinybert_fast.testing.proofs import implementations, serves


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def device():
    return DEVICE


ISAS = ("baseline", "AVX2", "AVX-512", "AVX-512 BF16")  # as the compiled module numbers them


@pytest.fixture
def isa(request):
    """At most this instruction set, each of `instruction_sets`."""
    from tinybert_fast import _native

    _native.limit_isa(request.param)
    yield request.param
    _native.limit_isa(-1)


def op_of(module):
    return module.__name__.rpartition("test_")[2]


def instruction_sets(op):
    """Of those that this CPU has, each for which the op is compiled; attention has none for dots of
    bf16. Others would run the widest of these once more.
    """
    if dispatch.UNAVAILABLE["native"] is not None:
        return ISAS[:1]
    from tinybert_fast import _native

    known = ISAS[:-1] if op == "attention" else ISAS
    return known[: ISAS.index(_native.isa()) + 1]


def pytest_generate_tests(metafunc):
    """Parameters of a test of one op, each a name for ``impl=``.

    fast: each fast implementation of the file's op; impl: the reference too; exact: those of them
    that take fp64; counted: kernels, which drop the reference's cells (torch draws its own);
    kernel: Triton's;
    on_cpu: those that take CPU tensors, whatever device there is, for what stops a GPU.
    """
    op = op_of(metafunc.module)
    if "isa" in metafunc.fixturenames:
        names = instruction_sets(op.removesuffix("_native"))
        metafunc.parametrize("isa", range(len(names)), ids=names, indirect=True)
    if op not in dispatch.OPS:
        return
    fast = implementations(op)
    dtypes = dispatch.OPS[op].reference.dtypes
    on_cpu = torch.float32 if torch.float32 in dtypes else dtypes[0]
    named = {
        "fast": fast,
        "impl": [*fast, "reference"],
        "exact": [i for i in (*fast, "reference") if serves(op, i, torch.float64, DEVICE)],
        "on_cpu": [i for i in (*fast, "reference") if serves(op, i, on_cpu, "cpu")],
        # Absent ones are left out below: no parameter at all would be a skipped test.
        "counted": [i for i in ("triton", "native") if getattr(dispatch.OPS[op], i) is not None],
        "kernel": ["triton"],
    }
    for name in named.keys() & set(metafunc.fixturenames):
        metafunc.parametrize(name, named[name])


def pytest_collection_modifyitems(config, items):
    """Leaves out tests of an implementation that is absent, or that the test's dtype excludes:
    Triton's interpreter, for one, has no bf16.
    """
    left_out = [item for item in items if not can_run(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def draws_from_the_device(op):
    """torch's dropout of hidden cells on a GPU: of the device's generator, so that no seed is read
    on the host; a second run draws another mask (tuned/random.py).
    """
    return DEVICE == "cuda" and op in ("dropout_add_layer_norm", "embedding_layer_norm")


def can_run(item):
    given = item.callspec.params if hasattr(item, "callspec") else {}
    op = given.get("op", op_of(item.module))
    if op not in dispatch.OPS:
        return True
    parameters = ("fast", "impl", "exact", "counted", "kernel")
    names = {given.get(name) for name in parameters} & set(dispatch.FASTEST_FIRST)
    if "torch" in names and item.get_closest_marker("same_mask") and draws_from_the_device(op):
        rate = given["variant"].get("dropout_p", 0.0) if "variant" in given else 1.0
        if given.get("dropout_p", rate):
            return False
    dtypes = dispatch.OPS[op].reference.dtypes
    dtype = given.get("dtype", torch.float32 if torch.float32 in dtypes else dtypes[0])
    return all(serves(op, name, dtype, DEVICE) for name in names)
