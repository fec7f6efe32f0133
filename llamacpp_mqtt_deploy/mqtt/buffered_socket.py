"""A socket that gathers what is written and reads ahead, so that a turn of the I/O loop costs one call of the system each way."""

from __future__ import annotations

import socket
import ssl
import sys
import time
from collections.abc import Callable

from llamacpp_mqtt_deploy.mqtt.backoff import Version
from llamacpp_mqtt_deploy.mqtt.cutting import Beginning, beginning_of, has_no_length
from llamacpp_mqtt_deploy.mqtt.incoming import leading_publish
from llamacpp_mqtt_deploy.mqtt.packets import leading_pubacks
from llamacpp_mqtt_deploy.mqtt.thinning import Thinning
from llamacpp_mqtt_deploy.mqtt.websocket_frames import FrameError, Frames, closing, framed
from llamacpp_mqtt_deploy.ports import Delivery

READ_BYTES = 65_536
RECORD_BYTES = 16_384
"""Most that a record of TLS holds (RFC 8446, section 5.1)."""
FLOOD_RECORDS = 512
"""So many of them in a row mean what a read of `READ_BYTES` means without TLS: more comes than is read."""
FLOOD_READ_BYTES = 1024 * 1024
FLOOD_READ_S = 0.01
"""How much is read at once in a flood (`thinning`), and how long records are gathered."""
MOST_UNSENT_BYTES = 256 * 1024
"""Beyond it the writer is told to try again, as by a full socket: large events are not held twice."""


