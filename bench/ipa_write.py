"""Run by `bench/write.py` with ironic-python-agent's own Python: its code downloads and writes one image, as in its ramdisk.

ipa_write.py raw|qcow2 URL SHA256 DEVICE
"""

from __future__ import annotations

import sys

from ironic_python_agent import config  # noqa: F401  its options
from ironic_python_agent.extensions import standby
from oslo_config import cfg

kind, url, sha256, device = sys.argv[1:]
cfg.CONF([], project="ironic-python-agent")
info = {"id": "bench", "urls": [url], "os_hash_algo": "sha256", "os_hash_value": sha256, "disk_format": kind, "image_type": "whole-disk"}
extension = standby.StandbyExtension()
extension.partition_uuids = {}  # its caller sets it
if kind == "raw":
    extension._stream_raw_image_onto_device(info, device)
else:
    extension._cache_and_write_image(info, device)
