"""What train.py and eval.py ask of a method file, and what a reader who copies one is promised, for all three."""
import dataclasses
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import corrkd
import double_flow
import umdf

METHODS = {"corrkd": corrkd, "umdf": umdf, "double_flow": double_flow}
ROOT = Path(__file__).resolve().parent.parent
STREAMS = ("text", "audio", "vision")
COLUMNS = ("l", "a", "v", "la", "lv", "av", "avg", "lav")
DIMS = {"text": 12, "audio": 7, "vision": 5}
CARRIED = {**DIMS, "simulated_text": 12}
UNALIGNED = {"text": 9, "audio": 6, "vision": 8, "simulated_text": 11}
ALIGNED = dict.fromkeys(CARRIED, 8)
FORMS = [("corrkd", "polarity", 2, DIMS), ("corrkd", "polarity", 3, DIMS), ("corrkd", "emotions", 2, DIMS),
         ("umdf", "regression", 2, DIMS), ("umdf", "polarity", 3, DIMS), ("umdf", "emotions", 2, DIMS),
         ("double_flow", "regression", 2, DIMS), ("double_flow", "polarity", 3, DIMS),
         ("double_flow", "emotions", 2, DIMS), ("double_flow", "regression", 2, CARRIED)]
ABLATIONS = [(name, ablation) for name, module in METHODS.items() for ablation in module.ABLATIONS]


def model_of(name, task=None, classes=2, dims=DIMS, **changes):
    """A model with fixed weights in its last stage; CorrKD's teacher is taken as trained. Double-Flow's matrices are
    enlarged: as PyTorch draws them, all clips get nearly the same answer."""
    module = METHODS[name]
    torch.manual_seed(0)
    config = dataclasses.replace(module.Config(), **changes)
    model = module.Model(dims, task or module.TASKS["mosi"], config, classes)
    if name == "corrkd":
        model.teacher.load_state_dict(model.teacher.state_dict())
    if name == "double_flow":
        for p in model.parameters():
            p.data *= 1.9 if p.ndim > 1 else 1
    model.begin([*model.stages][-1])
    return model


def clips(n=5, lengths=ALIGNED, dims=DIMS):
    """Streams in float64 and masks, at least one frame a clip; aligned streams share their masks."""
    g = torch.Generator().manual_seed(1)
    real = {m: torch.arange(lengths[m]) < torch.randint(1, lengths[m] + 1, (n, 1), generator=g) for m in dims}
    if lengths is ALIGNED:
        real = dict.fromkeys(dims, real["text"])
    return {m: torch.randn(n, lengths[m], d, generator=g).double() * real[m][..., None] for m, d in dims.items()}, real


def half_of(streams):
    """Copies with missing frames."""
    g = torch.Generator().manual_seed(2)
    return {m: x * (torch.rand(x.shape[:2], generator=g) < .5)[..., None] for m, x in streams.items()}


def target_of(task, classes=2, n=5):
    if task == "regression":
        return torch.linspace(-2, 2, n).double()
    return torch.arange(n) % classes if task == "polarity" else torch.arange(4 * n).reshape(n, 4) // 3 % classes


def numbers(terms):
    return {name: term.item() for name, term in terms.items()}


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0]}-{form[1]}-{form[2]}-{len(form[3])}")
def case(request):
    """A model in double precision and evaluation, clips of several lengths, their masks and targets. Streams are
    unaligned, but for UMDF's main form."""
    name, task, classes, dims = request.param
    aligned = request.param == FORMS[3]
    model = model_of(name, task, classes, dims, aligned=aligned).double().eval()
    return model, *clips(5, ALIGNED if aligned else UNALIGNED, dims), target_of(task, classes)


@pytest.mark.parametrize("name, module", METHODS.items())
def test_the_papers_numbers_stand_under_names_that_the_tables_have(name, module):
    assert set(module.TASKS) == set(module.PAPER) == set(module.REPORTED) == {"mosi", "mosei", "iemocap"}
    assert set(module.FEATURES) == set(STREAMS) and set(module.TABLE) <= set(COLUMNS)
    for by_ablation in module.REPORTED.values():
        assert "" in by_ablation and set(by_ablation) <= {"", *module.ABLATIONS}
        for metrics in by_ablation.values():
            assert all(set(row) <= set(COLUMNS) for row in metrics.values())


