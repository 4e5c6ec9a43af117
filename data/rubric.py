"""The items of a rubric: criteria, with their weights where they have any."""

import re

# A head: m[1] blanks, then "1." or "2)" (m[2]) or a bullet (m[3]). Weights: "(weight: 40%)", "weight 0.4", "- 40%".
HEAD = re.compile(r"(\s*)[#*_ ]{0,8}?(?:(\d{1,2})[.)]|([-*\u2022]))(?:\*\*|__)?\s+(?=\S)")
WEIGHT = (re.compile(r"\s*[(\[]\s*(?:weight\w*\s*[:=]?\s*)?(\d{1,3}(?:\.\d{1,4})?\s*(?:%|points?|percent)?)"
                     r"(?:\s*weight\w*)?\s*[)\]]", re.I),
          re.compile(r"[\s,;:\u2013\u2014-]*\bweight\w*\s*[:=]?\s*(\d{1,3}(?:\.\d{1,4})?\s*%?)", re.I),
          re.compile(r"(?:\s*[:\u2013\u2014-])?\s+(\d{1,3}(?:\.\d{1,4})?\s*%)(?=\s*$|\s+[\u2013\u2014-]\s)"))


def rubric_items(text):
    """[(criterion, weight as written or None, description)] of a rubric, [] where it has no list to be found.

        1. Accuracy (40%): no errors     ->  ("Accuracy", "40%", "no errors")
        - **Tone** - warm [weight: 2]    ->  ("Tone", "2", "warm")
         Hey 1 river 2 Peace 4           ->  ("Hey", "1", ""), ("river", "2", ""), ("Peace", "4", "")     (data/toy.py)

    Lines that begin no item belong to the one before; text before the first is an item without a criterion.
    """
    words, weights = text.split()[::2], text.split()[1::2]
    one_line = "\n" not in text.strip() and len(words) == len(weights) > 0
    if one_line and all(weight.isdigit() and len(weight) < 4 for weight in weights):
        return [(word, weight, "") for word, weight in zip(words, weights)]
    text = re.sub(r"</?(?:rubric|list|ul|ol)>", "", re.sub(r"<(item|criterion|li)>", "\n- ", text))
    lines = re.sub(r"</(item|criterion|li)>", "\n", text).split("\n")
    heads = [HEAD.match(line) for line in lines]
    numbered = [m for m in heads if m and m[2]]
    of_kind = numbered or [m for m in heads if m]     # bullets below numbers are details
    indent = min((len(m[1]) for m in of_kind), default=0)
    items, n_starts = [], 0
    for line, m in zip(lines, heads):
        if of_kind:
            starts = m is not None and (m[2] is not None) == bool(numbered) and len(m[1]) <= indent
        else:
            starts = any(weight.search(line[:200]) for weight in WEIGHT)
        if starts:
            n_starts += 1
            items.append(list(_item(line[m.end():] if m else line)))
        elif line.strip():
            items = items or [["", None, ""]]
            items[-1][2] += ("\n" if items[-1][2] else "") + line.strip()
    return [tuple(item) for item in items] if n_starts else []


def _item(line):
    """The start of a criterion, cut into (criterion, weight or None, description)."""
    before, weight, after = line.strip(), None, ""
    name = re.split(r":(?!\s*\d)", before[:200])[0]
    for pattern, within in zip(WEIGHT, (before[:300], before[:300], name)):  # a bare share only in the name: "- 40%"
        if found := pattern.search(within):
            weight = " ".join(found[1].split())
            before, after = before[:found.start()], before[found.end():]
            break
    cut = re.search(r":(?=\s|$|\*\*)|\s[\u2013\u2014-](?=\s)", before)
    name, description = (before[:cut.start()], before[cut.end():]) if cut else (before, "")
    description = f"{description} {after}" if description.strip(" *") else after.lstrip("* :-\u2013\u2014")
    return name.strip("* :-\u2013\u2014"), weight, re.sub(r"^\s*\*\*\s", "", description).strip()
