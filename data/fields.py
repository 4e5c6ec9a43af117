"""The fields of a record that somebody else wrote: each is checked where it is taken, and what is wrong is said."""

import json
import re
from contextlib import contextmanager

SIDES = ("a", "b", None)  # labels and verdicts
LETTERS = (*SIDES, "c", "d")  # the same of four answers
KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list",
         dict: "an object", type(None): "null"}


class Bad(ValueError):
    """What is wrong with one record, without its place."""


@contextmanager
def at(place):
    """Puts the record's place, "file:line", before what is Bad in the block."""
    try:
        yield
    except Bad as bad:
        raise ValueError(f"{place}: {bad}") from None


def need(record, key, *kinds, of=()):
    """record[key], which must be of one of these kinds; with `of`, a list whose elements are of one of those."""
    if key not in record:
        raise Bad(f'no "{key}" (found {keys_of(record)}): add it')
    value = record[key]
    if not is_of(value, kinds):
        raise Bad(f'"{key}" is {kind_of(value)}: it must be {_names(kinds)}')
    for element in value if of else ():
        if not is_of(element, of):
            raise Bad(f'"{key}" holds {kind_of(element)}: it may only hold {_names(of)}')
    return value


def need_keys(record, *keys):
    """All of these at once, so that a record that lacks three is mended once."""
    missing = [key for key in keys if key not in record]
    if missing:
        them = "them" if len(missing) > 1 else "it"
        raise Bad(f'no {", ".join(map(show, missing))} (found {keys_of(record)}): add {them}')


def need_text(record, key):
    return clean(need(record, key, str), key)


def text_or(record, key, default):
    """The text at key, or `default` where there is none."""
    return default if key not in record or record[key] is None else need_text(record, key)


def need_side(record, key, sides=SIDES):
    """A label or a verdict: "a", "b" or None; with LETTERS also "c" or "d"."""
    value = need(record, key, str, type(None))
    if value not in sides:
        letters = ", ".join(show(side) for side in sides if side)
        raise Bad(f'"{key}" is {show(value)}: write {letters} or null')
    return value


def count_or_none(record, key):
    """A count or a time in seconds; None where it was not taken."""
    value = record[key] if key in record else None
    if value is not None and not (is_of(value, (int, float)) and 0 <= value < 1e12):  # false for NaN too
        raise Bad(f'"{key}" is {str(value)[:40]!r}: it must be a number or null')
    return value


def need_object(value):
    if not isinstance(value, dict):
        raise Bad(f"a JSON object must stand here, not {kind_of(value)}: repair or remove the record")
    return value


def clean(text, name):
    """The text, if it is one: half a surrogate pair, as a lone "\\ud83d" escape gives, is nothing a tokenizer takes."""
    if re.search("[\ud800-\udfff]", text):
        raise Bad(f'"{name}" holds a lone surrogate, which is not text: repair or remove the record')
    return text


def is_of(value, kinds):
    """isinstance, but true and false are no numbers."""
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def kind_of(value):
    return KINDS[type(value)]


def _names(kinds):
    return " or ".join(KINDS[kind] for kind in kinds)


def keys_of(record):
    return ", ".join(show(key) for key in list(record)[:20]) or "none"


def show(text):
    """The start of a text on one line, whatever it holds."""
    return json.dumps(text[:60])
