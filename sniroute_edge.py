"""sniroute_edge: how Cloudflare's edge is spoken to: what `--hostname` means, TLS, the upgrade, its answers.

    "app.example.com:443/x" --- parse_target ---> Target
    options, variables      --- identity -------> headers that tell Access who we are

    a connected socket ---> Upgrade.start --- TLS ---> request ---> answer --- judge ---> done(Upgraded)
                            (from a Dial)                                                 or done(Failed)

The edge answers with the upgrade, or with a status and a page that tell why not; `judge` makes of these
one of REASONS.  Its key is for sniroute (CARRIER_REASONS of sniroute_launchers), its sentence for people.

The life of an upgrade is `Upgrade.phase`, in words for people:

    SHAKING -> UPGRADING -> OVER
    any -> OVER                    it failed, or it was cancelled

An upgrade has no deadline.  Its owner has one for the whole way to the edge, and cancels it.

Threads: the loop's only.

Seams: I want to ...
    tell a failure apart          a row in REASONS, and in `judge` or where Failed is raised
    give the edge another header  a row in IDENTITY; in `upgrade_request` for what all requests have

This room imports sniroute_forwarder (Listener, which keeps the TLS session), sniroute_dial (Failed),
sniroute_upgrade, sniroute_loop, sniroute_names and sniroute_refusals.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import urllib.parse
from typing import Any, Callable, Mapping, NamedTuple

from sniroute_dial import OVER, Failed
from sniroute_forwarder import TEXT_MAX, Listener
from sniroute_loop import READ, WRITE, Loop, Watch
from sniroute_names import ascii_advice, printable, show_address, unmapped
from sniroute_refusals import Malformed, SettingsError
from sniroute_upgrade import Answer, check_upgrade, new_key, parse_answer, parse_header, upgrade_request

__version__ = "0.1.0"

RECORD = 16384  # bytes that one read of a TLS socket gives at most, RFC 8446 section 5.1
READS = 8  # of an answer before others have their turn: each may give one byte
BODY_MAX = 8192  # bytes of an error page: enough to find its error code


# -- settings ----------------------------------------------------------------------------------


class Target(NamedTuple):
    """What `--hostname` leads to."""

    host: str
    port: int
    path: str  # and the query

    def __str__(self) -> str:
        return self.host if self.port == 443 else show_address((self.host, self.port))


LABEL = r"[A-Za-z0-9_-]{1,63}"  # RFC 1035 section 2.3.4; TLS cannot ask for an empty or a longer one
HOST = re.compile(rf"(?=.{{1,253}}\Z)(?!-)(?:{LABEL}\.)*{LABEL}(?<!-)")


def parse_target(text: str) -> Target:
    """`HOST`, `HOST:PORT` or a URL; whatever its scheme, it is https.  Raises ValueError."""
    wrong = ValueError(f"{printable(text, TEXT_MAX)!r} is not a hostname, HOST:PORT, or a URL{ascii_advice(text)}")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise wrong
    try:
        url = urllib.parse.urlsplit(text if "://" in text else f"https://{text}")
        # Neither TLS (RFC 6066 section 3) nor a certificate has the dot behind a name.
        host, port = (url.hostname or "").removesuffix("."), url.port
    except ValueError:
        raise wrong from None
    try:
        host = str(unmapped(ipaddress.ip_address(host)))
    except ValueError:
        if not HOST.fullmatch(host):
            raise wrong from None
    if port == 0:
        raise wrong
    return Target(host, port or 443, (url.path or "/") + (f"?{url.query}" if url.query else ""))


# The variables that make a header, and the options that do the same.
IDENTITY = (
    ("TUNNEL_SERVICE_DESTINATION", "destination", "Cf-Access-Jump-Destination"),
    ("TUNNEL_SERVICE_TOKEN_ID", "service_token_id", "Cf-Access-Client-Id"),
    ("TUNNEL_SERVICE_TOKEN_SECRET", "service_token_secret", "Cf-Access-Client-Secret"),
    ("CF_ACCESS_TOKEN", "", "Cf-Access-Token"),  # cloudflared keeps this one in a file
)


def identity(environ: Mapping[str, str], given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The headers that tell Access who we are; `given` are the options.  Raises SettingsError."""
    headers = []
    for variable, option, header in IDENTITY:
        value = given.get(option)
        source = f"--{option.replace('_', '-')}" if value else variable
        value = (value or environ.get(variable) or "").strip()  # a secret from a file ends with a newline
        if value:
            try:
                headers.append(parse_header(f"{header}: {value}"))
            except ValueError as error:
                raise SettingsError(f"{source}: {error}") from None
    return headers


