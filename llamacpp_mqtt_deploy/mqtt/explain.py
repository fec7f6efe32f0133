"""What a broker or the network refuses, as one sentence that says what happened and what to do."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from llamacpp_mqtt_deploy.mqtt.websocket_upgrade import UpgradeError


@dataclass(frozen=True, slots=True)
class Refusal:
    """`text` is for the log, the status and the operator; `needs_person` says that waiting alone will not mend it."""

    text: str
    needs_person: bool = True


UNSUPPORTED_VERSION = 0x84
TAKEN_OVER = 0x8E
NOT_AUTHORIZED = 0x87

# MQTT 5 section 3.2.2.2; paho translates the five codes of 3.1.1 into these.
_CONNACK: Mapping[int, tuple[str, bool]] = {
    0x80: ("The broker refused the connection without saying why. Look into the broker's log.", True),
    0x81: ('The broker could not read our CONNECT packet. Try mqtt.protocol = "3.1.1".', True),
    0x82: ('The broker says that our CONNECT breaks the protocol. Try mqtt.protocol = "3.1.1".', True),
    0x83: ("The broker does not accept something in our CONNECT. Look into the broker's log.", True),
    0x84: ('The broker does not speak this MQTT version. Set mqtt.protocol = "auto".', True),
    0x85: ("The broker does not accept the client id. Look into the broker's rules for client ids.", True),
    0x86: (
        "The broker refused the user name or password. Check mqtt.username and mqtt.password (or password_file).",
        True,
    ),
    0x87: (
        (
            "The broker does not allow this client to connect. Check mqtt.username and mqtt.password (or password_file), "
            "or allow the client at the broker (allow_anonymous, ACL)."
        ),
        True,
    ),
    0x88: ("The broker is there but not available yet.", False),
    0x89: ("The broker is busy.", False),
    0x8A: ("The broker has banned this client. Lift the ban at the broker.", True),
    0x8C: (
        "The broker asks for an authentication method that this worker does not know. Use user name and password.",
        True,
    ),
    0x90: ("The broker does not accept the topic of our will. Allow this client to write under its root topic.", True),
    0x95: ("Our CONNECT packet is too large for the broker.", True),
    0x97: ("A quota of the broker is used up, for example its number of connections.", False),
    0x99: ("The broker does not accept the payload of our will.", True),
    0x9A: (
        "The broker does not keep retained messages, which the worker's status needs. Switch them on at the broker.",
        True,
    ),
    0x9B: ("The broker does not support QoS 1, which the worker needs.", True),
    0x9C: ("The broker asks us to use another server for now. Set mqtt.host to it.", True),
    0x9D: ("The broker has moved to another server. Set mqtt.host to it.", True),
    0x9F: ("The broker takes no more connections for the moment: too many at once.", False),
}

# MQTT 5 section 3.14.2.1.
_DISCONNECT: Mapping[int, str] = {
    0x81: "The broker could not read one of our packets (malformed packet).",
    0x82: "The broker says that one of our packets breaks the protocol.",
    0x87: "The broker no longer allows this client to be connected. Check the broker's access rules.",
    0x89: "The broker is busy and closed the connection.",
    0x8B: "The broker is shutting down.",
    0x8D: "Nothing came from the other side for too long (keep alive timeout).",
    0x8E: "Another client connected under the same client id. Is a second worker running with the same mqtt.worker_id?",
    0x90: "The broker does not accept the topic of one of our messages.",
    0x93: "We sent more messages at once than the broker allows (receive maximum).",
    0x95: "One of our packets is too large for the broker. Raise its message size limit, or lower limits.max_event_bytes.",
    0x96: "We send messages faster than the broker allows.",
    0x97: "A quota of the broker is used up.",
    0x98: "An operator of the broker closed the connection.",
    0x9A: "The broker does not keep retained messages, which the worker's status needs.",
    0x9B: "The broker does not support the QoS of one of our messages.",
    0x9C: "The broker asks us to use another server for now. Set mqtt.host to it.",
    0x9D: "The broker has moved to another server. Set mqtt.host to it.",
    0xA0: "The broker ends connections after some time.",
}

BLAMELESS_CLOSES = frozenset({0x87, 0x89, 0x8B, 0x8D, 0x8E, 0x98, 0x9C, 0x9D, 0x9F, 0xA0})
"""Reasons for a DISCONNECT that cannot be the fault of a message just sent."""

_PUBACK: Mapping[int, str] = {
    0x83: "the broker does not accept it",
    NOT_AUTHORIZED: "not authorised: the broker's ACL must allow this worker to write to that topic",
    0x90: "the broker does not accept the topic",
    0x91: "the packet id is in use",
    0x95: "larger than the broker takes: raise its message_size_limit, or lower limits.max_event_bytes",
    0x97: "a quota of the broker is used up",
    0x99: "the broker does not accept the payload",
}

_SUBACK: Mapping[int, str] = {
    0x80: "refused without a reason; the broker's ACL probably does not allow this worker to read it",
    0x83: "the broker does not accept it",
    NOT_AUTHORIZED: "not authorised: the broker's ACL must allow this worker to read it",
    0x8F: "the broker does not accept the topic filter",
    0x91: "the packet id is in use",
    0x97: "a quota of the broker is used up",
    0x9E: "the broker does not support shared subscriptions",
    0xA1: "the broker does not support subscription identifiers",
    0xA2: "the broker does not support wildcards",
}


_NOT_AVAILABLE = frozenset({None, 429, 500, 502, 503, 504})
"""HTTP's status where a websocket may be there later; None where nothing came: the broker may be starting."""


