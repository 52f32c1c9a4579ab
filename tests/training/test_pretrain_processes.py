"""Pre-training in two gloo processes: the steps of one, a kill and a resume, what ends both."""

import json
import os
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tinybert_fast.data import Corpus
from tinybert_fast.training import pretrain as recipe
from tinybert_fast.training.pretraining import PreTrainingTrainer
from tinybert_fast.training.recipes import Masking

GLOBAL_BATCH = 16
CASES = {
    "uniform": {"accumulation": 2, "duplicates": 3},  # three shards for two processes
    "reverse": {"bidirectional": "reverse"},
    "causal": {"bidirectional": "causal", "nsp": False},
    "loss": {"masking": Masking(weights="loss")},
    "pairs": {"mlm": False},
    # 106 examples: the last step of an epoch is incomplete, of how many batches it may be made.
    "epoch": {"steps": None, "epochs": 1.0, "accumulation": 2},
    "fsdp": {"masking": Masking(0.3, 0.1, "linear", weights="loss")},
}
DEADLINE = 60.0  # seconds in which a process has to notice that the other one is gone
DIED, ENDED, DTYPES = "died", "ended", "dtypes"

# ---- in the processes ----------------------------------------------------------------------------


class AtStep2(TrainerCallback):
    """Before its weights change; there is a checkpoint of step 2."""

    def __init__(self, do) -> None:
        self.do = do

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.do(args.process_index)


