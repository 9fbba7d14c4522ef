"""Nobody can type a control token: messages are text, whatever they spell and whatever a template does to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from chats import TEMPLATE, laid_out, opened, user, with_template
from dgemma.text.tokens import Tokenizer
from fuzzing import some
from said import says
from tiny import IDS, SPECIAL, VOCAB, tiny_checkpoint

BARE = TEMPLATE.replace(" | trim", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("controls")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return opened(with_template(folder))


def controls(ids: list[int]) -> list[str]:
    return [SPECIAL[i] for i in ids if i < len(SPECIAL)]


PIECES = [
    *SPECIAL,
    "<|",
    "|>",
    "<",
    ">",
    "|",
    "<|tu",
    "rn>",
    "turn|>",
    "a",
    "B",
    " ",
    "\n",
    "é",
    "\U000f0000",
    "\ue000",
    "thought\n",
]
TALK = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@settings(some, max_examples=60)
@given(texts=st.lists(st.one_of(TALK, st.lists(TALK, max_size=3)), min_size=1, max_size=4))
def test_what_is_said_is_text_and_stays_as_it_was(tokenizer: Tokenizer, texts: list[Any]) -> None:
    """The same turns with harmless words have the same control tokens, and every word comes back."""
    said = [user([{"type": "text", "text": one} for one in text] if isinstance(text, list) else text) for text in texts]
    ids = tokenizer.render(said)
    assert controls(ids) == controls(tokenizer.render([user("x")] * len(texts)))
    turns = tokenizer.decode(ids, special=True).removeprefix("<bos>")
    for text in texts:
        whole = "".join(one.strip() for one in text) if isinstance(text, list) else text.strip()
        before, _, turns = turns.partition(f"<|turn>user\n{whole}<turn|>\n")
        assert before == ""


@pytest.mark.parametrize("spelled", SPECIAL)
def test_whoever_wants_them_gets_them(tokenizer: Tokenizer, spelled: str) -> None:
    plain = controls(tokenizer.render([user("a")]))
    assert controls(tokenizer.render([user(f"a{spelled}b")])) == plain
    assert sorted(controls(tokenizer.render([user(f"a{spelled}b")], specials=True))) == sorted([*plain, spelled])
    assert controls(tokenizer.encode(f"a{spelled}b")) == [spelled]
    assert controls(tokenizer.encode(f"a{spelled}b", specials=False)) == []


def test_the_text_of_a_control_token_is_tokenized_as_text(tokenizer: Tokenizer) -> None:
    byte_by_byte = [token for c in "<|turn>" for token in tokenizer.encode(c)]
    assert tokenizer.encode("a<|turn>", specials=False) == [*tokenizer.encode("a"), *byte_by_byte]


# What templates do with content: (template, content) → the text, in which only what the template wrote is a token.
CHANGES: list[tuple[str, str, str, list[str]]] = [
    ("{{ c | trim }}", "  <|turn> ", "<|turn>", []),
    ("{{ c | replace(' ', '') }}", "<|tu rn>", "<|turn>", []),
    ("{{ c.replace('X', '<|turn>') }}", "aX<|turn>", "a<|turn><|turn>", ["<|turn>"]),
    ("{{ c | replace('<|turn>', '[x]') }}", "a<|turn>b<", "a[x]b<", []),
    ("{{ c | lower }}", "<|TURN>", "<|turn>", []),
    ("{{ c[:4] }}{{ c[4:] }}", "<|turn>", "<|turn>", []),
    ("{{ c | list | join }}", "<|turn>", "<|turn>", []),
    ("{{ c.split('|') | join('|') }}", "<|turn>", "<|turn>", []),
    ("{{ c | reverse }}", ">nrut|<", "<|turn>", []),
    ("{% for x in c %}{{ x }}{% endfor %}", "<|turn>", "<|turn>", []),
    ("{{ '<|turn>' + c + '<turn|>' }}", "<bos>", "<|turn><bos><turn|>", ["<|turn>", "<turn|>"]),
    ("{{ '<' + c + '>' }}", "|turn", "<|turn>", []),
    ("{{ '<|' ~ messages[0].role ~ '|>' }}{{ c }}", "image", "<|user|>image", []),
    ("{{ c ~ c }}{{ c * 2 }}", "<bos>", "<bos>" * 4, []),
    ("{{ '%s-%s' % (c, c) }}{{ '{}'.format(c) }}", "<bos>", "<bos>-<bos><bos>", []),
    ("{{ c | tojson }}", '<bos>"\n', '"<bos>\\"\\n"', []),
    ("{{ {c: [c]} }}", "<bos>'", "{\"<bos>'\": [\"<bos>'\"]}", []),
    ("{{ c | e }}", "<bos>&", "&lt;bos&gt;&amp;", []),
    ("{{ c | striptags }}", "&lt;bos&gt;", "<bos>", []),
    ("{{ (c | e).unescape() if (c | e).unescape is defined else c }}", "<bos>", "<bos>", []),
    ("{{ c | safe }}{{ c | string }}{{ c | title }}", "<bos>", "<bos><bos><Bos>", []),
    ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(c) | replace('[', '') }}", "<bos>", "<bos>]", []),
    ("{% set x %}{{ c }}{% endset %}{{ x }}{% filter upper %}{{ c }}{% endfilter %}", "<bos>", "<bos><BOS>", []),
    ("{% set n = namespace(t='') %}{% for p in c.split('<channel|>') %}{% set n.t = n.t + p.split('<|channel>')[0] %}"
     "{% endfor %}{{ n.t }}", "<|channel>a<channel|>b<|turn>", "b<|turn>", []),
    ("{{ 'y' if '<|turn>' in c else 'n' }}{{ c.count('<') }}{{ c.find('<|') }}{{ c.startswith('<') }}{{ c == '<b>' }}",
     "<|turn>", "y10TrueFalse", []),
    ("{{ c.partition('|>')[0] }}{{ c.rsplit('<', 1)[-1] }}{{ c.strip('<') }}{{ c.removeprefix('<') }}{{ c | length }}",
     "<a|><", "<aa|>a|><5", []),
    ("{{ {'<x>': 1}[c] }}{{ c in ['<x>'] }}{{ [c, 'b'] | sort | join(',') }}", "<x>", "1True<x>,b", []),
    ("{{ c | int(7) }}{{ c | wordcount }}{{ c | first }}{{ c | last }}{{ c.isascii() }}", "<bos>", "71<>True", []),
    ("{{ messages | map(attribute='content') | join('<bos>') }}", "<eos>", "<eos>", []),
    ("{{ c.split() | join('<bos>') }}", "<eos> <eos>", "<eos><bos><eos>", ["<bos>"]),
    ("{{ c.encode() | string }}", "a", "b'a'", []),
    ("{{ c.encode('utf8').decode() }}", "<bos>", "<bos>", []),
    ("{{ c in 'a <b> c' }}{{ c not in '<b>' }}{{ c is in('<b><c>') }}{{ c in messages[0] }}{{ c in [c] }}", "<b>",
     "TrueFalseTrueFalseTrue", []),
    ("{{ 'a<b>a'.strip(c) }}", "<>a", "b", []),
    ("{{ c | urlize }}{{ {'k': c} | xmlattr }}", "<bos>", "&lt;bos&gt; k=\"&lt;bos&gt;\"", []),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CHANGES)))
def test_it_survives_what_templates_do(folder: Path, case: int) -> None:
    template, content, text, tokens = CHANGES[case]
    tokenizer = opened(with_template(folder, "{% set c = messages[0].content %}" + template, name=f"change{case}"))
    ids = tokenizer.render([user(content)])
    assert (tokenizer.decode(ids, special=True), controls(ids)) == (text, tokens)


def test_all_that_comes_from_a_user_is_text(tokenizer: Tokenizer) -> None:
    """Names, keys, arguments, results, reasoning and roles too."""
    function = {"name": "f<bos>", "arguments": {"k<eos>": "v<|turn>", "l": ["<turn|>"]}}
    said = [
        user("x"), {"role": "assistant", "reasoning": "<channel|>", "tool_calls": [{"function": function}]},
        {"role": "tool", "name": "<bos>", "content": "<tool_response|><|turn>"},
    ]  # fmt: skip
    text = laid_out(tokenizer, *said)
    assert "v<|turn>" in text and "k<eos>" in text
    # The template's own: one turn of a user, one of the model, its channel and its open result (the rest are no tokens
    # of this small vocabulary).
    found = controls(tokenizer.render(said))
    assert found == ["<bos>", "<|turn>", "<turn|>", "<|turn>", "<|channel>", "<channel|>", "<|tool_response>"]
    with says("no role <|turn>"):
        tokenizer.render([{"role": "<|turn>", "content": "x"}])


@settings(some, max_examples=30)
@given(text=st.text(st.sampled_from("ab<|>\n &;\"'{%}é\U000f0000\U000f0001")).filter(lambda t: "<|" not in t))
def test_ordinary_text_is_tokenized_as_before(tokenizer: Tokenizer, text: str) -> None:
    """As the rendered text is where special tokens are on: markers leave no trace in it."""
    said = [user(text), {"role": "assistant", "content": text}, user("x")]
    assert tokenizer.render(said) == tokenizer.render(said, specials=True)
    assert tokenizer.encode(text, specials=False) == tokenizer.encode(text)


def test_a_control_token_of_one_letter_is_named(tmp_path: Path) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    folder = with_template(tmp_path)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("q", special=True, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    with says("'q' in a message is a control token"):
        opened(folder).render([user("a q")])


def test_text_without_a_template_cannot_have_them_either(tmp_path: Path) -> None:
    import dgemma
    from tiny import tiny_checkpoint

    folder = tiny_checkpoint(tmp_path)
    model = dgemma.load(str(folder), backend="numpy")
    assert IDS["<|image|>"] not in model.prompt_ids("<|image|>")  # an image's placeholder, typed
    assert model.prompt_ids("<|turn>", raw=True)[-1] == IDS["<|turn>"]
    (folder / "chat_template.jinja").unlink()
    model = dgemma.load(str(folder), backend="numpy")
    assert controls(model.prompt_ids("<|turn>a")) == ["<bos>"]
    assert controls(model.prompt_ids("<|turn>a", specials=True)) == ["<bos>", "<|turn>"]


@pytest.mark.parametrize("kind", ["words", "pieces", "characters"])
def test_what_the_tokenizer_does_not_know_is_no_control_token(tmp_path: Path, kind: str) -> None:
    """Beside text that spells a control token, unknown words are what they are without it."""
    vocab = IDS | {"hi": 16, "<": 17, "h": 18, "i": 19, "|": 20}
    model = {
        "words": lambda: models.WordLevel(vocab, unk_token="<unk>"),
        "pieces": lambda: models.WordPiece(vocab, unk_token="<unk>"),
        "characters": lambda: models.BPE(vocab, [], unk_token="<unk>"),
    }[kind]()
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    folder = tiny_checkpoint(tmp_path)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder, vocab_size=VOCAB)
    unknown = tokenizer.encode("zoo", specials=False)
    assert set(unknown) == {IDS["<unk>"]}
    assert tokenizer.encode("hi < zoo", specials=False)[-len(unknown) :] == unknown
    typed = controls(tokenizer.encode("zoo <|turn> hi <eos>", specials=False))
    assert len(typed) > len(unknown) and set(typed) == {"<unk>"}
