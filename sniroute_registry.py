"""sniroute_registry: names that come and go while the router runs: what is asked for, what is kept, who is told.

    claim, renew, change, release --- Table.judge, Table.permit ---> Store.write ---> Table.put ---> Result
      (sniroute_rest)                  (sniroute_claims)               |                 |
                                                    memory, sqlite, redis                +---> Events: those who listen
                                                                                         +---> `moved`: the router

A Registry decides by its Table, writes to its Store, and believes what that says: a store that several routers share
may know better (TAKEN of Written; then `learn`).  Requests for one key take turns; those for different keys do not wait
for each other.

The table is changed behind the store's answer, never before it.  Some ends do not wait for that, whatever the store
says: the time of a claim is over (`tick`), or the settings do not allow it any more (`end`).

While the store is away, nothing is claimed and nothing ends: the table is frozen.  When it is back, each claim has some
time to be renewed (`Table.thaw`).

The router reads `Table.live` at each name that no route of the settings has: a claim costs it nothing until somebody
asks for the name.  It is told which keys have changed (`moved`), so that it decides anew.

Threads: one loop runs all of it, that of the Door which serves the registry (sniroute_door).  `Store.open` is called
before that loop runs, `Store.close` after it.

Seams: I want to ...
    keep claims elsewhere       a Store, as Memory; sniroute_registrar opens it (`open_store`)
    tell somebody of changes    `Events.listeners`
    refuse for another reason   WORDS of sniroute_claims, and `Table.judge`

This room imports sniroute_claims and sniroute_loop.
"""

from __future__ import annotations

import collections
import json
import time
from typing import Any, Callable, NamedTuple, Protocol

from sniroute_claims import GRACE_MIN, NEW, OK, TAKEN_OVER, Claim, Table, Verdict
from sniroute_loop import Loop, owner_of

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
EVENTS_MAX = 1000  # that are remembered, for those who come again: a minute of a busy registry
TURNS_MAX = 16  # requests for one key that wait for each other: one more is told to come back
SECONDS_MAX = 1e9  # of a ttl, or a hold, that a store tells: thirty years
RETRIES = 3  # how often a request is judged anew, where the store knew better; then its owner is told to come back
TICK = 0.25  # between two looks at what has ended: the router may lead clients to a name for so long after its end

# Words beside those of sniroute_claims: UNAVAILABLE of Result and Written, BUSY of Result, TAKEN of Written.
UNAVAILABLE, BUSY, TAKEN = "unavailable", "busy", "taken"
# Refusals that say who has a name, or who has not.  A table that is frozen does not know: it may not have been filled
# yet, and others have changed since what it was told before.
UNSURE = frozenset(("other", "held", "own", "gone", "stale"))

# What may happen to a claim: the word of an Event, and of what a store is told.
CLAIMED, RENEWED, CHANGED, RELEASED, EXPIRED = "claimed", "renewed", "changed", "released", "expired"


# -- what is told --------------------------------------------------------------------------------


class Result(NamedTuple):
    """What has come of a request."""

    word: str  # of sniroute_claims.WORDS, or UNAVAILABLE, or BUSY
    claim: Claim | None = None  # as it is now, or was when it was released; of a refusal, what Verdict has
    sentence: str = ""  # for people, where it is refused
    free_at: float | None = None  # clock time, as in Verdict
    retry_after: float = 0.0  # seconds, where it may be asked again

    @property
    def passed(self) -> bool:
        """Whether it was done."""
        return self.word in (NEW, TAKEN_OVER, OK)


def result_of(verdict: Verdict) -> Result:
    """The Result of a verdict that does not pass."""
    return Result(verdict.word, verdict.claim, verdict.sentence, verdict.free_at)


class Event(NamedTuple):
    """Something that has happened to a claim."""

    number: int  # counts up
    at: float  # seconds since 1970
    what: str  # CLAIMED ... EXPIRED
    claim: Claim


class Events:
    """The last EVENTS_MAX that have happened, and those who listen: `listeners`, by whoever it is that listens."""

    def __init__(self, wall: Callable[[], float] = time.time):
        self.wall = wall
        self.last: collections.deque[Event] = collections.deque(maxlen=EVENTS_MAX)
        self.number = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.listeners: dict[object, Callable[[Event], None]] = {}

    def add(self, what: str, claim: Claim) -> None:
        """It has happened."""
        self.number += 1
        event = Event(self.number, self.wall(), what, claim)
        self.last.append(event)
        self.counts[what] += 1
        for tell in list(self.listeners.values()):
            tell(event)

    def since(self, number: int) -> list[Event] | None:
        """The events after the one with this number; None where they are not known any more, or never were."""
        if number > self.number or number < self.number - len(self.last):
            return None
        return [event for event in self.last if event.number > number]


