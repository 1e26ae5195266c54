"""sniroute_owners: who may claim names, which ones, and where they may lead.

    a token ------ who ----------> Owner               by the hash of the token, in constant time
    a body ------- parse_wish ---> Wish                with `claim_name`, `check_target` and the rest of FIELDS;
                   parse_change    the fields given    or Unfit, with a fault for each field that is not right
    an address --- address_fault -> "" or why not      at the claim, and again at each dial
    a claim ------ standing -----> "" or why not       after a reload: whether the settings still allow it
    [registry] --- read_where ---> Where               Rules for all, each Owner, the store; or SettingsError, with a
                                                       line for each fault

An owner is not a stranger, and is not trusted either.  A name is one label below a domain, unless the owner's `names`
say more; a target is of a kind and in a network that the operator has named.  What an owner writes is never filled in:
no field of a pattern, no variable of the environment.

No I/O, but for one question to the kernel: whether an address is this host's own (`is_local` of sniroute_names).

Threads: any; nothing is kept.

Seams: I want to ...
    take another field of a body    a row of FIELDS, a field of Wish, and its name in CHANGES where a PUT takes it, too
    let owners name another kind    a row of KINDS: what is asked beside `Scheme.check`
    have another setting            a row of RULES, a field of Rules; of an owner: OWNERS and Owner; one that a reload
                                    does not change: WHERE and Where
    refuse another address          ALWAYS, or BY_NAME

This room imports sniroute_options, sniroute_routes, sniroute_targets, sniroute_values, sniroute_names and
sniroute_refusals, and late sniroute_resp and sniroute_dns, for the URL of a store and of a DNS server, and
sniroute_nat, for the parts of a target.

Source: RFC 6750 for the token; RFC 5890 section 2.3 for names in other letters; OWASP, "Server Side Request Forgery
Prevention Cheat Sheet", and RFC 6890 for addresses.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import math
import re
import secrets
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, NamedTuple, NoReturn, Sequence

from sniroute_names import (HIDDEN, NAME_MAX, Address, Network, ascii_advice, embedded, is_local, normalise,
                            normalise_whole, overlap, parse_host_port, parse_ip, parse_network, printable, without_key)
from sniroute_options import HTTP_MODES
from sniroute_refusals import Malformed, SettingsError
from sniroute_routes import kind, split_target
from sniroute_targets import reaches
from sniroute_values import (absolute, as_text, meant, parse_count, parse_duration, parse_networks,
                             parse_off_or_duration, parse_ports, parse_switch)

if TYPE_CHECKING:
    from sniroute_claims import Claim

__version__ = "0.1.0"

# Limits, each with its reason.
TTL_MIN = 5.0  # seconds: a shorter one is lost to one dropped packet, and costs each router of a store a write
META_MAX = 1024  # bytes of `meta` as JSON: it is kept for each claim, and sent with each page
META_DEPTH = 4  # of objects and lists in it: people write one or two
ALLOW_MAX = 32  # networks of a claim: each new connection is held against them
TARGET_MAX = 512  # characters of a target
TOKENS_MAX = 4  # of an owner: two while one is rotated
SHOWN_MAX = 80  # characters of what somebody wrote, in a sentence
FAULTS_MAX = 16  # of one body: unknown fields are as many as its writer likes

TOKEN = re.compile(r"sha256:[0-9a-f]{64}")  # the hash of a token, as the settings have it
OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")  # the name of an owner
WORD = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")  # one label of a name
# A glob of `parse_spaces`.  There is one way to read each label: two would be tried for each, and 2**60 for sixty.
SPACE = re.compile(r"(?:\*\*\.)?(?:(?:[a-z0-9_-]+|[a-z0-9_-]*\*[a-z0-9_-]*)\.)+[a-z0-9_-]+")

# Nobody may claim these directly below a domain: users, mail programs, browsers and certificate authorities take them
# for the operator's.  A label that begins with `_` is reserved, too (RFC 8552).
RESERVED = tuple((
    "www www1 www2 web admin administrator root sysadmin hostmaster webmaster postmaster abuse security noc "
    "api app auth login logout signin signup sso oauth account accounts billing pay payment secure ssl "
    "mail email smtp imap pop pop3 mx webmail autoconfig autodiscover wpad isatap proxy "
    "dns ns ns1 ns2 ns3 ns4 ftp sftp ssh vpn gateway router localhost localdomain local broadcasthost "
    "dashboard console control panel registry status help support docs blog static assets cdn").split())

# Letters that look like those of ASCII, from the alphabets that browsers look at for this.
LOOKALIKES = str.maketrans("асеорхуіјѕһԁԛԝӏ" "οανρυικχϳ" "օսոհ" "ıɑɡ",
                           "aceopxyijshdqwl" "oavpuikxj" "ounh" "iag")
APART = frozenset(("CYRILLIC", "GREEK", "ARMENIAN", "COPTIC", "CHEROKEE"))  # alphabets that names do not mix with ASCII

# Where no target leads, whatever `networks` say: these addresses mean this host, all hosts, or a group, never one host.
ALWAYS = tuple(map(ipaddress.ip_network, ("0.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4", "::/128", "ff00::/8")))
# A target leads there only where `networks` has a network that is inside of the one here: whoever writes 0.0.0.0/0 does
# not mean these.  The metadata service of a cloud tells a machine its passwords.
BY_NAME: dict[Network, str] = {ipaddress.ip_network(network): what for network, what in {
    "127.0.0.0/8": "this host's own", "::1/128": "this host's own",
    "169.254.169.254/32": "the metadata service of a cloud", "169.254.170.2/32": "the metadata service of a cloud",
    "100.100.100.200/32": "the metadata service of a cloud", "192.0.0.192/32": "the metadata service of a cloud",
    "168.63.129.16/32": "the metadata service of a cloud", "fd00:ec2::254/128": "the metadata service of a cloud",
    "fd20:ce::254/128": "the metadata service of a cloud", "169.254.0.0/16": "link-local", "fe80::/10": "link-local",
    "64:ff9b:1::/48": "behind a translator to IPv4",  # RFC 8215: where the IPv4 stands, only its operator knows
    "::ffff:0:0:0/96": "behind a translator to IPv4",  # RFC 2765 section 2.1
}.items()}


# -- faults ------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """What is wrong with one field of a request."""

    field: str  # its name; "" where it is the whole body
    sentence: str
    kind: str = "fault"  # a key of WORDS (sniroute_claims): `fault`, `forbidden`, `reserved`

    def __str__(self) -> str:
        return f"{self.field}: {self.sentence}" if self.field else self.sentence


class Unfit(Exception):
    """A request that cannot be granted; `faults` has one Fault at least."""

    def __init__(self, *faults: Fault):
        super().__init__("; ".join(map(str, faults)))
        self.faults = faults

    @property
    def kind(self) -> str:
        """The word for the whole: what is malformed comes first, since it has to be mended in any case."""
        kinds = {fault.kind for fault in self.faults}
        return next(kind for kind in ("fault", "forbidden", "reserved") if kind in kinds)


def unfit(field: str, sentence: str, kind: str = "fault") -> NoReturn:
    """Raise Unfit for one field."""
    raise Unfit(Fault(field, sentence, kind))


def quoted(value: Any) -> str:
    """What somebody wrote, in a sentence."""
    return repr(printable(value, SHOWN_MAX)) if isinstance(value, str) else printable(json.dumps(value), SHOWN_MAX)


# -- what the operator says --------------------------------------------------------------------


class Rules(NamedTuple):
    """What is the same for all owners: [registry]."""

    domains: tuple[str, ...]  # where names may be claimed
    ttl: float = 60.0  # seconds, of a claim that does not say
    max_ttl: float = 24 * 3600.0  # seconds: the longest that one may ask for
    hold: float = 600.0  # seconds for which a name is held for its owner afterwards
    targets: tuple[str, ...] = ("nodepass",)  # kinds, of KINDS
    networks: tuple[Network, ...] = ()  # where `tcp:` may lead
    target_ports: tuple[int, int] = (1024, 65535)  # to which ports: first and last
    ports: tuple[int, int] | None = None  # that may be claimed: first and last
    reserved: tuple[str, ...] = RESERVED  # labels that nobody may claim
    kept: frozenset[str] = frozenset()  # whole names in the `names` of owners: no other may claim these


class Owner(NamedTuple):
    """One that may claim: [registry.owners.NAME]."""

    name: str
    tokens: tuple[bytes, ...]  # SHA-256 of each, 32 bytes
    names: tuple[str, ...] = ()  # its name space, see `fits`; (): one label below any domain
    hosts: tuple[str, ...] = ()  # of its targets `carrier:` and `cloudflared:`, the same
    max_names: int = 100  # and ports, at once
    allow_clients: tuple[Network, ...] | None = None  # who may use its routes; None: all
    admin: bool = False


class Own(NamedTuple):
    """The router's own addresses, and those of its store: no target leads there."""

    addresses: tuple[tuple[str, int], ...] = ()  # (IP address, port); "::" is each address of this host
    tunnel_ports: range = range(0)  # of this host


