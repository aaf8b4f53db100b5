"""torch.compile(backend="lcnn"): by name, self-calibrating, never stale, in inference and training."""

import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from nets import Functional, SmallResNet, Untraceable, pictures, randomise
from torch import nn

from lcnn_compile import LcnnError, LcnnWarning, LookupConfig, LookupConv2d, convert
from lcnn_compile.backend.graphs import bind_weights, weight_placeholders
from lcnn_compile.testing import assert_equivalent

pytestmark = pytest.mark.usefixtures("backend_reset")
SMALL = LookupConfig(dictionary_size=3, sparsity=2, group_size=4)
LOSSLESS = {"dictionary_size": 1.0, "sparsity": None}


def converted(factory=SmallResNet):
    return convert(randomise(factory()), SMALL, calibration=[pictures(4)])


def frames():
    return torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)


def test_it_is_found_without_importing_the_package():
    program = "import torch; assert 'lcnn' in torch.compiler.list_backends(exclude_tags=()), torch.compiler.list_backends()"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("factory", [SmallResNet, Functional])
def test_converted_model(factory):
    model = converted(factory)
    compiled = torch.compile(model, backend="lcnn")
    for x in (pictures(2), pictures(2), pictures(3, 21), pictures(1, 24)):
        assert_equivalent(model, compiled, x, factor=32)


def test_converted_model_with_control_flow():
    model = converted(Untraceable)
    assert_equivalent(model, torch.compile(model, backend="lcnn"), pictures(2), factor=64)


def test_module_compile_keeps_names():
    model = converted()
    keys = list(model.state_dict())
    original = copy.deepcopy(model)
    model.compile(backend="lcnn")
    x = pictures(2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), original(x))
    assert list(model.state_dict()) == keys


def test_dynamic_sizes_do_not_recompile_per_shape():
    model = converted()
    compiled = torch.compile(model, backend="lcnn")
    with torch.no_grad():
        compiled(pictures(2, 16))
        compiled(pictures(3, 18))
        before = frames()
        for n, size in ((4, 20), (5, 23), (2, 33), (7, 12)):
            x = pictures(n, size)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
    assert frames() - before <= 1


def updates(model, other):
    """Every way to change weights, each followed by the model's new function."""
    with torch.no_grad():
        model.layers[0].conv1.coefficients.mul_(1.5)
        yield "in place"
        model.layers[0].bn1.running_mean.add_(0.1)
        yield "statistics in place"
        model.layers[0].bn1.weight.data = torch.rand_like(model.layers[0].bn1.weight)
        yield "data assigned"
        model.load_state_dict(other)
        yield "load_state_dict"
        model.load_state_dict({key: value.clone() for key, value in other.items()}, assign=True)
        yield "assign=True"
        model.layers[0].conv2.dictionary = nn.Parameter(torch.randn_like(model.layers[0].conv2.dictionary))
        yield "parameter replaced"
        model.layers[1].bn1.weight.mul_(-1)
        yield "in place after replacement"


def test_never_stale_and_no_recompile():
    model = converted()
    other = {key: value.clone() for key, value in model.state_dict().items()}
    other["layers.1.bn2.bias"] += 1
    compiled = torch.compile(model, backend="lcnn")
    x = pictures(2)
    with torch.no_grad():
        compiled(x)
        before = frames()
        for how in updates(model, other):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4, msg=how)
    assert frames() == before


def test_dense_model_calibrates_itself(caplog):
    model = randomise(SmallResNet())
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    x = pictures(4)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        for batch in (x, pictures(4)):
            torch.testing.assert_close(compiled(batch), model(batch), atol=1e-4, rtol=1e-4)
    reports = [
        record.message for record in caplog.records if "layers replaced" in record.message and record.levelname == "WARNING"
    ]
    assert len(reports) == 1
    assert "layers.0.conv1" in reports[0]


def test_dense_model_within_max_error():
    model = randomise(SmallResNet())
    x = pictures(16)
    with torch.no_grad():
        tight = torch.compile(copy.deepcopy(model), backend="lcnn", options={"max_error": 1e-3})
        loose = torch.compile(copy.deepcopy(model), backend="lcnn", options={"dictionary_size": 2, "sparsity": 1})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LcnnWarning)
            distance = [float((f(x), f(x))[1].sub(model(x)).norm() / model(x).norm()) for f in (tight, loose)]
    assert 3 * distance[0] < distance[1]
    assert distance[0] < 0.02


def test_calibration_batches_and_degenerate_ones():
    model = randomise(SmallResNet())
    compiled = torch.compile(model, backend="lcnn", options={"dictionary_size": 2, "sparsity": 1, "calibration_batches": 2})
    x = pictures(4)
    with torch.no_grad():
        for batch in (torch.zeros(4, 3, 16, 16), x, torch.full((4, 3, 16, 16), 0.5), x):
            assert torch.equal(compiled(batch), model(batch))
        assert not torch.equal(compiled(x), model(x))


def test_changed_dense_weights_are_learned_again():
    model = randomise(SmallResNet())
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    x = pictures(4)
    with torch.no_grad():
        for _ in range(2):
            compiled(x)
        model.layers[0].conv1.weight.mul_(-1)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
        model.layers[0].bn1.bias.add_(1)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


def test_inference_mode():
    model = randomise(SmallResNet())
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    x = pictures(4)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


