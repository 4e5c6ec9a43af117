"""Traces of the hint: does a chain tell that its writer had been shown the right verdict?

A judge that learns to write "as I was told" would look for a hint that nobody gives it. So a chain of pass 2 is dropped
if a pattern finds such words in it, or if it repeats the hint's own sentences. What stands in the prompt, question and
answers included, is no trace: a judge may quote it.
"""

import re

WORDS = 5  # of the hint in a row; by chance honest chains share three with it, none of 296 recorded ones shares four
VERDICT = r"(verdicts?|labels?|judge?ments?|winner|outcome|preference)\b"
SIDE = (r"((chatbot|answer|response|assistant|option|side) [ab]\b|\[\[[ab]\]\]|"
        r"which (one|chatbot|answer|response|side)\b)")
GOOD = r"\b(better|best|preferred|right|correct|wins?|won|winner)\b"
FIXED = (r"(given|provided|supplied|stated|known|established|official|reference|gold(en)?|ground[- ]truth|expected|"
         r"required|predetermined|confirmed|settled|fixed|assigned)")
EARLIER = r"(previous|earlier|prior|preceding|rejected|colleague'?s?)"
NEAR = r"[^.!?\n]{0,40}"  # in the same sentence

# What no honest judge has reason to write. It may write "we are given a triangle", "the correct answer is 12" (of the
# task), "its first attempt" (a chatbot's), "the final verdict", "the expected outcome": the patterns leave these be.
PATTERNS = {
    "it was told": rf"\b(was|were|am|are|been|being|as) (\w+ )?(told|given|informed|shown|provided|supplied|notified|"
                   rf"advised)\b{NEAR}\b({VERDICT}|{SIDE}{NEAR}{GOOD})",
    "a verdict was there": rf"\b({FIXED}|correct|right|true|target) (final )?(verdict|label|winner)\b|"
                           r"\b(verdict|label) (provided|supplied)\b",
    "the better side was known": rf"\b(know|knowing|decided|{FIXED})( already| beforehand| in advance)?,? that "
                                 rf"{SIDE}{NEAR}{GOOD}",
    "a choice was known": rf"\b{FIXED} (answer|choice|decision) (is|was|says|favou?rs|prefers) (\w+ )?{SIDE}",
    "an outcome was fixed": rf"\b(outcome|verdict|winner) (is|was|has been|had been) (already )?{FIXED}\b",
    "it argues backwards": r"\b(justify|support|match|consistent with|agree with|arrive at|in line with|explain) the "
                           rf"{FIXED} (conclusion|{VERDICT})",
    "an earlier judgement": rf"\b({EARLIER}|original|initial|former|wrong|incorrect|flawed|mistaken) (\w+ )?(verdict|"
                            r"judge?ment)\b",
    "an earlier try": rf"\b(my|the|a|this|that) {EARLIER} (\w+ )?(attempt|draft|chain|trace|evaluation|assessment)\b",
    "the draft": r"\b(rejected draft|draft (judge?ment|verdict|evaluation|chain)|the draft (above|missed|overlooked|"
                 r"misjudged|got|came|concluded|claimed|said|wrongly|reached|chose|favou?red|preferred))\b",
    "a corrected judgement": r"\b(corrected|revised|rewritten|amended|new) (verdict|judge?ment|evaluation|chain)\b",
    "the hint": r"\b(the|this|that|your|a) (hint|note)( above| below)? (says?|said|tells?|told|states?|stated|gives?|"
                r"gave|indicates?|indicated|confirms?|confirmed)\b|\b(per|following|according to) the (hint|note)\b|"
                r"\bnote to the judge\b",
    "the experts": r"\b(experts?|panel|annotators?|human raters?) (\w+ )?(confirmed|settled|found|decided|agreed|"
                   rf"preferred|chose|judged|favou?red|determined),?( that| for| on)? {SIDE}",
}


def trace_of(chain, hint, shown):
    """What gives the hint away in a chain, or None. hint: its text before {parts} are filled in; shown: the text of the
    prompt without the hint."""
    chain, shown = " ".join(chain.split()), " ".join(shown.split())
    for name, pattern in PATTERNS.items():
        for match in re.finditer(pattern, chain, re.IGNORECASE):
            if match[0].lower() not in shown.lower():
                return f"{name}: {match[0]}"
    for words in sorted(runs(hint) & runs(chain) - runs(shown)):
        return f"the hint's own words: {' '.join(words)}"
    return None


def runs(text):
    """All runs of WORDS words that do not cross a {part}."""
    parts = [re.findall(r"[^\W_]+", part.lower()) for part in re.split(r"\{\w+\}", text)]
    return {tuple(words[i:i + WORDS]) for words in parts for i in range(len(words) - WORDS + 1)}
