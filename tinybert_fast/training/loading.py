"""Tokenizers and classification models from a folder, with errors that say what is wrong."""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
)
from transformers.utils import logging as transformers_logging

from tinybert_fast.integrations.tinybert import with_pooled_relu

if TYPE_CHECKING:
    from tinybert_fast.data import Task  # whose module needs `datasets`

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
# What stands for an Auto class where a config.json is too old to name its kind of model.
BERT: dict[type, type] = {
    AutoConfig: BertConfig,
    AutoModel: BertModel,
    AutoModelForSequenceClassification: BertForSequenceClassification,
    AutoTokenizer: BertTokenizer,
}
OF_BERT = {"num_hidden_layers", "type_vocab_size"}  # fields of such a config
OFFICIAL = "fit_dense"  # what only the TinyBERT authors' classes keep among their weights
DESCRIPTIONS = ("tokenizer.json", "tokenizer_config.json", "config.json")


def check_model_path(path: str | Path) -> str:
    """The path as a string; FileNotFoundError if no model folder is there.

    `owner/name` where no folder `owner` exists is left to the Hugging Face hub.
    """
    folder = Path(path)
    if (folder / "config.json").exists():
        return str(path)
    if folder.is_dir():
        raise FileNotFoundError(f"{path} has no config.json; expected a Transformers model folder")
    parts = str(path).split("/")
    if len(parts) == 2 and parts[0] not in ("", ".", "..", "~") and not folder.parent.exists():
        return str(path)
    raise FileNotFoundError(f"{path} is no folder; expected a Transformers model folder")


def load_config(path: str | Path):
    return _load(AutoConfig, path)


def load_bert_config(path: str | Path) -> BertConfig:
    """ValueError for another architecture."""
    return check_bert(path, load_config(path))


def check_bert(path: str | Path, config):
    """``config``, which is of ``path``; ValueError for another architecture."""
    if config.model_type != "bert":
        raise ValueError(f"{path} is a {config.model_type} model; expected BERT")
    return config


def check_accelerates(path: str | Path, config) -> None:
    """ValueError for a model that has no packed encoder."""
    if config.model_type != "bert":
        raise ValueError(
            f"{path} is a {config.model_type} model, and only BERTs are accelerated; run it as "
            "Transformers does: --plain, or accelerate=False"
        )


def load_tokenizer(path: str | Path, config=None):
    """Of a model folder, or one that holds a tokenizer alone. ``config``: of the model that reads
    its ids, and has to have them all.
    """
    if has_tokenizer(path) and not any((Path(path) / name).exists() for name in DESCRIPTIONS):
        raise ValueError(
            f"{path} holds vocab.txt alone, which does not say whether case counts; put a file "
            'tokenizer_config.json beside it: {"tokenizer_class": "BertTokenizer", '
            '"do_lower_case": true} or false'
        )
    tokenizer = _load(AutoTokenizer, path, alone=has_tokenizer(path))
    if len(tokenizer) == len(tokenizer.all_special_ids):  # what Transformers makes of no file
        raise ValueError(
            f"{path} holds no tokenizer (tokenizer.json or vocab.txt); save there the one that the "
            "model was trained with"
        )
    if config is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the model of {path} knows {config.vocab_size} word pieces and the tokenizer has "
            f"{len(tokenizer)}; they need one vocabulary"
        )
    return tokenizer


def has_tokenizer(path: str | Path) -> bool:
    return any((Path(path) / name).exists() for name in TOKENIZER_FILES)


def load_classifier(path: str | Path, task: "Task | None" = None):
    """AutoModelForSequenceClassification. With a task: its label names, and a new head where the
    old does not fit.

    Refuses a folder whose encoder weights are missing or have other shapes than its config says. A
    trained head beside ``fit_dense`` weights is of the TinyBERT authors' class, whose ReLU it gets
    (``pooled_relu`` in its config, which decides where it is).
    """
    fields = {} if task is None else task.config_fields()
    model, info = _load(
        AutoModelForSequenceClassification,
        path,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.float32,  # what trains is fp32 whatever was saved: small updates round away
        **fields,
    )
    other = {entry[0] for entry in info["mismatched_keys"]}  # of another shape
    new = {*info["missing_keys"], *other}
    head = tuple(
        name
        for name, _ in model.named_parameters()
        if not name.startswith(f"{model.base_model_prefix}.")
    )
    _refuse_lost(path, (name for name in new if name not in head))
    if new and task is None:
        raise ValueError(f"{path} has no trained classification head; fine-tune it first")
    if other:
        log.warning("the head of %s is for other classes; a new one takes its place", path)
    if not new and any(name.startswith(OFFICIAL) for name in info["unexpected_keys"]):
        model.config.pooled_relu = getattr(model.config, "pooled_relu", True)
    return with_pooled_relu(model)


def load_encoder(path: str | Path):
    """AutoModel: the encoder alone, whatever heads were saved with it. A pooler may be missing."""
    model, info = _load(AutoModel, path, output_loading_info=True, dtype=torch.float32)
    _refuse_lost(path, info["missing_keys"])
    return model


def load_pretraining(path: str | Path) -> tuple[BertForPreTraining, tuple[str, ...]]:
    """BertForPreTraining from any BERT folder, and the names of weights that the folder lacks: a
    head or the pooler starts anew.
    """
    model, info = _load(BertForPreTraining, path, output_loading_info=True, dtype=torch.float32)
    _refuse_lost(path, (name for name in info["missing_keys"] if name.startswith("bert.")))
    return model, tuple(sorted(info["missing_keys"]))


def load_saved(path: str | Path):
    """The model as it was saved, heads included: of the class that its configuration names."""
    name = (load_config(path).architectures or ["AutoModel"])[0]
    if not hasattr(transformers, name):
        raise ValueError(f"{path} was saved by {name}, which is not a class of Transformers")
    model, info = _load(
        getattr(transformers, name), path, output_loading_info=True, dtype=torch.float32
    )
    _refuse_lost(path, info["missing_keys"])
    return with_pooled_relu(model)


def _refuse_lost(path: str | Path, names: Iterable[str]) -> None:
    """ValueError for weights that new ones would stand in for. A pooler may be among them: encoders
    trained with the MLM loss alone have none.
    """
    lost = sorted(name for name in names if "pooler" not in name.split("."))
    if lost:
        raise ValueError(
            f"{path} does not hold the weights its config.json asks for: "
            f"{len(lost)} are missing or have another shape, {lost[0]} among them"
        )


def _load(auto, path: str | Path, *, alone: bool = False, **options):
    name = str(path) if alone else check_model_path(path)
    try:
        if auto in BERT and _is_old_bert(Path(name) / "config.json"):
            auto = BERT[auto]
        with quiet():
            loaded = auto.from_pretrained(name, **options)
    except SafetensorError as error:
        raise ValueError(f"{path}: a weight file is truncated or damaged ({error})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: a JSON file is damaged ({error})") from None
    except OSError as error:
        kind = ValueError if Path(name).is_dir() else FileNotFoundError
        raise kind(f"{path} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    # Old names of weights that Transformers would bring back in save_pretrained.
    (loaded[0] if isinstance(loaded, tuple) else loaded).__dict__.pop("_weight_conversions", None)
    return loaded


def _is_old_bert(config: Path) -> bool:
    """Whether a BERT was saved before configs had a ``model_type``."""
    if not config.is_file():
        return False
    fields = json.loads(config.read_text(encoding="utf-8"))
    return "model_type" not in fields and fields.keys() >= OF_BERT


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its own progress bars and load reports: what matters is checked here."""
    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
