"""sniroute_certificate: X.509 certificates that are made on the spot, with ECDSA on P-256, in Python's integers.

    a host name, an address --- self_signed ----------> Pair: a certificate and its key
                            --- Authority(now).leaf --> the same, signed by a root that lives in this process only
                            --- Leafs().get ----------> the same, out of a cache; None: too many were made just now
    Pair                    --- load -----------------> an ssl.SSLContext that serves it

From the bottom to the top: points of the curve; keys and signatures; DER; certificates; the cache; the file that
OpenSSL reads.  No openssl program is run, and nothing has to be installed.

What these keys are worth: nobody trusts the root, and no key leaves the process or outlives it.  Whoever learns one
can pretend to be a page that no client could verify anyway.  So do not add the root to a trust store that others use.
Where a peer pins a certificate by its fingerprint, its key is worth that peer's connections, as long as they last.

What is not promised: constant time.  Python's integers take longer for larger numbers, and a table is read at places
that depend on the secret.  Whoever can time this process to the microsecond may learn something.  What is done against
that: the scalar of each multiplication, and the nonce before it is inverted, are blinded with a fresh random number,
so two runs with the same secret take different steps.  Besides, Python works with a key only when it is made and when
a certificate is signed: once for a self-signed one, at most 5 times a second for the root.  Handshakes are OpenSSL's.

Measured (2 cores, CPython 3.11): 0.4 ms for a key, 0.5 ms for a signature, 0.9 ms for a new leaf, 0.8 ms for `load`;
15 ms, once, for the table of multiples.  The table takes 0.2 MB, a leaf in the cache 1.1 KB.

Threads: none of its own.  The functions, and Authority once it is made, keep no state, or none that two threads could
spoil: any thread may call them.  `Leafs.get` is for many threads at once, and takes a lock.  The loop calls nothing of
this room: the first leaf takes 20 ms, and `load` opens a file.  One of a fixed number of threads does.

Seams: I want to ...
    put more into a certificate     an extension in `self_signed` or `Authority`; `_extension`
    let it be valid for longer      LEAF_LIFE, ROOT_LIFE
    allow more leafs                LEAFS_MAX, SIGNATURES

This room imports sniroute_names (names and addresses, the version).
"""

from __future__ import annotations

import base64
import collections
import contextlib
import functools
import hashlib
import hmac
import ipaddress
import os
import secrets
import threading
import time
from typing import TYPE_CHECKING, Callable, Iterator, NamedTuple

from sniroute_names import Address, normalise, unmapped

if TYPE_CHECKING:
    import ssl

__version__ = "0.1.0"

# -- limits ------------------------------------------------------------------------------------

HOUR, DAY = 3600, 86400  # seconds
EARLIER = HOUR  # how long before it was made a leaf is valid: clocks of clients are late by minutes
ROOT_EARLIER = DAY  # the same of a root, which is still good where this host's own clock is put back a little
LEAF_LIFE = 7 * DAY  # longer than anybody reads an error page; short, since nobody revokes it
LEAF_SPARE = DAY  # a leaf of the cache is replaced as long before its end: sessions, and clocks that are ahead
ROOT_LIFE = 3650 * DAY  # longer than any process runs: 10 years at most

LEAFS_MAX = 1000  # leafs in a cache: 1 MB; strangers choose the names, and one that was dropped costs 1 ms again
SIGNATURES = 5  # new leafs in any second: under 1 % of a core, and of the loop's time, whatever strangers ask for

# -- the curve ---------------------------------------------------------------------------------

# P-256, FIPS 186-5 and SP 800-186 section 3.2.1.3: y**2 = x**3 - 3*x + B modulo P; G generates N points.
P = 0xffffffff00000001000000000000000000000000ffffffffffffffffffffffff
N = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551
B = 0x5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604b
G = (0x6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296,
     0x4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5)

SIZE = 32  # bytes of a coordinate, and of a scalar
WINDOW = 4  # bits of a scalar that one addition takes: a larger table is no faster, since it takes longer to make
BLIND = 64  # random bits by which a scalar grows: who times it sees no two runs alike

Point = tuple[int, int]  # x and y
Jacobian = tuple[int, int, int]  # x / z**2 and y / z**3: an addition needs no division; z is 0 at infinity

INFINITY: Jacobian = (1, 1, 0)


