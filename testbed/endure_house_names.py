"""endure_house_names: owners who claim names at two routers, and what they keep of what they were told.

    Keep       a lane: an owner's name that is claimed once, and renewed until the end: it must never be lost
    Contest    a lane: two owners want the same name at the same time, at two routers.  One may get it.  It is reached
               at both, until it is released, or its time is over; then the other one claims it

What must hold: of two who want a name one gets it; what was acknowledged is reached at either router, DELAY later at
most; what has ended is refused; nothing of it is lost while Redis or a router fails.  While Redis is away names are
routed on, and once it is back each claim has GRACE (OPERATING.md, "Stores").
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import random
import time
from typing import Any, Callable, NamedTuple

from testbed.endure_house_load import BACK, CALM, Lane, Load, Place, Reach

DOMAIN = "tun.example.test"
DELAY = 5.0  # seconds until the other router has heard of a change: it takes milliseconds
DEAF = 10.0  # seconds behind a fault, in which a router may miss what another changes: it subscribes each 5 s at most
GRACE = 30.0  # seconds that each claim has once Redis is back
SHORT, LONG = 5, 60  # ttl of claims that are to end by themselves, and of others; seconds
KEPT, RESTING = 20, 300  # ttl of what is kept, much more than a fault lasts; and while the load is over


class Said(NamedTuple):
    """What the registry has said; status 0: nothing that one could read."""

    status: int
    body: Any


class Owner(Reach):
    """One who claims.  `places`: both routers."""

    def __init__(self, load: Load, owner: str, token: str, port: int, places: list[Place], *parts: str):
        super().__init__(load, lambda: f"*.{DOMAIN}", places[0], *parts, owner=owner)
        self.token = token
        self.target = f"tcp:127.0.0.1:{port}"
        self.places = places

    def tell(self, place: Place, method: str, path: str, body: Any = None, lease: str = "") -> Said:
        """One request."""
        connection = http.client.HTTPConnection(*place.registry, timeout=10)
        headers = {"Authorization": f"Bearer {self.token}", **({"Sniroute-Lease": lease} if lease else {})}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            data = answer.read()
            return Said(answer.status, json.loads(data) if data else None)
        except (OSError, http.client.HTTPException, ValueError):
            return Said(0, None)
        finally:
            connection.close()


class Keep(Lane):
    """An owner's name that is kept."""

    kind = "renewals"
    pause = 1.0

    def __init__(self, owner: Owner, label: str, *parts: str):
        super().__init__(owner.load, lambda: f"{label}.{DOMAIN}", owner.places[0], *parts)
        self.parts = frozenset(parts)
        self.owner = owner
        self.label = label
        self.lease = ""
        self.generation = 0
        self.ttl = KEPT

    def run(self, rng: random.Random) -> None:
        """The last renewal is for longer: nobody renews until the load begins again."""
        self.ttl = KEPT
        super().run(rng)
        self.ttl, until = RESTING, time.monotonic() + BACK
        while not self.tried(rng) and time.monotonic() < until:
            time.sleep(0.1)

    def attempt(self, rng: random.Random) -> str:
        owner, place = self.owner, rng.choice(self.owner.places)
        if not self.lease:
            said = owner.tell(place, "POST", "/routes", {"name": self.label, "target": owner.target, "ttl": self.ttl})
            if said.status in (200, 201):
                self.lease, self.generation = said.body["lease"], said.body["generation"]
                self.load.count("claims")
        else:
            said = owner.tell(place, "POST", f"/routes/{self.label}/renew", {"ttl": self.ttl}, self.lease)
            if said.status in (403, 404, 409):
                self.load.problem(f"{self}: the claim is lost: {said}; faults there: {self.load.ledger.told(self.parts)}")
        return "" if said.status in (200, 201) else f"refused: {said.status} {said.body}"


