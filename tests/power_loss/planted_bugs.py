"""Copies of the writer with one bug each: a lane that does not find them says nothing about the real one."""

from __future__ import annotations

import shutil
from pathlib import Path

from recordings import SOURCE

_EARLY = ("                w.write_body()\n", "                w.disk.write(0, aligned(tables.lba0))\n                w.write_body()\n")
_CLEAR_TAIL = ("        for offset, end in ((0, MIB), *self._beside_kept(tail, size)):", "        for offset, end in ((0, MIB),):")
_CLEAR_TABLES = ("(CD_DESCRIPTOR, sector), (size - table, table)", "(CD_DESCRIPTOR, sector)")
_FLUSH_IN_SEAL = ("""            self._write_whole("the partition table", offset, data)
            self.disk.flush()
""", """            self._write_whole("the partition table", offset, data)
            if offset == 0:
                self.disk.flush()
""")  # fmt: skip
_CLEAR_HEAD = ("""        self.disk.write_zeros(0, sector)
        self.disk.flush()
        table""", "        table")  # fmt: skip
_FLUSH_OF_TABLES = ("""            self.disk.write_zeros(offset, length)
        self.disk.flush()
        for offset, end in""", """            self.disk.write_zeros(offset, length)
        for offset, end in""")  # fmt: skip
_SEAL_AT_ONCE = (
    "((self.disk.sector_bytes, tables.lba1_onward), (0, tables.lba0))",
    "((0, tables.lba0 + tables.lba1_onward),)",
)
_LBA_0_SECOND = (
    "((self.disk.sector_bytes, tables.lba1_onward), (0, tables.lba0))",
    "((0, tables.lba0), (self.disk.sector_bytes, tables.lba1_onward))",
)

# name -> what is replaced in agent/writer.py
PLANTED = {
    "LBA 0 is written early": (_EARLY,),
    "LBA 0 is written early and the old backup table stays": (_EARLY, _CLEAR_TAIL, _CLEAR_TABLES),
    "LBA 0 comes before LBA 1 onward": (_LBA_0_SECOND,),
    "the seal is one write": (_SEAL_AT_ONCE,),
    "no flush before LBA 0": (_FLUSH_IN_SEAL,),
    "the old OS is cleared in one go": (_CLEAR_HEAD, _FLUSH_OF_TABLES),
}


def plant(name: str, folder: Path) -> Path:
    """A source tree like ours with that bug in its writer."""
    source = folder / "src"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
    writer = source / "repave/agent/writer.py"
    text = writer.read_text(encoding="utf-8")
    for old, new in PLANTED[name]:
        if text.count(old) != 1:
            raise ValueError(f"the writer has changed: {old!r} is there {text.count(old)} times")
        text = text.replace(old, new)
    writer.write_text(text, encoding="utf-8")
    return source
