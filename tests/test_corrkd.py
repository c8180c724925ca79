"""corrkd.py against loops written from its equations, and the properties that its docstring promises."""
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import corrkd
from corrkd import Config, CorrKD

DIMS = {"text": 12, "audio": 7, "vision": 5}
LENGTHS = {"text": 9, "audio": 6, "vision": 8}


def model_of(task="polarity", dims=DIMS, seed=0, **changes):
    torch.manual_seed(seed)
    return CorrKD(dims, task, replace(Config(), **changes))


def clips(n, dims=DIMS, lengths=LENGTHS, seed=1, whole=False):
    """Streams, and real masks with at least one frame a clip; what lies behind a clip's end is zero."""
    g = torch.Generator().manual_seed(seed)
    real = {m: torch.arange(t) < torch.randint(t if whole else 1, t + 1, (n, 1), generator=g) for m, t in lengths.items()}
    return {m: torch.randn(n, t, dims[m], generator=g) * real[m][..., None] for m, t in lengths.items()}, real


def softplus(z):
    return math.log1p(math.exp(-abs(z))) + max(z, 0)


# ------------------------------------------------------------------------------------- losses against loops

@pytest.mark.parametrize("margin", [0.3, 1.2, 20.0])
def test_sample_contrastive_is_equation_4(margin):
    s, t = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    s[2], t[4] = t[2], s[1]     # a positive pair and a negative pair at distance 0
    positive = sum(float(((s[i] - t[i]) ** 2).sum()) for i in range(6)) / 6
    negative = sum(max(0.0, margin - math.sqrt(float(((s[i] - t[j]) ** 2).sum()))) ** 2 for i in range(6) for j in range(6) if i != j) / 30
    assert float(corrkd.sample_contrastive(s, t, margin, normalize=False)) == pytest.approx(positive + negative, rel=1e-12)
    active = sum(math.dist(s[i], t[j]) < margin for i in range(6) for j in range(6) if i != j) / 30
    assert float(corrkd.active_negatives(s, t, margin, normalize=False)) == pytest.approx(active)
    unit = [v / v.norm(dim=1, keepdim=True) for v in (s, t)]
    for loss in (corrkd.sample_contrastive, corrkd.active_negatives):
        torch.testing.assert_close(loss(s, 3 * t, margin), loss(*unit, margin, normalize=False))


def test_prototype_consistency_is_equations_5_and_6_and_leaves_absent_classes_out():
    s, t = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    for labels in ([0, 1, 3, 1, 0, 3, 3], [2] * 7):
        classes, total = sorted(set(labels)), 0.0
        for i in range(7):
            for k in classes:
                cosine = []
                for h in (s, t):
                    rows = [h[j] for j in range(7) if labels[j] == k]
                    c = sum(rows) / len(rows)
                    cosine.append(float(h[i] @ c) / float(h[i].norm() * c.norm()))
                total += (cosine[0] - cosine[1]) ** 2
        expected = total / (7 * len(classes))
        assert float(corrkd.prototype_consistency(s, t, torch.tensor(labels), 4)) == pytest.approx(expected, rel=1e-12)


def test_mutual_information_is_equation_8():
    critic = model_of().critics[0].double()
    a, b = torch.rand(5, 1, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64)
    score = lambda i, j: float(critic(torch.cat((a[i], b[j]))).detach())
    joint = sum(-softplus(-score(i, i)) for i in range(5)) / 5
    apart = sum(softplus(score(i, j)) for i in range(5) for j in range(5) if i != j) / 20
    assert float(corrkd.jsd_mutual_information(critic, a, b).detach()) == pytest.approx(joint - apart, rel=1e-12)


