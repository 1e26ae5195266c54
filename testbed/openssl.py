"""OpenSSL as the judge: which name its server reads in a hello, and what it refuses."""

from __future__ import annotations

import functools
import ssl
from typing import Any, NamedTuple

from testbed.hellos import records


class Answer(NamedTuple):
    """What OpenSSL's server makes of a hello."""

    asked: bool  # it got as far as to ask for the certificate of a name
    name: str | None
    reason: str | None  # None: it wants more bytes
    alert: bytes


@functools.cache
def openssl_context() -> tuple[ssl.SSLContext, list[str | None]]:
    seen: list[str | None] = []

    def note(sock: Any, name: str | None, context: Any) -> int:
        seen.append(name)
        return ssl.ALERT_DESCRIPTION_USER_CANCELLED  # the handshake ends here

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = note
    return context, seen


def openssl(data: bytes) -> Answer:
    """Ask OpenSSL.  Not for names beyond ASCII: CPython cannot pass them on, and says so."""
    context, seen = openssl_context()
    seen.clear()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    incoming.write(data)
    reason = None
    try:
        context.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
    except ssl.SSLWantReadError:
        pass
    except ssl.SSLError as error:
        reason = error.reason
    return Answer(bool(seen), seen[0] if seen else None, reason, outgoing.read(7))


def blinded(data: bytes) -> bytes:
    """The hello with the same framing and name, but nothing else in it that OpenSSL knows.

    OpenSSL also judges the contents of the other extensions, the cipher suites and the version.
    sniroute leaves that to the backend, which does not make the name another one.
    """
    message, at = bytearray(), 0
    while len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4], "big"):
        size = int.from_bytes(data[at + 3:at + 5], "big")
        message += data[at + 5:at + 5 + size]
        at += 5 + size
    del message[4 + int.from_bytes(message[1:4], "big"):]
    message[4:6] = b"\3\3"
    at = 4 + 34
    at += 1 + message[at]
    size = int.from_bytes(message[at:at + 2], "big")
    message[at + 2:at + 2 + size] = b"\xc0\x2f" * (size // 2)
    at += 2 + size
    size = message[at]
    message[at + 1:at + 1 + size] = bytes(size)
    at += 1 + size + 2
    unknown = 0x6000
    while at < len(message):
        if message[at:at + 2] != b"\0\0":
            message[at:at + 2] = unknown.to_bytes(2, "big")
            unknown += 1
        at += 4 + int.from_bytes(message[at + 2:at + 4], "big")
    return records(bytes(message), *[16000] * (len(message) // 16000))


def check_against_openssl(data: bytes, name: str | None) -> None:
    """A name that we accept is the one that OpenSSL reads, and where we see none it sees none.

    In a second try it is asked without what it alone looks at, and with whole records: it waits
    for the end of the last one.
    """
    answer = openssl(data)
    if not answer.asked:
        answer = openssl(blinded(data))
    assert answer.asked and (answer.name and answer.name.lower()) == (name and name.lower()), answer
