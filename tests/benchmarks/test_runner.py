"""The benchmark runner: statistics, the check that comes before any speed, what it writes."""

import csv
import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast import ops
from tinybert_fast.benchmarks import (
    checking,
    measuring,
    op_call,
    rounds,
    runner,
    step_work,
    suites,
    table,
    training_step,
)
from tinybert_fast.benchmarks.baselines import one_model, plain_bert, textbrewer
from tinybert_fast.benchmarks.batches import draw_batch
from tinybert_fast.benchmarks.breakdown import MATRIX_PRODUCTS, breakdown, show
from tinybert_fast.benchmarks.case import (
    Case,
    Check,
    Disagreement,
    Failed,
    Outcome,
    Setup,
    Unavailable,
    Work,
)
from tinybert_fast.benchmarks.cases import (
    attention_score_mse,
    attention_score_mse_memory,
    distill_step,
    finetune_step,
    inference,
    masking,
    mlm_step,
    pretrain_step,
    scaling,
    step_case,
)
from tinybert_fast.benchmarks.clocks import Clock
from tinybert_fast.ops.layout import SequenceLayout

CPU = torch.device("cpu")
CLOCK = Clock(CPU)
SMOKE = Setup(CPU, smoke=True)


class Fake:
    """A provider that writes down when it runs and answers what it is told."""

    def __init__(self, name, role, log, *, loss=2.0, gradient=1.0, bf16=0.0):
        self.name, self.role, self.log = name, role, log
        self.loss, self.gradient, self.bf16 = loss, gradient, bf16

    def tune(self, dtype, seconds):
        self.log.append(f"tune {self.name}")

    def setting(self, dtype):
        return "none to choose"

    def run(self, dtype):
        self.log.append(self.name)

    def outcome(self, what, dtype):
        self.log.append(f"check {self.name}")
        extra = self.bf16 if dtype == "bf16" else 0.0
        gradients = {"w": torch.full((3,), self.gradient + extra), "b": torch.zeros(2)}
        return Outcome(self.loss + extra, gradients)


@pytest.fixture(autouse=True)
def without_textbrewer(monkeypatch):
    """Whoever has it installed sees the same providers."""
    monkeypatch.setattr(textbrewer, "is_installed", lambda: False)


def fake_case(*providers, reference="a"):
    others = tuple(p.name for p in providers if p.name != reference)
    return Case(
        name="fake",
        batch=2,
        width=8,
        valid_tokens=10,
        dropout=0.1,
        optimizer="none",
        providers=list(providers),
        checks=(Check("the inputs", reference, others),),
    )


def facts():
    return dict.fromkeys(table.COLUMNS, "x")


# ---- statistics ----------------------------------------------------------------------------------


def test_rounds_are_interleaved():
    log = []
    lanes = [(Fake(name, "ours", log), "fp32") for name in "ABC"]
    ticks = iter(range(100))

    def clock(call):
        call()
        return float(next(ticks))

    times = rounds.interleave(lanes, rounds=2, warm_up=1, clock=clock)
    assert "".join(log) == "ABC" * 3
    # The warm-up took ticks 0, 1, 2 and is not kept.
    assert [times[lane] for lane in lanes] == [[3, 6], [4, 7], [5, 8]]


def test_speedup_is_the_median_of_the_rounds_ratios():
    baseline, mine = [10.0, 100.0, 12.0], [5.0, 10.0, 3.0]  # ratios 2, 10, 4
    assert rounds.speedup(baseline, mine) == 4.0
    assert rounds.speedup(mine, mine) == 1.0
    assert rounds.speedup(None, mine) is None


def test_quantiles_interpolate():
    assert rounds.quantiles([4.0, 1.0, 2.0, 3.0, 5.0], (0.2, 0.5, 0.8)) == pytest.approx(
        [1.8, 3.0, 4.2]
    )
    assert rounds.quantiles([7.0], (0.2, 0.5, 0.8)) == [7.0] * 3


@pytest.mark.parametrize("power", [1, 2])
def test_growth_exponent(power):
    rows = [
        {"case": "c", "provider": "p", "dtype": "fp32", "width": n, "peak_mib": peak}
        # N = 64 is scratch of a fixed size, which the fit leaves out.
        for n, peak in [(64, 50.0), *((n, 3.0 * n**power) for n in (128, 256, 512))]
    ]
    table.growth_exponents(rows)
    assert {row["growth"] for row in rows} == {power}


def test_growth_needs_two_widths():
    row = dict.fromkeys(table.COLUMNS) | {"case": "c", "provider": "p", "dtype": "fp32", "width": 8}
    table.growth_exponents([row])
    assert row["growth"] is None


# ---- values before speed -------------------------------------------------------------------------


def test_checks_come_before_times_and_rows_say_what_they_found():
    log = []
    providers = [Fake("a", "a", log), Fake("b", "b", log), Fake("o", "ours", log, gradient=1.00001)]
    rows = measuring.measure(fake_case(*providers), ("fp32",), 3, 1, CLOCK, facts())
    first_run = log.index("a")
    assert all(not word.startswith("check") for word in log[first_run:])
    assert [row["provider"] for row in rows] == ["a", "b", "o"]
    assert all(list(row) == list(table.COLUMNS) for row in rows)
    assert rows[0]["gradient_error"] is None  # the reference itself
    assert rows[2]["gradient_error"] == pytest.approx(1e-5, rel=0.1)
    assert rows[0]["speedup_a"] == rows[1]["speedup_b"] == 1.0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"loss": 2.001}, "Loss differs by 5.00e-04"),
        ({"loss": math.nan}, "Loss differs by nan"),
        ({"gradient": 1.01}, "gradient of w by 1.00e-02"),
        ({"gradient": math.nan}, "gradient of w by nan"),
    ],
    ids=str,
)
def test_a_wrong_provider_is_never_timed(wrong, says):
    log = []
    case = fake_case(Fake("a", "a", log), Fake("o", "ours", log, **wrong))
    with pytest.raises(Disagreement, match=says):
        measuring.measure(case, ("fp32",), 3, 1, CLOCK, facts())
    assert "o" not in log


def test_a_missing_gradient_disagrees():
    exact = Outcome(1.0, {"w": torch.ones(2), "b": torch.ones(2)})
    errors, worst = checking.errors_between(exact, Outcome(1.0, {"w": torch.ones(2)}))
    assert errors == (0.0, math.inf)
    assert worst.startswith("b ")


def test_a_gradient_that_is_zero_but_for_rounding_agrees():
    exact = Outcome(1.0, {"w": torch.ones(4), "key.bias": torch.zeros(4)})
    other = Outcome(1.0, {"w": torch.ones(4), "key.bias": torch.full((4,), 1e-8)})
    errors, _ = checking.errors_between(exact, other)
    assert errors[1] < checking.GRADIENT_TOLERANCE


