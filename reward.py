"""What a judgement is: a pair goes into a prompt, a verdict and a reward come out of the text that answers it.

A prompt is a text file of sections, each introduced by a line of its own: [system] (optional), [user], and
[user multi-turn] (needed only for conversations). [user] must hold {question}, {answer_a} and {answer_b};
[user multi-turn] must hold {conversation_a} and {conversation_b}. Everything else is literal, other braces and
bracketed lines too; blank lines around a section are dropped.

A pair is single-turn if its prompt is one user message, after a system message or not, and each answer is one message.
Then the question is the user's text; with a system message it is both, as lines "System: ..." and "User: ...", since
the answers were written under that system message and cannot be judged without it. Every other pair is shown as two
whole conversations, as lines "User: ..." and "Chatbot A: ..." (or B) joined by one newline.

Texts are judged as they are decoded, WITHOUT control tokens: tokenizer.decode drops <|im_end|> and the like, which a
rollout's ids end with. In a text from elsewhere that has one, it counts among the 80 characters of training_verdict, as
it did in RM-R1's training.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

PROMPTS = Path(__file__).parent / "data" / "prompts"
PLACEHOLDERS = {"system": set(), "user": {"question", "answer_a", "answer_b"},
                "user multi-turn": {"conversation_a", "conversation_b"}}
PLACEHOLDER = re.compile(r"\{(question|answer_a|answer_b|conversation_a|conversation_b)\}")
VERDICT_CHARS = 80
QUOTATIONS = ("quote_A", "quote_B", "summary_A", "summary_B")
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<\uff5cend\u2581of\u2581sentence\uff5c>")   # Qwen, Qwen, DeepSeek


@dataclass(frozen=True)
class Prompt:
    name: str
    system: str | None
    user: str
    user_multi_turn: str | None


@dataclass(frozen=True)
class Judgement:
    type: str | None          # "Chat" or "Reasoning"
    rubric: str | None        # without its justification
    justify: str | None
    solution: str | None
    evaluation: str | None
    verdict: str | None       # "a" or "b", by training_verdict
    well_formed: bool         # a chain of rubrics, complete; never true without a verdict


# ---- pair to messages

def prompt_path(name_or_path):
    """Where a prompt is read from: data/prompts/NAME.txt for a bare name, else the path given."""
    bare = not Path(name_or_path).suffix and os.sep not in str(name_or_path)
    return PROMPTS / f"{name_or_path}.txt" if bare else Path(name_or_path)


def prompt_of(model, prompt):
    """The prompt given, or the one that the model in this folder was trained with, as load_prompt takes it, or None."""
    own = Path(model) / "prompt.txt"
    return prompt or (str(own) if own.exists() else None)


def prompt_to_keep(given, pairs, say):
    """The prompt with which a model that trained on these pairs is to be asked, as load_prompt takes it, or None.

    It is the one given, by which the pairs were shown. But ready-made pairs bring their messages: it must be one that
    could have made these, too; where all are ready-made, any of data/prompts may (but for "toy", which has so few words
    of its own that it could have made what others did).
    """
    ready_made = [pair for pair in pairs if pair.rendered is not None]
    names = [given] if given else []
    if len(ready_made) == len(pairs):
        names += sorted(path.stem for path in PROMPTS.glob("*.txt") if path.stem != "toy")
    for name in names:
        prompt = load_prompt(name)
        if all(could_show(prompt, pair.rendered) for pair in ready_made):
            return name
    if say:
        print(f"note: {len(ready_made)} of {len(pairs)} rows bring their own messages, which were not made by "
              f"{given or 'any prompt of data/prompts'}: no prompt.txt is saved with the model, and the other scripts "
              "will ask for --prompt")
    return None


def could_show(prompt, messages):
    """Are these the messages that render makes of some pair with this prompt?"""
    roles = ["user"] if prompt.system is None else ["system", "user"]
    if [m["role"] for m in messages] != roles or len(roles) == 2 and messages[0]["content"] != prompt.system:
        return False
    return any(fits(template, messages[-1]["content"]) for template in (prompt.user, prompt.user_multi_turn) if template)


def fits(template, text):
    """Can the template's placeholders be filled in such a way that it becomes the text?"""
    first, *between, last = PLACEHOLDER.split(template)[::2]  # the literal parts; every template has a placeholder
    if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
        return False
    rest = text[len(first):len(text) - len(last)]
    for literal in between:  # if they can be found in order at all, then each at its first place
        place = rest.find(literal)
        if place < 0:
            return False
        rest = rest[place + len(literal):]
    return True


