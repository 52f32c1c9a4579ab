"""The distillation step of TextBrewer 0.2, a toolkit for distilling BERT, where it is installed:
`pip install --no-deps textbrewer`.

Given the mask of the inputs, its `attention_mse` and `hidden_mse` are the definition's means over
real positions; without one the former counts negative scores as 0, which is another loss. What its
adaptors hand out is matched, here scores before the softmax. It makes a projection for each match;
one that all share is registered under a name, as it provides for. Under autocast it counts pairs in
bf16, which leaves its loss wrong by some 1e-3: it takes part in fp32 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from tinybert_fast.benchmarks.baselines.distillation import SCORES, DistillationBaseline
from tinybert_fast.benchmarks.batches import Batch
from tinybert_fast.benchmarks.case import Unavailable, one_line

NAME = "textbrewer"
SHARED = "shared by all matches"  # the projection, in TextBrewer's registry


def is_installed() -> bool:
    return find_spec(NAME) is not None


class Reading(nn.Module):
    """A BertModel that returns its scores (B, H, N, N) and states (B, N, C) of every layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Any]:
        scores: list[Tensor] = []
        found = self.model(**inputs, output_hidden_states=True, scores=scores)
        return {"attention": scores, "hidden": found.hidden_states}


def adapt(batch: dict[str, Tensor], found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "inputs_mask": batch["attention_mask"]}


class TextBrewerStep(DistillationBaseline):
    """Its `GeneralDistiller` computes the loss; the optimizer is the one of all steps."""

    name = role = NAME

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for model in (self.student, self.teacher):
            model.set_attn_implementation(SCORES)
        self.distiller: Any = None

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        try:
            self.distiller = self.made()
        except Exception as error:  # of an old package under new ones
            raise Unavailable(one_line(error)) from error

    def made(self) -> Any:
        import textbrewer

        textbrewer.register_new("projection", SHARED, lambda width, taught: self.project)
        widths = self.student.config.hidden_size, self.teacher.config.hidden_size
        matches: list[dict[str, Any]] = [
            {
                "feature": "attention",
                "layer_S": m - 1,
                "layer_T": m * self.every - 1,
                "loss": "attention_mse",
                "weight": 1,
            }
            for m in range(1, self.layers + 1)
        ]
        matches += [
            {
                "feature": "hidden",
                "layer_S": m,
                "layer_T": m * self.every,
                "loss": "hidden_mse",
                "weight": 1,
                "proj": [SHARED, *widths],
            }
            for m in range(self.layers + 1)
        ]
        with TemporaryDirectory() as folder:  # it makes one, and writes nothing here
            where = textbrewer.TrainingConfig(device=self.device, output_dir=folder)
        how = textbrewer.DistillationConfig(intermediate_matches=matches)
        models = Reading(self.teacher), Reading(self.student)
        return textbrewer.GeneralDistiller(where, how, *models, adapt, adapt)

    def backward(self, batch: Batch, dtype: str, setting: Any) -> Tensor:
        if dtype != "fp32":
            raise Unavailable("its attention_mse counts pairs in bf16, and its loss is wrong there")
        loss, _ = self.distiller.train_on_batch(batch.inputs, {})
        loss.backward()
        return loss.detach()
