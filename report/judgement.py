"""What the page shows of one judgement: the parts of its text, the items of its rubric, its outcome."""

import re
from dataclasses import asdict

from data.rubric import rubric_items
from reward import END_OF_TURN, after_thinking, parse

OUTCOMES = ["right", "wrong", "none", "tie", "unlabelled"]      # the page counts on this order


def outcome(record):
    """Which of OUTCOMES a judgement record is. A tie is a verdict that the votes did not agree on."""
    verdicts = [vote["verdict"] for vote in record["votes"]]
    if not verdicts and "recorded" in record and record["recorded"] is not None:
        return "right" if record["recorded"] else "wrong"
    if record["winner"] is None:
        return "unlabelled"
    if record["verdict"] is None:
        return "tie" if any(verdicts) else "none"
    return "right" if record["verdict"] == record["winner"] else "wrong"


def parts(text):
    """What the page shows of a judgement's text: {"thinking", "type", "rubric": [(criterion, weight, description)] or
    text, "justify", "solution", "evaluation", "fault", "rest"}, without those that are missing. "fault" is what keeps
    a text that has a type from being well-formed. "rest" is all that is in no other part, so nothing written is lost:
    the whole text of a judge that writes no tags."""
    judged, rest = parse(text), after_thinking(text)
    thinking = text[:len(text) - len(rest)]
    if judged.evaluation is not None:
        start, end = rest.find("<eval>"), rest.rfind("</eval>")
        rest = rest[:start] + "\n" + rest[end + len("</eval>"):]
    for tag in ("type", "rubric", "solution"):
        if getattr(judged, tag) is not None:
            head, _, tail = rest.partition(f"<{tag}>")
            rest = head + tail.partition(f"</{tag}>")[2]
    for ending in END_OF_TURN + (f"<answer>[[{(judged.verdict or '-').upper()}]]</answer>",):
        rest = rest.rstrip().removesuffix(ending)
    thinking = re.sub(r"^\s*<think>|</think>\s*$", "", thinking).strip()
    found = {"thinking": thinking, **asdict(judged), "rest": rest.strip()}
    if judged.rubric:
        found["rubric"] = rubric_items(judged.rubric) or judged.rubric
    if not judged.type:
        found["fault"] = None     # no chain at all, and perhaps none was asked for
    return {key: value for key, value in found.items() if value and key != "verdict"}
