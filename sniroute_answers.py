"""sniroute_answers: answers of our own, whole, as bytes: pages that say why, redirects.

    Refused, Request --- refusal ---> REFUSALS (what happened), WORDS (what to do) ---> page ---+
    Request          --- redirect --> 308 to https:// --------------------------------> answer -+-> bytes, then close
    Request          --- options ---> what OPTIONS gets where it goes no further ---------------+

A page is for a stranger.  It says the name that he asked for, what happened and what he can do, and in one more
sentence what whoever runs the router can do.  All of it is from tables: never the message of a Refused, which is for
the log and may name targets, addresses, and the last words of a tunnel.  The one exception is `bad_request`: its
messages say what is wrong with what this client sent, and repeat no more of it than a host name that was checked.

After each answer of ours the connection closes, so that nothing behind a bad request is taken for another one.

Threads: none; nothing here changes after the import.

Seams: I want to ...
    say something else to people      WORDS; a row of it for each one of REFUSALS: a test compares them
    send another status               PHRASES
    answer a request otherwise        a function as `redirect`, from `page` or `answer`; MODES of sniroute_requests
    change how a page looks           STYLE, and `html_page`

This room imports sniroute_http (Request) and sniroute_refusals.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from typing import Iterable, NamedTuple, Sequence

from sniroute_http import Request
from sniroute_refusals import REFUSALS, Refused

__version__ = "0.1.0"

# Seconds in Retry-After.  A tunnel starts in about so long, and a client that was over its limit has room again then.
RETRY_AFTER = 5
LINK_MAX = 1024  # bytes of an address that is shown; escaped it is six times as long, and an answer has to be short

# RFC 9110 section 15 and RFC 6585; 508 is of RFC 5842.  Python's own table differs from version to version.
PHRASES = {
    200: "OK", 308: "Permanent Redirect",
    400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    411: "Length Required", 414: "URI Too Long", 417: "Expectation Failed", 421: "Misdirected Request",
    429: "Too Many Requests", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout", 505: "HTTP Version Not Supported", 508: "Loop Detected",
}
ALLOWED = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"  # what backends usually take; we refuse CONNECT and TRACE

# -- words -------------------------------------------------------------------------------------


class Words(NamedTuple):
    """What is said of a refusal beside its row in REFUSALS."""

    error: str  # for programs, in Proxy-Status: RFC 9209 section 2.3
    visitor: str  # what whoever asked can do
    for_operator: bool = True  # whether the row's advice is for whoever runs the router, and helps


SOON = "Try again in a minute."
MENDED = "Try again. If it stays so, it is for whoever runs this router."
TYPING = "Check the address for a typing error."
PROGRAM = "Update the program that asked, or look at what stands between it and here."
DENIED = "Ask whoever runs this router, if you should be let in."

WORDS = {
    "not_tls": Words("http_request_error", PROGRAM),
    "malformed": Words("http_request_error", PROGRAM),
    "bad_request": Words("http_request_error", PROGRAM),
    "hello_too_large": Words("http_request_error", PROGRAM),
    "truncated": Words("http_request_error", "Try again.", False),
    "prelude_timeout": Words("http_request_error", "Try again."),
    "shed": Words("connection_limit_reached", SOON),
    "proxy": Words("proxy_configuration_error", MENDED),
    "no_name": Words("http_request_error", "Ask by name.", False),
    "bad_name": Words("http_request_error", TYPING),
    "no_route": Words("destination_not_found", TYPING),
    "not_allowed": Words("http_request_denied", DENIED),
    "route_limit": Words("connection_limit_reached", SOON),
    "forbidden": Words("destination_ip_prohibited", DENIED),
    "plain_postgres": Words("http_request_error", PROGRAM, False),
    "cancel": Words("http_request_error", PROGRAM),
    "client_limit": Words("connection_limit_reached", "Close what you do not need, and try again in a minute."),
    "busy": Words("connection_limit_reached", SOON),
    "unresolved": Words("dns_error", MENDED),
    "backend": Words("destination_unavailable", SOON),
    "bad_answer": Words("http_protocol_error", MENDED),
    "backend_tls": Words("tls_protocol_error", MENDED),
    "late_head": Words("http_request_error", "Try again."),
    "late_body": Words("http_request_error", "Try again."),
    "late_answer": Words("http_response_timeout", SOON),
    "no_method": Words("http_request_denied", "Ask with another method.", False),
    "cross_site": Words("http_request_denied", "Open the address itself: type it, or follow a link to it."),
    "loop": Words("proxy_loop_detected", MENDED),
    "queue_timeout": Words("connection_limit_reached", SOON),
    "queue_full": Words("connection_limit_reached", SOON),
    "backend_no_tls": Words("tls_protocol_error", MENDED),
    "tunnel_failed": Words("destination_unavailable", SOON),
    "tunnel_denied": Words("destination_unavailable", MENDED),
    "tunnel_unknown": Words("destination_not_found", TYPING),
    "tunnel_timeout": Words("connection_timeout", SOON),
    "tunnel_limit": Words("connection_limit_reached", SOON),
    "tunnel_budget": Words("connection_limit_reached", "Try again in a few seconds.", False),
    "tunnel_stopping": Words("destination_unavailable", "Try again in a few seconds.", False),
    "tunnel_absent": Words("destination_not_found", TYPING),
    "tunnel_not_ready": Words("destination_unavailable", SOON),
    "tunnel_config": Words("destination_unavailable", MENDED),
    "tunnel_login": Words("destination_unavailable", MENDED),
    "tunnel_forbidden": Words("destination_unavailable", MENDED),
    "tunnel_unreachable": Words("destination_unavailable", SOON),
    "tunnel_certificate": Words("destination_unavailable", MENDED),
    "tunnel_plugin": Words("destination_unavailable", MENDED),
    "tunnel_away": Words("destination_unavailable", SOON),
    "command_failed": Words("destination_unavailable", MENDED),
    "internal": Words("proxy_internal_error", SOON),
}
OF_OUR_OWN = "proxy_internal_response"  # where nothing went wrong: nobody else was asked

# What a visitor can do about a bad request, where its status says more than "bad".
BAD_REQUESTS = {
    414: "Ask with a shorter address.",
    421: "Ask for the address with http:// at its beginning, or over TLS.",
    431: "Delete the cookies of this site, and try again.",
}

# -- the page ----------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ground: #f4f5f7; --card: #fff; --ink: #1c2128; --quiet: #5a6572; --line: #e1e5ea;
  --accent: #2459c4; }
@media (prefers-color-scheme: dark) { :root { --ground: #101317; --card: #181c22; --ink: #e3e7ec; --quiet: #98a3b0;
  --line: #2a3038; --accent: #82aaff; } }
* { box-sizing: border-box; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; padding: 16px; background: var(--ground);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { width: 100%; max-width: 560px; padding: 28px 32px; background: var(--card); border: 1px solid var(--line);
  border-top: 4px solid var(--accent); border-radius: 8px; overflow-wrap: anywhere; }
h1 { margin: 6px 0 14px; font-size: 24px; line-height: 1.25; letter-spacing: -.01em; }
p { margin: 0 0 10px; }
.status { margin: 0; color: var(--accent); font-weight: 600; }
a { color: var(--accent); }
.name { font: 15px/1.5 ui-monospace, monospace; }
.operator { margin: 18px 0 0; padding-top: 14px; border-top: 1px solid var(--line); color: var(--quiet);
  font-size: 14px; }
@media (max-width: 480px) { main { padding: 20px; } h1 { font-size: 21px; } }
"""
_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
# This style, and nothing else (CSP Level 3, section 2.3.1): no script, no picture, no frame around it.
POLICY = (f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'").encode()


def html_page(title: str, reason: str, name: str, advice: str, operator: str, link: str) -> str:
    """The page, from plain texts; empty ones have no place in it.  `link`: an absolute address, behind the advice."""
    title, link = html.escape(title), html.escape(link)
    parts = [("name", html.escape(name)), ("advice", html.escape(advice)),
             ("link", link and f'<a href="{link}">{link}</a>'), ("operator", html.escape(operator))]
    shown = "\n".join(f'<p class="{style}">{text}</p>' for style, text in parts if text)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<p class="status">{title}</p>
<h1>{html.escape(reason)}</h1>
{shown}
</main>
</body>
</html>
"""


def wants_html(accept: Iterable[bytes]) -> bool:
    """Whether the lines of Accept name text/html, and not with a weight of 0.  Source: RFC 9110 section 12.5.1.

    `*/*` is not enough: programs that show text say so, too.
    """
    for value in accept:
        for element in value.lower().split(b","):
            kind, *parameters = (word.strip(b" \t") for word in element.split(b";"))
            if kind == b"text/html" and not any(re.fullmatch(rb"q=0(?:\.0*)?", word) for word in parameters):
                return True
    return False


Fields = Iterable[tuple[bytes, bytes]]


def answer(status: int, body: bytes, fields: Fields, *, is_head: bool = False, error: str = OF_OUR_OWN) -> bytes:
    """A whole answer, after which the connection closes.

    `fields` are trusted: no value comes from a client but what its caller has checked.  To HEAD (`is_head`) it says
    the length of the body, which is not there (RFC 9110 section 9.3.2).
    """
    lines = [b"HTTP/1.1 %d %b" % (status, PHRASES.get(status, "").encode("ascii")),
             *(b"%b: %b" % field for field in fields),
             b"Content-Length: %d" % len(body), b"Cache-Control: no-store",
             b"Proxy-Status: sniroute; error=%b" % error.encode("ascii"), b"Connection: close"]
    return b"\r\n".join(lines) + b"\r\n\r\n" + (b"" if is_head else body)


def page(status: int, reason: str, advice: str, *, name: str = "", operator: str = "", accept: Sequence[bytes] = (),
         is_head: bool = False, error: str, retry_after: int | None = None, link: str = "", more: Fields = ()
         ) -> bytes:
    """A whole answer that says why: a page where Accept has text/html, else one line of text.

    `reason`: what happened, without a full stop.  `advice`: a sentence for whoever asks.  `name`: the host that he
    asked for.  `operator`: a sentence for whoever runs the router.  They are plain text of one line; the page escapes
    them.  `accept`: the values of Accept.  `is_head`: the request was a HEAD.  `error`: a word of RFC 9209.
    `retry_after`: seconds.  `link`: an absolute address, shown behind the advice.  `more`: further fields, trusted.
    """
    title = f"{status} {PHRASES.get(status, '')}".rstrip()
    operator = operator and f"For whoever runs this router: {operator.rstrip('.')}."
    if wants_html(accept):
        body = html_page(title, reason[:1].upper() + reason[1:], name, advice, operator, link)
        kind: Fields = ((b"Content-Type", b"text/html; charset=utf-8"), (b"Content-Security-Policy", POLICY))
    else:
        body = " ".join(filter(None, (f"{title}:", name and f"{name}:", f"{reason}.", advice, link, operator))) + "\n"
        kind = ((b"Content-Type", b"text/plain; charset=utf-8"),)
    wait: Fields = () if retry_after is None else ((b"Retry-After", b"%d" % retry_after),)
    return answer(status, body.encode(), (*kind, (b"X-Content-Type-Options", b"nosniff"), *wait, *more),
                  is_head=is_head, error=error)


# -- what is answered --------------------------------------------------------------------------


def refusal(refused: Refused, request: Request | None) -> bytes:
    """The answer to a request that is refused; `request`: None where its head could not be read."""
    if refused.farewell:
        return refused.farewell
    row, words, status = REFUSALS[refused.kind], WORDS[refused.kind], refused.status
    reason, advice = row.meaning, words.visitor
    if refused.kind == "bad_request":
        reason, advice = str(refused), BAD_REQUESTS.get(status, advice)
    return page(status, reason, advice, operator=row.advice if words.for_operator else "",
                name=request.name if request else "", accept=request.head.values(b"accept") if request else (),
                is_head=request is not None and request.method == "HEAD", error=words.error,
                retry_after=RETRY_AFTER if status in (429, 503) else None,
                more=((b"Allow", ALLOWED),) if status == 405 else ())


def redirect(request: Request, name: str, listener_port: int, redirect_port: int | None) -> bytes:
    """308 to the same path and query of https://`name`, which is normalised and not empty.

    The port is `redirect_port`, else 443 where the listener's is 80, else the listener's: TLS is served there, too.
    Browsers would keep a 308 for good, also when the route has long another `http`, so Cache-Control forbids it: the
    answer costs little, and what has to stay is HSTS, which is the backend's to say.
    Source: RFC 9110 section 15.4.9.
    """
    port = redirect_port or (443 if listener_port == 80 else listener_port)
    place = name if port == 443 else f"{name}:{port}"
    path = request.path if request.path[:1] == b"/" else b"/"  # OPTIONS * has no path
    location = b"https://%b%b" % (place.encode("ascii"), path)  # with a name before it, //path leads to no other host
    return page(308, "this name is served over TLS", "Ask again over TLS.", name=name,
                link=location.decode("ascii") if len(location) <= LINK_MAX else "", more=((b"Location", location),),
                accept=request.head.values(b"accept"), is_head=request.method == "HEAD", error=OF_OUR_OWN)


def options() -> bytes:
    """The answer to OPTIONS whose Max-Forwards is 0: what may be asked for here.  Source: RFC 9110 section 9.3.7."""
    return answer(200, b"", ((b"Allow", ALLOWED),))
