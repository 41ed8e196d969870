from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ensemble_server.ensembles.base import Grammar
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.engines.shared import grammar
from ensemble_server.server.engines.shared.grammar import GrammarMask
from ensemble_server.server.engines.shared.grammar_checks import MAX_OPTIONAL_PROPERTIES, MAX_SOURCE_CHARS
from ensemble_server.server.weights.view import Surface
from tests.conftest import make_tokenizer

VOCAB = 330  # wider than the tokenizer, as logits are
EOS = frozenset({0, 2})
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b😀"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Surface(AutoTokenizer.from_pretrained(folder))


def json_schema(schema: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


def mask_of(surface: Surface, structure: Grammar) -> GrammarMask:
    return grammar.compiled(structure, surface.tokenizer, VOCAB, EOS).new_mask()


def allowed_ids(mask: GrammarMask) -> set[int]:
    allowed = mask.allowed()
    assert allowed.shape == (VOCAB,) and allowed.dtype == torch.bool
    return set(allowed.nonzero().flatten().tolist())


def spell(surface: Surface, mask: GrammarMask, text: str) -> str:
    """Feed `text`, by the longest token that is allowed each time. -> what of it was allowed"""
    data, position = text.encode(), 0
    while position < len(data):
        fitting = [i for i in allowed_ids(mask) - EOS if data.startswith(surface.bytes_of(i), position)]
        if not fitting:
            return data[:position].decode()
        token_id = max(fitting, key=lambda token_id: len(surface.bytes_of(token_id)))
        mask.advance(token_id)
        position += len(surface.bytes_of(token_id))
    return text


# --- exactly the right next tokens ---


@pytest.mark.parametrize("seed", range(5))
def test_each_step_allows_the_tokens_that_lead_to_a_match(surface: Surface, seed: int) -> None:
    """Against a list of all matches: a token may follow if some match begins with the text and the token's bytes.

    Where the next byte is certain, llguidance allows only the token that the tokenizer itself would write there.
    """
    matches = [text.encode() for text in ("the fox", "the fox jumps", "the 😀", "数学", "to be")]
    mask = mask_of(surface, Grammar("regex", "the (fox( jumps)?|😀)|数学|to be"))
    numbers, text = random.Random(seed), b""
    while not mask.is_finished:
        possible = {
            token_id
            for token_id in range(3, surface.vocab_size)
            if any(match.startswith(text + surface.bytes_of(token_id)) for match in matches)
        }
        if text in matches:
            possible |= EOS
        next_bytes = {match[len(text) :][:1] for match in matches if match.startswith(text)}
        if len(next_bytes) > 1:
            assert allowed_ids(mask) == possible
        assert set() < allowed_ids(mask) <= possible
        token_id = numbers.choice(sorted(allowed_ids(mask)))
        mask.advance(token_id)
        text += surface.bytes_of(token_id) if token_id not in EOS else b""
    assert text in matches


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_drawn_fits_the_schema(surface: Surface, seed: int) -> None:
    mask, numbers = mask_of(surface, json_schema(PERSON)), random.Random(seed)
    token_ids: list[int] = []
    while not mask.is_finished:
        token_ids.append(numbers.choice(_without_blanks(surface, allowed_ids(mask))))
        mask.advance(token_ids[-1])
    person = json.loads(surface.decode(token_ids, skip_special_tokens=True))
    assert set(person) == {"name", "age", "tags"}
    assert isinstance(person["name"], str) and len(person["name"]) <= 4
    assert 0 <= person["age"] <= 150 and isinstance(person["age"], int)
    assert len(person["tags"]) <= 2 and set(person["tags"]) <= {"a", "b😀"}


def _without_blanks(surface: Surface, token_ids: set[int]) -> Sequence[int]:
    """JSON allows any number of blanks between its parts; drawing them would make a test long."""
    full = sorted(token_id for token_id in token_ids if surface.bytes_of(token_id).strip())
    return full or sorted(token_ids)


@pytest.mark.parametrize(
    "text",
    [
        '{"a":1}',
        '{ "a" : [true, null, {"b": -1.5e3}] }',
        '{"emoji":"😀👩‍👩‍👧","数":"学"}',
        r'{"escaped":"\"\\\n\u001f"}',  # other characters stand for themselves, not as \uXXXX
        "{}",
    ],
)
def test_any_object_is_a_json_object(surface: Surface, text: str) -> None:
    mask = mask_of(surface, Grammar("json_object"))
    assert spell(surface, mask, text) == text
    assert mask.is_finished or allowed_ids(mask) >= EOS


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("[1]", ""),
        ('"text"', ""),
        ("{a:1}", "{"),
        ('{"a":1,}', '{"a":1,'),
        ('{"a":01}', '{"a":0'),
        ('{"a":"line\nbreak"}', '{"a":"line'),
        (r'{"a":"\x"}', '{"a":"\\'),
        ('{"a":tru3}', '{"a":tru'),
    ],
)
def test_what_is_no_json_object_stops_being_allowed_at_its_first_wrong_byte(
    surface: Surface, text: str, allowed: str
) -> None:
    assert spell(surface, mask_of(surface, Grammar("json_object")), text) == allowed


