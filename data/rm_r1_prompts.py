"""RM-R1's own prompts, with which its released models were evaluated, as prompt files of ours.

They stand as constants in a file of Python, eval/reward-bench/rewardbench/generative.py of RM-R1-UIUC/RM-R1. The file
is parsed and never run: a constant is a string, adjacent strings, or a sum (+) of such and of constants set before it;
anything else is refused. Its user prompts are texts for str.format ("{{" is a brace, {question} a field), its system
prompt is used as it stands. What prompt.render makes of the files written here is what those runs rendered, to the
byte: the instruct models are asked with the system prompt, the reasoning models with none.
"""

import ast
import string
import warnings
from pathlib import Path

from data.fields import at, clean
from files import whole
from prompt import PLACEHOLDER, Prompt, prompt_file

SYSTEM, SYSTEM_CHARS = "RM_R1_INSTRUCT_SYSTEM_PROMPT", 2871   # its length in the revision that data/fetch.py names
FIELDS = {"SINGLE": {"question": "question", "answer_a": "answer_a", "answer_b": "answer_b"},
          "MULTI": {"conversation_1": "conversation_a", "conversation_2": "conversation_b"}}       # theirs: ours
REFUSED = {ast.JoinedStr: "an f-string", ast.Call: "a call", ast.BinOp: "an operator that is not +",
           ast.Name: "a name that no line above sets"}


def write_prompts(file, out):
    """Writes rm-r1-instruct.txt and rm-r1-reasoning.txt into the folder `out`; returns their paths."""
    names = {(turn, kind): f"RM_R1_{turn}_TURN_{kind}_USER_PROMPT"
             for turn in FIELDS for kind in ("INSTRUCT", "REASONING")}
    texts = read_constants(file, [SYSTEM, *names.values()])
    users = {key: template(f"{file}: {name}", texts[name], FIELDS[key[0]]) for key, name in names.items()}
    system = texts[SYSTEM]
    if not system.strip() or PLACEHOLDER.search(system):
        raise ValueError(f"{file}: {SYSTEM} is blank or has a field such as {{question}}: that is no system prompt")
    if len(system) != SYSTEM_CHARS:
        print(f"note: {file}: {SYSTEM} has {len(system)} characters, not {SYSTEM_CHARS}: it is of another revision "
              "than the published scores")
    prompts = [Prompt("rm-r1-instruct", system, users["SINGLE", "INSTRUCT"], users["MULTI", "INSTRUCT"]),
               Prompt("rm-r1-reasoning", None, users["SINGLE", "REASONING"], users["MULTI", "REASONING"])]
    Path(out).mkdir(parents=True, exist_ok=True)
    paths = [Path(out, f"{prompt.name}.txt") for prompt in prompts]
    for path, prompt in zip(paths, prompts):
        with whole(path) as temporary:
            temporary.write_bytes(prompt_file(prompt).encode())
    return paths


def read_constants(file, names):
    """{name: text} of string constants in a file of Python; ValueError names what is missing or made otherwise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # of escape sequences that Python does not know
            tree = ast.parse(Path(file).read_bytes())
    except SyntaxError as e:
        raise ValueError(f"{file}:{e.lineno or 1}: not Python ({e.msg}): give RM-R1's generative.py") from None
    except (ValueError, RecursionError, MemoryError):      # a null byte; nested too deeply
        raise ValueError(f"{file}: not Python that can be parsed: give RM-R1's generative.py") from None
    lines, values = {}, {}     # of a name: the lines that set it, at any depth; what is assigned to it at the top level
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            lines.setdefault(node.id, []).append(node.lineno)
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            values |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
    if missing := [name for name in names if name not in lines]:
        raise ValueError(f"{file}: no {', '.join(missing)}: give RM-R1's generative.py, of the revision that "
                         "data/fetch.py names")

    def text_of(name):
        if len(lines[name]) > 1 or name not in values:
            raise ValueError(f"{file}:{lines[name][-1]}: {name} is not set once, by {name} = ... at the top level: "
                             "only such constants are read")
        return sum_of(name, values[name])

    def sum_of(name, node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return sum_of(name, node.left) + sum_of(name, node.right)
        if isinstance(node, ast.Name) and node.id in lines and lines[node.id][0] < node.lineno:
            return text_of(node.id)
        what = REFUSED.get(type(node), f"what is no string ({type(node).__name__})")
        raise ValueError(f"{file}:{node.lineno}: {name} is made with {what}: only strings, + and names of strings set "
                         "before are read, nothing is run")

    try:
        with at(file):
            return {name: clean(text_of(name), name) for name in names}
    except RecursionError:
        raise ValueError(f"{file}: a sum of too many strings to be read") from None


def template(place, text, fields):
    """A text for str.format with these fields as a text with our placeholders: {{ and }} become braces."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as e:
        raise ValueError(f"{place} is no text for str.format ({e})") from None
    made, found = "", []
    for literal, field, form, conversion in parts:
        made += literal
        if field is None:
            continue
        if field not in fields or form or conversion:
            raise ValueError(f"{place} has the field {{{field[:40]}}}, or a format beside it: known are "
                             f"{', '.join(fields)}")
        made += f"{{{fields[field]}}}"
        found.append(fields[field])
    if missing := [field for field in fields if fields[field] not in found]:
        raise ValueError(f"{place} lacks the field {', '.join(missing)}")
    if PLACEHOLDER.findall(made) != found:
        raise ValueError(f"{place} spells one of our placeholders as text, which a prompt file cannot hold")
    return made
