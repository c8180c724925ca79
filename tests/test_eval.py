"""eval.py: metrics by hand, masks, predictions, the linear baseline, checkpoints from elsewhere, tables, outputs."""
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import corrkd
import data
import eval as evaluation
from data import DataError, SPLITS, STREAMS
from helpers import ROOT, Call, content, feature_arguments, learnable, run, run_main, written


RATES = ("--rates", "0.8", "0", "0.5", "0.5")        # neither sorted nor from 0 to 1


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
    assert evaluation.main([str(folder / "runs"), *RATES, "--csv", str(folder / "t.csv")]) == 0
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
    """What eval.py prints, and its tables: "sets", "rates" or "paper" -> "metric name[ - subtracted]" -> column -> mean
    and deviation."""
    capsys.readouterr()
    assert evaluation.main([str(a) for a in arguments]) == 0
    out, tables = capsys.readouterr().out, {"sets": {}, "rates": {}, "paper": {}}
    title = r"^(.+?)(?: in %)?(?: minus that of (.+?))?: (available|share|the paper).*\n\n((?:\|.*\n)+)"
    for metric, against, kind, table in re.findall(title, out, re.MULTILINE):
        first, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        rows = []
        for label, *texts in lines:
            if any(text.startswith("±") for text in texts) or not any(texts):       # the second line of a row
                rows[-1] = f"{rows[-1][0]} {label}".strip(), [a + b for a, b in zip(rows[-1][1], texts)]
            else:
                rows.append((label, texts))
        place = tables[{"available": "sets", "share": "rates", "the paper": "paper"}[kind]]
        for label, texts in rows:
            place[f"{metric} {label}" + (f" - {against}" if against else "")] = dict(zip(first[1:], texts))
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
    truth[:4, data.EMOTIONS.index("sad")] = truth[:2, data.EMOTIONS.index("angry")] = 1
    found = evaluation.metrics("emotions", np.zeros((10, 4), int), truth)
    assert list(found) == ["F1 happy", "F1 sad", "F1 angry", "F1 neutral"]
    assert np.isnan(found["F1 happy"]) and found["F1 sad"] == pytest.approx(100 * .6 * 1.2 / 1.6)
    assert found["F1 angry"] == pytest.approx(100 * .8 * 1.6 / 1.8)


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
        assert np.isnan(neutral["F1"]) and np.isnan(neutral["F1 has0"]) and neutral["Acc-2 has0"] == 50
        assert np.isnan(evaluation.metrics("regression", np.array([.3]), np.array([1.0]))["Corr"])
        one_class = evaluation.metrics("polarity", np.arange(5) % 2, np.ones(5, int))
        assert np.isnan(one_class["F1"]) and one_class["Acc-2"] == 40


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
    shares = [data.realised(data.evaluation_masks(split["real"], .3, "test", k), split["real"]) for k in (0, 1)]
    assert evaluation.evaluate(model, "polarity", split, [.3], "test", 1)["0.3"]["realised"] == shares[1] != shares[0]


