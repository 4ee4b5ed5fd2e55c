"""The compiled CUDA engine: launchers over addresses and sizes, described in csrc/cuda/kernels.h."""

def missing() -> str | None: ...
def pack_bools(mask: int, n: int, bits: int, device: int, stream: int) -> None: ...
def pack_scores(
    scores: int, kind: int, mu: float, n: int, bits: int, device: int, stream: int
) -> None: ...
def popcount(bits: int, samples: int, bytes: int, ones: int, device: int, stream: int) -> None: ...
def masked_linear(
    x: int,
    w: int,
    kind: int,
    bits: int,
    groups: int,
    samples: int,
    b: int,
    n: int,
    k: int,
    bias: int,
    y: int,
    device: int,
    stream: int,
) -> None: ...
def compressed_linear(
    x: int,
    values: int,
    kind: int,
    count: int,
    bits: int,
    b: int,
    n: int,
    k: int,
    bias: int,
    y: int,
    offsets: int,
    sums: int,
    device: int,
    stream: int,
) -> None: ...
def masked_sgd_(
    table: int,
    count: int,
    kind: int,
    lr: float,
    rate_address: int,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: int,
    maximize: int,
    first_step: int,
    device: int,
    stream: int,
) -> None: ...
def masked_adamw_(
    table: int,
    count: int,
    kind: int,
    lr: float,
    rate_address: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: int,
    device: int,
    stream: int,
) -> None: ...
def restore_frozen_(table: int, count: int, size: int, device: int, stream: int) -> None: ...
