"""Micro-batches of a Trainer as CUDA graphs: captured once for shapes that recur, then replayed.

Launched from Python, a step of a small model waits for Python most of the time. A graph holds the
forwards of teacher and student, the losses and the backward of one micro-batch. The rest is few
launches and stays with the Trainer: zero_grad, clipping, the optimizer, logs, evaluation.

A graph has fixed shapes, and batches have any. So a batch goes into a bucket:

    W = N up to a multiple of 64           N columns of the longest of its B sequences
    T = capacity(sum of lengths)           rows of the packed encoder
    R = capacity(number of targets)        of each kind of target, the rest of it ignored
    capacity(n) = n up to a multiple of 2^(k-3), 2^k < n <= 2^(k+1)        at most 1/8 more than n

Behind the B sequences stand dummies, whose tokens fill T up; no loss counts them
(SequenceLayout.of_capacity), so a step is the eager one but for the order of its sums. What changes
from batch to batch is in tensors that are overwritten in place: the graph reads these, lengths
included, and no number of the host. Buckets are few: 8 capacities for each doubling of T, times 8
widths up to 512 that go with them.

Dropout's seed is drawn on the device, from the generator that every replay advances, as an eager
step would. Gradients add up in tensors that stay, those that the first step made: what
zero_grad(set_to_none=True) takes from the parameters is put back before a step, zeroed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import keystr, tree_leaves, tree_map_with_path
from transformers import TrainingArguments

from tinybert_fast.modules.heads import IGNORED
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.lessons import LOGITS

DEVICES = ("cuda",)
WIDTH_UNIT = 64
SMALLEST_STEP = 8  # of capacities; tensor cores like sums over whole eights
EIGHTHS = 3  # 2^3 capacities for each doubling
GRIDS = ("input_ids", "token_type_ids", "position_ids")  # (B, N)
HOST = ("attention_mask", "lengths", "index")  # that no graph reads

Inputs = dict[str, Any]
Step = Callable[[Inputs], dict[str, Tensor]]


def check_graphs(arguments: TrainingArguments, *, accelerated: bool) -> None:
    """ValueError for a run that cannot replay graphs. ``accelerated``: all models of it."""
    if arguments.device.type not in DEVICES:
        raise _refusal(f"this run is on {arguments.device.type}, and they are NVIDIA's")
    if arguments.world_size > 1:
        raise _refusal(
            f"{arguments.world_size} processes exchange gradients during the backward, which is "
            "not captured; train in one process"
        )
    if not accelerated:
        raise _refusal(
            "an unaccelerated model has no fixed number of rows; accelerate() student and teacher "
            "(no --plain, no parity='official')"
        )
    for name in ("torch_compile", "gradient_checkpointing", "fp16"):
        if getattr(arguments, name):
            raise _refusal(
                f"{name} is on, with which graphs were never tried; turn one of them off"
            )


def _refusal(reason: str) -> ValueError:
    return ValueError(f"cuda_graphs cannot serve this run: {reason}; or leave cuda_graphs out")


def capacity(n: int) -> int:
    """``n`` rounded up, by less than 1/8 of it or SMALLEST_STEP."""
    step = capacity_step(n)
    return max(-(-n // step), 1) * step


def capacity_step(n: int) -> int:
    """What capacities near ``n`` are multiples of; a capacity has that of the numbers it is for."""
    return max(SMALLEST_STEP, 1 << max((n - 1).bit_length() - 1 - EIGHTHS, 0))


@dataclass(frozen=True)
class Bucket:
    """Shapes of a graph: B sequences, W columns, T rows."""

    sequences: int
    width: int
    rows: int

    @classmethod
    def of(cls, lengths: Sequence[int], widest: int) -> Bucket:
        """``widest``: positions that the models have; the encoder refuses longer texts."""
        longest = max(lengths)
        width = max(min(-(-longest // WIDTH_UNIT) * WIDTH_UNIT, widest), longest)
        return cls(len(lengths), width, capacity(sum(lengths)))

    @property
    def spare(self) -> int:
        """Rows that may be those of dummies."""
        return capacity_step(self.rows)

    @property
    def dummies(self) -> int:
        return -(-self.spare // self.width)

    def fitted(self, inputs: Inputs) -> Inputs:
        """A collated batch in shapes that all batches of this bucket share; lengths are a tensor,
        the dummies' among them.
        """
        lengths, columns = inputs["lengths"], inputs["input_ids"].shape[1]
        rest = self.rows - sum(lengths)
        filling = [min(self.width, max(0, rest - self.width * d)) for d in range(self.dummies)]
        found: Inputs = {"lengths": torch.tensor([*lengths, *filling])}
        for name, value in inputs.items():
            if name in GRIDS:
                more = self.width - columns  # below 0 where the collator pads further
                found[name] = F.pad(value, (0, more, 0, self.dummies))
            elif name == "targets":
                found[name] = {k: self._targets(pair, columns) for k, pair in value.items()}
            elif name == "lesson":
                found[name] = {k: x if k == LOGITS else self._longer(x) for k, x in value.items()}
            elif name not in HOST:
                found[name] = value
        return found

    def _targets(self, pair: tuple[Tensor, Tensor], columns: int) -> tuple[Tensor, Tensor]:
        """Flat places b * N + n and labels -> (R,) each, at b * W + n. First tokens, which all
        sequences have, fill the places up.
        """
        places, labels = pair
        rest = capacity(len(labels)) - len(labels)
        filling = torch.arange(rest, device=places.device) % self.sequences * self.width
        moved = places // columns * self.width + places % columns
        return torch.cat((moved, filling)), F.pad(labels, (0, rest), value=IGNORED)

    def _longer(self, rows: Tensor) -> Tensor:
        """Those of the tokens, zeros behind them."""
        return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, self.rows - len(rows)))

    def inputs(self, static: Inputs) -> Inputs:
        """What a step reads, the layout made of the lengths on the device."""
        layout = SequenceLayout.of_capacity(
            static["lengths"], self.width, self.rows, dummies=self.dummies, spare=self.spare
        )
        return {**{k: v for k, v in static.items() if k != "lengths"}, "layout": layout}


class CudaGraphs:
    """Captures on a stream of its own, where the steps run too that are not replayed: a backward
    runs where its forward ran, and capture forbids the default stream. Graphs share one pool: they
    run one after the other and leave nothing in it but what they return.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def capture(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What ``call`` returns, and what fills it again; nothing has run yet."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins batches, may allocate meanwhile.
        how: Any = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, **how):
            returned = call()
        return returned, graph.replay


