"""Prompt lookup: what followed the last tokens when they occurred before in the same text is drafted again."""

from __future__ import annotations

from collections.abc import Iterable

LENGTHS = (4, 3, 2)  # tokens of a match that are looked up, the longest first

# Share of the drafts that were right after a match of n tokens, n = 2..16, in the standard library in 2,048 byte pairs:
# the first 4,000 tokens of each file of the splits val and test.
ACCEPTANCE = (0.45, 0.55, 0.61, 0.66, 0.7, 0.73, 0.76, 0.77, 0.77, 0.79, 0.8, 0.83, 0.81, 0.82, 0.9)

LONGEST = len(ACCEPTANCE) + 1  # tokens of a match; longer ones are not told apart


class PromptLookup:
    """The tokens of one row, prompt and answer, with an index from their n-grams to the place after the last of them.

    The method is `prompt_lookup_num_tokens` of transformers (Saxena 2023, "Prompt Lookup Decoding"). Each token takes
    one entry per length in the index.

    Args:
        tokens: the prompt.
        lengths: the numbers of tokens by which a match is found. The longest that matches decides.
    """

    def __init__(self, tokens: Iterable[int] = (), lengths: Iterable[int] = LENGTHS) -> None:
        self.tokens: list[int] = []
        self.lengths = sorted(set(lengths), reverse=True)
        self._after: dict[tuple[int, ...], int] = {}
        self.append(tokens)

    def append(self, tokens: Iterable[int]) -> None:
        """Adds tokens to the row."""
        for token in tokens:
            # What ends the row is indexed with the token after it only, so that it never matches itself.
            place = len(self.tokens)
            for n in self.lengths:
                if n <= place:
                    self._after[tuple(self.tokens[place - n :])] = place
            self.tokens.append(int(token))

    def propose(self, length: int) -> tuple[list[int], list[float]]:
        """What followed the latest earlier occurrence of the last tokens.

        Args:
            length: number of tokens at most. They are fewer only if there is no such occurrence. One that reaches the
                end of the row goes on with the proposed tokens themselves: the row's last tokens repeat.

        Returns:
            The tokens, and for each the probability that it is accepted, given that the ones before it are.
        """
        tokens, size = self.tokens, len(self.tokens)
        for n in self.lengths:
            place = self._after.get(tuple(tokens[size - n :]), 0) if n <= size else 0
            if place:
                break
        else:
            return [], []
        while n < LONGEST and n < place and tokens[place - n - 1] == tokens[size - n - 1]:
            n += 1
        period = size - place
        proposed = [tokens[place + i % period] for i in range(length)]
        return proposed, [ACCEPTANCE[_bucket(n + i)] for i in range(length)]


def _bucket(match: int) -> int:
    """The index into ACCEPTANCE for a match of `match` tokens."""
    return min(max(match - 2, 0), len(ACCEPTANCE) - 1)
