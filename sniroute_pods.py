"""sniroute_pods: from a target to a pod and its port.

    client --- Pods.ask ---> Choice: which pod, which port ---> a connection ---> Pods.ended, failed, gone
                 ^
                 | news, end
               Feed --- GET the object, once, then now and then
                    --- GET its pods, and watch them

A Feed knows the pods of one target: it asks when the first client comes, keeps that fresh by a watch for as long as
clients come, and forgets it behind them.  What the JSON means is told by sniroute_objects.  Pods has the clients: it
chooses for each, counts their connections, and has those wait for whom no pod is ready.  Where a Feed stands is its
`state`, in words for people:

    EMPTY -> ASKING -> LISTING -> WATCHING        the ordinary life; back to EMPTY when nobody needs it, or it failed
                       LISTING -> POLLING         the watch is forbidden: listed again now and then
                       LISTING <- RESTING         the API server was away: listed again, a little later each time
    any -> CLOSED

    ends of a watch:  after its time: watched again from there; 410 Gone: listed again; else: RESTING

A jump may have its pod made (`create_pod`): where a client waits and the pod is not there, or has ended.  It is removed
when the last target with this pod is used no more; if we cannot, the cluster ends it after its time.

While nothing is known, a failure is told to all who wait, at once.  What is known is used until there is news, since an
API server that is away does not end a pod.  A client for whom no pod is ready waits, to its deadline.

Threads: all runs in the loop; there are no locks.  Clients are told by `done`, at times before `ask` returns.

Seams: I want to ...
    choose among pods otherwise       a row of CHOOSE, and its word in BALANCES
    ask again sooner, or later        the limits below; `Feed.due` says when, `Feed.tend` what
    try another target                NEXT, and Feed._try_next

This room imports sniroute_objects, sniroute_api, sniroute_loop, sniroute_names (printable) and sniroute_refusals
(Failed).

Source: kubernetes.io, "Kubernetes API Concepts" (watches, bookmarks, 410 Gone, chunks).
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
from typing import Any, Callable, Sequence

from sniroute_api import Api, Job, Reply, failure
from sniroute_loop import NEVER, Alarm, Alarms
from sniroute_names import printable
from sniroute_objects import (KINDS, REASONS, Choice, KubeTarget, Plan, Pod, choice_of, lacking, manifest, none_ready,
                              object_path, part, rows, word)
from sniroute_refusals import Failed

__version__ = "0.1.0"

# Limits, each with its reason.  Times in seconds.
PODS_MAX = 1000  # pods that are known of a target; more would not spread clients any better
REQUEST_TIME = 30.0  # for one request, where nobody waits for longer: a slow API server answers within ten
IDLE = 60.0  # without a client: a watch costs a connection, and to begin again 20 ms
WATCH_TIME = 240, 300  # of one watch; the server ends it.  Balancers in front of it cut silent ones after some minutes
WATCH_GRACE = 30.0  # after that time the server has gone without a word
WATCH_LIVES = 1.0  # a watch that has ended sooner is not begun again at once: that would be a loop
POLL = 10.0  # between two lists where watches are forbidden
WAITED = 1.0  # between two lists while a client waits, and nothing else would tell
LOOK = 30.0  # after this time a service is read again when a client comes: its selector may have changed
LOOK_WAITED = 2.0  # the same while a client waits
RETRY_FIRST, RETRY_LAST = 0.5, 15.0  # between two tries where the API server is away; there is no last one
MAKE_AGAIN = 5.0  # between two tries to make a pod: one that ends at once, as its image has no sleep, is no loop
REST = 5.0  # a pod that has failed is the last to be chosen for this long: a restart takes some seconds

OWNER_NAME = os.urandom(8).hex()  # of the pods that this process makes

# With several targets: what makes the next one worth a try.  403 is what RBAC with resourceNames says of other names.
NEXT = ("unknown", "port", "forbidden")


# -- which one is next -------------------------------------------------------------------------


def least(pods: Pods, choices: Sequence[Choice]) -> Choice:
    """Fewest open connections; of several the one that was chosen longest ago."""
    return min(choices, key=lambda choice: (pods.open.get(choice.uid, 0), pods.turns.get(choice.uid, 0)))


def in_turn(pods: Pods, choices: Sequence[Choice]) -> Choice:
    """The one that was chosen longest ago."""
    return min(choices, key=lambda choice: pods.turns.get(choice.uid, 0))


def of_two(pods: Pods, choices: Sequence[Choice]) -> Choice:
    """Of two at random the one with fewer open connections."""
    return least(pods, random.sample(choices, min(2, len(choices))))


# A row for each word of BALANCES.  Choices come ordered by the names of pods.
CHOOSE: dict[str, Callable[[Pods, Sequence[Choice]], Choice]] = {
    "least": least, "round-robin": in_turn, "random": of_two, "first": lambda pods, choices: choices[0]}


# -- what is known of a target -----------------------------------------------------------------

EMPTY, ASKING, LISTING = "nothing is known", "asking for it", "listing pods"
WATCHING, POLLING, RESTING, CLOSED = "watching pods", "listing pods now and then", "waiting to ask again", "closed"


class Feed:
    """What the API server says of a target and its pods, kept fresh.  Its Pods owns it.

    Args:
        targets: the one that is meant, and those to be tried, in this order, where it is not there.
        news: called when pods have changed, or the time when there is something to do.
        end: called with Failed when there is no way to the pods; nothing is known then.
        latest: the latest deadline of those who wait, or 0.
    """

    def __init__(self, alarms: Alarms, api: Api, targets: Sequence[KubeTarget], news: Callable[[], None],
                 end: Callable[[Failed], None], latest: Callable[[], float]):
        self.clock = alarms.clock
        self.api = api
        self.targets = targets
        self.news, self.end, self.latest = news, end, latest
        self.state = EMPTY
        self.at = 0  # index of the target that is in use
        self.first: Failed | None = None  # why the first of several targets was not there: told where none is
        self.plan: Plan | None = None
        self.items: dict[str, tuple[Pod, ...]] | None = None  # by the uid of a pod or a slice; None: nothing is known
        self.version = ""  # of the list or the last event: where a watch begins
        self.page: dict[str, tuple[Pod, ...]] = {}  # of the list that is under way
        self.trouble: Failed | None = None  # why the last request failed, while what is known is used
        self.job: Job | None = None
        self.look: Job | None = None  # reads the object again, beside `job`
        self.maker = Maker(self) if targets[0].create is not None else None
        self.looked = 0.0  # when the object was asked for last
        self.tried = 0.0  # when pods were asked for last
        self.pause = 0.0  # of RESTING, which grows

    @property
    def target(self) -> KubeTarget:
        """The target that is in use."""
        return self.targets[self.at]

    @property
    def pods(self) -> list[Pod]:
        """All that are known, by name."""
        known = {pod.uid: pod for pods in (self.items or {}).values() for pod in pods}
        return sorted(known.values(), key=lambda pod: pod.name)

    def begin(self) -> None:
        """Ask, from EMPTY: for the object, if its kind has one, then for the pods."""
        self.at, self.first = 0, None
        self._begin()

    def forget(self, state: str = EMPTY) -> None:
        """Stop all requests, and know nothing."""
        for job in (self.job, self.look):
            if job is not None:
                job.cancel()
        self.job = self.look = self.plan = self.items = self.trouble = None
        self.state, self.version, self.page, self.pause = state, "", {}, 0.0

    def close(self) -> None:
        """Nobody wants to know any more."""
        self.forget(CLOSED)
        if self.maker is not None:
            self.maker.remove()

    def lose(self, uid: str) -> None:
        """This pod is not there, whatever is known: list them again."""
        if self.items is not None and any(pod.uid == uid for pods in self.items.values() for pod in pods):
            self.items = {key: tuple(pod for pod in pods if pod.uid != uid) for key, pods in self.items.items()}
            self.news()
            if self.items is not None and self.state != LISTING:
                self._list()

    def doubt(self) -> None:
        """Nothing is known but the plan: list them again."""
        if self.items is not None:
            self.items = None
            self._list()
            self.news()

    # -- times ---------------------------------------------------------------------------------

    def due(self) -> float:
        """When there is something to do."""
        waits = self.latest() > 0
        pause = {RESTING: self.pause, POLLING: POLL, WATCHING: WATCH_TIME[1] + WATCH_GRACE}.get(self.state, NEVER)
        if waits and self.state in (RESTING, POLLING):
            pause = min(pause, WAITED)
        looks = waits and self.items is not None and self.look is None and object_path(self.target)
        return min(self.tried + pause, self.looked + LOOK_WAITED if looks else NEVER,
                   self.maker.due() if self.maker is not None else NEVER)

    def tend(self) -> None:
        """Do what is due."""
        now, waits = self.clock(), self.latest() > 0
        if waits and self.items is not None and now >= self.looked + LOOK_WAITED:
            self.look_again()
        if self.maker is not None and now >= self.maker.due():
            self.maker.make()
        elif self.state in (RESTING, POLLING, WATCHING) and now >= self.due():
            self._list()

    def look_again(self) -> None:
        """Read the object again, beside what goes on: its selector may be another."""
        path = object_path(self.target)
        self.looked = self.clock()
        if path and self.look is None:
            self.look = self.api.get(path, self._seen, self.deadline())

    def deadline(self) -> float:
        """Of a request: while somebody waits it goes on."""
        return max(self.clock() + REQUEST_TIME, self.latest())

    # -- the object ----------------------------------------------------------------------------

    def _begin(self) -> None:
        path = object_path(self.target)
        self.looked = self.clock()
        if path:
            self.state = ASKING
            self.job = self.api.get(path, self._told, self.deadline())
        else:
            self.plan = KINDS[self.target.kind].plan(self.target, {})
            self._list()

    def _plan(self, answer: Reply | Failed) -> Plan:
        """What the object says.  Raises Failed."""
        return KINDS[self.target.kind].plan(self.target, whole(answer, object_path(self.target)))

    def _told(self, answer: Reply | Failed) -> None:
        """The object is there."""
        self.job = None
        try:
            self.plan = self._plan(answer)
        except Failed as failed:
            self._unable(failed)
        else:
            self._list()

    def _seen(self, answer: Reply | Failed) -> None:
        """The object is there again: it may be another, or gone."""
        self.look = None
        before = self.plan
        assert before is not None
        try:
            self.plan = self._plan(answer)
        except Failed as failed:
            if failed.reason in ("unknown", *REASONS):
                self.lost(failed)
                return
        else:
            if (self.plan.base, self.plan.query) != (before.base, before.query):
                self.items = None
                self._list()
        self.news()

    def _unable(self, failed: Failed) -> None:
        """A request has failed."""
        if self.items is not None:
            self.trouble = failed
            self._rest()
            self.news()
        elif not self._try_next(failed):
            self.lost(failed)

    def lost(self, failed: Failed) -> None:
        """There is no way."""
        if failed.reason in NEXT and self.first is not None:
            failed = self.first
        self.forget()
        self.end(failed)

    def _try_next(self, failed: Failed) -> bool:
        """Go on with the next target where this one is not there.  False: there is none, or that would not help."""
        if failed.reason not in NEXT or self.at + 1 >= len(self.targets):
            return False
        self.first = self.first or failed
        self.forget()
        self.at += 1
        self._begin()
        return True

    # -- lists ---------------------------------------------------------------------------------

    def _list(self, more: str = "") -> None:
        """Ask for the pods; `more`: for the next page of them."""
        assert self.plan is not None
        if self.job is not None:
            self.job.cancel()
        if not more:
            self.page = {}
        self.state, self.tried = LISTING, self.clock()
        self.job = self.api.get(self.plan.list_path(more), self._listed, self.deadline())

    def _listed(self, answer: Reply | Failed) -> None:
        """The pods, or a page of them."""
        self.job = None
        before = len(self.page)
        try:
            more = self._read(answer)
        except Failed as failed:
            self._unable(failed)
            return
        if more and before < len(self.page) < PODS_MAX:  # else the pages would have no end
            self._list(more)
            return
        is_first, self.items, self.page, self.trouble = self.items is None, self.page, {}, None
        lack = lacking(self.target, self.plan, self.pods)
        if not (is_first and lack is not None and self._try_next(lack)):
            self._watch()
            self.news()

    def _read(self, answer: Reply | Failed) -> str:
        """Read a page.  Returns the token for the next one, or "".  Raises Failed."""
        target, plan = self.target, self.plan
        assert plan is not None
        try:
            thing = whole(answer, plan.list_path())
        except Failed as failed:
            # A pod that is being replaced; one that we may not read, but perhaps connect to; a token that was too old
            # for the next page, and a watch from now on tells of the rest.
            blind = plan.single and failed.reason == "forbidden" and isinstance(plan.port, int)
            if blind:
                self.page = {"": (Pod(target.name, "", "ready"),)}
            elif not (plan.single and failed.reason == "unknown" and (self.items is not None or self.maker is not None)
                      or self.page and failed.reason == "expired"):
                raise
            self.version = ""
            return ""
        metadata = part(thing, "metadata")
        self.version = word(metadata, "resourceVersion")
        for item in [thing] if plan.single else rows(thing, "items"):
            self._put(self.page, item)
        return "" if plan.single else word(metadata, "continue")

    def _put(self, items: dict[str, tuple[Pod, ...]], item: dict[str, Any]) -> None:
        """Take an object into what is known.  Raises Failed, `answer`."""
        assert self.plan is not None
        uid = word(part(item, "metadata"), "uid")
        if uid in items or len(items) < PODS_MAX:
            items[uid] = tuple(self.plan.read(item))
            if self.maker is not None:
                self.maker.see(items[uid])

    # -- watches -------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Hear of what changes, from what is known on."""
        assert self.plan is not None
        path = self.plan.watch_path(self.version, random.randint(*WATCH_TIME))
        self.state, self.tried = WATCHING, self.clock()
        self.job = self.api.watch(path, self._heard, self._watch_over)

    def _heard(self, line: dict[str, Any]) -> None:
        """One event of the watch."""
        assert self.items is not None and self.job is not None
        try:
            what, item = word(line, "type"), part(line, "object")
            if what == "ERROR":
                raise Failed("expired" if item.get("code") == 410 else "answer",
                             f"the watch of {self.target.said} ended: {printable(word(item, 'message'), 200)}")
            version, uid = (word(part(item, "metadata"), key) for key in ("resourceVersion", "uid"))
            before = self.items.get(uid)
            if what in ("ADDED", "MODIFIED"):
                self._put(self.items, item)
            elif what == "DELETED":
                self.items.pop(uid, None)
        except Failed as failed:
            self.job.cancel()
            self._watch_over(failed)
            return
        self.version = version or self.version
        if self.items.get(uid) != before:  # most events are of what means nothing here, and there may be many
            self.news()

    def _watch_over(self, failed: Failed | None) -> None:
        """The watch has ended: as it has to from time to time, or in trouble."""
        self.job = None
        reason = failed.reason if failed is not None else ""
        has_lived = self.clock() - self.tried >= WATCH_LIVES
        if has_lived:
            self.pause = 0.0
        if reason == "forbidden":
            self.state = POLLING
        elif has_lived and not reason:
            self._watch()
        elif has_lived and reason == "expired":
            self._list()
        else:
            self._rest()
        self.news()

    def _rest(self) -> None:
        """Ask again a little later, and later each time."""
        self.state, self.tried = RESTING, self.clock()
        self.pause = min(self.pause * 2, RETRY_LAST) or RETRY_FIRST


