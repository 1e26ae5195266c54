"""sniroute_credentials: who we are for an API server: tokens, certificates, plugins; and the kubeconfig as it is now.

    ask(done) ---- known, and looked at lately -----------------------------------------> done(Access)
       |                                                                                      ^
       +---- Finding: a thread `kubeconfig` ---- has any file changed? ---- a token, a --------+
             reads files                         read them again            certificate        |
                                                       |                                       |
                                                       +---- a plugin: a thread `plugin-<n>` --+    or done(Failed)

    refused(access, done)    the API server did not take that one (401): the same way, but token files are read and
                             plugins are run though nothing seems to have changed; done(None) where nothing else came

An Identity is one context of the kubeconfig.  Whoever asks while it looks waits for the same answer (single flight).
An Access is what it has found: where to connect, what TLS needs, and the lines of a request that prove who we are.
Files are looked at once in LOOK_EVERY, since a kubeconfig that was written anew is to be used by the next client.

A plugin is the program that `exec` of a kubeconfig names (kubernetes.io, "Client Authentication (v1)").  It runs in a
process group of its own, without stdin.  What it prints is a secret; a line of its stderr is the reason where it
fails, without what looks like a secret.  A plugin that another user may change is not run, nor one of a kubeconfig
that another user may change.

Threads: the loop's, but for `read_files` (thread `kubeconfig`, one for each identity at a time) and `run_plugin`
(threads `plugin-<n>`, PLUGINS at a time, beside those that are SLOW).  Each gets values and returns values; the result
comes by `Loop.call`.  A thread kills its own plugin; `Running.kill` is for any thread.

Seams: I want to ...
    find plugins elsewhere          USUAL_FOLDERS
    trust otherwise                 `make_tls`
    hide another kind of secret     `without_secrets`
    another kind of proof           a field of User (sniroute_kubeconfig), and `access_of`

This room imports sniroute_layers (Place), sniroute_kubeconfig, sniroute_dial (Failed), sniroute_loop, sniroute_host
(`stamp`, `changed_by_others`) and sniroute_names.
"""

from __future__ import annotations

import collections
import errno
import functools
import os
import re
import selectors
import signal
import ssl
import subprocess
import tempfile
import threading
import time
from typing import Any, Callable, Mapping, NamedTuple

from sniroute_dial import Failed
from sniroute_host import Stamp, changed_by_others, interpreter_of, stamp
from sniroute_kubeconfig import (CREDENTIAL_MAX, Cluster, Context, Credential, KubeconfigError, Plugin, Secret, User,
                                 choose_context, plugin_info, read_credential, read_token)
from sniroute_layers import Place
from sniroute_loop import Loop, monotonic, owner_of
from sniroute_names import printable

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
LOOK_EVERY = 1.0  # files are looked at so often, where anybody asks; a failure is told so long without another look
TOKEN_FOR = 60.0  # a token file is read again though it seems to be the same: as client-go does it
REFUSED_EVERY = 5.0  # what was refused is looked for anew so often: else each client of a wrong token runs the plugin
EARLY = 10.0  # a plugin's answer is used until so long before it expires: the request takes time, and clocks differ
PLUGIN_TIME = 60.0  # of one run: some open a browser, and somebody logs in there
PLUGINS = 2  # runs at a time: each may be a Python or a JVM
SLOW = 3.0  # a run that has taken longer does not count: one that hangs, or waits for a login, stops no other cluster
RUNS_MAX = 16  # with those: a thread and a process each
TICK = 0.1  # a plugin has ended, and a child of it holds its pipes: noticed so late
SOON = 0.002  # a plugin has closed its pipes: it ends next
LEFT = 1.0  # for what a plugin that has ended has left in its pipes: a child of it may fill them for ever
SETTLE = 0.1  # a kubeconfig that is being written is read again after so long: kubectl empties it first
FILE_MAX = 16 << 20  # bytes of a file: a kubeconfig of a thousand clusters has 5 MiB
STDERR_MAX = 4096  # bytes that are kept of a plugin's stderr: the last line is in there
WORDS_MAX = 300  # characters of a plugin's last line
SECRET_MIN = 6  # characters of a variable's value that are hidden in a plugin's last line: a shorter one is a word

