"""corrkd.py against loops written from its equations, and the properties that its docstring promises."""
import copy
import math
import warnings
from functools import partial

import pytest
import torch

import corrkd
import test_methods
import umdf
from test_methods import UNALIGNED, half_of, numbers, target_of

model_of = partial(test_methods.model_of, "corrkd")
clips = partial(test_methods.clips, lengths=UNALIGNED)
SETTLED = corrkd.Config(**test_methods.SETTINGS["corrkd"])
TASKS = [("polarity", 2, 1), ("polarity", 3, 1), ("emotions", 2, 4)]     # task, classes C, decisions G


def softplus(z):
    return math.log1p(math.exp(-abs(z))) + max(z, 0)


def information(critic, a, b):
    """(8) by a loop."""
    first, second, last = (layer for layer in critic if isinstance(layer, torch.nn.Linear))
    n, total = len(a), 0.0
    for i in range(n):
        for j in range(n):
            score = last(second(first(torch.cat((a[i], b[j]))).relu()).relu()).item()
            total += -softplus(-score) / n if i == j else -softplus(score) / (n * (n - 1))
    return total


@pytest.mark.parametrize("margin", [0.3, 1.2, 20.0])
def test_sample_contrastive_is_equation_4(margin):
    s, t = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    s[2], t[4] = t[2], s[1]     # a positive pair and a negative pair at distance 0
    expected = 0.0
    for i in range(6):
        expected += math.dist(s[i], t[i]) ** 2 / 6
        for j in range(6):
            if i != j:
                expected += max(0.0, margin - math.dist(s[i], t[j])) ** 2 / 30
    assert corrkd.sample_contrastive(s, t, margin, normalize=False).item() == pytest.approx(expected, rel=1e-12)
    unit_s, unit_t = s / s.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
    expected = corrkd.sample_contrastive(unit_s, unit_t, margin, normalize=False)
    torch.testing.assert_close(corrkd.sample_contrastive(s, 3 * t, margin), expected)


@pytest.mark.parametrize("labels", [[0, 1, 3, 1, 0, 3, 3], [2] * 7, [0, 1, 2, 3, 0, 1, 2]])
def test_prototype_consistency_is_equations_5_and_6(labels):
    """The first batch lacks a class, the second has one alone: what is absent is left out."""
    s, t = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 6, dtype=torch.float64)
    total = 0.0
    for k in set(labels):
        members = [j for j in range(7) if labels[j] == k]
        c_s, c_t = s[members].mean(0), t[members].mean(0)
        for i in range(7):
            m_s = float(s[i] @ c_s) / float(s[i].norm() * c_s.norm())
            m_t = float(t[i] @ c_t) / float(t[i].norm() * c_t.norm())
            total += (m_s - m_t) ** 2
    got = corrkd.prototype_consistency(s, t, torch.tensor(labels), 4)
    assert got.item() == pytest.approx(total / (7 * len(set(labels))), rel=1e-12)


@pytest.mark.parametrize("classes", [2, 4])
def test_response_consistency_is_equations_7_to_9(classes):
    critics = corrkd.critic_of(1).double(), corrkd.critic_of(classes - 1).double()
    r, r_t = (torch.rand(5, classes, dtype=torch.float64) for _ in range(2))
    y = torch.randint(0, classes, (5,))
    u, u_t, v, v_t = [], [], [], []
    for i in range(5):
        others = [c for c in range(classes) if c != y[i]]
        u.append(r[i, y[i]].reshape(1))
        u_t.append(r_t[i, y[i]].reshape(1))
        v.append(r[i, others])
        v_t.append(r_t[i, others])
    expected = -information(critics[0], u_t, u) - information(critics[1], v_t, v)
    assert corrkd.response_consistency(critics, r, r_t, y).item() == pytest.approx(expected, rel=1e-12)


CRITICS = corrkd.critic_of(1), corrkd.critic_of(2)
LOSSES = [lambda s, t: corrkd.sample_contrastive(s, t, 1.2),
          lambda s, t: corrkd.prototype_consistency(s, t, torch.arange(6) % 3, 3),
          lambda s, t: corrkd.response_consistency(
              CRITICS, s.float()[:, :3].softmax(1), t.float()[:, :3].softmax(1), torch.arange(6) % 3)]


@pytest.mark.parametrize("loss", LOSSES[:2])
def test_a_row_of_zeros_gets_a_gradient_of_plain_size(loss):
    h, t = torch.randn(6, 5), torch.randn(6, 5)
    h[2] = 0
    h.requires_grad_()
    loss(h, t).backward()
    assert h.grad.isfinite().all() and 0 < h.grad[2].norm() < 10