def test_bf16_may_be_as_far_off_as_the_reference_in_bf16():
    near = fake_case(Fake("a", "a", [], bf16=0.01), Fake("o", "ours", [], bf16=0.015))
    assert checking.check(near, "bf16")["o"][1] == pytest.approx(0.015, rel=1e-4)
    far = fake_case(Fake("a", "a", [], bf16=0.01), Fake("o", "ours", [], bf16=0.03))
    with pytest.raises(Disagreement):
        checking.check(far, "bf16")


def without_attention(terms):
    return {name: term for name, term in terms.items() if not name.startswith("attention")}


def test_real_cases_agree_and_a_dropped_loss_term_is_seen(monkeypatch):
    (case,) = distill_step.CASES["distill_step_b16_n128"](SMOKE)
    found = checking.check(case, "fp32")
    assert found.keys() == {"careful", "ours", "ours cached"}
    assert checking.check(case, "bf16").keys() == found.keys()
    original = distill_step.intermediate_terms
    monkeypatch.setattr(
        distill_step, "intermediate_terms", lambda *a, **k: without_attention(original(*a, **k))
    )
    with pytest.raises(Disagreement, match="'ours' does not compute"):
        checking.check(case, "fp32")


def test_textbrewer_computes_the_same_loss_in_fp32_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(textbrewer, "is_installed", lambda: True)
    monkeypatch.chdir(tmp_path)
    (case,) = distill_step.CASES["distill_step_b16_n128"](SMOKE)
    theirs = next(one for one in case.providers if one.name == "textbrewer")
    theirs.tune("fp32", lambda call: 0.0)
    assert {"textbrewer", "ours"} <= checking.check(case, "fp32").keys()
    assert len(case.checks) == 2  # with padding and without
    theirs.run("fp32")
    left_out: dict[tuple[str, str], str] = {}
    assert "textbrewer" not in checking.check(case, "bf16", left_out)
    assert "counts pairs in bf16" in left_out["textbrewer", "bf16"]
    assert not list(tmp_path.iterdir())  # its folders and logs


@pytest.mark.parametrize("step", [mlm_step, pretrain_step, finetune_step])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_providers_of_a_step_agree_and_a_scaled_loss_is_seen(step, dtype, monkeypatch):
    (case,) = next(iter(step.CASES.values()))(SMOKE)
    assert checking.check(case, dtype).keys() == {"careful", "ours"}
    ours = case.providers[-1]
    backward = ours.backward

    def twice(batch, dtype, setting):
        backward(batch, dtype, setting)
        return backward(batch, dtype, setting)

    monkeypatch.setattr(ours, "backward", twice)
    with pytest.raises(Disagreement, match="gradient of"):
        checking.check(case, dtype)


def test_tuning_leaves_the_weights_alone():
    (case,) = mlm_step.CASES["mlm_step"](SMOKE)
    careful = case.providers[1]
    before = {name: p.clone() for name, p in careful.trained.named_parameters()}
    taken = iter([3.0, 1.0, 2.0])

    def seconds(call):
        call()
        return next(taken)

    careful.tune("fp32", seconds)
    assert careful.setting("fp32") == "length buckets: 2"
    assert all(torch.equal(p, before[name]) for name, p in careful.trained.named_parameters())
    assert all(p.grad is None for p in careful.trained.parameters())


# ---- training steps as on a GPU -----------------------------------------------------------------


class Again:
    """In the place of a CUDA graph: a replay calls once more."""

    def __init__(self, call):
        call()
        self.call = call

    def run(self, dtype):
        self.call()


def sdpa_of_each(cu_seqlens, longest, q, k, v, *, dropout_p, scale):
    """In the place of FlashAttention on packed rows, and as choosy."""
    lengths = cu_seqlens.diff().tolist()
    assert cu_seqlens.dtype == torch.int32
    assert (max(lengths), q.shape[-1] % 8) == (longest, 0)
    apart = (x.transpose(0, 1).split(lengths, 1) for x in (q, k, v))
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout_p, scale=scale)
    return torch.cat([attend(*sequence) for sequence in zip(*apart)], 1).transpose(0, 1)


@pytest.fixture
def as_on_gpu(monkeypatch):
    """The cases of a GPU, on a CPU and without a code generator."""
    monkeypatch.setattr(Setup, "on_gpu", True)
    monkeypatch.setattr(training_step, "Replay", Again)
    monkeypatch.setattr(plain_bert, "BACKEND", "eager")
    monkeypatch.setattr(plain_bert, "PACKED", {("cpu", "fp32"), ("cpu", "bf16")})
    monkeypatch.setattr(plain_bert, "flash_varlen", sdpa_of_each)
    plain_bert.compile_once.cache_clear()
    yield
    plain_bert.compile_once.cache_clear()


@pytest.mark.parametrize(
    ("name", "providers"),
    [
        ("mlm_step_b64_n512", "transformers, careful, careful compile, careful graph, ours, "
         "ours graph"),
        ("distill_step_b256_n128", "official, careful, careful graph, ours, ours graph, "
         "ours cached"),
        ("distill_step_b256_n512_full", "careful, careful graph, ours, ours graph, "
         "ours fp8 graph"),
        ("student_step_b256_n128_full", "official, careful, careful graph, ours, ours graph"),
        ("pretrain_step_b256_n128", "transformers, careful, careful compile, careful graph, ours, "
         "ours graph"),
        ("finetune_step_b256_n128", "transformers, careful, careful compile, careful graph, ours, "
         "ours graph"),
    ],
)  # fmt: skip
def test_steps_of_a_gpu_agree(as_on_gpu, capsys, name, providers):
    (case,) = suites.load_cases("step", on_gpu=True)[name](SMOKE)
    rows = measuring.measure(case, ("fp32",), 1, 1, CLOCK, facts())
    assert not capsys.readouterr().err  # nobody was left out
    assert ", ".join(row["provider"] for row in rows) == providers
    roles = {row["provider"]: row["role"] for row in rows}
    named = {"transformers": "a", "official": "a", "careful": "b", "ours": "ours"}
    assert roles == {provider: named.get(provider, provider) for provider in roles}
    assert all(row["tflops"] > 0 for row in rows)
    by_name = {row["provider"]: row for row in rows}
    assert by_name["careful"]["speedup_b"] == 1.0
    assert by_name["ours graph"]["speedup_b"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "packed"),
    [("mlm_step_b256_n128", 1), ("pretrain_step_b256_n128", 1), ("finetune_step_b256_n128", 1),
     ("distill_step_b256_n128", 2), ("distill_step_b256_n128_full", 0),
     ("student_step_b256_n128_full", 0)],
)  # fmt: skip
def test_every_setting_of_the_baselines_agrees(as_on_gpu, name, packed, dtype):
    (case,) = suites.load_cases("step", on_gpu=True)[name](SMOKE)
    checks = case.checks
    for provider in case.providers:
        step = getattr(provider, "step", provider)
        if not provider.name.startswith("careful"):
            continue
        tried = [str(setting) for setting in step.settings]
        assert len(set(tried)) == len(tried)
        if name.startswith("mlm") or provider.name != "careful":  # hooks need Transformers' model
            assert sum("packed" in words for words in tried) == packed
        case.checks = tuple(
            replace(check, others=(provider.name,))
            for check in checks
            if provider.name in check.others
        )
        for setting in step.settings:
            step.choose(dtype, setting)
            assert checking.check(case, dtype).keys() == {provider.name}, setting


