"""docs/nginx with a real nginx: a big site's server of chunks, and a rack's cache of them. Tokens are checked by both."""

from __future__ import annotations

import http.client
import re
import ssl
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from test_chunk_server import CHUNKS, NAMES, Site, token

from repave.agent.chunks import ChunkSource
from repave.agent.http_client import Refused
from repave.chunk_process import start_chunk_process
from repave.lab.nginx import start_nginx
from repave.lab.processes import find_free_ports

EXPIRED = timedelta(seconds=-1)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("nginx"))
    with made.listener, start_chunk_process(made.listener, made.images, made.key, made.certificate):
        yield made


@pytest.fixture(scope="module")
def server(site: Site) -> Iterator[str]:
    """nginx serves the files; its URL."""
    [port] = find_free_ports(1)
    changes = {
        "10.9.0.5:8474": f"127.0.0.1:{port}", "127.0.0.1:8473": f"127.0.0.1:{site.port}", "/srv/repave/repave-data/images": str(site.images),
        "proxy_cache_valid 204 10s": "proxy_cache_valid 204 1s",
        "/srv/repave/repave-data/chunks.pem": str(site.certificate), "/srv/repave/secret/ca.pem": str(site.folder / "ca.pem"),
    }  # fmt: skip
    with start_nginx(site.folder / "server", "chunks.conf", changes, port=port):
        yield f"https://127.0.0.1:{port}/chunks"


@pytest.fixture
def cache(site: Site, tmp_path: Path) -> Iterator[str]:
    """nginx as an empty cache of our own chunk server; its URL."""
    [port] = find_free_ports(1)
    changes = {
        "10.9.7.2:8475": f"127.0.0.1:{port}", "10.9.0.5:8473": f"127.0.0.1:{site.port}",
        "/etc/repave/ca.pem": str(site.folder / "ca.pem"),
    }  # fmt: skip
    with start_nginx(tmp_path / "cache", "cache.conf", changes, port=port):
        yield f"http://127.0.0.1:{port}/chunks"


def ask(url: str, bearer: str, *, tls: ssl.SSLContext, method: str = "GET") -> http.client.HTTPResponse:
    found = re.fullmatch(r"(https?)://([^:]+):(\d+)(.*)", url)
    assert found
    host, port = found[2], int(found[3])
    connection = http.client.HTTPSConnection(host, port, timeout=20, context=tls) if found[1] == "https" else http.client.HTTPConnection(host, port, timeout=20)
    connection.request(method, found[4], headers={"Authorization": f"Bearer {bearer}"} if bearer else {})
    return connection.getresponse()


def test_nginx_serves_the_store_to_an_agent(site: Site, server: str) -> None:
    source = ChunkSource([server], token=token(), ca_pem=site.ca_pem)
    assert [bytes(source.fetch(name)) for name in NAMES] == list(CHUNKS.values())
    answer = ask(f"{server}/{NAMES[0][:2]}/{NAMES[0]}", token(), tls=site.tls)
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    answer.close()


@pytest.mark.parametrize("front", ["server", "cache"])
def test_nginx_gives_nothing_without_a_good_token(site: Site, front: str, request: pytest.FixtureRequest) -> None:
    url = f"{request.getfixturevalue(front)}/{NAMES[1][:2]}/{NAMES[1]}"
    good = ask(url, token(), tls=site.tls)
    assert (good.status, good.read() == CHUNKS[NAMES[1]]) == (200, True)
    for bearer in ("", "x", token(expires_in=EXPIRED), token(key=b"another site's"), token().replace("run-1", "run-2")):
        refused = ask(url, bearer, tls=site.tls)
        assert refused.status == 401 and CHUNKS[NAMES[1]] not in refused.read()
    assert ask(url, token(), tls=site.tls, method="DELETE").status == 403
    assert ask(url.replace(NAMES[1], "0" * 64), token(), tls=site.tls).status == 404


def test_a_token_that_expires_is_refused_seconds_later(site: Site, server: str) -> None:
    source = ChunkSource([server], token=token(run="short", expires_in=timedelta(seconds=2)), ca_pem=site.ca_pem)
    assert source.fetch(NAMES[0]) == CHUNKS[NAMES[0]]
    ends_at = time.monotonic() + 20
    with pytest.raises(Refused, match="401"):
        while time.monotonic() < ends_at:
            source.fetch(NAMES[0])
            time.sleep(0.2)


def test_a_cache_asks_the_origin_once_for_all_agents_of_a_rack(site: Site, cache: str) -> None:
    sources = [ChunkSource([cache, "https://127.0.0.1:1/chunks"], token=token(run=f"run-{n}"), ca_pem=site.ca_pem) for n in range(3)]
    name = NAMES[2]
    path = site.images / "chunks" / name[:2] / name
    assert sources[0].fetch(name) == CHUNKS[name]
    path.rename(path.with_suffix(".away"))
    try:
        assert [source.fetch(name) == CHUNKS[name] for source in sources] == [True] * 3
    finally:
        path.with_suffix(".away").rename(path)


def test_a_cache_whose_origin_is_gone_costs_one_request(site: Site, cache: str, tmp_path: Path) -> None:
    """It has lost its way to the origin, the agent has not."""
    [port] = find_free_ports(1)
    changes = {
        "10.9.7.2:8475": f"127.0.0.1:{port}", "10.9.0.5:8473": "127.0.0.1:1",
        "/etc/repave/ca.pem": str(site.folder / "ca.pem"),
    }  # fmt: skip
    with start_nginx(tmp_path / "lost", "cache.conf", changes, port=port):
        source = ChunkSource([f"http://127.0.0.1:{port}/chunks", f"https://127.0.0.1:{site.port}/chunks"], token=token(), ca_pem=site.ca_pem)
        assert [bytes(source.fetch(name)) for name in NAMES] == list(CHUNKS.values())
    assert (tmp_path / "lost/access.log").read_text().count("GET /chunks/") == 1


def test_a_cache_that_keeps_a_rotten_chunk_is_not_believed(site: Site, cache: str, tmp_path: Path) -> None:
    name = NAMES[3]
    source = ChunkSource([cache, f"https://127.0.0.1:{site.port}/chunks"], token=token(), ca_pem=site.ca_pem)
    assert source.fetch(name) == CHUNKS[name]
    kept: list[Path] = []
    while not kept:  # nginx answers first, then gives the file its name
        kept = [p for p in (tmp_path / "cache/repave-chunks").rglob("*") if p.is_file() and "." not in p.name]
    whole = kept[0].read_bytes()
    assert CHUNKS[name] in whole
    kept[0].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    rotten = ask(f"{cache}/{name[:2]}/{name}", token(), tls=site.tls).read()
    assert rotten != CHUNKS[name] and len(rotten) == len(CHUNKS[name])
    assert source.fetch(name) == CHUNKS[name]
