"""tokenizer.json: our tokenizer in the format of the `tokenizers` library, which wants merges instead of ranks.

Other programs (transformers, vLLM, exports) load that file; nothing in nanochat reads it. Mind that they find special
tokens inside text unless told otherwise (`encode_special_tokens = True`), which nanochat's own encoder never does.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers


def huggingface_json(ranks: Mapping[bytes, int], pattern: str, special_tokens: Sequence[str]) -> str:
    """The text of tokenizer.json. Raises ValueError where the ranks cannot come from byte-pair merging."""
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(spelled[left], spelled[right]) for left, right in merges_from_ranks(ranks)]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special_tokens])
    return model.to_str()


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in tokenizer.json: itself where Latin-1 prints it, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def merges_from_ranks(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two tokens that each token of two bytes or more was merged from, in order of rank.

    Encoding a token's bytes with only the tokens older than itself must end in exactly those two.
    """
    for token, rank in sorted(ranks.items(), key=lambda pair: pair[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(pairs)
            if best >= rank:
                raise ValueError(f"token {rank} ({token!r}) is not a merge of two older tokens")
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts[0], parts[1]
