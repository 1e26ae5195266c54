"""Tests of sniroute_redis.py, in its order: against the real redis-server, and against servers that break rules."""

from __future__ import annotations

import os
import random
import signal
import socket
import ssl
import threading

import pytest

import sniroute_redis
from conftest import HOST
from sniroute_loop import monotonic
from sniroute_redis import DIAL_REASONS, Script
from sniroute_refusals import Failed
from sniroute_resp import REASONS, Reader
from testbed.ports import free_block
from testbed.redis import USER, Admin, Asker, Heard, RedisServer

WITHOUT_HELLO = "--rename-command", "HELLO", ""  # so it speaks RESP2, as before 6.0


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """What was lost is tried again soon."""
    monkeypatch.setattr(sniroute_redis, "AGAIN_FIRST", 0.01)
    monkeypatch.setattr(sniroute_redis, "AGAIN_LAST", 0.1)


@pytest.fixture(scope="module")
def old_redis(tmp_path_factory):
    """One that speaks RESP2 only, for all tests of this module."""
    with free_block(1) as (port, _):
        server = RedisServer(tmp_path_factory.mktemp("old"), port, *WITHOUT_HELLO, *USER).start()
        yield server
        server.stop()


@pytest.fixture(params=["RESP3", "RESP2"])
def server(request, shared_redis, old_redis):
    """A Redis, of each protocol; other tests use it, too."""
    found = shared_redis if request.param == "RESP3" else old_redis
    found.tell("FLUSHALL")
    return found


@pytest.fixture
def asker(server, ask_redis):
    """A caller of it, which is up."""
    asker = ask_redis(server.url)
    asker.up()
    return asker


@pytest.fixture
def says(serve, ask_redis):
    """says(answer, answer, ...) -> a caller of a server that answers its questions so, and then closes, or stays."""
    def make(*answers: bytes, login: str = "", stays: bool = False) -> Asker:
        def handler(sock: socket.socket) -> None:
            reader, left = Reader(), list(answers)
            while left and (data := sock.recv(65536)):
                for _ in reader.feed(data):
                    if left:
                        sock.sendall(left.pop(0))
            while stays and sock.recv(65536):
                pass

        found = serve(handler)
        asker = ask_redis(f"redis://{login}{HOST}:{found.address[1]}")
        asker.server = found
        return asker
    return make


GREETING = b"%1\r\n$4\r\nmode\r\n$10\r\nstandalone\r\n", b"+PONG\r\n", b"*1\r\n$6\r\nmaster\r\n"


def failed(result, reason: str) -> str:
    """The words of a Failed with this reason."""
    assert isinstance(result, Failed), result
    assert result.reason == reason and reason in REASONS, (result.reason, str(result))
    return str(result)


def test_the_reasons_of_a_dial_have_sentences():
    assert {*DIAL_REASONS.values(), "name", "resolver", "reset", "certificate", "tls"} <= REASONS.keys()


# -- questions ---------------------------------------------------------------------------------


def test_questions_are_answered_in_order(asker, server):
    assert asker.redis.server.protocol == (3 if server.words.count("HELLO") == 0 else 2)
    got: list[int] = []
    for _ in range(5000):
        asker.redis.ask("INCR", "n", done=got.append)
    assert asker.ask("GET", "n") == b"5000" and got == list(range(1, 5001))
    assert asker.downs == [] and len(asker.ups) == 1


def test_values_of_all_kinds_come_back(asker):
    assert asker.ask("SET", "key", b"\0\r\n\xff", "PX", 60000, "NX") == "OK"
    assert asker.ask("SET", "key", "x", "NX") is None and asker.ask("GET", "key") == b"\0\r\n\xff"
    assert asker.ask("MGET", "key", "none") == [b"\0\r\n\xff", None] and 0 < asker.ask("PTTL", "key") <= 60000
    large = bytes(5 << 20)
    assert asker.ask("SET", "large", large, timeout=10) == "OK" and asker.ask("GET", "large", timeout=10) == large
    assert asker.ask("EVAL", "return {1, {}, redis.error_reply('NO x')}", 0)[:2] == [1, []]


def test_an_error_of_the_server_is_failed(asker):
    asker.ask("SET", "key", "text")
    assert failed(asker.ask("LPUSH", "key", "x"), "answer").startswith("WRONGTYPE ")
    assert failed(asker.ask("NOCOMMAND", "secret"), "answer") == "ERR unknown command 'NOCOMMAND'"
    assert asker.ask("PING") == "PONG" and asker.downs == []


