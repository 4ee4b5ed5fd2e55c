"""Mask files: what the report, and a later recall of the source model, read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastmask.bits import BitMask
from fastmask.errors import MaskFileError
from fastmask.report import atomic
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source
from fastmask.transfer.strategies import Found

FORMAT = "1"


def name(source: str, strategy: str, seed: int) -> str:
    """`<source>-<strategy>-seed<k>.safetensors`; a source that is no plain file name is marked by a hash."""
    plain = re.sub(r"[^\w. -]+", "_", source).lstrip(".")
    if plain != source:
        plain = f"{plain}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    return f"{plain}-{strategy}-seed{seed}.safetensors"


@dataclass(frozen=True, eq=False)
class Masked:
    """A masked parameter: its mask (1 = frozen), its values after and before stage 1, and the scores."""

    frozen: BitMask
    weight: Tensor
    initial: Tensor
    scores: Tensor | None


def write(
    path: Path,
    source: Source,
    strategy: str,
    found: Found,
    classes: tuple[str, ...],
    *,
    exact_recall: bool,
    train_unmasked: bool,
) -> None:
    """Write the mask of a head, whole or not at all.

    Args:
        path: file to write.
        source: the head it is of.
        strategy, found: what found it, and what it is.
        classes: names in the order of the labels.
        exact_recall: keep the originals of the free entries, in order.
        train_unmasked: stage 3 changes parameters without a mask too: keep theirs as well.

    Raises:
        RunFolderError: it cannot be written.
    """
    masked = Masked(found.frozen, source.trained[MASKED], source.initial[MASKED], found.scores)
    unmasked = {
        name: value for name, value in source.trained.items() if train_unmasked and name != MASKED
    }
    write_masks(
        path,
        (source.domain, strategy, source.seed),
        {MASKED: masked},
        classes,
        unmasked if exact_recall else None,
    )


def write_masks(
    path: Path,
    found: tuple[str, str, int],
    masked: Mapping[str, Masked],
    classes: tuple[str, ...],
    unmasked: Mapping[str, Tensor] | None,
) -> None:
    """Write the masks of a network, whole or not at all.

    Args:
        path: file to write.
        found: source, strategy and seed that the masks are of.
        masked: the masked parameters by name, the classifier's last.
        classes: names in the order of the labels.
        unmasked: for exact recall: originals of what stage 3 changes besides; None keeps no originals.

    Raises:
        RunFolderError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for key, own in masked.items():
        tensors[f"{key}.frozen"] = own.frozen.bits
        tensors[f"{key}.weight"] = own.weight
        tensors[f"{key}.initial"] = own.initial
        if own.scores is not None:
            tensors[f"{key}.scores"] = own.scores
        if unmasked is not None:
            tensors[f"{key}.originals"] = own.weight[~own.frozen.to_bool()]
    tensors |= {f"unmasked.{key}.originals": value for key, value in (unmasked or {}).items()}
    ones = sum(own.frozen.count() for own in masked.values())
    head = {
        "fastmask_format": FORMAT,
        "source": found[0],
        "strategy": found[1],
        "seed": str(found[2]),
        "shapes": json.dumps({key: list(own.weight.shape) for key, own in masked.items()}),
        "density": repr(ones / sum(own.frozen.numel() for own in masked.values())),
        "classes": json.dumps(list(classes)),
    }
    held = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    atomic.write(path, _ordered(save(held, head)))


def _ordered(content: bytes) -> bytes:
    """The same safetensors file with its header's keys in order: equal masks make equal bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def recall(mask_file: str | Path, head: nn.Module) -> None:
    """Put the source model back, bit for bit, into a head fine-tuned on a target, in place.

    Frozen entries never moved and are left alone; free ones take the originals that the file keeps.

    Args:
        mask_file: a mask file of a run with `exact_recall`.
        head: the head, or network, after stage 3; or any module with its parameters by name.

    Raises:
        MaskFileError: it is no mask file, keeps no originals, or does not fit the head; or the head's
            frozen entries are not those the mask was found on. The head is then as it was.
    """
    path = Path(mask_file)
    params: dict[str, Tensor] = {**dict(head.named_parameters()), **dict(head.named_buffers())}
    restored: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            if said.get("fastmask_format") != FORMAT:
                raise MaskFileError(
                    f"{path}: fastmask_format: expected {FORMAT!r}, got {said.get('fastmask_format')!r}"
                )
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            shapes = json.loads(said["shapes"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, MaskFileError):
            raise
        raise MaskFileError(f"{path}: no mask file that can be read ({error})") from error
    for key, shape in shapes.items():
        restored[key] = _restored(path, key, torch.Size(shape), held, params)
    for key, value in held.items():
        if key.startswith("unmasked."):
            plain = key.removeprefix("unmasked.").removesuffix(".originals")
            _fits(path, plain, value.shape, params)
            restored[plain] = value
    with torch.no_grad():
        for key, value in restored.items():
            params[key].copy_(value)


def _fits(path: Path, key: str, shape: torch.Size, params: dict[str, Tensor]) -> Tensor:
    if key not in params or params[key].shape != shape:
        got = tuple(params[key].shape) if key in params else "none"
        raise MaskFileError(f"{path}: head: expected {key} of shape {tuple(shape)}, got {got}")
    return params[key]


def _restored(
    path: Path,
    key: str,
    shape: torch.Size,
    held: dict[str, Tensor],
    params: dict[str, Tensor],
) -> Tensor:
    param = _fits(path, key, shape, params)
    originals = held.get(f"{key}.originals")
    if originals is None:
        raise MaskFileError(
            f"{path}: it keeps no originals of the free entries of {key}; run with exact_recall"
        )
    try:
        free = ~BitMask(held[f"{key}.frozen"], shape).to_bool()
    except (KeyError, TypeError, ValueError) as error:
        raise MaskFileError(f"{path}: {key}.frozen cannot be used ({error})") from error
    trained = held.get(f"{key}.weight")
    now = param.detach().cpu()
    if originals.shape != (int(free.sum()),) or originals.dtype != now.dtype:
        raise MaskFileError(
            f"{path}: {key}.originals: expected {int(free.sum())} values of {now.dtype}, "
            f"got {tuple(originals.shape)} of {originals.dtype}"
        )
    value = now.clone()
    value[free] = originals
    if trained is None or not torch.equal(value.view(torch.int32), trained.view(torch.int32)):
        raise MaskFileError(
            f"{path}: the frozen entries of {key} in this head are not those the mask was found on"
        )
    return value
