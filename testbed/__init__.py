"""What the tests bring along.  Their fixtures are found by name: conftest.py lists the modules that have some.

    hellos              bytes for the wire: ClientHellos, PROXY headers, PostgreSQL packets; verdicts of parsers
    openssl             OpenSSL as the judge of hellos
    running             a router in a thread of the test, its clients and far ends, files of settings
    program             the real program as a child process
    standins            stand-ins for cloudflared and for the edge; tunnel programs, one like the other
    fake_cloudflared    the first of them, a program
    fake_edge           the second
    tunnels             a table of tunnels under test
    carrier             carriers in a thread or as a program, and odd edges
    admin               a router with its admin, a client of that, a browser
"""
