"""eval.py: metrics by hand, masks, predictions, the linear baseline, checkpoints from elsewhere, tables, outputs."""
import csv
import errno
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import corrkd
import data
import eval as evaluation
from data import DataError, SPLITS, STREAMS
from helpers import ROOT, Call, content, feature_arguments, learnable, run, run_main, written


def smaller(made, **sizes):
    for split, n in sizes.items():
        made[split] = {key: value[:n] for key, value in made[split].items()}
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds of CorrKD and of one ablation, evaluated; splits of the data differ in size, one label of test is 0."""
    folder = tmp_path_factory.mktemp("trained")
    made = smaller(learnable(), valid=30, test=20)
    made["test"]["labels"][3] = 0
    written(folder / "data", made)
    assert run(folder, "--ablate", "", "no_scd", seeds=("1", "2")) == 0
    assert evaluation.main([str(folder / "runs"), "--rates", "0", "0.5", "1", "--csv", str(folder / "t.csv")]) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """One run of its own, s1 of CorrKD, whose data is the fixture's: the folder, and its checkpoint."""
    folder = shutil.copytree(trained / "runs/mosi/corrkd/s1", tmp_path / "corrkd/s1")
    return folder, torch.load(folder / "model.pt", weights_only=True)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def shown(capsys, *arguments):
    """What eval.py prints, and its tables: title -> label of a row -> column -> cell."""
    capsys.readouterr()
    assert evaluation.main([str(a) for a in arguments]) == 0
    out, tables = capsys.readouterr().out, {}
    for title, table in re.findall(r"^(.+)\n\n((?:\|.*\n)+)", out, re.MULTILINE):
        first, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        tables[title] = {row[0]: dict(zip(first[1:], row[1:])) for row in rows}
    return out, tables


def refused(capsys, *arguments):
    """The sentence by which the program ends."""
    assert evaluation.main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and len(error.splitlines()) == 1
    return error


def test_weighted_f1_has_its_arguments_in_the_right_order():
    """Always "negative" on 70 negative and 30 positive clips: .7 * 2 * .7 / 1.7 = .576; swapped it would be .824."""
    truth = np.array([0] * 70 + [1] * 30)
    assert evaluation.metrics("polarity", np.zeros(100, int), truth)["F1"] == pytest.approx(100 * .7 * 1.4 / 1.7)


def test_emotions_are_four_decisions_in_the_papers_order():
    truth = np.zeros((10, 4), int)
    truth[:4, data.EMOTIONS.index("sad")] = 1
    assert list(evaluation.metrics("emotions", np.zeros((10, 4), int), truth).items()) == [
        ("F1 happy", 100), ("F1 sad", pytest.approx(100 * .6 * 1.2 / 1.6)), ("F1 angry", 100), ("F1 neutral", 100)]


def test_polarity_leaves_label_zero_out():
    index, truth = evaluation.targets(torch.tensor([-1.0, 0.0, .2, 0.0, 3.0]), "polarity")
    assert index.tolist() == [0, 2, 4] and truth.tolist() == [0, 1, 1]
    with pytest.raises(DataError, match="All sentiments of a split are 0"):
        evaluation.targets(torch.zeros(3), "polarity")


def test_regression_metrics_computed_by_hand():
    truth = np.array([-2.0, -1.0, 0.0, 0.5, 1.5, 3.0])
    answer = np.array([-1.4, 0.2, -0.1, 0.0, 2.5, 3.7])
    x, y = truth - truth.mean(), answer - answer.mean()
    assert evaluation.metrics("regression", answer, truth) == pytest.approx({
        "MAE": (.6 + 1.2 + .1 + .5 + 1.0 + .7) / 6,
        # without label 0: truth - - + + +, answer - + - + + (0.0 is not > 0): 3 of 5
        "Acc-2": 60, "F1": 100 * (2 / 5 * .5 + 3 / 5 * 2 / 3),
        # with it, >= 0: truth - - + + + +, answer - + - + + +: 4 of 6
        "Acc-2 has0": 400 / 6, "F1 has0": 100 * (2 / 6 * .5 + 4 / 6 * .75),
        # halves to the even: truth -2 -1 0 0 2 3, answer -1 0 0 0 2 3 (2.5 -> 2, 3.7 clipped to 3): 4 of 6
        "Acc-7": 400 / 6, "Corr": (x * y).sum() / ((x * x).sum() * (y * y).sum()) ** .5})


