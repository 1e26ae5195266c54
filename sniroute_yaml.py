"""sniroute_yaml: the YAML of a kubeconfig, as kubectl and people write it: a strict reader, without I/O.

    bytes --- parse_yaml ---> Node --- data ---> what json.loads would return
                               |
                               +-- value: a dict or a list of Nodes, or a text, a number, a bool, None
                               +-- text: a scalar as it was written (`name: 1234` is a name, where one is wanted)
                               +-- line: where it begins

Block and flow style, plain, quoted and block scalars (`|`, `>`), comments, `---`, CRLF and a BOM; JSON too, which is
flow style.  Plain scalars mean what they mean to kubectl, whose library takes the words of YAML 1.1: `yes` is true.

Two programs that read one file in two ways are a trap, and a file with secrets is no place for programs in it.  So
what kubectl never writes is refused in words, with its line: anchors, aliases, tags, merge keys, directives, keys that
are no plain text or mean another one (`yes`, `1.0`), a key that stands twice, several documents, tabs as indentation,
line ends other than LF and CRLF.
What kubectl does not read is refused, too; two things more are read, both of JSON: pairs of surrogates
(`\\ud83d\\ude00`), and a line end before a colon.

No message has a byte of a value: a file with a mistake in it has secrets, too.

    block        a node of block style; it ends where a line begins that is not part of it
      mapping, sequence, literal, plain, quoted
    flow         a node of flow style

Threads: any; a reader belongs to one call.

Seams: I want to ...
    read another form       the first characters of a node are looked at in `block` and in `flow`
    refuse another form     a row in REFUSED, or `fault`
    give a word a meaning   WORDS

This room imports the standard library only.  Source: YAML 1.2.2 (yaml.org/spec/1.2.2), with the section where it is
used; sigs.k8s.io/yaml for the meaning of plain scalars.
"""

from __future__ import annotations

import bisect
import re
from typing import Any, NamedTuple, NoReturn, Union

__version__ = "0.1.0"

# Limits.  A kubeconfig has some 3 KiB for each cluster, so that these are for a thousand clusters.
SIZE_MAX = 4 << 20  # bytes
NODES_MAX = 100_000  # scalars, lists and maps: a Node takes some 200 bytes
DEPTH_MAX = 64  # lists and maps within each other: a level is two or three calls, and Python stops at a thousand
KEY_MAX = 1024  # characters of a key, section 7.4.2

Value = Union[dict[str, "Node"], list["Node"], str, int, float, bool, None]


class YamlError(ValueError):
    """A text that is not read: in words, without a byte of its values; `line` counts from 1."""

    def __init__(self, message: str, line: int):
        super().__init__(f"line {line}: {message}")
        self.line = line


class Node(NamedTuple):
    """A scalar, a list or a map."""

    value: Value
    line: int  # where it begins, from 1; a value that is not there stands where its key does
    text: str | None = None  # a scalar as it was written: folded, and without quotes; None for lists and maps

    def __repr__(self) -> str:
        """What it is, and never what it says: it may be a secret."""
        return f"<{kind_of(self)} in line {self.line}>"


def kind_of(node: Node) -> str:
    """What a node is, for people."""
    value = node.value
    return ("nothing" if value is None else "a map" if isinstance(value, dict) else "a list" if isinstance(value, list)
            else "a text" if isinstance(value, str) else "a truth value" if isinstance(value, bool) else "a number")


def data(node: Node) -> Any:
    """The node as json.loads would return it."""
    value = node.value
    if isinstance(value, dict):
        return {key: data(each) for key, each in value.items()}
    return [data(each) for each in value] if isinstance(value, list) else value


# -- what plain scalars mean -------------------------------------------------------------------

# The words of YAML 1.1, in the three spellings each that kubectl knows.
WORDS: dict[str, bool | None] = {
    spelling: value
    for value, words in ((True, ("y", "yes", "true", "on")), (False, ("n", "no", "false", "off")), (None, ("null",)))
    for word in words for spelling in (word, word.capitalize(), word.upper())}
WORDS.update({"": None, "~": None})
NUMBER = re.compile(r"[-+.0-9]")  # the first character of one
INTEGER = re.compile(r"([-+]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|(0|[1-9][0-9]*))", re.ASCII)
BASES = 16, 2, 8, 10  # of the groups of INTEGER
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
DIGITS_MAX = 400  # of a number: Go's largest has 309


