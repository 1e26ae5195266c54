"""OpenSSL as the judge: which name does its server read in a hello, and what does it refuse?"""

from __future__ import annotations

import functools
import ssl
from typing import Any, NamedTuple

from testbed.hellos import records


class Answer(NamedTuple):
    """What OpenSSL's server does with a hello."""

    asked: bool  # it has read the hello and called its SNI callback
    name: str | None  # given to that callback
    reason: str | None  # of its error; None: it wants more bytes
    alert: bytes  # the record it sends


@functools.cache
def openssl_context() -> tuple[ssl.SSLContext, list[str | None]]:
    """A server's context that ends each handshake at the name, and the list in which it notes the names."""
    seen: list[str | None] = []

    def note(sock: Any, name: str | None, context: Any) -> int:
        seen.append(name)
        return ssl.ALERT_DESCRIPTION_USER_CANCELLED  # the handshake ends here

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = note
    return context, seen


def openssl(data: bytes) -> Answer:
    """Give a hello to OpenSSL's server.  Not one with a name beyond ASCII: CPython cannot pass that to the callback."""
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
    """The hello with the same framing and the same name; all else is replaced by what OpenSSL accepts or ignores.

    OpenSSL also judges the version, the cipher suites and the contents of other extensions.  sniroute leaves that to
    the backend: none of it changes the name.
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
    """Check that OpenSSL reads the same name in a hello that we accept, or none if we read none.

    If OpenSSL refuses the hello, it gets a second one: `blinded`, and in whole records, since it waits for the end of
    the last record where we do not.  It leaves a trailing dot where it is.
    """
    answer = openssl(data)
    if not answer.asked:
        answer = openssl(blinded(data))
    asked_for = answer.name and answer.name.lower().removesuffix(".")
    assert answer.asked and asked_for == (name and name.lower()), answer
