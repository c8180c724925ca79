"""The answers behind the README's results: collect them from trained runs, and print the README's tables from them.

    python tests/answers.py official=RUNS clips400=RUNS     write tests/golden/answers.npz; RUNS is train.py's --out
    python tests/answers.py                                 print the tables, from answers.npz alone
"""
import json
import platform
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import train

FILE = Path(__file__).resolve().parent / "golden/answers.npz"
FILES = {"official": "MOSI official", "clips400": "400 MOSI clips"}
NAMES = {"corrkd": "CorrKD", "umdf": "UMDF", "double_flow": "Double-Flow"}
COLUMNS = {"avg": "", "lav": ", complete", "av": ", text missing"}
SCORES = [("corrkd", "avg"), ("umdf", "avg"), ("umdf", "lav"), ("double_flow", "lav"), ("double_flow", "av")]
DIFFERENCES = [         # ours, what is subtracted, column; {name} is its folder's: corrkd-kl
    ("corrkd", "linear", "avg"), ("corrkd-teacher", "corrkd", "avg"), ("corrkd-no_distillation", "corrkd", "avg"),
    ("corrkd-no_scd", "corrkd", "avg"), ("corrkd-no_cpd", "corrkd", "avg"), ("corrkd-no_rcd", "corrkd", "avg"),
    ("corrkd-kl", "corrkd", "avg"), ("umdf", "linear", "avg"), ("umdf-no_distillation", "umdf", "avg"),
    ("umdf-complete_to_missing", "umdf", "avg"), ("double_flow", "linear", "lav"), ("double_flow", "linear", "av"),
    ("double_flow-task_only", "double_flow", "lav"), ("double_flow-task_only", "double_flow", "av")]


def collect(folders: dict) -> None:
    """file/form/seed -> answers (sets, clips): classes as bits, sentiments as float16; linear has seed 0."""
    arrays, about = {}, {"commit": train.commit(), "torch": torch.__version__,
                         "processor": platform.processor() or platform.machine()}
    for file, folder in folders.items():
        loaded = None
        for path in sorted(Path(folder).rglob("model.pt")):
            saved = torch.load(path, weights_only=True)
            run, form = saved["run"], path.parent.parent.name
            if loaded is None:
                loaded = data.load("mosi", saved["load"]["data_dir"], ("test",), stats=saved["stats"])
                split, sets = loaded["test"], data.answerable(data.SETS, loaded["lacking"])
                arrays[f"{file}/labels"] = split["label"].numpy()
                arrays[f"{file}/units"] = evaluation.units(split["id"], len(split["label"])).astype(np.int16)
                about[file] = {"sets": sets, "sha256": loaded["source"]["sha256"]}
            about[file][run["task"]] = run["constant"]
            models = {f"{form}/{run['seed']}": evaluation.build(run, saved["model"], path, "cpu")}
            if f"{file}/linear-{run['task']}/0" not in arrays:
                models[f"linear-{run['task']}/0"] = evaluation.Linear(run["task"], **saved["linear"])
            for name, model in models.items():
                outputs = evaluation.predict(model, split, sets, "test")
                answers = np.stack([evaluation.answers(run["task"], outputs[c]).numpy() for c in sets])
                if run["task"] == "polarity":
                    answers = np.packbits(answers.astype(bool), 1)
                arrays[f"{file}/{name}"] = answers if answers.dtype == np.uint8 else answers.astype(np.float16)
    np.savez_compressed(FILE, about=json.dumps(about), **arrays)


def read() -> tuple[dict, dict]:
    """What answers.npz says of itself, and file -> form -> [a run as evaluate_run hands it to the tables]."""
    with np.load(FILE, allow_pickle=False) as arrays:
        about, runs = json.loads(str(arrays["about"])), {}
        for key in sorted(arrays.files):
            if key.count("/") == 2:
                file, form, seed = key.split("/")
                runs.setdefault(file, {}).setdefault(form, []).append(as_result(arrays, about, file, key, int(seed)))
    return about, runs


