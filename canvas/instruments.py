"""What a loaded model does on a canvas besides writing: methods of `DiffusionGemma`, which has what they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import fill
from .ask import ask
from .candidate import Candidate
from .edit import STRENGTH, Edited, Editor, stream_edit
from .holes import MARKER, Hole
from .model import Model, Prompt, options_of
from .questions import Questions


class Instruments:
    """Reads, fills and edits."""

    def read(
        self: Model, prompt: Any, choices: Sequence[str] | Sequence[Sequence[str]] | None = None,
        template: str | None = None, *, questions: Questions | None = None, joint: bool = False, samples: int = 1,
        seed: int = 0, canvas_length: int | None = None, raw: bool = False, specials: bool = False,
    ) -> Any:  # fmt: skip
        """Say how likely choices are as the answer, or at places in it, in one pass and with nothing written.

        It is the model's own probability, calibrated as it is. docs/canvas.md tells how choices of several tokens, and
        of different lengths, are compared.

        Args:
            prompt: as `stream`; with questions what they are about, which may be any JSON value too.
            choices: two texts or more; of a template with several places one list for all, or a list for each.
            template: the answer, with `<read>` where a choice stands; None is a choice and nothing else.
            questions: instead of the two, what is asked about the prompt: see `canvas.questions`.
            joint: ask all questions on one canvas, in one pass; otherwise each is asked by itself.
            samples: average over the noise of so many canvases.
            seed: of that noise.
            canvas_length: positions; None is the smallest of 16, 32, 64, 128 and 256 that hold the template.
            raw, specials: as `stream`.

        Returns:
            A `Reading`; of several places a list of them; of questions their `Answer`s by name.

        Raises:
            DgemmaError: what is wrong with which argument or question, before any pass; or as `logits`.
        """
        return ask(
            self, prompt, choices, template, questions=questions, joint=joint, samples=samples, seed=seed,
            canvas_length=canvas_length, raw=raw, specials=specials,
        )  # fmt: skip

    def fill(
        self: Model, text: str | Sequence[str | Hole], prompt: Prompt | None = None, *, n: int | None = None,
        marker: str = MARKER, lengths: Sequence[int] | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Fill the holes of a text, with both sides in view; outside them it comes back as it is.

        Args:
            text: with `<fill>` where any length, and `<fill:12>` where 12 tokens are missing (`<fill:>` is the text
                `<fill>`); or a list of text, as it stands, and `Hole`.
            prompt: what the text is the answer to, as in `stream`. Without one, it is a document.
            n: so many candidates, of seeds that count up.
            marker: another marker.
            lengths: numbers of tokens that a hole of any length may have. Each is looked at once, and the one is taken
                at which the text behind the hole is likeliest; by default of up to 32, as far as there is room. An
                empty list leaves the length to the sampler, which fills up what remains.
            options: those of `stream`. `max_new_tokens` is what one open hole may take, by default a quarter of a
                canvas; `stop` ends a hole; `eos` are the tokens that fill it up.

        Returns:
            A `Filled`; with `n` a list of them, those of higher score first.

        Raises:
            DgemmaError: no hole, text that the tokenizer cannot write exactly, more of it right of a hole than the
                canvas and the prompt have room for, or an option that cannot be; before any pass.
        """
        return fill.fill(self, text, prompt, options_of("a fill", options), n=n, marker=marker, lengths=lengths)

    def stream_fill(
        self: Model, text: str | Sequence[str | Hole], prompt: Prompt | None = None, *, marker: str = MARKER,
        lengths: Sequence[int] | None = None, **options: Any,
    ) -> Candidate:  # fmt: skip
        """Yield the events of `fill` as they come; the `Filled` is then the iterator's `result`."""
        return fill.stream_fill(self, text, prompt, options_of("a fill", options), marker=marker, lengths=lengths)

    def edit(
        self: Model, text: str, *, lines: tuple[int, int] | None = None, span: tuple[int, int] | None = None,
        instruction: str | None = None, strength: float = STRENGTH, **options: Any,
    ) -> Edited:  # fmt: skip
        """Rewrite a region of a text, and leave all else as it is, byte for byte.

        Args:
            lines: the first and the last line of the region, counted from 1; the end of the last line is kept.
            span: the region in characters instead.
            instruction: how it is to be changed; said in the chat template, with the region as it was.
            strength: how much of the old text is lost to noise before it is rewritten: 0 keeps it, without any pass, 1
                forgets it.
            options: those of `stream`. `max_new_tokens` is what each part of the region may take, by default a quarter
                more than it did; a part is at most half a canvas.

        Raises:
            DgemmaError: no such region, text that the tokenizer cannot write exactly, or more of it than the model's
                context holds; before any pass.
        """
        return stream_edit(
            self, text, lines=lines, span=span, instruction=instruction, strength=strength,
            options=options_of("an edit", options), drafts=False,
        ).finished()  # fmt: skip

    def stream_edit(
        self: Model, text: str, *, lines: tuple[int, int] | None = None, span: tuple[int, int] | None = None,
        instruction: str | None = None, strength: float = STRENGTH, **options: Any,
    ) -> Editor:  # fmt: skip
        """Yield the events of `edit` as they come; `finished` then returns the `Edited`."""
        return stream_edit(
            self, text, lines=lines, span=span, instruction=instruction, strength=strength,
            options=options_of("an edit", options),
        )  # fmt: skip
