"""`Recipe`: every knob of the trainer, with its default, its search range and its origin.

The defaults are a CPU profile that is deliberately not the optimum: about five seconds on one core
and 1.80 bits per byte. A `Knob` states what the search may propose; the validators here refuse
only what cannot be trained at all, so that a recipe for a large GPU is as valid as this one.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from society.knobs import Knob

NANOCHAT = "github.com/karpathy/nanochat"
MODDED_NANOGPT = "github.com/KellerJordan/modded-nanogpt"
MUON = "Jordan et al. 2024, Muon"
POLAR_EXPRESS = "Amsel et al. 2025, arXiv:2505.16932"
CAUTIOUS_DECAY = "Chen et al. 2025, arXiv:2510.12402"
NORMUON = "Li et al. 2025, NorMuon, arXiv:2510.05491"

_VALUE_EMBEDS = ("value_gate", "value_embed_dist", "value_embed_init", "value_embed_lr")
_MUON = ("momentum_start", "momentum_final", "momentum_ramp", "muon_beta2", "polar_steps")

Positive = Field(gt=0, allow_inf_nan=False)
NonNegative = Field(ge=0, allow_inf_nan=False)
Fraction = Field(ge=0, le=1, allow_inf_nan=False)
Beta = Field(ge=0, lt=1, allow_inf_nan=False)


class Recipe(BaseModel, frozen=True, extra="forbid"):
    """What one training run does; every field may be varied."""

    # ---------------------------------------------------------------- shape
    depth: Annotated[
        int,
        Field(ge=1),
        Knob(
            low=1,
            high=8,
            unit="layers",
            group="shape",
            about="More layers make a stronger model and fewer steps for the same FLOPs.",
            source=NANOCHAT,
        ),
    ] = 4
    dim: Annotated[
        int,
        Field(ge=2),
        Knob(
            choices=(64, 80, 96, 128),
            log=True,
            unit="channels",
            group="shape",
            about="Width of the residual stream; work per token grows with its square. Narrower "
            "matrices keep a CPU core waiting (48: 1.3 times, 32: twice the seconds per FLOP).",
            source=NANOCHAT,
        ),
    ] = 64
    aspect_ratio: Annotated[
        int,
        Field(ge=0),
        Knob(
            choices=(0, 8, 12, 24, 32),
            unit="channels a layer",
            group="shape",
            about="Width per layer: if not 0, the width is depth times this, rounded up to fit "
            "the heads, and dim does not count.",
            source=NANOCHAT,
        ),
    ] = 0
    heads: Annotated[
        int,
        Field(ge=1),
        Knob(
            choices=(1, 2, 4),
            log=True,
            unit="heads",
            group="shape",
            about="Attention heads a layer; each gets dim / heads channels unless head_size says.",
            source="Vaswani et al. 2017, arXiv:1706.03762",
        ),
    ] = 2
    head_size: Annotated[
        int,
        Field(ge=0, multiple_of=2),
        Knob(
            choices=(0, 16, 24, 64),
            unit="channels",
            group="shape",
            about="Channels of one head; 0 for dim / heads. Heads then need not fill the width.",
            source="Bhojanapalli et al. 2020, arXiv:2002.07028",
        ),
    ] = 0
    kv_heads: Annotated[
        int,
        Field(ge=0),
        Knob(
            choices=(0, 1),
            unit="heads",
            group="shape",
            about="Key and value heads a layer, each shared by as many query heads; 0 for all.",
            source="Ainslie et al. 2023, GQA, arXiv:2305.13245",
        ),
    ] = 0
    mlp_ratio: Annotated[
        int,
        Field(ge=1),
        Knob(
            low=1,
            high=8,
            unit="multiple of dim",
            group="shape",
            about="Hidden width of the feed-forward part.",
            source="Vaswani et al. 2017, arXiv:1706.03762",
        ),
    ] = 4
    activation: Annotated[
        Literal["relu2", "gelu", "swiglu"],
        Knob(
            choices=("relu2", "gelu", "swiglu"),
            group="shape",
            about="Non-linearity of the feed-forward part; swiglu adds a third matrix.",
            source="So et al. 2021, Primer, arXiv:2109.08668; Shazeer 2020, arXiv:2002.05202",
        ),
    ] = "relu2"
    vocab: Annotated[
        int,
        Field(ge=257, le=65536),
        Knob(
            choices=(512, 1024, 2048, 4096),
            log=True,
            unit="tokens",
            group="shape",
            about="Size of the byte-pair vocabulary: fewer, longer tokens and larger tables.",
            source="Sennrich et al. 2016, arXiv:1508.07909",
        ),
    ] = 1024
    tie_embeddings: Annotated[
        bool,
        Knob(
            group="shape",
            about="Read and write tokens through one table, which then learns at head_lr.",
            source="Press and Wolf 2017, arXiv:1608.05859",
        ),
    ] = False
    norm_placement: Annotated[
        Literal["pre", "post", "sandwich"],
        Knob(
            choices=("pre", "post", "sandwich"),
            group="shape",
            about="Norm before each part of a layer, after its sum, or before and after the part.",
            source="Xiong et al. 2020, arXiv:2002.04745",
        ),
    ] = "pre"

    # ------------------------------------------------------------ attention
    seq_len: Annotated[
        int,
        Field(ge=2),
        Knob(
            choices=(32, 64, 128, 256),
            log=True,
            unit="tokens",
            group="attention",
            about="Length T of a row, in training and in evaluation.",
            source=NANOCHAT,
        ),
    ] = 128
    window_pattern: Annotated[
        str,
        Field(pattern=r"^[SL]+$"),
        Knob(
            choices=("SSSL", "SSL", "SL", "LS", "L"),
            group="attention",
            about="Short (S) and long (L) attention, tiled over the layers; the last is long.",
            source="Brown et al. 2020, arXiv:2005.14165; " + NANOCHAT,
        ),
    ] = "SSSL"
    short_window: Annotated[
        float,
        Field(gt=0, le=1),
        Knob(
            choices=(0.0625, 0.125, 0.25, 0.5, 0.75),
            log=True,
            unit="fraction of seq_len",
            group="attention",
            about="How far back a short layer looks.",
            source=NANOCHAT,
        ),
    ] = 0.5
    rope_base: Annotated[
        float,
        Positive,
        Knob(
            low=100,
            high=1e6,
            log=True,
            tolerance=0.05,  # a factor of 1.6; the longest wavelengths exceed a row anyway
            unit="base",
            group="attention",
            about="Slowest wavelength of the rotary position encoding.",
            source="Su et al. 2021, RoFormer, arXiv:2104.09864",
        ),
    ] = 10000.0
    qk_scale: Annotated[
        float,
        Positive,
        Knob(
            low=0.5,
            high=2,
            log=True,
            unit="factor",
            group="attention",
            about="Factor on queries and keys after their norm; larger makes attention sharper.",
            source=NANOCHAT + ", autoresearch round 2",
        ),
    ] = 1.0
    value_embeds: Annotated[
        Literal["off", "alternate", "all", "last", "first_half", "last_half"],
        Knob(
            choices=("off", "alternate", "all", "last", "first_half", "last_half"),
            group="attention",
            about="Layers whose values get an embedding of the token itself.",
            source="Zhou et al. 2024, value residual learning, arXiv:2410.17897",
        ),
    ] = "alternate"
    value_gate: Annotated[
        Literal["learned", "fixed", "none"],
        Knob(
            choices=("learned", "fixed", "none"),
            group="attention",
            about="How the value embedding enters: by a gate that reads the stream, half and "
            "half, or added.",
            source="Zhou et al. 2024, arXiv:2410.17897",
        ),
    ] = "learned"

    # ------------------------------------------------------- residual stream
    residual_scalars: Annotated[
        Literal["off", "fixed", "learned"],
        Knob(
            choices=("off", "fixed", "learned"),
            group="residual",
            about="Whether each layer mixes the token embedding back in, and learns how much.",
            source=MODDED_NANOGPT,
        ),
    ] = "learned"
    residual_init: Annotated[
        float,
        Positive,
        Knob(
            low=0.5,
            high=1.5,
            unit="factor",
            group="residual",
            about="Initial share of the stream that each layer keeps.",
            source=MODDED_NANOGPT,
        ),
    ] = 1.0
    x0_init: Annotated[
        float,
        NonNegative,
        Knob(
            low=0,
            high=0.5,
            unit="factor",
            group="residual",
            about="Initial share of the token embedding mixed into each layer's input.",
            source=NANOCHAT,
        ),
    ] = 0.1
    skip_scale: Annotated[
        float,
        NonNegative,
        Knob(
            low=0,
            high=1,
            tolerance=0.005,  # 0 is no connection at all, 0.02 is a learned one
            unit="factor",
            group="residual",
            about="If not 0, early layers are added to late ones (a U-net) with learned weights "
            "that start here.",
            source=MODDED_NANOGPT,
        ),
    ] = 0.0

    # ------------------------------------------------------------------ init
    qkv_scale: Annotated[
        float,
        Positive,
        Knob(
            low=0.25,
            high=4,
            log=True,
            unit="factor",
            group="init",
            about="Initial scale of the query, key and value matrices.",
            source=NANOCHAT,
        ),
    ] = 1.0
    project_init: Annotated[
        float,
        NonNegative,
        Knob(
            low=0,
            high=2,
            unit="factor",
            group="init",
            about="Initial scale of the output projections; 0 lets each layer start as nothing.",
            source=NANOCHAT,
        ),
    ] = 0.0
    mlp_init: Annotated[
        float,
        Positive,
        Knob(
            low=0.1,
            high=4,
            log=True,
            unit="factor",
            group="init",
            about="Initial scale of the feed-forward part's input matrices.",
            source=NANOCHAT + ", autoresearch round 2",
        ),
    ] = 1.0
    value_embed_dist: Annotated[
        Literal["uniform", "normal"],
        Knob(
            choices=("uniform", "normal"),
            group="init",
            about="Distribution that value embeddings are drawn from, at the same spread.",
            source="autoresearch@home, 2026",
        ),
    ] = "uniform"
    value_embed_init: Annotated[
        float,
        NonNegative,
        Knob(
            low=0.05,
            high=4,
            log=True,
            unit="factor",
            group="init",
            about="Initial scale of the value embeddings.",
            source=NANOCHAT,
        ),
    ] = 1.0

    # ------------------------------------------------------------------ loss
    softcap: Annotated[
        float,
        Field(gt=0, le=80),
        Knob(
            low=5,
            high=60,
            log=True,
            unit="logits",
            group="loss",
            about="Logits are bounded smoothly to plus or minus this.",
            source="Gemma Team 2024, Gemma 2, arXiv:2408.00118",
        ),
    ] = 15.0
    label_smoothing: Annotated[
        float,
        Field(ge=0, lt=1),
        Knob(
            low=0,
            high=0.2,
            unit="probability",
            group="loss",
            about="Share of the target spread evenly over the vocabulary (training only).",
            source="Szegedy et al. 2016, arXiv:1512.00567",
        ),
    ] = 0.0
    z_loss: Annotated[
        float,
        NonNegative,
        Knob(
            choices=(0.0, 1e-5, 1e-4, 1e-3, 1e-2),
            unit="weight",
            group="loss",
            about="Weight of the squared log-partition (training only).",
            source="Chowdhery et al. 2022, PaLM, arXiv:2204.02311",
        ),
    ] = 0.0

    # ----------------------------------------------------------------- batch
    batch_tokens: Annotated[
        int,
        Field(ge=2),
        Knob(
            choices=(512, 1024, 2048, 4096),
            log=True,
            unit="tokens a step",
            group="batch",
            about="Larger batches are less noisy and leave fewer steps.",
            source="McCandlish et al. 2018, arXiv:1812.06162",
        ),
    ] = 1024

    # ----------------------------------------------------------------- rates
    lr_scale: Annotated[
        float,
        Positive,
        Knob(
            low=0.1,
            high=4,
            log=True,
            unit="factor",
            group="rates",
            about="Multiplies every learning rate.",
            source=NANOCHAT,
        ),
    ] = 1.0
    matrix_lr: Annotated[
        float,
        Positive,
        Knob(
            low=0.004,
            high=0.4,
            log=True,
            unit="per step",
            group="rates",
            about="Muon's learning rate, for every matrix inside the layers; AdamW uses a tenth.",
            source=MUON,
        ),
    ] = 0.04
    embedding_lr: Annotated[
        float,
        Positive,
        Knob(
            low=0.06,
            high=6,
            log=True,
            unit="per step at dim 768",
            group="rates",
            about="AdamW's learning rate for token embeddings.",
            source=NANOCHAT,
        ),
    ] = 0.6
    value_embed_lr: Annotated[
        float,
        Positive,
        Knob(
            low=0.06,
            high=6,
            log=True,
            unit="per step at dim 768",
            group="rates",
            about="AdamW's learning rate for value embeddings.",
            source=NANOCHAT,
        ),
    ] = 0.6
    head_lr: Annotated[
        float,
        Positive,
        Knob(
            low=0.0004,
            high=0.08,
            log=True,
            unit="per step at dim 768",
            group="rates",
            about="AdamW's learning rate for the output head (and a tied table).",
            source=NANOCHAT,
        ),
    ] = 0.004
    scalar_lr: Annotated[
        float,
        Positive,
        Knob(
            low=0.005,
            high=5,
            log=True,
            unit="per step at dim 768",
            group="rates",
            about="AdamW's learning rate for x0 and skip scalars.",
            source=NANOCHAT,
        ),
    ] = 0.5
    residual_lr: Annotated[
        float,
        Positive,
        Knob(
            low=5e-05,
            high=0.05,
            log=True,
            unit="per step at dim 768",
            group="rates",
            about="AdamW's learning rate for residual scalars.",
            source=NANOCHAT,
        ),
    ] = 0.005

    # -------------------------------------------------------------- schedule
    warm_up: Annotated[
        float,
        Fraction,
        Knob(
            low=0,
            high=0.5,
            unit="fraction of the run",
            group="schedule",
            about="Rates rise linearly from zero for this long.",
            source="Goyal et al. 2017, arXiv:1706.02677",
        ),
    ] = 0.0
    warm_down: Annotated[
        float,
        Fraction,
        Knob(
            low=0,
            high=1,
            unit="fraction of the run",
            group="schedule",
            about="Rates fall to final_lr over this last part.",
            source="Hägele et al. 2024, arXiv:2405.18392",
        ),
    ] = 0.5
    warm_down_shape: Annotated[
        Literal["linear", "cosine", "sqrt"],
        Knob(
            choices=("linear", "cosine", "sqrt"),
            group="schedule",
            about="How rates fall: by a line, half a cosine, or 1 - sqrt.",
            source="Hägele et al. 2024, arXiv:2405.18392",
        ),
    ] = "linear"
    final_lr: Annotated[
        float,
        Fraction,
        Knob(
            low=0,
            high=0.5,
            unit="fraction of the rate",
            group="schedule",
            about="Where the warm-down ends.",
            source=NANOCHAT,
        ),
    ] = 0.0
    momentum_ramp: Annotated[
        float,
        Fraction,
        Knob(
            low=0,
            high=1,
            unit="fraction of the run",
            group="schedule",
            about="Muon's momentum rises from its first to its final value for this long.",
            source=MODDED_NANOGPT,
        ),
    ] = 0.28
    decay_shape: Annotated[
        Literal["linear", "constant", "cosine"],
        Knob(
            choices=("linear", "constant", "cosine"),
            group="schedule",
            about="How weight decay moves over the run: to zero by a line or half a cosine, or "
            "not at all.",
            source=MODDED_NANOGPT,
        ),
    ] = "linear"

    # ------------------------------------------------------------- optimiser
    optimizer: Annotated[
        Literal["muon", "adamw"],
        Knob(
            choices=("muon", "adamw"),
            group="optimiser",
            about="What trains the matrices inside the layers; everything else is AdamW's.",
            source=MUON,
        ),
    ] = "muon"
    momentum_start: Annotated[
        float,
        Beta,
        Knob(
            low=0.5,
            high=0.98,
            unit="fraction kept a step",
            group="optimiser",
            about="Muon's momentum in the first step.",
            source=MODDED_NANOGPT,
        ),
    ] = 0.85
    momentum_final: Annotated[
        float,
        Beta,
        Knob(
            low=0.8,
            high=0.99,
            tolerance=0.01,  # 0.95 and 0.954 remember 20 and 22 steps, 0.986 and 0.99 71 and 100
            unit="fraction kept a step",
            group="optimiser",
            about="Muon's momentum after the ramp.",
            source=MUON,
        ),
    ] = 0.95
    muon_beta2: Annotated[
        float,
        Beta,
        Knob(
            low=0.8,
            high=0.999,
            tolerance=0.005,  # 0.995 and 0.999 remember 200 and 1,000 steps
            unit="fraction kept a step",
            group="optimiser",
            about="Memory of Muon's per-neuron second moment.",
            source=NORMUON,
        ),
    ] = 0.95
    polar_steps: Annotated[
        int,
        Field(ge=1),
        Knob(
            low=1,
            high=8,
            unit="iterations",
            group="optimiser",
            about="How closely Muon's updates are orthogonalised; charged to the budget.",
            source=POLAR_EXPRESS,
        ),
    ] = 5
    weight_decay: Annotated[
        float,
        NonNegative,
        Knob(
            low=0,
            high=1,
            unit="per unit of rate",
            group="optimiser",
            about="Decay of the matrices (cautious under Muon).",
            source=CAUTIOUS_DECAY,
        ),
    ] = 0.2
    adam_decay: Annotated[
        float,
        NonNegative,
        Knob(
            low=0,
            high=1,
            unit="per unit of rate",
            group="optimiser",
            about="Decay of the embedding and output tables.",
            source="Loshchilov and Hutter 2019, arXiv:1711.05101",
        ),
    ] = 0.0
    adam_beta1: Annotated[
        float,
        Beta,
        Knob(
            low=0.5,
            high=0.98,
            unit="fraction kept a step",
            group="optimiser",
            about="AdamW's memory of the gradient.",
            source="Kingma and Ba 2014, arXiv:1412.6980",
        ),
    ] = 0.8
    adam_beta2: Annotated[
        float,
        Beta,
        Knob(
            low=0.8,
            high=0.999,
            tolerance=0.005,  # 0.995 and 0.999 remember 200 and 1,000 steps
            unit="fraction kept a step",
            group="optimiser",
            about="AdamW's memory of the squared gradient.",
            source="Kingma and Ba 2014, arXiv:1412.6980",
        ),
    ] = 0.95

    # ------------------------------------------------------------------ data
    data_order: Annotated[
        Literal[
            "shuffled",
            "corpus",
            "reversed",
            "short_first",
            "long_first",
            "easy_first",
            "hard_first",
            "by_domain",
        ],
        Knob(
            choices=(
                "shuffled",
                "corpus",
                "reversed",
                "short_first",
                "long_first",
                "easy_first",
                "hard_first",
                "by_domain",
            ),
            group="data",
            about="Order of the run's rows: shuffled, as written or backwards, by document "
            "length, by unigram surprisal, or by domain.",
            source="Bengio et al. 2009, Curriculum learning",
        ),
    ] = "shuffled"
    packing: Annotated[
        Literal["contiguous", "documents", "best_fit"],
        Knob(
            choices=("contiguous", "documents", "best_fit"),
            group="data",
            about="How documents fill rows: one stream cut into rows, rows within documents, or "
            "whole documents by best fit.",
            source="Ding et al. 2024, arXiv:2404.10830; " + NANOCHAT,
        ),
    ] = "contiguous"
    repeats: Annotated[
        int,
        Field(ge=1),
        Knob(
            choices=(1, 2, 4, 8, 16),
            log=True,
            unit="passes",
            group="data",
            about="How often each row is seen, by using fewer different ones.",
            source="Muennighoff et al. 2023, arXiv:2305.16264",
        ),
    ] = 1
    domain_mix: Annotated[
        float,
        Fraction,
        Knob(
            low=0,
            high=1,
            unit="exponent",
            group="data",
            about="Domains are drawn in proportion to their size to this power: 1 as they are, "
            "0 equally.",
            source="Xue et al. 2021, mT5, arXiv:2010.11934",
        ),
    ] = 1.0

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        if not self.aspect_ratio:
            return self.dim
        fit = 2 * self.heads
        return -(-self.depth * self.aspect_ratio // fit) * fit

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.head_size or self.width // self.heads

    @property
    def kv_count(self) -> int:
        """Key and value heads a layer."""
        return self.kv_heads or self.heads

    @property
    def skips(self) -> int:
        """Pairs of an early and a late layer that are connected."""
        return self.depth // 2 if self.skip_scale else 0

    @property
    def rows(self) -> int:
        """Rows of `seq_len` tokens in one batch."""
        return self.batch_tokens // self.seq_len

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens each layer attends to, itself included, first layer to last."""
        short = max(1, math.floor(self.seq_len * self.short_window))
        reach = {"S": short, "L": self.seq_len}
        pattern = self.window_pattern
        inner = [reach[pattern[i % len(pattern)]] for i in range(self.depth - 1)]
        return (*inner, self.seq_len)

    @property
    def value_layers(self) -> tuple[int, ...]:
        """Indices of the layers with a value embedding; `alternate` includes the last layer."""
        last, half = self.depth - 1, self.depth // 2
        layers = {
            "off": range(0),
            "alternate": range(last % 2, self.depth, 2),
            "all": range(self.depth),
            "last": range(last, self.depth),
            "first_half": range(self.depth - half),
            "last_half": range(half, self.depth),
        }
        return tuple(layers[self.value_embeds])

    @property
    def idle(self) -> frozenset[str]:
        """Knobs that change nothing in this recipe, because another one has switched them off."""
        cases = [
            (self.value_embeds == "off", _VALUE_EMBEDS),
            (self.residual_scalars == "off", ("residual_init", "x0_init")),
            (self.residual_scalars != "learned", ("residual_lr",)),
            (self.residual_scalars != "learned" and not self.skips, ("scalar_lr",)),
            (self.optimizer != "muon", _MUON),
            (not self.weight_decay and not self.adam_decay, ("decay_shape",)),
            (self.momentum_ramp == 0, ("momentum_start",)),
            (self.warm_down == 0, ("warm_down_shape", "final_lr")),
            (self.aspect_ratio != 0, ("dim",)),
            (self.tie_embeddings, ("embedding_lr",)),
            (set(self.windows) == {self.seq_len}, ("short_window",)),
            (self.depth == 1, ("window_pattern", "skip_scale")),
        ]
        return frozenset(name for holds, names in cases if holds for name in names)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}; choose kv_heads "
                "that do, or 0."
            )
        if self.head_size:
            return self
        if self.width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide dim={self.dim}; choose heads that do."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"heads={self.heads} leaves dim / heads = {self.head_dim} channels a head; rotary "
                "position encoding needs an even number. Change heads or dim."
            )
        return self

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        if self.batch_tokens % self.seq_len:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} is not a multiple of seq_len={self.seq_len}; "
                "a batch is made of whole rows."
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warm_up + self.warm_down > 1:
            raise ValueError(
                f"warm_up={self.warm_up} and warm_down={self.warm_down} overlap; together they "
                "may not exceed 1."
            )
        return self
