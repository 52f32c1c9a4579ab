"""Pre-training from text, and the two TinyBERT recipes: general distillation from plain text, task
distillation in two stages.

Defaults of distillation are the paper's (arXiv 1909.10351). ``parity="official"`` follows the
released code where it computes something else: padded and unaccelerated models, losses that count
padding, soft cross-entropy averaged over classes, BertAdam, and no incomplete last batch. Not
reproduced are dropout left on in the teacher, one token per sentence masked though masking is off,
and gold labels for STS-B in the prediction stage; and only a student whose folder has it, as
released ones do, applies a ReLU before its classifier.
"""

from tinybert_fast.training.general_distillation import distill_general
from tinybert_fast.training.masking import Masking
from tinybert_fast.training.pretrain import pretrain
from tinybert_fast.training.task_distillation import distill_task

__all__ = ["Masking", "distill_general", "distill_task", "pretrain"]
