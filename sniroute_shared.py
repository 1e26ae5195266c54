"""sniroute_shared: claims that several routers share, in a Redis.

    router A                            Redis                                router B
    Shared.write --- a script ---> sniroute:claim:KEY = JSON, for ttl + hold
                                   PUBLISH sniroute:claims -----------------> Shared: Registry.learn
    Shared: a sweep, again and again: SCAN, MGET, PTTL --- what was missed

A Store of sniroute_registry.  What Redis says is true: each change is one script on one key, which compares the claim
that is there with the one that is meant.  So of two routers that want a name at once, one gets it, and none undoes what
another one has changed.

A key lives for ttl + hold.  While more than `hold` of that is left, its claim lives; after that the name is held for
its owner.  What is left is asked for as PTTL, so no clock is compared with another host's.

What other routers change is heard on a channel.  Whoever has missed something (a connection was lost, Redis began
anew, a subscriber was killed) finds it by the sweep: all keys, page by page, again and again.  A claim that a whole
sweep has not seen is asked for once more (`_ask_again`), and ends where Redis has none.  Nothing depends on keyspace
notifications, or on CONFIG.

While Redis is away the registry is frozen: what was claimed is routed on, nothing is claimed, nothing ends.  When it
is back, a sweep reads all, and then time goes on.  A claim that Redis does not know any more has a ttl to be renewed,
which puts it there again.

The channel and our own questions have two connections, so a message may come before an older answer, or after a newer
one.  Where we have asked something of a key in the last seconds (FRESH), a message about it is not believed: Redis is
asked what is there (`_look`), behind that question.

A release gives the record another lease, which nobody has.  So nobody renews it; and a router that was away sees that
it was released, and did not just run out of time.

Threads: the registry's loop; `open` runs before that does.

Seams: I want to ...
    keep more of a claim    a field of Claim (sniroute_claims): the JSON has all of them
    look more often         SWEEP

This room imports sniroute_redis, sniroute_resp, sniroute_registry, sniroute_claims, sniroute_loop, sniroute_names and
sniroute_refusals.

Sources: redis.io: "EVAL", "SET", "PTTL", "SCAN", "Pub/Sub", "Key eviction".
"""

from __future__ import annotations

import collections
import functools
import logging
import os
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any, Callable

from sniroute_claims import GRACE_MIN, OK, Claim
from sniroute_loop import NEVER, Loop
from sniroute_names import parse_ip, printable
from sniroute_redis import Redis, Script, Subscription
from sniroute_refusals import Failed
from sniroute_registry import EXPIRED, TAKEN, UNAVAILABLE, Registry, Written, from_text, to_text
from sniroute_resp import Place, Server

if TYPE_CHECKING:
    import ssl

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

PREFIX = "sniroute:claim:"
CHANNEL = "sniroute:claims"

# Limits, each with its reason.  Times in seconds.
ASK_TIME = 2.0  # for an answer: owners wait for it
SWEEP = 30.0  # from one sweep to the next: a change that the channel has not told may be missed for so long
SWEEP_AGAIN = 1.0  # until a sweep that broke off is begun anew
HEAR_FIRST = 1.0  # for which the channel is waited for, before all is read without it: else it would be read twice
PAGE = 500  # keys of one page of a sweep: some milliseconds of the loop
STEP = 0.01  # between two pages: the loop has other things to do
DIGITS = 15  # of milliseconds in a message
ADDRESSES_MAX = 16  # of servers where no claim may lead: each dial is held against them
# For so long after we have asked something of a key, messages about it are not believed: the answer comes within
# ASK_TIME, and what is published then soon after.
FRESH = 2 * ASK_TIME