@pytest.mark.parametrize("four, noise", [(False, 2), (True, 0)])
def test_the_linear_baseline_is_a_ridge_regression_for_each_set_of_streams(tmp_path, four, noise):
    """Against the closed form on plain features, clip by clip. The strength and the features are the best on
    validation, not on training and not of {l,a,v}; a frame of zeros is not there."""
    loaded = data.load("mosi", written(tmp_path, learnable(lengths=(8, 12, 10))), SPLITS)
    for split in SPLITS if four else ():
        loaded[split]["label"] = loaded[split]["audio"][..., 0].amax(1) + loaded[split]["vision"][..., 1].amin(1)
    loaded["valid"]["label"] += noise * torch.randn(40, generator=torch.Generator().manual_seed(0))
    loaded["test"]["vision"][..., 2] = 0        # a number of each frame, not the frame, is 0
    loaded["valid"]["audio"] *= .3
    got = evaluation.fit_linear(loaded, "regression")

    def plain(name, condition, available, pooled):
        split, rows = loaded[name], []
        present = data.evaluation_masks(split["real"], condition, name)
        for i in range(40):
            row = []
            for m in available:
                x = (split[m] * present[m][..., None])[i].double().numpy()
                x = x[(x != 0).any(1)]
                pools = [x.mean(0), x.std(0), x.max(0), x.min(0)] if len(x) else [np.zeros(split[m].shape[2])] * 4
                row += pools if pooled else pools[:1]
            rows.append(np.concatenate(row))
        return np.array(rows)

    def answer(name, condition, available, pooled, strength):
        x, y = plain("train", "lav", available, pooled), loaded["train"]["label"].double().numpy()
        centred = x - x.mean(0)
        w = np.linalg.solve(centred.T @ centred + strength * np.eye(x.shape[1]), centred.T @ (y - y.mean()))
        return (plain(name, condition, available, pooled) - x.mean(0)) @ w + y.mean()
    choices, errors = [(pooled, 10. ** power) for pooled in (False, True) for power in range(5, -1, -1)], []
    assert evaluation.STRENGTHS == tuple(strength for _, strength in choices[:6])
    for choice in choices:
        errors.append([sum(abs(answer(name, c, data.SETS[c], *choice) - loaded[name]["label"].numpy()).mean()
                           for c in sets) for name, sets in (("valid", data.SETS), ("train", data.SETS),
                                                             ("valid", ["lav"]))])
    best, *others = np.argmin(errors, 0)
    assert best not in others and choices[best][0] is four
    model, conditions = evaluation.Linear("regression", **got), [.3, "l", "v", "la", "lav"]
    output = evaluation.predict(model, loaded["test"], conditions, "test", size=7)
    for condition in conditions:
        available = data.SETS.get(condition, STREAMS)
        expected = answer("test", condition, available, *choices[best])
        np.testing.assert_allclose(output[condition][:, 0], expected, rtol=0, atol=1e-6)
    nothing_left = evaluation.predict(model, loaded["test"], [1.0], "test")[1.0]
    torch.testing.assert_close(nothing_left, loaded["train"]["label"].double().mean().expand(40, 1))


def test_a_draw_of_each_clip_once_gives_the_difference_itself(copied, monkeypatch, capsys):
    """Of one seed; a clip of sentiment 0 does not count."""
    monkeypatch.setattr(evaluation, "draw_weights", lambda units: np.ones((2, len(units))))
    shown(capsys, copied[0], *RATES, "--csv", copied[0] / "t.csv")
    lines = [[float(x[name]) for name in ("low", "mean", "high")] for x in read_csv(copied[0] / "t.csv") if x["low"]]
    assert len(lines) == 12 and all(low == pytest.approx(mean) == high for low, mean, high in lines)


def test_the_linear_baseline_never_leaves_the_cpu(tmp_path, monkeypatch):
    """Apple's devices have no float64: what is pooled is fetched first."""
    x, fetched = torch.randn(3, 5, 2), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: fetched.append(self.shape) or self)
    assert evaluation.pool(x).dtype == torch.float64 and fetched == [x.shape]


def test_the_linear_baseline_of_a_decision_prefers_no_class(tmp_path):
    """Labels that are turned around turn its outputs around."""
    loaded, outputs = data.load("mosi", written(tmp_path, learnable()), SPLITS), []
    for _ in range(2):
        for split in SPLITS:
            loaded[split]["label"] *= -1
        linear = evaluation.Linear("polarity", **evaluation.fit_linear(loaded, "polarity"))
        outputs.append(evaluation.predict(linear, loaded["test"], ["a"], "test")["a"])
    torch.testing.assert_close(outputs[0], outputs[1].flip(1))


def nested(record, **changes):
    """The record with entries changed; a name that is not in it is one of its config."""
    config = {**record["config"], **{k: changes.pop(k) for k in list(changes) if k not in record}}
    return {**record, "config": config, **changes}


@pytest.mark.parametrize("change, said", [
    ({"format": 3}, "another version"),
    ({"width": 3_000_000}, "not as this train.py writes it"),
    ({"dims": {"text": 2 ** 40, "audio": 4, "vision": 3}}, "trained on {'text': 1099511627776"),
    ({"heads": 0}, "not as this train.py writes it"),
    ("no weights", "not as this train.py writes it")])
