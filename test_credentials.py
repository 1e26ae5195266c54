"""Tests of sniroute_credentials.py, in its order, through requests to the stand-in for a cluster.

Plugins are in test_plugins.py.
"""

from __future__ import annotations

import base64
import os

import pytest

import sniroute_credentials
import sniroute_kubeconfig
from conftest import HOST, linux
from sniroute_credentials import Access
from testbed.apis import told
from testbed.cluster import TOKEN

VERSION = "/version"
PODS = "/api/v1/namespaces/default/pods"


# -- files -----------------------------------------------------------------------------------


def test_a_name_and_a_password(cluster, call):
    cluster.user("bob", password="secret")
    assert call(cluster.kubeconfig(user={"username": "bob", "password": "secret"})).get(PODS).status == 200


@pytest.mark.parametrize("inline", [True, False])
def test_a_client_certificate(cluster, call, inline, monkeypatch):
    if not inline:
        monkeypatch.delattr(os, "memfd_create", raising=False)  # as in macOS
    cluster.user("carol", groups=("team",))
    paths = cluster.client_certificate("carol", ("team",))
    user = dict(zip(("client-certificate-data", "client-key-data"),
                    (base64.b64encode(path.read_bytes()).decode() for path in paths))) if inline else \
        dict(zip(("client-certificate", "client-key"), map(str, paths)))
    assert call(cluster.kubeconfig(user=user)).get(PODS).status == 200
    assert cluster.requests()[-1]["user"] == "carol"


def test_a_certificate_and_a_key_that_do_not_belong_together(cluster, call):
    (one, _), (_, other) = cluster.client_certificate("carol"), cluster.client_certificate("dave")
    said = told(call(cluster.kubeconfig(user={"client-certificate": str(one), "client-key": str(other)})).get(VERSION),
                "config")
    assert said == "the client certificate and its key cannot be used: key values mismatch"


