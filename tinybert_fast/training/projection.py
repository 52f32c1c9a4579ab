"""The trained maps W_h, W_e from student width to teacher width: student_state @ W.T + b ~
teacher_state.

They serve the losses and are thrown away by whoever only wants the student, so they are saved
beside the model (``projection.safetensors``), never inside its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from tinybert_fast.data.atomic import atomic_write

FILE_NAME = "projection.safetensors"
# Where a folder may hold one: our file first, then the kinds that the TinyBERT authors released.
_FILES = (FILE_NAME, "model.safetensors", "pytorch_model.bin")
_KEY = re.compile(r"(?:^|\.)(fit_dense|fit_denses\.(\d+))\.(weight|bias)$")


class HiddenProjection(nn.Module):
    """W (teacher_width, student_width) and b (teacher_width,), one for all states or one per
    student state.

    Names are the official ones: ``fit_dense`` when shared (the released "v1" code),
    ``fit_denses.m`` for student state m otherwise ("v2"). ``states`` are the student states that a
    per-layer projection serves.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        states: Iterable[int] = (),
        *,
        shared: bool = True,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.student_width, self.teacher_width, self.shared = student_width, teacher_width, shared
        self.states = tuple(sorted(states))
        if shared:
            self.fit_dense = nn.Linear(student_width, teacher_width)
        else:
            if not self.states:
                raise ValueError(
                    "a projection per layer needs the student states it serves, got none"
                )
            self.fit_denses = nn.ModuleDict(
                {str(m): nn.Linear(student_width, teacher_width) for m in self.states}
            )
        for linear in self.linears():
            nn.init.normal_(linear.weight, std=std)  # as the official code starts every linear map
            nn.init.zeros_(linear.bias)

    def linears(self) -> list[nn.Linear]:
        return [self._linear(m) for m in (self.states if not self.shared else (0,))]

    def for_state(self, m: int) -> tuple[Tensor, Tensor]:
        """(weight, bias) that carry student state m to the teacher's width."""
        linear = self._linear(m)
        return linear.weight, linear.bias

    def _linear(self, m: int) -> nn.Linear:
        linear = self.fit_dense if self.shared else self.fit_denses[str(m)]
        assert isinstance(linear, nn.Linear)
        return linear

    @torch.no_grad()
    def start(self, weight: Tensor, bias: Tensor) -> HiddenProjection:
        """Start every map at (weight, bias)."""
        for linear in self.linears():
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        return self

    def save(self, folder: str | Path) -> Path:
        """Write ``projection.safetensors`` into ``folder``: whole or not at all."""
        from safetensors.torch import save

        path = Path(folder) / FILE_NAME
        atomic_write(path, save({k: t.cpu().contiguous() for k, t in self.state_dict().items()}))
        return path

    def load(self, folder: str | Path) -> HiddenProjection:
        """Take the values saved in ``folder``: our file, or an official checkpoint of either kind.

        A shared map serves every state of a per-layer projection; the other way round is refused.
        """
        found = _read(Path(folder))
        held = ", ".join(sorted(found))
        if self.shared and "fit_dense" not in found:
            raise ValueError(
                f"{folder} holds one projection per layer ({held}), but a shared one is wanted; "
                "ask for per-layer projections"
            )
        for m in (0,) if self.shared else self.states:
            values = found.get("fit_dense") or found.get(f"fit_denses.{m}")
            if values is None:
                raise ValueError(f"{folder} has no projection for student state {m}; it has {held}")
            linear, shape = self._linear(m), tuple(values["weight"].shape)
            if shape != tuple(linear.weight.shape):
                raise ValueError(
                    f"the projection in {folder} maps {shape[1]} -> {shape[0]} channels, and this "
                    f"student and teacher need {self.student_width} -> {self.teacher_width}; "
                    "it belongs to another pair of models"
                )
            with torch.no_grad():
                linear.weight.copy_(values["weight"])
                linear.bias.copy_(values["bias"])
        return self

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether ``folder`` holds a saved projection of any kind."""
        return (Path(folder) / FILE_NAME).is_file() or bool(_find(Path(folder)))


def _find(folder: Path) -> dict[str, dict[str, Tensor]]:
    """{"fit_dense" or "fit_denses.m": {"weight", "bias"}} from the first file in ``folder`` that
    has any.
    """
    for name in _FILES:
        path = folder / name
        if not path.is_file():
            continue
        tensors = _tensors(path)
        maps: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if match := _KEY.search(key):
                maps.setdefault(match[1], {})[match[3]] = value
        if maps:
            return maps
    return {}


def _read(folder: Path) -> dict[str, dict[str, Tensor]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to read a projection from")
    maps = _find(folder)
    if not maps:
        raise FileNotFoundError(
            f"{folder} holds no projection: expected {FILE_NAME}, or a checkpoint with fit_dense "
            "or fit_denses weights"
        )
    return maps


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file whose key names a projection (others stay on disk where the format
    allows).
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), framework="pt") as file:
                keys = [key for key in file.keys() if _KEY.search(key)]  # noqa: SIM118
                return {key: file.get_tensor(key) for key in keys}
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"cannot read {path} ({error}); the file is damaged or cut short, restore it"
        ) from error