def test_a_checkpoint_that_does_not_hold_is_refused_in_a_sentence(copied, change, said, capsys):
    """At once: a record alone asks for no memory and no time."""
    folder, checkpoint = copied
    if change == "no weights":
        checkpoint["model"] = {}
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


def test_every_cell_is_the_mean_over_seeds_of_what_was_measured(trained, capsys):
    """Avg., area, deviations, paired differences and baselines from results.json alone, by other means."""
    def both_seeds(name, part):
        found = [results(trained / "runs/mosi" / name / f"s{s}")[part] for s in (1, 2)]
        row = {c: np.array([one[c]["F1"] for one in found]) for c in (*data.SETS, "0.0", "0.5", "0.8")}
        row["avg"] = sum(row[c] for c in ("l", "a", "v", "la", "lv", "av")) / 6
        return {**row, "area": (.25 * row["0.0"] + .4 * row["0.5"] + .15 * row["0.8"]) / .8}
    full, ablation = both_seeds("corrkd", "conditions"), both_seeds("corrkd-no_scd", "conditions")
    linear, constant = both_seeds("corrkd", "linear"), both_seeds("corrkd", "constant")
    expected = {
        "F1 corrkd": full,
        "F1 corrkd no_scd": ablation,
        "F1 corrkd no_scd - corrkd": {c: ablation[c] - full[c] for c in full},
        "F1 corrkd - linear": {c: full[c] - linear[c] for c in full},
        "F1 corrkd no_scd - linear": {c: ablation[c] - linear[c] for c in full},
        "F1 constant": {c: constant[c][:1] for c in full},
        "F1 linear": {c: linear[c][:1] for c in full},
    }
    out, tables = shown(capsys, trained / "runs", *RATES)
    sets, rates = tables["sets"], tables["rates"]
    assert set(sets) == {*expected} and set(rates) == {label for label in expected if " - " not in label}
    assert out.count(", n = 2\n") == 4
    for label, row in expected.items():
        for column, numbers in row.items():
            text = f"{numbers.mean():{'+' if ' - ' in label else ''}.2f}"
            text += f"±{statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
            title = evaluation.TITLES.get(column, column)
            if title in (found := sets[label] | rates.get(label, {})):
                assert text == found[title].replace("*", ""), (label, column)


def test_the_csv_holds_every_number_of_the_tables(trained):
    lines = read_csv(trained / "t.csv")
    assert list(lines[0]) == "dataset synthetic data table metric kind name column mean std n low high".split()
    for x in lines:
        assert (x["n"], x["std"] != "") == (("2", True) if x["kind"] in ("ours", "paired") else ("", False))
        of_interval = x["kind"] == "paired" and x["metric"] == "F1"
        assert (float(x["low"]) <= float(x["high"])) if of_interval else x["low"] == x["high"] == ""
        assert x["table"] == ("sets" if x["column"] in (*data.SETS, "avg") else "rates")
    measured = [results(trained / f"runs/mosi/corrkd/s{s}")["conditions"]["a"]["F1"] for s in (1, 2)]
    one, = [x for x in lines if (x["metric"], x["kind"], x["name"], x["column"]) == ("F1", "ours", "corrkd", "a")]
    assert (float(one.pop("mean")), float(one.pop("std"))) == (statistics.fmean(measured), np.std(measured, ddof=1))
    assert one == {"dataset": "mosi", "synthetic": "False", "data": data.sha256(trained / "data/mosi_data.pkl"),
                   "table": "sets", "metric": "F1", "kind": "ours", "name": "corrkd", "column": "a", "n": "2",
                   "low": "", "high": ""}


def test_predictions_are_one_line_for_each_clip_and_condition(trained):
    folder = trained / "runs/mosi/corrkd/s1"
    assert results(folder)["linear"]["l"]["F1"] > 90        # the text tells the label
    lines = read_csv(folder / "predictions.csv")
    assert len(lines) == 20 * 10 and len({(x["condition"], x["clip"]) for x in lines}) == 200
    assert all((x["truth"] == "") == (x["clip"] == "clip2_3") for x in lines)
    some = [x for x in lines if x["condition"] == "0.5" and x["truth"]]
    truth, answer = (np.array([int(x[name]) for x in some]) for name in ("truth", "answer"))
    assert evaluation.metrics("polarity", answer, truth)["F1"] == results(folder)["conditions"]["0.5"]["F1"]
    assert all((float(x["probability"]) > .5) == (x["answer"] == "1") for x in lines)


