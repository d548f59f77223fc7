"""What we hash is what login computes: the distribution's own tool agrees."""

import subprocess

from repave.password_hash import hash_password


def test_openssl_makes_the_same_hash_of_the_same_salt():
    made = hash_password("Aa1!aaaa", rounds=5000)
    salt = made.split("$")[3]
    theirs = subprocess.run(["openssl", "passwd", "-6", "-salt", f"rounds=5000${salt}", "-stdin"], input="Aa1!aaaa", capture_output=True, text=True, check=True)
    assert theirs.stdout.strip() == made


def test_two_hashes_of_one_password_differ():
    assert hash_password("Aa1!aaaa", rounds=1000) != hash_password("Aa1!aaaa", rounds=1000)