@pytest.fixture
def compiles(monkeypatch):
    """Baselines are compiled as in a run at full size, but without a code generator."""
    monkeypatch.setattr(Setup, "compiles", True)
    monkeypatch.setattr(plain_bert, "BACKEND", "eager")
    plain_bert.compile_once.cache_clear()
    yield
    plain_bert.compile_once.cache_clear()
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list(suites.load_cases("step")))
def test_compiled_steps_of_a_cpu_agree(compiles, name, dtype):
    """What is timed, at dropout 0, where the check of the runner is uncompiled."""
    (case,) = suites.load_cases("step")[name](replace(SMOKE, dropout=0.0))
    providers = {one.name: one for one in case.providers}
    step, careful = providers["careful compile"], providers["careful"]
    expected = careful.outcome("timed", dtype)
    assert all(setting.compiled for setting in step.settings)
    for setting in step.settings:
        step.choose(dtype, setting)
        loss = step._gradients("timed", dtype)
        found = {n: p.grad for n, p in step.trained.named_parameters() if p.grad is not None}
        errors, worst = checking.errors_between(expected, Outcome(float(loss), found))
        assert max(errors) < (1e-4 if dtype == "fp32" else 0.03), (setting, worst)
        step.optimizer.zero_grad(set_to_none=True)


def test_a_compiled_step_is_a_provider(compiles, capsys):
    (case,) = suites.load_cases("step")["mlm_step"](SMOKE)
    rows = {
        row["provider"]: row for row in measuring.measure(case, ("fp32",), 1, 1, CLOCK, facts())
    }
    assert list(rows) == ["transformers", "careful", "careful compile", "ours"]
    assert rows["careful compile"]["setting"] == "length buckets: 4, compiled"
    assert not capsys.readouterr().err


