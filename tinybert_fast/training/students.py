"""Which student a run trains: a preset, a config or a saved model, checked against its teacher."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import BertConfig, BertForSequenceClassification, BertModel, set_seed

from tinybert_fast.data import Task
from tinybert_fast.integrations import TinyBertConfig
from tinybert_fast.training.initialise import How, initialise_student
from tinybert_fast.training.loading import (
    check_bert,
    check_model_path,
    has_tokenizer,
    load_bert_config,
    load_classifier,
    load_encoder,
    load_tokenizer,
)
from tinybert_fast.training.objectives import Matches
from tinybert_fast.training.projection import HiddenProjection

PRESETS: dict[str, Callable[..., BertConfig]] = {
    "4l-312": TinyBertConfig.tiny_4l_312,
    "6l-768": TinyBertConfig.tiny_6l_768,
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Student:
    """Where a student comes from: a config to be filled with new weights, or a saved model."""

    config: BertConfig
    folder: str | None = None  # None: new weights
    name: str = "config"

    @classmethod
    def of(cls, student: "str | Path | BertConfig", teacher: BertConfig) -> "Student":
        """``student``: a preset (4l-312, 6l-768), a BertConfig, its .json file, or a model folder.

        A preset takes vocabulary, positions and segments from the teacher.
        """
        if isinstance(student, BertConfig):
            return cls(copy.deepcopy(student))
        path = Path(student)
        key = str(student).lower().replace("_", "-").removeprefix("tiny-")
        if key in PRESETS and not path.exists():
            shared = ("vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id")
            return cls(PRESETS[key](**{k: getattr(teacher, k) for k in shared}), name=key)
        if path.suffix == ".json" and path.is_file():
            return cls(_read_config(path), name=str(path))
        weightless = path.is_dir() and not any((path / name).exists() for name in WEIGHTS)
        if weightless and (path / "config.json").is_file():
            return cls(_read_config(path / "config.json"), name=str(path))
        if not path.exists() and len(path.parts) == 1:
            raise FileNotFoundError(
                f"no student or model {student}; expected one of {', '.join(PRESETS)}, "
                "a config.json, or a folder with a saved model"
            )
        check_model_path(student)
        return cls(load_bert_config(student), folder=str(student), name=str(student))

    def check(self, teacher_path: str | Path, teacher: BertConfig, tokenizer: Any) -> None:
        """Refuse what cannot learn from this teacher: another vocabulary."""
        remedy = (
            "Both must read the same word pieces: give the student the teacher's vocabulary "
            "(start it from a preset, or from general distillation of this teacher)"
        )
        ours, theirs = self.config.vocab_size, teacher.vocab_size
        if ours != theirs:
            raise ValueError(
                f"the student {self.name} has {ours} word pieces and the teacher {teacher_path} "
                f"has {theirs}. {remedy}"
            )
        if self.folder is None or not has_tokenizer(self.folder):
            return
        ours, theirs = load_tokenizer(self.folder).get_vocab(), tokenizer.get_vocab()
        if ours != theirs:
            word, at = min(set(ours.items()) ^ set(theirs.items()), key=lambda item: item[1])
            raise ValueError(
                f"the student {self.name} and the teacher {teacher_path} have different "
                f"vocabularies ({len(ours)} and {len(theirs)} word pieces; {word!r} is "
                f"{_id(ours, word)} in the student and {_id(theirs, word)} in the teacher; the "
                f"first difference is at id {at}). {remedy}"
            )

    def build(
        self,
        teacher: Any,
        matches: Matches,
        *,
        task: Task | None = None,
        init: How | None = None,
        shared: bool = True,
        seed: int = 0,
    ) -> tuple[Any, HiddenProjection | None]:
        """The model (an encoder, or a classifier for ``task``) and the projection it starts with,
        if ``matches`` has one.

        ``init`` is for new weights only. A saved student goes on with the projection saved beside
        it, if there is one.
        """
        set_seed(seed)
        if self.folder is None:
            config = copy.deepcopy(self.config)
            for field, value in (task.config_fields() if task else {}).items():
                setattr(config, field, value)
            model = BertForSequenceClassification(config) if task else BertModel(config)
            projection = initialise_student(
                model, teacher, init or "random", matches=matches, shared=shared
            )
            return model, projection
        if init is not None:
            raise ValueError(
                f"init={init!r} is for new students, but {self.name} holds trained weights; "
                "leave init out, or start from a preset or a config"
            )
        model = load_classifier(self.folder, task) if task else load_encoder(self.folder)
        projection = matches.new_projection(self.config, teacher.config, shared=shared)
        if projection is not None and HiddenProjection.exists(self.folder):
            projection.load(self.folder)
        return model, projection


def _read_config(path: Path) -> BertConfig:
    try:
        config = BertConfig.from_json_file(path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no BERT config ({error})") from None
    return check_bert(path, config)


def _id(vocabulary: dict[str, int], word: str) -> str:
    return str(vocabulary[word]) if word in vocabulary else "absent"
