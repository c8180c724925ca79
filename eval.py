"""Evaluate trained runs under missing modalities and print the papers' tables.

    python eval.py runs/corrkd-mosi-*                       seven available sets, then frame dropping p = 0.0 ... 1.0
    python eval.py runs/corrkd-mosi-* --protocol combos --format markdown --json table.json
    python eval.py runs/*-mosi-* --reference corrkd         several methods and ablations: one table a data set

Runs of the same method, data and ablation are averaged over their seeds. Each run folder gets a results.json, and all
tables and curves are made from these files alone; --stored takes them as they are.
"""
import argparse
import csv
import hashlib
import inspect
import io
import json
import os
import statistics
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import ttest_rel
from sklearn.metrics import accuracy_score, auc, f1_score, mean_absolute_error

import corrkd
import data
import double_flow
import umdf
from data import DataError

METHODS = {"umdf": (umdf, umdf.UMDF), "corrkd": (corrkd, corrkd.CorrKD),
           "double_flow": (double_flow, double_flow.DoubleFlow)}
COLUMNS = ("l", "a", "v", "la", "lv", "av", "avg", "lav")
TITLES = {**{c: "{" + ",".join(c) + "}" for c in COLUMNS}, "avg": "Avg."}
SHOWN = ("happy", "sad", "angry", "neutral")    # the papers' order of emotions
MAIN = ("F1", "MAE", *(f"F1 {e}" for e in SHOWN))   # in every table; the others of a regression in that of the sets
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")     # Okabe and Ito
MARKERS = "os^Dv<>P"
UNITS = {"polarity": "weighted F1, %", "emotions": "weighted F1, %",
         "regression": "weighted F1 and accuracies in %; F1 and Acc-2 without the clips of sentiment 0, has0 with them"}

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


def answers(output: torch.Tensor, task: str) -> np.ndarray:
    """A model's outputs as sentiment (n,) or classes (n,), (n, 4)."""
    return (output[:, 0] if task == "regression" else output.argmax(-1)).cpu().numpy()


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


@torch.no_grad()
def encode(model, m: str, split: dict, present: torch.Tensor, size: int) -> torch.Tensor:
    """Stream m of a whole split under one mask, (N, d), in batches of clips of similar length."""
    length = split["real"][m].sum(1)
    parts, order = [], length.argsort(stable=True)
    for index in order.split(size):
        cut = max(1, int(length[index[-1]]))
        x = data.take(split, m, index, cut)
        masks = [mask[index, :cut].to(x.device) for mask in (split["real"][m], present)]
        parts.append(model.encode(m, x * masks[1][..., None], masks[0]))
    return torch.cat(parts)[order.argsort().to(x.device)]


@torch.no_grad()
def encode_absent(model, m: str, split: dict, size: int) -> torch.Tensor:
    """Stream m removed, (N, d): all its frames are zeros, so clips of one length share one answer."""
    length, clip = split["real"][m].sum(1).unique(return_inverse=True)
    device, frames = split["label"].device, torch.arange(max(1, int(length.max())))
    zeros = torch.zeros(min(size, len(length)), len(frames), split[m].shape[2], device=device)
    rows = [model.encode(m, zeros[:len(part)], (frames < part[:, None]).to(device)) for part in length.split(size)]
    return torch.cat(rows)[clip.to(device)]


@torch.no_grad()
def predict(model, split: dict, conditions, name: str, mask_seed: int = 0, size: int = 256):
    """For each condition (a set like "la", or a rate of dropped frames): outputs (N, ...) and the realised rates.

    A method with `encode` and `classify` treats its streams one by one: each is then encoded once present and
    once absent, and the sets are put together from these.
    """
    model.eval()
    separate, known = hasattr(model, "encode"), inspect.signature(model.forward).parameters
    if separate:
        whole = {m: encode(model, m, split, split["real"][m], size) for m in data.STREAMS}
        absent = {m: encode_absent(model, m, split, size) for m in data.STREAMS}
    for condition in conditions:
        present = data.evaluation_masks(split["real"], condition, name, mask_seed)
        if separate:
            parts = [whole[m] if torch.equal(present[m], split["real"][m]) else absent[m] if not present[m].any()
                     else encode(model, m, split, present[m], size) for m in data.STREAMS]
            output = model.classify(torch.cat(parts, dim=-1))
        else:
            outputs, order = [], sum(split["real"][m].sum(1) for m in data.STREAMS).argsort(stable=True)
            for index in order.split(size):
                streams, real = data.batch(split, index)
                real = {m: r.to(streams[m].device) for m, r in real.items()}
                for m in data.STREAMS:
                    streams[m] = streams[m] * present[m][index, :streams[m].shape[1]].to(streams[m].device)[..., None]
                outputs.append(model(**{m: x for m, x in streams.items() if m in known}, real=real))
            output = torch.cat(outputs)[order.argsort().to(outputs[0].device)]
        yield condition, output, data.realised(present, split["real"])


