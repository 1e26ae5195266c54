"""sniroute_launchers: tunnel programs as rows: how one is started, and what its last words mean.

    Launcher   program ---+--> find() --> the absolute path --+    nobody else may be able to change it
               argv     (hostname, port) -> words             +--> the process   (started by sniroute_processes)
               shared, carries    words for many hostnames    |
               environment        all that it gets -----------+
               reason   last output -> Reason(kind, text, final) --> the log, the refusal, a counter
               trial    (hostname) -> words of a run that dials once and ends (`explain`)

Two rows are here: `cloudflared access tcp`, a process for each hostname, and our own carrier
(sniroute_carrier.py), a process for up to CARRIES hostnames.  Options bring their own: sniroute_commands,
sniroute_clusters.

The carrier is an option: any of its files may be missing.  The import system is asked whether they are there, so the
answer is the same in a folder and in a .pyz file.  The carrier is started by a short program text that imports it
from `place()`: the folder, or the .pyz file.

Threads: none.  `is_there`, `obstacle` and `find` look at the disk; nothing else does I/O.

Seams: I want to ...
    run another tunnel program      a function like `cloudflared_launcher`, its row in `tunnel_launchers` of
                                    sniroute_settings, and its name in SCHEMES of sniroute_targets
    understand a new last line      a row in CLOUDFLARED_REASONS or CARRIER_REASONS
    let a variable through          TUNNEL_ENVIRONMENT

This room imports sniroute_host (`changed_by_others`, `interpreter_of`, PATHS_MAX), sniroute_names (`printable`,
`is_here`, OPTIONS, HEADER_VALUE) and the standard library.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from typing import Callable, Mapping, NamedTuple

from sniroute_host import PATHS_MAX, changed_by_others, interpreter_of
from sniroute_names import HEADER_VALUE, OPTIONS, is_here, printable

__version__ = "0.1.0"

CARRIES = 16  # hostnames in one carrier: they share its 20 MB, its one core, and its end
KEY_MAX, KEY_SHOWN = 253, 230  # characters of a key for people: as long as a host name; of it, before its mark
WORDS_MAX = 200  # characters of a program's last words: one line of a log

# -- words into reasons ------------------------------------------------------------------------


class TunnelError(Exception):
    """A tunnel that cannot be had now.

    `kind` is one word for counters: `failed`, `denied` (Access wants another identity), `unknown` (no
    such name), `timeout`, `limit`, `budget`, `stopping`, or one of a cluster's (sniroute_clusters).
    The message is for people: what happened, and what to do.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Reason(NamedTuple):
    """Why a tunnel could not be had, or why a client was not served."""

    kind: str = "failed"  # of a TunnelError
    text: str = ""  # for people; '' where nothing is known
    final: bool = False  # another try would end the same way


class Variable(NamedTuple):
    """A variable that a route gives to its program.  The value may be a secret: for people it is the name alone."""

    name: str
    value: str | None = None  # None: the router's own, where it has one

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__


class Secret(Variable):
    """One that no mark of it may be shown of, either: a key that a person may have chosen can be guessed by it."""


class TunnelKey(NamedTuple):
    """What tells one tunnel from another."""

    launcher: str  # the scheme of its program's row
    hostname: str  # or the words of a command, or what is in a cluster
    identified: bool = True  # it is given the router's Access token, if there is one
    variables: tuple[Variable, ...] = ()  # of a command, from its route; or the key of a server

    def __str__(self) -> str:
        text = f"{self.launcher}:{self.hostname.removeprefix(self.launcher + ':')}"  # what `jump:` is told begins so
        text = text if self.identified else f"anonymous {text}"
        marked = [each for each in self.variables if not isinstance(each, Secret)]
        if not marked and len(text) <= KEY_MAX:
            return text
        # A mark tells it from others.  Of the router's own variables it has the names alone: the values may be secrets.
        mark = zlib.crc32("\0".join((self.hostname, *(f"{name}={value}" for name, value in marked))).encode())
        return f"{text if len(text) <= KEY_SHOWN else text[:KEY_SHOWN] + '...'} [{mark:08x}]"


def last_line(tail: bytes) -> tuple[str, dict]:
    """The last line of an output that is not blank; and its fields where it is a JSON object, else {}."""
    for line in reversed(tail.decode("utf-8", "replace").split("\n")):
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                fields = {}
            return line.strip(), fields if isinstance(fields, dict) else {}
    return "", {}


def last_words(tail: bytes) -> str:
    """The last line of an output that is not blank, as one printable line of at most WORDS_MAX characters.

    A JSON line (cloudflared with TUNNEL_LOG_OUTPUT=json) is reduced to its message and error.
    """
    line, fields = last_line(tail)
    return printable(": ".join(str(fields[key]) for key in ("message", "error") if key in fields) or line, WORDS_MAX)


