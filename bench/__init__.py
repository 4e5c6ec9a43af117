"""Benchmarks against peers: ours and the peer on the same work, alternately; the last line printed is JSON."""
