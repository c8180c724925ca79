"""The README's results: every cell from the committed answers, by the repository's code and by a plain loop."""
import itertools

import numpy as np
import pytest

import answers
import data
import eval as evaluation
from helpers import ROOT

ABOUT, RUNS = answers.read()


def test_the_readme_shows_what_the_committed_answers_say():
    assert answers.tables() in (ROOT / "README.md").read_text()


def plain_metric(run, column, weights):
    """F1 or MAE of one run in a column, with each clip counted as often as weights say."""
    truth, numbers = run["clips"]["truth"], []
    for condition in (("l", "a", "v", "la", "lv", "av") if column == "avg" else (column,)):
        answer = run["clips"]["conditions"].get(condition)
        if answer is None:
            continue
        if run["run"]["task"] == "regression":
            numbers.append((abs(answer.astype(float) - truth) * weights).sum() / weights.sum())
            continue
        n = np.bincount(2 * truth + answer, weights, 4)         # truth and answer: no no, no yes, yes no, yes yes
        f1 = [2 * n[k] / max(2 * n[k] + n[1] + n[2], 1) for k in (0, 3)]
        numbers.append(100 * ((n[0] + n[1]) * f1[0] + (n[2] + n[3]) * f1[1]) / n.sum())
    return sum(numbers) / len(numbers) if numbers else float("nan")


@pytest.mark.parametrize("file", answers.FILES)
def test_a_plain_loop_over_clips_seeds_and_draws_finds_the_same_cells(file):
    """Means, deviations, n, intervals and whether they leave out 0. Draws of clips and seeds are the program's own."""
    runs, found = RUNS[file], {}
    some = next(iter(runs.values()))[0]
    draws = evaluation.draw_weights(some["clips"]["units"])

    def of(form, seed, column, k):
        """In draw k, or (None) on the test split as it is."""
        key = form, seed, column, k
        if key not in found:
            run, = [each for each in runs[form] if each["run"]["seed"] == (0 if form.startswith("linear") else seed)]
            weights = np.ones(len(draws[0])) if k is None else draws[k]
            found[key] = plain_metric(run, column, weights[run["clips"]["index"]])
        return found[key]
    rows = [(form, None, column) for form, column in answers.SCORES] + answers.DIFFERENCES
    for ours, subtracted, column in rows:
        if ours not in runs:
            assert answers.text(answers.row(runs, ours, subtracted or ""), column) == "not run"
            continue
        task = runs[ours][0]["run"]["task"]
        theirs = f"linear-{task}" if subtracted == "linear" else subtracted
        seeds = [run["run"]["seed"] for run in runs[ours]]
        if theirs and subtracted != "linear":
            seeds = [seed for seed in seeds if seed in [run["run"]["seed"] for run in runs[theirs]]]

        def number(seed, k):
            return of(ours, seed, column, k) - (of(theirs, seed, column, k) if theirs else 0)
        values = [number(seed, None) for seed in seeds]
        if np.isnan(values[0]):
            assert answers.text(answers.row(runs, ours, subtracted or ""), column) == "-"
            continue
        digits = 2 if task == "polarity" else 3 if theirs else 4
        expected = f"{sum(values) / len(values):{'+' if theirs else ''}.{digits}f}"
        if not theirs:
            expected += f"±{np.std(values, ddof=1):.{digits}f}"
        else:
            many = len(seeds)
            chosen = np.random.default_rng(1).multinomial(many, np.full(many, 1 / many), len(draws))
            means = [sum(count * number(seed, k) for seed, count in zip(seeds, chosen[k]) if count) / many
                     for k in range(len(draws))]
            low, high = np.percentile(means, (2.5, 97.5))
            expected += f" [{low:+.{digits}f},{high:+.{digits}f}]"
        expected += "" if len(values) == 5 else f" ({len(values)})"
        if theirs and (low > 0 or high < 0):
            expected = f"**{expected}**"
        assert answers.text(answers.row(runs, ours, subtracted or ""), column) == expected, (ours, subtracted, column)


def test_seeds_are_those_that_were_fixed_beforehand():
    for file, form in itertools.product(RUNS, set().union(*RUNS.values())):
        seeds = [run["run"]["seed"] for run in RUNS[file][form]]
        assert sorted(seeds) == ([0] if form.startswith("linear") else [1111, 1112, 1113, 1114, 1115])
    assert answers.FILE.stat().st_size < 600_000 and {"commit", "torch", "processor"} <= set(ABOUT)


def test_the_labels_are_mosis():
    h5py, path = pytest.importorskip("h5py"), ROOT.parent / "shared/data/mfn_mosi_labels/y_test.h5"
    if not path.is_file():
        pytest.skip("../shared/data/mfn_mosi_labels is not there: the answers' labels are not compared with MFN's")
    with np.load(answers.FILE) as arrays, h5py.File(path) as file:
        np.testing.assert_allclose(np.sort(arrays["official/labels"]), np.sort(file["data"][()]), rtol=0, atol=1e-6)
        assert len(arrays["clips400/labels"]) == 102 and len(arrays["official/labels"]) == data.SIZES["mosi"][2]


def test_the_printed_cells_below_a_constant_answer_are_those_that_corrkd_names():
    """Always "no" on IEMOCAP's test split, by its shares: weighted F1 = (1 - p) 2 (1 - p) / (2 - p)."""
    shares = {"happy": .144, "sad": .206, "angry": .241, "neutral": .409}
    comment, below = " ".join((ROOT / "corrkd.py").read_text().replace("\n    #", "").split()), []
    for emotion, p in shares.items():
        constant = 100 * (1 - p) * 2 * (1 - p) / (2 - p)
        cells = evaluation.METHODS["corrkd"].REPORTED["iemocap"][""][f"F1 {emotion}"]
        below += [f"{emotion} {evaluation.TITLES[c]} {number}" for c, number in cells.items() if number < constant]
        assert f"{constant:.1f} ({emotion})" in comment
    assert below and ", ".join(below) in comment
