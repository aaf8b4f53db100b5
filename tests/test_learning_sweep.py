"""A sweep over budgets: what convert gives for each, with the costly parts done once."""

import pytest
import torch
from nets import SmallResNet, pictures, randomise

from lcnn_compile import LookupConfig, convert
from lcnn_compile.errors import ConfigError, ConversionError
from lcnn_compile.fitting import model as whole
from lcnn_compile.fitting import stages as fitting
from lcnn_compile.learning import sweep

torch.manual_seed(0)
DATA, OTHER = pictures(24).split(8), pictures(2)


@pytest.fixture(scope="module")
def model():
    return randomise(SmallResNet(16)).eval()


@pytest.fixture(scope="module")
def points(model):
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("calibrate", "error_curve", "output_sensitivity"):
            module = whole if name == "calibrate" else fitting
            original = getattr(module, name)
            patch.setattr(module, name, lambda *a, _f=original, _n=name, **k: calls.append(_n) or _f(*a, **k))
        found = sweep(model, [1.5, 3], calibration=iter(DATA), evaluate=lambda m: float(m(OTHER).sum()))
    assert calls.count("calibrate") == calls.count("output_sensitivity") == 1
    assert calls.count("error_curve") == sum(row.replaced or "budget" in row.reason for row in found[0].report)
    return found


def test_every_point_is_what_convert_gives(model, points):
    for target, point in zip((1.5, 3), points, strict=True):
        alone = convert(model, LookupConfig(target_speedup=target), calibration=DATA).eval()
        assert torch.equal(point.model(OTHER), alone(OTHER))
        assert list(point.report) == list(alone.lcnn_report)
        before, after = point.report.macs()
        assert point.target == target
        assert point.speedup == before / after >= target
        assert point.metric == pytest.approx(float(point.model(OTHER).sum()), rel=1e-5)


def test_errors_are_those_of_the_outputs(model, points):
    with torch.no_grad():
        pairs = [(model(b).double(), [p.model(b).double() for p in points]) for b in DATA]
    for number, point in enumerate(points):
        wrong = sum((y - found[number]).square().sum() for y, found in pairs)
        wanted = float(wrong / sum((y - y.mean(0)).square().sum() for y, _ in pairs))
        assert point.error == pytest.approx(wanted, rel=1e-6)
    assert 0 < points[0].error < points[1].error


def test_what_cannot_be_swept_is_refused(model):
    with pytest.raises(ConversionError, match="calibration"):
        sweep(model, [2], calibration=None)
    with pytest.raises(ConfigError, match="speedups"):
        sweep(model, [], calibration=[pictures(2)])
    with pytest.raises(ConfigError, match="target_speedup"):
        sweep(model, [0.5], calibration=[pictures(2)])
    with pytest.raises(ConversionError, match="cannot be reached"):
        sweep(model, [1e6], calibration=[pictures(2)])
