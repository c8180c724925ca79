"""What train.py and eval.py ask of each method file in METHODS, and what a reader who copies one of our three is
promised."""
import dataclasses
import re
import runpy
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import corrkd
import double_flow
import umdf
from eval import METHODS
from helpers import equal

OURS = {"corrkd": corrkd, "umdf": umdf, "double_flow": double_flow}
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
MORE = [(name, task, 2, DIMS) for name in METHODS.keys() - OURS for task in sorted({*METHODS[name].TASKS.values()})]

# What the tests count on, so that defaults may be edited; those of the papers have tests of their own.
NETWORK = {"width": 40, "heads": 10, "layers": 2}
SETTINGS = {
    "corrkd": {**NETWORK, "margin": 1.2, "scd": 1.0, "cpd": 1.0, "rcd": 1.0},
    "umdf": {**NETWORK, "rep": 1.0, "resp": 1.0},
    "double_flow": {"mia": "x_t", "temperature": 2.0, "w1": .5, "w2": .5, "w3": .1, "w4": .7, "w5": .13, "w6": .5}}
ours = pytest.mark.parametrize("case", FORMS, indirect=True)    # a promise that METHODS does not ask for


def model_of(name, task=None, classes=2, dims=DIMS, **changes):
    """A model with fixed weights in its last stage; CorrKD's teacher is taken as trained. Double-Flow's matrices are
    enlarged: as PyTorch draws them, all clips get nearly the same answer."""
    module = METHODS[name]
    torch.manual_seed(0)
    config = dataclasses.replace(module.Config(), **{**SETTINGS.get(name, {}), **changes})
    model = module.Model(dims, task or module.TASKS["mosi"], config, *[classes][:name in OURS])
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


@pytest.fixture(params=FORMS + MORE, ids=lambda form: f"{form[0]}-{form[1]}-{form[2]}-{len(form[3])}")
def case(request):
    """A model in double precision and evaluation, clips of several lengths, their masks and targets. Streams are
    unaligned, but for UMDF's main form."""
    name, task, classes, dims = request.param
    aligned = request.param == FORMS[3]
    model = model_of(name, task, classes, dims, aligned=aligned).double().eval()
    return model, *clips(5, ALIGNED if aligned else UNALIGNED, dims), target_of(task, classes)


@pytest.mark.parametrize("name, module", METHODS.items())
def test_the_papers_numbers_stand_under_names_that_the_tables_have(name, module):
    assert set(module.REPORTED) <= set(module.TASKS) == set(module.PAPER) <= {"mosi", "mosei", "iemocap"}
    assert set(module.FEATURES) <= set(STREAMS) and set(module.TABLE) <= set(COLUMNS)
    for by_ablation in module.REPORTED.values():
        assert "" in by_ablation and set(by_ablation) <= {"", *module.ABLATIONS}
        for metrics in by_ablation.values():
            assert all(set(row) <= set(COLUMNS) for row in metrics.values())


def test_a_model_is_what_the_programs_ask_for(case):
    model, x, real, target = case
    shape = (5, 1) if target.is_floating_point() else (*target.shape, getattr(model, "classes", 2))
    for stage, sets in model.stages.items():
        assert sets and set(sets) <= set(COLUMNS) - {"avg"}
        model.begin(stage)
        teacher = model.eval().teacher_outputs(x, real)
        assert teacher is None or all(len(rows) == 5 for rows in teacher)
        terms = model.train().losses(x, half_of(x), target, real, teacher)
        assert "total" in terms and all(term.shape == () for term in terms.values())
        h = model.eval().represent(x, real)
        assert h.ndim == 2 and model.classify(h).shape == shape
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
        optimizer = torch.optim.Adam(learning, lr=1e-3)
        model.train().losses(x, half_of(x), target, real)["total"].backward()
        optimizer.step()
        for k, p in model.named_parameters():
            assert torch.equal(p, before[k]) is not p.requires_grad, (stage, k)
            assert type(model).__module__ not in OURS or p.requires_grad is k.startswith(TRAINS[stage]), (stage, k)


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


@pytest.mark.parametrize("name, ablation", [(name, ablation) for name in OURS for ablation in OURS[name].ABLATIONS
                                            if ablation in GOES | CHANGES | PART])
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


@pytest.mark.parametrize("name", OURS)
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


