"""Model files that nobody exported: whatever a stranger writes is refused with a reason, and reads nothing that is not the model's."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "native"))
from model_file import ARENA, Call, ModelFile, Value, geometry, lookup_weight, structure, word_of

from lcnn_compile.errors import ExportError
from lcnn_compile.export import load_native
from lcnn_compile.export.native import _checked
from lcnn_compile.kernels import cpu
from lcnn_compile.kernels.cpu import byte_steps, convolutions, elementwise, moves, reductions, resampling, serial, step, windows
from lcnn_compile.kernels.cpu.build import shared_library
from lcnn_compile.kernels.cpu.sources import FOLDER, NATIVE

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="the C++ kernels are unavailable")
BIG = 1 << 31


def copied(x=0, y=1, count=8, **changed):
    """A copy of `count` elements an image."""
    fields = {"sizes": [1, 1, 1, 1, 1, count], "to": [0, 0, 0, 0, 0, 1], "bytes": 4} | changed
    source = fields.pop("source", [0, 0, 0, 0, 0, 1])
    made = structure(moves._Move, **fields, **{"from": source})
    return Call(step.MOVE, made, y, [x])


def refusal(file, tmp_path):
    """Why a file is refused."""
    folder = file.write(tmp_path)
    with pytest.raises(ExportError) as error:
        load_native(folder)
    return str(error.value)


def test_the_plain_file_is_taken(tmp_path):
    native = load_native(ModelFile([copied()], [Value(0, 8), Value(1, 8)], batch=1).write(tmp_path))
    assert torch.equal(native(torch.arange(8.0).view(1, 8)), torch.arange(8.0).view(1, 8))


def pooling(**changed):
    fields = {
        "planes": 1, "height": 2, "width": 4, "out_height": 2, "out_width": 4, "kernel": [1, 1], "stride": [1, 1],
        "dilation": [1, 1], "lanes": 1,
    } | changed  # fmt: skip
    made = structure(windows._Pool, images=1, x_image=8, y_image=8)
    made.pool = structure(windows.Pooling, **fields)
    return ModelFile([Call(step.POOL, made, 1, [0])], [Value(0, 8), Value(1, 8)])


def depthwise(**changed):
    fields = {
        "images": 1, "channels": 1, "multiplier": 1, "height": 2, "width": 4, "out_height": 2, "out_width": 4, "kernel": [1, 1],
        "stride": [1, 1], "dilation": [1, 1], "x_image": 8, "y_image": 8,
    } | changed  # fmt: skip
    made = structure(convolutions._Depthwise, **fields)
    table = {word_of(convolutions._Depthwise, "weight"): torch.ones(int(np.prod(fields["kernel"])))}
    return ModelFile([Call(step.DEPTHWISE, made, 1, [0], table)], [Value(0, 8), Value(1, 8)])


def lookup(weight=None, pool=(), y=8, **changed):
    made = structure(convolutions._LookUp)
    out = (changed.pop("out_height", 1), changed.pop("out_width", 8))
    plan = (0, geometry(1, 8, 1, 1, *out, **changed), pool)
    call = Call(step.LOOK_UP, made, 1, [0], plan=0)
    return ModelFile([call], [Value(0, 8), Value(1, y)], weights=[weight or lookup_weight(1, 1)], plans=[plan], outputs=((y,),))


def pool_words(**changed):
    fields = {
        "planes": 1, "height": 1, "width": 8, "out_height": 1, "out_width": 4, "kernel0": 1, "kernel1": 2, "stride0": 1, "stride1": 2,
        "top": 0, "left": 0, "mean": 0, "lanes": 1, "dilation0": 1, "dilation1": 1,
    }  # fmt: skip
    return list((fields | changed).values())


def test_sound_steps_are_taken(tmp_path):
    for i, file in enumerate((pooling(), depthwise(), lookup(), lookup(pool=pool_words(), y=4, out_image=4))):
        load_native(file.write(tmp_path / str(i)))


@pytest.mark.parametrize(
    ("file", "why"),
    [
        # Each of these products leaves 64 bits where a kernel asks for room: what it got was smaller than what it wrote.
        (lambda: pooling(kernel=[1, BIG], dilation=[1, BIG]), "pooling has impossible sizes"),
        (lambda: pooling(out_width=1, out_height=8, stride=[1, BIG]), "pooling has impossible sizes"),
        (lambda: depthwise(kernel=[2, 1], dilation=[BIG - 65, 1], stride=[1, BIG], out_width=1, out_height=8), "depthwise"),
        (lambda: depthwise(stride=[1, BIG], out_width=1, out_height=8), "depthwise"),
        (lambda: lookup(stride_n=1 << 40, batch=BIG), "convolution has impossible sizes"),
        (lambda: lookup(batch=0), "convolution has impossible sizes"),
        (lambda: lookup(stride1=BIG, out_width=1), "convolution has impossible sizes"),
        # A band has no room for the rows of a dilated window, and none for several images.
        (
            lambda: lookup(pool=pool_words(dilation1=2, out_width=3, stride1=2), y=3, out_image=3),
            "pooling is none that it can do",
        ),
        (lambda: lookup(pool=pool_words(width=16), y=4, out_image=4), "pooling is of another size"),
        (lambda: lookup(pool=pool_words(planes=5), y=4, out_image=4), "pooling is of another size"),
        (lambda: lookup(pool=pool_words(lanes=16), y=4, out_image=4), "pooling has impossible sizes"),
    ],
)
def test_sizes_that_overflow(file, why, tmp_path):
    assert why in refusal(file(), tmp_path)


@pytest.mark.parametrize("part", ["dictionary", "coefficients", "indices", "positions", "offsets", "filters"])
def test_weights_out_of_range(part, tmp_path):
    wrong = {
        "dictionary": torch.ones(0),
        "coefficients": torch.ones(7),
        "indices": torch.tensor([0, 9]).byte(),
        "positions": torch.tensor([0, 1]).byte(),
        "offsets": torch.tensor([0, 3], dtype=torch.int32),
        "filters": torch.tensor([0, 7], dtype=torch.int32),
    }[part]
    assert "weight" in refusal(lookup(lookup_weight(2, 2, **{part: wrong})), tmp_path) or part == "dictionary"


def test_images_without_end(tmp_path):
    """Empty images, as many as fit a number: nothing goes over them one by one."""
    values = [Value(0, 8), Value(1, 8), Value(ARENA, 0, images=1 << 40, image=0), Value(ARENA, 1, images=1 << 34, image=1)]
    native = load_native(ModelFile([copied()], values, arena=1 << 36).write(tmp_path))
    del native
    file = ModelFile([copied(), copied(3, 1, 1)], values, arena=1 << 36)
    assert "nothing has written" in refusal(file, tmp_path)


def test_what_was_not_written_is_not_read(tmp_path):
    """An image whose middle nobody wrote, and one read across the gap behind it."""
    arena = [Value(0, 8), Value(1, 8), Value(ARENA, 8)]
    half = copied(0, 2, 4)
    assert "nothing has written" in refusal(ModelFile([half, copied(2, 1)], arena, arena=32), tmp_path)
    twos = copied(0, 2, 4, to=[0, 0, 0, 0, 0, 2])
    assert "nothing has written" in refusal(ModelFile([twos, copied(2, 1)], arena, arena=32), tmp_path)
    both = copied(0, 2, 4, to=[0, 0, 0, 0, 0, 2], to_offset=1, source=[0, 0, 0, 0, 0, -1], from_offset=7)
    native = load_native(ModelFile([twos, both, copied(2, 1)], arena, arena=32).write(tmp_path))
    assert native(torch.arange(8.0).view(1, 8)).tolist() == [[0, 7, 1, 6, 2, 5, 3, 4]]
    assert "only in part" in refusal(ModelFile([copied(0, 1, 7)], arena, arena=32), tmp_path)
    nothing = structure(reductions._Reduce, kind=0, images=0, outer=1, size=1, inner=8, x_image=8, y_image=8)
    assert "only in part" in refusal(ModelFile([Call(step.REDUCE, nothing, 1, [0])], arena[:2]), tmp_path)
    assert "only in part" in refusal(ModelFile([copied()], [Value(0, 8), Value(1, 8)], batch=2, dynamic=False), tmp_path)


def test_a_batch_that_reads_what_another_one_would_not(tmp_path):
    """Numbers grow with the batch, and with them what a step reaches: every batch is looked at."""
    made = copied(0, 2, 8)
    values = [Value(0, 8), Value(1, 8), Value(ARENA, 8)]
    native = load_native(ModelFile([made, copied(2, 1)], values, arena=(0, 32)).write(tmp_path))
    assert native(torch.ones(1, 8)).tolist() == [[1.0] * 8]
    with pytest.raises(ExportError, match="not written, or only in part"):
        native(torch.ones(2, 8))


def test_values_outside_of_their_memory(tmp_path):
    for value in (Value(ARENA, 8, offset=4), Value(ARENA, 9), Value(ARENA, 8, offset=-4), Value(ARENA, 8, offset=2), Value(1, 9)):
        why = refusal(ModelFile([copied()], [Value(0, 8), Value(1, 8), value], arena=32), tmp_path)
        assert "a value" in why
    assert "too much memory" in refusal(ModelFile([copied()], [Value(0, 8), Value(1, 8)], arena=1 << 45), tmp_path)


def test_a_name_that_ends_behind_the_file(tmp_path):
    """Cut so that the words end with the file, and the file with a page."""
    data = bytearray(ModelFile([copied()], [Value(0, 8), Value(1, 8)]).data())
    words = 64 + 8 * int(np.frombuffer(data[40:48], np.int64)[0]) * 3
    size = 4096
    name_at = words + 8 * 4  # batch, whether it is dynamic, values read, inputs
    data = data[:name_at] + bytes(size - name_at)
    data[name_at : name_at + 8] = np.int64(8 * ((size - name_at) // 8)).tobytes()
    data[name_at + 8 :] = b"x" * (size - name_at - 8)
    header = np.frombuffer(data[:64], np.int64).copy()
    header[2], header[4], header[5], header[6] = size, (size - words) // 8, 0, size
    data[:64] = header.tobytes()
    folder = ModelFile([copied()], [Value(0, 8), Value(1, 8)]).write(tmp_path)
    (folder / "model.lcnn").write_bytes(_checked(bytes(data), shared_library()))
    with pytest.raises(ExportError, match="a name is longer than the file"):
        load_native(folder)


def test_small_files_that_ask_for_much(tmp_path):
    """Each of these is some kilobytes, and made the library pack gigabytes, or look at a table again and again."""
    identity = lookup_weight(1, 1, k=1 << 16, m=1 << 16, identity=1)
    assert "more work than its size" in refusal(lookup(identity), tmp_path)
    table = {"indices": torch.zeros(1 << 20, dtype=torch.uint8), "positions": torch.zeros(1 << 20, dtype=torch.uint8)}
    one = lookup_weight(1 << 20, 1, **table)
    assert "more work than its size" in refusal(ModelFile([copied()], [Value(0, 8), Value(1, 8)], weights=[one] * 400), tmp_path)
    wide = structure(resampling._Pick, images=0, planes=1, x_plane=8, x_width=8, height=1, width=1 << 20, inner=0, inner_end=0)
    tables = {
        word_of(resampling._Pick, "rows"): torch.zeros(1, dtype=torch.int32),
        word_of(resampling._Pick, "columns"): torch.zeros(1 << 20, dtype=torch.int32),
    }
    call = Call(step.PICK, wide, 1, [0], tables)
    assert "more work than its size" in refusal(ModelFile([call] * 1000, [Value(0, 8), Value(1, 8)]), tmp_path)
    taps = {"positions": torch.arange(1 << 14).to(torch.uint16), "indices": torch.zeros(1 << 14, dtype=torch.uint8)}
    large = lookup_weight(1 << 14, 1, kernel=(128, 128), **taps)
    plan = (0, geometry(128, 128, 1, 1, 1, 1, stride0=128, stride1=128), ())
    file = ModelFile([copied()], [Value(0, 8), Value(1, 8)], weights=[large], plans=[plan] * 300)
    assert "more work than its size" in refusal(file, tmp_path)


def test_the_kinds_that_are_known(tmp_path):
    for kind in (step.TURN, len(KINDS), -1, 1 << 40):
        call = Call(kind, structure(moves._Turn, rows=2, columns=4), 1, [0])
        assert "a kind that this library does not know" in refusal(ModelFile([call], [Value(0, 8), Value(1, 8)]), tmp_path)


KINDS = {
    step.LOOK_UP: convolutions._LookUp,
    step.POOL: windows._Pool,
    step.TURN: moves._Turn,
    step.LINEAR: convolutions._Linear,
    step.MAP: elementwise.NativeMap,
    step.MOVE: moves._Move,
    step.PICK: resampling._Pick,
    step.REDUCE: reductions._Reduce,
    step.RESIZE: resampling._Resize,
    step.LOOK_UP_BYTES: byte_steps._ByteLookUp,
    step.POOL_BYTES: windows._Pool,
    step.CAST: byte_steps._Cast,
    step.DEPTHWISE: convolutions._Depthwise,
    step.MAP_BYTES: byte_steps._ByteMap,
    step.MEAN_BYTES: byte_steps._ByteMean,
}


def test_every_address_of_every_kind_is_known_to_the_check(tmp_path):
    """A word that a kernel follows as an address must never be a number of the file."""
    names = re.search(r"enum Kind : int64_t \{([^}]*)\}", (FOLDER / "program.h").read_text()).group(1).split(",")
    assert [getattr(step, name.strip()) for name in names] == sorted(KINDS)
    source = tmp_path / "addresses.cpp"
    source.write_text(
        '#include <cstdio>\n#include "check.h"\nint main() {\n'
        f"  for (int kind = 0; kind < {len(KINDS)}; ++kind)\n    for (size_t word = 0; word < 400; ++word)\n"
        '      if (lcnn::is_address(kind, word) || lcnn::is_plan(kind, word)) std::printf("%d %zu\\n", kind, word);\n}\n'
    )
    build = ["g++", "-std=c++17", "-O0", "-fopenmp", f"-I{NATIVE}", str(source), "-o", str(tmp_path / "addresses")]
    subprocess.run(build, check=True, capture_output=True)
    said = subprocess.run([tmp_path / "addresses"], check=True, capture_output=True, text=True).stdout
    found = [tuple(map(int, line.split())) for line in said.splitlines()]
    assert found == [(kind, word) for kind in sorted(KINDS) for word in sorted(serial._addresses(KINDS[kind]))]
