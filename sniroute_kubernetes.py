#!/usr/bin/env python3
"""sniroute_kubernetes: what `kubectl port-forward` does, with nothing installed, for many services in one process.

It listens on local ports.  For each client it chooses a ready pod behind a service, has a session to that pod
(sniroute_links), and carries bytes both ways.

    client --- Listener --- Client --- Link --- API server --- node --- pod
     psql      127.0.0.1       |
               :20000          +--- Pods (sniroute_pods): which pod, which port

    port-forward TARGET --listen HOST:PORT    one target, as NAMESPACE/svc/NAME:PORT
    exec NAMESPACE/pod/NAME -- COMMAND ...    one command, between stdin and stdout
    get TARGET                                what would be chosen now, and why
    forwarders                                any number of targets, told on stdin

A target is the words of sniroute's `kubernetes:`, or behind `jump:` those of its `jump:`.

What becomes of one client is in sniroute_passage; of one that a command in the pod serves, in sniroute_jumps.

Threads: `main` runs the one loop, which owns every socket.  What blocks has threads of its own: names (sniroute_dial),
credential plugins (sniroute_credentials).  There are no locks.

Seams: I want to ...
    another command    COMMANDS, and a function beside `forwarders`
    another option     OPTIONS, and a field of Settings

sniroute starts this program, and never imports it.  This room imports sniroute_jumps and
sniroute_passage (clients), sniroute_links, sniroute_pods, sniroute_objects (targets), sniroute_api,
sniroute_kubeconfig, sniroute_forwarder, sniroute_dial (Failed), sniroute_host, sniroute_loop, sniroute_names and
sniroute_refusals.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import ssl
import sys
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from sniroute_api import Api, Apis
from sniroute_dial import Failed
from sniroute_forwarder import LEVELS, Control, Forwarder, Listener, Log, bridge, parse_listen
from sniroute_host import open_standard_streams, raise_descriptor_limit
from sniroute_jumps import PROOF, Exec, Jump
from sniroute_kubeconfig import kubeconfig_paths
from sniroute_links import Links, clock
from sniroute_loop import Alarms, monotonic
from sniroute_names import printable, show_address
from sniroute_objects import Choice, KubeTarget, none_ready, parse_argument, parse_target, with_option
from sniroute_passage import (ACCEPT, GRACE, HALF_LAST, LINGER, REASONS, SETTLE, START, Client, Target, farewell, hurry,
                              linger)
from sniroute_pods import CLOSED, Maker, Pods
from sniroute_refusals import Malformed, SettingsError

__version__ = "0.1.0"

TICK = 10.0  # seconds between two looks at the clock, which passes while the host sleeps
LEAVE = 1.5  # seconds at the end, to remove pods: sniroute kills what has not ended after two
LEAVE_LOOK = 0.02  # seconds between two looks whether they are removed
AWAY = 30.0  # seconds that are missing then: balancers and API servers have forgotten us

# -- the program -------------------------------------------------------------------------------


class Settings(NamedTuple):
    """The options that all commands have."""

    kubeconfig: str = ""
    context: str = ""  # of targets that name none
    exec_path: str = ""
    ping: float = 15.0
    loglevel: str = "info"
    log: str = "text"


class Kubernetes(Forwarder):
    """What all clients share."""

    called = "the Kubernetes program"

    def __init__(self, log: Log, settings: Settings, environ: Mapping[str, str]):
        """Raises SettingsError."""
        super().__init__(log, Client, self.parse_target)
        self.settings = settings
        self.apis = Apis(self.loop, kubeconfig_paths(settings.kubeconfig, environ), environ,
                         [each for each in settings.exec_path.split(":") if each])
        self.apis.moved = self.on_moved
        self.apis.warn = lambda text: log("warn", text, event="warning")
        self.links = Links(self.loop, settings.ping)
        self.alarms = Alarms(self.loop)
        self.pods: dict[str, Pods] = {}  # by target, as text
        self.tools: dict[str, int] = {}  # by image, or where that is not known by the uid of a pod: the tool's number
        self.ticking = self.loop.timer(self.on_tick)
        self.ticked = clock()
        self.leaving = self.loop.timer(self.leave)
        self.leave_by = 0.0  # clock time; 0: it does not end yet
        self.ticking.set(monotonic() + TICK)
        self.command: tuple[str, ...] = ()  # of `exec`
        self.code = 0  # of that command
        # Clients that wait, each for the reason behind its queue; a client may be in several.
        self.starting = self.loop.queue(START, Client.on_late)  # for the node to take the call
        self.accepting = self.loop.queue(ACCEPT, Client.on_no_accept)  # the same, on a session that was silent
        self.hurried = self.loop.queue(LINGER, hurry)  # the same, and the client has ended
        self.graced = self.loop.queue(GRACE, lambda client: client.on_grace(self.graced))  # a far end that was not told
        self.halved = self.loop.queue(HALF_LAST, lambda client: client.on_grace(self.halved))  # one that was told
        self.lingering = self.loop.queue(LINGER, linger)  # for the client to leave, when the far end has ended
        self.settling = self.loop.queue(SETTLE, farewell)  # for the last bytes of a client that is to be reset
        self.proving = self.loop.queue(PROOF, Jump.on_proven)  # for a tool to fail, if it is not there
        self.queues = (self.starting, self.accepting, self.hurried, self.graced, self.halved, self.lingering,
                       self.settling, self.proving)

    def parse_target(self, text: str) -> Target:
        """A listener's argument.  Raises ValueError."""
        try:
            targets = parse_argument(text)
        except Malformed as error:
            raise ValueError(str(error)) from None
        return self.target_of(text, targets)

    def target_of(self, text: str, targets: Sequence[KubeTarget]) -> Target:
        """A target with the pods behind it, which all listeners of that target share."""
        targets = [each._replace(context=each.context or self.settings.context) for each in targets]
        pods = self.pods.get(text)
        if pods is None:
            pods = self.pods[text] = Pods(self.alarms, self.apis.of(targets[0].context), targets)
            pods.on_out = lambda uid: self.links.close_spares({uid})
            if pods.feed.maker is not None:
                pods.feed.maker.heir = functools.partial(self.heir_of, pods.feed.maker)
        return Target(text, pods)

    def heir_of(self, maker: Maker) -> Maker | None:
        """Another one with the same pod, whose target is still used."""
        makers = (pods.feed.maker for pods in self.pods.values() if pods.feed.state != CLOSED)
        return next((each for each in makers if each is not None and each is not maker and each.pod == maker.pod), None)

    def add(self, listener: Listener, client: socket.socket, address: str) -> None:
        """Serve one client, as its target wants it."""
        self.serve = Exec if self.command else Jump if listener.target.pods.target.host else Client
        super().add(listener, client, address)
        self.serve = Client  # of which Jump and Exec are kinds: `fault` asks so

    def unlisten(self, address: str) -> None:
        """Close a listener and its clients; forget its pods, unless another one leads there."""
        target = self.listeners[address].target
        super().unlisten(address)
        if not any(each.target.pods is target.pods for each in self.listeners.values()):
            self.pods.pop(target.text, None)
            self.links.close_spares({choice.uid for choice in target.pods.choices})
            target.pods.close()

    def leave(self) -> None:
        """End, as soon as the pods that were made for jumps are removed, or it takes too long."""
        for pods in self.pods.values():
            pods.close()
        self.leave_by = self.leave_by or monotonic() + LEAVE
        if self.apis.is_changing and monotonic() < self.leave_by:
            self.leaving.set(monotonic() + LEAVE_LOOK)
        else:
            super().leave()

    def on_tick(self) -> None:
        """See whether this host has slept, or was stopped: what was known then, and each session, is in doubt."""
        now, before, self.ticked = clock(), self.ticked, clock()
        self.ticking.set(monotonic() + TICK)
        if now - before > TICK + AWAY:
            self.log("info", f"nothing was done for {now - before:.0f} s: all sessions are probed", event="away")
            for link in list(self.links.all):
                link.probe()
            for pods in self.pods.values():
                pods.doubt()

    def on_moved(self, api: Api) -> None:
        """The kubeconfig has another cluster, or user, in a context: pods, and what was made ahead, are of before."""
        self.links.forget(api)
        for pods in self.pods.values():
            if pods.feed.api is api:
                pods.forget()

    def stay(self, client: Client) -> None:
        """A client that has ended still gets an answer."""
        for queue in (self.graced, self.halved):
            if client in queue.due:
                queue.put(client)

    def closed(self, connection: Client) -> None:
        """A client is gone."""
        super().closed(connection)
        self.tell(connection, "debug", "end", "closed", up=str(connection.up), down=str(connection.down))

    def stop(self) -> None:
        """End everything, the clients too."""
        super().stop()
        for pods in self.pods.values():
            pods.close()
        self.links.close()
        self.apis.close()


