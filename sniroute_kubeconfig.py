"""sniroute_kubeconfig: which cluster a context leads to, who we are there, and what proves it: without I/O of its own.

    --kubeconfig, environ --- kubeconfig_paths ---> paths
    paths, read ------------- load_kubeconfig ----> Kubeconfig    several files, merged as kubectl merges them
    Kubeconfig, name, read -- find_context -------> Context       cluster, user, namespace, and the files that it needs
    environ, read ----------- in_cluster ---------> Context       the account of the pod that we run in
    all of these ------------ choose_context -----> Context       one after another, as a target wants it

    Context.user.token_file, read -- read_token ------> Secret       for each API connection: such files change
    Context.user.plugin ------------ (sniroute_plugins)              a program that says who we are

Files are read by the function `read`, which the caller gives: read(path) returns bytes, or raises OSError.  Paths in a
file are relative to the folder of that file.  `files` of a result has each path that was asked for, also those that
were not there: when one of them changes, the result is to be made anew.

A file has more entries than one context needs.  So what all programs have to agree about (lists, names) is checked when
a file is read, and the fields of an entry when a context leads there.  Unknown fields mean nothing, as to kubectl.

Secrets are Secret: what they hold is in no repr, no str and no message.  A message says the file, the line and the key.

Stricter than kubectl: a server has to have its scheme, and what YAML reads in two ways is refused (sniroute_yaml).
Milder: `name: 1234` is a text where a text is wanted, and certificate data that stands beside a file simply wins.
As kubectl: nothing that proves who we are goes to a server without TLS.

Threads: any; nothing is kept.

Seams: I want to ...
    read another field of a cluster, a user     cluster_of, user_of
    take another kind of proof                  a field of User, and user_of
    take another version of `exec`              PLUGIN_VERSIONS

This room imports sniroute_yaml (the reader) and sniroute_names (printable).  Source: kubernetes.io, "kubeconfig (v1)"
and "Client Authentication (v1)"; k8s.io/client-go, folders tools/clientcmd and rest.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import os.path
import re
from typing import Callable, Iterable, Mapping, NamedTuple, NoReturn
from urllib.parse import unquote_to_bytes

from sniroute_names import printable
from sniroute_yaml import Node, YamlError, data, kind_of, parse_yaml

__version__ = "0.1.0"

Read = Callable[[str], bytes]  # a path -> what is in that file; raises OSError

PATHS_MAX = 32  # of one KUBECONFIG: people have one for each cluster, and each is read at each change
NAMES_SHOWN = 8  # contexts in a message: a line that is still read
WORD_MAX = 80  # characters of a name or a value in a message
TOKEN_MAX = 64 << 10  # bytes: API servers take heads of 1 MiB, proxies before them 8 to 64 KiB

PLUGIN_GROUP = "client.authentication.k8s.io/"
PLUGIN_VERSIONS = (PLUGIN_GROUP + "v1", PLUGIN_GROUP + "v1beta1")
PLUGIN_EXTENSION = "client.authentication.k8s.io/exec"  # the cluster's extension that plugins are given
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount/"  # where a pod finds its own
ACCOUNT_CONTEXT = "this pod's service account"  # its name for people

SERVER = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([1-9][0-9]{0,4}))?(/[!-~]*)?", re.I | re.A)
PROXY = re.compile(r"(https?|socks5h?)://(?:([!-~]*)@)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([1-9][0-9]{0,4}))?/?",
                   re.I | re.A)
PROXY_PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}  # as Go has them
TOKEN = re.compile(rb"[!-~]+")  # RFC 6750 section 2.1 allows less, some issuers more
ENCRYPTED = re.compile(rb"-----BEGIN ENCRYPTED|Proc-Type: 4,ENCRYPTED")  # RFC 7468 section 11, RFC 1421 section 4.6
HEADER_KEY = re.compile(rb"[!#$&'*+.^_`|~0-9A-Za-z-]")  # RFC 9110 section 5.6.2, without the % that escapes


class KubeconfigError(ValueError):
    """What is wrong, for people: without a secret, and in one line.

    `kind`: `file` (there is none, it cannot be read, or it says what cannot be), `context` (there is none of that name,
    or what it names is not there), `plugin` (it cannot be run, or its answer is none).
    """

    def __init__(self, message: str, kind: str = "file"):
        super().__init__(message)
        self.kind = kind


class Secret:
    """Bytes that are shown to nobody; `value` has them."""

    __slots__ = ("value",)

    def __init__(self, value: bytes):
        self.value = value

    def __repr__(self) -> str:
        return "<secret>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


# -- results -----------------------------------------------------------------------------------


class Proxy(NamedTuple):
    """The proxy to a cluster: `proxy-url`."""

    scheme: str  # a key of PROXY_PORTS
    host: str  # without brackets
    port: int
    login: Secret | None  # USER:PASSWORD, decoded
    url: Secret  # as it was written


class Cluster(NamedTuple):
    """An API server, and how it is known to be the right one."""

    name: str
    server: str  # its URL, as it was written
    is_tls: bool
    host: str  # without brackets
    port: int
    authority: str  # what Host says
    prefix: str  # of all paths, as `/k8s/clusters/c-x`; without a slash at its end
    tls_name: str  # the name that its certificate has to have: `tls-server-name`, or the host
    verifies: bool  # False: `insecure-skip-tls-verify`
    authorities: bytes  # certificates in PEM; b"" for those of the system
    proxy: Proxy | None
    extension: Secret  # JSON, for plugins: the extension PLUGIN_EXTENSION; b"" where there is none
    compresses: bool  # False: `disable-compression`


class Plugin(NamedTuple):
    """A program that says who we are: `exec` of a user."""

    version: str  # a member of PLUGIN_VERSIONS; its answer has to have the same
    command: str  # a path, or a name to be looked for on PATH
    args: tuple[str, ...]
    env: tuple[tuple[str, str], ...]  # beside our own environment
    wants_cluster: bool  # `provideClusterInfo`
    hint: str  # how it is installed, in one line; "" where nobody says so

    def __repr__(self) -> str:
        """Without its arguments and variables, which have passwords at times."""
        return f"<plugin {self.command}>"


class User(NamedTuple):
    """Who we are, and what proves it.  Where several do: `authorization` before `plugin`, as kubectl has it."""

    name: str
    authorization: Secret | None = None  # the value of the header: of `token`, or of `username` and `password`
    token_file: str = ""  # a path, for `read_token`; it wins over `token`
    certificate: bytes = b""  # PEM, to be shown in the handshake
    key: Secret | None = None  # of the certificate, PEM
    headers: tuple[tuple[bytes, bytes], ...] = ()  # for whom we act: Impersonate-User and those that belong to it
    plugin: Plugin | None = None


class Context(NamedTuple):
    """A cluster, who we are there, and a namespace."""

    name: str
    namespace: str  # `default` where none is named
    cluster: Cluster
    user: User
    files: tuple[str, ...]  # that this was made of, or would be if they were there; not `token_file`


# -- entries of a file -------------------------------------------------------------------------


def shown(text: str) -> str:
    """A name, for a message."""
    return repr(printable(text, WORD_MAX))


class Entry:
    """A map of a file: where it stands, and its fields."""

    __slots__ = ("path", "what", "line", "fields")

    def __init__(self, path: str, what: str, node: Node):
        """`what` it is, for people, as `user 'x'`; without a value it has no fields.  Raises KubeconfigError."""
        self.path = path
        self.what = what
        self.line = node.line
        if node.value is not None and not isinstance(node.value, dict):
            self.fault(f"is {kind_of(node)} where a map is expected")
        self.fields: dict[str, Node] = node.value or {}

    def __repr__(self) -> str:
        return f"<{self.what} of {self.path}>"

    def fault(self, message: str, key: str = "", kind: str = "file") -> NoReturn:
        """Raise KubeconfigError: about a field of this entry, or about all of it."""
        line = self.fields[key].line if key and key in self.fields else self.line
        what = ": ".join(filter(None, (self.what, key))) or "all of it"
        raise KubeconfigError(f"{printable(self.path)}, line {line}: {what} {message}", kind)

    def text(self, key: str) -> str:
        """A text; "" where there is none.  What YAML takes for a number or a truth value is a text here."""
        node = self.fields.get(key)
        if node is None or node.value is None:
            return ""
        if node.text is None:
            self.fault(f"is {kind_of(node)} where a text is expected", key)
        return node.text

    def word(self, key: str) -> str:
        """A text of one line, for paths, URLs and names."""
        text = self.text(key)
        if any(character < " " or character == "\x7f" for character in text):
            self.fault("has a control character, or several lines", key)
        return text

    def flag(self, key: str) -> bool:
        """Yes or no; no where it is not said."""
        node = self.fields.get(key)
        if node is None or node.value is None:
            return False
        if not isinstance(node.value, bool):
            self.fault("has to be true or false, without quotes", key)
        return node.value

    def entries(self, key: str, what: str) -> list[Entry]:
        """The maps of a list."""
        return [Entry(self.path, what, node) for node in self.nodes(key)]

    def nodes(self, key: str) -> list[Node]:
        """A list; empty where there is none."""
        node = self.fields.get(key)
        if node is None or node.value is None:
            return []
        if not isinstance(node.value, list):
            self.fault(f"is {kind_of(node)} where a list is expected", key)
        return node.value

    def texts(self, key: str) -> list[str]:
        """A list of texts."""
        nodes = self.nodes(key)
        if any(node.text is None for node in nodes):
            self.fault("has something else than texts in its list", key)
        return [node.text or "" for node in nodes]

    def inner(self, key: str, what: str = "") -> Entry | None:
        """A map within this one; None where it is not there."""
        node = self.fields.get(key)
        return None if node is None or node.value is None else Entry(self.path, what or f"{self.what}: {key}", node)

    def beside(self, path: str) -> str:
        """A path as this file means it."""
        return os.path.join(os.path.dirname(self.path), path)

    def decoded(self, key: str) -> bytes:
        """Base64.  b"" where there is none."""
        text = self.text(key).replace("\n", "").replace("\r", "")
        try:
            return base64.b64decode(text.encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            self.fault("is no base64", key)


def read_file(path: str, read: Read, said: str) -> bytes:
    """What is in a file that has to be there.  `said` names what wants it.  Raises KubeconfigError."""
    try:
        return read(path)
    except OSError as error:
        raise unreadable(f"{said} {printable(path)}", error) from None


def unreadable(what: str, error: OSError) -> KubeconfigError:
    """What is raised for a file that cannot be read."""
    return KubeconfigError(f"{what} cannot be read: {error.strerror or type(error).__name__}")


# -- files -------------------------------------------------------------------------------------


class Kubeconfig(NamedTuple):
    """Several files as one."""

    clusters: Mapping[str, Entry]
    users: Mapping[str, Entry]
    contexts: Mapping[str, Entry]
    current: str  # the context that is used where none is named; "" for none
    files: tuple[str, ...]  # that were asked for
    found: tuple[str, ...]  # those of them that were there


def kubeconfig_paths(option: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Where kubeconfigs are: `--kubeconfig`, else the variable KUBECONFIG, else ~/.kube/config.

    Raises KubeconfigError.  `~/` is the home in the option, which no shell has read; the variable is taken as it
    stands, as by kubectl.
    """
    home = environ.get("HOME", "")
    text = option or environ.get("KUBECONFIG", "")
    paths = [part for part in text.split(os.pathsep) if part]
    if option and home:
        paths = [os.path.join(home, path[2:]) if path.startswith("~/") else path for path in paths]
    if not paths and home:
        paths = [os.path.join(home, ".kube", "config")]
    if len(paths) > PATHS_MAX:
        raise KubeconfigError(f"{'--kubeconfig' if option else 'KUBECONFIG'} names more than {PATHS_MAX} files")
    return tuple(dict.fromkeys(paths))