def test_packed_rows_are_tried_where_flash_attention_serves_them(as_on_gpu, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(Setup, "on_gpu", True)
    (case,) = suites.load_cases("step", on_gpu=True)["mlm_step_b256_n128"](SMOKE)
    careful = case.providers[1]
    assert not any(form.packed for form in careful.offered("bf16"))
    careful.device = torch.device("cuda")
    tried = {dtype: [str(form) for form in careful.offered(dtype)] for dtype in ("fp32", "bf16")}
    assert tried["bf16"] == ["length buckets: 1", "packed"]
    assert tried["fp32"] == [f"length buckets: {count}" for count in (1, 2, 4)]
    careful.choose("bf16", careful.offered("bf16")[-1])
    assert careful.setting("bf16") == "packed"
    assert careful.setting("fp32") == "length buckets: 4"  # of the check's reference


def test_the_packed_encoder_calls_the_operator_as_it_is():
    """Its shapes, its formula for autograd: on meta tensors, as a CPU has no kernel of it."""
    from transformers import BertModel

    with torch.device("meta"):
        bert = BertModel(step_case.student_config(SMOKE), add_pooling_layer=False)
    batch = draw_batch([9, 16, 3], 16, 120, SMOKE.generator(), torch.device("meta"))
    read = torch.zeros(5, dtype=torch.long, device="meta")
    found = plain_bert.encode(bert, batch, compiled=False, packed=True, read=read)
    assert [tuple(x.shape) for x in found.hidden] == [(28, 24), (28, 24), (5, 24)]
    assert {tuple(x.shape) for x in (*found.queries, *found.keys)} == {(28, 2, 12)}
    found.hidden[-1].sum().backward()
    assert all(p.grad.shape == p.shape for p in bert.parameters())


class Stale(Again):
    """A graph that reads the weights it was captured at."""

    step = None

    def __init__(self, call):
        super().__init__(call)
        self.grads = [p.grad.clone() for p in self.step.trained.parameters()]
        self.trained = list(self.step.trained.parameters())

    def run(self, dtype):
        self.call()
        for p, grad in zip(self.trained, self.grads):
            p.grad = grad


class Idle(Again):
    """A graph of less than was asked for."""

    def run(self, dtype):
        pass


@pytest.mark.parametrize(("replay", "says"), [(Stale, "gradient of"), (Idle, "differs by nan")])
@pytest.mark.parametrize("who", ["careful graph", "ours graph"])
def test_a_graph_that_computes_less_than_the_step_is_seen(
    as_on_gpu, monkeypatch, who, replay, says
):
    (case,) = suites.load_cases("step", on_gpu=True)["mlm_step_b256_n128"](SMOKE)
    graph = next(one for one in case.providers if one.name == who)
    case.checks = tuple(replace(check, others=(who,)) for check in case.checks)
    weights = [p.clone() for p in graph.step.trained.parameters()]
    checking.check(case, "fp32")
    assert all(torch.equal(*two) for two in zip(weights, graph.step.trained.parameters()))
    monkeypatch.setattr(Stale, "step", graph.step)
    monkeypatch.setattr(training_step, "Replay", replay)
    with pytest.raises(Disagreement, match=says):
        checking.check(case, "fp32")


def test_a_graph_is_captured_before_the_checks_and_leaves_the_weights_alone(as_on_gpu):
    (case,) = suites.load_cases("step", on_gpu=True)["mlm_step_b256_n128"](SMOKE)
    graph = next(one for one in case.providers if one.name == "careful graph")
    before = [p.clone() for p in graph.step.trained.parameters()]
    taken = iter([3.0, 1.0, 2.0])
    graph.tune("fp32", lambda call: next(taken))
    assert graph.setting("fp32") == "length buckets: 2, compiled"
    assert all(torch.equal(*two) for two in zip(before, graph.step.trained.parameters()))
    graph.run("fp32")
    assert not all(torch.equal(*two) for two in zip(before, graph.step.trained.parameters()))


def test_who_cannot_run_is_left_out_aloud(as_on_gpu, capsys, monkeypatch):
    (case,) = suites.load_cases("step", on_gpu=True)["student_step_b256_n128_full"](SMOKE)

    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(training_step, "Replay", refuse)
    rows = measuring.measure(case, ("fp32",), 1, 1, CLOCK, facts())
    assert [row["provider"] for row in rows] == ["official", "careful", "ours"]
    said = capsys.readouterr().err
    assert "student_step_b256_n128_full N=16: no ours graph in fp32: capture: RuntimeError" in said
    assert "no careful graph in fp32: length buckets: 1, direct, compiled: RuntimeError: o" in said


def test_a_setting_too_large_for_the_memory_is_not_the_fastest(capsys):
    (case,) = mlm_step.CASES["mlm_step"](SMOKE)
    careful = case.providers[1]

    def seconds(call):
        if careful.setting("fp32") != "length buckets: 2":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1.0

    careful.tune("fp32", seconds)
    assert careful.setting("fp32") == "length buckets: 2"
    assert "careful, length buckets: 4: OutOfMemoryError: CUDA" in capsys.readouterr().err
    careful.settings = careful.settings[::2]
    with pytest.raises(Unavailable, match=r"buckets: 1: OutOfMemoryError.*buckets: 4: Out"):
        careful.tune("fp32", seconds)


def test_without_its_reference_a_case_fails():
    class Absent(Fake):
        def tune(self, dtype, seconds):
            raise Unavailable("too large")

    case = fake_case(Absent("a", "a", []), Fake("o", "ours", []))
    with pytest.raises(Failed, match="'a', which others are held to, cannot run"):
        measuring.measure(case, ("fp32",), 1, 1, CLOCK, facts())


@pytest.mark.parametrize(("seconds", "expected"), [(1e-3, (50, 20)), (0.1, (15, 3)), (1, (10, 3))])
def test_long_steps_take_fewer_rounds_on_a_gpu(seconds, expected):
    lanes = [(Fake(name, "ours", []), "fp32") for name in "AB"]
    assert rounds.repetitions(lanes, lambda call: seconds, 1, rounds.SECONDS) == expected


def test_work_of_heads_counts_their_products_and_parameters():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertForPreTraining, BertForSequenceClassification

    config, lengths = step_case.student_config(SMOKE), (16, 9, 3, 5)
    encoder = step_work.forward_flops(config, lengths, 7 + 4)
    model = BertForPreTraining(config).eval()
    rows, first = torch.zeros(7, config.hidden_size), torch.zeros(4, 1, config.hidden_size)
    with FlopCounterMode(display=False) as counter:
        model.cls(rows, model.bert.pooler(first))
    work = step_work.pre_training_work(config, lengths, 7, "fp32")
    assert work.flops == 3 * (encoder + counter.get_total_flops())
    size = step_work.PARAMETER_BYTES
    assert work.bytes == size * sum(p.numel() for p in model.parameters())
    work = step_work.classifier_work(config, lengths, 7, "fp32")
    classifier = BertForSequenceClassification(config)
    assert work.bytes == size * sum(p.numel() for p in classifier.parameters())


@pytest.mark.parametrize("lengths", [(16,) * 4, (16, 9, 3, 5)])
def test_work_of_a_step_counts_its_matrix_products(lengths):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertModel

    config = step_case.student_config(SMOKE)
    bert = BertModel(config, add_pooling_layer=False).eval()
    found = 0
    for n in lengths:
        one = draw_batch([n], n, config.vocab_size, SMOKE.generator(), CPU)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            plain_bert.encode(bert, one, compiled=False)
        found += counter.get_total_flops()
    assert step_work.forward_flops(config, lengths) == found
    assert step_work.parameters(config) == sum(p.numel() for p in bert.parameters())


def test_kernels_are_shown_beside_the_time_without_any(capsys):
    from rich.console import Console

    kernels = [{"name": "k" * 200, "ms": 3.0, "calls": 2}]
    found = {"operators": kernels, "products_ms": 1.0, "products_gflop": 1.0}
    show(found | {"kernels": kernels, "busy_ms": 3.0, "wall_ms": 4.0}, "ours", 1.0, Console())
    printed = capsys.readouterr().out
    assert "ours: kernels" in printed
    assert "Kernels take 3.00 ms of a step of 4.00 ms; the GPU waits for 25% of it." in " ".join(
        printed.split()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU is waited for")
@pytest.mark.parametrize(
    "name", [f"{step}_step_b256_n128" for step in ("mlm", "distill", "pretrain", "finetune")]
)
def test_our_steps_wait_for_no_gpu(name):
    cases = suites.load_cases("step", on_gpu=True)
    (case,) = cases[name](Setup(torch.device("cuda"), smoke=True))
    ours = next(one for one in case.providers if one.name == "ours")
    ours.run("bf16")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.run("bf16")
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- suites, files, exit codes -------------------------------------------------------------------


def test_step_suite_end_to_end(tmp_path, capsys):
    """Every case, at sizes that take a second."""
    json_file, csv_file = tmp_path / "out" / "rows.json", tmp_path / "rows.csv"
    files = {"json_path": json_file, "csv_path": csv_file}
    runner.run_suite("step", smoke=True, threads=1, rounds=2, **files)
    printed = capsys.readouterr().out
    for word in ("mlm_step", "distill_step_b16_n128", "distill_step_b4_n512", "adamw_fused inside"):
        assert word in printed
    written = json.loads(json_file.read_text())
    assert written["suite"] == "step"
    assert written["columns"] == table.COLUMNS
    rows = written["rows"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, provider)
        for case, *providers in (
            ("mlm_step", "transformers", "careful", "ours"),
            ("distill_step_b16_n128", "official", "careful", "ours", "ours cached"),
            ("distill_step_b4_n512", "official", "careful", "ours", "ours cached"),
            ("student_step_b16_n128", "official", "careful", "ours"),
            ("pretrain_step", "transformers", "careful", "ours"),
            ("finetune_step", "transformers", "careful", "ours"),
        )
        for provider in providers
    ]
    for row in rows:
        assert list(row) == list(table.COLUMNS)
        assert row["median_ms"] > 0
        assert row["peak_mib"] > 0
        assert row["dropout"] == 0.1
        fill = 0.3 if row["case"] == "finetune_step" else 0.6
        assert abs(row["valid_fraction"] - fill) < 0.1
        assert row["threads"] == 1
        assert row["rounds"] == 2
        assert all(row[name] for name in ("cpu", "cores", "torch", "transformers", "date"))
    with csv_file.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["case"] for row in read] == [row["case"] for row in rows]
    assert list(read[0]) == list(table.COLUMNS)
    assert read[0]["speedup_a"] == "1.0"
    assert not list(tmp_path.rglob("*.partial"))


def test_profile_of_our_runs(tmp_path, capsys):
    target = tmp_path / "rows.json"
    runner.run_suite(
        "step", cases=["mlm"], smoke=True, threads=1, rounds=1, profile=True, json_path=target
    )
    (found,) = json.loads(target.read_text())["profiles"]
    assert (found["case"], found["provider"], found["dtype"]) == ("mlm_step", "ours", "fp32")
    times = {o["name"]: o["ms"] for o in found["operators"]}
    assert list(times.values()) == sorted(times.values(), reverse=True)
    assert {"tinybert_fast::attention_fwd", "aten::_fused_adamw_"} <= times.keys()
    assert found["products_ms"] == pytest.approx(sum(times.get(n, 0) for n in MATRIX_PRODUCTS))
    printed = capsys.readouterr().out
    assert "mlm_step N=16, ours fp32: operators by own time" in printed
    assert f"Matrix products: {found['products_gflop']:.0f} GFLOP in" in printed


def test_products_are_counted_in_operations():
    x, w, b = torch.ones(64, 32), torch.ones(32, 16), torch.ones(16)
    found = breakdown(lambda: torch.addmm(b, x, w).relu(), CPU)
    assert found["products_gflop"] == pytest.approx(2 * 64 * 32 * 16 / 1e9)
    assert {o["name"]: o["calls"] for o in found["operators"]}["aten::addmm"] == 1


