"""Messages byte for byte as openpi's client packs them, and what is refused of others."""

from __future__ import annotations

import pickle
from typing import Any

import msgpack
import numpy as np
import pytest

from como_jax.serving.messages import RequestError, pack, unpack

# By hand, from the layout of openpi_client.msgpack_numpy: maps 0x8N, text 0xaN, bytes 0xc4 N, True 0xc3, lists 0x9N.
ARRAY = (
    b"\x81\xa7actions\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4\x08\x00\x00\x80\x3f\x00\x00\x00\xc0"
    b"\xc4\x05dtype\xa3<f4\xc4\x05shape\x92\x01\x02"
)
NUMBER = b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data\x07\xc4\x05dtype\xa3<i4"


def test_arrays_and_numbers_are_packed_as_openpi_packs_them() -> None:
    assert pack({"actions": np.array([[1, -2]], np.float32)}) == ARRAY
    assert pack(np.int32(7)) == NUMBER
    # What lies otherwise in memory is sent in C order.
    columns = np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    np.testing.assert_array_equal(unpack(pack(columns)), columns)


def test_messages_of_openpi_are_read() -> None:
    actions = unpack(ARRAY)["actions"]
    assert actions.dtype == np.float32 and actions.tolist() == [[1.0, -2.0]]
    number = unpack(NUMBER)
    assert type(number) is np.int32 and number == 7


@pytest.mark.parametrize("dtype", ["|b1", "|u1", "<i8", ">i2", "<f2", "<f8", "<U3"])
def test_arrays_of_numbers_and_text_come_back_as_they_were(dtype: str) -> None:
    array = np.array([[[1], [0]]]).astype(dtype)
    found = unpack(pack({"x": {"y": [array]}}))["x"]["y"][0]
    assert found.dtype == array.dtype and found.shape == array.shape
    np.testing.assert_array_equal(found, array)


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was run",)


def array(**changes: Any) -> bytes:
    """An array of the protocol with other entries."""
    fields = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2], **changes}
    return msgpack.packb({name.encode(): value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (array(dtype="|O", data=pickle.dumps(Malice())), "dtype must be of numbers"),
        (array(dtype="O"), "dtype must be of numbers"),
        (array(dtype="<c8", shape=[1]), "dtype must be of numbers"),
        (array(dtype="<M8[s]", shape=[1]), "dtype must be of numbers"),
        (array(dtype="i4,i4"), "dtype must be of numbers"),
        (array(dtype="<f3"), "dtype <f3 is unknown"),
        (array(dtype=4), "dtype must be of numbers"),
        (array(shape=[3]), r"shape \[3\] and dtype float32 has 8 bytes"),
        (array(shape=[-2]), "list of sizes"),
        (array(shape="2"), "list of sizes"),
        (array(shape=[0, 2**63], data=b""), "cannot be made"),
        (array(shape=[1] * 70, data=b"\0" * 4), "cannot be made"),
        (array(data="text"), "has str of data"),
        (array(data=None), "has NoneType of data"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "300 is no uint8"),
        (msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "|u1"}), "must be one value"),
        (ARRAY[:-3], "no msgpack"),
        (ARRAY + b"\0", "no msgpack"),
        (b"", "no msgpack"),
        (b"\x81\x80\x00", "no msgpack"),
        (b"\xa1\xff", "no msgpack"),
        (b"\x91" * 5000 + b"\0", "no msgpack"),
        (b"\xdd\xff\xff\xff\xff", "no msgpack"),
        (pickle.dumps(Malice()), "no msgpack"),
    ],
)
def test_what_the_protocol_does_not_allow_is_refused(message: bytes, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        unpack(message)


@pytest.mark.parametrize("value", [np.array([None]), np.complex64(1), {"x": {1, 2}}])
def test_what_has_no_form_is_not_packed(value: Any) -> None:
    with pytest.raises(TypeError, match="has no form for"):
        pack(value)
