"""attn_implementation="tinybert_fast": ops.attention in the encoders of Transformers.

    layout = mask_function(mask)                    once per forward: which positions are tokens
    out    = attention_function(q, k, v, layout)    in every layer; (B, H, N, D) -> (B, N, H, D)

Transformers hands whatever the mask function returns to every layer, through gradient checkpointing
and torch.compile. Tokens attend to the tokens of their sequence; rows of padding come back as
zeros, whatever the padding pattern. Nothing of size N x N is kept, so there are no probabilities to
return. What this cannot compute is refused: the registry has no way to fall back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function

from tinybert_fast import ops
from tinybert_fast.integrations.unserved import INERT_KEYWORDS, PLUG_IN
from tinybert_fast.modules.encoder import draw_seed
from tinybert_fast.ops.layout import SequenceLayout, Tables, full_tables, longest_first

# Beside those that change nothing in any encoder: positions are in the embeddings already.
INERT = {*INERT_KEYWORDS, "position_ids"}


@dataclass(frozen=True, eq=False)
class TracedLayout(SequenceLayout):
    """The layout of a batch that torch.compile traces: no number of tokens is known.

    Its T is B * N. The tokens come first, in their order; the tail of padding rows belongs to no
    sequence: an op leaves there what it likes, values and gradients, and both are cleared here.
    ``lengths``, ``starts_padded`` and, with padding, ``padded_work`` say nothing, and
    ``max_length`` is N.
    """

    live: Tensor | None  # bool (B * N,): the row is a token; None where all are

    @classmethod
    def from_mask(cls, mask: Tensor, impl: str = "auto") -> TracedLayout:
        """From a bool (B, N) key-padding mask, without reading it on the host; nobody asks impl."""
        batch, width = mask.shape
        lengths = mask.sum(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))  # (B + 1,)
        rows = torch.argsort(~mask.flatten(), stable=True)  # (B * N,), tokens first
        live = torch.arange(batch * width, device=mask.device) < cu_seqlens[-1]
        work = longest_first(lengths, cu_seqlens[:-1])
        return cls._of(batch, width, (cu_seqlens.int(), work, work), rows, live)

    @classmethod
    def full(cls, batch_size: int, width: int, device: torch.device | str = "cpu") -> TracedLayout:
        rows = torch.arange(batch_size * width, device=device)
        tables = full_tables(batch_size, width, device)
        return cls._of(batch_size, width, tables, rows, None)

    @classmethod
    def _of(
        cls, batch: int, width: int, tables: Tables, rows: Tensor, live: Tensor | None
    ) -> TracedLayout:
        cu_seqlens, work, padded_work = tables
        sequences = torch.div(rows, width, rounding_mode="floor")
        positions = torch.arange(batch * width, device=rows.device) - cu_seqlens[sequences]
        return cls(
            batch_size=batch,
            width=width,
            lengths=(),
            max_length=width,
            starts_padded=False,
            has_holes=live is not None,  # unknown, so rows are packed
            cu_seqlens=cu_seqlens,
            rows=rows,
            sequences=sequences.int(),
            positions=positions.int(),
            work=work,
            padded_work=padded_work,
            live=live,
        )

    @property
    def is_full(self) -> bool:
        return self.live is None

    def pack(self, padded: Tensor) -> Tensor:
        return self._cleared(super().pack(padded))

    def pad(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        return super().pad(self._cleared(packed, fill), fill)

    def _cleared(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        if self.live is None:
            return packed
        return torch.where(self.live.view(-1, *(1,) * (packed.dim() - 1)), packed, fill)


def layout_class() -> type[SequenceLayout]:
    """SequenceLayout reads the mask on the host, which would break a traced graph."""
    return TracedLayout if torch.compiler.is_compiling() else SequenceLayout


def mask_function(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **unread: Any,
) -> SequenceLayout:
    """The layout of one forward. ``attention_mask``: bool (B, N), or None where nothing is padding.

    One host sync with a mask, none without one or while torch.compile traces.
    """
    if torch.jit.is_tracing():
        raise _refusal("torch.jit.trace would keep this batch's padding, torch.export does not")
    if mask_function is not bidirectional_mask_function:
        raise _refusal("a causal, windowed or custom mask was asked for")
    if q_length != kv_length:
        raise _refusal(f"{q_length} queries attend to {kv_length} keys (cross-attention, a cache)")
    if attention_mask is None:
        layout = layout_class().full(batch_size, q_length, device)
    elif attention_mask.shape == (batch_size, q_length):
        layout = layout_class().from_mask(attention_mask)
    else:
        raise _refusal(
            f"a mask of shape {tuple(attention_mask.shape)} is not the key-padding mask "
            f"({batch_size}, {q_length}) of the inputs"
        )
    _ = layout.is_full  # cached now: where layers are compiled one by one, finding it is a break
    return layout


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(B, H, N, D) views -> (B, N, H, D), and no probabilities.

    ``attention_mask``: a layout; None from a model without masks means that nothing is padding.
    Each layer draws its own dropout seed, from the generator that gradient checkpointing rewinds.
    """
    _check(module, query, key, value, attention_mask, kwargs)
    batch, _, width, _ = query.shape
    layout = attention_mask
    if layout is None:
        layout = layout_class().full(batch, width, query.device)
    out = ops.attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        layout=layout,
        scale=scaling,
        dropout_p=dropout,
        seed=draw_seed(query.device) if dropout else None,
    )
    return out, None


def register_attention() -> str:
    """Make ``attn_implementation="tinybert_fast"`` known to Transformers; returns that name.

    Importing ``tinybert_fast.integrations``, as ``accelerate`` and the ``TinyBert*`` classes do,
    has the same effect. The registry is the process's; calling again changes nothing.
    """
    AttentionInterface.register(PLUG_IN, attention_function)
    # Without one under the same name, Transformers would drop the mask and padding be attended.
    AttentionMaskInterface.register(PLUG_IN, mask_function)
    return PLUG_IN


def _check(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> None:
    config = getattr(module, "config", None)
    if mask is not None and not isinstance(mask, SequenceLayout):
        what = f"a {mask.dim()}-D mask" if isinstance(mask, Tensor) else type(mask).__name__
        raise _refusal(f"{what} came ready-made; give the model a key-padding mask (batch, width)")
    causal = kwargs.get("is_causal")
    if getattr(module, "is_causal", True) if causal is None else causal:  # as sdpa decides it
        raise _refusal(f"{type(module).__name__} is causal: decoders are not served")
    if (
        kwargs.get("encoder_hidden_states") is not None
        or not query.shape == key.shape == value.shape
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise _refusal(f"cross-attention, a cache or grouped heads: q, k, v are {shapes}")
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        raise _refusal("output_attentions asks for probabilities that it never holds")
    for name, given in kwargs.items():
        inert = name in INERT or name == "is_causal" or name.startswith("output_")
        if given is not None and not inert:
            raise _refusal(f"the keyword {name!r} is not known here")


def _refusal(what: str) -> ValueError:
    return ValueError(
        f'attn_implementation="{PLUG_IN}" cannot serve this call: {what}. '
        'model.set_attn_implementation("eager") can'
    )


register_attention()
