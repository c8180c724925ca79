"""Evaluate trained runs under missing modalities and print the papers' tables.

    python eval.py runs/mosi/corrkd             seven available sets, then shares of dropped frames
    python eval.py runs/mosi --csv tables.csv   several methods and ablations, by data set
    python eval.py runs/mosi/corrkd/s1111 --data-dir mine.pkl   clips of one's own, labelled or not

The runs of one folder differ in their seed alone and are averaged. Each run folder gets
predictions.csv, every answer, and results.json, every number (null where there is none), in the
place of an earlier evaluation's.
"""
import argparse
import csv
import io
import itertools
import json
import math
import os
import pickle
import statistics
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import f1_score, mean_absolute_error

import corrkd
import data
import double_flow
import umdf
from data import STREAMS, DataError

METHODS = {"umdf": umdf, "corrkd": corrkd, "double_flow": double_flow}
# What a method file offers, and all that is asked of it here and in train.py. A fourth method is one file
# and its name. m is text, audio or vision; a batch has B clips of T_m frames.
#   TASKS             each of the three data sets -> "regression", "polarity" or "emotions"
#   Config            a dataclass of plain values with at least lr, weight_decay, batch_size, epochs, clip
#                     (0: not clipped) and aligned, which train.py sets: all T_m are equal
#   PAPER             each data set -> Config
#   ABLATIONS         name -> the fields of Config that it changes; it and the next three may be {}
#   REPORTED          data set -> ablation ("" = the full method) -> metric -> column -> the paper's number
#   FEATURES          m -> the width of the features that REPORTED is of
#   TABLE             column -> title where the paper's table is not that of the seven sets
#   learning_rate_factor(epoch) -> what lr is multiplied by in epoch 0, 1, ...; None where it is constant
#   Model(dims, task, config), an nn.Module. dims: m -> width, also of simulated_text if the data carries it.
#     What it learns is in its state_dict; nothing else outlives a stop. __init__ reads no tensor's value:
#     eval.py calls it on the device "meta" as well. Constants are buffers, which follow the model's device.
#     Below, streams, complete: m -> (B, T_m, width) float32, a missing frame and padding being zeros; real:
#     m -> (B, T_m) bool, True = not padding, which stands behind. An answer depends neither on padding nor
#     on the other clips of a batch.
#     stages                                  stage -> the sets of streams that its epoch is chosen on
#     begin(stage)                            before each stage, in the order of `stages`; then those
#                                             parameters learn whose requires_grad is True
#     teacher_outputs(complete, real)         -> a tuple of tensors, a row a clip, constant during the stage,
#                                             or None; called in train mode, without gradients
#     losses(complete, missing, target, real, teacher=None)   -> {term: scalar, "total": scalar}. missing:
#                                             the same clips with frames and streams zeroed; target: float32
#                                             (B,) of a regression, long (B,) or (B, 4) of 0 and 1; teacher:
#                                             a list of these clips' rows of teacher_outputs
#     represent(streams, real)                -> h (B, width)
#     classify(h)                             -> (B, 1), (B, 2) or (B, 4, 2), by the task
#     encode(name, stream, real)              -> (B, d), h being the three side by side; else encode = None
AGAIN = "It is not as this train.py writes it: remove it, and the same train.py command makes it again."
ENTRIES = ("run", "load", "stats", "linear", "epoch", "model")      # what model.pt holds
FORMAT = 6              # of run records: those of another one are refused
TITLES = {"l": "{l}", "a": "{a}", "v": "{v}", "la": "{l,a}", "lv": "{l,v}", "av": "{a,v}", "avg": "Avg.",
          "lav": "{l,a,v}"}         # column -> its title in the table of available streams
SHOWN = ("happy", "sad", "angry", "neutral")    # the papers' order of emotions
MAIN = ("F1", "MAE", *(f"F1 {emotion}" for emotion in SHOWN))       # metrics in every table and figure
METRICS = (*MAIN, "F1 has0", "Acc-2", "Acc-2 has0", "Acc-7", "Corr")
STRENGTHS = (1e5, 1e4, 1e3, 1e2, 1e1, 1e0)      # of the ridge regressions that are the linear baseline
DRAWS = 1000            # of test clips and seeds, for the interval of a difference
VIDEOS = 20             # from so many on, whole videos are drawn in the place of clips
FRAMES = 2 ** 16        # clips times frames that are evaluated at a time: bounds the memory
WIDTH = 100             # of a printed table


# ---------------------------------------------------------------------------------- from runs to tables

def evaluate_all(args) -> None:
    """Evaluate the runs, print their tables and write what is asked for."""
    if args.plot:
        figure_class(args.plot)             # a missing matplotlib is told now, not after the evaluation
    device = device_named(args.device)
    groups = {}         # a group's folder -> the results of its runs
    for group_folder, checkpoints in read_groups(args.runs).items():
        loaded = load_split(next(iter(checkpoints.values())), args, device)         # the same for all seeds
        for folder, checkpoint in checkpoints.items():
            if result := evaluate_run(folder, checkpoint, loaded, args, device):
                groups.setdefault(group_folder, []).append(result)
    tables = [(table, make_rows(table, args.rates)) for table in make_tables(groups)]
    for table, rows in tables:
        show(table, rows, args)
    if tables and args.csv:
        write_csv(args.csv, CSV_HEADER, [line for each in tables for line in csv_lines(*each)])
    if tables and args.plot:
        plot(args.plot, tables, args)
    if not tables and (args.csv or args.plot):
        print("There are no numbers, so no --csv and no --plot is written.")
    print("In each run folder: predictions.csv, every answer, and with labels results.json, every number.")


