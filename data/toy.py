"""The generated task, which the demo and the scripts without options train on: small enough for a 0.49M-parameter
model, verifiable, worth thinking.

    python data/toy.py --out runs/toy/data --seed 0

Half the pairs are *reasoning*: five distinct digits to sort, to step (+1 modulo 10) or to flip (9 - digit). One answer
is right, the other is wrong in one to four places (a wrong sort is another ascending list, so that it cannot be spotted
without solving). Half are *chat*: a greeting asked to open, to say and to close with given words, one a Must, one a
Should, one a May (weights 4, 2, 1, shuffled); the answer with the larger weighted total wins.

    sort 76915                                    May open Dear Must say silver Should close Peace
    A 15679                                       A Dear silver Peace
    B 12568                                       B Ahoy silver Yours

The oracle whose chains are distilled is mixed on purpose, in two ways. First, a *careful* chain checks both answers
place by place,

    <type>Reasoning</type><solution>15679</solution><eval>A: 11=55=66=77=99= right. B: 11=52#65#76#98# wrong.</eval>...
    <type>Chat</type><rubric> Dear 1 silver 4 Peace 2</rubric><eval>A: Dear Dear=1 silver silver=4 Peace Peace=2 total 7
    B: Dear Ahoy#0 silver silver=4 Peace Yours#0 total 4</eval>...

while a *skim* chain writes the same solution or rubric and then an unchecked verdict ("Overall B looks better.").
CAREFUL says how often the oracle is careful on what. Second, a share FLAT of its rubrics gives every word the weight 1,
whatever the question asks for. As in the paper, chains with a wrong verdict are not kept but written anew by a teacher
who knows the label: where flat totals would not have found the winner, the rubric has the right weights. So every
verdict in the data is right, and yet a model that imitates the skim guesses, and one that imitates the flat rubric is
misled wherever it would have misled the oracle.

Questions are split by a hash: none is shared between distillation, reinforcement learning and held-out evaluation.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import ByteLevel as ByteLevelProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only data/ itself would be searched
from files import argument_parser, one_line_errors, refuse_existing, refuse_file  # noqa: E402
from files import whole, write_records, write_whole  # noqa: E402

OPEN = "Dear Hello Ahoy Greetings Welcome Hi Salute Hey".split()
SAY = "silver amber garden river candle winter copper meadow lantern harbor violet thunder".split()
CLOSE = "Peace Yours Cheers Farewell Regards Thanks Adieu Blessings".split()
WEIGHT = {"Must": 4, "Should": 2, "May": 1}
SPLITS = {"distill": range(0, 60), "rl": range(60, 80), "heldout": range(80, 100)}  # percent of all questions
CAREFUL = {"sort": 0.3, "flip": 0.3, "step": 0.6, "chat, Must opens": 0.6, "chat": 0.3}  # share of careful chains
FLAT = 0.75  # share of flat rubrics, before those that would not find the winner are written anew

MODEL = {  # a Qwen3: 0.49M parameters
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rope_theta": 1000.0,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_bias": False,
}

# ------------------------------------------------------------------------------------------------------------ questions


def solve(kind, digits):
    if kind == "sort":
        return sorted(digits)
    return [(d + 1) % 10 for d in digits] if kind == "step" else [9 - d for d in digits]


def question(rng):
    """A random question's text."""
    if rng.random() < 0.5:
        return f"{rng.choice(['sort', 'step', 'flip'])} {join(rng.sample(range(10), 5))}"
    names = rng.sample(list(WEIGHT), 3)
    words = rng.choice(OPEN), rng.choice(SAY), rng.choice(CLOSE)
    return " ".join(f"{name} {verb} {word}" for name, verb, word in zip(names, ("open", "say", "close"), words))


def read_question(text):
    """(domain, facts): ("reasoning", (kind, solution)) or ("chat", [(weight, wanted word)] from opening to closing)."""
    parts = text.split()
    if len(parts) == 2:
        return "reasoning", (parts[0], solve(parts[0], [int(d) for d in parts[1]]))
    return "chat", [(WEIGHT[name], word) for name, word in zip(parts[0::3], parts[2::3])]