def test_masking_suite(monkeypatch):
    rows = runner.run_suite("masking", smoke=True, threads=1, rounds=2)
    names = ["transformers", "transformers numpy", "ours"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        ("mlm_mask", "transformers"), ("mlm_mask", "transformers numpy"),
        ("mlm_mask", "torch exact"), ("mlm_mask", "ours"), ("mlm_mask", "ours weighted"),
        *(("collate_tokens", name) for name in names),
        *(("collate_words", name) for name in names),
    ]  # fmt: skip
    assert all(row["dtype"] == "int64" and row["growth"] is None for row in rows)
    assert all(row["tokens_per_s"] > 0 for row in rows)
    chosen = {row["setting"] for row in rows if row["provider"] == "torch exact"}
    assert chosen < {"multinomial", "top-k"}
    assert not any(row["setting"] for row in rows if row["provider"] != "torch exact")

    def another_draw(ids, rule, **options):
        if options.get("impl") != "reference":
            options["seed"] += 1
        return ops.mlm_mask(ids, rule, **options)

    monkeypatch.setattr(masking, "mlm_mask", another_draw)
    with pytest.raises(Disagreement, match="mlm_mask: input_ids differs"):
        runner.run_suite("masking", smoke=True, rounds=1)


@pytest.mark.parametrize(
    ("what", "broken", "says"),
    [
        ("labels", lambda x: x.roll(1, dims=1), "labels differs"),
        ("input_ids", lambda x: x.index_fill(1, torch.tensor([0]), 7), "input_ids differs"),
        ("attention_mask", torch.zeros_like, "attention_mask differs"),
        ("example_id", lambda x: torch.arange(4), "expected input_ids, labels, token_type_ids"),
    ],
    ids=["elsewhere", "a-token", "no-token-real", "another-column"],
)
def test_a_broken_collator_gives_no_rows(what, broken, says, tmp_path, monkeypatch):
    class Broken(masking.SparseMaskingCollator):
        def __call__(self, examples, return_tensors=None):
            batch = super().__call__(examples, return_tensors)
            return {**batch, what: broken(batch.get(what))}

    monkeypatch.setattr(masking, "SparseMaskingCollator", Broken)
    file = tmp_path / "rows.csv"
    with pytest.raises(Disagreement, match=says):
        runner.run_suite("masking", cases=["collate_tokens"], smoke=True, rounds=1, csv_path=file)
    assert not file.exists()


@pytest.mark.parametrize("choose", masking.EXACT.values(), ids=masking.EXACT)
def test_plain_torch_masks_an_exact_number_too(choose):
    torch.manual_seed(0)
    ids = torch.arange(200, 400).view(2, 100)
    special = torch.zeros_like(ids)
    special[:, [0, -1]] = 1
    masked, labels = masking.exactly(choose, 4, ids, special)
    labelled = labels != -100
    assert labelled.sum(1).tolist() == [15, 15]  # of 98
    assert not labelled[:, [0, -1]].any()
    assert torch.equal(labels[labelled], ids[labelled])
    assert torch.equal(masked[~labelled], ids[~labelled])
    assert 15 < int((masked[labelled] == 4).sum()) < 30
    assert torch.equal(ids, torch.arange(200, 400).view(2, 100))


def test_whole_words_are_held_to_their_words(monkeypatch):
    class Words(masking.SparseMaskingCollator):
        def _word_starts(self, ids, starts, offsets):
            return None if self.rule.unit == "token" else torch.ones_like(ids, dtype=torch.bool)

    monkeypatch.setattr(masking, "SparseMaskingCollator", Words)
    with pytest.raises(Disagreement, match="differs from the reference's"):
        list(masking.CASES["collate_words"](SMOKE))


def test_inference_suite(capsys):
    rows = runner.run_suite("inference", cases=SOME_ANSWERS, smoke=True, threads=1, rounds=1)
    assert {row["provider"] for row in rows} == {"transformers", "careful", "ours"}
    assert {(row["batch"], row["pass"], row["optimizer"]) for row in rows} == {
        (1, "forward", "none"),
        (4, "forward", "none"),
    }
    for row in rows:
        assert row["tflops"] > 0
        assert row["provider"] == "transformers" or row["loss_error"] < 1e-5
    printed = capsys.readouterr().out
    assert "sentences/s" in printed
    assert "Times as fast as 12l_768" in printed


SOME_ANSWERS = ("inference_12l_768", "inference_4l_312_b1", "inference_6l_768_b32_full")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", suites.load_cases("inference"))
def test_answers_of_all_providers_agree(name, dtype):
    (case,) = suites.load_cases("inference")[name](SMOKE)
    careful = case.providers[1]
    for form in careful.forms:
        careful._chosen[dtype] = form
        assert checking.check(case, dtype).keys() == {"careful", "ours"}


