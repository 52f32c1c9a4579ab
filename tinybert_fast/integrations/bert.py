"""accelerate(): Transformers' BERT on packed rows, in place, by giving its modules another class.

No Parameter moves: state_dict, optimizer and checkpoints stay as they are. The swapped classes run
`modules.encode` on the real tokens and pad what they return; rows of padding are zeros where
Transformers leaves values that mean nothing. What packed rows cannot serve (see unserved.py) runs
Transformers' own forward and says so once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
)
from transformers.models.bert import modeling_bert as bert_modules
from transformers.models.bert.modeling_bert import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForPreTrainingOutput,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)
from transformers.utils import can_return_tuple, output_capturing

from tinybert_fast.integrations.unserved import head_changed, pools_first_tokens, unserved
from tinybert_fast.modules.capture import Capture
from tinybert_fast.modules.encoder import ENCODER_OPS, encode
from tinybert_fast.modules.heads import (
    HEAD_OPS,
    IGNORED,
    first_tokens,
    predict,
    vocabulary_loss,
    without_empty,
)
from tinybert_fast.ops.block_mask import BlockMask, BlockPattern
from tinybert_fast.ops.dispatch import Impl, check_impl
from tinybert_fast.ops.layout import SequenceLayout

logger = logging.getLogger(__name__)

SETTINGS = ("fast_impl", "fast_training_logits", "fast_block_mask")  # that accelerate() leaves
MADE = "fast_lists"  # of an encoder: its block mask on the device of the latest forward


@dataclass
class Packed:
    """What the encoder hands to a head that reads packed rows."""

    rows: Tensor  # (T, C), or (R, C) of the rows that it asked to read
    layout: SequenceLayout
    hidden_states: Any  # None, or M + 1 times (B, N, C), None where not selected
    read: Tensor | None  # int64 (R,): which rows, None for all


Rows = Tensor | Callable[[SequenceLayout], Tensor]  # int64 (R,), or what makes them of the layout


class Accelerated:
    """What every swapped class has; set on the instance, so copies and pickles keep it."""

    fast_impl: Impl = "auto"
    fast_training_logits = False
    fast_block_mask: BlockMask | BlockPattern | None = None
    fast_head: type | None = None  # the class of a masked-LM head, whose tensors are read
    fast_plain: type[nn.Module]  # the class that restore() gives back


FAST_CLASSES: dict[type, type[Accelerated]] = {}


def bears_name_of(plain: type, cls: type) -> None:
    """Name ``cls`` as ``plain`` wherever Transformers writes or looks up a class by name.

    config.architectures, pipelines and the Trainer read ``__name__``; pickle finds a class by
    ``__qualname__``.
    """
    cls.__name__ = plain.__name__


def stands_for(plain: type[nn.Module]) -> Any:
    """Class decorator: accelerate() puts the class in the place of ``plain``."""

    def register(cls: type[Accelerated]) -> type[Accelerated]:
        bears_name_of(plain, cls)
        cls.fast_plain = plain
        FAST_CLASSES[plain] = cls
        return cls

    return register


@stands_for(BertModel)
class AcceleratedBertModel(Accelerated, BertModel):
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        capture: Capture | None = None,
        layout: SequenceLayout | None = None,
        direction: str = "both",
        read: Rows | None = None,
        first_only: bool = False,
        record_only: bool = False,
        packed: bool = False,
        **kwargs: Any,
    ) -> Any:
        """BertModel's forward, with seven keywords more, which every accelerated class passes on.

        Args:
            capture: what to record of hidden states, queries, keys and values (modules/capture.py).
            layout: of this batch, if the caller has built it; ``attention_mask`` is then not read.
            direction: "both", "causal" or "anti_causal" (``ops.attention``), in every layer.
            read: the packed rows that a head will read, int64 (R,), or a function of the layout
                that says which, with ``packed``: it gets these alone, in this order, and the last
                layer computes no others behind its attention.
            first_only: likewise for a head that reads the pooler's answer: the last hidden state is
                that of first tokens, (B, 1, C), unless somebody asks for hidden states.
            record_only: with ``capture`` and ``packed``, stop where nothing more is recorded: the
                head gets no rows.
            packed: give a head its `Packed` rows, or None where Transformers' own code has to run.
        """
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise ValueError(
                "an accelerated BERT reads its mask on the host, which no exported or traced graph "
                "can hold: tinybert_fast.restore(model) before exporting or tracing"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        inputs = input_ids if input_ids is not None else inputs_embeds
        crossed = encoder_hidden_states is not None or encoder_attention_mask is not None
        compiled = torch.compiler.is_compiling()
        plan = (self, inputs, attention_mask, position_ids, layout, crossed, kwargs, compiled)
        layout, reason = _plan(*plan)
        if reason is not None:
            if self.fast_block_mask is not None:
                raise ValueError(
                    f"block_mask= needs packed rows, and this call cannot run on them: {reason}"
                )
            if direction != "both":
                raise ValueError(
                    f"direction={direction!r} needs packed rows, and this call cannot run on them: "
                    f"{reason}"
                )
            if capture is not None:
                raise ValueError(
                    f"capture= needs packed rows, and this call cannot run on them: {reason}. "
                    "record_padded() records what a restored model computes"
                )
            if layout is not None and attention_mask is None:
                raise ValueError(
                    "layout= came without attention_mask, which Transformers' own code needs, and "
                    f"this call runs it: {reason}"
                )
            say_once(f"{type(self).__name__} runs Transformers' own code: {reason}")
            if packed:
                return None
            _keep_recordable(self)
            return super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=True,
                **kwargs,
            )
        assert layout is not None
        if read is not None and not packed:
            raise ValueError("read= gives some rows, for a head that asks for packed ones")
        if record_only and (capture is None or not packed or read is not None):
            raise ValueError(
                "record_only= computes what capture= records and no rows: give it capture= and "
                "packed=True, and no read="
            )
        asked = kwargs.get(
            "output_hidden_states", getattr(self.config, "output_hidden_states", None)
        )
        wanted = None if record_only else _selected(asked, self.config.num_hidden_layers)
        record = capture or Capture()
        if wanted is not None:
            record = replace(record, hidden_states={*wanted, *record.hidden_states})
        last = self.config.num_hidden_layers
        whole = last in record.hidden_states  # somebody asks for all its rows
        first_only = first_only and not whole and not packed and layout.total > 0
        if first_only:
            read = layout.counted.firsts
        elif callable(read):
            read = read(layout)
        rows = encode(
            self,
            layout,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            capture=record,
            block_mask=_block_mask(self, layout.rows.device),
            direction=direction,
            read=None if whole else read,
            record_only=record_only,
            impl=self.fast_impl,
        )
        if capture is not None and record is not capture:
            capture.take(record)
        states: Any = None
        if wanted is not None:
            states = tuple(
                layout.pad(record.hidden[m].to(rows.dtype)) if m in wanted else None
                for m in range(last + 1)
            )
        if packed:
            if whole and read is not None:
                rows = rows.index_select(0, read)
            return Packed(rows, layout, states, read)
        if first_only:
            hidden = without_empty(rows, layout.counted)
        else:
            hidden = layout.pad(rows) if states is None or states[last] is None else states[last]
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            pooler_output=self.pooler(hidden) if self.pooler is not None else None,
            hidden_states=states,
        )


class AcceleratedHead(Accelerated):
    """A class whose head reads packed rows."""

    bert: Any

    def encode_packed(self, **inputs: Any) -> Packed | None:
        """Calls ``self.bert``, whose hooks run and are given `Packed`. None: Transformers' own head
        has to run."""
        if not isinstance(self.bert, AcceleratedBertModel):
            return None
        changed = head_changed(self)
        if changed is not None:
            say_once(f"{type(self).__name__} runs Transformers' own head: {changed}")
            return None
        return self.bert(packed=True, return_dict=True, **inputs)


@stands_for(BertForMaskedLM)
class AcceleratedBertForMaskedLM(AcceleratedHead, BertForMaskedLM):
    """With labels in training mode, the head runs on labelled rows alone and there are no logits
    (training_logits=True gives them). Labels on padding count in no mode."""

    fast_head = bert_modules.BertOnlyMLMHead

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            **kwargs,
        }
        packed = self.encode_packed(read=_labelled(self, labels), **inputs)
        if packed is None:
            return super().forward(labels=labels, return_dict=True, **inputs)
        loss, logits = _masked_lm(self, packed, labels)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=packed.hidden_states)


@stands_for(BertForPreTraining)
class AcceleratedBertForPreTraining(AcceleratedHead, BertForPreTraining):
    """With both labels in training mode, the vocabulary head runs on labelled rows alone and there
    are no prediction_logits (training_logits=True gives them). Labels on padding count in no mode.
    """

    fast_head = bert_modules.BertPreTrainingHeads

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        # Transformers gives a loss only when both labels are there.
        complete = labels is not None and next_sentence_label is not None
        answers = labels if complete else None
        packed = self.encode_packed(read=_labelled(self, answers, first=True), **inputs)
        if packed is None:
            both = {"labels": labels, "next_sentence_label": next_sentence_label}
            return super().forward(return_dict=True, **both, **inputs)
        layout = packed.layout
        if packed.read is None:
            first = first_tokens(packed.rows, layout)
        else:
            first = without_empty(packed.rows[: layout.batch_size], layout)
            packed = replace(
                packed,
                rows=packed.rows[layout.batch_size :],
                read=packed.read[layout.batch_size :],
            )
        order = self.cls.seq_relationship(self.bert.pooler(first))
        loss, logits = _masked_lm(self, packed, answers)
        if loss is not None and next_sentence_label is not None:
            loss = loss + F.cross_entropy(order.view(-1, 2), next_sentence_label.view(-1))
        return BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=order,
            hidden_states=packed.hidden_states,
        )


@stands_for(BertForQuestionAnswering)
class AcceleratedBertForQuestionAnswering(AcceleratedHead, BertForQuestionAnswering):
    """An answer is never padding: logits there are the lowest number of their type, so the loss is
    over real tokens, and a position that points at padding is ignored like one outside the text."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            **kwargs,
        }
        packed = self.encode_packed(**inputs)
        if packed is None:
            both = {"start_positions": start_positions, "end_positions": end_positions}
            return super().forward(return_dict=True, **both, **inputs)
        layout = packed.layout
        scores = self.qa_outputs(packed.rows)  # (T, 2)
        scores = layout.pad(scores, fill=torch.finfo(scores.dtype).min)
        start, end = (one.contiguous() for one in scores.unbind(-1))  # (B, N) each
        loss = None
        if start_positions is not None and end_positions is not None:
            real = layout.pad(torch.ones_like(layout.rows)).bool()
            loss = (
                _position_loss(start, start_positions, real)
                + _position_loss(end, end_positions, real)
            ) / 2
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start, end_logits=end, hidden_states=packed.hidden_states
        )


