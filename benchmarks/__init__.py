"""RewardBench, RM-Bench and RMB: records.py has their records and recorded outputs, scores.py their scores."""
