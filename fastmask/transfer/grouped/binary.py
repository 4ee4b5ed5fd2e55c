"""The binary and the KL mask for several sources, seeds and settings at once, their samples stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastmask.errors import TrainingDiverged
from fastmask.ops.sample_mask.reference import threshold, uniform24
from fastmask.transfer.batches import generator, orders
from fastmask.transfer.config import Config
from fastmask.transfer.domains import Part
from fastmask.transfer.head import MASKED
from fastmask.transfer.source import Source
from fastmask.transfer.strategies import binary
from fastmask.transfer.strategies.found import Found

# Logits, the mean loss of the last steps, the running mean of |dL/dl|.
_Learned = tuple[Tensor, float, float | None]


@dataclass(frozen=True, eq=False)
class Problem:
    """One mask to find: by which strategy and settings, of which source, on which of its rows."""

    strategy: str
    config: Config
    source: Source
    part: Part


def find(problems: Sequence[Problem]) -> list[Found]:
    """Do what `find` of strategies `binary` and `kl` does for each problem, for those alike in shape as one.

    Masks of one source and seed read the same rows and the same noise whatever their settings, so that it
    is drawn once for all of them. With W' = where(B, W, 0) of every sample s, the gradients are explicit:

        P = softmax(W' x + b) - wanted, by the rows of a batch
        dl = sum over s of (P X) * W * s(1 - s) / tau + the regulariser's

    What is wanted of a row is onehot(y) for `binary` and softmax(W x + b) for `kl`.

    Args:
        problems: of one sweep: their settings differ in tau, beta, density, the first logit, the number
            of samples, and the number and size of steps alone.

    Returns:
        What was found, in the order of the problems.

    Raises:
        TrainingDiverged: a loss or the gradient of the logits is not finite.

    Warns:
        MaskWarning: as those.
    """
    same: dict[tuple[Any, ...], list[int]] = {}
    for i, problem in enumerate(problems):
        same.setdefault((_stream(problem), _shape(problem), _numbers(problem)), []).append(i)
    found: list[Found | None] = [None] * len(problems)
    for stack in _stacks([problems[places[0]] for places in same.values()]):
        for problem, learned in stack.train():
            # Problems that differ in what they freeze alone have learned the same.
            for i in same[_stream(problem), _shape(problem), _numbers(problem)]:
                found[i] = binary.result(problems[i].config, _name(problem), *learned)
    return [result for result in found if result is not None]


def _stacks(problems: Sequence[Problem]) -> list[_Stack]:
    """Problems alike in shape, streams with equally many settings together."""
    alike: dict[tuple[Any, ...], dict[tuple[Any, ...], list[Problem]]] = {}
    for problem in problems:
        streams = alike.setdefault(_shape(problem), {})
        streams.setdefault(_stream(problem), []).append(problem)
    return [
        _Stack([own for own in streams.values() if len(own) == many])
        for streams in alike.values()
        for many in sorted({len(own) for own in streams.values()})
    ]


def _stream(problem: Problem) -> tuple[str, str, int]:
    """What decides the rows and the noise of a problem."""
    return problem.strategy, problem.source.domain, problem.source.seed


def _shape(problem: Problem) -> tuple[float, ...]:
    """What problems must share to be one tensor: rows a step, samples, steps, their size."""
    config, rows = problem.config, len(problem.part.y)
    size = min(config.batch, rows) // config.samples * config.samples
    return size, config.samples, config.mask_steps, config.mask_lr


def _numbers(problem: Problem) -> tuple[float, ...]:
    """What the problems of a tensor may differ in."""
    return problem.config.tau, problem.config.beta, problem.config.logit_init


def _name(problem: Problem) -> str:
    return f"{problem.strategy} mask of {problem.source.domain}, seed {problem.source.seed}"


class _Stack:
    """U streams, of a strategy, a source and a seed each, with V settings: logits (U, V, N, K)."""

    def __init__(self, problems: list[list[Problem]]) -> None:
        self.problems = problems
        firsts = [own[0] for own in problems]
        config = firsts[0].config
        self.config = config
        self.weight = torch.stack([p.source.trained[MASKED] for p in firsts])
        self.bias = torch.stack([p.source.trained["output.bias"] for p in firsts])
        N = self.weight.shape[1]
        with torch.no_grad():
            heads = [p.source.head for p in firsts]
            rows = [h.last_input(h.inputs(p.part.x)) for h, p in zip(heads, firsts, strict=True)]
            self.rows = torch.cat(rows)
            self.wanted = torch.cat(
                [
                    torch.softmax(head.output(own), 1)
                    if problem.strategy == "kl"
                    else functional.one_hot(problem.part.y, N).to(own)
                    for head, own, problem in zip(heads, rows, firsts, strict=True)
                ]
            )
            # What a divergence has over a cross-entropy; 0 for labels.
            self.entropy = torch.special.entr(self.wanted).sum(1)
        self.size = int(_shape(firsts[0])[0])
        numbers = self.weight.new_tensor([[_numbers(p) for p in own] for own in problems])
        self.taus, self.betas, self.inits = numbers.unbind(2)

    def train(self) -> list[tuple[Problem, _Learned]]:
        """Take all steps; return what each problem learned."""
        config, (U, N, K) = self.config, self.weight.shape
        V = self.taus.shape[1]
        logits = nn.Parameter(self.inits[..., None, None].expand(U, V, N, K).contiguous())
        optimizer = torch.optim.Adam([logits], lr=config.mask_lr)
        scale: Tensor | None = None
        losses = []
        for places, seeds in self._draws():
            with torch.no_grad():
                grad, loss = self._gradient(logits, places, seeds)
                losses.append(loss)
                unit: Tensor | float = 1.0
                if config.beta_unit == "gradient":
                    new = grad.abs().mean((2, 3))
                    scale = new if scale is None else 0.99 * scale + 0.01 * new
                    unit = scale
                self._regularise(grad, logits, self.betas * unit)
                self._clip(grad, len(losses))
            logits.grad = grad
            optimizer.step()
            with torch.no_grad():
                logits.clamp_(-config.logit_clamp, config.logit_clamp)
        return self._results(logits.detach(), torch.stack(losses), scale)

    def _draws(self) -> list[tuple[Tensor, Tensor]]:
        """For each step the rows (U, B) of all sources' rows, one below the other, and the seeds (U,)."""
        config, device = self.config, self.weight.device
        rows, seeds, offset = [], [], 0
        for problem in (own[0] for own in self.problems):
            n = len(problem.part.y)
            draws = generator(problem.source.seed, problem.strategy, problem.source.domain)
            own_rows, own_seeds = [], []
            for order in orders(n, self.size, config.mask_steps, draws):
                own_rows.append(order + offset)
                own_seeds.append(torch.randint(2**62, (), generator=draws))
            rows.append(torch.stack(own_rows))
            seeds.append(torch.stack(own_seeds))
            offset += n
        steps = (torch.stack(both, 1).to(device).unbind() for both in (rows, seeds))
        return list(zip(*steps, strict=True))

    def _gradient(self, logits: Tensor, places: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The straight-through gradient (U, V, N, K) of the mean loss of a batch, and that mean (U, V)."""
        U, V, N, K = logits.shape
        S, B = self.config.samples, self.size
        # float and int of one size: what selects is the sign of k - T.
        whole = torch.int64 if logits.dtype == torch.float64 else torch.int32
        k = torch.stack([uniform24(N * K, seed, S, 0) for seed in seeds.unbind()])
        k = k.view(U, S, 1, N, K)
        limit = threshold(logits).to(whole).view(U, 1, V, N, K)
        active = (k.to(whole) - limit).bitwise_right_shift_(8 * limit.itemsize - 1)
        weight = self.weight.view(U, 1, 1, N, K)
        selected = active.bitwise_and_(weight.view(whole)).view(logits.dtype)

        x = self.rows[places].view(U * S, B // S, K)
        bias = self.bias.view(U, 1, 1, N, 1)
        out = torch.bmm(selected.view(U * S, V * N, K), x.transpose(1, 2))
        likely = torch.log_softmax(out.view(U, S, V, N, B // S) + bias, 3)
        wanted = self.wanted[places].view(U, S, 1, B // S, N).transpose(3, 4)
        loss = (likely * wanted).sum((1, 3, 4)).div_(-B)
        loss.sub_(self.entropy[places].mean(1, keepdim=True))
        push = likely.exp_().sub_(wanted).div_(B).view(U * S, V * N, B // S)
        grad = torch.bmm(push, x).view(U, S, V, N, K)

        noise = torch.log((2**25 - 1 - 2 * k).to(logits.dtype)) - torch.log(
            (2 * k + 1).to(logits.dtype)
        )
        tau = self.taus.view(U, 1, V, 1, 1)
        z = (logits.view(U, 1, V, N, K) + noise).div_(tau)
        slope = torch.sigmoid(z).mul_(torch.sigmoid(z.neg_())).div_(tau)
        return grad.mul_(weight).mul_(slope).sum(1), loss

    def _regularise(self, grad: Tensor, logits: Tensor, pull: Tensor) -> None:
        """Add the regulariser's gradient, `pull` (U, V) times that of sum(l) or of sum(sigmoid(l))."""
        pull = pull[..., None, None]
        if self.config.reg == "logit":
            grad.add_(pull)
        else:
            active = torch.sigmoid(logits)
            grad.add_(active * (1.0 - active) * pull)

    def _clip(self, grad: Tensor, step: int) -> None:
        """Shorten each problem's gradient to norm `mask_clip`; raise where one is not finite."""
        norm = torch.linalg.vector_norm(grad, dim=(2, 3))
        if not bool(norm.isfinite().all()):
            u, v = (~norm.isfinite()).nonzero()[0].tolist()
            raise TrainingDiverged(
                f"{_name(self.problems[u][v])}: the gradient of the logits has norm "
                f"{float(norm[u, v])} at step {step}; a smaller beta or larger tau keeps it finite"
            )
        if self.config.mask_clip is not None:
            grad.mul_((self.config.mask_clip / norm).clamp_(max=1.0)[..., None, None])

    def _results(
        self, logits: Tensor, losses: Tensor, scale: Tensor | None
    ) -> list[tuple[Problem, _Learned]]:
        results: list[tuple[Problem, _Learned]] = []
        for u, own in enumerate(self.problems):
            for v, problem in enumerate(own):
                finite = losses[:, u, v].isfinite()
                if not bool(finite.all()):
                    step = int((~finite).nonzero()[0])
                    raise TrainingDiverged(
                        f"{_name(problem)}: the loss is {float(losses[step, u, v])} at step {step + 1}"
                    )
                loss = float(losses[-50:, u, v].mean())
                unit = None if scale is None else float(scale[u, v])
                results.append((problem, (logits[u, v].clone(), loss, unit)))
        return results
