"""Tests of sniroute_pods.py: first with a clock and an API server of the test's own, then with a cluster."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Callable, Iterator

import pytest

import sniroute_pods
from sniroute_api import Reply
from sniroute_loop import NEVER, Alarms, monotonic
from sniroute_objects import BALANCES, OWNER, Choice, parse_target, with_option
from sniroute_pods import (CLOSED, EMPTY, IDLE, LISTING, LOOK, MAKE_AGAIN, OWNER_NAME, POLL, POLLING, REST, RESTING,
                           RETRY_LAST, WATCH_GRACE, WATCH_TIME, WATCHING, Pods)
from sniroute_refusals import Failed
from testbed.cluster import Cluster
from testbed.objects import endpoint, endpoints, listed, pod, service

SERVICE = "/api/v1/namespaces/prod/services/web"
LIST = "/api/v1/namespaces/prod/pods?labelSelector=app%3Dweb&limit=100"


# -- an API server that does what the test says ------------------------------------------------


@dataclasses.dataclass
class Call:
    """A request: Job for who has made it."""

    path: str
    done: Callable[..., None]
    on_event: Callable[[dict[str, Any]], None] | None = None
    deadline: float = NEVER
    phase: str = "connecting"
    is_over: bool = False
    method: str = "GET"
    thing: Any = None

    def cancel(self) -> None:
        self.is_over = True

    def answer(self, answer: Any) -> None:
        """A Failed, a status, or JSON with 200."""
        assert not self.is_over, "it was cancelled"
        self.is_over = True
        self.done(answer if answer is None or isinstance(answer, Failed) else reply(answer))

    def line(self, what: str, thing: Any) -> None:
        """An event of a watch."""
        assert self.on_event is not None and not self.is_over
        self.on_event({"type": what, "object": thing})


def reply(answer: Any) -> Reply:
    """An answer of JSON, or of a status without."""
    return Reply(answer, {}, b"") if isinstance(answer, int) else Reply(200, {}, json.dumps(answer).encode())


class World:
    """A clock, an Api, and the Pods of one target.  It is also the loop, as far as Alarms knows it."""

    def __init__(self, *targets: str, **options: str):
        self.now = 1000.0
        self.calls: list[Call] = []
        self.answers: list[Choice | Failed] = []
        self.when = NEVER
        self.alarms = Alarms(self, lambda: self.now)  # type: ignore[arg-type]
        made = [parse_target("prod/pod/shell/db:5432", jump=True) if text == "jump" else parse_target(text)
                for text in targets or ("prod/svc/web:80",)]
        for key, value in options.items():
            made = [with_option(target, key, value) for target in made]
        self.pods = Pods(self.alarms, self, made)  # type: ignore[arg-type]
        self.out: list[str] = []
        self.pods.on_out = self.out.append

    # as the loop
    def timer(self, act: Callable[[], None]) -> World:
        self.ring = act
        return self

    def set(self, when: float) -> None:
        self.when = when

    # as the Api
    def get(self, path: str, done: Callable[..., None], deadline: float) -> Call:
        self.calls.append(Call(path, done, None, deadline))
        return self.calls[-1]

    def watch(self, path: str, on_event: Callable[[dict[str, Any]], None], on_end: Callable[..., None]) -> Call:
        self.calls.append(Call(path, on_end, on_event))
        return self.calls[-1]

    def send(self, method: str, path: str, thing: Any, done: Callable[..., None], deadline: float) -> Call:
        self.calls.append(Call(path, done, None, deadline, method=method, thing=thing))
        return self.calls[-1]

    # for tests
    @property
    def last(self) -> Call:
        return self.calls[-1]

    @property
    def under_way(self) -> list[str]:
        return [call.path.partition("?")[0] + "?watch" * ("watch=true" in call.path) for call in self.calls
                if not call.is_over]

    def ask(self, seconds: float = 15.0) -> Any:
        return self.pods.ask(self.answers.append, self.now + seconds)

    def chosen(self, seconds: float = 15.0) -> Choice:
        """Ask, and be told at once."""
        before = len(self.answers)
        self.ask(seconds)
        assert len(self.answers) == before + 1, "it has to wait"
        answer = self.answers[-1]
        assert isinstance(answer, Choice), answer
        return answer

    def pass_by(self, seconds: float) -> None:
        """Let time go by, and do what is due, each at its time."""
        end = self.now + seconds
        while self.when <= end:
            self.now, self.when = max(self.now, self.when), NEVER
            self.ring()
        self.now = end

    def begin(self, *things: Any, **spec: Any) -> World:
        """A first client; the service and the list are answered."""
        self.ask()
        self.last.answer(service(**spec))
        self.last.answer(listed(*things))
        return self


def failed(answer: Any) -> tuple[str, str]:
    assert isinstance(answer, Failed)
    return answer.reason, str(answer)


# -- the first client --------------------------------------------------------------------------


def test_the_first_client_costs_two_requests_and_the_next_ones_none():
    world = World()
    world.ask()
    assert world.under_way == [SERVICE] and world.pods.feed.state == sniroute_pods.ASKING
    world.last.answer(service())
    assert world.last.path == LIST and world.pods.feed.state == LISTING
    world.last.answer(listed(pod("web-1"), version="12"))
    assert world.answers == [Choice("prod", "web-1", "uid-web-1", 8080, "main", "sha256:abc")]
    assert world.under_way == ["/api/v1/namespaces/prod/pods?watch"] and "&resourceVersion=12" in world.last.path
    world.chosen()
    assert len(world.calls) == 3 and world.pods.feed.state == WATCHING


def test_clients_that_come_together_ask_once():
    world = World()
    for _ in range(50):
        world.ask()
    assert len(world.calls) == 1
    world.last.answer(service())
    world.last.answer(listed(pod("a"), pod("b")))
    assert sorted(answer.pod for answer in world.answers) == ["a"] * 25 + ["b"] * 25


def test_a_request_goes_on_for_the_client_who_waits_longest():
    world = World()
    world.ask(120)
    assert world.last.deadline == world.now + 120


@pytest.mark.parametrize("text, path", [
    ("prod/pods/app=web:80", LIST), ("prod/pod/web-1:80", "/api/v1/namespaces/prod/pods/web-1")])
def test_labels_and_a_pod_cost_one_request(text, path):
    world = World(text)
    world.ask()
    assert world.under_way == [path.partition("?")[0]] and world.last.path == path
    world.last.answer(listed(pod("web-1")) if "?" in path else pod("web-1", version="33"))
    assert world.answers[0].port == 80
    assert f"resourceVersion={10 if '?' in path else 33}" in world.last.path


def test_a_long_list_comes_in_pages():
    world = World()
    world.ask()
    world.last.answer(service())
    world.last.answer(listed(pod("a"), more="t/1"))
    assert world.last.path == f"{LIST}&continue=t%2F1" and not world.answers
    world.last.answer(listed(pod("b"), version="11"))
    assert [choice.pod for choice in world.pods.choices] == ["a", "b"] and "resourceVersion=11" in world.last.path


def test_a_page_that_came_too_late_is_made_up_for_by_the_watch():
    world = World()
    world.ask()
    world.last.answer(service())
    world.last.answer(listed(pod("a"), more="t"))
    world.last.answer(Failed("expired", "too old"))
    assert world.answers[0].pod == "a" and "resourceVersion" not in world.last.path
    world.last.line("ADDED", pod("b"))
    assert [choice.pod for choice in world.pods.choices] == ["a", "b"]


def test_no_more_pods_are_kept_than_help(monkeypatch):
    monkeypatch.setattr(sniroute_pods, "PODS_MAX", 3)
    world = World().begin(*(pod(f"p{n}") for n in range(5)))
    world.last.line("ADDED", pod("p9"))
    assert len(world.pods.choices) == 3
    world.last.line("MODIFIED", pod("p0", ready=False))
    world.last.line("DELETED", pod("p1"))
    world.last.line("ADDED", pod("p9"))
    assert [choice.pod for choice in world.pods.choices] == ["p2", "p9"]


@pytest.mark.parametrize("at", ["the object", "the list"])
@pytest.mark.parametrize("reason", ["unreachable", "login", "forbidden", "certificate", "plugin", "answer", "timeout"])
def test_a_failure_is_told_to_all_who_wait_at_once_and_the_next_client_asks_anew(at, reason):
    world = World()
    world.ask()
    world.ask()
    if at == "the list":
        world.last.answer(service())
    world.last.answer(Failed(reason, "no luck"))
    assert list(map(failed, world.answers)) == [(reason, "no luck")] * 2
    assert world.pods.feed.state == EMPTY and not world.under_way
    world.answers.clear()
    world.begin(pod("a"))
    assert world.answers[0].pod == "a"


def test_a_port_that_the_service_has_not_is_told_at_once_and_a_new_one_is_seen():
    world = World("prod/svc/web:81")
    world.ask()
    world.last.answer(service())
    assert failed(world.answers[0]) == ("port", "service web in prod has no port 81 of TCP; it has 80")
    world.ask()
    world.last.answer(service([(81, 1)]))
    world.last.answer(listed(pod("a")))
    assert world.answers[1].port == 1


def test_a_client_that_waits_in_vain_is_told_for_what():
    world = World()
    world.ask(5)
    world.last.phase = "TLS handshake"
    world.pass_by(4.9)
    assert not world.answers
    world.pass_by(0.1)
    assert failed(world.answers[0]) == ("timeout", "service web in prod: TLS handshake took too long")
    world.ask()
    assert len(world.calls) == 1, "it asks on: what comes is of use"
    world.last.answer(service())
    world.last.answer(listed(pod("a")))
    assert world.answers[1].pod == "a"


def test_a_client_that_has_left_is_told_nothing():
    world = World()
    one, two = world.ask(), world.ask()
    one.cancel()
    one.cancel()
    world.last.answer(service())
    world.last.answer(listed(pod("a")))
    assert len(world.answers) == 1 and world.pods.open == {"uid-a": 1}
    two.cancel()
    assert world.pods.open == {"uid-a": 1}, "it has its pod already"


def test_a_crowd_that_waits_is_no_work_for_the_next_one():
    world = World().begin(pod("a", ready=False))
    begun = monotonic()
    crowd = [world.ask() for _ in range(20_000)]
    for asked in reversed(crowd):
        asked.cancel()
    assert monotonic() - begun < 3, "to look at all for each would take a minute"
    world.last.line("MODIFIED", pod("a"))
    assert [answer.pod for answer in world.answers] == ["a"] and not world.pods.waiting


def test_nobody_is_told_after_the_end():
    world = World()
    world.ask()
    world.pods.close()
    assert not world.under_way and world.pods.feed.state == CLOSED
    world.pass_by(1000)
    assert not world.answers and len(world.calls) == 1


def test_whoever_is_told_may_ask_again_leave_or_end_it_all():
    for act in ("ask", "cancel", "close"):
        world = World()
        told: list[Any] = []

        def first(answer: Any) -> None:
            told.append(answer)
            {"ask": lambda: world.ask(), "cancel": lambda: two.cancel(), "close": world.pods.close}[act]()

        world.pods.ask(first, world.now + 15)
        two = world.ask()
        world.last.answer(Failed("unreachable", "x"))
        assert len(told) == 1
        assert len(world.answers) == (1 if act == "ask" else 0)
        assert len(world.under_way) == (1 if act == "ask" else 0)


def test_an_event_that_means_nothing_here_is_no_work(monkeypatch):
    """A server may send them without end."""
    world = World().begin(pod("a"), pod("b"))
    monkeypatch.setattr(world.pods, "_find", lambda: pytest.fail("looked through all"))
    monkeypatch.setattr(world.pods.feed, "news", lambda: pytest.fail("told"))
    world.last.line("MODIFIED", pod("a", version="8"))
    world.last.line("BOOKMARK", {"metadata": {"resourceVersion": "9"}})
    assert world.pods.feed.version == "9"


def test_pages_without_anything_new_are_the_last_ones():
    """Else a server that is broken would be asked for ever."""
    world = World()
    world.ask()
    world.last.answer(service())
    world.last.answer(listed(pod("a"), more="x"))
    world.last.answer(listed(pod("a"), more="y"))
    assert world.answers[0].pod == "a" and "watch=true" in world.last.path


# -- several targets ---------------------------------------------------------------------------


@pytest.mark.parametrize("first", [
    Failed("unknown", "services \"my-api-http\" not found"), Failed("forbidden", "no"), service([(80, 1, "http")])])
def test_the_next_target_is_tried_where_the_first_is_not_there(first):
    """`my-api-http-metrics` may be a service my-api-http with a port metrics, or my-api with http-metrics."""
    world = World("prod/svc/my-api-http:metrics", "prod/svc/my-api:http-metrics")
    world.ask()
    assert world.last.path.endswith("/services/my-api-http")
    world.last.answer(first)
    assert world.last.path.endswith("/services/my-api")
    world.last.answer(service([(9090, 9091, "http-metrics")]))
    world.last.answer(listed(pod("a")))
    assert world.answers[0].port == 9091 and world.pods.target.name == "my-api"


def test_a_name_in_the_pods_may_be_what_is_missing():
    world = World("prod/deploy/a-b:c", "prod/deploy/a:b-c")
    world.ask()
    world.last.answer({"spec": {"selector": {"matchLabels": {"app": "a-b"}}}})
    world.last.answer(listed(pod("x", ports={"http": 1})))
    world.last.answer({"spec": {"selector": {"matchLabels": {"app": "a"}}}})
    world.last.answer(listed(pod("y", ports={"b-c": 2})))
    assert world.answers == [Choice("prod", "y", "uid-y", 2, "main", "sha256:abc")]


def test_where_no_target_is_there_the_first_one_is_told():
    world = World("prod/svc/a-b:c", "prod/svc/a:b-c")
    world.ask()
    world.last.answer(service([(80, 1, "http")]))
    world.last.answer(Failed("unknown", "services \"a\" not found"))
    assert failed(world.answers[0])[0] == "port" and len(world.calls) == 2
    world.ask()
    assert world.last.path.endswith("/services/a-b"), "and the next client begins with it"


def test_an_api_server_that_is_away_is_no_reason_to_try_another_target():
    world = World("prod/svc/a-b:c", "prod/svc/a:b-c")
    world.ask()
    world.last.answer(Failed("unknown", "no"))
    world.last.answer(Failed("unreachable", "away"))
    assert failed(world.answers[0]) == ("unreachable", "away")
    world.ask()
    world.last.answer(Failed("unreachable", "away"))
    assert len(world.calls) == 3


# -- which pod ---------------------------------------------------------------------------------


def test_least_spreads_by_open_connections_then_in_turn():
    world = World().begin(pod("a"), pod("b"), pod("c"))
    more = [world.chosen() for _ in range(5)]
    assert [world.answers[0].pod, *(choice.pod for choice in more)] == ["a", "b", "c", "a", "b", "c"]
    world.pods.ended(more[0])
    world.pods.ended(more[3])
    assert [world.chosen().pod for _ in range(3)] == ["b", "b", "a"]
    assert world.pods.open == {"uid-a": 3, "uid-b": 2, "uid-c": 2}


@pytest.mark.parametrize("balance, order", [("round-robin", "bcabc"), ("first", "aaaaa")])
def test_the_other_ways_to_spread(balance, order):
    world = World(balance=balance).begin(pod("b"), pod("c"), pod("a"))
    assert world.answers[0].pod == "a"
    for name in order:
        choice = world.chosen()
        assert choice.pod == name
        world.pods.ended(choice)


def test_random_takes_the_better_of_two():
    world = World(balance="random").begin(pod("a"), pod("b"))
    for _ in range(99):
        world.chosen()
    assert world.pods.open == {"uid-a": 50, "uid-b": 50}
    assert set(sniroute_pods.CHOOSE) == set(BALANCES)


def test_a_pod_that_has_failed_is_the_last_for_a_while():
    world = World().begin(pod("a"), pod("b"))
    world.pods.failed(world.answers[0])
    assert [world.chosen().pod for _ in range(3)] == ["b", "b", "b"]
    world.pods.failed(world.chosen())
    world.pass_by(1)
    assert world.chosen().pod == "a", "all have failed: the one that has rested longer"
    world.pass_by(REST)
    world.pods.open.clear()
    assert {world.chosen().pod for _ in range(2)} == {"a", "b"} and not world.pods.rests


def test_a_pod_that_is_gone_takes_nobody_until_a_list_has_it_again():
    world = World().begin(pod("a"), pod("b"))
    world.pods.gone(world.answers[0])
    assert world.out == ["uid-a"] and world.last.path == LIST
    assert [world.chosen().pod for _ in range(2)] == ["b", "b"], "nobody waits for the list"
    world.pods.gone(world.answers[0])
    assert world.under_way == ["/api/v1/namespaces/prod/pods"], "one list at a time"
    world.last.answer(listed(pod("a", uid="uid-2"), pod("b")))
    choice = world.chosen()
    assert (choice.pod, choice.uid) == ("a", "uid-2")


def test_a_client_whose_only_pod_is_gone_waits_for_the_next_one():
    world = World().begin(pod("a"))
    world.pods.gone(world.answers[0])
    world.ask()
    assert len(world.answers) == 1
    world.last.answer(listed(pod("a", terminating=True)))
    assert len(world.answers) == 1
    world.last.line("ADDED", pod("a", uid="uid-2"))
    assert world.answers[1].uid == "uid-2"


# -- news --------------------------------------------------------------------------------------


def test_pods_come_and_go_without_a_request():
    world = World().begin(pod("a"))
    calls = len(world.calls)
    world.last.line("ADDED", pod("b", ready=False))
    world.last.line("MODIFIED", pod("b"))
    assert world.chosen().pod == "b"
    world.last.line("MODIFIED", pod("a", terminating=True))
    assert world.out == ["uid-a"] and [world.chosen().pod for _ in range(2)] == ["b", "b"]
    world.last.line("DELETED", pod("b"))
    world.last.line("ADDED", pod("b", uid="uid-2"))
    assert world.out == ["uid-a", "uid-b"] and world.chosen().uid == "uid-2"
    assert len(world.calls) == calls


def test_a_client_waits_while_all_pods_terminate():
    world = World().begin(pod("a", terminating=True))
    assert not world.answers
    world.pass_by(3)
    assert not world.answers
    watch = next(call for call in world.calls if call.on_event and not call.is_over)
    watch.line("ADDED", pod("b"))
    assert world.answers[0].pod == "b"


def test_a_client_that_waits_in_vain_hears_why_each_pod_is_out():
    world = World().begin(pod("a", terminating=True), pod("b", ready=False, waiting="CrashLoopBackOff"))
    world.pass_by(15)
    assert failed(world.answers[0]) == ("pods", "service web in prod: none of 2 pods is ready: a terminating, "
                                                "b not ready (CrashLoopBackOff)")


def test_a_named_port_may_differ_between_pods():
    world = World().begin(pod("a", ports={"http": 1}), pod("b", ports={"http": 2}), ports=[(80, "http")])
    assert sorted((world.answers[0].port, world.chosen().port)) == [1, 2]
    for name in "ab":
        world.last.line("MODIFIED", pod(name, ports={"other": 3}))
    world.ask()
    assert failed(world.answers[-1])[0] == "port"
    world.last.line("ADDED", pod("c", ports={"http": 3}))
    assert world.chosen().port == 3


def test_slices_are_watched_as_pods_are():
    world = World()
    world.ask()
    world.last.answer(service([(80, 1)], {}))
    assert "/endpointslices?" in world.last.path
    world.last.answer(listed(endpoints(endpoint("192.0.2.1", "a"), ports={"": 1}),
                             endpoints(endpoint("2001:db8::1", "a"), ports={"": 1}, uid="slice-2")))
    assert world.answers == [Choice("prod", "a", "uid-a", 1, "", "")]
    world.last.line("MODIFIED", endpoints(endpoint("192.0.2.2", "b"), ports={"": 1}))
    world.last.line("DELETED", endpoints(uid="slice-2"))
    assert world.chosen().pod == "b" and world.out == ["uid-a"]
    world.last.line("MODIFIED", endpoints(endpoint("192.0.2.9")))
    world.ask()
    assert failed(world.answers[-1])[0] == "elsewhere"


def test_a_watch_that_ends_in_its_time_goes_on_from_there():
    world = World().begin(pod("a"))
    world.last.line("BOOKMARK", {"metadata": {"resourceVersion": "77"}})
    world.pass_by(2)
    world.last.answer(None)
    assert "watch=true" in world.last.path and "resourceVersion=77" in world.last.path
    world.last.line("ADDED", pod("b", version="78"))
    world.pass_by(2)
    world.last.answer(None)
    assert "resourceVersion=78" in world.last.path


@pytest.mark.parametrize("how", ["an event", "a status"])
def test_a_watch_that_is_too_old_becomes_a_list(how):
    world = World().begin(pod("a"))
    world.pass_by(2)
    if how == "an event":
        world.last.line("ERROR", {"code": 410, "message": "too old resource version"})
    else:
        world.last.answer(Failed("expired", "too old"))
    assert world.last.path == LIST
    world.chosen()
    world.last.answer(listed(pod("b")))
    assert world.chosen().pod == "b"


def test_a_watch_that_ends_at_once_is_tried_again_later_each_time():
    world = World().begin(pod("a"))
    pauses = []
    for _ in range(8):
        world.last.answer(None)
        assert world.pods.feed.state == RESTING
        before, calls = world.now, len(world.calls)
        while len(world.calls) == calls:
            world.pass_by(0.25)
        pauses.append(world.now - before)
        world.last.answer(listed(pod("a")))
    assert pauses == [0.5, 1, 2, 4, 8, RETRY_LAST, RETRY_LAST, RETRY_LAST]


def test_an_api_server_that_is_away_for_a_minute_refuses_nobody():
    world = World().begin(pod("a"))
    world.pass_by(2)
    world.last.answer(Failed("unreachable", "reset"))
    for _ in range(30):
        world.pass_by(2)
        assert world.chosen().pod == "a", "what is known is used"
        for call in world.calls:
            if not call.is_over:
                call.answer(Failed("unreachable", "refused"))
    world.pass_by(RETRY_LAST)
    world.last.answer(listed(pod("b")))
    assert world.pods.feed.state == WATCHING and world.chosen().pod == "b" and world.pods.feed.trouble is None


def test_a_client_that_waits_while_the_api_server_is_away_hears_of_that():
    world = World().begin(pod("a", ready=False))
    world.pass_by(1.5)
    for call in world.calls:
        if not call.is_over and call.on_event:
            call.answer(Failed("unreachable", "reset"))
    for _ in range(14):
        world.pass_by(1)
        for call in world.calls:
            if not call.is_over:
                call.answer(Failed("unreachable", "connection refused"))
    assert [failed(answer) for answer in world.answers] == [("unreachable", "connection refused")]


def test_garbage_in_a_watch_ends_the_watch_only():
    world = World().begin(pod("a"))
    world.last.line("ADDED", {"metadata": "x"})
    assert world.pods.feed.state == RESTING and not world.under_way and world.chosen().pod == "a"


def test_where_watches_are_forbidden_pods_are_listed_now_and_then():
    world = World().begin(pod("a"))
    world.last.answer(Failed("forbidden", "no watch"))
    assert world.pods.feed.state == POLLING and world.chosen().pod == "a"
    for _ in range(3):
        calls = len(world.calls)
        world.pass_by(POLL - 0.1)
        assert len(world.calls) == calls
        world.pass_by(0.1)
        assert world.last.path == LIST
        world.last.answer(listed(pod("b")))
        world.last.answer(Failed("forbidden", "no watch"))
        assert world.chosen().pod == "b"


def test_a_client_that_waits_where_watches_are_forbidden_is_served_within_a_second():
    world = World().begin(pod("a", ready=False))
    world.last.answer(Failed("forbidden", "no watch"))
    world.pass_by(1)
    assert world.last.path == LIST
    world.last.answer(listed(pod("a")))
    assert world.answers[0].pod == "a"


def test_a_watch_without_an_end_is_begun_anew():
    world = World().begin(pod("a"))
    watch = world.last
    world.pass_by(WATCH_TIME[1] + WATCH_GRACE)
    assert watch.is_over and world.last.path == LIST


# -- the object, again -------------------------------------------------------------------------


def again(world: World, thing: Any) -> None:
    """A client comes after a while; the service is read again, and has become `thing`."""
    world.pass_by(LOOK)
    world.chosen()
    assert world.last.path == SERVICE
    world.last.answer(thing)


def test_a_service_that_is_the_same_changes_nothing():
    world = World().begin(pod("a"))
    again(world, service())
    assert world.under_way == ["/api/v1/namespaces/prod/pods?watch"]
    world.chosen()
    assert world.last.path == SERVICE and world.last.is_over, "once in a while"


def test_a_service_that_selects_others_leads_to_them():
    world = World().begin(pod("a"))
    again(world, service(selector={"app": "green"}))
    assert "app%3Dgreen" in world.last.path and world.out == ["uid-a"] and len(world.under_way) == 1
    world.ask()
    world.last.answer(listed(pod("g")))
    assert world.answers[-1].pod == "g"


def test_a_service_that_has_another_port_leads_there():
    world = World().begin(pod("a"))
    again(world, service([(80, 9999)]))
    assert world.chosen().port == 9999 and not world.out


@pytest.mark.parametrize("answer, reason", [(Failed("unknown", "not found"), "unknown"), (service([(1, 1)]), "port")])
def test_a_service_that_is_no_more_takes_no_client(answer, reason):
    world = World().begin(pod("a"))
    again(world, answer)
    assert world.pods.feed.state == EMPTY and not world.under_way and world.out == ["uid-a"]
    world.ask()
    world.last.answer(answer)
    assert failed(world.answers[-1])[0] == reason


def test_a_service_that_cannot_be_read_again_is_used_on():
    world = World().begin(pod("a"))
    again(world, Failed("unreachable", "away"))
    assert world.chosen().pod == "a"


def test_a_client_that_waits_has_the_service_read_again():
    world = World().begin()
    world.pass_by(2)
    assert world.last.path == SERVICE
    world.last.answer(service(selector={"app": "green"}))
    world.last.answer(listed(pod("g")))
    assert world.answers[0].pod == "g"


# -- a pod by its name -------------------------------------------------------------------------

ONE = "/api/v1/namespaces/prod/pods/web-1"


def one(answer: Any) -> World:
    world = World("prod/pod/web-1:80")
    world.ask()
    assert world.last.path == ONE
    world.last.answer(answer)
    return world


def test_a_pod_by_its_name_need_not_be_ready():
    assert one(pod("web-1", ready=False)).answers[0].pod == "web-1"


def test_a_pod_that_is_not_there_is_told_at_once():
    assert failed(one(Failed("unknown", "pods \"web-1\" not found")).answers[0])[0] == "unknown"


def test_a_pod_that_is_being_replaced_is_waited_for():
    world = one(pod("web-1"))
    world.pods.gone(world.answers[0])
    world.ask()
    world.last.answer(Failed("unknown", "not found"))
    assert len(world.answers) == 1 and world.under_way == ["/api/v1/namespaces/prod/pods?watch"]
    world.last.line("ADDED", pod("web-1", uid="uid-2"))
    assert world.answers[1].uid == "uid-2"


def test_who_may_not_read_a_pod_may_still_connect_to_it():
    world = one(Failed("forbidden", "no"))
    assert world.answers == [Choice("prod", "web-1", "", 80, "", "")]
    world = World("prod/pod/web-1:http")
    world.ask()
    world.last.answer(Failed("forbidden", "no"))
    assert failed(world.answers[0])[0] == "forbidden", "a name has to be looked up"


# -- a pod that is made ------------------------------------------------------------------------

SHELL = "/api/v1/namespaces/prod/pods/shell"


def made(**options: Any) -> Any:
    """The pod `shell` as this process has made it."""
    thing = pod("shell", **options)
    thing["metadata"]["labels"] = {OWNER: OWNER_NAME}
    return thing


class Making(World):
    """A jump that has its pod made, and what was sent."""

    def __init__(self, answer: Any = Failed("unknown", "pods \"shell\" not found")):
        super().__init__("jump", create="true")
        self.ask()
        self.last.answer(answer)

    @property
    def sent(self) -> list[tuple[str, str]]:
        return [(call.method, call.path) for call in self.calls if call.method != "GET"]

    @property
    def sent_last(self) -> Call:
        return [call for call in self.calls if call.method != "GET"][-1]

    def watched(self, what: str, thing: Any) -> None:
        """An event of the watch."""
        next(call for call in self.calls if call.on_event is not None and not call.is_over).line(what, thing)


def test_a_pod_that_is_not_there_is_made_and_the_client_waits_for_it():
    world = Making()
    world.pass_by(0)
    call = world.last
    assert world.sent == [("POST", "/api/v1/namespaces/prod/pods")]
    assert call.thing["metadata"]["name"] == "shell" and call.thing["metadata"]["labels"][OWNER] == OWNER_NAME
    world.ask()
    call.answer(201)
    world.watched("ADDED", made(phase="Pending", node=""))
    world.pass_by(5)
    assert world.answers == [] and len(world.sent) == 1
    world.watched("MODIFIED", made())
    assert [answer.pod for answer in world.answers] == ["shell"] * 2


def test_a_pod_that_is_there_is_not_made():
    world = Making(pod("shell"))
    world.pass_by(20)
    assert world.answers[0].pod == "shell" and world.sent == []
    world.pods.close()
    assert world.sent == [], "who has not made it does not remove it"


@pytest.mark.parametrize("how", ["closed", "idle, then closed"])
def test_a_pod_that_was_made_is_removed_when_its_target_is_used_no_more(how):
    world = Making(made())
    choice = world.answers[0]
    world.pods.ended(choice)
    if how != "closed":
        world.pass_by(IDLE + 1)
        assert world.pods.feed.state == EMPTY and world.sent == [], "the next client may come soon"
    world.pods.close()
    world.pods.close()
    assert world.sent == [("DELETE", SHELL)] and world.last.thing["preconditions"] == {"uid": "uid-shell"}


def test_a_pod_that_is_just_being_made_at_the_end_is_removed():
    world = Making()
    world.pass_by(0)
    call = world.last
    world.pods.close()
    assert not call.is_over and len(world.sent) == 1
    call.done(Reply(201, {}, json.dumps(made(uid="new")).encode()))
    assert world.sent[1:] == [("DELETE", SHELL)] and world.last.thing["preconditions"] == {"uid": "new"}
    assert world.answers == []


def test_a_kubeconfig_that_changes_at_the_end_leaves_no_pod_behind():
    """The request that removes the pod may be the one that finds another token."""
    world = Making()
    world.pass_by(0)
    call = world.last
    world.pods.close()
    world.pods.forget()
    call.done(Reply(201, {}, json.dumps(made(uid="new")).encode()))
    assert world.sent[1:] == [("DELETE", SHELL)]


def test_a_pod_that_was_just_made_is_removed_though_nothing_has_told_of_it_yet():
    """The answer to the request comes before what is watched tells of the pod."""
    world = Making()
    world.pass_by(0)
    world.last.done(Reply(201, {}, json.dumps(made(uid="new")).encode()))
    world.pods.close()
    assert world.sent[1:] == [("DELETE", SHELL)] and world.last.thing["preconditions"] == {"uid": "new"}


def test_an_old_cluster_that_still_makes_a_pod_is_no_matter_of_the_new_one():
    world = Making()
    world.pass_by(0)
    old = world.last
    world.pods.forget()
    world.last.answer(Failed("unknown", "pods \"shell\" not found"))
    world.pass_by(0)
    assert world.sent == [("POST", "/api/v1/namespaces/prod/pods")] * 2
    if not old.is_over:
        old.answer(500)
    assert world.answers == []
    world.last.answer(201)
    world.watched("ADDED", made(uid="new"))
    assert world.answers[0].uid == "new"


@pytest.mark.parametrize("status, reason", [(404, "unknown"), (403, "forbidden"), (422, "answer"), (500, "answer")])
def test_a_pod_that_cannot_be_made_is_told_to_all_who_wait(status, reason):
    world = Making()
    world.ask()
    world.pass_by(0)
    world.last.answer(Failed("forbidden", "no") if status == 403 else status)
    assert [answer.reason for answer in world.answers] == [reason] * 2
    assert world.pods.feed.state == EMPTY
    world.ask()
    world.last.answer(made())
    assert world.answers[-1].pod == "shell", "the next client begins anew"


def test_a_pod_that_is_there_is_waited_for_though_the_request_for_it_has_failed():
    """A proxy has broken off, or another program was faster: what is watched tells of the pod before."""
    world = Making()
    world.pass_by(0)
    world.watched("ADDED", made(phase="Pending", node=""))
    world.sent_last.answer(Failed("reset", "before its answer"))
    assert world.answers == []
    world.watched("MODIFIED", made())
    assert world.answers[0].pod == "shell"


def test_a_pod_that_another_one_has_made_is_used():
    world = Making()
    world.pass_by(0)
    world.last.answer(409)
    world.watched("ADDED", made())
    assert world.answers[0].pod == "shell"


def test_a_pod_whose_time_is_over_is_replaced_where_a_client_waits():
    world = Making(made())
    world.watched("MODIFIED", made(phase="Failed"))
    world.pass_by(20)
    assert world.sent == [], "nobody waits"
    world.ask()
    world.pass_by(0)
    assert world.sent == [("DELETE", SHELL)]
    world.last.answer(200)
    world.watched("DELETED", made())
    world.pass_by(0)
    assert world.sent[1:] == [("POST", "/api/v1/namespaces/prod/pods")]
    world.last.answer(201)
    world.watched("ADDED", made(uid="uid-2"))
    assert world.answers[1].uid == "uid-2"


def test_a_pod_that_ends_at_once_is_made_again_now_and_then_only():
    world = Making()
    world.ask(60)
    for count in (1, 3, 5):
        world.pass_by(0)
        assert len(world.sent) == count and world.sent[-1][0] == "POST"
        world.last.answer(201)
        world.watched("ADDED", made(phase="Succeeded"))
        world.pass_by(MAKE_AGAIN - 1)
        assert len(world.sent) == count
        world.pass_by(1)
        assert world.sent[-1] == ("DELETE", SHELL)
        world.last.answer(200)
        world.watched("DELETED", made())


def test_a_pod_that_has_ended_is_not_removed_again_before_it_can_have_been_told():
    world = Making(made(phase="Failed"))
    world.pass_by(0)
    for count in (1, 2):
        assert world.sent == [("DELETE", SHELL)] * count
        world.sent_last.answer(200)
        world.pass_by(MAKE_AGAIN - 1)
        assert len(world.sent) == count
        world.pass_by(1)
    world.sent_last.answer(404)
    world.watched("DELETED", made())
    world.pass_by(0)
    assert world.sent[3:] == [("POST", "/api/v1/namespaces/prod/pods")], "its successor need not wait"


def test_a_pod_of_somebody_else_that_has_ended_is_not_removed():
    world = Making(pod("shell", phase="Failed"))
    world.pass_by(16)
    assert world.sent == [] and failed(world.answers[0])[0] == "pods"


def test_a_client_that_waits_in_vain_hears_what_the_pod_does():
    world = Making()
    world.pass_by(0)
    world.last.answer(201)
    world.watched("ADDED", made(phase="Pending", waiting="ErrImagePull"))
    world.pass_by(16)
    assert failed(world.answers[0]) == ("pods", "pod shell in prod: none of 1 pods is ready: shell starting "
                                                "(ErrImagePull)")


# -- nobody, and sleep -------------------------------------------------------------------------


def test_what_nobody_needs_is_forgotten_and_learnt_anew():
    world = World().begin(pod("a"))
    world.pass_by(10 * IDLE)
    assert world.pods.feed.state in (WATCHING, LISTING), "a connection is open"
    world.pods.ended(world.answers[0])
    world.pass_by(IDLE - 1)
    assert world.pods.feed.state != EMPTY
    world.pass_by(1)
    assert world.pods.feed.state == EMPTY and not world.under_way and world.out == ["uid-a"]
    world.pass_by(10 * IDLE)
    assert world.alarms.heap == [] or all(alarm.act is None for _, _, alarm in world.alarms.heap)
    world.answers.clear()
    world.begin(pod("b"))
    assert world.answers[0].pod == "b"


def test_after_a_sleep_nobody_is_sent_to_what_was():
    world = World().begin(pod("a"))
    world.pods.doubt()
    world.ask()
    assert len(world.answers) == 1 and world.out == ["uid-a"]
    world.last.answer(listed(pod("b")))
    assert world.answers[1].pod == "b"
    world.pods.doubt()
    world.ask()
    world.last.answer(Failed("unreachable", "VPN"))
    assert failed(world.answers[2]) == ("unreachable", "VPN")


# -- with a cluster ----------------------------------------------------------------------------


class Asking:
    """Pods of a real cluster, in a loop that the test turns."""

    def __init__(self, caller: Any, *targets: str):
        self.caller = caller
        self.answers: list[Choice | Failed] = []
        self.pods = Pods(caller.apis.alarms, caller.apis.of(""), [parse_target(text) for text in targets])

    def begin(self, seconds: float = 10.0) -> None:
        self.pods.ask(self.answers.append, monotonic() + seconds)

    def ask(self, seconds: float = 10.0) -> Any:
        """Ask, and wait for the answer."""
        count = len(self.answers) + 1
        self.begin(seconds)
        return self.caller.until(lambda: self.answers[count - 1:])[0]

    def until_state(self, state: str) -> None:
        self.caller.until(lambda: self.pods.feed.state == state, what=state)

    def until_pods(self, *names: str) -> None:
        """Wait until these take connections."""
        self.caller.until(lambda: [choice.pod for choice in self.pods.choices] == list(names), what=f"{names}")


@pytest.fixture
def web(cluster: Cluster) -> Cluster:
    """The cluster, with a service of two pods."""
    cluster.service("web", [{"port": 80, "targetPort": "http", "name": "http", "protocol": "TCP"}], {"app": "web"})
    for number in (1, 2):
        cluster.pod(f"web-{number}", names={"http": 8000 + number}, labels={"app": "web"})
    return cluster


@pytest.fixture
def asking(web: Cluster, call: Any) -> Iterator[Callable[..., Asking]]:
    """asking("default/svc/web:80", user=...) -> Asking, until the test ends."""
    made: list[Asking] = []

    def make(*targets: str, **options: Any) -> Asking:
        made.append(Asking(call(web.kubeconfig(**options)), *(targets or ("default/svc/web:80",))))
        return made[-1]

    yield make
    for each in made:
        each.pods.close()


def user(cluster: Cluster, **allow: str) -> dict[str, str]:
    """A user who may do only that, as a kubeconfig has him."""
    cluster.user("ci", token="ci-token", allow=allow)
    return {"token": "ci-token"}


def asked(cluster: Cluster) -> list[str]:
    return [f"{row['verb']} {row['resource']}" for row in cluster.requests()]


def test_a_service_becomes_a_pod_by_two_requests_and_a_watch(web, asking):
    client = asking()
    first, second = client.ask(), client.ask()
    assert sorted((choice.pod, choice.port) for choice in (first, second)) == [("web-1", 8001), ("web-2", 8002)]
    assert first.uid == web.get("pods", first.pod)["metadata"]["uid"] and first.container == "main"
    client.caller.until(lambda: asked(web) == ["get services", "list pods", "watch pods"])


def test_a_pod_that_is_replaced_is_known_by_its_new_uid(web, asking):
    client = asking()
    client.ask()
    out: list[str] = []
    client.pods.on_out = out.append
    old = web.get("pods", "web-1")["metadata"]["uid"]
    web.remove("pods", "web-2")
    web.replace("web-1")
    new = web.get("pods", "web-1")["metadata"]["uid"]
    client.caller.until(lambda: [choice.uid for choice in client.pods.choices] == [new])
    assert client.ask().uid == new and old in out


def test_a_client_is_served_when_a_pod_is_ready_at_last(web, asking):
    client = asking()
    for name in ("web-1", "web-2"):
        web.terminate(name)
    client.begin()
    client.until_state(WATCHING)
    web.pod("web-3", names={"http": 1}, labels={"app": "web"}, phase="Pending")
    client.caller.until(lambda: len(client.pods.feed.pods) == 3)
    assert not client.answers
    web.run_pod("web-3")
    client.caller.until(lambda: client.answers)
    assert client.answers[0].pod == "web-3"


def test_each_pod_that_is_out_is_told(web, asking):
    web.terminate("web-1")
    web.ready("web-2", False)
    client = asking()
    client.begin()
    client.until_state(WATCHING)  # it has looked: who comes now waits for pods alone
    assert failed(client.ask(0.3)) == (
        "pods", "service web in default: none of 2 pods is ready: web-1 terminating, web-2 not ready")


@pytest.mark.parametrize("target, pods", [
    ("default/deploy/web:http", ["web-1", "web-2"]), ("default/pods/app=web:http", ["web-1", "web-2"]),
    ("default/pod/web-2:http", ["web-2"])])
def test_other_kinds_lead_to_pods_too(target, pods, web, asking):
    web.workload("deployments", "web", {"app": "web"})
    client = asking(target)
    assert client.ask().port in (8001, 8002)
    client.until_pods(*pods)
    web.replace(pods[-1])
    uid = web.get("pods", pods[-1])["metadata"]["uid"]
    client.caller.until(lambda: uid in [choice.uid for choice in client.pods.choices])


@pytest.mark.parametrize("target, reason, said", [
    ("default/svc/wep:80", "unknown", 'services "wep" not found'),
    ("default/svc/web:81", "port", "it has 80 http"),
    ("default/pod/web-9:80", "unknown", 'pods "web-9" not found'),
    ("default/svc/db:5432", "elsewhere", "192.0.2.1")])
def test_what_is_not_there_is_told(target, reason, said, web, asking):
    web.service("db", {5432: 5432})
    web.slice("db", {"192.0.2.1": True}, [{"port": 5432, "protocol": "TCP"}])
    why, words = failed(asking(target).ask())
    assert why == reason and said in words


def test_the_next_split_of_a_name_is_tried(web, asking):
    client = asking("default/svc/web-80-x:http", "default/svc/web:80")
    assert client.ask().port in (8001, 8002)


def test_what_rbac_has_to_grant_is_told(web, asking):
    why, words = failed(asking(user=user(web, pods="get list")).ask())
    assert why == "forbidden" and "services" in words and "get" in words


def test_without_the_right_to_watch_pods_are_listed_again(web, asking):
    client = asking(user=user(web, services="get", pods="get list"))
    client.ask()
    client.until_state(POLLING)
    for choice in list(client.pods.choices):
        web.remove("pods", choice.pod)
        client.pods.gone(choice)
    client.begin()
    web.pod("web-3", names={"http": 1}, labels={"app": "web"})
    client.caller.until(lambda: client.answers[1:])
    assert client.answers[1].pod == "web-3"


def test_without_the_right_to_read_pods_one_is_reached_by_its_name(web, asking):
    client = asking("default/pod/web-1:8001", user=user(web))
    assert client.ask() == Choice("default", "web-1", "", 8001, "", "")


def test_the_right_to_read_one_pod_is_enough_for_its_name(web, asking):
    """No list, no watch: it is read now and then."""
    client = asking("default/pod/web-1:8001", user=user(web, pods="get"))
    choice = client.ask()
    assert (choice.pod, choice.uid, choice.port) == ("web-1", web.get("pods", "web-1")["metadata"]["uid"], 8001)
    client.until_state(POLLING)


def test_what_is_too_old_is_listed_again(web, asking, monkeypatch):
    monkeypatch.setattr(sniroute_pods, "WATCH_LIVES", 0.0)
    client = asking()
    client.ask()
    client.until_state(WATCHING)
    client.caller.until(lambda: "watch pods" in asked(web))
    web.compact()
    client.caller.until(lambda: asked(web).count("list pods") == 2)
    web.remove("pods", "web-1")
    client.until_pods("web-2")


def test_an_api_server_that_is_away_and_comes_back(web, asking, monkeypatch):
    monkeypatch.setattr(sniroute_pods, "RETRY_FIRST", 0.05)
    client = asking()
    client.ask()
    client.caller.until(lambda: "watch pods" in asked(web))
    web.down()
    client.until_state(RESTING)
    assert isinstance(client.ask(), Choice), "what is known is used"
    web.remove("pods", "web-1")
    web.up()
    client.until_pods("web-2")


@pytest.mark.parametrize("how", ["rst", "eof", "end"])
def test_a_watch_that_breaks_off_is_made_up_for(how, web, asking, monkeypatch):
    monkeypatch.setattr(sniroute_pods, "RETRY_FIRST", 0.05)
    client = asking()
    client.ask()
    client.caller.until(lambda: "watch pods" in asked(web))
    web.end_connections(how)
    web.remove("pods", "web-2")
    client.until_pods("web-1")


def test_an_api_server_with_too_much_to_do_is_asked_again(web, asking):
    fault = web.fault("status", code=429, retry_after=1, resource="pods", times=1)
    assert isinstance(asking().ask(), Choice) and web.hits(fault) == 1


@pytest.mark.parametrize("resource", ["services", "pods"])
def test_an_api_server_that_does_not_answer_costs_a_client_its_own_time_only(resource, web, asking):
    web.fault("hang", resource=resource, times=1)
    why, words = failed(asking().ask(0.3))
    assert why == "timeout" and words.startswith("service web in default: ")


def test_nothing_is_left_when_nobody_comes(web, asking, monkeypatch):
    monkeypatch.setattr(sniroute_pods, "IDLE", 0.2)
    client = asking()
    client.pods.ended(client.ask())
    client.until_state(EMPTY)
    assert isinstance(client.ask(), Choice) and asked(web).count("get services") == 2