# -- commands ----------------------------------------------------------------------------------

USAGE = """\
usage: sniroute_kubernetes.py port-forward TARGET --listen HOST:PORT [options]
       sniroute_kubernetes.py exec NAMESPACE/pod/NAME [options] -- COMMAND ...
       sniroute_kubernetes.py get TARGET [options]        what would be chosen now, and why
       sniroute_kubernetes.py forwarders [options]        told on stdin what to listen for, as sniroute does
       sniroute_kubernetes.py --version

A TARGET is NAMESPACE/svc/NAME:PORT[@CONTEXT]; instead of svc: deploy, sts, rs, ds, job, pod, or pods/LABEL=VALUE.
jump:NAMESPACE/svc/NAME/HOST:PORT leads from that pod to HOST:PORT, by socat, nc or bash in it.

options:
  --listen HOST:PORT             of port-forward: an address of this host, or localhost
  --container NAME               of exec; the pod's default by default
  --kubeconfig PATH[:PATH ...]   instead of KUBECONFIG and ~/.kube/config
  --context NAME                 of targets that name none; the current one by default
  --exec-path DIR[:DIR ...]      where credential plugins are looked for, beside PATH
  --ping SECONDS                 how often a session is asked whether it is there (15)
  --loglevel LEVEL               debug, info, warn, error (info)
  --log text|json                how the log looks (text)

Also read: HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE, SSL_CERT_DIR, TUNNEL_LOG_OUTPUT=json.
"""


