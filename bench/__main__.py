"""`python -m bench [NAME [COUNT]]`; without a name, those of one reinstall and one batch.

COUNT: machines; repetitions of `boot` and `rack`, kills of `takeover`, reinstalls of `simulated`, minutes of `soak`.
"""

from __future__ import annotations

import sys

from bench import boot, fifty, fleet, pair, rack, scripted_batch, simulated, soak, takeover

BENCHES = {"boot": boot.main, "rack": rack.main, "pair": pair.main, "scripted": scripted_batch.main, "fifty": fifty.main, "takeover": takeover.main}
LONG = {"fleet": fleet.main, "simulated": simulated.main, "soak": soak.main}

if __name__ == "__main__":
    name, *counts = sys.argv[1:] or ["all"]
    if name != "all" and name not in BENCHES | LONG:
        sys.exit(f"usage: python -m bench [{'|'.join(BENCHES | LONG)} [COUNT]]")
    for bench in BENCHES.values() if name == "all" else [(BENCHES | LONG)[name]]:
        bench(*map(int, counts))
