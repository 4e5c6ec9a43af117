"""Text <-> tokens, and the chat templates of Qwen2.5, Qwen3 and DeepSeek-R1-Distill.

    tokenizer = Tokenizer("Qwen2.5-7B-Instruct")            # a Hugging Face folder
    ids = tokenizer.chat([{"role": "user", "content": "Which answer is better?"}])

Nothing in a content ever becomes a control token. A content that spells <|im_end|> is ten harmless characters here:
contents are encoded by a tokenizer from which all added tokens were removed, and only this file's own `Control`
constants reach their ids. (transformers renders one string and finds the control tokens in it afterwards, so that an
answer under judgement can end its turn and go on as the user.)

Otherwise the ids equal those of transformers' apply_chat_template. Templates are Jinja programs; here they are
recognized, not run: `skeleton` reduces the folder's template to what it prints, `read_template` looks for the three
known forms in that and refuses any other. Tool calls and tool turns are not supported.
"""

import codecs
import json
import os
import re
from dataclasses import dataclass

import tokenizers

from files import NotJson, parse_json, write_whole


class Control(str):
    """A piece of a prompt that is one control token. Any operation on it (+, a slice, an f-string) gives plain text."""


IM_START, IM_END = Control("<|im_start|>"), Control("<|im_end|>")
USER, ASSISTANT, EOS = Control("<｜User｜>"), Control("<｜Assistant｜>"), Control("<｜end▁of▁sentence｜>")
THINK, END_THINK = Control("<think>"), Control("</think>")
ROLES = ("system", "user", "assistant")
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
         "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")


class Tokenizer:
    def __init__(self, path):
        self.path = os.fspath(path)
        # Kept in memory, not copied at save(): by then the folder may be a checkpoint that was rotated away.
        paths = {name: os.path.join(self.path, name) for name in FILES}
        self._files = {name: _read(path) for name, path in paths.items() if os.path.isfile(path)}
        if "tokenizer.json" not in self._files:
            raise ValueError(f"{self.path}: no tokenizer.json there; give a Hugging Face model folder that has one")
        config = self._json("tokenizer_config.json")
        self._read_vocabulary(self._json("tokenizer.json"))
        bos = self._token_text(config, "bos_token")
        self._bos = Control(bos) if bos else ""
        self._template = self._refusal = None
        try:
            self._template = self._find_template(config)
        except ValueError as error:  # chat() raises it: a folder without a template can still encode and decode
            self._refusal = str(error)
        self.stop_ids = self._find_stop_ids(config)

    @property
    def end_of_turn(self):
        """The id that the template puts right after an assistant's content."""
        if self._template is None:
            raise ValueError(self._refusal)
        return self._id_of[EOS if self._template.kind == "deepseek" else IM_END]

    def encode(self, text):
        """Ids of plain text: never an added token, whatever the text spells."""
        assert isinstance(text, str), f"encode takes a string, got {type(text).__name__}"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text has half a surrogate pair, {text[error.start]!r}, at character {error.start}; "
                             "it is not Unicode: repair it where it was read") from None
        # add_special_tokens: else DeepSeek's post-processor adds BOS. As a batch of one: `encode` of one text would let
        # no other thread run until it is done, for seconds if the text has megabytes.
        encoding, = self._plain.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def encode_reply(self, text):
        """Ids of an assistant's reply as the model itself writes it after `chat(prompt)`, without the end of turn.

        The delimiters of a leading thinking block become control tokens where the folder has these: a `<think>` at the
        very start, and the first `</think>` after it. Where the generation prompt already ends in `<think>\\n`, a
        leading `<think>` and one newline after it are dropped (the prompt has them), and the first `</think>` closes
        the prompt's block, whether or not the text repeated its opening. Everything else is plain text.
        """
        assert isinstance(text, str), f"encode_reply takes a string, got {type(text).__name__}"
        opened = self._template is not None and self._template.opens_think
        if not opened and not text.startswith(THINK):
            return self.encode(text)
        rest = text.removeprefix(THINK)
        if opened and rest != text:
            rest = rest.removeprefix("\n")
        thought, close, answer = rest.partition(END_THINK)
        pieces = [thought] if opened else [THINK, thought]
        if close:
            pieces += [END_THINK, answer]
        return self._ids(pieces)

    def decode(self, ids, skip_control=True):
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        `skip_control` drops the added tokens flagged special: <|im_end|> goes, <think> stays.
        """
        return b"".join(self._bytes(i, skip_control) for i in ids).decode("utf-8", "replace")

    def chat(self, messages, generate=True):
        """Ids of the conversation [{"role", "content"}...]; `generate` opens the assistant's next turn."""
        return self._ids(self._pieces(messages, generate))

    def lengths(self, conversations):
        """How many ids `chat` gives of each conversation, encoded side by side on all cores."""
        parts = [self._parts(self._pieces(messages, generate=True)) for messages in conversations]
        texts = [part for pieces in parts for part in pieces if isinstance(part, str)]
        counts = (len(encoding) for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False))
        return [sum(next(counts) if isinstance(part, str) else 1 for part in pieces) for pieces in parts]

    def _pieces(self, messages, generate):
        """A conversation as the template prints it: pieces, each a Control or a text."""
        if self._template is None:
            raise ValueError(self._refusal)
        turns = _check(messages)
        if self._template.kind == "deepseek":
            pieces = _deepseek(turns, self._template.join_systems, self._bos)
        elif self._template.kind == "qwen3":
            pieces = _qwen3(turns)
        else:
            pieces = _chatml(turns, self._template.default_system)
        if generate:
            pieces += [ASSISTANT] if self._template.kind == "deepseek" else [IM_START, "assistant\n"]
            if self._template.opens_think:
                pieces += [THINK, "\n"]
        return pieces

    def save(self, path):
        """Writes the tokenizer's files, as they were when loaded, into a folder."""
        os.makedirs(path, exist_ok=True)
        for name, data in self._files.items():
            write_whole(os.path.join(path, name), data)

    def _ids(self, pieces):
        ids = []
        for part in self._parts(pieces):
            ids += self.encode(part) if isinstance(part, str) else [part]
        return ids

    def _parts(self, pieces):
        """Control tokens as their ids, and each whole text between two of them, since "user\\n" + "\\nhi" holds the one
        token "\\n\\n"."""
        parts, text = [], ""
        for piece in pieces:
            if isinstance(piece, Control) and piece in self._id_of:
                parts += [text, self._id_of[piece]]
                text = ""
            else:  # text, or the <think> of a folder that has no such token: text, as in transformers
                text += piece
        return parts + [text]

    def _bytes(self, i, skip_control):
        if i in self._added:
            spelling, special = self._added[i]
            return b"" if special and skip_control else spelling
        token = self._plain.id_to_token(i) if 0 <= i < self.n_vocab else None
        if token is None:
            raise ValueError(f"{self.path}: the tokenizer has no id {i}; its ids end at {self.n_vocab - 1}")
        # A token with characters outside the byte alphabet is written as it stands, as the library does.
        return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()

    def _json(self, name):
        return _parse(self._files[name], os.path.join(self.path, name)) if name in self._files else {}

    def _read_vocabulary(self, spec):
        where = os.path.join(self.path, "tokenizer.json")
        try:
            added = spec["added_tokens"]
            self._id_of = {token["content"]: token["id"] for token in added}
            self._added = {token["id"]: (token["content"].encode(), token["special"]) for token in added}
            self._strips = [token["content"] for token in added if token["lstrip"] or token["rstrip"]]
            # Out of the vocabulary too: where that has control tokens, `ignore_merges` finds them as whole words.
            vocab = {token: i for token, i in spec["model"]["vocab"].items() if token not in self._id_of}
            decoder = spec["decoder"]["type"]
            self.n_vocab = 1 + max([*vocab.values(), *self._added])  # the embedding may have more: not to be sampled
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{where}: not a BPE tokenizer of the tokenizers library ({error!r}); take that of a Qwen "
                             "model") from None
        if decoder != "ByteLevel":
            raise ValueError(f"{where}: its decoder is {decoder}, need ByteLevel; only byte-level BPE is supported")
        # A truncation or padding that somebody saved would be applied silently.
        model = spec["model"] | {"vocab": vocab}
        plain = json.dumps(spec | {"added_tokens": [], "truncation": None, "padding": None, "model": model})
        try:
            self._plain = tokenizers.Tokenizer.from_str(plain)
        except Exception as error:  # what is wrong with a spec the library raises as a bare Exception, nothing narrower
            raise ValueError(f"{where}: {error}") from None

    def _find_template(self, config):
        where = os.path.join(self.path, "tokenizer_config.json")
        text = config.get("chat_template")
        if "chat_template.jinja" in self._files:  # where both are there, transformers reads this one
            where = os.path.join(self.path, "chat_template.jinja")
            text = _text(self._files["chat_template.jinja"], where)
        if isinstance(text, list):  # several named templates
            named = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
            text = named.get("default")
        if not text or not isinstance(text, str):
            raise ValueError(f"{self.path}: no chat template in tokenizer_config.json, and no chat_template.jinja; "
                             "take the folder of an instruct model")
        template = read_template(text, where)
        needs = (self._bos, USER, ASSISTANT, EOS) if template.kind == "deepseek" else (IM_START, IM_END)
        for control in needs:
            if control and control not in self._id_of:
                raise ValueError(f"{where}: it writes {control}, which tokenizer.json has not among its added_tokens")
            if control in self._strips:  # no published Qwen or DeepSeek folder has these flags
                raise ValueError(f"{where}: {control} has lstrip or rstrip in tokenizer.json, which is not supported")
        return template

    def _find_stop_ids(self, config):
        """The template's turn end, with eos_token_id of generation_config.json, else of config.json, else eos_token."""
        turn_end = set() if self._template is None else {self.end_of_turn}
        for name in ("generation_config.json", "config.json"):
            path = os.path.join(self.path, name)
            ids = _parse(_read(path), path).get("eos_token_id") if os.path.isfile(path) else None
            if ids is not None:
                if not isinstance(ids, list):
                    ids = [ids]
                for i in ids:
                    if type(i) is not int or not 0 <= i < self.n_vocab:
                        raise ValueError(f"{path}: eos_token_id {i!r} is not in tokenizer.json "
                                         f"(0..{self.n_vocab - 1}); take both of one model")
                return frozenset(turn_end.union(ids))
        eos = self._token_text(config, "eos_token")
        if eos is None:
            return frozenset(turn_end)
        if eos not in self._id_of:
            where = os.path.join(self.path, "tokenizer_config.json")
            raise ValueError(f"{where}: eos_token {eos!r} is no added token of tokenizer.json; take both of one model")
        return frozenset(turn_end | {self._id_of[eos]})

    def _token_text(self, config, key):
        """A token in tokenizer_config.json is a string, or an object with its flags, or null."""
        token = config.get(key)
        text = token.get("content", token) if isinstance(token, dict) else token
        if text is not None and not isinstance(text, str):
            where = os.path.join(self.path, "tokenizer_config.json")
            raise ValueError(f"{where}: {key} is {token!r:.60}; it must be a string; take the file of the model again")
        return text