def answers(domain, facts, rng):
    """(better, worse) answer texts."""
    if domain == "reasoning":
        kind, right = facts
        wrong = list(right)
        while wrong == list(right):
            for place in rng.sample(range(5), rng.randint(1, 4)):
                wrong[place] = rng.choice([d for d in range(10) if kind != "sort" or d not in wrong])
            if kind == "sort":
                wrong = sorted(wrong)
        return join(right), join(wrong)
    while True:
        better, worse = reply(facts, rng), reply(facts, rng)
        if total(facts, better) < total(facts, worse):
            better, worse = worse, better
        if total(facts, better) > total(facts, worse):
            return better, worse


def reply(facts, rng):
    """A greeting in which every word is the wanted one or, at even odds, any of its kind."""
    words = [word if rng.random() < 0.5 else rng.choice(pool) for (_, word), pool in zip(facts, (OPEN, SAY, CLOSE))]
    return " ".join(words)


def total(facts, answer):
    """Sum of the weights whose words stand at their places."""
    return sum(weight for (weight, word), found in zip(facts, answer.split()) if word == found)


def join(digits):
    return "".join(map(str, digits))


def split_of(text):
    percent = int.from_bytes(hashlib.sha256(b"nano-rm-r1 toy split" + text.encode()).digest()[:4], "big") % 100
    return next(name for name, part in SPLITS.items() if percent in part)


def make(split, n, seed, careful=None):
    """n pairs of the split as rows, each with the oracle's judgement; `careful` overrides the mix's share, 0 to 1."""
    rng = random.Random(f"{seed} {split}")
    rows = []
    while len(rows) < n:
        text = question(rng)
        if split_of(text) != split:
            continue
        domain, facts = read_question(text)
        better, worse = answers(domain, facts, rng)
        winner = rng.choice("ab")
        a, b = (better, worse) if winner == "a" else (worse, better)
        if domain == "reasoning":
            source = mix = facts[0]
        else:
            source = "chat"
            mix = "chat, Must opens" if facts[0][0] == WEIGHT["Must"] else "chat"
        checks = rng.random() < (CAREFUL[mix] if careful is None else careful)
        flat = rng.random() < FLAT and careful != 1
        rows.append({"id": f"{split}/{len(rows)}", "prompt": [{"role": "user", "content": text}],
                     "answer_a": a, "answer_b": b, "winner": winner, "source": source, "domain": domain,
                     "judgement": chain(domain, facts, a, b, winner, checks, flat)})
    return rows


# --------------------------------------------------------------------------------------------------------------- chains


def chain(domain, facts, a, b, winner, careful, flat):
    """The oracle's judgement: solution or rubric, then a place-by-place check if careful, then the (right) verdict."""
    if domain == "chat" and flat:
        equal = [(1, word) for _, word in facts]
        better, worse = (a, b) if winner == "a" else (b, a)
        facts = equal if total(equal, better) > total(equal, worse) else facts
    if careful:
        check = check_digits if domain == "reasoning" else check_words
        evaluation = f"A: {check(facts, a)} B: {check(facts, b)}"
    else:
        evaluation = f" Overall {winner.upper()} looks better."
    return f"{head(domain, facts)}<eval>{evaluation}</eval><answer>[[{winner.upper()}]]</answer>"


def head(domain, facts):
    """What a chain begins with: its type, and the solution or the rubric."""
    if domain == "reasoning":
        _, solution = facts
        return f"<type>Reasoning</type><solution>{join(solution)}</solution>"
    rubric = " ".join(f"{word} {weight}" for weight, word in facts)
    return f"<type>Chat</type><rubric> {rubric}</rubric>"


def check_digits(facts, answer):
    """Solution digit, answer digit, mark: '11=55=66=77=99= right.'"""
    _, solution = facts
    marks = "".join(f"{want}{got}{'=' if str(want) == got else '#'}" for want, got in zip(solution, answer))
    return f"{marks} {'wrong.' if '#' in marks else 'right.'}"


def check_words(facts, answer):
    """Wanted word, found word, mark, points: 'Dear Ahoy#0 silver silver=4 Peace Peace=2 total 6'"""
    slots = [f"{word} {got}={weight}" if word == got else f"{word} {got}#0"
             for (weight, word), got in zip(facts, answer.split())]
    return f"{' '.join(slots)} total {total(facts, answer)}"


