"""Tests of sniroute_yaml.py: what is read, what is refused and in which line, and that no message has a value in it.

The last part asks others: kubectl, where it is on PATH, and PyYAML, where it is installed, have to read the same.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from sniroute_yaml import DEPTH_MAX, KEY_MAX, NODES_MAX, SIZE_MAX, Node, YamlError, data, parse_yaml
from testbed.clients import kubectl_view, with_pyyaml


def read(text: str | bytes) -> Any:
    """The text as plain data."""
    return data(parse_yaml(text if isinstance(text, bytes) else text.encode()))


def texts(node: Node) -> Any:
    """The node with all scalars as they were written."""
    if isinstance(node.value, dict):
        return {key: texts(each) for key, each in node.value.items()}
    return [texts(each) for each in node.value] if isinstance(node.value, list) else node.text


# What kubectl reads, too, at whatever place in a file; what it means.
READ: dict[str, tuple[str, Any]] = {
    "a map": ("a: 1\nb: two\n", {"a": 1, "b": "two"}),
    "a list at the indentation of its key": ("a:\n- x\n- w\nb: z\n", {"a": ["x", "w"], "b": "z"}),
    "a list further in": ("a:\n    - x\n    - w\nb: z\n", {"a": ["x", "w"], "b": "z"}),
    "maps in a list": ("- a: 1\n  b: 2\n- c: 3\n-\n  d: 4\n", [{"a": 1, "b": 2}, {"c": 3}, {"d": 4}]),
    "lists in a list": ("- - a\n  - b\n- - - c\n", [["a", "b"], [["c"]]]),
    "nothing as a value": ("a:\nb: ~\nc: null\nd:\n-\n- x\n-\n",
                           {"a": None, "b": None, "c": None, "d": [None, "x", None]}),
    "comments": ("# one\na: b # two\n  # three\n\n# four\nc: d#e\nf: '#'\n# five\n", {"a": "b", "c": "d#e", "f": "#"}),
    "a comment behind a key and behind a dash": ("a: # one\n  b: c\nd: # two\n- # three\n  e\n",
                                                 {"a": {"b": "c"}, "d": ["e"]}),
    "colons in names": ("arn:aws:eks:eu-west-1:123:cluster/x: a\nb: ns/host:6443/user\nc: ::1\n",
                        {"arn:aws:eks:eu-west-1:123:cluster/x": "a", "b": "ns/host:6443/user", "c": "::1"}),
    "dashes, and others, in texts": ("a: -b\nc: --d=e\nf: ?g\nh: a-b - c\ni: x@y\n",
                                     {"a": "-b", "c": "--d=e", "f": "?g", "h": "a-b - c", "i": "x@y"}),
    "quotes": ("a: 'it''s'\nb: \"on: #1\"\n'c d': ''\n\"e\\tf\" : \"\"\n",
               {"a": "it's", "b": "on: #1", "c d": "", "e\tf": ""}),
    "quotes within a text": ("a: b'c\nd: e\"f\"\n", {"a": "b'c", "d": 'e"f"'}),
    "escapes": (r'a: "\0\a\b\t\n\v\f\r\e\"\\\N\_\L\P\x41\u00e9\U0001F600"' + "\n",
                {"a": '\0\a\b\t\n\v\f\r\x1b"\\\x85\xa0\u2028\u2029Aé😀'}),
    "a plain text of several lines": ("a: Install\n  this  \n\n\n  and that\nb: c\n",
                                      {"a": "Install this\n\nand that", "b": "c"}),
    "a plain text in the line behind its key": ("a:\n  b c\n  d\ne:\n- f\n  g\n", {"a": "b c d", "e": ["f g"]}),
    "quoted texts of several lines": ("a: 'b\n  c\n\n  d  \n  '\ne: \"f \\\n   g\\\n   \\  h\n\n   i\"\n",
                                      {"a": "b c\nd ", "e": "f g  h\ni"}),
    "a literal": ("a: |\n  b\n    c\n\n  d\ne: f\n", {"a": "b\n  c\n\nd\n", "e": "f"}),
    "literals that end in three ways": ("a: |\n  x\n\nb: |-\n  x\n\nc: |+\n  x\n\nd: w\n",
                                        {"a": "x\n", "b": "x", "c": "x\n\n", "d": "w"}),
    "literals with an indentation of their own": ("a: |2\n    x\n   y\nb: |1-\n   z\nc: |-1\n   z\n",
                                                  {"a": "  x\n y\n", "b": "  z", "c": "  z"}),
    "a literal of nothing": ("a: |\nb: >\n\nc: |+\n\n\nd: x\n", {"a": "", "b": "", "c": "\n\n", "d": "x"}),
    "literals of blanks": ("- >\n  \n- >+\n \n- |+\n    \n  \n- b\n", ["", "\n", "\n\n", "b"]),
    "a literal that begins with an empty line": ("a: |\n\n  x\n", {"a": "\nx\n"}),
    "a literal, and a comment behind it": ("a: | # one\n  # two\n  x\n# three\nb: c\n", {"a": "# two\nx\n", "b": "c"}),
    "a literal with a tab in its text": ("a: |\n  b\tc\n  \td\n", {"a": "b\tc\n\td\n"}),
    "literals in a list": ("- |\n x\n- >-\n  y\n  z\n", ["x\n", "y z"]),
    "a folded text": ("a: >\n  b\n  c\n\n  d\n\n\n  e\n", {"a": "b c\nd\n\ne\n"}),
    "a folded text with lines further in": ("a: >-\n  b\n    c\n    d\n\n    e\n  f\n  g\n",
                                            {"a": "b\n  c\n  d\n\n  e\nf g"}),
    "a folded text that begins further in": ("a: >2\n\n    b\n  c\n", {"a": "\n  b\nc\n"}),
    "flow style": ("a: {b: c, 'd': [e, f,], \"g\": {}, h: []}\ni: []\n",
                   {"a": {"b": "c", "d": ["e", "f"], "g": {}, "h": []}, "i": []}),
    "flow style over several lines": ("a: [b, # c\n    d\n    e,\n  'f\n   g']\nh: {i: j\n    k,\n  l: }\n",
                                      {"a": ["b", "d e", "f g"], "h": {"i": "j k", "l": None}}),
    "flow style whose end is not indented": ("a: {\n    b: c\n    }\n", {"a": {"b": "c"}}),
    "colons in flow style": ("a: {b: http://c, d: 'e:f'}\nh: [a:b, c]\n",
                             {"a": {"b": "http://c", "d": "e:f"}, "h": ["a:b", "c"]}),
    "truth, as in YAML 1.1": ("a: [true, True, TRUE, yes, Yes, on, y]\nb: [false, False, no, NO, off, n, N]\n",
                              {"a": [True] * 7, "b": [False] * 7}),
    "no truth": ("a: [tRue, yEs, 'true', \"no\", t]\n", {"a": ["tRue", "yEs", "true", "no", "t"]}),
    "nulls": ("a: [~, null, Null, NULL, nULL, 'null']\n", {"a": [None, None, None, None, "nULL", "null"]}),
    "numbers": ("a: [0, -1, +5, 1_000, 0x1F, 0o17, 0b11, 0777, 08, 18446744073709551615]\n",
                {"a": [0, -1, 5, 1000, 31, 15, 3, 511, 8, 18446744073709551615]}),
    "fractions": ("a: [1.50, 1e3, -.5, .5, 0., 1.e2, 99999999999999999999]\n",
                  {"a": [1.5, 1000.0, -0.5, 0.5, 0, 100, 1e20]}),
    "no numbers": ("a: [1e, _1, '1', 1:20, 2001-12-14, 1.2.3, -, .]\n".replace("-, .", "-a, ."),
                   {"a": ["1e", "_1", "1", "1:20", "2001-12-14", "1.2.3", "-a", "."]}),
    "letters of the world": ("ключ: значение\nb: 日本 😀\n", {"ключ": "значение", "b": "日本 😀"}),
}
# What is read at the begin of a file only, or by kubectl in another way.
ALSO: dict[str, tuple[str | bytes, Any]] = {
    "an empty file": ("", None),
    "only comments": ("# a\n\n  # b", None),
    "a document with its markers": ("---\na: b\n...\n# c\n", {"a": "b"}),
    "a marker with a comment, twice": ("# x\n--- # a\n{}\n...\n", {}),
    "only a marker": ("---\n", None),
    "a BOM": (b"\xef\xbb\xbfa: b\n", {"a": "b"}),
    "CRLF": ("a: 'b\r\n  c'\r\nd: |\r\n  e\r\n  f\r\ng:\r\n- h\r\n", {"a": "b c", "d": "e\nf\n", "g": ["h"]}),
    "JSON with tabs": ('{\n\t"a": [\n\t\t1, "b\\/c", true, null, 1.5E2]\n}\n', {"a": [1, "b/c", True, None, 150.0]}),
    "JSON in one line": ('{"a":{"b":"c"},"d":["e","f"]}', {"a": {"b": "c"}, "d": ["e", "f"]}),
    "JSON with a colon in the next line": ('{"a"\n:"b"}', {"a": "b"}),
    "JSON's pairs of surrogates": ('"\\ud83d\\ude00 \\uD83D\\uDE00"', "😀 😀"),
    "brackets that are not indented": ("a: [\n  b,\n]\nc: {\n}\n", {"a": ["b"], "c": {}}),
    "no line end at the end": ("a: |\n  b", {"a": "b"}),
    "no line end, and all of them kept": ("a: |+\n  b\n\n ", {"a": "b\n\n"}),
    "a scalar alone": ("a b\nc\n", "a b c"),
    "a literal alone": ("|\n a\n  b\n", "a\n b\n"),
    "a literal alone, and its end": ("--- # a\n>\n a\n...\n", "a\n"),
    "what JSON has no number for": ("[.inf, -.INF, .nan, 1e999]", [".inf", "-.INF", ".nan", "1e999"]),
    "a number of many digits": ("9" * 1000, "9" * 1000),
    "keys that mean themselves": ("true: a\n1: b\n-5: c\n.inf: d\n'yes': e\n\"1.0\": f\n2001-01-01: g\n", {
        "true": "a", "1": "b", "-5": "c", ".inf": "d", "yes": "e", "1.0": "f", "2001-01-01": "g"}),
    "markers that are none": ("a: '---'\n---b: c\n", {"a": "---", "---b": "c"}),
}


def table(rows: dict[str, Any]) -> Any:
    """A table for parametrize."""
    return pytest.mark.parametrize("row", rows.values(), ids=rows)


@table(READ | ALSO)
def test_what_is_read(row):
    text, means = row
    assert read(text) == means and repr(read(text)) == repr(json.loads(json.dumps(read(text))))


@table(READ)
def test_it_is_read_with_crlf_and_further_in_as_well(row):
    text, means = row
    assert read(text.replace("\n", "\r\n")) == means
    further_in = "".join(f"   {line}" if line.strip() else line for line in text.splitlines(True))
    assert read(f"z:\n{further_in}") == {"z": means}


# line, what it says
REFUSED: dict[str, tuple[str | bytes, int, str]] = {
    "an anchor": ("a: b\nc: &d e\n", 2, "an anchor"),
    "an anchor on a map": ("a: &b\n  c: d\n", 1, "an anchor"),
    "an alias": ("a: b\nc: *d\n", 2, "an alias"),
    "an alias in brackets": ("a: [b, *c]\n", 1, "an alias"),
    "a tag": ("a: !!binary Yg==\n", 1, "a tag"),
    "a tag on a key": ("!a b: c\n", 1, "a tag"),
    "a merge key": ("a: b\n<<: {c: d}\n", 2, "a merge key"),
    "a merge key in braces": ("{<<: {c: d}}\n", 1, "a merge key"),
    "a key behind a question mark": ("? a\n: b\n", 1, "question mark"),
    "a list as a key": ("[a]: b\n", 1, "as a key"),
    "a map as a second key": ("a: b\n{c: d}: e\n", 2, "without a key"),
    "a map as a key in braces": ("{{a: b}: c}\n", 1, "as a key"),
    "a key of several lines in braces": ("{a\n b: c}\n", 1, "a key of several lines"),
    "no key": (": a\n", 1, "a colon without a key"),
    "a tab as indentation": ("a:\n\tb: c\n", 2, "a tab"),
    "a tab behind blanks": ("a:\n  b: c\n  \td: e\n", 3, "a tab"),
    "a tab behind a dash": ("-\ta: b\n", 1, "a tab"),
    "a tab before a comment": ("a: b\n\t# c\n  \t- d\n", 3, "a tab"),
    "a tab in a literal": ("a: |\n\tb\n", 2, "a tab"),
    "a tab in a literal that has begun": ("a: |\n  b\n\tc\n", 3, "a tab"),
    "a tab in a plain text": ("a: b\n  \tc\n", 2, "a tab"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", 3, "the key a stands twice in one map, first in line 1"),
    "a key twice in two spellings": ("ab: 1\n'ab': 2\n", 2, "the key ab stands twice"),
    "a key twice in braces": ("{a: 1,\n \"a\": 2}", 2, "the key a stands twice"),
    "a key twice that may be a secret": ("a1b2: 1\na1b2: 2\n", 2, "a key stands twice"),
    "a directive": ("%YAML 1.2\n---\na: b\n", 1, "a directive"),
    "two documents": ("a: b\n---\nc: d\n", 2, "a second document"),
    "two documents with an end": ("a: b\n...\n---\nc: d\n", 3, "a second document"),
    "text behind a marker": ("--- a\n", 1, "text behind ---"),
    "text behind the end": ("a: b\n... c\n", 2, "text behind ..."),
    "an indentation that is too small": ("a:\n    b: c\n  d: e\n", 3, "an indentation"),
    "an indentation that is too large": ("a: 'b'\n  c: d\n", 2, "an indentation"),
    "a list further in than the list": ("- 'a'\n  - b\n", 2, "an indentation"),
    "a map behind a list": ("- a\nb: c\n", 2, "an indentation, or a text"),
    "a list behind a map": ("a: b\n- c\n", 2, "an entry of a list among the keys"),
    "a list in the line of its key": ("a: - b\n", 1, "a list in the line of its key"),
    "two keys in one line": ("a: b: c\n", 1, "a second key in one line"),
    "a colon in a text of several lines": ("a: b\n  c: d\n", 2, "a key within a text"),
    "a line without a colon": ("a: b\ncd\n", 2, "a line without a key and a colon"),
    "a colon without a blank": ("a:b\nc: d\n", 2, "a key within a text"),
    "a quote that is not closed": ("a: b\nc: 'd\n  e\n", 2, "a quote that is not closed"),
    "a double quote that is not closed": ('a: "b\\"\n', 1, "a quote that is not closed"),
    "a quote that closes too late": ("a: 'b\nc: d'\n", 1, "a text in quotes whose lines are not indented"),
    "a quote across a marker": ("'a\n---\nb'\n", 1, "a quote that is not closed before ---"),
    "text behind a quote": ("a: 'b' c\n", 1, "text behind a closing quote"),
    "a comment without a blank": ("a: 'b'#c\n", 1, "text behind a closing quote"),
    "an escape that is none": ('a: "b\\d"\n', 1, "an escape in a quoted text that YAML does not have"),
    "an escape that is too short": ('a: "\\x4"\n', 1, "an escape in a quoted text that YAML does not have"),
    "half a pair of surrogates": ('a: "\\ud83d"\n', 1, "that is no character"),
    "an escape beyond Unicode": ('a: "\\U00110000"\n', 1, "that is no character"),
    "a text that begins with a sign of YAML's": ("a: @b\n", 1, "begins with @"),
    "a text that begins with a percent sign": ("a:\n- %b\n", 2, "begins with %"),
    "a text that begins with a backtick": ("a: `b`\n", 1, "a backtick"),
    "a comma": ("a: , b\n", 1, "a comma"),
    "a bracket that closes nothing": ("a: ]\n", 1, "closes nothing"),
    "a dash in brackets": ("[- a]", 1, "a dash where no list can begin"),
    "a literal in brackets": ("[| a]", 1, "a block scalar where none can begin"),
    "a bracket that is not closed": ("a: b\nc: [d,\n  e\n", 2, "a [ that is not closed"),
    "a brace across a marker": ("{a: b\n---\n}\n", 1, "a { that is not closed"),
    "brackets that do not fit": ("a: [b}\n", 1, "neither a comma nor a ]"),
    "no comma": ("a: {b: 'c' d: e}\n", 1, "neither a comma nor a }"),
    "two commas": ("[a,,b]", 1, "a comma where a value"),
    "a pair in a list": ("[a: b]", 1, "a key in square brackets"),
    **{f"the key {key}": (f"a: b\n{key}: c", 2, "a key that means a number, a truth value or nothing")
       for key in ("yes", "True", "y", "null", "~", "01", "+1", "-0", "0x10", "1_0", "1.0", ".5", "1.", "1e3", "9" * 20)},
    "a key that is a number, in braces": ("{1.0: a}", 1, "a key that means a number, a truth value or nothing"),
    "a colon at a bracket": ("{user:}", 1, "a colon with a comma or a bracket behind it"),  # for kubectl the key is user:
    "a colon at a comma": ("{a:, b: c}", 1, "a colon with a comma or a bracket behind it"),
    "a colon before a list": ("{a:[b]}", 1, "a colon with a comma or a bracket behind it"),
    "a text with a colon at its end, in a list": ("[a, b:]", 1, "a colon with a comma or a bracket behind it"),
    "a question mark first, in brackets": ("[?a]", 1, "a question mark within brackets"),  # for kubectl a is a key
    "a question mark in brackets": ("{url: http://h/x?y}", 1, "a question mark within brackets"),
    "a question mark in a key in brackets": ("{a?: b}", 1, "a question mark within brackets"),
    "a key without a colon": ("{a, b: c}", 1, "a key without a colon"),
    "a key without a blank": ("{a:b}", 1, "a key without a colon"),
    "a key without its colon in braces": ("{a\n: b}", 1, "a key whose colon is in another line"),
    "a colon at the begin of a text in brackets": ("[:a]", 1, "a text in brackets that begins with a colon"),
    "a tab at the begin of a literal": ("a: |\n  \tb\n", 2, "a tab"),
    "text behind a bracket": ("a: [b] c\n", 1, "text behind a closing bracket"),
    "a literal with an indentation of 0": ("a: |0\n  b\n", 1, "a block scalar begins with"),
    "a literal with text in its line": ("a: | b\n  c\n", 1, "text behind |"),
    "a literal that begins further in": ("a: |\n    \n  b\n", 2, "an empty line with more blanks"),
    "a NUL": ("a: b\n\0\n", 2, "a control character"),
    "a carriage return alone": ("a: b\rc: d\n", 1, "a line end that is neither"),
    "a line end of Unicode": ("a: b\nc: d\u2028e: f\n", 2, "a line end that is neither"),
    "a BOM within": ("a: b\n\ufeffc: d\n", 2, "a control character"),
    "a byte that is not UTF-8": (b"a: b\nc: \xff\n", 2, "not UTF-8"),
    "UTF-16": ("a: b\n".encode("utf-16"), 1, "not UTF-8"),
    "too much": (b" " * (SIZE_MAX + 1), 1, "more than 4 MiB"),
    "too deep": ("[" * (DEPTH_MAX + 1), 1, f"more than {DEPTH_MAX} lists and maps"),
    "too deep in blocks": ("- " * (DEPTH_MAX + 1) + "a", 1, f"more than {DEPTH_MAX} lists and maps"),
    "too many values": ("- a\n" * (NODES_MAX + 1), NODES_MAX + 1, f"more than {NODES_MAX} values"),
    "too long a key": ("a" * (KEY_MAX + 1) + ": b", 1, f"more than {KEY_MAX} characters"),
}


@table(REFUSED)
def test_what_is_refused(row):
    text, line, says = row
    with pytest.raises(YamlError) as caught:
        read(text)
    assert caught.value.line == line and says in str(caught.value)
    assert str(caught.value).startswith(f"line {line}: ") and "\n" not in str(caught.value)


def test_what_is_just_not_too_much():
    assert read("[" * DEPTH_MAX + "]" * DEPTH_MAX) and read("- " * DEPTH_MAX + "a")
    assert read("a" * KEY_MAX + ": b") == {"a" * KEY_MAX: "b"}
    assert len(read("- a\n" * (NODES_MAX - 1))) == NODES_MAX - 1
    assert read(b"a: " + b"b" * (SIZE_MAX - 3)) == {"a": "b" * (SIZE_MAX - 3)}


N = 4 * 10 ** 5  # of each: a millionth of a second for each pair of them is two days


@pytest.mark.parametrize("text", [
    "' " + " " * N + "'", '"a' + " " * N + 'b"', "'" + "''" * N, '"' + "\\\\" * N,
    "a" + " #" * N,
    "a: 'b" + " \n" * N, "|\n" + " \n" * N, "a" + "\n\n" * N, "[" + " \n" * N, "a:" * N,
    "[" + ":" * N, "'" * (N + 1), " " * N + "\t" * N + "a",
    "#" * N + "\n" + "# \n" * N,
    "a: >\n" + "  b\n\n" * 10 ** 5, "a" + "\n b" * 10 ** 5, "[" + "a\n" * 10 ** 5,
], ids=range(17))
def test_what_is_long_costs_no_more_than_its_length(text):
    """Anything else would take minutes here."""
    try:
        parse_yaml(text.encode())
    except YamlError:
        pass


def test_values_that_look_like_something_else_are_kept_as_they_were_written():
    node = parse_yaml(b"name: 1234\ntoken: 12e4\nuser: no\nkeep: 0777\nnone: ~\nempty:\nquoted: '7'\n")
    assert texts(node) == {"name": "1234", "token": "12e4", "user": "no", "keep": "0777", "none": "~", "empty": "",
                           "quoted": "7"}


def test_lines_are_known():
    node = parse_yaml(b"---\n# a\nb:\n  c: 1\n  d: [2,\n   3]\ne: >\n  f\ng:\n")
    assert node.line == 3 and {key: each.line for key, each in node.value.items()} == {"b": 4, "e": 7, "g": 9}
    inner = node.value["b"].value
    assert (inner["c"].line, inner["d"].line, inner["d"].value[1].line) == (4, 5, 6)


def test_no_value_is_shown():
    node = parse_yaml(b"token: hunter2\nlist: [hunter2]\n1: 2\ntrue: yes\nnone:\n")
    assert repr(node) == str(node) == "<a map in line 1>" and repr(node.value["token"]) == "<a text in line 1>"
    assert str([*node.value.values()]) == ("[<a text in line 1>, <a list in line 2>, <a number in line 3>, "
                                           "<a truth value in line 4>, <nothing in line 5>]")


# -- mutations ---------------------------------------------------------------------------------

SECRET = "pa55w0rd-9f8e7d6c5b4a"
WHOLE = f"""apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: YWJj
    server: https://[::1]:6443
  name: arn:aws:eks:eu-west-1:123:cluster/x