@pytest.mark.parametrize("name", ["inference_4l_312_b1", "inference_4l_312_b32"])
def test_compiled_answers_of_a_cpu_agree(monkeypatch, name):
    """With Inductor, which packs the weights."""
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    monkeypatch.setattr(Setup, "compiles", True)
    (case,) = suites.load_cases("inference")[name](SMOKE)
    careful = case.providers[1]
    forms = [form for form in careful.forms if "compiled" in form]
    assert forms
    for form in forms:
        careful._chosen["bf16"] = form
        assert checking.check(case, "bf16").keys() == {"careful", "ours"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    torch.compiler.reset()


def test_answers_as_on_a_gpu_agree(as_on_gpu, monkeypatch):
    """Compiled buckets, and the layout from lengths."""
    (case,) = suites.load_cases("inference", on_gpu=True)["inference_4l_312_b256"](SMOKE)
    _, careful, ours = case.providers
    batch = careful.batch
    careful.forms |= {str(form): form for form in plain_bert.forms(batch) if form.compiled}
    ours.layout["layout"] = SequenceLayout.from_lengths(batch.lengths, batch.input_ids.shape[1])
    for form in [form for form in careful.forms if "compiled" in form]:
        careful._chosen["fp32"] = form
        checking.check(case, "fp32")


def test_another_answer_is_a_disagreement(monkeypatch):
    (case,) = suites.load_cases("inference")["inference_4l_312_b32"](SMOKE)
    with torch.no_grad():
        case.providers[-1].model_in("fp32").encoder.layer[0].output.LayerNorm.bias[0] = 1e-3
    with pytest.raises(Disagreement, match="'ours' does not compute"):
        checking.check(case, "fp32")


def test_students_are_compared_with_the_teacher_at_the_same_batch():
    common = {"suite": "inference", "provider": "ours", "dtype": "fp32", "threads": 2}
    common["valid_fraction"] = 0.6
    rows = [
        {**common, "case": f"inference_{model}_b{batch}", "batch": batch, "median_ms": median}
        for batch, medians in ((1, (12.0, 6.0, 2.0)), (32, (90.0, 30.0, 10.0)))
        for model, median in zip(inference.MODELS, medians)
    ]
    rows.append({**rows[1], "provider": "careful"})  # whose teacher was not measured
    rows.append({**rows[1], "suite": "step"})
    found = [(one["student"], one["batch"], one["times"]) for one in table.over_teacher(rows)]
    assert found == [
        ("6l_768", 1, 2.0), ("4l_312", 1, 6.0), ("6l_768", 32, 3.0), ("4l_312", 32, 9.0),
    ]  # fmt: skip
    assert {one["published"] for one in table.over_teacher(rows)} == {2.0, 9.4}


def test_scaling_suite(tmp_path, capsys):
    rows = runner.run_suite("scaling", smoke=True, threads=1, rounds=1, plots_path=tmp_path)
    points = [(row["case"], row["provider"], row["batch"], row["width"]) for row in rows]
    assert points == [
        (case, provider, batch, width)
        for case, first in (("mlm_step", "transformers"), ("distill_step", "official"))
        for at, (batch, width, _) in enumerate(scaling.SMOKE_GRID)
        for provider in (*((first,) if at == 0 else ()), "careful", "ours")
    ]
    assert [row["valid_fraction"] for row in rows if row["provider"] == "ours"] == pytest.approx(
        [fill for _, _, fill in scaling.SMOKE_GRID] * 2, abs=0.05
    )
    assert all(row["gradient_error"] < 1e-4 for row in rows if row["provider"] == "ours")
    assert "distill_step: real tokens per second" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["scaling.png"]


@pytest.mark.parametrize("points", [scaling.MLM_GRID, scaling.DISTILL_GRID, scaling.GPU_GRID])
def test_a_grid_varies_one_thing_at_a_time(points):
    batch, width, fill = middle = points[0]
    assert len(set(points)) == len(points)
    for point in points[1:]:
        same_positions = point.batch * point.width == batch * width and point.fill == fill
        assert same_positions or sum(a == b for a, b in zip(point, middle)) == 2


@pytest.mark.parametrize("name", ["mlm_step", "distill_step"])
def test_scaling_on_a_gpu_compiles_nothing(as_on_gpu, name):
    case = next(suites.load_cases("scaling", on_gpu=True)[name](SMOKE))
    first = case.providers[0].name
    assert [one.name for one in case.providers] == [
        first, "careful", "careful graph", "ours", "ours graph",
    ]  # fmt: skip
    assert "compiled" not in " ".join(
        str(setting) for one in case.providers for setting in getattr(one, "step", one).settings
    )
    rows = measuring.measure(case, ("fp32",), 1, 1, CLOCK, facts())
    assert len(rows) == 5


def test_memory_suite_in_both_dtypes(capsys):
    rows = runner.run_suite("memory", smoke=True, dtype="both", threads=1)
    assert "peak ~ N^" in capsys.readouterr().out
    assert {row["dtype"] for row in rows} == {"fp32", "bf16"}
    growth = {(row["case"], row["provider"], row["dtype"]): row["growth"] for row in rows}
    of_length, of_tokens = "attention_score_mse_memory", "attention_score_mse_memory_of_tokens"
    assert growth[of_length, "autograd", "fp32"] > 1.7
    assert growth[of_length, "ours", "fp32"] < 1.2
    assert growth[of_tokens, "autograd", "fp32"] > 0.7
    assert growth[of_tokens, "ours", "fp32"] < 0.2
    of_batch = {
        (row["batch"], row["provider"]): row["peak_mib"]
        for row in rows
        if row["case"] == "attention_score_mse_memory_of_batch" and row["dtype"] == "fp32"
    }
    assert {row["width"] for row in rows if row["case"].endswith("_of_batch")} == {64}
    assert of_batch[2, "autograd"] > 1.7 * of_batch[1, "autograd"]
    assert of_batch[2, "ours"] < 2.1 * of_batch[1, "ours"]
    assert {row["bf16_hardware"] for row in rows} <= {"yes", "no"}


@pytest.mark.parametrize(
    ("case", "fixed"),
    [
        ("attention_score_mse_memory", lambda batch, width: batch),
        ("attention_score_mse_memory_of_tokens", lambda batch, width: batch * width),
        ("attention_score_mse_memory_of_batch", lambda batch, width: width),
    ],
)
def test_memory_is_measured_along_one_line(case, fixed):
    for shapes in (attention_score_mse_memory.SHAPES, attention_score_mse_memory.SMOKE_SHAPES):
        assert len({fixed(*shape) for shape in shapes[case]}) == 1
        assert len(set(shapes[case])) > 1


def test_ops_suite():
    rows = runner.run_suite("ops", smoke=True, threads=1, rounds=1)
    widths = {
        "attention": (26, 32, 64),
        "layer_norm": (312, 768),
        "dropout_add_layer_norm": (312, 768),
        "embedding_layer_norm": (312, 768),
        "bias_gelu": (1200, 3072),
        "attention_score_mse": (26, 64),
        "hidden_mse": (312, 768),
        "linear_cross_entropy": (312, 768),
    }
    cases = {f"{op}_d{width}" for op, each in widths.items() for width in each}
    cases |= {f"attention_d{width}_no_dropout" for width in widths["attention"]}
    cases |= {f"attention_d{width}_ragged" for width in (26, 64)}
    cases |= {"attention_relation_kl_qk", "attention_relation_kl_vv"}
    assert {row["case"] for row in rows} == cases
    assert rows[0]["case"] == "attention_d26"  # what matters most comes first
    by_reference = {row["case"] for row in rows if row["provider"] == "reference"}
    assert by_reference == cases
    for row in rows:
        assert row["gbytes_per_s"] > 0
        assert row["bound_ms"] > 0
        assert row["provider"] != "ours" or row["gradient_error"] < 1e-4
    passes = {op: {row["pass"] for row in rows if row["case"].startswith(op)} for op in widths}
    assert passes["layer_norm"] == {"forward", "backward", "both"}
    assert passes["hidden_mse"] == {"both"}


def test_disagreement_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        attention_score_mse.ops, "attention_score_mse", lambda q, k, p, r, **_: (q * k).sum()
    )
    target = tmp_path / "rows.json"
    with pytest.raises(Failed, match="No speed is reported"):
        runner.run_suite("memory", smoke=True, json_path=target)
    assert "ms" not in capsys.readouterr().out
    assert not target.exists()


def test_a_failed_case_leaves_the_others(tmp_path, monkeypatch):
    right = suites.load_cases("ops")["hidden_mse_d312"]

    def wrong(setup):
        yield fake_case(Fake("a", "a", []), Fake("o", "ours", [], loss=3.0))

    monkeypatch.setattr(
        runner, "load_cases", lambda suite, on_gpu: {"wrong": wrong, "right": right}
    )
    target = tmp_path / "rows.csv"
    with pytest.raises(Disagreement, match="fake in fp32"):
        runner.run_suite("ops", smoke=True, rounds=1, csv_path=target)
    with target.open(newline="") as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"hidden_mse_d312"}


def test_only_some_providers():
    chosen = {"cases": ["linear_cross_entropy_d312"], "providers": ["ours"]}
    rows = runner.run_suite("ops", smoke=True, rounds=1, **chosen)
    assert [row["provider"] for row in rows] == ["transformers", "ours"]