def seconds(text: str) -> float:
    """`15`, or `15s`.  Raises ValueError."""
    if not re.fullmatch(r"[0-9]{1,4}(?:\.[0-9]{1,3})?s?", text, re.ASCII) or not float(text.rstrip("s")):
        raise ValueError(f"{printable(text, 40)!r} is no number of seconds above 0")
    return float(text.rstrip("s"))


def one_of(*words: str) -> Callable[[str], str]:
    """A reader of one of these words."""
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"{printable(text, 40)!r} is none of {', '.join(words)}")
        return text
    return read


OPTIONS: dict[str, Callable[[str], Any]] = {
    "kubeconfig": str, "context": str, "exec-path": str, "ping": seconds, "loglevel": one_of(*LEVELS),
    "log": one_of("text", "json")}


def parse_words(words: list[str], environ: Mapping[str, str], **more: Callable[[str], Any]
                ) -> tuple[list[str], Settings, dict[str, Any]]:
    """Arguments, settings, and the options in `more`.  Raises SettingsError.

    argparse would be a megabyte of each process.
    """
    arguments, wrong, given = [], [], {}
    readers = {**OPTIONS, **more}
    rest = iter(words)
    for word in rest:
        if word == "--":
            break
        if not word.startswith("-"):
            arguments.append(word)
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        if name not in readers:
            wrong.append(f"unknown option {printable(word, 80)!r}")
            continue
        if not equals:
            value = next(rest, None)
        try:
            if value is None:
                raise ValueError("it needs a value")
            given[name.replace("-", "_")] = readers[name](value)
        except ValueError as error:
            wrong.append(f"--{name}: {error}")
    arguments += rest
    if wrong:
        raise SettingsError(*wrong)
    settings = Settings(**{"log": "json" if environ.get("TUNNEL_LOG_OUTPUT") == "json" else "text",
                           **{name: value for name, value in given.items() if name in Settings._fields}})
    return arguments, settings, given


def make(settings: Settings, environ: Mapping[str, str]) -> Kubernetes:
    """A Kubernetes with its settings, which ends at SIGTERM and SIGINT.  Raises SettingsError."""
    raise_descriptor_limit()
    program = Kubernetes(Log(settings.loglevel, settings.log == "json"), settings, environ)
    program.leave_at_signals()
    return program


def targets_of(text: str) -> tuple[KubeTarget, ...]:
    """A target on the command line.  Raises SettingsError."""
    try:
        return parse_argument(text)
    except Malformed as error:
        raise SettingsError(str(error)) from None


def port_forward(words: list[str], environ: Mapping[str, str]) -> int:
    """`port-forward`."""
    arguments, settings, given = parse_words(words, environ, listen=parse_listen)
    if len(arguments) != 1 or "listen" not in given:
        raise SettingsError("port-forward takes one TARGET, and --listen HOST:PORT")
    targets = targets_of(arguments[0])
    program = make(settings, environ)
    target = program.target_of(arguments[0], targets)
    try:
        program.listen(target, given["listen"])
    except OSError as error:
        program.log("error", f"cannot listen on {show_address(given['listen'])}: "
                             f"{(error.strerror or str(error)).lower()}")
        return 1
    program.run()
    return 0


