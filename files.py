"""Files that are there whole or not at all, and mistakes in one line.

The one leaf that every script and data/ stand on; it imports nothing of ours, and not torch.
"""

import argparse
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path


def fail(message):
    print("error:", " ".join(message.split()), file=sys.stderr)  # a quoted value may hold line breaks
    raise SystemExit(2)


def argument_parser(description):
    """An argparse parser whose mistakes are one line, and whose options cannot be abbreviated."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{Path(sys.argv[0]).name}: {message} (--help lists the options)")
    return parser


@contextmanager
def one_line_errors():
    """Turns a user's mistake (ValueError, OSError) into one line and status 2. RM_TRACEBACK=1 shows its origin."""
    try:
        yield
    except (ValueError, OSError) as e:
        if os.environ.get("RM_TRACEBACK"):
            raise
        system = isinstance(e, OSError) and e.filename and e.strerror
        fail(f"{e.filename}: {e.strerror}" if system else str(e))
    except KeyboardInterrupt as e:
        print(f"interrupted: {e}" if str(e) else "interrupted", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def whole(path):
    """A temporary path, for a file or a folder, that takes the name `path` when the block ends, and goes if it fails.

    So what has its own name is whole. A folder that is there already must be empty, or gone, by the end of the block.
    One process at a time may write a name.
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


class NotJson(ValueError):
    """Bytes that are not JSON: they break on `line`, from 1, and `fault` says how."""

    def __init__(self, line, fault):
        super().__init__(f"line {line}: {fault}")
        self.line, self.fault = line, fault


def parse_json(data):
    """The value of JSON bytes. NotJson has the same line and the same words under every version of Python."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = 1 + e.object.count(b"\n", 0, e.start)
        number = e.start - e.object.rfind(b"\n", 0, e.start)  # from 1
        byte = f"byte {number} of the line, 0x{e.object[e.start]:02x}"
        raise NotJson(line, f"{byte}, is not UTF-8 (convert a file in another encoding)") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        position, words = e.pos, e.msg
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        raise NotJson(1, "JSON nested too deeply, or a number too long") from None
    if words.startswith("Illegal trailing comma"):
        # "[1,\n]": Python names the comma since 3.13; before, and here, what is wrong is the bracket behind it.
        position = re.compile(r",[ \t\r\n]*").match(text, position).end()
        words = "Expecting value" if text[position] == "]" else "Expecting property name enclosed in double quotes"
    line = 1 + text.count("\n", 0, position)
    column = position - text.rfind("\n", 0, position)
    raise NotJson(line, f"malformed JSON, {words} at column {column}")


def check_settings(file, text, settings):
    """ValueError if the JSON text of a file's settings is of others than these."""
    try:
        before = dict(json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"{file}: does not begin with a judging run's settings; choose another --out") from None
    for name in settings | before:
        if settings.get(name) != before.get(name):
            raise ValueError(f"{file}: was begun with {name}={before.get(name)!r}, not {settings.get(name)!r}; go on "
                             "with the same settings, or choose another --out")


def refuse_existing(path):
    """Before a file is written: nothing that is there already is overwritten, and its folder can be one."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a folder; --out is the file to write")
    if Path(path).exists():
        raise ValueError(f"{path}: is already there; choose another --out")
    refuse_file(Path(path).absolute().parent)


def refuse_existing_folder(path):
    """Before a folder is written that must be new."""
    refuse_file(path)
    if Path(path).exists():
        raise ValueError(f"{path}: is already there; choose another --out")


def refuse_file(path):
    """Before a folder is written: neither its name nor the folders above it may be a file's."""
    for place in (Path(path), *Path(path).parents):
        if (place.exists() or place.is_symlink()) and not place.is_dir():
            raise ValueError(f"{place}: is {'a file' if place.exists() else 'a link to nothing'}, where --out needs a "
                             "folder; choose another")
    refuse_closed(path)


def refuse_closed(path):
    """Before hours of work: where nothing can be written, nothing is begun."""
    nearest = next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{nearest}: cannot be written to (read-only, or another user's); choose another --out")
