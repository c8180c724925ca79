"""CorrKD: Correlation-Decoupled Knowledge Distillation for Multimodal Sentiment Analysis with
Incomplete Modalities. Li et al., CVPR 2024, pp. 12458-12468, https://arxiv.org/abs/2404.16456

A teacher is trained on complete clips and frozen. A student of the same architecture then sees copies of the clips with
frames and whole streams missing, and learns from the labels and from the teacher: to place each clip where the teacher
places it and away from other clips (SCD), to stand to the class prototypes as the teacher does (CPD), and to answer in
agreement with it, target class and other classes apart (RCD). At test time the student works alone. No official code
was found.

Notation: m in {text, audio, vision}; N clips, T frames, d = 40, C classes; superscripts t, s = teacher, student;
sp(z) = log(1 + exp(z)). Marked (*): our choice, because the paper is silent or cannot be literal. Marked (~): the form
as others quote it, or as the group's next paper prints it (HRLF, NeurIPS 2024); not checked against this paper's text.

  (1) F_m = sqrt(d) Conv1d_k3(X_m) + PE(T_m, d),  E_m = Transformer(F_m)                        Encoder
      (*) no bias, depth, FFN 4d, pre-LayerNorm, dropout .1 outside attention, sqrt(d), padding masked
  (2) H = [GAP(E_text); GAP(E_audio); GAP(E_vision)]  in R^3d                                   Network.represent
  (3) f = W H + b,  R = softmax(f)  (*) one linear layer                                        Network.forward
  (4) SCD = mean_i |H_i^s - H_i^t|^2 + mean_{i != j} max(0, eta - |H_i^s - H_j^t|)^2            sample_contrastive
      (~) (*) means instead of sums; H is brought to unit length first: the published margins mean something there
  (5) c_k = mean of H_i over class k in the batch,  M_k(i) = cos(H_i, c_k)  (~)                 prototype_consistency
  (6) CPD = 1/(N K) sum_i sum_k (M_k^s(i) - M_k^t(i))^2,  K = classes in the batch (~)(*)       prototype_consistency
  (7) U = [R_y],  V = [R_c for c != y]  (*) not renormalised                              CorrKD.response_consistency
  (8) I(a, b) = E_p(a,b)[-sp(-T(a, b))] - E_p(a)p(b)[sp(T(a, b))]  (~)                          jsd_mutual_information
      (*) T is an MLP 2k-64-64-1; the product of marginals is every pair i != j of the batch
  (9) RCD = -I_1(U^t, U^s) - I_2(V^t, V^s)                                                CorrKD.response_consistency
  (10) total = CE(R^s, y) + SCD + CPD + RCD                                                     CorrKD.losses

Use in another code base (this file needs torch alone), as train.py trains it:

    model = CorrKD({"text": 300, "audio": 74, "vision": 35}, "polarity")
    for stage in model.stages:                                  # "teacher", then "student"
        model.begin(stage)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=model.config.lr)
        for complete, missing, target, real in batches:         # for config.epochs epochs
            optimizer.zero_grad()
            model.losses(complete, missing, target, real)["total"].backward()
            torch.nn.utils.clip_grad_norm_(learning, model.config.clip)
            optimizer.step()
        # (*) train.py goes on with the mean of the weights after five epochs in a row, those best on validation
    logits = model.eval()(text, audio, vision, real)            # (B, 2)

complete, missing: {"text": (B, T, 300), ...}, the same clips whole and with dropped frames zeroed; target (B,): 0 or 1;
real: {"text": torch.arange(T) < lengths[:, None], ...}, True = not padding, or None: then padding counts as frames.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STREAMS = ("text", "audio", "vision")
SETS = ("l", "a", "v", "la", "lv", "av", "lav")                     # the papers' sets of available streams
TASKS = {"mosi": "polarity", "mosei": "polarity", "iemocap": "emotions"}
HEADS = {"polarity": 1, "emotions": 4}  # two-class decisions a clip


@dataclass
class Config:
    """Defaults: the paper's for MOSI as quoted by others (~), but for `lr`. All losses have weight 1 in the paper."""
    lr: float = 1e-3        # listed: 4e-3 (~); on validation 1e-3 was better in 8 of 10 runs, see the README
    batch_size: int = 64
    epochs: int = 50        # of each stage
    heads: int = 10
    margin: float = 1.2     # eta in (4)
    width: int = 40         # d in (1)
    layers: int = 2         # our choice
    dropout: float = 0.1    # our choice
    clip: float = 1.0       # largest gradient norm; our choice
    weight_decay: float = 0.0
    scd: float = 1.0        # a loss of weight 0 is not computed
    cpd: float = 1.0
    rcd: float = 1.0
    kl: float = 0.0         # KL(R^t || R^s), the ablation in the place of RCD
    scd_raw: bool = False   # (4) on H itself instead of H / |H|
    student: bool = True    # False: the teacher alone
    aligned: bool = True    # whether streams are aligned; makes no difference to this method


