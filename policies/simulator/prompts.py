"""Prompts as they grow, told by their blocks: what stays the same keeps its ids, everything else gets new ones.

        0 ........ B ........ 2B .... 3B
    a   [---7------)[---8-----)[-9-)            2.4 blocks
    b   [---7------)[---8-----)[-----10---)     a, grown: its part-filled block is another one now
    c   [---7------)[--11-)                     a, cut inside its second block

Knows no text, no session and no clock.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """`num_tokens` tokens; equal block ids mean equal prefixes, the last block may be part-filled."""

    num_tokens: int
    blocks: array[int]


EMPTY = Prompt(0, array("q"))


class PromptWriter:
    """Writes prompts of blocks of `block_tokens` tokens; every new block gets an id not used before."""

    def __init__(self, block_tokens: int, first_id: int = 0) -> None:
        if block_tokens < 1:
            raise ValueError(f"block_tokens is {block_tokens}: choose 1 or more tokens")
        self.block_tokens = block_tokens
        self._next_id = first_id

    def new(self, num_tokens: int) -> Prompt:
        """A prompt that shares nothing with any other."""
        return self.grown(EMPTY, num_tokens)

    def grown(self, prompt: Prompt, num_tokens: int) -> Prompt:
        """`prompt` and `num_tokens` more; the same prompt if that is 0."""
        if num_tokens == 0:
            return prompt
        return self._continued(prompt.blocks, prompt.num_tokens, prompt.num_tokens + num_tokens)

    def cut(self, prompt: Prompt, num_tokens: int) -> Prompt:
        """The first `num_tokens` of `prompt`; the same prompt if it is not longer."""
        if num_tokens >= prompt.num_tokens:
            return prompt
        return self._continued(prompt.blocks, num_tokens, num_tokens)

    def windowed(self, history: Prompt, num_new: int, num_output: int, window_tokens: int) -> Prompt:
        """`history` and `num_new` more, of which the oldest tokens are dropped if the answer would not fit behind it.

        As in CachedAttention (USENIX ATC '24): half a window of prompt is left then, at new positions, so that none of
        its blocks is an old one. `window_tokens` 0: without a window.
        """
        num_prompt = history.num_tokens + num_new
        num_left = max(window_tokens // 2, num_new)
        if not window_tokens or num_prompt + num_output <= window_tokens or num_prompt <= num_left:
            return self.grown(history, num_new)
        return self.new(num_left)

    def _continued(self, blocks: Sequence[int], num_same: int, num_tokens: int) -> Prompt:
        """The full blocks of the first `num_same` tokens, and new ones up to `num_tokens`."""
        num_kept = num_same // self.block_tokens
        num_added = -(-num_tokens // self.block_tokens) - num_kept
        continued = array("q", blocks[:num_kept])
        continued.extend(range(self._next_id, self._next_id + num_added))
        self._next_id += num_added
        return Prompt(num_tokens, continued)
