"""Tests of sniroute_kubeconfig.py: files in a dictionary, and real ones beside kubectl, where that is on PATH."""

from __future__ import annotations

import base64
import datetime
import json
import random
from typing import Any, Callable

import pytest

import sniroute_kubeconfig
from sniroute_kubeconfig import (ACCOUNT, PATHS_MAX, TOKEN_MAX, Context, KubeconfigError, Secret, choose_context,
                                 find_context, in_cluster, kubeconfig_paths, load_kubeconfig, read_token)
from sniroute_plugins import CREDENTIAL_MAX, plugin_info, read_credential
from testbed.clients import kubectl_view

CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nYWJj\n-----END CERTIFICATE-----\n"
KEY = b"-----BEGIN EC PRIVATE KEY-----\nc2VjcmV0LWtleQ==\n-----END EC PRIVATE KEY-----\n"
SECRET = "pa55w0rd-9f8e7d6c5b4a"
HOME = "/home/u/.kube/config"
EXEC = "exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: aws"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def reader(files: dict[str, Any]) -> Callable[[str], bytes]:
    """A function that reads files of a dictionary: text, bytes, or an OSError to raise."""
    def read(path: str) -> bytes:
        found = files.get(path, FileNotFoundError(2, "No such file or directory"))
        if isinstance(found, OSError):
            raise found
        return found if isinstance(found, bytes) else found.encode()
    return read


def one(cluster: str = "server: https://192.0.2.1:6443", user: str = "token: t",
        context: str = "cluster: c, user: u") -> str:
    """A file with a context `x`; the fields of a cluster and of a user are lines, or one line."""
    def lines(text: str) -> str:
        return "".join(f"    {line}\n" for line in text.split("\n"))
    return (f"apiVersion: v1\nkind: Config\ncurrent-context: x\nclusters:\n- name: c\n  cluster:\n{lines(cluster)}"
            f"users:\n- name: u\n  user:\n{lines(user)}contexts:\n- name: x\n  context: {{{context}}}\n")


def resolve(text: Any, name: str = "", **files: Any) -> Context:
    """The context of one file in ~/.kube; `files` are others there."""
    others = {f"/home/u/.kube/{path.replace('__', '.')}": data for path, data in files.items()}
    return choose_context(name, [HOME], {}, reader({HOME: text, **others}))


def fault(text: Any, name: str = "", **files: Any) -> KubeconfigError:
    """What is wrong with it: one line, without the secret."""
    with pytest.raises(KubeconfigError) as caught:
        resolve(text, name, **files)
    said = str(caught.value)
    assert "\n" not in said and not any(SECRET[at:at + 6] in said for at in range(len(SECRET) - 5))
    return caught.value


# -- files, and how they are merged ------------------------------------------------------------


@pytest.mark.parametrize("option, environ, paths", [
    ("", {"HOME": "/home/u"}, ("/home/u/.kube/config",)),
    ("", {"HOME": "/home/u", "KUBECONFIG": "/a:b"}, ("/a", "b")),
    ("", {"HOME": "/home/u", "KUBECONFIG": ":/a::/b:/a:"}, ("/a", "/b")),
    ("", {"HOME": "/home/u", "KUBECONFIG": "~/a"}, ("~/a",)),
    ("", {"HOME": "/home/u", "KUBECONFIG": ""}, ("/home/u/.kube/config",)),
    ("/c:~/d:e", {"HOME": "/home/u", "KUBECONFIG": "/a:b"}, ("/c", "/home/u/d", "e")),
    ("", {"KUBECONFIG": "/a"}, ("/a",)), ("", {}, ()),
])
def test_where_kubeconfigs_are(option, environ, paths):
    assert kubeconfig_paths(option, environ) == paths


def test_there_are_not_too_many():
    text = ":".join(map(str, range(PATHS_MAX + 1)))
    for option, environ, says in ((text, {}, "--kubeconfig"), ("", {"KUBECONFIG": text}, "KUBECONFIG")):
        with pytest.raises(KubeconfigError, match=f"^{says} names more than {PATHS_MAX} files"):
            kubeconfig_paths(option, environ)
    assert len(kubeconfig_paths(text.rpartition(":")[0], {})) == PATHS_MAX


def test_the_first_file_that_has_a_name_wins_with_all_of_its_entry():
    first = ("current-context: ''\nusers:\n- name: u\n  user: {token: first}\n"
             "contexts:\n- name: a\n  context: {cluster: c}\n")
    second = ("current-context: b\nusers:\n- name: u\n  user: {token: second, as: x}\n- name: v\n  user: {token: v}\n"
              "contexts:\n- {name: a, context: {cluster: d, user: u, namespace: z}}\n"
              "- {name: b, context: {cluster: c, user: u}}\n"
              "clusters:\n- {name: c, cluster: {server: 'https://c'}}\n")
    third = "current-context: a\nclusters:\n- {name: c, cluster: {server: 'https://third'}}\n"
    read = reader({"/1": first, "/2": second, "/3": third})
    config = load_kubeconfig(["/1", "/none", "/2", "/3"], read)
    assert (config.current, config.found, config.files) == ("b", ("/1", "/2", "/3"), ("/1", "/none", "/2", "/3"))
    assert sorted(config.users) == ["u", "v"] and sorted(config.contexts) == ["a",
                                                                              "b"] and sorted(config.clusters) == ["c"]
    b, a = find_context(config, "", read), find_context(config, "a", read)
    assert (b.name, b.cluster.server, b.user.authorization, b.user.headers) == ("b", "https://c",
                                                                                Secret(b"Bearer first"), ())
    assert (a.name, a.namespace, a.user.name, a.user.authorization) == ("a", "default", "", None)
    assert a.files == ("/1", "/none", "/2", "/3")


