"""Evaluate trained runs under missing modalities and print the papers' tables.

    python eval.py runs/mosi/corrkd                     seven available sets, then frame dropping p = 0.0 ... 1.0
    python eval.py runs/mosi/corrkd --protocol combos --format markdown --json table.json
    python eval.py runs/mosi --reference corrkd         several methods and ablations: one table a data set

Runs of the same method, data and ablation are averaged over their seeds. Each run folder gets a results.json, and all
tables and curves are made from these files alone; --stored takes them as they are.
"""
import argparse
import contextlib
import csv
import importlib
import io
import json
import os
import pickle
import statistics
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import data         # first: it tells a stop while torch is imported
import numpy as np
import torch
from sklearn.linear_model import Ridge
from sklearn.manifold import TSNE
from sklearn.metrics import accuracy_score, auc, f1_score, mean_absolute_error

from data import STREAMS, DataError

METHODS = {name: importlib.import_module(name) for name in ("umdf", "corrkd", "double_flow")}
# What a method file offers, and all that is asked of it here and in train.py. A fourth method is one file and its name.
#   TASKS             data set -> "regression", "polarity" or "emotions"
#   Config, PAPER     a dataclass with at least lr, weight_decay, batch_size, epochs, clip, aligned; data set -> Config
#   ABLATIONS         name -> the fields of Config that it changes
#   LISTED            data set -> fields of Config that PAPER has otherwise than they are listed for the paper
#   REPORTED          data set -> ablation ("" = the full method) -> metric -> column -> the paper's number
#   FEATURES          stream -> the width of the features that REPORTED is of
#   TABLE             column -> title where the paper's table is not that of the seven sets, else {}
#   learning_rate_factor(epoch) -> what lr is multiplied by in epoch 0, 1, ...
#   Model(dims, task, config), an nn.Module with
#     stages                                    stage -> the sets of streams that it is about
#     begin(stage)                              before each stage, in the order of `stages`
#     sees_missing, has_teacher                 whether this stage's losses read the missing copies, a frozen teacher
#     teacher_outputs(complete, real)           -> tensors, a row a clip, constant in a stage that has_teacher; or None
#     losses(complete, missing, target, real, teacher)      -> {term: scalar, "total": scalar}; missing may be None if
#                                               this stage does not see it, and so may teacher
#     represent(streams, real), classify(h)     -> h (B, width); -> (B, 1), (B, 2) or (B, 4, 2); forward is both
#     encode(name, stream, real)                -> (B, d), of which h is the three side by side; None if they interact
FORMAT = 3              # of run folders: those of another one are refused
COLUMNS = (*list(data.SETS)[:6], "avg", "lav")
TITLES = {**{c: "{" + ",".join(c) + "}" for c in COLUMNS}, "avg": "Avg."}
SHOWN = ("happy", "sad", "angry", "neutral")    # the papers' order of emotions
MAIN = ("F1", "MAE", *(f"F1 {e}" for e in SHOWN))   # in every table; the others of a regression where it stands alone
STRENGTHS = (1e5, 1e4, 1e3, 1e2, 1e1, 1e0)      # of the ridge regression that is the linear baseline
COPIES = 5              # randomly dropped copies of the training split that it is fitted on
MARKERS = "os^Dv<>P"

# ---------------------------------------------------------------------------------- predictions and metrics