def _double(point: Jacobian) -> Jacobian:
    """Twice a point.  Source: the explicit-formulas database, dbl-2001-b, for curves with a = -3."""
    x, y, z = point
    delta, gamma = z * z % P, y * y % P
    beta = x * gamma % P
    alpha = 3 * (x - delta) * (x + delta) % P
    x3 = (alpha * alpha - 8 * beta) % P
    return x3, (alpha * (4 * beta - x3) - 8 * gamma * gamma) % P, 2 * y * z % P


def _add(point: Jacobian, other: Point) -> Jacobian:
    """The sum of two points, also of equal and of opposite ones.  Source: IEEE 1363-2000 section A.10.5, z of 1."""
    x1, y1, z1 = point
    x2, y2 = other
    if not z1:
        return x2, y2, 1
    square = z1 * z1 % P
    h, r = (x2 * square - x1) % P, (y2 * square * z1 - y1) % P
    if not h:
        return INFINITY if r else _double(point)
    h2 = h * h % P
    h3, v = h * h2 % P, x1 * h2 % P
    x3 = (r * r - h3 - 2 * v) % P
    return x3, (r * (v - x3) - y1 * h3) % P, z1 * h % P


def _affine(points: list[Jacobian]) -> list[Point]:
    """The same points, none at infinity, as x and y.  One division for all of them: it is slow (Montgomery's trick)."""
    products = [1]
    for _, _, z in points:
        products.append(products[-1] * z % P)
    inverse, found = pow(products[-1], -1, P), []
    for (x, y, z), before in zip(reversed(points), reversed(products[:-1])):
        one = inverse * before % P  # 1 / z
        inverse = inverse * z % P
        square = one * one % P
        found.append((x * square % P, y * square * one % P))
    return found[::-1]


@functools.cache
def _multiples() -> list[list[Point]]:
    """The comb: row i, column d has d * 16**i * G; column 0 is not used.  Made when it is first needed.

    Two threads may make it at once, where neither has found it: both get the same.
    """
    rows, base = [], G
    for _ in range(0, 8 * SIZE + BLIND, WINDOW):
        row = [(*base, 1)]
        while len(row) < 1 << WINDOW:
            row.append(_add(row[-1], base))
        points = _affine(row)
        rows.append([base, *points[:-1]])
        base = points[-1]
    return rows


def multiply(scalar: int) -> Point:
    """`scalar` times G; it is from 1 to N - 1.  The steps are not the same twice: it is blinded with multiples of N."""
    scalar += secrets.randbits(BLIND) * N
    found = INFINITY
    for row in _multiples():
        if digit := scalar & (1 << WINDOW) - 1:
            found = _add(found, row[digit])
        scalar >>= WINDOW
    return _affine([found])[0]


# -- keys and signatures -----------------------------------------------------------------------


class Key(NamedTuple):
    """A private key, and the point that is public."""

    scalar: int  # the secret, from 1 to N - 1
    point: Point

    def __repr__(self) -> str:
        return f"Key of {self.identifier.hex()}"  # never the secret: it might reach a log

    @property
    def public(self) -> bytes:
        """The public key, uncompressed: 65 bytes.  Source: SEC 1 section 2.3.3."""
        x, y = self.point
        return b"\4" + x.to_bytes(SIZE, "big") + y.to_bytes(SIZE, "big")

    @property
    def identifier(self) -> bytes:
        """What names this key in certificates: 20 bytes.  Source: RFC 7093 section 2, method 1."""
        return hashlib.sha256(self.public).digest()[:20]


def key_of(scalar: int) -> Key:
    """The key with this secret, from 1 to N - 1."""
    return Key(scalar, multiply(scalar))


def new_key() -> Key:
    """A key that nobody had before.  Source: FIPS 186-5 section A.2.2."""
    return key_of(1 + secrets.randbelow(N - 1))


def nonces(scalar: int, digest: bytes) -> Iterator[int]:
    """The nonces for a signature of a SHA-256 `digest`, best first: a function of both, so none is for two digests.

    Source: RFC 6979 section 3.2.
    """
    known = scalar.to_bytes(SIZE, "big") + (int.from_bytes(digest, "big") % N).to_bytes(SIZE, "big")
    value, key = b"\1" * 32, bytes(32)
    for step in b"\0\1":
        key = hmac.digest(key, value + bytes((step,)) + known, "sha256")
        value = hmac.digest(key, value, "sha256")
    while True:
        value = hmac.digest(key, value, "sha256")
        if 0 < (nonce := int.from_bytes(value, "big")) < N:
            yield nonce
        key = hmac.digest(key, value + b"\0", "sha256")
        value = hmac.digest(key, value, "sha256")


