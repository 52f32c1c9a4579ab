"""What packed rows cannot serve: calls of another kind, and modules that somebody changed.

The packed encoder and the masked-LM head do not call most modules of a Transformers BERT, they read
their tensors. A subclass put in the place of one, or a hook on it, would be passed over in silence;
so each is looked at, and Transformers' own code runs instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils
from transformers.models.bert import modeling_bert as bert_modules
from transformers.utils import output_capturing

from tinybert_fast.modules.feed_forward_fp8 import FeedForwardFp8
from tinybert_fast.modules.weights import hooks_of

PLUG_IN = "tinybert_fast"  # the name that attention.py registers
# These compute the same attention; any other name is the user's own and is left to run.
EQUIVALENT_ATTENTION = {None, "eager", "sdpa", "flex_attention", PLUG_IN}
# Keywords that reach BertModel.forward and change nothing in an encoder.
INERT_KEYWORDS = {"use_cache", "num_items_in_batch", "return_dict"}
# Of nn.Embedding, which the embedding op does not know.
EMBEDDING_OPTIONS = ("max_norm", "scale_grad_by_freq", "sparse")
# Where Transformers defines the hooks that it registers itself.
OWN_HOOKS = {output_capturing.__name__, modeling_utils.__name__}


def unserved(
    bert: Any, mask: Any, crossed: bool, joined: bool, kwargs: dict[str, Any]
) -> str | None:
    """Why Transformers' own forward has to run, or None. ``joined``: position_ids may separate
    several sequences of one row.
    """
    config = bert.config
    if config.is_decoder:
        return "config.is_decoder makes it a decoder"
    if crossed:
        return "cross-attention was asked for"
    if kwargs.get("output_attentions", config.output_attentions):
        return "output_attentions asks for probabilities that packed attention never holds"
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        what = f"{mask.dim()}-D mask" if isinstance(mask, Tensor) else type(mask).__name__
        return f"a {what} is not a key-padding mask of shape (batch, width)"
    if kwargs.get("is_causal", getattr(config, "is_causal", None)):
        return "is_causal was asked for"
    implementation = config._attn_implementation
    flash = implementation is not None and "flash" in implementation
    if implementation not in EQUIVALENT_ATTENTION and not flash:
        return f"attn_implementation={implementation!r} is not one of Transformers' own"
    if joined and flash:
        return f"attn_implementation={implementation!r} separates sequences by position_ids"
    for name, value in kwargs.items():
        if value is not None and name not in INERT_KEYWORDS and not name.startswith("output_"):
            return f"the keyword {name!r} is not known here"
    return _changed(_bypassed(bert))


def _bypassed(bert: Any) -> Iterator[tuple[Any, type]]:
    """Every module that the packed encoder does not call but reads the tensors of, and its class.

    Linear layers are not among them (it calls those that are not plain), nor is an activation
    other than BERT's gelu. Modules' own dictionaries are read: at every forward, attributes took
    several times as long.
    """
    embeddings = bert.embeddings
    yield embeddings, bert_modules.BertEmbeddings
    yield embeddings.word_embeddings, nn.Embedding
    yield embeddings.position_embeddings, nn.Embedding
    yield embeddings.token_type_embeddings, nn.Embedding
    yield from _normed(embeddings)
    yield bert.encoder, bert_modules.BertEncoder
    for layer in bert.encoder.layer:
        yield layer, bert_modules.BertLayer
        parts = layer._modules
        attention, inner, output = parts["attention"], parts["intermediate"], parts["output"]
        yield attention, bert_modules.BertAttention
        heads, attention_output = attention._modules["self"], attention._modules["output"]
        yield heads, bert_modules.BertSelfAttention
        yield heads._modules["dropout"], nn.Dropout
        yield attention_output, bert_modules.BertSelfOutput
        yield from _normed(attention_output)
        if not isinstance(inner, FeedForwardFp8):  # which it calls
            yield inner, bert_modules.BertIntermediate
            yield inner.intermediate_act_fn, object
        yield output, bert_modules.BertOutput
        yield from _normed(output)


@torch.compiler.disable
def head_changed(model: Any) -> str | None:
    """`_changed` of the head; only masked-LM heads are not called."""
    return None if model.fast_head is None else _changed(_bypassed_head(model))


@torch.compiler.disable
def pools_first_tokens(bert: Any) -> bool:
    """Whether ``bert`` has a pooler and it reads first tokens alone, as BERT's does."""
    return _changed([(bert.pooler, bert_modules.BertPooler)]) is None


def _bypassed_head(model: Any) -> Iterator[tuple[Any, type]]:
    if model.fast_head is bert_modules.BertPreTrainingHeads:
        yield model.bert.pooler, bert_modules.BertPooler  # called, on first tokens alone
    yield model.cls, model.fast_head
    predictions = model.cls.predictions
    yield predictions, bert_modules.BertLMPredictionHead
    transform = predictions.transform
    yield transform, bert_modules.BertPredictionHeadTransform
    yield transform.transform_act_fn, object
    yield transform.LayerNorm, nn.LayerNorm


def _normed(block: Any) -> Iterator[tuple[Any, type]]:
    yield block._modules["LayerNorm"], nn.LayerNorm
    yield block._modules["dropout"], nn.Dropout


def _changed(modules: Iterable[tuple[Any, type]]) -> str | None:
    """What somebody did to a module and would be lost if it is not called, or None.

    Transformers' own hooks aside: its recorders, and the one that makes embeddings require
    gradients, as encode() does itself.
    """
    for module, kind in modules:
        if kind is not object and type(module) is not kind:
            return f"a {kind.__name__} was replaced by a {type(module).__name__}"
        if kind is nn.LayerNorm and module.bias is None:
            return "a LayerNorm has no bias"
        if kind is nn.Embedding and any(getattr(module, name) for name in EMBEDDING_OPTIONS):
            return f"an Embedding has one of {', '.join(EMBEDDING_OPTIONS)}"
        if kind is object and not isinstance(module, nn.Module):
            continue
        if "forward" in module.__dict__:
            return f"the forward of a {type(module).__name__} was replaced"
        hooks = hooks_of(module)
        if hooks and any(getattr(hook, "__module__", None) not in OWN_HOOKS for hook in hooks):
            return f"a hook was registered on a {type(module).__name__}"
    return None