def evaluate(model, task: str, split: dict, conditions, name: str, mask_seed: int = 0, size: int = 256) -> dict:
    """condition -> {"n": clips that count, "realised": dropped shares, metric: value}."""
    index, truth = targets(split["label"], task)
    truth, result = truth.cpu().numpy(), {}
    for condition, output, rates in predict(model, split, conditions, name, mask_seed, size):
        measured = metrics(task, answers(output[index], task), truth)
        result[str(condition)] = {"n": len(truth), "realised": rates, **measured}
    return result


def averages(result: dict) -> dict:
    """Adds "avg": each metric's mean over the six incomplete sets."""
    names = [k for k in result["l"] if k not in ("n", "realised")]
    return {**result, "avg": {k: statistics.fmean(result[c][k] for c in COLUMNS[:6]) for k in names}}


def score(result: dict) -> float:
    """What selects a checkpoint, the more the better: the mean over the conditions of -MAE for a regression, else of
    F1 (over the emotions too)."""
    if "MAE" in next(iter(result.values())):
        return -statistics.fmean(c["MAE"] for c in result.values())
    return statistics.fmean(v for c in result.values() for k, v in c.items() if k in MAIN)


# ---------------------------------------------------------------------------------- runs

def write(path: Path, content: str | bytes) -> None:
    """Write beside and rename: a reader never sees half a file."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}. Mend that, then run the command again.") from None
    finally:
        try:
            beside.unlink(missing_ok=True)
        except OSError:
            pass


def read_tensors(path: Path, device):
    """torch.load of tensors and plain values only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")     # torch 2.1 warns of its own reader
        return torch.load(path, map_location=device, weights_only=True)


def read_checkpoint(path: Path, device="cpu") -> dict:
    """A checkpoint of train.py, or a DataError that says what is wrong with it."""
    try:
        content = read_tensors(path, device)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: {path.parent} is no run folder, or not far enough trained.") from None
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"{path} is damaged or no checkpoint of train.py ({type(error).__name__}). "
                        "Train again with --no-resume.") from None
    kinds = {"method": str, "dataset": str, "task": str, "dims": dict, "config": dict, "data": dict, "model": dict}
    if (not isinstance(content, dict) or not all(isinstance(content.get(k), kind) for k, kind in kinds.items())
            or not {"limit", "normalize", "synthetic", "seed", "ablation", "constant"} <= content.keys()
            or content["method"] not in METHODS or content["dataset"] not in data.SIZES):
        raise DataError(f"{path} is no checkpoint of train.py: it does not name a method, its data and its settings.")
    return content


def build(checkpoint: dict, path: Path, device) -> torch.nn.Module:
    """The model of a checkpoint, ready to answer."""
    module, Model = METHODS[checkpoint["method"]]
    try:
        model = Model(checkpoint["dims"], checkpoint["task"], module.Config(**checkpoint["config"])).to(device)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"{path} does not fit {module.__name__}.py, so it is of another version: "
                        f"{str(error).splitlines()[0]} Train again.") from None
    return model.eval()


