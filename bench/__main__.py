"""`python -m bench [NAME [COUNT]]`; without a name, those of one reinstall and one batch.

COUNT: machines (agents of `spread`); repetitions of `rack`, kills of `takeover`, rounds of `serving`, reinstalls of `simulated`, minutes of `soak`.
"""

from __future__ import annotations

import sys

from bench import fifty, fleet, pair, rack, scripted_batch, serving, simulated, soak, spread, takeover

BENCHES = {"rack": rack.main, "pair": pair.main, "scripted": scripted_batch.main, "fifty": fifty.main, "takeover": takeover.main}
LONG = {"fleet": fleet.main, "simulated": simulated.main, "soak": soak.main, "serving": serving.main, "spread": spread.main}

if __name__ == "__main__":
    name, *counts = sys.argv[1:] or ["all"]
    if name != "all" and name not in BENCHES | LONG:
        sys.exit(f"usage: python -m bench [{'|'.join(BENCHES | LONG)} [COUNT]]")
    for bench in BENCHES.values() if name == "all" else [(BENCHES | LONG)[name]]:
        bench(*map(int, counts))
