"""Steps replayed as CUDA graphs are the eager steps, whatever the lengths, and the rest is refused.

Without a GPU two stand-ins take the place of capture. ``again`` runs the step anew on the tensors
of its bucket. ``triton``, with the kernels in their interpreter, writes down what is launched, each
of PyTorch's operators and each kernel with its grid and arguments, and launches just that again, on
the same memory: a number that came from the host stays what it was at capture, as in a graph.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from transformers import (
    BertForPreTraining,
    BertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

import tinybert_fast as tbf
from tinybert_fast.data import LengthCollator, LossWeights, PreTrainingCollator
from tinybert_fast.ops import dispatch
from tinybert_fast.testing.tiny_models import (
    sentiment_rows,
    tiny_config,
    tiny_encoder,
    tiny_tokenizer,
)
from tinybert_fast.training import graphs, recipes
from tinybert_fast.training.common import RunTrainer, training_arguments
from tinybert_fast.training.distill import DistillationTrainer
from tinybert_fast.training.graphs import Bucket, capacity, capacity_step, check_graphs
from tinybert_fast.training.lessons import LessonCache
from tinybert_fast.training.pretraining import Objectives, PreTrainingTrainer
from tinybert_fast.training.relation_matches import RelationMatches

FP32 = {"atol": 1e-5, "rtol": 1e-4}
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Again:
    """Runs a step anew, on the same tensors."""

    def __init__(self, device):
        self.captures = self.replays = 0

    def aside(self):
        return contextlib.nullcontext()

    def capture(self, call):
        self.captures += 1
        returned = {}

        def replay():
            self.replays += 1
            returned.update(call())

        return returned, replay


class Launches(TorchDispatchMode):
    """What a call launches, to be launched again. What it wrote to memory of before is put back."""

    def __init__(self):
        super().__init__()
        self.launches, self.own, self.before = [], set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(word in func.name() for word in READS):
            raise RuntimeError(f"{func.name()} waits for the device, which capture forbids")
        returns = func._schema.returns
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        written = [
            x
            for argument, x in zip(func._schema.arguments, args)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for x in written:
            if storage_of(x) not in self.own:
                self.before.setdefault(storage_of(x), (x.detach(), x.detach().clone()))
        found = func(*args, **kwargs)
        if not views and not written:
            self.own.update(map(storage_of, tensors_in(found)))
        if not views and not any(word in func.name() for word in ("empty", "detach")):
            plain = tree_map(detached, (args, kwargs, None if written else found))
            self.launches.append(lambda: self._again(func, *plain))
        return found

    @staticmethod
    def _again(func, args, kwargs, found):
        fresh = func(*args, **kwargs)
        for old, new in zip(tensors_in(found), tensors_in(fresh)):
            old.copy_(new)

    def kernel(self, run, executor, args, kwargs):
        with _disable_current_modes():  # of the interpreter's own tensors
            self.launches.append(lambda: run(executor, *args, **kwargs))
            return run(executor, *args, **kwargs)

    def put_back(self):
        for x, before in self.before.values():
            x.copy_(before)

    @torch.no_grad()
    def replay(self):
        for launch in self.launches:
            launch()


def tensors_in(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storage_of(x):
    return x.untyped_storage()._cdata


def detached(x):
    with _disable_current_modes():
        return x.detach() if isinstance(x, torch.Tensor) else x


class Recorded(Again):
    """Launches what a step launched, with the numbers that it had on the host then."""

    def capture(self, call):
        from triton.runtime.interpreter import GridExecutor

        self.captures += 1
        mode, run, state = Launches(), GridExecutor.__call__, torch.get_rng_state()
        with pytest.MonkeyPatch.context() as patch, mode:
            patch.setattr(
                GridExecutor, "__call__", lambda self, *a, **k: mode.kernel(run, self, a, k)
            )
            returned = call()
        mode.put_back()
        torch.set_rng_state(state)

        def replay():
            self.replays += 1
            mode.replay()

        return returned, replay


@pytest.fixture(params=["again", "triton", "cuda"])
def backend(request, monkeypatch):
    """How steps are captured here."""
    has_gpu = torch.cuda.is_available()
    if request.param == "cuda":
        if not has_gpu:
            pytest.skip("a CUDA graph needs a GPU")
        counted(monkeypatch)
        return request.param
    if has_gpu:
        pytest.skip("there is a GPU to capture on")
    if (request.param == "triton") != dispatch.INTERPRETED:
        pytest.skip("the kernels' interpreter is a choice of the whole process")
    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "CudaGraphs", Again if request.param == "again" else Recorded)
    if request.param == "triton":
        from tinybert_fast.kernels import embedding_layer_norm

        monkeypatch.setitem(dispatch.FROM_ENVIRONMENT, "", "triton")
        monkeypatch.setattr(dispatch, "_watched", lambda: False)  # show what operators are made of
        # It looks at ids on a CPU alone.
        monkeypatch.setattr(embedding_layer_norm, "_check_on_cpu", lambda *operands: None)
    return request.param


def counted(monkeypatch):
    """CudaGraphs that count as the stand-ins do."""
    capture = graphs.CudaGraphs.capture

    def counting(self, call):
        returned, replay = capture(self, call)
        self.captures += 1

        def counting_replay():
            self.replays += 1
            replay()

        return returned, counting_replay

    monkeypatch.setattr(graphs.CudaGraphs, "captures", 0, raising=False)
    monkeypatch.setattr(graphs.CudaGraphs, "replays", 0, raising=False)
    monkeypatch.setattr(graphs.CudaGraphs, "capture", counting)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Texts here are short; several widths are wanted, or interpreted one bucket for all."""
    monkeypatch.setattr(graphs, "WIDTH_UNIT", 32 if dispatch.INTERPRETED else 8)
    if dispatch.INTERPRETED:
        monkeypatch.setattr(graphs, "EIGHTHS", 0)
        monkeypatch.setattr(graphs, "SMALLEST_STEP", 32)


