"""Covering arrays: rows in which every two levels of two factors meet, in place of the product of all factors."""

import itertools
import math
import zlib


def pairs(row):
  """The pairs of levels in a row, each level with the factor that it is of."""
  return set(itertools.combinations(enumerate(row), 2))


def covering(rows, chosen=()):
  """`chosen`, and of `rows` as few more as the greedy choice finds, so that every pair that `rows` have is there.

  The order of the rows decides between equals: it is that of a hash, which spreads what is chosen over all factors
  and stays what it is for the others when a level is added.
  """
  rows = sorted(rows, key=lambda row: (zlib.crc32("-".join(map(str, row)).encode()), row))
  chosen = list(chosen)
  missing = set().union(*map(pairs, rows)).difference(*map(pairs, chosen))
  for gain in range(math.comb(len(rows[0]), 2), 0, -1):
    for row in rows:
      if len(new := pairs(row) & missing) >= gain:
        chosen.append(row)
        missing -= new
  return chosen
