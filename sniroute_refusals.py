"""sniroute_refusals: why a connection is refused, and how its client is told.

    raise Refused("no_route", "no route for db.example.com")
          |
          v
    REFUSALS["no_route"]  --- told(refused, TLS) -------> a TLS alert
          |                   told(refused, POSTGRES) --> a PostgreSQL ErrorResponse
          |                   told(refused, HTTP) ------> a page, with the row's status
          v
    the log line's level and reason, a counter, the advice of `sniroute explain`

One table, REFUSALS, has a row for each reason and a column for each language.  Everything that refuses
a client raises Refused with the name of a row; `Connection.refuse` is the one place that catches it.

Threads: none of its own; nothing here changes after the import.

Seams: I want to ...
    refuse for another reason       a row in REFUSALS, and in OPERATING.md: a test compares them
    tell it in another language     a row in TELLERS, and a column of Refusal for what varies there

This room imports the standard library only.
"""

from __future__ import annotations

import struct
from typing import Callable, NamedTuple

__version__ = "0.1.0"

# TLS alerts, RFC 8446 section 6.
UNEXPECTED_MESSAGE, ILLEGAL_PARAMETER, DECODE_ERROR = 10, 47, 50
ACCESS_DENIED, PROTOCOL_VERSION, INTERNAL_ERROR, UNRECOGNIZED_NAME = 49, 70, 80, 112

TLS_VERSION_LAST = 3  # the minor record version of TLS 1.2 and 1.3: an alert never claims a newer one

# What a client speaks when it is refused: the rows of TELLERS.
NOTHING, TLS, POSTGRES, HTTP = "nothing", "tls", "postgres", "http"


class SettingsError(Exception):
    """Settings that stop the start; `lines` has one line for each fault, naming the setting."""

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


class Refused(Exception):
    """A connection that is refused.

    `kind` is a row of REFUSALS; the message is for the log.  `alert` replaces the row's TLS alert, `status`
    its HTTP status; `farewell` is sent instead of anything the row says.
    """

    def __init__(self, kind: str, message: str, alert: int | None = None, farewell: bytes = b"", status: int = 0):
        super().__init__(message)
        self.kind = kind
        self.alert = REFUSALS[kind].alert if alert is None else alert
        self.status = status or REFUSALS[kind].status
        self.farewell = farewell


class Malformed(Refused):
    """Bytes from the network that are not what they claim to be."""

    def __init__(self, message: str, alert: int | None = None, kind: str = "malformed", status: int = 0):
        super().__init__(kind, message, alert, status=status)


