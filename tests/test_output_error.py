"""max_output_error: what is measured at a network's outputs, and that no conversion is ever over it."""

import copy
import json
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lcnn_compile import LookupConfig, convert
from lcnn_compile.errors import ConversionError
from lcnn_compile.fitting.allocate import cheapest_within
from lcnn_compile.fitting.network import Network
from lcnn_compile.fitting.output_error import Reference, output_tensors
from lcnn_compile.fitting.sampling import held_images
from lcnn_compile.fitting.search import Point
from lcnn_compile.fitting.sensitivity import Seen, output_sensitivity


def pictures(count, channels=3, size=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 5, 5, generator=generator)
    return F.interpolate(coarse, size=size, mode="bicubic") + 0.05 * torch.randn(count, channels, size, size, generator=generator)


class Filter(nn.Module):
    """A regression network: a picture from a picture, through layers of unequal worth."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 40, 3, padding=1)
        self.third = nn.Conv2d(40, 40, (3, 1), padding=(1, 0))
        self.last = nn.Conv2d(40, 3, 3, padding=1)

    def forward(self, x):
        hidden = F.relu(self.second(F.relu(self.first(x))))
        return self.last(F.relu(self.third(hidden)) + 0.5 * hidden)


def relative(y, t):
    y, t = y.double(), t.double()
    return float((y - t).square().sum() / (y - y.mean(0)).square().sum())


def test_errors_are_those_of_each_output_in_float64():
    torch.manual_seed(0)
    first = [torch.randn(6, 3, 5) for _ in range(2)]
    second = [torch.randn(6, 7) for _ in range(2)]
    wrong_first = [t + 0.1 * torch.randn_like(t) for t in first]
    wrong_second = [t + 0.2 * torch.randn_like(t) for t in second]
    reference = Reference(list(zip(first, second, strict=True)))
    found = reference.measure(list(zip(wrong_first, wrong_second, strict=True)))
    wanted = [relative(torch.cat(first), torch.cat(wrong_first)), relative(torch.cat(second), torch.cat(wrong_second))]
    assert found.errors == pytest.approx(wanted, rel=1e-9)
    p, q = torch.cat(second).double().log_softmax(1), torch.cat(wrong_second).double().log_softmax(1)
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-9)
    assert found.worst == max(*found.errors, found.divergence)


def test_shares_of_one_diverge_as_shares():
    torch.manual_seed(0)
    scores, others = torch.randn(8, 5).double(), torch.randn(8, 5).double()
    found = Reference([[scores.softmax(1)]]).measure([[others.softmax(1)]])
    wanted = F.kl_div(others.log_softmax(1), scores.log_softmax(1), log_target=True, reduction="batchmean")
    assert found.divergence == pytest.approx(float(wanted), rel=1e-6)


def test_few_samples_are_measured_about_the_means_of_their_channels():
    torch.manual_seed(0)
    y = torch.randn(1, 3, 9, 7) + torch.tensor([5.0, 0.0, -3.0])[:, None, None]
    t = y + 0.1 * torch.randn_like(y)
    found = Reference([[y]]).measure([[t]])
    spread = (y.double() - y.double().mean((0, 2, 3), keepdim=True)).square().sum()
    assert found.errors == pytest.approx([float((y.double() - t.double()).square().sum() / spread)], rel=1e-9)
    assert found.divergence is None


def test_other_shapes_and_new_infinities_are_infinite_errors_and_old_ones_none():
    y = torch.tensor([[1.0, float("-inf")], [2.0, float("nan")], [0.0, 1.0], [5.0, 2.0]])
    reference = Reference([[y]])
    assert reference.measure([[y.clone()]]).errors == (0.0,)
    assert reference.measure([[y[:3]]]).errors == (float("inf"),)
    broken = y.clone()
    broken[0, 0] = float("nan")
    assert reference.measure([[broken]]).errors == (float("inf"),)


def test_floating_outputs_are_measured_and_whole_numbers_only_without_any():
    both = {"boxes": torch.zeros(2, 4), "labels": torch.ones(2, dtype=torch.int64)}
    assert [t.dtype for t in output_tensors(both)] == [torch.float32]
    assert [t.dtype for t in output_tensors((both["labels"],))] == [torch.int64]


def test_no_layer_alone_could_be_cheaper_within_a_level():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        numbers = torch.rand(3, 4, 2, generator=generator).tolist()
        curves = {
            str(i): [Point(0, 0, 1, 2.0, 0.0, 0.0), *(Point(1, j + 1, 1, cost, loss, loss) for j, (cost, loss) in enumerate(row))]
            for i, row in enumerate(numbers)
        }
        shares = {"0": 0.3, "1": 1.0, "2": 2.0}
        for level in (0.0, 0.1, 0.5, 5.0):
            chosen = cheapest_within(curves, shares, level)
            caused = sum(shares[name] * point.loss for name, point in chosen.items())
            assert caused <= level * (1 + 1e-12)
            for name, curve in curves.items():
                room = level - caused + shares[name] * chosen[name].loss
                assert all(p.cost >= chosen[name].cost for p in curve if shares[name] * p.loss <= room * (1 - 1e-12))
            best = min(
                sum(p.cost for p in points)
                for points in product(*curves.values())
                if sum(shares[name] * p.loss for name, p in zip(shares, points, strict=True)) <= level
            )
            # The hull of each curve is searched: what it misses is less than the largest step of one layer.
            assert sum(p.cost for p in chosen.values()) <= best + 2.0


def test_shares_predict_the_error_of_the_outputs():
    model = Filter().eval()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    network = Network(model, layers, lambda m, x: m(x))
    batches = list(pictures(24, seed=5).split(5))
    found = output_sensitivity(network, batches, list(layers), 0)
    x = torch.cat(batches)
    y = model(x).detach()
    for name, layer in layers.items():
        outputs = []
        hook = layer.register_forward_hook(lambda *call, outputs=outputs: outputs.append(call[2].detach()))
        model(x)
        hook.remove()
        torch.manual_seed(0)
        channels = found[name].channels
        deviation = outputs[0].var((0, 2, 3), correction=0)
        # White noise of an equal share of every channel's deviation: a relative error of 1e-4 however channels are weighted.
        noise = torch.randn_like(outputs[0]) * (1e-4 * deviation)[:, None, None].sqrt()
        hook = layer.register_forward_hook(lambda *call, noise=noise: call[2] + noise)
        wrong = model(x).detach()
        hook.remove()
        assert channels is not None
        assert relative(y, wrong) == pytest.approx(1e-4 * found[name].share, rel=0.3), name


@pytest.mark.parametrize("size", [1, 5, 24])
def test_sensitivity_is_the_same_however_samples_are_cut(monkeypatch, size):
    model = Filter().eval()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    network = Network(model, layers, lambda m, x: m(x))
    seen = Seen()
    one = 8 * (3 + 24 + 40 + 40) * 20 * 20
    monkeypatch.setattr("lcnn_compile.fitting.sensitivity.SLICE_BYTES", size * one)
    found = output_sensitivity(network, [pictures(24, seed=5)], list(layers), 0, seen=seen)
    assert seen.samples == 24
    whole = output_sensitivity(network, [pictures(24, seed=5)], list(layers), 1)
    for name in layers:
        assert found[name].share == pytest.approx(whole[name].share, rel=0.2)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_one_input_that_is_too_large_is_said_and_not_tried(monkeypatch):
    model = Filter().eval()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    monkeypatch.setattr("lcnn_compile.fitting.sensitivity.MOST_BYTES", 1000)
    seen = Seen()
    found = output_sensitivity(Network(model, layers, lambda m, x: m(x)), [pictures(4)], list(layers), 0, seen=seen)
    assert "one input alone" in seen.remark
    assert {entry.share for entry in found.values()} == {None}


@pytest.mark.parametrize("limit", [0.3, 0.01, 1e-3])
@pytest.mark.parametrize("batch", [1, 7, 30])
def test_held_out_samples_are_never_over_the_limit(limit, batch):
    model, data = Filter().eval(), pictures(30, seed=2)
    made = convert(model, LookupConfig(max_output_error=limit, group_size=4), calibration=list(data.split(batch)))
    held = data[held_images(torch.arange(30), 30)]
    with torch.no_grad():
        error = relative(model(held), made.eval()(held))
    report = made.lcnn_report
    assert error <= limit
    if report.replaced:
        assert report.output_error.errors == pytest.approx([error], rel=1e-3)
        assert all(row.output_error > 0 for row in report.replaced)
        assert json.loads(report.to_json())["output_error"]["errors"] == list(report.output_error.errors)
        before, after = report.macs()
        assert before / after >= 1.1
    else:
        assert any("left alone" in remark for remark in report.remarks)


def test_a_larger_error_saves_more():
    model, data = Filter().eval(), pictures(30, seed=2)
    macs = [
        convert(model, LookupConfig(max_output_error=limit, group_size=4), calibration=[data]).lcnn_report.macs()[1]
        for limit in (3e-3, 3e-2, 0.3)
    ]
    assert macs[0] > macs[1] > macs[2]


def test_a_budget_is_the_most_that_is_saved():
    model, data = Filter().eval(), pictures(30, seed=2)
    config = LookupConfig(max_output_error=0.5, target_speedup=1.5, group_size=4)
    before, after = convert(model, config, calibration=[data]).lcnn_report.macs()
    assert 1.5 <= before / after < 1.7


def test_a_prediction_that_is_wrong_is_corrected_or_taken_back(monkeypatch):
    from lcnn_compile.fitting import stages

    honest = stages.output_sensitivity

    def far_too_low(*args, **options):
        return {name: type(s)(s.layer, s.channels, 1e-6 * s.share) for name, s in honest(*args, **options).items()}

    monkeypatch.setattr(stages, "output_sensitivity", far_too_low)
    monkeypatch.setattr("lcnn_compile.fitting.within.ROUNDS", 1)
    model, data = Filter().eval(), pictures(30, seed=2)
    made = convert(model, LookupConfig(max_output_error=0.02, group_size=4), calibration=[data])
    held = data[held_images(torch.arange(30), 30)]
    with torch.no_grad():
        assert relative(model(held), made.eval()(held)) <= 0.02
    reasons = {row.reason for row in made.lcnn_report if not row.replaced}
    assert any(reason.startswith(("taken back", "within output error")) for reason in reasons)


def test_one_sample_is_measured_on_itself_with_half_of_the_limit():
    model, data = Filter().eval(), pictures(1, size=40)
    made = convert(model, LookupConfig(max_output_error=0.05, group_size=4), calibration=[data])
    assert any("on the data of the fit" in remark for remark in made.lcnn_report.remarks)
    with torch.no_grad():
        y, t = model(data), made.eval()(data)
    spread = (y - y.mean((0, 2, 3), keepdim=True)).square().sum()
    assert float((y - t).square().sum() / spread) <= 0.025


def test_without_a_tensor_to_measure_it_is_refused():
    class Number(Filter):
        def forward(self, x):
            return float(super().forward(x).sum())

    with pytest.raises(ConversionError, match="max_output_error cannot be measured"):
        convert(Number().eval(), LookupConfig(max_output_error=0.1), calibration=[pictures(4)])


def test_sizes_that_nobody_names_are_found_within_the_default_error():
    model, data = Filter().eval(), pictures(30, seed=2)
    for config in (None, LookupConfig(dictionary_size="auto", sparsity="auto")):
        made = convert(copy.deepcopy(model), config, calibration=[data])
        held = data[held_images(torch.arange(30), 30)]
        with torch.no_grad():
            assert relative(model(held), made.eval()(held)) <= 5e-4
        assert made.lcnn_report.remarks


@pytest.mark.parametrize(("flat", "allowed"), [(False, 5e-4), (True, 1e-2)])
def test_pictures_are_held_to_less_than_scores(flat, allowed):
    model = nn.Sequential(Filter(), nn.Flatten()) if flat else Filter()
    made = convert(model.eval(), LookupConfig(max_output_error="auto"), calibration=[pictures(30, seed=2)])
    assert any(f"{allowed:.3g}" in remark for remark in made.lcnn_report.remarks)


def test_the_error_of_each_layer_alone_goes_on_as_before():
    model, data = Filter().eval(), pictures(30, seed=2)
    config = LookupConfig(dictionary_size="auto", sparsity="auto", max_error=0.1, group_size=4)
    report = convert(model, config, calibration=[data]).lcnn_report
    assert report.replaced
    assert report.output_error is None
    assert all(row.error <= 0.1 for row in report.replaced)


@pytest.mark.parametrize("batch", [2, 9])
def test_calibration_in_parts_is_that_of_the_whole(monkeypatch, batch):
    """Large batches run in parts; moments, order and held-out images are as without."""
    from lcnn_compile.fitting.sampling import calibrate

    model, data = Filter().eval(), pictures(18, seed=4)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    network = Network(model, layers, lambda m, x: m(x))
    whole = calibrate(network, [data], 0)
    assert [len(piece) for piece in whole.batches] == [18]
    monkeypatch.setattr("lcnn_compile.fitting.sampling.CALL_ELEMENTS", batch * 80 * 20 * 20)
    parts = calibrate(network, [data], 0)
    assert {len(piece) for piece in parts.batches} <= {batch, 18 % batch}
    assert torch.equal(torch.cat(parts.batches), data)
    assert parts.order == whole.order
    rows = torch.cat([parts.held_rows(number) for number in range(len(parts.batches))])
    assert torch.equal(rows, whole.held_rows(0))
    for name in layers:
        torch.testing.assert_close(parts.moments[name].covariance(), whole.moments[name].covariance(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(parts.moments[name].mean(), whole.moments[name].mean(), rtol=1e-5, atol=1e-6)


class Keeping(Filter):
    """Its state has a place for each of a batch's samples, so that no other batch fits it."""

    def __init__(self, samples):
        super().__init__()
        self.register_buffer("past", torch.zeros(samples))

    def forward(self, x):
        self.past = self.past + x.mean((1, 2, 3))
        return super().forward(x)[: len(self.past)] + self.past.view(-1, 1, 1, 1)


