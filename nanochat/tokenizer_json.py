"""tokenizer.json: our tokenizer in the format of the `tokenizers` library, which wants merges instead of ranks.

Other programs (transformers, vLLM, exports) load that file. Mind that they find special tokens inside text unless told
otherwise (`encode_special_tokens = True`), which nanochat's own encoder never does. nanochat reads it where somebody
brings nothing else (RustBPETokenizer.from_json); a tokenizer directory is read by its ranks.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers


def huggingface_json(ranks: Mapping[bytes, int], pattern: str, special_tokens: Sequence[str]) -> str:
    """The text of tokenizer.json. Raises ValueError where the ranks cannot come from byte-pair merging."""
    letters = _byte_letters()
    spelled = {token: _spelled(token, letters) for token in ranks}
    merges = [(spelled[left], spelled[right]) for left, right in merges_from_ranks(ranks)]
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    model = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in special_tokens])
    return model.to_str()


def read_json(text: str) -> tuple[dict[bytes, int], str, list[str]]:
    """(ranks, pattern, names of the special tokens) of a tokenizer.json that describes a tokenizer of our kind.

    Raises ValueError, one line, for anything else: text that is no JSON, another model or pre-tokenizer, merges that
    are not in the order of the ids, special tokens whose ids do not follow those of the rest.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"no JSON: {error}") from None
    try:
        model, pattern = content["model"], _pattern(content["pre_tokenizer"])
        vocab, merges = model["vocab"], [_merge(merge) for merge in model["merges"]]
        added = sorted((token["id"], token["content"]) for token in content["added_tokens"])
        kind = model["type"]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"not of a byte-level BPE with one split pattern ({type(error).__name__}: {error})") from None
    if kind != "BPE":
        raise ValueError(f"its model is {kind}, not BPE")
    letters = _byte_letters()
    bytes_of = {letter: byte for byte, letter in enumerate(letters)}
    names = [name for _, name in added]
    try:
        ranks = {bytes(bytes_of[letter] for letter in token): rank
                 for token, rank in vocab.items() if token not in names}  # fmt: skip
    except KeyError as error:
        raise ValueError(f"a token holds {error}, which stands for no byte") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("its ids are not 0, 1, 2, ... without gaps")
    if [number for number, _ in added] != list(range(len(ranks), len(ranks) + len(added))):
        raise ValueError("the ids of its special tokens do not follow those of the others")
    wanted = [(_spelled(left, letters), _spelled(right, letters)) for left, right in merges_from_ranks(ranks)]
    if merges != wanted:
        raise ValueError("its merges are not those of its ids, in order: nanochat merges the pair of lowest id first")
    return ranks, pattern, names


def _pattern(pre_tokenizer: Mapping[str, Any]) -> str:
    split, byte_level = pre_tokenizer["pretokenizers"]
    if (split["type"], split["behavior"], split["invert"]) != ("Split", "Isolated", False):
        raise ValueError(f"a pre-tokenizer of type {split['type']}")
    if (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) != ("ByteLevel", False, False):
        raise ValueError(f"a pre-tokenizer of type {byte_level['type']}")
    return split["pattern"]["Regex"]


def _merge(merge: Any) -> tuple[str, str]:
    """Older files write "a b" for what newer ones write ["a", "b"]."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in tokenizer.json: itself where Latin-1 prints it, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _spelled(token: bytes, letters: Sequence[str]) -> str:
    return "".join(letters[byte] for byte in token)


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
