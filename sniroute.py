"""sniroute: one TCP port in front of many private TLS services.

A client connects with TLS; sniroute reads the name it asks for (SNI) without decrypting anything,
starts the tunnel that leads to that name if none is up, and passes bytes both ways.

    psql "host=db-123.example.com port=19000 sslmode=require"
          |  [PROXY header] [GSSENCRequest] [SSLRequest] ClientHello(db-123.example.com)
          v
    Listener ---- Prelude ---- Routes ---- Backend ---- Flow up, Flow down ---- 127.0.0.1:20000 (a tunnel)
     accept       the name     pattern     the way      bytes, both ways         or any HOST:PORT
                               -> target   there

A client that asks in plain HTTP says its name in Host; what it gets is the route's `http`, by default nothing.

This file is the face: it opens the room that a command needs.  The house is flat: one subject a file, all beside
this one (or with it in one sniroute.pyz).  Imports run down this table only:

    sniroute               the face                            python3 sniroute.py [serve | check | explain | ...]
    sniroute_daemon        the main thread of `serve`          signals, reload, start and end
    sniroute_systemd       what systemd is told                and the sockets that it holds for us
    sniroute_handover      a restart that refuses nobody       listening sockets from process to process
    sniroute_doctor   *    check, explain, selftest, bundle
    sniroute_router        the server                          limits, waits, the count of what came of it
    sniroute_listeners     what the router listens on          its addresses, and ports with one target
    sniroute_settings      options, variables, the file        one table
    sniroute_options       what a route may have               beside its target; tables of routes
    sniroute_values        what people write as a value        durations, networks, programs
    sniroute_connection    one client, accept to close         the states of its life
    sniroute_header        who a client is                     PROXY headers; the clients of ports
    sniroute_deadlines     what a connection waits for         how long, and what is done then
    sniroute_resets        one side has broken off             what the other gets
    sniroute_routes        where a name leads                  routes in layers
    sniroute_patterns      which names a pattern fits          what their fields are
    sniroute_targets       kinds of target, backends           one connection's way there
    sniroute_tunnels       names that have a tunnel            states, leases, waiting, the reaper's turn
    sniroute_processes     child processes                     start, watch, hear, stop; their home
    sniroute_ports         local ports                         which are free, who listens on one
    sniroute_launchers     tunnel programs, a row each
    sniroute_flow          bytes one way                       pump, splice, backpressure
    sniroute_race          several addresses of one host      their order; beside each other where one is silent
    sniroute_log           the journal
    sniroute_loop          what is ready, due, asked for       epoll, timers, queues
    sniroute_host          what this host allows               descriptors, tasks, memory; files that others may change
    sniroute_scarcity      what this host does not have        memory and threads, while we run
    sniroute_wire          TLS, PROXY, PostgreSQL preludes     pure parsers
    sniroute_names         names and addresses; the version
    sniroute_refusals      why a client is refused             and how it is told

    sniroute_commands *    targets that are programs           a process for each connection, or for each command
    sniroute_backends *    several backends of one route       with sniroute_book, _groups, _balance, _warm, _reuse,
                                                               _conversations, _checks and _probes
    sniroute_admin    *    HTTP for the host's own users       with sniroute_door, _metrics and _page
    sniroute_carrier  *    a tunnel program of our own         with sniroute_edge, _forwarder, _dial, _upgrade and _http
    sniroute_web      *    clients that ask in plain HTTP      with sniroute_requests, _bodies, _spares, _gateway,
                                                               _answers, _tls, _browsers, _certificate, _http2, _hpack
                                                               and _http
    sniroute_kubernetes *  services of Kubernetes clusters     with sniroute_jumps, _passage, _links, _transports,
                                                               _pods, _objects, _api, _credentials, _plugins,
                                                               _layers, _kubeconfig, _yaml, _channels, _spdy,
                                                               _forwarder, _dial, _upgrade, _http and _clusters
    sniroute_registry *    names that are claimed for a while  with sniroute_registrar, _rest, _claims, _owners,
                                                               _sqlite, _shared, _redis, _resp, _layers, _rfc2136,
                                                               _dns, _dial, _upgrade, _http, _door and _page; its
                                                               client is sniroute_claim
    sniroute_nodepass *    services behind NAT                with sniroute_dialin, _dialout, _ends, _peering, _pool, _lanes, _duplex,
                                                               _callers, _datagrams, _single, _upstreams, _guards,
                                                               _offload, _signals, _nodeurl, _streams, _h2, _master,
                                                               _panel, _mcp, _instances, _children, _nat, _forwarder,
                                                               _layers, _dial, _upgrade, _http, _hpack, _http2,
                                                               _certificate, _door and _page

A room with a * is an option: leave it out, and one sentence says so where it is asked for.  The rows at the end stand
apart: they are options, most of them of several files; the table in CONTRIBUTING.md says what they import of the rooms
above.  The carrier, sniroute_kubernetes and sniroute_nodepass are other processes.

The one idea: waiting borrows a thread, moving bytes does not.  All that is ready runs in one loop over epoll; only a
target that has to wait (a tunnel that starts, a host to resolve) gets a thread, one for each target, its clients
parked behind it.

    thread      runs                                                          never
    main        settings, signals, start and stop                             touches a client's socket
    loop        accept, prelude, route, connect, pump, deadlines              waits: no DNS, no disk, no lock
    wait-<n>    one for each target that has to wait, 32 at most              touches a client's socket
    reaper      child processes: starts, watches, stops, drains               ends before its children
    log         formats and writes log lines                                  stops traffic
    courtesy-<n>  a page for one refused browser (--error-pages), 4 at most   moves a byte to or from a backend
    admin       HTTP, where --admin or --admin-public asks for it;
                with `admin-<n>`, `public-<n>`                                touches a client's socket
    registry    claims, with [registry]: HTTP, a store, DNS, in its own loop  touches a client's socket; waits
    sqlite      writes claims to the disk, if that is the store               reads the table of claims
    name        one for each host of a Redis or a DNS server to resolve       touches a socket

What it does not do: decrypt what a client says to a backend by TLS, look at anything behind its ClientHello, or treat
a name as proof of who asks.
SNI is not authentication.
"""

