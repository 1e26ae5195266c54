"""Tests of sniroute_api.py, in its order, against the stand-in for a cluster, or a server of the test's own."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

import sniroute_api
import sniroute_credentials
from conftest import HOST, wait_until
from sniroute_api import REASONS, Reply, Upgraded, failure
from sniroute_dial import Failed
from sniroute_loop import monotonic
from testbed.apis import SPDY, WEBSOCKET
from testbed.running import read_all

NAMESPACE = "/api/v1/namespaces/default"
PODS, SERVICE, POD = f"{NAMESPACE}/pods", f"{NAMESPACE}/services/web", f"{NAMESPACE}/pods/web-1"
FORWARD = f"{POD}/portforward"


@pytest.fixture
def web(cluster):
    """The cluster, with a service and its pod."""
    cluster.service("web", {80: 8080}, {"app": "web"})
    cluster.pod("web-1", {8080: (HOST, 1)}, labels={"app": "web"})
    return cluster


@pytest.fixture
def caller(web, call):
    """A caller of it."""
    return call(web.kubeconfig())


@pytest.fixture
def plain(serve, call, tmp_path):
    """plain(handler) -> a Caller of an API server without TLS, which is a handler of the test's."""
    def make(handler):
        path = tmp_path / "plain"
        point(path, serve(handler))
        return call(path)
    return make


def point(path, server):
    """Write a kubeconfig that leads to an API server without TLS."""
    path.write_text(json.dumps({
        "current-context": "a", "clusters": [{"name": "c", "cluster": {
            "server": f"http://{HOST}:{server.address[1]}"}}],
        "contexts": [{"name": "a", "context": {"cluster": "c"}}]}))


def says(*answers: bytes):
    """A handler that answers the requests of a connection with these, one after another, and then closes."""
    def handler(sock):
        heard = b""
        for answer in answers:
            while b"\r\n\r\n" not in heard:
                if not (data := sock.recv(65536)):
                    return
                heard += data
            heard = heard.partition(b"\r\n\r\n")[2]
            sock.sendall(answer)
    return handler


def told(result, reason: str) -> str:
    """The words of a Failed with this reason."""
    assert isinstance(result, Failed), result
    assert result.reason == reason and reason in REASONS, (result.reason, str(result))
    return str(result)


# -- results -----------------------------------------------------------------------------------


def test_the_json_of_a_reply():
    assert Reply(200, {}, b'{"a": [1]}').json() == {"a": [1]}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b"1", b"[" * 100000])
def test_what_is_no_object(body):
    with pytest.raises(Failed) as caught:
        Reply(200, {}, body).json()
    assert caught.value.reason == "answer"


@pytest.mark.parametrize("status, method, path, message, said", [
    (404, "GET", SERVICE, 'services "web" not found', ("unknown", 'HTTP 404: services "web" not found')),
    (401, "GET", SERVICE, "Unauthorized", ("login", "HTTP 401: Unauthorized")),
    (410, "GET", PODS, "too old", ("expired", "HTTP 410: too old")),
    (429, "GET", PODS, "", ("busy", "HTTP 429")),
    (500, "GET", PODS, "a\x1b[1m\nb", ("answer", "HTTP 500: a?[1m?b")),
    (403, "GET", SERVICE, 'services "web" is forbidden: User "u" cannot get resource "services" in API group "" in the '
     'namespace "prod"', ("forbidden", '; a Role in the namespace prod grants it with {apiGroups: [""], resources: '
                          '["services"], verbs: ["get"]}')),
    (403, "GET", PODS, 'x is forbidden: User "u" cannot list resource "deployments" in API group "apps" at the cluster '
     'scope', ("forbidden", '; a ClusterRole grants it with {apiGroups: ["apps"], resources: ["deployments"], '
               'verbs: ["list"]}')),
    (403, "GET", FORWARD, 'pods "web-1" is forbidden: ', (
        "forbidden", '; a Role in the namespace default grants it with {apiGroups: [""], resources: '
        '["pods/portforward"], verbs: ["get"]}')),
    (403, "POST", FORWARD, "", ("forbidden", 'resources: ["pods/portforward"], verbs: ["create"]}')),
    (403, "GET", f"{PODS}?watch=true", "", ("forbidden", 'resources: ["pods"], verbs: ["watch"]}')),
    (403, "GET", f"{PODS}?labelSelector=a", "", ("forbidden", 'resources: ["pods"], verbs: ["list"]}')),
    (403, "GET", "/apis/discovery.k8s.io/v1/namespaces/a/endpointslices", "", (
        "forbidden", 'a Role in the namespace a grants it with {apiGroups: ["discovery.k8s.io"], resources: '
        '["endpointslices"], verbs: ["list"]}')),
    (403, "GET", "/version", "", ("forbidden", "HTTP 403")),
])
def test_a_failure_has_the_words_of_the_server_and_what_would_grant_it(status, method, path, message, said):
    found = failure(Reply(status, {}, json.dumps({"message": message}).encode()), method, path)
    assert found.reason == said[0] and str(found).endswith(said[1]), str(found)


