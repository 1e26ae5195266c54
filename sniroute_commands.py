"""sniroute_commands: targets that are programs of the operator's: a process for each connection, or for each command.

    exec:PROGRAM ARGUMENT ...        one process for each connection; its stdin and stdout are the connection

        loop                                     reaper                                  the system
        exec_ready, ExecBackend.begin            Runs.step
          a socket pair --- the far end -------->  Processes.launch (death_guard) ----->  PROGRAM  stdin, stdout
          the near end is pumped as any socket     stderr is drained: its last words
        ExecBackend.release -------------------->  Processes.stop: TERM, later KILL
        Run.code, Run.account  <-----------------  Runs.exited

    command:PROGRAM ARGUMENT ...     one process for each command, which listens on {address}, or on {port}: a tunnel
                                     of the TunnelTable, by the Launcher that COMMAND makes of its words

Words.  The operator's text is split as a shell would (shlex), and no shell is ever run.  A field stands inside a word.
`fits` compares each filled text with the text as it was written: as many words, the same letters around the fields,
and no field that begins with a dash, since it could be an option.  The program itself has no field: a client never
chooses what runs.

A run is a process that was given bytes: it may have acted on them, so nothing is tried again.  Its exit code says
whether its stream is whole: one that ends otherwise than with 0 has died, and the client gets a reset.

Threads.  The loop makes runs, and gives them up; the reaper starts and stops them, since the kernel kills children
with the thread that forked them.  Between the two are deques, and single assignments in a Run.

Seams: I want to ...
    give programs another environment     `environment`
    understand a program's last words     `reason`
    bound the processes otherwise         `exec_ready`

This room imports sniroute_targets, sniroute_processes, sniroute_launchers, sniroute_names, sniroute_refusals and the
standard library.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import re
import shlex
import socket
from typing import TYPE_CHECKING, Iterable

from sniroute_launchers import (TAKEN, TUNNEL_IDENTITY, Launcher, Reason, TunnelError, TunnelKey, Variable, inherited,
                                last_words)
from sniroute_names import printable
from sniroute_processes import Child, Ends, Process
from sniroute_refusals import Malformed, Refused
from sniroute_targets import Backend, Doubt, Retry, Scheme, Targets, tunnel_prepare, tunnel_ready

if TYPE_CHECKING:
    from sniroute_routes import Decision
    from sniroute_tunnels import TunnelTable

__version__ = "0.1.0"

# Limits, each with its reason.
COMMAND_MAX = 1000  # characters of a command, filled in: a line of the log takes 2,000
EXIT_LOOKS = 100  # for the exit code of a process that exits, EXIT_TIMEOUT apart: 5 s, as a kernel that swaps takes
COMMANDS_KEPT = 1024  # texts whose words are remembered, least recent out: names come from strangers

# -- words -------------------------------------------------------------------------------------

OWN_FIELDS = ("address", "port")  # of `command:`, filled in when it is started
FIELD = re.compile(r"\{([^{}]*)\}")
# What a field may be filled with.  No dash comes first: inside of a quoted word, as in `sh -c "prog {label}"`, that
# would be an option.
FILLING = r"[a-z0-9_.][a-z0-9_.-]*"


@functools.lru_cache(COMMANDS_KEPT)
def words_of(text: str) -> tuple[str, ...]:
    """The words of a command, split as a shell would (shlex).  Raises Malformed."""
    if not re.fullmatch(f"[ -~]{{1,{COMMAND_MAX}}}", text):
        raise Malformed(f"a command has 1 to {COMMAND_MAX} characters of printable ASCII: {printable(text, 80)!r}",
                        kind="bad_name")
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:  # a quote without its end
        raise Malformed(f"{printable(text, 80)!r}: {error}", kind="bad_name") from None
    if not words or not words[0]:
        raise Malformed(f"{printable(text, 80)!r} names no program", kind="bad_name")
    return words


def check_exec(rest: str) -> str:
    """Check a command, and return it unchanged.  Raises Malformed."""
    program = words_of(rest)[0]
    if "/" in program and not os.path.isabs(program):
        raise Malformed(f"{program!r} is relative to a folder that may change: write its whole path, or its name alone",
                        kind="bad_name")
    return rest


def check_command(rest: str) -> str:
    """As `check_exec`, for a command that listens where it is told."""
    check_exec(rest)
    if not any(f"{{{field}}}" in word for word in words_of(rest)[1:] for field in OWN_FIELDS):
        raise Malformed(f"{printable(rest, 80)!r} is not told where to listen: one of its words needs "
                        "{address}, which is 127.0.0.1 and a port, or {port}", kind="bad_name")
    return rest


@functools.lru_cache(COMMANDS_KEPT)
def pattern_of(word: str, own: tuple[str, ...]) -> re.Pattern[str]:
    """What a word as it was written may become.  Raises Malformed where a field would choose an option."""
    if re.match(r"-+\{", word):
        raise Malformed(f"{word!r}: a field behind a dash would let clients choose the option", kind="bad_name")
    parts = FIELD.split(word)  # literal, field, literal, ...
    return re.compile("".join(re.escape(part) if not at % 2 else re.escape(f"{{{part}}}") if part in own else FILLING
                              for at, part in enumerate(parts)))


def fits(own: tuple[str, ...], template: str, rest: str) -> None:
    """Check that the fields of a command made no other word, and no option.  Raises Malformed."""
    before, after = words_of(template), words_of(rest)
    if FIELD.search(before[0]):
        raise Malformed(f"{before[0]!r}: a field cannot name the program: clients would choose it", kind="bad_name")
    for word, filled in zip(before, after):
        if not pattern_of(word, own).fullmatch(filled):
            raise Malformed(f"{printable(filled)!r} is not what {word!r} may become", kind="bad_name")
    if len(before) != len(after):
        raise Malformed(f"{printable(rest, 80)!r} has not the words of {template!r}", kind="bad_name")


# -- programs ----------------------------------------------------------------------------------


def environment(variables: Iterable[Variable]) -> dict[str, str]:
    """The environment of a program: that of a tunnel without the router's identity, then its route's variables."""
    found = {name: value for name, value in inherited(os.environ).items()
             if name not in TUNNEL_IDENTITY and not name.startswith("TUNNEL_")}
    for name, value in variables:
        value = os.environ.get(name) if value is None else value
        if value is not None:
            found[name] = value
    return found


def reason(tail: bytes) -> Reason:
    """The last words of a program.  It may be any program, so no words say that another try is useless.

    TAKEN is put in the form in which Processes and the TunnelTable look for it: many programs begin it with "A".
    """
    return Reason(text=last_words(tail).replace(TAKEN.capitalize(), TAKEN))


def argv(rest: str, port: int) -> list[str]:
    """The words after the program, told where to listen."""
    return [word.replace("{address}", f"127.0.0.1:{port}").replace("{port}", str(port)) for word in words_of(rest)[1:]]


def program_launcher(rest: str, variables: Iterable[Variable] = ()) -> Launcher:
    """The Launcher of one command."""
    program = words_of(rest)[0]
    return Launcher(program, argv, environment(variables), reason, f"{program} is not there: install it")


def command_launcher(key: TunnelKey) -> Launcher:
    """The Launcher of a tunnel's command, whose words are in its key."""
    return program_launcher(key.hostname, key.variables)