# -- where claims are kept -----------------------------------------------------------------------


class Written(NamedTuple):
    """What a store says to a change."""

    word: str  # OK; TAKEN: the store knows another claim of the key, or none; UNAVAILABLE
    claim: Claim | None = None  # of TAKEN: what it knows
    sentence: str = ""  # of UNAVAILABLE


DONE = Written(OK)
FAULT = Written(UNAVAILABLE, sentence="a fault in sniroute: its log says which")


class Store(Protocol):
    """Where claims are kept.

    `open` comes first and once, before the registry's loop runs.  `write`, `renew` and `stop` run in that loop, and so
    does `done`, perhaps before they return.  A store may have more, which is asked for with `getattr`: `history`, as
    Sqlite, and `heard_at`, `has_begun` and `told`, as Shared.
    """

    name: str
    is_shared: bool  # other routers write to it, too
    fault: str  # why it cannot be written to; "" where it can
    addresses: tuple[tuple[str, int], ...]  # where it is asked, as (IP address, port): no claim leads there

    def open(self, registry: Registry) -> None:
        """Fill the registry's table: now; or later, by `Registry.learn`, and freeze the table until then."""

    def write(self, what: str, former: Claim | None, claim: Claim | None, done: Callable[[Written], None]) -> None:
        """Put `claim` in the place of `former`, and call `done` once that is kept.

        A store to which others write, too, compares the claim that is there with `former`, in one step with the write;
        where they differ, `done` gets TAKEN.  An end needs the same lease only.

        Args:
            what: why: CLAIMED ... EXPIRED.
            former: the claim of the key that is known, live or held; None: there is none.
            claim: what is kept from now on; None: the claim has ended, and its name is held for `former.hold`.
        """

    def renew(self, claim: Claim, done: Callable[[Written], None]) -> None:
        """A claim has another ttl from now on, and the lease that it had."""

    def stop(self) -> None:
        """Ask nothing more of wherever it is.  In the last turn of the loop."""

    def close(self) -> None:
        """Give back what it has.  The thread that has opened the registry, when its loop has ended."""


def to_text(claim: Claim) -> str:
    """A claim as JSON, for a store, without `expires`: the store keeps that in its own way, since clocks differ."""
    return json.dumps({name: value for name, value in claim._asdict().items() if name != "expires"},
                      separators=(",", ":"))


NUMBERS = ("ttl", "hold")  # seconds
# What has to be in the JSON of a claim, and its type; `from_text` takes other fields of Claim as they are.
TYPES: dict[str, type | tuple[type, ...]] = {
    "generation": int, "allow": (list, type(None)), "meta": dict, "suspended": bool, "while_connected": bool,
    **dict.fromkeys(NUMBERS, (int, float)), **dict.fromkeys(("key", "id", "owner", "target", "lease", "http"), str)}


def from_text(text: str | bytes, expires: float) -> Claim:
    """The claim in a text of `to_text`; `expires` is a time of the table's clock.

    Raises ValueError for any other text: another program may have written to the store.
    """
    try:
        found = json.loads(text)
        wrong = [name for name, kind in TYPES.items() if not isinstance(found[name], kind)
                 or kind is str and not found[name].isprintable()]
        wrong += [name for name in NUMBERS if isinstance(found[name], bool) or not 0 <= found[name] <= SECONDS_MAX]
        if wrong or not all(isinstance(each, str) for each in found["allow"] or ()):
            raise TypeError(f"wrong values of {', '.join(wrong or ['allow'])}")
        if not found.keys() < set(Claim._fields):  # all but `expires`
            raise TypeError("fields that no claim has")
        found["allow"] = None if found["allow"] is None else tuple(found["allow"])
        return Claim(**found, expires=expires)
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"it is no claim: {error}") from None


class Memory:
    """The store of a registry whose claims end with the process: nothing is kept beside the table."""

    name, is_shared, fault, addresses = "memory", False, "", ()

    def open(self, registry: Registry) -> None:
        pass

    def write(self, what: str, former: Claim | None, claim: Claim | None, done: Callable[[Written], None]) -> None:
        done(DONE)

    def renew(self, claim: Claim, done: Callable[[Written], None]) -> None:
        done(DONE)

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


# -- the registry --------------------------------------------------------------------------------

Done = Callable[[Result], None]