def test_the_words_of_a_node_are_plain_text():
    assert str(failure(Reply(403, {}, b"\nunable to upgrade: no\nmore"), "GET", "/version")) == \
        "HTTP 403: unable to upgrade: no"
    assert str(failure(Reply(400, {}, b"x" * 9999), "GET", "/version")) < "HTTP 400: " + "x" * 301
    assert str(failure(Reply(500, {}, b'{"message": 7}'), "GET", "/version")) == "HTTP 500"


# -- requests ----------------------------------------------------------------------------------


def test_lists_and_the_upgrade_ride_on_one_connection(web, caller):
    assert caller.get(SERVICE).json()["metadata"]["name"] == "web"
    assert len(caller.get(f"{PODS}?labelSelector=app%3Dweb").json()["items"]) == 1
    upgraded = caller.upgrade("POST", FORWARD)
    assert isinstance(upgraded, Upgraded) and upgraded.headers["x-stream-protocol-version"] == "portforward.k8s.io"
    upgraded.wire.close()
    assert [request["nth"] for request in web.requests()] == [1, 2, 3]
    assert [(row["alpn"], row["requests"]) for row in web.connections()] == [("http/1.1", 3)]


def test_a_server_that_prefers_http_2_is_not_offered_it(make_cluster, call):
    cluster = make_cluster(h2=True)
    assert call(cluster.kubeconfig()).get("/version").status == 200


def test_a_request_says_who_asks_and_for_what(web, call):
    web.set(prefix="/k8s/clusters/c-x")
    caller = call(web.kubeconfig(cluster={"server": f"{web.url}/k8s/clusters/c-x/"}, user={
        "token": "admin-token", "as": "bob", "as-groups": ["a", "b"]}))
    assert caller.get("/version").status == 200
    request, = web.requests()
    assert request["user"] == "bob" and ["host", f"{HOST}:{web.port}"] in request["headers"]
    assert {name: value for name, value in request["headers"]}.items() >= {
        "accept": "application/json", "impersonate-user": "bob", "user-agent": "sniroute/0.1.0"}.items()


def test_what_would_begin_another_line_is_no_request(caller):
    api = caller.apis.of("")
    for path in ("", "api", "/a b", "/a\r\nX: y", "/\u00e9"):
        with pytest.raises(ValueError):
            api.get(path, print, monotonic() + 9)
    with pytest.raises(ValueError):
        api.upgrade("GET", "/a", [("Upgrade", "a\r\nX: y")], print, monotonic() + 9)


def test_a_large_answer_comes_in_chunks(web, caller, monkeypatch):
    for number in range(300):
        web.put("services", f"s{number}", spec={"x": "y" * 1000})
    reply = caller.get(f"{NAMESPACE}/services")
    assert "content-length" not in reply.headers and len(reply.json()["items"]) == 301
    monkeypatch.setattr(sniroute_api.Job, "body_max", 100_000)
    assert "an answer of more than 97 KiB" in told(caller.get(f"{NAMESPACE}/services"), "answer")


