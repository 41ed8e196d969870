"""Members of different vocabularies, read as what they have in common: the text that they write, byte by byte.

A vocabulary is put in the order of its tokens' bytes (`byte_order`); a member's lattice (`lattice`) sums over all the
ways in which its tokens can spell a text while that text is being written; `utf8` says which bytes may follow. What
comes out is rows of 257 log-probabilities, 256 bytes and `END`, which `ensembles.pooling` pools like any others.
Nothing here knows a model: distributions are asked for and given.

    P(b) = Σ over covers c of b  Π_i p(c_i | c_<i),    p(x | b) = P(bx) / P(b)

where a cover is a sequence of tokens whose bytes begin with b and which, without its last token, does not reach b's
end.

References: Phan et al., "Exact byte-level probabilities from tokenized language models", 2024; Vieira et al., "From
language models over tokens to language models over characters", 2024 (beam of covers); Hayase et al., "Sampling from
your language model one byte at a time", 2025 (the tree of valid covers for BPE).
"""

END = 256  # of a row: the text ends here
ROW = 257  # 256 bytes and END
