"""Do two hypotheses say the same? Parsed: a sentence vector sees no number and no direction.

Four things are read out of each statement (`read`): which knobs it is about, the values it names,
the options it names, and which way it goes. How far they agree goes into a logistic rule of seven
weights, fitted on one half of tests/data/hypothesis_pairs.jsonl and measured on the other; the
cosine of word vectors was tried as an eighth and left out: docs/novelty.md has the figures.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from society.records import Hypothesis, HypothesisState, Variant

THRESHOLD = 0.8
"""From this likelihood on two statements count as one idea: a wrong refusal loses an idea."""
BIAS = -3.83
WEIGHTS = (3.9, 3.73, -3.38, 1.92, -0.55, 0.65, -1.02)
"""Of: shared knobs, shared values, values without a common one, shared options, options without a
common one, the same way, opposite ways. The shares are of all that either names."""

_VOCABULARY = r"""
warm_down_shape: (?:cosine|linear) (?:warm.?down|cool.?down|schedule|decay of the learning) |
    decay to zero should follow | (?:warm.?down|cool.?down) (?:by|go)\b
warm_down_shape: (?:1|one)[- ](?:minus[- ](?:the )?)?(?:sqrt|square root) | shape of the decay
final_lr: (?:final|last|end(?:ing)?) (?:learning )?rate | all the way |
    (?:finish|end)(?:s|ing)? (?:the decay )?at | end the decay |
    where the (?:decay|warm.?down) ends
warm_down: warm.?down | cool(?:ing|s)?.?down | anneal\w* |
    (?:start|begin) (?:decaying|lowering|the decay) | learning rate decays
warm_up: warm\w*(?: the (?:run|rates|learning rate))?.?up | ramp\w* the (?:learning )?rates? up
decay_shape: weight decay (?:shape|follow\w*|schedule|constant) | keep weight decay constant |
    decay schedule
adam_decay: decay (?:of )?the embedding | decay on the embedding |
    embedding (?:and output )?tables?
weight_decay: weight decay | regularis\w+ the weights | shrinking the (?:parameters|weights)
value_embed_lr: value embeddings?\W+(?:\w+\W+){0,4}?(?:learning rate|step size|learn\b|lr\b) |
    learning rate (?:of|for) value embeddings?
value_embed_init: initial\w* (?:scale of )?(?:the )?value embed\w* |
    value embeddings?\W+(?:initial|init)\w*
value_embed_dist: (?:draw|distribution|normal|uniform)\W+(?:\w+\W+){0,2}?value embed\w* |
    value embeddings? from a
value_gate: value gate | gat(?:e|ed|ing) (?:on )?(?:the )?value embed\w* | gate
value_embeds: value embed\w* | token.specific information
embedding_lr: embedding (?:learning )?rate |
    (?:token )?embeddings?\W+(?:\w+\W+){0,4}?(?:learning rate|slow|fast|learn\b|slowly|lr\b) |
    learning rate for (?:the )?(?:token )?embeddings? | slow the token embeddings
tie_embeddings: ti(?:e|ed|ing)\b | unti(?:e|ed|ing)\b | shar\w+ one table |
    one (?:lookup )?table
x0_init: \bx0\b | (?:raw )?token (?:embedding|information)(?: \w+){0,3} (?:each|every)
head_lr:
    (?:head|unembedding|output layer)\W+(?:\w+\W+){0,4}?(?:learning rate|rate|learns?\b|move|lags) |
    (?:rate|learning rate) (?:for|of) the (?:unembedding|head|output) | unembedding
residual_lr: residual learning rate | learning rate of the residual |
    residual (?:scalars?|lambdas?)\W+(?:\w+\W+){0,3}?(?:adapt|faster|slower|learning rate) |
    faster residual | slower residual | lambdas? a learning rate
residual_init: initial\w* the residual
residual_scalars: residual (?:scalars?|lambdas?)
matrix_lr: (?:matrix|matrices|muon)\W+(?:\w+\W+){0,2}?(?:learning )?rate\b
lr_scale:
    (?:all|every|overall|of all groups)(?: (?:the|parameter))* ?(?:learning )?(?:rates?|groups?) |
    rates? of all | all rates | steps that are too | too hot | rates together
batch_tokens: batch\w* | tokens (?:a|per|each) (?:step|time|update) | averaging over |
    smaller steps
window_pattern: (?:window )?pattern | full attention | short and long attention |
    attend(?:s)? (?:fully|to the entire) | short layers?(?= and) | long attention |
    fewer short layers | no layer has a short
