"""Tests of sniroute_instances.py and sniroute_children.py: instances of a master, whose processes are stand-ins."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time

import pytest

import sniroute_children
import sniroute_instances
from conftest import HERE, HOST, connect, exit_code, linux, wait_until
from sniroute_children import (DEFAULTS, Inherited, Instance, NotDone, State, changed, filled, hidden, instance_of,
                               record_of, role_of)
from sniroute_instances import INSTANCES_MAX, KEY_ID, URL_VARIABLE
from sniroute_nodeurl import parse_url
from sniroute_refusals import SettingsError
from testbed.clients import program_path
from testbed.masters import FAKE, TIMES, url

AT = "127.0.0.1:18480/127.0.0.1:18481"


# -- URLs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, shown, config", [  # as the original has answered
    (f"client://k%20y@{AT},127.0.0.1:18482?mode=1&min=3&read=1h&log=event",
     f"client://k%20y@{AT},127.0.0.1:18482?log=event&min=3&mode=1&read=1h",
     f"client://k%20y@{AT},127.0.0.1:18482?block=0&dial=auto&dns=5m0s&lbs=0&log=event&min=3&mode=1&notcp=0&noudp=0"
     "&proxy=0&rate=0&read=1h&slot=65536&sni=none"),
    (f"server://{AT}?crt=b%20r&tls=1", f"server://{AT}?crt=b+r&log=info&tls=1",
     f"server://{AT}?block=0&crt=b+r&dial=auto&dns=5m0s&lbs=0&log=info&max=1024&mode=0&notcp=0&noudp=0&proxy=0&rate=0"
     "&read=0s&slot=65536&tls=1&type=0")])
def test_a_url_and_its_config_are_as_the_original_shows_them(given, shown, config):
    role = role_of(given)
    assert filled(given, Inherited("info").for_role(role)) == shown and filled(shown, DEFAULTS[role]) == config


@pytest.mark.parametrize("given", [f"server://{AT}", f"server://k@{AT}?type=3&lbs=1&block=12", f"client://{AT}?log=",
                                   f"client://tunnel.example.com:1/{HOST}:2?sni=a.example.com"])
def test_a_config_means_what_the_url_means(given):
    config = filled(given, DEFAULTS[role_of(given)])
    assert parse_url(config)._replace(sni="") == parse_url(given)._replace(sni="")


def test_servers_get_the_masters_certificate_and_clients_do_not():
    given = Inherited("warn", "2", "/c.pem", "/k.pem")
    assert parse_url(filled(f"server://{AT}", given.for_role("server")))[13:17] == parse_url(
        f"server://{AT}?tls=2&crt=/c.pem&key=/k.pem")[13:17]
    assert filled(f"server://{AT}?tls=1", given.for_role("server")) == \
        f"server://{AT}?crt=%2Fc.pem&key=%2Fk.pem&log=warn&tls=1"
    assert filled(f"client://{AT}", given.for_role("client")) == f"client://{AT}?log=warn"
    assert Inherited("", "0", "/c.pem").for_role("server") == {}


@pytest.mark.parametrize("given, words", [
    ("master://127.0.0.1:1", "Invalid URL scheme"), ("x", "Invalid URL scheme"), ("http://[::1", "Invalid URL format"),
    (f"server://{AT}\n", "Invalid URL format"), (f"server://\ud800@{AT}", "Invalid URL format"),
    (f"server://{AT}?log={'x' * 4096}", "Invalid URL format"), (f"server://{AT}?type=1", "QUIC"),
    (f"server://{HOST}:99999/{HOST}:1", "Invalid URL format"), (f"server://{AT}?what=1", "what"),
    (f"client://{HOST}:1", "target")])
def test_a_url_that_no_instance_can_have_is_refused_in_words(given, words):
    with pytest.raises(NotDone, match=words) as caught:
        role_of(given)
    assert caught.value.status == 400


@pytest.mark.parametrize("updates, wanted", [
    ({"role": "client"}, f"client://k@{AT}?tls=1"), ({"password": "a/b"}, f"server://a%2Fb@{AT}?tls=1"),
    ({"password": ""}, f"server://{AT}?tls=1"), ({"tunnel_port": "7"}, "server://k@127.0.0.1:7/127.0.0.1:18481?tls=1"),
    ({"tunnel_address": "::1"}, "server://k@[::1]:18480/127.0.0.1:18481?tls=1"),
    ({"target_address": "a.example.com", "target_port": "9"}, "server://k@127.0.0.1:18480/a.example.com:9?tls=1"),
    ({"targets": "a:1,b:2"}, "server://k@127.0.0.1:18480/a:1,b:2?tls=1"),
    ({"tls": "", "rate": "5"}, f"server://k@{AT}?rate=5")])
def test_a_part_of_a_url_is_changed(updates, wanted):
    assert changed(f"server://k@{AT}?tls=1", updates) == wanted


def test_a_url_is_shown_without_its_key():
    assert hidden(f"server://k:x@{AT}?tls=1") == f"server://{AT}?tls=1"


# -- figures -----------------------------------------------------------------------------------


def say(instance: Instance, received: int) -> int:
    """What is shown, once its process has said this."""
    instance.count({**instance.figures, "tcprx": received})
    return instance.figures["tcprx"]


def test_traffic_goes_on_over_a_restart_and_starts_anew_with_a_reset():
    one = Instance("1", "server", "", "")
    assert [say(one, 10), say(one, 30)] == [10, 30]
    one.settle()
    assert say(one, 5) == 35
    one.reset()
    assert one.figures["tcprx"] == 0 and say(one, 12) == 7
    one.settle()
    assert say(one, 3) == 10


def test_a_process_that_counts_anew_loses_nothing():
    one = Instance("1", "server", "", "")
    assert [say(one, 10), say(one, 4), say(one, 6)] == [10, 14, 16]
    one.reset()
    assert [say(one, 8), say(one, 1)] == [2, 3]


# -- processes ---------------------------------------------------------------------------------


def test_an_instance_runs_says_how_it_is_and_stops(master):
    there = master()
    ident = there.create()
    shown = there.until(ident, status="running", ping=3)
    assert (shown["mode"], shown["pool"], shown["tcps"], shown["udps"], shown["udptx"]) == (2, 5, 1, 4, 9)
    pid = there.pid(ident)
    there.ask("PATCH", f"/instances/{ident}", {"action": "stop"})
    shown = there.until(ident, status="stopped")
    assert (shown["ping"], shown["pool"], shown["tcps"], shown["udptx"]) == (0, 0, 0, 9)
    assert not os.path.exists(f"/proc/{pid}")
    there.ask("PATCH", f"/instances/{ident}", {"action": "start"})
    wait_until(lambda: there.show(ident)["tcprx"] > shown["tcprx"])
    assert there.pid(ident) != pid


@linux
def test_the_key_of_an_instance_is_in_no_command_line_and_no_log(master):
    there = master()
    said = there.ask("POST", "/instances", {"url": url("good").replace("good", "s3cret")})
    ident = said.json["id"]
    there.until(ident, status="running", ping=3)
    pid = there.pid(ident)
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        assert b"s3cret" not in file.read()
    with open(f"/proc/{pid}/environ", "rb") as file:
        assert f"{URL_VARIABLE}=server://s3cret@".encode() in file.read()
    there.close()
    assert f"info: Instance starting: server://{HOST}:10101/" in there.log and "s3cret" not in there.log
    assert re.search(rf"^begun: pid={pid} argv=1 \[{ident}\]$", there.log, re.MULTILINE)


def test_one_that_does_not_end_is_killed(master):
    there = master(times=TIMES._replace(shutdown=1.0))
    ident = there.create("deaf")
    there.until(ident, status="running", ping=3)
    pid = there.pid(ident)
    there.ask("PATCH", f"/instances/{ident}", {"action": "stop"})
    assert there.show(ident)["status"] == "running"
    there.until(ident, status="stopped")
    assert not os.path.exists(f"/proc/{pid}")


def test_after_a_removal_its_port_is_free_and_its_process_gone(master, free_ports):
    there = master()
    ident = there.create("listens", port=(port := free_ports(1)[0]))
    there.until(ident, ping=3)
    pid = there.pid(ident)
    said = there.ask("DELETE", f"/instances/{ident}")
    assert (said.status, said.body) == (204, b"") and not os.path.exists(f"/proc/{pid}")
    socket.create_server((HOST, port)).close()
    assert there.ask("GET", f"/instances/{ident}").status == 404
    assert there.ask("GET", "/instances").json[1:] == []


def test_another_url_is_answered_once_the_old_process_is_gone(master, free_ports):
    there = master()
    ident = there.create("listens", port=free_ports(1)[0])
    there.until(ident, ping=3)
    pid = there.pid(ident)
    said = there.ask("PUT", f"/instances/{ident}", {"url": url("good", "client", query="mode=1")})
    assert not os.path.exists(f"/proc/{pid}")
    assert (said.status, said.json["type"], said.json["status"]) == (200, "client", "stopped")
    assert said.json["url"].startswith("client://good@") and "&sni=none" in said.json["config"]
    there.until(ident, status="running")
    said = there.ask("PUT", f"/instances/{ident}", {"url": url("good", "client", query="mode=1")})
    assert (said.status, said.json) == (409, {"error": "Instance URL conflict"})


def test_the_url_that_was_asked_for_last_is_the_one_that_it_has(master):
    """Also where that is the URL which it still has, since the process before the other one has not ended."""
    there = master(times=TIMES._replace(shutdown=60.0))
    ident = there.create()
    there.until(ident, ping=3)
    pid = there.pid(ident)
    os.kill(pid, signal.SIGSTOP)
    said: list[int] = []

    def put(port: int) -> threading.Thread:
        thread = threading.Thread(target=lambda: said.append(
            there.ask("PUT", f"/instances/{ident}", {"url": url("good", port=port)}).status))
        thread.start()
        return thread

    threads = [put(10103)]
    wait_until(lambda: there.instance(ident).waiting)
    threads.append(put(10101))
    wait_until(lambda: said or len(there.instance(ident).waiting) == 2)
    os.kill(pid, signal.SIGCONT)
    for thread in threads:
        thread.join()
    assert said == [200, 200] and ":10101/" in there.show(ident)["url"]


def test_one_that_does_not_run_is_started_with_another_url(master):
    there = master()
    ident = there.ended()
    assert there.ask("PUT", f"/instances/{ident}", {"url": url("good")}).json["status"] == "stopped"
    there.until(ident, status="running", ping=3)


@pytest.mark.parametrize("orders, status", [
    (["restart", "stop"], "stopped"), (["stop", "start"], "running"), (["stop", "restart", "restart"], "running"),
    (["stop", "stop", "start", "stop"], "stopped")])
def test_what_was_asked_for_last_is_done(master, orders, status):
    there = master()
    ident = there.create()
    there.until(ident, ping=3)
    pid = there.pid(ident)
    for order in orders:
        assert there.ask("PATCH", f"/instances/{ident}", {"action": order}).status == 200
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
    there.until(ident, status=status)
    assert (there.instance(ident).child is not None) == (status == "running")


def test_one_that_fails_is_started_again_more_and_more_seldom(master):
    there = master()
    ident = there.create("fails")
    wait_until(lambda: there.instance(ident).failures >= 3)
    assert there.show(ident)["status"] in ("error", "running")
    assert "error: Instance error: exit status 3 [" in there.log
    there.ask("PATCH", f"/instances/{ident}", {"restart": False})
    there.until(ident, status="error")
    there.ask("PATCH", f"/instances/{ident}", {"action": "stop"})
    there.until(ident, status="stopped", restart=False)


def test_one_that_is_not_to_restart_stays_in_error_until_somebody_starts_it(master):
    there = master()
    ident = there.create("parent")
    there.ask("PATCH", f"/instances/{ident}", {"restart": False})
    there.until(ident, status="running")
    os.kill(there.pid(ident), signal.SIGKILL)
    there.until(ident, status="error")
    there.ask("PATCH", f"/instances/{ident}", {"action": "start"})
    there.until(ident, status="running")


def test_what_is_in_error_is_started_again_at_each_reload_interval(master):
    there = master(times=TIMES._replace(reload=0.05))
    ident = there.create("fails")
    there.ask("PATCH", f"/instances/{ident}", {"restart": False})
    with there.events() as events:
        while sum(event["type"] == "update" and event["instance"]["status"] == "running" for event in events.all) < 3:
            assert events.read()


def test_one_that_is_being_stopped_is_not_started_again_by_the_reload(master):
    """It is in error, and the reload interval ends between the stop and the end of its process."""
    there = master(times=TIMES._replace(report=0.05, shutdown=60.0))
    ident = there.create()
    there.until(ident, status="running", ping=3)
    pid = there.pid(ident)
    os.kill(pid, signal.SIGSTOP)
    there.until(ident, status="error")
    there.ask("PATCH", f"/instances/{ident}", {"action": "stop"})
    instances = there.master.instances
    instances.revived -= instances.times.reload
    before = instances.revived
    wait_until(lambda: instances.revived > before)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
    there.until(ident, status="stopped")
    assert there.instance(ident).wish == "stop" and there.instance(ident).child is None


def test_of_failures_only_the_last_one_is_followed_by_a_retry(master):
    """Else each start by hand of one that fails would begin a row of retries of its own, which never ends."""
    there = master(times=TIMES._replace(cooldown=60.0))
    ident = there.create("fails")
    for failures in (1, 2, 3):
        wait_until(lambda: there.instance(ident).failures == failures and there.show(ident)["status"] == "error")
        assert sum(alarm.act is not None for *_, alarm in there.master.instances.alarms.heap) == 1
        there.ask("PATCH", f"/instances/{ident}", {"action": "start"})


def test_one_that_ends_well_is_stopped(master):
    there = master()
    ident = there.ended()
    assert there.show(ident)["status"] == "stopped" and f"Instance stopped [{ident}]" in there.log


def test_one_that_says_nothing_for_three_reports_is_in_error(master):
    there = master(times=TIMES._replace(report=0.05))
    ident, other = there.create("once"), there.create("sick")
    there.until(ident, status="error", ping=3)
    os.kill(there.pid(ident), signal.SIGCONT)  # it lives
    there.until(other, status="error")


def test_one_that_never_said_how_it_is_waits_for_its_peer_and_is_no_error(master):
    there = master(times=TIMES._replace(report=0.001))
    ident, other = there.create("waits"), there.create("once")
    there.until(other, status="error")  # by then `waits` has been silent for as long
    assert there.show(ident)["status"] == "running"


def test_an_end_that_failed_is_in_error_until_it_works_again(master, tmp_path):
    there = master()
    ident = there.create("sick")
    there.until(ident, status="error", ping=0)
    (tmp_path / "well").touch()
    there.until(ident, status="running", ping=3)


def test_a_flood_of_lines_stalls_nobody_and_is_bounded(master):
    there = master()
    ident, other = there.create("floods"), there.create()
    there.until(ident, ping=3)
    there.until(other, ping=3)
    with there.events() as events:
        for _ in range(20):
            began = time.monotonic()
            there.show(other)
            assert time.monotonic() - began < 1
        events.until(lambda event: "lines were left out" in event["logs"])
        logs = [event for event in events.all if event["type"] == "log"]
    assert len(logs) < 500
    there.ask("PATCH", f"/instances/{ident}", {"action": "stop"})
    there.until(ident, status="stopped")
    assert there.log.count("word [") < 500


def test_a_hostile_line_is_passed_on_as_text(master):
    there = master()
    ident = there.create("hostile")
    there.until(ident, ping=3)
    there.ask("PATCH", f"/instances/{ident}", {"action": "restart"})
    with there.events() as events:
        event = events.until(lambda event: "script" in event["logs"])
        assert event["logs"] == "\x1b[31m<script>alert(1)</script>\x00\ufffd" and event["instance"]["id"] == ident
        assert b"<script" not in events.text and b"\x1b" not in events.text
    assert f"?[31m<script>alert(1)</script>?? [{ident}]\n" in there.log


@linux
def test_what_a_process_has_started_ends_with_it(master):
    there = master()
    ident = there.create("parent")
    with there.events() as events:
        there.ask("PATCH", f"/instances/{ident}", {"action": "restart"})
        child = int(re.search(r"child=(\d+)", events.until(lambda event: "child=" in event["logs"])["logs"])[1])
        there.ask("PATCH", f"/instances/{ident}", {"action": "stop"})
    there.until(ident, status="stopped")
    wait_until(lambda: not os.path.exists(f"/proc/{child}/exe"))


def test_without_pidfds_ends_are_found_too(master, monkeypatch):
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    there = master()
    ident = there.create()
    there.until(ident, ping=3)
    pid = there.pid(ident)
    there.ask("PATCH", f"/instances/{ident}", {"action": "restart"})
    wait_until(lambda: there.pid(ident) != pid)
    there.until(ident, status="running", ping=3)


def test_no_two_processes_begin_at_once(master, monkeypatch):
    monkeypatch.setattr(sniroute_instances, "START_GAP", 0.15)
    there = master()
    idents = [there.create() for _ in range(3)]
    began = [wait_until(lambda: there.instance(ident).child).began for ident in idents]
    assert all(later - earlier >= 0.15 for earlier, later in zip(began, began[1:]))


def test_there_are_no_more_than_so_many(master, monkeypatch):
    assert INSTANCES_MAX == 1000
    monkeypatch.setattr(sniroute_instances, "INSTANCES_MAX", 2)
    there = master()
    for _ in range(2):
        there.create("ends")
    said = there.ask("POST", "/instances", {"url": url()})
    assert (said.status, said.json) == (409, {"error": "There are 2 instances already"})


def test_a_program_that_is_not_there_is_an_error(master):
    there = master()
    there.master.instances.guard, there.master.instances.words = [], ["/nonexistent/program"]
    ident = there.create()
    there.until(ident, status="error")
    assert "Instance does not start: No such file or directory" in there.log


# -- what is kept ------------------------------------------------------------------------------


def test_the_next_master_goes_on_where_this_one_has_ended(master):
    first = master()
    here, gone, still = first.create(alias="\u00e9 <b>"), first.create(), first.ended()
    first.ask("PATCH", f"/instances/{here}", {"meta": {"tags": {"a": "b"}, "peer": {"sid": "x"}}})
    first.ask("PATCH", f"/instances/{still}", {"restart": False})
    first.ask("DELETE", f"/instances/{gone}")
    first.ask("POST", "/info", {"alias": "mine"})
    before = first.until(here, ping=3)
    first.close()
    second = master()
    assert second.key == first.key
    info = second.ask("GET", "/info").json
    assert (info["alias"], info["mid"]) == ("mine", first.master.instances.key.config) and len(info["mid"]) == 16
    assert [each["id"] for each in second.ask("GET", "/instances").json] == [KEY_ID, here, still]
    after = second.until(here, status="running", ping=3)
    assert after["tcprx"] > before["tcprx"]
    assert {name: after[name] for name in ("alias", "meta", "url", "config")} == {
        name: before[name] for name in ("alias", "meta", "url", "config")}
    assert (after["alias"], after["meta"]["tags"], after["meta"]["peer"]["sid"]) == ("\u00e9 <b>", {"a": "b"}, "x")
    assert second.show(still)["status"] == "stopped" and second.instance(still).child is None


def test_the_state_is_for_its_user_alone(master, tmp_path):
    path = tmp_path / "master.sqlite"
    path.touch(0o644)
    os.chmod(path, 0o644)
    there = master()
    there.until(there.create(), ping=3)
    for each in tmp_path.glob("master.sqlite*"):
        assert stat.S_IMODE(each.stat().st_mode) == 0o600, each


def test_a_state_that_another_master_has_is_refused(master, monkeypatch):
    monkeypatch.setattr(sniroute_children, "BUSY_TIME", 0.01)
    master()
    with pytest.raises(SettingsError, match="another master has it open"):
        master()


@pytest.mark.parametrize("kind, words", [("newer", "newer sniroute"), ("garbage", "not a database"),
                                         ("folder", "Is a directory"), ("anybody's", "can be changed by other users"),
                                         ("a link to nothing", "No such file")])
def test_a_state_that_cannot_be_used_is_refused_in_one_line(master, tmp_path, kind, words):
    path = tmp_path / "master.sqlite"
    if kind == "folder":
        path.mkdir()
    elif kind == "garbage":
        path.write_bytes(b"x" * 4096)
    elif kind == "anybody's":
        path.touch()
        path.chmod(0o666)
    elif kind == "a link to nothing":
        path.symlink_to("nothing")
    else:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version=99")
        connection.close()
    with pytest.raises(SettingsError, match=words) as caught:
        master()
    assert len(caught.value.lines) == 1 and str(path) in caught.value.lines[0]


def test_a_row_that_cannot_be_read_is_left_alone(master, tmp_path):
    there = master()
    ident = there.create()
    there.close()
    connection = sqlite3.connect(tmp_path / "master.sqlite")
    connection.execute("INSERT INTO instances VALUES ('bad', '{}')")
    connection.commit()
    connection.close()
    again = master()
    assert [each["id"] for each in again.ask("GET", "/instances").json] == [KEY_ID, ident]
    assert "cannot be read" in again.log


def test_a_disk_that_refuses_is_tried_until_it_takes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sniroute_children, "WRITE_PAUSE", 0.02)
    said: list[str] = []
    state = State(str(tmp_path / "state"), said.append)
    state.load()
    try:
        state.connection.execute("PRAGMA query_only=1")
        state.put("a", "1")
        wait_until(lambda: said)
        state.put("a", "2")
        state.put("b", "3")
        state.put("b", None)
        state.connection.execute("PRAGMA query_only=0")
        wait_until(lambda: state.connection.execute("SELECT * FROM instances").fetchall() == [("a", "2")])
    finally:
        state.close()
    (line,) = said
    assert "is not kept" in line and "readonly" in line


def test_counters_are_kept_while_a_process_runs(master, monkeypatch, tmp_path):
    monkeypatch.setattr(sniroute_instances, "SAVE_EVERY", 0.01)
    there = master()
    ident = there.create()
    there.until(ident, ping=3)
    kept = tmp_path / "copy"

    def received() -> int:
        """What a copy of the file says, as it would be found after a power cut."""
        for suffix in ("", "-wal"):
            (tmp_path / f"copy{suffix}").write_bytes((tmp_path / f"master.sqlite{suffix}").read_bytes())
        connection = sqlite3.connect(kept)
        try:
            (record,) = connection.execute("SELECT record FROM instances WHERE id = ?", (ident,)).fetchone()
            return json.loads(record)["tcprx"]
        except (sqlite3.Error, TypeError):  # it was copied in the middle of a write
            return 0
        finally:
            connection.close()

    wait_until(lambda: received() > 20)


# -- the master as a process -------------------------------------------------------------------

PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
from sniroute_master import Master
from sniroute_nodepass import StatusLog
from sniroute_nodeurl import Times, parse_url
sys.exit(Master(parse_url(sys.argv[1]), Times(shutdown=0.3), os.environ, StatusLog("info"), sys.argv[2],
                {FAKE!r}).run())
"""