def reads_first_tokens(plain: Any) -> Any:
    """The forward of a class whose head reads the pooler's answer alone."""

    @functools.wraps(plain.forward)  # its signature tells Trainers which columns a model takes
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.bert, AcceleratedBertModel):
            kwargs["first_only"] = pools_first_tokens(self.bert)
        return plain.forward(self, *args, **kwargs)

    return forward


@stands_for(BertForSequenceClassification)
class AcceleratedBertForSequenceClassification(Accelerated, BertForSequenceClassification):
    forward = reads_first_tokens(BertForSequenceClassification)


@stands_for(BertForNextSentencePrediction)
class AcceleratedBertForNextSentencePrediction(Accelerated, BertForNextSentencePrediction):
    forward = reads_first_tokens(BertForNextSentencePrediction)


@stands_for(BertForMultipleChoice)
class AcceleratedBertForMultipleChoice(Accelerated, BertForMultipleChoice):
    forward = reads_first_tokens(BertForMultipleChoice)


def accelerate(
    model: Any,
    *,
    impl: Impl = "auto",
    training_logits: bool = False,
    block_mask: BlockMask | BlockPattern | None = None,
) -> Any:
    """Run every Transformers BERT inside ``model`` on packed rows, in place; returns ``model``.

    Takes any BERT class of Transformers (and any module that holds a BertModel). Parameters,
    state_dict keys and what save_pretrained writes do not change; outputs of real tokens are the
    same, rows of padding are zeros. Calling again changes the settings.

    Args:
        impl: of every op: "auto", "triton", "native", "torch", "reference", or a (forward,
            backward) pair. A named one that an op lacks (``native``: those of a masked-LM head) is
            refused; ``TINYBERT_FAST_IMPL`` names one for the ops that have it.
        training_logits: masked-LM heads give logits of every row in training too, instead of the
            loss over labelled rows alone.
        block_mask: which tokens meet, in every layer, by their ranks among the real ones of a
            sequence; a pattern serves all lengths up to the model's, and a call that packed rows
            cannot serve raises.

    Raises:
        ValueError: no module, or one without a BertModel; one whose forward somebody replaced on
            the instance, as Accelerate's prepare() does; an ``impl`` that is unknown, cannot run
            here or that an op of the model lacks; a ``block_mask`` of another type.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"accelerate() takes a torch module that holds a BERT; got {type(model).__name__}"
        )
    if not isinstance(block_mask, (BlockMask, BlockPattern, type(None))):
        raise ValueError(
            f"block_mask is {type(block_mask).__name__}; expected a BlockPattern or a BlockMask "
            "(BlockMask.from_dense makes one of a bool tensor)"
        )
    found: list[Any] = [
        m for m in model.modules() if isinstance(m, Accelerated) or type(m) in FAST_CLASSES
    ]
    if not any(isinstance(m, BertModel) for m in found):
        own = next((type(m).__name__ for m in model.modules() if isinstance(m, BertModel)), None)
        raise ValueError(
            f"no BertModel of Transformers inside {type(model).__name__}: nothing to accelerate"
            + (f" ({own}, a subclass, may compute something else and is left alone)" if own else "")
        )
    heads = any(FAST_CLASSES.get(type(m), type(m)).fast_head is not None for m in found)
    check_impl("accelerate", impl, (*ENCODER_OPS, *HEAD_OPS) if heads else ENCODER_OPS)
    for module in found:
        if type(module) in FAST_CLASSES and "forward" in module.__dict__:
            raise ValueError(
                f"the forward of this {type(module).__name__} was replaced on the instance, as "
                "Accelerate's prepare(), Trainer and device_map do, and would run in place of the "
                "accelerated one: call accelerate() before them"
            )
    for module in found:
        module.__class__ = FAST_CLASSES.get(type(module), type(module))
        module.fast_impl, module.fast_training_logits = impl, training_logits
        module.fast_block_mask = block_mask
        module.__dict__.pop(MADE, None)
    return model


def restore(model: Any) -> Any:
    """Undo accelerate(), in place: Transformers' own classes again. Returns ``model``.

    The forward that Accelerate's prepare() or a Trainer left on it goes as well, and with it their
    autocast; they put it there again. ValueError for any other forward set on an instance.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"restore() takes a torch module; got {type(model).__name__}")
    found: list[Any] = [m for m in model.modules() if isinstance(m, Accelerated)]
    for module in found:
        if "forward" in module.__dict__ and not _is_prepared(module):
            raise ValueError(
                f"the forward of this {type(module).__name__} was replaced on the instance and "
                "would go on to call the accelerated one: undo that before restore() (hooks of "
                "Accelerate: accelerate.hooks.remove_hook_from_submodules())"
            )
    for module in found:
        for name in (*SETTINGS, MADE, "forward", "_original_forward"):
            module.__dict__.pop(name, None)
        module.__class__ = module.fast_plain
        _keep_recordable(module)
    return model