class BufferedSocket:
    """Stands between paho and its non-blocking socket (TCP, unix or TLS): paho sends each packet by a call of its own, and
    reads each packet's first bytes one by one. With `frames` the socket carries a websocket, and all else is about what that carries.

    `send` only collects and `flush` writes. `recv` gives from what one read of the socket brought; when that is used up it raises
    BlockingIOError without asking the socket, which had no more (`is_dry`), until its owner says otherwise.
    """

    __slots__ = (
        "_frames",
        "_held",
        "_is_tcp",
        "_records",
        "_socket",
        "_tls",
        "_to_skip",
        "ahead",
        "beginning",
        "failure",
        "is_dry",
        "is_tls",
        "max_incoming_bytes",
        "thinning",
        "to_be_thinned",
        "unsent",
    )

    def __init__(self, sock: socket.socket, frames: Frames | None = None) -> None:
        self._socket = sock
        self._frames = frames
        self.unsent = bytearray()
        """What is to be written to the socket."""
        self.ahead = memoryview(b"")
        """What was read and not taken yet."""
        self.is_dry = False
        """Whether the socket had no more when it was last read."""
        self.thinning: Thinning | None = None
        """Set where floods are to be thinned out."""
        self.to_be_thinned = False
        """Whether what was read is of a flood, and `thin_out` has not seen it."""
        self.max_incoming_bytes: Callable[[], int] | None = None
        """Set where messages with longer payloads are to be cut (`take_publish`)."""
        self.beginning: Beginning | None = None
        """Set in the middle of a message that is cut: what comes is for `take_beginning` alone."""
        self._held = b""
        """The beginning of a packet that says not yet how long it is; what is read next is put behind it."""
        self._to_skip = 0
        """How many of the next bytes belong to a message that was dropped or cut."""
        self.failure: OSError | None = None
        """Why the connection is at its end, as whoever reads or writes next is told."""
        self._is_tcp = sys.platform == "linux" and sock.family in (socket.AF_INET, socket.AF_INET6)
        self._tls: ssl.SSLSocket | None = sock if isinstance(sock, ssl.SSLSocket) else None
        self.is_tls = self._tls is not None
        self._records = 0
        """How many were read since TLS had none."""

    # --- what paho calls -----------------------------------------------------------------------------------------------

    def send(self, data: bytes | bytearray) -> int:
        """Take all of it, or raise BlockingIOError. Raises OSError when the connection has ended."""
        if self.failure is not None:
            raise self.failure
        if len(self.unsent) > MOST_UNSENT_BYTES:
            self.flush()
            if len(self.unsent) > MOST_UNSENT_BYTES:
                raise BlockingIOError
        self.unsent += data if self._frames is None else framed(data)
        return len(data)

    def recv(self, size: int) -> bytes:
        """At most `size` bytes; none at the end of the connection. Raises BlockingIOError, ssl.SSLWantReadError, OSError."""
        if not self.ahead:
            self._read()
        ahead = self.ahead
        self.ahead = ahead[size:]
        return bytes(ahead[:size])

    def _read(self) -> None:
        """Read the socket once; nothing is there afterwards at the end of the connection."""
        if self.is_dry:
            raise BlockingIOError
        if self.failure is not None:
            raise self.failure
        frames = self._frames
        if frames is not None and frames.is_closed:
            return
        thinning, tls = self.thinning, self._tls is not None
        flooded = thinning is not None and thinning.is_on
        most = FLOOD_READ_BYTES if flooded and not tls else READ_BYTES
        try:
            read = self._socket.recv(most)
        except ssl.SSLWantReadError:
            self._records = 0
            raise
        if self._is_tcp:
            self._acknowledge_now()
        # TLS gives a record at a time and may hold another; the end of a connection is there for whoever asks again.
        self.is_dry = 0 < len(read) < most and not tls
        self._records += tls
        full = self._records >= FLOOD_RECORDS if tls else len(read) >= READ_BYTES
        if thinning is not None and (flooded or full):
            if flooded and tls:
                read = self._gathered(read)
                full = len(read) >= READ_BYTES
            thinning.note_read(full=full, now=time.monotonic())
            self.to_be_thinned = thinning.is_on
        if frames is not None:
            read = self._carried(frames, read)
        if self._to_skip and read:
            skipped = min(self._to_skip, len(read))
            self._to_skip -= skipped
            if skipped == len(read):
                self.is_dry = True  # until the next turn, though there may be more
                raise BlockingIOError
            self.ahead = memoryview(read)[skipped:]
        elif self._held:
            # At the end of the connection nothing is to be left, as whoever reads then expects.
            self.ahead, self._held = memoryview(self._held + read if read else b""), b""
        else:
            self.ahead = memoryview(read)

    def _carried(self, frames: Frames, read: bytes) -> bytes:
        """What came in the websocket's frames, nothing at the end of the connection. Raises BlockingIOError where nothing came in them yet."""
        try:
            carried = frames.decoded(read)
        except FrameError as error:
            self.failure, self.is_dry = error, False
            raise
        reply = frames.reply()
        if reply and len(self.unsent) <= MOST_UNSENT_BYTES:
            self.unsent += reply
        if frames.is_closed:
            self.is_dry = False
        elif read and not carried:
            raise BlockingIOError
        return carried

    def _gathered(self, first: bytes) -> bytes:
        """This record and those behind it, as far as they are there: a broker makes one of each message."""
        records, size, until = [first], len(first), time.monotonic() + FLOOD_READ_S
        while records[-1] and size < FLOOD_READ_BYTES and time.monotonic() < until:
            try:
                records.append(self._socket.recv(RECORD_BYTES))
            except ssl.SSLWantReadError:
                break
            except OSError as error:
                self.failure = error
                break
            size += len(records[-1])
        return b"".join(records)

    def _acknowledge_now(self) -> None:
        """Let TCP acknowledge what was read without delay.

        Where the broker leaves Nagle's algorithm on (mosquitto's default) it holds back a PUBACK, and with it the next chunk, until
        the packet before it is acknowledged: 40 ms, a tenth of the tokens of an engine with 200 a second. The kernel falls back to
        delayed acknowledgements by itself, so it is told at each read.

        For the same reason no PUBACK is left unread until somebody needs it (SO_RCVLOWAT would let it wake nobody, and a chunk cost a
        sixth less): requests and cancels would come 12 ms later during a stream, 45 ms at worst, where half a millisecond is usual.
        """
        try:  # noqa: SIM105 - three calls less for each PUBACK
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except OSError:
            pass  # the connection has ended, as the next read says

    def pending(self) -> int:
        """Bytes that can be read although the socket does not show it."""
        return len(self.ahead) + (0 if self._tls is None else self._tls.pending())

    def fileno(self) -> int:
        return self._socket.fileno()

    def setblocking(self, flag: bool) -> None:
        self._socket.setblocking(flag)

    def close(self) -> None:
        """Close, after a last attempt to write: paho closes right after it has sent a DISCONNECT."""
        if self._frames is not None and not self._frames.is_closed:
            self.unsent += closing()
        self.flush()
        self._socket.close()

    # --- what its owner calls ------------------------------------------------------------------------------------------

    def flush(self) -> bool:
        """Write what was collected, as far as the socket takes it; False when the connection has ended, as `recv` then says."""
        while self.unsent and self.failure is None:
            try:
                sent = self._socket.send(self.unsent)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except OSError as error:
                self.failure = error
                self.unsent.clear()
            else:
                del self.unsent[:sent]
        return self.failure is None

    def read_ahead(self) -> None:
        """Read the socket unless there is something already. What it says of its end is left to `recv`."""
        if not self.ahead:
            try:
                self._read()
            except (BlockingIOError, ssl.SSLWantReadError):
                pass
            except OSError as error:
                self.failure = error

    def take_pubacks(self) -> list[int]:
        """Take out the plain PUBACKs that come next, where a packet begins: their packet ids. What the socket says of its end is left
        to `recv`."""
        if not self.ahead:
            self.read_ahead()
            if not self.ahead:
                return []
        mids, size = leading_pubacks(self.ahead)
        self.ahead = self.ahead[size:]
        return mids

    def thin_out(self) -> None:
        """Drop the flood from what was read, where a packet begins."""
        self.to_be_thinned = False
        if self.thinning is not None and self.ahead:
            left, self._to_skip = self.thinning.thinned(bytes(self.ahead), time.monotonic())
            self.ahead = memoryview(left)
            if not left:
                self.is_dry = True  # what comes next is read in the next turn, and thinned out as well

    def take_publish(self, version: Version, now: float, connection: int) -> Delivery | None:
        """Take out the PUBLISH that comes next in what was read, where a packet begins; None when paho is to read it, or
        `take_beginning` (`is_cutting`)."""
        found = leading_publish(self.ahead, version, now, connection)
        if found is None:
            if self.max_incoming_bytes is not None:
                self._begin_to_cut(self.max_incoming_bytes())
            return None
        delivery, size = found
        self.ahead = self.ahead[size:]
        return delivery

    def _begin_to_cut(self, most_payload: int) -> None:
        if has_no_length(self.ahead):
            self._held, self.ahead = bytes(self.ahead), memoryview(b"")
            return
        found = beginning_of(self.ahead, most_payload)
        if found is not None:
            self.beginning, start = found
            self.ahead = self.ahead[start:]

    def is_cutting(self) -> bool:
        """Whether what comes next belongs to a message that is cut, or may be, and is not for paho."""
        return bool(self._held) or self.beginning is not None

    def is_skipping(self) -> bool:
        """Whether what comes is passed over."""
        return self._to_skip > 0

    def take_beginning(self, version: Version, now: float, connection: int) -> Delivery | None:
        """Take what is there of the message that is cut: the message, once what is kept of it is there, whose rest is passed over as
        it comes. Raises EOFError when the connection has ended."""
        beginning = self.beginning
        assert beginning is not None
        if not self.ahead:
            try:
                self._read()
            except (BlockingIOError, ssl.SSLWantReadError):
                return None
            except OSError as error:
                self.failure = error
            if not self.ahead:
                raise EOFError
        taken = beginning.add(self.ahead)
        self.ahead = self.ahead[taken:]
        if not beginning.is_whole:
            return None
        self.beginning = None
        here = min(beginning.left_out, len(self.ahead))
        self.ahead = self.ahead[here:]
        self._to_skip = beginning.left_out - here
        return beginning.delivery(version, now, connection)
