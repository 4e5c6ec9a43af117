"""RewardBench, RM-Bench and RMB: their records and recorded outputs (records.py), their published scores (scores.py)."""