def targets(label: torch.Tensor, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which clips count (indices), and what they are: their sentiment; polarity, which leaves sentiment 0 out and calls
    > 0 class 1; or four emotions of 0 and 1."""
    everyone = torch.arange(len(label), device=label.device)
    if task == "polarity":
        index = label.nonzero()[:, 0]
        if len(index) == 0:
            raise DataError("A split has no clip whose sentiment is not 0: no polarity to learn or to measure.")
        return index, (label[index] > 0).long()
    return everyone, label if task == "regression" else label.long()


def constant(truth: torch.Tensor, task: str):
    """What a predictor that knows only these labels answers: their median, or the commoner class of each decision."""
    return truth.median().item() if task == "regression" else truth.float().mean(0).round().long().tolist()


def weighted_f1(truth: np.ndarray, answer: np.ndarray) -> float:
    """In per cent. By keyword: with truth and answer swapped the weights are the answer's."""
    return 100 * float(f1_score(y_true=truth, y_pred=answer, average="weighted", zero_division=0))


def metrics(task: str, answer: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """answer, truth: classes (n,) or (n, 4), or sentiment (n,). F1 and accuracies in per cent, MAE in label units.

    Regression: F1 and Acc-2 ask whether > 0, of the clips whose sentiment is not 0; "has0" whether >= 0, of all clips.
    Acc-7 compares the nearest integers in [-3, 3], halves to the even one (0.5 -> 0, 1.5 and 2.5 -> 2), as numpy and
    most published code round. Corr is Pearson's, nan for a constant answer.
    """
    if task == "polarity":
        return {"F1": weighted_f1(truth, answer)}
    if task == "emotions":
        return {f"F1 {e}": weighted_f1(truth[:, i], answer[:, i]) for e, i in
                ((e, data.EMOTIONS.index(e)) for e in SHOWN)}
    signed = truth != 0
    sides = (truth[signed] > 0, answer[signed] > 0), (truth >= 0, answer >= 0)
    seven = [np.rint(np.clip(v, -3, 3)) for v in (truth, answer)]
    varied = len(truth) > 1 and np.ptp(truth) > 0 and np.ptp(answer) > 0
    nan = float("nan")
    f1, accuracy = ([f(*s) if len(s[0]) else nan for s in sides]
                    for f in (weighted_f1, lambda t, a: 100 * float(accuracy_score(t, a))))
    return {"F1": f1[0], "MAE": float(mean_absolute_error(truth, answer)), "F1 has0": f1[1], "Acc-2": accuracy[0],
            "Acc-2 has0": accuracy[1], "Acc-7": 100 * float(accuracy_score(*seven)),
            "Corr": float(np.corrcoef(truth, answer)[0, 1]) if varied else nan}


def absent(model, m: str, stream: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Stream m of a batch, removed, (B, d): all its frames are zeros, so clips of one length share one answer."""
    length, clip = lengths.unique(return_inverse=True)
    (real,), (clip,) = (data.sent([x], stream.device) for x in (torch.arange(stream.shape[1]) < length[:, None], clip))
    return model.encode(m, stream.new_zeros(len(length), *stream.shape[1:]), real)[clip]


@torch.no_grad()
def predict(model, split: dict, masks: list[dict], size: int = 256, head=None) -> list[torch.Tensor]:
    """Outputs (N, ...) of a whole split under each of these masks (stream -> present (N, T_m)), in batches of clips of
    similar length. head: what is done to the joint representation, if it is not model.classify.

    A method with `encode` treats its streams one by one: in a batch each is then encoded once whole and once absent,
    and the sets are put together from these.
    """
    model.eval()
    head, device = head or model.classify, split["label"].device
    lengths = {m: split["real"][m].sum(1) for m in STREAMS}
    order = sum(lengths.values()).argsort(stable=True)
    (there,), outputs = data.sent([order], device), [[] for _ in masks]
    forms = [{m: "whole" if torch.equal(present[m], split["real"][m]) else "part" if present[m].any() else "absent"
              for m in STREAMS} for present in masks]
    kept = [dict(zip(STREAMS, data.sent([present[m] for m in STREAMS], device))) for present in masks]
    read = ((index, place, *data.batch(split, index, place)[:2])
            for index, place in zip(order.split(size), there.split(size)))
    for index, place, streams, real in data.ahead(split, read):
        known = {}
        for present, form, output in zip(kept, forms, outputs):
            def left(m):
                return streams[m] * present[m][place, :streams[m].shape[1], None]
            if not model.encode:
                output.append(head(model.represent({**streams, **{m: left(m) for m in STREAMS}}, real)))
                continue
            for m in STREAMS:
                if (m, form[m]) not in known or form[m] == "part":
                    known[m, form[m]] = (absent(model, m, streams[m], lengths[m][index]) if form[m] == "absent"
                                         else model.encode(m, left(m), real[m]))
            output.append(head(torch.cat([known[m, form[m]] for m in STREAMS], dim=-1)))
    return [torch.cat(output)[there.argsort()] for output in outputs]


def evaluate(model, task: str, split: dict, conditions, name: str, mask_seed: int = 0, size: int = 256,
             clips: list | None = None) -> dict:
    """For each condition (a set like "la", or a rate of dropped frames): {"n": clips that count, "realised": dropped
    shares, metric: value}. clips: a list that gets each clip's answer, (condition, position in the split, truth,
    answer, probability of class 1 or None)."""
    (index, truth), result = (x.cpu() for x in targets(split["label"], task)), {}
    masks = [data.evaluation_masks(split["real"], c, name, mask_seed) for c in conditions]
    for condition, present, output in zip(map(str, conditions), masks, predict(model, split, masks, size)):
        output = output.cpu()[index]
        answer = output[:, 0] if task == "regression" else output.argmax(-1)
        result[condition] = {"n": len(truth), "realised": data.realised(present, split["real"]),
                             **metrics(task, answer.numpy(), truth.numpy())}
        if clips is not None:
            chance = [None] * len(truth) if task == "regression" else output.softmax(-1)[..., 1].tolist()
            clips += zip([condition] * len(truth), index.tolist(), truth.tolist(), answer.tolist(), chance)
    return result


def score(result: dict) -> float:
    """One number for results, the more the better: the mean over the conditions of -MAE for a regression, else of F1
    (over the emotions too)."""
    if "MAE" in next(iter(result.values())):
        return -statistics.fmean(c["MAE"] for c in result.values())
    return statistics.fmean(v for c in result.values() for k, v in c.items() if k in MAIN)


class Linear(torch.nn.Module):
    """The linear baseline, evaluated like every model: the mean over the real frames of each stream (zeros where it is
    absent; a dropped frame counts as the zeros that it is), side by side, times a matrix. weight (outputs, width),
    bias (outputs,); an output is a sentiment, or the lead of class 1 in a decision."""

    def __init__(self, task: str, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.task, self.weight, self.bias = task, weight, bias

    def encode(self, name: str, stream: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return stream.sum(1, dtype=torch.float64) / real.sum(1, keepdim=True).clamp(min=1)

    def classify(self, h: torch.Tensor) -> torch.Tensor:
        y = h @ self.weight.T + self.bias
        y = y if self.task == "regression" else torch.stack((-y, y), -1)
        return y[:, 0] if self.task == "polarity" else y


def fit_linear(loaded: dict, task: str) -> dict | None:
    """weight and bias of Linear: ridge regression on the sentiment, or on -1 and 1 for a decision, of randomly dropped
    copies of the training split; its strength is the best on validation over the available sets. None for feature
    folders. Fitted once, for all seeds and ablations."""
    train, valid, generator = loaded["train"], loaded["valid"], torch.Generator().manual_seed(0)
    known, sets = loaded.setdefault("linear", {}), data.answerable(data.SETS, loaded["lacking"])
    if isinstance(train["text"], data.Frames) or task in known:
        return known.get(task)
    index, truth = targets(train["label"], task)
    plain = Linear(task, torch.empty(0), torch.empty(0))
    copies = [data.training_masks(train["real"], generator) for _ in range(COPIES)]
    x = torch.cat([h[index] for h in predict(plain, train, copies, head=torch.nn.Identity())]).cpu().numpy()
    y = truth.reshape(len(truth), -1).cpu().numpy()
    y, best = np.tile(y if task == "regression" else 2 * y - 1, (COPIES, 1)), None
    for strength in STRENGTHS:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(An i|I)ll-conditioned matrix")      # of features that repeat each other
            fitted = Ridge(alpha=strength).fit(x, y)
        parts = {"weight": torch.tensor(np.atleast_2d(fitted.coef_), device=truth.device),
                 "bias": torch.tensor(fitted.intercept_, device=truth.device)}
        reached = score(evaluate(Linear(task, **parts), task, valid, sets, "valid"))
        if best is None or reached > best[0]:
            best = reached, parts
    known[task] = best[1]
    return best[1]


# ---------------------------------------------------------------------------------- runs

def run_record(method: str, dataset: str, ablation: str, seed, config, loaded: dict, normalize: bool,
               limit: int | None) -> dict:
    """What a run is: one dict, which stands as "run" in config.json, model.pt, last.pt and results.json."""
    task = METHODS[method].TASKS[dataset]
    return {"format": FORMAT, "method": method, "dataset": dataset, "task": task, "ablation": ablation, "seed": seed,
            "limit": limit, "normalize": normalize, "dims": loaded["dims"], "lacking": loaded["lacking"],
            "config": asdict(config), "constant": constant(targets(loaded["train"]["label"], task)[1], task),
            "data": loaded["source"]}


def settings(run: dict) -> dict:
    """A run record as one level, without what may differ between runs that are the same: where the data lies. An
    UnpicklingError for what is no run record of this version."""
    told = {"sha256", "file", "synthetic", "sizes", "notes", "arguments"}
    try:
        source, config, known = run["data"], run["config"], asdict(METHODS[run["method"]].Config())
        whole = (len(run) == 13 and run["format"] == FORMAT and run["dataset"] in data.SIZES
                 and set(config) == set(known) and told <= set(source))
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise pickle.UnpicklingError("it holds no run of this version")
    return {**{k: v for k, v in run.items() if k not in ("data", "config")}, **config,
            "data file": source["sha256"] or source["file"]}


def differences(one: dict, other: dict) -> list[str]:
    """In what two run records differ."""
    a, b = (json.loads(json.dumps(settings(run))) for run in (one, other))
    return [k for k in {**a, **b} if a.get(k) != b.get(k)]


def read_tensors(path: Path, device):
    """torch.load of tensors and plain values only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")     # torch 2.1 warns of its own reader
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except pickle.UnpicklingError:
            raise pickle.UnpicklingError("it holds more than tensors and plain values") from None


def read_checkpoint(path: Path, needed: tuple, device="cpu") -> dict:
    """A checkpoint of train.py that holds these entries, or a DataError that says what is wrong with it."""
    with data.told(path, "It is damaged or no checkpoint of this version of train.py: train again with --no-resume."):
        content = read_tensors(path, device)
        settings(content["run"])
        if not set(needed) <= set(content):
            raise pickle.UnpicklingError(f"it holds no {' and no '.join(sorted(set(needed) - set(content)))}")
        return content


def build(checkpoint: dict, path: Path, device) -> torch.nn.Module:
    """The model of a checkpoint, ready to answer."""
    run, module = checkpoint["run"], METHODS[checkpoint["run"]["method"]]
    with data.told(path, f"It does not fit {run['method']}.py, so it is of another version: train again."):
        model = module.Model(run["dims"], run["task"], module.Config(**run["config"])).to(device)
        model.load_state_dict(checkpoint["model"])
        return model.eval()


def device_named(name: str) -> torch.device:
    torch.backends.cudnn.allow_tf32 = False     # a convolution would differ from the CPU's by 1e-3
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise DataError(f"--device {name}: this machine or this torch has no such device. Use cpu or auto.") from None
    return device


def conditions(args, lacking: list[str]) -> list:
    """The sets of streams that the data can answer, and the rates of dropped frames, as far as they are asked for."""
    sets = data.answerable(data.SETS, lacking) if args.protocol != "rates" else []
    return sets + (args.rates if args.protocol != "combos" else [])


def open_run(folder: Path, args, device, cache: dict) -> tuple[dict, torch.nn.Module, dict]:
    """A run's checkpoint, its model, and the asked split as the run wants it."""
    path = folder / "model.pt"
    checkpoint = read_checkpoint(path, ("model", "stats", "linear", "epoch"), device)
    model, run = build(checkpoint, path, device), checkpoint["run"]
    where = dict(run["data"]["arguments"])
    if args.data_dir:
        where.update(data_dir=args.data_dir, synthetic=False, features=None, labels=None)
    key = json.dumps([run["dataset"], run["limit"], run["normalize"], run["data"]["sha256"], where], default=str)
    if key not in cache:
        cache.clear()       # runs come sorted, and one split may fill the memory
        stats = checkpoint["stats"] and {m: tuple(t.cpu() for t in pair) for m, pair in checkpoint["stats"].items()}
        cache[key] = data.load(run["dataset"], splits=(args.split,), device=device, normalize=run["normalize"],
                               stats=stats, limit=run["limit"], **where)
    loaded = cache[key]
    if loaded["dims"] != run["dims"]:
        raise DataError(f"{loaded['source']['file']} has widths {loaded['dims']}, {path} was trained on {run['dims']}.")
    if run["config"]["aligned"] and not loaded["aligned"]:
        raise DataError(f"{loaded['source']['file']} holds unaligned streams, {path} was trained on aligned ones.")
    return checkpoint, model, loaded


def evaluate_run(folder: Path, args, device, cache: dict, clips: list) -> dict:
    """Measure one run and its baselines on the asked split, write its results.json, and return what that says. clips
    gets a line for each clip and condition."""
    checkpoint, model, loaded = open_run(folder, args, device, cache)
    run, split, log, answered = checkpoint["run"], loaded[args.split], folder / "log.jsonl", []
    how = run["task"], split, conditions(args, run["lacking"]), args.split, args.mask_seed, args.batch_size
    found = evaluate(model, *how, answered)
    linear = checkpoint["linear"] and evaluate(Linear(run["task"], **checkpoint["linear"]), *how)
    truth = targets(split["label"], run["task"])[1].cpu().numpy()
    always = metrics(run["task"], np.broadcast_to(np.array(run["constant"]), truth.shape), truth)
    result = {"run": run, "split": args.split, "mask_seed": args.mask_seed, "data": loaded["source"],
              "conditions": found, "constant": dict.fromkeys(found, always), "linear": linear,
              "epoch": checkpoint["epoch"], "epochs_run": None, "checkpoint_sha256": data.sha256(folder / "model.pt")}
    clips += [(folder, run["method"], run["ablation"], run["seed"], c, split["id"][i] if split["id"] else i, *rest)
              for c, i, *rest in answered]
    if log.exists():        # model.pt is of the last stage
        with data.told(log, "The same train.py command writes it again."):
            stages = [json.loads(line)["stage"] for line in log.read_text().splitlines()]
            result["epochs_run"] = stages.count(stages[-1])
    with data.replacing(folder / "results.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    return read_results(folder, args)


def read_results(folder: Path, args) -> dict:
    """A run's results.json, if it answers what is asked."""
    path = folder / "results.json"
    with data.told(path, "It is damaged or of another version: leave --stored out to evaluate the run."):
        result = json.loads(path.read_text())
        for source in (result["run"]["data"], result["data"]):
            settings({**result["run"], "data": source})
        wrong = [f"{k} {result[k]}, not {v}" for k, v in (("split", args.split), ("mask_seed", args.mask_seed))
                 if result[k] != v]
        wrong += [f"no condition {c}" for c in conditions(args, result["run"]["lacking"])
                  if str(c) not in result["conditions"]][:1]
    if (folder / "model.pt").exists() and data.sha256(folder / "model.pt") != result["checkpoint_sha256"]:
        wrong.append("another checkpoint than the model.pt beside it")
    if wrong:
        raise DataError(f"{path} has {', '.join(wrong)}. Leave --stored out to evaluate the run again.")
    return result


# ---------------------------------------------------------------------------------- the numbers of a table

def names(groups: list) -> list[str]:
    """What each group of runs is called: method and ablation, and what else tells two of that name apart."""
    runs = [group[0]["run"] for group in groups]
    called = [" ".join(filter(None, (run["method"], run["ablation"]))) for run in runs]
    result = []
    for name, run in zip(called, runs):
        same = [other for other, theirs in zip(runs, called) if theirs == name]
        differ = [f"{k} {settings(run).get(k)}" for k in dict.fromkeys(k for o in same for k in differences(run, o))
                  if k not in ("seed", "data file")]
        result.append(name + (f" [{', '.join(differ)}]" if differ else ""))
    return result


def measured(found: dict) -> list[str]:
    """The metrics of results; found: condition -> what was measured."""
    return [k for k in next(iter(found.values())) if k not in ("n", "realised")]


def cells(table: str, found: dict, metric: str, rates=()) -> dict[str, float]:
    """column -> number of one run or baseline, from its condition -> metrics. "avg": the mean over those of the six
    incomplete sets that the data can answer; "area": the mean height of the curve over the span of the rates."""
    if table == "sets":
        row = {c: found[c][metric] for c in data.SETS if c in found}
        six = [row[c] for c in COLUMNS[:6] if c in row]
        return {**row, "avg": statistics.fmean(six)} if six else row
    row = {str(p): found[str(p)][metric] for p in rates}
    return {**row, "area": auc(rates, [*row.values()]) / (rates[-1] - rates[0])} if len(rates) > 1 else row


def records(table: str, metric: str, kind: str, group: str, rows: list[dict]) -> list[dict]:
    """One record for each number of a row: the mean over `rows` (column -> number, one for each run), n, and the sample
    standard deviation (None for one run, nan where a Corr is not defined)."""
    return [{"table": table, "metric": metric, "kind": kind, "group": group, "column": column,
             "mean": statistics.fmean(values), "n": len(values) if kind in ("ours", "paired") else None,
             "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}
            for column in (rows[0] if rows else ()) for values in [[row[column] for row in rows]]]


def reported(result: dict, table: str, metric: str) -> dict[str, float]:
    """The paper's known numbers for what this run is: column -> number, where they may be compared."""
    run = result["run"]
    known = METHODS[run["method"]].REPORTED[run["dataset"]].get(run["ablation"], {}).get(metric, {})
    if not data.comparison(run, result["data"], METHODS[run["method"]].FEATURES)[0]:
        return {}
    return known if table == "sets" else {"0.0": known["lav"]} if "lav" in known else {}


def tabulate(groups: dict[str, list], args) -> list[dict]:
    """Every number of the tables on one data set; groups: name -> results of its runs. Kinds of rows: "ours"; "paper"
    and "difference" to it; "paired", the difference to the reference seed by seed; "constant", "linear"; "realised"."""
    if args.reference and args.reference not in groups:
        raise DataError(f"--reference {args.reference}: the runs are of {', '.join(groups)}.")
    tables = [t for t, without in (("sets", "rates"), ("rates", "combos")) if args.protocol != without]
    every, rows = dict.fromkeys(m for runs in groups.values() for m in measured(runs[0]["conditions"])), []
    for table, metric in ((t, m) for t in tables for m in every if t == "sets" or m in MAIN):
        have = {name: runs for name, runs in groups.items() if metric in measured(runs[0]["conditions"])}
        own = {name: {r["run"]["seed"]: cells(table, r["conditions"], metric, args.rates) for r in runs}
               for name, runs in have.items()}
        for name, seeds in own.items():
            mine, against = list(seeds.values()), args.reference or have[name][0]["run"]["method"]
            paper = {c: v for c, v in reported(have[name][0], table, metric).items() if c in mine[0]}
            apart = {c: statistics.fmean(row[c] for row in mine) - v for c, v in paper.items()}
            common = [s for s in seeds if s in own.get(against, {}) and against != name]
            paired = [{c: v - own[against][s][c] for c, v in seeds[s].items()} for s in common]
            for kind, group, of in (("ours", name, mine), ("paper", name, [paper]), ("difference", name, [apart]),
                                    ("paired", f"{name} - {against}", paired)):
                rows += records(table, metric, kind, group, of)
        for kind in ("constant", "linear"):
            of = {}     # the same for methods of the same task
            for runs in (runs for runs in have.values() if runs[0][kind]):
                row = json.dumps(cells(table, runs[0][kind], metric, args.rates))
                of.setdefault(row, []).append(runs[0]["run"]["method"])
            for row, methods in of.items():
                group = ", ".join(dict.fromkeys(methods)) if len(of) > 1 else ""
                rows += records(table, metric, kind, group, [json.loads(row)])
    if "rates" in tables:
        conditions = next(iter(groups.values()))[0]["conditions"]
        shares = {str(p): [s for s in conditions[str(p)]["realised"].values() if s is not None] for p in args.rates}
        rows += records("rates", "", "realised", "", [{p: statistics.fmean(of) for p, of in shares.items() if of}])
    return rows


# ---------------------------------------------------------------------------------- views of these numbers

def cell(record: dict | None) -> str:
    if record is None:
        return "-"
    digits = 3 if record["kind"] == "realised" else 4 if record["metric"] in ("MAE", "Corr") else 2
    sign = "+" if record["kind"] in ("difference", "paired") else ""
    spread = "" if record["std"] is None else f"±{record['std']:.{digits}f}"
    return f"{record['mean']:{sign}.{digits}f}{spread}"


def show(rows: list[dict], table: str, metrics, titles: dict, form: str) -> str:
    """One table of these metrics, a line a row, with the columns of `titles` (column -> title)."""
    found = {}
    for r in rows:
        if r["table"] == table and (r["metric"] in metrics or r["kind"] == "realised"):
            found.setdefault((r["metric"], r["kind"], r["group"]), {})[r["column"]] = r
    lines = [["", *titles.values()]]
    for (metric, kind, group), row in found.items():
        n = next(iter(row.values()))["n"]
        label = {"ours": f"{group} (n={n})", "paired": f"{group} (n={n})", "paper": f"{group} paper",
                 "difference": f"{group} - paper", "realised": "realised rate"}.get(
                     kind, f"{kind} of {group}" if group else kind)
        lines.append([f"{metric} {label}".strip(), *(cell(row.get(c)) for c in titles)])
    if form == "markdown":
        lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
                     for line in lines)


def units(metrics) -> str:
    """What the numbers of these metrics are."""
    said = ["weighted F1" + (" and accuracies in %" if "Acc-2" in metrics else " in %")]
    said += ["MAE in units of the label"] if "MAE" in metrics else []
    said += ["F1 and Acc-2 without the clips of sentiment 0, has0 with them"] if "F1 has0" in metrics else []
    return "; ".join(said)


def simulation(method: str, dims) -> str:
    """What stands in for missing text, which every table of Double-Flow says."""
    if method != "double_flow":
        return ""
    return "simulated text: " + ("from the data" if data.SIMULATED in dims else "learned from audio")


def unlisted(run: dict) -> str:
    """Where a run's settings are the repository's and not those that are listed for the paper."""
    listed = METHODS[run["method"]].LISTED[run["dataset"]]
    other = [f"{k} {run['config'][k]}, listed {v}" for k, v in listed.items() if run["config"][k] != v]
    return f"our choice: {'; '.join(other)}" if other else ""


def heading(results: list[dict], args) -> list[str]:
    """What a row is: whose numbers, on which data, and every reason to read them with care."""
    r, run = results[0], results[0]["run"]
    module, source = METHODS[run["method"]], r["data"]
    usual = asdict(replace(module.PAPER[run["dataset"]], **module.ABLATIONS.get(run["ablation"], {})))
    changed = [f"{k} {v}" for k, v in run["config"].items() if v != usual[k] and k != "aligned"]
    changed += ["not normalised"] if not run["normalize"] and not source["arguments"]["features"] else []
    stopped = [f"note: seed {x['run']['seed']} was stopped after {x['epochs_run']} of {run['config']['epochs']} epochs"
               for x in results if x["epochs_run"] is not None and x["epochs_run"] < run["config"]["epochs"]]
    notes = [*source["notes"], data.comparison(run, source, module.FEATURES)[1], unlisted(run),
             "" if r["linear"] else "no linear row: it is not fitted on feature folders",
             f"other settings than the defaults: {', '.join(changed)}" if changed else ""]
    return [line for line in (
        f"{' '.join(filter(None, (run['method'], run['ablation'], 'on', run['dataset'])))}, {args.split} split, seeds "
        f"{' '.join(str(x['run']['seed']) for x in results)}, mask seed {args.mask_seed}",
        f"data: {source['file']}" + (f", SHA-256 {source['sha256'][:12]}" if source["sha256"] else ""),
        "SYNTHETIC data: these numbers say nothing of the papers'. Its test split has another majority than its "
        "training split, so a constant answer scores below 50 there" if source["synthetic"] else "",
        simulation(run["method"], run["dims"]), *(note and f"note: {note}" for note in notes), *stopped,
        "WARNING: this is not the file that the runs were trained on"
        if any(x["run"]["data"]["sha256"] != x["data"]["sha256"] for x in results) else "") if line]


def show_report(groups: dict, rows: list[dict], args) -> None:
    """Print the heading and the tables of one data set; a line of a heading that is not true of all says of whom."""
    said = {name: heading(results, args) for name, results in groups.items()}
    for first, *_ in said.values():
        print(first)
    for line in dict.fromkeys(line for _, *rest in said.values() for line in rest):
        of = [name for name, told in said.items() if line in told]
        print(line + (f" ({', '.join(of)})" if len(of) < len(groups) else ""))
    every = list(dict.fromkeys(r["metric"] for r in rows if r["metric"]))
    main, alone = [m for m in every if m in MAIN], len(groups) == 1
    methods = {results[0]["run"]["method"] for results in groups.values()}
    own = METHODS[methods.pop()].TABLE if len(methods) == 1 else {}
    beside = ", an extension: not in the paper" if own else ""
    rates = {r["column"]: r["column"] for r in rows if r["table"] == "rates"}
    for title, table, metrics, titles in (
            ("The paper's table", "sets", every, own),
            ("Available streams" + beside, "sets", every if alone and not own else main, TITLES),
            ("Share of frames dropped in every stream" + beside, "rates", main, rates)):
        if titles and any(r["table"] == table for r in rows):
            print(f"\n{title} ({units(metrics)})", show(rows, table, metrics, titles, args.format),
                  sep="\n" if args.format == "text" else "\n\n")
    if "1.0" in rates:
        print("\nAt 1.0 nothing is left of any clip: a model gives all clips of one length the same answer there.")
    if len(main) < len(every) and not alone:
        print(f"\n{', '.join(m for m in every if m not in MAIN)} of these rows are in --csv and --json.")
    print()


@contextlib.contextmanager
def drawing(path: Path, rows: int, columns: int):
    """Axes (rows, columns) to draw into; the figure with one legend of all labels is written to `path` at the end."""
    from matplotlib import pyplot
    pyplot.switch_backend("Agg")
    pyplot.rcParams.update({"font.size": 8, "savefig.dpi": 200, "lines.markersize": 4})
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.4 * columns, 3 * rows + .4), squeeze=False,
                                   layout="constrained")
    yield axes
    lines = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=max(2, columns), fontsize=7)
    with data.replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], bbox_inches="tight")       # no legend is cut off