# Puts a claim in the place of another.  KEYS[1]; ARGV: the lease that has to be there ("": none fits), "1" where the
# key may also be missing, the new JSON, milliseconds until the key ends, the channel, what is said there, the JSON that
# has to be there, else a change by another router would be undone that we have not heard of yet.  Returns 1; or, where
# it has done nothing, what is there (false for nothing), and for how many milliseconds.  Values are compared, and not
# the texts; a field that is not there has its default.
SWAP = Script("""
local function same(one, other)
  if type(one) ~= 'table' or type(other) ~= 'table' then return one == other end
  for key, value in pairs(one) do if not same(value, other[key]) then return false end end
  for key in pairs(other) do if one[key] == nil then return false end end
  return true
end
local now = redis.call('GET', KEYS[1])
if now then
  local there = cjson.decode(now)
  local fits = there.lease == ARGV[1]
  local known = fits and cjson.decode(ARGV[7])
  for key, value in pairs(fits and there or {}) do fits = fits and same(value, known[key]) end
  if not fits then return {now, redis.call('PTTL', KEYS[1])} end
elseif ARGV[2] ~= '1' then return {false, 0} end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
redis.call('PUBLISH', ARGV[5], ARGV[6])
return 1
""")
# Ends a claim.  KEYS[1]; ARGV: the lease that has to be there, unless the key is missing; milliseconds for which the
# name is held, 0 for not at all; the channel, what is said there, the JSON of what is held.  Returns as SWAP.
RELEASE = Script("""
local now = redis.call('GET', KEYS[1])
if now then
  if cjson.decode(now).lease ~= ARGV[1] then return {now, redis.call('PTTL', KEYS[1])} end
  if tonumber(ARGV[2]) > 0 then redis.call('SET', KEYS[1], ARGV[5], 'PX', ARGV[2]) else redis.call('DEL', KEYS[1]) end
end
redis.call('PUBLISH', ARGV[3], ARGV[4])
return 1
""")


def is_ip(address: tuple[str, int]) -> bool:
    """Whether the host of a (host, port) is an IP address."""
    try:
        parse_ip(address[0])
    except ValueError:
        return False
    return True


def milliseconds(seconds: float) -> int:
    """A time as Redis takes it: one millisecond at least."""
    return max(1, round(seconds * 1000))