def _is_prepared(module: Any) -> bool:
    """Whether Accelerate's prepare() alone replaced the forward: in autocast, it calls ours."""
    before = getattr(module.__dict__.get("_original_forward"), "__func__", None)
    return before is type(module).forward and "_hf_hook" not in module.__dict__


def is_accelerated(model: Any) -> bool:
    """Whether a BERT inside ``model`` runs on packed rows."""
    return any(isinstance(module, AcceleratedBertModel) for module in model.modules())


@functools.cache
def _warn(message: str) -> None:
    logger.warning(message)


@torch.compiler.disable
def say_once(message: str) -> None:
    """A warning, the first time this process has it to say."""
    _warn(message)


@torch.compiler.disable
def _block_mask(bert: Any, device: torch.device) -> BlockMask | None:
    """On this device, made at the first forward there."""
    wanted = bert.fast_block_mask
    if wanted is None:
        return None
    made = bert.__dict__.get(MADE)
    if made is None or made.lists[0].device != device:
        if isinstance(wanted, BlockPattern):
            size = bert.config.max_position_embeddings
            made = BlockMask.from_pattern(wanted, size, device=device)
        else:
            made = wanted.to(device)
        bert.__dict__[MADE] = made
    return made


@torch.compiler.disable
def _plan(
    bert: Any,
    inputs: Any,
    mask: Any,
    position_ids: Tensor | None,
    layout: SequenceLayout | None,
    crossed: bool,
    kwargs: dict[str, Any],
    compiled: bool,
) -> tuple[SequenceLayout | None, str | None]:
    """The layout of the batch and, if Transformers' own forward has to run, why.

    All that is read on the host is read here: once per forward, outside compiled code.
    """
    batch, width = inputs.shape[:2]
    # How sequences that lie in one row come to flash attention, in Transformers' own code.
    joined = mask is None and layout is None and batch == 1 and position_ids is not None
    reason = unserved(bert, mask, crossed, joined, kwargs)
    if reason is not None:
        return layout, reason
    if layout is None and mask is None:
        layout = SequenceLayout.full(batch, width, device=inputs.device)
    elif layout is None:
        layout = SequenceLayout.from_mask(mask.to(inputs.device))
    if (layout.batch_size, layout.width) != (batch, width):
        raise ValueError(
            f"the attention mask covers {layout.batch_size} sequences of {layout.width} positions, "
            f"and the inputs are {batch} of {width}; give each input position one mask position"
        )
    if compiled:  # one graph for any number of tokens, which makes nothing that the layout keeps
        _ = layout.counted.firsts
        for tensor in (layout.rows, layout.columns, layout.sequences, layout.positions):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    if bert.pooler is not None and layout.starts_padded:
        return layout, "a sequence starts with padding, which BERT's pooler would read"
    return layout, None


