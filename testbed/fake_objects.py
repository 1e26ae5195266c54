"""The objects, the users and the faults of the stand-in for a cluster (testbed/fake_cluster.py): no I/O.

    Store        objects by resource, namespace and name; what has happened to them, for watches
    User         who asks, and what RBAC lets him do
    Faults       what goes wrong: an action at a point of a connection's life
    Request      one request, and which resource and verb it means
    Refused      an answer that is an error, in the API server's words
"""

import asyncio
import re
import time
import urllib.parse
import uuid


class Resource:
    """A kind of object."""

    def __init__(self, group: str, version: str, kind: str, short: tuple = (), namespaced: bool = True):
        self.group = group
        self.group_version = f"{group}/{version}" if group else version
        self.kind = kind
        self.short = short
        self.namespaced = namespaced


RESOURCES = {
    "namespaces": Resource("", "v1", "Namespace", ("ns",), namespaced=False),
    "pods": Resource("", "v1", "Pod", ("po",)),
    "services": Resource("", "v1", "Service", ("svc",)),
    "endpointslices": Resource("discovery.k8s.io", "v1", "EndpointSlice"),
    "deployments": Resource("apps", "v1", "Deployment", ("deploy",)),
    "statefulsets": Resource("apps", "v1", "StatefulSet", ("sts",)),
    "replicasets": Resource("apps", "v1", "ReplicaSet", ("rs",)),
    "daemonsets": Resource("apps", "v1", "DaemonSet", ("ds",)),
    "jobs": Resource("batch", "v1", "Job"),
}
REASONS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed",
           409: "AlreadyExists", 410: "Expired", 422: "Invalid", 429: "TooManyRequests", 500: "InternalError",
           503: "ServiceUnavailable", 504: "Timeout"}
PATH = re.compile(r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))"
                  r"(?:/namespaces/(?P<namespace>[^/]+)(?=/[a-z]))?/(?P<resource>[a-z]+)"
                  r"(?:/(?P<name>[^/]+)(?:/(?P<sub>[a-z]+))?)?")


def status(code: int, message: str, name=None, kind=None, reason=None) -> dict:
    """The body of a refusal."""
    details = {key: value for key, value in (("name", name), ("kind", kind)) if value}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "reason": reason or REASONS.get(code, ""), **({"details": details} if details else {}), "code": code}


class Refused(Exception):
    """The answer is an error.  `body` is a Status, or a text of the node's."""

    def __init__(self, code: int, body, *headers: str):
        super().__init__(code, body)
        self.code = code
        self.body = status(code, body) if isinstance(body, str) else body
        self.headers = headers


class PlainRefused(Refused):
    """What the node refuses: plain text, or nothing."""

    def __init__(self, code: int, text: str, *headers: str):
        super().__init__(code, text, *headers)
        self.body = text.encode()


# -- objects -----------------------------------------------------------------------------------


def merged(old, change):
    """A JSON merge patch (RFC 7386): None takes a field away.  Returns a new object."""
    if not isinstance(change, dict):
        return change
    new = dict(old) if isinstance(old, dict) else {}
    for key, value in change.items():
        if value is None:
            new.pop(key, None)
        else:
            new[key] = merged(new.get(key), value)
    return new


