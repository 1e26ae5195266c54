"""sniroute_gateway: what a gateway adds to a request, takes away, and refuses.

    Request --- check -----------> Refused: no_method, loop, cross_site
            --- max_forwards ----> the Request with one hop less to go, or None: answer it here
            --- hop -------------> Via, X-Forwarded-*, X-Real-IP --+
            --- choose_upgrade --> the protocol that is offered ---+--> sniroute_http.pass_request
            --- may_ask_again ---> whether it may be sent a second time

The order is what keeps forged fields out: first what `Connection` names goes, then all that claims to speak for
another, in every spelling, then ours are set.  `pass_request` does the first two, so it is given what `hop` returns
with the same `believes`.

A browser asks for what any page tells it to, with the rights of whoever sits before it: to reach a service behind a
router on its own host, a page in that browser is enough.  So with `Policy.cross_site` the request of another site's
page is refused: `is_cross_site`.

Threads: none.  The caches are bounded; what they hold never changes.

Seams: I want to ...
    refuse another method         NOT_SERVED
    add another field             fields_of; `is_forwarding` of sniroute_http, so that a client's own is removed; where
                                  a believed proxy may say it, READ_HERE: then its own stays
    let another page ask          is_cross_site
    offer another protocol        the route's `upgrades`; NEVER_OFFERED

This room imports sniroute_http (Request, and its lines), sniroute_names (addresses) and sniroute_refusals.
"""

from __future__ import annotations

import functools
import re
from typing import Mapping, NamedTuple

from sniroute_http import Head, Request, bad, number, parse_lines
from sniroute_names import parse_ip, printable
from sniroute_refusals import REFUSALS, Refused

__version__ = "0.1.0"

OUR_NAME = b"sniroute"  # in Via: a pseudonym (RFC 9110 section 7.6.3), so that no client learns the host's name
HOPS_REMEMBERED = 1024  # what `fields_of` and `address_in` keep, each: so many clients and names, half a KiB each
ADDRESS_MAX = 64  # characters of an address; an IPv6 one with its scope has 61 at most

# CONNECT would make a proxy for clients of a gateway; TRACE shows a page what its browser sends (RFC 9110 section 9.3).
NOT_SERVED = frozenset(("CONNECT", "TRACE"))
# What may be asked twice, RFC 9110 section 9.2.2.  Of the extensions nobody can know.
IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "PUT", "DELETE"))
# h2c would be a tunnel past all rules: its later requests could not be seen (RFC 9113 section 3.1 has given it up).
NEVER_OFFERED = frozenset((b"h2c",))

VIA = re.compile(rb"(?:^|,)[ \t]*(?:[^ \t,/]+/)?[^ \t,/]+[ \t]+%b(?![^ \t,(])" % OUR_NAME, re.IGNORECASE)
ORIGIN = re.compile(rb"[a-z][a-z0-9+.-]*://([a-z0-9._-]+)(?::[0-9]{1,5})?", re.IGNORECASE)  # RFC 6454 section 6.2
HOPS = re.compile(rb"[0-9]{1,18}")  # RFC 9110 section 7.6.2

FOR, PROTO, HOST, PORT = b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host", b"X-Forwarded-Port"
REAL_IP, VIA_FIELD = b"X-Real-IP", b"Via"
LISTS = frozenset((FOR, VIA_FIELD))  # each hop adds to them
READ_HERE = frozenset((b"via", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest",
                       *(name.lower() for name in (FOR, PROTO, HOST, PORT, REAL_IP))))


class Policy(NamedTuple):
    """What a route says about plain HTTP."""

    mode: str = "refuse"  # forward, forward-tls, redirect, pass, refuse
    verify: bool | str = True  # with forward-tls: whether the certificate is checked; or the file of authorities
    cross_site: bool = False  # whether requests of other sites' pages are refused
    upgrades: frozenset[bytes] = frozenset((b"websocket",))  # the protocols that may be offered, in lower case
    reuse: str = "client"  # client, off, safe
    redirect_port: int | None = None  # None: by the port of the listener


# -- what lines say ----------------------------------------------------------------------------


def read(head: Head) -> Mapping[bytes, tuple[bytes, ...]]:
    """The values of what is READ_HERE, by key; where there is one.  Only its true spelling counts."""
    said: dict[bytes, tuple[bytes, ...]] = {}
    for field in head.fields:
        if field.key in READ_HERE and field.name.lower() == field.key:
            said[field.key] = (*said.get(field.key, ()), field.value)
    return said


# -- what is refused ---------------------------------------------------------------------------


def check(request: Request, policy: Policy) -> None:
    """Raise Refused for what a gateway does not serve: `no_method`, `loop`, `cross_site`."""
    if request.method in NOT_SERVED:
        raise Refused("no_method", f"{request.method} is not served")
    said = read(request.head)
    if b"via" in said and any(map(VIA.search, said[b"via"])):
        raise Refused("loop", f"the request for {request.name} names sniroute in Via")
    if policy.cross_site and is_cross_site(request.method, request.name, said):
        origin = b", ".join(said.get(b"origin", ())).decode("latin-1")
        raise Refused("cross_site", f"{REFUSALS['cross_site'].meaning}: {printable(origin) or 'it does not say which'}")