def device_named(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise DataError(f"--device {name}: this machine or this torch has no such device. Use cpu or auto.") from None
    return device


def conditions(args) -> list:
    """The sets of streams and rates of dropped frames that are asked for."""
    return list(data.SETS) * (args.protocol != "rates") + args.rates * (args.protocol != "combos")


def measure(model, run: dict, loaded: dict, args) -> dict:
    """The results of one model: what the run was, on which data, and the metrics of every condition."""
    split, task = loaded[args.split], run["task"]
    measured = evaluate(model, task, split, conditions(args), args.split, args.mask_seed, args.batch_size)
    truth = targets(split["label"], task)[1].cpu().numpy()
    kept = ("method", "dataset", "task", "ablation", "synthetic", "seed", "epoch", "limit", "normalize", "config",
            "dims", "checkpoint_sha256")
    return {**{k: run[k] for k in kept}, "split": args.split, "mask_seed": args.mask_seed, "data": loaded["source"],
            "trained_on": run["data"],
            "constant": metrics(task, np.broadcast_to(np.array(run["constant"]), truth.shape), truth),
            "conditions": measured}


def open_run(folder: Path, args, device, cache: dict) -> tuple[dict, torch.nn.Module, dict]:
    """A run's checkpoint, its model, and the asked split as the run wants it."""
    path = folder / "best.pt"
    run = read_checkpoint(path, device)
    model, source = build(run, path, device), run["data"]
    if "stats" not in run:
        raise DataError(f"{path} is a checkpoint to go on training from: best.pt is the one to evaluate.")
    where = args.data_dir or source["file"]
    features = args.features or (None if args.data_dir else source.get("features"))
    labels = args.labels or source.get("labels")
    key = (run["dataset"], run["synthetic"], str(where), run["limit"], run["normalize"], source["sha256"],
           str(features), str(labels))
    if key not in cache:
        cache.clear()       # runs come sorted, and one split may fill the memory
        stats = run["stats"] and {m: tuple(t.cpu() for t in pair) for m, pair in run["stats"].items()}
        cache[key] = data.load(run["dataset"], where, (args.split,), device, run["normalize"], stats, run["synthetic"],
                               run["limit"], features, labels, source.get("max_frames", data.MAX_FRAMES))
    loaded = cache[key]
    if loaded["dims"] != run["dims"]:
        raise DataError(f"{loaded['source']['file']} has widths {loaded['dims']}, {path} was trained on {run['dims']}.")
    if run["config"].get("aligned") and not loaded["aligned"]:
        raise DataError(f"{loaded['source']['file']} holds unaligned streams, {path} was trained on aligned ones.")
    return run, model, loaded


def evaluate_run(folder: Path, args, device, cache: dict) -> dict:
    """Measure one run on the asked split, write its results.json, and return what that says."""
    run, model, loaded = open_run(folder, args, device, cache)
    run["checkpoint_sha256"] = data.sha256(folder / "best.pt")
    result, log = measure(model, run, loaded, args), folder / "log.jsonl"
    if log.exists():        # best.pt is of the last stage
        try:
            stages = [json.loads(line)["stage"] for line in log.read_text().splitlines()]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{log} is damaged. The same train.py command writes it again.") from None
        result["epochs_run"] = stages.count(stages[-1]) if stages else 0
    write(folder / "results.json", json.dumps(result, indent=1))
    return stored(folder, args)


def stored(folder: Path, args) -> dict:
    """A run's results.json, if it answers what is asked."""
    path = folder / "results.json"
    try:
        result = json.loads(path.read_text())
        asked = {"split": args.split, "mask_seed": args.mask_seed}
        module = METHODS[result["method"]][0]
        module.PAPER[result["dataset"]], module.Config(**result["config"])      # of this version
        [result[k] for k in ("ablation", "synthetic", "limit", "normalize", "seed", "dims", "constant")]
        result["data"]["sha256"], result["data"]["notes"], result["trained_on"]["sha256"], UNITS[result["task"]]
        wrong = [f"{k} {result[k]}, not {v}" for k, v in asked.items() if result[k] != v]
        wrong += [f"no condition {c}" for c in conditions(args) if str(c) not in result["conditions"]][:1]
        if (folder / "best.pt").exists() and data.sha256(folder / "best.pt") != result["checkpoint_sha256"]:
            wrong.append("another checkpoint than the best.pt beside it")
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} does not exist, is damaged or of another version. Leave --stored out to evaluate the "
                        "run.") from None
    if wrong:
        raise DataError(f"{path} has {', '.join(wrong)}. Leave --stored out to evaluate the run again.")
    return result


