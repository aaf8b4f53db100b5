"""Index tables under weight averaging: exact where all models have the same tables, refused where they differ."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn

from lcnn_compile import LcnnError, LookupConfig, LookupConv2d, convert
from lcnn_compile.modules.tables import TABLES, decode, encode

KINDS = {
    "linear": (lambda: nn.Linear(8, 12), (3, 8)),
    "1d": (lambda: nn.Conv1d(8, 12, 3), (2, 8, 9)),
    "2d": (lambda: nn.Conv2d(8, 12, 3), (2, 8, 7, 6)),
    "3d": (lambda: nn.Conv3d(8, 12, 3), (1, 8, 4, 5, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(8, 12, 4, 2), (2, 8, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(8, 12, 4, 2), (2, 8, 5, 4)),
}


def converted(build, shape, seed=0):
    torch.manual_seed(seed)
    config = LookupConfig(dictionary_size=4, sparsity=2, group_size=4, include=("0",))
    return convert(nn.Sequential(build()).eval(), config, calibration=[torch.randn(shape)]).eval()


@pytest.fixture(params=KINDS, scope="module")
def pair(request):
    """A model, a copy whose floating tensors were trained a little, and an input."""
    build, shape = KINDS[request.param]
    first = converted(build, shape)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return first, second, torch.randn(shape)


def tables(model):
    return [getattr(layer, name) for layer in model.modules() for name in TABLES if hasattr(layer, "dictionary")]


def assert_average(found, models, weights, x):
    """Tables are those of all models, parameters their average, and the layer computes with both."""
    want = copy.deepcopy(models[0])
    with torch.no_grad():
        for parameter, *values in zip(want.parameters(), *(model.parameters() for model in models), strict=True):
            parameter.copy_(sum(w * v for w, v in zip(weights, values, strict=True)))
        assert all(torch.equal(a, b) for a, b in zip(tables(found), tables(want), strict=True))
        torch.testing.assert_close(found(x), want(x), rtol=1e-4, atol=1e-4)
        x = x.double()
        torch.testing.assert_close(copy.deepcopy(found).double()(x), want.double()(x), rtol=1e-4, atol=1e-4)


AVERAGES = {
    "foreach lerp": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "lerp": {"avg_fn": lambda a, b, n: a.lerp(b, 0.1) if a.is_floating_point() else (a * 0.9 + b * 0.1).to(a.dtype)},
    "products": {"avg_fn": lambda a, b, n: 0.9 * a + 0.1 * b},
    "rounded down": {"avg_fn": lambda a, b, n: (0.9 * a + 0.1 * b).floor() if not a.is_floating_point() else 0.9 * a + 0.1 * b},
    "swa": {"avg_fn": get_swa_avg_fn()},
    "swa by default": {},
}


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("way", AVERAGES)
def test_averaged_models(pair, way, buffers):
    first, second, x = pair
    average = AveragedModel(first, use_buffers=buffers, **AVERAGES[way])
    average.update_parameters(first)
    average.update_parameters(second)
    share = 0.5 if "swa" in way else 0.1
    assert_average(average.module.eval(), [first, second], [1 - share, share], x)
    for _ in range(300):
        average.update_parameters(second)
    assert_average(average.module.eval(), [first, second], [0, 1] if "swa" not in way else [1 / 302, 301 / 302], x)


@pytest.mark.parametrize("decay", [0.9, 0.99998])
def test_moving_averages_that_write_to_state_dicts(pair, decay):
    first, second, x = pair
    average = copy.deepcopy(first)
    with torch.no_grad():
        for _ in range(50):
            for mine, other in zip(average.state_dict().values(), second.state_dict().values(), strict=True):
                mine.copy_(decay * mine + (1 - decay) * other)
    assert_average(average, [first, second], [decay**50, 1 - decay**50], x)


SOUPS = {
    "sum over number": lambda values: sum(values) / len(values),
    "weighted": lambda values: 0.3 * values[0] + 0.7 * values[1],
    "integer division": lambda values: sum(values) // 2 if not values[0].is_floating_point() else sum(values) / 2,
    "cast back": lambda values: (0.3 * values[0] + 0.7 * values[1]).to(values[0].dtype),
    "half": lambda values: (sum(values) / 2).half(),
    "double": lambda values: torch.stack([v.double() for v in values]).mean(0),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("soup", SOUPS)
def test_soups(pair, soup, assign):
    first, second, x = pair
    states = [model.state_dict() for model in (first, second)]
    averaged = {key: SOUPS[soup]([state[key] for state in states]) for key in states[0]}
    if assign:
        averaged = {key: value.float() if value.is_floating_point() else value for key, value in averaged.items()}
    target = copy.deepcopy(first)
    target.load_state_dict(averaged, assign=assign)
    shares = [0.3, 0.7] if soup in ("weighted", "cast back") else [0.5, 0.5]
    if soup != "half":
        assert_average(target, [first, second], shares, x)
    assert all(torch.equal(a, b) for a, b in zip(tables(target), tables(first), strict=True))


def test_a_soup_for_another_models_tables():
    build, shape = KINDS["2d"]
    first, other, x = converted(build, shape), converted(build, shape, seed=1), torch.randn(shape)
    state = first.state_dict()
    other.load_state_dict({key: (0.3 * value + 0.7 * value) for key, value in state.items()})
    assert_average(other, [first], [1], x)
    damaged = {key: value if value.is_floating_point() else (0.999 * value).to(value.dtype) for key, value in state.items()}
    with pytest.raises(LcnnError, match=r"LookupConv2d '0'.*do not match"):
        converted(build, shape, seed=1).load_state_dict(damaged)


def test_different_tables_are_refused(pair):
    first, _, x = pair
    other = converted(lambda: first[0].to_dense(), x.shape, seed=7)
    assert not all(torch.equal(a, b) for a, b in zip(tables(first), tables(other), strict=True))
    for weights in ((0.5, 0.5), (0.999, 0.001)):
        a, b = first.state_dict(), other.state_dict()
        mixed = {key: weights[0] * a[key] + weights[1] * b[key] for key in a}
        with pytest.raises(LcnnError, match="average over layers with different index tables"):
            copy.deepcopy(first).load_state_dict(mixed)
        without = {key: value for key, value in mixed.items() if "checksum" not in key}
        with pytest.raises(LcnnError, match="no integers"):
            copy.deepcopy(first).load_state_dict(without)
    for options in ({"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.9999)}, {"use_buffers": True}, {}):
        average = AveragedModel(first, **options)
        average.update_parameters(first)
        average.module.eval()(x)
        average.update_parameters(other)
        with pytest.raises(LcnnError, match="only copies of one converted model"):
            average.module.eval()(x)
        with pytest.raises(LcnnError, match="only copies of one converted model"):
            average.module[0].dense_weight()


def test_tables_written_in_place_and_tables_replaced():
    layer, x = LookupConv2d(8, 6, 3, dictionary_size=4, sparsity=1), torch.randn(1, 8, 5, 5)
    mirrored = 3 - layer.indices
    want = copy.deepcopy(layer)
    want.dictionary.data = want.dictionary.data.flip(1)
    layer.indices = mirrored
    torch.testing.assert_close(layer(x), want(x))
    layer.indices[0] = (layer.indices[0] + 1) % 4
    with pytest.raises(LcnnError, match="LookupConv2d: the index tables"):
        layer(x)
    with pytest.raises(LcnnError, match=r"indices is torch\.int64"):
        layer.indices = mirrored.long()


def test_state_and_pickle_of_the_first_version(tmp_path):
    layer, x = LookupConv2d(8, 6, 3, dictionary_size=4), torch.randn(1, 8, 5, 5)
    old = {key: value for key, value in layer.state_dict().items() if key != "table_checksum"}
    fresh = LookupConv2d(8, 6, 3, dictionary_size=4)
    fresh.load_state_dict(old)
    assert torch.equal(fresh(x), layer(x))
    # The first version kept tables as buffers, and had no checksum.
    state = pickle.loads(pickle.dumps(layer)).__dict__
    state["_buffers"] = {name: state.pop(name) for name in TABLES}
    again = LookupConv2d.__new__(LookupConv2d)
    again.__setstate__(state)
    assert torch.equal(again(x), layer(x))
    assert not set(TABLES) & set(dict(again.named_buffers()))
    with pytest.raises(RuntimeError, match=r"Missing key.*filters"):
        fresh.load_state_dict({key: value for key, value in old.items() if key != "filters"})
    with pytest.raises(LcnnError, match="indices range from"):
        fresh.load_state_dict({**old, "indices": old["indices"] + 9})
    with pytest.raises(RuntimeError, match="size mismatch for offsets"):
        fresh.load_state_dict({**old, "offsets": old["offsets"][:-1]})


@pytest.mark.parametrize("assign", [False, True])
def test_state_into_a_layer_without_memory(assign):
    layer, x = LookupConv2d(8, 6, 3, dictionary_size=4), torch.randn(1, 8, 5, 5)
    empty = copy.deepcopy(layer).to(device="meta")
    assert {tensor.device.type for tensor in (*empty.parameters(), *empty.buffers(), empty.indices)} == {"meta"}
    if not assign:
        empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(empty(x), layer(x))


def test_tables_go_where_the_module_goes_and_stay_integers():
    layer = LookupConv2d(8, 6, 3, dictionary_size=4)
    for change in (lambda m: m.half(), lambda m: m.double(), lambda m: m.type(torch.float64), lambda m: m.to(torch.bfloat16)):
        moved = change(copy.deepcopy(layer))
        assert moved.dictionary.dtype != torch.float32
        assert {getattr(moved, name).dtype for name in TABLES} == {torch.int32}
        assert moved(torch.randn(1, 8, 5, 5).to(moved.dictionary.dtype)).dtype == moved.dictionary.dtype
    layer.share_memory()
    assert all(getattr(layer, name).is_shared() for name in TABLES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_checksums_survive_rounding_and_show_mixtures(dtype):
    numbers = [0, 1, 2**32 - 1, 0x12345678]
    for number in numbers:
        assert decode(encode(number).to(dtype)) == number
        assert decode((encode(number).to(dtype) * 3) / 3) == number
        for other in numbers:
            if other != number:
                assert decode(encode(number).double().lerp(encode(other).double(), 1e-6)) is None
