"""What is wrong in a settings file is said in one line that names the setting, and never repeats a value."""

from __future__ import annotations

import pytest

from repave.config import SETTINGS_FILE, load_settings
from repave.errors import RepaveError


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gracefull_s = 5", "gracefull_s"),
        ('graceful_s = "canary-7!"', "graceful_s"),
        ("graceful_s = -1", "graceful_s"),
        ("graceful_s = = 5", SETTINGS_FILE),
        ('media_listen = "10.9.0.5"', "media_listen"),
    ],
)
def test_a_mistake_in_the_settings_names_the_setting(tmp_path, text, named):
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(RepaveError) as refused:
        load_settings(tmp_path)
    assert refused.value.slug == "bad-request"
    assert named in str(refused.value) and "canary" not in str(refused.value)