@contextmanager
def sharding_on_cpu():
    """accelerate shards on GPUs alone; torch also does on gloo."""
    start = AcceleratorState.__init__

    def begin(state, *given, fsdp_plugin=None, **options):
        start(state, *given, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            state.fsdp_plugin = fsdp_plugin
            if state.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(state.mixed_precision)
            state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", begin)
        patch.setattr(recipe, "SHARDED_ON", ("cpu",))
        patch.setenv("ACCELERATE_USE_FSDP", "false")  # accelerate sets it, for later runs too
        yield


class Sharded(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert all(isinstance(p, DTensor) for p in model.parameters())


def train(case: str, text: Path, output: Path, ranks: int, corpus=None, folder=None, **more):
    options = {"steps": 3, "accumulation": 1, **CASES[case], **more}
    if case == "epoch" and ranks == 1:
        options["accumulation"] = 1
    sharded = case == "fsdp" and ranks > 1
    if sharded:
        options["callbacks"] = [Sharded(), *options.get("callbacks", ())]
    with sharding_on_cpu() if sharded else nullcontext():
        recipe.pretrain(
            corpus or Corpus.of(text / "text", documents="files"),
            output / (folder or case),
            model=text / "config.json",
            data=output / "data",
            held_out=0.2,
            max_length=32,
            batch_size=GLOBAL_BATCH // ranks // options["accumulation"],
            lr=3e-3,
            log_steps=1,
            eval_steps=3,
            checkpoint_steps=2,
            progress=False,
            fsdp=sharded,
            **options,
        )


class Stop(Exception):
    pass


def one(text: str, output: str) -> None:
    for case in CASES:
        train(case, Path(text), Path(output), 1)

    def stop(rank: int) -> None:
        raise Stop

    where = (Path(text), Path(output).parent / "moved", 1)
    with pytest.raises(Stop):
        train("uniform", *where, callbacks=[AtStep2(stop)])


def interrupted(text: str, output: str) -> None:
    def stop(rank: int) -> None:
        raise Stop

    where = (Path(text), Path(output), 2)
    with pytest.raises(Stop):
        train("loss", *where, folder="loss again", callbacks=[AtStep2(stop)])
    kill = AtStep2(lambda rank: os.kill(os.getpid(), signal.SIGKILL))
    train("fsdp", *where, folder="fsdp again", callbacks=[kill])


def two(text: str, output: str) -> None:
    where = (Path(text), Path(output), 2)
    for case in CASES:
        train(case, *where)
    for case in ("loss", "fsdp"):
        train(case, *where, folder=f"{case} again", resume=True)
    train("uniform", Path(text), Path(output).parent / "moved", 2, resume=True)
    in_bf16(*where)
    disagree(*where)
    die(*where)


def in_bf16(text: Path, output: Path, ranks: int) -> None:
    """The dtypes of what processes add up: losses, right answers and answers."""
    dtypes, reduce = set(), PreTrainingTrainer._over_processes

    def watched(trainer, x):
        dtypes.add(str(x.dtype))
        return reduce(trainer, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainingTrainer, "_over_processes", watched)
        train("fsdp", text, output, ranks, folder="bf16", bf16=True)
    (output / DTYPES).write_text(" ".join(sorted(dtypes)))


def disagree(text: Path, output: Path, ranks: int) -> None:
    """What each process says where they have different text, or different shards of it."""
    rank = int(os.environ["RANK"])
    corpus = Corpus.of(sorted((text / "text").glob("*.txt"))[rank:], documents="files")
    with pytest.raises(ValueError) as by_text:
        train("uniform", text, output, ranks, corpus=corpus, folder="disagreed")
    shards_of = recipe.shards_of

    def fewer(*given, **options):
        shards = shards_of(*given, **options)
        return shards._replace(examples=shards.examples.select(range(rank, len(shards.examples))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "shards_of", fewer)
        with pytest.raises(ValueError) as by_shards:
            train("uniform", text, output, ranks, folder="disagreed")
    said = [str(caught.value) for caught in (by_text, by_shards)]
    (output / f"said-{rank}").write_text(json.dumps(said))


def die(text: Path, output: Path, ranks: int) -> None:
    def leave(rank: int) -> None:
        if rank == 1:
            (output / DIED).write_text(str(time.time()))
            os._exit(7)

    try:
        train("uniform", text, output, ranks, folder="dead", callbacks=[AtStep2(leave)])
    finally:
        (output / ENDED).write_text(str(time.time()))


# ---- what came of it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory, apart, ranks_of):
    """A folder with one/ and two/, runs of one process and of two; how the last two ended."""
    folder = tmp_path_factory.mktemp("processes")
    alone = ("one", [str(text), str(folder / "one")], {})
    ended = apart(
        __file__,
        [*ranks_of("interrupted", text, folder / "two"), alone],
        ranks_of("two", text, folder / "two"),
    )
    for process, code in zip(ended, (-9, -9, 0, 1, 7), strict=True):
        assert process.code == code, process.errors
    return folder, ended[3:]


def weights_of(folder: Path):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(trained, case):
    """The same losses, held-out scores and weights at the same global batch, dropout 0."""
    folders = [trained[0] / ranks / case for ranks in ("one", "two")]
    one, two = map(weights_of, folders)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=name)
    before, after = (json.loads((folder / "metrics.json").read_text()) for folder in folders)
    assert after["steps"] == before["steps"] == (6 if case == "epoch" else 3)
    assert after["held_out"] == pytest.approx(before["held_out"], abs=1e-5)
    for term, values in before["losses"].items():
        assert after["losses"][term] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("case", ["loss", "fsdp"])
def test_two_processes_resume(trained, case):
    """After an error, and a sharded model after kill -9: the same bits."""
    whole, resumed = (weights_of(trained[0] / "two" / name) for name in (case, f"{case} again"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_processes_go_on_with_the_run_of_one(trained):
    whole, moved = (weights_of(trained[0] / name / "uniform") for name in ("one", "moved"))
    for name in whole:
        torch.testing.assert_close(moved[name], whole[name], atol=1e-5, rtol=0, msg=name)
    run = json.loads((trained[0] / "moved" / "uniform" / "run.json").read_text())
    assert run["processes"] == [1, 2]


def test_sharding_rounds_no_sum(trained):
    assert (trained[0] / "two" / DTYPES).read_text() == "torch.float32 torch.float64 torch.int64"


def test_processes_that_read_different_things_say_so(trained):
    for rank in range(2):
        by_text, by_shards = json.loads((trained[0] / "two" / f"said-{rank}").read_text())
        assert by_text.startswith("the processes of this run disagree (train_text is ")
        assert "examples of train is 319 in process 0, 318 in process 1" in by_shards
    assert not (trained[0] / "two" / "disagreed").exists()


def test_a_dead_process_ends_the_other(trained):
    folder, (first, _) = trained
    died, ended = (float((folder / "two" / name).read_text()) for name in (DIED, ENDED))
    assert 0 < ended - died < DEADLINE
    assert "another process of this run has ended or does not answer" in first.errors
