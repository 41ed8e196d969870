"""Which bytes may follow so that a text is UTF-8: an automaton, so that no text that is drawn by bytes can be broken.

    state = utf8.START
    row[~utf8.ALLOWED[state]] = -inf         # (257,), END among them: a text ends between two characters
    state = utf8.NEXT[state, byte]

Eight states and the one that nothing leaves. Lead bytes that begin only overlong forms, surrogates or what lies
beyond U+10FFFF are no beginning, and the second byte after E0, ED, F0 and F4 has a range of its own (RFC 3629,
section 4).
"""

from __future__ import annotations

import numpy as np

from ensemble_server.ensembles.spelling import END, ROW

START, _LAST, _LAST_TWO, _LAST_THREE, _AFTER_E0, _AFTER_ED, _AFTER_F0, _AFTER_F4, BROKEN = range(9)

_TRANSITIONS = (  # from, first byte, last byte, to
    (START, 0x00, 0x7F, START),
    (START, 0xC2, 0xDF, _LAST),
    (START, 0xE0, 0xE0, _AFTER_E0),
    (START, 0xE1, 0xEC, _LAST_TWO),
    (START, 0xED, 0xED, _AFTER_ED),
    (START, 0xEE, 0xEF, _LAST_TWO),
    (START, 0xF0, 0xF0, _AFTER_F0),
    (START, 0xF1, 0xF3, _LAST_THREE),
    (START, 0xF4, 0xF4, _AFTER_F4),
    (_LAST, 0x80, 0xBF, START),
    (_LAST_TWO, 0x80, 0xBF, _LAST),
    (_LAST_THREE, 0x80, 0xBF, _LAST_TWO),
    (_AFTER_E0, 0xA0, 0xBF, _LAST),
    (_AFTER_ED, 0x80, 0x9F, _LAST),
    (_AFTER_F0, 0x90, 0xBF, _LAST_TWO),
    (_AFTER_F4, 0x80, 0x8F, _LAST_TWO),
)

NEXT = np.full((9, 256), BROKEN, dtype=np.uint8)  # [state, byte] -> state
for _state, _first, _last, _to in _TRANSITIONS:
    NEXT[_state, _first : _last + 1] = _to

ALLOWED = np.zeros((9, ROW), dtype=bool)  # [state, byte or END]
ALLOWED[:, :END] = NEXT != BROKEN
ALLOWED[START, END] = True


def state_after(data: bytes) -> int:
    """The state after a text, or after its last incomplete character: b"a\\xc3" waits for one more byte."""
    state = START
    for byte in data:
        state = int(NEXT[state, byte])
    return state
