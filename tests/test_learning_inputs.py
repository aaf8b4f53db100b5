"""Geometry, streaming statistics and dictionaries against direct computations."""

import pytest
import torch
from torch import nn

from lcnn_compile.fitting.dictionary import MEAN_SHARE, fit_dictionary, most_vectors
from lcnn_compile.fitting.statistics import InputMoments
from lcnn_compile.geometry import Geometry, LinearGeometry, geometry_of

CONVS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2},
    "7x7": {"kernel_size": 7, "stride": 2, "padding": 3},
    "pointwise": {"kernel_size": 1, "stride": 2},
    "dilated": {"kernel_size": (3, 2), "dilation": (2, 3), "padding": (2, 1)},
    "same": {"kernel_size": (2, 4), "padding": "same", "dilation": 2},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "circular"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 6},
}


@pytest.mark.parametrize("kind", CONVS)
def test_geometry_reads_what_the_convolution_reads(kind):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 12, **CONVS[kind])
    geometry = geometry_of(conv)
    x = torch.randn(2, 6, 11, 13)
    y = conv(x)
    assert geometry.output_size(11, 13) == y.shape[2:]
    torch.testing.assert_close(geometry.apply(x, conv.weight, conv.bias), y)
    pixel = torch.arange(y.shape[2] * y.shape[3]).repeat(2)
    image = torch.arange(2).repeat_interleave(y.shape[2] * y.shape[3])
    patches = geometry.patches(x, image, pixel).unflatten(2, (geometry.groups, -1))
    weight = conv.weight.unflatten(0, (geometry.groups, -1)).flatten(3)
    answers = torch.einsum("pagm,gnma->pgn", patches, weight).flatten(1) + conv.bias
    torch.testing.assert_close(answers, y.flatten(2).permute(0, 2, 1).flatten(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 5, 6), (2, 3, 4, 6)])
def test_linear_layers_are_pointwise(shape):
    layer = nn.Linear(6, 3)
    x = torch.randn(shape)
    geometry = geometry_of(layer)
    images = geometry.images(x)
    weight = layer.weight[:, :, None, None]
    torch.testing.assert_close(geometry.apply(x, weight, layer.bias), layer(x))
    torch.testing.assert_close(nn.functional.conv2d(images, weight, layer.bias), geometry.images(layer(x)))


def test_streaming_moments_are_those_of_all_batches_at_once():
    generator = torch.Generator().manual_seed(0)
    geometry = Geometry(6, 8, groups=2, kernel_size=(3, 3))
    batches = [torch.randn(n, 6, 5, 7, generator=generator) * 0.1 + torch.arange(6)[:, None, None] for n in (1, 4, 2)]
    moments = InputMoments(geometry)
    for batch in batches:
        moments.update(batch)
    pixels = torch.cat(batches).double().permute(1, 0, 2, 3).reshape(2, 3, -1)
    centred = pixels - pixels.mean(2, keepdim=True)
    torch.testing.assert_close(moments.mean(), pixels.mean(2), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.covariance(), centred @ centred.transpose(1, 2) / pixels.shape[2], rtol=1e-4, atol=1e-7)
    assert (moments.calls, moments.images, moments.in_pixels, moments.out_pixels) == (3, 7, 7 * 35, 7 * 15)
    assert moments.degenerate == ""


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([], "never called"),
        ([torch.zeros(2, 3, 4, 4)], "constant"),
        ([torch.full((2, 3, 4, 4), 7.0)], "constant"),
        ([torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand(2, 3, 4, 4)], "constant"),
        ([torch.full((1, 3, 4, 4), float("nan"))], "finite"),
    ],
)
def test_degenerate_inputs_are_named(inputs, reason):
    moments = InputMoments(Geometry(3, 4))
    for x in inputs:
        moments.update(x)
    assert reason in moments.degenerate


def test_many_channels_keep_a_bounded_uniform_sample(monkeypatch):
    monkeypatch.setattr("lcnn_compile.fitting.statistics.GRAM_CHANNELS", 4)
    monkeypatch.setattr("lcnn_compile.fitting.statistics.ROW_ELEMENTS", 100 * 8)
    moments = InputMoments(LinearGeometry(8, 4))
    for start in range(0, 1000, 50):
        numbers = torch.arange(start, start + 50.0)
        moments.update(numbers[:, None, None, None] + torch.zeros(50, 8, 1, 1))
    kept = moments.centred_rows()[0, :, 0]
    assert kept.shape == (100,)
    assert kept.unique().numel() == 100
    spread = torch.arange(1000.0).std()
    assert 0.8 * spread < kept.std() < 1.2 * spread


