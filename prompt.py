"""How a pair is shown to the judge: prompt files, and the chat messages that a pair makes with one.

A prompt is a text file of sections, each introduced by a line of its own: [system] (optional), [user],
[user multi-turn] (needed only for conversations), and [rubric] (needed only for pairs that bring a rubric of the
user's own). [user] must hold {question}, {answer_a} and {answer_b}; [user multi-turn] must hold {conversation_a} and
{conversation_b}; [rubric] must hold {rubric}. Everything else is literal, other braces and bracketed lines too; blank
lines around a section are dropped.

Two more sections, for RewardBench 2, are shown alone, without [system], which speaks of pairs: [four answers] must
hold {question} and {answer_a} to {answer_d}, [rating] must hold {question} and {answer}.

A file whose first line is [exact] keeps every section to the byte: all between its header line and the line break
before the next header (or at the end of the file), blank lines too. In such a file a line that begins with a backslash
loses it, so that a text can hold the line [user]. prompt_file writes files of this kind.

A pair is single-turn if its prompt is one user message, after a system message or not, and each answer is one message.
Then the question is the user's text; with a system message it is both, as lines "System: ..." and "User: ...", since
the answers were written under that system message and cannot be judged without it. Every other pair is shown as two
whole conversations, as lines "User: ..." and "Chatbot A: ..." (or B) joined by one newline. Below either kind of user
message, after a blank line, a pair with a rubric has the section [rubric]; a pair without one shows nothing of it.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

PROMPTS = Path(__file__).parent / "data" / "prompts"
PLACEHOLDERS = {"system": set(), "user": {"question", "answer_a", "answer_b"},
                "user multi-turn": {"conversation_a", "conversation_b"}, "rubric": {"rubric"},
                "four answers": {"question", "answer_a", "answer_b", "answer_c", "answer_d"},
                "rating": {"question", "answer"}}
PLACEHOLDER = re.compile(r"\{(question|answer_a|answer_b|conversation_a|conversation_b|rubric)\}")
NO_PAIR = {name: re.compile(r"\{(%s)\}" % "|".join(PLACEHOLDERS[name])) for name in ("four answers", "rating")}
HEADER = r"^\[(system|user|user multi-turn|rubric|four answers|rating)\][ \t]*$"
EXACT = "[exact]\n"    # no older file begins so: text before the first section was refused


@dataclass(frozen=True)
class Prompt:
    name: str
    system: str | None
    user: str
    user_multi_turn: str | None
    rubric: str | None = None
    four_answers: str | None = None
    rating: str | None = None


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
            if say and given and name != given:
                print(f"note: the rows bring their own messages, made by the prompt {name}, not by {given}: {name} is "
                      "saved with the model")
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
    templates = [template for template in (prompt.user, prompt.user_multi_turn) if template]
    if prompt.rubric:
        templates += [below(template, prompt.rubric) for template in templates]
    return any(fits(template, messages[-1]["content"]) for template in templates)


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
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start} is not UTF-8: convert the file") from None
    exact = text.startswith(EXACT)
    text = text.removeprefix(EXACT) if exact else text.replace("\r\n", "\n").replace("\r", "\n")
    before, *parts = re.split(HEADER, text, flags=re.MULTILINE)
    names, texts = parts[::2], [_exact(part) if exact else part.strip("\n") for part in parts[1::2]]
    sections = dict(zip(names, texts))
    faults = ["text before the first section"] if before.strip() else []
    faults += ["no section [user]"] if "user" not in sections else []
    faults += ["the same section twice"] if len(sections) < len(names) else []
    for name, body in sections.items():
        placeholder = NO_PAIR[name] if name in NO_PAIR else PLACEHOLDER
        found, wanted = set(placeholder.findall(body)), PLACEHOLDERS[name]
        faults += [f"section [{name}] lacks {{{x}}}" for x in sorted(wanted - found)]
        faults += [f"section [{name}] cannot have {{{x}}}" for x in sorted(found - wanted)]
        faults += [f"section [{name}] is empty"] if not body.strip() else []
    if faults:
        raise ValueError(f"{path}: {', '.join(faults)}: the top of prompt.py tells the format")
    return Prompt(str(name_or_path), sections.get("system"), sections["user"], sections.get("user multi-turn"),
                  sections.get("rubric"), sections.get("four answers"), sections.get("rating"))


def _exact(part):
    """A section's text in a file that keeps it to the byte; `part` goes from the end of its header to the next."""
    return re.sub(r"^\\", "", part.removeprefix("\n").removesuffix("\n"), flags=re.MULTILINE)


