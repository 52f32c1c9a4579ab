"""Recording hidden states, queries, keys and values of a forward, for losses between two models.

Numbering is the paper's: hidden state m = 0..M, where 0 is the embedding output, and attention of
layer m = 1..M. No N x N tensor is recorded: a loss makes scores from queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tinybert_fast.ops.layout import SequenceLayout

HEADS = ("queries", "keys", "values")


@dataclass(eq=False)
class Capture:
    """What to record, and what the latest forward left.

    ``hidden_states``: of 0..M, where 0 is the embedding output; ``attention`` (queries and keys)
    and ``attention_values``: of layers 1..M. A forward raises ValueError for what a model of M
    layers does not have.

    ``Capture(hidden_states=(0, 2), attention=(2,))`` passed as ``model(**batch, capture=capture)``
    to an accelerated model leaves ``hidden[m]`` (T, C), ``queries[m]`` and ``keys[m]`` (T, H, D),
    and the ``layout`` of the T tokens; ``attention_values=(2,)`` leaves ``values[m]``.
    ``record_padded`` leaves (B, N, C) and (B, N, H, D), and no layout. Tensors carry the graph of
    their forward; the next forward replaces them.
    """

    hidden_states: Collection[int] = ()
    attention: Collection[int] = ()
    attention_values: Collection[int] = ()
    layout: SequenceLayout | None = field(default=None, init=False)
    hidden: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    queries: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    keys: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    values: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.hidden_states = frozenset(self.hidden_states)
        self.attention = frozenset(self.attention)
        self.attention_values = frozenset(self.attention_values)

    def start(self, layers: int, layout: SequenceLayout | None) -> None:
        """Forget the last forward; refuse what a model of M layers does not have."""
        for what, wanted, first in (
            ("hidden state", self.hidden_states, 0),
            ("attention of layer", {*self.attention, *self.attention_values}, 1),
        ):
            strange = sorted(m for m in wanted if not first <= m <= layers)
            if strange:
                raise ValueError(
                    f"capture asks for {what} {strange[0]}, and this model has {first}..{layers}"
                )
        self.layout = layout
        self.hidden, self.queries, self.keys, self.values = {}, {}, {}, {}

    def reach(self) -> tuple[int, bool]:
        """(m, whole): the last layer that leaves something here, and whether that is its output;
        if not, its queries, keys or values alone. (0, True): the embeddings.
        """
        m = max((*self.hidden_states, *self.attention, *self.attention_values), default=0)
        return m, m in self.hidden_states or m == 0

    def heads_of(self, m: int) -> frozenset[str]:
        """What of layer m's heads is asked for, of HEADS."""
        scores = HEADS[:2] if m in self.attention else ()
        values = HEADS[2:] if m in self.attention_values else ()
        return frozenset((*scores, *values))

    def take(self, other: Capture) -> None:
        """Copy from ``other``, which recorded the same forward and at least as much."""
        self.layout = other.layout
        self.hidden = {m: other.hidden[m] for m in self.hidden_states}
        self.queries = {m: other.queries[m] for m in self.attention}
        self.keys = {m: other.keys[m] for m in self.attention}
        self.values = {m: other.values[m] for m in self.attention_values}


@contextmanager
def record_padded(model: nn.Module, capture: Capture) -> Iterator[Capture]:
    """Within the block, each forward of a plain ``model`` leaves its states in ``capture``.

    Works by forward hooks, so the model runs its own code: hidden states (B, N, C), queries, keys
    and values (B, N, H, D), rows of padding included. Refuses an accelerated model (its forward
    does not pass through these modules) and re-entrant gradient checkpointing (its first pass has
    no graph).
    """
    bert = encoder_of(model)
    layers = bert.encoder.layer
    if hasattr(bert, "fast_impl"):
        raise ValueError(
            "record_padded() reads a model that runs Transformers' own code, and this one is "
            "accelerated: pass capture= to its forward, or restore() it first"
        )
    if any(_is_reentrant(layer) for layer in layers):
        raise ValueError(
            "re-entrant gradient checkpointing runs its first pass without a graph, so the "
            "recorded states would carry no gradient; enable it with use_reentrant=False"
        )

    def start(*_: Any) -> None:
        capture.start(len(layers), None)

    def keep(where: str, m: int, heads: int | None = None) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            # Gradient checkpointing comes by a second time, in backward: the first tensor is the
            # one the loss used.
            getattr(capture, where).setdefault(
                m, states.unflatten(-1, (heads, -1)) if heads else states
            )

        return hook

    start()  # refuse wrong numbers before anything runs
    hooks = [bert.register_forward_pre_hook(start)]
    for m in capture.hidden_states:
        module = layers[m - 1] if m else bert.embeddings
        hooks.append(module.register_forward_hook(keep("hidden", m)))
    for where, name, wanted in (
        ("queries", "query", capture.attention),
        ("keys", "key", capture.attention),
        ("values", "value", capture.attention_values),
    ):
        for m in wanted:
            heads = layers[m - 1].attention.self
            hook = keep(where, m, heads.num_attention_heads)
            hooks.append(getattr(heads, name).register_forward_hook(hook))
    try:
        yield capture
    finally:
        for handle in hooks:
            handle.remove()


def encoder_of(model: nn.Module) -> Any:
    """The BERT encoder (embeddings, encoder.layer) inside any BERT class, wrapped or not."""
    for module in model.modules():
        if hasattr(module, "embeddings") and hasattr(getattr(module, "encoder", None), "layer"):
            return module
    raise ValueError(f"{type(model).__name__} holds no BERT encoder to record from")


def _is_reentrant(layer: Any) -> bool:
    on = getattr(layer, "gradient_checkpointing", False) and layer.training
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return bool(on and getattr(function, "keywords", {}).get("use_reentrant"))
