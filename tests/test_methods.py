"""What eval.py and train.py ask of a method file (the list beside METHODS), and what a reader who copies one is promised."""
import dataclasses
import inspect
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import data
import eval as evaluation
from data import STREAMS
from helpers import ROOT, program

WIDTHS = {"text": 12, "audio": 7, "vision": 5}


@pytest.mark.parametrize("name", evaluation.METHODS)
def test_a_method_file_offers_all_that_is_asked_of_it(name):
    """Names, signatures and return shapes; for each data set's task, each stage, and each ablation's config."""
    module = evaluation.METHODS[name]
    assert set(module.TASKS) == set(module.PAPER) == set(module.LISTED) == set(module.REPORTED) == set(data.SIZES) and set(module.FEATURES) == set(STREAMS)
    assert {"lr", "weight_decay", "batch_size", "epochs", "clip", "aligned"} <= {f.name for f in dataclasses.fields(module.Config)}
    assert all(isinstance(c, module.Config) for c in module.PAPER.values()) and set(module.TABLE) <= set(evaluation.COLUMNS)
    assert all(set(a) <= {f.name for f in dataclasses.fields(module.Config)} for a in module.ABLATIONS.values())
    for by_ablation in module.REPORTED.values():
        assert "" in by_ablation and set(by_ablation) <= {"", *module.ABLATIONS}
        assert all(set(row) <= set(evaluation.COLUMNS) for metrics in by_ablation.values() for row in metrics.values())
    assert all(isinstance(module.learning_rate_factor(e), float) for e in (0, 50))
    signature = lambda f: list(inspect.signature(f).parameters)
    assert signature(module.Model) == ["dims", "task", "config"] and signature(module.Model.losses) == ["self", "complete", "missing", "target", "real", "teacher"]
    assert signature(module.Model.represent) == ["self", "streams", "real"] and signature(module.Model.forward)[:5] == ["self", *STREAMS, "real"]
    real = {m: torch.arange(6).expand(8, 6) < 5 for m in STREAMS}
    x = {m: torch.randn(8, 6, d) * real[m][..., None] for m, d in WIDTHS.items()}
    for task in set(module.TASKS.values()):
        target, outputs = {"regression": (torch.randn(8), (8, 1)), "polarity": (torch.arange(8) % 2, (8, 2)), "emotions": (torch.arange(32).view(8, 4) % 2, (8, 4, 2))}[task]
        for ablation in ("", *module.ABLATIONS):
            model = module.Model(WIDTHS, task, dataclasses.replace(module.Config(), **module.ABLATIONS.get(ablation, {})))
            assert model.stages and all(sets and set(sets) <= set(data.SETS) for sets in model.stages.values())
            for stage in model.stages:
                model.begin(stage)
                assert {model.sees_missing, model.has_teacher} <= {True, False}
                teacher = model.eval().teacher_outputs(x, real) if model.has_teacher else None
                assert teacher is None or all(isinstance(t, torch.Tensor) and len(t) == 8 for t in teacher)
                blind = {m: v.new_full(v.shape, float("nan")) for m, v in x.items()}
                terms = model.train().losses(x, x if model.sees_missing else blind, target, real, teacher)
                assert "total" in terms and all(t.shape == () and t.isfinite() for t in terms.values())
                terms["total"].backward()
                h = model.eval().represent(x, real)
                assert h.ndim == 2 and len(h) == 8 and model.classify(h).shape == outputs
                torch.testing.assert_close(model(**x, real=real), model.classify(h), rtol=0, atol=0)
                if model.encode:
                    torch.testing.assert_close(torch.cat([model.encode(m, x[m], real[m]) for m in STREAMS], 1), h, rtol=0, atol=1e-6)
            with pytest.raises(ValueError, match="no stage 'pretraining'"):
                model.begin("pretraining")
        shape = list(target.shape if target.ndim > 1 else (8, 1))
        model = module.Model(WIDTHS, task).eval()
        column = target.reshape(shape)                              # MMSA's form of a score: the same losses
        one, other = (model.losses(x, x, t, real)["total"] for t in (target, column))
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        for wrong in (target[:4], torch.cat((column, column), 1)):
            with pytest.raises(ValueError, match=re.escape(f"target has shape {tuple(wrong.shape)}; these clips ask for {tuple(shape)}")):
                model.losses(x, x, wrong, real)
        with pytest.raises(ValueError, match="no vision among the streams"):
            model.losses(*[{m: x[m] for m in ("text", "audio")}] * 2, target, real)