def evaluate_run(folder: Path, checkpoint: dict, loaded: dict, args, device) -> dict | None:
    """Measure one run and its baselines, write predictions.csv and results.json, and return what the
    latter says, with "clips", the answers behind it; without labels there is no results.json, and None."""
    run, split = checkpoint["run"], loaded[args.split]
    task = run["task"]
    conditions = data.answerable(data.SETS, [*run["lacking"], *loaded["lacking"]]) + args.rates
    model = build(run, checkpoint["model"], folder / "model.pt", device)
    outputs = predict(model, split, conditions, args.split, args.mask_seed)
    write_csv(folder / "predictions.csv", *prediction_lines(task, split, outputs))
    if not labelled(split):
        (folder / "results.json").unlink(missing_ok=True)       # of an earlier evaluation
        print(f"{folder}: the {args.split} split has no labels, or 0 for all, so there is nothing to measure; the "
              f"answers to its {len(split['real']['text'])} clips are in predictions.csv")
        return None

    clips = counted(task, split, outputs)
    clips["units"] = units(split["id"], len(split["label"]))
    clips["linear"] = {}
    if checkpoint["linear"]:
        outputs = predict(Linear(task, **checkpoint["linear"]), split, conditions, args.split, args.mask_seed)
        clips["linear"] = counted(task, split, outputs)["conditions"]
    dataset = loaded["dataset"]
    if dataset != run["dataset"]:
        dataset += f", trained on {run['dataset']}"
    truth = clips["truth"]
    always = metrics(task, np.broadcast_to(np.array(run["constant"]), truth.shape), truth)
    result = {
        "run": run,
        "dataset": dataset,
        "epoch": checkpoint["epoch"],
        "epochs_run": epochs_run(folder),
        "checkpoint_sha256": data.sha256(folder / "model.pt"),
        "split": args.split,
        "mask_seed": args.mask_seed,
        "data": loaded["source"],
        "lacking": loaded["lacking"],
        "conditions": measure(task, clips, "conditions"),
        "linear": measure(task, clips, "linear"),
        "constant": {str(c): always for c in conditions},
    }
    without_nan = json.loads(json.dumps(result), parse_constant=lambda _: None)      # strict JSON has no NaN
    data.write(folder / "results.json", json.dumps(without_nan, indent=1).encode())
    return {**result, "clips": clips}


def load_split(checkpoint: dict, args, device) -> dict:
    """What data.load returns of the asked split, of the run's own data or of --data-dir, treated as in
    training."""
    run, load = checkpoint["run"], dict(checkpoint["load"])
    if args.data_dir:
        load.update(data_dir=args.data_dir, synthetic=False, features=None, labels=None)
    loaded = data.load(
        run["dataset"], splits=(args.split,), device=device, normalize=run["normalize"],
        stats=checkpoint["stats"], limit=None if args.data_dir else run["limit"], across=True, **load)
    file = loaded["source"]["file"]
    if loaded["dims"] != run["dims"]:
        raise DataError(f"{file} has widths {loaded['dims']}, the run was trained on {run['dims']}.")
    if run["config"]["aligned"] and not loaded["aligned"]:
        raise DataError(f"{file} holds unaligned streams, the run was trained on aligned ones.")
    return loaded


def labelled(split: dict) -> bool:
    """Whether there is anything to measure: clips of one's own may have no labels, or 0 for all."""
    return split["label"] is not None and bool(split["label"].any())


def epochs_run(folder: Path) -> int | None:
    """How many epochs the last stage of a run has had; None without a log."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1])["epoch"] if lines else None


def prediction_lines(task: str, split: dict, outputs: dict) -> tuple[tuple, list[tuple]]:
    """The header and the lines of predictions.csv. truth is empty where a clip does not count or has no label; an
    answer is a sentiment or a class, probability that of class 1."""
    truth = {}      # clip -> what it is
    if labelled(split):
        index, values = targets(split["label"], task)
        truth = dict(zip(index.tolist(), values.tolist()))
    lines = []
    for condition, output in outputs.items():
        answer, probability = answers(task, output).tolist(), [None] * len(output)
        if task != "regression":
            probability = output.softmax(-1)[..., 1].tolist()
        for i, clip in enumerate(split["id"] or range(len(output))):
            lines.append((condition, clip, truth.get(i), answer[i], probability[i]))
    return ("condition", "clip", "truth", "answer", "probability"), lines


# ---------------------------------------------------------------------------------- predictions

def evaluate(model, task: str, split: dict, conditions, split_name: str, mask_seed: int = 0) -> dict:
    """str(condition) -> {"n": clips that count, metric: value}."""
    return measure(task, counted(task, split, predict(model, split, conditions, split_name, mask_seed)))


def counted(task: str, split: dict, outputs: dict) -> dict:
    """The clips that count, as numpy arrays: index, their places in the split; truth, what they are; conditions,
    str(condition) -> the answers to them, from the outputs of `predict`."""
    index, truth = (part.cpu() for part in targets(split["label"], task))
    by_condition = {str(c): answers(task, output[index]).numpy() for c, output in outputs.items()}
    return {"index": index.numpy(), "truth": truth.numpy(), "conditions": by_condition}


def measure(task: str, clips: dict, part: str = "conditions") -> dict:
    """evaluate's result, from what `counted` returns."""
    truth = clips["truth"]
    return {c: {"n": len(truth), **metrics(task, answer, truth)} for c, answer in clips[part].items()}


