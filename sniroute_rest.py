"""sniroute_rest: the registry by HTTP: who asks, for what, and how that is answered.

    owner --- Door (sniroute_door) ---> Rest.decide: Host and Origin, token -> Owner, its rate, the path
                                          |  the path's row in ENDPOINTS
                                          v
                                        Registry (sniroute_registry) ---> Result ---> JSON, or a problem (RFC 9457)

    GET    /routes, /routes/KEY                  one's own claims; an admin's are all
    POST   /routes                               claim a name, or a port
    PUT    /routes/KEY                           change where it leads
    POST   /routes/KEY/renew                     another ttl
    DELETE /routes/KEY                           release
    POST   /routes/KEY/suspend, resume           an admin's
    GET    /events                               what happens to one's claims, as server-sent events
    GET    /audit                                what has happened in 30 days, where the store keeps that; an admin's
    GET    /openapi.json                         the description of all this, made of ENDPOINTS

KEY is a name, `tcp:PORT`, or `uuid:ID`.

Who has no token learns nothing: not which paths there are, nor which names.  Another owner's claim is answered as one
that is not there.  No page of a browser asks here: there is no CORS, and a foreign Host or Origin is refused.

A claim that is made `while_connected` is renewed here (`Rest.tick`) as long as one connection lives: the one that made
it, or a stream of events that was opened with its lease.  When that has ended, the claim has LINGER seconds left.

A port is opened before it is claimed (`open_first`), since another process may have it.  Where the claim is refused
then, it is closed again.

Threads: the Door's loop runs all of it.

Seams: I want to ...
    answer on another path      a row in ENDPOINTS, with its description
    show another field          `Rest.show`
    let owners ask more often   `rate_of`

This room imports sniroute_registry, sniroute_claims, sniroute_owners, sniroute_door and sniroute_names.

Sources: RFC 6750 (tokens), RFC 9457 (problems), RFC 9110; WHATWG, "Server-sent events".
"""

from __future__ import annotations

import functools
import http
import json
import logging
import os
import re
import time
import urllib.parse
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from sniroute_claims import LINGER, PAGE_MAX, TAKEN_OVER, WORDS, Claim, Verdict, port_key
from sniroute_door import OWNER, Answer, Caller, Declined, Head, Plan
from sniroute_names import printable, without_key
from sniroute_owners import (CHANGES, RENEWAL, TTL_MIN, Fault, Own, Owner, Rules, Unfit, Wish, parse_change, parse_wish,
                             standing, who)
from sniroute_registry import BUSY, RENEWED, UNAVAILABLE, Event, Registry, Result

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

# Limits, each with its reason.  Times in seconds.
BODY_MAX = 8192  # of a claim: its `meta` has a KiB, its networks another
PORTS_TRIED = 8  # where the owner takes any port: other processes may have some
STREAMS_MAX = 8  # of events, of one owner: one for each of its hosts, and some for people
LIMIT = 100  # rows of a page, where the request does not say
QUIET = 15.0  # between two comments in a stream: proxies cut silent ones after a minute
RETRY = 2000  # milliseconds after which a browser opens a stream again
STRANGERS = 20.0  # wrong tokens in a second that are answered 401; beyond that 429, and the log is silent
LOGGED = 10.0  # between two lines of the log about them

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::[0-9]{1,5})?")  # RFC 9110 section 7.2, in lower case
BEARER = re.compile(r"bearer +([!-~]+)", re.IGNORECASE)  # RFC 6750 section 2.1
LEASES = ("sniroute-lease", "x-lease")  # header fields for a lease, either of them
STATUS = {UNAVAILABLE: 503, BUSY: 429}  # of HTTP, for the words of sniroute_registry; the others are in WORDS
CHALLENGE = {"WWW_Authenticate": 'Bearer realm="sniroute registry"'}  # RFC 6750 section 3


class Bucket:
    """How often something may be done: `rate` times in a second, and as a burst twice of that.  `now`: clock time."""

    __slots__ = ("rate", "left", "at")

    def __init__(self, rate: float, now: float):
        self.rate = rate
        self.left = 2 * rate
        self.at = now

    def take(self, now: float) -> float:
        """Take one.  0, or the seconds until there is one again."""
        self.left = min(self.left + (now - self.at) * self.rate, 2 * self.rate)
        self.at = now
        if self.left >= 1:
            self.left -= 1
            return 0.0
        return (1 - self.left) / self.rate


