"""How much work the demo does, and how: the quick one and the full one."""

from dataclasses import dataclass, replace
from typing import Any

from tinybert_fast.training.matches import LayerMatches

# 4 student layers over the teacher's 6.
FOUR_OF_SIX = LayerMatches.parse("0:0,1:2,2:3,3:5,4:6")


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the demo's figures."""

    name: str
    # The teacher: MiniLM, fine-tuned on the training sentences.
    teacher_epochs: float = 3.0
    teacher_lr: float = 5e-5
    # One student for each: by TinyBERT's losses, over `matches`, or by MiniLMv2's, of last layers.
    losses: tuple[str, ...] = ("tinybert",)
    # General distillation: from MiniLM before fine-tuning; each step sees new sentences.
    student: str = "4l-312"
    matches: LayerMatches | None = FOUR_OF_SIX
    general_steps: int = 1500
    general_batch_size: int = 64
    general_lr: float = 5e-4
    minilm_general_lr: float = 5e-4
    # Task distillation, both stages: the training sentences and so many unlabelled ones, which the
    # fine-tuned teacher explains as well as any.
    augmented_sentences: int = 45_000
    intermediate_epochs: float = 0.5
    intermediate_lr: float = 3e-4
    minilm_intermediate_lr: float = 3e-4
    intermediate_schedule: str = "linear"
    prediction_epochs: float = 1.0
    prediction_lr: float = 1e-4
    select_students_by: str = "loss"  # on dev, whose accuracy jumps by more than checkpoints differ
    # Without a teacher: the training sentences.
    alone_epochs: float = 7.0
    alone_lrs: tuple[float, ...] = (5e-5, 1e-4, 3e-4)  # the best on dev in the first seed is taken
    pca_alone: bool = True  # also train a student from PCA initialisation without a teacher
    # For all of them.
    seeds: int = 1
    threads: int = 2
    bf16: bool = False  # autocast while training
    batch_size: int = 32
    max_length: int = 64
    eval_steps: int = 200
    speed_rounds: int = 3
    rows: int | None = None  # of the labelled sentences; all by default

    def objective(self, loss: str) -> dict[str, Any]:
        """The loss and its matches, for the recipes."""
        return {"loss": loss, "matches": self.matches if loss == "tinybert" else None}

    def rates(self, loss: str) -> tuple[float, float]:
        """Learning rates of general distillation and of the intermediate stage."""
        if loss == "minilm":
            return self.minilm_general_lr, self.minilm_intermediate_lr
        return self.general_lr, self.intermediate_lr


def folder_of(phase: str, loss: str) -> str:
    """Where a phase keeps what it trained by this loss: by TinyBERT's, under its own name."""
    return phase if loss == "tinybert" else f"{phase}-{loss}"


FULL = DemoSettings("full")
QUICK = replace(
    FULL,
    name="quick",
    rows=6000,
    teacher_epochs=1.0,
    general_steps=120,
    augmented_sentences=0,
    intermediate_epochs=1.0,
    alone_epochs=2.0,
    alone_lrs=(3e-4,),
    pca_alone=False,
    eval_steps=100,
    speed_rounds=2,
)