def weighted_error(weight, dictionary, lookups, moment):
    rows = weight.double().flatten(2).transpose(1, 2)
    wrong = rows - lookups.double() @ dictionary.double()
    return torch.einsum("nam,mk,nak->", wrong, moment, wrong)


def data(channels=12, pixels=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator) * 0.7 ** torch.arange(channels)
    return (torch.randn(pixels, channels, generator=generator) @ mix.T)[:, :, None, None] + 0.3


def test_dictionary_is_the_best_of_its_rank_whitens_and_is_nested():
    geometry = Geometry(12, 10, kernel_size=(3, 3))
    weight = torch.randn(10, 12, 3, 3, generator=torch.Generator().manual_seed(1))
    moments = InputMoments(geometry)
    moments.update(data())
    mean = moments.mean()[0]
    moment = moments.covariance()[0] + MEAN_SHARE * torch.outer(mean, mean)
    basis = fit_dictionary(weight, geometry, 5, moments)
    values, vectors = torch.linalg.eigh(moment)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    singular = torch.linalg.svdvals(weight.double().flatten(2).transpose(1, 2).reshape(-1, 12) @ root)
    error = weighted_error(weight, basis.dictionary[0], basis.lookups[0], moment)
    torch.testing.assert_close(error, singular[5:].square().sum(), rtol=1e-2, atol=0)
    d = basis.dictionary[0].double()
    torch.testing.assert_close(d @ moment @ d.T, torch.eye(5).double(), rtol=0, atol=1e-2)
    smaller = fit_dictionary(weight, geometry, 3, moments)
    torch.testing.assert_close(smaller.dictionary, basis.first(3).dictionary)


def test_fewer_pixels_than_channels_give_the_same_dictionary_as_the_full_moment(monkeypatch):
    geometry = LinearGeometry(12, 10)
    weight = torch.randn(10, 12, 1, 1, generator=torch.Generator().manual_seed(1))
    full, rows = InputMoments(geometry), InputMoments(geometry)
    full.update(data(pixels=8))
    wanted = fit_dictionary(weight, geometry, 4, full)
    monkeypatch.setattr("lcnn_compile.fitting.statistics.GRAM_CHANNELS", 4)
    rows.update(data(pixels=8))
    moment = full.covariance()[0]
    found = fit_dictionary(weight, geometry, 4, rows)
    best = weighted_error(weight, wanted.dictionary[0], wanted.lookups[0], moment)
    assert weighted_error(weight, found.dictionary[0], found.lookups[0], moment) <= best * 1.01
    more = fit_dictionary(weight, geometry, 10, rows)  # beyond what eight pixels span
    product = more.lookups[0].double() @ more.dictionary[0].double()
    torch.testing.assert_close(product, weight.double().flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_without_data_directions_count_alike():
    weight = torch.randn(10, 12, 3, 3, generator=torch.Generator().manual_seed(1))
    geometry = Geometry(12, 10, kernel_size=(3, 3))
    basis = fit_dictionary(weight, geometry, 5, None)
    singular = torch.linalg.svdvals(weight.double().flatten(2).transpose(1, 2).reshape(-1, 12))
    error = weighted_error(weight, basis.dictionary[0], basis.lookups[0], torch.eye(12).double())
    torch.testing.assert_close(error, singular[5:].square().sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [3, 10])
def test_very_many_channels_without_data(monkeypatch, size):
    monkeypatch.setattr("lcnn_compile.fitting.dictionary.GRAM_CHANNELS", 4)
    weight = torch.randn(10, 40, 1, 1, generator=torch.Generator().manual_seed(1)) * 0.5 ** torch.arange(10)[:, None, None, None]
    basis = fit_dictionary(weight, LinearGeometry(40, 10), size, None)
    best = torch.linalg.svdvals(weight.double().flatten(1))[size:].square().sum()
    error = weighted_error(weight, basis.dictionary[0], basis.lookups[0], torch.eye(40).double())
    torch.testing.assert_close(error, best, rtol=0.1, atol=1e-6)


def test_a_dictionary_never_exceeds_what_the_filters_span():
    assert most_vectors(LinearGeometry(512, 10)) == 10
    assert most_vectors(Geometry(16, 4, groups=2, kernel_size=(3, 3))) == 8
