"""Speed and memory, by hand: python tests/benchmark.py [--check] [--device cuda] [--only NAME ...]

Each line is a ratio of two forms of the same work, measured in turn in one process, the median of several rounds.
"""
import argparse
import math
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import corrkd
import data
import double_flow
import eval as evaluation
import train
import umdf

DIMS = {"text": 300, "audio": 74, "vision": 35}


class PlainEncoder(torch.nn.Module):
    """The encoder as most would write it: PyTorch's own layers, dropout inside the attention too."""

    def __init__(self, width_in, c):
        super().__init__()
        self.width = c.width
        self.conv = torch.nn.Conv1d(width_in, c.width, 3, padding=1, bias=False)
        layer = torch.nn.TransformerEncoderLayer(c.width, c.heads, 4 * c.width, c.dropout, batch_first=True,
                                                 norm_first=True)
        norm = torch.nn.LayerNorm(c.width)
        self.layers = torch.nn.TransformerEncoder(layer, c.layers, norm, enable_nested_tensor=False)
        self.dropout = torch.nn.Dropout(c.dropout)

    def forward(self, x, real):
        f = math.sqrt(self.width) * self.conv(x.transpose(1, 2)).transpose(1, 2)
        f = self.dropout(f + corrkd.sinusoid(x.shape[1], self.width, x.device))
        x = self.layers(f, src_key_padding_mask=~real)
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)


