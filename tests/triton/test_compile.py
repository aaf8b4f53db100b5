"""Every kernel configuration, compiled for GPUs that are not there: registers, spills, and the width of global accesses."""

import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))

from emulate import compiling, resources

from lcnn_compile.kernels.arguments import Epilogue, Geometry
from lcnn_compile.kernels.triton import backward as triton_backward
from lcnn_compile.kernels.triton import tune as triton_tune
from lcnn_compile.kernels.triton.dictionary import empty_planes, launch_dictionary
from lcnn_compile.kernels.triton.forward import precision
from lcnn_compile.kernels.triton.grouped import launch_grouped
from lcnn_compile.kernels.triton.lookup import launch_lookup
from lcnn_compile.kernels.triton.pack import pack, sizes_of
from lcnn_compile.kernels.triton.permute import launch_permute
from lcnn_compile.lookup import LookupWeight, filter_table

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.filterwarnings("ignore:.*fill_uninitialized"),
]

CAPABILITIES = [80, 90, 100]
DTYPES = [torch.float16, torch.float32]
FORMATS = [torch.contiguous_format, torch.channels_last]
MATRIX = {80: {"HMMA"}, 90: {"HGMMA", "HMMA"}, 100: {"UTCHMMA", "HMMA"}}


@pytest.fixture(autouse=True)
def _float32_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Layer:
    """A 3x3 layer, 128 to 128 channels on 16x16, and what its launchers take."""

    def __init__(self, group_size, dtype, format, vectors=64, taps=48, size=(16, 16)):
        count = 128 // group_size
        weight = LookupWeight(
            dictionary=torch.zeros(1, vectors, 128, dtype=dtype),
            coefficients=torch.zeros(count * taps, group_size, dtype=dtype),
            indices=torch.zeros(count * taps, dtype=torch.int32),
            positions=torch.zeros(count * taps, dtype=torch.int32),
            offsets=torch.arange(count + 1, dtype=torch.int32) * taps,
            filters=filter_table(128, group_size),
            kernel_size=(3, 3),
        )
        self.packed = pack(weight.operands(), 3)
        self.where = sizes_of(size, Geometry(128, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)), dtype.itemsize)
        self.x = torch.zeros(2, 128, *size, dtype=dtype).contiguous(memory_format=format)
        self.y = torch.zeros_like(self.x)
        self.s = empty_planes(self.x, vectors, 2, self.where)
        self.digits = precision(dtype)

    def epilogue(self, full):
        bias = torch.zeros(128, dtype=self.x.dtype)
        return Epilogue(bias, torch.zeros_like(self.y) if full else None, "silu" if full else "relu", full)


def test_shifted_copies_are_stored_along_pixels():
    """A warp writes 32 neighbouring pixels of a plane at a time; along planes the same stores took nine times as long."""
    for format in FORMATS:
        layer = Layer(1, torch.float16, format)
        with compiling(90) as kernels:
            config = triton_tune.dictionary_configs(64, 2)[0]
            launch_dictionary(layer.x, layer.packed.dictionary, layer.s, 1, layer.where, layer.digits, config)
        (kernel,) = kernels
        (name,) = re.findall(r"tt\.store .*!tt\.ptr<f16>, #(\w+)>", kernel.asm["ttgir"])
        (layout,) = re.findall(rf"^#{name} = .*threadsPerWarp = \[(\d+, \d+)\]", kernel.asm["ttgir"], re.M)
        assert layout == "1, 32"


@pytest.mark.parametrize("capability", [80, 90])
def test_lookups_start_before_their_dictionary_ends(capability):
    """Programmatic dependent launch, which only Hopper and later have; whoever starts early must wait before it reads S."""
    layer = Layer(64, torch.float16, FORMATS[1])
    config = triton_tune.guess(layer.x, layer.packed, 1)
    with compiling(capability) as kernels:
        launch_dictionary(layer.x, layer.packed.dictionary, layer.s, 1, layer.where, layer.digits, config.dictionary)
        tail = (layer.packed, layer.y, layer.epilogue(False), layer.where, layer.digits, config.lookups)
        launch_grouped(layer.s, *tail)
    dictionary, lookups = (kernel.asm["ptx"] for kernel in kernels)
    early = capability >= 90
    assert ("griddepcontrol.launch_dependents" in dictionary) == early
    assert kernels[1].metadata.launch_pdl == early
    if early:
        body = lookups.split("griddepcontrol.wait")
        assert len(body) == 2
        assert "cp.async" not in body[0]
        assert "cp.async" in body[1]