def test_metrics_that_are_not_defined_are_nan_and_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant = evaluation.metrics("regression", np.full(4, .2), np.array([1.0, 2.0, -1.0, 0.0]))
        assert np.isnan(constant["Corr"]) and constant["Acc-2"] == pytest.approx(200 / 3) and constant["MAE"] == 1
        neutral = evaluation.metrics("regression", np.array([.3, -.1]), np.zeros(2))
        assert np.isnan(neutral["F1"]) and neutral["F1 has0"] == pytest.approx(200 / 3)
        assert np.isnan(evaluation.metrics("regression", np.array([.3]), np.array([1.0]))["Corr"])
        assert evaluation.metrics("polarity", np.zeros(5, int), np.ones(5, int))["F1"] == 0
    assert evaluation.cell("Corr", "ours", {1: .5, 2: float("nan")}) == "nan±nan"


def test_the_constant_predictor_of_each_task():
    assert evaluation.constant(torch.tensor([-1.0, .2, .4, 3.0, 3.0]), "regression") == pytest.approx(.4)
    assert evaluation.constant(torch.tensor([0, 1, 1]), "polarity") == 1
    assert evaluation.constant(torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]), "emotions") == [0, 1, 0, 0]


def test_the_score_is_the_mean_over_the_sets_of_f1_or_minus_mae():
    sets = {c: {"n": 3, "realised": {}, "F1": 90.0, "MAE": 1.0 + k} for k, c in enumerate(data.SETS)}
    assert evaluation.score(sets) == pytest.approx(-4.0)
    emotions = {c: {"n": 3, "F1 happy": 50.0 + k, "F1 sad": 60.0 + k} for k, c in enumerate(data.SETS)}
    assert evaluation.score(emotions) == pytest.approx(58.0)


def untrained(tmp_path, lengths=(8, 12, 10)):
    """A split whose clips are not sorted by length, and CorrKD with random weights, as training leaves it."""
    made = content(n=30, lengths=lengths)
    made["test"]["vision"][:7] = 0
    order = np.random.default_rng(0).permutation(30)
    made["test"] = {key: value[order] for key, value in made["test"].items()}
    split = data.load("mosi", written(tmp_path, made), SPLITS)["test"]
    torch.manual_seed(0)
    return split, corrkd.CorrKD({m: split[m].shape[2] for m in STREAMS}, "polarity").train()


class Joint(torch.nn.Module):
    """The same answers from a model that does not offer its streams one by one."""
    encode = None

    def __init__(self, model):
        super().__init__()
        self.model, self.represent, self.classify = model, model.represent, model.classify


@pytest.mark.parametrize("lengths", [(8, 8, 8), (8, 12, 10)])
@pytest.mark.parametrize("joint", [False, True])
def test_predictions_are_those_of_one_full_pass_for_each_condition(tmp_path, lengths, joint):
    """Whatever the batch size and the time; another mask seed has other masks."""
    split, model = untrained(tmp_path, lengths)
    model, conditions = Joint(model) if joint else model, [*data.SETS, 0.0, 0.3, 1.0]
    first = evaluation.predict(model, split, conditions, "test", size=7)
    again, whole = (evaluation.predict(model, split, conditions, "test", size=size) for size in (7, 256))
    for condition in conditions:
        present = data.evaluation_masks(split["real"], condition, "test")
        with torch.no_grad():
            h = model.represent({m: split[m] * present[m][..., None] for m in STREAMS}, split["real"])
        torch.testing.assert_close(first[condition], model.classify(h), rtol=0, atol=1e-5)
        torch.testing.assert_close(first[condition], whole[condition], rtol=0, atol=1e-6)
        assert torch.equal(first[condition], again[condition])
    assert not torch.equal(evaluation.predict(model, split, [.3], "test", mask_seed=1)[.3], whole[.3])


