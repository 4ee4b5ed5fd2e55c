"""What becomes of batch norms while tasks are learned: a policy that training mode does not undo."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin

Policy = Literal["frozen", "affine", "per_task", "shared"]

# What a norm remembers of itself until its policy is taken back.
_POLICY = "_batch_norm_policy"
_MODE = "_mode_without_policy"
_TRAINED = "_required_grad_without_policy"
_STATISTICS = ("running_mean", "running_var")
# Modules with such buffers and nothing to hold, by their full names: their packages are not imported here.
_CONSTANT = {
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
}
_TRACED = {"torch.nn.modules.module.Module", "torch.export.unflatten.InterpreterModule"}
_WORDS = {
    "frozen": "statistics as they are, in training too; affine not trained",
    "affine": "statistics as they are, in training too; affine trained",
    "per_task": "statistics and affine are the task's, both learned",
    "shared": "statistics and affine are every task's: what one task learns, the others forget",
}


@dataclass(frozen=True, repr=False)
class BatchNormRecord:
    """What `set_batch_norm_policy` did: norms by name, values trained, bytes of a task, norms left alone."""

    policy: Policy
    norms: tuple[str, ...]
    channels: int
    trained: int
    task_bytes: int
    left_alone: Mapping[str, str]

    def __repr__(self) -> str:
        lines = [f"batch norm, {self.policy}: no norm with running statistics, nothing to do"]
        if self.norms:
            lines = [
                f"batch norm, {self.policy}: {len(self.norms)} norms of {self.channels:,} channels: "
                f"{_WORDS[self.policy]}; {self.trained:,} values trained, {self.task_bytes:,} bytes to "
                "store for each task"
            ]
        lines += [f"  - {_called(name)}: {reason}" for name, reason in self.left_alone.items()]
        return "\n".join(lines)


def set_batch_norm_policy(model: nn.Module, policy: Policy = "frozen") -> BatchNormRecord:
    """Say what becomes of the norms with running statistics in `model`, in place, until it is said again.

    Masks do not hold what a norm learns: with every parameter frozen, training on other data still moves
    the statistics, and every output with them.

    - `frozen`: each norm normalises by the statistics that it has, in training as in evaluation, and its
      affine parameters are not trained. A task has nothing of it to store.
    - `affine`: the same statistics; the affine parameters are trained, and are the task's.
    - `per_task`: training moves the statistics and trains the affine parameters; all of it is the task's:
      `batch_norm_state_dict` takes it, `load_batch_norm_state_dict` puts another task's in its place.
    - `shared`: as torch does and as the model was before any policy, with a warning: what one task learns
      the others forget. Takes a policy back exactly: modes and `requires_grad` are what they would be.

    `model.train()` leaves a held norm in evaluation (`norm.training` is False); so do copies, pickles and
    state dicts, whose keys are unchanged. Resetting held statistics is refused, which
    `torch.optim.swa_utils.update_bn` would do. A frozen parameter loses its `.grad`, so that an optimizer
    that has it passes it by; `model.requires_grad_()` afterwards would train it again.
    `convert_sync_batchnorm` makes new norms, which know no policy: convert first.

    Norms are torch's `BatchNorm1d` to `3d`, `SyncBatchNorm`, `InstanceNorm` that tracks statistics, what is
    derived from them (timm's `BatchNormAct2d`), and every module with buffers named `running_mean` or
    `running_var`. Left alone, and named in the record: batch norms without statistics, constant ones
    (torchvision's `FrozenBatchNorm2d`) and traced graphs. Layer and group norms keep no statistics and are
    not asked about.

    Args:
        model: any network; one without such norms is no error, and the record says so.
        policy: `frozen`, `affine`, `per_task` or `shared`.

    Returns:
        The names, what is trained and how many bytes a task has to store; its repr says it in words.

    Raises:
        TypeError: `model` is no module.
        ValueError: `policy` is none of these; a norm is lazy or scripted. Nothing has been changed then.

    Source: Gulrajani & Lopez-Paz, ICLR 2021 (DomainBed's `freeze_bn` is `affine`); Mallya et al., ECCV 2018
        (Piggyback, `frozen`).
    """
    _check_model(model)
    if policy not in get_args(Policy):
        wanted = ", ".join(map(repr, get_args(Policy)))
        raise ValueError(f"policy: expected one of {wanted}, got {policy!r}")
    norms, left_alone = _find(model)
    for norm in norms:
        _release(norm)
        if policy != "shared":
            _hold(norm, policy)
    if policy == "shared" and norms:
        warnings.warn(
            f"batch norm, shared: {len(norms)} norms learn from every task; what they learn of one, the "
            "others forget, whatever the masks say",
            stacklevel=2,
        )
    own = [parameter for norm in norms for parameter in _affine(norm).values()]
    return BatchNormRecord(
        policy,
        tuple(norms.values()),
        sum(_statistics(norm)[0].numel() for norm in norms),
        sum(parameter.numel() for parameter in own if parameter.requires_grad),
        sum(t.numel() * t.element_size() for n in norms for t in _of_task(n).values()),
        MappingProxyType(left_alone),
    )


def batch_norm_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of what a task has of the norms of `model`, under the keys of its state dict.

    Affine parameters under `affine`, statistics besides under `per_task`, nothing under `frozen`.

    Raises:
        TypeError: `model` is no module.
        ValueError: a norm has no policy, or `shared`: its values are no task's.
    """
    return {key: tensor.detach().clone() for key, tensor in _task_tensors(model).items()}


@torch.no_grad()
def load_batch_norm_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy into the norms of `model` what `batch_norm_state_dict` returned for a task.

    In place, so that optimizers and compiled code see it.

    Args:
        model: a network with the policies that `state` was taken under.
        state: all of a task's tensors and no others, of any device.

    Raises:
        TypeError: `model` is no module, or a tensor is of another dtype.
        ValueError: a norm has no policy; keys are missing or unknown; a shape differs. Nothing has been
            changed then.
    """
    own = _task_tensors(model)
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"state: expected the {len(own)} tensors of the model's norms, missing {missing}, unknown "
            f"{unknown}; nothing was changed"
        )
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise ValueError(
                f"state: expected {key} of shape {tuple(tensor.shape)}, got {tuple(state[key].shape)}; "
                "nothing was changed"
            )
        if state[key].dtype != tensor.dtype:
            raise TypeError(
                f"state: expected {key} of dtype {tensor.dtype}, got {state[key].dtype}; "
                "nothing was changed"
            )
    for key, tensor in own.items():
        tensor.copy_(state[key])


def _find(model: nn.Module) -> tuple[dict[nn.Module, str], dict[str, str]]:
    """The norms by name, and why others are left alone; raise on those that cannot be held."""
    norms: dict[nn.Module, str] = {}
    left_alone: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and isinstance(module, _NormBase):
            raise ValueError(
                f"model: {_called(name)} is lazy and has no statistics yet (run the model once first); "
                "nothing was changed"
            )
        if not _statistics(module):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                left_alone[name] = "it keeps no statistics and always normalises by the batch"
        elif isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: {_called(name)} is scripted and cannot be held in evaluation (set the policy "
                "before torch.jit.script); nothing was changed"
            )
        elif _full_name(type(module)) in _TRACED:
            left_alone[name] = "it is part of a traced graph, whose mode is fixed"
        elif not _CONSTANT.isdisjoint(map(_full_name, type(module).__mro__)):
            left_alone[name] = f"it is constant already ({type(module).__name__})"
        else:
            norms[module] = name
    return norms, left_alone


def _hold(norm: nn.Module, policy: Policy) -> None:
    """Put a norm without a policy under one."""
    state = norm.__dict__
    state[_POLICY] = policy
    state[_TRAINED] = {key: p.requires_grad for key, p in _affine(norm).items()}
    for parameter in _affine(norm).values():
        parameter.requires_grad_(policy != "frozen")
        if policy == "frozen":
            parameter.grad = None
    if policy != "per_task":
        state[_MODE] = norm.training
        norm.training = False
        # Attributes of the object, found before the methods of its class. Partials of functions of this
        # module, unlike closures and changed classes, are copied and pickled with any type of norm.
        state["train"] = partial(_train_held, norm)
        if hasattr(norm, "reset_running_stats"):
            state["reset_running_stats"] = partial(_refuse_reset, policy)


def _release(norm: nn.Module) -> None:
    """Take a norm's policy back, if it has one: as if it had never been."""
    state = norm.__dict__
    state.pop(_POLICY, None)
    trained = state.pop(_TRAINED, {})
    for key, parameter in _affine(norm).items():
        parameter.requires_grad_(trained.get(key, parameter.requires_grad))
    if _MODE in state:
        norm.training = state.pop(_MODE)
        del state["train"]
        state.pop("reset_running_stats", None)


def _train_held(norm: nn.Module, mode: bool = True) -> nn.Module:
    """`norm.train(mode)` of a held norm: its children follow, it stays in evaluation."""
    type(norm).train(norm, mode)
    norm.__dict__[_MODE] = norm.training
    norm.training = False
    return norm


def _refuse_reset(policy: Policy) -> None:
    raise RuntimeError(
        f"running statistics are held by the batch-norm policy {policy!r} and cannot be reset; "
        "fastmask.nn.set_batch_norm_policy(model, 'per_task') first"
    )


def _affine(norm: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in norm._parameters.items() if p is not None}


def _statistics(norm: nn.Module) -> list[Tensor]:
    # Not `_buffers`, which a scripted module has not as a dict.
    return [t for key, t in norm.named_buffers(recurse=False) if key in _STATISTICS]


def _of_task(norm: nn.Module) -> dict[str, Tensor]:
    """What of a norm a task has, by its own key; empty without a policy."""
    policy = norm.__dict__.get(_POLICY)
    if policy not in ("affine", "per_task"):
        return {}
    tensors: dict[str, Tensor] = dict(_affine(norm))
    if policy == "per_task":
        kept = norm._buffers.keys() - norm._non_persistent_buffers_set
        tensors |= {key: t for key, t in norm._buffers.items() if t is not None and key in kept}
    return tensors


def _task_tensors(model: nn.Module) -> dict[str, Tensor]:
    _check_model(model)
    tensors: dict[str, Tensor] = {}
    for norm, name in _find(model)[0].items():
        if _POLICY not in norm.__dict__:
            raise ValueError(
                f"model: expected every norm to have a policy, {_called(name)} has none or 'shared': its "
                "values are no task's (fastmask.nn.set_batch_norm_policy first)"
            )
        tensors |= {f"{name}.{key}" if name else key: t for key, t in _of_task(norm).items()}
    return tensors


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _called(name: str) -> str:
    return name or "the model itself"
