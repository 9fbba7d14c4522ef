"""mlx-vlm's side of `vs_mlx_vlm.py`: runs in an environment that has mlx-vlm and need not have dgemma.

Reads one JSON object from its first argument, prints one JSON object as its last line.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx_graph import count, stand_in_for_metal
from mlx_vlm.generate import diffusion
from mlx_vlm.models.diffusion_gemma import Model
from mlx_vlm.utils import load_model


class _Counted(Exception):
    """Carries the count out of mlx-vlm's loop."""


def load(job: dict[str, Any]) -> Model:
    model = load_model(Path(job["folder"]))
    model.set_dtype(getattr(mx, job["dtype"]))  # of the scales too, and so of what the layers compute in
    mx.eval(model.parameters())
    return model


def generate(model: Model, job: dict[str, Any], steps: int) -> Any:
    """Run mlx-vlm's own loop for one canvas: its entropy-bound sampler, drawing at temperature 1, never stopping."""
    tokenizer = SimpleNamespace(stopping_criteria=lambda token: False, eos_token_ids=[])
    results = diffusion.stream_diffusion_generate(
        model, tokenizer, tokenizer, mx.array([job["prompt"]]), None, None, max_tokens=job["config"]["canvas_length"],
        skip_special_token_ids=[], temperature=1.0, max_denoising_steps=steps, diffusion_sampler="entropy-bound",
    )  # fmt: skip
    return list(results)[-1]


def counted(model: Model, job: dict[str, Any]) -> dict[str, Any]:
    """Count one pass of the loop: all that lies between a canvas with its conditioning and the next ones."""
    inner, calls = model.diffusion_decoder_logits, 0

    def decoder(canvas: mx.array, *args: Any, self_conditioning: Any = None, **kwargs: Any) -> mx.array:
        nonlocal calls
        calls += 1
        if calls == 1:  # the first pass has no conditioning: skipped, all logits equal
            return mx.zeros((*canvas.shape, model.config.text_config.vocab_size))
        if calls == 3:
            raise _Counted(count(canvas, self_conditioning))
        mx.eval(canvas, self_conditioning)  # so that the count starts here
        return inner(canvas, *args, self_conditioning=self_conditioning, **kwargs)

    object.__setattr__(model, "diffusion_decoder_logits", decoder)
    try:
        generate(model, job, 4)
    except _Counted as result:
        return result.args[0]
    raise AssertionError("mlx-vlm's loop ended before its third pass")


def main() -> None:
    job = json.loads(sys.argv[1])
    # A detokenizer needs a tokenizer; there is no text here.
    silent = SimpleNamespace(reset=lambda: None, add_token=lambda *_, **__: None, finalize=lambda: None)
    silent.last_segment = silent.text = ""
    diffusion.make_streaming_detokenizer = lambda _: silent
    if job["metal"]:
        stand_in_for_metal()
    model = load(job)
    if job["task"] == "count":
        print(json.dumps(counted(model, job)))
        return
    generate(model, job, 2)  # compiles what it compiles
    began, cpu = time.perf_counter(), time.process_time()
    last = generate(model, job, job["steps"])
    result = {"s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    assert (last.generation_tokens, last.diffusion_denoising_steps) == (job["config"]["canvas_length"], job["steps"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