def test_paths_are_relative_to_the_file_that_has_them():
    first = one("server: https://c\ncertificate-authority: ca/ca.pem",
                "client-certificate: ./c.pem\nclient-key: /abs/key.pem\ntokenFile: ../token\n"
                f"{EXEC.replace('aws', 'bin/aws')}}}")
    second = "users:\n- {name: v, user: {tokenFile: t}}\ncontexts:\n- {name: y, context: {cluster: c, user: v}}\n"
    read = reader({"/1/config": first, "2/config": second, "/1/ca/ca.pem": CERTIFICATE, "/1/./c.pem": CERTIFICATE,
                   "/abs/key.pem": KEY})
    context = choose_context("", ["/1/config", "2/config"], {}, read)
    assert context.user.token_file == "/1/../token" and context.user.plugin.command == "/1/bin/aws"
    assert context.cluster.authorities == context.user.certificate == CERTIFICATE and context.user.key == Secret(KEY)
    assert context.files == ("/1/config", "2/config", "/1/ca/ca.pem", "/1/./c.pem", "/abs/key.pem")
    assert choose_context("y", ["/1/config", "2/config"], {}, read).user.token_file == "2/t"
    assert resolve(one(user=EXEC + "}")).user.plugin.command == "aws", "which is looked for on PATH"


def test_json_is_read_too():
    config = {"kind": "Config", "apiVersion": "v1", "current-context": "x",
              "clusters": [{"name": "c",
                            "cluster": {"server": "https://c", "certificate-authority-data": b64(CERTIFICATE)}}],
              "users": [{"name": "u", "user": {"token": SECRET}}],
              "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "n"}}]}
    for text in (json.dumps(config), json.dumps(config, indent="\t"), "\ufeff" + json.dumps(config, indent=2)):
        context = resolve(text)
        assert (context.namespace, context.cluster.authorities) == ("n", CERTIFICATE)
        assert context.user.authorization == Secret(b"Bearer " + SECRET.encode())


# -- contexts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "arn:aws:eks:eu-west-1:123456789012:cluster/prod", "gke_project_europe-west1_main", "kind-x", "a@b", "a@b@c",
    "default/api-example-com:6443/kube:admin", "Upper Case", "1234", "no", "日本"])
def test_a_context_is_found_by_its_whole_name(name):
    text = one().replace("- name: x\n", f"- name: {name}\n")
    assert resolve(text, name).name == name
    assert resolve(text.replace("current-context: x", f"current-context: {name}")).name == name
    assert fault(text, name[1:]).kind == "context"


def test_no_such_context():
    both = one() + "- name: arn:aws:eks:eu-west-1:123:cluster/main\n  context: {}\n"
    assert str(fault(both, "arn:aws:eks:eu-west-1:123:cluster/mian")) == (
        f"no context 'arn:aws:eks:eu-west-1:123:cluster/mian' in {HOME}; "
        "did you mean 'arn:aws:eks:eu-west-1:123:cluster/main'?")
    assert str(fault(both,
                     "zzz")) == f"no context 'zzz' in {HOME}; there are 'arn:aws:eks:eu-west-1:123:cluster/main', 'x'"
    many = one() + "".join(f"- name: c{number:02}\n" for number in range(20))
    assert str(fault(many, "zzz")).endswith("'c06', 'c07' and 13 more")
    assert str(fault(one().replace("current-context: x", "current-context: y"))) == (
        f"no context 'y' in {HOME} (its current-context); there are 'x'")
    assert str(fault(one().replace("current-context: x\n", ""))) == (
        f"no context is named, and {HOME} has no current-context; there are 'x'")
    assert str(fault("", "x")) == f"no context 'x' in {HOME}; it has no contexts"
    assert {fault(text, name).kind for text,
            name in ((both, "zzz"), ("", ""), (one(context="cluster: d"), ""))} == {"context"}


def test_a_name_from_a_stranger_stays_one_line_of_ascii():
    said = str(fault(one(), "a\nb\x1b[31m\u202e" + "c" * 500))
    assert said.isascii() and said.isprintable() and len(said) < 200