WEIGHTS = {     # term -> the field of Config that is its weight; the others have weight 1
    "corrkd": {"scd": "scd", "cpd": "cpd", "rcd": "rcd", "kl": "kl"}, "umdf": {"rep": "rep", "resp": "resp"},
    "double_flow": dict(zip(("task_complete", "task_missing", "q_text", "c_text", "h", "rnc"), ("w1", "w2", "w3", "w4", "w5", "w6")))}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_counts_in_the_total(name):
    module, fields = evaluation.METHODS[name], WEIGHTS[name]
    config = module.Config(**{field: .3 + .1 * i for i, field in enumerate(fields.values())})
    task = module.TASKS["mosi"]
    model = module.Model(WIDTHS, task, config).eval()
    model.begin([*model.stages][-1])
    x = {m: torch.randn(8, 6, d) for m, d in WIDTHS.items()}
    terms = model.losses(x, {m: v * (torch.rand(8, 6, 1) < .5) for m, v in x.items()}, torch.arange(8) % 2 if task == "polarity" else torch.randn(8))
    assert set(fields) <= set(terms)
    weight = lambda term: getattr(config, fields[term]) if term in fields else float(term != "scd_active")
    assert terms.pop("total").item() == pytest.approx(sum(weight(k) * v.item() for k, v in terms.items()), rel=1e-5)


B, T = 8, 6     # where each method drops, in training, by the equations of its opening: shapes in the order of the calls
LAYER = [(B, T, 160), (B, T, 40)]
DROPS = {"corrkd": 3 * [(B, T, 40), *2 * [(B, T, 40), *LAYER]],
         "umdf": 3 * [(2 * B, T, 40), *2 * [(2 * B, T, 40), (2 * B, T, 160), (2 * B, T, 40)]] + 12 * [(2 * B, T, 40), (2 * B, T, 160), (2 * B, T, 40)],
         "double_flow": 3 * [(2 * B, T, 256), (2 * B, 256), *2 * [(2 * B, 256)]] + 2 * [(2 * B, 256)] + 7 * [(2 * B, 256)]
         + 3 * [(2 * B, T, 256), (2 * B, 7, 256), (2 * B, 7, 256), (2 * B, 7, 128)] + [(2 * B, 256), (2 * B, 128)]}


@pytest.mark.parametrize("name", DROPS)
def test_dropout_stands_where_the_equations_have_it(name, monkeypatch):
    """A recorder in dropout's place: what it is given, by shape, as often as it is written."""
    module, seen = evaluation.METHODS[name], []
    record = lambda self, x: (self.training and seen.append(tuple(x.shape)), x)[1]
    for kind in {getattr(module, "Dropout", None), getattr(module, "Half", None), torch.nn.Dropout} - {None}:
        monkeypatch.setattr(kind, "forward", record)
    model = module.Model(WIDTHS, module.TASKS["mosi"])
    model.begin([*model.stages][-1])
    x, target = {m: torch.randn(B, T, d) for m, d in WIDTHS.items()}, torch.arange(B) % 2 if name == "corrkd" else torch.randn(B)
    model.train().losses(x, x, target, None, *([model.teacher_outputs(x)] if model.has_teacher else []))
    assert sorted(seen) == sorted(DROPS[name])


FORMS = [("corrkd", "polarity", {}, False), ("umdf", "regression", {}, False), ("umdf", "emotions", {"aligned": False}, False),
         ("double_flow", "regression", {}, False), ("double_flow", "regression", {}, True)]      # the last: simulated text is carried


def made(name, task, changes, carried, n=5):
    """A model in double precision and evaluation mode, clips of several lengths with zeros behind, and their real masks."""
    torch.manual_seed(0)
    module, dims = evaluation.METHODS[name], {**WIDTHS, **({"simulated_text": 12} if carried else {})}
    model = module.Model(dims, task, dataclasses.replace(module.Config(), **changes)).double().eval()
    for p in model.parameters() if name == "double_flow" else ():       # as PyTorch draws them, all clips get nearly one answer
        p.data *= 1.9 if p.ndim > 1 else 1
    frames = dict.fromkeys(dims, 8) if name == "umdf" and not changes else dict(zip(dims, (9, 6, 8, 11)))
    length = {m: torch.randint(1, t + 1, (n, 1)) for m, t in frames.items()}
    if len(set(frames.values())) == 1:
        length = dict.fromkeys(dims, length["text"])
    real = {m: torch.arange(t) < length[m] for m, t in frames.items()}
    return model, {m: torch.randn(n, t, dims[m], dtype=torch.float64) * real[m][..., None] for m, t in frames.items()}, real