class Running:
    """A master in a process of its own."""

    def __init__(self, popen, port):
        self.popen = popen
        self.lines = []
        self.port = port

    def until(self, pattern):
        while not (found := re.search(pattern, "\n".join(self.lines))):
            line = self.popen.stdout.readline()
            assert line, self.lines
            self.lines.append(line.rstrip())
        return found[1]

    def ask(self, key, *words):
        done = subprocess.run([program_path("curl", "curl"), "-sS", "-H", f"X-API-Key: {key}", *words[1:],
                               f"http://{HOST}:{self.port}/np/v1{words[0]}"], capture_output=True, text=True,
                              timeout=10)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def end(self, number):
        self.popen.send_signal(number)
        code = exit_code(self.popen, 10)
        self.lines += self.popen.stdout.read().splitlines()
        self.popen.stdout.close()
        return code


def start(state, port):
    """A master in a process of its own, whose instances are stand-ins."""
    return Running(subprocess.Popen([sys.executable, "-c", PROGRAM, f"master://{HOST}:{port}/np?tls=0", str(state)],
                                    stdout=subprocess.PIPE, text=True), port)


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_master(tmp_path, free_ports, number):
    ports = free_ports(2)
    there = start(tmp_path / "state", ports[0])
    try:
        key = there.until("API Key created: ([0-9a-f]{32})$")
        does = "good" if number == signal.SIGTERM else "deaf"
        made = there.ask(key, "/instances", "-d", json.dumps({"url": url(does)}))
        pid = int(there.until(rf"pid=(\d+) argv=1 \[{made['id']}\]"))
    finally:
        code = there.end(number)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}/exe"))
    if number == signal.SIGTERM:
        assert there.lines[-1].endswith("  INFO  Master shutdown complete")
    again = start(tmp_path / "state", ports[1])
    try:
        again.until("(API Key loaded)")
        assert [each["id"] for each in again.ask(key, "/instances")] == [KEY_ID, made["id"]]
    finally:
        again.end(signal.SIGTERM)
    assert key not in "\n".join(again.lines), "it is printed once"