def test_a_context_that_names_what_is_not_there():
    assert str(fault(one(context="cluster: d, user: u"))) == (
        f"{HOME}, line 14: context 'x': cluster is 'd', and no file has a cluster of that name")
    said = str(fault(one(context="cluster: c, user: v")))
    assert "context 'x': user is 'v', and no file has a user of that name" in said
    assert "context 'x' names no cluster" in str(fault(one(context="user: u")))
    assert resolve(one(context="cluster: c")).user == sniroute_kubeconfig.User("")


def test_without_a_file():
    read = reader({})
    with pytest.raises(KubeconfigError) as caught:
        choose_context("", ["/a", "/b"], {}, read)
    assert str(caught.value) == "no kubeconfig is there (/a, /b), and this is no pod with a service account"
    with pytest.raises(KubeconfigError) as caught:
        choose_context("x", [], {"KUBERNETES_SERVICE_HOST": "192.0.2.1", "KUBERNETES_SERVICE_PORT": "443"}, read)
    assert caught.value.kind == "file"
    said = str(caught.value)
    assert said == "no kubeconfig is there (--kubeconfig, KUBECONFIG and HOME are empty), so no context 'x'"


def test_secrets_and_entries_are_never_shown():
    secret = Secret(SECRET.encode())
    assert f"{secret} {secret!r} {[secret]}" == "<secret> <secret> [<secret>]"
    assert secret == Secret(SECRET.encode()) != Secret(b"") and len({secret, Secret(SECRET.encode())}) == 1
    config = load_kubeconfig([HOME], reader({HOME: one(user=f"token: {SECRET}")}))
    assert repr(config.users) == f"{{'u': <user 'u' of {HOME}>}}" and SECRET not in repr(config)


# -- clusters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("server, host, port, authority, prefix", [
    ("https://api.example.com", "api.example.com", 443, "api.example.com", ""),
    ("https://api.example.com:6443/", "api.example.com", 6443, "api.example.com:6443", ""),
    ("HTTPS://192.0.2.1:6443", "192.0.2.1", 6443, "192.0.2.1:6443", ""),
    ("'https://[2001:DB8::1]:6443'", "2001:db8::1", 6443, "[2001:DB8::1]:6443", ""),
    ("https://[::1]", "::1", 443, "[::1]", ""),
    ("https://rancher.example.com/k8s/clusters/c-m-x/", "rancher.example.com", 443, "rancher.example.com",
     "/k8s/clusters/c-m-x"),
    ("http://127.0.0.1:8001", "127.0.0.1", 8001, "127.0.0.1:8001", ""), ("http://a", "a", 80, "a", ""),
])
def test_servers(server, host, port, authority, prefix):
    cluster = resolve(one(f"server: {server}")).cluster
    assert (cluster.host, cluster.port, cluster.authority, cluster.prefix) == (host, port, authority, prefix)
    assert cluster.is_tls == server.lower().lstrip("'").startswith("https")
    assert cluster.tls_name == host and cluster.verifies


def test_what_a_cluster_may_say_of_its_tls():
    cluster = resolve(one("server: https://c\ntls-server-name: k.example.com\n"
                          f"certificate-authority-data: {b64(CERTIFICATE)}\n"
                          "certificate-authority: nowhere\ndisable-compression: true")).cluster
    assert (cluster.tls_name, cluster.authorities, cluster.compresses) == ("k.example.com", CERTIFICATE, False)
    folded = b64(CERTIFICATE)[:20] + "\n      " + b64(CERTIFICATE)[20:]
    cluster = resolve(one(f"server: https://c\ncertificate-authority-data: |\n      {folded}")).cluster
    assert cluster.authorities == CERTIFICATE
    assert not resolve(one("server: https://c\ninsecure-skip-tls-verify: true")).cluster.verifies
    assert resolve(one("server: https://c\ninsecure-skip-tls-verify: false\ncertificate-authority: ca.pem"),
                   ca__pem=CERTIFICATE).cluster.verifies


@pytest.mark.parametrize("url, scheme, host, port, login", [
    ("http://p", "http", "p", 80, None), ("https://p/", "https", "p", 443, None),
    ("socks5://192.0.2.1:9", "socks5", "192.0.2.1", 9, None),
    ("HTTP://[::1]:3128", "http", "::1", 3128, None), (f"http://u%40x:{SECRET}@p:1", "http", "p", 1, f"u@x:{SECRET}"),
])
def test_proxies(url, scheme, host, port, login):
    proxy = resolve(one(f"server: https://c\nproxy-url: '{url}'")).cluster.proxy
    assert proxy == (scheme, host, port, None if login is None else Secret(login.encode()), Secret(url.encode()))
    assert SECRET not in repr(proxy)