@torch.no_grad()
def predict(model, split: dict, conditions, split_name: str, mask_seed: int = 0, size: int = 64) -> dict:
    """Condition -> outputs (N, ...) on the CPU. A condition is a set of streams ("l" ... "lav") or a rate of dropped
    frames. Clips go through in batches of similar length, so with little padding, at most `size` at a time, which
    changes no answer. A DataError if an output is not finite."""
    model.eval()
    masks = {c: data.evaluation_masks(split["real"], c, split_name, mask_seed) for c in conditions}
    outputs = {c: [] for c in conditions}
    order = sum(split["real"][m].sum(1) for m in STREAMS).argsort(stable=True)
    for index in order.split(min(size, clips_at_a_time(split))):
        streams, _, real = data.batch(split, index)
        joint = represent_sets(model, streams, real) if model.encode else {}
        for condition, present in masks.items():
            if condition in joint:
                h = joint[condition]
            else:
                h = model.represent(hide(streams, present, index), real)
            outputs[condition].append(model.classify(h))
    place = order.argsort()     # where each clip of the split stands in `order`
    result = {}
    for condition, parts in outputs.items():
        result[condition] = torch.cat(parts).cpu()[place]
        if not result[condition].isfinite().all():
            raise DataError(f"The answers under condition {condition} are not finite: the model's weights have "
                            "grown too large. Train again with a lower --lr.")
    return result