short_window: short (?:attention )?windows? | windows? for local | short layers | local layers
seq_len: (?:shorter|longer|short|long)? ?rows\b(?! from| twice) | row length | sequence length |
    more context
rope_base: rope(?: base)? | rotary(?: base)?
qk_scale: queries and keys after | sharp\w* attention |
    attention (?:sharper|softer|discriminate\w*) | attention logits
qkv_scale: qkv | query, key and value | queries, keys
project_init: output projections?
mlp_init: initial\w* (?:the |scale of the )?(?:mlp|feed.forward) |
    feed.forward (?:part |input )?(?:matrices )?(?:at|smaller)
mlp_ratio: mlp (?:ratio|expansion) | feed.forward (?:part|hidden|size) |
    hidden (?:size|width|layers) | the mlp
activation: relu ?2 | squared relu | relu squared | gelu | swiglu | activation
norm_placement: (?:sandwich|post|pre).?norm\w* | layer norm | normalis\w+ both
softcap: soft.?cap | squash logits | cap the (?:output )?logits | logits harder |
    bound the predictions
label_smoothing: (?:label )?smooth\w*(?: of)?(?: the)? labels? | label smoothing | target mass |
    less sure
z_loss: z.?loss | log.partition
kv_heads: multi.query | key and value heads | keys and values among
head_size: head size | smaller heads
heads: (?:attention )?heads?\b
vocab: vocab\w* | bpe tokens | dictionary
depth: depth | deep\w* |
    (?:\d+|one|two|three|four|six|eight|more|fewer|fewer, wider) (?:layers|blocks)
dim: wid(?:e|en|er|th)\b | narrower | channels | dimension | \bdim\b | residual stream
aspect_ratio: aspect.?ratio
momentum_ramp: momentum (?:ramps?|rise)\w* | ramp
momentum_start: momentum (?:at the )?start |
    (?:start|begin)\w* (?:muon )?with (?:less|more) momentum | less momentum
momentum_final: final momentum | momentum (?:should )?end | momentum
muon_beta2: muon'?s? (?:per.neuron )?second moment | second moment of muon | normuon
polar_steps: polar | newton.schulz | orthogonalis\w*
optimizer: (?:plain )?adamw | replace muon
adam_beta1: beta ?1 | first beta
adam_beta2: beta ?2 | second.moment
skip_scale: u.?net | skips?\b | skip connections? | early (?:layers )?(?:and|to) late
data_order: order\w* (?:the )?rows | curriculum |
    (?:easy|hard|short|long)\w* (?:rows |documents )?first | easiest first
packing: pack\w* | best.?fit
repeats: repeats? | passes | every row twice | several times
domain_mix: domains?
"""
"""The words of the trade: a knob of the trainer, and patterns of what people write for it.

