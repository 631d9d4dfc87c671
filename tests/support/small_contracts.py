"""Contracts of one claim, as text, for tests that falsify something small."""

# A claim about sizes alone: it is blind to what the decoders compute.
SIZES = """
falsification_tests:
  - id: SIZE
    rule: a Q4_K superblock takes 144 bytes
    prediction: the loader holds 144 bytes for each of them
    if_fails: something is padded
    falsifier:
      check: table
      experiment: superblock
      params: {table: superblock_bytes, expected: {Q4_K: 144, Q6_K: 210}}
      sabotage: [scale-cache]
"""