@pytest.mark.parametrize("task, classes, decisions", TASKS)
def test_the_total_is_equation_10_written_out(task, classes, decisions):
    """With KL as well, which the ablation has in the place of RCD."""
    weights = {"scd": .3, "cpd": .4, "rcd": .6, "kl": .7}
    model, (complete, real) = model_of(task, classes, dropout=0.0, margin=0.9, **weights).double(), clips()
    missing, target = half_of(complete), target_of(task, classes)
    h, f = model.student(missing, real)
    h_t, f_t = model.teacher(complete, real)
    y = target.reshape(5, decisions)
    r, r_t = (x.detach().view(5, decisions, classes).softmax(-1) for x in (f, f_t))
    expected = {"task": 0.0, "scd": corrkd.sample_contrastive(h, h_t, 0.9).item(), "cpd": 0.0,
                "rcd": 0.0, "kl": 0.0}
    for g in range(decisions):
        rcd = corrkd.response_consistency(model.critics, r[:, g], r_t[:, g], y[:, g])
        expected["rcd"] += rcd.item() / decisions
        expected["cpd"] += corrkd.prototype_consistency(h, h_t, y[:, g], classes).item() / decisions
        for i in range(5):
            expected["task"] -= math.log(r[i, g, y[i, g]]) / (5 * decisions)
            for p, q in zip(r_t[i, g].tolist(), r[i, g].tolist()):
                expected["kl"] += p * math.log(p / q) / (5 * decisions)
    expected["total"] = sum(weights.get(name, 1.0) * value for name, value in expected.items())
    assert numbers(model.losses(complete, missing, target, real)) == pytest.approx(expected, rel=1e-9)


def test_the_encoder_is_that_of_umdf():
    """Which test_umdf.py compares with equation (1). The same parameters, pooled: the same numbers."""
    ours, theirs = (file.Encoder(7, file.Config(**test_methods.NETWORK)).double().eval() for file in (corrkd, umdf))
    state, weights = {}, theirs.state_dict()
    for name, weight in weights.items():
        if ".q." in name:
            state[name.replace(".q.", ".qkv.")] = torch.cat((weight, weights[name.replace(".q.", ".kv.")]))
        elif ".kv." not in name:
            state[name] = weight
    ours.load_state_dict(state)
    x, real = (v["audio"] for v in clips())
    torch.testing.assert_close(ours(x, real), umdf.pool(theirs(x, real), real))


def test_a_stream_without_a_real_frame_gives_zeros():
    model, (x, real) = model_of().double().eval(), clips()
    real["audio"][1] = False
    h = model.encode("audio", x["audio"], real["audio"])
    assert h.isfinite().all() and h[1].eq(0).all() and h[0].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_in_half_precision_is_that_in_float32_and_its_teacher_gets_no_gradient(loss, dtype):
    s, t = (torch.randn(6, 5).to(dtype).requires_grad_() for _ in range(2))
    value = loss(s, t)
    torch.testing.assert_close(value, loss(s.float(), t.float()), rtol=0, atol=0)
    value.backward()
    assert t.grad is None and s.grad.abs().sum() > 0


def test_the_teacher_neither_learns_nor_leaves_evaluation_and_its_stored_outputs_change_nothing():
    model, (complete, real) = model_of(dropout=0.0, kl=1.0).double().train(), clips()
    assert not model.teacher.training and model.student.training
    before = copy.deepcopy(model.teacher.state_dict())
    batch = complete, half_of(complete), target_of("polarity"), real
    terms = model.losses(*batch)
    stored = [rows.requires_grad_() for rows in model.teacher_outputs(complete, real)]
    assert numbers(model.losses(*batch, stored)) == numbers(terms)
    model.losses(*batch, stored)["total"].backward()
    assert all(rows.grad is None for rows in stored)
    with pytest.raises(ValueError, match=r"shape \(1, 1, 2\), not \(5, 1, 2\)"):
        model.losses(*batch, [rows[:1] for rows in stored])
    torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2).step()
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())
    assert all(p.grad is None for p in model.teacher.parameters())


def train_teacher(model):
    complete, real = clips()
    model.double().begin("teacher")
    model.losses(complete, None, target_of("polarity"), real)       # no missing copies: they are not looked at


def give_teacher(model):
    other = corrkd.CorrKD(test_methods.DIMS, "polarity")
    train_teacher(other)
    model.teacher = other.teacher


def load(part):
    def load_part(model):
        state = {k: v for k, v in model.state_dict().items() if k.startswith(part)}
        model.load_state_dict(state, strict=False)
    return load_part


