"""Images that are fetched: what a web server can do to us, and what it can not. Its end is real HTTP on loopback."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from repave.errors import ImageError
from repave.images.fetch import fetch, open_beneath, verify_signature

BODY = bytes(range(256)) * 4096
SIGNED = b"signed by the distribution"
# gpg --quick-gen-key "image signer" ed25519 sign never; gpg -b; the second signature is by another key
KEYRING = (
    "mDMEXgvhABYJKwYBBAHaRw8BAQdAQ+HjzqJICJvka32cii/ybCxurI1XJeIEi5v8EITkPk20IGltYWdlIHNpZ25lciA8c0BleGFtcGxlLmludmFsaWQ+iJAEExYIADgWIQ"
    "QW+lpbMT8nKaGxFeVDklrnSLYBlwUCXgvhAAIbAwULCQgHAgYVCgkICwIEFgIDAQIeAQIXgAAKCRBDklrnSLYBl5azAQC6BEOuRWOPyWxrRWxpKqSzpQfwVzMkNrxWSnL4"
    "Xy/JqgD9Hl1r9i0cUKlfnbpiViNuRSpfSKYilohCbwcl5VqQAgE="
)
SIGNATURE = (
    "iIgEABYIADAWIQQW+lpbMT8nKaGxFeVDklrnSLYBlwUCXg0ygBIcc0BleGFtcGxlLmludmFsaWQACgkQQ5Ja50i2AZfovwD8D9ozAoX4dN2pe6Ff8XKCA+Xh8UhbS7cWOp"
    "tD9KyNOUcA/ijmZK0d4iMFeDhuKGWwbdGXJOHpaLn/hqiWeCOlXYYK"
)
OF_A_STRANGER = (
    "iIgEABYIADAWIQSVN4V0yva+ZGUyWeEaWozuQQAL5wUCXg0ygBIceEBleGFtcGxlLmludmFsaWQACgkQGlqM7kEAC+cMcgD+MRcjDLLUVOCc2kT4wf4rDQ9T44Tt8pcLWy"
    "olP+JwH5wBANGgZVPevZP5N20HAlWoEeqsiwhelGOwR4e5JVbiHvIF"
)
Serve = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def web(serve: Serve) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server's URL and the headers that it was asked with."""
    asked: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(dict(self.headers.items()))
            serve(self)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/disk.raw", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def whole(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 200, BODY, Content_Length=str(len(BODY)))