def test_the_linear_baseline_is_ridge_regression_on_means_of_dropped_copies(tmp_path):
    """Against the closed form; the strength is the one with the least MAE on validation."""
    loaded = data.load("mosi", written(tmp_path, learnable(lengths=(8, 12, 10))), SPLITS)
    got = evaluation.fit_linear(loaded, "regression")

    def means(name, condition=None):
        split = loaded[name]
        present = (data.training_masks(split["real"], generator) if condition is None
                   else data.evaluation_masks(split["real"], condition, name))
        return torch.cat([(split[m] * present[m][..., None]).double().sum(1) / split["real"][m].sum(1, keepdim=True)
                          for m in STREAMS], dim=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([means("train") for _ in range(5)])
    y = loaded["train"]["label"].double().repeat(5)
    best = (float("inf"),)
    for strength in evaluation.STRENGTHS:
        centred = x - x.mean(0)
        w = torch.linalg.solve(centred.T @ centred + strength * torch.eye(13).double(), centred.T @ (y - y.mean()))
        b = y.mean() - x.mean(0) @ w
        errors = [(means("valid", c) @ w + b - loaded["valid"]["label"]).abs().mean().item() for c in data.SETS]
        best = min(best, (statistics.fmean(errors), w, b), key=lambda one: one[0])
    _, w, b = best
    torch.testing.assert_close((got["weight"][0], got["bias"][0]), (w, b))
    output = evaluation.predict(evaluation.Linear("regression", **got), loaded["test"], [.3, "la"], "test")
    for condition in (.3, "la"):
        torch.testing.assert_close(output[condition][:, 0], means("test", condition) @ w + b)


def nested(record, **changes):
    """The record with entries changed; a name that is not in it is one of its config."""
    config = {**record["config"], **{k: changes.pop(k) for k in list(changes) if k not in record}}
    return {**record, "config": config, **changes}


@pytest.mark.parametrize("change, said", [
    ({"format": 3}, "another version"),
    ({"method": "../\x1b[31m"}, "there is no ../"),
    ({"dataset": "meld"}, "there is no corrkd on meld"),
    ({"ablation": "no_such"}, "there is no corrkd no_such"),
    ({"dataset": "iemocap"}, "another task or config"),
    ({"width": 3_000_000}, "not as this train.py writes it"),
    ({"layers": 10_000_000}, "more layers than it has weights"),
    ({"dims": {"text": 2 ** 40, "audio": 4, "vision": 3}}, "trained on {'text': 1099511627776"),
    ({"constant": "x"}, "not as this train.py writes it"),
    ({"heads": 0}, "not as this train.py writes it"),
    ("no weights", "more layers than it has weights"),
    ("repeated weights", "more weights than it has bytes")])
def test_a_checkpoint_that_does_not_hold_is_refused_in_a_sentence(copied, change, said, capsys):
    """At once: a record alone asks for no memory and no time."""
    folder, checkpoint = copied
    if change == "no weights":
        checkpoint["model"] = {}
    elif change == "repeated weights":      # one number claims to be many
        checkpoint["model"] = {key: torch.zeros(1).expand(10 ** 9) for key in checkpoint["model"]}
    else:
        checkpoint["run"] = nested(checkpoint["run"], **change)
    torch.save(checkpoint, folder / "model.pt")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    error = refused(capsys, folder)
    assert said in error and error.strip().isprintable()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_that_is_no_result_of_training_is_refused(copied, trained, monkeypatch, capsys):
    folder, checkpoint = copied
    monkeypatch.chdir(folder)
    whole = (folder / "model.pt").read_bytes()
    torch.save({"run": checkpoint["run"], "model": Call(os.system, ("touch GOTCHA",))}, folder / "model.pt")
    assert "more than tensors and plain values" in refused(capsys, folder) and not os.path.exists("GOTCHA")
    for raw, said in (((trained / "runs/mosi/corrkd/s1/last.pt").read_bytes(), "it holds no load and no stats"),
                      (whole[:-300], "not as this train.py writes it"), (b"", "not as this train.py writes it")):
        (folder / "model.pt").write_bytes(raw)
        assert said in refused(capsys, folder)
    (folder / "model.pt").unlink()
    os.mkfifo(folder / "model.pt")
    assert "holds no model.pt" in refused(capsys, folder)


def test_what_is_hashed_is_what_is_loaded(copied, monkeypatch):
    """Training may replace model.pt while it is read."""
    path, load = copied[0] / "model.pt", torch.load
    before = data.sha256(path)
    monkeypatch.setattr(torch, "load", lambda *a, **k: (path.write_bytes(b"the next epoch"), load(*a, **k))[1])
    assert evaluation.read_checkpoint(path, ("run", "model"), "")["sha256"] == before


def test_every_cell_is_the_mean_over_seeds_of_what_was_measured(trained, capsys):
    """Avg., area, deviations, paired differences and baselines from results.json alone, by other means."""
    def both_seeds(name, part):
        found = [results(trained / "runs/mosi" / name / f"s{s}")[part] for s in (1, 2)]
        row = {c: np.array([one[c]["F1"] for one in found]) for c in (*data.SETS, "0.0", "0.5", "1.0")}
        row["avg"] = sum(row[c] for c in ("l", "a", "v", "la", "lv", "av")) / 6
        return {**row, "area": (row["0.0"] + 2 * row["0.5"] + row["1.0"]) / 4}
    full, ablation = both_seeds("corrkd", "conditions"), both_seeds("corrkd-no_scd", "conditions")
    linear, constant = both_seeds("corrkd", "linear"), both_seeds("corrkd", "constant")
    expected = {
        "F1 corrkd (n=2)": full,
        "F1 corrkd no_scd (n=2)": ablation,
        "F1 corrkd no_scd - corrkd (n=2)": {c: ablation[c] - full[c] for c in full},
        "F1 corrkd - linear (n=2)": {c: full[c] - linear[c] for c in full},
        "F1 corrkd no_scd - linear (n=2)": {c: ablation[c] - linear[c] for c in full},
        "F1 constant, polarity": {c: constant[c][:1] for c in full},
        "F1 linear, polarity": {c: linear[c][:1] for c in full},
    }
    sets, rates = shown(capsys, trained / "runs", "--rates", "0", "0.5", "1")[1].values()
    assert set(sets) == {*expected} and set(rates) == {*expected, "realised rate"}
    for label, row in expected.items():
        for column, numbers in row.items():
            text = f"{numbers.mean():{'+' if ' - ' in label else ''}.2f}"
            text += f"±{statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
            assert text == (sets[label] | rates[label])[evaluation.TITLES.get(column, column)], (label, column)
    assert rates["realised rate"]["1.0"] == "1.000"


def test_the_csv_holds_every_number_of_the_tables(trained):
    lines = read_csv(trained / "t.csv")
    assert list(lines[0]) == "dataset synthetic data table metric kind name column mean std n".split()
    measured = [results(trained / f"runs/mosi/corrkd/s{s}")["conditions"]["la"]["F1"] for s in (1, 2)]
    one, = [x for x in lines if (x["kind"], x["name"], x["column"]) == ("ours", "corrkd", "la")]
    assert (float(one.pop("mean")), float(one.pop("std"))) == (statistics.fmean(measured), np.std(measured, ddof=1))
    assert one == {"dataset": "mosi", "synthetic": "False", "data": data.sha256(trained / "data/mosi_data.pkl"),
                   "table": "sets", "metric": "F1", "kind": "ours", "name": "corrkd", "column": "la", "n": "2"}
    kinds = {(x["kind"], x["name"]) for x in lines}
    assert {("paired", "corrkd - linear"), ("constant", "polarity"), ("linear", "polarity"), ("realised", "")} <= kinds


def test_predictions_are_one_line_for_each_clip_and_condition(trained):
    folder = trained / "runs/mosi/corrkd/s1"
    lines = read_csv(folder / "predictions.csv")
    assert len(lines) == 20 * 10 and len({(x["condition"], x["clip"]) for x in lines}) == 200
    assert all((x["truth"] == "") == (x["clip"] == "clip2_3") for x in lines)
    some = [x for x in lines if x["condition"] == "0.5" and x["truth"]]
    truth, answer = (np.array([int(x[name]) for x in some]) for name in ("truth", "answer"))
    assert evaluation.metrics("polarity", answer, truth)["F1"] == results(folder)["conditions"]["0.5"]["F1"]
    assert all((float(x["probability"]) > .5) == (x["answer"] == "1") for x in lines)


def test_a_model_answers_on_features_that_are_standardised_as_in_training(trained):
    folder, split = trained / "runs/mosi/corrkd/s1", data.load("mosi", trained / "data", SPLITS)["test"]
    model = corrkd.CorrKD({"text": 6, "audio": 4, "vision": 3}, "polarity")
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True)["model"])
    chance = model.eval()(**{m: split[m] for m in STREAMS}, real=split["real"]).softmax(-1)[:, 1].tolist()
    lines = [line for line in read_csv(folder / "predictions.csv") if line["condition"] == "lav"]
    assert [float(line["probability"]) for line in lines] == pytest.approx(chance, abs=1e-6)