@pytest.mark.parametrize("prepare, ablation, warns", [
    (lambda model: None, "", True), (load("student"), "", True), (load(""), "", False), (load("teacher"), "", False),
    (train_teacher, "", False), (give_teacher, "", False), (lambda model: None, "no_distillation", False)])
def test_a_student_warns_once_unless_its_teacher_was_trained_or_loaded(prepare, ablation, warns):
    config = corrkd.Config(**corrkd.ABLATIONS.get(ablation, {}))
    model = copy.deepcopy(corrkd.CorrKD(test_methods.DIMS, "polarity", config))     # and so does a copy
    with pytest.raises(ValueError, match="Call begin first: "):
        model.losses(None, None, None)
    prepare(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.begin("student")
        model.begin("student")
    assert len(caught) == warns and all("neither trained nor loaded" in str(w.message) for w in caught)


BOTH = {"teacher": ("lav",), "student": corrkd.SETS}     # stage -> the sets that it is about


@pytest.mark.filterwarnings("ignore:CorrKD's teacher")
@pytest.mark.parametrize("ablation, stages, frozen", [
    ("", BOTH, ["student"]), ("scd_raw", BOTH, ["student"]), ("no_distillation", {"student": corrkd.SETS}, []),
    ("teacher", {"teacher": corrkd.SETS}, [])])
def test_the_stages_their_frozen_teacher_and_the_network_that_answers(ablation, stages, frozen):
    """A model that is made to load a checkpoint answers by its last stage."""
    config = corrkd.Config(**corrkd.ABLATIONS.get(ablation, {}))
    model, (x, real) = corrkd.CorrKD(test_methods.DIMS, "polarity", config).double().eval(), clips()
    assert model.stages == stages
    assert torch.equal(model(**x, real=real), getattr(model, [*stages][-1])(x, real)[1])
    for stage in stages:
        model.begin(stage)
        assert (model.teacher_outputs(x, real) is not None) is (stage in frozen)


@pytest.mark.parametrize("loss", ["scd", "cpd", "rcd", "kl"])
def test_each_loss_alone_asks_for_a_teacher(loss):
    config = corrkd.Config(**{"scd": 0.0, "cpd": 0.0, "rcd": 0.0, loss: 0.5})
    assert corrkd.CorrKD(test_methods.DIMS, "polarity", config).stages == BOTH


def test_without_rcd_its_critics_are_not_trained():
    assert not any(p.requires_grad for p in model_of(rcd=0.0).critics.parameters())


@pytest.mark.parametrize("classes", [2, 3])
def test_parameter_counts_are_pinned(classes):
    """By hand for d = 40, two layers: a stream's convolution 3*40*d_m; a layer 40*120+120 + 1640 + 6560+6440
    + 4*40 = 19720; norm 80; the classifier 120*C + C; a critic on 2k numbers 2k*64+64 + 64*64+64 + 65."""
    model = corrkd.CorrKD({"text": 300, "audio": 74, "vision": 35}, "polarity", SETTLED, classes)
    network = 3 * 40 * (300 + 74 + 35) + 3 * (2 * 19720 + 80) + 121 * classes
    critics = sum(2 * k * 64 + 64 + 64 * 64 + 64 + 65 for k in (1, classes - 1))
    assert sum(p.numel() for p in model.parameters()) == 2 * network + critics


def test_one_clip_has_no_pair():
    s, t = torch.randn(1, 5), torch.randn(1, 5)
    assert corrkd.sample_contrastive(s, t, 1.2, normalize=False) == (s - t).square().sum()
    critic = corrkd.critic_of(5)
    information = corrkd.jsd_mutual_information(critic, s, t)
    information.backward()
    assert information == 0 and all(p.grad.eq(0).all() for p in critic.parameters())


def test_what_is_listed_for_the_paper_is_the_default():
    listed = {"mosi": (4e-3, 64, 50, 10, 1.2), "mosei": (2e-3, 32, 20, 8, 1.0), "iemocap": (4e-3, 64, 30, 10, 1.4)}
    assert corrkd.TASKS == {"mosi": "polarity", "mosei": "polarity", "iemocap": "emotions"}
    assert corrkd.FEATURES == {"text": 300, "audio": 74, "vision": 35}
    assert [corrkd.ABLATIONS[f"layers_{n}"] for n in (3, 4)] == [{"layers": 3}, {"layers": 4}]
    for name, c in corrkd.PAPER.items():
        assert (c.width, c.scd, c.cpd, c.rcd, c.kl, c.clip) == (40, 1, 1, 1, 0, 1)
        assert (c.lr, c.batch_size, c.epochs, c.heads, c.margin) == listed[name]