def test_authorities_that_are_none(cluster, call):
    broken = base64.b64encode(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").decode()
    said = told(call(cluster.kubeconfig(cluster={"certificate-authority-data": broken})).get(VERSION), "config")
    assert said.startswith("the certificate-authority of cluster 'cluster' cannot be used: ")


def test_without_authorities_those_of_the_system_count(cluster, call, monkeypatch):
    path = cluster.kubeconfig(cluster={"certificate-authority-data": None})
    told(call(path).get(VERSION), "certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(cluster.ca))
    assert call(path).get(VERSION).status == 200


def test_a_kubeconfig_that_is_replaced_is_used_by_the_next_request(cluster, call, soon):
    cluster.user("bob", token="bob-token")
    caller = call(cluster.kubeconfig())
    caller.get(PODS)
    caller.get(PODS)
    assert len(cluster.connections()) == 1, "nothing has changed"
    cluster.kubeconfig(user={"token": "bob-token"})
    caller.get(PODS)
    assert [request["user"] for request in cluster.requests()] == ["admin", "admin", "bob"]
    assert len(cluster.connections()) == 1, "a token is for a request, not for a connection"
    cluster.kubeconfig(cluster={"insecure-skip-tls-verify": True, "certificate-authority-data": None})
    assert caller.get(PODS).status == 200
    assert len(cluster.connections()) == 2


def test_a_kubeconfig_without_an_end_is_not_read(cluster, call, monkeypatch):
    monkeypatch.setattr(sniroute_credentials, "FILE_MAX", 1 << 20)
    path = cluster.kubeconfig()
    path.write_bytes(b"#" * ((1 << 20) + 1))
    assert "it has more than 1 MiB" in told(call(path).get(PODS), "config")


def test_files_are_looked_at_now_and_then_only(cluster, call, monkeypatch):
    monkeypatch.setattr(sniroute_credentials, "LOOK_EVERY", 60)
    caller = call(cluster.kubeconfig())
    caller.get(PODS)
    monkeypatch.setattr(sniroute_credentials, "stamp", lambda path: pytest.fail("looked at"))
    assert caller.get(PODS).status == 200


def test_a_kubeconfig_that_is_being_written_is_read_again(cluster, call, soon, monkeypatch):
    """kubectl empties the file first."""
    path = cluster.kubeconfig()
    caller = call(path)
    caller.get(PODS)
    text = path.read_text()
    monkeypatch.setattr(sniroute_credentials.time, "sleep", lambda seconds: path.write_text(text))
    path.write_text("")
    assert caller.get(PODS).status == 200


@pytest.mark.parametrize("text, reason, words", [
    ("a: [", "config", "line 1"), ("", "context", "current-context"), (None, "config", "no kubeconfig is there")])
def test_a_kubeconfig_that_cannot_be_used_and_then_can(cluster, call, tmp_path, text, reason, words, soon):
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    caller = call(path)
    assert words in told(caller.get(VERSION), reason)
    path.write_text(cluster.kubeconfig().read_text())
    assert caller.get(VERSION).status == 200


def test_a_failure_is_not_looked_into_by_each_client(call, tmp_path, monkeypatch):
    monkeypatch.setattr(sniroute_credentials, "LOOK_EVERY", 60)
    caller = call(tmp_path / "config")
    told(caller.get(VERSION), "config")
    monkeypatch.setattr(sniroute_credentials, "read_files", lambda *words: pytest.fail("looked at"))
    told(caller.get(VERSION), "config")


@linux
def test_a_kubeconfig_that_does_not_come_stops_nobody_else(cluster, call, tmp_path):
    """One on a network home that hangs: here it is a pipe that nobody writes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    caller = call(pipe, cluster.kubeconfig())
    assert told(caller.get(VERSION, timeout=0.1), "timeout") == "reading the kubeconfig"
    pipe.write_text("")
    caller.until(lambda: not caller.apis.of("").identity.phase)


def test_the_account_of_a_pod(cluster, call, tmp_path, monkeypatch, soon):
    account = tmp_path / "account"
    account.mkdir()
    (account / "token").write_text(f"{TOKEN}\n")
    (account / "ca.crt").write_bytes(cluster.ca.read_bytes())
    (account / "namespace").write_text("prod")
    monkeypatch.setattr(sniroute_kubeconfig, "ACCOUNT", f"{account}/")
    caller = call(environ={"KUBERNETES_SERVICE_HOST": HOST, "KUBERNETES_SERVICE_PORT": str(cluster.port)})
    assert caller.get(PODS).status == 200 and caller.apis.of("").context.namespace == "prod"
    cluster.user("bob", token="bob-token")
    (account / "token.new").write_text("bob-token")
    (account / "token.new").replace(account / "token")
    caller.get(PODS)
    assert cluster.requests()[-1]["user"] == "bob" and len(cluster.connections()) == 1


def test_a_token_file_is_read_again_when_it_changes_and_when_it_is_refused(cluster, call, tmp_path, monkeypatch):
    monkeypatch.setattr(sniroute_credentials, "LOOK_EVERY", 60)
    path = tmp_path / "token"
    path.write_text(TOKEN)
    caller = call(cluster.kubeconfig(user={"tokenFile": str(path)}))
    assert caller.get(PODS).status == 200
    cluster.user("admin", token="new-token")
    path.write_text("new-token")
    assert caller.get(PODS).status == 200, "refused, and asked again"
    assert [request["status"] for request in cluster.requests()] == [200, 401, 200]
    cluster.user("admin", token="newer")
    assert "Unauthorized" in told(caller.get(PODS), "login")
    monkeypatch.setattr(sniroute_credentials, "LOOK_EVERY", 0)
    path.write_text("newer")
    assert caller.get(PODS).status == 200
    path.unlink()
    assert "No such file" in told(caller.get(PODS), "config")


def test_a_token_file_is_read_now_and_then_though_it_seems_the_same(cluster, call, tmp_path, monkeypatch, soon):
    path = tmp_path / "token"
    path.write_text(TOKEN)
    caller = call(cluster.kubeconfig(user={"tokenFile": str(path)}))
    caller.get(PODS)
    monkeypatch.setattr(sniroute_credentials, "stamp", lambda path: 0)
    caller.get(PODS)
    path.write_text("other")
    assert caller.get(PODS).status == 200
    monkeypatch.setattr(sniroute_credentials, "TOKEN_FOR", 0)
    told(caller.get(PODS), "login")


# -- secrets -----------------------------------------------------------------------------------


def test_what_was_found_is_shown_without_a_secret(cluster, call):
    caller = call(cluster.kubeconfig())
    caller.get(PODS)
    found = caller.apis.of("").identity.found
    assert isinstance(found, Access) and TOKEN.encode() in found.proof
    assert TOKEN not in f"{found!r} {caller.apis.of('').identity.files!r}"
