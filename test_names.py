"""Tests of sniroute_names.py: names, addresses, and text that is shown."""

from __future__ import annotations

import re

import pytest

from sniroute_names import normalise, parse_host_port, printable, show_address
from sniroute_refusals import Malformed
from testbed.hellos import BAD_NAMES, GOOD_NAMES, Bad, verdict


# -- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD_NAMES.values(), ids=GOOD_NAMES)
def test_a_name_in_any_case_becomes_its_lower_case(name):
    assert normalise(name.encode()) == name
    assert normalise(name.upper().encode()) == name


@pytest.mark.parametrize("raw", BAD_NAMES.values(), ids=BAD_NAMES)
def test_what_is_no_name_is_refused_as_one(raw):
    with pytest.raises(Malformed) as caught:
        normalise(raw)
    assert (caught.value.kind, caught.value.alert) == ("bad_name", 112)
    assert re.fullmatch("[ -~]{1,120}", str(caught.value)), "fit for a log, whatever the name"


def test_only_letters_digits_hyphen_underscore_and_dot_are_in_names_T36_T37():
    allowed = b"abcdefghijklmnopqrstuvwxyz0123456789-_."
    for byte in range(256):
        raw = b"a" + bytes([byte]) + b"b.example.com"
        if bytes([byte]).lower() in [allowed[i:i + 1] for i in range(len(allowed))]:
            assert normalise(raw) == raw.lower().decode()
        else:
            assert verdict(normalise, raw) == Bad("bad_name", 112), byte


# -- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("h:1", ("h", 1)), ("[::1]:443", ("::1", 443)), ("[2001:DB8::0]:0", ("2001:db8::", 0)), ("*:65535", ("*", 65535)),
    ("10.0.0.1:80", ("10.0.0.1", 80)), (":80", None), ("", None), ("h", None), ("h:", None), ("h:65536", None),
    ("h:080", None), ("h:+80", None), ("h:\u0661", None), ("::1:80", None), ("[]:80", None), ("[::g]:80", None),
    ("[h]:80", None), ("h\u00e4:80", None), ("h:8\udcff", None),
])
def test_a_host_and_a_port(text, expected):
    if expected is None:
        with pytest.raises(ValueError):
            parse_host_port(text)
    else:
        assert parse_host_port(text) == expected


@pytest.mark.parametrize("address, text", [(("192.0.2.1", 1), "192.0.2.1:1"), (("::1", 2), "[::1]:2"),
                                           (("fe80::1%eth0", 3, 0, 2), "[fe80::1%eth0]:3")])
def test_an_address_for_people(address, text):
    assert show_address(address) == text


# -- text that is shown ------------------------------------------------------------------------


@pytest.mark.parametrize("text, limit, line", [
    pytest.param("plain", 10, "plain", id="short"),
    pytest.param("exactly ten"[:10], 10, "exactly te", id="as long as the limit"),
    pytest.param("eleven long", 10, "eleven ...", id="one too long"),
    pytest.param("a\nb\rc\x1b[31m\x7f\0", 20, "a?b?c?[31m??", id="control characters"),
    pytest.param("t\u00e9l\u202e\U0001f600", 20, "t?l??", id="not ASCII"),
    pytest.param("", 10, "", id="empty"),
    pytest.param("x" * 10_000_000, 10, "xxxxxxx...", id="huge"),
])
def test_printable(text, limit, line):
    assert printable(text, limit) == line
