"""sniroute_claims: names that somebody has claimed for a while: whose each one is, and until when.

    a key ----- Table.judge -----> Verdict: new, taken_over, or why not ---- Table.claimed ---> Claim ---- put
    a lease --- Table.permit ----> Verdict: ok, or why not ------------- Table.renewed ---> Claim ---- put
    the time -- Table.expire ----> the claims that have ended
                Table.page ------> some of those that live, in the order of their keys

A key is a whole name (`foo.tun.example.com`), or a port (`tcp:49000`).  What becomes of it:

    free --- put ---> live --- expire, drop ---> held for its owner --- after `hold` ---> free
                       ^                              |
                       +----- put, by its owner ------+

Nothing is decided by a wall clock.  While the table is frozen, as in an outage of its store, nothing ends; after it
each claim has the time of one ttl to be renewed.

The order of calls: judge, claimed, then the store, then put.  `judge` only says what is known here, and `claimed` and
`renewed` change nothing: a store that several routers share may know better.  So a claim is put here once it is
written there.  All of it is pure: no I/O, a clock that is given.  (sniroute_claim, without an s, is the client: another
process.)

Threads: one changes a table.  Others may call `find` and `find_held`, which are single look-ups of rows that never
change; `page` and `counts` may fail there while the table changes, so they are tried again (`copied` of
sniroute_registrar).

Seams: I want to ...
    keep more of a claim         a field of Claim, with a default; CONTRIBUTING.md names the other places
    refuse for another reason    a row of WORDS, and a line of `judge` or `permit`
    keep names longer            HELD_MIN; `hold` of each claim

This room imports the standard library only.

Source: Kleppmann, "How to do distributed locking" (2016), for the generation, which fences an old holder off.
"""

from __future__ import annotations

import collections
import hmac
import math
import random
import secrets
import time
from bisect import bisect_left, bisect_right, insort
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, Callable, Iterator, Mapping, NamedTuple

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
GRACE_MIN = 30.0  # after an outage each claim has its ttl to be renewed, at least so long: clients back off, too
LINGER = 5.0  # a claim that lives as long as a connection outlives it by this: a client that connects again keeps it
HELD_MIN = 100  # ended names of one owner that are held at least; more only where it had more at once: see `_end`
ROW_MAX = 512  # names in a row of Ordered: to move 4 KB takes a fraction of a microsecond
PAGE_MAX = 1000  # claims on one page: half a megabyte of JSON
EXPIRED_MAX = 1000  # claims that one call of `expire` looks at: some milliseconds of the loop

# Digits and letters of Crockford's base 32: no i, l, o, which look like digits, and no u.
ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
RANDOM_LENGTH = 10  # of them: 50 bits, so nobody guesses a name


class Word(NamedTuple):
    """What a word of WORDS means."""

    status: int  # of HTTP, RFC 9110 section 15
    meaning: str  # for people


# What may be said of a claim, or of a request for one.  The first three let it pass.
NEW, TAKEN_OVER, OK = "new", "taken_over", "ok"
WORDS = {
    NEW: Word(201, "the name is the owner's now"),
    TAKEN_OVER: Word(200, "the owner had the name already; its old lease is void"),
    OK: Word(200, "the lease is the right one"),
    "own": Word(409, "the owner has the name already, and did not want to take it over"),
    "other": Word(409, "another owner has the name"),
    "held": Word(409, "another owner had the name, and it is held for that one"),
    "reserved": Word(409, "nobody may claim the name"),
    "configured": Word(409, "a route of the settings has the name"),
    "stale": Word(409, "the lease is not that of the claim: somebody has claimed the name again"),
    "limit": Word(403, "the owner has as many names as it may"),
    "forbidden": Word(403, "the owner may not"),
    "gone": Word(404, "there is no such claim of this owner"),
    "no_lease": Word(428, "the request has no lease"),
    "fault": Word(400, "the request is not right"),
}
PASSED = frozenset((NEW, TAKEN_OVER, OK))


