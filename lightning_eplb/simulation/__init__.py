"""Replay of a load with policies at any cluster size: traces, their formats, and synthetic loads."""
