"""sniroute_plugins: credential plugins: what one is told, how it is run, and what it has printed.

    Plugin, Cluster --- plugin_info ------> text in KUBERNETES_EXEC_INFO
    Plugin ------------ find_plugin ------> the path of its program      on PATH, in --exec-path, in USUAL_FOLDERS
    all of these ------ run_plugin -------> Credential                   in a thread: start, hear, end or kill
    its stdout -------- read_credential --> Credential                   and when that expires
    its stderr -------- last_line --------> why it failed, without secrets

A plugin is the program that `exec` of a kubeconfig names (`Plugin` of sniroute_kubeconfig).  It runs in a process group
of its own, without stdin, and behind the death guard: it ends with this process, however that ends.  What it prints is a
secret; a line of its stderr is the reason where it fails, without what looks like a secret.  A plugin that another user
may change is not run, nor one of a kubeconfig that another user may change.

    Plugins      the runs of one loop: PLUGINS at a time beside those that are SLOW; the others wait
    PluginRun    one run, which any thread may kill

Threads: `Plugins` is the loop's.  `run_plugin` has a thread `plugin-<n>`: it gets values and returns values; the result
comes by `Loop.call` (`in_thread`).  A thread kills its own plugin; `PluginRun.kill` is for any thread.

Seams: I want to ...
    find plugins elsewhere          USUAL_FOLDERS
    hide another kind of secret     SECRETS
    read more of an answer          `read_credential`, and a field of Credential

This room imports sniroute_kubeconfig (Plugin, Cluster), sniroute_dial (Failed), sniroute_loop, sniroute_scarcity,
sniroute_host (`changed_by_others`, `death_guard`) and sniroute_names (printable).

Source: kubernetes.io, "Client Authentication (v1)"; k8s.io/client-go, folder plugin/pkg/client/auth/exec.
"""

from __future__ import annotations

import base64
import collections
import functools
import json
import os
import re
import selectors
import signal
import subprocess
import threading
from typing import Any, Callable, Mapping, NamedTuple, NoReturn

from sniroute_dial import Failed
from sniroute_host import changed_by_others, death_guard, interpreter_of
from sniroute_kubeconfig import Cluster, KubeconfigError, Plugin, Secret, bearer, check_key, shown
from sniroute_loop import Loop, monotonic
from sniroute_names import printable
from sniroute_scarcity import SHORT_OF_MEMORY, begin_errand, ran_out

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
PLUGIN_TIME = 60.0  # of one run: some open a browser, and somebody logs in there
PLUGINS = 2  # runs at a time: each may be a Python or a JVM
SLOW = 3.0  # a run that has taken longer does not count: one that hangs, or waits for a login, stops no other cluster
RUNS_MAX = 16  # with those: a thread and a process each
TICK = 0.1  # a plugin has ended, and a child of it holds its pipes: noticed so late
SOON = 0.002  # a plugin has closed its pipes: it ends next
LEFT = 1.0  # for what a plugin that has ended has left in its pipes: a child of it may fill them for ever
STDERR_MAX = 4096  # bytes that are kept of a plugin's stderr: the last line is in there
WORDS_MAX = 300  # characters of a plugin's last line
SECRET_MIN = 6  # characters of a variable's value that are hidden in a plugin's last line: a shorter one is a word
CREDENTIAL_MAX = 1 << 20  # bytes that a plugin prints: a chain of certificates is some 10 KiB

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

# RFC 3339 section 5.6, as Go takes it.
NO_MOMENT = "0001-01-01T00:00:00"  # Go's time that is none: tools print it for "never"
MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)", re.ASCII)


# -- where plugins are found -------------------------------------------------------------------


class Sources(NamedTuple):
    """Where contexts and plugins are looked for."""

    paths: tuple[str, ...]  # of kubeconfigs
    environ: Mapping[str, str]  # HOME, PATH, the account of a pod; each plugin gets all of it
    exec_path: tuple[str, ...]  # folders, beside PATH


def plugin_fault(plugin: Plugin, message: str) -> KubeconfigError:
    """What is wrong with a plugin.  `message` goes on where "the plugin aws" ends, and has no secret."""
    return KubeconfigError(f"the plugin {printable(plugin.command)} {message}", "plugin")


def folders_of(sources: Sources) -> list[str]:
    """Where programs are looked for, in this order; each absolute."""
    home = sources.environ.get("HOME", "")
    usual = [home + folder[1:] if folder.startswith("~") else folder for folder in USUAL_FOLDERS
             if home or not folder.startswith("~")]
    found = [*sources.environ.get("PATH", os.defpath).split(os.pathsep), *sources.exec_path, *usual]
    return [folder for folder in dict.fromkeys(found) if folder.startswith("/")]


