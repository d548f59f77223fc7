"""The password rule, a row a fact."""

import pytest

from repave.domain.password import find_password_fault

GOOD = ["Aa1!aaaa", "aaaaAAAA1", "!@$%^-_=+[{}]:,./?aA", "Zz9" + "x" * 23, "Administrat0!"]
BAD = [
    "Aa1!aaa", "Aa1!" + "x" * 23, "aaaaaaaa", "aaaaaaaa1", "Aa1!root", "xxToOr1!A", "Aa1!aaa ", " Aa1!aaa", "Aa1!aaa\t", "Aa1!aaé",
    "Aa1!aaa#", "Aa1!aaa\u200b", "", "ÄÖ1!aaaa",
]  # fmt: skip


@pytest.mark.parametrize("password", GOOD)
def test_allowed(password):
    assert find_password_fault(password, user="root") is None


@pytest.mark.parametrize("password", BAD)
def test_refused_without_repeating_it(password):
    fault = find_password_fault(password, user="root")
    assert fault
    assert not password or password not in fault


def test_the_user_name_is_the_systems_own():
    assert find_password_fault("Aa1!Administrator", user="Administrator")
    assert find_password_fault("Aa1!rotartsinimdA", user="Administrator")
    assert find_password_fault("Aa1!root", user="Administrator") is None