class Failed(Exception):
    """A tunnel program has not got where it was to go: `reason` is a word for programs, the message says more.

    The words are those of the room that raises it.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class Refusal(NamedTuple):
    """One reason for which connections are refused, as a row."""

    level: int  # of its log line; what strangers cause without speaking TLS properly is for debug only
    alert: int | None  # the TLS alert that says so (RFC 8446 section 6); None: the connection closes
    status: int  # the HTTP status that says so (RFC 9110 section 15)
    meaning: str  # for people
    advice: str  # what the operator, or the client's user, can do about it


# As `logging` has them.  It is not imported here: that takes a tunnel program 0.7 MiB and 5 ms of its start.
DEBUG, INFO, WARNING, ERROR = 10, 20, 30, 40
REFUSALS = {
    "not_tls": Refusal(DEBUG, None, 400, "the client speaks something else",
                       "nothing, or look at what connects: only TLS and PostgreSQL name a service"),
    "malformed": Refusal(DEBUG, None, 400, "the client's TLS or PostgreSQL prelude is broken",
                         "update the client, or look at what stands between"),
    "bad_request": Refusal(DEBUG, None, 400, "the request is not plain HTTP/1.1, or asks for more than is served",
                           "look at the client, and at what stands between: two programs may read such a request in "
                           "two ways"),
    "hello_too_large": Refusal(INFO, DECODE_ERROR, 431, "the client's ClientHello is larger than 64 KiB",
                               "have the client send less: a ticket with a smaller certificate, or no resumption"),
    "truncated": Refusal(DEBUG, DECODE_ERROR, 400, "the client left in the middle of its prelude",
                         "nothing: health checks and scanners do so"),
    "prelude_timeout": Refusal(DEBUG, DECODE_ERROR, 408, "the client did not say its name within --prelude-timeout",
                               "raise --prelude-timeout where clients are slow"),
    "shed": Refusal(DEBUG, None, 503, "too many clients had not said their name: the oldest went",
                    "lower --prelude-timeout, or look for who connects and says nothing"),
    "proxy": Refusal(INFO, None, 400, "a PROXY header is missing, broken, or from an untrusted address",
                     "name your balancers in --proxy-from"),
    "no_name": Refusal(INFO, UNRECOGNIZED_NAME, 400, "the client's TLS names no server",
                       "connect by name, with SNI (PostgreSQL 14 and later send it)"),
    "bad_name": Refusal(INFO, UNRECOGNIZED_NAME, 400, "the name is no host name",
                        "ask for a host name of letters, digits and hyphens, and for no address"),
    "no_route": Refusal(INFO, UNRECOGNIZED_NAME, 404, "no route fits the name",
                        "add a route, as --route 'NAME=TARGET', or to [routes] in the file of settings"),
    "not_allowed": Refusal(INFO, ACCESS_DENIED, 403, "the route does not allow the client's address",
                           "add the client's network to the route's allow"),
    "route_limit": Refusal(WARNING, INTERNAL_ERROR, 503, "the route has as many connections as it may have",
                           "raise the route's max_connections"),
    "forbidden": Refusal(WARNING, UNRECOGNIZED_NAME, 403,
                         "the name leads to an address, a namespace or a cluster that its route may not reach",
                         "name the host in the target, instead of letting the client choose it; or add it to the "
                         "route's namespaces or contexts"),
    "plain_postgres": Refusal(INFO, None, 400,
                              "sniroute routes by the TLS server name: a connection without TLS has none",
                              "Connect with sslmode=require."),
    "cancel": Refusal(DEBUG, None, 400, "a PostgreSQL CancelRequest in clear text cannot be routed",
                      "use clients of PostgreSQL 17 or later, which cancel over TLS"),
    "client_limit": Refusal(WARNING, INTERNAL_ERROR, 429, "the client address has --max-per-client connections",
                            "raise --max-per-client, or name a balancer in --proxy-from"),
    "busy": Refusal(WARNING, INTERNAL_ERROR, 503,
                    "too many names wait or programs run already, or descriptors, threads or ports are short",
                    "raise LimitNOFILE or --max-tunnels, or look for who asks for so many names"),
    "unresolved": Refusal(WARNING, INTERNAL_ERROR, 502, "the target's host does not resolve",
                          "check the target, and the resolver of this host"),
    "backend": Refusal(WARNING, INTERNAL_ERROR, 502, "the backend refused the connection, or did not answer",
                       "check the service at the target's address"),
    "bad_answer": Refusal(WARNING, None, 502, "the backend's answer is not plain HTTP/1.1, or ends too early",
                          "ask the backend directly, as with curl -v: is it HTTP, and whole?"),
    "backend_tls": Refusal(WARNING, INTERNAL_ERROR, 502,
                           "the backend's TLS failed, or its certificate is not for the host",
                           "check the certificate there, and the route's verify and host"),
    "late_head": Refusal(DEBUG, None, 408, "the head of the request did not come in time",
                         "raise http_head_timeout where clients are slow"),
    "late_body": Refusal(INFO, None, 408, "the body of the request stopped coming",
                         "raise http_idle where clients are slow"),
    "late_answer": Refusal(WARNING, None, 504, "the backend did not begin its answer within http_response_timeout",
                           "look at the backend, or raise http_response_timeout"),
    "no_method": Refusal(DEBUG, None, 405, "the method is one that a gateway does not serve",
                         "nothing: this is no proxy for clients, so it opens no tunnels for them"),
    "cross_site": Refusal(INFO, None, 403, "another site's page has a browser ask for this",
                          "open the address itself; where other sites may ask, set the route's cross_site to allow"),
    "loop": Refusal(WARNING, None, 508, "the request has come through this router already",
                    "look where the route leads: back to here"),
    "queue_timeout": Refusal(WARNING, INTERNAL_ERROR, 503, "no backend of the route had room in time",
                             "raise the route's max_backend_connections, or its queue; or add a backend"),
    "queue_full": Refusal(WARNING, INTERNAL_ERROR, 503, "as many clients wait for a backend as the route allows",
                          "raise the route's max_backend_connections, or its queue_length; or add a backend"),
    "backend_no_tls": Refusal(WARNING, INTERNAL_ERROR, 502, "the PostgreSQL backend does not offer TLS",
                              "set ssl = on there: the client is never downgraded"),
    "tunnel_failed": Refusal(WARNING, INTERNAL_ERROR, 502, "the tunnel did not start, or gave no answer",
                             "mend what it says; if that is at the far end, see that the service runs there, and "
                             "`cloudflared tunnel run` where the route needs it"),
    "tunnel_denied": Refusal(WARNING, ACCESS_DENIED, 502, "Access refuses the router: no token, a wrong one, no right",
                             "check TUNNEL_SERVICE_TOKEN_ID and _SECRET, "
                             "and that the application has a Service Auth policy"),
    "tunnel_unknown": Refusal(WARNING, UNRECOGNIZED_NAME, 502,
                              "the tunnel's name does not resolve, or the edge does not know it",
                              "check the hostname in the target, "
                              "and that the tunnel has it as a public hostname of type TCP"),
    "tunnel_timeout": Refusal(WARNING, INTERNAL_ERROR, 504,
                              "the target was not ready within --start-timeout: its tunnel, or its address",
                              "check the way out of this host: firewall, HTTPS_PROXY, resolver"),
    "tunnel_limit": Refusal(WARNING, INTERNAL_ERROR, 503, "--max-tunnels are in use",
                            "raise --max-tunnels and --ports, or lower --idle"),
    "tunnel_budget": Refusal(WARNING, INTERNAL_ERROR, 429, "the client address asked for too many cold tunnels",
                             "wait a few seconds, or look for who asks for so many names"),
    "tunnel_stopping": Refusal(INFO, INTERNAL_ERROR, 503, "sniroute is stopping", "connect again"),
    "tunnel_absent": Refusal(WARNING, UNRECOGNIZED_NAME, 404,
                             "the cluster has no such service, pod or port, or the kubeconfig no such context",
                             "compare the target with `kubectl get services,pods` and `kubectl config get-contexts`"),
    "tunnel_not_ready": Refusal(WARNING, INTERNAL_ERROR, 503, "no pod behind the target is ready",
                                "see in the line which pods there are, and what each waits for"),
    "tunnel_config": Refusal(WARNING, INTERNAL_ERROR, 502, "the kubeconfig cannot be used",
                             "mend what it says; --kubeconfig names another one"),
    "tunnel_login": Refusal(WARNING, ACCESS_DENIED, 502, "the API server does not know the router (401)",
                            "renew the credentials in the kubeconfig, as the router's user"),
    "tunnel_forbidden": Refusal(WARNING, ACCESS_DENIED, 502, "the API server does not let the router do that (403)",
                                "give the router's user the role that OPERATING.md has"),
    "tunnel_unreachable": Refusal(WARNING, INTERNAL_ERROR, 504, "the API server cannot be reached, or is too busy",
                                  "check the server in the kubeconfig, and the way there: VPN, firewall, proxy-url"),
    "tunnel_certificate": Refusal(WARNING, INTERNAL_ERROR, 502, "TLS with the API server failed",
                                  "check certificate-authority-data and tls-server-name in the kubeconfig"),
    "tunnel_plugin": Refusal(WARNING, INTERNAL_ERROR, 502, "the credential plugin of the kubeconfig failed",
                             "run it by hand, as the router's user; --exec-path says where plugins are"),
    "tunnel_away": Refusal(WARNING, INTERNAL_ERROR, 503, "no NodePass client has dialled in",
                           "start the client behind NAT, with the key and the address of the server in the target; "
                           "`explain NAME` shows both ends"),
    "command_failed": Refusal(WARNING, INTERNAL_ERROR, 502, "the program did not start, or ended without a byte",
                              "run it by hand, as the router's user and with its environment alone; "
                              "what it needs goes into the route's env and env_from"),
    "internal": Refusal(ERROR, INTERNAL_ERROR, 500, "a fault in sniroute itself: please report it",
                        "report it, with the traceback in the log"),
}


def tunnel_refused(kind: str, message: str) -> Refused:
    """The refusal for a TunnelError of this kind, or for a Reason."""
    return Refused("tunnel_" + kind, message)


# -- how a client is told ----------------------------------------------------------------------


def tls_alert(description: int, minor: int) -> bytes:
    """A fatal alert record, RFC 8446 section 6; `minor` is that of the client's record version."""
    return bytes((21, 3, min(minor, TLS_VERSION_LAST), 0, 2, 2, description))


