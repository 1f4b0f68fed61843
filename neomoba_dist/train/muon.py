"""Muon: momentum whose matrices are orthogonalised before they move the weights; AdamW for everything else.

Keller Jordan, https://kellerjordan.github.io/posts/muon, with the scale of Moonlight (arXiv 2502.16982, section 2.2),
which gives an update the root mean square of one of AdamW's, so that both share learning rate and weight decay:

    M = 0.95 M + 0.05 G        U = 0.05 G + 0.95 M        W = W - rate (0.2 sqrt(max(rows, columns)) O(U) + decay W)

O(U) needs the whole logical matrix. A rank holds a piece of it: a part over tp, and of that what ZeRO gave it. So each
matrix is brought to one rank, orthogonalised there, and its pieces are sent back: the same numbers in every layout.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from neomoba_dist.model.init import ShardedTensorSpec
from neomoba_dist.parallel.comm import all_gather_objects, all_to_all
from neomoba_dist.parallel.mesh import Mesh
from neomoba_dist.train.fragments import Fragment

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """[rows, columns] float32 -> nearly U V^T of its singular value decomposition U S V^T, by Newton-Schulz.

    Its singular values are about 0.7 to 1.2, but for those that were nearly 0. The matrix 0 stays 0.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


def scaled_update(matrix: torch.Tensor) -> torch.Tensor:
    """What the learning rate multiplies: `orthogonalise` of a whole logical matrix, times Moonlight's scale."""
    return orthogonalise(matrix).mul_(0.2 * math.sqrt(max(matrix.shape)))


class Matrix(NamedTuple):
    """A logical matrix; of a stack of experts number `number` of those held here.

    shape: of the whole. held: of what a rank of tp holds, equal parts along one dimension, or all of it.
    """

    name: str
    number: int
    shape: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def is_cut(self) -> bool:
        """Whether ranks of tp hold different parts."""
        return self.held != self.shape

    @property
    def flops(self) -> int:
        """Of `orthogonalise`."""
        small, large = sorted(self.shape)
        return STEPS * (4 * small * small * large + 2 * small**3)


def matrices_of(spec: ShardedTensorSpec) -> Iterator[Matrix]:
    """What is held here of a logical tensor: a matrix, or those of experts."""
    for number in range(math.prod(spec.extent[:-2])):
        yield Matrix(spec.name, number, spec.shape[-2:], spec.extent[-2:])


def in_rounds(matrices: Iterable[Matrix], size: int) -> list[list[Matrix]]:
    """The largest first, `size` at a time."""
    order = sorted(matrices, key=lambda matrix: matrix.flops, reverse=True)
    return [order[i : i + size] for i in range(0, len(order), size)]


def busiest_flops(matrices: Iterable[Matrix], ranks: int, tp: int) -> int:
    """Operations of a step of those matrices on the rank that has most in each round, for which the others wait.

    ranks: over which ZeRO cuts them. A rank of tp computes one that is cut, and all of its member's that are not.
    """
    total = 0
    for turn in in_rounds(matrices, ranks * tp):
        cut, alone = [0], 0
        for matrix in turn[:tp]:
            if matrix.is_cut:
                cut.append(matrix.flops)
            else:
                alone += matrix.flops
        total += max(cut) + alone
    return total


def buffer_elements(matrix: Matrix, partition: int, ranks: int, tp: int) -> int:
    """The most that `WholeMatrices.replace` holds at a time beside a partition, of which `matrix` is the largest one.

    ranks: over which ZeRO cuts it.
    """
    whole, held = math.prod(matrix.shape), math.prod(matrix.held)
    carried = min(partition, ranks * tp * held) + 2 * tp * held
    computed = tp * held + matrix.is_cut * whole + 2 * whole + 2 * min(matrix.shape) ** 2
    return max(carried, computed)


class Piece(NamedTuple):
    """Elements start..start + numel of what is held of a matrix, flattened: `offset`.. in a partition of ZeRO."""

    matrix: Matrix
    start: int
    numel: int
    offset: int


def pieces_of(fragment: Fragment) -> Iterator[Piece]:
    """What lies in a fragment of every matrix."""
    first = -fragment.start  # of a matrix, counted from where the fragment begins
    for matrix in matrices_of(fragment.shard):
        start, stop = max(first, 0), min(first + math.prod(matrix.held), fragment.valid)
        if start < stop:
            yield Piece(matrix, start - first, stop - start, fragment.offset + start)
        first += math.prod(matrix.held)


class Round(NamedTuple):
    """Some matrices of a partition, one for each rank of axis x tp at most. owned: those of this member of the axis.

    sent: this rank's pieces, by owner. came: of all members those of what is `owned`, by member. send, receive:
    elements to and from each member.
    """

    owned: list[Matrix]
    sent: list[Piece]
    came: list[Piece]
    send: list[int]
    receive: list[int]


