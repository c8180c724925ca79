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
        layer = torch.nn.TransformerEncoderLayer(c.width, c.heads, 4 * c.width, c.dropout, batch_first=True, norm_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, c.layers, torch.nn.LayerNorm(c.width), enable_nested_tensor=False)
        self.dropout = torch.nn.Dropout(c.dropout)

    def forward(self, x, real):
        x = math.sqrt(self.width) * self.conv(x.transpose(1, 2)).transpose(1, 2) + corrkd.sinusoid(x.shape[1], self.width, x.device)
        x = self.layers(self.dropout(x), src_key_padding_mask=~real)
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
    """CorrKD in the student's stage, MOSI's stand-in, and its training clips with the teacher's outputs."""
    loaded = data.load("mosi", device=device, synthetic=True, splits=data.SPLITS)
    model, clips = corrkd.CorrKD(DIMS, "polarity").to(device), train.Clips({"task": "polarity"}, loaded, device)
    model.begin("student")
    clips.fixed = clips.teacher_outputs(model)
    return model, clips, loaded


def epoch_by_length(device):
    """A student epoch over MOSI's lengths: batches of similar length against every clip at 50 positions."""
    model, clips, _ = made_up(device)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    cut = data.batch

    def whole(split, index, there, draw):
        real = {m: split["real"][m][index] for m in data.STREAMS}
        present, masks = draw(real), lambda d: {m: x.to(device) for m, x in d.items()}
        return {m: split[m][there] for m in data.STREAMS}, masks(real), masks(present)

    def epoch(batch):
        def work():
            data.batch = batch
            train.train_epoch(model, optimizer, clips, model.config, "epoch")
            data.batch = cut
        return work
    return ratio(epoch(whole), epoch(cut), device, 5)


def seven_sets(device):
    """The seven available sets of MOSI's test split: streams encoded once against seven full passes."""
    model, _, loaded = made_up(device)

    class Whole(torch.nn.Module):
        represent, classify, encode = model.represent, model.classify, None
    masks = [data.evaluation_masks(loaded["test"]["real"], c, "test") for c in data.SETS]
    form = lambda model: lambda: evaluation.predict(model, loaded["test"], masks)
    model.eval()
    return ratio(form(Whole()), form(model), device, 7)


class PlainBlock(torch.nn.Module):
    """umdf.Block as most would write it: one nn.MultiheadAttention call, with its own dropout as in PyTorch's layers or without."""

    def __init__(self, c, dropout):
        super().__init__()
        self.norm_attention, self.norm_ffn = torch.nn.LayerNorm(c.width), torch.nn.LayerNorm(c.width)
        self.attention = torch.nn.MultiheadAttention(c.width, c.heads, dropout, batch_first=True)
        self.ffn = torch.nn.Sequential(torch.nn.Linear(c.width, 4 * c.width), torch.nn.ReLU(), torch.nn.Dropout(c.dropout),
                                       torch.nn.Linear(4 * c.width, c.width))
        self.dropout = torch.nn.Dropout(c.dropout)

    def forward(self, x, y, real):
        q, kv = self.norm_attention(x), self.norm_attention(y)
        x = x + self.dropout(self.attention(q, kv, kv, key_padding_mask=~real)[0])
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class TwoPasses(umdf.UMDF):
    """The complete and the missing pass one after the other."""

    def represent(self, streams, real):
        parts = [super(TwoPasses, self).represent(*({m: v.chunk(2)[i] for m, v in d.items()} for d in (streams, real))) for i in (0, 1)]
        return torch.cat(parts)


def umdf_step(device, dropout):
    """One training step, batch 128, T = 50: against one nn.MultiheadAttention call a block and two passes in sequence."""
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
    return ratio(step(TwoPasses, lambda c: PlainBlock(c, dropout)), step(umdf.UMDF, umdf.Block), device, 7)


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
        halves = [[v.chunk(2)[i] for v in (text, audio, vision)] + [bool(i), {m: r.chunk(2)[i] for m, r in real.items()}] for i in (0, 1)]
        a, b = (super(TwoFlows, self).flow(*half) for half in halves)
        return {k: torch.cat((a[k], b[k])) for k in a}


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
                "before = kib('VmRSS'); loaded = data.load('mosei', sys.argv[1], data.SPLITS); print(1024 * (kib('VmHWM') - before))")
        done = subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout) / size


def whole_epochs(device, limit):
    """Seconds of a training epoch and of its validation, each method and data set with its own settings."""
    for name in data.SIZES:
        loaded = data.load(name, device=device, synthetic=True, limit=limit)
        for method, module in evaluation.METHODS.items():
            config, task = module.PAPER[name], module.TASKS[name]
            model, clips = module.Model(DIMS, task, config).to(device), train.Clips({"task": task}, loaded, device)
            for stage in model.stages:
                model.begin(stage)
                clips.fixed = clips.teacher_outputs(model)
                optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.lr)
                trained, judged = (min(seconds(work, device) for _ in range(2)) for work in (
                    lambda: train.train_epoch(model, optimizer, clips, config, stage),
                    lambda: evaluation.evaluate(model, task, loaded["valid"], model.stages[stage], "valid")))
                print(f"{method} {name} {stage}: {trained:.2f} s an epoch, {judged:.2f} s its validation; five seeds of "
                      f"{config.epochs} epochs {5 * config.epochs * (trained + judged) / 60:.0f} min", flush=True)


MEASUREMENTS = {    # name -> (function of the device, goal or None); memory has an upper goal, written with a minus
    "corrkd_step": (student_step, 2.2), "corrkd_epoch": (epoch_by_length, 1.8), "corrkd_seven_sets": (seven_sets, 5.0),
    "umdf_step": (lambda device: umdf_step(device, umdf.Config.dropout), 1.6), "umdf_step_no_attention_dropout": (lambda device: umdf_step(device, 0.0), None),
    "rank_n_contrast": (contrast, 5.0), "double_flow_step": (double_flow_step, 1.3),
    "load_memory_float32": (lambda device: load_memory(np.float32), -1.3), "load_memory_float64": (lambda device: load_memory(np.float64), -1.3),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    parser.add_argument("--device", default="cpu", help="on cuda the seconds of whole epochs follow")
    parser.add_argument("--epochs", action="store_true", help="seconds of whole epochs on a CPU too (half an hour)")
    parser.add_argument("--limit", type=int, help="of the whole epochs: the first clips of each split alone")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    args = parser.parse_args()
    device, missed = evaluation.device_named(args.device), 0
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {train.machine(device)['device']}")
    for name in args.only:
        work, goal = MEASUREMENTS[name]
        got = work(device)
        missed += goal is not None and (got < goal if goal > 0 else got > -goal)
        print(f"{name} {got:.2f}x" + ("" if goal is None else f" (goal {goal}x)" if goal > 0 else f" (goal at most {-goal}x)"), flush=True)
    if args.epochs or device.type == "cuda":
        whole_epochs(device, args.limit)
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