def plot_curves(reports: list, path: Path) -> None:
    """Each metric against the share of dropped frames, a row of panels for each data set: a line a group, the band one
    standard deviation, a star the paper's number where nothing is dropped. At most six ablations a panel; the full
    methods are in all of them, drawn last and thickest. reports: (groups, rows)."""
    of = {name: results[0] for groups, _ in reports for name, results in groups.items()}
    order = sorted(of, key=lambda name: bool(of[name]["run"]["ablation"]))      # full methods first, alike in all
    panels = []
    for groups, rows in reports:
        ablated = [n for n in order if n in groups and of[n]["run"]["ablation"]]
        full = [n for n in order if n in groups and n not in ablated]
        metrics = dict.fromkeys(r["metric"] for r in rows if r["table"] == "rates" and r["metric"])
        panels.append([(rows, metric, [*ablated[i:i + 6], *full], groups) for metric in metrics
                       for i in range(0, max(1, len(ablated)), 6)])
    styles = {name: {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--", "marker": MARKERS[i % len(MARKERS)],
                     "linewidth": 1 if of[name]["run"]["ablation"] else 2.2} for i, name in enumerate(order)}
    with drawing(path, len(panels), max(map(len, panels))) as axes:
        for row, drawn in zip(axes, panels):
            for axis in row[len(drawn):]:
                axis.set_visible(False)
            for axis, panel in zip(row, drawn):
                plot_panel(axis, *panel, styles)