def examples_of(tokenizer, rows):
    texts, labels = zip(*sentiment_rows(rows))
    encoded = dict(tokenizer(list(texts)))
    encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
    encoded["label"] = [int(label == "good") for label in labels]
    return Dataset.from_dict(encoded)


def model_of(cls, **changes):
    layers = {"num_hidden_layers": 1} if dispatch.INTERPRETED else {}
    changes = {"initializer_range": 0.1, **NO_DROPOUT, **changes, **layers}
    return tbf.accelerate(cls(tiny_config(**changes)))


def pair(**changes):
    """Student 2 x 24, teacher 4 x 32, 2 heads; 1 layer each where kernels are interpreted."""
    torch.manual_seed(0)
    cls = BertForSequenceClassification
    larger = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}
    return model_of(cls, **changes), model_of(cls, **{**changes, **larger})


def common(tmp_path, tokenizer, cuda_graphs, rows=24, **arguments):
    recipe = {"epochs": 3, "lr": 1e-2, "batch_size": 6, "log_steps": 1, "evaluate": False,
              "optim": "sgd", "keep": 1}  # fmt: skip
    if dispatch.INTERPRETED:  # as few steps as show a graph on other lengths than its own
        rows = 4
        recipe |= {"epochs": 2, "batch_size": 2, "train_sampling_strategy": "sequential"}
    return {
        "args": training_arguments(tmp_path, **{**recipe, **arguments}),
        "train_dataset": examples_of(tokenizer, rows),
        "processing_class": tokenizer,
        "data_collator": LengthCollator(tokenizer, lengths=True),
        "progress": False,
        "cuda_graphs": cuda_graphs,
    }


def distillation(*call, stage="intermediate", loss="tinybert", models=None, more=None, **arguments):
    student, teacher = models or pair()
    matches = None
    if stage == "intermediate" and loss == "minilm":
        matches = RelationMatches.of(student.config, teacher.config, "qk,vv")
    options = {**common(*call, **arguments), **(more or {})}
    return DistillationTrainer(student, teacher, stage=stage, matches=matches, **options)


def finetuning(*call, num_labels=2, **arguments):
    torch.manual_seed(0)
    return RunTrainer(
        model_of(BertForSequenceClassification, num_labels=num_labels),
        **common(*call, **arguments),
    )


def pretraining(
    tmp_path, tokenizer, cuda_graphs, weights=False, bidirectional="off", **arguments
):  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    sizes = torch.stack([torch.randint(1, high, (24,), generator=draw) for high in (9, 12)], 1)
    if dispatch.INTERPRETED:  # one bucket, and another number of targets in either batch
        sizes = torch.tensor([[3, 3], [3, 3], [5, 6], [5, 6]])
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows = []
    for number, (a, b) in enumerate(sizes.tolist()):
        words = torch.randint(5, len(tokenizer), (a + b,), generator=draw).tolist()
        ids = [cls, *words[:a], sep, *words[a:], sep]
        rows.append({"input_ids": ids, "first_length": a + 2, "next_sentence_label": number % 2,
                     "example_id": number, "length": len(ids)})  # fmt: skip
    options = common(tmp_path, tokenizer, cuda_graphs, **arguments)
    del options["data_collator"]
    options["train_dataset"] = Dataset.from_list(rows)
    torch.manual_seed(0)
    objectives = Objectives(bidirectional=bidirectional)
    masking = {"mlm_probability": 0.3} if objectives.masks else {"mlm": False}
    return PreTrainingTrainer(
        model_of(BertForPreTraining, vocab_size=len(tokenizer)),
        collator=PreTrainingCollator(tokenizer, seed=1, **masking),
        objectives=objectives,
        losses=LossWeights(len(tokenizer), device=options["args"].device) if weights else None,
        **options,
    )


