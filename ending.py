"""How a run ends before its end: one of its ranks fails, or the machine is wanted back.

Ranks wait for each other in collectives, for hours if need be. So one that fails says its line and tells the others,
through the store that torchrun keeps for them, and they go without another word.
"""

import os
import signal
import sys
import threading
import time
import traceback
from contextlib import contextmanager

import torch.distributed as dist

from files import one_line_errors

FAILED = "nano-rm-r1/failed"  # how many ranks have failed, in the store
_asked = threading.Event()


class Interrupted(Exception):
    """SIGTERM came while something was done that can be left."""


def asked_to_stop():
    """Has this process been sent SIGTERM?"""
    return _asked.is_set()


def leave_if_asked(*_):
    if asked_to_stop():
        raise Interrupted


@contextmanager
def together(until_saved=False):
    """For the whole of a script. until_saved: SIGTERM is only noted, see `asked_to_stop`; the script saves, and ends by
    itself."""
    if until_saved:
        signal.signal(signal.SIGTERM, lambda *_: _asked.set())
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        end_all(error)


def end_all(error):
    """Ends this process without waiting for anybody; the first one that fails says why, the others fail of it."""
    status = 1
    if dist.distributed_c10d._get_default_store().add(FAILED, 1) == 1:
        try:
            with one_line_errors():
                if isinstance(error, RuntimeError) and ("Connection closed" in str(error) or "gloo" in str(error)):
                    raise ValueError(f"rank {dist.get_rank()}: another rank is gone, killed perhaps (out of memory?); "
                                     "--resume goes on") from None
                raise error
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def watch():
    """Ends this process within seconds after another rank has failed, wherever its main thread waits. Returns what
    ends the watch: the interpreter must not end before it, or the thread's last look at the store aborts it."""
    store = dist.distributed_c10d._get_default_store().clone()  # of its own: the main thread's may be waiting
    over = threading.Event()

    def look():
        while not over.wait(1):
            try:
                failed = store.check([FAILED])
            except RuntimeError:  # the store has gone, and with it whoever kept it
                return
            if failed:
                time.sleep(1)  # whoever fails of the same mistake by itself shall do so
                os._exit(1)
    thread = threading.Thread(target=look, daemon=True)
    thread.start()

    def end():
        over.set()
        thread.join()
    return end
