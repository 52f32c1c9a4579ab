"""TrainingArguments in our words: what is refused, and one GPU without torchrun."""

from functools import cached_property

import pytest
from transformers import TrainingArguments

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