def lacks_half(headers: list[tuple[str, str]]) -> bool:
    """Whether a service token is there without its ID, or without its secret."""
    names = [name.lower() for name, _ in headers]
    return ("cf-access-client-id" in names) != ("cf-access-client-secret" in names)


# -- the edge's answer -------------------------------------------------------------------------

# Why a client could not be served: a word for programs (see CARRIER_REASONS of sniroute_launchers), and a
# sentence for people.
REASONS = {
    "name": "the name does not resolve",
    "resolver": "the host's resolver gives no answer",
    "refused": "the edge cannot be reached",
    "timeout": "the edge gave no answer in time",
    "certificate": "the edge's certificate is not trusted",
    "tls": "the TLS handshake failed",
    "reset": "the edge closed the connection",
    "proxy": "the proxy (HTTPS_PROXY) cannot be reached, or refused",
    "login": "Access wants a login: give it a service token (TUNNEL_SERVICE_TOKEN_ID, TUNNEL_SERVICE_TOKEN_SECRET)",
    "denied": "Access denied it (is the token right, and does the application's policy allow it?)",
    "not_found": "the edge knows no such application",
    "origin": "its connector runs, but cannot reach the service",
    "down": "its tunnel is down (does its connector run?)",
    "other": "the edge answered something else",
}
LOGIN_PATH = "/cdn-cgi/access/login"
ERROR_CODE = re.compile(rb"error code: *([0-9]{3,5})|\bError +([0-9]{4})\b", re.IGNORECASE)
STATUS_REASONS = {401: "denied", 403: "denied", 404: "not_found", 502: "origin", 530: "down"}


def wants_body(answer: Answer) -> int:
    """How many bytes of the body are to be waited for: an error page has a code that says more."""
    length = answer.headers.get("content-length", "0")
    return min(int(length[:9]), BODY_MAX) if answer.status >= 500 and length.isdecimal() else 0


def judge(answer: Answer, body: bytes, key: str) -> None:
    """Raise Failed, with its reason, unless the answer is the upgrade that was asked for with `key`.

    The other answers are what Cloudflare's edge gives.
    """
    status = answer.status
    if status == 101:
        try:
            check_upgrade(answer, key)
        except Malformed as error:
            raise Failed("other", str(error)) from None
        return
    detail = f"HTTP {status}"
    if 300 <= status < 400:
        try:
            url = urllib.parse.urlsplit(printable(answer.headers.get("location", ""), TEXT_MAX))
        except ValueError:
            raise Failed("other", f"{detail} to what is no URL") from None
        if status == 302 and url.path.startswith(LOGIN_PATH):
            raise Failed("login", detail)
        raise Failed("other", f"{detail} to {url.scheme}://{url.netloc}{url.path}: a web application?")
    code = ERROR_CODE.search(body)
    if code:
        detail += f", error {(code[1] or code[2]).decode()}"
    raise Failed(STATUS_REASONS.get(status, "other"), detail)


# -- TLS and the upgrade -----------------------------------------------------------------------

SHAKING, UPGRADING = "TLS handshake", "upgrade"  # the phases of an Upgrade, before OVER


def send_some(sock: ssl.SSLSocket, data: memoryview) -> memoryview:
    """Send what is taken now.  Returns the rest; raises OSError."""
    try:
        while data:
            data = data[sock.send(data):]
    except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
        pass
    return data


def has_ended(error: OSError) -> bool:
    """Whether this says that the edge has ended, with TLS's own word for it or without.

    Python 3.11.2, which Debian 12 has, makes no SSLEOFError of the one without.
    """
    return isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) \
        or getattr(error, "reason", None) == "UNEXPECTED_EOF_WHILE_READING"