def rate_of(owner: Owner) -> float:
    """Requests in a second: enough to renew each name at the shortest ttl three times, and to look around."""
    return 10 + 3 * owner.max_names / TTL_MIN


# -- answers -----------------------------------------------------------------------------------


def problem(status: int, detail: str, word: str = "", *, errors: Sequence[Mapping[str, str]] = (),
            free_at: str | None = None, headers: Mapping[str, str] = {}) -> Answer:
    """The answer that refuses a request.  Source: RFC 9457 section 3.

    Args:
        detail: for people: why, and what to do.
        word: for programs: the key of WORDS that says why; "" where there is none.
        errors: for each field that is wrong its `field` and `detail`.
        free_at: when the name may be free, as ISO 8601.
        headers: further header fields, with `_` for `-`.
    """
    fields: dict[str, Any] = {"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status,
                              "detail": detail}
    if word:
        fields["class"] = word
    if errors:
        fields["errors"] = list(errors)
    if free_at is not None:
        fields["free_at"] = free_at
    return Answer(status, json.dumps(fields).encode() + b"\n", "application/problem+json",
                  tuple((name.replace("_", "-"), value) for name, value in headers.items()))


class Refusal(Declined):
    """A request that is refused, with a `problem` instead of the answer that Declined would make."""

    def __init__(self, answer: Answer):
        Exception.__init__(self, answer.status)
        self.answer = answer


def refuse(status: int, detail: str, word: str = "", **headers: str) -> Refusal:
    """The Refusal of a `problem`: whoever calls raises it."""
    return Refusal(problem(status, detail, word, headers=headers))


def found(value: Mapping[str, Any], status: int = 200) -> Answer:
    """An answer in JSON."""
    return Answer(status, json.dumps(value).encode() + b"\n", "application/json")


def seconds(value: float) -> str:
    """A time as Retry-After has it: whole seconds, never less than it is, and one at least."""
    return str(max(1, round(value + 0.5)))


# -- one request -------------------------------------------------------------------------------


class Ask(NamedTuple):
    """A request, once it is known who asks."""

    rest: Rest
    owner: Owner
    head: Head
    key: str  # that the path names; "" without one
    caller: Caller
    settings: tuple[Rules, Mapping[str, Owner]]  # by which it is judged

    @property
    def lease(self) -> str | None:
        """The lease that the request shows; None without one.  Raises Declined for two different ones."""
        values = [value for name in LEASES for value in self.head.fields.get(name, [])]
        if len(set(values)) > 1:
            raise refuse(400, "there are two leases in the head")
        return values[0] if values else None

    def query(self, *names: str) -> dict[str, str]:
        """The parameters behind the `?`.  Raises Declined for others, and for one that is there twice."""
        pairs = urllib.parse.parse_qsl(self.head.query, keep_blank_values=True)
        values = dict(pairs)
        if len(values) < len(pairs) or not values.keys() <= set(names):
            raise refuse(400, f"the query may have {', '.join(names) or 'nothing'}, each once")
        return values

    def answer(self, result: Result) -> None:
        """Answer with what has come of a claim, or of a change of one."""
        self.caller.answer(self.rest.answer_of(result, self.owner))

    def is_outdated(self, result: Result) -> bool:
        """Whether a reload has come since, and does not allow the claim: then it has ended, and that is answered.

        One that did not stand before either is left alone, as by the reload itself.
        """
        rest, claim = self.rest, result.claim
        settings = rest.rules, rest.owners
        if not result.passed or claim is None or settings[1] is self.settings[1]:
            return False
        fault = rest.fault(claim, *settings)
        if not fault or rest.fault(claim, *self.settings):
            return False
        log.warning("registry: %s of %s ends, since the settings do not allow it any more: %s", claim.key, claim.owner,
                    fault)
        rest.registry.end(claim)
        self.caller.answer(problem(403, fault, "forbidden"))
        return True


def ask_claim(ask: Ask) -> None:
    """POST /routes.  A name is claimed at once; a port that nobody has is opened first."""
    rest = ask.rest
    if rest.is_ending():
        raise refuse(503, "this router is about to end, and serves no new clients", UNAVAILABLE, Retry_After="5")
    wish = parse_wish(bytes(ask.caller.body), rest.rules, ask.owner, rest.own())
    check_http(rest, wish.http)
    registry = rest.registry
    if wish.is_port and (wish.key is None or registry.table.find(wish.key) is None):
        open_first(ask, wish, PORTS_TRIED if wish.key is None else 1)
    else:
        claim_key(ask, wish, wish.key or registry.table.free_name(wish.space))