class Claim(NamedTuple):
    """A name, or a port, that is an owner's until a time."""

    key: str  # "foo.tun.example.com", or "tcp:49000"
    id: str  # 32 hex digits; stays when its owner takes the name over
    owner: str
    target: str  # "scheme:rest"
    lease: str  # 32 hex digits, a secret of whoever claimed it last
    generation: int  # is larger with each lease of a key, also after the name was free
    ttl: float  # seconds for which each renewal prolongs it
    hold: float  # seconds for which the name is kept for its owner afterwards
    expires: float  # time of the table's clock: before it the claim lives
    allow: tuple[str, ...] | None = None  # networks of clients, as the claim has them; None: those of its owner
    http: str = ""  # a row of HTTP_MODES (sniroute_options); "": as the settings say
    meta: Mapping[str, Any] = {}  # the owner's own words, JSON
    suspended: bool = False  # an admin has taken it off the routes; it stays so when it is claimed again
    while_connected: bool = False  # it ends with a connection


class Verdict(NamedTuple):
    """What `judge` says to a claim, or `permit` to a change of one."""

    word: str  # a key of WORDS
    sentence: str = ""  # for people, where it is refused
    free_at: float | None = None  # clock time at which the name is free, if nobody renews it; None: not by waiting
    claim: Claim | None = None  # that is there, or is held: only for its owner, or an admin

    @property
    def passed(self) -> bool:
        return self.word in PASSED


class Ordered:
    """Names in order, in rows of ROW_MAX at most: a name that comes or goes moves one row, not all of them."""

    __slots__ = ("rows", "starts", "count")

    def __init__(self) -> None:
        self.rows: list[list[str]] = [[]]
        self.starts = [""]  # of each row: no name in it is before this, and each in the row before is
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def add(self, name: str) -> None:
        """Add a name that is not there yet."""
        at = bisect_right(self.starts, name) - 1
        row = self.rows[at]
        insort(row, name)
        self.count += 1
        if len(row) > ROW_MAX:
            half = len(row) // 2
            self.rows.insert(at + 1, row[half:])
            self.starts.insert(at + 1, row[half])
            del row[half:]

    def remove(self, name: str) -> None:
        """Take a name out that is there."""
        at = bisect_right(self.starts, name) - 1
        row = self.rows[at]
        del row[bisect_left(row, name)]
        self.count -= 1
        if not row and len(self.rows) > 1:
            del self.rows[at], self.starts[at]
            self.starts[0] = ""

    def since(self, name: str) -> Iterator[str]:
        """The names from this one on.  Nothing may be added or removed meanwhile."""
        at = bisect_right(self.starts, name) - 1
        row = self.rows[at]
        yield from row[bisect_left(row, name):]
        for row in self.rows[at + 1:]:
            yield from row


class Owned:
    """The keys of one owner."""

    __slots__ = ("live", "held", "suspended", "most")

    def __init__(self) -> None:
        self.live = Ordered()
        # Those that are held, in the order in which they ended.  An OrderedDict: a dict whose first row goes again and
        # again looks for the next one behind all that have gone.
        self.held: collections.OrderedDict[str, None] = collections.OrderedDict()
        self.suspended: collections.OrderedDict[str, None] = collections.OrderedDict()  # likewise; they are let go last
        self.most = HELD_MIN  # so many may be held: as many as it ever had at once


def is_over(table: Table, at: float) -> bool:
    """Whether what ends at this clock time has ended."""
    return table.frozen_since is None and max(at, table.spared) <= table.clock()


