"""Double-Flow: Enhancing Multimodal Sentiment Analysis for Missing Modality through Self-Distillation and
Unified Modality Cross-Attention. Weng et al., ICASSP 2025, https://arxiv.org/abs/2410.15029

Text is the modality most likely to be missing. One network is run as two flows with the same weights:
the complete flow on audio, text and vision, and the missing flow with simulated text in the place of
text. The missing flow learns to agree with the complete one (self-distillation); its text is refined by
the other modalities (MIA, modality imagination autoencoder); and both flows order their representations
by sentiment (RNC, rank-n-contrast). Seven queries, one for each combination of modalities, attend to
each modality's frames (UMCA, unified modality cross-attention). The authors simulate text by a language
model that hears the audio.

The network and the losses are those of the official code (github.com/WarmCongee/SDUMC), whose programs
do not start as published but whose classes do: with mia="off" and the same weights, all outputs, losses
and gradients agree with theirs. (*) marks our choice.

Notation: B clips, T frames, D = 256; m in {a, t, v} = audio, text, vision; superscripts f, m =
complete, missing flow; sg = no gradient; MLP(x, y) = Linear to x, ReLU, dropout .3, Linear to y, ReLU,
dropout .3; RAE = residual autoencoder. In the code `real`, m -> (B, T), is True where a frame
belongs to the clip, missing or not, and False in padding. The numbers of the equations are ours.

  (1) Z_m = W_m X_m + b_m  in R^(T x D); text and simulated text share W_t                DoubleFlow.flow
  (2) Z' = drop.5(Z),  alpha = softmax over frames of 0.3 c . tanh(U Z' + e),             Pooling
      p = drop.5(sum alpha Z')  (*) padding left out
  (3) h_m = MLP(D, D)(p_m)                                                                DoubleFlow.flow
  (4) missing flow: h_t <- RAE(h_a, h_t, h_v)                                           DoubleFlow.refine
  (5) w = W MLP(D, D)([h_a; h_t; h_v]) + b  in R^3, no softmax                            DoubleFlow.flow
  (6) f_S = sum of w_m h_m over S for S in atv, at, tv, av                                DoubleFlow.flow
  (7) Q = [q_atv, q_at, q_tv, q_av, q_a, q_t, q_v]  in R^(7 x D), from f_S or h_m by      DoubleFlow.flow
      its own Linear, ReLU, dropout .3 each
  (8) Z' = drop.5(Z),  K = tanh(U Z' + e),  A = softmax over frames of 0.3 K (P Q + b)^T  CrossAttention
      (*) padding left out
  (9) C_m = MLP(D, 128)(drop.5(A^T Z'))  in R^(7 x 128)                                   CrossAttention
  (10) missing flow: C_t <- RAE(C_a, C_t, C_v)                                          DoubleFlow.refine
  (11) G = sum w_m C_m,  r = W MLP(D, 128)(flat G) + b  in R^7,  h* = sum r_k G_k         DoubleFlow.flow
  (12) y = W h* + b,  g = W2 relu(W1 h* + b1) + b2  in R^64                               DoubleFlow.flow
  (13) RAE(a, t, v) = W2 (W1 z + b1) + b2 + t,  z = W4 relu(W3 [a; t; v] + b3) + b4       Autoencoder
      (*) t is added, as the paper describes it; the official code has MIA commented out, and adds z in
      another copy: `mia` is x_t, z or off
  (14) total = w1 MSE(y^f, y) + w2 MSE(y^m, y) + w3 RMSE(q_t^m, sg q_t^f)               DoubleFlow.losses
      + w4 RMSE(C_t^m, sg C_t^f) + w5 RMSE(h*^m, h*^f) + w6 RNC                           rmse
      (*) RMSE has 1e-12 under the root: where both are equal its gradient is else not a number
  (15) RNC = -1/(n(n-1)) sum_i sum_(j != i) (s_ij - log sum_k exp s_ik),                  rank_n_contrast
      s_ij = -|x_i - x_j| / tau,  k over all k != i with |y_i - y_k| >= |y_i - y_j| - 1e-4;
      x = [g^f; g^m], n = 2B, tau = 2

(*) Where no simulated text is at hand, a linear map of each audio frame into the text's width, learned
with the missing flow, stands in for the language model. (*) Simulated text that the data carries
stays whole while any audio frame is left, else it is zeros. (*) A clip whose text is all zeros takes
the missing flow, every other one the complete flow. These two cases on MOSEI are all that the paper
has: missing audio or vision, other data sets, and classes (cross-entropy in place of MSE; RNC compares
one-hot vectors by L1) are extensions. Training sees complete clips and simulated text alone.

Use in another code base (this file needs torch alone), as train.py trains it:

    def frames(x):      # (B, T, d) -> (B, T): True from a clip's first frame that is not zeros to its last
        n = (x != 0).any(-1)
        return n.cumsum(1) * n.flip(1).cumsum(1).flip(1) > 0

    model = DoubleFlow({"text": 300, "audio": 74, "vision": 35}, "regression")
    c, best = model.config, -torch.inf
    optimizer = torch.optim.Adam(model.parameters(), lr=c.lr, weight_decay=c.weight_decay)
    for epoch in range(c.epochs):
        optimizer.param_groups[0]["lr"] = c.lr * learning_rate_factor(epoch)
        model.train()                                       # again after each validation
        for complete, target in batches:
            real = dict.fromkeys(complete, frames(torch.cat([*complete.values()], -1)))
            optimizer.zero_grad()
            model.losses(complete, None, target, real)["total"].backward()      # None: no missing copies
            if c.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
            optimizer.step()
        score = validate(model.eval(), model.stages["train"])
        if score > best:                                    # (*) the official code: on the test split,
            best, kept = score, {k: v.clone() for k, v in model.state_dict().items()}   # one for each flow
    model.load_state_dict(kept)
    sentiment = model.eval()(text, audio, vision, real)     # (B, 1); real: of these clips

batches: complete, {"text": (B, T, 300), ...}, whole clips; target (B,), scores, float. validate: minus the
mean absolute error on the validation split, the mean over these sets of streams; "lav" is
all, "av" has zeros for text.
For C classes instead of a score: DoubleFlow(dims, "polarity", classes=C), target (B,), long, 0 to
C - 1, logits (B, C). Of a sentiment y two classes are (y > 0).long(), without the clips of y = 0.
Where the model was built with dims["simulated_text"], complete has "simulated_text" too, (B, T, 300), and
forward takes it as its last argument.

real is True from a clip's first frame to its last, missing frames between them too; at test as well it is that
of the whole clip. `frames` makes it of whole clips, padded in front (MulT, MultiBench) or behind with zeros.
Unaligned streams have a mask each, {m: frames(x) for m, x in complete.items()}. A stream's by lengths:
torch.arange(T) < lengths[:, None] if padded behind, torch.arange(T) >= T - lengths[:, None] if in front.
Without real padding counts as frames: the answers change unnoticed. For a stream that you do not have say
width 1 and give zeros (B, T, 1).

Standardise first: by the mean and deviation of each feature over the training split's frames that are not all
zeros (a deviation of 0 is 1); clamp to +-5, and set frames of zeros to zero again. The authors' own
features are used as they are.

RNC compares the clips of a batch, and RMSE is the root over it: micro-batches and ranks change them. RNC of
random vectors is 3.3 for 64 rows, 1.9 for 16 and 0.6 for 4; a clip has two rows.
In DistributedDataParallel wrap a module whose forward returns model.losses(...): with
ddp.module.losses(...) the ranks drift apart without a word.
"""
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STREAMS = ("text", "audio", "vision")
ORDER = ("audio", "text", "vision")         # in which the network joins its modalities
TASKS = {"mosi": "regression", "mosei": "regression", "iemocap": "emotions"}
DECISIONS = {"regression": 1, "polarity": 1, "emotions": 4}     # answers a clip: a score, or decisions
Streams = dict[str, Tensor]             # m -> frames (B, T_m, d_m)
Masks = dict[str, Tensor] | None        # m -> (B, T_m), True = not padding; None = no padding
TABLE = {"lav": "complete", "av": "text missing"}   # the paper's two columns, and their sets of streams
FEATURES = {"text": 4096, "audio": 1024, "vision": 1024}    # widths of the features that REPORTED is of


