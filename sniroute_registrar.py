"""sniroute_registrar: joins a router and its registry: claims as routes, claimed ports, records in DNS, reloads.

    a router's loop                          the registry's loop, in the thread `registry`
    Routes.layers: configured, Claimed       Registrar: a Door with one Gate (sniroute_door), Rest, Registry, a store
      Claimed.find(name) ------ reads ------> Table.live: one look into a dictionary, and none for a configured name
      Routes.forget, ports, cuts <-- call --- `moved`: a claim has come, changed, gone ---> Updater: a record in DNS

Claims are a layer of routes behind the configured one, so what the settings say always comes first.  A claim costs the
router nothing until somebody asks for its name.  Then it is a Route, with `reach`: each address that the target's host
resolves to is judged again whenever it is dialled, since an owner may point its host elsewhere after the claim.

An option: the daemon imports this file if --registry, or [registry] in the file of settings, says where.

After a reload, and at the start, claims are held against the settings: what these do not allow is not routed from that
moment on (`Registrar.owner_of`), and ends soon after (`_review`).

Threads.  `attach` and `close` are for the thread that attaches, which is `main`.  `registry` runs the loop, and owns
all that is the registry's.  What is below "the router's loop" runs there; `Claimed.find` runs in any thread that
decides where a name leads.  No locks: the tables are read by single look-ups, and their rows never change.

Seams: I want to ...
    keep claims elsewhere            `open_store`
    keep something up for a claim    `_lead_server`
    do more when a claim changes     `Registrar.moved`
    open ports in another way        ClaimedPorts

This room imports sniroute_rest, sniroute_registry, sniroute_claims, sniroute_owners, sniroute_door, sniroute_listeners,
sniroute_routes, sniroute_targets, sniroute_tunnels, sniroute_log, sniroute_loop, sniroute_names, sniroute_refusals, and
late sniroute_sqlite, or sniroute_shared with sniroute_resp; sniroute_rfc2136 with sniroute_dns; and sniroute_nat.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import ipaddress
import logging
import os
import weakref
from typing import TYPE_CHECKING, Any, Callable, Mapping

from sniroute_claims import Claim, Table
from sniroute_door import Door, Gate, listen
from sniroute_listeners import Listener, Ports
from sniroute_log import RELEASED as CUT_BY_RELEASE
from sniroute_loop import Loop, monotonic
from sniroute_names import show_address, without_key
from sniroute_owners import Own, Owner, Rules, Where, address_fault, narrowed
from sniroute_refusals import Malformed, SettingsError
from sniroute_registry import Memory, Registry, Store
from sniroute_rest import Rest
from sniroute_routes import Route, Tally, parse_port_route, parse_route
from sniroute_targets import standing_tunnels
from sniroute_tunnels import stand

if TYPE_CHECKING:
    from sniroute_rfc2136 import Updater
    from sniroute_router import Router

__version__ = "0.1.0"

log = logging.getLogger("sniroute")

# Limits, each with its reason.
CALLERS_MAX = 1000  # connections of owners, each of which may be kept: REGISTRY_FDS (sniroute_settings) are set aside
TOLD = 2.0  # seconds that a start waits for what a store has kept: one that hangs must not hold up all other names
TICK = 1.0  # seconds between two looks at claims that live as long as a connection, and at how long the store is away
REVIEWED = 200  # claims that are held against the settings in one turn: some milliseconds

STORE_PASSWORD = "SNIROUTE_STORE_PASSWORD"  # the variable; its password counts, not the one in the URL
SERVER = "nodepass:"  # begins the target of a claim whose NodePass server is kept up
LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))  # names in Host that mean this host


# -- what the router sees ------------------------------------------------------------------------


class Tallies:
    """The counts of claimed names, by pattern, as Layer has them for routes.

    A Tally is here as long as somebody else holds it: a connection, or a Decision that is remembered.  So names that
    come and go leave nothing behind.
    """

    def __init__(self) -> None:
        self.known: weakref.WeakValueDictionary[str, Tally] = weakref.WeakValueDictionary()

    def __getitem__(self, key: str) -> Tally:
        tally = self.known.get(key)
        if tally is None:
            tally = self.known[key] = Tally()
        return tally


class Claimed:
    """The claims of names as a layer of routes.  Any thread that decides; `forget` is for the router's loop.

    Args:
        owner_of: the owner of a claim; None where the settings do not let it have that any more.
        reach: the routes' `reach`: whether a socket address may be dialled.
    """

    def __init__(self, table: Table, owner_of: Callable[[Claim], Owner | None], reach: Callable[[tuple], bool]):
        self.table = table
        self.owner_of = owner_of
        self.reach = reach
        self.tallies = Tallies()
        self.forget: Callable[[str], None] = lambda pattern: None  # set by Routes
        self.is_stale = False  # the store has been away for too long: nothing is routed

    def find(self, name: str) -> Route | None:
        """The route for a normalised name; None where it is not claimed, is suspended, or may not be routed."""
        claim = self.table.find(name)
        return None if claim is None or claim.suspended or self.is_stale else self.route_of(claim)

    def route_of(self, claim: Claim) -> Route | None:
        """A claim as a route; None where the settings, which may be others by now, do not let its owner have it."""
        owner = self.owner_of(claim)
        if owner is None:
            return None
        is_port = claim.key.startswith("tcp:")
        route = parse_port_route(f":{claim.key[4:]}={claim.target}") if is_port else \
            parse_route(f"{claim.key}={claim.target}")
        return route._replace(allow=narrowed(claim.allow, owner), http=claim.http or None, reach=self.reach)


# -- the registry of a router --------------------------------------------------------------------


def open_store(where: str, loop: Loop, environ: Mapping[str, str]) -> Store:
    """The store that the settings name.  The password of a Redis may be in `environ`.  Raises SettingsError."""
    scheme, _, path = where.partition(":")
    if scheme == "sqlite":
        try:
            from sniroute_sqlite import Sqlite, StoreError  # imported late: two megabytes, for this store only
        except ImportError as error:
            raise SettingsError(f"registry.store: {where}: this Python has no SQLite ({error})") from None
        store = Sqlite(path, loop)
        try:
            store.load()
        except StoreError as error:
            raise SettingsError(f"registry.store: {error}") from None
        return store
    if scheme != "memory":
        from sniroute_resp import Login, parse_url  # imported late: this store only
        from sniroute_shared import Shared
        place, password = parse_url(where), environ.get(STORE_PASSWORD, "").strip()
        if password:
            place = place._replace(login=Login(place.login.user if place.login is not None else "", password))
        if place.login is not None and not place.login.password:  # what stands before the @ may be meant as one
            raise SettingsError(f"registry.store: it has a user and no password: put that into {STORE_PASSWORD}")
        return Shared(place, loop)
    return Memory()


def open_dns(where: str, loop: Loop, environ: Mapping[str, str]) -> Updater | None:
    """What writes a record for each name; None where no `dns` is set.  Raises SettingsError."""
    if not where:
        return None
    from sniroute_dns import KEY_VARIABLE, parse_key, parse_url  # imported late: an option
    from sniroute_rfc2136 import Updater
    zone = parse_url(where)
    try:
        key = parse_key(zone.key, environ.get(KEY_VARIABLE, ""))
    except ValueError as error:
        raise SettingsError(f"registry.dns: {error}") from None  # which names the variable
    return Updater(loop, zone, key, log.log)


class Registrar:
    """The registry of one router, from `attach` to close().

    The order of calls: the maker opens store and DNS, `open` listens and starts the thread, `adopt` comes with each
    reload, `close` ends all.  Raises SettingsError.
    """

    def __init__(self, router: Router, where: Where):
        self.router = router
        self.where = where
        self.identity: tuple[int, int] | None = None  # (device, inode) of the socket file, if there is one
        self.door = Door(self.tick, TICK, "registry")
        self.table = Table(monotonic)
        self.layer = Claimed(self.table, self.owner_of, self.may_reach)
        self.ports = ClaimedPorts(self)
        self.servers: dict[int, dict[str, tuple[str, str]]] = {}  # see `_lead_server`
        self.shadowed: set[str] = set()  # names that are claimed, and have a route of the settings, too
        self.is_closed = False
        try:  # the store last: it has the file, and whoever tries again would find it taken
            self.dns = open_dns(where.dns, self.door.loop, os.environ)
            self.store = open_store(where.store, self.door.loop, os.environ)
        except BaseException:
            self.door.close()
            raise
        self.registry = Registry(self.door.loop, self.table, self.store, self.moved)
        self.store.open(self.registry)
        # The id of our records in DNS (see Updater.want): the same in all processes of a registry, so that a successor
        # knows what its predecessor has written.
        self.mark = "-".join(("sniroute", *where.rules.domains))[:64]
        self.rest = Rest(self.registry, where.rules, where.owners, None, own=self.own, cut=self.cut,
                         is_configured=lambda key: router.routes.configured.find(key) is not None,
                         open_port=self.ports.open, close_port=self.ports.close, rival=self.rival,
                         serves_http=router.settings.serves_http, is_ending=router.deaf.is_set)
        self.address: str | tuple[str, int] = where.address

    # -- the thread that attaches ----------------------------------------------------------------

    def open(self) -> None:
        """Listen, and begin to serve.  Raises OSError."""
        listener, self.identity = listen(self.where.address)
        if not isinstance(self.where.address, str):
            self.address = listener.getsockname()[:2]
            if ipaddress.ip_address(self.address[0]).is_loopback:
                self.rest.hosts = LOCAL_HOSTS | {show_address(self.address).rpartition(":")[0]}
        self.router.targets.own_registry = [] if isinstance(self.address, str) else [self.address]
        self.router.registrar = self
        self.door.gates.append(Gate(self.door, "registry", listener, self.rest.decide, 0, keeps=True, most=CALLERS_MAX))
        self.router.call(lambda: self.router.routes.add_layer(self.layer))  # to those that are there by then
        for key in list(self.table.live):  # of a store that outlives us
            if key.startswith("tcp:") or self.dns is not None or self.table.live[key].target.startswith(SERVER):
                self.moved(key)
        for key in self.table.held if self.dns is not None else ():  # its record may be there still
            if not key.startswith("tcp:"):
                self.dns.unwant(key, self.mark)
        self.door.open()
        self.door.loop.call(functools.partial(self._review, collections.deque(self.table.live), None))

    def wait_for_store(self) -> None:
        """Wait until the store has told all claims, or is found to be away; TOLD seconds at most."""
        told = getattr(self.store, "told", None)
        if told is not None and not told.wait(TOLD):
            log.warning("registry: the store has not told within %g s what is claimed: until then claimed names are "
                        "refused", TOLD)

    def close(self) -> None:
        """End the registry; what the store keeps is kept.  More than once does no harm."""
        if self.is_closed:
            return
        self.is_closed = True
        if self.identity is not None and isinstance(self.address, str):
            with contextlib.suppress(OSError):
                state = os.stat(self.address)
                if (state.st_dev, state.st_ino) == self.identity:
                    os.unlink(self.address)
        if self.door.thread.is_alive():
            self.door.loop.call(self._end)
        else:
            self._end()
        self.door.close()
        self.store.close()
        self.ports.close_all()

    def _end(self) -> None:
        """End what has sockets and timers in the loop: in its last turn, or where it has never run."""
        self.store.stop()
        if self.dns is not None:
            self.dns.close()

    def adopt(self, where: Where) -> None:
        """Take other rules and owners, after a reload; `store` and `dns` stay (see `keep_store`).  Any thread."""
        def change() -> None:
            former, self.where = (self.rest.rules, self.rest.owners), where
            self.rest.adopt(where.rules, where.owners)
            self.router.call(functools.partial(forget_all, self.router))
            for key, claim in list(self.table.live.items()):  # they stand open, whether somebody asks for them or not
                if key.startswith("tcp:") or claim.target.startswith(SERVER):
                    self.moved(key)
            self._review(collections.deque(self.table.live), former)

        self.door.loop.call(change)

    # -- the thread registry ---------------------------------------------------------------------

    def tick(self) -> None:
        """Once in TICK: what `Rest.tick` does, and `stale_max`: a store that is away for too long stops the routing."""
        self.rest.tick()
        since = self.table.frozen_since
        is_stale = bool(self.where.stale_max and since is not None
                        and self.table.clock() - since > self.where.stale_max)
        if is_stale != self.layer.is_stale:
            self.layer.is_stale = is_stale
            self.router.call(functools.partial(forget_all, self.router))

    def own(self) -> Own:
        """Where the router and its registry listen, the store, and the ports of tunnels: no target leads there."""
        targets = self.router.targets
        return Own((*targets.own, *targets.own_admin, *targets.own_registry, *self.store.addresses,
                    *self.router.settings.servers), targets.tunnel_ports)

    def owner_of(self, claim: Claim) -> Owner | None:
        """The owner of a claim; None where the settings, as they are now, do not let it have the claim."""
        rest = self.rest
        return None if rest.fault(claim, rest.rules, rest.owners) else rest.owners.get(claim.owner)

    def _review(self, keys: collections.deque[str], former: tuple[Rules, Mapping[str, Owner]] | None) -> None:
        """Hold claims against the settings, some in each turn: end those that stand no more, say what is shadowed.

        Args:
            keys: of the claims that are still to be looked at.
            former: rules and owners before a reload.  A claim that did not stand by these either is left alone: another
                router of the store has let it in, by settings of its own.  None, at the start: claims in a file are
                our own, so they end; those in a Redis are left alone.
        """
        is_shared = self.store.name not in ("memory", "sqlite")
        for _ in range(min(REVIEWED, len(keys))):
            key = keys.popleft()
            claim = self.table.find(key)
            if claim is None:
                continue
            self._tell_shadow(key)
            fault = self.rest.fault(claim, self.rest.rules, self.rest.owners)
            if fault and (not is_shared if former is None else not self.rest.fault(claim, *former)):
                log.warning("registry: %s of %s ends, since the settings do not allow it any more: %s", key,
                            claim.owner, fault)
                self.registry.end(claim)
        if keys:
            self.door.loop.call(functools.partial(self._review, keys, former))

    def _tell_shadow(self, key: str) -> None:
        """Say once that a name has a route of the settings, too, which comes first; and that it has none any more."""
        route = None if key.startswith("tcp:") else self.router.routes.configured.find(key)
        if route is not None and key not in self.shadowed:
            self.shadowed.add(key)
            log.warning("registry: %s is claimed, and has a route of the settings, too, which comes first: %s", key,
                        route.pattern)
        elif route is None and key in self.shadowed:
            self.shadowed.discard(key)
            log.info("registry: %s has no route of the settings any more: it leads where its owner says", key)

    def moved(self, key: str) -> None:
        """A claim has come, changed or gone: the router decides anew."""
        self._lead_server(key)
        if key.startswith("tcp:"):
            self.ports.lead(key)
            return
        self.router.call(functools.partial(self.layer.forget, key))
        lives = self.table.find(key) is not None
        if not lives:
            self.shadowed.discard(key)
        if self.dns is not None and lives:
            self.dns.want(key, self.mark)
        elif self.dns is not None:
            self.dns.unwant(key, self.mark)

    def _lead_server(self, key: str) -> None:
        """A claim has come, changed or gone: keep the NodePass server up that it leads to, and no longer than that.

        `servers` has these claims by the port of their server: (owner, target), by the claim's key.
        """
        claim = self.table.find(key)
        for port, claims in list(self.servers.items()):
            if claims.pop(key, None) is not None and not claims:
                del self.servers[port]
        route, tunnels = None, self.router.tunnels
        if claim is not None and claim.target.startswith(SERVER) and "nodepass" in tunnels.launchers:
            self.servers.setdefault(port_of_server(claim.target), {})[key] = claim.owner, claim.target
            route = None if claim.suspended else self.layer.route_of(claim)
        stand(tunnels, f"claim {key}", standing_tunnels([route] if route is not None else [], tunnels.launchers))

    def rival(self, key: str, owner: str, target: str) -> str:
        """Why a claim may not lead to a target, since another claim has a NodePass server there; "" where it may.

        A server has one key, and one owner: else an owner could keep another one's client out, or find its key.
        """
        if not target.startswith(SERVER):
            return ""
        port = port_of_server(target)
        # Those that the store is asked to keep count as if they were there: it may take a while.
        coming = [(port_of_server(each), other, (whose, each)) for other, whose, each in self.rest.coming.values()
                  if each.startswith(SERVER)]
        others = [each for other, each in self.servers.get(port, {}).items() if other != key]
        others += [each for at, other, each in coming if at == port and other != key]
        if any(each[0] != owner for each in others):
            return f"port {port} is that of another owner's server: take another port"
        if any(each != (owner, target) for each in others):
            return f"port {port} is that of a server of yours with another key or other parameters: take another port, " \
                "or write the same"
        most = self.router.tunnels.max_tunnels
        ports = {*self.servers, *(at for at, *_ in coming)}
        if port not in ports and len(ports) + len(self.router.settings.servers) >= most:
            return f"there are {most} servers already: the operator has --max-tunnels"
        return ""

    # -- any thread ------------------------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """The registry's numbers, for metrics and /status; `heard_at`: seconds since 1970; None without a Redis."""
        registry, table = self.registry, self.table
        return {"store": self.store.name, "store_up": table.frozen_since is None and not self.store.fault,
                "fault": self.store.fault, "claims": len(table.live), "held": len(table.held),
                "owners": copied(table.counts), "events": copied(lambda: dict(registry.events.counts)),
                "refusals": copied(lambda: dict(registry.refusals)), "streams": len(self.rest.streams),
                "writes": registry.writes, "write_seconds": registry.write_seconds,
                "heard_at": getattr(self.store, "heard_at", None)}

    def shown(self, limit: int) -> list[dict[str, Any]]:
        """The first claims in the order of their names, as /status has them."""
        return [self.show(claim) for claim in copied(lambda: self.table.page(limit=limit))]

    def show(self, claim: Claim) -> dict[str, Any]:
        """A claim as this host's own users see it: without its lease."""
        return {"name": claim.key, "owner": claim.owner, "target": without_key(claim.target),
                "left": round(max(claim.expires - self.table.clock(), 0.0), 3), "suspended": claim.suspended,
                "while_connected": claim.while_connected}

    def find(self, key: str) -> dict[str, Any] | None:
        """What is known of a name, or of `tcp:PORT`, as `show` has it, with `held` where it is held; None: nothing."""
        claim = self.table.find(key)
        if claim is not None:
            return self.show(claim)
        held = self.table.find_held(key)
        return None if held is None else {**self.show(held), "left": 0.0, "held": round(
            max(held.expires + held.hold - self.table.clock(), 0.0), 3)}

    def may_reach(self, address: tuple) -> bool:
        """Whether a claim's target may be dialled at this socket address.  Asked by whoever dials, before each dial."""
        return not address_fault(address, self.rest.rules, self.own())

    def cut(self, key: str) -> None:
        """End the connections of a claim."""
        pattern = port_pattern(key) if key.startswith("tcp:") else key
        self.router.call(functools.partial(cut_claimed, self.router, pattern))