def _keep_recordable(model: Any) -> None:
    """Let Transformers' own forward record hidden states under the model's present class.

    What a model can record is filed under the name of its class when it is constructed.
    """
    registry: Any = output_capturing._CAN_RECORD_REGISTRY
    by_name = type(registry) is dict  # before 5.24 the caller makes the key
    registry[str(type(model)) if by_name else model] = model._can_record_outputs


def _selected(asked: bool | int | list[int] | None, layers: int) -> set[int] | None:
    """What ``output_hidden_states`` takes of 0..M: a flag, or indices, as in Transformers 5.24."""
    if not asked:
        return None
    if isinstance(asked, bool):
        return set(range(layers + 1))
    indices = [asked] if isinstance(asked, int) else asked
    return {i % (layers + 1) for i in indices if -layers - 1 <= i <= layers}


def _labelled(
    model: Any, labels: Tensor | None, first: bool = False
) -> Callable[[SequenceLayout], Tensor] | None:
    """What a masked-LM head reads: in training the labelled rows, behind the ``first`` tokens."""
    if labels is None or not model.training or model.fast_training_logits:
        return None
    return functools.partial(_labelled_rows, labels, first)


def _labelled_rows(labels: Tensor, first: bool, layout: SequenceLayout) -> Tensor:
    labelled = (_packed_labels(labels, layout) != IGNORED).nonzero().squeeze(1)
    return torch.cat((layout.firsts, labelled)) if first else labelled


