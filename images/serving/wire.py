"""The wire form of protobuf messages: what would take many times its own size in memory is told before it is parsed.

Two bytes on the wire can become an object of a hundred: 64 MB of them are gigabytes, which the allocator then keeps, and
seconds in which nobody else gets an answer.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from haechi.components.shared.errors import InputError

__all__ = ["check_size"]

_SMALL = 64 * 1024  # bytes of a message that is not worth a look
_MAX_FIELDS = 10_000
_MAX_PACKED = 16 * 2**20  # bytes of numbers in one field; each becomes 4 or 8
_TEXTS = (FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_STRING)
_REMEDY = "Send tensors as `raw_input_contents`."


def check_size(data: bytes, kind: Any) -> None:
    """Refuse a message of too many parts.

    Args:
        data: on the wire.
        kind: descriptor of the message that it is meant to be.

    Raises:
        InputError: more fields, or more numbers in one of them, than a request needs; or it is malformed.
    """
    if len(data) > _SMALL:
        try:
            _walk(data, 0, len(data), kind, _MAX_FIELDS)
        except IndexError:
            raise InputError(f"the message is no {kind.name}", "Make it from the .proto file.") from None


def _walk(data: bytes, at: int, end: int, kind: Any, left: int) -> int:
    """Go through the fields from `at` to `end`, and through those of messages in them; how many more there may be."""
    while at < end:
        if left == 0:
            raise InputError(f"the message has more than {_MAX_FIELDS} fields", _REMEDY)
        left -= 1
        key, at = _varint(data, at)
        form = key & 7
        if form == 0:
            _, at = _varint(data, at)
        elif form == 1 or form == 5:
            at += 8 if form == 1 else 4
        elif form == 2:
            size, at = _varint(data, at)
            field = kind.fields_by_number.get(key >> 3)
            if field is not None and field.message_type is not None:
                left = _walk(data, at, min(at + size, end), field.message_type, left)
            elif field is not None and field.type not in _TEXTS and size > _MAX_PACKED:
                raise InputError(f"`{field.name}` has more than {_MAX_PACKED} bytes", _REMEDY)
            at += size
        else:
            raise IndexError  # a group, which no message here has
    return left


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where it has ended."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError
