"""A stand-in for sniroute_nodepass.py as a master starts it: it says CHECK_POINT lines, and does what its URL says.

The user part of the URL, a key elsewhere, is what it does:

    good        a CHECK_POINT line each 20 ms; the number of bytes that it has received grows by 10 each time
    listens     the same, and it listens on its tunnel's port until it ends
    once        one such line, then none
    waits       no such line
    fails       a line of an error, and exit 3
    ends        exit 0
    sick        an error of its server in a line; a CHECK_POINT line once the file beside the state, `well`, is there
    deaf        as good, but it does not end at SIGTERM
    floods      short lines, as many as it can; and now and then a CHECK_POINT line
    hostile     a line with control characters, HTML, and no UTF-8
    parent      a child of its own, whose pid it says, and that outlives it unless it is killed
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse

URL = urllib.parse.urlsplit(os.environ["SNIROUTE_NODEPASS_URL"])
DOES = URL.username
received = 0


def say(line):
    os.write(1, line + b"\n")


def check(ping=3):
    global received
    received += 10
    say(b"2026-11-30 00:00:00.000  EVENT  CHECK_POINT|MODE=2|PING=%dms|POOL=5|TCPS=1|UDPS=4|TCPRX=%d|TCPTX=7|UDPRX=8"
        b"|UDPTX=9" % (ping, received))


if DOES == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif DOES != "parent":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
say(b"begun: pid=%d argv=%d" % (os.getpid(), len(sys.argv)))
if DOES == "fails":
    say(b"nodepass: it is broken")
    sys.exit(3)
if DOES == "ends":
    sys.exit(0)
if DOES == "listens":
    listener = socket.create_server((URL.hostname, URL.port))
if DOES in ("once", "waits"):
    if DOES == "once":
        check()
    while True:
        time.sleep(60)
if DOES == "sick":
    say(b"2026-11-30 00:00:00.000  ERROR  Server error: handshake timeout")
    while not os.path.exists(os.environ["WELL"]):
        time.sleep(0.01)
if DOES == "hostile":
    say(b"\x1b[31m<script>alert(1)</script>\x00\xff\r")
if DOES == "parent":
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    say(b"child=%d" % child.pid)
if DOES == "floods":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    check()
    while True:
        for _ in range(2000):
            os.write(1, b"word\n" * 800)
        check()
while True:
    check()
    time.sleep(0.02)