def find_plugin(plugin: Plugin, sources: Sources) -> str:
    """The path of its program.  Raises KubeconfigError: it is not there, or others may change it or a kubeconfig."""
    places = [plugin.command] if "/" in plugin.command else \
        [os.path.join(folder, plugin.command) for folder in folders_of(sources)]
    path = next((place for place in places if os.path.isfile(place) and os.access(place, os.X_OK)), None)
    if path is None:
        hint = f": {plugin.hint}" if plugin.hint else ""
        where = "" if "/" in plugin.command else ", neither on PATH nor in --exec-path and the usual folders"
        raise plugin_fault(plugin, f"is not there{where}{hint}")
    try:
        interpreter = interpreter_of(path)
        why = changed_by_others(path) or (changed_by_others(interpreter) if interpreter else "")
    except OSError as error:
        raise plugin_fault(plugin, f"cannot be run: {error.strerror}") from None
    if not why:
        why = next(filter(None, map(kubeconfig_fault, sources.paths)), "")
    if why:
        raise plugin_fault(plugin, f"is not run: {printable(why, 1000)}")
    return path


def kubeconfig_fault(path: str) -> str:
    """Why another user may change a kubeconfig, as `changed_by_others` says it: it may name any program as a plugin."""
    try:
        return changed_by_others(path)
    except OSError:  # it is not there
        return ""


# -- what one is told, and what it answers -----------------------------------------------------


class Credential(NamedTuple):
    """What a plugin has answered."""

    authorization: Secret | None  # the value of the header
    certificate: bytes  # PEM, or b""
    key: Secret | None
    expires: float | None  # seconds since 1970; None: never


def plugin_info(plugin: Plugin, cluster: Cluster) -> str:
    """What the plugin finds in KUBERNETES_EXEC_INFO.  It may have a proxy's password: for its environment alone."""
    spec: dict[str, Any] = {"interactive": False}
    if plugin.wants_cluster:
        said = {
            "tls-server-name": cluster.tls_name if cluster.tls_name != cluster.host else "",
            "insecure-skip-tls-verify": not cluster.verifies,
            "certificate-authority-data": base64.b64encode(cluster.authorities).decode("ascii"),
            "proxy-url": cluster.proxy.url.value.decode() if cluster.proxy else "",
            "disable-compression": not cluster.compresses,
            "config": json.loads(cluster.extension.value) if cluster.extension.value else None,
        }
        spec["cluster"] = {"server": cluster.server, **{key: value for key, value in said.items() if value}}
    return json.dumps({"kind": "ExecCredential", "apiVersion": plugin.version, "spec": spec})