def breaks_once(handler: BaseHTTPRequestHandler) -> None:
    if handler.headers["Range"] is None:
        answer(handler, 200, BODY[:300_000], Content_Length=str(len(BODY)), ETag='"1"')
        return
    start = int(handler.headers["Range"].removeprefix("bytes=").rstrip("-"))
    answer(handler, 206, BODY[start:], Content_Length=str(len(BODY) - start), Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")


def take(url: str, *, most_bytes: int = 1 << 30) -> bytes:
    out = io.BytesIO()
    assert fetch(url, out, most_bytes=most_bytes, local_addresses=True) == hashlib.sha256(out.getvalue()).hexdigest()
    return out.getvalue()


def refusal(serve: Serve, *, most_bytes: int = 1 << 30) -> str:
    with web(serve) as (url, _), pytest.raises(ImageError) as refused:
        take(url, most_bytes=most_bytes)
    return refused.value.detail


def test_a_file_comes_whole_and_says_how_far_it_is() -> None:
    seen: list[tuple[int, int]] = []
    with web(whole) as (url, _):
        assert take(url) == BODY
        fetch(url, io.BytesIO(), most_bytes=len(BODY), local_addresses=True, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(BODY), len(BODY)) and seen == sorted(seen)


def test_a_connection_that_breaks_is_resumed_once_where_it_broke() -> None:
    with web(breaks_once) as (url, asked):
        assert take(url) == BODY
    assert [a.get("Range") for a in asked] == [None, "bytes=300000-"] and asked[1]["If-Range"] == '"1"'

    def always(handler: BaseHTTPRequestHandler) -> None:
        start = int((handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        answer(handler, 206 if start else 200, BODY[start : start + 1000], Content_Length=str(len(BODY) - start), Content_Range=f"bytes {start}-9/9")

    assert "broke off after 2000 bytes" in refusal(always)


def test_a_server_that_does_not_resume_is_not_taken_for_one_that_does() -> None:
    assert "does not resume" in refusal(lambda h: answer(h, 200, BODY[:1000], Content_Length=str(len(BODY))))


def test_more_than_there_is_room_for_is_refused_said_or_not() -> None:
    assert "there is room for 1000" in refusal(whole, most_bytes=1000)
    assert "room for 1000" in refusal(lambda h: answer(h, 200, BODY), most_bytes=1000)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "https://127.0.0.1:1/", "ftp://127.0.0.1/", "gopher://x"])
def test_a_redirect_to_another_scheme_is_not_followed(to: str) -> None:
    assert "scheme" in refusal(lambda h: answer(h, 302, Location=to)) or "must be http" in refusal(lambda h: answer(h, 302, Location=to))


def test_a_redirect_on_the_same_scheme_is_followed_but_not_for_ever() -> None:
    with web(whole) as (there, _), web(lambda h: answer(h, 301, Location=there)) as (url, _):
        assert take(url) == BODY
    assert "redirects" in refusal(lambda h: answer(h, 302, Location="/again"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "169.254.169.254", "[::1]", "[::ffff:169.254.169.254]", "[fe80::1]", "2130706433"])
def test_this_machine_and_link_local_addresses_are_not_asked(host: str) -> None:
    with web(whole) as (url, asked), pytest.raises(ImageError) as refused:
        fetch(url.replace("127.0.0.1", host), io.BytesIO(), most_bytes=1 << 30)
    assert "import_local_addresses" in refused.value.detail and not asked


def test_a_redirect_to_this_machine_is_not_followed_either(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo  # the network's end: a public name that leads here
    public = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: public if host == "mirror.invalid" else real(host, *a, **k))
    with web(whole) as (there, asked), web(lambda h: answer(h, 302, Location=there)) as (front, _):
        port = int(front.split(":")[2].split("/")[0])
        connect = socket.create_connection
        monkeypatch.setattr(socket, "create_connection", lambda at, *a, **k: connect(("127.0.0.1", port) if at[0] == "93.184.215.14" else at, *a, **k))
        with pytest.raises(ImageError, match="import_local_addresses"):
            fetch("http://mirror.invalid/disk.raw", io.BytesIO(), most_bytes=1 << 30)
    assert not asked


@pytest.mark.parametrize("url", ["http://user:pw@example.invalid/x", "ftp://example.invalid/x", "file:///etc/passwd", "http://[x"])
def test_a_url_that_is_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ImageError) as refused:
        take(url)
    assert url not in refused.value.detail and "pw" not in refused.value.detail


def test_an_error_of_the_server_is_none_of_ours() -> None:
    assert "404" in refusal(lambda h: answer(h, 404, b"no"))
    assert "packed" in refusal(lambda h: answer(h, 200, BODY, Content_Encoding="gzip", Content_Length=str(len(BODY))))


def test_a_signature_by_a_key_of_the_keyring_is_enough_and_no_other_is(tmp_path: Path) -> None:
    file, ring = tmp_path / "f", tmp_path / "ring"
    file.write_bytes(SIGNED)
    ring.write_bytes(base64.b64decode(KEYRING))
    verify_signature(file, base64.b64decode(SIGNATURE), ring)
    for signature in (base64.b64decode(OF_A_STRANGER), b"", b"nonsense"):
        with pytest.raises(ImageError, match="signature"):
            verify_signature(file, signature, ring)
    file.write_bytes(SIGNED + b".")
    with pytest.raises(ImageError, match="signature"):
        verify_signature(file, base64.b64decode(SIGNATURE), ring)


def test_only_files_below_the_folder_are_opened(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "deb").mkdir(parents=True)
    (folder / "deb" / "12.raw").write_bytes(b"here")
    (tmp_path / "secret").write_bytes(b"secret")
    fd = open_beneath(folder, "deb/12.raw")
    assert os.read(fd, 10) == b"here"
    os.close(fd)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "deb" / "up").symlink_to("..")
    (folder / "away").symlink_to(tmp_path)
    for name in (
        "../secret",
        "deb/../../secret",
        str(tmp_path / "secret"),
        "link",
        "away/secret",
        "deb/up/link",
        "",
        ".",
        "deb",
        "nothing",
        "deb/12.raw/x",
        "a\0b",
    ):
        with pytest.raises(ImageError):
            os.close(open_beneath(folder, name))
