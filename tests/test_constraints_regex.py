"""Regular expressions as automata over characters and bytes, judged by `re`."""

from __future__ import annotations

import os
import random
import re
import sys

import llguidance
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgemma.constraints.chars import CharDfa, from_pattern, from_states
from dgemma.constraints.sets import LAST, complement, intersection, matched, union
from dgemma.constraints.utf8 import ByteDfa
from dgemma.core.errors import DgemmaError

PATTERNS = int(os.environ.get("DGEMMA_TEST_PATTERNS", "100"))
"""Random patterns; the figure in docs/LOG.md is of 2,000."""

LETTERS = "abcAé߀😀 \n1٣_-Ωſ"

ATOMS = [
    *(
        "a",
        "b",
        "c",
        "é",
        "€",
        "😀",
        ".",
        r"\d",
        r"\w",
        r"\s",
        r"\D",
        r"\W",
        r"\S",
        "[ab]",
        "[^a]",
        r"[^é\n]",
        "[a-c1]",
    ),
    *("[€-😀]", "(?i:a)", "(?i:[^s])", r"(?a:\w)", "(?s:.)", "", "ab", r"[\d_]", r"[^\W1]"),
]


def written(draw: random.Random, depth: int) -> str:
    """Return a random pattern."""
    kind = draw.randrange(10) if depth else 0
    if kind < 2:
        return draw.choice(ATOMS)
    if kind < 5:
        return "".join(written(draw, depth - 1) for _ in range(draw.randrange(1, 4)))
    if kind < 7:
        return "(?:" + "|".join(written(draw, depth - 1) for _ in range(draw.randrange(2, 4))) + ")"
    if kind == 7:
        ahead = draw.choice(["(?=", "(?!"]) + written(draw, depth - 1) + draw.choice([")", "$)"])
        return ahead + written(draw, depth - 1)
    least = draw.randrange(3)
    count = draw.choice(
        ["*", "+", "?", "*?", "??", f"{{{least}}}", f"{{{least},}}", f"{{{least},{least + draw.randrange(3)}}}"]
    )
    return f"(?:{written(draw, depth - 1)}){count}"


def near(draw: random.Random, found: CharDfa) -> str:
    """Return a text that the automaton accepts, if it is lucky, and often changed a little."""
    state, said = found.start, []
    for _ in range(draw.randrange(1, 12)):
        steps = [(c, int(found.table[state, found.atoms[ord(c)]])) for c in LETTERS if found.atoms[ord(c)] >= 0]
        steps = [step for step in steps if step[1] >= 0]
        if not steps or (found.accepting[state] and draw.random() < 0.3):
            break
        character, state = draw.choice(steps)
        said.append(character)
    for _ in range(draw.choice([0, 0, 1, 2])):
        at = draw.randrange(len(said) + 1)
        said[at : at + draw.randrange(2)] = draw.choice(["", draw.choice(LETTERS)])
    return "".join(said)


def walked(found: ByteDfa, data: bytes) -> bool:
    state = found.start
    for byte in data:
        state = int(found.table[state, byte]) if state >= 0 else -1
    return state >= 0 and bool(found.accepting[state])


def test_random_patterns_match_what_re_matches() -> None:
    checked = positive = 0
    for seed in range(PATTERNS):
        draw = random.Random(seed)
        pattern = written(draw, 4)
        if draw.random() < 0.1:
            pattern = draw.choice(["^" + pattern, pattern + "$", rf"\A(?:{pattern})\Z", f"^{pattern}|{pattern}b$"])
        judge = re.compile(pattern)
        try:
            found = from_pattern(pattern)
        except DgemmaError as error:
            assert "matches no text" in str(error)
            texts = ["".join(draw.choices(LETTERS, k=draw.randrange(5))) for _ in range(60)]
            assert not any(judge.fullmatch(text) for text in texts), (pattern, seed)
            continue
        spelled = ByteDfa.of(found) if seed % 5 == 0 else None
        for _ in range(40):
            text = near(draw, found)
            expected = judge.fullmatch(text) is not None
            assert found.matches(text) == expected, (pattern, text, seed)
            if spelled is not None:
                assert walked(spelled, text.encode()) == expected, (pattern, text, seed)
            checked, positive = checked + 1, positive + expected
    assert positive > checked // 4