def evaluate_official(args, device) -> dict:
    """Double-Flow's published checkpoint on its authors' features: MIA off, as in the official main file."""
    loaded = data.load("mosei", splits=(args.split,), device=device, normalize=False, features=args.features,
                       labels=args.labels)
    config = double_flow.Config(mia="off")
    model = double_flow.DoubleFlow(loaded["dims"], "regression", config).to(device)
    try:
        model.load_official(read_tensors(args.official, device))
        digest = hashlib.sha256(args.official.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise DataError(f"--official {args.official} does not exist.") from None
    except ValueError as error:
        raise DataError(f"--official {args.official}: {error}.") from None
    except Exception as error:  # a damaged file can raise anything
        raise DataError(f"--official {args.official} is damaged or no checkpoint ({type(error).__name__}).") from None
    train_label = data.read_labels(args.labels)["train"][1]
    run = {"method": "double_flow", "dataset": "mosei", "task": "regression", "ablation": "", "synthetic": False,
           "seed": f"of the published checkpoint {args.official.name}", "epoch": None, "limit": None,
           "normalize": False, "config": asdict(config), "dims": loaded["dims"], "checkpoint_sha256": digest,
           "data": loaded["source"], "constant": constant(train_label, "regression")}
    return measure(model.eval(), run, loaded, args)


# ---------------------------------------------------------------------------------- tables

def summary(values: list[float]) -> dict:
    """Mean, sample standard deviation (None for one run) and n."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None     # nan where a Corr is not defined
    return {"mean": statistics.fmean(values), "std": std, "n": len(values)}


def reported(runs: list[dict]) -> dict:
    """The paper's own numbers for what these runs are: metric -> column -> number."""
    return METHODS[runs[0]["method"]][0].REPORTED[runs[0]["dataset"]].get(runs[0]["ablation"], {})


def table_of_sets(runs: list[dict]) -> dict:
    """metric -> row ("ours", "paper", "difference", "constant") -> column -> number, or a summary for ours."""
    tables = {}
    for metric, constant in runs[0]["constant"].items():
        ours = {c: summary([averages(r["conditions"])[c][metric] for r in runs]) for c in COLUMNS}
        paper = {c: reported(runs).get(metric, {}).get(c) for c in COLUMNS}
        compared = [c for c in COLUMNS if paper[c] is not None and not runs[0]["synthetic"]]
        difference = {c: ours[c]["mean"] - paper[c] if c in compared else None for c in COLUMNS}
        tables[metric] = {"ours": ours, "paper": paper, "difference": difference,
                          "constant": dict.fromkeys(COLUMNS, constant)}
    return tables


def table_of_rates(runs: list[dict], rates: list[float]) -> dict:
    """metric -> row ("ours", "paper", "constant", "realised") -> rate or "area" -> number or summary."""
    gone = {str(p): runs[0]["conditions"][str(p)]["realised"].values() for p in rates}
    real = {p: statistics.fmean([s for s in shares if s is not None] or [float("nan")]) for p, shares in gone.items()}
    tables = {}
    for metric, constant in ((k, v) for k, v in runs[0]["constant"].items() if k in MAIN):
        curves = [[r["conditions"][str(p)][metric] for p in rates] for r in runs]
        ours = {str(p): summary([c[i] for c in curves]) for i, p in enumerate(rates)}
        if len(rates) > 1:      # mean height over the measured span
            ours["area"] = summary([auc(rates, c) / (rates[-1] - rates[0]) for c in curves])
        whole = reported(runs).get(metric, {}).get("lav")
        tables[metric] = {"ours": ours, "paper": {str(p): None if p else whole for p in rates},
                          "constant": dict.fromkeys(ours, constant), "realised": real}
    return tables


def paired(runs: list[dict], reference: list[dict], metric: str) -> float | None:
    """p of the paired t-test, over the seeds that both have, that the Avg. is the same; None where nothing can be told:
    fewer than two such seeds, or differences that are all the same."""
    a, b = ({r["seed"]: averages(r["conditions"])["avg"][metric] for r in rs} for rs in (runs, reference))
    pairs = [(a[s], b[s]) for s in a if s in b]
    if len(pairs) < 2 or np.ptp([x - y for x, y in pairs]) == 0:
        return None
    return float(ttest_rel(*zip(*pairs)).pvalue)


def names(groups: list) -> list[str]:
    """What each group of runs is called: method and ablation, and what else tells two of that name apart."""
    def settings(r):
        return {**r["config"], "normalize": r["normalize"]}
    called = [" ".join(filter(None, (runs[0]["method"], runs[0]["ablation"]))) for runs, *_ in groups]
    result = []
    for name, (runs, *_) in zip(called, groups):
        same = [settings(rs[0]) for other, (rs, *_) in zip(called, groups) if other == name]
        differ = [f"{k} {v}" for k, v in settings(runs[0]).items() if any(s.get(k) != v for s in same)]
        result.append(name + f" [{', '.join(differ)}]" * bool(differ))
    return result


def compare(groups: list, reference: str | None = None) -> tuple[dict, dict]:
    """The tables of groups (runs, sets, rates) on the same data joined into one of sets and one of rates, metric -> row
    -> column: for each group a row of its name, "... paper" and "... difference", then "constant" and "realised".
    The Avg. of a group gets "p" against the reference, one of `names`, or else the full method of the same file."""
    called, joined = names(groups), ({}, {})
    if reference and reference not in called:
        raise DataError(f"--reference {reference}: the runs are of {', '.join(called)}.")
    for metric in dict.fromkeys(k for group in groups for k in {**group[1], **group[2]}):
        for which, table in enumerate(joined, 1):
            have = {name: group for name, group in zip(called, groups) if metric in group[which]}
            rows, constants = {}, {}
            for name, group in have.items():
                ours, runs = {c: dict(v) for c, v in group[which][metric]["ours"].items()}, group[0]
                against = reference or runs[0]["method"]
                if "avg" in ours and against in have and against != name:
                    ours["avg"].update(p=paired(runs, have[against][0], metric), reference=against)
                rows[name] = ours
                for row in ("paper", "difference"):
                    if any(v is not None for v in group[which][metric].get(row, {}).values()):
                        rows[f"{name} {row}"] = group[which][metric][row]
                constants.setdefault(json.dumps(group[which][metric]["constant"]), []).append(runs[0]["method"])
            for cells, of in constants.items():
                rows["constant" + f" of {', '.join(dict.fromkeys(of))}" * (len(constants) > 1)] = json.loads(cells)
            if have:
                table[metric] = rows
                if which == 2:
                    rows["realised"] = next(iter(have.values()))[2][metric]["realised"]
    return joined


def cell(value, digits: int, signed: bool = False) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        spread = "" if value["std"] is None else f"±{value['std']:.{digits}f}"
        return f"{value['mean']:.{digits}f}{spread}" + "*" * (value.get("p") is not None and value["p"] < .05)
    return f"{value:{'+' if signed else ''}.{digits}f}"


def show(table: dict, titles: dict, form: str) -> str:
    """One table: metric -> row -> column -> number or summary; n stands beside the rows of summaries."""
    some = next(iter(next(iter(table.values())).values()))
    lines = [["", *(titles.get(c, c) for c in some)]]
    for metric, rows in table.items():
        for name, row in rows.items():
            if not any(v is not None for v in row.values()) or name == "realised" and metric != list(table)[-1]:
                continue        # nothing known; the realised rate, which all metrics share, once at the end
            first, digits = next(iter(row.values())), 4 if metric in ("MAE", "Corr") else 2
            title = f"{metric} {name}" + (f" (n={first['n']})" if isinstance(first, dict) else "")
            if name == "realised":
                title, digits = "realised rate", 3
            lines.append([title, *(cell(row.get(c), digits, name.endswith("difference")) for c in some)])
    if form == "markdown":
        lines.insert(1, ["---"] * len(lines[0]))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
                     for line in lines)


