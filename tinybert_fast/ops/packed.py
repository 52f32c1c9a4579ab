"""What a layout must be for the operands that it describes."""

from __future__ import annotations

from torch import Tensor

from tinybert_fast.ops.dispatch import check_devices
from tinybert_fast.ops.layout import SequenceLayout


def check_layout(op: str, layout: SequenceLayout, x: Tensor, leading: int) -> None:
    """ValueError unless ``layout`` describes x, whose ``leading`` first axes are packed tokens (T,)
    or padded sequences (B, N).
    """
    if not isinstance(layout, SequenceLayout):
        raise ValueError(
            f"{op}: layout is {type(layout).__name__}; expected a SequenceLayout, which "
            "SequenceLayout.from_mask makes of an attention mask"
        )
    expected = (layout.total,) if leading == 1 else (layout.batch_size, layout.width)
    if tuple(x.shape[:leading]) != expected:
        raise ValueError(
            f"{op}: the layout describes leading sizes {expected}; got {tuple(x.shape)}"
        )
    check_devices(op, x.device, layout=layout.cu_seqlens)
