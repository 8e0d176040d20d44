"""GGUF: what was written is read, and damaged files are refused by name."""

import numpy as np
import pytest

from experiments.data import DataError
from experiments.models import gguf
from tests.experiments import gguf_files as files


def write(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


ENTRIES = {
    "general.architecture": (files.STRING, "llama"),
    "size": (files.U32, 7),
    "long": (files.U64, 2**40),
    "eps": (files.FLOAT, 0.5),
    "flag": (files.BOOL, True),
    "words": (files.ARRAY, (files.STRING, ["a", "ĠÜ", ""])),
    "nested": (files.ARRAY, (files.ARRAY, [(files.U32, [1, 2]), (files.U32, [])])),
}


def test_metadata_of_every_kind_come_back(tmp_path):
    read = gguf.read(write(tmp_path, files.build(ENTRIES, {})))
    assert read.metadata == {
        "general.architecture": "llama",
        "size": 7,
        "long": 2**40,
        "eps": 0.5,
        "flag": True,
        "words": ["a", "ĠÜ", ""],
        "nested": [[1, 2], []],
    }


@pytest.mark.parametrize("alignment", [32, 128])
def test_tensors_of_every_type_come_back_in_row_major_shape(tmp_path, alignment):
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(3, 5)).astype(np.float32)
    scales, offsets = rng.normal(size=(2, 6)).astype(np.float16)
    bytes_ = rng.integers(-128, 128, (6, 32))
    nibbles = rng.integers(0, 16, (6, 32))
    tensors = {
        "single": files.f32(exact[0]),
        "exact": files.f32(exact),
        "half": files.f16(exact),
        "eight": files.q8_0((3, 64), scales, bytes_),
        "four": files.q4_1((2, 96), scales, offsets, nibbles),
    }
    entries = {"general.alignment": (files.U32, alignment)}
    read = gguf.read(
        write(tmp_path, files.build(entries, tensors, alignment=alignment))
    )
    found = {name: gguf.dequantize(tensor) for name, tensor in read.tensors.items()}
    assert all(weights.dtype == np.float32 for weights in found.values())
    np.testing.assert_array_equal(found["single"], exact[0])
    np.testing.assert_array_equal(found["exact"], exact)
    np.testing.assert_array_equal(found["half"], exact.astype(np.float16))
    d, m = scales.astype(np.float64)[:, None], offsets.astype(np.float64)[:, None]
    np.testing.assert_allclose(found["eight"], (d * bytes_).reshape(3, 64), rtol=1e-6)
    four = (d * nibbles + m).reshape(2, 96)
    np.testing.assert_allclose(found["four"], four, rtol=1e-6, atol=1e-6)


def test_low_nibbles_are_the_first_sixteen_weights(tmp_path):
    # Packed as neighbours, weights 0 and 1 would share a byte.
    quanta = np.r_[np.arange(16), np.full(16, 15)]
    tensors = {"w": files.q4_1((1, 32), [1.0], [0.0], [quanta])}
    read = gguf.read(write(tmp_path, files.build({}, tensors)))
    np.testing.assert_array_equal(gguf.dequantize(read.tensors["w"])[0], quanta)


WEIGHTS = {"a": files.f32(np.ones(8)), "last": files.f32(np.ones((4, 8)))}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated: its header needs"),
        (b"PK\3\4" + bytes(60), "no GGUF file"),
        (files.build({}, {}, version=2), "version 2; only version 3"),
        (files.build({}, {}, version=3 << 24), "little-endian"),
        (files.build({}, {"q": ((32,), 2, bytes(18))}), "`q` has the ggml type 2"),
        (files.build({}, {"q": ((4, 16), 8, bytes(68))}), "rows of 16 weights"),
        (files.build({"k": (files.STRING, b"\xff")}, {}), "not UTF-8"),
        (files.build({"general.alignment": (files.U32, 0)}, {}), "alignment"),
        (
            files.build({"k": (files.ARRAY, (99, []))}, {}).replace(
                b"c\0\0\0" + bytes(8), b"c\0\0\0\1" + bytes(7)
            ),
            "unknown type 99",
        ),
    ],
    ids=[
        "empty",
        "zip",
        "version",
        "endian",
        "type",
        "rows",
        "utf8",
        "alignment",
        "metadata",
    ],
)
def test_a_damaged_or_foreign_file_is_refused_with_the_reason(tmp_path, data, message):
    with pytest.raises(DataError, match=message) as error:
        gguf.read(write(tmp_path, data))
    assert "model.gguf" in str(error.value)


def test_a_file_cut_at_any_byte_is_called_truncated(tmp_path):
    whole = files.build(ENTRIES, WEIGHTS)
    for size in range(4, len(whole), 7):
        with pytest.raises(DataError, match=r"truncated: .* the file has \d+"):
            gguf.read(write(tmp_path, whole[:size]))


def test_a_truncated_tensor_is_named(tmp_path):
    with pytest.raises(DataError, match="truncated: the tensor `last`"):
        gguf.read(write(tmp_path, files.build({}, WEIGHTS)[:-1]))


def test_two_tensors_of_one_name_are_refused(tmp_path):
    data = files.build({}, {"aa": WEIGHTS["a"], "bb": WEIGHTS["a"]})
    with pytest.raises(DataError, match="two tensors are named `aa`"):
        gguf.read(write(tmp_path, data.replace(b"bb", b"aa")))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nothing-here"):
        gguf.read(tmp_path / "nothing-here")