def test_a_model_is_what_the_programs_ask_for(case):
    model, x, real, target = case
    shape = {"regression": (5, 1), "polarity": (5, model.classes), "emotions": (5, 4, model.classes)}[model.task]
    for stage, sets in model.stages.items():
        assert sets and set(sets) <= set(COLUMNS) - {"avg"}
        model.begin(stage)
        teacher = model.eval().teacher_outputs(x, real)
        assert teacher is None or all(len(rows) == 5 for rows in teacher)
        terms = model.train().losses(x, half_of(x), target, real, teacher)
        assert "total" in terms and all(term.shape == () for term in terms.values())
        h = model.eval().represent(x, real)
        assert h.ndim == 2 and model.classify(h).shape == shape
        assert torch.equal(model(**x, real=real), model.classify(h))
        if model.encode:
            parts = [model.encode(m, x[m], real[m]) for m in STREAMS]
            torch.testing.assert_close(torch.cat(parts, 1), h, rtol=0, atol=1e-12)


TRAINS = {"teacher": "teacher.", "student": ("student.", "critics."), "train": ""}   # stage -> names of parameters


def test_after_one_step_every_parameter_that_a_stage_trains_has_moved_and_no_other(case):
    model, x, real, target = case
    for stage in model.stages:
        model.begin(stage)
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=1e-3, weight_decay=model.config.weight_decay)
        model.train().losses(x, half_of(x), target, real)["total"].backward()
        optimizer.step()
        for k, p in model.named_parameters():
            trains = k.startswith(TRAINS[stage])
            assert p.requires_grad is trains and torch.equal(p, before[k]) is not trains, (stage, k)


# ablation -> the terms that go, those that change, and the part of the network that goes
GOES = {"no_scd": {"scd"}, "no_cpd": {"cpd"}, "no_rcd": {"rcd"}, "kl": {"rcd"}, "teacher": {"scd", "cpd", "rcd"},
        "no_rep": {"rep"}, "no_resp": {"resp"}, "no_w3": {"q_text"}, "no_w4": {"c_text"}, "no_w5": {"h"},
        "no_rnc": {"rnc"}, "task_only": {"q_text", "c_text", "h", "rnc"},
        "no_distillation": {"scd", "cpd", "rcd", "rep", "resp", "q_text", "c_text"}}
MISSING_FLOW = {"task_missing", "q_text", "c_text", "h", "rnc"}
CHANGES = {"teacher": {"task"}, "scd_raw": {"scd"}, "mia_z": MISSING_FLOW, "no_mia": MISSING_FLOW,
           "complete_to_missing": {"rep", "resp"}, "missing_to_complete": {"rep", "resp"}}
PART = {"no_coarse": "coarse.", "no_fine": "fine.", "no_enhancement": "enhancement.", "no_filtering": "filtering.",
        "no_mia": "imagine."}


@pytest.mark.parametrize("name, ablation", [a for a in ABLATIONS if not a[1].startswith("layers")])
def test_each_ablation_changes_what_it_names_and_nothing_else(name, ablation):
    """What stays starts from the same weights and, where the network is whole, gives the same terms."""
    full, model = (model_of(name, **changes) for changes in ({}, METHODS[name].ABLATIONS[ablation]))
    expected = {k: v for k, v in full.state_dict().items() if not k.startswith(PART.get(ablation, "nothing"))}
    state = model.state_dict()
    assert set(state) == set(expected) and all(torch.equal(v, expected[k]) for k, v in state.items())
    x, real = clips()
    y = target_of(full.task)
    reference, terms = (numbers(m.double().eval().losses(x, half_of(x), y, real)) for m in (full, model))
    assert set(terms) - {"kl"} == set(reference) - GOES.get(ablation, set())
    assert ("kl" in terms) is (ablation == "kl")
    if name != "umdf" or ablation not in PART:
        changed = {k for k in set(terms) & set(reference) - {"total"} if terms[k] != reference[k]}
        assert changed == CHANGES.get(ablation, set())


