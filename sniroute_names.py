"""sniroute_names: names and addresses, as they are read, checked and shown; and the version.

    what a client says, a setting, a target  --- normalise ---> a host name that may reach argv, a log, a lookup
    "192.0.2.1:443", "[::1]:443", ":443"     --- parse_host_port ---> (host, port) --- show_address ---> text
    "192.0.2.0/24"                           --- parse_network ---> what an address can be in
    "example.com", "co.uk"                   --- has_owner ---> whether it is one owner's, or everybody's
    anything that others said                --- printable ---> one line of printable ASCII
    a target as somebody wrote it            --- without_key ---> one that others may see

Every name that is routed passes `normalise`, and every tunnel's (`normalise_whole`): it is the only thing that stands
between a stranger's bytes and a program's command line.  IPv4 inside IPv6 is IPv4 from the parser on.  All functions
are pure but four: `is_local` binds a socket, `has_owner` reads this host's Public Suffix List, `is_here` and
`describe_version` ask the import system which files are there.

Threads: none.

Seams: I want to ...
    allow another character in names   NAME, and the docstring of `normalise`
    know another public suffix         HOSTING, SECOND_LEVELS_OF
    add a file                         CORE, or OPTIONS if it may be missing; and py-modules in pyproject.toml

It imports refusals (Malformed).
"""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
import sys

from sniroute_refusals import Malformed

__version__ = "0.1.0"

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NAME_MAX = 253  # characters of a host name, RFC 1035 section 2.3.4

_LABEL = rb"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rb"(?:%b\.)*(?![0-9]+\Z|0x[0-9a-f]*\Z)%b" % (_LABEL, _LABEL))
HOST = re.compile(r"[A-Za-z0-9_.:-]{1,253}")  # a configured host may be an address or one label
PORT = re.compile(r"0|[1-9][0-9]{0,4}", re.ASCII)
SITES_KEPT = 1024  # addresses whose site is remembered: more than there are strangers in a server at a time
HEADER_VALUE = re.compile(r"[\t -~]*")  # what we send as the value of a header, RFC 9110 section 5.5


def printable(text: str, limit: int = NAME_MAX) -> str:
    """`text` as one line of printable ASCII, at most `limit` characters: fit for a log."""
    line = "".join(c if " " <= c <= "~" else "?" for c in text[:limit + 1])
    return line if len(line) <= limit else line[:limit - 3] + "..."


KEY_OF_NODEPASS = re.compile(r"nodepass:(?!\$[A-Za-z_][A-Za-z0-9_]*@).*@", re.DOTALL)
HIDDEN = "********"  # stands for it


def without_key(text: str) -> str:
    """What has targets in it, without the key of one to NodePass, `nodepass:KEY@HOST:PORT`; `$NAME` is none.

    All up to the last `@` goes: where the text is no target, nobody knows where a key ends.
    """
    return KEY_OF_NODEPASS.sub(f"nodepass:{HIDDEN}@", text) if "nodepass:" in text else text


def normalise(raw: bytes) -> str:
    """A host name in its one canonical form.

    Letters, digits, `-`, `_` and dots; labels of 1..63 that neither begin nor end with `-`; 253 bytes at most; no IP
    address in any spelling (RFC 6066 section 3 forbids them), so the last label is not a number.  `xn--` is never
    decoded.  One trailing dot, the root of RFC 1034 section 3.1, is taken off: browsers and libpq send what their
    user typed, and the name is the same.
    Raises Malformed, of the kind `bad_name`.
    """
    name = raw.removesuffix(b".").lower()
    if len(name) > NAME_MAX or not NAME.fullmatch(name):
        raise Malformed(f"not a host name: {printable(raw.decode('latin-1'), 80)!r}", kind="bad_name")
    return name.decode("ascii")


def normalise_whole(raw: bytes) -> str:
    """As `normalise`, for a name that has to mean the same everywhere: two labels at least.  Raises Malformed."""
    name = normalise(raw)
    if "." not in name:
        raise Malformed(f"{name!r} has one label: two labels are needed here", kind="bad_name")
    return name


def ascii_advice(text: str) -> str:
    """What to write instead of a text that has names with other letters, as the end of a sentence; '' if not known.

    A name has its `xn--` form (RFC 3490) in DNS and TLS, so also here.  The text may be a target with fields.
    """
    # Their form differs between the two versions of IDNA: a guess could be somebody else's name.
    if text.isascii() or len(text) > NAME_MAX or any(letter in text for letter in "\u00df\u03c2\u200c\u200d"):
        return ""
    try:
        written = re.sub(r"[^.:*=\s]+", lambda label: _ascii_label(label[0]), text)
    except ValueError:  # of which UnicodeError is one
        return ""
    return f"; write {written}, which is its form in DNS and TLS" if re.fullmatch("[!-~]+", written) else ""


