"""What is wrong in the settings is said in one line that names the setting, and never repeats a value."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from repave.api.agent import ChunkPlaces
from repave.app import render_settings
from repave.config import OTHER_VARIABLES, SETTINGS_FILE, Settings, load_settings, refuse_unknown_variables, split_caches
from repave.errors import RepaveError


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gracefull_s = 5", "gracefull_s"),
        ('graceful_s = "canary-7!"', "graceful_s"),
        ("graceful_s = -1", "graceful_s"),
        ("graceful_s = = 5", SETTINGS_FILE),
        ('media_listen = "10.9.0.5"', "media_listen"),
        ('media_url = ""', "media_url"),
        ('media_url = "https://canary:8472 10.9.0.5:8472"', "media_url"),
        ('media_url = "http://canary:99999"', "media_url"),
        ('image_formats = "qcow2 canary"', "image_formats"),
        ('image_formats = ""', "image_formats"),
        ('agent_url = "http://canary:8471"', "agent_url"),
        ('agent_url = "https://"', "agent_url"),
        ('agent_url = "https://[::1"', "agent_url"),
        ('agent_url = "https://canary:8471/repave"', "agent_url"),
        ('chunks_url = "http://canary:8473/chunks"', "chunks_url"),
        ('chunks_listen = ""', "chunks_url"),
        ('chunk_caches = "rack-1=canary:8475"', "chunk_caches"),
        ('chunk_caches = "http://a:1/chunks ftp://canary/"', "chunk_caches"),
    ],
)
def test_a_mistake_in_the_settings_names_the_setting(tmp_path, text, named):
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(RepaveError) as refused:
        load_settings(tmp_path)
    assert refused.value.slug == "bad-request"
    assert named in str(refused.value) and "canary" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "https://127.0.0.1:8473/chunks"),
        ('agent_url = "https://10.9.0.5:8471"\nchunks_listen = "10.9.0.5:9000"', "https://10.9.0.5:9000/chunks"),
        ('agent_url = "https://[fd00::5]:8471"', "https://[fd00::5]:8473/chunks"),
        ('chunks_url = "https://nginx:8474/chunks"\nchunks_listen = ""', "https://nginx:8474/chunks"),
    ],
)
def test_chunks_are_where_agents_are_unless_it_is_said(tmp_path, text, url):
    (tmp_path / SETTINGS_FILE).write_text(text)
    assert load_settings(tmp_path).chunks_url == url


def test_a_site_that_is_asked_from_elsewhere_does_not_serve_chunks_to_itself_alone(tmp_path):
    """The bug: after an upgrade `chunks_listen` was loopback, and servers were told this host's outer address: each run ended past the line."""
    (tmp_path / SETTINGS_FILE).write_text('provisioning_listen = "10.9.0.5:8471"\nagent_url = "https://10.9.0.5:8471"\n')
    with pytest.raises(RepaveError, match="chunks_listen"):
        load_settings(tmp_path)
    with (tmp_path / SETTINGS_FILE).open("a") as f:
        f.write('chunks_listen = "0.0.0.0:8473"\n')
    assert load_settings(tmp_path).chunks_url == "https://10.9.0.5:8473/chunks"


def test_a_server_is_told_its_racks_caches_then_everybodys_then_the_origin():
    caches = split_caches("http://all:1/chunks rack-7=http://seven:1/chunks row%201=http://row:1/a=b http://c/a=b")
    places = ChunkPlaces(b"", "https://origin/chunks", tuple(caches))
    everybody = ["http://all:1/chunks", "http://c/a=b", "https://origin/chunks"]
    assert places.list_urls("rack-7") == ["http://seven:1/chunks", *everybody]
    assert places.list_urls("row 1") == ["http://row:1/a=b", *everybody]
    assert places.list_urls("") == places.list_urls("rack-8") == everybody


def test_no_folder_to_import_from_is_none_and_not_the_sites_own(tmp_path, monkeypatch):
    monkeypatch.setenv("REPAVE_IMPORT_KEYRING", "")
    (tmp_path / SETTINGS_FILE).write_text('import_dir = ""\nimage_formats = "vmdk raw"\n')
    settings = load_settings(tmp_path)
    assert (settings.import_dir, settings.import_keyring, settings.image_formats.split()) == (None, None, ["vmdk", "raw"])
    (tmp_path / SETTINGS_FILE).write_text('import_dir = "shelf"\n')
    assert load_settings(tmp_path).import_dir == tmp_path / "shelf"


def test_every_line_of_a_new_settings_file_can_be_taken_as_it_is(tmp_path):
    text = "\n".join(line.removeprefix("#") if line.startswith("#") and not line.startswith("# ") else line for line in render_settings({}).splitlines())
    assert set(tomllib.loads(text)) == set(Settings.model_fields)


def test_a_mistyped_variable_is_refused_with_the_name_that_was_meant(tmp_path, monkeypatch):
    monkeypatch.setenv("REPAVE_MEDAI_URL", "http://canary:8472")
    with pytest.raises(RepaveError) as refused:
        load_settings(tmp_path)
    assert (refused.value.slug, refused.value.context) == ("bad-request", {"field": "REPAVE_MEDAI_URL"})
    assert "Did you mean REPAVE_MEDIA_URL?" in str(refused.value) and "canary" not in str(refused.value)


def test_every_variable_that_anything_of_ours_reads_is_known():
    root = Path(__file__).parents[2]
    texts = [p.read_text() for folder in ("src", "tests", "bench") for p in (root / folder).rglob("*.py") if p.name not in ("config.py", "test_settings.py")]
    read = {name for text in texts for name in re.findall(r"\bREPAVE_[A-Z_]*[A-Z]\b", text)}
    assert read >= OTHER_VARIABLES
    refuse_unknown_variables(read)