B, T = 8, 6     # where each method drops, in training, by the equations of its opening: shapes, in any order
FFN, D40, D256 = [(2 * B, T, 160), (2 * B, T, 40)], [(2 * B, T, 40)], [(2 * B, 256)]
DROPS = {"corrkd": 3 * ([(B, T, 40)] + 2 * [(B, T, 40), (B, T, 160), (B, T, 40)]),
         "umdf": 3 * (D40 + 2 * (D40 + FFN)) + 12 * (D40 + FFN),
         "double_flow": 3 * ([(2 * B, T, 256)] + 3 * D256) + 2 * D256 + 7 * D256 + D256 + [(2 * B, 128)]
         + 3 * [(2 * B, T, 256), (2 * B, 7, 256), (2 * B, 7, 256), (2 * B, 7, 128)]}


@pytest.mark.parametrize("name", DROPS)
def test_dropout_stands_where_the_equations_have_it(name, monkeypatch):
    """A recorder in dropout's place: what it is given, by shape."""
    shapes = []

    def record(dropout, x):
        if dropout.training:
            shapes.append(tuple(x.shape))
        return x
    for kind in (torch.nn.Dropout, double_flow.Half):
        monkeypatch.setattr(kind, "forward", record)
    model, x = model_of(name), {m: torch.randn(B, T, d) for m, d in DIMS.items()}
    model.train().losses(x, x, target_of(model.task, n=B).to(torch.long if name == "corrkd" else torch.float32))
    assert sorted(shapes) == sorted(DROPS[name])


def test_an_answer_depends_on_neither_padding_nor_the_batch(case):
    """Padding in front and behind, and what stands in it, but in Double-Flow's text, where it tells which flow a clip
    takes; a clip alone, cut to its own length, without a mask."""
    model, x, real, _ = case
    noisy = {m: torch.where(real[m][..., None], v, 7.0) for m, v in x.items()}
    for streams in (x, noisy):
        streams["text"][1] = 0      # in Double-Flow a clip of the missing flow
    expected = model(**x, real=real)
    answers = [model(**noisy, real=real)]
    for size in (20, 50):
        for front in (True, False):
            def pad(v):
                more = [size - v.shape[1], 0] if front else [0, size - v.shape[1]]
                return F.pad(v, [0] * 2 * (v.ndim - 2) + more)
            answers.append(model(**{m: pad(v) for m, v in x.items()}, real={m: pad(r) for m, r in real.items()}))
    alone = []
    for i in range(5):
        alone.append(model(**{m: v[i:i + 1, :real[m][i].sum()] for m, v in x.items()}))
    for answer in (*answers, torch.cat(alone)):
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-12)


def test_a_missing_frame_is_seen(case):
    """Zeros inside a clip count as positions; were they padding, the clip would look shorter."""
    model, x, real, _ = case
    real = {m: torch.ones_like(r) for m, r in real.items()}
    last = torch.tensor([x["text"].shape[1] - 1])
    missing = {**x, "text": (x["text"] + 1).index_fill(1, last, 0.0)}
    shorter = {**real, "text": real["text"].index_fill(1, last, False)}
    assert (model(**missing, real=real) - model(**missing, real=shorter)).abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_masks_may_be_numbers(case, dtype):
    model, x, real, _ = case
    assert torch.equal(model(**x, real={m: r.to(dtype) for m, r in real.items()}), model(**x, real=real))