class WholeMatrices:
    """The matrices of a partition, each of which becomes whole on one rank of axis x tp, a round after the other.

    The largest come first, so that ranks have about as much to do in a round; none holds more than a few whole ones.
    pieces: of this rank. axis: over which ZeRO cuts the partition; collective over it.
    """

    def __init__(self, pieces: Iterable[Piece], mesh: Mesh, axis: str) -> None:
        self.mesh, self.axis = mesh, axis
        table = all_gather_objects(list(pieces), mesh, axis)
        found = dict.fromkeys(piece.matrix for pieces in table for piece in pieces)
        size = mesh[axis].size * mesh["tp"].size
        self.rounds = [self._round(matrices, table) for matrices in in_rounds(found, size)]

    def _round(self, matrices: list[Matrix], table: list[list[Piece]]) -> Round:
        place, tp = self.mesh[self.axis], self.mesh["tp"].size
        owner = {matrix: i // tp for i, matrix in enumerate(matrices)}
        held = [[piece for piece in pieces if piece.matrix in owner] for pieces in table]
        came = [[piece for piece in pieces if owner[piece.matrix] == place.index] for pieces in held]
        sent = [[piece for piece in held[place.index] if owner[piece.matrix] == i] for i in range(place.size)]
        return Round(
            owned=[matrix for matrix in matrices if owner[matrix] == place.index],
            sent=[piece for pieces in sent for piece in pieces],
            came=[piece for pieces in came for piece in pieces],
            send=[sum(piece.numel for piece in pieces) for pieces in sent],
            receive=[sum(piece.numel for piece in pieces) for pieces in came],
        )

    def replace(self, flat: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put `compute` of every whole matrix in its place in the partition. Collective over axis and tp."""
        for turn in self.rounds:
            held = {matrix: flat.new_empty(matrix.held) for matrix in turn.owned}
            here = [flat.narrow(0, piece.offset, piece.numel) for piece in turn.sent]
            there = [held[piece.matrix].view(-1).narrow(0, piece.start, piece.numel) for piece in turn.came]
            self._carry(here, there, turn.send, turn.receive, self.axis)
            self._replace_held(held, compute)
            self._carry(there, here, turn.receive, turn.send, self.axis)

    def _replace_held(
        self, held: Mapping[Matrix, torch.Tensor], compute: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """The same for what the ranks of tp hold; what all of them hold whole, each computes for itself."""
        for matrix, tensor in held.items():
            if not matrix.is_cut:
                tensor.copy_(compute(tensor))
        cut = [matrix for matrix in held if matrix.is_cut]
        if not cut:
            return
        place, mine = self.mesh["tp"], cut[self.mesh["tp"].index :][:1]
        here: list[torch.Tensor] = [held[matrix] for matrix in cut]
        there: list[torch.Tensor] = []
        send = [tensor.numel() for tensor in here] + [0] * (place.size - len(cut))
        for matrix in mine:
            whole = here[0].new_empty(matrix.shape)
            there = list(whole.chunk(place.size, dim=int(matrix.held[0] == matrix.shape[0])))
        receive = [send[place.index]] * place.size
        self._carry(here, there, send, receive, "tp")
        if mine:
            whole.copy_(compute(whole))
        self._carry(there, here, receive, send, "tp")

    def _carry(
        self, here: list[torch.Tensor], there: list[torch.Tensor], send: list[int], receive: list[int], axis: str
    ) -> None:
        """Tensors `here`, of which each member gets `send` elements, into those of other ranks `there`."""
        rows = torch.cat([torch.empty(0, device=self.mesh.device), *(tensor.flatten() for tensor in here)])
        came = all_to_all(rows, self.mesh, axis, send, receive)
        for tensor, values in zip(there, came.split([tensor.numel() for tensor in there]), strict=True):
            tensor.copy_(values.view(tensor.shape))


class Muon(torch.optim.AdamW):
    """Muon for the groups that say "orthogonalised", AdamW for the others, over the flat partitions that ZeRO makes.

    fragments: yields where this rank's parts lie in them; asked at the first step. A matrix has one moment, exp_avg.
    """

    def __init__(
        self, groups: list[dict[str, Any]], mesh: Mesh, fragments: Callable[[], Iterable[Fragment]], **adamw: Any
    ) -> None:
        super().__init__(groups, **adamw)
        self._mesh, self._fragments = mesh, fragments
        self._whole: dict[torch.Tensor, WholeMatrices] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of the partitions that have a gradient, which it may overwrite. Collective over dp x cp and tp."""
        groups = self.param_groups
        for group in groups:
            for flat in group["params"] if group.get("orthogonalised") else ():
                self._step_matrices(flat, group)
        self.param_groups = [group for group in groups if not group.get("orthogonalised")]
        super().step()
        self.param_groups = groups

    def _step_matrices(self, flat: torch.Tensor, group: Mapping[str, Any]) -> None:
        state, gradient = self.state[flat], flat.grad
        assert gradient is not None
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(flat))
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        update = gradient.lerp_(momentum, MOMENTUM).to(self._mesh.device)
        self._matrices(flat, group).replace(update, scaled_update)
        flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(flat.device), alpha=-group["lr"])

    def _matrices(self, flat: torch.Tensor, group: Mapping[str, Any]) -> WholeMatrices:
        if flat not in self._whole:
            found = [piece for part in self._fragments() if part.flat is flat for piece in pieces_of(part)]
            axis = "expert_dp" if group.get("moe") else "dp_cp"
            self._whole[flat] = WholeMatrices(found, self._mesh, axis)
        return self._whole[flat]
