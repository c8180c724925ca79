"""Evaluate trained runs under missing modalities and print the papers' tables.

    python eval.py runs/mosi/corrkd              seven available sets, then dropped frames p = 0.0 ... 1.0
    python eval.py runs/mosi --csv tables.csv    several methods and ablations: one table a data set
    python eval.py runs/mosi/corrkd/s1111 --data-dir mine.pkl    clips of one's own, labelled or not

The runs of one folder differ in their seed alone and are averaged. Each run folder gets results.json,
every number (NaN where there is none), and predictions.csv, every answer, in the place of an earlier
evaluation's.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import pickle
import statistics
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import auc, f1_score, mean_absolute_error

import corrkd
import data
import double_flow
import umdf
from data import STREAMS, DataError, say

METHODS = {"umdf": umdf, "corrkd": corrkd, "double_flow": double_flow}
# What a method file offers, and all that is asked of it here and in train.py. A fourth method is one file
# and its name.
#   TASKS             data set -> "regression", "polarity" or "emotions"
#   Config            a dataclass with at least lr, weight_decay, batch_size, epochs, clip, aligned; a field
#                     `layers`, if any, counts modules (see build)
#   PAPER             data set -> Config
#   ABLATIONS         name -> the fields of Config that it changes
#   REPORTED          data set -> ablation ("" = the full method) -> metric -> column -> the paper's number
#   FEATURES          stream -> the width of the features that REPORTED is of
#   TABLE             column -> title where the paper's table is not that of the seven sets, else {}
#   learning_rate_factor(epoch) -> what lr is multiplied by in epoch 0, 1, ...; absent where it is constant
#   Model(dims, task, config), an nn.Module with
#     stages                                  stage -> the sets of streams that it is about
#     begin(stage)                            before each stage, in the order of `stages`
#     teacher_outputs(complete, real)         -> tensors, a row a clip, constant during the stage; or None
#     losses(complete, missing, target, real, teacher=None)   -> {term: scalar, "total": scalar}. missing:
#                                             the same clips with frames and streams zeroed; teacher: rows
#                                             of teacher_outputs
#     represent(streams, real)                -> h (B, width)
#     classify(h)                             -> (B, 1), (B, 2) or (B, 4, 2); forward is both
#     encode(name, stream, real)              -> (B, d), h being the three side by side; None if they interact
AGAIN = "It is not as this train.py writes it: remove it, and the same train.py command makes it again."
FORMAT = 4              # of run records: those of another one are refused
RECORD = ("format", "method", "dataset", "task", "ablation", "seed", "limit", "normalize", "dims", "lacking",
          "config", "constant", "data")
RUN_FILES = ("config.json", "log.jsonl", "last.pt", "model.pt", "results.json", "predictions.csv")
CSV_START = b"dataset,synthetic,"      # how a file of --csv begins
TITLES = {"l": "{l}", "a": "{a}", "v": "{v}", "la": "{l,a}", "lv": "{l,v}", "av": "{a,v}", "avg": "Avg.",
          "lav": "{l,a,v}"}         # column -> its title in the table of available streams
SHOWN = ("happy", "sad", "angry", "neutral")    # the papers' order of emotions
MAIN = ("F1", "MAE", *(f"F1 {emotion}" for emotion in SHOWN))       # metrics in every table and figure
METRICS = (*MAIN, "F1 has0", "Acc-2", "Acc-2 has0", "Acc-7", "Corr")
STRENGTHS = (1e5, 1e4, 1e3, 1e2, 1e1, 1e0)      # of the ridge regression that is the linear baseline
COPIES = 5              # randomly dropped copies of the training split that it is fitted on
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink",
          "tab:olive", "tab:cyan", "black", "gold")         # of the runs; grey is the baselines'


# ---------------------------------------------------------------------------------- metrics

def targets(label: torch.Tensor, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which clips count (indices), and what they are: their sentiment; polarity, which leaves sentiment
    0 out and calls > 0 class 1; or four emotions of 0 and 1."""
    if task == "polarity":
        index = label.nonzero()[:, 0]
        if len(index) == 0:
            raise DataError("All sentiments of a split are 0: there is nothing positive or negative to learn or "
                            "measure.")
        return index, (label[index] > 0).long()
    every_clip = torch.arange(len(label), device=label.device)
    return every_clip, label if task == "regression" else label.long()


def constant(truth: torch.Tensor, task: str):
    """What a predictor that knows only these labels answers: their median, or the commoner class of each
    decision."""
    if task == "regression":
        return truth.median().item()
    return truth.float().mean(0).round().long().tolist()


def weighted_f1(truth: np.ndarray, answer: np.ndarray) -> float:
    """In per cent; nan of no clip. By keyword, as the order matters: classes are weighted by the truth."""
    if len(truth) == 0:
        return math.nan
    return 100 * float(f1_score(y_true=truth, y_pred=answer, average="weighted", zero_division=0))


def accuracy(truth: np.ndarray, answer: np.ndarray) -> float:
    """In per cent; nan of no clip."""
    return 100 * float((truth == answer).mean()) if len(truth) else math.nan


def correlation(truth: np.ndarray, answer: np.ndarray) -> float:
    """Pearson's; nan where one side is constant."""
    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(answer) == 0:
        return math.nan
    return float(np.corrcoef(truth, answer)[0, 1])


