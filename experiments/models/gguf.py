"""A small reader of GGUF, the file format of llama.cpp's models.

Version 3, little-endian: a header, typed metadata, one record per tensor, and the
tensors' bytes from an aligned offset on. Four tensor types are read, F32 and F16 as
they stand and two that store blocks of 32 weights:

=====  ==========================================================  ==============
Q8_0   float16 d, 32 int8 q                                        w = d q
Q4_1   float16 d, float16 m, 16 bytes: low nibbles are weights     w = d q + m
       0 to 15, high nibbles 16 to 31
=====  ==========================================================  ==============

References:
  ggml project, `The GGUF file format
  <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>`_
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data import DataError

_MAGIC = b"GGUF"
_VERSION = 3
_ALIGNMENT = 32
_BLOCK = 32

# Metadata value types: code to `struct` format; strings and arrays stand apart.
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING = 8
_ARRAY = 9


class _Type(NamedTuple):
    name: str
    weights: int  # Weights in one block.
    size: int  # Bytes of one block.


_TYPES = {
    0: _Type("F32", 1, 4),
    1: _Type("F16", 1, 2),
    3: _Type("Q4_1", _BLOCK, 20),
    8: _Type("Q8_0", _BLOCK, 34),
}


class Tensor(NamedTuple):
    """One tensor as it is stored.

    Attributes:
      shape: Row-major shape; a linear layer is ``(out, in)``.
      type: ``"F32"``, ``"F16"``, ``"Q4_1"`` or ``"Q8_0"``.
      data: Its bytes ``[size]``, uint8, mapped from the file.
    """

    shape: tuple[int, ...]
    type: str
    data: np.ndarray


class GGUF(NamedTuple):
    """What a file holds.

    Attributes:
      metadata: Key to number, bool, string or list of these.
      tensors: Name to tensor.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: str | os.PathLike[str]) -> GGUF:
    """Reads metadata and records; the weights stay on the disk until they are used.

    Args:
      path: A GGUF file of version 3.

    Returns:
      The metadata and the tensors, each in the file's order.

    Raises:
      DataError: If the file can't be opened, is no GGUF file, has another version or
        byte order, ends too early, or holds a tensor of a type that isn't read.
    """
    path = Path(path)
    try:
        # An empty file can't be mapped; it is refused as truncated below.
        empty = path.stat().st_size == 0
        data = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}).") from error
    cursor = _Cursor(path, data)
    if (magic := cursor.bytes(4)) != _MAGIC:
        raise DataError(
            f"{path} is no GGUF file: it starts with {magic!r}, expected {_MAGIC!r}."
        )
    if (version := cursor.number("<I")) != _VERSION:
        raise DataError(
            f"{path} has GGUF version {version}; only version {_VERSION} in "
            "little-endian byte order is read. Convert it with llama.cpp's "
            "`gguf_new_metadata.py` or fetch a newer file."
        )
    num_tensors, num_entries = cursor.number("<Q"), cursor.number("<Q")
    metadata = {}
    for _ in range(num_entries):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("<I"))
    records = [_record(cursor) for _ in range(num_tensors)]
    align = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(align, int) or align < 1:
        raise DataError(
            f"{path} is damaged: `general.alignment` is {align!r}, expected a positive "
            "integer."
        )
    start = math.ceil(cursor.position / align) * align
    tensors = {}
    for name, shape, kind, offset in records:
        if name in tensors:
            raise DataError(f"{path} is damaged: two tensors are named `{name}`.")
        stored = cursor.slice(
            start + offset,
            _stored_size(path, name, shape, kind),
            f"the tensor `{name}`",
        )
        tensors[name] = Tensor(shape, kind.name, stored)
    return GGUF(metadata, tensors)