def test_a_script_is_sent_once(asker, server):
    script = Script("redis.call('SET', KEYS[1], ARGV[1]) return ARGV[1]")
    server.tell("SCRIPT", "FLUSH")
    server.tell("CONFIG", "RESETSTAT")
    for word in (b"1", b"2", b"3"):
        got: list[bytes] = []
        asker.redis.run(script, ["key"], [word], got.append)
        assert got == [] and asker.until(lambda: got) == [word]
    stats = server.tell("INFO", "commandstats").decode()
    assert "cmdstat_eval:calls=1," in stats and "cmdstat_evalsha:calls=3," in stats
    assert asker.ask("GET", "key") == b"3"


@pytest.mark.parametrize("text, reason", [
    ("return nonsense", "answer"), ("return redis.error_reply('OOM x')", "oom"),
    ("return redis.call('SET', 'a')", "answer")])
def test_a_script_that_fails_has_a_reason(asker, text, reason):
    got: list[Failed] = []
    asker.redis.run(Script(text), ["a"], [], got.append)
    failed(asker.until(lambda: got)[0], reason)


def test_a_fault_in_a_callback_is_its_owners(asker):
    def raises(answer):
        raise ZeroDivisionError

    asker.redis.ask("PING", done=raises)
    got = asker.begin("PING")
    while not got:
        asker.loop.turn()
    assert got == ["PONG"] and len(asker.faults) == 1 and "ZeroDivisionError" in asker.faults.pop()


def test_too_many_questions_are_refused(asker, monkeypatch):
    monkeypatch.setattr(sniroute_redis, "ASKED_MAX", 3)
    got = [asker.begin("PING") for _ in range(5)]
    asker.until(lambda: all(got))
    assert [one[0] for one in got[:3]] == ["PONG"] * 3 and all(failed(one[0], "full") for one in got[3:])
    assert asker.ask("PING") == "PONG"


def test_a_server_that_reads_nothing_fills_nobodys_memory(asker, server, monkeypatch):
    monkeypatch.setattr(sniroute_redis, "UNSENT_MAX", 1 << 20)
    server.process.send_signal(signal.SIGSTOP)
    try:
        got: list[list] = []
        while not got or not got[-1]:
            got.append(asker.begin("SET", "key", bytes(1 << 20), timeout=20))
            for _ in range(3):
                asker.tick.set(monotonic() + 0.005)
                asker.loop.turn()
            assert len(got) < 30
        failed(got[-1][0], "full")
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert asker.until(lambda: all(got)) and [one[0] for one in got[:-1]] == ["OK"] * (len(got) - 1)


def test_nobody_is_called_behind_the_end(server, ask_redis):
    asker = ask_redis(server.url)
    got = [asker.begin("PING")]  # waits for a connection
    asker.redis.close()
    other = ask_redis(server.url)
    other.up()
    got.append(other.begin("PING"))
    other.redis.close()
    for each in (asker, other):
        for _ in range(3):
            each.tick.set(monotonic())
            each.loop.turn()
    assert got == [[], []] and asker.downs == other.downs == []
    assert asker.begin("PING", timeout=0) == [] and not asker.redis.waiting


def test_a_callback_may_end_it(asker):
    asker.redis.ask("PING", done=lambda answer: asker.redis.close())
    after = asker.begin("PING")
    asker.until(lambda: asker.redis.state == "closed")
    assert after == [] and asker.downs == []


# -- who we are --------------------------------------------------------------------------------


def url_of(server: RedisServer, login: str = "", path: str = "", scheme: str = "redis") -> str:
    return f"{scheme}://{login}{HOST}:{server.port}{path}"


def test_a_user_and_a_database(server, ask_redis):
    asker = ask_redis(url_of(server, "app:secret@", "/3"))
    assert asker.ask("ACL", "WHOAMI") == b"app", "what is asked before it is up waits"
    asker.ask("SET", "key", "3")
    assert server.tell("GET", "key") is None
    assert asker.ask("CLIENT", "GETNAME") == b"sniroute"


@pytest.mark.parametrize("login, path, reason", [
    ("app:wrong@", "", "login"), ("nobody:secret@", "", "login"), ("app:secret@", "/99", "database")])