@pytest.mark.parametrize("n", [1, 3])
def test_every_loss_is_finite_with_its_gradient(case, n):
    """One clip; equal clips; equal labels; a stream without frames; all text missing."""
    model, x, real, target = case
    x = {m: v[:1].expand(n, -1, -1) for m, v in x.items()}
    real = {m: r[:1].expand(n, -1) & (m != "vision") for m, r in real.items()}
    target = target[1:2].expand(n, *target.shape[1:])
    terms = model.train().losses(x, {**x, "text": x["text"] * 0}, target, real)
    terms["total"].backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_trains_in_half_precision(name):
    if torch.__version__ < "2.2" and name == "umdf":
        pytest.skip("this torch has no squared error of bfloat16 on a CPU")
    model, (x, real) = model_of(name, "polarity").bfloat16(), clips()
    x = {m: v.bfloat16() for m, v in x.items()}
    terms = model.losses(x, half_of(x), target_of("polarity"), real)
    terms["total"].backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name, task, classes, dims", [FORMS[1], FORMS[3], FORMS[6]])
def test_a_model_can_learn_one_batch_in_each_stage(name, task, classes, dims, monkeypatch):
    """Without dropout. Complete clips; for Double-Flow also those whose text is missing."""
    for kind in (torch.nn.Dropout, double_flow.Half):
        monkeypatch.setattr(kind, "forward", lambda dropout, x: x)
    model, (x, real) = model_of(name, task, classes), clips()
    x, target = {m: v.float() for m, v in x.items()}, target_of(task, classes)
    target = target.float() if task == "regression" else target
    for stage in model.stages:
        model.begin(stage)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=5e-4 if name == "double_flow" else 4e-3)
        for _ in range(40):
            optimizer.zero_grad()
            model.train().losses(x, x, target, real)["total"].backward()
            optimizer.step()
        for streams in [x, {**x, "text": x["text"] * 0}][:2 if name == "double_flow" else 1]:
            answer = model.eval()(**streams, real=real)
            if task == "regression":
                assert F.mse_loss(answer[:, 0], target) < .1
            else:
                assert torch.equal(answer.argmax(-1), target), stage


@pytest.mark.parametrize("name, module", METHODS.items())
def test_other_streams_than_the_three_are_refused_and_zeros_of_width_1_may_stand_for_one(name, module):
    for dims in ({"text": 12, "audio": 7}, {**DIMS, "depth": 3}):
        x = {m: torch.randn(2, 4, d) for m, d in dims.items()}
        for mistake in (lambda: module.Model(dims, module.TASKS["mosi"]), lambda: model_of(name).represent(x)):
            with pytest.raises(ValueError, match="dict of text, audio, vision: give zeros of width 1"):
                mistake()
    x, real = clips()
    for wrong in (torch.ones(5, 8), {m: real[m] for m in ("text", "audio")}):
        with pytest.raises(ValueError, match="real must be a dict of text, audio, vision"):
            model_of(name).double().represent(x, wrong)
        with pytest.raises(ValueError, match="real must be a dict of text, audio, vision"):
            model_of(name).double().losses(x, x, target_of(model_of(name).task), wrong)
    model, (x, real) = model_of(name, dims={**DIMS, "vision": 1}).double(), clips()
    x["vision"] = x["vision"][..., :1] * 0
    assert model.losses(x, half_of(x), target_of(model.task), real)["total"].isfinite()


def test_a_target_of_another_shape_is_refused(case):
    """A column (N, 1), MMSA's form of a score, is taken."""
    model, x, real, target = case
    column = target.reshape(5, -1)
    assert torch.equal(*(model.losses(x, x, t, real)["total"] for t in (target, column)))
    for wrong in (target[:4], torch.cat((column, column), 1)):
        message = f"target has shape {tuple(wrong.shape)}; these clips ask for {tuple(column.shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            model.losses(x, x, wrong, real)


MISTAKES = [("corrkd", "regression", {}, "not 'regression'"), ("umdf", "sentiment", {}, "not 'sentiment'"),
            ("double_flow", "sentiment", {}, "not 'sentiment'"), ("double_flow", None, {"mia": "x"}, "x_t, z or off"),
            ("corrkd", None, {"heads": 7}, "no multiple of"), ("umdf", None, {"heads": 7}, "no multiple of"),
            ("corrkd", None, {"width": 35, "heads": 5}, "not even"),
            ("umdf", None, {"width": 35, "heads": 5}, "not even")]


