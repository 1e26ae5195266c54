"""Tests of sniroute_patterns.py: which names a pattern fits, what their fields are, and which pattern is the best."""

from __future__ import annotations

import itertools
import random
import re
import sys
import threading
from typing import Iterator

import pytest

import sniroute_patterns
from sniroute_patterns import Fielded, Label, expand, parse_pattern, rank, unknown_fields, written


def fields(pattern: str, name: str) -> dict[str, str] | None:
    """The fields of a name; None where the pattern does not fit it."""
    return next(parse_pattern(pattern).splits(name), None)


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, shown, names", [
    ("{service}--{port}.svc.example.com", "{service}--{port}.svc.example.com", ("service", "port")),
    ("API-{x}-V{n}.Example.COM.", "api-{x}-v{n}.example.com", ("x", "n")),
    ("{a}.{b2}.{c_d}.ns.k8s.localhost", "{a}.{b2}.{c_d}.ns.k8s.localhost", ("a", "b2", "c_d")),
    ("{a}.{b}", "{a}.{b}", ("a", "b")), ("db.{tld}", "db.{tld}", ("tld",)),
    ("*.{env}.example.com", "*.{env}.example.com", ("env",)), ("**.{env}.Example.com.", "**.{env}.example.com", ("env",)),
    ("*.example.com", "*.example.com", ()), ("DB", "db", ()), ("*", "*", ()),
])
def test_a_pattern_has_one_form(text, shown, names):
    pattern = parse_pattern(text)
    assert written(pattern) == shown and pattern.fields == names
    assert parse_pattern(shown) == pattern


@pytest.mark.parametrize("text, complaint", [
    ("{a}{b}.example.com", "between two fields of a label stands literal text"),
    ("x{a}{b}-{c}.example.com", "between two fields of a label stands literal text"),
    ("{Service}.example.com", "{Service} is no name of a field"), ("{1a}.example.com", "{1a} is no name of a field"),
    ("{}.example.com", "{} is no name of a field"), ("{_a}.example.com", "{_a} is no name of a field"),
    ("{a-b}.example.com", "{a-b} is no name of a field"), ("{\u00e4}.example.com", "{?} is no name of a field"),
    ("{\x1b[2J}.example.com", "is no name of a field"), ("{a.b}.example.com", "is not a name"),
    ("{name}.example.com", "{name} is a field of each name"), ("x-{label}.example.com", "{label} is a field of each"),
    ("{domain}.example.com", "{domain} is a field of each name"),
    ("{a}-{a}.example.com", "has the field {a} twice"), ("{a}.{a}.example.com", "has the field {a} twice"),
    ("{a}", "two labels at least"), ("*.{a}", "two labels at least"), ("**.x{a}", "two labels at least"),
    ("{a.example.com", "is not a name"), ("a}.example.com", "is not a name"), ("{{a}}.example.com", "is not a name"),
    ("{a}*.example.com", "is not a name"), ("a.*.{b}.example.com", "is not a name"), ("***.{b}.example.com", "is not a"),
    ("-{a}.example.com", "is not a name"), ("{a}-.example.com", "is not a name"), ("{a}..example.com", "is not a name"),
    ("{a}.10", "is not a name"), ("{a}." + "x" * 64 + ".com", "is not a name"), ("x" * 63 + "{a}.com", "is not a name"),
    ("{a}.m\u00fcnchen.example", "write {a}.xn--mnchen-3ya.example, which"),
])
def test_a_pattern_that_no_name_can_fit_is_told_in_one_line(text, complaint):
    with pytest.raises(ValueError) as caught:
        parse_pattern(text)
    assert complaint in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("template, complaint", [
    ("{a}.internal:1", ""), ("{name}:{label}.{domain}", ""), ("none", ""),
    ("{b}.internal:1", "'{b}.internal:1' has a field other than {name}, {label}, {domain}, {a}"),
    ("{a", "has a field other"), ("{}", "has a field other"), ("a}", "has a field other"), ("{{a}}", "has a field other"),
])
def test_a_template_asks_for_fields_that_its_names_have(template, complaint):
    said = unknown_fields(template, parse_pattern("{a}.example.com"))
    assert complaint in said and bool(said) is bool(complaint)