def execute(words: list[str], environ: Mapping[str, str]) -> int:
    """`exec`.  Returns the exit code of the command."""
    dashes = words.index("--") if "--" in words else len(words)
    arguments, settings, given = parse_words(words[:dashes], environ, container=str)
    command = tuple(words[dashes + 1:])
    if len(arguments) != 1 or not command:
        raise SettingsError("exec takes one pod, `--`, and the command")
    place, at, context = arguments[0].partition("@")
    try:
        target = parse_target(f"{place}/localhost:1{at}{context}", jump=True)  # with a host no port of a pod is needed
    except Malformed as error:
        why = str(error).partition("[@CONTEXT]: ")[2]  # what is before it speaks of localhost, which nobody has written
        raise SettingsError(f"{printable(arguments[0], 120)!r} is not NAMESPACE/pod/NAME[@CONTEXT]: {why}") from None
    try:
        if given.get("container"):
            target = with_option(target, "container", given["container"])
    except Malformed as error:
        raise SettingsError(str(error)) from None
    program = make(settings, environ)
    program.command = command
    failed = bridge(program, program.target_of(arguments[0], [target]))
    return program.code or failed


def get(words: list[str], environ: Mapping[str, str]) -> int:
    """`get`: what a client would get now, and what the pods do."""
    arguments, settings, _ = parse_words(words, environ)
    if len(arguments) != 1:
        raise SettingsError("get takes one TARGET")
    targets = targets_of(arguments[0])
    program = make(settings, environ)
    pods = program.target_of(arguments[0], [each._replace(create=None) for each in targets]).pods  # to look makes none
    answers: list[Choice | Failed] = []

    def told(answer: Choice | Failed) -> None:
        answers.append(answer)
        program.loop.stop()

    feed = pods.feed
    pods.ask(told, monotonic() + START)
    while not program.loop.stopping:
        program.loop.turn()
        program.log.flush()
        if feed.items is not None and not answers:  # all is known, and nobody is ready: a client would wait
            answers.append(none_ready(pods.target, feed.plan, feed.pods))
            program.loop.stop()
    seen = [f"  {pod}" for pod in feed.pods]
    program.stop()
    program.loop.close()
    answer = answers[0] if answers else Failed("timeout", "it was stopped")
    if targets[0].create is not None and isinstance(answer, Failed) and answer.reason == "unknown":
        print(f"{targets[0].said} is not there: it is made when a client comes")
        return 0
    if isinstance(answer, Failed):
        if settings.log == "json":  # for sniroute's `explain`
            program.log("error", pods.target.text, reason=answer.reason, error=str(answer))
        lines = [f"{REASONS.get(answer.reason, answer.reason)}: {printable(str(answer), 1000)}"]
    else:
        port = f" port {answer.port}" if answer.port else f" container {printable(answer.container, 80)}"
        lines = [f"pod {answer.namespace}/{answer.pod}{port}"]
    print("\n".join([*lines, *seen]))
    return 1 if isinstance(answer, Failed) else 0


def forwarders(words: list[str], environ: Mapping[str, str]) -> int:
    """`forwarders`: what varies comes by stdin."""
    arguments, settings, _ = parse_words(words, environ)
    if arguments:
        raise SettingsError(f"unexpected {printable(arguments[0])!r}")
    program = make(settings, environ)
    Control(program)
    program.run()
    return 0


COMMANDS = {"port-forward": port_forward, "exec": execute, "get": get, "forwarders": forwarders}


def main(argv: list[str] | None = None) -> int:
    """The command line, by default the process's.  Returns the exit code: 0 clean, 1 failed, 2 wrong settings."""
    open_standard_streams()
    words = sys.argv[1:] if argv is None else argv
    if words in (["--version"], ["-v"], ["version"]):
        print(f"sniroute_kubernetes {__version__} (Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION})")
        return 0
    if words and words[0] in COMMANDS and not {"-h", "--help"}.intersection(words[1:2]):
        try:
            return COMMANDS[words[0]](words[1:], os.environ)
        except SettingsError as error:
            for line in error.lines:
                print(f"sniroute_kubernetes: {line}", file=sys.stderr)
            return 2
    wants_help = bool({"-h", "--help"}.intersection(words[:2]))
    print(USAGE, end="", file=sys.stdout if wants_help else sys.stderr)
    return 0 if wants_help else 2


if __name__ == "__main__":
    sys.exit(main())
