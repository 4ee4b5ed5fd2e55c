"""Every knob of a domain-transfer sweep, checked once, and JSON both ways."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from fastmask.transfer import checks, variations

Strategy = Literal["naive", "editor", "binary", "kl", "lowrank", "magnitude", "random"]
Start = Literal["source-start", "source-end", "random"]
Scaling = Literal["unit", "centred", "standard", "none"]
Unit = Literal["gradient", "absolute"]
Policy = Literal["frozen", "affine", "per_task", "shared"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
# The paper's own three.
PAPER: tuple[Strategy, ...] = ("naive", "editor", "binary")
STARTS: tuple[Start, ...] = get_args(Start)
# Every stage makes its batches and noise from a seed below this: they key a 64-bit generator.
_SEEDS = 2**63
# A factor beyond this could not be told from infinity in float32.
_MOST = 1e30


@dataclass(frozen=True)
class Config:
    """Settings of a sweep: which runs, how masks are found, how heads are trained.

    Steps, not epochs: a run costs the same on every data set. Lengths are relative (see `scaling`,
    `source_lr`, the units of beta), so that one setting fits backbones of any width and feature size.
    How each default was chosen, and how flat its neighbourhood is, stands in docs/transfer.md.

    Attributes:
        data: "digits" or a folder `domain/class/image`.
        splits: folder of split files, or None for a seeded split.
        backbone: name of a frozen network; None takes digits_cnn for the digits, else efficientnet_lite0.
        weights: file of the backbone's weights, or None for the library's own.
        cache: folder of cached features; "auto" is the user's own cache folder, None keeps nothing.
        split_seed: of the split of each domain; the same for all seeds of the sweep.
        test_fraction: share of each class that is for testing, in (0, 1).
        holdout: share of the training part to hold out and to test on **in place of** the test part, in
            [0, 1): what settings are to be chosen on. 0 trains on all of it and tests on the test part.
        sources: domains to learn first; () for all.
        targets: domains to fine-tune on; () for all.
        strategies: `naive`, `editor` and `binary` of the paper; `kl` and `lowrank` of its outlook;
            `magnitude` and `random`, what chance and size alone would freeze. Unmasked fine-tuning and
            scratch always run.
        starts: of the binary mask's free entries; the others take the first in the order
            source-start (values before stage 1; in `layers` the pretrained ones), source-end (values after
            it), random (fresh draw).
        vary: knobs to vary beside these settings, each `NAME=V1,V2,...` (see variations.KNOBS): one run
            more for each value, for every strategy that has the knob. A varied beta freezes `l > 0`,
            a varied editor_share its quantile.
        seeds: how many seeds.
        seed: the first seed.
        hidden: units of a hidden layer of the head; 0 is a linear head. The last layer is masked.
        layers: the backbone's layers that are masked and fine-tuned too, by name or pattern (`stage4.*`);
            () leaves the backbone as it is and works on its features alone.
        scaling: what the masked layer's input goes through: `unit` x / |x|; `centred` the same after
            subtracting the source's training mean; `standard` (x - mean) / std / sqrt(K) with the
            source's training statistics; `none`.
        bn_policy: what becomes of the backbone's batch norms, where `layers` are fine-tuned: `frozen`,
            `affine`, `per_task` or `shared` (see fastmask.nn); without `layers`, they are frozen.
        batch: rows of a step, or all rows of a smaller domain.
        source_steps: Adam steps of stage 1.
        source_lr: its step, in 1 / sqrt(fan_in), the bound of a layer's initial values.
        hidden_lr: the same for the hidden layer, which stays close to a random projection: what it would
            learn of the source alone, no target could use.
        layers_lr: the same for `layers`, in the root mean square of a layer's pretrained weight; norms and
            biases that learn take their layer's step.
        tau: temperature of the Gumbel-sigmoid, above 0.
        samples: masks drawn for each batch; divides it.
        logit_init: first logit; 2 starts with 88 % of the weights active.
        logit_clamp: bound on |logit|, above 0.
        mask_steps: Adam steps on the logits.
        mask_lr: their step.
        mask_clip: bound on the norm of the logits' gradient, or None.
        reg: `logit`, beta * sum(l); `sigmoid`, beta * sum(sigmoid(l)).
        beta: weight of the regulariser, at least 0.
        beta_unit: `gradient`, beta counts in running means of |dCE/dl|, so that neither the scale of the
            features nor the size of the layer moves the balance; `absolute`, beta as it stands.
        density: share to freeze: the largest logits; None freezes `l > 0` as the paper does. `magnitude`
            and `random` freeze this share as well (0.55 for None).
        scope: over what magnitude and random, and with `layers` the learned masks too, take their share:
            each `layer`, or all of them (`global`).
        naive_k: the naive mask freezes what lies `naive_k` standard deviations from the mean, above 0.
        editor_beta: weight of the anti-regulariser sum |dW|, below 0.
        editor_beta_unit: as beta_unit, of |dCE/ddW|.
        editor_steps: Adam steps on the edit.
        editor_lr: its step, in std(W).
        editor_init: std of the first edit, in std(W), above 0: at 0 an unused entry never moves.
        editor_cap: bound on |dW|, in std(W): without it the objective has no minimum.
        editor_tolerance: stop when the loss on the source is this much above that of W, in nats.
        editor_preserve: `ce`, the labels' cross-entropy; `kl`, KL divergence from the unedited outputs.
        editor_rule: `std`, freeze |dW| < mean - k * std; `quantile`, the smallest `editor_share`.
        editor_k: k of the rule `std`.
        editor_share: share that the rule `quantile` freezes, in (0, 1).
        lowrank_energy: share of the sum of squared singular values whose directions `lowrank` keeps,
            in (0, 1); of the rest of its edit it takes the editor's settings, but always freezes the
            smallest `editor_share`.
        target_steps: SGD steps of stage 3.
        target_lr: its step; with a schedule, the first.
        layers_target_lr: the same for `layers`, in the mean squared length of the pretrained weights of one
            unit of a layer: rescaling a layer before a norm then changes nothing.
        target_momentum: in [0, 1).
        target_weight_decay: at least 0; frozen entries do not decay.
        target_schedule: `cosine` or `constant`.
        train_unmasked: fine-tune the parameters without a mask too, in the baselines as well.
        exact_recall: keep the originals of what stage 3 may change in the mask files.
        engine: `grouped` trains runs that share rows as one problem; `loop` one after the other, slower,
            each to bits that depend on nothing else in the sweep.
        device: where heads are trained and features computed.
        out: run folder; it must be new or empty.
    """

    data: str = "digits"
    splits: str | None = None
    backbone: str | None = None
    weights: str | None = None
    cache: str | None = "auto"
    split_seed: int = 0
    test_fraction: float = 0.3
    holdout: float = 0.0
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    strategies: tuple[Strategy, ...] = PAPER
    starts: tuple[Start, ...] = STARTS
    vary: tuple[str, ...] = ()
    seeds: int = 3
    seed: int = 0
    hidden: int = 0
    layers: tuple[str, ...] = ()
    scaling: Scaling = "unit"
    bn_policy: Policy = "frozen"
    batch: int = 64
    source_steps: int = 500
    source_lr: float = 1.0
    hidden_lr: float = 0.01
    layers_lr: float = 0.03
    tau: float = 1.0
    samples: int = 4
    logit_init: float = 2.0
    logit_clamp: float = 10.0
    mask_steps: int = 500
    mask_lr: float = 1e-2
    mask_clip: float | None = 1.0
    reg: Literal["logit", "sigmoid"] = "logit"
    beta: float = 1.0
    beta_unit: Unit = "gradient"
    density: float | None = 0.55
    scope: Literal["layer", "global"] = "layer"
    naive_k: float = 1.0
    editor_beta: float = -0.3
    editor_beta_unit: Unit = "gradient"
    editor_steps: int = 300
    editor_lr: float = 0.03
    editor_init: float = 1e-3
    editor_cap: float = 3.0
    editor_tolerance: float = 0.1
    editor_preserve: Literal["ce", "kl"] = "ce"
    editor_rule: Literal["std", "quantile"] = "std"
    editor_k: float = 1.0
    editor_share: float = 0.55
    lowrank_energy: float = 0.5
    target_steps: int = 100
    target_lr: float = 60.0
    layers_target_lr: float = 0.001
    target_momentum: float = 0.9
    target_weight_decay: float = 0.0
    target_schedule: Literal["cosine", "constant"] = "cosine"
    train_unmasked: bool = False
    exact_recall: bool = False
    engine: Literal["grouped", "loop"] = "grouped"
    device: str = "cpu"
    out: str = "runs/transfer"

    def __post_init__(self) -> None:
        for name in ("sources", "targets", "strategies", "starts", "vary", "layers"):
            object.__setattr__(self, name, checks.names(name, getattr(self, name)))
        for name in ("data", "splits", "weights", "cache", "out", "device", "backbone"):
            object.__setattr__(self, name, checks.text(name, getattr(self, name)))
        _check_sweep(self)
        _check_training(self)
        _check_masks(self)
        _check_editor(self)

    @property
    def seed_range(self) -> range:
        """The seeds of the sweep."""
        return range(self.seed, self.seed + self.seeds)

    @property
    def first_start(self) -> Start:
        """The start of the strategies that run with one start only."""
        return next(start for start in STARTS if start in self.starts)

    @property
    def backbone_name(self) -> str:
        """The backbone's name where None was given."""
        if self.backbone is not None:
            return self.backbone
        return "digits_cnn" if self.data == "digits" else "efficientnet_lite0"

    def at(self, setting: str) -> Config:
        """These settings with one varied, such as `beta=0.3`; "" are these themselves."""
        return replace(self, vary=(), **variations.fields_of(setting)) if setting else self

    def pairs(self, domains: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        """The ordered pairs (source, target) to run, a target's together.

        Raises:
            ValueError: a domain is unknown, or no pair of two different domains is left.
        """
        for name in ("sources", "targets"):
            for domain in getattr(self, name):
                if domain not in domains:
                    raise ValueError(
                        f"{name}: expected one of {', '.join(domains)}, got {domain!r}"
                    )
        pairs = tuple(
            (source, target)
            for target in (self.targets or domains)
            for source in (self.sources or domains)
            if source != target
        )
        if not pairs:
            raise ValueError("sources, targets: expected two different domains, got one")
        return pairs

    def to_json(self) -> str:
        """Write as a JSON object, a field a key."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | dict[str, Any]) -> Config:
        """Read what `to_json` wrote, or its parsed object; fields left out take their defaults.

        Raises:
            ValueError: it is no JSON object, has an unknown field, or a value is refused.
        """
        value = json.loads(text) if isinstance(text, str) else text
        if not isinstance(value, dict):
            raise ValueError(f"config: expected a JSON object, got {type(value).__name__}")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise ValueError(f"config: unknown field {', '.join(unknown)}")
        return cls(**value)


def _check_sweep(config: Config) -> None:
    checks.one_of("strategies", config.strategies, STRATEGIES)
    checks.one_of("starts", config.starts, STARTS)
    if not config.starts:
        raise ValueError("starts: expected at least one")
    if len(config.sources) == 1 and config.sources == config.targets:
        raise ValueError(
            f"targets: expected a domain other than the source, got {config.targets[0]!r} for both"
        )
    checks.whole("seeds", config.seeds, 1)
    checks.whole("seed", config.seed, 0)
    checks.whole("split_seed", config.split_seed, 0)
    if config.seed + config.seeds > _SEEDS:
        raise ValueError(f"seed: expected seeds below 2**63, got {config.seed} and {config.seeds}")
    checks.number("test_fraction", config.test_fraction, above=0, below=1)
    checks.number("holdout", config.holdout, least=0, below=1)
    checks.one_of("bn_policy", (config.bn_policy,), get_args(Policy))
    if config.bn_policy != "frozen" and not config.layers:
        raise ValueError(
            f"bn_policy: expected frozen without layers of the backbone to fine-tune, "
            f"got {config.bn_policy!r}"
        )
    if config.layers and "lowrank" in config.strategies:
        raise ValueError("strategies: lowrank works on the head alone; leave it out with layers")
    checks.one_of("engine", (config.engine,), ("grouped", "loop"))
    _check_variations(config)
    checks.flag("train_unmasked", config.train_unmasked)
    checks.flag("exact_recall", config.exact_recall)


def _check_variations(config: Config) -> None:
    varied = [name for name, _ in map(variations.parse, config.vary)]
    if len(set(varied)) < len(varied):
        raise ValueError(f"vary: expected each name once, got {', '.join(varied)}")
    for name in varied:
        if not any(name in variations.KNOBS[strategy] for strategy in config.strategies):
            raise ValueError(
                f"vary: {name} is no knob of {', '.join(config.strategies) or 'no strategy'}"
            )
    for strategy in config.strategies:
        for setting in variations.settings(config.vary, strategy):
            config.at(setting)


def _check_training(config: Config) -> None:
    checks.whole("hidden", config.hidden, 0)
    checks.one_of("scaling", (config.scaling,), get_args(Scaling))
    checks.whole("batch", config.batch, 1)
    for name in ("source_steps", "mask_steps", "editor_steps", "target_steps"):
        checks.whole(name, getattr(config, name), 1)
    for name in (
        "source_lr", "hidden_lr", "layers_lr", "target_lr", "layers_target_lr", "mask_lr", "editor_lr",
    ):  # fmt: skip
        checks.number(name, getattr(config, name), above=0, most=_MOST)
    checks.number("target_momentum", config.target_momentum, least=0, below=1)
    checks.number("target_weight_decay", config.target_weight_decay, least=0, most=_MOST)
    checks.one_of("target_schedule", (config.target_schedule,), ("cosine", "constant"))


def _check_masks(config: Config) -> None:
    checks.number("tau", config.tau, above=0)
    checks.whole("samples", config.samples, 1)
    if config.batch % config.samples:
        raise ValueError(
            f"samples: expected a divisor of the batch of {config.batch} rows, got {config.samples}"
        )
    checks.number("logit_clamp", config.logit_clamp, above=0)
    checks.number("logit_init", config.logit_init)
    if abs(config.logit_init) > config.logit_clamp:
        raise ValueError(
            f"logit_init: expected at most logit_clamp = {config.logit_clamp} in size, "
            f"got {config.logit_init}"
        )
    if config.mask_clip is not None:
        checks.number("mask_clip", config.mask_clip, above=0)
    checks.one_of("reg", (config.reg,), ("logit", "sigmoid"))
    checks.number("beta", config.beta, least=0, most=_MOST)
    checks.one_of("beta_unit", (config.beta_unit,), get_args(Unit))
    if config.density is not None:
        checks.number("density", config.density, above=0, most=1)
    checks.one_of("scope", (config.scope,), ("layer", "global"))
    checks.number("naive_k", config.naive_k, above=0)


def _check_editor(config: Config) -> None:
    checks.number("editor_beta", config.editor_beta, least=-_MOST, below=0)
    checks.one_of("editor_beta_unit", (config.editor_beta_unit,), get_args(Unit))
    for name in ("editor_init", "editor_cap", "editor_tolerance"):
        checks.number(name, getattr(config, name), above=0)
    checks.one_of("editor_preserve", (config.editor_preserve,), ("ce", "kl"))
    checks.one_of("editor_rule", (config.editor_rule,), ("std", "quantile"))
    checks.number("editor_k", config.editor_k)
    checks.number("editor_share", config.editor_share, above=0, below=1)
    checks.number("lowrank_energy", config.lowrank_energy, above=0, below=1)