def test_rates_that_make_no_sense_are_refused():
    for arguments in (["--rates", "1.5"], ["--rates", "nan"], ["--rates", "--plot", "x.png"]):
        with pytest.raises(SystemExit):
            evaluation.main(["runs", *arguments])


@pytest.fixture
def comparable(monkeypatch):
    """The small made-up data counts as the papers': of the standard sizes, its text as wide as theirs."""
    monkeypatch.setattr(data, "SIZES", dict.fromkeys(data.SIZES, (40, 30, 20)))
    for module in evaluation.METHODS.values():
        monkeypatch.setattr(module, "FEATURES", {"text": 6, "audio": 4, "vision": 3})


def test_print_stands_beside_ours_where_the_data_is_the_papers(copied, comparable, capsys):
    sets, rates = shown(capsys, copied[0], "--rates", "0")[1].values()
    ours = results(copied[0])["conditions"]["la"]["F1"]
    assert sets["F1 corrkd, paper"]["{l,a}"] == "83.56" and rates["F1 corrkd, paper"]["0.0"] == "83.94"
    assert sets["F1 corrkd - paper"]["{l,a}"] == f"{ours - 83.56:+.2f}"
    out, _ = shown(capsys, copied[0], "--rates", "--split", "valid")
    assert "corrkd, paper" not in out and "its numbers are of the test split" in out