def clips_at_a_time(split: dict) -> int:
    """At most 256, fewer where clips are long, so that unaligned data does not ask for too much memory."""
    frames = sum(split["real"][m].shape[1] for m in STREAMS)
    return max(1, min(256, FRAMES // frames))


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
    whole = {m: model.encode(m, streams[m], real[m]) for m in STREAMS}
    absent = {m: model.encode(m, torch.zeros_like(streams[m]), real[m]) for m in STREAMS}
    joint = {}
    for name, available in data.SETS.items():
        parts = [whole[m] if m in available else absent[m] for m in STREAMS]
        joint[name] = torch.cat(parts, dim=-1)
    return joint


def answers(task: str, output: torch.Tensor) -> torch.Tensor:
    """Sentiment (n,) or classes (n,) or (n, 4) from a model's outputs (n, 1), (n, 2) or (n, 4, 2)."""
    return output[:, 0] if task == "regression" else output.argmax(-1)


def score(results: dict) -> float:
    """One number for results of `evaluate`, the more the better: the mean over the conditions of -MAE
    for a regression, else of F1 (over the emotions too), or of the accuracy where all clips are of one class."""
    values = []
    for cell in results.values():
        if "MAE" in cell:
            values.append(-cell["MAE"])
        else:
            f1 = [value for name, value in cell.items() if name.startswith("F1") and not math.isnan(value)]
            values += f1 or [cell.get("Acc-2", 0.0)]
    return statistics.fmean(values)


# ---------------------------------------------------------------------------------- metrics

def metrics(task: str, answer: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """answer, truth: classes (n,) or (n, 4), or sentiment (n,). F1 and accuracies in per cent, MAE in
    label units.

    Regression: F1 and Acc-2 ask whether > 0, of the clips whose sentiment is not 0; "has0" whether >= 0,
    of all clips. Acc-7 compares the nearest integers in [-3, 3], halves to the even one (0.5 -> 0, 1.5
    and 2.5 -> 2), as numpy and most published code round.
    """
    if task == "polarity":
        return {"F1": weighted_f1(truth, answer), "Acc-2": accuracy(truth, answer)}
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
    """In per cent; nan where all clips are of one class. By keyword, as the order matters: classes are weighted by the
    truth."""
    if len(np.unique(truth)) < 2:
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


# ---------------------------------------------------------------------------------- the linear baseline

def fit_linear(loaded: dict, task: str) -> dict | None:
    """The arguments of Linear but the task: for each set of streams a ridge regression on the complete training
    clips, to the sentiment or to -1 and 1 for a decision. The strength, one for all sets, and whether the means
    alone are used are the best on validation over the available sets; then for each set which of its streams are
    read. Nothing is drawn. None for feature folders."""
    train, valid = loaded["train"], loaded["valid"]
    if isinstance(train["text"], data.Frames):
        return None
    index, truth = targets(train["label"].cpu(), task)
    y = truth.double().reshape(len(truth), -1)                                      # (n, outputs)
    if task != "regression":
        y = 2 * y - 1
    x = pooled_clips(train, index, "lav")                                           # (n, width)
    x_mean, y_mean = x.mean(0), y.mean(0)
    products, target = (x - x_mean).T @ (x - x_mean), (x - x_mean).T @ (y - y_mean)
    widths = torch.tensor([4 * train[m].shape[2] for m in STREAMS])
    stream = torch.tensor([1, 2, 4]).repeat_interleave(widths)                      # a column's bit in a set's number
    is_mean = torch.cat([torch.arange(width) < width / 4 for width in widths.tolist()])
    everybody = torch.arange(len(valid["label"]))
    h = {c: pooled_clips(valid, everybody, c) for c in data.distinct(data.SETS, loaded["lacking"])}
    candidates = []
    for kept in (is_mean, torch.ones_like(is_mean)):
        for strength in STRENGTHS:
            weight = x.new_zeros(8, y.shape[1], len(stream))
            for number in range(1, 8):      # of 0, no stream at all, the mean label remains
                columns = (kept & (stream & number > 0)).nonzero()[:, 0]
                equations = products[columns][:, columns] + strength * torch.eye(len(columns)).double()
                factor = torch.linalg.cholesky(equations)
                weight[number][:, columns] = torch.cholesky_solve(target[columns], factor).T
            linear = {"weight": weight, "bias": y_mean - weight @ x_mean, "widths": widths}
            outputs = {c: Linear(task, **linear).classify(pooled) for c, pooled in h.items()}
            candidates.append((score(measure(task, counted(task, valid, outputs))), linear))
    linear = max(candidates, key=lambda candidate: candidate[0])[1]
    reads = best_streams(linear, task, valid, h)
    return {**linear, "weight": linear["weight"][reads], "bias": linear["bias"][reads]}


def best_streams(linear: dict, task: str, valid: dict, h: dict) -> list[int]:
    """A set's number -> which of its streams its regression is to read, as such a number: those that are best on
    validation, as one more can do harm."""
    reads = list(range(8))
    for c, pooled in h.items():
        own = sum(1 << i for i, m in enumerate(STREAMS) if m in data.SETS[c])
        scores = {}
        for streams in sorted(range(1, own + 1), key=int.bit_count, reverse=True):
            if streams & own == streams:
                reads[own] = streams
                weight, bias = (linear[name][reads] for name in ("weight", "bias"))
                output = Linear(task, weight, bias, linear["widths"]).classify(pooled)
                scores[streams] = score(measure(task, counted(task, valid, {c: output})))
        reads[own] = max(scores, key=scores.get)        # of equals the one with the most streams
    return reads


def pooled_clips(split: dict, index: torch.Tensor, condition: str) -> torch.Tensor:
    """What Linear represents of these clips, (n, width), under a set of streams."""
    present, parts = data.evaluation_masks(split["real"], condition, ""), []
    for clips in index.split(data.CHUNK):
        streams, _, _ = data.batch(split, clips)
        parts.append(represent_linear(hide(streams, present, clips)))
    return torch.cat(parts)


class Linear(torch.nn.Module):
    """The linear baseline, evaluated like every model, but on the CPU: the pooled frames of the streams side by
    side, times the matrix of the clip's own set of streams, those that are not all zeros. Set number i has text if
    i & 1, audio if i & 2, vision if i & 4. weight (8, outputs, width), bias (8, outputs); widths (3,): the columns
    of each stream. An output is a sentiment, or above 0 where a decision is for class 1."""

    def __init__(self, task: str, weight: torch.Tensor, bias: torch.Tensor, widths: torch.Tensor):
        super().__init__()
        self.task, self.weight, self.bias, self.widths = task, weight, bias, widths.tolist()

    def encode(self, name: str, stream: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return pool(stream)

    def represent(self, streams: dict, real: dict) -> torch.Tensor:
        return represent_linear(streams)

    def classify(self, h: torch.Tensor) -> torch.Tensor:
        number = sum(part.any(1).long() << i for i, part in enumerate(h.split(self.widths, dim=1)))     # (B,)
        y = h.new_empty(len(h), self.bias.shape[1])
        for i in number.unique():
            y[number == i] = h[number == i] @ self.weight[i].T + self.bias[i]
        if self.task == "regression":
            return y
        logits = torch.stack((-y, y), -1)
        return logits[:, 0] if self.task == "polarity" else logits


def represent_linear(streams: dict) -> torch.Tensor:
    return torch.cat([pool(streams[m]) for m in STREAMS], dim=-1)


def pool(stream: torch.Tensor) -> torch.Tensor:
    """(B, 4 d), float64 on the CPU: mean, deviation, most and least of the frames of a stream (B, T, d) that are
    there, that is not all zeros; zeros where none is."""
    x = stream.cpu().double()
    there = (x != 0).any(-1, keepdim=True)                              # (B, T, 1)
    n = there.sum(1).clamp(min=1)
    mean = x.sum(1) / n
    deviation = (there * (x - mean[:, None]).square()).sum(1).div(n).sqrt()
    most = x.masked_fill(~there, -math.inf).amax(1)
    least = x.masked_fill(~there, math.inf).amin(1)
    return torch.cat((mean, deviation, most, least), -1).masked_fill(~there.any(1), 0)


# ---------------------------------------------------------------------------------- numbers

class Row(NamedTuple):
    """A row of the tables. A column without a number is in none of its dicts.

    kind: "ours"; "paper"; "paired", the difference to the full method or to the linear baseline, seed by seed;
    "constant"; "linear"."""
    metric: str
    kind: str
    name: str
    against: str                # what was subtracted: "linear" or a name; or ""
    n: int | None               # seeds; None where the number does not vary with them
    mean: dict                  # column -> number
    std: dict                   # over the seeds, ddof 1
    low: dict                   # the 95 % interval of a paired difference
    high: dict


def make_tables(groups: dict) -> list[dict]:
    """Groups of runs (folder -> results), those of the same data together as a dict name -> results. A
    name is method and ablation, with the folder behind it where another group has that name already."""
    tables = {}
    for folder, runs in groups.items():
        run, source = runs[0]["run"], runs[0]["data"]
        key = runs[0]["dataset"], run["limit"], run["normalize"], str(run["data"]), source["sha256"]
        table = tables.setdefault(key, {})
        name = group_name(run)
        if name in table:
            name = data.printable(f"{name} [{folder}]", 300)
        table[name] = runs
    return list(tables.values())


def make_rows(table: dict, rates: list[float]) -> list[Row]:
    """Every number of the tables on one data set."""
    weights = draw_weights(next(iter(table.values()))[0]["clips"]["units"])
    tasks = {runs[0]["run"]["task"]: runs[:1] for runs in table.values()}       # all runs of a task have its baselines
    rows = []
    for metric in METRICS:
        for name, runs in table.items():
            rows.append(row_of(metric, "ours", name, "", levels(runs, "conditions", metric, rates)))
            rows.append(row_of(metric, "paper", f"{name}, paper", "", [reported(runs[0], metric)]))
            full = runs[0]["run"]["method"]
            if full in table and full != name:
                rows.append(paired(metric, name, full, runs, table[full], "conditions", rates, weights))
            rows.append(paired(metric, name, "linear", runs, runs, "linear", rates, weights))
        for task, one in tasks.items():
            for kind in ("constant", "linear"):
                name = kind if len(tasks) == 1 else f"{kind}, {task}"
                rows.append(row_of(metric, kind, name, "", levels(one, kind, metric, rates)))
    return [row for row in rows if row.mean]


def levels(runs: list[dict], part: str, metric: str, rates: list[float], weights=None) -> list[dict]:
    """For each run column -> number. part: "conditions" (the model's results), "constant" or "linear". With weights
    (draws, clips) a number is an array (draws,), on each of the drawn test sets."""
    numbers = []
    for result in runs:
        values = {c: cell[metric] for c, cell in result[part].items() if metric in cell}
        if weights is not None:
            clips, task = result["clips"], result["run"]["task"]
            for c in values:
                answer = clips[part][c]
                values[c] = drawn_metric(metric, task, answer, clips["truth"], weights[:, clips["index"]])
        numbers.append(with_means(values, rates))
    return numbers


def with_means(values: dict, rates: list[float]) -> dict:
    """The numbers of the conditions and two columns more. avg: the mean over those of the six incomplete sets that the
    data can answer; area: the mean height of the curve over the span of the rates."""
    values = dict(values)
    six = [values[c] for c in ("l", "a", "v", "la", "lv", "av") if c in values]
    if six:
        values["avg"] = sum(six) / len(six)
    curve = [values[str(p)] for p in rates if str(p) in values]
    if len(curve) == len(rates) > 1:
        parts = [(q - p) * (a + b) / 2 for p, q, a, b in zip(rates, rates[1:], curve, curve[1:])]
        values["area"] = sum(parts) / (rates[-1] - rates[0])
    return values


def minus(ours: list[dict], theirs: list[dict]) -> list[dict]:
    """The differences, pair by pair and column by column."""
    result = []
    for a, b in zip(ours, theirs):
        result.append({column: a[column] - b[column] for column in a if column in b})
    return result


def row_of(metric: str, kind: str, name: str, against: str, numbers: list[dict]) -> Row:
    """The row of these numbers, a dict column -> number for each seed."""
    n = len(numbers) if kind in ("ours", "paired") else None
    row = Row(metric, kind, name, against, n, {}, {}, {}, {})
    for column in numbers[0] if numbers else ():
        values = [of_seed[column] for of_seed in numbers]
        if not math.isnan(sum(values)):
            row.mean[column] = statistics.fmean(values)
            if len(values) > 1:
                row.std[column] = statistics.stdev(values)
    return row


def paired(metric: str, name: str, against: str, ours: list[dict], theirs: list[dict], part: str,
           rates: list[float], weights: np.ndarray) -> Row:
    """The difference of the model's numbers of `ours` and the numbers `part` of `theirs`, over the seeds that both
    have."""
    pairs = [(a, b) for a in ours for b in theirs if a["run"]["seed"] == b["run"]["seed"]]
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    differences = minus(levels(ours, "conditions", metric, rates), levels(theirs, part, metric, rates))
    row = row_of(metric, "paired", name, against, differences)
    if metric in MAIN and row.mean:
        drawn = minus(levels(ours, "conditions", metric, rates, weights), levels(theirs, part, metric, rates, weights))
        for column in row.mean:
            of_seeds = np.array([of_seed[column] for of_seed in drawn])
            row.low[column], row.high[column] = interval(of_seeds)
    return row


def reported(result: dict, metric: str) -> dict:
    """Column -> the paper's number, where it may be compared."""
    run = result["run"]
    if not comparison(result)[0]:
        return {}
    numbers = METHODS[run["method"]].REPORTED.get(run["dataset"], {}).get(run["ablation"], {}).get(metric, {})
    if "lav" in numbers:
        numbers = {**numbers, "0.0": numbers["lav"]}        # at 0.0 nothing is dropped
    return numbers


def comparison(result: dict) -> tuple[bool, str]:
    """Whether the paper's numbers may stand beside this result, and what is to be said of that."""
    run = result["run"]
    if result["dataset"] != run["dataset"]:
        return False, "nothing is compared with the paper: its numbers are of one data set"
    if result["split"] != "test":
        return False, "nothing is compared with the paper: its numbers are of the test split"
    return data.comparison(run, result["data"], METHODS[run["method"]].FEATURES)


# ---------------------------------------------------------------------------------- intervals

def units(ids: list[str], count: int) -> np.ndarray:
    """(clips,): the index of the unit that each clip is drawn with: its video, where the ids tell at least VIDEOS of
    them, since clips of one video are alike; else the clip alone."""
    videos = [data.video_of(clip) for clip in ids]
    if "" in videos or len(set(videos)) < VIDEOS:
        return np.arange(count)
    return np.unique(videos, return_inverse=True)[1]


def draw_weights(units: np.ndarray) -> np.ndarray:
    """(DRAWS, clips): how often each clip stands in each of the drawn test sets, always the same ones."""
    count = units.max() + 1
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), DRAWS)
    return drawn[:, units].astype(float)


def drawn_metric(metric: str, task: str, answer: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(draws,): MAE or F1 of `metrics` with each clip counted as often as weights (draws, clips) say."""
    if metric == "MAE":
        return weights @ abs(answer - truth) / weights.sum(1)
    if task == "emotions":
        column = data.EMOTIONS.index(metric.removeprefix("F1 "))
        answer, truth = answer[:, column], truth[:, column]
    elif task == "regression":
        weights = weights * (truth != 0)
        answer, truth = answer > 0, truth > 0
    cells = np.eye(4)[2 * truth.astype(int) + answer]                   # a clip's place in the confusion matrix
    no_no, no_yes, yes_no, yes_yes = (weights @ cells).T                # truth, answer; each (draws,)
    wrong = no_yes + yes_no
    f1_yes, f1_no = (2 * right / np.maximum(2 * right + wrong, 1) for right in (yes_yes, no_no))
    return 100 * ((yes_no + yes_yes) * f1_yes + (no_no + no_yes) * f1_no) / weights.sum(1)


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of differences (seeds, draws): each draw of clips gets a draw of seeds."""
    seeds, draws = differences.shape
    counts = np.random.default_rng(1).multinomial(seeds, np.full(seeds, 1 / seeds), draws)     # (draws, seeds)
    means = (counts.T * differences).sum(0) / seeds
    return tuple(np.percentile(means, (2.5, 97.5)).tolist())


# ---------------------------------------------------------------------------------- text, file, figure

def show(table: dict, rows: list[Row], args) -> None:
    """Print the heading and the tables of one data set; a line that is not true of all groups says of which."""
    true_of = {}        # line -> names of groups
    for name, runs in table.items():
        title, *lines = heading(name, runs, args)
        print(title)
        for line in lines:
            true_of.setdefault(line, []).append(name)
    for line, names in true_of.items():
        print(line if len(names) == len(table) else f"{line} ({', '.join(names)})")

    methods = {runs[0]["run"]["method"] for runs in table.values()}
    own_titles = METHODS[methods.pop()].TABLE if len(methods) == 1 else {}
    extension = ", an extension: not in the paper" if own_titles else ""
    counts = {row.n for row in rows if row.kind == "ours"}
    n = " or ".join(map(str, sorted(counts)))
    show_tables(f"the paper's columns, n = {n}", rows, own_titles)
    show_tables(f"available streams, n = {n}{extension}", rows, TITLES)
    if args.rates:
        fitting = args.rates[::max(1, math.ceil(len(args.rates) / 6))]      # all are in --csv and --plot
        titles = {str(p): f"{p:.4}" for p in fitting}
        if len(args.rates) > 1:
            titles["area"] = "area"
        not_subtracted = [row for row in rows if not row.against]
        show_tables(f"share of frames dropped in every stream, n = {n}{extension}", not_subtracted, titles)
    print("\n" + "\n".join(legend(table, rows, args)) + "\n")


def show_tables(title: str, rows: list[Row], titles: dict) -> None:
    """Print for each main metric the table of its levels and one of its differences to each row that is subtracted."""
    for metric in MAIN:
        tables = {}         # what is subtracted -> rows
        for row in rows:
            if row.metric == metric and row.mean.keys() & titles.keys():
                tables.setdefault(row.against, []).append(row)
        for against, those in tables.items():
            unit = "" if metric == "MAE" else " in %"
            what = f" minus that of {against}" if against else ""
            print(f"\n{metric}{unit}{what}: {title}\n")
            show_table(those, titles)


def show_table(rows: list[Row], titles: dict) -> None:
    """Print these rows, with the columns of `titles` (column -> title), as Markdown of at most WIDTH columns: the
    mean, and under it the deviation over the seeds."""
    widths = [max(7, len(title)) for title in titles.values()]
    room = min(30, WIDTH - 4 - sum(width + 3 for width in widths))      # what is left for the labels
    line_form = f"| {{:{room}}} | " + " | ".join(f"{{:>{width}}}" for width in widths) + " |"
    print(line_form.format("", *titles.values()))
    print(line_form.format("-" * room, *("-" * width for width in widths)))
    for row in rows:
        means, deviations = zip(*(cell(row, column) for column in titles))
        lines = [means, deviations] if any(deviations) else [means]
        label = [part.replace("_ ", "_") for part in textwrap.wrap(row.name.replace("_", "_ "), room)]
        for part, texts in itertools.zip_longest(label, lines):
            print(line_form.format(part or "", *(texts or [""] * len(titles))))


def cell(row: Row, column: str) -> tuple[str, str]:
    """The mean in this column as it is printed, with * where the interval leaves out 0; and its deviation."""
    if column not in row.mean:
        return "-", ""
    digits = 2 if row.metric not in ("MAE", "Corr") else 3 if row.against else 4
    sign = "+" if row.against else ""
    star = "*" if row.low.get(column, 0) > 0 or row.high.get(column, 0) < 0 else ""
    deviation = f"±{row.std[column]:.{digits}f}" if column in row.std else ""
    return f"{row.mean[column]:{sign}.{digits}f}{star}", deviation


def legend(table: dict, rows: list[Row], args) -> list[str]:
    """What the tables' words mean, of those that stand in them."""
    named, kinds = {row.metric for row in rows}, {row.kind for row in rows}
    starred = any(row.low for row in rows)
    unit = next(iter(table.values()))[0]["clips"]["units"]
    drawn = "videos" if len(set(unit)) < len(unit) else "clips"
    lines = {
        "F1 is weighted, of positive against negative clips; those of sentiment 0 are left out.": "F1" in named,
        "Each emotion is a decision of its own; its F1 is weighted by yes and no.": "F1 happy" in named,
        "MAE is in units of the label, less is better.": "MAE" in named,
        "Avg. is the mean of the sets before it that the data can answer; ± is the deviation over the seeds.": True,
        "constant always answers the class that is commoner in training, for a regression the median.": True,
        "linear is a ridge regression for each set, on pooled frames of complete clips; it reads those of the\n"
        "set's streams that are best on validation.": "linear" in kinds,
        "Differences are seed by seed. *: the 95 % interval leaves out 0, by "
        f"{DRAWS} draws of {drawn} and seeds.": starred,
        "The interval takes clips as independent, which those of one video are not.": starred and drawn == "clips",
        "area is the mean height of the curve over the share of dropped frames.": len(args.rates) > 1,
        "At 1.0 nothing is left of any clip: all clips of one length get the same answer there.": 1.0 in args.rates,
        "-: there is no number.": any(TITLES.keys() - row.mean.keys() for row in rows if row.metric in MAIN),
        "More metrics and rates are in --csv.": not args.csv,
    }
    return [line for line, stands in lines.items() if stands]


def heading(name: str, runs: list[dict], args) -> list[str]:
    """What a row is: whose numbers, on which data, and every reason to read them with care."""
    first = runs[0]
    run, source, config = first["run"], first["data"], first["run"]["config"]
    module = METHODS[run["method"]]
    seeds = data.printable(" ".join(str(result["run"]["seed"]) for result in runs))
    lines = [f"{name} on {first['dataset']}, {args.split} split, seeds {seeds}, mask seed {args.mask_seed}"]
    lines.append(f"data: {data.identity(source)}")
    if source["synthetic"]:
        lines.append("SYNTHETIC data: these numbers say nothing about the papers'")
    if run["method"] == "double_flow":
        origin = "from the data" if data.SIMULATED in run["dims"] else "learned from audio"
        lines.append(f"simulated text: {origin}")
    notes = [*source["notes"], comparison(first)[1]]
    if absent := [m for m in run["lacking"] if m not in first["lacking"]]:
        notes.append(f"training had no {' and no '.join(absent)}: a set with it is not answered")
    if not first["linear"]:
        notes.append("no linear row: it is not fitted on feature folders")
    usual = asdict(replace(module.PAPER[run["dataset"]], **module.ABLATIONS.get(run["ablation"], {})))
    changed = [f"{k} {v}" for k, v in config.items() if v != usual[k] and k != "aligned"]
    if not run["normalize"] and first["linear"]:      # feature folders never are
        changed.append("features not standardised")
    if changed:
        notes.append(f"other settings than the defaults: {', '.join(changed)}")
    for result in runs:
        if result["epochs_run"] not in (None, config["epochs"]):
            notes.append(f"seed {result['run']['seed']} was stopped after {result['epochs_run']} of "
                         f"{config['epochs']} epochs")
    if source["sha256"] != run["data"]["sha256"]:
        notes.append("this is not the file that the runs were trained on")
    return lines + [f"note: {note}" for note in notes if note]


CSV_HEADER = ("dataset", "synthetic", "data", "table", "metric", "kind", "name", "column", "mean", "std", "n",
              "low", "high")


def csv_lines(table: dict, rows: list[Row]) -> list[tuple]:
    """The lines of --csv: every number of one data set's tables, in long form."""
    first = next(iter(table.values()))[0]
    about = first["dataset"], first["data"]["synthetic"], first["data"]["sha256"]
    lines = []
    for row in rows:
        name = f"{row.name} - {row.against}" if row.kind == "paired" else row.name
        for column, mean in row.mean.items():
            part = "sets" if column in TITLES else "rates"
            others = row.std.get(column), row.n, row.low.get(column), row.high.get(column)
            lines.append((*about, part, row.metric, row.kind, name, column, mean, *others))
    return lines


def write_csv(path: Path, header: tuple, lines: list[tuple]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    data.write(path, text.getvalue().encode(errors="backslashreplace"))


def plot(path: Path, tables: list[tuple], args) -> None:
    """Curves over the share of dropped frames, a panel for each data set and main metric. tables: pairs of a table and
    its rows."""
    panels = []
    for table, rows in tables:
        for metric in MAIN:
            curves = [row for row in rows if row.metric == metric and row.kind in ("ours", "constant", "linear")]
            if curves:
                panels.append((next(iter(table.values()))[0], metric, curves))
    figure = figure_class(path)(figsize=(4.5 * len(panels), 4), layout="constrained")
    for axis, (first, metric, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for row in curves:
            mean = [row.mean.get(str(p), math.nan) for p in args.rates]
            std = [row.std.get(str(p), 0) for p in args.rates]
            style = {"ours": "o-", "constant": "k:", "linear": "k--"}[row.kind]
            axis.errorbar(args.rates, mean, std, fmt=style, capsize=2, label=row.name)
        synthetic = ", SYNTHETIC" if first["data"]["synthetic"] else ""
        axis.set_title(f"{first['dataset']}{synthetic}\n{args.split} split, {first['conditions']['lav']['n']} clips")
        axis.set_xlabel("share of frames dropped, p")
        axis.set_ylabel("MAE, less is better" if metric == "MAE" else f"weighted {metric} (%)")
        axis.legend(fontsize=7)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=200)
    data.write(path, content.getvalue())


def figure_class(path: Path):
    """matplotlib's Figure; not pyplot, which would take a notebook's backend."""
    try:
        from matplotlib.figure import Figure
        return Figure
    except ImportError:
        raise DataError(f"--plot {path} needs matplotlib, which is not installed: pip install matplotlib.") from None


# ---------------------------------------------------------------------------------- run folders and checkpoints

def read_groups(paths: list[Path]) -> dict:
    """A group's folder -> run folder -> checkpoint, of the runs that are named or lie in a named folder. A DataError
    unless the runs of a group differ in their seed, and in nothing else."""
    groups = {}
    for folder in run_folders(paths):
        groups.setdefault(folder.parent, {})[folder] = read_checkpoint(folder / "model.pt", ENTRIES, AGAIN)
    for group_folder, checkpoints in groups.items():
        runs = [checkpoint["run"] for checkpoint in checkpoints.values()]
        differ = {name for run in runs for name in differences(runs[0], run)} - {"seed"}
        if differ:
            raise DataError(f"The runs in {group_folder} are not seeds of one run: they differ in "
                            f"{', '.join(sorted(differ))}. Evaluate them one by one.")
        if len({run["seed"] for run in runs}) < len(runs):
            raise DataError(f"Two runs in {group_folder} have the same seed: name only one of them.")
    return groups


def run_folders(paths: list[Path]) -> list[Path]:
    """The run folders that are named or lie in a named folder, sorted."""
    folders = set()
    for path in paths:
        models = list(path.rglob("model.pt"))
        if not models:
            raise DataError(f"There is no model.pt in {path}, so no run that is trained far enough: name a run "
                            "folder of train.py, or a folder that holds some.")
        folders.update(Path(os.path.abspath(model.parent)) for model in models)
    return sorted(folders)


def differences(run: dict, other: dict) -> list[str]:
    """The entries in which two run records differ."""
    new, old = ({**record, **record["config"], **record["data"]} for record in (run, other))
    return [name for name in new if name not in ("config", "data") and new[name] != old.get(name)]


def group_name(run: dict) -> str:
    """What a group of runs is called: its method and ablation."""
    return f"{run['method']} {run['ablation']}".strip()


def device_named(name: str) -> torch.device:
    """The device of --device, "auto" being CUDA where there is one; a DataError if the machine has none
    of this name. It also turns TF32 convolutions off, for the whole process."""
    torch.backends.cudnn.allow_tf32 = False     # a convolution would differ from the CPU's by 1e-3
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        torch.zeros(1, device=name).item()      # "meta" has no values
    except Exception:           # torch raises RuntimeError, AssertionError, ImportError, AttributeError ...
        raise DataError(f"--device {name}: this machine or this torch has no such device. "
                        "Use cpu or auto.") from None
    return torch.device(name)


def read_checkpoint(path: Path, keys, advice: str) -> dict:
    """A checkpoint that holds these entries, or a DataError that says what is wrong with it and gives this
    advice; nothing in the file is run. A "run" in it is of this version."""
    with data.reading(path, advice), data.open_file(path) as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise pickle.UnpicklingError("it holds more than tensors and plain values") from None
        if missing := [key for key in keys if key not in content]:
            raise pickle.UnpicklingError(f"it holds no {' and no '.join(missing)}")
        if "run" in keys and content["run"]["format"] != FORMAT:
            raise pickle.UnpicklingError("it holds a run of another version")
        return content


def build(run: dict, weights: dict, path: Path, device) -> torch.nn.Module:
    """The model of a run record with these weights (a state_dict, read from `path`), ready to answer; or
    a DataError."""
    with data.reading(path, AGAIN):
        module = METHODS[run["method"]]
        arguments = run["dims"], run["task"], module.Config(**run["config"])
        with torch.device("meta"):      # a record may claim a width that no memory holds: shapes are compared first
            module.Model(*arguments).load_state_dict(weights, assign=True)
        model = module.Model(*arguments)
        model.load_state_dict(weights)
        return model.to(device).eval()


# ---------------------------------------------------------------------------------- command line

def main(argv=None) -> int:
    args = parse(argv)
    stopped = "stopped; what was evaluated is in each run's results.json"
    return data.run_program(lambda: evaluate_all(args), stopped)


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python eval.py RUN [RUN ...] [options]; -h explains them")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders of train.py, or folders that hold some")
    rates = parser.add_mutually_exclusive_group().add_argument
    rates("--rates", nargs="+", type=share, default=data.RATES, metavar="P",
          help="shares of frames to drop (default 0.0 ... 1.0)")
    rates("--no-rates", action="store_const", const=(), dest="rates", help="no table over the share of dropped frames")
    add("--mask-seed", type=int, default=0, metavar="N", help="of the fixed evaluation masks (default 0)")
    add("--split", choices=data.SPLITS, default="test", help="default test")
    add("--data-dir", metavar="PATH",
        help="data file or folder (default: what the run was trained on); the asked split is enough; a run on mosi "
        "also takes mosei and the other way round")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--csv", type=file_of(".csv"), metavar="F.csv", help="write all numbers of the tables to F.csv, one a line")
    add("--plot", type=file_of(".png", ".pdf", ".svg"), metavar="F.png",
        help="draw F1 (and MAE) against the share of dropped frames (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.plot and not args.rates:
        parser.error("--plot draws curves over --rates: leave --no-rates out")
    args.rates = sorted(set(args.rates))
    return args


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 1")
    return float(text)


def file_of(*endings: str):
    """The type of a path that ends so, in a folder that can be written into."""
    def path(text: str) -> Path:
        if Path(text).suffix.lower() not in endings or not os.access(Path(text).parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{data.printable(text)} does not end in {' or '.join(endings)}, or its "
                                             "folder cannot be written into")
        return Path(text)
    return path


if __name__ == "__main__":
    sys.exit(main())