class StreamDecoder:
    """Decodes ids one by one: pushed texts and flush make up `decode` of all ids, and none ends inside a character."""

    def __init__(self, tokenizer, skip_control=True):
        self._tokenizer, self._skip_control = tokenizer, skip_control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i):
        return self._utf8.decode(self._tokenizer._bytes(i, self._skip_control))

    def flush(self):
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


# The three templates: turns [(role, content)...] -> pieces, each a Control or a text.


def _chatml(turns, default_system):
    if default_system is not None and turns[0][0] != "system":
        turns = [("system", default_system)] + turns
    return [piece for role, content in turns for piece in (IM_START, f"{role}\n{content}", IM_END, "\n")]


def _qwen3(turns):
    """As ChatML, but thoughts stay only after the last question, and the last turn has a block even if empty."""
    pieces = []
    last_question = len(turns) - 1
    for n, (role, content) in enumerate(turns):
        is_tool_response = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if role == "user" and not is_tool_response:
            last_question = n
    for n, (role, content) in enumerate(turns):
        thinking = []
        if role == "assistant":
            thought = ""
            if END_THINK in content:
                thought = content.split(END_THINK)[0].split(THINK)[-1].strip("\n")
                content = content.split(END_THINK)[-1].lstrip("\n")
            if n > last_question and (thought or n == len(turns) - 1):
                thinking = [THINK, f"\n{thought}\n", END_THINK, "\n\n"]
                content = content.lstrip("\n")
        pieces += [IM_START, f"{role}\n", *thinking, content, IM_END, "\n"]
    return pieces


def _deepseek(turns, join_systems, bos):
    """System text, wherever its turn is, comes right after BOS; thoughts are dropped; nothing stands between turns."""
    systems = [content for role, content in turns if role == "system"]
    pieces = [bos, "\n\n".join(systems if join_systems else systems[-1:])]
    for role, content in turns:
        if role == "user":
            pieces += [USER, content]
        elif role == "assistant":
            pieces += [ASSISTANT, content.split(END_THINK)[-1], EOS]
    return pieces


# Which of the three is it?


@dataclass(frozen=True)
class Template:
    kind: str  # "chatml" (Qwen2.5 and all plain ChatML), "qwen3", "deepseek"
    default_system: str | None  # chatml: the system text of a conversation that has none
    join_systems: bool  # deepseek: several system turns are joined by an empty line, else the last one counts
    opens_think: bool  # the generation prompt ends in "<think>\n"


STRING = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""


