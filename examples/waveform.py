"""Draw the sound of plucked strings with a dilated network after DiffWave (Kong et al. 2021).

A note has one of 13 fundamentals, an octave of semitones, and eight fading harmonics. The report says how much energy
lies on harmonics of the strongest fundamental, and how far that is from a semitone. Run: python examples/waveform.py
"""

import torch
from general import arguments, compare_loops, draw, plot, sinusoids, train
from torch import Tensor, nn

RATE, LENGTH, LOW, WIDTH = 2000, 512, 80.0, 32  # samples per second, samples, hertz, channels


class Network(nn.Module):
    def __init__(self, layers: int = 10) -> None:
        super().__init__()
        self.into, self.out = nn.Conv1d(1, WIDTH, 1), nn.Sequential(nn.SiLU(), nn.Conv1d(WIDTH, 1, 1))
        self.time, dilations = nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU()), [2 ** (i % 8) for i in range(layers)]
        self.convs = nn.ModuleList(nn.Conv1d(WIDTH, 2 * WIDTH, 3, padding=d, dilation=d) for d in dilations)
        self.times = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in dilations)
        self.mixes = nn.ModuleList(nn.Conv1d(WIDTH, 2 * WIDTH, 1) for _ in dilations)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, time, skips = self.into(x), self.time(sinusoids(t)), 0
        for conv, of_time, mix in zip(self.convs, self.times, self.mixes, strict=True):
            gate, value = conv(x + of_time(time)[:, :, None]).chunk(2, dim=1)
            more, skip = mix(gate.sigmoid() * value.tanh()).chunk(2, dim=1)
            x, skips = (x + more) * 0.5**0.5, skips + skip
        return self.out(skips / len(self.convs) ** 0.5)


def notes(count: int) -> Tensor:
    pitch, seconds = LOW * 2 ** (torch.randint(13, (count, 1, 1)) / 12), torch.arange(LENGTH) / RATE
    order = torch.arange(1, 9)[:, None]
    waves = torch.sin(2 * torch.pi * (order * pitch * seconds + torch.rand(count, 8, 1)))
    return 0.5 * (waves / order * torch.exp(-4 * order**0.5 * seconds)).sum(1, keepdim=True)


def measured(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # energy on harmonics, cents from a semitone, mean spectrum
    power = torch.fft.rfft(x[:, 0] * torch.hann_window(LENGTH), 8 * LENGTH).abs().square()
    bins = torch.arange(4 * LENGTH + 1) * RATE / (8 * LENGTH)
    pitches = LOW * 2 ** (torch.linspace(-0.5, 12.5, 521) / 12)
    near = (bins / pitches[:, None] - (bins / pitches[:, None]).round()).abs() * pitches[:, None] < 4
    near &= (bins > pitches[:, None] / 2) & (bins < 8.5 * pitches[:, None])
    share, best = (power @ near.float().T / power.sum(1, keepdim=True)).max(1)
    cents = 1200 * (pitches[best] / LOW).log2()
    return share, (cents - (cents / 100).round() * 100).abs(), torch.stack([bins, power.mean(0).log10()], 1)


if __name__ == "__main__":
    options = arguments(__doc__, 1500, "waveform.png")
    model = train(Network(), lambda: notes(16), options.steps)
    sets = {"data": notes(64), "drawn": draw(model, 64, (1, LENGTH)), "noise": torch.randn(64, 1, LENGTH)}
    found = {name: measured(x) for name, x in sets.items()}
    for name, (share, cents, _) in found.items():
        print(f"{name}: {share.median():.1%} of the energy on harmonics, {cents.median():.0f} cents from a semitone")
    first = {name: torch.stack([torch.arange(LENGTH) / RATE, sets[name][0, 0]], 1) for name in ("data", "drawn")}
    spectra = {name: of[2] for name, of in found.items()}
    plot(options.plot, {"seconds": first, "hertz (log10 of the mean power)": spectra})
    compare_loops(model, model, 8, (1, LENGTH))
