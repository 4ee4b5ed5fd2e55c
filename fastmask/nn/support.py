"""Which layers can take a mask as they stand, and in words why others cannot."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from fastmask.masks import Mask
from fastmask.nn.attention import MaskedMultiheadAttention, projections
from fastmask.nn.conv import MaskedConv2d
from fastmask.nn.conv_same import MaskedConv2dSame
from fastmask.nn.linear import MaskedLinear

# A plain layer's type and the one that takes its place. A masked type has the forward and the submodule
# `mask` besides and nothing else, so that a layer becomes the other by changing its class.
MASKED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MaskedLinear,
    nn.Conv2d: MaskedConv2d,
    nn.MultiheadAttention: MaskedMultiheadAttention,
}
# Types of packages that are not imported here, by their full names.
MASKED_BY_NAME: dict[str, type[nn.Module]] = {
    "timm.layers.conv2d_same.Conv2dSame": MaskedConv2dSame,
    # Outside of TorchScript it computes what torch's own does.
    "timm.layers.linear.Linear": MaskedLinear,
}
PLAIN = {masked: plain for plain, masked in MASKED.items()}

# Modules whose forward reads `.weight` of these children and never calls them, by their full names: the
# packages that they are of are not imported here.
READS_WEIGHTS = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "timm.models.beit.Attention": ("qkv",),
    "timm.models.eva.EvaAttention": ("qkv",),
    "timm.models.naflexvit.NaFlexEmbeds": ("proj",),
    "timm.models.swin_transformer_v2.WindowAttention": ("qkv",),
}


def masked_type(layer: nn.Module) -> type[nn.Module] | None:
    """The masked type that takes the place of a plain layer's type, None where there is none."""
    return MASKED.get(type(layer)) or MASKED_BY_NAME.get(_full_name(type(layer)))


def is_masked(module: nn.Module) -> bool:
    """Whether a module is one of the masked layers, or derived from one."""
    return isinstance(module, tuple(PLAIN))


def is_weighted(module: nn.Module) -> bool:
    """Whether a module is of the kinds that masks are about: a linear map or a convolution of any sort."""
    kinds = (nn.Linear, nn.Bilinear, _ConvNd, nn.MultiheadAttention)
    return isinstance(module, kinds) or _is_quantized(module)


def weights(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the weights of a layer lie, by the name of the mask over each: a module and its parameter."""
    if isinstance(layer, nn.MultiheadAttention):
        return projections(layer)
    return {"weight": (layer, "weight")}


def masks(layer: nn.Module) -> dict[str, Mask]:
    """The masks of a masked layer by name."""
    own = layer.mask
    assert isinstance(own, Mask | nn.ModuleDict)
    return {"weight": own} if isinstance(own, Mask) else dict(own.items())  # type: ignore[arg-type]


def read_by_parents(model: nn.Module) -> dict[nn.Module, str]:
    """The layers of a model that a parent never calls, and who reads their weight instead."""
    found: dict[nn.Module, str] = {}
    for name, parent in model.named_modules():
        types = {_full_name(base) for base in type(parent).__mro__}
        for reader, children in READS_WEIGHTS.items():
            if reader in types:
                for child in children:
                    layer = getattr(parent, child, None)
                    if isinstance(layer, nn.Module):
                        found[layer] = (
                            f"its weight is read by {name or 'its parent'} ({type(parent).__name__}), "
                            "which never calls the layer"
                        )
    return found


def why_not(layer: nn.Module) -> str | None:
    """Why a layer cannot take a mask, None where it can."""
    kind = type(layer).__name__
    if is_masked(layer):
        return "it is masked already (unmask_ it first, or leave it out by filter_fn)"
    if isinstance(layer, LazyModuleMixin):
        return "it is lazy and has no weight yet (run the model once first)"
    if parametrize.is_parametrized(layer):
        return "it is parametrized (torch.nn.utils.parametrize.remove_parametrizations first)"
    if _is_quantized(layer):
        return f"it is quantized ({kind})"
    if masked_type(layer) is None:
        base = next((plain for plain in MASKED if isinstance(layer, plain)), None)
        if base is not None:
            return (
                f"it is a {_full_name(type(layer))}, derived from {base.__name__}: "
                "what that computes would be lost"
            )
        return f"{kind} is not supported"
    if "forward" in layer.__dict__:
        return "its forward is replaced on the layer itself and would pass by the mask"
    found = (_why_not_weight(owner._parameters.get(key)) for owner, key in weights(layer).values())
    return next((reason for reason in found if reason is not None), None)


def _why_not_weight(weight: Tensor | None) -> str | None:
    if weight is None:
        return "its weight is computed from others (weight_norm or torch.nn.utils.prune: remove it first)"
    if hasattr(weight, "placements"):
        return "its weight is sharded (DTensor)"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, no plain parameter"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not real floating"
    return None


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_quantized(module: nn.Module) -> bool:
    # By name: loading torch's quantized modules takes longer than converting a network.
    return any(base.__name__ == "WeightedQuantizedModule" for base in type(module).__mro__)
