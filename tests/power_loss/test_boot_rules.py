"""The model of the boot rules, case by case. The long lane asks OVMF the same cases; here it is the model alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from doctored import DOCTORED, make_doctored


@pytest.mark.parametrize("name", DOCTORED)
def test_the_model_says_what_ovmf_was_seen_to_do(tmp_path: Path, name: str) -> None:
    _, _, verdict = make_doctored(name, tmp_path)
    case = DOCTORED[name]
    taken = [way for way in verdict.taken if way != "boot-code"]
    assert taken == ([case.way] if case.way else [])
    assert (verdict.loader, verdict.says) == (bool(case.says), case.says)