def parse_domains(text: str) -> tuple[str, ...]:
    """`DOMAIN,...`: names may be claimed below them.  Raises ValueError."""
    found = []
    for part in text.split(","):
        try:
            found.append(normalise_whole(part.strip().encode()))
        except Malformed as error:
            raise ValueError(f"{error}{ascii_advice(part.strip())}") from None
    return tuple(dict.fromkeys(found))


def parse_words(text: str) -> tuple[str, ...]:
    """`WORD,...`: labels, or `none`.  Raises ValueError."""
    words = tuple(part.strip().lower() for part in text.split(",")) if text not in ("", "none") else ()
    for word in words:
        if not WORD.fullmatch(word):
            raise ValueError(f"{printable(word)!r} is not one label of a name")
    return words


def parse_kinds(text: str) -> tuple[str, ...]:
    """`KIND,...`: kinds of target that owners may name.  Raises ValueError."""
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for each in kinds:
        if each not in KINDS:
            raise ValueError(f"{printable(each)!r} is not for owners, who may name {', '.join(KINDS)}: any other kind "
                             "runs programs, or uses rights that are the router's")
    return kinds


def parse_spaces(text: str) -> tuple[str, ...]:
    """`NAME,...`, where `*` stands for any part of one label, and `**.` in front for any labels.  Raises ValueError."""
    globs = tuple(part.strip().lower().removesuffix(".") for part in text.split(","))
    for glob in globs:
        if not SPACE.fullmatch(glob) or len(glob) > NAME_MAX:
            raise ValueError(f"{printable(glob)!r} is neither a name nor one as *.example.com, team-*.example.com or "
                             f"**.example.com{ascii_advice(glob)}")
    return globs


