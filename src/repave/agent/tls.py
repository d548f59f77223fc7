"""Whom the agent trusts over TLS."""

from __future__ import annotations

import ssl

_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME, openssl/x509_vfy.h


def trust_only(ca_pem: str) -> ssl.SSLContext:
    """TLS 1.2 or later, host name or address checked, our CA and no other.

    Dates in certificates are not checked: a server with an empty clock battery believes it is 2000 or so, and the CA came with this
    very boot. `create_default_context` is avoided: it would write keys to SSLKEYLOGFILE.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # CERT_REQUIRED and check_hostname
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=ca_pem)
    context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
    return context


def trust_system() -> ssl.SSLContext:
    """Whom this machine trusts: for the writer alone, and web servers that are not ours."""
    return ssl.create_default_context()
