"""double_flow.py against the official code's stored outputs, loops written from the equations, and its docstring."""
import json
import math
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import double_flow
from double_flow import ORDER, STREAMS, Config, DoubleFlow, rank_n_contrast
from helpers import official_names

GOLDEN = Path(__file__).resolve().parent / "golden"      # numbers of the official code, see the README there
DIMS = {"text": 12, "audio": 7, "vision": 5}
CARRIED = {**DIMS, "simulated_text": 12}
LENGTHS = {"text": 9, "audio": 6, "vision": 8, "simulated_text": 11}


def model_of(task="regression", dims=DIMS, seed=0, **changes):
    """Matrices are enlarged: as PyTorch draws them, all clips get nearly the same answer, and a test could not tell them apart."""
    torch.manual_seed(seed)
    model = DoubleFlow(dims, task, replace(Config(), **changes))
    for p in model.parameters():
        p.data *= 1.9 if p.ndim > 1 else 1
    return model


def clips(n, dims=DIMS, seed=1):
    g = torch.Generator().manual_seed(seed)
    real = {m: torch.arange(LENGTHS[m]) < torch.randint(1, LENGTHS[m] + 1, (n, 1), generator=g) for m in dims}
    return {m: torch.randn(n, LENGTHS[m], d, generator=g) * real[m][..., None] for m, d in dims.items()}, real


def goal(task, n):
    return torch.linspace(-2, 2, n) if task == "regression" else torch.arange(4 * n).reshape(n, 4) // 3 % 2


# ------------------------------------------------------------------------------------- the official code

def official(case):
    """The stored numbers, and the official state_dict made by the rule that the folder's README states."""
    z = np.load(GOLDEN / f"sdumc_{case}.npz", allow_pickle=False)
    names = json.loads((GOLDEN / "official_parameters.json").read_text())
    for i, d in enumerate(z["meta/dims"].tolist()):
        names[f"frame_dim_reshape_{i}.weight"] = [256, d]
    state = {}
    for name, shape in names.items():
        draw = np.random.RandomState((zlib.crc32(name.encode()) + int(z["meta/seed"])) % 2 ** 32)
        fan = shape[-1] if len(shape) > 1 else 64
        bound = 0.5 if name.endswith("attention_context_vector") else np.sqrt(float(z["meta/gain"]) / fan)
        state[name] = torch.from_numpy(draw.uniform(-bound, bound, size=shape).astype(np.float32))
    return z, state


def loaded(case, dtype):
    """The model with the official weights, and the inputs."""
    z, state = official(case)
    audio, text, video = z["meta/dims"].tolist()
    model = DoubleFlow({"text": text, "audio": audio, "vision": video, "simulated_text": text}, "regression", Config(mia="off", w5=.1, w6=.8))
    model.to(dtype).load_official(state)
    get = lambda k: torch.from_numpy(z[f"in/{k}"]).to(dtype)
    return z, model.eval(), {"text": get("text"), "audio": get("audio"), "vision": get("video"), "simulated_text": get("feat4")}, get("vals")


TERMS = {"task_complete": "full_mse", "task_missing": "missing_mse", "q_text": "text_feat", "c_text": "text_query", "h": "features", "rnc": "rnc", "total": "total"}
PRECISIONS = [(torch.float32, "", 1e-5), (torch.float64, "f64/", 1e-9)]


@pytest.mark.parametrize("dtype, prefix, tolerance", PRECISIONS)
@pytest.mark.parametrize("case", "ab")
def test_both_flows_and_all_losses_are_the_official_ones(case, dtype, prefix, tolerance):
    z, model, x, y = loaded(case, dtype)
    for flow, text, missing in (("full", x["text"], False), ("missing", x["simulated_text"], True)):
        got = model.flow(text, x["audio"], x["vision"], missing)
        for ours, theirs in {"prediction": "pred", "h": "features", "g": "rnc_feat", "q_text": "text_feat", "c_text": "text_query_feat"}.items():
            expected = torch.from_numpy(z[f"{prefix}{flow}/{theirs}"])
            assert got[ours].shape == expected.shape
            assert float((got[ours].detach() - expected).abs().max() / expected.abs().max()) < tolerance, (flow, ours)
    terms = model.losses(x, None, y)
    assert set(terms) == set(TERMS)
    for ours, theirs in TERMS.items():
        assert terms[ours].item() == pytest.approx(float(z[f"{prefix}loss/{theirs}"]), rel=tolerance), ours