def prompt_file(prompt):
    """The text of a file that holds a prompt: what load_prompt reads from it is equal to the byte."""
    text = EXACT
    sections = {"system": prompt.system, "user": prompt.user, "user multi-turn": prompt.user_multi_turn,
                "rubric": prompt.rubric, "four answers": prompt.four_answers, "rating": prompt.rating}
    for name, body in sections.items():
        if body is not None:
            escaped = re.sub(rf"(?=^\\|{HEADER})", r"\\", body, flags=re.MULTILINE)
            text += f"[{name}]\n{escaped}\n"
    return text


def render(prompt, pair):
    """The chat messages that show pair to the judge. A ready-made pair (pair.rendered) is returned as it is."""
    if pair.rendered is not None:
        return pair.rendered
    if prompt is None:
        raise ValueError("--prompt is missing: give instruct, reasoning, direct or a file of your own, which shows "
                         f"pairs such as {pair.id} to the model")
    lacking = missing_section(prompt, pair)
    if lacking:
        why = "has a rubric" if lacking == "rubric" else "is a conversation"
        raise ValueError(f"prompt {prompt.name} has no section [{lacking}], and pair {pair.id} {why}: add the section; "
                         "the top of prompt.py tells the format")
    answers = [[{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
               for answer in (pair.answer_a, pair.answer_b)]
    if is_single_turn(pair):
        question = pair.prompt[0]["content"] if len(pair.prompt) == 1 else _dialogue(pair.prompt, "")
        template, (a, b) = prompt.user, [answer[0]["content"] for answer in answers]
        values = {"question": question, "answer_a": a, "answer_b": b}
    else:
        template = prompt.user_multi_turn
        values = {f"conversation_{side}": _dialogue(pair.prompt + answer, side) for side, answer in zip("ab", answers)}
    if pair.rubric:
        template, values = below(template, prompt.rubric), values | {"rubric": pair.rubric}
    # One pass over the template only: an answer that spells a placeholder stays as it is.
    user = {"role": "user", "content": PLACEHOLDER.sub(lambda match: values[match[1]], template)}
    return [user] if prompt.system is None else [{"role": "system", "content": prompt.system}, user]


def below(template, rubric):
    """The template of a user message with the section [rubric] under it."""
    return f"{template}\n\n{rubric}"


def missing_section(prompt, pair):
    """The section that the prompt lacks to show this pair (not a ready-made one), or None."""
    if prompt.user_multi_turn is None and not is_single_turn(pair):
        return "user multi-turn"
    return "rubric" if pair.rubric and prompt.rubric is None else None


def render_answers(prompt, section, question, answers):
    """The chat messages of the section [four answers], which asks which of them is best, or [rating], of one answer."""
    template = {"four answers": prompt.four_answers, "rating": prompt.rating}[section]
    if template is None:
        raise ValueError(f"prompt {prompt.name} has no section [{section}]: add it, the top of prompt.py tells the "
                         "format, or give --prompt instruct")
    names = ("answer_a", "answer_b", "answer_c", "answer_d") if section == "four answers" else ("answer",)
    values = {"question": question} | dict(zip(names, answers))
    return [{"role": "user", "content": NO_PAIR[section].sub(lambda match: values[match[1]], template)}]


def is_single_turn(pair):
    """Is this pair (not a ready-made one) shown as a question and two answers, or as two conversations?"""
    one_message = all(isinstance(answer, str) or len(answer) == 1 for answer in (pair.answer_a, pair.answer_b))
    return one_message and [m["role"] for m in pair.prompt] in (["user"], ["system", "user"])


def _dialogue(messages, side):
    speaker = {"system": "System", "user": "User", "assistant": f"Chatbot {side.upper()}"}
    return "\n".join(f"{speaker[m['role']]}: {m['content']}" for m in messages)