def meaning(text: str) -> str | int | float | bool | None:
    """What a plain scalar means to kubectl; infinities and dates are texts."""
    if text in WORDS:
        return WORDS[text]
    if not NUMBER.match(text) or len(text) > DIGITS_MAX:
        return text
    digits = text.replace("_", "")
    found = INTEGER.fullmatch(digits)
    if found:
        sign, *groups = found.groups()
        value = next(int(group, base) for group, base in zip(groups, BASES) if group is not None)
        value = -value if sign == "-" else value
        return value if -1 << 63 <= value < 1 << 64 else finite(float(value), text)
    return finite(float(digits), text) if FLOAT.fullmatch(digits) else text


def finite(value: float, text: str) -> float | str:
    """The number, or the text where the number is too large for one: JSON has no infinity."""
    return text if value in (float("inf"), float("-inf")) else value


# -- characters --------------------------------------------------------------------------------

# What no text may have: all but the characters of section 5.1.  NEL, LS and PS are refused, too, since they end a line
# for some readers; and so is a BOM that is not the first character.
ODD = re.compile("[^\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
MARKER = re.compile(r"(?:---|\.\.\.)(?=[ \t\n])")  # section 9.1.2; at the begin of a line
MARKER_IN_TEXT = re.compile(r"\n(?:---|\.\.\.)[ \t\n]")
BLANKS = re.compile(r"[ \t]*")
LINE_END = re.compile(r"(?:[ \t]+#[^\n]*|[ \t]*)\n")
TO_NEXT = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*")  # empty lines and comments
SPACES = re.compile(r" *")
EMPTY = re.compile(r"(?: *\n)*")  # lines
BREAK = re.compile(r"\n((?:[ \t]*\n)*)( *)[ \t]*")  # from the end of a line to the text of another
DASH = re.compile(r"-(?=[ \t\n])")
PLAIN_END = re.compile(r":(?=[ \t\n])|[ \t]#|\n")
FLOW_END = re.compile(r"[,\[\]{}\n?]|:(?=[ \t\n,\[\]{}])|[ \t]#")
FLOW_BLANKS = re.compile(r"(?:[ \t\n]+(?:#[^\n]*)?)*+")
SINGLE = re.compile(r"'((?:[^']|'')*+)'")
DOUBLE = re.compile(r'"((?:[^"\\]|\\.)*+)"', re.DOTALL)
COLON = re.compile(r"[ \t]*:(?=[ \t\n])")
SHORT = re.compile(r"\n( *)[^ \n]")  # the indentation of a line in a quoted text
HEADER = re.compile(r"[|>](?:([1-9])([-+]?)|([-+])([1-9]?)|)(?=[ \t\n])")  # section 8.1.1
# Within quotes.  A run of blanks is taken whole, so that a long one is looked at once.
FOLDED = re.compile(r"(?P<fold>[ \t]*+\n((?:[ \t]*\n)*)[ \t]*)|[ \t]+")
ESCAPED = re.compile(
    r"\\\n((?:[ \t]*\n)*)[ \t]*|[ \t]*+\n((?:[ \t]*\n)*)[ \t]*|[ \t]+"
    r"|\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})"
    r"|\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
ESCAPES = dict(zip('0abtnvfre "/\\N_LP\t', '\0\a\b\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029\t', strict=True))  # 5.7
NAMEABLE = re.compile(r"[A-Za-z][a-zA-Z.-]{0,39}")  # a key that a message may name; secrets have digits

# What no node begins with, and why.
REFUSED = {
    "&": "an anchor: write the value itself",
    "*": "an alias, or a plain text that begins with *: write the value itself, or put it in quotes",
    "!": "a tag: leave it out",
    "%": "a plain text that begins with %: put it in quotes",
    "@": "a plain text that begins with @: put it in quotes",
    "`": "a plain text that begins with a backtick: put it in quotes",
    ",": "a comma where a value is expected",
    "]": "a ] that closes nothing",
    "}": "a } that closes nothing",
    "#": "a # without a blank before it",
    "|": "a block scalar where none can begin",
    ">": "a block scalar where none can begin",
}
# What begins a plain text only where no blank is behind it.
LONELY = {"?": "a key behind a question mark: write `key: value`", ":": "a colon without a key before it",
          "-": "a dash where no list can begin"}


# -- the reader --------------------------------------------------------------------------------


def parse_yaml(source: bytes) -> Node:
    """The one document of a text; a Node of None where there is nothing.  Raises YamlError."""
    if len(source) > SIZE_MAX:
        raise YamlError(f"more than {SIZE_MAX >> 20} MiB", 1)
    try:
        text = source.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError("a byte that is not UTF-8", source.count(b"\n", 0, error.start) + 1) from None
    text = text.replace("\r\n", "\n")
    odd = ODD.search(text)
    if odd:
        raise YamlError("a control character, or a line end that is neither LF nor CRLF",
                        text.count("\n", 0, odd.start()) + 1)
    return _Reader(text).document()


class _Reader:
    """A text, and how far it is read.

    `block` and what it calls leave `at` at the first character of a line's text, and `column` as its indentation: -1
    at the end of the document.
    """

    __slots__ = ("text", "is_cut", "starts", "at", "column", "nodes", "depth")

    def __init__(self, text: str):
        self.is_cut = not text.endswith("\n")  # the last line has no end: a block scalar there has none, either
        self.text = text + "\n" if self.is_cut else text
        self.starts = [0, *(found.end() for found in re.finditer(r"\n", self.text))]
        self.at = 0
        self.column = 0
        self.nodes = 0
        self.depth = 0

    def fault(self, message: str, at: int | None = None) -> NoReturn:
        """Raise YamlError for what stands at `at`, or where the reader is."""
        raise YamlError(message, self.line(at))

    def line(self, at: int | None = None) -> int:
        """The line of a place, from 1."""
        return bisect.bisect_right(self.starts, min(self.at if at is None else at, len(self.text) - 1))

    def column_here(self) -> int:
        """How far `at` is from the begin of its line."""
        return self.at - self.starts[self.line() - 1]

    def make(self, value: Value, at: int, text: str | None = None) -> Node:
        """A Node that begins at `at`."""
        self.nodes += 1
        if self.nodes > NODES_MAX:
            self.fault(f"more than {NODES_MAX} values", at)
        return Node(value, self.line(at), text)

    def deeper(self) -> None:
        """A list or a map begins."""
        self.depth += 1
        if self.depth > DEPTH_MAX:
            self.fault(f"more than {DEPTH_MAX} lists and maps within each other")

    # lines

    def next_line(self) -> None:
        """Go to the next line that has text; `at` is where a line begins."""
        text = self.text
        self.at = TO_NEXT.match(text, self.at).end()
        start = self.at
        self.at = SPACES.match(text, start).end()
        self.column = self.at - start
        if self.at == len(text) or MARKER.match(text, start):
            self.at, self.column = start, -1
        elif text[self.at] == "\t":
            self.fault("a tab as indentation: use spaces")

    def end_line(self, what: str) -> None:
        """Go past the rest of a line, which has to be empty but for a comment, and to the next one."""
        found = LINE_END.match(self.text, self.at)
        if not found:
            self.fault(f"text behind {what}")
        self.at = found.end()
        self.next_line()

    def document(self) -> Node:
        """All of the text."""
        self.next_line()
        if self.text.startswith("%", self.at):
            self.fault("a directive: leave it out")
        if self.text.startswith("---", self.at) and self.column < 0:
            self.at += 3
            self.end_line("---: give it a line of its own")
        node = self.make(None, self.at, "") if self.column < 0 else self.block(-1, True)
        if self.column >= 0:
            self.fault("an indentation, or a text, that fits nothing above it")
        if self.text.startswith("...", self.at):
            self.at += 3
            self.end_line("...")
        if self.at < len(self.text):
            self.fault("a second document: one file has one")
        return node

    # block style

    def block(self, parent: int, may_nest: bool) -> Node:
        """The node at `at`, which belongs to something of the column `parent`.

        `may_nest`: whether a list or a map may begin here; behind a key, in its line, none may.
        """
        text, start = self.text, self.at
        first = text[start]
        if DASH.match(text, start):
            if not may_nest:
                self.fault("a list in the line of its key: begin it in the next line")
            return self.sequence(self.column)
        if first in "|>":
            return self.literal(parent)
        if first in "[{":
            node = self.flow()
            if COLON.match(text, self.at):
                self.fault("a list or a map as a key", start)
            self.end_line("a closing bracket")
            return node
        self.check_first()
        if self.key_end() is not None:
            if not may_nest:
                self.fault("a second key in one line: put a value with a colon in quotes, or begin it in the next line")
            return self.mapping(self.column)
        if first in "'\"":
            said = self.quoted(parent)
            self.end_line("a closing quote")
            return self.make(said, start, said)
        said = self.plain(parent)
        return self.make(meaning(said), start, said)

    def check_first(self, ends: str = " \t\n") -> None:
        """Refuse what no plain text begins with; `ends`: what is behind a colon or a dash that stands alone."""
        first, second = self.text[self.at], self.text[self.at + 1:self.at + 2]
        if first in REFUSED:
            self.fault(REFUSED[first])
        if first in LONELY and second in ends:
            self.fault(LONELY[first])

    def key_end(self) -> int | None:
        """Where the key at `at` ends, before its colon; None where no key is there."""
        text, at = self.text, self.at
        if text[at] in "'\"":
            found = (SINGLE if text[at] == "'" else DOUBLE).match(text, at)
            return found.end() if found and "\n" not in found[1] and COLON.match(text, found.end()) else None
        found = PLAIN_END.search(text, at)
        return found.start() if found[0] == ":" else None

    def mapping(self, column: int) -> Node:
        """A map, whose keys stand at `column`.  Section 8.2.2."""
        start, entries, lines = self.at, {}, {}
        self.deeper()
        while True:
            at = self.at
            if DASH.match(self.text, at):
                self.fault("an entry of a list among the keys of a map")
            self.check_first()
            end = self.key_end() if self.text[at] not in "[{" else None
            if end is None:
                self.fault("a line without a key and a colon: is it indented as its text wants it, or a colon missing?")
            key = self.quoted(column) if self.text[at] in "'\"" else self.text[at:end].rstrip(" \t")
            self.check_key(key, at, lines)
            self.at = COLON.match(self.text, end).end()
            entries[key] = self.value(column, at)
            if self.column < column:
                break
            if self.column > column:
                self.fault("an indentation that fits nothing above it")
        self.depth -= 1
        return self.make(entries, start)

    def check_key(self, key: str, at: int, lines: dict[str, int]) -> None:
        """Refuse a key that is none; `lines` has the lines of those before it, and gets this one's."""
        if key == "<<":
            self.fault("a merge key: write the values themselves", at)
        if self.text[at] not in "'\"":
            value = meaning(key)  # kubectl's keys are texts, made of what is meant: 1.0 and 01 are "1", `yes` is "true"
            if value is None or isinstance(value, float) or not isinstance(value, str) and str(value).lower() != key:
                self.fault("a key that means a number, a truth value or nothing: put it in quotes", at)
        if len(key) > KEY_MAX:
            self.fault(f"a key of more than {KEY_MAX} characters", at)
        if key in lines:
            name = f"the key {key}" if NAMEABLE.fullmatch(key) else "a key"
            self.fault(f"{name} stands twice in one map, first in line {lines[key]}", at)
        lines[key] = self.line(at)

    def value(self, column: int, key_at: int) -> Node:
        """What belongs to a key at `column`; `at` is behind its colon."""
        self.at = BLANKS.match(self.text, self.at).end()
        if self.ends_here():
            self.end_line("a colon")
            if self.column > column:
                return self.block(column, True)
            if self.column == column and DASH.match(self.text, self.at):  # section 8.2.3: a list may stand there
                return self.sequence(column)
            return self.make(None, key_at, "")
        return self.block(column, False)

    def ends_here(self) -> bool:
        """Whether the line has nothing but a comment, behind blanks."""
        first = self.text[self.at]
        if first == "#":
            self.at -= 1  # its blank; where there is none, `end_line` says so
        return first in "\n#"

    def sequence(self, column: int) -> Node:
        """A list, whose dashes stand at `column`.  Section 8.2.1."""
        start, entries = self.at, []
        self.deeper()
        while self.column == column and DASH.match(self.text, self.at):
            dash = self.at
            self.at = SPACES.match(self.text, dash + 1).end()
            if self.text[self.at] == "\t" and not LINE_END.match(self.text, self.at):
                self.fault("a tab as indentation: use spaces")
            if self.text[self.at] == "\t" or self.ends_here():
                self.end_line("a dash")
                entries.append(self.block(column, True) if self.column > column else self.make(None, dash, ""))
            else:
                self.column = self.column_here()
                entries.append(self.block(column, True))
        if self.column > column:
            self.fault("an indentation that fits nothing above it")
        self.depth -= 1
        return self.make(entries, start)

    def plain(self, parent: int) -> str:
        """A plain text; lines of it that follow are indented by more than `parent`.  Section 7.3.3."""
        text, said = self.text, ""
        while True:
            found = PLAIN_END.search(text, self.at)
            said += text[self.at:found.start()].rstrip(" \t")
            self.at = found.start()
            if found[0] == ":":
                self.fault("a key within a text of several lines: is it indented as its text wants it?")
            folded = BREAK.match(text, self.at)
            if not folded:  # a comment ends a text
                self.end_line("a text")
                return said
            line = self.starts[self.line(folded.end()) - 1]
            if len(folded[2]) <= parent or folded.end() == len(text) or text[folded.end()] == "#" \
                    or MARKER.match(text, line):
                self.at += 1
                self.next_line()
                return said
            if text[folded.end() - 1] == "\t":
                self.fault("a tab as indentation: use spaces", folded.end())
            said += "\n" * folded[1].count("\n") or " "
            self.at = folded.end()

    def literal(self, parent: int) -> Node:
        """A block scalar: `|` keeps its lines, `>` folds them.  Section 8.1."""
        text, start = self.text, self.at
        header = HEADER.match(text, start)
        if not header:
            self.fault("a block scalar begins with | or >, then - or + and a digit at most; then its line ends")
        indent = int(header[1] or header[4] or 0)
        chomp = header[2] or header[3] or ""
        self.at = header.end()
        found = LINE_END.match(text, self.at)
        if not found:
            self.fault("text behind | or >: begin it in the next line")
        self.at = found.end()
        indent = max(parent, 0) + indent if indent else self.find_indent(parent)
        lines = self.block_lines(indent)
        last = len(lines)
        while last and not lines[last - 1]:
            last -= 1
        said = fold(lines[:last]) if text[start] == ">" else "\n".join(lines[:last])
        ends = len(lines) - last + bool(last)  # the line ends behind the last line that is not empty
        if self.is_cut and self.at == len(text):
            ends -= 1
        said += "\n" * (ends if chomp == "+" else min(ends, bool(last)) if not chomp else 0)
        self.next_line()
        return self.make(said, start, said)

    def find_indent(self, parent: int) -> int:
        """The indentation of the first line with text, which is that of a block scalar; `at` is where it begins."""
        text = self.text
        found = EMPTY.match(text, self.at)
        spaces = SPACES.match(text, found.end())
        indent = spaces.end() - spaces.start()
        longest = max(map(len, found[0].split("\n")))
        if text.startswith("\t", spaces.end()):
            self.fault("a tab as indentation: use spaces", spaces.end())
        if indent <= max(parent, 0) or spaces.end() == len(text):
            return max(max(parent, 0) + 1, longest)  # it has no text, and its empty lines are empty
        if longest > indent:
            self.fault("an empty line with more blanks than the first line of its text has", self.at)
        return indent

    def block_lines(self, indent: int) -> list[str]:
        """The lines of a block scalar, without their indentation; leaves `at` behind them."""
        text, lines = self.text, []
        while self.at < len(text):
            end = text.index("\n", self.at)
            line = text[self.at:end]
            if line[:indent].strip(" "):  # less indented: it belongs to something else, or is a fault
                if line.lstrip(" ").startswith("\t") and line.strip(" \t"):
                    self.fault("a tab as indentation: use spaces")
                break
            lines.append(line[indent:])
            self.at = end + 1
        return lines

    def quoted(self, parent: int) -> str:
        """A text in quotes; its lines are indented by more than `parent`.  Sections 7.3.1 and 7.3.2."""
        text, start = self.text, self.at
        is_double = text[start] == '"'
        found = (DOUBLE if is_double else SINGLE).match(text, start)
        if not found:
            self.fault("a quote that is not closed")
        body = found[1]
        if "\n" in body:
            if MARKER_IN_TEXT.search(body):
                self.fault("a quote that is not closed before --- or ...")
            if any(len(each[1]) <= parent for each in SHORT.finditer(body)):
                self.fault("a text in quotes whose lines are not indented, or a quote that is not closed")
        self.at = found.end()
        if not is_double:
            return FOLDED.sub(self.unfold, body).replace("''", "'") if "\n" in body else body.replace("''", "'")
        if "\\" not in body and "\n" not in body:
            return body
        return ESCAPED.sub(lambda each: self.unescape(each, start), body)

    @staticmethod
    def unfold(found: re.Match[str]) -> str:
        """A run of blanks, or an end of a line with the empty lines behind it."""
        return found[0] if found["fold"] is None else "\n" * found[2].count("\n") or " "

    def unescape(self, found: re.Match[str], start: int) -> str:
        """What stands in double quotes for one match of ESCAPED; `start` is where the text begins."""
        joined, folded, high, low, *codes, letter = found.groups()
        if joined is not None:
            return "\n" * joined.count("\n")
        if folded is not None:
            return "\n" * folded.count("\n") or " "
        if high is not None:
            return chr(0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00)
        code = next((int(each, 16) for each in codes if each is not None), None)
        if code is not None:
            if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
                self.fault("an escape in a quoted text that is no character", start)
            return chr(code)
        if letter is None:
            return found[0]  # blanks
        if letter not in ESCAPES:
            self.fault("an escape in a quoted text that YAML does not have: write \\\\ for a backslash", start)
        return ESCAPES[letter]

    # flow style

    def flow(self) -> Node:
        """A node of flow style; leaves `at` behind it.  Section 7.4."""
        text, start = self.text, self.at
        first = text[start]
        if first in "[{":
            self.deeper()
            self.at += 1
            node = self.make(self.flow_list(start) if first == "[" else self.flow_map(start), start)
            self.depth -= 1
            return node
        said = self.flow_text()
        return self.make(said if first in "'\"" else meaning(said), start, said)

    def flow_text(self) -> str:
        """A scalar of flow style."""
        if self.text[self.at] in "'\"":
            return self.quoted(-1)
        self.check_first(" \t\n,[]{}")
        if self.text[self.at] == ":":
            self.fault("a text in brackets that begins with a colon: put it in quotes")
        text, said = self.text, ""
        while True:
            found = FLOW_END.search(text, self.at)
            said += text[self.at:found.start()].rstrip(" \t")
            self.at = found.start()
            if found[0] == "?":  # for kubectl it ends a text in brackets, and begins a key
                self.fault("a question mark within brackets: put the text in quotes")
            if found[0] == ":" and text[self.at + 1] in ",[]{}":  # for kubectl the colon is a part of the text
                self.fault("a colon with a comma or a bracket behind it: put a blank between, or the text in quotes")
            if found[0] != "\n":
                return said
            folded = BREAK.match(text, self.at)
            end = folded.end()
            if end == len(text) or text[end] in ",[]{}#" or FLOW_END.match(text, end) \
                    or MARKER_IN_TEXT.match(text, end - 1):
                return said
            said += "\n" * folded[1].count("\n") or " "
            self.at = end

    def flow_next(self, opened: int) -> str:
        """Go to the next character that is no blank and in no comment; `opened` is where the bracket stands."""
        text, before = self.text, self.at
        self.at = FLOW_BLANKS.match(text, before).end()
        if self.at == len(text) or MARKER_IN_TEXT.match(text, self.at - 1):
            self.fault(f"a {text[opened]} that is not closed", opened)
        return text[self.at]

    def flow_list(self, start: int) -> list[Node]:
        """What is in square brackets."""
        entries = []
        while self.flow_next(start) != "]":
            entries.append(self.flow())
            last = self.flow_next(start)
            if last == ":":
                self.fault("a key in square brackets: put the pair in braces")
            self.flow_comma(last, "]")
        self.at += 1
        return entries

    def flow_comma(self, found: str, closing: str) -> None:
        """Go past a comma; a bracket that closes may be there instead."""
        if found == ",":
            self.at += 1
        elif found != closing:
            self.fault(f"neither a comma nor a {closing} behind a value in brackets")

    def flow_map(self, start: int) -> dict[str, Node]:
        """What is in braces."""
        entries: dict[str, Node] = {}
        lines: dict[str, int] = {}
        while self.flow_next(start) != "}":
            at = self.at
            if self.text[at] in "[{":
                self.fault("a list or a map as a key")
            key = self.flow_text()
            if "\n" in self.text[at:self.at]:
                self.fault("a key of several lines", at)
            self.check_key(key, at, lines)
            end = self.at
            if self.flow_next(start) != ":":
                self.fault("a key without a colon in braces", at)
            if "\n" in self.text[end:self.at] and self.text[at] not in "'\"":  # JSON may
                self.fault("a key whose colon is in another line", at)
            self.at += 1
            last = self.flow_next(start)
            entries[key] = self.make(None, at, "") if last in ",}" else self.flow()
            self.flow_comma(self.flow_next(start), "}")
        self.at += 1
        return entries


def fold(lines: list[str]) -> str:
    """The lines of a `>` scalar as one text: section 8.1.3.  Lines that begin with a blank keep their ends."""
    said, empty, before = "", 0, ""
    for line in lines:
        if not line:
            empty += 1
            continue
        is_indented = line[0] in " \t"
        if before and not is_indented and before[0] not in " \t":
            said += "\n" * empty or " "
        else:
            said += "\n" * (empty + bool(before))
        said += line
        before, empty = line, 0
    return said