def load_kubeconfig(paths: Iterable[str], read: Read) -> Kubeconfig:
    """The files, merged: the first that has a name, or a current context, wins.  Raises KubeconfigError.

    Files that are not there are left out; `found` says which are.
    """
    whole = Kubeconfig({}, {}, {}, "", tuple(paths), ())
    for path in whole.files:
        try:
            source = read(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise unreadable(printable(path), error) from None
        part = parse_kubeconfig(path, source)
        whole = Kubeconfig({**part.clusters, **whole.clusters}, {**part.users, **whole.users},
                           {**part.contexts, **whole.contexts}, whole.current or part.current, whole.files,
                           (*whole.found, path))
    return whole


def parse_kubeconfig(path: str, source: bytes) -> Kubeconfig:
    """One file.  Raises KubeconfigError."""
    try:
        root = Entry(path, "", parse_yaml(source))
    except YamlError as error:
        raise KubeconfigError(f"{printable(path)}, {error}") from None
    for key, value in (("apiVersion", "v1"), ("kind", "Config")):
        if root.word(key) not in ("", value):
            root.fault(f"is {shown(root.word(key))}; a kubeconfig has {value}", key)
    return Kubeconfig(named(root, "clusters", "cluster"), named(root, "users", "user"),
                      named(root, "contexts", "context"), root.word("current-context"), (path,), (path,))


def named(root: Entry, key: str, inner: str) -> dict[str, Entry]:
    """The entries of one of the three lists, by name.  Raises KubeconfigError."""
    found: dict[str, Entry] = {}
    for entry in root.entries(key, key):
        name = entry.word("name")
        if not name:
            entry.fault("has an entry without a name")
        if name in found:
            entry.fault(f"has {shown(name)} twice, first in line {found[name].line}")
        what = f"{inner} {shown(name)}"
        found[name] = entry.inner(inner, what) or Entry(root.path, what, entry.fields["name"]._replace(value=None))
    return found


# -- a context ---------------------------------------------------------------------------------


def choose_context(name: str, paths: Iterable[str], environ: Mapping[str, str], read: Read) -> Context:
    """The context of that name, or without one the current one, or where there is no file the pod's own account.

    Raises KubeconfigError.
    """
    config = load_kubeconfig(paths, read)
    if config.found:
        return find_context(config, name, read)
    context = None if name else in_cluster(environ, read)
    if context is None:
        places = ", ".join(map(printable, config.files)) or "--kubeconfig, KUBECONFIG and HOME are empty"
        raise KubeconfigError(f"no kubeconfig is there ({places})" + (
            f", so no context {shown(name)}" if name else ", and this is no pod with a service account"))
    return context._replace(files=(*config.files, *context.files))


def find_context(config: Kubeconfig, name: str, read: Read) -> Context:
    """The context of that name; the current one for "".  Raises KubeconfigError."""
    wanted = name or config.current
    places = ", ".join(map(printable, config.found))
    if not wanted:
        raise KubeconfigError(f"no context is named, and {places} has no current-context{known(config, '')}", "context")
    entry = config.contexts.get(wanted)
    if entry is None:
        raise KubeconfigError(f"no context {shown(wanted)} in {places}{' (its current-context)' * (not name)}"
                              f"{known(config, wanted)}", "context")
    cluster, user = (named_by(entry, key, entries) for key, entries in (("cluster", config.clusters),
                                                                    ("user", config.users)))
    if cluster is None:
        entry.fault("names no cluster", kind="context")
    files: list[str] = []

    def noted(path: str) -> bytes:
        files.append(path)
        return read(path)

    leads_to = cluster_of(cluster, entry.word("cluster"), noted)
    who = User(entry.word("user")) if user is None or not leads_to.is_tls else \
        user_of(user, entry.word("user"), noted)
    return Context(wanted, entry.word("namespace") or "default", leads_to, who, (*config.files, *files))


def named_by(context: Entry, key: str, entries: Mapping[str, Entry]) -> Entry | None:
    """The cluster or the user that a context names; None where it names none.  Raises KubeconfigError."""
    name = context.word(key)
    if name and name not in entries:
        context.fault(f"is {shown(name)}, and no file has a {key} of that name", key, "context")
    return entries[name] if name else None


def known(config: Kubeconfig, wanted: str) -> str:
    """Which contexts there are, or the one that `wanted` may have meant, as the end of a sentence."""
    import difflib  # imported late: only a mistyped name needs it
    names = sorted(config.contexts)
    close = difflib.get_close_matches(wanted, names, 1) if wanted else []
    if close:
        return f"; did you mean {shown(close[0])}?"
    more = f" and {len(names) - NAMES_SHOWN} more" * (len(names) > NAMES_SHOWN)
    return f"; there are {', '.join(map(shown, names[:NAMES_SHOWN]))}{more}" if names else "; it has no contexts"


def pem(entry: Entry, key: str, read: Read, holds: bytes, what: str) -> bytes:
    """What is in `KEY-data`, else in the file that `KEY` names; b"" where neither is there.  Raises KubeconfigError."""
    inline = f"{key}-data"
    if entry.text(inline):
        said, found = inline, entry.decoded(inline)
    elif entry.word(key):
        said = key
        found = read_file(entry.beside(entry.word(key)), read, f"{printable(entry.path)}: {entry.what}: {key}")
    else:
        return b""
    if holds not in found:
        entry.fault(f"holds no {what} in PEM", said)
    return found


def cluster_of(entry: Entry, name: str, read: Read) -> Cluster:
    """A cluster's fields.  Raises KubeconfigError."""
    server = entry.word("server")
    is_tls, host, port, authority, prefix = server_of(entry, server)
    verifies = not entry.flag("insecure-skip-tls-verify")
    if not verifies and (entry.text("certificate-authority") or entry.text("certificate-authority-data")):
        entry.fault("stands beside a certificate-authority, so it is not clear what is wanted: leave one of them out",
                    "insecure-skip-tls-verify")
    extension = b""
    for each in entry.entries("extensions", f"{entry.what}: extensions"):
        if each.text("name") == PLUGIN_EXTENSION and "extension" in each.fields:
            extension = json.dumps(data(each.fields["extension"])).encode()
    return Cluster(name, server, is_tls, host, port, authority, prefix, entry.word("tls-server-name") or host, verifies,
                   pem(entry, "certificate-authority", read, b"-----BEGIN CERTIFICATE-----", "certificate"),
                   proxy_of(entry), Secret(extension), not entry.flag("disable-compression"))


def server_of(entry: Entry, server: str) -> tuple[bool, str, int, str, str]:
    """A server's URL: whether it has TLS, host, port, authority, prefix.  Raises KubeconfigError.

    What is no URL is not repeated: it may be a URL with a password.
    """
    if not server:
        entry.fault("has no server", "server")
    found = SERVER.fullmatch(server)
    if not found or "?" in server or "#" in server:
        entry.fault("is not https://HOST[:PORT][/PATH]: with a scheme, without a name and a password, in ASCII",
                    "server")
    scheme, host, port, path = found.groups()
    is_tls = scheme.lower() == "https"
    authority = host if port is None else f"{host}:{port}"
    return is_tls, host_of(entry, "server", host), port_of(entry, "server", port, 443 if is_tls else 80), authority, \
        (path or "").rstrip("/")


def host_of(entry: Entry, key: str, host: str) -> str:
    """A host without its brackets.  Raises KubeconfigError."""
    if not host.startswith("["):
        return host
    try:
        return str(ipaddress.IPv6Address(host[1:-1]))
    except ValueError:
        entry.fault("has brackets around what is no IPv6 address", key)


def port_of(entry: Entry, key: str, port: str | None, default: int) -> int:
    """The port of a URL.  Raises KubeconfigError."""
    if port is not None and int(port) > 65535:
        entry.fault("has a port above 65535", key)
    return default if port is None else int(port)


def proxy_of(entry: Entry) -> Proxy | None:
    """`proxy-url`.  Raises KubeconfigError; its message has nothing of the URL, which may have a password."""
    url = entry.word("proxy-url")
    if not url:
        return None
    found = PROXY.fullmatch(url)
    if not found:
        entry.fault("is not SCHEME://[USER:PASSWORD@]HOST[:PORT], with http, https or socks5 as its scheme",
                    "proxy-url")
    scheme, login, host, port = found.groups()
    scheme = scheme.lower()
    return Proxy(scheme, host_of(entry, "proxy-url", host), port_of(entry, "proxy-url", port, PROXY_PORTS[scheme]),
                 None if login is None else Secret(unquote_to_bytes(login)), Secret(url.encode()))


def user_of(entry: Entry, name: str, read: Read) -> User:
    """A user's fields.  Raises KubeconfigError."""
    if entry.inner("auth-provider"):
        entry.fault("is gone from Kubernetes since 1.26: log in with a newer tool of your provider, "
                    "which writes `exec`", "auth-provider")
    token, token_file, login = entry.text("token").strip(), entry.word("tokenFile"), entry.text("username")
    if (token or token_file) and login:
        entry.fault("stands beside a token, so it is not clear who is meant: leave one of them out", "username")
    if entry.text("password") and not login:
        entry.fault("stands there without a username", "password")
    if ":" in login:
        entry.fault("has a colon, which no username may have (RFC 7617)", "username")
    authorization = None
    if token:
        authorization = bearer(token.encode(), lambda message: entry.fault(message, "token"))
    elif login:
        pair = f"{login}:{entry.text('password')}".encode()
        authorization = Secret(b"Basic " + base64.b64encode(pair))
    certificate = pem(entry, "client-certificate", read, b"-----BEGIN CERTIFICATE-----", "certificate")
    key = pem(entry, "client-key", read, b"PRIVATE KEY-----", "private key")
    if bool(certificate) != bool(key):
        there, missing = ("certificate", "key") if certificate else ("key", "certificate")
        entry.fault(f"has a client-{there} without a client-{missing}")
    check_key(key, entry.fault)
    return User(name, authorization, entry.beside(token_file) if token_file else "", certificate,
                Secret(key) if key else None, impersonation(entry), plugin_of(entry))


def check_key(key: bytes, fault: Callable[[str], NoReturn]) -> None:
    """Refuse a key with a passphrase: OpenSSL would ask for it, on the terminal."""
    if ENCRYPTED.search(key):
        fault("has a client key with a passphrase, and nobody is there to type it: store it without one")


def bearer(token: bytes, fault: Callable[[str], NoReturn]) -> Secret:
    """The value of the header for a token.  Source: RFC 6750 section 2.1."""
    if len(token) > TOKEN_MAX:
        fault(f"is longer than {TOKEN_MAX >> 10} KiB")
    if not TOKEN.fullmatch(token):
        fault("has a character that no token may have")
    return Secret(b"Bearer " + token)


def impersonation(entry: Entry) -> tuple[tuple[bytes, bytes], ...]:
    """The headers that say for whom we act.  Raises KubeconfigError.

    Source: kubernetes.io, "User impersonation"; the escapes are those of client-go, transport/round_trippers.go.
    """
    said: list[tuple[str, bytes, str]] = [("as", b"Impersonate-User", entry.text("as")),
                                          ("as-uid", b"Impersonate-Uid", entry.text("as-uid"))]
    said += [("as-groups", b"Impersonate-Group", group) for group in entry.texts("as-groups")]
    extra = entry.inner("as-user-extra")
    for key in extra.fields if extra else ():
        name = b"Impersonate-Extra-" + b"".join(
            byte if HEADER_KEY.fullmatch(byte) else b"%%%02X" % ord(byte)
            for byte in (bytes((code,)) for code in key.lower().encode()))
        said += [("as-user-extra", name, value) for value in extra.texts(key)]
    headers = tuple((name, value.encode()) for _, name, value in said if value)
    for key, _, value in said:
        if any(character < " " or character == "\x7f" for character in value):
            entry.fault("has a control character, or several lines", key)
    if headers and headers[0][0] != b"Impersonate-User":
        entry.fault("acts for a uid, groups or extras without a user: say `as`, too")
    return headers


# -- tokens in files, and the pod's own account ------------------------------------------------


def read_token(path: str, read: Read) -> Secret:
    """The value of the header, for the token that a file has now.  Raises KubeconfigError."""
    token = read_file(path, read, "tokenFile").strip()

    def fault(message: str) -> NoReturn:
        raise KubeconfigError(f"tokenFile {printable(path)} {message}")

    return bearer(token, fault) if token else fault("is empty")


def in_cluster(environ: Mapping[str, str], read: Read) -> Context | None:
    """The account of the pod that we run in; None where this is no pod that has one.  Raises KubeconfigError.

    Source: kubernetes.io, "Accessing the Kubernetes API from a Pod".
    """
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        return None
    files = [ACCOUNT + name for name in ("token", "ca.crt", "namespace")]
    try:
        read(files[0])
    except (FileNotFoundError, NotADirectoryError):
        return None  # automountServiceAccountToken: false
    except OSError:
        pass  # `read_token` will say why
    entry = Entry("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT", ACCOUNT_CONTEXT, Node(None, 1))
    server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    is_tls, name, number, authority, prefix = server_of(entry, server)
    authorities = optional(files[1], read)
    if authorities and b"-----BEGIN CERTIFICATE-----" not in authorities:
        raise KubeconfigError(f"{files[1]} holds no certificate in PEM")
    namespace = optional(files[2], read).decode("utf-8", "replace").strip()
    cluster = Cluster(ACCOUNT_CONTEXT, server, is_tls, name, number, authority, prefix, name, True, authorities, None,
                      Secret(b""), True)
    return Context(ACCOUNT_CONTEXT, namespace or "default", cluster, User(ACCOUNT_CONTEXT, token_file=files[0]),
                   tuple(files[1:]))


def optional(path: str, read: Read) -> bytes:
    """What is in a file; b"" where it is not there.  Raises KubeconfigError."""
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        raise unreadable(path, error) from None


# -- credential plugins ------------------------------------------------------------------------


def plugin_of(user: Entry) -> Plugin | None:
    """The plugin of a user, as `exec` names it.  Raises KubeconfigError."""
    entry = user.inner("exec")
    if entry is None:
        return None
    version, command, mode = entry.word("apiVersion"), entry.word("command"), entry.word("interactiveMode")
    if version not in PLUGIN_VERSIONS:
        entry.fault(f"is {shown(version)}; there are {' and '.join(PLUGIN_VERSIONS)}: "
                    "update the tool that wrote this file", "apiVersion")
    if not command:
        entry.fault("has no command", "command")
    if not mode and version == PLUGIN_VERSIONS[0]:
        entry.fault("is missing: v1 wants Never, IfAvailable or Always", "interactiveMode")
    if mode == "Always":
        entry.fault("is Always: this plugin asks at a terminal, and there is none here", "interactiveMode")
    if mode not in ("", "Never", "IfAvailable"):
        entry.fault(f"is {shown(mode)}; there are Never, IfAvailable and Always", "interactiveMode")
    env = tuple((each.text("name"), each.text("value")) for each in entry.entries("env", f"{entry.what}: env"))
    if not all(name and "=" not in name and "\0" not in name + value for name, value in env):
        entry.fault("has a variable without a name, or with a character that none may have", "env")
    args = tuple(entry.texts("args"))
    if "\0" in "".join(args):
        entry.fault("has a NUL", "args")
    return Plugin(version, entry.beside(command) if "/" in command else command, args, env,
                  entry.flag("provideClusterInfo"), printable(" ".join(entry.text("installHint").split()), 1000))