def whole(answer: Reply | Failed, path: str) -> dict[str, Any]:
    """The object in an answer.  Raises Failed."""
    if isinstance(answer, Failed):
        raise answer
    if answer.status != 200:
        raise failure(answer, "GET", path)
    return answer.json()


# Of what is asked for a pod that is made: answers after which what is watched tells more.  404: it has gone already;
# 409: another one has made it, or the old one still ends.
FINE = {"POST": (200, 201, 202, 409), "DELETE": (200, 202, 404, 409)}


class Maker:
    """Has the pod of a jump made where there is none (`create_pod`), and removed in the end.  Its Feed owns it."""

    def __init__(self, feed: Feed):
        self.feed = feed
        self.change: Job | None = None  # makes the pod, or removes one that has ended
        self.tried = -NEVER  # when that was begun last
        self.removed = ""  # uid of the pod that has ended, and that was removed last: what is watched tells it later
        self.own = ""  # uid of the pod that this process has made
        self.heir: Callable[[], Maker | None] = lambda: None  # finds the Maker of another target with the same pod

    @property
    def pod(self) -> tuple[Api, str, str]:
        """The pod that it makes."""
        target = self.feed.targets[0]
        return self.feed.api, target.namespace, target.name

    def see(self, pods: Sequence[Pod]) -> None:
        """Note which pod is ours."""
        self.own = next((pod.uid for pod in pods if pod.owner == OWNER_NAME), self.own)

    def due(self) -> float:
        """When there is something to do: a client waits, and there is no pod but some of sniroute's that have ended."""
        feed = self.feed
        lacks = (feed.items is not None and self.change is None and feed.latest() > 0
                 and all(pod.state == "ended" and pod.owner for pod in feed.pods))
        if lacks and self.removed and all(pod.uid != self.removed for pod in feed.pods):
            return -NEVER  # its successor need not wait
        return self.tried + MAKE_AGAIN if lacks else NEVER

    def make(self) -> None:
        """Have the pod made; one that has ended has to go first.  What is watched tells when it is ready."""
        feed = self.feed
        assert feed.plan is not None
        self.tried = feed.clock()
        if feed.pods:
            self.removed = feed.pods[0].uid
            self.change = self._delete(self.removed, self._changed)
        else:
            self.removed = ""
            self.change = feed.api.send("POST", feed.plan.base, manifest(feed.target, OWNER_NAME), self._changed,
                                        feed.deadline())

    def _changed(self, answer: Reply | Failed) -> None:
        """What has come of it."""
        job, self.change = self.change, None
        assert job is not None
        if not isinstance(answer, Failed) and answer.status not in FINE[job.method]:
            answer = failure(answer, job.method, job.path)
        with contextlib.suppress(Failed):  # it cannot be read: what is watched tells, or the pod's time ends it
            if not isinstance(answer, Failed) and answer.status == 201:  # the end may come before it is watched
                self.own = word(part(answer.json(), "metadata"), "uid")
        if self.feed.state == CLOSED:
            self.remove()
        elif isinstance(answer, Failed) and not (job.method == "POST" and self.feed.pods):
            self.feed.lost(answer)
        else:  # also where a pod is there by now, whoever has made it
            self.feed.news()

    def forget(self) -> None:
        """The cluster, or the user, is another one: what is under way is no answer for those who wait now."""
        if self.change is not None:
            self.change.cancel()
        self.change, self.tried, self.removed = None, -NEVER, ""

    def remove(self) -> None:
        """Have the pod removed that we have made, or leave that to another target that has it, too.

        What comes of it does not matter any more: its time ends it, too.
        """
        own, self.own = self.own, ""
        heir = self.heir() if own else None
        if heir is not None:
            heir.own = heir.own or own
        elif own:
            self._delete(own, lambda answer: None)

    def _delete(self, uid: str, done: Callable[[Reply | Failed], None]) -> Job:
        """Have the pod removed, if it still is this one."""
        feed = self.feed
        assert feed.target.create is not None
        path = f"/api/v1/namespaces/{feed.target.namespace}/pods/{feed.target.name}"
        return feed.api.send("DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1",
                                              "preconditions": {"uid": uid}}, done, feed.clock() + REQUEST_TIME)


