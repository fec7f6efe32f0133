"""The TLS side of a connection: contexts from settings, and a handshake that closes its socket when it fails."""

from __future__ import annotations

import errno
import socket
import ssl
from pathlib import Path

from llamacpp_mqtt_deploy.config.settings import TlsSettings

HANDSHAKE_TIMEOUT_S = 5.0


class HandshakeError(ssl.SSLError):
    """The other side took the connection, and either never answered our ClientHello or hung up on it."""


class ClosingContext(ssl.SSLContext):
    """Shakes hands when it wraps, and closes the socket when that fails; paho would leave it to the garbage collector."""

    def wrap_socket(
        self,
        sock: socket.socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:
        try:
            wrapped = super().wrap_socket(
                sock,
                server_side=server_side,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=suppress_ragged_eofs,
                server_hostname=server_hostname,
                session=session,
            )
        except BaseException:
            sock.close()
            raise
        try:
            wrapped.settimeout(HANDSHAKE_TIMEOUT_S)
            wrapped.do_handshake()
        except (TimeoutError, ConnectionError) as error:
            wrapped.close()
            raise HandshakeError(errno.EPROTO, "no TLS handshake") from error
        except BaseException:
            wrapped.close()
            raise
        return wrapped


def build_context(tls: TlsSettings) -> ssl.SSLContext:
    """A client context: TLS 1.2 or newer, host name and certificate verified unless `insecure`.

    Raises ValueError that names the setting whose file is missing or unfit.
    """
    context = ClosingContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        if tls.ca_file is not None:
            context.load_verify_locations(cafile=str(tls.ca_file))
        else:
            context.load_default_certs()
    except OSError as error:
        raise ValueError(f"mqtt.tls.ca_file: {_why(tls.ca_file, error)}") from error
    if tls.key_file is not None and tls.cert_file is None:
        raise ValueError("mqtt.tls.key_file needs mqtt.tls.cert_file")
    if tls.cert_file is not None:
        key_file = tls.key_file or tls.cert_file
        for name, path in (("cert_file", tls.cert_file), ("key_file", key_file)):
            try:
                path.open("rb").close()
            except OSError as error:
                raise ValueError(f"mqtt.tls.{name}: {_why(path, error)}") from error
        try:
            # A callback, because OpenSSL would ask for the passphrase of an encrypted key on the terminal.
            context.load_cert_chain(str(tls.cert_file), str(key_file), password=_no_passphrase)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"mqtt.tls.cert_file and key_file: {tls.cert_file} and {key_file} are no PEM certificate and matching key, "
                "or the key is encrypted"
            ) from error
    return context


def stamps(tls: TlsSettings) -> tuple[tuple[int, int], ...]:
    """What changes when one of the files is renewed."""
    found = []
    # Without a file of its own the system's list counts, which packages renew; OpenSSL reads it once.
    system = ssl.get_default_verify_paths().cafile if tls.ca_file is None else None
    for path in (tls.ca_file or system, tls.cert_file, tls.key_file):
        if path is not None:
            try:
                state = Path(path).stat()
                found.append((state.st_mtime_ns, state.st_size))
            except OSError:
                found.append((0, -1))
    return tuple(found)


def _no_passphrase() -> str:
    raise ValueError("the key is encrypted")


def _why(path: Path | None, error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"{path} holds no PEM certificate"
    return f"{path}: {(error.strerror or str(error)).lower()}"