def obstacle(rest: str) -> str:
    """Why the program of a command cannot be run now, as a sentence; '' where it can.  It looks at the disk."""
    return program_launcher(rest).obstacle


# The row of `command:`.  It names no program: `made` makes a Launcher for each tunnel, of the words in its key.
COMMAND = Launcher("", argv, {}, reason, "", made=command_launcher)

# -- a process for each connection -------------------------------------------------------------


class Run:
    """One process for one connection.  The loop makes it; from then on the reaper writes it, except `over`."""

    __slots__ = ("rest", "variables", "far", "child", "over", "exit", "verdict")

    def __init__(self, rest: str, variables: tuple[Variable, ...], far: socket.socket):
        self.rest = rest
        self.variables = variables
        self.far = far  # the process's end of the socket pair; the reaper closes it
        self.child: Child | None = None  # the seat in its process; None before the start
        self.over = False  # written by the loop: the connection needs it no longer
        self.exit: int | None = None  # its exit code, or the signal below zero
        self.verdict = ""  # why it did not start, or how it ended

    def code(self) -> int | None:
        """Its exit code, the signal below zero; None while it runs.  Any thread.

        The kernel is asked, since it knows before the reaper does.  `exit` is written before the descriptors are
        closed: where it is None behind the question, the question was about the right process.
        """
        code, child = None, self.child
        if self.exit is None and child is not None and child.process.pidfd >= 0:
            with contextlib.suppress(OSError):
                found = os.waitid(os.P_PIDFD, child.process.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if found is not None:
                    code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        return code if self.exit is None else self.exit

    def is_exiting(self) -> bool:
        """Whether it has begun to exit.  Between the end of its stream and its exit code the kernel may let it wait."""
        child = self.child
        return self.exit is None and child is not None and not child.process.alive()

    def account(self, why: str) -> str:
        """Why it gave no answer: how it ended, where it did so by itself, else `why`; and its last words."""
        child = self.child
        # A process that sniroute stopped and a signal ended says nothing of why: then `why` does.
        if self.verdict and not (child is not None and child.close_at and (self.exit or 0) < 0):
            return self.verdict
        words = "" if child is None else last_words(child.process.tail)
        return f"{why}: {words}" if words else why


class Runs:
    """The runs of a router, and the reaper's turn for them: a Guest of the TunnelTable, and an Owner of processes."""

    def __init__(self, tunnels: TunnelTable):
        self.tunnels = tunnels
        self.live: set[Run] = set()  # the loop adds, the reaper takes out
        self.wanted: collections.deque[Run] = collections.deque()  # to be started
        self.unwanted: collections.deque[Run] = collections.deque()  # to be stopped
        self.by_child: dict[Child, Run] = {}  # the reaper's

    # -- the loop

    def begin(self, rest: str, variables: tuple[Variable, ...], far: socket.socket) -> Run:
        """Have a process started, with `far` as its stdin and stdout."""
        run = Run(rest, variables, far)
        self.live.add(run)
        self.wanted.append(run)
        self.tunnels.wake()
        return run

    def give_up(self, run: Run) -> None:
        """Its connection is over: have it stopped, if it has not ended."""
        run.over = True
        self.unwanted.append(run)
        self.tunnels.wake()

    # -- the reaper

    def step(self, now: float, closing: str) -> None:
        """Start the next one, stop what is not wanted; stop all once the table is `closing`."""
        while self.wanted:
            run = self.wanted.popleft()
            if not run.over and not closing:
                self._start(run, now)
                break  # one in a turn: each fork takes milliseconds, and there are other processes
            self._drop(run, "sniroute is stopping")
        while self.unwanted:
            run = self.unwanted.popleft()
            if run.child in self.by_child:
                self.tunnels.processes.stop(run.child, "", now)
        if closing:
            for child in list(self.by_child):
                self.tunnels.processes.stop(child, "", now)

    def due(self, now: float) -> list[float]:
        """Now, where there is something to start or to stop."""
        return [now] if self.wanted or self.unwanted else []

    def _start(self, run: Run, now: float) -> None:
        """Start a process.  Where that fails, the end of its socket tells the connection so."""
        try:
            launcher = program_launcher(run.rest, run.variables)
            words = [launcher.find(), *words_of(run.rest)[1:]]
            # True: the identity that env_from names.  program_launcher has left out the router's own.
            process = self.tunnels.processes.launch(launcher, True, words, run.far, self)
        except (OSError, ValueError, TunnelError) as error:
            self._drop(run, f"it did not start: {error}")
            return
        except BaseException:
            self._drop(run, "it did not start")
            raise
        child = process.seat(0, now)
        self.by_child[child] = run
        run.child = child
        run.far.close()  # after `child`: who sees the end of the stream asks for it
        self.tunnels.counters["runs"] += 1

    def _drop(self, run: Run, verdict: str) -> None:
        """Part with a run that has no process."""
        run.verdict = verdict
        run.far.close()
        self.live.discard(run)

    def closed(self, child: Child, reason: Reason) -> None:
        """Never called: no process of ours has several listeners."""

    def exited(self, process: Process, ends: Ends) -> None:
        """A process has ended, or does not die and is given up."""
        for child, _ in ends:
            run = self.by_child.pop(child)
            run.verdict = child.verdict.text
            code = process.popen.returncode
            run.exit = -1 if code is None else code
            self.live.discard(run)


def runs_of(tunnels: TunnelTable) -> Runs:
    """The runs of this table.  The loop."""
    if tunnels.guest is None:
        tunnels.guest = Runs(tunnels)
    return tunnels.guest


class ExecBackend(Backend):
    """A process of its own: one end of a socket pair is the connection, the other one its stdin and stdout."""

    __slots__ = ("runs", "rest", "variables", "run", "why", "asked")
    proven_by_connect = False  # a socket pair is always connected: the program's first byte proves that it works

    def __init__(self, runs: Runs, decision: Decision):
        super().__init__(decision.target, (), True)
        self.runs = runs
        self.rest = decision.rest
        self.variables = decision.variables
        self.run: Run | None = None
        self.why = ""  # why it failed
        self.asked = 0  # how often `is_lost` has said None

    def begin(self) -> socket.SocketType | None:
        """The near end; the process is on its way.  None at the second call: nothing is tried again."""
        if self.run is not None:
            return None
        server, far = socket.socketpair()
        server.setblocking(False)
        self.run = self.runs.begin(self.rest, self.variables, far)
        return server

    def tell(self, row: object, what: str) -> None:
        """There is one address, so what came of it takes the place of what was told before."""
        self.told = {row: what}

    def is_lost(self) -> bool | None:
        """Whether it ended with another exit code than 0.

        The end of its stream comes shortly before its own.  So None at the first call while it still runs, and as long
        as it exits, but not for ever: then it is lost.
        """
        is_exiting = self.run.is_exiting()  # asked first: where it ends in between, its code is there by then
        code = self.run.code()
        if code is not None:
            return bool(code)
        if self.asked and not is_exiting or self.asked >= EXIT_LOOKS:
            return is_exiting
        self.asked += 1
        return None

    def failed(self, why: str, server: socket.SocketType | None, last: bool) -> Retry | Doubt | Refused | None:
        """It gave no answer: refuse, with its last words.  It had bytes of the client, so it is not tried again."""
        if not self.why:
            self.why = why
            if not self.run.verdict:
                return None  # its words are on their way through the reaper
        return Refused("command_failed", f"{self.target}: {self.run.account(self.why)}")

    def release(self) -> None:
        if self.run is not None and not self.run.over:
            self.runs.give_up(self.run)


def exec_ready(targets: Targets, decision: Decision) -> Backend:
    """Start a process for each connection.  Its memory is about a tunnel's, so `max_tunnels` limits these, too."""
    tunnels = targets.tunnels
    runs = runs_of(tunnels)
    if tunnels.closing:
        raise Refused("tunnel_stopping", "sniroute is stopping")
    if len(runs.live) >= tunnels.max_tunnels:
        raise Refused("busy", f"{tunnels.max_tunnels} programs run already: raise --max-tunnels")
    return ExecBackend(runs, decision)


COMMAND_SCHEMES = {
    "exec": Scheme(check_exec, exec_ready, guard=functools.partial(fits, ()), is_inside=True, is_program=True,
                   obstacle=obstacle),
    "command": Scheme(check_command, tunnel_ready, tunnel_prepare, "its command", is_tunnel=True,
                      guard=functools.partial(fits, OWN_FIELDS), holds=OWN_FIELDS, is_inside=True, is_program=True,
                      obstacle=obstacle),
}
