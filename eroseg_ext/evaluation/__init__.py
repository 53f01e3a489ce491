"""The worst case over several attacks, with scores and sanity checks."""
