"""The units on a real systemd: `python3 -m testbed.machine [bookworm | trixie]`, as root, on Debian.

    debootstrap --- once, a minute ---> a folder with a small Debian        kept for the next run
    systemd-nspawn -b --- 2 s --------> its systemd, on this kernel         a copy of the folder, removed at the end
    nsenter --------------------------> each command of a check, in there

Each check is a function of CHECKS, told by its docstring; one line for each says how it went.  Exit code 1 where one
failed.  It needs the Debian packages systemd-container and debootstrap, and Debian's archive for the first run.  No
test runs it: not every host can boot a container.

The files come from this folder, by the recipe that OPERATING.md has.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from typing import Callable, Iterator

HERE = pathlib.Path(__file__).resolve().parents[1]
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "/var/cache")) / "sniroute-machines"
PACKAGES = "systemd,systemd-sysv,dbus,python3,curl,openssl,iproute2,procps,libcap2-bin"
TOML = "/etc/sniroute.toml"
PATIENCE = 40.0  # seconds for anything that has to happen: RestartSec, the watchdog

# A tunnel program that listens and says nothing: enough to see whose it is and when it ends.
CLOUDFLARED = """\
#!/usr/bin/python3
import socket, sys
host, port = sys.argv[sys.argv.index("--url") + 1].split(":")
listener = socket.create_server((host, int(port)))
while True:
    client, _ = listener.accept()
    client.recv(65536)
    client.sendall(b"hello from the tunnel")
    client.close()