def plot_panel(axis, rows: list[dict], metric: str, names: list[str], groups: dict, styles: dict) -> None:
    """One metric's curves of these groups, and grey ones of the constant and the linear baseline."""
    curves = {}
    for r in (r for r in rows if r["table"] == "rates" and r["metric"] == metric and r["column"] != "area"):
        curves.setdefault((r["kind"], r["group"]), []).append(r)
    for (kind, group), points in curves.items():
        if kind in ("constant", "linear"):
            axis.plot([float(r["column"]) for r in points], [r["mean"] for r in points], color="grey", linewidth=.7,
                      linestyle="-" if kind == "linear" else ":", label=f"{kind} of {group}" if group else kind)
    for name in (n for n in names if ("ours", n) in curves):
        points, color = curves["ours", name], styles[name]["color"]
        rates, mean, std = np.array([(float(r["column"]), r["mean"], r["std"] or 0) for r in points]).T
        axis.plot(rates, mean, label=name, **styles[name])
        axis.fill_between(rates, mean - std, mean + std, alpha=.15, linewidth=0, color=color)
        for r in curves.get(("paper", name), []):
            axis.plot(0, r["mean"], "*", color=color, markersize=9, clip_on=False, label=f"{name}, paper")
    axis.fill_between([], [], [], color="grey", alpha=.15, label="band: ± one standard deviation over the seeds")
    run, source = next(iter(groups.values()))[0]["run"], next(iter(groups.values()))[0]["data"]
    axis.set(xlabel="share of frames dropped, p", ylabel=metric if metric == "MAE" else f"weighted {metric} (%)",
             title=run["dataset"] + (", SYNTHETIC" if source["synthetic"] else f", data {source['sha256'][:6]}"))