def test_a_batch_that_fits_is_run_as_it_is_and_once():
    from lcnn_compile.fitting.sampling import calibrate

    model, data = Keeping(18).eval(), pictures(18, seed=4)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[0]))
    calibrate(Network(model, layers, lambda m, x: m(x)), [data, data], 0)
    assert calls == [18, 18]
    converted = convert(Keeping(18).eval(), LookupConfig(dictionary_size=1.0, sparsity=None), calibration=[data])
    with torch.no_grad():
        torch.testing.assert_close(converted(data).double(), Keeping(18).eval().double()(data.double()), rtol=1e-4, atol=1e-5)


def test_large_kernels_are_searched_within_what_a_sample_tells():
    """k·kh·kw is bounded, and so is the work of a selection; small kernels lose nothing."""
    from lcnn_compile.config import LayerConfig
    from lcnn_compile.fitting.search import MOST_COLUMNS, SELECTION_WORK, ladder, most_taps
    from lcnn_compile.geometry import geometry_of

    automatic = LayerConfig("auto", "auto")
    tall = geometry_of(nn.Conv2d(1024, 128, (64, 1)))
    sizes = ladder(tall, automatic, True)
    assert sizes == [32, 64, 72]
    for size in sizes:
        taps = most_taps(tall, (128, 128), size)
        assert size * 64 <= MOST_COLUMNS
        assert taps >= 1
        assert 128 / 8 * size * 64 * taps**2 / 2 <= SELECTION_WORK
    usual = geometry_of(nn.Conv2d(256, 256, 3))
    assert ladder(usual, automatic, True) == [8, 16, 24, 32, 48, 64, 96, 128]
    assert most_taps(usual, (196, 196), 64) == 48 * 9
    huge = geometry_of(nn.Conv2d(8, 8, 101))
    assert ladder(huge, automatic, True) == [1]