def test_double_flows_own_table_comes_first(tmp_path, capsys):
    written(tmp_path / "data", learnable())
    assert run(tmp_path, method="double_flow", epochs="1") == 0
    out, tables = shown(capsys, tmp_path / "runs", "--rates", "0")
    assert "simulated text: learned from audio" in out
    assert list(tables) == ["The paper's table", "Available streams, an extension: not in the paper",
                            "Share of frames dropped in every stream, an extension: not in the paper"]
    lav, av = (results(tmp_path / "runs/mosi/double_flow/s1")["conditions"][c] for c in ("lav", "av"))
    for metric, digits in (("MAE", 4), ("F1", 2), ("F1 has0", 2), ("Acc-2", 2), ("Acc-7", 2), ("Corr", 4)):
        assert tables["The paper's table"][f"{metric} double_flow (n=1)"] == {
            "complete": f"{lav[metric]:.{digits}f}", "text missing": f"{av[metric]:.{digits}f}"}


def test_two_tasks_have_two_baselines_and_the_reference_is_one_of_the_rows(copied, tmp_path, trained, capsys):
    assert "the runs are of corrkd" in refused(capsys, copied[0], "--rates", "--reference", "umdf")
    os.symlink(trained / "data", tmp_path / "data")
    assert run(tmp_path, method="umdf", epochs="1") == 0
    table = shown(capsys, copied[0], tmp_path / "runs", "--rates", "--reference", "umdf")[1]["Available streams"]
    labels = {"F1 constant, polarity", "F1 constant, regression", "F1 linear, polarity", "F1 linear, regression",
              "MAE constant, regression", "MAE linear, regression", "F1 corrkd - umdf (n=1)", "MAE umdf - linear (n=1)"}
    assert labels <= set(table) and "MAE corrkd - umdf (n=1)" not in table


def test_iemocap_shows_four_emotions(tmp_path, capsys):
    written(tmp_path / "data", learnable(emotions=True), "iemocap_data.pkl")
    assert run(tmp_path, dataset="iemocap", epochs="1") == 0
    table = shown(capsys, tmp_path / "runs", "--rates")[1]["Available streams"]
    assert [label for label in table if label.endswith("corrkd (n=1)")] == [
        f"F1 {e} corrkd (n=1)" for e in ("happy", "sad", "angry", "neutral")]
    line = read_csv(tmp_path / "runs/iemocap/corrkd/s1/predictions.csv")[0]
    assert len(json.loads(line["answer"])) == len(json.loads(line["probability"])) == 4