def sign(key: Key, message: bytes) -> bytes:
    """A signature, ECDSA with SHA-256, as DER.  The same for the same message.

    Source: FIPS 186-5 section 6.4.1, RFC 3279 section 2.2.3.
    """
    digest = hashlib.sha256(message).digest()
    for nonce in nonces(key.scalar, digest):
        r = multiply(nonce)[0] % N
        blind = 1 + secrets.randbelow(N - 1)  # of what is inverted: that takes its time by the number
        s = pow(nonce * blind, -1, N) * (blind * int.from_bytes(digest, "big") + blind * key.scalar % N * r) % N
        if r and s:
            break
    return _sequence(_integer(r), _integer(s))


# -- DER ---------------------------------------------------------------------------------------

# X.690 section 8 and 10: a tag, a length in as few bytes as it needs, the content.
BOOLEAN, INTEGER, BIT_STRING, OCTET_STRING, OBJECT, UTF8, UTC_TIME, TIME = 1, 2, 3, 4, 6, 12, 23, 24
SEQUENCE, SET = 0x30, 0x31
IMPLICIT, EXPLICIT = 0x80, 0xA0  # context-specific; with the number added


def der(tag: int, *parts: bytes) -> bytes:
    """One value as DER: `parts` one after another are its content."""
    content = b"".join(parts)
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    size = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(size))) + size + content


def _sequence(*parts: bytes) -> bytes:
    return der(SEQUENCE, *parts)