def is_careful(judgement):
    """Does the chain check both answers?"""
    return "<eval>A:" in judgement and " B:" in judgement


def is_grounded(text, judgement):
    """Does the chain begin with the right solution of this question, or with the weights that it asks for?"""
    return judgement.startswith(head(*read_question(text)))


# ------------------------------------------------------------------------------------------------------------ tokenizer


def write_tokenizer(folder):
    """A Hugging Face tokenizer in which every digit and word of the task is one token, and so is what always stands
    together, which saves three tokens in ten; other text falls to bytes.

    Byte-level BPE without merges: `ignore_merges` looks a whole pre-token up in the vocabulary first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    words = [*OPEN, *(" " + w for w in OPEN + SAY + CLOSE), "sort", "step", "flip", "Chat", "Reasoning", "system"]
    words += [f"{space}{name} {verb}" for name in WEIGHT for verb in ("open", "say", "close") for space in ("", " ")]
    words += ["A", "B", " A", " B", "\nA", "\nB", "A:", " B:", " right.", " wrong.", " total", "#0", " Overall"]
    words += [" looks better.</eval><answer>[[", "user\n", "assistant\n", *(f" {digit}" for digit in range(10))]
    words += ["sort ", "step ", "flip ", "\nA ", "\nB ", "A: ", " B: "]  # before digits
    words += [f"<{slash}{tag}>" for tag in ("type", "solution", "rubric", "eval", "answer") for slash in ("", "/")]
    words += ["<type>Chat</type><rubric>", "</rubric><eval>", "<type>Reasoning</type><solution>", "</solution><eval>"]
    words += ["[[", "]]", "<answer>[[", "</eval><answer>[[", "]]</answer>", "A]]</answer>", "B]]</answer>"]
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [byte.pre_tokenize_str(word)[0][0] for word in words]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    pieces = Regex(r"<type>Chat</type><rubric>|<type>Reasoning</type><solution>|</(rubric|solution)><eval>"
                   r"|( looks better\.)?</eval><answer>\[\[|<answer>\[\[|[AB]?\]\]</answer>|</?[a-z]+>|\[\[|\]\]"
                   r"|(user|assistant)\n|(sort|step|flip|\n[AB]|A:| B:) (?=\d)|\n[AB](?= )"
                   r"| ?(Must|Should|May) (open|say|close)|#0(?= )| \d(?!\d)| ?[A-Za-z]+[.:]?|\d|\s|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pieces, "isolated"), byte])
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    with whole(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    template = ("{% for message in messages %}"
                "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "model_max_length": MODEL["max_position_embeddings"], "chat_template": template}
    write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2))
    return tokenizer.get_vocab_size()


def write_data(folder, seed=0, careful=None, n_distill=22_400, n_rl=3_200, n_heldout=800):
    """distill.jsonl (pairs with chains of the mixed oracle), rl.jsonl and heldout.jsonl (pairs alone)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for split, n in (("distill", n_distill), ("rl", n_rl), ("heldout", n_heldout)):
        rows = make(split, n, seed, careful)
        if split != "distill":
            rows = [{key: value for key, value in row.items() if key != "judgement"} for row in rows]
        write_records(folder / f"{split}.jsonl", rows)


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("--out", default="runs/toy/data", help="folder for distill.jsonl, rl.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs; the split does not depend on it")
    parser.add_argument("--careful", type=float, help="share of careful chains; 1 also weights every rubric")
    args = parser.parse_args()
    if not args.out.strip():
        parser.error("--out is empty: give a folder, or leave the option out")
    if not 0 <= args.seed < 2**40:
        parser.error(f"--seed must be from 0 to {2**40 - 1}, got {args.seed}")
    if args.careful is not None and not 0 <= args.careful <= 1:
        parser.error(f"--careful must be from 0 to 1, got {args.careful}")
    with one_line_errors():
        refuse_file(args.out)
        for split in ("distill", "rl", "heldout"):
            refuse_existing(Path(args.out, f"{split}.jsonl"))
        write_data(args.out, args.seed, args.careful)