def joint(model, split: dict, task: str, condition, args) -> tuple[np.ndarray, np.ndarray]:
    """Joint representations (n, width), which is what the head gets, of at most 100 clips a class, and their classes
    (n,): one emotion alone, or negative and positive."""
    masks = [data.evaluation_masks(split["real"], condition, args.split, args.mask_seed)]
    h, = predict(model, split, masks, args.batch_size, torch.nn.Identity())
    label = split["label"].cpu().numpy()
    kind = (np.where(label.sum(1) == 1, label.argmax(1), -1) if task == "emotions"
            else np.where(label == 0, -1, label > 0))
    draw = np.random.default_rng(args.mask_seed).permutation(len(kind))
    chosen = np.concatenate([draw[kind[draw] == k][:100] for k in np.unique(kind[kind >= 0])])
    return h.flatten(1).cpu().numpy()[chosen], kind[chosen]


def plot_tsne(groups: list[tuple[str, Path]], args, device, cache: dict) -> None:
    """t-SNE of the joint representations of each group's first seed, half of the frames dropped and text alone."""
    with drawing(args.plot, len(groups), 2) as axes:
        for row, (name, folder) in zip(axes, groups):
            checkpoint, model, loaded = open_run(folder, args, device, cache)
            run = checkpoint["run"]
            kinds = data.EMOTIONS if run["task"] == "emotions" else ("negative", "positive")
            for axis, condition, title in zip(row, (.5, "l"), ("p = 0.5", "text alone")):
                h, kind = joint(model, loaded[args.split], run["task"], condition, args)
                place = TSNE(perplexity=min(30, (len(h) - 1) / 3), random_state=args.mask_seed).fit_transform(h)
                for k in np.unique(kind):
                    axis.scatter(*place[kind == k].T, s=8, marker=MARKERS[k], label=kinds[k])
                where = run["dataset"] + (", SYNTHETIC" if run["data"]["synthetic"] else "")
                axis.set(title=f"{name}, {where}: {title}", xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])