@pytest.mark.parametrize("split, seed, limit", [("test", 6, 9), ("valid", 7, None), ("train", 0, None)])
def test_every_number_of_results_json_is_what_its_name_says(copied, trained, split, seed, limit, capsys):
    """On the first clips, standardised as in training, under the split's own masks; the constant is the record's."""
    folder, checkpoint = copied
    clips = data.load("mosi", trained / "data", SPLITS, limit=limit, stats=checkpoint["stats"])[split]
    index, truth = (part.numpy() for part in evaluation.targets(clips["label"], "polarity"))
    model = corrkd.CorrKD({"text": 6, "audio": 4, "vision": 3}, "polarity").eval()
    linear = evaluation.Linear("polarity", **checkpoint["linear"])
    model.load_state_dict(checkpoint["model"])

    def measured(output):
        return evaluation.metrics("polarity", output.argmax(-1).numpy()[index], truth)
    for always in (0, 1):
        run = nested(checkpoint["run"], constant=always, limit=limit)
        torch.save({**checkpoint, "run": run}, folder / "model.pt")
        out, _ = shown(capsys, folder, "--split", split, "--mask-seed", seed, "--rates", "0.3", "0.6", "1")
        got, lines = results(folder), read_csv(folder / "predictions.csv")
        for c in (*data.SETS, .3, .6, 1.0):
            masks = data.evaluation_masks(clips["real"], c, split, seed)
            streams = {m: clips[m] * masks[m][..., None] for m in STREAMS}
            about = {"n": len(truth), "realised": data.realised(masks, clips["real"])}
            output = model(**streams, real=clips["real"])
            assert got["conditions"][str(c)] == {**about, **measured(output)}
            second = linear.classify(linear.represent(streams, clips["real"]))
            assert got["linear"][str(c)] == {**about, **measured(second)}
            chance = [float(line["probability"]) for line in lines if line["condition"] == str(c)]
            assert output.softmax(-1)[:, 1].tolist() == pytest.approx(chance, abs=1e-6)
            assert got["constant"][str(c)] == measured(torch.eye(2)[always].expand(len(clips["label"]), 2))
    assert (got["split"], got["mask_seed"], got["epoch"], got["epochs_run"]) == (split, seed, checkpoint["epoch"], 2)
    assert f"corrkd on mosi, {split} split, seeds 1, mask seed {seed}" in out
    assert "At 1.0 nothing" in out and got["data"]["sha256"] in out and "SYNTHETIC" not in out


def test_clips_of_ones_own_are_all_of_that_file_whatever_the_run_was_trained_on(copied, tmp_path, capsys):
    """A run on few clips of the stand-in, and one on feature folders; what is made up is called so."""
    folder, checkpoint = copied
    written(tmp_path / "mine", {**learnable(n=25), "SYNTHETIC": "made up"})
    checkpoint["run"] = nested(checkpoint["run"], limit=6)
    for load in ({"synthetic": True}, {"features": {"text": "gone"}, "labels": "gone"}):
        torch.save({**checkpoint, "load": {**checkpoint["load"], **load}}, folder / "model.pt")
        out, _ = shown(capsys, folder, "--no-rates", "--data-dir", tmp_path / "mine", "--csv", tmp_path / "t.csv")
        assert results(folder)["conditions"]["l"]["n"] == 25 and "SYNTHETIC data" in out and "not the file that" in out
        assert {x["synthetic"] for x in read_csv(tmp_path / "t.csv")} == {"True"}