def metrics(task: str, answer: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """answer, truth: classes (n,) or (n, 4), or sentiment (n,). F1 and accuracies in per cent, MAE in
    label units.

    Regression: F1 and Acc-2 ask whether > 0, of the clips whose sentiment is not 0; "has0" whether >= 0,
    of all clips. Acc-7 compares the nearest integers in [-3, 3], halves to the even one (0.5 -> 0, 1.5
    and 2.5 -> 2), as numpy and most published code round.
    """
    if task == "polarity":
        return {"F1": weighted_f1(truth, answer)}
    if task == "emotions":
        result = {}
        for emotion in SHOWN:
            column = data.EMOTIONS.index(emotion)
            result[f"F1 {emotion}"] = weighted_f1(truth[:, column], answer[:, column])
        return result
    signed = truth != 0
    positive = truth[signed] > 0, answer[signed] > 0
    not_negative = truth >= 0, answer >= 0
    seven = np.rint(np.clip(truth, -3, 3)), np.rint(np.clip(answer, -3, 3))
    return {
        "F1": weighted_f1(*positive),
        "MAE": float(mean_absolute_error(truth, answer)),
        "F1 has0": weighted_f1(*not_negative),
        "Acc-2": accuracy(*positive),
        "Acc-2 has0": accuracy(*not_negative),
        "Acc-7": accuracy(*seven),
        "Corr": correlation(truth, answer),
    }


# ---------------------------------------------------------------------------------- predictions

def hide(streams: dict, present: dict, index: torch.Tensor) -> dict:
    """A batch's streams m -> (B, T_m, d_m) with zeros where a frame is not present. index (B,): the
    batch's clips in the split; present: m -> (N, T_m) bool of the whole split, True = the frame is
    there."""
    result = dict(streams)
    for m in STREAMS:
        frames = present[m][index, :streams[m].shape[1]].to(streams[m].device)
        result[m] = streams[m] * frames[..., None]
    return result


def represent_sets(model, streams: dict, real: dict) -> dict[str, torch.Tensor]:
    """Set -> joint representation (B, width) of a model that encodes each stream by itself: two encodings a
    stream, whole and absent, put together, in the place of seven passes."""
    whole, absent, joint = {}, {}, {}
    for m in STREAMS:
        whole[m] = model.encode(m, streams[m], real[m])
        lengths, clip = real[m].unique(dim=0, return_inverse=True)     # absent, clips of one length are alike
        zeros = streams[m].new_zeros(len(lengths), *streams[m].shape[1:])
        absent[m] = model.encode(m, zeros, lengths)[clip]
    for name, available in data.SETS.items():
        parts = [whole[m] if m in available else absent[m] for m in STREAMS]
        joint[name] = torch.cat(parts, dim=-1)
    return joint


@torch.no_grad()
def predict_under(model, split: dict, masks: dict, size: int = 256) -> dict:
    """Name -> outputs (N, ...) on the CPU, under each of these masks (name -> stream -> present (N,
    T_m)). Clips go through in batches of similar length, `size` at a time, which changes no answer."""
    model.eval()
    outputs = {name: [] for name in masks}
    order = sum(split["real"][m].sum(1) for m in STREAMS).argsort(stable=True)
    for index in order.split(size):
        streams, _, real = data.batch(split, index)
        joint = represent_sets(model, streams, real) if model.encode else {}
        for name, present in masks.items():
            if name in joint:
                h = joint[name]
            else:
                h = model.represent(hide(streams, present, index), real)
            outputs[name].append(model.classify(h))
    place = order.argsort()     # where each clip of the split stands in `order`
    return {name: torch.cat(parts).cpu()[place] for name, parts in outputs.items()}


def predict(model, split: dict, conditions, split_name: str, mask_seed: int = 0, size: int = 256) -> dict:
    """Condition -> outputs (N, ...) on the CPU. A condition is a set of streams ("l" ... "lav") or a
    rate of dropped frames. A DataError if an output is not finite."""
    masks = {c: data.evaluation_masks(split["real"], c, split_name, mask_seed) for c in conditions}
    outputs = predict_under(model, split, masks, size)
    for condition, output in outputs.items():
        if not output.isfinite().all():
            raise DataError(f"The answers under condition {condition} are not finite: the model's weights have "
                            "grown too large. Train again with a lower --lr.")
    return outputs


def answers(task: str, output: torch.Tensor) -> torch.Tensor:
    """Sentiment (n,) or classes (n,) or (n, 4) from a model's outputs (n, 1), (n, 2) or (n, 4, 2)."""
    return output[:, 0] if task == "regression" else output.argmax(-1)


def measure(task: str, split: dict, outputs: dict, split_name: str, mask_seed: int = 0) -> dict:
    """evaluate's result, from the outputs of `predict`."""
    index, truth = targets(split["label"], task)
    index, truth = index.cpu(), truth.cpu().numpy()
    results = {}
    for condition, output in outputs.items():
        present = data.evaluation_masks(split["real"], condition, split_name, mask_seed)
        values = metrics(task, answers(task, output[index]).numpy(), truth)
        realised = data.realised(present, split["real"])
        results[str(condition)] = {"n": len(truth), "realised": realised, **values}
    return results


def evaluate(model, task: str, split: dict, conditions, split_name: str, mask_seed: int = 0) -> dict:
    """str(condition) -> {"n": clips that count, "realised": stream -> share of frames dropped, metric:
    value}."""
    outputs = predict(model, split, conditions, split_name, mask_seed)
    return measure(task, split, outputs, split_name, mask_seed)


def score(results: dict) -> float:
    """One number for results of `evaluate`, the more the better: the mean over the conditions of -MAE
    for a regression, else of F1 (over the emotions too)."""
    values = []
    for cell in results.values():
        if "MAE" in cell:
            values.append(-cell["MAE"])
        else:
            values += [value for name, value in cell.items() if name.startswith("F1")]
    return statistics.fmean(values)


# ---------------------------------------------------------------------------------- the linear baseline

class Linear(torch.nn.Module):
    """The linear baseline, evaluated like every model: the mean over the real frames of each stream
    (zeros where it is absent; a dropped frame counts as the zeros that it is), side by side, times a
    matrix. weight (outputs, width), bias (outputs,); an output is a sentiment, or above 0 where a
    decision is for class 1."""

    def __init__(self, task: str, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.task = task
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def encode(self, name: str, stream: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return stream.sum(1, dtype=torch.float64) / real.sum(1, keepdim=True).clamp(min=1)

    def represent(self, streams: dict, real: dict) -> torch.Tensor:
        return torch.cat([self.encode(m, streams[m], real[m]) for m in STREAMS], dim=-1)

    def classify(self, h: torch.Tensor) -> torch.Tensor:
        y = h @ self.weight.T + self.bias
        if self.task == "regression":
            return y
        logits = torch.stack((-y, y), -1)
        return logits[:, 0] if self.task == "polarity" else logits


def fit_linear(loaded: dict, task: str) -> dict | None:
    """weight and bias of Linear: ridge regression on the sentiment, or on -1 and 1 for a decision, of
    randomly dropped copies of the training split; its strength is the best on validation over the
    available sets. None for feature folders."""
    train, valid = loaded["train"], loaded["valid"]
    if isinstance(train["text"], data.Frames):
        return None
    device = train["text"].device
    generator = torch.Generator().manual_seed(0)
    copies = {i: data.training_masks(train["real"], generator, train["lacking"]) for i in range(COPIES)}
    width = sum(train[m].shape[2] for m in STREAMS)
    features = Linear("regression", torch.eye(width).double(), torch.zeros(width))     # the identity
    index, truth = targets(train["label"].cpu(), task)
    outputs = predict_under(features.to(device), train, copies)
    x = torch.cat([outputs[i][index] for i in copies]).numpy()      # (copies n, width)
    y = truth.reshape(len(truth), -1).numpy()                       # (n, outputs)
    if task != "regression":
        y = 2 * y - 1
    sets = data.distinct(data.SETS, loaded["lacking"])
    best_score, best = -math.inf, None
    for strength in STRENGTHS:
        with warnings.catch_warnings():
            # Features may repeat each other.
            warnings.filterwarnings("ignore", "(An i|I)ll-conditioned matrix")
            ridge = Ridge(alpha=strength).fit(x, np.tile(y, (COPIES, 1)))
        weight = np.atleast_2d(ridge.coef_)
        linear = {"weight": torch.tensor(weight), "bias": torch.tensor(ridge.intercept_)}
        valid_score = score(evaluate(Linear(task, **linear).to(device), task, valid, sets, "valid"))
        if valid_score > best_score:
            best_score, best = valid_score, linear
    return best


# ---------------------------------------------------------------------------------- checkpoints

def device_named(name: str) -> torch.device:
    """The device of --device, "auto" being CUDA where there is one; a DataError if the machine has none
    of this name."""
    torch.backends.cudnn.allow_tf32 = False     # a convolution would differ from the CPU's by 1e-3
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        torch.zeros(1, device=name).item()      # "meta" has no values
    except Exception:           # torch raises RuntimeError, AssertionError, ImportError, AttributeError ...
        raise DataError(f"--device {name}: this machine or this torch has no such device. "
                        "Use cpu or auto.") from None
    return torch.device(name)


def check_record(run: dict) -> None:
    """An error unless `run` is the record of a run of this version, of a method, data set and ablation
    that the programs know, and holds plain values alone."""
    if set(run) != set(RECORD) or run["format"] != FORMAT:
        raise pickle.UnpicklingError("it holds a run of another version")
    module = METHODS.get(run["method"])
    if (module is None or run["dataset"] not in module.TASKS
            or run["ablation"] not in ("", *module.ABLATIONS)):
        raise pickle.UnpicklingError(f"there is no {run['method']} {run['ablation']} on {run['dataset']}")
    if (run["task"] != module.TASKS[run["dataset"]]
            or run["config"] != asdict(module.Config(**run["config"]))):
        raise pickle.UnpicklingError(f"it holds another task or config than {run['method']}.py has")
    limit = run["limit"]
    if (type(run["seed"]) not in (int, str) or type(run["normalize"]) is not bool
            or not set(run["lacking"]) <= set(STREAMS) or limit is not None and limit < 1
            or not {"sha256", "synthetic"} <= set(run["data"])):
        raise pickle.UnpicklingError("its record is not one that train.py writes")
    json.dumps(run)     # a TypeError unless all values are plain


def read_checkpoint(path: Path, keys, advice: str, device="cpu") -> dict:
    """A checkpoint that holds these entries, or a DataError that says what is wrong with it and gives this
    advice; nothing in the file is run. One with a "run" is train.py's, whose record is checked, and gets
    "sha256", of the bytes that were read."""
    with data.opening(path, advice) as file:
        raw = file.read()               # once: another process may replace the file
        try:
            content = torch.load(io.BytesIO(raw), map_location=device, weights_only=True)
        except pickle.UnpicklingError:
            raise pickle.UnpicklingError("it holds more than tensors and plain values") from None
        if missing := [key for key in keys if key not in content]:
            raise pickle.UnpicklingError(f"it holds no {' and no '.join(missing)}")
        if "run" in keys:
            check_record(content["run"])
            content["sha256"] = hashlib.sha256(raw).hexdigest()
            # A tensor may repeat one value, so its shape alone proves nothing.
            weights = {**content["model"], **(content.get("linear") or {})}
            if sum(weight.numel() for weight in weights.values()) > len(raw):
                raise pickle.UnpicklingError("it claims more weights than it has bytes")
        return content


def build(run: dict, weights: dict, path: Path, device) -> torch.nn.Module:
    """The model of a run record with these weights (a state_dict, read from `path`), ready to answer; or
    a DataError."""
    module = METHODS[run["method"]]
    with data.reading(path, AGAIN):
        # On the device "meta" tensors have no values, so no memory is asked for before the weights are
        # known to have the shapes that the record claims. Layers are objects there too: counted first.
        if run["config"].get("layers", 0) > len(weights):
            raise pickle.UnpicklingError("it claims more layers than it has weights")
        with torch.device("meta"):
            model = module.Model(run["dims"], run["task"], module.Config(**run["config"]))
        model.load_state_dict(weights, assign=True)
        return model.to(device).eval()


# ---------------------------------------------------------------------------------- runs

def run_folders(paths: list[Path]) -> list[Path]:
    """The run folders that are named or lie in a named folder, sorted."""
    folders = set()
    for path in paths:
        if not path.is_dir():
            raise DataError(f"{path} is no folder: name a run folder of train.py, or a folder that holds some.")
        models, errors = data.files_below(path, "model.pt")
        if errors:
            raise DataError(f"{errors[0]}.")
        if not models:
            raise DataError(f"{path} holds no model.pt, so no run that is trained far enough: name a run "
                            "folder of train.py, or a folder that holds some.")
        folders.update(Path(os.path.abspath(model.parent)) for model in models)
    return sorted(folders)


def check_outputs(args, folders: list[Path]) -> None:
    """A DataError if something that the evaluation shall write cannot be written, before it and not
    after it."""
    outputs = [path for path in (args.csv, args.plot) if path]
    places = [Path(os.path.realpath(path)) for path in outputs]
    for path, place in zip(outputs, places):
        if place.is_dir():
            raise DataError(f"{path} is a folder: name a file.")
        if place.name in RUN_FILES:
            raise DataError(f"{path} has the name of a run's own file: name another one.")
        if places.count(place) > 1:
            raise DataError(f"--csv and --plot are both {path}: name two files.")
    if args.csv and args.csv.is_file() and not data.is_special(args.csv):
        with data.opening(args.csv, "Name another file.") as file:
            if file.read(len(CSV_START)) not in (b"", CSV_START):
                raise DataError(f"--csv {args.csv} exists, and is no table of eval.py: name another file.")
    new = [place.parent for path, place in zip(outputs, places) if not data.is_special(path)]
    for folder in (*folders, *new):
        data.check_writable(folder)
    if args.plot:
        if args.plot.suffix.lower() not in (".png", ".pdf", ".svg"):    # .pgf would ask for LaTeX, and too late
            raise DataError(f"--plot {args.plot}: name a file that ends in .png, .pdf or .svg.")
        try:
            with mock.patch.dict(os.environ, MPLBACKEND="agg"):     # a notebook names one of its own
                from matplotlib.figure import Figure
            Figure().savefig(io.BytesIO(), format=args.plot.suffix[1:])
        except (ImportError, ValueError) as error:
            raise DataError(f"--plot {args.plot} cannot be drawn: {error}. It needs matplotlib: "
                            "pip install matplotlib.") from None


def load_split(checkpoint: dict, args, device) -> dict:
    """What data.load returns of the asked split, of the run's own data or of --data-dir, treated as in
    training."""
    run, load = checkpoint["run"], dict(checkpoint["load"])
    if args.data_dir:
        load.update(data_dir=args.data_dir, synthetic=False, features=None, labels=None)
    loaded = data.load(
        run["dataset"], splits=(args.split,), device=device, normalize=run["normalize"],
        stats=checkpoint["stats"], limit=None if args.data_dir else run["limit"], **load)
    file = loaded["source"]["file"]
    if loaded["dims"] != run["dims"]:
        raise DataError(f"{file} has widths {loaded['dims']}, the run was trained on {run['dims']}.")
    if run["config"]["aligned"] and not loaded["aligned"]:
        raise DataError(f"{file} holds unaligned streams, the run was trained on aligned ones.")
    return loaded


def labelled(split: dict) -> bool:
    """Whether there is anything to measure: clips of one's own may have no labels, or 0 for all."""
    return split["label"] is not None and bool(split["label"].any())


def prediction_lines(task: str, split: dict, outputs: dict) -> list[tuple]:
    """The lines of predictions.csv. truth is empty where a clip does not count or has no label; an
    answer is a sentiment or a class, probability that of class 1."""
    truth = {}      # clip -> what it is
    if labelled(split):
        index, values = targets(split["label"], task)
        truth = dict(zip(index.tolist(), values.tolist()))
    lines = [("condition", "clip", "truth", "answer", "probability")]
    for condition, output in outputs.items():
        clips = split["id"] or range(len(output))
        answer = answers(task, output).tolist()
        probability = [None] * len(output)
        if task != "regression":
            probability = output.softmax(-1)[..., 1].tolist()
        for i, clip in enumerate(clips):
            lines.append((condition, clip, truth.get(i), answer[i], probability[i]))
    return lines


def epochs_run(folder: Path) -> int | None:
    """How many epochs the last stage of a run has had; None without a log."""
    log = folder / "log.jsonl"
    if not log.is_file():
        return None
    with data.reading(log, "The same train.py command writes it again."):
        stages = [json.loads(line)["stage"] for line in log.read_text().splitlines()]
        return stages.count(stages[-1])


def evaluate_run(folder: Path, checkpoint: dict, loaded: dict, args, device) -> dict | None:
    """Measure one run and its baselines, write predictions.csv and results.json, and return what the
    latter says; without labels there is no results.json, and None."""
    run, split = checkpoint["run"], loaded[args.split]
    task = run["task"]
    conditions = data.answerable(data.SETS, [*run["lacking"], *loaded["lacking"]]) + args.rates
    how = split, conditions, args.split, args.mask_seed
    model = build(run, checkpoint["model"], folder / "model.pt", device)
    outputs = predict(model, *how)
    lines = prediction_lines(task, split, outputs)
    if not labelled(split):
        write_csv(folder / "predictions.csv", lines)
        (folder / "results.json").unlink(missing_ok=True)       # of an earlier evaluation
        say(f"{folder}: the {args.split} split has no labels, or 0 for all, so there is nothing to measure; the "
            f"answers to its {len(split['real']['text'])} clips are in predictions.csv")
        return None
    results = measure(task, split, outputs, args.split, args.mask_seed)
    truth = targets(split["label"], task)[1].cpu().numpy()
    always = metrics(task, np.broadcast_to(np.array(run["constant"]), truth.shape), truth)
    linear = {}
    if checkpoint["linear"]:
        linear = evaluate(Linear(task, **checkpoint["linear"]).to(device), task, *how)
    result = {
        "run": run,
        "epoch": checkpoint["epoch"],
        "epochs_run": epochs_run(folder),
        "checkpoint_sha256": checkpoint["sha256"],
        "split": args.split,
        "mask_seed": args.mask_seed,
        "data": loaded["source"],
        "lacking": loaded["lacking"],
        "conditions": results,
        "constant": dict.fromkeys(results, always),
        "linear": linear,
    }
    write_csv(folder / "predictions.csv", lines)
    with data.replacing(folder / "results.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    return result


# ---------------------------------------------------------------------------------- tables

def check_group(folder: Path, records: list[dict]) -> None:
    """A DataError if runs in one folder (their records) differ in more than their seed, or not even in that."""
    entries = [{**run, **run["config"], **run["data"]} for run in records]
    for other in entries[1:]:
        differ = [name for name in entries[0] if other.get(name) != entries[0][name]]
        differ = [name for name in differ if name not in ("seed", "config", "data")]
        if differ:
            raise DataError(f"The runs in {folder} are not seeds of one run: they differ in "
                            f"{', '.join(differ)}. Evaluate them one by one.")
    if len({entry["seed"] for entry in entries}) < len(entries):
        raise DataError(f"Two runs in {folder} have the same seed: name only one of them.")


def group_name(run: dict) -> str:
    """What a group of runs is called: its method and ablation."""
    return f"{run['method']} {run['ablation']}".strip()


def make_tables(groups: dict) -> list[dict]:
    """Groups of runs (folder -> results), those of the same data together as a dict name -> results. A
    name is method and ablation, with the folder behind it where another group has that name already."""
    tables = {}
    for folder, runs in groups.items():
        run, source = runs[0]["run"], runs[0]["data"]
        key = run["dataset"], run["limit"], run["normalize"], str(run["data"]), source["sha256"]
        table = tables.setdefault(key, {})
        name = group_name(run)
        if name in table:
            name = data.printable(f"{name} [{folder}]", 300)
        table[name] = runs
    return list(tables.values())


def cells(results: dict, metric: str, rates: list[float]) -> dict[str, float]:
    """Column -> number, of results of `evaluate`. "avg": the mean over those of the six incomplete sets
    that the data can answer; "area": the mean height of the curve over the span of the rates."""
    row = {condition: values[metric] for condition, values in results.items() if metric in values}
    six = [row[c] for c in ("l", "a", "v", "la", "lv", "av") if c in row]
    if six:
        row["avg"] = statistics.fmean(six)
    if row and len(rates) > 1:
        row["area"] = float(auc(rates, [row[str(p)] for p in rates])) / (rates[-1] - rates[0])
    return row


def by_seed(runs: list[dict], part: str, metric: str, rates: list[float]) -> dict:
    """Column -> seed -> number. part: "conditions" (the model's results), "constant" or "linear"."""
    columns = {}
    for result in runs:
        for column, number in cells(result[part], metric, rates).items():
            columns.setdefault(column, {})[result["run"]["seed"]] = number
    return columns


def subtract(ours: dict, other: dict) -> dict:
    """ours - other, both column -> seed -> number, for the columns and seeds that both have."""
    result = {}
    for column in ours:
        seeds = [seed for seed in ours[column] if seed in other.get(column, {})]
        if seeds:
            result[column] = {seed: ours[column][seed] - other[column][seed] for seed in seeds}
    return result


def comparison(result: dict) -> tuple[bool, str]:
    """Whether the paper's numbers may stand beside this result, and what is to be said of that."""
    run = result["run"]
    if result["split"] != "test":
        return False, "nothing is compared with the paper: its numbers are of the test split"
    return data.comparison(run, result["data"], METHODS[run["method"]].FEATURES)


def reported(runs: list[dict], metric: str, ours: dict) -> dict:
    """The paper's numbers in the form of `ours` (column -> seed -> number), where they may be
    compared."""
    run = runs[0]["run"]
    module = METHODS[run["method"]]
    numbers = dict(module.REPORTED[run["dataset"]].get(run["ablation"], {}).get(metric, {}))
    if not comparison(runs[0])[0]:
        return {}
    if "lav" in numbers:
        numbers["0.0"] = numbers["lav"]     # nothing is dropped
    result = {}
    for column, number in numbers.items():
        if column in ours:
            result[column] = dict.fromkeys(ours[column], number)
    return result


def make_rows(table: dict, reference: str | None, rates: list[float]) -> dict:
    """Every number of the tables on one data set: (metric, kind, name) -> column -> seed -> number.
    Kinds: "ours"; "paper" and "difference" to it; "paired", the difference to the reference or to the
    linear baseline, seed by seed; "constant" and "linear", one for each task; "realised"."""
    rows = {}
    for metric in METRICS:
        ours = {name: by_seed(runs, "conditions", metric, rates) for name, runs in table.items()}
        for name in table:
            rows[metric, "ours", name] = ours[name]
        for name, runs in table.items():
            paper = reported(runs, metric, ours[name])
            rows[metric, "paper", name] = paper
            rows[metric, "difference", name] = subtract(ours[name], paper)
            against = reference or runs[0]["run"]["method"]
            if against != name:
                rows[metric, "paired", f"{name} - {against}"] = subtract(ours[name], ours.get(against, {}))
            linear = by_seed(runs, "linear", metric, rates)
            rows[metric, "paired", f"{name} - linear"] = subtract(ours[name], linear)
        for kind in ("constant", "linear"):
            for runs in table.values():         # the same for every run of a task
                rows[metric, kind, runs[0]["run"]["task"]] = by_seed(runs[:1], kind, metric, rates)
    results = next(iter(table.values()))[0]["conditions"]
    realised = {}
    for p in map(str, rates):
        shares = [share for share in results[p]["realised"].values() if share is not None]
        if shares:
            realised[p] = {"": statistics.fmean(shares)}
    rows["", "realised", ""] = realised
    return {key: row for key, row in rows.items() if row}


# ---------------------------------------------------------------------------------- views of the rows

def summary(kind: str, numbers: dict) -> tuple[float, float | None, int | None]:
    """Mean, sample standard deviation and n of seed -> number. The last two are None of baselines and of the
    paper, and of the difference to it, which varies just as ours does."""
    values = list(numbers.values())
    if kind not in ("ours", "paired"):
        return statistics.fmean(values), None, None
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return statistics.fmean(values), deviation, len(values)


def cell(metric: str, kind: str, numbers: dict) -> str:
    """A number as it is printed: its digits, its sign, and its deviation."""
    mean, deviation, _ = summary(kind, numbers)
    digits = 4 if metric in ("MAE", "Corr") else 3 if kind == "realised" else 2
    sign = "+" if kind in ("difference", "paired") else ""
    text = f"{mean:{sign}.{digits}f}"
    return text if deviation is None else f"{text}±{deviation:.{digits}f}"


def show_table(title: str, rows: dict, metrics: list[str], titles: dict) -> None:
    """Print the rows of these metrics, with the columns of `titles` (column -> title), as Markdown."""
    lines = [["", *titles.values()]]
    for (metric, kind, name), row in rows.items():
        if metric not in metrics or not set(row) & set(titles):
            continue
        labels = {"paper": f"{name}, paper", "difference": f"{name} - paper", "realised": "realised rate"}
        label = labels.get(kind, f"{kind}, {name}")
        if kind in ("ours", "paired"):
            label = f"{name} (n={len(next(iter(row.values())))})"
        texts = [cell(metric, kind, row[c]) if c in row else "-" for c in titles]
        lines.append([f"{metric} {label}".strip(), *texts])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in ("", title, ""):
        say(line)
    for first, *others in lines:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:])]
        say("| " + " | ".join([first.ljust(widths[0]), *padded]) + " |")


def heading(name: str, runs: list[dict], args) -> list[str]:
    """What a row is: whose numbers, on which data, and every reason to read them with care."""
    run, source = runs[0]["run"], runs[0]["data"]
    module, config = METHODS[run["method"]], run["config"]
    seeds = " ".join(str(result["run"]["seed"]) for result in runs)
    lines = [f"{name} on {run['dataset']}, {args.split} split, seeds {seeds}, mask seed {args.mask_seed}"]
    lines.append(f"data: {data.identity(source)}")
    if source["synthetic"]:
        lines.append("SYNTHETIC data: these numbers say nothing about the papers'")
    if run["method"] == "double_flow":
        origin = "from the data" if data.SIMULATED in run["dims"] else "learned from audio"
        lines.append(f"simulated text: {origin}")
    notes = [*source["notes"], comparison(runs[0])[1]]
    if absent := [m for m in run["lacking"] if m not in runs[0]["lacking"]]:
        notes.append(f"training had no {' and no '.join(absent)}: a set with it is not answered")
    if not runs[0]["linear"]:
        notes.append("no linear row: it is not fitted on feature folders")
    usual = asdict(replace(module.PAPER[run["dataset"]], **module.ABLATIONS.get(run["ablation"], {})))
    changed = [f"{k} {v}" for k, v in config.items() if v != usual[k] and k != "aligned"]
    if not run["normalize"] and source["layout"] != "feature folders":
        changed.append("features not standardised")
    if changed:
        notes.append(f"other settings than the defaults: {', '.join(changed)}")
    for result in runs:
        seed, epochs = result["run"]["seed"], result["epochs_run"]
        if epochs not in (None, config["epochs"]):
            notes.append(f"seed {seed} was stopped after {epochs} of {config['epochs']} epochs")
    lines += [f"note: {note}" for note in notes if note]
    if source["sha256"] != run["data"]["sha256"]:
        lines.append("note: this is not the file that the runs were trained on")
    return lines


def show(table: dict, rows: dict, args) -> None:
    """Print the heading and the tables of one data set; a line that is not true of all groups says of
    which."""
    headings = {name: heading(name, runs, args) for name, runs in table.items()}
    for lines in headings.values():
        say(lines[0])
    for line in dict.fromkeys(line for lines in headings.values() for line in lines[1:]):
        names = [name for name, lines in headings.items() if line in lines]
        say(line if len(names) == len(table) else f"{line} ({', '.join(names)})")
    methods = {runs[0]["run"]["method"] for runs in table.values()}
    own_titles = METHODS[methods.pop()].TABLE if len(methods) == 1 else {}
    extension = ", an extension: not in the paper" if own_titles else ""
    if own_titles:
        show_table("The paper's table", rows, METRICS, own_titles)
    show_table("Available streams" + extension, rows, MAIN, TITLES)
    if args.rates:
        titles = {str(p): str(p) for p in args.rates}
        if len(args.rates) > 1:
            titles["area"] = "area"
        show_table("Share of frames dropped in every stream" + extension, rows, (*MAIN, ""), titles)
    say()
    say("F1 is weighted, in %, and leaves out the clips of sentiment 0; MAE is in units of the label. More metrics "
        "are in --csv; has0 counts sentiment 0 as not negative.")
    if 1.0 in args.rates:
        say("At 1.0 nothing is left of any clip: all clips of one length get the same answer there.")
    say()


def csv_lines(table: dict, rows: dict) -> list[tuple]:
    """The lines of --csv: every number of one data set's tables, in long form."""
    first = next(iter(table.values()))[0]
    about = first["run"]["dataset"], first["data"]["synthetic"], first["data"]["sha256"]
    lines = []
    for (metric, kind, name), row in rows.items():
        for column, numbers in row.items():
            part = "sets" if column in TITLES else "rates"
            lines.append((*about, part, metric, kind, name, column, *summary(kind, numbers)))
    return lines


def write_csv(path: Path, lines: list[tuple], named=False) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    with data.replacing(path, named) as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def plot(path: Path, tables: list[tuple], args) -> None:
    """A panel for each data set and main metric. tables: pairs of a table and its rows."""
    from matplotlib.figure import Figure        # not pyplot, which would take a notebook's backend
    panels = []
    for table, rows in tables:
        metrics = {metric for metric, _, _ in rows}
        panels += [(table, rows, metric) for metric in MAIN if metric in metrics]
    figure = Figure(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(axis, *panel, args)
    with data.replacing(path, named=True) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=200)


def draw(axis, table: dict, rows: dict, metric: str, args) -> None:
    """Curves over the share of dropped frames: a line for each group, a band of one standard deviation
    over the seeds, a star for the paper's number, the baselines in grey."""
    for (row_metric, kind, name), row in rows.items():
        if row_metric != metric or kind not in ("ours", "constant", "linear"):
            continue
        values = np.array([list(row[str(p)].values()) for p in args.rates])     # (rates, seeds)
        mean, seeds = values.mean(1), values.shape[1]
        if kind != "ours":
            style = ":" if kind == "constant" else "--"
            axis.plot(args.rates, mean, style, color="grey", label=f"{kind}, {name}")
            continue
        color = COLORS[list(table).index(name) % len(COLORS)]       # the same in every panel
        axis.plot(args.rates, mean, "o-", color=color, label=f"{name}, {seeds} seed{'s' if seeds > 1 else ''}")
        if seeds > 1:
            spread = values.std(1, ddof=1)
            axis.fill_between(args.rates, mean - spread, mean + spread, color=color, alpha=.15)
        if paper := rows.get((metric, "paper", name), {}).get("0.0"):
            number = next(iter(paper.values()))
            axis.plot(0, number, "*", color=color, markersize=12, label=f"{name}, paper")
    first = next(iter(table.values()))[0]
    clips = first["conditions"]["lav"]["n"]
    # A panel is at least ten standard errors high, of a share of so many clips or of a mean error whose
    # deviation is 1: in a narrower one the noise of a small split would look like a shape.
    height = (10 if metric == "MAE" else 500) / math.sqrt(clips)
    low, high = axis.get_ylim()
    spare = max(0, height - (high - low)) / 2
    methods = ", ".join(dict.fromkeys(runs[0]["run"]["method"] for runs in table.values()))
    synthetic = ", SYNTHETIC" if first["data"]["synthetic"] else ""
    axis.set_title(f"{methods} on {first['run']['dataset']}{synthetic}\n{args.split} split, {clips} clips")
    axis.set_xlabel("share of frames dropped, p")
    axis.set_ylabel("MAE, less is better" if metric == "MAE" else f"weighted {metric} (%)")
    axis.set_ylim(low - spare, high + spare)
    axis.legend(fontsize=7)


# ---------------------------------------------------------------------------------- the program

def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python eval.py RUN [RUN ...] [options]; -h explains them")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders of train.py, or folders that hold some")
    add("--rates", nargs="*", type=float, default=data.RATES, metavar="P",
        help="shares of frames to drop (default 0.0 ... 1.0); without a number there is no second table")
    add("--mask-seed", type=int, default=0, metavar="N", help="of the fixed evaluation masks (default 0)")
    add("--split", choices=data.SPLITS, default="test", help="default test")
    add("--data-dir", metavar="PATH",
        help="data file or folder (default: what the run was trained on); the asked split is enough")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--csv", type=Path, metavar="F", help="write all numbers of the tables to F, one a line")
    add("--plot", type=Path, metavar="F.png",
        help="draw F1 (and MAE) against the share of dropped frames (needs matplotlib)")
    add("--reference", metavar="NAME",
        help="the row that is subtracted from the others, seed by seed, for instance corrkd or \"corrkd "
        "no_scd\" (default: the full method, from its ablations)")
    args = parser.parse_args(argv)
    if not all(0 <= p <= 1 for p in args.rates):
        parser.error("--rates are shares from 0 to 1")
    if args.plot and not args.rates:
        parser.error("--plot draws curves over --rates: name some, or leave --rates out")
    args.rates = sorted(set(args.rates))
    return args


