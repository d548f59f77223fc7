"""What machines say, made fit to be shown: no secret however it is written, no codes that move a terminal's cursor."""

from __future__ import annotations

import json

import pytest
from secret_scan import encodings_of, find_in

from repave.domain.redaction import Redactor

SECRET = 'Canary+7/x!9Zq"k'


@pytest.mark.parametrize("name", [name for name in encodings_of(SECRET) if not name.startswith("utf-16")])
def test_a_runs_secret_is_masked_however_it_is_written(name):
    said = b"before " + encodings_of(SECRET)[name] + b" after"
    cleaned = Redactor([SECRET]).clean(said.decode())
    assert find_in(cleaned.encode(), [SECRET]) == [] and cleaned.startswith("before ") and cleaned.endswith(" after")


def test_a_secret_in_json_is_masked_as_json_writes_it():
    assert SECRET[:8] not in Redactor([SECRET]).clean(json.dumps({"said": SECRET}))


@pytest.mark.parametrize(
    "text",
    [
        "root:$6$rounds=500000$abcdefgh$0123456789abcdefghijklmnopqrstuv:19000:0:99999:7:::",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\nlast\n-----END OPENSSH PRIVATE KEY-----\n",
        "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0B",
        "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj",
        "Authorization: Basic 0123456789abcdef",
        "Bearer 0123456789abcdef",
        f"1795968000.01a22808-9e4a-7d8a-b572-3ed960458a11.{'0123456789abcdef' * 4}",
        "http://10.0.0.1:8472/media/run-1/0123456789abcdef/boot.iso",
        "http://admin:hunter22@10.0.0.9/iso",
    ],
)
def test_what_looks_like_a_secret_is_masked_whoevers_it_is(text):
    cleaned = Redactor().clean(text)
    assert "***" in cleaned
    assert not any(part in cleaned for part in ("0123456789abcdef", "b3Blbn", "last", "MIIEv", "hunter22"))


def test_digests_and_words_that_only_look_like_secrets_stay():
    for text in (
        "0123456789abcdef" * 4,
        "basic initialization of ACPI",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHUMxFPpSdVYHkBvRNXQ8m1Gp8p0cS2Rk6hB3y root@lab01",
    ):
        assert Redactor().clean(text) == text


def test_codes_for_terminals_are_gone_and_words_of_all_languages_stay():
    said = "\x1b[2J\x1b[1;1H\x1b]0;owned\x07BdsDxe: loading\r\n\x1b=\x9bzß→日\x00\x07\tx\ud800"
    assert Redactor().clean(said) == "BdsDxe: loading\nzß→日\tx"


def test_fields_whose_name_says_secret_are_masked_in_json_and_the_rest_stays():
    body = {"UserName": "u", "Password": "p", "Oem": [{"X-Auth-Token": "t", "Image": "http://h/media/r/abc/boot.iso", "Inserted": True}], "Token": None}
    shown = {"UserName": "u", "Password": "***", "Oem": [{"X-Auth-Token": "***", "Image": "http://h/media/r/***/boot.iso", "Inserted": True}], "Token": None}
    assert Redactor().clean_json(body) == shown
