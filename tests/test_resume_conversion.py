"""An interrupted conversion goes on where it stopped, and ends as an uninterrupted one."""

import hashlib
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from nets import SmallResNet, pictures, randomise

from lcnn_compile import LayerConfig, LcnnError, LookupConfig, convert
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
        with pytest.raises(LcnnError, match="another model, configuration, calibration data or version; name another folder"):
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


def key_of_version_0_1(layers, batches, target_speedup):
    """Of layers with the sizes of FIXED: version 0.1 knew of no limit but ``target_speedup``."""
    sizes = {name: asdict(LayerConfig(dictionary_size=0.5, sparsity=2, group_size=3)) for name in layers}
    asked = json.dumps(["lcnn_compile.fits/2", sizes, target_speedup, 0, "multiply-adds"], sort_keys=True)
    digest = hashlib.blake2b(asked.encode(), digest_size=16)
    for value in (*(t for layer in layers.values() for t in (layer.weight, layer.bias)), *batches):
        if value is not None:
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("target_speedup", [None, 1.5])
def test_folders_of_version_0_1_are_gone_on_with_unless_a_budget_was_spread(dense, tmp_path, monkeypatch, target_speedup):
    batches, folder = [pictures(3)], tmp_path / "fits"
    plain = convert(dense, FIXED, calibration=batches, resume=folder)
    layers = {row.name: dense.get_submodule(row.name) for row in plain.lcnn_report.replaced}  # in the order in which they run
    assert len(layers) == len(list(folder.glob("layer-*.safetensors"))) > 3
    old = key_of_version_0_1(layers, batches, target_speedup)
    (folder / "conversion.json").write_text(json.dumps({"format": "lcnn_compile.fits/2", "key": old}))
    if target_speedup is not None:
        with pytest.raises(LcnnError, match="or version"):
            convert(dense, FIXED.replace(target_speedup=target_speedup), calibration=batches, resume=folder)
        return
    monkeypatch.setattr(Fitting, "_fit", None)  # nothing is left to fit
    assert states_equal(plain, convert(dense, FIXED, calibration=batches, resume=folder))


def test_a_damaged_layer_is_named(dense, tmp_path):
    batches = [pictures(3)]
    convert(dense, FIXED, calibration=batches, resume=tmp_path / "fits")
    (path,) = tmp_path.glob("fits/layer-layers.0.conv1.safetensors")
    shutil.copy(tmp_path / "fits" / "conversion.json", path)
    with pytest.raises(LcnnError, match=r"layer-layers\.0\.conv1\.safetensors is damaged.*remove it"):
        convert(dense, FIXED, calibration=batches, resume=tmp_path / "fits")