def test_seeds_are_paired_by_their_number_and_the_reference_is_the_full_method(copied, trained, capsys):
    """Wherever the rows stand; a run that is named twice counts once; another treatment has a table of its own."""
    top = copied[0].parent.parent

    def place(where, source, **change):
        checkpoint = torch.load(trained / f"runs/mosi/{source}/model.pt", weights_only=True)
        (top / where).mkdir(parents=True)
        torch.save({**checkpoint, "run": nested(checkpoint["run"], **change)}, top / where / "model.pt")
    place("a/1", "corrkd-no_scd/s1", seed=2)
    place("a/2", "corrkd-no_scd/s2", seed=3)
    place("corrkd/s2", "corrkd/s2")
    shown(capsys, top, top / "a", *RATES, "--csv", top / "t.csv")
    first, second = (results(top / where)["conditions"] for where in ("a/1", "corrkd/s2"))
    lines = [x for x in read_csv(top / "t.csv") if (x["kind"], x["metric"]) == ("paired", "F1")]
    lines = [x for x in lines if not x["name"].endswith("linear")]
    assert {(x["name"], x["n"]) for x in lines} == {("corrkd no_scd - corrkd", "1")}
    found = {x["column"]: float(x["mean"]) for x in lines if x["column"] in first}
    assert found == pytest.approx({c: first[c]["F1"] - second[c]["F1"] for c in first})
    place("c/s1", "corrkd/s1", limit=9)
    place("d/s1", "corrkd/s1", normalize=False)
    assert shown(capsys, top, *RATES)[0].count("F1 in %: available streams") == 3


def test_the_numbers_that_stand_beside_ours_are_the_papers():
    """Checksums of what was compared with their tables, cell by cell."""
    tables = {name: json.dumps(module.REPORTED, sort_keys=True) for name, module in evaluation.METHODS.items()}
    assert [zlib.crc32(tables[name].encode()) for name in ("umdf", "corrkd", "double_flow")] == [
        2661151904, 1214070142, 2929009196]


def test_rates_that_make_no_sense_are_refused():
    for arguments in (["--rates", "1.5"], ["--rates", "nan"], ["--no-rates", "--plot", "x.png"]):
        with pytest.raises(SystemExit):
            evaluation.main(["runs", *arguments])


@pytest.fixture
def comparable(monkeypatch):
    """The small made-up data counts as the papers': of the standard sizes, its text as wide as theirs."""
    monkeypatch.setattr(data, "SIZES", dict.fromkeys(data.SIZES, (40, 30, 20)))
    for module in evaluation.METHODS.values():
        monkeypatch.setattr(module, "FEATURES", {"text": 6, "audio": 4, "vision": 3})


def test_print_stands_beside_ours_where_the_data_is_the_papers(copied, comparable, capsys):
    sets, rates, _ = shown(capsys, copied[0], "--rates", "0")[1].values()
    ours = results(copied[0])["conditions"]["la"]["F1"]
    assert sets["F1 corrkd, paper"]["{l,a}"] == "83.56" and rates["F1 corrkd, paper"]["0.0"] == "83.94"
    assert sets["F1 corrkd - the paper"]["{l,a}"] == f"{ours - 83.56:+.2f}"
    out, _ = shown(capsys, copied[0], "--no-rates", "--split", "valid")
    assert "corrkd, paper" not in out and "its numbers are of the test split" in out


def test_double_flows_own_table_comes_first(tmp_path, capsys):
    written(tmp_path / "data", learnable())
    assert run(tmp_path, method="double_flow", epochs="1") == 0
    out, tables = shown(capsys, tmp_path / "runs", "--rates", "0")
    assert "simulated text: learned from audio" in out
    titles = re.findall(r"^MAE[^:\n]*: (.*)$", out, re.MULTILINE)
    extension = ", n = 1, an extension: not in the paper"
    assert list(dict.fromkeys(titles)) == ["the paper's table, n = 1", f"available streams{extension}",
                                           f"share of frames dropped in every stream{extension}"]
    lav, av = (results(tmp_path / "runs/mosi/double_flow/s1")["conditions"][c] for c in ("lav", "av"))
    for metric, digits in (("MAE", 4), ("F1", 2), ("F1 has0", 2), ("Acc-2", 2), ("Acc-7", 2), ("Corr", 4)):
        assert tables["paper"][f"{metric} double_flow"] == {
            "complete": f"{lav[metric]:.{digits}f}", "text missing": f"{av[metric]:.{digits}f}"}