def check_http(rest: Rest, mode: str) -> None:
    """Whether the router can do with plain HTTP what a claim wants.  Raises Unfit."""
    if mode not in ("", "refuse") and not rest.serves_http:
        raise Unfit(Fault("http", "this router serves no plain HTTP: the files for that are not there"))


def open_first(ask: Ask, wish: Wish, tries: int) -> None:
    """Have the router listen on a port before it is claimed: another process may have it."""
    rest = ask.rest
    key = wish.key or rest.registry.table.free_port(range(rest.rules.ports[0], rest.rules.ports[1] + 1))
    if key is None:
        ask.caller.answer(problem(409, "all ports that may be claimed are taken", "other"))
        return

    def opened(fault: str) -> None:
        if not fault:
            claim_key(ask, wish, key)
        elif tries > 1:
            open_first(ask, wish, tries - 1)
        else:
            ask.caller.answer(problem(409, fault, "configured"))

    rest.open_port(key, opened)


def claim_key(ask: Ask, wish: Wish, key: str) -> None:
    """Claim this name, or this port."""
    rest, owner = ask.rest, ask.owner
    registry = rest.registry
    if fault := rest.rival(key, owner.name, wish.target):
        if wish.is_port:
            rest.close_port(key)
        ask.caller.answer(problem(409, fault, "other"))
        return

    def done(result: Result) -> None:
        del rest.coming[ask.caller]
        if result.passed and owner.name not in rest.owners:  # a reload took the owner away while the store was asked
            registry.leave(owner.name)
            ask.caller.answer(refuse(401, "the token is not known any more", **CHALLENGE).answer)
            return
        if ask.is_outdated(result):
            return
        if result.passed and result.claim is not None and wish.while_connected:
            rest.attach(result.claim, ask.caller)
        if wish.is_port and not result.passed:
            rest.close_port(key)
        ask.answer(result)

    rest.coming[ask.caller] = key, owner.name, wish.target
    registry.claim(key, owner.name, wish.target, wish.ttl, rest.rules.hold, done, takeover=wish.takeover,
                   limit=owner.max_names, configured=not wish.is_port and rest.is_configured(key), allow=wish.allow,
                   http=wish.http, meta=wish.meta, while_connected=wish.while_connected)


def ask_renew(ask: Ask) -> None:
    """POST /routes/KEY/renew"""
    change = parse_change(bytes(ask.caller.body), RENEWAL, ask.rest.rules, ask.owner)
    ask.rest.registry.renew(ask.key, ask.owner.name, ask.lease, change.get("ttl"), ask.answer, ask.owner.admin)


def ask_change(ask: Ask) -> None:
    """PUT /routes/KEY"""
    rest = ask.rest
    claim = rest.registry.table.find(ask.key)
    # What an admin changes is held against what the claim's owner may have, not the admin.
    owner = rest.owners.get(claim.owner, ask.owner) if claim is not None and ask.owner.admin else ask.owner
    changes = parse_change(bytes(ask.caller.body), CHANGES, rest.rules, owner, rest.own())
    check_http(rest, changes.get("http", ""))
    if fault := rest.rival(ask.key, owner.name, changes.get("target", "")):
        ask.caller.answer(problem(409, fault, "other"))
        return

    def done(result: Result) -> None:
        del rest.coming[ask.caller]
        if not ask.is_outdated(result):
            ask.answer(result)

    rest.coming[ask.caller] = ask.key, owner.name, changes.get("target", "")
    rest.registry.change(ask.key, ask.owner.name, ask.lease, changes, done, ask.owner.admin)


def ask_release(ask: Ask) -> None:
    """DELETE /routes/KEY"""
    cut = ask.query("cut").get("cut", "0")
    if cut not in ("0", "1"):
        raise refuse(400, "cut is 0 or 1")

    def done(result: Result) -> None:
        if result.passed:
            if cut == "1":
                ask.rest.cut(ask.key)
            ask.caller.answer(Answer(204, b""))
        else:
            ask.answer(result)

    ask.rest.registry.release(ask.key, ask.owner.name, ask.lease, done, ask.owner.admin)


def ask_suspend(ask: Ask) -> None:
    """POST /routes/KEY/suspend"""
    ask.rest.registry.suspend(ask.key, True, ask.answer)


def ask_resume(ask: Ask) -> None:
    """POST /routes/KEY/resume"""
    ask.rest.registry.suspend(ask.key, False, ask.answer)


