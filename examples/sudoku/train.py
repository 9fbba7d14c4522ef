"""Train `nano`: 4x4 and 6x6 Sudoku in one small DiffusionGemma checkpoint, on the project's own graph.

    python examples/sudoku/train.py --run /tmp/nano --out models/nano

Kill it at any time and start it again with the same command: it goes on from its last checkpoint, and every number it
draws depends on the seed and the step alone.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import distributed

import boards
import nano
import objective
import optimizer
import sampling
from dgemma.checkpoints import files
from dgemma.core.config import GenerationConfig, ModelConfig

# Float32 activations of some MB are allocated and freed thousands of times a step; glibc gives each back to the kernel
# and faults it in again, which takes longer than the arithmetic. Read by the C library when the process starts.
MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=10000000000"
    ":glibc.malloc.top_pad=500000000"
}


def learning_rate(step: int, steps: int, warm: int, decay: float) -> float:
    """Warm up, stay, then fall in a line over the last part: a run can be cut short or lengthened without a kink."""
    falling = min(1.0, (steps - step) / max(1.0, steps * decay))
    return min(1.0, (step + 1) / warm) * max(0.02, falling)


def save(path: Path, data: dict[str, Any]) -> None:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one."""
    with files.replace_when_done(path) as file:
        torch.save(data, file)


