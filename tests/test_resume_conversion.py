"""An interrupted conversion goes on where it stopped, and ends as an uninterrupted one."""

import shutil

import pytest
import torch
from nets import SmallResNet, pictures, randomise

from lcnn_compile import LcnnError, LookupConfig, convert
from lcnn_compile.fitting.stages import Fitting

FIXED = LookupConfig(dictionary_size=0.5, sparsity=2, group_size=3)
SEARCHED = LookupConfig(target_speedup=1.5, group_size=2)


@pytest.fixture
def dense():
    return randomise(SmallResNet(8))


def states_equal(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.filterwarnings("ignore:no calibration data")
@pytest.mark.parametrize("config", [FIXED, SEARCHED])
@pytest.mark.parametrize("calibrated", [True, False])
def test_what_was_fitted_is_not_fitted_again(dense, tmp_path, monkeypatch, config, calibrated):
    calibration = [pictures(3), pictures(3)] if calibrated else None
    options = {"calibration": calibration, "example_inputs": pictures(1)}
    plain = convert(dense, config, **options)
    fitted, measured = [], []
    fit, curve = Fitting._fit, Fitting._curve

    def interrupted(self, name, sample):
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(name)
        return fit(self, name, sample)

    def watched(self, name, sample):
        measured.append(name)
        return curve(self, name, sample)

    monkeypatch.setattr(Fitting, "_fit", interrupted)
    monkeypatch.setattr(Fitting, "_curve", watched)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, config, **options, resume=tmp_path / "fits")
    before, fitted[:], curves = list(fitted), [], list(measured)
    assert not list(tmp_path.glob("fits/.*"))
    monkeypatch.setattr(Fitting, "_fit", lambda self, name, sample: (fitted.append(name), fit(self, name, sample))[1])
    resumed = convert(dense, config, **options, resume=tmp_path / "fits")
    assert len(before) == 3
    assert not set(before) & set(fitted)
    assert measured == curves
    assert states_equal(plain, resumed)
    assert list(plain.lcnn_report) == list(resumed.lcnn_report)


def test_a_folder_of_something_else_is_refused(dense, tmp_path):
    options = {"example_inputs": pictures(1)}
    batches = [pictures(3)]
    convert(dense, FIXED, calibration=batches, **options, resume=tmp_path / "fits")
    for config, calibration in ((FIXED.replace(group_size=2), batches), (FIXED, [batches[0] + 1])):
        with pytest.raises(LcnnError, match="another model, configuration or calibration data; name another folder"):
            convert(dense, config, calibration=calibration, **options, resume=tmp_path / "fits")
    with torch.no_grad():
        dense.layers[0].conv1.weight += 1
    with pytest.raises(LcnnError, match="another model"):
        convert(dense, FIXED, calibration=batches, **options, resume=tmp_path / "fits")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(LcnnError, match="holds other files"):
        convert(dense, FIXED, calibration=batches, **options, resume=tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]


def test_a_damaged_layer_is_named(dense, tmp_path):
    batches = [pictures(3)]
    convert(dense, FIXED, calibration=batches, resume=tmp_path / "fits")
    (path,) = tmp_path.glob("fits/layer-layers.0.conv1.safetensors")
    shutil.copy(tmp_path / "fits" / "conversion.json", path)
    with pytest.raises(LcnnError, match=r"layer-layers\.0\.conv1\.safetensors is damaged.*remove it"):
        convert(dense, FIXED, calibration=batches, resume=tmp_path / "fits")