@pytest.mark.parametrize("case", "ab")
def test_gradients_and_five_steps_of_adam_are_the_official_ones(case):
    z, model, x, y = loaded(case, torch.float32)
    names, state = {}, official(case)[1]
    for ours, p in model.named_parameters():        # by the values, not by the table that is under test
        same = [k for k, v in state.items() if v.shape == p.shape and torch.equal(v, p.detach())]
        assert len(same) == 1, ours
        names[same[0]] = p
    model.losses(x, None, y)["total"].backward()
    for key in (k for k in z.files if k.startswith("grad/")):
        expected, got = torch.from_numpy(z[key]), names[key[5:]].grad
        assert float((got - expected).norm() / expected.norm()) < 1e-5, key
    norms = {k[9:]: float(z[k]) for k in z.files if k.startswith("gradnorm/")}
    for name, norm in norms.items():
        if name in names and name != "orgin_linear_change.2.bias":      # which is 0 in theory
            assert names[name].grad.norm().item() == pytest.approx(norm, rel=1e-4), name
    optimizer, totals = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5), []
    for _ in range(5):
        optimizer.zero_grad()
        total = model.losses(x, None, y)["total"]
        totals.append(total.item())
        total.backward()
        optimizer.step()
    assert totals == pytest.approx(z["adam/total_5_steps"].tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype, prefix, tolerance", PRECISIONS)
@pytest.mark.parametrize("case", ["noties_4", "ties_8", "alltied_6", "bs1", "bs2"])
def test_rank_n_contrast_is_the_official_one(case, dtype, prefix, tolerance):
    z = np.load(GOLDEN / "rnc.npz", allow_pickle=False)
    views = torch.from_numpy(z[f"{case}/features"]).to(dtype).requires_grad_()       # (B, 2, d)
    labels = torch.from_numpy(z[f"{case}/labels"]).to(dtype)
    loss = rank_n_contrast(torch.cat(views.unbind(1)), torch.cat((labels, labels)))
    loss.backward()
    p = prefix.rstrip("/") + "_" * bool(prefix)
    assert loss.item() == pytest.approx(float(z[f"{case}/{p}loss"]), rel=tolerance, abs=tolerance)
    torch.testing.assert_close(views.grad, torch.from_numpy(z[f"{case}/{p}grad"]).to(dtype), rtol=tolerance, atol=tolerance)


def test_a_published_checkpoint_is_read_by_its_names(tmp_path):
    """With and without "model.", inside "state_dict" or bare; unused entries ignored; what does not fit is named."""
    source = model_of(dims=CARRIED)
    theirs = official_names(source)
    assert len(theirs) == len(source.state_dict())
    theirs["fc_out_e.weight"] = torch.zeros(1, 128)
    for content in (theirs, {"state_dict": {f"model.{k}": v for k, v in theirs.items()}, "epoch": 3}):
        torch.save(content, tmp_path / "c.pth")
        other = model_of(dims=CARRIED, seed=5)
        other.load_official(torch.load(tmp_path / "c.pth", weights_only=True))
        assert all(torch.equal(v, source.state_dict()[k]) for k, v in other.state_dict().items())
    own = model_of(seed=5)      # without simulated text in the data: its stand-in stays
    before = own.simulate.weight.clone()
    own.load_official(theirs)
    assert torch.equal(own.simulate.weight, before) and torch.equal(own.head.weight, source.head.weight)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    bad = {**theirs, "fc_out_v.weight": torch.zeros(2, 128)}
    del bad["fc_att.bias"]
    with pytest.raises(ValueError, match=r"fc_att.bias is missing; fc_out_v.weight has shape \(2, 128\), not \(1, 128\)"):
        other.load_official(bad)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


# ------------------------------------------------------------------------------------- rank-n-contrast

def by_loop(features, labels, temperature=2.0):
    """(15), term by term."""
    n, total = len(features), 0.0
    labels = labels.reshape(n, -1)
    gap = lambda a, b: (labels[a] - labels[b]).abs().sum()
    s = lambda a, b: -(features[a] - features[b]).norm() / temperature
    for i in range(n):
        for j in range(n):
            if i != j:
                others = [s(i, k) for k in range(n) if k != i and gap(i, k) >= gap(i, j) - 1e-4]
                total = total - (s(i, j) - torch.logsumexp(torch.stack(others), 0)) / (n * (n - 1))
    return total


RNC_LABELS = {
    "different": torch.tensor([.3, -1.2, 2.5, 0.0, -2.9, 1.1], dtype=torch.float64),
    "ties": torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0, -1.0], dtype=torch.float64),
    "all equal": torch.full((6,), .5, dtype=torch.float64),
    "within the slack": torch.tensor([0.0, 1.0, 1.00005, -1.00008, 2.0, 1.0002], dtype=torch.float64),
    "columns": torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64),
    "one pair": torch.tensor([1.0, 2.0], dtype=torch.float64),
}