def test_on_a_gpu_the_reference_runs_where_it_is_named(monkeypatch):
    made = []

    def cases(setup):
        made.append(setup.reference)
        return iter(())

    monkeypatch.setattr(runner, "load_cases", lambda suite, on_gpu: {"an_op": cases})
    runner.run_suite("ops", smoke=True)
    monkeypatch.setattr(runner, "_device", lambda name: torch.device("cuda"))
    for name in ("facts", "_ceilings"):
        monkeypatch.setattr(runner, name, lambda *_: {})
    monkeypatch.setattr(runner, "has_bf16", lambda device: True)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    runner.run_suite("ops", smoke=True)
    runner.run_suite("ops", smoke=True, providers=["ours", "reference"])
    assert made == [True, False, True]


def test_only_some_passes():
    chosen = {"cases": ["dropout_add_layer_norm_d312"], "passes": ["both"]}
    rows = runner.run_suite("ops", smoke=True, rounds=1, **chosen)
    assert {row["pass"] for row in rows} == {"both"}


def test_only_some_widths():
    every = runner.run_suite("memory", smoke=True)
    widths = sorted({row["width"] for row in every})
    assert len(widths) > 1
    rows = runner.run_suite("memory", smoke=True, widths=widths[:1])
    assert {row["width"] for row in rows} == set(widths[:1])
    assert len(rows) == sum(row["width"] == widths[0] for row in every)
    with pytest.raises(ValueError, match=r"^--width 77: these cases have "):
        runner.run_suite("memory", smoke=True, widths=[widths[0], 77])


def test_no_case_begins_after_the_minutes(monkeypatch):
    ticks = iter(range(0, 10_000, 70))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(ticks))
    with pytest.raises(Failed, match="hidden_mse_d768: not begun after 2 minutes"):
        runner.run_suite("ops", cases=["hidden"], smoke=True, rounds=1, minutes=2)


def test_sweeps_count_together_and_only_the_first_checks():
    log, sweeps = [], measuring.Sweeps()
    for _ in range(2):
        providers = [Fake("a", "a", log), Fake("o", "ours", log)]
        rows = measuring.measure(
            fake_case(*providers), ("fp32",), 3, 1, CLOCK, facts(), sweeps=sweeps
        )
    assert [(row["provider"], row["sweeps"], row["rounds"]) for row in rows] == [
        ("a", 2, 6),
        ("o", 2, 6),
    ]
    assert rows[1]["loss_error"] == 0.0
    assert log.count("check o") == 1
    assert log.count("tune o") == 2
    assert log.count("o") == 2 * (1 + 3) + 1  # warm-ups, rounds, peak memory


def test_settings_are_chosen_by_all_sweeps_so_far():
    """A sweep that was disturbed while it timed one setting does not choose by that alone."""
    sweeps, chosen = measuring.Sweeps(), []
    # Of "x" and "y" in turn: "x" is the faster one, and in the third sweep somebody disturbed it.
    taken = iter([1.0, 2.0, 1.0, 2.0, 5.0, 2.0])
    clock = SimpleNamespace(device=CPU, best=lambda call: next(taken))
    for _ in range(3):
        provider = Fake("o", "ours", [])
        at = {"setting": "x"}
        provider.setting = lambda dtype, at=at: at["setting"]
        provider.tune = lambda dtype, seconds, provider=provider, at=at: op_call.fastest(
            provider, dtype, ("x", "y"), lambda name: at.update(setting=name), seconds
        )
        measuring.tune(fake_case(provider), ("fp32",), clock, lambda text: None, sweeps)
        chosen.append(at["setting"])
    assert chosen == ["x", "x", "x"]


def test_a_setting_far_from_the_fastest_in_two_sweeps_is_not_timed_again():
    sweeps, timed = measuring.Sweeps(), []
    provider = Fake("o", "ours", [])
    at = {"setting": "x"}
    provider.setting = lambda dtype: at["setting"]
    provider.tune = lambda dtype, seconds: op_call.fastest(
        provider, dtype, ("x", "y", "z"), lambda name: at.update(setting=name), seconds
    )
    takes = {"x": 1.0, "y": 0.99 * measuring.FAR, "z": 1.01 * measuring.FAR}

    def best(call):
        timed.append(at["setting"])
        return takes[at["setting"]]

    clock = SimpleNamespace(device=CPU, best=best)
    for _ in range(4):
        measuring.tune(fake_case(provider), ("fp32",), clock, lambda text: None, sweeps)
    assert "".join(timed) == "xyz" * 2 + "xy" * 2
    assert at["setting"] == "x"


def test_free_cores_are_those_of_earlier_rows_of_the_same():
    common = {"cpu": "a", "cores": 2, "threads": 2}
    rows = [
        {**common, "pulse_us": 160.0},
        {**common, "pulse_us": 150.0},
        {**common, "pulse_us": None},
        {**common, "threads": 1, "pulse_us": 90.0},
        {**common, "cpu": "b", "pulse_us": 90.0},
    ]
    assert runner._free(rows, common) == pytest.approx(150e-6)
    assert runner._free(rows[2:], common) == math.inf


def test_words_that_nobody_predicts_change_nothing():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(6, 8), torch.randn(101, 8), torch.randn(101)
    decoder, labels = (weight.requires_grad_(), bias.requires_grad_()), torch.randint(101, (6,))
    assert [len(x) for x in one_model.whole_words(*decoder)] == [104, 104]
    assert one_model.whole_words(weight[:96], bias[:96])[0].shape == (96, 8)
    found = []
    for words in (decoder, one_model.whole_words(*decoder)):
        loss = F.cross_entropy(F.linear(hidden, *words), labels)
        found.append((loss, *torch.autograd.grad(loss, decoder)))
    torch.testing.assert_close(*found)


def test_a_setting_chosen_in_a_later_sweep_is_checked():
    sweeps = measuring.Sweeps()
    providers = [Fake("a", "a", []), Fake("o", "ours", [])]
    measuring.measure(fake_case(*providers), ("fp32",), 1, 1, CLOCK, facts(), sweeps=sweeps)
    providers[1].setting = lambda dtype: "another"
    providers[1].loss = 3.0
    with pytest.raises(Disagreement):
        measuring.measure(fake_case(*providers), ("fp32",), 1, 1, CLOCK, facts(), sweeps=sweeps)


def test_a_failure_in_a_later_sweep_leaves_the_rows_of_earlier_ones(tmp_path, monkeypatch):
    builds = []

    def build(setup):
        builds.append(Fake("o", "ours", []))
        if len(builds) > 1:
            builds[-1].run = lambda dtype: 1 / 0
        yield fake_case(Fake("a", "a", []), builds[-1])

    monkeypatch.setattr(runner, "load_cases", lambda suite, on_gpu: {"fake": build})
    target = tmp_path / "rows.csv"
    with pytest.raises(Failed, match="ZeroDivisionError"):
        runner.run_suite("ops", smoke=True, rounds=1, sweeps=3, csv_path=target)
    with target.open(newline="") as file:
        assert [row["sweeps"] for row in csv.DictReader(file)] == ["1", "1"]
    assert len(builds) == 3  # the third was not measured


