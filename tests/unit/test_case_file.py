"""A case file's settings: what a database URL or any other setting holds of logins is masked."""

from __future__ import annotations

from pathlib import Path

from secret_scan import find_in

from repave.app import describe_site
from repave.config import Settings
from repave.domain.redaction import Redactor


def test_a_password_in_a_setting_is_masked():
    settings = Settings(
        database_url="postgresql+psycopg://repave:Tr0ub4dor&3@db.example/repave?sslpassword=Corr3ct-Horse",
        data_dir=Path("/var/lib/repave"),
    )
    shown = Redactor().clean_json(describe_site(settings))["settings"]
    assert find_in(str(shown).encode(), ["Tr0ub4dor&3", "Corr3ct-Horse"]) == []
    assert shown["data_dir"] == "/var/lib/repave" and "db.example" in shown["database_url"]