@pytest.mark.parametrize("name", RNC_LABELS)
def test_rank_n_contrast_is_the_loop(name):
    labels = RNC_LABELS[name]
    g = torch.Generator().manual_seed(0)
    a = torch.randn(len(labels), 5, dtype=torch.float64, generator=g, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    ours, loop = rank_n_contrast(a, labels, 1.5), by_loop(b, labels, 1.5)
    ours.backward(), loop.backward()
    assert ours.item() == pytest.approx(loop.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_rank_n_contrast_far_apart_equal_and_alone():
    """Vectors 1,000 apart, where exp underflows in float32; equal vectors; one vector."""
    labels = torch.tensor([0.0, 1.0, 2.0, 2.0])
    far = torch.tensor([[0.0, 0.0], [1000.0, 0.0], [0.0, 1000.0], [3000.0, 3000.0]], requires_grad=True)
    loss = rank_n_contrast(far, labels)
    loss.backward()
    assert loss.item() == pytest.approx(by_loop(far.detach().double(), labels.double()).item(), rel=1e-6) and torch.isfinite(far.grad).all()
    same = torch.ones(4, 3, requires_grad=True)
    loss = rank_n_contrast(same, labels)
    loss.backward()
    assert loss.item() == pytest.approx(by_loop(same.detach(), labels).item(), rel=1e-6) and torch.isfinite(same.grad).all()
    assert rank_n_contrast(torch.ones(1, 3), torch.ones(1)) == 0


def test_rank_n_contrast_does_not_depend_on_the_order():
    labels, x = RNC_LABELS["ties"], torch.randn(6, 5, dtype=torch.float64)
    order = torch.randperm(6)
    assert rank_n_contrast(x[order], labels[order]).item() == pytest.approx(rank_n_contrast(x, labels).item(), rel=1e-12)


# ------------------------------------------------------------------------------------- the equations, written out

def linear(net, x):
    return net.weight @ x + net.bias


def mlp(net, x):
    for layer in net:
        x = linear(layer, x).relu() if isinstance(layer, torch.nn.Linear) else x
    return x


def autoencoder(net, parts, residual):
    z = linear(net.transition[2], linear(net.transition[0], torch.cat(parts)).relu())
    return linear(net.decoder, linear(net.encoder, z)) + {"x_t": parts[1], "z": z}[residual]


def one_clip(model, x, missing):
    """(1) to (12) for one clip without padding and dropout: m -> (T_m, d_m)."""
    z = {m: torch.stack([linear(model.project[m], frame) for frame in x[m]]) for m in ORDER}
    h = {}
    for m in ORDER:
        p = model.pooling[m]
        score = torch.stack([0.3 * p.context[0] @ linear(p.project, frame).tanh() for frame in z[m]])
        h[m] = mlp(model.mlp[m], sum(a * frame for a, frame in zip(score.softmax(0), z[m])))
    if missing and model.config.mia != "off":
        h["text"] = autoencoder(model.imagine[0], [h[m] for m in ORDER], model.config.mia)
    w = linear(model.weights[1], mlp(model.weights[0], torch.cat([h[m] for m in ORDER])))
    a, t, v = w[0] * h["audio"], w[1] * h["text"], w[2] * h["vision"]
    inputs = {"atv": a + t + v, "at": a + t, "tv": t + v, "av": a + v, **{m: h[m] for m in ORDER}}
    queries = [mlp(model.queries[k], inputs[k]) for k in ("atv", "at", "tv", "av", "audio", "text", "vision")]
    c = {}
    for m in ORDER:
        u = model.cross[m]
        rows = []
        for q in queries:
            score = torch.stack([0.3 * linear(u.key, frame).tanh() @ linear(u.query, q) for frame in z[m]])
            rows.append(mlp(u.mlp, sum(a * frame for a, frame in zip(score.softmax(0), z[m]))))
        c[m] = rows
    if missing and model.config.mia != "off":
        c["text"] = [autoencoder(model.imagine[1], [c[m][k] for m in ORDER], model.config.mia) for k in range(7)]
    g = [sum(w[i] * c[m][k] for i, m in enumerate(ORDER)) for k in range(7)]
    r = linear(model.cross_weights[1], mlp(model.cross_weights[0], torch.cat(g)))
    h_star = sum(r[k] * g[k] for k in range(7))
    contrast = linear(model.contrast[2], linear(model.contrast[0], h_star).relu())
    return {"prediction": linear(model.head, h_star), "h": h_star, "g": contrast, "q_text": queries[5], "c_text": torch.stack(c["text"])}


@pytest.mark.parametrize("mia", ["x_t", "z", "off"])
def test_a_flow_is_its_equations_clip_by_clip(mia):
    """Padded clips in one batch, the choice of the flow made clip by clip."""
    model = model_of(mia=mia).double().eval()
    x, real = clips(4)
    x, missing = {m: v.double() for m, v in x.items()}, torch.tensor([True, False, True, False])
    got = model.flow(x["text"], x["audio"], x["vision"], missing, real)
    for i in range(4):
        expected = one_clip(model, {m: x[m][i, :real[m][i].sum()] for m in STREAMS}, bool(missing[i]))
        for k, v in expected.items():
            torch.testing.assert_close(got[k][i], v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("task", ["regression", "emotions"])
@pytest.mark.parametrize("dims", [DIMS, CARRIED])
def test_the_losses_are_equation_14_over_two_separate_flows(task, dims):
    model = model_of(task, dims).double().eval()
    x, real = clips(5, dims)
    x, y = {m: v.double() for m, v in x.items()}, goal(task, 5)
    y = y.double() if task == "regression" else y
    simulated = x["simulated_text"] if "simulated_text" in x else torch.einsum("btd,ed->bte", x["audio"], model.simulate.weight) + model.simulate.bias
    simulated_real = real.get("simulated_text", real["audio"])
    with torch.no_grad():
        full = model.flow(x["text"], x["audio"], x["vision"], False, real)
        other = model.flow(simulated, x["audio"], x["vision"], True, {**real, "text": simulated_real})
    root = lambda k: math.sqrt(float(((other[k] - full[k]) ** 2).mean()))
    if task == "regression":
        tasks = [float(((f["prediction"][:, 0] - y) ** 2).mean()) for f in (full, other)]
    else:
        tasks = [-sum(math.log(float(f["prediction"][i, g].softmax(0)[y[i, g]])) for i in range(5) for g in range(4)) / 20 for f in (full, other)]
    rnc = float(by_loop(torch.cat((full["g"], other["g"])), torch.cat((y, y)).double()))
    expected = dict(zip(TERMS, [*tasks, root("q_text"), root("c_text"), root("h"), rnc]))
    terms = model.losses(x, None, y, real)
    for k, v in expected.items():
        assert terms[k].item() == pytest.approx(v, rel=1e-8), k
    total = sum(w * v for w, v in zip((.5, .5, .1, .7, .13, .5), expected.values()))
    assert terms["total"].item() == pytest.approx(total, rel=1e-8)


def test_only_the_missing_flow_is_taught():
    """w3 and w4 stop at the complete flow's text; w5 pulls both. Told by the gradient that reaches the real text."""
    for term, reaches in (("q_text", False), ("c_text", False), ("h", True)):
        model = model_of(dims=CARRIED).eval()
        x, real = clips(4, CARRIED)
        x["text"].requires_grad_(), x["simulated_text"].requires_grad_()
        model.losses(x, None, goal("regression", 4), real)[term].backward()
        assert bool(x["text"].grad.abs().sum() > 0) is reaches and x["simulated_text"].grad.abs().sum() > 0, term


# ------------------------------------------------------------------------------------- inference

@pytest.mark.parametrize("dims", [DIMS, CARRIED])
def test_each_clip_takes_the_flow_that_its_text_asks_for(dims):
    model = model_of(dims=dims).double().eval()
    x, real = clips(5, dims)
    x = {m: v.double() for m, v in x.items()}
    x["text"][[1, 4]] = 0
    got = model(**x, real=real)
    simulated, simulated_real = model.simulated(x, real)
    for i in range(5):
        gone = i in (1, 4)
        text, text_real = (simulated, simulated_real) if gone else (x["text"], real["text"])
        alone = model.flow(text[i:i + 1], x["audio"][i:i + 1], x["vision"][i:i + 1], gone,
                           {"audio": real["audio"][i:i + 1], "vision": real["vision"][i:i + 1], "text": text_real[i:i + 1]})
        torch.testing.assert_close(got[i:i + 1], alone["prediction"], rtol=0, atol=1e-12)
    moved = (model(**{**x, "text": x["text"] * 0}, real=real) - got).abs()[:, 0] > 1e-6
    assert moved.tolist() == [True, False, True, True, False]


def test_carried_simulated_text_goes_with_its_audio():
    model = model_of(dims=CARRIED).eval()
    x, real = clips(3, CARRIED)
    silent = {**x, "text": x["text"] * 0, "audio": x["audio"] * 0}
    other = {**silent, "simulated_text": torch.randn_like(x["simulated_text"])}
    assert torch.equal(model(**silent, real=real), model(**other, real=real))


def test_a_stream_without_a_real_frame_gives_zeros():
    z = torch.randn(2, 4, 256)
    real = torch.tensor([[True] * 4, [False] * 4])
    pooled = model_of().eval().pooling["audio"](z, real)
    assert pooled[1].eq(0).all() and pooled[0].ne(0).any()
    alpha = double_flow.over_frames(torch.randn(2, 4, 7), real)
    torch.testing.assert_close(alpha.sum(1), torch.tensor([[1.0] * 7, [0.0] * 7]))


@pytest.mark.parametrize("task", ["regression", "emotions"])
@pytest.mark.parametrize("n", [1, 3])
def test_everything_is_finite_with_its_gradient(task, n):
    """A batch of one; both flows equal (simulated text = text, no MIA): the root at zero; equal labels."""
    model = model_of(task, CARRIED, mia="off").eval()
    x, real = clips(n, CARRIED)
    x["simulated_text"], real["simulated_text"] = x["text"], real["text"]
    target = goal(task, 1).expand(n, *goal(task, 1).shape[1:])
    terms = model.losses(x, None, target, real)
    terms["total"].backward()
    assert terms["q_text"].item() == pytest.approx(0, abs=2e-6) and terms["h"].item() == pytest.approx(0, abs=2e-6)
    assert all(torch.isfinite(t) for t in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model(**x, real=real).shape == ((n, 1) if task == "regression" else (n, 4, 2))


# ------------------------------------------------------------------------------------- ablations, schedule, use

def test_each_ablation_changes_what_it_names_and_nothing_else():
    x, real = clips(6)
    target, full = goal("regression", 6), model_of().eval()
    reference = full.losses(x, None, target, real)
    lost = {"no_distillation": {"q_text", "c_text"}, "no_w3": {"q_text"}, "no_w4": {"c_text"}, "no_w5": {"h"}, "no_rnc": {"rnc"},
            "task_only": {"q_text", "c_text", "h", "rnc"}}
    assert set(lost) | {"mia_z", "no_mia"} == set(double_flow.ABLATIONS)
    for name, changes in double_flow.ABLATIONS.items():
        model = model_of(**changes).eval()
        kept = {k: v for k, v in full.state_dict().items() if name != "no_mia" or not k.startswith("imagine")}
        assert set(model.state_dict()) == set(kept) and all(torch.equal(v, kept[k]) for k, v in model.state_dict().items()), name
        got = model.losses(x, None, target, real)
        assert set(got) == set(reference) - lost.get(name, set()), name
        assert torch.equal(got["task_complete"], reference["task_complete"])        # MIA is in the missing flow alone
        assert torch.equal(got["task_missing"], reference["task_missing"]) is (name not in ("mia_z", "no_mia")), name


def test_the_schedule():
    """Epochs 0-4: 1/5 ... 5/5; then 1 up to epoch 13, .9 from 14, .81 from 24."""
    got = [double_flow.learning_rate_factor(e) for e in (0, 1, 4, 5, 13, 14, 23, 24, 34)]
    assert got == pytest.approx([.2, .4, 1, 1, 1, .9, .9, .81, .729])


def test_parameter_counts_are_pinned():
    """By hand for 300 / 74 / 35, D = 256."""
    line = lambda a, b: a * b + b
    square = line(256, 256)
    own = (line(300, 256) + line(74, 256) + line(35, 256) + 3 * (256 + square) + 3 * 2 * square + line(768, 256) + square + line(256, 3) + 7 * square
           + 3 * (2 * square + square + line(256, 128)) + line(896, 256) + line(256, 128) + line(128, 7) + line(128, 1) + line(128, 64) + line(64, 64))
    imagine = line(768, 256) + square + line(256, 128) + line(128, 256) + line(384, 128) + line(128, 128) + line(128, 64) + line(64, 128)
    count = lambda dims, **c: sum(p.numel() for p in DoubleFlow(dims, "regression", Config(**c)).parameters())
    dims = {"text": 300, "audio": 74, "vision": 35}
    assert count({**dims, "simulated_text": 300}, mia="off") == own
    assert count(dims) == own + imagine + line(74, 300)


def test_coin_flips_are_a_dropout_of_one_half():
    """Zero or twice, half and half at every place, neighbours and the two halves of the draws independent; off in evaluation."""
    half, x = double_flow.Half(), torch.ones(4001, 13)
    torch.manual_seed(0)
    got = half(x)
    assert set(got.unique().tolist()) == {0.0, 2.0} and got.shape == x.shape
    assert (got.mean(0) - 1).abs().max() < .08 and abs(got.mean().item() - 1) < .02       # 5 and 4.5 standard deviations
    centred = got.flatten() - 1
    for lag in (*range(1, 17), 64):
        assert abs((centred[lag:] * centred[:-lag]).mean().item()) < .02, lag
    assert not torch.equal(got, half(x)) and torch.equal(half.eval()(x), x)
    assert half.train()(torch.ones(3)).shape == (3,) and half(torch.ones(0, 2)).shape == (0, 2)
    frame = torch.randn(5, 7, requires_grad=True)
    torch.manual_seed(1)
    out = half(frame)
    out.sum().backward()
    assert torch.equal(frame.grad, (out / frame).round().detach())


def test_mistakes_are_told():
    for dims, task, changes, said in ((DIMS, "polarity", {}, "polarity"), (DIMS, "regression", {"mia": "x"}, "x_t, z or off"),
                                      ({**DIMS, "simulated_text": 9}, "regression", {}, "not the same")):
        with pytest.raises(ValueError, match=said):
            model_of(task, dims, **changes)
    with pytest.raises(ValueError, match="built for data with simulated_text"):
        model_of(dims=CARRIED)(**clips(2)[0])
