"""tinybert-fast validate: what is held against fp64, and that a wrong kernel is found."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tinybert_fast.ops import dispatch
from tinybert_fast.testing import validation
from tinybert_fast.testing.budgets import Verdict
from tinybert_fast.testing.checkpoint import validate_checkpoint
from tinybert_fast.testing.proofs import implementations
from tinybert_fast.testing.tiny_models import tiny_classifier, tiny_config
from tinybert_fast.testing.validation import Finding
from tinybert_fast.tuned import layer_norm as tuned

NEVER_EMPTY = ("attention_relation_kl", "hidden_mse", "soft_cross_entropy")
FP32 = ("--dtype", "fp32")


def test_every_op_and_implementation_passes(cli, tmp_path):
    answer = cli("validate", *FP32, "--json", tmp_path / "found.json")
    assert answer.code == 0, answer.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["passed"] is True
    assert {(one["op"], one["impl"]) for one in found["findings"]} == {
        (op, impl) for op in dispatch.OPS for impl in implementations(op)
    }
    assert all(one["tensors"] for one in found["findings"])
    assert "all within their budgets" in answer.out


def test_every_op_has_calls():
    assert validation.CALLS.keys() | validation.CLAIMS.keys() == dispatch.OPS.keys()


@pytest.mark.parametrize("op", validation.CALLS)
def test_calls_differ_and_some_have_no_element(op):
    cases = [make(dtype=torch.float16) for make in validation.CALLS[op]().values()]
    seen = [
        (
            *(
                (tuple(x.shape), x.dtype, x.requires_grad)
                for x in case.operands
                if isinstance(x, torch.Tensor)
            ),
            *((name, str(getattr(x, "lengths", x))) for name, x in case.options.items()),
        )
        for case in cases
    ]
    assert len(set(seen)) == len(seen)
    operands = (x for case in cases for x in case.operands if isinstance(x, torch.Tensor))
    empty = any(x.numel() == 0 for x in operands)
    assert empty == (op not in NEVER_EMPTY)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_a_wrong_kernel_is_found(pass_, cli, monkeypatch):
    right = getattr(tuned, pass_)

    def wrong(*operands):
        first, *others = right(*operands)
        return (first * (1 + 1e-5), *others)

    monkeypatch.setattr(tuned, pass_, wrong)
    answer = cli("validate", *FP32, "--op", "layer_norm", "--impl", "torch")
    assert answer.code == 1
    assert "FAILED" in answer.out
    assert ("value: error" if pass_ == "forward" else "dx: error") in answer.out


def test_a_kernel_that_raises_is_found_and_others_follow(cli, monkeypatch):
    def broken(*operands):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(tuned, "forward", broken)
    ops = ("--op", "layer_norm", "--op", "soft_cross_entropy")
    answer = cli("validate", *FP32, "--impl", "torch", *ops)
    assert answer.code == 1
    assert "RuntimeError: out of shared memory" in answer.out
    after = [line for line in answer.out.splitlines() if line.startswith("soft_cross_entropy")]
    assert after[0].split()[-1] == "ok"


def test_an_infinite_budget_holds_nothing():
    assert not Verdict("value", 1.0, float("inf")).passed


def test_nan_is_over_every_budget():
    worst = Verdict("value", float("nan"), 1.0)
    finding = Finding("op", "impl", "float32", "call", (Verdict("dx", 0.5, 1.0), worst))
    assert not finding.passed
    assert finding.worst is worst


def test_dropout_of_torch_is_left_out():
    found = list(validation.validate(["attention"], dtypes=[torch.float32], impls=["torch"]))
    assert found
    assert not any("dropout" in finding.call for finding in found)


def interpreted(*arguments, folder):
    """The findings of a process of its own: the interpreter is chosen when triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tinybert_fast.cli", "validate", "--interpret", *arguments,
         "--json", str(folder / "found.json")],
        capture_output=True, text=True, check=False, cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads((folder / "found.json").read_text())
    assert found["passed"] == (done.returncode == 0)
    return found["findings"]


def test_interpret_sets_the_interpreter(tmp_path):
    found = interpreted("--op", "layer_norm", "--impl", "triton", folder=tmp_path)
    assert {(one["impl"], one["dtype"], one["passed"]) for one in found} == {
        ("triton", "float32", True), ("triton", "float16", True),
    }  # fmt: skip


def test_processes_find_the_same_in_the_same_order(tmp_path):
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder in (one, two):
        folder.mkdir()
    arguments = ("--op", "layer_norm", "--op", "sequence_layout", "--op", "hidden_mse", *FP32)
    alone = interpreted(*arguments, folder=one)
    shared = interpreted(*arguments, "--jobs", "2", folder=two)

    def said(findings):
        names = ("op", "impl", "dtype", "call", "passed")
        return [(*(f[name] for name in names), [x["name"] for x in f["tensors"]]) for f in findings]

    assert said(shared) == said(alone)
    assert {f["impl"] for f in shared} >= {"triton", "torch"}


def test_no_call_is_held_after_the_minutes(cli, tmp_path):
    short = ("--op", "layer_norm", "--impl", "torch", "--minutes", "1e-9")
    answer = cli("validate", *short, "--json", tmp_path / "found.json")
    assert answer.code == 1
    assert "stopped after 1e-09 minutes" in answer.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["whole"], found["passed"], len(found["findings"])) == (False, False, 1)