def now() -> str:
    """The time as the API server writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


TERM = re.compile(r"\s*(!)?([\w./-]+)(?:\s*(==|=|!=)\s*([\w.-]*)|\s+(in|notin)\s*\(([^)]*)\))?\s*")


def selects(selector: str):
    """A test of labels, from a labelSelector.  Raises Refused."""
    terms, at = [], 0
    while at < len(selector):
        term = TERM.match(selector, at)
        if term is None or term.end() < len(selector) and selector[term.end()] != ",":
            raise Refused(400, f"unable to parse requirement: found '{selector[at:]}', expected: a label selector")
        terms.append(term.groups())
        at = term.end() + 1

    def fits(labels: dict) -> bool:
        for absent, key, sign, value, word, values in terms:
            have = labels.get(key)
            if sign in ("=", "=="):
                good = have == value
            elif sign == "!=":
                good = have != value
            elif word is not None:
                good = (have in [item.strip() for item in values.split(",")]) == (word == "in")
            else:
                good = (have is None) == bool(absent)
            if not good:
                return False
        return True

    return fits


def selected_by(query: dict):
    """A test of objects, from the selectors of a request."""
    labels = selects(query.get("labelSelector", ""))
    fields = [re.split("==?|(?=!)", term, maxsplit=1) for term in query.get("fieldSelector", "").split(",") if term]

    def field(thing: dict, path: str):
        for word in path.split("."):
            thing = thing.get(word, {}) if isinstance(thing, dict) else {}
        return thing or ""

    def fits(thing: dict) -> bool:
        return labels(thing["metadata"].get("labels", {})) and all(
            (field(thing, path) == value.removeprefix("!=")) != value.startswith("!=") for path, value in fields)

    return fits


class Store:
    """All objects, and what has happened to them.  An object is never changed: a new one takes its place."""

    def __init__(self):
        self.version = 1000
        self.objects = {}  # {(resource, namespace, name): object}
        self.history = []  # (version, type, resource, new object, old object or None)
        self.floor = 0  # watches from before this version get 410
        self.bookmarks = []  # versions at which watches that want bookmarks get one
        self.happened = asyncio.Event()  # set, and replaced, whenever something has
        for namespace in ("default", "kube-system"):
            self.put("namespaces", None, namespace, {"status": {"phase": "Active"}})

    def wake(self) -> None:
        self.happened.set()
        self.happened = asyncio.Event()

    def note(self, kind: str, resource: str, new: dict, old) -> None:
        """Something has happened to an object."""
        self.history.append((self.version, kind, resource, new, old))
        self.wake()

    def find(self, resource: str, namespace, name: str) -> dict:
        """One object.  Raises Refused."""
        found = self.objects.get((resource, namespace, name))
        if found is None:
            raise Refused(404, not_found(resource, name))
        return found

    def put(self, resource: str, namespace, name: str, thing: dict) -> dict:
        """Create an object, or put another in its place."""
        if namespace is not None and ("namespaces", None, namespace) not in self.objects:
            self.put("namespaces", None, namespace, {"status": {"phase": "Active"}})
        row = RESOURCES[resource]
        old = self.objects.get((resource, namespace, name))
        self.version += 1
        own = {"name": name, **({"namespace": namespace} if namespace else {}),
               "uid": old["metadata"]["uid"] if old else str(uuid.uuid4()), "resourceVersion": str(self.version),
               "creationTimestamp": old["metadata"]["creationTimestamp"] if old else now()}
        new = {"kind": row.kind, "apiVersion": row.group_version, **thing,
               "metadata": {**thing.get("metadata", {}), **own}}
        self.objects[resource, namespace, name] = new
        self.note("MODIFIED" if old else "ADDED", resource, new, old)
        return new

    def remove(self, resource: str, namespace, name: str) -> dict:
        """The object is gone.  Raises Refused."""
        old = self.find(resource, namespace, name)
        del self.objects[resource, namespace, name]
        self.version += 1
        new = merged(old, {"metadata": {"resourceVersion": str(self.version)}})
        self.note("DELETED", resource, new, old)
        return new

    def listed(self, resource: str, namespace, fits) -> list:
        """The objects of one namespace, or of all (None), by name."""
        return [thing for key, thing in sorted(self.objects.items(), key=lambda item: (item[0][1] or "", item[0][2]))
                if key[0] == resource and namespace in (None, key[1]) and fits(thing)]


def not_found(resource: str, name: str) -> dict:
    """The Status of an object that is not there."""
    group = RESOURCES[resource].group
    return status(404, f'{resource}{"." if group else ""}{group} "{name}" not found', name, resource)


def key_of(thing: dict) -> str:
    """The place of an object in a list."""
    return f"{thing['metadata'].get('namespace', '')}/{thing['metadata']['name']}"


def conditions(ready: bool) -> list:
    """The conditions of a pod that runs."""
    word = str(ready)
    return [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": word},
            {"type": "ContainersReady", "status": word}, {"type": "PodScheduled", "status": "True"}]


def at_path(path: str, server: str):
    """What is at a path that is no resource: discovery, health, /version.  None: nothing."""
    groups = sorted({row.group_version for row in RESOURCES.values() if row.group})
    if path in ("/healthz", "/livez", "/readyz"):
        return b"ok"
    if path == "/version":
        return {"major": "1", "minor": server.partition(".")[2], "gitVersion": f"v{server}.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": word, "version": word.partition("/")[2]} for word in groups]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [
            {"name": row["groupVersion"].partition("/")[0], "versions": [row], "preferredVersion": row}
            for row in versions]}
    version = path.removeprefix("/apis/" if path.startswith("/apis/") else "/api/")
    rows = [{"name": name, "singularName": row.kind.lower(), "namespaced": row.namespaced, "kind": row.kind,
             "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"], "shortNames": list(row.short)}
            for name, row in RESOURCES.items() if row.group_version == version]
    if version == "v1":
        rows += [{"name": f"pods/{word}", "singularName": "", "namespaced": True, "kind": kind,
                  "verbs": ["create", "get"]}
                 for word, kind in (("portforward", "PodPortForwardOptions"), ("exec", "PodExecOptions"))]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": rows} if rows else None


# -- users -------------------------------------------------------------------------------------


class User:
    """Who asks.  `allow`: {resource, or "*": verbs}; None: everything."""

    def __init__(self, name: str, groups: list, allow, namespace):
        self.name = name
        self.groups = groups
        self.allow = allow
        self.namespace = namespace  # the role is of this namespace; None: of the cluster

    def may(self, verb: str, resource: str, namespace) -> bool:
        if self.allow is None:
            return True
        verbs = self.allow.get(resource, self.allow.get("*", "")).split()
        return (verb in verbs or "*" in verbs) and self.namespace in (None, namespace)


ANONYMOUS = User("system:anonymous", ["system:unauthenticated"], {}, None)


def may_not(user: User, verb: str, resource: str, group: str, namespace, name) -> dict:
    """The Status of a request that RBAC refuses."""
    plain = resource.partition("/")[0]
    full = f"{plain}.{group}" if group else plain
    where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
    return status(403, f"""{full}{f' "{name}"' if name else ''} is forbidden: User "{user.name}" cannot {verb} """
                       f"""resource "{resource}" in API group "{group}" {where}""", name, plain)


# -- faults ------------------------------------------------------------------------------------

# Where a fault can be.  "accept": before TLS.  "tls": after the handshake.  "request": it is read, nothing is answered.
# "head": half of the answer's head is sent.  "body": the head and half of the body are; of a watch: `after` events.
# "upgraded": 101 is sent.  "stream": a stream pair is there, without its SYN_REPLY.  "open": `after` bytes of a
# stream have gone down.
POINTS = ("accept", "tls", "request", "head", "body", "upgraded", "stream", "open")
CONNECTION = ("hang", "rst", "eof", "end", "freeze", "delay")  # at each point
ACTIONS = {
    # action: (the point that is meant if none is named, all points where it can be)
    "hang": ("request", POINTS),       # nothing more is said; at "stream" and "open": on that stream
    "rst": ("request", POINTS),        # the connection is reset
    "eof": ("request", POINTS),        # it ends without a close_notify
    "end": ("request", POINTS),        # it ends as TLS ends
    "freeze": ("request", POINTS),     # nothing more is read or written, until `thaw`
    "delay": ("request", POINTS),      # `seconds` later all goes on
    "status": ("request", ("request",)),   # answer `code` and `message`; `retry_after` seconds
    "text": ("request", ("request",)),     # answer `code` with `message` as plain text: a proxy's, or the node's
    "refuse": ("request", ("request",)),   # answer 403 as RBAC does
    "strip": ("request", ("request",)),    # a proxy has taken Upgrade and Connection away
    "close": ("request", ("request",)),    # the answer says Connection: close
    "garbage": ("request", ("request",)),  # what is no HTTP
    "node": ("request", ("request",)),     # the node does not listen: 500
    "bad_upgrade": ("request", ("request",)),  # 101 lacks `message`: "accept" (it is wrong), "protocol", "upgrade"
    "ping": ("upgraded", ("upgraded", "stream", "open")),     # a PING of the server's, or right behind the 101
    "raw": ("upgraded", ("upgraded", "stream", "open")),      # `message`, bytes in hex, as they are
    "goaway": ("upgraded", ("upgraded", "stream", "open")),   # SPDY's
    "no_pong": ("upgraded", ("upgraded", "stream", "open")),  # PINGs are not answered; all else goes on
    "error": ("stream", ("stream", "open")),       # `message` on the error stream, then RST_STREAM on both
    "rst_stream": ("stream", ("stream", "open")),  # RST_STREAM on both, without a word
}


class Fault:
    """One fault."""

    def __init__(self, number: int, action: str, at: str, match: dict, times, after: int, seconds: float,
                 code: int, message, retry_after):
        self.number, self.action, self.at, self.match = number, action, at, match
        self.left = times  # how often it still happens; None: always
        self.after, self.seconds, self.code, self.message, self.retry_after = after, seconds, code, message, retry_after
        self.hits = 0


class Faults:
    """The faults that are switched on."""

    def __init__(self):
        self.numbers = iter(range(1, 1 << 30))
        self.all = {}
        self.on = []

    def add(self, action: str, at=None, times=None, after: int = 0, seconds: float = 0.0, code: int = 503,
            message=None, retry_after=None, **match) -> int:
        """Switch one on.  Returns its number.  Raises ValueError."""
        usual, points = ACTIONS[action]
        at = at or usual
        if at not in points:
            raise ValueError(f"{action} cannot be at {at}")
        number = next(self.numbers)
        fault = Fault(number, action, at, match, times, after, seconds, code, message, retry_after)
        self.all[number] = fault
        self.on.append(fault)
        return number

    def find(self, point: str, reached: int, facts: dict):
        """The first fault at this point that fits the facts, is due, and has not happened often enough.

        The facts grow with the connection: "accept" and "tls" have none; "request" to "upgraded" have verb, resource
        (as in RBAC: "pods/portforward"), namespace, name, user, transport ("spdy", "websocket", "channels"; "" without
        an upgrade), method, path; "stream" and "open" have port, requestid, pod, and those of the session.
        """
        for fault in self.on:
            if fault.at == point and reached >= fault.after and fault.left != 0 and all(
                    facts.get(key) == value for key, value in fault.match.items()):
                fault.left = fault.left and fault.left - 1
                fault.hits += 1
                return fault
        return None


# -- requests ---------------------------------------------------------------------------------


class Request:
    """One request."""

    def __init__(self, method: str, target: str, headers: list, body: bytes):
        self.method = method
        self.target = target
        self.path, _, query = target.partition("?")
        self.path = urllib.parse.unquote(self.path)
        self.pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
        self.query = dict(self.pairs)
        self.headers = headers
        self.body = body
        self.verb = self.resource = self.namespace = self.name = None
        self.group = self.sub = self.transport = ""

    def header(self, name: str) -> str:
        """A header's value; several are joined."""
        return ", ".join(value for other, value in self.headers if other == name)

    def words(self, name: str) -> list:
        """The words of a header that is a list."""
        return [word.strip() for word in self.header(name).split(",") if word.strip()]

    def understand(self) -> None:
        """Find the resource and the verb."""
        found = PATH.fullmatch(self.path)
        row = RESOURCES.get(found["resource"]) if found else None
        if row is None or row.group_version != (found["core"] or found["group"]):
            return
        self.sub = found["sub"] or ""
        self.resource = found["resource"] + (f"/{self.sub}" if self.sub else "")
        self.group, self.namespace, self.name = row.group, found["namespace"], found["name"]
        verbs = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
        self.verb = verbs.get(self.method, self.method.lower())
        if self.verb == "get" and self.name is None:
            self.verb = "watch" if self.query.get("watch") in ("true", "1") else "list"
            only = re.search(r"metadata\.name==?([^,]+)", self.query.get("fieldSelector", ""))
            self.name = only[1] if only else None
        upgrade = self.header("upgrade").lower()
        if self.sub and "upgrade" in self.header("connection").lower():
            tunnel = self.sub == "exec" or "SPDY/3.1+portforward.k8s.io" in self.words("sec-websocket-protocol")
            self.transport = "spdy" if upgrade == "spdy/3.1" else "" if upgrade != "websocket" else (
                "websocket" if tunnel else "channels")