# -- clients -----------------------------------------------------------------------------------


class Asked:
    """A client that asks for a pod."""

    __slots__ = ("pods", "done", "deadline")

    def __init__(self, pods: Pods, done: Callable[[Choice | Failed], None], deadline: float):
        self.pods = pods
        self.done: Callable[[Choice | Failed], None] | None = done
        self.deadline = deadline

    def cancel(self) -> None:
        """The client has left: `done` is called no more.  Does nothing where it has been."""
        if self.done is not None:
            self.done = None
            self.pods.waiting.pop(self, None)

    def tell(self, answer: Choice | Failed) -> None:
        """The answer, once."""
        done, self.done = self.done, None
        if done is not None:
            done(answer)


class Pods:
    """The pods of one target, and which of them is next.  Loop only.

    Args:
        targets: that of the route, and those to be tried, in this order, where it is not there.

    `on_out(uid)` is called when a pod takes no more connections: what was made ahead for it is of no use.
    """

    def __init__(self, alarms: Alarms, api: Api, targets: Sequence[KubeTarget]):
        self.alarms = alarms
        self.clock = alarms.clock
        self.feed = Feed(alarms, api, targets, self._news, self._fail, self._latest)
        self.on_out: Callable[[str], None] = lambda uid: None
        self.waiting: collections.OrderedDict[Asked, None] = collections.OrderedDict()  # a crowd of them may leave
        self.latest = 0.0  # of all deadlines
        self.choices: list[Choice] = []  # pods that take connections, by name
        self.lacks: Failed | None = None  # what all pods that would take connections lack
        self.open: dict[str, int] = {}  # uid -> connections
        self.turns: dict[str, int] = {}  # uid -> when it was chosen last, counted in choices
        self.turn = 0
        self.rests: dict[str, float] = {}  # uid -> until when it is the last to be chosen
        self.used = 0.0  # clock time of the last client
        self.alarm: Alarm | None = None
        self.woken = NEVER  # when it rings

    @property
    def target(self) -> KubeTarget:
        """The target that is in use: the first, or the one that was there."""
        return self.feed.target

    def ask(self, done: Callable[[Choice | Failed], None], deadline: float) -> Asked:
        """A client wants a pod: `done(Choice)`, or `done(Failed)` at the deadline at the latest; perhaps at once.

        Each Choice is given back by `ended`.  Failed has a word of REASONS of sniroute_objects, or of sniroute_api.
        """
        asked = Asked(self, done, deadline)
        self.used = now = self.clock()
        answer = self._choose()
        if answer is None:
            self.waiting[asked] = None
            self.latest = max(self.latest, deadline)
            if self.feed.state == EMPTY:
                self.feed.begin()
            self._wake(min(self.feed.due(), deadline))  # it does not look at the others: a crowd would be slow
        else:
            if now >= self.feed.looked + LOOK:
                self.feed.look_again()
            asked.tell(answer)
        return asked

    def ended(self, choice: Choice) -> None:
        """The connection of a Choice is over, or was not made."""
        self.used = self.clock()
        left = self.open.get(choice.uid, 0) - 1
        if left > 0:
            self.open[choice.uid] = left
        else:
            self.open.pop(choice.uid, None)
            self._wake(NEVER)

    def failed(self, choice: Choice) -> None:
        """A connection to this pod has failed: it is the last to be chosen for a while."""
        self.rests[choice.uid] = self.clock() + REST

    def gone(self, choice: Choice) -> None:
        """The API server or the node does not know this pod: it is not chosen before a list has it again."""
        self.failed(choice)
        self.feed.lose(choice.uid)

    def doubt(self) -> None:
        """What is known may be long untrue, as after this host has slept: the next client gets what a new list has."""
        self.feed.doubt()

    def forget(self) -> None:
        """What is known is of another cluster, or another user's: ask anew."""
        if self.feed.state == CLOSED:
            return
        self.feed.forget()
        if self.feed.maker is not None:
            self.feed.maker.forget()
        self._find()
        if self.waiting:
            self.feed.begin()
            self._arm()

    def close(self) -> None:
        """Nobody wants to know any more.  Those who wait are not told."""
        for asked in self.waiting:
            asked.done = None
        self.waiting.clear()
        self.feed.close()
        self._find()
        if self.alarm is not None:
            self.alarm.cancel()
            self.woken = NEVER

    # -- which one -----------------------------------------------------------------------------

    def _choose(self) -> Choice | Failed | None:
        """The pod for the next client; None where it has to wait."""
        if not self.choices:
            return self.lacks
        choices: Sequence[Choice] = self.choices
        if self.rests:
            now = self.clock()
            self.rests = {uid: until for uid, until in self.rests.items() if until > now}
            choices = [choice for choice in choices if choice.uid not in self.rests] \
                or [min(choices, key=lambda choice: self.rests[choice.uid])]
        choice = CHOOSE[self.target.balance](self, choices)
        self.turn += 1
        self.turns[choice.uid] = self.turn
        self.open[choice.uid] = self.open.get(choice.uid, 0) + 1
        return choice

    def _find(self) -> None:
        """Find out which pods take connections."""
        before = {choice.uid for choice in self.choices}
        plan, pods = self.feed.plan, self.feed.pods
        self.choices, self.lacks = [], None
        if plan is not None:
            found = (choice_of(self.target, plan, pod) for pod in pods)
            self.choices = [choice for choice in found if choice is not None]
            self.lacks = None if self.choices else lacking(self.target, plan, pods)
        now = {choice.uid for choice in self.choices}
        self.turns = {uid: turn for uid, turn in self.turns.items() if uid in now}
        for uid in before - now:
            self.on_out(uid)

    # -- what the feed calls -------------------------------------------------------------------

    def _news(self) -> None:
        """Pods have changed: tell those who wait, if there is something to tell."""
        self._find()
        while self.waiting and (answer := self._choose()) is not None:
            self.waiting.popitem(False)[0].tell(answer)
        self._arm()

    def _fail(self, failed: Failed) -> None:
        """There is no way: tell all who wait.  The next client begins anew."""
        self._find()
        waiting, self.waiting = self.waiting, collections.OrderedDict()
        for asked in waiting:
            if self.feed.state != CLOSED:
                asked.tell(failed)

    def _latest(self) -> float:
        return self.latest if self.waiting else 0.0

    # -- times ---------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Be woken when there is something to do."""
        self._wake(min([self.feed.due(), *(asked.deadline for asked in self.waiting)]))

    def _wake(self, when: float) -> None:
        """Be woken then, at the latest.  An alarm that comes too early does no harm."""
        if self.feed.state in (EMPTY, CLOSED):
            return
        if not self.waiting and not self.open:
            when = min(when, self.used + IDLE)
        if when < self.woken:
            if self.alarm is not None:
                self.alarm.cancel()
            self.woken = when
            self.alarm = self.alarms.at(when, self._tend)

    def _tend(self) -> None:
        """Do what is due."""
        self.woken = NEVER
        now = self.clock()
        for asked in [asked for asked in self.waiting if asked.deadline <= now]:
            if asked in self.waiting:  # what was told to others may have ended it
                del self.waiting[asked]
                asked.tell(self._why_late())
        if self.feed.state in (EMPTY, CLOSED):
            return
        if not self.waiting and not self.open and now >= self.used + IDLE:
            self.feed.forget()
            self._find()
        else:
            self.feed.tend()
            self._arm()

    def _why_late(self) -> Failed:
        """What a client has waited for in vain."""
        feed = self.feed
        if feed.items is None or feed.plan is None:
            phase = feed.job.phase if feed.job is not None else feed.state
            return Failed("timeout", f"{self.target.said}: {phase} took too long")
        if feed.trouble is not None:
            return Failed(feed.trouble.reason, str(feed.trouble))
        return none_ready(self.target, feed.plan, feed.pods)
