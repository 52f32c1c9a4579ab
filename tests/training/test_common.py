"""TrainingArguments in our words: what is refused, and one GPU without torchrun."""

from functools import cached_property

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from tinybert_fast.training import common


class FourGpus(TrainingArguments):
    """What Transformers finds on a machine with four GPUs, without torchrun."""

    @cached_property
    def _setup_devices(self):
        device = super()._setup_devices
        self._n_gpu = 4
        return device


def test_one_gpu_without_torchrun(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(common, "TrainingArguments", FourGpus)
    assert FourGpus(str(tmp_path), use_cpu=True).n_gpu == 4
    common._one_gpu_of.cache_clear()
    for _ in range(2):
        arguments = common.training_arguments(tmp_path, batch_size=8)
        assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)
        assert arguments.device.type == "cpu"
    assert caplog.messages == ["using one of 4 GPUs; torchrun uses all of them"]


def test_processes_wait_for_one_that_prepares(tmp_path):
    assert common.training_arguments(tmp_path).ddp_timeout == 24 * 60 * 60


@pytest.mark.parametrize("name", ["batch_size", "accumulation", "eval_steps", "log_steps"])
@pytest.mark.parametrize("value", [0, -5])
def test_values_without_a_meaning(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name} is {value}; expected 1 or more$"):
        common.training_arguments(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"warmup": float("nan")}, "warmup is nan; expected a number of 0 or more"),
        ({"warmup": -1}, "warmup is -1; expected a number"),
        ({"epochs": float("inf")}, "epochs is inf; expected a number of more than 0"),
        ({"epochs": float("nan")}, "epochs is nan; expected a number of more than 0"),
        ({"schedule": "polynomial"}, "schedule is 'polynomial'; expected one of linear, cosine, "),
        ({"schedule": "foo"}, "schedule is 'foo'; expected one of linear, cosine, constant, "),
    ],
)
def test_values_that_no_schedule_can_be_made_of(tmp_path, option, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        common.training_arguments(tmp_path, **option)


@pytest.mark.parametrize("schedule", common.SCHEDULES)
def test_schedules_need_nothing_else(tmp_path, schedule):
    arguments = common.training_arguments(tmp_path, schedule=schedule)
    optimizer = torch.optim.SGD([torch.zeros(1)])
    get_scheduler(arguments.lr_scheduler_type, optimizer, num_warmup_steps=2, num_training_steps=9)
