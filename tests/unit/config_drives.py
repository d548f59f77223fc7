"""The files of a config drive, by both of the names that its ISO gives them."""

from __future__ import annotations

import io

import pycdlib


def read_drive(drive: bytes) -> dict[str, bytes]:
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(drive))
    files = {}
    for name in ("meta_data.json", "user_data", "network_data.json", "vendor_data.json"):
        for path in ({"rr_path": f"/openstack/latest/{name}"}, {"joliet_path": f"/openstack/latest/{name}"}):
            out = io.BytesIO()
            iso.get_file_from_iso_fp(out, **path)
            assert files.setdefault(name, out.getvalue()) == out.getvalue()
    iso.close()
    return files