@pytest.mark.parametrize("text, told", [
    ("{a}.example.com", "fields a; 10 literal characters"),
    ("x-{service}--{port}.{ns}.example.com", "fields service, port, ns; the last '--' between {service} and {port} splits; "
     "14 literal characters"),
])
def test_how_a_pattern_is_read_is_told(text, told):
    assert parse_pattern(text).describe() == told


# -- splitting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, name, expected", [
    ("{service}-{port}.example.com", "my-api-8080.example.com", {"service": "my-api", "port": "8080"}),
    ("{service}--{port}.example.com", "my-api--http-metrics.example.com", {"service": "my-api", "port": "http-metrics"}),
    ("{a}--{b}.example.com", "x---y.example.com", {"a": "x-", "b": "y"}),
    ("{a}--{b}.example.com", "x--y--z.example.com", {"a": "x--y", "b": "z"}),
    ("{a}-{b}.example.com", "x-y-.example.com", {"a": "x", "b": "y-"}), ("{a}-{b}.example.com", "xy.example.com", None),
    ("{a}-{b}-{c}.example.com", "1-2-3-4.example.com", {"a": "1-2", "b": "3", "c": "4"}),
    ("{a}-{b}x{c}.example.com", "1-2x3-4x5.example.com", {"a": "1-2x3", "b": "4", "c": "5"}),
    ("{a}x{b}.example.com", "xxx.example.com", {"a": "x", "b": "x"}), ("{a}x{b}.example.com", "xx.example.com", None),
    ("api-{x}-v1.example.com", "api-web-v1.example.com", {"x": "web"}), ("api-{x}-v1.example.com", "api-v1.example.com", None),
    ("aa{x}aa.example.com", "aaa.example.com", None), ("aa{x}aa.example.com", "aaaa.example.com", None),
    ("{a}.{b}.example.com", "x.y.example.com", {"a": "x", "b": "y"}), ("{a}.example.com", "x.y.example.com", None),
    ("{a}.{b}.example.com", "x.example.com", None), ("{a}.example.com", "x.example.org", None),
    ("{a}.example.com", "_x-_y.example.com", {"a": "_x-_y"}), ("db.{tld}", "db.com", {"tld": "com"}),
    ("*.{env}.example.com", "db.eu.example.com", {"env": "eu"}), ("**.{env}.example.com", "a.b.eu.example.com", {"env": "eu"}),
])
def test_the_last_place_that_fits_splits(pattern, name, expected):
    assert fields(pattern, name) == expected


def test_further_splits_come_one_after_another():
    """For a kind of target that knows which service has which port."""
    splits = parse_pattern("{service}-{port}.{x}-{y}.example.com").splits("my-api-http-metrics.1-2-3.example.com")
    assert [tuple(each.values()) for each in splits] == [
        ("my-api-http", "metrics", "1-2", "3"), ("my-api", "http-metrics", "1-2", "3"), ("my", "api-http-metrics", "1-2", "3"),
        ("my-api-http", "metrics", "1", "2-3"), ("my-api", "http-metrics", "1", "2-3"), ("my", "api-http-metrics", "1", "2-3")]


def all_splits(label: Label, text: str) -> list[tuple[str, ...]]:
    """Each way of splitting a label, found by trying all lengths; the last places first, from the end."""
    found = []
    for lengths in itertools.product(range(1, len(text) + 1), repeat=len(label.fields)):
        ends = list(itertools.accumulate(lengths))
        values, at, said = [], len(label.literals[0]), label.literals[0]
        for length, literal in zip(lengths, label.literals[1:]):
            values.append(text[at:at + length])
            said += text[at:at + length] + literal
            at += length + len(literal)
        if said == text and len(text) == at and all(len(v) == n for v, n in zip(values, lengths)):
            found.append((ends, tuple(values)))
    found.sort(key=lambda pair: pair[0][-2::-1], reverse=True)
    return [values for _, values in found]