def test_feature_folders_have_a_fingerprint_and_no_linear_row(tmp_path, capsys):
    assert run_main("--method", "corrkd", "--out", tmp_path / "runs", "--epochs", 1, "--seeds", 1, "--device", "cpu",
                    *feature_arguments(tmp_path / "made")) == 0
    out, _ = shown(capsys, tmp_path / "runs", "--rates", "0", "1")
    assert "fingerprint" in out and "SHA-256" not in out and "WARNING" not in out and "no linear row" in out


def test_runs_in_one_folder_differ_in_their_seed_alone(copied, capsys):
    folder, checkpoint = copied
    for change, said in (({"seed": 7, "batch_size": 8}, "they differ in batch_size"), ({}, "the same seed")):
        (folder.parent / "s7").mkdir(exist_ok=True)
        torch.save({**checkpoint, "run": nested(checkpoint["run"], **change)}, folder.parent / "s7" / "model.pt")
        assert said in refused(capsys, folder.parent, "--rates")


def test_two_groups_of_one_name_are_told_apart_by_their_folder(copied, trained, capsys):
    other = trained / "runs/mosi/corrkd"
    sets = shown(capsys, copied[0], other, "--rates", "0", "0.5", "1")[1]["Available streams"]
    assert list(sets)[:2] == ["F1 corrkd (n=1)", f"F1 corrkd [{other}] (n=2)"]


def test_a_reason_to_read_the_numbers_with_care_is_told(copied, capsys):
    folder, checkpoint = copied
    torch.save({**checkpoint, "run": nested(checkpoint["run"], epochs=9, batch_size=64)}, folder / "model.pt")
    out, _ = shown(capsys, folder, "--rates")
    assert "note: seed 1 was stopped after 2 of 9 epochs" in out
    assert "note: other settings than the defaults: epochs 9" in out and "batch_size" not in out
    assert "nothing is compared with the paper" in out and ", paper" not in out


@pytest.mark.parametrize("splits", [["test"], ["train", "valid"], list(SPLITS)])
def test_a_stream_that_is_lacking_counts_in_no_average(tmp_path, copied, splits, capsys):
    made, folder = smaller(learnable(), valid=30, test=20), copied[0]
    for split in splits:
        made[split]["vision"][:] = 0
    written(tmp_path / "data", made)
    if "train" in splits:
        assert run(tmp_path, epochs="1") == 0
        folder = tmp_path / "runs/mosi/corrkd/s1"
    out, tables = shown(capsys, folder, "--rates", "0.5", "--data-dir", tmp_path / "data")
    row = tables["Available streams"]["F1 corrkd (n=1)"]
    three = [results(folder)["conditions"][c]["F1"] for c in ("l", "a", "la")]
    assert row["{v}"] == row["{a,v}"] == "-" and row["Avg."] == f"{statistics.fmean(three):.2f}"
    assert "vision" in out and out.count("not answered") == 1
    assert ("note: this is not the file that the runs were trained on" in out) is (splits == ["test"])


@pytest.mark.parametrize("form", ["no labels", "all 0"])
def test_clips_without_labels_are_answered(copied, tmp_path, form, capsys):
    """A file that holds the asked split alone; truth is empty, there is no table and no results.json."""
    folder, made = copied[0], {"test": smaller(learnable(), test=20)["test"]}
    made["test"]["labels"][:] = 0
    if form == "no labels":
        del made["test"]["labels"]
    before = read_csv(folder / "predictions.csv")
    (folder / "results.json").unlink()
    out, _ = shown(capsys, folder, "--rates", "0", "0.5", "1", "--data-dir", written(tmp_path / "mine", made),
                   "--csv", tmp_path / "t.csv")
    first, second = out.splitlines()
    assert "has no labels" in first and second == f"{tmp_path / 't.csv'} is not written: there are no numbers"
    assert not (folder / "results.json").exists() and not (tmp_path / "t.csv").exists()
    assert read_csv(folder / "predictions.csv") == [{**line, "truth": ""} for line in before]