"""


class Machine:
    """A container whose init is systemd."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.name = f"sniroute-{os.getpid()}"
        self.log = open(root.with_suffix(".log"), "wb")
        self.nspawn = subprocess.Popen(
            ["systemd-nspawn", "-D", root, "-b", "--register=no", "--keep-unit", "--private-network", "--console=pipe",
             f"--machine={self.name}"], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            start_new_session=True, env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"})
        self.init = 0
        self.until(self._is_up, "systemd is up")

    def _is_up(self) -> bool:
        children = pathlib.Path(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}/children").read_text().split()
        if not children:
            return False
        self.init = int(children[0])
        return self.run("systemctl is-system-running").stdout.strip() in ("running", "degraded")

    def run(self, script: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the machine."""
        return subprocess.run(["nsenter", "-t", str(self.init), "-a", "bash", "-c", script], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=120, check=check)

    def says(self, script: str) -> str:
        """What a script prints; both streams."""
        done = self.run(script)
        return (done.stdout + done.stderr).strip()

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Put a file into the machine."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(mode)

    def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait until something holds.  Raises AssertionError."""
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, f"not in {PATIENCE:g} s: {what}"
            time.sleep(0.1)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.says(f"systemctl show -P {name} {unit}")

    def is_active(self, unit: str = "sniroute.service") -> bool:
        """Whether a unit is active."""
        return self.show(unit, "ActiveState") == "active"

    def journal(self, *options: str, since: str = "") -> str:
        """What the journal has of the service since a time."""
        since = f"--since='{since}'" if since else ""
        return self.says(f"journalctl -q --no-pager -u sniroute.service {since} {' '.join(options)}")

    @staticmethod
    def now() -> str:
        """The time, as journalctl understands it.  systemd 252 finds nothing behind a cursor with `-p`."""
        return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S.%f UTC")

    def settings(self, text: str) -> None:
        """Write the file of settings."""
        self.write(TOML, textwrap.dedent(text))

    def close(self) -> None:
        """End it."""
        self.run("systemctl --no-block poweroff")
        try:
            self.nspawn.wait(20)
        except subprocess.TimeoutExpired:
            self.nspawn.kill()
            self.nspawn.wait()
        self.log.close()


def recipe(title: str) -> str:
    """The first pasted block of shell under a heading of OPERATING.md."""
    text = (HERE / "OPERATING.md").read_text()
    return re.search(rf"^#+ {re.escape(title)}\n.*?```sh\n(.*?)```", text, re.MULTILINE | re.DOTALL)[1]


GOOD = """\
    admin = "127.0.0.1:19001"
    [routes]
    "*.example.com" = "cloudflared:cft-{name}"
    "closed.example.com" = "tcp:127.0.0.1:9"
    """
ASK = "timeout 8 openssl s_client -connect 127.0.0.1:19000 -servername {name} </dev/null 2>&1"


# -- checks ------------------------------------------------------------------------------------


def install(machine: Machine) -> None:
    """The recipe as pasted installs, starts and shows a status; pasted again it keeps settings and secrets."""
    for file in (*HERE.glob("sniroute*.py"), *HERE.glob("sniroute.s*"), *HERE.glob("*.md")):
        shutil.copy(file, machine.root / "srv")
    machine.write("/usr/local/bin/cloudflared", CLOUDFLARED, 0o755)
    pasted = f"set -e; cd /srv; {recipe('Under systemd')}"
    machine.run(pasted, check=True)
    assert machine.is_active() and machine.is_active("sniroute.socket")
    assert machine.show("sniroute", "StatusText").startswith("running: 0 connections")
    machine.settings(GOOD)
    before = machine.says("cat /etc/default/sniroute /etc/sniroute.toml")
    machine.run(pasted, check=True)
    assert machine.says("cat /etc/default/sniroute /etc/sniroute.toml") == before, "secrets were made anew"
    assert machine.is_active() and machine.is_active("sniroute.socket")
    machine.run("systemctl restart sniroute", check=True)


def name_in_the_journal(machine: Machine) -> None:
    """Lines of the journal are sniroute's, not python3's."""
    assert " sniroute[" in machine.journal() and " python3[" not in machine.journal()


def clients_are_served(machine: Machine) -> None:
    """A client gets the tunnel's bytes; the tunnel is in the sandbox, with no capability, and gone after a stop."""
    machine.says(ASK.format(name="a.example.com"))
    pid = machine.says("pgrep -f '[c]ft-a.example.com'")
    assert pid.isdigit(), "no tunnel runs"
    status = machine.says(f"cat /proc/{pid}/status")
    for capabilities in ("CapEff", "CapPrm", "CapAmb"):  # an inheritable one alone gives a program nothing
        assert re.search(rf"^{capabilities}:\s+0+$", status, re.MULTILINE), status
    assert "CapAmb:\t0000000000000400" in machine.says("cat /proc/$(systemctl show -P MainPID sniroute)/status")
    machine.run("systemctl stop sniroute", check=True)
    assert machine.says("pgrep -f '[c]ft-a.example.com'") == ""
    machine.run("systemctl start sniroute", check=True)
    machine.says(ASK.format(name="a.example.com"))
    machine.run("kill -9 $(systemctl show -P MainPID sniroute)")
    machine.until(lambda: machine.says("pgrep -f '[c]ft-a.example.com'") == "", "the tunnel is gone")
    machine.until(machine.is_active, "the service is up again")


def wrong_settings_keep_the_port(machine: Machine) -> None:
    """With wrong settings and a client that waits, the port stays open; after the repair that client is served."""
    machine.run("systemctl stop sniroute", check=True)
    machine.settings('nonsense = 1\n[routes]\n"closed.example.com" = "tcp:127.0.0.1:9"\n')
    began = machine.now()
    assert machine.run("systemctl start sniroute").returncode == 1
    waiting = subprocess.Popen(["nsenter", "-t", str(machine.init), "-a", "bash", "-c", "timeout 60 openssl s_client "
                                "-connect 127.0.0.1:19000 -servername closed.example.com </dev/null"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(15)  # six or seven starts: systemd's own limit is five in ten seconds
    assert machine.is_active("sniroute.socket"), machine.says("systemctl status sniroute.socket")
    machine.until(lambda: "no such setting" in machine.journal("-p", "err", since=began), "the journal has the error")
    machine.settings(GOOD)
    said, _ = waiting.communicate()
    assert "alert" in said, said  # it reached the router, which refused it in TLS: nobody listens on port 9
    assert machine.is_active() and machine.is_active("sniroute.socket")


def the_socket_comes_with_the_service(machine: Machine) -> None:
    """`start sniroute` brings the socket unit along; the documents' way to another port works while it runs."""
    machine.run("systemctl stop sniroute.socket sniroute.service; systemctl start sniroute", check=True)
    assert machine.is_active("sniroute.socket")
    line = re.search(r"^systemctl daemon-reload; systemctl stop .*", (HERE / "OPERATING.md").read_text(), re.MULTILINE)[0]
    for port in ("443", "19000"):
        machine.write("/etc/systemd/system/sniroute.socket.d/override.conf",
                      f"[Socket]\nListenStream=\nListenStream={port}\n")
        machine.run(line, check=True)
        assert machine.is_active() and machine.is_active("sniroute.socket")
        assert f":{port} " in machine.says("ss -Hltn")


def the_service_without_a_socket_unit(machine: Machine) -> None:
    """Where no socket unit is installed, the service starts on `listen`."""
    machine.run("systemctl disable -q --now sniroute.socket; systemctl stop sniroute; "
                "mv /etc/systemd/system/sniroute.socket /root; systemctl daemon-reload; systemctl start sniroute",
                check=True)
    assert machine.is_active() and ":19000" in machine.says("ss -Hltn")
    machine.run("systemctl stop sniroute; mv /root/sniroute.socket /etc/systemd/system; systemctl daemon-reload; "
                "systemctl enable -q --now sniroute.socket; systemctl start sniroute", check=True)


def reload(machine: Machine) -> None:
    """A good reload has exit code 0; a bad one 1, says why with priority, and harms nothing."""
    assert machine.run("systemctl reload sniroute").returncode == 0
    pid = machine.show("sniroute", "MainPID")
    for bad in ("nonsense = 1\n", "[routes\n", '[routes]\n"a" = "nowhere:x"\n'):
        machine.settings(bad)
        began = machine.now()
        assert machine.run("systemctl reload sniroute").returncode == 1
        machine.until(lambda: TOML in machine.journal("-p", "err", since=began), "the journal has the error")
    began = machine.now()
    machine.settings("[routes\n")
    machine.run("systemctl kill -s HUP --kill-whom=main sniroute")
    machine.until(lambda: "nothing has changed" in machine.journal(since=began), "the daemon refuses it, too")
    assert "no routes any more" not in machine.journal(since=began)
    machine.settings(GOOD)
    assert machine.run("systemctl reload sniroute").returncode == 0
    assert machine.show("sniroute", "MainPID") == pid


def a_reload_of_many_routes_is_quiet(machine: Machine) -> None:
    """12,000 routes: a reload does not print each of them."""
    names = (f'"n{number}.example.com" = "tcp:192.0.2.1:1"\n' for number in range(12000))
    machine.settings("[routes]\n" + "".join(names))
    began = machine.now()
    assert machine.run("systemctl reload sniroute").returncode == 0
    assert len(machine.journal(since=began).splitlines()) < 20
    machine.settings(GOOD)
    assert machine.run("systemctl reload sniroute").returncode == 0


def overlapping_ports_are_said(machine: Machine) -> None:
    """The service warns about ports of the kernel's own, though it does not see /proc/sys."""
    machine.settings('ports = "33000-33010"\n' + GOOD.replace("    ", ""))
    began = machine.now()
    machine.run("systemctl restart sniroute", check=True)
    machine.until(lambda: "overlap" in machine.journal("-p", "warning", since=began), "the journal has the warning")
    machine.settings(GOOD)
    machine.run("systemctl restart sniroute", check=True)


def restarts_refuse_nobody(machine: Machine) -> None:
    """100 clients during five restarts: the socket unit holds the port, and none is refused."""
    machine.write("/root/clients.py", textwrap.dedent("""\
        import socket, sys
        refused = 0
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", 19000), 30) as client:
                    client.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
                    client.recv(1)
            except ConnectionRefusedError:
                refused += 1
            except ConnectionResetError:
                pass
        print(refused)
        """))
    clients = subprocess.Popen(["nsenter", "-t", str(machine.init), "-a", "python3", "/root/clients.py"],
                               stdout=subprocess.PIPE, text=True)
    for _ in range(5):
        machine.run("systemctl restart sniroute", check=True)
    assert clients.communicate(timeout=120)[0].strip() == "0"


def status_ends_with_it(machine: Machine) -> None:
    """After a stop the status does not speak of connections any more."""
    held = subprocess.Popen(["nsenter", "-t", str(machine.init), "-a", "python3", "-c", "import socket, time\n"
                             "c = socket.create_connection(('127.0.0.1', 19000)); print(flush=True); time.sleep(3)"],
                            stdout=subprocess.PIPE)
    held.stdout.readline()
    machine.run("systemctl stop sniroute", check=True)
    held.communicate()
    assert "draining" not in machine.show("sniroute", "StatusText"), machine.show("sniroute", "StatusText")
    machine.run("systemctl start sniroute", check=True)


def a_hung_router_is_restarted(machine: Machine) -> None:
    """The watchdog ends a router that hangs, and systemd starts it again."""
    with drop_in(machine, "[Service]\nWatchdogSec=3\n"):
        machine.run("systemctl restart sniroute", check=True)
        pid = machine.show("sniroute", "MainPID")
        machine.run(f"kill -STOP {pid}")
        machine.until(lambda: machine.is_active() and machine.show("sniroute", "MainPID") not in (pid, "0"), "another")
    machine.run("systemctl restart sniroute", check=True)


def notify_reload(machine: Machine) -> None:
    """Type=notify-reload with the `check` line alone (systemd 253 and later): 0 for a good file, 1 for a bad one."""
    if int(machine.says("systemctl --version | sed -n '1s/systemd \\([0-9]*\\).*/\\1/p'")) < 253:
        return
    check = "ExecReload=/usr/bin/python3 /opt/sniroute/sniroute.py check --quiet"
    with drop_in(machine, f"[Service]\nType=notify-reload\nExecReload=\n{check}\n"):
        machine.run("systemctl restart sniroute", check=True)
        began = machine.now()
        assert machine.run("systemctl reload sniroute").returncode == 0
        assert machine.journal(since=began).count("reload: ") == 1, machine.journal(since=began)
        machine.settings("nonsense = 1\n")
        assert machine.run("systemctl reload sniroute").returncode == 1
        machine.settings(GOOD)
    machine.run("systemctl restart sniroute", check=True)


def one_greedy_tunnel_is_not_the_end(machine: Machine) -> None:
    """The OOM killer takes one tunnel, and systemd does not stop the service for it."""
    assert machine.show("sniroute", "OOMPolicy") == "continue"


def upgrade(machine: Machine) -> None:
    """The three lines of "Upgrade and uninstall", as pasted, leave a router that serves."""
    pid = machine.show("sniroute", "MainPID")
    machine.run(f"set -e; cd /srv; {recipe('Upgrade and uninstall')}", check=True)
    machine.until(machine.is_active, "the new one serves")
    assert machine.show("sniroute", "MainPID") != pid


@contextlib.contextmanager
def drop_in(machine: Machine, text: str) -> Iterator[None]:
    """Lines for the unit, for as long as the context."""
    machine.write("/etc/systemd/system/sniroute.service.d/test.conf", text)
    machine.run("systemctl daemon-reload", check=True)
    try:
        yield
    finally:
        machine.run("rm -r /etc/systemd/system/sniroute.service.d; systemctl daemon-reload", check=True)


CHECKS = (install, name_in_the_journal, clients_are_served, wrong_settings_keep_the_port,
          the_socket_comes_with_the_service, the_service_without_a_socket_unit, reload,
          a_reload_of_many_routes_is_quiet, overlapping_ports_are_said, restarts_refuse_nobody, status_ends_with_it,
          a_hung_router_is_restarted, notify_reload, one_greedy_tunnel_is_not_the_end, upgrade)


# -- the machine -------------------------------------------------------------------------------


def image(release: str) -> pathlib.Path:
    """The folder of a small Debian, made where there is none."""
    made = CACHE / release
    if not made.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        new = CACHE / f"{release}.new"
        shutil.rmtree(new, ignore_errors=True)
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, new,
                        "http://deb.debian.org/debian", "/usr/share/debootstrap/scripts/sid"], check=True,
                       stdout=subprocess.DEVNULL)
        new.rename(made)
    return made


def main() -> int:
    """Run all checks.  Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m testbed.machine", description="The units on a real systemd.")
    parser.add_argument("release", nargs="?", default="bookworm", help="a release of Debian: bookworm, trixie")
    parser.add_argument("--only", default="", help="only checks whose name has this in it (`install` always runs)")
    asked = parser.parse_args()
    missing = [program for program in ("systemd-nspawn", "debootstrap") if not shutil.which(program)]
    if missing or os.geteuid():
        print(f"run it as root, with {' and '.join(missing) or 'all of its programs'} installed", file=sys.stderr)
        return 2
    failed = 0
    with tempfile.TemporaryDirectory(prefix="machine-", dir=CACHE if CACHE.is_dir() else None) as folder:
        root = pathlib.Path(folder) / "root"
        subprocess.run(["cp", "-a", image(asked.release), root], check=True)
        machine = Machine(root)
        print(machine.says("systemctl --version | head -1"), flush=True)
        try:
            for check in CHECKS:
                if check is not install and asked.only not in check.__name__:
                    continue
                began, verdict = time.monotonic(), "ok"
                try:
                    check(machine)
                except (AssertionError, subprocess.CalledProcessError) as error:
                    failed += 1
                    output = getattr(error, "stderr", "") or ""
                    verdict = textwrap.indent(f"FAILED: {error} {output}".strip(), "    ").strip()
                print(f"{time.monotonic() - began:6.1f} s  {check.__doc__}  {verdict}", flush=True)
        finally:
            machine.close()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