def read_credential(plugin: Plugin, printed: bytes) -> Credential:
    """What the plugin has printed: an ExecCredential in JSON.  Raises KubeconfigError, `kind="plugin"`.

    Source: kubernetes.io, "Client Authentication (v1)".
    """
    def fault(message: str) -> NoReturn:
        raise plugin_fault(plugin, message)

    def text(key: str) -> str:
        value = status.get(key)
        if value is not None and not isinstance(value, str):
            fault(f"printed a status whose {key} is no text")
        return value or ""

    if not printed.strip():
        fault("printed nothing")
    if len(printed) > CREDENTIAL_MAX:
        fault(f"printed more than {CREDENTIAL_MAX >> 20} MiB")
    try:
        answer = json.loads(printed.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # ValueError: no UTF-8, or no JSON
        answer = None
    if not isinstance(answer, dict) or answer.get("kind") != "ExecCredential":
        fault("printed no ExecCredential in JSON")
    if answer.get("apiVersion") != plugin.version:
        fault(f"answers in {shown(str(answer.get('apiVersion')))}, and the kubeconfig says {plugin.version}")
    status = answer.get("status")
    if not isinstance(status, dict):
        fault("printed no status: has it no right to log in?")
    token, certificate, key = (text(name) for name in ("token", "clientCertificateData", "clientKeyData"))
    if bool(certificate) != bool(key):
        fault("printed a certificate or a key, not both")
    if not token and not certificate:
        fault("printed neither a token nor a certificate")
    if certificate and ("-----BEGIN CERTIFICATE-----" not in certificate or "PRIVATE KEY-----" not in key):
        fault("printed a certificate or a key that is not in PEM")
    check_key(key.encode("utf-8", "replace"), fault)
    authorization = bearer(token.encode("utf-8", "replace"),
                           lambda message: fault(f"printed a token that {message}")) if token else None
    expires = text("expirationTimestamp")
    if expires.startswith(NO_MOMENT):
        expires = ""
    return Credential(authorization, certificate.encode("utf-8", "replace"),
                      Secret(key.encode("utf-8", "replace")) if key else None,
                      moment(expires, fault) if expires else None)


def moment(text: str, fault: Callable[[str], NoReturn]) -> float:
    """A time of RFC 3339 in seconds since 1970."""
    import datetime  # imported late: 0.4 MiB that most have no use for
    found = MOMENT.fullmatch(text)
    try:
        day, clock, fraction, zone = found.groups()  # type: ignore[union-attr]
        whole = datetime.datetime.fromisoformat(f"{day}T{clock}{zone.replace('Z', '+00:00')}")
        return whole.timestamp() + float(f"0{fraction or ''}")
    except (AttributeError, ValueError, OverflowError):
        fault("printed an expirationTimestamp that is no time of RFC 3339")


# -- a run -------------------------------------------------------------------------------------


class PluginRun:
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


def run_plugin(run: PluginRun, plugin: Plugin, cluster: Cluster, sources: Sources) -> Credential:
    """Run it to its end, or for PLUGIN_TIME.  Raises KubeconfigError, `kind="plugin"`.  A thread of its own."""
    deadline = monotonic() + PLUGIN_TIME
    path = find_plugin(plugin, sources)
    environ = {**sources.environ, "PATH": os.pathsep.join(folders_of(sources)), **dict(plugin.env),
               "KUBERNETES_EXEC_INFO": plugin_info(plugin, cluster)}
    try:
        guard = death_guard()
        with run.lock:
            if run.is_over:
                raise plugin_fault(plugin, "is not run any more: the program ends")
            # Use this instead of DEVNULL, because Popen opens that first, and leaves it open where there is no pipe.
            with open(os.devnull, "rb") as nothing:
                run.process = process = subprocess.Popen(
                    [*guard, path, *plugin.args], env=environ, stdin=nothing, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise plugin_fault(plugin, f"cannot be run: {error.strerror}") from None
    with process.stdout, process.stderr:
        try:
            printed, said, in_time = hear(run, deadline)
        finally:
            if process.returncode is None:
                run.kill()
                process.wait()
    words = last_line(said, plugin)
    if not in_time:
        raise plugin_fault(plugin, f"had not ended after {PLUGIN_TIME:g} s, and was killed{words}")
    if len(printed) > CREDENTIAL_MAX:
        raise plugin_fault(plugin, f"printed more than {CREDENTIAL_MAX >> 20} MiB{words}")
    if process.returncode:
        code = process.returncode
        ended = f"ended with {code}" if code > 0 else f"was killed by signal {-code}"
        raise plugin_fault(plugin, f"{ended}{words}")
    return read_credential(plugin, printed)


def hear(run: PluginRun, deadline: float) -> tuple[bytes, bytes, bool]:
    """What a plugin prints until it ends: stdout, the end of its stderr, and whether it has ended in time.

    It ends when its process does, or with an answer that is too long.  A child that it has left behind may hold its
    pipes for ever.
    """
    process = run.process
    printed, said = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        for pipe, into in ((process.stdout, printed), (process.stderr, said)):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ, into)
        while True:
            has_ended = run.ended() is not None  # asked first: what it has said is in the pipes by then
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


# -- all runs ----------------------------------------------------------------------------------


class Plugins:
    """The runs of plugins of one loop: PLUGINS at a time beside those that are SLOW; the others wait.  Loop only."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self.free = set(range(1, RUNS_MAX + 1))  # numbers of threads
        self.fast = loop.queue(SLOW, lambda running: self._next())  # those that count
        self.waiting: collections.deque[tuple[Callable[[PluginRun], Any], Callable[[Any], None]]] = collections.deque()
        self.running: set[PluginRun] = set()

    def run(self, work: Callable[[PluginRun], Any], done: Callable[[Any], None]) -> None:
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
            running = PluginRun()

            def ended(result: Any, number: int = number, running: PluginRun = running,
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


def failed_by(error: KubeconfigError) -> Failed:
    """The reason for programs."""
    return Failed({"file": "config"}.get(error.kind, error.kind), str(error))


def in_thread(loop: Loop, name: str, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
    """Do what may wait in a thread; then call `done` in the loop, with what came of it, or with Failed."""
    short = Failed("config", SHORT_OF_MEMORY)  # now: later there may be no memory for it

    def told(result: Any) -> None:
        """In the loop: put what came of it in words that who waits may read."""
        try:
            if isinstance(result, KubeconfigError):
                result = failed_by(result)
            elif isinstance(result, Exception):  # whoever waits hears of it; what it says may have a secret
                result = short if ran_out(result) else Failed("config", f"{name}: {type(result).__name__}")
        except MemoryError:
            result = short
        done(result)

    try:
        begin_errand(work, told, loop.call, name)
    except (RuntimeError, MemoryError) as error:  # there are too many threads
        loop.call(functools.partial(done, Failed("config", str(error))))
