"""A distillation step of the student: what it launches on a GPU, and that it reads nothing on the
host. On a CPU the Triton kernels are interpreted and counted, and so is each of PyTorch's operators
that computes: on a GPU each would be a launch.
"""

import contextlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

import tinybert_fast as tbf
from tinybert_fast.modules.encoder import encode
from tinybert_fast.ops import dispatch
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.distill import Distillation
from tinybert_fast.training.losses import intermediate_terms
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.teacher import record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS, WIDTH = (7, 5, 9), 9
# What waits for a GPU, or gives as many numbers as only the device knows.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
PER_LAYER = 100  # launches of one more layer with its two losses, forward and backward
needs_kernels = pytest.mark.skipif(
    dispatch.UNAVAILABLE["triton"] is not None, reason=str(dispatch.UNAVAILABLE["triton"])
)


class Launches(TorchDispatchMode):
    """Counts operators that compute, and kernels, in the block."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in
                    func._schema.returns)  # fmt: skip
        if not views and not any(word in func.name() for word in ("empty", "detach")):
            self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self):
        return [name for name in self.found if any(word in name for word in READS)]


@pytest.fixture
def launches(monkeypatch):
    """A block that counts, with the kernels wherever there are some."""
    monkeypatch.setitem(dispatch.FROM_ENVIRONMENT, "", "triton")
    monkeypatch.setattr(dispatch, "_watched", lambda: False)  # show what operators are made of
    if dispatch.INTERPRETED:
        from tinybert_fast.kernels import embedding_layer_norm

        # It looks at ids on a CPU alone.
        monkeypatch.setattr(embedding_layer_norm, "_check_on_cpu", lambda *operands: None)

    @contextlib.contextmanager
    def block():
        with contextlib.ExitStack() as stack:
            mode = Launches()
            if dispatch.INTERPRETED:
                from torch.utils._python_dispatch import _disable_current_modes
                from triton.runtime.interpreter import GridExecutor

                run = GridExecutor.__call__

                def counted(executor, *args, **kwargs):
                    mode.found[f"triton::{executor.fn.__name__}"] += 1
                    with _disable_current_modes():  # of the interpreter's own tensors
                        return run(executor, *args, **kwargs)

                stack.enter_context(pytest.MonkeyPatch.context()).setattr(
                    GridExecutor, "__call__", counted
                )
            stack.enter_context(mode)
            yield mode

    return block


def parts(layers):
    """Distillation of a student of so many layers, one batch with its layout, and its lesson."""
    torch.manual_seed(0)
    common = {"vocab_size": 101, "num_attention_heads": 4, "intermediate_size": 64,
              "max_position_embeddings": 40}  # fmt: skip
    teacher, student = (
        tbf.accelerate(BertModel(BertConfig(hidden_size=width, num_hidden_layers=m, **common)))
        for width, m in ((32, 4), (24, layers))
    )
    teacher.to(DEVICE)
    matches = LayerMatches.of(tuple((m, m) for m in range(layers + 1)))
    projection = matches.new_projection(student.config, teacher.config)
    distillation = Distillation(student, projection, matches).to(DEVICE).train()
    layout = SequenceLayout.from_lengths(LENGTHS, WIDTH, DEVICE)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    batch = {"input_ids": torch.randint(0, 101, mask.shape), "attention_mask": mask.long()}
    batch = {name: x.to(DEVICE) for name, x in batch.items()}
    lesson = matches.teacher_capture()
    with torch.no_grad():
        record(teacher.eval(), batch, lesson, layout)
    return distillation, batch, lesson, layout


def step(distillation, *inputs):
    distillation.zero_grad()
    torch.stack(list(distillation(*inputs).values())).sum().backward()


@needs_kernels
def test_few_launches_and_nothing_read_on_the_host(launches):
    counts = {}
    for layers in (2, 3):
        call = parts(layers)
        step(*call)  # what is compiled or cached at the first call
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with launches() as found:
                step(*call)
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert not found.reads
        counts[layers] = sum(found.found.values())
    assert counts[3] - counts[2] <= PER_LAYER, counts


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
def test_step_in_a_cuda_graph():
    """Forward, losses and backward, replayed on another batch of the same lengths."""
    distillation, batch, lesson, layout = parts(2)
    distillation.eval()  # the eager step would draw other cells
    inputs = (batch, lesson, layout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(distillation, *inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    distillation.zero_grad()
    with torch.cuda.graph(graph):
        torch.stack(list(distillation(*inputs).values())).sum().backward()
    batch["input_ids"].copy_(batch["input_ids"].flip(0))
    graph.replay()
    replayed = [p.grad.clone() for p in distillation.parameters() if p.grad is not None]
    step(distillation, *inputs)
    eager = [p.grad for p in distillation.parameters() if p.grad is not None]
    torch.testing.assert_close(replayed, eager)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
def test_every_replay_drops_other_cells():
    """The seed is drawn on the device, from the generator that a graph advances at each replay."""
    distillation, *inputs = parts(2)
    assert distillation.student.training

    def loss():
        return torch.stack(list(distillation(*inputs).values())).sum()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            loss().backward()
    torch.cuda.current_stream().wait_stream(side)
    distillation.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = loss()
        kept.backward()
    found = []
    for _ in range(3):
        graph.replay()
        found.append(float(kept))
    assert len(set(found)) == 3, found


def test_student_and_losses_compile_whole():
    """One graph from the token ids to the sum of all terms, with dropout and its gradients."""
    distillation, batch, lesson, layout = parts(2)
    student, matches = distillation.student, distillation.matches

    def run():
        capture = matches.student_capture()
        encode(student, layout, input_ids=batch["input_ids"], capture=capture, record_only=True)
        terms = intermediate_terms(capture, lesson, matches, distillation.projection, layout=layout)
        return torch.stack(list(terms.values())).sum()

    found = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        loss = call()
        leaves = [p for p in distillation.parameters() if p.requires_grad]
        found.append((loss.detach(), torch.autograd.grad(loss, leaves, allow_unused=True)))
    torch.testing.assert_close(found[1], found[0])
