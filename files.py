"""Files that are there whole or not at all, and mistakes in one line.

The one leaf that every script and data/ stand on; it imports nothing of ours, and not torch.
"""

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path


def fail(message):
    print("error:", " ".join(message.split()), file=sys.stderr)  # a quoted value may hold line breaks
    raise SystemExit(2)


@contextmanager
def one_line_errors():
    """Turns a user's mistake (ValueError, OSError) into one line and status 2. RM_TRACEBACK=1 shows its origin."""
    try:
        yield
    except (ValueError, OSError) as e:
        if os.environ.get("RM_TRACEBACK"):
            raise
        fail(str(e))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def whole(path):
    """A temporary path, for a file or a folder, that takes the name `path` when the block ends, and goes if it fails.

    So what has its own name is whole. A folder that is there already must be empty, or gone, by the end of the block.
    """
    temporary = Path(f"{path}.tmp")
    remove(temporary)  # of a process that was killed
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove(path):
    """Removes a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path, content):
    """Writes a text or bytes."""
    with whole(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_records(path, records):
    """Writes JSON lines, one record after the other."""
    with whole(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json_line(record))


def append(path, record):
    """Adds a JSON line to a file that grows while a run goes on."""
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json_line(record))


def json_line(record):
    return json.dumps(record, ensure_ascii=False) + "\n"


def refuse_existing(path):
    if Path(path).exists():
        raise ValueError(f"{path}: already there and whole; delete it or choose another --out")
