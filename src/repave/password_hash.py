"""The hash of a Linux password: sha512-crypt by the system's own libcrypt, so that it is what login will compute.

By ctypes, because libcrypt runs without the interpreter's lock: the API answers on while a password is hashed (libpass, pure Python, holds it
for the whole time and takes 2.4 times as long).
"""

from __future__ import annotations

import ctypes
import secrets
import string

ROUNDS = 300_000  # OWASP's order of magnitude for SHA-512; 0.12 s on one quiet core here (design.md 14)
_CRYPT_DATA_BYTES = 128 * 1024  # struct crypt_data: 32 KiB in libxcrypt, 128 KiB in old glibc (crypt.h)
_SALT_LETTERS = string.ascii_letters + string.digits + "./"


def hash_password(password: str, *, rounds: int = ROUNDS) -> str:
    """`$6$rounds=...$salt$hash`. Blocks for a tenth of a second; releases the interpreter's lock."""
    salt = "".join(secrets.choice(_SALT_LETTERS) for _ in range(16))
    setting = f"$6$rounds={rounds}${salt}"
    libcrypt = ctypes.CDLL("libcrypt.so.1", use_errno=True)
    libcrypt.crypt_r.restype = ctypes.c_char_p
    libcrypt.crypt_r.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    scratch = ctypes.create_string_buffer(_CRYPT_DATA_BYTES)
    made = libcrypt.crypt_r(password.encode(), setting.encode(), scratch)
    text = made.decode() if made else ""
    ctypes.memset(scratch, 0, _CRYPT_DATA_BYTES)
    if not text.startswith(setting):
        raise RuntimeError("libcrypt does not make sha512-crypt hashes")
    return text