def make_context() -> ssl.SSLContext:
    """What TLS to the edge trusts and allows.  OpenSSL reads SSL_CERT_FILE and SSL_CERT_DIR."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # With TLS 1.2 an edge could have a send wait for its next word, while the loop sees that it takes more.
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Some Pythons set it, as Debian 12's does (3.11.2): an end without a close_notify would look like one with it.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


def was_reset(sock: socket.socket) -> bool:
    """Whether a connection that is over was reset; CPython before 3.12.3 takes that for an end (its gh-115627)."""
    try:
        sock.getpeername()
    except OSError:
        return True
    return False


class Upgraded(NamedTuple):
    """A connection to the edge that speaks WebSocket."""

    sock: ssl.SSLSocket
    watch: Watch
    first: bytes  # what the edge said behind its answer


class Upgrade:
    """TLS and the upgrade to WebSocket over a connected socket, which it owns.  All methods run in the loop.

    After `start`, unless it is cancelled, `done` is called once, perhaps before `start` returns:

        done(Upgraded)   the caller owns the socket from here on
        done(Failed)     the socket is closed
    """

    __slots__ = ("context", "headers", "listener", "sock", "watch", "done", "phase", "key", "out", "head", "answer")

    def __init__(self, loop: Loop, context: ssl.SSLContext, headers: list[tuple[str, str]], listener: Listener,
                 sock: socket.socket, done: Callable[[Upgraded | Failed], None]):
        self.context = context
        self.headers = headers
        self.listener = listener
        self.sock: Any = sock
        self.watch = Watch(loop.poller, sock.fileno())
        self.done = done
        self.phase = SHAKING
        self.key = ""
        self.out = memoryview(b"")  # what is still to be sent of the request
        self.head = bytearray()  # what has come of the answer
        self.answer: Answer | None = None

    def start(self) -> None:
        """Begin TLS, with the session of the listener's last connection, where there is one."""
        if was_reset(self.sock):  # wrap_socket takes that for a socket that is not connected yet
            self._end(Failed("reset", "in the TLS handshake"))
            return
        try:
            self.sock = self.context.wrap_socket(
                self.sock, server_hostname=self.listener.target.host, do_handshake_on_connect=False,
                suppress_ragged_eofs=False, session=self.listener.kept)
        except OSError as error:  # it was reset meanwhile
            self._end(Failed("reset", error.strerror or str(error)))
            return
        self.on_shake(WRITE)

    def cancel(self) -> None:
        """Close the socket, and never call `done`.  Does nothing when the upgrade is over."""
        if self.phase is not OVER:
            self.phase = OVER
            self.watch.closing()
            self.sock.close()

    def on_shake(self, mask: int) -> None:
        """One more step of the handshake."""
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self.watch.wait_for(READ, self.on_shake)
        except ssl.SSLWantWriteError:
            self.watch.wait_for(WRITE, self.on_shake)
        except ssl.SSLCertVerificationError as error:
            self._end(Failed("certificate", error.verify_message))
        except ssl.SSLError as error:
            self._end(Failed("reset", "in the TLS handshake") if has_ended(error)
                      else Failed("tls", error.reason or error.strerror or str(error)))
        except OSError:
            self._end(Failed("reset", "in the TLS handshake"))
        else:
            self.phase = UPGRADING
            self.key = new_key()
            self.out = memoryview(upgrade_request(*self.listener.target, self.key, self.headers))
            self.on_upgrade(WRITE)

    def on_upgrade(self, mask: int) -> None:
        """Send the request, read the answer."""
        try:
            self.out = send_some(self.sock, self.out)
            if self.out:
                self.watch.wait_for(WRITE, self.on_upgrade)
                return
            self.watch.wait_for(READ, self.on_upgrade)
            for _ in range(READS):  # each takes a whole record, so that the loop sees what is left
                data = self.sock.recv(RECORD)
                self.head += data
                result = self._judged(not data)
                if result is not None:
                    break
            else:
                return
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as error:
            result = Failed("reset", f"before its answer: {error.strerror or error}")
            if self.answer is not None or has_ended(error):
                result = self._judged(True)
        self._end(result)

    def hurry(self) -> bool:
        """Judge the answer now, though its error page is not complete.  False: there is no answer yet."""
        if self.answer is None:
            return False
        self._end(self._judged(True))
        return True

    def _judged(self, over: bool) -> Upgraded | Failed | None:
        """What the answer means; None: it is not complete.  `over`: nothing more will come."""
        try:
            if self.answer is None:
                self.answer = parse_answer(self.head)
            if self.answer is None:
                return Failed("reset", "before its answer") if over else None
            body = bytes(self.head[self.answer.end:])
            if len(body) < wants_body(self.answer) and not over:
                return None
            judge(self.answer, body, self.key)
        except Malformed as error:
            return Failed("other", str(error))
        except Failed as why:
            return why
        if not self.sock.session_reused:  # reading one costs 0.6 ms: not for each connection
            session = self.sock.session
            self.listener.kept = session if session is not None and session.has_ticket else None
        return Upgraded(self.sock, self.watch, body)

    def _end(self, result: Upgraded | Failed) -> None:
        """Tell the result."""
        if isinstance(result, Failed):
            self.cancel()
        self.phase = OVER
        self.done(result)