class Seen(TrainerCallback):
    """Gradients of every optimizer step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(found)


def course(trainer, **how):
    """(losses of micro-batches, gradients of steps, logged losses) of a whole training."""
    seen, losses, read = Seen(), [], trainer.read
    trainer.add_callback(seen)

    def reading(found):
        losses.append(found["loss"])  # read later, as the log does
        read(found)

    trainer.read = reading
    trainer.train(**how)
    logs = [{k: v for k, v in entry.items() if k.endswith("loss")}
            for entry in trainer.state.log_history]  # fmt: skip
    return torch.stack(losses), seen.gradients, logs


def same(trainer, want, found):
    torch.testing.assert_close(found[0], want[0], **FP32)
    for ours, theirs in zip(found[1], want[1], strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(
                ours[name], theirs[name], **FP32, msg=lambda text, name=name: f"{name}: {text}"
            )
    for ours, theirs in zip(found[2], want[2], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    backend = trainer.graphs.backend
    assert backend.replays > backend.captures >= (1 if dispatch.INTERPRETED else 2)  # buckets


def from_disk(tmp_path, tokenizer, cuda_graphs, stage="intermediate", **arguments):
    """Distillation by lessons that were written down."""
    student, teacher = pair()
    live = distillation(tmp_path / "live", tokenizer, False, stage=stage, models=(student, teacher))
    examples = live.train_dataset.add_column("index", range(len(live.train_dataset)))
    lessons = LessonCache.build(
        tmp_path / "lessons", live.teach_raw, examples, live.data_collator, {}, batch_size=4
    )
    more = {"lessons": lessons, "train_dataset": examples}
    call = (tmp_path, tokenizer, cuda_graphs)
    return distillation(
        *call, stage=stage, models=(student, teacher.config), more=more, **arguments
    )


KINDS = {
    "tinybert": (distillation, {}),
    "minilm": (distillation, {"loss": "minilm"}),
    "prediction": (distillation, {"stage": "prediction"}),
    "accumulation": (distillation, {"accumulation": 3, "rows": 42, "epochs": 2}),
    "incomplete": (distillation, {"rows": 27}),
    "score": (distillation, {"stage": "prediction", "models": 1}),
    "finetune": (finetuning, {}),
    "regression": (finetuning, {"num_labels": 1}),
    "mlm_nsp": (pretraining, {}),
    "reverse": (pretraining, {"bidirectional": "reverse", "weights": True}),
    "causal": (pretraining, {"bidirectional": "causal", "accumulation": 2}),
    "lessons": (from_disk, {}),
    "logits": (from_disk, {"stage": "prediction"}),
}
# Of whole trainings in the interpreter, 10 to 20 seconds each; TinyBERT's losses with dropout.
INTERPRETED = ("minilm", "prediction", "reverse")


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_eager_ones(kind, backend, tokenizer, tmp_path):
    if backend == "triton" and kind not in INTERPRETED:
        pytest.skip("its losses are those of another kind")
    make, options = KINDS[kind]
    found = []
    for cuda_graphs in (False, True):
        given = dict(options)
        if given.get("models") == 1:
            given["models"] = pair(num_labels=1)
        trainer = make(tmp_path / str(cuda_graphs), tokenizer, cuda_graphs, **given)
        found.append(course(trainer))
    same(trainer, *found)


def test_dropout_is_that_of_eager_steps(backend, tokenizer, tmp_path):
    """The kernels drop by a seed that is drawn as often and as late as without graphs; PyTorch's
    own dropout depends on the number of rows.
    """
    if backend == "again":
        pytest.skip("PyTorch's implementations draw a cell for each row")
    found = []
    for cuda_graphs in (False, True):
        models = pair(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.25)
        trainer = distillation(tmp_path / str(cuda_graphs), tokenizer, cuda_graphs, models=models)
        found.append(course(trainer))
    same(trainer, *found)


@pytest.fixture
def captured(backend):
    """Of what has no number in it that the host could keep."""
    if backend == "triton":
        pytest.skip("slow in the interpreter, and shown by the others")
    return backend


def test_bf16(captured, tokenizer, tmp_path):
    """Weights are cast anew in every replay."""
    found = []
    for cuda_graphs in (False, True):
        trainer = distillation(tmp_path / str(cuda_graphs), tokenizer, cuda_graphs, bf16=True)
        found.append(course(trainer))
    (want, theirs, _), (got, ours, _) = found
    assert trainer.graphs.backend.replays
    torch.testing.assert_close(got, want, atol=1e-3, rtol=2e-2)
    for one, other in zip(ours, theirs, strict=True):
        for name in other:
            distance = (one[name] - other[name]).norm() / other[name].norm().clamp_min(1e-6)
            assert distance < 0.05, name


@pytest.mark.parametrize("make", [distillation, pretraining])
def test_dummies_contribute_nothing(make, captured, tokenizer, tmp_path, monkeypatch):
    """Other ids in their rows, and more of them: the same bits. On a GPU PyTorch adds up the
    gradients of an id in groups of rows, and rows of zeros move the groups.
    """
    found = [course(make(tmp_path / "before", tokenizer, True))]
    dummies, fitted = Bucket.dummies.fget, Bucket.fitted

    def spoilt(bucket, inputs):
        answer = fitted(bucket, inputs)
        for name, high in (("input_ids", 20), ("token_type_ids", 2)):
            answer[name][bucket.sequences :].random_(1, high)
        return answer

    monkeypatch.setattr(Bucket, "dummies", property(lambda bucket: dummies(bucket) + 2))
    monkeypatch.setattr(Bucket, "fitted", spoilt)
    found.append(course(make(tmp_path / "after", tokenizer, True)))
    (want, theirs, _), (got, ours, _) = found
    bits = FP32 if captured == "cuda" else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(got, want, **bits)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **bits)


def test_goes_on_from_a_checkpoint(captured, tokenizer, tmp_path):
    whole = course(distillation(tmp_path, tokenizer, True, keep=9))
    trainer = distillation(tmp_path, tokenizer, True, keep=9)
    rest = course(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(rest[0], whole[0][4:], **FP32)
    assert trainer.graphs.backend.replays


def test_only_what_eager_steps_train_gets_a_gradient(captured, tokenizer, tmp_path):
    """An optimizer decays a weight whose gradient is 0, and leaves one alone that has none."""
    trainer = distillation(tmp_path, tokenizer, True)
    before = {name: p.clone() for name, p in trainer.student.named_parameters()}
    trainer.train()
    assert trainer.graphs.backend.replays
    idle = {n for n, p in trainer.student.named_parameters() if torch.equal(p, before[n])}
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= idle
    assert not any(name.startswith("bert.embeddings.word") for name in idle)


def test_gradients_of_ones_own_are_added_to(captured, tokenizer, tmp_path):
    trainer = distillation(tmp_path, tokenizer, True)
    trainer.train()
    trained, kept = trainer.graphs.trained, trainer.graphs.gradients
    p = next(p for p in trained if p in kept)
    p.grad = torch.full_like(p, 3.0)
    trainer.graphs._put_back()
    assert p.grad is kept[p]
    assert (p.grad == 3.0).all()
    assert not any(kept[q].any() for q in trained if q in kept and q is not p)


def test_a_bucket_is_captured_when_it_comes_again(captured, tokenizer, tmp_path):
    trainer = distillation(tmp_path, tokenizer, True, rows=27)
    backend, run = trainer.graphs.backend, trainer.graphs.run
    said = []

    def running(step, inputs):
        before = backend.captures, backend.replays
        found = run(step, inputs)
        said.append((len(inputs["lengths"]), backend.captures - before[0],
                     backend.replays - before[1]))  # fmt: skip
        return found

    trainer.graphs.run = running
    trainer.train()
    assert {(captures, replays) for n, captures, replays in said if n == 6} == {
        (0, 0), (1, 1), (0, 1),
    }  # fmt: skip
    assert [(c, r) for n, c, r in said if n == 3] == [(0, 0)] * 3  # the last batch of each epoch
    assert backend.captures == sum(b.replay is not None for b in trainer.graphs.buckets.values())


def test_buckets_share_their_memory(captured, tokenizer, tmp_path):
    """What batches bring, a lesson of every token among it, is held once, of the largest batch."""
    trainer = from_disk(tmp_path, tokenizer, True)
    trainer.train()
    buckets = [tree_leaves(one.static) for one in trainer.graphs.buckets.values()]
    assert len(buckets) > 2
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for leaves in buckets for x in leaves}  # fmt: skip
    largest = max(sum(x.nbytes for x in leaves) for leaves in buckets)
    assert sum(held.values()) < 1.3 * largest < 0.7 * sum(x.nbytes for b in buckets for x in b)


def test_capacities():
    for n in range(1, 3000):
        size, step = capacity(n), capacity_step(n)
        assert n <= size < n + step
        assert size % step == 0
        assert step == graphs.SMALLEST_STEP or 8 * step < n
        assert capacity_step(size) == step  # known from the capacity alone
        bucket = Bucket.of([n % 7 + 1] * (n // 7 + 1), 512)
        assert bucket.dummies * bucket.width >= bucket.spare
    assert len({capacity(n) for n in range(513, 1025)}) == 8


def test_texts_longer_than_the_model(captured, tokenizer, tmp_path):
    long = {"input_ids": [5] * 41, "token_type_ids": [0] * 41, "length": 41}
    more = {"train_dataset": Dataset.from_list([long] * 6)}
    with pytest.raises(ValueError, match="41 tokens wide and the model has 40 positions"):
        distillation(tmp_path, tokenizer, True, more=more).train()


REFUSED = [
    ({"device": torch.device("cpu")}, "this run is on cpu, and they are NVIDIA's"),
    ({"world_size": 2}, "2 processes exchange gradients"),
    ({"torch_compile": True}, "torch_compile is on"),
    ({"gradient_checkpointing": True}, "gradient_checkpointing is on"),
    ({"fp16": True}, "fp16 is on"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refuses(changes, message):
    fine = {"device": torch.device("cuda"), "world_size": 1, "torch_compile": False,
            "gradient_checkpointing": False, "fp16": False}  # fmt: skip
    assert all(hasattr(TrainingArguments, name) for name in fine)
    check_graphs(SimpleNamespace(**fine), accelerated=True)
    with pytest.raises(ValueError, match=f"cuda_graphs cannot serve this run: {message}"):
        check_graphs(SimpleNamespace(**{**fine, **changes}), accelerated=True)


def test_refuses_models_that_run_on_padding(captured, tokenizer, tmp_path):
    for models in ((tbf.restore(pair()[0]), pair()[1]), (pair()[0], tbf.restore(pair()[1]))):
        with pytest.raises(ValueError, match="an unaccelerated model has no fixed number of rows"):
            distillation(tmp_path, tokenizer, True, models=models)


def test_refuses_batches_without_lengths(captured, tokenizer, tmp_path):
    more = {"data_collator": LengthCollator(tokenizer)}
    with pytest.raises(ValueError, match=r"LengthCollator\(lengths=True\)"):
        distillation(tmp_path, tokenizer, True, more=more).train()


def test_says_what_cannot_be_captured(captured, tokenizer, tmp_path, monkeypatch):
    trainer = distillation(tmp_path, tokenizer, True)

    def capture(call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(trainer.graphs.backend, "capture", capture)
    with pytest.raises(RuntimeError, match=r"cannot be captured \(operation not .* capturing\);"):
        trainer.train()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for them")
def test_a_run_without_a_gpu_is_refused_before_it_begins(tmp_path):
    teacher = tiny_encoder(tmp_path / "teacher", num_hidden_layers=4)
    with pytest.raises(ValueError, match="this run is on cpu"):
        recipes.distill_general(
            teacher, teacher, ["a film", "a story"], tmp_path / "run", cuda_graphs=True
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches of a GPU")
@pytest.mark.parametrize("make", [distillation, pretraining, finetuning])
def test_few_launches_and_no_wait(make, tokenizer, tmp_path):
    """A micro-batch that is replayed: copies to its tensors, one graph, copies of what it gave."""
    from torch.profiler import ProfilerActivity, profile

    trainer = make(tmp_path, tokenizer, True, epochs=4)
    run, counts = trainer.graphs.run, []

    def running(step, inputs):
        known = {id(one) for one in trainer.graphs.buckets.values() if one.replay is not None}
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            found = run(step, inputs)
        if known == {id(b) for b in trainer.graphs.buckets.values() if b.replay is not None}:
            counts.append({e.key: e.count for e in seen.key_averages() if e.key.startswith("cu")})
        return found

    trainer.graphs.run = running
    trainer.train()
    replayed = next(one for one in reversed(counts) if one.get("cudaGraphLaunch"))
    print(replayed)
    assert replayed["cudaGraphLaunch"] == 1, replayed
    assert replayed.get("cudaLaunchKernel", 0) + replayed.get("cuLaunchKernel", 0) < 40, replayed
    assert not replayed.get("cudaStreamSynchronize"), replayed