def of_connack(code: int, name: str) -> Refusal:
    """The sentence for a CONNACK reason code; `name` is the code's own name."""
    text, needs_person = _CONNACK.get(code, (f"The broker refused the connection: {name}.", True))
    return Refusal(text, needs_person)


def of_disconnect(code: int, name: str) -> Refusal:
    """The sentence for the reason code of a DISCONNECT from the broker."""
    return Refusal(_DISCONNECT.get(code, f"The broker closed the connection: {name}."), needs_person=False)


def of_puback(code: int, name: str) -> str:
    return _PUBACK.get(code, f"refused by the broker: {name}")


def of_suback(code: int, name: str) -> str:
    return _SUBACK.get(code, f"refused by the broker: {name}")


# X509_V_ERR_* of OpenSSL, as ssl.SSLCertVerificationError.verify_code gives them.
_VERIFY: Mapping[int, str] = {
    9: "is not valid yet. Is the clock of this machine right?",
    10: "has expired. Renew it at the broker (or set the clock of this machine right).",
    18: "is self-signed. Name it in mqtt.tls.ca_file.",
    19: "comes from an authority that is not trusted. Name that authority in mqtt.tls.ca_file.",
    20: "comes from an authority that is not trusted. Name that authority in mqtt.tls.ca_file.",
    21: "comes from an authority that is not trusted. Name that authority in mqtt.tls.ca_file.",
    23: "was revoked.",
    62: "is made out for another name. Set mqtt.host to a name in the certificate, or renew the certificate.",
    64: "is made out for another address. Set mqtt.host to a name in the certificate, or renew the certificate.",
}

# Fragments of OpenSSL's error texts; the alerts come from the broker.
_TLS_TEXTS: tuple[tuple[str, str], ...] = (
    (
        "CERTIFICATE_REQUIRED",
        "The broker at {where} asks for a client certificate. Set mqtt.tls.cert_file and mqtt.tls.key_file.",
    ),
    (
        "HANDSHAKE_FAILURE",
        (
            "The broker at {where} broke off the TLS handshake; it probably asks for a client certificate "
            "(mqtt.tls.cert_file, mqtt.tls.key_file), or shares no cipher with us."
        ),
    ),
    (
        "ALERT_UNKNOWN_CA",
        "The broker at {where} does not trust the authority of our client certificate. Check mqtt.tls.cert_file.",
    ),
    (
        "CERTIFICATE_EXPIRED",
        "The broker at {where} says that our client certificate has expired. Renew mqtt.tls.cert_file.",
    ),
    (
        "CERTIFICATE_REVOKED",
        "The broker at {where} says that our client certificate was revoked. Renew mqtt.tls.cert_file.",
    ),
    ("BAD_CERTIFICATE", "The broker at {where} does not accept our client certificate. Check mqtt.tls.cert_file."),
    ("CERTIFICATE_UNKNOWN", "The broker at {where} does not accept our client certificate. Check mqtt.tls.cert_file."),
    ("PROTOCOL_VERSION", "The broker at {where} speaks only TLS versions older than 1.2. Update the broker."),
    ("UNSUPPORTED_PROTOCOL", "The broker at {where} speaks only TLS versions older than 1.2. Update the broker."),
    (
        "NO_TLS_HANDSHAKE",
        "Something at {where} takes connections but does not answer in TLS. Check mqtt.port, or set mqtt.tls.enabled = false.",
    ),
    ("WRONG_VERSION_NUMBER", "Nothing speaks TLS at {where}. Check mqtt.port, or set mqtt.tls.enabled = false."),
    ("RECORD_LAYER_FAILURE", "Nothing speaks TLS at {where}. Check mqtt.port, or set mqtt.tls.enabled = false."),
)