def test_random_patterns_match_what_llguidance_matches() -> None:
    """Another judge, of what both know: no lookaheads, no ASCII flag."""
    tokenizer, patterns = llguidance.LLTokenizer("byte"), 0
    for seed in range(PATTERNS // 2):
        draw = random.Random(seed)
        pattern = written(draw, 3)
        if "(?=" in pattern or "(?!" in pattern or "(?a" in pattern:
            continue
        try:
            found = from_pattern(pattern)
        except DgemmaError:
            continue
        patterns += 1
        grammar = llguidance.LLMatcher.grammar_from_regex(pattern)
        for _ in range(15):
            text = near(draw, found)
            judge = llguidance.LLMatcher(tokenizer, grammar)
            assert not judge.get_error()
            taken = judge.try_consume_tokens(list(text.encode())) if text else 0
            accepted = taken == len(text.encode()) and judge.is_accepting()
            assert found.matches(text) == accepted, (pattern, text, seed)
    assert patterns > PATTERNS // 8


@pytest.mark.parametrize(
    "written",
    [
        r"\d",
        r"\w",
        r"\s",
        r"\D",
        r"[^\W_]",
        r"[^\d\s]",
        ".",
        r"(?a:\w)",
        r"(?ai:[k-s])",
        "(?i:ß)",
        "(?i:[^ſé-ϑ])",
        "(?i:[\u0345Ⓐ-ⓔ])",
    ],
)
def test_sets_are_those_of_re_for_every_character(written: str) -> None:
    found, judge = from_pattern(written), re.compile(written)
    expected = [code for code in range(LAST + 1) if not 0xD800 <= code < 0xE000 and judge.fullmatch(chr(code))]
    assert np.flatnonzero(found.atoms >= 0).tolist() == expected


@pytest.mark.parametrize(
    "written", [".", r"\w", "[^a]", "[\ud7ff-\ue000]".encode(errors="surrogatepass").decode(errors="replace")]
)
def test_bytes_are_utf8_and_no_other(written: str) -> None:
    found = from_pattern(written)
    spelled = ByteDfa.of(found)
    for code in [*range(0x3000), *range(0xD700, 0xE100), *range(0xFF00, 0x10100), *range(0x1F000, LAST + 1, 97), LAST]:
        if not 0xD800 <= code < 0xE000:
            assert walked(spelled, chr(code).encode()) == found.matches(chr(code)), hex(code)
        assert not walked(spelled, chr(code).encode(errors="surrogatepass")[:-1])
    wrong = (
        *(b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xf0\x80\x80\x80", b"\x80"),
        *(b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xff", b"\xc3a", b"\xe2\x82a"),
    )
    assert not any(walked(spelled, one) for one in wrong)


def test_states_are_few() -> None:
    assert ByteDfa.of(from_pattern("[^a]")).table.shape == (2 + 7, 256)  # seven tails of characters that are not ASCII
    assert from_pattern("a{0,3}|a{2,5}|(?:a?){5}").table.shape == (6, 1)
    assert from_pattern("(?:a|b)*c|(?:b|a)*d").table.shape == (2, 2)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"(a)\1", "backreference"),
        (r"(a)?(?(1)b|c)", "conditional"),
        (r"(?<=a)b", "lookbehind"),
        (r"(?<!a)b", "lookbehind"),
        (r"\p{L}+", "Unicode properties"),
        (r"\bword", "word boundary"),
        (r"(?>a)b", "atomic"),
        (r"a*+b", "possessive"),
        (r"(?m)^a", "flag m"),
        ("a(", "no regular expression"),
        ("a{3,2}", "no regular expression"),
        ("[b-a]", "no regular expression"),
        ("a^b", "matches no text"),
        ("[^\\s\\S]", "matches no text"),
        ("(?=b)a", "matches no text"),
        ("(?:(?:a{100}){100}){100}", "bound its repeats"),
        ("(?:a|b)*a(?:a|b){20}", "bound its repeats"),
        ("(" * 3000 + ")" * 3000, "nested"),
        (7, "expected the text"),
        (b"a", "expected the text"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(pattern: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgemma.constraints.patterns.LARGEST", 10_000)
    monkeypatch.setattr("dgemma.constraints.chars.LARGEST", 1_000)
    with pytest.raises(DgemmaError, match=said) as caught:
        from_pattern(pattern)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


spans = st.lists(st.tuples(st.integers(0, LAST), st.integers(0, 300)), max_size=5).map(
    lambda found: tuple((a, min(a + n, LAST)) for a, n in found)
)


@given(spans, spans)
def test_sets_obey_the_laws(one: tuple[tuple[int, int], ...], other: tuple[tuple[int, int], ...]) -> None:
    a, b = union([one]), union([other])
    assert complement(complement(a)) == a
    assert complement(union([a, b])) == intersection(complement(a), complement(b))
    assert union([a, intersection(a, b)]) == a


def test_no_character_beyond_the_second_plane_has_a_case() -> None:
    assert all(text.lower() == text.upper() == text for text in ["".join(map(chr, range(0x20000, LAST + 1)))])


def test_surrogates_are_no_characters() -> None:
    assert matched(r"[\s\S]", 0) == complement(())
    assert complement(()) == ((0, 0xD7FF), (0xE000, LAST))


def test_an_automaton_of_a_users_own() -> None:
    even = from_states(start="even", accepting=["even"], transitions={"even": {"ab": "odd"}, "odd": {"ba": "even"}})
    assert [even.matches(text) for text in ("", "a", "ab", "abb", "abc")] == [True, False, True, False, False]
    other = from_states(start=0, accepting=[1], transitions={0: {"#": 1, "é": 2}}, default={0: 0})
    judge = re.compile("[^#é]*#", re.DOTALL)
    for text in ("#", "a😀\n#", "é#", "a", "##"):
        assert other.matches(text) == bool(judge.fullmatch(text)), text
    same = from_states(start=9, accepting={7}, transitions={9: {"#": 7, "é": 5}, 5: {"x": 5}}, default={9: 9})
    written = from_pattern("(?s)[^#é]*#")
    for name in ("atoms", "table", "accepting"):  # however it was said
        assert np.array_equal(getattr(same, name), getattr(written, name))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"start": 0, "accepting": [1], "transitions": {0: {"": 1}}}, "expected characters"),
        ({"start": 0, "accepting": [1], "transitions": {0: {3: 1}}}, "expected characters"),
        ({"start": 0, "accepting": [9], "transitions": {0: {"a": 1}}}, "none of its states"),
        ({"start": 0, "accepting": [1], "transitions": {0: {"ab": 1, "b": 0}}}, "two edges"),
        ({"start": 0, "accepting": [1], "transitions": {1: {"a": 1}}}, "matches no text"),
        ({"start": 0, "accepting": [1], "transitions": [1, 2]}, "another shape"),
        ({"start": 0, "accepting": 1, "transitions": {}}, "another shape"),
        ({"start": [], "accepting": [], "transitions": {}}, "another shape"),
    ],
)
def test_an_automaton_of_another_shape(given: dict, said: str) -> None:
    with pytest.raises(DgemmaError, match=said):
        from_states(**given)


def test_the_parser_is_that_of_this_python() -> None:
    """Its trees are not a public promise: a release that has others is to be read first."""
    assert sys.version_info < (3, 14)