@dataclass
class Config:
    """Defaults: the official code's for MOSEI, the paper's only data set, but for `mia`."""
    lr: float = 1e-4
    weight_decay: float = 1e-5
    batch_size: int = 96
    epochs: int = 25
    mia: str = "x_t"            # what (13) adds: its t ("x_t"), as the paper describes it; z; or off
    temperature: float = 2.0    # tau in (15)
    w1: float = 0.5             # of (14), from a later command of the official code
    w2: float = 0.5
    w3: float = 0.1
    w4: float = 0.7
    w5: float = 0.13
    w6: float = 0.5             # a loss of weight 0 is not computed
    clip: float = 0.0           # largest gradient norm; 0: not clipped
    aligned: bool = True        # whether streams are aligned; makes no difference to this method


PAPER = {
    "mosei": Config(),
    "mosi": Config(epochs=100),         # (*) 25 epochs of these small sets would be too few steps
    "iemocap": Config(epochs=100),
}
ABLATIONS = {
    "mia_z": {"mia": "z"},
    "no_mia": {"mia": "off"},
    "no_distillation": {"w3": 0.0, "w4": 0.0},
    "no_w3": {"w3": 0.0},
    "no_w4": {"w4": 0.0},
    "no_w5": {"w5": 0.0},
    "no_rnc": {"w6": 0.0},
    "task_only": {"w3": 0.0, "w4": 0.0, "w5": 0.0, "w6": 0.0},
}
# data set -> ablation ("" = the full method) -> metric -> column -> number. The official README calls them
# MSE, but its checkpoints are named and chosen by MAE. The paper's other tables are not known to us.
REPORTED = {"mosi": {"": {}}, "mosei": {"": {"MAE": {"lav": 0.5060, "av": 0.5503}}}, "iemocap": {"": {}}}

