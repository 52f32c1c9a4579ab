"""Trained MLM and NSP heads, accelerated, beside Transformers' own forward; masked-token accuracy.

    pip install --no-deps rxnfp==0.1.0
    python benchmarks/real_heads.py [--folder FOLDER] [--json FILE]

The model is rxnfp's (Schwaller et al. 2021, MIT licence): BERT, 12 layers, 256 wide, pre-trained on
chemical reactions written as SMILES. Its files are read where its package installs them, which is
not imported. The reactions below are textbook ones, written for this script.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import BertForPreTraining, BertTokenizerFast

from tinybert_fast.benchmarks.hardware import facts
from tinybert_fast.data import PreTrainingCollator
from tinybert_fast.data.atomic import atomic_write
from tinybert_fast.integrations import accelerate

INSIDE = "models/transformers"
PRETRAINED = "bert_pretrained"
SEEDS = 8  # of masks
# An atom in brackets, one or two letters, a ring number, a bond or a separator is a token.
TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|>>|[A-Za-z0-9().=#+\\/:~@?>*$-]")
REACTIONS = """
CC(=O)O.OCC>>CC(=O)OCC
CC(=O)Cl.Nc1ccccc1>>CC(=O)Nc1ccccc1
O=C(O)c1ccccc1.CO>>COC(=O)c1ccccc1
Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1
CCBr.Oc1ccccc1>>CCOc1ccccc1
CC(C)=O.[BH4-].[Na+]>>CC(C)O
O=Cc1ccccc1.[BH4-].[Na+]>>OCc1ccccc1
O=[N+]([O-])c1ccccc1.[H][H]>>Nc1ccccc1
CC(=O)OC(C)=O.Oc1ccccc1>>CC(=O)Oc1ccccc1
CC(C)(C)OC(=O)NCc1ccccc1.O=C(O)C(F)(F)F>>NCc1ccccc1
CC(C)(C)OC(=O)OC(=O)OC(C)(C)C.NCc1ccccc1>>CC(C)(C)OC(=O)NCc1ccccc1
CS(=O)(=O)Cl.OCc1ccccc1>>CS(=O)(=O)OCc1ccccc1
Cc1ccc(S(=O)(=O)Cl)cc1.NCC>>CCNS(=O)(=O)c1ccc(C)cc1
COC(=O)c1ccccc1.[Na+].[OH-]>>O=C(O)c1ccccc1
CCOC(=O)CC.[Li+].[OH-]>>CCC(=O)O
O=C(O)c1ccccc1.O=S(Cl)Cl>>O=C(Cl)c1ccccc1
OCc1ccccc1.O=S(Cl)Cl>>ClCc1ccccc1
BrCc1ccccc1.[C-]#N.[Na+]>>N#CCc1ccccc1
Clc1ncccn1.NCC>>CCNc1ncccn1
Clc1ccnc2ccccc12.Nc1ccccc1>>c1ccc(Nc2ccnc3ccccc23)cc1
C=Cc1ccccc1.[H][H]>>CCc1ccccc1
C#Cc1ccccc1.Ic1ccccc1>>C(#Cc1ccccc1)c1ccccc1
Ic1ccc(C)cc1.OB(O)c1ccncc1>>Cc1ccc(-c2ccncc2)cc1
O=C1CCCCC1.[BH4-].[Na+]>>OC1CCCCC1
CNC.O=Cc1ccccc1>>CN(C)Cc1ccccc1
C1CCNCC1.O=C(Cl)c1ccccc1>>O=C(c1ccccc1)N1CCCCC1
C1COCCN1.ClCc1ccccc1>>c1ccc(CN2CCOCC2)cc1
CCN=C=O.Nc1ccccc1>>CCNC(=O)Nc1ccccc1
COc1ccccc1.BrB(Br)Br>>Oc1ccccc1
Oc1ccc(Cl)cc1.CI>>COc1ccc(Cl)cc1
CC(=O)c1ccccc1.[BH4-].[Na+]>>CC(O)c1ccccc1
O=C(Cl)CCl.Nc1ccc(F)cc1>>O=C(CCl)Nc1ccc(F)cc1
N#Cc1ccccc1.[H][H]>>NCc1ccccc1
Brc1ccncc1.OB(O)c1ccc(F)cc1>>Fc1ccc(-c2ccncc2)cc1
NCCO.O=C(O)c1ccc(Cl)cc1>>O=C(NCCO)c1ccc(Cl)cc1
CC(C)(C)[Si](C)(C)Cl.OCc1ccccc1>>CC(C)(C)[Si](C)(C)OCc1ccccc1
""".split()


def installed(name: str = PRETRAINED) -> Path | None:
    """The folder of one of its models, if the package is there."""
    spec = find_spec("rxnfp")
    places = [] if spec is None else spec.submodule_search_locations or []
    found = [Path(place, INSIDE, name) for place in places]
    return next((folder for folder in found if folder.is_dir()), None)


def measure(folder: Path) -> dict[str, Any]:
    """Accuracies of both models, and the largest differences of their logits on real tokens.

    Beside it stands how far Transformers' own fp32 logits are from its fp64 ones, and the
    difference of the two models in fp64.
    """
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=False)
    rows = []
    for number, reaction in enumerate(REACTIONS):
        tokens = TOKEN.findall(reaction)
        assert "".join(tokens) == reaction, reaction
        ids = tokenizer.convert_tokens_to_ids(["[CLS]", *tokens, "[SEP]"])
        rows.append({"input_ids": ids, "example_id": number})
    theirs: Any = BertForPreTraining.from_pretrained(folder).eval()
    ours = accelerate(copy.deepcopy(theirs))
    models = {"transformers": theirs, "ours": ours}
    exact: dict[str, Any] = {who: copy.deepcopy(one).double() for who, one in models.items()}
    apart = {"fp32": 0.0, "fp64": 0.0, "transformers_fp32_to_fp64": 0.0}
    right = {"transformers": 0, "ours": 0}
    masked, largest = 0, 0.0
    for seed in range(SEEDS):
        batch = PreTrainingCollator(tokenizer, seed=seed)(rows)
        places, labels = batch["masked_rows"], batch["masked_labels"]
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name] for name in names}
        with torch.no_grad():
            answers = {"transformers": theirs(**inputs), "ours": ours(**inputs)}
            wide = {name: model(**inputs) for name, model in exact.items()}
        for name, one, other in (
            ("fp32", answers["ours"], answers["transformers"]),
            ("fp64", wide["ours"], wide["transformers"]),
            ("transformers_fp32_to_fp64", answers["transformers"], wide["transformers"]),
        ):
            apart[name] = max(apart[name], _apart(one, other, inputs["attention_mask"].bool()))
        for who, answer in answers.items():
            best = answer.prediction_logits.flatten(0, 1)[places].argmax(-1)
            right[who] += int((best == labels).sum())
        masked += len(labels)
        largest = max(largest, answers["transformers"].prediction_logits.abs().max().item())
    return {
        "reactions": len(rows),
        "unknown_tokens": sum(row["input_ids"].count(tokenizer.unk_token_id) for row in rows),
        "masked_tokens": masked,
        "largest_logit": largest,
        "largest_difference": apart,
        "accuracy": {who: count / masked for who, count in right.items()},
    }


def _apart(one: Any, other: Any, real: torch.Tensor) -> float:
    """The largest difference of MLM logits of real tokens and NSP logits."""
    return max(
        (one.prediction_logits[real] - other.prediction_logits[real]).abs().max().item(),
        (one.seq_relationship_logits - other.seq_relationship_logits).abs().max().item(),
    )


def main() -> None:
    """Print what was measured as JSON, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=installed(), help="of the model's files")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.folder is None:
        parser.error("rxnfp is not installed: pip install --no-deps rxnfp==0.1.0")
    result = {**measure(given.folder), "machine": facts(torch.device("cpu"))}
    print(json.dumps(result, indent=2))
    if given.json is not None:
        atomic_write(given.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