def simulation(method: str, streams) -> str:
    """What stands in for missing text, which every table of Double-Flow says."""
    if method != "double_flow":
        return ""
    return "simulated text: " + ("from the data" if data.SIMULATED in streams else "learned from audio")


def heading(runs: list[dict], args) -> list[str]:
    """What a table is: whose numbers, on which data, and every reason not to compare them with the paper's."""
    r, module = runs[0], METHODS[runs[0]["method"]][0]
    usual = asdict(replace(module.PAPER[r["dataset"]], **module.ABLATIONS.get(r["ablation"], {})))
    changed = [f"{k} {v}" for k, v in r["config"].items() if v != usual[k] and k != "aligned"]
    changed += ["not normalised"] * (not r["normalize"] and "features" not in r["data"])
    said = [" ".join(filter(None, (r["method"], r["ablation"], "on", r["dataset"])))
            + f", {args.split} split, seeds {' '.join(str(x['seed']) for x in runs)}, mask seed {args.mask_seed}",
            f"data: {r['data']['file']}" + (f", SHA-256 {r['data']['sha256'][:12]}" if r["data"]["sha256"] else "")]
    said += [f"note: {n}" for n in r["data"]["notes"] + ["unaligned streams"] * (not r["config"].get("aligned", True))]
    if told := simulation(r["method"], r["dims"]):
        said.append(told)
    if changed:
        said.append(f"note: other settings than the defaults: {', '.join(changed)}")
    if r["synthetic"]:
        said.append("SYNTHETIC data: the paper's row is on real data and no comparison")
    if r["limit"]:
        said.append(f"note: only the first {r['limit']} clips of each split")
    said += [f"note: seed {x['seed']} was stopped after {x['epochs_run']} of {x['config']['epochs']} epochs"
             for x in runs if x.get("epochs_run", x["config"]["epochs"]) < x["config"]["epochs"]]
    if any(x["trained_on"]["sha256"] != x["data"]["sha256"] for x in runs):
        said.append("WARNING: this is not the file that the runs were trained on")
    return said