@pytest.mark.parametrize("task, groups", [("polarity", 1), ("emotions", 4)])
def test_the_total_is_equation_10_written_out(task, groups):
    model = model_of(task, dropout=0.0).double()
    model.begin("student")
    complete, real = clips(6)
    complete = {m: x.double() for m, x in complete.items()}
    missing = {m: x * (torch.rand(x.shape[:2])[..., None] < .6) for m, x in complete.items()}
    target = torch.randint(0, 2, (6,) if groups == 1 else (6, 4))
    terms = model.losses(complete, missing, target, real)
    (h, f), (h_t, f_t) = model.student(missing, real), model.teacher(complete, real)
    r, r_t, y = f.view(6, groups, 2).softmax(-1), f_t.view(6, groups, 2).softmax(-1), target.view(6, groups)
    task_loss = -sum(math.log(r[i, g, y[i, g]].item()) for i in range(6) for g in range(groups)) / (6 * groups)
    unit = [v / v.norm(dim=1, keepdim=True) for v in (h, h_t)]
    scd = corrkd.sample_contrastive(*unit, 1.2, normalize=False)
    cpd = sum(corrkd.prototype_consistency(h, h_t, y[:, g], 2) for g in range(groups)) / groups
    rcd = 0.0
    for g in range(groups):
        parts = [[torch.stack([p[i, g, y[i, g]] if u else p[i, g, 1 - y[i, g]] for i in range(6)])[:, None] for p in (r_t, r)] for u in (1, 0)]
        rcd -= sum(corrkd.jsd_mutual_information(critic, *part) for critic, part in zip(model.critics, parts)) / groups
    for name, value in {"task": task_loss, "scd": scd, "cpd": cpd, "rcd": rcd, "total": task_loss + scd + cpd + rcd}.items():
        assert terms[name].item() == pytest.approx(value if name == "task" else value.item(), rel=1e-9), name


def test_kl_in_the_place_of_rcd():
    model = model_of("emotions", **corrkd.ABLATIONS["kl"])
    model.begin("student")
    complete, real = clips(5)
    target = torch.randint(0, 2, (5, 4))
    model.eval()
    terms = model.losses(complete, complete, target, real)
    p, q = (net(complete, real)[1].view(5, 4, 2).softmax(-1) for net in (model.teacher, model.student))
    expected = sum((p[i, g, c] * (p[i, g, c] / q[i, g, c]).log()).item() for i in range(5) for g in range(4) for c in range(2)) / 20
    assert float(terms["kl"].detach()) == pytest.approx(expected, rel=1e-4) and "rcd" not in terms