PAPER = {
    "mosi": Config(),
    "mosei": Config(lr=2e-3, batch_size=32, epochs=20, heads=8, margin=1.0),
    "iemocap": Config(lr=4e-3, epochs=30, margin=1.4),
}
LISTED = {"mosi": {"lr": 4e-3}, "mosei": {}, "iemocap": {}}           # what is listed (~) and not taken
ABLATIONS = {
    "no_scd": {"scd": 0.0},
    "no_cpd": {"cpd": 0.0},
    "no_rcd": {"rcd": 0.0},
    "kl": {"rcd": 0.0, "kl": 1.0},                              # plain KL in the place of RCD
    "no_distillation": {"scd": 0.0, "cpd": 0.0, "rcd": 0.0},    # the backbone with modality dropout
    "teacher": {"student": False},                              # the backbone trained on complete clips
    "scd_raw": {"scd_raw": True},                               # the literal reading of (4)
    "layers_3": {"layers": 3},
    "layers_4": {"layers": 4},
}
FEATURES = {"text": 300, "audio": 74, "vision": 35}                 # widths of the features that REPORTED is of
TABLE = {}                                                          # the paper's table is that of the seven sets
# The paper's F1 in per cent, five seeds, as HRLF reprints them: l, a, v, la, lv, av, avg, lav.
_COLUMNS = (*SETS[:6], "avg", "lav")
_ROWS = {
    "mosi": {"F1": (81.20, 66.52, 60.72, 83.56, 82.41, 73.74, 74.69, 83.94)},
    "mosei": {"F1": (80.76, 66.09, 62.30, 81.74, 81.28, 71.92, 74.02, 82.16)},
    "iemocap": {"F1 happy": (82.6, 69.6, 68.0, 84.1, 82.0, 70.0, 76.1, 87.5),
                "F1 sad": (82.7, 71.3, 67.6, 83.4, 82.2, 72.5, 76.6, 85.9),
                "F1 angry": (82.2, 67.0, 65.8, 83.9, 82.8, 67.3, 74.8, 86.1),
                "F1 neutral": (63.1, 54.2, 52.3, 68.5, 64.3, 57.2, 59.9, 71.5)},
}
# data set -> ablation ("" = the full method) -> metric -> column -> number
REPORTED = {name: {"": {metric: dict(zip(_COLUMNS, row)) for metric, row in rows.items()}}
            for name, rows in _ROWS.items()}
REPORTED["mosi"].update({name: {"F1": {"avg": avg}} for name, avg in
                         {"no_scd": 72.46, "no_cpd": 71.81, "kl": 73.27}.items()})


def learning_rate_factor(epoch: int) -> float:
    """What the learning rate is multiplied by in epoch 0, 1, ...: it is constant."""
    return 1.0