def load_prompt(name_or_path):
    """The prompt data/prompts/NAME.txt for a bare name, else the user's own file; a fault is a one-line ValueError."""
    path = prompt_path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROMPTS.glob("*.txt")))
        raise ValueError(f"{path}: no such prompt file: give one of {known}, or the path of your own .txt file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start} is not UTF-8: convert the file") from None
    before, *parts = re.split(r"^\[(system|user|user multi-turn)\][ \t]*$", text, flags=re.MULTILINE)
    names, texts = parts[::2], [part.strip("\r\n") for part in parts[1::2]]
    sections = dict(zip(names, texts))
    faults = ["text before the first section"] if before.strip() else []
    faults += ["no section [user]"] if "user" not in sections else []
    faults += ["the same section twice"] if len(sections) < len(names) else []
    for name, body in sections.items():
        found, wanted = set(PLACEHOLDER.findall(body)), PLACEHOLDERS[name]
        faults += [f"section [{name}] lacks {{{x}}}" for x in sorted(wanted - found)]
        faults += [f"section [{name}] cannot have {{{x}}}" for x in sorted(found - wanted)]
        faults += [f"section [{name}] is empty"] if not body.strip() else []
    if faults:
        raise ValueError(f"{path}: {', '.join(faults)}: the top of reward.py tells the format")
    return Prompt(str(name_or_path), sections.get("system"), sections["user"], sections.get("user multi-turn"))


def render(prompt, pair):
    """The chat messages that show pair to the judge. A ready-made pair (pair.rendered) is returned as it is."""
    if pair.rendered is not None:
        return pair.rendered
    if prompt is None:
        raise ValueError(f"--prompt is missing: give instruct, reasoning, direct or a file of your own, which shows pairs "
                         f"such as {pair.id} to the model")
    answers = [[{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
               for answer in (pair.answer_a, pair.answer_b)]
    if [m["role"] for m in pair.prompt] in (["user"], ["system", "user"]) and len(answers[0]) == len(answers[1]) == 1:
        question = pair.prompt[0]["content"] if len(pair.prompt) == 1 else _dialogue(pair.prompt, "")
        template, (a, b) = prompt.user, [answer[0]["content"] for answer in answers]
        values = {"question": question, "answer_a": a, "answer_b": b}
    elif prompt.user_multi_turn is None:
        raise ValueError(f"prompt {prompt.name}: pair {pair.id} is a conversation: add a section [user multi-turn]")
    else:
        template = prompt.user_multi_turn
        values = {f"conversation_{side}": _dialogue(pair.prompt + answer, side) for side, answer in zip("ab", answers)}
    # One pass over the template only: an answer that spells a placeholder stays as it is.
    user = {"role": "user", "content": PLACEHOLDER.sub(lambda match: values[match[1]], template)}
    return [user] if prompt.system is None else [{"role": "system", "content": prompt.system}, user]


def _dialogue(messages, side):
    speaker = {"system": "System", "user": "User", "assistant": f"Chatbot {side.upper()}"}
    return "\n".join(f"{speaker[m['role']]}: {m['content']}" for m in messages)


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
    """The side with more votes, or None in a tie; a None among the verdicts is no vote."""
    verdicts = list(verdicts)
    n_a, n_b = verdicts.count("a"), verdicts.count("b")
    if n_a == n_b:
        return None
    return "a" if n_a > n_b else "b"


def parse(text):
    """The Judgement in a text; any string has one, and the time is linear in its length.

    Parts that are missing or not closed are None. A thinking model's leading <think>...</think> is skipped (its start
    tag is often in the prompt, so all before </think> is thinking, unless it starts as a chain). well_formed means:
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

    skeleton = _without_quotes(chain)
    middle, standard = ("solution", solution) if type_ == "Reasoning" else ("rubric", rubric)
    wanted = [f"<{slash}{tag}>" for tag in ("type", middle, "eval", "answer") for slash in ("", "/")]
    in_order = re.findall(r"</?(?:type|solution|rubric|eval|answer)>", skeleton) == wanted
    before, after = skeleton.partition("<type>")[0], skeleton.rpartition("</answer>")[2]
    for control in END_OF_TURN:
        after = after.replace(control, "")
    well_formed = bool(type_ and standard and evaluation and verdict and in_order and not (before + after).strip()
                       and f"<answer>[[{verdict.upper()}]]</answer>" in skeleton)
    return Judgement(type_, rubric, justify, solution, evaluation, verdict, well_formed)


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