def test_two_tasks_have_two_baselines_and_the_reference_is_one_of_the_rows(copied, tmp_path, trained, capsys):
    assert "the runs are of corrkd" in refused(capsys, copied[0], "--no-rates", "--reference", "umdf")
    os.symlink(trained / "data", tmp_path / "data")
    assert run(tmp_path, method="umdf", epochs="1") == 0
    table = shown(capsys, copied[0], tmp_path / "runs", "--no-rates", "--reference", "umdf",
                  "--csv", tmp_path / "t.csv")[1]["sets"]
    metrics = "Acc-2, Acc-2 has0, Acc-7, Corr, F1, F1 has0, MAE"
    assert ", ".join(sorted({x["metric"] for x in read_csv(tmp_path / "t.csv")})) == metrics
    lines = read_csv(tmp_path / "runs/mosi/umdf/s1/predictions.csv")
    errors = [abs(float(x["answer"]) - float(x["truth"])) for x in lines if x["condition"] == "la"]
    assert len(errors) == 20 and not any(x["probability"] for x in lines)
    assert table["MAE umdf"]["{l,a}"] == f"{statistics.fmean(errors):.4f}"
    labels = {"F1 constant, polarity", "F1 constant, regression", "F1 linear, polarity", "F1 linear, regression",
              "MAE constant", "MAE linear", "F1 corrkd - umdf", "MAE umdf - linear"}
    assert labels <= set(table) and "MAE corrkd - umdf" not in table


def test_iemocap_shows_four_emotions(tmp_path, capsys):
    written(tmp_path / "data", learnable(emotions=True), "iemocap_data.pkl")
    assert run(tmp_path, dataset="iemocap", epochs="1") == 0
    table = shown(capsys, tmp_path / "runs")[1]["sets"]
    measured = results(tmp_path / "runs/iemocap/corrkd/s1")
    assert list(measured["conditions"]) == [*data.SETS, *(f"{i / 10}" for i in range(11))]       # the default rates
    assert (measured["split"], measured["mask_seed"]) == ("test", 0) and measured["linear"]["l"]["F1 happy"] > 90
    assert [label for label in table if label.endswith("corrkd")] == [
        f"F1 {e} corrkd" for e in ("happy", "sad", "angry", "neutral")]
    line = read_csv(tmp_path / "runs/iemocap/corrkd/s1/predictions.csv")[0]
    assert len(json.loads(line["answer"])) == len(json.loads(line["probability"])) == 4


def test_feature_folders_have_no_linear_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)         # not the folder in which the run is evaluated
    assert run_main("--method", "corrkd", "--out", tmp_path / "runs", "--epochs", 1, "--seeds", 1, "--device", "cpu",
                    *feature_arguments(Path("made"))) == 0
    monkeypatch.chdir(ROOT)
    out, _ = shown(capsys, tmp_path / "runs", "--rates", "0", "1")
    assert "WARNING" not in out and "no linear row" in out and "linear is" not in out
    assert "not standardised" not in out and "At 1.0 nothing" in out


def test_runs_in_one_folder_differ_in_their_seed_alone(copied, capsys):
    folder, checkpoint = copied
    for change, said in (({"seed": 7, "batch_size": 8}, "they differ in batch_size"), ({}, "the same seed")):
        (folder.parent / "s7").mkdir(exist_ok=True)
        torch.save({**checkpoint, "run": nested(checkpoint["run"], **change)}, folder.parent / "s7" / "model.pt")
        assert said in refused(capsys, folder.parent, "--no-rates")


def test_two_groups_of_one_name_are_told_apart_by_their_folder(copied, trained, capsys):
    other = trained / "runs/mosi/corrkd"
    out, tables = shown(capsys, copied[0], other, *RATES, "--csv", copied[0] / "t.csv")
    assert list(dict.fromkeys(x["name"] for x in read_csv(copied[0] / "t.csv")))[:2] == ["corrkd", f"corrkd [{other}]"]
    assert "n = 1 or 2" in out