def headings(groups: list, args) -> str:
    """The headings of several groups on the same data, each line once; a line that is not true of all says of whom."""
    said = dict(zip(names(groups), (heading(runs, args) for runs, *_ in groups)))
    lines = [first for first, *_ in said.values()]
    for line in dict.fromkeys(line for _, *rest in said.values() for line in rest):
        of = [name for name, told in said.items() if line in told]
        lines.append(line + f" ({', '.join(of)})" * (len(of) < len(groups)))
    return "\n".join(lines)


def parts(module, sets: dict, rates: dict) -> list[tuple[str, dict, dict]]:
    """The tables to print: title, table, titles of its columns. A method whose paper has another table than the
    seven sets names that one's columns, and the rest is an extension."""
    own, extra = getattr(module, "TABLE", None), ""
    printed = []
    if own and sets:
        printed.append(("The paper's table", {metric: {row: {c: cells[c] for c in own} for row, cells in rows.items()}
                                              for metric, rows in sets.items()}, own))
        sets, extra = {k: v for k, v in sets.items() if k in MAIN}, ", an extension: not in the paper"
    printed += [("Available streams" + extra, sets, TITLES),
                ("Share of frames dropped in every stream" + extra, rates, {})]
    return [part for part in printed if part[1]]


def pyplot():
    """matplotlib, drawing to files, at a size that can be read at a column's width."""
    try:
        import matplotlib
    except ImportError:
        raise DataError("--plot needs matplotlib: pip install matplotlib. All else works without it.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 8, "savefig.dpi": 200, "lines.linewidth": 1.2, "lines.markersize": 4,
                            "axes.prop_cycle": pyplot.cycler(color=COLOURS), "figure.constrained_layout.use": True})
    return pyplot


def save_figure(figure, path: Path) -> None:
    lines = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=max(2, len(figure.axes)), fontsize=7)
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=path.suffix[1:] or "png")
    except ValueError as error:
        raise DataError(f"--plot {path}: {error}.") from None
    write(path, picture.getvalue())


def plot_curves(tables: list, path: Path) -> None:
    """Each metric against the share of dropped frames, a row of panels for each data set: a line a group, the band one
    standard deviation; a star is the paper's number where nothing is dropped. tables: (groups, joined rates)."""
    plt, most = pyplot(), max(len(table) for _, table in tables)
    figure, axes = plt.subplots(len(tables), most, figsize=(3.4 * most, 3 * len(tables) + .4), squeeze=False)
    for row, (groups, table) in zip(axes, tables):
        r = groups[0][0][0]
        for axis in row[len(table):]:
            axis.set_visible(False)
        for axis, (metric, rows) in zip(row, table.items()):
            for i, name in ((i, n) for i, n in enumerate(names(groups)) if n in rows):
                ours = [(float(p), v) for p, v in rows[name].items() if p != "area"]
                rates, values = zip(*ours)
                mean, std = np.array([v["mean"] for v in values]), np.array([v["std"] or 0 for v in values])
                colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
                axis.plot(rates, mean, "-" if i < len(COLOURS) else "--", color=colour, marker=marker,
                          label=f"{name} (n={values[0]['n']})")
                axis.fill_between(rates, mean - std, mean + std, alpha=.15, linewidth=0, color=colour)
                known = rows.get(f"{name} paper", {}).get("0.0")
                if known is not None and not r["synthetic"]:
                    axis.plot(0, known, "*", color=colour, markersize=9, clip_on=False,
                              label=f"{name}, paper")
            axis.set(xlabel="share of frames dropped, p", title=r["dataset"] + ", SYNTHETIC" * r["synthetic"],
                     ylabel=metric if metric == "MAE" else f"weighted {metric} (%)")
    save_figure(figure, path)


