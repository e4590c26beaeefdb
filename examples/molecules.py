"""Draw molecules like ASE's, points [position, kind], with an E(3)-equivariant network (Hoogeboom et al. 2022)."""

import torch
from ase.collections import g2
from ase.data import covalent_radii
from general import arguments, compare_loops, draw, plot, sinusoids, some_of, train
from torch import Tensor, nn

KINDS, NEIGHBOURS, WIDTH, UNIT = (1, 6, 7, 8), ((1,), (2, 3, 4), (1, 2, 3), (1, 2)), 64, 4.0  # UNIT in angstrom


class Network(nn.Module):  # rotating the points rotates its prediction, and shifting them does not change it
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4 + 32, WIDTH), nn.Linear(WIDTH, 4)
        first = [[nn.Linear(2 * WIDTH + more, WIDTH) for _ in range(layers)] for more in (1, 0)]
        self.messages, self.nodes = (
            nn.ModuleList(nn.Sequential(one, nn.SiLU(), nn.Linear(WIDTH, WIDTH)) for one in some) for some in first
        )
        self.moves = nn.ModuleList(nn.Linear(WIDTH, 1, bias=False) for _ in range(layers))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        place = begin = x[..., :3] - x[..., :3].mean(1, keepdim=True)
        h = self.into(torch.cat([x[..., 3:], sinusoids(t)[:, None].expand(-1, x.shape[1], -1)], -1))
        for message, node, move in zip(self.messages, self.nodes, self.moves, strict=True):
            apart = place[:, :, None] - place[:, None]
            distance, pair = apart.norm(dim=-1, keepdim=True), h[:, :, None].expand(-1, -1, x.shape[1], -1)
            m = message(torch.cat([pair, pair.transpose(1, 2), distance], -1))
            place, h = place + (apart / (distance + 1) * move(m)).mean(2), h + node(torch.cat([h, m.sum(2)], -1))
        return torch.cat([(place - begin) - (place - begin).mean(1, keepdim=True), self.out(h)], -1)


def molecules() -> list[Tensor]:  # of each size
    found: dict[int, list[Tensor]] = {}
    for one in map(g2.__getitem__, g2.names):
        if set(one.numbers) <= set(KINDS) and 5 <= len(one) <= 10 and not one.get_initial_magnetic_moments().any():
            kinds = torch.tensor([[float(kind == number) for kind in KINDS] for number in one.numbers]) - 0.5
            place = torch.tensor(one.positions - one.positions.mean(0)) / UNIT
            found.setdefault(len(one), []).append(torch.cat([place, kinds], 1).float())
    return [torch.stack(some) for some in found.values()]


def measured(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # lengths of C-H and C-C bonds, and which atoms are right
    kinds, distance = x[:, 3:].argmax(-1), torch.cdist(x[:, :3], x[:, :3]) * UNIT
    reach = torch.tensor([covalent_radii[kind] for kind in KINDS]).float()[kinds]
    bonds = (distance < 1.25 * (reach[:, None] + reach)) & (distance > 0.5)
    right = torch.tensor([[n in allowed for n in range(16)] for allowed in NEIGHBOURS])[kinds, bonds.sum(-1)]
    return *(distance[bonds & (kinds[:, None] == 1) & (kinds == of)] for of in (0, 1)), right


if __name__ == "__main__":
    options, sizes = arguments(__doc__, 3000, "molecules.png"), molecules()
    model = train(Network(), lambda: some_of(sizes, 64), options.steps)
    drawn = [x for own in sizes for x in draw(model, 4 * len(own), own.shape[1:], steps=100)]
    sets = {"data": [x for own in sizes for x in own], "drawn": drawn}
    found = {name: [torch.cat(part) for part in zip(*map(measured, x), strict=True)] for name, x in sets.items()}
    for name, (ch, cc, right) in found.items():
        print(f"{name}: {right.float().mean():.1%} of atoms right, C-H {ch.mean():.3f}, C-C {cc.mean():.3f} angstrom")
    plot(options.plot, {f"{bond} length": {n: found[n][i] for n in found} for i, bond in enumerate(("C-H", "C-C"))})
    compare_loops(model, model, 64, (8, 7))
