# Apache-2.0 (see the LICENSE of Repave)
"""The options that say where the service is."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = """
options:
  endpoint:
    description: URL of the service. Default is the environment variable E(REPAVE_ENDPOINT), then C(http://127.0.0.1:8470).
    type: str
  token:
    description: A key's token. Default is the environment variable E(REPAVE_TOKEN).
    type: str
  ca_path:
    description: A CA bundle for the endpoint's certificate. Default is the environment variable E(REPAVE_CA).
    type: path
  project:
    description: Another project than the key's own, for an admin of project C(default).
    type: str
"""