TAKEN = "address already in use"  # EADDRINUSE, in the words of cloudflared and of the carrier

# What cloudflared's last line contains, the kind of TunnelError, and what it means.  Its texts change between
# versions: a line that is not here is shown as it came.
LOGIN_WANTED = "Access wants a login: give the router a service token"
CLOUDFLARED_REASONS = (
    ("websocket: bad handshake", "failed",
     "the edge refused it: access denied, no such tunnel, or its connector is down"),
    ("failed to verify certificate", "failed", "the edge's certificate is not trusted"),
    ("no such host", "unknown", "the name does not resolve"),
    ("network is unreachable", "failed", "the network is unreachable"),
    ("connection refused", "failed", "the edge refused the connection"),
    ("connection reset by peer", "failed", "the edge reset the connection"),
    ("Leave cloudflared running to download", "denied", LOGIN_WANTED),  # the end of its prompt
    ("If the browser failed to open", "denied", LOGIN_WANTED),  # its prompt after it has opened a browser
    ("Waiting for login", "denied", LOGIN_WANTED),
    ("already waiting for authentication", "denied", LOGIN_WANTED),
    (TAKEN, "failed", "its local port was taken"),
)


def cloudflared_reason(tail: bytes) -> Reason:
    """The reason in cloudflared's last output.  Never final: it does not say for which client."""
    words = last_words(tail)
    if "reason" in last_line(tail)[1]:  # --cloudflared names our carrier, whose lines have this field
        return carrier_reason(tail)._replace(final=False)
    for text, kind, meaning in CLOUDFLARED_REASONS:
        if text in words:
            return Reason(kind, f"{meaning} ({words})")
    return Reason(text=words)


# The carrier's reasons: (kind, final).  A reason that is not here is ("failed", False).
CARRIER_REASONS = {
    "name": ("unknown", True),
    "not_found": ("unknown", True),
    "login": ("denied", True),
    "denied": ("denied", True),
    "certificate": ("failed", True),
}


def carrier_reason(tail: bytes) -> Reason:
    """The reason in the carrier's last line."""
    kind, final = CARRIER_REASONS.get(str(last_line(tail)[1].get("reason")), ("failed", False))
    return Reason(kind, last_words(tail), final)


# -- the row -----------------------------------------------------------------------------------


class Launcher(NamedTuple):
    """One kind of tunnel program."""

    program: str  # a path, or a name that is looked up on PATH at each start
    argv: Callable[[str, int], list[str]]  # (hostname, port) -> the words after the program, for one tunnel
    environment: Mapping[str, str]  # all that the process gets, and perhaps HOME
    reason: Callable[[bytes], Reason]  # the process's last output, or one line of it -> the reason
    not_there: str  # the sentence for people where there is no such program
    rooms: tuple[str, ...] = ()  # files of ours that it runs, by their module names; each may be missing, too
    carries: int = 1  # tunnels in one process; more than one: see "Shared processes" in sniroute_processes, ...
    shared: tuple[str, ...] = ()  # ... and these are the words after the program
    trial: Callable[[str], list[str]] | None = None  # hostname -> words for a run that dials once and ends
    home: bool = True  # it gets a HOME: a private folder
    made: Callable[[TunnelKey], Launcher] | None = None  # where the key says which program: the row for that key
    told: Callable[[TunnelKey], str] = lambda key: key.hostname  # what a shared process is told to listen for
    stands: bool = False  # its tunnels are kept up before a client wants one: "Standing" in sniroute_tunnels

    def row(self, key: TunnelKey) -> Launcher:
        """The row for one tunnel."""
        return self if self.made is None else self.made(key)

    def environment_for(self, identified: bool) -> dict[str, str]:
        """The environment of a process, with or without what identifies the router to Access."""
        return {name: value for name, value in self.environment.items() if identified or name not in TUNNEL_IDENTITY}

    def is_there(self) -> bool:
        """Whether there is such a program, and all of it.  `obstacle` says whether it may be run."""
        return shutil.which(self.program) is not None and all(map(is_here, self.rooms))

    @property
    def obstacle(self) -> str:
        """Why it cannot be run now, as a sentence for people; '' where it can."""
        try:
            self.find()
        except TunnelError as error:
            return str(error)
        return ""

    def find(self) -> str:
        """The program's absolute path.  Raises TunnelError where it cannot be run, or where others may change it.

        The first one on PATH is meant.  Where others may change that, it is refused: to take the next one instead
        would hide it.  Our own files and Python are not looked at: this process runs them already.
        """
        files = [f"{room}.py" for room in self.rooms if not is_here(room)]
        if files:
            are, them = ("is", "it") if len(files) == 1 else ("are", "them")
            raise TunnelError("failed", f"{', '.join(files)} {are} not beside sniroute.py: copy {them} there")
        found = shutil.which(self.program)
        if found is None:
            raise TunnelError("failed", self.not_there)
        try:
            # abspath takes `dir/..` away as text, though `dir` may be a symlink.
            path = os.path.join(os.getcwd(), found) if ".." in found.split("/") else os.path.abspath(found)
            fault = "" if self.rooms else changed_by_others(path)
            if not self.rooms and not fault and (interpreter := interpreter_of(path)):
                fault = changed_by_others(interpreter)
        except OSError as error:  # it is gone meanwhile, or our own folder is
            raise TunnelError("failed", f"{found}: {error.strerror}") from None
        if fault:
            raise TunnelError("failed", printable(f"{path} is not run, since {fault}", PATHS_MAX))
        return path


