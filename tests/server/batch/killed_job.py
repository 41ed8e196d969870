"""A job to be killed: one process that runs it, or one that runs it again and again in children and kills them.

python -m tests.server.batch.killed_job CONFIG ROWS OUTPUT                     runs the job to its end
python -m tests.server.batch.killed_job CONFIG ROWS OUTPUT --kills 5 --rows 9  kills it five times on the way

The first prints a line when rows begin to run, the second one for each kill. The second loads the libraries once and
forks, so that a kill costs no start-up. It kills after a number of rows, not of seconds: the job of a fast machine is
then still running, too.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from ensemble_server.server.batch import run_batch
from ensemble_server.server.batch.running.runner import Progress

GROUP_S = 0.05  # within which answers are recorded together: kills fall before, into and after such a moment


def run_job(config: Path, rows: Path, output: Path, *, on_progress: Callable[[Progress], None]) -> None:
    run_batch(config, rows, output, seed=3, on_progress=on_progress)


def run_in_child(config: Path, rows: Path, output: Path) -> tuple[int, int]:
    """-> process id, and a pipe that gets a byte for each answered row"""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        return child, reading
    num_noted = 0

    def note(progress: Progress) -> None:
        nonlocal num_noted
        os.write(writing, b"." * (progress.done - num_noted))
        num_noted = progress.done

    run_job(config, rows, output, on_progress=note)
    os._exit(0)


def run_and_kill(config: Path, rows: Path, output: Path, *, num_kills: int, num_rows: int) -> None:
    """Children that begin or continue the job, each killed when it answered a random number of rows up to `num_rows`;
    then a run to the end. The first child is killed while it starts.
    """
    import ensemble_server.server.hosting  # noqa: F401  so that no child has to

    moments = random.Random(5)
    for number in range(num_kills):
        child, answered = run_in_child(config, rows, output)
        for _ in range(moments.randint(1, num_rows) if number else 0):
            os.read(answered, 1)
        time.sleep(moments.uniform(0, 2 * GROUP_S))
        os.kill(child, signal.SIGKILL)
        os.close(answered)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else "too late", flush=True)
    run_job(config, rows, output, on_progress=lambda progress: None)


def run_aloud(config: Path, rows: Path, output: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    has_begun = False

    def note(progress: Progress) -> None:
        nonlocal has_begun
        if not has_begun:
            has_begun = True
            print("running", flush=True)

    run_job(config, rows, output, on_progress=note)
    print("finished", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", type=Path, nargs=3)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--rows", type=int, default=9)
    options = parser.parse_args()
    if options.kills:
        run_and_kill(*options.paths, num_kills=options.kills, num_rows=options.rows)
    else:
        run_aloud(*options.paths)