def export(folder: Path, settings: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Write the checkpoint as published ones are: bfloat16 safetensors beside its config and tokenizer."""
    from safetensors.torch import save_file

    nano.write_folder(folder, settings)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in sorted(weights.items())}
    with files.path_when_done(folder / "model.safetensors") as part:
        save_file(tensors, str(part), metadata={"format": "pt"})


def measure(config: ModelConfig, weights: dict[str, torch.Tensor], tests: dict[int, Any]) -> dict[str, Any]:
    """Solve rates of held-out boards, with the weights rounded as they will be shipped."""
    rounded = {name: t.bfloat16().float().numpy() for name, t in weights.items()}
    engine = sampling.inference_engine(config, rounded)
    sampler = GenerationConfig.from_hf(nano.GENERATION).sampler
    result: dict[str, Any] = {}
    for side, (held, solutions) in tests.items():
        right, steps = sampling.solve_rate(engine, sampler, held, solutions)
        groups: dict[int, list[int]] = {}
        for givens, (solved, count) in sampling.by_givens(held, right).items():
            group = groups.setdefault(givens // 4 * 4, [0, 0])
            group[0], group[1] = group[0] + solved, group[1] + count
        result[f"solved_{side}"] = round(float(right.mean()), 4)
        result[f"steps_{side}"] = round(float(steps.mean()), 1)
        if side == 6:
            result["by_givens"] = {f"{g}-{g + 3}": round(s / n, 3) for g, (s, n) in groups.items()}
    return result


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says."""

    run: Path
    out: Path | None
    steps: int
    boards: int
    copies: int
    four: int
    layers: int
    hidden: int
    muon: float
    adam: float
    warm: int
    decay: float
    seed: int
    log_every: int
    test_every: int
    test_boards: int
    goal: float
    workers: int
    compile: bool
    bf16: bool


class Worker:
    """A process with one thread and its share of every batch.

    Processes, because they meet once a step. Threads meet after every operation, and wait, spinning, for whichever of
    them the machine is not running just now.
    """

    def __init__(self, rank: int, o: Options) -> None:
        self.rank, self.o = rank, o
        self.parent = os.getppid()
        self.settings = nano.config(layers=o.layers, hidden=o.hidden)
        self.config = ModelConfig.from_hf(self.settings)
        self.sources = {side: boards.source(side, o.seed) for side in (4, 6)}
        mine = (6, 4)[rank :: o.workers]  # whose held-out boards this worker tests
        self.tests = {side: sampling.held_out_set(self.sources[side], o.test_boards) for side in mine}
        self.path = o.run / "checkpoint.pt"
        saved = torch.load(self.path, weights_only=True) if self.path.exists() else {}
        if saved and saved["config"] != self.settings:
            raise click.ClickException(f"{self.path} belongs to another model; choose another --run")
        self.step, self.spent = saved.get("step", 0), saved.get("seconds", 0.0)
        self.parameters = saved.get("parameters") or objective.initial(self.config, o.seed)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(not name.endswith("layer_scalar"))  # buffers in the reference: kept at one
        rates = optimizer.Rates(muon=o.muon, adam=o.adam)
        self.learner = optimizer.Optimizer(self.parameters, rates, saved.get("optimizer"))
        self.ops = objective.TrainOps(torch.bfloat16 if o.bf16 else torch.float32, compiled=o.compile)
        self.model = objective.make_model(self.config, self.parameters)

    def differentiate(self, step: int, side: int) -> torch.Tensor:
        """Leave this worker's gradients in the parameters; returns its two losses."""
        rng = np.random.default_rng([self.o.seed, step, self.rank])
        given, solutions = self.sources[side].batch(rng, self.o.boards // self.o.workers)
        target = nano.answers(solutions)
        noise = objective.corrupt(rng, target, self.o.copies, self.config.vocab_size)
        prompt = torch.from_numpy(nano.prompts(given))
        total, answer, ahead = objective.loss(self.ops, self.model, prompt, torch.from_numpy(target), noise)
        total.backward()
        return torch.stack([answer, ahead])

    def average_gradients(self, losses: torch.Tensor) -> torch.Tensor:
        """Average all gradients over the workers, and the losses [2], which ride along."""
        if self.o.workers == 1:
            return losses
        gradients = [p.grad for p in self.learner.trained.values()]
        flat = torch.cat([*(g.flatten() for g in gradients), losses])
        distributed.all_reduce(flat)
        *means, losses = (flat / self.o.workers).split([*(g.numel() for g in gradients), 2])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        return losses

    def warm_up(self) -> None:
        """Compile, one worker after another: the later ones find the result on disk."""
        for turn in range(self.o.workers):
            if self.rank == turn:
                began = time.monotonic()
                for side in (6, 4):
                    self.differentiate(0, side)
                for p in self.learner.trained.values():
                    p.grad = None
                print(f"worker {self.rank}: compiled in {time.monotonic() - began:.0f} s", flush=True)
            if self.o.workers > 1:
                distributed.barrier()
        gc.collect()
        gc.disable()  # torch.compile leaves a million objects behind; walking them is 5 % of a step

    def test(self) -> dict[str, Any]:
        """Solve rates of the held-out boards, gathered from all workers."""
        mine = measure(self.config, self.learner.average(), self.tests)
        if self.o.workers == 1:
            return mine
        parts: list[Any] = [None] * self.o.workers
        distributed.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}

    def run(self) -> None:
        """Train from the last checkpoint to the end, or to the goal."""
        o, chief = self.o, self.rank == 0
        if o.compile:
            self.warm_up()
        if chief:
            count = sum(p.numel() for p in self.parameters.values())
            print(f"{count:,} parameters, from step {self.step} of {o.steps}", flush=True)
        began, losses = time.monotonic() - self.spent, []
        while self.step < o.steps:
            if os.getppid() != self.parent:
                raise SystemExit("the main process is gone")  # killed outright, it could not stop its workers
            side = 4 if self.step % o.four == o.four - 1 else 6
            loss = self.average_gradients(self.differentiate(self.step, side))
            self.learner.step(self.step + 1, learning_rate(self.step, o.steps, o.warm, o.decay))
            self.step += 1
            if side == 6:
                losses.append(loss.numpy())
            testing = self.step % o.test_every == 0 or self.step == o.steps
            if self.step % o.log_every and not testing:
                continue
            mean = np.mean(losses, 0) if losses else np.full(2, np.nan)
            row: dict[str, Any] = {"step": self.step, "seconds": round(time.monotonic() - began, 1)}
            row |= {"canvas_loss": round(float(mean[0]), 4), "encoder_loss": round(float(mean[1]), 4)}
            losses = []
            gc.collect()
            if testing:
                row |= self.test()
            if chief:
                print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
                files.append_bytes(o.run / "log.jsonl", f"{json.dumps(row)}\n".encode())
            if chief and testing:
                state = {"parameters": self.parameters, "optimizer": self.learner.state, "config": self.settings}
                save(self.path, state | {"step": self.step, "seconds": time.monotonic() - began})
            if row.get("solved_6", 0.0) >= o.goal:
                break
        if chief and o.out is not None:
            export(o.out, self.settings, self.learner.average())
            print(f"written to {o.out}", flush=True)


def work(rank: int, o: Options) -> None:
    """What a worker's process runs."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # two layer kinds, two modes with and without gradient, two board sizes
    if o.workers > 1:
        meeting = f"file://{(o.run / 'meeting').resolve()}"
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=o.workers)
    Worker(rank, o).run()
    if o.workers > 1:
        distributed.destroy_process_group()


@click.command()
@click.option("--run", type=click.Path(path_type=Path), default=Path("runs/nano"), help="Checkpoint and log folder.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Write the finished model folder here.")
@click.option("--steps", default=5_000, show_default=True, help="Optimizer steps in all.")
@click.option("--boards", default=32, show_default=True, help="Boards a step.")
@click.option("--copies", default=2, show_default=True, help="Corrupted canvases of each board.")
@click.option("--four", default=3, show_default=True, help="Every how many steps the boards are 4x4.")
@click.option("--layers", default=6, show_default=True, help="Layers, a multiple of 3.")
@click.option("--hidden", default=128, show_default=True, help="Hidden width.")
@click.option("--muon", default=0.02, show_default=True, help="Muon's learning rate.")
@click.option("--adam", default=0.003, show_default=True, help="Adam's learning rate.")
@click.option("--warm", default=100, show_default=True, help="Steps of warm-up.")
@click.option("--decay", default=0.4, show_default=True, help="Last part of the steps, in which the rate falls.")
@click.option("--seed", default=0, show_default=True)
@click.option("--log-every", default=100, show_default=True)
@click.option("--test-every", default=500, show_default=True, help="Steps between held-out tests and checkpoints.")
@click.option("--test-boards", default=256, show_default=True)
@click.option("--goal", default=1.1, show_default=True, help="Stop once this share of held-out 6x6 boards is solved.")
@click.option("--workers", default=2, show_default=True, help="Processes, one core each.")
@click.option("--compile/--no-compile", default=True, show_default=True)
@click.option("--bf16/--no-bf16", default=True, show_default=True, help="Matrix products in bfloat16.")
def main(**given: Any) -> None:
    """Train the small checkpoint."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    options = Options(**given)
    options.run.mkdir(parents=True, exist_ok=True)
    (options.run / "meeting").unlink(missing_ok=True)
    if options.workers == 1:
        work(0, options)
    else:
        torch.multiprocessing.spawn(work, (options,), options.workers)


if __name__ == "__main__":
    main()
