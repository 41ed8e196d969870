"""The hosting: config -> members -> methods -> HTTP, batch and comparison.

torch computes with teams of OpenMP threads, and those of libgomp wait for one another in a busy loop, for milliseconds.
Where other programs want the same cores, the one that is waited for has none to run on: 2 threads took 7 to 13 times as
long as 1. So they spin for microseconds, then sleep (figures in docs/performance.md). libgomp reads this when torch is
imported; whoever has set how threads wait is left alone.
"""

import os

SPINS = "3000"  # rounds of that loop; libgomp's own number is 300000

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS
