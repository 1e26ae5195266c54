"""sniroute_tls: TLS to a backend, in the loop: the router is the client.

    TlsClients.begin(name, verify) ---> TlsClient ---- hello ------> what is sent first
                                       |
        what the backend says  --- answer(data) -------------> what is sent next, until `is_ready`
                               --- fill(sock), read(size) ---> what it means
        what the backend is told --- seal(data) -------------> what is sent

A TlsClient is one TLS connection (RFC 8446), without its socket: OpenSSL works on two buffers in memory
(`ssl.SSLObject`), so it never touches a socket, and never waits. A session that a backend has given is used again, for
the same name and the same settings: such a handshake needs no certificate.

Threads: the loop only, but for `context`, which opens files: the settings are checked with it, and so it is made before
the loop asks for it.

Seams: I want to ...
    trust otherwise     `context`
    keep more sessions  SESSIONS_MAX

This room imports sniroute_refusals.
"""

from __future__ import annotations

import collections
import errno
import functools
import os
import ssl
from typing import Any

from sniroute_refusals import Refused

__version__ = "0.1.0"

# Limits, each with its reason.
CONTEXTS_MAX = 64  # values of `verify`: a context takes half a megabyte where it holds all that this host trusts
SESSIONS_MAX = 1024  # sessions of backends: about 3 KB each
RECORDS = 1 << 16  # bytes of TLS read at a time: four records
FLIGHT_MAX = 1 << 17  # bytes of a handshake: a chain of certificates is a tenth of that

Key = tuple[str, str | bool]  # the name that is asked for, and `verify`


def context(verify: str | bool) -> ssl.SSLContext:
    """What `verify` says: True, the authorities that this host trusts; a path, those in that file; False, none.

    Made once, and again where the file has changed.  Raises OSError, of which ssl.SSLError is one, where the file
    cannot be read, or has none.
    """
    return made_context(verify, file_state(verify) if isinstance(verify, str) else ())


def file_state(path: str) -> tuple[int, ...]:
    """What differs where a file has changed.  Raises OSError."""
    state = os.stat(path)
    return state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size


@functools.lru_cache(CONTEXTS_MAX)
def made_context(verify: str | bool, state: tuple[int, ...]) -> ssl.SSLContext:
    """As `context`; another `state` is that of a file that has changed."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.set_alpn_protocols(["http/1.1"])
    made.options |= ssl.OP_NO_RENEGOTIATION  # TLS 1.2: in the middle of it nothing could be sent
    # Some Pythons set it, as Debian 12's does (3.11.2): an end without a close_notify would look like one with it.
    made.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    if verify is False:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    elif verify is True:
        made.load_default_certs()
    else:
        made.load_verify_locations(verify)
    return made


def reason(error: ssl.SSLError) -> str:
    """What went wrong, for people."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate: {error.verify_message}"
    return (error.reason or str(error)).lower().replace("_", " ")


class TlsClients:
    """The contexts and sessions of a router, since its settings were read.  Loop only."""

    def __init__(self) -> None:
        self.contexts: dict[str | bool, ssl.SSLContext] = {}  # by `verify`: as many as routes have
        self.sessions: collections.OrderedDict[Key, ssl.SSLSession] = collections.OrderedDict()

    def begin(self, name: str, verify: str | bool) -> TlsClient:
        """A new connection to a backend that is to be `name`, a host name or an address.  Raises Refused."""
        key = name, verify
        made = self.contexts.get(verify)
        if made is None:
            try:
                made = self.contexts[verify] = context(verify)
            except OSError as error:
                raise Refused("backend_tls", f"{verify}: {error.strerror or error}") from None
        return TlsClient(self, key, made, self.sessions.get(key))

    def keep(self, key: Key, session: ssl.SSLSession) -> None:
        """Use this session the next time."""
        self.sessions[key] = session
        self.sessions.move_to_end(key)
        if len(self.sessions) > SESSIONS_MAX:
            self.sessions.popitem(False)


class TlsClient:
    """One TLS connection to a backend.  It has no socket; its owner sends what it says."""

    __slots__ = ("clients", "key", "incoming", "outgoing", "tls", "is_ready", "is_dry", "taken", "is_new")

    def __init__(self, clients: TlsClients, key: Key, made: ssl.SSLContext, session: ssl.SSLSession | None):
        self.clients = clients
        self.key = key
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls: Any = made.wrap_bio(self.incoming, self.outgoing, server_hostname=key[0], session=session)
        self.is_ready = False  # the handshake is over
        self.is_dry = True  # `read` has met the end of what has come
        self.taken = 0  # bytes of the handshake so far
        self.is_new = True  # its session is not kept yet

    def hello(self) -> bytes:
        """The first bytes to send."""
        return self.answer(b"")

    def answer(self, data: bytes) -> bytes:
        """The backend said this in the handshake: what is to be sent.  Raises Refused."""
        self.incoming.write(data)
        self.taken += len(data)
        try:
            self.tls.do_handshake()
            self.is_ready, self.is_dry = True, False
        except ssl.SSLWantReadError:
            if self.taken > FLIGHT_MAX:
                raise Refused("backend_tls", "its handshake has no end") from None
        except ssl.SSLError as error:
            raise Refused("backend_tls", reason(error)) from None
        return self.outgoing.read()

    def fill(self, sock: Any) -> None:
        """Take what the backend's socket has.  Raises BlockingIOError, OSError."""
        if self.outgoing.pending > FLIGHT_MAX:  # it asks for new keys again and again, and does not hear the answers
            raise ConnectionResetError(errno.ECONNRESET, "it does not take what TLS has to answer")
        data = sock.recv(RECORDS)
        self.is_dry = False
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    def read(self, size: int) -> bytes:
        """What the backend said, at most `size` bytes; b"": it has ended.  Raises BlockingIOError, OSError.

        An end without TLS's own word for it (close_notify) is a cut: anybody between could have made it.
        """
        try:
            data = self.tls.read(size)
        except ssl.SSLWantReadError:
            self.is_dry = True
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        except ssl.SSLZeroReturnError:
            data = b""
        except ssl.SSLError as error:
            self.is_dry = True
            raise ConnectionResetError(errno.ECONNRESET, reason(error)) from None
        self.is_dry = not data
        if self.is_new:  # with TLS 1.3 a backend gives its session behind the handshake, mostly before it says anything
            self.is_new = False
            if not self.tls.session_reused and self.tls.session is not None:
                self.clients.keep(self.key, self.tls.session)
        return data

    def has_more(self) -> bool:
        """Whether something that has come was not read."""
        return bool(self.incoming.pending or self.tls.pending())

    def seal(self, data: bytes) -> bytes:
        """What is sent for these bytes.  Raises OSError where the backend has broken off."""
        self.tls.write(data)
        return self.outgoing.read()

    def close(self) -> bytes:
        """What is sent to say that no more comes; `read` goes on.

        Only where all has been read: OpenSSL takes what is left for a fault.
        """
        try:
            self.tls.unwrap()
        except ssl.SSLError:
            pass  # the backend's own end has not come yet
        return self.outgoing.read()