class Contest(Lane):
    """Two owners want a name."""

    kind = "contests"
    pause = 0.3
    is_measured = False  # each takes many requests, and waits for the end of a claim

    def __init__(self, owners: list[Owner], *parts: str):
        super().__init__(owners[0].load, lambda: f"{self.label}.{DOMAIN}", owners[0].places[0], *parts)
        self.parts = frozenset(parts)
        self.owners = owners
        self.places = owners[0].places
        self.label = ""
        self.number = 0

    def begin(self, rng: random.Random) -> None:
        self.number += 1
        self.label = f"c{self.load.seed}-{self.load.turns}-{self.number}"

    def attempt(self, rng: random.Random) -> str:
        """One name, from the first claim to its end.  It is broken off where an answer was lost: who has it, nobody knows."""
        first, second = rng.sample(self.owners, 2)
        ways = dict(zip((first.owner, second.owner), rng.sample(self.places, 2)))
        said = self.both([(owner, lambda owner=owner: self.claim(owner, ways[owner.owner])) for owner in (first, second)])
        won = [owner for owner, answer in said if answer.status in (200, 201)]
        if len(won) == 2:
            self.load.problem(f"{self}: both owners have it: {said}")
        if len(won) != 1 or any(answer.status != 409 for owner, answer in said if owner not in won):
            return f"refused: {[answer[1] for answer in said]}"
        lease = next(answer.body["lease"] for owner, answer in said if owner is won[0])
        other, = (owner for owner in self.owners if owner is not won[0])
        self.load.count("claims")
        self.everywhere(won[0].owner, rng)
        where = rng.choice(self.places)
        if self.number % 4 == 0 and not self.load.stopping.is_set():  # its time is over
            answer = won[0].tell(where, "POST", f"/routes/{self.label}/renew", {"ttl": SHORT}, lease)
            if answer.status != 200:
                return f"refused: {answer}"
            self.everywhere("refused", rng, time.monotonic() + SHORT)
        else:
            answer = won[0].tell(where, "DELETE", f"/routes/{self.label}", None, lease)
            if answer.status != 204:
                return f"refused: {answer}"
            if rng.random() < 0.5:
                self.everywhere("refused", rng)
        answer = self.claim(other, rng.choice(self.places))
        if answer.status != 201:
            return f"refused: {answer}, after it was free"
        self.load.count("claims")
        self.everywhere(other.owner, rng)
        answer = other.tell(rng.choice(self.places), "DELETE", f"/routes/{self.label}", None, answer.body["lease"])
        return "" if answer.status == 204 else f"refused: {answer}"

    def tried(self, rng: random.Random) -> bool:
        served = super().tried(rng)
        if not served:
            self.begin(rng)  # another name: this one ends by itself
        return served

    def both(self, asks: list[tuple[Owner, Callable[[], Said]]]) -> list[tuple[Owner, Said]]:
        """Ask at the same time."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            futures = [(owner, pool.submit(ask)) for owner, ask in asks]
            return [(owner, future.result()) for owner, future in futures]

    def claim(self, owner: Owner, place: Place) -> Said:
        return owner.tell(place, "POST", "/routes", {"name": self.label, "target": owner.target, "ttl": LONG})

    def everywhere(self, wanted: str, rng: random.Random, earliest: float = 0.0) -> None:
        """Wait until it is so at both routers: from `earliest` on, DELAY later at most, or BACK behind a fault."""
        ledger, since = self.load.ledger, max(time.monotonic(), earliest)
        for place in self.places:
            way = Reach(self.load, self.name, place, owner=wanted)
            parts = self.parts | {f"router {place.word}"}
            while not (said := way.asked(self.name(), rng)).startswith(wanted):
                now, last = time.monotonic(), ledger.last(parts)
                # What it has not heard of may be lost, for all it knows: it is routed for its ttl.
                calm, grace = (DEAF, GRACE + LONG) if wanted == "refused" else (CALM, BACK)
                if now > since + DELAY and last + calm < since or now > max(since, last) + grace:
                    self.load.problem(f"{self} at router {place.word}: {said} instead of {wanted}, {now - since:.1f} s "
                                      f"later; faults there: {ledger.told(parts)}")
                    return
                time.sleep(0.05)