def postgres_error(message: str, hint: str) -> bytes:
    """An ErrorResponse, as PostgreSQL's clients show it to people; 08004: connection rejected.

    Source: PostgreSQL, "Message Formats" and "Error and Notice Message Fields".
    """
    fields = {"S": "FATAL", "V": "FATAL", "C": "08004", "M": message, "H": hint}
    body = b"".join(f"{key}{value}\0".encode("ascii", "replace") for key, value in fields.items()) + b"\0"
    return b"E" + struct.pack(">I", 4 + len(body)) + body


def _tell_tls(refused: Refused, minor: int) -> bytes:
    return b"" if refused.alert is None else tls_alert(refused.alert, minor)


def _tell_postgres(refused: Refused, minor: int) -> bytes:
    row = REFUSALS[refused.kind]
    return postgres_error(row.meaning, row.advice)


TELLERS: dict[str, Callable[[Refused, int], bytes]] = {
    NOTHING: lambda refused, minor: b"", TLS: _tell_tls, POSTGRES: _tell_postgres,
}  # and HTTP, where it is served: sniroute_web adds its row


def told(refused: Refused, speaks: str, minor: int = TLS_VERSION_LAST) -> bytes:
    """What is sent to a refused client before the close; b"" where nothing is.

    `speaks` is a row of TELLERS; `minor` the minor version of the client's TLS record.
    """
    return refused.farewell or TELLERS[speaks](refused, minor)
