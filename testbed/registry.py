"""Registries for tests: without a router, in a thread of the test; and of a router.

    registry         registry(store=..., clock=..., **rules) -> Served: its Door, its Rest and its Registry
    routed           routed(**options of [registry]) -> Routed: a router of this process with a registry
    table_of         [registry] as TOML
    Asked.ask        one request, on a connection of its own -> Said
    ALICE, BOB, ADMIN    tokens of owners
    Late             a store that answers when the test says so
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import pathlib
import threading
from typing import Any, Callable, Iterator, NamedTuple

import pytest

from conftest import HOST, Address
from sniroute_claim import UnixConnection
from sniroute_claims import Claim, Table
from sniroute_door import Door, Gate, listen
from sniroute_loop import monotonic
from sniroute_owners import Owner, Rules, digest_of, read_rules
from sniroute_registrar import Registrar, attach
from sniroute_registry import Memory, Registry, Written
from sniroute_rest import Rest
from testbed.running import Running, toml
from testbed.web import Talk, call, request

ALICE, BOB, ADMIN = "alice-token", "bob-token", "admin-token"
DOMAIN = "tun.example.com"


def owner(name: str, token: str, **fields: Any) -> Owner:
    return Owner(name, (digest_of(token),), **fields)


OWNERS = {"alice": owner("alice", ALICE), "bob": owner("bob", BOB), "root": owner("root", ADMIN, admin=True)}
RULES = {"domains": [DOMAIN], "targets": ["tcp"], "networks": ["192.0.2.0/24"], "ports": "49000-49009",
         "target_ports": "1-65535"}


class Said(NamedTuple):
    """An answer."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Order(NamedTuple):
    """What the store was asked."""

    what: str
    former: Claim | None
    claim: Claim | None
    done: Callable[[Written], None]


class Late(Memory):
    """A store that answers when the test says so."""

    name = "late"

    def __init__(self) -> None:
        self.orders: list[Order] = []

    def write(self, what: str, former: Claim | None, claim: Claim | None, done: Callable[[Written], None]) -> None:
        self.orders.append(Order(what, former, claim, done))

    def renew(self, claim: Claim, done: Callable[[Written], None]) -> None:
        self.write("renewed", claim, claim, done)


class Asked:
    """A registry that can be asked: at `address`, or at the path of a unix socket."""

    address: Address | str

    def ask(self, method: str, path: str, body: Any = None, token: str | None = ALICE, **fields: str) -> Said:
        """`fields`: more of the head, with _ for -."""
        if isinstance(self.address, str):
            connection: http.client.HTTPConnection = UnixConnection(self.address, 10)
        else:
            connection = http.client.HTTPConnection(*self.address, timeout=10)
        try:
            headers = {name.replace("_", "-"): value for name, value in fields.items()}
            if token is not None:
                headers.setdefault("Authorization", f"Bearer {token}")
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return Said(response.status, response.headers, response.read())
        finally:
            connection.close()

    def claim(self, name: Any = "shop", target: str = "tcp:192.0.2.1:80", token: str = ALICE, **more: Any) -> Said:
        """POST /routes."""
        return self.ask("POST", "/routes", {"name": name, "target": target, **more}, token)