def test_bytes_that_are_no_utf8_are_not_allowed_inside_a_string(surface: Surface) -> None:
    mask = mask_of(surface, Grammar("json_object"))
    spell(surface, mask, '{"a":"')
    of_byte = {surface.bytes_of(token_id): token_id for token_id in range(3, 259)}
    mask.advance(of_byte[b"\xf0"])
    allowed = {surface.bytes_of(token_id)[0] for token_id in allowed_ids(mask)}
    assert allowed == set(range(0x90, 0xC0))  # what can be the second of four bytes


def test_a_string_constant_is_allowed_in_its_escaped_form(surface: Surface) -> None:
    constant = 'say "hi" 😀\n'
    mask = mask_of(surface, json_schema({"const": constant}))
    text = json.dumps(constant, ensure_ascii=False)
    assert spell(surface, mask, text) == text
    assert mask.is_finished


# --- where a text ends ---


def test_every_end_of_text_id_may_end_a_complete_text(surface: Surface) -> None:
    for eos_id in EOS:
        mask = mask_of(surface, Grammar("regex", "a*"))
        assert allowed_ids(mask) & set(range(3)) == EOS
        mask.advance(eos_id)
        assert mask.is_finished


def test_an_incomplete_text_cannot_end(surface: Surface) -> None:
    mask = mask_of(surface, Grammar("regex", "ab"))
    assert not allowed_ids(mask) & EOS
    spell(surface, mask, "a")
    assert not allowed_ids(mask) & EOS and not mask.is_finished
    spell(surface, mask, "b")
    assert mask.is_finished


def test_a_token_that_is_not_allowed_is_an_error(surface: Surface) -> None:
    mask = mask_of(surface, Grammar("regex", "ab"))
    with pytest.raises(RuntimeError, match="the grammar cannot go on") as caught:
        mask.advance(surface.encode("z")[0])
    assert "\n" not in str(caught.value)


def test_choices_do_not_share_their_state(surface: Surface) -> None:
    structure = Grammar("regex", "ab")
    one, two = mask_of(surface, structure), mask_of(surface, structure)
    spell(surface, one, "a")
    assert allowed_ids(one) != allowed_ids(two)


def test_views_of_one_tokenizer_share_its_preparation(surface: Surface) -> None:
    grammar._prepared.cache_clear()
    grammar.compiled.cache_clear()
    for view in (surface, Surface(surface.tokenizer, system_prompt="Be brief.")):
        mask_of(view, Grammar("json_object"))
    assert grammar._prepared.cache_info().misses == 1
    assert grammar.compiled.cache_info().misses == 1


# --- what is refused ---


@pytest.mark.parametrize(
    ("structure", "problem"),
    [
        (Grammar("regex", "("), "the regex is not valid: .*unclosed group"),
        (Grammar("regex", "(?=a)b"), "the regex is not valid: .*look-around"),
        (Grammar("json_schema", "{"), "the json_schema is not valid"),
        (Grammar("json_schema", ""), "the json_schema is not valid"),
        (json_schema([]), "the json_schema is not valid: schema must be an object or boolean"),
        (json_schema({"type": "nothing"}), "the json_schema is not valid: Invalid type: nothing"),
        (json_schema({"$ref": "#/nowhere"}), "the json_schema is not valid: .*nowhere"),
        (json_schema({"enum": []}), "the json_schema is not valid: Unsatisfiable"),
        (json_schema({"if": {}, "then": {}}), "the json_schema is not valid: Unimplemented keys"),
        (json_schema({"type": "string", "pattern": "("}), "the json_schema is not valid"),
    ],
    ids=lambda value: value.source if isinstance(value, Grammar) else "",
)
def test_a_grammar_that_cannot_be_compiled_is_the_requests_fault(
    surface: Surface, structure: Grammar, problem: str
) -> None:
    with pytest.raises(RequestError, match=f"(?s){problem}") as checked:
        grammar.check(structure)
    with pytest.raises(RequestError, match=f"(?s){problem}") as compiled:
        mask_of(surface, structure)
    assert checked.value.param == compiled.value.param == "response_format"


@pytest.mark.parametrize("structure", [Grammar("json_object"), json_schema(PERSON), Grammar("regex", "a+")])
def test_a_good_grammar_passes_the_check(structure: Grammar) -> None:
    grammar.check(structure)


def flat_schema(num_optional: int, num_required: int = 0) -> Grammar:
    names = [f"k{number}" for number in range(num_optional + num_required)]
    schema = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": names[num_optional:],
    }
    return json_schema(schema)