def test_a_label_is_split_as_by_trying_all_places():
    chance = random.Random(17)
    several = 0
    for _ in range(3000):
        count = chance.randint(1, 3)
        literals = ["".join(chance.choices("a-", k=chance.randint(edge, 2)))
                    for edge in (0, *[1] * (count - 1), 0)]
        label = Label(tuple(literals), tuple("xyz"[:count]))
        text = "".join(chance.choices("a-", k=chance.randint(1, 8)))
        found = list(label.splits(text))
        assert found == all_splits(label, text), (label, text)
        several += len(found) > 1
    assert several > 50


@pytest.mark.parametrize("pattern, label", [
    ("{a}-{b}-{c}-{d}-{e}-{f}.example.com", "-" * 63), ("{a}-{b}-{c}-{d}-{e}-{f}--x.example.com", "-" * 63),
    ("{a}a{b}a{c}a{d}a{e}b{f}.example.com", "a" * 63), ("{a}a{b}a{c}a{d}a{e}aab{f}.example.com", "a" * 62 + "b"),
    ("{a}-{b}-{c}-{d}-{e}-{f}.x{y}.example.com", "-" * 63),
])
def test_no_label_takes_long_to_be_split_or_not(pattern, label):
    """What a regular expression with backtracking would need seconds for."""
    steps = 0

    def count(frame, event, arg):
        nonlocal steps
        steps += 1
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        fields(pattern, f"{label}.y.example.com" if ".x{" in pattern else f"{label}.example.com")
    finally:
        sys.settrace(before)
    assert steps < 2000


# -- many patterns -----------------------------------------------------------------------------


def best(patterns: list[str], name: str) -> str | None:
    """The pattern for a name, by asking each."""
    return min((text for text in patterns if fields(text, name)), key=rank, default=None)


def index(*patterns: str) -> Fielded:
    """With these patterns."""
    fielded = Fielded()
    for pattern in patterns:
        fielded.add(pattern)
    return fielded


@pytest.mark.parametrize("patterns, name, expected", [
    (["{a}.example.com", "api-{a}.example.com"], "api-1.example.com", "api-{a}.example.com"),
    (["{a}-{b}.example.com", "{a}--{b}.example.com"], "x--y.example.com", "{a}--{b}.example.com"),
    (["{a}.{b}.example.com", "{a}.eu.example.com", "db.{b}.example.com"], "db.eu.example.com", "db.{b}.example.com"),
    (["{a}.{b}.example.com", "{a}.eu.example.com"], "db.eu.example.com", "{a}.eu.example.com"),
    (["{a}-{b}.example.com", "x{a}.example.com"], "x-1.example.com", "x{a}.example.com"),
    (["{a}x.example.com", "x{a}.example.com"], "x1x.example.com", "x{a}.example.com"),
], ids=["in front", "between", "same number: the alphabet", "labels", "fewer fields", "alphabet"])
def test_more_literal_characters_win(patterns, name, expected):
    for order in itertools.permutations(patterns):
        assert index(*order).find(("",), name) == expected == best(patterns, name)


def random_patterns(chance: random.Random, count: int) -> Iterator[str]:
    """Patterns over few letters, so that many fit one name; no two of one form."""
    forms = set()
    while len(forms) < count:
        names = iter("pqrstuvwxyz")
        labels = []
        for _ in range(chance.randint(2, 3)):
            label = "".join(chance.choices("ab", k=chance.randint(0, 2)))
            for number in range(chance.choice((0, 1, 1, 2))):
                label += "-" * (number > 0) * chance.randint(1, 2) + f"{{{next(names)}}}"
            labels.append(label + "".join(chance.choices("ab", k=chance.randint(0, 1))) or "a")
        text = ".".join(labels)
        form = re.sub(r"\{.\}", "{}", text)
        if "{" in text and form not in forms:
            forms.add(form)
            yield text


