"""A writer of small GGUF files, from the format's description."""

import struct

import numpy as np

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
U32, FLOAT, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
_FORMATS = {U32: "<I", FLOAT: "<f", BOOL: "<?", U64: "<Q"}


def string(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def typed(kind, value):
    if kind == STRING:
        return string(value)
    if kind == ARRAY:
        element, values = value
        head = struct.pack("<IQ", element, len(values))
        return head + b"".join(typed(element, v) for v in values)
    return struct.pack(_FORMATS[kind], value)


def build(entries, tensors, *, magic=b"GGUF", version=3, alignment=32):
    """``entries``: key to (type, value); ``tensors``: name to (shape, type, bytes)."""
    out = magic + struct.pack("<IQQ", version, len(tensors), len(entries))
    for key, (kind, value) in entries.items():
        out += string(key) + struct.pack("<I", kind) + typed(kind, value)
    offset = 0
    for name, (shape, kind, data) in tensors.items():
        out += string(name) + struct.pack("<I", len(shape))
        out += b"".join(struct.pack("<Q", axis) for axis in reversed(shape))
        out += struct.pack("<IQ", kind, offset)
        offset += -(-len(data) // alignment) * alignment
    for _, _, data in tensors.values():
        out += b"\0" * (-len(out) % alignment) + data
    return out


def f32(array):
    return (array.shape, F32, array.astype("<f4").tobytes())


def f16(array):
    return (array.shape, F16, array.astype("<f2").tobytes())


def q8_0(shape, scales, quanta):
    """``scales`` [blocks], ``quanta`` [blocks, 32] in -128 to 127."""
    blocks = zip(scales, quanta, strict=True)
    data = [np.float16(d).tobytes() + np.int8(q).tobytes() for d, q in blocks]
    return (shape, Q8_0, b"".join(data))


def q4_1(shape, scales, offsets, quanta):
    """``quanta`` [blocks, 32] in 0 to 15; two weights share a byte, 16 apart."""
    data = b""
    for d, m, q in zip(scales, offsets, quanta, strict=True):
        data += np.float16(d).tobytes() + np.float16(m).tobytes()
        data += bytes(int(q[i]) + 16 * int(q[i + 16]) for i in range(16))
    return (shape, Q4_1, data)