def test_as_many_optional_properties_as_are_taken_can_be_written(surface: Surface) -> None:
    structure = flat_schema(MAX_OPTIONAL_PROPERTIES)
    grammar.check(structure)
    text = f'{{"k1":"a","k{MAX_OPTIONAL_PROPERTIES - 1}":"b"}}'
    assert spell(surface, mask_of(surface, structure), text) == text


def test_an_object_with_more_optional_properties_is_refused_before_it_is_compiled(surface: Surface) -> None:
    for structure in (flat_schema(1000), json_schema({"type": "array", "items": json.loads(flat_schema(3000).source)})):
        with pytest.raises(RequestError, match="optional properties, at most 490 can be followed") as refused:
            grammar.check(structure)
        assert refused.value.param == "response_format"
        with pytest.raises(RequestError, match="optional properties"):
            mask_of(surface, structure)
    grammar.check(flat_schema(10, num_required=600))


def test_a_source_that_is_too_large_is_refused_before_it_is_compiled(surface: Surface) -> None:
    structure = Grammar("regex", "(a|b)" * (MAX_SOURCE_CHARS // 5) + "c")
    for refuse in (lambda: grammar.check(structure), lambda: mask_of(surface, structure)):
        with pytest.raises(RequestError, match="it has 100001 characters, at most 100000"):
            refuse()


def test_a_grammar_that_outgrows_the_parser_is_the_requests_fault_and_shows_no_state(surface: Surface) -> None:
    """Two objects side by side, each of which is small enough."""
    halves = [json.loads(flat_schema(400).source)["properties"]]
    halves.append({f"x{name}": schema for name, schema in halves[0].items()})
    mask = mask_of(surface, json_schema({"anyOf": [{"type": "object", "properties": half} for half in halves]}))
    with pytest.raises(UnsupportedError, match="grew too complex while it was followed") as refused:
        spell(surface, mask, '{"k1":"a"}')
    assert refused.value.param == "response_format" and "\n" not in str(refused.value)


def test_tokens_that_are_no_bytes_are_not_supported() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[END]": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[END]")
    with pytest.raises(UnsupportedError, match="structured output needs a fast tokenizer with byte-level tokens"):
        grammar.compiled(Grammar("json_object"), tokenizer, 3, frozenset({2}))


@pytest.mark.slow
def test_the_demo_models_tokenizer_is_supported() -> None:
    from ensemble_server.server.weights.checkpoints import resolve_checkpoint

    folder = resolve_checkpoint("HuggingFaceTB/SmolLM2-135M-Instruct", relative_to=Path(), may_download=False)
    surface = Surface(AutoTokenizer.from_pretrained(folder))
    mask = grammar.compiled(json_schema(PERSON), surface.tokenizer, 49152, frozenset({2})).new_mask()
    for token_id in surface.encode('{"name":"😀","age":7,"tags":["a"]}'):
        assert token_id in set(mask.allowed().nonzero().flatten().tolist())
        mask.advance(token_id)
    assert mask.is_finished


# --- by bytes ---


def by_bytes(kind: str, source: str) -> GrammarMask:
    return grammar.compiled_by_bytes(Grammar(kind, source)).new_mask()


def allowed_bytes(mask: GrammarMask) -> list[int]:
    return grammar.byte_row(mask.allowed()).nonzero()[0].tolist()


def test_bytes_follow_a_grammar_whatever_the_vocabulary() -> None:
    mask = by_bytes("regex", "(é|ab)+")
    assert allowed_bytes(mask) == [ord("a"), "é".encode()[0]]
    for byte in "é".encode():
        mask.advance(byte)
    assert allowed_bytes(mask) == [ord("a"), "é".encode()[0], 256]  # it may end here
    assert not mask.is_finished


def test_bytes_end_where_nothing_may_follow() -> None:
    mask = by_bytes("regex", "ab")
    mask.advance(ord("a"))
    with pytest.raises(RuntimeError, match="cannot go on"):
        by_bytes("regex", "ab").advance(ord("b"))
    mask.advance(ord("b"))
    assert mask.is_finished


def test_a_random_walk_by_bytes_is_valid_json() -> None:
    rng = random.Random(0)
    for _ in range(5):
        mask, text = by_bytes("json_schema", json.dumps(PERSON)), bytearray()
        while not mask.is_finished and len(text) < 400:
            byte = rng.choice([one for one in allowed_bytes(mask) if one not in b" \n\t\r"] or allowed_bytes(mask))
            if byte == 256:
                break
            mask.advance(byte)
            text.append(byte)
        assert set(json.loads(text.decode(errors="replace"))) == set(PERSON["properties"])


@pytest.mark.parametrize("structure", [json_schema(PERSON), Grammar("json_object")])
def test_white_space_between_json_tokens_is_bounded(surface, structure):
    mask = mask_of(surface, structure)
    assert spell(surface, mask, "{" + "\n" * 100) == "{" + "\n" * 16