def ask_one(ask: Ask) -> None:
    """GET /routes/KEY"""
    claim = ask.rest.registry.table.find(ask.key)
    if claim is None or claim.owner != ask.owner.name and not ask.owner.admin:
        sentence = f"there is no claim of {printable(ask.key, 300)} that is yours"
        ask.answer(ask.rest.registry.refused(ask.key, Verdict("gone", sentence)))
        return
    ask.caller.answer(found(ask.rest.show(claim)))


def ask_all(ask: Ask) -> None:
    """GET /routes"""
    query = ask.query("owner", "prefix", "limit", "after")
    limit = query.get("limit", str(LIMIT))
    if not re.fullmatch("[0-9]{1,6}", limit, re.ASCII) or not 0 < int(limit) <= PAGE_MAX:
        raise refuse(400, f"limit is a number from 1 to {PAGE_MAX}")
    owner = query.get("owner") or None
    if not ask.owner.admin:
        if owner not in (None, ask.owner.name):
            raise refuse(403, "only an admin sees the claims of others", "forbidden")
        owner = ask.owner.name
    if not getattr(ask.rest.registry.store, "has_begun", True):
        raise refuse(503, "the store has not been read yet: try again", UNAVAILABLE, Retry_After="1")
    claims = ask.rest.registry.table.page(owner, query.get("prefix", "").lower(), query.get("after", "").lower(),
                                          int(limit))
    rows = [ask.rest.show(claim) for claim in claims]
    ask.caller.answer(found({"routes": rows, "next": claims[-1].key if len(claims) == int(limit) else None}))


def ask_events(ask: Ask) -> None:
    """GET /events"""
    ask.query()
    if ask.head.method == "HEAD":
        ask.caller.answer(Answer(200, b"", "text/event-stream"))
    else:
        ask.rest.stream(ask)


def ask_audit(ask: Ask) -> None:
    """GET /audit"""
    query = ask.query("name", "before", "limit")
    numbers = {name: query.get(name, default) for name, default in (("before", "0"), ("limit", str(LIMIT)))}
    if not all(re.fullmatch("[0-9]{1,15}", text, re.ASCII) for text in numbers.values()):
        raise refuse(400, "before and limit are numbers")
    history = getattr(ask.rest.registry.store, "history", None)
    if history is None:
        raise refuse(404, f"the store, {ask.rest.registry.store.name}, keeps no history: sqlite does")

    def done(rows: Any) -> None:
        if isinstance(rows, Exception):
            ask.caller.answer(problem(503, str(rows), UNAVAILABLE))
        else:
            ask.caller.answer(found({"changes": [
                {**row._asdict(), "at": stamp(row.at)} for row in rows]}))

    history(done, query.get("name", "").lower(), int(numbers["before"]), int(numbers["limit"]) or LIMIT)


def ask_description(ask: Ask) -> None:
    """GET /openapi.json"""
    ask.caller.answer(found(describe()))


class Endpoint(NamedTuple):
    """A path that is answered, as a row."""

    method: str
    path: str  # {key} stands for a name
    act: Callable[[Ask], None]  # answers, at once or later; may raise Unfit, Declined
    says: str  # what it does, for the description
    statuses: tuple[int, ...]  # beside those of all: 401, 403, 429
    admin: bool = False
    body: str = ""  # what its body is: a key of BODIES


ENDPOINTS = (
    Endpoint("GET", "/routes", ask_all, "The claims, in pages", (200, 400)),
    Endpoint("POST", "/routes", ask_claim, "Claim a name, or a port", (200, 201, 400, 409, 413, 503), body="Wish"),
    Endpoint("GET", "/routes/{key}", ask_one, "One claim", (200, 404)),
    Endpoint("PUT", "/routes/{key}", ask_change, "Change where it leads", (200, 400, 404, 409, 413, 428, 503),
             body="Change"),
    Endpoint("DELETE", "/routes/{key}", ask_release, "Release it", (204, 400, 404, 409, 428, 503)),
    Endpoint("POST", "/routes/{key}/renew", ask_renew, "Keep it for another ttl", (200, 400, 404, 409, 413, 428, 503),
             body="Renewal"),
    Endpoint("POST", "/routes/{key}/suspend", ask_suspend, "Take it off the routes", (200, 404, 503), admin=True),
    Endpoint("POST", "/routes/{key}/resume", ask_resume, "Put it back", (200, 404, 503), admin=True),
    Endpoint("GET", "/events", ask_events, "What happens, as server-sent events", (200, 400, 429)),
    Endpoint("GET", "/audit", ask_audit, "What has happened, the newest first", (200, 400, 404, 503), admin=True),
    Endpoint("GET", "/openapi.json", ask_description, "This description", (200,)),
)
PATHS = tuple((re.compile(re.escape(row.path).replace(r"\{key\}", "([^/]+)")), row) for row in ENDPOINTS)