def sinusoid(length: int, width: int, device=None) -> Tensor:
    """PE in (1), (length, width): sin(t / 10000^(2i/width)) in column 2i, the cosine in column 2i + 1."""
    angle = torch.arange(length, device=device)[:, None] * torch.exp(
        torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class Dropout(nn.Module):
    """Dropout of p, on a CPU to the nearest 1/256 and by random bytes, eight to each random integer: nn.Dropout, which
    draws a float for each element, makes a training step there 1.1 times as long."""

    def __init__(self, p: float):
        super().__init__()
        self.keep = round(256 * (1 - p))        # how many of the 256 values of a byte keep an element
        if not 0 < self.keep <= 256:
            raise ValueError(f"dropout must be at least 0 and below 1, not {p}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keep == 256 or x.device.type != "cpu":
            return F.dropout(x, 1 - self.keep / 256, self.training)
        draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-2**63, None)
        kept = draws.view(torch.uint8)[:x.numel()].view(x.shape) < self.keep
        return x * kept.to(x.dtype).mul_(256 / self.keep)


class Layer(nn.Module):
    """A pre-LayerNorm Transformer layer. x (B, T, d); mask (B, 1, 1, T) bool, True = may be attended, or None."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), Dropout(dropout),
                                 nn.Linear(4 * width, width))
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)          # (B, heads, T, d / heads)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class Encoder(nn.Module):
    """(1) and the GAP of (2) for one stream: (B, T, d_m) -> (B, d).

    `real` (B, T) bool, True = not padding; the mean and the attention leave padding out, and positions are
    counted from a clip's first real frame, so the result does not depend on where or how far a clip is padded.
    A clip without a real frame gives zeros.
    """

    def __init__(self, in_width: int, config: Config):
        super().__init__()
        self.width = config.width
        self.conv = nn.Conv1d(in_width, config.width, kernel_size=3, padding=1, bias=False)
        self.layers = nn.ModuleList(Layer(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        position, mask = sinusoid(x.shape[1], self.width, x.device).to(x), None     # (T, d)
        if real is not None:
            x = x * real[..., None]                             # the convolution must not see padding
            position = position[(real.cumsum(1) - 1).clamp(min=0)]                  # (B, T, d)
            # A clip without frames attends to its padding: older torch makes NaN of a softmax over nothing.
            mask = (real | ~real.any(1, keepdim=True))[:, None, None]
        x = self.dropout(math.sqrt(self.width) * self.conv(x.transpose(1, 2)).transpose(1, 2) + position)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)                                                            # E_m (B, T, d)
        if real is None:
            return x.mean(1)
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


class Network(nn.Module):
    """The architecture that teacher and student share: (1) to (3)."""

    def __init__(self, dims: dict[str, int], outputs: int, config: Config):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Encoder(dims[m], config) for m in STREAMS})
        self.classifier = nn.Linear(3 * config.width, outputs)

    def represent(self, streams: dict[str, Tensor], real: dict[str, Tensor] | None) -> Tensor:
        """(2): streams m -> (B, T_m, d_m), real m -> (B, T_m) bool or None; returns H (B, 3d)."""
        if lacking := [m for m in STREAMS if m not in streams]:
            raise ValueError(f"no {' and no '.join(lacking)} among the streams: a missing one is given as zeros")
        return torch.cat([self.encoders[m](streams[m], real and real[m]) for m in STREAMS], dim=-1)

    def forward(self, streams: dict[str, Tensor], real: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """H (B, 3d) and the logits f (B, outputs) of (3)."""
        h = self.represent(streams, real)
        return h, self.classifier(h)


def sample_contrastive(student: Tensor, teacher: Tensor, margin: float, normalize: bool = True) -> Tensor:
    """SCD, (4): mean_i |s_i - t_i|^2 + mean over pairs i != j of max(0, margin - |s_i - t_j|)^2.

    student, teacher (N, D); they are brought to unit length first, unless normalize is False. With N = 1 there is no
    negative pair. The gradient is finite at distance 0.
    """
    n = len(student)
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    positive = (student - teacher).square().sum(-1).mean()
    if n == 1:
        return positive
    # Not through the matrix product: it loses the small distances. cdist's gradient at distance 0 is 0.
    distance = torch.cdist(student, teacher, compute_mode="donot_use_mm_for_euclid_dist")
    inside = F.relu(margin - distance).square()
    inside = inside.masked_fill(torch.eye(n, dtype=torch.bool, device=inside.device), 0)
    return positive + inside.sum() / (n * (n - 1))


@torch.no_grad()
def active_negatives(student: Tensor, teacher: Tensor, margin: float, normalize: bool = True) -> Tensor:
    """The share of pairs i != j that lie inside SCD's margin, the only ones whose second term pushes."""
    n = len(student)
    if normalize:
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    inside = torch.cdist(student, teacher) < margin
    return (inside.sum() - inside.diagonal().sum()) / max(1, n * (n - 1))


def prototype_consistency(student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """CPD, (5) and (6): mean over clips i and present classes k of (cos(s_i, c_k^s) - cos(t_i, c_k^t))^2.

    student, teacher (N, D); labels (N,) long in [0, num_classes). c_k is each network's own mean of the
    clips of class k in this batch; a class that the batch lacks is left out.
    """
    member = F.one_hot(labels, num_classes).to(student)                             # (N, C)
    count = member.sum(0)

    def similarity(h: Tensor) -> Tensor:                                            # M (N, C)
        prototypes = member.T @ h / count.clamp(min=1)[:, None]
        return F.normalize(h, dim=-1) @ F.normalize(prototypes, dim=-1).T

    # An absent class has the prototype 0, hence similarity 0 in both networks: it only must not be counted.
    return (similarity(student) - similarity(teacher)).square().sum() / (len(labels) * (count > 0).sum())


def jsd_mutual_information(critic: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """(8): mean_i -sp(-T(a_i, b_i)) - mean over pairs i != j of sp(T(a_i, b_j)), at most 0.

    a, b (N, k), row i of both from the same clip; critic maps (..., 2k) to (..., 1). One clip has no pair
    to compare with: 0.
    """
    n = len(a)
    if n == 1:
        return a.new_zeros(())
    pairs = torch.cat((a[:, None].expand(n, n, -1), b[None].expand(n, n, -1)), dim=-1)
    score = critic(pairs)[..., 0]                                                   # T(a_i, b_j) (N, N)
    apart = F.softplus(score).masked_fill(torch.eye(n, dtype=torch.bool, device=a.device), 0)
    return -F.softplus(-score.diagonal()).mean() - apart.sum() / (n * (n - 1))


class CorrKD(nn.Module):
    """Teacher, student and the two critics of (8).

    dims: feature width of text, audio and vision. task: "polarity" (logits (B, 2), class 1 = positive) or
    "emotions" (logits (B, 4, 2), four yes/no decisions). Train the stages in the order of `stages`, each after
    `begin(stage)`; beside a stage's name stand the sets of streams that it is about: a teacher sees complete clips.
    """

    def __init__(self, dims: dict[str, int], task: str, config: Config | None = None):
        super().__init__()
        config = config or Config()
        if task not in HEADS:
            raise ValueError(f"CorrKD is a classifier: task must be one of {', '.join(HEADS)}, not {task!r}")
        if config.width % config.heads or config.width % 2:
            raise ValueError(f"width {config.width} must be even and a multiple of heads ({config.heads})")
        self.config, self.task = config, task
        self.teacher = Network(dims, 2 * HEADS[task], config)
        self.student = Network(dims, 2 * HEADS[task], config)
        self.critics = nn.ModuleList(nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                                                   nn.Linear(64, 1)) for _ in "UV")
        if not config.student:
            self.stages = {"teacher": SETS}
        elif config.scd or config.cpd or config.rcd or config.kl:
            self.stages = {"teacher": ("lav",), "student": SETS}
        else:
            self.stages = {"student": SETS}
        self.begin([*self.stages][-1])  # so that a model made to load a checkpoint answers with the right network

    def begin(self, stage: str) -> None:
        """Let the parameters of this stage learn and hold all others; the student stage freezes the teacher."""
        if stage not in self.stages:
            raise ValueError(f"no stage {stage!r}: this model has {', '.join(self.stages)}")
        self.stage = stage
        self.sees_missing, self.has_teacher = stage == "student", stage == "student" and "teacher" in self.stages
        self.requires_grad_(False)
        for part in (self.teacher,) if stage == "teacher" else (self.student, self.critics):
            part.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "CorrKD":
        super().train(mode)
        if self.stage == "student":
            self.teacher.eval()     # its answers must not move, dropout included
        return self

    @property
    def network(self) -> Network:
        """The network that this stage trains, and that answers."""
        return self.teacher if self.stage == "teacher" else self.student

    def forward(self, text: Tensor, audio: Tensor, vision: Tensor, real: dict[str, Tensor] | None = None) -> Tensor:
        """Logits (B, 2) or (B, 4, 2) of clips whose missing frames are zeros. Streams (B, T_m, d_m);
        real: m -> (B, T_m) bool, True = not padding; None = no padding."""
        return self.classify(self.represent({"text": text, "audio": audio, "vision": vision}, real))

    def represent(self, streams: dict[str, Tensor], real: dict[str, Tensor] | None = None) -> Tensor:
        """H (B, 3d) of (2)."""
        return self.network.represent(streams, real)

    def encode(self, name: str, stream: Tensor, real: Tensor | None = None) -> Tensor:
        """One stream's share of H, (B, d), which joins them in the order of STREAMS: an evaluation can reuse them."""
        return self.network.encoders[name](stream, real)

    def classify(self, h: Tensor) -> Tensor:
        """H (B, 3d) -> logits (B, 2) or (B, 4, 2)."""
        logits = self.network.classifier(h)
        return logits if self.task == "polarity" else logits.unflatten(-1, (-1, 2))

    @torch.no_grad()
    def teacher_outputs(self, complete: dict[str, Tensor],
                        real: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """H^t (B, 3d) and f^t (B, outputs). Constant once the teacher is frozen: compute them once a clip."""
        return self.teacher(complete, real)

    def losses(self, complete: dict[str, Tensor], missing: dict[str, Tensor], target: Tensor,
               real: dict[str, Tensor] | None = None,
               teacher: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """The stage's loss terms, unweighted, and their weighted sum "total" (10).

        complete, missing: m -> (B, T_m, d_m), the same clips whole and with missing frames zeroed; target:
        classes (B,) for polarity, (B, 4) for emotions; teacher: rows of `teacher_outputs` for these clips, or
        None to compute them here. "scd_active" is no loss but the share of negatives inside the margin.
        """
        c = self.config
        h, f = self.network(missing if self.sees_missing else complete, real)
        f, y = f.unflatten(-1, (-1, 2)), target.reshape(len(target), -1)            # (B, G, 2), (B, G)
        if y.shape != f.shape[:2]:
            raise ValueError(f"target has shape {tuple(target.shape)}; these clips ask for {tuple(f.shape[:2])}")
        terms = {"task": F.cross_entropy(f.flatten(0, 1), y.flatten())}
        if not self.has_teacher:
            return {**terms, "total": terms["task"]}
        h_t, f_t = teacher or self.teacher_outputs(complete, real)
        f_t = f_t.unflatten(-1, (-1, 2))
        if c.scd:
            terms["scd"] = sample_contrastive(h, h_t, c.margin, not c.scd_raw)
            terms["scd_active"] = active_negatives(h, h_t, c.margin, not c.scd_raw)
        if c.cpd:
            terms["cpd"] = torch.stack([prototype_consistency(h, h_t, g, 2) for g in y.T]).mean()
        if c.rcd:
            terms["rcd"] = self.response_consistency(f.softmax(-1), f_t.softmax(-1), y)
        if c.kl:
            kl = F.kl_div(f.log_softmax(-1), f_t.log_softmax(-1), log_target=True, reduction="none")
            terms["kl"] = kl.sum(-1).mean()
        weights = {"task": 1.0, "scd": c.scd, "cpd": c.cpd, "rcd": c.rcd, "kl": c.kl}
        terms["total"] = sum(weights[name] * term for name, term in terms.items() if name in weights)   # (10)
        return terms

    def response_consistency(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """RCD, (7) and (9), averaged over G decisions. student, teacher: R (B, G, 2); target (B, G) classes."""
        total = 0.0
        for critic, column in zip(self.critics, (target, 1 - target)):             # U: the target class; V: the other
            a, b = teacher.gather(-1, column[..., None]), student.gather(-1, column[..., None])     # (B, G, 1)
            for g in range(target.shape[1]):
                total = total - jsd_mutual_information(critic, a[:, g], b[:, g])
        return total / target.shape[1]


Model = CorrKD