def _ascii_label(label: str) -> str:
    """The ASCII form of a label.  Raises ValueError where it has none."""
    if label.isascii():
        return label
    form = label.encode("idna").decode("ascii")  # the codec takes half a megabyte: for a wrong setting only
    if "{" in label or not NAME.fullmatch(form.encode()):
        raise ValueError("no label")
    return form


def parse_port(text: str) -> int:
    """A port from 0 to 65535.  Raises ValueError."""
    if not PORT.fullmatch(text) or int(text) > 65535:
        raise ValueError(f"{text!r} is not a port")
    return int(text)


def parse_host_port(text: str, default_host: str | None = None) -> tuple[str, int]:
    """`HOST:PORT`, `[::1]:PORT`, or `:PORT` where there is a default.  Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(unmapped(ipaddress.IPv6Address(host[1:-1])))
    elif ":" in host:
        raise ValueError(f"{text!r}: an IPv6 address goes in brackets, as [::1]:443")
    host = host or default_host or ""
    try:
        number = parse_port(port)
    except ValueError:
        number = -1
    if not colon or not host or not host.isascii() or number < 0:
        raise ValueError(f"{text!r} is not HOST:PORT{ascii_advice(text)}")
    return host, number


def overlap(one: str | tuple[str, int] | None, other: str | tuple[str, int] | None) -> bool:
    """Whether two places to listen have a TCP address in common; for names only where they are the same name."""
    if not isinstance(one, tuple) or not isinstance(other, tuple) or one[1] != other[1] or not one[1]:
        return False
    hosts = ["127.0.0.1" if host == "localhost" else host.lower() for host, _ in (one, other)]
    return any(a == b or a in ("*", "::") or a == "0.0.0.0" and ":" not in b for a, b in (hosts, reversed(hosts)))


def is_loopback(host: str) -> bool:
    """Whether only this host reaches a listener on it."""
    try:
        return host == "localhost" or parse_ip(host).is_loopback
    except ValueError:
        return False


def show_address(address: tuple) -> str:
    """HOST:PORT, an IPv6 host in brackets."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_ip(host: str) -> Address:
    """The address that `host` spells, without its scope; IPv4 inside IPv6 becomes IPv4.  Raises ValueError."""
    return unmapped(ipaddress.ip_address(host.partition("%")[0]))


def unmapped(address: Address) -> Address:
    """IPv4 inside IPv6 (RFC 4291 section 2.5.5.2) as IPv4; any other address as it is."""
    return getattr(address, "ipv4_mapped", None) or address


@functools.lru_cache(SITES_KEPT)  # else it costs more than all else at the start of a pool's connection
def site_of(host: str) -> str:
    """What of an address tells one site from another: itself, and for IPv6 the /64, which is what one host has.

    IPv4 inside IPv6 is IPv4.  What is no address is a site of its own.
    """
    try:
        ip = parse_ip(host)
    except ValueError:
        return host
    return str(ip) if ip.version == 4 else str(int(ip) >> 64)


def parse_network(text: str, strict: bool = True) -> Network:
    """A network, or one address; IPv4 inside IPv6 becomes IPv4, as in `parse_ip`.  Raises ValueError.

    A network that is wider than ::ffff:0:0/96 stays IPv6, and holds no IPv4 address.  Whoever writes ::/0 means IPv6:
    if it held all of IPv4 too, --proxy-from would believe everybody.
    """
    network = ipaddress.ip_network(text, strict)
    inside = getattr(network.network_address, "ipv4_mapped", None)
    if inside is None:  # as of each wider one: its first address has zeros where a mapped one has ffff
        return network
    return ipaddress.IPv4Network((inside, network.prefixlen - 96))


# Not for the public: IANA's registries of special-purpose addresses (RFC 6890), and multicast.  They are listed here
# because `is_global` of the standard library has another answer in Python 3.13 than in 3.11.
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/3", "2001::/23", "2001:db8::/32", "3fff::/20")))
_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that is public in IPv6 is in here (RFC 4291 section 2.4)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052 section 2.1
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # RFC 4291 section 2.5.5.1


def is_public(ip: Address) -> bool:
    """Whether an address belongs to the public Internet.  IPv4 inside IPv6 is judged by the IPv4.

    Mapped and compatible addresses, NAT64, 6to4 (RFC 3056) and Teredo (RFC 4380), whose server counts, too.
    """
    ip = unmapped(ip)
    if inside := embedded(ip):
        return all(map(is_public, inside))
    if ip.version == 6 and ip not in _UNICAST:
        return False
    return not any(ip in network for network in _NOT_PUBLIC)