# Where plugins are beside PATH and --exec-path: a service manager's PATH has none of these.  `~` is the home.
USUAL_FOLDERS = ("/usr/local/bin", "/opt/homebrew/bin", "/snap/bin", "~/.local/bin", "~/bin", "~/google-cloud-sdk/bin",
                 "/usr/lib/google-cloud-sdk/bin", "/opt/google-cloud-sdk/bin", "~/.krew/bin", "~/go/bin",
                 "~/.azure-kubelogin", "/home/linuxbrew/.linuxbrew/bin")
# What a line may have of a secret: a password in a URL, a JWT, base64 or hexadecimal digits; what is named so.
# `token: invalid_grant` is none: a token without a digit is a word.
SECRETS = (
    re.compile(r"(?<=://)[^/@\s]+(?=@)"),
    re.compile(r"eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)*"),
    re.compile(r"(?=[A-Za-z+/_=-]*[0-9])[A-Za-z0-9+/_=-]{32,}"),
    re.compile(r"(?i:(?<=password)|(?<=passwd)|(?<=secret)|(?<=passcode))[\"']?\s*[:=]\s*[^\s,;]+"),
    re.compile(r"(?i:(?<=token)|(?<=bearer)|(?<=key)|(?<=code))[\"']?(?:\s*[:=]\s*|\s+)(?=[^\s,;]*[0-9])[^\s,;]{6,}"),
)

COMPLAINT = re.compile(r"error|fail|fatal|unable|denied|invalid|expired", re.IGNORECASE)
GO_PREFIX = re.compile(r"[IWEF][0-9]{4} [0-9:.]+ +[0-9]+ [^ ]+:[0-9]+\] ")  # of a log line of Go's klog

# The phases of looking.
READING, PLUGIN = "reading the kubeconfig", "waiting for the credential plugin"


# -- results -----------------------------------------------------------------------------------


class Access:
    """What a request to an API server needs.  It never changes; what is new is another one."""

    __slots__ = ("context", "place", "proof")

    def __init__(self, context: Context, place: Place, proof: bytes):
        self.context = context
        self.place = place  # the same object as long as a connection of before may be used
        self.proof = proof  # the lines of a head: Authorization, Impersonate-...; a secret

    def __repr__(self) -> str:
        return f"<access to {self.place} as {printable(self.context.user.name)}>"


def failed_by(error: KubeconfigError) -> Failed:
    """The reason for programs."""
    return Failed({"file": "config"}.get(error.kind, error.kind), str(error))


# -- TLS ---------------------------------------------------------------------------------------