def _packed_labels(labels: Tensor, layout: SequenceLayout) -> Tensor:
    return layout.pack(labels.view(layout.batch_size, layout.width))


def _masked_lm(
    model: Any, packed: Packed, labels: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Loss and logits (B, N, V) of a masked-LM head; either may be None."""
    predictions, layout, impl = model.cls.predictions, packed.layout, model.fast_impl
    if labels is not None:
        labels = _packed_labels(labels, layout)
        if packed.read is not None:
            wanted = labels.index_select(0, packed.read)
            return vocabulary_loss(predictions, packed.rows, wanted, impl=impl), None
    logits = predict(predictions, packed.rows, impl=impl)
    loss = None if labels is None else F.cross_entropy(logits, labels, ignore_index=IGNORED)
    return loss, layout.pad(logits)


def _position_loss(logits: Tensor, positions: Tensor, real: Tensor) -> Tensor:
    """Mean cross-entropy of (B, N) logits where ``positions`` (B,) point at a real token."""
    width = logits.shape[1]
    positions = positions.view(-1).clamp(0, width)
    inside = positions.clamp(max=width - 1).unsqueeze(1)
    positions = torch.where(real.gather(1, inside).squeeze(1), positions, width)
    return F.cross_entropy(logits, positions, ignore_index=width)