def parse_tokens(text: str) -> tuple[bytes, ...]:
    """`HASH,...`, as `sniroute.py token` prints them.  Raises ValueError, which never shows what is there."""
    hashes = [part.strip() for part in text.split(",")]
    if not all(map(TOKEN.fullmatch, hashes)):
        raise ValueError("is no hash of a token: `python3 sniroute.py token` prints one, sha256: and 64 hex digits; "
                         "the token itself does not belong here")
    if len(hashes) > TOKENS_MAX:
        raise ValueError(f"has {len(hashes)} hashes: {TOKENS_MAX} at most, for while one is rotated")
    return tuple(bytes.fromhex(each.removeprefix("sha256:")) for each in hashes)


# Options of [registry], and of [registry.owners.NAME], as fields of Rules and Owner: each reader raises ValueError.
RULES: dict[str, Callable[[str], Any]] = {
    "domains": parse_domains, "ttl": parse_duration, "max_ttl": parse_duration, "hold": parse_off_or_duration,
    "targets": parse_kinds, "networks": parse_networks, "target_ports": parse_ports, "ports": parse_ports,
    "reserved": parse_words,
}
OWNERS: dict[str, Callable[[str], Any]] = {
    "token": parse_tokens, "names": parse_spaces, "hosts": parse_spaces, "max_names": parse_count,
    "allow_clients": parse_networks, "admin": parse_switch,
}


# Options that may be an empty list: nothing.  Of any other it could also mean all.
EMPTY = ("networks", "reserved", "hosts")


