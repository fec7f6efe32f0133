"""MQTT over a websocket (RFC 6455; MQTT 5.0, section 6), the client's side: bytes in and out of frames.

paho's own writes the answer to a ping into a frame that is half written, without the mask that a server insists on, and reads a packet's
first bytes by one call of the system each.
"""

from __future__ import annotations

import os

MOST_CONTROL_BYTES = 125

# Of a frame's first byte and, the mask, of its second (RFC 6455, section 5.2).
_FIN, _RESERVED, _OPCODE, _CONTROL, _MASKED = 0x80, 0x70, 0x0F, 0x08, 0x80
_CONTINUATION, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x2, 0x8, 0x9, 0xA
_WHOLE = _FIN | _BINARY
_MASKED_AT_ONCE = 65_536
"""A multiple of the mask's length: a large packet shall not be in memory five times."""
_NORMAL_CLOSURE = (1000).to_bytes(2, "big")


class FrameError(OSError):
    """The other side breaks the protocol of websockets."""


class Frames:
    """What one connection carries. Pure; `held` is what was read of it already.

    Payloads are given as they come, so that of a frame only its head is ever held, and of a control frame its 125 bytes.
    """

    __slots__ = ("_held", "_in_message", "_left", "_pong", "is_closed")

    def __init__(self, held: bytes = b"") -> None:
        self._held = held
        self._left = 0
        """Bytes of the frame's payload that have not come yet."""
        self._in_message = False
        """Whether the next frame has to go on with the message of the last one."""
        self._pong: bytes | None = None
        self.is_closed = False
        """Whether the other side has said that nothing more comes."""

    def decoded(self, raw: bytes) -> bytes:
        """What the frames in these bytes carry, which go on where the last ones stopped. Raises FrameError."""
        if self._held:
            raw = self._held + raw
        parts: list[bytes] = []
        at, size = 0, len(raw)
        while at < size and not self.is_closed:
            if self._left:
                part = raw[at : at + self._left]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                continue
            first = raw[at]
            if first == _WHOLE and at + 1 < size and not self._in_message:
                # Nearly all: a small packet in a frame of its own.
                length, end = raw[at + 1], at + 2 + raw[at + 1]
                if length <= MOST_CONTROL_BYTES and end <= size:
                    parts.append(raw[at + 2 : end])
                    at = end
                    continue
            head = _head(raw, at)
            if head is None:
                break
            start, length = head
            if not first & _CONTROL:
                self._begin(first, length)
                at = start
            elif start + length <= size:
                at = start + length
                self._control(first, raw[start:at])
            else:
                break
        self._held = raw[at:]
        return b"".join(parts)

    def reply(self) -> bytes:
        """The frame that answers what was decoded last, empty where it asks for none. Of many pings the last one is answered."""
        if self.is_closed:
            return _frame(_CLOSE, _NORMAL_CLOSURE)
        pong, self._pong = self._pong, None
        return b"" if pong is None else _frame(_PONG, pong)

    def _begin(self, first: int, length: int) -> None:
        """A frame of a message begins."""
        if first & _OPCODE != (_CONTINUATION if self._in_message else _BINARY):
            raise FrameError("a websocket's frame that is not binary, or out of order")
        self._in_message = not first & _FIN
        self._left = length

    def _control(self, first: int, payload: bytes) -> None:
        opcode = first & _OPCODE
        if opcode == _CLOSE:
            self.is_closed = True
        elif opcode == _PING:
            self._pong = payload
        elif opcode != _PONG:
            raise FrameError("a websocket's frame of an unknown kind")


def framed(data: bytes | bytearray) -> bytes:
    """A frame that carries these bytes."""
    return _frame(_BINARY, data)


def closing() -> bytes:
    """The frame that says that nothing more comes."""
    return _frame(_CLOSE, _NORMAL_CLOSURE)


def _head(raw: bytes, at: int) -> tuple[int, int] | None:
    """Where the frame's payload begins and its length; None when that is not there yet."""
    if len(raw) - at < 2:
        return None
    first, length, start = raw[at], raw[at + 1], at + 2
    if first & _RESERVED or length & _MASKED:
        raise FrameError("a websocket's frame with an extension or a mask, which no server may send")
    if length > MOST_CONTROL_BYTES:
        if first & _CONTROL:
            raise FrameError("a websocket's control frame that is too long")
        end = start + (2 if length == 126 else 8)
        if end > len(raw):
            return None
        length, start = int.from_bytes(raw[start:end], "big"), end
    if first & _CONTROL and not first & _FIN:
        raise FrameError("a websocket's control frame in parts")
    return start, length


def _frame(opcode: int, data: bytes | bytearray) -> bytes:
    """A whole frame, masked as a client's have to be."""
    size = len(data)
    if size <= MOST_CONTROL_BYTES:
        head = bytes((_FIN | opcode, _MASKED | size))
    elif size < 0x10000:
        head = bytes((_FIN | opcode, _MASKED | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((_FIN | opcode, _MASKED | 127)) + size.to_bytes(8, "big")
    mask = os.urandom(4)
    pieces = (_masked(data[at : at + _MASKED_AT_ONCE], mask) for at in range(0, size, _MASKED_AT_ONCE))
    return b"".join((head, mask, *pieces))


def _masked(data: bytes | bytearray, mask: bytes) -> bytes:
    """One exclusive or of two long numbers: byte by byte it would take a hundred times as long."""
    size = len(data)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")