class Registry:
    """What is asked of a registry, and what comes of it.  Loop only.

    Each request has a `done`, which is called once, perhaps before the method returns.

    Args:
        table: what is known here of all claims.
        store: where they are kept; whoever makes the Registry calls `store.open`.
        moved: called with each key whose claim has come, changed or gone: where it leads may be another place.
    """

    def __init__(self, loop: Loop, table: Table, store: Store, moved: Callable[[str], None]):
        self.loop = loop
        self.table = table
        self.store = store
        self.moved = moved
        self.events = Events()
        self.refusals: collections.Counter[str] = collections.Counter()
        self.turns: dict[str, collections.deque[Callable[[], None]]] = {}  # by key: who waits for the one that has it
        self.coming: dict[str, set[str]] = {}  # by owner: keys that are new, and that the store is asked to add
        self.writes = 0  # claims, changes and releases that the store has answered to ...
        self.write_seconds = 0.0  # ... and the seconds that these took together
        self.timer = loop.timer(self.tick)
        self.timer.set(table.clock())
        loop.woken.append(self.stood_still)

    # -- what owners ask -------------------------------------------------------------------------

    def claim(self, key: str, owner: str, target: str, ttl: float, hold: float, done: Done, *, takeover: bool = True,
              limit: float = float("inf"), configured: bool = False, **more: Any) -> None:
        """An owner wants a key.

        Args:
            target, ttl, hold: of the Claim; times in seconds.
            takeover, limit, configured: see Table.judge.
            more: see Table.claimed.
        """
        self._have_turn(key, done, lambda done: self._claim(key, owner, target, ttl, hold, done, takeover, limit,
                                                            configured, more, RETRIES))

    def _claim(self, key: str, owner: str, target: str, ttl: float, hold: float, done: Done, takeover: bool,
               limit: float, configured: bool, more: dict[str, Any], tries: int) -> None:
        """The same in its turn; `tries` are left where the store knows better."""
        self._end_if_over(key)
        verdict = self.table.judge(key, owner, takeover, limit, configured,
                                   len(self.coming.get(owner, ())))
        if not verdict.passed:
            done(self.refused(key, verdict) if tries == RETRIES else result_of(verdict))  # else the store has just told
            return
        former = self.table.find(key) or self.table.find_held(key)
        claim = self.table.claimed(verdict, key, owner, target, ttl, hold, **more)
        if verdict.word == NEW:
            self.coming.setdefault(owner, set()).add(key)

        def written(said: Written) -> None:
            coming = self.coming.get(owner, set())
            coming.discard(key)
            if not coming:
                self.coming.pop(owner, None)
            if said.word == TAKEN and tries:
                self.learn(key, said.claim)
                self._claim(key, owner, target, ttl, hold, done, takeover, limit, configured, more, tries - 1)
            elif said.word != OK:
                done(self._unwritten(key, said))
            else:
                # The time that the store took is not the claim's: it would end before its owner thinks so.
                self._put(CLAIMED, claim._replace(expires=self.table.clock() + ttl))
                done(Result(verdict.word, self.table.live.get(key)))

        self._write(CLAIMED, former, claim, written)

    def _write(self, what: str, former: Claim | None, claim: Claim | None, done: Callable[[Written], None]) -> None:
        """Have the store write, and see how long that takes."""
        began = self.table.clock()

        def written(said: Written) -> None:
            self.writes += 1
            self.write_seconds += self.table.clock() - began
            done(said)

        try:
            self.store.write(what, former, claim, written)
        except Exception:
            self.loop.fault(self.store)
            written(FAULT)

    def renew(self, key: str, owner: str, lease: str | None, ttl: float | None, done: Done,
              admin: bool = False) -> None:
        """The claim for another ttl, in seconds; None: for as long as before."""
        def act(former: Claim, done: Done, tries: int = RETRIES) -> None:
            claim = self.table.renewed(former, ttl)
            self.store.renew(claim, lambda said: self._settle(RENEWED, former, claim, said, done, act, tries))
        self._permitted(key, owner, lease, admin, done, act)

    def change(self, key: str, owner: str, lease: str | None, changes: dict[str, Any], done: Done,
               admin: bool = False) -> None:
        """Other values of a claim's fields; `ttl` among them, or it is renewed for as long as before."""
        def act(former: Claim, done: Done, tries: int = RETRIES) -> None:
            fields = {name: value for name, value in changes.items() if name != "ttl"}
            claim = self.table.renewed(former, changes.get("ttl"), **fields)
            self._write(CHANGED, former, claim,
                        lambda said: self._settle(CHANGED, former, claim, said, done, act, tries))
        self._permitted(key, owner, lease, admin, done, act)

    def suspend(self, key: str, suspended: bool, done: Done) -> None:
        """An admin takes a claim off the routes, or puts it back; its owner keeps it."""
        def act(former: Claim, done: Done, tries: int = RETRIES) -> None:
            claim = former._replace(suspended=suspended)
            self._write(CHANGED, former, claim,
                        lambda said: self._settle(CHANGED, former, claim, said, done, act, tries))

        def turn(done: Done) -> None:
            former = self.table.find(key)
            if former is None:
                done(self.refused(key, Verdict("gone", f"there is no claim of {key}")))
            else:
                act(former, done)
        self._have_turn(key, done, turn)

    def release(self, key: str, owner: str, lease: str | None, done: Done, admin: bool = False) -> None:
        """The claim ends now.  Its name is held for its owner."""
        def act(former: Claim, done: Done, tries: int = 0) -> None:
            def written(said: Written) -> None:
                if said.word == OK:
                    self._drop(RELEASED, key)
                    done(Result(OK, former))
                else:
                    self._settle(RELEASED, former, former, said, done, act, tries)

            self._write(RELEASED, former, None, written)
        self._permitted(key, owner, lease, admin, done, act)

    def _permitted(self, key: str, owner: str, lease: str | None, admin: bool, done: Done,
                   act: Callable[[Claim, Done], None]) -> None:
        """Run `act` with the claim of a key in its turn, where who asks may change it."""
        def turn(done: Done) -> None:
            verdict = self.table.permit(key, owner, lease, admin)
            if verdict.claim is None or not verdict.passed:
                done(self.refused(key, verdict))
            else:
                act(verdict.claim, done)
        self._have_turn(key, done, turn)

    def refused(self, key: str, verdict: Verdict) -> Result:
        """The refusal by what the table knows; `unavailable` where it does not know that now."""
        if verdict.word in UNSURE and self.table.frozen_since is not None:
            return Result(UNAVAILABLE, sentence=f"the store has to be asked who has {key}, and does not answer yet: "
                                                f"try again", retry_after=1.0)
        return result_of(verdict)

    def _settle(self, what: str, former: Claim, claim: Claim, said: Written, done: Done,
                again: Callable[[Claim, Done, int], None], tries: int) -> None:
        """The store has answered to a change of a claim: put `claim` in the place of `former`, or say why not.

        Where another router has changed it, and it has the same lease, that one is changed: `again`, `tries` times.
        """
        key = claim.key
        now = self.table.live.get(key)
        if said.word == TAKEN:
            self.learn(key, said.claim)
            verdict = self.table.permit(key, former.owner, former.lease)
            if verdict.claim is None or not verdict.passed:
                done(result_of(verdict))
            elif tries:
                again(verdict.claim, done, tries - 1)
            else:
                done(self._unwritten(key, said))
        elif said.word != OK:
            done(self._unwritten(key, said))
        elif now is None or now.lease != former.lease:
            if now is None:  # it has ended while the store was asked, which may believe that it lives
                self.store.write(RELEASED, claim, None, lambda said: None)
            done(result_of(self.table.permit(key, former.owner, former.lease)))
        else:
            self._put(what, claim._replace(expires=self.table.clock() + claim.ttl))
            done(Result(OK, self.table.live.get(key)))

    def _unwritten(self, key: str, said: Written) -> Result:
        """The refusal where the store has not written a change."""
        if said.word == TAKEN:
            return Result(BUSY, sentence=f"{key} changes all the time: try again", retry_after=1.0)
        return Result(UNAVAILABLE, sentence=said.sentence, retry_after=5.0)

    # -- turns -----------------------------------------------------------------------------------

    def _have_turn(self, key: str, done: Done, act: Callable[[Done], None], most: float = TURNS_MAX) -> None:
        """Run `act` when no other request is under way for the key; not at all where `most` wait already.

        Whatever happens in `act`, the turn ends, once: else nobody could have the key ever again.
        """
        is_over = False

        def begin() -> None:
            try:
                act(over)
            except Exception:
                self.loop.fault(self)
                over(self._unwritten(key, FAULT))

        def over(result: Result) -> None:
            nonlocal is_over
            if is_over:
                return
            is_over = True
            waiting = self.turns[key]
            if waiting:
                self.loop.call(waiting.popleft())
            else:
                del self.turns[key]
            if not result.passed:
                self.refusals[result.word] += 1
            self._tell(done, result)

        waiting = self.turns.get(key)
        if waiting is None:
            self.turns[key] = collections.deque()
            begin()
        elif len(waiting) >= most:
            done(Result(BUSY, sentence=f"too many ask for {key} at once", retry_after=1.0))
        else:
            waiting.append(begin)

    def _tell(self, listener: Callable[..., None], *words: Any) -> None:
        """Call back.  A fault there is not the claim's: that stands as it was written, and its turn ends."""
        try:
            listener(*words)
        except Exception:
            self.loop.fault(owner_of(listener))

    # -- what has become of claims ---------------------------------------------------------------

    def _put(self, what: str, claim: Claim) -> None:
        """The claim is kept: put it into the table, and tell.  A renewal leads nowhere else."""
        former = self.table.live.get(claim.key)
        self.table.put(claim)
        self._tell(self.events.add, what, claim)
        if what != RENEWED or former is None:
            self._tell(self.moved, claim.key)

    def _drop(self, what: str, key: str) -> None:
        """The claim of a key, if there is one, has ended now: tell."""
        claim = self.table.drop(key)
        if claim is not None:
            self._tell(self.events.add, what, claim)
            self._tell(self.moved, key)

    def learn(self, key: str, claim: Claim | None) -> None:
        """Believe what the store knows of a key, where another router has changed it.

        None: there is no claim of it.  A claim whose time is over: its name is held.
        """
        former = self.table.live.get(key)
        if claim is None:
            self._drop(RELEASED, key)
        elif claim.expires <= self.table.clock():
            self.table.put_held(claim)
            if former is not None:
                self._tell(self.events.add, RELEASED, former)
                self._tell(self.moved, key)
        elif former is None or former.lease != claim.lease:
            self._put(CLAIMED, claim)
        elif former._replace(expires=0.0) != claim._replace(expires=0.0):
            self._put(CHANGED, claim)
        else:
            self._put(RENEWED, claim)

    def _end_if_over(self, key: str) -> None:
        """A claim whose time is over has to be told as ended before another one takes its place."""
        claim = self.table.live.get(key)
        if claim is not None and self.table.find(key) is None:
            self.table.drop(key)
            self._ended(claim)
            self.store.write(EXPIRED, claim, None, lambda said: None)

    def _ended(self, claim: Claim) -> None:
        """Tell that the time of a claim was over, behind its end in the table."""
        self._tell(self.events.add, EXPIRED, claim)
        self._tell(self.moved, claim.key)

    def _keep_end(self, what: str, claim: Claim) -> None:
        """Tell the store of an end; behind a request for the key that is under way, which may be the next claim.

        A store that compares leases does not take the one for the other.
        """
        def act(done: Done) -> None:
            if self.table.find(claim.key) is None:
                self.store.write(what, claim, None, lambda said: None)
            done(Result(OK))
        if claim.key in self.turns and not self.store.is_shared:
            self._have_turn(claim.key, lambda result: None, act, float("inf"))  # an end must not be lost
        else:
            self.store.write(what, claim, None, lambda said: None)

    def tick(self) -> None:
        """End what has to end: some of it in each turn of the loop, so that a crowd of names holds up nobody."""
        for claim in self.table.expire():
            self._ended(claim)
            self._keep_end(EXPIRED, claim)
        self.timer.set(max(self.table.clock(), min(self.table.next_expiry(), self.table.clock() + TICK)))

    def freeze(self, frozen: bool, grace: bool = True) -> None:
        """True: the store is away, so nothing ends.  False: it is back; `grace`: each claim has time to be renewed."""
        if frozen:
            self.table.freeze()
        else:
            for claim in self.table.thaw(grace):
                self._tell(self.events.add, RENEWED, claim)

    def stood_still(self) -> None:
        """This process did not run for a while, so nobody could renew here: each claim has time to be.

        Not where several routers have the claims: they were renewed elsewhere, and have ended there if they were not.
        """
        if not self.store.is_shared:
            self.table.spared = self.table.clock() + GRACE_MIN

    def leave(self, owner: str) -> int:
        """An owner is no more: all its claims end, and no name is held.  Returns how many claims there were."""
        owned = self.table.owned.get(owner)
        keys = [] if owned is None else list(owned.live.since(""))
        claims = [claim for key in keys if (claim := self.table.live.get(key))]
        for claim in claims:
            self.end(claim)
        return len(claims)

    def end(self, claim: Claim) -> None:
        """The settings do not let its owner have a claim any more: it ends at once, and its name is not held."""
        self._keep_end(RELEASED, claim._replace(hold=0.0))
        self.table.drop(claim.key, hold=False)
        self._tell(self.events.add, RELEASED, claim)
        self._tell(self.moved, claim.key)
