"""Launch settings of the attention kernels, and the file of one's own that holds some.

The file is JSON: the name of a GPU, as PyTorch gives it -> a list of entries, each of which
replaces the one of the built-in table (configs.py) that has the same key. `tinybert-fast bench
--tune` writes it to ~/.config/tinybert_fast/settings.json, or where TINYBERT_FAST_SETTINGS says.
"""

import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

# Of every kernel: a * b + c is rounded once, as in its reports and timings. Triton's own default
# will change, and 3.9 warns of it where nothing is said.
COMPILED = {"enable_fp_fusion": True}


class Setting(NamedTuple):
    """A tile of scores (BLOCK_M queries, BLOCK_N keys) and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    heads_each: int = 1  # that a program of the one-tile kernel walks, where they are many enough

    def launch(self) -> dict[str, int]:
        """As a kernel's keyword arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **COMPILED,
        }


KERNELS = (  # for every length
    "forward", "dq", "dkdv", "gram", "direct", "relation_statistics", "relation_gradient",
)  # fmt: skip
IN_ONE_TILE = ("one_tile", "relation_one_tile")  # where that holds all scores of a head


class Key(NamedTuple):
    """What a table has an entry for."""

    kernel: str  # of KERNELS or IN_ONE_TILE
    head: int  # width of the tile that holds a head
    dtype: torch.dtype
    dropout: bool
    pattern: str = "all"  # or "direction" (causal, anti-causal) or "blocks" (a block mask)


# An entry says which setting serves up to which length. One that no length fits has no such kernel.
Table = dict[Key, dict[int, Setting]]

ANY = 1 << 31  # longer than every sequence
VARIABLE = "TINYBERT_FAST_SETTINGS"  # names a file of one's own


def file() -> Path:
    """Where one's own settings are."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get(VARIABLE) or home / "tinybert_fast" / "settings.json")


def own(gpu: str) -> Table:
    """What the file holds for a GPU of this name; ValueError if it cannot be read, and a warning if
    TINYBERT_FAST_SETTINGS names none.
    """
    source = file()
    if not source.exists():
        if os.environ.get(VARIABLE):
            warnings.warn(
                f"{VARIABLE}={source} is no file: the built-in launch settings are in force. Name "
                "one that is, unset the variable, or write it with: tinybert-fast bench --tune",
                stacklevel=2,
            )
        return {}
    try:
        return table_of(json.loads(source.read_text(encoding="utf-8")).get(gpu, []))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source} is no table of launch settings ({type(error).__name__}: {error}); delete "
            "it, then write it anew with: tinybert-fast bench --tune"
        ) from error


def table_of(entries: list[dict]) -> Table:
    """The entries of a file; the reverse of entries_of. ValueError for one that cannot run."""
    table = {
        Key(e["kernel"], e["head"], getattr(torch, e["dtype"]), e["dropout"], e["pattern"]): {
            ANY if longest == "any" else int(longest): Setting(*setting)
            for longest, setting in e["settings"].items()
        }
        for e in entries
    }
    for key, by_length in table.items():
        _check(key, by_length)
    return table


def _check(key: Key, by_length: dict[int, Setting]) -> None:
    one_tile = key.kernel in IN_ONE_TILE
    if not one_tile and key.kernel not in KERNELS:
        raise ValueError(f"{key}: no such kernel; there are {', '.join((*KERNELS, *IN_ONE_TILE))}")
    if not one_tile and ANY not in by_length:
        raise ValueError(f"{key} has no setting for any length")
    for longest, setting in by_length.items():
        sizes = setting[:2]
        smallest = 16 if key.kernel == "gram" else 32
        largest = 64 if key.pattern == "blocks" else 128  # the smallest block of a mask; a tile
        if any(n not in (16, 32, 64, 128) or not smallest <= n <= largest for n in sizes):
            raise ValueError(f"{key}: tile {sizes} must be powers of 2 in {smallest}..{largest}")
        if setting.heads_each < 1 or (setting.heads_each > 1 and key.kernel != "one_tile"):
            raise ValueError(f"{key}: one program cannot walk {setting.heads_each} heads")
        if one_tile and (key.pattern == "blocks" or longest > min(sizes)):
            raise ValueError(f"{key}: one tile of {sizes} cannot hold a mask, or {longest} tokens")


def entries_of(table: Table) -> list[dict]:
    """A table as JSON holds it."""
    return [
        {
            **key._asdict(),
            "dtype": str(key.dtype).removeprefix("torch."),
            "settings": {
                "any" if longest == ANY else str(longest): list(setting)
                for longest, setting in by_length.items()
            },
        }
        for key, by_length in table.items()
    ]