def _integer(number: int) -> bytes:
    """A number that is not negative: the first bit is the sign."""
    return der(INTEGER, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _object(dotted: str) -> bytes:
    """An object identifier.  Source: X.690 section 8.19."""
    first, second, *others = map(int, dotted.split("."))
    content = bytearray()
    for number in (40 * first + second, *others):
        digits = [number & 0x7F]
        while number := number >> 7:
            digits.append(0x80 | number & 0x7F)
        content += bytes(reversed(digits))
    return der(OBJECT, bytes(content))


def _bits(content: bytes, unused: int = 0) -> bytes:
    return der(BIT_STRING, bytes((unused,)), content)


def _time(seconds: float) -> bytes:
    """A time, in Unix seconds.  Source: RFC 5280 section 4.1.2.5: two digits of the year serve until 2049."""
    moment = time.gmtime(int(seconds))
    if 1950 <= moment.tm_year < 2050:
        return der(UTC_TIME, time.strftime("%y%m%d%H%M%SZ", moment).encode())
    return der(TIME, time.strftime("%Y%m%d%H%M%SZ", moment).encode())


def pem(label: str, content: bytes) -> bytes:
    """DER as PEM.  Source: RFC 7468."""
    text = base64.b64encode(content)
    lines = (text[at:at + 64] for at in range(0, len(text), 64))
    return b"\n".join((f"-----BEGIN {label}-----".encode(), *lines, f"-----END {label}-----\n".encode()))


# -- certificates ------------------------------------------------------------------------------

# RFC 5480, RFC 5758 section 3.2.
_EC_P256 = _sequence(_object("1.2.840.10045.2.1"), _object("1.2.840.10045.3.1.7"))
_ECDSA_SHA256 = _sequence(_object("1.2.840.10045.4.3.2"))
# RFC 5280 appendix A.
_COMMON_NAME, _ORGANIZATION = _object("2.5.4.3"), _object("2.5.4.10")
_SUBJECT_KEY, _KEY_USAGE, _ALT_NAME = _object("2.5.29.14"), _object("2.5.29.15"), _object("2.5.29.17")
_CONSTRAINTS, _AUTHORITY_KEY, _PURPOSES = _object("2.5.29.19"), _object("2.5.29.35"), _object("2.5.29.37")
_SERVER = _object("1.3.6.1.5.5.7.3.1")

COMMON_NAME_MAX = 64  # characters, RFC 5280 appendix A.1, ub-common-name
SERIAL = 126  # random bits of a serial number; at least 64 (CA/Browser Forum), at most 159 (RFC 5280 section 4.1.2.2)


class Pair(NamedTuple):
    """A certificate and its key."""

    name: str  # for which it is: a host name, or an address
    certificate: bytes  # DER
    key: Key
    not_before: int  # Unix seconds
    not_after: int

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as PEM, with no other behind it."""
        return pem("CERTIFICATE", self.certificate)

    @property
    def key_pem(self) -> bytes:
        """The key as PEM, PKCS#8, not encrypted.  Source: RFC 5208 section 5, RFC 5915 section 3."""
        inner = _sequence(_integer(1), der(OCTET_STRING, self.key.scalar.to_bytes(SIZE, "big")),
                          der(EXPLICIT + 1, _bits(self.key.public)))
        return pem("PRIVATE KEY", _sequence(_integer(0), _EC_P256, der(OCTET_STRING, inner)))


def checked(name: str | Address) -> str | Address:
    """What a certificate may be for, in its one form: a host name, or an address object.

    Text is a host name, and passes `normalise`: no address, no wildcard, no letter beyond ASCII; `xn--` stays.  An
    address is meant only where the caller says so, with an object of `ipaddress`; IPv4 inside IPv6 is IPv4, and a
    scope (`%eth0`) is left out.  Raises Malformed, of the kind `bad_name`.
    """
    if isinstance(name, str):
        return normalise(name.encode("utf-8", "surrogatepass"))
    return unmapped(ipaddress.ip_address(name.packed))


def _distinguished(common_name: str) -> bytes:
    """A Name.  A common name that is too long is left out: clients look at the alternative name alone (RFC 9525)."""
    parts = [(_ORGANIZATION, "sniroute")]  # never empty: no issuer may be (RFC 5280 section 4.1.2.4)
    if len(common_name) <= COMMON_NAME_MAX:
        parts.append((_COMMON_NAME, common_name))
    return _sequence(*(der(SET, _sequence(kind, der(UTF8, text.encode()))) for kind, text in parts))


def _extension(kind: bytes, value: bytes, critical: bool = False) -> bytes:
    return _sequence(kind, der(BOOLEAN, b"\xff") if critical else b"", der(OCTET_STRING, value))


def _signed(issuer: bytes, signer: Key, subject: bytes, key: Key, life: tuple[int, int], *extensions: bytes) -> bytes:
    """A certificate of version 3, DER.  Source: RFC 5280 section 4.1."""
    serial = secrets.randbits(SERIAL) | 1 << SERIAL  # never 0, and always as long
    tbs = _sequence(
        der(EXPLICIT + 0, _integer(2)), _integer(serial), _ECDSA_SHA256, issuer, _sequence(*map(_time, life)), subject,
        _sequence(_EC_P256, _bits(key.public)),
        der(EXPLICIT + 3, _sequence(_extension(_SUBJECT_KEY, der(OCTET_STRING, key.identifier)), *extensions)))
    return _sequence(tbs, _ECDSA_SHA256, _bits(sign(signer, tbs)))


def _for_server(name: str | Address) -> tuple[bytes, ...]:
    """The extensions of a certificate with which a server shows that it is `name`; it signs no other."""
    if isinstance(name, str):
        general = der(IMPLICIT + 2, name.encode("ascii"))  # dNSName
    else:
        general = der(IMPLICIT + 7, name.packed)  # iPAddress
    return (_extension(_CONSTRAINTS, _sequence(), critical=True),
            _extension(_KEY_USAGE, _bits(b"\x80", 7), critical=True),  # digitalSignature
            _extension(_PURPOSES, _sequence(_SERVER)), _extension(_ALT_NAME, _sequence(general)))


def self_signed(name: str | Address, now: float, life: int = LEAF_LIFE) -> Pair:
    """A new key, with a certificate for a name that it has signed itself.

    `now` is in Unix seconds.  It is valid from an hour before for `life` seconds from now on.  Raises Malformed for
    what is no name (`checked`).
    """
    name, key = checked(name), new_key()
    subject, valid = _distinguished(str(name)), (int(now) - EARLIER, int(now) + life)
    return Pair(str(name), _signed(subject, key, subject, key, valid, *_for_server(name)), key, *valid)


class Authority:
    """A root that signs leafs, made now (Unix seconds).  Nothing of it changes: any thread may use it.

    `root` is its own Pair: `root.certificate_pem` is what a client would have to trust.
    """

    def __init__(self, now: float):
        key = new_key()
        name = f"sniroute {key.identifier.hex()[:16]}"  # no two are mistaken for one
        self.subject = _distinguished(name)
        valid = int(now) - ROOT_EARLIER, int(now) - ROOT_EARLIER + ROOT_LIFE
        self.root = Pair(name, _signed(
            self.subject, key, self.subject, key, valid,
            _extension(_CONSTRAINTS, _sequence(der(BOOLEAN, b"\xff"), _integer(0)), critical=True),  # of leafs only
            _extension(_KEY_USAGE, _bits(b"\x04", 2), critical=True),  # keyCertSign
        ), key, *valid)

    def may_sign(self, now: float) -> bool:
        """Whether a leaf that is made now ends before the root, and does not begin before it."""
        return self.root.not_before <= now - EARLIER and now + LEAF_LIFE <= self.root.not_after

    def leaf(self, name: str | Address, now: float) -> Pair:
        """A new key, with a certificate for a name, valid for LEAF_LIFE.

        `now` is in Unix seconds.  Raises Malformed for what is no name (`checked`), ValueError unless `may_sign`.
        """
        name = checked(name)
        if not self.may_sign(now):
            raise ValueError("this root is not valid for as long as the leaf would be")
        key, valid = new_key(), (int(now) - EARLIER, int(now) + LEAF_LIFE)
        issued_by = _extension(_AUTHORITY_KEY, _sequence(der(IMPLICIT + 0, self.root.key.identifier)))
        return Pair(str(name), _signed(self.subject, self.root.key, _distinguished(str(name)), key, valid, issued_by,
                                       *_for_server(name)), key, *valid)


# -- the cache ---------------------------------------------------------------------------------


class Leafs:
    """Leafs by their names, made when they are asked for, by an Authority that is made with the first of them.

    `clock` gives seconds that never go back, for the limit; `wall` gives Unix seconds, which clients compare with the
    times in a certificate.  It owns its Authority.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time):
        self.clock = clock
        self.wall = wall
        # Guards all that follows.  It is held while a leaf is made, so that twenty who ask for one name make one.
        # That is 1 ms of computing, SIGNATURES times a second at most, and never waits for anything.
        self.lock = threading.Lock()
        self.authority: Authority | None = None
        self.cache: dict[str | Address, Pair] = {}  # the one that was used last is last
        self.made: collections.deque[float] = collections.deque(maxlen=SIGNATURES)  # when, by `clock`

    def get(self, name: str | Address) -> Pair | None:
        """The leaf for a name; None: it would be a new one, and there were SIGNATURES of them within a second.

        Any thread but the loop; takes 1 ms, the first one 20.  Raises Malformed for what is no name (`checked`).
        """
        name = checked(name)
        with self.lock:
            now = self.wall()
            if self.authority is not None and not self.authority.may_sign(now):  # this host's clock was put right
                self.authority = None
                self.cache.clear()
            pair = self.cache.pop(name, None)
            if pair is None or not pair.not_before <= now < pair.not_after - LEAF_SPARE:
                if not self._may_make():
                    return None
                if self.authority is None:  # its own signature is not counted: one in ten years
                    self.authority = Authority(now)
                pair = self.authority.leaf(name, now)
                if len(self.cache) >= LEAFS_MAX:
                    del self.cache[next(iter(self.cache))]
            self.cache[name] = pair
            return pair

    def _may_make(self) -> bool:
        """Whether one more may be made; it is counted then.  The lock is held."""
        now = self.clock()
        if len(self.made) == SIGNATURES and now - self.made[0] < 1.0:
            return False
        self.made.append(now)
        return True


# -- for OpenSSL -------------------------------------------------------------------------------


def load(context: ssl.SSLContext, pair: Pair) -> None:
    """Have a server's context show this certificate.  Any thread but the loop: it opens a file.  Raises OSError.

    `load_cert_chain` reads files only.  The file has no name where the host can do that (memfd_create(2)): it is on no
    disk, needs no folder that can be written to, and is gone with its descriptor, also where the process is killed.
    """
    with _private_file(pair.certificate_pem + pair.key_pem) as path:
        context.load_cert_chain(path)


@contextlib.contextmanager
def _private_file(content: bytes) -> Iterator[str]:
    """The path of a file that has this content, and that no other user can open, until the block ends."""
    unnamed = _memory_file()
    if unnamed:
        descriptor, path = unnamed
    else:
        import tempfile  # half a megabyte, where it is needed
        descriptor, path = tempfile.mkstemp(prefix="sniroute-")  # made with mode 0600, whatever the umask
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield path
    finally:
        if not unnamed:
            os.unlink(path)


def _memory_file() -> tuple[int, str] | None:
    """An empty file in memory: its descriptor and a path to it; None where there is none, be it for want of /proc."""
    try:
        descriptor = os.memfd_create("sniroute")
    except (AttributeError, OSError):  # another system or interpreter; vm.memfd_noexec, or a filter of system calls
        return None
    path = f"/proc/self/fd/{descriptor}"
    if not os.path.exists(path):
        os.close(descriptor)
        return None
    os.fchmod(descriptor, 0o600)  # from 0777; still empty
    return descriptor, path
