#!/usr/bin/env python3
"""All measurements, one after the other: `python3 bench [--quick] [--json FILE]`.

    python3 bench routers ...    bench/routers.py alone, with its own options
    python3 bench tunnels ...    bench/tunnels.py alone
    python3 bench web ...        bench/web.py alone
    python3 bench kubernetes ... bench/kubernetes.py alone
    python3 bench nodepass ...   bench/nodepass.py alone
    python3 bench scale ...      bench/scale.py alone

The exit code is 0, or 1 if a part could not measure something.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

PARTS = ("routers", "tunnels", "web", "kubernetes", "nodepass", "scale")  # in this order


def argv_of(part: str, *options: str) -> list[str]:
    """The command line of a part."""
    return [sys.executable, str(pathlib.Path(__file__).resolve().with_name(f"{part}.py")), *options]


def run(part: str, *options: str) -> int:
    """Run a part to its end.  Returns its exit code.  If this process is told to end, it ends the part first."""
    process = subprocess.Popen(argv_of(part, *options))
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def main() -> int:
    """The command line.  Returns the exit code."""
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        os.execv(sys.executable, argv_of(*sys.argv[1:]))
    parser = argparse.ArgumentParser(prog="bench", description="Measures routers, tunnels, HTTP, clusters, NodePass, scale.",
                                     epilog=f"One alone, with its own options: bench {'|'.join(PARTS)} --help")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--json", metavar="FILE", help="write all figures there, too")
    given, rest = parser.parse_known_args()
    if rest:
        parser.error(f"{' '.join(rest)}: not for all; perhaps bench {'|'.join(PARTS)} {' '.join(rest)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures, failed = {}, False
    with tempfile.TemporaryDirectory(prefix="sniroute-bench-") as folder:
        for part in PARTS:
            path = pathlib.Path(folder, part)
            try:
                failed |= run(part, "--json", str(path), *["--quick"] * given.quick) != 0
            except KeyboardInterrupt:
                return 130
            print(flush=True)
            if path.exists():
                figures[part] = json.loads(path.read_text())
    if given.json:
        with open(given.json, "w") as file:
            json.dump(figures, file, indent=1)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
