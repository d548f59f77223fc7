"""The administrator password rule of CloudDC ReinstallOS (2025-07-25) and clouddc-api.md section 10."""

from __future__ import annotations

import string

SPECIAL = "!@$%^-_=+[{}]:,./?"
MIN_LENGTH, MAX_LENGTH = 8, 26
_CLASSES = {
    "upper": string.ascii_uppercase,
    "lower": string.ascii_lowercase,
    "digit": string.digits,
    "special": SPECIAL,
}
_ALLOWED = set("".join(_CLASSES.values()))


def user_for(os_type: str) -> str:
    """The user whose password a reinstall sets."""
    return "Administrator" if os_type == "Windows" else "root"


def find_password_fault(password: str, *, user: str) -> str | None:
    """What is wrong, in a sentence that never repeats the password; None when nothing is."""
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        return f"must be {MIN_LENGTH} to {MAX_LENGTH} characters long"
    if set(password) - _ALLOWED:
        return f"may hold only letters, digits and {SPECIAL}"
    kinds = [name for name, letters in _CLASSES.items() if set(password) & set(letters)]
    if len(kinds) < 3:
        return "needs at least three of: upper-case letter, lower-case letter, digit, special character"
    lowered = password.lower()
    if user.lower() in lowered or user.lower()[::-1] in lowered:
        return "must not contain the user name, or the user name reversed"
    return None
