"""What several test files share: small made-up data, and runs in process."""
import json
import pickle
from pathlib import Path

import numpy as np
import torch

import train
from data import SPLITS

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = {"text": 6, "audio": 4, "vision": 3}


def fields(n=5, lengths=(8, 8, 8), dtype=np.float32, seed=0, emotions=False, front=True):
    """One split in MulT's layout; clip i has 3 + i real frames (of 8) in every stream."""
    rng, out = np.random.default_rng(seed), {}
    for (m, d), t in zip(WIDTHS.items(), lengths):
        x = rng.standard_normal((n, t, d)) + .1
        for i in range(n):
            k = min(t, 3 + i)
            x[i, :t - k if front else 0] = 0
            x[i, t if front else k:] = 0
        out[m] = x.astype(dtype)
    y = rng.uniform(-3, 3, (n, 1, 1)).astype(np.float32)
    out["labels"] = np.eye(2, dtype=np.float32)[rng.integers(0, 2, (n, 4))] if emotions else y
    return {**out, "id": np.array([[f"clip{seed}_{i}", "", ""] for i in range(n)], dtype="S")}


def content(**changes):
    return {s: fields(seed=k, **changes) for k, s in enumerate(SPLITS)}


def written(folder, what, name="mosi_data.pkl", protocol=4):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(what if isinstance(what, bytes) else pickle.dumps(what, protocol=protocol))
    return folder


class Call:
    """Pickles as a call of a function."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


FOLDERS = {"audio": 5, "text": 6, "vision": 4, "simulated_text": 6}


def feature_folders(root, sizes=(12, 6, 6), longest=9, seed=0):
    """Double-Flow's published layout: audio (T, d) a file, text (d,) a file, vision a folder of frames, and the labels.
    Returns the arguments and what was written: stream -> clip -> (T, d)."""
    rng, truth = np.random.default_rng(seed), {m: {} for m in FOLDERS}
    corpus, k = {}, 0
    for name, size in zip(("train_corpus", "val_corpus", "test_corpus"), sizes):
        facts = {}
        for _ in range(size):
            clip, k = f"video.{k}_{k % 3}", k + 1
            facts[clip] = {"emo": k % 2, "val": np.float64(rng.uniform(-3, 3)) if k % 2 else float(rng.uniform(-3, 3))}
            for m, d in FOLDERS.items():
                frames = 1 if m == "text" else int(rng.integers(1, longest + 1))
                x = rng.standard_normal((frames, d)).astype(np.float32)
                x[:, 0] = np.sign(facts[clip]["val"])
                truth[m][clip] = x
                folder = root / f"{m}_dir"
                folder.mkdir(parents=True, exist_ok=True)
                if m == "vision":
                    (folder / clip).mkdir()
                    for t, frame in enumerate(x):
                        np.save(folder / clip / f"{t}.npy", frame if t % 2 else frame[None])
                else:
                    np.save(folder / f"{clip}.npy", x[0] if m == "text" else x)
        corpus[name] = facts
    np.savez(root / "label_official.npz", **{k: np.array(v, dtype=object) for k, v in corpus.items()})
    made = {"features": {m: str(root / f"{m}_dir") for m in FOLDERS}, "labels": root / "label_official.npz"}
    return made, truth, corpus


def feature_arguments(root):
    """The flags of train.py for feature folders under root."""
    made, *_ = feature_folders(root, sizes=(24, 8, 8))
    folders = [f"{name}={folder}" for name, folder in made["features"].items()]
    return ["--dataset", "mosei", "--features", *folders, "--labels", made["labels"]]


def learnable(**changes):
    """A small pickle whose text tells the label; 40 clips a split, unless changed."""
    made = content(**{"n": 40, **changes})
    for f in made.values():
        y = f["labels"].reshape(len(f["labels"]), -1)
        sign = np.sign(y[:, 0]) if y.shape[1] == 1 else f["labels"][:, 1, 1] * 2 - 1
        f["text"][..., 0] = np.where(f["text"].any(-1), sign[:, None] + .1, 0)
    return made


def run_main(*arguments, main=train.main):
    """main's exit code, that of a refused command line too."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def run(folder, *more, seeds=("1",), epochs="2", dataset="mosi", method="corrkd"):
    """train.main on folder/data, runs in folder/runs, in process."""
    return run_main("--method", method, "--dataset", dataset, "--data-dir", folder / "data", "--out", folder / "runs",
                    "--epochs", epochs, "--lr", "0.004", "--batch-size", "16", "--device", "cpu", "--seeds", *seeds,
                    *more)


def rerecord(folder, source=None, **changes):
    """Writes source's checkpoint (default: the folder's own) into this run folder, entries changed: its own, those of
    its run record or of the record's config."""
    checkpoint = torch.load((source or folder) / "model.pt", weights_only=True)
    for name, value in changes.items():
        parts = (checkpoint, checkpoint["run"], checkpoint["run"]["config"])
        next(part for part in parts if name in part)[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, folder / "model.pt")


def history(folder, name="mosi/corrkd/s1"):
    return [json.loads(line) for line in (folder / "runs" / name / "log.jsonl").read_text().splitlines()]


def parameters(folder, name="mosi/corrkd/s1"):
    return torch.load(folder / "runs" / name / "model.pt", weights_only=True)["model"]


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a | b)