class _Recurring:
    """The batches of one bucket: tensors that each overwrites and, from the second on, a graph."""

    def __init__(self, bucket: Bucket, static: Inputs) -> None:
        self.bucket, self.static = bucket, static
        self.replay: Callable[[], None] | None = None
        self.returned: dict[str, Tensor] = {}
        self.seen = False

    def load(self, fitted: Inputs) -> None:
        for static, fresh in zip(tree_leaves(self.static), tree_leaves(fitted), strict=True):
            if static.is_cuda and not fresh.is_cuda:
                fresh = fresh.pin_memory()  # the copy then waits for nothing
            static.copy_(fresh, non_blocking=True)

    def inputs(self) -> Inputs:
        return self.bucket.inputs(self.static)


class StepGraphs:
    """Runs a step, forward to backward, of one micro-batch: eagerly the first time that its bucket
    comes by, which compiles and allocates what capture may not; from then on as a graph.

    An incomplete batch, the last of an epoch, runs eagerly: graphs of all its sizes would not pay.

    models: those that run in a step; the first holds all that is trained.
    """

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        self.device = device
        self.backend = CudaGraphs(device)
        self.trained = [p for p in models[0].parameters() if p.requires_grad]
        self.widest = min(_positions(model) for model in models)
        self.largest = 0  # sequences of a batch
        self.buckets: dict[Any, _Recurring] = {}
        self.buffers: dict[Any, Tensor] = {}  # (name, dtype) -> what a batch brings, flat
        self.gradients: dict[Parameter, Tensor] = {}

    def run(self, step: Step, inputs: Inputs) -> dict[str, Tensor]:
        """What ``step`` returns of ``inputs``, a batch as collated, with its ``lengths``."""
        lengths = inputs.get("lengths")
        if lengths is None:
            raise ValueError(
                "cuda_graphs needs the lengths of a batch on the host: use a collator that gives "
                "them (LengthCollator(lengths=True)), or leave cuda_graphs out"
            )
        self.largest = max(self.largest, len(lengths))
        if len(lengths) < self.largest:
            return self.eagerly(step, inputs)
        bucket = Bucket.of(lengths, self.widest)
        fitted = bucket.fitted(inputs)
        shapes = tuple((x.shape, x.dtype) for x in tree_leaves(fitted))
        recurring = self.buckets.get((bucket, shapes))
        if recurring is None:
            recurring = _Recurring(bucket, tree_map_with_path(self._place, fitted))
            self.buckets[bucket, shapes] = recurring
        recurring.load(fitted)
        if not recurring.seen:
            recurring.seen = True
            return self.eagerly(step, recurring.inputs())
        self._put_back()
        if recurring.replay is None:
            self._capture(step, recurring)
        assert recurring.replay is not None
        recurring.replay()
        # The next replay overwrites them, and whoever logs them reads them later.
        return {name: x.clone() for name, x in recurring.returned.items()}

    def _place(self, path: Any, x: Tensor) -> Tensor:
        """Where ``x`` of each batch of a bucket goes. Steps run one after the other, so all buckets
        have one buffer for a name. Where it is too small, buckets from now on get a larger one:
        graphs go on reading what they were captured with. The longest batch comes first.
        """
        name = keystr(path), x.dtype
        flat = self.buffers.get(name)
        if flat is None or len(flat) < x.numel():
            flat = torch.empty(x.numel(), dtype=x.dtype, device=self.device)
            self.buffers[name] = flat
        return flat[: x.numel()].view(x.shape)

    def eagerly(self, step: Step, inputs: Inputs) -> dict[str, Tensor]:
        """``step`` as it is, its gradients where those of graphs are."""
        self._put_back()
        with self.backend.aside():
            found = step(inputs)
        for p in self.trained:
            if p.grad is not None and p not in self.gradients:
                self.gradients[p] = p.grad
        return found

    def _capture(self, step: Step, recurring: _Recurring) -> None:
        torch.clear_autocast_cache()  # weights cast before are not those of later replays
        try:
            returned, recurring.replay = self.backend.capture(lambda: step(recurring.inputs()))
        except RuntimeError as error:
            raise RuntimeError(
                f"cuda_graphs: the step of {recurring.bucket} cannot be captured "
                f"({str(error).strip().splitlines()[0]}); leave cuda_graphs out"
            ) from error
        recurring.returned = returned
        strange = sum(p.grad is not self.gradients.get(p) for p in self.trained)
        if strange:
            raise RuntimeError(
                f"cuda_graphs: {strange} parameters got a gradient when {recurring.bucket} was "
                "captured and none before it; what is trained may not change between steps"
            )

    def _put_back(self) -> None:
        """Each parameter's gradient where graphs add to it: 0, or what is there so far."""
        fresh = []
        for p, gradient in self.gradients.items():
            if p.grad is None:
                fresh.append(gradient)
            elif p.grad is not gradient:  # somebody's own
                gradient.copy_(p.grad)
            p.grad = gradient
        if fresh:
            torch._foreach_zero_(fresh)


def _positions(model: nn.Module) -> int:
    """Columns that the embeddings of the encoders inside have."""
    tables: list[Any] = [getattr(module, "position_embeddings", None) for module in model.modules()]
    return min(table.num_embeddings for table in tables if table is not None)
