"""sniroute_patterns: which names a pattern fits, and what their fields are.

    "{service}-{port}.example.com" --- parse_pattern ---> Pattern --- splits("my-api-80.example.com") --->
                                       {"service": "my-api", "port": "80"}, then {"service": "my", "port": "api-80"}
    a target, and the fields of a name --- expand ---> the target for that name
    a name --- Fielded.find ---> the best of many patterns with fields

    Pattern   a pattern as it is read: stars in front, then labels, some with fields (Label)
    Fielded   many patterns with fields, by their literal text (Skeleton)

Names come from strangers, so no regular expression reads them: a hostile name could make it slow.  A label is split
from its end instead, and no step is in vain (`split`).

Threads.  The loop changes a Fielded; every thread may look into it, since what it holds is replaced, never changed.

Seams: I want to ...
    order patterns otherwise           `rank`, and Layer.find of sniroute_routes
    allow other characters in a field  they are those of a label of a name: sniroute_names
    try other splits of a name         Pattern.splits; stop after some: strangers choose names

It imports names and refusals.
"""

from __future__ import annotations

import functools
import re
from typing import Iterator, Mapping, NamedTuple, Sequence

from sniroute_names import ascii_advice, normalise, normalise_whole, printable
from sniroute_refusals import Malformed

__version__ = "0.1.0"

PATTERNS_READ = 1024  # patterns kept as they were read: a new name needs one or two of them, 10 us each to read again

CHOSEN = "*"  # in a sample of a name, what a client may choose: no name and no field has this character
OF_NAME = ("name", "label", "domain")  # the fields that each name has
FIELDS = re.compile(r"\{([^{}]*)\}")
FIELD_NAME = re.compile(r"[a-z][a-z0-9_]*")
# What may stand in front of the labels of a pattern: how it is written, and what it is in samples of names, CHOSEN for
# each label.
STARS = {"": ("",), "*.": ("*.",), "**.": ("*.", "*.*."), "*": ("*", "*.*")}


# -- a pattern ---------------------------------------------------------------------------------


class Label(NamedTuple):
    """A label of a pattern with fields in it: `api-{service}--{port}`."""

    literals: tuple[str, ...]  # what stands before, between and behind the fields: "api-", "--", ""
    fields: tuple[str, ...]  # one less

    def splits(self, text: str) -> Iterator[tuple[str, ...]]:
        """The values of its fields in a label of a name, each way of splitting it, the LAST place that fits first."""
        before, *between, behind = self.literals
        inner = text[len(before):len(text) - len(behind)]
        if len(text) > len(before) + len(behind) and text.startswith(before) and text.endswith(behind):
            yield from split(inner, between)


