"""What a judgement is worth: its verdict, its reward, its parts. (How a pair is shown to the judge: prompt.py.)

Texts are judged as they are decoded, WITHOUT control tokens: tokenizer.decode drops <|im_end|> and the like, which a
rollout's ids end with. In a text from elsewhere that has one, it counts among the 80 characters of training_verdict, as
it did in RM-R1's training.
"""

import re
from dataclasses import dataclass

VERDICT_CHARS = 80
QUOTATIONS = ("quote_A", "quote_B", "summary_A", "summary_B")
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")   # Qwen, Qwen, DeepSeek


@dataclass(frozen=True)
class Judgement:
    type: str | None          # "Chat" or "Reasoning"
    rubric: str | None        # without its justification
    justify: str | None
    solution: str | None
    evaluation: str | None
    verdict: str | None       # "a" or "b", by training_verdict
    fault: str | None         # the first that keeps it from being a whole chain of rubrics; never None without verdict

    @property
    def well_formed(self):
        return self.fault is None


# ---- text to verdict

def training_verdict(text):
    """"a", "b" or None: whose full <answer>[[X]]</answer> stands in the last 80 characters, if only one side's does.

    This is the rule the reward is paid by, as in RM-R1's training code. It looks at the end only, so a judge may quote
    or weigh a label while it thinks; an output that does so earns +1 here and an error by benchmark_verdict, so neither
    rule can stand in for the other. A text that the token limit cuts off just behind a quoted verdict does get that
    verdict: `reward` pays nothing for it.
    """
    end = text[-VERDICT_CHARS:]
    return _only("<answer>[[A]]</answer>" in end, "<answer>[[B]]</answer>" in end)


def benchmark_verdict(text):
    """"a", "b" or None: which of [[A]] and [[B]] stands anywhere in the text, thinking included, if only one does.

    This is the rule of RM-R1's evaluation code, by which the published scores were counted (None scores 0 there). It
    needs no answer tags, so it reads judges of another format too, but one mention of the other label spoils an
    otherwise clear verdict.
    """
    return _only("[[A]]" in text, "[[B]]" in text)


def _only(a, b):
    """The side that is true, if only one is."""
    if a == b:
        return None
    return "a" if a else "b"


def reward(text, winner, finished=True):
    """+1.0 if the training verdict is the winner, else -1.0: no verdict costs as much as a wrong one.

    A judgement that was cut off (`finished` is false) earns -1.0 whatever its last characters spell. A verdict that
    stands in the last 80 characters only because it is quoted from an answer (_is_quoted) earns -1.0 too. RM-R1's code
    would pay for that one; none of its recorded judgements at hand is paid differently by the two rules.
    """
    assert winner in ("a", "b"), f"winner is {winner!r}, need 'a' or 'b'"
    quoted = _is_quoted(text, f"<answer>[[{winner.upper()}]]</answer>")
    return 1.0 if finished and not quoted and training_verdict(text) == winner else -1.0


def _is_quoted(text, answer):
    """Does the last `answer` in the text stand inside a quotation or summary: one not closed before it, or closed after
    it? (One that opens after it and closes is taken for this too: a judgement should end with its verdict.)"""
    before, _, after = text.rpartition(answer)
    opened = [tag for tag in QUOTATIONS if f"<{tag}>" in before]
    return any(before.rfind(f"<{tag}>") > before.rfind(f"</{tag}>") or f"</{tag}>" in after for tag in opened)


def majority(verdicts):
    """The verdict that most votes have, or None in a tie; a None among the verdicts is no vote."""
    verdicts = [verdict for verdict in verdicts if verdict]
    n_of = {verdict: verdicts.count(verdict) for verdict in verdicts}
    most = [verdict for verdict, n in n_of.items() if n == max(n_of.values())]
    return most[0] if len(most) == 1 else None


def parse(text):
    """The Judgement in a text; any string has one, and the time is linear in its length.

    Parts that are missing or not closed are None. A thinking model's leading <think>...</think> is skipped (its start
    tag is often in the prompt, so all before </think> is thinking, unless it starts as a chain). Well-formed means:
    first the type; then, once each and in this order, a solution (Reasoning) or a rubric (Chat), an evaluation, the
    answer, none empty; then nothing but white space or end-of-turn text. Tags inside quotations and summaries belong to
    the judged answers and do not count. A bare verdict, all that the prompts "reasoning" and "direct" ask for, is not
    well-formed: it is no chain.
    """
    verdict, chain = training_verdict(text), after_thinking(text)
    type_, rubric, solution = _inside(chain, "type"), _inside(chain, "rubric"), _inside(chain, "solution")
    type_ = type_ if type_ in ("Chat", "Reasoning") else None
    justify = _inside(rubric or "", "justify")
    if justify is not None:
        head, _, rest = rubric.partition("<justify>")
        rubric = (head + rest.partition("</justify>")[2]).strip()
    start, end = chain.find("<eval>"), chain.rfind("</eval>")    # the last one: a quotation may hold another
    evaluation = chain[start + len("<eval>"):end].strip() if 0 <= start < end else None

    fault = _fault(_without_quotes(chain), type_, solution if type_ == "Reasoning" else rubric, evaluation, verdict)
    return Judgement(type_, rubric, justify, solution, evaluation, verdict, fault)


def _fault(skeleton, type_, standard, evaluation, verdict):
    """What first keeps a chain from being well-formed, or None. skeleton: the chain without its quotations; standard:
    the solution or the rubric that it judges by."""
    middle = "solution" if type_ == "Reasoning" else "rubric"
    wanted = [f"<{slash}{tag}>" for tag in ("type", middle, "eval", "answer") for slash in ("", "/")]
    before, after = skeleton.partition("<type>")[0], skeleton.rpartition("</answer>")[2]
    for control in END_OF_TURN:
        after = after.replace(control, "")
    if not type_:
        return "no type"
    if not standard:
        return f"no {middle}"
    if not evaluation:
        return "no evaluation"
    if not verdict:
        return "no verdict at the end"
    if f"<answer>[[{verdict.upper()}]]</answer>" not in skeleton:
        return "its verdict is only quoted"
    if re.findall(r"</?(?:type|solution|rubric|eval|answer)>", skeleton) != wanted:
        return "a tag too many, too few or misplaced"
    if before.strip():
        return "text before the type"
    return "text after the answer" if after.strip() else None


def after_thinking(text):
    thinking, closed, rest = text.partition("</think>")
    if closed and not thinking.lstrip().startswith("<type>"):
        return rest
    return "" if text.lstrip().startswith("<think>") else text


def _inside(text, tag):
    """The text between the first <tag> and the next </tag>, or None."""
    _, opened, rest = text.partition(f"<{tag}>")
    inside, closed, _ = rest.partition(f"</{tag}>")
    return inside.strip() if opened and closed else None


def _without_quotes(text):
    """The text without its closed quotations and summaries. Splitting is linear; a lazy regular expression would rescan
    the whole rest of the text for every tag that is never closed."""
    for tag in QUOTATIONS:
        head, *pieces = text.split(f"<{tag}>")
        text = head + "".join(piece.split(f"</{tag}>", 1)[-1] for piece in pieces)
    return text