def test_a_login_that_is_refused_is_tried_again(server, ask_redis, login, path, reason):
    asker = ask_redis(url_of(server, login, path))
    said = failed(asker.ask("PING"), reason)
    assert said.startswith(f"{HOST}:{server.port}: ") and "secret" not in said and "wrong@" not in said
    assert failed(asker.ask("PING"), reason) == said, "at once, now"
    first = asker.redis.since
    asker.until(lambda: asker.redis.since > first + 0.1, what="more tries")
    assert [one.reason for one in asker.downs] == [reason], "it is told once"


def test_a_password_that_changes(server, ask_redis):
    asker = ask_redis(url_of(server, "app:secret@"))
    asker.up()
    server.tell("ACL", "SETUSER", "app", "resetpass", ">other")
    server.tell("CLIENT", "KILL", "USER", "app")
    try:
        assert "secret" not in str(asker.down("login"))
        failed(asker.ask("PING"), "login")
    finally:
        server.tell("ACL", "SETUSER", "app", "resetpass", ">secret")
    asker.up()
    assert asker.ask("PING") == "PONG" and [one.reason for one in asker.downs] == ["reset", "login"]


def test_a_server_with_a_password_and_a_caller_without(redis_server, ask_redis):
    server = redis_server("--requirepass", "pass")
    failed(ask_redis(server.url).ask("PING"), "login")
    asker = ask_redis(url_of(server, ":pass@"))
    assert asker.ask("PING") == "PONG"


def test_a_user_who_may_little(server, ask_redis):
    """Neither ROLE nor PING nor CLIENT: nothing of the greeting is needed but the login."""
    server.tell("ACL", "SETUSER", "little", "on", ">p", "~mine:*", "resetchannels", "+get", "+subscribe")
    asker = ask_redis(url_of(server, "little:p@"))
    assert asker.ask("GET", "mine:a") is None
    failed(asker.ask("GET", "other"), "forbidden")
    failed(asker.ask("SET", "mine:a", "x"), "forbidden")
    heard = Heard(asker, "channel")
    asker.until(lambda: heard.downs)
    failed(heard.downs[0], "forbidden")
    assert asker.downs == []


def test_a_server_that_repeats_what_it_was_told(says):
    """Before 7.0 the words of a command that it does not know are in the error."""
    said = b"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `app`, `SECRET`, \r\n"
    asker = says(said, said.replace(b"HELLO", b"AUTH"), login="app:SECRET@")
    assert "SECRET" not in failed(asker.ask("PING"), "answer")
    assert "SECRET" not in "".join(map(str, asker.downs))


# -- TLS ---------------------------------------------------------------------------------------


@pytest.fixture
def tls_redis(redis_server, certificates, free_ports):
    """tls_redis(name of a certificate) -> the port of a Redis that speaks TLS, and the server."""
    def make(name: str = "edge") -> tuple[int, RedisServer]:
        port = free_ports(1)[0]
        file = certificates / f"{name}.pem"
        server = redis_server("--tls-port", port, "--tls-cert-file", file, "--tls-key-file", file, "--tls-auth-clients",
                              "no", "--tls-ca-cert-file", certificates / "ca.pem")
        return port, server
    return make


@pytest.fixture
def trust(certificates):
    return ssl.create_default_context(cafile=str(certificates / "ca.pem"))