def embedded(ip: Address) -> tuple[ipaddress.IPv4Address, ...]:
    """The IPv4 addresses to which an IPv6 address may lead by a gateway: compatible, NAT64, 6to4, Teredo."""
    if ip.version == 4:
        return ()
    if ip in _NAT64 or ip in _COMPATIBLE and int(ip) > 1:  # :: and ::1 are themselves
        return (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF),)
    return (ip.sixtofour,) if ip.sixtofour else ip.teredo or ()


def is_number(host: str) -> bool:
    """Whether a resolver would take this for an IPv4 address in one of its odd spellings."""
    try:
        ipaddress.ip_address(host)
        return False
    except ValueError:
        return re.fullmatch(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?", host) is not None


def is_local(ip: Address) -> bool:
    """Whether this address is this machine's: then a socket can be bound to it."""
    ip = unmapped(ip)
    if ip.is_loopback or ip.is_unspecified:
        return True
    try:
        with socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((str(ip), 0))
        return True
    except OSError:
        return False


# -- whose a domain is -------------------------------------------------------------------------

# The whole Public Suffix List has ten thousand rules and changes each week.  These few are for what an operator may
# really write in a route; where they are in doubt, a domain is nobody's.

# Below a country's domain: words for kinds of owners (co.uk, com.au, or.jp).  Labels of two letters count there
# anyway: they are kinds (ac, ne, go) or regions (ca.us, bj.cn, mi.it).
SECOND_LEVELS = frozenset((
    "com net org edu gov mil int gob gouv govt gub nom name info biz web ltd plc sch school nhs police asn idv adv eng "
    "med art gen firm res priv pro coop asso presse nic kiev msk spb waw tokyo osaka kyoto").split())
# Countries in which each name of the second level is such a kind, or nearly each.
ALL_SECOND_LEVELS = frozenset("bd br ck er fk jm kh mm np pg za".split())
# Kinds and regions of one country.  There are thousands more (villages of Norway): see LISTED.
SECOND_LEVELS_OF = {country: frozenset(words.split()) for country, words in {
    "ar": "bet musica mutual senasa tur",
    "au": "act conf nsw qld tas vic",
    "cn": "xn--55qx5d xn--io0a7i xn--od0alg",
    "fr": "aeroport avocat avoues cci chambagri experts-comptables greta medecin notaires pharmacien port prd "
          "veterinaire",
    "hu": "2000 agrar bolt casino city erotica erotika film forum games hotel ingatlan jogasz konyvelo lakas media "
          "news reklam sex shop sport suli szex tozsde utazas video",
    "id": "desa ponpes",
    "il": "idf k12 muni",
    "in": "bihar business cs delhi dr er gujarat ind internet io me pg post travel uk us",
    "jp": "aichi akita aomori chiba ehime fukui fukuoka fukushima gifu gunma hiroshima hokkaido hyogo ibaraki "
          "ishikawa iwate kagawa kagoshima kanagawa kochi kumamoto mie miyagi miyazaki nagano nagasaki nara niigata "
          "oita okayama okinawa saga saitama shiga shimane shizuoka tochigi tokushima tottori toyama wakayama "
          "yamagata yamaguchi yamanashi kawasaki kitakyushu kobe nagoya sapporo sendai yokohama",
    "kr": "busan chungbuk chungnam daegu daejeon gangwon gwangju gyeongbuk gyeonggi gyeongnam incheon jeju jeonbuk "
          "jeonnam seoul ulsan",
    "no": "dep fhs fylkesbibl folkebibl herad idrett kommune museum oslo stat svalbard vgs",
    "nz": "cri geek health iwi kiwi maori parliament xn--mori-qsa",
    "pl": "agro aid atm auto gda gdansk gdynia gmina gsm krakow lodz lublin mail media miasta nieruchomosci olsztyn "
          "opole powiat poznan realestate rel sex shop sklep sopot sos szczecin szkola targi torun tourism travel "
          "turystyka warszawa wroclaw zgora",
    "ro": "arts rec store www",
    "tr": "bbs bel k12 kep pol tel tsk",
    "tw": "club ebiz game",
    "ua": "cherkassy cherkasy chernigov chernihiv chernivtsi chernovtsy crimea dnepropetrovsk dnipropetrovsk donetsk "
          "ivano-frankivsk kharkiv kharkov kherson khmelnitskiy khmelnytskyi kirovograd krym kyiv lugansk luhansk "
          "lutsk lviv mykolaiv nikolaev odesa odessa poltava rivne rovno sebastopol sevastopol sumy ternopil uzhgorod "
          "uzhhorod vinnica vinnytsia volyn yalta zakarpattia zaporizhzhe zaporizhzhia zhitomir zhytomyr",
    "us": "dni fed isa kids nsn",
}.items()}
# The Public Suffix List of this host, where it has one (Debian's package publicsuffix, Fedora's
# publicsuffix-list): it knows what no short table can.
LISTED = "/usr/share/publicsuffix/public_suffix_list.dat"
LISTED_MAX = 1 << 20  # bytes; it has 330,000
# Anybody can have a name below these: hosting, tunnels, dynamic DNS, and registries that a company runs.
HOSTING = frozenset((
    "github.io gitlab.io bitbucket.io codeberg.page readthedocs.io gitbook.io pages.dev workers.dev vercel.app "
    "netlify.app herokuapp.com web.app firebaseapp.com appspot.com run.app cloudfunctions.net blogspot.com "
    "azurewebsites.net azurestaticapps.net azurefd.net azureedge.net cloudapp.net trafficmanager.net windows.net "
    "fly.dev onrender.com railway.app deno.dev surge.sh glitch.me repl.co replit.app replit.dev ondigitalocean.app "
    "digitaloceanspaces.com linodeobjects.com vultrobjects.com your-server.de fastly.net edgekey.net akamaized.net "
    "cloudfront.net myshopify.com wordpress.com wixsite.com weebly.com webflow.io framer.app notion.site "
    "ngrok.io ngrok.app ngrok.dev ngrok-free.app ngrok-free.dev trycloudflare.com cfargotunnel.com loca.lt "
    "localhost.run serveo.net ts.net duckdns.org dyndns.org dynu.net ddns.net hopto.org zapto.org no-ip.org noip.me "
    "freeddns.org mooo.com myftp.org servebeer.com synology.me myqnapcloud.com selfip.com dnsalias.com eu.org "
    "uk.com us.com eu.com de.com br.com cn.com jpn.com ru.com sa.com co.com se.net uk.net gb.net jp.net in.net us.org "
    "devtunnels.ms ngrok.pro pinggy.link pinggy.io lhr.life zrok.io bore.pub playit.gg github.dev gitpod.io r2.dev "
    "hf.space streamlit.app supabase.co githubpreview.dev codespaces.new app.github.dev googleusercontent.com "
    "translate.goog dedyn.io no-ip.biz sytes.net servehttp.com redirectme.net dynv6.net myfritz.net ddnss.de "
    "dnshome.de spdns.de goip.de tunnelmole.net serveousercontent.com"
).split())
# Below these, names of any depth are anybody's; those of the second line hold an address (10-0-0-1.nip.io).
SHARED = frozenset((
    "amazonaws.com amazonaws.com.cn elasticbeanstalk.com awsapprunner.com cloudapp.azure.com azurecontainer.io "
    "nip.io sslip.io xip.io localtest.me lvh.me traefik.me in-addr.arpa ip6.arpa").split())
# Nobody can register these: reserved (RFC 6761, RFC 8375), or for private networks (RFC 6762 appendix G; ICANN has
# reserved `internal`).  `local` is left out: any host beside this one answers for it by multicast.
PRIVATE = frozenset("internal intranet private corp home lan localhost test home.arpa".split())


def has_owner(domain: str) -> bool:
    """Whether all names below a domain are one owner's: `example.com` or `internal`, not `co.uk` or `github.io`.

    A guess that is safe: False where it is in doubt.
    """
    labels = domain.lower().removesuffix(".").split(".")
    ends = [".".join(labels[at:]) for at in range(len(labels))]
    if not SHARED.isdisjoint(ends):
        return False
    if not PRIVATE.isdisjoint(ends):
        return True
    if len(labels) < 2 or "" in labels:
        return False
    second, top = labels[-2:]
    is_suffix = ends[-2] in HOSTING or len(top) == 2 and (
        len(second) <= 2 or second in SECOND_LEVELS or top in ALL_SECOND_LEVELS
        or second in SECOND_LEVELS_OF.get(top, ()))
    return not (len(labels) == 2 and is_suffix or is_listed(ends))


def is_listed(ends: list[str]) -> bool:
    """Whether this host's Public Suffix List has a domain as a suffix; `ends` are the domain and those above it."""
    suffixes = listed_suffixes()
    if not suffixes:
        return False
    try:
        ends = [end.encode("ascii").decode("idna") for end in ends]  # the list has the letters themselves
    except UnicodeError:
        return True  # in doubt
    rules = [f"\n{rule}\n".encode() for rule in (ends[0], f"*.{ends[1]}", f"!{ends[0]}")]
    listed, starred, excepted = (rule in suffixes for rule in rules)
    return not excepted and (listed or starred)


@functools.cache
def listed_suffixes() -> bytes:
    """This host's Public Suffix List, a rule in each line; empty where it has none."""
    try:
        with open(LISTED, "rb") as file:
            return b"\n" + file.read(LISTED_MAX)
    except OSError:
        return b""


# The files: those that serve, and the drop-in ones that may be missing, by the option that they make.
CORE = (
    "sniroute", "sniroute_daemon", "sniroute_systemd", "sniroute_handover", "sniroute_router", "sniroute_listeners",
    "sniroute_settings", "sniroute_options", "sniroute_values", "sniroute_connection", "sniroute_header",
    "sniroute_deadlines", "sniroute_resets", "sniroute_routes", "sniroute_patterns", "sniroute_targets",
    "sniroute_tunnels", "sniroute_processes", "sniroute_ports", "sniroute_launchers", "sniroute_flow",
    "sniroute_race", "sniroute_log", "sniroute_loop", "sniroute_host", "sniroute_scarcity", "sniroute_wire",
    "sniroute_names", "sniroute_refusals",
)
OPTIONS = {
    "doctor": ("sniroute_doctor",),
    "admin": ("sniroute_admin", "sniroute_door", "sniroute_metrics", "sniroute_page"),
    "carrier": ("sniroute_carrier", "sniroute_edge", "sniroute_forwarder", "sniroute_dial", "sniroute_upgrade",
                "sniroute_http"),
    "commands": ("sniroute_commands",),
    "backends": ("sniroute_backends", "sniroute_book", "sniroute_groups", "sniroute_balance", "sniroute_warm",
                 "sniroute_reuse", "sniroute_conversations", "sniroute_checks", "sniroute_probes"),
    "web": ("sniroute_web", "sniroute_requests", "sniroute_bodies", "sniroute_spares", "sniroute_gateway",
            "sniroute_answers", "sniroute_tls",
            "sniroute_browsers", "sniroute_certificate", "sniroute_http2", "sniroute_hpack", "sniroute_http"),
    "kubernetes": ("sniroute_kubernetes", "sniroute_jumps", "sniroute_passage", "sniroute_links",
                   "sniroute_transports", "sniroute_pods", "sniroute_objects", "sniroute_api", "sniroute_credentials",
                   "sniroute_plugins", "sniroute_layers", "sniroute_kubeconfig", "sniroute_yaml",
                   "sniroute_channels", "sniroute_spdy", "sniroute_forwarder", "sniroute_dial", "sniroute_upgrade",
                   "sniroute_http", "sniroute_clusters"),
    "registry": ("sniroute_registry", "sniroute_registrar", "sniroute_rest", "sniroute_owners", "sniroute_claims",
                 "sniroute_sqlite", "sniroute_shared", "sniroute_redis", "sniroute_resp", "sniroute_layers",
                 "sniroute_rfc2136", "sniroute_dns", "sniroute_dial", "sniroute_upgrade", "sniroute_http",
                 "sniroute_claim", "sniroute_door", "sniroute_page"),
    "nodepass": ("sniroute_nodepass", "sniroute_master", "sniroute_panel", "sniroute_mcp",
                 "sniroute_instances", "sniroute_children", "sniroute_dialin", "sniroute_dialout", "sniroute_ends",
                 "sniroute_single", "sniroute_callers", "sniroute_datagrams", "sniroute_peering",
                 "sniroute_lanes", "sniroute_streams", "sniroute_h2", "sniroute_pool",
                 "sniroute_upstreams", "sniroute_offload", "sniroute_duplex", "sniroute_guards", "sniroute_signals",
                 "sniroute_nodeurl", "sniroute_nat", "sniroute_forwarder", "sniroute_layers",
                 "sniroute_dial", "sniroute_upgrade", "sniroute_http", "sniroute_hpack",
                 "sniroute_http2", "sniroute_certificate", "sniroute_door", "sniroute_page"),
}


def is_here(room: str) -> bool:
    """Whether a drop-in file is beside the others, or with them in one zip file: asked by name, never by a path."""
    import importlib.util  # imported late: needed only for an option
    return importlib.util.find_spec(room) is not None


def describe_version() -> str:
    """The version, the Python that runs it, and which options are here."""
    options = [option for option, rooms in OPTIONS.items() if all(map(is_here, rooms))]
    runs_on = f"Python {sys.version.split()[0]}, {sys.platform}"
    return f"sniroute {__version__} ({runs_on}; with {', '.join(options) or 'no options'})"
