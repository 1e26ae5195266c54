"""sniroute: one TCP port in front of many private TLS services.

A client connects with TLS; sniroute reads the name it asks for (SNI) without decrypting
anything, starts the tunnel that leads to that name if none is up, and passes bytes both ways.

    psql "host=db-123.example.com port=19000 sslmode=require"
          |  [PROXY header] [GSSENCRequest] [SSLRequest] ClientHello(db-123.example.com)
          v
    listener --- Prelude --- Routes --- Scheme --- Flow up, Flow down --- backend
     accept      who asks    pattern    how to      bytes, both ways       127.0.0.1:20000 (a tunnel)
                 for what    -> target  get there                          or any HOST:PORT

The one idea: waiting borrows a thread, moving bytes does not.  `Router` is a
`socketserver.ThreadingTCPServer`, but what is ready runs in one loop over epoll.  Only a *name*
that has to wait (a tunnel that starts, a host to resolve) gets a thread from `ThreadingMixIn`;
its clients park behind it, cost no thread, and are handed back to the loop with it.

Threads.
    main      settings, signals, start and stop, the hand-over to a successor: class Daemon.  Never touches
              a client's socket.
    loop      accept, read, route, dial, speak, pump, deadlines.  Waits for nothing: no DNS, no disk.
    wait-<n>  one for each target that waits, at most WAIT_THREADS, one started in a turn.  Touches
              no socket of a client.
    reaper    all child processes: see sniroute_tunnels.
    log       formats and writes log lines, so that a stuck log never stops traffic.
    (and those of sniroute_admin.py, where --admin asks for it: they read, and ask through `Router.call`)
Locks: this file makes one, Daemon.reloading, for reloads only (logging has one, held while a line is queued;
the dump for SIGUSR1 takes the tunnels').  Threads hand things to the loop by `Router.call` (a deque and a byte in a
pipe), to `log` likewise; the exceptions are single assignments: `Router.resolved`, filled by wait-<n>, what
a reload leaves in `Router.last_reload`, `Router.reloads` and the TunnelTable, and `Router.endings`, which the
admin sets.  `Router.counters` is written by the loop only, `TunnelTable.counters` by the reaper.

The life of a connection is `Connection.state`:

    PRELUDE -> ROUTED -> (PARKED -> ROUTED ->) DIALING -> (GREETING ->) OPEN -> (LINGERING ->) CLOSED
      PRELUDE    one deadline from accept on, however many packets it takes
      ROUTED     its name is known, and it is dialled in the same turn of the loop
      DIALING    over by the end of the turn where the connect succeeds at once, as to a tunnel
      any        -> PARKED, once: a tunnel failed before either side said more than the hello; the
                 same bytes are sent again, and the client never notices
      LINGERING  after a refusal or a backend's reset: the client may still read

A turn of the loop: what is ready is called back, deadlines are looked at, ends are passed on; then
the connections of this turn take each step together: all that were accepted are read, all that are
routed dial, all that have dialled speak.  So a backend is woken once for many of them, and not for
each: a fifth of the CPU of a connection.

Seams: I want to ...
    read another prelude          a parser (pure), a method of Prelude that calls it, and its row in
                                  Prelude.OPENERS
    add a kind of target          a row in SCHEMES
    run another tunnel program    a Launcher row in `tunnel_launchers`, and a row in SCHEMES with
                                  tunnel_ready and tunnel_prepare
    add a setting                 a row in SETTINGS: it makes the option, the variable, the key in the file
                                  and the help; what a reload changes is in Daemon._adopt and Router.adopt
    add an option of a route      a field of Route, and its row in ROUTE_OPTIONS
    test another hard case        a row in SELF_TESTS
    show or steer it otherwise    attach(router, settings) of another file, called in Daemon._attach
    refuse for another reason     a row in REFUSALS, and in the README: a test compares them
    feed routes from elsewhere    build a Routes and assign it to Router.routes: it is swapped whole

What it does not do: decrypt, look at anything behind the ClientHello, or treat a name as proof
of who asks.  SNI is not authentication.
"""

import os
import sys

COMMANDS = {  # the room and the function that each command runs
    "serve": ("sniroute_daemon", "serve"),
    "check": ("sniroute_doctor", "check"),
    "explain": ("sniroute_doctor", "explain"),
    "selftest": ("sniroute_doctor", "selftest"),
}


def keep_standard_streams() -> None:
    """Open descriptors 0 to 2 where they are closed: a client's socket must never become stderr."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)


def main(argv=None):
    """The command line.  Returns the exit code.

    0 clean; 1 could not listen, failed while running, or `explain` or `selftest` found something; 2 bad settings.
    """
    import importlib
    from sniroute_refusals import SettingsError
    from sniroute_settings import load_settings
    keep_standard_streams()
    try:
        settings = load_settings(sys.argv[1:] if argv is None else argv, dict(os.environ))
        room, command = COMMANDS[settings.command]
        return getattr(importlib.import_module(room), command)(settings)
    except SettingsError as error:
        for line in error.lines:
            print(f"sniroute: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