def write_csv(path: Path, columns, lines) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([columns, *lines])
    with data.replacing(path) as file:
        file.write(text.getvalue().encode())


# ---------------------------------------------------------------------------------- the program

def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python eval.py RUN [RUN ...] [options]; -h explains them")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders of train.py, or folders that hold some")
    add("--protocol", choices=("combos", "rates", "both"), default="both",
        help="available sets of streams, dropped frames, or both (default)")
    add("--rates", nargs="+", type=float, default=list(data.RATES), help="shares of frames to drop (0.0 ... 1.0)")
    add("--mask-seed", type=int, default=0, help="seed of the fixed evaluation masks (default 0)")
    add("--split", choices=data.SPLITS, default="test", help="default test")
    add("--data-dir", help="data file or folder (default: the file that the run was trained on)")
    add("--batch-size", type=int, default=256, help="clips at a time; changes no prediction (default 256)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--format", choices=("text", "markdown"), default="text", help="of the printed tables (default text)")
    add("--json", type=Path, metavar="F", help="write all runs and all numbers of the tables to F")
    add("--csv", type=Path, metavar="F", help="write all numbers of the tables to F, one a line")
    add("--predictions", type=Path, metavar="F.csv", help="write every run's answer to every clip to F.csv")
    add("--stored", action="store_true", help="take each run's results.json as it is, evaluate nothing")
    add("--reference", metavar="NAME", help="the row that the others are subtracted from, seed by seed, for instance "
        'corrkd or "corrkd no_scd" (default: the full method, for its ablations)')
    add("--plot", type=Path, metavar="F.png", help="draw a figure (needs matplotlib)")
    add("--figure", choices=("curves", "tsne"), default="curves", help="of --plot: F1 (and MAE) against the share of "
        "dropped frames (default), or t-SNE of the joint representations of each first seed, 100 clips a class")
    args = parser.parse_args(argv)
    if not all(0 <= p <= 1 for p in args.rates) or args.batch_size < 1:
        parser.error("--rates are shares from 0 to 1, and --batch-size is at least 1")
    if args.plot and args.figure == "curves" and args.protocol == "combos":
        parser.error("--plot draws the frame-dropping curve: leave --protocol combos out, or add --figure tsne")
    if args.stored and args.predictions:
        parser.error("--predictions needs an evaluation: leave --stored out")
    args.rates = sorted(set(args.rates))
    return args


