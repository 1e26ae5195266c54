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

How a plugin is run is in sniroute_plugins.

Threads: the loop's, but for `read_files` (thread `kubeconfig`, one for each identity at a time) and `Identity._run`
(threads `plugin-<n>`).  Each gets values and returns values; the result comes by `Loop.call`.

Seams: I want to ...
    trust otherwise                 `make_tls`
    another kind of proof           a field of User (sniroute_kubeconfig), and `access_of`

This room imports sniroute_plugins, sniroute_layers (Place), sniroute_kubeconfig, sniroute_dial (Failed), sniroute_loop,
sniroute_host (`stamp`) and sniroute_names (printable).
"""

from __future__ import annotations

import errno
import functools
import os
import ssl
import time
from typing import Any, Callable, NamedTuple

from sniroute_dial import Failed
from sniroute_host import Stamp, stamp
from sniroute_kubeconfig import Cluster, Context, KubeconfigError, Plugin, Secret, User, choose_context, read_token
from sniroute_layers import Place
from sniroute_loop import Loop, monotonic, owner_of
from sniroute_names import printable
from sniroute_plugins import Credential, PluginRun, Plugins, Sources, in_thread, run_plugin

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
LOOK_EVERY = 1.0  # files are looked at so often, where anybody asks; a failure is told so long without another look
TOKEN_FOR = 60.0  # a token file is read again though it seems to be the same: as client-go does it
REFUSED_EVERY = 5.0  # what was refused is looked for anew so often: else each client of a wrong token runs the plugin
EARLY = 10.0  # a plugin's answer is used until so long before it expires: the request takes time, and clocks differ
SETTLE = 0.1  # a kubeconfig that is being written is read again after so long: kubectl empties it first
FILE_MAX = 16 << 20  # bytes of a file: a kubeconfig of a thousand clusters has 5 MiB

# The phases of looking.
READING, PLUGIN = "reading the kubeconfig", "waiting for the credential plugin"


# -- results -----------------------------------------------------------------------------------


class Access:
    """What a request to an API server needs.  It never changes; what is new is another one.

    It has nothing to do with Cloudflare's Access.
    """

    __slots__ = ("context", "place", "proof")

    def __init__(self, context: Context, place: Place, proof: bytes):
        self.context = context
        self.place = place  # the same object as long as a connection of before may be used
        self.proof = proof  # the lines of a head: Authorization, Impersonate-...; a secret

    def __repr__(self) -> str:
        return f"<access to {self.place} as {printable(self.context.user.name)}>"


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
            import tempfile  # imported late: where there is memfd_create, it would be 0.8 MiB for nothing
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


class Files(NamedTuple):
    """What was read, and the state of the files then."""

    context: Context
    stamps: tuple[tuple[str, Stamp | int], ...]
    tls: ssl.SSLContext | None  # with the certificate of the file; None: plain HTTP
    proxy_tls: ssl.SSLContext | None
    token: Secret | None  # of a token file
    token_stamp: Stamp | int
    token_read: float  # clock time


def read_context(sources: Sources, name: str) -> tuple[Context, tuple[tuple[str, Stamp | int], ...]]:
    """The context, and the files that it was made of, as they were.  Raises KubeconfigError.  Any thread."""
    stamps: dict[str, Stamp | int] = {path: stamp(path) for path in sources.paths}

    def read(path: str) -> bytes:
        stamps.setdefault(path, stamp(path))  # before it is read: a change is not missed
        return read_path(path)

    context = choose_context(name, sources.paths, sources.environ, read)
    return context, tuple((path, stamps.get(path, 0)) for path in context.files)


def tls_inputs(context: Context) -> tuple[Any, ...]:
    """What the SSLContexts of a cluster are made of: where it is equal, so are they."""
    return context.cluster, context.user.certificate, context.user.key


def read_files(sources: Sources, name: str, before: Files | None, forced: bool) -> Files:
    """The files of a context; `before` itself where nothing has changed.  Raises KubeconfigError.  Any thread.

    `forced`: read a token file though it seems to be the same.
    """
    now = monotonic()
    files = before
    if files is None or any(stamp(path) != known for path, known in files.stamps):
        files = read_anew(sources, name, before)
    path = files.context.user.token_file
    if path:
        state = stamp(path)
        if forced or files.token is None or state != files.token_stamp or now - files.token_read >= TOKEN_FOR:
            files = files._replace(token=read_token(path, read_path), token_stamp=state, token_read=now)
    return files


def read_anew(sources: Sources, name: str, before: Files | None) -> Files:
    """The files of a context, without the token of a file.  Raises KubeconfigError."""
    try:
        context, stamps = read_context(sources, name)
    except KubeconfigError:
        if before is None:
            raise
        time.sleep(SETTLE)
        context, stamps = read_context(sources, name)
    if before is not None and tls_inputs(before.context) == tls_inputs(context):
        tls, proxy_tls = before.tls, before.proxy_tls  # so that connections of before may be used
    else:
        cluster, user, proxy = context.cluster, context.user, context.cluster.proxy
        tls = make_tls(cluster, user.certificate, user.key) if cluster.is_tls else None
        proxy_tls = make_tls(None) if proxy is not None and proxy.scheme == "https" else None
    return Files(context, stamps, tls, proxy_tls, None, 0, 0.0)


# -- an identity -------------------------------------------------------------------------------


class Identity:
    """A context: who we are there, looked for when it is asked for.  All methods run in the loop.

    Args:
        name: of the context; "" for the current one.
        wall: the time in seconds since 1970, for what expires.
    """

    def __init__(self, loop: Loop, plugins: Plugins, sources: Sources, name: str,
                 wall: Callable[[], float] = time.time):
        self.loop = loop
        self.plugins = plugins
        self.sources = sources
        self.name = name
        self.wall = wall
        self.files: Files | None = None
        self.credential: Credential | None = None  # of the plugin
        self.plugin_tls: ssl.SSLContext | None = None  # with the certificate of the plugin
        self.found: Access | Failed | None = None
        self.looked_at = 0.0  # clock time of the last look
        self.forced_at = float("-inf")  # clock time of the last look for another one than the server has refused
        self.phase = ""  # what it waits for; "": nothing
        self.is_forced = False  # this look is one for something else than the server has refused
        self.waiting: list[Callable[[Access | Failed], None]] = []

    def ask(self, done: Callable[[Access | Failed], None]) -> None:
        """`done` is called with what there is; perhaps before this returns."""
        if not self.phase and self.found is not None and monotonic() - self.looked_at < LOOK_EVERY \
                and (isinstance(self.found, Failed) or not self._has_expired()):
            done(self.found)
            return
        self.waiting.append(done)
        if not self.phase:
            self._look(False)

    def refused(self, access: Access, done: Callable[[Access | Failed | None], None]) -> None:
        """The API server did not take `access`: `done` is called with another one, or None where there is none."""
        def found(result: Access | Failed) -> None:
            done(result if is_other(result) else None)

        def is_other(result: Access | Failed | None) -> bool:
            return not isinstance(result, Access) or (result.proof, result.place) != (access.proof, access.place)

        if self.phase:  # a look of another kind may find what was refused
            self.waiting.append(found if self.is_forced else lambda _: self.refused(access, done))
        elif is_other(self.found):
            self.ask(found)
        elif monotonic() - self.forced_at < REFUSED_EVERY:
            done(None)
        else:
            self.waiting.append(found)
            self._look(True)

    def _has_expired(self) -> bool:
        """Whether the plugin's answer is too old."""
        expires = self.credential.expires if self.credential else None
        return expires is not None and self.wall() >= expires - EARLY

    def _look(self, forced: bool) -> None:
        """Read the files, and run the plugin where there is one."""
        self.phase = READING
        self.is_forced = forced
        if forced:
            self.forced_at = monotonic()
        in_thread(self.loop, "kubeconfig", functools.partial(
            read_files, self.sources, self.name, self.files, forced), self._read)

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
        elif self.credential is not None and not self.is_forced and not self._has_expired():
            self._tell(None)
        else:
            self.phase = PLUGIN
            self.plugins.run(functools.partial(self._run, plugin, files.context.cluster, self.credential,
                                               self.plugin_tls), self._ran)

    def _run(self, plugin: Plugin, cluster: Cluster, before: Credential | None, tls: ssl.SSLContext | None,
             run: PluginRun) -> tuple[Credential, ssl.SSLContext | None]:
        """Run the plugin.  Its own thread, which changes nothing here."""
        credential = run_plugin(run, plugin, cluster, self.sources)
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
        self.looked_at = monotonic()
        self.phase = ""
        waiting, self.waiting = self.waiting, []
        for done in waiting:
            try:
                done(self.found)
            except Exception:
                self.loop.met(owner_of, done)


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