def test_a_case_that_cannot_be_built_leaves_the_others(tmp_path, monkeypatch):
    def broken(setup):
        raise MemoryError("no room")
        yield

    def right(setup):
        yield fake_case(Fake("a", "a", []), Fake("o", "ours", []))

    builders = {"broken": broken, "right": right}
    monkeypatch.setattr(runner, "load_cases", lambda suite, on_gpu: builders)
    target = tmp_path / "rows.csv"
    with pytest.raises(Failed, match="MemoryError: no room"):
        runner.run_suite("ops", smoke=True, rounds=1, csv_path=target)
    assert target.exists()


def test_who_does_another_job_is_compared_with_nobody():
    other = Fake("o", "o", [])
    other.work = lambda dtype: Work(flops=1e6, bytes=1e9)
    ceilings = {"fp32": {"matmul_gflops": 1.0, "copy_gbytes": 100.0}}
    case = fake_case(Fake("a", "a", []), other)
    case.work = lambda dtype: Work(flops=1e9, bytes=1e9)
    rows = measuring.measure(case, ("fp32",), 1, 1, CLOCK, facts(), ceilings=ceilings)
    assert [row["bound_ms"] for row in rows] == [1000.0, 10.0]
    assert [row["speedup_a"] for row in rows] == [1.0, None]
    assert rows[1]["of_bound"] == pytest.approx(10.0 / rows[1]["median_ms"], rel=1e-2)


def test_graphs_of_one_sweep_alone_are_not_compared():
    sweeps, who = measuring.Sweeps(), measuring.Who("o", "ours", "fp32")
    sweeps.add("graphs", who, [1.0])
    sweeps.count = 1
    sweeps.add("graphs", who, None)
    sweeps.count = 2
    sweeps.add("graphs", who, [1.0])
    assert sweeps.graphs == {}


def test_runs_take_copies_of_the_operands_in_turn(monkeypatch):
    seen = []

    def square(x):
        seen.append((x.data_ptr(), x.stride()))
        return (x * x).sum()

    x = torch.randn(4, 8)[:, :6]
    monkeypatch.setitem(op_call.CACHES, "cpu", 2 * x.nbytes)
    call = op_call.OpCall("square", "ours", square, (x,), 1)
    for _ in range(4):
        call.run("fp32")
    assert [seen[i] == seen[0] for i in range(4)] == [True, False, False, True]
    assert {stride for _, stride in seen} == {x.stride()}
    backward = call.of("backward")
    for _ in range(4):
        backward.run("fp32")
    assert len(seen) == 4 + 3  # a forward for each copy


def test_who_cannot_run_in_a_later_sweep_has_no_row():
    sweeps = measuring.Sweeps()
    providers = [Fake("a", "a", []), Fake("o", "ours", [])]
    measuring.measure(fake_case(*providers), ("fp32",), 1, 1, CLOCK, facts(), sweeps=sweeps)

    def refuse(dtype, seconds):
        raise Unavailable("not today")

    providers[1].tune = refuse
    rows = measuring.measure(fake_case(*providers), ("fp32",), 1, 1, CLOCK, facts(), sweeps=sweeps)
    assert [row["provider"] for row in rows] == ["a"]


def test_a_suite_is_swept_as_a_whole(tmp_path, monkeypatch):
    log = []

    def build(name):
        def cases(setup):
            case = fake_case(Fake(name, "a", log), Fake("o", "ours", []), reference=name)
            yield replace(case, name=name)

        return cases

    builders = {name: build(name) for name in "xy"}
    monkeypatch.setattr(runner, "load_cases", lambda suite, on_gpu: builders)
    target = tmp_path / "rows.csv"
    runner.run_suite("ops", smoke=True, rounds=1, sweeps=2, csv_path=target)
    assert [word[-1] for word in log if word.startswith("tune")] == ["x", "y", "x", "y"]
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["case"], row["sweeps"]) for row in rows] == [("x", "2")] * 2 + [("y", "2")] * 2


def test_passes_of_an_op():
    (case,) = suites.load_cases("ops")["hidden_mse_d312"](SMOKE)
    case.work = lambda dtype: Work(flops=2e9, bytes=1e9)
    ceilings = {"fp32": {"matmul_gflops": 1000.0, "copy_gbytes": 100.0}}
    rows = [
        row
        for one in op_call.passes(case, "forward", "backward", "both")
        for row in measuring.measure(one, ("fp32",), 2, 1, CLOCK, facts(), ceilings=ceilings)
    ]
    assert [row["pass"] for row in rows] == ["forward"] * 3 + ["backward"] * 3 + ["both"] * 3
    for row in rows:
        assert row["bound_ms"] == 10.0  # 1e9 bytes at 100 GB/s take longer than the arithmetic
        assert row["tflops"] == pytest.approx(2 / row["median_ms"], rel=1e-2)
        assert row["graph_ms"] is None  # a CPU has none


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"minutes": 0}, "--minutes 0: more than 0"),
        (
            {"suite": "all"},
            "--suite 'all' is not one of step, ops, memory, masking, inference, scaling",
        ),
        ({"cases": ["train"]}, "--case 'train' matches none of mlm_step"),
        ({"providers": ["oours"]}, "--provider oours: mlm_step N=16 has none of them but transf"),
        ({"dtype": "fp16"}, "--dtype 'fp16' is not one of fp32, bf16, both"),
        ({"rounds": 0}, "--rounds 0: at least 1"),
        ({"sweeps": 0}, "--sweeps 0: at least 1"),
        ({"widths": [7, 77]}, "--width 7, 77: these cases have 16$"),
        ({"passes": ["back"]}, "--pass 'back' is not one of forward, backward, both"),
        ({"threads": 0}, "--threads 0: at least 1"),
        ({"dropout": 1.0}, "--dropout 1.0: a probability in"),
        ({"device": "tpu"}, "--device 'tpu' is not one of auto, cpu, cuda"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        runner.run_suite(**{"smoke": True, **arguments})


def test_csv_appends_and_refuses_other_columns(tmp_path):
    path = tmp_path / "results.csv"
    row = dict.fromkeys(table.COLUMNS, 1)
    table.CsvFile(path).write([row])
    again = table.CsvFile(path)
    again.write([row])
    again.write([row, row])  # all of its run, written anew
    assert len(path.read_text().splitlines()) == 1 + 3
    path.write_text("who,when\n")
    # Said before anything is measured, not after.
    with pytest.raises(ValueError, match="has other columns"):
        runner.run_suite(smoke=True, csv_path=path)
    assert path.read_text() == "who,when\n"


def test_threads_are_put_back():
    before = torch.get_num_threads()
    (row, *_) = runner.run_suite("memory", smoke=True, threads=before + 1, rounds=1)
    assert row["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_case_selection_is_by_the_beginning_of_a_name():
    cases = suites.load_cases("step")
    chosen = suites.selected(cases, ["distill"])
    assert list(chosen) == ["distill_step_b16_n128", "distill_step_b4_n512"]
    assert suites.selected(cases, ()) == cases