def test_training_a_dense_model_is_left_dense_with_one_warning():
    model = randomise(SmallResNet()).train()
    compiled = torch.compile(model, backend="lcnn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            compiled(pictures(4)).square().mean().backward()
    assert sum("need gradients" in str(w.message) for w in caught) == 1
    assert all(p.grad is not None for p in model.parameters())


def test_training_a_converted_model():
    model = converted().train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="lcnn")
    x = pictures(4)
    for f in (compiled, twin):
        f(x).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_train_and_eval_and_grad_mode_switches():
    model = converted()
    compiled = torch.compile(model, backend="lcnn")
    x = pictures(4)
    for _ in range(2):
        model.train()
        compiled(x).sum().backward()
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)
        assert compiled(x).requires_grad


def test_autocast_and_channels_last():
    model = converted()
    compiled = torch.compile(model, backend="lcnn")
    x = pictures(2)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(compiled(x), model(x), atol=0.1, rtol=0.1)
        last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(compiled(last), model(last), atol=1e-4, rtol=1e-4)


def test_threads_call_one_compiled_model():
    model = converted()
    compiled = torch.compile(model, backend="lcnn")
    batches = [pictures(2) for _ in range(4)]
    with torch.no_grad():
        compiled(batches[0])
        expected = [model(x) for x in batches]
    failures = []

    def work(x, y):
        with torch.no_grad():
            for _ in range(10):
                if not torch.allclose(compiled(x), y, atol=1e-4):
                    failures.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_shared_and_looped_convolutions():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            for _ in range(3):
                x = torch.relu(self.conv(x)) + x
            return x

    model = Net().eval()
    compiled = torch.compile(model, backend="lcnn", options=LOSSLESS)
    x = pictures(2, 9, 8)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [LOSSLESS, None])
def test_two_models_with_the_same_names_in_one_graph(options):
    one, two = (converted() if options is None else randomise(SmallResNet()) for _ in range(2))
    listed = [nn.Conv2d(3, 10, 16), nn.Conv2d(3, 10, 16)]

    def function(x):
        return one(x) - 2 * two(x) + listed[0](x).flatten(1) * listed[1](x).flatten(1)

    compiled = torch.compile(function, backend="lcnn", options=options)
    x = pictures(2)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), function(x), atol=1e-4, rtol=1e-4)


def test_weights_keep_their_names_and_those_of_their_objects_where_there_are_several():
    class Net(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.layer = name
            setattr(self, name, nn.Conv2d(3, 4, 3, bias=False))

        def forward(self, x):
            return getattr(self, self.layer)(x)

    def names_of(one, two):
        found = []

        def backend(gm, inputs):
            found.extend(bind_weights(gm, inputs, weight_placeholders(gm, inputs)).state_dict())
            return gm.forward

        torch.compiler.reset()
        torch.compile(lambda x: one(x) + two(x), backend=backend)(torch.randn(1, 3, 8, 8))
        return found

    alone, other = Net("a"), Net("b")
    assert names_of(alone, alone) == ["a.weight"]
    first, second = names_of(alone, other)
    assert first.endswith(".a.weight")
    assert second.endswith(".b.weight")
    assert first.split(".")[0] != second.split(".")[0]


def test_another_parameter_over_the_same_memory_is_noticed():
    model, x = converted(), pictures(2)
    layer = next(m for m in model.modules() if isinstance(m, LookupConv2d))
    compiled = torch.compile(model, backend="lcnn")
    with torch.no_grad():
        compiled(x)
        layer.coefficients.data.mul_(2)  # which nothing can notice
        layer.coefficients = nn.Parameter(layer.coefficients.data)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


def test_a_graph_without_convolutions_and_nothing_gained():
    with torch.no_grad(), pytest.warns(LcnnWarning, match="replaced nothing"):
        torch.compile(nn.Linear(4, 4), backend="lcnn")(torch.randn(2, 4))
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU())
    compiled = torch.compile(model, backend="lcnn")
    x = pictures(2, 9, 8)
    with torch.no_grad():
        with pytest.warns(LcnnWarning, match="depthwise"):
            compiled(x)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dictionary_sizes": 3}, "dictionary_sizes"),
        ({"calibration_batches": 0}, "calibration_batches"),
        ({"group_size": -1}, "group_size"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(Exception, match=message) as caught:
        torch.compile(SmallResNet().eval(), backend="lcnn", options=options)(pictures(1))
    assert isinstance(caught.value, LcnnError) or isinstance(getattr(caught.value, "inner_exception", None), LcnnError)


def test_modes():
    model = converted()
    x = pictures(2)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, backend="lcnn", mode="reduce-overhead")(x), model(x), atol=1e-4, rtol=1e-4
        )


def test_fixed_lowerings_are_obeyed():
    x = pictures(2)
    for lowering in ("lookup", "factored", "dense"):
        model = convert(randomise(SmallResNet()), SMALL.replace(lowering=lowering), calibration=[pictures(4)])
        assert {m.lowering for m in model.modules() if isinstance(m, LookupConv2d)} == {lowering}
        torch.compiler.reset()
        assert_equivalent(model, torch.compile(model, backend="lcnn"), x, factor=64)


@pytest.mark.usefixtures("backend_reset")
def test_what_was_compiled_for_other_code_of_the_operators_is_not_taken_from_the_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters = torch._dynamo.utils.counters["aot_autograd"]
    found = []
    for digest in ("one", "one", "other"):
        monkeypatch.setattr("lcnn_compile.torch_private._source_digest", lambda digest=digest: digest)
        torch.compiler.reset()
        counters.clear()
        torch.manual_seed(0)
        layer = LookupConv2d(4, 8, 3, dictionary_size=2, sparsity=1, lowering="lookup")
        torch.compile(layer, backend="lcnn")(torch.ones(1, 4, 9, 9)).sum().backward()
        found.append((counters["autograd_cache_hit"], counters["autograd_cache_miss"]))
    assert found == [(0, 1), (1, 0), (0, 1)]