def test_what_is_not_there_is_a_reply(caller):
    reply = caller.get(f"{NAMESPACE}/services/other")
    assert reply.status == 404 and told(failure(reply, "GET", "/x"), "unknown").endswith('services "other" not found')


def test_interim_answers_without_an_end_are_none(plain):
    many = b"HTTP/1.1 100 Continue\r\n\r\n" * 1000
    caller = plain(says(many + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"))
    assert "interim" in told(caller.get(PODS), "answer")


def test_an_answer_may_have_interim_ones_before_it_and_end_with_the_connection(plain):
    caller = plain(says(b"HTTP/1.1 103 Early\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\nX: 1\r\nX: 2\r\n\r\n{}"))
    assert caller.get("/version") == Reply(200, {"x": "1, 2"}, b"{}")


@pytest.mark.parametrize("answer, reason", [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", "reset"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", "reset"),
    (b"HTTP/1.1 200 OK\r\nConte", "reset"),
    (b"", "reset"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "answer"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nabcde", "answer"),
    (b"SSH-2.0-x\r\n", "answer"),
    (b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "answer"),
    (b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", "answer"),
])
def test_what_is_no_answer(plain, answer, reason):
    told(plain(says(answer)).get("/version"), reason)


# -- its connections -------------------------------------------------------------------------


@pytest.mark.parametrize("ask", ["get", "upgrade"])
def test_an_idle_connection_that_has_just_been_closed_is_no_failure(web, caller, ask):
    for count, how in enumerate(("rst", "eof", "end"), 1):
        caller.get(SERVICE)
        web.fault(how, times=1)
        result = caller.get(SERVICE) if ask == "get" else caller.upgrade("POST", FORWARD)
        assert isinstance(result, Reply if ask == "get" else Upgraded)
        if ask == "upgrade":
            result.wire.reset()
        assert len(web.connections()) == count * (2 if ask == "upgrade" else 1) + (ask == "get")


@pytest.mark.parametrize("more", [b"HTTP/1.1 408 late\r\n\r\n", b"\0"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_connection_on_which_more_comes_than_was_asked_for_is_not_kept(plain, more, at_once):
    def handler(sock):
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}" + (more if at_once else b""))(sock)
        if not at_once:
            go.wait(10)
            sock.sendall(more)
        read_all(sock)

    go = threading.Event()
    caller = plain(handler)
    assert caller.get("/a").status == 200
    idle = caller.apis.of("").idle
    assert len(idle) == (not at_once)
    go.set()
    caller.until(lambda: not idle)
    assert caller.get("/b").status == 200


def test_a_new_connection_that_is_closed_is_a_failure(web, caller):
    web.fault("rst")
    told(caller.get(SERVICE), "reset")
    assert len(web.connections()) == 1


def test_an_idle_connection_that_is_closed_meanwhile_is_not_used(web, caller):
    caller.get(SERVICE)
    web.end_connections("end")
    caller.until(lambda: not caller.apis.of("").idle)
    assert caller.get(SERVICE).status == 200


def test_a_connection_of_before_that_turns_out_dead_does_not_bring_its_cluster_back(serve, call, tmp_path, soon):
    """The kubeconfig has changed, and another request has found that, before the old connection breaks."""
    hang_up, asked = threading.Event(), threading.Event()

    def old(sock):
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nold")(sock)
        asked.set()
        hang_up.wait(10)

    def new(sock):
        says(*[b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nnew"] * 3)(sock)

    path, moved = tmp_path / "kubeconfig", []
    old_server, new_server = serve(old), serve(new)
    point(path, old_server)
    caller = call(path)
    caller.apis.moved = moved.append
    assert caller.get("/a").body == b"old"
    _, got = caller.begin("/b")
    caller.until(asked.is_set)
    caller.until(lambda: caller.apis.of("").jobs and not caller.apis.of("").idle)
    point(path, new_server)
    assert caller.get("/c").body == b"new" and len(moved) == 1
    hang_up.set()
    assert caller.until(lambda: got)[0].body == b"new"
    assert caller.get("/d").body == b"new"
    assert len(moved) == 1 and old_server.accepted == 1


@pytest.mark.parametrize("ask", ["get", "upgrade"])
def test_an_idle_connection_without_anybody_at_its_other_end_is_given_up(plain, monkeypatch, ask):
    """A laptop has slept, or a balancer has forgotten the connection: what is sent gets no answer at all."""
    def handler(sock):
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")(sock)
        read_all(sock)

    monkeypatch.setattr(sniroute_api, "SILENT", 0.1)
    caller = plain(handler)
    assert caller.get("/a").status == 200 and len(caller.apis.of("").idle) == 1
    assert (caller.get("/b") if ask == "get" else caller.upgrade("POST", "/b")).status == 200


def test_few_idle_connections_are_kept_and_not_for_long(web, caller):
    got = [caller.begin(SERVICE)[1] for _ in range(20)]
    caller.until(lambda: all(got))
    assert all(reply.status == 200 for [reply] in got)
    idle = caller.apis.of("").idle
    assert len(idle) == sniroute_api.IDLE_MAX
    caller.apis.idling.seconds = 0.01
    for reply in [caller.begin(SERVICE)[1] for _ in range(4)]:
        caller.until(lambda: reply)
    caller.until(lambda: not idle)
    caller.until(lambda: not web.connections(ended=None))


def test_a_connection_that_the_server_closes_is_not_kept(web, caller):
    web.fault("close", times=1)
    assert caller.get(SERVICE).status == caller.get(SERVICE).status == 200
    assert len(web.connections()) == 2


def test_so_many_ask_at_a_time_and_the_others_wait_for_their_turn(web, caller, monkeypatch):
    monkeypatch.setattr(sniroute_api, "ASKING_MAX", 3)
    api = caller.apis.of("")
    fault = web.fault("hang")
    jobs = [caller.begin(SERVICE) for _ in range(6)]
    caller.until(lambda: web.hits(fault) == 3)
    assert [job.phase for job, _ in jobs] == [sniroute_api.ASKING] * 3 + [sniroute_api.QUEUED] * 3
    jobs[5][0].cancel()
    web.heal()
    for job, _ in jobs[:3]:
        job.cancel()
        job.cancel()
    caller.until(lambda: jobs[3][1] and jobs[4][1])
    assert jobs[3][1][0].status == 200 and api.turns == 3 and not api.queue and jobs[5][1] == []


def test_a_turn_that_is_given_to_who_has_left_is_the_next_ones(web, caller, monkeypatch):
    """All that ask, and all whose turn comes by that, leave at once, as the clients of a listener that closes."""
    monkeypatch.setattr(sniroute_api, "ASKING_MAX", 3)
    fault = web.fault("hang")
    jobs = [caller.begin(SERVICE) for _ in range(7)]
    caller.until(lambda: web.hits(fault) == 3)
    web.heal()
    for job, _ in jobs[:6]:
        job.cancel()
    caller.until(lambda: jobs[6][1])
    assert jobs[6][1][0].status == 200, jobs[6][1]
    assert caller.apis.of("").turns == 3


def test_a_watch_has_no_turn_once_it_has_begun(web, caller, monkeypatch):
    monkeypatch.setattr(sniroute_api, "ASKING_MAX", 1)
    watched = [caller.watch(f"{PODS}?watch=true") for _ in range(3)]
    caller.until(lambda: all(watch.lines for watch in watched))
    assert caller.get(SERVICE).status == 200


# -- answers that ask for more -----------------------------------------------------------------


def test_who_is_told_to_come_back_later_does(web, caller, monkeypatch):
    monkeypatch.setattr(sniroute_api, "AGAIN_LEAST", 0.05)
    for code in (429, 503):
        fault = web.fault("status", code=code, retry_after=0, times=2)
        began = time.monotonic()
        assert caller.get(SERVICE).status == 200
        assert web.hits(fault) == 2 and time.monotonic() - began >= 0.1


def test_who_cannot_come_back_in_time_hears_of_it_at_once(web, caller):
    for retry_after, timeout in ((None, 10), (5, 1)):
        web.fault("status", code=429, retry_after=retry_after, times=1)
        began = time.monotonic()
        assert caller.get(SERVICE, timeout=timeout).status == 429
        assert time.monotonic() - began < 0.9


@pytest.mark.parametrize("text, seconds", [("1", 1), ("0", 0.2), ("Wed, 21 Oct 2026 07:28:00 GMT", 1), ("\u00b2", 1),
                                           ("-1", 1), ("9999999999", 1)])
def test_how_long_retry_after_is(text, seconds):
    assert sniroute_api.retry_after(Reply(429, {"retry-after": text}, b"")) == seconds
    assert sniroute_api.retry_after(Reply(500, {"retry-after": text}, b"")) is None


def test_a_refused_token_that_stays_the_same_is_refused_at_once(web, call):
    caller = call(web.kubeconfig(user={"token": "wrong"}))
    assert told(caller.get(SERVICE), "login") == "HTTP 401: Unauthorized"
    told(caller.upgrade("POST", FORWARD), "login")
    watched = caller.watch(f"{PODS}?watch=true")
    told(caller.until(lambda: watched.ends)[0], "login")
    assert [request["status"] for request in web.requests()] == [401] * 3


def test_what_is_forbidden_says_what_would_grant_it(web, call):
    web.user("bob", token="bob-token", allow={"pods": "get"})
    caller = call(web.kubeconfig(user={"token": "bob-token"}))
    assert told(caller.get(PODS), "forbidden").endswith(
        '; a Role in the namespace default grants it with {apiGroups: [""], resources: ["pods"], verbs: ["list"]}')
    watched = caller.watch(f"{PODS}?watch=true")
    assert 'verbs: ["watch"]' in told(caller.until(lambda: watched.ends)[0], "forbidden")
    refused = caller.upgrade("POST", FORWARD)
    assert refused.status == 403, "another transport may be allowed"


# -- where it may hang, and break off ----------------------------------------------------------


POINTS = "accept", "tls", "request", "head", "body"


def test_a_server_that_hangs_is_told_with_what_it_was_asked_for(web, caller):
    for point in POINTS:
        web.fault("hang", point)
        said = told(caller.get(SERVICE, timeout=1.0), "timeout")
        assert said == f"{'TLS handshake' if point == 'accept' else sniroute_api.ASKING} ({HOST}:{web.port})", point
        web.heal()
        assert caller.get(SERVICE).status == 200
        wait_until(lambda: len(web.connections(ended=None)) == 1)
        web.end_connections("end")
        caller.until(lambda: not caller.apis.of("").idle)


@pytest.mark.parametrize("how", ["rst", "eof", "end"])
def test_a_server_that_breaks_off_is_a_failure_and_the_next_one_is_served(web, caller, how):
    for point in POINTS:
        web.fault(how, point, times=1)
        failed = caller.get(SERVICE)
        told(failed, "unreachable" if (how, point, failed.reason) == ("rst", "accept", "unreachable") else "reset")
        assert caller.get(SERVICE).status == 200
        web.end_connections("end")
        caller.until(lambda: not caller.apis.of("").idle)


def test_garbage_is_no_answer(web, caller):
    web.fault("garbage")
    told(caller.get(SERVICE), "answer")


@pytest.mark.parametrize("certificate, said", [
    ("untrusted", "unable to get local issuer certificate"), ("expired", "certificate has expired"),
    ("wrong_name", "IP address mismatch, certificate is not valid for '127.0.0.1'.")])
def test_a_certificate_that_is_not_trusted(make_cluster, call, certificate, said):
    cluster = make_cluster(certificate=certificate)
    assert said in told(call(cluster.kubeconfig()).get("/version"), "certificate")


def test_a_certificate_for_another_name_and_none_that_is_checked(make_cluster, call):
    cluster = make_cluster(certificate="wrong_name")
    path = cluster.kubeconfig(cluster={"insecure-skip-tls-verify": True, "certificate-authority-data": None})
    assert call(path).get("/version").status == 200


def test_the_name_that_the_certificate_has_to_have(web, call):
    assert call(web.kubeconfig(cluster={"tls-server-name": "a.example.test"})).get("/version").status == 200
    told(call(web.kubeconfig(cluster={"tls-server-name": "a.example.net"})).get("/version"), "certificate")


def test_a_server_that_is_gone_and_comes_back(web, caller):
    caller.get(SERVICE)
    web.down()
    assert "Connection refused" in told(caller.get(SERVICE), "unreachable")
    web.up()
    assert caller.get(SERVICE).status == 200


@pytest.mark.parametrize("code, reason", [(socket.EAI_NONAME, "name"), (socket.EAI_AGAIN, "resolver")])
def test_a_server_whose_name_does_not_resolve(web, call, monkeypatch, code, reason):
    """A resolver that nothing answers may take longer than the caller waits: so it is not asked here."""
    def none(host, *words, **more):
        if host == "no.such.host.invalid":
            raise socket.gaierror(code, "it does not resolve")
        return look(host, *words, **more)

    look = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", none)
    caller = call(web.kubeconfig(cluster={"server": "https://no.such.host.invalid"}))
    assert caller.get(SERVICE).reason == reason


def test_a_server_that_takes_no_connection_is_a_timeout_of_connecting(call, web, deaf):
    caller = call(web.kubeconfig(cluster={"server": f"https://{HOST}:{deaf[1]}"}))
    assert told(caller.get(SERVICE, timeout=0.3), "timeout") == f"connecting ({HOST}:{deaf[1]})"


def test_a_process_that_stands_still_and_goes_on(web, caller):
    caller.get(SERVICE)
    web.freeze_process()
    told(caller.get(SERVICE, timeout=0.3), "timeout")
    web.thaw_process()
    assert caller.get(SERVICE).status == 200


@pytest.mark.parametrize("ask", ["get", "watch", "upgrade"])
def test_what_is_cancelled_leaves_nothing_and_is_not_told(web, caller, ask):
    for point in POINTS:
        fault = web.fault("hang", point)
        got = []
        api = caller.apis.of("")
        job = {"get": lambda: api.get(SERVICE, got.append, monotonic() + 9),
               "watch": lambda: api.watch(f"{PODS}?watch=true", got.append, got.append),
               "upgrade": lambda: api.upgrade("POST", f"{POD}x/portforward", SPDY, got.append, monotonic() + 9)}[ask]()
        caller.until(lambda: web.hits(fault))
        count = len(got)
        job.cancel()
        job.cancel()
        assert job.phase == sniroute_api.OVER and not api.jobs
        caller.until(lambda: not web.connections(ended=None))
        assert len(got) == count
        web.heal()


def test_what_is_cancelled_before_it_has_begun(web, caller):
    job, got = caller.begin(SERVICE)
    job.cancel()
    assert caller.get(SERVICE).status == 200 and not got


# -- watches -----------------------------------------------------------------------------------


def test_a_watch_tells_what_happens_until_the_server_ends_it(web, caller):
    watched = caller.watch(f"{PODS}?watch=true")
    caller.until(lambda: watched.lines)
    web.pod("web-2", {}, labels={"app": "web", "x": "\u00fc" * 40000})
    caller.until(lambda: watched.lines[-1]["object"]["metadata"]["name"] == "web-2")
    web.end_connections("end")
    told(caller.until(lambda: watched.ends)[0], "reset")


def test_a_watch_that_ends_as_it_should(plain):
    caller = plain(says(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n'
                        b'9\r\n{"a":1}\n\n\r\n7\r\n{"b":2}\r\n1\r\n\n\r\n0\r\n\r\n'))
    watched = caller.watch("/x?watch=true")
    assert caller.until(lambda: watched.ends) == [None] and watched.lines == [{"a": 1}, {"b": 2}]


def test_a_watch_in_pieces_of_one_byte(plain):
    def handler(sock):
        says(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n')(sock)
        for byte in b'9\r\n{"a":1}\n{\r\n7\r\n"b":2}\n\r\n0\r\n\r\n':
            sock.sendall(bytes((byte,)))
    caller = plain(handler)
    watched = caller.watch("/x?watch=true")
    assert caller.until(lambda: watched.ends) == [None] and watched.lines == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("how", ["rst", "eof"])
def test_a_watch_that_is_cut(web, caller, how):
    watched = caller.watch(f"{PODS}?watch=true")
    caller.until(lambda: watched.lines)
    web.end_connections(how)
    told(caller.until(lambda: watched.ends)[0], "reset")


def test_a_watch_from_too_long_ago(web, caller):
    web.compact()
    watched = caller.watch(f"{PODS}?watch=true&resourceVersion=1")
    caller.until(lambda: watched.ends or watched.lines)
    assert watched.lines[0]["type"] == "ERROR" and watched.lines[0]["object"]["code"] == 410


def test_a_watch_whose_status_says_that_it_is_too_old(web, caller):
    web.fault("status", code=410)
    watched = caller.watch(f"{PODS}?watch=true")
    told(caller.until(lambda: watched.ends)[0], "expired")


@pytest.mark.parametrize("line, said", [(b"x\n", "no object in JSON"), (b"x" * 2000, "a line of more than")])
def test_a_watch_of_nonsense(plain, monkeypatch, line, said):
    monkeypatch.setattr(sniroute_api, "EVENT_MAX", 1000)
    caller = plain(says(b"HTTP/1.1 200 OK\r\n\r\n" + line))
    watched = caller.watch("/x?watch=true")
    assert said in told(caller.until(lambda: watched.ends)[0], "answer")


def test_a_watch_that_is_cancelled_by_what_it_tells(web, caller):
    web.pod("web-2", {})
    got, jobs = [], []

    def on_event(line):
        got.append(line)
        jobs[0].cancel()

    jobs.append(caller.apis.of("").watch(f"{PODS}?watch=true", on_event, got.append))
    caller.until(lambda: got)
    caller.until(lambda: not web.connections(ended=None))
    assert len(got) == 1


def test_a_watch_may_be_silent_for_longer_than_its_start(web, caller, monkeypatch):
    monkeypatch.setattr(sniroute_api, "WATCH_START", 1.0)
    version = web.get("pods", "web-1")["metadata"]["resourceVersion"]
    watched = caller.watch(f"{PODS}?watch=true&resourceVersion={version}")
    caller.until(lambda: watched.job.is_streaming)
    began = monotonic()
    caller.until(lambda: monotonic() > began + 1.1)
    assert not watched.ends
    web.fault("hang")
    watched = caller.watch(f"{PODS}?watch=true")
    told(caller.until(lambda: watched.ends)[0], "timeout")


# -- upgrades ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method, headers", [("POST", SPDY), ("GET", WEBSOCKET)])
def test_an_upgrade_hands_its_wire_over(web, caller, method, headers):
    ends = []
    web.fault("ping", "upgraded")
    upgraded = caller.upgrade(method, FORWARD, headers)
    heard = [upgraded.rest]
    upgraded.wire.on_data, upgraded.wire.on_end = heard.append, ends.append
    caller.until(lambda: len(b"".join(heard)) >= 12)
    session, = web.sessions()
    assert session["protocol"] == ("portforward.k8s.io" if method == "POST" else "SPDY/3.1+portforward.k8s.io")
    assert not caller.apis.of("").idle and not caller.apis.of("").jobs
    web.end_sessions("end")
    assert caller.until(lambda: ends) == [None]


def test_bytes_behind_the_101_belong_to_the_next_protocol(plain):
    caller = plain(says(b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nA: b\r\n\r\nfirst"))
    ends = []

    def done(result):
        result.wire.on_end = ends.append
        got.append(result)

    got = []
    caller.apis.of("").upgrade("POST", "/x", SPDY, done, monotonic() + 9)
    caller.until(lambda: ends)
    assert got[0].rest == b"first" and got[0].headers["a"] == "b" and ends == [None]


def test_an_upgrade_that_is_refused_is_a_reply_and_the_connection_stays(web, caller):
    for action, code in (("status", 403), ("status", 404), ("text", 400), ("text", 403), ("status", 500)):
        web.fault(action, code=code, times=1)
        assert caller.upgrade("POST", FORWARD).status == code
    caller.upgrade("GET", FORWARD, WEBSOCKET).wire.close()
    assert len(web.connections()) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("upgrades", [False, True])
def test_a_redirect_is_not_followed(plain, serve, status, upgrades):
    """A request to an API server, with what proves who we are, goes to that server."""
    elsewhere = serve(read_all)
    to = f"http://{HOST}:{elsewhere.address[1]}/"
    there = plain(says(f"HTTP/1.1 {status} Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()))
    result = there.upgrade("POST", FORWARD) if upgrades else there.get(PODS)
    assert isinstance(result, Reply) and result.status == status, result
    assert elsewhere.accepted == 0


def test_an_upgrade_that_is_answered_with_a_page_without_end(plain, monkeypatch):
    monkeypatch.setattr(sniroute_api.Upgrade, "body_max", 1000)
    told(plain(says(b"HTTP/1.1 502 no\r\n\r\n" + b"x" * 2000)).upgrade("POST", "/x"), "answer")


@pytest.mark.parametrize("once, asked", [(False, 2), (True, 1)])
@pytest.mark.parametrize("fault", ["hang", "rst"])
def test_what_may_do_something_is_asked_for_once(web, caller, monkeypatch, fault, once, asked):
    """A kept connection is dead at times, and a request on it is sent again; but it may have arrived."""
    monkeypatch.setattr(sniroute_api, "SILENT", 0.1)
    caller.get(PODS)
    web.fault(fault, resource="pods/portforward", times=1)
    got = []
    caller.apis.of("").upgrade("GET", FORWARD, WEBSOCKET, got.append, monotonic() + (0.3 if once else 9), once=once)
    result, = caller.until(lambda: got)
    assert len(web.requests(resource="pods/portforward")) == asked
    if once:
        told(result, "timeout" if fault == "hang" else "reset")
    else:
        result.wire.close()


# -- all of them -------------------------------------------------------------------------------


def test_a_cluster_whose_certificate_is_not_checked_is_warned_of_once(web, call, monkeypatch):
    monkeypatch.setattr(sniroute_credentials, "LOOK_EVERY", 0)
    warnings = []
    unchecked = {"insecure-skip-tls-verify": True, "certificate-authority-data": None}
    caller = call(web.kubeconfig())
    caller.apis.warn = warnings.append
    assert caller.get(SERVICE).status == 200 and warnings == []
    for more in ({}, {"tls-server-name": "other.example.test"}):
        web.kubeconfig(cluster={**unchecked, **more})
        assert caller.get(SERVICE).status == 200
    assert caller.get(SERVICE, "test").status == 200
    assert warnings == ["insecure-skip-tls-verify: the certificate of cluster cluster is not checked, so whoever is "
                        "between reads and changes all, and has our credentials"]


def test_the_same_name_is_the_same_api(caller, monkeypatch):
    monkeypatch.setattr(sniroute_api, "APIS_MAX", 2)
    first = caller.apis.of("a")
    assert caller.apis.of("b") is not first and caller.apis.of("a") is first
    caller.apis.of("c")
    assert list(caller.apis.known) == ["a", "c"], "names may come from strangers"


def test_a_context_that_is_not_there(web, caller):
    assert "no context 'prod'" in told(caller.get(SERVICE, "prod"), "context")
    assert caller.get(SERVICE, "test").status == 200
    assert caller.apis.of("test").context.name == "test"


def test_the_end_of_all_tells_nobody(web, call):
    caller = call(web.kubeconfig())
    fault = web.fault("hang", "body")
    _, got = caller.begin(SERVICE)
    watched = caller.watch(f"{PODS}?watch=true")
    caller.until(lambda: web.hits(fault) == 2)
    caller.apis.close()
    caller.until(lambda: not web.connections(ended=None))
    assert got == watched.ends == []