def test_the_encoder_is_equation_1_against_pytorchs_own_layers():
    """Two nn.TransformerEncoderLayer with the same weights, positions from the formula, GAP by hand."""
    encoder = model_of().student.encoders["text"].eval()
    x, real = (v["text"] for v in clips(4))
    h = math.sqrt(40) * encoder.conv(x.transpose(1, 2)).transpose(1, 2)
    for t in range(9):
        for i in range(20):
            h[:, t, 2 * i] += math.sin(t / 10000 ** (2 * i / 40))
            h[:, t, 2 * i + 1] += math.cos(t / 10000 ** (2 * i / 40))
    for layer in encoder.layers:
        reference = torch.nn.TransformerEncoderLayer(40, 10, 160, batch_first=True, norm_first=True).eval()
        reference.load_state_dict(dict(zip(reference.state_dict(), (
            layer.qkv.weight, layer.qkv.bias, layer.out.weight, layer.out.bias, layer.ffn[0].weight, layer.ffn[0].bias,
            layer.ffn[3].weight, layer.ffn[3].bias, layer.norm_attention.weight, layer.norm_attention.bias,
            layer.norm_ffn.weight, layer.norm_ffn.bias))))
        h = reference(h, src_key_padding_mask=~real)
    h = F.layer_norm(h, (40,), encoder.norm.weight, encoder.norm.bias)
    expected = torch.stack([h[i, :real[i].sum()].mean(0) for i in range(4)])
    torch.testing.assert_close(encoder(x, real), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- hard batches

@pytest.mark.parametrize("task", ["polarity", "emotions"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_loss_is_finite_with_its_gradient(task, n):
    """One clip, one class, identical inputs for teacher and student (distance 0 everywhere), a stream without frames."""
    model = model_of(task, dropout=0.0)
    model.student.load_state_dict(model.teacher.state_dict())
    model.begin("student")
    complete, real = clips(n)
    complete = {m: x[:1].expand(n, -1, -1) for m, x in complete.items()}
    real = {m: r[:1].expand(n, -1) & (m != "vision") for m, r in real.items()}
    target = torch.ones((n,) if task == "polarity" else (n, 4), dtype=torch.long)
    terms = model.losses(complete, complete, target, real)
    terms["total"].backward()
    assert all(torch.isfinite(t) for t in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert float(terms["cpd"].detach()) == pytest.approx(0, abs=1e-9)
    if n == 1:
        assert float(terms["scd"].detach()) == pytest.approx(0, abs=1e-9) and float(terms["rcd"]) == 0


def test_a_stream_without_a_real_frame_gives_zeros():
    model = model_of().eval()
    x, real = clips(3)
    real["audio"][1] = False
    h = model.encode("audio", x["audio"], real["audio"])
    assert torch.isfinite(h).all() and h[1].eq(0).all() and h[0].ne(0).any()


# ------------------------------------------------------------------------------------- padding and batching

# ------------------------------------------------------------------------------------- teacher and ablations

def test_the_teacher_neither_moves_nor_learns():
    model = model_of()
    model.begin("student")
    model.train()
    assert not model.teacher.training and model.student.training
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    complete, real = clips(4)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    model.losses(complete, complete, torch.tensor([0, 1, 1, 0]), real)["total"].backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is not None for part in (model.student, model.critics) for p in part.parameters())


def test_stored_teacher_outputs_change_nothing():
    model = model_of(dropout=0.0)
    model.begin("student")
    complete, real = clips(6)
    missing, target = {m: x * .5 for m, x in complete.items()}, torch.tensor([0, 1, 0, 1, 1, 0])
    stored = model.teacher_outputs(complete, real)
    a, b = model.losses(complete, missing, target, real), model.losses(complete, missing, target, real, teacher=stored)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_each_ablation_changes_what_it_names_and_nothing_else():
    complete, real = clips(6)
    missing, target = {m: x * .5 for m, x in complete.items()}, torch.tensor([0, 1, 0, 1, 1, 0])
    full = model_of(dropout=0.0)
    reference = full.losses(complete, missing, target, real)
    left = {"no_scd": {"task", "cpd", "rcd"}, "no_cpd": {"task", "scd", "scd_active", "rcd"}, "no_rcd": {"task", "scd", "scd_active", "cpd"},
            "kl": {"task", "scd", "scd_active", "cpd", "kl"}, "no_distillation": {"task"}, "scd_raw": {"task", "scd", "scd_active", "cpd", "rcd"},
            "teacher": {"task"}}
    assert set(left) | {"layers_3", "layers_4"} == set(corrkd.ABLATIONS)
    assert [len(model_of(**corrkd.ABLATIONS[f"layers_{n}"]).student.encoders["text"].layers) for n in (3, 4)] == [3, 4]
    for name, terms in left.items():
        model = model_of(dropout=0.0, **corrkd.ABLATIONS[name])     # the same seed: the same weights
        assert all(torch.equal(v, full.state_dict()[k]) for k, v in model.state_dict().items())
        got = model.losses(complete, missing, target, real)
        assert set(got) == terms | {"total"}
        changed = {"task"} if name == "teacher" else {"scd", "scd_active"} if name == "scd_raw" else set()
        assert all(torch.equal(got[k], reference[k]) for k in terms - changed - {"kl"}), name
    assert model_of().stages == {"teacher": ("lav",), "student": corrkd.SETS}
    assert model_of(**corrkd.ABLATIONS["no_distillation"]).stages == {"student": corrkd.SETS}
    teacher = model_of(**corrkd.ABLATIONS["teacher"])
    assert teacher.stages == {"teacher": corrkd.SETS} and teacher.network is teacher.teacher
    raw = model_of(dropout=0.0, scd_raw=True)
    h, h_t = raw.student(missing, real)[0], raw.teacher(complete, real)[0]
    assert torch.equal(raw.losses(complete, missing, target, real)["scd"], corrkd.sample_contrastive(h, h_t, 1.2, normalize=False))


def test_parameter_counts_are_pinned():
    """By hand for d=40, two layers: a stream's convolution 3*40*d_m; a layer 40*120+120 + 1640 + 6560+6440 + 4*40 = 19720; norm 80."""
    model = CorrKD({"text": 300, "audio": 74, "vision": 35}, "polarity", Config(layers=2))
    network = 3 * 40 * (300 + 74 + 35) + 3 * (2 * 19720 + 80) + 242
    critic = (2 * 64 + 64) + (64 * 64 + 64) + 65
    assert sum(p.numel() for p in model.parameters()) == 2 * network + 2 * critic


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="regression"):
        CorrKD(DIMS, "regression")
    with pytest.raises(ValueError, match="multiple of heads"):
        model_of(heads=7)