def is_cross_site(method: str, name: str, said: Mapping[bytes, tuple[bytes, ...]]) -> bool:
    """Whether a browser asks because another site's page wants it to.

    It does where Sec-Fetch-Site says so, or where Origin is that of another host; so also in a WebSocket's handshake
    and in a preflight.  Who follows a link to `name`, or types it, is let in: that is a GET of the whole window.
    Browsers send Sec-Fetch-* only to https and to localhost, and Origin with all but plain GETs.  What is no browser
    sends neither.

    `Origin: null` is another site's, as of a frame in a sandbox; but a page whose Referrer-Policy is no-referrer says
    it to its own site, too.  There Sec-Fetch-Site decides, which no page can set.
    Source: Fetch Metadata Request Headers (W3C), section 2; Fetch (WHATWG), "Origin header".
    """
    sites, origins = said.get(b"sec-fetch-site", ()), said.get(b"origin", ())
    if not sites and not origins:
        return False
    if (method in ("GET", "HEAD") and said.get(b"sec-fetch-mode") == (b"navigate",)
            and said.get(b"sec-fetch-dest") == (b"document",)):
        return False
    if any(site.lower() == b"cross-site" for site in sites):
        return True
    if not origins or origins == (b"null",) and sites == (b"same-origin",):
        return False
    found = ORIGIN.fullmatch(origins[0])
    return len(origins) > 1 or found is None or found[1].lower().removesuffix(b".") != name.encode("ascii")


# -- what is added and changed -----------------------------------------------------------------

Fields = tuple[tuple[bytes, bytes], ...]


@functools.lru_cache(HOPS_REMEMBERED)
def fields_of(client: str, port: int, name: str, asked: int, version: int) -> Fields:
    """What is added for a client whose own words are not believed.  Raises ValueError where `client` is no address."""
    address = str(parse_ip(client)).encode("ascii")
    host = name.encode("ascii") + (b":%d" % asked if asked else b"")
    return ((VIA_FIELD, b"1.%d %b" % (version, OUR_NAME)), (FOR, address), (PROTO, b"http"),
            *(((HOST, host),) if host else ()), (PORT, b"%d" % port), (REAL_IP, address))


def hop(request: Request, client: str, port: int, believes: bool) -> Fields:
    """Names and values of the fields that this router, one hop of several, adds to a request.

    `client`: the address that asks.  `port`: where it connected.  `believes`: it is in --forwarded-from, so what it
    says of those who asked it stays.  Then X-Forwarded-For, which is a list, gets one more address; of the others only
    those are added that are missing.  Give the result to `pass_request`, with the same `believes`.
    Via says the version in which the request came.  Source: RFC 9110 section 7.6.3.
    """
    ours = fields_of(client, port, request.name, request.port, request.version)
    if not believes:
        return ours
    said = read(request.head)
    fields = {name: value for name, value in ours if name in LISTS or name.lower() not in said}
    others = [value for value in said.get(FOR.lower(), ()) if value]
    if others:
        fields[FOR] = b", ".join((*others, fields[FOR]))
        if REAL_IP in fields:  # the address of the believed proxy, which may be one that backends trust
            fields[REAL_IP] = address_in(others[-1].rpartition(b",")[2].strip(b" \t")[:ADDRESS_MAX])
    if PROTO.lower() in said:  # our port does not go with a proto of theirs: https and 80
        fields.pop(PORT, None)
    return tuple((name, value) for name, value in fields.items() if value)


@functools.lru_cache(HOPS_REMEMBERED)
def address_in(text: bytes) -> bytes:
    """An address that a believed proxy names, in its one form; b"" where it is none."""
    try:
        return str(parse_ip(text.decode("latin-1"))).encode("ascii")
    except ValueError:
        return b""


def choose_upgrade(request: Request, policy: Policy) -> bytes:
    """The one protocol that is offered to the backend: the client's first that the route allows; b"": none.

    The request then goes on as HTTP/1.1, as RFC 9110 section 7.8 has it.  A protocol with a version (`irc/6.9`) is
    allowed by its name.
    """
    for protocol in request.upgrades:
        name = protocol.partition(b"/")[0]
        if (protocol in policy.upgrades or name in policy.upgrades) and name not in NEVER_OFFERED:
            return protocol
    return b""


def max_forwards(request: Request) -> Request | None:
    """The request with its Max-Forwards one less; None: it goes no further: answer it by `options` of sniroute_answers.

    Only OPTIONS counts: TRACE is not served, and any other method has no use for it.  Raises Malformed.
    Source: RFC 9110 section 7.6.2.
    """
    if request.method != "OPTIONS":
        return request
    head = request.head
    found = [field for field in head.fields if field.key == b"max-forwards"]
    if not found:
        return request
    if len(found) > 1 or not HOPS.fullmatch(found[0].value):
        raise bad("a Max-Forwards that is no number")
    field, hops = found[0], number(found[0].value, 10)
    if not hops:
        return None
    line = b"%b: %d\r\n" % (field.name, hops - 1)
    block = head.block[:field.start] + line + head.block[field.end:]
    return request._replace(head=head._replace(block=block, fields=parse_lines(block).fields))


def may_ask_again(request: Request) -> bool:
    """Whether a request may be sent a second time where the first got no answer (RFC 9110 section 9.2.2)."""
    return request.method in IDEMPOTENT
