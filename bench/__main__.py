"""`python -m bench [NAME [COUNT]]`; without a name, all of them. COUNT: machines, repetitions of `rack`, or kills of `takeover`."""

from __future__ import annotations

import sys

from bench import pair, rack, scripted_batch, takeover

BENCHES = {"rack": rack.main, "pair": pair.main, "scripted": scripted_batch.main, "takeover": takeover.main}

if __name__ == "__main__":
    name, *counts = sys.argv[1:] or ["all"]
    if name != "all" and name not in BENCHES:
        sys.exit(f"usage: python -m bench [{'|'.join(BENCHES)} [COUNT]]")
    for bench in BENCHES.values() if name == "all" else [BENCHES[name]]:
        bench(*map(int, counts))