class ClaimedPorts:
    """The listeners of claimed ports.  The thread registry, but for `close_all`.

    A port is opened before it is claimed, since another process may have it (`open`, and `close` where the claim is
    refused).  Once it is claimed, the listener is given to the router (`lead`), whose loop closes it at the end.
    Whoever wants the port again waits until that is done: else it would be in use by ourselves.
    """

    def __init__(self, registrar: Registrar):
        self.registrar = registrar
        self.opened: dict[str, list[Listener]] = {}  # for a claim that is not there yet, by key
        self.given: set[str] = set()  # keys of ports whose listeners are the router's
        self.closing: dict[str, list[Callable[[], None]]] = {}  # keys that the router is closing; who waits for that

    def open(self, key: str, done: Callable[[str], None]) -> None:
        """Listen on a port that is about to be claimed; `done` gets why not, or ""."""
        if key in self.closing:
            self.closing[key].append(functools.partial(self.open, key, done))
            return
        try:
            self._listen(key)
        except (OSError, SettingsError) as error:
            done(str(error))
        else:
            done("")

    def close(self, key: str) -> None:
        """The port was not claimed after all."""
        for listener in self.opened.pop(key, ()):
            listener.close()

    def lead(self, key: str) -> None:
        """A claim has come, changed or gone: have the router lead its port there, or close it."""
        registrar = self.registrar
        router = registrar.router
        if key in self.closing:
            self.closing[key].append(functools.partial(self.lead, key))
            return
        claim = registrar.table.find(key)
        route = None if claim is None or claim.suspended else registrar.layer.route_of(claim)
        if route is not None and not router.deaf.is_set():
            try:
                self._listen(key)  # where another router has taken the claim, or this one has just begun
            except (OSError, SettingsError) as error:
                log.warning("registry: %s is released, since this router cannot open it: %s", key, error)
                registrar.registry.release(key, claim.owner, claim.lease, lambda result: None)
                return
            self.given.add(key)
            router.call(functools.partial(open_claimed, router, route, self.opened.pop(key, [])))
        elif route is None and key in self.given:
            self.given.remove(key)
            self.closing[key] = []
            closed = functools.partial(registrar.door.loop.call, functools.partial(self._closed, key))
            router.call(functools.partial(close_claimed, router, port_pattern(key), closed))

    def _closed(self, key: str) -> None:
        """The router has closed it."""
        for act in self.closing.pop(key):
            act()

    def _listen(self, key: str) -> None:
        """Open a port, unless it is open.  Raises OSError, SettingsError."""
        if key not in self.given and key not in self.opened:
            # Any target will do: the router says where its listeners lead (`Ports.adopt`).
            route = parse_port_route(f":{key[4:]}=tcp:port.invalid:1")
            self.opened[key] = Ports().open([route])[route.pattern]

    def close_all(self) -> None:
        """Close what the router has not got."""
        for key in list(self.opened):
            self.close(key)


