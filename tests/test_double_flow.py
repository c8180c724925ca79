"""double_flow.py against the official code's stored outputs, loops written from the equations, its docstring."""
import json
import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import double_flow
import test_methods
from double_flow import ORDER, Config, DoubleFlow, rank_n_contrast
from test_methods import CARRIED, DIMS, UNALIGNED, numbers, target_of

GOLDEN = Path(__file__).resolve().parent / "golden"      # numbers of the official code, see the README there
model_of = partial(test_methods.model_of, "double_flow")
clips = partial(test_methods.clips, lengths=UNALIGNED)
TASKS = [("regression", 2), ("polarity", 2), ("polarity", 3), ("emotions", 2)]      # task, classes


def official(case, dtype=torch.float32, **changes):
    """The stored numbers, the official state_dict by the rule that the folder's README states, our model with it."""
    z = np.load(GOLDEN / f"sdumc_{case}.npz", allow_pickle=False)
    shapes = json.loads((GOLDEN / "official_parameters.json").read_text())
    audio, text, video = z["meta/dims"].tolist()
    for i, d in enumerate((audio, text, video)):
        shapes[f"frame_dim_reshape_{i}.weight"] = [256, d]
    state = {}
    for name, shape in shapes.items():
        draw = np.random.RandomState((zlib.crc32(name.encode()) + int(z["meta/seed"])) % 2 ** 32)
        fan = shape[-1] if len(shape) > 1 else 64
        context = name.endswith("attention_context_vector")
        bound = 0.5 if context else np.sqrt(float(z["meta/gain"]) / fan)
        state[name] = torch.from_numpy(draw.uniform(-bound, bound, size=shape).astype(np.float32))
    config = Config(**{**test_methods.SETTINGS["double_flow"], "mia": "off", "w5": .1, "w6": .8, **changes})
    dims = {"text": text, "audio": audio, "vision": video, "simulated_text": text}
    model = DoubleFlow(dims, "regression", config).to(dtype).eval()
    model.load_official(state)
    return z, state, model


def inputs(z, dtype=torch.float32):
    names = {"text": "text", "audio": "audio", "vision": "video", "simulated_text": "feat4", "y": "vals"}
    x = {ours: torch.from_numpy(z[f"in/{theirs}"]).to(dtype) for ours, theirs in names.items()}
    return x, x.pop("y")


OUTPUTS = {"prediction": "pred", "h": "features", "g": "rnc_feat", "q_text": "text_feat", "c_text": "text_query_feat"}
TERMS = {"task_complete": "full_mse", "task_missing": "missing_mse", "q_text": "text_feat",
         "c_text": "text_query", "h": "features", "rnc": "rnc", "total": "total"}
PRECISIONS = [(torch.float32, "", 1e-5), (torch.float64, "f64/", 1e-9)]


@pytest.mark.parametrize("dtype, prefix, tolerance", PRECISIONS)
@pytest.mark.parametrize("case", "ab")
def test_both_flows_and_all_losses_are_the_official_ones(case, dtype, prefix, tolerance):
    z, _, model = official(case, dtype)
    x, y = inputs(z, dtype)
    for flow, text in (("full", x["text"]), ("missing", x["simulated_text"])):
        out = model.flow(text, x["audio"], x["vision"], flow == "missing")
        for ours, theirs in OUTPUTS.items():
            expected = torch.from_numpy(z[f"{prefix}{flow}/{theirs}"])
            assert out[ours].shape == expected.shape
            assert float((out[ours].detach() - expected).abs().max() / expected.abs().max()) < tolerance, ours
    expected = {ours: float(z[f"{prefix}loss/{theirs}"]) for ours, theirs in TERMS.items()}
    assert numbers(model.losses(x, None, y)) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("case", "ab")
