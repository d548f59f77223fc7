"""`python -m bench [NAME [COUNT]]`; without a name, those of one reinstall and one batch.

COUNT: machines; repetitions of `boot`, `rack` and `rack_debian`, kills of `takeover`, reinstalls of `simulated`, minutes of `soak`, rounds of
`importing`, `serving`, `growth`, `write`, `pages` and `cli_start`, agents of `spread`.
"""

from __future__ import annotations

import functools
import sys

from bench import boot, cli_start, faulty, fifty, fleet, growth, importing, pages, pair, rack, scripted_batch, serving, simulated, soak, spread, takeover, write
from repave.lab.processes import end_on_sigterm

BENCHES = {"boot": boot.main, "rack": rack.main, "pair": pair.main, "scripted": scripted_batch.main, "fifty": fifty.main, "takeover": takeover.main}
LONG = {
    "rack_debian": functools.partial(rack.main, image=rack.DEBIAN),
    "fleet": fleet.main, "simulated": simulated.main, "soak": soak.main, "importing": importing.main, "serving": serving.main,
    "spread": spread.main, "growth": growth.main, "write": write.main, "pages": pages.main, "cli_start": cli_start.main,
    "faulty": faulty.main,
}  # fmt: skip

if __name__ == "__main__":
    end_on_sigterm()
    name, *counts = sys.argv[1:] or ["all"]
    if name != "all" and name not in BENCHES | LONG:
        sys.exit(f"usage: python -m bench [{'|'.join(BENCHES | LONG)} [COUNT]]")
    for bench in BENCHES.values() if name == "all" else [(BENCHES | LONG)[name]]:
        bench(*map(int, counts))
