"""A job to be killed: one process that runs it, or one that runs it again and again in children and kills them.

python -m tests.server.batch.killed_job CONFIG ROWS OUTPUT                          runs the job to its end
python -m tests.server.batch.killed_job CONFIG ROWS OUTPUT --kills 5 --longest 0.5  kills it five times on the way

The first prints a line when rows begin to run, the second one for each kill. The second loads the libraries once and
forks, so that a kill costs no start-up.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from server.batch import run_batch


def run_job(config: Path, rows: Path, output: Path, *, on_running: Callable[[], None]) -> None:
    """`on_running` is called once, when rows begin to run."""
    has_begun = False

    def note(progress: object) -> None:
        nonlocal has_begun
        if not has_begun:
            has_begun = True
            on_running()

    run_batch(config, rows, output, seed=3, on_progress=note)


def run_and_kill(config: Path, rows: Path, output: Path, *, num_kills: int, longest_s: float) -> None:
    """Children that begin or continue the job, each killed at a moment of its own; then a run to the end.

    All but the first are killed while rows run.
    """
    import server.hosting  # noqa: F401  so that no child has to

    moments = random.Random(5)
    for number in range(num_kills):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            run_job(config, rows, output, on_running=lambda writing=writing: os.write(writing, b"!"))
            os._exit(0)
        os.close(writing)
        if number:
            os.read(reading, 1)
        os.close(reading)
        time.sleep(moments.uniform(0, longest_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "too late", flush=True)
    run_job(config, rows, output, on_running=lambda: None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", type=Path, nargs=3)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--longest", type=float, default=1.0)
    options = parser.parse_args()
    if options.kills:
        run_and_kill(*options.paths, num_kills=options.kills, longest_s=options.longest)
    else:
        run_job(*options.paths, on_running=lambda: print("running", flush=True))
        print("finished", flush=True)