The longer one comes first, and takes its words away from those after it. A name as the recipe
spells it needs no entry.
"""

OPTIONS = (
    "cosine", "linear", "linearly", "sqrt", "square root", "constant", "relu2", "gelu", "swiglu",
    "adamw", "post", "pre", "sandwich", "alternate", "all", "every", "last", "final layer",
    "first half", "last half", "learned", "learn", "fixed", "fix", "hold", "normal", "uniform",
    "easy", "hard", "best fit", "evenly", "off", "none", "without", "drop", "remove", "turn off",
    "no",
)  # fmt: skip
"""Words that name one value of a category."""
_SYNONYM = {
    "linearly": "linear", "square root": "sqrt", "every": "all", "final layer": "last",
    "learned": "learn", "fix": "fixed", "hold": "fixed",
    "none": "off", "without": "off", "drop": "off", "remove": "off", "no": "off",
}  # fmt: skip

_UP_WORDS = r"""
rais\w+ increas\w+ high\w* larg\w+ long\w* more big\w* great\w* wider widen\w* deep\w+ doubl\w+
twice tripl\w+ quadrupl\w+ faster quick\w* stronger strongly sharp\w+ lengthen\w* extend\w*
enlarg\w+ broader add\w* use with train\b.with learn\b mix.more up harder too.slow\w* too.low
too.timid another hotter
"""
_DOWN_WORDS = r"""
lower\w* reduc\w+ decreas\w+ small\w* short\w* less few\w* narrow\w* shrink\w* halv\w+ half.as
slow\w* soft\w+ cut\w* weaker tight\w* down without drop\w* remov\w+ turn.off off skip no not
don't unti\w+ leave.out leave.the.\w+.\w+.out too.fast too.hot too.high stop\w* pointless
useless
"""
_EARLY = re.compile(r"\b(?:earlier|sooner|early)\b")
_LATE = re.compile(r"\b(?:later|late|only at the very end)\b")
_UP = re.compile(rf"\b(?:{'|'.join(_UP_WORDS.split())})\b")
_DOWN = re.compile(rf"\b(?:{'|'.join(_DOWN_WORDS.split())})\b")
_DENIED = re.compile(
    r"\b(?:hurts?|harms?|worse|is no better|does not help|no effect|unstable|costs? more)\b"
)

_WORDS = {
    "zero": 0.0, "one": 1.0, "single": 1.0, "two": 2.0, "three": 3.0, "four": 4.0, "five": 5.0,
    "six": 6.0, "seven": 7.0, "eight": 8.0, "ten": 10.0, "sixteen": 16.0, "half": 0.5,
    "third": 1 / 3, "quarter": 0.25, "eighth": 0.125, "tenth": 0.1, "three quarters": 0.75,
    "twice": 2.0, "million": 1e6,
}  # fmt: skip
_FACTORS = {"halve": 0.5, "halving": 0.5, "double": 2.0, "doubling": 2.0, "triple": 3.0,
            "tripling": 3.0, "quadruple": 4.0, "quarter the": 0.25}  # fmt: skip
_NUMBER = r"\d*\.?\d+(?:e[-+]?\d+)?"
_POWER = re.compile(r"(\d+)\s*(?:\*\*|\^)\s*(\d+)")
_FRACTION = re.compile(r"\b(\d+)/(\d+)\b")
_PERCENT = re.compile(rf"({_NUMBER})\s*(?:%|percent)")
_FROM_TO = re.compile(rf"(?:from )?({_NUMBER})\s*(?:->|→|to)\s*({_NUMBER})")
_FROM = re.compile(rf"(?:from|of) (?:about )?({_NUMBER})")
_BY = re.compile(rf"\bby ({_NUMBER})")
_PLAIN = re.compile(rf"(?<![\w.])({_NUMBER})(?![\w])")
_PATTERN = re.compile(r"\b[SL]{1,5}\b")
_ASSIGNED = re.compile(r"\s*=\s*[a-z]\w*")
_NO_WAY = re.compile(
    r"(?:warm|cool|ramp)\w*(?: \w+)?[- ]?(?:up|down)\b|\bti(?:e|ed|ing)\b|soft.?cap|smoothing"
    r"|skip connections?|\bshort (?:attention )?(?:window|layer|document|row|run)s?"
    r"|(?:low|small|bett)er\w* (?:the )?(?:final )?(?:loss|score)"
    r"|(?:outperforms|beats|helps|improves)\b"
)
"""Words that sound like a direction and are names, or what is hoped for."""
_NAME = re.compile(r"\b[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b")


def _vocabulary() -> dict[str, list[re.Pattern[str]]]:
    """Knob -> its patterns, in order; a knob may have several entries."""
    entries = re.split(r"\n(?=\w+:)", _VOCABULARY.strip())
    pairs = [re.sub(r" \|\s+", "|", entry).split(":", 1) for entry in entries]
    return {
        knob: [re.compile(rf"\b(?:{pattern.strip()})") for name, pattern in pairs if name == knob]
        for knob, _ in pairs
    }


_KNOBS = _vocabulary()


@dataclass(frozen=True, slots=True)
class Said:
    """What a statement says, as far as it can be parsed."""

    knobs: frozenset[str]
    values: frozenset[float]
    options: frozenset[str]
    way: int
    """+1 for more of something, -1 for less of it, 0 where it does not say."""
    denied: bool
    """Whether it says that this is for the worse."""


def read(statement: str) -> Said:
    """Parse one statement."""
    patterns = {one.lower() for one in _PATTERN.findall(statement)}
    text = statement.lower().replace("µ", "u")
    knobs, rest = _knobs(text)
    values, step = _values(text)
    options = {word for word in OPTIONS if re.search(rf"\b{word}\b", text.replace("_", " "))}
    spelled = {_SYNONYM.get(word, word) for word in options} | patterns
    way = step or _way(rest, knobs)
    return Said(knobs, values, frozenset(spelled), way, _DENIED.search(text) is not None)


def _knobs(text: str) -> tuple[frozenset[str], str]:
    """The knobs that are named, and the text without their names."""
    text = _ASSIGNED.sub(" = ", text)
    found = set(_NAME.findall(text))
    rest = _NAME.sub(" ", text)
    for knob, patterns in _KNOBS.items():
        for pattern in patterns:
            rest, times = pattern.subn(" ", rest)
            if times:
                found.add(knob)
    return frozenset(found), _NO_WAY.sub(" ", text)


def _values(text: str) -> tuple[frozenset[float], int]:
    """The values a statement aims at, and the way it goes if it says from where."""
    text = _NAME.sub(lambda name: " " + "_" * len(name[0]) + " ", text)
    text = _POWER.sub(lambda m: repr(float(m[1]) ** float(m[2])), text)
    text = _FRACTION.sub(lambda m: repr(float(m[1]) / float(m[2])), text)
    text = _PERCENT.sub(lambda m: repr(float(m[1]) / 100), text)
    moved = _FROM_TO.search(text)
    if moved is not None:
        start, end = float(moved[1]), float(moved[2])
        return frozenset({_rounded(end)}), (end > start) - (end < start)
    factor = next((f for word, f in _FACTORS.items() if re.search(rf"\b{word}\b", text)), None)
    base = _FROM.search(text)
    share = _BY.search(text)
    if share is not None and base is not None:
        up = 1 if _UP.search(text[: share.start()]) else -1
        return frozenset({_rounded((1 + up * float(share[1])) * float(base[1]))}), up
    if factor is not None and base is not None:
        return frozenset({_rounded(factor * float(base[1]))}), 1 if factor > 1 else -1
    numbers = [float(one) for one in _PLAIN.findall(text)]
    numbers += _spelled(text)
    numbers += [factor] if factor is not None else []
    return frozenset(map(_rounded, numbers)), 0


def _spelled(text: str) -> list[float]:
    """Numbers written as words; `three quarters` is one of them."""
    found = []
    for word in sorted(_WORDS, key=len, reverse=True):
        if re.search(rf"\b{word}\b", text):
            found.append(_WORDS[word])
            text = re.sub(rf"\b{word}\b", " ", text)
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _way(text: str, knobs: Iterable[str]) -> int:
    """Which way the first word goes that goes any way."""
    found = [(one.start(), 1) for one in _UP.finditer(text)]
    found += [(one.start(), -1) for one in _DOWN.finditer(text)]
    if "warm_down" in knobs:  # a decay that begins earlier lasts longer
        found += [(one.start(), 1) for one in _EARLY.finditer(text)]
        found += [(one.start(), -1) for one in _LATE.finditer(text)]
    return min(found)[1] if found else 0


def same_idea(a: str, b: str) -> float:
    """How likely two statements propose the same, 0..1; see `THRESHOLD`.

    1 for the same words; 0 where one expects good of it and the other harm.
    """
    if _plain_words(a) == _plain_words(b):
        return 1.0
    if read(a).denied != read(b).denied:
        return 0.0
    score = BIAS + sum(w * x for w, x in zip(WEIGHTS, features(a, b), strict=True))
    return 1 / (1 + math.exp(-score))


def said_before(
    statement: str,
    variant: Variant,
    known: Iterable[Hypothesis],
    near: Callable[[Variant, Variant], bool] = operator.eq,
) -> Hypothesis | None:
    """The hypothesis on record that says the same; None if there is none.

    A variant says exactly what a statement can only describe: where the two variants differ, the
    ideas do, whatever the words. A baseline stands for no variant and differs from none.

    Args:
        statement: The new hypothesis in words.
        variant: What it proposes to run.
        known: Those on record; dropped ones do not count.
        near: When two variants are one experiment, e.g. `Space.near`.
    """
    for one in known:
        if one.state is HypothesisState.DROPPED:
            continue
        vague = one.variant.is_baseline or variant.is_baseline
        if not vague and not near(one.variant, variant):
            continue
        if same_idea(statement, one.statement) >= THRESHOLD:
            return one
    return None


def _plain_words(text: str) -> list[str]:
    return re.findall(r"[\w.]+", text.lower().rstrip("."))


def features(a: str, b: str) -> tuple[float, ...]:
    """How far two statements agree: one number for each of `WEIGHTS`."""
    left, right = read(a), read(b)
    knobs, both = left.knobs | right.knobs, left.knobs & right.knobs
    ways = left.way * right.way
    agree, differ = _agreement(left.values, right.values)
    return (
        len(both) / len(knobs) if knobs else 0.0,
        agree if both else 0.0,
        differ,
        *_agreement(left.options, right.options),
        float(ways > 0),
        float(ways < 0),
    )


def _agreement(left: frozenset[Any], right: frozenset[Any]) -> tuple[float, float]:
    """The share that two sets have in common, and whether it is none; neither if one is empty."""
    if not left or not right:
        return 0.0, 0.0
    return len(left & right) / len(left | right), float(not left & right)