def test_a_reason_to_read_the_numbers_with_care_is_told(copied, capsys):
    folder, checkpoint = copied
    torch.save({**checkpoint, "run": nested(checkpoint["run"], epochs=9, batch_size=64)}, folder / "model.pt")
    out, _ = shown(capsys, folder, "--no-rates")
    assert "not standardised" not in out and "simulated text" not in out and "the file that" not in out
    assert "note: seed 1 was stopped after 2 of 9 epochs" in out
    assert "note: other settings than the defaults: epochs 9" in out and "batch_size" not in out
    assert "nothing is compared with the paper" in out and ", paper" not in out
    torch.save({**checkpoint, "run": nested(checkpoint["run"], normalize=False)}, folder / "model.pt")
    assert "features not standardised" in shown(capsys, folder, "--no-rates")[0]


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
    row = tables["sets"]["F1 corrkd"]
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
    out, _ = shown(capsys, folder, *RATES, "--data-dir", written(tmp_path / "mine", made),
                   "--csv", tmp_path / "t.csv")
    first, second, third = out.splitlines()
    assert "has no labels" in first and second == "There are no numbers, so no --csv and no --plot is written."
    assert third == f"predictions.csv, every answer: in {folder}"
    assert not (folder / "results.json").exists() and not (tmp_path / "t.csv").exists()
    assert read_csv(folder / "predictions.csv") == [{**line, "truth": ""} for line in before]


