"""LookupConfig and the rules that choose layers."""

import numpy as np
import pytest
from torch import nn

from lcnn_compile import LcnnError, LookupConfig
from lcnn_compile.conversion.selection import check_rules, layer_config, matches, select


def test_defaults_are_the_documented_ones():
    config = LookupConfig()
    assert (config.dictionary_size, config.sparsity, config.group_size) == (0.25, 6, 8)
    assert (config.max_error, config.target_speedup, config.lowering) == (None, None, "auto")


@pytest.mark.parametrize(
    "bad",
    [
        {"dictionary_size": 0},
        {"dictionary_size": 1.01},
        {"dictionary_size": True},
        {"dictionary_size": "big"},
        {"sparsity": -1},
        {"sparsity": float("nan")},
        {"group_size": 1.5},
        {"max_error": -0.1},
        {"max_output_error": 0},
        {"max_output_error": float("nan")},
        {"max_output_error": "0.1"},
        {"target_speedup": 1},
        {"lowering": "quick"},
        {"include": 3},
        {"include": ("",)},
        {"layers": {"a": {"sizes": 3}}},
        {"layers": {"a": {"group_size": 0}}},
        {"layers": ["a"]},
        {"seed": -1},
        {"seed": 2**64},
        {"sparsity": 10**400},
        {"max_error": -(10**400)},
        {"target_speedup": 10**400},
        {"target_speedup": float("inf")},
        {"dictionary_size": float("nan")},
        {"dictionary_size": np.array([1, 2])},
        {"dictionary_size": np.array("auto")},
        {"sparsity": np.array([1, 2])},
        {"lowering": np.array(["auto", "lookup"])},
        {"lowering": ["auto"]},
        {"include": np.array(3)},
        {"exclude": object()},
        {"layers": {"a": 3}},
        {"layers": {"a": None}},
        {"layers": {"a": {3: 4, "x": 5}}},
        {"layers": {"a": {"sparsity": 10**400}}},
    ],
)
def test_bad_values_name_the_field(bad):
    with pytest.raises(LcnnError, match=next(iter(bad))):
        LookupConfig(**bad)


def test_json_round_trip():
    config = LookupConfig(include=(nn.Conv2d, "a.*"), exclude="b", layers={"re:a.*": {"dictionary_size": 4}}, max_error=0.1)
    again = LookupConfig.from_json(config.to_json())
    assert again.to_json() == config.to_json()
    assert again.include == ("type:torch.nn.modules.conv.Conv2d", "a.*")
    with pytest.raises(LcnnError, match="dictionary_sizes"):
        LookupConfig.from_json('{"dictionary_sizes": 4}')
    for text in ("", "[]", "{", None, b"\xff", "[" * 100_000, '{"seed": ' + "1" * 5000 + "}", '{"layers": {"a": 3}}'):
        with pytest.raises(LcnnError):
            LookupConfig.from_json(text)
    for values in (None, [], 3):
        with pytest.raises(LcnnError):
            LookupConfig.from_dict(values)


def test_sizes():
    config = LookupConfig()
    assert [config.vectors(m) for m in (1, 3, 64, 512)] == [1, 1, 16, 128]
    assert config.replace(dictionary_size=100).vectors(64) == 64
    assert config.taps_per_filter(16, 9) == 54
    assert config.replace(sparsity=1.5).taps_per_filter(16, 9) == 14
    assert config.replace(sparsity=None).taps_per_filter(16, 9) == 144
    assert config.taps_per_filter(2, 9) == 18
    assert config.replace(sparsity=1e308).taps_per_filter(16, 9) == 144
    assert config.replace(sparsity=1e-9).taps_per_filter(16, 9) == 1


class Special(nn.Conv2d):
    pass


LAYERS = {
    "stem": nn.Conv2d(3, 8, 3),
    "layer1.0.conv": Special(8, 8, 3),
    "layer1.1.conv": nn.Conv2d(8, 8, 1),
    "fc": nn.Linear(8, 2),
}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("stem", ["stem"]),
        ("layer1.*", ["layer1.0.conv", "layer1.1.conv"]),
        (r"re:layer1\.\d\.conv", ["layer1.0.conv", "layer1.1.conv"]),
        ("re:layer1", []),
        (nn.Conv2d, ["stem", "layer1.0.conv", "layer1.1.conv"]),
        (Special, ["layer1.0.conv"]),
        ("type:torch.nn.modules.conv.Conv2d", ["stem", "layer1.0.conv", "layer1.1.conv"]),
    ],
)
def test_rules(rule, expected):
    assert [name for name, layer in LAYERS.items() if matches(rule, name, layer)] == expected


def test_selection():
    assert [n for n, reason in select(LookupConfig(), LAYERS).items() if not reason] == ["stem", "layer1.0.conv", "layer1.1.conv"]
    config = LookupConfig(include=("layer1.*", "fc"), exclude=("*.1.*",))
    assert select(config, LAYERS) == {"stem": "not included", "layer1.0.conv": "", "layer1.1.conv": "excluded", "fc": ""}
    config = LookupConfig(layers={"layer1.*": {"group_size": 4}, Special: {"group_size": 2, "sparsity": 3}})
    assert [layer_config(config, n, layer).group_size for n, layer in LAYERS.items()] == [8, 2, 4, 8]
    assert layer_config(config.replace(target_speedup=4.0), "stem", LAYERS["stem"]).automatic


@pytest.mark.parametrize(
    "change", [{"include": ("layr1",)}, {"exclude": ("x*",)}, {"layers": {"re:z": {}}}, {"include": ("re:(",)}]
)
def test_a_rule_that_matches_nothing_is_an_error(change):
    with pytest.raises(LcnnError, match=r"matches no layer|regular expression"):
        check_rules(LookupConfig(**change), LAYERS)
