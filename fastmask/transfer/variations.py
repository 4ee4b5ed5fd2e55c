"""Settings that a sweep varies beside its own: one knob of one strategy at a time, for trade-off curves."""

from __future__ import annotations

from typing import Any

# What each strategy's mask can be varied by. Learning rates of stage 3 are no knobs of a mask.
_LEARNED = ("density", "beta", "tau", "samples", "logit_init", "mask_steps", "mask_lr")
_EDITED = ("editor_share", "editor_beta", "editor_steps", "editor_tolerance")
KNOBS: dict[str, tuple[str, ...]] = {
    "naive": ("naive_k",),
    "editor": (*_EDITED, "editor_k"),
    "binary": _LEARNED,
    "kl": _LEARNED,
    "lowrank": (*_EDITED, "lowrank_energy"),
    "magnitude": ("density",),
    "random": ("density",),
}
# A knob that another setting would override takes that setting with it.
_IMPLIED: dict[str, dict[str, Any]] = {
    "beta": {"density": None},
    "editor_share": {"editor_rule": "quantile"},
    "editor_k": {"editor_rule": "std"},
}
# What `--curves` varies.
CURVES = (
    "density=0.2,0.4,0.55,0.7,0.85",
    "beta=0.1,0.3,1,3",
    "tau=0.25,0.5,1,2,4",
    "naive_k=0.25,0.5,1,1.5,2",
    "editor_share=0.2,0.4,0.55,0.7,0.85",
)


def parse(text: str) -> tuple[str, tuple[int | float, ...]]:
    """Read `NAME=V1,V2,...`.

    Raises:
        ValueError: it is not of this form, NAME is no knob of a strategy, or a value is no number or
            comes twice.
    """
    name, equals, values = text.partition("=")
    known = sorted({knob for knobs in KNOBS.values() for knob in knobs})
    if not equals or name not in known:
        raise ValueError(
            f"vary: expected NAME=V1,V2,... with NAME of {', '.join(known)}, got {text!r}"
        )
    try:
        found = tuple(_number(value) for value in values.split(","))
    except ValueError:
        raise ValueError(f"vary: expected numbers after {name}=, got {values!r}") from None
    if len(set(found)) < len(found):
        raise ValueError(f"vary: expected each value of {name} once, got {values}")
    return name, found


def settings(vary: tuple[str, ...], strategy: str) -> tuple[str, ...]:
    """The settings, such as `beta=0.3`, that one strategy is run with beside the sweep's own."""
    return tuple(
        f"{name}={value:g}"
        for name, values in map(parse, vary)
        if name in KNOBS[strategy]
        for value in values
    )


def fields_of(setting: str) -> dict[str, Any]:
    """The fields of Config that a setting stands for: its own and those implied."""
    name, values = parse(setting)
    return {**_IMPLIED.get(name, {}), name: values[0]}


def _number(text: str) -> int | float:
    value = float(text)
    return (
        int(value) if value.is_integer() and "." not in text and "e" not in text.lower() else value
    )
