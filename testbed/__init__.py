"""Helpers and fixtures of the tests.  pytest finds the fixtures by name: conftest.py lists the modules that have some.

    hellos              bytes for the wire: ClientHellos, PROXY headers, PostgreSQL packets; what a parser says to them
    openssl             asks OpenSSL which name it reads in a hello
    running             a router in a thread of the test, its clients and far ends, files of settings
    program             the real program as a child process
    standins            starts the two stand-ins below; every tunnel program that a router may run
    nursery             forks the stand-ins of the edge and of the cluster, and routers and carriers
    fake_cloudflared    a program that behaves as cloudflared
    fake_edge           a program that behaves as Cloudflare's edge, with cloudflared behind it
    tunnels             a table of tunnels under test
    carrier             carriers in a thread or as a program, and edges that break rules
    smuggling           HTTP that two programs may read in two ways, as rows; a forwarder without sockets
    web                 HTTP on the wire: backends that follow a script, clients, a chat by WebSocket; screenshots
    admin               a router with its admin, HTTP clients of the admin, a browser
    cluster             a Kubernetes cluster for a test, and a real kubectl beside it; the cluster is fake_cluster (its
                        API server), fake_objects (what is in it) and fake_kubelet (its node)
    redis               real Redis servers, and a caller of them in a loop that a test turns
    named               a name server: BIND
    aside               runs some of the tests in a process beside the others
    objects             objects of Kubernetes in JSON, in short, for tests without a cluster
    endure              the long forms of the tests, a command of its own; the files endure_* are its parts, and need no
                        pytest
    fuzz                each parser without I/O on mutated inputs, a command of its own, for any fuzzer; fuzz_oracles,
                        fuzz_preludes, fuzz_web and fuzz_options are its parts, and need no pytest
    referees            programs that read the same languages, on the same inputs: a command of its own
    machine             the units on a real systemd, in a container: a command of its own, by hand
"""
