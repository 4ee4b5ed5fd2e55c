"""The compiled CPU engine: kernels over addresses and sizes, described in csrc/cpu/kernels.h."""

from torch import Tensor

def isa() -> str: ...
def isas() -> list[str]: ...
def use(isa: str) -> None: ...
def borrow(parallel: int, thread_number: int) -> None: ...
def know(exchange: object, types: tuple[type, ...]) -> None: ...
def rows(params: object, columns: tuple[object, ...], frozen: object) -> bytes | None: ...
def advance(counts: list[Tensor]) -> bytes | None: ...
def all_ones(bits: int, samples: int, n: int) -> bool: ...
def pack_bools(mask: int, n: int, bits: int, threads: int) -> None: ...
def pack_scores(scores: int, kind: int, mu: float, n: int, bits: int, threads: int) -> None: ...
def unpack(bits: int, samples: int, n: int, mask: int, threads: int) -> None: ...
def popcount(bits: int, samples: int, bytes: int, ones: int, threads: int) -> None: ...
def sample_mask(
    logits: int, kind: int, n: int, seed: int, samples: int, stream: int, bits: int, threads: int
) -> None: ...
def masked_linear(
    x: int,
    w: int,
    kind: int,
    bits: int,
    starts: int,
    samples: int,
    scales: int,
    flip: int,
    b: int,
    n: int,
    k: int,
    bias: int,
    y: int,
    threads: int,
) -> None: ...
def masked_linear_grad_input(
    grad: int,
    w: int,
    kind: int,
    bits: int,
    starts: int,
    samples: int,
    scales: int,
    flip: int,
    b: int,
    n: int,
    k: int,
    dx: int,
    threads: int,
) -> None: ...
def effective_weight(
    w: int, kind: int, bits: int, n: int, flip: int, scale: float, out: int, threads: int
) -> None: ...
def add_selected(dense: int, bits: int, n: int, add: int, out: int, threads: int) -> None: ...
def count_ones(bits: int, n: int, k: int, starts: int, threads: int) -> None: ...
def compressed_linear(
    x: int,
    values: int,
    kind: int,
    bits: int,
    starts: int,
    b: int,
    n: int,
    k: int,
    bias: int,
    y: int,
    threads: int,
) -> None: ...
def expand_values(
    values: int,
    kind: int,
    bits: int,
    starts: int,
    n: int,
    k: int,
    first: int,
    count: int,
    out: int,
    threads: int,
) -> None: ...
def masked_adamw_(
    table: int,
    scalars: int,
    count: int,
    kind: int,
    beta1: float,
    beta2: float,
    eps: float,
    maximize: int,
    threads: int,
) -> None: ...
def masked_sgd_(
    table: int,
    count: int,
    kind: int,
    rate: float,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: int,
    maximize: int,
    first_step: int,
    threads: int,
) -> None: ...
def restore_frozen_(table: int, count: int, size: int, threads: int) -> None: ...
def topk_mask(scores: int, kind: int, n: int, k: int, bits: int, threads: int) -> None: ...
def straight_through(
    grad: int,
    x: int,
    w: int,
    kind: int,
    logits: int,
    seed: int,
    starts: int,
    samples: int,
    b: int,
    n: int,
    k: int,
    tau: float,
    factor: float,
    scales: int,
    shifts: int,
    out: int,
    threads: int,
) -> None: ...
def straight_through_step(
    grad: int,
    x: int,
    w: int,
    kind: int,
    sampled: int,
    seed: int,
    starts: int,
    samples: int,
    b: int,
    n: int,
    k: int,
    tau: float,
    factor: float,
    scales: int,
    shifts: int,
    scores: int,
    momenta: int,
    rate: float,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: int,
    maximize: int,
    first_step: int,
    threads: int,
) -> None: ...
def score_grad(
    g: int,
    w: int,
    kind: int,
    logits: int,
    seed: int,
    samples: int,
    n: int,
    tau: float,
    factor: float,
    scales: int,
    shifts: int,
    out: int,
    threads: int,
) -> None: ...
def select(w: int, size: int, bits: int, n: int, out: int, threads: int) -> None: ...
