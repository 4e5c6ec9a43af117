"""Benchmarks against peers: each runs ours and the peer on the same work, alternately, and prints one JSON line last."""