def dequantize(tensor: Tensor) -> np.ndarray:
    """The weights of a tensor, float32, in its row-major shape.

    Blocks never straddle rows, so that the blocks in the file's order are the weights
    in row-major order.

    Args:
      tensor: A tensor of ``read``.

    Returns:
      A new float32 array of shape ``tensor.shape``.

    Example:
      >>> scale = np.float16(0.5).tobytes()
      >>> block = np.frombuffer(scale + bytes(range(32)), np.uint8)
      >>> dequantize(Tensor((2, 16), "Q8_0", block))[1, :3]
      array([8. , 8.5, 9. ], dtype=float32)
    """
    match tensor.type:
        case "F32":
            weights = tensor.data.view("<f4").astype(np.float32)
        case "F16":
            weights = tensor.data.view("<f2").astype(np.float32)
        case "Q8_0":
            blocks = tensor.data.reshape(-1, 34)
            weights = blocks[:, 2:].view(np.int8) * _half(blocks, 0)
        case "Q4_1":
            blocks = tensor.data.reshape(-1, 20)
            packed = blocks[:, 4:]
            weights = np.empty((len(blocks), _BLOCK), np.float32)
            weights[:, :16] = packed & 0x0F
            weights[:, 16:] = packed >> 4
            weights *= _half(blocks, 0)
            weights += _half(blocks, 2)
        case _:
            raise ValueError(
                f"`tensor` has the type {tensor.type!r}; expected one of "
                f"{_names_of_types()}."
            )
    return weights.reshape(tensor.shape)


def _half(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at a byte offset of each block, as float32 ``[blocks, 1]``."""
    stored = np.ascontiguousarray(blocks[:, offset : offset + 2])
    return stored.view("<f2").astype(np.float32)


def _record(cursor: "_Cursor") -> tuple[str, tuple[int, ...], _Type, int]:
    name = cursor.string()
    # Stored with the fastest axis first; NumPy's order is the other way round.
    axes = [cursor.number("<Q") for _ in range(cursor.number("<I"))]
    code = cursor.number("<I")
    if code not in _TYPES:
        raise DataError(
            f"{cursor.path}: the tensor `{name}` has the ggml type {code}, which isn't "
            f"read; there are {_names_of_types()}. Requantize the file, e.g. with "
            "`llama-quantize --pure ... Q8_0`."
        )
    return name, tuple(reversed(axes)), _TYPES[code], cursor.number("<Q")


def _stored_size(path: Path, name: str, shape: tuple[int, ...], kind: _Type) -> int:
    row = shape[-1] if shape else 1
    if row % kind.weights:
        raise DataError(
            f"{path} is damaged: the tensor `{name}` of shape {shape} has rows of "
            f"{row} weights, but {kind.name} stores blocks of {kind.weights}."
        )
    return math.prod(shape) // kind.weights * kind.size


def _names_of_types() -> str:
    return ", ".join(kind.name for kind in _TYPES.values())


class _Cursor:
    """A place in the file, and reading on from it."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path = path
        self.position = 0
        self._data = data
        # Headers are many short strings, and slicing a memoryview is cheap.
        self._header = data.data

    def slice(self, start: int, size: int, what: str) -> np.ndarray:
        """The bytes from ``start``, which needn't be the present place."""
        self._check(start, size, what)
        return self._data[start : start + size]

    def bytes(self, size: int) -> bytes:
        self._check(self.position, size, "its header")
        start, self.position = self.position, self.position + size
        return self._header[start : self.position].tobytes()

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def string(self) -> str:
        at = self.position
        try:
            return self.bytes(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path} is damaged: the string at byte {at} is not UTF-8."
            ) from error

    def value(self, code: int) -> Any:
        if code in _SCALARS:
            return self.number(_SCALARS[code])
        if code == _STRING:
            return self.string()
        if code == _ARRAY:
            element = self.number("<I")
            return [self.value(element) for _ in range(self.number("<Q"))]
        raise DataError(
            f"{self.path} is damaged: the metadata at byte {self.position} have the "
            f"unknown type {code}."
        )

    def _check(self, start: int, size: int, what: str) -> None:
        if start + size > len(self._data):
            raise DataError(
                f"{self.path} is truncated: {what} needs the bytes {start} to "
                f"{start + size}, the file has {len(self._data)}. Fetch it again."
            )
