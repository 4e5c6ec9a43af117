"""Several ranks for a test: forked processes, which need not import PyTorch again (1 s for 10 s each)."""

import multiprocessing
import os
import socket
import time

from common import init_ranks, leave_ranks


def on_ranks(n_ranks, action, together=1, timeout=60):
    """Runs action(ranks) on n_ranks ranks on gloo, of which `together` sample as one; all must end well."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def run(rank):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks,
                "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()})
        ranks = init_ranks(1, together)
        action(ranks)
        ranks.barrier()
        leave_ranks()
    leave_ranks()  # of another test's run
    processes = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(n_ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    while any(p.is_alive() for p in processes) and all(p.exitcode in (0, None) for p in processes):
        time.sleep(0.02)
        if time.monotonic() > end:
            break
    for process in processes:  # those that wait for one that failed, or for each other
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * n_ranks