class Served(Asked):
    """A registry that serves.  `moved`: what the router was told; `store` makes one, of the loop."""

    def __init__(self, store: Any = None, clock: Callable[[], float] = monotonic, owners: Any = None, **rules: Any):
        self.closed = False
        self.moved: list[str] = []
        self.cuts: list[str] = []
        self.ports: dict[str, str] = {}  # that cannot be opened: why
        self.door = Door(self.tick, 0.02, "registry")
        self.rules: Rules = read_rules({**RULES, **rules})
        self.store = store(self.door.loop) if store is not None else Memory()
        self.registry = Registry(self.door.loop, Table(clock), self.store, self.moved.append)
        self.store.open(self.registry)
        self.rest = Rest(self.registry, self.rules, owners or OWNERS, frozenset((HOST, "localhost")),
                         is_configured=lambda key: key.startswith("configured."), cut=self.cuts.append,
                         open_port=lambda key, done: done(self.ports.get(key, "")))
        listener, _ = listen((HOST, 0))
        self.address: Address = listener.getsockname()
        self.gate = Gate(self.door, "registry", listener, self.rest.decide, 0, keeps=True, most=500)
        self.door.gates.append(self.gate)
        self.door.open()

    def tick(self) -> None:
        self.rest.tick()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.door.loop.call(self.store.stop)
        self.door.close()
        self.store.close()

    def talk(self, method: str, path: str, body: Any = None, token: str = ALICE, *fields: str) -> Talk:
        """A connection that has asked this, and is kept."""
        data = b"" if body is None else json.dumps(body).encode()
        return call(self.address, request(method, path, f"Authorization: Bearer {token}", *fields,
                                          f"Content-Length: {len(data)}", host="localhost") + data)


@pytest.fixture
def registry() -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(**options: Any) -> Served:
        made.append(Served(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()


# -- of a router -------------------------------------------------------------------------------

TOKENS = {"alice": ALICE, "bob": BOB, "root": ADMIN}
OPTIONS = {"listen": f"{HOST}:0", "domains": [DOMAIN], "targets": ["tcp"], "networks": ["127.0.0.0/8"],
           "target_ports": "1-65535"}


def table_of(owners: Any = None, **options: Any) -> str:
    """[registry] as TOML; an option that is None is left out.  `owners`: by name, options beside those of OWNERS."""
    lines = ["[registry]"]
    lines += [f"{name} = {toml(value)}" for name, value in {**OPTIONS, **options}.items() if value is not None]
    for name, more in ({"alice": {}, "bob": {}, "root": {}} if owners is None else owners).items():
        lines.append(f"[registry.owners.{name}]")
        table = {"token": f"sha256:{digest_of(TOKENS[name]).hex()}", "admin": name == "root", **more}
        lines += [f"{option} = {toml(value)}" for option, value in table.items()]
    return "\n".join([*lines, ""])


class Routed(Asked):
    """A router of this process with its registry."""

    def __init__(self, running: Running, write: Callable[[str], str]):
        self.running = running
        self.router = running.router
        self.write = write
        self.registrar: Registrar = attach(running.router, running.router.settings.claims)
        self.address = self.registrar.address

    def reload(self, text: str) -> None:
        """Go on with another file, as the daemon does."""
        self.write(text)
        former = self.router.settings
        settings = former.again(former)
        opened = self.router.ports.open(settings.port)
        done = threading.Event()
        self.router.call(lambda: (self.router.adopt(settings, opened), done.set()))
        assert done.wait(10)
        self.registrar.adopt(settings.claims)
        self.settle()

    def settle(self) -> None:
        """Wait until both loops have done what has been asked of them so far."""
        for loop in (self.registrar.door.loop, self.router, self.registrar.door.loop, self.router):
            done = threading.Event()
            loop.call(done.set)
            assert done.wait(10)

    def target(self, server: Any) -> str:
        """A far end as a target."""
        return f"tcp:{HOST}:{server.address[1]}"

    def close(self) -> None:
        self.registrar.close()


@pytest.fixture
def routed(run: Callable[..., Running], tmp_path: pathlib.Path) -> Iterator[Callable[..., Routed]]:
    """routed(*options of the router, owners=..., more=text of the file, **options of [registry]) -> Routed."""
    with contextlib.ExitStack() as stack:
        numbers = itertools.count()

        def make(*argv: str, more: str = "", **options: Any) -> Routed:
            path = tmp_path / f"router-{next(numbers)}.toml"

            def write(text: str) -> str:
                path.write_text(text)
                return str(path)

            made = Routed(run("-c", write(more + table_of(**options)), *argv), write)
            stack.callback(made.close)
            return made

        yield make
