"""One training step of a memory indexer in torch: the peer of `evals.bench_train`.

    python -m evals.torch_train_peer check INPUTS.npz
    python -m evals.torch_train_peer time '{"batch": 64, ...}'

Written from the equations of LSA spec 2.1 and 5.2 as a torch user would write them: float32
parameters, bfloat16 autocast around the forward pass only, dequantised e4m3 keys, focal loss on
float32 logits, global clipping, fused AdamW. Needs torch and NumPy; imports nothing of ours, and
nothing here imports it: it runs in a process of its own and prints one line of JSON.
"""

import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

MODES: Mapping[str, dict[str, Any] | None] = {  # of torch.compile; None: eager
    "eager": None,
    "compiled": {},
    "compiled, CUDA graphs": {"mode": "reduce-overhead"},
}


class Sizes(NamedTuple):
    """Layers, samples, candidates, model width, heads, channels of a key, query rank, RoPE's."""

    layers: int
    batch: int
    candidates: int
    hidden: int
    heads: int
    head_dim: int
    rank: int
    rope_dim: int


class Batch(NamedTuple):
    """hidden [L, B, D], positions [B], keys e4m3 [L, B, C, K] and their scale [L, B, C], and
    labels, weights, valid [B, C]."""

    hidden: Tensor
    positions: Tensor
    keys: Tensor
    scale: Tensor
    labels: Tensor
    weights: Tensor
    valid: Tensor


def sylvester(size: int) -> Tensor:
    """The orthonormal Hadamard matrix."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


class Retriever(nn.Module):
    """One target layer: weights by their released names, matrices [out, in]."""

    def __init__(self, weights: Mapping[str, Tensor], heads: int, norm_eps: float):
        super().__init__()
        self.wq_a = nn.Parameter(weights["wq_a.weight"])
        self.gain = nn.Parameter(weights["q_norm_weight"])
        self.wq_b = nn.Parameter(weights["wq_b.weight"])
        self.weights_proj = nn.Parameter(weights["weights_proj.weight"])
        self.heads, self.norm_eps = heads, norm_eps

    def forward(self, x: Tensor, turn: Tensor, hadamard: Tensor, keys: Tensor) -> Tensor:
        """Logits [B, C] of x [B, D] for keys [B, C, K]; `turn` [B, 1, pairs] rotates queries."""
        latent = functional.linear(x, self.wq_a).float()
        latent = functional.rms_norm(latent, latent.shape[-1:], self.gain, self.norm_eps)
        q = functional.linear(latent, self.wq_b).float().unflatten(-1, (self.heads, -1))
        split = q.shape[-1] - 2 * turn.shape[-2]
        even, odd = q[..., split::2], q[..., split + 1 :: 2]
        cos, sin = turn[..., 0], turn[..., 1]
        tail = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        q = torch.cat([q[..., :split], tail], dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            q = q @ hadamard
        w = functional.linear(x, self.weights_proj) / math.sqrt(q.shape[-1] * self.heads)
        dots = torch.einsum("bhk,bck->bhc", q, keys)
        return torch.einsum("bhc,bh->bc", functional.relu(dots), w)


class Indexer(nn.Module):
    """All target layers at once."""

    def __init__(
        self, layers: Sequence[Mapping[str, Tensor]], heads: int, theta: Tensor, norm_eps: float
    ):
        super().__init__()
        self.layers = nn.ModuleList(Retriever(layer, heads, norm_eps) for layer in layers)
        self.register_buffer("theta", theta)
        self.register_buffer("hadamard", sylvester(len(layers[0]["wq_b.weight"]) // heads))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [L, B, C]."""
        angle = batch.positions[:, None].float() * self.theta
        turn = torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None]
        keys = batch.keys.float() * batch.scale[..., None]
        parts = [
            layer(batch.hidden[i], turn, self.hadamard, keys[i])
            for i, layer in enumerate(self.layers)
        ]
        return torch.stack(parts)


def focal_loss(logits: Tensor, batch: Batch) -> Tensor:
    """gamma = 2, from float32 logits; mean over valid candidates, then over layers."""
    z = logits.float()
    wrong = torch.sigmoid(torch.where(batch.labels > 0.5, -z, z))
    entropy = functional.binary_cross_entropy_with_logits(
        z, batch.labels.expand_as(z), reduction="none"
    )
    each = torch.where(batch.valid, batch.weights * wrong.square() * entropy, 0)
    return each.sum() / (len(z) * batch.valid.sum().clamp(min=1))


