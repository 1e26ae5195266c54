"""endure_claims: owners who claim, change and release names, and know what they were told; for testbed/endure_kills.py.

    Registry     the router's registry by HTTP: its address, tokens, one request
    Owners       threads, each with names of its own: one request at a time, and what was acknowledged
    Owners.check after a restart: the table of the registry, held against that

A request that was not answered when the router was killed may have been done or not: both will do (`Owner.pending`).
What was answered is to be as it was: owner, target, generation and lease; and what was released is not to come back.  A
claim that was not renewed in time may be there or not: a restart gives each one more ttl, and 30 seconds at least.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.client
import json
import random
import threading
import time
from typing import Any, Mapping, NamedTuple, Sequence

from testbed.endure_router import HOST, wait_for

DOMAIN = "tun.example.test"
TOKENS = {"alice": "alice-token", "bob": "bob-token", "root": "admin-token"}  # the last one is an admin
GRACE = 30.0  # seconds that a claim has at least after a restart
NEAR = 1.5  # seconds around the end of a claim in which it may be there or not
TTLS = (5, 60, 600)  # 5 is the shortest
NAMES = 6  # of each thread
PAUSE = 0.03  # seconds between two requests of a thread: most of them are on the disk before they are answered

Address = tuple[str, int]


class Said(NamedTuple):
    """An answer."""

    status: int
    body: Any


class Registry:
    """The registry of a router, whoever runs."""

    def __init__(self, address: Address):
        self.address = address

    def ask(self, method: str, path: str, body: Any = None, owner: str = "root", lease: str = "") -> Said:
        """One request, on a connection of its own.  Raises OSError and HTTPException."""
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body).encode(), {
                "Authorization": f"Bearer {TOKENS[owner]}", **({"Sniroute-Lease": lease} if lease else {})})
            response = connection.getresponse()
            text = response.read()
        return Said(response.status, json.loads(text) if text else None)

    def table(self) -> dict[str, dict[str, Any]]:
        """All claims by their keys; waits until it serves."""
        def read() -> list[dict[str, Any]] | None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                said = self.ask("GET", "/routes?limit=1000")
                return said.body["routes"] if said.status == 200 else None
            return None

        def found() -> tuple[list[dict[str, Any]]] | None:
            rows = read()
            return None if rows is None else (rows,)

        return {row["name"]: row for row in wait_for(found, "a registry that serves")[0]}


def settings(address: Address, store: str, ports: tuple[int, int]) -> str:
    """[registry] for the file of settings."""
    lines = ["[registry]", f'listen = "{HOST}:{address[1]}"', f'store = "{store}"', f'domains = ["{DOMAIN}"]',
             'targets = ["tcp", "nodepass"]', 'networks = ["127.0.0.0/8"]', 'target_ports = "1-65535"',
             f'ports = "{ports[0]}-{ports[1]}"', 'hold = "1h"']
    for owner, token in TOKENS.items():
        lines += [f"[registry.owners.{owner}]", f'token = "sha256:{hashlib.sha256(token.encode()).hexdigest()}"',
                  f"admin = {str(owner == 'root').lower()}"]
    return "\n".join([*lines, ""])


class Claim(NamedTuple):
    """A claim as its owner knows it."""

    target: str
    ttl: int
    until: float  # wall-clock time of its end, as the registry has said
    generation: int
    lease: str  # "": the answer with it has not come

    def is_near_its_end(self) -> bool:
        return time.time() > self.until - NEAR


def end_of(row: Mapping[str, Any]) -> float:
    """The end of a claim that is shown, as wall-clock time."""
    return datetime.datetime.fromisoformat(row["expires_at"]).timestamp()


def claim_of(row: Mapping[str, Any], lease: str) -> Claim:
    """A claim that is shown."""
    return Claim(row["target"], row["ttl"], end_of(row), row["generation"], row.get("lease", lease))


class Owner:
    """A thread of an owner: it has names that no other thread asks for."""

    def __init__(self, owners: Owners, name: str, number: int, seed: int):
        self.owners = owners
        self.name = name
        self.rng = random.Random(f"{seed} owner {number}")
        self.names = [f"{name}{number}-{at}.{DOMAIN}" for at in range(NAMES)]
        self.known: dict[str, Claim | None] = dict.fromkeys(self.names)  # None: there is none
        self.last: dict[str, int] = dict.fromkeys(self.names, 0)  # the largest generation that was seen
        self.pending: tuple[str, Claim | None] | None = None  # what was asked for, and what it makes of that name
        self.parked = threading.Event()  # it waits for the router
        self.thread = threading.Thread(target=self.work, name="owner")

    def work(self) -> None:
        """One request after another; none while the router is away."""
        while not self.owners.stopping.is_set():
            if not self.owners.going.is_set():
                self.parked.set()
                self.owners.going.wait()
                self.parked.clear()
                continue
            name = self.rng.choice(self.names)
            try:
                self.act(name)
            except ConnectionRefusedError:
                self.pending = None  # nobody has heard it
                self.lost("refuses")
            except (OSError, http.client.HTTPException) as error:
                self.lost(f"{type(error).__name__} {error}")
            self.owners.stopping.wait(PAUSE)

    def lost(self, why: str) -> None:
        """The router has not answered: it has been killed, and the one who did it knows already."""
        if self.owners.going.is_set():
            self.owners.problem(f"a registry that runs: {why}")
            self.pending = None
            self.known = dict.fromkeys(self.names)

    def ask(self, method: str, path: str, then: Claim | None, name: str, body: Any = None, lease: str = "") -> Said:
        """Ask for a change; `then` is what it makes of the name."""
        self.pending = name, then
        said = self.owners.registry.ask(method, path, body, self.name, lease)
        if said.status not in (429, 503):  # these leave it open whether it is done
            self.pending = None
        return said

    def act(self, name: str) -> None:
        """One request about a name."""
        if self.pending is not None or (claim := self.known[name]) is not None and (
                not claim.lease or claim.is_near_its_end()):
            self.look(self.pending[0] if self.pending is not None else name)
            return
        path = f"/routes/{name}"
        if claim is None or self.rng.random() < 0.1:
            target, ttl = self.rng.choice(self.owners.targets), self.rng.choice(TTLS)
            then = Claim(target, ttl, time.time() + ttl, 0, "")
            said = self.ask("POST", "/routes", then, name, {"name": name, "target": target, "ttl": ttl})
            self.settle(name, said, 201 if claim is None else 200, then, is_new=True)
        elif (dice := self.rng.random()) < 0.4:
            then = claim._replace(target=self.rng.choice(self.owners.targets))
            self.settle(name, self.ask("PUT", path, then, name, {"target": then.target}, claim.lease), 200, then)
        elif dice < 0.7:
            self.settle(name, self.ask("POST", f"{path}/renew", claim, name, {}, claim.lease), 200, claim)
        else:
            self.settle(name, self.ask("DELETE", path, None, name, None, claim.lease), 204, None)

    def look(self, name: str) -> None:
        """Ask what there is, where that is open."""
        said = self.owners.registry.ask("GET", f"/routes/{name}", None, self.name)
        if said.status not in (200, 404):
            return
        former, was_pending, self.pending = self.known[name], self.pending, None
        self.known[name] = None
        if said.status == 200:
            lease = former.lease if former is not None and former.generation == said.body["generation"] else ""
            self.known[name] = claim_of(said.body, lease)
            self.last[name] = max(self.last[name], said.body["generation"])
        if was_pending is None and former is not None and said.status == 200 and former.target != said.body["target"]:
            self.owners.problem(f"{name} leads to {said.body['target']} instead of {former.target}")
        if said.status == 200 and not self.known[name].lease:  # it is taken over, which makes a lease that is known
            then = self.known[name]
            again = self.ask("POST", "/routes", then, name, {"name": name, "target": then.target, "ttl": then.ttl})
            self.settle(name, again, again.status if again.status in (200, 201) else 200, then,
                        is_new=True)

    def settle(self, name: str, said: Said, right: int, then: Claim | None, is_new: bool = False) -> None:
        """What was asked for is done, as it has to be; `is_new`: with a new lease."""
        if said.status in (429, 503):
            self.owners.stopping.wait(0.2)
            return
        if said.status != right:
            self.owners.problem(f"{name}: {said.status} instead of {right}: {said.body}; known was {self.known[name]}")
            self.pending = name, then
            return
        if right == 204:
            self.known[name] = None
        else:
            lease = self.known[name].lease if self.known[name] is not None else ""
            made = claim_of(said.body, lease)
            if made.generation < self.last[name] + is_new:
                self.owners.problem(f"{name}: generation {made.generation} behind {self.last[name]}")
            self.last[name] = max(self.last[name], made.generation)
            self.known[name] = made
        self.owners.done()

    # -- the one who kills, while the thread is parked

    def choices(self, name: str) -> list[Claim | None]:
        """What may be true of a name behind a restart."""
        found = [self.known[name]]
        if self.pending is not None and self.pending[0] == name:
            found.append(self.pending[1])
        if any(claim is not None and claim.is_near_its_end() for claim in found):
            found.append(None)
        return found


class Owners:
    """All owners, their registry, and what is kept all the time.  Used with `with`."""

    def __init__(self, registry: Registry, targets: Sequence[str], seed: int):
        self.registry = registry
        self.targets = targets  # that claims lead to
        self.stopping = threading.Event()
        self.going = threading.Event()  # cleared just before the router is killed
        self.lock = threading.Lock()  # guards what follows
        self.acknowledged = 0
        self.problems: list[str] = []
        self.kept: dict[str, Claim] = {}  # what is claimed once, by `keep`, and nothing else is asked about it
        self.checked = 0  # claims that were found as they were
        self.open = 0  # of which it was open whether they would be there
        self.owners = [Owner(self, name, number, seed) for number, name in enumerate(("alice", "alice", "bob"))]

    def __enter__(self) -> Owners:
        for owner in self.owners:
            owner.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End, and wait for it.  A second call does nothing."""
        self.stopping.set()
        self.going.set()
        for owner in self.owners:
            owner.thread.join()

    def problem(self, words: str) -> None:
        with self.lock:
            self.problems.append(words)

    def done(self) -> None:
        with self.lock:
            self.acknowledged += 1

    def keep(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Claim something for as long as the part lasts.  Returns the claim as it is shown."""
        def claimed() -> Said | None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                said = self.registry.ask("POST", "/routes", {**body, "ttl": 24 * 3600}, "alice")
                return said if said.status in (200, 201) else None
            return None

        row = wait_for(claimed, f"a claim of {body}").body
        self.kept[row["name"]] = claim_of(row, "")
        return row

    def hold(self) -> None:
        """From now on what is not answered is open: the router is about to be killed."""
        self.going.clear()

    def wait_until_parked(self) -> None:
        """Wait until nobody asks any more."""
        for owner in self.owners:
            wait_for(owner.parked.is_set, "an owner who waits")

    def check(self) -> dict[str, dict[str, Any]]:
        """Hold the registry's table against what was acknowledged, while all are parked.  Returns the table."""
        found = self.registry.table()
        rows = dict(found)
        now = time.time()
        for name, claim in self.kept.items():
            self.compare(name, "alice", rows.pop(name, None), [claim], now)
        for owner in self.owners:
            for name in owner.names:
                choices = owner.choices(name)
                row = rows.pop(name, None)
                self.open += len(choices) > 1
                self.compare(name, owner.name, row, choices, now)
                if row is not None and owner.known[name] is not None:
                    owner.known[name] = owner.known[name]._replace(until=end_of(row))  # it has been given more time
        self.problems += [f"a claim that nobody knows: {row}" for row in rows.values()]
        return found

    def compare(self, name: str, owner: str, row: Mapping[str, Any] | None, choices: Sequence[Claim | None],
                now: float) -> None:
        """Add what is wrong with one name."""
        if row is None:
            if None not in choices:
                self.problem(f"{name} is lost: it was {choices}")
            return
        claims = [claim for claim in choices if claim is not None]
        if not claims:
            self.problem(f"{name} is back, though it was released: {row}")
            return
        fit = [claim for claim in claims if claim.target == row["target"]
               and (claim.generation == row["generation"] or not claim.lease and claim.generation == 0)]
        if row["owner"] != owner or not fit:
            self.problem(f"{name} was {choices}, and is {row}")
        elif (left := end_of(row) - now) > max(*(claim.ttl for claim in claims), GRACE) + NEAR:
            self.problem(f"{name} has {left:.1f} s left of {row['ttl']}")
        else:
            self.checked += 1

    def resume(self) -> None:
        """The router serves: go on."""
        self.going.set()