def evaluate_all(args) -> None:
    """Evaluate the runs, print their tables and write what is asked for."""
    folders = run_folders(args.runs)
    check_outputs(args, folders)
    device = device_named(args.device)
    checkpoints, records = {}, {}
    for folder in folders:
        keys = ("run", "load", "stats", "linear", "epoch", "model")
        checkpoints[folder] = read_checkpoint(folder / "model.pt", keys, AGAIN)
        records.setdefault(folder.parent, []).append(checkpoints[folder]["run"])
    for folder, runs in records.items():
        check_group(folder, runs)
    names = {group_name(runs[0]) for runs in records.values()}
    if args.reference and args.reference not in names:
        raise DataError(f"--reference {args.reference}: the runs are of {', '.join(sorted(names))}.")

    groups, loaded, loaded_for = {}, None, None
    for folder, checkpoint in checkpoints.items():
        run = checkpoint["run"]
        data_key = repr([checkpoint["load"], *(run[key] for key in ("dataset", "limit", "normalize", "data"))])
        with data.reading(folder / "model.pt", AGAIN):
            if data_key != loaded_for:      # seeds and ablations share their data
                loaded, loaded_for = load_split(checkpoint, args, device), data_key
            result = evaluate_run(folder, checkpoint, loaded, args, device)
        if result:
            groups.setdefault(folder.parent, []).append(result)
    tables = [(table, make_rows(table, args.reference, args.rates)) for table in make_tables(groups)]
    for table, rows in tables:
        show(table, rows, args)
    for path in (args.csv, args.plot):
        if path and not tables:
            say(f"{path} is not written: there are no numbers")
    if args.csv and tables:
        lines = [("dataset", "synthetic", "data", "table", "metric", "kind", "name", "column", "mean", "std",
                  "n")]
        for table, rows in tables:
            lines += csv_lines(table, rows)
        write_csv(args.csv, lines, named=True)
    if args.plot and tables:
        plot(args.plot, tables, args)


def main(argv=None) -> int:
    args = parse(argv)
    stopped = "stopped; what was evaluated is in each run's results.json"
    return data.run_program(lambda: evaluate_all(args), stopped)


if __name__ == "__main__":
    sys.exit(main())