def as_result(arrays, about: dict, file: str, key: str, seed: int) -> dict:
    labels, answers, sets = arrays[f"{file}/labels"], arrays[key], about[file]["sets"]
    task = "polarity" if answers.dtype == np.uint8 else "regression"
    if task == "polarity":
        answers = np.unpackbits(answers, axis=1)[:, :len(labels)].astype(int)
    index, truth = (part.numpy() for part in evaluation.targets(torch.from_numpy(labels), task))
    by_set = {c: answer[index].astype(truth.dtype) for c, answer in zip(sets, answers)}
    always = np.full(truth.shape, about[file][task])
    return {"run": {"seed": seed, "task": task},
            "conditions": {c: evaluation.metrics(task, answer, truth) for c, answer in by_set.items()},
            "constant": {c: evaluation.metrics(task, always, truth) for c in sets},
            "clips": {"truth": truth, "index": index, "units": arrays[f"{file}/units"], "conditions": by_set}}


def row(file_runs: dict, ours: str, subtracted: str = "") -> evaluation.Row | None:
    """The row of a form, or of its difference; None where nobody ran it."""
    if ours not in file_runs:
        return None
    mine = file_runs[ours]
    metric = "F1" if mine[0]["run"]["task"] == "polarity" else "MAE"
    if not subtracted:
        return evaluation.row_of(metric, "ours", ours, "", evaluation.levels(mine, "conditions", metric, []))
    if subtracted not in ("linear", *file_runs):
        return None
    if subtracted == "linear":          # which has no seed: the same for each
        linear, = file_runs[f"linear-{mine[0]['run']['task']}"]
        theirs = [{**linear, "run": result["run"]} for result in mine]
    else:
        theirs = file_runs[subtracted]
    weights = evaluation.draw_weights(mine[0]["clips"]["units"])
    return evaluation.paired(metric, ours, subtracted, mine, theirs, "conditions", [], weights)


def text(row: evaluation.Row | None, column: str) -> str:
    """A cell of the README: mean and deviation; of a difference its interval, bold where it leaves out 0; the number of
    seeds where it is not five."""
    if row is None:
        return "not run"
    mean, deviation = evaluation.cell(row, column)
    if mean == "-":
        return mean
    seeds = "" if row.n == 5 else f" ({row.n})"
    if not row.against:
        return mean + deviation + seeds
    digits = 2 if row.metric == "F1" else 3
    cell = f"{mean.removesuffix('*')} [{row.low[column]:+.{digits}f},{row.high[column]:+.{digits}f}]{seeds}"
    return f"**{cell}**" if mean.endswith("*") else cell


def tables() -> str:
    """The two tables of the README's results."""
    _, runs = read()
    files = [runs.get(file, {}) for file in FILES]
    heads = [f"{name}: ours|constant|linear" for name in FILES.values()]
    lines = [f"score|{'|'.join(heads)}|the paper, MOSI", "|".join(["---"] * 8)]
    for form, column in SCORES:
        metric = "F1" if form == "corrkd" else "MAE"
        cells = [f"{NAMES[form]}{COLUMNS[column]}, {metric}"]
        for file_runs in files:
            task = "polarity" if metric == "F1" else "regression"
            linear = file_runs.get(f"linear-{task}")
            baselines = ["not run"] * 2
            if linear:
                baselines = []
                for part in ("constant", "conditions"):
                    number = evaluation.levels(linear, part, metric, [])[0].get(column)
                    baselines.append("-" if number is None else f"{number:.{2 if metric == 'F1' else 4}f}")
            cells += [text(row(file_runs, form), column), *baselines]
        paper = evaluation.METHODS[form].REPORTED["mosi"][""].get(metric, {}).get(column, "-")
        lines.append("|".join([*cells, str(paper)]))
    lines += ["", f"difference|{'|'.join(FILES.values())}|the paper, MOSI", "|".join(["---"] * 4)]
    printed = {name: cells["F1"]["avg"] for name, cells in evaluation.METHODS["corrkd"].REPORTED["mosi"].items()}
    for ours, subtracted, column in DIFFERENCES:
        method, _, ablation = ours.partition("-")
        name = f"{ablation or NAMES[method]} - {NAMES.get(subtracted, subtracted)}{COLUMNS[column]}"
        paper = "-"
        if method == "corrkd" and ablation in list(printed)[1:]:
            paper = f"{printed[ablation] - printed['']:+.2f}"
        cells = [text(row(file_runs, ours, subtracted), column) for file_runs in files]
        lines.append("|".join([name, *cells, paper]))
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        collect(dict(argument.split("=", 1) for argument in sys.argv[1:]))
    print(tables())