class Trainer:
    """A model, its optimiser, and `step`."""

    def __init__(
        self, model: Indexer, optimizer: Mapping[str, float], *, bf16: bool, compiled: dict | None
    ):
        self.model, self.bf16 = model, bf16
        self.clip = optimizer["clip"]
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=optimizer["learning_rate"],
            betas=(optimizer["beta1"], optimizer["beta2"]),
            eps=optimizer["eps"],
            weight_decay=optimizer["weight_decay"],
            fused=True,
        )
        self.loss = self._loss if compiled is None else torch.compile(self._loss, **compiled)

    def _loss(self, batch: Batch) -> Tensor:
        device = batch.hidden.device.type
        cast = torch.autocast(device, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with cast:
            logits = self.model(batch)
        return focal_loss(logits, batch)

    def step(self, batch: Batch, rate: float | None = None) -> tuple[Tensor, Tensor]:
        """Loss, and the gradient's norm before it is clipped. `rate` replaces the learning rate."""
        if rate is not None:
            self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)
        self.optimizer.step()
        return loss.detach(), norm


def read_inputs(path: str) -> tuple[Indexer, Batch, dict[str, Any]]:
    """What `evals.bench_train` wrote: weights, a batch, settings. e4m3 travels as bytes."""
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "settings"}
        settings = json.loads(str(file["settings"]))
    keys = arrays.pop("keys").view(torch.float8_e4m3fn)
    batch = Batch(keys=keys, **{name: arrays[name] for name in Batch._fields if name != "keys"})
    layers = [
        {
            name.removeprefix(prefix): value
            for name, value in arrays.items()
            if name.startswith(prefix)
        }
        for prefix in settings["layers"]
    ]
    model = Indexer(layers, settings["heads"], arrays["theta"], settings["norm_eps"])
    return model, batch, settings


def check(path: str) -> dict[str, Any]:
    """Losses and gradient norms of a few steps on one batch."""
    model, batch, settings = read_inputs(path)
    trainer = Trainer(model, settings["optimizer"], bf16=settings["bf16"], compiled=None)
    steps = [trainer.step(batch, rate) for rate in settings["rates"]]
    return {"loss": [float(s[0]) for s in steps], "grad_norm": [float(s[1]) for s in steps]}


def random_model(sizes: Sizes, device: str) -> Indexer:
    """Random float32 weights."""
    width = sizes.heads * sizes.head_dim
    shapes = {
        "wq_a.weight": (sizes.rank, sizes.hidden),
        "wq_b.weight": (width, sizes.rank),
        "weights_proj.weight": (sizes.heads, sizes.hidden),
    }
    layers = []
    for _ in range(sizes.layers):
        layer = {n: torch.randn(s, device=device) / math.sqrt(s[1]) for n, s in shapes.items()}
        layers.append(layer | {"q_norm_weight": torch.ones(sizes.rank, device=device)})
    pairs = torch.arange(sizes.rope_dim // 2, dtype=torch.float32)
    return Indexer(layers, sizes.heads, 160000.0 ** (-2 * pairs / sizes.rope_dim), 1e-6).to(device)


def random_batch(sizes: Sizes, device: str) -> Batch:
    """Random contents, a quarter of the candidates positive."""
    shape = (sizes.layers, sizes.batch, sizes.candidates)
    labels = (torch.arange(sizes.candidates, device=device) % 4 == 0).float()
    return Batch(
        torch.randn(*shape[:2], sizes.hidden, dtype=torch.bfloat16, device=device),
        torch.randint(0, 1 << 18, shape[1:2], device=device),
        torch.randn(*shape, sizes.head_dim, device=device).to(torch.float8_e4m3fn),
        torch.rand(shape, device=device),
        labels.expand(shape[1:]).contiguous(),
        torch.ones(shape[1:], device=device),
        torch.ones(shape[1:], dtype=torch.bool, device=device),
    )


def seconds_per_step(step: Callable[[Batch], object], batches: list[Batch], steps: int) -> float:
    """Median of five runs of `steps` steps, after a run to warm up."""
    cuda = batches[0].hidden.is_cuda
    times = []
    for _ in range(6):
        start = time.perf_counter()
        for i in range(steps):
            step(batches[i % len(batches)])
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times[1:])


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds a step at the sizes asked for, in every mode that the device has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes = Sizes(**settings["sizes"])
    modes = settings["modes"]
    batches = [random_batch(sizes, device) for _ in range(settings["batches"])]
    seconds = {}
    for mode in modes:
        model = random_model(sizes, device)
        trainer = Trainer(model, settings["optimizer"], bf16=True, compiled=MODES[mode])
        seconds[mode] = seconds_per_step(trainer.step, batches, settings["steps"])
    return {"torch": torch.__version__, "device": device, "seconds": seconds}


def main(argv: list[str]) -> int:
    """Entry point."""
    command, argument = argv
    result = check(argument) if command == "check" else measure(json.loads(argument))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
