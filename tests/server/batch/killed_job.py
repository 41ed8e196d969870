"""A job to be killed: by whoever starts this process, in children that are forked on demand, or by itself.

python -m tests.server.batch.killed_job CONFIG ROWS OUTPUT                     runs the job to its end
python -m tests.server.batch.killed_job CONFIG ROWS --forks                    in children, as it is told
python -m tests.server.batch.killed_job CONFIG ROWS OUTPUT --kills 5 --rows 9  kills it five times on the way

Whoever runs the job prints a line when rows begin to run; the last prints a line for each kill. The last two load the
libraries once and fork, so that a kill costs no start-up. The last kills after a number of rows, not of seconds: the
job of a fast machine is then still running, too.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ensemble_server.server.batch import run_batch
from ensemble_server.server.batch.running.runner import Progress

GROUP_S = 0.05  # within which answers are recorded together: kills fall before, into and after such a moment


def load_libraries() -> None:
    """So that no child has to: all that a job imports."""
    import ensemble_server.server.engines.transformers_engine.engine
    import ensemble_server.server.engines.transformers_engine.members
    import ensemble_server.server.hosting  # noqa: F401


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
    load_libraries()
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


def run_in_forks(config: Path, rows: Path) -> None:
    """Prints "ready", then does what standard input says, by lines: "begin OUTPUT" forks a child that does what
    `run_aloud` does, "kill" and "wait" end with it and print "ended" and its exit code, negative if a signal ended it.
    """
    load_libraries()
    print("ready", flush=True)
    child = 0
    for line in sys.stdin:
        verb, _, output = line.strip().partition(" ")
        if verb == "begin":
            child = os.fork()
            if not child:
                return run_aloud(config, rows, Path(output))
            continue
        if verb == "kill":  # here, where a child that is over still has its process id
            os.kill(child, signal.SIGKILL)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--forks", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--rows", type=int, default=9)
    options = parser.parse_args()
    if options.forks:
        run_in_forks(*options.paths)
    elif options.kills:
        run_and_kill(*options.paths, num_kills=options.kills, num_rows=options.rows)
    else:
        run_aloud(*options.paths)