def test_a_master_runs_a_tunnel_of_our_own_program(tmp_path, free_ports, serve):
    """The program as it is started: a server and a client, and a caller that is answered through them."""
    port, tunnel, callers = free_ports(3)[0], *free_ports(2)
    far = serve(lambda sock: sock.sendall(sock.recv(100)))
    popen = subprocess.Popen([sys.executable, str(HERE / "sniroute_nodepass.py"), f"master://{HOST}:{port}/np",
                              "--state", str(tmp_path / "state")], stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "NP_REPORT_INTERVAL": "100ms"})
    there = Running(popen, port)
    try:
        key = there.until("API Key created: ([0-9a-f]{32})$")
        idents = [there.ask(key, "/instances", "-d", json.dumps({"url": each}))["id"] for each in (
            f"server://s3cret@{HOST}:{tunnel}/{HOST}:{callers}?mode=1",
            f"client://s3cret@{HOST}:{tunnel}/{HOST}:{far.address[1]}?mode=2&min=2")]
        there.until("(linked)")
        with connect((HOST, callers)) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"

        def counted() -> bool:
            shown = [there.ask(key, f"/instances/{ident}") for ident in idents]
            return all(each["tcprx"] == each["tcptx"] == 5 and each["status"] == "running" for each in shown)

        wait_until(counted)
    finally:
        code = there.end(signal.SIGTERM)
    assert code == 0 and "s3cret" not in "\n".join(there.lines)
    assert stat.S_IMODE(os.stat(tmp_path / "state").st_mode) == 0o600