@pytest.mark.parametrize("cluster, says", [
    ("{}", "cluster 'c': server has no server"),
    ("server: c:6443", "server is not https://HOST[:PORT][/PATH]"),
    (f"server: https://u:{SECRET}@c", "server is not https://"),
    (f"server: https://c/?token={SECRET}", "server is not https://"),
    ("server: https://c#d", "server is not https://"), ("server: ftp://c", "server is not https://"),
    ("server: https://c:0", "server is not https://"), ("server: 'https://c d'", "server is not https://"),
    ("server: https://c:65536", "server has a port above 65535"), ("server: 'https://[1.2]'", "no IPv6 address"),
    ('server: "https://c\\n"', "server has a control character"),
    ("server: [https]", "server is a list where a text is expected"),
    ("server: https://c\ninsecure-skip-tls-verify: 'true'",
     "insecure-skip-tls-verify has to be true or false, without quotes"),
    (f"server: https://c\ninsecure-skip-tls-verify: yes\ncertificate-authority-data: {b64(CERTIFICATE)}",
     "insecure-skip-tls-verify stands beside a certificate-authority"),
    ("server: https://c\ncertificate-authority-data: '***'", "certificate-authority-data is no base64"),
    ("server: https://c\ncertificate-authority-data: YWJj", "certificate-authority-data holds no certificate in PEM"),
    ("server: https://c\ncertificate-authority: empty", "certificate-authority holds no certificate in PEM"),
    ("server: https://c\ncertificate-authority: nowhere",
     f"{HOME}: cluster 'c': certificate-authority /home/u/.kube/nowhere cannot be read: No such file or directory"),
    (f"server: https://c\nproxy-url: p:{SECRET}", "proxy-url is not SCHEME://"),
    (f"server: https://c\nproxy-url: ftp://u:{SECRET}@p", "proxy-url is not SCHEME://"),
    (f"server: https://c\nproxy-url: http://u:{SECRET}@p:70000", "proxy-url has a port above"),
    ("server: https://c\nextensions: {}", "extensions is a map where a list is expected"),
])
def test_a_cluster_that_cannot_be(cluster, says):
    assert says in str(fault(one(cluster), empty=b""))


# -- users -------------------------------------------------------------------------------------


@pytest.mark.parametrize("user, value", [
    (f"token: {SECRET}", f"Bearer {SECRET}"), ("token: 12e4", "Bearer 12e4"), ("token: yes", "Bearer yes"),
    ("token: |\n  abc", "Bearer abc"),
    (f"username: u\npassword: '{SECRET}'", "Basic " + b64(f"u:{SECRET}".encode())),
    ("username: 123\npassword: no", "Basic " + b64(b"123:no")), ("username: é", "Basic " + b64("é:".encode())),
])
def test_what_the_header_says(user, value):
    context = resolve(one(user=user))
    assert context.user.authorization == Secret(value.encode())
    shown = repr(context) + str(context) + f"{context.user}"
    assert SECRET not in shown and b64(SECRET.encode())[2:10] not in shown


def test_a_client_certificate():
    inline = f"client-certificate-data: {b64(CERTIFICATE)}\nclient-key-data: {b64(KEY)}"
    files = "client-certificate: cert\nclient-key: key"
    for user in (inline, files, inline + "\n" + files.replace("cert", "nowhere")):
        found = resolve(one(user=user), cert=CERTIFICATE, key=KEY).user
        assert (found.certificate, found.key, found.authorization) == (CERTIFICATE, Secret(KEY), None)
        assert "c2VjcmV0" not in repr(found) and b64(KEY)[:12] not in repr(found)


def test_for_whom_we_act():
    user = ("as: jane@example.com\nas-uid: 07\nas-groups: [devs, 'a b']\n"
            "as-user-extra:\n  example.com/Reason: [one, two]\n  a%b c: ['é']")
    assert resolve(one(user=user)).user.headers == (
        (b"Impersonate-User", b"jane@example.com"), (b"Impersonate-Uid", b"07"), (b"Impersonate-Group", b"devs"),
        (b"Impersonate-Group", b"a b"), (b"Impersonate-Extra-example.com%2Freason", b"one"),
        (b"Impersonate-Extra-example.com%2Freason", b"two"), (b"Impersonate-Extra-a%25b%20c", "é".encode()))
    assert resolve(one(user="as: ''\nas-groups: null")).user.headers == ()