import sys

# Before anything else, and in words that Python 3.6 understands.
if sys.version_info < (3, 11):
    sys.stderr.write("sniroute needs Python 3.11 or newer; this is Python %d.%d\n" % sys.version_info[:2])
    sys.exit(2)

import importlib
import os
import signal

__version__ = "0.1.0"  # every file has it, so that `misfit` can say which files are of another version

COMMANDS = {  # command: (room, function of its settings)
    "serve": ("sniroute_daemon", "serve"),
    "check": ("sniroute_doctor", "check"),
    "explain": ("sniroute_doctor", "explain"),
    "selftest": ("sniroute_doctor", "selftest"),
}
PROGRAMS = {  # command: (room, function of the words behind it); these have no settings
    "bundle": ("sniroute_doctor", "bundle"),
    "carrier": ("sniroute_carrier", "main"),
    "kubernetes": ("sniroute_kubernetes", "main"),
    "nodepass": ("sniroute_nodepass", "main"),
    "claim": ("sniroute_claim", "main"),
    "token": ("sniroute_claim", "token"),
}

# They ask a router that runs for something, and would end one whose handlers are not there yet.
ASKING = (signal.SIGHUP, signal.SIGUSR1)
# As the first process of a container it would miss these meanwhile: the kernel drops what such a process leaves to the
# default (pid_namespaces(7)).  Any other is just ended by them.
ENDING = (signal.SIGTERM, signal.SIGINT)


def misfit(error: ImportError) -> str:
    """What is wrong with the files where one of ours cannot be imported; "" where it is none of ours."""
    import re  # imported late: only a fault needs it
    room = error.name or ""
    if not re.fullmatch(r"sniroute_\w+", room):
        return ""
    here = os.path.dirname(os.path.realpath(__file__))  # a folder, or sniroute.pyz
    if os.path.isfile(here):
        return f"{room} is not in {here}: write it with `bundle --with all`"
    if isinstance(error, ModuleNotFoundError):
        return f"{room}.py is not beside sniroute.py: copy it there ({here})"
    versions = {}
    for file in sorted(name for name in os.listdir(here) if re.fullmatch(r"sniroute(_\w+)?\.py", name)):
        try:
            with open(os.path.join(here, file), encoding="utf-8", errors="replace") as source:
                mark = re.search(r'^__version__ = "([^"]*)"', source.read(), re.MULTILINE)
        except OSError:
            mark = None
        versions.setdefault(mark[1] if mark else "an unknown version", []).append(file)
    files = "; ".join(f"{version}: {', '.join(names)}" for version, names in sorted(versions.items()))
    return f"the files in {here} do not fit together ({error.msg}): copy all of them again; there are {files}"


def main(argv: list[str] | None = None) -> int:
    """The command line.  Returns the exit code.

    0 clean; 1 could not listen, the host allows too little, failed while running, or `explain` or `selftest` found
    something; 2 bad settings, or a file of ours that is missing.
    """
    words = sys.argv[1:] if argv is None else argv
    if any(word in (*COMMANDS, *PROGRAMS) and word != "serve" for word in words):
        return run(words)
    # First of all: a signal that comes now waits until Daemon has its handlers, and lets it come.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING + ENDING * (os.getpid() == 1))
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the end without a traceback
    try:
        return run(words)
    finally:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, interrupt)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def run(words: list[str]) -> int:
    """Run the command that the words name.  Returns the exit code."""
    try:
        from sniroute_host import mark_errors, open_standard_streams, shortage
        open_standard_streams()
        mark_errors()
        try:
            return command(words)
        except (OSError, RuntimeError, MemoryError, ImportError, SystemError) as error:
            if not shortage(error):
                raise
            print(f"sniroute: {shortage(error)}", file=sys.stderr)
            return 1
    except ImportError as error:
        if not misfit(error):
            raise
        print(f"sniroute: {misfit(error)}", file=sys.stderr)
        return 2


def command(words: list[str]) -> int:
    """Open the room of the command, and run it.  Returns the exit code."""
    if words and words[0] in PROGRAMS:
        room, program = PROGRAMS[words[0]]
        return getattr(importlib.import_module(room), program)(words[1:])
    from sniroute_refusals import SettingsError
    from sniroute_settings import load_settings
    try:
        settings = load_settings(words, dict(os.environ))
        room, function = COMMANDS[settings.command]
        return getattr(importlib.import_module(room), function)(settings)
    except SettingsError as error:
        for line in error.lines:
            print(f"sniroute: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