def check_outputs(args) -> None:
    """Whether what is asked for can be written, before the evaluation and not after it."""
    for name in ("json", "csv", "predictions", "plot"):
        path = vars(args)[name]
        if path and (path.is_dir() or not os.access(path.parent, os.W_OK)):
            raise DataError(f"--{name} {path} cannot be written: name a file in a folder that exists and is yours.")
    if args.plot:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise DataError("--plot needs matplotlib: pip install matplotlib. All else works without it.") from None
        known = Figure().canvas.get_supported_filetypes()
        if args.plot.suffix[1:] not in known:
            raise DataError(f"--plot {args.plot}: a figure's name ends in one of {', '.join(known)}.")


def run_folders(args) -> list[Path]:
    """The run folders that are named or lie in a named folder. One that has nothing to evaluate yet is told and left
    out, unless it is the only one."""
    name, found = "results.json" if args.stored else "model.pt", {}
    for path in args.runs:
        if path.exists() and not path.is_dir():
            raise DataError(f"{path} is a file: name a run folder of train.py, or a folder that holds some.")
        inside = [] if (path / name).exists() else sorted(p.parent for p in path.rglob(name))
        found.update(dict.fromkeys(inside or [path]))
    ready = [p for p in found if (p / name).exists()]
    for path in (p for p in found if p not in ready and ready):
        print(f"left out: {path} has no {name}, so it is no run or not far enough trained", file=sys.stderr)
    if not ready:
        raise DataError(f"{', '.join(map(str, args.runs))}: there is no {name} in it, so no run that has been trained.")
    return sorted(ready)