contexts:
- context: {{cluster: a, user: "b\\tc", namespace: 'it''s'}}
  name: a
current-context: "on: #1"
users:
- name: x # comment
  user:
    token: {SECRET}
    password: '{SECRET}'
    exec:
      args: [get-token, "--a={SECRET}", 'c',
        d e
        f]
      env: null
      installHint: Install gke
        for use

        with kubectl
      hint2: >-
        folded text
        more
          indented
        back

        para
      hint3: |+
        a
          {SECRET}

        c

- - a
  - |2-
      x
    y
- "multi
   line \\
   text  \\x41"
-
  k: 'a

   b'
- >
 f

 g
   h
 i
"""
BITS = ("\n", " ", "  ", ":", ": ", "- ", "#", " #", "'", '"', "\\", "{", "}", "[", "]", ",", "|", ">", "\t", "---\n",
        "...\n",
        "&a", "*a", "!t", "? ", "~", "\n\n", "-", "+", "2", "%", "@", "a", "\u2028", "\\u0041", "<<: x", "\r", "\0",
        "é")


def mutated(dice: random.Random) -> str:
    """A few lines of WHOLE, or all of it, with up to three mistakes."""
    text = WHOLE
    if dice.random() < 0.8:
        lines = text.splitlines(True)
        at = dice.randrange(len(lines))
        text = "".join(lines[at:at + dice.randrange(1, 12)])
    for _ in range(dice.choice((0, 1, 1, 2, 3))):
        at = dice.randrange(len(text) + 1)
        text = text[:at] + (dice.choice(BITS) + text[at:] if dice.random() < 0.7 else text[at + dice.randrange(1, 4):])
    return text


def test_mistakes_end_in_a_sentence_without_a_secret():
    dice = random.Random(19)
    taken = 0
    for _ in range(5000):
        text = mutated(dice)
        try:
            node = parse_yaml(text.encode())
        except YamlError as error:
            assert not any(SECRET[at:at + 6] in str(error) for at in range(len(SECRET) - 5)), text
            assert 1 <= error.line <= text.count("\n") + 1
        else:
            taken += 1
            json.dumps(data(node), allow_nan=False)
    assert 800 < taken < 4200


def test_any_bytes_are_read_or_refused():
    dice = random.Random(20)
    for _ in range(3000):
        source = bytearray(WHOLE.encode())
        for _ in range(dice.randrange(1, 20)):
            source[dice.randrange(len(source))] = dice.choice((dice.randrange(256),
                                                               dice.choice(b"\n :-'\"{}[],|>#\\\t")))
        try:
            parse_yaml(bytes(source[dice.randrange(400):]))
        except YamlError:
            pass


# -- others ------------------------------------------------------------------------------------


def test_kubectl_reads_the_same(tmp_path):
    """Each row as an extension of a cluster: of those kubectl keeps everything."""
    lines = ["clusters:", "- name: c", "  cluster:", "    server: https://h", "    extensions:"]
    for number, (text, _) in enumerate(READ.values(), 100):  # kubectl sorts them by name
        lines += [f"    - name: x{number}", "      extension:", "        v:",
                  *(f"          {line}" if line.strip() else line for line in text.split("\n")[:-1])]
    config = tmp_path / "config"
    config.write_text("\n".join(lines) + "\n")
    found = kubectl_view(config)
    assert [each["extension"]["v"] for each in found["clusters"][0]["cluster"]["extensions"]] == [
        means for _, means in READ.values()]
    assert [each["extension"]["v"] for each in read(config.read_bytes())["clusters"][0]["cluster"]["extensions"]] == [
        means for _, means in READ.values()]


def test_pyyaml_reads_mistakes_the_same():
    """What both read: its BaseLoader keeps all scalars as they were written."""
    dice = random.Random(21)
    ours = {}
    while len(ours) < 2000:
        text = mutated(dice)
        try:
            ours[text] = texts(parse_yaml(text.encode()))
        except YamlError:
            continue
    theirs = with_pyyaml(list(ours))
    differ = {text for (text, own), found in zip(ours.items(), theirs) if found and (found[0] or "") != (own or "")}
    assert not differ and len(list(filter(None, theirs))) > 500