def split(text: str, between: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The parts of a text around these literals, none of them empty, the last place of the last literal first.

    No step is in vain: what stands before a literal is longest at its last place.  So if that does not split, nothing
    shorter does.
    """
    if not between:
        yield (text,)
        return
    *rest, last = between
    at = text.rfind(last, 1, len(text) - 1)
    while at > 0:
        parts = None
        for parts in split(text[:at], rest):
            yield (*parts, text[at + len(last):])
        if parts is None:
            return
        at = text.rfind(last, 1, at + len(last) - 1)


class Pattern(NamedTuple):
    """A pattern as it is read."""

    stars: str  # in front: "", "*." or "**."; "*" alone has no labels behind it
    labels: tuple[str | Label, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of its fields."""
        return tuple(field for label in self.labels if isinstance(label, Label) for field in label.fields)

    @property
    def may_split(self) -> bool:
        """Whether a name may fit it in several ways."""
        return any(isinstance(label, Label) and len(label.fields) > 1 for label in self.labels)

    @property
    def literals(self) -> int:
        """How many characters are literal.  Dots between labels do not count."""
        return sum(sum(map(len, label.literals)) if isinstance(label, Label) else len(label) for label in self.labels)

    def sample(self, value: str, front: str = "") -> dict[str, str]:
        """The fields of a name that has this value for each field of the pattern, and this in front of its labels."""
        name = front + ".".join(value.join(label.literals) if isinstance(label, Label) else label
                                for label in self.labels)
        return fields_of(name) | dict.fromkeys(self.fields, value)

    def splits(self, name: str) -> Iterator[dict[str, str]]:
        """The fields of a name in each way of splitting it, the one that counts first; stars may stand for nothing.

        Routes take the first one.  Who takes more has to stop after some: where dashes part the four fields of a label,
        a hostile label of dashes splits in thousands of ways.
        """
        texts = name.split(".")
        front = len(texts) - len(self.labels)
        if front < 0 or front and not self.stars:
            return
        pairs = list(zip(self.labels, texts[front:], strict=True))
        fielded = [(label, text) for label, text in pairs if isinstance(label, Label)]
        if all(label == text for label, text in pairs if isinstance(label, str)) \
                and all(any(True for _ in label.splits(text)) for label, text in fielded):
            yield from combined(fielded)

    def describe(self) -> str:
        """How its fields are read, for people."""
        told = ["fields " + ", ".join(self.fields)]
        told += [f"the last {literal!r} between {{{one}}} and {{{other}}} splits"
                 for label in self.labels if isinstance(label, Label)
                 for literal, one, other in zip(label.literals[1:], label.fields, label.fields[1:])]
        return "; ".join([*told, f"{self.literals} literal characters"])


def combined(labels: Sequence[tuple[Label, str]]) -> Iterator[dict[str, str]]:
    """The fields of several labels, with each split of each: that of the first label varies fastest."""
    if not labels:
        yield {}
        return
    *others, (label, text) = labels
    for values in label.splits(text):
        mine = dict(zip(label.fields, values, strict=True))
        for fields in combined(others):
            yield fields | mine


@functools.lru_cache(PATTERNS_READ)
def parse_pattern(text: str) -> Pattern:
    """A pattern, in any case, with or without its trailing dot.  Raises ValueError with a sentence."""
    if text == CHOSEN:
        return Pattern(CHOSEN, ())
    stars = next((stars for stars in ("**.", "*.") if text.startswith(stars)), "")
    body = text[len(stars):]
    labels = tuple(map(parse_label, body.split("."))) if "{" in body else ()
    pattern = Pattern(stars, labels)
    fields = pattern.fields
    for at, field in enumerate(fields):
        if field in fields[:at]:
            raise ValueError(f"{text!r} has the field {{{field}}} twice")
    check = normalise_whole if stars or fields else normalise
    try:
        name = check((pattern.sample("a")["name"] if fields else body).encode("utf-8", "surrogateescape"))
    except Malformed:
        where = "with fields" if fields else "behind a star"
        raise ValueError(f"{text!r} is not a name, *.NAME, **.NAME or * ({where}, NAME has two labels at least)"
                         f"{ascii_advice(text)}") from None
    if not fields:
        return Pattern(stars, tuple(name.split(".")))
    return Pattern(stars, labels[:-1] if body.endswith(".") else labels)


def parse_label(text: str) -> str | Label:
    """A label of a pattern.  Its letters are checked later.  Raises ValueError where its fields are wrong."""
    parts = FIELDS.split(text)
    literals, fields = tuple(part.lower() for part in parts[::2]), tuple(parts[1::2])
    for field in fields:
        if not FIELD_NAME.fullmatch(field):
            raise ValueError(f"{{{printable(field)}}} is no name of a field: it has lower-case letters, digits and _, "
                             "and begins with a letter")
        if field in OF_NAME:
            raise ValueError(f"{{{field}}} is a field of each name already: give the one in {text!r} another name")
    if "" in literals[1:-1]:
        raise ValueError(f"{text!r}: between two fields of a label stands literal text, as in {{a}}--{{b}}")
    return Label(literals, fields) if fields else literals[0]


def written(pattern: Pattern) -> str:
    """A pattern as text, in its one form."""
    def show(label: str | Label) -> str:
        if isinstance(label, str):
            return label
        names = [f"{{{field}}}" for field in label.fields]
        return "".join(a + b for a, b in zip(label.literals, [*names, ""], strict=True))
    return pattern.stars + ".".join(map(show, pattern.labels))


# -- fields filled in ---------------------------------------------------------------------------


def fields_of(name: str) -> dict[str, str]:
    """The fields that each name has: OF_NAME."""
    label, _, domain = name.partition(".")
    return {"name": name, "label": label, "domain": domain}


def expand(template: str, fields: Mapping[str, str]) -> str:
    """`template` with its fields filled in: those of `fields_of`, and those of its pattern; others stay as they are."""
    return FIELDS.sub(lambda field: fields.get(field[1], field[0]), template)  # as {address} of `command:`


def unknown_fields(template: str, pattern: Pattern, more: Sequence[str] = ()) -> str:
    """What a template says in braces that no name of the pattern has, as a sentence; '' where there is nothing.

    `more`: fields that its kind of target fills in by itself.
    """
    known = (*OF_NAME, *pattern.fields, *more)
    rest = FIELDS.sub("", template)
    if "{" in rest or "}" in rest or not set(FIELDS.findall(template)) <= set(known):
        return f"{template!r} has a field other than {', '.join(f'{{{field}}}' for field in known)}"
    return ""


# -- many patterns -------------------------------------------------------------------------------


class Skeleton(NamedTuple):
    """Where the literal text of a pattern stands in the labels up to its last one with fields.

    Many patterns share one: `{service}--{port}.shop-1` and 12,000 more that differ in the shop.
    """

    cuts: tuple[tuple[int, int] | None, ...]  # for each label: literal characters before and behind fields; None: all
    at: int  # the label with the longest literal between two fields
    mark: int  # the length of that literal; 0: no label has two fields

    def keys(self, labels: Sequence[str]) -> set[tuple[str, str]]:
        """The places of Fielded where patterns of this skeleton may be that fit these labels of a name."""
        bones = ".".join(label if cut is None else label[:cut[0]] + "{" + label[max(0, len(label) - cut[1]):]
                         for label, cut in zip(labels, self.cuts))
        if not self.mark:
            return {(bones, "")}
        label = labels[self.at]
        return {(bones, label[i:i + self.mark]) for i in range(len(label) - self.mark + 1)}


def skeleton_of(pattern: Pattern) -> tuple[Skeleton, str, tuple[str, str]]:
    """The skeleton of a pattern with fields, the literal labels behind it, and the pattern's place in Fielded."""
    last = max(at for at, label in enumerate(pattern.labels) if isinstance(label, Label))
    labels = pattern.labels[:last + 1]
    between = [(literal, at) for at, label in enumerate(labels) if isinstance(label, Label)
               for literal in label.literals[1:-1]]
    mark, at = max(between, key=lambda each: len(each[0]), default=("", 0))
    cuts = tuple((len(label.literals[0]), len(label.literals[-1])) if isinstance(label, Label) else None
                 for label in labels)
    bones = ".".join(label.literals[0] + "{" + label.literals[-1] if isinstance(label, Label) else label
                     for label in labels)
    return Skeleton(cuts, at, len(mark)), ".".join(pattern.labels[last + 1:]), (bones, mark)


class Fielded:
    """Many patterns with fields.  To find the best for a name does not take longer with more of them.

    A pattern stands under its literal end, and there under the literal text of its other labels.  So a name costs one
    look for each of its labels, and 63 at most for each Skeleton below its end; a name with another number of labels
    than any pattern costs one look.  The loop changes it.  Other threads may look, so a tuple is replaced, never
    changed.
    """

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # number of labels behind the stars -> patterns
        self.used: dict[tuple[tuple[str, int, str], Skeleton], int] = {}  # patterns with this end and skeleton
        self.ends: dict[tuple[str, int, str], tuple[Skeleton, ...]] = {}  # (stars, number of labels, literal end)
        self.places: dict[tuple[str, str, str, str], tuple[str, ...]] = {}  # (stars, end, *key) -> patterns, best first

    def add(self, text: str) -> None:
        """Add a pattern that is not there yet."""
        size, end, skeleton, place = self._place(text)
        self.places[place] = tuple(sorted((*self.places.get(place, ()), text), key=rank))
        self.used[end, skeleton] = self.used.get((end, skeleton), 0) + 1
        if self.used[end, skeleton] == 1:
            self.ends[end] = (*self.ends.get(end, ()), skeleton)
        self.sizes[size] = self.sizes.get(size, 0) + 1

    def remove(self, text: str) -> None:
        """Take out a pattern that is there."""
        size, end, skeleton, place = self._place(text)
        for table, key in ((self.sizes, size), (self.used, (end, skeleton))):
            table[key] -= 1
            if not table[key]:
                del table[key]
        if (end, skeleton) not in self.used:
            self._keep(self.ends, end, tuple(each for each in self.ends[end] if each != skeleton))
        self._keep(self.places, place, tuple(each for each in self.places[place] if each != text))

    @staticmethod
    def _keep(table: dict, key: tuple, values: tuple) -> None:
        """Keep what is left under a key; without anything left, drop the key."""
        if values:
            table[key] = values
        else:
            del table[key]

    @staticmethod
    def _place(text: str) -> tuple[int, tuple[str, int, str], Skeleton, tuple[str, str, str, str]]:
        """Where a pattern stands: its keys in `sizes`, `ends` and `places`, and its skeleton."""
        pattern = parse_pattern(text)
        skeleton, end, key = skeleton_of(pattern)
        size = len(pattern.labels)
        return size, (pattern.stars, size, end), skeleton, (pattern.stars, end, *key)

    def find(self, stars: Sequence[str], name: str) -> str | None:
        """The best of the patterns with one of these stars whose other labels fit the whole name."""
        size = name.count(".") + 1
        if size not in self.sizes:
            return None
        labels, end, found = name.split("."), name, []
        while end:
            end = end.partition(".")[2]
            for star in stars:
                for skeleton in self.ends.get((star, size, end), ()):
                    for key in skeleton.keys(labels):
                        found += self.places.get((star, end, *key), ())
        fitting = (text for text in sorted(found, key=rank) if any(True for _ in parse_pattern(text).splits(name)))
        return next(fitting, None)


def rank(text: str) -> tuple[int, int, int, str]:
    """The order of patterns with fields that fit one name, the best first: it is the same in each process."""
    pattern = parse_pattern(text)
    return -pattern.literals, len(pattern.fields), len(pattern.stars), text
