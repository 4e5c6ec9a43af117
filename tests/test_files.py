"""files.py: what is written whole, what a failure or a killed process leaves behind, and broken JSON, whose line and
words must be the same under every Python. Oracles: positions counted by hand; what then lies in the folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from files import NotJson, parse_json, whole, write_records, write_whole  # noqa: E402

VALUE, NAME = "Expecting value", "Expecting property name enclosed in double quotes"


# ---- broken JSON

@pytest.mark.parametrize("text, line, column, words", [
    ("", 1, 1, VALUE), (" \n", 2, 1, VALUE), ("nul", 1, 1, VALUE), ("-", 1, 1, VALUE), ("[", 1, 2, VALUE),
    ("{", 1, 2, NAME), ("{a: 1}", 1, 2, NAME), ("{1: 1}", 1, 2, NAME), ('{"a":}', 1, 6, VALUE),
    ('{"a" 1}', 1, 6, "Expecting ':' delimiter"), ('{"a": 1 "b"}', 1, 9, "Expecting ',' delimiter"),
    ("[1 2]", 1, 4, "Expecting ',' delimiter"), ("[1,\n 2\n 3]", 3, 2, "Expecting ',' delimiter"),
    ("7 8", 1, 3, "Extra data"), ("[1]\n\n[2]", 3, 1, "Extra data"), ("01", 1, 2, "Extra data"),
    ('["ab', 1, 2, "Unterminated string starting at"), ('"a\nb"', 1, 3, "Invalid control character at"),
    ('"\\x"', 1, 2, "Invalid \\escape"), ('"\\u12"', 1, 3, "Invalid \\uXXXX escape"),
    # commas that no value follows: where Python 3.13 began to name the comma, and where it did not
    ("[1,]", 1, 4, VALUE), ("[\n1,\n]\n", 3, 1, VALUE), ("[1\n,\n\n  ]", 4, 3, VALUE), ("[[1,\t]]", 1, 6, VALUE),
    ('{"a": 1,}', 1, 9, NAME), ('{"a": 1,\n\n}', 3, 1, NAME), ('{"a": [1, {"b": 2 , }]}', 1, 21, NAME),
    ("[,]", 1, 2, VALUE), ("[1,,]", 1, 4, VALUE), ("{,}", 1, 2, NAME), ("[1,}", 1, 4, VALUE), ('{"a":,}', 1, 6, VALUE),
    ('{"a": 1,]', 1, 9, NAME), ("[1,", 1, 4, VALUE), ('[",]",]', 1, 7, VALUE),
])
def test_broken_json_is_named_by_line_and_column(text, line, column, words):
    """Oracle: counted by hand; the words are Python 3.11's."""
    for data in (text.encode(), b"\xef\xbb\xbf" + text.encode()):  # also as Windows' editors begin a file
        with pytest.raises(NotJson) as e:
            parse_json(data)
        assert (e.value.line, e.value.fault) == (line, f"malformed JSON, {words} at column {column}")
        assert str(e.value) == f"line {line}: {e.value.fault}"


@pytest.mark.parametrize("data, line, fault", [
    (b"[1,\n\"ab\xff\"]", 2, "byte 4 of the line, 0xff, is not UTF-8"), (b"\xe4", 1, "byte 1 of the line, 0xe4"),
    (b"\xef\xbb\xbf[\n\xff]", 2, "byte 1 of the line, 0xff"), ("[1]".encode("utf-16"), 1, "byte 1 of the line, 0xff"),
    (b"[" * 100_000, 1, "nested too deeply"), (b"9" * 5000, 1, "a number too long"),
])
def test_what_is_no_text_or_too_much(data, line, fault):
    with pytest.raises(NotJson) as e:
        parse_json(data)
    assert e.value.line == line and fault in e.value.fault


def test_good_json_is_what_the_library_reads():
    for value in (None, [], {}, "é\u2028", [1, {"a": [1.5, -2, True]}], 10 ** 400):
        for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
            assert parse_json(text.encode()) == parse_json(text.encode("utf-8-sig")) == value


# ---- whole files