def joint(model, split: dict, task: str, condition, args) -> tuple[np.ndarray, np.ndarray]:
    """Joint representations (n, width), which is what the head gets, of at most 100 clips a class, and their classes
    (n,): one emotion alone, or negative and positive."""
    if hasattr(model, "head"):
        model.head = torch.nn.Identity()
    else:
        model.network.classifier = torch.nn.Identity()
    (_, h, _), = predict(model, split, [condition], args.split, args.mask_seed, args.batch_size)
    label = split["label"].cpu().numpy()
    kind = (np.where(label.sum(1) == 1, label.argmax(1), -1) if task == "emotions"
            else np.where(label == 0, -1, label > 0))
    draw = np.random.default_rng(args.mask_seed).permutation(len(kind))
    chosen = np.concatenate([draw[kind[draw] == k][:100] for k in np.unique(kind[kind >= 0])])
    return h.flatten(1).cpu().numpy()[chosen], kind[chosen]


def plot_tsne(groups: list, folders: dict, args, device, cache: dict) -> None:
    """t-SNE of the joint representations of each group's first seed, half of the frames dropped and text alone."""
    from sklearn.manifold import TSNE
    plt, shown = pyplot(), {0.5: "p = 0.5", "l": "text alone"}
    figure, axes = plt.subplots(len(groups), len(shown), figsize=(3.4 * len(shown), 2.8 * len(groups) + .3),
                                squeeze=False)
    for row, name, (runs, *_) in zip(axes, names(groups), groups):
        run, model, loaded = open_run(folders[id(runs)], args, device, cache)
        kinds = data.EMOTIONS if run["task"] == "emotions" else ("negative", "positive")
        for axis, (condition, title) in zip(row, shown.items()):
            h, kind = joint(model, loaded[args.split], run["task"], condition, args)
            place = TSNE(perplexity=min(30, (len(h) - 1) / 3), random_state=args.mask_seed).fit_transform(h)
            for k in np.unique(kind):
                axis.scatter(*place[kind == k].T, s=8, marker=MARKERS[k], label=kinds[k])
            axis.set(title=f"{name}, {run['dataset']}{', SYNTHETIC' * run['synthetic']}: {title}", xlabel="t-SNE 1",
                     ylabel="t-SNE 2", xticks=[], yticks=[])
    save_figure(figure, args.plot)


def write_csv(report: list, path: Path) -> None:
    """One line a number: data set and file, metric, row, column, mean, std, n, and p against the reference."""
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow(("dataset", "synthetic", "data", "table", "metric", "row", "column", "value", "std", "n", "p"))
    for groups, *tables in report:
        r = groups[0][0][0]
        for name, table in zip(("sets", "rates"), tables):
            for metric, row, column, v in ((m, row, c, v) for m, rows in table.items() for row, cells in rows.items()
                                           for c, v in cells.items()):
                value = [v.get(k) for k in ("mean", "std", "n", "p")] if isinstance(v, dict) else (v, None, None, None)
                out.writerow((r["dataset"], r["synthetic"], r["data"]["sha256"], name, metric, row, column, *value))
    write(path, text.getvalue())


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python eval.py RUN [RUN ...] [options]; -h explains them")
    add = parser.add_argument
    add("runs", nargs="*", type=Path, help="run folders of train.py")
    add("--protocol", choices=("combos", "rates", "both"), default="both",
        help="available sets of streams, dropped frames, or both (default)")
    add("--rates", nargs="+", type=float, default=list(data.RATES), help="shares of frames to drop (0.0 ... 1.0)")
    add("--mask-seed", type=int, default=0, help="seed of the fixed evaluation masks (default 0)")
    add("--split", choices=data.SPLITS, default="test", help="default test")
    add("--data-dir", help="data file or folder (default: the file that the run was trained on)")
    add("--features", nargs="+", type=data.folder, metavar="NAME=DIR",
        help="feature folders, as for train.py (default: those that the run was trained on)")
    add("--labels", type=Path, metavar="FILE", help="their label file")
    add("--official", type=Path, metavar="FILE",
        help="evaluate Double-Flow's published checkpoint on --features and --labels instead of runs")
    add("--batch-size", type=int, default=256, help="clips at a time; changes no prediction (default 256)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--format", choices=("text", "markdown"), default="text", help="of the printed tables (default text)")
    add("--json", type=Path, metavar="F", help="write all tables to F")
    add("--csv", type=Path, metavar="F", help="write all tables to F, one number a line")
    add("--stored", action="store_true", help="take each run's results.json as it is, evaluate nothing")
    add("--reference", metavar="NAME", help="with several methods or ablations: a star where the Avg. differs from "
        'this row\'s, for instance corrkd or "corrkd no_scd" (paired t-test over the seeds, p < 0.05; default: from '
        "that of the method's full form)")
    add("--plot", type=Path, metavar="F.png", help="draw a figure (needs matplotlib)")
    add("--figure", choices=("curves", "tsne"), default="curves", help="of --plot: F1 (and MAE) against the share of "
        "dropped frames (default), or t-SNE of the joint representations of each first seed, 100 clips a class")
    args = parser.parse_args(argv)
    if not all(0 <= p <= 1 for p in args.rates) or args.batch_size < 1:
        parser.error("--rates are shares from 0 to 1, and --batch-size is at least 1")
    if bool(args.runs) == bool(args.official):
        parser.error("name run folders, or --official FILE")
    if args.official and not (args.features and args.labels):
        parser.error("--official needs --features and --labels")
    args.features = args.features and dict(args.features)
    if args.plot and args.figure == "curves" and args.protocol == "combos":
        parser.error("--plot draws the frame-dropping curve: leave --protocol combos out, or add --figure tsne")
    if args.official and (args.stored or args.figure == "tsne"):
        parser.error("--official goes without --stored and --figure tsne")
    args.rates = sorted(set(args.rates))
    return args


