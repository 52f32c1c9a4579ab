"""HiddenProjection: official names, files of both kinds, refusals."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinybert_fast.training.projection import HiddenProjection


def test_names_are_the_official_ones():
    assert set(HiddenProjection(4, 6).state_dict()) == {"fit_dense.weight", "fit_dense.bias"}
    each = HiddenProjection(4, 6, (0, 2), shared=False)
    assert set(each.state_dict()) == {
        f"fit_denses.{m}.{name}" for m in (0, 2) for name in ("weight", "bias")
    }
    assert each.for_state(2)[0].shape == (6, 4)
    assert each.for_state(0)[0] is not each.for_state(2)[0]


@pytest.mark.parametrize("shared", [True, False])
def test_save_and_load(tmp_path, shared):
    saved = HiddenProjection(4, 6, (0, 1), shared=shared)
    assert not HiddenProjection.exists(tmp_path)
    path = saved.save(tmp_path / "new" / "folder")
    assert [file.name for file in path.parent.iterdir()] == ["projection.safetensors"]
    assert HiddenProjection.exists(path.parent)
    loaded = HiddenProjection(4, 6, (0, 1), shared=shared).load(path.parent)
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert load_file(path).keys() == saved.state_dict().keys()


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
def test_official_checkpoints_of_both_kinds(tmp_path, kind):
    shared = {"fit_dense.weight": torch.randn(6, 4), "fit_dense.bias": torch.randn(6)}
    each = {
        f"fit_denses.{m}.{name}": torch.randn(shape)
        for m in range(3)
        for name, shape in (("weight", (6, 4)), ("bias", (6,)))
    }
    other = {"bert.embeddings.LayerNorm.bias": torch.zeros(4)}
    for name, tensors in (("v1", shared), ("v2", each), ("none", {})):
        (tmp_path / name).mkdir()
        write = torch.save if kind.endswith("bin") else save_file
        write({**other, **tensors}, tmp_path / name / kind)

    loaded = HiddenProjection(4, 6).load(tmp_path / "v1")
    assert torch.equal(loaded.for_state(1)[0], shared["fit_dense.weight"])
    loaded = HiddenProjection(4, 6, range(3), shared=False).load(tmp_path / "v2")
    assert torch.equal(loaded.for_state(2)[1], each["fit_denses.2.bias"])
    loaded = HiddenProjection(4, 6, range(3), shared=False).load(tmp_path / "v1")
    assert torch.equal(loaded.for_state(2)[1], shared["fit_dense.bias"])

    assert not HiddenProjection.exists(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no projection"):
        HiddenProjection(4, 6).load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"per layer .*fit_denses.0.*ask for per-layer"):
        HiddenProjection(4, 6).load(tmp_path / "v2")
    with pytest.raises(ValueError, match="no projection for student state 3"):
        HiddenProjection(4, 6, range(4), shared=False).load(tmp_path / "v2")


def test_refusals(tmp_path):
    HiddenProjection(4, 6).save(tmp_path)
    with pytest.raises(ValueError, match=r"maps 4 -> 6 .*need 5 -> 6"):
        HiddenProjection(5, 6).load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        HiddenProjection(4, 6).load(tmp_path / "absent")
    with pytest.raises(ValueError, match="states it serves"):
        HiddenProjection(4, 6, shared=False)
    file = tmp_path / "projection.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="damaged or cut short"):
        HiddenProjection(4, 6).load(tmp_path)
