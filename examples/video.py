"""Draw short videos of digits that move in straight lines with a 3-D U-Net (Ho et al. 2022); needs scikit-learn."""

import torch
from general import arguments, compare_loops, draw, show, sinusoids, some_of, train
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastddpm import fuse

FRAMES, SIZE, WIDTH, SIZES = 6, 16, 16, ((1, 1), (1, 2), (2, 2), (3, 1))
DIGITS = torch.tensor(load_digits().images, dtype=torch.float32) / 8 - 1


class Block(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.act = nn.GroupNorm(4, into), nn.GroupNorm(4, out), nn.SiLU()
        self.conv1, self.conv2 = nn.Conv3d(into, out, 3, padding=1), nn.Conv3d(out, out, 3, padding=1)
        self.time, self.skip = nn.Linear(32, out), nn.Conv3d(into, out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        return self.skip(x) + self.conv2(self.act(self.norm2(h + self.time(time)[:, :, None, None, None])))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv3d(1, WIDTH, 3, padding=1), nn.Conv3d(WIDTH, 1, 3, padding=1)
        self.down, self.low, self.mid, self.up = (Block(WIDTH * a, WIDTH * b) for a, b in SIZES)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        high = self.down(self.into(x), time := sinusoids(t))
        low = self.mid(self.low(nn.functional.avg_pool3d(high, (1, 2, 2)), time), time)
        return self.out(self.up(torch.cat([high, low.repeat_interleave(2, 3).repeat_interleave(2, 4)], 1), time))


def videos(count: int) -> Tensor:
    digits = nn.functional.pad(some_of([DIGITS], count), (4, 4, 4, 4), value=-1)
    moves = torch.randint(-1, 2, (count, 1, 2)) * torch.arange(-2, FRAMES - 2)[:, None]
    shown = [digit.roll(by, (0, 1)) for digit, move in zip(digits, moves.tolist(), strict=True) for by in move]
    return torch.stack(shown).view(count, 1, FRAMES, SIZE, SIZE)


def measured(x: Tensor) -> tuple[Tensor, ...]:  # pixels per frame, their change, and the change of the ink
    ink, place = (x[:, 0] + 1).clamp(0.2, 2) - 0.2, torch.arange(SIZE).float()
    total = ink.sum((2, 3))
    speed = torch.stack([(ink.sum(3) @ place) / total, (ink.sum(2) @ place) / total], -1).diff(dim=1)
    return *(v.norm(dim=-1).mean() for v in (speed.mean(1), speed.diff(dim=1))), (total.std(1) / total.mean(1)).mean()


if __name__ == "__main__":
    options = arguments(__doc__, 1500, "video.png")
    model = train(Network(), lambda: videos(8), options.steps)
    fused = fuse(model, (torch.randn(1, 1, FRAMES, SIZE, SIZE), torch.tensor([500])))
    sets = {"data": videos(32), "drawn": draw(fused.model, 32, (1, FRAMES, SIZE, SIZE))}
    for name, x in sets.items():
        print("{}: {:.2f} pixels per frame, changing by {:.2f}, ink by {:.1%}".format(name, *measured(x)))
    show(options.plot, [x[:4, 0].transpose(1, 2).reshape(-1, FRAMES * SIZE) for x in sets.values()])
    compare_loops(model, fused.model, 4, (1, FRAMES, SIZE, SIZE))