def test_a_server_that_speaks_tls(tls_redis, ask_redis, trust):
    port, server = tls_redis()
    asker = ask_redis(f"rediss://localhost:{port}/1", trust)
    large = bytes(1 << 20)
    assert asker.ask("SET", "key", large) == "OK" and asker.ask("GET", "key") == large
    heard = Heard(asker, "channel")
    asker.until(lambda: heard.ups)
    server.tell("PUBLISH", "channel", "x")
    assert asker.until(lambda: heard.messages) == [b"x"]
    server.tell("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    failed(asker.down("reset"), "reset")
    assert asker.ask("GET", "key") == large
    assert ask_redis(f"rediss://{HOST}:{port}", trust).ask("PING") == "PONG", "its certificate has the address, too"


@pytest.mark.parametrize("name, says", [
    ("untrusted", "unable to get local issuer certificate"), ("expired", "certificate has expired"),
    ("wrong_name", "Hostname mismatch")])
def test_a_certificate_that_is_not_trusted(tls_redis, ask_redis, trust, name, says):
    port, _ = tls_redis(name)
    assert says in failed(ask_redis(f"rediss://localhost:{port}", trust).ask("PING"), "certificate")


def test_one_speaks_tls_and_the_other_does_not(shared_redis, tls_redis, ask_redis, trust, monkeypatch):
    port, _ = tls_redis()
    result = ask_redis(f"redis://{HOST}:{port}").ask("PING", timeout=10)
    assert result.reason in ("reset", "answer"), result
    monkeypatch.setattr(sniroute_redis, "TRY_MAX", 0.3)
    result = ask_redis(url_of(shared_redis, scheme="rediss"), trust).ask("PING")
    assert result.reason in ("tls", "reset", "timeout"), result  # Redis waits for the end of a line


# -- away, and back ----------------------------------------------------------------------------


def test_what_is_asked_after_a_loss_is_asked_again_by_nobody_and_waits(asker, server):
    """CLIENT KILL: what comes behind it has to wait for the next connection, and no longer."""
    server.tell("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert "the connection" in failed(asker.down("reset"), "reset")
    assert asker.redis.server is None and asker.ask("PING") == "PONG"
    assert len(asker.ups) == 2 and len(asker.downs) == 1


def test_a_question_whose_connection_breaks_is_failed(asker, server):
    got = asker.begin("BLPOP", "nothing", 0, timeout=20)
    asker.until(lambda: "cmd=blpop" in server.tell("CLIENT", "LIST").decode())
    behind = asker.begin("PING", timeout=20)
    server.tell("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    asker.until(lambda: got and behind)
    failed(got[0], "reset")
    failed(behind[0], "reset")
    assert asker.ask("PING") == "PONG"


def test_a_pause_that_is_longer_than_the_time_of_a_question(asker, server):
    server.tell("CLIENT", "PAUSE", 1000, "ALL")  # a busy host may stop this thread for half of it
    got = [asker.begin("INCR", "n", timeout=timeout) for timeout in (20, 0.1, 20)]
    asker.until(lambda: all(got))
    assert {failed(one[0], "timeout") for one in got} == {f"{HOST}:{server.port}: it does not answer"}
    asker.up()
    assert asker.ask("GET", "n", timeout=5) in (None, b"1", b"2", b"3"), "nobody knows"
    assert [one.reason for one in asker.downs] == ["timeout"]


def test_a_server_that_stands_still(server, ask_redis, monkeypatch):
    """SIGSTOP: nobody asks, so it is the PING that notices; then nothing can be had, until SIGCONT."""
    monkeypatch.setattr(sniroute_redis, "IDLE", 0.05)
    monkeypatch.setattr(sniroute_redis, "ANSWER_MAX", 1.0)
    asker = ask_redis(server.url)
    heard = Heard(asker, "channel")
    asker.until(lambda: heard.ups and asker.ups)
    server.tell("PUBLISH", "channel", "x")
    asker.until(lambda: heard.messages)
    since = monotonic()
    asker.until(lambda: min(asker.redis.heard, heard.subscription.heard) > since + 0.2, what="several PINGs")
    assert asker.downs == heard.downs == [], "as long as it answers, all is well"
    server.process.send_signal(signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:  # short times only while it stands still
            patch.setattr(sniroute_redis, "ANSWER_MAX", 0.1)
            patch.setattr(sniroute_redis, "TRY_MAX", 0.2)
            for link in (asker.redis, heard.subscription):
                link.timer.set(monotonic())
            assert "does not answer PING" in str(asker.down("timeout"))
            asker.until(lambda: heard.downs)
            failed(heard.downs[0], "timeout")
            asker.until(lambda: asker.redis.failed is not None)
            assert failed(asker.ask("PING"), "timeout") == f"{HOST}:{server.port}: logging in"
    finally:
        server.process.send_signal(signal.SIGCONT)
    asker.up()
    asker.until(lambda: len(heard.ups) == 2)
    assert asker.ask("PING", timeout=2) == "PONG"


def test_a_process_of_ours_that_stood_still_loses_nothing(asker):
    """The times of the PINGs are over, too, and still the server is there."""
    asker.ask("PING")
    line = asker.redis.line
    line.heard -= 3600
    asker.redis.timer.set(monotonic())
    asker.until(lambda: asker.redis.heard > monotonic() - 1)
    assert asker.downs == []


def test_a_server_that_ends_and_comes_back_empty(redis_server, ask_redis):
    server = redis_server()
    asker = ask_redis(server.url)
    asker.ask("SET", "key", "x")
    heard = Heard(asker, "channel")
    asker.until(lambda: heard.ups)
    server.stop(signal.SIGTERM)
    assert "Connection refused" in str(asker.down("unreachable"))
    got = asker.begin("PING")
    asker.loop.turn()
    failed(got[0], "unreachable")  # at once
    asker.until(lambda: asker.redis.delay == sniroute_redis.AGAIN_LAST)
    server.start()
    asker.up()
    assert asker.ask("GET", "key") is None
    asker.until(lambda: len(heard.ups) == 2)
    assert [one.reason for one in asker.downs] == ["reset", "unreachable"] == [one.reason for one in heard.downs]
    assert len(asker.ups) == 2


def test_a_server_that_reads_its_data_still(redis_server, ask_redis):
    server = redis_server("--key-load-delay", 300_000, "--loading-process-events-interval-bytes", 1024)
    for number in range(15):
        server.tell("SET", f"key{number}", os.urandom(2000))  # no text, which is compressed
    server.tell("SAVE")
    server.stop()
    server.start()
    asker = ask_redis(server.url)
    failed(asker.down("loading"), "loading")
    failed(asker.ask("GET", "key1"), "loading")
    server.tell("CONFIG", "SET", "key-load-delay", 0)
    asker.up()
    assert asker.ask("STRLEN", "key1") == 2000


def test_a_name_that_does_not_resolve(ask_redis):
    result = ask_redis("redis://redis.invalid").ask("PING", timeout=20)
    assert result.reason in ("name", "resolver"), result


def test_a_server_that_drops_us_is_not_asked_in_a_loop(says, monkeypatch):
    monkeypatch.setattr(sniroute_redis, "AGAIN_FIRST", 0.05)
    monkeypatch.setattr(sniroute_redis, "AGAIN_LAST", 10.0)
    asker = says(*GREETING)
    asker.redis.delay = 0.05
    asker.until(lambda: len(asker.downs) == 3)
    assert asker.redis.delay == 0.05 * 8 and asker.server.accepted == 3, "each wait is longer than the one before"
    assert len(asker.ups) == 3


def test_a_connection_that_was_up_for_long_is_tried_again_at_once(asker, server, monkeypatch):
    monkeypatch.setattr(sniroute_redis, "STEADY", 0.0)
    asker.redis.delay = sniroute_redis.AGAIN_LAST
    server.tell("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    asker.down("reset")
    assert asker.redis.timer.when - asker.redis.since <= sniroute_redis.AGAIN_FIRST


@pytest.mark.parametrize("answers, reason", [
    ([], "reset"), ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "answer"), ([b"\0"], "answer"), ([b"+OK\r\n"], "answer"),
    ([b"-DENIED Redis is running in protected mode\r\n"], "forbidden"),
    ([b"-ERR max number of clients reached\r\n"], "full"), ([b"*1\r\n" * 99], "answer"),
    ([*GREETING[:2], b"*1\r\n$5\r\nslave\r\n"], "readonly"),
])
def test_a_server_that_greets_otherwise_has_a_reason(says, answers, reason):
    assert failed(says(*answers).ask("PING"), reason).startswith(f"{HOST}:")


@pytest.mark.parametrize("answer, reason", [
    (b"+O\nK\r\n", "answer"), (b"+PONG\r\n+PONG\r\n", "answer"), (b"$1\r\na", "timeout")])
def test_an_answer_that_is_none_ends_the_connection(says, answer, reason):
    asker = says(*GREETING, answer, stays=True)
    asker.up()
    asker.begin("PING", timeout=0.1)
    failed(asker.down(reason), reason)


def test_a_server_that_does_not_know_us_any_more_is_greeted_again(says):
    asker = says(*GREETING, b"-NOAUTH Authentication required.\r\n", stays=True)
    failed(asker.ask("PING"), "login")
    failed(asker.down("login"), "login")
    asker.until(lambda: asker.server.accepted == 2)


def test_noise_raises_nothing(serve, ask_redis, monkeypatch):
    """Whatever comes, and wherever it is cut: the connection ends, and the next one is tried."""
    monkeypatch.setattr(sniroute_redis, "AGAIN_LAST", 0.01)
    dice = random.Random(22)

    def handler(sock: socket.socket) -> None:
        noise = bytes(dice.choices(b"*$%>|+-:,#_\r\n0123456789\xff", k=40)) + b"\r\n."
        for answer in (*GREETING[:dice.randrange(4)], noise):
            sock.recv(65536)
            for _ in range(2):
                cut = dice.randrange(len(answer))
                sock.sendall(answer[:cut])
                answer = answer[cut:]
            sock.sendall(answer)

    server = serve(handler)
    asker = ask_redis(f"redis://{HOST}:{server.address[1]}")
    heard = Heard(asker, "channel")
    results: list[object] = []
    while server.accepted < 60:
        for _ in range(3):
            asker.redis.ask("GET", "a", done=results.append, timeout=0.5)
        asked = len(results)
        asker.until(lambda: len(results) > asked)
    assert all(result.reason in REASONS for result in [*asker.downs, *heard.downs])
    assert heard.messages == []


def test_what_a_server_pushes_is_no_answer(says):
    asker = says(*GREETING, b">2\r\n+invalidate\r\n_\r\n+PONG\r\n>1\r\n+x\r\n", stays=True)
    assert asker.ask("PING") == "PONG" and asker.downs == []


def test_an_answer_in_pieces_is_one(serve, ask_redis):
    said = threading.Event()

    def handler(sock):
        for answer in (*GREETING, b"$3\r\nabc\r\n"):
            sock.recv(65536)
            for byte in answer:
                sock.sendall(bytes((byte,)))
        said.wait(10)

    asker = ask_redis(f"redis://{HOST}:{serve(handler).address[1]}")
    assert asker.ask("GET", "a") == b"abc"
    said.set()


def test_a_server_that_takes_no_connection(deaf, ask_redis, monkeypatch):
    monkeypatch.setattr(sniroute_redis, "TRY_MAX", 0.2)
    asker = ask_redis(f"redis://{HOST}:{deaf[1]}")
    late = asker.begin("PING", timeout=0.1)
    assert failed(asker.ask("PING", timeout=20), "timeout") == f"{HOST}:{deaf[1]}: connecting"
    assert failed(late[0], "timeout").endswith("connecting")


# -- what a server may not do ------------------------------------------------------------------


def test_a_server_without_memory(redis_server, ask_redis):
    server = redis_server()
    asker = ask_redis(server.url)
    asker.up()
    server.tell("CONFIG", "SET", "maxmemory", 1)
    failed(asker.ask("SET", "key", "x"), "oom")
    got: list[Failed] = []
    asker.redis.run(Script("return redis.call('SET', KEYS[1], '1')"), ["key"], [], got.append)
    failed(asker.until(lambda: got)[0], "oom")
    server.tell("CONFIG", "SET", "maxmemory", 0)
    assert asker.ask("SET", "key", "x") == "OK" and asker.downs == []


def test_a_master_that_becomes_a_replica(redis_server, shared_redis, ask_redis):
    server = redis_server()
    asker = ask_redis(server.url)
    asker.up()
    server.tell("REPLICAOF", HOST, shared_redis.port)
    got = [asker.begin("SET", "key", "x") for _ in range(2)]
    asker.until(lambda: all(got))
    assert all(failed(one[0], "readonly") for one in got)
    assert asker.until(lambda: asker.redis.failed) and asker.redis.failed.reason in ("readonly", "loading")
    assert asker.ask("GET", "key").reason in ("readonly", "loading"), "nor is it read"
    server.tell("REPLICAOF", "NO", "ONE")
    asker.up()
    assert asker.ask("SET", "key", "x") == "OK"


def test_a_part_of_a_cluster_says_so(redis_server, ask_redis, tmp_path, free_ports):
    """Another part has the one half of the keys, and the Cluster is not whole."""
    port, bus = free_ports(2)
    (tmp_path / "nodes").write_text(
        f"{'a' * 40} {HOST}:1@2 myself,master - 0 0 1 connected 0-8191\n"
        f"{'b' * 40} {HOST}:{port}@{port} master - 0 0 2 connected 8192-16383\nvars currentEpoch 2 lastVoteEpoch 0\n")
    server = redis_server("--cluster-enabled", "yes", "--cluster-config-file", tmp_path / "nodes",
                          "--cluster-port", bus, "--cluster-allow-reads-when-down", "yes")
    asker = ask_redis(server.url)
    assert asker.up().mode == "cluster"
    assert failed(asker.ask("GET", "foo"), "moved") == f"MOVED 12182 {HOST}:{port}"
    assert failed(asker.ask("SET", "foo", "x"), "moved").startswith("CLUSTERDOWN ")
    assert failed(asker.ask("MGET", "foo", "bar"), "moved").startswith("CROSSSLOT ")
    assert asker.ask("GET", "bar") is None and asker.downs == []
    failed(ask_redis(url_of(server, path="/1")).ask("PING"), "database")


# -- subscriptions -----------------------------------------------------------------------------


def test_what_is_published_is_heard(asker, server):
    heard, other = Heard(asker, "channel"), Heard(asker, "other")
    asker.until(lambda: heard.ups and other.ups)
    words = [b"%d" % number for number in range(100)]
    for word in words:
        asker.redis.ask("PUBLISH", "channel", word, done=lambda answer: None)
    asker.until(lambda: len(heard.messages) == 100)
    assert heard.messages == words and other.messages == []
    assert server.clients() == 3


def test_a_subscription_that_is_cut_comes_back(asker, server):
    heard = Heard(asker, "channel")
    asker.until(lambda: heard.ups)
    server.tell("CLIENT", "KILL", "TYPE", "pubsub")
    asker.until(lambda: len(heard.ups) == 2)
    failed(heard.downs[0], "reset")
    server.tell("PUBLISH", "channel", "again")
    assert asker.until(lambda: heard.messages) == [b"again"]
    assert asker.downs == [], "the other connection is not its business"


def test_a_subscription_is_up_when_the_server_has_confirmed_it(says, monkeypatch):
    monkeypatch.setattr(sniroute_redis, "TRY_MAX", 0.2)
    asker = says(*GREETING, stays=True)
    heard = Heard(asker, "channel")
    asker.until(lambda: heard.downs)
    assert heard.ups == [] and failed(heard.downs[0], "timeout").endswith("logging in")


def test_what_is_no_message_is_left_out(says):
    asker = says(*GREETING, b">3\r\n$9\r\nsubscribe\r\n$7\r\nchannel\r\n:1\r\n"
                 b">1\r\n$7\r\nmessage\r\n>0\r\n_\r\n+PONG\r\n*0\r\n"
                 b">3\r\n$7\r\nmessage\r\n$5\r\nother\r\n$1\r\na\r\n>3\r\n$7\r\nmessage\r\n$7\r\nchannel\r\n$1\r\nb\r\n"
                 b"-ERR x\r\n", stays=True)
    heard = Heard(asker, "channel")
    asker.until(lambda: heard.downs)
    assert heard.messages == [b"b"] and failed(heard.downs[0], "answer").endswith("ERR x")


def test_a_fault_in_hearing_is_its_owners(asker):
    heard: list[bytes] = []

    def hear(message: bytes) -> None:
        heard.append(message)
        raise ZeroDivisionError

    up: list[object] = []
    asker.redis.subscribe("channel", hear, up.append)
    asker.until(lambda: up)
    for _ in range(2):
        asker.redis.ask("PUBLISH", "channel", "x", done=lambda answer: None)
    while len(heard) < 2:
        asker.loop.turn()
    assert len(asker.faults) == 2
    asker.faults.clear()


# -- Sentinels ---------------------------------------------------------------------------------

# INFO tells of replicas and their state.  The period of PING stays: five of them without an answer rule a replica out.
QUICK = "info-period", 50, "ask-period", 50, "tilt-period", 100


@pytest.fixture
def sentinel(redis_server):
    """sentinel(master) -> a Sentinel that watches it."""
    def make(master: RedisServer) -> RedisServer:
        made = redis_server(sentinel=True)
        made.tell("SENTINEL", "DEBUG", *QUICK)
        watch(made, master)
        return made
    return make


def watch(sentinel: RedisServer, master: RedisServer) -> None:
    sentinel.tell("SENTINEL", "MONITOR", "main", HOST, master.port, 1)
    sentinel.tell("SENTINEL", "SET", "main", "down-after-milliseconds", 10_000, "failover-timeout", 1000)


def sentinel_url(*sentinels: int, login: str = "", master: str = "main") -> str:
    return f"redis+sentinel://{login}{','.join(f'{HOST}:{port}' for port in sentinels)}/{master}"


def test_a_failover_is_followed(redis_server, sentinel, ask_redis, free_ports):
    """One Sentinel is dead, the other one makes the replica the master after the old one was killed."""
    master = redis_server()
    replica = redis_server("--replicaof", f"{HOST} {master.port}")
    alive = sentinel(master)
    asker = ask_redis(sentinel_url(free_ports(1)[0], alive.port))
    assert asker.ask("SET", "key", "kept", timeout=10) == "OK" and asker.redis.master == (HOST, master.port)
    heard = Heard(asker, "channel")
    asker.until(lambda: heard.ups)
    asker.until(lambda: replica.tell("GET", "key") == b"kept" and alive.tell("SENTINEL", "REPLICAS", "main"))
    alive.tell("SENTINEL", "SET", "main", "down-after-milliseconds", 200)  # before that a busy host would make it fail over
    master.stop()
    asker.until(lambda: asker.redis.server and asker.redis.master == (HOST, replica.port), 30, "the new master")
    assert asker.ask("GET", "key") == b"kept" and asker.ask("SET", "key", "new") == "OK"
    asker.until(lambda: len(heard.ups) == 2)
    replica.tell("PUBLISH", "channel", "x")
    assert asker.until(lambda: heard.messages) == [b"x"]
    assert asker.redis.search.order[0] == (HOST, alive.port), "the one that answers is asked first"


def test_a_master_that_was_left_behind_is_left(redis_server, shared_redis, sentinel, ask_redis, monkeypatch):
    """It goes on to answer, and the Sentinels have another one."""
    monkeypatch.setattr(sniroute_redis, "CHECK", 0.05)
    old = redis_server()
    alive = sentinel(old)
    asker = ask_redis(sentinel_url(alive.port))
    asker.up()
    alive.tell("SENTINEL", "REMOVE", "main")
    since = monotonic()
    asker.until(lambda: monotonic() > since + 0.2, what="several checks")
    assert asker.downs == [], "Sentinels that know nothing change nothing"
    watch(alive, shared_redis)
    assert str(asker.down("changed")) == f"{HOST}:{shared_redis.port} instead of {HOST}:{old.port}"
    asker.up()
    assert asker.redis.master == (HOST, shared_redis.port)


def test_a_master_that_says_it_is_a_replica_is_not_taken(redis_server, shared_redis, sentinel, ask_redis):
    replica = redis_server("--replicaof", f"{HOST} {shared_redis.port}")
    asker = ask_redis(sentinel_url(sentinel(replica).port))
    assert asker.down("readonly")
    asker.redis.close()


def test_sentinels_that_do_not_help(shared_redis, sentinel, ask_redis, free_ports, deaf, monkeypatch):
    dead, alive = free_ports(1)[0], sentinel(shared_redis).port
    said = failed(ask_redis(sentinel_url(dead, alive, master="other")).ask("PING", timeout=20), "master")
    assert said == (f"no Sentinel helps: {HOST}:{dead}: Connection refused; "
                    f"{HOST}:{alive}: it knows no master other")
    with monkeypatch.context() as patch:
        patch.setattr(sniroute_redis, "SENTINEL_MAX", 0.2)
        asker = ask_redis(sentinel_url(deaf[1]))
        assert "no answer within 0.2 s" in failed(asker.ask("PING", timeout=20), "timeout")
    assert "SENTINEL" in failed(ask_redis(sentinel_url(shared_redis.port)).ask("PING", timeout=20), "master")
    assert "redis+sentinel://" in failed(ask_redis(f"redis://{HOST}:{alive}").ask("PING", timeout=20), "answer")
    assert ask_redis(sentinel_url(deaf[1], dead, alive)).ask("PING", timeout=20) == "PONG"


def test_a_sentinel_with_a_password(redis_server, ask_redis):
    master, alive = redis_server("--requirepass", "pass"), redis_server("--requirepass", "pass", sentinel=True)
    admin = Admin(alive.path)
    assert admin.ask("AUTH", "pass") == "OK" and admin.ask("SENTINEL", "MONITOR", "main", HOST, master.port, 1) == "OK"
    admin.sock.close()
    assert ask_redis(sentinel_url(alive.port, login=":pass@")).ask("PING", timeout=20) == "PONG"
    failed(ask_redis(sentinel_url(alive.port, login=":wrong@")).ask("PING", timeout=20), "login")
    failed(ask_redis(sentinel_url(alive.port)).ask("PING", timeout=20), "login")