def make_file(path, text):
    path.write_text(text)


def make_folder(path, text):
    (path / "deep").mkdir(parents=True)
    (path / "deep/x").write_text(text)


def content(folder):
    """{path: text} of all that is in a folder, with None for an empty folder."""
    return {p.relative_to(folder).as_posix(): p.read_text() if p.is_file() else None for p in folder.rglob("*")
            if p.is_file() or not list(p.iterdir())}


@pytest.mark.parametrize("make, inside", [(make_file, ""), (make_folder, "/deep/x")])
def test_a_file_or_a_folder_has_its_name_when_it_is_whole(tmp_path, make, inside):
    with whole(tmp_path / "x") as temporary:
        make(temporary, "new")
        assert temporary.parent == tmp_path and not (tmp_path / "x").exists()
    assert content(tmp_path) == {f"x{inside}": "new"}


@pytest.mark.parametrize("make, inside", [(make_file, ""), (make_folder, "/deep/x")])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_and_nothing_else(tmp_path, make, inside, error):
    make(tmp_path / "x", "old")
    with pytest.raises(error), whole(tmp_path / "x") as temporary:
        make(temporary, "half")
        raise error
    assert content(tmp_path) == {f"x{inside}": "old"}
    with pytest.raises(error), whole(tmp_path / "y"):
        raise error  # before anything was written
    assert content(tmp_path) == {f"x{inside}": "old"}


def test_a_file_is_replaced_and_a_full_folder_is_not(tmp_path):
    """A folder must be made room for by the caller, in the block, when the new one is there."""
    write_whole(tmp_path / "file", "old")
    write_whole(tmp_path / "file", b"new\r\n")
    assert (tmp_path / "file").read_bytes() == b"new\r\n"
    make_folder(tmp_path / "folder", "old")
    with pytest.raises(OSError), whole(tmp_path / "folder") as temporary:
        make_folder(temporary, "new")
    assert content(tmp_path) == {"file": "new\n", "folder/deep/x": "old"}


def test_records_that_cannot_be_written_leave_the_old(tmp_path):
    path = tmp_path / "x.jsonl"
    write_records(path, [{"a": "é\u2028"}, {"b": 1}])
    assert path.read_bytes() == '{"a": "é\u2028"}\n{"b": 1}\n'.encode()

    def records():
        yield {"a": 2}
        raise ValueError("the third is bad")
    for bad, error in ((records(), ValueError), ([{}, {"a": b""}], TypeError), ([{"a": "\ud800"}], UnicodeEncodeError)):
        with pytest.raises(error):
            write_records(path, bad)
    assert content(tmp_path) == {"x.jsonl": '{"a": "é\u2028"}\n{"b": 1}\n'}


KILLED = """
import sys, time
from files import whole
with whole(sys.argv[1]) as temporary:
    if sys.argv[2] == "folder":
        temporary.mkdir()
        (temporary / "x").write_text("half")
    else:
        temporary.write_text("half")
    print(flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("before", ["file", "folder"])
@pytest.mark.parametrize("make, inside", [(make_file, ""), (make_folder, "/deep/x")])
def test_what_a_killed_process_left_goes_when_the_name_is_written_again(tmp_path, make, inside, before):
    path = tmp_path / "x"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path), before], cwd=ROOT, stdout=subprocess.PIPE)
    child.stdout.readline()
    child.kill()
    child.communicate()
    left, = tmp_path.iterdir()
    assert left.name == "x.tmp"
    with whole(path) as temporary:
        make(temporary, "new")
    assert content(tmp_path) == {f"x{inside}": "new"}


def test_names_that_look_alike_do_not_meet(tmp_path):
    """One file after the other is begun, and they end in the other order."""
    paths = [tmp_path / name for name in ("step-1", "step-10", "step-1.json", "step-1.partial")]
    with whole(paths[0]) as a, whole(paths[1]) as b, whole(paths[2]) as c, whole(paths[3]) as d:
        for temporary, path in zip((a, b, c, d), paths):
            temporary.write_text(path.name)
    assert content(tmp_path) == {path.name: path.name for path in paths}
