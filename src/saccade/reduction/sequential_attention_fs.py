"""Choose a few of many features in one training run: attention over those that are left finds the next.

    x * m(S)       m_i = 1 for i in S,   softmax of w over the others;   w is drawn with spread 1e-5
    training       a tenth with m = 1;   then equal phases, network and w together, the network never anew
    a phase ends   S <- S + argmax of w over the others, or as many of them at a time as are wanted;   w anew
    with k in S    m_i = 0 for the others

All k at the end of a single phase is one-shot attention. A feature may be a number, a block of them, or a channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import trange

from saccade.core.card import Card
from saccade.core.driver import Experiment
from saccade.core.errors import InputError, OptionError
from saccade.core.system import option

WARM = 0.1  # of a training run
SPREAD = 1e-5


class Gate(nn.Module):
    """Lets features through: `gate(x)` stands before a network that `train` trains with it. `order` is S."""

    def __init__(self, features: int, count: int, each: int = 1, seed: int = 0, axis: int = -1) -> None:
        super().__init__()
        if not 0 < count <= features or each < 1 or count % each:
            raise OptionError(
                f"{count} of {features} features, {each} at a time: that cannot be chosen.",
                "choose at most all of them, in equal steps",
            )
        self.features, self.count, self.each, self.axis = features, count, each, axis
        self.random = torch.Generator().manual_seed(seed)
        self.warm, self.order = True, list[int]()
        self.logits = nn.Parameter(self.drawn())

    def drawn(self) -> Tensor:
        return SPREAD * torch.randn(self.features, generator=self.random)

    def mask(self) -> Tensor:
        """m: (features,)."""
        if self.warm:
            return torch.ones_like(self.logits)
        chosen = torch.zeros_like(self.logits, dtype=torch.bool)
        chosen[self.order] = True
        if len(self.order) == self.count:
            return chosen.to(self.logits.dtype)
        return torch.where(chosen, 1, self.logits.masked_fill(chosen, -torch.inf).softmax(0))

    def pick(self) -> None:
        """The end of a phase."""
        left = self.logits.detach().clone()
        left[self.order] = -torch.inf
        self.order += left.topk(self.each).indices.tolist()
        with torch.no_grad():
            self.logits.copy_(self.drawn())

    def forward(self, x: Tensor) -> Tensor:
        """Along the axis a feature has one number, or as many neighbours as there are to each."""
        size = x.shape[self.axis]
        if size % self.features:
            raise InputError(
                f"{size} numbers are no blocks of {self.features} features.",
                "make the gate for as many features as there are, or name another axis",
            )
        shape = [1] * x.ndim
        shape[self.axis] = size
        return x * self.mask().repeat_interleave(size // self.features).view(shape)


def train(gate: Gate, network: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> list[int]:
    """One run of Adam over a network behind a gate, of which `loss()` is made. What was chosen, in order."""
    warm, phases = int(WARM * steps), gate.count // gate.each
    if steps - warm < phases:
        raise OptionError(f"{steps} steps are too few for {phases} phases.", "take more")
    ends = [warm + round((steps - warm) * (phase + 1) / phases) for phase in range(phases)]
    optimizer = torch.optim.Adam([*network.parameters(), gate.logits], rate)
    with trange(steps, desc="sequential attention", unit="step", mininterval=1) as progress:
        for step in progress:
            gate.warm = step < warm
            optimizer.zero_grad()
            now = loss()
            now.backward()
            optimizer.step()
            if step + 1 in ends:
                gate.pick()
                optimizer.state.pop(gate.logits)
                progress.set_postfix(loss=f"{float(now.detach()):.3f}", chosen=len(gate.order), refresh=False)
    return gate.order


@dataclass(eq=False)
class SequentialAttentionFS(Experiment):
    """`run()` lets a network choose among features of which few matter, one after another and all at once."""

    card = Card(
        slug="sequential_attention_fs",
        name="Sequential Attention",
        kind="experiment",
        family="reduction",
        form="method",
        target="any model",
        trains="full",
        paper="Sequential Attention for Feature Selection (Yasuda et al., 2022)",
        summary="Choose features one by one, in a single training run, by attention over those that are left",
        code="google-research/google-research",
        choices=(
            "A feature is chosen at the end of its phase, as in the paper; the released code chooses at the "
            "start, at first by untrained logits.",
            "With the logits Adam's memory of them is made anew.",
            "Chosen features are judged by a network that is trained on them alone.",
        ),
        tags=("feature selection", "attention mask", "greedy", "orthogonal matching pursuit"),
    )

    relevant: int = option(8, "features that the label depends on, and that are chosen", low=1)
    copies: int = option(4, "features that are copies of the first of these", low=0)
    noise: int = option(52, "features that say nothing", low=0)
    each: int = option(1, "chosen at the end of a phase", low=1)
    samples: int = option(4000, "to learn from, and as many to judge by", low=2)
    steps: int = option(4000, "of training", low=1)
    batch: int = option(256, "samples in a step", low=1)
    rate: float = option(3e-3, "Adam's", low=0)
    hidden: int = option(64, "width of the network's hidden layer", low=1)
    seed: int = option(0, "of data, weights and batches")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies > self.relevant:
            raise OptionError(
                f"SequentialAttentionFS(copies={self.copies}): {self.relevant} features can be copied.",
                "copy each once at most",
            )

    def run(self) -> Findings:
        given = self.data()
        chosen = {
            "sequential": self.choose(given, self.each),
            "one-shot": self.choose(given, self.relevant),
            "those that matter": [given.origin.tolist().index(one) for one in range(self.relevant)],
        }
        return Findings(given, chosen, {name: self.error(given, order) for name, order in chosen.items()})

    def data(self) -> Data:
        """y = sum a_i tanh(2 x_i) + a tenth of noise, a falling from 1 to 1/2; columns in any order."""
        random = torch.Generator().manual_seed(self.seed)
        origin = torch.tensor([*range(self.relevant), *range(self.copies), *[-1] * self.noise])
        x = torch.randn(2 * self.samples, len(origin), generator=random)
        matters = x[:, : self.relevant]
        x[:, self.relevant : self.relevant + self.copies] = matters[:, : self.copies]
        y = (2 * matters).tanh() @ torch.linspace(1, 0.5, self.relevant)
        y += 0.1 * torch.randn(y.shape, generator=random)
        order = torch.randperm(len(origin), generator=random)
        return Data(x[:, order], y, origin[order])

    def network(self, features: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return nn.Sequential(nn.Linear(features, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 1))

    def choose(self, given: Data, each: int) -> list[int]:
        features = given.x.shape[1]
        gate, network = Gate(features, self.relevant, each, self.seed), self.network(features)
        return train(gate, network, self.loss(given, nn.Sequential(gate, network)), self.steps, self.rate)

    def loss(self, given: Data, network: nn.Module) -> Callable[[], Tensor]:
        """The squared error of samples that are drawn anew at every call."""
        random = torch.Generator().manual_seed(self.seed + 1)

        def drawn() -> Tensor:
            some = torch.randint(self.samples, (self.batch,), generator=random)
            return (network(given.x[some])[:, 0] - given.y[some]).square().mean()

        return drawn

    def error(self, given: Data, chosen: list[int]) -> float:
        """Of a network that is trained on these features alone, on samples that it has not seen, in parts of the
        label's variance."""
        part = given._replace(x=given.x[:, chosen])
        network = self.network(len(chosen))
        loss, optimizer = self.loss(part, network), torch.optim.Adam(network.parameters(), self.rate)
        for _ in trange(self.steps, desc="on them alone", unit="step", mininterval=1):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        with torch.no_grad():
            missed = network(part.x[self.samples :])[:, 0] - part.y[self.samples :]
        return float(missed.square().mean() / part.y[self.samples :].var())


class Data(NamedTuple):
    x: Tensor  # (2 * samples, features), the second half to judge by
    y: Tensor  # (2 * samples,)
    origin: Tensor  # (features,), which of those that matter a feature is, or copies; -1 for noise


@dataclass(frozen=True, eq=False, repr=False)
class Findings:
    """What was chosen, in order, and the error that it leaves."""

    given: Data
    chosen: dict[str, list[int]]
    error: dict[str, float]

    def recall(self, name: str) -> float:
        """The share of what matters that was chosen, itself or its copy."""
        matters = set(self.given.origin.tolist()) - {-1}
        return len(matters & {int(self.given.origin[one]) for one in self.chosen[name]}) / len(matters)

    def __repr__(self) -> str:
        wide = max(map(len, self.chosen))
        return "\n".join(
            f"{name:<{wide}}  recall {self.recall(name):.2f}  error {self.error[name]:.3f}  "
            f"chosen {' '.join(str(int(self.given.origin[one])) for one in order)}"
            for name, order in self.chosen.items()
        )