def test_mistakes_are_told_before_the_evaluation(copied, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "evaluate_run", None)
    for more, said in ((["--csv", tmp_path / "nowhere/t.csv"], "folder cannot be written"),
                       (["--csv", copied[0] / "model.pt"], "does not end in .csv"), (["--csv", tmp_path], ".csv"),
                       (["--plot", "x.xyz"], ".png or .pdf")):
        with pytest.raises(SystemExit) as stop:
            evaluation.main([str(word) for word in (copied[0], *more)])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    for path in (tmp_path / "nowhere", __file__, ROOT / "tests"):
        assert "holds no model.pt" in refused(capsys, copied[0], path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(capsys, copied[0], "--plot", tmp_path / "x.png")


def test_a_reader_who_stops_reading_sees_no_traceback(copied):
    """As with | head."""
    command = f"{sys.executable} eval.py {copied[0]} --device cpu | head -2"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 2 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_run_on_mosei_is_evaluated_on_mosi_and_is_compared_with_nothing(tmp_path, comparable, monkeypatch, capsys):
    """The other way round too; emotions are refused."""
    sizes = {"mosi": (40, 30, 20), "mosei": (60, 50, 24), "iemocap": (80, 70, 90)}
    monkeypatch.setattr(data, "SIZES", sizes)
    for dataset, (n, valid, test) in sizes.items():
        made = smaller(learnable(n=100, emotions=dataset == "iemocap"), train=n, valid=valid, test=test)
        written(tmp_path / dataset / "data", made, data.FILES[dataset][0])
    for dataset, other in (("mosei", "mosi"), ("mosi", "mosei")):
        assert run(tmp_path / dataset, dataset=dataset, epochs="1") == 0
        top, csv_file = tmp_path / dataset / "runs", tmp_path / "t.csv"
        out, tables = shown(capsys, top, "--no-rates", "--data-dir", tmp_path / other / "data" / data.FILES[other][0],
                            "--csv", csv_file)
        where = f"trained on {dataset}, evaluated on {other}"
        assert f"corrkd {where}, test split" in out and ", paper" not in out and "of one data set" in out
        assert results(top / dataset / "corrkd/s1")["dataset"] == where
        assert results(top / dataset / "corrkd/s1")["conditions"]["l"]["n"] == sizes[other][2]
        assert {x["dataset"] for x in read_csv(csv_file)} == {where}
        error = refused(capsys, top, "--data-dir", tmp_path / "iemocap/data" / data.FILES["iemocap"][0])
        assert "the splits of iemocap, not of mosi or mosei. Name another file with --data-dir" in error
    assert run(tmp_path / "mosi", "--data-dir", tmp_path / "mosei/data" / data.FILES["mosei"][0], epochs="1") == 2


def test_the_f1_of_one_class_is_a_dash(copied, trained, tmp_path, capsys):
    """And such a split is noted above the table."""
    made = smaller(learnable(), valid=30, test=20)
    made["test"]["labels"] = abs(made["test"]["labels"])
    out, tables = shown(capsys, copied[0], "--no-rates", "--data-dir", written(tmp_path, made))
    assert "note: labels of one class alone in test" in out and tables["sets"] == {}
    assert results(copied[0])["conditions"]["l"]["F1"] is None


def test_a_block_of_long_clips_holds_fewer_of_them():
    for frames, clips in ((50, 256), (500, 43), (30_000, 1)):
        split = {"real": {m: torch.ones(1, frames) for m in STREAMS}}
        assert evaluation.clips_at_a_time(split) == clips


class Late(torch.nn.Module):
    """The poorest method that METHODS' comment allows: what is not in its state_dict has values all the same."""
    stages, encode = {"train": ("lav",)}, None

    def __init__(self, dims, task, config):
        super().__init__()
        self.task, self.scale = task, torch.tensor(2.0)
        self.register_buffer("one", torch.ones(1), persistent=False)
        self.linear = torch.nn.Linear(sum(dims[m] for m in STREAMS), 1 if task == "regression" else 2)

    def begin(self, stage):
        pass

    def teacher_outputs(self, complete, real):
        return None

    def represent(self, streams, real):
        return self.scale * self.one * torch.cat([streams[m].sum(1) for m in STREAMS], -1)

    def classify(self, h):
        return self.linear(h)

    def losses(self, complete, missing, target, real, teacher=None):
        error = (self.classify(self.represent(missing, real))[:, 0] - target.float()).square().mean()
        return {"total": error}


def test_a_fourth_method_with_a_buffer_and_nothing_to_list_trains_and_is_evaluated(tmp_path, monkeypatch, capsys):
    fourth = types.SimpleNamespace(
        TASKS=corrkd.TASKS, Config=corrkd.Config, PAPER=corrkd.PAPER, ABLATIONS={}, REPORTED={}, FEATURES={}, TABLE={},
        Model=Late)
    monkeypatch.setitem(evaluation.METHODS, "late", fourth)
    written(tmp_path / "data", learnable())
    assert run(tmp_path, method="late") == 0
    assert "F1 late" in shown(capsys, tmp_path / "runs", "--no-rates")[1]["sets"]


def test_what_a_record_says_is_printed_as_text(copied, capsys):
    folder, checkpoint = copied
    torch.save({**checkpoint, "run": {**checkpoint["run"], "seed": "1\x1b]0;hi\x07\n2"}}, folder / "model.pt")
    out, tables = shown(capsys, folder, "--no-rates")        # without numbers there is no second table
    assert tables["sets"] and not tables["rates"] and list(results(folder)["conditions"]) == list(data.SETS)
    assert "seeds 1 ]0;hi  2," in out and all(line.isprintable() for line in out.splitlines())


def test_the_figure_has_a_panel_for_each_metric(trained, tmp_path, comparable, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")      # as in a notebook
    axes, whole = [], figure.subplots
    monkeypatch.setattr(figure, "subplots", lambda *a, **k: (axes.append(whole(*a, **k)), axes[0])[1])
    shown(capsys, trained / "runs", *RATES, "--plot", tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    axis, = axes[0].flat
    assert axis.get_title() == "corrkd on mosi\ntest split, 19 clips"
    lines = {line.get_label(): line for line in axis.get_lines()}
    baselines = {"constant, polarity", "linear, polarity"}
    assert set(lines) == {"corrkd, 2 seeds", "corrkd no_scd, 2 seeds", "corrkd, paper", *baselines}
    assert {label for label, line in lines.items() if line.get_color() == "black"} == baselines
    found = [results(trained / f"runs/mosi/corrkd/s{s}")["conditions"] for s in (1, 2)]
    found = np.array([[one[p]["F1"] for p in ("0.0", "0.5", "0.8")] for one in found])
    np.testing.assert_allclose(lines["corrkd, 2 seeds"].get_data(), ([0, .5, .8], found.mean(0)))
    top = axis.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx((found.mean(0) + found.std(0, ddof=1)).max()) and axis.get_ylabel() == "weighted F1 (%)"
    assert lines["corrkd, paper"].get_data()[1] == 83.94 and len(axis.collections) == 2