class Fatal:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_process_that_dies_is_a_finding(monkeypatch):
    monkeypatch.setattr(validation, "_listed", Fatal())
    found = list(validation.validate(["layer_norm"], dtypes=[torch.float32], jobs=2))
    assert found
    assert all("a process died" in finding.problem for finding in found)


@pytest.mark.parametrize(("width", "passes"), [(12, True), (130, False)])
def test_interpreted_kernels_run_a_checkpoint(width, passes, tmp_path):
    """A width that only they refuse says that it was they who ran."""
    sizes = {"hidden_size": width, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = tiny_classifier(tmp_path / "model", **sizes)
    found = interpreted("--model", str(model), folder=tmp_path)
    assert [one["impl"] for one in found] == ["accelerate()", "attention alone"]
    for one in found:
        assert one["passed"] is passes, one
        assert passes or "heads of 130 numbers are wider than 128" in one["problem"]


def test_a_checkpoint_passes(cli, tmp_path):
    folder = tiny_classifier(tmp_path / "model")
    answer = cli("validate", "--model", folder, "--json", tmp_path / "found.json")
    assert answer.code == 0, answer.out
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert {(one["op"], one["impl"], one["dtype"]) for one in found} == {
        ("BertForSequenceClassification", way, dtype)
        for way in ("accelerate()", "attention alone")
        for dtype in ("float32", "bfloat16")
    }
    for one in found:
        names = {tensor["name"] for tensor in one["tensors"]}
        assert {"logits", "dclassifier.weight", "dbert.embeddings.word_embeddings.weight"} <= names


def test_a_wrong_layer_of_a_checkpoint_is_found(monkeypatch):
    from transformers import BertModel

    from tinybert_fast import ops

    right = ops.dropout_add_layer_norm
    monkeypatch.setattr(
        ops, "dropout_add_layer_norm", lambda *operands, **how: 1.01 * right(*operands, **how)
    )
    torch.manual_seed(0)
    found = list(validate_checkpoint(BertModel(tiny_config()), dtypes=[torch.float32]))
    assert [finding.passed for finding in found] == [False, True]


def test_a_lost_gradient_is_found(monkeypatch):
    from transformers import BertModel

    from tinybert_fast.tuned import attention

    for name in ("backward", "backward_native"):
        right = getattr(attention, name)
        monkeypatch.setattr(
            attention,
            name,
            lambda *call, right=right: (torch.zeros_like(call[1]), *right(*call)[1:]),
        )
    torch.manual_seed(0)
    for finding in validate_checkpoint(BertModel(tiny_config()), dtypes=[torch.float32]):
        over = [tensor.name for tensor in finding.tensors if not tensor.passed]
        assert any("query.weight" in name for name in over), (finding, over)


def test_code_of_transformers_is_no_proof():
    """What accelerate() cannot serve runs Transformers' own code."""
    from transformers import BertModel

    model = BertModel(tiny_config(output_attentions=True, attn_implementation="eager"))
    found = next(validate_checkpoint(model, dtypes=[torch.float32]))
    assert "compared with itself" in found.problem


def test_refuses_what_it_leaves_alone():
    from transformers import BertModel

    with pytest.raises(ValueError, match="BertModel is not an encoder of words"):
        next(validate_checkpoint(BertModel(tiny_config(is_decoder=True))))


def test_a_distilbert_has_its_attention_alone():
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=50, dim=24, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=40
    )
    found = list(validate_checkpoint(DistilBertModel(config), dtypes=[torch.float32]))
    assert [finding.impl for finding in found] == ["attention alone"]
    assert found[0].passed, found[0].problem or found[0].worst


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "'softmax' is not one of attention,"),
        (["--dtype", "fp64"], "--dtype 'fp64' is not one of fp32, fp16, bf16"),
        (["--impl", "fast"], "--impl 'fast' is not one of auto, triton"),
        (["--op", "attention", "--model", "x"], "give one of them"),
        (["--jobs", "0"], "--jobs 0: at least 1 is needed"),
        (["--jobs", "2", "--model", "x"], "a checkpoint (--model) takes one process"),
        (["--op", "bias_gelu", "--impl", "reference"], "what the others are held against"),
        (["--model", "nowhere"], "nowhere is no folder"),
    ],
)
def test_refuses(arguments, message, cli):
    assert message in cli("validate", *arguments).line


def test_refuses_what_is_absent(cli, monkeypatch):
    monkeypatch.setitem(dispatch.UNAVAILABLE, "native", "nobody compiled it")
    line = cli("validate", "--impl", "native").line
    assert "native cannot be validated here: nobody compiled it" in line


@pytest.mark.skipif(not implementations("mlm_mask"), reason=str(dispatch.UNAVAILABLE["native"]))
def test_wrong_masking_is_found(cli, monkeypatch):
    """One label of one row."""
    from tinybert_fast.ops import native

    right = native.mlm_mask

    def wrong(*call):
        rows, labels, offsets, dense = right(*call)
        labels[0] += 1
        return rows, labels, offsets, dense

    assert cli("validate", "--op", "mlm_mask").code == 0
    monkeypatch.setattr(native, "mlm_mask", wrong)
    answer = cli("validate", "--op", "mlm_mask")
    assert answer.code == 1
    assert "numbers unlike the reference's: error 1.000e+00, budget 0" in answer.out
