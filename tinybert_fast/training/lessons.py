"""A teacher's lessons on disk: what it says of each example of a data set, asked once.

    lessons.json            what they were made from, the tensors, the files and their sizes
    index.safetensors       of each example: shard int32, row int64, rows int32; each (E,)
    00000.safetensors ...   tensors (R, ...): the rows of a shard's examples, one behind the other

An example has a row for each of its tokens (``hidden.m``, ``queries.m``, ``keys.m``: whatever a
Capture records, without padding), or one row (``logits``). Shards are mapped, not read, so examples
come in any order and what is not in memory is fetched from the disk.

What the losses on layers read of BERT-base is 40 kB a token in fp32 (4L-312, uniform matches), half
of that in bf16. A student on a CPU learns from some thousands of tokens a second, so a disk or
memory keeps up. On a GPU it learns from millions, tens of GB a second: more than one thread copies,
or all that PCIe carries, so that asking the live teacher is expected to be faster. Logits are a few
bytes for each example and pay anywhere.

The teacher is asked longest examples first, in batches of nearly equal lengths. What it says of an
example does not depend on its batch but for rounding: matrix products may sum in another order for
another number of rows. Where they do not (CPUs that this was tried on, fp32 and int8), a lesson has
the bits of the live teacher's.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tinybert_fast.data.atomic import (
    atomic_write,
    partials,
    remove_leftovers,
    replacing_folder,
)
from tinybert_fast.data.progress import shown
from tinybert_fast.modules.capture import Capture
from tinybert_fast.ops.layout import SequenceLayout

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, INDEX = "lessons.json", "index.safetensors"
LOGITS = "logits"
SHARD_BYTES = 1 << 29  # held in memory until they are written
RECORDS = tuple(field.name for field in fields(Capture) if field.default_factory is dict)
CACHE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Lesson = Capture | Tensor
Batch = dict[str, Any]


class Kept(NamedTuple):
    """A tensor of the cache: what one row is, as it is stored and as the teacher computed it."""

    shape: tuple[int, ...]
    stored: torch.dtype
    computed: torch.dtype

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.stored.itemsize


@dataclass(frozen=True)
class LessonCache:
    """Opened by `open` or `build`; ``lesson`` gives what the live teacher would."""

    folder: Path
    kept: Mapping[str, Kept]
    index: Mapping[str, Tensor]
    shards: list[dict[str, Tensor]]  # mapped

    @classmethod
    def open(cls, folder: str | Path, made_from: Mapping[str, Any]) -> LessonCache:
        """The lessons in ``folder``.

        Raises:
            FileNotFoundError: there are none. ValueError: they were made from something else than
                ``made_from`` (JSON values by name; the message says which), or are not whole.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"no lessons of a teacher in {folder}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{folder / MANIFEST} is damaged ({error}); {_remedy(folder)}"
            ) from None
        old, new = manifest["made_from"], _as_json({"format": FORMAT, **made_from})
        changed = [
            f"{name.replace('_', ' ')} was {old.get(name)!r}, now {new.get(name)!r}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise ValueError(
                f"the lessons in {folder} were made from something else ({'; '.join(changed)}); "
                f"{_remedy(folder)}"
            )
        for name, size in manifest["files"].items():
            file = folder / name
            found = file.stat().st_size if file.is_file() else 0
            if found != size:
                raise ValueError(
                    f"{file} has {found} bytes and should have {size}: the lessons are cut short; "
                    f"{_remedy(folder)}"
                )
        kept = {
            name: Kept(tuple(shape), getattr(torch, stored), getattr(torch, computed))
            for name, (shape, stored, computed) in manifest["kept"].items()
        }
        index, *shards = (_mapped(folder / name) for name in manifest["files"])
        return cls(folder, kept, index, shards)

    @classmethod
    def found(cls, folder: str | Path, made_from: Mapping[str, Any]) -> LessonCache | None:
        """`open`, or None where there are none."""
        return cls.open(folder, made_from) if (Path(folder) / MANIFEST).exists() else None

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teach: Callable[[Batch], Lesson],
        examples: Any,
        collate: Callable[[list[Any]], Batch],
        made_from: Mapping[str, Any],
        *,
        batch_size: int,
        dtype: str | None = None,
        progress: bool = False,
    ) -> LessonCache:
        """Ask the teacher about every example and keep what it says: a whole folder or none.

        ``teach``: of a batch that ``collate`` made of rows of ``examples`` (a Dataset with the
        column ``length``) to states or logits. ``dtype``: fp32, fp16 or bf16, to keep them in; by
        default that of the teacher's answer.

        Raises:
            ValueError: an unknown dtype; more bytes than the disk has free, before anything is
                written; numbers beyond the range of ``dtype``. FileExistsError: something else is
                in ``folder``.
        """
        folder = Path(folder)
        if dtype is not None:
            check_cache_dtype(dtype)
        lengths = np.asarray(examples["length"])
        order = np.argsort(-lengths, kind="stable")
        asked = _Asked(
            teach, examples, collate, lengths, None if dtype is None else CACHE_DTYPES[dtype]
        )
        first, _ = asked.rows(order[:1])  # the longest: what fits it fits all
        kept = {
            name: Kept(tuple(rows.shape[1:]), asked.stored(rows), rows.dtype)
            for name, rows in first.items()
        }
        rows_of = np.ones_like(lengths) if LOGITS in kept else lengths
        size = int(rows_of.sum()) * sum(one.row_bytes for one in kept.values())
        _check_room(folder, size)
        log.log(
            logging.WARNING if progress else logging.INFO,
            "asking the teacher about %s examples once: %s in %s",
            f"{len(lengths):,}", in_words(size), folder,
        )  # fmt: skip
        index: dict[str, np.ndarray] = {
            "shard": np.zeros(len(order), np.int32),
            "row": np.zeros(len(order), np.int64),
            "rows": rows_of.astype(np.int32),
        }
        with replacing_folder(folder) as partial:
            writer = _Writer(partial)
            starts = range(0, len(order), batch_size)
            for start in shown(starts, "asking the teacher", len(starts), progress):
                some = order[start : start + batch_size]
                rows, counts = asked.rows(some)
                index["shard"][some] = writer.shard
                index["row"][some] = writer.rows + np.cumsum(counts) - counts
                writer.add({name: asked.narrow(name, x) for name, x in rows.items()}, sum(counts))
            writer.flush()
            save_file({k: torch.from_numpy(v) for k, v in index.items()}, partial / INDEX)
            names = (INDEX, *writer.names)
            manifest = {
                "made_from": _as_json({"format": FORMAT, **made_from}),
                "kept": {
                    name: (one.shape, _word(one.stored), _word(one.computed))
                    for name, one in kept.items()
                },
                "files": {name: (partial / name).stat().st_size for name in names},
            }
            atomic_write(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        return cls.open(folder, made_from)

    def lesson(
        self,
        examples: Sequence[int],
        layout: SequenceLayout | None = None,
        device: torch.device | str = "cpu",
    ) -> Lesson:
        """What the teacher said of these examples, in the dtypes it computed in: a Capture of
        packed rows under ``layout`` (made here if not given), or logits (B, K).
        """
        if layout is None:
            lengths = self.index["rows"][torch.as_tensor(examples, dtype=torch.int64)].tolist()
            layout = SequenceLayout.from_lengths(lengths, device=device)
        return as_lesson(self.rows(examples, layout.lengths, device), layout)

    def rows(
        self,
        examples: Sequence[int],
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """The tensors of `lesson` by name, for texts of these lengths."""
        where = torch.as_tensor(examples, dtype=torch.int64)
        shards, starts, counts = (self.index[k][where].tolist() for k in ("shard", "row", "rows"))
        found = {}
        for name, one in self.kept.items():
            parts = [
                self.shards[shard][name][start : start + count]
                for shard, start, count in zip(shards, starts, counts)
            ]
            found[name] = torch.cat(parts).to(device).to(one.computed)  # widened behind the copy
        if LOGITS not in found and list(lengths) != counts:
            at = next(i for i, (a, b) in enumerate(zip(lengths, counts, strict=True)) if a != b)
            raise ValueError(
                f"example {examples[at]} has {lengths[at]} tokens in the batch and {counts[at]} in "
                f"the lessons in {self.folder}; give the lessons of this data set"
            )
        return found


def as_lesson(found: Mapping[str, Tensor], layout: SequenceLayout | None) -> Lesson:
    """Of tensors by name, in whose rows the tokens are as ``layout`` says."""
    if LOGITS in found:
        return found[LOGITS]
    capture = Capture()
    capture.layout = layout
    for name, rows in found.items():
        kind, m = name.split(".")
        getattr(capture, kind)[int(m)] = rows
    return capture


@dataclass
class _Asked:
    """The teacher's answers as rows of examples without padding."""

    teach: Callable[[Batch], Lesson]
    examples: Any
    collate: Callable[[list[Any]], Batch]
    lengths: np.ndarray
    dtype: torch.dtype | None

    def rows(self, numbers: np.ndarray) -> tuple[dict[str, Tensor], list[int]]:
        """{name: (R, ...)} of some examples, and how many rows each has."""
        said = self.teach(self.collate(self.examples.__getitems__(numbers.tolist())))
        if isinstance(said, Tensor):
            return {LOGITS: said}, [1] * len(said)
        counts = self.lengths[numbers].tolist()
        tensors = {f"{kind}.{m}": x for kind in RECORDS for m, x in getattr(said, kind).items()}
        if said.layout is None:  # recorded padded
            width = next(iter(tensors.values())).shape[1]
            layout = SequenceLayout.from_lengths(counts, width)
            tensors = {name: layout.pack(x.cpu()) for name, x in tensors.items()}
        return tensors, counts

    def stored(self, rows: Tensor) -> torch.dtype:
        return self.dtype or rows.dtype

    def narrow(self, name: str, rows: Tensor) -> Tensor:
        narrow = rows.to(self.stored(rows))
        if narrow.dtype != rows.dtype and not narrow.isfinite().all():
            raise ValueError(
                f"the teacher's {name} holds {rows.abs().max():.4g}, more than fp16 can; keep its "
                "lessons in bf16"
            )
        return narrow.cpu().contiguous()


class _Writer:
    """Rows to files of about SHARD_BYTES; no batch is split."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names = folder, list[str]()
        self.rows, self._bytes, self._held = 0, 0, list[dict[str, Tensor]]()

    @property
    def shard(self) -> int:
        return len(self.names)

    def add(self, tensors: dict[str, Tensor], rows: int) -> None:
        self._held.append(tensors)
        self.rows += rows
        self._bytes += sum(x.nbytes for x in tensors.values())
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._held:
            whole = {name: torch.cat([one[name] for one in self._held]) for name in self._held[0]}
            name = f"{self.shard:05d}.safetensors"
            save_file(whole, self.folder / name)
            self.names.append(name)
            self.rows, self._bytes, self._held = 0, 0, []


def check_cache_dtype(dtype: str) -> None:
    if dtype not in CACHE_DTYPES:
        raise ValueError(f"cache_dtype is {dtype!r}; expected one of {', '.join(CACHE_DTYPES)}")


def in_words(size: float) -> str:
    """Bytes for a human: 1.5 GB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    at = min(len(units) - 1, int(np.log10(max(size, 1))) // 3)
    return f"{size / 1000**at:.3g} {units[at]}"


def _check_room(folder: Path, size: int) -> None:
    folder = folder.resolve()
    remove_leftovers(folder.parent)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if size > free:
        begun = "".join(
            f" ({path} is of a run that goes on, or was killed on another machine: then remove it)"
            for path in partials(folder.parent)
        )
        raise ValueError(
            f"the teacher's lessons would take {in_words(size)} and {folder} has {in_words(free)} "
            f"free; make room{begun}, name another folder (--cache-folder), keep them in fp16 "
            "(--cache-dtype), or leave the cache out"
        )


def _mapped(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); {_remedy(file.parent)}") from None


def _remedy(folder: Path) -> str:
    return f"remove {folder} to have them made again, or name another folder"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))