def collect(args, device, cache: dict) -> list[tuple[Path | None, dict]]:
    """The asked runs and their results; a folder that has no checkpoint yet is named and left out, unless all are."""
    found, folders = [], sorted(set(args.runs))
    for folder in folders:
        if not args.stored and not (folder / "best.pt").exists() and len(folders) > 1:
            print(f"left out: {folder} has no best.pt, so it is no run or not far enough trained", file=sys.stderr)
            continue
        found.append((folder, stored(folder, args) if args.stored else evaluate_run(folder, args, device, cache)))
    if folders and not found:
        raise DataError("None of these folders is a run that has been trained.")
    return found or [(None, evaluate_official(args, device))]


def main(argv=None) -> int:
    args = parse(argv)
    try:
        device, cache, grouped, folders, tables, report = device_named(args.device), {}, {}, {}, {}, []
        for folder, result in collect(args, device, cache):
            same = ("dataset", "synthetic", "limit", "normalize", "method", "ablation", "config")
            runs = grouped.setdefault(json.dumps([result["data"]["sha256"], *(result[k] for k in same)]), [])
            if any(r["seed"] == result["seed"] for r in runs):
                raise DataError(f"{folder} is a second run of the same configuration and seed: name only one of them.")
            runs.append(result)
            folders.setdefault(id(runs), folder)
        order = list(METHODS)
        for runs in sorted(grouped.values(), key=lambda runs: (order.index(runs[0]["method"]), runs[0]["ablation"])):
            group = (runs, table_of_sets(runs) if args.protocol != "rates" else {},
                     table_of_rates(runs, args.rates) if args.protocol != "combos" else {})
            tables.setdefault(json.dumps([runs[0][k] for k in ("dataset", "synthetic", "limit")]
                                         + [runs[0]["data"]["sha256"]]), []).append(group)
        for groups in tables.values():
            sets, rates = compare(groups, args.reference)
            print(headings(groups, args), end="\n\n")
            tasks, methods = ({runs[0][k] for runs, *_ in groups} for k in ("task", "method"))
            units = UNITS["regression" if len(tasks) > 1 else tasks.pop()]
            few = sets if len(groups) == 1 else {k: v for k, v in sets.items() if k in MAIN}
            for title, table, titles in parts(METHODS[methods.pop()][0] if len(methods) == 1 else None, few, rates):
                gap = "\n" if args.format == "text" else "\n\n"
                print(f"{title} ({units})", show(table, titles, args.format), sep=gap, end="\n\n")
            averaged = [cells["avg"] for rows in few.values() for cells in rows.values() if "avg" in cells]
            if any(isinstance(v, dict) and v.get("p") is not None for v in averaged):
                against = args.reference or "the full method's"
                print(f"* differs from {against} Avg. (paired t-test over the seeds, p < 0.05)\n")
            report.append((groups, sets, rates))
        if args.json:
            write(args.json, json.dumps([{"runs": [r for runs, *_ in groups for r in runs], "sets": s, "rates": t}
                                         for groups, s, t in report], indent=1))
        if args.csv:
            write_csv(report, args.csv)
        if args.plot and args.figure == "tsne":
            plot_tsne([group for groups, *_ in report for group in groups], folders, args, device, cache)
        elif args.plot:
            plot_curves([(groups, rates) for groups, _, rates in report], args.plot)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was evaluated is in each run's results.json", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
