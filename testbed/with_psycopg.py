"""A session of psycopg, for a Python that has it: with_psycopg.py STEP CONNINFO.  It prints what it found, as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from typing import Any

import psycopg

MEGABYTES = 4
ROW = 1024  # characters


def query(conninfo: str) -> dict[str, Any]:
    """Ask the server whether the session is encrypted."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        found = connection.execute("select ssl from pg_stat_ssl where pid = pg_backend_pid()").fetchone()
    return {"encrypted": found[0]}


def copy(conninfo: str) -> dict[str, Any]:
    """COPY rows to the server and back."""
    rows = [hashlib.md5(b"%d" % number).hexdigest() * (ROW // 32) for number in range(MEGABYTES << 10)]
    with psycopg.connect(conninfo, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute("create temp table t (number int, row text)")
        with cursor.copy("copy t from stdin") as up:
            for number, row in enumerate(rows):
                up.write_row((number, row))
        with cursor.copy("copy (select row from t order by number) to stdout") as down:
            back = b"".join(map(bytes, down)).decode().splitlines()
    return {"rows": len(back), "same": back == rows}


def cancel(conninfo: str) -> dict[str, Any]:
    """Cancel a query that would take a minute, as soon as the server works on it."""
    with psycopg.connect(conninfo, autocommit=True) as connection, psycopg.connect(conninfo, autocommit=True) as other:
        pid = connection.info.backend_pid

        def stop() -> None:
            asks = "select 1 from pg_stat_activity where pid = %s and wait_event = 'PgSleep'"
            while other.execute(asks, (pid,)).fetchone() is None:
                pass
            connection.cancel_safe(timeout=10)

        thread = threading.Thread(target=stop)
        thread.start()
        try:
            connection.execute("select pg_sleep(60)")
            state = None
        except psycopg.errors.QueryCanceled as error:
            state = error.sqlstate
        thread.join()
        still = connection.execute("select 7").fetchone()[0]
    return {"state": state, "still": still}


def main() -> None:
    """The command line."""
    steps = {"query": query, "copy": copy, "cancel": cancel}
    print(json.dumps({"libpq": psycopg.pq.version(), **steps[sys.argv[1]](sys.argv[2])}))


if __name__ == "__main__":
    main()