class Shared:
    """The claims in a Redis.  See Store for what a registry calls.

    Args:
        place: where the Redis is, of `parse_url`.
        loop: of the registry.
        context: of TLS, as in Redis.
    """

    name, is_shared = "redis", True

    def __init__(self, place: Place, loop: Loop, context: ssl.SSLContext | None = None):
        self.loop = loop
        self.me = os.urandom(8).hex()  # in what is said on the channel: our own words are no news
        self.registry: Registry | None = None
        self.fault = "not reached yet"  # why Redis does not answer; "" where it does
        # Of all servers that were asked: a name may lead to one today, and to another tomorrow.
        self.addresses: tuple[tuple[str, int], ...] = tuple(filter(is_ip, place.hosts))
        self.heard_at = 0.0  # wall time of the last good contact
        self.redis = Redis(loop, place, self.on_up, self.on_down, context)
        self.subscription: Subscription | None = None
        # By key: the clock time at which we have asked something of it last; those that are not FRESH go.
        self.asked: collections.OrderedDict[str, float] = collections.OrderedDict()
        self.kept_until = 0.0  # clock time: until then a claim that Redis does not know has time to be renewed
        self.has_begun = False  # all has been read once
        self.told = threading.Event()  # that, or it was found to be away
        self.closed = False
        # The sweep.
        self.timer = loop.timer(self.on_timer)  # of the next page, or of the next sweep
        self.cursor = ""  # where the next page begins; "": no sweep is under way
        self.known: set[str] = set()  # keys that were live when it began
        self.seen: set[str] = set()  # keys that it has seen; a new set for each sweep, by which an answer knows its own
        self.heard: set[str] = set()  # keys that the channel has told of since its last page was asked for
        self.whole = False  # it is the first one since Redis came back: the registry is frozen until its end
        self.unread = ""  # why the last one broke off

    def open(self, registry: Registry) -> None:
        """Know nothing until Redis has told all."""
        self.registry = registry
        registry.table.freeze()
        self.subscription = self.redis.subscribe(CHANNEL, self.on_message, self.on_subscribed, self.on_unsubscribed)

    def stop(self) -> None:
        """Nothing more is asked."""
        self.closed = True
        self.timer.set(NEVER)
        if self.subscription is not None:
            self.subscription.close()
        self.redis.close()

    def close(self) -> None:
        """See Store: the connections are closed by `stop`."""

    # -- what the registry writes ----------------------------------------------------------------

    def write(self, what: str, former: Claim | None, claim: Claim | None, done: Callable[[Written], None]) -> None:
        """See Store."""
        if what == EXPIRED:  # Redis has counted, too
            done(Written(OK))
        elif claim is None:
            assert former is not None
            ended = former._replace(lease=secrets.token_hex(16))
            self._run(RELEASE, former.key, done, former.lease, milliseconds(former.hold) if former.hold else 0, CHANNEL,
                      self._said(ended, 0.0), to_text(ended))
        else:
            self._swap(claim, former, claim.lease != getattr(former, "lease", ""), done)

    def renew(self, claim: Claim, done: Callable[[Written], None]) -> None:
        """See Store.  One that Redis has lost, as at an empty restart, is there again."""
        assert self.registry is not None
        self._swap(claim, self.registry.table.live.get(claim.key), True, done)

    def _swap(self, claim: Claim, former: Claim | None, may_miss: bool, done: Callable[[Written], None]) -> None:
        """Put a claim where Redis has `former`; with `may_miss` also where it has nothing."""
        lease, known = ("", "") if former is None else (former.lease, to_text(former))
        self._run(SWAP, claim.key, done, lease, "1" if may_miss else "0", to_text(claim),
                  milliseconds(claim.ttl + claim.hold), CHANNEL, self._said(claim, claim.ttl), known)

    def _said(self, claim: Claim, left: float) -> str:
        """What is said on the channel: who says it, how long the claim lives, and the claim."""
        return f"{self.me} {milliseconds(left) if left else 0} {to_text(claim)}"

    def _run(self, script: Script, key: str, done: Callable[[Written], None], *words: Any) -> None:
        """Have SWAP or RELEASE done; `words` are its ARGV."""
        def answered(value: Any) -> None:
            if isinstance(value, Failed):
                done(Written(UNAVAILABLE, sentence=f"the store does not answer: {value}"))
                return
            self.heard_at = time.time()
            if not isinstance(value, list):
                done(Written(OK))
                return
            text, left = value
            done(Written(TAKEN, self._read(text, left)))
        self._mark(key)
        self.redis.run(script, [PREFIX + key], words, answered, ASK_TIME)

    def _mark(self, key: str) -> None:
        """Note that we ask something of a key: for FRESH seconds `on_message` does not believe what is told of it."""
        now = self._now()
        self.asked.pop(key, None)
        self.asked[key] = now
        while next(iter(self.asked.values())) < now - FRESH:
            self.asked.popitem(False)

    def _read(self, text: Any, left: Any) -> Claim | None:
        """A claim as Redis has it, of its JSON and its PTTL; None where there is none that can be read."""
        if not isinstance(text, bytes) or not isinstance(left, int) or left <= 0:
            return None
        assert self.registry is not None
        try:
            claim = from_text(text, 0.0)
        except ValueError as error:
            log.warning("registry: Redis has something under %s that is no claim: %s", PREFIX, printable(str(error)))
            return None
        return claim._replace(expires=self.registry.table.clock() + left / 1000 - claim.hold)

    # -- what others change ----------------------------------------------------------------------

    def on_message(self, message: bytes) -> None:
        """Another router has changed a claim."""
        assert self.registry is not None
        who, _, rest = message.partition(b" ")
        left, _, text = rest.partition(b" ")
        if who == self.me.encode() or not left.isdigit() or len(left) > DIGITS:
            return
        try:
            claim = from_text(text, 0.0)
        except ValueError:
            return
        self.heard_at = time.time()
        now = self._now()
        if self.asked.get(claim.key, -FRESH) >= now - FRESH:
            self._look(claim.key)
            return
        if self.cursor:
            self.heard.add(claim.key)
        self.registry.learn(claim.key, claim._replace(expires=now + int(left) / 1000))

    def _look(self, key: str) -> None:
        """Ask Redis what it has under a key, behind what we have asked of that before."""
        texts: list[Any] = []

        def told(left: Any) -> None:
            if not isinstance(left, Failed) and texts and not isinstance(texts[0], Failed):
                self._believe(key, self._read(texts[0], left))

        self._mark(key)
        self.redis.ask("GET", PREFIX + key, done=texts.append, timeout=ASK_TIME)
        self.redis.ask("PTTL", PREFIX + key, done=told, timeout=ASK_TIME)

    def _believe(self, key: str, claim: Claim | None) -> None:
        """Learn what Redis has, unless it is known: then there is nothing to tell."""
        assert self.registry is not None
        former = self.registry.table.live.get(key)
        if former is None or claim is None or abs(former.expires - claim.expires) > 1.0 \
                or former._replace(expires=0.0) != claim._replace(expires=0.0):
            self.registry.learn(key, claim)

    # -- up and down -----------------------------------------------------------------------------

    def on_up(self, server: Server) -> None:
        """Redis answers."""
        self.fault = ""
        self.heard_at = time.time()
        peer = self.redis.peer
        if peer is not None and peer not in self.addresses:
            self.addresses = (*self.addresses, peer)[-ADDRESSES_MAX:]
        self.redis.ask("INFO", "memory", done=self.on_memory, timeout=ASK_TIME)
        if self.subscription is not None and self.subscription.state == "up":
            self._begin(True)
        else:  # it comes, or was refused before Redis was known to be there
            self.timer.set(self._now() + HEAR_FIRST)

    def on_down(self, failed: Failed) -> None:
        """Redis is away: what is known is used on."""
        if self.closed:
            return
        assert self.registry is not None
        self.fault = str(failed)
        self.told.set()
        self.cursor = ""
        self.registry.freeze(True)
        log.warning("registry: Redis is away (%s): the names that are claimed are routed on, and none can be claimed",
                    failed)

    def on_subscribed(self, server: Server) -> None:
        """From here on nothing is missed: so all is read now."""
        if not self.fault:
            self._begin(True)

    def on_unsubscribed(self, failed: Failed) -> None:
        """The channel is lost, or cannot be had; the sweeps go on."""
        if self.fault or self.closed:  # Redis is away, which has been said
            return
        log.warning("registry: Redis does not tell of changes (%s): those of other routers are seen within %g s",
                    failed, SWEEP)
        if self._is_frozen() and not self.cursor:
            self._begin(True)

    def on_memory(self, answer: Any) -> None:
        """Warn where Redis may forget claims."""
        text = answer.decode("latin-1") if isinstance(answer, bytes) else answer if isinstance(answer, str) else ""
        rows = dict(line.partition(":")[::2] for line in text.split("\r\n"))
        policy = rows.get("maxmemory_policy", "noeviction")
        if policy != "noeviction" and rows.get("maxmemory", "0") != "0":
            log.warning("registry: Redis drops keys when its memory is full (maxmemory-policy %s): claims would be "
                        "lost; set noeviction", printable(policy, 40))

    # -- the sweep -------------------------------------------------------------------------------

    def _begin(self, whole: bool) -> None:
        """Begin a sweep.  `whole`: the registry is frozen until its end."""
        assert self.registry is not None
        self.whole = self.whole or whole
        self.cursor = "0"
        self.seen = set()
        self.known = set(self.registry.table.live)
        self._ask_page()

    def on_timer(self) -> None:
        """The next page, or the next sweep."""
        if self.fault:
            return
        if self.cursor:
            self._ask_page()
        elif self._is_frozen() and not self.whole:  # nobody has begun to read since Redis is here
            self.on_unsubscribed(self.subscription.failed or Failed("timeout", "no answer yet"))
        else:
            self._begin(False)

    def _ask_page(self) -> None:
        """Ask for the keys of the next page.  An answer for a sweep that is over by then is not looked at."""
        sweep = self.seen
        self.heard.clear()
        self.redis.ask("SCAN", self.cursor, "MATCH", PREFIX + "*", "COUNT", PAGE,
                       done=lambda answer: sweep is self.seen and self._on_page(answer), timeout=ASK_TIME)

    def _on_page(self, answer: Any) -> None:
        """Some keys, and where the next ones begin."""
        if isinstance(answer, Failed) or not isinstance(answer, list) or len(answer) != 2:
            self._break_off(answer)
            return
        cursor, keys = answer
        if not keys:
            self._next(cursor)
            return
        sweep = self.seen
        answers: list[Any] = [None] * (1 + len(keys))  # all values, then what is left of each
        missing = len(answers)

        def told(at: int, answer: Any) -> None:
            nonlocal missing
            answers[at] = answer
            missing -= 1
            if missing or sweep is not self.seen:
                return
            failed = next((each for each in answers if isinstance(each, Failed)), None)
            if failed is not None or self.fault:
                self._break_off(failed)
            else:
                self._on_claims(keys, answers[0], answers[1:])
                self._next(cursor)

        self.redis.ask("MGET", *keys, done=functools.partial(told, 0), timeout=ASK_TIME)
        for at, key in enumerate(keys, 1):
            self.redis.ask("PTTL", key, done=functools.partial(told, at), timeout=ASK_TIME)

    def _break_off(self, why: Any) -> None:
        """The sweep cannot be ended: again, from the beginning.  Until then nothing is taken for gone."""
        self.cursor = ""
        self.timer.set(self._now() + SWEEP_AGAIN)
        if not self.fault and str(why) != self.unread:
            self.unread = str(why)
            log.warning("registry: Redis does not tell what is in it (%s): changes of other routers may be missed",
                        printable(self.unread, 200))

    def _on_claims(self, keys: list[bytes], texts: Any, lefts: list[Any]) -> None:
        """A page of claims: the keys, their JSON, and their PTTL.

        An outage may have been longer than their ttl.  So for a while after it what Redis says of their time does not
        shorten it; who has the lease may renew it.
        """
        assert self.registry is not None
        self.heard_at = time.time()
        table = self.registry.table
        for name, text, left in zip(keys, texts, lefts):
            key = name.decode("ascii", "replace").removeprefix(PREFIX)
            self.seen.add(key)
            claim = self._read(text, left)
            if claim is None or claim.key != key or key in self.heard:  # what was told since is newer
                continue
            former = table.live.get(key)
            if former is not None and former.lease == claim.lease and claim.expires < former.expires \
                    and self._is_early():
                claim = claim._replace(expires=former.expires)
            if former is None or claim.expires > table.clock() or former.lease != claim.lease or not self._is_early():
                self._believe(key, claim)

    def _next(self, cursor: Any) -> None:
        """A page is done: on to the next one; behind the last, end the sweep."""
        self.cursor = cursor.decode("ascii") if isinstance(cursor, bytes) else str(cursor)
        if self.cursor != "0":
            self.timer.set(self._now() + (0.0 if self.whole else STEP))
            return
        assert self.registry is not None
        registry, self.cursor = self.registry, ""
        self.unread = ""
        if not self._is_early():
            for key in self.known - self.seen:
                self._ask_again(key)
        self.timer.set(self._now() + SWEEP)
        if self.whole:
            self.whole = False
            if self._is_frozen() and self.has_begun:
                ttls = (claim.ttl for claim in registry.table.live.values())
                self.kept_until = self._now() + max([GRACE_MIN, *ttls])
            registry.freeze(False, grace=self.has_begun)  # at the start no claim was known, and Redis has told its time
            self.has_begun = True
            self.told.set()
            log.info("registry: Redis is here, with %d names", len(self.seen))

    def _ask_again(self, key: str) -> None:
        """A claim that the sweep has not seen: it may have come meanwhile, or is gone."""
        assert self.registry is not None
        registry = self.registry
        former = registry.table.live.get(key)

        def told(answer: Any) -> None:
            if answer == 0 and registry.table.live.get(key) is former:
                registry.learn(key, None)

        if former is not None:
            self.redis.ask("EXISTS", PREFIX + key, done=told, timeout=ASK_TIME)

    def _is_early(self) -> bool:
        """Whether claims have their time to be renewed still, after an outage."""
        return self._is_frozen() or self._now() < self.kept_until

    def _is_frozen(self) -> bool:
        assert self.registry is not None
        return self.registry.table.frozen_since is not None

    def _now(self) -> float:
        assert self.registry is not None
        return self.registry.table.clock()