@pytest.mark.parametrize("words, told", [
    ([f"master://{HOST}:1", "--state"], "--state: it has no value"), (["--state=x"], "URL"),
    ([url("x"), "--state=x"], "--state: it is for a master:// only"),
    (["master", "--tunnel-addr", HOST, "--tunnel-port", "1", "--state", "/nonexistent/x"], "--state: /nonexistent/x")])
def test_a_state_that_cannot_be_is_refused_before_anything_begins(words, told):
    ended = subprocess.run([sys.executable, str(HERE / "sniroute_nodepass.py"), *words], capture_output=True, text=True,
                           timeout=10)
    assert ended.returncode == 1 and told in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("changes", [
    {"tcprx": float("inf")}, {"udptx": "1"}, {"tcptx": True}, {"url": 5}, {"config": None}, {"alias": 1}, {"type": []},
    {"meta": {"peer": {"sid": 1}, "tags": {}}}, {"meta": {"peer": {}, "tags": {"a": None}}}, {"meta": {"peer": {}}},
    {"meta": 5}], ids=str)
def test_a_record_that_a_master_never_wrote_is_none(changes):
    """One that cannot be read is passed over at the start, so nothing else may be raised for it."""
    made = Instance("1a2b3c4d", "server", url(), url())
    assert record_of(instance_of("1a2b3c4d", record_of(made))) == record_of(made)
    for record in (json.dumps({**json.loads(record_of(made)), **changes}), "[" * 100_000, "5", "[]", "{}"):
        with pytest.raises((ValueError, KeyError, TypeError)):
            instance_of("1a2b3c4d", record)