# Our names of parameters -> the official code's; the longest prefix that fits counts.
OFFICIAL = {
    "project.audio": "frame_dim_reshape_0",
    "project.text": "frame_dim_reshape_1",
    "project.vision": "frame_dim_reshape_2",
    "pooling.audio.context": "fra2utt_0.attention_context_vector",
    "pooling.text.context": "fra2utt_1.attention_context_vector",
    "pooling.vision.context": "fra2utt_2.attention_context_vector",
    "pooling.audio.project": "fra2utt_0.input_proj",
    "pooling.text.project": "fra2utt_1.input_proj",
    "pooling.vision.project": "fra2utt_2.input_proj",
    "mlp.audio": "audio_mlp",
    "mlp.text": "text_mlp",
    "mlp.vision": "video_mlp",
    "weights.0": "attention_mlp",
    "weights.1": "fc_att",
    "queries.atv": "cross_fused_query_mlp",
    "queries.at": "cross_at_query_mlp",
    "queries.tv": "cross_tv_query_mlp",
    "queries.av": "cross_av_query_mlp",
    "queries.audio": "cross_audio_query_mlp",
    "queries.text": "cross_text_query_mlp",
    "queries.vision": "cross_video_query_mlp",
    "cross.audio.key": "cross_att_fra2utt_0.input_proj",
    "cross.text.key": "cross_att_fra2utt_1.input_proj",
    "cross.vision.key": "cross_att_fra2utt_2.input_proj",
    "cross.audio.query": "cross_att_fra2utt_0.query_proj",
    "cross.text.query": "cross_att_fra2utt_1.query_proj",
    "cross.vision.query": "cross_att_fra2utt_2.query_proj",
    "cross.audio.mlp": "cross_audio_mlp",
    "cross.text.mlp": "cross_text_mlp",
    "cross.vision.mlp": "cross_video_mlp",
    "cross_weights.0": "cross_attention_mlp",
    "cross_weights.1": "cross_fc_att",
    "head": "fc_out_v",
    "contrast": "orgin_linear_change",
    "imagine.0.transition": "missing_text_imagination_mlp.transition",
    "imagine.0.encoder": "missing_text_imagination_mlp.encoder_0.0",
    "imagine.0.decoder": "missing_text_imagination_mlp.decoder_0.0",
    "imagine.1.transition": "missing_cross_text_query_imagination_mlp.transition",
    "imagine.1.encoder": "missing_cross_text_query_imagination_mlp.encoder_0.0",
    "imagine.1.decoder": "missing_cross_text_query_imagination_mlp.decoder_0.0",
}