def make_tls(cluster: Cluster | None, certificate: bytes = b"", key: Secret | None = None) -> ssl.SSLContext:
    """What TLS to a cluster trusts and shows; None: that of a proxy.  Raises KubeconfigError."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])  # upgrades are there only
    made.options |= ssl.OP_NO_RENEGOTIATION  # in the middle of it nothing could be sent
    if cluster is not None and not cluster.verifies:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    elif cluster is not None and cluster.authorities:
        try:
            made.load_verify_locations(cadata=cluster.authorities.decode("ascii", "replace"))
        except ssl.SSLError as error:
            raise KubeconfigError(f"the certificate-authority of cluster {printable(cluster.name)!r} cannot be used: "
                                  f"{error.reason or error}") from None
    else:
        made.load_default_certs()
    if certificate and key is not None:
        load_certificate(made, certificate, key)
    return made


def load_certificate(made: ssl.SSLContext, certificate: bytes, key: Secret) -> None:
    """Show this certificate.  Raises KubeconfigError.

    OpenSSL wants a file.  It is one without a name where the system has those, else one that nobody else may read,
    and that is gone when this returns.
    """
    both = certificate.rstrip() + b"\n" + key.value.rstrip() + b"\n"
    path = ""
    try:
        if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
            fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
            named = f"/proc/self/fd/{fd}"
        else:
            fd, named = tempfile.mkstemp()
            path = named
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(both)
            made.load_cert_chain(named, password=lambda: "")  # never ask at a terminal
        finally:
            os.close(fd)
            if path:
                os.unlink(path)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        why = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        raise KubeconfigError("the client certificate and its key cannot be used: "
                              f"{str(why).lower().replace('_', ' ')}") from None


# -- files -------------------------------------------------------------------------------------


def read_path(path: str) -> bytes:
    """What is in a file.  Raises OSError."""
    with open(path, "rb") as file:
        data = file.read(FILE_MAX + 1)
    if len(data) > FILE_MAX:
        raise OSError(errno.EFBIG, f"it has more than {FILE_MAX >> 20} MiB")
    return data


class Settings(NamedTuple):
    """How contexts and plugins are found."""

    paths: tuple[str, ...]  # of kubeconfigs
    environ: Mapping[str, str]
    exec_path: tuple[str, ...]


class Files(NamedTuple):
    """What was read, and the state of the files then."""

    context: Context
    stamps: tuple[tuple[str, Stamp | int], ...]
    tls: ssl.SSLContext | None  # with the certificate of the file; None: plain HTTP
    proxy_tls: ssl.SSLContext | None
    token: Secret | None  # of a token file
    token_stamp: Stamp | int
    token_read: float  # clock time


def read_context(settings: Settings, name: str) -> tuple[Context, tuple[tuple[str, Stamp | int], ...]]:
    """The context, and the files that it was made of, as they were.  Raises KubeconfigError.  Any thread."""
    stamps: dict[str, Stamp | int] = {path: stamp(path) for path in settings.paths}

    def read(path: str) -> bytes:
        stamps.setdefault(path, stamp(path))  # before it is read: a change is not missed
        return read_path(path)

    context = choose_context(name, settings.paths, settings.environ, read)
    return context, tuple((path, stamps.get(path, 0)) for path in context.files)


def needs_of_tls(context: Context) -> tuple[Any, ...]:
    """All of a context that its contexts of TLS are made of."""
    return context.cluster, context.user.certificate, context.user.key


def read_files(settings: Settings, name: str, before: Files | None, again: bool) -> Files:
    """The files of a context; `before` itself where nothing has changed.  Raises KubeconfigError.  Any thread.

    `again`: read a token file though it seems to be the same.
    """
    now = monotonic()
    if before is None or any(stamp(path) != known for path, known in before.stamps):
        try:
            context, stamps = read_context(settings, name)
        except KubeconfigError:
            if before is None:
                raise
            time.sleep(SETTLE)
            context, stamps = read_context(settings, name)
        if before is not None and needs_of_tls(before.context) == needs_of_tls(context):
            tls, proxy_tls = before.tls, before.proxy_tls  # so that connections of before may be used
        else:
            cluster, user, proxy = context.cluster, context.user, context.cluster.proxy
            tls = make_tls(cluster, user.certificate, user.key) if cluster.is_tls else None
            proxy_tls = make_tls(None) if proxy is not None and proxy.scheme == "https" else None
        before = Files(context, stamps, tls, proxy_tls, None, 0, 0.0)
    path = before.context.user.token_file
    if path:
        state = stamp(path)
        if again or before.token is None or state != before.token_stamp or now - before.token_read >= TOKEN_FOR:
            before = before._replace(token=read_token(path, read_path), token_stamp=state, token_read=now)
    return before


# -- plugins -----------------------------------------------------------------------------------


def folders_of(settings: Settings) -> list[str]:
    """Where programs are looked for, in this order; each absolute."""
    home = settings.environ.get("HOME", "")
    usual = [home + folder[1:] if folder.startswith("~") else folder for folder in USUAL_FOLDERS
             if home or not folder.startswith("~")]
    found = [*settings.environ.get("PATH", os.defpath).split(os.pathsep), *settings.exec_path, *usual]
    return [folder for folder in dict.fromkeys(found) if folder.startswith("/")]


def find_plugin(plugin: Plugin, settings: Settings) -> str:
    """The path of its program.  Raises KubeconfigError: it is not there, or others may change it or a kubeconfig."""
    shown = printable(plugin.command)

    def fault(message: str) -> KubeconfigError:
        return KubeconfigError(f"the plugin {shown} {message}", "plugin")

    places = [plugin.command] if "/" in plugin.command else \
        [os.path.join(folder, plugin.command) for folder in folders_of(settings)]
    path = next((place for place in places if os.path.isfile(place) and os.access(place, os.X_OK)), None)
    if path is None:
        hint = f": {plugin.hint}" if plugin.hint else ""
        where = "" if "/" in plugin.command else ", neither on PATH nor in --exec-path and the usual folders"
        raise fault(f"is not there{where}{hint}")
    try:
        interpreter = interpreter_of(path)
        why = changed_by_others(path) or (changed_by_others(interpreter) if interpreter else "")
    except OSError as error:
        raise fault(f"cannot be run: {error.strerror}") from None
    if not why:
        why = next(filter(None, map(kubeconfig_fault, settings.paths)), "")
    if why:
        raise fault(f"is not run: {printable(why, 1000)}")
    return path


def kubeconfig_fault(path: str) -> str:
    """Why another user may change a kubeconfig, as `changed_by_others` says it: it may name any program as a plugin."""
    try:
        return changed_by_others(path)
    except OSError:  # it is not there
        return ""


class Running:
    """A run of a plugin.  `kill` is for any thread; the rest for the thread that runs it."""

    __slots__ = ("lock", "process", "is_over")

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards what follows: no group is killed after its leader was waited for
        self.process: subprocess.Popen[bytes] | None = None
        self.is_over = False  # killed, or ended

    def kill(self) -> None:
        """End it, and all that it has started."""
        with self.lock:
            if self.process is not None and not self.is_over:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.is_over = True

    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        with self.lock:
            code = self.process.poll()
            self.is_over |= code is not None
            return code


def run_plugin(running: Running, plugin: Plugin, cluster: Cluster, settings: Settings, deadline: float) -> Credential:
    """Run it to its end.  Raises KubeconfigError, `kind="plugin"`.  A thread of its own.

    `deadline`: the clock time at which its process group is killed.
    """
    path = find_plugin(plugin, settings)
    environ = {**settings.environ, "PATH": os.pathsep.join(folders_of(settings)), **dict(plugin.env),
               "KUBERNETES_EXEC_INFO": plugin_info(plugin, cluster)}

    def fault(message: str) -> KubeconfigError:
        return KubeconfigError(f"the plugin {printable(plugin.command)} {message}", "plugin")

    try:
        with running.lock:
            if running.is_over:
                raise fault("is not run any more: the program ends")
            running.process = process = subprocess.Popen(
                [path, *plugin.args], env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise fault(f"cannot be run: {error.strerror}") from None
    with process.stdout, process.stderr:
        try:
            printed, said, in_time = hear(running, deadline)
        finally:
            if process.returncode is None:
                running.kill()
                process.wait()
    words = last_line(said, plugin)
    if not in_time:
        raise fault(f"had not ended after {PLUGIN_TIME:g} s, and was killed{words}")
    if len(printed) > CREDENTIAL_MAX:
        raise fault(f"printed more than {CREDENTIAL_MAX >> 20} MiB{words}")
    if process.returncode:
        code = process.returncode
        raise fault((f"ended with {code}" if code > 0 else f"was killed by signal {-code}") + words)
    return read_credential(plugin, printed)


def hear(running: Running, deadline: float) -> tuple[bytes, bytes, bool]:
    """What a plugin prints until it ends: stdout, the end of its stderr, and whether it has ended in time.

    It ends when its process does, or with an answer that is too long.  A child that it has left behind may hold its
    pipes for ever.
    """
    process = running.process
    printed, said = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        for pipe, into in ((process.stdout, printed), (process.stderr, said)):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, into)
        while True:
            has_ended = running.ended() is not None  # asked first: what it has said is in the pipes by then
            deadline = min(deadline, monotonic() + LEFT) if has_ended else deadline
            if monotonic() >= deadline:
                return bytes(printed), bytes(said), has_ended
            events = selector.select(0 if has_ended else TICK if selector.get_map() else SOON)
            for key, _ in events:
                data = os.read(key.fd, 1 << 16)
                key.data.extend(data)
                if not data:
                    selector.unregister(key.fileobj)
            del said[:-STDERR_MAX]
            if len(printed) > CREDENTIAL_MAX or has_ended and not events:
                return bytes(printed), bytes(said), True


def last_line(said: bytes, plugin: Plugin) -> str:
    """The last line of a plugin's stderr that says what is wrong, else the last one; as the end of a sentence.

    That of Google ends with advice of ten lines, and a bracket.
    """
    lines = [GO_PREFIX.sub("", line.strip()) for line in said.decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if any(map(str.isalpha, line))]
    if not lines:
        return ", and said nothing"
    line = next(filter(COMPLAINT.search, reversed(lines)), lines[-1])
    return f": {printable(without_secrets(line, plugin), WORDS_MAX)}"


def without_secrets(line: str, plugin: Plugin) -> str:
    """A line without what may be a secret: values of the plugin's variables, what is named so, what looks so."""
    for value in sorted((value for _, value in plugin.env if len(value) >= SECRET_MIN), key=len, reverse=True):
        line = line.replace(value, "***")
    for pattern in SECRETS:
        line = pattern.sub("***", line)
    return line