def test_of_many_patterns_the_same_one_is_found_as_by_asking_each():
    chance = random.Random(17)
    patterns = list(random_patterns(chance, 400))
    fielded, there = Fielded(), []
    found = 0
    for _ in range(900):
        pattern = chance.choice(patterns)
        if pattern in there:
            fielded.remove(pattern)
            there.remove(pattern)
        else:
            fielded.add(pattern)
            there.append(pattern)
        name = ".".join("".join(chance.choices("ab-", k=chance.randint(1, 5))) for _ in range(chance.randint(2, 3)))
        expected = best(there, name)
        assert fielded.find(("",), name) == expected, name
        found += expected is not None
    assert found > 200
    for pattern in there:
        fielded.remove(pattern)
    assert not (fielded.sizes or fielded.used or fielded.ends or fielded.places), "nothing is left of what was removed"


SHAPES = ("{{service}}--{{port}}.shop-{}.example.com", "{{service}}-shop{}.example.com", "shop{}-{{port}}.example.com",
          "{{a}}.{{b}}.shop-{}.example.com", "{{a}}-shop{}-{{b}}.example.com", "{{a}}-{{b}}.x.shop{}.example.com",
          "{{a}}-{{b}}.{{c}}-shop{}-{{d}}.example.com", "*.{{a}}-shop{}.example.com")


def test_a_name_does_not_take_longer_with_12_000_patterns():
    fielded = index(*(SHAPES[number % 8].format(number) for number in range(12_000)))
    names = {"web--80.shop-8.example.com": SHAPES[0].format(8), "web-shop9.example.com": SHAPES[1].format(9),
             "shop11994-80.example.com": SHAPES[2].format(11994), "x.y.shop-11.example.com": SHAPES[3].format(11),
             "my-web-shop12-80.example.com": SHAPES[4].format(12), "a-b.x.shop13.example.com": SHAPES[5].format(13),
             "a-b.c-shop14-d.example.com": SHAPES[6].format(14), "web.a-shop15.example.com": None,
             "a-" * 30 + "a.example.com": None, "a.b": None, "a." * 126 + "b": None, "shop-1.example.com": None}
    for name, expected in names.items():
        looks = 0

        class Counted(dict):
            def get(self, *key):
                nonlocal looks
                looks += 1
                return super().get(*key)

        places, ends = fielded.places, fielded.ends
        fielded.places, fielded.ends = Counted(places), Counted(ends)
        assert fielded.find(("",), name) == expected, name
        fielded.places, fielded.ends = places, ends
        assert looks < 400, (name, looks)


def test_another_thread_may_look_while_patterns_come_and_go():
    fielded = index("{a}-0.example.com")
    texts = [f"{{a}}-{'x' * number}.example.com" for number in range(1, 40)]
    over, wrong = threading.Event(), []

    def look() -> None:
        try:
            while not over.is_set():
                assert fielded.find(("",), "b-0.example.com") == "{a}-0.example.com"
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(30):
        for text in texts:
            fielded.add(text)
        for text in texts:
            fielded.remove(text)
    over.set()
    thread.join()
    assert not wrong


def test_what_is_read_of_patterns_is_kept_for_a_limited_number():
    for number in range(sniroute_patterns.PATTERNS_READ + 10):
        parse_pattern(f"{{a}}.n{number}.example.com")
    assert parse_pattern.cache_info().currsize <= sniroute_patterns.PATTERNS_READ


def test_a_template_is_filled_in_with_the_fields_of_a_name():
    name = "my-api--8080.svc.example.com"
    known = parse_pattern("{service}--{port}.svc.example.com").sample("x") | fields("{service}--{port}.svc.example.com", name)
    assert expand("{service}.internal:{port}", known) == "my-api.internal:8080"