def read_table(where: str, table: Mapping[str, Any], rows: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The values of a table by its rows.  Raises SettingsError."""
    values, lines = {}, []
    for option, value in table.items():
        if option not in rows:
            lines.append(f"{where}.{printable(option)}: no such option{meant(option, rows)}")
            continue
        try:
            if isinstance(value, dict):
                raise ValueError("has to be a text or a list, and is a table")
            if value == [] and option not in EMPTY:
                raise ValueError("is an empty list: leave it out, and the default counts")
            values[option] = () if value == [] else rows[option](as_text(value))
        except ValueError as error:
            lines.append(f"{where}.{option}: {error}")
    if lines:
        raise SettingsError(*lines)
    return values


def read_registry(table: Mapping[str, Any], others: Sequence[str] = ()) -> tuple[Rules, dict[str, Owner]]:
    """What [registry] says of names and owners; `others` are its options that are read elsewhere.

    Raises SettingsError.
    """
    rules = read_rules({option: value for option, value in table.items() if option not in ("owners", *others)})
    owners = read_owners(table.get("owners", {}), rules)
    names = {glob for owner in owners.values() for glob in owner.names if "*" not in glob}
    return rules._replace(kept=frozenset(names)), owners


def read_rules(table: Mapping[str, Any]) -> Rules:
    """The options of RULES in [registry].  Raises SettingsError."""
    values = read_table("registry", table, RULES)
    if "domains" not in values:
        raise SettingsError("registry.domains: say below which domains names may be claimed, as "
                            'domains = ["tun.example.com"]')
    rules = Rules(**values)
    lines = []
    if rules.max_ttl < TTL_MIN:
        lines.append(f"registry.max_ttl: {rules.max_ttl:g} s is less than {TTL_MIN:g} s, which is the shortest")
    elif not TTL_MIN <= rules.ttl <= rules.max_ttl:
        lines.append(f"registry.ttl: {rules.ttl:g} s is not between {TTL_MIN:g} s and max_ttl, {rules.max_ttl:g} s")
    if rules.networks and "tcp" not in rules.targets:
        lines.append('registry.networks: is for targets tcp:, which owners may not name: add "tcp" to targets')
    elif "tcp" in rules.targets and not rules.networks:
        lines.append('registry.targets: "tcp" leads nowhere without networks, as networks = ["192.0.2.0/24"]')
    if lines:
        raise SettingsError(*lines)
    return rules


def read_owner(name: str, table: Mapping[str, Any], rules: Rules) -> Owner:
    """The owner of [registry.owners.NAME].  Raises SettingsError."""
    where = f"registry.owners.{printable(name, SHOWN_MAX)}"
    if not OWNER.fullmatch(name):
        raise SettingsError(f"{where}: a name of an owner has letters, digits, dots, - and _: 63 at most")
    values = read_table(where, table, OWNERS)
    if "token" not in values:
        raise SettingsError(f"{where}.token: has to be there: `python3 sniroute.py token` prints one")
    owner = Owner(name, values.pop("token"), **values)
    lost = [glob for glob in owner.names if not any(glob.endswith(f".{domain}") for domain in rules.domains)]
    if lost:
        raise SettingsError(f"{where}.names: {lost[0]} is not below {' or '.join(rules.domains)}")
    return owner


def read_owners(tables: Mapping[str, Any], rules: Rules) -> dict[str, Owner]:
    """The owners of [registry.owners], by name.  Raises SettingsError, also where two have one token."""
    if not isinstance(tables, dict):
        raise SettingsError("registry.owners: has to be a table for each owner, [registry.owners.NAME]")
    owners: dict[str, Owner] = {}
    lines: list[str] = []
    for name, table in tables.items():
        try:
            if not isinstance(table, dict):
                raise SettingsError(f"registry.owners.{printable(name)}: has to be a table, [registry.owners.NAME]")
            owners[name] = read_owner(name, table, rules)
        except SettingsError as error:
            lines += error.lines
    whose: dict[bytes, str] = {}
    for owner in owners.values():
        for digest in owner.tokens:
            if whose.setdefault(digest, owner.name) != owner.name:
                lines.append(f"registry.owners.{owner.name}.token: is that of {whose[digest]}, too")
    if lines:
        raise SettingsError(*lines)
    return owners


# -- the registry ------------------------------------------------------------------------------

STORES = ("memory", "sqlite:PATH", "redis://[USER:PASSWORD@]HOST[:PORT][/DB]", "rediss://...", "redis+sentinel://...")


class Where(NamedTuple):
    """The settings of [registry], all of them.  `store` may have a password in it, so `repr` does not show it."""

    address: str | tuple[str, int]  # the path of a unix socket, or (host, port)
    store: str
    stale_max: float  # seconds for which names are routed on while the store is away; 0: for ever
    dns: str  # the URL of the DNS server that gets records for each name; "": none
    rules: Rules
    owners: dict[str, Owner]

    def __repr__(self) -> str:
        return f"Where({self.address})"


def parse_store(text: str) -> str:
    """One of STORES.  Raises ValueError, which repeats no password."""
    scheme, _, rest = text.partition(":")
    if text == "memory":
        return text
    if scheme == "sqlite" and rest:
        return f"sqlite:{absolute(rest)}"
    if scheme in ("redis", "rediss", "redis+sentinel"):
        from sniroute_resp import parse_url  # imported late: an option
        parse_url(text)
        return text
    raise ValueError(f"{printable(scheme, 40)!r} is none of {', '.join(STORES)}")


def parse_dns(text: str) -> str:
    """`rfc2136://SERVER/ZONE?key=NAME`.  Raises ValueError."""
    from sniroute_dns import parse_url  # imported late: an option
    parse_url(text)
    return text


# Options of [registry] that count from the start on: a reload does not change them.
WHERE: dict[str, Callable[[str], Any]] = {"store": parse_store, "stale_max": parse_off_or_duration, "dns": parse_dns}


def read_where(address: str | tuple[str, int], table: Mapping[str, Any]) -> Where:
    """The table [registry].  Raises SettingsError, with a line for each fault."""
    lines: list[str] = []
    values: dict[str, Any] = {"store": "memory", "stale_max": 0.0, "dns": ""}
    for option, parse in WHERE.items():
        try:
            if option in table:
                values[option] = parse(as_text(table[option]))
        except ValueError as error:
            lines.append(f"registry.{option}: {error}")
    try:
        rules, owners = read_registry(table, tuple(WHERE))
        if not owners:
            lines.append("registry.owners: nobody may claim a name: [registry.owners.NAME] says who, and "
                         "`python3 sniroute.py token` makes a token")
    except SettingsError as error:
        lines += error.lines
    if lines:
        raise SettingsError(*lines)
    return Where(address, rules=rules, owners=owners, **values)


# -- who it is ---------------------------------------------------------------------------------


def new_token() -> tuple[str, str]:
    """A token of 256 random bits, and its hash for the file of settings."""
    token = f"sniroute_{secrets.token_urlsafe(32)}"  # the front is for programs that look for leaked secrets
    return token, f"sha256:{digest_of(token).hex()}"


def digest_of(token: str) -> bytes:
    """What a token is known by.  It is random, so no salt and no slow hash is needed."""
    return hashlib.sha256(token.encode(errors="backslashreplace")).digest()


def who(token: str, owners: Iterable[Owner]) -> Owner | None:
    """The owner of a token.  All are compared, each in constant time: how long it takes tells nothing."""
    digest, found = digest_of(token), None
    for owner in owners:
        for each in owner.tokens:
            if hmac.compare_digest(digest, each):
                found = owner
    return found


# -- names -------------------------------------------------------------------------------------


def fits(name: str, glob: str) -> bool:
    """Whether a normalised name fits a glob of `parse_spaces`.  No regular expression: the name is a stranger's."""
    if glob.startswith("**."):
        return name.endswith(glob[2:])
    labels, wanted = name.split("."), glob.split(".")
    return len(labels) == len(wanted) and all(map(_label_fits, labels, wanted))


def _label_fits(label: str, glob: str) -> bool:
    front, star, back = glob.partition("*")
    if not star:
        return label == glob
    return len(label) >= len(front) + len(back) and label.startswith(front) and label.endswith(back)


def claim_name(text: Any, rules: Rules, owner: Owner) -> str:
    """The whole name that an owner claims, normalised.  Raises Unfit.

    `text` is one label, which is put in front of a domain, or a whole name.
    """
    if not isinstance(text, str) or not text:
        unfit("name", "has to be a text, as \"shop\", or null for a random name")
    if not text.isascii():
        unfit("name", f"{quoted(text)} has other letters than a-z{ascii_advice(text)}")
    if "*" in text:
        unfit("name", f"{quoted(text)} is not one name: nothing stands for others in a claim")
    if is_address(text):
        unfit("name", f"{quoted(text)} is an address, and no name")
    name = text.lower()
    label = name.removesuffix(".")
    try:
        name = normalise((name if "." in label else f"{label}.{home_of(label, rules, owner)}").encode())
    except Malformed:
        unfit("name", f"{quoted(text)} is not a name: labels of 63 letters, digits, - and _ at most, which neither "
                      "begin nor end with -; 253 with the domain")
    domain = domain_of(name, rules)
    front = name.removesuffix(f".{domain}").split(".")
    for label in front:
        if fault := punycode_fault(label):
            unfit("name", fault)
    if owner.names and not any(fits(name, glob) for glob in owner.names):
        unfit("name", f"{name} is not in your name space, {', '.join(owner.names)}", "forbidden")
    if not owner.names and len(front) > 1:
        unfit("name", f"{name} has {len(front)} labels below {domain}: there may be one", "forbidden")
    if (front[-1] in rules.reserved or front[-1].startswith("_")) and name not in owner.names:
        unfit("name", f"{front[-1]}.{domain} is reserved: nobody may claim it", "reserved")
    if name in rules.kept and name not in owner.names:
        unfit("name", f"{name} is kept for an owner that the settings give it to", "reserved")
    return name


def home_of(label: str, rules: Rules, owner: Owner) -> str:
    """The domain that one label is put in front of: the first in which the owner may have it; else the first of all."""
    for domain in rules.domains:
        if any(fits(f"{label}.{domain}", glob) for glob in owner.names):
            return domain
    return rules.domains[0]


def domain_of(name: str, rules: Rules) -> str:
    """The longest domain that a name is below.  Raises Unfit where it is below none, or is one itself."""
    if name in rules.domains:
        unfit("name", f"{name} is the domain itself: a claim is below it", "reserved")
    found = [domain for domain in rules.domains if name.endswith(f".{domain}")]
    if not found:
        unfit("name", f"{name} is not below {' or '.join(rules.domains)}")
    return max(found, key=len)


def random_space(rules: Rules, owner: Owner) -> str:
    """What a random label is put in front of.  Raises Unfit where the owner's names have no place for one."""
    if not owner.names:
        return rules.domains[0]
    for glob in owner.names:
        stars, dot, rest = glob.partition(".")
        if stars in ("*", "**") and "*" not in rest:
            return rest
    unfit("name", f"none of your names, {', '.join(owner.names)}, has a place for a random one: say which", "forbidden")


def is_address(text: str) -> bool:
    """Whether this is an IP address, with or without brackets."""
    try:
        parse_ip(text.strip("[]"))
    except ValueError:
        return False
    return True


def punycode_fault(label: str) -> str:
    """Why a label that begins with `xn--` is none, or is taken for another one, as a sentence; '' where it is right.

    Source: RFC 3492, RFC 5891 section 4.2; Unicode Technical Standard 39 for what looks alike.
    """
    if not label.startswith("xn--"):
        return ""
    import unicodedata  # imported late: a megabyte, for these names only
    try:
        text = label.removeprefix("xn--").encode().decode("punycode")
    except (ValueError, OverflowError):  # of ValueError, UnicodeError is one
        text = ""
    if text.isascii():
        return f"{label} does not decode: it is no punycode"
    if any(letter != "-" and unicodedata.category(letter)[0] not in "LMN" for letter in text):
        return f"{label} has characters in it that are neither letters nor digits"
    if unicodedata.normalize("NFKC", text).lower() != text:
        return f"{label} is another spelling of a name"
    seen = text.translate(LOOKALIKES)
    if seen.isascii():
        return f"{label} looks like {seen}"
    alphabets = {unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha()}
    if "LATIN" in alphabets and alphabets & APART:
        return f"{label} mixes alphabets that look alike"
    return ""


# -- targets -----------------------------------------------------------------------------------


def address_fault(address: tuple, rules: Rules, own: Own = Own()) -> str:
    """Why an owner's target may not lead to a socket address, as a sentence; '' where it may.

    IPv4 that is mapped into IPv6 is judged as IPv4.  An address that a gateway may turn into IPv4 (`embedded`) is
    judged as both: neither may be refused, and `networks` have to hold one of the two.  This is asked for each address
    of a host, at each dial.
    """
    ip, port = parse_ip(address[0]), address[1]
    inside = embedded(ip)
    for each in (ip, *inside):
        if fault := _place_fault(each, port, rules, own):
            return fault
    if within(ip, rules.networks) or inside and all(within(each, rules.networks) for each in inside):
        return ""
    return f"{ip} is in none of the networks that are allowed"


def _place_fault(ip: Address, port: int, rules: Rules, own: Own) -> str:
    """Why an address is refused though `networks` may hold it; '' where it is not."""
    if within(ip, ALWAYS):
        return f"{ip} is no address of a host"
    for network, what in BY_NAME.items():
        if ip.version == network.version and ip in network and not any(
                named.version == ip.version and ip in named and named.subnet_of(network) for named in rules.networks):
            return f"{ip} is {what}, which no network of the settings names"
    if any(port == number and reaches(ip, parse_ip(host)) for host, number in own.addresses):
        return f"port {port} of {ip} is the router's own"
    if port in own.tunnel_ports and is_local(ip):
        return f"port {port} of {ip} is for the router's tunnels"
    return ""


def within(ip: Address, networks: Iterable[Network]) -> bool:
    """Whether an address is in one of these networks."""
    return any(ip in network for network in networks)


def check_target(text: Any, rules: Rules, owner: Owner, own: Own = Own()) -> str:
    """A target of an owner, `scheme:rest`, in the form that is used.  Raises Unfit.

    A host that is a name is judged when it is dialled, by `address_fault`: what it means may change.
    """
    if not isinstance(text, str):
        unfit("target", "has to be a text, as \"tcp:192.0.2.10:8080\"")
    scheme, colon, rest = text.partition(":")
    if not colon or not re.fullmatch(r"[!-~]+", text) or len(text) > TARGET_MAX:
        unfit("target", f"{quoted(without_key(text))} is not SCHEME:REST, as tcp:192.0.2.10:8080: {TARGET_MAX} characters at most")
    if scheme not in rules.targets:
        unfit("target", f"{quoted(scheme)} is no kind of target that you may name: there "
                        f"{'are' if len(rules.targets) > 1 else 'is'} {', '.join(rules.targets)}", "forbidden")
    if re.search("[{}$]", rest):
        unfit("target", f"{quoted(without_key(text))}: nothing is filled in for {{ }} or $ in a claim")
    if len(split_target(text)) > 1:
        unfit("target", f"{quoted(text)}: a claim leads to one target")
    try:
        rest = kind(scheme).check(rest)
    except (Malformed, ValueError) as error:
        unfit("target", str(error))
    KINDS[scheme](rest, rules, owner, own)
    return f"{scheme}:{rest}"


def check_owners_tcp(rest: str, rules: Rules, owner: Owner, own: Own) -> None:
    """Whether an owner may name a HOST:PORT.  Raises Unfit."""
    host, port = parse_host_port(rest)
    first, last = rules.target_ports
    if not first <= port <= last:
        unfit("target", f"port {port} is not between {first} and {last}", "forbidden")
    if is_address(host) and (fault := address_fault((host, port), rules, own)):
        unfit("target", fault, "forbidden")


def check_owners_host(rest: str, rules: Rules, owner: Owner, own: Own) -> None:
    """Whether an owner may name the host of a tunnel, which gets the router's own Access token.  Raises Unfit."""
    if not any(fits(rest, glob) for glob in owner.hosts):
        unfit("target", f"{rest} is not one of your hosts, {', '.join(owner.hosts) or 'of which you have none'}",
              "forbidden")


def check_owners_server(rest: str, rules: Rules, owner: Owner, own: Own) -> None:
    """Whether an owner may have a NodePass server there.  Raises Unfit, which repeats no key."""
    from sniroute_nat import OWNERS_PARAMETERS, parse_server, read_query  # imported late: an option
    server = parse_server(rest)
    first, last = rules.target_ports
    if server.key in ("", HIDDEN):
        unfit("target", "has to have your key, as nodepass:KEY@:10101: without one anybody could dial in" if not server.key
              else f"{HIDDEN} is how a key is shown, and no key: write the key itself")
    if not first <= server.port <= last:
        unfit("target", f"port {server.port} is not between {first} and {last}", "forbidden")
    if server.host not in ("*", "localhost") and not (is_address(server.host) and is_local(parse_ip(server.host))):
        unfit("target", f"{printable(server.host, SHOWN_MAX)} is no address of this router's: leave it out, as "
                        f":{server.port}, or write one", "forbidden")
    if any(overlap((server.host, server.port), address) for address in own.addresses):
        unfit("target", f"port {server.port} is the router's own", "forbidden")
    if server.port in own.tunnel_ports:
        unfit("target", f"port {server.port} is for the router's tunnels", "forbidden")
    if rules.ports is not None and rules.ports[0] <= server.port <= rules.ports[1]:
        unfit("target", f"port {server.port} is one of those that may be claimed", "forbidden")
    for name, value in read_query(server.query):
        if name not in OWNERS_PARAMETERS or name == "tls" and value == "2":
            unfit("target", f"{name}{'=2' * (name == 'tls')} is not for owners, who may write "
                            f"{', '.join(OWNERS_PARAMETERS)}, and tls=1: no files of the router's host", "forbidden")


# The kinds of target that owners may name at all, and what is asked beside `Scheme.check`; each may raise Unfit.
KINDS: dict[str, Callable[[str, Rules, Owner, Own], None]] = {
    "nodepass": check_owners_server, "tcp": check_owners_tcp, "carrier": check_owners_host, "cloudflared": check_owners_host,
}


def standing(claim: Claim, rules: Rules, owner: Owner, own: Own = Own()) -> str:
    """Why the settings do not allow a claim that was made before a reload, as a sentence; '' where they do.

    A store is another program's, too, so what `parse_wish` has checked is checked again.
    """
    try:
        if claim.key.startswith("tcp:"):
            port = claim.key.removeprefix("tcp:")
            read_port(int(port) if re.fullmatch("[1-9][0-9]{0,4}", port) else port, rules, owner, own)
        else:
            claim_name(claim.key, rules, owner)
        check_target(claim.target, rules, owner, own)
        read_http(claim.http or None, rules, owner, own)
        narrowed(claim.allow, owner)  # whom that leaves is asked for each client
    except Unfit as error:
        return str(error)
    except ValueError as error:
        return f"allow: {printable(str(error), SHOWN_MAX)}"
    return ""


# -- who may use a route -----------------------------------------------------------------------


def narrowed(allow: Sequence[str] | None, owner: Owner) -> tuple[Network, ...] | None:
    """The clients of a claim: those that it allows and its owner has.  None: all; (): nobody, after a reload."""
    if allow is None:
        return owner.allow_clients
    asked = tuple(map(parse_network, allow))
    if owner.allow_clients is None:
        return asked
    pairs = ((each, limit) for each in asked for limit in owner.allow_clients)
    return tuple(dict.fromkeys(min(pair, key=lambda network: network.num_addresses)
                               for pair in pairs if pair[0].overlaps(pair[1])))


# -- what an owner asks for --------------------------------------------------------------------


class Wish(NamedTuple):
    """A claim that is asked for, and that its owner may have; whether the name is free is not known here."""

    key: str | None  # of the Claim; None: any that is free
    is_port: bool
    space: str  # where `key` is None: a random label goes in front of it; "" for ports
    target: str
    ttl: float  # seconds
    allow: tuple[str, ...] | None = None
    http: str = ""
    meta: Mapping[str, Any] = {}
    while_connected: bool = False
    takeover: bool = True


def read_ttl(value: Any, rules: Rules, owner: Owner, own: Own) -> float:
    if type(value) is not int or not TTL_MIN <= value <= rules.max_ttl:  # a bool is an int, but no type of it
        unfit("ttl", f"{quoted(value)} is not a whole number of seconds from {TTL_MIN:g} to {rules.max_ttl:g}")
    return float(value)


def read_port(value: Any, rules: Rules, owner: Owner, own: Own) -> str | None:
    if rules.ports is None:
        unfit("port", "no ports may be claimed here: the operator names none (`ports` of [registry])", "forbidden")
    first, last = rules.ports
    if value is not None and (type(value) is not int or not first <= value <= last):
        unfit("port", f"{quoted(value)} is not a port from {first} to {last}, or null for any")
    return None if value is None else f"tcp:{value}"


def read_name(value: Any, rules: Rules, owner: Owner, own: Own) -> str | None:
    return None if value is None else claim_name(value, rules, owner)


def read_allow(value: Any, rules: Rules, owner: Owner, own: Own) -> tuple[str, ...] | None:
    """The networks whose clients a claim allows; None: all of its owner's.  Raises Unfit."""
    if value is None:
        return None
    texts = value if isinstance(value, list) else [value]
    if not 0 < len(texts) <= ALLOW_MAX or not all(isinstance(each, str) and "," not in each for each in texts):
        unfit("allow", f"has to be a list of networks, as [\"192.0.2.0/24\"]: from 1 to {ALLOW_MAX}")
    try:
        allow = tuple(dict.fromkeys(str(network) for each in texts for network in parse_networks(each)))
    except ValueError as error:
        unfit("allow", str(error))
    if not narrowed(allow, owner):
        unfit("allow", f"{quoted(', '.join(texts))} lets in none of the clients that you may have", "forbidden")
    return allow


def read_http(value: Any, rules: Rules, owner: Owner, own: Own) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or value not in HTTP_MODES:
        unfit("http", f"{quoted(value)} is none of {', '.join(HTTP_MODES)}")
    return value


def read_meta(value: Any, rules: Rules, owner: Owner, own: Own) -> dict[str, Any]:
    """The owner's own words: META_MAX bytes as JSON, and META_DEPTH deep, at most.  Raises Unfit."""
    if not isinstance(value, dict):
        unfit("meta", "has to be an object of your own words, as {\"version\": \"1.2\"}")
    size = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
    if size > META_MAX:
        unfit("meta", f"has {size} bytes as JSON: {META_MAX} at most")
    level: list[Any] = [value]
    for _ in range(META_DEPTH):
        level = [each for thing in level for each in (thing.values() if isinstance(thing, dict) else thing)
                 if isinstance(each, (dict, list))]
    if level:
        unfit("meta", f"is nested deeper than {META_DEPTH}")
    return value


def flag(field: str) -> Callable[[Any, Rules, Owner, Own], bool]:
    """A reader of true or false."""
    def read(value: Any, rules: Rules, owner: Owner, own: Own) -> bool:
        if not isinstance(value, bool):
            unfit(field, f"{quoted(value)} is neither true nor false")
        return value
    return read


# The fields of a body: each reader returns the value as it is used, or raises Unfit.
FIELDS: dict[str, Callable[[Any, Rules, Owner, Own], Any]] = {
    "name": read_name, "port": read_port, "target": check_target, "ttl": read_ttl, "allow": read_allow,
    "http": read_http, "meta": read_meta, "while_connected": flag("while_connected"), "takeover": flag("takeover"),
}
CHANGES = ("target", "ttl", "allow", "http", "meta")  # those that a PUT may have
RENEWAL = ("ttl",)  # those that a renewal may have


def parse_wish(body: bytes, rules: Rules, owner: Owner, own: Own = Own()) -> Wish:
    """The body of a POST.  Raises Unfit with all its faults."""
    given = read_object(body)
    values, faults = read_fields(given, tuple(FIELDS), rules, owner, own)
    is_port = "port" in given
    if is_port == ("name" in given):
        faults.append(Fault("name", "give either a name or a port; null for any that is free"))
    if is_port and values.get("http"):
        faults.append(Fault("http", "is for names: behind a port nothing is looked at"))
    if "target" not in given:
        faults.append(Fault("target", "has to be there: where the name leads"))
    space = ""
    if "name" in given and given["name"] is None:
        try:
            space = random_space(rules, owner)
        except Unfit as error:
            faults += error.faults
    if faults:
        raise Unfit(*faults)
    key = values.pop("port" if is_port else "name")
    return Wish(key, is_port, space, **{"ttl": rules.ttl, **values})


def parse_change(body: bytes, fields: Sequence[str], rules: Rules, owner: Owner, own: Own = Own()) -> dict[str, Any]:
    """The body of a PUT (`fields` are CHANGES), or of a renewal (RENEWAL): the fields of Claim that are given.

    An empty body gives none.  Raises Unfit with all its faults.
    """
    values, faults = read_fields(read_object(body) if body.strip() else {}, fields, rules, owner, own)
    if faults:
        raise Unfit(*faults)
    return values


def read_fields(given: Mapping[str, Any], fields: Sequence[str], rules: Rules, owner: Owner,
                own: Own) -> tuple[dict[str, Any], list[Fault]]:
    """The values of the fields that are given, and what is wrong with the others."""
    values, faults = {}, []
    for field, value in given.items():
        if field not in fields:
            faults.append(Fault(printable(field, SHOWN_MAX), f"there is no such field here{meant(field, fields)}"))
            continue
        try:
            values[field] = FIELDS[field](value, rules, owner, own)
        except Unfit as error:
            faults += error.faults
    return values, faults[:FAULTS_MAX]


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object (RFC 8259) in UTF-8, each key once.  Raises Unfit.  Its size was bounded by who has read it."""
    try:
        given = json.loads(body.decode(), object_pairs_hook=once, parse_constant=no_constant, parse_float=finite)
        json.dumps(given, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except RecursionError:
        unfit("", "the body is nested too deep")
    except UnicodeError:
        unfit("", "the body has text that is no UTF-8")
    except ValueError as error:
        unfit("", f"the body is no JSON: {printable(str(error), SHOWN_MAX)}")
    if not isinstance(given, dict):
        unfit("", "the body is no JSON object, as {\"name\": \"shop\", \"target\": \"tcp:192.0.2.10:8080\"}")
    return given


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.  Raises ValueError where a key is there twice: two programs read two values then."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def no_constant(text: str) -> NoReturn:
    """NaN and Infinity, which Python reads and nobody else."""
    raise ValueError(f"{text} is no number")


def finite(text: str) -> float:
    """A number with a point or an exponent.  Raises ValueError where it is too large to be one."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value