# What bodies and answers look like: JSON Schema.
TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
CHANGE: dict[str, Any] = {
    "target": {**TEXT, "example": "tcp:192.0.2.10:8080"}, "ttl": {**NUMBER, "description": "seconds"},
    "allow": {"type": ["array", "null"], "items": TEXT, "description": "networks of clients"},
    "http": {**TEXT, "description": "what plain HTTP gets"}, "meta": {"type": "object"}}
CLAIM = {"id": TEXT, "name": TEXT, "owner": TEXT, "expires_at": {**TEXT, "format": "date-time"}, "generation": NUMBER,
         "suspended": FLAG, "while_connected": FLAG, **CHANGE}
SCHEMAS: dict[str, Any] = {
    "Wish": {"type": "object", "required": ["target"], "additionalProperties": False, "properties": {
        "name": {"type": ["string", "null"], "description": "null: a random one"},
        "port": {"type": ["integer", "null"], "description": "instead of a name; null: any that is free"},
        **CHANGE, "while_connected": FLAG, "takeover": {**FLAG, "default": True}}},
    "Change": {"type": "object", "additionalProperties": False, "properties": CHANGE},
    "Renewal": {"type": "object", "additionalProperties": False, "properties": {"ttl": CHANGE["ttl"]}},
    "Claim": {"type": "object", "properties": {**CLAIM, "lease": TEXT, "taken_over": FLAG}},
    "Problem": {"type": "object", "properties": {
        "type": TEXT, "title": TEXT, "status": NUMBER, "detail": TEXT, "class": TEXT,
        "free_at": {**TEXT, "format": "date-time"}, "errors": {"type": "array", "items": {
            "type": "object", "properties": {"field": TEXT, "detail": TEXT}}}}},
}


