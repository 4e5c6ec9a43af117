"""Pairs to judge: their schema and readers, the prompts that show them, the sources they come from."""