def learning_rate_factor(epoch: int) -> float:
    """What the learning rate is multiplied by in epoch 0, 1, ...: five epochs of warm-up, then 0.9 every
    ten epochs."""
    return (epoch + 1) / 5 if epoch < 5 else 0.9 ** ((epoch - 4) // 10)


def check_names(names, what: str) -> None:
    """A ValueError unless these are the streams, none too few and none that would be ignored."""
    if not isinstance(names, dict) or set(names) - {"simulated_text"} != set(STREAMS):
        raise ValueError(f"{what} must be a dict of {', '.join(STREAMS)}: give zeros of width 1 for a "
                         "stream that you do not have")


def check_shape(name: str, x: Tensor, shape) -> None:
    """A ValueError that names both shapes, unless x has this one."""
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, not {tuple(shape)}")


def full_precision(x: Tensor) -> Tensor:
    """float32 at least: half precision has no cdist and would lose small distances."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mlp(width_in: int, *widths: int) -> nn.Sequential:
    """Linear, ReLU and dropout .3 to each of these widths in turn."""
    layers = []
    for width in widths:
        layers += [nn.Linear(width_in, width), nn.ReLU(), nn.Dropout(0.3)]
        width_in = width
    return nn.Sequential(*layers)


def masks_of(streams: Streams, real: Masks) -> Streams:
    """real as bool masks of these streams, all True where it is None."""
    if real is None:
        return {m: torch.ones_like(x[..., 0]).bool() for m, x in streams.items()}
    check_names(real, "real")
    if not set(streams) <= set(real):
        raise ValueError("real has no mask of simulated_text")
    for m in streams:
        check_shape(f"real of {m}", real[m], streams[m].shape[:2])
    return {m: real[m].bool() for m in streams}


def over_frames(score: Tensor, real: Tensor) -> Tensor:
    """softmax of 0.3 score over the frames, dimension 1 of (B, T, k); padding gets 0, and so does all of a
    clip without a real frame. real (B, T) bool, True = not padding."""
    score = (0.3 * score).masked_fill(~real[..., None], torch.finfo(score.dtype).min)
    return score.softmax(1) * real[..., None]


class Half(nn.Module):
    """Dropout of .5, on a CPU by coin flips, eight to each random integer: nn.Dropout(0.5) spends nearly
    half of a training step there on drawing, and the step takes 1.6 times as long."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu":
            return F.dropout(x, 0.5, self.training)
        eight = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_()
        coins = eight.view(torch.uint8)[:x.numel()] & 1
        return x * coins.view(x.shape).to(x.dtype).mul_(2)


class Pooling(nn.Module):
    """(2): Z (B, T, D) -> p (B, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.context = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, width)))
        self.project = nn.Linear(width, width)
        self.dropout = Half()

    def forward(self, z: Tensor, real: Tensor) -> Tensor:
        z = self.dropout(z)
        alpha = over_frames(self.project(z).tanh() @ self.context.T, real)  # (B, T, 1)
        return self.dropout((alpha.transpose(1, 2) @ z)[:, 0])


class CrossAttention(nn.Module):
    """UMCA, (8) and (9): queries (B, 7, D) attend to the frames Z (B, T, D) -> C (B, 7, 128)."""

    def __init__(self, width: int):
        super().__init__()
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.dropout = Half()
        self.mlp = mlp(width, width, 128)

    def forward(self, queries: Tensor, z: Tensor, real: Tensor) -> Tensor:
        z = self.dropout(z)
        score = self.key(z).tanh() @ self.query(queries).transpose(1, 2)    # (B, T, 7)
        a = over_frames(score, real)
        return self.mlp(self.dropout(a.transpose(1, 2) @ z))


class Autoencoder(nn.Module):
    """RAE, (13): three tensors (..., D) -> text (..., D). residual: "x_t" or "z"."""

    def __init__(self, width: int, bottleneck: int, residual: str):
        super().__init__()
        self.residual = residual
        self.transition = nn.Sequential(nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.encoder = nn.Linear(width, bottleneck)
        self.decoder = nn.Linear(bottleneck, width)

    def forward(self, audio: Tensor, text: Tensor, vision: Tensor) -> Tensor:
        z = self.transition(torch.cat((audio, text, vision), dim=-1))
        return self.decoder(self.encoder(z)) + (text if self.residual == "x_t" else z)


def rmse(a: Tensor, b: Tensor) -> Tensor:
    """The root of the mean square over all elements; 1e-12 keeps its gradient finite where a = b."""
    check_shape("b", b, a.shape)
    return (F.mse_loss(full_precision(a), full_precision(b)) + 1e-12).sqrt()


def rank_n_contrast(features: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """RNC, (15), a scalar. features (n, d); labels (n,), or (n, k) compared by their L1 distance.

    Of each pair (i, j), j is told apart from every k that is at least as far from i by its label, within
    1e-4. (*) Sorting those label distances turns the sum over k into the tail of one running log-sum-exp:
    O(n^2 log n) time, O(n^2) memory, and exact however far the vectors are apart, where the official exp
    underflows. One vector has no pair: 0.
    """
    n = len(features)
    check_shape("features", features, features.reshape(n, -1).shape)
    check_shape("labels", labels, (n, *labels.shape[1:]))
    if n < 2:
        return 0 * features.sum()
    features = full_precision(features)
    labels = labels.reshape(n, -1).to(features)
    gap = (labels[:, None] - labels[None]).abs().sum(-1)            # |y_i - y_k| (n, n)
    gap.fill_diagonal_(-torch.inf)                                  # so i comes first, before every tail used
    # Not through the matrix product: it loses small distances. The gradient of cdist is 0 at distance 0.
    s = -torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist") / temperature
    order = gap.argsort(dim=1)
    tail = s.gather(1, order).flip(1).logcumsumexp(1).flip(1)       # log-sum-exp from a place on
    first = torch.searchsorted(gap.gather(1, order), gap - 1e-4)    # where the k of (i, j) begin
    return (tail.gather(1, first) - s).fill_diagonal_(0).sum() / (n * (n - 1))


def stack(first: Tensor, second: Tensor) -> Tensor:
    """(B, T, ...) and (B, S, ...) to (2B, max(T, S), ...): the first, then the second, padded behind."""
    n, length = len(first), max(first.shape[1], second.shape[1])
    both = first.new_zeros(2 * n, length, *first.shape[2:])
    both[:n, :first.shape[1]] = first
    both[n:, :second.shape[1]] = second
    return both


class DoubleFlow(nn.Module):
    """dims: feature width of text, audio and vision, and of simulated_text where the data carries it.
    task: "regression", one score (B, 1); "polarity", one decision, logits (B, C); or "emotions", four,
    logits (B, 4, C). classes: C. There is one stage, about the two sets of streams beside its name, one a
    flow."""

    stages = {"train": tuple(TABLE)}
    encode = None               # streams interact, so that none can be encoded by itself

    def __init__(self, dims: dict[str, int], task: str, config: Config | None = None, classes: int = 2):
        super().__init__()
        config = config or Config()
        check_names(dims, "dims")
        if task not in DECISIONS:
            raise ValueError(f"DoubleFlow: task must be one of {', '.join(DECISIONS)}, not {task!r}")
        if config.mia not in ("x_t", "z", "off"):
            raise ValueError(f"mia must be x_t, z or off, not {config.mia!r}")
        if dims.get("simulated_text", dims["text"]) != dims["text"]:
            raise ValueError(f"simulated text has {dims['simulated_text']} features, not the "
                             f"{dims['text']} of text")
        if classes < 2:
            raise ValueError(f"classes must be 2 or more, not {classes}")
        self.config, self.task, self.classes = config, task, classes
        self.first_batch = True
        d = 256
        outputs = 1 if task == "regression" else DECISIONS[task] * classes
        self.project = nn.ModuleDict({m: nn.Linear(dims[m], d) for m in ORDER})
        self.pooling = nn.ModuleDict({m: Pooling(d) for m in ORDER})
        self.mlp = nn.ModuleDict({m: mlp(d, d, d) for m in ORDER})
        self.weights = nn.Sequential(mlp(3 * d, d, d), nn.Linear(d, 3))
        self.queries = nn.ModuleDict({q: mlp(d, d) for q in ("atv", "at", "tv", "av", *ORDER)})
        self.cross = nn.ModuleDict({m: CrossAttention(d) for m in ORDER})
        self.cross_weights = nn.Sequential(mlp(7 * 128, d, 128), nn.Linear(128, 7))
        self.head = nn.Linear(128, outputs)
        self.contrast = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))
        self.imagine = nn.ModuleList((Autoencoder(d, 128, config.mia), Autoencoder(128, 64, config.mia)))
        if "simulated_text" not in dims:
            self.simulate = nn.Linear(dims["audio"], dims["text"])
        # Taken out at the end: so all other parts start from the same random weights in each ablation.
        if config.mia == "off":
            del self.imagine

    def begin(self, stage: str) -> None:
        """There is one stage, in which everything learns."""
        if stage not in self.stages:
            raise ValueError(f"no stage {stage!r}: this model has {', '.join(self.stages)}")

    def teacher_outputs(self, complete: Streams, real: Masks = None) -> None:
        """None: there is no frozen teacher, the complete flow learns with the missing one."""

    def warn_of_mask(self, streams: Streams, real: Masks) -> None:
        """Warn of a mask that leaves out frames which are not zero, as one for clips padded behind does of
        clips padded in front. At the first batch alone, because a GPU is waited for."""
        if self.first_batch and any(streams[m][~real[m]].any() for m in STREAMS):
            warnings.warn("real leaves out frames that are not zero: it must be True from a clip's first "
                          "frame to its last, wherever the clip is padded")
        self.first_batch = False

    def refine(self, level: int, parts: dict, missing: Tensor) -> dict:
        """MIA, (4) and (10): parts m -> (B, ...), of which the text's is refined where missing (B,)."""
        if self.config.mia == "off":
            return parts
        text = self.imagine[level](*(parts[m] for m in ORDER))
        missing = missing.reshape(-1, *[1] * (text.ndim - 1))
        return {**parts, "text": torch.where(missing, text, parts["text"])}

    def flow(self, text: Tensor, audio: Tensor, vision: Tensor, text_missing: bool | Tensor,
             real: Masks = None) -> dict[str, Tensor]:
        """(1) to (12). text is whatever stands in that stream, true or simulated; text_missing, a bool or
        (B,) bool, says which. Returns prediction (as `classify`), h (B, 128), g (B, 64), q_text (B, 256)
        and c_text (B, 7, 128)."""
        x = {"audio": audio, "text": text, "vision": vision}
        real = masks_of(x, real)
        missing = torch.as_tensor(text_missing, device=text.device).expand(len(text))
        z = {m: self.project[m](x[m]) for m in ORDER}                                       # (1)
        h = {m: self.mlp[m](self.pooling[m](z[m], real[m])) for m in ORDER}                 # (2), (3)
        h = self.refine(0, h, missing)                                                      # (4)
        w = self.weights(torch.cat([h[m] for m in ORDER], dim=-1))                          # (5) (B, 3)
        a, t, v = (w[:, i:i + 1] * h[m] for i, m in enumerate(ORDER))
        mixture = {"atv": a + t + v, "at": a + t, "tv": t + v, "av": a + v, **h}            # (6)
        q = {name: query(mixture[name]) for name, query in self.queries.items()}
        queries = torch.stack(list(q.values()), dim=1)                                    # (7) (B, 7, D)
        c = {m: self.cross[m](queries, z[m], real[m]) for m in ORDER}                       # (8), (9)
        c = self.refine(1, c, missing)                                                      # (10)
        joint = sum(w[:, i, None, None] * c[m] for i, m in enumerate(ORDER))              # (11) G (B, 7, 128)
        r = self.cross_weights(joint.flatten(1))
        h_star = (r[..., None] * joint).sum(1)
        return {"prediction": self.classify(h_star), "h": h_star, "g": self.contrast(h_star),   # (12)
                "q_text": q["text"], "c_text": c["text"]}

    def classify(self, h: Tensor) -> Tensor:
        """y of (12): h* (B, 128) -> score (B, 1), logits (B, C) or (B, 4, C)."""
        y = self.head(h)
        return y.unflatten(-1, (-1, self.classes)) if self.task == "emotions" else y

    def simulated_text(self, streams: Streams, real: Streams) -> tuple[Tensor, Tensor]:
        """Simulated text (B, T, d_text) and its mask (B, T): what the data carries, or made from the audio
        as it stands. Carried text is zeros where no audio frame is left to simulate it from."""
        if "simulated_text" not in streams:
            if not hasattr(self, "simulate"):
                raise ValueError("this model was built for data with simulated_text: pass it, or build a "
                                 "model without it in dims")
            return self.simulate(streams["audio"]), real["audio"]
        audible = (streams["audio"] != 0).flatten(1).any(1)
        return streams["simulated_text"] * audible[:, None, None], real["simulated_text"]

    def forward(self, text: Tensor, audio: Tensor, vision: Tensor, real: Masks = None,
                simulated_text: Tensor | None = None) -> Tensor:
        """Score (B, 1), logits (B, C) or (B, 4, C) of clips (B, T_m, d_m), missing frames being zeros. A
        clip whose text is all zeros takes the missing flow, every other one the complete flow.
        simulated_text (B, T, d_text) is asked for if the model was built with its width."""
        streams = {"text": text, "audio": audio, "vision": vision}
        if simulated_text is not None:
            streams["simulated_text"] = simulated_text
        return self.classify(self.represent(streams, real))

    def represent(self, streams: Streams, real: Masks = None) -> Tensor:
        """h* (B, 128) of (11), each clip through the flow that its text asks for."""
        check_names(streams, "streams")
        real = masks_of(streams, real)
        self.warn_of_mask(streams, real)
        text, n = streams["text"], len(streams["text"])
        missing = ~(text != 0).flatten(1).any(1)                            # (B,)
        simulated, simulated_real = self.simulated_text(streams, real)
        row = torch.arange(n, device=text.device) + n * missing         # of the true or simulated text
        text = stack(text, simulated)[row]
        real["text"] = stack(real["text"], simulated_real)[row]
        return self.flow(text, streams["audio"], streams["vision"], missing, real)["h"]

    def task_loss(self, y: Tensor, target: Tensor) -> Tensor:
        """Squared error or cross-entropy. y: answers of `classify`; target (B, 1) or (B, 4)."""
        if self.task == "regression":
            return F.mse_loss(y, target)
        return F.cross_entropy(y.reshape(-1, self.classes), target.flatten())

    def losses(self, complete: Streams, missing: Streams | None, target: Tensor, real: Masks = None,
               teacher: None = None) -> dict[str, Tensor]:
        """The loss terms, unweighted, and their weighted sum "total" (14).

        complete: with "simulated_text" where the data carries it; target: scores (B,) for regression,
        classes (B,) for polarity, (B, 4) for emotions. missing, clips with missing frames, is not looked
        at: the missing flow is the complete clip with its text replaced. There is no teacher.
        """
        check_names(complete, "streams")
        c, n = self.config, len(complete["text"])
        y = target.reshape(len(target), -1)                                 # (B, 1) or (B, 4)
        check_shape("target", y, (n, DECISIONS[self.task]))
        # Both flows in one pass: B clips for the complete one, then B for the missing one.
        real = masks_of(complete, real)
        self.warn_of_mask(complete, real)
        simulated, simulated_real = self.simulated_text(complete, real)
        both = {m: torch.cat((complete[m], complete[m])) for m in ("audio", "vision")}
        both_real = {m: torch.cat((real[m], real[m])) for m in ("audio", "vision")}
        both["text"] = stack(complete["text"], simulated)
        both_real["text"] = stack(real["text"], simulated_real)
        out = self.flow(**both, text_missing=torch.arange(2 * n, device=y.device) >= n, real=both_real)
        full = {name: value[:n] for name, value in out.items()}
        other = {name: value[n:] for name, value in out.items()}

        terms = {"task_complete": self.task_loss(full["prediction"], y),
                 "task_missing": self.task_loss(other["prediction"], y)}
        if c.w3:
            terms["q_text"] = rmse(other["q_text"], full["q_text"].detach())
        if c.w4:
            terms["c_text"] = rmse(other["c_text"], full["c_text"].detach())
        if c.w5:
            terms["h"] = rmse(other["h"], full["h"])
        if c.w6:
            labels = y if self.task == "regression" else F.one_hot(y, self.classes).flatten(1)
            terms["rnc"] = rank_n_contrast(out["g"], torch.cat((labels, labels)), c.temperature)
        weights = {"task_complete": c.w1, "task_missing": c.w2,
                   "q_text": c.w3, "c_text": c.w4, "h": c.w5, "rnc": c.w6}
        terms["total"] = sum(weights[name] * term for name, term in terms.items())  # (14)
        return terms

    def load_official(self, checkpoint: dict) -> None:
        """Take the weights of the official code: a state_dict, or a dict that holds one as "state_dict"; a
        leading "model." of its names is left out, and entries that this network does not use are ignored.
        A weight that is missing or of another shape is named in a ValueError, and nothing is loaded then.
        `simulate`, which the official code does not have, stays as it is."""
        official = checkpoint.get("state_dict", checkpoint)
        official = {name.removeprefix("model."): value for name, value in official.items()}
        state, wrong = self.state_dict(), []
        for name, weight in state.items():
            if name.startswith("simulate."):
                continue
            prefix = max((p for p in OFFICIAL if name.startswith(p)), key=len)
            theirs = OFFICIAL[prefix] + name.removeprefix(prefix)
            if theirs not in official:
                wrong.append(f"{theirs} is missing")
            elif official[theirs].shape != weight.shape:
                shape = tuple(official[theirs].shape)
                wrong.append(f"{theirs} has shape {shape}, not {tuple(weight.shape)}")
            else:
                state[name] = official[theirs]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(f"not the weights of this network: {'; '.join(wrong[:3])}{more}")
        self.load_state_dict(state)


Model = DoubleFlow      # METHODS in eval.py says what the programs ask of this file