# The router's identity for Cloudflare Access.  Only the carrier reads CF_ACCESS_TOKEN.
SERVICE_TOKEN = "TUNNEL_SERVICE_TOKEN_ID", "TUNNEL_SERVICE_TOKEN_SECRET"
TUNNEL_IDENTITY = frozenset((*SERVICE_TOKEN, "CF_ACCESS_TOKEN"))
# All that a tunnel program may inherit: the identity, the way out, the trust store.  Any other TUNNEL_*
# variable would silently change what it does, and without PATH cloudflared finds no browser to open.
TUNNEL_ENVIRONMENT = TUNNEL_IDENTITY | {
    "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "TZ", "LANG"}


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a tunnel program, built from nothing.

    White space at the ends of a value goes: a secret that was read from a file brings a newline, and no header can
    have that.
    """
    return {**{name: environ[name].strip() for name in TUNNEL_ENVIRONMENT if name in environ},
            "TUNNEL_LOG_OUTPUT": "json"}


def identity_faults(environ: Mapping[str, str]) -> list[str]:
    """The variables of the identity whose value no header may have, a line each, without the value: it is a secret."""
    return [f"{name}: has characters that no header may have: line breaks, other control characters, or not ASCII"
            for name, value in sorted(inherited(environ).items())
            if name in TUNNEL_IDENTITY and not HEADER_VALUE.fullmatch(value)]


# -- cloudflared -------------------------------------------------------------------------------


def cloudflared_argv(hostname: str, port: int) -> list[str]:
    """The words after the program.  `hostname` has passed the name rules, so it cannot be an option."""
    return ["access", "tcp", "--hostname", hostname, "--url", f"127.0.0.1:{port}", "--loglevel", "info"]


def cloudflared_launcher(program: str, environ: Mapping[str, str]) -> Launcher:
    """The row for `cloudflared access tcp`."""
    return Launcher(program, cloudflared_argv, inherited(environ), cloudflared_reason,
                    f"{program} is not there: install it, or name it with --cloudflared")


# -- the carrier -------------------------------------------------------------------------------

CARRIER = "sniroute_carrier"
# A program of ours is imported instead of run as a script, so that Python compiles it only once and finds it in a
# .pyz file, too.  The options -I and -S keep out what a user or a site has installed.
OUR_CODE = ("import sys; sys.path.insert(0, sys.argv[1]); sys.argv[:2] = ['{0}']; "
            "import {0}; sys.exit({0}.main())")


def place() -> str:
    """Where our files are, as an absolute entry for sys.path: their folder, or the .pyz file that holds them.

    In a zip file, __file__ is the path of that file followed by a name inside it (zipimport).
    """
    return os.path.dirname(os.path.abspath(__file__))


def our_words(room: str, *words: str) -> list[str]:
    """The words after Python that run a program of ours from `place()`."""
    return ["-I", "-S", "-c", OUR_CODE.format(room), place(), *words]


def words_by_hand(room: str, *words: str) -> list[str]:
    """The same for people, as `explain` prints them: a file is named where it is one."""
    script = os.path.join(place(), f"{room}.py")
    return [script, *words] if os.path.isfile(script) else our_words(room, *words)


def carrier_argv(hostname: str, port: int) -> list[str]:
    """The words after Python for one tunnel."""
    return words_by_hand(CARRIER, *cloudflared_argv(hostname, port))


def carrier_launcher(environ: Mapping[str, str]) -> Launcher:
    """The row for sniroute_carrier.py, which does what cloudflared does."""
    return Launcher(sys.executable, carrier_argv, inherited(environ), carrier_reason,
                    f"{sys.executable} is not there", OPTIONS["carrier"], CARRIES,
                    tuple(our_words(CARRIER, "forwarders")),
                    lambda hostname: our_words(CARRIER, "access", "tcp", "--hostname", hostname), home=False)
