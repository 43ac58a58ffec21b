"""What one layer of softmax attention learns of linear regression in its context: of two heads that look the opposite
ways, a step of gradient descent on centred labels.

    y_i = beta . x_i + noise;  keys and values z_i = [x_i; y_i], i = 1 .. L;  the query [x_q; 0] is none of them
    y'_q = sum_h sum_i softmax_i([x_q; 0]^T KQ_h z_i) z_i^T OV_h          KQ with the scale in it

    KQ_h ~ omega_h diag(I_d, 0),  OV_h ~ mu_h at the label,  |omega_h| equal, of both signs,  sum_h mu_h ~ 0
    loss ~ 1 + s - 2 mu . omega + mu^T G mu,   G = omega omega^T + (1 + s) / L exp(d omega omega^T);   mu = G^-1 omega
    of a small pair +-omega, +-mu:   y'_q ~ 2 omega mu / L sum_i (y_i - mean y) x_i . x_q

s is the noise's variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from saccade.core.card import Card
from saccade.core.driver import Experiment
from saccade.core.errors import OptionError
from saccade.core.system import option
from saccade.probes._parts.table import Table

CHUNK = 4096  # sequences at a time, where errors are measured


@dataclass(eq=False)
class ICLLinearMultihead(Experiment):
    """`run()` trains a layer for every number of heads, and measures all on the same fresh sequences."""

    card = Card(
        slug="icl_linear_multihead",
        name="ICL multi-head softmax",
        kind="experiment",
        family="probes",
        form="theory",
        target="one-layer attention",
        trains="full",
        paper="In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of "
        "Multi-Head Softmax Attention (He et al., 2025)",
        summary="Two heads of softmax attention learn a step of gradient descent on centred labels",
        code="XintianPan/ICL_linear",
        choices=(
            "4,000 steps at a rate that falls from 0.01 to 0 stand for the paper's 500,000 at 0.001.",
            "A step of gradient descent is compared at its best size, found by least squares on other sequences.",
        ),
        tags=("in-context learning", "linear regression", "gradient descent", "training dynamics"),
    )

    heads: tuple[int, ...] = option((1, 2, 4, 8), "numbers of heads; a layer is trained for each")
    d: int = option(5, "coordinates of x", low=1)
    length: int = option(40, "examples in a sequence", low=1)
    noise: float = option(0.1, "variance of the labels' noise", low=0)
    rho: float = option(0.0, "correlation of neighbouring coordinates of x", low=-0.99, high=0.99)
    supports: tuple[tuple[int, ...], ...] = option(
        (), "a label for each: the coordinates that it depends on; none: one label, of all"
    )
    steps: int = option(4000, "of training", low=1)
    batch: int = option(256, "sequences in a step", low=1)
    rate: float = option(0.01, "Adam's at the first step; it falls to 0 as a cosine does", low=0)
    tests: int = option(100_000, "sequences on which errors are measured", low=2)
    seed: int = option(0, "of weights and sequences")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.heads or min(self.heads) < 1:
            raise OptionError(f"ICLLinearMultihead(heads={self.heads!r}): no heads.", "give numbers above 0")
        if not all(own and set(own) <= set(range(self.d)) for own in self.supports):
            raise OptionError(
                f"ICLLinearMultihead(supports={self.supports!r}): coordinates are 0 to {self.d - 1}.",
                "give some of them for every label",
            )

    def run(self) -> Findings:
        layers = {heads: self.train(heads) for heads in self.heads}
        near, far = (self.errors(layers, length) for length in (self.length, 2 * self.length))
        return Findings(self, layers, near, far)

    @property
    def labels(self) -> tuple[tuple[int, ...], ...]:
        return self.supports or (tuple(range(self.d)),)

    def drawn(self, count: int, length: int, random: torch.Generator) -> Sequences:
        at = torch.arange(self.d)
        covariance = self.rho ** (at[:, None] - at).abs().float()
        x = torch.randn(count, length + 1, self.d, generator=random) @ torch.linalg.cholesky(covariance).T
        beta = torch.zeros(count, self.d, len(self.labels))
        for label, own in enumerate(self.labels):
            beta[:, own, label] = torch.randn(count, len(own), generator=random) / len(own) ** 0.5
        y = x @ beta
        y += self.noise**0.5 * torch.randn(y.shape, generator=random)
        return Sequences(x[:, :-1], y[:, :-1], x[:, -1], y[:, -1])

    def train(self, heads: int) -> Layer:
        random = torch.Generator().manual_seed(self.seed)
        layer = Layer(heads, self.d, len(self.labels), random)
        optimizer = torch.optim.Adam(layer.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with tqdm(range(self.steps), desc=f"heads {heads}", unit="step", mininterval=1) as progress:
            for _ in progress:
                some = self.drawn(self.batch, self.length, random)
                loss = (layer(some) - some.label).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
        return layer.requires_grad_(False)

    def errors(self, layers: dict[int, Layer], length: int) -> dict[str, Error]:
        """Of all layers, a step of gradient descent, one on centred labels, and ridge regression."""
        random = torch.Generator().manual_seed(self.seed + 1)
        sizes = {}
        some = self.drawn(CHUNK, length, random)
        for centred in (False, True):
            step = descent(some, centred)
            sizes[centred] = (step * some.label).sum(0) / step.square().sum(0)
        found: dict[str, list[Tensor]] = {}
        for start in range(0, self.tests, CHUNK):
            some = self.drawn(min(CHUNK, self.tests - start), length, random)
            said = {named(heads): layer(some) for heads, layer in layers.items()}
            said["descent"] = sizes[False] * descent(some)
            said["centred descent"] = sizes[True] * descent(some, centred=True)
            said["ridge"] = ridge(some, self.noise, self.labels)
            for name, y in said.items():
                found.setdefault(name, []).append((y - some.label).square().mean(-1).double())
        return {name: Error.of(torch.cat(parts)) for name, parts in found.items()}


class Sequences(NamedTuple):
    x: Tensor  # (count, length, d)
    y: Tensor  # (count, length, labels)
    query: Tensor  # (count, d)
    label: Tensor  # (count, labels)


class Error(NamedTuple):
    """A mean of squares, and its standard error."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, squares: Tensor) -> Error:
        return cls(float(squares.mean()), float(squares.std() / len(squares) ** 0.5))