def describe() -> dict[str, Any]:
    """The description of all endpoints.  Source: OpenAPI Specification 3.1."""
    paths: dict[str, Any] = {}
    for row in ENDPOINTS:
        answers = {}
        for status in sorted({*row.statuses, 401, 403, 429}):
            kind = "Problem" if status >= 400 else "Claim" if "{key}" in row.path or row.body else ""
            answers[str(status)] = {"description": http.HTTPStatus(status).phrase, **({"content": {
                "application/problem+json" if kind == "Problem" else "application/json": {
                    "schema": {"$ref": f"#/components/schemas/{kind}"}}}} if kind and status != 204 else {})}
        entry: dict[str, Any] = {"summary": row.says, "responses": answers}
        if row.body:
            entry["requestBody"] = {"required": row.body != "Renewal", "content": {
                "application/json": {"schema": {"$ref": f"#/components/schemas/{row.body}"}}}}
        if "{key}" in row.path:
            entry["parameters"] = [{"name": "key", "in": "path", "required": True, "schema": TEXT,
                                    "description": "a name, tcp:PORT, or uuid:ID"}]
        paths.setdefault(row.path, {})[row.method.lower()] = entry
    return {"openapi": "3.1.0", "info": {"title": "sniroute registry", "version": __version__}, "paths": paths,
            "components": {"schemas": SCHEMAS, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
            "security": [{"token": []}]}


def as_asked(ttl: float) -> float:
    """A ttl as it may be said back: whole seconds are an integer."""
    return int(ttl) if ttl.is_integer() else ttl


def stamp(at: float) -> str:
    """Seconds since 1970 as ISO 8601, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03}Z"


# -- the server --------------------------------------------------------------------------------


class Stream(NamedTuple):
    """A connection that gets the events of its owner; all, where that is an admin."""

    owner: Owner
    caller: Caller


class Rest:
    """Answers for one registry.  The Door's loop.

    Args:
        rules, owners: of the settings; `adopt` changes them.
        hosts: what Host may say; None: anything, since the address is not of this host alone.
        own: where the router listens, now.
        is_configured: whether a route of the settings has a name.
        open_port: have the router listen on a port that is about to be claimed: (key, done(fault or "")).
        close_port: it was not claimed after all.
        rival: why (the claim of this key, for this owner) may not lead to a target, as a sentence, since another claim
            does, or is about to (`coming`); "" where it may.
        cut: end the connections of a claim.
        wall: seconds since 1970, for people; nothing is decided by it.
        serves_http: whether the router serves plain HTTP at all.
        is_ending: whether the router takes no new clients any more.
    """

    def __init__(self, registry: Registry, rules: Rules, owners: Mapping[str, Owner], hosts: frozenset[str] | None, *,
                 own: Callable[[], Own] = Own, is_configured: Callable[[str], bool] = lambda key: False,
                 open_port: Callable[[str, Callable[[str], None]], None] = lambda key, done: done(""),
                 close_port: Callable[[str], None] = lambda key: None,
                 rival: Callable[[str, str, str], str] = lambda key, owner, target: "",
                 cut: Callable[[str], None] = lambda key: None, wall: Callable[[], float] = time.time,
                 serves_http: bool = True, is_ending: Callable[[], bool] = lambda: False):
        self.serves_http = serves_http
        self.is_ending = is_ending
        self.registry = registry
        self.rules = rules
        self.owners = dict(owners)
        self.hosts = hosts
        self.own, self.is_configured, self.cut = own, is_configured, cut
        self.open_port, self.close_port, self.rival = open_port, close_port, rival
        self.wall = wall
        self.clock = registry.table.clock
        self.epoch = os.urandom(4).hex()  # of the numbers of events: another process counts anew
        self.buckets: dict[str, Bucket] = {}
        self.strangers = Bucket(STRANGERS, self.clock())
        self.unknown = 0  # requests without a known token since the last line about them
        self.said = -LOGGED  # clock time of that line
        # What has passed `rival` and has no answer of the store yet: key, owner and target, by who has asked for it.
        self.coming: dict[Caller, tuple[str, str, str]] = {}
        self.streams: dict[Caller, Stream] = {}
        # Of claims that live as long as a connection, by key: the lease, the connection, and what is done at its end.
        self.attached: dict[str, tuple[str, Caller, Callable[[], None]]] = {}
        self.lingering: dict[str, Claim] = {}  # by lease: their connection is over, and the store has not heard of it
        self.quiet_since = self.clock()  # when all streams got a comment last
        registry.events.listeners[self] = self.tell

    def adopt(self, rules: Rules, owners: Mapping[str, Owner]) -> None:
        """Other rules and owners, after a reload.  The claims of owners that are gone end; the others stay."""
        for name in self.owners.keys() - owners.keys():
            count = self.registry.leave(name)
            log.warning("registry: owner %s is gone from the settings, and with it %d claims", name, count)
        self.rules, self.owners = rules, dict(owners)
        self.buckets.clear()
        for caller, stream in list(self.streams.items()):
            if owners.get(stream.owner.name) != stream.owner:  # who may still listen comes again, and misses nothing
                caller.close()

    def fault(self, claim: Claim, rules: Rules, owners: Mapping[str, Owner]) -> str:
        """Why a claim does not stand by these settings; "" where it does."""
        owner = owners.get(claim.owner)
        if owner is None:
            return f"there is no owner {claim.owner}"
        return standing(claim, rules, owner, self.own())

    # -- who asks --------------------------------------------------------------------------------

    def decide(self, head: Head) -> Plan:
        """What is done for a request: see Gate.  Raises Declined."""
        self._check_origin(head)
        owner = self._who(head)
        wait = self.buckets.setdefault(owner.name, Bucket(rate_of(owner), self.clock())).take(self.clock())
        if wait:
            raise refuse(429, "you ask too often", Retry_After=seconds(wait))
        row, key = self._find(head, owner)
        if row.admin and not owner.admin:
            raise refuse(403, "this is for admins", "forbidden")
        length = head.body_length()
        if length > (BODY_MAX if row.body else 0):
            raise refuse(413, f"the body has {length} bytes: {BODY_MAX if row.body else 0} at most")
        return Plan(lambda caller: self._act(row, Ask(self, self._still(owner, head), head, key, caller,
                                                      (self.rules, self.owners))), length, OWNER)

    def _check_origin(self, head: Head) -> None:
        """Decline what a page of a browser asks, also one whose name resolves to this host."""
        host = HOST.fullmatch((head.field("host") or "").lower())
        if host is None:
            raise refuse(400, "Host is missing, or no host")
        if self.hosts is not None and host[1] not in self.hosts:
            raise refuse(421, "Host is not this registry's address")
        if head.field("origin") is not None or head.field("sec-fetch-site") not in (None, "none"):
            raise refuse(403, "no page of a browser may ask here", "forbidden")

    def _who(self, head: Head) -> Owner:
        """The owner of the token.  Raises Declined."""
        token = BEARER.fullmatch(head.field("authorization") or "")
        owner = who(token[1], self.owners.values()) if token is not None else None
        if owner is not None:
            return owner
        now = self.clock()
        wait = self.strangers.take(now)
        self.unknown += 1
        if now - self.said >= LOGGED and token is not None:
            log.warning("registry: %d requests without a token that is known", self.unknown)
            self.said, self.unknown = now, 0
        if wait:
            raise refuse(429, "too many ask without a token that is known", Retry_After=seconds(wait))
        raise refuse(401, "the token is missing or wrong", **CHALLENGE)

    def _still(self, owner: Owner, head: Head) -> Owner:
        """The same owner, as the settings are now: a reload may come between a head and its body.  Raises Declined."""
        return owner if self.owners.get(owner.name) is owner else self._who(head)

    def _find(self, head: Head, owner: Owner) -> tuple[Endpoint, str]:
        """The endpoint, and the key that the path names.  Raises Declined."""
        methods = []
        for pattern, row in PATHS:
            match = pattern.fullmatch(head.path)
            if match is None:
                continue
            if row.method == head.method.replace("HEAD", "GET"):
                return row, self._key(match[1], owner) if match.groups() else ""
            methods.append(row.method)
        if methods:
            raise refuse(405, f"this path is for {', '.join(methods)}", Allow=", ".join(methods))
        raise refuse(404, "there is no such path")

    def _key(self, text: str, owner: Owner) -> str:
        """The key that a path means: a name, whole or one label of the first domain, tcp:PORT, or uuid:ID.

        The id of another owner's claim stays as it is, so that no refusal tells its name.
        """
        try:
            key = urllib.parse.unquote(text, errors="strict").lower()
        except ValueError:
            raise refuse(400, "the name in the path is not UTF-8") from None
        if key.startswith("uuid:"):
            claim = self.registry.table.find_id(key.removeprefix("uuid:"))
            return claim.key if claim is not None and (owner.admin or claim.owner == owner.name) else key
        if key.startswith("tcp:"):
            return port_key(int(key[4:])) if re.fullmatch("tcp:[0-9]{1,5}", key, re.ASCII) else key
        key = key.removesuffix(".")
        return key if "." in key else f"{key}.{self.rules.domains[0]}"

    def _act(self, row: Endpoint, ask: Ask) -> None:
        """Do what is asked; where a field is wrong, say so."""
        try:
            row.act(ask)
        except Unfit as error:
            errors = [{"field": fault.field, "detail": fault.sentence} for fault in error.faults]
            ask.caller.answer(problem(WORDS[error.kind].status, str(error), error.kind, errors=errors))

    # -- what is shown ---------------------------------------------------------------------------

    def show(self, claim: Claim, lease: bool = False) -> dict[str, Any]:
        """A claim as its owner sees it; `lease`: with this secret, too.  The key of its target is shown to nobody."""
        return {"id": claim.id, "name": claim.key, "target": without_key(claim.target), "owner": claim.owner,
                "expires_at": self.when(claim.expires), "ttl": as_asked(claim.ttl), "generation": claim.generation,
                "allow": None if claim.allow is None else list(claim.allow), "http": claim.http, "meta": claim.meta,
                "suspended": claim.suspended, "while_connected": claim.while_connected,
                **({"lease": claim.lease} if lease else {})}

    def when(self, at: float) -> str:
        """A time of the table's clock, as ISO 8601."""
        return stamp(self.wall() + at - self.clock())

    def answer_of(self, result: Result, owner: Owner) -> Answer:
        """A Result as an answer; the lease is only for the claim's own owner, not for an admin."""
        if result.passed and result.claim is not None:
            shown = self.show(result.claim, lease=result.claim.owner == owner.name)
            if result.word == TAKEN_OVER:
                shown["taken_over"] = True
            return found(shown, WORDS[result.word].status)
        status = STATUS.get(result.word) or WORDS[result.word].status
        headers = {"Retry_After": seconds(result.retry_after)} if result.retry_after else {}
        return problem(status, result.sentence, result.word, headers=headers,
                       free_at=None if result.free_at is None else self.when(result.free_at))

    # -- events ----------------------------------------------------------------------------------

    def stream(self, ask: Ask) -> None:
        """Begin to tell an owner what happens, from where it has left off (Last-Event-ID).

        With a lease, the claims that have it live as long as this stream.
        """
        owner, caller = ask.owner, ask.caller
        if sum(each.owner.name == owner.name for each in self.streams.values()) >= STREAMS_MAX:
            raise refuse(429, f"you have {STREAMS_MAX} streams open already", Retry_After="5")
        lease = ask.lease
        text = [f"retry: {RETRY}\n\n: the events of {owner.name}\n\n"]
        last = ask.head.field("last-event-id")
        if last is not None:
            epoch, _, number = last.partition("-")
            missed = self.registry.events.since(int(number)) if epoch == self.epoch and re.fullmatch(
                "[0-9]{1,15}", number, re.ASCII) else None
            if missed is None:
                text.append(f"id: {self.epoch}-{self.registry.events.number}\nevent: reset\ndata: {{}}\n\n")
            else:
                text += [self.line(event) for event in missed if self._may_hear(owner, event)]
        caller.answer(Answer(200, "".join(text).encode(), "text/event-stream", has_end=False))
        self.streams[caller] = Stream(owner, caller)
        caller.when_over(lambda: self.streams.pop(caller, None))
        after = ""
        while lease and (claims := self.registry.table.page(owner.name, after=after, limit=PAGE_MAX)):
            for claim in claims:
                if claim.lease == lease and claim.while_connected:
                    self.attach(claim, caller)
            after = claims[-1].key

    def _may_hear(self, owner: Owner, event: Event) -> bool:
        return owner.admin or event.claim.owner == owner.name

    def line(self, event: Event) -> str:
        """An event as its listeners get it."""
        data = json.dumps({**self.show(event.claim), "at": stamp(event.at)})
        return f"id: {self.epoch}-{event.number}\nevent: {event.what}\ndata: {data}\n\n"

    def tell(self, event: Event) -> None:
        """Something has happened."""
        if self.streams:
            data = self.line(event).encode()
            for each in list(self.streams.values()):
                if self._may_hear(each.owner, event):
                    each.caller.push(data)
        if event.what != RENEWED:
            log.info("registry: %s: %s by %s, to %s", event.claim.key, event.what, event.claim.owner,
                     without_key(event.claim.target))

    # -- claims that live as long as a connection ------------------------------------------------

    def attach(self, claim: Claim, caller: Caller) -> None:
        """Keep a claim as long as this connection lives."""
        self.detach(claim.key)
        over = functools.partial(self.linger, claim, caller)
        self.attached[claim.key] = claim.lease, caller, over
        caller.when_over(over)

    def detach(self, key: str) -> None:
        """The connection that keeps it does so no more: another one does, or it has ended."""
        if key in self.attached:
            _, caller, over = self.attached.pop(key)
            caller.never_mind(over)

    def linger(self, claim: Claim, caller: Caller) -> None:
        """The connection is over: the claim has LINGER seconds left, in which another one may keep it.

        That is done in the next turn of the loop: in this one an event may just be told to all streams, `caller` among
        them.
        """
        if self.attached.get(claim.key, ("", None))[:2] == (claim.lease, caller):
            del self.attached[claim.key]
            self.registry.loop.call(functools.partial(self._leave_time, claim))

    def _leave_time(self, claim: Claim) -> None:
        """Have a claim end in LINGER seconds; where the store does not answer, `tick` tries again."""
        def done(result: Result) -> None:
            if result.word in STATUS:
                self.lingering[claim.lease] = claim

        self.registry.renew(claim.key, claim.owner, claim.lease, LINGER, done)

    def tick(self) -> None:
        """Once a second: renew what lives as long as a connection, or end it, and let no stream be silent for long."""
        now = self.clock()
        for key, (lease, _, _) in list(self.attached.items()):
            claim = self.registry.table.find(key)
            if claim is None or claim.lease != lease:
                self.detach(key)
            elif claim.expires - now < claim.ttl * 2 / 3:
                self.registry.renew(key, claim.owner, lease, None, lambda result: None)
        lingering, self.lingering = self.lingering, {}
        for claim in lingering.values():
            if claim.key not in self.attached:  # else another connection keeps it
                self._leave_time(claim)
        if now - self.quiet_since >= QUIET:
            self.quiet_since = now
            for each in list(self.streams.values()):
                each.caller.push(b":\n\n")