def test_gradients_and_five_steps_of_adam_are_the_official_ones(case):
    z, state, model = official(case)
    x, y = inputs(z)
    parameters = {}
    for name, weight in state.items():      # by the values, not by the table that is under test
        for p in model.parameters():
            if p.shape == weight.shape and torch.equal(p.detach(), weight):
                parameters[name] = p
    assert len(parameters) == len(list(model.parameters()))
    model.losses(x, None, y)["total"].backward()
    for key in z.files:
        kind, _, name = key.partition("/")
        if kind == "grad":
            expected, gradient = torch.from_numpy(z[key]), parameters[name].grad
            assert float((gradient - expected).norm() / expected.norm()) < 1e-5, key
        if kind == "gradnorm" and name in parameters and name != "orgin_linear_change.2.bias":   # 0 in theory
            assert parameters[name].grad.norm().item() == pytest.approx(float(z[key]), rel=1e-4), name
    optimizer, totals = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5), []
    for _ in range(5):
        optimizer.zero_grad()
        total = model.losses(x, None, y)["total"]
        totals.append(total.item())
        total.backward()
        optimizer.step()
    assert totals == pytest.approx(z["adam/total_5_steps"].tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype, prefix, tolerance", [(torch.float32, "", 1e-5), (torch.float64, "f64_", 1e-9)])
@pytest.mark.parametrize("case", ["noties_4", "ties_8", "alltied_6", "bs1", "bs2"])
def test_rank_n_contrast_is_the_official_one(case, dtype, prefix, tolerance):
    z = np.load(GOLDEN / "rnc.npz", allow_pickle=False)
    views = torch.from_numpy(z[f"{case}/features"]).to(dtype).requires_grad_()       # (B, 2, d)
    labels = torch.from_numpy(z[f"{case}/labels"]).to(dtype)
    loss = rank_n_contrast(torch.cat(views.unbind(1)), torch.cat((labels, labels)))
    loss.backward()
    assert loss.item() == pytest.approx(float(z[f"{case}/{prefix}loss"]), rel=tolerance, abs=tolerance)
    expected = torch.from_numpy(z[f"{case}/{prefix}grad"]).to(dtype)
    torch.testing.assert_close(views.grad, expected, rtol=tolerance, atol=tolerance)


def test_a_published_checkpoint_is_read_by_its_names():
    """Bare, or inside "state_dict" with "model." before each name: MIA's and all others, to the same weights. It has
    none for the stand-in for simulated text, which stays."""
    _, state, bare = official("a", mia="z")
    nested = DoubleFlow({"text": 20, "audio": 12, "vision": 8}, "regression")
    stand_in = {name: weight.clone() for name, weight in nested.state_dict().items() if name.startswith("simulate.")}
    nested.load_official({"state_dict": {f"model.{name}": weight for name, weight in state.items()}, "epoch": 3})
    expected = {**bare.state_dict(), **stand_in}
    assert set(nested.state_dict()) == set(expected) > set(stand_in) > set()
    for name, weight in nested.state_dict().items():
        assert torch.equal(weight, expected[name])
        assert name in stand_in or any(weight.shape == v.shape and torch.equal(weight, v) for v in state.values())


def test_what_does_not_fit_of_a_published_checkpoint_is_named_and_nothing_loaded():
    _, state, model = official("a")
    wrong = {name: weight + 1 for name, weight in state.items() if name != "fc_att.bias"}
    wrong["fc_out_v.weight"] = torch.zeros(2, 128)
    with pytest.raises(ValueError, match=r"fc_att.bias is missing; fc_out_v.weight has shape \(2, 128\), not \(1,"):
        model.load_official(wrong)
    with pytest.raises(ValueError, match=" and 5 more"):
        model.load_official({name: weight for name, weight in wrong.items() if not name.startswith("frame_dim_")})
    assert torch.equal(model.project["text"].weight, state["frame_dim_reshape_1.weight"])


def by_loop(features, labels, temperature=2.0):
    """(15), term by term."""
    n, total = len(features), 0.0
    labels = labels.reshape(n, -1)
    for i in range(n):
        s = [-(features[i] - features[k]).norm() / temperature for k in range(n)]
        gap = [(labels[i] - labels[k]).abs().sum() for k in range(n)]
        for j in range(n):
            if i != j:
                others = [s[k] for k in range(n) if k != i and gap[k] >= gap[j] - 1e-4]
                total = total - (s[j] - torch.logsumexp(torch.stack(others), 0)) / (n * (n - 1))
    return total


LABELS = {"different": [.3, -1.2, 2.5, 0.0, -2.9, 1.1], "ties": [1.0, 1.0, -1.0, 0.0, 1.0, -1.0],
          "within the slack": [0.0, 1.0, 1.00005, -1.00008, 2.0, 1.0002],
          "columns": [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]}


@pytest.mark.parametrize("name", LABELS)
def test_rank_n_contrast_is_the_loop(name):
    labels = torch.tensor(LABELS[name], dtype=torch.float64)
    a = torch.randn(len(labels), 5, dtype=torch.float64, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    ours, loop = rank_n_contrast(a, labels, 1.5), by_loop(b, labels, 1.5)
    ours.backward()
    loop.backward()
    assert ours.item() == pytest.approx(loop.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("x", [[[0, 0], [1000, 0], [0, 1000], [3000, 3000]], [[1, 1]] * 4])
def test_rank_n_contrast_of_vectors_far_apart_and_equal(x):
    """exp underflows in float32 at a distance of 206; the root has no gradient at 0."""
    labels, x = torch.tensor([0.0, 1.0, 2.0, 2.0]), torch.tensor(x, dtype=torch.float32, requires_grad=True)
    loss = rank_n_contrast(x, labels)
    loss.backward()
    assert loss.item() == pytest.approx(by_loop(x.detach().double(), labels.double()).item(), rel=1e-6)
    assert x.grad.isfinite().all()


def test_losses_in_half_precision_are_those_of_their_vectors_in_float32():
    """The 1e-12 under rmse's root is 0 in half precision, so that its gradient at a = b would be no number."""
    x, labels = torch.randn(6, 5).bfloat16(), torch.tensor(LABELS["ties"])
    torch.testing.assert_close(rank_n_contrast(x, labels), rank_n_contrast(x.float(), labels), rtol=0, atol=0)
    assert rank_n_contrast(x[:1], labels[:1]) == 0
    half = x.half().requires_grad_()
    double_flow.rmse(half, x.half()).backward()
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("mia", ["x_t", "z"])
def test_mia_is_equation_13_at_4_and_at_10(mia):
    """What both autoencoders were given and what became of it, clip by clip; all else is in the official numbers."""
    model, (x, real) = model_of(mia=mia).double().eval(), clips()
    calls, missing = [], torch.tensor([True, False, True, False, True])
    for net in model.imagine:
        net.register_forward_hook(lambda net, parts, refined: calls.append((parts, refined)))
    out = model.flow(x["text"], x["audio"], x["vision"], missing, real)
    for net, (parts, refined) in zip(model.imagine, calls, strict=True):
        (w3, _, w4), w1, w2 = net.transition, net.encoder, net.decoder
        for i in range(5):
            z = torch.cat([part[i] for part in parts], -1) @ w3.weight.T + w3.bias
            z = z.relu() @ w4.weight.T + w4.bias
            expected = (z @ w1.weight.T + w1.bias) @ w2.weight.T + w2.bias + (parts[1][i] if mia == "x_t" else z)
            torch.testing.assert_close(refined[i], expected)
    (h, h_t), (c, c_t) = calls
    for part, m in zip(h, ORDER):
        torch.testing.assert_close(part, model.mlp[m](model.pooling[m](model.project[m](x[m]), real[m])))
    torch.testing.assert_close(out["q_text"], model.queries["text"](torch.where(missing[:, None], h_t, h[1])))
    torch.testing.assert_close(out["c_text"], torch.where(missing[:, None, None], c_t, c[1]))


def simulated_by_hand(model, x, real):
    if "simulated_text" in x:
        return x["simulated_text"], real["simulated_text"]
    return x["audio"] @ model.simulate.weight.T + model.simulate.bias, real["audio"]


@pytest.mark.parametrize("task, classes", TASKS)
@pytest.mark.parametrize("dims", [DIMS, CARRIED])
def test_the_losses_are_equation_14_over_two_separate_flows(task, classes, dims):
    weights = {"w1": .3, "w2": .4, "w3": .5, "w4": .6, "w5": .7, "w6": .8}
    model, (x, real) = model_of(task, classes, dims, temperature=1.5, **weights).double().eval(), clips(dims=dims)
    y = target_of(task, classes)
    simulated, simulated_real = simulated_by_hand(model, x, real)
    with torch.no_grad():
        full = model.flow(x["text"], x["audio"], x["vision"], False, real)
        other = model.flow(simulated, x["audio"], x["vision"], True, {**real, "text": simulated_real})
    expected = {}
    for name, out in (("task_complete", full), ("task_missing", other)):
        if task == "regression":
            expected[name] = float(((out["prediction"][:, 0] - y) ** 2).mean())
        else:
            p = out["prediction"].reshape(-1, classes).softmax(-1)
            expected[name] = -sum(math.log(p[i, k]) for i, k in enumerate(y.flatten())) / len(p)
    for name in ("q_text", "c_text", "h"):
        expected[name] = math.sqrt(float(((other[name] - full[name]) ** 2).mean()))
    vectors = y if task == "regression" else torch.eye(classes)[y].flatten(1)
    expected["rnc"] = by_loop(torch.cat((full["g"], other["g"])), torch.cat((vectors, vectors)).double(), 1.5).item()
    expected["total"] = sum(w * v for w, v in zip(weights.values(), expected.values()))
    assert numbers(model.losses(x, None, y, real)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("term, reaches", [("q_text", False), ("c_text", False), ("h", True)])
def test_only_the_missing_flow_is_taught(term, reaches):
    """w3 and w4 stop at the complete flow's text, w5 pulls both: by the gradient that reaches the true text."""
    model, (x, real) = model_of(dims=CARRIED).double().eval(), clips(dims=CARRIED)
    for m in ("text", "simulated_text"):
        x[m].requires_grad_()
    model.losses(x, None, target_of("regression"), real)[term].backward()
    assert bool(x["text"].grad.abs().sum() > 0) is reaches
    assert x["simulated_text"].grad.abs().sum() > 0


@pytest.mark.parametrize("dims", [DIMS, CARRIED])
def test_each_clip_takes_the_flow_that_its_text_asks_for(dims):
    model, (x, real) = model_of(dims=dims).double().eval(), clips(dims=dims)
    x["text"][[1, 4]] = 0
    answer = model(**x, real=real)
    simulated, simulated_real = simulated_by_hand(model, x, real)
    for i in range(5):
        text, text_real = (simulated, simulated_real) if i in (1, 4) else (x["text"], real["text"])
        masks = {m: r[i:i + 1] for m, r in {**real, "text": text_real}.items()}
        alone = model.flow(text[i:i + 1], x["audio"][i:i + 1], x["vision"][i:i + 1], i in (1, 4), masks)
        torch.testing.assert_close(answer[i:i + 1], alone["prediction"], rtol=0, atol=1e-12)


def test_carried_simulated_text_goes_with_its_audio():
    """Of each clip; here the last two have none."""
    model, (x, real) = model_of(dims=CARRIED).double().eval(), clips(dims=CARRIED)
    heard = torch.tensor([True, True, True, False, False])
    silent = {**x, "text": x["text"] * 0, "audio": x["audio"] * heard[:, None, None]}
    other = {**silent, "simulated_text": torch.randn_like(x["simulated_text"])}
    assert torch.eq(model(**silent, real=real), model(**other, real=real)).flatten().tolist() == (~heard).tolist()


def test_a_stream_without_a_real_frame_gives_zeros():
    pooled = model_of().eval().pooling["audio"](torch.randn(2, 4, 256), torch.tensor([[True] * 4, [False] * 4]))
    assert pooled[1].eq(0).all() and pooled[0].ne(0).any()


def test_both_flows_may_be_equal():
    """Simulated text = text, no MIA: the root at zero has a finite gradient."""
    model, (x, real) = model_of(dims=CARRIED, mia="off").double().eval(), clips(dims=CARRIED)
    x["simulated_text"], real["simulated_text"] = x["text"], real["text"]
    terms = model.losses(x, None, target_of("regression"), real)
    terms["total"].backward()
    assert terms["q_text"].item() == terms["c_text"].item() == terms["h"].item() == pytest.approx(1e-6)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_schedule_and_the_listed_settings():
    """Epochs 0-4: 1/5 ... 5/5; then 1 up to epoch 13, .9 from 14, .81 from 24."""
    factors = [double_flow.learning_rate_factor(e) for e in (0, 1, 4, 5, 13, 14, 23, 24, 34)]
    assert factors == pytest.approx([.2, .4, 1, 1, 1, .9, .9, .81, .729])
    assert double_flow.TASKS == {"mosi": "regression", "mosei": "regression", "iemocap": "emotions"}
    assert double_flow.FEATURES["text"] == 4096         # Vicuna's
    torch.manual_seed(0)
    model = DoubleFlow({"text": 300, "audio": 74, "vision": 35}, "regression")
    assert {layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)} == {.3}
    contexts = torch.cat([pooling.context.detach() for pooling in model.pooling.values()])
    assert contexts.std().item() == pytest.approx((2 / 257) ** .5, rel=.1)      # Glorot's
    for name, c in double_flow.PAPER.items():
        assert (c.mia, c.temperature) == ("x_t", 2)
        assert [c.w1, c.w2, c.w3, c.w4, c.w5, c.w6] == [.5, .5, .1, .7, .13, .5]
        assert (c.lr, c.weight_decay, c.batch_size, c.clip) == (1e-4, 1e-5, 96, 0)
        assert c.epochs == (25 if name == "mosei" else 100)


def lines(*widths):
    """Parameters of Linear layers, (in, out) each."""
    return sum(a * b + b for a, b in widths)


def count(dims, classes=2, task="regression", **changes):
    return sum(p.numel() for p in DoubleFlow(dims, task, Config(**changes), classes).parameters())


def test_parameter_counts_are_pinned():
    """By hand for 300 / 74 / 35, D = 256, in the order of the equations."""
    dims, square = {"text": 300, "audio": 74, "vision": 35}, (256, 256)
    shared = lines((300, 256), (74, 256), (35, 256)) + 3 * (256 + lines(square)) + 3 * lines(square, square)
    shared += lines((768, 256), square, (256, 3)) + 7 * lines(square) + 3 * lines(square, square, square, (256, 128))
    shared += lines((896, 256), (256, 128), (128, 7)) + lines((128, 64), (64, 64))
    mia = lines((768, 256), square, (256, 128), (128, 256)) + lines((384, 128), (128, 128), (128, 64), (64, 128))
    assert count({**dims, "simulated_text": 300}, mia="off") == shared + lines((128, 1))
    assert count(dims) == shared + mia + lines((128, 1), (74, 300))
    assert count(dims, 3, "polarity") == shared + mia + lines((128, 3), (74, 300))


def test_coin_flips_are_zero_or_twice_in_equal_shares_and_independent():
    torch.manual_seed(0)
    y = double_flow.Half()(torch.ones(4001, 13))
    assert set(y.unique().tolist()) == {0.0, 2.0} and y.shape == (4001, 13)
    assert (y.mean(0) - 1).abs().max() < .08 and abs(y.mean().item() - 1) < .02       # 5 and 4.5 deviations
    centred = y.flatten() - 1
    for lag in (*range(1, 17), 64):
        assert abs((centred[lag:] * centred[:-lag]).mean().item()) < .02, lag


def test_coin_flips_are_drawn_anew_send_the_gradient_where_they_let_pass_and_are_off_in_evaluation():
    half, frame = double_flow.Half(), torch.randn(5, 7, requires_grad=True)
    out = half(frame)
    out.sum().backward()
    assert torch.equal(frame.grad, (out / frame).round().detach())
    assert not torch.equal(half(frame), out) and torch.equal(half.eval()(frame), frame)


def test_simulated_text_has_the_width_of_text_and_a_model_built_for_it_asks_for_it():
    with pytest.raises(ValueError, match="9 features, not the 12 of text"):
        model_of(dims={**DIMS, "simulated_text": 9})
    model, (x, real) = model_of(dims=CARRIED).double(), clips()
    with pytest.raises(ValueError, match="built for data with simulated_text"):
        model(**x)
    with pytest.raises(ValueError, match="real has no mask of simulated_text"):
        model(**x, simulated_text=x["text"], real=real)