@pytest.mark.parametrize("user, says", [
    (f"token: {SECRET}\nusername: u", "username stands beside a token"),
    ("tokenFile: t\nusername: u", "username stands beside a token"),
    (f"password: {SECRET}", "password stands there without a username"),
    (f"username: a:b\npassword: {SECRET}", "username has a colon"),
    (f"token: {SECRET} {SECRET}", "token has a character that no token may have"),
    (f'token: "{SECRET}\\r\\nX: y"', "token has a character that no token may have"),
    ("token: é", "token has a character that no token may have"),
    (f"token: {'a' * (TOKEN_MAX + 1)}", "token is longer than 64 KiB"),
    (f"token: [{SECRET}]", "token is a list where a text is expected"),
    (f"token: {{{SECRET}: 1}}", "token is a map where a text is expected"),
    ("auth-provider: {name: gcp}", "user 'u': auth-provider is gone from Kubernetes since 1.26"),
    (f"client-certificate-data: {b64(CERTIFICATE)}", "user 'u' has a client-certificate without a client-key"),
    (f"client-key-data: {b64(KEY)}", "user 'u' has a client-key without a client-certificate"),
    (f"client-certificate-data: {b64(CERTIFICATE)}\nclient-key-data: {b64(CERTIFICATE)}",
     "client-key-data holds no private key"),
    ("client-certificate: cert\nclient-key: locked", "has a client key with a passphrase"),
    ("client-certificate: cert\nclient-key: forbidden",
     "client-key /home/u/.kube/forbidden cannot be read: Permission denied"),
    ("as-groups: [a]", "acts for a uid, groups or extras without a user: say `as`, too"),
    ('as: "a\\r\\nX: y"', "as has a control character"),
    ('as: a\nas-user-extra: {k: ["a\\n"]}', "as-user-extra has a control"),
    ("as: a\nas-user-extra: {k: v}", "as-user-extra: k is a text where a list is expected"),
    ("as: a\nas-groups: [{}]", "as-groups has something else than texts"),
    (f"exec: {SECRET}", "user 'u': exec is a text where a map is expected"),
    ("exec: {command: a}",
     "exec: apiVersion is ''; there are client.authentication.k8s.io/v1 and client.authentication.k8s.io/v1beta1"),
    (EXEC.replace("/v1", "/v1alpha1") + "}", "apiVersion is 'client.authentication.k8s.io/v1alpha1'; there are"),
    (EXEC.replace("aws", "''") + "}", "exec: command has no command"),
    (EXEC.replace("interactiveMode: Never, ", "") + "}", "interactiveMode is missing: v1 wants"),
    (EXEC.replace("Never", "Always") + "}", "interactiveMode is Always: this plugin asks at a terminal"),
    (EXEC.replace("Never", "never") + "}", "interactiveMode is 'never'; there are"),
    (EXEC + f", args: {SECRET}}}", "exec: args is a text where a list is expected"),
    (EXEC + f", args: [[{SECRET}]]}}", "args has something else than texts"),
    (EXEC + ', args: ["a\\0"]}', "args has a NUL"),
    (EXEC + f", env: [{{value: {SECRET}}}]}}", "env has a variable without a name"),
    (EXEC + f", env: [{{name: A=B, value: {SECRET}}}]}}", "env has a variable without a name"),
    (EXEC + f", env: {{A: {SECRET}}}}}", "env is a map where a list is expected"),
    (EXEC + f", env: [{SECRET}]}}", "env is a text where a map is expected"),
    (EXEC + ", provideClusterInfo: 1}", "provideClusterInfo has to be true or false"),
])
def test_a_user_that_cannot_be(user, says):
    locked = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nYQ==\n"
    said = str(fault(one(user=user), cert=CERTIFICATE, locked=locked,
                     forbidden=PermissionError(13, "Permission denied")))
    assert says in said and HOME in said