@pytest.mark.parametrize("name, task, changes, message", MISTAKES)
def test_a_model_and_a_stage_that_cannot_be_are_refused(name, task, changes, message):
    with pytest.raises(ValueError, match=message):
        model_of(name, task, **changes)
    with pytest.raises(ValueError, match="no stage 'pretraining'"):
        model_of(name).begin("pretraining")


# method, the batch that its opening asks for, the name and shape of the last line's answer
USES = [("corrkd", ("streams", "missing", "classes", "real"), "logits", (8, 2)),
        ("umdf", ("streams", "missing", "y", "real"), "sentiment", (8, 1)),
        ("double_flow", ("streams", "y", "real"), "sentiment", (8, 1))]


@pytest.mark.parametrize("name, batch, answer, shape", USES)
def test_copied_alone_it_trains_by_its_docstring(tmp_path, name, batch, answer, shape):
    """The file in an empty folder, and the lines of its docstring as they stand."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    names = runpy.run_path(str(tmp_path / f"{name}.py"))
    lines = re.search(r"Use in another code base.*?\n\n((    .*\n)+)", names["__doc__"])[1]
    streams = {m: torch.randn(8, 6, d) for m, d in {"text": 300, "audio": 74, "vision": 35}.items()}
    given = {"streams": streams, "missing": half_of(streams), "y": torch.randn(8), "classes": torch.arange(8) % 2,
             "real": {m: torch.arange(6).expand(8, 6) < 5 for m in streams}}
    names |= {**streams, "real": given["real"], "batches": [tuple(given[part] for part in batch)] * 2}
    exec(textwrap.dedent(lines), names)
    assert names[answer].shape == shape and names[answer].isfinite().all()


def test_each_method_file_needs_torch_and_the_standard_library_alone():
    code = f"""import sys, torch
sys.path.insert(0, {str(ROOT)!r})
for name in {list(METHODS)}:
    before = set(sys.modules)
    __import__(name)
    print(*set(sys.modules) - before)
    del sys.modules[name]       # so that one that imports another is seen"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    for name, line in zip(METHODS, done.stdout.splitlines(), strict=True):
        modules = {m.split(".")[0] for m in line.split()}
        assert modules - set(sys.stdlib_module_names) - {"torch"} == {name}


def test_similarities_under_autocast_and_a_half_precision_critics_scores_are_full_precision():
    """Prototype similarities that differ by little, and a sum over more pairs than half precision can hold."""
    torch.manual_seed(0)
    teacher = torch.randn(64, 120)
    student, labels = teacher + .003 * torch.randn(64, 120), torch.arange(64) % 2
    exact = corrkd.prototype_consistency(student, teacher, labels, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close = corrkd.prototype_consistency(student, teacher, labels, 2)
    torch.testing.assert_close(close, exact, rtol=1e-4, atol=0)
    responses = torch.rand(400, 1)
    information = corrkd.jsd_mutual_information(lambda pairs: pairs[..., :1].half(), responses, responses)
    assert information.isfinite()


@pytest.mark.parametrize("name", METHODS)
def test_missing_copies_that_lack_a_stream_and_one_class_are_refused(name):
    model = model_of(name)
    x = {m: torch.randn(4, 6, d) for m, d in DIMS.items()}
    if name != "double_flow":               # which has no use for the missing copies
        with pytest.raises(ValueError, match="text, audio"):
            model.losses(x, {m: x[m] for m in ("text", "audio")}, torch.zeros(4).long())
    with pytest.raises(ValueError, match="classes must be 2 or more, not 1"):
        model_of(name, "polarity", classes=1)


def test_stored_outputs_of_a_teacher_get_no_gradient():
    model = corrkd.CorrKD(DIMS, "polarity", corrkd.Config(kl=1.0))
    with pytest.warns(UserWarning):
        model.begin("student")
    x = {m: torch.randn(6, 5, d) for m, d in DIMS.items()}
    stored = [output.requires_grad_() for output in model.teacher_outputs(x)]
    model.losses(x, x, torch.arange(6) % 2, None, stored)["total"].backward()
    assert all(output.grad is None for output in stored)