# -- the router's loop ---------------------------------------------------------------------------


def open_claimed(router: Router, route: Route, opened: list[Listener]) -> None:
    """A port is claimed, or leads elsewhere now."""
    router.claimed_ports[route.pattern] = route
    router.change_ports({route.pattern: opened} if opened else {}, route.pattern)


def close_claimed(router: Router, pattern: str, closed: Callable[[], None]) -> None:
    """A port is claimed no more.  Its connections go on."""
    try:
        if router.claimed_ports.pop(pattern, None) is not None:
            router.change_ports({}, pattern)
    finally:
        closed()


def forget_all(router: Router) -> None:
    """Claims may lead elsewhere by now, or nowhere: decide all names anew, and look up all hosts."""
    router.routes.forget("*")
    router.targets.resolved.clear()


def cut_claimed(router: Router, pattern: str) -> None:
    """End the connections to what was claimed."""
    for connection in list(router.connections):
        route = None if connection.decision is None else connection.decision.route
        # A route of the settings may have the same pattern, and has no `reach`.
        if route is not None and route.pattern == pattern and route.reach is not None:
            connection.close(CUT_BY_RELEASE)


def port_of_server(target: str) -> int:
    """The port of a claim's NodePass server; 0 where it is none: another router of the store may have let it in."""
    from sniroute_nat import parse_server  # imported late: an option
    try:
        return parse_server(target.removeprefix(SERVER)).port
    except Malformed:
        return 0


COPY_TRIES = 100  # of a copy that fails where the original changes: in CPython the first one succeeds, as a rule


def copied(make: Callable[[], Any]) -> Any:
    """What `make` copies from tables that another thread changes."""
    for _ in range(COPY_TRIES):
        try:
            return make()
        except (RuntimeError, KeyError, IndexError):
            continue
    return make()


def port_pattern(key: str) -> str:
    """The pattern that the route of a claimed port has (`parse_port_route`)."""
    return f"port :{key[4:]}"


def attach(router: Router, where: Where) -> Registrar:
    """Serve the registry of a router until Registrar.close().  Raises OSError or SettingsError, with a sentence."""
    registrar = Registrar(router, where)
    try:
        registrar.open()
    except OSError as error:
        registrar.close()
        raise OSError(f"--registry: {error}") from None
    return registrar