@pytest.mark.filterwarnings("ignore:real leaves out frames")
def test_an_answer_depends_on_neither_padding_nor_the_batch(case):
    """Padding in front and behind, and what stands in it, but in Double-Flow's text, where it tells which flow a clip
    takes; a clip alone, cut to its own length."""
    model, x, real, _ = case
    noisy = {m: torch.where(real[m][..., None], v, 7.0) for m, v in x.items()}
    for streams in (x, noisy):
        streams["text"][1] = 0      # in Double-Flow a clip of the missing flow

    def answer(streams, real):
        return model.classify(model.represent(streams, real))
    expected, answers = answer(x, real), [answer(noisy, real)]
    for front, behind in ((30, 0), (0, 30), (0, 7)):
        def pad(v):
            return F.pad(v, [0] * 2 * (v.ndim - 2) + [front, behind])
        answers.append(answer({m: pad(v) for m, v in x.items()}, {m: pad(r) for m, r in real.items()}))
    alone = []
    for i in range(5):
        cut = {m: slice(real[m][i].sum()) for m in x}
        alone.append(answer(*({m: v[i:i + 1, cut[m]] for m, v in part.items()} for part in (x, real))))
    for got in (*answers, torch.cat(alone)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@ours
def test_forward_is_both_parts_takes_masks_of_numbers_and_none_and_sees_a_missing_frame(case):
    """Zeros inside a clip count as positions; were they padding, the clip would look shorter."""
    model, x, real, target = case
    expected = model.classify(model.represent(x, real))
    for dtype in (torch.uint8, torch.float32):
        mask = {m: r.to(dtype) for m, r in real.items()}
        assert torch.equal(model(**x, real=mask), expected)
        model.first_batch = True        # when masks are compared with the clips
        with warnings.catch_warnings(action="error"):
            model.losses(x, half_of(x), target, mask)
    model.first_batch = True
    with pytest.warns(UserWarning, match="real leaves out frames"):     # of one stream
        model.losses(x, half_of(x), target, {**real, "vision": real["vision"].flip(1)})
    whole = {m: torch.ones_like(r) for m, r in real.items()}
    assert torch.equal(model(**x), model(**x, real=whole))
    last = torch.tensor([x["text"].shape[1] - 1])
    missing = {**x, "text": (x["text"] + 1).index_fill(1, last, 0.0)}
    shorter = {**whole, "text": whole["text"].index_fill(1, last, False)}
    assert (model(**missing, real=whole) - model(**missing, real=shorter)).abs().max() > 1e-5


@pytest.mark.filterwarnings("ignore:real leaves out frames")
@pytest.mark.parametrize("n", [1, 3])
def test_every_loss_is_finite_with_its_gradient(case, n):
    """One clip, which leaves no parameter without a gradient either, as DistributedDataParallel asks; equal clips;
    equal labels; a stream without frames; all text missing."""
    model, x, real, target = case
    x = {m: v[:1].expand(n, -1, -1) for m, v in x.items()}
    real = {m: r[:1].expand(n, -1) & (m != "vision") for m, r in real.items()}
    target = target[1:2].expand(n, *target.shape[1:])
    terms = model.train().losses(x, {**x, "text": x["text"] * 0}, target, real)
    terms["total"].backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", OURS)
def test_a_model_trains_in_half_precision_and_with_zeros_of_width_1_for_a_stream(name):
    if torch.__version__ < "2.2" and name == "umdf":
        pytest.skip("this torch has no squared error of bfloat16 on a CPU")
    model, (x, real) = model_of(name, "polarity", dims={**DIMS, "vision": 1}).bfloat16(), clips()
    x = {m: v.bfloat16() for m, v in {**x, "vision": x["vision"][..., :1] * 0}.items()}
    model.losses(x, half_of(x), target_of("polarity"), real)["total"].backward()
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
            wrong = answer[:, 0] - target if task == "regression" else answer.argmax(-1) != target
            assert wrong.double().square().mean() < .1, stage


@ours
def test_a_target_or_a_mask_of_another_shape_and_other_streams_are_refused(case):
    """A column (N, 1), MMSA's form of a score, is taken; a flag for each clip is no mask."""
    model, x, real, target = case
    column = target.reshape(5, -1)
    assert torch.equal(*(model.losses(x, x, t, real)["total"] for t in (target, column)))
    for wrong in (target[:4], torch.cat((column, column), 1)):
        message = f"target has shape {tuple(wrong.reshape(len(wrong), -1).shape)}, not {tuple(column.shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            model.losses(x, x, wrong, real)
    flag = {**real, "audio": real["audio"][:, :1]}
    shape = f"has shape (5, 1), not {tuple(real['audio'].shape)}"
    for mask, message in ((flag, shape), (real["audio"], "real must be a dict of text, audio, vision")):
        for mistake in (lambda: model.represent(x, mask), lambda: model.losses(x, x, target, mask)):
            with pytest.raises(ValueError, match=re.escape(message)):
                mistake()
    two, four = {m: x[m] for m in ("text", "audio")}, {**x, "video": x["vision"]}
    for mistake in (lambda: type(model)({"text": 12, "audio": 7}, model.task), lambda: model.represent(two, real),
                    lambda: model.represent(four, real)):
        with pytest.raises(ValueError, match="dict of text, audio, vision: give zeros of width 1"):
            mistake()


scd, cpd, rcd = corrkd.sample_contrastive, corrkd.prototype_consistency, corrkd.response_consistency
Z, Y, CRITICS = torch.zeros, torch.arange(6) % 2, [corrkd.critic_of(1)] * 2
MISFITS = [
    (lambda: scd(Z(6, 5), Z(1, 5), 1.2), "(1, 5), not (6, 5)"),
    (lambda: cpd(Z(6, 5), Z(4, 5), Y, 2), "(4, 5), not"),
    (lambda: cpd(Z(6, 5), Z(6, 7), Y[:4], 2), "(4,), not (6,)"),
    (lambda: rcd(CRITICS, Z(6, 2), Z(7, 2), Y), "(7, 2)"),
    (lambda: rcd(CRITICS, Z(6, 2), Z(6, 2), Y[:, None]), "(6, 1), not (6,)"),
    (lambda: double_flow.rank_n_contrast(Z(6, 5), Z(8)), "(8,), not"),
    (lambda: double_flow.rmse(Z(6, 1), Z(6)), "(6,), not"),
    (lambda: umdf.both_ways(F.mse_loss, Z(6, 1), Z(6)), "(6,)"),
    (lambda: umdf.divergence(Z(6, 2), Z(1, 2)), "(1, 2)"),
    (lambda: corrkd.jsd_mutual_information(CRITICS[0], Z(6, 1), Z(1, 1)), "(1, 1), not (6, 1)"),
]
MISTAKES = [
    (lambda: model_of("corrkd", "regression"), "must be one of polarity, emotions, not 'regression'"),
    (lambda: model_of("umdf", "sentiment"), "must be one of regression, polarity, emotions, not 'sentiment'"),
    (lambda: model_of("double_flow", "sentiment"), "must be one of regression, polarity, emotions, not 'sentiment'"),
    (lambda: model_of("double_flow", mia="x"), "x_t, z or off"),
    (lambda: model_of("corrkd", heads=7), "width 40 is not even or no multiple of heads (7)"),
    (lambda: model_of("umdf", heads=7), "width 40 is not even or no multiple of heads (7)"),
    (lambda: model_of("corrkd", width=35, heads=5), "not even"),
    (lambda: model_of("umdf", width=35, heads=5), "not even"),
]
for each in OURS:
    MISTAKES.append((lambda name=each: model_of(name).begin("pretraining"), "no stage 'pretraining'"))
    MISTAKES.append((lambda name=each: model_of(name, "polarity", 1), "classes must be 2 or more, not 1"))


@pytest.mark.parametrize("call, message", MISTAKES + [(call, f"has shape {said}") for call, said in MISFITS])
def test_a_mistake_is_refused_in_a_sentence_and_shapes_that_do_not_match_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# method, the name of the last line's answer, and a batch's targets
USES = [("corrkd", "logits", torch.arange(8) % 2), ("umdf", "sentiment", torch.randn(8)),
        ("double_flow", "sentiment", torch.randn(8))]


@pytest.mark.parametrize("name, answer, target", USES)
def test_copied_alone_it_trains_by_its_docstring(tmp_path, monkeypatch, name, answer, target):
    """The file in an empty folder, with three epochs, and the lines of its docstring as they stand, with a recorder in
    clipping's place and without random numbers that differ by the place of a frame: clips padded behind and in front,
    as its opening says how, end with equal answers; each epoch trains, with dropout on and at its learning rate; the
    first of the best epochs is kept; masks for the other end warn once."""
    source = (ROOT / f"{name}.py").read_text()
    assert {*re.findall(r"^ *(?:import|from) (\w+)", source, re.M)} - sys.stdlib_module_names == {"torch"}
    (tmp_path / f"{name}.py").write_text(re.sub(r"epochs: int = \d+", "epochs: int = 3", source))
    names = runpy.run_path(str(tmp_path / f"{name}.py"))
    lines = re.search(r"Use in another code base.*?\n\n(    .*?\n)\n(?=\S)", names["__doc__"], re.S)[1]
    states, trained_in, answers, clipped = [], set(), [], []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: clipped.append(norm))

    def validate(model, sets):
        assert len(caught) == warns             # at the first batch, not at the first answer
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return [0.0, 1.0, 1.0][(len(states) - 1) % 3]

    def no_dropout(dropout, x):
        trained_in.update({len(states)} if dropout.training else ())
        return x
    for kind in (torch.nn.Dropout, names.get("Half", double_flow.Half)):
        monkeypatch.setattr(kind, "forward", no_dropout)
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    streams = {m: torch.randn(8, 6, d) for m, d in {"text": 300, "audio": 74, "vision": 35}.items()}
    said, sizes = re.findall(r"torch\.arange\(T\)[^,.]*?lengths\[:, None\]", names["__doc__"]), torch.arange(1, 9)
    behind, front = (eval(mask, {"torch": torch, "T": 6, "lengths": sizes.clamp(max=6)}) for mask in said)
    wrong = lines.replace("n.cumsum(1) * n.flip(1).cumsum(1).flip(1) > 0", "torch.arange(6) < n.sum(1)[:, None]")
    for place, code, warns in ((behind, lines, 0), (front, lines, 0), (front, wrong, 1)):
        x = {m: torch.zeros_like(v).masked_scatter(place[..., None], v[behind]) for m, v in streams.items()}
        torch.manual_seed(0)
        names |= {**x, "validate": validate, "batches": [(x, target)] * 2}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(textwrap.dedent(code), names)
        assert [str(w.message)[:22] for w in caught] == ["real leaves out frames"] * warns
        assert equal(names["model"].state_dict(), states[-2]) and not equal(states[-3], states[-1])
        answers.append(names[answer])
    c, factor, optimizer = names["c"], names["learning_rate_factor"] or (lambda epoch: 1), names["optimizer"]
    assert clipped == [c.clip] * len(clipped) and len(clipped) == (2 * len(states) if c.clip else 0)
    assert optimizer.defaults["weight_decay"] == c.weight_decay
    assert optimizer.param_groups[0]["lr"] == pytest.approx(c.lr * factor(2))
    assert front.flip(1).equal(behind) and not front[0, :5].any()
    assert trained_in == set(range(len(states))) and answers[0].shape == (8, 2 if name == "corrkd" else 1)
    torch.testing.assert_close(*answers[:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["corrkd", "umdf"])
def test_the_copies_that_an_opening_draws(name):
    """Clips of one and of ten frames: each of the seven sets; of ten frames .55 on average, .005 more by the one that
    always stays, with a rate for each stream; whole frames or zeros; no empty copy."""
    lines = re.search(r"\n( +missing, sets = .*?)\n +optimizer", METHODS[name].__doc__, re.S)[1]
    real = dict.fromkeys(STREAMS, torch.arange(10) >= 9 * torch.arange(8000)[:, None] % 18)
    names = {"torch": torch, "real": real, "complete": {m: real[m][..., None] * torch.ones(5) for m in STREAMS}}
    torch.manual_seed(0)
    exec(textwrap.dedent(lines), names)
    kept = torch.stack([names["missing"][m].mean(-1) for m in STREAMS])         # (3, 8000, 10)
    sets, count = kept.any(-1).T.unique(dim=0, return_counts=True)
    share = kept[:, ::2].mean(-1)[:, kept[:, ::2].any(-1).all(0)]       # of ten frames, in copies of all streams
    assert set(kept.unique().tolist()) == {0.0, 1.0} and sets.any(1).all()
    assert len(sets) == 7 and (count / 8000 - 1 / 7).abs().max() < .02
    assert abs(share.mean() - .555) < .03 and (torch.corrcoef(share) - torch.eye(3)).abs().max() < .15
    if without_vision := re.search(r"without vision .*randint_like\(\.\.\., (1, \d)\)", METHODS[name].__doc__):
        exec(textwrap.dedent(lines.replace("1, 8)", f"{without_vision[1]})")), names)
        kept = torch.stack([names["missing"][m].any(-1).any(-1) for m in STREAMS])
        assert len(kept.T.unique(dim=0)) == 3 and not kept[2].any()


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
