"""What a change cannot have touched: the digests of all that a run depends on, and runs carried from another bundle."""