def of_tls_text(text: str, where: str) -> Refusal | None:
    """The sentence for an OpenSSL error text, None when it is none of the known ones."""
    upper = text.upper().replace(" ", "_")
    for fragment, sentence in _TLS_TEXTS:
        if fragment in upper:
            return Refusal(sentence.format(where=where))
    return None


def of_exception(error: BaseException, where: str) -> Refusal:
    """The sentence for what connecting raised; `where` is the broker's address as the operator wrote it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        what = _VERIFY.get(error.verify_code, f"cannot be verified: {error.verify_message}.")
        return Refusal(f"The certificate of the broker at {where} {what}")
    if isinstance(error, ssl.SSLError):
        known = of_tls_text(str(error), where)
        if known is not None:
            return known
        if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return Refusal(
                f"The other side at {where} hung up in the TLS handshake. Does the broker speak TLS on this port?"
            )
        return Refusal(f"TLS with the broker at {where} failed: {error.reason or error}.")
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_AGAIN:
            return Refusal(
                f"The name in {where} cannot be looked up at the moment: the DNS server does not answer.", False
            )
        return Refusal(f"The name in {where} is not known. Check mqtt.host.")
    if isinstance(error, TimeoutError):
        return Refusal(
            f"Nothing answers at {where} (timeout). Check mqtt.host and mqtt.port, the network and firewalls.", False
        )
    if isinstance(error, OSError):
        return _of_os_error(error, where)
    return Refusal(f"Connecting to {where} failed: {error}.")


def _of_os_error(error: OSError, where: str) -> Refusal:
    if isinstance(error, UpgradeError):
        return Refusal(
            f"No MQTT websocket at {where}: the other side {error}. Check mqtt.port, mqtt.websocket_path and the broker's "
            "websocket listener, and a proxy before it.",
            needs_person=error.status not in _NOT_AVAILABLE,
        )
    match error.errno:
        case errno.ECONNREFUSED:
            return Refusal(f"Nothing listens at {where}. Is the broker running? Check mqtt.host and mqtt.port.", False)
        case errno.ENOENT:
            return Refusal(f"There is no socket {where}. Is the broker running? Check mqtt.host.", False)
        case errno.EACCES | errno.EPERM:
            return Refusal(f"This user may not open {where}. Give it access to the socket, or check the firewall.")
        case errno.EHOSTUNREACH | errno.ENETUNREACH | errno.ENETDOWN | errno.EHOSTDOWN:
            return Refusal(f"There is no way to {where}. Check the network.", False)
        case errno.ECONNRESET | errno.EPIPE | errno.ECONNABORTED:
            return Refusal(f"The other side at {where} reset the connection.", False)
        case errno.EMFILE | errno.ENFILE:
            return Refusal("This process has too many open files. Raise the limit (LimitNOFILE).", False)
        case _:
            return Refusal(f"Connecting to {where} failed: {error.strerror or error}.", False)


def of_silence(where: str, *, tls: bool) -> Refusal:
    """The connection was closed before the broker answered our CONNECT."""
    hint = "" if tls else " or speaks TLS on this port (mqtt.tls.enabled)"
    return Refusal(
        f"The broker at {where} hung up without an answer: it is still starting, does not know this MQTT version{hint}.",
        needs_person=False,
    )


def of_no_connack(where: str, seconds: float) -> Refusal:
    return Refusal(f"Something at {where} accepts connections but sent no CONNACK within {seconds:g} s.", False)


INBOX_FULL = Refusal("The inbox was full; connecting again so that the broker delivers again.", needs_person=False)


def of_no_pubacks(where: str, seconds: float) -> Refusal:
    """The connection lives, and what we publish is not acknowledged."""
    return Refusal(
        f"The broker at {where} acknowledged nothing that we published for {seconds:g} s; connecting again and sending it again.",
        needs_person=False,
    )


def of_short_lives(where: str, times: int, client_id: str) -> Refusal:
    """Connections end one after the other soon after they began. mosquitto before 2.1 gives no reason when it is a takeover."""
    return Refusal(
        f"The broker at {where} ended {times} connections in a row within seconds and gave no reason: probably another client "
        f"connects under our client id {client_id!r} (a second worker with a copy of this one's state, or somebody who wants to "
        "push it off), and each pushes the other off. Stop the other one, or have the broker bind client ids to users.",
        needs_person=False,
    )


def of_end(where: str, *, code: int, name: str, from_broker: bool, unreadable: bool) -> Refusal:
    """The sentence for the end of an established connection."""
    if from_broker or code == 0x8D:
        return of_disconnect(code, name)
    if unreadable:
        return Refusal(f"The broker at {where} sent something that cannot be read.", needs_person=False)
    return Refusal(f"The connection to the broker at {where} broke.", needs_person=False)