def skeleton(template):
    """What a Jinja template can print, in order: literal text as it is, expressions in ⟨⟩, statements left out.

    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% endfor %}" -> "<|im_start|>⟨role⟩\\n"
    Whitespace goes as under transformers' settings, trim_blocks and lstrip_blocks.
    """
    text = re.sub(r"\s*(\{[%{#])-", r"\1", template.removesuffix("\n"))
    text = re.sub(r"-([%}#]\})\s*", r"\1", text)
    text = re.sub(r"(?m)^[ \t]+(?=\{[%#])", "", text)
    text = re.sub(r"(?s)\{#.*?#\}\n?", "", text).replace("%}\n", "%}")
    printed = []
    for part in re.split(r"(?s)(\{\{.*?\}\}|\{%.*?%\})", text):
        if part.startswith("{{"):
            terms = re.findall(rf"(?s)(?:{STRING}|[^+~'\"])+", part[2:-2])
            printed += [_printed_term(term.strip()) for term in terms if term.strip()]
        elif not part.startswith("{%"):
            printed.append(part)
    return "".join(printed)


def _printed_term(term):
    if re.fullmatch(STRING, term, flags=re.S):
        return term[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")  # Jinja's own rule
    term = re.sub(r"\[['\"](\w+)['\"]\]", r".\1", term)
    return "⟨" + re.sub(r"^(message|msg|m)\.(role|content)$", r"\2", term) + "⟩"


CHATML_TURN = "<|im_start|>⟨role⟩\n⟨content⟩<|im_end|>\n"
QWEN3_TURN = ("<|im_start|>⟨role⟩\n<think>\n⟨reasoning_content.strip('\\n')⟩\n</think>\n\n"
              "⟨content.lstrip('\\n')⟩")
DEEPSEEK_START = "⟨bos_token⟩⟨ns.system_prompt⟩<｜User｜>⟨content⟩"
DEEPSEEK_TURN = "<｜Assistant｜>⟨content⟩<｜end▁of▁sentence｜>"
# Words of other ChatML-like templates, which print something else than the markers show; Qwen's have none of them.
FOREIGN = ("bos_token", "trim", "strftime", "raise_exception", "replace(")


def read_template(text, where):
    """The Template that a Jinja text is; `where` names its file in the error if it is none."""
    printed = skeleton(text)
    splits_thoughts = "split('</think>')" in text.replace('"', "'")
    default = re.search(r"<\|im_start\|>system\n([^⟨⟩]*?)<\|im_end\|>\n", printed)
    systems = re.findall(r"<\|im_start\|>system\n(?!⟨(?:messages\[0\]\.)?content⟩)", printed)  # not from a message
    kind = None
    opening = "<|im_start|>assistant\n"  # of the generation prompt
    if DEEPSEEK_START in printed and DEEPSEEK_TURN in printed and splits_thoughts:
        kind = "deepseek"
        opening = ASSISTANT
    elif CHATML_TURN in printed and not any(word in text for word in FOREIGN):
        if QWEN3_TURN in printed and "last_query_index" in text and splits_thoughts and not systems:
            kind = "qwen3"
        elif "</think>" not in text and len(systems) == (1 if default else 0):
            kind = "chatml"
    tail = printed.rpartition(opening)[2]
    if "enable_thinking is false" in text:  # the empty block that switches thinking off, which is not the default
        tail = tail.removesuffix("<think>\n\n</think>\n\n")
    if kind is None or "add_generation_prompt" not in text or tail not in ("", "<think>\n"):
        raise ValueError(f"{where}: unknown chat template. Known are ChatML as in Qwen2.5 (printing {CHATML_TURN!r}), "
                         f"Qwen3 (also last_query_index and '</think>') and DeepSeek-R1-Distill ({DEEPSEEK_TURN!r}), "
                         "each with its own generation prompt; use a folder that has one of these")
    return Template(kind, default and default[1], "is_first_sp" in text, tail == "<think>\n")


# Small things.


def _check(messages):
    """Messages -> [(role, content)...], or an error that names the message."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages: need a non-empty list of {{'role', 'content'}}, got {messages!r:.60}")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"messages[{n}]: need {{'role', 'content'}}, got {message!r:.60}")
        if message["role"] not in ROLES:
            raise ValueError(f"messages[{n}]: unknown role {message['role']!r}; need one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise ValueError(f"messages[{n}] ({message['role']}): content must be a string, got {kind}")
    # str() unmakes a Control, which no file can hold but a caller could pass.
    return [(message["role"], str(message["content"])) for message in messages]


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def _text(data, where):
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{where}: is not UTF-8; copy or download it again") from None


def _parse(data, where):
    try:
        parsed = parse_json(data)
    except NotJson as error:
        raise ValueError(f"{where}: not valid JSON ({error}); copy or download it again") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{where}: need a JSON object, got {type(parsed).__name__}")
    return parsed


def _byte_alphabet():
    """Byte-level BPE writes byte b as chr(b) where that is printable and no space, else as one from chr(256) on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