def compiled(capability, launch, *args):
    """Resources of the one kernel that this launch compiles; it must not spill, and must fit a multiprocessor."""
    with compiling(capability) as kernels:
        launch(*args)
    (kernel,) = kernels
    found = resources(kernel)
    assert found["STACK"] == 0, found
    assert found["spills"] == 0, found
    assert found["REG"] * 32 * kernel.metadata.num_warps <= 65536, found
    assert found["smem"] <= (163 if capability == 80 else 227) * 1024, found
    return found


@pytest.mark.parametrize("format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_dictionary(capability, dtype, index, format):
    configs = triton_tune.dictionary_configs(64, dtype.itemsize)
    if index >= len(configs):
        pytest.skip("fewer configurations for this element size")
    layer = Layer(1, dtype, format)
    args = (layer.x, layer.packed.dictionary, layer.s, 1, layer.where, layer.digits, configs[index])
    found = compiled(capability, launch_dictionary, *args)
    assert set(found["async"]) == {16}, found
    assert not found["load"], found
    assert set(found["matrix"]) & MATRIX[capability], found


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_lookups(capability, dtype, index):
    config = triton_tune.lookup_configs(dtype.itemsize)[index]
    layer = Layer(1, dtype, FORMATS[index % 2])
    args = (layer.s, layer.packed, layer.y, layer.epilogue(index == 0), layer.where, config)
    found = compiled(capability, launch_lookup, *args)
    vectors = config.block_filters * config.block_pixels * dtype.itemsize // 16 // (32 * config.warps)
    assert found["load"][16] >= vectors * config.unroll, found
    assert found["load"].get(2, 0) + found["load"].get(4, 0) <= 4 * config.block_filters, found
    assert min(found["store"]) >= 8, found


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_grouped(capability, dtype, group_size, index):
    configs = triton_tune.grouped_configs(group_size, dtype.itemsize)
    if index >= len(configs):
        pytest.skip("fewer configurations for this element size")
    config = configs[index]
    layer = Layer(group_size, dtype, FORMATS[index % 2])
    args = (layer.s, layer.packed, layer.y, layer.epilogue(index == 0), layer.where, layer.digits, config)
    found = compiled(capability, launch_grouped, *args)
    vectors = config.block_taps * config.block_pixels * dtype.itemsize // 16 // (32 * config.warps)
    assert found["async"][16] >= vectors, found
    assert sum(found["load"].values()) <= 24, found
    assert set(found["matrix"]) & MATRIX[capability], found
    assert set(found["store"]) == {16}, found


@pytest.mark.parametrize("group_size", [1, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gradient_of_coefficients(capability, dtype, group_size):
    layer = Layer(group_size, dtype, FORMATS[0])
    dictionary = triton_tune.dictionary_configs(64, dtype.itemsize)[0]

    def launch():
        triton_backward.coefficient_gradient(layer.y, layer.x, layer.packed, 1, layer.where, dictionary)

    with compiling(capability) as kernels:
        launch()
    found = resources(kernels[-1])
    assert found["STACK"] == found["spills"] == 0, found
    assert found["async"][16] >= 4, found
    assert set(found["matrix"]) & MATRIX[capability], found


@pytest.mark.parametrize("index", range(2))
def test_small_groups_store_whole_vectors_of_channels(index):
    """Groups of 8, half of a product's rows, in all configurations of both forms."""
    layer = Layer(8, torch.float16, FORMATS[1])
    config = triton_tune.grouped_configs(8, 2)[index]
    args = (layer.s, layer.packed, layer.y, layer.epilogue(index == 0), layer.where, layer.digits, config)
    found = compiled(90, launch_grouped, *args)
    assert set(found["store"]) == {16}, found
    assert found["async"][16] >= 4, found


@pytest.mark.parametrize("precise", ["bfloat16", "tf32"])
@pytest.mark.parametrize("group_size", [1, 8, 64])
def test_bfloat16_and_tf32(group_size, precise, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precise == "tf32")
    dtype = torch.float32 if precise == "tf32" else torch.bfloat16
    layer = Layer(group_size, dtype, FORMATS[1])
    assert layer.digits == ("tf32" if precise == "tf32" else "ieee")
    config = triton_tune.guess(layer.x, layer.packed, 1)
    args = (layer.x, layer.packed.dictionary, layer.s, 1, layer.where, layer.digits, config.dictionary)
    found = compiled(90, launch_dictionary, *args)
    assert set(found["async"]) == {16}, found
    assert found["matrix"], found
    tail = (layer.packed, layer.y, layer.epilogue(True), layer.where)
    if group_size == 1:
        found = compiled(90, launch_lookup, layer.s, *tail, config.lookups)
        assert found["load"][16] >= config.lookups.block_filters, found
    else:
        found = compiled(90, launch_grouped, layer.s, *tail, layer.digits, config.lookups)
        assert found["async"][16] >= 4, found
        assert found["matrix"], found
    with compiling(90) as kernels:
        triton_backward.coefficient_gradient(layer.y, layer.x, layer.packed, 1, layer.where, config.dictionary)
    found = resources(kernels[-1])
    assert found["STACK"] == found["spills"] == 0, found
    assert found["matrix"], found


@pytest.mark.parametrize("group_size", [1, 64])
def test_offsets_in_s_take_64_bits_where_an_image_has_2_to_the_31_elements(group_size, monkeypatch):
    """As numbers in the kernel, and as the tests of values pretend: S of one image alone is over the limit."""
    layer = Layer(group_size, torch.float16, FORMATS[1])
    config = triton_tune.guess(layer.x, layer.packed, 1).lookups
    widths = []
    for limit in (2**31, 1):
        monkeypatch.setattr(sys.modules["lcnn_compile.kernels.triton.tiles"], "INT32", limit)
        tail = (layer.packed, layer.y, layer.epilogue(False), layer.where)
        with compiling(90) as kernels:
            if group_size == 1:
                launch_lookup(layer.s, *tail, config)
            else:
                launch_grouped(layer.s, *tail, layer.digits, config)
        loads = re.findall(r"tt\.addptr %p_s\S*, \S+ : tensor<\S+, tensor<\S+x(i\d+)>", kernels[0].asm["ttir"])
        loads += re.findall(r"tt\.addptr .* : tensor<\d+x\d+x!tt\.ptr<f16>>, tensor<\d+x\d+x(i\d+)>", kernels[0].asm["ttir"])
        widths.append(loads[0])
        assert resources(kernels[0])["spills"] == 0
    assert widths == ["i32", "i64"]


@pytest.mark.parametrize("group_size", [1, 64])
def test_strides_over_32_bits_are_passed_as_64(group_size):
    """Inputs and outputs of more than 2^31 elements: a stride itself may not fit 32 bits, and products of strides never wrap."""
    layer = Layer(group_size, torch.float16, FORMATS[0])
    layer.x = torch.empty(3, 128, 16, 16, dtype=torch.float16, device="meta").as_strided((3, 128, 16, 16), (2**31, 256, 16, 1))
    layer.y = torch.empty(3, 128, 16, 16, dtype=torch.float16, device="meta").as_strided((3, 128, 16, 16), (2**31, 256, 16, 1))
    config = triton_tune.guess(layer.x, layer.packed, 1)
    s = torch.empty(3 * layer.where.image(64), dtype=torch.float16, device="meta")
    with compiling(90) as kernels:
        launch_dictionary(layer.x, layer.packed.dictionary, s, 1, layer.where, layer.digits, config.dictionary)
        tail = (layer.packed, layer.y, layer.epilogue(False), layer.where)
        if group_size == 1:
            launch_lookup(s, *tail, config.lookups)
        else:
            launch_grouped(s, *tail, layer.digits, config.lookups)
    for kernel, stride in zip(kernels, ("x_n", "y_n"), strict=True):
        assert f"%{stride}: i64" in kernel.asm["ttir"]
        assert not re.search(rf"arith\.trunci.*%{stride}", kernel.asm["ttir"])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_permutation_of_channels(capability):
    layer = Layer(64, torch.float16, FORMATS[1])
    args = (layer.x, torch.arange(128, dtype=torch.int32), layer.y, layer.epilogue(True))
    found = compiled(capability, launch_permute, *args)
    assert set(found["store"]) == {16}, found


def test_wide_loads_need_no_aligned_image():
    """On 14x14 rows are 28 bytes: S is still read 16 bytes at a time, and the output written 4."""
    layer = Layer(64, torch.float16, FORMATS[0], size=(14, 14))
    config = triton_tune.grouped_configs(64, 2)[0]
    args = (layer.s, layer.packed, layer.y, layer.epilogue(False), layer.where, layer.digits, config)
    found = compiled(90, launch_grouped, *args)
    assert found["async"][16] >= 4, found
    assert set(found["store"]) == {4}, found
