"""What is wrong in the settings is said in one line that names the setting, and never repeats a value."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from repave.app import render_settings
from repave.config import OTHER_VARIABLES, SETTINGS_FILE, Settings, load_settings, refuse_unknown_variables
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
    ],
)
def test_a_mistake_in_the_settings_names_the_setting(tmp_path, text, named):
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(RepaveError) as refused:
        load_settings(tmp_path)
    assert refused.value.slug == "bad-request"
    assert named in str(refused.value) and "canary" not in str(refused.value)


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
