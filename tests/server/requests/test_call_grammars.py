"""Grammars that force calls."""

from __future__ import annotations

from ensemble_server.server.requests.call_grammars import named_call_grammar, required_call_grammar
from ensemble_server.server.requests.structured_output import check_grammar


def test_grammars_of_forced_calls_are_valid_also_with_references():
    schema = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Point"}},
        "$defs": {"Point": {"type": "integer"}},
    }
    check_grammar(named_call_grammar(schema), param="tools")
    check_grammar(named_call_grammar(None), param="tools")
    check_grammar(required_call_grammar([("f", schema), ("g", None)]), param="tools")