@pytest.mark.parametrize("key", [b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nYQ==\n",
                                 b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: x\n\nYQ==\n"])
def test_a_key_with_a_passphrase_never_asks(key):
    user = f"client-certificate-data: {b64(CERTIFICATE)}\nclient-key-data: {b64(key)}"
    assert "has a client key with a passphrase, and nobody is there to type it" in str(fault(one(user=user)))


def test_nothing_that_proves_who_we_are_goes_to_a_server_without_tls():
    for user in (f"token: {SECRET}", "username: u", EXEC + "}", "tokenFile: t", "as: x"):
        context = resolve(one("server: http://127.0.0.1:8001", user))
        assert context.user == sniroute_kubeconfig.User("u")


def test_entries_that_no_context_leads_to_do_no_harm():
    text = one().replace("users:\n",
                         f"users:\n- name: broken\n  user: {{exec: {SECRET}}}\n- name: v\n- name: w\n  user:\n")
    assert resolve(text).user.authorization == Secret(b"Bearer t")


# -- files that cannot be ----------------------------------------------------------------------


@pytest.mark.parametrize("text, says", [
    ("users: [\n", f"{HOME}, line 1: a [ that is not closed"),
    ("a: b\n\tc: d\n", f"{HOME}, line 2: a tab as indentation"),
    ("- a\n", f"{HOME}, line 1: all of it is a list where a map is expected"),
    (SECRET, f"{HOME}, line 1: all of it is a text where a map is expected"),
    ("kind: Secret\n", "kind is 'Secret'; a kubeconfig has Config"),
    ("apiVersion: v2\n", "apiVersion is 'v2'; a kubeconfig has v1"),
    ("users: {}\n", "users is a map where a list is expected"),
    (f"users:\n- {SECRET}\n", "line 2: users is a text where a map"),
    ("users:\n- user: {}\n", "users has an entry without a name"), ("users:\n-\n", "users has an entry without a name"),
    ("clusters:\n- name: a\n  cluster: {}\n- name: a\n", "line 4: clusters has 'a' twice, first in line 3"),
    (f"users:\n- name: a\n  user: {SECRET}\n", "line 3: user 'a' is a text where a map is expected"),
    ("current-context: [a]\n", "current-context is a list where a text is expected"),
    (b"a: \xff\n", f"{HOME}, line 1: a byte that is not UTF-8"),
    (PermissionError(13, "Permission denied"), f"{HOME} cannot be read: Permission denied"),
    (IsADirectoryError(21, "Is a directory"), f"{HOME} cannot be read: Is a directory"),
    (OSError("x"), "cannot be read: OSError"),
])
def test_a_file_that_cannot_be(text, says):
    error = fault(text)
    assert says in str(error) and error.kind == "file"


def test_mistakes_end_in_a_sentence_without_a_secret():
    user = (f"token: {SECRET}\ntokenFile: t\nclient-certificate: cert\nclient-key: key\nas: jane\n"
            f"{EXEC}, args: [a, '{SECRET}'],\n"
            f"  env: [{{name: A, value: \"{SECRET}\"}}], provideClusterInfo: true}}")
    cluster = (f"server: https://c:6443/k8s\nproxy-url: http://u:{SECRET}@p\n"
               f"certificate-authority-data: {b64(CERTIFICATE)}")
    whole = one(cluster, user)
    assert resolve(whole, cert=CERTIFICATE, key=KEY)
    read = {"/home/u/.kube/cert": CERTIFICATE, "/home/u/.kube/key": KEY}
    dice = random.Random(22)
    bits = ("\n", " ", "  ", ":", ": ", "- ", " #", "'", '"', "\\", "{", "}", "[", "]", ",", "|", ">", "\t", "&", "*",
            "!", "~", "@", "é")
    taken = 0
    for _ in range(1500):
        text = whole
        for _ in range(dice.choice((1, 1, 2, 3))):
            at = dice.randrange(len(text))
            text = text[:at] + (dice.choice(bits) + text[at:] if dice.random() < 0.7 else text[at + dice.randrange(1,
                                                                                                                   4):])
        try:
            context = choose_context("", [HOME], {}, reader({HOME: text, **read}))
        except KubeconfigError as error:
            shown = str(error)
            assert "\n" not in shown and HOME in shown
        else:
            taken += 1
            shown = repr(context)
        assert not any(SECRET[at:at + 6] in shown for at in range(len(SECRET) - 5)), text
    assert 150 < taken < 1350


# -- tokens in files, and the pod's own account ------------------------------------------------


def test_a_token_in_a_file_is_read_when_it_is_wanted():
    files = {"/t": f"{SECRET}\n"}
    assert read_token("/t", reader(files)) == Secret(f"Bearer {SECRET}".encode())
    files["/t"] = "another"
    assert read_token("/t", reader(files)) == Secret(b"Bearer another")
    for data, says in ((b"", "is empty"), (b"\n", "is empty"), (f"{SECRET} {SECRET}", "has a character"),
                       (b"a" * 70000, "is longer"),
                       (FileNotFoundError(2, "No such file or directory"),
                        "cannot be read: No such file or directory")):
        with pytest.raises(KubeconfigError, match=f"^tokenFile /t {says}") as caught:
            read_token("/t", reader({"/t": data}))
        assert SECRET[:6] not in str(caught.value)


POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
OWN = {ACCOUNT + "token": SECRET, ACCOUNT + "ca.crt": CERTIFICATE, ACCOUNT + "namespace": "prod\n"}


def test_the_account_of_a_pod():
    context = in_cluster(POD, reader(OWN))
    assert (context.namespace, context.cluster.server, context.cluster.host, context.cluster.authorities) == (
        "prod", "https://10.96.0.1:443", "10.96.0.1", CERTIFICATE)
    assert (context.user.token_file, context.user.authorization) == (ACCOUNT + "token", None)
    assert context.files == (ACCOUNT + "ca.crt", ACCOUNT + "namespace") and SECRET not in repr(context)
    six = in_cluster({**POD, "KUBERNETES_SERVICE_HOST": "fd00::1"}, reader(OWN)).cluster
    assert (six.host, six.authority, six.server) == ("fd00::1", "[fd00::1]:443", "https://[fd00::1]:443")
    alone = in_cluster(POD, reader({ACCOUNT + "token": SECRET}))
    assert (alone.namespace, alone.cluster.authorities, alone.cluster.verifies) == ("default", b"", True)


def test_where_there_is_no_account():
    assert in_cluster({}, reader(OWN)) is None and in_cluster({**POD, "KUBERNETES_SERVICE_PORT": ""},
                                                              reader(OWN)) is None
    assert in_cluster(POD, reader({ACCOUNT + "ca.crt": CERTIFICATE})) is None, "automountServiceAccountToken: false"
    for files, environ, says in (
            ({**OWN, ACCOUNT + "ca.crt": "x"}, POD, "ca.crt holds no certificate in PEM"),
            ({**OWN, ACCOUNT + "ca.crt": PermissionError(13, "Permission denied")}, POD,
             "ca.crt cannot be read: Permission denied"),
            (OWN, {**POD, "KUBERNETES_SERVICE_PORT": "tcp://x"},
             "KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT")):
        with pytest.raises(KubeconfigError, match=says):
            in_cluster(environ, reader(files))
    unreadable = in_cluster(POD, reader({**OWN, ACCOUNT + "token": PermissionError(13, "Permission denied")}))
    with pytest.raises(KubeconfigError, match="Permission denied"):
        read_token(unreadable.user.token_file, reader({ACCOUNT + "token": PermissionError(13, "Permission denied")}))


def test_a_pod_uses_its_account_where_there_is_no_file():
    context = choose_context("", ["/a"], POD, reader(OWN))
    assert context.user.token_file == ACCOUNT + "token"
    assert context.files == ("/a", ACCOUNT + "ca.crt", ACCOUNT + "namespace"), "a file that comes later counts"
    assert choose_context("", ["/a"], POD, reader({**OWN, "/a": one()})).name == "x"


# -- credential plugins ------------------------------------------------------------------------


def plugin(more: str = "", version: str = "v1", **files: Any) -> Any:
    return resolve(one(user=EXEC.replace("/v1", f"/{version}") + more + "}"), **files).user.plugin


def test_a_plugin():
    found = plugin(f", args: [eks, get-token, --name, 1, {SECRET}], env: [{{name: A, value: {SECRET}}}, {{name: B}}],"
                   " provideClusterInfo: true,\n  installHint: 'Install\n\n   it'")
    assert found.args == ("eks", "get-token", "--name", "1", SECRET) and found.env == (("A", SECRET), ("B", ""))
    assert (found.command, found.version, found.wants_cluster, found.hint) == (
        "aws", "client.authentication.k8s.io/v1", True, "Install it")
    assert repr(found) == str(found) == "<plugin aws>"
    bare = resolve(one(user="exec:\n  apiVersion: client.authentication.k8s.io/v1beta1\n  command: a\n"
                            "  args: null\n  env: null"))
    assert bare.user.plugin == ("client.authentication.k8s.io/v1beta1", "a", (), (), False, "")
    assert plugin(', installHint: "a\\e[31m\\nb"').hint == "a?[31m b"


def test_what_a_plugin_is_told():
    cluster = (f"server: https://[::1]:6443\ntls-server-name: k\ncertificate-authority-data: {b64(CERTIFICATE)}\n"
               f"proxy-url: http://u:{SECRET}@p\ndisable-compression: true\n"
               "extensions:\n- name: other\n  extension: {a: b}\n"
               "- name: client.authentication.k8s.io/exec\n  extension: {audience: x, count: 7}")
    context = resolve(one(cluster, EXEC + ", provideClusterInfo: true}"))
    assert json.loads(plugin_info(context.user.plugin, context.cluster)) == {
        "kind": "ExecCredential", "apiVersion": "client.authentication.k8s.io/v1",
        "spec": {"interactive": False, "cluster": {
            "server": "https://[::1]:6443", "tls-server-name": "k", "certificate-authority-data": b64(CERTIFICATE),
            "proxy-url": f"http://u:{SECRET}@p", "disable-compression": True, "config": {"audience": "x", "count": 7}}}}
    plain = resolve(one("server: https://c\ninsecure-skip-tls-verify: true", EXEC + ", provideClusterInfo: true}"))
    assert json.loads(plugin_info(plain.user.plugin, plain.cluster))["spec"]["cluster"] == {
        "server": "https://c", "insecure-skip-tls-verify": True}
    silent = resolve(one(cluster, EXEC + "}"))
    assert json.loads(plugin_info(silent.user.plugin, silent.cluster))["spec"] == {"interactive": False}


def credential(status: Any, version: str = "client.authentication.k8s.io/v1", kind: str = "ExecCredential") -> bytes:
    return json.dumps({"apiVersion": version, "kind": kind, "status": status}).encode()


@pytest.mark.parametrize("when, seconds", [
    ("2026-11-29T12:00:00Z", 0.0), ("2026-11-29T13:30:00+01:30", 0.0), ("2026-11-29T12:00:00.25Z", 0.25),
    ("2026-11-29T12:00:00.123456789-00:00", 0.123456789), ("", None), (None, None), ("0001-01-01T00:00:00Z", None)])
def test_when_a_credential_expires(when, seconds):
    noon = datetime.datetime(2026, 11, 29, 12, tzinfo=datetime.timezone.utc).timestamp()
    found = read_credential(plugin(), credential({"token": SECRET, "expirationTimestamp": when}))
    assert found.expires == (None if seconds is None else pytest.approx(noon + seconds, abs=1e-6))
    assert found.authorization == Secret(f"Bearer {SECRET}".encode()) and SECRET not in repr(found)


def test_a_certificate_of_a_plugin():
    status = {"clientCertificateData": CERTIFICATE.decode(), "clientKeyData": KEY.decode()}
    assert read_credential(plugin(), b"\xef\xbb\xbf" + credential(status)) == (None, CERTIFICATE, Secret(KEY), None)
    both = read_credential(plugin(version="v1beta1"),
                           credential({**status, "token": "t"}, "client.authentication.k8s.io/v1beta1"))
    assert both == (Secret(b"Bearer t"), CERTIFICATE, Secret(KEY), None)


@pytest.mark.parametrize("printed, says", [
    (b"", "printed nothing"), (b" \n", "printed nothing"), (b"Please log in", "printed no ExecCredential in JSON"),
    (b"\xff", "printed no ExecCredential"), (b"[" * 100000, "printed no ExecCredential"),
    (b"[]", "printed no ExecCredential"),
    (b" " * CREDENTIAL_MAX + b"{}", "printed more than 1 MiB"), (SECRET.encode(), "printed no ExecCredential in JSON"),
    (credential({"token": SECRET}, kind="Token"), "printed no ExecCredential"),
    (credential({"token": SECRET}, "client.authentication.k8s.io/v1beta1"),
     "answers in 'client.authentication.k8s.io/v1beta1', and the kubeconfig says client.authentication.k8s.io/v1"),
    (credential(None), "printed no status"), (credential([]), "printed no status"),
    (credential({}), "printed neither a token nor a certificate"), (credential({"token": None}), "printed neither"),
    (credential({"token": [SECRET]}), "printed a status whose token is no text"),
    (credential({"token": f"{SECRET}\r\nX: y"}), "printed a token that has a character"),
    (credential({"token": "\ud800 "}), "printed a token that has a character"),
    (credential({"clientKeyData": SECRET}), "printed a certificate or a key, not both"),
    (credential({"clientCertificateData": CERTIFICATE.decode()}), "printed a certificate or a key, not both"),
    (credential({"clientCertificateData": b64(CERTIFICATE), "clientKeyData": b64(KEY)}), "not in PEM"),
    (credential({"clientCertificateData": CERTIFICATE.decode(),
                 "clientKeyData": "-----BEGIN ENCRYPTED PRIVATE KEY-----"}), "passphrase"),
    *((credential({"token": SECRET, "expirationTimestamp": when}), "expirationTimestamp") for when in (
        "tomorrow", "2026-11-29", "2026-11-29T12:00:00", "2026-13-29T12:00:00Z", "2026-11-29T25:00:00Z",
        "2026-11-29T12:00:00+25:00",
        "2026-11-29 12:00:00Z", "0000-01-01T00:00:00Z", 1764417600)),
])
def test_an_answer_that_is_none(printed, says):
    with pytest.raises(KubeconfigError) as caught:
        read_credential(plugin(), printed)
    said = str(caught.value)
    assert said.startswith("the plugin aws ") and says in said
    assert caught.value.kind == "plugin" and SECRET[:6] not in said


# -- kubectl -----------------------------------------------------------------------------------


def test_kubectl_merges_the_same(tmp_path):
    """`--flatten` reads the files, `--minify` leaves one context with what it needs."""
    for name, data in (("ca.pem", CERTIFICATE), ("cert.pem", CERTIFICATE), ("key.pem", KEY)):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "ca.pem").write_bytes(CERTIFICATE * 2)
    first, second = tmp_path / "config", tmp_path / "more" / "config"
    first.write_text(one("server: https://first\ncertificate-authority: ca.pem",
                         "client-certificate: cert.pem\nclient-key: key.pem")
                     .replace("current-context: x\n", ""))
    second.write_text(one("server: https://second", "token: second",
                          "cluster: d, user: v, namespace: prod").replace("name: c\n", "name: d\n")
                      .replace("current-context: x", "current-context: arn:aws:eks:eu-west-1:123:cluster/x")
                      .replace("clusters:\n", "clusters:\n- name: c\n  cluster: {server: 'https://other'}\n")
                      .replace("users:\n", "users:\n- name: v\n  user: {username: é, password: 'a: b'}\n")
                      .replace("    server: https://second\n",
                               "    server: https://second\n    certificate-authority: ./ca.pem\n")
                      + "- name: arn:aws:eks:eu-west-1:123:cluster/x\n"
                        "  context: {cluster: d, user: v, namespace: prod}\n")
    paths = [str(first), str(second)]

    def read(path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    config = load_kubeconfig(paths, read)
    merged = kubectl_view(first, second)
    assert merged["current-context"] == config.current
    for key, names in (("clusters", config.clusters), ("users", config.users), ("contexts", config.contexts)):
        assert sorted(each["name"] for each in merged[key]) == sorted(names)
    for name in config.contexts:
        view = kubectl_view(first, second, words=("--flatten", "--minify", f"--context={name}"))
        context = find_context(config, name, read)
        cluster, user = view["clusters"][0]["cluster"], view["users"][0]["user"]
        assert context.cluster.server == cluster["server"]
        assert context.cluster.authorities == base64.b64decode(cluster["certificate-authority-data"])
        assert context.namespace == view["contexts"][0]["context"].get("namespace", "default")
        assert context.user.certificate == base64.b64decode(user.get("client-certificate-data", ""))
        assert context.user.key == (Secret(KEY) if "client-key-data" in user else None)
        login = f"{user['username']}:{user['password']}" if "username" in user else ""
        assert context.user.authorization == (Secret(b"Basic " + b64(login.encode()).encode()) if login else None)