def seconds(work, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ratio(slow, fast, device, rounds):
    """How often the fast form fits into the slow one: the median over rounds in which both run in turn."""
    slow(), fast()
    return statistics.median(seconds(slow, device) / seconds(fast, device) for _ in range(rounds))


def student_step(device):
    """One student step, batch 64, T = 50: against PyTorch's layers with the teacher recomputed at each step."""
    ours, plain = (corrkd.CorrKD(DIMS, "polarity") for _ in range(2))
    for network in (plain.teacher, plain.student):
        network.encoders = torch.nn.ModuleDict({m: PlainEncoder(d, plain.config) for m, d in DIMS.items()})
    complete = {m: torch.randn(64, 50, d, device=device) for m, d in DIMS.items()}
    missing = {m: x * (torch.rand(64, 50, 1, device=device) < .5) for m, x in complete.items()}
    real = {m: torch.ones(64, 50, dtype=torch.bool, device=device) for m in DIMS}
    target = torch.arange(64, device=device) % 2

    def step(model, stored):
        model.to(device).begin("student")
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        teacher = model.eval().teacher_outputs(complete, real) if stored else None
        model.train()

        def work():
            optimizer.zero_grad()
            model.losses(complete, missing, target, real, teacher)["total"].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        return work
    return ratio(step(plain, False), step(ours, True), device, 15)


def made_up(device):
    """CorrKD in the student's stage, MOSI's stand-in, its training clips and their teacher's outputs."""
    loaded = data.load("mosi", device=device, synthetic=True, splits=data.SPLITS)
    model = corrkd.CorrKD(DIMS, "polarity").to(device)
    model.begin("student")
    index, truth = evaluation.targets(loaded["train"]["label"].cpu(), "polarity")
    return model, loaded, index, truth.to(device), train.teacher_rows(model, loaded["train"], index)


def epoch_by_length(device):
    """A student epoch over MOSI's lengths: batches of similar length against every clip at 50 positions."""
    model, loaded, index, truth, teacher = made_up(device)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    cut = data.batch

    def whole(split, index, generator=None):
        real = {m: split["real"][m][index] for m in data.STREAMS}
        complete = {m: split[m][index] for m in data.STREAMS}
        present = data.training_masks(real, generator)
        missing = {m: complete[m] * present[m][..., None].to(device) for m in data.STREAMS}
        return complete, missing, {m: mask.to(device) for m, mask in real.items()}

    def epoch(batch):
        def work():
            data.batch = batch
            train.train_epoch(model, optimizer, loaded["train"], index, truth, teacher, model.config,
                              torch.Generator().manual_seed(0), "epoch")
            data.batch = cut
        return work
    return ratio(epoch(whole), epoch(cut), device, 5)


def seven_sets(device):
    """The seven available sets of MOSI's test split: two encodings a stream against seven full passes."""
    model, loaded, *_ = made_up(device)

    class Whole(torch.nn.Module):
        represent, classify, encode = model.represent, model.classify, None
    model.eval()

    def form(model):
        return lambda: evaluation.predict(model, loaded["test"], list(data.SETS), "test")
    return ratio(form(Whole()), form(model), device, 7)


class PlainBlock(torch.nn.Module):
    """umdf.Block as most would write it: one nn.MultiheadAttention with dropout of its own."""

    def __init__(self, c):
        super().__init__()
        self.norm_attention, self.norm_ffn = torch.nn.LayerNorm(c.width), torch.nn.LayerNorm(c.width)
        self.attention = torch.nn.MultiheadAttention(c.width, c.heads, c.dropout, batch_first=True)
        self.ffn = torch.nn.Sequential(torch.nn.Linear(c.width, 4 * c.width), torch.nn.ReLU(),
                                       torch.nn.Dropout(c.dropout), torch.nn.Linear(4 * c.width, c.width))
        self.dropout = torch.nn.Dropout(c.dropout)

    def forward(self, x, y, real):
        q, kv = self.norm_attention(x), self.norm_attention(y)
        x = x + self.dropout(self.attention(q, kv, kv, key_padding_mask=~real)[0])
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class TwoPasses(umdf.UMDF):
    """The complete and the missing pass one after the other."""

    def represent(self, streams, real):
        def half(batch, i):
            return {m: value.chunk(2)[i] for m, value in batch.items()}
        parts = [super(TwoPasses, self).represent(half(streams, i), half(real, i)) for i in (0, 1)]
        return torch.cat(parts)


def umdf_step(device):
    """One training step, batch 128, T = 50: against one nn.MultiheadAttention a block and two passes in sequence."""
    complete = {m: torch.randn(128, 50, d, device=device) for m, d in DIMS.items()}
    missing = {m: x * (torch.rand(128, 50, 1, device=device) < .5) for m, x in complete.items()}
    real = {m: torch.ones(128, 50, dtype=torch.bool, device=device) for m in DIMS}
    target = torch.randn(128, device=device)

    def step(Model, Block):
        whole, umdf.Block = umdf.Block, Block
        model = Model(DIMS, "regression").to(device)
        umdf.Block = whole
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

        def work():
            optimizer.zero_grad()
            model.losses(complete, missing, target, real)["total"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return work
    return ratio(step(TwoPasses, PlainBlock), step(umdf.UMDF, umdf.Block), device, 7)


def contrast_by_loop(features, labels, temperature=2.0):
    """Rank-n-contrast in the form of the official code: one step of Python for each column of pairs."""
    n, labels = len(features), labels.reshape(len(features), -1)
    gap = (labels[:, None] - labels[None]).abs().sum(-1)
    s = -(features[:, None] - features[None]).norm(dim=-1) / temperature
    s = s - s.detach().max(1, keepdim=True).values
    other = ~torch.eye(n, dtype=torch.bool, device=s.device)
    gap, s = gap[other].view(n, n - 1), s[other].view(n, n - 1)
    power, total = s.exp(), 0.0
    for k in range(n - 1):
        below = ((gap >= gap[:, k:k + 1] - 1e-4) * power).sum(1)
        total = total - (s[:, k] - below.log()).sum() / (n * (n - 1))
    return total


def contrast(device):
    """Rank-n-contrast forward and backward at 2 x 96 vectors of 64: against the loop."""
    x, y = torch.randn(192, 64, device=device, requires_grad=True), torch.randn(96, device=device).repeat(2)
    form = lambda f: lambda: f(x, y).backward()
    return ratio(form(contrast_by_loop), form(double_flow.rank_n_contrast), device, 15)


class TwoFlows(double_flow.DoubleFlow):
    """The two flows one after the other, with PyTorch's dropout."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        for part in (*self.pooling.values(), *self.cross.values()):
            part.dropout = torch.nn.Dropout(0.5)

    def flow(self, text, audio, vision, text_missing, real=None):
        flows = []
        for i in (0, 1):
            half = {m: mask.chunk(2)[i] for m, mask in real.items()}
            flows.append(super().flow(text.chunk(2)[i], audio.chunk(2)[i], vision.chunk(2)[i], bool(i), half))
        return {name: torch.cat((flows[0][name], flows[1][name])) for name in flows[0]}


def double_flow_step(device):
    """One training step, batch 96, T = 50: against two separate passes and the loop loss."""
    x = {m: torch.randn(96, 50, d, device=device) for m, d in DIMS.items()}
    real, y = {m: torch.ones(96, 50, dtype=torch.bool, device=device) for m in DIMS}, torch.randn(96, device=device)

    def step(Model, loss):
        model = Model(DIMS, "regression").to(device)
        optimizer, ours = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5), double_flow.rank_n_contrast

        def work():
            double_flow.rank_n_contrast = loss
            optimizer.zero_grad()
            model.losses(x, None, y, real)["total"].backward()
            optimizer.step()
            double_flow.rank_n_contrast = ours
        return work
    return ratio(step(TwoFlows, contrast_by_loop), step(double_flow.DoubleFlow, double_flow.rank_n_contrast), device, 9)


def load_memory(dtype):
    """Peak memory of loading all splits of a MOSEI-shaped pickle, in units of its float32 size."""
    with tempfile.TemporaryDirectory() as folder:
        rng, content, size = np.random.default_rng(0), {}, 0
        for s, n in zip(data.SPLITS, data.SIZES["mosei"]):
            content[s] = {m: rng.random((n, 50, d), np.float32).astype(dtype) for m, d in DIMS.items()}
            content[s]["labels"] = np.zeros((n, 1, 1), np.float32)
            size += sum(content[s][m].size * 4 for m in DIMS)
        with open(Path(folder) / "mosei_senti_data.pkl", "wb") as file:
            pickle.dump(content, file, protocol=4)
        del content
        code = ("import re, sys, data\n"       # not ru_maxrss: a child process starts from its parent's
                "kib = lambda key: int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
                "before = kib('VmRSS'); loaded = data.load('mosei', sys.argv[1], data.SPLITS)\n"
                "print(1024 * (kib('VmHWM') - before))")
        done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True,
                              check=True)
    return int(done.stdout) / size


MEASUREMENTS = {    # name -> (function of the device, goal)
    "corrkd_step": (student_step, 1.8),
    "corrkd_epoch": (epoch_by_length, 1.8),
    "corrkd_seven_sets": (seven_sets, 2.5),
    "umdf_step": (umdf_step, 1.5),
    "rank_n_contrast": (contrast, 5.0),
    "double_flow_step": (double_flow_step, 1.4),
    "load_memory_float32": (lambda device: load_memory(np.float32), 2.1),       # the file, and 1.1 times its features
    "load_memory_float64": (lambda device: load_memory(np.float64), 3.1),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    args = parser.parse_args()
    device = evaluation.device_named(args.device)
    warnings.filterwarnings("ignore", "CorrKD's teacher")      # that it is random makes no difference here
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {train.machine(device)['device']}")
    missed = False
    for name in args.only:
        work, goal = MEASUREMENTS[name]
        got = work(device)
        upper = name.startswith("load_memory")
        missed |= got > goal if upper else got < goal
        print(f"{name} {got:.2f}x (goal: at {'most' if upper else 'least'} {goal}x)", flush=True)
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