def grouped(args, device, cache: dict, clips: list) -> tuple[list[list[dict]], dict[int, Path]]:
    """The results of all runs, those that differ in their seed alone together, in the order of the methods; and the
    first run's folder of each group, by the group's id."""
    groups, folders = {}, {}
    for folder in run_folders(args):
        result = read_results(folder, args) if args.stored else evaluate_run(folder, args, device, cache, clips)
        what = {**settings(result["run"]), "seed": None, "evaluated on": result["data"]["sha256"]}
        runs = groups.setdefault(json.dumps(what), [])
        if any(r["run"]["seed"] == result["run"]["seed"] for r in runs):
            raise DataError(f"{folder} is a second run of the same configuration and seed: name only one of them.")
        runs.append(result)
        folders.setdefault(id(runs), folder)
    order = list(METHODS)
    return sorted(groups.values(), key=lambda g: (order.index(g[0]["run"]["method"]), g[0]["run"]["ablation"])), folders


def main(argv=None) -> int:
    args, cache, tables, reports, clips = parse(argv), {}, {}, [], []
    try:
        check_outputs(args)
        device = device_named(args.device)
        every, folders = grouped(args, device, cache, clips)
        for runs in every:
            run, source = runs[0]["run"], runs[0]["data"]
            tables.setdefault((run["dataset"], run["limit"], source["sha256"] or source["file"]), []).append(runs)
        for same in tables.values():
            groups = dict(zip(names(same), same))
            reports.append((groups, tabulate(groups, args)))
            try:
                show_report(*reports[-1], args)
                sys.stdout.flush()
            except BrokenPipeError:     # as in `eval.py ... | head`: the files that are asked for are still written
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if args.json:
            with data.replacing(args.json) as file:
                file.write(json.dumps([{"runs": sum(groups.values(), []), "rows": rows} for groups, rows in reports],
                                      indent=1).encode())
        if args.csv:
            columns = list(records("", "", "", "", [{"": 0}])[0])
            first = [next(iter(groups.values()))[0] for groups, _ in reports]
            write_csv(args.csv, ("dataset", "synthetic", "data", *columns),
                      [(r["run"]["dataset"], r["data"]["synthetic"], r["data"]["sha256"], *row.values())
                       for r, (_, rows) in zip(first, reports) for row in rows])
        if args.predictions:
            write_csv(args.predictions, ("run", "method", "ablation", "seed", "condition", "clip", "truth", "answer",
                                         "probability"), clips)
        if args.plot and args.figure == "tsne":
            plot_tsne([(n, folders[id(g)]) for groups, _ in reports for n, g in groups.items()], args, device, cache)
        elif args.plot:
            plot_curves(reports, args.plot)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was evaluated is in each run's results.json", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