class Layer(nn.Module):
    """Without biases; every head is as wide as an example."""

    def __init__(self, heads: int, d: int, labels: int, random: torch.Generator) -> None:
        super().__init__()
        width = d + labels
        self.d = d

        def weight(*shape: int, fan: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-(fan**-0.5), fan**-0.5, generator=random))

        self.q, self.k, self.v = (weight(heads, width, width, fan=width) for _ in range(3))
        self.o = weight(heads, width, labels, fan=heads * width)

    @property
    def kq(self) -> Tensor:
        """(heads, width of the query, width of an example), with the scale."""
        return self.q @ self.k.mT / self.q.shape[-1] ** 0.5

    @property
    def ov(self) -> Tensor:
        """(heads, width, labels)"""
        return self.v @ self.o

    @property
    def omega(self) -> Tensor:
        """(heads,)"""
        return self.kq[:, : self.d, : self.d].diagonal(dim1=1, dim2=2).mean(-1)

    @property
    def mu(self) -> Tensor:
        """(heads, labels)"""
        return self.ov[:, self.d :].diagonal(dim1=1, dim2=2)

    def beside(self) -> Tensor:
        """The largest entry beside the diagonal of each head's x-block, in parts of a mean one on it: (heads,)."""
        block = self.kq[:, : self.d, : self.d].abs()
        on = block.diagonal(dim1=1, dim2=2)
        return (block - on.diag_embed()).amax((1, 2)) / on.mean(-1)

    def unbalanced(self) -> Tensor:
        """|sum mu| / max |mu|: (labels,)."""
        return self.mu.sum(0).abs() / self.mu.abs().amax(0)

    def forward(self, some: Sequences) -> Tensor:
        return attended(some, self.kq, self.ov)


def attended(some: Sequences, kq: Tensor, ov: Tensor) -> Tensor:
    """What heads of these matrices say: (count, labels)."""
    z = torch.cat([some.x, some.y], -1)
    looking = torch.einsum("cd,hdw->chw", some.query, kq[:, : some.query.shape[-1]])
    return torch.einsum("chw,hwl->cl", (looking @ z.mT).softmax(-1) @ z, ov)


def descent(some: Sequences, centred: bool = False) -> Tensor:
    """1 / L sum y_i x_i . x_q: (count, labels)."""
    y = some.y - some.y.mean(1, keepdim=True) if centred else some.y
    return torch.einsum("cid,cil,cd->cl", some.x, y, some.query) / some.x.shape[1]


def ridge(some: Sequences, noise: float, labels: tuple[tuple[int, ...], ...]) -> Tensor:
    """Of every label over its own coordinates, with the penalty of their prior: (count, labels)."""
    said = []
    for label, own in enumerate(labels):
        x, query = some.x[..., own].double(), some.query[:, own].double()
        penalty = noise * len(own) * torch.eye(len(own), dtype=torch.double)
        beta = torch.linalg.solve(x.mT @ x + penalty, x.mT @ some.y[..., label, None].double())
        said.append((query[:, None] @ beta)[:, 0, 0])
    return torch.stack(said, -1).float()


def closed_form(omega: Tensor, mu: Tensor, d: int, length: int, noise: float) -> Tensor:
    """The loss of heads that are as in the theory: (heads,) each."""
    return 1 + noise - 2 * mu @ omega + mu @ gram(omega, d, length, noise) @ mu


def best_mu(omega: Tensor, d: int, length: int, noise: float) -> Tensor:
    return torch.linalg.solve(gram(omega, d, length, noise), omega)


def gram(omega: Tensor, d: int, length: int, noise: float) -> Tensor:
    both = omega[:, None] * omega
    return both + (1 + noise) / length * (d * both).exp()


def named(heads: int) -> str:
    return f"{heads} head" if heads == 1 else f"{heads} heads"


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """The layers by their numbers of heads, and mean squared errors at the length of training and at twice that."""

    experiment: ICLLinearMultihead
    layers: dict[int, Layer]
    near: dict[str, Error]
    far: dict[str, Error]

    def __repr__(self) -> str:
        length, own = self.experiment.length, self.experiment
        columns = (f"L={length}", "+-", f"L={2 * length}", "+-")
        rows = [[*self.near[name], *self.far[name]] for name in self.near]
        axes = {"mean squared error": tuple(self.near), "": columns}
        lines = [repr(Table(torch.tensor(rows), axes))]
        for heads, layer in self.layers.items():
            lines.append(
                f"\n{named(heads)}: omega {told(layer.omega)}, beside the diagonal {told(layer.beside())}\n"
                f"  mu {told(layer.mu.flatten())}, |sum| / max {told(layer.unbalanced())}"
            )
            if len(own.labels) == 1 and not own.rho:
                loss = closed_form(layer.omega, layer.mu[:, 0], own.d, length, own.noise)
                lines.append(f"  the loss that the theory gives them: {float(loss):.3f}")
        return "\n".join(lines)


def told(numbers: Tensor) -> str:
    return " ".join(f"{number:.2f}" for number in numbers.tolist())