class Plugins:
    """The runs of plugins of one loop: PLUGINS at a time beside those that are SLOW; the others wait.  Loop only."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.free = set(range(1, RUNS_MAX + 1))  # numbers of threads
        self.fast = loop.queue(SLOW, lambda running: self._next())  # those that count
        self.waiting: collections.deque[tuple[Callable[[Running], Any], Callable[[Any], None]]] = collections.deque()
        self.running: set[Running] = set()

    def run(self, work: Callable[[Running], Any], done: Callable[[Any], None]) -> None:
        """Call `work` in a thread, and then `done` in the loop with what it has returned, or with its Failed."""
        self.waiting.append((work, done))  # one for each identity at most
        self._next()

    def close(self) -> None:
        """Kill all that run, and start no more."""
        self.waiting.clear()
        for running in self.running:
            running.kill()

    def _next(self) -> None:
        while self.free and self.waiting and len(self.fast.due) < PLUGINS:
            number = min(self.free)
            work, done = self.waiting.popleft()
            running = Running()

            def ended(result: Any, number: int = number, running: Running = running,
                      done: Callable[[Any], None] = done) -> None:
                self.free.add(number)
                self.running.discard(running)
                self.fast.drop(running)
                self._next()
                done(result)

            self.free.discard(number)
            self.running.add(running)
            self.fast.put(running)
            in_thread(self.loop, f"plugin-{number}", functools.partial(work, running), ended)


def in_thread(loop: Loop, name: str, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
    """Do what may wait in a thread; then call `done` in the loop, with what came of it, or with Failed."""
    def run() -> None:
        try:
            result = work()
        except KubeconfigError as error:
            result = failed_by(error)
        except Exception as error:  # whoever waits hears of it; what it says may have a secret
            result = Failed("config", f"{name}: {type(error).__name__}")
        loop.call(functools.partial(done, result))

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
    except RuntimeError as error:  # there are too many threads
        loop.call(functools.partial(done, Failed("config", str(error))))


# -- an identity -------------------------------------------------------------------------------


class Identity:
    """A context: who we are there, looked for when it is asked for.  All methods run in the loop.

    Args:
        name: of the context; "" for the current one.
        wall: the time in seconds since 1970, for what expires.
    """

    def __init__(self, loop: Loop, plugins: Plugins, settings: Settings, name: str,
                 wall: Callable[[], float] = time.time):
        self.loop = loop
        self.plugins = plugins
        self.settings = settings
        self.name = name
        self.wall = wall
        self.files: Files | None = None
        self.credential: Credential | None = None  # of the plugin
        self.plugin_tls: ssl.SSLContext | None = None  # with the certificate of the plugin
        self.found: Access | Failed | None = None
        self.looked = 0.0  # clock time
        self.forced = float("-inf")  # clock time at which a refused one was last looked for anew
        self.phase = ""  # what it waits for; "": nothing
        self.again = False  # this look is one for something else than the server has refused
        self.waiting: list[Callable[[Access | Failed], None]] = []

    def ask(self, done: Callable[[Access | Failed], None]) -> None:
        """`done` is called with what there is; perhaps before this returns."""
        if not self.phase and self.found is not None and monotonic() - self.looked < LOOK_EVERY \
                and (isinstance(self.found, Failed) or not self._has_expired()):
            done(self.found)
            return
        self.waiting.append(done)
        if not self.phase:
            self._look(False)

    def refused(self, access: Access, done: Callable[[Access | Failed | None], None]) -> None:
        """The API server did not take `access`: `done` is called with another one, or None where there is none."""
        def found(result: Access | Failed) -> None:
            is_other = isinstance(result, Failed) or (result.proof, result.place) != (access.proof, access.place)
            done(result if is_other else None)

        if self.phase:  # a look of another kind may find what was refused
            self.waiting.append(found if self.again else lambda _: self.refused(access, done))
        elif self.found is not access:
            self.ask(found)
        elif monotonic() - self.forced < REFUSED_EVERY:
            done(None)
        else:
            self.waiting.append(found)
            self._look(True)

    def _has_expired(self) -> bool:
        """Whether the plugin's answer is too old."""
        expires = self.credential.expires if self.credential else None
        return expires is not None and self.wall() >= expires - EARLY

    def _look(self, again: bool) -> None:
        self.phase = READING
        self.again = again
        if again:
            self.forced = monotonic()
        in_thread(self.loop, "kubeconfig", functools.partial(
            read_files, self.settings, self.name, self.files, again), self._read)

    def _read(self, files: Files | Failed) -> None:
        """The files were read."""
        if isinstance(files, Failed):
            self._tell(files)
            return
        before, self.files = self.files, files
        user = files.context.user
        plugin = user.plugin
        if before is not None and (before.context.cluster, before.context.user.plugin) != (
                files.context.cluster, plugin):
            self.credential = self.plugin_tls = None
        if plugin is None or proof_of(user, files.token) is not None:
            self._tell(None)
        elif self.credential is not None and not self.again and not self._has_expired():
            self._tell(None)
        else:
            self.phase = PLUGIN
            self.plugins.run(functools.partial(self._run, plugin, files.context.cluster, self.credential,
                                               self.plugin_tls), self._ran)

    def _run(self, plugin: Plugin, cluster: Cluster, before: Credential | None, tls: ssl.SSLContext | None,
             running: Running) -> tuple[Credential, ssl.SSLContext | None]:
        """Run the plugin.  Its own thread, which changes nothing here."""
        credential = run_plugin(running, plugin, cluster, self.settings, monotonic() + PLUGIN_TIME)
        if not credential.certificate or not cluster.is_tls:
            return credential, None
        if before is not None and (before.certificate, before.key) == (credential.certificate, credential.key):
            return credential, tls  # the same: its connections may be used
        return credential, make_tls(cluster, credential.certificate, credential.key)

    def _ran(self, result: tuple[Credential, ssl.SSLContext | None] | Failed) -> None:
        if isinstance(result, Failed):
            self._tell(result if result.reason == "plugin" else Failed("plugin", str(result)))
            return
        self.credential, self.plugin_tls = result
        self._tell(None)

    def _tell(self, failed: Failed | None) -> None:
        """Tell all who wait."""
        before = self.found
        self.found = failed or access_of(self.files, self.credential, self.plugin_tls,
                                         before if isinstance(before, Access) else None)
        self.looked = monotonic()
        self.phase = ""
        waiting, self.waiting = self.waiting, []
        for done in waiting:
            try:
                done(self.found)
            except Exception:
                self.loop.fault(owner_of(done))


def proof_of(user: User, token: Secret | None) -> Secret | None:
    """The value of Authorization that the files alone give; it goes before a plugin, as kubectl has it."""
    return token or user.authorization


def access_of(files: Files, credential: Credential | None, plugin_tls: ssl.SSLContext | None, before: Access | None
              ) -> Access:
    """What was found; `before` itself, or its place, where they are still right."""
    cluster, user = files.context.cluster, files.context.user
    proof = proof_of(user, files.token) or (credential.authorization if credential else None)
    lines = [*([(b"Authorization", proof.value)] if proof else []), *user.headers]
    head = b"".join(b"%b: %b\r\n" % line for line in lines)
    tls = plugin_tls or files.tls
    if before is not None and before.place.tls is tls and before.context.cluster == cluster:
        if (before.context, before.proof) == (files.context, head):
            return before
        return Access(files.context, before.place, head)
    return Access(files.context, Place(cluster.host, cluster.port, tls, cluster.tls_name, cluster.proxy,
                                       files.proxy_tls), head)