class Table:
    """The claims that are known here.  `clock` gives seconds that never go back; it need not be a wall's."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.live: dict[str, Claim] = {}
        self.held: dict[str, Claim] = {}  # that have ended, by key: only their owner may claim them
        self.keys: dict[str, str] = {}  # of those that live, by id
        self.ordered = Ordered()  # the keys of those that live
        self.owned: dict[str, Owned] = {}  # by owner; those that have no key are not here
        # A heap: when `expire` looks at a key.  Each key, live or held, has an entry that is not later than its end.  A
        # renewal, which makes the end later, leaves that as it is; where `expire` comes too early, it puts the right
        # time there.
        self.due: list[tuple[float, str]] = []
        self.frozen_since: float | None = None  # clock time; None: time goes on
        # Clock time before which nothing ends: nobody could renew for a while.  It is not a ttl away, as after an outage: a
        # host that is stopped for a moment again and again must not keep what nobody renews.
        self.spared = 0.0
        self.floor = 0  # the largest generation of all keys that were forgotten: a key that is new here begins above it

    def __len__(self) -> int:
        return len(self.live)

    # -- what is there ---------------------------------------------------------------------

    def find(self, key: str) -> Claim | None:
        """The claim of a key that lives."""
        claim = self.live.get(key)
        return claim if claim is not None and self._lives(claim) else None

    def find_id(self, id: str) -> Claim | None:
        """The claim of an id that lives."""
        return self.find(self.keys.get(id, ""))

    def find_held(self, key: str) -> Claim | None:
        """The claim of a key that has ended, as long as its name is held for its owner."""
        claim = self.held.get(key) or self.live.get(key)
        if claim is None or self._lives(claim):
            return None
        return None if is_over(self, claim.expires + claim.hold) else claim

    def _lives(self, claim: Claim) -> bool:
        """Whether a claim of the table has not ended; it may be that `expire` has not seen its end yet."""
        return claim.key in self.live and not is_over(self, claim.expires)

    def count(self, owner: str) -> int:
        """How many claims of an owner live, or have just ended."""
        owned = self.owned.get(owner)
        return 0 if owned is None else len(owned.live)

    def counts(self) -> dict[str, int]:
        """The same for each owner that has any."""
        return {owner: len(owned.live) for owner, owned in self.owned.items() if owned.live}

    def page(self, owner: str | None = None, prefix: str = "", after: str = "", limit: int = 100) -> list[Claim]:
        """At most `limit` live claims (PAGE_MAX at most) in the order of their keys, of one owner or of all.

        Their keys begin with `prefix`, and are behind `after`: the last key of the page before.  Claims that come and
        go meanwhile move no other.
        """
        if owner is None:
            keys = self.ordered
        elif owner in self.owned:
            keys = self.owned[owner].live
        else:
            return []
        found: list[Claim] = []
        for key in keys.since(max(prefix, after)):
            if len(found) >= min(limit, PAGE_MAX) or not key.startswith(prefix):
                break
            if key != after and self._lives(self.live[key]):
                found.append(self.live[key])
        return found

    def free_name(self, space: str) -> str:
        """A random name of one label below `space` that nobody has."""
        while True:
            key = f"{random_label()}.{space}"
            if key not in self.live and key not in self.held:
                return key

    def free_port(self, ports: range, dice: random.Random | None = None) -> str | None:
        """The key of one of these ports that nobody has, from a random one on; None where there is none left."""
        first = (dice or secrets.SystemRandom()).randrange(len(ports)) if ports else 0
        keys = (port_key(ports[(first + at) % len(ports)]) for at in range(len(ports)))
        return next((key for key in keys if key not in self.live and key not in self.held), None)

    # -- what may be done ------------------------------------------------------------------

    def judge(self, key: str, owner: str, takeover: bool = True, limit: float = math.inf,
              configured: bool = False, coming: int = 0) -> Verdict:
        """What it would be if an owner claimed a key now.

        `takeover`: whether it wants a name that it has already.  `limit`: of its live claims.  `configured`: whether a
        route of the settings has the name.  `coming`: how many of its claims have been let pass and are not put yet.
        """
        if configured:
            return Verdict("configured", f"{key} is a route of the router's own settings, which always come first")
        claim = self.find(key)
        if claim is not None:
            if claim.owner != owner:
                return Verdict("other", f"{key} is another owner's", claim.expires + claim.hold)
            if not takeover:
                return Verdict("own", f"{key} is yours already: leave out \"takeover\": false to take it over",
                               claim.expires, claim)
            return Verdict(TAKEN_OVER, claim=claim)
        held = self.find_held(key)
        if held is not None and held.owner != owner:
            return Verdict("held", f"{key} was another owner's until a short while ago, and is held for that one",
                           held.expires + held.hold)
        ending = self.live.get(key)  # its time is over, and `expire` has not seen it yet
        if self.count(owner) + coming - (ending is not None and ending.owner == owner) >= limit:
            return Verdict("limit", f"you have {limit} names and ports, which is all that you may have: release one")
        return Verdict(NEW, claim=held)

    def permit(self, key: str, owner: str, lease: str | None, admin: bool = False) -> Verdict:
        """Whether who shows this lease may renew, change or release the claim of a key; an admin needs none.

        Another owner's is `gone`: who asks learns nothing of it.
        """
        claim = self.find(key)
        if claim is None or claim.owner != owner and not admin:
            return Verdict("gone", f"you have no claim of {key}, or not any more: claim it again")
        if lease is None and not admin:
            return Verdict("no_lease", f"a change of {key} needs its lease: send it in the header Sniroute-Lease")
        if lease is not None and not hmac.compare_digest(lease.encode(errors="replace"), claim.lease.encode()):
            return Verdict("stale", f"{key} has another lease now: somebody has claimed it again with your token")
        return Verdict(OK, claim=claim)

    def claimed(self, verdict: Verdict, key: str, owner: str, target: str, ttl: float, hold: float,
                **more: Any) -> Claim:
        """The claim that `judge` has let pass, with a lease of its own.  The table is not changed: `put` does that.

        Args:
            ttl, hold: seconds.
            more: the fields of Claim from `allow` on, without `suspended`.
        """
        former = verdict.claim
        return Claim(key, former.id if former is not None and verdict.word == TAKEN_OVER else secrets.token_hex(16),
                     owner, target, secrets.token_hex(16), self.next_generation(key), ttl, hold, self.clock() + ttl,
                     suspended=former is not None and former.suspended, **more)

    def next_generation(self, key: str) -> int:
        """The generation of the next lease of a key: larger than all before, without a memory of all keys."""
        known = self.live.get(key) or self.held.get(key)
        return 1 + (self.floor if known is None else known.generation)

    def renewed(self, claim: Claim, ttl: float | None = None, **changes: Any) -> Claim:
        """The claim for another ttl from now on, in seconds; None: for as long as before.  `put` changes the table."""
        ttl = claim.ttl if ttl is None else ttl
        return claim._replace(ttl=ttl, expires=self.clock() + ttl, **changes)

    # -- what is done ----------------------------------------------------------------------

    def put(self, claim: Claim) -> None:
        """Add a claim, or replace the one of its key, whoever had it.

        One that has ended already is held as long as its `hold` says, unless the table is frozen.  Call `expire`
        before, where the end of a claim that is replaced has to be told.
        """
        key, owner = claim.key, claim.owner
        former = self.live.get(key)
        if is_over(self, claim.expires):
            self._end(claim)
            return
        if key in self.held:
            self._forget(key)
        if former is None:
            self.ordered.add(key)
        elif former.owner != owner:
            self._disown(former)
        if former is None or former.id != claim.id:
            if former is not None:
                del self.keys[former.id]
            self.keys[claim.id] = key
        self.live[key] = claim
        if former is None or former.owner != owner:
            owned = self._of(owner)
            owned.live.add(key)
            owned.most = max(owned.most, len(owned.live))
        if former is None or claim.expires < former.expires:
            self._due(claim.expires, key)

    def put_held(self, claim: Claim) -> None:
        """Hold a name for its owner from the end of its claim on, which is past, as a store remembers it.

        It does so while the table is frozen, too, where `put` takes a claim whose time is over for one that lives.
        """
        self._end(claim)

    def drop(self, key: str, hold: bool = True) -> Claim | None:
        """End the claim of a key now, and hold its name for the owner; without `hold` the name is free at once.

        Returns the claim that has ended; None where none was live.
        """
        claim = self.live.get(key)
        if claim is not None:
            now = self.clock()
            self._end(claim._replace(expires=min(claim.expires, now), hold=claim.hold if hold else 0.0))
        elif not hold and key in self.held:
            self._forget(key)
        return claim

    def expire(self, most: int = EXPIRED_MAX) -> list[Claim]:
        """End the claims whose time is over; free the names that were held long enough.  Returns those that have ended.

        At most `most` keys are looked at: where that is not enough, `next_expiry` is not in the future.
        """
        now, ended = self.clock(), []
        for _ in range(most if self.frozen_since is None else 0):
            if not self.due or max(self.due[0][0], self.spared) > now:
                break
            key = self.due[0][1]
            claim, held = self.live.get(key), self.held.get(key)
            until = (claim.expires if claim is not None else held.expires + held.hold if held is not None else now)
            if until > now:
                heapreplace(self.due, (until, key))
                continue
            heappop(self.due)
            if claim is not None:
                ended.append(claim)
                self._end(claim)
            elif held is not None:
                self._forget(key)
        return ended

    def next_expiry(self) -> float:
        """The clock time at which `expire` may have something to do; infinity where nothing is due."""
        return max(self.due[0][0], self.spared) if self.due and self.frozen_since is None else math.inf

    # -- outages ---------------------------------------------------------------------------

    def freeze(self) -> None:
        """Let nothing end from now on: nobody can renew.  Call it again, and nothing changes."""
        if self.frozen_since is None:
            self.frozen_since = self.clock()

    def thaw(self, grace: bool = True) -> list[Claim]:
        """Let time go on.  Returns the claims that have got another end.

        With `grace` no claim ends before another ttl, at least GRACE_MIN, has passed; without it what is over ends at
        the next `expire`.  For the names that are held, time stood still.  It takes a time that grows with the number
        of claims: a third of a second for 100,000.
        """
        if self.frozen_since is None:
            return []
        now, since, self.frozen_since = self.clock(), self.frozen_since, None
        if grace:
            moved = [claim._replace(expires=now + max(claim.ttl, GRACE_MIN)) for claim in self.live.values()
                     if claim.expires < now + max(claim.ttl, GRACE_MIN)]
        else:
            moved = []
        for claim in moved:  # `due` has an earlier time for each of them
            self.live[claim.key] = claim
        for key, claim in self.held.items():
            self.held[key] = claim._replace(expires=claim.expires + max(0.0, now - max(since, claim.expires)))
        return moved

    # -- inside ----------------------------------------------------------------------------

    def _of(self, owner: str) -> Owned:
        """The keys of an owner, who has some from now on."""
        owned = self.owned.get(owner)
        if owned is None:
            owned = self.owned[owner] = Owned()
        return owned

    def _disown(self, claim: Claim) -> None:
        """Take a live claim from its owner."""
        owned = self.owned[claim.owner]
        owned.live.remove(claim.key)
        self._tidy(claim.owner)

    def _tidy(self, owner: str) -> None:
        """Forget an owner that has nothing any more."""
        owned = self.owned[owner]
        if not owned.live and not owned.held and not owned.suspended:
            del self.owned[owner]

    def _end(self, claim: Claim) -> None:
        """A claim has ended, at its `expires`: hold its name for its `hold`.

        An owner that claims and releases in a circle does not fill the name space: of its names no more are held than
        it ever had at once, or HELD_MIN.  Those that ended first are let go.  Suspended ones go last: where one is
        forgotten, its owner claims it anew, and it is not suspended any more.
        """
        key, until = claim.key, claim.expires + claim.hold
        if key in self.held:
            self._forget(key)
        owned = self._of(claim.owner)
        (owned.suspended if claim.suspended else owned.held)[key] = None
        self.held[key] = claim
        former = self.live.pop(key, None)
        if former is not None:
            self.ordered.remove(key)
            del self.keys[former.id]
            self._disown(former)
        if not claim.hold or is_over(self, until):
            self._forget(key)
            return
        self._due(until, key)
        if len(owned.held) + len(owned.suspended) > owned.most:
            self._forget(next(iter(owned.held or owned.suspended)))

    def _forget(self, key: str) -> None:
        """Free a name that is held."""
        claim = self.held.pop(key)
        self.floor = max(self.floor, claim.generation)
        owned = self.owned[claim.owner]
        del (owned.suspended if claim.suspended else owned.held)[key]
        self._tidy(claim.owner)

    def _due(self, at: float, key: str) -> None:
        """Have `expire` look at a key at this clock time.  The heap is made anew where most of it is out of date."""
        heappush(self.due, (at, key))
        if len(self.due) > 64 + 2 * (len(self.live) + len(self.held)):
            self.due = [(claim.expires, key) for key, claim in self.live.items()]
            self.due += [(claim.expires + claim.hold, key) for key, claim in self.held.items()]
            heapify(self.due)


def port_key(port: int) -> str:
    """The key of a claim of a TCP port: `tcp:49000`."""
    return f"tcp:{port}"


def random_label() -> str:
    """A label that nobody guesses: RANDOM_LENGTH characters of ALPHABET."""
    bits = secrets.randbits(5 * RANDOM_LENGTH)
    return "".join(ALPHABET[bits >> 5 * at & 31] for at in range(RANDOM_LENGTH))
