"""Matching of stop strings on the device during sampling.

An automaton over the bytes of the tokens tracks how much of a stop string the text ends with (Aho and Corasick, doi
10.1145/360825.360855). Its transitions over whole tokens are one table, so that a decoding step costs one lookup; a
stop string is matched across token borders and inside a token alike.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vau_jax.common.files import InputError

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase


def stop_table(stop_strings: Sequence[str], tokens: Sequence[bytes]) -> np.ndarray:
    """int32 [S, V]: the state after token v in state s. The first state is 0; the last means "matched" and is never
    left.
    """
    moves = _byte_moves([text.encode("utf-8") for text in stop_strings])  # [S, 256]
    states = np.repeat(np.arange(len(moves), dtype=np.int32)[:, None], len(tokens), axis=1)
    lengths = np.asarray([len(token) for token in tokens])
    for at in range(lengths.max(initial=0)):
        longer = np.flatnonzero(lengths > at)
        read = np.asarray([tokens[i][at] for i in longer])
        states[:, longer] = moves[states[:, longer], read]
    return states


def _byte_moves(texts: Sequence[bytes]) -> np.ndarray:
    """int32 [S, 256]: the automaton over single bytes; a state is the longest prefix of a stop string just read."""
    if not all(texts):
        raise InputError("a stop string is empty: give at least one character")
    prefixes = sorted({text[:n] for text in texts for n in range(len(text))}, key=len)
    number = {prefix: i for i, prefix in enumerate(prefixes)}
    result = len(prefixes)
    moves = np.full((result + 1, 256), result, np.int32)
    for prefix, state in number.items():
        for byte in range(256):
            read = prefix + bytes([byte])
            if not any(read.endswith(text) for text in texts):
                moves[state, byte] = next(number[read[i:]] for i in range(len(read) + 1) if read[i:] in number)
    return moves


def token_bytes(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> list[bytes]:
    """The bytes of each token id of a byte-level BPE; ids without a token have none."""
    added = {i: token.content.encode("utf-8") for i, token in tokenizer.added_tokens_decoder.items()}
    byte_of = {letter: byte for byte, letter in _byte_letters().items()}
    result = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(vocab_size, len(tokenizer)))))):
        written = added[i] if i in added else bytes(byte_of[letter] for letter in token or "")
        result.append(written)
    return result + [b""] * (vocab_size - len(result))


def _byte_letters() -> dict[int, str]:
    """The letter that represents each byte in a byte-level vocabulary (GPT-2's): itself where it is printable."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}