@pytest.mark.parametrize("form", FORMS)
def test_a_prediction_depends_neither_on_padding_nor_on_the_batch(form):
    model, x, real = made(*form)
    if len({v.shape[1] for v in x.values()}) > 1:
        x["vision"][3], real["vision"][3] = 0, False        # a clip without a frame in one stream
    if form[0] == "double_flow":
        x["text"][1] = 0                                    # a clip of the missing flow
    same = lambda got, expected: torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    expected = model(**x, real=real)
    for size in (20, 50):
        for front in (False, True):
            pad = lambda v: F.pad(v, [0] * 2 * (v.ndim - 2) + ([size - v.shape[1], 0] if front else [0, size - v.shape[1]]))
            same(model(**{m: pad(v) for m, v in x.items()}, real={m: pad(r) for m, r in real.items()}), expected)
    for i in (0, 1, 2, 4):      # alone, cut to its own length, without any mask; cut streams may agree in length by accident
        same(model(**{m: v[i:i + 1, :real[m][i].sum()] for m, v in x.items()}), expected[i:i + 1])
    order = torch.randperm(5)
    same(model(**{m: v[order] for m, v in x.items()}, real={m: r[order] for m, r in real.items()}), expected[order])
    noisy = {m: torch.where(real[m][..., None], v, 7.0) for m, v in x.items()}      # what stands in padding is not seen
    if form[0] != "double_flow":        # there it tells which flow a clip takes
        same(model(**noisy, real=real), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_dropped_frame_is_seen(form):
    """Zeros inside a clip count as positions; were they treated as padding, the clip would look shorter."""
    model, x, real = made(*form)
    real = {m: torch.ones_like(r) for m, r in real.items()}
    last = torch.tensor([x["text"].shape[1] - 1])
    dropped = {**x, "text": (x["text"] + 1).index_fill(1, last, 0.0)}
    shorter = {**real, "text": real["text"].index_fill(1, last, False)}
    assert (model(**dropped, real=real) - model(**dropped, real=shorter)).abs().max() > 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_a_model_can_learn_one_batch_in_each_stage(form, monkeypatch):
    """Without dropout. Complete clips; for Double-Flow also those whose text is missing."""
    module = evaluation.METHODS[form[0]]
    for kind in {getattr(module, "Dropout", None), getattr(module, "Half", None), torch.nn.Dropout} - {None}:
        monkeypatch.setattr(kind, "forward", lambda self, x: x)
    model, x, real = made(*form, n=6)
    model, x = model.float(), {m: v.float() for m, v in x.items()}
    target = {"polarity": torch.arange(6) % 2, "regression": torch.linspace(-2, 2, 6), "emotions": torch.arange(24).view(6, 4) // 3 % 2}[form[1]]
    for stage in model.stages:
        model.begin(stage)
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=5e-4 if form[0] == "double_flow" else 4e-3)
        for _ in range(60):
            optimizer.zero_grad()
            model.train().losses(x, x, target, real)["total"].backward()
            optimizer.step()
        for streams in (x, {**x, "text": x["text"] * 0})[:2 if form[0] == "double_flow" else 1]:
            answer = model.eval()(**streams, real=real)
            assert F.mse_loss(answer[:, 0], target) < .1 if form[1] == "regression" else torch.equal(answer.argmax(-1), target), stage


def test_the_programs_guess_nothing_of_a_method():
    for name in ("train.py", "eval.py"):
        code = (ROOT / name).read_text()
        assert not re.search(r"hasattr|getattr\(|inspect\.|\"(teacher|student)\"", code), name
        for method in evaluation.METHODS:
            assert not re.search(rf"^import.*\b{method}\b", code, re.M), name


USES = {    # what the ten lines of each opening leave open: a batch, and the shape of the last line's answer
    "corrkd": ("(streams, missing, torch.tensor([0, 1] * 4), real)", "logits", (8, 2)),
    "umdf": ("(streams, missing, torch.randn(8), real)", "sentiment", (8, 1)),
    "double_flow": ("(streams, torch.randn(8), real)", "sentiment", (8, 1))}


@pytest.mark.parametrize("name", USES)
def test_copied_alone_it_trains_by_its_docstring(tmp_path, name):
    """The file in an empty folder, the lines of its docstring as they stand, after the batches that they ask for."""
    batch, answer, shape = USES[name]
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    lines = re.search(r"Use in another code base.*?\n\n((    .*\n)+)", (ROOT / f"{name}.py").read_text())[1]
    (tmp_path / "use.py").write_text(f"""
import torch
from {name} import *
torch.manual_seed(0)
widths = {{"text": 300, "audio": 74, "vision": 35}}
streams = {{m: torch.randn(8, 6, d) for m, d in widths.items()}}
missing = {{m: x * (torch.rand(8, 6, 1) < .5) for m, x in streams.items()}}
real = {{m: torch.arange(6).expand(8, 6) < 5 for m in widths}}
batches = [{batch}] * 3
text, audio, vision = streams.values()
{chr(10).join(line[4:] for line in lines.splitlines())}
assert {answer}.shape == {shape} and {answer}.isfinite().all()
print("trained")
""")
    done = subprocess.run([sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.'); exec(open('use.py').read())"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "trained", done.stderr


def test_method_files_need_torch_alone():
    code = f"""import sys, torch
sys.path.insert(0, {str(ROOT)!r})
for name in ("umdf", "corrkd", "double_flow"):
    before = set(sys.modules)
    __import__(name)
    print(*set(sys.modules) - before)
    del sys.modules[name]       # so that one that imports another is seen"""
    for name, line in zip(("umdf", "corrkd", "double_flow"), program("-c", code, cwd="/").stdout.splitlines(), strict=True):
        assert {m.split(".")[0] for m in line.split()} - set(sys.stdlib_module_names) - {"torch"} == {name}