def test_mistakes_are_told_before_the_evaluation(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "evaluate_run", None)
    own, link, twice = copied[0] / "model.pt", tmp_path / "link.csv", tmp_path / "x.png"
    os.symlink(own, link)
    (tmp_path / "mine.dat").write_bytes(b"clips")
    for more, said in ((["--csv", tmp_path / "nowhere/t.csv"], "No such file"), (["--csv", tmp_path], "is a folder"),
                       (["--csv", own], "a run's own file"), (["--csv", link], "a run's own file"),
                       (["--csv", tmp_path / "mine.dat"], "is no table of eval.py"),
                       (["--csv", twice, "--plot", twice], "name two files"), (["--plot", "x.xyz"], "ends in .png"),
                       ([tmp_path / "nowhere"], "is no folder"), ([__file__], "is no folder"),
                       ([ROOT / "tests"], "holds no model.pt")):
        assert said in refused(capsys, copied[0], *more)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corrkd", "link.csv", "mine.dat"]


def test_a_folder_below_that_may_not_be_read_is_told(copied, tmp_path, monkeypatch, capsys):
    locked, scandir = tmp_path / "locked", os.scandir
    locked.mkdir()

    def refusing(path):
        if str(path) == str(locked):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert f"{locked}: Permission denied" in refused(capsys, tmp_path, "--rates")


def test_a_csv_on_standard_output_follows_the_tables_in_the_same_file(copied, tmp_path):
    with open(tmp_path / "all.txt", "w") as file:
        command = [sys.executable, "eval.py", str(copied[0]), "--rates", "--device", "cpu", "--csv", "/dev/stdout"]
        subprocess.run(command, cwd=ROOT, stdout=file, check=True)
    tables, _, numbers = (tmp_path / "all.txt").read_text().partition("dataset,synthetic,")
    assert "Available streams" in tables and "F1,ours,corrkd,avg" in numbers


def test_a_fifo_is_written_into(copied, tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    reader = subprocess.Popen(["cat", tmp_path / "fifo"], stdout=subprocess.PIPE, text=True)
    shown(capsys, copied[0], "--rates", "--csv", tmp_path / "fifo")
    assert reader.communicate(timeout=10)[0].startswith("dataset,") and (tmp_path / "fifo").is_fifo()


def test_a_standard_output_that_is_full_costs_neither_a_run_nor_a_table(tmp_path):
    """Both programs, as programs."""
    written(tmp_path / "data", learnable(n=12))
    train = ["train.py", "--method", "corrkd", "--dataset", "mosi", "--data-dir", tmp_path / "data",
             "--out", tmp_path / "runs", "--epochs", "1", "--seeds", "1", "--device", "cpu"]
    for command in (train, ["eval.py", tmp_path / "runs", "--csv", tmp_path / "t.csv"]):
        with open("/dev/full" if os.path.exists("/dev/full") else os.devnull, "w") as full:
            subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=full, check=True)
    assert read_csv(tmp_path / "t.csv") and (tmp_path / "runs/mosi/corrkd/s1/results.json").exists()


def test_what_a_record_says_is_printed_as_text(copied, capsys):
    folder, checkpoint = copied
    torch.save({**checkpoint, "run": {**checkpoint["run"], "seed": "1\x1b]0;hi\x07\n2"}}, folder / "model.pt")
    out, tables = shown(capsys, folder, "--rates")        # without numbers there is no second table
    assert list(tables) == ["Available streams"] and list(results(folder)["conditions"]) == list(data.SETS)
    assert "seeds 1 ]0;hi  2," in out and all(line.isprintable() for line in out.splitlines())


def test_the_figure_has_a_panel_for_each_metric(trained, tmp_path, comparable, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")      # as in a notebook
    axes, whole = [], figure.subplots
    monkeypatch.setattr(figure, "subplots", lambda *a, **k: (axes.append(whole(*a, **k)), axes[0])[1])
    shown(capsys, trained / "runs", "--rates", "0", "0.5", "1", "--plot", tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    axis, = axes[0].flat
    assert axis.get_title() == "corrkd on mosi\ntest split, 19 clips"
    lines = {line.get_label(): line for line in axis.get_lines()}
    baselines = {"constant, polarity", "linear, polarity"}
    assert set(lines) == {"corrkd, 2 seeds", "corrkd no_scd, 2 seeds", "corrkd, paper", *baselines}
    assert {label for label, line in lines.items() if line.get_color() == "grey"} == baselines
    assert lines["corrkd, paper"].get_data()[1] == 83.94 and len(axis.collections) == 2
    assert np.ptp(axis.get_ylim()) >= 500 / 19 ** .5 - 1e-9     # noise of few clips fills no panel
